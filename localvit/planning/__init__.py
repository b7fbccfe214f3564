"""Cost of a training run, before it starts."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.planning.figures import (
        Figure as Figure,
        count_data as count_data,
        effective as effective,
        open_run as open_run,
    )
    from localvit.planning.run_plan import Machine as Machine, plan_run as plan_run
else:
    __getattr__, __dir__, __all__ = door(__name__)
