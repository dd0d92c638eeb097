"""Text from a model, as it comes: one sample or several at once, the same for the same seed.

Every sample goes on from BOS and the prompt. Specials are never drawn. The byte at position p of sample i is decided by a
number that is a function of (seed, i, p), so samples can be made alone, together or in any order; the logits of
different numbers of lanes differ by rounding, which changes a byte only where that number falls within rounding of a
border between two bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch

from bytejepa.data.vocabulary import BOS, BYTE_OFFSET, ids_from_bytes
from bytejepa.errors import ArtifactError, ConfigError
from bytejepa.inference import utf8
from bytejepa.inference.engine import Engine, chunk_multiple, default_window
from bytejepa.inference.sampling import RepetitionPenalty, Sampling, draw, uniform
from bytejepa.model.transformer import ByteLM


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling`, as keywords."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    repetition_allowed_bytes: int
    repetition_window_bytes: int
    valid_utf8: bool


def generate(
    model: ByteLM | Engine,
    prompt: bytes = b"",
    *,
    num_bytes: int = 256,
    seed: int = 0,
    sample: int = 0,
    **options: Unpack[SamplingOptions],
) -> Iterator[bytes]:
    """Yield a continuation of `prompt` of `num_bytes` bytes, character by character, without the prompt.

    `options` are the fields of `Sampling`. With `valid_utf8` (the default) every piece is one or more whole characters,
    and the last one is complete; a prompt that ends within a character is completed first. `sample` i gives what
    `generate_samples` gives for its sample i. Raises: ConfigError for an option out of range.
    """
    pieces = generate_samples(
        model, prompt, num_bytes=num_bytes, seed=seed, first_sample=sample, sampling=Sampling(**options)
    )
    return (piece for (piece,) in pieces if piece)


def generate_samples(
    model: ByteLM | Engine,
    prompt: bytes = b"",
    *,
    num_samples: int = 1,
    num_bytes: int = 256,
    seed: int = 0,
    first_sample: int = 0,
    sampling: Sampling | None = None,
) -> Iterator[list[bytes]]:
    """Yield, byte position by byte position, the new piece of each of `num_samples` continuations of `prompt`.

    A piece is empty while a character is incomplete. The samples are lanes of one engine and share one prefill.
    `model` may be an engine, to reuse it or to choose its window and hop; by default the hop is half a window: rarer
    passes over the kept context than sliding evaluation makes, and never less context than half a window.
    Raises: ConfigError for an option out of range; ArtifactError if the model's output is not finite.
    """
    if num_samples < 1 or num_bytes < 0:
        raise ConfigError(f"expected at least 1 sample of 0 bytes or more, got {num_samples} of {num_bytes}")
    sampling = sampling or Sampling()
    engine = model if isinstance(model, Engine) else generation_engine(model)
    return _pieces(engine, prompt, range(first_sample, first_sample + num_samples), num_bytes, seed, sampling)


def generation_engine(model: ByteLM, *, window: int | None = None, hop: int | None = None) -> Engine:
    """Return an engine whose hop is half its window unless given; the window as `Engine` has it."""
    window = default_window(model) if window is None else window
    multiple = chunk_multiple(model)
    hop = max(multiple, window // 2 // multiple * multiple) if hop is None else hop
    return Engine(model, window=window, hop=hop)


def _pieces(
    engine: Engine, prompt: bytes, samples: range, num_bytes: int, seed: int, sampling: Sampling
) -> Iterator[list[bytes]]:
    if num_bytes == 0:
        return
    lanes = len(samples)
    ids = torch.from_numpy(np.concatenate(([BOS], ids_from_bytes(prompt).astype(np.int64))))
    state = engine.start()
    logits = engine.prefill(state, ids[None]).expand(lanes, -1)
    state = engine.select(state, [0] * lanes) if lanes > 1 else state
    penalty = RepetitionPenalty(sampling, lanes, prompt, num_bytes) if sampling.repetition_penalty else None
    characters = np.full(lanes, utf8.state_after(prompt), dtype=np.int8)
    pending = [bytearray() for _ in samples]
    for position in itertools.count():
        values = _byte_logits(logits)
        if penalty is not None:
            values -= penalty.penalties()
        allowed = utf8.allowed_bytes(characters, num_bytes - position) if sampling.valid_utf8 else None
        drawn = draw(values, allowed, [uniform(seed, sample, position) for sample in samples], sampling)
        if sampling.valid_utf8:
            characters = utf8.TRANSITIONS[characters, drawn]
        for buffer, byte in zip(pending, drawn.tolist(), strict=True):
            buffer.append(byte)
        last = position == num_bytes - 1
        incomplete = (characters != utf8.START) & (sampling.valid_utf8 and not last)
        yield [_taken(buffer, cut) for buffer, cut in zip(pending, incomplete.tolist(), strict=True)]
        if last:
            return
        if penalty is not None:
            penalty.push(drawn)
        logits = engine.step(state, torch.from_numpy(drawn.astype(np.int64) + BYTE_OFFSET))


def _byte_logits(logits: torch.Tensor) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = logits[:, BYTE_OFFSET:].double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ArtifactError("the model's output is not finite: its weights are damaged or it diverged in training")
    return values


def _taken(buffer: bytearray, incomplete: bool) -> bytes:
    """Return and remove what can be shown of `buffer`: nothing while its character is incomplete."""
    if incomplete:
        return b""
    piece = bytes(buffer)
    buffer.clear()
    return piece
