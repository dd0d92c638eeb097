"""Lossless compression with a model, decodable on any machine: the promise behind a score in bits per byte.

`fixed_point`, `integer_tensors` and `integer_model` turn an artifact into integers, `forward` (compiled for CPUs: `embedding`,
`attention`, `latents`, `kernels`, `tiles`, `packed_model`, `cpu`) and `torch_model` with `torch_parts` (PyTorch, GPUs) compute
the same frequencies from them, `coder` turns frequencies into bytes, `container` is the file, `compress` the way there and
back. `docs/codec.md` specifies all of it.
"""
