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
  python="$(command -v "python$version" || true)"
  # pyenv's are not on the path before they are chosen.
  for one in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    [ -n "$python" ] || [ ! -x "$one" ] || python="$one"
  done
  if [ -z "$python" ] || ! "$python" -c '' 2>/dev/null; then
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
