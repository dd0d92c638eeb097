import pytest
from torch import Tensor

from bytejepa.benchmark.codec import bench_codec, compare
from bytejepa.config import replace
from bytejepa.data.corpus import embedded_text
from bytejepa.inference.engine import Engine
from bytejepa.inference.state import EngineState
from bytejepa.presets import compact
from codec.models import golden_model
from small_models import small_config


def test_every_compressor_of_the_comparison_gets_the_same_text() -> None:
    text = embedded_text("val")[:2000]
    (row,) = compare(golden_model(), {"address": text})
    assert row["num_bytes"] == 2000
    assert set(row["bpb"]) == {"bytejepa", "gzip -9", "zstd -19", "xz -9e", "brotli -11", "bzip2 -9", "PPMd H -o6"}
    assert row["bpb"]["bytejepa"] < row["bpb"]["xz -9e"]


def test_speed_is_measured_for_every_window_and_number_of_lanes() -> None:
    report = bench_codec(small_config(), num_bytes=40, lanes=(1, 2), windows=(16, 32), threads=1)
    rows = [(row["what"], row["window"], row["lanes"]) for row in report["codec"]]
    expected = [
        (what, window, lanes)
        for window in (16, 32)
        for what, lanes in (("encode", 1), ("decode", 1), ("decode", 2), ("float32 steps", 1), ("float32 steps", 2))
    ]
    assert rows == expected
    assert all(row["bytes_per_s"] > 0 for row in report["codec"])


def test_presets_that_are_calibrated_and_fitted_are_timed_too() -> None:
    config = replace(compact(small_config()), artifact={"fit": True}, model={"ngram_orders": (3,), "ngram_rows": 16})
    report = bench_codec(config, num_bytes=40, lanes=(1,), windows=(16,), threads=1)
    assert all(row["bytes_per_s"] > 0 for row in report["codec"])


def test_lanes_are_those_of_all_threads_in_every_row() -> None:
    report = bench_codec(small_config(), num_bytes=40, lanes=(3,), windows=(16,), threads=2)
    assert [(row["what"], row["lanes"]) for row in report["codec"]] == [
        ("encode", 2),
        ("decode", 6),
        ("float32 steps", 6),
    ]


@pytest.mark.parametrize(
    ("window", "chunk_blocks", "positions"),
    [(32, None, range(24, 28)), (30, None, range(22, 26)), (48, (0, 0), range(36, 48)), (44, (0, 0), range(32, 44))],
)
def test_float_steps_have_three_quarters_of_the_window_before_them(
    window: int, chunk_blocks: tuple[int, int] | None, positions: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is more than the model's own evaluation window; and they reach the end of every kind of chunk."""
    seen: set[int] = set()
    step = Engine.step

    def noticed(engine: Engine, state: EngineState, ids: Tensor) -> Tensor:
        seen.add(state.position)
        return step(engine, state, ids)

    monkeypatch.setattr(Engine, "step", noticed)
    model = {"chunk_blocks": chunk_blocks, "chunk_stride_bytes": 3, "skip_connections": False}
    config = replace(small_config(), model=model, evaluation={"window_bytes": 16, "stride_bytes": 16})
    bench_codec(config, num_bytes=40, lanes=(1,), windows=(window,), threads=1)
    assert seen == set(positions)
