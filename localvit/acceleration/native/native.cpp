// The middle stage of a feed-forward network on a CPU, in as few passes through memory as possible.
//
// Maps are dense (B, N, D) tokens in raster order, in single precision. D is a multiple of LANES. A unit of work is one
// image and one block of channels, or a band of an image's rows. Each unit writes its sums to its own place, so results
// do not depend on the number of threads. Compiled on the machine that runs it (build.py), without headers of PyTorch.

#include "mix.h"

extern "C" {

void localvit_inference(const Arguments* a) { Mix(*a).inference(a->maps[0], a->maps[1]); }

void localvit_forward(const Arguments* a) { Mix(*a).forward(a->maps[0], a->maps[1], a->maps[2]); }

void localvit_again(const Arguments* a) { Mix(*a).activate_and_gate(a->maps[0], a->maps[1], false); }

void localvit_backward(const Arguments* a) {
    float* const* g = a->maps + 3;
    Mix(*a).backward(a->maps[0], a->maps[1], a->maps[2],
                     {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10]});
}

}  // extern "C"
