"""Attention over time and space of video tokens: see bench.py for what `cases` returns."""
import ctypes as C

import torch

from attention import I64, PTR
from heddle_cuda import DTYPES, Case, ptr, relative

AXES = dict(joint=0, time=1, space=2, split=3)  # Axis of native/attention/factorized_attention.h


class FactorizedProblem(C.Structure):  # native/attention/factorized_attention.h
    _fields_ = [('axis', C.c_int32), ('batch', I64), ('frames', I64), ('patches', I64), ('query_heads', C.c_int32),
                ('key_heads', C.c_int32), ('head_dim', C.c_int32), ('value_dim', C.c_int32), ('type', C.c_int32),
                ('query', PTR), ('key', PTR), ('value', PTR), ('query_stride', I64 * 5), ('key_stride', I64 * 5),
                ('value_stride', I64 * 5), ('output_stride', I64 * 5), ('class_query', PTR), ('class_key', PTR),
                ('class_value', PTR), ('class_query_stride', I64 * 2), ('class_key_stride', I64 * 2),
                ('class_value_stride', I64 * 2), ('class_output_stride', I64 * 2), ('bias', PTR),
                ('bias_type', C.c_int32), ('bias_stride', I64 * 4), ('mask_stride', I64 * 4), ('alibi', PTR),
                ('sinks', PTR), ('mask', PTR), ('left', I64), ('right', I64), ('scale', C.c_float),
                ('softcap', C.c_float), ('uniform_empty', C.c_bool), ('batch_offsets', PTR), ('frame_offsets', PTR),
                ('patch_offsets', PTR), ('order', PTR), ('tokens', I64), ('lse_batch', I64), ('lse_head', I64)]


class FactorizedAttentionArgs(C.Structure):
    _fields_ = [('problem', FactorizedProblem), ('output', PTR), ('log_sum_exp', PTR), ('class_output', PTR)]


def along(axis, x):
    """[batch, frames, patches, heads, dim] as [sequences, heads, positions, dim]; copies, as PyTorch has to."""
    batch, frames, patches, heads, dim = x.shape
    if axis == 'time':
        return x.permute(0, 2, 3, 1, 4).reshape(batch * patches, heads, frames, dim)
    if axis == 'space':
        return x.permute(0, 1, 3, 2, 4).reshape(batch * frames, heads, patches, dim)
    return x.permute(0, 3, 1, 2, 4).reshape(batch, heads, frames * patches, dim)


def back(axis, y, shape):
    batch, frames, patches, heads, dim = shape
    if axis == 'time':
        return y.view(batch, patches, heads, frames, dim).permute(0, 3, 1, 2, 4).contiguous()
    if axis == 'space':
        return y.view(batch, frames, heads, patches, dim).permute(0, 1, 3, 2, 4).contiguous()
    return y.view(batch, heads, frames, patches, dim).permute(0, 2, 3, 1, 4).contiguous()


def by_axis(axis, run, q, k, v):
    """The attention `run` of [sequences, heads, positions, dim] along an axis."""
    if axis == 'split':
        half = q.shape[3] // 2
        parts = [by_axis(a, run, *(t[:, :, :, h * half:(h + 1) * half] for t in (q, k, v)))
                 for h, a in enumerate(('time', 'space'))]
        return torch.cat(parts, 3)
    return back(axis, run(*(along(axis, t) for t in (q, k, v))), q.shape)


def factorized(lib, axis, batch, frames, patches, heads, dim, dtype):
    shape = (batch, frames, patches, heads, dim)
    # As a fused projection leaves them: q, k and v of a token beside each other.
    fused = torch.randn(batch, frames, patches, 3, heads, dim, device=lib.device).to(dtype)
    q, k, v = (fused[:, :, :, i] for i in range(3))
    out = torch.empty(shape, dtype=dtype, device=lib.device)
    lse = torch.empty(batch, heads, frames, patches, device=lib.device)
    p = FactorizedProblem(axis=AXES[axis], batch=batch, frames=frames, patches=patches, query_heads=heads, key_heads=heads,
                          head_dim=dim, value_dim=dim, type=DTYPES[dtype], query=q.data_ptr(), key=k.data_ptr(),
                          value=v.data_ptr(), left=-1, right=-1, scale=dim**-0.5)
    for name, t in (('query', q), ('key', k), ('value', v), ('output', out)):
        getattr(p, f'{name}_stride')[:] = t.stride()
    launch = lib.launcher('factorized_attention', FactorizedAttentionArgs(p, ptr(out), ptr(lse), None))
    launch.tensors = (fused, out, lse)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def plain(x, y, z):
        return ((x @ y.transpose(-1, -2)) * dim**-0.5).softmax(-1) @ z

    def check():
        """In float64: of time the last few patches, of space the last few frames, of both together a few heads."""
        worst = 0.0
        halves = ((axis, slice(None)),) if axis != 'split' else (('time', slice(heads // 2)), ('space', slice(heads // 2, heads)))
        for a, own in halves:
            if a == 'joint':
                own = slice(2)
            cut = (slice(1), slice(None) if a != 'space' else slice(-2, None),
                   slice(None) if a != 'time' else slice(-5, None), own)
            expected = by_axis(a, plain, *(t[cut].double() for t in (q, k, v)))
            worst = max(worst, relative(out[cut], expected))
        return worst

    def peer():
        return by_axis(axis, sdpa, q, k, v)

    keys = dict(joint=frames * patches, time=frames, space=patches, split=(frames + patches) / 2)[axis]
    name = f'{axis} B={batch} T={frames} N={patches} H={heads} D={dim} {str(dtype)[6:]}'
    return Case('factorized_attention', name, launch, check, 5e-6 if dtype == torch.float32 else 5e-3,
                4 * q.numel() * q.element_size(), 4 * q.numel() * keys, 'f32' if dtype == torch.float32 else 'bf16', peer,
                'torch permute, sdpa, permute')


def cases(lib, small):
    half, full = torch.bfloat16, torch.float32
    if small:
        for axis in AXES:
            yield factorized(lib, axis, 2, 5, 7, 4, 32, full)
            yield factorized(lib, axis, 1, 6, 9, 2, 64, half)
        return
    for frames in (16, 32, 64):
        yield factorized(lib, 'time', 4, frames, 196, 12, 64, half)
    yield factorized(lib, 'space', 4, 16, 196, 12, 64, half)
    yield factorized(lib, 'space', 2, 16, 576, 16, 64, half)
    yield factorized(lib, 'split', 4, 32, 196, 12, 64, half)
    yield factorized(lib, 'joint', 1, 16, 196, 12, 64, half)
    yield factorized(lib, 'time', 4, 32, 196, 12, 64, full)
