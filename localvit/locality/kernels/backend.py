"""Whose kernels compute the steps that move memory."""

import importlib.util
import os
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from localvit.locality.kernels.native_build import library

Backend = Literal["native", "triton", "torch"]
VARIABLE = "LOCALVIT_KERNELS"


def asked_backend() -> Backend | None:
    """What ``LOCALVIT_KERNELS`` in the environment asks for.

    * ``native``: compiled C++ on the CPU. The default there: measured, it is faster.
    * ``triton``: Triton on CUDA, never the default, because its speed has not been measured. With
      ``TRITON_INTERPRET=1`` it runs on the CPU, for tests.
    * ``torch``: PyTorch's own operators only. The default on CUDA.

    Raises:
        ValueError: for another value of the variable.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", *get_args(Backend)):
        raise ValueError(f"{VARIABLE}={asked!r} is not accepted (accepted: {', '.join(get_args(Backend))})")
    return asked or None  # type: ignore[return-value]


def backend_for(x: Tensor) -> Backend:
    """The kernels for tensors like ``x``. Where those asked for cannot run, a warning says so once."""
    asked = asked_backend()
    if asked == "triton" and (reason := _no_triton(x)) is not None:
        _warn(f"{VARIABLE}=triton has no effect: {reason}")
        asked = None
    if asked == "native" and x.device.type != "cpu":
        _warn(f"{VARIABLE}=native has no effect: the tensors are on {x.device.type}, not on the CPU")
        return "torch"
    if asked == "triton":
        return "triton" if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else "torch"
    may_be_native = asked != "torch" and x.device.type == "cpu" and x.dtype == torch.float32
    return "native" if may_be_native and library() is not None else "torch"


def _no_triton(x: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {x.device.type}, not on CUDA"
    return None


_warned: set[str] = set()


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
