// How the work of a convolution is divided: tiles, chunks of the batch, groups of rows, threads.
#pragma once
#include <algorithm>
#include <vector>

#include "levels.h"
#include "lists.h"
#include "memory.h"

namespace dst {

constexpr int64_t kRing = 320 * 1024;     // bytes that a ring should have: a third of an L2 cache
constexpr int64_t kLeastColumns = 4;      // of a tile, even if its ring is larger
constexpr int64_t kNarrow = 32;           // samples down to which the batch is cut for that
constexpr int64_t kMostGroups = 8;        // of output rows, a batch chunk
constexpr int64_t kGroup = 16;            // output pixels that a group should have

// Samples taken together: as many as the level can, fewer where a ring would leave the cache.
inline int64_t widest(const Geometry& g, const ConvolutionLevel& level) {
  const int64_t span = (g.kw - 1) * g.dilation_across + 1, slots = (g.kh - 1) * g.dilation_down + 1;
  const int64_t columns = std::min(g.W, span + (kLeastColumns - 1) * g.across);
  const int64_t channels = std::max(g.C, g.Co);
  int64_t width = level.width;
  const int64_t bytes = 4 * std::min(slots, g.H) * columns * channels;  // of a sample
  while (width > kNarrow && bytes * width > 2 * kRing) width /= 2;
  return width;
}

// Output columns of a tile.
inline int64_t tile_of(const Geometry& g, int64_t width) {
  const int64_t slots = std::min(g.H, (g.kh - 1) * g.dilation_down + 1);
  const int64_t columns = kRing / (4 * slots * std::max(g.C, g.Co) * width);
  const int64_t span = (g.kw - 1) * g.dilation_across + 1;
  const int64_t fits = std::max(kLeastColumns, (columns - span) / g.across + 1);
  const int64_t tiles = (g.Wo + fits - 1) / fits;
  return (g.Wo + tiles - 1) / tiles;
}

// The batch in chunks: the last ones as wide as they must, if that is not much wider than they are.
inline std::vector<Share> chunks_of(int64_t N, int64_t width) {
  std::vector<Share> chunks;
  for (int64_t n = 0; n < N;) {
    int64_t w = width;
    while (w > 16 && w / 2 >= N - n) w /= 2;
    if (w > 16 && N - n < w - w / 4) w /= 2;
    const int64_t live = std::min(w, N - n);
    chunks.push_back({0, 0, n, live, w});
    n += live;
  }
  return chunks;
}

// Groups of output rows, whose number sets the order of the sums: not a matter of threads.
inline int64_t groups_of(const Geometry& g, int64_t chunks) {
  const int64_t pixels = g.Ho * g.Wo;
  const int64_t wanted = std::clamp<int64_t>(pixels / kGroup, chunks == 1 ? 2 : 1, kMostGroups);
  return std::max<int64_t>(1, std::min(g.Ho, wanted));
}

// The shares: chunks, cut by groups where there are too few of them for the threads.
inline std::vector<Share> shares_of(const std::vector<Share>& chunks, int64_t groups, int64_t threads) {
  const int64_t count = int64_t(chunks.size());
  const int64_t cuts = count % threads == 0 ? 1 : std::min(groups, threads);
  std::vector<Share> shares;
  for (int64_t cut = 0; cut < cuts; cut++) {
    for (Share share : chunks) {
      share.group0 = groups * cut / cuts;
      share.group1 = groups * (cut + 1) / cuts;
      shares.push_back(share);
    }
  }
  return shares;
}

// Floats of a ring: the widest tile's columns, in all its slots.
inline int64_t ring_size(const Convolution& c, const Direction& g, int64_t width, bool back) {
  int64_t most = 0;
  for (int64_t w0 = 0; w0 < c.forward.width; w0 += c.tile) {
    const int64_t w1 = std::min(w0 + c.tile, c.forward.width);
    int64_t r0 = w0, r1 = w1, c0 = g.columns, c1 = 0;
    if (back) {
      r0 = w0 == 0 ? 0 : std::min(w0 * c.across, g.width);
      r1 = w1 == c.forward.width ? g.width : std::min(w1 * c.across, g.width);
      c0 = w0;
      c1 = w1;
    }
    for (int64_t w = r0; w < r1; w++) {
      if (g.left[w] == g.right[w]) continue;
      c0 = std::min<int64_t>(c0, g.left[w]);
      c1 = std::max<int64_t>(c1, g.right[w]);
    }
    most = std::max(most, c1 - c0);
  }
  return (most * g.slots * g.channels * width + 15) / 16 * 16;
}

// Everything that a call shares between its threads.
struct Call {
  const ConvolutionLevel& level = *dst::level().convolution;
  Geometry g;
  Listed ahead, back;
  std::vector<Share> chunks;
  Convolution c;
  int64_t x_ring, delta_ring;

  Call(const Geometry& g, const Array<Link>& links, bool dx)
      : g(g), ahead(g, false, links), back(g, true, dx ? links : Array<Link>()),
        chunks(chunks_of(g.N, widest(g, level))) {
    const int64_t width = chunks.empty() ? 16 : chunks[0].width;
    c = {ahead.direction, back.direction, g.down, g.across, tile_of(g, width),
         groups_of(g, int64_t(chunks.size())), int64_t(links.size())};
    x_ring = ring_size(c, c.forward, width, false);
    delta_ring = ring_size(c, c.backward, width, true);
  }

  // A part's own memory: of a backward pass also the ring of delta; sums for a gradient, and those of
  // the units of a map.
  int64_t floats(bool delta, bool sums, int64_t units) const {
    return x_ring + (delta ? delta_ring : 0) + (sums ? c.connections * level.lanes : 0) +
           2 * units * level.lanes;
  }
  Rings rings(const Lease& lease, bool delta, bool sums) const {
    float* const next = lease.data() + x_ring;
    float* const after = delta ? next + delta_ring : next;
    return {lease.data(), next, after, sums ? after + c.connections * level.lanes : after};
  }
};

}  // namespace dst
