// What the handlers of products, convolutions and maps share.
#pragma once
#include <algorithm>
#include <cstdint>

#include "levels.h"
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

}  // namespace dst
