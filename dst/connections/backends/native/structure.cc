// The rewire's merges as XLA custom calls: the best candidates of two lists, and the arena after
// connections were dropped and grown. One pass over sorted lists; no order but theirs.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "hashing.h"
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

// Candidates sorted by (row, column); those without a score >= 0 are empty and passed over.
class Candidates {
 public:
  Candidates(const Ints& row, const Ints& column, const Floats& score)
      : row_(row.typed_data()), column_(column.typed_data()), score_(score.typed_data()),
        size_(score.element_count()) {
    skip_empty();
  }
  bool end() const { return at_ == size_; }
  int32_t row() const { return row_[at_]; }
  int32_t column() const { return column_[at_]; }
  float score() const { return score_[at_]; }
  uint64_t key() const { return uint64_t(uint32_t(row())) << 32 | uint32_t(column()); }
  void next() {
    at_++;
    skip_empty();
  }

 private:
  void skip_empty() {
    while (at_ < size_ && !(score_[at_] >= 0)) at_++;
  }
  const int32_t *row_, *column_;
  const float* score_;
  int64_t size_, at_ = 0;
};

// Calls f(row, column, score) for the distinct connections of both lists, in order; where both
// have one, with the score in `a`.
template <class F>
void each_distinct(Candidates a, Candidates b, const F& f) {
  bool first = true;
  uint64_t previous = 0;
  while (!a.end() || !b.end()) {
    Candidates& from = b.end() || (!a.end() && a.key() <= b.key()) ? a : b;
    const uint64_t key = from.key();
    if (first || key != previous) f(from.row(), from.column(), from.score());
    first = false;
    previous = key;
    from.next();
  }
}

bool rows_exist(Candidates list, int64_t rows) {
  for (; !list.end(); list.next()) {
    if (list.row() < 0 || list.row() >= rows) return false;
  }
  return true;
}

ffi::Error best(Ints row, Ints column, Floats score, Ints new_row, Ints new_column,
                Floats new_score, Ints k, Unsigned salt, IntResult best_row, IntResult best_column,
                FloatResult best_score) {
  const Candidates a(row, column, score), b(new_row, new_column, new_score);
  if (!rows_exist(a, salt.element_count()) || !rows_exist(b, salt.element_count())) {
    return ffi::Error::InvalidArgument("dst_best: every candidate's row has a salt.");
  }
  const uint32_t* salts = salt.typed_data();
  const int64_t P = best_score->element_count();
  std::vector<float> scores;
  scores.reserve(score.element_count() + new_score.element_count());
  each_distinct(a, b, [&](int32_t, int32_t, float s) { scores.push_back(s); });

  const int64_t asked = std::clamp<int64_t>(k.typed_data()[0], 0, P);
  const int64_t kept = std::min<int64_t>(asked, scores.size());
  float cut = std::numeric_limits<float>::infinity();
  int64_t at_the_cut = 0;  // how many of those that score `cut` are kept: the lowest hashes
  if (kept > 0) {
    std::nth_element(scores.begin(), scores.begin() + kept - 1, scores.end(), std::greater<>());
    cut = scores[kept - 1];
    at_the_cut = kept - std::count_if(scores.begin(), scores.begin() + kept,
                                      [&](float s) { return s > cut; });
  }
  std::vector<uint32_t> hashes;
  each_distinct(a, b, [&](int32_t r, int32_t c, float s) {
    if (s == cut) hashes.push_back(hashed(salts[r], c));
  });
  uint32_t highest = 0;  // hash that is kept, and how many of those that have it
  int64_t of_the_highest = 0;
  if (at_the_cut > 0) {
    std::nth_element(hashes.begin(), hashes.begin() + at_the_cut - 1, hashes.end());
    highest = hashes[at_the_cut - 1];
    of_the_highest = at_the_cut - std::count_if(hashes.begin(), hashes.begin() + at_the_cut,
                                                [&](uint32_t h) { return h < highest; });
  }
  int32_t *rows = best_row->typed_data(), *columns = best_column->typed_data();
  float* out = best_score->typed_data();
  int64_t n = 0;
  each_distinct(a, b, [&](int32_t r, int32_t c, float s) {
    if (s < cut) return;
    if (s == cut) {
      const uint32_t hash = hashed(salts[r], c);
      if (hash > highest || (hash == highest && of_the_highest-- <= 0)) return;
    }
    rows[n] = r;
    columns[n] = c;
    out[n++] = s;
  });
  std::fill(rows + n, rows + P, std::numeric_limits<int32_t>::max());
  std::fill(columns + n, columns + P, 0);
  std::fill(out + n, out + P, -1.0f);
  return ffi::Error::Success();
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
  int32_t *to = new_column->typed_data(), *begin = new_pointer->typed_data();
  int32_t* from = source->typed_data();
  int64_t n = 0, g = 0;
  const auto grow_before = [&](int64_t r, int64_t limit) {
    for (; g < grown && g_row[g] == r && g_column[g] < limit; g++) {
      to[n] = g_column[g];
      from[n++] = -1;
    }
  };
  for (int64_t r = 0; r < rows; r++) {
    begin[r] = static_cast<int32_t>(n);
    for (int64_t p = start[r]; p < start[r + 1]; p++) {
      if (drop[p]) continue;
      grow_before(r, c[p]);
      to[n] = c[p];
      from[n++] = static_cast<int32_t>(p);
    }
    grow_before(r, std::numeric_limits<int64_t>::max());
  }
  begin[rows] = static_cast<int32_t>(n);
  if (g != grown) {
    return ffi::Error::InvalidArgument("dst_exchange: the grown must be sorted, in existing rows.");
  }
  return ffi::Error::Success();
}

// leaf[p] <- leaf[source[p]] in place. What stays is in order, so that nothing is read after it was
// written if moves to the left go from left to right, then moves to the right from right to left.
ffi::Error move(Floats before, Ints source, FloatResult leaf) {
  const int64_t K = leaf->element_count();
  if (int64_t(before.element_count()) != K || int64_t(source.element_count()) != K) {
    return ffi::Error::InvalidArgument("dst_move: leaf and source have one length.");
  }
  float* v = leaf->typed_data();
  const int32_t* from = source.typed_data();
  if (before.typed_data() != v) std::copy_n(before.typed_data(), K, v);
  for (int64_t p = 0; p < K; p++) {
    if (from[p] > p) v[p] = v[from[p]];
  }
  for (int64_t p = K - 1; p >= 0; p--) {
    if (from[p] >= 0 && from[p] < p) v[p] = v[from[p]];
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dst

XLA_FFI_DEFINE_HANDLER_SYMBOL(DstBest, dst::best,
                              ffi::Ffi::Bind()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Unsigned>()
                                  .Ret<Ints>()
                                  .Ret<Ints>()
                                  .Ret<Floats>());
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
