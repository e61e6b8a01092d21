"""What the golden scripts that write checkpoint directories share: --check, --only, and the comparison."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open


def tensors(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for key in handle.keys():
                found[file.name, key] = handle.get_tensor(key)
    return found


def compare(name, committed, fresh, bound):
    """Prints and returns the differences between two directories; see main."""
    problems = []
    old, new = tensors(committed), tensors(fresh)
    if old.keys() != new.keys():
        problems.append(f"tensors differ: {sorted(old.keys() ^ new.keys())[:6]}")
    for key in old.keys() & new.keys():
        a, b = old[key], new[key]
        allowed = bound(key, a)
        if a.dtype != b.dtype or a.shape != b.shape:
            problems.append(f"{key}: {a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}")
        elif allowed is None:
            if not torch.equal(a, b):
                problems.append(f"{key}: not the same bits")
        else:
            error = float((a - b).abs().max() / a.abs().max())
            if not error <= allowed:
                problems.append(f"{key}: differs by {error:.1e}")
    for file in sorted({f.name for d in (committed, fresh) for f in d.glob("*.json")}):
        a, b = committed / file, fresh / file
        if not (a.exists() and b.exists() and json.loads(a.read_text()) == json.loads(b.read_text())):
            problems.append(f"{file} differs")
    for problem in problems:
        print(f"{name}: {problem}")
    return problems


def main(description, architectures, here, make, bound):
    """Makes or checks a directory for each architecture.

    make(name, spec, directory) writes one. bound((file, tensor's name), tensor) is the largest difference allowed,
    relative to the largest magnitude; None wants the same bits.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed files; write nothing")
    parser.add_argument("--only", choices=architectures, help="one architecture")
    options = parser.parse_args()
    problems = []
    for name, spec in architectures.items():
        if options.only not in (None, name):
            continue
        if options.check:
            with tempfile.TemporaryDirectory() as fresh:
                make(name, spec, Path(fresh))
                problems += compare(name, here / name, Path(fresh), bound)
        else:
            make(name, spec, here / name)
    if problems:
        sys.exit(f"{len(problems)} differences")
    if options.check:
        print("the committed files are what this script makes")
