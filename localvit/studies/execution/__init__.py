"""Runs of a study, on this machine or on a cluster."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.studies.execution.cluster import Cluster as Cluster
    from localvit.studies.execution.folder import (
        StudyFolder as StudyFolder,
        read_besides as read_besides,
        read_study as read_study,
    )
    from localvit.studies.execution.forecasting import forecast as forecast
    from localvit.studies.execution.records import Record as Record
    from localvit.studies.execution.run import StudyFailed as StudyFailed, run_missing as run_missing
    from localvit.studies.execution.throughput import (
        THREADS as THREADS,
        images_per_second as images_per_second,
    )
    from localvit.studies.execution.tuning import (
        Tuning as Tuning,
        load_tuning as load_tuning,
        save_tuning as save_tuning,
        shipped_tuning as shipped_tuning,
        tune as tune,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
