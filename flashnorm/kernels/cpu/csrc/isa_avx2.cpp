#include "vec_avx2.h"

#include "one_row_floats_avx2.h"

#include "attention.h"
#include "panels.h"
#include "rows.h"
#include "table.h"

extern const Table flashnorm_avx2;
const Table flashnorm_avx2 = {run_part, normalize_part, glu_part, read_part, attend_part,
                               panel_table<Float32>(HEIGHT - 4)};
