// Attention of one query token over open and sealed pages of one sequence, on a CPU; see `attend.py`.
//
// Scales are folded as in `kernels/sealed.py`: K's into the query, once a page, V's into the probabilities. Each unit of
// work is a head's share of the tokens, read once with an online softmax (Milakov and Gimelshein 2018, arXiv
// 1805.02867); the units' sums are joined at the end (flash-decoding). All arithmetic is float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int WIDE = 16;  // floats of a register
#elif defined(__AVX__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif
constexpr int64_t BLOCK = 128;  // tokens that are scored before their values are added
constexpr int64_t SHARE = 128;  // fewest tokens of a unit of work
constexpr int64_t ALONE = 1 << 17;  // products up to which waking other threads costs more than it saves
enum Format { F32 = 32, BF16 = 16, F16 = 17, Q8 = 8, Q4 = 4, Q2 = 2 };  // Q: codes, planes as in `pages/codec.py`

struct Part {  // K or V of a stretch; pointers and strides (in bytes; of scales in elements), as `attend.py` packs them
  int64_t states, scales, head, row, scale_head, format;
  bool quantized() const { return format <= Q8; }
};

struct Stretch {  // neighbouring tokens; `skip` tokens lie before them in their first page
  Part keys, values;
  int64_t query, skip, tokens, page;
};

struct Job {
  const Stretch *stretches;
  int64_t count, kv_heads, groups, key_dim, value_dim;
  const uint8_t *visible;  // per token, or null
  float scaling, softcap;  // 0: no cap
  int64_t partial() const { return groups * (value_dim + 2); }  // floats of a unit: sums, peak and total per query
};

template <int L> struct Lanes {
  typedef float Float __attribute__((vector_size(4 * L)));
  typedef int32_t Int __attribute__((vector_size(4 * L)));
  typedef uint16_t Half __attribute__((vector_size(2 * L)));
  typedef uint8_t Byte __attribute__((vector_size(L)));
};

template <class T> T take(const void *from) {
  T found;
  std::memcpy(&found, from, sizeof(T));
  return found;
}

inline float half(uint16_t bits) {  // finite float16, subnormal ones too
  const uint32_t wide = uint32_t(bits & 0x7fff) << 13, sign = uint32_t(bits & 0x8000) << 16;
  const float size = take<float>(&wide) * 0x1p112f;
  const uint32_t all = take<uint32_t>(&size) | sign;
  return take<float>(&all);
}

inline float exponential(float x) {  // of x <= 0; Cephes' expf without its branches
  const float near = std::max(x, -87.0f);
  const float n = (near * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = near - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + next;
  const int32_t power = (int32_t(n) + 127) << 23;
  return x < -87.0f ? 0.0f : (p * r * r + r + 1.0f) * take<float>(&power);
}

template <int F> constexpr int PLANES = F == Q2 ? 4 : F == Q4 ? 2 : 1;

template <int F, int L> typename Lanes<L>::Float load(const uint8_t *row, int64_t block, int plane) {
  using Float = typename Lanes<L>::Float;
  using Int = typename Lanes<L>::Int;
  if constexpr (F == F32) return take<Float>(row + 4 * L * block);
  if constexpr (F == BF16)
    return (Float)(__builtin_convertvector(take<typename Lanes<L>::Half>(row + 2 * L * block), Int) << 16);
  if constexpr (F == F16) {
    const Int wide = __builtin_convertvector(take<typename Lanes<L>::Half>(row + 2 * L * block), Int);
    const Float size = (Float)((wide & 0x7fff) << 13) * 0x1p112f;
    return (Float)((Int)size | ((wide & 0x8000) << 16));
  }
  // In two steps: gcc before 14 widens fourfold one number at a time.
  const auto pairs = __builtin_convertvector(take<typename Lanes<L>::Byte>(row + L * block), typename Lanes<L>::Half);
  const Int bytes = __builtin_convertvector(pairs, Int);
  const Int code = PLANES<F> == 1 ? bytes : (bytes >> (F * plane)) & ((1 << F % 32) - 1);
  return __builtin_convertvector(code, Float);
}

template <int L> float total(typename Lanes<L>::Float sum) {
  if constexpr (L == 4) return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  else {
    using Part = typename Lanes<L / 2>::Float;
    return total<L / 2>(take<Part>(&sum) + take<Part>((const char *)&sum + sizeof(Part)));
  }
}

using Kernel = void (*)(const uint8_t *, int64_t, int64_t, int64_t, const float *, float *);

// Products of `count` rows with G queries, (G, dim), added to `out`, (G, BLOCK).
template <int F, int L, int G>
void score(const uint8_t *rows, int64_t stride, int64_t count, int64_t dim, const float *query, float *out) {
  const int64_t width = dim / PLANES<F>;
  for (int64_t t = 0; t < count; t++, rows += stride) {
    typename Lanes<L>::Float sum[G] = {};
    for (int64_t block = 0; block < width / L; block++)
      for (int plane = 0; plane < PLANES<F>; plane++) {
        const auto key = load<F, L>(rows, block, plane);
        for (int g = 0; g < G; g++)
          sum[g] += key * take<typename Lanes<L>::Float>(query + g * dim + plane * width + block * L);
      }
    for (int g = 0; g < G; g++) out[g * BLOCK + t] += total<L>(sum[g]);
  }
}

// `mix` for W neighbouring blocks of channels: enough sums at once to hide the latency of an addition.
template <int F, int L, int G, int W>
void mix_blocks(const uint8_t *rows, int64_t stride, int64_t count, int64_t dim, const float *weights, float *out) {
  const int64_t width = dim / PLANES<F>;
  typename Lanes<L>::Float sum[W][PLANES<F>][G] = {};
  for (int64_t t = 0; t < count; t++, rows += stride)
    for (int w = 0; w < W; w++)
      for (int plane = 0; plane < PLANES<F>; plane++) {
        const auto value = load<F, L>(rows, w, plane);
        for (int g = 0; g < G; g++) sum[w][plane][g] += value * weights[g * BLOCK + t];
      }
  for (int w = 0; w < W; w++)
    for (int plane = 0; plane < PLANES<F>; plane++)
      for (int g = 0; g < G; g++) {
        float *place = out + g * dim + plane * width + w * L;
        const auto joined = take<typename Lanes<L>::Float>(place) + sum[w][plane][g];
        std::memcpy(place, &joined, sizeof(joined));
      }
}

// Sums of `count` rows by G rows of weights, (G, BLOCK), added to `out`, (G, dim).
template <int F, int L, int G>
void mix(const uint8_t *rows, int64_t stride, int64_t count, int64_t dim, const float *weights, float *out) {
  constexpr int SUMS = WIDE == 16 ? 4 : 2;  // per query; AVX-512 has twice the registers
  constexpr int MANY = std::max(1, SUMS / PLANES<F>), BYTES = L * (F == F32 ? 4 : F == F16 || F == BF16 ? 2 : 1);
  int64_t block = 0, blocks = dim / PLANES<F> / L;
  for (; block + MANY <= blocks; block += MANY)
    mix_blocks<F, L, G, MANY>(rows + block * BYTES, stride, count, dim, weights, out + block * L);
  for (; block < blocks; block++)
    mix_blocks<F, L, G, 1>(rows + block * BYTES, stride, count, dim, weights, out + block * L);
}

template <int F, int L> Kernel pick(bool mixes, int64_t queries) {
  static const Kernel scores[] = {score<F, L, 1>, score<F, L, 2>, score<F, L, 3>, score<F, L, 4>};
  static const Kernel mixers[] = {mix<F, L, 1>, mix<F, L, 2>, mix<F, L, 3>, mix<F, L, 4>};
  return (mixes ? mixers : scores)[queries - 1];
}

template <int F> Kernel pick(int64_t dim, bool mixes, int64_t queries) {
  return dim / PLANES<F> % WIDE ? pick<F, 4>(mixes, queries) : pick<F, WIDE>(mixes, queries);
}

// `score` or `mix` over all queries of a head, four at a time; `in_step` and `out_step` are the floats of one query.
void each(const Part &part, const uint8_t *rows, int64_t count, int64_t dim, int64_t groups, bool mixes,
          const float *in, int64_t in_step, float *out, int64_t out_step) {
  for (int64_t g = 0; g < groups; g += 4) {
    const int64_t some = std::min<int64_t>(4, groups - g);
    const Kernel run = part.format == Q8    ? pick<Q8>(dim, mixes, some)
                       : part.format == Q4  ? pick<Q4>(dim, mixes, some)
                       : part.format == Q2  ? pick<Q2>(dim, mixes, some)
                       : part.format == F32 ? pick<F32>(dim, mixes, some)
                       : part.format == F16 ? pick<F16>(dim, mixes, some)
                                            : pick<BF16>(dim, mixes, some);
    run(rows, part.row, count, dim, in + g * in_step, out + g * out_step);
  }
}

// Adds up to BLOCK tokens of one page to a unit's sums. `at`: the first token's place in the stretch's pages.
void add_block(const Job &job, const Stretch &from, int64_t head, int64_t at, int64_t count, const uint8_t *visible,
               std::vector<float> &room, float *sums) {
  const int64_t page = at / from.page, inside = at % from.page, dim = job.key_dim;
  float *folded = room.data(), *scores = folded + job.groups * dim;
  float *peaks = sums + job.groups * job.value_dim, *totals = peaks + job.groups;
  const uint16_t *scale = (const uint16_t *)from.keys.scales + head * from.keys.scale_head + page * 2 * dim;
  for (int64_t g = 0; g < job.groups; g++) {
    const float *query = (const float *)from.query + (head * job.groups + g) * dim;
    float shift = 0, *out = folded + g * dim;
    if (from.keys.quantized()) {
#pragma omp simd reduction(+ : shift)
      for (int64_t d = 0; d < dim; d++) {
        const float scaled = query[d] * job.scaling;
        out[d] = scaled * half(scale[d]);
        shift += scaled * half(scale[dim + d]);
      }
    } else {
      for (int64_t d = 0; d < dim; d++) out[d] = query[d] * job.scaling;
    }
    std::fill_n(scores + g * BLOCK, count, shift);
  }
  const uint8_t *keys = (const uint8_t *)from.keys.states + head * from.keys.head + at * from.keys.row;
  each(from.keys, keys, count, dim, job.groups, false, folded, dim, scores, BLOCK);
  scale = (const uint16_t *)from.values.scales + head * from.values.scale_head + page * 2 * from.page + inside;
  for (int64_t g = 0; g < job.groups; g++) {
    float *row = scores + g * BLOCK, *sum = sums + g * job.value_dim;
    if (job.softcap > 0)
      for (int64_t t = 0; t < count; t++) row[t] = std::tanh(row[t] / job.softcap) * job.softcap;
    if (visible)
      for (int64_t t = 0; t < count; t++) row[t] = visible[t] ? row[t] : -INFINITY;
    float peak = peaks[g], added = 0, shift = 0;
#pragma omp simd reduction(max : peak)
    for (int64_t t = 0; t < count; t++) peak = std::max(peak, row[t]);
    if (peak == -INFINITY) {  // nothing seen yet
      std::fill_n(row, count, 0.0f);
      continue;
    }
#pragma omp simd reduction(+ : added)
    for (int64_t t = 0; t < count; t++) added += row[t] = exponential(row[t] - peak);
    if (from.values.quantized()) {
#pragma omp simd reduction(+ : shift)
      for (int64_t t = 0; t < count; t++) {
        shift += row[t] * half(scale[from.page + t]);
        row[t] *= half(scale[t]);
      }
    }
    const float kept = exponential(peaks[g] - peak);
    totals[g] = totals[g] * kept + added;
    peaks[g] = peak;
    for (int64_t d = 0; d < job.value_dim; d++) sum[d] = sum[d] * kept + shift;
  }
  const uint8_t *values = (const uint8_t *)from.values.states + head * from.values.head + at * from.values.row;
  each(from.values, values, count, job.value_dim, job.groups, true, scores, BLOCK, sums, job.value_dim);
}

// A unit of work: the tokens [first, last) for one head of K and V.
void add_tokens(const Job &job, int64_t head, int64_t first, int64_t last, float *sums) {
  std::vector<float> room(job.groups * (job.key_dim + BLOCK));
  std::fill_n(sums, job.partial(), 0.0f);
  std::fill_n(sums + job.groups * job.value_dim, job.groups, -INFINITY);
  int64_t place = 0;
  for (const Stretch *from = job.stretches; from < job.stretches + job.count; place += from->tokens, from++)
    for (int64_t t = std::max(first - place, int64_t(0)); t < std::min(last - place, from->tokens);) {
      const int64_t at = from->skip + t;
      const int64_t count = std::min({std::min(last - place, from->tokens) - t, from->page - at % from->page, BLOCK});
      add_block(job, *from, head, at, count, job.visible ? job.visible + place + t : nullptr, room, sums);
      t += count;
    }
}

}  // namespace

// `out` is (kv_heads * groups, value_dim) float32; `sinks` an extra logit per query head, or null.
extern "C" void ctxopt_attend(const Stretch *stretches, int64_t count, int64_t kv_heads, int64_t groups,
                              int64_t key_dim, int64_t value_dim, float scaling, float softcap,
                              const uint8_t *visible, const float *sinks, int64_t threads, float *out) {
  const Job job{stretches, count, kv_heads, groups, key_dim, value_dim, visible, scaling, softcap};
  int64_t tokens = 0;
  for (int64_t i = 0; i < count; i++) tokens += stretches[i].tokens;
  if (tokens * kv_heads * groups * (key_dim + value_dim) < ALONE) threads = 1;
  const int64_t shares = std::min(2 * threads, std::max<int64_t>(1, tokens / SHARE));
  std::vector<float> sums(kv_heads * shares * job.partial());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t unit = 0; unit < kv_heads * shares; unit++) {
    const int64_t share = unit % shares;
    add_tokens(job, unit / shares, tokens * share / shares, tokens * (share + 1) / shares,
               sums.data() + unit * job.partial());
  }
  for (int64_t query = 0; query < kv_heads * groups; query++) {
    const float *first = sums.data() + query / groups * shares * job.partial();
    const int64_t g = query % groups, peaks = groups * value_dim + g;
    float peak = sinks ? sinks[query] : -INFINITY, all = 0, *result = out + query * value_dim;
    for (int64_t share = 0; share < shares; share++) peak = std::max(peak, first[share * job.partial() + peaks]);
    std::fill_n(result, value_dim, 0.0f);
    if (peak == -INFINITY) continue;  // a query that sees nothing gives zeros
    if (sinks) all += std::exp(sinks[query] - peak);
    for (int64_t share = 0; share < shares; share++) {
      const float *part = first + share * job.partial(), kept = std::exp(part[peaks] - peak);
      all += kept * part[peaks + groups];
      for (int64_t d = 0; d < value_dim; d++) result[d] += kept * part[g * value_dim + d];
    }
    for (int64_t d = 0; d < value_dim; d++) result[d] /= all;
  }
}
