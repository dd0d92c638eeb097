# ruff: noqa: E501
"""Settings chosen by their loss on validation data: in the evaluation, before packing, on what was scored already."""

from __future__ import annotations

import pytest

from bytejepa.review import Review, Status, Word
from review.folders import Folder, outcome, status_of
from review.scripts import SLIDING, script

EVALUATION = """
def eval_with(args, model, device, val_tokens, temperature=1.0, clip=0):
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, val_tokens.numel() - 65, 64):
            part = val_tokens[start : start + 65].to(device, torch.int64)
            logits = model.forward_logits(part[:-1][None])[0].float() / temperature
            total += F.cross_entropy(logits, part[1:], reduction="sum").double()
    return total.item(), total.item() / math.log(2.0)

class Settings:
    temperature = 1.0
"""
WITH = "eval_with(args, base_model, device, val_tokens"
LOOP = f"""best, best_t = float("inf"), 1.0
    for t in (0.9, 0.95, 1.0):
        loss, bpb = {WITH}, t)
        if loss < best:
            best, best_t, best_bpb = loss, t, bpb
    """
USE = f"val_loss, val_bpb = {WITH}, best_t)"
IN_EVALUATION = {
    "loop": LOOP + USE,
    "the best itself": LOOP + "val_loss, val_bpb = best, best_bpb",
    "dictionary": f"losses = {{t: {WITH}, t)[0] for t in (0.9, 1.0)}}\n    best_t = min(losses, key=losses.get)\n    " + USE,
    "list": f"grid, losses = [0.9, 1.0], []\n    for t in grid:\n        losses.append({WITH}, t)[0])\n    best_t = grid[int(np.argmin(losses))]\n    " + USE,
    "tensor": f"grid = [0.9, 1.0]\n    best_t = grid[torch.tensor([{WITH}, t)[0] for t in grid]).argmin()]\n    " + USE,
    "key": f"best_t = min((0.9, 1.0), key=lambda t: {WITH}, t)[0])\n    " + USE,
    "pairs": f"losses = []\n    for t in (0.9, 1.0):\n        losses.append(({WITH}, t)[0], t))\n    best, best_t = min(losses)\n    " + USE,
    "expression": LOOP.replace("        if loss < best:\n            best, best_t, best_bpb = loss, t, bpb\n", "        best_t = t if loss < best else best_t\n        best = min(best, loss)\n") + USE,
    "scipy": f"from scipy.optimize import minimize_scalar\n    best_t = minimize_scalar(lambda t: {WITH}, t)[0], bounds=(0.8, 1.2)).x\n    " + USE,
    "argument": LOOP + f"val_loss, val_bpb = {WITH}, clip=best_t)",
    "weights": LOOP.replace("best_t, best_bpb = loss, t, bpb", "kept = loss, {k: v.clone() for k, v in base_model.state_dict().items()}") + f"base_model.load_state_dict(kept)\n    val_loss, val_bpb = {WITH})",
}  # fmt: skip
CHECKPOINT = """if step % 50 == 0:
            checked, _ = eval_val(args, model, device, val_tokens)
            if checked < least:
                least = checked
                {kept}"""


def chosen(tmp_path, **pieces: str) -> Review:
    """Return the review of a script with the pieces and EVALUATION."""
    return outcome(Folder(source=script(functions=EVALUATION, **pieces)), tmp_path)


@pytest.mark.parametrize("how", IN_EVALUATION)
def test_a_choice_by_the_loss_of_what_is_scored_is_flagged(how: str, tmp_path) -> None:
    found = chosen(tmp_path, final_eval=IN_EVALUATION[how])
    finding = found.finding("source.selection")
    assert finding.status is Status.FAIL, found.verdict
    assert any("chosen" in e.text and e.line for e in finding.evidence)
    assert found.verdict.word is Word.FLAG


def test_a_choice_in_each_window_is_flagged(tmp_path) -> None:
    grid = "min((0.9, 1.0), key=lambda t: F.cross_entropy(logits / t, part[1:]).item())"
    functions = EVALUATION.replace(
        "            total +=", f"            logits = logits / {grid}\n            total +="
    )
    source = script(functions=functions, final_eval=f"val_loss, val_bpb = {WITH})")
    assert status_of(outcome(Folder(source=source), tmp_path), "source.selection") is Status.FAIL


def test_a_choice_on_scored_windows_for_later_ones_is_clean(tmp_path) -> None:
    grid = "best_t = min((0.9, 1.0), key=lambda t: F.cross_entropy(logits / t, part[1:]).item())"
    functions = EVALUATION.replace(" / temperature", " / best_t").replace("    with torch", "    best_t = 1.0\n    with torch")  # fmt: skip
    functions = functions.replace("\n    return total", f"\n            {grid}\n    return total")
    source = script(functions=functions, final_eval=f"val_loss, val_bpb = {WITH})")
    found = outcome(Folder(source=source), tmp_path)
    assert status_of(found, "source.selection") is Status.PASS
    assert found.verdict.word is Word.CLEAN


def test_a_sweep_before_another_evaluation_is_for_people(tmp_path) -> None:
    found = chosen(tmp_path, final_eval=LOOP + "print(best_t)\n    " + SLIDING)
    assert status_of(found, "source.selection") is Status.UNKNOWN
    assert found.verdict.word is Word.HOLD


@pytest.mark.parametrize(
    "pieces",
    [
        {"before_quantize": LOOP, "final_eval": USE},
        {
            "before_quantize": LOOP.replace("best_bpb = loss, t, bpb", "kept = loss, t, base_model.state_dict()")
            + "base_model.load_state_dict(kept)"
        },
        {"in_training": "least = 9.9\n        " + CHECKPOINT.format(kept='torch.save(base_model.state_dict(), "best.pt")')},
        {"in_training": "least = 9.9\n        " + CHECKPOINT.format(kept="ema = base_model.state_dict()")},
    ],
    ids=["setting", "weights", "saved", "remembered"],
)  # fmt: skip
def test_what_is_packed_by_choice_is_for_people(pieces: dict[str, str], tmp_path) -> None:
    found = chosen(tmp_path, **pieces)
    assert status_of(found, "source.selection") is Status.UNKNOWN
    assert found.verdict.word is Word.HOLD


@pytest.mark.parametrize(
    "pieces",
    [
        {"in_training": "least = 9.9\n        " + CHECKPOINT.format(kept="print(least)")},  # for the log only
        {"final_eval": f"val_loss, val_bpb = {WITH}, 0.95)"},  # tuned across runs
        {"final_eval": f"first = {WITH})\n    val_loss, val_bpb = {WITH}, 0.9)\n    if val_loss > 9: raise SystemExit(1)"},
        {
            "in_training": "x, y = train_loader.next_batch(1024, args.train_seq_len)\n        "
            "best_t = min((0.9, 1.0), key=lambda t: F.cross_entropy(base_model.forward_logits(x).flatten(0, 1) / t, y.flatten()).item())",
            "final_eval": USE,
        },
    ],
    ids=["logged", "fixed", "limit", "training data"],
)  # fmt: skip
def test_what_no_validation_loss_decides_is_clean(pieces: dict[str, str], tmp_path) -> None:
    found = chosen(tmp_path, **pieces)
    assert status_of(found, "source.selection") is Status.PASS
    assert found.verdict.word is Word.CLEAN, found.verdict
