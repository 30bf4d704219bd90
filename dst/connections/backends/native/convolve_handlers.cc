// Sparse convolutions as XLA custom calls: arguments checked, connections listed for the inner
// loops of convolve.cc, work divided over threads. Maps are logically (N, H, W, C), batch innermost in
// memory: cpp.py asks XLA for that layout.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "convolve.h"
#include "handlers.h"
#include "lists.h"
#include "memory.h"
#include "work.h"

namespace dst {
namespace {

constexpr int64_t kPiece = 4096;  // connections of S at a time

// ---------------------------------------------------------------------------------------- arguments
// An attribute of every call: slices and groups of channels, then rows and columns of the kernel,
// strides, padding before, dilations.
using Taps = ffi::Span<const int64_t>;

template <class A, class B>
ffi::ErrorOr<Geometry> geometry_of(const A& x, const B& y, Taps taps) {
  const auto a = x.dimensions(), b = y.dimensions();
  if (a.size() != 4 || b.size() != 4 || a[0] != b[0]) {
    return ffi::Unexpected(wrong("dst: maps are (N, H, W, C) and (N, H', W', C')."));
  }
  if (taps.size() != 10) return ffi::Unexpected(wrong("dst: taps are 10 numbers."));
  Geometry g{a[0], a[1], a[2], a[3], b[1], b[2], b[3], taps[0], taps[1], taps[2], taps[3], taps[4],
             taps[5], taps[6], taps[7], taps[8], taps[9]};
  if (g.depth < 1 || g.groups < 1 || g.C % (g.depth * g.groups) || g.Co % g.groups) {
    return ffi::Unexpected(wrong("dst: channels are divisible by slices and groups."));
  }
  if (g.kh < 1 || g.kw < 1 || g.kh > kMostTaps || g.kw > kMostTaps) {
    return ffi::Unexpected(wrong("dst: kernels have 1 to 32 rows and columns."));
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
  const uint32_t inputs = uint32_t(g.inputs()), kw = uint32_t(g.kw), places = uint32_t(g.kh) * kw;
  const uint32_t c = uint32_t(column), tap = c / inputs, slice = tap / places, place = tap % places;
  if (slice >= uint32_t(g.depth)) return false;
  const int64_t block = slice * g.groups + output * g.groups / g.Co;  // of channels
  links.push_back({value, int32_t(c - tap * inputs + block * inputs), output, int16_t(place / kw),
                   int16_t(place % kw), position});
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

// Adds parts (parts, n), summed in double, to `out` (n).
void add_up(const Array<float>& parts, int64_t n, float* out) {
  for (int64_t p = 0; p < n; p++) {
    double sum = 0;
    for (size_t at = p; at < parts.size(); at += n) sum += parts[at];
    out[p] += float(sum);
  }
}

// ----------------------------------------------------------------------------------------- handlers
ffi::Error convolve(ffi::ThreadPool pool, Floats values, Ints column, Ints pointer, Floats x, Floats k,
                    FloatResult y, FloatResult moments, Taps taps, int64_t threads) {
  const auto g = geometry_of(x, *y, taps);
  if (!g.has_value()) return g.error();
  const auto links = links_of(*g, values, column, pointer);
  if (!links.has_value()) return links.error();
  const auto source = source_of(x, nullptr, k);
  if (!source.has_value()) return source.error();
  const int64_t units = moments->element_count() / 2;
  if (units && units != g->Co) return wrong("dst_convolve: moments are (2, C'), or empty.");
  const Call call(*g, *links, false);
  threads = threads_for(pool, (int64_t(links->size()) + g->Co) * g->N * g->Ho * g->Wo, threads);
  const int64_t each = 2 * units * call.c.groups, chunks = int64_t(call.chunks.size());
  Array<double> totals(chunks * each, 0.0);
  const auto shares = shares_of(call.chunks, call.c.groups, threads);
  parallel_for(pool, int64_t(shares.size()), threads, [&](int64_t s) {
    const Lease lease(call.floats(false, false, units));
    call.level.forward(call.c, shares[s], call.rings(lease, false, false), *source, y->typed_data(),
                       units ? totals.data() + s % chunks * each : nullptr);
  });
  if (units) write_sums(totals, units, g->N * g->Ho * g->Wo, moments->typed_data());
  return ffi::Error::Success();
}

ffi::Error convolve_backward(ffi::ThreadPool pool, Floats values, Ints column, Ints pointer,
                             Floats x, Floats k, Floats delta, Floats other, Floats delta_k,
                             Floats before, FloatResult dx, FloatResult gradient, FloatResult sums,
                             Taps taps, int64_t threads) {
  const auto g = geometry_of(x, delta, taps);
  if (!g.has_value()) return g.error();
  const auto links = links_of(*g, values, column, pointer);
  if (!links.has_value()) return links.error();
  const auto read = source_of(x, nullptr, k), seen = source_of(delta, &other, delta_k);
  if (!read.has_value()) return read.error();
  if (!seen.has_value()) return seen.error();
  const bool with_dx = dx->element_count() > 0, with_gradient = gradient->element_count() > 0;
  if (with_dx && dx->element_count() != x.element_count()) {
    return wrong("dst_convolve_backward: dx is shaped as x, or empty.");
  }
  if (with_gradient && (gradient->element_count() != values.element_count() ||
                        before.element_count() != values.element_count())) {
    return wrong("dst_convolve_backward: the gradient has K entries, or none.");
  }
  const int64_t units = with_dx && read->becomes == Becomes::kActivation ? g->C : 0;
  if (int64_t(sums->element_count()) != 2 * units) {
    return wrong("dst_convolve_backward: with dx of an activation sums are (2, C), else empty.");
  }
  const Call call(*g, *links, with_dx);
  const int64_t n = call.c.connections, groups = call.c.groups, chunks = int64_t(call.chunks.size());
  threads = threads_for(pool, 2 * (n + g->C) * g->N * g->Ho * g->Wo, threads);
  Array<float> parts;  // (chunks, groups, connections)
  if (with_gradient) parts.assign(chunks * groups * n, 0.0f);
  Array<double> totals(chunks * groups * 2 * units, 0.0);
  const auto shares = shares_of(call.chunks, groups, threads);
  parallel_for(pool, int64_t(shares.size()), threads, [&](int64_t s) {
    const int64_t chunk = s % chunks;
    const Lease lease(call.floats(true, with_gradient, units));
    call.level.backward(call.c, shares[s], call.rings(lease, true, with_gradient), *read, *seen,
                        with_dx ? dx->typed_data() : nullptr,
                        with_gradient ? parts.data() + chunk * groups * n : nullptr,
                        units ? totals.data() + chunk * groups * 2 * units : nullptr);
  });
  if (units) write_sums(totals, units, 0, sums->typed_data());
  if (!with_gradient) return ffi::Error::Success();
  if (gradient->typed_data() != before.typed_data()) {
    std::memcpy(gradient->typed_data(), before.typed_data(), before.size_bytes());
  }
  add_up(parts, n, gradient->typed_data() + pointer.typed_data()[0]);
  return ffi::Error::Success();
}

ffi::Error convolve_gradient_on(ffi::ThreadPool pool, Ints column, Ints output, Floats x, Floats k,
                                Floats delta, Floats other, Floats delta_k, FloatResult out,
                                Taps taps, int64_t threads) {
  const auto g = geometry_of(x, delta, taps);
  if (!g.has_value()) return g.error();
  const auto read = source_of(x, nullptr, k), seen = source_of(delta, &other, delta_k);
  if (!read.has_value()) return read.error();
  if (!seen.has_value()) return seen.error();
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
    const int64_t groups = call.c.groups, chunks = int64_t(call.chunks.size());
    call.c.connections = p1 - p0;  // positions, that is: those of negative pairs stay 0
    Array<float> parts((p1 - p0) * groups * chunks, 0.0f);
    const Lease lease(call.floats(true, true, 0));
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      Share share = call.chunks[chunk];
      share.group1 = groups;
      call.level.backward(call.c, share, call.rings(lease, true, true), *read, *seen, nullptr,
                          parts.data() + chunk * groups * (p1 - p0), nullptr);
    }
    std::fill_n(out->typed_data() + p0, p1 - p0, 0.0f);
    add_up(parts, p1 - p0, out->typed_data() + p0);
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
                                  .Arg<Floats>()
                                  .Ret<Floats>()
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
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>() DST_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstConvolveGradientOn, dst::convolve_gradient_on,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>() DST_ATTRIBUTES);

// The most bytes that calls have held beside arguments and results since it was asked last; forgets
// what is kept between calls.
extern "C" int64_t dst_scratch() {
  dst::Lease::forget();
  return dst::most_held.exchange(dst::held.load());
}
