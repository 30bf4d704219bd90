// Work shared with the threads of XLA's pool, without ever waiting for one that has not started.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace dst {

// Calls part(0), ..., part(parts - 1), once each, on at most `threads` threads. All of them take the
// next part from one counter, the calling one too, so that it finishes alone if the pool is busy
// (with handlers that wait as this one does, say); it waits only for parts that others have begun.
// A task that starts late finds no part left: what it touches, it owns.
template <class F>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t parts, int64_t threads, const F& part) {
  if (std::min(parts, threads) <= 1) {
    for (int64_t p = 0; p < parts; p++) part(p);
    return;
  }
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, parts, &part] {
    for (int64_t p; (p = progress->next.fetch_add(1)) < parts;) {
      part(p);
      if (progress->done.fetch_add(1) + 1 == parts) {
        std::lock_guard<std::mutex> lock(progress->mutex);
        progress->all_done.notify_all();
      }
    }
  };
  for (int64_t helper = 1; helper < std::min(parts, threads); helper++) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done.load() == parts; });
}

// How many parts n entries make, one a thread, none of fewer than `least`.
inline int64_t parts_of(xla::ffi::ThreadPool& pool, int64_t n, int64_t least) {
  return std::max<int64_t>(1, std::min<int64_t>(n / least, pool.num_threads()));
}

// Calls f(begin, end, part) for parts of n entries.
template <class F>
void in_parts(xla::ffi::ThreadPool& pool, int64_t n, int64_t parts, const F& f) {
  parallel_for(pool, parts, parts,
               [&](int64_t part) { f(n * part / parts, n * (part + 1) / parts, part); });
}

}  // namespace dst
