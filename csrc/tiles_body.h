// The inner loops of a program for one instruction set: included once for each by tiles.cpp, which defines
// VECTOR, the floats in a register, and ROWS, the rows of a tile. Vectors are GCC's and clang's own.

typedef float Vector __attribute__((vector_size(4 * VECTOR)));

constexpr int64_t kColumns = 2 * VECTOR;

inline __attribute__((always_inline)) Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline __attribute__((always_inline)) void store(float* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof vector);
}

#if defined(__x86_64__) && VECTOR == 16
#define BIT(code) (uint64_t{1} << static_cast<int64_t>(Code::code))
constexpr uint64_t kApplies =
    BIT(kAdd) | BIT(kAddRelu) | BIT(kAddLeakyRelu) | BIT(kSigns) | BIT(kMask) | BIT(kGate) | BIT(kGateLeaky);
#undef BIT

// As `run` does in memory.
template <int kRows>
inline __attribute__((always_inline)) void apply_to_tile(Vector (&tile)[kRows][2], const Applied& applied) {
  for (const Statement* s = applied.first; s < applied.first + applied.count; ++s) {
    const auto with_tile = [&](const auto& f) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) f(tile[i][j], i, j);
    };
    const auto code = static_cast<Code>(s->code);
    const auto p = static_cast<float>(s->numbers[0].value());
    const __m512 all_p = _mm512_set1_ps(p), zero = _mm512_setzero_ps();
    if (code == Code::kSigns) {
      auto* const to =
          reinterpret_cast<uint32_t*>(s->to.at(applied.memory, applied.row, 0)) + applied.column / 32;
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        uint32_t bits = 0;
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j)
          bits |= static_cast<uint32_t>(p != 0 ? _mm512_cmp_ps_mask(tile[i][j], zero, _CMP_NLE_UQ)
                                               : _mm512_cmp_ps_mask(tile[i][j], zero, _CMP_GT_OQ))
                  << 16 * j;
        to[i * s->to.row] = bits;
      }
    } else if (code == Code::kAdd || code == Code::kAddRelu || code == Code::kAddLeakyRelu) {
      const float* const row = s->from[1].at(applied.memory, 0, applied.column);
      const Vector both[2] = {load(row), load(row + VECTOR)};
      if (code == Code::kAdd)
        with_tile([&](Vector& x, int, int j) { x += p * both[j]; });
      else
        with_tile([&](Vector& x, int, int j) { x += both[j]; });
      if (code == Code::kAddRelu)  // of two zeros, or with what is no number, the second
        with_tile([&](Vector& x, int, int) { x = _mm512_max_ps(zero, x); });
      else if (code == Code::kAddLeakyRelu)
        with_tile([&](Vector& x, int, int) {
          x = _mm512_mask_mul_ps(x, _mm512_cmp_ps_mask(x, zero, _CMP_NGT_UQ), x, all_p);
        });
    } else {
      const int64_t row = s->from[1].row;
      const auto* const words =
          reinterpret_cast<const uint32_t*>(s->from[1].at(applied.memory, applied.row, 0)) +
          applied.column / 32;
      const auto with_bits = [&](const auto& f) {
        with_tile(
            [&](Vector& x, int i, int j) { x = f(x, static_cast<__mmask16>(words[i * row] >> 16 * j)); });
      };
      if (code == Code::kMask)
        with_bits(
            [&](__m512 x, __mmask16 bits) { return _mm512_mul_ps(x, _mm512_maskz_mov_ps(bits, all_p)); });
      else if (code == Code::kGate)
        with_bits([&](__m512 x, __mmask16 bits) { return _mm512_maskz_mov_ps(bits, x); });
      else
        with_bits([&](__m512 x, __mmask16 bits) {
          return _mm512_mask_mul_ps(x, static_cast<__mmask16>(~bits), x, all_p);
        });
    }
  }
}
#else
constexpr uint64_t kApplies = 0;

template <int kRows>
void apply_to_tile(Vector (&)[kRows][2], const Applied&) {}
#endif

// Writes a tile, after what is to be applied to it.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void write_tile(Vector (&tile)[kRows][kVectors], float* c,
                                                      int64_t c_row, bool add, const Applied* applied) {
  if (add) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) tile[i][j] = load(c + i * c_row + j * VECTOR) + tile[i][j];
  }
  if constexpr (kVectors == 2 && kApplies != 0)
    if (applied != nullptr) apply_to_tile(tile, *applied);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(c + i * c_row + j * VECTOR, tile[i][j]);
}

template <int kRows, int kVectors, bool kPackedA>
inline __attribute__((always_inline)) void multiply_rows(int64_t depth, const float* a, int64_t a_row,
                                                         int64_t a_depth, const float* b, int64_t b_depth,
                                                         float* c, int64_t c_row, bool add,
                                                         const Applied* applied) {
  Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) sum[i][j] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(b + 16 * b_depth);
    if (VECTOR == 16 && kVectors == 2) {
      __builtin_prefetch(b + 16 * b_depth + VECTOR);
      __builtin_prefetch(b + 16 * b_depth + 2 * VECTOR - 1);
    }
    const Vector left = load(b);
    const Vector right = kVectors == 2 ? load(b + VECTOR) : left;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float x = kPackedA ? a[i] : a[i * a_row];
      sum[i][0] += x * left;
      if constexpr (kVectors == 2) sum[i][1] += x * right;
    }
    a += kPackedA ? a_depth : 1;
    b += b_depth;
  }
  write_tile(sum, c, c_row, add, applied);
}

template <int kRows, int kVectors>
void multiply_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                   int64_t b_depth, float* c, int64_t c_row, bool add, const Applied* applied) {
  if (a_depth == 1)
    multiply_rows<kRows, kVectors, false>(depth, a, a_row, a_depth, b, b_depth, c, c_row, add, applied);
  else
    multiply_rows<kRows, kVectors, true>(depth, a, a_row, a_depth, b, b_depth, c, c_row, add, applied);
}

// Calls `call` with the height of a tile as a constant.
template <int kMost = ROWS, typename Call>
inline __attribute__((always_inline)) void with_rows(int64_t rows, const Call& call) {
  if constexpr (kMost > 0) {
    if (rows == kMost) return call.template operator()<kMost>();
    with_rows<kMost - 1>(rows, call);
  }
}

void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
              const float* b, int64_t b_depth, float* c, int64_t c_row, bool add, const Applied* applied) {
  with_rows(rows, [&]<int kRows>() {
    (columns <= VECTOR ? multiply_tile<kRows, 1> : multiply_tile<kRows, 2>)(depth, a, a_row, a_depth, b,
                                                                            b_depth, c, c_row, add, applied);
  });
}

// Four floats, as often as they fit into a vector.
inline __attribute__((always_inline)) Vector repeat(const float* from) {
#if defined(__x86_64__) && VECTOR == 16
  return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
#else
  Vector vector;
  for (int j = 0; j < VECTOR / 4; ++j) std::memcpy(reinterpret_cast<float*>(&vector) + 4 * j, from, 16);
  return vector;
#endif
}

void multiply_few(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* b, float* c,
                  int64_t c_row, bool add) {
  with_rows(rows, [&]<int kRows>() {
    Vector sum[kRows] = {};
    const auto step = [&](const float* from, int64_t from_row) {
      const Vector right = load(b);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) sum[i] += repeat(from + i * from_row) * right;
      b += VECTOR;
    };
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) step(a + k, a_row);
    if (k < depth) {
      float last[kRows][4] = {};
      for (int i = 0; i < kRows; ++i)
        std::memcpy(last[i], a + i * a_row + k, sizeof(float) * static_cast<size_t>(depth - k));
      step(last[0], 4);
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < VECTOR / 4; ++j) {
        const float total = (sum[i][4 * j] + sum[i][4 * j + 1]) + (sum[i][4 * j + 2] + sum[i][4 * j + 3]);
        float& to = c[i * c_row + j];
        to = add ? to + total : total;
      }
  });
}

// VECTOR rows of VECTOR elements into as many columns; of rows from `count` on nothing is read, and what they
// give is of no use. Where there is GCC's shuffle: interleaved by halves, log2(VECTOR) times; or but for two
// of these, where parts of a vector can be loaded.
inline __attribute__((always_inline)) void transpose(const float* from, int64_t from_row, float* to,
                                                     int64_t to_row, int64_t count = VECTOR) {
#ifdef __clang__
  for (int i = 0; i < VECTOR; ++i)
    for (int j = 0; j < VECTOR; ++j) to[j * to_row + i] = i < count ? from[i * from_row + j] : 0;
#elif defined(__x86_64__) && VECTOR == 16
  const auto row = [&](int64_t i) { return from + (count == 16 ? i : std::min(i, count - 1)) * from_row; };
#pragma GCC unroll 4
  for (int c = 0; c < 16; c += 4) {
    __m512 rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm512_castps128_ps512(_mm_loadu_ps(row(i) + c));
      rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(row(i + 4) + c), 1);
      rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(row(i + 8) + c), 2);
      rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(row(i + 12) + c), 3);
    }
    const auto pairs = [](const __m512& low, const __m512& high) {
      return std::pair(_mm512_castps_pd(_mm512_unpacklo_ps(low, high)),
                       _mm512_castps_pd(_mm512_unpackhi_ps(low, high)));
    };
    const auto [low01, high01] = pairs(rows[0], rows[1]);
    const auto [low23, high23] = pairs(rows[2], rows[3]);
    store(to + c * to_row, _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23)));
    store(to + (c + 1) * to_row, _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23)));
    store(to + (c + 2) * to_row, _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23)));
    store(to + (c + 3) * to_row, _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23)));
  }
#else
  typedef int32_t Lanes __attribute__((vector_size(4 * VECTOR)));
  Vector rows[VECTOR];
#pragma GCC unroll 16
  for (int i = 0; i < VECTOR; ++i) rows[i] = i < count ? load(from + i * from_row) : Vector{};
#pragma GCC unroll 4
  for (int width = 1; width < VECTOR; width *= 2) {
    Lanes low, high;
    for (int l = 0; l < VECTOR; ++l) {
      low[l] = l & width ? VECTOR + l - width : l;
      high[l] = l & width ? VECTOR + l : l + width;
    }
#pragma GCC unroll 16
    for (int i = 0; i < VECTOR; ++i) {
      if (i & width) continue;
      const Vector first = rows[i], second = rows[i + width];
      rows[i] = __builtin_shuffle(first, second, low);
      rows[i + width] = __builtin_shuffle(first, second, high);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < VECTOR; ++i) store(to + i * to_row, rows[i]);
#endif
}

// One after the other in depth where the columns lie side by side, so that memory is read in its order.
void pack(int64_t depth, int64_t columns, const float* b, int64_t b_depth, int64_t b_column, float* to,
          int64_t to_panel) {
  const int64_t whole = columns / kColumns * kColumns;
  for (int64_t c = whole; c < columns; c += kColumns)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < kColumns; ++j)
        to[c / kColumns * to_panel + k * kColumns + j] =
            c + j < columns ? b[k * b_depth + (c + j) * b_column] : 0;
  if (b_column == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* const from = b + k * b_depth;
      float* at = to + k * kColumns;
      for (int64_t c = 0; c < whole; c += kColumns, at += to_panel)
        for (int64_t j = 0; j < kColumns; j += VECTOR) store(at + j, load(from + c + j));
    }
    return;
  }
  for (int64_t c = 0; c < whole; c += kColumns, to += to_panel) {
    int64_t k = 0;
    if (b_depth == 1)
      for (; k + VECTOR <= depth; k += VECTOR)
        for (int64_t j = 0; j < kColumns; j += VECTOR) {
          for (int64_t i = 0; i < VECTOR; ++i)
            __builtin_prefetch(b + k + 4 * VECTOR + (c + j + i) * b_column);
          transpose(b + k + (c + j) * b_column, b_column, to + k * kColumns + j, kColumns);
        }
    for (; k < depth; ++k)
      for (int64_t j = 0; j < kColumns; ++j) to[k * kColumns + j] = b[k * b_depth + (c + j) * b_column];
  }
}

void pack_rows(int64_t depth, int64_t rows, const float* a, int64_t a_row, int64_t a_depth, float* to) {
  int64_t k = 0;
  // A whole vector at a time: what is too much of it is overwritten by the next, and the last do without.
  if (a_row == 1 && rows <= VECTOR && a_depth + rows >= VECTOR)
    for (; k + 1 < depth && (depth - k) * rows >= VECTOR; ++k) store(to + k * rows, load(a + k * a_depth));
  if (a_depth == 1 && rows <= VECTOR)
    for (; k + 2 * VECTOR <= depth; k += VECTOR) {
      alignas(64) float block[VECTOR * VECTOR];
      transpose(a + k, a_row, block, VECTOR, rows);
      for (int64_t i = 0; i < VECTOR; ++i) store(to + (k + i) * rows, load(block + i * VECTOR));
    }
  for (; k < depth; ++k)
    for (int64_t i = 0; i < rows; ++i) to[k * rows + i] = a[i * a_row + k * a_depth];
}

void turn(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; r += VECTOR)
    for (int64_t c = 0; c < columns; c += VECTOR) {
      const float* const block = from + c * from_row + r;
      float* const place = to + r * to_row + c;
      if (r + VECTOR <= rows && c + VECTOR <= columns) {
        transpose(block, from_row, place, to_row);
        continue;
      }
      for (int64_t i = 0; i < std::min<int64_t>(VECTOR, rows - r); ++i)
        for (int64_t j = 0; j < std::min<int64_t>(VECTOR, columns - c); ++j)
          place[i * to_row + j] = block[j * from_row + i];
    }
}

double dot(int64_t count, const float* a, const float* b) {
  Vector sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * VECTOR <= count; i += 4 * VECTOR)
    for (int j = 0; j < 4; ++j) sums[j] += load(a + i + j * VECTOR) * load(b + i + j * VECTOR);
  const Vector sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int l = 0; l < VECTOR; ++l) total += sum[l];
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// Calls f on the elements of a block; what is not side by side in memory passes through a buffer.
template <int kSources, typename F>
inline __attribute__((always_inline)) void apply(const Statement& s, float* const* memory, int64_t r0,
                                                 int64_t r1, int64_t c0, int64_t c1, const F& f) {
  const int64_t count = c1 - c0;
  bool side_by_side = s.to.column == 1;
  for (int i = 0; i < kSources; ++i) side_by_side = side_by_side && s.from[i].column == 1;
  if (side_by_side && count == kColumns) {
    const float* in[3] = {};
    for (int i = 0; i < kSources; ++i) in[i] = s.from[i].at(memory, r0, c0);
    float* out = s.to.at(memory, r0, c0);
    for (int64_t r = r0; r < r1; ++r) {
      const float *const x = in[0], *const y = in[1], *const z = in[2];
#pragma GCC ivdep
      for (int64_t c = 0; c < kColumns; ++c) out[c] = f(x + c, y + c, z + c);
      for (int i = 0; i < kSources; ++i) in[i] += s.from[i].row;
      out += s.to.row;
    }
    return;
  }
  float buffer[4][kBlockColumns];
  for (int64_t r = r0; r < r1; ++r) {
    const float* in[3] = {buffer[0], buffer[1], buffer[2]};
    for (int i = 0; i < kSources; ++i) {
      const float* const from = s.from[i].at(memory, r, c0);
      const int64_t column = s.from[i].column;
      if (column == 1 || count == 1)
        in[i] = from;
      else if (column != 0 || r == r0 || s.from[i].row != 0)
        for (int64_t c = 0; c < count; ++c) buffer[i][c] = from[c * column];
    }
    float* const place = s.to.at(memory, r, c0);
    float* const out = s.to.column == 1 || count == 1 ? place : buffer[3];
    const float *const x = in[0], *const y = in[1], *const z = in[2];
#pragma GCC ivdep
    for (int64_t c = 0; c < count; ++c) out[c] = f(x + c, y + c, z + c);
    if (out != place)
      for (int64_t c = 0; c < count; ++c) place[c * s.to.column] = out[c];
  }
}

// Calls f on the elements of a block and their bits: `from[1]` has words where others have elements.
template <typename F>
inline __attribute__((always_inline)) void apply_bits(const Statement& s, float* const* memory, int64_t r0,
                                                      int64_t r1, int64_t c0, int64_t c1, const F& f) {
  for (int64_t r = r0; r < r1; ++r) {
    const float* x = s.from[0].at(memory, r, c0);
    const auto* const words = reinterpret_cast<const uint32_t*>(s.from[1].at(memory, r, 0));
    float* out = s.to.at(memory, r, c0);
    for (int64_t c = c0; c < c1;) {
      const uint32_t bits = words[c / 32] >> c % 32;
      const int64_t count = std::min(32 - c % 32, c1 - c);
      if (count == kColumns) {
#pragma GCC ivdep
        for (int64_t j = 0; j < kColumns; ++j) out[j] = f(x[j], bits >> j & 1);
      } else {
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) out[j] = f(x[j], bits >> j & 1);
      }
      c += count, x += count, out += count;
    }
  }
}

// What is above zero, as bits; with a number other than 0, what is not below or at it, as NaN is not.
inline __attribute__((always_inline)) void write_signs(const Statement& s, float* const* memory, int64_t r0,
                                                       int64_t r1, int64_t c0, int64_t c1) {
  const bool with_nan = s.numbers[0].value() != 0;
  for (int64_t r = r0; r < r1; ++r) {
    const float* const x = s.from[0].at(memory, r, c0);
    auto* const to = reinterpret_cast<uint8_t*>(s.to.at(memory, r, 0)) + c0 / 8;
    int64_t j = 0;
#if defined(__x86_64__) && VECTOR == 16
    for (; j + 16 <= c1 - c0; j += 16) {
      const __m512 values = _mm512_loadu_ps(x + j);
      const auto bits =
          static_cast<uint16_t>(with_nan ? _mm512_cmp_ps_mask(values, _mm512_setzero_ps(), _CMP_NLE_UQ)
                                         : _mm512_cmp_ps_mask(values, _mm512_setzero_ps(), _CMP_GT_OQ));
      std::memcpy(to + j / 8, &bits, 2);
    }
#endif
    for (; j < c1 - c0; j += 8) {
      uint8_t bits = 0;
      for (int64_t i = j; i < std::min(j + 8, c1 - c0); ++i)
        bits |= static_cast<uint8_t>((with_nan ? !(x[i] <= 0) : x[i] > 0) << (i - j));
      to[j / 8] = bits;
    }
  }
}

void run(const Statement& s, float* const* memory, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
  const auto p = static_cast<float>(s.numbers[0].value()), q = static_cast<float>(s.numbers[1].value());
  using F = const float*;
#define APPLY(sources, expression) \
  return apply<sources>(s, memory, r0, r1, c0, c1, [=](F x, F y, F z) { return expression; })
  switch (static_cast<Code>(s.code)) {
    case Code::kCopy:
      APPLY(1, *x);
    case Code::kAdd:
      APPLY(2, *x + p * *y);
    case Code::kMultiply:
      APPLY(2, *x * *y);
    case Code::kDivide:
      APPLY(2, *x / *y);
    case Code::kScale:
      APPLY(1, p * *x + q);
    case Code::kLeakyRelu:
      APPLY(1, *x > 0 ? *x : *x * p);
    case Code::kAddRelu:
      APPLY(2, *x + *y < 0 ? 0 : *x + *y);
    case Code::kAddLeakyRelu:
      APPLY(2, *x + *y > 0 ? *x + *y : (*x + *y) * p);
    case Code::kRelu:
      APPLY(1, *x < 0 ? 0 : *x);
    case Code::kLeakyReluBackward:
      APPLY(2, *y > 0 ? *x : *x * p);
    case Code::kThresholdBackward:
      APPLY(2, *y <= p ? 0 : *x);
    case Code::kLerp:  // as torch.lerp: exact at both ends
      APPLY(3, *z < 0.5f ? *y + *z * (*x - *y) : *x - (*x - *y) * (1 - *z));
    case Code::kMask:
      return apply_bits(s, memory, r0, r1, c0, c1,
                        [=](float x, uint32_t bit) { return x * (bit ? p : 0.0f); });
    case Code::kGate:
      return apply_bits(s, memory, r0, r1, c0, c1, [](float x, uint32_t bit) { return bit ? x : 0; });
    case Code::kGateLeaky:
      return apply_bits(s, memory, r0, r1, c0, c1, [=](float x, uint32_t bit) { return bit ? x : x * p; });
    case Code::kSigns:
      return write_signs(s, memory, r0, r1, c0, c1);
  }
#undef APPLY
}

void sum(const View& from, float* const* memory, int64_t r0, int64_t r1, int64_t c0, int64_t c1, float* to) {
  int64_t c = c0;
  if (from.column == 1)
    for (; c + 4 * VECTOR <= c1; c += 4 * VECTOR) {
      Vector sums[4] = {};
      for (int64_t r = r0; r < r1; ++r)
        for (int j = 0; j < 4; ++j) sums[j] += load(from.at(memory, r, c + j * VECTOR));
      for (int j = 0; j < 4; ++j) store(to + c + j * VECTOR, sums[j]);
    }
  for (; c < c1; ++c) {
    double total = 0;
    for (int64_t r = r0; r < r1; ++r) total += *from.at(memory, r, c);
    to[c] = static_cast<float>(total);
  }
}

// The digits of the probability from the last on, a random word each: a 1 lets more bits through, a 0 fewer.
void draw(uint64_t seed, int64_t first, int64_t count, uint32_t keep, uint32_t* to) {
  const int digits = 32 - __builtin_ctz(keep);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = 0;
    for (int d = 0; d < digits; ++d) {
      // SplitMix64 (Steele, Lea and Flood 2014), by position.
      uint64_t word = seed + static_cast<uint64_t>((first + i) * 32 + d + 1) * 0x9E3779B97F4A7C15;
      word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9;
      word = (word ^ word >> 27) * 0x94D049BB133111EB;
      const auto random = static_cast<uint32_t>((word ^ word >> 31) >> 32);
      bits = keep >> (32 - digits + d) & 1 ? bits | random : bits & random;
    }
    to[i] = bits;
  }
}

constexpr Tiles kTiles = {NAME,         ROWS, kColumns,  VECTOR / 4, kApplies, multiply,
                          multiply_few, pack, pack_rows, nullptr,    nullptr,  nullptr,
                          turn,         dot,  run,       sum,        draw};
