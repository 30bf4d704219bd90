// Sums over the channels of maps, logically (N, H, W, C) and batch innermost in memory, as XLA custom
// calls: for batch normalisation.
#include <algorithm>

#include "convolve.h"
#include "handlers.h"
#include "memory.h"

namespace dst {
namespace {

constexpr int64_t kParts = 16;  // of the pixels of a map

// out (2, C): the sums of a and of a b of each channel, or with `moments` mean and variance of a.
ffi::Error channel_sums(ffi::ThreadPool pool, Floats a, Floats b, FloatResult out, bool moments,
                        int64_t threads) {
  const auto d = a.dimensions();
  if (d.size() != 4 || !(b.dimensions() == d) || int64_t(out->element_count()) != 2 * d[3]) {
    return wrong("dst_channel_sums: maps are (N, H, W, C) both, the result (2, C).");
  }
  const int64_t N = d[0], pixels = d[1] * d[2], C = d[3];
  threads = threads_for(pool, 2 * N * pixels * C, threads);
  const ConvolutionLevel& level = *dst::level().convolution;
  // The number of parts sets the order of the sums: not a matter of threads.
  const int64_t parts = std::max<int64_t>(1, std::min(kParts, pixels));
  Array<double> totals(parts * 2 * C, 0.0);
  parallel_for(pool, parts, threads, [&](int64_t part) {
    const int64_t p0 = pixels * part / parts, p1 = pixels * (part + 1) / parts;
    const Lease lease(2 * C * level.lanes);
    level.channel_sums(a.typed_data() + p0 * C * N, b.typed_data() + p0 * C * N, p1 - p0, C, N,
                       lease.data(), totals.data() + part * 2 * C);
  });
  for (int64_t c = 0; c < C; c++) {
    double one = 0, two = 0;
    for (int64_t part = 0; part < parts; part++) {
      one += totals[part * 2 * C + 2 * c];
      two += totals[part * 2 * C + 2 * c + 1];
    }
    if (moments) {
      one /= double(N * pixels);
      two = two / double(N * pixels) - one * one;
      if (two < 0) two = 0;  // a NaN stays one
    }
    out->typed_data()[c] = float(one);
    out->typed_data()[C + c] = float(two);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dst

XLA_FFI_DEFINE_HANDLER_SYMBOL(DstChannelSums, dst::channel_sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<bool>("moments")
                                  .Attr<int64_t>("threads"));
