"""Abilities of a model beyond its forward pass, tried on the plain and on the localized model.

An ability makes a callable from a model. It counts if outputs and gradients are those of the model itself.
`test_abilities.py` tries a few classes; `make supported` tries all and writes the table.
"""

import copy
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torch.distributed as dist
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import localvit
from localvit import LocalityConfig

Outcome = Literal["yes", "no", "lost", "left alone"]
PRESERVE, PAPER = LocalityConfig(init="preserve"), LocalityConfig(gate="none")
Make = Callable[[Any, Tensor], Callable[[Tensor], object]]


@dataclass(frozen=True)
class Ability:
    """One ability.

    Attributes:
        make: Function of a model and its images that returns what runs instead of the model.
        train: Compare gradients of two steps in training mode, else outputs in evaluation mode.
        config: Locality of the localized model.
        own: True for a function of localvit, which plain models are not asked for.
    """

    make: Make
    train: bool = False
    config: LocalityConfig = PRESERVE
    own: bool = False


def total(output: object) -> Tensor:
    """Sum the squares of all tensors of an output."""
    if isinstance(output, Tensor):
        return output.square().sum()
    values = output.values() if isinstance(output, dict) else output
    return sum(map(total, values))


def _checkpointed(model: Any, images: Tensor) -> Any:
    if hasattr(model, "gradient_checkpointing_enable"):  # transformers
        model.gradient_checkpointing_enable()
    else:
        model.set_grad_checkpointing()
    return model


def _compiled(model: Any, images: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)


def _exported(model: Any, images: Tensor) -> Any:
    return torch.export.export(model, (images,), strict=False).module()


def _scripted(model: Any, images: Tensor) -> Any:
    model(images)  # so that the grid is known
    return torch.jit.script(model)


def _reopened(model: Any, images: Tensor) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        if not hasattr(model, "save_pretrained"):
            save_for_hf(model, folder, safe_serialization=True)
            return timm.create_model(f"local-dir:{folder}", pretrained=True)
        if hasattr(model, "localization"):
            from localvit import hf

            hf.save_pretrained(model, f"{folder}/saved")
            return hf.from_pretrained(f"{folder}/saved")
        model.save_pretrained(f"{folder}/saved")
        return type(model).from_pretrained(f"{folder}/saved")


def _sharded(model: Any, images: Tensor) -> Any:
    for module in reversed(list(model.modules())):
        if type(module).__name__.endswith(("Block", "Layer")):
            fully_shard(module)
    return fully_shard(model)


def _selective(model: Any, images: Tensor) -> Any:
    assert localvit.set_selective_checkpointing(model) > 0
    return model


ABILITIES = {
    "deepcopy": Ability(lambda model, images: copy.deepcopy(model)),
    "pickle": Ability(lambda model, images: pickle.loads(pickle.dumps(model))),
    "gradient checkpointing": Ability(_checkpointed, train=True),
    "`torch.compile`": Ability(_compiled),
    "`torch.export`": Ability(_exported),
    "TorchScript": Ability(_scripted),
    "save and open": Ability(_reopened),
    "DDP": Ability(lambda model, images: DistributedDataParallel(model), train=True),
    "FSDP2": Ability(_sharded, train=True),
    "`fuse`": Ability(lambda model, images: localvit.fuse(model), own=True),
    "selective checkpointing": Ability(_selective, train=True, config=PAPER, own=True),
}


def outcome(plain: nn.Module, images: Tensor, ability: Ability) -> tuple[Outcome, str]:
    """Try an ability; return the outcome, and why the localized model lacks it.

    "no" if the plain model lacks it too, or cannot be localized by `ability.config`; "lost" if only the
    localized one does; "left alone" if `fuse` knows none of its layers.
    """
    local = copy.deepcopy(plain)
    try:
        localvit.localize(local, ability.config, count_macs=False)
    except localvit.UnsupportedModelError as error:
        return "no", str(error)
    with torch.no_grad():
        for _, parameter in localvit.locality_parameters(local):
            parameter.normal_(std=0.1)
    with _one_process(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _try(ability, local, images)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            return "yes", ""
        if ability.own:
            known = "no fast form" in reason or "are the same module" in reason
            return "left alone" if known else "lost", reason
        try:
            _try(ability, plain, images)
        except Exception:
            return "no", reason
        return "lost", reason


def _try(ability: Ability, model: nn.Module, images: Tensor) -> None:
    expected = _result(copy.deepcopy(model), images, ability.train)
    model = copy.deepcopy(model).train(ability.train)
    torch.manual_seed(0)
    result = _result(ability.make(model, images), images, ability.train)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def _result(model: Any, images: Tensor, train: bool) -> list[Tensor]:
    """Return the output; in training, also the gradients of two steps."""
    if isinstance(model, nn.Module) and not isinstance(model, torch.fx.GraphModule):
        model.train(train)
    torch.manual_seed(0)
    if not train:
        with torch.no_grad():
            return [total(model(images))]
    for _ in range(2):
        loss = total(model(images))
        loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss, *(grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads)]


@contextmanager
def _one_process() -> Iterator[None]:
    """Make a process group of this process alone."""
    hook = sys.excepthook  # each group wraps it once more
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
