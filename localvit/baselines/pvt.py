"""Pyramid Vision Transformer (PVT), first version.

Wang et al., Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions,
arXiv 2102.12122. Reference: whai362/PVT, classification/pvt.py (Apache-2.0). timm has PVT v2 only.

Four stages halve the resolution. Each starts with a patch embedding and a learnt position table; its
attention reads keys and values from a spatially reduced copy of the tokens. Only the last stage has a class
token, and only that token is classified.

Shapes below: B batch, C channels, H and W sides of a map, N = H * W patch tokens, P prefix tokens (0 or 1).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.layers import (
    LayerNorm,
    calculate_drop_path_rates,
    get_device_dtype,
    resample_abs_pos_embed,
    to_2tuple,
    to_ntuple,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    named_apply,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models._input import get_pretrained_grid_size, update_model_input_size
from timm.models.vision_transformer import global_pool_nlc, init_weights_vit_timm
from torch import Tensor, nn

from localvit.baselines.pvt_stage import PyramidVisionTransformerStage, to_map

__all__ = ["PyramidVisionTransformer"]

# Blocks per stage; the other sizes are the defaults of the class (classification/pvt.py).
DEPTHS: dict[str, tuple[int, ...]] = {
    "pvt_tiny": (2, 2, 2, 2),
    "pvt_small": (3, 4, 6, 3),
    "pvt_medium": (3, 4, 18, 3),
    "pvt_large": (3, 8, 27, 3),
}

# ImageNet-1k top-1 in percent at 224 x 224: whai362/PVT, classification/README.md, "PVTv1 on ImageNet-1K".
PUBLISHED: dict[str, float] = {"pvt_tiny": 75.1, "pvt_small": 79.8, "pvt_medium": 81.2, "pvt_large": 81.7}

GlobalPool = Literal["", "token", "avg"]


class PyramidVisionTransformer(nn.Module):
    """Pyramid Vision Transformer; the defaults are PVT-Small.

    Args:
        img_size: Sides of the image, multiples of the whole reduction (32 by default). They size the
            position tables.
        patch_size: Patch size of the first stage; the later ones have 2.
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: Input of the head: `"token"` (class token), `"avg"` (mean of the last stage's patch
            tokens) or `""` (all tokens).
        embed_dims, depths, num_heads, mlp_ratios, sr_ratios: One value per stage. The last ratio of spatial
            reduction must be 1, because of the class token.
        qkv_bias: Bias in the linear layers of query, key and value.
        drop_rate: Dropout in front of the classifier.
        pos_drop_rate, proj_drop_rate, attn_drop_rate: Dropout after the position tables; after attention's
            projection and in the feed-forward network; of attention weights. The reference has one
            `drop_rate` for the first two.
        drop_path_rate: Drop-path rate of the last block; it grows linearly from 0 at the first.
        norm_layer: Norm of the blocks and of the final tokens. The default has eps 1e-6, as in the reference.
        dynamic_img_size: Accept images of other sizes, with interpolated position tables.

    Raises:
        ValueError: for an `img_size` that the stages do not divide, sequences of different lengths, or an
            unknown `global_pool`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "token",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: int | Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: float | Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        sr_ratios: int | Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        num_stages = len(depths)
        embed_dims = _per_stage("embed_dims", embed_dims, num_stages)
        map_size = _checked_img_size(img_size, patch_size, num_stages)

        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        self.num_prefix_tokens = 1
        self.dynamic_img_size = dynamic_img_size
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(embed_dims)
        ]

        each = {
            "dim": (in_chans, *embed_dims[:-1]),
            "dim_out": embed_dims,
            "depth": depths,
            "patch_size": (patch_size, *(2 for _ in depths[1:])),
            "num_prefix_tokens": (*(0 for _ in depths[1:]), self.num_prefix_tokens),
            "num_heads": _per_stage("num_heads", num_heads, num_stages),
            "mlp_ratio": _per_stage("mlp_ratios", mlp_ratios, num_stages),
            "sr_ratio": _per_stage("sr_ratios", sr_ratios, num_stages),
            "drop_path": calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True),
        }
        dropout = {"pos_drop": pos_drop_rate, "proj_drop": proj_drop_rate, "attn_drop": attn_drop_rate}
        shared = {"qkv_bias": qkv_bias, "norm_layer": norm_layer, "dynamic_img_size": dynamic_img_size}
        self.stages: Any = _stages(map_size, each, {**dropout, **shared, **dd})

        self.cls_token: nn.Parameter | None = nn.Parameter(torch.empty(1, 1, self.embed_dim, **dd))
        self.norm = norm_layer(self.embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as in the reference: std 0.02 for linear layers, position tables and class token.

        All other layers have PyTorch's defaults.

        Args:
            needs_reset: Also initialise the layers with PyTorch's defaults (convolutions, norms), for weights
                that were on the meta device.
        """
        for stage in self.stages:
            trunc_normal_(stage.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        named_apply(partial(init_weights_vit_timm, needs_reset=needs_reset), self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the class token only; position tables are decayed, as in the reference."""
        return {"cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter groups, by stage (`coarse`) or by block.

        The layers before a stage's first block are in the group of that block. The class token is in the
        group of the last stage.
        """
        last = len(self.stages) - 1
        blocks: list[tuple[str, tuple[int, ...] | None]]
        if coarse:
            blocks = [(r"^stages\.(\d+)", None), (r"^cls_token", (last,))]
        else:
            blocks = [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.", (0,)),
                (r"^cls_token", (last, 0)),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^stages\.0\.(?:patch_embed|pos_embed)", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the classifier by one for `num_classes` (0: none), and set `global_pool` if given."""
        if global_pool is not None:
            accepted = get_args(GlobalPool) if self.num_prefix_tokens else ("", "avg")
            if global_pool not in accepted:
                raise ValueError(f"global_pool {global_pool!r} is not accepted; use one of {accepted}")
            self.global_pool: str = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Set the image size; the position tables are interpolated (bicubic).

        Raises:
            ValueError: if the stages do not divide `img_size`; the model does not change.
        """
        patch_size = self.stages[0].patch_embed.patch_size[0]
        map_size = image_size = _checked_img_size(img_size, patch_size, len(self.stages))
        for stage in self.stages:
            stage.set_input_size(map_size)
            map_size = stage.patch_embed.grid_size
        update_model_input_size(self, image_size)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the result of `forward_features`, and the maps `(B, C, H, W)` after the stages.

        Args:
            x: Images, `(B, in_chans, H, W)`.
            indices: Number of last stages, or a list of stages; `None` for all.
            norm: Apply the final norm to the map of the last stage; the others have none.
            stop_early: Do not run the stages after the last of `indices`, whose map is then the first result.
            output_fmt: Only `"NCHW"` is accepted.
            intermediates_only: Return only the maps.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not accepted; use 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x, feat_size = stage(x, self.cls_token if stage.num_prefix_tokens else None)
            if i in take_indices:
                tokens = self.norm(x) if norm and i == last else x
                intermediates.append(to_map(tokens, feat_size, stage.num_prefix_tokens).contiguous())
            x = self.norm(x) if i == last else to_map(x, feat_size)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove layers that the maps at `indices` do not need; return the indices from the first stage."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:  # the class token and the head belong to the last stage
            self.cls_token = None
            self.num_prefix_tokens = 0
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the normed tokens of the last stage: `(B, in_chans, H, W) -> (B, 1 + N, C)`."""
        last = len(self.stages) - 1
        for i, stage in enumerate(self.stages):
            x, feat_size = stage(x, self.cls_token if stage.num_prefix_tokens else None)
            if i < last:
                x = to_map(x, feat_size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits from tokens `(B, 1 + N, C)`, or (`pre_logits`) the classifier's input."""
        x = global_pool_nlc(x, self.global_pool, self.num_prefix_tokens)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits: `(B, in_chans, H, W) -> (B, num_classes)`."""
        return self.forward_head(self.forward_features(x))


def _per_stage(name: str, values: Any, num_stages: int) -> tuple[Any, ...]:
    """Return one value per stage; a single value is repeated."""
    values = to_ntuple(num_stages)(values)
    if len(values) != num_stages:
        raise ValueError(
            f"{name} {values}: {len(values)} values for {num_stages} stages (depths); give one per stage"
        )
    return values


def _stages(
    map_size: tuple[int, int], each: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]
) -> nn.ModuleList:
    """Build the stages in order, from arguments per stage (`each`) and common ones (`shared`)."""
    stages = nn.ModuleList()
    for values in zip(*each.values(), strict=True):
        stage = PyramidVisionTransformerStage(
            img_size=map_size, **dict(zip(each, values, strict=True)), **shared
        )
        stages.append(stage)
        map_size = stage.patch_embed.grid_size
    return stages


def _checked_img_size(img_size: int | tuple[int, int], patch_size: int, num_stages: int) -> tuple[int, int]:
    """Return (height, width) if no patch embedding drops a row or column of it."""
    size = to_2tuple(img_size)
    multiple = patch_size * 2 ** (num_stages - 1)
    if len(size) != 2 or any(side < multiple or side % multiple for side in size):
        raise ValueError(
            f"img_size {img_size} is not accepted; use multiples of {multiple}, the reduction of the "
            f"{num_stages} stages"
        )
    return size


def to_own_key(key: str) -> str:
    """Return our name of a weight of the reference; our names stay the same."""

    def stage(match: re.Match[str]) -> str:
        layer, number = match.groups()
        return f"stages.{int(number) - 1}.{'blocks' if layer == 'block' else layer}"

    return re.sub(r"^(patch_embed|pos_embed|block)(\d+)(?=\.|$)", stage, key)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: PyramidVisionTransformer) -> dict[str, Tensor]:
    """Convert a checkpoint of the reference, or our own, to a state dict for `model`.

    Position tables are interpolated (bicubic) if the input sizes of checkpoint and `model` differ.

    Raises:
        ValueError: if the checkpoint's size is not recorded (`pretrained_model_args`) and its tables are not
            square.
    """
    weights = {to_own_key(key): value for key, value in state_dict.get("model", state_dict).items()}
    if "stages.0.pos_embed" not in weights:
        return weights
    first_kernel = weights.get("stages.0.patch_embed.proj.weight")
    num_patches = weights["stages.0.pos_embed"].shape[1] - model.stages[0].num_prefix_tokens
    old_grid = get_pretrained_grid_size(
        model, first_kernel, num_patches
    )  # None: it does not match the record
    new_grid = model.stages[0].patch_embed.grid_size
    if old_grid is None and num_patches == new_grid[0] * new_grid[1]:
        old_grid = new_grid
    elif old_grid is None:
        old_grid = (math.isqrt(num_patches), math.isqrt(num_patches))
        if old_grid[0] ** 2 != num_patches:
            raise ValueError(
                f"pos_embed of the checkpoint: {num_patches} patches, of unknown rows and columns; "
                "record the size in pretrained_model_args"
            )
    for i, stage in enumerate(model.stages):
        new_grid = stage.patch_embed.grid_size
        key, grid = f"stages.{i}.pos_embed", (old_grid[0] // 2**i, old_grid[1] // 2**i)
        if grid != new_grid:
            weights[key] = resample_abs_pos_embed(weights[key], new_grid, grid, stage.num_prefix_tokens)
    return weights


def _cfg(name: str) -> dict[str, Any]:
    """Return weights and evaluation of the reference: resize 256, crop 224 (classification/datasets.py).

    What is left out has the default of timm's `PretrainedCfg`: bicubic, ImageNet's mean and deviation.
    """
    return {
        "url": f"https://github.com/whai362/PVT/releases/download/v2/{name}.pth",
        "fixed_input_size": True,
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "first_conv": "stages.0.patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/whai362/PVT",
        "paper_ids": "arXiv:2102.12122",
    }


default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg(name) for name in DEPTHS})


def _entrypoint(name: str) -> Callable[..., PyramidVisionTransformer]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
        args = {"depths": DEPTHS[name], **kwargs}
        return build_model_with_cfg(
            PyramidVisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": tuple(range(len(args["depths"]))), "feature_cls": "getter"},
            **args,
        )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    return entrypoint


for _name in DEPTHS:
    globals()[_name] = register_model(_entrypoint(_name))
