// Arguments of ops that another op runs in the same job on the device, each read as its own binding reads them.
#pragma once
#include "binding/call.h"
#include "gemm/device_matrix.h"
#include "moe/experts_device.h"
#include "moe/route_top_k.h"

namespace heddle::binding {

LinearDeviceArgs linear_device_args(Call& call);    // matrices.cpp
ExpertsDeviceArgs experts_device_args(Call& call);  // experts.cpp
RouteTopKArgs route_top_k_args(Call& call);         // moe.cpp

}  // namespace heddle::binding
