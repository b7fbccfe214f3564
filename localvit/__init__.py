"""Locality for vision transformers: a depth-wise convolution inside the feed-forward network."""

__version__ = "0.4.0.dev0"

from localvit.acceleration import fuse, set_selective_checkpointing
from localvit.errors import ConfigError
from localvit.locality import PRESETS, Grid, LocalityConfig, LocalityFeedForward, preset
from localvit.models import CheckpointError, LoadReport, load_official
from localvit.surgery import (
    Plan,
    Report,
    RestoreError,
    UnsupportedModelError,
    locality_parameters,
    localize,
    plan,
    restore,
)
from localvit.training import TrainConfig, evaluate, predict, train

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConfigError",
    "Grid",
    "LoadReport",
    "LocalityConfig",
    "LocalityFeedForward",
    "Plan",
    "Report",
    "RestoreError",
    "TrainConfig",
    "UnsupportedModelError",
    "evaluate",
    "fuse",
    "load_official",
    "locality_parameters",
    "localize",
    "plan",
    "predict",
    "preset",
    "restore",
    "set_selective_checkpointing",
    "train",
]
