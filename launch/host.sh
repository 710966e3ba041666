#!/usr/bin/env bash
# What every host of a job runs: `mmjax train --distributed` with the arguments
# given, and again after an end that another attempt can mend. SIGTERM and
# SIGINT are passed on: training saves, and no other attempt is made.
#
#   MMJAX_COMMAND   the command to run              (mmjax)
#   MMJAX_ATTEMPTS  how often to run it, at most    (4)
#   MMJAX_PAUSE     seconds between two attempts    (10)
set -uo pipefail

read -ra command <<<"${MMJAX_COMMAND:-mmjax}"
attempts=${MMJAX_ATTEMPTS:-4}
pause=${MMJAX_PAUSE:-10}
asked=0
woken=0
child=0

say() { echo "host $(hostname): $*" >&2; }

pass_on() {
  asked=1 woken=1
  ((child)) && kill -TERM "$child" 2>/dev/null
}
trap pass_on TERM INT

meaning() {
  case $1 in
    0) echo "training is complete" ;;
    1) echo "failed; the message above says what is wrong" ;;
    3) echo "training is unstable; the message above says how" ;;
    5) echo "stopped, because another process of the job ended" ;;
    126 | 127) echo "cannot run ${command[0]}; is mmjax installed here?" ;;
    130 | 143) echo "stopped by a signal; the state is saved" ;;
    134) echo "gave up: process 0 ended, or not all processes came in time" ;;
    137) echo "killed; often there is not enough memory" ;;
    *) echo "crashed" ;;
  esac
}

# Whether another attempt may end better.
mendable() {
  case $1 in
    0 | 1 | 3 | 126 | 127 | 130 | 143) return 1 ;;
  esac
}

for ((attempt = 1; ; attempt++)); do
  "${command[@]}" train --distributed "$@" &
  child=$!
  ((asked)) && kill -TERM "$child" 2>/dev/null
  woken=1
  while ((woken)); do  # A signal ends `wait`, not the child.
    woken=0
    wait "$child"
    code=$?
  done
  say "attempt $attempt of $attempts: $(meaning "$code") (exit code $code)"
  if ((asked)) || ! mendable "$code" || ((attempt >= attempts)); then
    exit "$code"
  fi
  sleep "$pause" &
  wait $!
  ((asked)) && exit 143
done
