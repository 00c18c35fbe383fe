#!/usr/bin/env bash
# This machine's CPU as N devices, to try meshes without accelerators:
#   launch/local_devices.sh 8 --config=configs/dro.py --config.mesh.fsdp=2
set -euo pipefail
cd "$(dirname "$0")/.."
count=$1
shift
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$count"
exec python3 -m jaxpref.main "$@"
