// The products of a sparse layer as XLA custom calls: arguments checked, work divided over threads.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "handlers.h"
#include "levels.h"

namespace dst {

const Level& level() {
  static const Level& chosen = []() -> const Level& {
#ifdef DST_X86_LEVELS
    const char* named = std::getenv("DST_KERNELS");
    const std::string_view most = named == nullptr ? "" : named;
    const bool v3 = most != "baseline" && __builtin_cpu_supports("avx2") &&
                    __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && most != "v3" && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (v4) return levels::v4;
    if (v3) return levels::v3;
#endif
    return levels::baseline;
  }();
  return chosen;
}

namespace {

constexpr int64_t kPartsPerThread = 4;
constexpr int64_t kPieces = 8;  // at least, of a layer's backward pass

bool is_matrix(const Floats& x) { return x.dimensions().size() == 2; }

// A layer whose pointers lie inside the arena, or an error.
ffi::ErrorOr<Layer> layer_of(const Floats& values, const Ints& column, const Ints& pointer,
                             int64_t n_out) {
  const int64_t K = values.element_count(), rows = int64_t(pointer.element_count()) - 1;
  if (rows < 0 || n_out < 1 || rows % n_out != 0) {
    return ffi::Unexpected(wrong("dst: pointer must have blocks x n_out + 1 entries."));
  }
  const int32_t* p = pointer.typed_data();
  if (int64_t(column.element_count()) != K || p[0] < 0 || p[0] > p[rows] || p[rows] > K) {
    return ffi::Unexpected(wrong("dst: pointer must lie in the arena's values and columns."));
  }
  return Layer{values.typed_data(), column.typed_data(), p, rows / n_out, n_out};
}

int64_t connections(const Layer& layer) {
  return int64_t{layer.pointer[layer.blocks * layer.n_out]} - layer.pointer[0];
}

// Connections of the outputs before o, over all blocks.
int64_t connections_before(const Layer& layer, int64_t o) {
  int64_t count = 0;
  for (int64_t b = 0; b < layer.blocks; b++) {
    count += int64_t{layer.pointer[b * layer.n_out + o]} - layer.pointer[b * layer.n_out];
  }
  return count;
}

// The first output of a part, so that all parts have about equally many connections.
int64_t first_output(const Layer& layer, int64_t part, int64_t parts) {
  if (part == parts) return layer.n_out;
  const int64_t target = connections(layer) / parts * part;
  int64_t low = 0, high = layer.n_out;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (connections_before(layer, middle) < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

ffi::Error multiply(ffi::ThreadPool pool, Floats values, Ints column, Ints pointer, Floats x,
                    FloatResult y, int64_t threads) {
  if (!is_matrix(x) || !is_matrix(*y) || x.dimensions()[1] != y->dimensions()[1]) {
    return wrong("dst_multiply: x is (n_in, B), y (n_out, B).");
  }
  const auto layer = layer_of(values, column, pointer, y->dimensions()[0]);
  if (!layer.has_value()) return layer.error();
  const int64_t B = x.dimensions()[1];
  threads = threads_for(pool, (connections(*layer) + layer->n_out) * B, threads);
  const int64_t parts = std::min(threads, layer->n_out);
  parallel_for(pool, parts, threads, [&](int64_t part) {
    const int64_t o0 = first_output(*layer, part, parts);
    const int64_t o1 = first_output(*layer, part + 1, parts);
    level().multiply(*layer, x.typed_data(), B, o0, o1, y->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Floats values, Ints column, Ints pointer, Floats x,
                    Floats delta, Floats before, FloatResult dx, FloatResult gradient,
                    int64_t threads) {
  if (!is_matrix(x) || !is_matrix(delta) || x.dimensions()[1] != delta.dimensions()[1]) {
    return wrong("dst_backward: x is (n_in, B), delta (n_out, B).");
  }
  const bool only_dx = gradient->element_count() == 0;
  if (!only_dx && gradient->element_count() != values.element_count()) {
    return wrong("dst_backward: the gradient has an entry for each value, or none at all.");
  }
  const auto layer = layer_of(values, column, pointer, delta.dimensions()[0]);
  if (!layer.has_value()) return layer.error();
  const int64_t n_in = x.dimensions()[0], B = x.dimensions()[1];
  if (!only_dx && before.typed_data() != gradient->typed_data()) {
    std::memcpy(gradient->typed_data(), before.typed_data(), before.size_bytes());
  }
  const int64_t work = 3 * (connections(*layer) + n_in) * B;
  threads = threads_for(pool, work, threads);
  parallel_for(pool, threads, threads, [&](int64_t part) {
    const int64_t i0 = n_in * part / threads, i1 = n_in * (part + 1) / threads;
    std::memset(dx->typed_data() + i0 * B, 0, (i1 - i0) * B * sizeof(float));
  });
  // A block owns its rows of dx and its connections. Where there are few blocks, they are cut by
  // input into pieces. The block's inputs are estimated, which is enough: the first piece takes
  // all before, the last all after.
  const int64_t blocks = layer->blocks, block = blocks > 0 ? (n_in + blocks - 1) / blocks : 0;
  // The number of pieces sets the order of the sums, so it does not depend on that of the threads.
  const int64_t wanted = work < kAlone ? 1 : kPieces;
  const int64_t pieces = blocks > 0 ? (wanted + blocks - 1) / blocks : 0;
  parallel_for(pool, blocks * pieces, threads, [&](int64_t part) {
    // Pieces of one block write into the same cache lines of the gradient: not at the same time.
    const int64_t b = part % blocks, piece = part / blocks;
    const int64_t first = layer->n_out * piece / pieces;
    const int64_t i0 = piece == 0 ? 0 : b * block + block * piece / pieces;
    const int64_t i1 = piece + 1 == pieces ? n_in : b * block + block * (piece + 1) / pieces;
    level().backward(*layer, x.typed_data(), delta.typed_data(), B, b, i0, i1, first, dx->typed_data(),
                     only_dx ? nullptr : gradient->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error gradient_on(ffi::ThreadPool pool, Ints i, Ints o, Floats x, Floats delta,
                       FloatResult out, int64_t threads) {
  if (!is_matrix(x) || !is_matrix(delta) || x.dimensions()[1] != delta.dimensions()[1]) {
    return wrong("dst_gradient_on: x is (n_in, B), delta (n_out, B).");
  }
  const int64_t n = out->element_count(), B = x.dimensions()[1];
  if (int64_t(i.element_count()) != n || int64_t(o.element_count()) != n) {
    return wrong("dst_gradient_on: i, o and the result have one length.");
  }
  threads = threads_for(pool, n * B, threads);
  const int64_t parts = threads > 1 ? kPartsPerThread * threads : 1;
  parallel_for(pool, parts, threads, [&](int64_t part) {
    const int64_t p0 = n * part / parts, p1 = n * (part + 1) / parts;
    level().gradient_on(i.typed_data() + p0, o.typed_data() + p0, p1 - p0, x.typed_data(),
                        delta.typed_data(), B, out->typed_data() + p0);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dst

XLA_FFI_DEFINE_HANDLER_SYMBOL(DstMultiply, dst::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstBackward, dst::backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DstGradientOn, dst::gradient_on,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("threads"));

// What the library was built from, for which version of XLA's interface (cpp.py refuses
// another one before it is registered), and which instruction set it uses here.
extern "C" const char* dst_sources() { return DST_SOURCES; }
extern "C" const char* dst_interface() {
  return DST_STRING(XLA_FFI_API_MAJOR) "." DST_STRING(XLA_FFI_API_MINOR);
}
extern "C" const char* dst_level() { return dst::level().name; }
