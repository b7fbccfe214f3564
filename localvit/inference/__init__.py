"""Any trained model, opened for use, and what it predicts."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.inference.checkpoint import Checkpoint as Checkpoint, load_checkpoint as load_checkpoint
    from localvit.inference.exported import untrained as untrained
    from localvit.inference.prediction import (
        Guess as Guess,
        Prediction as Prediction,
        Shard as Shard,
        predict as predict,
        process_share as process_share,
    )
    from localvit.inference.prediction_files import (
        Progress as Progress,
        write_predictions as write_predictions,
    )
    from localvit.inference.prediction_formats import Csv as Csv, JsonLines as JsonLines
else:
    __getattr__, __dir__, __all__ = door(__name__)
