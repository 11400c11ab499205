// How bf16 rows meet bf16 weights in AMX tiles: out = (16 rows of weights) x (16 rows of x), 32
// products deep. Weights are read as they lie; the rows of x are transposed once so that they fit.
// Products are exact in float32, each addition rounds once, subnormal numbers count as zero.
#pragma once
#include <immintrin.h>
#include "half.h"
#include "table.h"

namespace {

constexpr int64_t TILE = 16;   // rows of weights, or of x, in a tile
constexpr int64_t DEPTH = 32;  // elements of a row in a tile

// Compilers do not know what a tile instruction reads: this makes them write it down before.
inline void written(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// Nor does the address sanitizer: this reads 16 rows of 64 bytes, `stride` apart, where it can see.
inline void seen(const void* p, int64_t stride) {
#ifdef __SANITIZE_ADDRESS__
  const volatile char* bytes = static_cast<const volatile char*>(p);
  for (int64_t row = 0; row < TILE; ++row)
    for (int64_t i = 0; i < 64; i += 8) (void)bytes[row * stride + i], (void)bytes[row * stride + i + 7];
#else
  (void)p, (void)stride;
#endif
}

// While it lives, all tiles are 16 rows of 64 bytes; then they are as they were.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    written(&before_);
    Config config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = 64;
      config.rows[i] = TILE;
    }
    written(&config);
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette) _tile_loadconfig(&before_);
    else _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Config before_;
};

// Rounds to bf16. The instruction for it takes subnormal numbers for zero.
inline void store_bf16(__m512 v, __mmask16 which, Bf16* to) {
  constexpr int subnormal = 0x20;
  alignas(32) Bf16 slow[16];
  __m256i rounded;
  if (__builtin_expect(_mm512_mask_fpclass_ps_mask(which, v, subnormal), 0)) {
    Vec{v}.store(slow);
    memcpy(&rounded, slow, sizeof rounded);
  } else {
    const __m256bh pairs = _mm512_cvtneps_pbh(v);
    memcpy(&rounded, &pairs, sizeof rounded);
  }
  _mm256_mask_storeu_epi16(to, which, rounded);
}

// One or two columns of tiles of weights: rows `stride` elements apart, and from each 32 elements to
// the next 32 `step` times as many.
struct Pair {
  const Bf16* weight[2];
  int64_t stride[2], step[2];
};

inline void fetch(const Bf16* weight, int64_t stride) {
  for (int64_t row = 0; row < TILE; ++row) __builtin_prefetch(weight + row * stride, 0, 3);
}

// C tiles of weights by R tiles of x: [R][n / 2][16] pairs of elements. `finish(c, r, sums)` gets
// every product, [16 rows of weights][16 rows of x]. While it reads, it fetches `ahead` elements
// further, or the first ones of the rows that come `next` after.
template <int C, int R, class Finish>
inline void tile_block(const Pair& w, const Bf16* x, int64_t n, int64_t ahead, int64_t next,
                       const Finish& finish) {
  written(x);
  _tile_zero(0);
  if constexpr (R == 2) _tile_zero(1);
  if constexpr (C == 2) _tile_zero(2);
  if constexpr (C == 2 && R == 2) _tile_zero(3);
  for (int64_t i = 0; i < n; i += DEPTH) {
    if (ahead) {
      const int64_t at = i + ahead < n ? i + ahead : i + ahead - n + next;
      for (int c = 0; c < C; ++c) fetch(w.weight[c] + at, w.stride[c]);
    }
    for (int c = 0; c < C; ++c) seen(w.weight[c] + i * w.step[c], w.stride[c] * 2);
    for (int r = 0; r < R; ++r) seen(x + (r * n + i) * TILE, 64);
    _tile_loadd(4, w.weight[0] + i * w.step[0], w.stride[0] * 2);
    _tile_loadd(6, x + i * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R == 2) {
      _tile_loadd(7, x + (n + i) * TILE, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (C == 2) {
      _tile_loadd(5, w.weight[1] + i * w.step[1], w.stride[1] * 2);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (R == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  // All are stored before the first is read again.
  alignas(64) float sums[2 * C][TILE * TILE];
  _tile_stored(0, sums[0], 64);
  if constexpr (R == 2) _tile_stored(1, sums[1], 64);
  if constexpr (C == 2) _tile_stored(2, sums[2], 64);
  if constexpr (C == 2 && R == 2) _tile_stored(3, sums[3], 64);
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) finish(c, r, sums[2 * c + r]);
}

}  // namespace
