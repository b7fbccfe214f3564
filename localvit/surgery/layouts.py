"""Feed-forward networks (FFNs) of each family of models, and the tokens that they get.

`ADAPTERS` has one row per class of models. A class without a row is refused, because many classes look alike
and order or drop their tokens differently.

| family, group | FFN | its input tokens | grid |
|---|---|---|---|
| ViT, DeiT | `blocks.i.mlp` | (B, P + N, C), P from the model | the patch embedding's |
| Swin | `layers.s.blocks.i.mlp` | (B, N, C), raster order, windows merged | the stage's |
| PVT | `stages.s.blocks.i.mlp` | (B, P + N, C), P 0, then 1 | the stage's patch embedding's |
| T2T | `blocks.i.mlp` | (B, 1 + N, C) | the last soft split's |
| T2T, tokens_to_token | `patch_embed.attention{1,2}.mlp` | (B, N, C) | the soft split's before |
| TNT | `blocks.i.mlp` | (B, 1 + N, C) | the pixel embedding's |
| TNT, inner | `blocks.i.mlp_in` | (B N, pixels of a patch, c) | pixels of a patch, always |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from timm.layers import GluMlp, Mlp, PatchDropout, PatchEmbed, SwiGLU
from timm.models import swin_transformer, tnt
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from localvit.baselines import Block as PvtBlock, PyramidVisionTransformer, T2TViT
from localvit.locality import Grid

# FFNs whose hidden state passes through `drop1` before `fc2`.
FFN_CLASSES: tuple[type[nn.Module], ...] = (Mlp, GluMlp, SwiGLU)

# The group of FFNs that `localize` changes by default.
MAIN_GROUP = "blocks"


class UnsupportedModelError(ValueError):
    """Model that cannot be localized; the message says why."""


@dataclass(frozen=True)
class GridSource:
    """Source of the grid of some FFNs.

    Attributes:
        module: Module with a forward hook that records the grid.
        reads: `"input"`: `module.dynamic_feat_size` gives the grid for the size of its input map
            (B, C, H, W). `"output"`: the grid is that of its output (B, H, W, C). `"never"`: the grid is
            always the configured one, so there is no hook.
        static: Module with the grid for the configured input size, and the name of its attribute.
    """

    module: nn.Module
    reads: Literal["input", "output", "never"]
    static: tuple[nn.Module, str]


@dataclass(frozen=True)
class FeedForwardSite:
    """One FFN of a model, with the layers of its residual branch.

    Attributes:
        name: Path of the block in the model, e.g. `"blocks.3"`.
        block: The block.
        ffn, norm, layer_scale, drop_path: Names of the block's attributes: the FFN and the layers around it.
            `layer_scale` and `drop_path` are `None` if the family has none.
        dim: Token width.
        grid: Grid and number of prefix tokens of the FFN's input at the configured input size.
        source: Source of that grid.
        dead_patches: True if no later layer reads the patch tokens of this block's output.
        sequences: Token sequences per image (in TNT, every patch is one for the inner transformer).
    """

    name: str
    block: nn.Module
    ffn: str
    norm: str
    layer_scale: str | None
    drop_path: str | None
    dim: int
    grid: Grid
    source: GridSource
    dead_patches: bool = False
    sequences: int = 1

    @property
    def path(self) -> str:
        """Path of the FFN in the model."""
        return f"{self.name}.{self.ffn}"

    @property
    def module(self) -> nn.Module:
        return self.block.get_submodule(self.ffn)

    @property
    def hidden_dim(self) -> int:
        return int(self.block.get_submodule(f"{self.ffn}.fc2").in_features)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ModelAdapter:
    """Adapter of one family.

    Attributes:
        check: Function that raises `UnsupportedModelError` for a model that cannot be localized.
        groups: Function that returns name of a group -> its FFNs by depth. The first group is `MAIN_GROUP`.
        image_size: Function that returns the configured (height, width).
    """

    check: Callable[[nn.Module], None]
    groups: Callable[[nn.Module], Mapping[str, Sequence[FeedForwardSite]]]
    image_size: Callable[[nn.Module], tuple[int, int]]


def adapter_for(model: nn.Module) -> ModelAdapter:
    """Return the adapter of exactly this class (a subclass may order its tokens differently).

    Raises:
        UnsupportedModelError: if the class has no adapter, or its check refuses the model.
    """
    adapter = ADAPTERS.get(type(model))
    if adapter is None:
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__name__} cannot be localized; "
            f"accepted classes: {', '.join(cls.__name__ for cls in ADAPTERS)}"
        )
    adapter.check(model)
    return adapter


def _check_blocks(blocks: Mapping[str, nn.Module], kind: type[nn.Module], *ffns: str) -> None:
    for path, block in blocks.items():
        if type(block) is not kind:
            raise UnsupportedModelError(f"{path} is a {type(block).__name__}; accepted: {kind.__name__}")
        for ffn in ffns:
            found = type(block.get_submodule(ffn))
            if found not in FFN_CLASSES:
                names = ", ".join(cls.__name__ for cls in FFN_CLASSES)
                raise UnsupportedModelError(f"{path}.{ffn} is a {found.__name__}; accepted: {names}")


def _numbered(prefix: str, modules: nn.Module) -> dict[str, nn.Module]:
    return {f"{prefix}.{name}": module for name, module in modules.named_children()}


def _staged(prefix: str, stages: nn.Module) -> dict[str, nn.Module]:
    return {
        path: block
        for name, stage in stages.named_children()
        for path, block in _numbered(f"{prefix}.{name}.blocks", stage.get_submodule("blocks")).items()
    }


def _embedding(module: nn.Module) -> GridSource:
    """Return the source for a module with `dynamic_feat_size` and `grid_size`, such as a patch embedding."""
    return GridSource(module, "input", (module, "grid_size"))


def _width(block: nn.Module, ffn: str) -> int:
    """Return the width of an FFN's input tokens."""
    return int(block.get_submodule(f"{ffn}.fc1").in_features)  # type: ignore[arg-type]


def _grid(source: GridSource, prefix: int) -> Grid:
    module, attribute = source.static
    height, width = getattr(module, attribute)
    return Grid(height, width, prefix)


# --- plain transformers: ViT, DeiT, T2T ----------------------------------------------------------------


def _check_plain(model: nn.Module) -> None:
    assert isinstance(model, VisionTransformer)
    if isinstance(model.patch_drop, PatchDropout) and model.patch_drop.prob > 0:
        raise UnsupportedModelError(
            f"patch_drop_rate={model.patch_drop.prob} removes tokens in training, so they have no grid; "
            "use patch_drop_rate=0"
        )
    _check_blocks(_numbered("blocks", model.blocks), Block, "mlp")


def _check_vit(model: nn.Module) -> None:
    if type(model.patch_embed) is not PatchEmbed:
        raise UnsupportedModelError(
            f"patch_embed is a {type(model.patch_embed).__name__}, whose token grid is not known; "
            "accepted: PatchEmbed"
        )
    _check_plain(model)


def _plain_sites(model: nn.Module, source: GridSource) -> list[FeedForwardSite]:
    assert isinstance(model, VisionTransformer)
    return [
        FeedForwardSite(
            name=path,
            block=block,
            ffn="mlp",
            norm="norm2",
            layer_scale="ls2",
            drop_path="drop_path2",
            dim=model.embed_dim,
            grid=_grid(source, model.num_prefix_tokens),
            source=source,
            dead_patches=model.global_pool == "token" and block is model.blocks[-1],
        )
        for path, block in _numbered("blocks", model.blocks).items()
    ]


def _vit_groups(model: nn.Module) -> dict[str, Sequence[FeedForwardSite]]:
    return {MAIN_GROUP: _plain_sites(model, _embedding(model.get_submodule("patch_embed")))}


def _t2t_groups(model: nn.Module) -> dict[str, Sequence[FeedForwardSite]]:
    splits = [_embedding(model.get_submodule(f"patch_embed.soft_split{i}")) for i in range(3)]
    stages = [
        FeedForwardSite(
            name=f"patch_embed.attention{i}",
            block=model.get_submodule(f"patch_embed.attention{i}"),
            ffn="mlp",
            norm="norm2",
            layer_scale=None,
            drop_path=None,
            dim=_width(model.get_submodule(f"patch_embed.attention{i}"), "mlp"),
            grid=_grid(splits[i - 1], 0),
            source=splits[i - 1],
        )
        for i in (1, 2)
    ]
    return {MAIN_GROUP: _plain_sites(model, splits[2]), "tokens_to_token": stages}


# --- pyramids: Swin, PVT -------------------------------------------------------------------------------


def _check_swin(model: nn.Module) -> None:
    assert isinstance(model, swin_transformer.SwinTransformer)
    _check_blocks(_staged("layers", model.layers), swin_transformer.SwinTransformerBlock, "mlp")


def _swin_groups(model: nn.Module) -> dict[str, Sequence[FeedForwardSite]]:
    assert isinstance(model, swin_transformer.SwinTransformer)
    sites: list[FeedForwardSite] = []
    for index, stage in enumerate(model.layers):
        downsample = stage.get_submodule("downsample")
        if isinstance(downsample, nn.Identity):  # in the first stage; an fx trace does not run its hooks
            source = _embedding(model.patch_embed)
        else:
            source = GridSource(downsample, "output", (stage, "output_resolution"))
        sites += _stage_sites(f"layers.{index}.blocks", stage, source, 0)
    return {MAIN_GROUP: sites}


def _check_pvt(model: nn.Module) -> None:
    _check_blocks(_staged("stages", model.get_submodule("stages")), PvtBlock, "mlp")


def _pvt_groups(model: nn.Module) -> dict[str, Sequence[FeedForwardSite]]:
    assert isinstance(model, PyramidVisionTransformer)
    sites: list[FeedForwardSite] = []
    for index, stage in enumerate(model.stages):
        source = _embedding(stage.get_submodule("patch_embed"))
        sites += _stage_sites(f"stages.{index}.blocks", stage, source, stage.num_prefix_tokens)
    sites[-1] = replace(sites[-1], dead_patches=model.global_pool == "token")
    return {MAIN_GROUP: sites}


def _stage_sites(path: str, stage: nn.Module, source: GridSource, prefix: int) -> list[FeedForwardSite]:
    return [
        FeedForwardSite(
            name=name,
            block=block,
            ffn="mlp",
            norm="norm2",
            layer_scale=None,
            drop_path="drop_path2",
            dim=_width(block, "mlp"),
            grid=_grid(source, prefix),
            source=source,
        )
        for name, block in _numbered(path, stage.get_submodule("blocks")).items()
    ]


# --- TNT -----------------------------------------------------------------------------------------------


def _check_tnt(model: nn.Module) -> None:
    _check_blocks(_numbered("blocks", model.get_submodule("blocks")), tnt.Block, "mlp", "mlp_in")


def _tnt_groups(model: nn.Module) -> dict[str, Sequence[FeedForwardSite]]:
    assert isinstance(model, tnt.TNT)
    # Its embedding refuses any size but the configured one. (It also takes two inputs, so a hook on it could
    # not be scripted.)
    outer = GridSource(model.pixel_embed, "never", (model.pixel_embed, "grid_size"))
    inner = GridSource(model.pixel_embed, "never", (model.pixel_embed, "new_patch_size"))
    blocks = _numbered("blocks", model.blocks)
    return {
        MAIN_GROUP: [
            FeedForwardSite(
                name=path,
                block=block,
                ffn="mlp",
                norm="norm_mlp",
                layer_scale=None,
                drop_path="drop_path_mlp",
                dim=_width(block, "mlp"),
                grid=_grid(outer, model.num_prefix_tokens),
                source=outer,
                dead_patches=model.global_pool == "token" and block is model.blocks[-1],
            )
            for path, block in blocks.items()
        ],
        "inner": [
            FeedForwardSite(
                name=path,
                block=block,
                ffn="mlp_in",
                norm="norm_mlp_in",
                layer_scale=None,
                drop_path="drop_path_mlp_in",
                dim=_width(block, "mlp_in"),
                grid=_grid(inner, 0),
                source=inner,
                sequences=model.num_patches,
            )
            for path, block in blocks.items()
        ],
    }


def _size_of(path: str) -> Callable[[nn.Module], tuple[int, int]]:
    return lambda model: tuple(model.get_submodule(path).img_size)  # type: ignore[arg-type]


_VIT = ModelAdapter(_check_vit, _vit_groups, _size_of("patch_embed"))

ADAPTERS: dict[type[nn.Module], ModelAdapter] = {
    VisionTransformer: _VIT,
    VisionTransformerDistilled: _VIT,
    T2TViT: ModelAdapter(_check_plain, _t2t_groups, _size_of("patch_embed")),
    PyramidVisionTransformer: ModelAdapter(_check_pvt, _pvt_groups, _size_of("stages.0.patch_embed")),
    swin_transformer.SwinTransformer: ModelAdapter(_check_swin, _swin_groups, _size_of("patch_embed")),
    tnt.TNT: ModelAdapter(_check_tnt, _tnt_groups, _size_of("pixel_embed")),
}
