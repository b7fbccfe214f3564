// Batch norms.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "work.h"

namespace {

// As mix.py numbers them. MOVING: by statistics of the batch, which also move the running ones.
constexpr int64_t NO_NORM = 0, RUNNING = 1, BATCH = 2, MOVING = 3;

// A norm of D channels, or none: then it multiplies by 1 and adds 0. Fields in the order of mix.py.
struct Norm {
    int64_t mode;
    const float *weight, *bias;
    float *running_mean, *running_var;
    int64_t* tracked;
    double eps, momentum;               // momentum below zero: the average over all batches
    float *mean, *rstd, *scale, *shift;  // (D): written by the forward pass, read by the backward pass

    bool by_batch() const { return mode == BATCH || mode == MOVING; }

    // Computes statistics of the batch from the means (B, D) of images and their squares about them, of `tokens` each.
    void measure(const float* means, const float* squares, const Shape& s) const {
        const double tokens = static_cast<double>(s.tokens()), batch = static_cast<double>(s.batch);
        const double count = batch * tokens;
        double step = momentum;
        if (tracked && mode == MOVING) ++*tracked;
        if (momentum < 0.0) step = tracked ? 1.0 / static_cast<double>(*tracked) : 0.0;
        for (int64_t c = 0; c < s.channels; ++c) {
            double sum = 0.0, between = 0.0, within = 0.0;
            for (int64_t at = c; at < s.maps(); at += s.channels) sum += means[at];
            const double middle = sum / batch;
            for (int64_t at = c; at < s.maps(); at += s.channels) {
                const double d = means[at] - middle;
                between += d * d;
                within += squares[at];
            }
            const double total = between * tokens + within;
            mean[c] = static_cast<float>(middle);
            rstd[c] = static_cast<float>(1.0 / std::sqrt(total / count + eps));
            if (!running_mean || mode != MOVING) continue;
            running_mean[c] += static_cast<float>(step * (middle - running_mean[c]));
            running_var[c] += static_cast<float>(step * (total / (count - 1.0) - running_var[c]));
        }
    }

    // Computes scale and shift; `means` and `squares` as for `measure`, if by the batch.
    void prepare(const float* means, const float* squares, const Shape& s) const {
        if (by_batch()) measure(means, squares, s);
        for (int64_t c = 0; c < s.channels; ++c) {
            if (mode == RUNNING) {
                mean[c] = running_mean[c];
                rstd[c] = static_cast<float>(1.0 / std::sqrt(running_var[c] + eps));
            } else if (mode == NO_NORM) {
                mean[c] = 0.0f, rstd[c] = 1.0f;
            }
            scale[c] = (weight ? weight[c] : 1.0f) * rstd[c];
            shift[c] = (bias ? bias[c] : 0.0f) - mean[c] * scale[c];
        }
    }

    // Through statistics of the batch, the gradient of the input also has the input times `by_x` (D) and `rest` (D).
    struct Back {
        std::vector<float> by_x, rest;
    };
    Back back(const float* of_weight, const float* of_bias, const Shape& s) const {
        Back b{std::vector<float>(s.channels), std::vector<float>(s.channels)};
        const double count = static_cast<double>(s.batch) * static_cast<double>(s.tokens());
        for (int64_t c = 0; c < s.channels && by_batch(); ++c) {
            b.by_x[c] = static_cast<float>(-scale[c] * rstd[c] * of_weight[c] / count);
            b.rest[c] = static_cast<float>(-scale[c] * of_bias[c] / count) - b.by_x[c] * mean[c];
        }
        return b;
    }
};

}  // namespace
