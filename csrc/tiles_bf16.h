// Products of values that are rounded to bfloat16, two of them in depth to a word: included by tiles.cpp for
// processors that multiply such pairs.

// To the nearest, ties to even; what is not a number stays so.
inline uint32_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return bits >> 16 | 0x40;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline __m512i widened(__m512 values) {
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

inline __m512i interleaved(__m512 first, __m512 second) {
  return _mm512_or_si512(widened(first), _mm512_slli_epi32(widened(second), 16));
}

// 16 words of 32 values that lie side by side.
inline __m512i side_by_side(const float* from) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from)));
}

template <int kRows, int kVectors, bool kPackedA>
inline __attribute__((always_inline)) void multiply_rows16(int64_t depth, const uint32_t* a, int64_t a_row,
                                                           int64_t a_depth, const uint32_t* b, float* c,
                                                           int64_t c_row, bool add, const Applied* applied) {
  Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(b + 16 * 32);
    __builtin_prefetch(b + 16 * 32 + 16);
    const auto left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
    const auto right = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + 16 * (kVectors - 1)));
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto x =
          reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(kPackedA ? a[i] : a[i * a_row])));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, left);
      if constexpr (kVectors == 2) sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, right);
    }
    a += kPackedA ? a_depth : 1;
    b += 32;
  }
  write_tile(sum, c, c_row, add, applied);
}

template <int kRows, int kVectors>
void multiply_tile16(int64_t depth, const uint32_t* a, int64_t a_row, int64_t a_depth, const uint32_t* b,
                     float* c, int64_t c_row, bool add, const Applied* applied) {
  if (a_depth == 1)
    multiply_rows16<kRows, kVectors, false>(depth, a, a_row, a_depth, b, c, c_row, add, applied);
  else
    multiply_rows16<kRows, kVectors, true>(depth, a, a_row, a_depth, b, c, c_row, add, applied);
}

void multiply16(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                const float* b, int64_t, float* c, int64_t c_row, bool add, const Applied* applied) {
  const auto *const left = reinterpret_cast<const uint32_t*>(a), *const right =
                                                                     reinterpret_cast<const uint32_t*>(b);
  with_rows(rows, [&]<int kRows>() {
    (columns <= 16 ? multiply_tile16<kRows, 1> : multiply_tile16<kRows, 2>)(depth, left, a_row, a_depth,
                                                                            right, c, c_row, add, applied);
  });
}

void pack16(int64_t depth, int64_t columns, const float* b, int64_t b_depth, int64_t b_column, float* words,
            int64_t to_panel) {
  auto* const to = reinterpret_cast<uint32_t*>(words);
  const auto one = [&](int64_t k, int64_t c) -> uint32_t {
    return k < depth && c < columns ? rounded(b[k * b_depth + c * b_column]) : 0;
  };
  for (int64_t c = 0; c < columns; c += 32) {
    uint32_t* const panel = to + c / 32 * to_panel;
    int64_t k = 0;
    if (c + 32 <= columns && b_column == 1)
      for (; k + 2 <= depth; k += 2)
        for (int64_t j = 0; j < 32; j += 16) {
          const float* const from = b + k * b_depth + c + j;
          _mm512_storeu_si512(panel + k / 2 * 32 + j,
                              interleaved(_mm512_loadu_ps(from), _mm512_loadu_ps(from + b_depth)));
        }
    else if (c + 32 <= columns && b_depth == 1)
      for (; k + 32 <= depth; k += 32)
        for (int64_t j = 0; j < 32; j += 16) {
          alignas(64) float block[16 * 16];
          for (int64_t i = 0; i < 16; ++i)
            _mm512_store_si512(block + i * 16, side_by_side(b + k + (c + j + i) * b_column));
          transpose(block, 16, reinterpret_cast<float*>(panel) + k / 2 * 32 + j, 32);
        }
    for (; k < depth; k += 2)
      for (int64_t j = 0; j < 32; ++j) panel[k / 2 * 32 + j] = one(k, c + j) | one(k + 1, c + j) << 16;
  }
}

// Row by row, `to_row` apart, where a's rows lie side by side in depth; else those of a tile side by side.
void pack_rows16(int64_t depth, int64_t rows, const float* a, int64_t a_row, int64_t a_depth, float* words,
                 int64_t to_row) {
  auto* const to = reinterpret_cast<uint32_t*>(words);
  const auto one = [&](int64_t i, int64_t k) -> uint32_t {
    return k < depth ? rounded(a[i * a_row + k * a_depth]) : 0;
  };
  if (a_depth == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      int64_t k = 0;
      for (; k + 32 <= depth; k += 32)
        _mm512_storeu_si512(to + i * to_row + k / 2, side_by_side(a + i * a_row + k));
      for (; k < depth; k += 2) to[i * to_row + k / 2] = one(i, k) | one(i, k + 1) << 16;
    }
    return;
  }
  int64_t k = 0;
  const auto mask = static_cast<__mmask16>((1 << rows) - 1);
  if (a_row == 1)
    for (; k + 2 <= depth; k += 2) {
      const float* const from = a + k * a_depth;
      _mm512_mask_storeu_epi32(
          to + k / 2 * rows, mask,
          interleaved(_mm512_maskz_loadu_ps(mask, from), _mm512_maskz_loadu_ps(mask, from + a_depth)));
    }
  for (; k < depth; k += 2)
    for (int64_t i = 0; i < rows; ++i) to[k / 2 * rows + i] = one(i, k) | one(i, k + 1) << 16;
}
