"""Training, evaluation and prediction of any timm model, localized or not."""

from localvit.training.config import (
    AugmentConfig,
    ConfigError,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from localvit.training.evaluate import Evaluation, Metrics, evaluate
from localvit.training.facts import Figure, effective
from localvit.training.files import dump, from_dict, list_recipes, load_recipe, load_yaml, resolve, to_dict
from localvit.training.loop import RunResult, TrainingFailed, train
from localvit.training.planning import Machine, plan_run
from localvit.training.predict import Guess, Prediction, predict

__all__ = [
    "AugmentConfig",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "Evaluation",
    "Figure",
    "Guess",
    "Machine",
    "Metrics",
    "ModelConfig",
    "OptimConfig",
    "Prediction",
    "RunResult",
    "ScheduleConfig",
    "TrainConfig",
    "TrainingFailed",
    "dump",
    "effective",
    "evaluate",
    "from_dict",
    "list_recipes",
    "load_recipe",
    "load_yaml",
    "plan_run",
    "predict",
    "resolve",
    "to_dict",
    "train",
]
