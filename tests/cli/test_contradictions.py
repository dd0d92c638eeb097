"""Words that contradict each other, and options that would be ignored: one line, exit code 2, before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytejepa import demo
from bytejepa.cli.demo import print_result
from bytejepa.data.corpus import embedded_documents
from conftest import MINIMAL, minimal_with

Refuses = Callable[..., str]
CONFIG = 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("config", "tiny", "--model.num-layers", 4, "--model.num_layers=6"), "--model.num-layers is given twice"),
        (("config", "--model.smear", "--model.no-smear"), "--model.smear and --model.no-smear set the same"),
        (("config", "--json", "--json"), "--json is given twice"),
        (("eval", "m.bjm", "--data", "A", "--data=B"), "--data is given twice"),
        (("export", "run", "-oa", "--output", "b"), "-o and --output set the same"),
        (("generate", "m.bjm", "-n5", "-n", 5), "-n is given twice"),
        (("bench", "--lanes", 1, 2, "--lanes", 3), "--lanes is given twice"),
        (
            ("train", "tiny", "--max-wallclock", 5, "--schedule.max_wallclock-s", 500),
            "--max-wallclock and --schedule.max-wallclock-s set the same (give one of them)",
        ),
    ],
)
def test_options_given_twice(refuses: Refuses, words: tuple[object, ...], said: str) -> None:
    assert said in refuses(CONFIG, *words)


def test_words_that_only_look_like_an_option_given_twice(refuses: Refuses) -> None:
    behind_the_separator = ("generate", "--prompt=--seed", "--seed=1", "--", "--seed")
    assert "--seed: No such file" in refuses(5, *behind_the_separator)
    assert "m.bjm: No such file" in refuses(5, "generate", "m.bjm", "--prompt", "-5", "--temperature=-0", "-n", "5")


@pytest.mark.parametrize("verb", ["export", "import-pr832", "report", "review", "generate", "demo"])
def test_results_that_do_not_go_to_standard_output(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (verb,) if verb == "demo" else (verb, "model.bjm")
    assert "-o -: the result is not written to standard output (name it ./-)" in refuses(CONFIG, *words, "-o", "-")
    assert not Path("-").exists()


def test_a_file_may_be_named_like_a_stream(
    command: Callable, monkeypatch: pytest.MonkeyPatch, minimal_artifact: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("generate", minimal_artifact, "-n", 4, "-o", "./-").code == 0
    assert Path("-").is_file()
    assert command("eval", minimal_artifact, "--data", "-").code == 0


@pytest.mark.parametrize(
    "words", [("prepare", "-", "--out", "x"), ("eval", "m.bjm", "--data", "-"), ("generate", "-"), ("review", "-")]
)
def test_verbs_that_do_not_read_standard_input(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "-: standard input is not read here (name a file)" in refuses(CONFIG, *words)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("export", "run", "-o", ""), "-o: "),
        (("eval", "m.bjm", "--data="), "--data: "),
        (("eval", "", "--data", "x"), ""),
        (("ablate", "", "--out", "x"), ""),
        (("submission", "run", "-o", "x", "--author", "", "--github-id", "a"), "--author: "),
        (("submission", "run", "-o", "x", "--author", "A", "--github-id="), "--github-id: "),
    ],
)
def test_empty_names(refuses: Refuses, words: tuple[str, ...], option: str) -> None:
    assert f": {option}expected a name or a text, got an empty string" in refuses(CONFIG, *words)


@pytest.mark.parametrize("words", [("bench", "--what", "codec", "--contexts"), ("ablate", "plan", "--seeds", "--json")])
def test_options_of_several_values_that_got_none(refuses: Refuses, words: tuple[str, ...]) -> None:
    assert "expected at least one value, got none" in refuses(CONFIG, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export", "run", "-o", "x", "--no-score", "--score-bytes", 99, "--stride", 3), "--score-bytes and --stride have no"),
        (("export", "run", "-o", "x", "--fit", 0), "--fit: expected 1 or more, got 0"),
        (("eval", "m.bjm", "--data", "x", "--no-sliding", "--stride", 3), "--stride has no effect with --no-sliding"),
        (("report", "run", "-o", "x.html", "--measure", "none", "--data", "x"), "--data has no effect with --measure none"),
        (("report", "run", "-o", "x.html", "--measure", "none", "--device", "cuda"), "--device has no effect"),
        (("report", "run", "-o", "x.html", "--measure", "none", "--score-bytes", 9), "--score-bytes has no effect"),
        (("compress", "x", "--no-mixing", "--segment-bytes", 9), "--segment-bytes has no effect with --no-mixing"),
        (("decompress", "x.bjc", "--test", "-o", "out"), "--output has no effect with --test"),
        (("decompress", "x.bjc", "--test", "--force"), "--force has no effect with --test"),
        (("ablate", "--list", "--out", "x", "--data", "y"), "--out and --data have no effect with --list"),
        (("ablate", "jepa", "--list", "--force"), "--force has no effect with --list"),
        (("ablate", "--list", "--steps", 3), "--steps has no effect with --list alone (leave it out, or name a PLAN)"),
        (("ablate", "--list", "--seeds", 3), "--seeds has no effect with --list alone"),
        (("bench", "golf", "--what", "prepare"), "--what prepare measures no model, got golf"),
        (("bench", "--what", "prepare", "--model.num-layers=3"), "measures no model, got --model.num-layers=3"),
        (("prepare", "source", "--verify", "x"), "--verify checks one folder of shards, SOURCE... are not read"),
        (("prepare", "--verify", "x", "--out", "y", "--kind", "text"), "--out and --kind have no effect with --verify"),
        (("prepare", "x", "--out", "y", "--val-documents", 0), "--val-documents: expected 1 or more, got 0"),
        (("config", "--json", "--explain"), "--explain has no effect with --json"),
        (("generate", "m.bjm", "--json", "--echo"), "--echo has no effect with --json"),
        (("generate", "m.bjm", "--repetition-window-bytes", 9), "no effect without --repetition-penalty"),
        (("generate", "m.bjm", "--repetition-allowed-bytes", 9), "no effect without --repetition-penalty"),
        (("surprise", "m.bjm", "x", "--json", "--format", "csv"), "--format has no effect with --json and no -o"),
        (("surprise", "m.bjm", "x", "--format", "terminal", "-o", "p.html"), "--format terminal is for the terminal, got -o"),
        *(((*words, "--force"), "--force has no effect without -o") for words in
          (("generate", "m.bjm"), ("surprise", "m.bjm", "x"), ("review", "m.bjm"))),
        *(((*words, "--threads", 100_000), "--threads: expected 1 to 1024, got 100000") for words in
          (("generate", "m.bjm"), ("bench", "--what", "codec"), ("compress", "x"), ("decompress", "x"))),
        (("generate", "m.bjm", "--num-samples", 65_537), "--num-samples: expected 1 to 65536, got 65537"),
        (("import-pr832", "m.pt", "-o", "x", "--jepa-chunk-size=-7"), "--jepa-chunk-size: expected 1 to 2048, got -7"),
        (("import-pr832", "m.pt", "-o", "x", "--xsa-last-n=-1"), "--xsa-last-n: expected 0 to 256, got -1"),
        (("import-pr832", "m.pt", "-o", "x", "--rope-dims=-2"), "--rope-dims: expected 0 to 16384, got -2"),
    ],
)  # fmt: skip
def test_options_that_would_be_ignored_or_cannot_be(refuses: Refuses, words: tuple[object, ...], said: str) -> None:
    assert said in refuses(CONFIG, *words)


def test_a_script_is_only_run_of_a_submission(refuses: Refuses, minimal_run: Path, minimal_artifact: Path) -> None:
    assert "is a run folder: only a submission folder" in refuses(CONFIG, "review", minimal_run, "--run")
    assert "is an artifact: only a submission folder" in refuses(CONFIG, "review", minimal_artifact, "--run")


def test_data_that_an_export_would_not_read(
    refuses: Refuses, command: Callable[..., Any], tmp_path: Path, minimal_run: Path, embedded_shards: Path
) -> None:
    words = ("export", minimal_run, "-o", tmp_path / "model.bjm", "--no-score", "--data", embedded_shards)
    assert "--data has no effect with --no-score" in refuses(CONFIG, *words)
    assert not (tmp_path / "model.bjm").exists()
    assert command(*words, "--compact").code == 0  # reads training text


def test_a_stride_that_an_export_cannot_have(refuses: Refuses, minimal_run: Path, tmp_path: Path) -> None:
    words = ("export", minimal_run, "-o", tmp_path / "m.bjm", "--score-bytes=20")
    assert "stride must be from 1 to the window 64, got 65 (use another --stride)" in refuses(
        CONFIG, *words, "--stride=65"
    )
    assert not (tmp_path / "m.bjm").exists()


def test_one_id_of_shards_is_nothing_to_score(
    refuses: Refuses, command: Callable, minimal_artifact: Path, embedded_shards: Path
) -> None:
    words = ("eval", minimal_artifact, "--max-bytes=1", "--data")
    assert "--max-bytes: expected 2 or more ids of shards, got 1" in refuses(CONFIG, *words, embedded_shards)
    assert command(*words, minimal_artifact).code == 0


def test_settings_are_checked_for_an_empty_file_too(refuses: Refuses, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for option in ("--block-bytes=0", "--window=0", "--hop=0"):
        assert f"{option[2:-2].replace('-', ' ')}: expected" in refuses(CONFIG, "compress", empty, option)
    assert list(tmp_path.iterdir()) == [empty]


@pytest.mark.parametrize("verb", ["bench", "train", "demo"])
def test_a_model_that_no_memory_holds(refuses: Refuses, embedded_shards: Path, tmp_path: Path, verb: str) -> None:
    words = {
        "bench": (),
        "train": ("--data", embedded_shards, "--out", tmp_path / "x"),
        "demo": ("--out", tmp_path / "x"),
    }
    said = refuses(1, verb, *minimal_with("--model.bigram-dim=2000000000000000"), *words[verb])
    assert "the memory is too small for this (use a smaller model, batch or window)" in said


@pytest.mark.integration
def test_a_demo_is_titled_by_its_preset_and_prints_its_sample_and_what_is_compared(
    command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, titles, run_demo = [], [], demo.demo

    def kept(*arguments: Any, **options: Any) -> demo.DemoResult:
        results.append(run_demo(*arguments, **options))
        return results[0]

    monkeypatch.setattr(demo, "demo", kept)
    monkeypatch.setattr("bytejepa.demo.plot_learning_curve", lambda *_, title: titles.append(title))
    words = ("ablation-pr832", *MINIMAL[1:], "--out", tmp_path / "demo", "--sample-bytes=8")
    done = command("demo", *words, "--json")
    assert titles == ["ablation-pr832 on State of the Union addresses"]
    record = json.loads(done.out)
    assert record["sample"].startswith("My fellow Americans, ")
    assert record["train_bytes_per_s"] * record["train_s"] == pytest.approx(record["train_bytes_read"])
    addresses = [len(document.data) for document in embedded_documents() if document.split == "val"]
    assert record["scored_bytes"] == sum(addresses)
    assert record["artifact_sliding_mixed_bpb"] < record["artifact_sliding_bpb"]
    assert record["compressed_text_bytes"] == sum(addresses) + 2 * (len(addresses) - 1) + 1
    print_result(results[0])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"validation addresses ({sum(addresses):,} bytes)" in shown
    assert f"as compress codes it: {record['artifact_sliding_mixed_bpb']:.4f} bpb" in shown
    assert f"compressors: the same with blank lines between them, {record['compressed_text_bytes']:,} bytes" in shown
