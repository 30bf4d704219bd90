// The connections of a convolution, listed as the inner loops of convolve.cc read them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

#include "convolve.h"
#include "memory.h"

namespace dst {

// How pixels along one side receive: from base(r) + step(tap), if that lies inside.
struct Side {
  int64_t receivers, sources, taps, stride, pad, dilation;
  bool transposed;  // dx from delta

  static int64_t floor(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
  int64_t base(int64_t r) const { return transposed ? floor(r + pad, stride) : r * stride - pad; }
  int64_t step(int64_t t) const { return transposed ? -(t * dilation / stride) : t * dilation; }
  // Transposed, a pixel receives through every stride-th tap only.
  int64_t phase(int64_t t) const { return transposed ? t * dilation % stride : 0; }
  bool inside(int64_t r, int64_t t) const {
    const int64_t source = base(r) + step(t);
    const bool meets = !transposed || r + pad - floor(r + pad, stride) * stride == phase(t);
    return meets && source >= 0 && source < sources;
  }
  // Taps so that those that a pixel receives through stand side by side.
  std::vector<int64_t> order() const {
    std::vector<int64_t> taps_in_order(taps);
    for (int64_t t = 0; t < taps; t++) taps_in_order[t] = t;
    std::stable_sort(taps_in_order.begin(), taps_in_order.end(),
                     [&](int64_t a, int64_t b) { return phase(a) < phase(b); });
    return taps_in_order;
  }
};

// A channel of x is one of `inputs` of a group, in one of `depth` slices of a volume: C is
// depth x groups x inputs. An output reads the channels of its own group, in every slice.
struct Geometry {
  int64_t N, H, W, C, Ho, Wo, Co;  // x (N, H, W, C), y (N, Ho, Wo, Co)
  int64_t depth, groups, kh, kw, down, across, top, left, dilation_down, dilation_across;
  int64_t inputs() const { return C / (depth * groups); }
};

// A connection before it is in a list.
struct Link {
  float value;
  int32_t input, output;    // channels
  int16_t a, b;             // row and column of the kernel
  int32_t position;
};

// A Direction with the memory that it points to.
struct Listed {
  Direction direction;
  Array<Entry> entries;
  Array<int32_t> begin, kind, column, left, right, row, first, last;

  Listed(const Geometry& g, bool transposed, const Array<Link>& links) {
    Side down{g.Ho, g.H, g.kh, g.down, g.top, g.dilation_down, transposed};
    Side across{g.Wo, g.W, g.kw, g.across, g.left, g.dilation_across, transposed};
    if (transposed) {
      std::swap(down.receivers, down.sources);
      std::swap(across.receivers, across.sources);
    }
    direction = {};
    direction.height = down.receivers;
    direction.width = across.receivers;
    direction.units = transposed ? g.C : g.Co;
    direction.rows = down.sources;
    direction.columns = across.sources;
    direction.channels = transposed ? g.Co : g.C;
    direction.batch = g.N;
    direction.taps = g.kh;
    const int64_t reach = std::abs(down.step(g.kh - 1)) + 1;
    direction.slots = std::max<int64_t>(1, std::min(reach, down.sources));
    const auto order = down.order();
    rows_of(down, order);
    list(transposed, across, order, columns_of(across), links);
    direction.entries = entries.data();
    direction.begin = begin.data();
    direction.kind = kind.data();
    direction.column = column.data();
    direction.left = left.data();
    direction.right = right.data();
    direction.row = row.data();
    direction.first = first.data();
    direction.last = last.data();
  }

 private:
  void rows_of(const Side& side, const std::vector<int64_t>& order) {
    row.resize(side.receivers * side.taps);
    first.assign(side.receivers, 0);
    last.assign(side.receivers, 0);
    for (int64_t r = 0; r < side.receivers; r++) {
      for (int64_t k = 0; k < side.taps; k++) {
        row[r * side.taps + k] = int32_t(side.base(r) + side.step(order[k]));
        if (!side.inside(r, order[k])) continue;
        if (first[r] == last[r]) first[r] = int32_t(k);
        last[r] = int32_t(k + 1);
      }
    }
  }

  // The kinds of columns: each a set of taps, as bits.
  std::vector<uint32_t> columns_of(const Side& side) {
    std::vector<uint32_t> kinds;
    kind.resize(side.receivers);
    column.resize(side.receivers);
    left.assign(side.receivers, 0);
    right.assign(side.receivers, 0);
    for (int64_t w = 0; w < side.receivers; w++) {
      uint32_t taps = 0;
      column[w] = int32_t(side.base(w));
      for (int64_t t = 0; t < side.taps; t++) {
        if (!side.inside(w, t)) continue;
        const int32_t source = int32_t(side.base(w) + side.step(t));
        left[w] = taps ? std::min(left[w], source) : source;
        right[w] = taps ? std::max(right[w], source + 1) : source + 1;
        taps |= uint32_t{1} << t;
      }
      kind[w] = int32_t(std::find(kinds.begin(), kinds.end(), taps) - kinds.begin());
      if (kind[w] == int32_t(kinds.size())) kinds.push_back(taps);
    }
    return kinds;
  }

  // The links by (kind, unit, tap), and as they come.
  void list(bool transposed, const Side& across, const std::vector<int64_t>& order,
            const std::vector<uint32_t>& kinds, const Array<Link>& links) {
    const int64_t step = direction.taps + 1, units = direction.units;
    std::vector<int32_t> rank(order.size());
    for (size_t k = 0; k < order.size(); k++) rank[order[k]] = int32_t(k);
    begin.assign(int64_t(kinds.size()) * units * step, 0);
    int32_t count = 0;
    Array<int32_t> next(units * direction.taps);
    std::vector<int64_t> sizes(direction.taps);
    for (size_t n = 0; n < kinds.size(); n++) {
      int32_t* const own = begin.data() + n * units * step;
      std::fill(next.begin(), next.end(), 0);
      for (const Link& link : links) {
        if (!(kinds[n] >> link.b & 1)) continue;
        next[(transposed ? link.input : link.output) * direction.taps + rank[link.a]]++;
      }
      for (int64_t u = 0; u < units; u++) {
        for (int64_t k = 0; k < direction.taps; k++) {
          own[u * step + k] = count;
          count += next[u * direction.taps + k];
          next[u * direction.taps + k] = own[u * step + k];
        }
        own[u * step + step - 1] = count;
      }
      entries.resize(count);
      for (const Link& link : links) {
        if (!(kinds[n] >> link.b & 1)) continue;
        const int64_t unit = transposed ? link.input : link.output;
        const int64_t channel = transposed ? link.output : link.input;
        const int32_t k = rank[link.a];
        entries[next[unit * direction.taps + k]++] = {
            link.value, int32_t(across.step(link.b) * direction.channels + channel), k,
            link.position};
      }
    }
  }
};

}  // namespace dst
