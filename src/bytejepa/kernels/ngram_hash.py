"""How a run of ids becomes a row of a table: the numbers that `bytejepa.model.ngram_embedding` and the codec share.

h = id_t; for every earlier id: h = (h * MULTIPLIER + id) mod 2^BITS; row = ((h * MULTIPLIER mod 2^BITS) * (rows - 1)) >> BITS,
so that no run has the table's last row: that is for places with fewer ids before them.
"""

from __future__ import annotations

HASH_BITS = 31
"""Hashes are numbers below 2^31, so that no product of two of them overflows 64 bits."""
HASH_MULTIPLIER = 1_327_217_885
"""2^31 over the golden ratio, to the nearest odd number: Fibonacci hashing (Knuth, TAOCP 3, 6.4)."""
