// Whole maps around sparse convolutions as XLA custom calls: arguments checked, work divided over
// threads. Maps are logically (N, H, W, C), batch innermost in memory: backends/maps.py asks XLA for that
// layout.
#include <algorithm>
#include <cstring>

#include "handlers.h"
#include "maps.h"
#include "memory.h"

namespace dst {
namespace {

constexpr int64_t kParts = 16;  // of the pixels of a map

using Dimensions = ffi::Span<const int64_t>;

bool is_map(const Floats& a) { return a.dimensions().size() == 4; }

bool same(const Dimensions& a, const Dimensions& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

// (2, C)
bool two_a_channel(const Dimensions& d, int64_t C) {
  return d.size() == 2 && d[0] == 2 && d[1] == C;
}

Pixels all_pixels(const Dimensions& d) { return {d[2], d[3], d[0], 0, d[1] * d[2]}; }

// y is halved into `small` and k is of its channels.
bool pools(const Floats& y, const Floats& k, const Dimensions& small) {
  if (!is_map(y) || small.size() != 4) return false;
  const auto d = y.dimensions();
  return d[1] % 2 == 0 && d[2] % 2 == 0 && two_a_channel(k.dimensions(), d[3]) &&
         small[0] == d[0] && 2 * small[1] == d[1] && 2 * small[2] == d[2] && small[3] == d[3];
}

Pixels all_windows(const Dimensions& d) { return {d[2], d[3], d[0], 0, d[1] / 2 * (d[2] / 2)}; }

// Calls f(part, its pixels) for all parts. How many sets the order of sums: not a matter of threads.
template <class F>
void each_part(ffi::ThreadPool& pool, const Pixels& all, int64_t threads, const F& f) {
  const int64_t parts = std::max<int64_t>(1, std::min(kParts, all.end));
  threads = threads_for(pool, 2 * all.batch * all.channels * all.end, threads);
  parallel_for(pool, parts, threads, [&](int64_t part) {
    Pixels own = all;
    own.begin = all.end * part / parts;
    own.end = all.end * (part + 1) / parts;
    f(part, own);
  });
}

// The two sums of each channel, which f(pixels, sums) computes of a part: out (2, C), see write_sums.
template <class F>
void sum(ffi::ThreadPool& pool, const Pixels& all, int64_t threads, int64_t count, float* out,
         const F& f) {
  const int64_t C = all.channels;
  Array<double> totals(kParts * 2 * C, 0.0);
  each_part(pool, all, threads, [&](int64_t part, const Pixels& own) {
    const Lease lease(2 * C * level().maps->lanes);
    f(own, Sums{lease.data(), totals.data() + part * 2 * C});
  });
  write_sums(totals, C, count, out);
}

// out (2, C): the sums of a and of a b of each channel, or with `moments` mean and variance of a.
ffi::Error channel_sums(ffi::ThreadPool pool, Floats a, Floats b, FloatResult out, bool moments,
                        int64_t threads) {
  if (!is_map(a) || !same(b.dimensions(), a.dimensions()) ||
      !two_a_channel(out->dimensions(), a.dimensions()[3])) {
    return wrong("dst_channel_sums: maps are (N, H, W, C) both, the result (2, C).");
  }
  const Pixels all = all_pixels(a.dimensions());
  const int64_t count = moments ? all.batch * all.end : 0;
  sum(pool, all, threads, count, out->typed_data(), [&](const Pixels& own, const Sums& to) {
    level().maps->channel_sums(own, a.typed_data(), b.typed_data(), to);
  });
  return ffi::Error::Success();
}

// out (C,): the sums of |what `map` becomes|, see `source_of`.
ffi::Error magnitudes(ffi::ThreadPool pool, Floats map, Floats other, Floats k, FloatResult out,
                      int64_t threads) {
  if (!is_map(map) || int64_t(out->element_count()) != map.dimensions()[3]) {
    return wrong("dst_magnitudes: maps are (N, H, W, C), the result (C,).");
  }
  const auto source = source_of(map, other.element_count() ? &other : nullptr, k);
  if (!source.has_value()) return source.error();
  const Pixels all = all_pixels(map.dimensions());
  Array<float> sums(2 * all.channels);  // and zeros
  sum(pool, all, threads, 0, sums.data(), [&](const Pixels& own, const Sums& to) {
    level().maps->magnitudes(own, *source, to);
  });
  std::copy_n(sums.begin(), all.channels, out->typed_data());
  return ffi::Error::Success();
}

ffi::Error pool_maps(ffi::ThreadPool pool, Floats y, Floats k, FloatResult out, int64_t threads) {
  if (!pools(y, k, out->dimensions())) {
    return wrong("dst_pool: maps are (N, H, W, C) with H and W even, k is (2, C).");
  }
  each_part(pool, all_windows(y.dimensions()), threads, [&](int64_t, const Pixels& own) {
    level().maps->pool(own, y.typed_data(), k.typed_data(), out->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error pool_backward(ffi::ThreadPool pool, Floats y, Floats k, Floats g, FloatResult du,
                         FloatResult out, int64_t threads) {
  if (!pools(y, k, g.dimensions()) || !same(du->dimensions(), y.dimensions()) ||
      !same(out->dimensions(), k.dimensions())) {
    return wrong(
        "dst_pool_backward: maps are (N, H, W, C) with H and W even, k is (2, C), g is (N, H / 2, "
        "W / 2, C), the results are as y and as k.");
  }
  const Pixels all = all_windows(y.dimensions());
  sum(pool, all, threads, 0, out->typed_data(), [&](const Pixels& own, const Sums& to) {
    level().maps->pool_backward(own, y.typed_data(), k.typed_data(), g.typed_data(),
                                du->typed_data(), to);
  });
  return ffi::Error::Success();
}

ffi::Error join(ffi::ThreadPool pool, Floats y, Floats k, Floats r, FloatResult z,
                int64_t threads) {
  const auto d = y.dimensions();
  if (!is_map(y) || !same(r.dimensions(), d) || !same(z->dimensions(), d) ||
      !two_a_channel(k.dimensions(), d[3])) {
    return wrong("dst_join: y and r are (N, H, W, C) both, as the result, k is (2, C).");
  }
  each_part(pool, all_pixels(d), threads, [&](int64_t, const Pixels& own) {
    level().maps->join(own, y.typed_data(), k.typed_data(), r.typed_data(), z->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error join_backward(ffi::ThreadPool pool, Floats ga, Floats gb, Floats z, Floats y,
                         FloatResult du, FloatResult out, int64_t threads) {
  const auto d = y.dimensions();
  const bool alone = gb.dimensions().size() == 1 && gb.element_count() == 0;
  if (!is_map(y) || !same(ga.dimensions(), d) || !(alone || same(gb.dimensions(), d)) ||
      !same(z.dimensions(), d) || !same(du->dimensions(), d) ||
      !two_a_channel(out->dimensions(), d[3])) {
    return wrong(
        "dst_join_backward: ga, z and y are (N, H, W, C) all, as the result, gb too or (0,), the "
        "sums are (2, C).");
  }
  const float* second = alone ? nullptr : gb.typed_data();
  const Pixels all = all_pixels(d);
  sum(pool, all, threads, 0, out->typed_data(), [&](const Pixels& own, const Sums& to) {
    level().maps->join_backward(own, ga.typed_data(), second, z.typed_data(), y.typed_data(),
                                du->typed_data(), to);
  });
  return ffi::Error::Success();
}

// out is a, in place or not, once `first` is there: XLA removes its own barriers on CPUs.
ffi::Error after(ffi::AnyBuffer a, ffi::AnyBuffer /* first */, ffi::Result<ffi::AnyBuffer> out) {
  if (out->size_bytes() != a.size_bytes()) return wrong("dst_after: the result is as a.");
  if (out->untyped_data() != a.untyped_data()) {
    std::memcpy(out->untyped_data(), a.untyped_data(), a.size_bytes());
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dst

XLA_FFI_DEFINE_HANDLER_SYMBOL(DstAfter, dst::after,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstChannelSums, dst::channel_sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<bool>("moments")
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstMagnitudes, dst::magnitudes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstPool, dst::pool_maps,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstPoolBackward, dst::pool_backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstJoin, dst::join,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstJoinBackward, dst::join_backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("threads"));
