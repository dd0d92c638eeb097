"""Mixed blocks for the second decoder, written from docs/codec.md ("Mixing") alone. Names are those of the page."""

from collections.abc import Callable, Mapping

import mpmath
import numpy as np

Path = Mapping[int, int] | list[int]
"""What the model says of the bits of a byte, p by `partial`."""
WORD = 2**64 - 1
LARGEST = 3071
INITIAL = 0.07, 0.06, 0.06, 0.06, 0.06, 0.06, 0.2, 0.1, 0.3, 0.4, 0.5, 0
INPUTS, CLASSES = len(INITIAL), 9
ROWS_OF_SETS = 7 * 8, 256, 8 * 16, 1, 256


def _squash_table() -> list[int]:
    with mpmath.workdps(60):
        exact = [mpmath.nint(2**16 / (1 + mpmath.exp(-mpmath.mpf(v) / 256))) for v in range(-LARGEST, LARGEST + 1)]
    return [max(1, min(65535, int(value))) for value in exact]


SQUASH = _squash_table()
STRETCH = [int(v) - LARGEST for v in np.searchsorted(SQUASH, np.arange(2**16))]
RATE = [2**17 // (2 * n + 3) for n in range(256)]
CLASS = [n if n < 4 else 4 + sum(n > limit for limit in (5, 9, 19, 59)) for n in range(256)]


def squash(v: int) -> int:
    return SQUASH[v + LARGEST]


def clamp(v: int) -> int:
    return max(-LARGEST, min(LARGEST, v))


def probability(p: int) -> int:
    return max(1, min(65535, p))


def hash_of(x: int, kind: int) -> int:
    y = (16 * x + kind) * 0x5851F42D4C957F2D & WORD
    return y ^ y >> 29


def last_bytes(text: bytes | bytearray, k: int) -> int:
    return int.from_bytes(text[-k:], "big")


def model_bits(frequencies: np.ndarray) -> Path:
    F, found = [0, *map(int, frequencies.cumsum())], [0]
    for partial in range(1, 256):
        s = 256 >> partial.bit_length() - 1
        x = partial * s - 256
        found.append(probability((F[x + s] - F[x + s // 2]) * 2**16 // (F[x + s] - F[x])))
    return found


class Segment:
    """What is a segment's own; `text` is what of it is coded."""

    def __init__(self, begin: int, length: int) -> None:
        self.begin, self.length, self.text = begin, length, bytearray()
        self.w = self.w_before = self.pointer = self.matching = 0

    def contexts(self) -> list[int]:
        words = hash_of(256 * self.w + last_bytes(self.text, 1), 7), hash_of(self.w ^ self.w_before << 26, 8)
        return [*(hash_of(last_bytes(self.text, k), k) for k in range(1, 7)), *words]

    def append(self, byte: int) -> None:
        self.text.append(byte)
        c = byte + 32 if 65 <= byte <= 90 else byte
        if 97 <= c <= 122 or c >= 128:
            self.w = 0x2F0B4C47 * (self.w + c) % 2**32
        elif self.w:
            self.w_before, self.w = self.w, 0


class Buckets:
    """One context's counters."""

    def __init__(self, b: int) -> None:
        self.b, self.taken = b, {}  # bucket: its check and its nodes

    def nodes(self, context: int, partial: int) -> dict[int, list[int]]:
        z = (context + partial) * 0x1B873593CC9E2D51 & WORD
        z ^= z >> 29
        first, check = (z >> 20) % 2**self.b, 1 + (z >> 44) % 2**16
        one, other = self.taken.get(first), self.taken.get(first ^ 1)
        for bucket in (one, other):
            if bucket and bucket[0] == check:
                return bucket[1]
        place = first ^ 1 if one and (not other or other[1][1][1] < one[1][1][1]) else first
        self.taken[place] = check, {1: [2**21, 0]}
        return self.taken[place][1]


class Mixing:
    """The state of a block, and of the byte and bit that are being coded."""

    def __init__(self, n: int, segment_bytes: int) -> None:
        length = -(-n // max(1, min(16, n // segment_bytes)))
        self.n, self.length = n, length
        self.segments = [Segment(begin, min(length, n - begin)) for begin in range(0, n, length)]
        self.b = max(8, min(17 + (n > 2**20) + (n > 2**22), n.bit_length() - 1))
        self.counters = [Buckets(self.b) for _ in range(8)]
        self.places: dict[int, int] = {}
        self.g = [32768 + 30000 * L // 32 for L in range(32)]
        row = [squash(max(1, min(6143, 192 * j)) - 3072) for j in range(33)]
        self.corrections: tuple[dict[int, list[int]], ...] = {}, {}, {}
        self.initial_row = row
        self.first_rows = np.cumsum([0, *ROWS_OF_SETS[:-1]])
        column = np.rint(2.0**16 * np.array(INITIAL)).astype(np.int64)
        self.weights = np.tile(np.repeat(column, CLASSES), sum(ROWS_OF_SETS))
        self.W = [[2**16 // 5] * 5 for _ in range(256)]
        self.coded = 0

    def code(self, model: Callable[[int, bytearray], Path], code_bit: Callable[[int], int]) -> bytes:
        """All bytes: `model` is given a segment's number and its bytes so far, `code_bit` the probability of a 1."""
        for u in range(self.length):
            for number, segment in enumerate(self.segments):
                if u < segment.length:
                    segment.append(self.byte(segment, model(number, segment.text), code_bit))
                    self.coded += 1
        return b"".join(segment.text for segment in self.segments)

    def byte(self, segment: Segment, path: Path, code_bit: Callable[[int], int]) -> int:
        contexts, last, last_three = segment.contexts(), last_bytes(segment.text, 1), last_bytes(segment.text, 3)
        expected = self.matched(segment)
        partial = 1
        for number in range(8):
            if number % 4 == 0:
                buckets = [
                    buckets.nodes(context, partial) for buckets, context in zip(self.counters, contexts, strict=True)
                ]
            node = partial if number < 4 else 1 << number - 4 | partial % (1 << number - 4)
            agrees = expected is not None and (expected | 256) >> 8 - number == partial
            expected_bit = expected >> 7 - number & 1 if agrees else None
            r3 = (hash_of(256 * last_three + partial, 0) >> 40) % 2**16
            bit = self.bit(
                [nodes.setdefault(node, [2**21, 0]) for nodes in buckets], segment.matching, expected_bit, path[partial],
                partial, number, last, 256 * last + partial, r3, code_bit,
            )  # fmt: skip
            partial = 2 * partial + bit
        byte = partial - 256
        if expected == byte:
            segment.pointer, segment.matching = segment.pointer + 1, min(2**16, segment.matching + 1)
        else:
            segment.matching = 0
        return byte

    def matched(self, segment: Segment) -> int | None:
        """The byte that the match expects next."""
        text, t = segment.text, segment.begin + len(segment.text)
        if segment.matching and self.coded_byte(segment.pointer) is None:
            segment.matching = 0
        if len(text) >= 6:
            h = (hash_of(last_bytes(text, 6), 0) >> 24) % 2 ** (self.b + 3)
            p = self.places.get(h)
            if not segment.matching and p is not None:
                before = self.segments[p // self.length].text[: p % self.length]
                most = min(32, len(before), len(text))
                equal = next((i for i in range(most) if before[-1 - i] != text[-1 - i]), most)
                if equal >= 6:
                    segment.pointer, segment.matching = p, equal
            self.places[h] = t
        return self.coded_byte(segment.pointer) if segment.matching else None

    def coded_byte(self, place: int) -> int | None:
        if place == self.n:
            return None
        text, u = self.segments[place // self.length].text, place % self.length
        return text[u] if u < len(text) else None

    def bit(
        self, nodes: list[list[int]], length: int, expected_bit: int | None, model_p: int, partial: int, number: int,
        last: int, r1: int, r3: int, code_bit: Callable[[int], int],
    ) -> int:  # fmt: skip
        # Inputs, and which of its nine weights each uses
        L = length if length < 16 else min(31, 16 + (length - 16) // 8)
        M = 0 if expected_bit is None else 1 + min(6, L // 4)
        match = 0 if expected_bit is None else STRETCH[self.g[L]] * (1 if expected_bit else -1)
        m = STRETCH[model_p]
        corrected_m = self.corrected(2, r3, m)
        inputs = np.array(
            [*(STRETCH[q >> 6] if count else 0 for q, count in nodes), match, m, STRETCH[corrected_m[0]], 256]
        )
        columns = np.array([*(CLASS[count] for _, count in nodes), M, 0, 0, 0]) + CLASSES * np.arange(INPUTS)
        # Mixture
        longest = max((k for k in range(1, 7) if nodes[k - 1][1]), default=0)
        rows = np.array([7 * M + longest, partial, 8 * min(15, abs(m) // 128) + number, 0, last])
        used = (self.first_rows + rows)[:, None] * (INPUTS * CLASSES) + columns
        weights = self.weights[used]
        v = [clamp(x) for x in ((weights @ inputs + 2**15) >> 16).tolist()]
        W = self.W[partial]
        V = clamp(2**15 + sum(a * b for a, b in zip(W, v, strict=True)) >> 16)
        corrected_0, corrected_1 = self.corrected(0, r1, V), self.corrected(1, r3, V)
        bit = code_bit(probability((2 * squash(V) + corrected_0[0] + corrected_1[0] + 2) // 4))
        # What each learns
        eta = 96 + 8192000 // (1024 + self.coded)
        errors = np.array([(2**16 * bit - squash(x)) * eta for x in v])
        weights += (2**23 + errors[:, None] * inputs) >> 24
        self.weights[used] = np.minimum(np.maximum(weights, -(2**24)), 2**24)
        for i, x in enumerate(v):
            W[i] += 2**19 + 8 * x * (2**16 * bit - squash(V)) >> 20
        for _, row, k in (corrected_0, corrected_1, corrected_m):
            row[k] += (65535 * bit - row[k]) // 32
        if expected_bit is not None:
            self.g[L] += (65535 * (bit == expected_bit) - self.g[L]) // 64
        for counter in nodes:
            q, count = counter
            counter[:] = q + (((2**22 - 1) * bit - q) * RATE[count] >> 16), min(255, count + 1)
        return bit

    def corrected(self, table: int, r: int, v: int) -> tuple[int, list[int], int]:
        """`v` corrected; the row and the number in it that is to learn."""
        row = self.corrections[table].setdefault(r, self.initial_row.copy())
        j, d = divmod(v + 3072, 192)
        return ((192 - d) * row[j] + d * row[j + 1]) // 192, row, j + 1 if d > 96 else j
