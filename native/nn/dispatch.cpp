// The one place where an op of nn meets the instruction set chosen at run time.
#include "nn/elementwise.h"
#include "nn/norm.h"

namespace heddle {

HEDDLE_DEFINE_OP(norm, NormArgs)
HEDDLE_DEFINE_OP(norm_backward_rows, NormBackwardArgs)
HEDDLE_DEFINE_OP(gelu, GeluArgs)
HEDDLE_DEFINE_OP(add_residual, AddResidualArgs)
HEDDLE_DEFINE_OP(mean_tokens, MeanTokensArgs)

}  // namespace heddle
