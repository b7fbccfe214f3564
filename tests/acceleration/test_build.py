"""How the native kernels are built, and what happens where they cannot be."""

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
from localvit.acceleration.native import build as native_build
from localvit.acceleration.native import mix

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
        ("exit 1", "does not take -march=native"),
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


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, fresh):
    (tmp_path / "localvit").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "_identity", lambda compiler: b"")
    monkeypatch.setattr(native_build, "_compiler", lambda: ["c++"])
    with pytest.warns(RuntimeWarning, match="native kernels are not used"):
        assert native_build.library() is None


@needs_compiler
def test_compiled_once(monkeypatch, tmp_path):
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
    monkeypatch.setattr(native_build, "_compile", lambda compiler, path: path.touch())
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
def test_several_processes_at_once(tmp_path):
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
