"""What a fifth, blind round of public submissions found wrong with review, each cause rewritten as small as it goes."""

from __future__ import annotations

import pytest

from bytejepa.review import Status, Word
from review.folders import Folder, outcome, status_of
from review.scripts import SLIDING, script

ALL_WORDS = """
class PairCounts:
    def __init__(self, size):
        self.size = size
        self.pairs, self.firsts = torch.zeros(size), torch.zeros(size)
    def take(self, ids):
        first, second = ids[:-1], ids[1:]
        self.pairs.scatter_add_(0, (first * 8209 + second) % self.size, torch.ones(len(first)))
        self.firsts.scatter_add_(0, (first * 7919) % self.size, torch.ones(len(first)))
    def guess(self, ids, words):
        key = (ids[:, None] * 8209 + words) % self.size
        seen = self.firsts[(ids * 7919) % self.size][:, None]
        return self.pairs[key] / seen.clamp_min(1)

def eval_counted(args, model, device, val_tokens):
    total, counts = torch.zeros((), dtype=torch.float64), PairCounts(1 << 16)
    words = torch.arange(args.vocab_size)[None]
    for start in range(0, val_tokens.numel() - 65, 64):
        part = val_tokens[start : start + 65].to(device, torch.int64)
        x, y = part[:-1], part[1:]
        with torch.no_grad():
            known = F.softmax(model.forward_logits(x[None])[0].float(), dim=-1)
        mixed = 0.9 * known + 0.1 * counts.guess(x, {asked})
        total += -mixed.log().gather(1, y[:, None]).double().sum()
        counts.take(part[:-1])
    return total.item(), total.item() / math.log(2.0)
"""
COUNTED = "val_loss, val_bpb = eval_counted(args, base_model, device, val_tokens)"
BIASED = """
def eval_biased(args, model, device, val_tokens):
    total, bias = torch.zeros((), dtype=torch.float64), torch.zeros(260)
    for start in range(0, val_tokens.numel() - 65, 64):
        part = val_tokens[start : start + 65].to(device, torch.int64)
        with torch.no_grad():
            logits = model.forward_logits(part[:-1][None])[0].float() + bias
        total += F.cross_entropy(logits, part[1:], reduction="sum").double()
        bias -= 0.1 * (F.softmax(logits, dim=-1) - F.one_hot(part[1:], 260)).mean(0)
    return total.item(), total.item() / math.log(2.0)
"""
PLAIN = "eval_val(args, model, device, val_tokens)"
AVERAGED_OR_NOT = f"""raw = {{n: t.clone() for n, t in base_model.state_dict().items()}}
    raw_loss, least = {PLAIN}
    source = "raw"
    base_model.load_state_dict(ema)
    ema_loss, ema_bpb = {PLAIN}
    if ema_bpb < least:
        least = ema_bpb
        source = "ema"
    if source == "raw":
        base_model.load_state_dict(raw)"""
BEST_OF_BOTH = """best_loss, best_bpb = val_loss, val_bpb
    other_loss, other_bpb = eval_val_sliding(args, base_model, device, val_tokens, args.eval_stride)
    if other_bpb < best_bpb:
        best_loss, best_bpb = other_loss, other_bpb
    val_loss, val_bpb = best_loss, best_bpb"""
ONLY_COMPARED = SLIDING + "\n    first, _ = " + PLAIN + "\n    print('better' if val_loss < 1.0 else 'worse', first)"


@pytest.mark.parametrize(
    ("setting", "status"),
    [
        ("TRAIN_FILES=fineweb_val_*.bin", Status.FAIL),
        ('TRAIN_FILES="data/fineweb10B_sp1024/fineweb_val_*.bin"', Status.FAIL),
        ("TRAIN_FILES=fineweb_train_*.bin VAL_FILES=fineweb_val_*.bin", Status.PASS),
        ("TRAIN_PATH=evaluation_free/train_*.bin", Status.PASS),
    ],
)
def test_a_setting_that_reads_validation_shards_as_training_shards(setting: str, status: Status, tmp_path) -> None:
    readme = f"# Byte model\n\nFineWeb byte260\n\n```bash\nNUM_LAYERS=11\n{setting}\n```\n"
    assert status_of(outcome(Folder(readme=readme), tmp_path), "data.training_files") is status


@pytest.mark.parametrize(("claim", "word"), [(1.2253, Word.AUTHOR), (1.1253, Word.FLAG)])
def test_a_claim_worse_than_the_logs_is_out_of_date(claim: float, word: Word, tmp_path) -> None:
    found = outcome(Folder(claims={"val_bpb": claim}), tmp_path)
    assert status_of(found, "scores.claims") is Status.FAIL
    assert found.verdict.word is word


@pytest.mark.parametrize(("asked", "status"), [("words", Status.PASS), ("y[:, None]", Status.FAIL)])
def test_counts_asked_about_every_word_are_a_distribution(asked: str, status: Status, tmp_path) -> None:
    source = script(functions=ALL_WORDS.replace("{asked}", asked), final_eval=COUNTED)
    assert status_of(outcome(Folder(source=source), tmp_path), "source.ngram_target_key") is status


def test_a_sum_of_losses_is_no_part_of_the_adaptation(tmp_path) -> None:
    call = "val_loss, val_bpb = eval_biased(args, base_model, device, val_tokens)"
    found = outcome(Folder(source=script(functions=BIASED, final_eval=call)), tmp_path)
    [legal] = [f for f in found.findings if f.check == "source.score_first_training"]
    assert [e.text.split()[0] for e in legal.evidence] == ["bias"]


@pytest.mark.parametrize(("place", "status"), [("before", Status.PASS), ("after", Status.FAIL)])
def test_a_class_attribute_set_before_anything_is_compiled(place: str, status: Status, tmp_path) -> None:
    source = script(class_flag="flag = False", class_read=" * (2 if GPT.flag else 1)")
    made = "    model = torch.compile("
    switch = "    GPT.flag = True\n"
    first, last = source.split(made)
    line, rest = last.split("\n", 1)
    compiled = f"{made}{line}\n"
    text = first + (switch + compiled if place == "before" else compiled + switch) + rest
    assert status_of(outcome(Folder(source=text), tmp_path), "source.compiled_switch") is status


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ({"before_quantize": AVERAGED_OR_NOT}, Status.UNKNOWN),
        ({"final_eval": BEST_OF_BOTH}, Status.UNKNOWN),
        ({"final_eval": ONLY_COMPARED}, Status.PASS),
    ],
    ids=["weights", "evaluations", "compared with a number"],
)
def test_evaluations_compared_one_after_the_other(pieces: dict[str, str], status: Status, tmp_path) -> None:
    found = outcome(Folder(source=script(**pieces)), tmp_path)
    assert status_of(found, "source.selection") is status
    assert found.verdict.word is (Word.HOLD if status is Status.UNKNOWN else Word.CLEAN)
