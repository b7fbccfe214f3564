"""The kernels of ``native.cpp``, compiled for this machine when they are first needed.

A C++ compiler takes some three seconds, once: the library is kept in the user's cache folder, under a name
that tells source, compiler and kind of processor apart.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from itertools import product
from pathlib import Path

SOURCE = Path(__file__).with_name("native.cpp")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-Wno-psabi")
# Tried in this order: not every compiler has OpenMP, or the first spelling of "this machine".
_VARIANTS = tuple(product((("-march=native",), ("-mcpu=native",)), (("-fopenmp",), ())))


class Unavailable(Exception):
    """Why there are no native kernels."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels; ``None``, after a warning that says why, where they cannot be had."""
    try:
        return load(cache_folder())
    except (Unavailable, OSError) as error:
        warnings.warn(
            f"localvit's native kernels are not used, PyTorch's operators take their place: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def cache_folder() -> Path:
    """``localvit`` in ``XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "localvit"


def load(folder: Path) -> ctypes.CDLL:
    """The library in ``folder``, compiled if it is not there.

    Raises:
        Unavailable: if there is no compiler, or none of its variants compiles the source.
        OSError: if ``folder`` cannot be written, or the library not be loaded.
    """
    compiler = _compiler()
    sources = b"".join(file.read_bytes() for file in [SOURCE, *sorted(SOURCE.parent.glob("*.h"))])
    name = hashlib.sha256(sources + repr(_FLAGS).encode() + _identity(compiler)).hexdigest()[:24]
    path = folder / f"native-{name}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    """``CXX`` of the environment, or the first that is installed."""
    asked = shlex.split(os.environ.get("CXX", ""))
    found = [path for name in (asked[:1] or _COMPILERS) if (path := shutil.which(name))]
    if not found:
        raise Unavailable(f"no C++ compiler is installed (looked for {', '.join(asked[:1] or _COMPILERS)})")
    return [found[0], *asked[1:]]


def _identity(compiler: list[str]) -> bytes:
    """What tells this compiler, and the processor that it compiles for, from others."""
    version = _run([*compiler, "--version"]).stdout
    for arch, _ in _VARIANTS:
        macros = _run([*compiler, *arch, "-dM", "-E", "-x", "c++", os.devnull])
        if macros.returncode == 0:
            return repr((compiler, version, macros.stdout)).encode()
    raise Unavailable(f"{compiler[0]} does not take {_VARIANTS[0][0][0]}")


def _compile(compiler: list[str], path: Path) -> None:
    """Under another name first: another process may be at the same."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    message = ""
    try:
        for arch, openmp in _VARIANTS:
            done = _run([*compiler, *_FLAGS, *arch, *openmp, str(SOURCE), "-o", temporary])
            if done.returncode == 0:
                os.replace(temporary, path)
                return
            message = message or done.stderr.strip().partition("\n")[0]
        raise Unavailable(f"{compiler[0]} does not compile {SOURCE.name}: {message}")
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
