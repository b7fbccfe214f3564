"""How each family of models hands tokens to its feed-forward networks (FFNs).

``LAYOUTS`` is the table: a new family is a new row. A class without a row is refused, because many
classes look alike and order or drop their tokens differently.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from timm.layers import GluMlp, Mlp, PatchDropout, PatchEmbed, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from localvit.locality import Grid

# FFNs whose hidden state passes through `drop1` on its way to `fc2`.
FFN_CLASSES: tuple[type[nn.Module], ...] = (Mlp, GluMlp, SwiGLU)


class UnsupportedModelError(ValueError):
    """The model cannot be localized; the message says why."""


@dataclass(frozen=True)
class Site:
    """One FFN of a model, with the layers of its residual branch.

    Attributes:
        name: Path of the block in the model, e.g. ``"blocks.3"``.
        block: The block, of which the following are attributes.
        ffn, norm, layer_scale, drop_path: Attribute names of the FFN and of what stands around it.
        dim: Token width.
        grid: Lattice and prefix tokens that the FFN sees at the configured input size.
        dead_patches: Whether no later layer reads the patch tokens that leave this block.
    """

    name: str
    block: nn.Module
    ffn: str
    norm: str
    layer_scale: str
    drop_path: str
    dim: int
    grid: Grid
    dead_patches: bool

    @property
    def module(self) -> nn.Module:
        return self.block.get_submodule(self.ffn)

    @property
    def hidden_dim(self) -> int:
        return int(self.block.get_submodule(f"{self.ffn}.fc2").in_features)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Layout:
    """Adapter of one family.

    Attributes:
        check: Raises :class:`UnsupportedModelError` for a model of the class that cannot be localized.
        sites: The FFNs, in order of depth.
        grid_source: The module whose input size decides the lattice; its forward is hooked.
    """

    check: Callable[[nn.Module], None]
    sites: Callable[[nn.Module], Sequence[Site]]
    grid_source: Callable[[nn.Module], nn.Module]


def layout_of(model: nn.Module) -> Layout:
    """The row for exactly this class (a subclass may treat its tokens otherwise).

    Raises:
        UnsupportedModelError: without a row, or if the row's check refuses the model.
    """
    layout = LAYOUTS.get(type(model))
    if layout is None:
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__name__} has no row in the layout table "
            f"(accepted: {', '.join(cls.__name__ for cls in LAYOUTS)})"
        )
    layout.check(model)
    return layout


def _check_vit(model: nn.Module) -> None:
    assert isinstance(model, VisionTransformer)
    if type(model.patch_embed) is not PatchEmbed:
        raise UnsupportedModelError(
            f"patch_embed is a {type(model.patch_embed).__name__}, whose token lattice is not known "
            "(accepted: PatchEmbed)"
        )
    if isinstance(model.patch_drop, PatchDropout) and model.patch_drop.prob > 0:
        raise UnsupportedModelError(
            f"patch_drop_rate={model.patch_drop.prob} removes tokens in training, so they have no lattice "
            "(accepted: 0)"
        )
    for i, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise UnsupportedModelError(f"blocks.{i} is a {type(block).__name__} (accepted: Block)")
        if type(block.mlp) not in FFN_CLASSES:
            names = ", ".join(cls.__name__ for cls in FFN_CLASSES)
            raise UnsupportedModelError(f"blocks.{i}.mlp is a {type(block.mlp).__name__} (accepted: {names})")


def _vit_sites(model: nn.Module) -> list[Site]:
    assert isinstance(model, VisionTransformer)
    height, width = model.patch_embed.grid_size
    only_prefix_read = model.global_pool == "token"
    return [
        Site(
            name=f"blocks.{i}",
            block=block,
            ffn="mlp",
            norm="norm2",
            layer_scale="ls2",
            drop_path="drop_path2",
            dim=model.embed_dim,
            grid=Grid(height, width, model.num_prefix_tokens),
            dead_patches=only_prefix_read and i == len(model.blocks) - 1,
        )
        for i, block in enumerate(model.blocks)
    ]


_VIT = Layout(
    check=_check_vit, sites=_vit_sites, grid_source=lambda model: model.get_submodule("patch_embed")
)

LAYOUTS: dict[type[nn.Module], Layout] = {
    VisionTransformer: _VIT,
    VisionTransformerDistilled: _VIT,
}
