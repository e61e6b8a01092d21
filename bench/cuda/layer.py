"""A whole MoE layer as one job: see bench.py for what `cases` returns."""
import ctypes as C

import torch

from experts import TYPES, DeviceBank, ExpertsDeviceArgs, Layer, matrix
from heddle_cuda import DTYPES, Case, ptr, relative
from linear import DeviceMatrix, LinearDeviceArgs
from moe import RouterOptions, RouteTopKArgs


class MoELayerArgs(C.Structure):  # native/moe/layer_device.h
    _fields_ = [('router', LinearDeviceArgs), ('route', RouteTopKArgs), ('gate', LinearDeviceArgs),
                ('experts', ExpertsDeviceArgs)]


def layer_case(lib, layer, tokens):
    experts, k, d, kind = layer.experts, layer.k, layer.d, layer.kind
    dtype = torch.float32 if kind == 'float32' else torch.bfloat16
    x = torch.randn(tokens, d, device=lib.device).to(dtype)
    w = torch.randn(experts, d, device=lib.device) * d**-0.5
    first = x[0].float()
    w[:k] += first * (10 / first.square().sum())  # the first token goes to experts 0 .. k - 1, whose values the check has
    tiles = -(-experts // 16)
    image, _ = matrix(w, 'float32', tiles, torch.arange(tiles * 16, device=lib.device))
    logits = torch.empty(tokens, experts, device=lib.device)
    indices = torch.empty(tokens, k, dtype=torch.int32, device=lib.device)
    weights = torch.empty(tokens, k, device=lib.device)
    out = torch.empty(tokens, d, device=lib.device)
    router = LinearDeviceArgs(DeviceMatrix(ptr(image), 0, 0, 0, experts, d), ptr(x), DTYPES[dtype], tokens, None, 0,
                              ptr(logits), DTYPES[torch.float32])
    route = RouteTopKArgs(ptr(logits), DTYPES[torch.float32], tokens, experts, k, RouterOptions(0, False, True, 0, 0, 1),
                          None, 0, 0, False, None, 0, None, ptr(indices), ptr(weights))
    group = 32 if kind in ('int4', 'mxfp4') else 0
    bank = DeviceBank(ptr(layer.image), TYPES.index(kind), 0, 1.702, 7.0, 1, 0, group, experts, d, layer.f)
    forward = ExpertsDeviceArgs(bank, DeviceBank(), None, ptr(x), DTYPES[dtype], tokens, k, ptr(indices), ptr(weights),
                                ptr(out), DTYPES[torch.float32])
    launch = lib.launcher('moe_layer', MoELayerArgs(router, route, LinearDeviceArgs(), forward))
    launch.tensors = (layer.image, x, w, image, logits, indices, weights, out)

    def check():
        chosen = torch.softmax(first.double() @ w[:k].double().T, -1)[None]
        return relative(out[:1], layer.reference(x[:1].float(), chosen))

    return Case('moe_layer', f'{layer.name} {kind} T={tokens}', launch, check, 1e-5 if kind == 'float32' else 5e-3,
                layer.image.nbytes * min(1, tokens * k / experts) + image.nbytes, flops=tokens * k * d * layer.f * 6)


def cases(lib, small):
    if small:
        yield layer_case(lib, Layer(lib, 'small', 5, 2, 96, 64, 'float32'), 9)
        yield layer_case(lib, Layer(lib, 'small', 5, 2, 96, 64, 'bfloat16'), 1)
        return
    layer = Layer(lib, 'Qwen3-30B-A3B', 128, 8, 2048, 768, 'bfloat16')
    for tokens in (1, 64, 8192):
        yield layer_case(lib, layer, tokens)
