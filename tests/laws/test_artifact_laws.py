"""Laws of the artifact: every tensor comes back, every changed or missing byte is noticed."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytejepa.artifact.container import container_to_bytes
from bytejepa.artifact.packing import CODECS, StoredTensor, pack, restore, unpack
from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import (
    CLIP_MAX,
    ClipRule,
    QuantizedMatrix,
    dequantize,
    fake_quantize_rows,
    quantize_rows,
)
from example_container import container_from_bytes

torch.set_num_threads(1)

CLIPS = (
    CLIP_MAX,
    ClipRule(kind="mean_squared_error"),
    ClipRule(kind="quantile", quantile=0.9),
    ClipRule(kind="standard_deviations"),
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
matrix_shapes = st.tuples(st.integers(0, 9), st.integers(0, 9))
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
plain_objects = st.dictionaries(st.text(max_size=9), plain_values, max_size=4)


@st.composite
def float_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any float16 or float32 tensor of finite values, to the last bit."""
    shape = draw(shapes)
    count = int(torch.Size(shape).numel())
    width = draw(st.sampled_from((16, 32)))
    values = st.floats(allow_nan=False, allow_infinity=False, width=width)
    dtype = torch.float16 if width == 16 else torch.float32
    return torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=dtype).reshape(shape)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """A float32 matrix whose rows differ by many orders of magnitude, some of them zero."""
    rows, columns = draw(matrix_shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    exponents = torch.tensor(draw(st.lists(st.integers(-45, 10), min_size=rows, max_size=rows)), dtype=torch.float32)
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=torch.float32)
    return torch.randn(rows, columns, generator=generator) * (2.0**exponents * kept).unsqueeze(1)


stored_tensors = st.dictionaries(
    st.text(min_size=1, max_size=12),
    float_tensors() | st.builds(quantize_rows, weights(), bits=st.integers(2, 8), clip=st.sampled_from(CLIPS)),
    max_size=4,
)


def bits_of(stored: StoredTensor) -> list[bytes]:
    parts = (stored.codes, stored.scales) if isinstance(stored, QuantizedMatrix) else (stored,)
    return [str((part.dtype, tuple(part.shape))).encode() + part.numpy().tobytes() for part in parts]


@settings(max_examples=80, deadline=None)
@given(weight=weights(), bits=st.integers(2, 8), clip=st.sampled_from(CLIPS))
def test_fake_quantisation_is_what_is_stored(weight, bits, clip):
    stored = dequantize(quantize_rows(weight, bits=bits, clip=clip))
    assert torch.equal(fake_quantize_rows(weight, bits, clip=clip), stored)


@settings(max_examples=80, deadline=None)
@given(weight=weights(), bits=st.integers(2, 8))
def test_no_weight_is_further_than_half_a_step_from_its_code(weight, bits):
    quantized = quantize_rows(weight, bits=bits)
    error = (dequantize(quantized) - weight).abs()
    assert bool((error <= 0.5001 * quantized.scales.float().unsqueeze(1) + 1e-44).all())


@settings(max_examples=80, deadline=None)
@given(weight=weights(), bits=st.integers(2, 8))
def test_quantising_stored_weights_again_changes_little(weight, bits):
    once = dequantize(quantize_rows(weight, bits=bits))
    twice = quantize_rows(once, bits=bits)
    steps = twice.scales.float().unsqueeze(1)
    assert bool(((dequantize(twice) - once).abs() <= 0.5001 * steps).all())


@settings(max_examples=60, deadline=None)
@given(
    tensors=stored_tensors,
    codecs=st.lists(st.sampled_from(sorted(CODECS)), min_size=1, max_size=3),
    joint=st.booleans(),
)
def test_packing_brings_every_bit_back(tensors, codecs, joint):
    packed = pack(tensors, codecs=["rans", *codecs] if joint else codecs)
    again = unpack(packed.records, packed.payload, packed.joint)
    assert list(again) == list(tensors)
    for name, stored in tensors.items():
        assert bits_of(again[name]) == bits_of(stored)


@settings(max_examples=60, deadline=None)
@given(tensors=stored_tensors, configuration=plain_objects, metadata=plain_objects)
def test_containers_bring_everything_back(tensors, configuration, metadata):
    data = container_to_bytes(configuration=configuration, tensors=tensors, metadata=metadata)
    content = container_from_bytes(data)
    assert content.configuration == configuration
    assert content.metadata == metadata
    assert list(content.tensors) == list(tensors)
    for name, stored in tensors.items():
        assert bits_of(content.stored[name]) == bits_of(stored)
        assert torch.equal(content.tensors[name], restore(stored))
    again = container_to_bytes(configuration=content.configuration, tensors=content.stored, metadata=content.metadata)
    assert again == data


@pytest.fixture(scope="module")
def small() -> bytes:
    tensors = {"m": quantize_rows(torch.linspace(-1, 1, 12).reshape(3, 4), bits=6), "v": torch.ones(2).half()}
    return container_to_bytes(configuration={"width": 4}, tensors=tensors, metadata={"note": "x"})


def test_every_single_flipped_bit_and_byte_is_noticed(small):
    container_from_bytes(small)
    for position in range(len(small)):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(small)
            damaged[position] ^= mask
            with pytest.raises(ArtifactError):
                container_from_bytes(bytes(damaged))


def test_truncation_at_every_length_is_noticed(small):
    for length in range(len(small)):
        with pytest.raises(ArtifactError, match=r"cut short|not a bytejepa artifact"):
            container_from_bytes(small[:length])


@settings(max_examples=100, deadline=None)
@given(extra=st.binary(min_size=1, max_size=50))
def test_trailing_bytes_are_noticed(small, extra):
    with pytest.raises(ArtifactError, match="too long"):
        container_from_bytes(small + extra)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_no_artifact(data):
    with pytest.raises(ArtifactError):
        container_from_bytes(data)


def test_flipped_bytes_behind_a_right_checksum_never_crash(small):
    """With the checksum made right again, a flipped byte gives a refusal or another sound container, nothing else."""
    survivors = 0
    for position in range(len(small) - 32):
        for mask in (1, 32, 128, 255):
            body = bytearray(small[:-32])
            body[position] ^= mask
            try:
                container_from_bytes(bytes(body) + hashlib.sha256(body).digest())
                survivors += 1
            except ArtifactError:
                pass
    assert survivors < 0.1 * 4 * len(small)  # letters of names and metadata that the header stores as literals
