"""The command line: a table from verb to module, each a dataclass of options and a function.

A verb's module has `Options`, a frozen dataclass that tyro turns into flags, and
``run(options) -> int``, which returns the exit code. It is imported when its verb is used, so that
``localvit --help`` does not wait for torch.

Exit codes: 0 done; 1 it began and could not be finished; 2 wrong use, with one line on stderr and nothing
written; 130 interrupted (0 where the same command goes on with what is kept: `train`, `predict` into a
file); 141 the reader of the output ended, as `| head` does. Anything unforeseen keeps its traceback.
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

from localvit.cli.arguments import Failure, UsageError, disk_message, parse, printable

VERBS = {
    "demo": ("localvit.cli.demo", "does locality help? a small controlled comparison, with a report"),
    "study": ("localvit.cli.study", "controlled experiments: list, show, run, report, compare, export"),
    "models": ("localvit.cli.models", "list models with locality: cost, published accuracy"),
    "train": ("localvit.cli.train", "train a model on pictures and report it on a test split"),
    "plan": ("localvit.cli.plan", "say what a training run will take: updates, hours, memory, data"),
    "data": ("localvit.cli.data", "check data: splits, classes, images that are in two splits, copies"),
    "evaluate": ("localvit.cli.evaluate", "measure a trained model on pictures"),
    "predict": ("localvit.cli.predict", "say what a trained model sees in pictures"),
    "export": ("localvit.cli.export", "write a trained model for ONNX Runtime, OpenVINO or torch, checked"),
    "bench": (
        "localvit.cli.bench",
        "how fast is a model here, against another? ratio, memory, share of the peak",
    ),
    "doctor": ("localvit.cli.doctor", "print what a bug report needs: versions, processor, kernels, extras"),
}
"""Verb -> the module that does it, and its line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: The arguments after the program's name; ``None`` takes the process's own.

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
    except (UsageError, Failure) as error:
        print(f"localvit: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
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
        print(_version())
        return 0
    verb = _verb(arguments[0])
    module = importlib.import_module(VERBS[verb][0])
    options = parse(module.Options, f"localvit {verb}", arguments[1:])
    if options is None:
        return 0
    from localvit.data import disable_ghostscript

    disable_ghostscript()
    return int(module.run(options))


def _reader_ended() -> bool:
    """Return whether nobody reads the standard output any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_output() -> None:
    """Drop what is left for the standard output, which the interpreter would flush at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _verb(name: str) -> str:
    if name in VERBS:
        return name
    near = difflib.get_close_matches(name, VERBS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(VERBS)}"
    raise UsageError(f"there is no verb {name!r}; {hint}")


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: localvit VERB [options]",
            "",
            *lines,
            "",
            "localvit VERB --help tells the options of a verb.",
        ]
    )


def _version() -> str:
    from localvit.version import __version__

    return f"localvit {__version__}"
