"""The middle stage of a feed-forward network by the native kernels: one call each way."""

import ctypes
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from localvit.acceleration.native.build import library
from localvit.acceleration.native.form import CLAMP, KERNEL_SIZES, LANES, NO_GATE, Form, is_dense
from localvit.locality import Grid

# How a norm normalises, as the kernels number it. AFFINE: by its weight and bias alone, each where it is
# given.
AFFINE, RUNNING, BATCH = range(3)


class Norm(NamedTuple):
    """A norm in one call; without one, all is as the defaults say."""

    mode: int = AFFINE
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    batches: Tensor | None = None
    eps: float = 0.0
    momentum: float = 0.0


class Mix(NamedTuple):
    """One call, apart from its tensors. `parameters` are weights and biases of norm 1, the convolution,
    norm 2 and the gate's layers, in this order, each `None` where there is none."""

    grid: Grid
    norms: tuple[Norm, Norm]
    act: int
    act2: int
    gate: int

    def call(
        self,
        name: str,
        x: Tensor,
        parameters: Any,
        kept: "Kept | None",
        *more: Tensor | None,
    ) -> None:
        """Call a kernel of native.cpp, whose `Reader` takes these arguments in this order."""
        batch, _, channels = x.shape
        p = [_address(tensor) for tensor in parameters]
        stats = _address(kept.statistics) if kept is not None else 0
        at = [stats + 4 * channels * i if stats else 0 for i in range(4)]
        kernel, first = parameters[2], parameters[6]
        reduced = 0 if first is None else first.shape[-1] if first.dim() == 3 else first.shape[0]
        height, width, prefix = self.grid
        integers = [batch, prefix, height, width, channels, kernel.shape[-1], self.act, self.act2,
                    torch.get_num_threads(),
                    *_norm(self.norms[0], p[0], p[1]), at[0], at[1], p[2], p[3],
                    *_norm(self.norms[1], p[4], p[5]), at[2], at[3],
                    self.gate, p[6], p[7], p[8], p[9], reduced,
                    *map(_address, more)]  # fmt: skip
        numbers = [value for norm in self.norms for value in (norm.eps, norm.momentum)]
        function = getattr(library(), f"localvit_{name}")
        if function.argtypes is None:
            function.argtypes = [ctypes.c_void_p] * 2
        values, doubles = array("q", integers), array("d", numbers)
        function(values.buffer_info()[0], doubles.buffer_info()[0])


class Kept(NamedTuple):
    """What the backward pass needs beside the maps: means and reciprocal standard deviations (4, D) of
    both norms, means (B, D) that the gate takes, and its values (B, D)."""

    statistics: Tensor
    pooled: Tensor | None
    values: Tensor | None


def mixed(form: Form, ffn: Any, x: Tensor, grid: Grid) -> Tensor:
    """Compute `ffn.mix(x, grid)` for tokens `(B, N, D)` without prefix tokens, dense.

    Where gradients are wanted, the input and the convolved map are kept for the backward pass, the rest is
    computed again there.
    """
    parameters = [where[name] for where, name in form.parameters]
    parameters += [None] * (10 - len(parameters))
    mix = Mix(grid, (norm_now(form.norms[0]), norm_now(form.norms[1])), form.act, form.act2, form.gate)
    wanted = torch.is_grad_enabled() and (
        x.requires_grad or any(p is not None and p.requires_grad for p in parameters)
    )
    if wanted:
        result: Tensor = _Mix.apply(x, mix, ffn, *parameters)
        return result
    if BATCH in (mix.norms[0].mode, mix.norms[1].mode):
        return _forward(mix, x, parameters)[1]
    y = torch.empty_like(x)
    mix.call("inference", x, parameters, None, x, y, None)
    return y


def norm_now(layer: nn.BatchNorm2d | None) -> Norm:
    """Return how `layer` would normalise in a forward pass now."""
    if layer is None:
        return Norm()
    buffers = layer._buffers
    mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    if not layer.training and mean is not None:
        return Norm(RUNNING, mean, var, None, layer.eps)
    if not layer.training or not layer.track_running_stats:
        return Norm(BATCH, eps=layer.eps)
    momentum = -1.0 if layer.momentum is None else layer.momentum
    return Norm(BATCH, mean, var, batches, layer.eps, momentum)


def _norm(norm: Norm, weight: int, bias: int) -> tuple[int, ...]:
    addresses = map(_address, (norm.running_mean, norm.running_var, norm.batches))
    return norm.mode, weight, bias, *addresses


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _forward(mix: Mix, x: Tensor, parameters: Any) -> tuple[Tensor, Tensor, Kept]:
    """Return the convolved map, the output and what is kept; move the running statistics."""
    batch, _, channels = x.shape
    # As a map: activation checkpointing compares shapes, and so notices that it runs again on another grid.
    convolved = x.new_empty((batch, mix.grid.height, mix.grid.width, channels))
    gated = torch.empty_like(x)
    pooled = values = None
    if mix.gate != NO_GATE:
        pooled, values = x.new_empty((2, batch, channels)).unbind(0)
    kept = Kept(x.new_empty((4, channels)), pooled, values)
    mix.call("forward", x, parameters, kept, x, convolved, gated, pooled, values)
    return convolved, gated, kept


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mix: Mix, ffn: Any, *parameters: Tensor | None) -> Tensor:
        convolved, gated, kept = _forward(mix, x, parameters)
        ctx.mix, ctx.ffn = mix, ffn
        ctx.save_for_backward(x, convolved, *kept, *parameters)
        return gated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Recorded under create_graph=True; without storage under is_grads_batched=True and vmap.
        if torch.is_grad_enabled() or not torch._C._has_storage(grads[0]):
            return _differentiable(ctx, grads[0])
        x, convolved, *kept, parameters = _saved(ctx)
        channels = x.shape[2]
        shapes = [(0,) if p is None else p.shape for p in parameters]
        for i in (0, 1, 3, 4, 5):  # the kernels write these whether the layers have them or not
            shapes[i] = (channels,)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        found = [g.view(shape) for g, shape in zip(x.new_zeros(sum(sizes)).split(sizes), shapes, strict=True)]
        of_x = torch.empty_like(x)
        statistics = Kept(*kept)
        ctx.mix.call("backward", x, parameters, statistics, grads[0].contiguous(), x, convolved,
                     statistics.pooled, statistics.values, of_x, *found)  # fmt: skip
        needed = ctx.needs_input_grad[3:]
        wanted = [
            g if p is not None and n else None for g, p, n in zip(found, parameters, needed, strict=True)
        ]
        return of_x, None, None, *wanted


def _saved(ctx: Any) -> tuple[Any, ...]:
    """Return what a forward pass kept, once in a backward pass: activation checkpointing lets nobody ask
    twice."""
    task, found = ctx.__dict__.pop("unpacked", (None, None))
    if found is None or task != torch._C._current_graph_task_id():
        x, convolved, statistics, pooled, values, *parameters = ctx.saved_tensors
        found = x, convolved, statistics, pooled, values, parameters
    return found


def _differentiable(ctx: Any, grad: Tensor) -> Any:
    """Return the gradients with a graph of their own, by the plain modules."""
    x, *_, parameters = _saved(ctx)
    names = (
        "norm1",
        "conv",
        "norm2",
        *(("gate.fc1", "gate.fc2") if ctx.mix.gate == 1 else ("gate.conv", "")),
    )
    named = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    for layer, norm in zip((ctx.ffn.norm1, ctx.ffn.norm2), ctx.mix.norms, strict=True):
        if isinstance(layer, nn.BatchNorm2d) and norm_now(layer).mode != norm.mode:
            raise RuntimeError(
                "create_graph=True after a batch norm's mode was changed since the forward pass: "
                "call backward first, or set LOCALVIT_KERNELS=plain"
            )
    state = {f"ffn.{n}": p for n, p in zip(named, parameters, strict=True) if p is not None}
    state |= {f"ffn.{n}": b.clone() for n, b in ctx.ffn.named_buffers()}
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = torch.func.functional_call(_Stage(ctx.ffn), state, (x, ctx.mix.grid))
    inputs = [x, None, None, *parameters]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    gradients = torch.autograd.grad(y, [inputs[i] for i in wanted], grad, create_graph=create_graph)
    found = dict(zip(wanted, gradients, strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))


class _Stage(nn.Module):
    def __init__(self, ffn: Any) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        result: Tensor = self.ffn.mix(x, grid)
        return result


class _Again(NamedTuple):
    """Where a tensor that was not kept stood in the output of the stage."""

    shape: Any
    stride: Any
    offset: Any


def not_kept(gated: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which layers do not keep `gated`, an output of :func:`mixed`: it is computed
    once more when their backward pass asks for it."""
    node: Any = gated.grad_fn
    where, version = gated.untyped_storage().data_ptr(), gated._version
    # Those of offloading, checkpointing, counting.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() != where or tensor._version != version:
            return outer[0](tensor) if outer else tensor
        return _Again(tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if not isinstance(packed, _Again):
            return outer[1](packed) if outer else packed
        x, convolved, *kept, parameters = found = _saved(node)
        node.unpacked = torch._C._current_graph_task_id(), found
        again = torch.empty_like(x)
        node.mix.call("again", x, parameters, Kept(*kept), convolved, again, kept[2])
        return again.as_strided(packed.shape, packed.stride, packed.offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _mix_in_place(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gate: list[Tensor],
    height: int,
    width: int,
    act: int,
    act2: int,
) -> Tensor:
    """Compute `x = act2(conv(act(x + shift)) + bias)` in place; return its means over the grid `(B, D)`.

    Tokens before the last `height * width` are prefix tokens, and stay what they were. `gate`: none, or
    weights and biases (R, D), (R), (D, R), (D) of the linear layers in `clamp(second(relu(first(means))), 0,
    1)`, which is then multiplied into `x`. All is in single precision on the CPU, dense.
    """
    prefix = x.shape[1] - height * width
    if prefix < 0:
        raise ValueError(f"{x.shape[1]} tokens for a grid of {height} x {width}")
    kernel = (x.shape[2], 1, weight.shape[-1], weight.shape[-1])
    if weight.shape != kernel or weight.shape[-1] not in KERNEL_SIZES or x.shape[2] % LANES:
        raise ValueError(
            f"a kernel {tuple(weight.shape)} for {x.shape[2]} channels is not accepted (accepted: a "
            f"depth-wise kernel of size {KERNEL_SIZES} and a multiple of {LANES} channels)"
        )
    layers: list[Any] = gate or [None] * 4
    for tensor in (x, shift, weight, bias, *layers):
        if tensor is not None and not is_dense(tensor):
            raise ValueError(
                f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()} is not accepted "
                "(accepted: dense float32 on the CPU)"
            )
    means = x.new_empty((x.shape[0], x.shape[2]))
    mix = Mix(Grid(height, width, prefix), (Norm(), Norm()), act, act2, CLAMP if gate else NO_GATE)
    mix.call("inference", x, (None, shift, weight, bias, None, None, *layers), None, x, x, means)
    return means


# Not by `custom_op`, which takes three times as long to call: a model calls it in every block.
torch.library.define(
    "localvit::mix_",
    "(Tensor(a!) x, Tensor? shift, Tensor weight, Tensor? bias, Tensor[] gate, int height, int width,"
    " int act, int act2) -> Tensor",
)
torch.library.impl("localvit::mix_", "cpu", _mix_in_place)
mix_ = torch.ops.localvit.mix_.default


@torch.library.register_fake("localvit::mix_")
def _(x, shift, weight, bias, gate, height, width, act, act2):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], x.shape[2]))
