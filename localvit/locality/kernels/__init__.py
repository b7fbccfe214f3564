"""Fast forms of what :class:`localvit.LocalityFeedForward` computes; its plain modules are the reference."""

from localvit.locality.kernels.choice import lean_applies
from localvit.locality.kernels.lean import lean_feed_forward

__all__ = ["lean_applies", "lean_feed_forward"]
