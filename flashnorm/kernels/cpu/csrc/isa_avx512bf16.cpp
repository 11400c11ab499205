// AVX-512-BF16 adds one thing to AVX-512: products of bf16 pairs, with nothing widened.
#include "pairs_avx512.h"
#include "vec_avx512.h"

#include "skinny.h"

void flashnorm_pairs(const Product& p);
void flashnorm_pairs(const Product& p) { products<Pairs>(p); }
