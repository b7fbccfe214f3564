// The depth-wise stage, backward.
#pragma once

#include <cstdint>
#include <vector>

#include "depthwise.h"

namespace {

// From the gradient of the gated map to that of the normalised expanded one; what lies between is computed again.
template <int K> struct DepthwiseBackward {
    const Arguments& a;
    const float* grad;
    float* out;
    const float *x, *below, *factor, *term;
    const Norm::Back& back2;
    float *total, *moment, *of_weight;
    const Shape& s = a.s;
    const std::vector<float> taps = taps_of<K>(a.weight, a.s.channels, true);

    // Gradient of the convolved map.
    void stage(const Ring<K>& ring, float* to, const float* g, const float* in, int64_t image, int64_t c) const {
        const int64_t map = image * s.channels + c;
        for_strips(s.width, ring.channels, [&](int64_t j, int64_t end, int64_t v) {
            const Vec by_grad = load(a.norm2.scale + c + v), shift = load(a.norm2.shift + c + v);
            const Vec by_x = load(back2.by_x.data() + c + v), rest = load(back2.rest.data() + c + v);
            const Vec scale = load(factor + map + v) * by_grad, constant = load(term + map + v) * by_grad;
            for (; j < end; ++j) {
                const Vec value = load(in + j * s.channels + v);
                const Vec above = load(g + j * s.channels + v) * scale + constant;
                store(to + ring.at(j, v), slope(value * by_grad + shift, a.act2) * above + value * by_x + rest);
            }
        });
    }

    // `taps` are flipped, and so is `sum`, where the gradient of the weight is summed.
    void row(const Ring<K>& ring, int64_t i, int64_t image, int64_t c, float* sum) const {
        const int64_t n = ring.channels, start = s.start(image) + i * s.width * s.channels + c;
        const float* in[K];
        for (int d = 0; d < K; ++d) in[d] = ring.row(i + d - K / 2);
        for (int64_t v = 0; v < n; v += LANES) {
            const Vec middle = load(a.norm1.mean + c + v), rstd = load(a.norm1.rstd + c + v);
            const Vec scale = load(a.norm1.scale + c + v), shift = load(a.norm1.shift + c + v);
            Vec of_taps[K * K] = {}, of_bias{}, of_scale{};
            for (int64_t j = 0; j < s.width; ++j) {
                const int64_t at = start + j * s.channels + v;
                const Vec under = load(below + at), normal = under * scale + shift;
                const Vec hidden = activate(normal, a.act);
                Vec back{};
#pragma GCC unroll 8
                for (int dy = 0; dy < K; ++dy)
#pragma GCC unroll 8
                    for (int dx = 0; dx < K; ++dx) {
                        const Vec value = load(in[dy] + ring.at(j + dx, v));
                        back += value * load(taps.data() + tap<K>(dy * K + dx, c + v));
                        of_taps[dy * K + dx] += value * hidden;
                    }
                back *= slope(normal, a.act);
                store(out + at, back);
                of_bias += back;
                of_scale += back * (under - middle) * rstd;
            }
            const int64_t channel = image * s.channels + c + v;
            add(total + channel, of_bias);
            add(moment + channel, of_scale);
            for (int t = 0; t < K * K; ++t) add(sum + tap<K>(t, v), of_taps[t]);
        }
    }

    void unit(int64_t image, int64_t c, int64_t n, float* scratch) const {
        const Ring<K> ring{scratch, span<K>(s), n};
        float* sum = scratch + K * ring.span * n;
        const int64_t start = s.start(image) + c, line = s.width * s.channels;
        clear(sum, K * K * n);
        clear(total + image * s.channels + c, n);
        clear(moment + image * s.channels + c, n);
        ring.pass(
            s.height,
            [&](int64_t i) { stage(ring, ring.inside(i), grad + start + i * line, x + start + i * line, image, c); },
            [&](int64_t i) { row(ring, i, image, c, sum); });
        for (int t = 0; t < K * K; ++t)  // (B, D, K * K)
            for (int64_t v = 0; v < n; ++v)
                of_weight[(image * s.channels + c + v) * K * K + K * K - 1 - t] = sum[tap<K>(t, v)];
    }

    void run() const {
        const int64_t block = staged_block_of<K>(s, a.threads), floats = (K * span<K>(s) + K * K) * block;
        for_units(s, block, floats, a.threads,
                  [this](int64_t image, int64_t c, int64_t n, float* p) { unit(image, c, n, p); });
    }
};

}  // namespace
