#!/usr/bin/env bash
# Creates a TPU pod slice, installs tcq on all of its hosts, starts and stops runs there, and deletes it.
#
#   launch/tpu.sh --name=tcq --zone=us-west4-a --type=v5litepod-16 create      # or: queue, and then status until it is ACTIVE
#   launch/tpu.sh --name=tcq --zone=us-west4-a install                         # the last commit of this checkout, on all hosts
#   launch/tpu.sh --name=tcq --zone=us-west4-a doctor --config=configs/cifar10.py --workdir=gs://bucket/runs/a
#   launch/tpu.sh --name=tcq --zone=us-west4-a train --config=configs/cifar10.py --workdir=gs://bucket/runs/a
#   launch/tpu.sh --name=tcq --zone=us-west4-a logs                            # follows the first host
#   launch/tpu.sh --name=tcq --zone=us-west4-a stop                            # SIGTERM: the state is saved
#   launch/tpu.sh --name=tcq --zone=us-west4-a delete
#
# --dry_run prints the commands. --spot asks for capacity that may be preempted; then the same train command resumes.
set -euo pipefail

name='' zone='' type='' version='tpu-ubuntu2204-base' spot=() dry_run=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --dry_run) dry_run=yes ;;
    *) echo "unknown flag $1; the head of $0 lists the flags" >&2; exit 2 ;;
  esac
  shift
done
action=${1:-}
shift || true
need() { [[ -n ${!1} ]] || { echo "$action needs --$1=..." >&2; exit 2; }; }
need name
need zone

run() {
  if [[ -n $dry_run ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
vm() { run gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"; }
everywhere() { vm ssh --worker=all --command="$1"; }

case $action in
  create)
    need type
    vm create --accelerator-type="$type" --version="$version" "${spot[@]}"
    ;;
  queue)
    need type
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
      --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
    ;;
  status) run gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' ;;
  install)
    archive=$(mktemp -d)/tcq.tar.gz
    root=$(cd "$(dirname "$0")/.." && pwd)
    run git -C "$root" archive --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name:tcq.tar.gz" --zone="$zone" --worker=all
    everywhere "set -e; rm -rf tcq && mkdir tcq && tar xzf tcq.tar.gz -C tcq
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --clear --python 3.12 venv
~/.local/bin/uv pip install --quiet --python venv -r tcq/requirements.txt -e './tcq[buckets]'
~/.local/bin/uv pip install --quiet --python venv \"jax[tpu]==\$(venv/bin/python -c 'import jax; print(jax.__version__)')\""
    ;;
  doctor) everywhere "cd tcq && ../venv/bin/tcq doctor --distributed ${*:+$(printf '%q ' "$@")}" ;;
  train | evaluate | embed | index)
    everywhere "cd tcq && { nohup ../venv/bin/tcq $action --distributed ${*:+$(printf '%q ' "$@")}> ../tcq.log 2>&1 & echo \$! > ../tcq.pid; }"
    ;;
  logs) vm ssh --worker=0 --command='tail -n 100 -F tcq.log' ;;
  stop) everywhere "kill -TERM \$(cat tcq.pid)" ;;
  delete) vm delete --quiet ;;
  delete_queued) run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet ;;
  *) echo "action '$action' is unknown: use create, queue, status, install, doctor, train, evaluate, embed, index, logs, stop, delete or delete_queued" >&2; exit 2 ;;
esac
