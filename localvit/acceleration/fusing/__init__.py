"""Models in their fast inference form: same logits, other code."""

from localvit.acceleration.fusing.fuse import fuse

__all__ = ["fuse"]
