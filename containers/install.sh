#!/bin/sh
# Installs megatron-sov, which lies one folder above, into an image that has torch already; Dockerfile and megatron-sov.def run it.
# Everything gets the version of constraints.txt, but for what the image was built with: its torch belongs to its CUDA libraries,
# Transformer Engine and NCCL, and stays as it is.
set -eu
source=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
grep -v '^torch==' "$source/constraints.txt" > "$pins"
"$python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >> "$pins"
unset PIP_CONSTRAINT  # the image's own pins, older than ours
"$python" -m pip install --no-cache-dir --constraint "$pins" "$source"
