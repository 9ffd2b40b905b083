#!/usr/bin/env bash
# Runs tcq on TPU slices of a GKE cluster, through xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   launch/gke.sh --cluster=mine --project=p --zone=us-west4-a --name=tcq --type=v5litepod-16 --image=registry/tcq \
#       start train --config=configs/cifar10.py --workdir=gs://bucket/runs/a
#   launch/gke.sh --cluster=mine --project=p --zone=us-west4-a status
#   launch/gke.sh --cluster=mine --project=p --zone=us-west4-a --name=tcq delete
#
# Build the image with launch/Dockerfile and --build-arg=PLATFORM=tpu. --slices=2 takes two slices.
# --dry_run prints the commands.
set -euo pipefail

cluster='' project='' zone='' name=tcq type='' image='' slices=1 dry_run=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    *) echo "unknown flag $1; the head of $0 lists the flags" >&2; exit 2 ;;
  esac
  shift
done
action=${1:-}
shift || true
need() { [[ -n ${!1} ]] || { echo "$action needs --$1=..." >&2; exit 2; }; }
for flag in cluster project zone; do need "$flag"; done
run() {
  if [[ -n $dry_run ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
where=(--cluster="$cluster" --project="$project" --zone="$zone")

case $action in
  start)
    need type
    need image
    [[ $# -gt 0 ]] || { echo "the tcq command is missing: $0 ... start train --config=... --workdir=..." >&2; exit 2; }
    run xpk workload create "${where[@]}" --workload="$name" --tpu-type="$type" --num-slices="$slices" --docker-image="$image" \
      --max-restarts=100 --termination-grace-period-seconds=40 \
      --command="python -m tcq $1 --distributed ${2:+$(printf '%q ' "${@:2}")}"
    ;;
  status) run xpk workload list "${where[@]}" ;;
  delete) run xpk workload delete "${where[@]}" --workload="$name" ;;
  *) echo "action '$action' is unknown: use start, status or delete" >&2; exit 2 ;;
esac
