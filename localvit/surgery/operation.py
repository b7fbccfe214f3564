"""Locality put into a model in place, and taken out again."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Tuple  # noqa: UP035 (TorchScript reads hook signatures by typing's names)

import torch
from timm.models._input import update_model_args
from torch import Tensor, nn

from localvit.locality import GridRecord, HiddenLocality, LocalityConfig
from localvit.surgery.drop_path import join_drop_path, separate_drop_path
from localvit.surgery.layouts import GridSource
from localvit.surgery.placement import BlockSpec
from localvit.surgery.preview import HIDDEN_SLOT, Change, Plan, discarded_layers, plan_changes, replacement

# Name of the generic model (localvit.models) that a saved configuration of a localized model refers to.
LOCALIZED = "localized"


@dataclass(frozen=True)
class Report:
    """What was done to a model; kept on it as `model.localization`, outside the state dict.

    Attributes:
        plan: The plan that was carried out.
        seed: Seed of the new weights.
        originals: Path in the model -> the layer that stood there, with its weights at the time.
            `None` where they were not kept.
    """

    plan: Plan
    seed: int
    originals: dict[str, nn.Module] | None

    def __str__(self) -> str:
        return str(self.plan)


class RestoreError(RuntimeError):
    """The model cannot be given back the layers it had."""


def localize(
    model: nn.Module,
    config: LocalityConfig | None = None,
    blocks: BlockSpec = "all",
    *,
    also: Mapping[str, LocalityConfig] | None = None,
    seed: int | None = None,
    keep_originals: bool = True,
    count_macs: bool = True,
) -> Report:
    """Put locality into the FFNs of a timm model, in place.

    The model stays the class it was. New modules take device, dtype and mode (train or eval) from what
    they replace. Every FFN draws its new weights from a seed of its own, so the global random state is
    as before and a block starts alike whichever other blocks are chosen: seeds stay paired.

    The model then takes any image size it took before, with one forward pass at a time per instance
    (threads that run at once need a copy each), and under gradient checkpointing one image size per
    backward pass.

    Args:
        model: A timm model with a row in the layout table (`localvit.surgery.layouts`).
        config: Default: the paper's. `LocalityConfig(init="preserve")` for pretrained weights.
        blocks: Which blocks (`localvit.surgery.placement.select_blocks`). In a pyramid they are
            counted through all stages.
        also: Name of a further group of FFNs -> its configuration: `"tokens_to_token"` (the two stages
            in front of a T2T-ViT's blocks), `"inner"` (the pixel transformers of TNT). They are left
            alone otherwise.
        seed: Seed of the new weights; default: what `torch.manual_seed` was last given.
        keep_originals: Keep the replaced layers (their memory too) for `restore`.
        count_macs: Count multiply-accumulates for the report, which takes most of the time of this call.

    Returns:
        What was done; also `model.localization`.

    Raises:
        UnsupportedModelError: for a model that cannot be localized.
        ValueError: if `blocks` or `config` does not fit it. In both cases the model is as it was.
    """
    the_plan, changes = plan_changes(model, config, blocks, also, count=count_macs)
    seed = torch.initial_seed() if seed is None else seed
    sources = dict.fromkeys(site.source for site, _ in changes)
    records = {s: GridRecord(*s.static, constant=s.reads == "never") for s in sources}
    built = [(change, _build(change, records[change.site.source], seed)) for change in changes]

    originals: dict[str, nn.Module] = {}
    for change, module in built:
        originals |= _install(change, module)
    for source, record in records.items():
        _hook(source, record)
    report = Report(the_plan, seed, originals if keep_originals else None)
    model.localization = report  # type: ignore[assignment]
    _record_for_saving(model, the_plan, blocks)
    return report


def restore(model: nn.Module) -> None:
    """Undo `localize`, in place.

    After `init="preserve"` the original FFNs come back with their *current* weights (what the
    convolution learnt is dropped). After `init="paper"` the layers come back as they were at surgery.

    Raises:
        RestoreError: if the model is not localized; or after `init="paper"` if the original layers
            were not kept, as in a model that was created or loaded in localized form.
    """
    report = getattr(model, "localization", None)
    if not isinstance(report, Report):
        raise RestoreError("the model is not localized")
    configs = (report.plan.config, *report.plan.also.values())
    if report.originals is None and any(config.init == "paper" for config in configs):
        raise RestoreError(
            "the original layers are not there: the model was created or loaded in localized form, and a "
            "saved model holds only the layers in use (create the plain model by its own name instead)"
        )
    for name, module in list(model.named_modules()):
        if isinstance(module, HiddenLocality):
            _set(model, name, module.then)
    for path, original in (report.originals or {}).items():
        like = next(model.get_submodule(path.rpartition(".")[0]).parameters())
        _set(model, path, original.to(like.device, like.dtype).train(model.training))
    for module in model.modules():
        join_drop_path(module)
    _unhook(model)
    del model.localization
    _forget_for_saving(model)


def record_input_grid(self: nn.Module, inputs: Tuple[Tensor], output: Tensor) -> None:  # noqa: UP006
    """Forward hook of an embedding: note the lattice of the images under way.

    A plain function that finds the record on the module it is called for, so that a copy of the model
    writes to its own record. (A closure or bound method would write to the original's.)
    """
    if not torch.jit.is_scripting():
        self.grid_record.size = self.dynamic_feat_size(inputs[0].shape[-2:])  # type: ignore


def record_output_grid(self: nn.Module, inputs: Tuple[Tensor], output: Tensor) -> None:  # noqa: UP006
    """The same for a module whose output is a map (B, H, W, C)."""
    if not torch.jit.is_scripting():
        self.grid_record.size = (output.shape[1], output.shape[2])  # type: ignore


_HOOKS = {"input": record_input_grid, "output": record_output_grid}


def _hook(source: GridSource, record: GridRecord) -> None:
    if source.reads != "never":
        source.module.grid_record = record  # type: ignore[assignment]
        source.module.register_forward_hook(_HOOKS[source.reads])


def _build(change: Change, record: GridRecord, seed: int) -> nn.Module:
    site = change.site
    like = site.module.get_parameter("fc2.weight")
    digest = hashlib.sha256(f"{seed}:{site.path}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little"))
        module = replacement(change, record)()
    return module.to(like.device, like.dtype).train(site.module.training)


def _install(change: Change, module: nn.Module) -> dict[str, nn.Module]:
    """Put `module` in its place. Returns path -> original of what no longer has a place."""
    site = change.site
    if change.config.init == "preserve":
        site.module.add_module(HIDDEN_SLOT, module)  # it holds the layer it takes the place of
        return {}
    discarded = discarded_layers(change)
    if site.drop_path in discarded:
        separate_drop_path(site.block)
    nothing = nn.Identity().train(site.block.training)
    new = {site.ffn: module} | dict.fromkeys(discarded, nothing)
    originals = {f"{site.name}.{name}": site.block.get_submodule(name) for name in new}
    for name, layer in new.items():
        site.block.add_module(name, layer)
    return originals


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).add_module(name, module)


def _unhook(model: nn.Module) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook in _HOOKS.values():
                del module._forward_hooks[key]
                del module.grid_record


def _record_for_saving(model: nn.Module, plan: Plan, blocks: BlockSpec) -> None:
    """Make timm's save_for_hf write a configuration from which the localized model can be created."""
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
    model.default_cfg = model.pretrained_cfg  # timm's older name for the same
