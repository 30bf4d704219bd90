// What the handlers of products, convolutions and maps share.
#pragma once
#include <algorithm>
#include <cstdint>

#include "levels.h"
#include "memory.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using FloatResult = ffi::ResultBuffer<ffi::F32>;

namespace dst {

// Multiply-adds below which waking another thread costs more than it saves.
constexpr int64_t kAlone = int64_t{1} << 20;

// How many threads share `work` multiply-adds; `asked` is 0 but in tests.
inline int64_t threads_for(const ffi::ThreadPool& pool, int64_t work, int64_t asked) {
  if (asked > 0) return asked;
  return work < kAlone ? 1 : std::max<int64_t>(1, pool.num_threads());
}

inline ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(what); }

// A map as it is read: with k (2, C) as an activation; with other and k (3, C) as a gradient.
inline ffi::ErrorOr<Source> source_of(const Floats& map, const Floats* other, const Floats& k) {
  const int64_t C = map.dimensions()[3], coefficients = other ? 3 : 2;
  if (k.element_count() == 0) return Source{map.typed_data(), nullptr, nullptr, Becomes::kItself};
  if (int64_t(k.element_count()) != coefficients * C ||
      (other && other->element_count() != map.element_count())) {
    return ffi::Unexpected(wrong("dst: k is (2, C), or (3, C) beside another map; or empty."));
  }
  return Source{map.typed_data(), other ? other->typed_data() : nullptr, k.typed_data(),
                other ? Becomes::kGradient : Becomes::kActivation};
}

// The totals (parts, units, 2) of a map: out (2, units), with `count` mean and variance.
inline void write_sums(const Array<double>& totals, int64_t units, int64_t count, float* out) {
  const int64_t parts = int64_t(totals.size()) / (2 * units);
  for (int64_t u = 0; u < units; u++) {
    double one = 0, two = 0;
    for (int64_t part = 0; part < parts; part++) {
      one += totals[(part * units + u) * 2];
      two += totals[(part * units + u) * 2 + 1];
    }
    if (count) {
      one /= double(count);
      two = two / double(count) - one * one;
      if (two < 0) two = 0;  // a NaN stays one
    }
    out[u] = float(one);
    out[units + u] = float(two);
  }
}

}  // namespace dst
