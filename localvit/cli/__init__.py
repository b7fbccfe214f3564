"""Command line: a table from verb to module.

A verb's module has `Options`, a frozen dataclass that tyro turns into flags, and `run(options) -> int`, which
returns the exit code. It is imported when its verb is used, so `localvit --help` does not wait for torch.

Exit codes: 0 success; 1 failure after the start; 2 wrong use, with one line on stderr and nothing written;
130 interrupted (0 if the same command resumes: `train`, `predict` into a file); 141 the reader of the output
ended, as `| head` does. Unexpected errors keep their traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import select
import sys
from collections.abc import Sequence

from localvit.cli.arguments import UsageError, disk_message, parse
from localvit.errors import Failed, printable
from localvit.version import __version__

VERBS = {
    "demo": ("localvit.cli.demo", "compare a small model with and without locality, and write a report"),
    "study": ("localvit.cli.study", "run controlled experiments: list, show, run, report, compare, export"),
    "models": ("localvit.cli.models", "list models with locality, their cost and published accuracy"),
    "train": ("localvit.cli.train", "train a model on images and test it"),
    "plan": ("localvit.cli.plan", "estimate a training run: steps, hours, memory, data rate"),
    "data": ("localvit.cli.data", "check data: splits, classes, overlap, duplicates"),
    "evaluate": ("localvit.cli.evaluate", "measure a trained model on images"),
    "predict": ("localvit.cli.predict", "classify images with a trained model"),
    "export": (
        "localvit.cli.export",
        "export a trained model to ONNX Runtime, OpenVINO or torch, and check it",
    ),
    "bench": ("localvit.cli.bench", "compare the speed of two models on this machine"),
    "doctor": ("localvit.cli.doctor", "print what a bug report needs: versions, processor, kernels, extras"),
}
"""Verb -> its module and its line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: Arguments after the program's name; `None` takes those of the process.

    Returns:
        The exit code.
    """
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8 keep their bytes
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except (UsageError, Failed) as error:
        _flush()
        print(f"localvit: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        _flush()
        print("localvit: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        broken = isinstance(error, BrokenPipeError)
        if broken and not _reader_ended():
            raise
        _drop_output()
        if broken:
            return 141
        print(f"localvit: {disk_message(error)}", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"localvit {__version__}")
        return 0
    verb = _verb(arguments[0])
    module = importlib.import_module(VERBS[verb][0])
    options = parse(module.Options, f"localvit {verb}", arguments[1:], getattr(module, "HELP", None))
    if options is None:
        return 0
    from localvit.data import disable_ghostscript

    disable_ghostscript()
    return int(module.run(options))


def _reader_ended() -> bool:
    """Return whether the reader of the standard output has ended."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _flush() -> None:
    """Write what is left for the standard output, or drop it where nothing can be written."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Drop what is left for the standard output, which the interpreter would flush at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _verb(name: str) -> str:
    if name in VERBS:
        return name
    near = difflib.get_close_matches(name, VERBS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(VERBS)}"
    raise UsageError(f"the verb {name!r} does not exist; {hint}")


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    usage, hint = "usage: localvit VERB [options]", "localvit VERB --help shows the options of a verb."
    return "\n".join([usage, "", *lines, "", hint])
