// The rows that a convolution's inner loops read: included by convolve.cc once a level, so nothing here
// may have external linkage.
#pragma once
#include "convolve.h"
#include "vectors.h"

namespace dst {
namespace {

inline int64_t at_least(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Of any alignment: what a template deduces has lost that attribute of Tile's vectors.
template <class T>
T load(const float* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// The rows of a source that are being read, columns c0 .. c1 - 1, W samples of each channel.
template <int W>
class Ring {
 public:
  // For what the receiving columns w0 .. w1 - 1 of `g` read.
  Ring(const Direction& g, const Share& share, const Source& source, float* memory, int64_t w0,
       int64_t w1)
      : share_(share), source_(source), memory_(memory), stride_(g.columns * g.channels * g.batch),
        batch_(g.batch), channels_(g.channels), slots_(g.slots) {
    for (int64_t w = w0; w < w1; w++) {
      if (g.left[w] < g.right[w]) widen(g.left[w], g.right[w]);
    }
  }

  void widen(int64_t c0, int64_t c1) {
    c0_ = c0_ < c1_ ? at_most(c0_, c0) : c0;
    c1_ = at_least(c1_, c1);
  }

  int64_t next() const { return next_; }
  void begin(int64_t row) { next_ = row; }

  // Reads on up to row `high`; rows before `low` are not needed any more.
  void reach(int64_t low, int64_t high) {
    for (next_ = at_least(next_, low); next_ <= high; next_++) copy(next_);
  }

  // Where a pixel of a row begins, in channels from `memory`; the column may lie outside.
  int64_t at(int64_t row, int64_t column) const {
    return (row % slots_ * (c1_ - c0_) + column - c0_) * channels_;
  }
  const float* memory() const { return memory_; }

 private:
  void copy(int64_t row) {
    const float *map = source_.map, *other = source_.other, *k = source_.k;
    const int64_t C = channels_;
    switch (source_.becomes) {
      case Becomes::kItself:
        return fill(row, [=](auto zero, int64_t, int64_t at) {
          return load<decltype(zero)>(map + at);
        });
      case Becomes::kActivation:
        return fill(row, [=](auto zero, int64_t c, int64_t at) {
          return relu(k[c] * load<decltype(zero)>(map + at) + k[C + c]);
        });
      case Becomes::kGradient:
        return fill(row, [=](auto zero, int64_t c, int64_t at) {
          using T = decltype(zero);
          return k[c] * load<T>(map + at) + (k[C + c] * load<T>(other + at) + k[2 * C + c]);
        });
    }
  }

  // A row of f(a vector or a float of zeros, channel, where it stands in the map).
  template <class F>
  void fill(int64_t row, const F& f) {
    using T = typename Tile<W>::T;
    constexpr int L = Tile<W>::L;
    float* to = memory_ + at(row, c0_) * W;
    int64_t from = row * stride_ + c0_ * channels_ * batch_ + share_.n0;
    for (int64_t column = c0_; column < c1_; column++) {
      for (int64_t c = 0; c < channels_; c++, from += batch_, to += W) {
        if (share_.live == W) {
          for (int n = 0; n < W; n += L) *reinterpret_cast<T*>(to + n) = f(T{}, c, from + n);
        } else {
          for (int64_t n = 0; n < share_.live; n++) to[n] = f(0.0f, c, from + n);
          for (int64_t n = share_.live; n < W; n++) to[n] = 0;
        }
      }
    }
  }

  const Share& share_;
  const Source& source_;
  float* memory_;
  int64_t stride_, batch_, channels_, slots_;
  int64_t c0_ = 0, c1_ = 0, next_ = 0;
};

// The rows of which receiving row r reads some: low > high if none. `low` never falls as r grows,
// so it counts taps outside, too: dilated ones may come inside later.
struct Reach {
  int64_t low, high;
};
Reach reach_of(const Direction& g, int64_t r) {
  Reach reach{g.rows, -1};
  const int32_t* row = g.row + r * g.taps;
  for (int64_t k = 0; k < g.taps; k++) {
    reach.low = at_most(reach.low, at_least(row[k], 0));
    if (k >= g.first[r] && k < g.last[r]) reach.high = at_least(reach.high, row[k]);
  }
  return reach;
}

// A receiving pixel: where in the ring each tap's row begins for it, and its entries.
template <int W>
struct Pixel {
  int64_t start[kMostTaps];
  const int32_t *begin, *end;  // of unit u: begin[u * step], end[u * step]
  int64_t step;

  Pixel(const Direction& g, const Ring<W>& ring, int64_t r, int64_t w) : step(g.taps + 1) {
    for (int64_t k = g.first[r]; k < g.last[r]; k++) {
      start[k] = ring.at(g.row[r * g.taps + k], g.column[w]);
    }
    const int32_t* own = g.begin + g.kind[w] * g.units * step;
    begin = own + g.first[r];
    end = own + g.last[r];
  }
};

}  // namespace
}  // namespace dst
