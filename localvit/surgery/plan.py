"""What a localization will do to a model, worked out before anything is done."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.models._input import get_model_input_config
from torch import nn

from localvit.cost import count_macs, count_parameters, macs_of, on_meta
from localvit.locality import GridRecord, HiddenLocality, LocalityConfig, LocalityFeedForward
from localvit.surgery.layouts import Site, UnsupportedModelError, layout_of
from localvit.surgery.placement import BlockSpec, select_blocks

# The layer in front of which the hidden state of an FFN stands complete (after activation and gating).
HIDDEN_SLOT = "drop1"


@dataclass(frozen=True)
class SitePlan:
    """What happens to one FFN.

    Attributes:
        name: Path of the FFN in the model.
        action: ``"replace"`` (``init="paper"``) or ``"extend"`` (``init="preserve"``).
        old, new: Class names before and after.
        weights: What becomes of the old weights, in words.
        parameters, macs: (before, after), the block's residual branch of the FFN included.
        dead_parameters: Trainable parameters that no output of the model depends on, as full names. The
            head of many models reads only prefix tokens, and then what the last block does to patch
            tokens is never read. They are kept for compatibility with published weights.
    """

    name: str
    action: str
    old: str
    new: str
    weights: str
    parameters: tuple[int, int]
    macs: tuple[int, int]
    dead_parameters: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Printable, and JSON through :meth:`to_dict`. ``macs`` is for one image of the configured size."""

    model: str
    config: LocalityConfig
    blocks: tuple[int, ...]
    depth: int
    sites: tuple[SitePlan, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]

    @property
    def dead_parameters(self) -> tuple[str, ...]:
        return tuple(name for site in self.sites for name in site.dead_parameters)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "config": self.config.to_dict()}

    def __str__(self) -> str:
        lines = [f"{self.model}: locality in {len(self.sites)} of {self.depth} blocks"]
        for site in self.sites:
            note = f"; {len(site.dead_parameters)} dead parameters" if site.dead_parameters else ""
            lines.append(f"  {site.name}: {site.old} -> {site.new} ({site.weights}){note}")
        lines.append(f"  parameters {_change(self.parameters, 1e6, 'M')}, {_change(self.macs, 1e9, 'GMACs')}")
        if self.dead_parameters:
            lines.append("  dead: no output depends on the patch tokens that leave the last block")
        return "\n".join(lines)


def plan(model: nn.Module, config: LocalityConfig | None = None, blocks: BlockSpec = "all") -> Plan:
    """What :func:`localvit.localize` would do; the model is left as it is.

    Raises:
        UnsupportedModelError: if the model cannot be localized.
        ValueError: if ``blocks`` does not fit it, or a width that follows from ``config`` is impossible.
    """
    config = config or LocalityConfig()
    sites, chosen = planned_sites(model, blocks)
    plans = tuple(_plan_site(sites[i], config) for i in chosen)
    before = count_parameters(model), count_macs(model, _input_size(model))
    after = [
        total + sum(getattr(p, field)[1] - getattr(p, field)[0] for p in plans)
        for total, field in zip(before, ("parameters", "macs"), strict=True)
    ]
    return Plan(
        model=type(model).__name__,
        config=config,
        blocks=chosen,
        depth=len(sites),
        sites=plans,
        parameters=(before[0], after[0]),
        macs=(before[1], after[1]),
    )


def planned_sites(model: nn.Module, blocks: BlockSpec) -> tuple[list[Site], tuple[int, ...]]:
    """All FFNs of the model and the chosen indices, after every check that needs no configuration."""
    refuse_wrapped(model)
    if any(isinstance(m, (LocalityFeedForward, HiddenLocality)) for m in model.modules()):
        raise UnsupportedModelError("the model is localized already (localvit.restore undoes that)")
    sites = list(layout_of(model).sites(model))
    modules = [id(site.module) for site in sites]
    if len(set(modules)) < len(modules):
        raise UnsupportedModelError("two blocks share one FFN, so one of them cannot be changed alone")
    return sites, select_blocks(blocks, len(sites))


def refuse_wrapped(model: nn.Module) -> None:
    """Raises :class:`UnsupportedModelError` for models inside another: they would keep the old graph."""
    wrappers: dict[type, str] = {
        nn.parallel.DistributedDataParallel: "wrapped in DistributedDataParallel",
        nn.DataParallel: "wrapped in DataParallel",
        torch.jit.ScriptModule: "scripted",
        torch.fx.GraphModule: "an fx graph",
        torch._dynamo.OptimizedModule: "compiled",
    }
    for wrapper, state in wrappers.items():
        if isinstance(model, wrapper):
            raise UnsupportedModelError(f"the model is {state}; localize it before that")
    if model._compiled_call_impl is not None:
        raise UnsupportedModelError("the model is compiled; localize it before that")


def replacement(
    site: Site, config: LocalityConfig, record: GridRecord | None = None
) -> Callable[[], nn.Module]:
    """Builder of the module that carries locality at ``site``."""
    prefix = site.grid.num_prefix_tokens
    if config.init == "paper":
        return lambda: LocalityFeedForward(site.dim, config, num_prefix_tokens=prefix, grid_record=record)
    then = site.module.get_submodule(HIDDEN_SLOT)
    return lambda: HiddenLocality(site.hidden_dim, then, config, num_prefix_tokens=prefix, grid_record=record)


def discarded_layers(site: Site, config: LocalityConfig) -> tuple[str, ...]:
    """Attributes of the block that locality as configured does without."""
    config = config.resolve()
    keep = {site.norm: config.prenorm, site.layer_scale: config.layer_scale, site.drop_path: config.drop_path}
    return tuple(name for name, kept in keep.items() if not kept)


def _plan_site(site: Site, config: LocalityConfig) -> SitePlan:
    new = on_meta(replacement(site, config))
    height, width, prefix = site.grid
    tokens = height * width + prefix
    dropped = sum(count_parameters(site.block.get_submodule(n)) for n in discarded_layers(site, config))
    old_parameters = count_parameters(site.module)
    old_macs = macs_of(site.module, torch.empty(1, tokens, site.dim, device="meta"))
    replaces = config.init == "paper"
    width_in = site.dim if replaces else site.hidden_dim
    new_macs = macs_of(new, torch.empty(1, tokens, width_in, device="meta"), site.grid)
    old_class = type(site.module).__name__
    return SitePlan(
        name=f"{site.name}.{site.ffn}",
        action="replace" if replaces else "extend",
        old=old_class,
        new=type(new).__name__ if replaces else f"{old_class} + {type(new).__name__}",
        weights="discarded, new ones drawn" if replaces else "kept, a zero kernel added",
        parameters=(
            old_parameters + dropped,
            count_parameters(new) + (0 if replaces else old_parameters),
        ),
        macs=(old_macs, new_macs + (0 if replaces else old_macs)),
        dead_parameters=tuple(_dead_parameters(site, new, config)) if site.dead_patches else (),
    )


def _dead_parameters(site: Site, new: nn.Module, config: LocalityConfig) -> list[str]:
    config = config.resolve()
    path = f"{site.name}.{site.ffn}." + ("" if config.init == "paper" else f"{HIDDEN_SLOT}.")
    names = [name for name, _ in new.named_parameters()]
    if config.prefix == "mlp":  # prefix tokens keep the point-wise path alive
        last_norm = config.norm[2] if isinstance(config.norm, tuple) else config.norm
        if last_norm in ("batch", "group"):
            return []  # and its last norm takes statistics over prefix and patch tokens alike
        return [path + name for name in names if name.split(".")[0] in ("conv", "norm2", "gate")]
    around = [site.norm, site.layer_scale] if config.prefix == "bypass" else []
    kept = [name for name in around if name not in discarded_layers(site, config)]
    outside = [
        f"{site.name}.{layer}.{n}"
        for layer in kept
        for n, _ in site.block.get_submodule(layer).named_parameters()
    ]
    return outside + [path + name for name in names]


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    size = get_model_input_config(model)["input_size"]
    source: Any = layout_of(model).grid_source(model)
    return (int(size[0]), *source.img_size)


def _change(values: tuple[int, int], unit: float, name: str) -> str:
    before, after = values
    return f"{before / unit:.3f} -> {after / unit:.3f} {name} ({(after - before) / before:+.1%})"
