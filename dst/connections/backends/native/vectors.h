// Vectors of the instruction set that is compiled, for the inner loops: once a level, so
// nothing here may have external linkage.
#pragma once
#include <cstdint>

namespace dst {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kTile = kLanes > 4 ? 128 : 64;  // as many sums as the registers hold

template <int W>
struct Vector {
  typedef float type __attribute__((vector_size(4 * W), aligned(4), may_alias));
};
template <>
struct Vector<1> {
  using type = float;
};

template <int L>
inline float sum(typename Vector<L>::type v) {
  if constexpr (L == 1) {
    return v;
  } else {
    struct {
      typename Vector<L / 2>::type low, high;
    } half;
    __builtin_memcpy(&half, &v, sizeof v);
    return sum<L / 2>(half.low + half.high);
  }
}

// W consecutive columns of a row.
template <int W>
struct Tile {
  static constexpr int L = W < kLanes ? W : kLanes, V = W / L;
  using T = typename Vector<L>::type;
  T v[V];

  static Tile zero() {
    Tile t;
    for (int k = 0; k < V; k++) t.v[k] = T{};
    return t;
  }
  static Tile load(const float* p) {
    Tile t;
    for (int k = 0; k < V; k++) t.v[k] = reinterpret_cast<const T*>(p)[k];
    return t;
  }
  void store(float* p) const {
    for (int k = 0; k < V; k++) reinterpret_cast<T*>(p)[k] = v[k];
  }
  void add(float s, const float* p) {
    for (int k = 0; k < V; k++) v[k] += s * reinterpret_cast<const T*>(p)[k];
  }
  void add_to(float* p, float s) const {
    for (int k = 0; k < V; k++) reinterpret_cast<T*>(p)[k] += s * v[k];
  }
  float dot(const float* p) const { return sum<L>(lanes(T{}, p)); }
  // sum + the products with p, lane by lane.
  T lanes(T sum, const float* p) const {
    T even = sum, odd = T{};
    for (int k = 0; k < V; k += 2) {
      even += v[k] * reinterpret_cast<const T*>(p)[k];
      if (k + 1 < V) odd += v[k + 1] * reinterpret_cast<const T*>(p)[k + 1];
    }
    return even + odd;
  }
};

// Of a float or of each float of a vector. NaN stays NaN: it has to reach the loss.
template <class T>
inline T relu(T u) {
  return u <= T{} ? T{} : u;
}

template <int W>
struct Width {
  static constexpr int value = W;
};

}  // namespace
}  // namespace dst
