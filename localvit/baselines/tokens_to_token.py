"""The stem of T2T-ViT (Yuan et al., ICCV 2021, arXiv 2101.11986): overlapping patches of overlapping patches.

Reference: yitu-opensource/T2T-ViT, `T2T_module` in `models/t2t_vit.py`, `models/token_performer.py` and
`models/token_transformer.py`. Shapes: B batch, H x W image, N tokens, C channels.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp, to_2tuple, use_fused_attn
from timm.models import register_notrace_function
from torch import Tensor, _assert, nn
from torch.jit import Final

TokensType = Literal["performer", "transformer"]

# The eps of the reference's norms; timm's LayerNorm has 1e-6 by default.
layer_norm = partial(LayerNorm, eps=1e-5)


class SoftSplit(nn.Module):
    """Overlapping patches as tokens: `(B, C, H, W) -> (B, N, C * kernel_size ** 2)`.

    Features of a token are ordered channel, row, column (channel slowest); tokens are in raster order.

    Args:
        kernel_size, stride, padding: Of the window, in pixels, equal in both directions.

    Attributes:
        grid_size: Lattice (height, width) of the output for the image size that `TokensToToken` is
            configured for, which keeps it up to date.
    """

    grid_size: tuple[int, int]

    def __init__(self, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Lattice (height, width) of the tokens of an input of `size`; symbolic integers are fine."""
        border = 2 * self.padding - self.kernel_size
        return (size[0] + border) // self.stride + 1, (size[1] + border) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def _positive_features(x: Tensor, w: Tensor) -> Tensor:
    """`exp(w x - |x|^2 / 2) / sqrt(m)` for m rows of `w`: `(B, N, C) -> (B, N, m)`.

    The exponent is `|w|^2 / 2 - |x - w|^2 / 2`, hence at most `m / 2` for rows of norm `sqrt(m)`: 16 in
    the published models, and no overflow of float32 up to m = 80. Where it underflows, the epsilon of
    the quotient has long made the attention zero, as in the reference; there the skip path remains.
    """
    exponent = x @ w.t() - x.square().sum(dim=-1, keepdim=True) / 2
    return exponent.exp() / math.sqrt(w.shape[0])


def _linear_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    dtype = v.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:
        k, q, v = k.float(), q.float(), v.float()
    w = w.to(k.dtype)
    k, q = _positive_features(k, w), _positive_features(q, w)
    total = q @ k.sum(dim=1).unsqueeze(-1)  # (B, N, 1)
    return (q @ (k.transpose(1, 2) @ v) / (total + eps)).to(dtype)


@torch.fx.wrap
@register_notrace_function
def performer_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    """Softmax attention approximated with positive random features, linear in N (FAVOR+, arXiv 2009.14794).

    Computed in at least float32, also under autocast: in float16 `eps` is 0 and `exp(16)` infinite.
    TorchScript cannot leave an autocast region; there, give the model its precision with `.half()`.

    Args:
        k, q, v: `(B, N, C)`.
        w: Random directions `(m, C)`.
        eps: Added to the denominator.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  # alone, so that TorchScript skips what is inside
        if v.device.type != "meta" and torch.is_autocast_enabled(v.device.type):  # autocast knows no meta
            with torch.autocast(device_type=v.device.type, enabled=False):
                return _linear_attention(k, q, v, w, eps)
    return _linear_attention(k, q, v, w, eps)


class TokenPerformer(nn.Module):
    """Attention stage of linear cost: `(B, N, dim) -> (B, N, token_dim)`.

    One head; the value, not the input, is the skip path, because the widths differ.

    Args:
        dim: Width of the input tokens.
        token_dim: Width of everything after the fused key, query, value projection (in that order).
        drop: Dropout after the attention's projection and after the MLP. The reference has 0.1 hard-wired.
        norm_layer: Makes both norms.

    Attributes:
        w: Random directions `(token_dim // 2, token_dim)`, orthogonal rows of norm `sqrt(m)`. A buffer:
            drawn once, saved and loaded, never trained. (The reference: a parameter without gradient.)
    """

    def __init__(
        self,
        dim: int,
        token_dim: int,
        drop: float = 0.1,
        norm_layer: Callable[..., nn.Module] = layer_norm,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.eps = 1e-8
        self.norm1 = norm_layer(dim, **dd)
        self.kqv = nn.Linear(dim, 3 * token_dim, **dd)
        self.proj = nn.Linear(token_dim, token_dim, **dd)
        self.proj_drop = nn.Dropout(drop)
        self.norm2 = norm_layer(token_dim, **dd)
        self.mlp = Mlp(token_dim, drop=(0.0, drop), **dd)
        self.register_buffer("w", torch.empty(token_dim // 2, token_dim, **dd))
        self.reset_parameters()

    w: Tensor

    def reset_parameters(self) -> None:
        """Draw the random directions (timm calls this when it initialises a whole model anew)."""
        directions = torch.empty_like(self.w, dtype=torch.float32)  # no QR decomposition in half precision
        nn.init.orthogonal_(directions, gain=math.sqrt(self.w.shape[0]))
        self.w.copy_(directions)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        y = performer_attention(k, q, v, self.w, self.eps)
        x = v + self.proj_drop(self.proj(y))
        x = x + self.mlp(self.norm2(x))
        return x


class TokenAttention(nn.Module):
    """One-head softmax attention to another width, with the value as skip path.

    The scale is `dim ** -0.5`, of the *input* width, as in the reference.
    """

    fused_attn: Final[bool]

    def __init__(
        self, dim: int, token_dim: int, drop: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * token_dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(token_dim, token_dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)  # one head: (B, 1, N, token_dim)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            x = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return v.squeeze(1) + self.proj_drop(self.proj(x.squeeze(1)))


class TokenTransformer(nn.Module):
    """Attention stage of quadratic cost: `(B, N, dim) -> (B, N, token_dim)`.

    Args:
        dim, token_dim, norm_layer: As in `TokenPerformer`.
        drop: Dropout after the attention's projection and in the MLP; none in the reference.
    """

    def __init__(
        self,
        dim: int,
        token_dim: int,
        drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = layer_norm,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = TokenAttention(dim, token_dim, drop, **dd)
        self.norm2 = norm_layer(token_dim, **dd)
        self.mlp = Mlp(token_dim, drop=drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


# Stage and the dropout that the reference has in it.
_STAGES: dict[str, tuple[type[nn.Module], float]] = {
    "performer": (TokenPerformer, 0.1),
    "transformer": (TokenTransformer, 0.0),
}


class TokensToToken(nn.Module):
    """T2T-ViT's stem, in the place of timm's `PatchEmbed`: `(B, in_chans, H, W) -> (B, N, embed_dim)`.

    Three soft splits (7x7 stride 4, then twice 3x3 stride 2) with an attention stage after the first and the
    second, and a linear projection. Any image of at least 3 x 3 pixels is taken, without padding.

    Args:
        img_size: Image side, or height and width, in pixels.
        patch_size: The product of the strides, 16; nothing else is accepted.
        bias: Of the last projection.
        strict_img_size: Refuse images of another size than `img_size`.
        output_fmt: None for tokens, "NHWC" for `(B, height, width, embed_dim)`.
        dynamic_img_pad: Not offered.
        tokens_type: Kind of the attention stages.
        token_dim: Their width, at least 2.
        token_drop_rate: Their dropout. None: the reference's, 0.1 in the performer, else 0.
        norm_layer: Makes their norms.

    Raises:
        ValueError: An argument outside of what is accepted.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        bias: bool = True,
        strict_img_size: bool = True,
        output_fmt: Literal["NHWC"] | None = None,
        dynamic_img_pad: bool = False,
        tokens_type: TokensType = "performer",
        token_dim: int = 64,
        token_drop_rate: float | None = None,
        norm_layer: Callable[..., nn.Module] = layer_norm,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if tokens_type not in _STAGES:
            raise ValueError(f"tokens_type {tokens_type!r} is not one of {', '.join(_STAGES)}")
        if token_dim < 2:
            raise ValueError(f"token_dim {token_dim} is below 2: the performer has token_dim // 2 directions")
        if output_fmt not in (None, "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r} is neither None nor 'NHWC'")
        if dynamic_img_pad:
            raise ValueError("dynamic_img_pad is not offered: soft splits take any size without padding")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        stage, drop = _STAGES[tokens_type]
        make_stage = partial(
            stage,
            token_dim=token_dim,
            drop=drop if token_drop_rate is None else token_drop_rate,
            norm_layer=norm_layer,
            **dd,
        )
        self.patch_size = (16, 16)
        self.strict_img_size = strict_img_size
        self.nhwc = output_fmt == "NHWC"
        self.soft_split0 = SoftSplit(7, stride=4, padding=2)
        self.attention1 = make_stage(in_chans * 7**2)
        self.soft_split1 = SoftSplit(3, stride=2, padding=1)
        self.attention2 = make_stage(token_dim * 3**2)
        self.soft_split2 = SoftSplit(3, stride=2, padding=1)
        self.project = nn.Linear(token_dim * 3**2, embed_dim, bias=bias, **dd)
        self.set_input_size(img_size, patch_size)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Expect another image size from now on.

        Raises:
            ValueError: Another patch size, or an image that has no token.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"patch_size {patch_size} cannot be set: the soft splits' strides make it 16")
        if img_size is None:
            return
        size: tuple[int, int] = to_2tuple(img_size)
        if min(size) < 3:
            raise ValueError(f"img_size {img_size} is below 3 pixels, the least that a 7x7 soft split takes")
        self.img_size = size
        for split in (self.soft_split0, self.soft_split1, self.soft_split2):
            split.grid_size = size = split.dynamic_feat_size(size)
        self.grid_size = size
        self.num_patches = size[0] * size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Lattice (height, width) of the tokens of an image of `img_size`."""
        size = self.soft_split1.dynamic_feat_size(self.soft_split0.dynamic_feat_size(img_size))
        return self.soft_split2.dynamic_feat_size(size)

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        if self.strict_img_size:
            _assert(self.img_size[0] == H, f"Input height ({H}) doesn't match model ({self.img_size[0]}).")
            _assert(self.img_size[1] == W, f"Input width ({W}) doesn't match model ({self.img_size[1]}).")
        h, w = self.soft_split0.dynamic_feat_size((H, W))
        x = self.attention1(self.soft_split0(x))
        x = x.transpose(1, 2).reshape(B, x.shape[-1], h, w)
        h, w = self.soft_split1.dynamic_feat_size((h, w))
        x = self.attention2(self.soft_split1(x))
        x = x.transpose(1, 2).reshape(B, x.shape[-1], h, w)
        h, w = self.soft_split2.dynamic_feat_size((h, w))
        x = self.project(self.soft_split2(x))
        return x.reshape(B, h, w, x.shape[-1]) if self.nhwc else x
