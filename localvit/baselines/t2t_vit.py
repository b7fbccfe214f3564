"""T2T-ViT (Yuan et al., "Tokens-to-Token ViT", ICCV 2021, arXiv 2101.11986): timm's ViT with another stem.

The stem is `TokensToToken`. Everything after it is `timm.models.VisionTransformer`, with a fixed sinusoid in
place of the learnt positions. Reference: yitu-opensource/T2T-ViT, `models/t2t_vit.py`.

Attention in the blocks is scaled by `head_dim ** -0.5`, as in timm. The reference's constructors use
`embed_dim ** -0.5` under `pretrained=True`, which has no weights; the released weights are evaluated without
it.
"""

import argparse
import math
import re
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models import (
    VisionTransformer,
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn

from localvit.baselines.tokens_to_token import TokensToToken, TokensType, layer_norm

__all__ = ["T2TViT"]  # register_model adds the names of the models


def sinusoid_table(length: int, dim: int) -> Tensor:
    """Return fixed positions `(1, length, dim)`, float64.

    The angle of position p in column j is `p / 10000 ** (2 * (j // 2) / dim)`. Even columns have its sine,
    odd ones its cosine. Position 0 is the class token; patches follow in raster order.
    """
    columns = torch.arange(dim, dtype=torch.float64, device="cpu")
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = positions.unsqueeze(1) / 10000 ** (2 * columns.div(2, rounding_mode="floor") / dim)
    return torch.where(columns % 2 == 0, angles.sin(), angles.cos()).unsqueeze(0)


class T2TViT(VisionTransformer):
    """Tokens-to-Token ViT; defaults are those of T2T-ViT-14.

    Args:
        tokens_type, token_dim, token_drop_rate: See `TokensToToken`.
        kwargs: Further arguments of timm's `VisionTransformer`, except `embed_layer` and `pos_embed`.

    Attributes:
        pos_embed: `(1, num_prefix_tokens + num_patches, embed_dim)`, a fixed sinusoid in a buffer.
            `set_input_size` resamples it, as timm does; a model built for a size has that size's sinusoid.
    """

    pos_embed: Tensor  # type: ignore[assignment]  # a parameter in timm

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        *,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        norm_layer: Any = None,
        tokens_type: TokensType = "performer",
        token_dim: int = 64,
        token_drop_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            img_size=img_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            norm_layer=norm_layer or layer_norm,
            embed_layer=partial(
                TokensToToken, tokens_type=tokens_type, token_dim=token_dim, token_drop_rate=token_drop_rate
            ),
            pos_embed="learn",
            **kwargs,
        )
        self._keep_positions_fixed()
        self._reset_positions()  # also for weight_init="skip"

    def _keep_positions_fixed(self) -> None:
        """Turn timm's position parameter into a buffer, so that it does not count as a parameter."""
        table = self.pos_embed.detach()
        del self.pos_embed
        self.register_buffer("pos_embed", table)

    def _reset_positions(self) -> None:
        with torch.no_grad():
            self.pos_embed.copy_(sinusoid_table(*self.pos_embed.shape[1:]))

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as timm's ViT, with the reference's class token (std 0.02) and the sinusoid."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        self._reset_positions()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay, as in the reference."""
        return {"cls_token"}

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image size and resample the positions; the patch size cannot change (ValueError)."""
        super().set_input_size(img_size, patch_size)
        if isinstance(self.pos_embed, nn.Parameter):
            self._keep_positions_fixed()


def to_own_key(key: str) -> str:
    """Return our name of an entry of the authors' state dicts; our names stay the same."""
    key = re.sub(r"^(module\.)?tokens_to_token\.", "patch_embed.", key).removeprefix("module.")
    key = re.sub(r"^(patch_embed\.attention[12]\.mlp)\.0\.", r"\1.fc1.", key)
    return re.sub(r"^(patch_embed\.attention[12]\.mlp)\.2\.", r"\1.fc2.", key)


def _resample_positions(table: Tensor, model: T2TViT) -> Tensor:
    """Resample a checkpoint's table, of a square image, to the grid of `model`."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    count = table.shape[1] - prefix
    side = math.isqrt(count)
    if side**2 != count:
        raise ValueError(
            f"pos_embed has {count} image positions, which form no square grid, so it cannot be resampled"
        )
    return resample_abs_pos_embed(table, model.patch_embed.grid_size, (side, side), prefix)


def _adapt_in_chans(state_dict: dict[str, Tensor], model: T2TViT) -> None:
    """Convert the first stage to the model's number of input channels, by timm's rule for convolutions.

    Its features are windows with the channel slowest, so a row of a linear layer is a convolution kernel. The
    norm before the layer averages over channels, while the layer sums over them. The transformer's scale
    depends on the width of its input; queries and keys are rescaled to compensate.
    """
    side = model.patch_embed.soft_split0.kernel_size
    for name in ("norm1.weight", "norm1.bias", "kqv.weight", "attn.qkv.weight"):
        key = f"patch_embed.attention1.{name}"
        if key not in state_dict:
            continue
        value = state_dict[key]
        kernel = value.reshape(-1, value.shape[-1] // side**2, side, side)
        if kernel.shape[1] == model.in_chans:
            return
        adapted = adapt_input_conv(model.in_chans, kernel, base_chans=kernel.shape[1])
        ratio = model.in_chans / kernel.shape[1]
        if name.startswith("norm1"):
            adapted = adapted * ratio
        elif name == "attn.qkv.weight":
            adapted[: 2 * len(adapted) // 3] *= ratio**0.25
        state_dict[key] = adapted.reshape(*value.shape[:-1], -1)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: T2TViT) -> dict[str, Tensor]:
    """Convert the authors' checkpoint to a state dict of `model`; our own checkpoints do not change.

    Averaged weights are preferred, because the authors evaluate them. Positions are resampled to another
    grid, and the first stage is adapted to another number of input channels.

    Raises:
        ValueError: if positions must be resampled and are not of a square image.
    """
    for name in ("state_dict_ema", "state_dict"):
        if name in state_dict:
            state_dict = state_dict[name]
            break
    own = {to_own_key(key): value for key, value in state_dict.items()}
    table, (height, width) = own.get("pos_embed"), model.patch_embed.grid_size
    authors = any("tokens_to_token." in key for key in state_dict)  # trained on square images only
    if table is not None and (table.shape[1] != model.pos_embed.shape[1] or (authors and height != width)):
        own["pos_embed"] = _resample_positions(table, model)
    _adapt_in_chans(own, model)
    return own


_SIZES = ("tokens_type", "embed_dim", "depth", "num_heads", "mlp_ratio")
VARIANTS: dict[str, dict[str, Any]] = {
    name: dict(zip(_SIZES, sizes, strict=True))
    for name, *sizes in (
        ("t2t_vit_7", "performer", 256, 7, 4, 2.0),
        ("t2t_vit_10", "performer", 256, 10, 4, 2.0),
        ("t2t_vit_12", "performer", 256, 12, 4, 2.0),
        ("t2t_vit_14", "performer", 384, 14, 6, 3.0),
        ("t2t_vit_19", "performer", 448, 19, 7, 3.0),
        ("t2t_vit_24", "performer", 512, 24, 8, 3.0),
        ("t2t_vit_t_14", "transformer", 384, 14, 6, 3.0),
        ("t2t_vit_t_19", "transformer", 448, 19, 7, 3.0),
        ("t2t_vit_t_24", "transformer", 512, 24, 8, 3.0),
    )
}

# Top-1 accuracy in percent on ImageNet-1k at 224 x 224: README.md of yitu-opensource/T2T-ViT.
PUBLISHED: dict[str, float] = {
    "t2t_vit_7": 71.7,
    "t2t_vit_10": 75.2,
    "t2t_vit_12": 76.5,
    "t2t_vit_14": 81.5,
    "t2t_vit_19": 81.9,
    "t2t_vit_24": 82.3,
    "t2t_vit_t_14": 81.7,
    "t2t_vit_t_19": 82.4,
    "t2t_vit_t_24": 82.6,
}


def _cfg(name: str) -> dict[str, Any]:
    """Return timm's pretrained configuration, with the evaluation of the authors' default_cfgs; what is left
    out has the default of timm's `PretrainedCfg`.
    """
    family = "T2T_ViTt" if VARIANTS[name]["tokens_type"] == "transformer" else "T2T_ViT"
    file = f"{PUBLISHED[name]}_{family}_{VARIANTS[name]['depth']}.pth.tar"
    return {
        "url": f"https://github.com/yitu-opensource/T2T-ViT/releases/download/main/{file}",
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "first_conv": (),  # none: checkpoint_filter_fn adapts the input channels
        "classifier": "head",
        "license": "bsd-3-clause-clear",
        "origin_url": "https://github.com/yitu-opensource/T2T-ViT",
        "paper_ids": "arXiv:2101.11986",
    }


default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg(name) for name in VARIANTS})


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> T2TViT:
        out_indices = kwargs.pop("out_indices", 3)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' files contain one
            return build_model_with_cfg(
                T2TViT,
                name,
                pretrained,
                pretrained_filter_fn=checkpoint_filter_fn,
                feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
                **{**VARIANTS[name], **kwargs},
            )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    globals()[name] = register_model(entrypoint)


for _name in VARIANTS:
    _register(_name)
