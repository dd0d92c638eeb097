"""What a fourth, blind round of public submissions found wrong with review, each cause rewritten as small as it goes."""

from __future__ import annotations

import dataclasses

import pytest

from bytejepa.review import Status, Word
from review.folders import Folder, outcome, status_of
from review.scripts import script

OWN_TOKENS = 44_900_000
COUNTS_IN_A_DICTIONARY = """
def eval_backoff(args, model, device, val_tokens):
    model.eval()
    seen, pairs = {}, {}
    for order in (3, 2):
        seen[order] = torch.zeros(4096, dtype=torch.int32)
        pairs[order] = torch.zeros(4096, dtype=torch.int32)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, val_tokens.numel() - 1, 1024):
        x, y = val_tokens[start : start + 1024], val_tokens[start + 1 : start + 1025]
        with torch.inference_mode():
            logits = model.forward_logits(x[None].to(device))[0]
        nll = F.cross_entropy(logits.float(), y.to(device), reduction="none")
        for order in (3, 2):
            context = (x * 31 + order) % 4096
            key = (context * 1000003 + {asked}) % 4096
            guess = pairs[order][key].float() / seen[order][context].float().clamp(min=1)
            nll = -torch.log(0.5 * torch.exp(-nll) + 0.5 * guess)
        total += nll.double().sum()
        for order in (3, 2):
            context = (x * 31 + order) % 4096
            seen[order].scatter_add_(0, context, torch.ones_like(context))
            pairs[order].scatter_add_(0, (context * 1000003 + y) % 4096, torch.ones_like(context))
    return total.item(), total.item() / math.log(2.0)
"""
EVALUATION = "val_loss, val_bpb = eval_backoff(args, base_model, device, val_tokens)"
FALLBACK = """
try:
    import zstandard
    COMPRESSOR = "zstd"
except ImportError:
    COMPRESSOR = "zlib"
"""


def _of_own_tokenizer(ratio: float) -> Folder:
    """Return a folder of 4,096 words: a tokenizer whose counts were never published."""
    return Folder(
        source=script(),
        ratio=ratio,
        settings=("vocab_size:4096 num_layers:13 model_dim:512 train_seq_len:4096",) * 3,
        extra_log=f"val_loader:shards pattern=./data/datasets/fineweb10B_sp4096/fineweb_val_*.bin tokens:{OWN_TOKENS}",
    )


@pytest.mark.parametrize("key", ["mean_val_bpb", "val_bpb_mean", "val_bpb_3seed_mean", "avg_bpb"])
def test_a_mean_over_the_seeds_is_a_claim_under_any_of_its_names(key: str, tmp_path) -> None:
    folder = Folder()
    right = sum(folder.bpbs) / 3
    named = dataclasses.replace(folder, claims={"val_bpb": None, key: right})
    assert status_of(outcome(named, tmp_path / "right"), "scores.claims") is Status.PASS
    wrong = dataclasses.replace(folder, claims={"val_bpb": None, key: right - 0.05})
    assert status_of(outcome(wrong, tmp_path / "wrong"), "scores.claims") is Status.FAIL


@pytest.mark.parametrize("key", ["val_bpb_std", "pre_quant_val_bpb", "baseline_bpb"])
def test_other_figures_are_no_claim(key: str, tmp_path) -> None:
    found = outcome(Folder(claims={"val_bpb": None, key: 1.19}), tmp_path)
    assert status_of(found, "scores.claims") is Status.FAIL


def test_a_tokenizer_of_its_own_may_count_its_bytes_a_little_otherwise(tmp_path) -> None:
    usual = OWN_TOKENS / 151_080_891
    close = outcome(_of_own_tokenizer(usual * 1.0022), tmp_path / "close")
    assert status_of(close, "scores.bpb_from_loss") is Status.UNKNOWN
    assert status_of(close, "scores.coverage") is Status.PASS
    assert close.verdict.word is Word.CLEAN
    wrong = outcome(_of_own_tokenizer(usual * 1.04), tmp_path / "wrong")
    assert status_of(wrong, "scores.bpb_from_loss") is Status.FAIL
    assert status_of(wrong, "scores.coverage") is Status.FAIL


@pytest.mark.parametrize(("asked", "status"), [("y", Status.FAIL), ("order", Status.PASS)])
def test_tables_kept_in_a_literal_dictionary_are_tables(asked: str, status: Status, tmp_path) -> None:
    source = script(functions=COUNTS_IN_A_DICTIONARY.replace("{asked}", asked), final_eval=EVALUATION)
    assert status_of(outcome(Folder(source=source), tmp_path), "source.ngram_target_key") is status


def test_a_record_is_not_compared_with_itself(tmp_path) -> None:
    mean = sum(Folder().bpbs) / 3
    readme = f"# Record: eight layers, val_bpb {mean:.4f}\n\n{{rest}}\n\n```bash\ntorchrun train_gpt.py\n```\n"
    alone = outcome(
        Folder(readme=readme.format(rest="Three seeds."), claims={"val_bpb": round(mean, 4)}), tmp_path / "alone"
    )
    [finding] = [f for f in alone.findings if f.check == "scores.significance"]
    assert "no baseline is named" in finding.summary
    beaten = readme.format(rest="Previous record: val_bpb 1.2345.")
    other = outcome(Folder(readme=beaten, claims={"val_bpb": round(mean, 4)}), tmp_path / "other")
    [finding] = [f for f in other.findings if f.check == "scores.significance"]
    assert "better than 1.2345" in finding.summary


@pytest.mark.parametrize(
    ("use", "status"),
    [
        ("", Status.PASS),
        ("\nUSED = COMPRESSOR\n", Status.FAIL),
        ('\nif COMPRESSOR != "zstd":\n    raise RuntimeError("zstandard is needed")\nUSED = COMPRESSOR\n', Status.PASS),
    ],
)
def test_a_compressor_that_is_never_used_or_is_insisted_on_falls_back_on_nothing(
    use: str, status: Status, tmp_path
) -> None:
    found = outcome(Folder(source=script(functions=FALLBACK + use)), tmp_path)
    assert status_of(found, "source.compressor_fallback") is status


def test_a_claimed_mean_is_held_against_one_seeds_figure_without_a_loss(tmp_path) -> None:
    folder = Folder(
        bpbs=(1.19012345,),
        seeds=(2025,),
        extra_log="final_sliding_window sliding_bpb:1.1478 val_bpb:0.3001 eval_time:204138ms",
        claims={"val_bpb": 0.2995, "val_bpb_seeds": [0.3001, 0.2977, 0.3008], "val_loss": None},
    )
    found = outcome(folder, tmp_path)
    assert status_of(found, "scores.claims") is Status.UNKNOWN
    assert found.verdict.word is Word.HOLD
