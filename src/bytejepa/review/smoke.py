"""A smoke test of a foreign script on the CPU: in a subprocess, bounded, without network. Torch-free on this side.

What bounds it: a copy of the folder in a temporary place, resource limits on memory, CPU seconds, file size and open
files, a wall clock, an environment without our variables, and, where the system allows it, a network namespace of its
own (`unshare`). Sockets and subprocesses are blocked inside Python as well. This is no prison for hostile code; the
finding says which isolation was achieved.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bytejepa.review.findings import Evidence, Finding, Status, Weight

WALL_S = 120.0
MEMORY_BYTES = 8 << 30
FILE_BYTES = 64 << 20
MAX_COPIED_BYTES = 64 << 20
_HARNESS = Path(__file__).with_name("smoke_harness.py")
_LIMITS = (
    "import resource as r,sys,os;"
    "r.setrlimit(r.RLIMIT_AS,({memory},)*2);r.setrlimit(r.RLIMIT_FSIZE,({file},)*2);r.setrlimit(r.RLIMIT_CPU,({cpu},)*2);"
    "r.setrlimit(r.RLIMIT_NOFILE,(256,)*2);r.setrlimit(r.RLIMIT_CORE,(0,)*2);os.execv(sys.executable,[sys.executable,*sys.argv[1:]])"
)


def isolation() -> list[str]:
    """Return the command that puts what follows into a network namespace of its own, [] where that is not possible."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    for options in (["-rn"], ["-n"]):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run([unshare, *options, "true"], capture_output=True, timeout=10, check=False)
            if done.returncode == 0:
                return [unshare, *options, "--"]
    return []


def run_script(
    script: Path, root: Path, settings: dict[str, str], *, wall_s: float = WALL_S, memory_bytes: int = MEMORY_BYTES
) -> dict[str, Any]:
    """Return what the harness reached: `stage` up to "done", figures, `isolation`, and `error` if it did not get there."""
    prefix = isolation()
    with tempfile.TemporaryDirectory(prefix="bytejepa-smoke-") as folder:
        place = Path(folder)
        _copy(root, place / "submission")
        output = place / "result.json"
        limits = _LIMITS.format(memory=memory_bytes, file=FILE_BYTES, cpu=int(wall_s) + 5)
        copied = place / "submission" / script.relative_to(root)
        command = [*prefix, sys.executable, "-c", limits, "-W", "ignore", str(_HARNESS), str(copied), str(output)]
        error = _run(command, place, _environment(settings, place), wall_s)
        result: dict[str, Any] = {"stage": "start"}
        with contextlib.suppress(OSError, ValueError):
            result = json.loads(output.read_text(encoding="utf-8"))
    namespace = "own network namespace" if prefix else "no network namespace available"
    sockets = "blocked sockets" if result.get("sockets_blocked") else "sockets not blocked"
    result["isolation"] = f"{namespace}, {sockets}, resource limits"
    if error and result.get("stage") != "done":
        result["error"] = error.replace(folder, "")
    return result


def _environment(settings: dict[str, str], place: Path) -> dict[str, str]:
    safe = {name: value for name, value in settings.items() if not name.startswith(("LD_", "PYTHON", "PATH", "HOME"))}
    return safe | {
        "PATH": "/usr/bin:/bin", "HOME": str(place), "TMPDIR": str(place), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1",
    }  # fmt: skip


def _copy(root: Path, place: Path) -> None:
    """Copy the folder's small files, so that nothing of the original can change."""
    place.mkdir()
    left = MAX_COPIED_BYTES
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= left:
            left -= path.stat().st_size
            target = place / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _run(command: list[str], place: Path, environment: dict[str, str], wall_s: float) -> str:
    """Run the command; return the end of what it complained about, "" if it ended well."""
    with (place / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            command, cwd=place / "submission", env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=errors, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=wall_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {wall_s:g} s"
    text = (place / "stderr").read_bytes()[-4000:].decode("utf-8", "replace").strip().splitlines()
    if code == 0:
        return ""
    last = text[-1][:300] if text else ""
    return last or f"ended with status {code}"


def smoke_findings(script: Path, root: Path, settings: dict[str, str]) -> tuple[list[Finding], dict[str, Any]]:
    """Return the finding of the smoke test and its line for the report's head. The script runs, outside our process."""
    result = run_script(script, root, settings)
    evidence = (Evidence(file=script.name, text=f"isolation: {result['isolation']}"),)
    if result.get("stage") == "done":
        line = (
            f"import OK in {result['import_s']}s, dim={result['width']}, layers={result['layers']}, vocab={result['vocabulary']}, "
            f"params={result['parameters']:,}, code={result['code_bytes']} B, loss={result['forward_loss_nats']}, SMOKE_TEST_PASS"
        )
        return [Finding(check="smoke.cpu", status=Status.PASS, summary=line, evidence=evidence, figures=result)], {
            "smoke": line
        }
    line = f"{result.get('error', 'it did not finish')} (reached: {result['stage']})"
    imported = result["stage"] not in ("start", "prepared")
    # a script may well need a GPU to build its model; one that cannot even be imported needs its author
    status, weight = (Status.UNKNOWN, Weight.NOTE) if imported else (Status.FAIL, Weight.AUTHOR)
    word = "SMOKE_TEST_INCOMPLETE" if imported else "IMPORT_FAIL"
    finding = Finding(
        check="smoke.cpu", status=status, weight=weight, summary=f"{word}: {line}", evidence=evidence, figures=result
    )
    return [finding], {"smoke": f"{word}: {line}"}
