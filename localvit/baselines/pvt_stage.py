"""Layers of PVT v1: block, stage. Attention over a spatially reduced map is timm's, of PVT v2.

Sources, and a description of the stages: `localvit.baselines.pvt`. Shapes below: B batch, C channels, H and W
sides of a map, N = H * W patch tokens, P prefix tokens (0 or 1).
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from timm.layers import DropPath, LayerNorm, Mlp, PatchEmbed, resample_abs_pos_embed, to_ntuple
from timm.models import checkpoint
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn


def to_map(tokens: Tensor, feat_size: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """Return the patch tokens as a map: `(B, P + N, C) -> (B, C, H, W)`, a channels-last view."""
    patches = tokens[:, num_prefix_tokens:]
    return patches.transpose(1, 2).reshape(patches.shape[0], -1, feat_size[0], feat_size[1])


class Block(nn.Module):
    """Pre-norm transformer block; only its attention uses the size of the map.

    If `sr_ratio` does not divide the map, keys and values do not cover the remaining rows and columns, as in
    the reference. With the default ratios there is no remainder: they reduce every stage to the resolution of
    the last.

    Args:
        dim: Token width.
        num_heads: Heads; must divide `dim`.
        sr_ratio: Kernel and stride of the convolution that reduces the map for keys and values; 1 for plain
            attention. Prefix tokens need 1.
        qkv_bias: Bias in the linear layers of query, key and value.
        attn_drop, proj_drop: Dropout of attention weights; after attention's projection and in the MLP.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"num_heads {num_heads} does not divide the embedding width {dim}; use a divisor"
            )
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(
            dim, num_heads, sr_ratio, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Compute the block: `(B, P + N, C) -> (B, P + N, C)`; `feat_size` is (H, W)."""
        x = x + self.drop_path1(self.attn(self.norm1(x), feat_size))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class PyramidVisionTransformerStage(nn.Module):
    """Patch embedding, class token if any, position table, blocks.

    Args:
        dim, dim_out: Channels of the input map, width of the output tokens.
        depth: Number of blocks.
        img_size: Sides of the input map.
        patch_size: Factor of the reduction of these sides.
        num_prefix_tokens: 1 with a class token in front, which needs `sr_ratio` 1.
        pos_drop: Dropout after the addition of the position table.
        drop_path: Drop-path rate, one for all blocks or one for each.
        dynamic_img_size: Accept other sizes, with an interpolated position table.

    The other arguments are those of `Block`.
    """

    dynamic_img_size: Final[bool]

    def __init__(
        self,
        dim: int,
        dim_out: int,
        depth: int,
        img_size: tuple[int, int],
        patch_size: int = 2,
        num_prefix_tokens: int = 0,
        sr_ratio: int = 1,
        pos_drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: Any = None,
        **block_args: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if num_prefix_tokens and sr_ratio > 1:
            raise ValueError(
                f"sr_ratio {sr_ratio} is not accepted in the stage with the class token (the last); use 1"
            )
        self.num_prefix_tokens = num_prefix_tokens
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=dim,
            embed_dim=dim_out,
            norm_layer=nn.LayerNorm,  # with the reference's default eps, 1e-5
            strict_img_size=not dynamic_img_size,
            **dd,
        )
        num_tokens = num_prefix_tokens + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim_out, **dd))
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.ModuleList(
            Block(dim_out, sr_ratio=sr_ratio, drop_path=rate, **block_args, **dd)
            for rate in to_ntuple(depth)(drop_path)
        )

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Set the size of the input map; the position table is interpolated (bicubic)."""
        old_size = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        if self.patch_embed.grid_size != old_size:
            resampled = resample_abs_pos_embed(
                self.pos_embed.detach(), self.patch_embed.grid_size, old_size, self.num_prefix_tokens
            )
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def forward(self, x: Tensor, cls_token: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Compute tokens from a map.

        Args:
            x: `(B, dim, H, W)`.
            cls_token: `(1, 1, dim_out)` if `num_prefix_tokens` is 1.

        Returns:
            `(B, P + N, dim_out)` and the grid (H / patch size, W / patch size) of the N patch tokens.
        """
        B, _, H, W = x.shape
        feat_size = self.patch_embed.dynamic_feat_size((H, W))
        x = self.patch_embed(x)
        if cls_token is not None:
            x = torch.cat([cls_token.expand(B, -1, -1), x], dim=1)
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = resample_abs_pos_embed(
                pos_embed, feat_size, self.patch_embed.grid_size, self.num_prefix_tokens
            )
        x = self.pos_drop(x + pos_embed)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, feat_size)
            else:
                x = block(x, feat_size)
        return x, feat_size
