# Creates `.venv` in the checkout and installs clop_jax there if needed. Sets
# ROOT (the checkout) and PYTHON (the interpreter of the environment).
#
#   source launch/venv.sh   then   ensure_venv [extra,extra]
#
# PYTHON3 is the Python that creates the environment (default: python3).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

fail() {
  echo "error: $*" >&2
  exit 1
}

# Checks that COMMAND is a module of clop_jax that `python -m` can run.
check_command() {
  COMMAND="${COMMAND:-train}"
  local path="$ROOT/clop_jax/${COMMAND//.//}"
  [[ "$COMMAND" =~ ^[a-z_.]+$ && (-f "$path.py" || -f "$path/__main__.py") ]] ||
    fail "COMMAND must be a module of clop_jax, got '$COMMAND'; for example" \
      "COMMAND=evaluate"
}

ensure_venv() {
  local extra="${1:-}" python3="${PYTHON3:-python3}" target="$ROOT" stamp wanted
  if [ ! -x "$PYTHON" ]; then
    command -v "$python3" >/dev/null ||
      fail "$python3 was not found; install Python 3.11 or newer"
    "$python3" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      fail "Python 3.11 or newer is needed, $python3 is" \
        "$("$python3" -c 'import platform; print(platform.python_version())');" \
        "set PYTHON3 to a newer one"
    "$python3" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$python3 has no venv module; install it (on Debian: apt-get" \
        "install python3-venv)"
    echo "creating $ROOT/.venv"
    "$python3" -m venv "$ROOT/.venv" ||
      fail "$python3 -m venv failed; remove $ROOT/.venv and try again"
  fi
  # Installs again only if the dependencies or the folder changed.
  wanted="$ROOT $(cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" | cksum)"
  stamp="$ROOT/.venv/installed-${extra:-base}"
  local stamps=("$stamp")
  case "$extra" in
  *cuda* | *tpu*) ;;
  '') stamps=("$ROOT"/.venv/installed-*) ;; # any installation will do
  *) stamps+=("$ROOT/.venv/installed-test") ;; # includes other extras
  esac
  if ! cat "${stamps[@]}" 2>/dev/null | grep -qxF -- "$wanted"; then
    [ -z "$extra" ] || target="${ROOT}[$extra]"
    echo "installing clop_jax${extra:+ with the extra $extra}"
    # Most modules are never imported, so they need no bytecode.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile \
      --editable "$target" || fail "pip could not install $target"
    echo "$wanted" >"$stamp"
  fi
}
