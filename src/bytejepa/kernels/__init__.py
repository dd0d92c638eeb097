"""Compiled arithmetic for CPUs, and how it is compiled: numba and LLVM, torch-free."""
