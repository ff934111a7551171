"""The checkpoints of a run: which one is the newest, which ones stay, and what is done with a damaged
one.  No torch here.

Inside a run's `checkpoints` folder: `step-N` is a checkpoint that was once complete, `damaged-step-N` one
that was found damaged, `.writing-*` one under construction, and `.deleting-*` one on its way out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.base.artifacts import (
    MANIFEST, atomic_write, delete_folder, disk_errors, file_damage, fsync_path, manifest_sha256,
    read_manifest, to_json)
from megatron_sov.base.errors import Fix, UserError, download, fix_missing, warn
from megatron_sov.base.hints.removed import check_folder
from megatron_sov.base.outputs import TRYING
from megatron_sov.model.config import RunConfig, from_dict
from megatron_sov.model.pretrained import ADAPTER_CONFIG, CONFIG, is_hf_folder
from megatron_sov.runs.obs.events import EVENTS

KIND = "checkpoint"
CHECKPOINTS_OF_A_RUN = "checkpoints"
IMPORTED = "from-hf"
"""What stands for the recipe of a converted model."""
STATE = "state.json"
MODEL, ADAPTER = "model", "adapter"
"""The part of a checkpoint with all weights, and the one that an adapter's checkpoint has in its place."""
BASE = "base"
"""What a manifest calls the checkpoint of frozen weights that an adapter belongs to."""
SOURCE = "imported_from"
"""What a manifest calls the name of the Hugging Face model that it was converted from."""
MERGED = "merged"
"""What a manifest calls the checkpoints whose mean it is, with their weights."""
KEPT = "base-of-adapters.txt"
"""A file in a run's checkpoint that an adapter stands on, which is not pruned while it is there."""
WRITING, DELETING, DAMAGED = ".writing-", ".deleting-", "damaged-"
RUN, HF_MODEL, PEFT_ADAPTER = "run", "hf_model", "peft_adapter"
"""Kinds of folders beside that of a checkpoint."""
TAKEN_BY = {
    RUN: ("a run", "`megatron-sov report` shows it, `convert to-hf` exports its newest checkpoint"),
    KIND: ("a checkpoint", "`megatron-sov convert to-hf` exports it, `generate` and `eval` take it as it "
                           "is, `resume` takes the folder of its run"),
    HF_MODEL: ("a Hugging Face folder", "`megatron-sov convert from-hf {path} {name}-checkpoint` makes a "
                                        "checkpoint of it, `generate` and `eval` take it as it is"),
    PEFT_ADAPTER: ("a PEFT adapter", "`megatron-sov convert from-peft` makes a checkpoint of it"),
    "tokens": ("a folder of token shards", "`megatron-sov pretrain`, `sft` and other training commands take "
                                           "it as --data"),
    "tokenizer": ("a tokenizer", "`sov-data pack` takes it as --tokenizer"),
    "corpus": ("a corpus", "`sov-data pack --input` takes it"),
    "codec": ("a codec", "`sov-data encode-media --codec` takes it")}
"""Kind of a folder -> how messages call it, and what takes a folder with this path and name."""
FOUND_AT = {RUN: "the folder given to --run", KIND: "RUN/checkpoints/step-N",
            HF_MODEL: "a folder with config.json and *.safetensors", PEFT_ADAPTER: "what PEFT has saved"}
"""Kind of a folder that commands take -> where it is found."""
NO_CHECKPOINTS = (".gguf", ".ggml", ".nemo", ".onnx", ".pt", ".pth", ".ckpt")
"""Suffixes of the files in which other programs have a whole model."""
_TAKEN_BY_COMMAND = {(RUN, (HF_MODEL,)): "convert to-hf", (KIND, (HF_MODEL,)): "convert to-hf",
                     (PEFT_ADAPTER, (HF_MODEL,)): "convert from-peft",
                     (HF_MODEL, (KIND, RUN)): "convert from-hf", (HF_MODEL, (RUN, KIND)): "convert from-hf"}
"""Kind of a folder and the kinds that a command takes -> the command that converts in the other direction."""
TOKENIZER = "tokenizer.json"
TEXTS = (".txt", ".jsonl", ".parquet", ".jsonl.gz", ".jsonl.zst", ".html", ".csv")
"""Ends of the names of files of text."""
TAKEN_BACK = "taken-back-"
"""What the name of a checkpoint begins with whose run has taken its weights back, and that an adapter stands
on."""
NOT_WEIGHTS = ("optimizer/", "optimizer.index.json")
"""Beginnings of the names of files that a model alone does not need."""


def temporary(path: Path, token: str) -> Path:
    """Return the folder in which a checkpoint is built; `token` tells it from what an
    earlier process left."""
    return path.with_name(f"{WRITING}{path.name}-{token}")


def clear_leftovers(folder: Path) -> None:
    """Delete what killed processes left half-written or half-deleted; only for the one who
    holds the run's lock."""
    # No manifest vouches for any of these: they are what a kill left, and only the lock's holder may know
    # that no living process still writes them.
    begins = (WRITING, DELETING, TRYING)
    for leftover in sorted(found for begin in begins for found in folder.glob(f"{begin}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run's `checkpoints` folder, sound or not, or None."""
    # By number, not by date: a copy or a restored backup has other times on disk.
    steps = _steps(folder)
    return steps[-1][1] if steps else None


def latest_not_after(folder: Path, step: int) -> Path | None:
    """Return the newest checkpoint of step `step` or before, sound or not, or None."""
    # `_steps` sorts ascending, so the last match is the newest that is not too new.
    found = [path for taken, path in _steps(folder) if taken <= step]
    return found[-1] if found else None


def drop_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, whose weights were taken back; the newest first:
    a kill leaves a sound run.  One that an adapter stands on is renamed, so that the run does not go on from
    it, and `found_base` finds it."""
    # Newest first: if a kill comes in the middle, the newest one left is still a checkpoint that the run
    # could go on from.
    for taken, path in reversed(_steps(folder)):
        if taken > step and (path / KEPT).exists():
            aside = _set_apart(path, TAKEN_BACK)
            warn(f"{path}: its weights are taken back, and an adapter stands on it: it is {aside.name} now")
        elif taken > step:
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint; it loses its name before its files, so that a kill leaves no torn one
    under a valid name."""
    # The rename is atomic, the deletion of thousands of files is not. The token keeps apart the remains of
    # a delete that was killed before.
    delete_folder(path, path.with_name(f"{DELETING}{path.name}-{secrets.token_hex(4)}"))


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps before a run's checkpoint was taken, which are in its name."""
    return int(checkpoint.name.removeprefix("step-"))


def _steps(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(p.name[5:]), p) for p in folder.glob("step-*") if p.name[5:].isdigit())


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run's `checkpoints` folder, the oldest first."""
    return [path for _, path in _steps(folder) if (path / MANIFEST).is_file()]


def refuse_missing(path: Path, option: str = "") -> None:
    """Raise `UserError` where no model can lie, since there is no folder: what can be known before torch."""
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        beside = path.parent.glob("*") if path.parent.name == CHECKPOINTS_OF_A_RUN else ()
        if names := sorted(folder.name for folder in beside):
            raise UserError(f"{option}{path}: {what}; the run's checkpoints are {', '.join(names)[:500]}")
        if path.suffix in NO_CHECKPOINTS:
            raise UserError(f"{option}{path}: {what}: {path.suffix} is not read; download the original, "
                            "whose weights are *.safetensors: hf download OWNER/NAME --local-dir NAME, and "
                            f"pass {option}NAME")
        if path.is_file() and is_hf_folder(path.parent):
            raise UserError(f"{option}{path}: {what}; pass its folder, {path.parent}",
                            Fix(words={str(path): str(path.parent)}))
        raise UserError(f"{option}{path}: {what}; pass a checkpoint, a run or a Hugging Face "
                        f"folder{download(path)}", fix_missing(path))


def refuse_other_kind(path: Path, kinds: Collection[str], wanted: str) -> None:
    """Raise `UserError` where a folder is something else than a command takes: what it is, and which command
    takes it, or what to pass.

    Args:
        path: the folder; one that is not there, or that lacks a part of what it should be, passes, for the
            reader to say it.
        kinds: keys of `TAKEN_BY` that will do.
        wanted: how messages call them.
    """
    # In this order: a run has settings that a look for models could take for its own, and a converted
    # folder may have a manifest beside its config.json.
    if (path / EVENTS).is_file():
        kind = RUN
    elif is_hf_folder(path):
        kind = HF_MODEL
    elif (path / ADAPTER_CONFIG).is_file():
        kind = PEFT_ADAPTER
    else:
        kind = read_manifest(path).kind if (path / MANIFEST).is_file() else ""
    if kind in TAKEN_BY and kind not in kinds:
        called, taken_by = TAKEN_BY[kind]
        command = _TAKEN_BY_COMMAND.get((kind, tuple(kinds)), "")
        raise UserError(f"{path}: is {called}, not {wanted}; {taken_by.format(path=path, name=path.name)}",
                        Fix(command=command) if command else None)
    if not kind:
        check_folder(path)
    if not kind and RUN in kinds and (runs := runs_below(path)):
        raise UserError(f"{path}: is not {wanted}; it holds the runs {', '.join(map(str, runs))}: pass one "
                        "of them")
    is_run = (path / CHECKPOINTS_OF_A_RUN).exists() or (KIND not in kinds and (path / CONFIG).exists())
    if not kind and path.is_dir() and not is_run and (known := _nothing_known(path)):
        what, taken_by = known
        found = " or ".join(FOUND_AT[kind] for kind in kinds)
        raise UserError(f"{path}: {what}, so it is not {wanted}; {taken_by}pass {found}")


def runs_below(path: Path) -> list[Path]:
    """Return the run folders in a folder and in the folders in it, by name."""
    return sorted(file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/{EVENTS}"))


def refuse_no_model(path: Path) -> None:
    """Raise `UserError` where a folder is something else than a model."""
    refuse_other_kind(path, (RUN, KIND, HF_MODEL), "a checkpoint, a run or a Hugging Face folder")


def _nothing_known(path: Path) -> tuple[str, str] | None:
    """Return what a folder is that is no artifact and no model, and what takes it ("": nothing); None: it
    holds other folders, in which there may be one."""
    # Hidden files (.DS_Store, .gitattributes) tell nothing of what a folder is.
    names = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    if not names:
        return None if any(path.iterdir()) else ("is empty", "")
    if TOKENIZER in names:
        return f"is a tokenizer without a model ({TOKENIZER})", "`sov-tokenizer import` takes it; "
    texts = [name for name in names if name.endswith(TEXTS)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else " alone"
    if texts:
        return f"holds text ({texts[0]}{more})", "`sov-data pack --input` takes it; "
    if CONFIG in names:
        return f"holds {CONFIG} without weights (*.safetensors)", (
            "download the whole model folder (hf download NAME --local-dir DIR), or ")
    if any(name.endswith((".safetensors", "pytorch_model.bin")) for name in names):
        return f"holds weights ({names[0]}{more}) without {CONFIG}", (
            "download the whole model folder (hf download NAME --local-dir DIR), or ")
    return f"holds {names[0]}{more}, and neither a model nor an artifact", ""


def refuse_no_run(path: Path) -> None:
    """Raise `UserError` where a folder is no run: it has no events."""
    run = path.absolute().parent.parent
    if path.absolute().parent.name == CHECKPOINTS_OF_A_RUN and (run / EVENTS).is_file():
        raise UserError(f"{path}: is a checkpoint of the run {path.parent.parent}; pass {path.parent.parent}")
    refuse_other_kind(path, (RUN,), "a run")
    if not (path / EVENTS).is_file():
        raise UserError(f"{path}: holds no {EVENTS}, so it is no run folder; pass the folder given to --run")


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest one of a run folder.

    Raises:
        UserError: it is neither, or its manifest is damaged.
    """
    if not (path / CHECKPOINTS_OF_A_RUN).is_dir():
        refuse_other_kind(path, (KIND, RUN), "a checkpoint or a run")
        read_manifest(path, KIND)
        return path
    # A damaged newest checkpoint is an error, not a reason to take an older one in silence: the caller
    # would measure or export other weights than it asked for.
    newest = latest(path / CHECKPOINTS_OF_A_RUN)
    if newest is None:
        raise UserError(f"{path}: this run has no complete checkpoint yet")
    problem = manifest_damage(newest)
    if problem is not None:
        raise UserError(f"{problem}; {instead_of(newest)}")
    return newest


def settings_of(path: Path) -> RunConfig:
    """Return the settings that a checkpoint was written with, whose model is sound.

    Raises:
        UserError: its manifest is damaged, or holds no settings of a run.
    """
    # The manifest is read, not RUN/config.json: a run's settings may have changed since this checkpoint.
    raw = read_manifest(path, KIND).settings
    try:
        settings = from_dict(raw)
        problems = [problem.sentence for problem in settings.model.problems()]
    except UserError as e:
        problems = [" ".join(str(e).split())]
    if problems:
        raise UserError(f"{path / MANIFEST}: its settings cannot be used ({'; '.join(problems)}); "
                        f"{instead_of(path)}")
    return settings


@dataclass(frozen=True)
class AdapterBase:
    """The checkpoint of the frozen weights beside which an adapter was trained."""

    path: Path
    """Its folder."""
    sha256: str
    """Of its manifest."""

    def to_dict(self) -> dict[str, str]:
        return {"path": str(self.path), "sha256": self.sha256}

    @staticmethod
    def of(path: Path) -> AdapterBase:
        # The manifest holds the hash of every file, so its own hash stands for all weights.
        return AdapterBase(path.resolve(), manifest_sha256(path))


def adapter_base(path: Path) -> AdapterBase | None:
    """Return the base that a checkpoint of an adapter names, or None: it holds all weights.

    Raises:
        UserError: its manifest is damaged.
    """
    named = read_manifest(path, KIND).content.get(BASE)
    return None if named is None else AdapterBase(Path(named["path"]), named["sha256"])


def found_base(path: Path, base: AdapterBase) -> Path:
    """Return the folder of an adapter's base.

    Args:
        path: the adapter's checkpoint, for the message.
        base: what it names.

    Raises:
        UserError: it is not there, or is another one than the adapter was trained beside.
    """
    # A rollback renames a base that adapters need (`drop_after`), so its place may have changed; the hash
    # says whether it is the same.
    taken_back = base.path.parent.glob(f"{TAKEN_BACK}{base.path.name}*")
    there = [place for place in (base.path, *sorted(taken_back)) if (place / MANIFEST).is_file()]
    for place in there:
        if manifest_sha256(place) == base.sha256:
            return place
    if not there:
        raise UserError(f"{path}: is an adapter of {base.path}, which is not there; "
                        "restore that folder from a copy")
    raise UserError(f"{path}: is an adapter of {base.path}, which has become another checkpoint since "
                    "(its manifest's hash differs, as that of every new conversion does); restore it from "
                    "a copy")


def keep_as_base(base: Path) -> None:
    """Have the run that a checkpoint belongs to keep it: an adapter is nothing without its base.

    What nothing prunes is left as it is; a run in which this user cannot write, too, with a warning.
    """
    if base.parent.name != CHECKPOINTS_OF_A_RUN or (base / KEPT).exists():
        return
    try:
        atomic_write(base / KEPT, "An adapter stands on this checkpoint, so its run does not prune it.\n"
                                  "When no adapter needs it any more, delete this file.\n")
    except (OSError, UserError) as e:
        warn(f"{base}: an adapter stands on it, and its run cannot be told to keep it ({e}); see to it that "
             "train.keep_checkpoints does not delete it")


def files_sha256(start: Path) -> str:
    """Return what stands for a checkpoint's weights, or a round's documents: a Hugging Face folder that is
    converted once more gives the same files, under a manifest of another time.  Empty for that folder itself,
    which a dry run starts from."""
    if is_hf_folder(start):
        return ""
    manifest = read_manifest(start)
    facts = {"base": manifest.content.get(BASE, {}).get("sha256", ""),
             "files": {name: record.digest for name, record in sorted(manifest.files.items())}}
    return hashlib.sha256(to_json(facts).encode()).hexdigest()


def trained_tokens(path: Path) -> int:
    """Return the longest context, in tokens, that a checkpoint's weights were trained on: by its own run, or
    by those that it started from; of an imported model what it claims.

    Raises:
        UserError: the checkpoint is damaged.
    """
    settings = settings_of(path)
    if settings.recipe == IMPORTED:
        return settings.model.max_position_tokens
    try:
        found = int(json.loads((path / STATE).read_text(encoding="utf-8")).get("trained_tokens", 0))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path / STATE}: is damaged ({e}); {instead_of(path)}") from None
    # checkpoints of earlier versions do not tell
    return found or max(phase.seq_len for phase in settings.data.phases)


def manifest_damage(path: Path) -> str | None:
    """Return one sentence where a checkpoint has no sound manifest, else None."""
    if not (path / MANIFEST).is_file():
        return f"{path / MANIFEST}: is missing"
    try:
        read_manifest(path, KIND)
    except UserError as e:
        return str(e).partition(";")[0]
    return None


def damage(path: Path, *, rank: int = 0, size: int = 1, weights_only: bool = False) -> str | None:
    """Return one sentence about the first file of a checkpoint that is missing or not what was
    written, else None.

    Args:
        rank: which share of the files this process looks at, of `size` shares; all look at the manifest.
        weights_only: pass over the optimizer's state.

    Raises:
        UserError: a file cannot be read, which may be the machine's fault and not the file's.
    """
    problem = manifest_damage(path)
    if problem is not None:
        return problem
    files = read_manifest(path, KIND).files
    # Sorted, so that all ranks split the same list: every file is hashed by exactly one of them.
    names = sorted(name for name in files if not (weights_only and name.startswith(NOT_WEIGHTS)))
    for name in names[rank::size]:
        try:
            problem = file_damage(path / name, files[name])
        except OSError as e:
            # EIO is the disk's word that these bytes are gone; all else (permissions, a mount that is away)
            # says nothing of the file.
            if e.errno != errno.EIO:
                raise UserError(f"{path / name}: cannot be read ({e.strerror}); see to it that it can, "
                                "and start again") from e
            problem = f"{path / name}: cannot be read ({e.strerror})"
        if problem is not None:
            return problem
    return None


def instead_of(path: Path) -> str:
    """Return what to do about a damaged checkpoint: take the one before it, which is named,
    where there is one."""
    step = path.name[5:]
    before = [p for n, p in _steps(path.parent)
              if step.isdigit() and n < int(step) and manifest_damage(p) is None]
    return (f"use the checkpoint before it, {before[-1]}" if before
            else "there is no checkpoint before it; restore it from a copy")


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for a sound one; returns its new place."""
    return _set_apart(path, DAMAGED)


def _set_apart(path: Path, begins: str) -> Path:
    """Rename a checkpoint to a name that nothing has yet; returns its new place."""
    aside = path.with_name(begins + path.name)
    # The same step may have been damaged before; os.rename would fail on that folder, or replace an empty
    # one.
    if aside.exists():
        aside = path.with_name(f"{begins}{path.name}-{secrets.token_hex(4)}")
    with disk_errors(path):
        os.rename(path, aside)
        # Without this a power failure may bring the old name back, and the next start would load the
        # damaged one.
        fsync_path(path.parent)
    return aside


def refuse_lost(folder: Path) -> None:
    """Raise `UserError` where a run has only damaged checkpoints: it must not begin anew as
    if nothing had been."""
    # To start at step 0 here would look like a fresh run in the same folder, with the old run's events
    # before it.
    damaged = sorted(p.name for p in folder.glob(f"{DAMAGED}*"))
    if damaged and not _steps(folder):
        raise UserError(f"{folder}: no sound checkpoint is left ({', '.join(damaged)}); "
                        "restore one from a copy as step-N, or start a new --run")


def prune(folder: Path, keep: int, keep_every_steps: int = 0) -> None:
    """Delete all complete checkpoints but the newest `keep` (0 keeps all), those whose step
    `keep_every_steps` divides, and those that adapters stand on."""
    # Incomplete ones are not counted: they would push a sound checkpoint out of the newest `keep`.
    for path in complete(folder)[:-keep] if keep else []:
        if not (keep_every_steps and step_of(path) % keep_every_steps == 0) and not (path / KEPT).exists():
            _delete(path)
