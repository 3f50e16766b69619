#include "rounding.h"

#include "rounding_loops.inc"

namespace lwquant {

const RoundingLoops kAvx2Rounding = {round_rows, fit_groups};

}  // namespace lwquant
