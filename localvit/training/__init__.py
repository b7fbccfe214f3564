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
from localvit.training.evaluate import Evaluation, Metrics, evaluate
from localvit.training.files import dump, from_dict, list_recipes, load_recipe, load_yaml, resolve, to_dict
from localvit.training.loop import RunResult, TrainingFailed, train
from localvit.training.predict import Guess, Prediction, Shard, predict
from localvit.training.prediction_files import write_predictions

__all__ = [
    "AugmentConfig",
    "ConfigError",
    "DataConfig",
    "Evaluation",
    "Guess",
    "Metrics",
    "ModelConfig",
    "OptimConfig",
    "Prediction",
    "RunResult",
    "ScheduleConfig",
    "Shard",
    "TrainConfig",
    "TrainingFailed",
    "dump",
    "evaluate",
    "from_dict",
    "list_recipes",
    "load_recipe",
    "load_yaml",
    "predict",
    "resolve",
    "to_dict",
    "train",
    "write_predictions",
]
