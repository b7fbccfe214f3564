"""Feed-forward networks (FFNs) by structure: where the hidden state is complete."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localvit.errors import UnsupportedModelError

TIMM, HF = "timm.models", "transformers.models"


@dataclass(frozen=True)
class Ffn:
    """Structure of a class of FFNs, in names of its layers.

    Attributes:
        slot: Layer whose input is the complete hidden state (after activation and gating). A layer without
            parameters is wrapped; in front of one with parameters a hook is set, so that it keeps its name.
        first, last: The first and last point-wise layer: linear, or a convolution of maps `(B, C, H, W)`.
        hidden: Function that returns the width of the hidden state, if it is not that of `last`'s input.
        note: Sentence for the plan.
    """

    slot: str = "drop1"
    first: str = "fc1"
    last: str = "fc2"
    hidden: Callable[[Any], int] | None = None
    note: str | None = None


_LOCAL = "its FFNs have a depth-wise convolution already"

# Blocks whose FFN shares the first linear layer with attention; its hidden state has a dropout of its own.
_PARALLEL = Ffn("mlp_drop", "in_proj", "in_proj", hidden=lambda block: block.in_split[0])

_NUMBERED = Ffn("2", "0", "3")  # linear, activation, dropout, linear, dropout
_TWO = Ffn("fc2")  # no dropout
_GATED = Ffn("down_proj", "gate_proj", "down_proj")

FFNS: dict[str, Ffn] = {
    "timm.layers.mlp.Mlp": Ffn(),
    "timm.layers.mlp.GluMlp": Ffn(),
    "timm.layers.mlp.SwiGLU": Ffn(first="fc1_g"),
    "timm.layers.mlp.GlobalResponseNormMlp": Ffn(),
    "timm.layers.mlp.ConvMlp": Ffn("drop"),
    f"{TIMM}.efficientformer.ConvMlpWithNorm": Ffn("fc2"),  # one dropout serves twice
    f"{TIMM}.efficientformer_v2.ConvMlpWithNorm": Ffn(note=_LOCAL),
    f"{TIMM}.efficientvim.FFN": _TWO,
    f"{TIMM}.efficientvit_msra.ConvMlp": Ffn("pw2.conv", "pw1", "pw2"),
    f"{TIMM}.fastvit.ConvMlp": Ffn("fc2", note=_LOCAL),
    f"{TIMM}.gemma4_vit.Gemma4GatedMlp": _GATED,
    f"{TIMM}.levit.LevitMlp": Ffn("drop", "ln1", "ln2"),
    f"{TIMM}.pvt_v2.MlpWithDepthwiseConv": Ffn("fc2", note=_LOCAL),
    f"{TIMM}.shvit.FFN": Ffn("pw2.c", "pw1", "pw2"),
    f"{TIMM}.swiftformer.Mlp": _TWO,
    f"{TIMM}.tiny_vit.NormMlp": Ffn(),
    f"{TIMM}.visformer.SpatialMlp": Ffn("conv3", "conv1", "conv3"),
    f"{TIMM}.vision_transformer.DiffParallelScalingBlock": _PARALLEL,
    f"{TIMM}.vision_transformer.ParallelScalingBlock": _PARALLEL,
    f"{TIMM}.vitamin.GeGluMlp": Ffn(first="w0", last="w2"),
    "torchvision.models.vision_transformer.MLPBlock": _NUMBERED,
    "torchvision.ops.misc.MLP": _NUMBERED,
    f"{HF}.beit.modeling_beit.BeitMLP": _TWO,
    f"{HF}.clip.modeling_clip.CLIPMLP": _TWO,
    f"{HF}.deit.modeling_deit.DeiTMLP": _TWO,
    f"{HF}.dinov2.modeling_dinov2.Dinov2MLP": _TWO,
    f"{HF}.dinov2.modeling_dinov2.Dinov2SwiGLUFFN": _GATED,
    f"{HF}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersMLP": _TWO,
    f"{HF}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersSwiGLUFFN": _GATED,
    f"{HF}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTMLP": Ffn("down_proj", "up_proj", "down_proj"),
    f"{HF}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTGatedMLP": _GATED,
    f"{HF}.segformer.modeling_segformer.SegformerMixMLP": Ffn("fc2", note=_LOCAL),
    f"{HF}.siglip.modeling_siglip.SiglipMLP": _TWO,
    f"{HF}.swin.modeling_swin.SwinMLP": _TWO,
    f"{HF}.swinv2.modeling_swinv2.Swinv2Layer": Ffn("output.dense", "intermediate.dense", "output.dense"),
    f"{HF}.vit.modeling_vit.ViTMLP": _TWO,
}

# Packages whose layers in an FFN are known to be point-wise; others are tested.
_KNOWN = ("torch.nn.modules.", "timm.", f"{HF}.", "transformers.activations", "torchvision.", "open_clip.")
_IN_SEQUENTIAL = tuple(f"torch.nn.modules.{n}" for n in ("linear", "normalization", "activation", "dropout"))


def class_name(kind: type) -> str:
    """Return the full name of a class, as rows have it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def ffn_of(module: nn.Module, path: str, sequential: Ffn | None = None) -> Ffn:
    """Return the structure of an FFN; `sequential` is that of an `nn.Sequential`.

    Raises:
        UnsupportedModelError: for a class without a row (a subclass may compute something else), for a
            replaced `forward`, and for layers of unknown classes that mix tokens.
    """
    structure = FFNS.get(class_name(type(module))) if sequential is None else _in(module, sequential)
    if structure is None:
        known = ", ".join(sorted(name.rpartition(".")[2] for name in FFNS))
        raise UnsupportedModelError(f"{path} is a {type(module).__name__}; accepted: {known}")
    if "forward" in vars(module):
        raise UnsupportedModelError(
            f"{path}.forward was replaced; accepted: the one of {type(module).__name__}"
        )
    for name, layer in module.named_modules():
        if not type(layer).__module__.startswith(_KNOWN):
            _check_pointwise(module, structure, f"{path}.{name}", type(layer).__name__)
            break
    return structure


def _in(module: nn.Module, structure: Ffn) -> Ffn | None:
    known = type(module) is nn.Sequential and all(
        type(layer).__module__.startswith((*_IN_SEQUENTIAL, "transformers.activations", "open_clip."))
        for layer in module
    )
    return structure if known else None


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a point-wise layer: its own, or that of the layer in it (batch norm, LoRA)."""
    weights = [
        p for name, p in layer.named_parameters() if name.rpartition(".")[2] == "weight" and p.ndim > 1
    ]
    return weights[0]


def is_conv(module: nn.Module, structure: Ffn) -> bool:
    """Return whether the FFN computes maps `(B, C, H, W)`."""
    return weight_of(module.get_submodule(structure.first)).ndim == 4


def _check_pointwise(module: nn.Module, structure: Ffn, path: str, kind: str) -> None:
    """Change one of six tokens, and check that only the output of that one changes."""
    weight = weight_of(module.get_submodule(structure.first))
    if weight.is_meta:
        raise UnsupportedModelError(f"{path} is a {kind}, which cannot be tested on the meta device")
    conv, width = weight.ndim == 4, weight.shape[1]
    tokens = torch.randn(2, 6, width, device=weight.device)
    tokens[1, [0, 1, 3, 4, 5]] = tokens[0, [0, 1, 3, 4, 5]]
    mode = module.training
    with torch.no_grad():
        outputs = module.eval()(tokens.mT.unflatten(2, (2, 3)) if conv else tokens)
    module.train(mode)
    change = (outputs[0] - outputs[1]).abs()
    change = (change.flatten(1).mT if conv else change).amax(1)
    if not change[2] > 0 or change[[0, 1, 3, 4, 5]].max() > 1e-6 * change[2]:
        raise UnsupportedModelError(f"{path} is a {kind}: the FFN is not a function of each token alone")
