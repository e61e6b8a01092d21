"""Per-sample norms, clipped sums and noise: see bench.py for what `cases` returns."""
import ctypes as C

import torch

from heddle_cuda import DTYPES, Case, ptr, relative

I64, PTR = C.c_int64, C.c_void_p


class RowSource(C.Structure):  # native/privacy/kernels.h
    _fields_ = [('data', PTR), ('type', C.c_int32), ('stride', I64)]


class RowLayer(C.Structure):  # native/privacy/per_sample_squared_norms.h
    _fields_ = [('inputs', RowSource), ('grad_outputs', RowSource), ('indices', PTR), ('mask', PTR), ('samples', I64),
                ('positions', I64), ('input_count', I64), ('output_count', I64), ('padding_index', I64),
                ('bias', C.c_bool)]


class NormsArgs(C.Structure):
    _fields_ = [('layer', RowLayer), ('method', C.c_int32), ('out', PTR)]


class ClippedArgs(C.Structure):  # native/privacy/clipped_gradients.h
    _fields_ = [('layer', RowLayer), ('factors', PTR), ('weight', PTR), ('bias', PTR)]


class GaussianNoiseArgs(C.Structure):  # native/privacy/gaussian_noise.h
    _fields_ = [('key', PTR), ('step', I64), ('offset', I64), ('count', I64), ('stddev', C.c_float), ('add', C.c_bool),
                ('out', PTR)]


def source(t):
    return RowSource(ptr(t), DTYPES[t.dtype], t.shape[-1])


def linear(lib, samples, positions, inputs, outputs, dtype):
    """Ghost norm and clipped sum of one layer."""
    a = torch.randn(samples, positions, inputs, device=lib.device).to(dtype)
    g = torch.randn(samples, positions, outputs, device=lib.device).to(dtype)
    factors = torch.rand(samples, device=lib.device)
    norms = torch.empty(samples, device=lib.device)
    weight = torch.zeros(outputs, inputs, device=lib.device)
    layer = RowLayer(source(a), source(g), None, None, samples, positions, inputs, outputs, -1, False)
    ghost = lib.launcher('linear_squared_norms', NormsArgs(layer, 1, ptr(norms)))
    add = lib.launcher('linear_clipped_gradients', ClippedArgs(layer, ptr(factors), ptr(weight), None))

    def clipped():
        weight.zero_()
        add()

    ghost.tensors = clipped.tensors = (a, g, factors, norms, weight)

    def einsum_norm():
        aa = torch.einsum('bti,bsi->bts', a, a)
        gg = torch.einsum('bti,bsi->bts', g, g)
        return (aa * gg).sum((1, 2))

    def check_norm():
        expected = torch.stack([(y.T.double() @ x.double()).square().sum() for x, y in zip(a, g)])
        return relative(norms, expected)

    def einsum_sum():
        return torch.einsum('btp,bti->pi', g * factors[:, None, None].to(dtype), a)

    def check_sum():
        expected = sum(f.double() * (y.T.double() @ x.double()) for f, x, y in zip(factors, a, g))
        return relative(weight, expected)

    name = f'linear B={samples} T={positions} {inputs} x {outputs} {str(dtype)[6:]}'
    peak = 'f32' if dtype == torch.float32 else 'bf16'
    read = (a.numel() + g.numel()) * a.element_size()
    pairs = samples * positions * (positions + 1) // 2
    return [
        Case('linear_squared_norms', f'ghost, {name}', ghost, check_norm, 1e-5, read, 2 * pairs * (inputs + outputs),
             peak, einsum_norm, 'torch einsum'),
        Case('linear_clipped_gradients', name, clipped, check_sum, 2e-5, read + 4 * inputs * outputs,
             2 * samples * positions * inputs * outputs, peak, einsum_sum, 'torch einsum'),
    ]


def noise(lib, count):
    key = torch.arange(8, dtype=torch.int32, device=lib.device)
    out = torch.empty(count, device=lib.device)
    launch = lib.launcher('gaussian_noise', GaussianNoiseArgs(ptr(key), 1, 0, count, 1.0, False, ptr(out)))
    launch.tensors = (key, out)

    def check():
        """Mean and variance, in standard errors above 5."""
        x = out.double()
        mean = abs(x.mean()) * count**0.5
        variance = abs(x.var() - 1) * (count / 2) ** 0.5
        return float(max(mean, variance, 5.0) - 5.0)

    return Case('gaussian_noise', f'n={count}', launch, check, 0, 4 * count,
                peer=lambda: torch.randn(count, device=lib.device), peer_name='torch randn')


def cases(lib, small):
    if small:
        yield from linear(lib, 3, 70, 90, 66, torch.float32)
        yield from linear(lib, 3, 70, 90, 66, torch.bfloat16)
        yield noise(lib, 10000)
        return
    for dtype in (torch.bfloat16, torch.float32):
        yield from linear(lib, 32, 256, 1024, 1024, dtype)
    yield from linear(lib, 8, 1024, 2048, 2048, torch.bfloat16)
    yield noise(lib, 1 << 28)
