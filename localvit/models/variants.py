"""Registration of the named models with timm, on `import localvit`.

`timm.create_model("localvit_tiny_patch16_224")` then works with all options of timm's factory. `localized`
creates any other localized model from its parts.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any
from urllib.error import URLError

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import nn

from localvit.baselines import tnt_legacy  # noqa: F401 (registers the size that timm lacks)
from localvit.locality import LocalityConfig
from localvit.models.published import to_own_keys
from localvit.models.table import VARIANTS, Variant
from localvit.surgery import LOCALIZED, BlockSpec, localize

# Arguments of timm's factory that are not passed to the base.
_FACTORY_ARGS = ("features_only", "out_indices", "feature_cls", "pretrained_model_args")

_RELEASES = "https://github.com/ofsoundof/LocalViT/releases/download/v1.0.0/"


def _default_cfg(variant: Variant) -> dict[str, Any]:
    """Return timm's pretrained configuration: the base's, with the evaluation of the reference.

    The reference resizes to 256, crops 224 and normalises with ImageNet's statistics in all families.
    """
    base = get_pretrained_cfg(variant.base)
    assert base is not None
    return {
        "url": _RELEASES + variant.file if variant.file else "",
        "num_classes": 1000,
        "input_size": base.input_size,
        "fixed_input_size": base.fixed_input_size,
        "pool_size": base.pool_size,
        "interpolation": "bicubic",
        "crop_pct": 224 / 256,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": base.first_conv,
        "classifier": base.classifier,
        "license": "mit",
        "origin_url": "https://github.com/ofsoundof/LocalViT",
        "paper_ids": "arXiv:2104.05707",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k" if v.file else name: _default_cfg(v) for name, v in VARIANTS.items()}
)


def _features(base: str) -> dict[str, Any]:
    """Return timm's features_only settings: the four stages of a pyramid, the last blocks of other models."""
    cfg = get_pretrained_cfg(base)
    pyramid = cfg is not None and cfg.pool_size is not None
    return {"out_indices": (0, 1, 2, 3) if pyramid else 3, "feature_cls": "getter"}


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    variant = VARIANTS[name]

    def build(**model_args: Any) -> nn.Module:
        return _localized_base(
            variant.base, variant.locality, "all", variant.also, **{**variant.args, **model_args}
        )

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' files contain one
            return build_model_with_cfg(
                build,
                name,
                pretrained,
                pretrained_filter_fn=to_own_keys,
                feature_cfg=_features(variant.base),
                **kwargs,
            )
    except URLError as error:
        url = _RELEASES + str(variant.file)
        raise RuntimeError(
            f"pretrained weights of {name} are missing: {url} could not be fetched ({error.reason}); "
            "download the file elsewhere and use localvit.load_official(path), or pass pretrained=False"
        ) from error


def _localized_base(
    base: str,
    locality: LocalityConfig,
    blocks: BlockSpec,
    also: Mapping[str, LocalityConfig],
    **kwargs: Any,
) -> nn.Module:
    model = timm.create_model(base, **kwargs)
    localize(model, locality, blocks, also=also, keep_originals=False, count_macs=False)
    model._model_args = {}  # type: ignore[assignment]  # timm records the arguments of the outer call
    return model


def localized(
    pretrained: bool = False,
    *,
    base: str,
    locality: Mapping[str, Any] | None = None,
    blocks: BlockSpec = "all",
    also: Mapping[str, Mapping[str, Any]] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a localized model from its parts: `timm.create_model("localized", base=..., locality=...)`.

    All arguments are JSON values. So a process that has imported localvit can create a model saved by timm's
    `save_for_hf` from its configuration alone (`local-dir:`, `hf-hub:`).

    Args:
        pretrained: Load weights: those of the localized model if a saved configuration is given, otherwise
            those of the base, before surgery.
        base: timm name of the plain model.
        locality: Result of `LocalityConfig.to_dict`; default: the paper's.
        blocks: Blocks with locality (`localvit.surgery.select_blocks`).
        also: Further groups of FFNs (`localvit.localize`), each a result of `LocalityConfig.to_dict`.
        kwargs: Further arguments of the base (`num_classes`, `img_size`, `features_only`, ...).
    """
    saved = pretrained_cfg is not None
    config = LocalityConfig.from_dict(locality or {}, older=saved)
    others = {group: LocalityConfig.from_dict(values, older=saved) for group, values in (also or {}).items()}
    base_args = {k: v for k, v in kwargs.items() if k not in _FACTORY_ARGS}
    if not saved:
        base_args |= {"pretrained": pretrained, "cache_dir": cache_dir}
    model = _localized_base(base, config, blocks, others, **base_args)
    return build_model_with_cfg(
        lambda **_: model,
        LOCALIZED,
        pretrained and saved,
        pretrained_cfg=pretrained_cfg if saved else model.pretrained_cfg,  # type: ignore[arg-type]
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        feature_cfg=_features(base),
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
