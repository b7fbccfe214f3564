// Depth-wise stages of the feed-forward network on a CPU, one pass through memory each.
//
// Maps are dense (B, N, D) tokens in raster order, in single precision. D is a multiple of 16. A unit of
// work is one image and one block of channels, or a part of an image's rows: what it sums goes to a place of its
// own, so results do not depend on the number of threads. Compiled on the machine that runs it (native_build.py),
// without any header of PyTorch. Headers are of this one file.

#include "depthwise.h"
#include "depthwise_backward.h"

extern "C" {

// y = act2(conv(act(x * scale + shift)) + bias), but not of prefix tokens, times the gate of `first` to `bias2` where
// these are not null. Where they are not null: its means over an image's tokens (B, D), without the gate, and its
// squares about them, which the gate would change. `y` may be `x`.
void localvit_depthwise(const float* x, const float* weight, const float* bias, const float* scale,
                        const float* shift, float* y, float* means, float* squares, const float* first,
                        const float* first_bias, const float* second, const float* second_bias, int64_t batch,
                        int64_t prefix, int64_t height, int64_t width, int64_t channels, int64_t reduced,
                        int64_t k, int64_t act, int64_t act2, int64_t threads) {
    const Shape s{batch, height, width, channels, prefix};
    const Affine affine{scale, shift};
    const Gate gate{first, first_bias, second, second_bias, reduced};
#define RUN(K, ACT, ACT2) \
    Depthwise<K, ACT, ACT2>{s, x, weight, bias, affine, y, means, squares, gate, act, act2}.run(threads)
    if (k == 3 && act == HARD_SWISH && act2 == HARD_SWISH) RUN(3, HARD_SWISH, HARD_SWISH);
    else if (k == 3 && act == HARD_SWISH && act2 == 0) RUN(3, HARD_SWISH, 0);
    else if (k == 3) RUN(3, ANY, ANY);
    else if (k == 5) RUN(5, ANY, ANY);
    else if (k == 7) RUN(7, ANY, ANY);
#undef RUN
}

// Means over an image's tokens (B, D), and squares about them.
void localvit_moments(const float* x, float* means, float* squares, int64_t batch, int64_t tokens,
                      int64_t channels, int64_t threads) {
    const Shape s{batch, 1, tokens, channels};
    for_units(s, block_of(s, threads, channels), 0, threads, [=](int64_t image, int64_t c, int64_t n, float*) {
        const float* in = x + image * tokens * channels + c;
        float* sum = means + image * channels + c;
        clear(sum, n);
        for_strips(tokens, n, [&](int64_t t, int64_t end, int64_t v) {
            Vec total{};
            for (; t < end; ++t) total += load(in + t * channels + v);
            add(sum + v, total);
        });
        to_mean(s, sum, n);
        about_mean(tokens, channels, in, sum, squares + image * channels + c, n);
    });
}

// y = act(x * scale + shift) * gate, where `gate` (B, D) and `y` are given; means over an image's tokens of the
// value without the gate, where `means` (B, D) is.
void localvit_activated(const float* x, const float* scale, const float* shift, const float* gate, float* y,
                        float* means, int64_t batch, int64_t tokens, int64_t channels, int64_t act,
                        int64_t threads) {
    const Shape s{batch, 1, tokens, channels};
    const Affine affine{scale, shift};
    for_units(s, block_of(s, threads, channels), 0, threads, [=](int64_t image, int64_t c, int64_t n, float*) {
        const int64_t start = image * tokens * channels + c, channel = image * channels + c;
        if (means) clear(means + channel, n);
        for_strips(tokens, n, [&](int64_t t, int64_t end, int64_t v) {
            const Vec factor = gate ? load(gate + channel + v) : of(1.0f);
            Vec total{};
            for (; t < end; ++t) {
                const int64_t at = start + t * channels + v;
                const Vec value = activate(affine(load(x + at), c + v), act);
                total += value;
                if (y) store(y + at, value * factor);
            }
            if (means) add(means + channel + v, total);
        });
        if (means) to_mean(s, means + channel, n);
    });
}

// Five sums over an image's tokens (5, B, D), with n = x * scale + shift, a = act'(n) and
// z = (x - mean) * deviation: grad * act(n), a * grad, a, a * grad * z, a * z.
void localvit_gate_sums(const float* grad, const float* x, const float* scale,
                        const float* shift, const float* mean, const float* deviation, float* out,
                        int64_t batch, int64_t tokens, int64_t channels, int64_t act, int64_t threads) {
    const Shape s{batch, 1, tokens, channels};
    const Affine affine{scale, shift};
    for_units(s, block_of(s, threads, channels), 0, threads, [=](int64_t image, int64_t c, int64_t n, float*) {
        const int64_t start = image * tokens * channels + c;
        const float *g = grad + start, *in = x + start;
        float* sums[5];
        for (int i = 0; i < 5; ++i) {
            sums[i] = out + (i * batch + image) * channels + c;
            clear(sums[i], n);
        }
        for_strips(tokens, n, [&](int64_t t, int64_t end, int64_t v) {
            const Vec middle = load(mean + c + v), dev = load(deviation + c + v);
            Vec s0{}, s1{}, s2{}, s3{}, s4{};
            for (; t < end; ++t) {
                const Vec value = load(in + t * channels + v), above = load(g + t * channels + v);
                const Vec normal = affine(value, c + v), a = slope(normal, act);
                const Vec z = a * (value - middle) * dev;
                s0 += above * activate(normal, act);
                s1 += a * above;
                s2 += a;
                s3 += above * z;
                s4 += z;
            }
            add(sums[0] + v, s0), add(sums[1] + v, s1), add(sums[2] + v, s2);
            add(sums[3] + v, s3), add(sums[4] + v, s4);
        });
    });
}

// `grad`, from that of the gated map to that of the normalised expanded one; per image its sums and its
// sums times the standardised map, and the gradient of the weight (B, D, k, k).
void localvit_depthwise_backward(float* grad, const float* x, const float* below,
                                 const float* weight, const float* factor, const float* term,
                                 const float* scale2, const float* shift2, const float* by_grad,
                                 const float* by_x, const float* rest, const float* scale, const float* shift,
                                 const float* mean, const float* deviation, float* total,
                                 float* moment, float* taps, int64_t batch, int64_t height, int64_t width,
                                 int64_t channels, int64_t k, int64_t act, int64_t act2, int64_t threads) {
    const Shape s{batch, height, width, channels};
    const Affine first{scale, shift}, second{scale2, shift2};
#define RUN(K)                                                                                             \
    DepthwiseBackward<K>{s, grad, x, below, weight, factor, term, second, by_grad, by_x, rest, first, \
                         mean, deviation, total, moment, taps, act, act2}                              \
        .run(threads)
    if (k == 3) RUN(3);
    else if (k == 5) RUN(5);
    else if (k == 7) RUN(7);
#undef RUN
}

// grad = grad * by_grad + x * by_x + rest, the last step through a norm by the statistics of the batch.
void localvit_combine(float* grad, const float* x, const float* by_grad, const float* by_x, const float* rest,
                      int64_t batch, int64_t tokens, int64_t channels, int64_t threads) {
    const Shape s{batch, 1, tokens, channels};
    for_units(s, block_of(s, threads, channels), 0, threads, [=](int64_t image, int64_t c, int64_t n, float*) {
        for_strips(tokens, n, [&](int64_t t, int64_t end, int64_t v) {
            const Vec by_g = load(by_grad + c + v), by = load(by_x + c + v), constant = load(rest + c + v);
            for (; t < end; ++t) {
                const int64_t at = (image * tokens + t) * channels + c + v;
                store(grad + at, load(grad + at) * by_g + load(x + at) * by + constant);
            }
        });
    });
}

}  // extern "C"
