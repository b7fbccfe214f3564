"""Tests of fused models depend neither on this machine's processor nor on what the environment asks for."""

import importlib
from collections.abc import Callable

import pytest
from torch import Tensor

# The function has the name of its module.
fuse_module = importlib.import_module("localvit.acceleration.fusing.fuse")


@pytest.fixture(autouse=True)
def _one_form(monkeypatch):
    set_packed(monkeypatch, None)
    monkeypatch.delenv("LOCALVIT_KERNELS", raising=False)


def set_packed(monkeypatch, rule: int | Callable[[Tensor], int | None] | None) -> None:
    """Pack all linear layers for inputs of so many rows, or none, or those that a rule chooses."""
    monkeypatch.setattr(fuse_module, "packed_rows", rule if callable(rule) else lambda weight: rule)
