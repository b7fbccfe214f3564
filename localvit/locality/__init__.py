"""The idea: locality in a feed-forward network. Imports torch and timm.layers only."""

from localvit.locality.config import ConfigError, LocalityConfig
from localvit.locality.feed_forward import HiddenLocality, LocalityFeedForward
from localvit.locality.grid import Grid, GridRecord, map_to_tokens, tokens_to_map
from localvit.locality.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "ConfigError",
    "Grid",
    "GridRecord",
    "HiddenLocality",
    "LocalityConfig",
    "LocalityFeedForward",
    "map_to_tokens",
    "preset",
    "tokens_to_map",
]
