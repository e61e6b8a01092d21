// A MoE layer on the device as one job: router product, routing, the shared experts' gate, experts. Each step writes what
// the next reads, so the result has the bits of the four ops one after the other; between them nothing returns to the host.
#pragma once
#include "gemm/device_matrix.h"
#include "moe/experts_device.h"
#include "moe/route_top_k.h"

namespace heddle {

struct MoELayerArgs {
  LinearDeviceArgs router;  // out: route.logits
  RouteTopKArgs route;      // indices, weights: those of experts
  LinearDeviceArgs gate;    // out: experts.shared_gate; without data: none
  ExpertsDeviceArgs experts;
};

}  // namespace heddle
