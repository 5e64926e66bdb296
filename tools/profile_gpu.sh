#!/usr/bin/env bash
# profile_gpu.sh GPU [SECONDS]: the kernels of the catalogue on this GPU (at most SECONDS, 3600; run again to go on), then
# whole forward passes against them. Raw data stays in hardware_profiles/measured/GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin; [ -x $bin/python ] || bin=$(dirname "$(command -v python)")
"$bin/paradiff" profile kernels --device cuda --gpu "$1" --budget "${2:-3600}"
exec "$bin/python" benchmarks/bench_forward.py "$1"
