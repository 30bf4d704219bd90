// Inner loops of sparse convolutions on maps (H, W, C, N), batch innermost: see convolve.h.
//
// Rows of the map that is read are copied once into a ring of as many rows as a kernel spans, which
// stays in the L2 cache; every connection of every pixel gathers from there. Compiled once for each
// instruction set, as kernels.cc, and under the same rules.
#include "convolve.h"

#include "levels.h"
#include "vectors.h"

namespace dst {
namespace {

// Vectors that the weight gradient of a row of pixels goes over before the next ones: 64 KiB.
constexpr int64_t kSums = 64 * 1024 / (4 * kLanes);

int64_t at_least(int64_t a, int64_t b) { return a < b ? b : a; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// The rows of a map that are being read, columns c0 .. c1 - 1, W samples of each channel.
template <int W>
class Ring {
 public:
  // For what the receiving columns w0 .. w1 - 1 of `g` read.
  Ring(const Direction& g, const Share& share, const float* map, float* memory, int64_t w0, int64_t w1)
      : share_(share), map_(map), memory_(memory), stride_(g.columns * g.channels * g.batch),
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
    const float* from = map_ + row * stride_ + c0_ * channels_ * batch_ + share_.n0;
    float* to = memory_ + at(row, c0_) * W;
    const int64_t n = (c1_ - c0_) * channels_;
    if (share_.live == W) {
      for (int64_t i = 0; i < n; i++) Tile<W>::load(from + i * batch_).store(to + i * W);
    } else {
      for (int64_t i = 0; i < n; i++) {
        for (int64_t k = 0; k < share_.live; k++) to[i * W + k] = from[i * batch_ + k];
        for (int64_t k = share_.live; k < W; k++) to[i * W + k] = 0;
      }
    }
  }

  const Share& share_;
  const float* map_;
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

template <int W>
[[gnu::noinline]] void gather(const Direction& g, const Pixel<W>& pixel, const float* ring,
                              int64_t live, float* out) {
  const Entry* entries = g.entries;
  for (int64_t u = 0; u < g.units; u++, out += g.batch) {
    auto acc = Tile<W>::zero();
    const int32_t end = pixel.end[u * pixel.step];
    for (int32_t p = pixel.begin[u * pixel.step]; p < end; p++) {
      const Entry e = entries[p];
      acc.add(e.value, ring + (pixel.start[e.tap] + e.offset) * W);
    }
    if (live == W) {
      acc.store(out);
    } else {
      float all[W];
      acc.store(all);
      for (int64_t k = 0; k < live; k++) out[k] = all[k];
    }
  }
}

// Row r, columns w0 .. w1 - 1 of the map that receives.
template <int W>
void receive(const Direction& g, const Share& share, const Ring<W>& ring, int64_t r, int64_t w0,
             int64_t w1, float* out) {
  for (int64_t w = w0; w < w1; w++) {
    const Pixel<W> pixel(g, ring, r, w);
    const int64_t at = (r * g.width + w) * g.units * g.batch + share.n0;
    gather<W>(g, pixel, ring.memory(), share.live, out + at);
  }
}

// sums[position] += x . delta of the connections of units u0 .. u1 - 1, lane by lane.
template <int W>
[[gnu::noinline]] void correlate(const Direction& g, const Pixel<W>& pixel, const float* ring,
                                 const float* delta, int64_t u0, int64_t u1, float* sums) {
  using T = typename Tile<W>::T;
  const Entry* entries = g.entries;
  for (int64_t u = u0; u < u1; u++) {
    int32_t p = pixel.begin[u * pixel.step];
    const int32_t end = pixel.end[u * pixel.step];
    if (p == end) continue;
    const auto d = Tile<W>::load(delta + u * W);
    for (; p < end; p++) {
      const Entry e = entries[p];
      T* sum = reinterpret_cast<T*>(sums + int64_t{e.position} * kLanes);
      *sum = d.lanes(*sum, ring + (pixel.start[e.tap] + e.offset) * W);
    }
  }
}

// The weight gradient of output row r, columns w0 .. w1 - 1.
template <int W>
void correlate_row(const Direction& g, const Ring<W>& x, const Ring<W>& delta, int64_t r, int64_t w0,
                   int64_t w1, float* sums) {
  // With many connections the sums leave the cache: some units for the whole row, then the others.
  const int64_t step = g.taps + 1;
  for (int64_t u0 = 0, u1; u0 < g.units; u0 = u1) {
    for (u1 = u0 + 1; u1 < g.units; u1++) {
      if (g.begin[(u1 + 1) * step - 1] - g.begin[u0 * step] > kSums) break;
    }
    for (int64_t w = w0; w < w1; w++) {
      const Pixel<W> pixel(g, x, r, w);
      correlate<W>(g, pixel, x.memory(), delta.memory() + delta.at(r, w) * W, u0, u1, sums);
    }
  }
}

int64_t group_begin(const Convolution& c, int64_t group) {
  return c.forward.height * group / c.groups;
}

template <int W>
void forward_tiles(const Convolution& c, const Share& share, const Rings& rings, const float* x,
                   float* y) {
  const Direction& g = c.forward;
  for (int64_t w0 = 0; w0 < g.width; w0 += c.tile) {
    const int64_t w1 = at_most(w0 + c.tile, g.width);
    Ring<W> ring(g, share, x, rings.x, w0, w1);
    for (int64_t r = group_begin(c, share.group0); r < group_begin(c, share.group1); r++) {
      const Reach reach = reach_of(g, r);
      ring.reach(reach.low, reach.high);
      receive(g, share, ring, r, w0, w1, y);
    }
  }
}

// One tile of output columns of a share, backwards: rows of delta are read one after the other; the
// weight gradient takes each as it comes, and dx as soon as all that it reads are there.
template <int W>
class Backward {
 public:
  Backward(const Convolution& c, const Share& share, const Rings& rings, const float* x,
           const float* delta, float* gradient, int64_t w0, int64_t w1)
      : c_(c), share_(share), sums_(rings.sums), gradient_(gradient), w0_(w0), w1_(w1),
        i0_(w0 == 0 ? 0 : at_most(w0 * c.across, c.backward.width)),
        i1_(w1 == c.forward.width ? c.backward.width : at_most(w1 * c.across, c.backward.width)),
        o0_(group_begin(c, share.group0)), o1_(group_begin(c, share.group1)),
        group_(share.group0), x_(c.forward, share, x, rings.x, w0, w1),
        delta_(c.backward, share, delta, rings.delta, i0_, i1_) {
    if (gradient) delta_.widen(w0, w1);
  }

  void run(float* dx) {
    const Direction& back = c_.backward;
    const int64_t r0 = at_most(o0_ * c_.down, back.height);
    const int64_t r1 = o1_ == c_.forward.height ? back.height : at_most(o1_ * c_.down, back.height);
    int64_t begin = o0_;
    for (int64_t r = r0; dx && r < r1; r++) {
      const Reach reach = reach_of(back, r);
      if (reach.low <= reach.high) begin = at_most(begin, reach.low);
    }
    delta_.begin(begin);
    for (int64_t r = r0; dx && r < r1; r++) {
      take(reach_of(back, r).high);
      receive(back, share_, delta_, r, i0_, i1_, dx);
    }
    take(o1_ - 1);
  }

 private:
  void take(int64_t high) {
    while (delta_.next() <= high) {
      const int64_t r = delta_.next();
      delta_.reach(r, r);
      if (!gradient_ || r < o0_ || r >= o1_) continue;
      const Reach reach = reach_of(c_.forward, r);
      x_.reach(reach.low, reach.high);
      correlate_row(c_.forward, x_, delta_, r, w0_, w1_, sums_);
      if (r + 1 == group_begin(c_, group_ + 1)) flush();
    }
  }

  // The sums of a group of rows, to its share of the gradient.
  void flush() {
    using T = typename Tile<W>::T;
    float* gradient = gradient_ + group_++ * c_.connections;
    for (int64_t p = 0; p < c_.connections; p++) {
      T* lanes = reinterpret_cast<T*>(sums_ + p * kLanes);
      gradient[p] += sum<kLanes>(*lanes);
      *lanes = T{};
    }
  }

  const Convolution& c_;
  const Share& share_;
  float *sums_, *gradient_;
  const int64_t w0_, w1_, i0_, i1_, o0_, o1_;
  int64_t group_;
  Ring<W> x_, delta_;
};

template <int W>
void backward_tiles(const Convolution& c, const Share& share, const Rings& rings, const float* x,
                    const float* delta, float* dx, float* gradient) {
  if (gradient) {
    for (int64_t i = 0; i < c.connections * kLanes; i++) rings.sums[i] = 0;
  }
  for (int64_t w0 = 0; w0 < c.forward.width; w0 += c.tile) {
    const int64_t w1 = at_most(w0 + c.tile, c.forward.width);
    Backward<W>(c, share, rings, x, delta, gradient, w0, w1).run(dx);
  }
}

template <class F>
void with_width(int64_t width, const F& f) {
  if constexpr (kTile >= 128) {
    if (width == 128) return f(Width<128>{});
  }
  if (width == 64) return f(Width<64>{});
  if (width == 32) return f(Width<32>{});
  return f(Width<16>{});
}

void forward(const Convolution& c, const Share& share, const Rings& rings, const float* x, float* y) {
  with_width(share.width, [&](auto width) {
    forward_tiles<decltype(width)::value>(c, share, rings, x, y);
  });
}

void backward(const Convolution& c, const Share& share, const Rings& rings, const float* x,
              const float* delta, float* dx, float* gradient) {
  with_width(share.width, [&](auto width) {
    backward_tiles<decltype(width)::value>(c, share, rings, x, delta, dx, gradient);
  });
}

}  // namespace

const ConvolutionLevel convolutions::DST_LEVEL = {kTile, kLanes, forward, backward};

}  // namespace dst
