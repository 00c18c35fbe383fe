#!/usr/bin/env bash
# One host with GPUs: installs jaxpref with CUDA in .venv and starts a run on all devices.
#   launch/gpu_host.sh --config=configs/dro.py --workdir=runs/dro [--config.FIELD=VALUE ...]
# With DRY_RUN=1 it prints what it would do.
set -euo pipefail
cd "$(dirname "$0")/.."
do_it() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
[ -d .venv ] || do_it python3 -m venv .venv
do_it .venv/bin/pip install -q -e '.[cuda]'
do_it .venv/bin/python -m jaxpref.main "$@"
