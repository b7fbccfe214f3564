"""One thread per test process: the suite runs processes side by side, and threads would fight."""

import os
import resource
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings

settings.register_profile("tests", deadline=None)  # time depends on what else the machine does
settings.load_profile("tests")
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start: another number gives other last bits


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def full_disk():
    """A context in which files of this process cannot grow beyond some bytes, as on a full disk."""

    @contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def full_console(monkeypatch):
    """A context in which the standard output takes nothing, as a file on a full disk."""

    @contextmanager
    def replaced():
        with open("/dev/full", "w") as file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            yield

    return replaced
