"""The other side of the smoke test: runs inside the bounded subprocess, never in ours. Imports nothing of bytejepa.

    python smoke_harness.py SCRIPT RESULT.json

Blocks sockets and programs, puts stand-ins in the place of flash-attn, triton and CUDA, imports the script under a name
that is not `__main__` (so its training does not start), builds its model from its own settings, shrunk if it is large,
and runs one forward pass on the CPU.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import json
import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

SEQUENCE = 64
REFUSAL = "the reviewer allows no network and no other programs"
STAND_INS = (
    "flash_attn",
    "flash_attn_interface",
    "flash_attn.flash_attn_interface",
    "flash_attn_3",
    "triton",
    "triton.language",
    "wandb",
    "cutlass",
    "fla",
)


def block_the_outside() -> None:
    """Make sockets and other programs raise; the namespace without network is the first line, this is the second."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(REFUSAL)

    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.socket.connect_ex = refuse  # type: ignore[method-assign]
    socket.create_connection = refuse
    socket.getaddrinfo = refuse
    subprocess.Popen.__init__ = refuse  # type: ignore[method-assign]
    os.system = refuse
    os.popen = refuse


def sockets_are_blocked() -> bool:
    """Return whether a connection, tried out, is refused by us and not by whoever should have answered."""
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    except OSError as problem:
        return str(problem) == REFUSAL
    return False


class StandIn(types.ModuleType):
    """A module in which every name exists: attention falls back to PyTorch's own, decorators change nothing."""

    __path__: list[str] = []  # noqa: RUF012 - what makes it a package

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)  # for scripts that ask find_spec what is installed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "attn" in name:
            return attention
        return lambda *a, **_: a[0] if len(a) == 1 and callable(a[0]) else (lambda f: f)


def attention(q: Any, k: Any, v: Any, *_: Any, causal: bool = False, **__: Any) -> Any:
    """Return what flash-attn returns for (B, T, H, E) tensors, by PyTorch's own attention."""
    import torch

    groups = q.size(2) // k.size(2)
    q, k, v = (part.transpose(1, 2) for part in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def install_stand_ins() -> list[str]:
    """Put stand-ins where a library is missing, and make CUDA calls harmless. Returns the names replaced."""
    replaced = []
    for name in STAND_INS:
        if name.partition(".")[0] in sys.modules and not isinstance(sys.modules[name.partition(".")[0]], StandIn):
            continue
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        if found is None:
            sys.modules[name] = StandIn(name)
            replaced.append(name)
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        for name in ("synchronize", "empty_cache", "set_device"):
            setattr(torch.cuda, name, lambda *_, **__: None)
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
        torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
        torch.compile = lambda model=None, **_: model if model is not None else (lambda f: f)  # type: ignore[assignment]
        replaced.append("cuda")
    return replaced


def settings_of(module: Any) -> Any:
    """Return the script's settings, or an instance of its class of settings; None if it has neither."""
    if hasattr(module, "CONFIG"):
        return module.CONFIG
    for name in ("Hyperparameters", "HParams", "Config", "GPTConfig", "Args", "ModelConfig"):
        kind = getattr(module, name, None)
        if inspect.isclass(kind):
            return kind()
    return next((getattr(module, name) for name in ("config", "args", "h") if hasattr(module, name)), None)


def read(settings: Any, *names: str) -> Any:
    """Return the first setting that exists under one of `names`, in the settings or in a section of theirs."""
    sections = [getattr(settings, name) for name in getattr(settings, "__dataclass_fields__", ())]
    owners = (settings, *sections)
    return next((getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)), None)


def build(module: Any, settings: Any) -> Any:
    """Return the script's model, built from its settings by the names of its constructor's parameters."""
    import torch

    kinds = [
        kind for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, torch.nn.Module) and kind.__module__ == module.__name__
    ]  # fmt: skip
    named = [
        kind for kind in kinds if kind.__name__ in ("GPT", "Model", "ByteLM", "LanguageModel", "Transformer", "Net")
    ]
    largest = sorted(kinds, key=lambda kind: len(inspect.signature(kind.__init__).parameters), reverse=True)
    problem: Exception | None = None
    for kind in [*named, *largest[:3]]:
        arguments: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
            if name in ("args", "h", "hparams", "config", "cfg", "hp", "c"):
                arguments[name] = settings
            elif hasattr(settings, name):
                arguments[name] = getattr(settings, name)
            elif parameter.default is inspect.Parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                arguments[name] = {"mtp_num_heads": 0, "mtp_loss_weight": 0.0}.get(name, 0)
        try:
            return kind(**arguments).float()
        except Exception as error:  # any constructor may refuse; the next candidate is tried
            problem = error
    raise RuntimeError(f"no model can be built: {problem!r}")


def initialised(module: Any, model: Any) -> Any:
    """Return the model as the script's own `initialize(model, seed)` fills it, if there is one, so that its loss means something."""
    own = getattr(module, "initialize", None)
    if inspect.isfunction(own) and list(inspect.signature(own).parameters) == ["model", "seed"]:
        own(model, seed=0)
    return model


def predict(model: Any, x: Any, y: Any) -> Any:
    """Return what the model makes of ids and targets, or of ids alone, called as such models usually are."""
    try:
        return model(x, y)
    except (TypeError, NotImplementedError):
        named = (getattr(model, name, None) for name in ("forward_logits", "logits"))
        return next((method for method in named if method is not None), model)(x)


def forward_loss(model: Any, vocabulary: int) -> float:
    """Return the loss in nats of one forward pass over random ids, whatever the model returns."""
    import torch

    ids = torch.randint(0, vocabulary, (1, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        out = predict(model, x, y)
    out = out[0] if isinstance(out, tuple) else out
    if out.ndim == 0:
        return float(out)
    if out.ndim == 3:
        return float(torch.nn.functional.cross_entropy(out.float().flatten(0, 1), y.flatten()))
    return float(out.float().mean())


def main() -> None:
    """Fill the result file step by step, so that what was reached is known even after a kill."""
    script, output = Path(sys.argv[1]), Path(sys.argv[2])
    result: dict[str, Any] = {"stage": "start", "code_bytes": script.stat().st_size, "python": sys.version.split()[0]}

    def save(stage: str, **more: Any) -> None:
        result.update(more, stage=stage)
        output.write_text(json.dumps(result, default=str))

    save("start")
    text = script.read_bytes()
    replaced = install_stand_ins() if b"torch" in text or b"exec" in text else []
    block_the_outside()
    save("prepared", stand_ins=replaced, sockets_blocked=sockets_are_blocked())
    sys.path.insert(0, str(script.parent))
    specification = importlib.util.spec_from_file_location("train_gpt", script)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["train_gpt"] = module
    begin = time.perf_counter()
    specification.loader.exec_module(module)
    save("imported", import_s=round(time.perf_counter() - begin, 3))
    settings = settings_of(module)
    vocabulary = read(settings, "vocab_size", "vocab") or 260
    save(
        "settings",
        width=read(settings, "model_dim", "dim", "d_model", "n_embd"),
        layers=read(settings, "num_layers", "n_layer", "depth"),
        vocabulary=vocabulary,
    )
    model = initialised(module, build(module, settings))
    save("built", parameters=sum(parameter.numel() for parameter in model.parameters()))
    save("done", forward_loss_nats=round(forward_loss(model, int(vocabulary)), 4))


if __name__ == "__main__":
    main()
