// Memory of the handlers beside arguments and results, counted: the tests hold it to a bound.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace dst {

// Bytes that calls hold beside their arguments and results, and the most since dst_scratch() was called.
inline std::atomic<int64_t> held{0}, most_held{0};

inline void hold(int64_t bytes) {
  const int64_t now = held.fetch_add(bytes) + bytes;
  int64_t most = most_held.load();
  while (now > most && !most_held.compare_exchange_weak(most, now)) {
  }
}

template <class T>
struct Counted {
  using value_type = T;
  Counted() = default;
  template <class U>
  Counted(const Counted<U>&) {}
  T* allocate(size_t n) {
    hold(int64_t(n * sizeof(T)));
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* p, size_t n) {
    ::operator delete(p, std::align_val_t{64});
    held.fetch_sub(int64_t(n * sizeof(T)));
  }
  // Elements that nobody has set stay as they are.
  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
  template <class U, class... Args>
  void construct(U* p, Args&&... args) {
    ::new (static_cast<void*>(p)) U(std::forward<Args>(args)...);
  }
  bool operator==(const Counted&) const { return true; }
  bool operator!=(const Counted&) const { return false; }
};
template <class T>
using Array = std::vector<T, Counted<T>>;

// Memory of one part of the work while it lasts. It is kept for the next part or call, since new
// memory would be paged in every time: as many buffers as there ever were parts at once.
class Lease {
 public:
  explicit Lease(int64_t floats) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      if (!idle().empty()) {
        memory_ = std::move(idle().back());
        idle().pop_back();
      }
    }
    if (int64_t(memory_.size()) >= floats) return;
    memory_ = Array<float>();  // first, so that never both are held
    memory_.resize(floats);
  }
  ~Lease() {
    std::lock_guard<std::mutex> lock(mutex());
    idle().push_back(std::move(memory_));
  }
  Lease(const Lease&) = delete;

  float* data() const { return const_cast<float*>(memory_.data()); }
  static void forget() {
    std::lock_guard<std::mutex> lock(mutex());
    idle().clear();
  }

 private:
  // Never destroyed: a thread may still work when the process ends.
  static std::mutex& mutex() {
    static std::mutex& one = *new std::mutex;
    return one;
  }
  static std::vector<Array<float>>& idle() {
    static std::vector<Array<float>>& all = *new std::vector<Array<float>>;
    return all;
  }

  Array<float> memory_;
};

}  // namespace dst
