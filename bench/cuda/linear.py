"""Products with packed matrices: see bench.py for what `cases` returns."""
import ctypes as C

import torch

from experts import CODE_BYTES, SCALE_BYTES, TYPES, matrix, quantize_rows
from heddle_cuda import DTYPES, Case, ptr, relative


class DeviceMatrix(C.Structure):  # native/gemm/device_matrix.h
    _fields_ = [('data', C.c_void_p), ('type', C.c_int32), ('points', C.c_int32), ('group', C.c_int64),
                ('outputs', C.c_int64), ('k', C.c_int64)]


class LinearDeviceArgs(C.Structure):
    _fields_ = [('weight', DeviceMatrix), ('x', C.c_void_p), ('type', C.c_int32), ('rows', C.c_int64),
                ('bias', C.c_void_p), ('activation', C.c_int32), ('out', C.c_void_p), ('out_type', C.c_int32)]


def linear(lib, name, rows, n, k, kind):
    w = torch.randn(n, k, device=lib.device) * k**-0.5
    tiles = -(-n // 16)
    image, values = matrix(w, kind, tiles, torch.arange(tiles * 16, device=lib.device))
    dtype = torch.float32 if kind == 'float32' else torch.bfloat16
    x = torch.randn(rows, k, device=lib.device).to(dtype)
    bias = torch.randn(n, device=lib.device)
    out = torch.empty(rows, n, device=lib.device, dtype=dtype)
    weight = DeviceMatrix(ptr(image), TYPES.index(kind), 0, 32 if kind in ('int4', 'mxfp4') else 0, n, k)
    args = LinearDeviceArgs(weight, ptr(x), DTYPES[dtype], rows, ptr(bias), 0, ptr(out), DTYPES[dtype])
    launch = lib.launcher('linear', args)
    launch.tensors = (image, x, bias, out)
    peer = None
    if kind in ('float32', 'bfloat16'):
        dense, b = w.to(dtype), bias.to(dtype)
        peer = lambda: torch.nn.functional.linear(x, dense, b)  # noqa: E731

    def check():
        last = slice(max(rows - 64, 0), rows)
        expected = quantize_rows(x[last].double(), kind) @ values[:n].double().T + bias.double()
        return relative(out[last], expected)

    traffic = n * k * (CODE_BYTES[kind] + SCALE_BYTES[kind]) + rows * (n + k) * x.element_size()
    tolerance = 1e-5 if kind == 'float32' else 5e-3
    return Case('linear', f'{name} {n} x {k} {kind} T={rows}', launch, check, tolerance, traffic, flops=2 * rows * n * k,
                peak='f32' if kind == 'float32' else 'bf16', peer=peer, peer_name='torch linear')


def cases(lib, small):
    if small:
        for kind in TYPES:
            yield linear(lib, 'small', 1, 40, 2112, kind)
            yield linear(lib, 'small', 37, 100, 96, kind)
        yield linear(lib, 'small', 150, 530, 64, 'bfloat16')
        return
    for tokens in (1, 64, 8192):
        yield linear(lib, 'router of Qwen3-30B-A3B', tokens, 128, 2048, 'float32')
        yield linear(lib, 'router of DeepSeek-V3', tokens, 256, 7168, 'float32')
        yield linear(lib, 'router of Mixtral', tokens, 8, 4096, 'float32')
        for kind in ('bfloat16', 'int8', 'int4', 'mxfp4', 'float8'):
            yield linear(lib, 'dense', tokens, 4096, 4096, kind)
    yield linear(lib, 'ViT-B, 8 clips', 8 * 1568, 3072, 768, 'bfloat16')
    yield linear(lib, 'ViT-B, 8 clips', 8 * 1568, 3072, 768, 'float32')
