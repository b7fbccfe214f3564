"""Precision of a forward pass; weights and optimizer stay float32."""

from __future__ import annotations

import torch

from localvit.config import Precision

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return a context with matrix products and convolutions in `precision`; no effect for `"fp32"`."""
    dtype = DTYPES[precision]
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)
