"""Training, evaluation and prediction of any timm model, localized or not."""

from localvit.training.callbacks import Callback, TensorBoard
from localvit.training.config import (
    AugmentConfig,
    ConfigError,
    DataConfig,
    DistillConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from localvit.training.evaluate import Evaluation, Metrics, evaluate
from localvit.training.facts import Figure, effective
from localvit.training.files import dump, from_dict, list_recipes, load_recipe, load_yaml, resolve, to_dict
from localvit.training.loop import train
from localvit.training.planning import Machine, plan_run
from localvit.training.predict import Guess, Prediction, Shard, predict
from localvit.training.prediction_files import write_predictions
from localvit.training.result import RunResult, TrainingFailed, TrainingInterrupted
from localvit.training.signals import stop_on_signals
from localvit.training.state import DamagedState

__all__ = [
    "AugmentConfig",
    "Callback",
    "ConfigError",
    "DamagedState",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
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
    "Shard",
    "TensorBoard",
    "TrainConfig",
    "TrainingFailed",
    "TrainingInterrupted",
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
    "stop_on_signals",
    "to_dict",
    "train",
    "write_predictions",
]
