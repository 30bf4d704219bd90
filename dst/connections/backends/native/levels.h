// The inner loops (kernels.cc), compiled once for each instruction set; handlers.cc picks one table.
#pragma once
#include <cstdint>

#include "convolve.h"
#include "maps.h"

#define DST_STRING_(x) #x
#define DST_STRING(x) DST_STRING_(x)

namespace dst {

// One layer's part of the arena. Virtual row b * n_out + o holds the connections of output o from
// the inputs of block b: positions pointer[row] .. pointer[row + 1] - 1 of `values` and `column`.
struct Layer {
  const float* values;
  const int32_t* column;  // input of a connection, 0 .. n_in - 1, sorted within a row
  const int32_t* pointer;
  int64_t blocks, n_out;
};

// Activations are feature-major: B floats for each unit.
struct Level {
  const char* name;
  // y[o] = sum of values[p] * x[column[p]] for the outputs o0 .. o1 - 1.
  void (*multiply)(const Layer&, const float* x, int64_t B, int64_t o0, int64_t o1, float* y);
  // dx[column[p]] += values[p] * delta[o] and gradient[p] += x[column[p]] . delta[o] for the
  // connections of block b whose input is in i0 .. i1 - 1, from output `first` on and around.
  void (*backward)(const Layer&, const float* x, const float* delta, int64_t B, int64_t b,
                   int64_t i0, int64_t i1, int64_t first, float* dx, float* gradient);
  // out[p] = x[i[p]] . delta[o[p]], 0 where i or o is negative.
  void (*gradient_on)(const int32_t* i, const int32_t* o, int64_t n, const float* x,
                      const float* delta, int64_t B, float* out);
  const ConvolutionLevel* convolution;
  const MapsLevel* maps;
};

namespace levels {
extern const Level baseline, v3, v4;  // the last two on x86-64, if the compiler knows them
}

// The best level of this CPU, or what DST_KERNELS names (baseline, v3, v4) if that is lower.
const Level& level();

}  // namespace dst
