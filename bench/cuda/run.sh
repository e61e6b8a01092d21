#!/bin/bash
# On a machine with a GPU, within 8 minutes: builds the CUDA library for that GPU, runs every case on the device, runs
# compute-sanitizer on small ones, and times everything against PyTorch. Writes tables and JSON to OUT (default
# bench/results/cuda).
#
#   bench/cuda/run.sh
#
# Needs nvcc and python3 with torch. Every case of the tables also runs through Node where one is found: NODE, or
# NODE_XZ (a node binary packed by `xz -3 -c "$(which node)"`: 27 MB), or the one on PATH. That takes dist/,
# build/Release/heddle.node and node_modules/node-gyp-build of this checkout, which are ignored by git: carry them.
set -u
cd "$(dirname "$0")/../.."
out=${OUT:-bench/results/cuda}
build=${BUILD:-/tmp/heddle-cuda}
mkdir -p "$out" "$build"
started=$SECONDS
failed=0
left() { echo $((470 - SECONDS + started)); }
step() { # name, seconds at most, command...
  local name=$1 limit=$2
  shift 2
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then
    echo "== $name: no time left"
    failed=1
    return
  fi
  echo "== $name"
  timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 60
  local code=${PIPESTATUS[0]}
  [ "$code" -ne 0 ] && { echo "== $name ended with $code"; failed=1; }
  return "$code"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv || exit 2
export PATH=$PATH:/usr/local/cuda/bin
command -v nvcc >/dev/null || { echo 'nvcc is not installed'; exit 2; }
library=$build/libheddle_cuda.so

compile() {
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
  [ "$arch" = 90 ] && arch=90a
  python3 - native/sources.json <<'PYTHON' >"$build/sources"
import json, sys
print('\n'.join(json.load(open(sys.argv[1]))['cuda']))
PYTHON
  local flags="-std=c++17 -O3 -Inative -gencode arch=compute_$arch,code=sm_$arch -lineinfo"
  flags="$flags -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
  xargs -P 16 -I{} sh -c "nvcc $flags -c {} -o $build/\$(echo {} | tr / _).o" <"$build/sources" || return 1
  nvcc -shared -cudart static -o "$library" "$build"/*.o
}
rm -f "$build"/*.o
export -f compile
export build library
step build 240 bash -c compile || exit 1

node=${NODE:-}
if [ -z "$node" ] && [ -n "${NODE_XZ:-}" ]; then
  xz -dc "$NODE_XZ" >"$build/node" && chmod +x "$build/node" && node=$build/node
fi
node=${node:-$(command -v node)}
if [ -n "$node" ] && [ -e build/Release/heddle.node ] && [ -e dist/cli/main.js ]; then
  step cases 120 env HEDDLE_CUDA_LIBRARY="$library" "$node" dist/cli/main.js verify --backend cuda --seed 1 \
    --json "$out/cases.json"
else
  echo '== cases: no Node, addon or dist/ here; the checks against PyTorch below are all that runs'
fi

step small 60 python3 bench/cuda/bench.py "$library" --small --check-only
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name-exclude kernel_substring=at:: \
      python3 bench/cuda/bench.py "$library" --small --check-only
  done
else
  echo '== compute-sanitizer is not installed'
fi
step bench "$(left)" python3 bench/cuda/bench.py "$library" --seconds "$(($(left) - 40))" --json "$out/bench.json"
echo "== done in $((SECONDS - started)) s, $([ $failed = 0 ] && echo 'all passed' || echo 'FAILED')"
exit $failed
