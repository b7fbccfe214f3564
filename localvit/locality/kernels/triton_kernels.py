"""Device code in Triton. Maps are (B, N, D) tokens in raster order, channels innermost and dense.

A program takes one image (or one of ``SPLITS`` parts of it) and ``BLOCK_D`` channels, and goes through its
tokens ``BLOCK_N`` at a time. What it sums, it sums in float32 in a fixed order and writes to a place of its
own; the host adds those up. So there are no atomics and results are the same from run to run.

Imported only where Triton is. Activations are numbers, because kernels are specialised on integers:
0 none, 1 ReLU, 2 ReLU6, 3 hard swish, 4 SiLU.
"""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACT: tl.constexpr):
    if ACT == 1:
        x = tl.maximum(x, 0.0)
    elif ACT == 2:
        x = tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif ACT == 3:
        x = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif ACT == 4:
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def slope(x, ACT: tl.constexpr):
    """Derivative of the activation; at corners as in PyTorch."""
    y = x * 0.0 + 1.0
    if ACT == 1:
        y = tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == 2:
        y = tl.where((x > 0.0) & (x < 6.0), 1.0, 0.0)
    elif ACT == 3:
        y = tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x / 3.0 + 0.5, 1.0))
    elif ACT == 4:
        s = 1.0 / (1.0 + tl.exp(-x))
        y = s * (1.0 + x * (1.0 - s))
    return y


@triton.jit
def depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale2_ptr, shift2_ptr, y_ptr, first_ptr, second_ptr,
    stride_x, N, D, HEIGHT, WIDTH, SPLITS,
    K: tl.constexpr, ACT: tl.constexpr, ACT2: tl.constexpr, FINISH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = conv(act(x * scale + shift)) + bias, and per program its sums and squares about its own mean.

    With FINISH, y is normalised and activated once more on its way out, and only sums are written.
    """
    part, d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    image, split = (part // SPLITS).to(tl.int64), part % SPLITS
    in_d = d < D
    scale, shift = tl.load(scale_ptr + d, in_d, 0.0), tl.load(shift_ptr + d, in_d, 0.0)
    bias = tl.load(bias_ptr + d, in_d, 0.0)
    count = tl.full([], 0.0, tl.float32)
    mean, squares = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(split * BLOCK_N, N, SPLITS * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        row, column, in_n = n // WIDTH, n % WIDTH, n < N
        y = tl.zeros([BLOCK_N, BLOCK_D], tl.float32) + bias[None, :]
        for tap in tl.static_range(K * K):
            r, c = row + tap // K - K // 2, column + tap % K - K // 2
            inside = in_n & (r >= 0) & (r < HEIGHT) & (c >= 0) & (c < WIDTH)
            mask = inside[:, None] & in_d[None, :]
            x = tl.load(x_ptr + image * stride_x + (r * WIDTH + c)[:, None] * D + d[None, :], mask, 0.0)
            x = activate(x.to(tl.float32) * scale[None, :] + shift[None, :], ACT)
            w = tl.load(weight_ptr + d * K * K + tap, in_d, 0.0).to(tl.float32)
            y += tl.where(mask, x, 0.0) * w[None, :]  # the border is zero behind the activation
        mask = in_n[:, None] & in_d[None, :]
        if FINISH:
            scale2, shift2 = tl.load(scale2_ptr + d, in_d, 0.0), tl.load(shift2_ptr + d, in_d, 0.0)
            y = activate(y * scale2[None, :] + shift2[None, :], ACT2)
        y = y.to(y_ptr.dtype.element_ty)  # the sums are of what is written
        tl.store(y_ptr + (image * N + n[:, None]) * D + d[None, :], y, mask)
        y = tl.where(mask, y.to(tl.float32), 0.0)
        here = tl.minimum(N - start, BLOCK_N).to(tl.float32)
        mean_here = tl.sum(y, 0) / here
        about = tl.where(mask, y - mean_here[None, :], 0.0)
        delta = mean_here - mean
        squares += tl.sum(about * about, 0) + delta * delta * (count * here / (count + here))
        mean += delta * (here / (count + here))
        count += here
    tl.store(first_ptr + part * D + d, mean * count, in_d)
    if not FINISH:
        tl.store(second_ptr + part * D + d, squares, in_d)


@triton.jit
def gate_sums_kernel(
    grad_ptr, x_ptr, scale_ptr, shift_ptr, mean_ptr, deviation_ptr, out_ptr, stride_grad, N, D, B,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Five sums over an image's tokens (5, B, D), with n = x * scale + shift, a = act'(n), z = (x - mean) *
    deviation: grad * act(n), a * grad, a, a * grad * z, a * z."""
    image, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    scale, shift = tl.load(scale_ptr + d, in_d, 0.0), tl.load(shift_ptr + d, in_d, 0.0)
    mean, deviation = tl.load(mean_ptr + d, in_d, 0.0), tl.load(deviation_ptr + d, in_d, 0.0)
    s0, s1 = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    s2, s3, s4 = s0, s0, s0
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & in_d[None, :]
        offsets = n[:, None] * D + d[None, :]
        grad = tl.load(grad_ptr + image * stride_grad + offsets, mask, 0.0).to(tl.float32)
        x = tl.load(x_ptr + image * N * D + offsets, mask, 0.0).to(tl.float32)
        normal = x * scale[None, :] + shift[None, :]
        a = tl.where(mask, slope(normal, ACT), 0.0)
        z = (x - mean[None, :]) * deviation[None, :]
        s0 += tl.sum(grad * activate(normal, ACT), 0)
        s1 += tl.sum(a * grad, 0)
        s2 += tl.sum(a, 0)
        s3 += tl.sum(a * grad * z, 0)
        s4 += tl.sum(a * z, 0)
    at = out_ptr + image * D + d
    tl.store(at, s0, in_d)
    tl.store(at + B * D, s1, in_d)
    tl.store(at + 2 * B * D, s2, in_d)
    tl.store(at + 3 * B * D, s3, in_d)
    tl.store(at + 4 * B * D, s4, in_d)


@triton.jit
def depthwise_backward_kernel(
    grad_ptr, x_ptr, below_ptr, weight_ptr, factor_ptr, term_ptr, scale2_ptr, shift2_ptr,
    by_grad_ptr, by_x_ptr, rest_ptr, scale_ptr, shift_ptr, mean_ptr, deviation_ptr,
    out_ptr, sums_ptr, taps_ptr, stride_grad, N, D, HEIGHT, WIDTH, SPLITS, PARTS,
    K: tl.constexpr, TAPS: tl.constexpr, ACT: tl.constexpr, ACT2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Back through act2, norm 2, the convolution and act 1, with everything in between recomputed.

    ``x`` is the convolved map, ``below`` the expanded one. Writes the gradient of the normalised expanded
    map; per program its sum and its sum times the standardised map (sums); and the weight's (taps). TAPS
    is K * K rounded up to a power of two, the size of the block that the weight's gradient is summed in.
    """
    part, d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    image, split = (part // SPLITS).to(tl.int64), part % SPLITS
    in_d = d < D
    scale2, shift2 = tl.load(scale2_ptr + d, in_d, 0.0), tl.load(shift2_ptr + d, in_d, 0.0)
    by_grad, by_x = tl.load(by_grad_ptr + d, in_d, 0.0), tl.load(by_x_ptr + d, in_d, 0.0)
    rest = tl.load(rest_ptr + d, in_d, 0.0)
    scale, shift = tl.load(scale_ptr + d, in_d, 0.0), tl.load(shift_ptr + d, in_d, 0.0)
    mean, deviation = tl.load(mean_ptr + d, in_d, 0.0), tl.load(deviation_ptr + d, in_d, 0.0)
    factor = tl.load(factor_ptr + image * D + d, in_d, 0.0)
    term = tl.load(term_ptr + image * D + d, in_d, 0.0)
    total, moment = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    taps, numbers = tl.zeros([TAPS, BLOCK_D], tl.float32), tl.arange(0, TAPS)
    for start in range(split * BLOCK_N, N, SPLITS * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        row, column, in_n = n // WIDTH, n % WIDTH, n < N
        mask = in_n[:, None] & in_d[None, :]
        below = tl.load(below_ptr + (image * N + n[:, None]) * D + d[None, :], mask, 0.0).to(tl.float32)
        normal = below * scale[None, :] + shift[None, :]
        hidden = tl.where(mask, activate(normal, ACT), 0.0)
        back = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for tap in tl.static_range(K * K):
            r, c = row - tap // K + K // 2, column - tap % K + K // 2
            inside = in_n & (r >= 0) & (r < HEIGHT) & (c >= 0) & (c < WIDTH)
            there = inside[:, None] & in_d[None, :]
            offsets = (r * WIDTH + c)[:, None] * D + d[None, :]
            grad = tl.load(grad_ptr + image * stride_grad + offsets, there, 0.0).to(tl.float32)
            x = tl.load(x_ptr + image * N * D + offsets, there, 0.0).to(tl.float32)
            a = slope(x * scale2[None, :] + shift2[None, :], ACT2)
            grad = a * (grad * factor[None, :] + term[None, :]) * by_grad[None, :]
            grad = tl.where(there, grad + x * by_x[None, :] + rest[None, :], 0.0)
            w = tl.load(weight_ptr + d * K * K + tap, in_d, 0.0).to(tl.float32)
            back += grad * w[None, :]
            taps += tl.where((numbers == tap)[:, None], tl.sum(hidden * grad, 0)[None, :], 0.0)
        back = tl.where(mask, back * slope(normal, ACT), 0.0)
        tl.store(out_ptr + (image * N + n[:, None]) * D + d[None, :], back.to(out_ptr.dtype.element_ty), mask)
        total += tl.sum(back, 0)
        moment += tl.sum(back * (below - mean[None, :]) * deviation[None, :], 0)
    tl.store(sums_ptr + part * D + d, total, in_d)
    tl.store(sums_ptr + (PARTS + part) * D + d, moment, in_d)
    at = taps_ptr + (part * K * K + numbers[:, None]) * D + d[None, :]
    tl.store(at, taps, (numbers < K * K)[:, None] & in_d[None, :])


@triton.jit
def gated_projection_kernel(
    x_ptr, scale_ptr, shift_ptr, gate_ptr, weight_ptr, out_ptr, ROWS, N, D, C,
    ACT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (ROWS, C) = (act(x * scale + shift) * gate) @ weight^T; gate (B, D) is that of a row's image.

    With WIDE the product is taken in float32, because Triton's interpreter has none in bfloat16.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_m, in_c, image = m < ROWS, c < C, m // N
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        mask = in_m[:, None] & in_d[None, :]
        scale, shift = tl.load(scale_ptr + d, in_d, 0.0), tl.load(shift_ptr + d, in_d, 0.0)
        x = tl.load(x_ptr + m.to(tl.int64)[:, None] * D + d[None, :], mask, 0.0)
        gate = tl.load(gate_ptr + image[:, None] * D + d[None, :], mask, 0.0)
        value = activate(x.to(tl.float32) * scale[None, :] + shift[None, :], ACT) * gate
        weight = tl.load(weight_ptr + c[None, :] * D + d[:, None], in_c[None, :] & in_d[:, None], 0.0)
        value = value.to(weight.dtype)
        if WIDE:
            value, weight = value.to(tl.float32), weight.to(tl.float32)
        total += tl.dot(value, weight, input_precision="ieee")
    mask = in_m[:, None] & in_c[None, :]
    at = out_ptr + m.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask)
