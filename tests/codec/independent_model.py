"""The second decoder's forward pass, written from docs/codec.md ("Which models", "Forward pass") alone.

Names are those of the page.
"""

import functools
import hashlib
import itertools
import json
from typing import Any, NamedTuple

import mpmath
import numpy as np

from codec.independent_numbers import (
    TANH,
    C,
    Ints,
    Matrix,
    R,
    exact_sigmoids,
    exp2,
    fixed,
    interp,
    least_power,
    nearest,
    norm,
    sig,
)

LOG2_E = 1.4426950408889634
SETTINGS = (
    "bigram_dim", "bigram_rows", "depth_scaled_norm", "logit_softcap", "mlp_ratio", "model_dim", "num_heads", "num_kv_heads",
    "num_layers", "residual_mix", "rotary_base", "rotary_dims", "rotary_length_bytes", "skip_connections", "smear",
    "xsa_last_layers",
)  # fmt: skip
DEFAULTS = {
    "attention_gate_dims": None, "attention_windows": None, "bigram_table": "hash", "chunk_blocks": None,
    "ngram_orders": None, "parallel_last_layers": 0, "recurrent_layers": None, "skip_gates": False,
    "smear_gate": "constant", "value_embedding_last_layers": 0,
}  # fmt: skip
"""Of the settings that enter the identity only where they are otherwise, and that older artifacts lack."""
FIRST_BYTE = 4


class Tensors(dict[str, Any]):
    """Arrays, or codes and scales, as an artifact stores them."""

    def matrix(self, *names: str) -> tuple[Ints, Ints]:
        """Codes and binary64 scales of matrices one above the other."""
        codes, scales = [], []
        for name in names:
            tensor = self[name]
            if isinstance(tensor, np.ndarray):
                w = tensor.astype(np.float64)
                f = np.abs(w).max(1) / 127
                tensor = np.rint(w / np.where(f > 0, f, 1)[:, None]), f
            codes.append(tensor[0].astype(np.int64))
            scales.append(tensor[1].astype(np.float64))
        return np.concatenate(codes), np.concatenate(scales)

    def vector(self, name: str) -> Ints:
        tensor = self[name]
        if isinstance(tensor, np.ndarray):
            return tensor.astype(np.float64)
        return tensor[0].astype(np.float64) * tensor[1].astype(np.float64)[:, None]

    def digest(self, settings: dict[str, Any]) -> bytes:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
        for name in sorted(self):
            tensor = self[name]
            parts = (
                [(tensor.dtype.name, tensor)]
                if isinstance(tensor, np.ndarray)
                else zip(("codes", "scales"), tensor, strict=True)
            )
            for kind, array in parts:
                digest.update(f"\n{name} {kind} {','.join(map(str, array.shape))}\n".encode() + array.tobytes())
        return digest.digest()


class Positions(NamedTuple):
    """Those that pass a layer: all of a window, or every s-th."""

    ids: Ints
    x0: Ints
    cos: Ints
    sin: Ints
    s: int

    def every(self, s: int) -> "Positions":
        return Positions(*(numbers[s - 1 :: s] for numbers in self[:4]), s)


class Embedding:
    def __init__(self, tensors: Tensors, c: dict[str, Any]) -> None:
        self.c = c
        codes, scales = tensors.matrix("token_embedding.weight")
        added = [codes * scales[:, None]]  # rows of token, pair, and the run of each order
        if c["bigram_rows"]:
            added += self._projected(tensors, "bigram", 1)
        if c["ngram_orders"]:
            added += self._projected(tensors, "ngrams", len(c["ngram_orders"]))
        largest = sum(np.abs(rows).max() for rows in added)
        self.F = min(24, 26 - least_power(largest)) if largest else 24
        self.added = [fixed(rows, self.F) for rows in added]
        self.is_smeared, self.input_weight = c["smear"], None
        if c["smear"]:
            gate = tensors.vector("smear.gate")
            self.gate = exact_sigmoids(gate)
            if c["smear_gate"] == "input":
                self.gate, self.input_weight = fixed(gate, 10), fixed(tensors.vector("smear.input_weight"), 16)

    def _projected(self, tensors: Tensors, name: str, count: int) -> list[Ints]:
        """Of each of `count` tables, one after the other in the rows and in the projection's columns."""
        codes, scales = tensors.matrix(f"{name}.embedding.weight")
        projection, projection_scales = tensors.matrix(f"{name}.projection.weight")
        scale = tensors.vector(f"{name}.scale")
        return [
            (rows @ columns.T) * (row_scales[:, None] * projection_scales) * scale
            for rows, row_scales, columns in zip(
                np.split(codes, count), np.split(scales, count), np.split(projection, count, axis=1), strict=True
            )
        ]

    def __call__(self, ids: Ints) -> Ints:
        rows = [ids]
        if self.c["bigram_rows"]:
            rows.append(self._pairs(ids))
        rows += [self._runs(ids, k) for k in self.c["ngram_orders"] or ()]
        e = sum(table[row] for table, row in zip(self.added, rows, strict=True))
        x0 = norm(e, self.F, 14, 1 << 26)
        if not self.is_smeared:
            return x0
        before, g = np.concatenate((np.zeros_like(x0[:1]), x0[:-1])), self.gate
        if self.input_weight is not None:
            g = sig(g + R((self.input_weight * x0[:, : len(self.input_weight)]).sum(-1, keepdims=True), 20))
        return x0 + R(g * (before - x0), 15)

    def _pairs(self, ids: Ints) -> Ints:
        last, previous, now = self.c["bigram_rows"] - 1, ids[:-1], ids[1:]
        if self.c["bigram_table"] == "exact":
            are_bytes = (previous >= FIRST_BYTE) & (now >= FIRST_BYTE)
            rows = np.where(are_bytes, 256 * (previous - FIRST_BYTE) + now - FIRST_BYTE, last)
        else:
            rows = (36313 * now ^ 27191 * previous) % last
        return np.concatenate(([last], rows))

    def _runs(self, ids: Ints, k: int) -> Ints:
        last, found = self.c["ngram_rows"] - 1, []
        for t in range(len(ids)):
            if t < k - 1:
                found.append(last)
                continue
            h = int(ids[t])
            for back in range(1, k):
                h = (1327217885 * h + int(ids[t - back])) % 2**31
            found.append((1327217885 * h % 2**31 * last) >> 31)
        return np.array(found)


class Layer:
    def __init__(self, tensors: Tensors, c: dict[str, Any], l: int) -> None:  # noqa: E741 - the page's name
        name, n, self.c, self.E = f"blocks.{l}", c["num_layers"], c, c["model_dim"] // c["num_heads"]
        s_l = 1 / np.sqrt(np.float64(l + 1)) if c["depth_scaled_norm"] else np.float64(1)
        self.mix = fixed(tensors.vector(f"{name}.residual_mix"), 16) if c["residual_mix"] else None
        self.has_xsa = l >= n - c["xsa_last_layers"]
        self.is_parallel = l >= n - c["parallel_last_layers"]
        windows = c["attention_windows"] or [0]
        self.window = windows[l if len(windows) > 1 else 0]
        self.heads = Matrix(
            tensors.matrix(f"{name}.attention.query.weight", f"{name}.attention.key.weight"), ("x", s_l), gain=6
        )
        gain = tensors.vector(f"{name}.attention.query_gain")
        self.sign = np.where(gain < 0, -1, 1)
        ones = np.ones((len(gain), 1))
        self.scores = Matrix((ones, np.abs(gain)), ("/", np.sqrt(np.float64(self.E))), ("x", LOG2_E), gain=12 - 20)
        K = c["attention_gate_dims"]
        self.gates = Matrix(tensors.matrix(f"{name}.attention.gate.weight"), gain=0) if K else None
        value, v_id = tensors.matrix(f"{name}.attention.value.weight"), np.zeros(1)
        has_value_embedding = l >= n - c["value_embedding_last_layers"]
        if has_value_embedding:
            v_id = tensors.vector(f"{name}.attention.value_embedding.weight")
        lengths = np.sqrt((value[0] ** 2).sum(1)) * np.abs(value[1] * s_l)
        bound = float(lengths.max() * np.sqrt(np.float64(c["model_dim"])) + np.abs(v_id).max())
        V = min(14, max(0, 15 - least_power(bound) - (1 if K else 0))) if bound else 14
        self.value = Matrix(value, ("x", s_l), gain=V - 10)
        self.v_id = fixed(v_id, V) if has_value_embedding else None
        O = tensors.matrix(f"{name}.attention.output.weight")  # noqa: E741
        self.output = Matrix(O, ("x", tensors.vector(f"{name}.attention_scale")), gain=14 - V)
        self.up = Matrix(tensors.matrix(f"{name}.mlp.up.weight"), ("x", s_l), gain=2)
        down = tensors.matrix(f"{name}.mlp.down.weight")
        self.down = Matrix(down, ("x", tensors.vector(f"{name}.mlp_scale")), gain=14 - 24)

    def __call__(self, x: Ints, positions: Positions) -> Ints:
        if self.mix is not None:
            x = C(R(self.mix[0] * x + self.mix[1] * positions.x0, 16), 1 << 26)
        a = norm(x, 14, 10)
        x = C(x + self.output(self._attention(a, positions)), 1 << 26)
        h = C(self.up(a if self.is_parallel else norm(x, 14, 10)), 1 << 20)
        return C(x + self.down.dyn(np.where(h < 0, (h * h + 2) >> 2, h * h)), 1 << 26)

    def _attention(self, a: Ints, positions: Positions) -> Ints:
        T, H, G, E = len(a), self.c["num_heads"], self.c["num_kv_heads"], self.E
        heads = _rotated(norm(C(self.heads(a), 1 << 27).reshape(T, H + G, E), 16, 10), positions)
        q, k = heads[:, :H] * self.sign[:, None], heads[:, H:]
        v = C(self.value(a), 32767)
        if self.v_id is not None:
            v = C(v + self.v_id[positions.ids], 32767)
        k, v = (np.repeat(x.reshape(T, G, E), H // G, axis=1) for x in (k, v))
        scores = np.einsum("ihe,jhe->hij", q, k)
        seen = np.tri(T, dtype=bool)
        if self.window:
            seen &= ~np.tri(T, k=-max(1, self.window // positions.s), dtype=bool)
        largest = np.where(seen, scores, -(1 << 40)).max(-1, keepdims=True)
        d = np.where(seen, largest - scores, 0)
        w = np.where(seen, exp2(R(d * self.scores.M[:, None, None], self.scores.shift)), 0)
        p = R(w * ((32767 << 46) // w.sum(-1, keepdims=True)), 46)
        y = C(R(np.einsum("hij,jhe->ihe", p, v), 15), 32767)
        if self.gates is not None:
            g = self.gates(a[:, : self.c["attention_gate_dims"]])
            y = C(R(y * sig(g)[..., None], 14), 32767)
        if self.has_xsa:
            squares = (v * v).sum(-1, keepdims=True)
            c = np.where(squares > 0, ((y * v).sum(-1, keepdims=True) << 16) // np.maximum(squares, 1), 0)
            y = C(y - R(c * v, 16), 32767)
        return y.reshape(T, H * E)


def _rotated(x: Ints, positions: Positions) -> Ints:
    half = positions.cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = (R(a * positions.cos + b * positions.sin, 14), R(b * positions.cos - a * positions.sin, 14))
    return np.concatenate((C(turned[0], 32767), C(turned[1], 32767), x[..., 2 * half :]), axis=-1)


@functools.cache
def _rotary(length: int, base: float, rotating: int) -> tuple[Ints, Ints]:
    """Cosines and sines, a position and a frequency each, with an axis for the heads between."""
    shape = length, 1, rotating // 2
    with mpmath.workdps(60):
        f = [mpmath.power(base, mpmath.mpf(-2 * m) / rotating) for m in range(shape[2])]
        angles = [t * f_m for t in range(length) for f_m in f]
        return nearest(map(mpmath.cos, angles), 14).reshape(shape), nearest(map(mpmath.sin, angles), 14).reshape(shape)


class Latents:
    """The injection."""

    def __init__(self, tensors: Tensors, P: int, context: str) -> None:
        self.P, self.is_causal = P, context == "causal"
        bits, limit = (10, 32767) if self.is_causal else (16, 1 << 27)
        self.start = C(fixed(tensors.vector("jepa.start"), bits), limit)
        self.projector_up = Matrix(tensors.matrix("jepa.projector.up.weight"), ("/", P), gain=2)
        self.projector_down = Matrix(tensors.matrix("jepa.projector.down.weight"), gain=6)
        self.predictor_up = Matrix(tensors.matrix("jepa.predictor.up.weight"), gain=16 - bits)
        self.predictor_down = Matrix(tensors.matrix("jepa.predictor.down.weight"), gain=6)
        self.injection = Matrix(tensors.matrix("jepa.injection.weight"), gain=-2)

    def __call__(self, x: Ints) -> Ints:
        added = []
        for begin in range(0, len(x), self.P):
            z = self.start if begin == 0 else self._context(x[begin - self.P : begin])
            J = self.injection.dyn(_mlp(z, self.predictor_up, self.predictor_down))
            added += [C(J, 1 << 26)] * len(x[begin : begin + self.P])
        return C(x + np.array(added), 1 << 26)

    def _context(self, chunk: Ints) -> Ints:
        if self.is_causal:
            return norm(chunk[-1], 14, 10)
        return _mlp(chunk.sum(0), self.projector_up, self.projector_down)


def _mlp(v: Ints, up: Matrix, down: Matrix) -> Ints:
    n = norm(C(up.dyn(v), 1 << 27), 16, 10)
    return C(down.dyn(R(n * sig(n), 15)), 1 << 27)


class Model:
    """The integers of one artifact."""

    def __init__(self, configuration: dict[str, Any], stored: dict[str, Any]) -> None:
        tensors, c, jepa = (
            Tensors(stored),
            DEFAULTS | configuration["model"],
            {"context": "pooled"} | configuration["jepa"],
        )
        P = jepa["chunk_bytes"] if jepa["enabled"] and jepa["inject"] else None
        settings = {name: c[name] for name in SETTINGS} | {"chunk_bytes": P}
        settings |= {name: c[name] for name, default in DEFAULTS.items() if c[name] != default}
        if c["chunk_blocks"]:
            settings["chunk_stride_bytes"] = c["chunk_stride_bytes"]
        if P and jepa["context"] != "pooled":
            settings["context"] = jepa["context"]
        self.identity = tensors.digest(settings)
        self.c, self.E = c, c["model_dim"] // c["num_heads"]
        self.embedding = Embedding(tensors, c)
        self.layers = [Layer(tensors, c, l) for l in range(c["num_layers"])]  # noqa: E741
        self._order(tensors)
        self.latents = Latents(tensors, P, jepa["context"]) if P else None
        codes, scales = tensors.matrix("token_embedding.weight")
        self.head = Matrix((codes[FIRST_BYTE:], scales[FIRST_BYTE:]), ("/", c["logit_softcap"]), gain=6)
        with mpmath.workdps(60):
            self.K = int(mpmath.nint(mpmath.mpf(c["logit_softcap"]) / mpmath.ln(2) * 2**16))

    def _order(self, tensors: Tensors) -> None:
        """The layers' places, those that every position passes and those that every s-th one does apart."""
        c, n = self.c, self.c["num_layers"]
        first, last = c["recurrent_layers"] or (n, n - 1)
        self.places = [*range(last + 1), *range(first, n)]
        self.half = len(self.places) // 2
        begin, end = c["chunk_blocks"] or (n, n - 1)
        stretches = itertools.groupby(range(len(self.places)), lambda place: begin <= self.places[place] <= end)
        self.stretches = [(is_chunked, list(places)) for is_chunked, places in stretches]
        self.chunk_scale = fixed(tensors.vector("chunk_scale"), 16) if c["chunk_blocks"] else None
        self.skips = fixed(tensors.vector("skip_weights"), 16) if c["skip_connections"] else None
        self.skip_gates = exact_sigmoids(tensors.vector("skip_gates")) if c["skip_gates"] else None

    def logits(self, ids: list[int]) -> Ints:
        """After the last of a window's ids, (256,)."""
        x = x0 = self.embedding(np.array(ids))
        rotary = _rotary(-(-len(ids) // 64) * 64, self.c["rotary_base"], self.c["rotary_dims"] or self.E)
        positions = Positions(np.array(ids), x0, *(numbers[: len(ids)] for numbers in rotary), 1)
        pushed: list[Ints] = []
        for is_chunked, places in self.stretches:
            pass_ = self._in_chunks if is_chunked else self._through
            x = pass_(x, places, positions, pushed)
        if self.latents:
            x = self.latents(x)
        u = self.head(norm(x[-1], 14, 10))
        return R(np.where(u < 0, -1, 1) * interp(TANH, np.minimum(np.abs(u), 2**19 - 1), 8) * self.K, 24)

    def _in_chunks(self, x: Ints, places: list[int], positions: Positions, pushed: list[Ints]) -> Ints:
        s = self.c["chunk_stride_bytes"]
        before = x[s - 1 :: s]
        if not len(before):  # nothing is pushed there, nor will it be popped
            return x
        d = self._through(before, places, positions.every(s), pushed) - before
        last = (np.arange(len(x)) + 1) // s  # how many such positions there are up to each
        return C(x + R(self.chunk_scale * np.concatenate((np.zeros_like(d[:1]), d))[last], 16), 1 << 26)

    def _through(self, x: Ints, places: list[int], positions: Positions, pushed: list[Ints]) -> Ints:
        for place in places:
            if self.skips is not None and self.half <= place < 2 * self.half:
                row = place - self.half
                z = R(self.skips[row] * pushed.pop(), 16)
                if self.skip_gates is None:
                    x = C(x + z, 1 << 26)
                else:
                    z = C(z, 1 << 26)
                    x = C(z + R(self.skip_gates[row] * (x - z), 15), 1 << 26)
            x = self.layers[self.places[place]](x, positions)
            if place < self.half:
                pushed.append(x)
        return x


def frequencies(y: Ints) -> Ints:
    w = exp2(R(y.max() - y, 4))
    g = ((2**24 - 256) << 38) // int(w.sum())
    found = 1 + ((w * g) >> 38)
    found[y.argmax()] += 2**24 - found.sum()
    return found
