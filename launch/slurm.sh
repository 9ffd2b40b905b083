#!/usr/bin/env bash
# A SLURM cluster: one process for each GPU of so many nodes. JAX finds the others by SLURM's variables.
#
#   launch/slurm.sh --nodes=2 --gpus=8 --time=12:00:00 -- train --config=configs/cifar10.py --workdir=/shared/runs/a
#
# A minute before the time is over, and when it is preempted, SLURM sends SIGTERM: the state is saved, and the job goes back
# into the queue and goes on. --partition, --account and --python name yours; --dry_run prints what would be run.
set -euo pipefail

nodes=1 gpus=1 time=24:00:00 python=python dry_run='' more=()
while [[ ${1:-} == --?* ]]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --partition=* | --account=* | --job-name=* | --mem=* | --cpus-per-task=*) more+=("$1") ;;
    --python=*) python=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) echo "unknown flag $1; the head of $0 says which there are" >&2; exit 2 ;;
  esac
  [[ $1 == -- ]] || shift
done
[[ ${1:-} == -- ]] && shift
[[ $# -gt 0 ]] || { echo "what to run is missing: $0 ... -- train --config=... --workdir=..." >&2; exit 2; }

# srun passes the signal on to the processes; 143 is what they leave behind when they have saved.
work="srun --kill-on-bad-exit=1 $python -m tcq $1 --distributed ${2:+$(printf '%q ' "${@:2}")}
status=\$?
[ \$status -ne 143 ] || scontrol requeue \$SLURM_JOB_ID
exit \$status"
command=(sbatch --job-name=tcq --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --time="$time"
  --signal=TERM@60 --requeue --open-mode=append --output=tcq-%j.log "${more[@]}" --wrap="$work")
if [[ -n $dry_run ]]; then printf '%q ' "${command[@]}"; echo; else "${command[@]}"; fi
