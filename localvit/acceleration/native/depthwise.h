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
    float* maps[16];
};

constexpr int64_t PARTS = 8;  // bands of an image's rows: sums are taken in each, and so many threads may share it

// Whether threads share each image by its bands: where that is faster, although it costs an eighth, than giving each
// thread its own images.
bool shared(int64_t batch, int64_t threads) {
    const int64_t rounds = (batch + threads - 1) / threads;
    return 7 * rounds * smaller(threads, PARTS) > 8 * batch;
}

// A convolution of `x` by norm 1, to `y`, with means and squares (B, D) where they are not null. `y` may be `x`: rows
// that another thread overwrites are staged before any row is written.
struct Convolution {
    const Arguments& a;
    const float *x, *weight, *bias;
    float *y, *means, *squares;
    bool gated;
};

// With constant activations ACT and ACT2 (the paper's) or any: without branches it is an eighth faster.
template <int K, int64_t ACT, int64_t ACT2> struct Depthwise : Convolution {
    int64_t act2;
    const Shape& s = a.s;

    Depthwise(const Convolution& c, int64_t last) : Convolution(c), act2(last) {}

    // Memory of one thread; threads that share an image have `sums` (PARTS, D) in common.
    struct Desk {
        float *rows, *taps, *sums, *mean, *factor, *squeezed;
        int64_t first = -1, channels = 0;  // the block that rows and taps are laid out for

        static int64_t floats(const Shape& s, int64_t block, int64_t reduced) {
            return (Ring<K>::ROWS * span<K>(s) + K * K) * block + (PARTS + 2) * s.channels + reduced;
        }
        Desk(const Shape& s, int64_t block, float* memory)
            : rows(memory), taps(rows + Ring<K>::ROWS * span<K>(s) * block), sums(taps + K * K * block),
              mean(sums + PARTS * s.channels), factor(mean + s.channels), squeezed(factor + s.channels) {}
    };

    int64_t top(int64_t part) const { return s.height * part / PARTS; }

    void enter(const Ring<K>& ring, int64_t image, int64_t i, int64_t c) const {
        if (i < 0 || i >= s.height) return ring.leave_out(i);
        float* to = ring.inside(i);
        const float* from = x + s.start(image) + i * s.width * s.channels + c;
        for_strips(s.width, ring.channels, [&](int64_t j, int64_t end, int64_t v) {
            const Vec scale = load(a.norm1.scale + c + v), shift = load(a.norm1.shift + c + v);
            for (; j < end; ++j) {
                const Vec value = load(from + j * s.channels + v) * scale + shift;
                store(to + ring.at(j, v), activate(value, ACT == ANY ? a.act : ACT));
            }
        });
    }

    void row(const Ring<K>& ring, int64_t image, int64_t i, const float* taps, int64_t c, float* sum) const {
        const int64_t width = s.width, n = ring.channels;
        float* out = y + s.start(image) + i * width * s.channels + c;
        const float* in[K];
        for (int d = 0; d < K; ++d) in[d] = ring.row(i + d - K / 2);
        for (int64_t v = 0; v < n; v += LANES) {
            const Vec start = bias ? load(bias + c + v) : Vec{};
            Vec total{};
            for (int64_t j = 0; j < width; j += COLUMNS) {
                Vec o[COLUMNS] = {start, start, start, start};
                const auto taps_row = [&](int dy) INLINE_LAMBDA {
                    const float* from = in[dy] + ring.at(j, v);
                    Vec w[K];
#pragma GCC unroll 8
                    for (int dx = 0; dx < K; ++dx) w[dx] = load(taps + tap<K>(dy * K + dx, v));
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
                    if (j + q < width) {
                        const Vec value = activate(o[q], ACT2 == ANY ? act2 : ACT2);
                        store(out + (j + q) * s.channels + v, value);
                        total += value;
                    }
            }
            add(sum + v, total);
        }
    }

    // Convolves this thread's bands of a block of channels.
    void band(const Team& team, Desk& desk, int64_t image, int64_t c, int64_t n) const {
        const int64_t first = top(team.first(PARTS)), end = top(team.end(PARTS)), reach = K / 2;
        const Ring<K> ring{desk.rows, span<K>(s), n, end};
        if (desk.channels != n) ring.reset(s.width);
        if (desk.channels != n || desk.first != c) taps_of<K>(weight, c, n, false, desk.taps);
        desk.channels = n, desk.first = c;
        for (int64_t i = first - reach; i < smaller(first + reach, end); ++i) enter(ring, image, i, c);
        for (int64_t i = end; i < end + reach; ++i) enter(ring, image, i, c);
        team.wait();
        for (int64_t part = team.first(PARTS); part < team.end(PARTS); ++part) {
            float* sum = desk.sums + part * s.channels + c;
            clear(sum, n);
            for (int64_t i = top(part); i < top(part + 1); ++i) {
                if (i + reach < end) enter(ring, image, i + reach, c);
                row(ring, image, i, desk.taps, c, sum);
            }
        }
    }

    // The sum over the bands (n).
    void total_of(const float* sums, float* out) const {
        for (int64_t v = 0; v < s.channels; v += LANES) {
            Vec total{};
            for (int64_t part = 0; part < PARTS; ++part) total += load(sums + part * s.channels + v);
            store(out + v, total);
        }
    }

    // Computes what needs the means of the whole image.
    void finish(const Team& team, const Desk& desk, int64_t image) const {
        const int64_t n = s.channels;
        float* out = y + s.start(image);
        team.wait();
        total_of(desk.sums, desk.mean);
        to_mean(s, desk.mean, n);
        if (means && team.rank == 0)
            for (int64_t v = 0; v < n; v += LANES) store(means + image * n + v, load(desk.mean + v));
        if (gated && a.gate.kind != NO_GATE) {
            a.gate.values(desk.mean, n, desk.squeezed, desk.factor);
            for (int64_t t = top(team.first(PARTS)) * s.width; t < top(team.end(PARTS)) * s.width; ++t)
                for (int64_t v = 0; v < n; v += LANES)
                    store(out + t * n + v, load(out + t * n + v) * load(desk.factor + v));
        }
        if (!squares) return;
        team.wait();  // until all have read the sums
        for (int64_t part = team.first(PARTS); part < team.end(PARTS); ++part) {
            const int64_t first = top(part) * s.width, tokens = top(part + 1) * s.width - first;
            about_mean(tokens, n, out + first * n, desk.mean, desk.sums + part * n, n);
        }
        team.wait();
        if (team.rank == 0) total_of(desk.sums, squares + image * n);
    }

    void run() const {
        const int64_t block = staged_block_of<K>(s, 1), floats = Desk::floats(s, block, a.gate.reduced);
        const bool together = shared(s.batch, a.threads);
        float* common = Desk(s, block, scratch_of(floats)).sums;
        for_team(together ? smaller(a.threads, PARTS) : a.threads, [&](const Team& all) {
            Desk desk(s, block, scratch_of(floats));
            if (together) desk.sums = common;
            const Team alone{0, 1}, team = together ? all : alone, share = together ? alone : all;
            for (int64_t image = share.first(s.batch); image < share.end(s.batch); ++image) {
                for (int64_t c = 0; c < s.channels; c += block)
                    band(team, desk, image, c, smaller(block, s.channels - c));
                finish(team, desk, image);
            }
        });
    }
};

}  // namespace
