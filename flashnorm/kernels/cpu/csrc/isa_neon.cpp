#include "vec_neon.h"
#include "attention.h"
#include "panels.h"
#include "rows.h"
#include "table.h"

extern const Table flashnorm_neon;
const Table flashnorm_neon = {run_part, normalize_part, glu_part, read_part, attend_part,
                               panel_table<Float32>(HEIGHT)};
