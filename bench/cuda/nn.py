"""Norms, elementwise ops and rotary embedding: see bench.py for what `cases` returns."""
import ctypes as C

import torch
import torch.nn.functional as F

from heddle_cuda import DTYPES, Case, ptr, relative

I64, PTR = C.c_int64, C.c_void_p
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


class NormArgs(C.Structure):  # native/nn/norm.h
    _fields_ = [('x', PTR), ('residual', PTR), ('type', C.c_int32), ('rows', I64), ('width', I64), ('weight', PTR),
                ('bias', PTR), ('centred', C.c_bool), ('unit_offset', C.c_bool), ('epsilon', C.c_double), ('out', PTR),
                ('out_type', C.c_int32), ('sum', PTR), ('mean', PTR), ('rstd', PTR)]


class GeluArgs(C.Structure):  # native/nn/elementwise.h
    _fields_ = [('x', PTR), ('type', C.c_int32), ('count', I64), ('tanh', C.c_bool), ('out', PTR)]


class AddResidualArgs(C.Structure):
    _fields_ = [('x', PTR), ('y', PTR), ('type', C.c_int32), ('rows', I64), ('width', I64), ('gate', PTR),
                ('gates', I64), ('out', PTR)]


class RotaryEmbeddingArgs(C.Structure):  # native/attention/rotary_embedding.h
    _fields_ = [('x', PTR), ('type', C.c_int32), ('batch', I64), ('length', I64), ('heads', I64), ('dim', C.c_int32),
                ('positions', PTR), ('axis_stride', I64), ('batch_stride', I64), ('offset', I64), ('frequency', PTR),
                ('axis', PTR), ('count', C.c_int32), ('angle', PTR), ('partner', PTR), ('factor', C.c_float),
                ('out', PTR)]


def name_of(dims, dtype):
    return f'{" x ".join(map(str, dims))} {str(dtype)[6:]}'


def norm(lib, rows, width, dtype, centred=True, residual=False):
    x = torch.randn(rows, width, device=lib.device).to(dtype)
    r = torch.randn_like(x) if residual else None
    weight = torch.randn(width, device=lib.device)
    bias = torch.randn(width, device=lib.device) if centred else None
    out, total = torch.empty_like(x), torch.empty_like(x) if residual else None
    args = NormArgs(ptr(x), ptr(r), DTYPES[dtype], rows, width, ptr(weight), ptr(bias), centred, False, 1e-6, ptr(out),
                    DTYPES[dtype], ptr(total), None, None)
    launch = lib.launcher('norm', args)
    launch.tensors = (x, r, weight, bias, out, total)

    def compute(x, r, weight, bias):
        v = x if r is None else x + r
        if centred:
            return F.layer_norm(v, (width,), weight, bias, 1e-6)
        return F.rms_norm(v, (width,), weight, 1e-6)

    typed = [t if t is None else t.to(dtype) for t in (weight, bias)]
    exact = [t if t is None else t.double() for t in (x, r, weight, bias)]
    name = f'{"layer" if centred else "rms"} {name_of((rows, width), dtype)}{" residual" if residual else ""}'
    return Case('norm', name, launch, lambda: relative(out, compute(*exact)), TOLERANCE[dtype],
                x.nbytes * (4 if residual else 2), peer=lambda: compute(x, r, *typed), peer_name='torch')


def gelu(lib, count, dtype, tanh):
    x = torch.randn(count, device=lib.device).to(dtype)
    out = torch.empty_like(x)
    launch = lib.launcher('gelu', GeluArgs(ptr(x), DTYPES[dtype], count, tanh, ptr(out)))
    launch.tensors = (x, out)
    form = 'tanh' if tanh else 'none'
    return Case('gelu', f'{form} {name_of((count,), dtype)}', launch,
                lambda: relative(out, F.gelu(x.double(), approximate=form)), TOLERANCE[dtype], 2 * x.nbytes,
                peer=lambda: F.gelu(x, approximate=form), peer_name='torch')


def add_residual(lib, rows, width, dtype, gates):
    x, y = (torch.randn(rows, width, device=lib.device).to(dtype) for _ in range(2))
    gate = torch.randn(gates, device=lib.device) if gates else None
    out = torch.empty_like(x)
    args = AddResidualArgs(ptr(x), ptr(y), DTYPES[dtype], rows, width, ptr(gate), gates, ptr(out))
    launch = lib.launcher('add_residual', args)
    launch.tensors = (x, y, gate, out)
    scale = 1 if gate is None else gate
    typed = 1 if gate is None else gate.to(dtype)
    return Case('add_residual', f'{name_of((rows, width), dtype)}, {gates} gates', launch,
                lambda: relative(out, x.double() + scale * y.double()), TOLERANCE[dtype], 3 * x.nbytes,
                peer=lambda: x + typed * y if gates else x + y, peer_name='torch')


def rotary(lib, length, heads, dim, dtype, interleaved=False):
    x = torch.randn(1, length, heads, dim, device=lib.device).to(dtype)
    half = dim // 2
    on = dict(device=lib.device, dtype=torch.int32)
    e = torch.arange(dim, **on)
    angle = e // 2 if interleaved else e % half
    partner = e ^ 1 if interleaved else (e + half) % dim
    frequency = 10000.0 ** (-torch.arange(half, device=lib.device, dtype=torch.float64) / half)
    axis = torch.zeros(half, **on)
    out = torch.empty_like(x)
    args = RotaryEmbeddingArgs(ptr(x), DTYPES[dtype], 1, length, heads, dim, None, 0, 0, 0, ptr(frequency), ptr(axis), half,
                      ptr(angle), ptr(partner), 1.0, ptr(out))
    launch = lib.launcher('rotary_embedding', args)
    launch.tensors = (x, frequency, axis, angle, partner, out)
    turns = torch.arange(length, device=lib.device)[:, None, None] * frequency[angle.long()]
    cosine, sine = turns.cos(), torch.where(partner > e, -1.0, 1.0) * turns.sin()
    c, s, p = cosine.to(dtype), sine.to(dtype), partner.long()
    return Case('rotary_embedding', f'{name_of(x.shape, dtype)}{" interleaved" if interleaved else ""}', launch,
                lambda: relative(out, x.double() * cosine + x.double()[..., p] * sine), TOLERANCE[dtype], 2 * x.nbytes,
                peer=lambda: x * c + x[..., p] * s, peer_name='torch')


def cases(lib, small):
    bf16, f32 = torch.bfloat16, torch.float32
    if small:
        for dtype in TOLERANCE:
            yield norm(lib, 9, 100, dtype, residual=True)
            yield norm(lib, 3, 1029, dtype, centred=False)
            yield gelu(lib, 1001, dtype, True)
            yield add_residual(lib, 5, 33, dtype, 33)
            yield rotary(lib, 5, 3, 10, dtype, interleaved=True)
        yield norm(lib, 2, 9000, f32)
        yield gelu(lib, 5000, f32, False)
        yield add_residual(lib, 70, 36, bf16, 0)
        yield rotary(lib, 3, 70, 64, bf16)
        return
    for dtype in (bf16, f32):
        yield norm(lib, 16384, 768, dtype)
        yield norm(lib, 16384, 768, dtype, residual=True)
        yield norm(lib, 8192, 4096, dtype, centred=False)
        yield gelu(lib, 16384 * 3072, dtype, False)
        yield add_residual(lib, 16384, 768, dtype, 0)
        yield rotary(lib, 4096, 32, 128, dtype)
    yield norm(lib, 1, 4096, bf16, centred=False)
    yield rotary(lib, 4096, 32, 128, bf16, interleaved=True)
