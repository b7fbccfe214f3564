// Rows of a map, staged for a convolution with a K x K kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "work.h"

namespace {

constexpr int COLUMNS = 4;           // outputs side by side, which share their loads
constexpr int SCRATCH = 192 * 1024;  // bytes of the staged rows of a unit of work, for second-level caches

// Columns of a staged row: padding on both sides, and room for the last group of outputs.
template <int K> int64_t span(const Shape& s) { return s.width + 2 * (K / 2) + COLUMNS; }

// Channels of which K staged rows fit into SCRATCH.
template <int K> int64_t staged_block_of(const Shape& s, int64_t threads) {
    return block_of(s, threads, SCRATCH / (4 * K * span<K>(s)));
}

// The K rows around one row of a map, with zeros around them. The columns of a vector of channels are side by side,
// because columns a whole token apart fall on the same few sets of a cache. Rows enter in order.
template <int K> struct Ring {
    float* rows;
    int64_t span, channels;
    float* row(int64_t i) const { return rows + (i + K) % K * span * channels; }
    float* inside(int64_t i) const { return row(i) + K / 2 * LANES; }
    int64_t at(int64_t j, int64_t v) const { return v * span + j * LANES; }  // column j, channels from v on
    void leave_out(int64_t i) const { clear(row(i), span * channels); }

    // Calls `stage(i)` for every row, to fill `inside(i)`, and `use(i)` once all rows around it are staged.
    template <class Stage, class Use> void pass(int64_t height, Stage stage, Use use) const {
        clear(rows, K * span * channels);
        for (int64_t i = -(K / 2); i < height; ++i) {
            const int64_t entering = i + K / 2;
            entering < height ? stage(entering) : leave_out(entering);
            if (i >= 0) use(i);
        }
    }
};

// Place of tap t of channel i: vectors of channels, tap by tap.
template <int K> int64_t tap(int64_t t, int64_t i) { return (i / LANES * K * K + t) * LANES + i % LANES; }

// Weights (D, K * K) in that order.
template <int K> std::vector<float> taps_of(const float* weight, int64_t channels, bool flipped) {
    std::vector<float> taps(channels * K * K);
    for (int64_t v = 0; v < channels; v += LANES)
        for (int t = 0; t < K * K; ++t) {
            const float* from = weight + v * K * K + (flipped ? K * K - 1 - t : t);
            Vec lanes;
            for (int lane = 0; lane < LANES; ++lane) lanes[lane] = from[lane * K * K];
            store(taps.data() + tap<K>(t, v), lanes);
        }
    return taps;
}

}  // namespace
