// The rewire's exchange as XLA custom calls: the arena after connections were dropped and grown, and
// what moves with them. One pass over sorted lists; no order but theirs.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Unsigned = ffi::Buffer<ffi::U32>;
using Flags = ffi::Buffer<ffi::PRED>;
using FloatResult = ffi::ResultBuffer<ffi::F32>;
using IntResult = ffi::ResultBuffer<ffi::S32>;

namespace dst {
namespace {

// v[p] <- v[from[p]]. What stays is in order, so that nothing is read after it was written if moves to
// the left go from left to right, then moves to the right from right to left.
template <class T>
void move_in_place(T* v, const int32_t* from, int64_t K) {
  for (int64_t p = 0; p < K; p++) {
    if (from[p] > p) v[p] = v[from[p]];
  }
  for (int64_t p = K - 1; p >= 0; p--) {
    if (from[p] >= 0 && from[p] < p) v[p] = v[from[p]];
  }
}

ffi::Error exchange(Flags dropped, Ints column, Ints pointer, Ints grown_row, Ints grown_column,
                    Ints k, IntResult new_column, IntResult new_pointer, IntResult source) {
  const int64_t K = column.element_count(), rows = int64_t(pointer.element_count()) - 1;
  const bool* drop = dropped.typed_data();
  const int32_t *c = column.typed_data(), *start = pointer.typed_data();
  const int32_t *g_row = grown_row.typed_data(), *g_column = grown_column.typed_data();
  const int64_t grown = k.typed_data()[0];
  if (grown < 0 || grown > int64_t(grown_row.element_count()) ||
      std::count(drop, drop + K, true) != grown) {
    return ffi::Error::InvalidArgument("dst_exchange: as many must be dropped as are grown.");
  }
  if (rows < 0 || start[0] != 0 || start[rows] != K) {
    return ffi::Error::InvalidArgument("dst_exchange: pointer must cover the whole arena.");
  }
  int32_t *begin = new_pointer->typed_data(), *from = source->typed_data();
  int64_t n = 0, g = 0;
  const auto grow_before = [&](int64_t r, int64_t limit) {
    for (; g < grown && g_row[g] == r && g_column[g] < limit; g++) from[n++] = -1;
  };
  for (int64_t r = 0; r < rows; r++) {
    begin[r] = static_cast<int32_t>(n);
    for (int64_t p = start[r]; p < start[r + 1]; p++) {
      if (drop[p]) continue;
      grow_before(r, c[p]);
      from[n++] = static_cast<int32_t>(p);
    }
    grow_before(r, std::numeric_limits<int64_t>::max());
  }
  begin[rows] = static_cast<int32_t>(n);
  if (g != grown) {
    return ffi::Error::InvalidArgument("dst_exchange: the grown must be sorted, in existing rows.");
  }
  int32_t* to = new_column->typed_data();
  if (to != c) std::copy_n(c, K, to);
  move_in_place(to, from, K);
  for (int64_t p = g = 0; p < K; p++) {
    if (from[p] < 0) to[p] = g_column[g++];
  }
  return ffi::Error::Success();
}

ffi::Error move(Floats before, Ints source, FloatResult leaf) {
  const int64_t K = leaf->element_count();
  if (int64_t(before.element_count()) != K || int64_t(source.element_count()) != K) {
    return ffi::Error::InvalidArgument("dst_move: leaf and source have one length.");
  }
  float* v = leaf->typed_data();
  if (before.typed_data() != v) std::copy_n(before.typed_data(), K, v);
  move_in_place(v, source.typed_data(), K);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dst

XLA_FFI_DEFINE_HANDLER_SYMBOL(DstExchange, dst::exchange,
                              ffi::Ffi::Bind()
                                  .Arg<Flags>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<Ints>()
                                  .Ret<Ints>()
                                  .Ret<Ints>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstMove, dst::move,
                              ffi::Ffi::Bind().Arg<Floats>().Arg<Ints>().Ret<Floats>());
