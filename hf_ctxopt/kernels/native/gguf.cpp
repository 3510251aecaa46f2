// A few rows of activations times a weight in GGUF blocks, on a CPU; see `gguf.py`.
//
// Products are of whole numbers: the codes of 32 neighbouring weights with as many activations, which are rounded to
// twice 16 bits of their largest and so keep what float32 has of them. Activations that are not finite, or too small or
// too large for that, meet decoded weights, in float32. Layouts: ggml `ggml-common.h` (`block_q4_0`, `block_q4_K` and
// their like).

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int64_t ALONE = 1 << 17;  // products up to which waking other threads costs more than it saves
constexpr int64_t PARTS = 4;        // units of work a thread: one that is interrupted leaves its others to the rest
typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef int16_t Short __attribute__((vector_size(2 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef int8_t Char __attribute__((vector_size(LANES)));
typedef uint8_t Byte __attribute__((vector_size(LANES)));
typedef float Eight __attribute__((vector_size(32)));    // a number for each 32 weights of a block of 256
typedef uint8_t Codes __attribute__((vector_size(32)));  // of 32 neighbouring weights
typedef int8_t Signed __attribute__((vector_size(32)));
typedef int16_t Words __attribute__((vector_size(64)));
enum Type { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };  // ggml's numbers

template <class T> inline T take(const void *from) {
  T found;
  std::memcpy(&found, from, sizeof(T));
  return found;
}

inline float half(const uint8_t *at) {  // finite float16, subnormal ones too
  const uint16_t bits = take<uint16_t>(at);
#ifdef __F16C__
  return _cvtsh_ss(bits);
#endif
  const uint32_t wide = uint32_t(bits & 0x7fff) << 13, sign = uint32_t(bits & 0x8000) << 16;
  const float size = take<float>(&wide) * 0x1p112f;
  const uint32_t all = take<uint32_t>(&size) | sign;
  return take<float>(&all);
}

// In two steps: gcc before 14 widens fourfold one number at a time.
inline Int widen(Byte codes) { return __builtin_convertvector(__builtin_convertvector(codes, Half), Int); }
inline Int widen(Char codes) { return __builtin_convertvector(__builtin_convertvector(codes, Short), Int); }
inline Float real(Int codes) { return __builtin_convertvector(codes, Float); }

inline float total(Float sum) {
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
  return sum[0];
}

// The lower halves of 16 bytes, then the upper ones.
inline Codes nibbles(const uint8_t *at) {
#ifdef __AVX2__
  const __m256i twice = _mm256_broadcastsi128_si256(take<__m128i>(at));
  return (Codes)_mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)) & 15;
#else
  const Byte both = take<Byte>(at), each[2] = {both & 15, both >> 4};
  return take<Codes>(each);
#endif
}

// 16 where one of 32 bits is set.
inline Codes sixteens(uint32_t bits) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (Codes)_mm256_maskz_set1_epi8(bits, 16);
#else
  uint64_t each[4], which[4];
  for (int i = 0; i < 4; i++) each[i] = (bits >> 8 * i & 255) * 0x0101010101010101u, which[i] = 0x8040201008040201;
  return (Codes)((take<Codes>(each) & take<Codes>(which)) != 0) & 16;
#endif
}

// What holds a run of weights: `Blocks<T>::size` bytes of `Blocks<T>::groups` times 32. A weight is `factor * code`,
// and in types with minima `factor * code + offset`.
template <int T> struct Blocks {
  static constexpr bool wide = T >= Q4_K, minima = T == Q4_1 || T == Q5_1 || T == Q4_K || T == Q5_K;
  static constexpr int groups = wide ? 8 : 1;
  static constexpr int size = T == Q4_0 ? 18 : T == Q4_1 ? 20 : T == Q5_0 ? 22 : T == Q5_1 ? 24 : T == Q8_0 ? 34
                            : T == Q4_K ? 144 : T == Q5_K ? 176 : 210;

  // The codes of the weights 32 g to 32 g + 31 of a block, less what they are stored with.
  static inline Words codes(const uint8_t *block, int g) {
    Codes found;
    if constexpr (T == Q8_0) {
      found = take<Codes>(block + 2);
    } else if constexpr (T < Q8_0) {
      found = nibbles(block + size - 16);
      if constexpr (T == Q5_0 || T == Q5_1) found |= sixteens(take<uint32_t>(block + (minima ? 4 : 2)));
      if constexpr (!minima) found -= (uint8_t)(T == Q5_0 ? 16 : 8);
    } else if constexpr (T == Q6_K) {
      const Codes low = take<Codes>(block + 64 * (g / 4) + 32 * (g & 1));
      const Codes high = take<Codes>(block + 128 + 32 * (g / 4));
      found = ((g & 2 ? low >> 4 : low & 15) | ((high >> (g & 3) * 2 & 3) << 4)) - 32;
    } else {
      const Codes both = take<Codes>(block + size - 128 + 32 * (g / 2));
      found = g & 1 ? both >> 4 : both & 15;
      if constexpr (T == Q5_K) found |= (take<Codes>(block + 16) >> g & 1) << 4;
    }
    if constexpr (minima) return __builtin_convertvector(found, Words);
    else return __builtin_convertvector((Signed)found, Words);
  }

  // Factors of the 16 runs of 16 weights in a block of 256, and offsets of its 8 groups.
  static inline Float factors(const uint8_t *block, Eight &offsets) {
    if constexpr (T == Q6_K) {
      return real(widen(take<Char>(block + 192))) * half(block + 208);
    } else {
      const uint32_t a = take<uint32_t>(block + 4), b = take<uint32_t>(block + 8), c = take<uint32_t>(block + 12);
      const uint32_t low = (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030);
      const uint32_t high = (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
      const uint32_t sixes[4] = {a & 0x3f3f3f3f, low, b & 0x3f3f3f3f, high};
      const Float all = real(widen(take<Byte>(sixes)));  // 8 factors, 8 minima
      const Eight *parts = (const Eight *)&all;
      offsets = parts[1] * -half(block + 2);
      constexpr Int TWICE = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
      return __builtin_shuffle(all, TWICE) * half(block);
    }
  }

  // The weights of a block, 32 to a group.
  static inline void decode(const uint8_t *block, Float out[groups][2]) {
    Float factor = {};
    Eight offsets = {};
    if constexpr (wide) {
      factor = factors(block, offsets);
    } else {
      factor += half(block);
      if constexpr (minima) offsets += half(block + 2);
    }
#pragma GCC unroll 8
    for (int g = 0; g < groups; g++) {
      const Words found = codes(block, g);
      for (int i = 0; i < 2; i++) {
        const Short some = take<Short>((const char *)&found + 32 * i);
        out[g][i] = real(__builtin_convertvector(some, Int)) * factor[2 * g + i];
        if constexpr (minima) out[g][i] += offsets[g];
      }
    }
  }
};

// Outputs [first, last) of R rows, in float32.
template <int T, int R>
void plain(const float *x, const uint8_t *packed, int64_t columns, int64_t outputs, int64_t first, int64_t last,
           float *out) {
  using Row = Blocks<T>;
  const int64_t blocks = columns / (32 * Row::groups);
  for (int64_t o = first; o < last; o++) {
    const uint8_t *block = packed + o * blocks * Row::size;
    const float *at = x;
    Float sums[R][2] = {};
    for (int64_t b = 0; b < blocks; b++, block += Row::size) {
      Float weights[Row::groups][2];
      Row::decode(block, weights);
      for (int g = 0; g < Row::groups; g++, at += 32)
        for (int r = 0; r < R; r++)
          for (int i = 0; i < 2; i++) sums[r][i] += weights[g][i] * take<Float>(at + r * columns + LANES * i);
    }
    for (int r = 0; r < R; r++) out[r * outputs + o] = total(sums[r][0] + sums[r][1]);
  }
}

constexpr float FINER = 65534;  // parts of a unit of `high` in `low`
constexpr float MOST = 1e25f;   // of which the largest factor and offset, 65504 * 128 times, are finite

// Rows of activations as `scale * (high + low / FINER)`, 32 to a scale.
struct Rounded {
  const int16_t *high, *low;     // (rows, columns)
  const float *scales, *pairs;   // (rows, columns / 32); (rows, columns / 16), each twice
  const float *sums;             // (rows, columns / 32): of 32 activations
};

// The nearest whole numbers.
inline Float nearest(Float x) {
  constexpr float LARGE = 0x1.8p23f;  // has no fraction
  return (x + LARGE) - LARGE;
}

inline void store(Float whole, int16_t *to) {
  const Short words = __builtin_convertvector(__builtin_convertvector(whole, Int), Short);
  std::memcpy(to, &words, sizeof(words));
}

// False if 32 activations are not finite, or too large for products, or too small for a scale.
bool rounded(const float *x, int64_t count, Rounded &found) {
  static thread_local std::vector<int16_t> high, low;
  static thread_local std::vector<float> scales, pairs, sums;
  high.resize(count), low.resize(count), scales.resize(count / 32), pairs.resize(count / 16), sums.resize(count / 32);
  for (int64_t group = 0; group < count / 32; group++, x += 32) {
    Float given[2], most = {}, size = {}, sum = {};
    for (int i = 0; i < 2; i++) {
      given[i] = take<Float>(x + LANES * i);
      const Float positive = (Float)((Int)given[i] & 0x7fffffff);
      most = positive > most ? positive : most;
      size += positive;
    }
    if (!(total(size) <= MOST)) return false;
    float largest = 0;
    for (int i = 0; i < LANES; i++) largest = std::max(largest, most[i]);
    const float scale = largest / 32767;
    if (largest && scale < FLT_MIN) return false;
    const float inverse = largest ? 1 / scale : 0;
    for (int i = 0; i < 2; i++) {
      const Float units = given[i] * inverse, whole = nearest(units);
      store(whole, &high[32 * group + LANES * i]);
      store(nearest((units - whole) * FINER), &low[32 * group + LANES * i]);
      sum += given[i];
    }
    scales[group] = pairs[2 * group] = pairs[2 * group + 1] = scale;
    sums[group] = total(sum);
  }
  found = {high.data(), low.data(), scales.data(), pairs.data(), sums.data()};
  return true;
}

// Sums of neighbouring products, two each: lanes 0 to 7 are of the first 16.
inline Float products(Words codes, const int16_t *with) {
#if defined(__AVX512VNNI__)
  return real((Int)_mm512_dpwssd_epi32(__m512i{}, (__m512i)codes, _mm512_loadu_si512(with)));
#elif defined(__AVX512BW__)
  return real((Int)_mm512_madd_epi16((__m512i)codes, _mm512_loadu_si512(with)));
#elif defined(__AVX2__)
  __m256i sums[2];
  for (int i = 0; i < 2; i++)
    sums[i] = _mm256_madd_epi16(take<__m256i>((const char *)&codes + 32 * i), take<__m256i>(with + 16 * i));
  return real(take<Int>(sums));
#else
  typedef int32_t Wide __attribute__((vector_size(128)));
  const Wide each = __builtin_convertvector(codes, Wide) * __builtin_convertvector(take<Words>(with), Wide);
  typedef int32_t Part __attribute__((vector_size(32)));
  const Part *parts = (const Part *)&each, sums[2] = {parts[0] + parts[1], parts[2] + parts[3]};
  return real(take<Int>(sums));
#endif
}

inline Float dot(Words codes, const Rounded &x, int64_t at) {
  return products(codes, x.high + at) + products(codes, x.low + at) * (1 / FINER);
}

// Outputs [first, last) of R rows, from row `row` on.
template <int T, int R>
void whole(const Rounded &x, int64_t row, const uint8_t *packed, int64_t columns, int64_t outputs, int64_t first,
           int64_t last, float *out) {
  using Row = Blocks<T>;
  const int64_t blocks = columns / (32 * Row::groups), groups = columns / 32;
  for (int64_t o = first; o < last; o++) {
    const uint8_t *block = packed + o * blocks * Row::size;
    Float sums[R] = {};
    Eight rests[R] = {};
    float rest[R] = {};
    for (int64_t b = 0; b < blocks; b++, block += Row::size) {
      if constexpr (Row::wide) {
        Eight offsets = {};
        const Float factors = Row::factors(block, offsets);
        Float scaled[R];
        for (int r = 0; r < R; r++) {
          scaled[r] = factors * take<Float>(x.pairs + 2 * ((row + r) * groups + 8 * b));
          if constexpr (Row::minima) rests[r] += offsets * take<Eight>(x.sums + (row + r) * groups + 8 * b);
        }
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) {
          const Words codes = Row::codes(block, g);
          const Int lanes = (Int{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1}) + 2 * g;
          for (int r = 0; r < R; r++)
            sums[r] += dot(codes, x, (row + r) * columns + 256 * b + 32 * g) * __builtin_shuffle(scaled[r], lanes);
        }
      } else {
        const Words codes = Row::codes(block, 0);
        const float factor = half(block);
        for (int r = 0; r < R; r++) {
          const int64_t at = (row + r) * groups + b;
          sums[r] += dot(codes, x, 32 * at) * (factor * x.scales[at]);
          if constexpr (Row::minima) rest[r] += half(block + 2) * x.sums[at];
        }
      }
    }
    for (int r = 0; r < R; r++) {
      for (int i = 0; i < 8; i++) rest[r] += rests[r][i];
      out[r * outputs + o] = total(sums[r]) + rest[r];
    }
  }
}

template <int T>
void run(const float *x, const uint8_t *packed, int64_t rows, int64_t columns, int64_t outputs, int64_t threads,
         float *out) {
  static const auto plains = {plain<T, 1>, plain<T, 2>, plain<T, 3>, plain<T, 4>};
  static const auto wholes = {whole<T, 1>, whole<T, 2>, whole<T, 3>, whole<T, 4>};
  Rounded codes;
  const bool finite = rounded(x, rows * columns, codes);
  if (rows * columns * outputs < ALONE) threads = 1;
  const int64_t parts = threads == 1 ? 1 : PARTS * threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; part++)
    for (int64_t row = 0; row < rows; row += 4) {
      const int64_t some = std::min<int64_t>(4, rows - row) - 1, first = outputs * part / parts;
      const int64_t last = outputs * (part + 1) / parts;
      float *to = out + row * outputs;
      if (finite) wholes.begin()[some](codes, row, packed, columns, outputs, first, last, to);
      else plains.begin()[some](x + row * columns, packed, columns, outputs, first, last, to);
    }
}

template <int T> void decode(const uint8_t *packed, int64_t blocks, int64_t threads, float *out) {
  using Row = Blocks<T>;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < blocks; b++) {
    Float weights[Row::groups][2];
    Row::decode(packed + b * Row::size, weights);
    std::memcpy(out + b * Row::groups * 32, weights, sizeof(weights));
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
