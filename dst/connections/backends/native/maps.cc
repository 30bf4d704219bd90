// Inner loops over whole maps (H, W, C, N), batch innermost: see maps.h. Compiled once for each
// instruction set, as kernels.cc, and under the same rules.
#include "maps.h"

#include "levels.h"
#include "vectors.h"

namespace dst {
namespace {

constexpr int64_t kSummed = 16;  // pixels that are summed in float

// W samples of a channel.
template <int W>
using Samples = typename Vector<W>::type;

template <int W>
Samples<W> load(const float* p) {
  return *reinterpret_cast<const Samples<W>*>(p);
}

template <int W>
void store(float* p, Samples<W> v) {
  *reinterpret_cast<Samples<W>*>(p) = v;
}

// NaN stays NaN, as in relu.
template <class T>
T larger(T a, T b) {
  return (a > b) | (a != a) ? a : b;
}

// What a few samples of a channel add to its two sums.
template <int W>
struct Terms {
  Samples<W> one, two;
};

// f(width, n) for samples n .. n + width - 1, vectors first, single ones after the last.
template <class F>
void each_sample(int64_t N, const F& f) {
  int64_t n = 0;
  for (; n + kLanes <= N; n += kLanes) f(Width<kLanes>{}, n);
  for (; n < N; n++) f(Width<1>{}, n);
}

template <class F>
void each_channel(const Pixels& pixels, const F& f) {
  for (int64_t p = pixels.begin; p < pixels.end; p++) {
    for (int64_t c = 0; c < pixels.channels; c++) f(p, c);
  }
}

// The sums over pixels and samples of the terms f(p, c)(width, n): float lanes over a few pixels, then
// double. In float alone batch normalisation would lose a digit.
template <class F>
void sum_channels(const Pixels& pixels, const Sums& sums, const F& f) {
  using T = Samples<kLanes>;
  T* const lanes = reinterpret_cast<T*>(sums.lanes);
  const int64_t count = 2 * pixels.channels, last = pixels.channels - 1;
  for (int64_t i = 0; i < count; i++) lanes[i] = T{}, sums.total[i] = 0;
  each_channel(pixels, [&](int64_t p, int64_t c) {
    const auto terms = f(p, c);
    double* const total = sums.total + 2 * c;
    T one = lanes[2 * c], two = lanes[2 * c + 1];
    each_sample(pixels.batch, [&](auto width, int64_t n) {
      const auto term = terms(width, n);
      if constexpr (decltype(width)::value == 1) {
        total[0] += term.one;
        total[1] += term.two;
      } else {
        one += term.one;
        two += term.two;
      }
    });
    lanes[2 * c] = one;
    lanes[2 * c + 1] = two;
    const bool full = (p - pixels.begin) % kSummed == kSummed - 1 || p + 1 == pixels.end;
    if (c != last || !full) return;
    for (int64_t i = 0; i < count; i++) {
      for (int k = 0; k < kLanes; k++) sums.total[i] += sums.lanes[i * kLanes + k];
      lanes[i] = T{};
    }
  });
}

// A channel's part of k.
struct Coefficients {
  float scale, shift;

  Coefficients(const float* k, int64_t c, int64_t C) : scale(k[c]), shift(k[C + c]) {}
  template <class T>
  T operator()(T y) const {
    return scale * y + shift;
  }
};

// Where the channels of the pixels of window p begin, in row-major order.
struct Window {
  int64_t at[4];

  Window(const Pixels& pixels, int64_t p, int64_t c) {
    const int64_t half = pixels.width / 2, pixel = pixels.channels * pixels.batch;
    const int64_t corner = 2 * (p / half) * pixels.width + 2 * (p % half);
    const int64_t first = corner * pixel + c * pixels.batch, row = pixels.width * pixel;
    at[0] = first;
    at[1] = first + pixel;
    at[2] = first + row;
    at[3] = first + row + pixel;
  }
};

int64_t index(const Pixels& pixels, int64_t p, int64_t c) {
  return (p * pixels.channels + c) * pixels.batch;
}

void channel_sums(const Pixels& pixels, const float* a, const float* b, const Sums& sums) {
  sum_channels(pixels, sums, [=](int64_t p, int64_t c) {
    const int64_t at = index(pixels, p, c);
    return [=](auto width, int64_t n) {
      constexpr int W = decltype(width)::value;
      const auto v = load<W>(a + at + n);
      return Terms<W>{v, v * load<W>(b + at + n)};
    };
  });
}

// The sums of the absolute values of read(c)(width, where it stands in the map).
template <class F>
void sum_magnitudes(const Pixels& pixels, const Sums& sums, const F& read) {
  sum_channels(pixels, sums, [=](int64_t p, int64_t c) {
    const int64_t at = index(pixels, p, c);
    const auto value = read(c);
    return [=](auto width, int64_t n) {
      constexpr int W = decltype(width)::value;
      const Samples<W> v = value(width, at + n), zero{};
      return Terms<W>{v < zero ? -v : v, zero};
    };
  });
}

void magnitudes(const Pixels& pixels, const Source& source, const Sums& sums) {
  const float *map = source.map, *other = source.other, *k = source.k;
  const int64_t C = pixels.channels;
  switch (source.becomes) {
    case Becomes::kItself:
      return sum_magnitudes(pixels, sums, [=](int64_t) {
        return [=](auto width, int64_t at) { return load<decltype(width)::value>(map + at); };
      });
    case Becomes::kActivation:
      return sum_magnitudes(pixels, sums, [=](int64_t c) {
        const Coefficients u(k, c, C);
        return [=](auto width, int64_t at) {
          return relu(u(load<decltype(width)::value>(map + at)));
        };
      });
    case Becomes::kGradient:
      return sum_magnitudes(pixels, sums, [=](int64_t c) {
        const float a = k[c], b = k[C + c], d = k[2 * C + c];
        return [=](auto width, int64_t at) {
          constexpr int W = decltype(width)::value;
          return a * load<W>(map + at) + (b * load<W>(other + at) + d);
        };
      });
  }
}

void pool(const Pixels& pixels, const float* y, const float* k, float* out) {
  each_channel(pixels, [=](int64_t p, int64_t c) {
    const Coefficients u(k, c, pixels.channels);
    const Window window(pixels, p, c);
    float* const to = out + index(pixels, p, c);
    each_sample(pixels.batch, [=](auto width, int64_t n) {
      constexpr int W = decltype(width)::value;
      auto most = relu(u(load<W>(y + window.at[0] + n)));
      for (int i = 1; i < 4; i++) most = larger(most, relu(u(load<W>(y + window.at[i] + n))));
      store<W>(to + n, most);
    });
  });
}

void pool_backward(const Pixels& pixels, const float* y, const float* k, const float* g, float* du,
                   const Sums& sums) {
  sum_channels(pixels, sums, [=](int64_t p, int64_t c) {
    const Coefficients u(k, c, pixels.channels);
    const Window window(pixels, p, c);
    const float* const from = g + index(pixels, p, c);
    return [=](auto width, int64_t n) {
      constexpr int W = decltype(width)::value;
      using T = Samples<W>;
      T read[4], activation[4], most;
      for (int i = 0; i < 4; i++) {
        read[i] = load<W>(y + window.at[i] + n);
        activation[i] = relu(u(read[i]));
        most = i == 0 ? activation[0] : larger(most, activation[i]);
      }
      T left = most > T{} ? load<W>(from + n) : T{};  // for the first maximum
      Terms<W> terms{T{}, T{}};
      for (int i = 0; i < 4; i++) {
        const T own = activation[i] == most ? left : T{};
        left = activation[i] == most ? T{} : left;
        store<W>(du + window.at[i] + n, own);
        terms.one += own;
        terms.two += own * read[i];
      }
      return terms;
    };
  });
}

void join(const Pixels& pixels, const float* y, const float* k, const float* r, float* z) {
  each_channel(pixels, [=](int64_t p, int64_t c) {
    const Coefficients u(k, c, pixels.channels);
    const int64_t at = index(pixels, p, c);
    each_sample(pixels.batch, [=](auto width, int64_t n) {
      constexpr int W = decltype(width)::value;
      store<W>(z + at + n, relu(u(load<W>(y + at + n)) + load<W>(r + at + n)));
    });
  });
}

void join_backward(const Pixels& pixels, const float* ga, const float* gb, const float* z,
                   const float* y, float* du, const Sums& sums) {
  sum_channels(pixels, sums, [=](int64_t p, int64_t c) {
    const int64_t at = index(pixels, p, c);
    return [=](auto width, int64_t n) {
      constexpr int W = decltype(width)::value;
      using T = Samples<W>;
      T g = load<W>(ga + at + n);
      if (gb) g += load<W>(gb + at + n);
      g = load<W>(z + at + n) > T{} ? g : T{};
      store<W>(du + at + n, g);
      return Terms<W>{g, g * load<W>(y + at + n)};
    };
  });
}

}  // namespace

const MapsLevel map_levels::DST_LEVEL = {
    kLanes, channel_sums, magnitudes, pool, pool_backward, join, join_backward};

}  // namespace dst
