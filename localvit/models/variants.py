"""Names: each a baseline, a locality configuration, and what the reference does differently.

Registered with timm on ``import localvit``, so ``timm.create_model("localvit_tiny_patch16_224")`` works
with all that timm's factory offers. :func:`localized` makes any other localized model by its parts.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.error import URLError

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from localvit.locality import LocalityConfig
from localvit.models.published import to_own_keys
from localvit.surgery import LOCALIZED, BlockSpec, localize

# How timm's features_only reads a plain transformer, and the factory arguments that are not the base's.
_FEATURES = {"out_indices": 3, "feature_cls": "getter"}
_FACTORY_ARGS = ("features_only", "out_indices", "feature_cls", "pretrained_model_args")

_RELEASES = "https://github.com/ofsoundof/LocalViT/releases/download/v1.0.0/"
_LOCALVIT_README = "ofsoundof/LocalViT README.md"
_DEIT_README = "facebookresearch/deit README_deit.md"


@dataclass(frozen=True)
class Published:
    """ImageNet-1k validation accuracy in percent, as its source states it."""

    top1: float
    top5: float
    source: str


@dataclass(frozen=True)
class Variant:
    """One name.

    Attributes:
        base: timm name of the baseline.
        locality: What is put into its FFNs.
        args: Constructor arguments in which the reference differs from the baseline.
        published: Accuracy that the authors report.
        file: Name of the authors' weights among their releases.
    """

    base: str
    locality: LocalityConfig
    args: Mapping[str, Any] = field(default_factory=dict)
    published: Published | None = None
    file: str | None = None


# Head counts: the reference's LocalViT-T has 4 and -S 8 where DeiT has 3 and 6 (models/localvit.py there).
# Gate reductions: tables 2 and 5 of the paper; 192 and 384 leave 4 squeeze units.
VARIANTS: dict[str, Variant] = {
    "localvit_tiny_patch16_224": Variant(
        base="deit_tiny_patch16_224",
        locality=LocalityConfig(gate_reduction=192),
        args={"num_heads": 4},
        published=Published(74.84, 92.61, _LOCALVIT_README),
        file="localvit_t.pth",
    ),
    "localvit_tiny_se4_patch16_224": Variant(
        base="deit_tiny_patch16_224",
        locality=LocalityConfig(gate_reduction=4),
        args={"num_heads": 4},
        published=Published(75.74, 93.05, _LOCALVIT_README),
        file="localvit_t_se4.pth",
    ),
    "localvit_tiny_relu6_x6_patch16_224": Variant(
        base="deit_tiny_patch16_224",
        locality=LocalityConfig(activation="relu6", gate="none", expansion=6),
        args={"num_heads": 4},
    ),
    "localvit_small_patch16_224": Variant(
        base="deit_small_patch16_224",
        locality=LocalityConfig(gate_reduction=384),
        args={"num_heads": 8},
        published=Published(80.78, 95.38, _LOCALVIT_README),
        file="localvit_s.pth",
    ),
}

# timm's names of the plain models that the variants are compared with.
BASELINES: dict[str, Published] = {
    "deit_tiny_patch16_224": Published(72.2, 91.1, _DEIT_README),
    "deit_small_patch16_224": Published(79.9, 95.0, _DEIT_README),
}


def _default_cfg(variant: Variant) -> dict[str, Any]:
    """timm's pretrained configuration: evaluation as in the reference (resize 256, centre crop 224)."""
    return {
        "url": _RELEASES + variant.file if variant.file else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 224 / 256,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/ofsoundof/LocalViT",
        "paper_ids": "arXiv:2104.05707",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k" if v.file else name: _default_cfg(v) for name, v in VARIANTS.items()}
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    variant = VARIANTS[name]

    def build(**model_args: Any) -> nn.Module:
        return _localized_base(variant.base, variant.locality, "all", **{**variant.args, **model_args})

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' files hold one
            return build_model_with_cfg(
                build,
                name,
                pretrained,
                pretrained_filter_fn=to_own_keys,
                feature_cfg=dict(_FEATURES),
                **kwargs,
            )
    except URLError as error:
        url = _RELEASES + str(variant.file)
        raise RuntimeError(
            f"pretrained weights of {name} are missing: {url} could not be fetched ({error.reason}). Fetch "
            "the file elsewhere and use localvit.load_official(path), or pass pretrained=False"
        ) from error


def _localized_base(
    base: str, locality: LocalityConfig | None, blocks: BlockSpec, **kwargs: Any
) -> nn.Module:
    model = timm.create_model(base, **kwargs)
    localize(model, locality, blocks, keep_originals=False)
    model._model_args = {}  # type: ignore[assignment]  # timm records the arguments of the outer call
    return model


def localized(
    pretrained: bool = False,
    *,
    base: str,
    locality: Mapping[str, Any] | None = None,
    blocks: BlockSpec = "all",
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Any model with locality, by its parts: ``timm.create_model("localized", base=..., locality=...)``.

    All arguments are JSON values, so a model saved by timm's ``save_for_hf`` is created again from its
    configuration alone (``local-dir:``, ``hf-hub:``), in a process that has imported localvit.

    Args:
        pretrained: Load weights: of the localized model where a saved configuration is given, else of
            the base, before surgery.
        base: timm name of the plain model.
        locality: :meth:`LocalityConfig.to_dict`; default: the paper's.
        blocks: Which blocks (:func:`localvit.surgery.select_blocks`).
        kwargs: Further arguments of the base (``num_classes``, ``img_size``, ``features_only``, ...).
    """
    saved = pretrained_cfg is not None
    config = LocalityConfig.from_dict(locality or {})
    base_args = {k: v for k, v in kwargs.items() if k not in _FACTORY_ARGS}
    if not saved:
        base_args |= {"pretrained": pretrained, "cache_dir": cache_dir}
    model = _localized_base(base, config, blocks, **base_args)
    return build_model_with_cfg(
        lambda **_: model,
        LOCALIZED,
        pretrained and saved,
        pretrained_cfg=pretrained_cfg if saved else model.pretrained_cfg,  # type: ignore[arg-type]
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        feature_cfg=dict(_FEATURES),
        cache_dir=cache_dir,
        **kwargs,
    )


def _register(entrypoint: Callable[..., nn.Module], name: str) -> None:
    entrypoint.__name__ = name
    entrypoint.__module__ = __name__
    globals()[name] = register_model(entrypoint)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    return entrypoint


for _name in VARIANTS:
    _register(_entrypoint(_name), _name)
_register(localized, LOCALIZED)
