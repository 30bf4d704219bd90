// Arrivals of a bucket as XLA custom calls: units drawn by their shares, pairs sorted, repeats
// counted; and whether sorted pairs exist. What arrivals.py and select.py say in pure JAX.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "hashing.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Ints = ffi::Buffer<ffi::S32>;
using Unsigned = ffi::Buffer<ffi::U32>;
using IntResult = ffi::ResultBuffer<ffi::S32>;
using UnsignedResult = ffi::ResultBuffer<ffi::U32>;
using FlagResult = ffi::ResultBuffer<ffi::PRED>;

namespace dst {
namespace {

constexpr int64_t kPiece = 1 << 13;  // pairs of a thread's part
constexpr uint32_t kGolden = 0x9E3779B9u;
constexpr int64_t kMostTimes = 256;
constexpr int kFew = 4;  // steps before it is searched

// Units begin .. end - 1 with cumulative shares, and what one of 2^32 random numbers falls on. A table of
// where each of so many parts of them begins leaves few units to be searched.
class Units {
 public:
  Units(const Unsigned& cumulative, int64_t begin, int64_t end)
      : cumulative_(cumulative.typed_data()), low_(begin > 0 ? cumulative_[begin - 1] : 0),
        span_((end > 0 ? cumulative_[end - 1] : 0) - low_) {
    while (bits_ < 14 && (int64_t{1} << bits_) < end - begin) bits_++;
    first_.resize((size_t{1} << bits_) + 1, uint32_t(end - 1));
    int64_t unit = begin;
    for (size_t part = 0; part + 1 < first_.size(); part++) {
      const uint32_t least = number(uint32_t(uint64_t(part) << (32 - bits_)));
      while (unit < end - 1 && cumulative_[unit] <= least) unit++;
      first_[part] = uint32_t(unit);
    }
  }

  int64_t at(uint32_t random) const {
    const uint32_t u = number(random), part = uint32_t(uint64_t(random) >> (32 - bits_));
    const uint32_t* base = cumulative_ + first_[part];  // the first that is greater than u
    for (int64_t n = int64_t{first_[part + 1]} - first_[part] + 1; n > 1;) {
      const int64_t half = n / 2;
      base += base[half - 1] <= u ? half : 0;
      n -= half;
    }
    return base - cumulative_;
  }

 private:
  uint32_t number(uint32_t random) const { return low_ + uint32_t(uint64_t(random) * span_ >> 32); }

  const uint32_t* cumulative_;
  uint32_t low_, span_;
  int bits_ = 0;
  std::vector<uint32_t> first_;
};

// Sorts numbers up to `most` by two or three digits, each part of them by a thread; `other` is as large as
// `numbers`.
void radix_sort(ffi::ThreadPool& pool, std::vector<uint32_t>& numbers, std::vector<uint32_t>& other,
                uint32_t most) {
  const int bits = 32 - __builtin_clz(most | 1), digits = bits > 24 ? 3 : 2;
  const int width = (bits + digits - 1) / digits;
  const int64_t n = int64_t(numbers.size()), values = int64_t{1} << width;
  const int64_t parts = parts_of(pool, n, kPiece);
  std::vector<int64_t> next(parts * values);  // where a part's next number with a digit goes
  const auto each = [&](int shift, const auto& f) {
    in_parts(pool, n, parts, [&](int64_t begin, int64_t end, int64_t part) {
      int64_t* own = next.data() + part * values;
      for (int64_t p = begin; p < end; p++) {
        f(numbers[p], own[numbers[p] >> shift & (values - 1)]);
      }
    });
  };
  for (int shift = 0; shift < digits * width; shift += width) {
    std::fill(next.begin(), next.end(), 0);
    each(shift, [](uint32_t, int64_t& count) { count++; });
    int64_t before = 0;
    for (int64_t d = 0; d < values; d++) {
      for (int64_t part = 0; part < parts; part++) {
        before += std::exchange(next[part * values + d], before);
      }
    }
    each(shift, [&](uint32_t number, int64_t& to) { other[to++] = number; });
    numbers.swap(other);
  }
}

// Calls f(number, how often it is there, how many others before it) for the distinct of sorted numbers,
// many at once; tells how many there are.
template <class F>
int64_t each_distinct(ffi::ThreadPool& pool, const std::vector<uint32_t>& numbers, const F& f) {
  const int64_t n = int64_t(numbers.size()), parts = (n + kPiece - 1) / kPiece;
  std::vector<int64_t> before(parts + 1, 0);
  const auto is_first = [&](int64_t p) { return p == 0 || numbers[p] != numbers[p - 1]; };
  parallel_for(pool, parts, pool.num_threads(), [&](int64_t part) {
    int64_t count = 0;
    for (int64_t p = part * kPiece; p < std::min(n, (part + 1) * kPiece); p++) count += is_first(p);
    before[part + 1] = count;
  });
  for (int64_t part = 0; part < parts; part++) before[part + 1] += before[part];
  parallel_for(pool, parts, pool.num_threads(), [&](int64_t part) {
    int64_t m = before[part];
    for (int64_t p = part * kPiece; m < before[part + 1]; p++) {
      if (!is_first(p)) continue;
      int64_t end = p + 1;
      while (end < n && numbers[end] == numbers[p]) end++;
      f(numbers[p], end - p, m++);
    }
  });
  return before[parts];
}

ffi::Error arrivals(ffi::ThreadPool pool, Unsigned random, Ints count, Ints bounds, Unsigned f,
                    Unsigned g, Unsigned salt, Unsigned block, IntResult column,
                    IntResult output, UnsignedResult time, FlagResult valid) {
  const int64_t chunk = column->element_count();
  const int64_t n_in = f.element_count(), n_out = g.element_count();
  if (int64_t(random.element_count()) != 2 * chunk || bounds.element_count() != 4 ||
      block.typed_data()[0] < 1) {
    return ffi::Error::InvalidArgument("dst_arrivals: two random numbers a pair, four bounds.");
  }
  const int32_t* at = bounds.typed_data();
  const int64_t b = at[0], b_end = at[1], a = at[2], a_end = at[3];
  if (b < 0 || b >= b_end || b_end > n_out || a < 0 || a >= a_end || a_end > n_in ||
      int64_t(salt.element_count()) != n_out) {
    return ffi::Error::InvalidArgument("dst_arrivals: the bucket must lie inside the layer.");
  }
  const int64_t n = std::clamp<int64_t>(count.typed_data()[0], 0, chunk);
  const Units outputs(g, b, b_end), columns(f, a, a_end);
  const uint32_t *first = random.typed_data(), *second = first + chunk;
  const uint32_t rows = b_end - b, width = block.typed_data()[0];
  std::vector<uint32_t> numbers(n), other(n);
  const int64_t parts = (n + kPiece - 1) / kPiece;
  parallel_for(pool, parts, pool.num_threads(), [&](int64_t part) {
    for (int64_t p = part * kPiece; p < std::min(n, (part + 1) * kPiece); p++) {
      const uint32_t o = outputs.at(first[p]) - b, i = columns.at(second[p]);
      numbers[p] = (i / width * rows + o) * width + i % width;
    }
  });
  const uint32_t most = ((uint32_t(a_end - 1) / width + 1) * rows) * width - 1;
  radix_sort(pool, numbers, other, most);
  int32_t *columns_out = column->typed_data(), *outputs_out = output->typed_data();
  uint32_t* times = time->typed_data();
  bool* valid_out = valid->typed_data();
  const uint32_t* salts = salt.typed_data();
  const int64_t m = each_distinct(pool, numbers, [&](uint32_t number, int64_t arrived, int64_t to) {
    const uint32_t row = number / width;
    const int32_t i = row / rows * width + number % width, o = b + row % rows;
    const uint32_t hash = hashed(salts[o], i);
    uint32_t least = hash;
    for (int64_t j = 1; j < std::min(arrived, kMostTimes); j++) {
      least = std::min(least, mix(hash + uint32_t(j) * kGolden));
    }
    columns_out[to] = i;
    outputs_out[to] = o;
    times[to] = least;
    valid_out[to] = true;
  });
  std::fill(columns_out + m, columns_out + chunk, int32_t(a));
  std::fill(outputs_out + m, outputs_out + chunk, int32_t(b));
  std::fill(times + m, times + chunk, 0u);
  std::fill(valid_out + m, valid_out + chunk, false);
  return ffi::Error::Success();
}

ffi::Error exists(ffi::ThreadPool pool, Ints column, Ints pointer, Ints row, Ints wanted,
                  FlagResult found) {
  const int64_t n = found->element_count(), K = column.element_count();
  const int64_t rows = int64_t(pointer.element_count()) - 1;
  if (int64_t(row.element_count()) != n || int64_t(wanted.element_count()) != n || rows < 0 ||
      pointer.typed_data()[0] < 0 || pointer.typed_data()[rows] > K) {
    return ffi::Error::InvalidArgument("dst_exists: a row and a column of an arena for each pair.");
  }
  const int32_t *c = column.typed_data(), *start = pointer.typed_data();
  const int32_t *r = row.typed_data(), *w = wanted.typed_data();
  bool* out = found->typed_data();
  parallel_for(pool, (n + kPiece - 1) / kPiece, pool.num_threads(), [&](int64_t part) {
    // Sorted pairs, as they mostly are, are met one after the other.
    int32_t row = -1, last = 0;
    const int32_t *at = c, *end = c;
    for (int64_t p = part * kPiece; p < std::min(n, (part + 1) * kPiece); p++) {
      if (r[p] < 0 || r[p] >= rows) {
        out[p] = false;
        continue;
      }
      if (r[p] != row || w[p] < last) at = c + start[row = r[p]], end = c + start[row + 1];
      for (int steps = 0; at < end && *at < w[p]; at++) {
        if (++steps == kFew) at = std::lower_bound(at, end, w[p]) - 1;
      }
      out[p] = at < end && *at == w[p];
      last = w[p];
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dst

XLA_FFI_DEFINE_HANDLER_SYMBOL(DstArrivals, dst::arrivals,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Unsigned>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Unsigned>()
                                  .Arg<Unsigned>()
                                  .Arg<Unsigned>()
                                  .Arg<Unsigned>()
                                  .Ret<Ints>()
                                  .Ret<Ints>()
                                  .Ret<Unsigned>()
                                  .Ret<ffi::Buffer<ffi::PRED>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstExists, dst::exists,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<ffi::Buffer<ffi::PRED>>());
