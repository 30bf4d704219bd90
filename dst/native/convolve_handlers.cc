// Sparse convolutions as XLA custom calls: arguments checked, connections listed for the inner
// loops of convolve.cc, work divided over threads. Maps are logically (N, H, W, C), batch innermost in
// memory: dst/kernels.py asks XLA for that layout.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "convolve.h"
#include "handlers.h"
#include "lists.h"
#include "memory.h"

namespace dst {
namespace {

constexpr int64_t kRing = 320 * 1024;     // bytes that a ring should have: a third of an L2 cache
constexpr int64_t kLeastColumns = 4;      // of a tile, even if its ring is larger
constexpr int64_t kNarrow = 32;           // samples down to which the batch is cut for that
constexpr int64_t kMostGroups = 8;        // of output rows, a batch chunk
constexpr int64_t kGroup = 16;            // output pixels that a group should have
constexpr int64_t kPiece = 4096;          // connections of S at a time

// ------------------------------------------------------------------------------------ work, divided
// Samples taken together: as many as the level can, fewer where a ring would leave the cache.
int64_t widest(const Geometry& g, const ConvolutionLevel& level) {
  const int64_t span = (g.kw - 1) * g.dilation_across + 1, slots = (g.kh - 1) * g.dilation_down + 1;
  const int64_t columns = std::min(g.W, span + (kLeastColumns - 1) * g.across);
  const int64_t channels = std::max(g.C, g.Co);
  int64_t width = level.width;
  const int64_t bytes = 4 * std::min(slots, g.H) * columns * channels;  // of a sample
  while (width > kNarrow && bytes * width > 2 * kRing) width /= 2;
  return width;
}

// Output columns of a tile.
int64_t tile_of(const Geometry& g, int64_t width) {
  const int64_t slots = std::min(g.H, (g.kh - 1) * g.dilation_down + 1);
  const int64_t columns = kRing / (4 * slots * std::max(g.C, g.Co) * width);
  const int64_t span = (g.kw - 1) * g.dilation_across + 1;
  const int64_t fits = std::max(kLeastColumns, (columns - span) / g.across + 1);
  const int64_t tiles = (g.Wo + fits - 1) / fits;
  return (g.Wo + tiles - 1) / tiles;
}

// The batch in chunks: the last ones as wide as they must, if that is not much wider than they are.
std::vector<Share> chunks_of(int64_t N, int64_t width) {
  std::vector<Share> chunks;
  for (int64_t n = 0; n < N;) {
    int64_t w = width;
    while (w > 16 && w / 2 >= N - n) w /= 2;
    if (w > 16 && N - n < w - w / 4) w /= 2;
    const int64_t live = std::min(w, N - n);
    chunks.push_back({0, 0, n, live, w});
    n += live;
  }
  return chunks;
}

// Groups of output rows, whose number sets the order of the sums: not a matter of threads.
int64_t groups_of(const Geometry& g, int64_t chunks) {
  const int64_t pixels = g.Ho * g.Wo;
  const int64_t wanted = std::clamp<int64_t>(pixels / kGroup, chunks == 1 ? 2 : 1, kMostGroups);
  return std::max<int64_t>(1, std::min(g.Ho, wanted));
}

// The shares: chunks, cut by groups where there are too few of them for the threads.
std::vector<Share> shares_of(const std::vector<Share>& chunks, int64_t groups, int64_t threads) {
  const int64_t count = int64_t(chunks.size());
  const int64_t cuts = count % threads == 0 ? 1 : std::min(groups, threads);
  std::vector<Share> shares;
  for (int64_t cut = 0; cut < cuts; cut++) {
    for (Share share : chunks) {
      share.group0 = groups * cut / cuts;
      share.group1 = groups * (cut + 1) / cuts;
      shares.push_back(share);
    }
  }
  return shares;
}

// Floats of a ring: the widest tile's columns, in all its slots.
int64_t ring_size(const Convolution& c, const Direction& g, int64_t width, bool back) {
  int64_t most = 0;
  for (int64_t w0 = 0; w0 < c.forward.width; w0 += c.tile) {
    const int64_t w1 = std::min(w0 + c.tile, c.forward.width);
    int64_t r0 = w0, r1 = w1, c0 = g.columns, c1 = 0;
    if (back) {
      r0 = w0 == 0 ? 0 : std::min(w0 * c.across, g.width);
      r1 = w1 == c.forward.width ? g.width : std::min(w1 * c.across, g.width);
      c0 = w0;
      c1 = w1;
    }
    for (int64_t w = r0; w < r1; w++) {
      if (g.left[w] == g.right[w]) continue;
      c0 = std::min<int64_t>(c0, g.left[w]);
      c1 = std::max<int64_t>(c1, g.right[w]);
    }
    most = std::max(most, c1 - c0);
  }
  return (most * g.slots * g.channels * width + 15) / 16 * 16;
}

// ---------------------------------------------------------------------------------------- arguments
// An attribute of every call: rows and columns of the kernel, strides, padding before, dilations.
using Taps = ffi::Span<const int64_t>;

template <class A, class B>
ffi::ErrorOr<Geometry> geometry_of(const A& x, const B& y, Taps taps) {
  const auto a = x.dimensions(), b = y.dimensions();
  if (a.size() != 4 || b.size() != 4 || a[0] != b[0]) {
    return ffi::Unexpected(wrong("dst: maps are (N, H, W, C) and (N, H', W', C')."));
  }
  if (taps.size() != 8) return ffi::Unexpected(wrong("dst: taps are 8 numbers."));
  Geometry g{a[0], a[1], a[2], a[3], b[1], b[2], b[3], taps[0], taps[1], taps[2], taps[3], taps[4],
             taps[5], taps[6], taps[7]};
  if (g.kh < 1 || g.kw < 1 || g.kh > kMostTaps || g.kw > kMostTaps) {
    return ffi::Unexpected(wrong("dst: kernels have 1 to 11 rows and columns."));
  }
  if (g.down < 1 || g.across < 1 || g.dilation_down < 1 || g.dilation_across < 1) {
    return ffi::Unexpected(wrong("dst: strides and dilations are at least 1."));
  }
  for (int64_t size : {a[1], a[2], a[3], b[1], b[2], b[3]}) {
    if (size >= int64_t{1} << 24) return ffi::Unexpected(wrong("dst: maps have sides below 2^24."));
  }
  return g;
}

// Adds the connection (column, output) to the links: false if the column lies outside.
bool add_link(const Geometry& g, int32_t column, int32_t output, float value, int32_t position,
              Array<Link>& links) {
  const uint32_t C = uint32_t(g.C), kw = uint32_t(g.kw), c = uint32_t(column), tap = c / C;
  if (c >= uint32_t(g.kh * g.kw) * C) return false;
  links.push_back({value, int32_t(c - tap * C), output, int16_t(tap / kw), int16_t(tap % kw),
                   position});
  return true;
}

ffi::ErrorOr<Array<Link>> links_of(const Geometry& g, const Floats& values, const Ints& column,
                                   const Ints& pointer) {
  const int64_t K = values.element_count();
  const int32_t* p = pointer.typed_data();
  if (int64_t(pointer.element_count()) != g.Co + 1) {
    return ffi::Unexpected(wrong("dst: pointer must have C' + 1 entries, the row of each output."));
  }
  if (int64_t(column.element_count()) != K || p[0] < 0 || p[g.Co] < p[0] || p[g.Co] > K) {
    return ffi::Unexpected(wrong("dst: pointer must lie in the arena's values and columns."));
  }
  Array<Link> links;
  links.reserve(p[g.Co] - p[0]);
  for (int64_t o = 0; o < g.Co; o++) {
    for (int64_t k = p[o]; k < p[o + 1]; k++) {
      if (!add_link(g, column.typed_data()[k], int32_t(o), values.typed_data()[k],
                    int32_t(k - p[0]), links)) {
        return ffi::Unexpected(wrong("dst: a column lies outside of its kernel."));
      }
    }
  }
  return links;
}

// Everything that a call shares between its threads.
struct Call {
  const ConvolutionLevel& level = *dst::level().convolution;
  Geometry g;
  Listed ahead, back;
  std::vector<Share> chunks;
  Convolution c;
  int64_t x_ring, delta_ring;

  Call(const Geometry& g, const Array<Link>& links, bool dx)
      : g(g), ahead(g, false, links), back(g, true, dx ? links : Array<Link>()),
        chunks(chunks_of(g.N, widest(g, level))) {
    const int64_t width = chunks.empty() ? 16 : chunks[0].width;
    c = {ahead.direction, back.direction, g.down, g.across, tile_of(g, width),
         groups_of(g, int64_t(chunks.size())), int64_t(links.size())};
    x_ring = ring_size(c, c.forward, width, false);
    delta_ring = ring_size(c, c.backward, width, true);
  }

  // A part's own memory: of a backward pass also the ring of delta, and sums for a gradient.
  int64_t floats(bool delta, bool sums) const {
    return x_ring + (delta ? delta_ring : 0) + (sums ? c.connections * level.lanes : 0);
  }
  Rings rings(const Lease& lease, bool delta) const {
    float* const next = lease.data() + x_ring;
    return {lease.data(), next, delta ? next + delta_ring : next};
  }
};

// ----------------------------------------------------------------------------------------- handlers
ffi::Error convolve(ffi::ThreadPool pool, Floats values, Ints column, Ints pointer, Floats x,
                    FloatResult y, Taps taps, int64_t threads) {
  const auto g = geometry_of(x, *y, taps);
  if (!g.has_value()) return g.error();
  const auto links = links_of(*g, values, column, pointer);
  if (!links.has_value()) return links.error();
  const Call call(*g, *links, false);
  threads = threads_for(pool, (int64_t(links->size()) + g->Co) * g->N * g->Ho * g->Wo, threads);
  const auto shares = shares_of(call.chunks, call.c.groups, threads);
  parallel_for(pool, int64_t(shares.size()), threads, [&](int64_t s) {
    const Lease lease(call.floats(false, false));
    call.level.forward(call.c, shares[s], call.rings(lease, false), x.typed_data(),
                       y->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error convolve_backward(ffi::ThreadPool pool, Floats values, Ints column, Ints pointer,
                             Floats x, Floats delta, Floats before, FloatResult dx, FloatResult gradient,
                             Taps taps, int64_t threads) {
  const auto g = geometry_of(x, delta, taps);
  if (!g.has_value()) return g.error();
  const auto links = links_of(*g, values, column, pointer);
  if (!links.has_value()) return links.error();
  const bool with_dx = dx->element_count() > 0, with_gradient = gradient->element_count() > 0;
  if (with_dx && dx->element_count() != x.element_count()) {
    return wrong("dst_convolve_backward: dx is shaped as x, or empty.");
  }
  if (with_gradient && (gradient->element_count() != values.element_count() ||
                        before.element_count() != values.element_count())) {
    return wrong("dst_convolve_backward: the gradient has K entries, or none.");
  }
  const Call call(*g, *links, with_dx);
  const int64_t n = call.c.connections, groups = call.c.groups;
  threads = threads_for(pool, 2 * (n + g->C) * g->N * g->Ho * g->Wo, threads);
  Array<float> sums;  // (chunks, groups, connections)
  if (with_gradient) sums.assign(call.chunks.size() * groups * n, 0.0f);
  const auto shares = shares_of(call.chunks, groups, threads);
  parallel_for(pool, int64_t(shares.size()), threads, [&](int64_t s) {
    const int64_t chunk = s % int64_t(call.chunks.size());
    const Lease lease(call.floats(true, with_gradient));
    call.level.backward(call.c, shares[s], call.rings(lease, true), x.typed_data(),
                        delta.typed_data(),
                        with_dx ? dx->typed_data() : nullptr,
                        with_gradient ? sums.data() + chunk * groups * n : nullptr);
  });
  if (!with_gradient) return ffi::Error::Success();
  if (gradient->typed_data() != before.typed_data()) {
    std::memcpy(gradient->typed_data(), before.typed_data(), before.size_bytes());
  }
  float* own = gradient->typed_data() + pointer.typed_data()[0];
  for (int64_t p = 0; p < n; p++) {
    double sum = 0;
    for (size_t part = 0; part < call.chunks.size() * groups; part++) sum += sums[part * n + p];
    own[p] += float(sum);
  }
  return ffi::Error::Success();
}

ffi::Error convolve_gradient_on(ffi::ThreadPool pool, Ints column, Ints output, Floats x,
                                Floats delta, FloatResult out, Taps taps, int64_t threads) {
  const auto g = geometry_of(x, delta, taps);
  if (!g.has_value()) return g.error();
  const int64_t n = out->element_count();
  if (int64_t(column.element_count()) != n || int64_t(output.element_count()) != n) {
    return wrong("dst_convolve_gradient_on: column, output and the result have one length.");
  }
  threads = threads_for(pool, n * g->N * g->Ho * g->Wo, threads);
  const int64_t pieces = std::min(n, std::max(threads, (n + kPiece - 1) / kPiece));
  std::atomic<bool> outside{false};
  parallel_for(pool, pieces, threads, [&](int64_t piece) {
    const int64_t p0 = n * piece / pieces, p1 = n * (piece + 1) / pieces;
    Array<Link> links;
    links.reserve(p1 - p0);
    for (int64_t p = p0; p < p1; p++) {
      const int32_t i = column.typed_data()[p], o = output.typed_data()[p];
      if (i < 0 || o < 0) continue;
      if (o >= g->Co || !add_link(*g, i, o, 0.0f, int32_t(p - p0), links)) outside = true;
    }
    if (outside) return;
    Call call(*g, links, false);
    const int64_t groups = call.c.groups;
    call.c.connections = p1 - p0;  // positions, that is: those of negative pairs stay 0
    Array<float> sums((p1 - p0) * groups * call.chunks.size(), 0.0f);
    const Lease lease(call.floats(true, true));
    for (size_t k = 0; k < call.chunks.size(); k++) {
      Share share = call.chunks[k];
      share.group1 = groups;
      call.level.backward(call.c, share, call.rings(lease, true), x.typed_data(),
                          delta.typed_data(), nullptr, sums.data() + k * groups * (p1 - p0));
    }
    for (int64_t p = 0; p < p1 - p0; p++) {
      double sum = 0;
      for (size_t part = 0; part < call.chunks.size() * groups; part++) {
        sum += sums[part * (p1 - p0) + p];
      }
      out->typed_data()[p0 + p] = float(sum);
    }
  });
  if (outside) return wrong("dst_convolve_gradient_on: a pair lies outside of the kernel.");
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dst

#define DST_ATTRIBUTES .Attr<ffi::Span<const int64_t>>("taps").Attr<int64_t>("threads")

XLA_FFI_DEFINE_HANDLER_SYMBOL(DstConvolve, dst::convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Ret<Floats>() DST_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstConvolveBackward, dst::convolve_backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>() DST_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstConvolveGradientOn, dst::convolve_gradient_on,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>() DST_ATTRIBUTES);

// The most bytes that calls have held beside arguments and results since it was asked last; forgets
// what is kept between calls.
extern "C" int64_t dst_scratch() {
  dst::Lease::forget();
  return dst::most_held.exchange(dst::held.load());
}
