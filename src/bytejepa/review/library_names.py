"""Names of library functions that mean something to the abstract interpreter. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

NETWORK = (
    "urllib.", "urllib3", "requests.", "http.client", "http.server", "socket.", "huggingface_hub", "boto3", "ftplib", "aiohttp",
    "httpx", "wandb.", "smtplib", "paramiko", "gdown", "datasets.load_dataset", "torch.hub.", "transformers.AutoModel",
)  # fmt: skip
PROCESSES = ("subprocess.", "os.system", "os.popen", "os.exec", "os.spawn", "builtins.os.system")
NATIVE = {
    "ctypes.CDLL", "ctypes.PyDLL", "ctypes.cdll.LoadLibrary", "numpy.ctypeslib.load_library",
    "torch.utils.cpp_extension.load", "torch.utils.cpp_extension.load_inline",
}  # fmt: skip
"""What loads compiled code, of which nothing is known here."""
READERS = re.compile(
    r"^(?:builtins\.open|torch\.load|numpy\.(?:load|fromfile|memmap|loadtxt)|pickle\.load|joblib\.load|safetensors\.(?:torch\.)?load_file"
    r"|json\.load|pandas\.read_\w+|io\.open|gzip\.open|lzma\.open|sqlite3\.connect|mmap\.mmap)$"
)
FRESH_TENSORS = re.compile(
    r"^torch\.(?:zeros|ones|empty|full|randn|rand|tensor|zeros_like|ones_like|randn_like|empty_like|nn\.Parameter|nn\.parameter\.Parameter)$"
)
CONTAINERS = re.compile(
    r"^(?:(?:numpy|torch)\.(?:zeros|ones|empty|full|zeros_like|arange|tensor)|collections\.(?:defaultdict|Counter|OrderedDict|deque)|builtins\.(?:dict|list|set))$"
)
LOSSES = re.compile(r"(?:cross_entropy|nll_loss|log_softmax|\.softmax|CrossEntropyLoss|kl_div)$")
DISTRIBUTIONS = ("log_softmax", ".softmax")
"""Of LOSSES, what still says something about every symbol."""
REDUCTIONS = {"sum", "mean", "item", "tolist", "gather", "take", "take_along_dim", "index_select", "argmax", "argmin"}
"""After these a tensor of predictions is one no more: a target was picked, or a mean taken."""
COMPRESSORS = re.compile(
    r"^(?:lzma|zlib|bz2|gzip|brotli|zstandard|zstd|pyzstd)\.(?:compress|ZstdCompressor.*\.compress)$"
)
DECOMPRESSORS = re.compile(r"^(?:lzma|zlib|bz2|gzip|brotli|zstandard|zstd|pyzstd)\.decompress$")
DIFFERENTIATORS = re.compile(
    r"^(?:mlx\.(?:nn|core)|jax|torch\.func|functorch|equinox)\.(?:filter_)?(?:value_and_grad|grad_and_value|grad)$"
)
"""What makes a function into one that also returns gradients; the step is what is done with them."""
SAME = re.compile(
    r"^(?:mlx\.core\.compile|jax\.jit|torch\.(?:compile|jit\.script|nn\.parallel\.DistributedDataParallel|nn\.DataParallel|no_grad|inference_mode)|.*\bDistributedDataParallel)$"
)

PLACES = re.compile(r"^(?:torch\.randint|(?:numpy\.)?random\.(?:randint|randrange|choice|integers|sample))$")
"""Random numbers that pick a place; a random order of all places (`randperm`, `shuffle`) is none."""

LAUNCHER_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
}

PLAIN: dict[str, Callable[..., Any]] = {
    "int": int, "float": float, "bool": bool, "str": str, "len": len, "abs": abs, "min": min, "max": max, "round": round,
    "tuple": tuple, "sum": sum,
}  # fmt: skip
TEXT_METHODS = {
    "lower",
    "upper",
    "strip",
    "lstrip",
    "rstrip",
    "split",
    "replace",
    "startswith",
    "endswith",
    "format",
    "removeprefix",
    "removesuffix",
    "join",
}
