"""Hooks that record the grid of the forward pass under way.

They are plain functions that find the record on their module, so that a copy of the model writes to its own
record. (A closure or a bound method would write to the original's.)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Tuple  # noqa: UP035 (TorchScript reads hook signatures by typing's names)

import torch
from torch import Tensor, nn

from localvit.locality import GridRecord

Reads = Literal[
    "image", "patches", "output", "output_map", "input", "input_map", "argument", "result", "attribute"
]


@dataclass(frozen=True)
class GridFrom:
    """Row of an adapter: the module that knows a grid, and how it is read.

    Attributes:
        at: Path in the model, with `{0}`, `{1}` for the numbers in the path of the block; `"."`: the block
            itself; `".attn"`: a module in it.
        reads: `"image"`: `dynamic_feat_size` of its input `(B, C, H, W)`; `"patches"`: its input divided by
            its `patch_size`; `"output"`, `"input"`: its output
            or input `(B, H, W, C)`; `"output_map"`, `"input_map"`: the same of `(B, C, H, W)`; `"result"`:
            the second value that it returns; `"argument"`: an argument of its forward; `"attribute"`: always
            the configured grid, so there is no hook.
        static: Attribute (rows, columns) for the configured size, for `"attribute"` and TorchScript.
        argument: Position of the argument (of rows, if they are two) and its name, for `"argument"`.
        divide: The grid is this many times smaller in both directions, for `"attribute"`.
        multiple: The grid is enlarged to a multiple of this.
    """

    at: str
    reads: Reads
    static: str | None = None
    argument: tuple[int, str] = (1, "")
    divide: int = 1
    multiple: int = 1


@dataclass(frozen=True)
class GridSource:
    """Source of the grid of some FFNs: a module, and how its grid is read."""

    module: nn.Module
    rule: GridFrom

    def new_record(self) -> GridRecord:
        rule = self.rule
        return GridRecord(self.module, rule.static or "", rule.reads == "attribute", rule)


def record_image_grid(self: nn.Module, inputs: Tuple[Tensor], output: Tensor) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        self.grid_record.size = self.dynamic_feat_size(inputs[0].shape[-2:])  # type: ignore


def record_output_grid(self: nn.Module, inputs: Tuple[Tensor], output: Tensor) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        self.grid_record.size = (output.shape[1], output.shape[2])  # type: ignore


def record_input_grid(self: nn.Module, inputs: Tuple[Tensor]) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        self.grid_record.size = (inputs[0].shape[1], inputs[0].shape[2])  # type: ignore


def record_before(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    record: Any = self.grid_record
    position, name = record.rule.argument
    if record.rule.reads == "input_map":
        _set(record, args[0].shape[-2:])
    elif record.rule.reads == "patches":
        images = isinstance(args[0], Tensor) and args[0].ndim == 4
        sizes = zip(args[0].shape[-2:], self.patch_size, strict=True) if images else ()  # type: ignore[arg-type]
        _set(record, tuple(size // patch for size, patch in sizes) or None)
    elif name in kwargs or not isinstance(args[position], int):
        _set(record, kwargs[name] if name in kwargs else args[position])
    else:
        _set(record, args[position : position + 2])


def record_after(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    record: Any = self.grid_record
    if record.rule.reads == "result":
        _set(record, output[1])
    else:
        _set(record, (output if isinstance(output, Tensor) else output[0]).shape[-2:])


def _set(record: GridRecord, size: Any) -> None:
    if size is None:
        raise RuntimeError("the images of this batch have no common grid; use images of one size")
    multiple = record.rule.multiple
    height, width = (-(-n // multiple) * multiple for n in size)
    record.size = (height, width)


_AFTER: dict[str, Callable[..., None]] = {
    "image": record_image_grid,
    "output": record_output_grid,
} | dict.fromkeys(("output_map", "result"), record_after)
_BEFORE: dict[str, Callable[..., None]] = {"input": record_input_grid} | dict.fromkeys(
    ("input_map", "patches", "argument"), record_before
)


def hook(source: GridSource, record: GridRecord) -> None:
    """Let `record` have the grids of `source`."""
    module, reads = source.module, source.rule.reads
    if reads == "attribute":
        return
    module.grid_record = record  # type: ignore[assignment]
    general = reads not in ("image", "output", "input")
    if reads in _AFTER:
        module.register_forward_hook(_AFTER[reads], with_kwargs=general)
    else:
        module.register_forward_pre_hook(_BEFORE[reads], with_kwargs=general)


def unhook(modules: Iterable[nn.Module]) -> None:
    """Undo `hook` in all `modules`."""
    ours = {*_AFTER.values(), *_BEFORE.values()}
    for module in modules:
        for hooks, flags in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, function in hooks.items() if function in ours]:
                del hooks[key]
                flags.pop(key, None)
                del module.grid_record
