"""The compiled arithmetic under attention on a CPU, against numpy in float64."""

import runpy
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from bytejepa.kernels import compilation, tiled_products
from bytejepa.kernels.row_functions import dot, exponentials, largest, multiply_row, slopes

Numbers = npt.NDArray[np.float32]


def numbers(*shape: int, seed: int = 0) -> Numbers:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def address(x: Numbers) -> int:
    return int(x.ctypes.data)


@given(
    rows=st.integers(1, 9), blocks=st.integers(1, 9), depth=st.integers(0, 40), transposed=st.booleans(), adds=st.booleans()
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_products_of_any_shape_and_stride_are_numpys(
    rows: int, blocks: int, depth: int, transposed: bool, adds: bool
) -> None:
    columns = 16 * blocks
    a, b, out = numbers(rows, depth), numbers(depth, columns + 3, seed=1), numbers(rows, columns + 5, seed=2)
    expected = out.astype(np.float64)
    product = -0.5 * a.astype(np.float64) @ b[:, :columns]
    expected[:, :columns] = product + (expected[:, :columns] if adds else 0)
    if transposed:
        a = np.ascontiguousarray(a.T)
    strides = (1, rows) if transposed else (depth, 1)
    tiled_products.multiply(
        address(a), *strides, address(b), columns + 3, depth, address(out), columns + 5, rows, columns, -0.5, adds
    )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@njit
def _exponentials(row: int, vectors: int, factor: float, least: float) -> float:
    return exponentials(row, vectors, factor, least)


@njit
def _slopes(s: int, dp: int, vectors: int, factor: float, log_sum: float, along: float) -> None:
    slopes(s, dp, vectors, factor, log_sum, along)


@njit
def _others(row: int, other: int, vectors: int, factor: float) -> tuple[float, float]:
    found = largest(row, vectors), dot(row, other, vectors)
    multiply_row(row, vectors, factor)
    return found


def test_exponentials_are_right_to_the_last_places_and_never_negative() -> None:
    row = np.linspace(-200, 20, 16 * 4000, dtype=np.float32)
    given_ = row.astype(np.float64)
    total = _exponentials(address(row), len(row) // 16, 1.0, 0.0)
    normal = given_ > -87.3
    np.testing.assert_allclose(row[normal], np.exp(given_[normal]), rtol=3e-7)
    assert (row[~normal] >= 0).all()
    assert (row[~normal] < 2e-38).all()
    assert total == pytest.approx(np.exp(given_).sum(), rel=1e-5)


def test_slopes_are_those_of_a_softmax() -> None:
    scores, gradients = 3 * numbers(48), numbers(48, seed=1)
    factor = 0.25
    exact = np.exp(factor * scores.astype(np.float64))
    probability, dp = exact / exact.sum(), gradients.astype(np.float64)
    along = float((probability * dp).sum())
    _slopes(address(scores), address(gradients), 3, factor, float(np.log(exact.sum())), along)
    np.testing.assert_allclose(scores, probability, rtol=1e-5)
    np.testing.assert_allclose(gradients, probability * (dp - along) * factor, rtol=1e-4, atol=1e-7)


def test_the_largest_a_scalar_product_and_a_factor() -> None:
    row, other = numbers(80), numbers(80, seed=1)
    expected = 2.0 * row
    most, product = _others(address(row), address(other), 5, 2.0)
    assert most == expected.max() / 2
    assert product == pytest.approx(float(expected.astype(np.float64) @ other) / 2, rel=1e-5)
    assert np.array_equal(row, expected)


def test_the_benchmark_times_both_kernels_forward_and_with_the_gradient() -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "benchmark_cpu_attention.py"))
    found = script["measure"]((1, 32, 2, 1, 16), repeats=2)
    assert found.keys() == {f"{kernel} {kind}" for kernel in ("blocked", "flash") for kind in ("forward", "both")}
    assert min(found.values()) > 0


def test_what_is_not_a_number_is_passed_on() -> None:
    row = numbers(32)
    row[20] = np.nan
    assert np.isnan(_exponentials(address(row), 2, 1.0, 0.0))
    assert np.isnan(row[20])
    assert np.isfinite(np.delete(row, 20)).all()


def test_kept_code_is_that_of_the_sources_it_was_made_of(tmp_path: Path) -> None:
    """Of a package's own and of those here, which its functions contain."""
    package = tmp_path / "package"
    package.mkdir()
    folders = []
    for text in ("a = 1", "a = 2", "a = 1"):
        (package / "module.py").write_text(text)
        folders.append(compilation.cache_folder.__wrapped__(package))
    assert folders[0] == folders[2] != folders[1]


def test_without_a_place_for_compiled_code_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refusing(*_: object, **options: object) -> object:
        asked.append(options.get("cache", False))
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(error_model="numpy")

    monkeypatch.setattr(compilation, "njit", refusing)
    assert compilation.compiled(lambda x: x + 1)(2) == 3
    assert asked == [True, False]
