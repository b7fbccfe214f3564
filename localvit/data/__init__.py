"""Data sets as three honest splits, and batches that a seed decides."""

from localvit.data.config import AugmentConfig, DataConfig, DataError
from localvit.data.identity import picture_name
from localvit.data.images import Images, Part, UnreadableImage
from localvit.data.loading import Batch, eval_loader, train_loader
from localvit.data.splits import Splits, open_reported, open_splits
from localvit.data.tar import TarReader

__all__ = [
    "AugmentConfig",
    "Batch",
    "DataConfig",
    "DataError",
    "Images",
    "Part",
    "Splits",
    "TarReader",
    "UnreadableImage",
    "eval_loader",
    "open_reported",
    "open_splits",
    "picture_name",
    "train_loader",
]
