// The depth-wise stage, forward.
#pragma once

#include <cstdint>
#include <vector>

#include "gate.h"
#include "norm.h"
#include "rows.h"

namespace {

// One call, in the order of `Mix.call` in mix.py: every field takes eight bytes. The maps depend on the function.
struct Arguments {
    Shape s;
    int64_t k, act, act2, threads;
    Norm norm1;
    const float *weight, *bias;  // of the convolution: (D, k * k), (D)
    Norm norm2;
    Gate gate;
    float* pooled;  // (B, D): input of the gate
    float* maps[14];

    // Multiplies the gate's values into one image; `pooled` is known.
    void apply_gate(float* y, int64_t image) const {
        const int64_t n = s.channels;
        std::vector<float> squeezed(gate.reduced), values(n);
        float *out = y + s.start(image), *value = values.data();
        gate.values(pooled + image * n, n, squeezed.data(), value);
        for (int64_t t = 0; t < s.tokens(); ++t)
            for (int64_t v = 0; v < n; v += LANES) store(out + t * n + v, load(out + t * n + v) * load(value + v));
    }
};

// A convolution of act(x by norm 1) to `y`, with means and squares about them (B, D); squares may be null. `y` may be
// `x`: rows are staged before they are overwritten. With FINAL, `y` is the output of the whole stage, for norms whose
// statistics are known.
template <int K, bool FINAL> struct Depthwise {
    const Arguments& a;
    const float* x;
    float *y, *means, *squares;
    const Shape& s = a.s;
    const std::vector<float> taps = taps_of<K>(a.weight, a.s.channels, false);

    void stage(float* to, const float* from, int64_t c, int64_t n) const {
        const int64_t act = a.act, stride = s.channels, span_ = span<K>(s);
        for_strips(s.width, n, [=](int64_t j, int64_t end, int64_t v) {
            const Vec scale = load(a.norm1.scale + c + v), shift = load(a.norm1.shift + c + v);
            for (; j < end; ++j)
                store(to + v * span_ + j * LANES, activate(load(from + j * stride + v) * scale + shift, act));
        });
    }

    void row(const Ring<K>& ring, float* out, int64_t i, int64_t c, float* sum) const {
        const float* in[K];
        for (int d = 0; d < K; ++d) in[d] = ring.row(i + d - K / 2);
        for (int64_t v = 0; v < ring.channels; v += LANES) {
            const Vec scale = load(a.norm2.scale + c + v), shift = load(a.norm2.shift + c + v);
            const Vec start = a.bias ? load(a.bias + c + v) : Vec{};
            Vec total{};
            for (int64_t j = 0; j < s.width; j += COLUMNS) {
                Vec o[COLUMNS] = {start, start, start, start};
                const auto taps_row = [&](int dy) INLINE_LAMBDA {
                    const float* from = in[dy] + ring.at(j, v);
                    Vec w[K];
#pragma GCC unroll 8
                    for (int dx = 0; dx < K; ++dx) w[dx] = load(taps.data() + tap<K>(dy * K + dx, c + v));
#pragma GCC unroll 16
                    for (int t = 0; t < K + COLUMNS - 1; ++t) {
                        const Vec value = load(from + t * LANES);
#pragma GCC unroll 8
                        for (int q = 0; q < COLUMNS; ++q)
                            if (t - q >= 0 && t - q < K) o[q] += value * w[t - q];
                    }
                };
                if constexpr (K == 3) {
                    taps_row(0), taps_row(1), taps_row(2);
                } else {  // unrolled as well, these are slower
#pragma GCC unroll 1
                    for (int dy = 0; dy < K; ++dy) taps_row(dy);
                }
#pragma GCC unroll 8
                for (int q = 0; q < COLUMNS; ++q)
                    if (j + q < s.width) {
                        const Vec value = FINAL ? activate(o[q] * scale + shift, a.act2) : o[q];
                        store(out + (j + q) * s.channels + v, value);
                        total += value;
                    }
            }
            add(sum + v, total);
        }
    }

    void unit(int64_t image, int64_t c, int64_t n, float* scratch) const {
        const Ring<K> ring{scratch, span<K>(s), n};
        const int64_t start = s.start(image) + c, line = s.width * s.channels;
        float* mean = means + image * s.channels + c;
        clear(mean, n);
        ring.pass(
            s.height, [&](int64_t i) { stage(ring.inside(i), x + start + i * line, c, n); },
            [&](int64_t i) { row(ring, y + start + i * line, i, c, mean); });
        to_mean(s, mean, n);
        if (FINAL && n == s.channels && a.gate.kind != NO_GATE) a.apply_gate(y, image);  // it is in the cache
        if (squares) about_mean(s.tokens(), s.channels, y + start, mean, squares + image * s.channels + c, n);
    }

    void run() const {
        const int64_t block = staged_block_of<K>(s, a.threads), floats = K * span<K>(s) * block;
        for_units(s, block, floats, a.threads,
                  [this](int64_t image, int64_t c, int64_t n, float* p) { unit(image, c, n, p); });
        if (!FINAL || block >= s.channels || a.gate.kind == NO_GATE) return;
        for_units(s, s.channels, 0, a.threads, [this](int64_t image, int64_t, int64_t, float*) { a.apply_gate(y, image); });
    }
};

}  // namespace
