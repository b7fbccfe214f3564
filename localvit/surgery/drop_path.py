"""TNT blocks with a separate drop-path for each FFN.

All four branches of a TNT block use one `drop_path`. LocalViT removes the drop-path of the FFN only, so the
class of the block is changed in place; `localvit.restore` changes it back. Names and values of parameters do
not change.
"""

import copy

import torch
from timm.models import tnt
from torch import Tensor, nn


class BlockWithOwnDropPath(tnt.Block):
    """Block equal to `timm.models.tnt.Block`, with `drop_path_mlp` and `drop_path_mlp_in` for its FFNs."""

    def forward(self, pixel_embed: Tensor, patch_embed: Tensor) -> tuple[Tensor, Tensor]:
        pixel_embed = pixel_embed + self.drop_path(self.attn_in(self.norm_in(pixel_embed)))
        pixel_embed = pixel_embed + self.drop_path_mlp_in(  # type: ignore[operator]
            self.mlp_in(self.norm_mlp_in(pixel_embed))
        )
        batch, tokens = patch_embed.shape[0], patch_embed.shape[1]
        if self.norm2_proj is None:  # legacy=True: the norm is over each pixel
            pixels = self.proj(self.norm1_proj(pixel_embed).reshape(batch, tokens - 1, -1))
        else:
            pixels = self.norm2_proj(self.proj(self.norm1_proj(pixel_embed.reshape(batch, tokens - 1, -1))))
        patch_embed = torch.cat([patch_embed[:, :1], patch_embed[:, 1:] + pixels], dim=1)
        patch_embed = patch_embed + self.drop_path(self.attn_out(self.norm_out(patch_embed)))
        patch_embed = patch_embed + self.drop_path_mlp(  # type: ignore[operator]
            self.mlp(self.norm_mlp(patch_embed))
        )
        return pixel_embed, patch_embed


def separable(block: nn.Module) -> bool:
    """Return whether `separate_drop_path` gives this block layers of its own."""
    return type(block) is tnt.Block


def separate_drop_path(block: nn.Module) -> None:
    """Add the two layers to a TNT block; blocks of other families have them already."""
    if not separable(block):
        return
    block.__class__ = BlockWithOwnDropPath
    for name in ("drop_path_mlp", "drop_path_mlp_in"):
        block.add_module(name, copy.deepcopy(block.get_submodule("drop_path")))


def join_drop_path(block: nn.Module) -> None:
    """Undo `separate_drop_path`."""
    if type(block) is BlockWithOwnDropPath:
        del block.drop_path_mlp
        del block.drop_path_mlp_in
        block.__class__ = tnt.Block  # type: ignore[assignment]
