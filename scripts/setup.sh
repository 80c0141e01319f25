#!/usr/bin/env bash
# Makes .venv with aidx, its extras and the development tools at the versions of constraints.txt
# (AIDX_CONSTRAINTS names another file).
# Runs again only when what it installs has changed.  Says plainly what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${AIDX_VENV:-.venv}
extras=${AIDX_EXTRAS:-train}
constraints=${AIDX_CONSTRAINTS:-constraints.txt}   # `none`: the newest of everything
pins=(); [ "$constraints" = none ] || pins=(-c "$constraints")
also=(${AIDX_ALSO:-})
stamp=$(cat pyproject.toml scripts/setup.sh "${pins[@]:1}" | cksum | tr -d ' ')-$extras-${also[*]:-}
[ -x "$venv/bin/python" ] && [ "$(cat "$venv/.aidx-stamp" 2>/dev/null)" = "$stamp" ] && exit 0

suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${AIDX_PYTHON:-} python3.13 python3.12 python3.14 python3 python; do
    command -v "$candidate" >/dev/null 2>&1 && suitable "$candidate" && { command -v "$candidate"; return; }
  done
  for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
    [ -x "$candidate" ] && suitable "$candidate" && { echo "$candidate"; return; }
  done
  return 1
}

# `uv venv` brings its own Python where none is installed.
if command -v uv >/dev/null 2>&1; then
  if python=$(find_python); then uv venv --quiet --clear --python "$python" "$venv"
  else uv venv --quiet --clear --python '>=3.12' "$venv"; fi || {
    echo "setup: uv found no Python >= 3.12 and could not fetch one; install Python 3.12 or newer." >&2; exit 1; }
  uv pip install --quiet --python "$venv/bin/python" "${pins[@]}" -e ".[$extras]" --group dev "${also[@]}"
else
  python=$(find_python) || {
    echo "setup: aidx needs Python 3.12 or newer (with venv and pip); none found on PATH or under pyenv." >&2
    echo "setup: install one, or point AIDX_PYTHON at it, and run this again." >&2; exit 1; }
  echo "setup: $("$python" --version) -> $venv (a minute or two, once)"
  "$python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pins[@]}" -e ".[$extras]" --group dev "${also[@]}" || {
    echo "setup: pip could not install the packages of pyproject.toml; its message is above." >&2; exit 1; }
fi
echo "$stamp" > "$venv/.aidx-stamp"
