// Everything between the two point-wise layers on a CPU, as few passes through memory as there can be.
//
// Maps are dense (B, P + N, D) tokens, P prefix tokens in front of N in raster order, in single precision. D is a
// multiple of LANES. A unit of work is one image and one block of channels, or a part of an image's rows: what it sums
// goes to a place of its own, so results do not depend on the number of threads. Compiled on the machine that runs it
// (build.py), without any header of PyTorch.

#include "mix.h"

namespace {

// Arguments in the order of `Mix.call` in mix.py: integers and pointers, then numbers.
struct Reader {
    const int64_t* values;
    const double* numbers;
    int64_t integer() { return *values++; }
    float* floats() { return reinterpret_cast<float*>(*values++); }
    double number() { return *numbers++; }

    Norm norm() {
        Norm n{};
        n.mode = integer();
        n.weight = floats(), n.bias = floats(), n.running_mean = floats(), n.running_var = floats();
        n.tracked = reinterpret_cast<int64_t*>(*values++);
        n.eps = number(), n.momentum = number();
        n.mean = floats(), n.rstd = floats();
        return n;
    }
    Gate gate() {
        Gate g{};
        g.kind = integer(), g.first = floats(), g.bias = floats(), g.second = floats(), g.bias2 = floats();
        g.reduced = integer();
        return g;
    }
    Mix mix() {
        Mix m{};
        m.s.batch = integer(), m.s.prefix = integer(), m.s.height = integer(), m.s.width = integer();
        m.s.channels = integer(), m.k = integer(), m.act = integer(), m.act2 = integer(), m.threads = integer();
        m.norm1 = norm();
        m.weight = floats(), m.bias = floats();
        m.norm2 = norm();
        m.gate = gate();
        return m;
    }
};

}  // namespace

extern "C" {

void localvit_inference(const int64_t* values, const double* numbers) {
    Reader r{values, numbers};
    Mix m = r.mix();
    const float* x = r.floats();
    float *y = r.floats(), *means = r.floats();
    m.inference(x, y, means);
}

void localvit_forward(const int64_t* values, const double* numbers) {
    Reader r{values, numbers};
    Mix m = r.mix();
    const float* x = r.floats();
    float *convolved = r.floats(), *gated = r.floats(), *pooled = r.floats(), *gates = r.floats();
    m.forward(x, convolved, gated, pooled, gates);
}

void localvit_again(const int64_t* values, const double* numbers) {
    Reader r{values, numbers};
    Mix m = r.mix();
    const float* convolved = r.floats();
    float *gated = r.floats(), *gates = r.floats();
    m.again(convolved, gated, gates);
}

void localvit_backward(const int64_t* values, const double* numbers) {
    Reader r{values, numbers};
    Mix m = r.mix();
    const float *grad = r.floats(), *x = r.floats(), *convolved = r.floats(), *pooled = r.floats();
    const float* gates = r.floats();
    Mix::Gradients g{};
    for (float** to : {&g.x, &g.norm1_weight, &g.norm1_bias, &g.weight, &g.bias, &g.norm2_weight, &g.norm2_bias,
                       &g.gate_first, &g.gate_bias, &g.gate_second, &g.gate_bias2})
        *to = r.floats();
    m.backward(grad, x, convolved, pooled, gates, g);
}

}  // extern "C"
