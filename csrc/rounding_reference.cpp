#include "rounding.h"

#include "rounding_loops.inc"

namespace lwquant {

const RoundingLoops kReferenceRounding = {round_rows, fit_groups};

}  // namespace lwquant
