#!/usr/bin/env bash
# Measures and tests clop_jax on one GPU, in less than ten minutes and without
# network access. Needs JAX for the GPU, PyTorch, pytest-xdist, and the libraries
# of clop_jax.train and clop_jax.evaluate.
#
#   bash docs/benchmarks/gpu.sh [--small] [--parts=NAME,...] [--seconds=N] \
#     OUT [DATA.npz]
#
# The parts, in the order in which they run unless --parts names others:
#
#   steps18   two ceilings (matrix product, copy), and training steps of
#             ResNet-18 at 32 px in turns with PyTorch's expert form
#   training  ResNet-18 on DATA.npz (glyphs100) without and with CLOP, then a
#             linear probe and kNN of both; left out without DATA.npz
#   losses    NT-Xent at batch 4,096 and 65,536 in turns with PyTorch
#   steps50   as steps18, with ResNet-50
#   tests     the tests of losses, prototypes, networks and the training step on
#             the GPU; those that need eight devices are skipped
#
# Each part has processes and a time limit of its own. A part that fails or takes
# too long is reported, and the next one starts; none starts after --seconds
# (default: 570). OUT gets at most seven files, each as soon as there is something
# to write, so the script can be stopped at any time:
#
#   log.txt                  all output
#   summary.md               all results so far; printed at the end
#   gpu.json, gpu.md         the benchmarks, see docs/benchmarks/run.py
#   without_clop.jsonl, with_clop.jsonl   metrics of the two trainings
#   evaluation.json          both evaluations
#
# --small tries the script on a CPU at the smallest sizes. PYTHON names the
# interpreter (default: python3), EPOCHS the length of each training (default:
# 10), COMMIT the commit if the files are a copy without their history.
set -uo pipefail

usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

SMALL='' PARTS=steps18,training,losses,steps50,tests TOTAL_SECONDS=570
while [ $# -gt 0 ]; do
  case "$1" in
  --small) SMALL=1 ;;
  --parts=*) PARTS="${1#*=}" ;;
  --seconds=*) TOTAL_SECONDS="${1#*=}" ;;
  -h | --help) usage && exit ;;
  -*) echo "error: unknown flag $1; see --help" >&2 && exit 2 ;;
  *) break ;;
  esac
  shift
done
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  usage >&2
  exit 2
fi
mkdir -p "$1" || exit 2
OUT="$(realpath "$1")"
DATA="${2:+$(realpath "$2")}"
PYTHON="${PYTHON:-python3}"
EPOCHS="${EPOCHS:-10}"
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT

# Seconds of each part. A training that is stopped saves a checkpoint.
declare -A LIMITS=(
  [steps18]=130 [training]=80 [evaluation]=120 [losses]=90 [steps50]=180
  [tests]=100
)
BENCHMARK=("$PYTHON" -m docs.benchmarks.run --suite=gpu --out="$OUT" --turns=5)
STEPS18='ResNet-18 at 32 px, batch 512$'
STEPS50='ResNet-50 at 32 px, batch 256$'
LOSSES='batch (4,096|65,536),'
TRAIN=(
  --config=configs/npz.py --config.data.data_dir="$DATA"
  --config.data.num_workers=0 # the evaluation reads an array in memory
  --config.watch.images_every_epochs=0
)
TESTS=(
  --numprocesses=12 --dist=worksteal
  tests/method/test_{loss,linalg,prototypes,collapse}.py
  tests/training/test_{optimizer,gpu_updates,train_step}.py
  tests/models/test_models.py tests/evaluation/test_probe.py
)
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
# Programs that one process has compiled serve the next one.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$WORK/jax_cache}"
export TORCHINDUCTOR_CACHE_DIR="$WORK/torch_cache"

if [ -n "$SMALL" ]; then
  export JAX_PLATFORMS=cpu
  BENCHMARK+=(--small)
  STEPS18='' STEPS50='' LOSSES='' EPOCHS=1 TOTAL_SECONDS=3600
  for part in "${!LIMITS[@]}"; do LIMITS[$part]=600; done
  TRAIN+=(
    --config.model.name=resnet8 --config.model.width_multiplier=0.25
    --config.augment.size=8 --config.train.batch_size=16
    --config.train.log_every_steps=1 --config.train.steps_per_dispatch=1
    '--config.eval.knn_neighbours=(1,)' '--config.eval.probe_l2=(0.1,)'
    --config.eval.probe_iterations=2
  )
  TESTS=(tests/method/test_prototypes.py -k 'polar_factor or pmap')
else
  # Fails if the GPU's library is missing, instead of using the CPU.
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
fi
# Only one program to compile: the epochs are whole dispatches.
TRAIN+=(
  --config.train.num_epochs="$EPOCHS"
  --config.train.checkpoint_every_epochs="$EPOCHS"
)

# limited NAME SIGNAL COMMAND...: runs a command within its limit and the total.
limited() {
  local seconds="${LIMITS[$1]}" signal="$2" left=$((TOTAL_SECONDS - SECONDS))
  shift 2
  ((seconds < left)) || seconds=$left
  if ((seconds <= 0)); then
    echo "not started: the $TOTAL_SECONDS seconds are over"
    return 124
  fi
  timeout --foreground --kill-after=15 --signal="$signal" "$seconds" "$@"
}

training() {
  local name weight status=0 separator='{' runs="$WORK/runs"
  if [ -z "$DATA" ]; then
    echo 'left out: it needs DATA.npz'
    return 1
  fi
  for name in without_clop with_clop; do
    echo "== $name"
    weight=1
    [ "$name" = with_clop ] || weight=0
    limited training TERM "$PYTHON" -m clop_jax.train "${TRAIN[@]}" \
      --workdir="$runs/$name" --config.loss.clop_weight="$weight" 2>&1 |
      tee "$WORK/$name.txt" || status=$?
    cp "$runs/$name/metrics.jsonl" "$OUT/$name.jsonl" 2>/dev/null
  done
  echo '== both, restored from their checkpoints'
  # The folder: a run without a checkpoint is left out.
  limited evaluation TERM "$PYTHON" -m clop_jax.evaluate --workdir="$runs" \
    --table="$WORK/evaluation.md" || status=${status/#0/$?}
  for name in without_clop with_clop; do
    [ -f "$runs/$name/eval.json" ] || continue
    printf '%s\n"%s": ' "$separator" "$name"
    cat "$runs/$name/eval.json"
    separator=,
  done >"$WORK/evaluation.json"
  [ ! -s "$WORK/evaluation.json" ] ||
    { cat "$WORK/evaluation.json" && echo '}'; } >"$OUT/evaluation.json"
  return "$status"
}

part() {
  local few=(--contestants='ours|expert')
  case "$1" in
  steps18)
    limited "$1" TERM "${BENCHMARK[@]}" --only=ceilings,steps \
      --case="$STEPS18" "${few[@]}"
    ;;
  steps50)
    limited "$1" TERM "${BENCHMARK[@]}" --only=steps --case="$STEPS50" \
      "${few[@]}"
    ;;
  losses)
    # Optax's form has an array of this size for each row.
    limited "$1" TERM "${BENCHMARK[@]}" --only=losses --case="$LOSSES" \
      --contestants='as training chooses|expert'
    ;;
  training) training ;;
  tests)
    # Without the options of setup.cfg: other libraries warn here. XLA need not
    # search the fastest algorithm for programs that run once.
    CLOP_TEST_PLATFORM="$JAX_PLATFORMS" \
      XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0" \
      limited "$1" INT "$PYTHON" -m pytest --override-ini=addopts= \
      -p no:cacheprovider -W default --basetemp="$WORK/pytest" --verbose \
      --tb=short -rf "${TESTS[@]}" 2>&1 | tee "$WORK/tests.txt"
    ;;
  *)
    echo '--parts must be of steps18, training, losses, steps50, tests'
    return 1
    ;;
  esac
}

# The parts so far as the rows of a table, and all results.
ROWS=''
summarize() {
  {
    echo '# clop_jax on a GPU'
    printf '\n| part | result | seconds |\n| --- | --- | --- |\n%s' "$ROWS"
    if [ -f "$WORK/without_clop.txt" ]; then
      printf '\n## training, %s epochs\n\n' "$EPOCHS"
      for name in without_clop with_clop; do
        echo "- $name: $(grep '^step ' "$WORK/$name.txt" | tail -n 1)"
      done
      echo
      cat "$WORK/evaluation.md"
    fi
    if [ -f "$WORK/tests.txt" ]; then
      printf '\n## tests\n\n```\n'
      grep -E '^(FAILED|ERROR) |^=+ .* in .* =+$' "$WORK/tests.txt" |
        cut -c 1-200 | tail -n 25
      echo '```'
    fi
    [ ! -f "$OUT/gpu.md" ] || { echo && sed 's/^#/##/' "$OUT/gpu.md"; }
  } >"$WORK/summary.md" 2>/dev/null
  cp "$WORK/summary.md" "$OUT/summary.md"
}

main() {
  local name began status result failures=0
  for name in ${PARTS//,/ }; do
    printf '\n=== %s (after %s s)\n' "$name" "$SECONDS"
    began=$SECONDS
    part "$name"
    status=$?
    case "$status" in
    0) result=finished ;;
    124 | 137) result='stopped: out of time' ;;
    *) result="failed (exit status $status)" ;;
    esac
    ((status == 0)) || failures=$((failures + 1))
    ROWS+="| $name | $result | $((SECONDS - began)) |"$'\n'
    echo "=== $name: $result"
    summarize
  done
  echo
  cat "$OUT/summary.md"
  ((failures == 0))
}

main 2>&1 | tee "$OUT/log.txt"
