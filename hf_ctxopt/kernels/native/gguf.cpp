// A few rows of activations times a weight in GGUF blocks, on a CPU; see `gguf.py`.
//
// Blocks are decoded in registers, 32 neighbours at a time, and multiplied in float32. Layouts: ggml
// `ggml-common.h` (`block_q4_0`, `block_q4_K` and their like).

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;
constexpr int64_t ALONE = 1 << 17;  // products up to which waking other threads costs more than it saves
constexpr int64_t PARTS = 4;      // units of work a thread: one that is interrupted leaves its others to the rest
typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef int16_t Short __attribute__((vector_size(2 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef int8_t Char __attribute__((vector_size(LANES)));
typedef uint8_t Byte __attribute__((vector_size(LANES)));
enum Type { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };  // ggml's numbers

template <class T> inline T take(const void *from) {
  T found;
  std::memcpy(&found, from, sizeof(T));
  return found;
}

inline float half(const uint8_t *at) {  // finite float16, subnormal ones too
  const uint16_t bits = take<uint16_t>(at);
  const uint32_t wide = uint32_t(bits & 0x7fff) << 13, sign = uint32_t(bits & 0x8000) << 16;
  const float size = take<float>(&wide) * 0x1p112f;
  const uint32_t all = take<uint32_t>(&size) | sign;
  return take<float>(&all);
}

// In two steps: gcc before 14 widens fourfold one number at a time.
inline Int widen(Byte codes) { return __builtin_convertvector(__builtin_convertvector(codes, Half), Int); }
inline Int widen(Char codes) { return __builtin_convertvector(__builtin_convertvector(codes, Short), Int); }
inline Float real(Int codes) { return __builtin_convertvector(codes, Float); }

constexpr Int PLACE = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};

// What holds a run of weights: `Blocks<T>::size` bytes of `Blocks<T>::groups` times 32. `group` gives the weights
// 32 g to 32 g + 31 of a block.
template <int T> struct Blocks {
  static constexpr int groups = T >= Q4_K ? 8 : 1;
  static constexpr int size = T == Q4_0 ? 18 : T == Q4_1 ? 20 : T == Q5_0 ? 22 : T == Q5_1 ? 24 : T == Q8_0 ? 34
                            : T == Q4_K ? 144 : T == Q5_K ? 176 : 210;

  static inline void group(const uint8_t *block, int g, Float out[2]) {
    if constexpr (T == Q8_0) {
      const float scale = half(block);
      for (int i = 0; i < 2; i++) out[i] = real(widen(take<Char>(block + 2 + 16 * i))) * scale;
    } else if constexpr (T < Q8_0) {
      constexpr bool shifted = T == Q4_1 || T == Q5_1, fifth = T == Q5_0 || T == Q5_1;
      const float scale = half(block);
      const Byte both = take<Byte>(block + size - 16);
      Int codes[2] = {widen(both & 15), widen(both >> 4)};
      if constexpr (fifth) {
        const uint8_t *bits = block + (shifted ? 4 : 2);
        for (int i = 0; i < 2; i++) {
          const Int high = Int{} + int32_t(take<uint16_t>(bits + 2 * i));
          codes[i] |= ((high & PLACE) != 0) & 16;
        }
      }
      for (int i = 0; i < 2; i++) {
        if constexpr (shifted) out[i] = real(codes[i]) * scale + half(block + 2);
        else out[i] = real(codes[i] - (fifth ? 16 : 8)) * scale;
      }
    } else if constexpr (T == Q6_K) {
      const uint8_t *low = block + 64 * (g / 4) + 32 * (g & 1), *high = block + 128 + 32 * (g / 4);
      const float scale = half(block + 208);
      for (int i = 0; i < 2; i++) {
        const Byte nibbles = take<Byte>(low + 16 * i), pairs = take<Byte>(high + 16 * i);
        const Byte codes = ((g & 2 ? nibbles >> 4 : nibbles & 15) | ((pairs >> (g & 3) * 2 & 3) << 4)) - 32;
        out[i] = real(widen((Char)codes)) * (scale * int8_t(block[192 + 2 * g + i]));
      }
    } else {
      const uint8_t *packed = block + 4, *codes = block + size - 128 + 32 * (g / 2);
      const int scale = g < 4 ? packed[g] & 63 : (packed[g + 4] & 15) | (packed[g - 4] >> 2 & 48);
      const int depth = g < 4 ? packed[g + 4] & 63 : packed[g + 4] >> 4 | (packed[g] >> 2 & 48);
      const float step = half(block) * scale, minimum = half(block + 2) * depth;
      for (int i = 0; i < 2; i++) {
        Byte nibbles = take<Byte>(codes + 16 * i);
        nibbles = g & 1 ? nibbles >> 4 : nibbles & 15;
        if constexpr (T == Q5_K) nibbles |= (take<Byte>(block + 16 + 16 * i) >> g & 1) << 4;
        out[i] = real(widen(nibbles)) * step - minimum;
      }
    }
  }
};

inline float total(Float sum) {
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
  return sum[0];
}

// Outputs [first, last) of R rows.
template <int T, int R>
void product(const float *x, const uint8_t *packed, int64_t columns, int64_t outputs, int64_t first, int64_t last,
             float *out) {
  using Row = Blocks<T>;
  const int64_t blocks = columns / (32 * Row::groups);
  for (int64_t o = first; o < last; o++) {
    const uint8_t *block = packed + o * blocks * Row::size;
    const float *at = x;
    Float sums[R][2] = {};
    for (int64_t b = 0; b < blocks; b++, block += Row::size)
#pragma GCC unroll 8
      for (int g = 0; g < Row::groups; g++, at += 32) {
        Float weights[2];
        Row::group(block, g, weights);
        for (int r = 0; r < R; r++)
          for (int i = 0; i < 2; i++) sums[r][i] += weights[i] * take<Float>(at + r * columns + LANES * i);
      }
    for (int r = 0; r < R; r++) out[r * outputs + o] = total(sums[r][0] + sums[r][1]);
  }
}

template <int T>
void run(const float *x, const uint8_t *packed, int64_t rows, int64_t columns, int64_t outputs, int64_t threads,
         float *out) {
  static const auto products = {product<T, 1>, product<T, 2>, product<T, 3>, product<T, 4>};
  if (rows * columns * outputs < ALONE) threads = 1;
  const int64_t parts = threads == 1 ? 1 : PARTS * threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; part++)
    for (int64_t row = 0; row < rows; row += 4) {
      const auto some = products.begin()[std::min<int64_t>(4, rows - row) - 1];
      some(x + row * columns, packed, columns, outputs, outputs * part / parts, outputs * (part + 1) / parts,
           out + row * outputs);
    }
}

template <int T> void decode(const uint8_t *packed, int64_t blocks, int64_t threads, float *out) {
  using Row = Blocks<T>;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < blocks; b++)
#pragma GCC unroll 8
    for (int g = 0; g < Row::groups; g++) {
      Float weights[2];
      Row::group(packed + b * Row::size, g, weights);
      std::memcpy(out + (b * Row::groups + g) * 32, weights, sizeof(weights));
    }
}

}  // namespace

#define EACH(call)                       \
  switch (type) {                        \
    case Q4_0: return call(Q4_0);        \
    case Q4_1: return call(Q4_1);        \
    case Q5_0: return call(Q5_0);        \
    case Q5_1: return call(Q5_1);        \
    case Q8_0: return call(Q8_0);        \
    case Q4_K: return call(Q4_K);        \
    case Q5_K: return call(Q5_K);        \
    case Q6_K: return call(Q6_K);        \
  }

// `out` (rows, outputs) = `x` (rows, columns) times the weight `packed` (outputs, columns) transposed.
extern "C" void ctxopt_gguf_matmul(int64_t type, const float *x, const uint8_t *packed, int64_t rows, int64_t columns,
                                   int64_t outputs, int64_t threads, float *out) {
#define RUN(T) run<T>(x, packed, rows, columns, outputs, threads, out)
  EACH(RUN)
}

// The weights of `blocks` neighbouring blocks, in order.
extern "C" void ctxopt_gguf_decode(int64_t type, const uint8_t *packed, int64_t blocks, int64_t threads, float *out) {
#define DECODE(T) decode<T>(packed, blocks, threads, out)
  EACH(DECODE)
}
