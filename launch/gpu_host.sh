#!/usr/bin/env bash
# Starts a run on all GPUs of this host; installs jaxpref with CUDA in .venv first.
#   launch/gpu_host.sh --config=configs/dro.py --workdir=runs/dro [--config.FIELD=VALUE ...]
# DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail
cd "$(dirname "$0")/.."
do_it() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
[ -d .venv ] || do_it python3 -m venv .venv
do_it .venv/bin/pip install -q -e '.[cuda]'
do_it .venv/bin/python -m jaxpref.main "$@"
