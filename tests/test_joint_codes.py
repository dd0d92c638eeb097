"""The joint stream of codes: small, exact, chosen only where it pays, refused where it cannot be true."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import torch

from bytejepa.artifact import joint_codes
from bytejepa.artifact.container import container_to_bytes
from bytejepa.artifact.header import joint_from_json, joint_to_json
from bytejepa.artifact.joint_codes import choose_tables, row_histograms
from bytejepa.artifact.packing import pack, unpack
from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import QuantizedMatrix, dequantize
from example_container import container_from_bytes

CODECS = ("rans", "zstd", "brotli", "raw")


def matrix(rows: int, columns: int, *, seed: int, variety: float = 0.5) -> QuantizedMatrix:
    """Codes of Gaussian weights whose rows have a spread of their own."""
    random = np.random.default_rng(seed)
    width = 2.5 * np.exp(variety * random.normal(size=(rows, 1)))
    codes = np.clip(np.rint(random.normal(size=(rows, columns)) * width), -127, 127).astype(np.int8)
    scales = torch.from_numpy(0.01 / width[:, 0]).half()
    return QuantizedMatrix(codes=torch.from_numpy(codes), scales=scales, bits=8)


def model() -> dict[str, QuantizedMatrix | torch.Tensor]:
    return {
        "a": matrix(96, 64, seed=0),
        "gain": torch.ones(7).half(),
        "b": matrix(64, 128, seed=1),
        "narrow": matrix(150, 16, seed=2),
        "empty": QuantizedMatrix(codes=torch.zeros(0, 5).to(torch.int8), scales=torch.zeros(0).half(), bits=8),
        "no_columns": QuantizedMatrix(codes=torch.zeros(5, 0).to(torch.int8), scales=torch.ones(5).half(), bits=8),
    }


def codes_of(tensors: dict[str, QuantizedMatrix | torch.Tensor], name: str) -> np.ndarray:
    stored = tensors[name]
    assert isinstance(stored, QuantizedMatrix)
    return stored.codes.numpy()


def test_every_code_comes_back_from_the_joint_stream():
    packed = pack(model(), codecs=CODECS)
    assert packed.joint is not None
    assert {record.name for record in packed.records if record.is_joint} >= {"a", "b", "narrow"}
    again = unpack(packed.records, packed.payload, packed.joint)
    assert list(again) == list(model())
    for name, stored in model().items():
        if isinstance(stored, QuantizedMatrix):
            np.testing.assert_array_equal(codes_of(again, name), stored.codes.numpy())
            assert torch.equal(again[name].scales, stored.scales)
    assert pack(model(), codecs=CODECS) == packed


def test_codes_cost_within_half_a_percent_of_their_entropy_given_the_rows_tables():
    """The bound: for every table the entropy of all the codes that it codes, with nothing paid for knowing it."""
    tensors = {str(seed): matrix(512, 512, seed=seed, variety=0.25) for seed in range(3)}
    packed = pack(tensors, codecs=CODECS)
    assert packed.joint is not None
    codes = [stored.codes.numpy() for stored in tensors.values()]
    lowest = min(int(c.min()) for c in codes)
    histograms = row_histograms(codes, lowest, max(int(c.max()) for c in codes) - lowest + 1)
    tables = choose_tables(histograms)
    bound = 0.0
    for table in range(len(tables.frequencies)):
        counts = histograms[tables.table_of_row == table].sum(0)
        counts = counts[counts > 0]
        bound -= float(counts @ np.log2(counts / counts.sum())) / 8
    assert bound < packed.joint.num_bytes < 1.005 * bound


def test_tables_found_on_a_sample_code_all_rows_about_as_well(monkeypatch: pytest.MonkeyPatch):
    matrices = [matrix(700, 64, seed=0), matrix(900, 16, seed=1), matrix(100, 256, seed=2)]
    codes = [stored.codes.numpy() for stored in matrices]
    lowest = min(int(c.min()) for c in codes)
    histograms = row_histograms(codes, lowest, max(int(c.max()) for c in codes) - lowest + 1)
    every_row = choose_tables(histograms)
    monkeypatch.setattr(joint_codes, "SAMPLED_ROWS", 200)
    sampled = choose_tables(histograms)
    assert len(sampled.table_of_row) == len(histograms)
    assert 4 < len(sampled.frequencies) <= joint_codes.MAX_TABLES
    assert float(sampled.bits_of_row.sum()) == pytest.approx(float(every_row.bits_of_row.sum()), rel=0.01)
    tensors = dict(zip("abc", matrices, strict=True))
    packed = pack(tensors, codecs=CODECS)
    assert packed.joint is not None
    again = unpack(packed.records, packed.payload, packed.joint)
    for name, stored in tensors.items():
        np.testing.assert_array_equal(codes_of(again, name), stored.codes.numpy())


def test_rows_of_different_spread_gain_from_tables_of_their_own():
    tensors = {"m": matrix(256, 512, seed=3)}
    sizes = {codecs: len(pack(tensors, codecs=codecs).payload) for codecs in [CODECS, ("zstd",), ("brotli",)]}
    assert sizes[CODECS] < 0.995 * min(sizes[("zstd",)], sizes[("brotli",)])


def test_what_repeats_stays_with_the_byte_compressors():
    same = np.tile(np.arange(-20, 20, dtype=np.int8), (200, 10))
    repeating = QuantizedMatrix(codes=torch.from_numpy(same), scales=torch.ones(200).half(), bits=8)
    packed = pack({"repeating": repeating, "noise": matrix(64, 64, seed=0)}, codecs=CODECS)
    assert [record.is_joint for record in packed.records] == [False, True]
    assert packed.records[0].streams[0].num_bytes < 500


def test_without_rans_nothing_is_joint_and_the_format_stays_version_1():
    for codecs, version in ((("zstd", "raw"), 1), (CODECS, 2)):
        data = container_to_bytes(configuration={}, tensors=model(), metadata={}, codecs=codecs)
        assert struct.unpack_from("<I", data, 8)[0] == version
        again = container_from_bytes(data)
        assert (again.info.joint_bytes > 0) == (version == 2)
        for name, stored in model().items():
            expected = dequantize(stored) if isinstance(stored, QuantizedMatrix) else stored.float()
            assert torch.equal(again.tensors[name], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 0}, "impossible record"),
        ({"lanes": 1 << 20}, "impossible record"),
        ({"num_tables": 0}, "impossible record"),
        ({"num_symbols": 1 << 20}, "impossible record"),
        ({"lowest_code": -129}, "impossible record"),
        ({"lowest_code": 127}, "impossible record"),
        ({"streams": ()}, "impossible record"),
        ({"num_tables": 1}, "the frequencies do not decode to"),
        ({"lanes": 3}, "the codes do not decode to"),
        ({"sha256": "0" * 64}, "the joint codes: checksum differs"),
        ({"offset": 3}, "must start at byte"),
    ],
)
def test_impossible_joint_records_are_refused(changes, message):
    packed = pack(model(), codecs=CODECS)
    assert packed.joint is not None
    with pytest.raises(ArtifactError, match=message):
        unpack(packed.records, packed.payload, dataclasses.replace(packed.joint, **changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [("sha256", 7), ("codecs", ["rans", 1]), ("codecs", "zstd"), ("stream_bytes", [1.5, 2]), ("stream_bytes", [3]), ("lanes", True),
     ("offset", "0"), ("num_tables", 1 << 60)],
)  # fmt: skip
def test_a_joint_record_of_other_types_is_refused(key, value):
    packed = pack(model(), codecs=CODECS)
    assert packed.joint is not None
    entry = joint_to_json(packed.joint)
    assert joint_from_json(entry) == packed.joint
    with pytest.raises(ArtifactError, match="wrong type or is out of range"):
        joint_from_json(entry | {key: value})


def test_a_joint_stream_and_its_tensors_come_together():
    packed = pack(model(), codecs=CODECS)
    with pytest.raises(ArtifactError, match="must come together"):
        unpack(packed.records, packed.payload, None)
    alone = pack(model(), codecs=("zstd",))
    with pytest.raises(ArtifactError, match="must come together"):
        unpack(alone.records, alone.payload, packed.joint)


def test_every_flipped_bit_of_a_joint_file_is_noticed():
    data = container_to_bytes(
        configuration={}, tensors={"m": matrix(9, 9, seed=0)}, metadata={}, codecs=("rans", "raw")
    )
    assert container_from_bytes(data).info.joint_bytes > 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(ArtifactError):
            container_from_bytes(bytes(damaged))
