// What rounding a weight needs often enough to be a kernel; the same for all widths.
#include "round_block.cuh"

KERNEL void LAUNCHED_WITH(256, 2) round_block(lwquant::ColumnBlock b) {
  lwquant::gpu::round_block(b);
}
