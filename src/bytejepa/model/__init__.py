"""The network: a byte in, a distribution over the next byte out. Knows nothing of training or files.

`ByteLM` (transformer.py) is built from `layers`, `attention` and `jepa`, and filled by `initialization`.
"""
