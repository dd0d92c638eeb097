"""Help is there at once, and what is misspelt is answered with the nearest name."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from bytejepa.cli import VERBS
from bytejepa.presets import PRESETS

READY = ("config", "prepare", "train", "export", "eval", "import-pr832")


def test_help_names_every_verb(command: Callable[..., Any]) -> None:
    outcome = command("--help")
    assert outcome.code == 0
    assert [verb for verb in VERBS if f"\n    {verb}" not in outcome.out] == []
    assert outcome.err == ""


def test_help_answers_at_once_without_torch() -> None:
    asked = "import sys; from bytejepa.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    loaded = "print('LOADED', sorted({'torch', 'numpy', 'tyro', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", asked + loaded], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_help_takes_less_than_0_3_seconds(process: Callable[..., Any]) -> None:
    import resource

    def seconds_of_children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    spent = []
    for _ in range(3):  # processor time, the least of three: other work on the machine does not count
        before = seconds_of_children()
        assert process("--help").code == 0
        spent.append(seconds_of_children() - before)
    assert min(spent) < 0.3, spent


def test_configurations_are_printed_without_torch(process: Callable[..., Any]) -> None:
    begun = time.process_time()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "bytejepa", "config", "tiny"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if line.endswith("| torch")]
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("verb", READY)
def test_every_verb_has_help_for_every_option(command: Callable[..., Any], verb: str) -> None:
    outcome = command(verb, "--help")
    assert outcome.code == 0
    assert f"bytejepa {verb}" in outcome.out
    assert "--json" in outcome.out


@pytest.mark.parametrize("verb", ["eval", "export", "compress", "decompress"])
def test_no_line_of_help_ends_within_a_sentence(
    command: Callable[..., Any], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    meanings = [line.strip("│ ") for line in command(verb, "--help").out.splitlines() if line.startswith(("│", "  "))]
    assert any(line.endswith("(default: False)") for line in meanings)
    assert [line for line in meanings if line[:1].islower()] == []


def test_help_of_train_names_the_settings_with_their_meaning(command: Callable[..., Any]) -> None:
    out = command("train", "tiny", "--help").out
    for setting in ("--model.num-layers", "--jepa.lambda-max", "--schedule.steps", "--data", "--out", "--resume"):
        assert setting in out, setting
    assert "Transformer blocks" in out


def test_version(command: Callable[..., Any]) -> None:
    assert command("--version").out == "bytejepa 0.1.0\n"


def test_an_unknown_verb_is_answered_with_the_nearest(refuses: Callable[..., str]) -> None:
    assert refuses(2, "trian") == "bytejepa: unknown verb 'trian' (did you mean 'train'?)\n"
    assert "verbs: demo, config" in refuses(2, "xyzzy")


def test_an_unknown_preset_is_answered_with_the_nearest(refuses: Callable[..., str]) -> None:
    for verb in ("config", "train"):
        assert refuses(2, verb, "tinny") == f"bytejepa {verb}: unknown preset 'tinny' (did you mean 'tiny'?)\n"


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (("config", "tiny", "--model.num-layer", "3"), "--model.num-layers"),
        (("train", "tiny", "--schedule.stesp", "3"), "--schedule.steps"),
        (("eval", "x.bjm", "--data", "y", "--windw", "3"), "--window"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(
    refuses: Callable[..., str], words: tuple[str, ...], nearest: str
) -> None:
    line = refuses(2, *words)
    assert line.startswith(f"bytejepa {words[0]}: unrecognized options: {words[-2]}")
    assert f"did you mean {nearest}" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("config", "tiny", "--model.num-layers", "many"),
            "--model.num-layers: expected a whole number, got 'many' (--model.num-layers INT Transformer blocks.",
        ),
        (("config", "tiny", "--schedule.steps", "1e3"), "--schedule.steps: expected a whole number or None, got '1e3'"),
        (("train", "tiny", "--max-wallclock", "5m"), "--max-wallclock: expected a number or None, got '5m'"),
        (("generate", "x.bjm", "-n", "1k"), "-n/--num-bytes: expected a whole number, got '1k'"),
        (("config", "tiny", "--jepa.gradient", "detachd"), "invalid choice 'detachd' for argument '--jepa.gradient'"),
        (
            ("config", "tiny", "--model.attention-windows", "x"),
            "--model.attention-windows: expected whole numbers or None, got 'x' (",
        ),
        (("config", "tiny", "--data.sequence-growth", "3"), "error parsing --data.sequence-growth: no type matching"),
        (("config", "tiny", "--model.num-layers"), "missing value for argument '--model.num-layers'"),
        (("eval", "model.bjm"), "missing --data PATH A folder of shards"),
        (("surprise", "x.bjm"), "missing FILE Any file"),
        (("eval", "model.bjm", "more", "--data", "x"), "unrecognized options: more (see bytejepa eval --help)"),
    ],
)
def test_words_that_cannot_be_parsed_are_refused_in_one_line(
    refuses: Callable[..., str], words: tuple[str, ...], said: str
) -> None:
    assert refuses(2, *words).startswith(f"bytejepa {words[0]}: {said}")


@pytest.mark.parametrize(
    ("words", "switches"),
    [
        (
            ("config", "tiny", "--model.document-masking", "True"),
            "--model.document-masking, or --model.no-document-masking",
        ),
        (("train", "tiny", "--model.smear", "off", "--out", "x"), "--model.smear, or --model.no-smear"),
        (("eval", "model.bjm", "--data", "x", "--json", "1"), "--json, or --no-json"),
    ],
)
def test_a_value_behind_a_switch_is_answered_with_both_its_names(
    refuses: Callable[..., str], words: tuple[str, ...], switches: str
) -> None:
    assert f"(a switch takes no value: {switches} for the contrary)" in refuses(2, *words)


@pytest.mark.parametrize(
    ("verb", "usage"),
    [("surprise", "MODEL FILE"), ("export", "RUN"), ("prepare", "SOURCE"), ("ablate", "PLAN"), ("review", "TARGET")],
)
def test_help_calls_what_a_verb_takes_by_name(command: Callable[..., Any], verb: str, usage: str) -> None:
    assert f"usage: bytejepa {verb} [-h] [OPTIONS] {usage}\n" in command(verb, "--help").out.replace("...\n", "\n")


def test_help_refers_to_nothing_that_users_do_not_have(command: Callable[..., Any]) -> None:
    for words in (("train", "--help"), ("config", "pr832"), ("config", "--explain")):
        assert "spec section" not in " ".join(command(*words).out.split())


def test_help_of_a_verb_with_a_preset_names_all(command: Callable[..., Any]) -> None:
    shown = " ".join(command("train", "tiny", "--help").out.split())
    assert "Shown here: tiny; other presets:" in shown
    assert [name for name in PRESETS if name not in shown] == []


def test_an_error_reads_the_same_where_boxes_cannot_be_drawn(process: Callable[..., Any]) -> None:
    expected = "bytejepa config: unrecognized options: --nope (see bytejepa config tiny --help)\n"
    for encoding in ("ascii", "utf-8"):
        done = process("config", "tiny", "--nope", PYTHONIOENCODING=encoding)
        assert (done.code, done.out, done.err) == (2, "", expected)


def test_a_value_out_of_range_is_refused_in_one_line(refuses: Callable[..., str]) -> None:
    line = refuses(2, "config", "tiny", "--model.num-layers", "0")
    assert line == "bytejepa config: model.num_layers: expected 1 to 256, got 0\n"


def test_no_verb_at_all_shows_the_usage(command: Callable[..., Any]) -> None:
    outcome = command()
    assert outcome.code == 2
    assert "usage: bytejepa" in outcome.err
