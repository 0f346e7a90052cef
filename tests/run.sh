#!/usr/bin/env bash
# Installs the test extra and runs every check and test.
#
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"
ensure_venv test
cd "$ROOT"
"$PYTHON" -m ruff format --check --quiet . ||
  fail "the code is not formatted: .venv/bin/python -m ruff format ."
"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m mypy --no-error-summary
# Two tests at a time; those that start several processes need little more each.
"$PYTHON" -m pytest --numprocesses=2 --dist=worksteal "$@"
