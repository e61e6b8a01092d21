"""Checks and times heddle_cuda against PyTorch in one process.

    python3 bench.py LIBRARY [--small] [--check-only] [--filter TEXT] [--seconds S] [--json FILE]

Each module of MODULES has `cases(lib, small)`, which yields heddle_cuda.Case; `small` asks for shapes that
compute-sanitizer gets through in seconds. A new family is one more name in MODULES; its ctypes structs have the names of
those in native/, which structs.py holds them against. Without a GPU, and with the library
of the host shim, --small --check-only checks the args structs and the cases themselves.
"""
import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from heddle_cuda import Library  # noqa: E402

MODULES = ('moe', 'experts', 'linear', 'layer', 'nn', 'attention', 'decode', 'factorized', 'patch_embed', 'privacy')


def seconds_of(run, flush, repeats=25):
    """Median time of one call by events, the L2 cache overwritten before each."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measured_peaks(flush):
    """What this GPU does at best: bytes a second of a copy, and FLOP/s of cuBLAS at 8192 cubed."""
    peaks = {}
    a = torch.empty(1 << 30, dtype=torch.uint8, device='cuda')
    b = torch.empty_like(a)
    peaks['bytes'] = 2 * a.numel() / seconds_of(lambda: b.copy_(a), flush)
    n = 8192
    for name, dtype in (('bf16', torch.bfloat16), ('f32', torch.float32)):
        x, y = torch.randn(n, n, device='cuda').to(dtype), torch.randn(n, n, device='cuda').to(dtype)
        peaks[name] = 2 * n**3 / seconds_of(lambda: x @ y, flush, repeats=9)
    return peaks


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('library')
    parser.add_argument('--small', action='store_true')
    parser.add_argument('--check-only', action='store_true')
    parser.add_argument('--filter', default='')
    parser.add_argument('--seconds', type=float, default=150)
    parser.add_argument('--json')
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    lib = Library(options.library)
    timed = not options.check_only
    if timed and not lib.on_gpu:
        sys.exit('timing needs a GPU; use --check-only')
    started = time.monotonic()
    report = {'torch': torch.__version__, 'gpu': torch.cuda.get_device_name() if lib.on_gpu else 'none', 'rows': []}
    flush = torch.empty(256 << 20, dtype=torch.uint8, device='cuda') if timed else None
    if timed:
        report['peaks'] = measured_peaks(flush)
        print({k: f'{v / 1e12:.2f} T/s' for k, v in report['peaks'].items()})
    failed = checked = 0

    def save():
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + '\n')

    for module in MODULES:
        if importlib.util.find_spec(module) is None:
            print(f'{module}: no cases yet')
            continue
        for case in importlib.import_module(module).cases(lib, options.small):
            label = f'{case.op}: {case.name}'
            if options.filter not in label:
                lib.synchronize()  # a case may launch while it is made (the host shim has threads of its own)
                continue
            if lib.entry(case.op) is None:
                print(f'{label}: not in this library')
                continue
            if time.monotonic() - started > options.seconds:
                print(f'{label}: out of time')
                continue
            case.heddle()
            lib.synchronize()
            error = case.check()
            passed = error <= case.tolerance
            checked += 1
            failed += not passed
            row = {'op': case.op, 'name': case.name, 'error': error, 'tolerance': case.tolerance, 'passed': passed}
            line = f'{label}: error {error:.1e}{"" if passed else " FAILED"}'
            if timed:
                row['seconds'] = t = seconds_of(case.heddle, flush)
                row['bytes_per_second'] = case.bytes / t
                row['share_of_bandwidth'] = case.bytes / t / report['peaks']['bytes']
                line += f', {t * 1e6:.1f} us, {case.bytes / t / 1e9:.0f} GB/s ({row["share_of_bandwidth"]:.0%})'
                if case.flops:
                    row['flops_per_second'] = case.flops / t
                    row['share_of_peak'] = case.flops / t / report['peaks'][case.peak or 'bf16']
                    line += f', {case.flops / t / 1e12:.1f} TFLOP/s ({row["share_of_peak"]:.0%})'
                if case.peer:
                    row['peer'] = case.peer_name
                    row['peer_seconds'] = p = seconds_of(case.peer, flush)
                    line += f', {p / t:.2f}x {case.peer_name} ({p * 1e6:.1f} us)'
            report['rows'].append(row)
            save()  # what follows may be cut off
            print(line, flush=True)
    save()
    print(f'{checked - failed} passed, {failed} failed')
    sys.exit(1 if failed or not checked else 0)


main()
