#!/usr/bin/env bash
# Installs the test extra and runs every check and test.
#
#   bash tests/run.sh [--fast] [pytest arguments]
#
# --fast leaves out the tests that start processes, and the type check.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"
select=()
if [ "${1:-}" = --fast ]; then
  select=(-m 'not slow')
  shift
fi
ensure_venv test
cd "$ROOT"
"$PYTHON" -m ruff format --check --quiet . ||
  fail "the code is not formatted: .venv/bin/python -m ruff format ."
"$PYTHON" -m ruff check --quiet .
[ "${#select[@]}" -gt 0 ] || "$PYTHON" -m mypy --no-error-summary
# Two tests at a time; those that start several processes need little more each.
"$PYTHON" -m pytest --numprocesses=2 --dist=worksteal \
  ${select[@]+"${select[@]}"} "$@"
