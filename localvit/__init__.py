"""Locality for vision transformers: a depth-wise convolution inside the feed-forward network."""

from importlib import import_module
from typing import TYPE_CHECKING

from localvit.imports import door, once_imported
from localvit.version import __version__ as __version__

if TYPE_CHECKING:
    from localvit.acceleration import fuse as fuse, set_selective_checkpointing as set_selective_checkpointing
    from localvit.config import TrainConfig as TrainConfig
    from localvit.errors import ConfigError as ConfigError, UnsupportedModelError as UnsupportedModelError
    from localvit.evaluation import evaluate as evaluate
    from localvit.inference import predict as predict
    from localvit.locality import (
        PRESETS as PRESETS,
        Grid as Grid,
        LocalityConfig as LocalityConfig,
        LocalityFeedForward as LocalityFeedForward,
        preset as preset,
    )
    from localvit.models import (
        CheckpointError as CheckpointError,
        LoadReport as LoadReport,
        load_locality as load_locality,
        load_official as load_official,
        save_locality as save_locality,
    )
    from localvit.surgery import (
        Localization as Localization,
        Plan as Plan,
        RestoreError as RestoreError,
        check_adapter as check_adapter,
        locality_parameters as locality_parameters,
        localize as localize,
        plan as plan,
        register_adapter as register_adapter,
        restore as restore,
    )
    from localvit.training import train as train
else:
    __getattr__, __dir__, __all__ = door(__name__)


def _accelerate() -> None:
    """Let every feed-forward network with locality use the faster forms, even in a plain PyTorch loop."""
    from localvit.acceleration import accelerated
    from localvit.locality import set_accelerator

    set_accelerator(accelerated)


# So `timm.create_model` knows our models, whichever of the two packages is imported first.
once_imported("timm", lambda: import_module("localvit.models.variants"))
once_imported("localvit.locality.feed_forward", _accelerate)
