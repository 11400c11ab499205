// AMX adds to AVX-512-BF16 what takes several rows of x: products in tiles.
#include "vec_avx512.h"

#include "tiled.h"

extern const PackedTable flashnorm_tiles;
const PackedTable flashnorm_tiles = {pack_part, tiled_part, packed_bytes, rows_at_once, SIDE, 2};
