"""Where in a folder of Megatron-LM, Megatron-Bridge or NeMo the checkpoint lies, and whether it is read."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_sov.errors import UserError
from megatron_sov.pretrained import listed, read_json

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.yaml"
BACKEND, VERSIONS = "torch_dist", (1,)
MAX_TRACKER_BYTES = 64


def find_iteration(folder: Path) -> Path:
    """Return the folder that holds an index: the one that is named, or its newest iteration.

    Raises:
        UserError: there is none, or it is of a format or version that is not read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; name a checkpoint of Megatron-LM or Megatron-Bridge")
    found = folder
    if not _is_checkpoint(folder):
        found = _newest(folder)
    if (found / "weights").is_dir() and not _is_checkpoint(found):  # NeMo 2
        found /= "weights"
    _check_format(found)
    return found


def iteration_of(folder: Path) -> int | None:
    """Return the iteration that a folder's name says."""
    number = re.fullmatch(r"iter_(\d{7,12})", folder.name)
    return int(number[1]) if number else None


def _is_checkpoint(folder: Path) -> bool:
    return (folder / METADATA).exists() or (folder / FORMAT).exists() or any(folder.glob("mp_rank_*"))


def _newest(folder: Path) -> Path:
    tracker = folder / TRACKER
    if not tracker.is_file():
        names = sorted(p.name for p in folder.glob("iter_*") if p.is_dir())
        if len(names) == 1:
            return folder / names[0]
        if not names:
            return folder
        raise UserError(f"{folder}: has no {TRACKER} that says which of its checkpoints is the newest; name "
                        f"one of them ({listed(names)})")
    with open(tracker, encoding="utf-8", errors="replace") as f:
        said = f.read(MAX_TRACKER_BYTES).strip()
    if not re.fullmatch(r"\d{1,12}|release", said):
        raise UserError(f"{tracker}: says {said!r}, which is no iteration; name the checkpoint's own folder")
    found = folder / (said if said == "release" else f"iter_{int(said):07d}")
    if not found.is_dir():
        raise UserError(f"{tracker}: says {said}, and there is no {found.name}; name the checkpoint's own "
                        "folder")
    return found


def _check_format(folder: Path) -> None:
    if any(folder.glob("mp_rank_*")):
        raise UserError(f"{folder}: has files of single ranks (--ckpt-format torch), which are not read; let "
                        "Megatron-LM write it again with --ckpt-format torch_dist (--ckpt-convert-format)")
    if not (folder / METADATA).is_file() and not (folder / FORMAT).is_file():
        raise UserError(f"{folder}: has neither {METADATA} nor {FORMAT}, so it is no torch_dist checkpoint; "
                        f"name the folder of an iteration, or the one with {TRACKER}")
    if not (folder / FORMAT).is_file():
        raise UserError(f"{folder}: has no {FORMAT}, so its format is not known (fsdp_dtensor and plain "
                        "torch.distributed checkpoints are not read); let Megatron write it with "
                        "--ckpt-format torch_dist")
    said = read_json(folder / FORMAT)
    backend, version = said.get("sharded_backend"), said.get("sharded_backend_version")
    if backend != BACKEND or version not in VERSIONS:
        raise UserError(f"{folder / FORMAT}: sharded_backend = {backend!r} version {version!r} is not read, "
                        f"only {BACKEND!r} version {VERSIONS[0]}; let Megatron write it again with "
                        "--ckpt-format torch_dist")
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder}: has no {METADATA}, so it was never complete; use an earlier checkpoint")
