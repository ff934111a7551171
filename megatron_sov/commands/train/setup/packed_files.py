"""Packs the files in --data into the run's folder, by the commands that a user would type:

    RUN/tokenizer/         `sov-tokenizer import` of the tokenizer of --from
    RUN/data/NAME/         `sov-data pack` of a file
    RUN/data/NAME.json     digests of the file and of the tokenizer, and the format: the shards are reused
                           while these are the same
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, format_json, translate_disk_errors, write_atomically
from megatron_sov.base.digests import hash_file
from megatron_sov.base.documents import KINDS, BadRecord, RecordReading, plan_units, read_span
from megatron_sov.base.documents.reading import format_location
from megatron_sov.base.documents.rows import fix_judged, fix_records
from megatron_sov.base.errors import Fix, UserError, choose_free_path, warn
from megatron_sov.base.hints.foreign import find_shards
from megatron_sov.base.hints.paths import fix_by_packing, fix_table
from megatron_sov.base.hints.table import load_table
from megatron_sov.model.config import split_weight
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.objectives import COMMAND_FORMATS
from megatron_sov.runs.folder import DATA, TOKENIZER, RunFolder, record_command
from megatron_sov.runs.launch_environment import is_first_rank, num_ranks
from megatron_sov.train.stages.shared_copies import digest_tokenizer
from megatron_sov.work.processes.children import run_command
from megatron_sov.work.progress.locks import critical_section

HELDOUT_SHARE = 0.02
"""Expected share of a file's documents in the held-out split, chosen by text hash."""
RESERVED_NAME = "tokenizer"
"""Source name that `sov-data pack` refuses: the tokenizer's folder has it."""
BEGUN = {"tokenizer": ""}
"""Record for an incomplete folder."""
PAIRS = "sov-data pairs"
"""Command that makes pairs of judged responses."""
PROGRAMS = {"sov-tokenizer": "tokenizer.cli", "sov-data": "data_prep.cli"}
"""Program -> module."""


@dataclasses.dataclass(frozen=True)
class FilePacking:
    """Conversion of the files in --data to token shards."""

    run: Path
    files: Sequence[DataFile]
    tokenizer: Path
    """Folder with the model's tokenizer."""
    dry_run: bool
    """Pack into a temporary folder, which is deleted when this process ends."""

    @property
    def arguments(self) -> set[str]:
        """Return the --data arguments that name files."""
        return {data_file.argument for data_file in self.files}

    def pack(self) -> dict[str, str]:
        """Import the tokenizer and pack the files that are missing in the run's folder.

        Returns:
            Argument of --data -> the argument that names the packed folder.

        Raises:
            UserError: a file has changed since the run began, or many processes would pack.
            SystemExit: a command failed, and printed why; or it was stopped.
        """
        records = {data_file: self._build_record(data_file) for data_file in self.files}
        stale = [data_file for data_file in self.files if data_file.recorded(self.run) != records[data_file]]
        packed = {data_file.argument: data_file.packed_argument(self.run) for data_file in self.files}
        if not stale:
            return packed
        if RunFolder(self.run).has_started():
            self._refuse_changed(stale, records)
        for folder in (self.run / TOKENIZER, *(data_file.shards(self.run) for data_file in stale)):
            _refuse_foreign(folder, self.run)
        commands = [self._import_command(self.run)]
        commands += [self._pack_command(self.run, data_file) for data_file in stale]
        if num_ranks(None) > 1:
            options = " ".join(f"--data {data_file.packed_argument(self.run)}" for data_file in stale)
            raise UserError(f"--data {stale[0].argument}: many processes would pack it at once; first run: "
                            f"{'; '.join(map(shlex.join, commands))}; and pass {options}")
        target = Path(tempfile.mkdtemp(prefix="packed-")) if self.dry_run else self.run
        if self.dry_run:
            atexit.register(shutil.rmtree, target, ignore_errors=True)
        with translate_disk_errors(self.run):
            (target / DATA).mkdir(parents=True, exist_ok=True)
        if not self.dry_run:  # from here on `megatron-sov resume RUN` continues after a kill
            record_command(self.run)
        print("\n".join(["packing --data by these commands:", *map(shlex.join, commands)]), flush=True)
        with critical_section(target / DATA):
            self._import(target)
            for data_file in stale:
                if data_file.recorded(target) != records[data_file]:  # a second process was faster
                    self._pack_file(target, data_file, records[data_file])
        return packed | {data_file.argument: data_file.packed_argument(target) for data_file in stale}

    def _build_record(self, data_file: DataFile) -> dict[str, str]:
        """Return the inputs of a file's shards: digests and format."""
        if not data_file.file.exists():
            return data_file.recorded(self.run)
        return {"file": str(data_file.file.absolute()), "digest": hash_file(data_file.file),
                "format": data_file.format, "tokenizer": digest_tokenizer(self.tokenizer)}

    def _refuse_changed(self, stale: Sequence[DataFile], records: dict[DataFile, dict[str, str]]) -> None:
        """Raise `UserError` if a file, or the tokenizer, has changed since the run packed the file."""
        for data_file in stale:
            recorded = data_file.recorded(self.run)
            if recorded.get("file") == records[data_file]["file"]:
                changed = f"tokenizer of {self.tokenizer}"
                if recorded.get("digest") != records[data_file]["digest"]:
                    changed = str(data_file.file)
                raise UserError(f"--data {data_file.argument}: {changed} has changed since {self.run} "
                                f"packed it; restore it, continue with {data_file.shards(self.run)} by "
                                f"`megatron-sov resume {shlex.quote(str(self.run))}`, or start a new --run")

    def _import_command(self, target: Path) -> list[str]:
        return ["sov-tokenizer", "import", str(self.tokenizer), "--output", str(target / TOKENIZER)]

    def _pack_command(self, target: Path, data_file: DataFile) -> list[str]:
        return ["sov-data", "pack", "--tokenizer", str(target / TOKENIZER), "--format", data_file.format,
                "--heldout", str(HELDOUT_SHARE), "--input", f"{data_file.name}={data_file.file}", "--output",
                str(data_file.shards(target))]

    def _import(self, target: Path) -> None:
        folder = target / TOKENIZER
        record = {"tokenizer": digest_tokenizer(self.tokenizer)}
        if not (folder / MANIFEST).is_file() or _read_record(folder) != record:
            write_atomically(_record_file(folder), format_json(BEGUN))
            _run(self._import_command(target), folder)
            write_atomically(_record_file(folder), format_json(record))

    def _pack_file(self, target: Path, data_file: DataFile, record: dict[str, str]) -> None:
        shards = data_file.shards(target)
        write_atomically(_record_file(shards), format_json(BEGUN))
        _run(self._pack_command(target, data_file), shards)
        write_atomically(_record_file(shards), format_json(record))


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A --data argument, [NAME=]FILE[:weight], that names a file."""

    argument: str
    name: str
    """Name of the source and of its folder in RUN/data."""
    file: Path
    is_renamed: bool
    """Whether NAME was typed."""
    weight: str
    """Typed text, with its colon; "": not typed."""
    format: str = ""
    """Record format; "": the file was deleted after packing."""

    def shards(self, run: Path) -> Path:
        """Return the packed file's folder."""
        return run / DATA / self.name

    def packed_argument(self, run: Path) -> str:
        prefix = f"{self.name}=" if self.is_renamed else ""
        return f"{prefix}{self.shards(run)}{self.weight}"

    def recorded(self, run: Path) -> dict[str, str]:
        """Return the record of the packed file; empty: not packed completely."""
        shards = self.shards(run)
        return _read_record(shards) if (shards / MANIFEST).is_file() else {}


def find_files(data: Sequence[str], run: Path, formats: Sequence[str],
               tokenizer: Path | None = None) -> list[DataFile]:
    """Return the --data arguments that name a file, or a deleted file that `run` has packed.

    `formats` are those that the command learns from; proposed commands name `tokenizer`. Raises `UserError`:
    two files have the same name, a weight is not a number, or the first record of a file has another format.
    """
    files: dict[str, DataFile] = {}
    for argument in data:
        path = split_weight(argument, f"--data {argument}")[0]
        name, typed = split_source_name(path)
        stem = Path(typed.removesuffix(".gz").removesuffix(".zst")).stem
        stem = re.sub(r"[^\w.-]+", "-", stem).lstrip(".-")
        if stem in ("", RESERVED_NAME):
            stem = "data"
        data_file = DataFile(argument, name or stem, Path(typed), bool(name), argument.removeprefix(path))
        was_packed = data_file.recorded(run).get("file") == str(data_file.file.absolute())
        if not data_file.file.is_file() and (data_file.file.exists() or not was_packed):
            continue
        suffix = data_file.file.suffix.lower()
        rows = load_table()["refused_files"].items()
        if refusal := next((text for names, text in rows if suffix in names.split()), ""):
            shards = find_shards(str(data_file.file.with_suffix(""))) if suffix in (".bin", ".idx") else ""
            fix = fix_table(data_file.file)
            if shards and Path(shards).is_dir():
                fix = Fix(words={typed: shards})
            raise UserError(f"--data {argument}: {refusal}", fix)
        if data_file.name in files:
            other = f"{data_file.name}2={typed}"
            raise UserError(f"--data {argument}: has the same name {data_file.name!r} as --data "
                            f"{files[data_file.name].argument}; rename one, e.g. --data {shlex.quote(other)}",
                            Fix(words={path: other}))
        if data_file.file.exists():
            kind = _detect_format(data_file.file, formats, tokenizer)
            data_file = dataclasses.replace(data_file, format=kind)
        files[data_file.name] = data_file
    return list(files.values())


def list_packable_formats(objective: str) -> list[str]:
    """Return the record formats that an objective's command packs, the preferred format first."""
    if objective == "preference":  # chats can only be added to packed pairs
        return ["preference"]
    return [name for name in COMMAND_FORMATS[objective] if name in KINDS] or ["text"]


def warn_of_changed_files(run: Path, folders: Iterable[str]) -> None:
    """Warn about files that changed after `run` packed them into `folders` ([NAME=]DIR)."""
    for path in folders:
        shards = Path(split_source_name(path)[1])
        record = _read_record(shards) if shards.absolute().parent == (run / DATA).absolute() else {}
        file = Path(record.get("file", ""))
        if file.is_file() and hash_file(file) != record.get("digest") and is_first_rank():
            warn(f"{file}: has changed since {run} packed it; the run continues with {shards}")


def _run(command: Sequence[str], output: Path) -> None:
    """Run a command from `PROGRAMS` that writes `output`, in a new process."""
    program, *words = command
    overwrite = ["--overwrite"] if output.exists() else []
    if code := run_command([PROGRAMS[program], *words, *overwrite], "the same command continues"):
        if words[0] == "pack":  # whose error may name an option of its own
            print("options of `sov-data pack`: run it yourself, as above with another --output, and pass "
                  "that folder as --data", file=sys.stderr)
        raise SystemExit(code)


def _refuse_foreign(folder: Path, run: Path) -> None:
    """Raise `UserError` if an output folder or its record exists and does not belong to the run."""
    record = _record_file(folder)
    if (folder.exists() or record.exists()) and not _read_record(folder):
        existing = folder if folder.exists() else record
        raise UserError(f"{existing}: was not made by a run in {run}, which would replace it; choose a "
                        "different --run, or move it away")


def _record_file(folder: Path) -> Path:
    """Return the record's path for a folder with shards or with the tokenizer."""
    if folder.name == TOKENIZER:
        return folder.parent / DATA / f"{TOKENIZER}.json"
    return folder.with_name(f"{folder.name}.json")


def _read_record(folder: Path) -> dict[str, str]:
    """Return a folder's record; empty if there is no valid record."""
    try:
        record = json.loads(_record_file(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(record, dict) and "tokenizer" in record and all(
        isinstance(value, str) for value in record.values())
    return record if is_ours else {}


def _read_first_record(file: Path, reading: RecordReading) -> Any:
    """Return the first record of a file that is not empty, or its `BadRecord`; None for an empty file."""
    spans = next(iter(plan_units([file])), ())[:1]
    items = (item for span in spans for item in read_span(span, reading))
    return next((item for item in items if getattr(item, "code", "") != "empty"), None)


def _explain_judged(file: Path, location: str) -> UserError:
    """Build the error for responses with a label each: pairs of one prompt's responses, or the good ones."""
    begin = f"--data {location}: is a response judged on its own, and this command learns from pairs"
    if fix := fix_judged(file):
        return UserError(begin, fix)
    good = choose_free_path(f"{file.stem}-good.jsonl")
    program = "select((.label // .kto_tag) as $l | $l == true or $l == 1) | del(.label, .kto_tag)"
    return UserError(f"{begin}, but no prompt has two responses; TRL's KTOTrainer learns from such rows, "
                     "`megatron-sov sft` from the good responses",
                     Fix(command="sft", words={str(file): good}, left_out=("--method kto", "--method dpo"),
                         before=(f"jq -c '{program}' {shlex.quote(str(file))} > {shlex.quote(good)}",)))


def _detect_format(file: Path, formats: Sequence[str], tokenizer: Path | None) -> str:
    """Return the first format in `formats` that fits the file's first record; `UserError` if none fits."""
    faults: list[BadRecord] = []
    for kind in formats:
        first = _read_first_record(file, RecordReading(kind))
        if not isinstance(first, BadRecord):
            return kind  # also for an empty file, which `sov-data pack` refuses
        faults.append(first)
    # prefer a fault in a record with the right fields
    fault = next((fault for fault in faults if fault.code != "fields"), faults[0])
    location = format_location(file, fault, 0)
    for kind, (command, sentence) in load_table()["learned_by"].items():
        # `rl run` learns text next to its prompts; another command would not take its other options
        if fault.reason.startswith(f"is {kind},") and list(formats) != ["text"]:
            if kind == "a preference" and formats[0] == "chat" and tokenizer is not None:
                columns = ["--format", "chat", "--columns", "prompt=prompt,response=chosen"]
                raise UserError(f"--data {location}: {sentence}; sft learns the chosen responses as chats",
                                fix_by_packing(str(file), tokenizer, columns))
            raise UserError(f"--data {location}: {sentence}", Fix(command=command))
    if fault.reason.startswith("is a prompt,") and formats[0] in ("chat", "preference"):
        raise UserError(f"--data {location}: is a prompt without a response; `megatron-sov rl run` learns "
                        "from prompts and a reward (a chat has 'messages', or 'prompt' and 'completion')",
                        Fix(command="rl run", left_out=(f"--data {file}",),
                            options=("--prompts", str(file), "--reward", "math", "--store",
                                     choose_free_path("new-store"))))
    fix = None
    if PAIRS in fault.reason and formats[0] == "preference":
        raise _explain_judged(file, location)
    if fix := fix_records(file, fault.reason):
        raise UserError(f"--data {location}: {fault.reason}", fix)
    is_usable = bool(fault.options) and "FIELD" not in fault.options[-1] and "prompt" not in fault.options
    if is_usable and tokenizer is not None:
        form = () if "--format" in fault.options else ("--format", formats[0])
        fix = fix_by_packing(str(file), tokenizer, [*form, *fault.options])
    raise UserError(f"--data {location}: {fault.reason}; or pack it yourself "
                    "(`sov-data pack --help`), and pass the folder", fix)
