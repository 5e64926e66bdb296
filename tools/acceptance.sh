#!/usr/bin/env bash
# What to run on a cluster of your own: every strategy on real processes, its result against one process,
# the fidelity of its trace, and a summary to send back.
#
#   tools/acceptance.sh RANKS [cpu|cuda] [OUTPUT_DIR]          one machine
#   torchrun ... tools/acceptance.py --device cuda --output-dir OUT   several machines, Slurm, Ray
#
# RANKS is 2, 4 or 8. Exit code 0: all passed. OUTPUT_DIR/acceptance.json is what to send back.
set -euo pipefail
ranks=${1:?usage: tools/acceptance.sh RANKS [cpu|cuda] [OUTPUT_DIR]}
device=${2:-cuda}
output=${3:-acceptance-$(hostname)-$ranks}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
  "$here/acceptance.py" --device "$device" --output-dir "$output"
