// AVX-512-BF16 adds one thing to AVX-512: products of bf16 pairs, with nothing widened.
#include "pairs_avx512.h"
#include "vec_avx512.h"

#include "panels.h"
#include "rounded.h"

namespace {

// A unit is a pair of bf16. Products are exact in float32, each addition rounds once, subnormal
// numbers count as zero.
struct PairsOfBf16 {
  static constexpr int64_t features = 2;
  static inline Vec step(Vec x, Vec w, Vec sum) {
    __m512bh a, b;
    memcpy(&a, &x, sizeof a);
    memcpy(&b, &w, sizeof b);
    return {_mm512_dpbf16_ps(sum.v, a, b)};
  }
  static inline float row(const Op& op, const Affine& gains, const Call& call, int64_t m,
                          float* spare, float* out) {
    Bf16* rounded = reinterpret_cast<Bf16*>(out);
    rounded[op.n] = {0};  // an odd row ends in half a unit; there is room for a float each
    return rounded_row(op, gains, call, m, spare, rounded);
  }
  static inline void weights(const Bf16* from, int64_t n, float* to) {
    Bf16* pairs = reinterpret_cast<Bf16*>(to);
    memcpy(static_cast<void*>(pairs), from, static_cast<size_t>(n) * sizeof(Bf16));
    if (n % 2) pairs[n] = {0};
  }
};

}  // namespace

void flashnorm_pairs(const Product& p);
void flashnorm_pairs(const Product& p) { products<Pairs>(p); }

extern const PackedTable flashnorm_pair_panels;
const PackedTable flashnorm_pair_panels = panel_table<PairsOfBf16>(HEIGHT / 2);
