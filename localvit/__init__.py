"""Locality for vision transformers: a depth-wise convolution inside the feed-forward network."""

from typing import TYPE_CHECKING

from wrapt import when_imported

from localvit.imports import door
from localvit.version import __version__ as __version__

if TYPE_CHECKING:
    from localvit.acceleration import fuse as fuse, set_selective_checkpointing as set_selective_checkpointing
    from localvit.config import TrainConfig as TrainConfig
    from localvit.errors import ConfigError as ConfigError
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
        load_official as load_official,
    )
    from localvit.surgery import (
        Plan as Plan,
        Report as Report,
        RestoreError as RestoreError,
        UnsupportedModelError as UnsupportedModelError,
        locality_parameters as locality_parameters,
        localize as localize,
        plan as plan,
        restore as restore,
    )
    from localvit.training import train as train
else:
    __getattr__, __dir__, __all__ = door(__name__)


@when_imported("timm")
def _register_names(timm: object) -> None:
    """Make `timm.create_model` know our models, whichever of the two is imported first."""
    import localvit.models.variants  # noqa: F401


@when_imported("localvit.locality.feed_forward")
def _accelerate(feed_forward: object) -> None:
    """Let every feed-forward network with locality use the faster forms, in a plain PyTorch loop too."""
    from localvit.acceleration import accelerated
    from localvit.locality import set_accelerator

    set_accelerator(accelerated)
