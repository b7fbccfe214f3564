"""Rows of Hugging Face's transformers (version 5.18 and later) and of open_clip.

Names of classes are relative to `transformers.models`. A model that contains another (a classifier, CLIP
with its text model) uses the row of the inner model.
"""

from typing import Any

from localvit.surgery.adapters import MAIN_GROUP, Block, ModelAdapter
from localvit.surgery.ffns import Ffn
from localvit.surgery.grids import GridFrom

_SHARED = "the drop-path of the FFNs serves attention too, so it stays"
_TEXT = "multiply-accumulates are those of the vision model"


def _full(module: str, name: str) -> str:
    return f"transformers.models.{module}.modeling_{module}.{name}"


def _size(model: Any) -> tuple[int, int, int]:
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return model.config.num_channels, height, width


def _family(module: str, names: str, row: Block, **fields: Any) -> ModelAdapter:
    """Return the row of the classes `names` (separated by spaces), which have the blocks themselves."""
    classes = tuple(_full(module, name) for name in names.split())
    return ModelAdapter(classes, {MAIN_GROUP: (row,)}, **{"image_size": _size, **fields})


def _around(inner: str, module: str, names: str, **fields: Any) -> ModelAdapter:
    """Return the row of classes around the model `inner`."""
    return ModelAdapter(tuple(_full(module, name) for name in names.split()), inner=inner, **fields)


def _row(module: str, kind: str, at: str = "layers.#", **fields: Any) -> Block:
    common: dict[str, Any] = {
        "norm": "layernorm_after",
        "prefix": 1,
        "grid": GridFrom("embeddings.patch_embeddings.projection", "output_map"),
        "attention": "attention",
    }
    return Block(_full(module, kind), (at,), **{**common, **fields})


def _dino(module: str, kind: str, **fields: Any) -> Block:
    common = {"at": "encoder.layer.#", "norm": "norm2", "layer_scale": "layer_scale2"}
    return _row(module, kind, **{**common, **fields})


def _clip(module: str, kind: str, prefix: int) -> Block:
    return _row(
        module,
        kind,
        "encoder.layers.#",
        norm="layer_norm2",
        prefix=prefix,
        grid=GridFrom("embeddings.patch_embedding", "output_map"),
        attention="self_attn",
    )


def _registers(model: Any, _: tuple[int, ...]) -> int:
    return 1 + int(model.config.num_register_tokens)


def _windows(module: str, kind: str, **fields: Any) -> Block:
    """Return the row of blocks that get the grid as an argument."""
    common = {"prefix": 0, "grid": GridFrom(".", "argument", argument=(1, "input_dimensions"))}
    return _row(module, kind, "encoder.layers.#.blocks.#", attends="windows", **{**common, **fields})


_REG, _SWIN2 = "dinov2_with_registers", "swinv2"

_VISION = (
    _family("vit", "ViTModel", _row("vit", "ViTLayer")),
    _around("vit", "vit", "ViTForImageClassification", dead=True),
    _family("deit", "DeiTModel", _row("deit", "DeiTLayer", prefix=2)),
    _around("deit", "deit", "DeiTForImageClassification DeiTForImageClassificationWithTeacher", dead=True),
    _family("beit", "BeitModel", _row("beit", "BeitLayer", layer_scale="lambda_2"), note=_SHARED),
    _around("beit", "beit", "BeitForImageClassification", dead=lambda beit: not beit.config.use_mean_pooling),
    _around("beit", "beit", "BeitBackbone"),
    _family("dinov2", "Dinov2Model Dinov2Backbone", _dino("dinov2", "Dinov2Layer"), note=_SHARED),
    _around("dinov2", "dinov2", "Dinov2ForImageClassification"),
    _family(
        _REG,
        "Dinov2WithRegistersModel Dinov2WithRegistersBackbone",
        _dino(_REG, "Dinov2WithRegistersLayer", prefix=_registers),
        note=_SHARED,
    ),
    _around("dinov2_with_registers", _REG, "Dinov2WithRegistersForImageClassification"),
    _family(
        "dinov3_vit",
        "DINOv3ViTModel DINOv3ViTBackbone",
        _dino(
            "dinov3_vit",
            "DINOv3ViTLayer",
            at="model.layer.#",
            prefix=_registers,
            grid=GridFrom("embeddings.patch_embeddings", "output_map"),
        ),
        note=_SHARED,
    ),
    _family("clip", "CLIPVisionModel", _clip("clip", "CLIPEncoderLayer", 1)),
    _around("vision_model", "clip", "CLIPForImageClassification CLIPVisionModelWithProjection"),
    _around("vision_model", "clip", "CLIPModel", inner_runs=True, note=_TEXT),
    _family("siglip", "SiglipVisionModel", _clip("siglip", "SiglipEncoderLayer", 0)),
    _around("vision_model", "siglip", "SiglipForImageClassification"),
    _around("vision_model", "siglip", "SiglipModel", inner_runs=True, note=_TEXT),
    _family("swin", "SwinModel", _windows("swin", "SwinLayer")),
    _around("swin", "swin", "SwinForImageClassification SwinBackbone"),
    _family(
        _SWIN2,
        "Swinv2Model Swinv2Backbone",
        _windows(_SWIN2, "Swinv2Layer", ffn="", norm=None),
        note="its FFNs are not modules of their own, so init='preserve' only is accepted",
    ),
    _around("swinv2", _SWIN2, "Swinv2ForImageClassification"),
    _family(
        "segformer",
        "SegformerModel",
        _row(
            "segformer",
            "SegformerLayer",
            "stages.#.blocks.#",
            prefix=0,
            grid=GridFrom(".", "argument", argument=(1, "height")),
            attends="pooled",
        ),
        image_size=lambda model: (model.config.num_channels, 224, 224),
        note=_SHARED,
    ),
    _around("segformer", "segformer", "SegformerForImageClassification SegformerForSemanticSegmentation"),
    _around("timm_model", "timm_wrapper", "TimmWrapperModel"),
    _around("timm_model", "timm_wrapper", "TimmWrapperForImageClassification", dead=None),
)

# --- open_clip -------------------------------------------------------------------------------------------


def _resblock(kind: str) -> Block:
    return Block(
        f"open_clip.transformer.{kind}",
        ("transformer.resblocks.#",),
        norm="ln_2",
        layer_scale="ls_2",
        prefix=1,
        grid=GridFrom("conv1", "output_map"),
        layers=Ffn("c_proj", "c_fc", "c_proj"),
    )


_OPEN_CLIP = (
    ModelAdapter(
        ("open_clip.transformer.VisionTransformer",),
        {
            MAIN_GROUP: tuple(
                _resblock(kind) for kind in ("ResidualAttentionBlock", "CustomResidualAttentionBlock")
            )
        },
        image_size="image_size",
        dead=lambda model: model.attn_pool is None and model.pool_type == "tok" and not model.output_tokens,
    ),
    ModelAdapter(
        ("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP"),
        inner="visual",
        inner_runs=True,
        dead=None,
        note=_TEXT,
    ),
    ModelAdapter(("open_clip.timm_model.TimmModel",), inner="trunk", dead=None),
)

ADAPTERS = (*_VISION, *_OPEN_CLIP)
