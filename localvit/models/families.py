"""Names of weights in the authors' files, by family. A new family is a new row of `FAMILIES`.

A row renames weights only. The names inside a feed-forward network with locality are the same in all families
(`localvit.models.published`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import swin_transformer, tnt, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from localvit.baselines import pvt, t2t_vit

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Names of weights of one family.

    Attributes:
        classes: Classes of its models.
        marker: Pattern of a key in every file of the family and in no file of an earlier row.
        bases: Patterns of timm names of plain models, to try for a file without a name.
        own_keys: Function from weights to key of the file -> name in our (timm's) models.
        adapt: timm checkpoint filter that fits weights with our names to another input size.
        unused: Pattern of weights, by our names, that the reference stores and never uses.
    """

    classes: tuple[type[nn.Module], ...]
    marker: str
    bases: tuple[str, ...]
    own_keys: Callable[[Weights], dict[str, str]]
    adapt: Callable[[dict[str, Any], Any], Mapping[str, Any]]
    unused: str | None = None


def family_of(model: nn.Module) -> Family | None:
    """Return the family of a model's class."""
    return next((family for family in FAMILIES if isinstance(model, family.classes)), None)


def family_of_file(weights: Weights) -> Family:
    """Return the family of a file by its keys; plain transformers by default."""
    return next(family for family in FAMILIES if any(re.search(family.marker, key) for key in weights))


def _key_by_key(rename: Callable[[str], str]) -> Callable[[Weights], dict[str, str]]:
    return lambda weights: {key: rename(key) for key in weights}


def _swin_keys(weights: Weights) -> dict[str, str]:
    """Rename Swin's keys: the authors merge patches at the end of a stage, timm at the start of the next."""
    if "layers.0.downsample.reduction.weight" not in weights:
        return {key: key for key in weights}

    def later(match: re.Match[str]) -> str:
        return f"layers.{int(match[1]) + 1}.downsample"

    return {
        key: re.sub(r"^head\.", "head.fc.", re.sub(r"^layers\.(\d+)\.downsample", later, key))
        for key in weights
    }


# Names in huawei-noah/Efficient-AI-Backbones tnt_pytorch/tnt.py, and timm's (and the LocalViT authors').
_TNT_NAMES = {
    r"^outer_pos$": "patch_pos",
    r"^inner_pos$": "pixel_pos",
    r"^patch_embed\.": "pixel_embed.",
    r"^proj_norm([12])\.": r"norm\1_proj.",
    r"\.proj_norm([12])\.": r".norm\1_proj.",
    r"\.inner_norm1\.": ".norm_in.",
    r"\.inner_attn\.": ".attn_in.",
    r"\.inner_norm2\.": ".norm_mlp_in.",
    r"\.inner_mlp\.": ".mlp_in.",
    r"\.outer_norm1\.": ".norm_out.",
    r"\.outer_attn\.": ".attn_out.",
    r"\.outer_norm2\.": ".norm_mlp.",
    r"\.outer_mlp\.": ".mlp.",
}


def _tnt_key(key: str) -> str:
    for pattern, name in _TNT_NAMES.items():
        key = re.sub(pattern, name, key)
    return key


FAMILIES = (
    Family(
        classes=(t2t_vit.T2TViT,),
        marker=r"^(tokens_to_token|patch_embed)\.attention1\.",
        bases=("t2t_vit_*",),
        own_keys=_key_by_key(t2t_vit.to_own_key),
        adapt=t2t_vit.checkpoint_filter_fn,
        unused=r"^patch_embed\.attention[12]\.norm2\.",
    ),
    Family(
        classes=(pvt.PyramidVisionTransformer,),
        marker=r"^(pos_embed1|stages\.0\.pos_embed)$",
        bases=tuple(pvt.PUBLISHED),
        own_keys=_key_by_key(pvt.to_own_key),
        adapt=pvt.checkpoint_filter_fn,
    ),
    Family(
        classes=(tnt.TNT,),
        marker=r"^(pixel_pos|inner_pos)$",
        bases=("tnt_*",),
        own_keys=_key_by_key(_tnt_key),
        adapt=tnt.checkpoint_filter_fn,
        unused=r"^outer_tokens$",
    ),
    Family(
        classes=(swin_transformer.SwinTransformer,),
        marker=r"^layers\.0\.blocks\.0\.attn\.relative_position_bias_table$",
        bases=("swin_*_patch4_*",),
        own_keys=_swin_keys,
        adapt=swin_transformer.checkpoint_filter_fn,
    ),
    Family(
        classes=(vision_transformer.VisionTransformer, VisionTransformerDistilled),
        marker=r"",
        bases=("deit_*",),
        own_keys=_key_by_key(lambda key: key),
        adapt=vision_transformer.checkpoint_filter_fn,
    ),
)
