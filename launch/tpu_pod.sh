#!/usr/bin/env bash
# A Cloud TPU slice of any number of hosts, from create to delete:
#   export NAME=dro ZONE=us-central2-b TYPE=v4-32 BUCKET=my-bucket
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh install
#   launch/tpu_pod.sh run --config=configs/dro.py:sd15 --workdir=/bucket/dro
#   launch/tpu_pod.sh logs        # process 0's, as it comes; logs 3: worker 3's
#   launch/tpu_pod.sh stop        # saves and stops; run goes on with the same command
#   launch/tpu_pod.sh delete
# The workdir must be one that all hosts see: `install` mounts BUCKET at /bucket, where there
# is one, by Cloud Storage FUSE. VERSION is the hosts' image, SPOT=1 asks for a slice that may
# be taken back. `install` copies the commit that is checked out. With DRY_RUN=1 it prints what it
# would do.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NAME:?the name of the slice}" "${ZONE:?its zone}"
do_it() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi; }
tpu() { do_it gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
on() { tpu ssh "$NAME" --worker="$1" --command="$2"; }

case "${1:-}" in
  create)
    spot=()
    [ -n "${SPOT:-}" ] && spot=(--spot)
    tpu create "$NAME" --accelerator-type="${TYPE:?such as v5litepod-16}" \
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
      # Orbax makes a checkpoint whole by renaming its directory.
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
    # On every host, and again where a process or a host of the run has failed: not where it is
    # done, its input wrong, diverged or asked to stop.
    on all "cd jaxpref && if pgrep -f '[b]ash run.sh' > /dev/null; then \
echo 'a run is under way here: stop it first' >&2; exit 1; fi && cat > run.sh << 'END'
for attempt in \$(seq 20); do
  .venv/bin/python -m jaxpref.main --coordinator=auto $flags
  status=\$?
  case \$status in 0 | 2 | 3 | 130 | 143) exit \$status ;; esac
  echo ended with status \$status, starting again
done
END
setsid nohup bash run.sh >> run.log 2>&1 < /dev/null &"
    ;;
  logs) on "${2:-0}" "tail -n 50 -f jaxpref/run.log" ;;
  stop)
    # The loop first, which would start again a process that takes its peers' end for a failure.
    on all "pkill -f '[b]ash run.sh'; pkill -TERM -f '[j]axpref.main' || true"
    ;;
  delete) tpu delete "$NAME" --quiet ;;
  *)
    echo "usage: NAME=... ZONE=... launch/tpu_pod.sh create|install|run|logs|stop|delete" >&2
    exit 2
    ;;
esac
