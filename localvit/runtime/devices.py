"""Devices by name."""

from __future__ import annotations

import torch

from localvit.errors import ConfigError, one_line


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `"auto"` is the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: if this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} does not exist; use auto, cpu or cuda") from error
    try:
        torch.zeros(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = one_line(error).partition(". ")[0]
        there = "auto, cpu or cuda" if torch.cuda.is_available() else "auto or cpu"
        raise ConfigError(f"device={name!r} cannot be used here: {reason}; use {there}") from error
    return device
