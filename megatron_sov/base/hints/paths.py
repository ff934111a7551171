"""Faults of paths in a command line: missing files, and files or folders of the wrong kind."""

import contextlib
import csv
import glob
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sov.base.errors import Fix, UserError, choose_free_path, fix_missing
from megatron_sov.base.hints.foreign import MAX_BYTES, find_shards, parse_object, read_merge
from megatron_sov.base.hints.kinds import (
    DATA_SUFFIXES, classify_folder, find_only_folder, list_run_tokenizers)
from megatron_sov.base.hints.table import load_table, normalize_word
from megatron_sov.base.hints.values import find_value, pair_words

MAX_FILES = 8
"""Largest number of files for which a pattern is written out."""
DATA_OPTIONS = ("--data", "--prompts", "--input", "--validation")
INPUT_OPTIONS = (*DATA_OPTIONS, "--from", "--tokenizer", "--teacher", "--reference", "--base")
_SHARD_COMMANDS = ("stats", "verify", "sample", "mix", "inspect")
"""Commands of sov-data whose arguments are folders of token shards."""
_FIELDS = ("columns", "text", "prompt", "chosen", "rejected", "response")
"""Words for fields of records in options."""
_TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".xls", ".ods")
_PLACEHOLDER = re.compile(r"[A-Z]+(?:_[A-Z]+)*(?:\.[a-z]+)?")


def find_path_faults(program: str, line: Sequence[str], typed: Sequence[str] = ()
                     ) -> Iterator[tuple[str, UserError]]:
    """Yield (path as typed, its fault) for the paths of a command line; `typed` may name a tokenizer that the
    line does not take."""
    if program == "sov-data" and line and line[0] in _SHARD_COMMANDS:
        for path in line[1:]:
            if os.path.isfile(path) and path.endswith(DATA_SUFFIXES):
                yield path, _ask_for_packing(path, [*typed, *line], "is a file of records", [])
    if program == "sov-data" and line[:1] == ["run"] and len(line) > 1 and (
            os.path.isfile(line[1]) and line[1].endswith(DATA_SUFFIXES)):
        pipeline = choose_free_path("pipeline.yaml")
        yield line[1], UserError(f"{line[1]}: is a file of records, and a pipeline names it with its steps",
                                 Fix(words={line[1]: pipeline},
                                     before=(write_pipeline(pipeline, line[1], {"exact_dedup": ""}),)))
    if line[:2] == ["convert", "from-megatron"] and classify_folder(Path("".join(line[2:3]))) == "hf":
        yield line[2], UserError(f"{line[2]}: is a Hugging Face folder; `convert from-hf` reads it",
                                 Fix(command="convert from-hf"))
    if line[:1] == ["convert"] and len(line) > 3 and not os.path.exists(line[2]) and (
            classify_folder(Path(line[3])) in ("hf", "run", "checkpoint")):
        yield line[2], UserError(f"convert: {line[2]} and {line[3]} are swapped; the model comes first",
                                 Fix(words={line[2]: line[3], line[3]: line[2]}))
    for path in line[2:3] if line[:2] in (["ssp", "fuse"], ["convert", "average"]) else ():
        if models := read_merge(Path(path)):
            output = find_value(line, "--output") or next(iter(line[3:]), choose_free_path("merged"))
            fuse = shlex.join(["megatron-sov", "ssp", "fuse", *models, "--output", output])
            yield path, UserError(f"{path}: is a mergekit file; its models are arguments here, and their "
                                  "weighted mean is written", Fix(fuse))
    model, data = Path(find_value(line, "--from")), Path(find_value(line, "--data"))
    if classify_folder(model) == "tokens" and classify_folder(data) in ("hf", "run", "checkpoint", "peft"):
        yield str(model), UserError(f"--from {model}, --data {data}: are swapped; --from takes a model",
                                    Fix(options=("--from", str(data), "--data", str(model))))
        return
    for option, value in pair_words(line):
        path = re.sub(r"(?<=.):[\d.]+\Z", "", value)  # FOLDER:WEIGHT -> FOLDER; ":1" alone stays
        if "=" in path and not os.path.exists(path):
            path = path.partition("=")[2]  # NAME=FOLDER -> FOLDER
        # another option, or a placeholder copied from the documentation: RUN, DATA_DIR, FILE.jsonl
        if value.startswith("-") or _PLACEHOLDER.fullmatch(path):
            continue
        fault = None
        if line[0] == "pack" and os.path.isfile(f"{path}.idx"):
            fault = UserError(f"{option} {path}: is data of Megatron-LM; `sov-data adopt` takes it over",
                              Fix(command="adopt", arguments=(path,), left_out=(f"{option} {path}",)))
        elif os.path.basename(path) == "dataset_info.json" and os.path.isfile(path):
            settings = parse_object(Path(path).read_text(encoding="utf-8")).items()
            files = [name for key, name in settings if key.endswith("file_name")] or ["FILE.jsonl"]
            fault = UserError(f"{option} {path}: lists the files {', '.join(files)}; pass one of them",
                              Fix(words={path: os.path.join(os.path.dirname(path), files[0])}))
        elif option in INPUT_OPTIONS:
            fault = _find_input_fault(program, [*line, *typed], option, path)
        elif option == "--run" and program == "megatron-sov":
            fault = _find_output_fault(path)
        elif option == "--store" and (kind := load_table()["kinds"].get(classify_folder(Path(path)))):
            fault = UserError(f"--store {path}: is {kind}; name a new folder",
                              Fix(options=("--store", choose_free_path("new-store"))))
        if fault is not None:
            yield path, fault


def _find_input_fault(program: str, line: Sequence[str], option: str, path: str) -> UserError | None:
    """Return the fault of the input `path` of an option: missing, a table, or of a kind that the command does
    not read; None: no fault, or one without a fix, which the command reports itself."""
    source = Path(path)
    prefix = re.sub(r"\.(bin|idx)\Z", "", path)
    if program == "megatron-sov" and os.path.isfile(f"{prefix}.idx") and find_shards(prefix) == prefix:
        adoption = fix_by_packing(prefix, Path(_choose_tokenizer(line)), [])
        return UserError(f"{option} {path}: is data of Megatron-LM; `sov-data adopt` takes it over",
                         replace(adoption, words={path: adoption.words[prefix]}))
    if not os.path.exists(source):
        return _find_missing_input(option, path)
    is_pack = line[0] == "pack"
    takes_text = is_pack or line[0] in ("train", "pretrain", "extend")
    has_columns = bool({"--format", "--text-field", "--columns"} & {*line})
    is_table = os.path.isfile(source) and source.suffix.lower() in _TABLE_SUFFIXES
    form = choose_pack_options(source) if is_table and takes_text and not has_columns else []
    if is_table and (table := fix_table(source, form)):
        options = form if is_pack and "--format" in form else []
        return UserError(f"{option} {path}: is a table; JSON lines or Parquet are read",
                         replace(table, options=tuple(options)))
    description = load_table()["kinds"].get(classify_folder(source), "")
    if description and option in ("--prompts", "--input", "--validation"):
        kind = "prompt" if option == "--prompts" else "text"
        files = list_records(kind) or list_records("chat") or ["FILE.jsonl"]
        return UserError(f"{option} {path}: is {description}; pass a file of records or text",
                         Fix(options=(option, files[0])))
    return _find_unpacked_data(line, path) if option == "--data" and program == "megatron-sov" else None


def _find_missing_input(option: str, path: str) -> UserError | None:
    """Return the fault of a path that does not exist, if a fix is known."""
    fix: Fix | None
    if files := sorted(glob.glob(path)):
        is_short = option == "--input" and len(files) <= MAX_FILES
        fix = Fix(options=(option, *files)) if is_short else Fix(words={path: os.path.dirname(path) or "."})
        return UserError(f"{option} {path}: is a pattern in quotes; pass the folder, or leave them off", fix)
    if "\\" in path and (local := _find_windows_path(path)):
        return UserError(f"{option} {path}: is a path of Windows; name it as this system does",
                         Fix(words={path: local}))
    fix = fix_missing(path, is_data=option in DATA_OPTIONS)
    if classify_folder(Path(path).parent) == "tokens":
        fix = Fix(words={path: str(Path(path).parent)})
    if fix is None:
        return None
    # a fix with commands downloads the data set; any other fix names a similar path that exists
    hint = "download it first" if fix.before else "take the one of a similar name"
    return UserError(f"{option} {path}: does not exist; {hint}", fix)


def _find_unpacked_data(line: Sequence[str], path: str) -> UserError | None:
    """Return the fault of a --data of megatron-sov that is neither token shards nor packed by the command."""
    source, kind = Path(path), classify_folder(Path(path))
    if source.name == "manifest.json" and classify_folder(source.parent) == "tokens":
        return UserError(f"--data {path}: is the manifest of token shards; pass their folder",
                         Fix(words={path: str(source.parent)}))
    if kind == "tokens":
        return None
    if description := load_table()["kinds"].get(kind):
        return UserError(f"--data {path}: is {description}; pass token shards or a file of records",
                         Fix(options=("--data", find_only_folder("tokens") or "DIR")))
    options = load_table()["pack_options"].get(line[0], [])
    if os.path.isdir(source) and any(
            name.endswith(DATA_SUFFIXES) for name in os.listdir(source) if name != "manifest.json"):
        return _ask_for_packing(path, line, "is a folder of text", options, "--data ")
    # training commands pack a file themselves; `eval` and `plan` need token shards, `eval media` reads rows
    needs_shards = (line[0] in ("eval", "plan") and "media" not in line[:2]) or line[1] == "states"
    if needs_shards and os.path.isfile(source) and source.name.endswith(DATA_SUFFIXES):
        part = " (eval reads held-out documents: --heldout 0.5 holds out half)" if line[0] == "eval" else ""
        return _ask_for_packing(path, line, f"is a file{part}", options, "--data ")
    return None


def _find_windows_path(path: str) -> str:
    """Return the longest end of a Windows path that exists here, else its place in WSL."""
    drive, _, path_in_drive = path.rpartition(":")
    parts = path_in_drive.strip("\\").split("\\")
    ends = [os.path.join(*parts[start:]) for start in range(len(parts))]
    return next(filter(os.path.exists, ends), f"/mnt/{drive.lower()}/{ends[0]}" if drive else "")


def _ask_for_packing(path: str, line: Sequence[str], what: str, options: Sequence[str], option: str = ""
                     ) -> UserError:
    form = choose_pack_options(Path(path)) if os.path.isfile(path) else []
    return UserError(f"{option}{path}: {what}; pack it first",
                     fix_by_packing(path, Path(_choose_tokenizer(line)), [*options, *form]))


def list_data(kind: str) -> list[str]:
    """Return the token shards, then the files of JSON lines, of a format in the current folder."""
    folders = []
    for path in filter(lambda path: classify_folder(path) == "tokens", sorted(Path().iterdir())):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # a damaged manifest
            content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["content"]
            if any(source["format"] == kind for source in content["sources"]):
                folders.append(path.name)
    return folders + list_records(kind)


def list_records(kind: str) -> list[str]:
    """Return the files of JSON lines in the current folder whose records `sov-data pack` reads as `kind`."""
    return [path.name for path in sorted(Path().glob("*.jsonl"))
            if _read_pack_options(path) == ["--format", kind]]


def choose_pack_options(file: Path) -> list[str]:
    """Return the options that `sov-data pack` needs for a file of records; []: none, or another file."""
    options = _read_pack_options(file)
    return [] if options == ["--format", "text"] else options


def _read_pack_options(file: Path) -> list[str]:
    """Return --format or --text-field by the first record of a file; []: no JSON lines or text table."""
    # not at the top: needed after a mistake only
    from megatron_sov.base.documents.layouts import convert_layout, propose_columns
    from megatron_sov.base.documents.messages import BadRecord
    from megatron_sov.base.documents.records import list_kinds

    separator = {".csv": ",", ".tsv": "\t"}.get(file.suffix.lower(), "")
    faults = (OSError, ValueError, AttributeError, TypeError, StopIteration, BadRecord, csv.Error)
    with contextlib.suppress(*faults), file.open(encoding="utf-8", newline="") as f:
        if separator:
            record = next(csv.DictReader(f, delimiter=separator))
        else:
            record = json.loads(f.readline(MAX_BYTES))
        if kinds := list_kinds(convert_layout(record, None)):
            return ["--format", kinds[0]]
        columns = propose_columns(record, "text").split()
        return columns if columns[1] in record else []
    return []


def fix_by_packing(path: str, tokenizer: Path, options: Sequence[str]) -> Fix:
    """Return the commands that pack a file, or adopt the prefix of an indexed dataset, after the import of a
    tokenizer that exists and is not ours."""
    commands = []
    is_ours = classify_folder(tokenizer) == "tokenizer" and os.path.isfile(tokenizer / "manifest.json")
    if os.path.exists(tokenizer) and not is_ours:
        imported = Path(choose_free_path(f"{tokenizer.name}-tokenizer"))
        commands.append(["sov-tokenizer", "import", str(tokenizer), "--output", str(imported)])
        tokenizer = imported
    shards = choose_free_path(f"{Path(path).name.partition('.')[0] or 'data'}-tokens")
    command = ["sov-data", "pack", "--tokenizer", str(tokenizer), "--input", path, *options]
    if os.path.isfile(f"{path}.idx"):
        command = ["sov-data", "adopt", path, "--tokenizer", str(tokenizer)]
    commands.append([*command, "--output", shards])
    return Fix(words={path: shards}, before=tuple(map(shlex.join, commands)))


def fix_columns(command: str, typed: Sequence[str]) -> Fix | None:
    """Return the command that packs the file in --data with the typed fields, for a training command, or the
    options of `sov-data pack`; None: no fields were typed."""
    file, fields = find_value(typed, "--data"), dict[str, str]()
    typed_fields = []
    for option, value in pair_words(typed):
        target = re.sub(r"_(column|field|key|col)s?\Z", "", normalize_word(option))
        is_own = command == "pack" and option in ("--columns", "--text-field")
        if option.startswith("--") and target in _FIELDS and not is_own:
            fields[target] = value
            typed_fields.append(f"{option} {value}")
    packs_itself = os.path.isfile(file) and command in ("pretrain", "extend", "sft", "prefer")
    if not fields or not (packs_itself or command == "pack"):
        return None
    text, columns = fields.pop("text", ""), fields.pop("columns", "")
    columns = ",".join(filter(None, [columns, *(f"{target}={name}" for target, name in fields.items())]))
    options = ["--columns", columns] if columns else ["--text-field", text]
    packing = pack_for(command, typed, file, options) if packs_itself else Fix(options=tuple(options))
    return replace(packing, left_out=tuple(typed_fields))


def pack_for(command: str, typed: Sequence[str], file: str, options: Sequence[str]) -> Fix:
    """Return the commands that pack a file for a command, with `options` of `sov-data pack`."""
    form = [] if "--format" in options else load_table()["pack_options"].get(command, [])
    return fix_by_packing(file, Path(_choose_tokenizer(typed)), [*form, *options])


def fix_address(word: str, program: str) -> Fix | None:
    """Return the command that downloads an address in a bucket or on the Hugging Face hub, and packs it for
    a `program` that reads shards; None for other words."""
    match = re.fullmatch(r"(?:(s3|gs)|hf|https?(?=://huggingface\.co/))://(?:huggingface\.co/)?(.+?)/?", word)
    if match is None:
        return None
    scheme, path = match[1], re.sub(r"/(?:blob|resolve|tree)/[^/]+", "", match[2])
    name, is_file = Path(path).name, path.endswith(DATA_SUFFIXES)
    if scheme:
        copies = {"s3": ("aws s3 sync", "aws s3 cp"), "gs": ("gcloud storage cp -r", "gcloud storage cp")}
        return Fix(words={word: name}, before=(f"{copies[scheme][is_file]} {shlex.join([word, name])}",))
    is_data = path.startswith("datasets/")
    owner, name, *parts = path.removeprefix("datasets/").split("/") if "/" in path else (path, path)
    file = ["/".join(parts)] if is_file else []
    kind = ["--repo-type", "dataset"] if is_data else []
    command = ["hf", "download", f"{owner}/{name}", *file, *kind, "--local-dir", name]
    local = "/".join([name, *parts])
    fix = Fix(words={word: local}, before=(shlex.join(command),))
    if program not in [f"sov-data {command}" for command in _SHARD_COMMANDS]:
        return fix
    packing = fix_by_packing(local, Path(_choose_tokenizer([])), [])
    return Fix(words={word: packing.words[local]}, before=(*fix.before, *packing.before))


def write_pipeline(file: str, source: str, steps: Mapping[str, str]) -> str:
    """Return the command that writes a pipeline file; `steps`: step -> its settings in YAML."""
    text = ["name: web", "sources:", f"  - {{name: web, path: {source}, kind: en}}", "steps:",
            *(f"  - {step}: {{{settings}}}" for step, settings in steps.items())]
    return f"printf '%s\\n' {shlex.join(text)} > {file}"


def fix_prompts(file: Path, faults: Iterable[str]) -> Fix | None:
    """Return the command that writes chats or pairs as prompts with answers; None for other faults."""
    programs = load_table()["prompts_by_jq"]
    program = next((programs[kind] for kind in programs for fault in faults if fault.startswith(kind)), "")
    target = choose_free_path(f"{file.stem}-prompts.jsonl")
    command = f"jq -c {shlex.quote(program)} {shlex.quote(str(file))} > {target}"
    return Fix(words={str(file): target}, before=(command,)) if program else None


def fix_table(file: Path, form: Sequence[str] = ()) -> Fix | None:
    """Return the commands that convert a spreadsheet or text table to Parquet; None for other files. `form`:
    its `choose_pack_options`; the column in --text-field becomes `text`."""
    suffix, target = file.suffix.lower(), str(file.with_suffix(".parquet"))
    if suffix not in _TABLE_SUFFIXES:
        return None
    is_text = suffix in (".csv", ".tsv")
    table = file if is_text else Path(f"{file.stem}.csv")
    commands = [] if is_text else [f"soffice --headless --convert-to csv {shlex.quote(str(file))}"]
    options = ", parse_options=c.ParseOptions('\\t')" if suffix == ".tsv" else ""
    renaming = f".select([{form[1]!r}]).rename_columns(['text'])" if "--text-field" in form else ""
    code = ("import pyarrow.csv as c, pyarrow.parquet as p; "
            f"p.write_table(c.read_csv({str(table)!r}{options}){renaming}, {target!r})")
    commands.append(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}")
    return Fix(words={str(file): target}, before=tuple(commands))


def _choose_tokenizer(line: Sequence[str]) -> str:
    """Return the tokenizer of the command's model, else the only one in the current folder, else DIR."""
    if typed := _find_typed_tokenizer(line):
        return typed
    # `--from MODEL`, or a positional argument as in `eval lm MODEL`
    words = [word for word in (find_value(line, "--from"), *line[:3]) if word]
    if run_tokenizers := [folder for word in words for folder in list_run_tokenizers(Path(word))]:
        return str(run_tokenizers[-1])
    model = next((word for word in words if os.path.isfile(Path(word) / "tokenizer.json")), "")
    return model or find_only_folder("tokenizer") or "DIR"


def _find_typed_tokenizer(typed: Sequence[str]) -> str:
    """Return the existing path after `--tokenizer`, or after another program's word for it; "": none."""
    names = {"tokenizer", *load_table()["options"]["--tokenizer"].split()}
    return next((value for option, value in pair_words(typed) if option.startswith("--")
                 and normalize_word(option) in names and os.path.exists(value)), "")


def use_typed_tokenizer(typed: Sequence[str], fix: Fix) -> Fix:
    """Return a fix whose commands train a tokenizer, with the typed tokenizer in its place."""
    tokenizer = _find_typed_tokenizer(typed)
    if not tokenizer or not fix.before or not fix.before[0].startswith("sov-tokenizer train "):
        return fix
    imports = fix_by_packing("", Path(tokenizer), []).before[:-1]
    ours = shlex.split(imports[-1])[-1] if imports else tokenizer
    trained = shlex.split(fix.before[0])[-1]
    pack = fix.before[-1].replace(f"--tokenizer {trained} ", f"--tokenizer {shlex.quote(ours)} ")
    return replace(fix, before=(*imports, pack))


def _find_output_fault(path: str) -> UserError | None:
    """Return the fault of a `--run` folder with other contents than a run."""
    folder, kinds = Path(path), load_table()["kinds"]
    content = kinds.get(classify_folder(folder), "")
    if content in ("", kinds["run"]):
        return None
    return UserError(f"--run {path}: is {content}; name a new folder",
                     Fix(options=("--run", choose_free_path(f"{folder.with_suffix('')}-run"))))
