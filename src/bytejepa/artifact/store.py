"""How each tensor of a model is kept (spec section 5), and what the code that reads it weighs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from torch import Tensor

import bytejepa
from bytejepa.artifact.packing import StoredTensor, store_tensors
from bytejepa.config import ArtifactConfig, RunConfig
from bytejepa.model.initialization import is_vector
from bytejepa.model.quantization import CLIP_MAX, CLIP_MEAN_SQUARED_ERROR, reference_int6, reference_int8
from bytejepa.model.transformer import TRAINING_ONLY


def scheme_of(name: str, tensor: Tensor, config: ArtifactConfig) -> str:
    """Return the storage scheme of a parameter: float16 for small tensors and (stacked) vectors, rows of few bits for
    matrices."""
    if is_vector(name, tensor) or tensor.ndim > 2 or tensor.numel() <= config.small_tensor_elements:
        return "float16"
    is_block_matrix = name.startswith("blocks.") and not name.endswith("embedding.weight")
    bits = config.matrix_bits if is_block_matrix else config.other_bits
    return f"int{bits}_rows"


def store_weights(weights: dict[str, Tensor], config: RunConfig) -> dict[str, StoredTensor]:
    """Return every weight in its storage form; what only training needs is left out.

    Raises: ArtifactError naming a tensor that cannot be stored, such as one that is not finite.
    """
    kept = {
        name: value.detach().float().cpu()
        for name, value in sorted(weights.items())  # safetensors gives them in any order; a file must not differ by it
        if not name.startswith(TRAINING_ONLY)
    }
    schemes = {name: scheme_of(name, value, config.artifact) for name, value in kept.items()}
    if config.artifact.scales == "per_row":
        clip = CLIP_MAX if config.artifact.clip == "max" else CLIP_MEAN_SQUARED_ERROR
        return store_tensors(kept, schemes, clip=clip)
    plain = {name: scheme for name, scheme in schemes.items() if not scheme.endswith("_rows")}
    stored = store_tensors({name: kept[name] for name in plain}, plain)
    rules = {
        f"int{config.artifact.matrix_bits}_rows": reference_int6,
        f"int{config.artifact.other_bits}_rows": reference_int8,
    }
    return {name: stored[name] if name in stored else rules[schemes[name]](kept[name]) for name in kept}


def code_archive() -> bytes:
    """Return the package's source as a zip that Python can import: the code counted against the budget.

    Data files (the embedded corpus) are not code and not needed to load or score an artifact; they are left out.
    """
    root = Path(bytejepa.__file__).parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(root.rglob("*.py")):
            entry = zipfile.ZipInfo(f"bytejepa/{path.relative_to(root).as_posix()}", (2026, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes(), compresslevel=9)
    return buffer.getvalue()


def code_bytes() -> tuple[int, int]:
    """Return (bytes of the package's source as it stands, bytes of it as an importable zip)."""
    root = Path(bytejepa.__file__).parent
    return sum(path.stat().st_size for path in root.rglob("*.py")), len(code_archive())
