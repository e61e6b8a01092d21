// The one place where a moe op meets the instruction set chosen at run time.
#include "moe/combine.h"
#include "moe/route_top_k.h"

namespace heddle {

HEDDLE_DEFINE_OP(route_top_k, RouteTopKArgs)
HEDDLE_DEFINE_OP(combine, CombineArgs)

}  // namespace heddle
