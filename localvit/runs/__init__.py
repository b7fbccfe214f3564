"""The directory of a run."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.runs.folder import (
        RunFolder as RunFolder,
        check_output as check_output,
        open_folder as open_folder,
        read_status as read_status,
    )
    from localvit.runs.lock import FolderInUse as FolderInUse
    from localvit.runs.state import (
        DamagedState as DamagedState,
        State as State,
        random_states as random_states,
        set_random_states as set_random_states,
    )
    from localvit.runs.status import RunStatus as RunStatus
else:
    __getattr__, __dir__, __all__ = door(__name__)
