// Channel gates: values from the means of an image's channels, and the way back.
#pragma once

#include <cmath>
#include <cstdint>

#include "sums.h"

namespace {

// As Python numbers them. CLAMP is squeeze-and-excitation whose hard sigmoid is folded into its second layer.
constexpr int64_t NO_GATE = 0, SQUEEZE = 1, CLAMP = 2, ECA = 3, ECA_HARD = 4;

// Squeeze-and-excitation: first (R, D), bias (R), second (D, R), bias2 (D). Efficient channel attention: first (k),
// where k is `reduced`. A NaN stays one.
struct Gate {
    int64_t kind;
    const float *first, *bias, *second, *bias2;
    int64_t reduced;

    bool squeezes() const { return kind == SQUEEZE || kind == CLAMP; }

    void squeeze(const float* means, int64_t channels, float* squeezed) const {
        for (int64_t r = 0; r < reduced; ++r) {
            const float value = dot(first + r * channels, means, channels) + bias[r];
            squeezed[r] = value < 0.0f ? 0.0f : value;
        }
    }

    void values(const float* means, int64_t channels, float* squeezed, float* out) const {
        if (squeezes()) squeeze(means, channels, squeezed);
        for (int64_t c = 0; c < channels; ++c)
            out[c] = bounded(squeezes() ? dot(second + c * reduced, squeezed, reduced) + bias2[c]
                                        : neighbours(means, c, channels, 1));
    }

    // `grad` is that of the values. Sets that of the means; adds to those of the parameters, which lie in the order of
    // the parameters. `squeezed` and `back` have room for `reduced` floats each, `inner` for the channels.
    void backward(const float* grad, const float* values, const float* means, int64_t channels, float* squeezed,
                  float* back, float* inner, float* of_means, float* of_first, float* of_bias, float* of_second,
                  float* of_bias2) const {
        for (int64_t c = 0; c < channels; ++c) inner[c] = grad[c] * slope_of(values[c]);
        if (!squeezes()) {
            for (int64_t i = 0; i < reduced; ++i)
                for (int64_t c = 0; c < channels; ++c) {
                    const int64_t from = c + i - reduced / 2;
                    if (from >= 0 && from < channels) of_first[i] += inner[c] * means[from];
                }
            for (int64_t c = 0; c < channels; ++c) of_means[c] = neighbours(inner, c, channels, -1);
            return;
        }
        squeeze(means, channels, squeezed);
        for (int64_t r = 0; r < reduced; ++r) back[r] = 0.0f;
        for (int64_t c = 0; c < channels; ++c) {
            of_bias2[c] += inner[c];
            for (int64_t r = 0; r < reduced; ++r) {
                of_second[c * reduced + r] += inner[c] * squeezed[r];
                back[r] += inner[c] * second[c * reduced + r];
            }
        }
        for (int64_t c = 0; c < channels; ++c) of_means[c] = 0.0f;
        for (int64_t r = 0; r < reduced; ++r) {
            if (!(squeezed[r] > 0.0f)) continue;
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

    float bounded(float x) const {
        if (kind == ECA) return 1.0f / (1.0f + std::exp(-x));
        if (kind != CLAMP) x = (x + 3.0f) / 6.0f;
        return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x;
    }

    // Derivative of `bounded` from its value; at corners as in PyTorch.
    float slope_of(float value) const {
        if (kind == ECA) return value * (1.0f - value);
        return value > 0.0f && value < 1.0f ? (kind == CLAMP ? 1.0f : 1.0f / 6.0f) : 0.0f;
    }
};

}  // namespace
