// Everything between the two point-wise layers: norm, activation, depth-wise convolution, norm, activation, gate.
#pragma once

#include <cstdint>
#include <vector>

#include "depthwise.h"
#include "depthwise_backward.h"
#include "gate.h"
#include "norm.h"

namespace {

struct Mix {
    Shape s;
    int64_t k, act, act2, threads;
    Norm norm1, norm2;
    const float *weight, *bias;  // of the convolution: (D, k * k), (D)
    Gate gate;

    int64_t maps() const { return s.batch * s.channels; }

    // y = act2(conv(act(x by norm 1))) * gate, where norm 2 is folded into the convolution. `y` may be `x`.
    void inference(const float* x, float* y, float* means) {
        norm1.prepare(s.channels, false), norm2.prepare(s.channels, false);
        std::vector<float> taps, start;
        const float *w = weight, *b = bias;
        if (norm2.mode != AFFINE) {
            taps.resize(s.channels * k * k), start.resize(s.channels);
            for (int64_t c = 0; c < s.channels; ++c) {
                for (int64_t t = 0; t < k * k; ++t) taps[c * k * k + t] = weight[c * k * k + t] * norm2.scale[c];
                start[c] = norm2.shift[c] + (bias ? bias[c] * norm2.scale[c] : 0.0f);
            }
            w = taps.data(), b = start.data();
        }
        convolve(x, w, b, y, means, nullptr, gate, act2);
    }

    // The same with statistics of the batch where norms ask for them. `pooled` and `values` (B, D) are the means
    // that the gate takes, and what it gives.
    void forward(const float* x, float* convolved, float* gated, float* pooled, float* values) {
        std::vector<float> means(maps()), squares(maps());
        if (norm1.mode == BATCH) moments(x, means.data(), squares.data());
        norm1.measure(means.data(), squares.data(), s.batch, s.tokens(), s.channels);
        norm1.prepare(s.channels, norm1.mode == BATCH);
        Gate none{};
        convolve(x, weight, bias, convolved, means.data(), norm2.mode == BATCH ? squares.data() : nullptr, none, 0);
        norm2.measure(means.data(), squares.data(), s.batch, s.tokens(), s.channels);
        norm2.prepare(s.channels, norm2.mode == BATCH);
        activate_and_gate(convolved, gated, pooled, values);
    }

    // The output once more, from what is kept.
    void again(const float* convolved, float* gated, float* values) {
        norm2.prepare(s.channels, true);
        activate_and_gate(convolved, gated, nullptr, values);
    }

    struct Gradients {
        float *x, *norm1_weight, *norm1_bias, *weight, *bias, *norm2_weight, *norm2_bias;
        float *gate_first, *gate_bias, *gate_second, *gate_bias2;
    };

    void backward(const float* grad, const float* x, const float* convolved, const float* pooled, const float* values,
                  const Gradients& g) {
        const int64_t n = s.channels;
        norm1.prepare(n, true), norm2.prepare(n, true);
        std::vector<float> zero(n), one(n, 1.0f), sums(5 * maps()), terms(maps());
        gate_sums(grad, convolved, zero.data(), one.data(), sums.data());
        if (gate.kind != NO_GATE) gate_backward(sums.data(), pooled, values, g, terms.data());
        const float* factors = values;
        std::vector<float> ones;
        if (gate.kind == NO_GATE) ones.assign(maps(), 1.0f), factors = ones.data();
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t c = 0; c < n; ++c) {
                const int64_t at = b * n + c;
                const auto sum = [&](int i) { return sums[i * maps() + at]; };
                g.norm2_bias[c] += factors[at] * sum(1) + terms[at] * sum(2);
                g.norm2_weight[c] += factors[at] * sum(3) + terms[at] * sum(4);
            }
        const double count = static_cast<double>(s.batch) * static_cast<double>(s.tokens());
        const Norm::Back back2 = norm2.back(g.norm2_weight, g.norm2_bias, count, n);
        for (int64_t c = 0; c < n; ++c)  // a norm by the statistics of the batch takes a constant away again
            g.bias[c] = norm2.mode == BATCH ? 0.0f : back2.by_grad[c] * g.norm2_bias[c];

        std::vector<float> totals(2 * maps()), taps(s.batch * n * k * k);
        const float *mean = norm1.mode == AFFINE ? zero.data() : norm1.mean;
        const float *rstd = norm1.mode == AFFINE ? one.data() : norm1.rstd;
#define RUN(K)                                                                                                    \
    DepthwiseBackward<K>{s, grad, g.x, convolved, x, weight, factors, terms.data(), norm2.affine(),               \
                         back2.by_grad.data(), back2.by_x.data(), back2.rest.data(), norm1.affine(), mean, rstd,  \
                         totals.data(), totals.data() + maps(), taps.data(), act, act2}                           \
        .run(threads)
        if (k == 3) RUN(3);
        else if (k == 5) RUN(5);
        else if (k == 7) RUN(7);
#undef RUN
        add_images(totals.data(), n, g.norm1_bias);
        add_images(totals.data() + maps(), n, g.norm1_weight);
        add_images(taps.data(), n * k * k, g.weight);
        if (norm1.mode != AFFINE) through(norm1.back(g.norm1_weight, g.norm1_bias, count, n), x, g.x);
    }

  private:
    void convolve(const float* x, const float* w, const float* b, float* y, float* means, float* squares,
                  const Gate& after, int64_t last) const {
#define RUN(K, ACT, ACT2) \
    Depthwise<K, ACT, ACT2>{s, x, w, b, norm1.affine(), y, means, squares, after, act, last}.run(threads)
        if (k == 3 && act == HARD_SWISH && last == HARD_SWISH) RUN(3, HARD_SWISH, HARD_SWISH);
        else if (k == 3 && act == HARD_SWISH && last == 0) RUN(3, HARD_SWISH, 0);
        else if (k == 3) RUN(3, ANY, ANY);
        else if (k == 5) RUN(5, ANY, ANY);
        else if (k == 7) RUN(7, ANY, ANY);
#undef RUN
    }

    // Means over an image's tokens (B, D), and squares about them.
    void moments(const float* x, float* means, float* squares) const {
        for_units(s, block_of(s, threads, s.channels), 0, threads, [=](int64_t image, int64_t c, int64_t n, float*) {
            const float* in = x + s.start(image) + c;
            float* sum = means + image * s.channels + c;
            clear(sum, n);
            for_strips(s.tokens(), n, [&](int64_t t, int64_t end, int64_t v) {
                Vec total{};
                for (; t < end; ++t) total += load(in + t * s.channels + v);
                add(sum + v, total);
            });
            to_mean(s, sum, n);
            about_mean(s.tokens(), s.channels, in, sum, squares + image * s.channels + c, n);
        });
    }

    // gated = act2(convolved by norm 2) * gate: an image at a time, so that its gate finds it in the core's cache. With
    // `pooled`, the gate's values are computed; else they are given.
    void activate_and_gate(const float* convolved, float* gated, float* pooled, float* values) const {
        const int64_t n = s.channels;
        const Affine affine = norm2.affine();
        for_team(s.batch > 1 ? threads : 1, [&](const Team& team) {
            float* squeezed = scratch_of(gate.reduced + 1);
            for (int64_t image = team.first(s.batch); image < team.end(s.batch); ++image) {
                const float* in = convolved + s.start(image);
                float *out = gated + s.start(image), *mean = pooled + image * n, *value = values + image * n;
                if (gate.kind != NO_GATE && pooled) {
                    clear(mean, n);
                    for_strips(s.tokens(), n, [&](int64_t t, int64_t end, int64_t v) {
                        Vec total{};
                        for (; t < end; ++t) total += activate(affine(load(in + t * n + v), v), act2);
                        add(mean + v, total);
                    });
                    to_mean(s, mean, n);
                    gate.values(mean, n, squeezed, value);
                }
                for_strips(s.tokens(), n, [&](int64_t t, int64_t end, int64_t v) {
                    const Vec factor = gate.kind == NO_GATE ? of(1.0f) : load(value + v);
                    for (; t < end; ++t)
                        store(out + t * n + v, activate(affine(load(in + t * n + v), v), act2) * factor);
                });
            }
        });
    }

    // Five sums over an image's tokens (5, B, D), with m = x by norm 2, a = act2'(m) and z = (x - mean) * rstd:
    // grad * act2(m), a * grad, a, a * grad * z, a * z.
    void gate_sums(const float* grad, const float* x, const float* zero, const float* one, float* out) const {
        const Affine affine = norm2.affine();
        const float *mean = norm2.mode == AFFINE ? zero : norm2.mean, *rstd = norm2.mode == AFFINE ? one : norm2.rstd;
        for_units(s, block_of(s, threads, s.channels), 0, threads, [=](int64_t image, int64_t c, int64_t n, float*) {
            const float *g = grad + s.start(image) + c, *in = x + s.start(image) + c;
            float* sums[5];
            for (int i = 0; i < 5; ++i) {
                sums[i] = out + (i * s.batch + image) * s.channels + c;
                clear(sums[i], n);
            }
            for_strips(s.tokens(), n, [&](int64_t t, int64_t end, int64_t v) {
                const Vec middle = load(mean + c + v), factor = load(rstd + c + v);
                Vec s0{}, s1{}, s2{}, s3{}, s4{};
                for (; t < end; ++t) {
                    const Vec value = load(in + t * s.channels + v), above = load(g + t * s.channels + v);
                    const Vec normal = affine(value, c + v), a = slope(normal, act2);
                    const Vec z = a * (value - middle) * factor;
                    s0 += above * activate(normal, act2);
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

    // `terms` (B, D): what each token of an image gets by way of the gate's means.
    void gate_backward(const float* of_values, const float* pooled, const float* values, const Gradients& g,
                       float* terms) const {
        const int64_t n = s.channels;
        std::vector<float> room(2 * gate.reduced + n);
        for (int64_t b = 0; b < s.batch; ++b) {
            float* of_means = terms + b * n;
            gate.backward(of_values + b * n, values + b * n, pooled + b * n, n, room.data(),
                          room.data() + gate.reduced, room.data() + 2 * gate.reduced, of_means, g.gate_first,
                          g.gate_bias, g.gate_second, g.gate_bias2);
            for (int64_t c = 0; c < n; ++c) of_means[c] /= static_cast<float>(s.tokens());
        }
    }

    void add_images(const float* parts, int64_t n, float* out) const {
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t i = 0; i < n; ++i) out[i] += parts[b * n + i];
    }

    // The last step of the backward pass, through norm 1.
    void through(const Norm::Back& back, const float* x, float* grad) const {
        const float *by_grad = back.by_grad.data(), *by_x = back.by_x.data(), *rest = back.rest.data();
        for_units(s, block_of(s, threads, s.channels), 0, threads, [=](int64_t image, int64_t c, int64_t n, float*) {
            for_strips(s.tokens(), n, [&](int64_t t, int64_t end, int64_t v) {
                const Vec by_g = load(by_grad + c + v), by = load(by_x + c + v), constant = load(rest + c + v);
                for (; t < end; ++t) {
                    const int64_t at = s.start(image) + t * s.channels + c + v;
                    store(grad + at, load(grad + at) * by_g + load(x + at) * by + constant);
                }
            });
        });
    }
};

}  // namespace
