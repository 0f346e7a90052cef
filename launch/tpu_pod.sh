#!/usr/bin/env bash
# Runs one command on all workers of a TPU VM. Copies this checkout to each
# worker, installs it with the extra 'tpu', and starts one process per worker.
#
#   TPU_NAME=my-tpu ZONE=us-central2-b PROJECT=my-project \
#     bash launch/tpu_pod.sh --config=configs/cifar10.py --workdir=/shared/run
#
# Any flags of the command may follow. Paths are paths on the workers, relative
# to the checkout there. All workers must share the workdir. Variables:
#   TPU_NAME, ZONE, PROJECT  the TPU VM, as in gcloud (required)
#   COMMAND                  module of clop_jax to run (default: train)
#   PYTHON3                  Python 3.11 or newer of the workers (python3)
#
# The workers find each other through the metadata of the TPU. The exit status
# is that of gcloud.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
case "${1:-}" in
-h | --help)
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit
  ;;
esac

for name in TPU_NAME ZONE PROJECT; do
  [[ "${!name:-}" =~ ^[A-Za-z0-9][A-Za-z0-9.:_-]*$ ]] ||
    fail "$name must be that of a TPU VM, got '${!name:-}'; list them with:" \
      "gcloud compute tpus tpu-vm list --zone=-"
done
check_command
command -v gcloud >/dev/null ||
  fail "gcloud was not found; install the Google Cloud CLI and log in"

# One file, so that no worker has an incomplete checkout.
archive="$(mktemp -d)/clop_jax.tar.gz"
trap 'rm -rf "$(dirname "$archive")"' EXIT
tar -czf "$archive" -C "$ROOT" --exclude=__pycache__ \
  LICENSE README.md pyproject.toml setup.cfg clop_jax configs launch

where=(--worker=all --zone="$ZONE" --project="$PROJECT")
gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:clop_jax.tar.gz" \
  "${where[@]}" || fail "gcloud could not copy the checkout to $TPU_NAME"

# The script of a worker. It removes old code, but not the environment.
# shellcheck disable=SC2016  # expanded on the worker
worker='
set -euo pipefail
mkdir -p clop_jax_checkout
cd clop_jax_checkout
rm -rf clop_jax configs launch
tar -xzf ../clop_jax.tar.gz
source launch/venv.sh
ensure_venv tpu,track
module="$1"
shift
exec "$PYTHON" -m "$module" "$@"
'
# Quoted, because the shell of the worker parses this line again.
printf -v line '%q ' env "PYTHON3=${PYTHON3:-python3}" \
  bash -c "$worker" tpu_pod "clop_jax.$COMMAND" "$@"
gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --command="$line"
