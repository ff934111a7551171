#!/bin/sh
# Install megatron-sov from the parent folder into an image with torch; Dockerfile and megatron-sov.def run this script.
# Packages get the versions in constraints.txt, except torch: the image's torch was built for its CUDA libraries, Transformer Engine
# and NCCL, and must not be replaced.
set -eu
source=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
grep -v '^torch==' "$source/constraints.txt" > "$pins"
"$python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >> "$pins"
unset PIP_CONSTRAINT  # the image's pins are older than constraints.txt
"$python" -m pip install --no-cache-dir --constraint "$pins" "$source"
# Install DeepEP if DEEPEP_ARCH is set, to one compute capability (9.0 or 10.0). This commit of DeepEP's branch hybrid-ep has the
# functions that megatron-core imports for parallel.expert_dispatcher=deepep and hybridep; the main branch has removed them. Several
# NVLink domains need HYBRID_EP_MULTINODE=1, DOCA and rdma-core; see DeepEP's README.
if [ -n "${DEEPEP_ARCH:-}" ]; then
  folder=$(mktemp -d)
  git -C "$folder" init --quiet
  git -C "$folder" fetch --quiet --depth 1 https://github.com/deepseek-ai/DeepEP 94a9f8f6b146c07d97ec58f67cd6d303296d6098
  git -C "$folder" checkout --quiet FETCH_HEAD
  "$python" -m pip install --no-cache-dir nvidia-nvshmem-cu13
  TORCH_CUDA_ARCH_LIST=$DEEPEP_ARCH "$python" -m pip install --no-cache-dir --no-build-isolation --no-deps "$folder"
  rm -rf "$folder"
fi
