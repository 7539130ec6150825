// The inner loops of a program for every instruction set that it may meet, and the choice among them.

#include <algorithm>
#include <cstdlib>
#include <utility>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "program.h"

// Products are taken with fused multiply-adds where a processor has them.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

namespace wgan_fast {
namespace {

namespace plain {
#define NAME "plain"
#define VECTOR 4
#define ROWS 6
#include "tiles_body.h"
#undef NAME
#undef VECTOR
#undef ROWS
}  // namespace plain

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define WGAN_FAST_X86 1

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define NAME "AVX2"
#define VECTOR 8
#define ROWS 6
#include "tiles_body.h"
#undef NAME
#undef VECTOR
#undef ROWS
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace avx512 {
#define NAME "AVX-512"
#define VECTOR 16
#define ROWS 14
#include "tiles_body.h"
#undef NAME
#undef VECTOR
#undef ROWS

#pragma GCC push_options
#pragma GCC target("avx512bf16")
#include "tiles_bf16.h"
#pragma GCC pop_options

Tiles with_bf16() {
  Tiles tiles = kTiles;
  tiles.multiply16 = multiply16;
  tiles.pack16 = pack16;
  tiles.pack_rows16 = pack_rows16;
  return tiles;
}
}  // namespace avx512
#pragma GCC pop_options
#endif

// WGAN_FAST_TILES names one that is worse than the best, for tests.
Tiles chosen() {
  const char* const named = std::getenv("WGAN_FAST_TILES");
  [[maybe_unused]] const auto wanted = [&](const Tiles& tiles) {
    return named == nullptr || std::strcmp(named, tiles.name) == 0;
  };
#ifdef WGAN_FAST_X86
  if (__builtin_cpu_supports("x86-64-v4") && wanted(avx512::kTiles))
    return __builtin_cpu_supports("avx512bf16") ? avx512::with_bf16() : avx512::kTiles;
  if (__builtin_cpu_supports("x86-64-v3") && wanted(avx2::kTiles)) return avx2::kTiles;
#endif
  return plain::kTiles;
}

}  // namespace

const Tiles& tiles() {
  static const Tiles best = chosen();
  return best;
}

}  // namespace wgan_fast
