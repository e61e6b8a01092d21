// The one place where a moe op meets the instruction set chosen at run time.
#include "moe/combine.h"
#include "moe/route_expert_choice.h"
#include "moe/route_sinkhorn.h"
#include "moe/route_top_k.h"
#include "moe/route_top_k_backward.h"
#include "moe/router_loss.h"

namespace heddle {

HEDDLE_DEFINE_OP(route_top_k, RouteTopKArgs)
HEDDLE_DEFINE_OP(combine, CombineArgs)
HEDDLE_DEFINE_OP(expert_scores, ExpertChoiceArgs)
HEDDLE_DEFINE_OP(sinkhorn_pass, SinkhornPass)
HEDDLE_DEFINE_OP(router_loss_pass, RouterLossPass)
HEDDLE_DEFINE_OP(route_top_k_backward, RouteBackwardArgs)

}  // namespace heddle
