"""Processes, devices, precision, signals and versions."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.runtime.devices import pick_device as pick_device
    from localvit.runtime.distributed import World as World, open_world as open_world
    from localvit.runtime.precision import DTYPES as DTYPES, autocast as autocast
    from localvit.runtime.signals import stop_on_signals as stop_on_signals, stop_requested as stop_requested
    from localvit.runtime.software import commit as commit, versions as versions
else:
    __getattr__, __dir__, __all__ = door(__name__)
