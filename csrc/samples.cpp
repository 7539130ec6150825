// Conversions between the dtypes of samples and the types that are computed in.

#include "samples.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#define WGAN_FAST_F16C
#endif

namespace wgan_fast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename From, typename To>
inline __attribute__((always_inline)) void convert(const void* from, void* to, int64_t count) {
  const auto* __restrict__ const source = static_cast<const From*>(from);
  auto* __restrict__ const target = static_cast<To*>(to);
  for (int64_t i = 0; i < count; ++i) target[i] = static_cast<To>(source[i]);
}

#define WGAN_FAST_CONVERSION(name, From, To)                                  \
  WGAN_FAST_CPU_CLONES void name(const void* from, void* to, int64_t count) { \
    convert<From, To>(from, to, count);                                       \
  }

WGAN_FAST_CONVERSION(float32_from_float16, Half, float)
WGAN_FAST_CONVERSION(float32_from_bfloat16, BFloat16, float)
WGAN_FAST_CONVERSION(float64_from_float16, Half, double)
WGAN_FAST_CONVERSION(float64_from_bfloat16, BFloat16, double)
WGAN_FAST_CONVERSION(float64_from_float32, float, double)
WGAN_FAST_CONVERSION(float16_from_float32, float, Half)
WGAN_FAST_CONVERSION(bfloat16_from_float32, float, BFloat16)

#undef WGAN_FAST_CONVERSION

#ifdef WGAN_FAST_F16C
// By hand, because a compiler does not see the instruction in Half's arithmetic on bits.
__attribute__((target("avx,f16c"))) void float32_from_float16_f16c(const void* from, void* to,
                                                                   int64_t count) {
  const auto* const source = static_cast<const Half*>(from);
  auto* const target = static_cast<float*>(to);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(target + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  for (; i < count; ++i) target[i] = source[i];
}
__attribute__((target("avx,f16c"))) void float16_from_float32_f16c(const void* from, void* to,
                                                                   int64_t count) {
  const auto* const source = static_cast<const float*>(from);
  auto* const target = static_cast<Half*>(to);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) target[i] = source[i];
}
const bool has_f16c = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
#else
constexpr bool has_f16c = false;
constexpr Conversion float32_from_float16_f16c = nullptr, float16_from_float32_f16c = nullptr;
#endif

}  // namespace

Conversion conversion(ScalarType from, ScalarType to) {
  if (to == ScalarType::Float) switch (from) {
      case ScalarType::Float:
        return nullptr;
      case ScalarType::Half:
        return has_f16c ? float32_from_float16_f16c : float32_from_float16;
      case ScalarType::BFloat16:
        return float32_from_bfloat16;
      default:
        break;
    }
  if (to == ScalarType::Double) switch (from) {
      case ScalarType::Double:
        return nullptr;
      case ScalarType::Half:
        return float64_from_float16;
      case ScalarType::BFloat16:
        return float64_from_bfloat16;
      case ScalarType::Float:
        return float64_from_float32;
      default:
        break;
    }
  if (from == ScalarType::Float && to == ScalarType::Half)
    return has_f16c ? float16_from_float32_f16c : float16_from_float32;
  if (from == ScalarType::Float && to == ScalarType::BFloat16) return bfloat16_from_float32;
  STD_TORCH_CHECK(false,
                  "expected float16, bfloat16 or float32 samples computed in float32, or samples "
                  "computed in float64 and written as float64");
  return nullptr;
}

}  // namespace wgan_fast
