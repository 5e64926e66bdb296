#!/usr/bin/env bash
# One node's ranks of a run on several nodes; start it on every node, with its own number.
#
#   tools/cluster/torchrun.sh NODE NODES RANKS_PER_NODE HOST:PORT run PLAN.yaml --device cuda --output-dir OUT
#
# NODE counts from 0; HOST is node 0, PORT is free there. What follows is what `paradiff` is given; in its
# place, `acceptance` and its options run tools/acceptance.py. Rank r is on node r / RANKS_PER_NODE: the
# order of the GPUs of a box. Exit code: that of the ranks.
set -euo pipefail
usage="usage: torchrun.sh NODE NODES RANKS_PER_NODE HOST:PORT COMMAND [OPTION...]"
node=${1:?$usage} nodes=${2:?$usage} ranks=${3:?$usage} meet=${4:?$usage}
shift 4
: "${1:?$usage}"
here=$(cd "$(dirname "$0")" && pwd)
case $1 in
  acceptance) shift; what=("$here/../acceptance.py") ;;
  *) what=(-m paradiff) ;;
esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$nodes" --node-rank "$node" \
  --nproc-per-node "$ranks" --master-addr "${meet%:*}" --master-port "${meet##*:}" --max-restarts 0 \
  "${what[@]}" "$@"
