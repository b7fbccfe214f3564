"""Any model, opened for use, and its predictions."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.inference.formats import (
        COLUMNS as COLUMNS,
        to_csv as to_csv,
        to_csv_lines as to_csv_lines,
        to_json_line as to_json_line,
    )
    from localvit.inference.model import (
        FUSED as FUSED,
        OpenModel as OpenModel,
        check_source as check_source,
        fused as fused,
        open_model as open_model,
    )
    from localvit.inference.prediction import (
        ClassProbability as ClassProbability,
        Prediction as Prediction,
        Shard as Shard,
        check_settings as check_settings,
        classify as classify,
        find_files as find_files,
        predict as predict,
        process_shard as process_shard,
    )
    from localvit.inference.writer import (
        PredictionProgress as PredictionProgress,
        write_predictions as write_predictions,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
