// The lowest of many numbers as an XLA custom call, found by counting: no sort, no copy.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "hashing.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Ints = ffi::Buffer<ffi::S32>;
using Unsigned = ffi::Buffer<ffi::U32>;
using Flags = ffi::Buffer<ffi::PRED>;
using IntResult = ffi::ResultBuffer<ffi::S32>;
using FlagResult = ffi::ResultBuffer<ffi::PRED>;

namespace dst {
namespace {

constexpr int64_t kPiece = 1 << 16;  // numbers of a thread's part, at least
constexpr int kDigits[][2] = {{21, 11}, {10, 11}, {0, 10}};  // where each begins, and its bits

// The k-th lowest of some numbers, how many are equal to it, and how many of these are among the k.
struct NumberCut {
  uint32_t number;
  int64_t equal, kept;
};

// That of all for which each(begin, end, f) calls f(number), of n entries. There are k of them at least.
template <class Each>
NumberCut cut_of(ffi::ThreadPool& pool, int64_t n, int64_t parts, int64_t k, const Each& each) {
  NumberCut cut{0, 0, k};
  uint32_t mask = 0;
  for (const auto& [shift, bits] : kDigits) {
    const uint32_t values = uint32_t{1} << bits;
    std::vector<uint32_t> own(parts * values);
    in_parts(pool, n, parts, [&](int64_t begin, int64_t end, int64_t part) {
      uint32_t* counts = own.data() + part * values;
      each(begin, end, [&](uint32_t number) {
        counts[number >> shift & (values - 1)] += (number & mask) == cut.number;
      });
    });
    std::vector<int64_t> counts(values);
    for (size_t at = 0; at < own.size(); at++) counts[at % values] += own[at];
    uint32_t value = 0;
    while (value + 1 < values && cut.kept > counts[value]) cut.kept -= counts[value++];
    cut.number |= value << shift;
    mask |= (values - 1) << shift;
    cut.equal = counts[value];
  }
  return cut;
}

// What breaks ties between an arena's connections: hashes that nobody holds.
struct Ties {
  const int32_t *column, *pointer;
  const uint32_t* salt;
  int64_t rows;

  // Calls f(entry, hash) for the entries from begin on, before end, of which `among` is true.
  template <class Among, class F>
  void each(int64_t begin, int64_t end, const Among& among, const F& f) const {
    int64_t r = std::upper_bound(pointer, pointer + rows, int32_t(begin)) - pointer - 1;
    for (int64_t p = begin; p < end; p++) {
      while (p >= pointer[r + 1]) r++;
      if (among(p)) f(p, hashed(salt[r], column[p]));
    }
  }
};

ffi::Error lowest(ffi::ThreadPool pool, Unsigned order, Flags eligible, Ints k, Ints column,
                  Ints pointer, Unsigned salt, FlagResult chosen, FlagResult equal, IntResult left,
                  bool highest) {
  const int64_t n = chosen->element_count(), rows = salt.element_count();
  if (int64_t(order.element_count()) != n || int64_t(eligible.element_count()) != n) {
    return ffi::Error::InvalidArgument("dst_lowest: as many numbers as are eligible or not.");
  }
  const Ties ties{column.typed_data(), pointer.typed_data(), salt.typed_data(), rows};
  if (rows > 0 && (int64_t(column.element_count()) != n || ties.pointer[0] != 0 ||
                   int64_t(pointer.element_count()) != rows + 1 || ties.pointer[rows] != n)) {
    return ffi::Error::InvalidArgument("dst_lowest: pointer must cover the whole arena.");
  }
  const uint32_t *numbers = order.typed_data(), flip = highest ? ~uint32_t{0} : 0;
  const bool* member = eligible.typed_data();
  const int64_t parts = parts_of(pool, n, kPiece);
  const int64_t wanted = std::min<int64_t>(k.typed_data()[0], std::count(member, member + n, true));
  bool* to = chosen->typed_data();
  left->typed_data()[0] = 0;
  std::fill_n(equal->typed_data(), equal->element_count(), false);
  if (wanted <= 0) {
    std::fill_n(to, n, false);
    return ffi::Error::Success();
  }
  const NumberCut cut = cut_of(pool, n, parts, wanted, [&](int64_t begin, int64_t end, const auto& f) {
    for (int64_t p = begin; p < end; p++) {
      if (member[p]) f(numbers[p] ^ flip);
    }
  });
  const bool every = cut.kept == cut.equal;
  const auto same = [&](int64_t p) { return member[p] && (numbers[p] ^ flip) == cut.number; };
  in_parts(pool, n, parts, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t p = begin; p < end; p++) {
      const uint32_t number = numbers[p] ^ flip;
      to[p] = member[p] & ((number < cut.number) | (every & (number == cut.number)));
    }
  });
  if (every) return ffi::Error::Success();
  int64_t rest = cut.kept;
  if (equal->element_count()) {  // somebody else breaks ties
    for (int64_t p = 0; p < n; p++) equal->typed_data()[p] = same(p);
    left->typed_data()[0] = int32_t(rest);
  } else if (rows == 0) {
    for (int64_t p = 0; rest > 0; p++) {
      if (same(p)) to[p] = true, rest--;
    }
  } else {
    const NumberCut own = cut_of(pool, n, parts, rest, [&](int64_t begin, int64_t end, const auto& f) {
      ties.each(begin, end, same, [&](int64_t, uint32_t hash) { f(hash); });
    });
    rest = own.kept;
    ties.each(0, n, same, [&](int64_t p, uint32_t hash) {
      to[p] = hash < own.number || (hash == own.number && rest-- > 0);
    });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dst

XLA_FFI_DEFINE_HANDLER_SYMBOL(DstLowest, dst::lowest,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Unsigned>()
                                  .Arg<Flags>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Unsigned>()
                                  .Ret<Flags>()
                                  .Ret<Flags>()
                                  .Ret<Ints>()
                                  .Attr<bool>("highest"));
