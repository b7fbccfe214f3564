"""Middle stage of a feed-forward network by the native kernels: one call forward, one backward."""

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from localvit.acceleration.native.build import library
from localvit.acceleration.native.form import (
    ACTIVATIONS,
    ECA_HARD,
    KERNEL_SIZES,
    LANES,
    NativeForm,
    address,
    is_dense,
    readable,
)
from localvit.locality import Grid

# The kernels' numbers of normalisations. MOVING: with batch statistics, which also change the running ones.
NO_NORM, RUNNING, BATCH, MOVING = range(4)
# `Arguments` in depthwise.h; the number of maps follows.
_NORM = "6q2d4q"
_LAYOUT = f"8q{_NORM}2q{_NORM}7q%dq"


class NormSettings(NamedTuple):
    """Settings of a norm in one call; the defaults mean no norm."""

    mode: int = NO_NORM
    eps: float = 0.0
    momentum: float = 0.0


class Stage(NamedTuple):
    """Settings of one pass through the middle stage."""

    grid: Grid
    norms: tuple[NormSettings, NormSettings]
    act: int
    act2: int
    gate: int
    reduced: int = 0

    def call(self, kernel: str, p: list[int], work: Tensor, size: int, *maps: Tensor) -> None:
        """Call a kernel of native.cpp.

        Args:
            kernel: Its name.
            p: Addresses of parameters and buffers, as `NativeForm.addresses` returns them.
            work: Values for the backward pass `(8 + B, D)` besides the maps: mean, reciprocal standard
                deviation, scale and shift of both norms, input of the gate.
            size: Side of the convolution's kernel.
            maps: Maps of tokens `(B, N, D)` and other results.

        Raises:
            RuntimeError: if there is not enough memory, as PyTorch raises.
        """
        rows, channels = work.shape
        start, line = work.data_ptr(), 4 * channels
        first, second = self.norms
        values = (
            *(rows - 8, self.grid.height, self.grid.width, channels, size, self.act, self.act2),
            *(torch.get_num_threads(), first.mode, p[0], p[1], *p[10:13], first.eps, first.momentum),
            *range(start, start + 4 * line, line),
            *(p[2], p[3], second.mode, p[4], p[5], *p[13:16], second.eps, second.momentum),
            *range(start + 4 * line, start + 8 * line, line),
            *(self.gate, *p[6:10], self.reduced, start + 8 * line),
            *map(address, maps),
        )
        if getattr(library(), f"localvit_{kernel}")(struct.pack(_LAYOUT % len(maps), *values)):
            raise RuntimeError("the native kernels cannot allocate memory; use a smaller batch")


def mixed(form: NativeForm, ffn: Any, x: Tensor, grid: Grid) -> Tensor | None:
    """Compute `ffn.mix(x, grid)` for dense tokens `(B, N, D)` without prefix tokens; `None` if the tensors of
    `form` cannot be read.

    If gradients are recorded, the input and the convolved map are saved for the backward pass, and the others
    are recomputed.
    """
    addresses = form.addresses()
    if addresses is None:
        return None
    parameters, (act, act2, gate) = form.parameters, form.numbers
    norms = norm_now(form.norms[0]), norm_now(form.norms[1])
    stage = Stage(grid, norms, act or 0, act2 or 0, gate or 0, reduced_of(parameters[6]))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        result: Tensor = _Mix.apply(x, stage, ffn, form, addresses, *parameters)
        return result
    size = parameters[2].shape[-1]
    y = torch.empty_like(x)
    kernel = "forward" if max(norms[0].mode, norms[1].mode) >= BATCH else "inference"
    _forward(kernel, stage, addresses, size, x, *([y] if kernel == "inference" else [y, y]))
    return y


def norm_now(layer: nn.BatchNorm2d | None) -> NormSettings:
    """Return the settings of `layer` in a forward pass now."""
    if layer is None:
        return NormSettings()
    if not layer.training:
        return NormSettings(BATCH if layer._buffers["running_mean"] is None else RUNNING, layer.eps)
    mode = MOVING if layer.track_running_stats else BATCH
    return NormSettings(mode, layer.eps, -1.0 if layer.momentum is None else layer.momentum)


def reduced_of(first: Tensor | None) -> int:
    """Return the size of a gate's first layer: squeeze units `(R, D, 1, 1)` or taps `(1, 1, k)`."""
    return 0 if first is None else first.shape[-1] if first.dim() == 3 else len(first)


def _forward(kernel: str, stage: Stage, p: list[int], size: int, x: Tensor, *results: Tensor) -> Tensor:
    """Compute the output, after the convolved map for "forward"; move the running statistics.

    Returns:
        `work` of `Stage.call`.
    """
    work = x.new_empty((8 + len(x), x.shape[2]))
    stage.call(kernel, p, work, size, x, *results)
    return work


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stage: Stage, ffn: Any, form: NativeForm, p: list[int], *parameters: Any
    ) -> Tensor:
        # As a map: activation checkpointing compares shapes, and so detects another grid with as many tokens.
        convolved = x.new_empty((len(x), stage.grid.height, stage.grid.width, x.shape[2]))
        y = torch.empty_like(x)
        work = _forward("forward", stage, p, parameters[2].shape[-1], x, convolved, y)
        ctx.stage, ctx.ffn, ctx.form = stage, ffn, form
        ctx.save_for_backward(x, convolved, work, *parameters)
        ctx.shapes = [*map(_shape, (x, convolved, work, *parameters))]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, convolved, work, *parameters = saved = _saved(ctx)
        # Recorded under create_graph=True; without storage under is_grads_batched=True and vmap.
        if torch.is_grad_enabled() or not torch._C._has_storage(grads[0]):
            return _differentiable(ctx, grads[0], saved)
        grad = grads[0].contiguous()
        if not is_dense(grad) or not _as_saved(ctx, saved):
            return _differentiable(ctx, grads[0], saved)
        shapes = [(0,) if p is None else p.shape for p in parameters]
        for i in (0, 1, 3, 4, 5):  # the kernels write these even for layers without them
            shapes[i] = (x.shape[2],)
        of_x, of_parameters = torch.empty_like(x), [x.new_zeros(shape) for shape in shapes]
        maps = (grad, x, convolved, of_x, *of_parameters)
        ctx.stage.call("backward", _addresses(parameters), work, parameters[2].shape[-1], *maps)
        needs = zip(of_parameters, parameters, ctx.needs_input_grad[5:], strict=True)
        of_needed = (g if p is not None and needs_grad else None for g, p, needs_grad in needs)
        return (of_x, None, None, None, None, *of_needed)


def _addresses(parameters: Any) -> list[int]:
    return [*map(address, parameters), *[0] * 6]  # without running statistics, which stay


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _saved(ctx: Any) -> Any:
    """Return the saved tensors of a forward pass; activation checkpointing allows one unpacking per backward
    pass.
    """
    task, saved = ctx.__dict__.pop("unpacked", (None, None))
    return ctx.saved_tensors if saved is None or task != torch._C._current_graph_task_id() else saved


def _as_saved(ctx: Any, tensors: Any) -> bool:
    """Return whether the kernels can still read what was saved: hooks may have changed type or layout, and an
    assignment to `.data` anything.
    """
    return [*map(_shape, tensors)] == ctx.shapes and all(t is None or is_dense(t) for t in tensors)


def _differentiable(ctx: Any, grad: Tensor, saved: Any) -> Any:
    """Return gradients by the plain modules, differentiable if gradients are recorded."""
    x, _, _, *parameters = saved
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = _plain(ctx, x, parameters)
    inputs = [x, None, None, None, None, *parameters]
    places = [i for i, needs_grad in enumerate(ctx.needs_input_grad) if needs_grad]
    grads = torch.autograd.grad(y, [inputs[i] for i in places], grad, create_graph=create_graph)
    by_place = dict(zip(places, grads, strict=True))
    return tuple(by_place.get(i) for i in range(len(inputs)))


def _plain(ctx: Any, x: Tensor, parameters: Any) -> Tensor:
    """Compute the output of a forward pass again, by the plain modules.

    Raises:
        RuntimeError: if they have changed since.
    """
    ffn, form = ctx.ffn, ctx.form
    norms = tuple(map(norm_now, form.norms))
    if norms != ctx.stage.norms or not form.has_layers_of(ffn) or form.patched():
        raise RuntimeError(
            "the feed-forward network has changed since the forward pass, which this backward pass repeats "
            "(as for create_graph=True); call backward first, or set LOCALVIT_KERNELS=plain"
        )
    # A hook may have made them strided, and PyTorch's batch norm misreads strided weights.
    named = zip(form.names, parameters, strict=False)
    state = {f"ffn.{n}": p.contiguous() for n, p in named if p is not None}
    state |= {f"ffn.{n}": b.clone() for n, b in ffn.named_buffers()}
    with torch.autocast("cpu", enabled=False):
        result: Tensor = torch.func.functional_call(_OnlyMix(ffn), state, (x, ctx.stage.grid))
    return result


class _OnlyMix(nn.Module):
    def __init__(self, ffn: Any) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        result: Tensor = self.ffn.mix(x, grid)
        return result


class _Again(NamedTuple):
    """Index of an unsaved tensor in the output of the stage."""

    shape: Any
    stride: Any
    offset: Any


def not_saved(y: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which layers do not save `y`, an output of `mixed`, but recompute it in their
    backward pass.
    """
    node: Any = y.grad_fn
    storage, version = y.untyped_storage().data_ptr(), y._version
    # Hooks of offloading, checkpointing, counting.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() != storage or tensor._version != version:
            return outer[0](tensor) if outer else tensor
        return _Again(tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if not isinstance(packed, _Again):
            return outer[1](packed) if outer else packed
        x, convolved, work, *parameters = saved = _saved(node)
        node.unpacked = torch._C._current_graph_task_id(), saved
        if _as_saved(node, saved):
            again = torch.empty_like(x)
            node.stage.call("again", _addresses(parameters), work, 0, convolved, again)
        else:
            again = _plain(node, x, parameters).contiguous()
        return again.as_strided(packed.shape, packed.stride, packed.offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def mix_in_place(form: NativeForm, x: Tensor, grid: Grid, act: int, act2: int, gate: int) -> None:
    """Compute the stage without norms in place: `x = act2(conv(act(x)) + bias) * gate`.

    The tensors are those of `form`, whose `addresses` were found readable just before.
    """
    _check_tokens(x, form.channels, grid.height * grid.width)
    _inference(x, grid, (act, act2, gate), form.parameters, form.noted[0])


def _check_tokens(x: Tensor, channels: int, tokens: int) -> None:
    if not is_dense(x) or x.shape[1:] != (tokens, channels):
        raise ValueError(
            f"{x.dtype} {tuple(x.shape)} on {x.device} is not accepted; use dense float32 on the CPU, with "
            f"{tokens} tokens of {channels} channels"
        )


def _inference(x: Tensor, grid: Grid, numbers: tuple[int, int, int], parameters: Any, p: list[int]) -> None:
    stage = Stage(grid, (NormSettings(), NormSettings()), *numbers, reduced_of(parameters[6]))
    _forward("inference", stage, p, parameters[2].shape[-1], x, x)


def _by_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: list[Tensor | None],
    height: int,
    width: int,
    act: int,
    act2: int,
    kind: int,
) -> None:
    """Compute `mix_in_place` by tensors; `gate` has the weights and biases of a gate of this kind."""
    channels, size, parameters = x.shape[2], weight.shape[-1], [None, None, weight, bias, None, None, *gate]
    if size not in KERNEL_SIZES or channels % LANES or not readable(parameters, channels, size, kind):
        shapes = [None if tensor is None else (tensor.dtype, *tensor.shape) for tensor in parameters]
        raise ValueError(
            f"weights {shapes} for {channels} channels and gate {kind} are not accepted; use dense float32 "
            f"on the CPU, a depth-wise kernel of size {KERNEL_SIZES} and a multiple of {LANES} channels"
        )
    numbers = range(len(ACTIVATIONS))
    if act not in numbers or act2 not in numbers or kind not in range(ECA_HARD + 1) or height < 1:
        raise ValueError(f"act={act}, act2={act2}, kind={kind}, height={height} are not accepted")
    _check_tokens(x, channels, height * width)
    _inference(x, Grid(height, width), (act, act2, kind), parameters, _addresses(parameters))


# `custom_op` would take three times as long to call, in every block.
torch.library.define(
    "localvit::mix_",
    "(Tensor(a!) x, Tensor weight, Tensor? bias, Tensor?[] gate, int height, int width, int act, int act2,"
    " int kind) -> ()",
)
torch.library.impl("localvit::mix_", "cpu", _by_operator)
torch.library.register_fake("localvit::mix_", lambda *args: None)
mix_ = torch.ops.localvit.mix_.default
