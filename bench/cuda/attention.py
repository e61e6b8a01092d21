"""Attention: see bench.py for what `cases` returns."""
import ctypes as C

import torch

from heddle_cuda import DTYPES, Case, ptr, relative

I64, PTR = C.c_int64, C.c_void_p


class InnerStride(C.Structure):
    _fields_ = [(name, I64) for name in ('query', 'key', 'value', 'bias', 'mask', 'output', 'lse', 'token')]


class Prefix(C.Structure):
    _fields_ = [('present', C.c_bool), ('query', I64), ('key', I64), ('value', I64), ('query_stride', I64 * 2),
                ('key_stride', I64 * 2), ('value_stride', I64 * 2)]


class AttentionProblem(C.Structure):  # native/attention/problem.h
    _fields_ = [('batch', I64), ('queries', I64), ('keys', I64), ('query_heads', C.c_int32), ('key_heads', C.c_int32),
                ('head_dim', C.c_int32), ('value_dim', C.c_int32), ('type', C.c_int32), ('query', PTR), ('key', PTR),
                ('value', PTR), ('query_stride', I64 * 4), ('key_stride', I64 * 4), ('value_stride', I64 * 4),
                ('bias', PTR), ('bias_type', C.c_int32), ('bias_stride', I64 * 3), ('mask_stride', I64 * 3),
                ('block_stride', I64 * 3), ('alibi', PTR), ('sinks', PTR), ('mask', PTR), ('block_mask', PTR),
                ('block_query', I64), ('block_key', I64), ('query_ids', PTR), ('key_ids', PTR),
                ('query_id_stride', I64), ('key_id_stride', I64), ('query_offsets', PTR), ('key_offsets', PTR),
                ('segments', I64), ('left', I64), ('right', I64), ('scale', C.c_float), ('softcap', C.c_float),
                ('uniform_empty', C.c_bool), ('output_stride', I64 * 3), ('lse_stride', I64 * 3),
                ('query_token', I64 * 2), ('key_token', I64 * 2), ('inner', I64), ('inner_stride', InnerStride),
                ('step', I64), ('batch_segments', I64), ('order', PTR), ('prefix', Prefix),
                ('longest', I64)]


class AttentionArgs(C.Structure):  # native/attention/attention.h
    _fields_ = [('problem', AttentionProblem), ('output', PTR), ('log_sum_exp', PTR), ('prefix_output', PTR),
                ('prefix_lse', PTR), ('plan', PTR)]


def attention(lib, name, batch, queries, keys, heads, key_heads, dim, dtype, causal=False):
    def tensor(length, n):
        return torch.randn(batch, length, n, dim, device=lib.device).to(dtype)

    q, k, v = tensor(queries, heads), tensor(keys, key_heads), tensor(keys, key_heads)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, device=lib.device)
    p = AttentionProblem(batch=batch, queries=queries, keys=keys, query_heads=heads, key_heads=key_heads, head_dim=dim,
                         value_dim=dim, type=DTYPES[dtype], query=ptr(q), key=ptr(k), value=ptr(v), block_query=1,
                         block_key=1, left=-1, right=0 if causal else -1, scale=dim**-0.5, inner=1, step=1)
    p.query_stride[:] = q.stride()
    p.key_stride[:] = k.stride()
    p.value_stride[:] = v.stride()
    p.output_stride[:] = out.stride()[:3]
    p.lse_stride[:] = (lse.stride(0), lse.stride(2), lse.stride(1))
    launch = lib.launcher('attention', AttentionArgs(p, ptr(out), ptr(lse)))
    launch.tensors = (q, k, v, out, lse)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def peer():
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal,
                    enable_gqa=heads != key_heads)

    def check():
        """Up to 64 queries, the last ones, in float64."""
        n = min(queries, 64)
        group = heads // key_heads
        x = q[:, -n:].transpose(1, 2).double()
        y, z = (t.transpose(1, 2).double().repeat_interleave(group, 1) for t in (k, v))
        logits = x @ y.transpose(-1, -2) * dim**-0.5
        if causal:
            at = torch.arange(queries - n, queries, device=lib.device)[:, None] + keys - queries
            logits.masked_fill_(torch.arange(keys, device=lib.device)[None] > at, -torch.inf)
        expected = (logits.softmax(-1) @ z).transpose(1, 2)
        return max(relative(out[:, -n:], expected), relative(lse[:, :, -n:], logits.logsumexp(-1)))

    share = (1 - (queries - 1) / 2 / keys) if causal else 1
    item = q.element_size()
    name = f'{name} B={batch} S={queries},{keys} H={heads}/{key_heads} D={dim} {str(dtype)[6:]}'
    return Case('attention', name, launch, check, 5e-6 if dtype == torch.float32 else 5e-3,
                item * (q.numel() * 2 + k.numel() * 2), 4 * batch * heads * queries * keys * dim * share,
                'f32' if dtype == torch.float32 else 'bf16', peer, 'torch sdpa')


class AttentionBackwardArgs(C.Structure):  # native/attention/attention_backward.h
    _fields_ = [('problem', AttentionProblem), ('upstream', PTR), ('output', PTR), ('log_sum_exp', PTR),
                ('query_grad', PTR), ('key_grad', PTR), ('value_grad', PTR), ('bias_grad', PTR), ('first_head', C.c_int32),
                ('heads', C.c_int32), ('prefix_upstream', PTR), ('prefix_weight', C.c_float), ('prefix_output', PTR),
                ('prefix_lse', PTR), ('prefix_query_grad', PTR), ('prefix_key_grad', PTR), ('prefix_value_grad', PTR),
                ('plan', PTR)]


def backward(lib, name, batch, queries, keys, heads, key_heads, dim, dtype, causal=False):
    """From what the forward of this library saved; checked against autograd in float64 on up to 256 queries and keys."""
    forward = attention(lib, name, batch, queries, keys, heads, key_heads, dim, dtype, causal)
    forward.heddle()
    q, k, v, out, lse = forward.heddle.tensors
    upstream = torch.randn_like(out)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    p = forward.heddle.args.problem
    p.query_token[:] = (queries, 1)
    p.key_token[:] = (keys, 1)
    launch = lib.launcher('attention_backward', AttentionBackwardArgs(
        p, ptr(upstream), ptr(out), ptr(lse), *(ptr(t) for t in grads), prefix_weight=1))
    launch.tensors = (q, k, v, out, lse, upstream, grads)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    leaves = [t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)]
    peer = None
    if lib.on_gpu:
        kept = sdpa(*leaves, is_causal=causal, enable_gqa=heads != key_heads)

        def peer():
            torch.autograd.grad(kept, leaves, upstream.transpose(1, 2), retain_graph=True)

    def check():
        """One key head and its queries at a time, in float64."""
        group = heads // key_heads
        worst = 0.0
        for h in {0, key_heads - 1}:
            x, y, z = (t[:1, :, n:n + c].transpose(1, 2).double().requires_grad_()
                       for t, n, c in ((q, h * group, group), (k, h, 1), (v, h, 1)))
            expected = [torch.zeros_like(t) for t in (x, y, z)]
            for at in range(0, queries, 1024):  # queries of a slice, so that their logits fit
                rows = x[:, :, at:at + 1024]
                logits = rows @ y.transpose(-1, -2) * dim**-0.5
                if causal:
                    last = torch.arange(at, at + rows.shape[2], device=lib.device)[:, None] + keys - queries
                    logits = logits.masked_fill(torch.arange(keys, device=lib.device)[None] > last, -torch.inf)
                result = (logits.softmax(-1) @ z)
                g = upstream[:1, at:at + 1024, h * group:(h + 1) * group].transpose(1, 2).double()
                for total, part in zip(expected, torch.autograd.grad(result, (x, y, z), g)):
                    total += part
            for grad, want, n, c in zip(grads, expected, (h * group, h, h), (group, 1, 1)):
                worst = max(worst, relative(grad[:1, :, n:n + c].transpose(1, 2), want))
        return worst

    share = (1 - (queries - 1) / 2 / keys) if causal else 1
    item = q.element_size()
    title = forward.name
    return Case('attention_backward', title, launch, check, 2e-5 if dtype == torch.float32 else 1e-2,
                item * (q.numel() * 4 + k.numel() * 4), 10 * batch * heads * queries * keys * dim * share,
                'f32' if dtype == torch.float32 else 'bf16', peer, 'torch sdpa backward')


def cases(lib, small):
    half, full = torch.bfloat16, torch.float32
    if small:
        yield attention(lib, 'plain', 2, 37, 53, 3, 3, 64, full)
        yield attention(lib, 'causal', 1, 70, 90, 4, 2, 40, half, causal=True)
        yield attention(lib, 'wide', 1, 33, 65, 2, 2, 192, half)
        yield backward(lib, 'plain', 2, 37, 53, 3, 3, 64, full)
        yield backward(lib, 'causal', 1, 70, 90, 4, 2, 40, half, causal=True)
        yield backward(lib, 'causal', 1, 70, 90, 2, 2, 128, half, causal=True)
        yield backward(lib, 'wide', 1, 33, 65, 2, 2, 192, half)
        return
    yield attention(lib, 'causal', 1, 8192, 8192, 16, 16, 128, half, causal=True)
    yield attention(lib, 'full', 1, 4096, 4096, 12, 12, 64, half)
    yield attention(lib, 'GQA', 1, 4096, 4096, 32, 8, 128, half, causal=True)
    yield attention(lib, 'full', 1, 4096, 4096, 12, 12, 64, full)
    yield attention(lib, 'spatial', 64, 196, 196, 12, 12, 64, half)
    for frames in (16, 32, 64):
        yield attention(lib, 'temporal', 4 * 196, frames, frames, 12, 12, 64, half)
    yield attention(lib, 'decode', 4, 1, 32768, 32, 8, 128, half)
    for dim, heads in ((64, 16), (128, 16)):
        for length, batch in ((2048, 4), (8192, 1)):
            for causal in (True, False):
                yield backward(lib, 'causal' if causal else 'full', batch, length, length, heads, heads, dim, half, causal)
    yield backward(lib, 'GQA', 1, 4096, 4096, 32, 8, 128, half, causal=True)
    yield backward(lib, 'spatial', 64, 196, 196, 12, 12, 64, half)
    yield backward(lib, 'full', 1, 2048, 2048, 12, 12, 64, full)
