"""What only a CUDA device can show: its kernels, its training and its scores agree with the CPU's."""

import os
import signal
from pathlib import Path

import pytest
import torch

import bytejepa
from bytejepa.config import replace
from bytejepa.data.loader import IdStream
from bytejepa.errors import Interrupted
from bytejepa.model import attention, fused_heads, fused_mlp, layers
from bytejepa.model.attention import attention_mask, available_backends, causal_attention, masked_attention
from bytejepa.scoring.evaluate import Scorer, score_ids
from bytejepa.training.loop import TrainProgress
from bytejepa.training.runlog import RunFolder
from bytejepa.training.runs import resume, train
from small_models import random_ids, small_model

pytestmark = [
    pytest.mark.gpu,
    # what torch itself says while it compiles
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("kernel", ["flash4", "flash3", "cudnn", "flash", "flex", "efficient", "math"])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("documents", [False, True])
def test_every_kernel_agrees_with_an_explicit_softmax(kernel: str, window: int | None, documents: bool) -> None:
    if reason := available_backends("cuda")[kernel]:
        pytest.skip(reason)
    if ((window or documents) and kernel in ("cudnn", "flash")) or (documents and kernel in ("flash3", "flash4")):
        pytest.skip("takes no such mask")
    random = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (
        torch.randn(2, 300, h, 64, generator=random, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for h in (8, 4, 4)
    )
    ids = torch.arange(300, device=CUDA).expand(2, -1) // 100 if documents else None
    plain = attention_mask(300, window, ids, CUDA)
    full = torch.ones(300, 300, device=CUDA, dtype=torch.bool).tril()[None, None] if plain is None else plain
    exact = masked_attention(q.double(), k.double(), v.double(), full)
    mask, attend = plain, causal_attention
    if kernel == "flex":
        from bytejepa.model.flex_masks import block_mask

        mask, attend = block_mask(300, window, ids, CUDA), torch.compile(causal_attention)
    elif kernel in ("flash3", "flash4"):
        mask = window
    out = attend(q, k, v, backend=kernel, mask=mask)
    assert ((out.double() - exact).norm() / exact.norm()).item() < 5e-3
    gradients = [torch.autograd.grad(y.double().square().sum(), (q, k, v)) for y in (out, exact)]
    for ours, theirs in zip(*gradients, strict=True):
        assert ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item() < 2e-2


def test_keys_repeated_for_a_kernel_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := available_backends("cuda")["flash3"]:
        pytest.skip(reason)
    ids, gradients = random_ids(2, 129).to(CUDA), []
    for kernels in (frozenset(), frozenset({"flash3"})):
        monkeypatch.setattr(attention, "FASTER_WITHOUT_GROUPS", kernels)
        model = small_model(model={"model_dim": 128, "num_heads": 2, "num_kv_heads": 1, "xsa_last_layers": 2}).to(CUDA)
        model.compute_dtype, model.attention_backend = torch.bfloat16, "flash3"
        model.losses(ids[:, :-1], ids[:, 1:]).ce.backward()
        gradients.append([p.grad.double() for p in model.parameters() if p.grad is not None])
    for grouped, repeated in zip(*gradients, strict=True):
        assert ((grouped - repeated).norm() / grouped.norm().clamp_min(1e-6)).item() < 5e-2


def test_the_compiled_norm_and_rotation_is_the_plain_formula() -> None:
    tables = layers.RotaryTables(16, 10_000.0, 128).to(CUDA)
    heads = torch.randn(2, 128, 8, 64, device=CUDA).bfloat16().requires_grad_()
    gain = torch.linspace(0.5, 2.0, 6, device=CUDA).requires_grad_()
    weight = torch.randn_like(heads[:, :, :6])
    ours = torch.cat(torch.compile(fused_heads.queries_keys_values)(heads, *tables(128), gain, 4)[:2], dim=2)
    plain = layers.rotate(layers.rms_norm(heads[:, :, :6].float()), *tables(128)) * gain[:, None]
    torch.testing.assert_close(ours.float(), plain, rtol=1e-2, atol=1e-2)
    gradients = [torch.autograd.grad((y.float() * weight).sum(), (heads, gain)) for y in (ours, plain)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize(("rows", "width", "hidden"), [(300, 512, 1536), (1, 64, 72), (4096, 192, 320)])
def test_the_kernels_of_the_mlp_are_its_formulas(rows: int, width: int, hidden: int, normalizes: bool) -> None:
    if not fused_mlp.find("cuda"):
        pytest.skip("needs a GPU of compute capability 9.x and Triton")
    given = [torch.randn(1, rows, width), torch.randn(hidden, width) / 8, torch.randn(width, hidden) / 8]
    weight, found = torch.randn(1, rows, width), {}
    for device in ("cuda", "cpu"):
        there = [value.bfloat16().to(device).requires_grad_() for value in given]
        y = fused_mlp.mlp(*there, normalizes=normalizes)
        found[device] = [y, *torch.autograd.grad(y, there, weight.bfloat16().to(device))]
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert ((ours.cpu().double() - theirs.double()).norm() / theirs.double().norm()).item() < 1e-2


@pytest.mark.parametrize("compile_", ["on", "off"])
def test_losses_in_float32_are_those_of_a_cpu(minimal_config, embedded_shards: Path, tmp_path, compile_: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        config = replace(
            minimal_config,
            training={"device": device, "precision": "float32", "compile": compile_ if device == "cuda" else "off"},
        )
        train(config, embedded_shards, tmp_path / device)
        losses[device] = [
            line["train_loss_nats"] for line in RunFolder(tmp_path / device).read_metrics() if "train_loss_nats" in line
        ]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("compile_", ["on", "off"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(minimal_config, embedded_shards: Path, tmp_path, compile_) -> None:
    config = replace(minimal_config, training={"device": "cuda", "compile": compile_})
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"

    def stop_at_three(at: TrainProgress) -> None:
        if at.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config, embedded_shards, stopped, on_progress=stop_at_three)
    resume(stopped)
    train(config, embedded_shards, whole)
    lines = {run: [m for m in RunFolder(run).read_metrics() if "train_loss_nats" in m] for run in (stopped, whole)}
    for field in ("step", "num_bytes", "learning_rate_scale"):
        assert [m[field] for m in lines[stopped]] == [m[field] for m in lines[whole]]
    losses = {run: [m["train_loss_nats"] for m in lines[run]] for run in lines}
    assert losses[stopped] == pytest.approx(losses[whole], rel=1e-3)


def test_what_is_loaded_scores_in_bfloat16_what_it_scores_in_float32(
    minimal_artifact: Path, embedded_shards: Path
) -> None:
    ids = IdStream.open(embedded_shards, "val").read(0, 5000)
    scores = {}
    for precision in ("auto", "float32"):
        model = bytejepa.load(minimal_artifact, device="cuda", precision=precision)
        scores[precision] = score_ids(Scorer(model), ids, window=64, stride=16, batch_ids=4096).bpb
    assert scores["auto"] != scores["float32"]
    assert scores["auto"] == pytest.approx(scores["float32"], abs=5e-3)


def test_a_score_is_that_of_a_cpu(embedded_shards: Path) -> None:
    model, ids = small_model(), IdStream.open(embedded_shards, "val").read(0, 5000)
    on_cpu = score_ids(Scorer(model), ids, window=256, stride=64, batch_ids=4096).bpb
    on_gpu = score_ids(Scorer(model.to(CUDA)), ids, window=256, stride=64, batch_ids=4096).bpb
    assert on_gpu == pytest.approx(on_cpu, abs=1e-4)


def test_document_masks_and_windows_change_nothing_but_rounding() -> None:
    settings = {"document_masking": True, "attention_windows": (16, 0, 16), "num_heads": 2, "num_kv_heads": 1}
    model, ids = small_model(model=settings), random_ids(2, 128, documents=True)
    expected = model.logits(ids)
    found = model.to(CUDA).logits(ids.to(CUDA)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
