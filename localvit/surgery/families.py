"""Rows of the families of models: timm's, and localvit's baselines."""

from dataclasses import replace
from typing import Any

from localvit.errors import UnsupportedModelError
from localvit.surgery.adapters import MAIN_GROUP, Block, ModelAdapter
from localvit.surgery.grids import GridFrom
from localvit.surgery.orders import ChannelsFirst, ChannelsLast, Strided, Windows

T = "timm.models"
VIT = f"{T}.vision_transformer"

# Grid sources that many families share.
_PATCHES = GridFrom("patch_embed", "image", "grid_size")
_LEVIT = GridFrom("stages.{0}.blocks.0.attn", "attribute", "resolution")
_BLOCK_INPUT = GridFrom(".", "input", "input_resolution")


def _embedding(model: Any, _: Any) -> GridFrom:
    """Return the source of plain transformers: their patch embedding, perhaps after a stem."""
    kind = type(model.patch_embed).__name__
    if kind == "PatchEmbed":
        return _PATCHES
    if kind in ("HybridEmbed", "HybridEmbedWithSize"):
        return GridFrom("patch_embed.proj", "output_map")
    raise UnsupportedModelError(
        f"patch_embed is a {kind}, whose token grid is not known; accepted: PatchEmbed, HybridEmbed"
    )


_VIT_BLOCK = Block(f"{VIT}.Block", layer_scale="ls2", prefix="num_prefix_tokens", grid=_embedding)
_GAMMA = replace(_VIT_BLOCK, layer_scale="gamma_2")
_LOCALVIT = "localvit.baselines"


def _main(*rows: Block) -> dict[str, tuple[Block, ...]]:
    return {MAIN_GROUP: rows}


def _pvt_prefix(model: Any, numbers: tuple[int, ...]) -> int:
    return int(model.stages[numbers[0]].num_prefix_tokens)


def _convit_prefix(model: Any, numbers: tuple[int, ...]) -> int:
    """Return the prefix tokens of a block: the class token is added in front of the first non-local one."""
    return int(model.num_prefix_tokens) if numbers[0] >= model.local_up_to_layer else 0


def _pit_prefix(model: Any, _: Any) -> int:
    return int(model.cls_token.shape[1])


def _pit_grid(_: Any, numbers: tuple[int, ...]) -> GridFrom:
    stage = numbers[0]
    return GridFrom(f"transformers.{stage}.pool" if stage else "patch_embed", "output_map")


def _hiera_order(model: Any, numbers: tuple[int, ...]) -> Strided | None:
    strides, _ = model.reroll.schedule[numbers[0]]
    return Strided(tuple(map(tuple, strides))) if strides else None


def _hiera_grid(model: Any, numbers: tuple[int, ...]) -> GridFrom:
    _, size = model.reroll.schedule[numbers[0]]
    return GridFrom("unroll", "attribute", "size", divide=model.unroll.size[0] // size[0])


def _encoders(module: str, name: str, kind: str, grid: GridFrom, **changes: Any) -> tuple[ModelAdapter, ...]:
    """Return the rows of an encoder and of the classifier around it."""
    return tuple(
        ModelAdapter(
            (f"{T}.{module}.{name}{form}",),
            _main(Block(kind, at=(f"{path}blocks.#",), grid=replace(grid, at=path + grid.at), **changes)),
            image_size=f"{path}patch_embed.img_size",
        )
        for form, path in (("Encoder", ""), ("Classifier", "encoder."))
    )


def _soft_split(_: Any, numbers: tuple[int, ...]) -> GridFrom:
    return GridFrom(f"patch_embed.soft_split{numbers[0] - 1}", "image", "grid_size")


_PLAIN = (
    ModelAdapter(
        (f"{VIT}.VisionTransformer", f"{T}.deit.VisionTransformerDistilled"),
        _main(
            _VIT_BLOCK,
            replace(_VIT_BLOCK, kind=f"{VIT}.ResPostBlock", layer_scale=None),
            replace(
                _VIT_BLOCK,
                kind="torch.nn.modules.container.Sequential",
                at=("blocks.#.ffns.#",),
                norm="norm",
                layer_scale="ls",
                drop_path="drop_path",
                attention=None,
            ),
            *(
                replace(
                    _VIT_BLOCK,
                    kind=f"{VIT}.{kind}",
                    ffn="",
                    norm=None,
                    layer_scale=None,
                    drop_path=None,
                    attention=None,
                )
                for kind in ("ParallelScalingBlock", "DiffParallelScalingBlock")
            ),
        ),
        others=(f"{VIT}.ParallelThingsBlock",),
        dead=True,
    ),
    ModelAdapter(
        (f"{T}.eva.Eva",),
        _main(*(replace(_GAMMA, kind=f"{T}.eva.{kind}") for kind in ("EvaBlock", "EvaBlockPostNorm"))),
        dead=True,
    ),
    ModelAdapter((f"{T}.beit.Beit",), _main(replace(_GAMMA, kind=f"{T}.beit.Block")), dead=True),
    ModelAdapter(
        (f"{T}.vision_transformer_relpos.VisionTransformerRelPos",),
        _main(
            *(
                replace(_VIT_BLOCK, kind=f"{T}.vision_transformer_relpos.{kind}")
                for kind in ("RelPosBlock", "ResPostRelPosBlock")
            )
        ),
        dead=True,
    ),
    ModelAdapter(
        (f"{T}.naflexvit.NaFlexVit",),
        _main(
            replace(_VIT_BLOCK, grid=GridFrom("embeds", "result")),
            replace(_GAMMA, kind=f"{T}.eva.EvaBlock", grid=GridFrom("embeds", "result")),
        ),
        image_size="embeds.default_img_size",
        dead=True,
        note="one size of images per batch: batches of patches with coordinates have no common grid",
    ),
    ModelAdapter(
        (f"{T}.cait.Cait",),
        _main(Block(f"{T}.cait.LayerScaleBlock", layer_scale="gamma_2", drop_path=None, grid=_PATCHES)),
    ),
    ModelAdapter(
        (f"{T}.convit.ConVit",),
        _main(Block(f"{T}.convit.Block", drop_path=None, prefix=_convit_prefix, grid=_embedding)),
        dead=True,
    ),
    ModelAdapter(
        (f"{T}.xcit.Xcit",),
        _main(Block(f"{T}.xcit.XCABlock", layer_scale="gamma2", grid=GridFrom(".", "argument"))),
    ),
    ModelAdapter(
        (f"{T}.vision_transformer_sam.VisionTransformerSAM",),
        _main(
            Block(
                f"{T}.vision_transformer_sam.Block",
                layer_scale="ls2",
                grid=GridFrom(".", "input"),
                attends="windows",
            )
        ),
    ),
    *_encoders(
        "deepseek_vit", "DeepseekVit", f"{T}.deepseek_vit.DeepseekVitBlock", GridFrom("patch_embed", "image")
    ),
    *_encoders(
        "qwen3_vit", "Qwen3Vit", f"{T}.eva.EvaBlock", GridFrom("patch_embed", "image"), layer_scale="gamma_2"
    ),
    *_encoders(
        "gemma4_vit",
        "Gemma4Vit",
        f"{T}.gemma4_vit.Gemma4Block",
        GridFrom("patch_embed", "patches"),
        norm="norm3",
        drop_path=None,
    ),
    ModelAdapter(
        (f"{T}.crossvit.CrossVit",),
        _main(
            replace(
                _VIT_BLOCK,
                at=("blocks.#.blocks.#.#",),
                prefix=1,
                grid=GridFrom("patch_embed.{1}.proj", "output_map"),
            )
        ),
        image_size="img_size",
    ),
    ModelAdapter(
        (f"{T}.pit.PoolingVisionTransformer",),
        _main(replace(_VIT_BLOCK, at=("transformers.#.blocks.#",), prefix=_pit_prefix, grid=_pit_grid)),
        dead=True,
    ),
    ModelAdapter(
        (f"{T}.hiera.Hiera",),
        _main(
            Block(
                f"{T}.hiera.HieraBlock",
                layer_scale="ls2",
                order=_hiera_order,
                grid=_hiera_grid,
                attends="windows",
            )
        ),
        image_size="img_size",
    ),
)

_OWN = (
    ModelAdapter(
        (f"{_LOCALVIT}.t2t_vit.T2TViT",),
        {
            MAIN_GROUP: (
                replace(_VIT_BLOCK, grid=GridFrom("patch_embed.soft_split2", "image", "grid_size")),
            ),
            "tokens_to_token": tuple(
                Block(
                    f"{_LOCALVIT}.tokens_to_token.{kind}",
                    at=("patch_embed.attention#",),
                    drop_path=None,
                    grid=_soft_split,
                )
                for kind in ("TokenPerformer", "TokenTransformer")
            ),
        },
        dead=True,
    ),
    ModelAdapter(
        (f"{_LOCALVIT}.pvt.PyramidVisionTransformer",),
        _main(
            Block(
                f"{_LOCALVIT}.pvt_stage.Block",
                at=("stages.#.blocks.#",),
                prefix=_pvt_prefix,
                grid=GridFrom("stages.{0}.patch_embed", "image", "grid_size"),
                attends="pooled",
            )
        ),
        image_size="stages.0.patch_embed.img_size",
        dead=True,
    ),
    ModelAdapter(
        (f"{T}.tnt.TNT",),
        {
            MAIN_GROUP: (
                Block(
                    f"{T}.tnt.Block",
                    norm="norm_mlp",
                    drop_path="drop_path_mlp",
                    prefix="num_prefix_tokens",
                    # Its embedding refuses any size but the configured one. (It also takes two inputs, so a
                    # hook on it could not be scripted.)
                    grid=GridFrom("pixel_embed", "attribute", "grid_size"),
                    attention="attn_out",
                ),
            ),
            "inner": (
                Block(
                    f"{T}.tnt.Block",
                    ffn="mlp_in",
                    norm="norm_mlp_in",
                    drop_path="drop_path_mlp_in",
                    grid=GridFrom("pixel_embed", "attribute", "new_patch_size"),
                    attention="attn_in",
                ),
            ),
        },
        image_size="pixel_embed.img_size",
        dead=True,
    ),
)


def _swin(module: str, kind: str, at: str, **changes: Any) -> Block:
    return Block(f"{T}.{module}.{kind}", at=(at,), grid=_BLOCK_INPUT, attends="windows", **changes)


def _nest_order(model: Any, numbers: tuple[int, ...]) -> Windows:
    size = int(model.levels[numbers[0]].block_size)
    return Windows(size, size)


def _mobilevit_order(model: Any, numbers: tuple[int, ...]) -> Strided:
    block = model.stages[numbers[0]][numbers[1]]
    return Strided(
        (tuple(block.patch_size),), "map" if type(block).__name__ == "MobileVitV2Block" else "folded"
    )


def _mobilevit_grid(model: Any, numbers: tuple[int, ...]) -> GridFrom:
    block = model.stages[numbers[0]][numbers[1]]
    return GridFrom("stages.{0}.{1}.conv_1x1", "output_map", multiple=block.patch_size[0])


def _mvit(kind: str, **changes: Any) -> Block:
    return Block(
        f"{T}.mvitv2.{kind}",
        at=("stages.#.blocks.#",),
        prefix="num_prefix_tokens",
        grid=GridFrom(".attn", "result"),
        **changes,
    )


def _maxxvit(kind: str, *at: str, **changes: Any) -> Block:
    paths = tuple(f"stages.#.blocks.#{path}" for path in at)
    return Block(
        f"{T}.maxxvit.{kind}", at=paths, **{"layer_scale": "ls2", "order": ChannelsLast(), **changes}
    )


def _coat_note(model: Any) -> str | None:
    alone = "the FFNs of its parallel blocks are left alone, because three scales share each of them"
    return alone if model.parallel_blocks is not None else None


_PARTITIONS = (".attn_block", ".attn_grid")

_PYRAMIDS = (
    ModelAdapter(
        (f"{T}.swin_transformer.SwinTransformer",),
        _main(_swin("swin_transformer", "SwinTransformerBlock", "layers.#.blocks.#")),
    ),
    ModelAdapter(
        (f"{T}.swin_transformer_v2.SwinTransformerV2",),
        _main(_swin("swin_transformer_v2", "SwinTransformerV2Block", "layers.#.blocks.#")),
    ),
    ModelAdapter(
        (f"{T}.swin_transformer_v2_cr.SwinTransformerV2Cr",),
        _main(_swin("swin_transformer_v2_cr", "SwinTransformerV2CrBlock", "stages.#.blocks.#")),
    ),
    ModelAdapter(
        (f"{T}.twins.Twins",),
        _main(
            Block(
                f"{T}.twins.Block", at=("blocks.#.#",), grid=GridFrom(".", "argument", argument=(1, "size"))
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.pvt_v2.PyramidVisionTransformerV2",),
        _main(
            Block(
                f"{T}.pvt_v2.Block",
                at=("stages.#.blocks.#",),
                grid=GridFrom(".", "argument", argument=(1, "feat_size")),
                attends="pooled",
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.mvitv2.MultiScaleVit",), _main(_mvit("MultiScaleBlock", attends="pooled")), dead=True
    ),
    ModelAdapter(
        (f"{T}.davit.DaVit",),
        _main(
            *(
                Block(
                    f"{T}.davit.{kind}",
                    at=("stages.#.blocks.#.#", f"stages.#.blocks.#.{name}"),
                    grid=GridFrom(".", "input_map"),
                    attends="windows",
                )
                for kind, name in (("SpatialBlock", "spatial_block"), ("ChannelBlock", "channel_block"))
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.tiny_vit.TinyVit",),
        _main(
            Block(
                f"{T}.tiny_vit.TinyVitBlock",
                at=("stages.#.blocks.#",),
                norm=None,
                grid=GridFrom(".", "input"),
                attends="windows",
            )
        ),
        others=(f"{T}.tiny_vit.MBConv",),
    ),
    ModelAdapter(
        (f"{T}.levit.Levit", f"{T}.levit.LevitDistilled"),
        _main(
            Block(f"{T}.levit.LevitBlock", at=("stages.#.blocks.#",), norm=None, grid=_LEVIT),
            Block(
                f"{T}.levit.LevitDownsample",
                at=("stages.#.downsample",),
                norm=None,
                drop_path="drop_path",
                grid=_LEVIT,
                attention=None,
            ),
        ),
        others=("torch.nn.modules.linear.Identity",),
    ),
    ModelAdapter(
        (f"{T}.coat.CoaT",),
        _main(
            Block(
                f"{T}.coat.SerialBlock",
                at=("serial_blocks#.#",),
                drop_path=None,
                prefix=1,
                grid=GridFrom(".", "argument", argument=(1, "size")),
                attention="factoratt_crpe",
            )
        ),
        image_size="img_size",
        dead=lambda model: model.parallel_blocks is None,
        note=_coat_note,
    ),
    ModelAdapter(
        (f"{T}.nest.Nest",),
        _main(
            Block(
                f"{T}.nest.TransformerLayer",
                at=("levels.#.transformer_encoder.#",),
                order=_nest_order,
                grid=GridFrom("levels.{0}.pool", "output_map"),
                attends="windows",
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.csatv2.CSATv2",),
        _main(
            Block(
                f"{T}.csatv2.TransformerBlock",
                at=("stages.#.#",),
                layer_scale="ls2",
                grid=GridFrom(".pos_embed", "argument", argument=(1, "size")),
            )
        ),
        others=(f"{T}.csatv2.Block", "timm.layers.norm.LayerNorm2d", "torch.nn.modules.conv.Conv2d"),
        note="the FFNs of its spatial attention, which have one channel, are left alone",
    ),
    ModelAdapter(
        (f"{T}.byobnet.ByobNet",),
        _main(
            *(
                Block(
                    kind,
                    at=("stages.#.#.transformer.#",),
                    layer_scale="ls2",
                    order=_mobilevit_order,
                    grid=_mobilevit_grid,
                )
                for kind in (f"{VIT}.Block", f"{T}.mobilevit.LinearTransformerBlock")
            )
        ),
    ),
)

_MAPS = (
    ModelAdapter(
        (f"{T}.hieradet_sam2.HieraDet",),
        _main(
            Block(
                f"{T}.hieradet_sam2.MultiScaleBlock",
                layer_scale="ls2",
                order=ChannelsLast(),
                attends="windows",
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.volo.VOLO",),
        _main(
            *(
                Block(f"{T}.volo.{kind}", at=("network.#.#",), order=ChannelsLast(), attends=attends)
                for kind, attends in (("Outlooker", "windows"), ("Transformer", "all"))
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.focalnet.FocalNet",),
        _main(
            Block(
                f"{T}.focalnet.FocalNetBlock",
                at=("layers.#.blocks.#",),
                layer_scale="ls2",
                order=ChannelsFirst(),
                attention="modulation",
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.gcvit.GlobalContextVit",),
        _main(
            Block(
                f"{T}.gcvit.GlobalContextVitBlock",
                at=("stages.#.blocks.#",),
                layer_scale="ls2",
                order=ChannelsLast(),
                attends="windows",
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.metaformer.MetaFormer",),
        _main(
            Block(
                f"{T}.metaformer.MetaFormerBlock",
                at=("stages.#.blocks.#",),
                layer_scale="layer_scale2",
                grid=GridFrom("stages.{0}.downsample", "output_map"),
                attention="token_mixer",
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.nextvit.NextViT",),
        _main(
            *(
                Block(
                    f"{T}.nextvit.{kind}",
                    at=("stages.#.blocks.#",),
                    norm=norm,
                    drop_path="mlp_drop_path",
                    order=ChannelsFirst(),
                    attention=attention,
                    attends="pooled",
                )
                for kind, norm, attention in (
                    ("NextConvBlock", "norm", None),
                    ("NextTransformerBlock", "norm2", "e_mhsa"),
                )
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.maxxvit.MaxxVit",),
        _main(
            _maxxvit("TransformerBlock2d", "", order=ChannelsFirst()),
            _maxxvit(
                "ConvNeXtBlock",
                "",
                ".conv",
                ".conv.#",
                norm="norm",
                layer_scale="ls",
                drop_path="drop_path",
                attention=None,
                attends="none",
            ),
            _maxxvit("PartitionAttentionCl", *_PARTITIONS, attends="windows"),
            _maxxvit("PartitionAttention2d", *_PARTITIONS, attends="windows", order=ChannelsFirst()),
            _maxxvit("ParallelPartitionAttention", ".attn", attends="windows", attention=None),
        ),
        others=(
            *(
                f"{T}.maxxvit.{kind}"
                for kind in ("MbConvBlock", "MaxxVitBlock", "ParallelMaxxVitBlock", "Attention2d")
            ),
            "torch.nn.modules.container.Sequential",
        ),
    ),
)


def _mobile(module: str, kind: str, *at: str, **changes: Any) -> Block:
    """Return the row of a block whose FFN computes maps `(B, C, H, W)`."""
    common: dict[str, Any] = {"norm": None, "order": ChannelsFirst(), "attention": None}
    return Block(f"{T}.{module}.{kind}", at=at or ("stages.#.blocks.#",), **{**common, **changes})


_MOBILE = (
    ModelAdapter(
        (f"{T}.edgenext.EdgeNeXt",),
        _main(
            *(
                _mobile(
                    "edgenext", kind, norm="norm", layer_scale="gamma", drop_path=drop, order=ChannelsLast()
                )
                for kind, drop in (("ConvBlock", "drop_path"), ("SplitTransposeBlock", None))
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.efficientformer.EfficientFormer",),
        _main(
            _mobile("efficientformer", "MetaBlock2d", layer_scale="ls2"),
            _mobile(
                "efficientformer",
                "MetaBlock1d",
                norm="norm2",
                layer_scale="ls2",
                order=None,
                grid=GridFrom("stages.{0}.downsample", "output_map"),
                attention="token_mixer",
            ),
        ),
        others=(f"{T}.efficientformer.Flat",),
    ),
    ModelAdapter(
        (f"{T}.efficientformer_v2.EfficientFormerV2",),
        _main(_mobile("efficientformer_v2", "EfficientFormerV2Block", layer_scale="ls2")),
    ),
    ModelAdapter(
        tuple(f"{T}.efficientvim.{kind}" for kind in ("EfficientViM", "EfficientViMDistilled")),
        _main(_mobile("efficientvim", "EfficientViMBlock", ffn="ffn", drop_path=None)),
    ),
    ModelAdapter(
        (f"{T}.efficientvit_msra.EfficientVitMsra",),
        _main(
            _mobile(
                "efficientvit_msra",
                "ResidualDrop",
                *(f"stages.#.blocks.#.{name}" for name in ("ffn0", "ffn1")),
                ffn="m",
                drop_path=None,
            )
        ),
    ),
    ModelAdapter(
        (f"{T}.fastvit.FastVit",),
        _main(
            _mobile("fastvit", "RepMixerBlock", layer_scale="layer_scale", drop_path="drop_path"),
            _mobile("fastvit", "AttentionBlock", layer_scale="layer_scale_2", attention="token_mixer"),
        ),
    ),
    ModelAdapter(
        (f"{T}.shvit.SHViT",),
        _main(_mobile("shvit", "BasicBlock", ffn="ffn.m", drop_path=None)),
    ),
    ModelAdapter(
        (f"{T}.swiftformer.SwiftFormer",),
        _main(_mobile("swiftformer", "Block", ffn="linear", drop_path=None)),
        others=(f"{T}.swiftformer.ConvEncoder",),
    ),
    ModelAdapter(
        (f"{T}.visformer.Visformer",),
        _main(_mobile("visformer", "Block", "stage#.#", norm="norm2", drop_path=None)),
    ),
)

ADAPTERS: tuple[ModelAdapter, ...] = (*_PLAIN, *_OWN, *_PYRAMIDS, *_MAPS, *_MOBILE)
