"""The idea: locality in a feed-forward network. Imports torch, timm.layers and localvit.errors only."""

from localvit.locality.config import LocalityConfig
from localvit.locality.feed_forward import HiddenLocality, LocalityFeedForward
from localvit.locality.grid import Grid, GridRecord, map_to_tokens, set_accelerator, tokens_to_map
from localvit.locality.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Grid",
    "GridRecord",
    "HiddenLocality",
    "LocalityConfig",
    "LocalityFeedForward",
    "map_to_tokens",
    "preset",
    "set_accelerator",
    "tokens_to_map",
]
