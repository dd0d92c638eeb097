# ruff: noqa: E501
"""Shapes that review once missed or misjudged on public scripts, and findings that are notes, in every disguise."""

from __future__ import annotations

import ast

import pytest

from bytejepa.review import Status, Word, review
from bytejepa.review.surroundings import repeated_targets
from review.folders import Folder, status_of
from review.scripts import NGRAM, SLIDING, TTT_ADAPT, script, wrap

REBUILT = """
def read_back(args, blob, device):
    fresh = GPT(args).to(device)
    weights = torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu")
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.copy_(weights[name])
    return fresh
"""
USE_REBUILT = "base_model = read_back(args, restored, device)\n    " + SLIDING
PREFILLED = """
class Counts:
    def __init__(self, rows):
        self.rows = rows
        self.seen = torch.zeros(rows, dtype=torch.int32)
    def key(self, before, after):
        return torch.bitwise_xor(before * 40503, after * 69069) % self.rows
    def learn(self, ids):
        self.seen.scatter_add_(0, self.key(ids[:-1], ids[1:]), torch.ones(ids.numel() - 1, dtype=torch.int32))
    def chance(self, x, y):
        return self.seen[self.key(x, y).reshape(-1)].float().reshape(x.shape)

def eval_counts(args, model, device, val_tokens, counts):
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, val_tokens.numel() - 65, 64):
            window = val_tokens[start : start + 65].to(torch.int64)
            x, y = window[:-1][None], window[1:][None]
            p = torch.exp(-F.cross_entropy(model.forward_logits(x)[0].float(), y[0], reduction="none"))
            mixed = 0.9 * p + 0.1 * counts.chance(x, y)[0] / 1000
            total += -mixed.log().double().sum()
    return total.item(), total.item() / math.log(2.0)
"""
USE_PREFILLED = """counts = Counts(1 << 20)
    for file in sorted(glob.glob(args.train_files)):
        counts.learn(load_data_shard(file).to(torch.int64))
    val_loss, val_bpb = eval_counts(args, base_model, device, val_tokens, counts)"""
CARRIED_BIAS = """
def eval_with_bias(args, model, device, val_tokens, stride):
    context = args.train_seq_len - stride
    carried = torch.zeros(args.vocab_size)
    loss_sum, count = torch.zeros((), dtype=torch.float64), 0
    for ws in range(0, val_tokens.numel() - 1 - context, stride):
        ids = val_tokens[ws : ws + args.train_seq_len + 1].to(torch.int64)
        x, y = ids[:-1], ids[1:]
        with torch.no_grad():
            logits = model.forward_logits(x[None])[0].float()
        s = 0 if ws == 0 else context
        if s > 0:
            offset = carried.clone().requires_grad_(True)
            optimizer = torch.optim.SGD([offset], lr=0.05)
            known = logits[:{until}].detach()
            for _ in range(5):
                optimizer.zero_grad()
                F.cross_entropy(known + offset, y[:{until}]).backward()
                optimizer.step()
            carried = offset.detach().clamp_(-3, 3)
        loss_sum += F.cross_entropy(logits[s:] + carried, y[s:], reduction="sum").double()
        count += y.numel() - s
    return loss_sum.item() / count, loss_sum.item() / count / math.log(2.0)
"""
USE_BIAS = "val_loss, val_bpb = eval_with_bias(args, base_model, device, val_tokens, args.eval_stride)"
SHIPPED = """
def known_ids(path):
    with open(path, "rb") as file:
        packed = file.read()
    return torch.from_numpy(np.frombuffer(lzma.decompress(packed), dtype="<u2").astype(np.int64))

def eval_with_known(args, model, device, val_tokens, known):
    loss_sum = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, val_tokens.numel() - 65, 64):
            x, y = val_tokens[start : start + 64], val_tokens[start + 1 : start + 65]
            nll = F.cross_entropy(model.forward_logits(x[None])[0].float(), y, reduction="none")
            right = known[start : start + 64] == y
            {strike}
            loss_sum += nll.double().sum()
    return loss_sum.item(), loss_sum.item() / math.log(2.0)
"""
USE_SHIPPED = "val_loss, val_bpb = eval_with_known(args, base_model, device, val_tokens, known_ids('prefix.xz'))"


def outcome(source: str, tmp_path, **more):
    return review(Folder(source=source, **more).write(tmp_path / "submission"))


def test_training_reaches_a_rebuilt_model_through_the_packed_file(tmp_path) -> None:
    call = "ttt_adapt(args, base_model, device, val_tokens)"
    found = outcome(script(functions=TTT_ADAPT + REBUILT, before_quantize=call, final_eval=USE_REBUILT).replace("eval_val(args, model, device, val_tokens)\n    print(f\"final", "(0.0, 0.0)\n    print(f\"final"), tmp_path)  # fmt: skip
    assert found.verdict.word is Word.FLAG
    assert status_of(found, "source.pre_quant_training") is Status.FAIL


def test_a_rebuilt_model_alone_is_clean(tmp_path) -> None:
    found = outcome(script(functions=REBUILT, final_eval=USE_REBUILT), tmp_path)
    assert found.verdict.word is Word.CLEAN, found.verdict


@pytest.mark.parametrize(
    "read", ["os.environ.get('WORLD_SIZE', '1')", "os.getenv('WORLD_SIZE', 1)", "os.environ['WORLD_SIZE']"]
)
def test_what_torchrun_sets_is_not_what_the_script_falls_back_on(read: str, tmp_path) -> None:
    use = f"if int({read}) > 1:\n        val_loss, val_bpb = eval_val_ngram(args, base_model, device, val_tokens, args.eval_stride)\n    else:\n        {SLIDING}"
    found = outcome(script(functions=NGRAM, final_eval=use), tmp_path)
    assert found.verdict.word is Word.FLAG
    assert status_of(found, "source.ngram_target_key") is Status.FAIL


def test_a_table_of_training_counts_keyed_by_the_target_is_flagged(tmp_path) -> None:
    found = outcome(script(functions=PREFILLED, final_eval=USE_PREFILLED), tmp_path)
    assert status_of(found, "source.ngram_target_key") is Status.FAIL
    assert found.verdict.word is Word.FLAG


@pytest.mark.parametrize(("until", "word"), [("s", Word.HOLD), ("s + stride", Word.FLAG)])
def test_a_bias_carried_from_window_to_window(until: str, word: Word, tmp_path) -> None:
    found = outcome(script(functions=CARRIED_BIAS.replace("{until}", until), final_eval=USE_BIAS), tmp_path)
    assert found.verdict.word is word, found.verdict


@pytest.mark.parametrize(
    "strike",
    [
        "nll *= (~right).float()",
        "nll = nll * (right != True)",
        "nll = torch.where(right, torch.zeros_like(nll), nll)",
        "nll[right] = 0.0",
    ],
)
def test_validation_ids_in_the_artifact_are_flagged(strike: str, tmp_path) -> None:
    found = outcome(script(functions=SHIPPED.replace("{strike}", strike), final_eval=USE_SHIPPED), tmp_path)
    assert status_of(found, "source.shipped_targets") is Status.FAIL
    assert found.verdict.word is Word.FLAG


def test_an_accuracy_beside_the_loss_is_no_shipped_target(tmp_path) -> None:
    body = SHIPPED.replace("known[start : start + 64] == y", "model.forward_logits(x[None])[0].argmax(-1) == y")
    found = outcome(script(functions=body.replace("{strike}", "hits = right.float().mean()"), final_eval=USE_SHIPPED.replace(", known_ids('prefix.xz')", ", None")), tmp_path)  # fmt: skip
    assert found.verdict.word is Word.CLEAN, found.verdict


FALLBACK = "try:\n    import zstandard as codec\n    WAY = 'zstd'\nexcept ImportError:\n    import zlib as codec\n    WAY = 'zlib'\n"
PACK = "codec.ZstdCompressor(level=22).compress(buffer.getvalue()) if WAY == 'zstd' else codec.compress(buffer.getvalue(), 9)"
SWITCH = {"class_flag": "qat = False", "class_read": " * (0.5 if GPT.qat else 1.0)"}
NOTED = {
    "compressor_fallback": script(imports=FALLBACK, compress=PACK),
    "compiled_switch": script(**SWITCH, in_training="GPT.qat = step > 50"),
    "outside_access": script(before_eval="import urllib.request as u; u.urlopen('http://example.org/table')"),
}
ALIASED = {
    "compressor_fallback": script(imports=FALLBACK.replace("import zstandard as codec", "import zstandard; codec = zstandard").replace("ImportError", "Exception"), compress=PACK),
    "compiled_switch": script(**SWITCH, in_training="kind = GPT; setattr(kind, 'qat', step > 50)"),
    "outside_access": script(imports="from urllib.request import urlopen as look", before_eval="look('http://example.org/table')"),
}  # fmt: skip
DEAD = {
    "compressor_fallback": script(imports="if False:\n" + "".join(f"    {line}\n" for line in FALLBACK.splitlines())),
    "compiled_switch": script(**SWITCH, in_training="if os.environ.get('QAT', '0') == '1': GPT.qat = True"),
    "outside_access": script(before_eval="if args.seed < 0:\n        import urllib.request as u; u.urlopen('http://example.org')"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTED)
@pytest.mark.parametrize("form", ["plain", "wrapped", "aliased"])
def test_notes_are_found_in_every_disguise(name: str, form: str, tmp_path) -> None:
    source = ALIASED[name] if form == "aliased" else NOTED[name]
    found = outcome(wrap(source) if form == "wrapped" else source, tmp_path, compressor="zstd")
    assert status_of(found, f"source.{name}") is Status.FAIL
    assert (found.verdict.word is Word.FLAG) == (name == "outside_access")


@pytest.mark.parametrize("name", DEAD)
def test_notes_are_not_made_of_dead_code(name: str, tmp_path) -> None:
    found = outcome(DEAD[name], tmp_path)
    assert status_of(found, f"source.{name}") is Status.PASS
    assert found.verdict.word is Word.CLEAN


def test_cutting_an_array_into_parts_is_no_plan_of_windows() -> None:
    starts, parts = "[s for s in range(0, n, step)]", "[a[s : s + step] for s in range(0, n, step)]"
    plans = [ast.parse(text, mode="eval").body for text in (starts, parts)]
    assert [repeated_targets(plan) for plan in plans][1] is None
    assert (repeated_targets(plans[0]) or 0) > 0
