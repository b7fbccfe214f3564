"""One thread per test process: the suite runs processes side by side, and threads would fight."""

import os

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start: another number gives other last bits


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
