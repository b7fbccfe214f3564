"""Training, evaluation and prediction of any timm model, localized or not."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.training.callbacks import Callback as Callback, TensorBoard as TensorBoard
    from localvit.training.loop import train as train
    from localvit.training.optim import (
        build_optimizer as build_optimizer,
        build_scheduler as build_scheduler,
        freeze as freeze,
    )
    from localvit.training.result import RunResult as RunResult
    from localvit.training.task import check_student as check_student
else:
    __getattr__, __dir__, __all__ = door(__name__)
