// Inner loops over the connections of a sparse layer, on rows of B contiguous floats.
//
// Compiled once for each instruction set with DST_LEVEL naming the table. Nothing here may have
// external linkage but the table, and no function of the standard library is used: the linker could
// keep the copy of an inline function that needs AVX-512 for everyone.
//
// Columns of the batch are taken in tiles, the rest in tiles of half the width down to one column, so
// that every column is summed in the same order by however many threads.
#include "levels.h"
#include "vectors.h"

namespace dst {
namespace {

constexpr int64_t kAhead = 6;                 // connections between a prefetch and its use
// The loops of a tile stay functions of their own: together they would spill registers.

// Fetches W columns of a row. Without effect on rows in L2, a fifth of the time on rows that are not.
template <int W, bool kWrite>
inline void prefetch(const float* p) {
  for (int k = 0; k < W; k += 16) __builtin_prefetch(p + k, kWrite);
}

// Calls f(Width<W>, first column) for all tiles of B columns.
template <int W = kTile, class F>
inline void each_tile(int64_t B, const F& f, int64_t t = 0) {
  for (; t + W <= B; t += W) f(Width<W>{}, t);
  if constexpr (W > 1) each_tile<W / 2>(B, f, t);
}

template <int W>
[[gnu::noinline]] void multiply_tile(const Layer& layer, const float* x, int64_t B, int64_t o0,
                                     int64_t o1, float* y) {
  const float* values = layer.values;
  const int32_t* column = layer.column;
  for (int64_t b = 0; b < layer.blocks; b++) {
    const int32_t* row = layer.pointer + b * layer.n_out;
    const int64_t last = int64_t{row[o1]} - 1;
    for (int64_t o = o0; o < o1; o++) {
      int64_t p = row[o];
      const int64_t end = row[o + 1];
      if (p == end && b > 0) continue;
      auto acc = b > 0 ? Tile<W>::load(y + o * B) : Tile<W>::zero();
      for (; p < end; p++) {
        const int64_t q = p + kAhead < last ? p + kAhead : last;
        __builtin_prefetch(x + column[q] * B);
        acc.add(values[p], x + column[p] * B);
      }
      acc.store(y + o * B);
    }
  }
}

// The first of the sorted column[p .. end - 1] that is at least i.
int64_t first_from(int64_t i, const int32_t* column, int64_t p, int64_t end) {
  while (p < end) {
    const int64_t middle = p + (end - p) / 2;
    if (column[middle] < i) {
      p = middle + 1;
    } else {
      end = middle;
    }
  }
  return p;
}

template <int W>
[[gnu::noinline]] void backward_tile(const Layer& layer, const float* x, const float* delta,
                                     int64_t B, int64_t b, int64_t i0, int64_t i1, int64_t first,
                                     float* dx, float* gradient) {
  const float* values = layer.values;
  const int32_t* column = layer.column;
  const int32_t* row = layer.pointer + b * layer.n_out;
  const int64_t last = int64_t{row[layer.n_out]} - 1;
  for (int64_t n = 0; n < layer.n_out; n++) {
    const int64_t o = n + first < layer.n_out ? n + first : n + first - layer.n_out;
    int64_t p = row[o];
    const int64_t end = row[o + 1];
    if (p < end && column[p] < i0) p = first_from(i0, column, p, end);
    if (p == end || column[p] >= i1) continue;
    const auto d = Tile<W>::load(delta + o * B);
    for (; p < end && column[p] < i1; p++) {
      const int64_t q = p + kAhead < last ? p + kAhead : last;
      prefetch<W, false>(x + column[q] * B);
      prefetch<W, true>(dx + column[q] * B);
      const int64_t at = column[p] * B;
      if (gradient) gradient[p] += d.dot(x + at);
      d.add_to(dx + at, values[p]);
    }
  }
}

void multiply(const Layer& layer, const float* x, int64_t B, int64_t o0, int64_t o1, float* y) {
  each_tile(B, [&](auto width, int64_t t) {
    multiply_tile<decltype(width)::value>(layer, x + t, B, o0, o1, y + t);
  });
}

void backward(const Layer& layer, const float* x, const float* delta, int64_t B, int64_t b,
              int64_t i0, int64_t i1, int64_t first, float* dx, float* gradient) {
  each_tile(B, [&](auto width, int64_t t) {
    backward_tile<decltype(width)::value>(layer, x + t, delta + t, B, b, i0, i1, first, dx + t,
                                          gradient);
  });
}

void gradient_on(const int32_t* i, const int32_t* o, int64_t n, const float* x, const float* delta,
                 int64_t B, float* out) {
  for (int64_t p = 0; p < n; p++) {
    out[p] = 0;
    const int64_t q = p + kAhead < n ? p + kAhead : p;
    if (i[q] >= 0 && o[q] >= 0) {
      prefetch<kTile, false>(x + i[q] * B);
      prefetch<kTile, false>(delta + o[q] * B);
    }
    if (i[p] < 0 || o[p] < 0) continue;
    const float *a = x + i[p] * B, *d = delta + o[p] * B;
    each_tile(B, [&](auto width, int64_t t) {
      out[p] += Tile<decltype(width)::value>::load(a + t).dot(d + t);
    });
  }
}

}  // namespace

const Level levels::DST_LEVEL = {DST_STRING(DST_LEVEL), multiply, backward, gradient_on,
                                 &convolutions::DST_LEVEL, &map_levels::DST_LEVEL};

}  // namespace dst
