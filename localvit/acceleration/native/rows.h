// Rows of a map around one of them, staged for a convolution; K is the side of its kernel.
#pragma once

#include <cstdint>

#include "work.h"

namespace {

constexpr int COLUMNS = 4;           // outputs side by side, which share what they load
constexpr int SCRATCH = 192 * 1024;  // bytes of the rows that a unit of work keeps, for second-level caches

// Columns of a staged row: padding on both sides, and room for the last group of outputs.
template <int K> int64_t span(const Shape& s) { return s.width + 2 * (K / 2) + COLUMNS; }

// As many as let K staged rows fit into SCRATCH.
template <int K> int64_t staged_block_of(const Shape& s, int64_t threads) {
    return block_of(s, threads, SCRATCH / (4 * K * span<K>(s)));
}

// The K rows around one row of a map, staged with zeros around them: for each vector of channels its columns side by
// side, since columns a whole token apart fall on the same few sets of a cache. Rows enter in order. Those from `end`
// on have places of their own: where another thread is about to write them, they enter before all others.
template <int K> struct Ring {
    static constexpr int64_t ROWS = K + K / 2;
    float* rows;
    int64_t span, channels, end;
    float* row(int64_t i) const { return rows + (i < end ? (i + K) % K : K + i - end) * span * channels; }
    float* inside(int64_t i) const { return row(i) + K / 2 * LANES; }
    int64_t at(int64_t j, int64_t v) const { return v * span + j * LANES; }  // column j, channels from v on
    void reset(int64_t width) const {  // around what `inside` is
        for (float* column = rows; column < rows + ROWS * span * channels; column += span * LANES) {
            clear(column, K / 2 * LANES);
            clear(column + (K / 2 + width) * LANES, (span - K / 2 - width) * LANES);
        }
    }
    void leave_out(int64_t i) const { clear(row(i), span * channels); }
};

// Of the tap t of channel i: vectors of channels, tap by tap.
template <int K> int64_t tap(int64_t t, int64_t i) { return (i / LANES * K * K + t) * LANES + i % LANES; }

// (D, K * K) to that order, from channel c on.
template <int K> void taps_of(const float* weight, int64_t c, int64_t channels, bool flipped, float* out) {
    for (int64_t v = 0; v < channels; v += LANES)
        for (int t = 0; t < K * K; ++t) {
            const float* from = weight + (c + v) * K * K + (flipped ? K * K - 1 - t : t);
            Vec taps;
            for (int lane = 0; lane < LANES; ++lane) taps[lane] = from[lane * K * K];
            store(out + tap<K>(t, v), taps);
        }
}

}  // namespace
