"""Layers of PVT v1: attention over a spatially reduced map, block, stage.

Sources, and a description of the stages: `localvit.baselines.pvt`. Shapes below: B batch, C channels, H and W
sides of a map, N = H * W patch tokens, P prefix tokens (0 or 1).
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerNorm,
    Mlp,
    PatchEmbed,
    resample_abs_pos_embed,
    to_ntuple,
    use_fused_attn,
)
from timm.models import checkpoint
from torch import Tensor, nn


def to_map(tokens: Tensor, feat_size: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """Return the patch tokens as a map: `(B, P + N, C) -> (B, C, H, W)`, a channels-last view."""
    patches = tokens[:, num_prefix_tokens:]
    return patches.transpose(1, 2).reshape(patches.shape[0], -1, feat_size[0], feat_size[1])


class Attention(nn.Module):
    """Self-attention whose keys and values come from a spatially reduced copy of the tokens.

    If `sr_ratio` does not divide the map, keys and values do not cover the remaining rows and columns, as in
    the reference. With the default ratios there is no remainder: they reduce every stage to the resolution of
    the last.

    Args:
        dim: Token width.
        num_heads: Heads; must divide `dim`.
        sr_ratio: Kernel and stride of the reducing convolution; 1 for plain attention. Prefix tokens need 1.
        qkv_bias: Bias in the linear layers of query, key and value.
        attn_drop, proj_drop: Dropout of attention weights and of the output.
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"num_heads {num_heads} does not divide the embedding width {dim}; use a divisor"
            )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()

        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio, **dd) if sr_ratio > 1 else None
        # The reference's default eps, 1e-5, unlike the norms of the block.
        self.norm = nn.LayerNorm(dim, **dd) if sr_ratio > 1 else nn.Identity()

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Compute attention: `(B, P + N, C) -> (B, P + N, C)`; `feat_size` is (H, W)."""
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        if self.sr is not None:
            x = self.sr(to_map(x, feat_size)).flatten(2).transpose(1, 2)
            x = self.norm(x)
        kv = self.kv(x).reshape(B, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)

        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ v

        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    """Pre-norm transformer block; only its attention uses the size of the map."""

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
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(dim, num_heads, sr_ratio, qkv_bias, attn_drop, proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
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
