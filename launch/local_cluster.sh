#!/usr/bin/env bash
# Runs a cluster on this machine: N processes with D CPU devices each, connected over loopback.
#   launch/local_cluster.sh 2 2 --config=configs/dro.py --workdir=runs/dro [--config.FIELD=VALUE ...]
# Lines of processes other than process 0 are printed with the number of their process. If one
# process fails, all are stopped. They are started again up to RESTARTS times (default 0), except
# after errors that a restart cannot fix. PORT sets the coordinator's port. DRY_RUN=1 prints the
# commands instead of running them. Needs bash 5.1.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ && ${2:-} =~ ^[1-9][0-9]*$ ]] || [ $# -lt 3 ]; then
  echo "usage: launch/local_cluster.sh PROCESSES DEVICES --config=FILE [FLAGS]" >&2
  exit 2
fi
count=$1 devices=$2
shift 2
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
python=${PYTHON:-$python}
port=${PORT:-$((20000 + $$ % 10000))}
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

command_of() { # sets the array `command` for process $1
  command=("$python" -m jaxpref.main "${flags[@]}" "--coordinator=127.0.0.1:$port"
    "--num_processes=$count" "--process_id=$1")
}

flags=("$@")
if [ -n "${DRY_RUN:-}" ]; then
  for ((i = 0; i < count; i++)); do
    command_of "$i"
    printf 'JAX_PLATFORMS=cpu XLA_FLAGS=%q ' "$XLA_FLAGS"
    printf '%q ' "${command[@]}"
    echo
  done
  exit
fi

pids=()
# Passes SIGTERM and Ctrl-C on, so that all processes save and stop.
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT
trap 'kill -KILL "${pids[@]}" 2> /dev/null || true' EXIT

run_once() { # runs all processes; returns the status of the first failure
  pids=()
  local i status=0 one killer=
  for ((i = 0; i < count; i++)); do
    command_of "$i"
    if ((i == 0)); then
      "${command[@]}" &
    else
      "${command[@]}" > >(sed -u "s/^/[$i] /") 2>&1 &
    fi
    pids+=($!)
  done
  local left=("${pids[@]}")
  while ((${#left[@]})); do
    one=0 ended=
    wait -n -p ended "${left[@]}" || one=$?
    # A signal interrupts the wait, although no process has ended.
    [ -n "${ended:-}" ] || continue
    for i in "${!left[@]}"; do
      [ "${left[i]}" = "$ended" ] && unset "left[$i]"
    done
    if ((one)) && ((!status)); then
      status=$one
      # Gives the other processes time to notice the failure and stop by themselves.
      (sleep "${GRACE:-20}" && kill -KILL "${pids[@]}") > /dev/null 2>&1 &
      killer=$!
    fi
  done
  [ -n "$killer" ] && pkill -P "$killer" 2> /dev/null
  return "$status"
}

for ((attempt = 0; ; attempt++)); do
  status=0
  run_once || status=$?
  case $status in
    0 | 2 | 3 | 130 | 143) exit "$status" ;; # finished, invalid input, diverged, asked to stop
  esac
  ((attempt < ${RESTARTS:-0})) || exit "$status"
  echo "local_cluster: a process ended with status $status; starting all processes again" >&2
done
