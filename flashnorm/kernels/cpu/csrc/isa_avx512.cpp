#include "vec_avx512.h"
#include "attention.h"
#include "panels.h"
#include "rows.h"
#include "table.h"

extern const Table flashnorm_avx512;
const Table flashnorm_avx512 = {run_part, normalize_part, glu_part, read_part, attend_part,
                               panel_table<Float32>(HEIGHT)};
