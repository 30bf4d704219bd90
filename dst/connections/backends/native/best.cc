// The best candidates of two sorted lists as an XLA custom call. What is kept of the first list, which is
// long, stays where it is: few of the second ever come to it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "hashing.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Unsigned = ffi::Buffer<ffi::U32>;
using FloatResult = ffi::ResultBuffer<ffi::F32>;
using IntResult = ffi::ResultBuffer<ffi::S32>;

namespace dst {
namespace {

// Candidates in the order of (row, column).
struct List {
  int32_t *row, *column;
  float* score;
  int64_t size;

  uint64_t key(int64_t p) const { return uint64_t(uint32_t(row[p])) << 32 | uint32_t(column[p]); }
  void set(int64_t p, const List& from, int64_t q) const {
    row[p] = from.row[q];
    column[p] = from.column[q];
    score[p] = from.score[q];
  }
  // The first from p on whose key is at least this one; near p, as a rule.
  int64_t first_from(int64_t p, uint64_t wanted) const {
    int64_t step = 1;
    while (p + step < size && key(p + step) < wanted) step *= 2;
    int64_t low = p, high = std::min(p + step + 1, size);
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (key(middle) < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

constexpr int64_t kPiece = 1 << 15;  // candidates of a thread's part, at least

// Copies the members for which `keeps` is true to the front of `to`, which may be the list itself.
template <class F>
List only(const List& list, const List& to, F keeps) {
  int64_t n = 0;
  for (int64_t p = 0; p < list.size; p++) {
    if (keeps(p)) to.set(n++, list, p);
  }
  return {to.row, to.column, to.score, n};
}

// Tells of each member whether it is neither empty, that is without a score >= 0, nor a repeat.
class Distinct {
 public:
  explicit Distinct(const List& list, int64_t begin = 0) : list_(list) {
    for (int64_t p = begin - 1; p >= 0 && !any_; p--) {
      any_ = list.score[p] >= 0;
      previous_ = list.key(p);
    }
  }
  bool operator()(int64_t p) {
    if (!(list_.score[p] >= 0) || (any_ && list_.key(p) == previous_)) return false;
    any_ = true;
    previous_ = list_.key(p);
    return true;
  }

 private:
  const List list_;
  bool any_ = false;
  uint64_t previous_ = 0;
};

// Whether a list has neither before its end, as that of the best; then its size is set, and its least
// score, of no members infinity.
bool is_distinct(ffi::ThreadPool& pool, List& list, float& least) {
  int64_t n = list.size;
  while (n > 0 && !(list.score[n - 1] >= 0)) n--;
  std::vector<char> all(parts_of(pool, n, kPiece));
  std::vector<float> lowest(all.size());
  in_parts(pool, n, all.size(), [&](int64_t begin, int64_t end, int64_t part) {
    bool right = true;
    float low = std::numeric_limits<float>::infinity();
    for (int64_t p = begin; p < end; p++) {
      right &= list.score[p] >= 0;
      right &= p == 0 || list.key(p - 1) < list.key(p);
      low = std::min(low, list.score[p]);
    }
    all[part] = right;
    lowest[part] = low;
  });
  least = *std::min_element(lowest.begin(), lowest.end());
  if (std::count(all.begin(), all.end(), 0)) return false;
  list.size = n;
  return true;
}

// Which candidates are the best: those above a score, and of those that have it the lowest hashes; of
// equal hashes the first connections.
struct ScoreCut {
  float score;
  std::pair<uint32_t, uint64_t> last;
  const uint32_t* salts;

  std::pair<uint32_t, uint64_t> tie(const List& list, int64_t p) const {
    return {hashed(salts[list.row[p]], list.column[p]), list.key(p)};
  }
  bool keeps(const List& list, int64_t p) const {
    const float s = list.score[p];
    return s > score || (s == score && tie(list, p) <= last);
  }
};

// A score that somewhat more than n of a list do not exceed, likely: it is from a sample.
float score_above(const List& list, int64_t n) {
  constexpr int64_t kEvery = 64;
  std::vector<float> sample;
  for (int64_t p = 0; p < list.size; p += kEvery) sample.push_back(list.score[p]);
  const int64_t each = n / kEvery, rank = each + 4 * int64_t(std::sqrt(double(each))) + 8;
  if (rank >= int64_t(sample.size())) return std::numeric_limits<float>::infinity();
  std::nth_element(sample.begin(), sample.begin() + rank, sample.end());
  return sample[rank];
}

// The cut below the `kept` best of both. Only scores that the sample calls low are looked at, unless they
// turn out to be too few.
ScoreCut cut_of(ffi::ThreadPool& pool, const List& a, const List& b, int64_t kept, const uint32_t* salts) {
  constexpr std::pair<uint32_t, uint64_t> all{~0u, ~uint64_t{0}};
  if (kept == a.size + b.size) return {-1, all, salts};
  if (kept == 0) return {std::numeric_limits<float>::quiet_NaN(), all, salts};  // none is above it
  const auto each = [&](const auto& f) {
    for (const List* list : {&a, &b}) {
      for (int64_t p = 0; p < list->size; p++) f(*list, p);
    }
  };
  const int64_t worse = a.size + b.size - kept;
  const float most = score_above(a, worse);
  std::vector<std::vector<float>> each_low(parts_of(pool, a.size, kPiece) + 1);
  const auto gather = [&](const List& list, int64_t begin, int64_t end, int64_t part) {
    for (int64_t p = begin; p < end; p++) {
      if (list.score[p] <= most) each_low[part].push_back(list.score[p]);
    }
  };
  in_parts(pool, a.size, each_low.size() - 1,
           [&](int64_t begin, int64_t end, int64_t part) { gather(a, begin, end, part); });
  gather(b, 0, b.size, int64_t(each_low.size()) - 1);
  std::vector<float> low;
  for (const auto& own : each_low) low.insert(low.end(), own.begin(), own.end());
  if (int64_t(low.size()) <= worse) {
    low.clear();
    each([&](const List& list, int64_t p) { low.push_back(list.score[p]); });
  }
  std::nth_element(low.begin(), low.begin() + worse, low.end());
  ScoreCut cut{low[worse], all, salts};
  int64_t equal = 0, left = -worse;
  for (const float s : low) {
    left += s <= cut.score;
    equal += s == cut.score;
  }
  if (equal == left) return cut;
  std::vector<std::pair<uint32_t, uint64_t>> ties;
  each([&](const List& list, int64_t p) {
    if (list.score[p] == cut.score) ties.push_back(cut.tie(list, p));
  });
  std::nth_element(ties.begin(), ties.begin() + left - 1, ties.end());
  cut.last = ties[left - 1];
  return cut;
}

// The members of b that are not in a.
List others(const List& a, const List& b) {
  int64_t at = 0;
  return only(b, b, [&](int64_t p) {
    at = a.first_from(at, b.key(p));
    return at == a.size || a.key(at) != b.key(p);
  });
}

// Puts b into a, which has room behind its end.
void merge(const List& a, const List& b) {
  int64_t p = a.size - 1, q = b.size - 1;
  for (int64_t to = a.size + b.size - 1; q >= 0; to--) {
    const bool first = p >= 0 && a.key(p) > b.key(q);
    a.set(to, first ? a : b, first ? p-- : q--);
  }
}

// Members of a list that are to be put into another.
struct Few {
  std::vector<int32_t> row, column;
  std::vector<float> score;
  void add(const List& from, int64_t p) {
    row.push_back(from.row[p]);
    column.push_back(from.column[p]);
    score.push_back(from.score[p]);
  }
  void add(const Few& other) {
    row.insert(row.end(), other.row.begin(), other.row.end());
    column.insert(column.end(), other.column.begin(), other.column.end());
    score.insert(score.end(), other.score.begin(), other.score.end());
  }
  List list() { return {row.data(), column.data(), score.data(), int64_t(score.size())}; }
};

ffi::Error best(ffi::ThreadPool pool, Ints row, Ints column, Floats score, Ints new_row,
                Ints new_column, Floats new_score, Ints k, Unsigned salt, IntResult best_row,
                IntResult best_column, FloatResult best_score) {
  const int64_t P = best_score->element_count();
  const List out{best_row->typed_data(), best_column->typed_data(), best_score->typed_data(), P};
  const List more{new_row.typed_data(), new_column.typed_data(), new_score.typed_data(),
                  int64_t(new_score.element_count())};
  List a{row.typed_data(), column.typed_data(), score.typed_data(), int64_t(score.element_count())};
  if (a.size != P) return ffi::Error::InvalidArgument("dst_best: as many are given as are told.");
  float least = 0;
  if (!is_distinct(pool, a, least)) {
    a = only(a, out, Distinct(a));
    least = 0;
  }
  const int64_t asked = std::clamp<int64_t>(k.typed_data()[0], 0, P);
  if (a.size < asked) least = 0;  // else what is worse than all of these is not among the best
  const auto exists = [&](int32_t row) { return uint32_t(row) < uint64_t(salt.element_count()); };
  std::vector<Few> each(parts_of(pool, more.size, kPiece));
  std::vector<char> exist(each.size());
  in_parts(pool, more.size, each.size(), [&](int64_t begin, int64_t end, int64_t part) {
    Distinct first(more, begin);
    bool all = true;
    for (int64_t p = begin; p < end; p++) {
      if (!first(p)) continue;
      all &= exists(more.row[p]);
      if (more.score[p] >= least) each[part].add(more, p);
    }
    exist[part] = all;
  });
  for (size_t part = 1; part < each.size(); part++) each[0].add(each[part]);
  const bool ends_exist = a.size == 0 || (exists(a.row[0]) && exists(a.row[a.size - 1]));
  if (!ends_exist || std::count(exist.begin(), exist.end(), 0)) {
    return ffi::Error::InvalidArgument("dst_best: every candidate's row has a salt.");
  }
  List b = others(a, each[0].list());
  const ScoreCut cut = cut_of(pool, a, b, std::min(asked, a.size + b.size), salt.typed_data());
  a = only(a, out, [&](int64_t p) { return cut.keeps(a, p); });
  b = only(b, b, [&](int64_t p) { return cut.keeps(b, p); });
  merge(a, b);
  const int64_t n = a.size + b.size;
  std::fill(out.row + n, out.row + P, std::numeric_limits<int32_t>::max());
  std::fill(out.column + n, out.column + P, 0);
  std::fill(out.score + n, out.score + P, -1.0f);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dst

XLA_FFI_DEFINE_HANDLER_SYMBOL(DstBest, dst::best,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
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
