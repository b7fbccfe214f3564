// Maps of tokens, and how the work on them is shared out.
#pragma once

#include <cstdint>
#include <cstdlib>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "vectors.h"

namespace {

constexpr int64_t STRIP = 8;  // tokens that a loop over channels goes along: as many streams are prefetched

// Of maps whose images have `prefix` other tokens before those of the grid.
struct Shape {
    int64_t batch, height, width, channels, prefix = 0;
    int64_t tokens() const { return height * width; }
    int64_t start(int64_t image) const { return (image * (prefix + tokens()) + prefix) * channels; }
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Channels of a unit of work: all, because tokens are read faster as a whole; where images are few, a share for each
// thread, but one image is not shared by two threads so: what is prefetched of one's channels are the other's, and to
// have them fetched back takes longer than to compute all. `most` bounds them.
int64_t block_of(const Shape& s, int64_t threads, int64_t most) {
    const bool whole = s.batch >= 4 * threads || (s.batch == 1 && threads == 2);
    const int64_t vectors = s.channels / LANES, shares = whole ? 1 : threads;
    const int64_t block = smaller((vectors + shares - 1) / shares, most / LANES) * LANES;
    return block < LANES ? LANES : block;
}

// Memory of this thread, of any value. It is kept: to get it anew would take as long as a small map's work.
float* scratch_of(int64_t floats) {
    static thread_local struct Kept {
        void* memory = nullptr;
        int64_t bytes = 0;
        ~Kept() { free(memory); }
    } kept;
    const int64_t line = 64, bytes = (floats * sizeof(float) / line + 1) * line;
    if (kept.bytes < bytes) {
        free(kept.memory);
        kept.memory = aligned_alloc(line, bytes);
        kept.bytes = bytes;
    }
    return static_cast<float*>(kept.memory);
}

// Threads side by side, and what one of them does of n pieces.
struct Team {
    int64_t rank, size;
    int64_t first(int64_t n) const { return n * rank / size; }
    int64_t end(int64_t n) const { return n * (rank + 1) / size; }
    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

// Calls `work(team)` in every thread; there may be fewer than asked for.
template <class Work> void for_team(int64_t threads, Work work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
    work(Team{omp_get_thread_num(), omp_get_num_threads()});
#else
    (void)threads;
    work(Team{0, 1});
#endif
}

// Calls `work(image, first channel, channels, scratch)` for every unit of work. `floats` of scratch, of any value.
template <class Work> void for_units(const Shape& s, int64_t block, int64_t floats, int64_t threads, Work work) {
    const int64_t blocks = (s.channels + block - 1) / block, units = s.batch * blocks;
    for_team(units > 1 ? threads : 1, [&](const Team& team) {
        float* scratch = scratch_of(floats);
        for (int64_t unit = team.first(units); unit < team.end(units); ++unit) {
            const int64_t c = unit % blocks * block;
            work(unit / blocks, c, smaller(block, s.channels - c), scratch);
        }
    });
}

// Calls `work(first token, last token + 1, channel)` for vectors of channels, STRIP tokens at a time.
template <class Work> void for_strips(int64_t tokens, int64_t channels, Work work) {
    for (int64_t t = 0; t < tokens; t += STRIP)
        for (int64_t v = 0; v < channels; v += LANES) work(t, smaller(tokens, t + STRIP), v);
}

}  // namespace
