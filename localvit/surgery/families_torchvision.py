"""Rows of torchvision's transformers. Names of classes are relative to `torchvision.models`."""

from typing import Any

from localvit.locality import TokenOrder
from localvit.surgery.adapters import MAIN_GROUP, Block, ModelAdapter
from localvit.surgery.ffns import Ffn
from localvit.surgery.grids import GridFrom
from localvit.surgery.orders import CHANNELS_LAST, token_order

_SHARED = "the stochastic depth of the FFNs serves attention too, so it stays"


def _full(name: str) -> str:
    return f"torchvision.models.{name}"


def _family(name: str, *rows: Block, **fields: Any) -> ModelAdapter:
    return ModelAdapter((_full(name),), {MAIN_GROUP: rows}, **fields)


def _swin(kind: str) -> Block:
    return Block(_full(f"swin_transformer.{kind}"), ("features.#.#",), order=CHANNELS_LAST, attends="windows")


def _partition(name: str) -> Block:
    """Return the row of MaxViT's attention over windows or a grid, whose FFN has the norm in it."""

    def order(model: Any, numbers: tuple[int, ...]) -> TokenOrder:
        layer = model.get_submodule(f"blocks.{numbers[0]}.layers.{numbers[1]}.layers.{name}")
        grid = layer.partition_type == "grid"
        return token_order("b (h2 w2) (h1 w1) c" if grid else "b (h1 w1) (h2 w2) c", h2=layer.p, w2=layer.p)

    return Block(
        _full("maxvit.PartitionAttentionLayer"),
        (f"blocks.#.layers.#.layers.{name}",),
        ffn="mlp_layer",
        order=order,
        grid=GridFrom(".", "input_map"),
        attention="attn_layer",
        attends="windows",
        layers=Ffn("3", "1", "3"),
    )


def _maxvit_size(model: Any) -> tuple[int, int]:
    """Return the image size of the first grid: the stem and the first block halve it."""
    height, width = model.blocks[0].grid_size
    return 4 * height, 4 * width


ADAPTERS = (
    _family(
        "vision_transformer.VisionTransformer",
        Block(
            _full("vision_transformer.EncoderBlock"),
            ("encoder.layers.encoder_layer_#",),
            norm="ln_2",
            prefix=1,
            grid=GridFrom("conv_proj", "output_map"),
            attention="self_attention",
        ),
        image_size="image_size",
        dead=True,
    ),
    _family(
        "swin_transformer.SwinTransformer",
        _swin("SwinTransformerBlock"),
        _swin("SwinTransformerBlockV2"),
        others=(
            "torch.nn.modules.conv.Conv2d",
            "torch.nn.modules.normalization.LayerNorm",
            "torchvision.ops.misc.Permute",
        ),
        note=_SHARED,
    ),
    _family(
        "maxvit.MaxVit",
        _partition("window_attention"),
        _partition("grid_attention"),
        image_size=_maxvit_size,
        note=_SHARED,
    ),
)
