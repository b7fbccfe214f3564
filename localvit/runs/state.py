"""State to resume a run from, in one file: written atomically, checked before use.

```
localvit state 1 sha256 HEX       one line of text
...                               what torch.save writes, read with weights_only
```
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localvit.atomic import write_atomically
from localvit.errors import ConfigError

SavedState = dict[str, Any]

_HEADER = b"localvit state 1 sha256 "
_KEPT = 2  # one is left if the newest is damaged


class DamagedState(ConfigError):
    """Error for an unusable state; the message names it and the reason."""


def write_state(folder: Path, step: int, state: SavedState) -> Path:
    """Save the state after `step` steps; remove all but the last two.

    Returns:
        The file.

    Raises:
        OSError: if it cannot be written; the earlier ones are unchanged.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    header = _HEADER + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09d}.state"
    write_atomically(path, header, payload)
    for old in _list(folder)[:-_KEPT]:
        old.unlink()
    return path


def read_state(path: Path) -> SavedState:
    """Read the state in a file. Nothing in it is executed.

    Raises:
        DamagedState: if the file was damaged.
    """
    try:
        with open(path, "rb") as file:
            header, payload = file.readline(200), file.read()
    except OSError as error:
        raise DamagedState(f"state {str(path)!r} cannot be read: {error.strerror}; check it") from error
    if header != _HEADER + hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise DamagedState(f"state {str(path)!r} is damaged: its checksum is wrong; delete it")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DamagedState(f"state {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    assert isinstance(state, dict)
    return state


def read_newest(folder: Path) -> tuple[SavedState | None, list[str]]:
    """Return the newest usable state, if any, and a warning for each newer, damaged one.

    Raises:
        DamagedState: if there are states and none can be used.
    """
    warnings: list[str] = []
    for path in reversed(_list(folder)):
        try:
            return read_state(path), warnings
        except DamagedState as error:
            warnings.append(str(error))
    if warnings:
        raise DamagedState(f"{'; '.join(warnings)}; there is no other state; start over in another folder")
    return None, []


def newest_name(folder: Path) -> str:
    """Describe the state that a later call would resume from."""
    states = _list(folder)
    return f"the last good state is {str(states[-1])!r}" if states else "no state was saved yet"


def drop_damaged(folder: Path) -> None:
    """Rename damaged states, so that they do not count among the last two."""
    for path in _list(folder):
        try:
            read_state(path)
        except DamagedState:
            os.replace(path, path.with_suffix(".damaged"))


def random_states(device: torch.device) -> SavedState:
    """Return the global random states of Python, NumPy and torch, on the CPU and on `device`."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: SavedState, device: torch.device) -> None:
    """Set the random states that `random_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)


def _list(folder: Path) -> list[Path]:
    """Return the states in a folder, oldest first."""
    return sorted(folder.glob("step-*.state"))
