#!/usr/bin/env bash
# Runs tcq on a Kubernetes cluster with JobSet, one process in each pod.
#
#   docker build -t registry/tcq -f launch/Dockerfile . && docker push registry/tcq
#   launch/kubernetes.sh --name=tcq --image=registry/tcq --pods=4 --gpus=8 start train --config=configs/cifar10.py --workdir=/shared/a
#   launch/kubernetes.sh --name=tcq logs       # follows the first pod
#   launch/kubernetes.sh --name=tcq delete
#
# --claim=NAME mounts that volume claim at /shared; all pods must see it. A preempted pod saves its state, and the
# set restarts and resumes. --dry_run prints the commands and the manifest.
set -euo pipefail

name=tcq image='' pods=1 gpus=1 claim='' dry_run=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --pods=*) pods=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    *) echo "unknown flag $1; the head of $0 lists the flags" >&2; exit 2 ;;
  esac
  shift
done
action=${1:-}
shift || true

manifest() {
  local words=''
  for word in "$@"; do
    word=${word//\\/\\\\}
    words+=", \"${word//\"/\\\"}\""
  done
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy:
    maxRestarts: 100
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          parallelism: $pods
          completions: $pods
          completionMode: Indexed
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 40
              containers:
                - name: tcq
                  image: $image
                  env:
                    - name: INDEX
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
                  command: ["python", "-m", "tcq"$words, "--coordinator=$name-workers-0-0.$name:8476", "--processes=$pods", "--process_id=\$(INDEX)"]
                  resources:
                    limits:
                      nvidia.com/gpu: $gpus
$([[ -z $claim ]] || printf '%s\n' "                  volumeMounts:" "                    - {name: shared, mountPath: /shared}" \
    "              volumes:" "                - {name: shared, persistentVolumeClaim: {claimName: $claim}}")
YAML
}
run() {
  if [[ -n $dry_run ]]; then printf '%q ' "$@"; echo; [[ -t 0 ]] || cat; else "$@"; fi
}

case $action in
  start)
    [[ -n $image ]] || { echo "start needs --image=..." >&2; exit 2; }
    [[ $# -gt 0 ]] || { echo "the tcq command is missing: $0 ... start train --config=... --workdir=..." >&2; exit 2; }
    manifest "$@" | run kubectl apply -f -
    ;;
  status) run kubectl get jobset,pods -l "jobset.sigs.k8s.io/jobset-name=$name" </dev/null ;;
  logs) run kubectl logs -f "job/$name-workers-0" -c tcq </dev/null ;;
  delete) run kubectl delete jobset "$name" </dev/null ;;
  *) echo "action '$action' is unknown: use start, status, logs or delete" >&2; exit 2 ;;
esac
