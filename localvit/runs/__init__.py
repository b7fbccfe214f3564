"""Directory of a run: opened, judged, read and written in one place."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.runs.directory import Decision as Decision, RunDirectory as RunDirectory
    from localvit.runs.lock import FolderInUse as FolderInUse, locked as locked
    from localvit.runs.saved import SavedRun as SavedRun, read_run as read_run
    from localvit.runs.state import (
        DamagedState as DamagedState,
        SavedState as SavedState,
        random_states as random_states,
        set_random_states as set_random_states,
    )
    from localvit.runs.status import (
        BestEpoch as BestEpoch,
        RunStatus as RunStatus,
        numbers as numbers,
        whole as whole,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
