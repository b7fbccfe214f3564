"""Versions of the software that a result depends on."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import timm
import torch

from localvit.version import __version__


def versions() -> dict[str, str]:
    """Return package -> version of the software that a result depends on."""
    return {
        "localvit": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


@cache
def commit() -> str | None:
    """Return the git commit of the checkout of this package, or `None`."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
