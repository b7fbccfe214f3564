"""Transformer blocks in their fast form, and models that read out prefix tokens only.

The sum with attention is a new tensor, because a hook may have saved a block's input; the feed-forward
network (FFN) adds its branch to it in place. A fast form is the copied block with its class changed.
"""

from typing import Any

import torch.nn.functional as F
from timm.layers import Attention, LayerScale
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from localvit.acceleration.fusing.feed_forward import FastFeedForward, hooked
from localvit.acceleration.fusing.folding import InferenceOnly, rescale
from localvit.baselines import Block as PvtBlock, T2TViT


def _add_branch(ffn: nn.Module, residual: Tensor, x: Tensor) -> Tensor:
    """Compute `residual + ffn(x)` in place."""
    if isinstance(ffn, FastFeedForward) and not hooked(ffn):
        return ffn.add_to(residual, x)
    return residual.add_(ffn(x))


class FastBlock(InferenceOnly, Block):
    """Block of plain transformers; LayerScale is in the projections."""

    attn: Any
    mlp: Any
    plain_attention: bool
    """True if `_attend` can replace `attn`. It is set when the block is fused, because an exporter shows
    modules as instances of other classes."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        y = x + self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        if isinstance(self.ls2, nn.Identity):
            return _add_branch(self.mlp, y, self.norm2(y))
        return y.add_(self.ls2(self.mlp(self.norm2(y))))

    @property
    def reads_out(self) -> bool:
        """True if `prefix_tokens` is valid for this block."""
        return (
            self.plain_attention
            and isinstance(self.attn, Attention)
            and isinstance(self.attn.qkv.weight, Tensor)  # not quantized
            and isinstance(self.mlp, FastFeedForward)
            and isinstance(self.ls2, nn.Identity)
            and not any(hooked(module) for module in self.modules())
        )

    def prefix_tokens(self, x: Tensor, count: int) -> Tensor:
        """Compute only the first `count` tokens of `forward(x)`."""
        y = x[:, :count] + self.ls1(_attend(self.attn, self.norm1(x), count))
        branch = self.mlp.on_prefix(self.norm2(y))
        return y if branch is None else y.add_(branch)


def _attend(attn: Attention, x: Tensor, count: int) -> Tensor:
    """Compute the first `count` tokens of `attn(x)`: all keys and values, but only their queries."""
    batch, tokens, _ = x.shape
    first, width = x[:, :count], attn.attn_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(first, weight[:width], None if bias is None else bias[:width])
    kv = F.linear(x, weight[width:], None if bias is None else bias[width:])
    q = q.view(batch, count, attn.num_heads, attn.head_dim).transpose(1, 2)
    k, v = kv.view(batch, tokens, 2, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
    y = attn.norm(y.transpose(1, 2).reshape(batch, count, width))
    if attn.gate is not None:
        y = y * attn.gate(first).sigmoid()
    return attn.proj(y)


class FastSwinBlock(InferenceOnly, SwinTransformerBlock):
    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        y = (x + self._attn(self.norm1(x))).reshape(batch, -1, channels)
        return _add_branch(self.mlp, y, self.norm2(y)).reshape(batch, height, width, channels)


class FastPvtBlock(InferenceOnly, PvtBlock):
    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        y = x + self.attn(self.norm1(x), feat_size)
        return _add_branch(self.mlp, y, self.norm2(y))


def fuse_block(block: Any) -> str | None:
    """Change a plain transformer's block to its fast form."""
    attn, mlp = block.attn, block.mlp
    projections = {
        "ls1": attn.proj if type(attn) is Attention else None,
        "ls2": mlp.fc2 if isinstance(mlp, FastFeedForward) and mlp.ends_in_projection else None,
    }
    for name, projection in projections.items():
        scale = getattr(block, name)
        if type(scale) is LayerScale and type(projection) is nn.Linear and not hooked(scale):
            rescale(projection, scale.gamma)
            setattr(block, name, nn.Identity().eval())
    block.plain_attention = type(attn) is Attention
    block.__class__ = FastBlock
    return None


class FastVisionTransformer(InferenceOnly, VisionTransformer):
    """Plain transformer whose head may read prefix tokens only: then the last block computes only those.

    This applies to `forward`; features are those of all tokens. With a hook on one of its modules, the last
    block computes all tokens.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        last = self.blocks[-1] if len(self.blocks) else None
        reads_token = self.global_pool == "token" and self.attn_pool is None and self.num_prefix_tokens > 0
        masked = attn_mask is not None or is_causal
        if masked or not reads_token or not isinstance(last, FastBlock) or not last.reads_out:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in list(self.blocks)[:-1]:
            x = block(x)
        return self.forward_head(self.norm(last.prefix_tokens(x, self.num_prefix_tokens)))


class FastVisionTransformerDistilled(FastVisionTransformer, VisionTransformerDistilled):
    pass


class FastT2TViT(FastVisionTransformer, T2TViT):
    pass
