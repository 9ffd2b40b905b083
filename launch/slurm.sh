#!/usr/bin/env bash
# Runs tcq on a SLURM cluster, one process for each GPU. JAX detects the processes by SLURM's variables.
#
#   launch/slurm.sh --nodes=2 --gpus=8 --time=12:00:00 -- train --config=configs/cifar10.py --workdir=/shared/runs/a
#
# SLURM sends SIGTERM a minute before the time limit, and on preemption. Then the state is saved, and the job is requeued
# and resumes. --partition and --account go to sbatch; --python names the interpreter; --dry_run prints the command.
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
    *) echo "unknown flag $1; the head of $0 lists the flags" >&2; exit 2 ;;
  esac
  [[ $1 == -- ]] || shift
done
[[ ${1:-} == -- ]] && shift
[[ $# -gt 0 ]] || { echo "the tcq command is missing: $0 ... -- train --config=... --workdir=..." >&2; exit 2; }

# srun passes the signal to the processes; they exit with 143 when they have saved.
work="srun --kill-on-bad-exit=1 $python -m tcq $1 --distributed ${2:+$(printf '%q ' "${@:2}")}
status=\$?
[ \$status -ne 143 ] || scontrol requeue \$SLURM_JOB_ID
exit \$status"
command=(sbatch --job-name=tcq --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --time="$time"
  --signal=TERM@60 --requeue --open-mode=append --output=tcq-%j.log "${more[@]}" --wrap="$work")
if [[ -n $dry_run ]]; then printf '%q ' "${command[@]}"; echo; else "${command[@]}"; fi
