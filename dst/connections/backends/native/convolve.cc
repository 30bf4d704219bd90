// Inner loops of sparse convolutions on maps (H, W, C, N), batch innermost: see convolve.h.
//
// Rows of the map that is read are copied once into a ring of as many rows as a kernel spans, which
// stays in the L2 cache; every connection of every pixel gathers from there. Compiled once for each
// instruction set, as kernels.cc, and under the same rules.
#include "convolve.h"

#include "levels.h"
#include "ring.h"
#include "vectors.h"

namespace dst {
namespace {

// Vectors that the weight gradient of a row of pixels goes over before the next ones: 64 KiB.
constexpr int64_t kSums = 64 * 1024 / (4 * kLanes);

// Sums of what each unit of a map received: a vector of float lanes, twice, then double.
template <int W>
struct Totals {
  using T = typename Tile<W>::T;
  T* lanes;
  double* total;

  Totals(float* memory, int64_t units) : lanes(reinterpret_cast<T*>(memory)), total(nullptr) {
    for (int64_t i = 0; i < 2 * units; i++) lanes[i] = T{};
  }
  void add(int64_t u, const Tile<W>& a, const Tile<W>& b) {
    for (int k = 0; k < Tile<W>::V; k++) {
      lanes[2 * u] += a.v[k];
      lanes[2 * u + 1] += a.v[k] * b.v[k];
    }
  }
  void flush(int64_t units) {
    for (int64_t i = 0; i < 2 * units; i++) {
      total[i] += sum<Tile<W>::L>(lanes[i]);
      lanes[i] = T{};
    }
  }
};

// What is done with the numbers that a unit received, where they belong in the map: nothing,
struct Nothing {
  template <int W>
  void operator()(int64_t, int64_t, int64_t, Tile<W>&) const {}
};
// the sums of y and of y y,
template <int W>
struct Moments {
  Totals<W>& sums;
  void operator()(int64_t u, int64_t, int64_t, Tile<W>& y) const { sums.add(u, y, y); }
};
// or du = dx where k0 x + k1 > 0, else 0: back through a ReLU; and the sums of du and of du x.
template <int W>
struct Masked {
  const Source& x;
  int64_t units;
  Totals<W>& sums;
  void operator()(int64_t u, int64_t at, int64_t live, Tile<W>& du) const {
    using T = typename Tile<W>::T;
    float padded[W] = {};
    const float* from = x.map + at;
    if (live < W) {
      for (int64_t n = 0; n < live; n++) padded[n] = from[n];
      from = padded;
    }
    const auto map = Tile<W>::load(from);
    const float k0 = x.k[u], k1 = x.k[units + u];
    for (int k = 0; k < Tile<W>::V; k++) du.v[k] = k0 * map.v[k] + k1 > T{} ? du.v[k] : T{};
    sums.add(u, du, map);
  }
};

template <int W, class After>
[[gnu::noinline]] void gather(const Direction& g, const Pixel<W>& pixel, const float* ring,
                              int64_t live, float* map, int64_t at, const After& after) {
  const Entry* entries = g.entries;
  for (int64_t u = 0; u < g.units; u++, at += g.batch) {
    auto acc = Tile<W>::zero();
    const int32_t end = pixel.end[u * pixel.step];
    for (int32_t p = pixel.begin[u * pixel.step]; p < end; p++) {
      const Entry e = entries[p];
      acc.add(e.value, ring + (pixel.start[e.tap] + e.offset) * W);
    }
    after(u, at, live, acc);
    if (live == W) {
      acc.store(map + at);
    } else {
      float all[W];
      acc.store(all);
      for (int64_t n = 0; n < live; n++) map[at + n] = all[n];
    }
  }
}

// Row r, columns w0 .. w1 - 1 of the map that receives.
template <int W, class After>
void receive(const Direction& g, const Share& share, const Ring<W>& ring, int64_t r, int64_t w0,
             int64_t w1, float* map, const After& after) {
  for (int64_t w = w0; w < w1; w++) {
    const Pixel<W> pixel(g, ring, r, w);
    const int64_t at = (r * g.width + w) * g.units * g.batch + share.n0;
    gather<W>(g, pixel, ring.memory(), share.live, map, at, after);
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
void forward_tiles(const Convolution& c, const Share& share, const Rings& rings, const Source& x,
                   float* y, double* totals) {
  const Direction& g = c.forward;
  Totals<W> sums(rings.lanes, totals ? g.units : 0);
  for (int64_t w0 = 0; w0 < g.width; w0 += c.tile) {
    const int64_t w1 = at_most(w0 + c.tile, g.width);
    Ring<W> ring(g, share, x, rings.x, w0, w1);
    for (int64_t group = share.group0; group < share.group1; group++) {
      for (int64_t r = group_begin(c, group); r < group_begin(c, group + 1); r++) {
        const Reach reach = reach_of(g, r);
        ring.reach(reach.low, reach.high);
        if (!totals) {
          receive(g, share, ring, r, w0, w1, y, Nothing{});
          continue;
        }
        sums.total = totals + 2 * g.units * group;
        receive(g, share, ring, r, w0, w1, y, Moments<W>{sums});
        sums.flush(g.units);
      }
    }
  }
}

// One tile of output columns of a share, backwards: rows of delta are read one after the other; the
// weight gradient takes each as it comes, and dx as soon as all that it reads are there.
template <int W>
class Backward {
 public:
  Backward(const Convolution& c, const Share& share, const Rings& rings, const Source& x,
           const Source& delta, float* gradient, int64_t w0, int64_t w1)
      : c_(c), share_(share), source_(x), sums_(rings.sums), gradient_(gradient), w0_(w0), w1_(w1),
        i0_(w0 == 0 ? 0 : at_most(w0 * c.across, c.backward.width)),
        i1_(w1 == c.forward.width ? c.backward.width : at_most(w1 * c.across, c.backward.width)),
        o0_(group_begin(c, share.group0)), o1_(group_begin(c, share.group1)),
        group_(share.group0), x_(c.forward, share, x, rings.x, w0, w1),
        delta_(c.backward, share, delta, rings.delta, i0_, i1_) {
    if (gradient) delta_.widen(w0, w1);
  }

  // `masked` are the sums of du, what dx becomes through x's ReLU; null if x has none.
  void run(float* dx, Totals<W>* masked, double* totals) {
    const Direction& back = c_.backward;
    const int64_t r0 = dx_begin(share_.group0), r1 = dx_begin(share_.group1);
    int64_t begin = o0_;
    for (int64_t r = r0; dx && r < r1; r++) {
      const Reach reach = reach_of(back, r);
      if (reach.low <= reach.high) begin = at_most(begin, reach.low);
    }
    delta_.begin(begin);
    for (int64_t group = share_.group0; dx && group < share_.group1; group++) {
      for (int64_t r = dx_begin(group); r < dx_begin(group + 1); r++) {
        take(reach_of(back, r).high);
        if (!masked) {
          receive(back, share_, delta_, r, i0_, i1_, dx, Nothing{});
          continue;
        }
        masked->total = totals + 2 * back.units * group;
        receive(back, share_, delta_, r, i0_, i1_, dx, Masked<W>{source_, back.units, *masked});
        masked->flush(back.units);
      }
    }
    take(o1_ - 1);
  }

 private:
  // The first row of dx of a group; the last group has what is left.
  int64_t dx_begin(int64_t group) const {
    const int64_t height = c_.backward.height;
    return group == c_.groups ? height : at_most(group_begin(c_, group) * c_.down, height);
  }

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
  const Source& source_;
  float *sums_, *gradient_;
  const int64_t w0_, w1_, i0_, i1_, o0_, o1_;
  int64_t group_;
  Ring<W> x_, delta_;
};

template <int W>
void backward_tiles(const Convolution& c, const Share& share, const Rings& rings, const Source& x,
                    const Source& delta, float* dx, float* gradient, double* totals) {
  if (gradient) {
    for (int64_t i = 0; i < c.connections * kLanes; i++) rings.sums[i] = 0;
  }
  Totals<W> masked(rings.lanes, totals ? c.backward.units : 0);
  for (int64_t w0 = 0; w0 < c.forward.width; w0 += c.tile) {
    const int64_t w1 = at_most(w0 + c.tile, c.forward.width);
    Backward<W>(c, share, rings, x, delta, gradient, w0, w1)
        .run(dx, totals ? &masked : nullptr, totals);
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

void forward(const Convolution& c, const Share& share, const Rings& rings, const Source& x, float* y,
             double* totals) {
  with_width(share.width, [&](auto width) {
    forward_tiles<decltype(width)::value>(c, share, rings, x, y, totals);
  });
}

void backward(const Convolution& c, const Share& share, const Rings& rings, const Source& x,
              const Source& delta, float* dx, float* gradient, double* totals) {
  with_width(share.width, [&](auto width) {
    backward_tiles<decltype(width)::value>(c, share, rings, x, delta, dx, gradient, totals);
  });
}

}  // namespace

const ConvolutionLevel convolutions::DST_LEVEL = {kTile, kLanes, forward, backward};

}  // namespace dst
