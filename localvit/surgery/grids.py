"""Hooks that record the grid of the current forward pass.

They are plain functions that find the record on their module, so that a copy of the model writes to its own
record. (A closure or a bound method would write to the original's.)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, List, Literal, Tuple  # noqa: UP035 (TorchScript reads hook signatures by typing's names)

import torch
from torch import Tensor, nn

from localvit.locality import GridRecord

Reads = Literal[
    "image",
    "patches",
    "output",
    "output_map",
    "input",
    "input_map",
    "integers",
    "pair",
    "list",
    "argument",
    "result",
    "attribute",
]


@dataclass(frozen=True)
class GridFrom:
    """Row of an adapter: the module that knows a grid, and how it is read.

    Attributes:
        at: Path in the model, with `{0}`, `{1}` for the numbers in the path of the block; `"."`: the block
            itself; `".attn"`: a module in it.
        reads: `"image"`: `dynamic_feat_size` of its input `(B, C, H, W)`; `"patches"`: its input divided by
            its `patch_size`; `"output"`, `"input"`: its output or input `(B, H, W, C)`; `"output_map"`,
            `"input_map"`: the same of `(B, C, H, W)`; `"result"`: the second value that it returns;
            `"integers"`, `"pair"`, `"list"`: its arguments after the tensor, given by position;
            `"argument"`: any argument of its forward, which TorchScript cannot read; `"attribute"`: always
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


# TorchScript compiles a hook with the types of its module, and leaves out what scripts do not run.


def record_image_grid(self: nn.Module, inputs: Tuple[Tensor], output: Tensor) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        self.grid_record.size = self.dynamic_feat_size(inputs[0].shape[-2:])  # type: ignore


def record_output_grid(self: nn.Module, inputs: Tuple[Tensor], output: Tensor) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        _set(self.grid_record, output.shape[1:3])


def record_output_map(self: nn.Module, inputs: Tuple[Tensor], output: Tensor) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        _set(self.grid_record, (output if isinstance(output, Tensor) else output[0]).shape[-2:])


def record_input_grid(self: nn.Module, inputs: Tuple[Tensor]) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        _set(self.grid_record, inputs[0].shape[1:3])


def record_input_map(self: nn.Module, inputs: Tuple[Tensor]) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        _set(self.grid_record, inputs[0].shape[-2:])


def record_integers(self: nn.Module, inputs: Tuple[Tensor, int, int]) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        _set(self.grid_record, inputs[1:3])


def record_pair(self: nn.Module, inputs: Tuple[Tensor, Tuple[int, int]]) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        _set(self.grid_record, inputs[1])


def record_list(self: nn.Module, inputs: Tuple[Tensor, List[int]]) -> None:  # noqa: UP006
    if not torch.jit.is_scripting():
        _set(self.grid_record, inputs[1])


def record_result(
    self: nn.Module,
    inputs: Tuple[Tensor, List[int]],  # noqa: UP006
    output: Tuple[Tensor, List[int]],  # noqa: UP006
) -> None:
    if not torch.jit.is_scripting():
        _set(self.grid_record, output[1])


def record_argument(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    record: Any = self.grid_record
    position, name = record.rule.argument
    if name in kwargs or not isinstance(args[position], int):
        _set(record, kwargs[name] if name in kwargs else args[position])
    else:
        _set(record, args[position : position + 2])


def record_patches(self: Any, inputs: Any) -> None:
    images = isinstance(inputs[0], Tensor) and inputs[0].ndim == 4
    sizes = zip(inputs[0].shape[-2:], self.patch_size, strict=True) if images else ()
    _set(self.grid_record, tuple(size // patch for size, patch in sizes) or None)


def _set(record: Any, size: Any) -> None:
    if size is None:
        raise RuntimeError("the images of this batch have no common grid; use images of one size")
    multiple = record.rule.multiple
    # By position: fx traces sizes that cannot be iterated.
    height, width = (-(-size[axis] // multiple) * multiple for axis in (0, 1))
    record.size = (height, width)


_AFTER: dict[str, Callable[..., None]] = {
    "image": record_image_grid,
    "output": record_output_grid,
    "output_map": record_output_map,
    "result": record_result,
}
_BEFORE: dict[str, Callable[..., None]] = {
    "input": record_input_grid,
    "input_map": record_input_map,
    "integers": record_integers,
    "pair": record_pair,
    "list": record_list,
    "argument": record_argument,
    "patches": record_patches,
}


def hook(record: GridRecord) -> None:
    """Let `record` have the grids of its source."""
    module: Any = record.source
    reads = record.rule.reads
    if reads == "attribute":
        return
    module.grid_record = record
    if reads in _AFTER:
        module.register_forward_hook(_AFTER[reads])
    else:
        module.register_forward_pre_hook(_BEFORE[reads], with_kwargs=reads == "argument")


def unhook(modules: Iterable[Any]) -> None:
    """Undo `hook` in all `modules`; their records forget the last grid."""
    ours = {*_AFTER.values(), *_BEFORE.values()}
    for module in modules:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, function in hooks.items() if function in ours]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module.grid_record.size = None
                del module.grid_record
