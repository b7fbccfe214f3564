"""Compilation of the kernels in `native.cpp` for this machine, at their first use.

A C++ compiler takes some three seconds, once: the library stays in the user's cache folder, under a name made
from the source, the compiler and the kind of processor. Loading a library runs it, so a library that another
user could have written is not loaded: this process then compiles its own. A library ends with a digest of its
name and content, so that one that was truncated or changed is compiled again.
"""

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from functools import lru_cache
from itertools import product
from pathlib import Path

from localvit.acceleration.kernels import VARIABLE, plain_kernels
from localvit.errors import ConfigError

SOURCE = Path(__file__).with_name("native.cpp")
_COMPILERS = ("c++", "g++", "clang++")
_DIGEST = 32  # bytes of SHA-256; a loader of libraries ignores what follows their last section
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-Wno-psabi")
# Tried in this order: not every compiler has OpenMP or the first flag for this machine.
_VARIANTS = tuple(product((("-march=native",), ("-mcpu=native",)), (("-fopenmp",), ())))


class Unavailable(Exception):
    """Reason for missing native kernels."""


class Untrusted(Exception):
    """Folder or library that another user could have changed."""


_PROBLEMS = (Unavailable, Untrusted, OSError, RuntimeError)  # the last one: no home directory


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Load the compiled kernels; `None`, after a warning with the reason, if that is impossible."""
    try:
        return load(cache_folder())
    except _PROBLEMS as error:
        warnings.warn(
            f"localvit's native kernels are not used; PyTorch's operators replace them: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def native_status() -> dict[str, str]:
    """Return compiler, library and cache folder of the native kernels, each with its problem, if any."""
    facts: dict[str, str] = {}
    try:
        compiler = _compiler()
        facts["compiler"] = (
            f"{shlex.join(compiler)}: {_run([*compiler, '--version']).stdout.partition(chr(10))[0]}"
        )
    except Unavailable as error:
        facts["compiler"] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            use = (
                f"not in use: {VARIABLE}=plain"
                if plain_kernels()
                else f"in use, {load(cache_folder())._name}"
            )
        except (*_PROBLEMS, ConfigError) as error:
            use = f"not in use: {error}"
    facts["native kernels"] = "; ".join([use, *(str(warning.message) for warning in caught)])
    try:
        status = os.stat(cache_folder())
        facts["cache folder"] = f"{cache_folder()}, user {status.st_uid}, mode {status.st_mode & 0o777:o}"
    except (OSError, RuntimeError) as error:
        facts["cache folder"] = str(error)
    return facts


def cache_folder() -> Path:
    """Return `localvit` in `XDG_CACHE_HOME`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "localvit"


def load(folder: Path) -> ctypes.CDLL:
    """Load the library in `folder`; compile it if it is missing.

    If others can change the folder or the library, or the folder cannot be written, the library is compiled
    in a private folder, with a warning.

    Raises:
        Unavailable: if there is no compiler, or none of its variants compiles the source.
        OSError: if no folder can be written, or the library cannot be loaded.
    """
    compiler = _compiler()
    sources = b"".join(file.read_bytes() for file in [SOURCE, *sorted(SOURCE.parent.glob("*.h"))])
    name = hashlib.sha256(sources + repr(_FLAGS).encode() + _identity(compiler)).hexdigest()[:24]
    file = f"native-{name}.so"
    try:
        path = _trusted(compiler, folder / file)
    except (Untrusted, OSError) as error:
        warnings.warn(
            f"localvit's native kernels are compiled for this process only: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
        path = _trusted(compiler, private_folder() / file)
    return ctypes.CDLL(str(path))


@lru_cache(maxsize=1)
def private_folder() -> Path:
    """Create a private folder, which is removed when this process ends."""
    folder, owner = Path(tempfile.mkdtemp(prefix="localvit-")), os.getpid()  # mode 700

    def remove() -> None:
        if os.getpid() == owner:  # not in a fork
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _trusted(compiler: list[str], path: Path) -> Path:
    """Compile the library to `path` unless it is there, and return `path`.

    Raises:
        Untrusted: if another user can change the library, its folder or a folder above.
        OSError: if the folder cannot be written.
    """
    folder = path.parent
    for missing in [each for each in (*reversed(folder.parents), folder) if not os.path.lexists(each)]:
        # Whatever the umask. Another process may be making it.
        missing.mkdir(mode=0o700 if missing == folder else 0o755, exist_ok=True)
    _check_parents(folder.absolute())
    _check_owner(folder, "folder")
    if os.path.lexists(path):
        _check_owner(path, "file")
    if not path.exists() or _seal(path.name, (content := path.read_bytes())[:-_DIGEST]) != content[-_DIGEST:]:
        _compile(compiler, path)
        _check_owner(path, "file")
    return path


def _seal(name: str, library: bytes) -> bytes:
    """Return the digest that ends a library; its name stands for source, compiler and flags."""
    return hashlib.sha256(name.encode() + library).digest()


def _check_parents(path: Path) -> None:
    """Refuse a folder above `path` that users other than root own or can change, also behind links.

    A folder with the sticky bit (`/tmp`) is accepted: only the owner of a file in it can rename that file.
    """
    for parent in reversed(path.parents):
        status = os.lstat(parent)
        if hasattr(os, "geteuid") and status.st_uid not in (0, os.geteuid()):
            raise Untrusted(
                f"folder {str(parent)!r} belongs to user {status.st_uid}, not {os.geteuid()} or root; set "
                "XDG_CACHE_HOME to a folder of your own"
            )
        if stat.S_ISLNK(status.st_mode):
            _check_parents(parent.parent / os.readlink(parent) / path.name)
        elif os.name == "posix" and status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise Untrusted(
                f"folder {str(parent)!r} can be changed by other users (mode {status.st_mode & 0o777:o}); "
                "run chmod go-w on it, or set XDG_CACHE_HOME to a folder of your own"
            )


def _check_owner(path: Path, kind: str) -> None:
    """Refuse a file or folder that others own or can change."""
    status = os.lstat(path)
    mode = status.st_mode
    user = os.geteuid() if hasattr(os, "geteuid") else status.st_uid  # Windows has no user ids
    if stat.S_ISLNK(mode):
        raise Untrusted(f"{kind} {str(path)!r} is a link; replace it with a {kind}")
    if not (stat.S_ISDIR(mode) if kind == "folder" else stat.S_ISREG(mode)):
        raise Untrusted(f"{kind} {str(path)!r} is not a {kind}; remove it")
    if status.st_uid != user:
        raise Untrusted(f"{kind} {str(path)!r} belongs to user {status.st_uid}, not {user}; remove it")
    if os.name == "posix" and mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Untrusted(
            f"{kind} {str(path)!r} can be changed by other users (mode {mode & 0o777:o}); remove it, or run "
            "chmod go-w on it if you trust its content"
        )


def _compiler() -> list[str]:
    """Return `CXX` of the environment, or the first compiler that is installed."""
    asked = shlex.split(os.environ.get("CXX", ""))
    found = [path for name in (asked[:1] or _COMPILERS) if (path := shutil.which(name))]
    if not found:
        raise Unavailable(f"no C++ compiler is installed (looked for {', '.join(asked[:1] or _COMPILERS)})")
    return [found[0], *asked[1:]]


def _identity(compiler: list[str]) -> bytes:
    """Identify the compiler and the processor that it compiles for."""
    version = _run([*compiler, "--version"]).stdout
    for arch, _ in _VARIANTS:
        macros = _run([*compiler, *arch, "-dM", "-E", "-x", "c++", os.devnull])
        if macros.returncode == 0:
            return repr((compiler, version, macros.stdout)).encode()
    raise Unavailable(f"{compiler[0]} does not accept {_VARIANTS[0][0][0]}")


def _compile(compiler: list[str], path: Path) -> None:
    """Compile the library under a temporary name, because another process may be compiling it too."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    message = ""
    try:
        for arch, openmp in _VARIANTS:
            done = _run([*compiler, *_FLAGS, *arch, *openmp, str(SOURCE), "-o", temporary])
            if done.returncode == 0:
                content = Path(temporary).read_bytes()
                Path(temporary).write_bytes(content + _seal(path.name, content))
                os.chmod(temporary, 0o700)  # the linker goes by the umask
                os.replace(temporary, path)
                return
            message = message or done.stderr.strip().partition("\n")[0]
        raise Unavailable(f"{compiler[0]} does not compile {SOURCE.name}: {message}")
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=300, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
