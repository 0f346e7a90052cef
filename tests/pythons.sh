#!/usr/bin/env bash
# Installs the project with each Python from 3.11 to 3.13 that is there, in an
# environment of its own, and runs the tests with it.
#
#   bash tests/pythons.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"
cd "$ROOT"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
found=0
for version in 3.11 3.12 3.13; do
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
  "$python" -m venv "$folder/$version"
  "$folder/$version/bin/python" -m pip install --quiet \
    --disable-pip-version-check --editable "${ROOT}[test]"
  "$folder/$version/bin/python" -m pytest --numprocesses=2 --dist=worksteal "$@"
done
[ "$found" -gt 0 ] || fail "no Python from 3.11 to 3.13 was found"
