// Normalisation, ReLU and pooling on a CPU, with their first and second derivatives; maml/model/normalization.py
// has the formulas.
//
// Tensors are contiguous. z and its derivatives are (T, S, H, W, C), results of pooling (T, S, H', W', C), numbers of a
// feature (T, C). Inner loops run over channels, which lie next to each other, so that the compiler vectorises them.

#include <algorithm>
#include <cstdint>
#include <type_traits>

// Outputs do not overlap with inputs, so the channels are independent.
#ifdef __clang__
#define EACH_CHANNEL _Pragma("clang loop vectorize(assume_safety)") for (int64_t c = 0; c < n; ++c)
#else
#define EACH_CHANNEL _Pragma("GCC ivdep") for (int64_t c = 0; c < n; ++c)
#endif

namespace {

constexpr int64_t kBlock = 64;   // channels that are computed together
constexpr int64_t kFlush = 128;  // numbers that are added up before the sum goes on in double precision

enum Windows : int64_t { kNone = 0, kMax = 1, kMaxKeepOdd = 2 };

struct Shape {
  int64_t tasks, examples, height, width, channels, windows, num_threads;

  int64_t rows() const { return examples * height * width; }
  int64_t out_height() const { return out_size(height); }
  int64_t out_width() const { return out_size(width); }
  int64_t out_size(int64_t size) const {
    return windows == kNone ? size : (size + (windows == kMaxKeepOdd)) / 2;
  }
  int64_t out_rows() const { return examples * out_height() * out_width(); }
};

template <int N>
using Count = std::integral_constant<int, N>;

// Calls body(number of pixels, offsets of the pixels, offset of the result) for each window of a task.
template <class Body>
inline void each_window(const Shape& shape, Body&& body) {
  const int64_t c = shape.channels, line = shape.width * c;
  int64_t pixels[4] = {0, 0, 0, 0}, out = 0;
  if (shape.windows == kNone) {
    for (; out < shape.rows() * c; out += c) {
      pixels[0] = out;
      body(Count<1>(), pixels, out);
    }
    return;
  }
  for (int64_t example = 0; example < shape.examples; ++example) {
    for (int64_t i = 0; i < shape.out_height(); ++i) {
      for (int64_t j = 0; j < shape.out_width(); ++j, out += c) {
        const bool two_high = 2 * i + 1 < shape.height, two_wide = 2 * j + 1 < shape.width;
        pixels[0] = (example * shape.height + 2 * i) * line + 2 * j * c;
        pixels[1] = pixels[0] + (two_wide ? c : line);
        pixels[2] = pixels[0] + line;
        pixels[3] = pixels[2] + c;
        if (two_high && two_wide) {
          body(Count<4>(), pixels, out);
        } else if (two_high || two_wide) {
          body(Count<2>(), pixels, out);
        } else {
          body(Count<1>(), pixels, out);
        }
      }
    }
  }
}

// Calls body(offset) for each pixel of a task that belongs to no window: those of an odd last line or column.
template <class Body>
inline void each_pixel_left(const Shape& shape, Body&& body) {
  if (shape.windows != kMax) return;
  const int64_t covered_height = shape.height / 2 * 2, covered_width = shape.width / 2 * 2;
  for (int64_t example = 0; example < shape.examples; ++example)
    for (int64_t i = 0; i < shape.height; ++i)
      for (int64_t j = i < covered_height ? covered_width : 0; j < shape.width; ++j)
        body(((example * shape.height + i) * shape.width + j) * shape.channels);
}

// N sums for each channel of a block.
template <class T, int N>
struct Sums {
  T part[N][kBlock] = {};
  double total[N][kBlock] = {};
  int64_t count = 0;

  void next() {
    if (++count % kFlush == 0) flush();
  }
  void flush() {
    for (int k = 0; k < N; ++k)
      for (int64_t c = 0; c < kBlock; ++c) {
        total[k][c] += part[k][c];
        part[k][c] = 0;
      }
  }
};

// The pixel of a window with the largest c x; the first one if several are equal.
template <class T, int N>
struct Winner {
  T x[N], largest, number;

  Winner(const T* z, const int64_t* pixels, int64_t c, T mean, T factor, T scale) {
    for (int k = 0; k < N; ++k) x[k] = (z[pixels[k] + c] - mean) * factor;
    largest = x[0] * scale;
    number = 0;
    for (int k = 1; k < N; ++k) {
      const T scaled = x[k] * scale;
      const bool is_larger = scaled > largest;
      largest = is_larger ? scaled : largest;
      number = is_larger ? T(k) : number;
    }
  }
  T pick(const T* values) const {
    T picked = values[0];
    for (int k = 1; k < N; ++k) picked = number == T(k) ? values[k] : picked;
    return picked;
  }
};

// Calls body(task, first channel, number of channels) for all blocks, on several threads.
template <class Body>
inline void each_block(const Shape& shape, Body&& body) {
  const int64_t blocks = (shape.channels + kBlock - 1) / kBlock, count = shape.tasks * blocks;
#pragma omp parallel for num_threads(shape.num_threads) if (shape.num_threads > 1)
  for (int64_t number = 0; number < count; ++number) {
    const int64_t first = number % blocks * kBlock;
    body(number / blocks, first, std::min(kBlock, shape.channels - first));
  }
}

template <class T>
void compute_value(const Shape& shape, double eps, const T* z, const T* shift, const T* scale, T* y, T* mean, T* factor) {
  each_block(shape, [&](int64_t task, int64_t first, int64_t n) {
    const int64_t c_in = shape.channels, feature = task * c_in + first;
    const T* own_z = z + task * shape.rows() * c_in + first;
    T* own_y = y + task * shape.out_rows() * c_in + first;
    T m[kBlock] = {}, f[kBlock] = {}, b[kBlock] = {}, s[kBlock] = {};
    std::copy_n(shift + feature, n, b);
    std::copy_n(scale + feature, n, s);
    Sums<T, 1> sum, squares;
    for (int64_t row = 0; row < shape.rows(); ++row, sum.next())
      EACH_CHANNEL sum.part[0][c] += own_z[row * c_in + c];
    sum.flush();
    EACH_CHANNEL m[c] = T(sum.total[0][c] / shape.rows());
    for (int64_t row = 0; row < shape.rows(); ++row, squares.next())
      EACH_CHANNEL {
        const T distance = own_z[row * c_in + c] - m[c];
        squares.part[0][c] += distance * distance;
      }
    squares.flush();
    EACH_CHANNEL f[c] = T(1 / __builtin_sqrt(squares.total[0][c] / shape.rows() + eps));
    std::copy_n(m, n, mean + feature);
    std::copy_n(f, n, factor + feature);
    each_window(shape, [&](auto count, const int64_t* pixels, int64_t out) {
      EACH_CHANNEL {
        const Winner<T, count> won(own_z, pixels, c, m[c], f[c], s[c]);
        const T value = won.largest + b[c];
        own_y[out + c] = value < 0 ? 0 : value;  // a NaN stays one
      }
    });
  });
}

template <class T>
void compute_gradient(const Shape& shape, const T* grad, const T* z, const T* shift, const T* scale, const T* mean,
                      const T* factor, T* dz, T* dshift, T* dscale) {
  each_block(shape, [&](int64_t task, int64_t first, int64_t n) {
    const int64_t c_in = shape.channels, feature = task * c_in + first, start = task * shape.rows() * c_in + first;
    const T *own_z = z + start, *own_grad = grad + task * shape.out_rows() * c_in + first;
    T* own_dz = dz + start;
    const T *m = mean + feature, *f = factor + feature, *s = scale + feature, *b = shift + feature;
    Sums<T, 2> sums;
    each_window(shape, [&](auto count, const int64_t* pixels, int64_t out) {
      EACH_CHANNEL {
        const Winner<T, count> won(own_z, pixels, c, m[c], f[c], s[c]);
        const T active = won.largest + b[c] > 0 ? own_grad[out + c] : T(0);
        sums.part[0][c] += active;
        sums.part[1][c] += active * won.pick(won.x);
      }
      sums.next();
    });
    sums.flush();
    T s1[kBlock] = {}, s2[kBlock] = {}, sf[kBlock] = {};
    EACH_CHANNEL {
      dshift[feature + c] = T(sums.total[0][c]);
      dscale[feature + c] = T(sums.total[1][c]);
      s1[c] = T(sums.total[0][c] / shape.rows());
      s2[c] = T(sums.total[1][c] / shape.rows());
      sf[c] = s[c] * f[c];
    }
    each_window(shape, [&](auto count, const int64_t* pixels, int64_t out) {
      EACH_CHANNEL {
        const Winner<T, count> won(own_z, pixels, c, m[c], f[c], s[c]);
        const T active = won.largest + b[c] > 0 ? own_grad[out + c] : T(0);
        for (int k = 0; k < count; ++k) {
          const T e = won.number == T(k) ? active : T(0);
          own_dz[pixels[k] + c] = sf[c] * (e - s1[c] - won.x[k] * s2[c]);
        }
      }
    });
    each_pixel_left(shape, [&](int64_t pixel) {
      EACH_CHANNEL
        own_dz[pixel + c] = -sf[c] * (s1[c] + (own_z[pixel + c] - m[c]) * f[c] * s2[c]);
    });
  });
}

template <class T>
void compute_second(const Shape& shape, const T* u, const T* w, const T* v, const T* grad, const T* z, const T* shift,
                    const T* scale, const T* mean, const T* factor, T* for_grad, T* for_z, T* for_scale) {
  each_block(shape, [&](int64_t task, int64_t first, int64_t n) {
    const int64_t c_in = shape.channels, feature = task * c_in + first, start = task * shape.rows() * c_in + first;
    const int64_t out_start = task * shape.out_rows() * c_in + first;
    const T *own_z = z + start, *own_u = u + start, *own_grad = grad + out_start;
    T *own_for_z = for_z + start, *own_for_grad = for_grad + out_start;
    const T *m = mean + feature, *f = factor + feature, *s = scale + feature, *b = shift + feature;
    Sums<T, 3> won_sums;  // of e, e x and e u
    Sums<T, 2> all_sums;  // of u and u x
    each_window(shape, [&](auto count, const int64_t* pixels, int64_t out) {
      EACH_CHANNEL {
        const Winner<T, count> won(own_z, pixels, c, m[c], f[c], s[c]);
        const T active = won.largest + b[c] > 0 ? own_grad[out + c] : T(0);
        T own[count];
        for (int k = 0; k < count; ++k) {
          own[k] = own_u[pixels[k] + c];
          all_sums.part[0][c] += own[k];
          all_sums.part[1][c] += own[k] * won.x[k];
        }
        won_sums.part[0][c] += active;
        won_sums.part[1][c] += active * won.pick(won.x);
        won_sums.part[2][c] += active * won.pick(own);
      }
      won_sums.next();
      all_sums.next();
    });
    each_pixel_left(shape, [&](int64_t pixel) {
      EACH_CHANNEL {
        const T x = (own_z[pixel + c] - m[c]) * f[c];
        all_sums.part[0][c] += own_u[pixel + c];
        all_sums.part[1][c] += own_u[pixel + c] * x;
      }
      all_sums.next();
    });
    won_sums.flush();
    all_sums.flush();
    // for_z = of_e e + of_x x + of_u u + of_1, and at the pixels that won for_grad = g_u u + g_x x + g_1.
    T of_e[kBlock] = {}, of_x[kBlock] = {}, of_u[kBlock] = {}, of_1[kBlock] = {};
    T g_u[kBlock] = {}, g_x[kBlock] = {}, g_1[kBlock] = {};
    EACH_CHANNEL {
      const double rows = double(shape.rows()), r = f[c], sr = s[c] * r, srr = sr * r, vr = v[feature + c] * r;
      const double s1 = won_sums.total[0][c] / rows, s2 = won_sums.total[1][c] / rows;
      const double u_mean = all_sums.total[0][c] / rows, u_slope = all_sums.total[1][c] / rows;
      const double covariance = won_sums.total[2][c] / rows - u_mean * s1;
      of_e[c] = T(vr - srr * u_slope);
      of_x[c] = T(-vr * s2 - srr * (covariance - 3 * u_slope * s2));
      of_u[c] = T(-srr * s2);
      of_1[c] = T(-vr * s1 + srr * (s2 * u_mean + u_slope * s1));
      g_u[c] = T(sr);
      g_x[c] = T(v[feature + c] - sr * u_slope);
      g_1[c] = T(w[feature + c] - sr * u_mean);
      for_scale[feature + c] = T(rows * r * (covariance - u_slope * s2));
    }
    each_window(shape, [&](auto count, const int64_t* pixels, int64_t out) {
      EACH_CHANNEL {
        const Winner<T, count> won(own_z, pixels, c, m[c], f[c], s[c]);
        const bool is_active = won.largest + b[c] > 0;
        const T active = is_active ? own_grad[out + c] : T(0);
        T own[count];
        for (int k = 0; k < count; ++k) {
          own[k] = own_u[pixels[k] + c];
          const T e = won.number == T(k) ? active : T(0);
          own_for_z[pixels[k] + c] = of_e[c] * e + of_x[c] * won.x[k] + of_u[c] * own[k] + of_1[c];
        }
        own_for_grad[out + c] = is_active ? g_u[c] * won.pick(own) + g_x[c] * won.pick(won.x) + g_1[c] : T(0);
      }
    });
    each_pixel_left(shape, [&](int64_t pixel) {
      EACH_CHANNEL {
        const T x = (own_z[pixel + c] - m[c]) * f[c];
        own_for_z[pixel + c] = of_x[c] * x + of_u[c] * own_u[pixel + c] + of_1[c];
      }
    });
  });
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                \
  extern "C" void value_##NAME(const Shape* shape, double eps, const T* z, const T* shift, const T* scale, T* y,      \
                               T* mean, T* factor) {                                                                   \
    compute_value(*shape, eps, z, shift, scale, y, mean, factor);                                                      \
  }                                                                                                                    \
  extern "C" void gradient_##NAME(const Shape* shape, const T* grad, const T* z, const T* shift, const T* scale,      \
                                  const T* mean, const T* factor, T* dz, T* dshift, T* dscale) {                       \
    compute_gradient(*shape, grad, z, shift, scale, mean, factor, dz, dshift, dscale);                                 \
  }                                                                                                                    \
  extern "C" void second_##NAME(const Shape* shape, const T* u, const T* w, const T* v, const T* grad, const T* z,    \
                                const T* shift, const T* scale, const T* mean, const T* factor, T* for_grad,          \
                                T* for_z, T* for_scale) {                                                              \
    compute_second(*shape, u, w, v, grad, z, shift, scale, mean, factor, for_grad, for_z, for_scale);                  \
  }

EXPORT(float, float32)
EXPORT(double, float64)
