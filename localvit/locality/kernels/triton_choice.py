"""Whether the Triton kernels are asked for, and are there."""

import importlib.util
import os
import warnings

import torch
from torch import Tensor

VARIABLE = "LOCALVIT_KERNELS"


def kernels_asked_for(x: Tensor) -> bool:
    """Whether the Triton kernels may compute on ``x``: ``LOCALVIT_KERNELS=triton`` asks for them.

    They are not the default because their speed has not been measured. Where they are asked for and
    cannot run, a warning says so once. With ``TRITON_INTERPRET=1`` they run on the CPU, for tests.

    Raises:
        ValueError: for another value of the variable.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "triton"):
        raise ValueError(f"{VARIABLE}={asked!r} is not accepted (accepted: triton)")
    if not asked:
        return False
    if importlib.util.find_spec("triton") is None:
        _warn("Triton is not installed")
        return False
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        _warn(f"the tensors are on {x.device.type}, not on CUDA")
        return False
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


_warned: set[str] = set()


def _warn(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"{VARIABLE}=triton has no effect: {reason}", RuntimeWarning, stacklevel=4)
