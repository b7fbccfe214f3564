"""One small model with random weights for each class that localize accepts.

Images are not square, wherever the class takes such.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

_VIT = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
_ONES = (1, 1, 1, 1)
_WIDTHS = (8, 16, 16, 32)


@dataclass(frozen=True)
class Case:
    """A model, by its name in timm or by a function; `heavy` ones run in `make supported` only.

    `named` is the name of a large model of the class that `base` makes, since files hold names.
    """

    base: str | Callable[..., nn.Module]
    args: dict[str, Any] = field(default_factory=lambda: _VIT)
    size: tuple[int, int] = (32, 48)
    heavy: bool = False
    named: str | None = None

    def make(self, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        args = {**self.args, "num_classes": 5, **kwargs}
        model = timm.create_model(self.base, **args) if isinstance(self.base, str) else self.base(**args)
        for name, parameter in model.named_parameters():  # nothing is zero, one or constant
            if name.endswith("attention_biases"):  # LeViT's later tokens come from attention alone
                parameter.data[:, 0] = 50.0
            elif parameter.ndim <= 1 or not parameter.any():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        return model

    def images(self, batch: int = 2) -> torch.Tensor:
        return torch.randn(batch, 3, *self.size, generator=torch.Generator().manual_seed(5))


def _of(module: str, name: str, **args: Any) -> Callable[..., nn.Module]:
    from importlib import import_module

    return lambda **kwargs: getattr(import_module(f"timm.models.{module}"), name)(**args, **kwargs)


def _vitamin(**kwargs: Any) -> nn.Module:
    from timm.models import vitamin

    conv = vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stem = vitamin.VitCfg(embed_dim=(8, 8, 24), depths=(1, 1, 2), stem_width=8, conv_cfg=conv, head_type="1d")
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    return vitamin._create_vitamin("vitamin_small_224", embed_cfg=stem, **sizes, **kwargs)


def _mvit(cls: bool) -> Callable[..., nn.Module]:
    from timm.models import mvitv2

    cfg = mvitv2.MultiScaleVitCfg(
        depths=_ONES, embed_dim=(8, 16, 16, 16), num_heads=1, use_cls_token=cls, expand_attn=not cls
    )
    return lambda **kwargs: mvitv2.MultiScaleVit(cfg, **kwargs)


def _caformer(**kwargs: Any) -> nn.Module:
    from timm.models import metaformer as m

    return m.MetaFormer(
        depths=_ONES,
        dims=(8, 16, 32, 32),
        token_mixers=[m.SepConv, m.SepConv, m.Attention, m.Attention],
        norm_layers=[m.LayerNorm2dNoBias] * 2 + [m.LayerNormNoBias] * 2,
        use_mlp_head=True,
        **kwargs,
    )


_BIG = (64, 96)
_IMG = {"img_size": _BIG}
_SWIN = {"window_size": (2, 3), "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), **_IMG}
_PYRAMID = {"embed_dims": _WIDTHS, "depths": _ONES, "num_heads": _ONES}

CASES: dict[str, Case] = {
    "vit": Case("vit_tiny_patch16_224"),
    "vit registers": Case("vit_small_patch14_reg4_dinov2"),
    "vit post-norm": Case("vit_base_patch16_rpn_224"),
    "vit parallel": Case("vit_small_patch16_18x2_224"),
    "vit fused": Case("vit_base_patch16_xp_224"),
    "vit fused, differential": Case("vit_dpwee_patch16_reg1_gap_256"),
    "vit hybrid": Case(
        "vit_tiny_r_s16_p8_224", {**_IMG, "embed_dim": 24, "num_heads": 3, "depth": 2}, _BIG, heavy=True
    ),
    "vitamin": Case(_vitamin, _IMG, _BIG, named="vitamin_small_224"),
    "deit distilled": Case("deit_tiny_distilled_patch16_224"),
    "dinov3": Case("vit_small_patch16_dinov3"),
    "eva02": Case("eva02_base_patch14_224"),
    "eva02 packed": Case("eva02_tiny_patch14_224"),
    "eva post-norm": Case("eva02_enormous_patch14_clip_224"),
    "perception encoder": Case("vit_pe_core_tiny_patch16_384"),
    "beit": Case("beit_base_patch16_224"),
    "relpos": Case("vit_relpos_base_patch16_cls_224"),
    "relpos post-norm": Case("vit_relpos_medium_patch16_rpn_224"),
    "naflexvit": Case("naflexvit_base_patch16_gap"),
    "cait": Case("cait_xxs24_224"),
    "convit": Case(
        "convit_tiny", {**_VIT, "img_size": (32, 32), "depth": 3, "local_up_to_layer": 1}, (32, 32)
    ),
    "xcit": Case("xcit_nano_12_p8_224"),
    "sam": Case(
        "samvit_base_patch16", {**_VIT, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 16}
    ),
    "deepseek": Case("deepseek_vit_412m"),
    "qwen3": Case("qwen3_vit_306m_merge"),
    "gemma4": Case(
        "gemma4_vit_167m", {**_VIT, "img_size": (48, 72), "intermediate_size": 96, "head_dim": 8}, (48, 72)
    ),
    "crossvit": Case(
        "crossvit_tiny_240",
        {
            "img_size": (48, 96),
            "img_scale": (1.0, 1.0),
            "embed_dim": (12, 24),
            "depth": ((1, 2, 0), (1, 1, 0)),
        },
        (48, 96),
    ),
    "pit": Case("pit_ti_224", {**_IMG, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 8)}, _BIG),
    "hiera": Case("hiera_tiny_224", {**_IMG, "embed_dim": 8, "num_heads": 1, "stages": _ONES}, _BIG),
    "t2t": Case("t2t_vit_7", {**_IMG, "embed_dim": 24, "depth": 2, "num_heads": 3, "token_dim": 16}, _BIG),
    "pvt": Case("pvt_tiny", {**_IMG, "embed_dims": (8, 16, 20, 32), "depths": _ONES}, _BIG),
    "tnt": Case(
        "tnt_s_patch16_224",
        {**_IMG, "embed_dim": 24, "inner_dim": 12, "depth": 2, "num_heads_outer": 3, "num_heads_inner": 3},
        _BIG,
    ),
    "swin": Case("swin_tiny_patch4_window7_224", _SWIN, _BIG),
    "swin v2": Case("swinv2_tiny_window8_256", _SWIN, _BIG),
    "swin v2 cr": Case("swinv2_cr_tiny_224", _SWIN, _BIG),
    "twins": Case("twins_svt_small", {**_IMG, **_PYRAMID}, _BIG),
    "pvt v2": Case("pvt_v2_b0", _PYRAMID, _BIG),
    "mvit v2": Case(_mvit(False), {"img_size": 64}, (64, 64), named="mvitv2_tiny"),
    "mvit v2 with class token": Case(_mvit(True), {"img_size": 64}, (64, 64), named="mvitv2_base_cls"),
    "davit": Case("davit_tiny", _PYRAMID, _BIG),
    "tinyvit": Case("tiny_vit_5m_224", {**_PYRAMID, "window_sizes": (3, 3, 3, 3)}, _BIG),
    "levit": Case("levit_128s", _IMG, _BIG, heavy=True),
    "levit conv": Case("levit_conv_256d", _IMG, _BIG, heavy=True),
    "coat": Case(
        "coat_lite_tiny",
        {**_IMG, "embed_dims": (8, 16, 16, 16), "serial_depths": _ONES, "num_heads": 8},
        _BIG,
    ),
    "coat parallel": Case(
        "coat_tiny", {**_IMG, "embed_dims": (16,) * 4, "serial_depths": _ONES, "num_heads": 8}, _BIG
    ),
    "nest": Case(
        _of("nest", "Nest", embed_dims=(8, 16, 16), num_heads=(1, 1, 1), depths=(1, 1, 1)),
        {"img_size": 64},
        (64, 64),
        named="nest_tiny",
    ),
    "csatv2": Case("csatv2", {}, _BIG, heavy=True),
    "mobilevit": Case("mobilevit_xxs", {}, (64, 128), heavy=True),
    "mobilevit v2": Case("mobilevitv2_050", {}, (64, 128), heavy=True),
    "hieradet": Case(
        "sam2_hiera_tiny",
        {"embed_dim": 8, "num_heads": 1, "stages": (1, 2, 2, 1), "global_att_blocks": (4,)},
        _BIG,
    ),
    "volo": Case(
        _of("volo", "VOLO", layers=_ONES, embed_dims=(16, 24, 24, 24), num_heads=(2, 3, 3, 3)),
        _IMG,
        _BIG,
        named="volo_d1_224",
    ),
    "focalnet": Case(
        _of("focalnet", "FocalNet", embed_dim=8, depths=_ONES), {}, _BIG, named="focalnet_tiny_srf"
    ),
    "gcvit": Case(
        _of(
            "gcvit",
            "GlobalContextVit",
            depths=_ONES,
            num_heads=(1, 2, 2, 2),
            embed_dim=8,
            window_size=((4, 6), (4, 6), (2, 3), (2, 3)),
        ),
        _IMG,
        _BIG,
        named="gcvit_xxtiny",
    ),
    "caformer": Case(_caformer, {}, _BIG, named="caformer_s18"),
    "poolformer": Case(
        _of("metaformer", "MetaFormer", depths=_ONES, dims=_WIDTHS), {}, _BIG, named="poolformer_s12"
    ),
    "nextvit": Case("nextvit_small", {}, (32, 64), heavy=True),
    "coatnet": Case("coatnet_nano_rw_224", _IMG, _BIG, heavy=True),
    "coatnext": Case("coatnext_nano_rw_224", _IMG, _BIG, heavy=True),
    "maxvit": Case("maxvit_pico_rw_256", _IMG, _BIG, heavy=True),
    "maxvit parallel": Case("maxvit_tiny_pm_256", _IMG, _BIG, heavy=True),
    "maxxvit v2": Case("maxxvitv2_nano_rw_256", _IMG, _BIG, heavy=True),
    "edgenext": Case("edgenext_xx_small", {}, _BIG, heavy=True),
    "efficientformer": Case("efficientformer_l1", {}, (224, 224), heavy=True),
    "efficientformer v2": Case("efficientformerv2_s0", {}, (224, 224), heavy=True),
    "efficientvim": Case("efficientvim_m1", {}, _BIG, heavy=True),
    "efficientvim distilled": Case("efficientvim_m1_dist", {}, _BIG, heavy=True),
    "efficientvit msra": Case("efficientvit_m0", {}, (224, 224), heavy=True),
    "fastvit": Case("fastvit_sa12", {}, _BIG, heavy=True),
    "shvit": Case("shvit_s1", {}, _BIG, heavy=True),
    "swiftformer": Case("swiftformer_xs", {}, _BIG, heavy=True),
    "visformer": Case("visformer_tiny", _IMG, _BIG, heavy=True),
}

QUICK = ("dinov3", "xcit", "caformer", "hiera")
"""Cases of different orders and sources of the grid, for costly tests."""
