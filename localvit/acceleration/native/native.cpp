// The middle stage of a feed-forward network on a CPU, in as few passes through memory as possible.
//
// Maps are dense (B, N, D) tokens in raster order, in single precision. D is a multiple of LANES. A unit of work is one
// image and one block of channels, or a band of an image's rows. Each unit writes its sums to its own place, so results
// do not depend on the number of threads. Compiled on the machine that runs it (build.py), without headers of PyTorch.

#include "mix.h"

namespace {

// Returns 0, or 1 if there is not enough memory: an exception must not leave a function that Python calls.
template <class Run> int status_of(Run run) {
    try {
        run();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" {

int localvit_inference(const Arguments* a) {
    return status_of([&] { Mix(*a).inference(a->maps[0], a->maps[1]); });
}

int localvit_forward(const Arguments* a) {
    return status_of([&] { Mix(*a).forward(a->maps[0], a->maps[1], a->maps[2]); });
}

int localvit_again(const Arguments* a) {
    return status_of([&] { Mix(*a).activate_and_gate(a->maps[0], a->maps[1], false); });
}

int localvit_backward(const Arguments* a) {
    float* const* g = a->maps + 3;
    return status_of([&] {
        Mix(*a).backward(a->maps[0], a->maps[1], a->maps[2],
                         {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10]});
    });
}

}  // extern "C"
