"""Every command of the README runs, as it stands there but for the size of the run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import forked
from conftest import minimal_with

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]
SMALL = minimal_with("--schedule.steps=4", "--model.num-layers=4")[1:]
MAKE = [command for command in COMMANDS if command.startswith("make")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bytejepa.data.corpus import embedded_documents

    folder = tmp_path_factory.mktemp("readme")
    documents = embedded_documents()[:30]
    lines = [json.dumps({"id": d.id, "text": d.data[:1500].decode(errors="ignore")}) for d in documents]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "notes.txt").write_bytes(documents[0].data[:3000])
    (folder / "plan.toml").write_text(plan_of_the_docs())
    return folder


def plan_of_the_docs() -> str:
    """The plan file that docs/ablations.md shows, with runs that take a moment."""
    text = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    (plan,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    for shown, small in (("steps = 400", "steps = 2"), ("validation_bytes = 65536", "validation_bytes = 600")):
        assert plan.count(shown) == 1, f"docs/ablations.md no longer shows {shown!r}: the run would not be small"
        plan = plan.replace(shown, small)
    return plan


def words_of(command: str) -> list[str]:
    """The command's words: settings that make it small added, several nodes made one."""
    for name, value in {"$NODE_RANK": "0", "$HEAD": "127.0.0.1", "$SLURM_JOB_ID": "7"}.items():
        command = command.replace(name, value)
    command = re.sub(r"^srun .*? torchrun", "torchrun", command)
    command = command.replace("--nnodes=2", "--nnodes=1").replace("--nproc_per_node=8", "--nproc_per_node=2")
    words = shlex.split(re.sub(r" --schedule\.steps \d+", "", command))
    if " train " in command and "--resume" not in command:
        words += [*SMALL, "--force"]
    if " train golf-tiny " in command:
        words += ["--model.chunk-blocks", "1", "2", "--model.ngram-rows=64"]
    if " bench " in command:
        words += [*SMALL, *([] if "--what" in command else ["--steps=1"])]
    if " ablate " in command and "--list" not in command:
        words += ["--seeds", "1", "2"]
    if " submission " in command:
        words += ["--score-bytes=2000"]
    return words


def test_the_readme_shows_every_verb_and_both_make_commands() -> None:
    from bytejepa.cli import VERBS

    assert MAKE == ["make demo", "make test"]
    assert {verb for verb in VERBS if f"bytejepa {verb}" not in README} <= {"demo"}


@pytest.mark.integration
@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make")])
def test_command(command: str, workplace: Path) -> None:
    program, *words = words_of(command)
    assert program in ("bytejepa", "torchrun")
    done = forked.run(words, place=workplace, program=forked.TORCHRUN if program == "torchrun" else forked.BYTEJEPA)
    expected = 10 if " review " in command else 0  # a run of four steps is not clean, and review says so
    assert done.returncode in (0, expected), done.stderr[-3000:]
    assert "Traceback" not in done.stderr


def test_python_names_of_the_readme_exist() -> None:
    import bytejepa
    from bytejepa.interop import pr832

    assert callable(bytejepa.load)
    assert callable(bytejepa.score)
    assert callable(bytejepa.ByteLM.logits)
    assert callable(pr832.build)
    assert callable(pr832.reference_parameters)


@pytest.mark.integration
def test_public_names_need_one_import_and_torch_only_when_used() -> None:
    asked = (
        "import sys, bytejepa; print('torch' in sys.modules); from bytejepa import *; load, score, compress, decompress;"
        "print(bytejepa.interop.pr832.build.__name__, bytejepa.interop.pr832.reference_parameters.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False", "build reference_parameters"]


def test_make_commands_run_what_they_say() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    planned = {
        command: subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for command in MAKE
    }
    assert "bytejepa demo" in planned["make demo"]
    assert "pytest" in planned["make test"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bytejepa", "demo", "--out", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)
    assert record["artifact_sliding_bpb"] < record["xz_bpb"]
    assert record["quantization_loss_bpb"] < 0.01
    assert record["scored_bytes"] > 400_000
    assert (tmp_path / "demo" / "learning_curve.png").stat().st_size > 10_000
    if record["steps"] > 2000:  # a busy machine trains fewer steps within the wallclock
        assert record["artifact_sliding_bpb"] <= 1.85
        assert record["smaller_than_xz"] >= 0.15
