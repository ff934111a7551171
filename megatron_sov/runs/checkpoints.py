"""The `checkpoints` folder of a run: find, check, protect, rename and prune checkpoints, without torch.

Entries of `RUN/checkpoints`: `step-N` (complete when written), `damaged-step-N` (renamed after a failed
check), `.writing-*` (under construction), `.deleting-*` (deletion in progress).
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sov.base.artifacts import (
    MANIFEST, delete_folder, find_file_damage, format_json, fsync_path, manifest_sha256, read_manifest,
    translate_disk_errors, write_atomically)
from megatron_sov.base.errors import Fix, UserError, choose_free_path, fix_missing, suggest_download, warn
from megatron_sov.base.hints.kinds import TRACKER, suggest_models
from megatron_sov.base.hints.removed import check_folder
from megatron_sov.base.outputs import PROBE_PREFIX
from megatron_sov.base.settings import SettingsError
from megatron_sov.model import recipes
from megatron_sov.model.config import (
    LoraConfig, ModelConfig, ParallelConfig, RunConfig, apply_settings, from_dict)
from megatron_sov.model.families.adapters import adapter_identity
from megatron_sov.model.pretrained import ADAPTER_CONFIG, CONFIG, is_hf_folder
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.runs.obs.events import EVENTS

CHECKPOINT_KIND = "checkpoint"
CHECKPOINTS_FOLDER = "checkpoints"
IMPORTED_RECIPE = "from-hf"
"""Recipe name for converted Hugging Face models."""
STATE_FILE = "state.json"
MODEL, ADAPTER, OPTIMIZER = "model", "adapter", "optimizer"
"""Checkpoint parts: full weights, or adapter weights alone; the optimizer's state."""
BASE = "base"
"""Manifest field: an adapter's base checkpoint with the frozen weights."""
SOURCE = "imported_from"
"""Manifest field: the original Hugging Face model name."""
MERGED = "merged"
"""Manifest field: the averaged checkpoints with their weights."""
ADAPTER_BASE_MARKER = "base-of-adapters.txt"
"""Marker file in the base checkpoint of an adapter; `prune_checkpoints` skips marked checkpoints."""
WRITING, DELETING, DAMAGED = ".writing-", ".deleting-", "damaged-"
RUN, HF_MODEL, PEFT_ADAPTER = "run", "hf_model", "peft_adapter"
"""Further folder kinds in command arguments."""
MODEL_KINDS, ANY_MODEL = (RUN, CHECKPOINT_KIND, HF_MODEL), "a checkpoint, a run or a Hugging Face folder"
KIND_CONSUMERS = {
    RUN: ("a run", "`megatron-sov report` shows it, `convert to-hf` exports its newest checkpoint"),
    CHECKPOINT_KIND: ("a checkpoint", "`megatron-sov convert to-hf` exports it, `generate` and `eval` take "
                                      "it as it is, `resume` takes the folder of its run"),
    HF_MODEL: ("a Hugging Face folder", "`megatron-sov convert from-hf {path} {name}-checkpoint` makes a "
                                        "checkpoint of it, `generate` and `eval` take it as it is"),
    PEFT_ADAPTER: ("a PEFT adapter", "`megatron-sov convert from-peft` makes a checkpoint of it"),
    "tokens": ("a folder of token shards", "`megatron-sov pretrain`, `sft` and other training commands take "
                                           "it as --data"),
    "tokenizer": ("a tokenizer", "`sov-data pack` takes it as --tokenizer"),
    "corpus": ("a corpus", "`sov-data pack --input` takes it"),
    "codec": ("a codec", "`sov-data encode-media --codec` takes it")}
"""Folder kind -> name in messages, and commands for a folder with `path` and `name`."""
KIND_LOCATIONS = {RUN: "the folder given to --run", CHECKPOINT_KIND: "RUN/checkpoints/step-N",
                  HF_MODEL: "a folder with config.json and *.safetensors",
                  PEFT_ADAPTER: "what PEFT has saved"}
"""Folder kind -> description for messages."""
FOREIGN_MODEL_SUFFIXES = (".gguf", ".ggml", ".nemo", ".onnx", ".pt", ".pth", ".ckpt")
"""Suffixes: whole-model files from other programs."""
_TAKEN_BY_COMMAND = {(RUN, (HF_MODEL,)): "convert to-hf", (CHECKPOINT_KIND, (HF_MODEL,)): "convert to-hf",
                     (PEFT_ADAPTER, (HF_MODEL,)): "convert from-peft",
                     (HF_MODEL, (CHECKPOINT_KIND, RUN)): "convert from-hf",
                     (HF_MODEL, (RUN, CHECKPOINT_KIND)): "convert from-hf"}
"""Kind of a folder and the kinds that a command takes -> the command that converts in the other direction."""
MAX_POINTER_BYTES = 1024
TOKENIZER = "tokenizer.json"
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".jsonl.gz", ".jsonl.zst", ".html", ".csv")
"""Text file suffixes."""
ROLLED_BACK = "taken-back-"
"""Name prefix for an adapter's base checkpoint after a rollback."""
OPTIMIZER_FILES = ("optimizer/", "optimizer.index.json")
"""File name prefixes for optimizer state."""


def temporary_folder(path: Path, token: str) -> Path:
    """Return the build folder for checkpoint `path`; a random `token` avoids remains of killed processes."""
    return path.with_name(f"{WRITING}{path.name}-{token}")


def delete_leftovers(folder: Path) -> None:
    """Delete half-written and half-deleted folders of killed processes; the caller holds the run's lock."""
    # The folders have no manifest. Only the lock holder knows that no living process uses them.
    for prefix in (WRITING, DELETING, PROBE_PREFIX):
        for leftover in sorted(folder.glob(f"{prefix}*")):
            shutil.rmtree(leftover, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest `step-N` in a `checkpoints` folder, damaged or not, or None."""
    # Compare step numbers: copies and restored backups have other modification times.
    steps = _numbered_checkpoints(folder)
    return steps[-1][1] if steps else None


def latest_checkpoint_until(folder: Path, step: int) -> Path | None:
    """Return the newest `step-N` with N <= `step`, damaged or not, or None."""
    # `_numbered_checkpoints` sorts ascending: the last match is the newest.
    candidates = [path for number, path in _numbered_checkpoints(folder) if number <= step]
    return candidates[-1] if candidates else None


def delete_checkpoints_after(folder: Path, step: int) -> None:
    """Delete checkpoints after `step`, newest first, when a rollback discards their weights.

    If adapters use a checkpoint as base, rename it with prefix `ROLLED_BACK`: the run does not resume from it
    and `find_adapter_base` still finds it.
    """
    # Newest first: if the process dies midway, the run can still resume from the newest remaining checkpoint.
    for number, path in reversed(_numbered_checkpoints(folder)):
        if number > step and (path / ADAPTER_BASE_MARKER).exists():
            renamed = _rename_with_prefix(path, ROLLED_BACK)
            warn(f"{path}: the run rolled back past this checkpoint, and an adapter needs it; "
                 f"renamed to {renamed.name}")
        elif number > step:
            _delete_checkpoint(path)


def _delete_checkpoint(path: Path) -> None:
    """Rename a checkpoint, then delete the files: a killed process leaves no partial `step-N`."""
    # Renaming is atomic; deleting thousands of files is not. The random token avoids names of earlier
    # remains.
    delete_folder(path, path.with_name(f"{DELETING}{path.name}-{secrets.token_hex(4)}"))


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step N from a `step-N` path."""
    return int(checkpoint.name.removeprefix("step-"))


def _numbered_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(p.name[5:]), p) for p in folder.glob("step-*") if p.name[5:].isdecimal())


def list_complete(folder: Path) -> list[Path]:
    """Return the checkpoints with a manifest, oldest first."""
    return [path for _, path in _numbered_checkpoints(folder) if (path / MANIFEST).is_file()]


def check_model_path(path: Path, option: str = "", kinds: Collection[str] = MODEL_KINDS,
                     wanted: str = ANY_MODEL) -> None:
    """Raise `UserError` if folder `path` is missing; suggest existing models of `kinds`, in words `wanted`,
    or a download. Runs before torch loads."""
    if path.is_dir():
        return
    problem = "is no folder" if path.exists() else "does not exist"
    entries = path.parent.glob("*") if path.parent.name == CHECKPOINTS_FOLDER else ()
    if siblings := sorted(folder.name for folder in entries):
        newest = latest_checkpoint(path.parent)
        fix = Fix(words={str(path): str(newest)}) if newest else None
        raise UserError(f"{option}{path}: {problem}; the run's checkpoints are {', '.join(siblings)[:500]}",
                        fix)
    if re.match(r"https?:/", str(path)):
        _refuse_address(str(path), option)
    if path.suffix in FOREIGN_MODEL_SUFFIXES:
        raise UserError(f"{option}{path}: {problem}: {path.suffix} is not read; download the original, whose "
                        "weights are *.safetensors: hf download OWNER/NAME --local-dir NAME, and pass "
                        f"{option}NAME")
    if path.is_file() and is_hf_folder(path.parent):
        raise UserError(f"{option}{path}: {problem}; pass its folder, {path.parent}",
                        Fix(words={str(path): str(path.parent)}))
    if (path.parent / EVENTS).is_file():
        raise UserError(f"{option}{path}: {problem}; pass the run, {path.parent}",
                        Fix(words={str(path): str(path.parent)}))
    if str(path) in recipes.names():
        raise UserError(f"{option}{path}: is a recipe, which comes before the options",
                        Fix(arguments=(str(path),), left_out=(f"{option}{path}",)))
    is_model_file = path.is_file() and path.suffix not in (".yml", ".yaml")  # mergekit's: `hints.paths`
    fix = fix_missing(path) or (Fix(words={str(path): "MODEL"}) if is_model_file else None)
    listed = suggest_models(kinds) if fix is None else ""
    raise UserError(f"{option}{path}: {problem}; pass {wanted}{listed}{suggest_download(path)}", fix)


def _refuse_address(address: str, option: str) -> None:
    """Raise `UserError` for an address in place of a model folder: of a page of the hub, or of a server."""
    address = re.sub(r":/+", "://", address, count=1)  # a `Path` has lost a slash
    if match := re.match(r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/([\w.-]+))", address):
        fix = Fix(words={address: match[2], address.replace("//", "/"): match[2]},
                  before=(f"hf download {match[1]} --local-dir {match[2]}",))
        raise UserError(f"{option}{address}: is a page on the hub; download the model first", fix)
    folder = f"{option}HF_DIR".split()
    raise UserError(f"{option}{address}: is a server's address, and weights are needed; pass a checkpoint, "
                    "run or Hugging Face folder (`chat` talks to servers, `rl run --teacher-url` asks them)",
                    Fix(options=tuple(folder)) if option else Fix(words={address: folder[0]}))


def refuse_pointers(path: Path, option: str = "") -> None:
    """Raise `UserError` if a model folder's weights are Git LFS pointers."""
    for file in path.glob("*.safetensors"):
        is_short = file.stat().st_size < MAX_POINTER_BYTES
        if is_short and file.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(f"{option}{path}: {file.name} is a Git LFS pointer without weights; fetch them",
                            Fix(words={str(path): str(path)},
                                before=(f"git -C {shlex.quote(str(path))} lfs pull",)))


def check_model(path: Path, settings: Sequence[str] = (), nproc: int | None = None, option: str = "") -> None:
    """Raise `UserError` if `path` is neither a Hugging Face folder nor a complete checkpoint, nor a run with
    one, or if the layout in `settings` (`key=value`) does not fit the checkpoint."""
    check_model_path(path, option)
    check_model_folder(path)
    refuse_pointers(path, option)
    if not is_hf_folder(path):
        checkpoint = find_checkpoint(path)
        if settings:
            apply_layout(checkpoint, read_checkpoint_settings(checkpoint), settings, nproc)


def apply_layout(checkpoint: Path, config: RunConfig, settings: Sequence[str], nproc: int | None,
                 option: str = "--set") -> RunConfig:
    """Replace the layout of a training run by the layout of one process with `settings`. Raises
    `UserError`: a setting does not exist, or the layout does not fit the model or the processes."""
    config = apply_settings(replace(config, parallel=ParallelConfig()), settings, option)
    problems = config.model.problems() + config.parallel.problems(config.model, num_ranks(nproc))
    if problems:
        raise SettingsError(f"{checkpoint}: cannot be run like this", problems)
    return config


def check_folder_kind(path: Path, kinds: Collection[str], wanted: str) -> None:
    """Check that a folder has one of `kinds` (keys of `KIND_CONSUMERS`), `wanted` in messages; the error
    names a command for the kind found. Missing or incomplete folders pass; the reader reports them later."""
    if RUN in kinds and path.name == CHECKPOINTS_FOLDER:
        refuse_run_part(path)
    # Order matters: a run contains a config.json, and a converted folder may have a manifest next to it.
    if (path / EVENTS).is_file():
        kind = RUN
    elif is_hf_folder(path):
        kind = HF_MODEL
    elif (path / ADAPTER_CONFIG).is_file():
        kind = PEFT_ADAPTER
    else:
        kind = read_manifest(path).kind if (path / MANIFEST).is_file() else ""
    if not kind:
        _refuse_unknown_folder(path, kinds, wanted)
    elif kind in KIND_CONSUMERS and kind not in kinds:
        raise _build_kind_error(path, kind, kinds, wanted)


def _build_kind_error(path: Path, kind: str, kinds: Collection[str], wanted: str) -> UserError:
    """Return the error for a folder of another kind, with the command that takes or converts it."""
    description, advice = KIND_CONSUMERS[kind]
    command = _TAKEN_BY_COMMAND.get((kind, tuple(kinds)), "")
    fix = Fix(command=command) if command else None
    if kind == PEFT_ADAPTER and {CHECKPOINT_KIND, RUN} <= {*kinds}:
        fix = fix_adapter(path)
    if kind == HF_MODEL and CHECKPOINT_KIND in kinds:  # the command is for `convert to-hf`
        fix = replace(_fix_by_conversion(path, "from-hf"), command=command)
    listed = suggest_models(kinds) if fix is None and RUN in kinds else ""
    if fix is None and (HF_MODEL in kinds or listed):
        fix = Fix(words={str(path): "MODEL"})
    return UserError(f"{path}: is {description}, not {wanted}; "
                     f"{advice.format(path=path, name=path.name)}{listed}", fix)


def _refuse_unknown_folder(path: Path, kinds: Collection[str], wanted: str) -> None:
    """Raise `UserError` for a folder of no known kind: one above several runs or checkpoints, one of another
    program, or one with other files. Missing folders and runs that have just begun pass."""
    check_folder(path)
    if RUN in kinds and (runs := find_runs(path)):
        unfinished = [run for run in runs if not (run / "complete.json").exists()]
        run = str((unfinished if unfinished and kinds == (RUN,) else runs)[-1])
        raise UserError(f"{path}: is not {wanted}; it holds the runs {', '.join(map(str, runs))}: pass "
                        f"one of them, e.g. {run}", Fix(words={str(path): run}))
    if saved := [folder for folder in path.glob("checkpoint-*") if folder.name[11:].isdecimal()]:
        newest = max(saved, key=lambda folder: int(folder.name[11:]))
        raise UserError(f"{path}: holds checkpoints of transformers; pass one of them, e.g. {newest}",
                        Fix(words={str(path): str(newest)}))
    if (path / TRACKER).is_file():
        fix = _fix_by_conversion(path, "from-megatron")
        raise UserError(f"{path}: is a checkpoint of Megatron-LM, not {wanted}; `{fix.before[0]}` makes it "
                        "one", fix)
    has_config = CHECKPOINT_KIND not in kinds and (path / CONFIG).exists()
    is_run = (path / CHECKPOINTS_FOLDER).exists() or has_config
    if path.is_dir() and not is_run and (contents := _describe_unknown_folder(path)):
        description, advice = contents
        expected = " or ".join(KIND_LOCATIONS[kind] for kind in kinds)
        raise UserError(f"{path}: {description}, so it is not {wanted}; {advice}pass {expected}")


def _fix_by_conversion(path: Path, action: str) -> Fix:
    """Return the command that makes a checkpoint of a folder of another program."""
    converted = choose_free_path(f"{path.name}-checkpoint")
    command = shlex.join(["megatron-sov", "convert", action, str(path), converted])
    return Fix(words={str(path): converted}, before=(command,))


def fix_adapter(path: Path) -> Fix:
    """Return the commands that make checkpoints of an adapter and of the base model that it names."""
    try:
        config = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = str(config["base_model_name_or_path"] or "HF_DIR")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = "HF_DIR"
    is_hub_name = bool(suggest_download(base))
    folder, adapter = Path(base).name, choose_free_path(f"{path.name}-checkpoint")
    converted = choose_free_path(f"{folder}-checkpoint")
    commands = [["hf", "download", base, "--local-dir", folder]] if is_hub_name else []
    commands += [["megatron-sov", "convert", "from-hf", folder if is_hub_name else base, converted],
                 ["megatron-sov", "convert", "from-peft", str(path), adapter, "--base", converted]]
    return Fix(words={str(path): adapter}, before=tuple(map(shlex.join, commands)))


def find_runs(path: Path) -> list[Path]:
    """Return the run folders one or two levels down; the run with the newest event is the last."""
    files = [file for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/{EVENTS}")]
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime)]


def check_model_folder(path: Path) -> None:
    """Raise `UserError` if a folder contains neither checkpoint, run nor Hugging Face model."""
    check_folder_kind(path, MODEL_KINDS, ANY_MODEL)


def _describe_unknown_folder(path: Path) -> tuple[str, str] | None:
    """Describe the files in an unrecognized folder and name a command for them, or "".

    Returns None if the folder has only subfolders, because a model may be in a subfolder.
    """
    # Hidden files (.DS_Store, .gitattributes) say nothing about the folder.
    names = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    if not names:
        return None if any(path.iterdir()) else ("is empty", "")
    if TOKENIZER in names:
        return f"is a tokenizer without a model ({TOKENIZER})", "`sov-tokenizer import` takes it; "
    text_files = [name for name in names if name.endswith(TEXT_SUFFIXES)]
    count_text = f" and {len(names) - 1} more" if len(names) > 1 else " alone"
    if text_files:
        return f"holds text ({text_files[0]}{count_text})", "`sov-data pack --input` takes it; "
    if CONFIG in names:
        return f"holds {CONFIG} without weights (*.safetensors)", (
            "download the whole model folder (hf download NAME --local-dir DIR), or ")
    if any(name.endswith((".safetensors", "pytorch_model.bin")) for name in names):
        return f"holds weights ({names[0]}{count_text}) without {CONFIG}", (
            "download the whole model folder (hf download NAME --local-dir DIR), or ")
    return f"holds {names[0]}{count_text}, and neither a model nor an artifact", ""


def check_run_folder(path: Path) -> None:
    """Raise `UserError` if a folder does not exist or has no `events.jsonl`."""
    refuse_run_part(path)
    if not path.exists():
        fix = fix_missing(path)
        near = ", ".join(map(str, find_runs(path.parent) or find_runs(Path()))) or "none"
        raise UserError(f"{path}: does not exist; pass the folder of a training command's --run (runs there: "
                        f"{near[:300]})", fix if fix and not fix.before else None)
    check_folder_kind(path, (RUN,), "a run")
    if not (path / EVENTS).is_file():
        raise UserError(f"{path}: contains no {EVENTS}, so it is not a run folder; "
                        "pass the folder given to --run")


def refuse_run_part(path: Path) -> None:
    """Raise `UserError` for a file or folder inside a run."""
    run = next((parent for parent in path.absolute().parents[:2] if (parent / EVENTS).is_file()), None)
    if run is not None and not (path / EVENTS).is_file():
        kind = "a checkpoint" if path.absolute().parent.name == CHECKPOINTS_FOLDER else "part"
        advice = "; `convert to-peft` writes its adapter" if path.name.startswith("adapter_") else ""
        typed = Path(os.path.relpath(run)) if os.path.relpath(path) == str(path) else run
        raise UserError(f"{path}: is {kind} of the run {typed}; pass {typed}{advice}",
                        Fix(words={str(path): str(typed), os.path.relpath(path): os.path.relpath(run)}))


def find_tokenizer_folder(start: Path) -> Path:
    """Return the tokenizer's folder of a checkpoint or Hugging Face folder, which may lack it."""
    return start if is_hf_folder(start) else start / "tokenizer"


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest checkpoint of run `path`. Raises `UserError`: `path`
    is neither, or the manifest is damaged."""
    if not (path / CHECKPOINTS_FOLDER).is_dir():
        check_folder_kind(path, (CHECKPOINT_KIND, RUN), "a checkpoint or a run")
        read_manifest(path, CHECKPOINT_KIND)
        return path
    # If the newest checkpoint is damaged, raise: an older one would silently measure or export other weights.
    newest = latest_checkpoint(path / CHECKPOINTS_FOLDER)
    if newest is None:
        raise UserError(f"{path}: this run has no complete checkpoint yet")
    problem = find_manifest_damage(newest)
    if problem is not None:
        earlier = _find_sound_checkpoint(newest)
        fix = Fix(words={str(path): str(earlier)}) if earlier else None
        raise UserError(f"{problem}; {suggest_replacement(newest)}", fix)
    return newest


def read_checkpoint_settings(path: Path) -> RunConfig:
    """Read a checkpoint's settings and check its model config. Raises `UserError`: the manifest is damaged or
    its settings are invalid."""
    # Read the manifest, not RUN/config.json: the run's settings may have changed since.
    raw = read_manifest(path, CHECKPOINT_KIND).settings
    try:
        settings = from_dict(raw)
        problems = [problem.sentence for problem in settings.model.problems()]
    except UserError as e:
        problems = [" ".join(str(e).split())]
    if problems:
        raise UserError(f"{path / MANIFEST}: its settings cannot be used ({'; '.join(problems)}); "
                        "if another version of megatron-sov wrote it, export it with that version")
    return settings


@dataclass(frozen=True)
class AdapterBase:
    """Reference from an adapter checkpoint to the checkpoint with its frozen weights."""

    path: Path
    sha256: str
    """Hash of the base's manifest, which contains all file hashes."""

    def to_dict(self) -> dict[str, str]:
        return {"path": str(self.path), "sha256": self.sha256}

    @staticmethod
    def from_checkpoint(path: Path) -> "AdapterBase":
        return AdapterBase(path.resolve(), manifest_sha256(path))


def read_adapter_base(path: Path) -> AdapterBase | None:
    """Read the `AdapterBase` from an adapter checkpoint; None for full weights. Raises `UserError`: the
    manifest is damaged."""
    record = read_manifest(path, CHECKPOINT_KIND).content.get(BASE)
    return None if record is None else AdapterBase(Path(record["path"]), record["sha256"])


def check_adapter_settings(path: Path, lora: LoraConfig, model: ModelConfig) -> None:
    """Raise `UserError` if the adapter was trained with other LoRA settings, for example alpha."""
    ours = adapter_identity(lora, model)
    for name, theirs in adapter_identity(read_checkpoint_settings(path).lora, model).items():
        if theirs != ours.get(name):
            raise UserError(f"{path}: is an adapter with lora.{name} = {theirs}, not {ours.get(name)}; use "
                            "its own settings, or merge it with `megatron-sov convert to-hf`",
                            Fix(options=("--set", f"lora.{name}={json.dumps(theirs)}")))


def find_adapter_base(path: Path, base: AdapterBase) -> Path:
    """Find the base folder of the adapter `path` by manifest hash. Raises `UserError`: the folder is missing
    or contains another checkpoint."""
    # A rollback renames bases (`delete_checkpoints_after`), so the folder may have moved; the hash identifies
    # it.
    renamed = base.path.parent.glob(f"{ROLLED_BACK}{base.path.name}*")
    candidates = [folder for folder in (base.path, *sorted(renamed)) if (folder / MANIFEST).is_file()]
    for candidate in candidates:
        if manifest_sha256(candidate) == base.sha256:
            return candidate
    if not candidates:
        raise UserError(f"{path}: is an adapter of {base.path}, which is not there; "
                        "restore that folder from a copy")
    raise UserError(f"{path}: is an adapter of {base.path}, which has become another checkpoint since "
                    "(its manifest's hash differs, as that of every new conversion does); restore it from "
                    "a copy")


def protect_adapter_base(base: Path) -> None:
    """Write `base-of-adapters.txt` into an adapter's base to protect the checkpoint from pruning.

    Only checkpoints inside a run need it. If the folder is read-only, warn.
    """
    if base.parent.name != CHECKPOINTS_FOLDER or (base / ADAPTER_BASE_MARKER).exists():
        return
    try:
        write_atomically(base / ADAPTER_BASE_MARKER,
                     "An adapter uses this checkpoint as base, so its run does not prune it.\n"
                     "When no adapter needs it any more, delete this file.\n")
    except (OSError, UserError) as e:
        warn(f"{base}: an adapter needs this checkpoint, and the note for its run cannot be written ({e}); "
             "make sure that train.keep_checkpoints does not delete it")


def hash_checkpoint_files(start: Path) -> str:
    """Hash the file digests in a checkpoint's (or token folder's) manifest.

    Repeated conversion of a Hugging Face folder gives the same hash: creation time does not count. A Hugging
    Face folder itself (dry run) gives "".
    """
    if is_hf_folder(start):
        return ""
    manifest = read_manifest(start)
    facts = {"base": manifest.content.get(BASE, {}).get("sha256", ""),
             "files": {name: record.digest for name, record in sorted(manifest.files.items())}}
    return hashlib.sha256(format_json(facts).encode()).hexdigest()


def read_trained_tokens(path: Path) -> int:
    """Return the longest training context in tokens, earlier stages and imported models included. Raises
    `UserError`: `state.json` is damaged."""
    settings = read_checkpoint_settings(path)
    if settings.recipe == IMPORTED_RECIPE:
        return settings.model.max_position_tokens
    try:
        num_tokens = int(json.loads((path / STATE_FILE).read_text(encoding="utf-8")).get("trained_tokens", 0))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path / STATE_FILE}: is damaged ({e}); {suggest_replacement(path)}") from None
    # Earlier versions did not write trained_tokens.
    return num_tokens or max(phase.seq_len for phase in settings.data.phases)


def find_manifest_damage(path: Path) -> str | None:
    """Return a sentence if a checkpoint's manifest is missing or damaged, else None."""
    if not (path / MANIFEST).is_file():
        return f"{path / MANIFEST}: is missing"
    try:
        read_manifest(path, CHECKPOINT_KIND)
    except UserError as e:
        return str(e).partition(";")[0]
    return None


def find_damage(path: Path, *, rank: int = 0, size: int = 1, weights_only: bool = False) -> str | None:
    """Return a sentence about the first missing or changed file in a checkpoint, else None. Each of `size`
    processes checks the manifest and its share of the files. Raises `UserError`: a file cannot be read for a
    reason other than a disk error (EIO)."""
    problem = find_manifest_damage(path)
    if problem is not None:
        return problem
    files = read_manifest(path, CHECKPOINT_KIND).files
    # Sorted: all ranks split the same list, and a file is hashed by exactly one rank.
    names = sorted(name for name in files if not (weights_only and name.startswith(OPTIMIZER_FILES)))
    for name in names[rank::size]:
        try:
            problem = find_file_damage(path / name, files[name])
        except OSError as e:
            # EIO means lost bytes. Other errors (permissions, unmounted disk) say nothing about the file.
            if e.errno != errno.EIO:
                raise UserError(f"{path / name}: cannot be read ({e.strerror}); make the file "
                                "readable and start again") from e
            problem = f"{path / name}: cannot be read ({e.strerror})"
        if problem is not None:
            return problem
    return None


def suggest_replacement(path: Path) -> str:
    """Suggest a replacement for a damaged checkpoint: the previous sound one, or a copy."""
    earlier = _find_sound_checkpoint(path)
    if earlier is None:
        return "there is no checkpoint before it; restore it from a copy"
    return f"use the checkpoint before it, {earlier}"


def _find_sound_checkpoint(damaged: Path) -> Path | None:
    """Return the newest sound checkpoint before a damaged one."""
    step = damaged.name[5:]
    earlier = [path for number, path in _numbered_checkpoints(damaged.parent)
               if step.isdecimal() and number < int(step) and find_manifest_damage(path) is None]
    return earlier[-1] if earlier else None


def rename_damaged_checkpoint(path: Path) -> Path:
    """Rename a damaged checkpoint to `damaged-step-N`; return the new path."""
    return _rename_with_prefix(path, DAMAGED)


def _rename_with_prefix(path: Path, prefix: str) -> Path:
    """Rename a checkpoint to an unused name with a prefix; return the new path."""
    renamed = path.with_name(prefix + path.name)
    # The same step may have been damaged before: os.rename fails on a filled folder and replaces an empty
    # one.
    if renamed.exists():
        renamed = path.with_name(f"{prefix}{path.name}-{secrets.token_hex(4)}")
    with translate_disk_errors(path):
        os.rename(path, renamed)
        # Without fsync a power failure may restore the old name, and the next start would load the damage.
        fsync_path(path.parent)
    return renamed


def check_sound_checkpoint_exists(folder: Path) -> None:
    """Raise `UserError` if a run has only damaged checkpoints."""
    # Restarting from step 0 would look like a fresh run with the old run's events in its folder.
    damaged = sorted(p.name for p in folder.glob(f"{DAMAGED}*"))
    if damaged and not _numbered_checkpoints(folder):
        raise UserError(f"{folder}: no sound checkpoint is left ({', '.join(damaged)}); "
                        "restore one from a copy as step-N, or start a new --run")


def prune_checkpoints(folder: Path, keep: int, keep_every_steps: int = 0) -> None:
    """Delete complete checkpoints except the newest `keep` (0 keeps all), multiples of `keep_every_steps`,
    and adapter bases."""
    # Ignore incomplete checkpoints: they would displace a sound one from the newest `keep`.
    for path in list_complete(folder)[:-keep] if keep else []:
        is_multiple = keep_every_steps and checkpoint_step(path) % keep_every_steps == 0
        if not is_multiple and not (path / ADAPTER_BASE_MARKER).exists():
            _delete_checkpoint(path)
