"""Rows of the families of models: timm's, and localvit's baselines.

Names of classes are relative to `timm.models`, or to `localvit` with a leading dot.
"""

from dataclasses import replace
from typing import Any

from localvit.errors import UnsupportedModelError
from localvit.locality import TokenOrder
from localvit.surgery.adapters import MAIN_GROUP, Block, ModelAdapter
from localvit.surgery.grids import GridFrom
from localvit.surgery.orders import CHANNELS_FIRST, CHANNELS_LAST, strided, token_order

_STAGES = "stages.#.blocks.#"
_SEQUENTIAL = "/torch.nn.modules.container.Sequential"


def _full(name: str) -> str:
    """Return the full name of a class: `"eva.Eva"` is timm's, `".baselines.t2t_vit.T2TViT"` ours."""
    if name.startswith("/"):
        return name[1:]
    return f"localvit{name}" if name.startswith(".") else f"timm.models.{name}"


def _family(classes: str, *rows: Block, others: str = "", groups: Any = None, **fields: Any) -> ModelAdapter:
    kinds, left = tuple(map(_full, classes.split())), tuple(map(_full, others.split()))
    return ModelAdapter(kinds, {MAIN_GROUP: rows, **(groups or {})}, left, **fields)


def _row(kind: str, at: str = "blocks.#", **fields: Any) -> Block:
    """Return the row of the blocks `kind` at the paths `at`, both separated by spaces.

    Layers around the FFN have timm's usual names by default; a block without such a layer needs no mention.
    """
    return Block(_full(kind), tuple(at.split()), **{"layer_scale": "ls2", **fields})


def _vit(kind: str = "vision_transformer.Block", at: str = "blocks.#", **fields: Any) -> Block:
    """Return the row of a block of plain transformers."""
    return _row(kind, at, **{"prefix": "num_prefix_tokens", "grid": _embedding, **fields})


# --- grids, prefix tokens and orders that differ between the blocks of a model ---------------------------

Numbers = tuple[int, ...]
_PATCHES = GridFrom("patch_embed", "image", "grid_size")
_BLOCK_INPUT = GridFrom(".", "input", "input_resolution")
_DOWNSAMPLED = GridFrom("stages.{0}.downsample", "output_map")
_LEVIT = GridFrom("stages.{0}.blocks.0.attn", "attribute", "resolution")


def _embedding(model: Any, _: Numbers) -> GridFrom:
    """Return the source of plain transformers: their patch embedding, perhaps after a stem."""
    kind = type(model.patch_embed).__name__
    if kind == "PatchEmbed":
        return _PATCHES
    if kind in ("HybridEmbed", "HybridEmbedWithSize"):
        return GridFrom("patch_embed.proj", "output_map")
    raise UnsupportedModelError(
        f"patch_embed is a {kind}, whose token grid is not known; accepted: PatchEmbed, HybridEmbed"
    )


def _soft_split(_: Any, numbers: Numbers) -> GridFrom:
    return GridFrom(f"patch_embed.soft_split{numbers[0] - 1}", "image", "grid_size")


def _pvt_prefix(model: Any, numbers: Numbers) -> int:
    return int(model.stages[numbers[0]].num_prefix_tokens)


def _convit_prefix(model: Any, numbers: Numbers) -> int:
    """Return the prefix tokens of a block: the class token is added in front of the first non-local one."""
    return int(model.num_prefix_tokens) if numbers[0] >= model.local_up_to_layer else 0


def _pit_grid(_: Any, numbers: Numbers) -> GridFrom:
    return GridFrom("transformers.{0}.pool.conv" if numbers[0] else "patch_embed", "output_map")


def _hiera_order(model: Any, numbers: Numbers) -> TokenOrder | None:
    strides, _ = model.reroll.schedule[numbers[0]]
    return strided(strides) if strides else None


def _hiera_grid(model: Any, numbers: Numbers) -> GridFrom:
    _, size = model.reroll.schedule[numbers[0]]
    return GridFrom("unroll", "attribute", "size", divide=model.unroll.size[0] // size[0])


def _nest_order(model: Any, numbers: Numbers) -> TokenOrder:
    size = int(model.levels[numbers[0]].block_size)
    return token_order("b (h1 w1) (h2 w2) c", h2=size, w2=size)


def _mobilevit_order(model: Any, numbers: Numbers) -> TokenOrder:
    block = model.stages[numbers[0]][numbers[1]]
    v2 = type(block).__name__ == "MobileVitV2Block"
    return strided([block.patch_size], "b c ({}) (h w)" if v2 else "(b {}) (h w) c")


def _mobilevit_grid(model: Any, numbers: Numbers) -> GridFrom:
    block = model.stages[numbers[0]][numbers[1]]
    return GridFrom("stages.{0}.{1}.conv_1x1", "output_map", multiple=block.patch_size[0])


def _coat_note(model: Any) -> str | None:
    alone = "the FFNs of its parallel blocks are left alone, because three scales share each of them"
    return alone if model.parallel_blocks is not None else None


# --- tokens (B, P + N, C) --------------------------------------------------------------------------------


def _encoders(name: str, kind: str, grid: GridFrom, **fields: Any) -> tuple[ModelAdapter, ...]:
    """Return the rows of an encoder and of the classifier around it."""
    return tuple(
        _family(
            f"{name}{form}",
            _row(kind, f"{path}blocks.#", grid=replace(grid, at=path + grid.at), **fields),
            image_size=f"{path}patch_embed.img_size",
        )
        for form, path in (("Encoder", ""), ("Classifier", "encoder."))
    )


_RELPOS = "vision_transformer_relpos"

_PLAIN = (
    _family(
        "vision_transformer.VisionTransformer deit.VisionTransformerDistilled",
        _vit(),
        _vit("vision_transformer.ResPostBlock"),
        _vit(
            _SEQUENTIAL,
            "blocks.#.ffns.#",
            norm="norm",
            layer_scale="ls",
            drop_path="drop_path",
            parallel=True,
        ),
        _vit("vision_transformer.ParallelScalingBlock", ffn=""),
        _vit("vision_transformer.DiffParallelScalingBlock", ffn=""),
        others="vision_transformer.ParallelThingsBlock",
        dead=True,
    ),
    _family("eva.Eva", _vit("eva.EvaBlock", layer_scale="gamma_2"), _vit("eva.EvaBlockPostNorm"), dead=True),
    _family("beit.Beit", _vit("beit.Block", layer_scale="gamma_2"), dead=True),
    _family(
        f"{_RELPOS}.VisionTransformerRelPos",
        _vit(f"{_RELPOS}.RelPosBlock"),
        _vit(f"{_RELPOS}.ResPostRelPosBlock"),
        dead=True,
    ),
    _family(
        "naflexvit.NaFlexVit",
        _vit(grid=GridFrom("embeds", "result")),
        _vit("eva.EvaBlock", layer_scale="gamma_2", grid=GridFrom("embeds", "result")),
        image_size="embeds.default_img_size",
        dead=True,
        note="one size of images per batch: batches of patches with coordinates have no common grid",
    ),
    _family("cait.Cait", _row("cait.LayerScaleBlock", layer_scale="gamma_2", grid=_PATCHES)),
    _family("convit.ConVit", _row("convit.Block", prefix=_convit_prefix, grid=_embedding), dead=True),
    _family("xcit.Xcit", _row("xcit.XCABlock", layer_scale="gamma2", grid=GridFrom(".", "integers"))),
    _family(
        "vision_transformer_sam.VisionTransformerSAM",
        _row("vision_transformer_sam.Block", grid=GridFrom(".", "input"), attends="windows"),
    ),
    *_encoders("deepseek_vit.DeepseekVit", "deepseek_vit.DeepseekVitBlock", _PATCHES),
    *_encoders("qwen3_vit.Qwen3Vit", "eva.EvaBlock", _PATCHES, layer_scale="gamma_2"),
    *_encoders(
        "gemma4_vit.Gemma4Vit", "gemma4_vit.Gemma4Block", GridFrom("patch_embed", "patches"), norm="norm3"
    ),
    _family(
        "crossvit.CrossVit",
        _vit(at="blocks.#.blocks.#.#", prefix=1, grid=GridFrom("patch_embed.{1}.proj", "output_map")),
        image_size="img_size",
    ),
    _family(
        "pit.PoolingVisionTransformer",
        _vit(at="transformers.#.blocks.#", prefix=lambda model, _: model.cls_token.shape[1], grid=_pit_grid),
        dead=True,
    ),
    _family(
        "hiera.Hiera",
        _row("hiera.HieraBlock", order=_hiera_order, grid=_hiera_grid, attends="windows"),
        image_size="img_size",
    ),
    _family(
        ".baselines.t2t_vit.T2TViT",
        _vit(grid=GridFrom("patch_embed.soft_split2", "image", "grid_size")),
        groups={
            "tokens_to_token": tuple(
                _row(f".baselines.tokens_to_token.{kind}", "patch_embed.attention#", grid=_soft_split)
                for kind in ("TokenPerformer", "TokenTransformer")
            )
        },
        dead=True,
    ),
    _family(
        "tnt.TNT",
        # Its embedding refuses any size but the configured one. (It also takes two inputs, so a hook on it
        # could not be scripted.)
        _row(
            "tnt.Block",
            norm="norm_mlp",
            drop_path="drop_path_mlp",
            prefix="num_prefix_tokens",
            grid=GridFrom("pixel_embed", "attribute", "grid_size"),
            attention="attn_out",
        ),
        groups={
            "inner": (
                _row(
                    "tnt.Block",
                    ffn="mlp_in",
                    norm="norm_mlp_in",
                    drop_path="drop_path_mlp_in",
                    grid=GridFrom("pixel_embed", "attribute", "new_patch_size"),
                    attention="attn_in",
                ),
            )
        },
        image_size="pixel_embed.img_size",
        dead=True,
    ),
)

# --- pyramids of tokens ----------------------------------------------------------------------------------


def _swin(module: str, name: str, at: str) -> ModelAdapter:
    return _family(
        f"{module}.{name}", _row(f"{module}.{name}Block", at, grid=_BLOCK_INPUT, attends="windows")
    )


_PYRAMIDS = (
    _swin("swin_transformer", "SwinTransformer", "layers.#.blocks.#"),
    _swin("swin_transformer_v2", "SwinTransformerV2", "layers.#.blocks.#"),
    _swin("swin_transformer_v2_cr", "SwinTransformerV2Cr", _STAGES),
    _family("twins.Twins", _row("twins.Block", "blocks.#.#", grid=GridFrom(".", "pair"))),
    _family(
        ".baselines.pvt.PyramidVisionTransformer",
        _row(
            ".baselines.pvt_stage.Block",
            _STAGES,
            prefix=_pvt_prefix,
            grid=GridFrom("stages.{0}.patch_embed", "image", "grid_size"),
            attends="pooled",
        ),
        image_size="stages.0.patch_embed.img_size",
        dead=True,
    ),
    _family(
        "pvt_v2.PyramidVisionTransformerV2",
        _row("pvt_v2.Block", _STAGES, grid=GridFrom(".", "list"), attends="pooled"),
    ),
    _family(
        "mvitv2.MultiScaleVit",
        _row(
            "mvitv2.MultiScaleBlock",
            _STAGES,
            prefix="num_prefix_tokens",
            grid=GridFrom(".attn", "result"),
            attends="pooled",
        ),
        dead=True,
    ),
    _family(
        "davit.DaVit",
        *(
            _row(
                f"davit.{kind}",
                f"{_STAGES}.# {_STAGES}.{name}",
                grid=GridFrom(".", "input_map"),
                attends="windows",
            )
            for kind, name in (("SpatialBlock", "spatial_block"), ("ChannelBlock", "channel_block"))
        ),
    ),
    _family(
        "tiny_vit.TinyVit",
        _row("tiny_vit.TinyVitBlock", _STAGES, grid=GridFrom(".", "input"), attends="windows"),
        others="tiny_vit.MBConv",
    ),
    _family(
        "levit.Levit levit.LevitDistilled",
        _row("levit.LevitBlock", _STAGES, grid=_LEVIT),
        _row("levit.LevitDownsample", "stages.#.downsample", drop_path="drop_path", grid=_LEVIT),
        others="/torch.nn.modules.linear.Identity",
    ),
    _family(
        "coat.CoaT",
        _row(
            "coat.SerialBlock",
            "serial_blocks#.#",
            prefix=1,
            grid=GridFrom(".factoratt_crpe", "pair"),
            attention="factoratt_crpe",
        ),
        image_size="img_size",
        dead=lambda model: model.parallel_blocks is None,
        note=_coat_note,
    ),
    _family(
        "nest.Nest",
        _row(
            "nest.TransformerLayer",
            "levels.#.transformer_encoder.#",
            order=_nest_order,
            grid=GridFrom("levels.{0}.pool", "output_map"),
            attends="windows",
        ),
    ),
    _family(
        "csatv2.CSATv2",
        _row("csatv2.TransformerBlock", "stages.#.#", grid=GridFrom(".pos_embed", "pair")),
        others="csatv2.Block /timm.layers.norm.LayerNorm2d /torch.nn.modules.conv.Conv2d",
        note="the FFNs of its spatial attention, which have one channel, are left alone",
    ),
    _family(
        "byobnet.ByobNet",
        *(
            _row(kind, "stages.#.#.transformer.#", order=_mobilevit_order, grid=_mobilevit_grid)
            for kind in ("vision_transformer.Block", "mobilevit.LinearTransformerBlock")
        ),
    ),
)

# --- maps (B, H, W, C) and (B, C, H, W) --------------------------------------------------------------------


def _last(kind: str, at: str = _STAGES, **fields: Any) -> Block:
    """Return the row of a block whose FFN takes maps `(B, H, W, C)`, or computes `(B, C, H, W)`."""
    return _row(kind, at, **{"order": CHANNELS_LAST, **fields})


def _first(kind: str, at: str = _STAGES, **fields: Any) -> Block:
    """Return the row of a block with a convolutional FFN, often without norm."""
    return _row(kind, at, **{"order": CHANNELS_FIRST, **fields})


_IN_MAXVIT = f"{_STAGES}.attn_block {_STAGES}.attn_grid"

_MAPS = (
    _family("hieradet_sam2.HieraDet", _last("hieradet_sam2.MultiScaleBlock", "blocks.#", attends="windows")),
    _family(
        "volo.VOLO",
        _last("volo.Outlooker", "network.#.#", attends="windows"),
        _last("volo.Transformer", "network.#.#"),
    ),
    _family(
        "focalnet.FocalNet", _last("focalnet.FocalNetBlock", "layers.#.blocks.#", attention="modulation")
    ),
    _family("gcvit.GlobalContextVit", _last("gcvit.GlobalContextVitBlock", attends="windows")),
    _family(
        "metaformer.MetaFormer",
        _row(
            "metaformer.MetaFormerBlock",
            _STAGES,
            layer_scale="layer_scale2",
            grid=_DOWNSAMPLED,
            attention="token_mixer",
        ),
    ),
    _family(
        "nextvit.NextViT",
        _first("nextvit.NextConvBlock", norm="norm", drop_path="mlp_drop_path", attends="none"),
        _first("nextvit.NextTransformerBlock", norm="norm2", drop_path="mlp_drop_path", attention="e_mhsa"),
    ),
    _family(
        "maxxvit.MaxxVit",
        _last("maxxvit.TransformerBlock2d"),
        _last(
            "maxxvit.ConvNeXtBlock",
            f"{_STAGES} {_STAGES}.conv {_STAGES}.conv.#",
            norm="norm",
            layer_scale="ls",
            drop_path="drop_path",
            attends="none",
        ),
        _last("maxxvit.PartitionAttentionCl", _IN_MAXVIT, attends="windows"),
        _last("maxxvit.PartitionAttention2d", _IN_MAXVIT, attends="windows"),
        _last(
            "maxxvit.ParallelPartitionAttention",
            f"{_STAGES}.attn",
            attends="windows",
            attention="attn_block attn_grid",
        ),
        others="maxxvit.MbConvBlock maxxvit.MaxxVitBlock maxxvit.ParallelMaxxVitBlock maxxvit.Attention2d "
        + _SEQUENTIAL,
    ),
    _family(
        "edgenext.EdgeNeXt",
        _last("edgenext.ConvBlock", norm="norm", layer_scale="gamma", drop_path="drop_path"),
        _last("edgenext.SplitTransposeBlock", norm="norm", layer_scale="gamma", attention="xca"),
    ),
    _family(
        "efficientformer.EfficientFormer",
        _first("efficientformer.MetaBlock2d"),
        _row("efficientformer.MetaBlock1d", _STAGES, grid=_DOWNSAMPLED, attention="token_mixer"),
        others="efficientformer.Flat",
    ),
    _family("efficientformer_v2.EfficientFormerV2", _first("efficientformer_v2.EfficientFormerV2Block")),
    _family(
        "efficientvim.EfficientViM efficientvim.EfficientViMDistilled",
        _first("efficientvim.EfficientViMBlock", ffn="ffn"),
    ),
    _family(
        "efficientvit_msra.EfficientVitMsra",
        _first("efficientvit_msra.ResidualDrop", f"{_STAGES}.ffn0 {_STAGES}.ffn1", ffn="m"),
    ),
    _family(
        "fastvit.FastVit",
        _first("fastvit.RepMixerBlock", layer_scale="layer_scale", drop_path="drop_path"),
        _first("fastvit.AttentionBlock", layer_scale="layer_scale_2", attention="token_mixer"),
    ),
    _family("shvit.SHViT", _first("shvit.BasicBlock", ffn="ffn.m")),
    _family(
        "swiftformer.SwiftFormer",
        _first("swiftformer.Block", ffn="linear", attention=None),
        others="swiftformer.ConvEncoder",
    ),
    _family("visformer.Visformer", _first("visformer.Block", "stage#.#", norm="norm2", attention="attn")),
)

ADAPTERS: tuple[ModelAdapter, ...] = (*_PLAIN, *_PYRAMIDS, *_MAPS)
