#!/usr/bin/env bash
# A TPU slice over gcloud, host by host.
#
#   launch/tpu_vm.sh create|setup|logs|stop|delete
#   launch/tpu_vm.sh train --config FILE[:ARGUMENTS] --workdir DIR [flags]
#
# NAME and ZONE say which slice; `create` needs TYPE (v5litepod-16) and VERSION
# (v2-alpha-tpuv5-lite) too, and makes a spot slice with SPOT=1. `setup` copies
# the committed state of this repository, and mounts BUCKET, if it is set, at
# ~/bucket. `train` returns at once: see `logs`; `stop` saves first.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${NAME:?say which slice: NAME=...}" "${ZONE:?say where it is: ZONE=...}"
usage="expected create, setup, train, logs, stop or delete"
verb=${1:?$usage}
shift

tpu() {
  gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

on_all() { tpu ssh --worker=all --command="$1"; }

case $verb in
  create)
    spot=()
    [[ ${SPOT:-0} == 1 ]] && spot=(--spot)
    tpu create --accelerator-type="${TYPE:?}" --version="${VERSION:?}" \
      "${spot[@]}"
    ;;
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:mmjax.tar.gz" \
      --zone="$ZONE" --worker=all
    on_all 'set -e
      mkdir -p mmjax && tar -xzf mmjax.tar.gz -C mmjax
      python3 -m venv .venv
      .venv/bin/pip install --quiet "jax[tpu]" -e mmjax'
    if [[ -n ${BUCKET:-} ]]; then
      on_all "mkdir -p bucket; mountpoint -q bucket ||
        gcsfuse --implicit-dirs $(printf %q "$BUCKET") bucket"
    fi
    ;;
  train)
    # Detached: the job outlives the connection.
    on_all "cd mmjax && MMJAX_COMMAND=\$HOME/.venv/bin/mmjax setsid nohup \
      launch/host.sh$(printf ' %q' "$@") >>\$HOME/train.log 2>&1 </dev/null &"
    ;;
  logs) on_all 'tail -n 20 train.log' ;;
  stop) on_all 'pkill -TERM -f "[l]aunch/host.sh" || true' ;;
  delete) tpu delete --quiet ;;
  *)
    echo "$verb: $usage" >&2
    exit 1
    ;;
esac
