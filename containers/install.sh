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
# DeepEP, where DEEPEP_ARCH names a compute capability (9.0 or 10.0; one alone, its kernels are compiled for it).  This commit of
# its branch hybrid-ep has what megatron-core imports for parallel.expert_dispatcher=deepep and hybridep; its main branch no longer has.
# HYBRID_EP_MULTINODE=1 takes hybridep beyond one NVLink domain and needs DOCA and rdma-core: its own README.
if [ -n "${DEEPEP_ARCH:-}" ]; then
  folder=$(mktemp -d)
  git -C "$folder" init --quiet
  git -C "$folder" fetch --quiet --depth 1 https://github.com/deepseek-ai/DeepEP 94a9f8f6b146c07d97ec58f67cd6d303296d6098
  git -C "$folder" checkout --quiet FETCH_HEAD
  "$python" -m pip install --no-cache-dir nvidia-nvshmem-cu13
  TORCH_CUDA_ARCH_LIST=$DEEPEP_ARCH "$python" -m pip install --no-cache-dir --no-build-isolation --no-deps "$folder"
  rm -rf "$folder"
fi
