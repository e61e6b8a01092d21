"""Routing and dispatch: see bench.py for what `cases` returns."""
import ctypes as C

import torch

from heddle_cuda import DTYPES, Case, ptr, relative


class RouterOptions(C.Structure):  # native/moe/route_top_k.h
    _fields_ = [('score', C.c_int32), ('over_selected', C.c_bool), ('normalize', C.c_bool), ('epsilon', C.c_float),
                ('floor', C.c_float), ('scale', C.c_float)]


class RouteTopKArgs(C.Structure):
    _fields_ = [('logits', C.c_void_p), ('type', C.c_int32), ('tokens', C.c_int64), ('experts', C.c_int32),
                ('k', C.c_int32), ('router', RouterOptions), ('selection_bias', C.c_void_p), ('group_count', C.c_int32),
                ('group_keep', C.c_int32), ('group_top2', C.c_bool), ('mask', C.c_void_p), ('mask_stride', C.c_int64),
                ('given', C.c_void_p), ('indices', C.c_void_p), ('weights', C.c_void_p)]


class PlanDispatchArgs(C.Structure):  # native/moe/plan_dispatch.h
    _fields_ = [('indices', C.c_void_p), ('tokens', C.c_int64), ('k', C.c_int32), ('experts', C.c_int32),
                ('global_experts', C.c_int32), ('expert_map', C.c_void_p), ('capacity', C.c_int64), ('drop', C.c_int32),
                ('weights', C.c_void_p), ('order', C.c_void_p), ('offsets', C.c_void_p), ('inverse', C.c_void_p),
                ('dropped', C.c_void_p), ('counts', C.c_void_p)]


class PermuteArgs(C.Structure):  # native/moe/permute.h
    _fields_ = [('x', C.c_void_p), ('tokens', C.c_int64), ('row_bytes', C.c_int64), ('k', C.c_int32),
                ('order', C.c_void_p), ('routes', C.c_int64), ('out', C.c_void_p)]


class CombineArgs(C.Structure):  # native/moe/combine.h
    _fields_ = [('y', C.c_void_p), ('type', C.c_int32), ('routes', C.c_int64), ('tokens', C.c_int64),
                ('width', C.c_int64), ('k', C.c_int32), ('inverse', C.c_void_p), ('weights', C.c_void_p),
                ('out', C.c_void_p), ('out_type', C.c_int32)]


def route(lib, name, tokens, experts, k, dtype, deepseek=False):
    logits = torch.randn(tokens, experts, device=lib.device).to(dtype)
    bias = torch.randn(experts, device=lib.device) * 0.1 if deepseek else None
    indices = torch.empty(tokens, k, dtype=torch.int32, device=lib.device)
    weights = torch.empty(tokens, k, device=lib.device)
    options = RouterOptions(1, False, True, 1e-20, 0, 2.5) if deepseek else RouterOptions(0, False, True, 0, 0, 1)
    groups = (8, 4, True) if deepseek else (0, 0, False)
    args = RouteTopKArgs(ptr(logits), DTYPES[dtype], tokens, experts, k, options, ptr(bias), *groups, None, 0, None,
                         ptr(indices), ptr(weights))

    def reference(l):
        """As the models' own code computes it, in the precision of l."""
        if not deepseek:
            w, i = torch.topk(torch.softmax(l, -1), k, -1)
            return w / w.sum(-1, keepdim=True), i
        scores = l.sigmoid()
        choice = scores + bias.to(l.dtype)
        by_group = choice.view(tokens, 8, -1)
        best = by_group.topk(2, -1)[0].sum(-1).topk(4, -1)[1]
        keep = torch.zeros(tokens, 8, dtype=torch.bool, device=l.device).scatter_(1, best, True)
        choice = by_group.masked_fill(~keep[:, :, None], -torch.inf).view(tokens, -1)
        i = choice.topk(k, -1)[1]
        w = scores.gather(1, i)
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, i

    def check():
        w, _ = reference(logits.double())
        # Ids may differ where scores tie in float32; the weights, in descending order, then agree all the same.
        return relative(weights.sort(-1)[0], w.sort(-1)[0])

    keep_alive = (logits, bias, indices, weights)
    launch = lib.launcher('route_top_k', args)
    launch.tensors = keep_alive
    return Case('route_top_k', f'{name} T={tokens} E={experts} k={k}', launch, check, 1e-6,
                tokens * (experts * logits.element_size() + 8 * k), peer=lambda: reference(logits.float()),
                peer_name='torch softmax + topk')


def dispatch(lib, tokens, experts, k, width, dtype):
    """planDispatch, permute and combine of one batch."""
    scores = torch.rand(tokens, experts, device=lib.device)
    chosen, indices = scores.topk(k, -1)
    indices = indices.int().contiguous()
    weights = (chosen / chosen.sum(-1, keepdim=True)).contiguous()
    routes = tokens * k
    ints = dict(dtype=torch.int32, device=lib.device)
    order, inverse = torch.full((routes,), -9, **ints), torch.full((routes,), -9, **ints)
    offsets, counts = torch.full((experts + 1,), -9, **ints), torch.full((2,), -9, **ints)
    plan = PlanDispatchArgs(ptr(indices), tokens, k, experts, experts, None, -1, 0, None, ptr(order), ptr(offsets),
                            ptr(inverse), None, ptr(counts))
    flat = indices.view(-1)

    def peer_plan():
        at = torch.sort(flat, stable=True)[1]
        places = torch.empty_like(at)
        places[at] = torch.arange(routes, device=lib.device)
        return at, places, torch.bincount(flat, minlength=experts).cumsum(0)

    def check_plan():
        at, places, ends = peer_plan()
        wrong = (order != at).sum() + (inverse != places).sum() + (offsets[1:] != ends).sum() + (counts[1] != routes)
        return float(wrong)

    x = torch.randn(tokens, width, device=lib.device).to(dtype)
    rows = torch.empty(routes, width, dtype=dtype, device=lib.device)
    out = torch.empty(tokens, width, dtype=dtype, device=lib.device)
    at, places, _ = peer_plan()
    at32, places32 = at.int(), places.int()
    item = x.element_size()
    move = PermuteArgs(ptr(x), tokens, width * item, k, ptr(at32), routes, ptr(rows))
    y = torch.randn(routes, width, device=lib.device).to(dtype)
    back = CombineArgs(ptr(y), DTYPES[dtype], routes, tokens, width, k, ptr(places32), ptr(weights), ptr(out),
                       DTYPES[dtype])

    def weighted(t):
        return (t[places].view(tokens, k, width) * weights.to(t.dtype)[:, :, None]).sum(1)

    launches = [lib.launcher(op, args) for op, args in
                (('plan_dispatch', plan), ('permute', move), ('combine', back))]
    for launch in launches:
        launch.tensors = (indices, weights, order, inverse, offsets, counts, x, rows, out, at32, places32, y)
    name = f'T={tokens} E={experts} k={k}'
    return [
        Case('plan_dispatch', name, launches[0], check_plan, 0, routes * 16, peer=peer_plan,
             peer_name='torch stable sort'),
        Case('permute', f'{name} d={width}', launches[1], lambda: relative(rows, x[at // k]), 0,
             2 * routes * width * item, peer=lambda: x[at // k], peer_name='torch index'),
        Case('combine', f'{name} d={width}', launches[2], lambda: relative(out, weighted(y.double())),
             5e-3 if dtype != torch.float32 else 1e-6, (routes + tokens) * width * item,
             peer=lambda: weighted(y), peer_name='torch index, mul, sum'),
    ]


def cases(lib, small):
    if small:
        yield route(lib, 'softmax', 37, 60, 6, torch.float32)
        yield route(lib, 'DeepSeek-V3', 19, 256, 8, torch.float32, deepseek=True)
        yield route(lib, 'large', 5, 700, 9, torch.bfloat16)
        yield from dispatch(lib, 101, 17, 3, 44, torch.float32)
        yield from dispatch(lib, 64, 300, 8, 33, torch.bfloat16)
        return
    yield route(lib, 'Qwen3-MoE', 4096, 128, 8, torch.float32)
    yield route(lib, 'Qwen3-MoE', 65536, 128, 8, torch.bfloat16)
    yield route(lib, 'DeepSeek-V3', 4096, 256, 8, torch.float32, deepseek=True)
    yield route(lib, 'DeepSeek-V3', 65536, 256, 8, torch.float32, deepseek=True)
    yield from dispatch(lib, 16384, 128, 8, 2048, torch.bfloat16)
    yield from dispatch(lib, 4096, 256, 8, 7168, torch.bfloat16)
