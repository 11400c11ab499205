// AVX-512-VNNI adds one thing to AVX-512: one row of x in whole numbers.
#include "vec_avx512.h"

#include "columns_vnni.h"

const OneRow* flashnorm_bytes_of_row(const Op& op);
const OneRow* flashnorm_bytes_of_row(const Op& op) { return bytes_of_row(op); }
