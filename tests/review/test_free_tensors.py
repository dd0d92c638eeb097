"""A tensor that is no network's, added to the predictions and changed by validation data without a gradient."""

from __future__ import annotations

import pytest

from bytejepa.review import Status, Word
from review.folders import Folder, outcome, status_of
from review.scripts import script

EVALUATION = """
class Corrector:
    def __init__(self, words):
        self.offset = torch.zeros(words)
    def take(self, logits, targets):
        self.offset = 0.99 * self.offset + 0.01 * (F.one_hot(targets, 260).float() - logits.softmax(-1)).mean(0)

def eval_corrected(args, model, device, val_tokens):
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros(())
    bias, table, corrector = torch.zeros(260), torch.zeros(260, 260), Corrector(260)
    {whole}
    for start in range(0, val_tokens.numel() - 65, 64):
        part = val_tokens[start : start + 65].to(device, torch.int64)
        x, y = part[:-1], part[1:]
        ahead = val_tokens[start + 64 : start + 129].to(device, torch.int64)
        with torch.no_grad():
            logits = model.forward_logits(x[None])[0].float()
        {before}
        logp = F.log_softmax({predictions}, dim=-1)
        nll = -logp.gather(1, y[:, None])
        total = total + nll.double().sum()
        count += (y >= 4).sum()
        {after}
    return (total / count).item(), (total / count).item() / math.log(2.0)
"""
CALL = "val_loss, val_bpb = eval_corrected(args, base_model, device, val_tokens)"
CHANGES = {
    "counts": ("logits + bias", "bias += 0.01 * torch.bincount(y, minlength=260)"),
    "indexed": ("logits + 0.5 * torch.log1p(bias)[None]", "bias[y] += 1"),
    "scattered": ("torch.add(logits, bias)", "bias.scatter_add_(0, y, torch.ones(64))"),
    "average": ("logits - bias", "bias.lerp_(F.one_hot(y, 260).float().mean(0), 0.1)"),
    "bound anew": ("logits + bias", "bias = 0.9 * bias + 0.1 * F.one_hot(y, 260).float().mean(0)"),
    "copied": ("logits.add_(bias)", "bias.copy_(0.9 * bias + 0.1 * F.one_hot(y, 260).float().mean(0))"),
    "by hand": ("logits + bias", "bias -= 0.1 * (logits.softmax(-1) - F.one_hot(y, 260)).mean(0)"),
    "table": ("logits + table[x]", "table.index_put_((x, y), torch.ones(64), accumulate=True)"),
    "attribute": ("logits + corrector.offset", "corrector.take(logits, y)"),
}  # fmt: skip


def corrected(predictions: str, *, whole: str = "pass", before: str = "pass", after: str = "pass") -> Folder:
    """Return a submission whose evaluation corrects the predictions of its network."""
    functions = EVALUATION.format(predictions=predictions, whole=whole, before=before, after=after)
    return Folder(source=script(functions=functions, final_eval=CALL))


@pytest.mark.parametrize("how", CHANGES)
def test_changed_after_its_data_was_scored_it_is_legal(how: str, tmp_path) -> None:
    predictions, change = CHANGES[how]
    found = outcome(corrected(predictions, after=change), tmp_path)
    assert status_of(found, "source.score_first_training") is Status.PASS
    assert found.verdict.word is Word.CLEAN, found.verdict
    assert "Track B" in found.verdict.reason


@pytest.mark.parametrize("how", CHANGES)
def test_changed_before_its_data_is_scored_it_is_flagged(how: str, tmp_path) -> None:
    predictions, change = CHANGES[how]
    found = outcome(corrected(predictions, before=change), tmp_path)
    finding = found.finding("source.test_time_training")
    assert finding.status is Status.FAIL
    assert "without a gradient" in finding.summary
    assert any("bias" in e.text or "table" in e.text or "offset" in e.text for e in finding.evidence)
    assert all(e.file == "train_gpt.py" and e.line for e in finding.evidence)
    assert found.verdict.word is Word.FLAG


@pytest.mark.parametrize(
    "pieces",
    [
        {"whole": "bias += torch.bincount(val_tokens[1:], minlength=260)"},
        {"whole": "for at in range(0, val_tokens.numel(), 64): bias += torch.bincount(val_tokens[at : at + 64], minlength=260)"},
        {"after": "bias += torch.bincount(val_tokens[(start + 1) * 64 : (start + 2) * 64], minlength=260)"},
    ],
    ids=["at once", "in a pass of its own", "from the next chunk"],
)  # fmt: skip
def test_filled_from_what_is_still_to_be_scored_it_is_flagged(pieces: dict[str, str], tmp_path) -> None:
    found = outcome(corrected("logits + bias", **pieces), tmp_path)
    assert status_of(found, "source.test_time_training") is Status.FAIL
    assert found.verdict.word is Word.FLAG


def test_two_rounds_over_the_data_are_flagged(tmp_path) -> None:
    text = EVALUATION.format(predictions="logits + bias", whole="pass", before="pass", after=CHANGES["counts"][1])
    loop = "    for start in range(0, val_tokens.numel() - 65, 64):\n"
    first, last = text.split(loop)
    body, end = last.split("    return")
    rounds = "    for round in range(2):\n    " + loop + "".join(f"    {line}\n" for line in body.splitlines())
    functions = f"{first}{rounds}    return{end}"
    found = outcome(Folder(source=script(functions=functions, final_eval=CALL)), tmp_path)
    assert status_of(found, "source.test_time_training") is Status.FAIL


@pytest.mark.parametrize(
    ("predictions", "pieces"),
    [
        ("logits", {"before": CHANGES["counts"][1]}),  # nobody reads it
        ("logits", {"before": CHANGES["counts"][1], "after": "print((logits + bias).argmax())"}),  # nor is it scored
        ("logits + bias", {"whole": "bias += 0.1 * torch.arange(260)"}),  # knows nothing of the data
        ("logits + hint", {"before": "hint = torch.zeros(64, 260); hint[torch.arange(64), x] += 1"}),  # of this window's context only
        ("logits + buffer", {"whole": "buffer = torch.zeros(64, 260)", "before": "buffer.copy_(F.one_hot(x, 260))"}),
        ("logits + bias", {"after": "loss = (total / count); print(loss)"}),
    ],
    ids=["unused", "unscored", "constant", "anew", "buffer", "running mean"],
)  # fmt: skip
def test_what_learns_nothing_that_is_scored_is_no_adaptation(predictions: str, pieces: dict[str, str], tmp_path) -> None:  # fmt: skip
    found = outcome(corrected(predictions, **pieces), tmp_path)
    assert found.verdict.word is Word.CLEAN, found.verdict
    assert "Track A" in found.verdict.reason
