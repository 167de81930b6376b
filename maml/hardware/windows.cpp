// The 3x3 windows of images with a border of zeros, on a CPU: gathering them, and adding them up again.
//
// Images are (N, H, W, C), windows (N, H', W', 9, C) with H' = ceil(H / stride). Tensors are contiguous.

#include <algorithm>
#include <cstdint>

namespace {

struct Images {
  int64_t count, height, width, channels, stride, num_threads;

  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
  int64_t size() const { return height * width * channels; }
  int64_t out_size() const { return out_height() * out_width() * 9 * channels; }
};

template <class T>
void gather(const Images& images, const T* x, T* columns) {
  const int64_t c = images.channels;
#pragma omp parallel for num_threads(images.num_threads) if (images.num_threads > 1)
  for (int64_t number = 0; number < images.count; ++number) {
    const T* image = x + number * images.size();
    T* window = columns + number * images.out_size();
    for (int64_t i = 0; i < images.out_height(); ++i)
      for (int64_t j = 0; j < images.out_width(); ++j)
        for (int64_t k = 0; k < 3; ++k) {
          const int64_t row = i * images.stride + k - 1, first = j * images.stride - 1;
          const bool is_inside = row >= 0 && row < images.height;
          // The three pixels of a row lie next to each other.
          const int64_t left = is_inside ? std::max<int64_t>(0, -first) : 3;
          const int64_t right = is_inside ? std::min<int64_t>(3, images.width - first) : 3;
          std::fill_n(window, left * c, T(0));
          if (left < right) std::copy_n(image + (row * images.width + first + left) * c, (right - left) * c, window + left * c);
          std::fill_n(window + std::max(left, right) * c, (3 - std::max(left, right)) * c, T(0));
          window += 3 * c;
        }
  }
}

template <class T>
void add_up(const Images& images, const T* columns, T* x) {
  const int64_t c = images.channels, out_width = images.out_width();
#pragma omp parallel for num_threads(images.num_threads) if (images.num_threads > 1)
  for (int64_t number = 0; number < images.count; ++number) {
    const T* windows = columns + number * images.out_size();
    T* pixel = x + number * images.size();
    for (int64_t row = 0; row < images.height; ++row)
      for (int64_t col = 0; col < images.width; ++col, pixel += c) {
        std::fill_n(pixel, c, T(0));
        for (int64_t k = 0; k < 3; ++k) {
          const int64_t i = row + 1 - k;  // stride times the window's row
          if (i < 0 || i % images.stride || i / images.stride >= images.out_height()) continue;
          for (int64_t l = 0; l < 3; ++l) {
            const int64_t j = col + 1 - l;
            if (j < 0 || j % images.stride || j / images.stride >= out_width) continue;
            const T* part = windows + ((i / images.stride * out_width + j / images.stride) * 9 + k * 3 + l) * c;
            for (int64_t channel = 0; channel < c; ++channel) pixel[channel] += part[channel];
          }
        }
      }
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                       \
  extern "C" void gather_##NAME(const Images* images, const T* x, T* columns) {              \
    gather(*images, x, columns);                                                              \
  }                                                                                           \
  extern "C" void add_up_##NAME(const Images* images, const T* columns, T* x) { add_up(*images, columns, x); }

EXPORT(float, float32)
EXPORT(double, float64)
