#!/usr/bin/env bash
# A workload on a GKE cluster that XPK made; it writes the JobSet by itself.
#
#   launch/xpk.sh --config FILE[:ARGUMENTS] --workdir DIR [flags]
#
# CLUSTER, PROJECT and ZONE say where, TYPE (v5litepod-16) and SLICES on what,
# IMAGE holds mmjax, and NAME names the workload.
set -euo pipefail

xpk workload create \
  --cluster="${CLUSTER:?}" --project="${PROJECT:?}" --zone="${ZONE:?}" \
  --tpu-type="${TYPE:?}" --num-slices="${SLICES:-1}" \
  --workload="${NAME:?}" --docker-image="${IMAGE:?}" --max-restarts=10 \
  --command="launch/host.sh$(printf ' %q' "$@")"
