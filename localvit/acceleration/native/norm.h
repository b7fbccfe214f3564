// Batch norms.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "sums.h"

namespace {

// As Python numbers them. AFFINE: `weight` and `bias`, each where it is not null, are scale and shift as they are.
constexpr int64_t AFFINE = 0, RUNNING = 1, BATCH = 2;

// A norm, or none. `mean` and `rstd` (D) are of this forward pass and are kept for the backward pass.
struct Norm {
    int64_t mode;
    const float *weight, *bias;
    float *running_mean, *running_var;
    int64_t* tracked;
    double eps, momentum;  // below zero: a plain average over all batches
    float *mean, *rstd;
    std::vector<float> scale, shift;

    // By the means (B, D) of each image, and its squares about them, of `tokens` each.
    void measure(const float* means, const float* squares, int64_t batch, int64_t tokens, int64_t channels) {
        if (mode != BATCH) return;
        const double count = static_cast<double>(batch) * static_cast<double>(tokens);
        double step = momentum < 0.0 ? 0.0 : momentum;
        if (tracked) {
            ++*tracked;
            if (momentum < 0.0) step = 1.0 / static_cast<double>(*tracked);
        }
        for (int64_t c = 0; c < channels; ++c) {
            double sum = 0.0, between = 0.0, within = 0.0;
            for (int64_t b = 0; b < batch; ++b) sum += means[b * channels + c];
            const double middle = sum / static_cast<double>(batch);
            for (int64_t b = 0; b < batch; ++b) {
                const double d = means[b * channels + c] - middle;
                between += d * d;
                within += squares[b * channels + c];
            }
            const double sum_of_squares = between * static_cast<double>(tokens) + within;
            mean[c] = static_cast<float>(middle);
            rstd[c] = static_cast<float>(1.0 / std::sqrt(sum_of_squares / count + eps));
            if (!running_mean) continue;
            running_mean[c] += static_cast<float>(step * (middle - running_mean[c]));
            running_var[c] += static_cast<float>(step * (sum_of_squares / (count - 1.0) - running_var[c]));
        }
    }

    // Scale and shift, once the statistics are known; `measured`: they are in `mean` and `rstd` already.
    void prepare(int64_t channels, bool measured) {
        if (mode == AFFINE) return;
        scale.resize(channels), shift.resize(channels);
        for (int64_t c = 0; c < channels; ++c) {
            const bool running = mode == RUNNING && !measured;
            const float middle = running ? running_mean[c] : mean[c];
            const float factor = running ? static_cast<float>(1.0 / std::sqrt(running_var[c] + eps)) : rstd[c];
            if (running && mean) mean[c] = middle, rstd[c] = factor;
            scale[c] = (weight ? weight[c] : 1.0f) * factor;
            shift[c] = (bias ? bias[c] : 0.0f) - middle * scale[c];
        }
    }

    Affine affine() const {
        return mode == AFFINE ? Affine{weight, bias} : Affine{scale.data(), shift.data()};
    }

    // The gradient of the input is that of the output times the first (D), plus the input times the second, plus the
    // third; from the gradients of weight and bias.
    struct Back {
        std::vector<float> by_grad, by_x, rest;
    };
    Back back(const float* of_weight, const float* of_bias, double count, int64_t channels) const {
        Back b{std::vector<float>(channels, 1.0f), std::vector<float>(channels), std::vector<float>(channels)};
        if (mode == AFFINE) return b;
        for (int64_t c = 0; c < channels; ++c) {
            b.by_grad[c] = scale[c];
            if (mode != BATCH) continue;
            b.by_x[c] = static_cast<float>(-scale[c] * rstd[c] * of_weight[c] / count);
            b.rest[c] = static_cast<float>(-scale[c] * of_bias[c] / count) - b.by_x[c] * mean[c];
        }
        return b;
    }
};

}  // namespace
