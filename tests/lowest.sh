#!/usr/bin/env bash
# Runs the tests with the lowest version of each library that setup.cfg allows,
# in a copy of the working tree with an environment of its own.
#
#   bash tests/lowest.sh [pytest arguments]
#
# PYTHON3 names another python3 to make the environment with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"
cd "$ROOT"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
copy="$folder/checkout"
# A checkout, as the tests want one, with what is not committed yet.
git clone --quiet "$ROOT" "$copy"
git ls-files -z --cached --others --exclude-standard |
  xargs -0 cp --parents --target-directory="$copy"
"${PYTHON3:-python3}" -m venv "$copy/.venv"
python="$copy/.venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check uv
"$python" -m uv pip install --quiet --python "$python" \
  --resolution lowest-direct --editable "${copy}[test]"
cd "$copy"
# Old libraries warn of what new ones, beside them, are about to remove.
"$python" -m pytest -W default --numprocesses=2 --dist=worksteal "$@"
