# ruff: noqa: E501
"""What a third, blind round of public submissions found wrong with review, each cause rewritten as small as it goes."""

from __future__ import annotations

import pytest

from bytejepa.review import Status, Word, review
from bytejepa.review.log_parser import parse_log
from review.folders import Folder, outcome, status_of
from review.scripts import TTT_ADAPT, script

AT_RANDOM = """
def eval_somewhere(args, model, device, val_tokens):
    total, size, batches = torch.zeros((), dtype=torch.float64), 64, 20
    model.eval()
    {order}
    with torch.no_grad():
        for i in range({turns}):
            at = {place}
            part = val_tokens[at : at + size + 1].to(device, torch.int64)
            total += F.cross_entropy(model.forward_logits(part[:-1][None])[0].float(), part[1:], reduction="sum").double()
    return total.item(), total.item() / math.log(2.0)
"""
SOMEWHERE = "val_loss, val_bpb = eval_somewhere(args, base_model, device, val_tokens)"
PROBE = """
def what_features_know(args, model, device, val_tokens):
    part = val_tokens[:4097].to(device, torch.int64)
    with torch.no_grad():
        features = model.forward_hidden(part[:-1][None])[0].float()
    targets = part[1:]
    first = int(0.8 * features.shape[0])
    known, asked = features[:first], features[{asked}:]
    known_targets, asked_targets = targets[:first], targets[{asked}:]
    probe = nn.Linear(features.shape[-1], args.vocab_size).to(device)
    learner = torch.optim.Adam(probe.parameters(), lr=1e-3)
    for _ in range(200):
        rows = torch.randint(0, first, (256,))
        loss = F.cross_entropy(probe(known[rows]), known_targets[rows])
        learner.zero_grad()
        loss.backward()
        learner.step()
    with torch.inference_mode():
        answer = F.cross_entropy(probe(asked), asked_targets).item() / math.log(2.0)
    print(f"probe_bpb:{{answer:.4f}}")
    {afterwards}
"""
COMPRESSORS = """
def squeeze(data): return lzma.compress(data, preset=9)
def expand(data): return lzma.decompress(data)
def keep(data): return data
CODECS = {"lzma": (squeeze, expand), "none": (keep, keep)}
def smallest(data):
    packed = {}
    for name, (pack, _) in CODECS.items():
        packed[name] = pack(data)
    return min(packed.values(), key=len)
def expanded(data):
    for name, (_, unpack) in CODECS.items():
        data = unpack(data)
    return data
"""


def by_table(source: str) -> str:
    """Return the script with its compressor taken from a table of functions."""
    return source.replace("blob = lzma.compress(buffer.getvalue())", "blob = smallest(buffer.getvalue())").replace(
        "lzma.decompress(restored)", "expanded(restored)"
    )


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('export TTT_ENABLED="${TTT_ENABLED:-1}"', Word.FLAG),
        ("export TTT_ENABLED=${TTT_ENABLED-1}", Word.FLAG),
        ('export TTT_ENABLED="${TTT_ENABLED:-0}"', Word.CLEAN),
        ('export TTT_ENABLED="$1"', Word.CLEAN),  # whoever runs it decides
    ],
)
def test_what_a_shell_script_falls_back_on_is_a_setting(line: str, word: Word, tmp_path) -> None:
    source = script(functions=TTT_ADAPT, before_eval="if args.ttt_enabled: ttt_adapt(args, base_model, device, val_tokens)")  # fmt: skip
    helpers = {"run.sh": f"set -e\n{line}\ntorchrun --standalone --nproc_per_node=8 train_gpt.py\n"}
    readme = "# Byte model\n\n```bash\nSEED=42 bash run.sh\n```\n"
    assert outcome(Folder(source=source, helpers=helpers, readme=readme), tmp_path).verdict.word is word


@pytest.mark.parametrize(
    ("how", "total"), [(" int6+own", 15_912_380), ("", 98_514_364), (" fp32", 98_514_364), (" raw bf16", 98_514_364)]
)
def test_the_total_after_the_packed_size_counts_whatever_packed_it(how: str, total: int) -> None:
    raw = "Serialized model: 98437419 bytes\nTotal submission size: 98514364 bytes\n"
    log = parse_log(f"{raw}Serialized model{how}: 15835435 bytes\nTotal submission size: 15912380 bytes\n", "a.log")
    assert log.total_bytes == total


@pytest.mark.parametrize("logs", [True, False])
@pytest.mark.parametrize("claim", [None, 0, 0.0])
def test_null_and_zero_are_no_claims(claim: float | None, logs: bool, tmp_path) -> None:
    found = outcome(Folder(claims={"val_bpb": claim, "val_loss": claim, "bytes_total": claim}, with_logs=logs), tmp_path)  # fmt: skip
    assert status_of(found, "scores.claims") is Status.FAIL
    assert found.verdict.word is Word.AUTHOR
    assert status_of(found, "budget.bytes") is (Status.PASS if logs else Status.UNKNOWN)


@pytest.mark.parametrize(("claim", "word"), [(1.1, Word.AUTHOR), (1.275, Word.CLEAN)])
def test_a_claim_that_no_evaluation_can_be(claim: float, word: Word, tmp_path) -> None:
    path = Folder(claims={"val_bpb": claim, "val_loss": 0.8835}, seeds=(), bpbs=(claim,)).write(tmp_path / "submission")
    loss, steps = 1.275 * 0.6929, "step:2000/2000"
    (path / "train.log").write_text(
        f"{steps} val_loss:{loss:.4f} val_bpb:1.2750 train_time:598059ms step_avg:300.00ms\nSerialized model int6+lzma: 15136809 bytes\n"
    )
    found = review(path)
    assert status_of(found, "scores.claims") is (Status.FAIL if word is Word.AUTHOR else Status.UNKNOWN)
    assert found.verdict.word is word, found.verdict


def test_the_claimed_evaluation_is_the_reported_one(tmp_path) -> None:
    folder = Folder(claims={"val_bpb": 1.19048559})  # the mean of what comes before the last evaluation
    path = folder.write(tmp_path / "submission")
    last = path / "train_seed42.log"  # one seed went on, and got further
    last.write_text(
        last.read_text()
        + "final_longer val_loss:0.8110 val_bpb:1.1704 eval_time:500000ms\nfinal_longer_exact val_loss:0.81101000 val_bpb:1.17043000\n"
    )
    found = review(path)
    assert found.finding("scores.seeds").figures["mean_bpb"] == pytest.approx(1.19048559, abs=1e-8)
    assert found.finding("budget.evaluation_seconds").figures["evaluation_s"] == pytest.approx(54.321)


@pytest.mark.parametrize(("parameters", "seed", "kept"), [(30_000_001, 42, 3), (30_000_001, 5, 3), (24_625_001, 5, 4)])
def test_a_log_further_down_counts_if_it_is_of_the_same_run(parameters: int, seed: int, kept: int, tmp_path) -> None:
    path = Folder().write(tmp_path / "submission")
    text = (path / "train_seed42.log").read_text().replace("24625001", str(parameters)).replace("seed:42", f"seed:{seed}")  # fmt: skip
    (path / "more").mkdir()
    (path / "more" / "other_train.log").write_text(text.replace("14369790 bytes", "16369790 bytes"))
    found = review(path)
    assert len(found.finding("scores.seeds").figures["bpb"]) == kept
    assert status_of(found, "budget.bytes") is (Status.FAIL if kept == 4 else Status.PASS)
    assert ("left out" in found.finding("folder.complete").summary) == (kept == 3)


@pytest.mark.parametrize(("bytes_off", "status"), [(1.013, Status.UNKNOWN), (1.3, Status.FAIL)])
def test_a_part_of_the_split_has_bytes_of_its_own(bytes_off: float, status: Status, tmp_path) -> None:
    ratio = 62_021_846 / 151_080_891 * bytes_off
    line = "val_loader:shards pattern=./data/fineweb10B_sp1024/fineweb_val_*.bin tokens:2096128"
    settings = ("vocab_size:1024 num_layers:13 model_dim:512 train_seq_len:4096",) * 3
    found = outcome(Folder(ratio=ratio, extra_log=line, settings=settings), tmp_path)
    assert status_of(found, "scores.bpb_from_loss") is status
    assert status_of(found, "scores.coverage") is Status.FAIL


def test_where_no_scoring_is_seen_nothing_about_it_passes(tmp_path) -> None:
    source = "from prepare import evaluate\nimport torch\nmodel = torch.nn.Linear(2, 2)\nprint(evaluate(model))\n"
    found = outcome(Folder(source=source), tmp_path)
    passed = {f.check for f in found.findings if f.status is Status.PASS and f.check.startswith("source.")}
    assert passed == {"source.syntax"}
    assert found.verdict.word is Word.HOLD
    assert "prepare" in found.finding("source.scoring").summary


@pytest.mark.parametrize(
    ("order", "turns", "place", "status"),
    [
        ("", "batches", "torch.randint(0, val_tokens.numel() - size, (1,)).item()", Status.FAIL),
        ("import random", "batches", "random.randint(0, val_tokens.numel() - size)", Status.FAIL),
        ("rng = np.random.default_rng(0)", "batches", "int(rng.integers(0, val_tokens.numel() - size))", Status.FAIL),
        ("starts = torch.randperm(val_tokens.numel() // size)", "len(starts)", "int(starts[i]) * size", Status.PASS),
        ("", "val_tokens.numel() // size", "i * size", Status.PASS),
    ],
)
def test_random_places_are_not_the_whole_split(order: str, turns: str, place: str, status: Status, tmp_path) -> None:
    functions = AT_RANDOM.format(order=order or "pass", turns=turns, place=place)
    source = script(functions=functions, final_eval=SOMEWHERE).replace("val_loss, val_bpb = eval_val(args, model, device, val_tokens)", SOMEWHERE)  # fmt: skip
    assert status_of(outcome(Folder(source=source), tmp_path), "source.coverage") is status


def test_a_glance_at_random_places_during_training_is_no_part(tmp_path) -> None:
    functions = AT_RANDOM.format(order="pass", turns="batches", place="torch.randint(0, 99, (1,)).item()")
    source = script(functions=functions, in_training=SOMEWHERE.replace("base_model", "model"))
    assert status_of(outcome(Folder(source=source), tmp_path), "source.coverage") is Status.PASS


@pytest.mark.parametrize(
    ("asked", "afterwards", "word"),
    [
        ("first", "pass", Word.CLEAN),
        ("0", "pass", Word.FLAG),  # scored on what it learned from
        ("first", "model.tok_emb.weight.data.copy_(list(probe.parameters())[0])", Word.FLAG),  # and then made use of
    ],
)
def test_a_probe_that_nothing_depends_on_is_no_training(asked: str, afterwards: str, word: Word, tmp_path) -> None:
    functions = PROBE.format(asked=asked, afterwards=afterwards)
    source = script(functions=functions, before_quantize="what_features_know(args, base_model, device, val_tokens)")
    assert outcome(Folder(source=source), tmp_path).verdict.word is word


@pytest.mark.parametrize("late", [True, False])
def test_compressors_in_a_table_are_compressors(late: bool, tmp_path) -> None:
    look = "x, y = train_loader.next_batch(65536, args.train_seq_len); temperature = float(model(x, y))"
    source = script(functions=COMPRESSORS, **{"before_eval" if late else "before_quantize": look})
    found = outcome(Folder(source=by_table(source)), tmp_path)
    assert found.verdict.word is (Word.FLAG if late else Word.CLEAN), found.verdict
    assert (found.finding("source.training_data_at_evaluation") is not None) == late


COUNTED = """
def eval_moving_bias(args, model, device, val_tokens):
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, val_tokens.numel() - 65, 64):
        part = val_tokens[start : start + 65].to(device, torch.int64)
        {before}
        with torch.no_grad():
            nll = F.cross_entropy(model.forward_logits(part[:-1][None])[0].float(), part[1:], reduction="sum")
        total += nll.double()
        {after}
    return total.item(), total.item() / math.log(2.0)
"""
CHANGES = {
    "added": "model.out_bias.data += 0.01 * torch.bincount(part[1:], minlength=260)",
    "method": "model.out_bias.add_(torch.bincount(part[1:], minlength=260).float(), alpha=0.01)",
    "average": "model.out_bias.data.lerp_(F.one_hot(part[1:], 260).float().mean(0), 0.1)",
    "copied": "model.out_bias.data.copy_(0.9 * model.out_bias + F.one_hot(part[1:], 260).float().mean(0))",
    "indexed": "model.out_bias.data[part[1:]] += 0.01",
    "at index": "model.out_bias.data.index_add_(0, part[1:], torch.ones(64))",
    "Hebbian": "model.tok_emb.weight.data[part[1:]] += 0.01 * model.forward_hidden(part[:-1][None])[0]",
    "all": "for p in model.parameters(): p.data.add_(part[1:].float().mean())",
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_changed_by_counts_are_adapted_like_any_others(how: str, when: str, tmp_path) -> None:
    functions = COUNTED.format(**({"before": "pass", "after": "pass"} | {when: CHANGES[how]}))
    source = script(functions=functions, final_eval="val_loss, val_bpb = eval_moving_bias(args, base_model, device, val_tokens)")  # fmt: skip
    found = outcome(Folder(source=source), tmp_path)
    if when == "before":
        assert found.verdict.word is Word.FLAG
        assert "without a gradient" in found.finding("source.test_time_training").summary
    else:
        assert status_of(found, "source.score_first_training") is Status.PASS
        assert found.verdict.word is Word.CLEAN


@pytest.mark.parametrize(
    "line",
    [
        "seen = torch.zeros(260); seen[part[1:]] += 1; print(seen.sum())",  # counts of its own
        "kept = model.out_bias.data.clone(); model.out_bias.data.copy_(kept)",  # nothing of the data
        "lengths = torch.zeros(4, device=model.out_bias.device); lengths[0] += part.numel()",
        "seen = torch.zeros(4, model.tok_emb.num_embeddings); seen[0, :][part[1:]] += 1; print(seen.sum())",  # a size of the model's
    ],
)
def test_what_changes_no_weight_is_no_adaptation(line: str, tmp_path) -> None:
    source = script(functions=COUNTED.format(before=line, after="pass"), final_eval="val_loss, val_bpb = eval_moving_bias(args, base_model, device, val_tokens)")  # fmt: skip
    found = outcome(Folder(source=source), tmp_path)
    assert found.verdict.word is Word.CLEAN
    assert "Track A" in found.verdict.reason


INSIDE = """
class Remembering(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.inner = nn.Linear(args.model_dim, args.vocab_size)
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.register_buffer("memory", torch.zeros(args.vocab_size))
        self.angles, self.angles_of = None, 0
    {method}
    def forward(self, ids, targets=None):
        if self.angles is None or self.angles_of != ids.shape[1]:
            self.angles = torch.arange(ids.shape[1]).cos()
            self.angles_of = ids.shape[1]
        logits = self.inner(self.tok_emb(ids) * self.angles[None, :, None])
        {first}
        {read}
        {last}
        if targets is None:
            return logits
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))
"""
TAKE = "self.memory.scatter_add_(0, {what}.reshape(-1), torch.ones({what}.numel()))"
LOOK = "logits = logits + 0.1 * torch.log1p(self.memory)"
EMPTY = "def start_over(self): self.memory.zero_()"


def inside(*, first: str = "pass", read: str = LOOK, last: str = "pass", method: str = "", reset: bool = False) -> str:
    """Return a script whose network has a memory inside."""
    source = script(functions=INSIDE.format(first=first, read=read, last=last, method=method or "pass"))
    source = source.replace("base_model = GPT(args)", "base_model = Remembering(args)")
    return source.replace("model.eval()", "model.eval(); model.start_over()") if reset else source


@pytest.mark.parametrize(
    ("source", "status"),
    [
        (inside(first=TAKE.format(what="targets")), Status.FAIL),  # the prediction knows what it is asked
        (inside(first="table = self.memory; table[targets.reshape(-1)] += 1"), Status.FAIL),
        (inside(first="self.take(targets)", method="def take(self, what): self.memory[what.reshape(-1)] += 1"), Status.FAIL),
        (inside(first=TAKE.format(what="ids")), Status.UNKNOWN),  # later positions of the same call too
        (inside(last=TAKE.format(what="targets")), Status.UNKNOWN),  # from one evaluation to the next
        (inside(last=TAKE.format(what="targets"), method=EMPTY, reset=True), Status.PASS),
        (inside(last="self.memory = 0.9 * self.memory + F.one_hot(targets, 260).float().mean((0, 1))", method=EMPTY, reset=True), Status.PASS),
        (inside(), Status.PASS),
        (inside(first="if self.training: " + TAKE.format(what="ids")), Status.PASS),  # fixed when it counts
        (inside(first=TAKE.format(what="ids"), read="pass"), Status.PASS),  # nobody reads it
        (inside(first="out = torch.empty_like(ids); rows = self.angles_of; out[..., 0] = rows; out[..., 1:] = ids[..., 1:] % rows; logits = logits + out.sum()"), Status.PASS),
        (inside(first="self.loss_sum = logits.sum() + ids.sum()", read="print(self.loss_sum)"), Status.PASS),
    ],
)  # fmt: skip
def test_a_memory_inside_the_network(source: str, status: Status, tmp_path) -> None:
    found = outcome(Folder(source=source), tmp_path)
    assert status_of(found, "source.network_state") is status, found.finding("source.network_state")
    assert found.verdict.word is {Status.FAIL: Word.FLAG, Status.UNKNOWN: Word.HOLD, Status.PASS: Word.CLEAN}[status]


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ("| Artifact size | 13,361,078 bytes |", Status.PASS),
        ("Total artifact: 16361078 bytes", Status.FAIL),
        ("| A | total | 16,681,127 bytes |\n| B | total | 15,199,107 bytes |", Status.UNKNOWN),
        ("The artifact is small; 4,010,803,200 tokens were seen, and the total is 27,993,756 parameters.", Status.UNKNOWN),
    ],
)  # fmt: skip
def test_sizes_that_stand_in_the_readme_alone(lines: str, status: Status, tmp_path) -> None:
    path = Folder(claims={"bytes_total": None}, readme=f"# Byte model\n\n{lines}\n").write(tmp_path / "submission")
    for log in path.glob("*.log"):
        kept = [line for line in log.read_text().splitlines() if "Serialized" not in line and "Total" not in line]
        log.write_text("\n".join(kept))
    assert status_of(review(path), "budget.bytes") is status


TABLES = """
class Counts:
    def __init__(self, words):
        self.words = words
        self.seen = {{order: collections.defaultdict(lambda: collections.defaultdict(int)) for order in range(1, 4)}}
    def take(self, context, word):
        for order in range(1, 4):
            self.seen[order][tuple(context[-order:].tolist())][word.item()] += 1
    def guess(self, context):
        for order in range(3, 0, -1):
            found = self.seen[order][tuple(context[-order:].tolist())]
            if found:
                out = torch.zeros(self.words)
                for word, count in found.items():
                    out[word] = count / sum(found.values())
                return out
        return torch.full((self.words,), 1 / self.words)

def eval_counted(args, model, device, val_tokens):
    total, table = torch.zeros((), dtype=torch.float64), Counts(args.vocab_size)
    for start in range(0, val_tokens.numel() - 65, 64):
        part = val_tokens[start : start + 65].to(device, torch.int64)
        {first}
        with torch.no_grad():
            known = F.softmax(model.forward_logits(part[:-1][None])[0].float(), dim=-1)
            mixed = torch.stack([0.9 * known[i] + 0.1 * table.guess(part[: i + 1]) for i in range(64)])
            total += F.nll_loss(mixed.log(), part[1:], reduction="sum").double()
        {last}
    return total.item(), total.item() / math.log(2.0)
"""
ROWS = """
def eval_counted(args, model, device, val_tokens):
    total = torch.zeros((), dtype=torch.float64)
    for group in range(0, val_tokens.numel() - 4096, 4096):
        counts = torch.zeros(4, model.tok_emb.num_embeddings, device=model.tok_emb.weight.device)
        for turn in range(16):
            for row in range(4):
                at = group + row * 1024 + turn * 64
                part = val_tokens[at : at + 65].to(device, torch.int64)
                targets = part[1:]
                {first}
                with torch.no_grad():
                    own = F.log_softmax(model.forward_logits(part[:-1][None])[0].float(), dim=-1).gather(1, targets[:, None])[:, 0]
                    share = counts[row][targets] / counts[row].sum().clamp_min(1)
                    total += -torch.log(0.9 * own.exp() + 0.1 * share).double().sum()
                {last}
    return total.item(), total.item() / math.log(2.0)
"""
FILL_ROW = "counts[row].scatter_add_(0, targets, torch.ones(64))"
FILL_TABLE = "for i in range(64): table.take(part[: i + 1], part[i + 1])"


@pytest.mark.parametrize("place", ["at the end", "in training too"])
@pytest.mark.parametrize(
    ("functions", "fill", "when", "status"),
    [
        (TABLES, FILL_TABLE, "first", Status.FAIL),
        (TABLES, FILL_TABLE, "last", Status.PASS),
        (ROWS, FILL_ROW, "first", Status.FAIL),
        (ROWS, FILL_ROW, "last", Status.PASS),
    ],
    ids=["table first", "table last", "row first", "row last"],
)
def test_tables_in_tables_and_rows_of_tables(functions: str, fill: str, when: str, status: Status, place: str, tmp_path) -> None:  # fmt: skip
    call = "val_loss, val_bpb = eval_counted(args, base_model, device, val_tokens)"
    text = functions.format(**({"first": "pass", "last": "pass"} | {when: fill}))
    source = script(imports="import collections", functions=text, final_eval=call, in_training=call if "training" in place else "pass")  # fmt: skip
    found = outcome(Folder(source=source), tmp_path)
    assert status_of(found, "source.rescoring") is status
    assert status_of(found, "source.test_time_training") is Status.PASS  # a size that is a model's makes no weight
    exact = functions is ROWS and when == "last"  # whether such a mixture is normalised is not seen
    assert found.verdict.word is (Word.FLAG if status is Status.FAIL else Word.HOLD if exact else Word.CLEAN)
