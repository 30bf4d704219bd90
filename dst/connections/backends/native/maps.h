// Whole maps around sparse convolutions: what maps.cc (inner loops) and maps_handlers.cc share.
#pragma once
#include <cstdint>

#include "convolve.h"

namespace dst {

// Pixels begin .. end - 1 of maps (H, W, C, N) in memory; for pooling those of the smaller map, each
// of them a window of 2x2 pixels of the larger one, whose width is `width`.
struct Pixels {
  int64_t width, channels, batch, begin, end;
};

// Two sums for each channel: (C, 2) in double, and 2 C vectors to add up in.
struct Sums {
  float* lanes;
  double* total;
};

// A map k is (2, C): u = k[0] y + k[1] is what batch normalisation makes of y.
struct MapsLevel {
  int64_t lanes;  // floats of a vector
  // The sums of a and of a b.
  void (*channel_sums)(const Pixels&, const float* a, const float* b, const Sums&);
  // The sums of |what the source becomes|, and zeros.
  void (*magnitudes)(const Pixels&, const Source&, const Sums&);
  // out = the maxima of the windows of relu(u).
  void (*pool)(const Pixels&, const float* y, const float* k, float* out);
  // du = g at the first maximum of its window if that is positive, else 0; the sums of du and of du y.
  void (*pool_backward)(const Pixels&, const float* y, const float* k, const float* g, float* du,
                        const Sums&);
  // z = relu(u + r).
  void (*join)(const Pixels&, const float* y, const float* k, const float* r, float* z);
  // du = ga + gb where z > 0, else 0; the sums of du and of du y. gb may be null, du may be ga.
  void (*join_backward)(const Pixels&, const float* ga, const float* gb, const float* z,
                        const float* y, float* du, const Sums&);
};

namespace map_levels {
extern const MapsLevel baseline, v3, v4;
}

}  // namespace dst
