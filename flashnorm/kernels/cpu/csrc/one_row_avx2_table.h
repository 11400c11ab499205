// Which packed weights have a way of their own for one row of x, with AVX2.
#pragma once
#include "one_row_blocks_avx2.h"
#include "one_row_groups_avx2.h"

namespace {

const OneRow* one_row(const Op& op) {
  static const OneRow int8{arrange_row, groups<Int8Step>}, fp8{arrange_row, groups<Fp8Step>},
      int4{arrange_row, groups<Int4Step>}, codebook4{arrange_row, groups<TableStep>},
      q8_0{arrange_row, pairs_of_blocks<StepQ8_0>}, q4_0{arrange_row, pairs_of_blocks<StepQ4_0>},
      q4_1{arrange_row, pairs_of_blocks<StepQ4_1>}, q5_0{arrange_row, pairs_of_blocks<StepQ5_0>},
      q5_1{arrange_row, pairs_of_blocks<StepQ5_1>}, q4_k{arrange_row, large_blocks<StepQ4_K>},
      q5_k{arrange_row, large_blocks<StepQ5_K>}, q6_k{arrange_row, large_blocks<StepQ6_K>};
  switch (op.weight_type) {
    case INT8: return fits_steps(op, Int8Step::features) ? &int8 : nullptr;
    case FP8: return fits_steps(op, Fp8Step::features) ? &fp8 : nullptr;
    case INT4: return fits_steps(op, Int4Step::features) ? &int4 : nullptr;
    case CODEBOOK4: return fits_steps(op, TableStep::features) ? &codebook4 : nullptr;
    case Q8_0: return &q8_0;
    case Q4_0: return &q4_0;
    case Q4_1: return &q4_1;
    case Q5_0: return &q5_0;
    case Q5_1: return &q5_1;
    case Q4_K: return &q4_k;
    case Q5_K: return &q5_k;
    case Q6_K: return &q6_k;
    default: return nullptr;
  }
}

}  // namespace
