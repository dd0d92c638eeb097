"""How each tensor of a model is kept (spec section 5), and what the code that reads it weighs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from torch import Tensor

import bytejepa
from bytejepa.artifact.calibration import Calibration
from bytejepa.artifact.packing import StoredTensor, store_float16
from bytejepa.artifact.quantize import quantize_matrices
from bytejepa.config import ArtifactConfig, RunConfig
from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import is_block_matrix, reference_int6, reference_int8, stored_bits
from bytejepa.model.transformer import prediction_weights


def needs_calibration(config: ArtifactConfig) -> bool:
    """Return whether `store_weights` has to know how the model uses its weights."""
    return config.rounding == "gptq" or config.clip == "sensitivity"


def store_weights(
    weights: dict[str, Tensor], config: RunConfig, calibration: Calibration | None = None
) -> dict[str, StoredTensor]:
    """Return every weight in its storage form; what only training needs is left out.

    Raises: ArtifactError naming a tensor that cannot be stored, such as one that is not finite, or if the settings need
    a calibration and there is none.
    """
    artifact = config.artifact
    if needs_calibration(artifact) and calibration is None:
        raise ArtifactError("artifact.rounding gptq and artifact.clip sensitivity need training text to calibrate on")
    # sorted: safetensors gives them in any order; a file must not differ by it
    kept = {name: value.detach().float() for name, value in sorted(prediction_weights(weights, config).items())}
    matrices = {name: value for name, value in kept.items() if stored_bits(name, value, artifact) is not None}
    plain = {name: value for name, value in kept.items() if name not in matrices}
    stored: dict[str, StoredTensor] = dict(store_float16(plain))
    if artifact.scales == "reference_floor":
        rules = {True: reference_int6, False: reference_int8}
        stored |= {name: rules[is_block_matrix(name)](value.cpu()) for name, value in matrices.items()}
    else:
        stored |= quantize_matrices(matrices, artifact, calibration)
    return {name: stored[name] for name in kept}


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
