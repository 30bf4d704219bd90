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

}  // namespace dst
