"""Byte-level language models under a byte budget."""
