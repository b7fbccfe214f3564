"""What training a model takes of memory, found out by one small update of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localvit.config import Precision
from localvit.runtime import autocast

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of training, in bytes.

    Attributes:
        weights: Parameters and buffers.
        saved: Those of them that are in the state dict.
        gradients: Of the trainable parameters.
        optimizer: The optimizer's state.
        activations: What the forward pass of one picture keeps for the backward pass.
        activations_fixed: What it keeps for any number of pictures.
    """

    weights: int
    saved: int
    gradients: int
    optimizer: int
    activations: int
    activations_fixed: int


def measure_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    input_size: tuple[int, int, int],
    precision: Precision = "fp32",
) -> StepMemory:
    """Count the memory of a real update on the CPU; the model's weights move.

    Activations are counted as the distinct storages that autograd keeps, on 2 and on 4 pictures; the
    difference is what a picture takes. GPU kernels may keep a little more or less.

    Args:
        model: On the CPU.
        optimizer: Over its trainable parameters.
        input_size: (C, H, W).
        precision: Of the forward pass, by autocast, as in training.
    """
    model.train()
    few, _ = _forward(model, 2, input_size, precision)
    more, loss = _forward(model, 4, input_size, precision)
    loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    states = (value for state in optimizer.state.values() for value in state.values())
    return StepMemory(
        weights=_bytes([*parameters, *model.buffers()]),
        saved=_bytes(model.state_dict().values()),
        gradients=_bytes([p.grad for p in parameters if p.grad is not None]),
        optimizer=_bytes(value for value in states if isinstance(value, Tensor)),
        activations=(more - few) // 2,
        activations_fixed=2 * few - more,
    )


def _forward(
    model: nn.Module, images: int, input_size: tuple[int, int, int], precision: Precision
) -> tuple[int, Tensor]:
    """Bytes that autograd keeps of a forward pass, and something to differentiate."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # While the graph lives nothing that it keeps is freed, so no address is counted for two tensors.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(precision, _CPU):
        output = model(torch.zeros(images, *input_size))
        parts = output if isinstance(output, tuple) else (output,)
        loss: Tensor = sum((part.float().square().mean() for part in parts), torch.zeros(()))
    return sum(kept.values()), loss


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
