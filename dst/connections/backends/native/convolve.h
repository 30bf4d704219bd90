// Convolutions of a sparse layer: what convolve.cc (inner loops) and convolve_handlers.cc share.
#pragma once
#include <cstdint>

namespace dst {

constexpr int64_t kMostTaps = 32;  // along one side of a kernel: bits of a kind of columns

// One connection, as the unit that gathers from it sees it.
struct Entry {
  float value;
  int32_t offset;    // channels from where its pixel begins in a row of the ring
  int32_t tap;       // which row of the kernel, in the order of `Direction::row`
  int32_t position;  // in the caller's list
};

// How one map is computed from another: y from x, or dx from delta. Maps are (H, W, C, N) in memory.
//
// Receiving pixels of one column see the same columns of the kernel inside the map they read; each
// set of them that occurs, a kind, has a list of its own. A unit's connections are sorted by row of
// the kernel, so that those inside are one range. So nothing is ever multiplied by padding.
struct Direction {
  int64_t height, width, units;     // of the map that receives
  int64_t rows, columns, channels;  // of the map that is read
  int64_t batch, taps;              // N; rows of the kernel
  const Entry* entries;
  const int32_t* begin;   // (kinds, units, taps + 1) where a unit's entries of each tap begin
  const int32_t* kind;    // (width)
  const int32_t* column;  // (width) what offset 0 stands for
  const int32_t* left;    // (width) the first column that is read
  const int32_t* right;   // (width) the one after the last
  const int32_t* row;     // (height, taps) the row that is read
  const int32_t* first;   // (height) the first tap inside
  const int32_t* last;    // (height) the one after the last
  int64_t slots;          // rows of the ring
};

// A layer for one call. Its output columns are computed a tile at a time.
struct Convolution {
  Direction forward, backward;
  int64_t down, across;  // strides
  int64_t tile;          // output columns
  int64_t groups;        // of output rows, whose weight gradients are summed apart
  int64_t connections;
};

// What a map is read as; k has a row of `channels` floats for each coefficient.
enum class Becomes {
  kItself,      // x
  kActivation,  // relu(k0 x + k1): x after batch normalisation and ReLU
  kGradient,    // k0 x + k1 other + k2: back through a batch normalisation
};
struct Source {
  const float *map, *other, *k;
  Becomes becomes;
};

// A part of the work: some groups of output rows, of samples n0 .. n0 + live - 1. The ring holds
// `width` samples of a channel next to each other, zeros after the live ones.
struct Share {
  int64_t group0, group1, n0, live, width;
};

// A thread's own memory: rings of rows of x and of delta, a vector for each connection, two for each
// unit that receives.
struct Rings {
  float *x, *delta, *sums, *lanes;
};

struct ConvolutionLevel {
  int64_t width, lanes;  // samples at a time, at most; floats of a vector
  // y of the share, and added to `totals` (groups, units, 2), unless that is null, the sums of y and
  // of y y.
  void (*forward)(const Convolution&, const Share&, const Rings&, const Source& x, float* y,
                  double* totals);
  // dx of the share's rows, and the weight gradient of each of its groups (groups, connections) added
  // to `gradient`; either may be null. With `totals`, dx goes on through the ReLU of x, an activation,
  // and the sums of that and of its products with x's map are added to them.
  void (*backward)(const Convolution&, const Share&, const Rings&, const Source& x,
                   const Source& delta, float* dx, float* gradient, double* totals);
};

namespace convolutions {
extern const ConvolutionLevel baseline, v3, v4;
}

}  // namespace dst
