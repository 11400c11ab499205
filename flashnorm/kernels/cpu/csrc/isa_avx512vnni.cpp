// AVX-512-VNNI adds one thing to AVX-512: one row of x as bytes, in vectors of 32.
#include "vec_avx2.h"

#include "one_row_bytes_vnni.h"

const OneRow* flashnorm_bytes_of_row(const Op& op);
const OneRow* flashnorm_bytes_of_row(const Op& op) { return bytes_of_row(op); }
