// The middle stage: norm, activation, depth-wise convolution, norm, activation, gate.
#pragma once

#include <cstdint>
#include <vector>

#include "depthwise.h"
#include "depthwise_backward.h"

namespace {

struct Mix : Arguments {
    explicit Mix(const Arguments& arguments) : Arguments(arguments) {}

    // The stage at once, where no norm asks for statistics of the batch. `y` may be `x`.
    void inference(const float* x, float* y) const {
        norm1.prepare(nullptr, nullptr, s), norm2.prepare(nullptr, nullptr, s);
        by_size([&](auto side) { Depthwise<side, true>{*this, x, y, pooled, nullptr}.run(); });
    }

    // gated = act2(convolved by norm 2) * gate, where convolved = conv(act(x by norm 1)). All maps may be the same.
    void forward(const float* x, float* convolved, float* gated) const {
        std::vector<float> means(s.maps()), squares(s.maps());
        if (norm1.by_batch()) moments(x, means.data(), squares.data());
        norm1.prepare(means.data(), squares.data(), s);
        float* const measured = norm2.by_batch() ? squares.data() : nullptr;
        by_size([&](auto side) { Depthwise<side, false>{*this, x, convolved, means.data(), measured}.run(); });
        norm2.prepare(means.data(), squares.data(), s);
        activate_and_gate(convolved, gated, true);
    }

    // The second half of `forward`; with `measure` it also computes the gate's input. One image at a time: its gate
    // finds it in the cache.
    void activate_and_gate(const float* convolved, float* gated, bool measure) const {
        const int64_t act = act2;
        const int64_t floats = s.channels + gate.reduced;
        for_units(s, s.channels, floats, threads, [=](int64_t image, int64_t, int64_t n, float* value) {
            const float *in = convolved + s.start(image), *scales = norm2.scale, *shifts = norm2.shift;
            float *out = gated + s.start(image), *mean = pooled + image * n;
            if (measure) {
                sum_tokens(gate.kind == NO_GATE ? 0 : s.tokens(), n, mean, [=](int64_t t, int64_t v) INLINE_LAMBDA {
                    return activate(load(in + t * n + v) * load(scales + v) + load(shifts + v), act);
                });
                to_mean(s, mean, n);
            }
            gate.values(mean, n, value + n, value);
            for_strips(s.tokens(), n, [=](int64_t t, int64_t end, int64_t v) {
                const Vec scale = load(scales + v), shift = load(shifts + v), factor = load(value + v);
                for (; t < end; ++t)
                    store(out + t * n + v, activate(load(in + t * n + v) * scale + shift, act) * factor);
            });
        });
    }

    struct Gradients {
        float *x, *norm1_weight, *norm1_bias, *weight, *bias, *norm2_weight, *norm2_bias;
        float *gate_first, *gate_bias, *gate_second, *gate_bias2;
    };

    void backward(const float* grad, const float* x, const float* convolved, const Gradients& g) const {
        const int64_t n = s.channels;
        std::vector<float> sums(5 * s.maps()), terms(s.maps()), totals(2 * s.maps()), taps(s.maps() * k * k);
        std::vector<float> values(s.maps());
        gate_sums(grad, convolved, sums.data());
        for (int64_t b = 0; b < s.maps(); b += n)
            gate.backward(sums.data() + b, pooled + b, n, values.data() + b, terms.data() + b, g.gate_first,
                          g.gate_bias, g.gate_second, g.gate_bias2);
        for (int64_t at = 0; at < s.maps(); ++at) {
            terms[at] /= static_cast<float>(s.tokens());
            const auto sum = [&](int i) { return sums[i * s.maps() + at]; };
            g.norm2_bias[at % n] += values[at] * sum(1) + terms[at] * sum(2);
            g.norm2_weight[at % n] += values[at] * sum(3) + terms[at] * sum(4);
        }
        const Norm::Back back2 = norm2.back(g.norm2_weight, g.norm2_bias, s);
        for (int64_t c = 0; c < n; ++c)  // statistics of the batch cancel a constant
            g.bias[c] = norm2.by_batch() ? 0.0f : norm2.scale[c] * g.norm2_bias[c];
        by_size([&](auto side) {
            DepthwiseBackward<side>{*this, grad, g.x, convolved, x, values.data(), terms.data(), back2,
                                    totals.data(), totals.data() + s.maps(), taps.data()}
                .run();
        });
        add_images(totals.data(), n, g.norm1_bias);
        add_images(totals.data() + s.maps(), n, g.norm1_weight);
        add_images(taps.data(), n * k * k, g.weight);
        if (norm1.mode != NO_NORM) through(norm1.back(g.norm1_weight, g.norm1_bias, s), x, g.x);
    }

  private:
    // Calls `run` with the size of the kernel as a constant.
    template <class Run> void by_size(Run run) const {
        if (k == 3) run(std::integral_constant<int, 3>{});
        if (k == 5) run(std::integral_constant<int, 5>{});
        if (k == 7) run(std::integral_constant<int, 7>{});
    }

    // Means over an image's tokens (B, D), and squares about them.
    void moments(const float* x, float* means, float* squares) const {
        for_units(s, block_of(s, threads, s.channels), 0, threads, [=](int64_t image, int64_t c, int64_t n, float*) {
            const float* in = x + s.start(image) + c;
            float* mean = means + image * s.channels + c;
            sum_tokens(s.tokens(), n, mean, [=](int64_t t, int64_t v) { return load(in + t * s.channels + v); });
            to_mean(s, mean, n);
            about_mean(s.tokens(), s.channels, in, mean, squares + image * s.channels + c, n);
        });
    }

    // Five sums over an image's tokens (5, B, D), with m = x by norm 2, a = act2'(m) and z = (x - mean) * rstd:
    // grad * act2(m), a * grad, a, a * grad * z, a * z.
    void gate_sums(const float* grad, const float* x, float* out) const {
        for_units(s, block_of(s, threads, s.channels), 0, threads, [=](int64_t image, int64_t c, int64_t n, float*) {
            const float *g = grad + s.start(image) + c, *in = x + s.start(image) + c;
            float* sums[5];
            for (int i = 0; i < 5; ++i) {
                sums[i] = out + i * s.maps() + image * s.channels + c;
                clear(sums[i], n);
            }
            for_strips(s.tokens(), n, [&](int64_t t, int64_t end, int64_t v) {
                const Vec middle = load(norm2.mean + c + v), rstd = load(norm2.rstd + c + v);
                const Vec scale = load(norm2.scale + c + v), shift = load(norm2.shift + c + v);
                Vec s0{}, s1{}, s2{}, s3{}, s4{};
                for (; t < end; ++t) {
                    const Vec value = load(in + t * s.channels + v), above = load(g + t * s.channels + v);
                    const Vec normal = value * scale + shift, a = slope(normal, act2);
                    const Vec z = a * (value - middle) * rstd;
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

    void add_images(const float* parts, int64_t n, float* out) const {
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t i = 0; i < n; ++i) out[i] += parts[b * n + i];
    }

    // The last step of the backward pass, through norm 1.
    void through(const Norm::Back& back, const float* x, float* grad) const {
        for_units(s, block_of(s, threads, s.channels), 0, threads, [&](int64_t image, int64_t c, int64_t n, float*) {
            for_strips(s.tokens(), n, [&](int64_t t, int64_t end, int64_t v) {
                const Vec by_grad = load(norm1.scale + c + v), by_x = load(back.by_x.data() + c + v);
                const Vec rest = load(back.rest.data() + c + v);
                for (; t < end; ++t) {
                    const int64_t at = s.start(image) + t * s.channels + c + v;
                    store(grad + at, load(grad + at) * by_grad + load(x + at) * by_x + rest);
                }
            });
        });
    }
};

}  // namespace
