#!/usr/bin/env bash
# Runs every check and test with each Python from 3.11 to 3.13 that is there, in
# a copy of the working tree with an environment of its own.
#
#   bash tests/pythons.sh [pytest arguments]
#
# VERSIONS names others, as VERSIONS='3.13'.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"
cd "$ROOT"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
found=0
failed=""
for version in ${VERSIONS:-3.11 3.12 3.13}; do
  python=""
  # pyenv's are not on the path before they are chosen, and its shims fail.
  for one in "$(command -v "python$version" || true)" \
    "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    if [ -z "$python" ] && "$one" -c '' 2>/dev/null; then
      python="$one"
    fi
  done
  if [ -z "$python" ]; then
    echo "== Python $version is not here"
    continue
  fi
  echo "== $("$python" --version)"
  found=$((found + 1))
  copy="$folder/$version/checkout"
  # A checkout, as the tests want one, with what is not committed yet.
  git clone --quiet "$ROOT" "$copy"
  git ls-files -z --cached --others --exclude-standard |
    xargs -0 cp --parents --target-directory="$copy"
  PYTHON3="$python" bash "$copy/tests/run.sh" "$@" || failed="$failed $version"
done
[ "$found" -gt 0 ] || fail "no Python of ${VERSIONS:-3.11 to 3.13} was found"
[ -z "$failed" ] || fail "it failed with Python$failed"
