// Maps of tokens: how the work on them is divided among threads, and sums over their tokens.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "vectors.h"

namespace {

constexpr int64_t STRIP = 8;  // tokens in one pass over the channels: as many streams are prefetched

struct Shape {
    int64_t batch, height, width, channels;
    int64_t tokens() const { return height * width; }
    int64_t start(int64_t image) const { return image * tokens() * channels; }
    int64_t maps() const { return batch * channels; }
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Channels of a unit of work. All, because tokens are read faster as a whole. Where images are few, each thread gets a
// share. Two threads do not share one image so: each would prefetch the channels that the other writes.
int64_t block_of(const Shape& s, int64_t threads, int64_t most) {
    const bool whole = s.batch >= 4 * threads || (s.batch == 1 && threads == 2);
    const int64_t vectors = s.channels / LANES, shares = whole ? 1 : threads;
    const int64_t block = smaller((vectors + shares - 1) / shares, most / LANES) * LANES;
    return block < LANES ? LANES : block;
}

// Uninitialised memory of this thread. It stays allocated: allocation takes as long as the work on a small map.
float* scratch_of(int64_t floats) {
    static thread_local struct Owner {
        void* memory = nullptr;
        int64_t bytes = 0;
        ~Owner() { free(memory); }
    } owner;
    const int64_t line = 64, bytes = (floats * sizeof(float) / line + 1) * line;
    if (owner.bytes < bytes) {
        free(owner.memory);
        owner.memory = aligned_alloc(line, bytes);
        owner.bytes = owner.memory ? bytes : 0;
        if (!owner.memory) throw std::bad_alloc();
    }
    return static_cast<float*>(owner.memory);
}

// Calls `work(image, first channel, channels, scratch)` for every unit of work, with `floats` of scratch memory.
template <class Work> void for_units(const Shape& s, int64_t block, int64_t floats, int64_t threads, Work work) {
    const int64_t blocks = (s.channels + block - 1) / block, units = s.batch * blocks;
    bool failed = false;  // an exception must not leave a parallel loop
    (void)threads;
#pragma omp parallel for num_threads(static_cast<int>(threads)) reduction(|| : failed) if (threads > 1 && units > 1)
    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t c = unit % blocks * block;
        try {
            work(unit / blocks, c, smaller(block, s.channels - c), scratch_of(floats));
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    }
    if (failed) throw std::bad_alloc();
}

// Calls `work(first token, last token + 1, channel)` for vectors of channels, STRIP tokens at a time.
template <class Work> void for_strips(int64_t tokens, int64_t channels, Work work) {
    for (int64_t t = 0; t < tokens; t += STRIP)
        for (int64_t v = 0; v < channels; v += LANES) work(t, smaller(tokens, t + STRIP), v);
}

// Sets `sum` (n) to the sum of `value(token, channel)` over the tokens, for vectors of channels.
template <class Value> void sum_tokens(int64_t tokens, int64_t n, float* sum, Value value) {
    clear(sum, n);
    for_strips(tokens, n, [&](int64_t t, int64_t end, int64_t v) {
        Vec total{};
        for (; t < end; ++t) total += value(t, v);
        add(sum + v, total);
    });
}

// Divides the sum over an image's tokens by their number.
void to_mean(const Shape& s, float* sum, int64_t n) {
    for (int64_t v = 0; v < n; v += LANES) store(sum + v, load(sum + v) / static_cast<float>(s.tokens()));
}

// Sums squares of distances from the image's own mean, which lose no digits to a large mean.
void about_mean(int64_t tokens, int64_t stride, const float* x, const float* mean, float* square, int64_t n) {
    sum_tokens(tokens, n, square, [=](int64_t t, int64_t v) INLINE_LAMBDA {
        const Vec d = load(x + t * stride + v) - load(mean + v);
        return d * d;
    });
}

}  // namespace
