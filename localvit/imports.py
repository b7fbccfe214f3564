"""Imports that wait until they are needed: doors of rooms, and actions that follow an import."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from wrapt import when_imported

_waiting: list[Callable[[], object]] = []


def door(room: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a room's `__init__`, as PEP 562 has them.

    The names are those that the `__init__` imports under `if TYPE_CHECKING:`, so that they stand there once,
    where type checkers and import-linter see them. Each is imported when somebody asks for it.

    Args:
        room: `__name__` of the package.
    """
    module = sys.modules[room]
    assert module.__spec__ is not None
    source = module.__spec__.loader.get_source(room)  # type: ignore[union-attr]
    homes = {
        alias.asname or alias.name: node.module
        for block in ast.parse(source).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(module, name, value)
        do_what_waits()
        return value

    return get, lambda: sorted({*vars(module), *homes}), sorted(homes)


def once_imported(module: str, action: Callable[[], object]) -> None:
    """Call `action` once `module` is imported, at once if it already is.

    Where one of our own modules imports it, `action` waits until that one is whole, because it may need it.
    """

    @when_imported(module)
    def _later(_module: object) -> None:
        _waiting.append(action)
        do_what_waits()


def do_what_waits() -> None:
    """Do what waited for the end of an import; where no door is used, nothing else does."""
    while _waiting and not _half_imported():
        _waiting.pop(0)()


def _half_imported() -> bool:
    """Return whether the import of a module of this package is under way."""
    ours = [module for name, module in sys.modules.items() if name.startswith("localvit.")]
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)
