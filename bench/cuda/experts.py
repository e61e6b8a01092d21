"""Expert compute: see bench.py for what `cases` returns. Weights are laid out here as native/gemm/device_matrix.h says."""
import ctypes as C

import torch

from heddle_cuda import DTYPES, Case, ptr, relative

TYPES = ('float32', 'bfloat16', 'int8', 'int4', 'mxfp4', 'float8')
STEP = dict(float32=16, bfloat16=32, int8=64, int4=64, mxfp4=64, float8=32)
CODE_BYTES = dict(float32=4.0, bfloat16=2.0, int8=1.0, int4=0.5, mxfp4=0.5, float8=1.0)
SCALE_BYTES = dict(float32=0.0, bfloat16=0.0, int8=0.0, int4=4 / 32, mxfp4=1 / 32, float8=4 / 128)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class DeviceBank(C.Structure):  # native/moe/experts_device.h
    _fields_ = [('data', C.c_void_p), ('type', C.c_int32), ('activation', C.c_int32), ('alpha', C.c_float),
                ('limit', C.c_float), ('gated', C.c_int32), ('points', C.c_int32), ('group', C.c_int64),
                ('experts', C.c_int64), ('hidden', C.c_int64), ('intermediate', C.c_int64)]


class ExpertsDeviceArgs(C.Structure):
    _fields_ = [('bank', DeviceBank), ('shared', DeviceBank), ('shared_gate', C.c_void_p), ('x', C.c_void_p),
                ('type', C.c_int32), ('tokens', C.c_int64), ('k', C.c_int64), ('indices', C.c_void_p),
                ('weights', C.c_void_p), ('out', C.c_void_p), ('out_type', C.c_int32)]


def pad(t, rows, columns):
    return torch.nn.functional.pad(t, (0, columns - t.shape[-1], 0, rows - t.shape[-2]))


def quantize(w, kind):
    """Codes [n, k], scales [n, groups] and the values that they stand for, of one matrix."""
    n, k = w.shape
    if kind in ('float32', 'bfloat16'):
        codes = w.to(getattr(torch, kind))
        return codes, None, codes.float()
    if kind == 'int8':
        scale = w.abs().amax(-1, keepdim=True) / 127
        codes = (w / scale).round()
        return codes.to(torch.int8), scale, codes * scale
    if kind == 'float8':
        scale = torch.full((n, -(-k // 128)), 2.0**-9, device=w.device)
        codes = (w * 2**9).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), scale, codes.float() * 2**-9
    g = w.view(n, k // 32, 32)
    top = g.abs().amax(-1, keepdim=True)
    if kind == 'int4':
        scale = top / 7
        codes = (g / scale).round().clamp(-8, 7)
        return (codes.to(torch.int32) & 15).to(torch.uint8).view(n, k), scale[..., 0], (codes * scale).view(n, k)
    exponent = top.log2().floor() - 2
    values = torch.tensor(E2M1, device=w.device)
    code = ((g / 2**exponent).abs().unsqueeze(-1) - values).abs().argmin(-1)
    exact = values[code] * g.sign() * 2**exponent
    code = code | ((g < 0).long() << 3)
    return code.to(torch.uint8).view(n, k), (exponent[..., 0] + 127).to(torch.uint8), exact.view(n, k)


def fragments(codes, kind):
    """[tiles, 16, k] as the lanes of a warp read them, as bytes."""
    tiles, _, k = codes.shape
    steps = k // STEP[kind]
    if kind == 'float32':
        return codes.view(tiles, 16, steps, 16).permute(0, 2, 3, 1).contiguous().view(torch.uint8)
    run = 2 if kind in ('bfloat16', 'float8') else 4
    # half of the tile, row, step, fragment, half of its k, quarter, element
    f = codes.view(tiles, 2, 8, steps, 2, 2, 4, run)
    if kind in ('bfloat16', 'int8'):
        return f.permute(0, 3, 4, 2, 6, 5, 1, 7).contiguous().view(torch.uint8)
    if kind == 'float8':
        return f.permute(0, 3, 2, 6, 4, 5, 7, 1).contiguous()
    f = f.permute(0, 3, 2, 6, 4, 5, 1, 7)  # ..., half of the tile, element
    if kind == 'int4':
        return f[..., 0, :] | f[..., 1, :] << 4
    return f[..., 0::2] | f[..., 1::2] << 4


def matrix(w, kind, tiles, order):
    """One matrix's part of an expert's image, and its values. `order` brings its outputs, padded, into tiles."""
    n, k = w.shape
    depth = -(-k // 64) * 64
    codes, scale, values = quantize(w, kind)
    parts = [fragments(pad(codes, tiles * 16, depth)[order].view(tiles, 16, depth), kind)]
    if scale is not None:
        groups = 1 if kind == 'int8' else -(-depth // (128 if kind == 'float8' else 32))
        parts.append(pad(scale, tiles * 16, groups)[order].view(tiles, 16, groups).transpose(1, 2).contiguous())
    parts.append(torch.zeros(tiles * 16, device=w.device))
    flat = [p.contiguous().view(-1).view(torch.uint8) for p in parts]
    return torch.cat([torch.nn.functional.pad(p, (0, -p.numel() % 256)) for p in flat]), values


def expert_image(gate_up, down, kind):
    f, d = gate_up.shape[0] // 2, down.shape[0]
    padded = -(-f // 64) * 64
    both = torch.cat([pad(gate_up[:f], padded, d), pad(gate_up[f:], padded, d)])
    lines = torch.arange(padded, device=down.device).view(-1, 1, 8)
    order = torch.cat([lines, lines + padded], 1).view(-1)
    tiles = -(-d // 16)
    if kind in ('int8', 'int4', 'mxfp4'):
        both = both + (both == 0) * 1e-30  # padding: a scale that is not 0 / 0
    up_bytes, up_values = matrix(both, kind, padded // 8, order)
    down_bytes, down_values = matrix(down, kind, tiles, torch.arange(tiles * 16, device=down.device))
    return torch.cat([up_bytes, down_bytes]), torch.cat([up_values[:f], up_values[padded:padded + f]]), down_values


def quantize_rows(x, kind):
    """Activations as the integer products see them."""
    if kind not in ('int8', 'int4', 'mxfp4'):
        return x
    g = x if kind == 'int8' else x.view(x.shape[0], -1, 32)
    scale = g.abs().amax(-1, keepdim=True) / 127
    return ((g / scale).round() * scale).view(x.shape)


class Layer:
    """The weights of a model's layer in one type, on the device, and as PyTorch uses them."""

    def __init__(self, lib, name, experts, k, d, f, kind):
        self.lib, self.name, self.experts, self.k, self.d, self.f, self.kind = lib, name, experts, k, d, f, kind
        self.values, self.image = {}, None
        dense = kind == 'bfloat16'
        if dense:
            self.gate_up = torch.empty(experts, 2 * f, d, dtype=torch.bfloat16, device=lib.device)
            self.down = torch.empty(experts, d, f, dtype=torch.bfloat16, device=lib.device)
        for e in range(experts):
            gate_up = torch.randn(2 * f, d, device=lib.device) * d**-0.5
            down = torch.randn(d, f, device=lib.device) * f**-0.5
            image, up_values, down_values = expert_image(gate_up, down, kind)
            if self.image is None:
                self.image = torch.empty(experts, image.numel(), dtype=torch.uint8, device=lib.device)
            self.image[e] = image
            if dense:
                self.gate_up[e], self.down[e] = gate_up.bfloat16(), down.bfloat16()
            if e < k:
                self.values[e] = up_values, down_values

    def reference(self, x, weights):
        """One token through experts 0 to k - 1, in float64."""
        out = 0
        for e in range(self.k):
            up, down = (v.double() for v in self.values[e])
            g, u = (quantize_rows(x.double(), self.kind) @ up.T).chunk(2, -1)
            h = quantize_rows(torch.nn.functional.silu(g) * u, self.kind)
            out = out + weights[:, e:e + 1].double() * (h @ down.T)
        return out

    def case(self, tokens, dense=False):
        lib, k, d, f = self.lib, self.k, self.d, self.f
        indices = torch.rand(tokens, self.experts, device=lib.device).topk(k, -1)[1].int()
        indices[0] = torch.arange(k)  # what the check computes
        indices = indices.contiguous()
        weights = torch.rand(tokens, k, device=lib.device)
        dtype = torch.float32 if self.kind == 'float32' else torch.bfloat16
        x = torch.randn(tokens, d, device=lib.device).to(dtype)
        out = torch.empty(tokens, d, device=lib.device, dtype=torch.float32)
        group = 32 if self.kind in ('int4', 'mxfp4') else 0
        bank = DeviceBank(ptr(self.image), TYPES.index(self.kind), 0, 1.702, 7.0, 1, 0, group, self.experts, d, f)
        args = ExpertsDeviceArgs(bank, DeviceBank(), None, ptr(x), DTYPES[dtype], tokens, k, ptr(indices),
                                 ptr(weights), ptr(out), DTYPES[torch.float32])
        launch = lib.launcher('experts_forward', args)
        launch.tensors = (self.image, x, indices, weights, out)
        flat = indices.view(-1).long()
        active = int(flat.unique().numel())
        peer, peer_name = None, ''
        if dense:
            routes = tokens * k
            h = torch.randn(routes, d, device=lib.device).to(dtype)
            a, b = self.gate_up[0].T, self.down[0].T
            hidden = torch.randn(routes, f, device=lib.device).to(dtype)
            peer, peer_name = lambda: (h @ a, hidden @ b), 'two cuBLAS products, one expert'
        elif self.kind == 'bfloat16':
            grouped = getattr(torch.nn.functional, 'grouped_mm', None) or getattr(torch, '_grouped_mm', None)
            major = torch.cuda.get_device_capability()[0] if lib.on_gpu else 0
            if grouped is not None and major >= 9:
                peer, peer_name = lambda: self.peer_grouped(grouped, x, flat, weights), 'torch grouped_mm'
            else:
                peer, peer_name = lambda: self.peer_loop(x, flat, weights), 'torch loop of matmuls'

        def check():
            expected = self.reference(x[:1].float(), weights[:1])
            return relative(out[:1], expected)

        bytes_per_weight = CODE_BYTES[self.kind] + SCALE_BYTES[self.kind]
        traffic = active * 3 * d * f * bytes_per_weight + tokens * d * (x.element_size() + 4)
        name = f'{self.name} {self.kind} T={tokens}{" beside one dense product" if dense else ""}'
        tolerance = 1e-5 if self.kind in ('float32', 'float8') else 5e-3
        return Case('experts_forward', name, launch, check, tolerance, traffic, flops=tokens * k * d * f * 6,
                    peak='f32' if self.kind == 'float32' else 'bf16', peer=peer, peer_name=peer_name)

    def finish(self, y, order, weights, tokens):
        y = y.float() * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros(tokens, self.d, device=y.device).index_add_(0, order // self.k, y)

    def peer_grouped(self, grouped, x, flat, weights):
        order = torch.argsort(flat, stable=True)
        ends = torch.bincount(flat, minlength=self.experts).cumsum(0).int()
        g, u = grouped(x[order // self.k], self.gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        h = torch.nn.functional.silu(g) * u
        return self.finish(grouped(h, self.down.transpose(1, 2), offs=ends), order, weights, x.shape[0])

    def peer_loop(self, x, flat, weights):
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.experts).tolist()
        rows = x[order // self.k]
        y = torch.empty(rows.shape[0], self.d, dtype=x.dtype, device=x.device)
        at = 0
        for e, n in enumerate(counts):
            if n == 0:
                continue
            g, u = (rows[at:at + n] @ self.gate_up[e].T).chunk(2, -1)
            y[at:at + n] = (torch.nn.functional.silu(g) * u) @ self.down[e].T
            at += n
        return self.finish(y, order, weights, x.shape[0])


def cases(lib, small):
    if small:
        for kind in TYPES:
            layer = Layer(lib, 'small', 5, 2, 96, 64, kind)
            for tokens in (1, 37) + ((150,) if lib.on_gpu or kind in ('bfloat16', 'int4') else ()):
                yield layer.case(tokens)
        return
    models = (('Qwen3-30B-A3B', 128, 8, 2048, 768), ('Mixtral-8x7B', 8, 2, 4096, 14336))
    for model in models:
        layer = Layer(lib, *model, 'bfloat16')
        for tokens in (1, 64, 8192):
            yield layer.case(tokens)
        yield layer.case(8192, dense=True)
        del layer
    for kind in ('int4', 'mxfp4', 'int8', 'float8', 'float32'):
        for model in models[:1 if kind == 'float32' else 2]:
            layer = Layer(lib, *model, kind)
            for tokens in (1, 64, 8192):
                yield layer.case(tokens)
            del layer
