"""Insertion of locality into a model in place, and its removal."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Tuple  # noqa: UP035 (TorchScript reads hook signatures by typing's names)

import torch
from timm.models._input import update_model_args
from torch import Tensor, nn

from localvit.locality import HiddenLocality, LocalityConfig
from localvit.surgery.adapters import ModelAdapter
from localvit.surgery.drop_path import join_drop_path, separate_drop_path
from localvit.surgery.ffns import weight_of
from localvit.surgery.grids import hook, unhook
from localvit.surgery.placement import BlockSpec
from localvit.surgery.preview import Plan, PlannedChange, discarded_layers, plan_changes, replacement

# Name of the generic model (localvit.models) in the saved configuration of a localized model.
LOCALIZED = "localized"


@dataclass(frozen=True)
class Localization:
    """Record of a localization, stored as `model.localization`, outside the state dict.

    Attributes:
        plan: The plan that was applied.
        seed: Seed of the new weights.
        originals: Path in the model -> original layer or LayerScale parameter, with its weights at that time.
            `None` if the original layers were not kept.
    """

    plan: Plan
    seed: int
    originals: dict[str, nn.Module | nn.Parameter] | None

    def __str__(self) -> str:
        return str(self.plan)


class RestoreError(RuntimeError):
    """Error for a model whose original layers cannot be restored."""


def localize(
    model: nn.Module,
    config: LocalityConfig | None = None,
    blocks: BlockSpec = "all",
    *,
    also: Mapping[str, LocalityConfig] | None = None,
    adapter: ModelAdapter | None = None,
    seed: int | None = None,
    keep_originals: bool = True,
    count_macs: bool = True,
) -> Localization:
    """Insert locality into the FFNs of a timm model, in place.

    The class of the model stays the same. New modules have the device, dtype and mode (train or eval) of
    those they replace. Each FFN draws its new weights from its own seed: the global random state does not
    change, and the initial weights of a block do not depend on which other blocks are chosen.

    The model accepts the same image sizes as before. An instance runs one forward pass at a time (each thread
    needs its own copy), and with gradient checkpointing one image size per backward pass.

    Args:
        model: A model with an adapter (`localvit models --supported` lists the classes).
        config: Configuration; default: the paper's. Use `LocalityConfig(init="preserve")` for pretrained
            weights.
        blocks: Blocks to change (`localvit.surgery.placement.select_blocks`). In a pyramid they are counted
            through all stages.
        also: Configurations of further groups of FFNs, by name: `"tokens_to_token"` (the two stages
            before the blocks of T2T-ViT), `"inner"` (the pixel transformers of TNT). Default: no change.
        adapter: Adapter for a model whose class has none, or another one; default: that of its class.
        seed: Seed of the new weights; default: the seed of the last `torch.manual_seed`.
        keep_originals: Keep the replaced layers (and their memory) for `restore`.
        count_macs: Count multiply-accumulates for the plan and compare tokens with grids, which takes most
            of the time of this call.

    Returns:
        The record, which is also `model.localization`.

    Raises:
        UnsupportedModelError: if the model cannot be localized.
        ValueError: if `blocks` or `config` does not fit it. In both cases the model does not change.
    """
    the_plan, changes = plan_changes(model, config, blocks, also, adapter, count=count_macs)
    seed = torch.initial_seed() if seed is None else seed
    built = [(change, _build(change, seed)) for change in changes]

    originals: dict[str, nn.Module | nn.Parameter] = {}
    for change, module in built:
        originals |= _install(change, module)
    for record in dict.fromkeys(site.record for site, _ in changes):
        if record is not None:
            hook(record)
    done = Localization(the_plan, seed, originals if keep_originals else None)
    model.localization = done  # type: ignore[assignment]
    _record_for_saving(model, the_plan, blocks)
    return done


def restore(model: nn.Module) -> None:
    """Undo `localize`, in place.

    After `init="preserve"` the FFNs keep their *current* weights, and only the convolutions are removed.
    After `init="paper"` the original layers return with their weights at the time of `localize`.

    Raises:
        RestoreError: if the model is not localized, or if the original layers of `init="paper"` were not
            kept, as in a model that was created or loaded in localized form.
    """
    done = getattr(model, "localization", None)
    if not isinstance(done, Localization):
        raise RestoreError("the model is not localized; localvit.localize does that")
    configs = (done.plan.config, *done.plan.also.values())
    if done.originals is None and any(config.init == "paper" for config in configs):
        raise RestoreError(
            "the model was created or loaded in localized form, or its original layers were not kept; "
            "create the plain model by its own name"
        )
    for name, module in list(model.named_modules()):
        if isinstance(module, HiddenLocality):
            _remove(model, name, module)
    for path, original in (done.originals or {}).items():
        like = next(model.get_submodule(path.rpartition(".")[0]).parameters())
        if isinstance(original, nn.Parameter):
            original.data = original.data.to(like.device, like.dtype)
        else:
            original = original.to(like.device, like.dtype).train(model.training)
        _set(model, path, original)
    for module in model.modules():
        join_drop_path(module)
    unhook(model.modules())
    del model.localization
    _forget_for_saving(model)


def add_locality(self: nn.Module, inputs: Tuple[Tensor]) -> Tuple[Tensor]:  # noqa: UP006
    """Add locality to the hidden state in front of a layer with parameters (forward pre-hook)."""
    return (self.locality(inputs[0]),)  # type: ignore[operator]


def _build(change: PlannedChange, seed: int) -> nn.Module:
    site = change.site
    like = weight_of(site.module.get_submodule(site.structure.last))
    digest = hashlib.sha256(f"{seed}:{site.path}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little"))
        module = replacement(change)
    return module.to(like.device, like.dtype).train(site.module.training)


def _install(change: PlannedChange, module: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """Install `module` at its site; return path -> original of each layer that it replaces."""
    site = change.site
    if change.config.init == "preserve":
        slot = site.module.get_submodule(site.structure.slot)
        _set(site.module, site.slot, module)  # wraps the layer that it replaces
        if module.then is not slot:
            slot.register_forward_pre_hook(add_locality)
        return {}
    discarded = discarded_layers(change)
    if site.row.drop_path in discarded:
        separate_drop_path(site.block)
    new: dict[str, Any] = {name: nn.Identity().train(site.block.training) for name in discarded}
    new[site.row.ffn] = module
    originals = {f"{site.name}.{name}": attrgetter(name)(site.block) for name in new}
    for name, layer in new.items():
        original = originals[f"{site.name}.{name}"]
        if isinstance(original, nn.Parameter):  # a LayerScale: the block multiplies by it
            delattr(site.block, name)
            site.block.register_buffer(name, torch.ones_like(original.detach()), persistent=False)
        else:
            _set(site.block, name, layer)
    return originals


def _set(model: nn.Module, path: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        delattr(module, name)
        module.register_parameter(name, value)
    else:
        module.add_module(name, value)


def _remove(model: nn.Module, path: str, locality: HiddenLocality) -> None:
    layer = model.get_submodule(path.rpartition(".")[0])
    for key, function in list(layer._forward_pre_hooks.items()):
        if function is add_locality:
            del layer._forward_pre_hooks[key]
            del layer.locality
            return
    _set(model, path, locality.then)


def _record_for_saving(model: nn.Module, plan: Plan, blocks: BlockSpec) -> None:
    """Make timm's `save_for_hf` write a configuration that creates the localized model."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if not cfg or not cfg.get("architecture"):
        return  # not made by timm.create_model, or under construction by localvit.models
    also = {"also": plan.to_dict()["also"]} if plan.also else {}
    locality = plan.config.to_dict()
    update_model_args(model, base=cfg["architecture"], locality=locality, blocks=blocks, **also)
    _set_architecture(model, LOCALIZED)


def _forget_for_saving(model: nn.Module) -> None:
    args: Any = getattr(model, "_model_args", {})
    base = args.get("base")
    if base is not None:
        kept = {k: v for k, v in args.items() if k not in ("base", "locality", "blocks", "also")}
        model._model_args = kept  # type: ignore[assignment]
        _set_architecture(model, base)


def _set_architecture(model: nn.Module, name: str) -> None:
    cfg: Any = model.pretrained_cfg
    model.pretrained_cfg = {**cfg, "architecture": name}  # type: ignore[assignment]
    model.default_cfg = model.pretrained_cfg  # its former name in timm
