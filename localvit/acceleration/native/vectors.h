// Vectors of channels as wide as the processor's, and functions of one vector.
#pragma once

#include <cstdint>
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

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE Vec load(const float* p) { return *reinterpret_cast<const Anywhere*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<Anywhere*>(p) = v; }
INLINE void add(float* p, Vec v) { store(p, load(p) + v); }
INLINE Vec of(float value) { return Vec{} + value; }
INLINE void clear(float* p, int64_t floats) {
    for (int64_t i = 0; i < floats; i += LANES) store(p + i, Vec{});
}
#if defined(__AVX512F__)  // compilers make two instructions of a comparison; a NaN stays one in all forms
INLINE Vec at_least(Vec x, Vec low) { return _mm512_max_ps(low, x); }
INLINE Vec at_most(Vec x, Vec high) { return _mm512_min_ps(high, x); }
#elif defined(__AVX__)
INLINE Vec at_least(Vec x, Vec low) { return _mm256_max_ps(low, x); }
INLINE Vec at_most(Vec x, Vec high) { return _mm256_min_ps(high, x); }
#else
INLINE Vec at_least(Vec x, Vec low) { return x < low ? low : x; }
INLINE Vec at_most(Vec x, Vec high) { return x > high ? high : x; }
#endif

constexpr int64_t HARD_SWISH = 3;  // activations by number: 0 none, 1 ReLU, 2 ReLU6

INLINE Vec activate(Vec x, int64_t act) {
    if (act == 0) return x;
    if (act == HARD_SWISH) return x * at_most(at_least(x * (1.0f / 6.0f) + 0.5f, Vec{}), of(1.0f));
    x = at_least(x, Vec{});
    return act == 2 ? at_most(x, of(6.0f)) : x;
}

// Derivative of the activation; at corners and for a NaN as in PyTorch.
INLINE Vec slope(Vec x, int64_t act) {
    if (act == 0) return of(1.0f);
    if (act == HARD_SWISH) return x <= -3.0f ? Vec{} : x >= 3.0f ? of(1.0f) : x * (1.0f / 3.0f) + 0.5f;
    Vec rising = x <= 0.0f ? Vec{} : of(1.0f);
    return act == 2 ? (x >= 6.0f ? Vec{} : rising) : rising;
}

}  // namespace
