// Channel gates: their values from the means of an image's channels, and their gradients.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "work.h"

namespace {

constexpr int64_t NO_GATE = 0, SQUEEZE = 1, ECA = 2, ECA_HARD = 3;  // as form.py numbers them

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

// Squeeze-and-excitation: first (R, D), bias (R), second (D, R), bias2 (D). Efficient channel attention: first (k),
// where k is `reduced`. Fields in the order of mix.py.
struct Gate {
    int64_t kind;
    const float *first, *bias, *second, *bias2;
    int64_t reduced;

    // `squeezed` has room for `reduced` floats.
    void values(const float* means, int64_t channels, float* squeezed, float* out) const {
        for (int64_t r = 0; r < reduced && kind == SQUEEZE; ++r) {
            const float value = dot(first + r * channels, means, channels) + bias[r];
            squeezed[r] = value < 0.0f ? 0.0f : value;
        }
        for (int64_t c = 0; c < channels; ++c)
            out[c] = kind == NO_GATE   ? 1.0f
                     : kind == SQUEEZE ? hard_sigmoid(dot(second + c * reduced, squeezed, reduced) + bias2[c])
                     : kind == ECA     ? 1.0f / (1.0f + std::exp(-neighbours(means, c, channels, 1)))
                                       : hard_sigmoid(neighbours(means, c, channels, 1));
    }

    // Sets `out` to the values and `of_means` from their gradient, and adds to the gradients of the parameters.
    void backward(const float* grad, const float* means, int64_t channels, float* out, float* of_means, float* of_first,
                  float* of_bias, float* of_second, float* of_bias2) const {
        std::vector<float> inner(channels), squeezed(reduced), back(reduced);
        values(means, channels, squeezed.data(), out);
        if (kind == NO_GATE) return;
        for (int64_t c = 0; c < channels; ++c) {  // no gradient where the hard sigmoid is flat or a NaN
            const float value = out[c];
            if (kind == ECA) inner[c] = grad[c] * value * (1.0f - value);
            else if (value > 0.0f && value < 1.0f) inner[c] = grad[c] / 6.0f;
        }
        if (kind != SQUEEZE) {
            for (int64_t i = 0; i < reduced; ++i)
                for (int64_t c = 0; c < channels; ++c) {
                    const int64_t from = c + i - reduced / 2;
                    if (from >= 0 && from < channels) of_first[i] += inner[c] * means[from];
                }
            for (int64_t c = 0; c < channels; ++c) of_means[c] = neighbours(inner.data(), c, channels, -1);
            return;
        }
        for (int64_t c = 0; c < channels; ++c) {
            of_means[c] = 0.0f;
            of_bias2[c] += inner[c];
            for (int64_t r = 0; r < reduced; ++r) {
                of_second[c * reduced + r] += inner[c] * squeezed[r];
                back[r] += inner[c] * second[c * reduced + r];
            }
        }
        for (int64_t r = 0; r < reduced; ++r) {
            if (squeezed[r] <= 0.0f) continue;
            of_bias[r] += back[r];
            for (int64_t c = 0; c < channels; ++c) {
                of_first[r * channels + c] += back[r] * means[c];
                of_means[c] += back[r] * first[r * channels + c];
            }
        }
    }

  private:
    // Convolution along the channels; by the transposed kernel where `sign` is -1.
    float neighbours(const float* x, int64_t c, int64_t channels, int64_t sign) const {
        float sum = 0.0f;
        for (int64_t i = 0; i < reduced; ++i) {
            const int64_t at = c + sign * (i - reduced / 2);
            if (at >= 0 && at < channels) sum += first[i] * x[at];
        }
        return sum;
    }

    static float hard_sigmoid(float x) {
        x = (x + 3.0f) / 6.0f;
        return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x;
    }
};

}  // namespace
