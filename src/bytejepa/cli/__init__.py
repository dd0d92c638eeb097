"""The command line: verbs to functions. Parses, prints, and turns errors into one line and an exit code.

`main` knows the verbs by name only and imports the module of the one that is asked for, so that `bytejepa --help`
answers at once. A verb's module holds a dataclass whose fields are its options; tyro builds the parser from it.

Exit codes: 0 done, 1 other failure, 2 impossible or unknown setting or an output that exists, 3 data, 4 run or
checkpoint, 5 artifact, 6 compressed file, 7 stopped by a signal after a checkpoint, 10 review not clean, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import sys

from bytejepa.errors import BytejepaError, ConfigError, error_of_os, nearest_hint

VERBS = {
    "demo": ("demo", "Demo", "The whole story on the embedded corpus: shards, training, artifact, score, sample."),
    "config": ("config", "Config", "Print a preset, with units and ranges."),
    "prepare": ("prepare", "Prepare", "Turn text, JSONL, Parquet or sp1024 shards into byte260 shards."),
    "train": ("train", "Train", "Train a model, or go on with a run."),
    "export": ("export", "Export", "Pack a run into an artifact and score every stage of it."),
    "eval": ("eval", "Evaluate", "Score an artifact or a run in bits per byte."),
    "import-pr832": ("import_pr832", "ImportPr832", "Turn the reference's own model file into an artifact."),
    "generate": ("generate", "Generate", "Write text with a model."),
    "surprise": ("surprise", "Surprise", "Show what every byte of a file costs."),
    "ablate": ("ablate", "Ablate", "Run a study: what difference makes a difference, with statistics."),
    "compress": ("compress", "Compress", "Compress any file with a model, losslessly."),
    "decompress": ("compress", "Decompress", "Restore a compressed file, on any machine."),
    "bench": ("bench", "Bench", "Measure speed against a plain baseline."),
    "report": ("report", "Report", "Make a page of runs or a study: curves, losses, gradients, sizes."),
    "submission": ("submission", "Submission", "Make the challenge's folder out of finished runs."),
    "review": ("review", "Review", "Check a submission, run or artifact against rules and facts."),
}
"""Verb: (module in this package, class in it, one line of help)."""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        hint = nearest_hint(arguments[0], VERBS, label="verbs")
        print(f"bytejepa: unknown verb {arguments[0]!r} ({hint})", file=sys.stderr)
        return ConfigError.exit_code
    parser = argparse.ArgumentParser(
        prog="bytejepa", description="Byte-level language models under a byte budget.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"bytejepa {importlib.metadata.version('bytejepa')}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (_, _, help_line) in VERBS.items():
        # the verb's own parser, built by tyro once its module is imported, reads what follows
        verbs.add_parser(verb, help=help_line, add_help=False)
    chosen = parser.parse_args(arguments[:1])
    return _run(chosen.verb, arguments[1:])


def _run(verb: str, rest: list[str]) -> int:
    from bytejepa.cli.device import memory_errors_with
    from bytejepa.cli.parsing import parse

    module_name, class_name, _ = VERBS[verb]
    try:
        with memory_errors_with("use a smaller model, batch or window"):
            verb_class = getattr(importlib.import_module(f"bytejepa.cli.{module_name}"), class_name)
            code = parse(verb_class, verb, rest).run_command() or 0
            sys.stdout.flush()  # here a failure has a line and a code; at the end of the process it has neither
            return code
    except BytejepaError as problem:
        _tell(verb, problem)
        return problem.exit_code
    except KeyboardInterrupt:
        print(f"bytejepa {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output went away, as `| head` does; nothing is wrong
        _drop_output()
        return 0
    except SystemExit as left:
        # rich ends the process with 1 then
        if isinstance(left.__context__, BrokenPipeError):
            return 0
        raise
    except OSError as problem:
        # a full disk under stdout or a log, a device that fails: nothing that a traceback explains
        _drop_output()
        _tell(verb, error_of_os(problem))
        return BytejepaError.exit_code


def _tell(verb: str, problem: BytejepaError) -> None:
    """Print an error's line, once for all ranks that share it."""
    rank = int(os.environ.get("RANK", "0"))
    if problem.rank is not None:
        from bytejepa.training.distributed import leave

        if rank == 0:
            print(f"bytejepa {verb}: {problem}", file=sys.stderr, flush=True)
        leave(together=True)
    elif _is_joined() or int(os.environ.get("LOCAL_RANK", "0")) == 0:
        # before ranks know of each other, those of one machine fail alike
        where = f"rank {rank}: " if rank else ""
        print(f"bytejepa {verb}: {where}{problem}", file=sys.stderr)


def _is_joined() -> bool:
    """Return whether this process has joined other ranks, without importing torch to know it."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _drop_output() -> None:
    """Send what is still to be written to stdout nowhere, so that leaving does not fail on it again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
    """Entry point of the `bytejepa` command."""
    from bytejepa.cli.process import interrupt_imports, open_streams

    open_streams()
    interrupt_imports()
    sys.exit(main())
