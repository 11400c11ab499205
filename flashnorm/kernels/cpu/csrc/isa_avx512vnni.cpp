// AVX-512-VNNI adds one thing to AVX-512: one row of x in whole numbers.
#include "vec_avx512.h"

#include "columns_vnni.h"

// Who has a way.
const OneRow* flashnorm_bytes_of_row(const Op& op);
const OneRow* flashnorm_bytes_of_row(const Op& op) {
  switch (op.weight_type) {
    case INT8: return groups_way<BytesInt8>(op);
    case INT4: return groups_way<BytesInt4>(op);
    case Q8_0: return blocks_way<BytesQ8_0>();
    case Q4_0: return blocks_way<BytesQ4_0>();
    case Q4_1: return blocks_way<BytesQ4_1>();
    case Q5_0: return blocks_way<BytesQ5_0>();
    case Q5_1: return blocks_way<BytesQ5_1>();
    case Q4_K: return large_blocks_way<BytesQ4_K>();
    case Q5_K: return large_blocks_way<BytesQ5_K>();
    case Q6_K: return large_blocks_way<BytesQ6_K>();
    case GPTQ4: return gptq_way(op);
    default: return nullptr;
  }
}
