// `mix` and `hashed` of connections/hashing.py.
#pragma once
#include <cstdint>

namespace dst {

inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

inline uint32_t hashed(uint32_t salt, int32_t column) { return mix(salt ^ mix(uint32_t(column))); }

}  // namespace dst
