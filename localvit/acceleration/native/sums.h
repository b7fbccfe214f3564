// What is summed over the tokens of an image.
#pragma once

#include <cstdint>

#include "work.h"

namespace {

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

}  // namespace
