// 3x3 convolutions of images with a border of zeros, and their gradients, on a CPU.
//
// Images x are (T, S, H, W, C) and results y (T, S, H', W', O), with H' = ceil(H / stride); both are contiguous. Kernels
// are (T, O, C, 9), in any order in memory. Each of the nine taps of a kernel pairs pixels of y with pixels of x. All
// three functions are sums over the taps of products of small matrices, so that no window is copied.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

// Bytes of a vector register, and number of vectors that lie next to each other in a tile.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kVectors = 4;
#elif defined(__AVX__)
constexpr int kBytes = 32, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kVectors = 4;
#else
constexpr int kBytes = 16, kVectors = 2;
#endif
constexpr int kRows = 6;                  // rows of a tile that is kVectors wide
constexpr int64_t kBlockBytes = 1 << 18;  // images and results of a block stay in the second-level cache
constexpr int64_t kNarrow = 4;            // up to so many channels, the nine taps are one product

struct Sizes {
  int64_t tasks, examples, height, width, channels, outputs, stride;
  int64_t task_stride, output_stride, channel_stride, tap_stride;  // of the kernels
  int64_t num_threads;

  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
  int64_t pixels() const { return height * width; }
  int64_t padded_size() const { return (height + 2) * (width + 2) * channels; }
  int64_t out_pixels() const { return out_height() * out_width(); }

  // Rows of y of a block: those of several examples, or a part of one's.
  int64_t block_rows(int64_t bytes) const {
    const int64_t rows = kBlockBytes / ((stride * width * channels + out_width() * outputs) * bytes);
    return rows < out_height() ? std::max<int64_t>(1, rows) : std::min(examples, rows / out_height()) * out_height();
  }
  int64_t block_examples(int64_t bytes) const { return std::max<int64_t>(1, block_rows(bytes) / out_height()); }
};

// The pairs of pixels of a tap, in the order of y; first[r] is the number of pairs before row r of y.
struct Tap {
  std::vector<int64_t> x, y, first;
};
using Taps = std::array<Tap, 9>;

Taps find_taps(const Sizes& sizes, int64_t examples) {
  Taps taps;
  for (int64_t number = 0; number < 9; ++number) {
    Tap& tap = taps[number];
    for (int64_t line = 0; line < examples * sizes.out_height(); ++line) {
      tap.first.push_back(tap.x.size());
      const int64_t example = line / sizes.out_height();
      const int64_t row = line % sizes.out_height() * sizes.stride + number / 3 - 1;
      if (row < 0 || row >= sizes.height) continue;
      for (int64_t j = 0; j < sizes.out_width(); ++j) {
        const int64_t col = j * sizes.stride + number % 3 - 1;
        if (col < 0 || col >= sizes.width) continue;
        tap.x.push_back(example * sizes.pixels() + row * sizes.width + col);
        tap.y.push_back(line * sizes.out_width() + j);
      }
    }
    tap.first.push_back(tap.x.size());
  }
  return taps;
}

// Calls body(first example, first row, last row) for each block; rows are counted from the first example's first row.
template <class Body>
void each_block(const Sizes& sizes, int64_t bytes, int64_t examples, Body&& body) {
  const int64_t block_rows = sizes.block_rows(bytes), block_examples = sizes.block_examples(bytes);
  for (int64_t example = 0; example < examples; example += block_examples) {
    const int64_t rows = std::min(block_examples, examples - example) * sizes.out_height();
    for (int64_t row = 0; row < rows; row += block_rows) body(example, row, std::min(rows, row + block_rows));
  }
}

template <class T, int kLanes>
struct Simd {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T>
struct Simd<T, 1> {
  using Vector = T;
};

// The form of a tile: P rows of V vectors.
template <int kLanes_, int V_, int P_>
struct Tile {
  static constexpr int kLanes = kLanes_, V = V_, P = P_, kWidth = kLanes * V;
};

// Adds a product to a tile: out(p)[...] += sum over i < count of value(p, i) * row(i)[...]. It isn't inlined, because
// the compiler would then not keep the tile in registers.
template <class T, class Form, class Value, class Row, class Out>
__attribute__((noinline)) void add_product(int64_t count, Value value, Row row, Out out) {
  constexpr int kLanes = Form::kLanes, V = Form::V, P = Form::P;
  using Vector = typename Simd<T, kLanes>::Vector;
  Vector sums[P][V], factors[V];
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(&sums[p][v], out(p) + v * kLanes, sizeof(Vector));
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(&factors[v], row(i) + v * kLanes, sizeof(Vector));
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) {
      const T factor = value(p, i);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[p][v] += factor * factors[v];
    }
  }
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(out(p) + v * kLanes, &sums[p][v], sizeof(Vector));
}

// Cuts rows into parts of P, then of P / 2, ... Calls body(form of the tile, first row).
template <class Form, class Body>
void each_part(int64_t row, int64_t end, Body&& body) {
  constexpr int P = Form::P;
  for (; row + P <= end; row += P) body(Form(), row);
  if constexpr (P > 1) each_part<Tile<Form::kLanes, Form::V, P / 2>>(row, end, body);
}

// Cuts a matrix into tiles, the columns first. Calls body(form of the tile, first row, first column).
template <class T, int kMostRows, class Body>
void each_tile(int64_t row, int64_t end, int64_t columns, Body&& body) {
  constexpr int kLanes = kBytes / sizeof(T);
  int64_t column = 0;
  const auto cut = [&](auto form) {
    using Form = decltype(form);
    for (; column + Form::kWidth <= columns; column += Form::kWidth)
      each_part<Form>(row, end, [&](auto part, int64_t first) { body(part, first, column); });
  };
  cut(Tile<kLanes, kVectors, kRows>());
  cut(Tile<kLanes, 2, kMostRows>());
  cut(Tile<kLanes, 1, kMostRows>());
  if (kLanes > 4) cut(Tile<4, 1, kMostRows>());
  cut(Tile<1, 1, kMostRows>());
}

// Copies a task's kernels as nine matrices (inputs, columns), with columns next to each other.
template <class T>
void pack(const T* kernels, int64_t tap_stride, int64_t inputs, int64_t input_stride, int64_t columns,
          int64_t column_stride, T* packed) {
  constexpr int64_t kLine = 16;  // columns that share a line of the cache
  for (int64_t start = 0; start < columns; start += kLine) {
    const int64_t end = std::min(columns, start + kLine);
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t i = 0; i < inputs; ++i)
        for (int64_t j = start; j < end; ++j)
          packed[(tap * inputs + i) * columns + j] = kernels[tap * tap_stride + i * input_stride + j * column_stride];
  }
}

// How images with few channels are read: from a copy with a border of zeros, (H + 2, W + 2, C).
struct Windows {
  std::vector<int64_t> first;   // where the window of each result starts
  std::vector<int64_t> offset;  // where its 9 * channels values lie, from there
};

Windows find_windows(const Sizes& sizes) {
  const int64_t width = (sizes.width + 2) * sizes.channels;
  Windows windows;
  for (int64_t result = 0; result < sizes.out_pixels(); ++result)
    windows.first.push_back(sizes.stride * (result / sizes.out_width() * width +
                                            result % sizes.out_width() * sizes.channels));
  for (int64_t row = 0; row < 3; ++row)
    for (int64_t i = 0; i < 3 * sizes.channels; ++i) windows.offset.push_back(row * width + i);
  return windows;
}

// Copies an image into the middle of zeros.
template <class T>
void pad(const Sizes& sizes, const T* image, T* padded) {
  const int64_t line = sizes.width * sizes.channels, padded_line = line + 2 * sizes.channels;
  for (int64_t row = 0; row < sizes.height; ++row)
    std::copy_n(image + row * line, line, padded + (row + 1) * padded_line + sizes.channels);
}

// Adds x * w to y, for some examples of a task with few channels. The nine matrices are one, (9 * channels, outputs).
template <class T>
void convolve_narrow(const Sizes& sizes, const Windows& windows, const T* x, const T* matrix, int64_t examples,
                     T* padded, T* y) {
  const int64_t inputs = 9 * sizes.channels, columns = sizes.outputs;
  const int64_t* offset = windows.offset.data();
  for (int64_t example = 0; example < examples; ++example) {
    pad(sizes, x + example * sizes.pixels() * sizes.channels, padded);
    T* results = y + example * sizes.out_pixels() * columns;
    each_tile<T, kRows>(0, sizes.out_pixels(), columns, [&](auto form, int64_t result, int64_t column) {
      using Form = decltype(form);
      const T* window[Form::P];
      for (int p = 0; p < Form::P; ++p) window[p] = padded + windows.first[result + p];
      add_product<T, Form>(
          inputs, [&](int p, int64_t i) { return window[p][offset[i]]; },
          [&](int64_t i) { return matrix + i * columns + column; },
          [&](int p) { return results + (result + p) * columns + column; });
    });
  }
}

// Adds the gradient of the kernels of a task with few channels: rows first to last of the matrix (9 * channels,
// outputs), whose outputs lie next to each other in memory.
template <class T>
void weight_gradient_narrow(const Sizes& sizes, const Windows& windows, const T* y, const T* x, int64_t first,
                            int64_t last, T* padded, T* kernels) {
  const int64_t columns = sizes.outputs, block = std::max<int64_t>(1, kBlockBytes / (columns * sizeof(T)));
  for (int64_t example = 0; example < sizes.examples; ++example) {
    pad(sizes, x + example * sizes.pixels() * sizes.channels, padded);
    for (int64_t result = 0; result < sizes.out_pixels(); result += block) {
      const int64_t count = std::min(block, sizes.out_pixels() - result);
      const int64_t* window = windows.first.data() + result;
      const T* grad = y + (example * sizes.out_pixels() + result) * columns;
      each_tile<T, 2 * kRows>(first, last, columns, [&](auto form, int64_t at, int64_t column) {
        using Form = decltype(form);
        const T* values[Form::P];
        T* targets[Form::P];
        for (int p = 0; p < Form::P; ++p) {
          const int64_t tap = (at + p) / sizes.channels, channel = (at + p) % sizes.channels;
          values[p] = padded + windows.offset[at + p];
          targets[p] = kernels + tap * sizes.tap_stride + channel * sizes.channel_stride + column;
        }
        add_product<T, Form>(
            count, [&](int p, int64_t i) { return values[p][window[i]]; },
            [&](int64_t i) { return grad + i * columns + column; }, [&](int p) { return targets[p]; });
      });
    }
  }
}

// Adds x * w to y, for some examples of a task; or the gradient of x from that of y.
template <class T, bool kGradient>
void convolve_wide(const Sizes& sizes, const Taps& taps, const T* in, const T* matrices, int64_t tap_stride,
                   int64_t input_stride, int64_t examples, T* out) {
  const int64_t inputs = kGradient ? sizes.outputs : sizes.channels;
  const int64_t columns = kGradient ? sizes.channels : sizes.outputs;
  const int64_t in_size = (kGradient ? sizes.out_pixels() : sizes.pixels()) * inputs;
  const int64_t out_size = (kGradient ? sizes.pixels() : sizes.out_pixels()) * columns;
  each_block(sizes, sizeof(T), examples, [&](int64_t example, int64_t row, int64_t end) {
    for (int64_t number = 0; number < 9; ++number) {
      const Tap& tap = taps[number];
      const T *source = in + example * in_size, *matrix = matrices + number * tap_stride;
      T* target = out + example * out_size;
      const std::vector<int64_t>&from = kGradient ? tap.y : tap.x, &to = kGradient ? tap.x : tap.y;
      each_tile<T, kRows>(tap.first[row], tap.first[end], columns, [&](auto form, int64_t pair, int64_t column) {
        using Form = decltype(form);
        const T* pixels[Form::P];
        T* results[Form::P];
        for (int p = 0; p < Form::P; ++p) {
          pixels[p] = source + from[pair + p] * inputs;
          results[p] = target + to[pair + p] * columns + column;
        }
        add_product<T, Form>(
            inputs, [&](int p, int64_t i) { return pixels[p][i]; },
            [&](int64_t i) { return matrix + i * input_stride + column; }, [&](int p) { return results[p]; });
      });
    }
  });
}

// y = x * w, or the gradient of x from that of y.
template <class T, bool kGradient>
void convolve(const Sizes& sizes, const T* in, const T* kernels, T* out) {
  const int64_t inputs = kGradient ? sizes.outputs : sizes.channels;
  const int64_t columns = kGradient ? sizes.channels : sizes.outputs;
  const int64_t input_stride = kGradient ? sizes.output_stride : sizes.channel_stride;
  const int64_t column_stride = kGradient ? sizes.channel_stride : sizes.output_stride;
  const int64_t in_size = (kGradient ? sizes.out_pixels() : sizes.pixels()) * inputs;
  const int64_t out_size = (kGradient ? sizes.pixels() : sizes.out_pixels()) * columns;
  const bool is_narrow = !kGradient && inputs <= kNarrow, is_packed = is_narrow || column_stride != 1;
  const Taps taps = find_taps(sizes, is_narrow ? 0 : sizes.block_examples(sizeof(T)));
  const Windows windows = is_narrow ? find_windows(sizes) : Windows();
  // Where tasks cannot be divided evenly, threads share the examples of each.
  const int64_t parts = sizes.tasks % sizes.num_threads ? std::min(sizes.examples, sizes.num_threads) : 1;
#pragma omp parallel num_threads(sizes.num_threads) if (sizes.num_threads > 1)
  {
    std::vector<T> packed(is_packed ? 9 * inputs * columns : 0), padded(is_narrow ? sizes.padded_size() : 0);
#pragma omp for
    for (int64_t item = 0; item < sizes.tasks * parts; ++item) {
      const int64_t task = item / parts, part = item % parts;
      const int64_t first = part * sizes.examples / parts, last = (part + 1) * sizes.examples / parts;
      const T* own = kernels + task * sizes.task_stride;
      const T* source = in + (task * sizes.examples + first) * in_size;
      T* target = out + (task * sizes.examples + first) * out_size;
      std::fill_n(target, (last - first) * out_size, T(0));
      if (is_packed) {
        pack(own, sizes.tap_stride, inputs, input_stride, columns, column_stride, packed.data());
        own = packed.data();
      }
      if (is_narrow)
        convolve_narrow(sizes, windows, source, own, last - first, padded.data(), target);
      else
        convolve_wide<T, kGradient>(sizes, taps, source, own, is_packed ? inputs * columns : sizes.tap_stride,
                                    is_packed ? columns : input_stride, last - first, target);
    }
  }
}

// The gradient of the kernels, of which either channels or outputs lie next to each other in memory.
template <class T>
void weight_gradient(const Sizes& sizes, const T* y, const T* x, T* kernels) {
  const bool by_channel = sizes.channel_stride == 1;
  const bool is_narrow = sizes.channels <= kNarrow && sizes.output_stride == 1;
  const int64_t rows = by_channel ? sizes.outputs : sizes.channels;
  const int64_t columns = by_channel ? sizes.channels : sizes.outputs;
  const int64_t row_stride = by_channel ? sizes.output_stride : sizes.channel_stride;
  const int64_t left_size = (by_channel ? sizes.out_pixels() : sizes.pixels()) * rows;
  const int64_t right_size = (by_channel ? sizes.pixels() : sizes.out_pixels()) * columns;
  const Taps taps = find_taps(sizes, is_narrow ? 0 : sizes.block_examples(sizeof(T)));
  const Windows windows = is_narrow ? find_windows(sizes) : Windows();
  // Where tasks cannot be divided evenly, threads share the taps of each.
  const int64_t parts = sizes.tasks % sizes.num_threads ? 9 : 1;
#pragma omp parallel for num_threads(sizes.num_threads) if (sizes.num_threads > 1)
  for (int64_t item = 0; item < sizes.tasks * parts; ++item) {
    const int64_t task = item / parts, first = item % parts * 9 / parts, last = (item % parts + 1) * 9 / parts;
    T* own = kernels + task * sizes.task_stride;
    for (int64_t number = first; number < last; ++number)
      for (int64_t i = 0; i < rows; ++i) std::fill_n(own + number * sizes.tap_stride + i * row_stride, columns, T(0));
    if (is_narrow) {
      std::vector<T> padded(sizes.padded_size());
      weight_gradient_narrow(sizes, windows, y + task * sizes.examples * sizes.out_pixels() * sizes.outputs,
                             x + task * sizes.examples * sizes.pixels() * sizes.channels, first * sizes.channels,
                             last * sizes.channels, padded.data(), own);
      continue;
    }
    each_block(sizes, sizeof(T), sizes.examples, [&](int64_t example, int64_t row, int64_t end) {
      const T* left = (by_channel ? y : x) + (task * sizes.examples + example) * left_size;
      const T* right = (by_channel ? x : y) + (task * sizes.examples + example) * right_size;
      for (int64_t number = first; number < last; ++number) {
        const Tap& tap = taps[number];
        const int64_t pair = tap.first[row], count = tap.first[end] - pair;
        const int64_t *l = (by_channel ? tap.y : tap.x).data() + pair, *r = (by_channel ? tap.x : tap.y).data() + pair;
        each_tile<T, 2 * kRows>(0, rows, columns, [&](auto form, int64_t at, int64_t column) {
          T* target = own + number * sizes.tap_stride + at * row_stride + column;
          add_product<T, decltype(form)>(
              count, [&](int p, int64_t i) { return left[l[i] * rows + at + p]; },
              [&](int64_t i) { return right + r[i] * columns + column; },
              [&](int p) { return target + p * row_stride; });
        });
      }
    });
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                             \
  extern "C" void convolve_##NAME(const Sizes* sizes, const T* x, const T* kernels, T* y) {         \
    convolve<T, false>(*sizes, x, kernels, y);                                                      \
  }                                                                                                 \
  extern "C" void data_gradient_##NAME(const Sizes* sizes, const T* y, const T* kernels, T* x) {    \
    convolve<T, true>(*sizes, y, kernels, x);                                                       \
  }                                                                                                 \
  extern "C" void weight_gradient_##NAME(const Sizes* sizes, const T* y, const T* x, T* kernels) {  \
    weight_gradient(*sizes, y, x, kernels);                                                         \
  }

EXPORT(float, float32)
EXPORT(double, float64)
