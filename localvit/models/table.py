"""Table of the named models: a baseline, a locality configuration, and arguments of the reference.

"The reference" is the authors' repository, ofsoundof/LocalViT; the paper is arXiv 2104.05707.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from localvit.baselines import pvt, t2t_vit
from localvit.locality import LocalityConfig

_LOCALVIT = "ofsoundof/LocalViT README.md"
_DEIT = "facebookresearch/deit README_deit.md"
_SWIN = "microsoft/Swin-Transformer README.md"
_TNT = "huawei-noah/Efficient-AI-Backbones tnt_pytorch/readme.md"
_PVT = "whai362/PVT README.md"
_T2T = "yitu-opensource/T2T-ViT README.md"


@dataclass(frozen=True)
class Published:
    """Published ImageNet-1k validation accuracy, in percent."""

    top1: float
    top5: float | None
    source: str


@dataclass(frozen=True)
class Variant:
    """Definition of one named model.

    Attributes:
        base: timm name of the baseline.
        locality: Locality of the FFNs of its blocks.
        also: Locality of further groups of FFNs (`localvit.localize`).
        args: Constructor arguments in which the reference differs from the baseline.
        published: Accuracy reported by the authors.
        file: Name of the authors' weights among their releases.
        notes: Facts that do not follow from the other fields.
    """

    base: str
    locality: LocalityConfig
    also: Mapping[str, LocalityConfig] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    published: Published | None = None
    file: str | None = None
    notes: tuple[str, ...] = ()


def _matched(variant: Variant) -> Variant:
    """Return the variant without confounders: the layers around the FFN are those of the baseline."""
    locality = replace(variant.locality, prenorm=True, drop_path=True, prefix="pointwise")
    also = {
        group: replace(config, prenorm=True, drop_path=True, prefix="pointwise")
        for group, config in variant.also.items()
    }
    return Variant(variant.base, locality, also)


# Squeeze units of the gate: hidden width // 192, // 4 and // 384 in the DeiT versions, // dim in PVT and TNT,
# // (dim // 4), hence 16, in Swin, // 128 in T2T-ViT (models/localvit*.py of the reference).
_BY_DIM = LocalityConfig(gate_reduction="dim")
_SWIN_GATE = LocalityConfig(gate_width=16)
_T2T_GATE = LocalityConfig(gate_reduction=128)
# The two stages before the blocks of T2T-ViT: expansion 1 as in the baseline, no gate.
_T2T_STAGES = {"tokens_to_token": LocalityConfig(gate="none")}
_UNUSED_NORM = (
    "The reference has a norm before the FFN of the two tokens-to-token stages in its state dict and never "
    "uses it; here it is not built, so it does not count as parameters."
)
_NOT_TRAINED = "A size that the authors did not train: no published weights or accuracy."

# Head counts: the reference's LocalViT-T has 4 and -S 8 where DeiT has 3 and 6 (models/localvit.py there).
_PAPER: dict[str, Variant] = {
    "localvit_tiny_patch16_224": Variant(
        base="deit_tiny_patch16_224",
        locality=LocalityConfig(gate_reduction=192),
        args={"num_heads": 4},
        published=Published(74.84, 92.61, _LOCALVIT),
        file="localvit_t.pth",
    ),
    "localvit_tiny_se4_patch16_224": Variant(
        base="deit_tiny_patch16_224",
        locality=LocalityConfig(gate_reduction=4),
        args={"num_heads": 4},
        published=Published(75.74, 93.05, _LOCALVIT),
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
        published=Published(80.78, 95.38, _LOCALVIT),
        file="localvit_s.pth",
    ),
    "localvit_t2t_vit_7": Variant(
        base="t2t_vit_7", locality=_T2T_GATE, also=_T2T_STAGES, notes=(_UNUSED_NORM,)
    ),
    "localvit_pvt_tiny": Variant(
        base="pvt_tiny",
        locality=_BY_DIM,
        published=Published(78.14, 94.24, _LOCALVIT),
        file="localvit_pvt.pth",
    ),
    "localvit_tnt_tiny_patch16_224": Variant(
        base="tnt_t_legacy_patch16_224",
        locality=_BY_DIM,
        published=Published(75.90, 92.90, _LOCALVIT),
        file="localvit_tnt.pth",
    ),
    "localvit_swin_tiny_patch4_window7_224": Variant(
        base="swin_tiny_patch4_window7_224",
        locality=_SWIN_GATE,
        published=Published(81.86, 95.72, _LOCALVIT),
        file="localvit_swin.pth",
    ),
}

_FURTHER: dict[str, Variant] = {
    # 12 heads, as in DeiT-B: the reference has no base size.
    "localvit_base_patch16_224": Variant("deit_base_patch16_224", LocalityConfig(gate_reduction="dim")),
    **{
        f"localvit_t2t_vit_{size}": Variant(f"t2t_vit_{size}", _T2T_GATE, _T2T_STAGES)
        for size in (14, 19, 24)
    },
    **{f"localvit_pvt_{size}": Variant(f"pvt_{size}", _BY_DIM) for size in ("small", "medium", "large")},
    "localvit_tnt_small_patch16_224": Variant("tnt_s_legacy_patch16_224", _BY_DIM),
    **{
        f"localvit_swin_{size}_patch4_window7_224": Variant(f"swin_{size}_patch4_window7_224", _SWIN_GATE)
        for size in ("small", "base")
    },
}

_MATCHED: dict[str, Variant] = {
    f"{name}_matched": _matched(_PAPER[name])
    for name in (
        "localvit_tiny_patch16_224",
        "localvit_small_patch16_224",
        "localvit_t2t_vit_7",
        "localvit_pvt_tiny",
        "localvit_tnt_tiny_patch16_224",
        "localvit_swin_tiny_patch4_window7_224",
    )
}

VARIANTS: dict[str, Variant] = {
    **_PAPER,
    **{name: replace(variant, notes=(*variant.notes, _NOT_TRAINED)) for name, variant in _FURTHER.items()},
    **_MATCHED,
}

# The baselines of the variants, as far as their authors report an accuracy.
BASELINES: dict[str, Published] = {
    "deit_tiny_patch16_224": Published(72.2, 91.1, _DEIT),
    "deit_small_patch16_224": Published(79.9, 95.0, _DEIT),
    "deit_base_patch16_224": Published(81.8, 95.6, _DEIT),
    "swin_tiny_patch4_window7_224": Published(81.2, 95.5, _SWIN),
    "swin_small_patch4_window7_224": Published(83.2, 96.2, _SWIN),
    "swin_base_patch4_window7_224": Published(83.5, 96.5, _SWIN),
    # The accuracy of its other form (legacy=False), which is the released one.
    "tnt_s_legacy_patch16_224": Published(81.5, 95.7, _TNT),
    **{name: Published(top1, None, _PVT) for name, top1 in pvt.PUBLISHED.items()},
    **{name: Published(top1, None, _T2T) for name, top1 in t2t_vit.PUBLISHED.items()},
}
