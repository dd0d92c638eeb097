# ruff: noqa: E501
"""What a second, blind round of public submissions found wrong with review, each cause rewritten as small as it goes."""

from __future__ import annotations

import pytest

from bytejepa.review import Status, Word, review
from bytejepa.review.log_parser import parse_log
from review.folders import Folder, outcome, status_of
from review.scripts import SLIDING, SLOT, TTT_ADAPT, script

BY_HAND = """
class PlainDescent:
    def __init__(self, weights, rate):
        self.weights, self.rate = list(weights), rate
    def move(self):
        for w in self.weights:
            w.data.add_(w.grad, alpha=-self.rate)

def descend(args, model, device, val_tokens):
    weights = list(model.parameters())
    named = {{name: w for name, w in model.named_parameters() if "blocks" in name}}
    mover = PlainDescent(model.parameters(), args.ttt_lr)
    for start in range(0, val_tokens.numel() - 65, 64):
        part = val_tokens[start : start + 65].to(device, torch.int64)
        model(part[:-1][None], part[1:][None]).backward()
        squared = torch.zeros(())
        with torch.no_grad():
            for w in weights:
                squared += w.grad.pow(2).sum()
            {step}
        model.zero_grad(set_to_none=True)
"""
STEPS = {
    "data": "for w in weights: w.data -= args.ttt_lr * w.grad",
    "named": "for name, w in named.items(): w.data -= args.ttt_lr * w.grad",
    "name": "for w in model.parameters(): w -= args.ttt_lr * w.grad",
    "method": "for w in weights: w.sub_(args.ttt_lr * w.grad)",
    "copy": "for w in weights: w.data.copy_(w.data - args.ttt_lr * w.grad)",
    "assigned": "for w in weights: w.data = w.data - args.ttt_lr * w.grad",
    "foreach": "torch._foreach_add_(weights, [w.grad for w in weights], alpha=-args.ttt_lr)",
    "class": "mover.move()",
}
SCORED_THEN_MOVED = """
def eval_moving(args, model, device, val_tokens):
    weights = {name: w for name, w in model.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, val_tokens.numel() - 65, 64):
        part = val_tokens[start : start + 65].to(device, torch.int64)
        with torch.no_grad():
            nll = F.cross_entropy(model.forward_logits(part[:-1][None])[0].float(), part[1:], reduction="sum")
        total += nll.double()
        model(part[:-1][None], part[1:][None]).backward()
        with torch.no_grad():
            for name, w in weights.items():
                if w.grad is not None:
                    w.data -= args.ttt_lr * w.grad
        model.zero_grad(set_to_none=True)
    return total.item(), total.item() / math.log(2.0)
"""
BOUNDED = """
def eval_bounded(args, model, device, val_tokens):
    total, size = torch.zeros((), dtype=torch.float64), 1024
    how_many = {count}
    with torch.no_grad():
        for i in range(how_many):
            part = val_tokens[i * size : (i + 1) * size + 1].to(device, torch.int64)
            total += F.cross_entropy(model.forward_logits(part[:-1][None])[0].float(), part[1:], reduction="sum").double()
    return total.item(), total.item() / math.log(2.0)
"""
USE_BOUNDED = "val_loss, val_bpb = eval_bounded(args, base_model, device, val_tokens)"
SOME_LOSSES = """
def eval_with_second_model(args, model, device, val_tokens):
    total = val_tokens.numel() - 1
    kept = torch.zeros((total,), dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, total - 64, 64):
            part = val_tokens[start : start + 65].to(device, torch.int64)
            kept[start : start + 64] = F.cross_entropy(model.forward_logits(part[:-1][None])[0].float(), part[1:], reduction="none").double()
    first = min({count}, total)
    mean = kept[:first].mean().item()
    return mean, mean / math.log(2.0)
"""
NATIVE = """
import ctypes
class Guesser:
    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
    def guesses(self, ids):
        out = np.zeros(ids.size, dtype=np.uint16)
        self.lib.guess(ids.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(ids.size), out.ctypes.data_as(ctypes.c_void_p))
        return out
"""
GRADIENTS_AS_VALUES = """
import mlx.core as mx
import mlx.nn as mnn
def adapt(model, optimizer, val_tokens):
    loss_and_gradients = mx.compile(mnn.value_and_grad(model, lambda x, y: model.loss(x, y)), inputs=model.state)
    for start in range(0, val_tokens.numel() - 65, 64):
        part = val_tokens[start : start + 65]
        loss, gradients = loss_and_gradients(part[:-1][None], part[1:][None])
        optimizer.update(model, gradients)
"""


@pytest.mark.parametrize("how", STEPS)
def test_a_step_written_by_hand_is_a_step(how: str, tmp_path) -> None:
    source = script(functions=BY_HAND.format(step=STEPS[how]), before_eval="descend(args, base_model, device, val_tokens)")  # fmt: skip
    found = outcome(Folder(source=source), tmp_path)
    assert status_of(found, "source.test_time_training") is Status.FAIL
    assert found.verdict.word is Word.FLAG


def test_a_norm_of_gradients_is_no_step(tmp_path) -> None:
    source = script(functions=BY_HAND.format(step="print(squared.sqrt())"), before_eval="descend(args, base_model, device, val_tokens)")  # fmt: skip
    assert outcome(Folder(source=source), tmp_path).verdict.word is Word.CLEAN


def test_a_step_by_hand_after_the_score_of_its_data_is_the_legal_pattern(tmp_path) -> None:
    source = script(functions=SCORED_THEN_MOVED, final_eval="val_loss, val_bpb = eval_moving(args, base_model, device, val_tokens)")  # fmt: skip
    found = outcome(Folder(source=source), tmp_path)
    assert status_of(found, "source.score_first_training") is Status.PASS
    assert "Track B" in found.verdict.reason


@pytest.mark.parametrize(("rounds", "word"), [("1", Word.CLEAN), ("2", Word.FLAG)])
def test_one_round_over_the_data_is_no_second_look(rounds: str, word: Word, tmp_path) -> None:
    loop = "for start in range(0, val_tokens.numel() - 65, 64):"
    body = SCORED_THEN_MOVED.partition(loop)[2].partition("    return total")[0].replace("\n", "\n    ")
    functions = SCORED_THEN_MOVED.partition(loop)[0] + "for turn in range(args.ttt_epochs):\n        " + loop + body.rstrip(" ") + "    return total.item(), total.item() / math.log(2.0)\n"  # fmt: skip
    source = script(functions=functions, final_eval="val_loss, val_bpb = eval_moving(args, base_model, device, val_tokens)")  # fmt: skip
    found = outcome(Folder(source=source, environment=f"TTT_EPOCHS={rounds}"), tmp_path)
    assert found.verdict.word is word, found.verdict
    assert (word is Word.CLEAN) == ("Track B" in found.verdict.reason)


def test_a_delta_moved_by_hand_is_a_delta_all_the_same(tmp_path) -> None:
    source = SLOT.replace("{mask}", "s:wlen").replace("slot_opt.step()", "delta.data -= 0.005 * delta.grad")
    source = script(functions=source, final_eval="val_loss, val_bpb = eval_val_slot(args, base_model, device, val_tokens, args.eval_stride)")  # fmt: skip
    assert status_of(outcome(Folder(source=source), tmp_path), "source.slot") is Status.FAIL


def test_gradients_that_a_function_returns_are_taken_for_the_step(tmp_path) -> None:
    source = script(functions=GRADIENTS_AS_VALUES, before_eval="adapt(base_model, optimizer, val_tokens)")
    assert status_of(outcome(Folder(source=source), tmp_path), "source.test_time_training") is Status.FAIL


@pytest.mark.parametrize(
    ("count", "status"),
    [
        ("min(500, (val_tokens.numel() - 1) // size)", Status.FAIL),
        ("600", Status.FAIL),
        ("(val_tokens.numel() - 1) // size", Status.PASS),
        ("min(1_000_000, (val_tokens.numel() - 1) // size)", Status.PASS),  # more than there is
    ],
)
def test_a_bounded_number_of_windows_is_a_part_of_the_split(count: str, status: Status, tmp_path) -> None:
    source = script(functions=BOUNDED.format(count=count), final_eval=USE_BOUNDED)
    assert status_of(outcome(Folder(source=source), tmp_path), "source.coverage") is status


@pytest.mark.parametrize(("count", "status"), [("8_000_000", Status.FAIL), ("100_000_000", Status.PASS)])
def test_only_the_first_losses_taken_is_a_part_of_the_split(count: str, status: Status, tmp_path) -> None:
    source = script(functions=SOME_LOSSES.format(count=count), final_eval="val_loss, val_bpb = eval_with_second_model(args, base_model, device, val_tokens)")  # fmt: skip
    assert status_of(outcome(Folder(source=source), tmp_path), "source.coverage") is status


@pytest.mark.parametrize(("given", "word"), [("val_tokens.numpy()", Word.HOLD), ("np.zeros(8)", Word.CLEAN)])
def test_compiled_code_that_sees_validation_data_is_not_waved_through(given: str, word: Word, tmp_path) -> None:
    source = script(functions=NATIVE, before_eval=f"hints = Guesser('./guess.so').guesses({given})")
    assert outcome(Folder(source=source), tmp_path).verdict.word is word


REPLAY = "replay = bool(int(os.environ.get('USE_REPLAY', '0')))\n    if replay: ttt_adapt(args, base_model, device, val_tokens)"


def test_a_switch_that_the_logs_prove_on_is_judged_as_on(tmp_path) -> None:
    source = script(functions=TTT_ADAPT, final_eval=SLIDING + "\n    " + REPLAY + "\n    " + SLIDING)
    folder = Folder(source=source)
    assert review(folder.write(tmp_path / "off")).verdict.word is Word.CLEAN
    path = folder.write(tmp_path / "beside")
    for log in path.glob("*.log"):
        log.write_text(log.read_text() + "final_replay_exact val_loss:0.79000000 val_bpb:1.14011000\n")
    beside = review(path)
    assert status_of(beside, "source.other_evaluation") is Status.UNKNOWN
    assert beside.verdict.word is Word.HOLD
    folder.claims = {"val_bpb": 1.14011, "val_loss": 0.79}
    path = folder.write(tmp_path / "claimed")
    for log in path.glob("*.log"):
        log.write_text(log.read_text() + "final_replay_exact val_loss:0.79000000 val_bpb:1.14011000\n")
    assert status_of(review(path), "source.test_time_training") is Status.FAIL


SIZES = "Serialized model: 91657491 bytes\nCode size: 83709 bytes\nTotal submission size: 91741200 bytes\n"


@pytest.mark.parametrize(
    ("lines", "total", "compressor"),
    [
        ("artifact int6+zstd-22: 15697770 bytes + 83709 code = 15781479 total (4.0x)", 15_781_479, "zstd"),
        ("model:15697770 code:83709 total:15781479 (15.78 MB)", 15_781_479, ""),
        ("artifact int8+zlib: 20000000 bytes + 83709 code = 20083709 total (for comparison)", 91_741_200, ""),
        (
            "Serialized model int6+zstd: 15697770 bytes\nTotal submission size int8+zlib: 15781479 bytes",
            15_781_479,
            "zstd",
        ),
        ("1 + 2 code = 4 total", 91_741_200, ""),  # no sum
    ],
)
def test_the_size_of_the_packed_model_in_other_words(lines: str, total: int, compressor: str) -> None:
    log = parse_log(SIZES + lines, "a.log")
    assert (log.total_bytes, log.compressor) == (total, compressor)


def test_a_validation_of_a_step_without_its_number_of_steps_is_not_the_final_one() -> None:
    log = parse_log("step:9000 val_loss:1.3029 val_bpb:1.8796\nfinal step:9001 val_loss:1.3001 val_bpb:1.8756\n", "a.log")  # fmt: skip
    assert [score.is_final for score in log.scores] == [False, True]


def test_a_claim_that_stands_in_the_logs_under_another_name_awaits_a_ruling(tmp_path) -> None:
    lines = "blend bytes=151080891 blend_bpb=1.021300 own_bpb=1.190000"
    found = outcome(Folder(extra_log=lines, claims={"val_bpb": 1.0213}), tmp_path)
    assert status_of(found, "scores.claims") is Status.UNKNOWN
    assert "blend_bpb" in found.finding("scores.claims").summary
    assert found.verdict.word is Word.HOLD
    assert status_of(review(Folder(extra_log=lines, claims={"val_bpb": 1.0313}).write(tmp_path / "none")), "scores.claims") is Status.FAIL  # fmt: skip


def test_helper_files_count_as_code(tmp_path) -> None:
    helpers = {"second.py": "import third\n" + "# second\n" * 50, "third.py": "x = 1\n" * 50, "kernel.c": "int f;\n", "unused.py": "y = 2\n" * 999}  # fmt: skip
    source = script(imports="import second\nLIBRARY = 'kernel.c'")
    found = outcome(Folder(source=source, helpers=helpers), tmp_path)
    whole = len(source.encode()) + sum(len(helpers[name]) for name in ("second.py", "third.py", "kernel.c"))
    assert f"{whole:,} bytes of code as shipped in 4 files" in found.finding("budget.code_bytes").summary
