"""The native kernels are built, or plain modules are used and a warning says why."""

import copy
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from localvit import LocalityConfig
from localvit.acceleration.native import build as native_build, mix

from .steps import GRID, assert_close, feed_forward, images, plain_step, spy, step

ROOT = Path(__file__).parents[2]


def _has_compiler() -> bool:
    """A source that it does not compile is no reason to skip a test."""
    try:
        native_build._compiler()
    except native_build.Unavailable:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler is installed")


@pytest.fixture
def hasty_compiler(monkeypatch, tmp_path_factory):
    """A compiler that does not optimize, in a quarter of the time."""
    script = tmp_path_factory.mktemp("compiler") / "hasty"
    script.write_text(f'#!/bin/sh\nexec {native_build._compiler()[0]} "$@" -O0\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


@pytest.fixture
def fresh():
    """`library` as in a new process."""
    native_build.library.cache_clear()
    yield
    native_build.library.cache_clear()


def test_without_a_compiler_a_warning_says_so_once(monkeypatch, fresh):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    ffn, tokens = feed_forward(), images()
    used = spy(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"native kernels are not used.*looked for no-such-compiler\)"):
        first = step(ffn, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(step(ffn, tokens), first, rtol=0, atol=0)
    assert not used


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "does not accept -march=native"),
        ('[ "$1" != -std=c++17 ] || { echo broken >&2; exit 1; }', "does not compile native.cpp: broken"),
    ],
)
def test_a_compiler_that_fails(monkeypatch, tmp_path, script, message):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(native_build.Unavailable, match=message):
        native_build.load(tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_no_folder_that_can_be_written(monkeypatch, tmp_path, fresh):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native_build, "private_folder", lambda: tmp_path / "cache" / "private")
    monkeypatch.setattr(native_build, "_identity", lambda compiler: b"")
    monkeypatch.setattr(native_build, "_compiler", lambda: ["c++"])
    with (
        pytest.warns(RuntimeWarning, match="compiled for this process only"),
        pytest.warns(RuntimeWarning, match="native kernels are not used"),
    ):
        assert native_build.library() is None


def test_a_cache_that_cannot_be_written(fake_compiler, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(RuntimeWarning, match="compiled for this process only: .*cache"):
        library = native_build.load(tmp_path / "cache" / "localvit")
    assert fake_compiler == [library]


@needs_compiler
def test_compiled_once(hasty_compiler, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        native_build, "_run", lambda command, run=native_build._run: calls.append(command) or run(command)
    )
    native_build.load(tmp_path)
    (library,) = tmp_path.iterdir()
    assert any(str(native_build.SOURCE) in command for command in calls)
    calls.clear()
    native_build.load(tmp_path)
    assert not any(str(native_build.SOURCE) in command for command in calls)
    assert list(tmp_path.iterdir()) == [library]


@needs_compiler
@pytest.mark.parametrize("changed", ["native.cpp", "vectors.h"])
def test_a_change_of_the_source_is_another_library(monkeypatch, tmp_path, changed):
    sources = tmp_path / "native"
    shutil.copytree(native_build.SOURCE.parent, sources)
    monkeypatch.setattr(native_build, "SOURCE", sources / "native.cpp")
    monkeypatch.setattr(native_build, "_compile", lambda compiler, path: _write_library(path))
    monkeypatch.setattr(native_build.ctypes, "CDLL", lambda path: path)
    one = native_build.load(tmp_path)
    assert native_build.load(tmp_path) == one
    with (sources / changed).open("a") as file:
        file.write("\n")
    assert native_build.load(tmp_path) != one


def check(monkeypatch, kernels: object) -> None:
    """A library computes what the plain modules do, in training and in inference."""
    monkeypatch.setattr(mix, "library", lambda: kernels)
    for act in ("none", "relu", "relu6", "hardswish"):
        ffn = feed_forward(LocalityConfig(activation=(act, "hardswish")), hidden_dim=48)
        tokens = images()
        assert_close(step(ffn, tokens), plain_step(monkeypatch, ffn, tokens))
        with torch.no_grad():
            got = ffn.eval()(tokens, GRID)
            want = copy.deepcopy(ffn).double()(tokens.double(), GRID)
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_without_openmp(monkeypatch, tmp_path):
    """As with compilers that do not have it; threads are not used then."""
    monkeypatch.setattr(native_build, "_VARIANTS", native_build._VARIANTS[1:2])
    torch.set_num_threads(3)
    check(monkeypatch, native_build.load(tmp_path))


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="options of compilers for x86")
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors(monkeypatch, tmp_path, without):
    monkeypatch.setenv("CXX", f"{native_build._compiler()[0]} {without}")
    check(monkeypatch, native_build.load(tmp_path))


@needs_compiler
def test_several_processes_at_once(hasty_compiler, tmp_path):
    code = "from localvit.acceleration.native.build import library; assert library() is not None"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=environment) for _ in range(2)
    ]
    assert [process.wait(300) for process in running] == [0, 0]
    assert len(list((tmp_path / "localvit").iterdir())) == 1


@needs_compiler
def test_threads_are_those_of_pytorch():
    """A second OpenMP beside PyTorch's would take its threads' time."""
    code = (
        "from localvit.acceleration.native.build import library; library();"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libomp' in l}))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() in ("0", "1"), done.stderr


def _write_library(path):
    path.write_bytes(b"a library" + native_build._seal(path.name, b"a library"))
    path.chmod(0o700)


@pytest.fixture
def fake_compiler(monkeypatch):
    """Libraries without a compiler: `load` returns the path of the library and lists what it compiles."""
    compiled = []

    def compile_library(_compiler, path):
        compiled.append(path)
        _write_library(path)

    monkeypatch.setattr(native_build, "_identity", lambda compiler: b"")
    monkeypatch.setattr(native_build, "_compiler", lambda: ["c++"])
    monkeypatch.setattr(native_build, "_compile", compile_library)
    monkeypatch.setattr(native_build.ctypes, "CDLL", Path)
    native_build.private_folder.cache_clear()
    yield compiled
    native_build.private_folder.cache_clear()


def test_the_folder_is_for_its_owner_only(fake_compiler, tmp_path):
    folder = tmp_path / "cache" / "localvit"
    before = os.umask(0)
    try:
        library = native_build.load(folder)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert library.parent == folder
    assert native_build.load(folder) == library
    assert fake_compiler == [library]


@needs_compiler
def test_a_compiled_library_is_trusted_whatever_the_umask(hasty_compiler, monkeypatch, tmp_path):
    before = os.umask(0)
    try:
        native_build.load(tmp_path / "localvit")
    finally:
        os.umask(before)
    calls = []
    monkeypatch.setattr(native_build, "_compile", lambda *arguments: calls.append(arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native_build.load(tmp_path / "localvit")
    assert not calls


def spoil_folder_for_group(folder, library):
    folder.chmod(0o770)


def spoil_folder_for_others(folder, library):
    folder.chmod(0o707)


def spoil_library_for_others(folder, library):
    library.chmod(0o702)


def spoil_folder_by_link(folder, library):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def spoil_library_by_link(folder, library):
    library.rename(folder / "other.so")
    library.symlink_to("other.so")


def spoil_folder_by_file(folder, library):
    shutil.rmtree(folder)
    folder.write_text("a file")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_folder_for_group, r"folder .* can be changed by other users \(mode 770\)"),
        (spoil_folder_for_others, r"folder .* can be changed by other users \(mode 707\)"),
        (spoil_library_for_others, r"file .* can be changed by other users \(mode 702\)"),
        (spoil_folder_by_link, "folder .* is a link"),
        (spoil_library_by_link, "file .* is a link"),
        (spoil_folder_by_file, "folder .* is not a folder"),
    ],
)
def test_what_others_can_change_is_not_loaded(fake_compiler, tmp_path, spoil, reason):
    folder = tmp_path / "localvit"
    kept = native_build.load(folder)
    spoil(folder, kept)
    with pytest.warns(RuntimeWarning, match=reason):
        library = native_build.load(folder)
    assert library.parent != folder
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert fake_compiler == [kept, library]
    with pytest.warns(RuntimeWarning):
        assert native_build.load(folder) == library  # one private folder for the process, compiled once
    assert fake_compiler == [kept, library]


@pytest.mark.parametrize(
    "damage",
    [
        lambda library: library.write_bytes(b""),
        lambda library: os.truncate(library, 20),
        lambda library: library.write_bytes(b"A" + library.read_bytes()[1:]),
        lambda library: library.write_bytes(library.read_bytes() + b"\0"),
        lambda library: library.write_bytes(b"b" + native_build._seal("native-of-another-source.so", b"b")),
    ],
)
def test_a_damaged_library_is_compiled_anew(fake_compiler, tmp_path, damage):
    library = native_build.load(tmp_path / "localvit")
    whole = library.read_bytes()
    damage(library)
    assert native_build.load(tmp_path / "localvit") == library
    assert library.read_bytes() == whole
    assert fake_compiler == [library, library]


@pytest.mark.parametrize("above", ["home", "home/.cache", "real"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: folder.chmod(0o707), r"can be changed by other users \(mode 707\)"),
        (lambda folder: folder.chmod(0o770), r"can be changed by other users \(mode 770\)"),
        (lambda folder: os.chown(folder, 12345, -1), "belongs to user 12345, not 0 or root"),
    ],
)
def test_folders_above_the_cache_are_checked_behind_links_too(fake_compiler, tmp_path, above, spoil, reason):
    """`home` is a link to `real`, which a user may have made to keep it on another disk."""
    (tmp_path / "real" / ".cache").mkdir(parents=True)
    (tmp_path / "home").symlink_to("real")
    cache = tmp_path / "home" / ".cache" / "localvit"
    assert native_build.load(cache) == fake_compiler[0]
    if os.geteuid() and "belongs" in reason:
        pytest.skip("only root can give files away")
    spoil(tmp_path / above)
    with pytest.warns(RuntimeWarning, match=reason):
        assert native_build.load(cache) != fake_compiler[0]


def test_a_link_of_another_user_is_not_followed(fake_compiler, tmp_path):
    if os.geteuid():
        pytest.skip("only root can give files away")
    (tmp_path / "real").mkdir()
    (tmp_path / "home").symlink_to("real")
    os.lchown(tmp_path / "home", 12345, -1)
    with pytest.warns(RuntimeWarning, match="'.*home' belongs to user 12345"):
        native_build.load(tmp_path / "home" / "localvit")


def test_a_sticky_folder_above_the_cache_is_accepted(fake_compiler, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native_build.load(tmp_path / "shared" / "localvit")


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_belongs_to_another_user_is_not_loaded(fake_compiler, monkeypatch, tmp_path, what):
    kept = native_build.load(tmp_path / "localvit")
    found = os.lstat

    def of_another(path):
        status = found(path)
        foreign = (Path(path) == kept) == (what == "file") and Path(path) in (kept, kept.parent)
        return os.stat_result((*status[:4], status.st_uid + foreign, *status[5:]))

    monkeypatch.setattr(native_build.os, "lstat", of_another)
    with pytest.warns(
        RuntimeWarning, match=f"{what} .* belongs to user {os.geteuid() + 1}, not {os.geteuid()}"
    ):
        assert native_build.load(tmp_path / "localvit") != kept


def test_a_private_folder_goes_with_its_process(tmp_path):
    code = "from localvit.acceleration.native.build import private_folder; print(private_folder())"
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert Path(done.stdout.strip()).parent == tmp_path, done.stderr
    assert not list(tmp_path.iterdir())
