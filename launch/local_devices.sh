#!/usr/bin/env bash
# Runs with this machine's CPU as N devices, to try meshes without accelerators:
#   launch/local_devices.sh 8 --config=configs/dro.py --config.mesh.fsdp=2
# DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local_devices.sh DEVICES --config=FILE [FLAGS]" >&2
  exit 2
fi
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
count=$1
shift
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$count"
command=("${PYTHON:-$python}" -m jaxpref.main "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf 'JAX_PLATFORMS=cpu XLA_FLAGS=%q ' "$XLA_FLAGS"
  printf '%q ' "${command[@]}" && echo
  exit
fi
exec "${command[@]}"
