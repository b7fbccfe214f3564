"""Published designs of a feed-forward network (FFN) with locality, as configurations of the same block.

A preset is the design of the FFN alone. The hidden width stays that of the existing FFN (`expansion`), and
initial values are the block's own. `docs/decisions/locality.md` lists differences from the published code.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from localvit.errors import ConfigError, suggestion
from localvit.locality.config import LocalityConfig

# The block around the FFN is the baseline's, and prefix tokens skip the convolution: most of these designs
# come from models without prefix tokens.
_BRANCH: dict[str, Any] = {"prenorm": True, "drop_path": True, "layer_scale": True, "prefix": "pointwise"}
_PLAIN: dict[str, Any] = {"gate": "none", "activation": "gelu", "norm": "none", "bias": True} | _BRANCH

PRESETS: Mapping[str, LocalityConfig] = MappingProxyType(
    {
        # Li et al., LocalViT, arXiv 2104.05707; ofsoundof/LocalViT, models/localvit.py
        "localvit": LocalityConfig(),
        # Yuan et al., CeiT, arXiv 2103.11816; coeusguo/ceit (third-party), ceit_model.py
        "ceit_leff": LocalityConfig(**_PLAIN | {"norm": "batch", "prefix": "identity"}),
        # Wang et al., Uformer, arXiv 2106.03106; ZhendongWang6/Uformer, model.py
        "uformer_leff": LocalityConfig(**_PLAIN),
        # Xie et al., SegFormer, arXiv 2105.15203; NVlabs/SegFormer, mix_transformer.py
        # Wang et al., PVT v2, arXiv 2106.13797; timm, models/pvt_v2.py
        "mix_ffn": LocalityConfig(**_PLAIN | {"activation": ("none", "gelu")}),
        # Guo et al., CMT, arXiv 2107.06263; huawei-noah/Efficient-AI-Backbones, cmt_pytorch/cmt.py
        "irffn": LocalityConfig(**_PLAIN | {"norm": "batch", "norm_order": "act-norm", "inner_skip": True}),
        # Li et al., EfficientFormerV2, arXiv 2212.08059; timm, models/efficientformer_v2.py
        "efficientformerv2": LocalityConfig(**_PLAIN | {"norm": "batch", "prenorm": False}),
        # Cai et al., EfficientViT, arXiv 2205.14756; timm, models/efficientvit_mit.py
        "efficientvit_mbconv": LocalityConfig(
            **_PLAIN
            | {"activation": "hardswish", "norm": ("none", "none", "batch"), "bias": (True, True, False)}
            | {"prenorm": False}
        ),
        # Vasu et al., FastViT, arXiv 2303.14189; timm, models/fastvit.py
        "fastvit_conv_ffn": LocalityConfig(
            **_PLAIN
            | {"position": "first", "kernel_size": 7, "activation": ("gelu", "none"), "prenorm": False}
            | {"norm": ("none", "batch", "none"), "bias": (True, False, True)}
        ),
        # Shi, TransNeXt, arXiv 2311.17132; DaiShiResearch/TransNeXt, classification/transnext.py
        "conv_glu": LocalityConfig(**_PLAIN | {"glu": "gate"}),
        # Zamir et al., Restormer, arXiv 2111.09881; swz30/Restormer, basicsr/models/archs/restormer_arch.py
        "gdfn": LocalityConfig(**_PLAIN | {"glu": "both", "bias": False}),
    }
)


def find_preset(name: str) -> LocalityConfig:
    """Return the published design of that name.

    Raises:
        ConfigError: for an unknown name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"the preset {name!r} does not exist; {suggestion(name, PRESETS)}")
    return PRESETS[name]


def preset(name: str, **changes: Any) -> LocalityConfig:
    """Return the published design `name` with fields changed: `preset("mix_ffn", kernel_size=5)`.

    Args:
        name: A key of `PRESETS`.
        changes: Fields of `LocalityConfig`.

    Raises:
        ConfigError: for an unknown name or field, or a value that is not accepted.
    """
    return LocalityConfig.from_dict({"preset": name, **changes})
