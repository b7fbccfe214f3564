"""Controlled comparisons: studies, their runs and reports. Needs the extra `study`."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.studies.running import run_study as run_study
else:
    __getattr__, __dir__, __all__ = door(__name__)
