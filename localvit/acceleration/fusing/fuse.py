"""Fast inference form of a model: `localvit.fuse`."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, GluMlp, Mlp, PatchDropout, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from localvit.acceleration.fusing import blocks
from localvit.acceleration.fusing.feed_forward import fuse_locality, fuse_mlp, hooked
from localvit.acceleration.fusing.folding import InferenceOnly
from localvit.acceleration.fusing.linear import PackedLinear, packed_rows
from localvit.acceleration.kernels import plain_kernels
from localvit.baselines import Block as PvtBlock, T2TViT
from localvit.locality import LocalityFeedForward
from localvit.surgery import refuse_wrapped

# Function that changes a module to its fast form, or returns the reason that it stays plain.
Fuser = Callable[[Any], str | None]

# Layers without effect in evaluation.
_DROPOUTS = (nn.Dropout, DropPath, PatchDropout)


def _to(fast: type[nn.Module]) -> Fuser:
    def change(module: nn.Module) -> None:
        module.__class__ = fast

    return change


# Class -> its fuser, inner modules first. Subclasses are excluded: they may compute something else.
FAST_FORMS: dict[type[nn.Module], Fuser] = {
    LocalityFeedForward: fuse_locality,
    Mlp: fuse_mlp,
    GluMlp: fuse_mlp,
    SwiGLU: fuse_mlp,
    Block: blocks.fuse_block,
    SwinTransformerBlock: _to(blocks.FastSwinBlock),
    PvtBlock: _to(blocks.FastPvtBlock),
    VisionTransformer: _to(blocks.FastVisionTransformer),
    VisionTransformerDistilled: _to(blocks.FastVisionTransformerDistilled),
    T2TViT: _to(blocks.FastT2TViT),
}


def fuse(model: nn.Module, *, compile: bool = False) -> nn.Module:
    """Copy a model into its fast inference form.

    Batch norms, LayerScale and added inputs are folded into the layers before them. Activations and residual
    sums are in place. A feed-forward network (FFN) whose hidden map exceeds the cache runs in chunks of
    images. If the head reads prefix tokens only, the last block computes only those (in `forward`; features
    are complete). Outputs are equal up to rounding: logits to 1e-5 in float32, 1e-10 in float64.

    The result is a model of the same kind (a subclass: `forward_features`, `forward_intermediates`,
    `reset_classifier` and `set_input_size` work) with these differences:

    * It is in evaluation mode, cannot be trained, and its parameters require no gradients.
    * Its state dict lacks folded layers, and its `fc1` and `fc2` are linear layers. Save the original model.
    * It can be copied, pickled, moved, converted (`half()`) and exported (`torch.export` with
      `strict=False`), but not scripted. Folding uses the model's dtype: fuse in float32, and convert
      afterwards.

    Dynamic quantization (`torch.ao.quantization.quantize_dynamic`) goes before or after it. On processors of
    makers other than Intel, quantize before it: afterwards most linear layers have packed weights and are not
    quantized.

    Layers whose class has no fast form stay as they are; so does an FFN with forward hooks on its layers.

    From the first call on, the process keeps up to 64 MB that a forward pass frees for the next one (glibc
    only, without a `MALLOC_*` variable): returning this memory to the system took up to a fifth of the time.

    With the environment variable `LOCALVIT_KERNELS=plain` the result is a plain copy in evaluation mode.

    Args:
        model: Model with at least one of timm's or localvit's transformer blocks or FFNs, localized or not.
        compile: Compile `forward` with `torch.compile` (Inductor with frozen weights, without gradients, as
            under `torch.inference_mode()`). The first call of each input shape takes minutes.

    Returns:
        A new model; `model` is unchanged.

    Raises:
        UnsupportedModelError: for a model that is compiled, scripted or wrapped.
        ValueError: if no layer has a fast form, or a module that would change is used in two places.
    """
    refuse_wrapped(model, "fuse")
    if not plain_kernels():
        _check_fusable(model)
    with torch.inference_mode(False):  # tensors made in it could not be packed
        fused = _evaluation_copy(model)
        if not plain_kernels():
            _remove_dropouts(fused)
            _change_forms(fused)
            _pack_linears(fused)
            _keep_freed_memory()
    if compile:
        _compile(fused)
    return fused


def _check_fusable(model: nn.Module) -> None:
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in (*FAST_FORMS, nn.Linear):
            if id(module) in seen:
                raise ValueError(
                    f"{name} and {seen[id(module)]} are the same module, into which layers cannot be "
                    "folded; copy one of them first"
                )
            seen[id(module)] = name
    if not any(type(module) in FAST_FORMS for module in model.modules()):
        what = f"{type(model).__name__} has no fast form"
        if any(isinstance(module, InferenceOnly) for module in model.modules()):
            raise ValueError(f"{what}; it is fused already")
        known = ", ".join(dict.fromkeys(kind.__name__ for kind in FAST_FORMS))
        raise ValueError(f"{what}; accepted are models with {known}")


def _evaluation_copy(model: nn.Module) -> nn.Module:
    """Copy a model without the layers that `localize` saved for `restore`."""
    report = getattr(model, "localization", None)
    fused = copy.deepcopy(model, {id(report): None} if report is not None else {})
    if report is not None:
        del fused.localization
    switch: Any = getattr(fused, "set_grad_checkpointing", None)
    if switch is not None:
        switch(False)
    return fused.eval().requires_grad_(False)


def _remove_dropouts(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in _DROPOUTS and not hooked(child):
                setattr(module, name, nn.Identity().eval())


def _change_forms(model: nn.Module) -> None:
    reasons: dict[str, list[str]] = {}
    for kind, change in FAST_FORMS.items():
        for name, module in list(model.named_modules()):
            if type(module) is kind:
                reason = change(module)
                if reason is not None:
                    reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        warnings.warn(f"{len(names)} FFN(s) stay plain: {reason} ({names[0]} ...)", stacklevel=3)


def _pack_linears(model: nn.Module) -> None:
    modules: list[Any] = list(model.modules())
    for module in modules:
        rows = packed_rows(module.weight) if type(module) is nn.Linear else None
        if rows is not None:
            module.__class__, module.fewest_rows = PackedLinear, rows


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system, which would clear it again.

    glibc adapts its thresholds: freeing a block that it mapped makes it keep twice the size of that block, up
    to blocks of 32 MB (mallopt(3)). Without this, the threshold depends on what the process did before. Other
    allocators ignore it.
    """
    # Freed at once, and its pages are never touched.
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def _compile(model: nn.Module) -> None:
    """Compile `forward`, with frozen weights if this PyTorch has that option."""
    options: dict[str, Any] = {"freezing": True}
    if not set(options) <= set(torch._inductor.list_options()):
        warnings.warn("this PyTorch cannot freeze weights in compiled models; compiled without", stacklevel=3)
        options = {}
    model.compile(options=options)
