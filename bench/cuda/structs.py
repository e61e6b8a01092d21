"""Prints C++ sources that compile only where the ctypes structs here are laid out as those of native/ with their names:
a JSON object with a source for each folder of native/ (its headers go together), for `c++ -std=c++17 -fsyntax-only -I
native`. test/cuda/structs.test.ts compiles them.

Every Structure of the modules here is compared: the place, size and kind of each field, and the size of the whole. One
that native/ has no struct for is that of a member without a name, and must be a field of another. Needs no torch.
"""
import ctypes as C
import importlib
import json
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

HERE = Path(__file__).parent
NATIVE = HERE.parent.parent / 'native'


def structures():
    """Of all modules, by name."""
    sys.path.insert(0, str(HERE))
    for name in ('torch', 'torch.nn', 'torch.nn.functional'):
        sys.modules[name] = MagicMock()
    found = {}
    for path in sorted(HERE.glob('*.py')):
        if path.stem in ('bench', 'structs'):
            continue
        for name, value in vars(importlib.import_module(path.stem)).items():
            if isinstance(value, type) and issubclass(value, C.Structure) and value is not C.Structure:
                if found.setdefault(name, value) is not value:
                    sys.exit(f'two modules have a struct {name}')
    return found


def headers():
    """The header of each struct in native/."""
    found = {}
    for path in sorted(NATIVE.rglob('*.h')):
        for name in re.findall(r'^struct (\w+)(?: final)?(?: : [^{;]+)? \{', path.read_text(), re.MULTILINE):
            found.setdefault(name, path.relative_to(NATIVE).as_posix())
    return found


def fields(kind, path, base):
    for name, field in kind._fields_:
        place = getattr(kind, name)
        full, at = path + name, base + place.offset
        yield full, at, place.size, field
        if issubclass(field, C.Structure):
            yield from fields(field, f'{full}.', at)


def checks(name, kind):
    """Assertions on one struct."""
    for full, at, size, field in fields(kind, '', 0):
        member = f'MEMBER({name}, {full})'
        yield f'static_assert(offsetof(heddle::{name}, {full}) == {at}, "{name}::{full}: place");'
        yield f'static_assert(sizeof({member}) == {size}, "{name}::{full}: size");'
        trait = {C.c_void_p: 'pointer', C.c_float: 'floating_point'}.get(field)
        if trait:
            test = f'std::is_{trait}_v<std::remove_reference_t<decltype(({member}))>>'
            yield f'static_assert({test}, "{name}::{full}: {trait}");'
    yield f'static_assert(sizeof(heddle::{name}) == {C.sizeof(kind)}, "{name}: size");'


def main():
    found, known = structures(), headers()
    inner = {field for kind in found.values() for _, field in kind._fields_ if issubclass(field, C.Structure)}
    named = [name for name in found if name in known]
    for name, kind in found.items():
        if name not in known and kind not in inner:
            sys.exit(f'native/ has no struct {name}')
    sources = {}
    for name in named:
        family = known[name].split('/')[0]
        lines = sources.setdefault(family, {'includes': set(), 'checks': []})
        lines['includes'].add(f'#include "{known[name]}"')
        lines['checks'] += checks(name, found[name])
    start = '#include <cstddef>\n#include <type_traits>\n#include <utility>\n'
    start += '#define MEMBER(S, m) std::declval<heddle::S&>().m\n'
    print(json.dumps({f: start + '\n'.join([*sorted(s['includes']), *s['checks']]) + '\n' for f, s in sources.items()}))


main()
