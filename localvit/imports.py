"""Imports that wait until they are needed: doors of rooms, and work to do once a module is there."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


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
        return value

    return get, lambda: sorted({*vars(module), *homes}), sorted(homes)
