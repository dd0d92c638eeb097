"""Two tiny shards and finished runs on them, for the tests of submissions."""

from pathlib import Path

import numpy as np

from bytejepa.config import RunConfig, replace
from bytejepa.data.shards import shard_name, write_shard
from bytejepa.data.vocabulary import BOS, ids_from_bytes
from bytejepa.training.runs import train
from conftest import make_minimal_config

TEXT = b"It was a small text, but every byte of it was to be scored, and scored once. " * 30


def seed_config(seed: int, **sections: dict) -> RunConfig:
    """`minimal_config` with zstd alone, so that the script needs no brotli, validation of all of the split, and the kernel of
    attention that the script has too: another rounds otherwise, and the file is some bytes longer or shorter."""
    training = {"seed": seed, "validation_bytes": None, "attention": "flash"}
    settings = {"artifact": {"codecs": ("zstd",)}, "training": training}
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return replace(make_minimal_config(), **settings)


def write_tiny_shards(folder: Path) -> Path:
    """Eight training documents in one shard and two validation documents in another."""
    folder.mkdir(parents=True)
    for split, starts in (("train", range(0, 160, 20)), ("val", (300, 500))):
        documents = [np.r_[np.uint16(BOS), ids_from_bytes(TEXT[start : start + 900])] for start in starts]
        write_shard(folder / shard_name(split, 0), np.concatenate(documents).astype(np.uint16))
    return folder


def finished_run(folder: Path, shards: Path, seed: int, **sections: dict) -> Path:
    """A run of `seed_config` in `folder`."""
    train(seed_config(seed, **sections), shards, folder)
    return folder
