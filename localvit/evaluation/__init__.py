"""Metrics of a model on images, their uncertainty, and the files that hold them."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.evaluation.evaluation import (
        Evaluation as Evaluation,
        RealLabels as RealLabels,
        evaluate as evaluate,
        measure as measure,
    )
    from localvit.evaluation.files import (
        as_csv as as_csv,
        as_json as as_json,
        check_drawing as check_drawing,
        draw_confusion as draw_confusion,
    )
    from localvit.evaluation.metrics import Metrics as Metrics
    from localvit.evaluation.reported import open_equal_splits as open_equal_splits
else:
    __getattr__, __dir__, __all__ = door(__name__)
