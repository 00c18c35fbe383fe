#!/usr/bin/env bash
# Manages a run on a Cloud TPU slice with any number of hosts, from create to delete:
#   export NAME=dro ZONE=us-central2-b TYPE=v4-32 BUCKET=my-bucket
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh install
#   launch/tpu_pod.sh run --config=configs/dro.py:sd15 --workdir=/bucket/dro
#   launch/tpu_pod.sh logs        # follows the log of worker 0; logs 3: of worker 3
#   launch/tpu_pod.sh stop        # saves and stops; the same run command resumes
#   launch/tpu_pod.sh delete
# All hosts must see the workdir: if BUCKET is set, `install` mounts it at /bucket with Cloud
# Storage FUSE. `install` copies the commit that is checked out. VERSION sets the hosts' image, and
# SPOT=1 requests a slice that Google may preempt. DRY_RUN=1 prints the commands instead of
# running them.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NAME:?set it to the name of the slice}" "${ZONE:?set it to the zone of the slice}"
do_it() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi; }
tpu() { do_it gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
on() { tpu ssh "$NAME" --worker="$1" --command="$2"; }

case "${1:-}" in
  create)
    spot=()
    [ -n "${SPOT:-}" ] && spot=(--spot)
    tpu create "$NAME" --accelerator-type="${TYPE:?set it to an accelerator type, such as v5litepod-16}" \
      --version="${VERSION:-tpu-ubuntu2204-base}" "${spot[@]}"
    ;;
  install)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    do_it git archive --format=tar.gz --output="$archive" HEAD
    tpu scp "$archive" "$NAME:jaxpref.tar.gz" --worker=all
    on all "mkdir -p jaxpref && tar -xzf jaxpref.tar.gz -C jaxpref && cd jaxpref && \
sudo apt-get -qq install -y python3.11-venv && python3.11 -m venv .venv && \
.venv/bin/pip install -q -e '.[tpu,gcs]'"
    if [ -n "${BUCKET:-}" ]; then
      # Orbax commits a checkpoint by renaming its directory, which gcsfuse limits by default.
      on all "sudo mkdir -p /bucket && sudo chmod 777 /bucket && (mountpoint -q /bucket || \
gcsfuse --implicit-dirs --rename-dir-limit=1000000 $BUCKET /bucket)"
    fi
    ;;
  run)
    shift
    if [ $# -eq 0 ]; then
      echo "usage: NAME=... ZONE=... launch/tpu_pod.sh run --config=FILE --workdir=DIRECTORY" >&2
      exit 2
    fi
    flags=$(printf '%q ' "$@")
    # Runs on every host and restarts after failures, except if the run has finished, its input
    # is invalid, it has diverged, or it was asked to stop.
    on all "cd jaxpref && if pgrep -f '[b]ash run.sh' > /dev/null; then \
echo 'a run is already active on this host: stop it first' >&2; exit 1; fi && cat > run.sh << 'END'
for attempt in \$(seq 20); do
  .venv/bin/python -m jaxpref.main --coordinator=auto $flags
  status=\$?
  case \$status in 0 | 2 | 3 | 130 | 143) exit \$status ;; esac
  echo the run ended with status \$status, starting it again
done
END
setsid nohup bash run.sh >> run.log 2>&1 < /dev/null &"
    ;;
  logs) on "${2:-0}" "tail -n 50 -f jaxpref/run.log" ;;
  stop)
    # Stops the loop first: a process fails when its peers end, and the loop would restart it.
    on all "pkill -f '[b]ash run.sh'; pkill -TERM -f '[j]axpref.main' || true"
    ;;
  delete) tpu delete "$NAME" --quiet ;;
  *)
    echo "usage: NAME=... ZONE=... launch/tpu_pod.sh create|install|run|logs|stop|delete" >&2
    exit 2
    ;;
esac
