"""A small container that holds every kind of thing, for the tests of the format and of the file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from bytejepa.artifact.container import Container, container_to_bytes, read_container
from bytejepa.artifact.packing import StoredTensor
from bytejepa.model.quantization import QuantizedMatrix, dequantize, quantize_rows

CONFIGURATION = {"model": {"width": 512, "layers": 13, "tied": True}, "name": "größer", "rate": 0.1, "cap": None}
METADATA = {"note": "trained on a Tuesday", "bits_per_byte": 1.2184, "seeds": [1, 2]}


def example_tensors() -> dict[str, StoredTensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "blocks.10.weight": quantize_rows(torch.randn(6, 8, generator=generator), bits=6),
        "blocks.2.gain": torch.tensor([1.0, 0.5, -0.25]).half(),
        "scalar": torch.tensor(0.7),
        "empty": torch.zeros(0, 3).half(),
    }


def example_bytes() -> bytes:
    return container_to_bytes(configuration=CONFIGURATION, tensors=example_tensors(), metadata=METADATA)


def container_from_bytes(data: bytes) -> Container:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.bjm"
        path.write_bytes(data)
        return read_container(path)


def assert_is_example(content: Container) -> None:
    assert content.configuration == CONFIGURATION
    assert content.metadata == METADATA
    expected = example_tensors()
    assert list(content.tensors) == list(content.stored) == list(expected)
    for name, stored in expected.items():
        weights = dequantize(stored) if isinstance(stored, QuantizedMatrix) else stored.float()
        assert content.tensors[name].dtype == torch.float32
        assert torch.equal(content.tensors[name], weights)
    codes = content.stored["blocks.10.weight"]
    assert isinstance(codes, QuantizedMatrix)
    assert torch.equal(codes.codes, expected["blocks.10.weight"].codes)
