#!/usr/bin/env bash
# On a machine with a GPU: the timings of a step and of the loss, then CIFAR-10 from scratch at 16, 32 and 64 bits
# without clipping, with 10 % of each anchor clipped, and with 10 % of the batch. Only the sweeps were tried, on a CPU.
#
#   benchmarks/gpu.sh runs/gpu 480 --config.data.source=folder:cifar/train --config.data.protocol=folder
#
# It stops after 480 seconds, and the running cell saves its state. The same command goes on from there; it exits with
# 124 until all is done. Further flags are those of `tcq train`. PYTHON names the interpreter.
set -euo pipefail

[[ $# -ge 2 && $2 =~ ^[0-9]+$ ]] || { echo "usage: $0 WORKDIR SECONDS [--config.key=value ...]" >&2; exit 2; }
export WORKDIR=$1 PYTHON=${PYTHON:-python}
seconds=$2
shift 2
cd "$(dirname "$0")/.."
mkdir -p "$WORKDIR"

work='
once() {
  [[ ! -e $WORKDIR/$1.txt ]] || return 0
  "$PYTHON" "${@:2}" | tee "$WORKDIR/$1.part"
  mv "$WORKDIR/$1.part" "$WORKDIR/$1.txt"
}
once step benchmarks/step.py
once loss benchmarks/loss.py time
bits="quantizer.num_codebooks=4,8,16"
for grid in "none loss.clip=0" "clipped loss.clip=0.1; loss.clip_scope=anchor,batch"; do
  "$PYTHON" -m tcq sweep --config=configs/cifar10.py --workdir="$WORKDIR/${grid%% *}" --grid="$bits; ${grid#* }" \
    --config.model.stem=conv --config.data.batch_size=512 --config.train.total_steps=20000 "$@"
done'
timeout --signal=TERM --kill-after=120 "$seconds" bash -euo pipefail -c "$work" "$0" "$@"
