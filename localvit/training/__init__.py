"""Training, evaluation and prediction of any timm model, localized or not."""

from localvit.training.config import (
    AugmentConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from localvit.training.evaluate import Metrics
from localvit.training.files import dump, from_dict, list_recipes, load_recipe, load_yaml, resolve, to_dict
from localvit.training.loop import RunResult, TrainingFailed, train

__all__ = [
    "AugmentConfig",
    "ConfigError",
    "DataConfig",
    "Metrics",
    "ModelConfig",
    "OptimConfig",
    "RunResult",
    "ScheduleConfig",
    "TrainConfig",
    "TrainingFailed",
    "dump",
    "from_dict",
    "list_recipes",
    "load_recipe",
    "load_yaml",
    "resolve",
    "to_dict",
    "train",
]
