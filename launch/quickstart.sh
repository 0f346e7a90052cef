#!/usr/bin/env bash
# Trains a small ResNet on handwritten digits with SimCLR's loss, without and
# with CLOP (10 % of the labels), evaluates both, prints a table and draws a
# figure. Needs only python3 (3.11 or newer).
#
#   bash launch/quickstart.sh [--config.FIELD=VALUE ...]
#
# RUNS is the folder of the two workdirs (default: runs/quickstart).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
case "${1:-}" in
-h | --help)
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit
  ;;
esac

ensure_venv report,track
RUNS="${RUNS:-$ROOT/runs/quickstart}"
# At this learning rate, without batch normalization in the projection head, the
# embeddings of SimCLR's loss alone collapse.
FLAGS=(
  --config="$ROOT/configs/digits.py"
  --config.optimizer.learning_rate=6
  --config.model.head_bn=False
)

run() {
  local name="$1"
  shift
  echo
  echo "== $name"
  "$PYTHON" -m clop_jax.train "${FLAGS[@]}" --workdir="$RUNS/$name" "$@"
}

run simclr --config.loss.clop_weight=0 "$@"
run simclr+clop "$@"
echo
echo "== both, restored from their checkpoints"
"$PYTHON" -m clop_jax.evaluate --workdir="$RUNS/simclr" \
  --workdir="$RUNS/simclr+clop" --figure="$RUNS/comparison.png"
