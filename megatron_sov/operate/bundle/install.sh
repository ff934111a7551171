#!/bin/sh
# Installs what lies beside this script into a new virtual environment; needs no network.
#
#   sh install.sh ENVIRONMENT              PYTHON=/path/to/python3.12 chooses the interpreter
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
if [ $# -ne 1 ]; then echo "usage: sh install.sh ENVIRONMENT   (a folder that does not exist yet)" >&2; exit 2; fi
case $1 in
  ''|-*) echo "error: '$1' names no folder for the environment; write ./NAME" >&2; exit 2;;  # '' would mean /bin
esac
if [ -e "$1" ] || [ -L "$1" ]; then echo "error: $1 exists already; name a folder that does not exist yet" >&2; exit 2; fi
python=${PYTHON:-}
for candidate in "python$(cat "$here/python-version")" python3; do
  if [ -z "$python" ] && command -v "$candidate" >/dev/null; then python=$candidate; fi
done
if [ -z "$python" ]; then echo "error: no Python on PATH; name one with PYTHON=/path/to/python" >&2; exit 2; fi
if ! command -v "$python" >/dev/null; then
  echo "error: $python is no program; name a Python with PYTHON=/path/to/python" >&2; exit 2
fi

"$python" -I "$here/check.py"
environment=$1
trap 'rm -rf "$environment"' EXIT  # an environment that is half made would only be in the way of the next attempt
trap 'exit 130' HUP INT TERM
"$python" -m venv "$1"
"$1/bin/python" -m pip --isolated install --quiet --disable-pip-version-check --no-index --find-links "$here/wheels" \
  --constraint "$here/constraints.txt" --requirement "$here/requirements.txt"
trap - EXIT
echo "$1: installed; $1/bin/megatron-sov doctor says what this machine has"
