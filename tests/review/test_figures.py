# ruff: noqa: E501
"""Broken folders and figures that do not hold: bytes, seconds, seeds, bpb, claims."""

from __future__ import annotations

import json
import math

import pytest

from bytejepa.errors import DataError
from bytejepa.review import Status, Word, review
from bytejepa.review.log_parser import parse_log
from bytejepa.review.wrappers import unpack
from review.folders import Folder, outcome, status_of
from review.scripts import script, wrap

BROKEN = {
    "no_readme": (Folder(readme=None), Word.AUTHOR, "folder.complete"),
    "no_claims": (Folder(claims=None), Word.AUTHOR, "folder.complete"),
    "bad_json": (Folder(raw_claims="{'val_bpb': 1}"), Word.AUTHOR, "folder.complete"),
    "no_logs": (Folder(with_logs=False), Word.AUTHOR, "folder.complete"),
    "syntax_error": (Folder(source="def main(:\n    pass\n"), Word.AUTHOR, "source.syntax"),
    "over_budget": (Folder(total_bytes=17_071_321), Word.FLAG, "budget.bytes"),
    "mebibytes": (Folder(total_bytes=16_445_000, source=script() + "\nLIMIT = 16 * 1024 * 1024\n"), Word.FLAG, "budget.units"),
    "slow_training": (Folder(train_ms=603_000), Word.FLAG, "budget.train_seconds"),
    "slow_evaluation": (Folder(eval_ms=846_500), Word.FLAG, "budget.evaluation_seconds"),
    "other_configuration": (Folder(settings=("num_layers:13 model_dim:512", "num_layers:13 model_dim:512", "num_layers:12 model_dim:512")), Word.FLAG, "scores.same_configuration"),
    "wrong_bpb": (Folder(ratio=0.955), Word.FLAG, "scores.bpb_from_loss"),
    "wrong_denominator": (Folder(ratio=40_540_803 / 164_594_398, settings=("vocab_size:8192",)), Word.FLAG, "scores.bpb_from_loss"),
    "claim_below_the_logs": (Folder(claims={"val_bpb": 1.1703}), Word.FLAG, "scores.claims"),
    "other_loss_claimed": (Folder(claims={"val_loss": 0.83842396}), Word.AUTHOR, "scores.claims"),
    "subset_in_the_log": (Folder(extra_log="scored_bytes: 10000000"), Word.FLAG, "scores.coverage"),
    "fewer_documents": (Folder(extra_log="val_docs:10000"), Word.FLAG, "scores.coverage"),
    "same_seed_twice": (Folder(seeds=(42, 7, 1), extra_log="note seed:42"), Word.CLEAN, "scores.seeds"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_submissions(name: str, tmp_path) -> None:
    folder, word, check = BROKEN[name]
    found = review(folder.write(tmp_path / "submission"))
    assert found.verdict.word is word, (
        found.verdict,
        [(f.check, f.summary) for f in found.findings if f.status is not Status.PASS],
    )
    if word is not Word.CLEAN:
        assert found.finding(check).status is Status.FAIL


def test_a_missing_script_needs_the_author(tmp_path) -> None:
    path = Folder().write(tmp_path / "submission")
    (path / "train_gpt.py").unlink()
    found = review(path)
    assert found.verdict.word is Word.AUTHOR
    assert "train_gpt.py" in found.verdict.reason


def test_the_weights_in_the_folder_are_weighed(tmp_path) -> None:
    path = Folder().write(tmp_path / "submission")
    (path / "final_model.int6.ptz").write_bytes(b"\0" * 16_000_000)
    found = review(path)
    assert found.verdict.word is Word.FLAG
    assert "over the cap" in found.finding("budget.bytes").summary


def test_figures_of_a_clean_folder(tmp_path) -> None:
    found = review(Folder().write(tmp_path / "submission"))
    assert found.facts["num_seeds"] == 3
    assert found.facts["mean_bpb"] == pytest.approx(1.19048559)
    assert found.facts["train_s"] == [598.123] * 3
    assert found.facts["parameters"] == 24_625_001
    assert found.finding("scores.bpb_from_loss").status is Status.PASS
    code = found.finding("budget.code_bytes").figures
    assert 0 < code["packed_bytes"] < code["raw_bytes"]


def test_significance_follows_the_record_rule(tmp_path) -> None:
    better = review(Folder(claims={"baseline_bpb": 1.2244}).write(tmp_path / "a")).finding("scores.significance")
    assert better.status is Status.PASS
    assert better.figures["margin_bpb"] == pytest.approx(0.0072, abs=1e-4)
    close = review(Folder(claims={"baseline_bpb": 1.1950}).write(tmp_path / "b")).finding("scores.significance")
    assert close.status is Status.UNKNOWN


def test_unlimited_compute_is_not_held_to_600_seconds(tmp_path) -> None:
    folder = Folder(train_ms=14_400_000, claims={"track": "non-record, unlimited compute"})
    assert review(folder.write(tmp_path / "submission")).verdict.word is Word.CLEAN


def test_a_log_that_begins_with_the_source_is_read_past_it() -> None:
    text = script() + "\n" + Folder().log(0)
    log = parse_log(text, "train.log")
    assert log.final.bpb == 1.19012345
    assert log.steps == 9000
    assert log.seed == 2025
    assert log.total_bytes == 14_369_791


def test_other_log_dialects() -> None:
    text = """seed: 314
model_params:35943512
4568/20000 val_loss: 2.8102 val_bpb: 1.0879
stopping_early: wallclock_cap train_time: 588132ms step: 4568/20000
pre-quantization post-ema val_loss:2.81015 val_bpb:1.08790 eval_time:7400ms
Serialized model quantized+brotli: 15962729 bytes
Total submission size quantized+brotli: 15979123 bytes
quantized val_loss:2.84108000 val_bpb:1.09987000 eval_time:9661ms
quantized_sliding_window val_loss:2.79763000 val_bpb:1.08305000 eval_time:91365ms
legal_ttt_exact val_loss:2.79177797 val_bpb:1.08078425 eval_time:324216ms
"""
    log = parse_log(text, "train_seed314.log")
    assert (log.seed, log.steps, log.compressor) == (314, 4568, "brotli")
    assert log.train_s == pytest.approx(588.132)
    assert log.final.label == "legal_ttt_exact"
    assert log.final.evaluation_s == pytest.approx(324.216)


def test_nothing_but_the_three_kinds_of_target_is_reviewed(tmp_path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError):
            review(path)


def test_unpacking_executes_nothing(tmp_path) -> None:
    mark = tmp_path / "mark"
    inner = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    for how in ("lzma", "zlib", "nested"):
        assert unpack(wrap(inner, how)).source == inner
    path = Folder(source=wrap(inner)).write(tmp_path / "submission")
    review(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "source",
    [
        "exec(input())",
        "import lzma,base64\nexec(lzma.decompress(base64.b85decode('AAAA')))",
        "exec('1 +')",
        "import x\nexec(x.load())",
    ],
)
def test_what_cannot_be_unpacked_says_so(source: str) -> None:
    assert unpack(source).closed


def test_reports_of_all_forms(tmp_path, capsys) -> None:
    from bytejepa.cli.review import Review as Verb
    from bytejepa.errors import ConfigError, ReviewFailed

    path = Folder().write(tmp_path / "clean")
    assert Verb(target=path, json=True).run_command() == 0
    assert json.loads(capsys.readouterr().out)["verdict"]["word"] == "LOOKS CLEAN"
    assert Verb(target=path, markdown=True).run_command() == 0
    text = capsys.readouterr().out
    assert text.startswith("### Community Review — Byte model")
    assert "**Compliance:** LOOKS CLEAN" in text
    assert "3-seed mean" in text
    assert Verb(target=path).run_command() == 0
    assert "LOOKS CLEAN" in capsys.readouterr().out
    out = tmp_path / "review.md"
    assert Verb(target=path, markdown=True, output=out).run_command() == 0
    assert "Recommendation" in out.read_text()
    with pytest.raises(ConfigError, match="exists"):
        Verb(target=path, output=out).run_command()
    with pytest.raises(ConfigError):
        Verb(target=path, json=True, markdown=True).run_command()
    with pytest.raises(ReviewFailed) as failure:
        Verb(target=Folder(total_bytes=17_000_000).write(tmp_path / "over")).run_command()
    assert failure.value.exit_code == 10
    assert "FLAG" in str(failure.value)


OTHER_TEXT = {"dataset": "notes: 4,800 validation bytes in 60 documents; not the challenge's split"}


@pytest.mark.parametrize(
    ("ratio", "counts", "status"),
    [
        pytest.param(4859 / 4800, "val_bytes:4800 val_documents:60 targets:4859", Status.PASS, id="short documents"),
        pytest.param(1.0, "val_bytes:4800 val_documents:60 targets:4859", Status.FAIL, id="without their marks"),
        pytest.param(4859 / 4800, "", Status.UNKNOWN, id="not counted"),
    ],
)
def test_scores_of_other_text_are_held_against_its_own_counts(
    ratio: float, counts: str, status: Status, tmp_path
) -> None:
    part = f"step:100/9000 val_loss:2.0000 val_bpb:{2 / math.log(2):.4f}"  # of a leading part, one long document
    extra_log = f"{part}\n{counts}" if counts else ""
    found = outcome(Folder(ratio=ratio, claims=OTHER_TEXT, extra_log=extra_log), tmp_path)
    assert status_of(found, "scores.bpb_from_loss") is status
