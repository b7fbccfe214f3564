"""A model in its fast inference form: same logits, other code."""

from localvit.fusing.fuse import fuse
from localvit.locality.kernels.packed import Route

__all__ = ["Route", "fuse"]
