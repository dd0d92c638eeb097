# ruff: noqa: E501
"""Every verdict on submissions written for this: clean ones, each violation, hidden ones, dead ones, broken ones."""

from __future__ import annotations

import pytest

from bytejepa.review import Status, Word, review
from review.folders import Folder, outcome
from review.scripts import HESSIANS, LEGAL_TTT, NGRAM, SLIDING, SLOT, TAIL_WINDOWS, TTT_ADAPT, TWO_PASS, script, wrap

ADAPT = "if args.ttt_enabled:\n        ttt_adapt(args, base_model, device, val_tokens)"
RANKED = LEGAL_TTT.replace(
    "        base_model.eval()\n",
    "        rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n        base_model.eval()\n",
)
LEGAL = RANKED.replace("{train_start}", "chunk_start + ((chunk_seqs * rank) // world_size + bs) * seq_len")
AHEAD = LEGAL_TTT.replace("{train_start}", "(ci + 1) * args.ttt_chunk + bs * seq_len")
USE_LEGAL = "val_loss, val_bpb = eval_val_sliding_ttt(args, base_model, device, val_tokens, args.eval_stride)"
USE_SLOT = "val_loss, val_bpb = eval_val_slot(args, base_model, device, val_tokens, args.eval_stride)"
USE_NGRAM = "val_loss, val_bpb = eval_val_ngram(args, base_model, device, val_tokens, args.eval_stride)"
USE_TWO_PASS = "val_loss, val_bpb = eval_val_two_pass(args, base_model, device, val_tokens, args.eval_stride)"
VAL_HESSIANS = "hessians = collect_hessians(base_model, batches_of(val_tokens, 64, args.train_seq_len), device)"
TRAIN_HESSIANS = "hessians = collect_hessians(base_model, [train_loader.next_batch(1024, args.train_seq_len) for _ in range(64)], device)"
FALLBACK = """
try:
    import zstandard
    COMPRESSOR = "zstd"
except ImportError:
    COMPRESSOR = "zlib"
import zlib
"""
PACK = "zstandard.ZstdCompressor(level=22).compress(buffer.getvalue()) if COMPRESSOR == 'zstd' else zlib.compress(buffer.getvalue(), 9)"

PRE_QUANT = script(functions=TTT_ADAPT, before_quantize=ADAPT, ttt="1")
TEST_TIME = script(functions=TTT_ADAPT, before_eval=ADAPT, ttt="1")
SCORED_SLOT = script(functions=SLOT.replace("{mask}", "s:wlen"), final_eval=USE_SLOT)
HASHED = script(functions=NGRAM, final_eval=USE_NGRAM)
VAL_CALIBRATION = script(functions=HESSIANS, before_quantize=VAL_HESSIANS)
RESCORED = script(functions=TWO_PASS, final_eval=USE_TWO_PASS)
SECOND_EPOCH = LEGAL.replace(
    "    for ci in range(num_chunks):\n",
    "    for epoch, ci in [(e, c) for e in range(2) for c in range(num_chunks)]:\n",
)

ILLEGAL = {
    "pre_quant_training": PRE_QUANT,
    "test_time_training": TEST_TIME,
    "slot": SCORED_SLOT,
    "ngram_target_key": HASHED,
    "calibration": VAL_CALIBRATION,
    "rescoring": RESCORED,
}
ALIASED = {
    "pre_quant_training": script(
        functions=TTT_ADAPT.replace("torch.optim.SGD(", "getattr(O, 'SGD')(").replace("loss.backward()\n            optimizer.step()", "go = optimizer.step; loss.backward(); go()"),
        imports="from torch import optim as O\nfrom functools import partial",
        before_quantize="t = val_tokens\n    polish = partial(ttt_adapt, args, base_model, device)\n    polish(t)",
    ),
    "test_time_training": script(
        functions=TTT_ADAPT, before_eval="stages = {'a': ttt_adapt}\n    stages['a'](args, base_model, device, val_tokens)"
    ),
    "slot": script(
        functions=SLOT.replace("{mask}", "s:wlen").replace("torch.optim.AdamW([delta]", "Opt([delta]").replace("F.cross_entropy", "ce"),
        imports="from torch.optim import AdamW as Opt\nce = F.cross_entropy", final_eval="score = eval_val_slot\n    " + USE_SLOT.replace("eval_val_slot", "score"),
    ),
    "ngram_target_key": script(
        functions=NGRAM.replace("np.", "xp.").replace("ctx_hash", "h").replace("full_key", "k2").replace("full_table", "t2"),
        imports="import numpy as xp", final_eval=USE_NGRAM,
    ),
    "calibration": script(functions=HESSIANS, before_quantize="v = val_tokens\n    " + VAL_HESSIANS.replace("val_tokens", "v")),
    "rescoring": script(functions=TWO_PASS, final_eval="f = eval_val_two_pass\n    " + USE_TWO_PASS.replace("eval_val_two_pass", "f")),
}  # fmt: skip
DEAD = {
    "pre_quant_training": script(functions=TTT_ADAPT, before_quantize=ADAPT, ttt="0"),
    "test_time_training": script(
        functions=TTT_ADAPT, before_eval="if False:\n        ttt_adapt(args, base_model, device, val_tokens)"
    ),
    "slot": script(
        functions=SLOT.replace("{mask}", "s:wlen"),
        final_eval=f"if int(os.environ.get('SLOT_STEPS', '0')) > 0:\n        {USE_SLOT}\n    else:\n        {SLIDING}",
    ),
    "ngram_target_key": script(functions=NGRAM),
    "calibration": script(
        functions=HESSIANS, before_quantize=f"if os.getenv('GPTQ', 'off').lower() == 'val':\n        {VAL_HESSIANS}"
    ),
    "rescoring": script(
        functions=TWO_PASS + "\nDEBUG = not True\n",
        final_eval=f"{SLIDING}\n    if DEBUG and args.seed:\n        {USE_TWO_PASS}",
    ),
}

FLAT = """
import glob, math, lzma, io, torch, numpy as np
import torch.nn as nn, torch.nn.functional as F
read = lambda f: torch.from_numpy(np.fromfile(f, dtype=np.uint16).astype(np.int64))
train = torch.cat([read(f) for f in sorted(glob.glob("data/fineweb_train_*.bin"))])
val = torch.cat([read(f) for f in sorted(glob.glob("data/fineweb_val_*.bin"))])
net = nn.Sequential(nn.Embedding(260, 64), nn.Linear(64, 260))
opt = torch.optim.Adam(net.parameters(), 1e-3)
for step in range(1000):
    i = torch.randint(len(train) - 65, (8,))
    b = torch.stack([train[j : j + 65] for j in i])
    loss = F.cross_entropy(net(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten())
    opt.zero_grad(); loss.backward(); opt.step()
blob = lzma.compress(b"".join(p.detach().half().numpy().tobytes() for p in net.parameters()))
nats = 0.0
with torch.no_grad():
    for s in range(0, len(val) - 64, 64):
        x, y = val[s : s + 64], val[s + 1 : s + 65]
        nats += F.cross_entropy(net(x[None])[0], y, reduction="sum").item()
print("val_bpb", nats / math.log(2) / len(val))
"""
MINIFIED = """
import glob as G,math as M,lzma as Z,io,os,torch as T,numpy as N,torch.nn.functional as F
from torch import nn
class A:
\ta=os.environ.get('VAL_PATTERN','./data/fineweb_val_*.bin');b=os.environ.get('TRAIN_PATTERN','./data/fineweb_train_*.bin');c=int(os.environ.get('K','64'))
class B(nn.Module):
\tdef __init__(S,c):super().__init__();S.e=nn.Embedding(260,c);S.h=nn.Linear(c,260)
\tdef forward(S,i):return S.h(S.e(i))
def L(p):return T.cat([T.from_numpy(N.fromfile(f,dtype='<u2').astype(N.int64))for f in sorted(G.glob(p))])
def acc(nll,s,t):s+=nll.sum();t+=nll.numel()
def E(m,v,c):
\ts=T.zeros(());t=T.zeros(())
\twith T.inference_mode():
\t\tfor q in range(0,v.numel()-1,c):x=v[q:q+c];y=v[q+1:q+c+1];acc(F.cross_entropy(m(x[:y.numel()][None])[0].float(),y,reduction='none'),s,t)
\treturn(s/t).item(),(s/t).item()/M.log(2.)
def main():
\ta=A();m=B(a.c);o=T.optim.AdamW(m.parameters());w=L(a.b);v=L(a.a)
\tfor k in range(100):
\t\tx=w[k*64:k*64+65];l=F.cross_entropy(m(x[None,:-1])[0],x[1:]);o.zero_grad();l.backward();o.step()
\tz=Z.compress(m.h.weight.detach().numpy().tobytes());print(len(z),E(m,v,a.c))
main()
"""
CLEAN = {
    "frame": Folder(),
    "flat": Folder(source=FLAT),
    "minified": Folder(source=MINIFIED),
    "packed": Folder(source=wrap(script())),
    "packed_twice": Folder(source=wrap(script(), "nested")),
    "legal_ttt": Folder(source=script(functions=LEGAL, final_eval=USE_LEGAL)),
    "legal_ttt_copy": Folder(source=script(functions=LEGAL, final_eval=USE_LEGAL.replace("base_model", "copy.deepcopy(base_model)") + f"\n    {SLIDING}")),
    "calibrated_on_training_data": Folder(source=script(functions=HESSIANS, before_quantize=TRAIN_HESSIANS)),
    "nvidia_smi": Folder(source=script(imports="import subprocess", before_eval="print(subprocess.run(['nvidia-smi'], capture_output=True).stdout)")),
    "sp1024": Folder(ratio=62_021_846 / 151_080_891, settings=("vocab_size:1024 num_layers:9",), environment="VOCAB_SIZE=1024"),
    "helper_module": Folder(
        source=script(imports="from helper import keep"), helpers={"helper.py": "def keep(x):\n    return x\n"}
    ),
}  # fmt: skip


def failures(found) -> dict[str, str]:
    return {f.check: f"{f.summary} {[str(e) for e in f.evidence]}" for f in found.findings if f.status is Status.FAIL}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_submissions_look_clean(name: str, tmp_path) -> None:
    found = outcome(CLEAN[name], tmp_path)
    assert found.verdict.word is Word.CLEAN, (found.verdict, failures(found))
    if name.startswith("legal"):
        assert "Track B" in found.verdict.reason
        assert found.finding("source.score_first_training").status is Status.PASS


@pytest.mark.parametrize("name", ILLEGAL)
def test_each_violation_is_flagged_with_its_line(name: str, tmp_path) -> None:
    found = outcome(Folder(source=ILLEGAL[name]), tmp_path)
    assert found.verdict.word is Word.FLAG, found.verdict
    finding = found.finding(f"source.{name}")
    assert finding.status is Status.FAIL, failures(found)
    assert finding.evidence[0].file == "train_gpt.py"
    assert finding.evidence[0].line


@pytest.mark.parametrize("how", ["lzma", "zlib", "nested"])
@pytest.mark.parametrize("name", ILLEGAL)
def test_a_wrapper_hides_nothing(name: str, how: str, tmp_path) -> None:
    found = outcome(Folder(source=wrap(ILLEGAL[name], how)), tmp_path)
    assert found.verdict.word is Word.FLAG
    assert found.finding(f"source.{name}").status is Status.FAIL
    assert found.finding(f"source.{name}").evidence[0].file == "packed:train_gpt.py"


@pytest.mark.parametrize("name", ALIASED)
def test_an_alias_hides_nothing(name: str, tmp_path) -> None:
    found = outcome(Folder(source=ALIASED[name]), tmp_path)
    assert found.verdict.word is Word.FLAG, failures(found)
    assert found.finding(f"source.{name}").status is Status.FAIL, failures(found)


@pytest.mark.parametrize("name", DEAD)
def test_dead_code_is_not_flagged(name: str, tmp_path) -> None:
    found = outcome(Folder(source=DEAD[name]), tmp_path)
    assert found.verdict.word is Word.CLEAN, (found.verdict, failures(found))


def test_the_run_command_switches_code_on(tmp_path) -> None:
    off = script(functions=TTT_ADAPT, before_quantize=ADAPT, ttt="0")
    assert outcome(Folder(source=off, environment="TTT_ENABLED=1 SEED=42"), tmp_path).verdict.word is Word.FLAG


def test_the_run_command_switches_code_off(tmp_path) -> None:
    assert outcome(Folder(source=PRE_QUANT, environment="TTT_ENABLED=0"), tmp_path).verdict.word is Word.CLEAN


def test_the_log_says_that_a_feature_was_on(tmp_path) -> None:
    off = script(functions=TTT_ADAPT, before_quantize=ADAPT, ttt="0")
    found = outcome(Folder(source=off, extra_log="ttt_enabled: True"), tmp_path)
    assert found.verdict.word is Word.FLAG


def test_a_helper_module_hides_nothing(tmp_path) -> None:
    helper = "import torch\n" + TTT_ADAPT
    source = script(
        imports="from adapt import ttt_adapt as finish", before_quantize="finish(args, base_model, device, val_tokens)"
    )
    found = outcome(Folder(source=source, helpers={"adapt.py": helper}), tmp_path)
    assert found.finding("source.pre_quant_training").status is Status.FAIL
    assert found.finding("source.pre_quant_training").evidence[0].file == "adapt.py"


def test_training_on_the_next_chunk_is_flagged(tmp_path) -> None:
    found = outcome(Folder(source=script(functions=AHEAD, final_eval=USE_LEGAL)), tmp_path)
    assert found.verdict.word is Word.FLAG
    assert "not scored yet" in found.finding("source.test_time_training").summary


def test_a_second_epoch_that_scores_again_is_flagged(tmp_path) -> None:
    body = LEGAL.replace(
        "    for ci in range(num_chunks):\n", "    for epoch in range(2):\n      for ci in range(num_chunks):\n"
    )
    head, _, tail = body.partition("      for ci in range(num_chunks):\n")
    loop, _, end = tail.partition("    val_loss = (loss_sum")
    indented = "".join("    " + line for line in loop.splitlines(keepends=True))
    source = script(
        functions=head + "      for ci in range(num_chunks):\n" + indented + "    val_loss = (loss_sum" + end,
        final_eval=USE_LEGAL,
    )
    found = outcome(Folder(source=source), tmp_path)
    assert found.verdict.word is Word.FLAG
    assert "again" in found.finding("source.test_time_training").summary


def test_training_on_the_chunk_before_is_legal(tmp_path) -> None:
    functions = """
def eval_carried(args, model, val_tokens):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total = torch.zeros(())
    previous = None
    for start in range(0, val_tokens.numel() - 1, 64):
        if previous is not None:
            optimizer.zero_grad()
            model(previous[:-1][None], previous[1:][None]).backward()
            optimizer.step()
        chunk = val_tokens[start : start + 65]
        with torch.no_grad():
            total += model(chunk[:-1][None], chunk[1:][None])
        previous = chunk
    return total.item(), total.item() / math.log(2.0)
"""
    source = script(functions=functions, final_eval="val_loss, val_bpb = eval_carried(args, base_model, val_tokens)")
    found = outcome(Folder(source=source), tmp_path)
    assert found.verdict.word is Word.CLEAN, failures(found)


def test_training_on_the_validation_files_is_flagged(tmp_path) -> None:
    source = script().replace("Loader(args.train_files, device)", "Loader(args.val_files, device)")
    assert outcome(Folder(source=source), tmp_path).verdict.word is Word.FLAG


def test_context_only_slot_waits_for_a_ruling(tmp_path) -> None:
    source = script(functions=SLOT.replace("{mask}", ":s"), final_eval=USE_SLOT)
    found = outcome(Folder(source=source), tmp_path)
    assert found.verdict.word is Word.HOLD, (found.verdict, failures(found))


def test_opaque_code_is_unknown_not_clean(tmp_path) -> None:
    source = "import base64, hashlib\nkey = hashlib.sha256(open('key').read().encode()).digest()\nexec(bytes(a ^ b for a, b in zip(base64.b64decode('QUJD'), key)))\n"
    found = outcome(Folder(source=source), tmp_path)
    assert found.verdict.word is Word.HOLD
    assert found.finding("source.visible").status is Status.UNKNOWN
    assert found.finding("source.slot") is None


@pytest.mark.parametrize(
    ("piece", "value"),
    [
        ("before_eval", "import urllib.request as u; u.urlopen('http://example.org/table')"),
        ("before_eval", "import os as o; o.system('curl -O http://example.org/x')"),
        ("before_eval", "table = torch.load('ngram_table.pt')"),
        ("before_eval", "x, y = train_loader.next_batch(64, 64); base_model(x, y)"),
    ],
)
def test_reaching_outside_at_evaluation_is_flagged(piece: str, value: str, tmp_path) -> None:
    found = outcome(Folder(source=script(**{piece: value})), tmp_path)
    assert found.verdict.word is Word.FLAG, value


def test_the_compressor_fallback_is_noted_or_needs_the_author(tmp_path) -> None:
    source = script(imports=FALLBACK, compress=PACK)
    noted = review(Folder(source=source, compressor="zstd").write(tmp_path / "a"))
    assert noted.verdict.word is Word.CLEAN
    assert noted.finding("source.compressor_fallback").status is Status.FAIL
    silent = Folder(source=source).write(tmp_path / "b")
    for log in silent.glob("*.log"):
        log.write_text(log.read_text().replace("int6+lzma", "int6"))
    assert review(silent).verdict.word is Word.AUTHOR
    firm = FALLBACK.replace('COMPRESSOR = "zlib"', "raise")
    assert (
        review(Folder(source=script(imports=firm, compress=PACK)).write(tmp_path / "c"))
        .finding("source.compressor_fallback")
        .status
        is Status.PASS
    )


def test_a_class_switch_under_compile_is_noted(tmp_path) -> None:
    source = script(
        class_flag="qat = False", class_read=" * (0.5 if GPT.qat else 1.0)", in_training="GPT.qat = step > 50"
    )
    found = outcome(Folder(source=source), tmp_path)
    assert found.finding("source.compiled_switch").status is Status.FAIL
    assert found.verdict.word is Word.CLEAN


def test_tail_rescoring_is_found_and_noted(tmp_path) -> None:
    found = outcome(Folder(source=script(window_test=TAIL_WINDOWS)), tmp_path)
    finding = found.finding("source.scored_once")
    assert (finding.status, finding.weight) == (Status.FAIL, "note")
    assert finding.figures == {}  # neither window nor stride is known
    assert found.verdict.word is Word.CLEAN  # 3,584 of 151 million targets


def test_a_subset_of_the_validation_split_is_flagged(tmp_path) -> None:
    source = script(before_eval="val_tokens = val_tokens[:10_000_000]")
    found = outcome(Folder(source=source), tmp_path)
    assert found.verdict.word is Word.FLAG
    assert found.finding("source.coverage").status is Status.FAIL
