"""Registration of the named models with timm, on `import localvit`.

`timm.create_model("localvit_tiny_patch16_224")` then works with all options of timm's factory. `localized`
creates any other localized model from its parts.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.error import URLError

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)
from torch import Tensor, nn

from localvit.baselines import tnt_legacy  # noqa: F401 (registers the size that timm lacks)
from localvit.errors import ConfigError
from localvit.locality import LocalityConfig
from localvit.models.published import CheckpointError, listed, to_own_keys
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
        args = {**variant.args, **model_args}
        model = _localized_base(variant.base, variant.locality, "all", variant.also, **args)
        model._model_args = {}  # type: ignore[assignment]  # timm records those of the outer call
        return model

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' files contain one
            return build_model_with_cfg(
                build,
                name,
                pretrained,
                pretrained_filter_fn=lambda weights, model: _whole(to_own_keys(weights, model), model),
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
    `save_for_hf` from its configuration alone (`local-dir:`, `hf-hub:`), also for another `img_size`,
    `patch_size`, `window_size`, `in_chans` or `num_classes`, as far as the base can.

    Args:
        pretrained: Load weights: those of the localized model if its saved configuration is given, otherwise
            those of the base, before surgery.
        base: timm name of the plain model.
        locality: Result of `LocalityConfig.to_dict`, or `{"preset": NAME}`; default: the paper's.
        blocks: Blocks with locality (`localvit.surgery.select_blocks`).
        also: Further groups of FFNs (`localvit.localize`), each a result of `LocalityConfig.to_dict`.
        pretrained_cfg: Saved configuration of a localized model, or configuration or tag of the base.
        pretrained_cfg_overlay: Changes of that configuration, such as `{"file": PATH}`.
        cache_dir: Folder for downloaded weights.
        kwargs: Further arguments of the base (`num_classes`, `img_size`, `features_only`, ...).

    Raises:
        ConfigError: if `base` is a `local-dir:` or `hf-hub:` reference, which a checkpoint must not need.
    """
    saved = _is_saved(pretrained_cfg)
    if ":" in base and not saved:
        raise ConfigError(
            f"base={base!r} is a reference, which the saved model would always need; create that model and "
            "use localvit.localize"
        )
    config = LocalityConfig.from_dict(locality or {}, older=saved)
    others = {group: LocalityConfig.from_dict(values, older=saved) for group, values in (also or {}).items()}
    base_args = {k: v for k, v in kwargs.items() if k not in _FACTORY_ARGS}
    source = {"pretrained_cfg": pretrained_cfg, "pretrained_cfg_overlay": pretrained_cfg_overlay}
    if not saved:
        base_args |= {"pretrained": pretrained, "cache_dir": cache_dir, **source}
    model = _localized_base(base, config, blocks, others, **base_args)
    model.base_name = architecture = model._model_args["base"]  # type: ignore[index]
    return build_model_with_cfg(
        lambda **_: model,
        LOCALIZED,
        pretrained and saved,
        **(source if saved else {"pretrained_cfg": model.pretrained_cfg}),
        pretrained_filter_fn=partial(_fit_to_base, str(architecture)),
        feature_cfg=_features(str(architecture)),
        cache_dir=cache_dir,
        **kwargs,
    )


def _is_saved(cfg: Any) -> bool:
    """Return True for the configuration of a localized model, False for one of its base."""
    values = dataclasses.asdict(cfg) if isinstance(cfg, PretrainedCfg) else cfg
    if not isinstance(values, Mapping):
        return False  # none, or a tag
    # timm leaves out the architecture of what it reads from a folder or from the hub, and adds the source.
    return bool(values["architecture"] == LOCALIZED if values.get("architecture") else values.get("source"))


def _fit_to_base(base: str, weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit saved weights to another size with the checkpoint filter of the base."""
    adapt = getattr(sys.modules[model_entrypoint(base).__module__], "checkpoint_filter_fn", None)
    return _whole(adapt(dict(weights), model) if adapt else weights, model)


def _whole(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Refuse weights with gaps, which timm ignores where the number of classes changes."""
    heads: Any = model.pretrained_cfg["classifier"] or ()  # type: ignore[index]
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    missing = [key for key in model.state_dict() if key not in weights and not key.startswith(heads)]
    if missing:
        raise CheckpointError(
            f"the weights are damaged: {len(missing)} tensors are missing ({listed(missing)})"
        )
    return dict(weights)


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    entrypoint.__name__ = name
    globals()[name] = register_model(entrypoint)


for _name in VARIANTS:
    _register(_name)
register_model(localized)
