"""The Triton kernels where there is no GPU, and when they are chosen."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from localvit.locality.kernels import backend

from .test_lean import feed_forward, run

ROOT = Path(__file__).parents[2]


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "tests/locality/triton_cases.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("LOCALVIT_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_warned", set())


def test_where_they_cannot_run_a_warning_says_so_once(asked):
    ffn, x = feed_forward().float(), torch.randn(3, 14, 6, requires_grad=True)
    with pytest.warns(RuntimeWarning, match=r"LOCALVIT_KERNELS=triton has no effect.*(cpu|not installed)"):
        first = run(ffn, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(ffn, x), first, rtol=0, atol=0)


def test_without_triton_the_lean_pass_computes(asked, monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        run(feed_forward().float(), torch.randn(3, 14, 6))
