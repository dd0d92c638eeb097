"""Exact causal attention on a CPU, with windows and documents, a block of positions at a time, eager or compiled.

PyTorch's flash kernel for CPUs reaches a third of the speed of the same cores' matrix products. Here are the operators of
`bytejepa.kernels.tiled_attention`, which does the arithmetic, and the threads that it runs in.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

_KERNELS = "bytejepa.kernels.tiled_attention"
"""Imported by name when it is needed: numba takes half a second, and no submission's script takes it in."""
BLOCK = 64
"""Queries that the kernels take at a time, at most."""
FLOP_OF_A_THREAD = 8_000_000
"""Fewest, some 0.1 ms: below that, a thread costs more than it brings where cores are shared."""
HEAD_WIDTHS = 16
"""A head's width is to be a multiple of this."""


def is_installed() -> bool:
    """Return whether this machine has the kernels: all have numba, but a submission's script is not the package."""
    return __name__.startswith("bytejepa.") and importlib.util.find_spec("numba") is not None


def takes(*tensors: Tensor) -> bool:
    """Return whether the kernels take queries, keys and values (B, T, heads, E) like these."""
    return all(x.dtype == torch.float32 and x.size(-1) % HEAD_WIDTHS == 0 for x in tensors)


def first_keys(
    length: int, window: int | None, document_ids: Int[Tensor, "B T"] | None, device: torch.device
) -> Int[Tensor, "rows T"] | None:
    """Return the first position that each one sees, (1 or B, T) int32, or None if that is 0 everywhere.

    `document_ids` rise where a document starts.
    """
    if (window is None or window >= length) and document_ids is None:
        return None
    position = torch.arange(length, device=device, dtype=torch.int32)
    first = torch.zeros_like(position) if window is None else (position - window + 1).clamp_min(0)
    if document_ids is None:
        return first[None]
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = torch.where(begins, position, 0).cummax(1).values
    return torch.maximum(starts, first)


def as_mask(first: Int[Tensor, "rows T"]) -> Tensor:
    """Return which keys each query may see, bool (1 or B, 1, T, T), of what `first_keys` returned."""
    position = torch.arange(first.size(1), device=first.device)
    return ((position <= position[:, None]) & (position >= first[:, :, None]))[:, None]


def _run(tensors: dict[int, Tensor], log_sums: Tensor, first: Tensor | None, *, is_backward: bool) -> None:
    """Let the kernels do their work on (B, T, heads, E) tensors by their place: q, k, v, o and the gradients of o, q, k, v."""
    kernels = importlib.import_module(_KERNELS)
    (B, T, H, E), G = tensors[0].shape, tensors[1].size(2)
    repeats = H // G
    first = torch.zeros(1, T, dtype=torch.int32, device="cpu") if first is None else first.contiguous()
    flop = 2 * B * H * E * T * (T + BLOCK)
    threads = max(1, min(torch.get_num_threads(), B * G, flop // FLOP_OF_A_THREAD))
    numbers = kernels.scratch_numbers(T, E, is_backward)
    scratch = torch.empty(threads * numbers, dtype=torch.float32, device="cpu")
    words = np.zeros(kernels.WORDS, dtype=np.int64)
    words[kernels.IS_BACKWARD : kernels.WIDTH + 1] = is_backward, B * G, G, repeats, T, E
    for place, x in tensors.items():
        words[kernels.ADDRESSES + place] = x.data_ptr()
        words[kernels.STRIDES + place], words[kernels.BATCH_STRIDES + place] = x.stride(1), x.stride(0)
        words[kernels.HEAD_STRIDES + place] = E if x.size(2) == G else E * repeats
    words[kernels.FIRST], words[kernels.FIRST_STRIDE] = first.data_ptr(), 0 if first.size(0) == 1 else T
    words[kernels.LOG_SUMS] = log_sums.data_ptr()
    words[kernels.SCRATCH], words[kernels.SCRATCH_NUMBERS] = scratch.data_ptr(), numbers
    _in_threads(kernels.work, words.ctypes.data, threads)


def _in_threads(work: Any, told: int, threads: int) -> None:
    """Call `work`, compiled for C, with `told` in so many threads at once, and return when all have ended."""
    if threads == 1:
        work.ctypes(told)
    elif parallel := _openmp():
        parallel(work.address, told, threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work.ctypes, [told] * threads))


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """Return how to run a C function in the threads that PyTorch's operators run in, or None where that is not known.

    Threads of our own would have to wait for those: OpenMP's go on spinning for a while after an operator.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    loaded = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line.rpartition("/")[2]}
    try:
        (library,) = loaded
        parallel = ctypes.CDLL(library).GOMP_parallel
    except (ValueError, OSError):  # none or several, or a file that was replaced meanwhile
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


def _ready(x: Tensor) -> Tensor:
    """Return `x` with its heads side by side, as the kernels read them."""
    return x if x.stride(3) == 1 and x.stride(2) == x.size(3) else x.contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return attention (B, T, H, E) and the logs of the softmaxes' sums (B, H, T)."""
    _check(q, k, v, first)
    q, k, v = _ready(q), _ready(k), _ready(v)
    output, log_sums = _shapes(q, k, v, first)
    _run(dict(enumerate((q, k, v, output))), log_sums, first, is_backward=False)
    return output, log_sums


def _check(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> None:
    """Refuse what the kernels, which know addresses only, would read past. Raises: ValueError."""
    B, T, H, E = q.shape
    fits = k.shape == v.shape == (B, T, k.size(2), E) and H % k.size(2) == 0 and takes(q, k, v)
    if first is not None:
        fits = fits and first.dtype == torch.int32 and first.shape in ((1, T), (B, T))
    if not fits or any(x.device.type != "cpu" for x in (q, k, v)):
        given = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in (q, k, v, first) if x is not None)
        raise ValueError(f"attention in blocks takes float32 (B, T, heads, E) and int32 first keys, got {given}")


def _shapes(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - the operator's signature
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T)


def _attend_back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sums: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k` and `v`, given that of `_attend`'s output."""
    q, k, v, output, grad = (_ready(x) for x in (q, k, v, output, grad))
    gradients = _gradient_shapes(grad, q, k, v, output, log_sums, first)
    _run(dict(enumerate((q, k, v, output, grad, *gradients))), log_sums, first, is_backward=True)
    return gradients


def _gradient_shapes(
    _grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _output: Tensor, _log_sums: Tensor, _first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _operator(
    name: str, schema: str, call: Callable[..., Any], shapes: Callable[..., Any], gradient: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Return `call` as an operator; in one expression, for submissions take over definitions, not what runs beside them."""
    operator = torch.library.custom_op(f"bytejepa::{name}", call, mutates_args=(), schema=schema)
    operator.register_fake(shapes)
    if gradient is not None:
        operator.register_autograd(gradient, setup_context=_keep_for_gradient)
    return operator


_gradient_in_blocks = _operator(
    "attention_in_blocks_gradient",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor output, Tensor log_sums, Tensor? first)"
    " -> (Tensor, Tensor, Tensor)",
    _attend_back,
    _gradient_shapes,
    None,
)


def _keep_for_gradient(ctx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # the logs of the sums have none
    ctx.save_for_backward(*inputs, *output)


def _gradient_of_attention(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    q, k, v, first, output, log_sums = ctx.saved_tensors
    return *_gradient_in_blocks(grad, q, k, v, output, log_sums, first), None


_attention_in_blocks = _operator(
    "attention_in_blocks",
    "(Tensor q, Tensor k, Tensor v, Tensor? first) -> (Tensor, Tensor)",
    _attend,
    _shapes,
    _gradient_of_attention,
)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> Tensor:
    """Return attention of (B, T, H, E) queries to the keys and values (B, T, G, E) from each one's `first` to itself.

    float32 on a CPU, E % 16 == 0; `first` (1 or B, T) int32, rising. It has a gradient, but no forward-mode derivative.
    Raises: ValueError for other shapes or types.
    """
    output, _ = _attention_in_blocks(q, k, v, first)
    return output
