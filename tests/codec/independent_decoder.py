"""A second decoder of `.bjc` files, written from docs/codec.md and docs/artifact.md alone: it imports nothing of bytejepa.

It shows that the pages suffice, and it checks the package's decoder with other code: the whole window is computed anew
for every byte, in NumPy's int64; mixing is in independent_mixing.py. Artifacts of version 1 only. Names are those of the
page.
"""

import bisect
import hashlib
import itertools
import json
import struct
import zlib
from math import frexp, isqrt
from pathlib import Path
from typing import Any

import brotli
import mpmath
import numpy as np
import zstandard

from codec.independent_mixing import Mixing, model_bits

Ints = np.ndarray
LOG2_E = 1.4426950408889634
SCALARS = {"float16": "<f2", "float32": "<f4"}
SETTINGS = (
    "bigram_dim", "bigram_rows", "depth_scaled_norm", "logit_softcap", "mlp_ratio", "model_dim", "num_heads", "num_kv_heads",
    "num_layers", "residual_mix", "rotary_base", "rotary_dims", "rotary_length_bytes", "skip_connections", "smear",
    "xsa_last_layers",
)  # fmt: skip


def R(v: Any, s: Any) -> Any:  # noqa: N802 - the page's name
    return (v + (np.int64(1) << (s - 1))) >> s


def C(v: Any, m: int) -> Any:  # noqa: N802
    return np.clip(v, -m, m)


def bit_lengths(v: Ints) -> Ints:
    return np.array([int(n).bit_length() for n in v.flat], dtype=np.int64).reshape(v.shape)


def norm(x: Ints, F: int, G: int, limit: int = 32767) -> Ints:
    W = x.shape[-1]
    S = (x * x).sum(-1, keepdims=True) + max(1, (W << 2 * F) >> 23)
    g = np.array([isqrt(W << 80) // isqrt(int(n)) for n in S.flat], dtype=np.int64).reshape(S.shape)
    return C(R(x * g, 40 - G), limit)


def interp(T: Ints, n: Ints, f: int) -> Ints:
    return T[n >> f] + R((T[(n >> f) + 1] - T[n >> f]) * (n & ((1 << f) - 1)), f)


def table(count: int, bits: int, function: Any) -> Ints:
    with mpmath.workdps(60):
        return np.array([int(mpmath.nint(function(mpmath.mpf(i)) * 2**bits)) for i in range(count)], dtype=np.int64)


EXP2 = table(4096, 30, lambda j: 2 ** (-j / 4096))
TANH = table(2049, 24, lambda i: mpmath.tanh(i / 256))
SIGMOID = table(1025, 15, lambda i: 1 / (1 + mpmath.exp(-i / 64)))


def gates(values: Ints) -> Ints:
    with mpmath.workdps(60):
        exact = [2**15 / (1 + mpmath.exp(-mpmath.mpf(float(v)))) for v in values]
        return np.array([int(mpmath.nint(v)) for v in exact], dtype=np.int64)


def exp2(t: Ints) -> Ints:
    return EXP2[t % 4096] >> np.minimum(t >> 12, 63)


def fixed(values: Ints, bits: int) -> Ints:
    return np.rint(np.ldexp(values, bits)).astype(np.int64)


class Matrix:
    def __init__(self, codes_and_scales: tuple[Ints, Ints], *steps: tuple[str, Any], gain: int) -> None:
        self.codes, f = codes_and_scales
        for operation, factor in steps:
            f = f * factor if operation == "x" else f / np.float64(factor)
        largest = float(np.abs(f).max())
        b = min(31 - (frexp(largest)[1] if largest else 0), 62 + gain)
        if np.abs(fixed(f, b)).max() == 1 << 31:
            b -= 1
        self.M, self.shift = fixed(f, b), b - gain
        L = max(1, int(np.abs(self.codes).sum(1).max()))
        self.B = min(15, ((2**31 - 1) // L).bit_length() - 1)

    def __call__(self, a: Ints) -> Ints:
        return R(self.M * (a @ self.codes.T), self.shift)

    def dyn(self, v: Ints) -> Ints:
        e = np.maximum(0, bit_lengths(np.abs(v).max(-1, keepdims=True)) - self.B)
        a = C((v + ((np.int64(1) << e) >> 1)) >> e, 2**self.B - 1)
        return R(self.M * (a @ self.codes.T), self.shift - e)


class Model:
    """The integers of one artifact."""

    def __init__(self, configuration: dict[str, Any], tensors: dict[str, Any]) -> None:
        self.tensors, self.c, jepa = tensors, configuration["model"], configuration["jepa"]
        self.P = jepa["chunk_bytes"] if jepa["enabled"] and jepa["inject"] else None
        self.identity = self._identity()
        c = self.c
        self.E = c["model_dim"] // c["num_heads"]
        self.rotating = c["rotary_dims"] or self.E
        self._embeddings()
        self.smear = gates(self.vector("smear.gate")) if c["smear"] else None
        self.layers = [self._layer(number) for number in range(c["num_layers"])]
        if self.P:
            self.start = C(fixed(self.vector("jepa.start"), 16), 1 << 27)
            self.projector_up = Matrix(self.matrix("jepa.projector.up.weight"), ("/", self.P), gain=2)
            self.projector_down = Matrix(self.matrix("jepa.projector.down.weight"), gain=6)
            self.predictor_up = Matrix(self.matrix("jepa.predictor.up.weight"), gain=0)
            self.predictor_down = Matrix(self.matrix("jepa.predictor.down.weight"), gain=6)
            self.injection = Matrix(self.matrix("jepa.injection.weight"), gain=-2)
        codes, scales = self.matrix("token_embedding.weight")
        self.head = Matrix((codes[4:], scales[4:]), ("/", c["logit_softcap"]), gain=6)
        with mpmath.workdps(60):
            self.K = int(mpmath.nint(mpmath.mpf(c["logit_softcap"]) / mpmath.ln(2) * 2**16))

    def _identity(self) -> bytes:
        settings = {name: self.c[name] for name in SETTINGS} | {"chunk_bytes": self.P}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            parts = (
                [(tensor.dtype.name, tensor)]
                if isinstance(tensor, np.ndarray)
                else zip(("codes", "scales"), tensor, strict=True)
            )
            for kind, array in parts:
                digest.update(f"\n{name} {kind} {','.join(map(str, array.shape))}\n".encode() + array.tobytes())
        return digest.digest()

    def matrix(self, *names: str) -> tuple[Ints, Ints]:
        """Codes and binary64 scales of matrices one above the other."""
        codes, scales = [], []
        for name in names:
            tensor = self.tensors[name]
            if isinstance(tensor, np.ndarray):
                w = tensor.astype(np.float64)
                f = np.abs(w).max(1) / 127
                tensor = np.rint(w / np.where(f > 0, f, 1)[:, None]), f
            codes.append(tensor[0].astype(np.int64))
            scales.append(tensor[1].astype(np.float64))
        return np.concatenate(codes), np.concatenate(scales)

    def vector(self, name: str) -> Ints:
        tensor = self.tensors[name]
        if isinstance(tensor, np.ndarray):
            return tensor.astype(np.float64)
        return tensor[0].astype(np.float64) * tensor[1].astype(np.float64)[:, None]

    def _embeddings(self) -> None:
        codes, scales = self.matrix("token_embedding.weight")
        token, pair = codes * scales[:, None], None
        largest = np.abs(token).max()
        if self.c["bigram_rows"]:
            rows, row_scales = self.matrix("bigram.embedding.weight")
            projection, projection_scales = self.matrix("bigram.projection.weight")
            pair = (rows @ projection.T) * (row_scales[:, None] * projection_scales) * self.vector("bigram.scale")
            largest += np.abs(pair).max()
        self.F = min(24, 26 - frexp(largest)[1]) if largest else 24
        self.token, self.pair = fixed(token, self.F), None if pair is None else fixed(pair, self.F)

    def _layer(self, number: int) -> dict[str, Any]:
        c, name = self.c, f"blocks.{number}"
        s_l = 1 / np.sqrt(np.float64(number + 1)) if c["depth_scaled_norm"] else np.float64(1)
        value = self.matrix(f"{name}.attention.value.weight")
        bound = float(
            (np.sqrt((value[0] ** 2).sum(1)) * np.abs(value[1] * s_l)).max() * np.sqrt(np.float64(c["model_dim"]))
        )
        V = min(14, max(0, 15 - frexp(bound)[1])) if bound else 14
        gain = self.vector(f"{name}.attention.query_gain")
        place, half = number - c["num_layers"] // 2, c["num_layers"] // 2
        skip = fixed(self.vector("skip_weights")[place], 16) if c["skip_connections"] and 0 <= place < half else None
        scores = Matrix(
            (np.ones((len(gain), 1)), np.abs(gain)), ("/", np.sqrt(np.float64(self.E))), ("x", LOG2_E), gain=12 - 20
        )
        return {
            "mix": fixed(self.vector(f"{name}.residual_mix"), 16) if c["residual_mix"] else None,
            "skip": skip,
            "heads": Matrix(
                self.matrix(f"{name}.attention.query.weight", f"{name}.attention.key.weight"), ("x", s_l), gain=6
            ),
            "value": Matrix(value, ("x", s_l), gain=V - 10),
            "sign": np.where(gain < 0, -1, 1),
            "scores": scores,
            "output": Matrix(
                self.matrix(f"{name}.attention.output.weight"), ("x", self.vector(f"{name}.attention_scale")), gain=14 - V
            ),
            "up": Matrix(self.matrix(f"{name}.mlp.up.weight"), ("x", s_l), gain=2),
            "down": Matrix(self.matrix(f"{name}.mlp.down.weight"), ("x", self.vector(f"{name}.mlp_scale")), gain=14 - 24),
            "xsa": number >= c["num_layers"] - c["xsa_last_layers"],
        }  # fmt: skip

    def logits(self, ids: list[int]) -> Ints:
        """After the last of a window's ids, (256,)."""
        x0 = self._embed(ids)
        x, pushed = x0, []
        for number, layer in enumerate(self.layers):
            if layer["skip"] is not None:
                x = C(x + R(layer["skip"] * pushed.pop(), 16), 1 << 26)
            if layer["mix"] is not None:
                x = C(R(layer["mix"][0] * x + layer["mix"][1] * x0, 16), 1 << 26)
            x = C(x + layer["output"](self._attention(layer, norm(x, 14, 10))), 1 << 26)
            h = C(layer["up"](norm(x, 14, 10)), 1 << 20)
            x = C(x + layer["down"].dyn(np.where(h < 0, (h * h + 2) >> 2, h * h)), 1 << 26)
            if number < len(self.layers) // 2:
                pushed.append(x)
        if self.P:
            x = self._inject(x)
        u = self.head(norm(x[-1], 14, 10))
        return R(np.where(u < 0, -1, 1) * interp(TANH, np.minimum(np.abs(u), 2**19 - 1), 8) * self.K, 24)

    def _embed(self, ids: list[int]) -> Ints:
        e = self.token[ids]
        if self.pair is not None:
            last = len(self.pair) - 1
            e = (
                e
                + self.pair[[last, *((36313 * now ^ 27191 * before) % last for before, now in itertools.pairwise(ids))]]
            )
        x0 = norm(e, self.F, 14, 1 << 26)
        if self.smear is not None:
            before = np.concatenate((np.zeros_like(x0[:1]), x0[:-1]))
            x0 = x0 + R(self.smear * (before - x0), 15)
        return x0

    def _attention(self, layer: dict[str, Any], a: Ints) -> Ints:
        T, H, G, E = len(a), self.c["num_heads"], self.c["num_kv_heads"], self.E
        heads = self._rotated(norm(C(layer["heads"](a), 1 << 27).reshape(T, H + G, E), 16, 10))
        q, k = heads[:, :H] * layer["sign"][:, None], heads[:, H:]
        v = C(layer["value"](a), 32767).reshape(T, G, E)
        k, v = (np.repeat(x, H // G, axis=1) for x in (k, v))
        scores = np.einsum("ihe,jhe->hij", q, k)
        seen = np.tri(T, dtype=bool)
        largest = np.where(seen, scores, -(1 << 40)).max(-1, keepdims=True)
        d = np.where(seen, largest - scores, 0)
        w = np.where(seen, exp2(R(d * layer["scores"].M[:, None, None], layer["scores"].shift)), 0)
        p = R(w * ((32767 << 46) // w.sum(-1, keepdims=True)), 46)
        y = C(R(np.einsum("hij,jhe->ihe", p, v), 15), 32767)
        if layer["xsa"]:
            squares = (v * v).sum(-1, keepdims=True)
            c = np.where(squares > 0, ((y * v).sum(-1, keepdims=True) << 16) // np.maximum(squares, 1), 0)
            y = C(y - R(c * v, 16), 32767)
        return y.reshape(T, H * E)

    def _rotated(self, x: Ints) -> Ints:
        half = self.rotating // 2
        cos, sin = self._rotary(len(x))
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = (R(a * cos + b * sin, 14), R(b * cos - a * sin, 14))
        return np.concatenate((C(turned[0], 32767), C(turned[1], 32767), x[..., 2 * half :]), axis=-1)

    def _rotary(self, length: int) -> tuple[Ints, Ints]:
        if not hasattr(self, "_rotary_tables") or len(self._rotary_tables[0]) < length:
            count, shape = max(64, length), (max(64, length), 1, self.rotating // 2)
            with mpmath.workdps(60):
                f = [mpmath.power(self.c["rotary_base"], mpmath.mpf(-2 * m) / self.rotating) for m in range(shape[2])]
                entries = [(mpmath.cos(t * f_m), mpmath.sin(t * f_m)) for t in range(count) for f_m in f]
                flat = [[int(mpmath.nint(value * 2**14)) for value in column] for column in zip(*entries, strict=True)]
            self._rotary_tables = tuple(np.array(column, dtype=np.int64).reshape(shape) for column in flat)
        return self._rotary_tables[0][:length], self._rotary_tables[1][:length]

    def _inject(self, x: Ints) -> Ints:
        added = []
        for begin in range(0, len(x), self.P):
            z = (
                self.start
                if begin == 0
                else self._mlp(x[begin - self.P : begin].sum(0), self.projector_up, self.projector_down)
            )
            J = self.injection.dyn(self._mlp(z, self.predictor_up, self.predictor_down))
            added += [C(J, 1 << 26)] * len(x[begin : begin + self.P])
        return C(x + np.array(added), 1 << 26)

    def _mlp(self, v: Ints, up: Matrix, down: Matrix) -> Ints:
        n = norm(C(up.dyn(v), 1 << 27), 16, 10)
        g = interp(SIGMOID, np.minimum(np.abs(n), 2**14 - 1), 4)
        return C(down.dyn(R(n * np.where(n < 0, 2**15 - g, g), 15)), 1 << 27)


def frequencies(y: Ints) -> Ints:
    w = exp2(R(y.max() - y, 4))
    g = ((2**24 - 256) << 38) // int(w.sum())
    found = 1 + ((w * g) >> 38)
    found[y.argmax()] += 2**24 - found.sum()
    return found


class RangeDecoder:
    def __init__(self, stream: bytes) -> None:
        self.code, self.width = int.from_bytes(stream[:6].ljust(6, b"\0"), "big"), 1 << 48
        self.rest = itertools.chain(stream[6:], itertools.repeat(0))

    def symbol(self, ends: Any) -> int:
        """The next one, where symbol i takes what is below `ends[i]` and not below `ends[i - 1]`."""
        r = self.width >> 24
        found = bisect.bisect_right(ends, min(self.code // r, 2**24 - 1))
        start = int(ends[found - 1]) if found else 0
        self.code, self.width = self.code - r * start, r * (int(ends[found]) - start)
        while self.width < 1 << 40:
            self.code, self.width = self.code << 8 | next(self.rest), self.width << 8
        return found


def prediction(model: Model, text: bytes | bytearray, window: int, hop: int) -> Ints:
    """The frequencies of the byte that follows `text`, a block or a segment so far."""
    begin = max(0, -((window - 1 - len(text)) // hop) * hop)
    return frequencies(model.logits([1, *(byte + 4 for byte in text)][begin:]))


def decode_block(model: Model, stream: bytes, length: int, window: int, hop: int) -> bytes:
    decoder, text = RangeDecoder(stream), bytearray()
    while len(text) < length:
        text.append(decoder.symbol(prediction(model, text, window, hop).cumsum()))
    return bytes(text)


def decode_mixed(model: Model, stream: bytes, length: int, window: int, hop: int, segment_bytes: int) -> bytes:
    decoder = RangeDecoder(stream)
    return Mixing(length, segment_bytes).code(
        lambda _, text: model_bits(prediction(model, text, window, hop)),
        lambda p: decoder.symbol((2**24 - 2**8 * p, 2**24)),
    )


def decode_frame(frame: bytes) -> bytes:
    descriptor = frame[4]
    code, single = descriptor >> 6, descriptor >> 5 & 1
    place = 6 - single
    size = int.from_bytes(frame[place : place + 2**code], "little") + (256 if code == 1 else 0)
    assert descriptor % 32 == 4
    assert code == (size >= 256) + (size >= 65_792) + (size >= 2**32 - 1)
    assert single or (frame[5] % 8 == 0 and 2 ** (10 + frame[5] // 8) <= min(2**23, size - 1))
    place, most, last = place + 2**code, 0, 0
    while not last:
        header = int.from_bytes(frame[place : place + 3], "little")
        last, kind, length = header & 1, header >> 1 & 3, header >> 3
        assert kind < 3
        assert length <= 2**17
        place += 3 + (1 if kind == 1 else length)
        assert place + 4 <= len(frame)
        most += 2**17 if kind == 2 else length
    assert place + 4 == len(frame)
    assert size <= most
    stream = zstandard.ZstdDecompressor().decompressobj()
    content = stream.decompress(frame)  # checks the checksum
    assert stream.eof
    assert len(content) == size
    return content


def decode_file(model: Model, blob: bytes) -> bytes:
    if blob[:4] == b"\x28\xb5\x2f\xfd":
        return decode_frame(blob)
    assert blob[:6] in (b"\x89BJC\x01\x01", b"\x89BJC\x02\x02")
    is_mixed = blob[5] == 2
    content_bytes, block_bytes, window, hop, identity, digest = struct.unpack_from("<QIII32s16s", blob, 6)
    assert identity == model.identity
    entries = 78 if is_mixed else 74
    count = -(-content_bytes // block_bytes)
    end = entries + 12 * count
    assert blob[end : end + 8] == hashlib.blake2b(blob[:end], digest_size=8).digest()
    content, place = b"", end + 8
    for index in range(count):
        size, payload_crc, content_crc = struct.unpack_from("<III", blob, entries + 12 * index)
        payload = blob[place : place + size % 2**31]
        place += len(payload)
        assert zlib.crc32(index.to_bytes(8, "little") + payload) == payload_crc
        length = min(block_bytes, content_bytes - len(content))
        if size >> 31:
            block = zstandard.ZstdDecompressor().decompress(payload)
        elif is_mixed:
            segment_bytes = int.from_bytes(blob[74:78], "little")
            block = decode_mixed(model, payload, length, window, hop, segment_bytes)
        else:
            block = decode_block(model, payload, length, window, hop)
        assert len(block) == length
        assert zlib.crc32(block) == content_crc
        content += block
    assert place == len(blob)
    assert hashlib.blake2b(content, digest_size=16).digest() == digest
    return content


def read_model(path: Path) -> Model:
    data = path.read_bytes()
    magic, version, compressed, _, file_bytes = struct.unpack_from("<8sIIIQ", data)
    assert (magic, version, file_bytes) == (b"\x89BJM\r\n\x1a\n", 1, len(data))
    header = json.loads(zstandard.ZstdDecompressor().decompress(data[28 : 28 + compressed]))
    unpack = {
        "raw": bytes, "brotli": brotli.decompress, "zstd": lambda stream: zstandard.ZstdDecompressor().decompress(stream),
    }  # fmt: skip
    tensors: dict[str, Any] = {}
    for record in header["tensors"]:
        shape, scheme, place, streams = record["shape"], record["scheme"], 28 + compressed + record["offset"], []
        for codec, size in zip(record["codecs"], record["stream_bytes"], strict=True):
            streams.append(unpack[codec](data[place : place + size]))
            place += size
        if scheme in SCALARS:
            tensors[record["name"]] = _joined_planes(streams[0], SCALARS[scheme]).reshape(shape)
        else:
            codes = np.frombuffer(streams[0], np.int8).reshape(shape)
            tensors[record["name"]] = codes, _joined_planes(streams[1], "<f2")
    return Model(header["configuration"], tensors)


def _joined_planes(stream: bytes, scalar: str) -> Ints:
    size = np.dtype(scalar).itemsize
    return np.ascontiguousarray(np.frombuffer(stream, np.uint8).reshape(size, -1).T).view(scalar)[:, 0]
