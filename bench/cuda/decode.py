"""Decoding over a paged cache: see bench.py for what `cases` returns. The pages are filled by kv_append."""
import ctypes as C

import torch

from attention import I64, PTR, AttentionProblem
from heddle_cuda import DTYPES, Case, ptr, relative

CACHE = dict(float32=0, float16=2, bfloat16=3, int8=4, int4=16)  # CacheType of native/attention/decode_attention.h
GROUP = dict(float32=1, float16=1, bfloat16=2, int8=4, int4=8)  # elements of a word
WORD_BYTES = dict(float32=4, float16=2, bfloat16=4, int8=4, int4=4)


class DecodeAttentionArgs(C.Structure):  # native/attention/decode_attention.h
    _fields_ = [('problem', AttentionProblem), ('cache_type', C.c_int32), ('keys', PTR), ('values', PTR),
                ('key_scales', PTR), ('value_scales', PTR), ('page_size', I64), ('table', PTR), ('table_stride', I64),
                ('starts', PTR), ('lengths', PTR), ('output', PTR), ('log_sum_exp', PTR), ('first_part', PTR),
                ('part_offset', PTR), ('packed', PTR), ('partial', PTR), ('partial_floats', I64)]


class KvPools(C.Structure):  # native/attention/kv_cache.h
    _fields_ = [('type', C.c_int32), ('key_heads', C.c_int32), ('head_dim', C.c_int32), ('value_dim', C.c_int32),
                ('page_size', I64), ('keys', PTR), ('values', PTR), ('key_scales', PTR), ('value_scales', PTR)]


class KvClearArgs(C.Structure):
    _fields_ = [('pools', KvPools), ('pages', I64)]


class KvAppendArgs(C.Structure):
    _fields_ = [('pools', KvPools), ('copy_from', I64), ('copy_to', I64), ('table', PTR), ('position', I64),
                ('count', I64), ('keys', PTR), ('values', PTR), ('key_type', C.c_int32), ('value_type', C.c_int32)]


def stored(x, kind):
    """What a cache of this type keeps of x, in float64."""
    if kind in ('float32', 'float16', 'bfloat16'):
        return x.to(getattr(torch, kind)).double()
    top = 127 if kind == 'int8' else 7
    scale = (x.float().abs().amax(-1, keepdim=True) / top).double()
    return (x.double() / scale + 0.5).floor().clamp(-top, top) * scale


def pools_of(lib, kind, pages, key_heads, dim, page_size):
    """Empty pages, and the tensors that they are."""
    slots, group = -(-page_size // 16) * 16, GROUP[kind]
    words = pages * key_heads * slots * -(-dim // group), pages * key_heads * (slots // group) * dim
    keys, values = (torch.empty(n * WORD_BYTES[kind], dtype=torch.uint8, device=lib.device) for n in words)
    scales = [torch.empty(pages * key_heads * slots, device=lib.device) if kind in ('int8', 'int4') else None
              for _ in range(2)]
    pools = KvPools(CACHE[kind], key_heads, dim, dim, page_size, ptr(keys), ptr(values), *(ptr(s) for s in scales))
    return pools, (keys, values, *scales)


def decode(lib, kind, batch, length, heads, key_heads, dim, page_size=64, queries=1, ragged=False, dtype=torch.bfloat16):
    lengths = [max(queries, length - 19 * b * ragged) for b in range(batch)]
    per_entry = -(-length // page_size)
    pages = batch * per_entry
    pools, keep = pools_of(lib, kind, pages, key_heads, dim, page_size)
    table = torch.randperm(pages, device=lib.device).int().view(batch, per_entry).contiguous()
    k, v = (torch.randn(batch, length, key_heads, dim, device=lib.device, dtype=torch.bfloat16) for _ in range(2))
    lib.launcher('kv_clear', KvClearArgs(pools, pages))()
    for b, n in enumerate(lengths):
        code = DTYPES[k.dtype]
        lib.launcher('kv_append', KvAppendArgs(pools, -1, -1, table[b].data_ptr(), 0, n, k[b].data_ptr(), v[b].data_ptr(),
                                               code, code))()
    lib.synchronize()

    q = torch.randn(batch, queries, heads, dim, device=lib.device).to(dtype)
    out, lse = torch.empty_like(q), torch.empty(batch, heads, queries, device=lib.device)
    starts = torch.zeros(batch, dtype=torch.int32, device=lib.device)
    ends = torch.tensor(lengths, dtype=torch.int32, device=lib.device)
    p = AttentionProblem(batch=batch, queries=queries, query_heads=heads, key_heads=key_heads, head_dim=dim, value_dim=dim,
                         type=DTYPES[dtype], query=ptr(q), block_query=1, block_key=1, left=-1, right=0, scale=dim**-0.5,
                         inner=1, step=1)
    p.query_stride[:] = q.stride()
    p.output_stride[:] = out.stride()[:3]
    p.lse_stride[:] = (lse.stride(0), lse.stride(2), lse.stride(1))
    launch = lib.launcher('decode_attention', DecodeAttentionArgs(
        p, CACHE[kind], pools.keys, pools.values, pools.key_scales, pools.value_scales, page_size, ptr(table), per_entry,
        ptr(starts), ptr(ends), ptr(out), ptr(lse)))
    launch.tensors = (keep, table, k, v, q, out, lse, starts, ends)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def check():
        """First and last entry, first and last key head, in float64."""
        group, worst = heads // key_heads, 0.0
        for b in {0, batch - 1}:
            for h in {0, key_heads - 1}:
                n, own = lengths[b], slice(h * group, (h + 1) * group)
                keys, values = stored(k[b, :n, h], kind), stored(v[b, :n, h], kind)
                logits = torch.einsum('qhd,kd->hqk', q[b, :, own].double(), keys) * dim**-0.5
                last = torch.arange(n - queries, n, device=lib.device)[:, None]
                logits.masked_fill_(torch.arange(n, device=lib.device)[None] > last, -torch.inf)
                expected = torch.einsum('hqk,kd->qhd', logits.softmax(-1), values)
                worst = max(worst, relative(out[b, :, own], expected), relative(lse[b, own], logits.logsumexp(-1)))
        return worst

    keys, values = (t.transpose(1, 2).contiguous() for t in (k, v)) if lib.on_gpu else (None, None)
    peer = (lambda: sdpa(q.transpose(1, 2), keys, values, enable_gqa=heads != key_heads)) if queries == 1 and lib.on_gpu else None
    element = dict(float32=4, float16=2, bfloat16=2, int8=1, int4=0.5)[kind]
    scale = 4 / dim if kind in ('int8', 'int4') else 0
    total = sum(lengths) * key_heads * dim
    name = f'{kind} B={batch} S={length} H={heads}/{key_heads} D={dim} page={page_size}{f" queries={queries}" if queries > 1 else ""}'
    return Case('decode_attention', name, launch, check, 5e-3, 2 * total * (element + scale),
                4 * sum(lengths) * queries * heads * dim, 'bf16', peer, 'torch sdpa of contiguous bf16')


def cases(lib, small):
    if small:
        for kind in CACHE:
            yield decode(lib, kind, 2, 300, 4, 2, 64, ragged=True)
        yield decode(lib, 'int4', 3, 70, 6, 2, 40, page_size=7, queries=3, ragged=True)
        yield decode(lib, 'bfloat16', 1, 600, 2, 1, 128, page_size=16, queries=2)
        return
    for kind in ('bfloat16', 'int8', 'int4'):
        for batch, length in ((1, 4096), (1, 131072), (32, 4096)):
            yield decode(lib, kind, batch, length, 32, 8, 128)
