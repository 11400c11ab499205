// AMX adds to AVX-512-BF16 what takes several rows of x: products in tiles.
#include "vec_avx512.h"

#include "tiled.h"

extern const TileTable flashnorm_tiles;
const TileTable flashnorm_tiles = {pack_part, tiled_part, packed_bytes};
