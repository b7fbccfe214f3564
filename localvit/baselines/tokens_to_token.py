"""Stem of T2T-ViT (Yuan et al., ICCV 2021, arXiv 2101.11986): overlapping patches of overlapping patches.

Reference: yitu-opensource/T2T-ViT, `T2T_module` in `models/t2t_vit.py`, `models/token_performer.py` and
`models/token_transformer.py`. Shapes: B batch, H x W image, N tokens, C channels.
"""

import math
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
        kernel_size, stride, padding: Size, stride and padding of the window in pixels, in both directions.

    Attributes:
        grid_size: Grid (height, width) of the output for the configured image size; `TokensToToken` sets it.
    """

    grid_size: tuple[int, int]

    def __init__(self, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid (height, width) of the tokens of an input of `size`, which may be symbolic."""
        border = 2 * self.padding - self.kernel_size
        return (size[0] + border) // self.stride + 1, (size[1] + border) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def _positive_features(x: Tensor, w: Tensor) -> Tensor:
    """Compute `exp(w x - |x|^2 / 2) / sqrt(m)` for m rows of `w`: `(B, N, C) -> (B, N, m)`.

    The exponent is `|w|^2 / 2 - |x - w|^2 / 2`, so at most `m / 2` for rows of norm `sqrt(m)`: 16 in the
    published models, and no overflow of float32 up to m = 80. Before it underflows, the epsilon in the
    denominator has made the attention zero, as in the reference; the skip path remains.
    """
    exponent = x @ w.t() - x.square().sum(dim=-1, keepdim=True) / 2
    return exponent.exp() / math.sqrt(w.shape[0])


def _linear_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor) -> Tensor:
    dtype = v.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:
        k, q, v = k.float(), q.float(), v.float()
    w = w.to(k.dtype)
    k, q = _positive_features(k, w), _positive_features(q, w)
    total = q @ k.sum(dim=1).unsqueeze(-1)  # (B, N, 1)
    return (q @ (k.transpose(1, 2) @ v) / (total + 1e-8)).to(dtype)


@torch.fx.wrap
@register_notrace_function
def performer_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Approximate softmax attention with positive random features, linear in N (FAVOR+, arXiv 2009.14794).

    It computes in at least float32, even under autocast: in float16, the epsilon of the denominator is 0 and
    `exp(16)` infinite. TorchScript cannot leave an autocast region; set the precision of a scripted model
    with `.half()`.

    Args:
        k, q, v: Keys, queries and values `(B, N, C)`.
        w: Random directions `(m, C)`.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  # alone, so that TorchScript skips what is inside
        if v.device.type != "meta" and torch.is_autocast_enabled(v.device.type):  # autocast knows no meta
            with torch.autocast(device_type=v.device.type, enabled=False):
                return _linear_attention(k, q, v, w)
    return _linear_attention(k, q, v, w)


class TokenPerformer(nn.Module):
    """Attention stage of linear cost: `(B, N, dim) -> (B, N, token_dim)`.

    It has one head. The skip path is the value, not the input, because the widths differ.

    Args:
        dim: Width of the input tokens.
        token_dim: Width after the fused projection to key, query and value (in that order).
        drop: Dropout after the attention's projection and after the MLP; always 0.1 in the reference.

    Attributes:
        w: Random directions `(m, token_dim)`, `m = token_dim // 2` orthogonal rows of norm `sqrt(m)`, in a
            buffer: drawn once, saved and loaded, not trained. (In the reference: a parameter without
            gradient.)
    """

    def __init__(
        self,
        dim: int,
        token_dim: int,
        drop: float = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = layer_norm(dim, **dd)
        self.kqv = nn.Linear(dim, 3 * token_dim, **dd)
        self.proj = nn.Linear(token_dim, token_dim, **dd)
        self.proj_drop = nn.Dropout(drop)
        self.norm2 = layer_norm(token_dim, **dd)
        self.mlp = Mlp(token_dim, drop=(0.0, drop), **dd)
        self.register_buffer("w", torch.empty(token_dim // 2, token_dim, **dd))
        self.reset_parameters()

    w: Tensor

    def reset_parameters(self) -> None:
        """Draw the random directions (timm calls this to initialise a whole model again)."""
        directions = torch.empty_like(self.w, dtype=torch.float32)  # float16 has no QR decomposition
        nn.init.orthogonal_(directions, gain=math.sqrt(self.w.shape[0]))
        self.w.copy_(directions)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        y = performer_attention(k, q, v, self.w)
        x = v + self.proj_drop(self.proj(y))
        x = x + self.mlp(self.norm2(x))
        return x


class TokenAttention(nn.Module):
    """Softmax attention with one head and another output width; the value is the skip path.

    The scale is `dim ** -0.5` for the *input* width, as in the reference.
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
        dim, token_dim: See `TokenPerformer`.
        drop: Dropout after the attention's projection and in the MLP; 0 in the reference.
    """

    def __init__(
        self,
        dim: int,
        token_dim: int,
        drop: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = layer_norm(dim, **dd)
        self.attn = TokenAttention(dim, token_dim, drop, **dd)
        self.norm2 = layer_norm(token_dim, **dd)
        self.mlp = Mlp(token_dim, drop=drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


_STAGES: dict[str, type[nn.Module]] = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(nn.Module):
    """Stem of T2T-ViT, in place of timm's `PatchEmbed`: `(B, in_chans, H, W) -> (B, N, embed_dim)`.

    It has three soft splits (7x7 stride 4, then twice 3x3 stride 2), an attention stage after each of the
    first two, and a linear projection. It accepts any image of at least 3 x 3 pixels, without padding.

    Args:
        img_size: Image side, or height and width, in pixels.
        patch_size: Product of the strides; only 16 is accepted.
        bias: Bias in the last projection.
        strict_img_size: Refuse images of other sizes than `img_size`.
        output_fmt: `None` for tokens, `"NHWC"` for `(B, height, width, embed_dim)`.
        dynamic_img_pad: Only `False` is accepted.
        tokens_type: Kind of the attention stages.
        token_dim: Width of the attention stages, at least 2.
        token_drop_rate: Dropout of the attention stages. `None`: the reference's (0.1 for the performer,
            else 0).

    Raises:
        ValueError: for an argument that is not accepted.
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
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if tokens_type not in _STAGES:
            raise ValueError(
                f"tokens_type {tokens_type!r} is not accepted; use {' or '.join(map(repr, _STAGES))}"
            )
        if token_dim < 2:
            raise ValueError(f"token_dim {token_dim} is not accepted; use at least 2")
        if output_fmt not in (None, "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not accepted; use None or 'NHWC'")
        if dynamic_img_pad:
            raise ValueError("dynamic_img_pad=True is not accepted; soft splits need no padding")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop = {} if token_drop_rate is None else {"drop": token_drop_rate}
        make_stage = partial(_STAGES[tokens_type], token_dim=token_dim, **drop, **dd)
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
        """Set the image size.

        Raises:
            ValueError: for another patch size, or an image without tokens.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(
                f"patch_size {patch_size} is not accepted; the strides of the soft splits make it 16"
            )
        if img_size is None:
            return
        size: tuple[int, int] = to_2tuple(img_size)
        if min(size) < 3:
            raise ValueError(
                f"img_size {img_size} is not accepted; use at least 3 pixels a side, for the 7x7 soft split"
            )
        self.img_size = size
        for split in (self.soft_split0, self.soft_split1, self.soft_split2):
            split.grid_size = size = split.dynamic_feat_size(size)
        self.grid_size = size
        self.num_patches = size[0] * size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the number of pixels per token, in each direction."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid (height, width) of the tokens of an image of `img_size`."""
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
