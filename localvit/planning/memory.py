"""Memory of training, measured in one small step."""

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
        saved: Parameters and buffers in the state dict.
        gradients: Gradients of the trainable parameters.
        optimizer: State of the optimizer.
        activations: Tensors saved for the backward pass, per image.
        activations_fixed: Tensors saved for the backward pass, for any number of images.
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
    """Count the memory of a real step on the CPU, which changes the model's weights.

    Activations are the distinct storages that autograd saves, counted with 2 and with 4 images; the
    difference gives the memory per image. GPU kernels may save slightly more or less.

    Args:
        model: Model on the CPU.
        optimizer: Optimizer of its trainable parameters.
        input_size: (C, H, W) of an image.
        precision: Precision of the forward pass, by autocast, as in training.
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
    """Return the bytes that autograd saves in a forward pass, and a loss to differentiate."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The graph keeps its saved tensors alive, so no address is counted for two tensors.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(precision, _CPU):
        output = model(torch.zeros(images, *input_size))
        parts = output if isinstance(output, tuple) else (output,)
        loss: Tensor = sum((part.float().square().mean() for part in parts), torch.zeros(()))
    return sum(saved.values()), loss


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
