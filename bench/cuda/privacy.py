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


class ConvGeometry(C.Structure):  # native/privacy/convolution.h
    _fields_ = [(name, C.c_int32 * 3) for name in ('size', 'out', 'kernel', 'stride', 'padding', 'dilation')]


class ConvLayer(C.Structure):
    _fields_ = [('shape', ConvGeometry), ('input', PTR), ('grad_outputs', PTR), ('input_type', C.c_int32),
                ('grad_type', C.c_int32), ('mask', PTR), ('samples', I64), ('in_channels', I64), ('out_channels', I64),
                ('groups', I64), ('bias', C.c_bool)]


class ConvNormsArgs(C.Structure):
    _fields_ = [('layer', ConvLayer), ('method', C.c_int32), ('out', PTR)]


class ConvClippedArgs(C.Structure):
    _fields_ = [('layer', ConvLayer), ('factors', PTR), ('weight', PTR), ('bias', PTR)]


class LoraLayer(C.Structure):  # native/privacy/lora.h
    _fields_ = [('rows', RowLayer), ('a', RowSource), ('b', RowSource), ('rank', I64), ('scale', C.c_float)]


class LoraNormsArgs(C.Structure):
    _fields_ = [('layer', LoraLayer), ('method', C.c_int32), ('out', PTR)]


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


def conv2d(lib, samples, inputs, outputs, size, kernel, dtype):
    """Norm by instantiation and clipped sum of a convolution that keeps the size."""
    padding = kernel // 2
    x = torch.randn(samples, inputs, size, size, device=lib.device).to(dtype)
    g = torch.randn(samples, outputs, size, size, device=lib.device).to(dtype)
    factors = torch.rand(samples, device=lib.device)
    norms = torch.empty(samples, device=lib.device)
    weight = torch.zeros(outputs, inputs, kernel, kernel, device=lib.device)
    triple = C.c_int32 * 3
    shape = ConvGeometry(triple(1, size, size), triple(1, size, size), triple(1, kernel, kernel), triple(1, 1, 1),
                         triple(0, padding, padding), triple(1, 1, 1))
    layer = ConvLayer(shape, ptr(x), ptr(g), DTYPES[dtype], DTYPES[dtype], None, samples, inputs, outputs, 1, False)
    norm = lib.launcher('conv_squared_norms', ConvNormsArgs(layer, 0, ptr(norms)))
    add = lib.launcher('conv_clipped_gradients', ConvClippedArgs(layer, ptr(factors), ptr(weight), None))

    def clipped():
        weight.zero_()
        add()

    norm.tensors = clipped.tensors = (x, g, factors, norms, weight)

    def gradients(dtype):
        """[samples, outputs, inputs kernel^2], through the unfolded input."""
        unfolded = torch.nn.functional.unfold(x.to(dtype), kernel, padding=padding)
        return torch.einsum('bpt,bdt->bpd', g.to(dtype).flatten(2), unfolded)

    def check_norm():
        return relative(norms, gradients(torch.float64).square().sum((1, 2)))

    def check_sum():
        return relative(weight.flatten(1), torch.einsum('b,bpd->pd', factors.double(), gradients(torch.float64)))

    def conv_weight():
        return torch.nn.grad.conv2d_weight(x, weight.shape, g * factors[:, None, None, None].to(dtype), padding=padding)

    name = f'conv2d B={samples} {inputs} to {outputs} {size} x {size} kernel {kernel} {str(dtype)[6:]}'
    peak = 'f32' if dtype == torch.float32 else 'bf16'
    read = (x.numel() + g.numel()) * x.element_size()
    flops = 2 * samples * size**2 * inputs * kernel**2 * outputs
    return [
        Case('conv_squared_norms', name, norm, check_norm, 1e-5, read, flops, peak,
             lambda: gradients(dtype).square().sum((1, 2)), 'torch unfold, einsum'),
        Case('conv_clipped_gradients', name, clipped, check_sum, 2e-5, read + 4 * weight.numel(), flops, peak,
             conv_weight, 'torch conv2d_weight'),
    ]


def lora(lib, samples, positions, inputs, outputs, rank, dtype):
    """Norm of an adapter's two gradients."""
    x = torch.randn(samples, positions, inputs, device=lib.device).to(dtype)
    g = torch.randn(samples, positions, outputs, device=lib.device).to(dtype)
    a = torch.randn(rank, inputs, device=lib.device).to(dtype)
    b = torch.randn(outputs, rank, device=lib.device).to(dtype)
    norms = torch.empty(samples, device=lib.device)
    rows = RowLayer(source(x), source(g), None, None, samples, positions, inputs, outputs, -1, False)
    launch = lib.launcher('lora_squared_norms', LoraNormsArgs(LoraLayer(rows, source(a), source(b), rank, 0.5), 2, ptr(norms)))
    launch.tensors = (x, g, a, b, norms)

    def torch_norms(dtype):
        u, v = 0.5 * (x.to(dtype) @ a.to(dtype).T), 0.5 * (g.to(dtype) @ b.to(dtype))
        up, down = torch.einsum('btp,btr->bpr', g.to(dtype), u), torch.einsum('btr,btd->brd', v, x.to(dtype))
        return up.square().sum((1, 2)) + down.square().sum((1, 2))

    return Case('lora_squared_norms', f'B={samples} T={positions} {inputs} x {outputs} rank {rank} {str(dtype)[6:]}', launch,
                lambda: relative(norms, torch_norms(torch.float64)), 1e-5, (x.numel() + g.numel()) * x.element_size(),
                8 * samples * positions * rank * (inputs + outputs), 'f32', lambda: torch_norms(dtype), 'torch einsum')


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
        yield from conv2d(lib, 2, 6, 10, 9, 3, torch.float32)
        yield from conv2d(lib, 2, 6, 10, 9, 3, torch.bfloat16)
        yield lora(lib, 3, 37, 45, 67, 8, torch.bfloat16)
        yield noise(lib, 10000)
        return
    for dtype in (torch.bfloat16, torch.float32):
        yield from linear(lib, 32, 256, 1024, 1024, dtype)
    yield from linear(lib, 8, 1024, 2048, 2048, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        yield from conv2d(lib, 32, 128, 128, 28, 3, dtype)
    yield lora(lib, 8, 512, 768, 3072, 8, torch.bfloat16)
    yield noise(lib, 1 << 28)
