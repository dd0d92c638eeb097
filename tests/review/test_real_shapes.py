# ruff: noqa: E501
"""Shapes of complete public submissions that review missed or misjudged at first, each rewritten as small as it goes."""

from __future__ import annotations

import math

import pytest

from bytejepa.review import Status, Word, review
from bytejepa.review.log_parser import parse_log
from review.folders import Folder, outcome, status_of
from review.scripts import SLIDING, SLOT, script

COUNTED_BEFORE = """
class Memory:
    def __init__(self, rows):
        self.rows = rows
        self.small = [np.zeros(rows, dtype=np.int32) for _ in range(2)]
        self.large = [np.zeros(rows, dtype=np.int32) for _ in range(2)]
    def keys(self, ids, start, end, which):
        first = max(start, which + 1)
        if end <= first:
            return None, None, first
        key = np.zeros(end - first, dtype=np.int64)
        for k in range(which + 1):
            key ^= ids[first - 1 - k : end - 1 - k].astype(np.int64) * (36313 + 2 * k)
        whole = key ^ (ids[first:end].astype(np.int64) * 51647)
        return key % self.rows, whole % self.rows, first
    def raise_counts(self, table, keys):
        table += np.bincount(keys.astype(np.intp), minlength=self.rows)[: self.rows].astype(table.dtype)
    def read(self, ids):
        for which in range(2):
            key, whole, _ = self.keys(ids, 0, len(ids), which)
            if key is None:
                continue
            self.raise_counts(self.small[which], key)
            self.raise_counts(self.large[which], whole)
    def chances(self, ids):
        p = np.zeros(len(ids), dtype=np.float32)
        for which in (1, 0):
            key, whole, first = self.keys(ids, 0, len(ids), which)
            if key is None:
                continue
            p[first:] = np.minimum(self.large[which][whole], self.small[which][key]) / np.maximum(self.small[which][key], 1)
        return p

def store_pass(args, model, device, val_tokens):
    kept = []
    with torch.no_grad():
        for start in range(0, val_tokens.numel() - 65, 64):
            window = val_tokens[start : start + 65].to(torch.int64)
            nll = F.cross_entropy(model.forward_logits(window[:-1][None])[0].float(), window[1:], reduction="none")
            kept.append(torch.exp(-nll).numpy())
    return np.concatenate(kept)

def eval_two_passes(args, model, device, val_tokens):
    p = store_pass(args, model, device, val_tokens)
    ids = val_tokens.numpy().astype(np.int16)
    memory = Memory(1 << 16)
    memory.read(ids)
    mixed = 0.5 * p + 0.5 * memory.chances(ids)[1 : len(p) + 1]
    nll = -np.log(np.maximum(mixed, 1e-10))
    return float(nll.mean()), float(nll.mean()) / math.log(2.0)
"""
USE_COUNTED = "val_loss, val_bpb = eval_two_passes(args, base_model, device, val_tokens)"

PACKED_PREFIX = """
def eval_with_prefix(args, model, device, val_tokens, prefix):
    loss_sum = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, val_tokens.numel() - 65, 64):
            x, y = val_tokens[start : start + 64], val_tokens[start + 1 : start + 65]
            nll = F.cross_entropy(model.forward_logits(x[None])[0].float(), y, reduction="none")
            if prefix is not None and start + 64 < prefix.numel():
                known = prefix[start + 1 : start + 65] == y
                nll = nll * (~known).float()
            loss_sum += nll.double().sum()
    return loss_sum.item(), loss_sum.item() / math.log(2.0)
"""
PACK_PREFIX = """ids = val_tokens[:4096].numpy().astype(np.uint16)
    packed_prefix = lzma.compress(ids.tobytes())"""
USE_PACKED_PREFIX = """prefix = torch.from_numpy(np.frombuffer(lzma.decompress(packed_prefix), dtype=np.uint16).astype(np.int64))
    val_loss, val_bpb = eval_with_prefix(args, base_model, device, val_tokens, prefix)"""

CONTEXT_OFFSET = """
def eval_context_offset(args, model, device, val_tokens, stride):
    length, total = args.train_seq_len, 0.0
    weight = model.tok_emb.weight.detach().float()
    for ws in range(0, val_tokens.numel() - 1 - length, stride):
        chunk = val_tokens[ws : ws + length + 1].to(torch.int64)
        x, y = chunk[:-1][None], chunk[1:][None]
        with torch.no_grad():
            hidden = model.forward_hidden(x).float()
        s = 0 if ws == 0 else length - stride
        context_end = s
        offset = torch.zeros(1, 1, hidden.size(-1), requires_grad=True)
        optimizer = torch.optim.AdamW([offset], lr=0.01)
        if context_end > 1:
            for _ in range(4):
                optimizer.zero_grad()
                logits = F.linear(hidden[:, :{until}] + offset, weight)
                F.cross_entropy(logits[0], y[0, :{until}]).backward()
                optimizer.step()
        with torch.no_grad():
            nll = F.cross_entropy(F.linear(hidden + offset, weight)[0], y[0], reduction="none")
            total += nll[s:].double().sum().item()
    return total, total / math.log(2.0)
"""
USE_OFFSET = "val_loss, val_bpb = eval_context_offset(args, base_model, device, val_tokens, args.eval_stride)"

LINKED = """
for f in data/byte260/fineweb_val_*.bin; do
  ln -s "$PWD/$f" "data/mixed/$(basename ${f/val/train})"
done
torchrun --standalone --nproc_per_node=8 train_gpt.py
"""
RENAMED = "cp data/fineweb_val_000000.bin \\\n   data/again/fineweb_train_000000.bin\ntorchrun --nproc_per_node=8 train_gpt.py\n"
TRAINED_ON_TRAINING = """
for f in data/byte260/*_train_*.bin; do ln -s "$f" data/here/; done
for f in data/byte260/*_val_*.bin; do ln -s "$f" data/here/; done
torchrun --standalone --nproc_per_node=8 train_gpt.py
"""


def test_counts_of_the_whole_split_taken_before_the_second_pass_are_flagged(tmp_path) -> None:
    found = outcome(Folder(source=script(functions=COUNTED_BEFORE, final_eval=USE_COUNTED)), tmp_path)
    assert status_of(found, "source.rescoring") is Status.FAIL
    assert found.verdict.word is Word.FLAG


def test_a_prefix_packed_from_the_validation_ids_themselves_is_flagged(tmp_path) -> None:
    source = script(functions=PACKED_PREFIX, before_quantize=PACK_PREFIX, final_eval=USE_PACKED_PREFIX)
    found = outcome(Folder(source=source), tmp_path)
    assert status_of(found, "source.shipped_targets") is Status.FAIL
    assert found.finding("source.training_data_at_evaluation") is None


@pytest.mark.parametrize(("until", "word"), [("context_end", Word.HOLD), ("context_end + stride", Word.FLAG)])
def test_an_offset_learned_up_to_another_name_for_the_border(until: str, word: Word, tmp_path) -> None:
    source = script(functions=CONTEXT_OFFSET.replace("{until}", until), final_eval=USE_OFFSET)
    assert outcome(Folder(source=source), tmp_path).verdict.word is word


def test_a_plain_evaluation_beside_a_context_offset_is_none_of_its_scores(tmp_path) -> None:
    source = script(functions=SLOT.replace("{mask}", ":s"), final_eval="val_loss, val_bpb = eval_val_slot(args, base_model, device, val_tokens, args.eval_stride)\n    " + SLIDING)  # fmt: skip
    assert outcome(Folder(source=source), tmp_path).verdict.word is Word.HOLD


@pytest.mark.parametrize("commands", [LINKED, RENAMED])
@pytest.mark.parametrize("place", ["shell", "readme"])
def test_validation_shards_under_the_name_of_training_shards_are_flagged(commands: str, place: str, tmp_path) -> None:
    helpers = {"run.sh": commands} if place == "shell" else {}
    readme = f"# Byte model\n\nFineWeb byte260\n\n```bash\n{commands}```\n" if place == "readme" else "default"
    found = outcome(Folder(helpers=helpers, readme=readme), tmp_path)
    assert status_of(found, "data.training_files") is Status.FAIL
    assert found.verdict.word is Word.FLAG


def test_shards_linked_under_their_own_names_are_clean(tmp_path) -> None:
    found = outcome(Folder(helpers={"run.sh": TRAINED_ON_TRAINING}), tmp_path)
    assert found.verdict.word is Word.CLEAN, found.verdict


CASED = 47_853_343
"""Tokens of the validation split under another tokenizer of 8,192 symbols."""


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "ratio", "word"),
    [
        (8192, CASED, CASED / 151_080_891, Word.CLEAN),  # more tokens for the same bytes
        (8192, CASED, CASED / 164_594_398, Word.FLAG),  # divided by too many bytes
        (1024, 63_779_840, 0.41032, Word.CLEAN),  # the data in an earlier export: same tokenizer, other documents
        (1024, 63_779_840, 0.38, Word.FLAG),
    ],
)
def test_symbols_per_byte_follow_from_the_tokens_that_the_log_counts(vocabulary: int, tokens: int, ratio: float, word: Word, tmp_path) -> None:  # fmt: skip
    settings = (f"vocab_size:{vocabulary} num_layers:13 model_dim:512",) * 3
    extra = f"val_loader:shards pattern=./data/fineweb_val_*.bin tokens:{tokens}"
    found = outcome(Folder(settings=settings, ratio=ratio, extra_log=extra), tmp_path)
    assert found.verdict.word is word, found.verdict


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        ("target_bytes: 15900000", Status.UNKNOWN),  # the artifact's aim, not what was scored
        ("prefix val_bytes:1000000\nval_bytes:151080891", Status.PASS),  # a part beside the whole
        ("val_loader: tokens:75000000", Status.FAIL),
        ("eval_bytes:75000000", Status.FAIL),
    ],
)
def test_only_what_was_scored_counts_as_coverage(extra: str, status: Status, tmp_path) -> None:
    assert status_of(outcome(Folder(extra_log=extra), tmp_path), "scores.coverage") is status


@pytest.mark.parametrize("form", [dict, list])
def test_the_largest_artifact_of_the_claimed_seeds_counts(form: type, tmp_path) -> None:
    seeds = {
        "42": {"val_bpb": 1.1903, "artifact_bytes": 15_900_000},
        "7": {"val_bpb": 1.191, "artifact_bytes": 16_100_000},
    }
    results = seeds if form is dict else list(seeds.values())
    found = outcome(Folder(claims={"seed_results": results}), tmp_path)
    assert status_of(found, "budget.bytes") is Status.FAIL
    assert "16,100,000" in found.finding("budget.bytes").summary


def test_the_sum_of_all_evaluation_phases_is_held_to_the_budget(tmp_path) -> None:
    for name, line, status in (
        ("a", "total_eval_time:455.2s", Status.PASS),
        ("b", "TOTAL_EVAL_TIME: 712.3s", Status.FAIL),
    ):
        found = review(Folder(extra_log=line).write(tmp_path / name))
        assert status_of(found, "budget.evaluation_seconds") is status


def test_a_text_file_with_scores_is_a_log_whatever_its_name(tmp_path) -> None:
    path = Folder().write(tmp_path / "submission")
    for log in sorted(path.glob("*.log")):
        log.rename(path / f"{log.stem.removeprefix('train_')}.txt")
    (path / "requirements.txt").write_text("torch\n")
    (path / "notes.txt").write_text("we saw a val_bpb of about one\n")
    found = review(path)
    assert found.facts["num_seeds"] == 3
    assert found.verdict.word is Word.CLEAN


def test_steps_at_the_beginning_of_a_line() -> None:
    log = parse_log("4000/20000 train_loss: 2.9 train_time: 8.6m tok/s: 6110000\n4568/20000 val_loss: 2.8102 val_bpb: 1.0879\n", "s_42.log")  # fmt: skip
    assert (log.steps, log.planned_steps) == (4568, 20000)
    assert log.train_s == pytest.approx(516)
    assert log.scores[0].bpb == pytest.approx(1.0879)
    assert not math.isnan(log.scores[0].loss_nats)
