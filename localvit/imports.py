"""Lazy imports: doors of rooms, and actions after an import."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from wrapt import when_imported

_waiting: list[Callable[[], object]] = []


def door(room: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for a room's `__init__` (PEP 562).

    The names are those that the `__init__` imports under `if TYPE_CHECKING:`, so they are listed once, where
    type checkers and import-linter find them. Each is imported at its first use.

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

    def names() -> list[str]:
        """Return the names of the door, the rooms behind it, and Python's own."""
        found = vars(module).items()
        return sorted(
            {*homes, *(n for n, v in found if n[:2] == "__" or getattr(v, "__name__", "") == f"{room}.{n}")}
        )

    return get, names, sorted(homes)


def once_imported(module: str, action: Callable[[], object]) -> None:
    """Call `action` after the import of `module`, at once if it is already imported.

    If one of our own modules imports it, `action` waits for the end of that import, because it may need that
    module.
    """

    @when_imported(module)
    def _later(_module: object) -> None:
        _waiting.append(action)
        do_what_waits()


def do_what_waits() -> None:
    """Call the actions that waited for the end of an import; without a door, nothing else calls them."""
    while _waiting and not _half_imported():
        _waiting.pop(0)()


def _half_imported() -> bool:
    """Return True during the import of a module of this package."""
    ours = [module for name, module in sys.modules.items() if name.startswith("localvit.")]
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)
