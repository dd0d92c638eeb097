"""Words that contradict each other, and options that would be ignored: one line, exit code 2, before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest

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
