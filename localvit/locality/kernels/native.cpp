// Depth-wise stages of the feed-forward network on a CPU, one pass through memory each.
//
// Maps are dense (B, N, D) tokens in raster order, in single precision. D is a multiple of 16. A unit of
// work is one image and one block of channels, or a band of an image's rows: what it sums goes to a place of its
// own, so results do not depend on the number of threads. Compiled on the machine that runs it (native_build.py),
// without any header of PyTorch.
//
// Activations are numbers: 0 none, 1 ReLU, 2 ReLU6, 3 hard swish.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)  // wider vectors than the processor has would need more registers than there are
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int64_t HARD_SWISH = 3, ANY = -1;
constexpr int COLUMNS = 4;            // outputs side by side, which share what they load
constexpr int SCRATCH = 192 * 1024;   // bytes of the rows that a unit of work keeps, for second-level caches
constexpr int64_t PARTS = 8;          // of an image, by rows: what is summed over it is summed over each first
constexpr int64_t STRIP = 8;          // tokens that a loop over channels goes along: as many streams are prefetched

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE Vec load(const float* p) { return *reinterpret_cast<const Anywhere*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<Anywhere*>(p) = v; }
INLINE void add(float* p, Vec v) { store(p, load(p) + v); }
INLINE Vec of(float value) { return Vec{} + value; }
INLINE void clear(float* p, int64_t floats) {
    for (int64_t i = 0; i < floats; i += LANES) store(p + i, Vec{});
}
#if defined(__AVX512F__)  // compilers make two instructions of a comparison; not a number stays one in all forms
INLINE Vec at_least(Vec x, Vec low) { return _mm512_max_ps(low, x); }
INLINE Vec at_most(Vec x, Vec high) { return _mm512_min_ps(high, x); }
#elif defined(__AVX__)
INLINE Vec at_least(Vec x, Vec low) { return _mm256_max_ps(low, x); }
INLINE Vec at_most(Vec x, Vec high) { return _mm256_min_ps(high, x); }
#else
INLINE Vec at_least(Vec x, Vec low) { return x < low ? low : x; }
INLINE Vec at_most(Vec x, Vec high) { return x > high ? high : x; }
#endif

INLINE Vec activate(Vec x, int64_t act) {
    if (act == 0) return x;
    if (act == HARD_SWISH) return x * at_most(at_least(x * (1.0f / 6.0f) + 0.5f, Vec{}), of(1.0f));
    x = at_least(x, Vec{});
    return act == 2 ? at_most(x, of(6.0f)) : x;
}

// Derivative of the activation; at corners as in PyTorch.
INLINE Vec slope(Vec x, int64_t act) {
    if (act == 0) return of(1.0f);
    if (act == HARD_SWISH) return x <= -3.0f ? Vec{} : x < 3.0f ? x * (1.0f / 3.0f) + 0.5f : of(1.0f);
    Vec rising = x > 0.0f ? of(1.0f) : Vec{};
    return act == 2 ? (x < 6.0f ? rising : Vec{}) : rising;
}

// Scale and shift per channel, each where its pointer is not null.
struct Affine {
    const float *scale, *shift;
    inline __attribute__((always_inline)) Vec operator()(Vec x, int c) const {
        if (scale) x *= load(scale + c);
        return shift ? x + load(shift + c) : x;
    }
};

// Of maps whose images have `prefix` other tokens before those of the lattice.
struct Shape {
    int64_t batch, height, width, channels, prefix = 0;
    int64_t tokens() const { return height * width; }
    int64_t start(int64_t image) const { return (image * (prefix + tokens()) + prefix) * channels; }
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Columns of a staged row: padding on both sides, and room for the last group of outputs.
template <int K> int64_t span(const Shape& s) { return s.width + 2 * (K / 2) + COLUMNS; }

// Channels of a unit of work: all, because tokens are read faster as a whole; where images are few, a share for each
// thread, but one image is not shared by two threads: what is prefetched of one's channels are the other's, and to
// have them fetched back takes longer than to compute all. `most` bounds them.
int64_t block_of(const Shape& s, int64_t threads, int64_t most) {
    const bool whole = s.batch >= 4 * threads || (s.batch == 1 && threads == 2);
    const int64_t vectors = s.channels / LANES, shares = whole ? 1 : threads;
    const int64_t block = smaller((vectors + shares - 1) / shares, most / LANES) * LANES;
    return block < LANES ? LANES : block;
}

// As many as let K staged rows fit into SCRATCH.
template <int K> int64_t staged_block_of(const Shape& s, int64_t threads) {
    return block_of(s, threads, SCRATCH / (4 * K * span<K>(s)));
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

// Calls `work(image, first channel, channels, scratch)` for every unit of work. `floats` of scratch, of any value.
template <class Work> void for_units(const Shape& s, int64_t block, int64_t floats, int64_t threads, Work work) {
    const int64_t blocks = (s.channels + block - 1) / block, units = s.batch * blocks;
    (void)threads;
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1 && units > 1)
    {
        float* scratch = scratch_of(floats);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < units; ++unit) {
            const int64_t c = unit % blocks * block;
            work(unit / blocks, c, smaller(block, s.channels - c), scratch);
        }
    }
}

// Threads that work together, and what one of them does of n pieces.
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

// Calls `work(first token, last token + 1, channel)` for vectors of channels, STRIP tokens at a time.
template <class Work> void for_strips(int64_t tokens, int64_t channels, Work work) {
    for (int64_t t = 0; t < tokens; t += STRIP)
        for (int64_t v = 0; v < channels; v += LANES) work(t, smaller(tokens, t + STRIP), v);
}

// From the sum over an image's tokens.
void to_mean(const Shape& s, float* sum, int64_t n) {
    for (int64_t v = 0; v < n; v += LANES) store(sum + v, load(sum + v) / static_cast<float>(s.tokens()));
}

// The sum of vectors of n floats that lie one after the other.
void total_of(const float* parts, int64_t count, int64_t n, float* out) {
    for (int64_t v = 0; v < n; v += LANES) {
        Vec total{};
        for (int64_t i = 0; i < count; ++i) total += load(parts + i * n + v);
        store(out + v, total);
    }
}

// Most gates have four values of their own; adding up the lanes of a vector would take longer than all of them.
float dot(const float* a, const float* b, int64_t n) {
    const int64_t whole = n - n % LANES;
    float sum = 0.0f;
    if (whole > 0) {
        Vec sums{};
        for (int64_t i = 0; i < whole; i += LANES) sums += load(a + i) * load(b + i);
        for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    }
    for (int64_t i = whole; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// Squares of tokens about the image's own mean, which lose no digits to a large one. Tokens are `stride` apart.
void about_mean(int64_t tokens, int64_t stride, const float* x, const float* mean, float* square, int64_t n) {
    clear(square, n);
    for_strips(tokens, n, [&](int64_t t, int64_t end, int64_t v) {
        const Vec middle = load(mean + v);
        Vec total{};
        for (; t < end; ++t) {
            const Vec d = load(x + t * stride + v) - middle;
            total += d * d;
        }
        add(square + v, total);
    });
}

// The squeeze-and-excitation gate clamp(second @ relu(first @ means + bias) + bias2, 0, 1), `first` (R, D) and
// `second` (D, R); none where they are null. Not a number stays one.
struct Gate {
    const float *first, *bias, *second, *bias2;
    int64_t reduced;

    void factors(const float* means, int64_t channels, float* squeezed, float* factor) const {
        for (int64_t r = 0; r < reduced; ++r) {
            const float value = dot(first + r * channels, means, channels) + bias[r];
            squeezed[r] = value < 0.0f ? 0.0f : value;
        }
        for (int64_t v = 0; v < channels; v += LANES) {
            Vec value = load(bias2 + v);
            for (int lane = 0; lane < LANES; ++lane)
                value[lane] += dot(second + (v + lane) * reduced, squeezed, reduced);
            store(factor + v, at_most(at_least(value, Vec{}), of(1.0f)));
        }
    }
};

// With activations ACT and ACT2, the paper's in inference and in training, or with any: no branch saves an eighth.
// Where images are few, threads share each of them, by its parts; `y` may be `x`, so rows that another thread is to
// overwrite are staged before any is written.
template <int K, int64_t ACT, int64_t ACT2> struct Depthwise {
    Shape s;
    const float *x, *weight, *bias;
    Affine affine;
    float *y, *means, *squares;
    Gate gate;
    int64_t act, act2;

    // Memory of one thread; `sums` (PARTS, D) are in common for those who share an image.
    struct Desk {
        float *rows, *taps, *sums, *mean, *factor, *squeezed;
        int64_t first = -1, channels = 0;  // that rows and taps are laid out for

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
            for (; j < end; ++j) {
                const Vec value = affine(load(from + j * s.channels + v), c + v);
                store(to + ring.at(j, v), activate(value, ACT == ANY ? act : ACT));
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

    // This thread's parts of a block of channels.
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

    // What needs the means of the whole image.
    void finish(const Team& team, const Desk& desk, int64_t image) const {
        const int64_t n = s.channels;
        float* out = y + s.start(image);
        team.wait();
        total_of(desk.sums, PARTS, n, desk.mean);
        to_mean(s, desk.mean, n);
        if (means && team.rank == 0) memcpy(means + image * n, desk.mean, n * sizeof(float));
        if (gate.first) {
            gate.factors(desk.mean, n, desk.squeezed, desk.factor);
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
        if (team.rank == 0) total_of(desk.sums, PARTS, n, squares + image * n);
    }

    void run(int64_t threads) const {
        const int64_t block = staged_block_of<K>(s, 1), floats = Desk::floats(s, block, gate.reduced);
        const bool shared = s.batch < 4 * threads && s.batch % threads > 0;
        float* common = Desk(s, block, scratch_of(floats)).sums;
        for_team(shared ? smaller(threads, PARTS) : threads, [&](const Team& all) {
            Desk desk(s, block, scratch_of(floats));
            if (shared) desk.sums = common;
            const Team team = shared ? all : Team{0, 1}, share = shared ? Team{0, 1} : all;
            for (int64_t image = share.first(s.batch); image < share.end(s.batch); ++image) {
                for (int64_t c = 0; c < s.channels; c += block)
                    band(team, desk, image, c, smaller(block, s.channels - c));
                finish(team, desk, image);
            }
        });
    }
};

// Back from the gated map to the normalised expanded one; everything in between is computed again. A row is
// written when the rows that need what it was are staged.
template <int K> struct DepthwiseBackward {
    Shape s;
    float *grad;
    const float *x, *below, *weight, *factor, *term;
    Affine second;
    const float *by_grad, *by_x, *rest;
    Affine first;
    const float *mean, *deviation;
    float *total, *moment, *taps;
    int64_t act, act2;

    // Gradient of the convolved map.
    void stage(const Ring<K>& ring, float* to, const float* g, const float* in, int64_t image, int64_t c) const {
        const float *f = factor + image * s.channels + c, *t = term + image * s.channels + c;
        for_strips(s.width, ring.channels, [&](int64_t j, int64_t end, int64_t v) {
            const Vec by_g = load(by_grad + c + v), by = load(by_x + c + v), constant = load(rest + c + v);
            const Vec scale = load(f + v) * by_g, shift = load(t + v) * by_g;
            for (; j < end; ++j) {
                const Vec value = load(in + j * s.channels + v);
                const Vec a = slope(second(value, c + v), act2);
                const Vec above = load(g + j * s.channels + v) * scale + shift;
                store(to + ring.at(j, v), a * above + value * by + constant);
            }
        });
    }

    // `w` is flipped, and so is `sum`, where the gradient of the weight is summed.
    void row(const Ring<K>& ring, int64_t i, const float* w, int64_t image, int64_t c, float* sum) const {
        const int64_t n = ring.channels, start = s.start(image) + i * s.width * s.channels + c;
        const float* in[K];
        for (int d = 0; d < K; ++d) in[d] = ring.row(i + d - K / 2);
        for (int64_t v = 0; v < n; v += LANES) {
            const Vec middle = load(mean + c + v), dev = load(deviation + c + v);
            Vec of_taps[K * K] = {}, of_bias{}, of_scale{};
            for (int64_t j = 0; j < s.width; ++j) {
                const int64_t at = start + j * s.channels + v;
                const Vec under = load(below + at), normal = first(under, c + v);
                const Vec hidden = activate(normal, act);
                Vec back{};
#pragma GCC unroll 8
                for (int dy = 0; dy < K; ++dy)
#pragma GCC unroll 8
                    for (int dx = 0; dx < K; ++dx) {
                        const Vec value = load(in[dy] + ring.at(j + dx, v));
                        back += value * load(w + tap<K>(dy * K + dx, v));
                        of_taps[dy * K + dx] += value * hidden;
                    }
                back *= slope(normal, act);
                store(grad + at, back);
                of_bias += back;
                of_scale += back * (under - middle) * dev;
            }
            const int64_t channel = image * s.channels + c + v;
            add(total + channel, of_bias);
            add(moment + channel, of_scale);
            for (int t = 0; t < K * K; ++t) add(sum + tap<K>(t, v), of_taps[t]);
        }
    }

    void unit(int64_t image, int64_t c, int64_t n, float* scratch) const {
        const Ring<K> ring{scratch, span<K>(s), n, s.height};
        float *w = scratch + ring.ROWS * ring.span * n, *sum = w + K * K * n;
        const int64_t start = s.start(image) + c;
        const float *g = grad + start, *in = x + start;
        ring.reset(s.width);
        for (int64_t i = 1; i <= K / 2; ++i) ring.leave_out(-i), ring.leave_out(s.height - 1 + i);
        taps_of<K>(weight, c, n, true, w);
        clear(sum, K * K * n);
        clear(total + image * s.channels + c, n);
        clear(moment + image * s.channels + c, n);
        for (int64_t i = -(K / 2); i < s.height; ++i) {
            const int64_t entering = i + K / 2, at = entering * s.width * s.channels;
            if (entering < s.height) stage(ring, ring.inside(entering), g + at, in + at, image, c);
            if (i >= 0) row(ring, i, w, image, c, sum);
        }
        for (int t = 0; t < K * K; ++t)  // (B, D, K * K)
            for (int64_t v = 0; v < n; ++v)
                taps[(image * s.channels + c + v) * K * K + K * K - 1 - t] = sum[tap<K>(t, v)];
    }

    void run(int64_t threads) const {
        const int64_t block = staged_block_of<K>(s, threads), floats = (Ring<K>::ROWS * span<K>(s) + 2 * K * K) * block;
        for_units(s, block, floats, threads,
                  [this](int64_t image, int64_t c, int64_t n, float* p) { unit(image, c, n, p); });
    }
};

}  // namespace

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
