"""`megatron-sov resume RUN [ARGUMENTS]`: repeats the command that started a run, with --resume.

Settings and data come from RUN/config.json, other options from RUN/command.json; ARGUMENTS override both.
"""

import dataclasses
import itertools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_sov.base.command_line import Parser, check_arguments
from megatron_sov.base.errors import IS_CHECKING, ExitCode, Fix, UserError, choose_free_path
from megatron_sov.base.hints.lines import apply_fix
from megatron_sov.base.hints.table import load_table, normalize_word
from megatron_sov.base.plugins.loading import is_reference
from megatron_sov.base.settings import DeclaredCommand, Flag, read_options
from megatron_sov.commands import COMMANDS
from megatron_sov.commands.shared_options import list_option_words
from megatron_sov.commands.train.setup.stage_options import StageOptions
from megatron_sov.runs.folder import CONFIG, RunFolder, TypedCommand, read_command
from megatron_sov.runs.launch_environment import export_command, has_launcher, is_first_rank

TAKES_CODE = ("RECIPE", "--plugin", "--reward", "--environment")
"""Training options whose value may be FILE.py:NAME or MODULE:NAME."""
REPLACED = ("run", "resume", "recipe", "configs", "plugins", "data", "dry_run", "deterministic", "until")
"""Options whose values come from the run's folder."""


def resume_run(options: "ResumeOptions") -> int:
    """Repeat the command that started a run, and return its exit code."""
    folder, first = options.run.absolute(), read_command(options.run)
    name, parser = _build_parser(first)
    _check_checkpoint(options, first)
    _check_arguments(name, options, first)
    first_options = _parse_options(parser, [*first.words[len(name.split()):], "--resume"])
    resumed = _replace_by_folder(first_options, folder, first)
    _refuse_untyped_code(folder, first, list_option_words(resumed), options.arguments)
    words = [*list_option_words(dataclasses.replace(resumed, plugins=())), *options.arguments]
    current_folder = Path.cwd()
    if first.folder != current_folder and first.folder.is_dir():
        os.chdir(first.folder)  # base of the command's relative paths
        if is_first_rank() and not IS_CHECKING.get():
            print(f"resume: relative paths start at {first.folder}, where the run was started")
    try:
        if IS_CHECKING.get():
            check_arguments(parser.parse_args(words), COMMANDS[name].load())
            return ExitCode.OK
        if is_first_rank():
            print(f"resume: megatron-sov {name} {shlex.join(words)}", flush=True)
            for change in _list_changes(parser, first_options, _parse_options(parser, words)):
                print(f"resume: {change}", flush=True)
        export_command([*name.split(), *words])
        return int(COMMANDS[name].load().run(parser.parse_args(words)))
    except UserError as e:
        os.chdir(current_folder)
        if e.fix is None or "--from" not in e.fix.options:
            raise
        fix = dataclasses.replace(e.fix, options=(*e.fix.options, "--from", str(options.run), "--run",
                                                  choose_free_path(str(options.run))))
        raise UserError(e.sentence, _propose_new_run(options, first, current_folder, fix)) from None
    finally:
        if IS_CHECKING.get():
            os.chdir(current_folder)


@dataclass(frozen=True)
class ResumeOptions:
    """Continue a run."""

    run: Annotated[Path, Flag("RUN")]
    """Run folder."""
    arguments: Annotated[tuple[str, ...], Flag("ARGUMENTS", rest=True)] = ()
    """The original command's options, with new values: --nproc 4, --set train.steps=400, --dry-run."""


RESUME = DeclaredCommand(ResumeOptions, resume_run)


def _check_checkpoint(options: ResumeOptions, first: TypedCommand) -> None:
    """Raise `UserError` for another program's option that names a checkpoint, with the command of a new run
    from the checkpoint."""
    names, arguments = load_table()["which_checkpoint"].split(), list(options.arguments)
    index = next((i for i, word in enumerate(arguments) if word.startswith("--")
                  and normalize_word(word.partition("=")[0]) in names), None)
    if index is None:
        return
    has_value = index + 1 < len(arguments) and not arguments[index + 1].startswith("-")
    num_words = 2 if has_value and "=" not in arguments[index] else 1
    typed = " ".join(arguments[index:index + num_words])
    del arguments[index:index + num_words]
    step = re.search(r"(\d*)\D*\Z", typed)
    steps = {int(path.name[5:]): path for path in options.run.glob("checkpoints/step-*")}
    sentence = (f"{typed}: `megatron-sov resume` continues from the newest checkpoint, and a new run begins "
                f"with an earlier one (steps in {options.run}: {', '.join(map(str, sorted(steps)))})")
    start = steps.get(int(step[1] or 0)) if step else None
    line = Fix(f"megatron-sov resume {shlex.join([str(options.run), *arguments])}")
    if start is not None:
        line = _propose_new_run(dataclasses.replace(options, arguments=tuple(arguments)), first, Path.cwd(),
                                Fix(options=("--from", str(start))))
    raise UserError(sentence, line)


def _check_arguments(name: str, options: ResumeOptions, first: TypedCommand) -> None:
    """Raise `UserError` for unknown options and settings among the typed arguments, with a corrected line,
    and for options that cannot act on a run that exists."""
    parser = Parser(prog=f"megatron-sov resume {shlex.quote(str(options.run))}")
    COMMANDS[name].load().add_arguments(parser)
    for action in parser._actions:
        action.required = False
    typed = parser.parse_args(options.arguments)
    start, run = getattr(typed, "start_from", None), getattr(typed, "run", None)
    is_other_run = run is not None and Path(run).absolute() != options.run.absolute()
    if start is None and not is_other_run:
        return
    refused = [] if start is None else [f"--from {start}"]
    new_options = ["--from", str(start or options.run)]
    if is_other_run:
        refused.append(f"--run {run}")
        new_options += ["--run", str(run)]
    fix = Fix(options=tuple(new_options))
    raise UserError(f"{', '.join(refused)}: a resumed run goes on with its own weights in its own folder; a "
                    "new run begins with the weights of --from",
                    _propose_new_run(options, first, Path.cwd(), fix))


def _propose_new_run(options: ResumeOptions, first: TypedCommand, current_folder: Path, fix: Fix) -> Fix:
    """Return the first command with the typed arguments as a new run; `fix` has its --from and its --run, if
    they were typed."""
    words = [*first.words]
    if first.folder != current_folder:
        words = [_find_from(word, first.folder) for word in words]
    typed = [part for word in options.arguments
             for part in (word.split("=", 1) if word.startswith("--") else [word])]
    new_run = ["--run", choose_free_path(str(options.run))]
    dropped = [f"{option} {value}" for option, value in itertools.pairwise(words)
               if option in ("--until", "--inject")]
    line = apply_fix("megatron-sov", words, dataclasses.replace(
        fix, options=(*typed, *new_run, *fix.options), left_out=("--resume", *dropped)))
    return Fix(f"megatron-sov {shlex.join(line or words)}")


def _find_from(word: str, folder: Path) -> str:
    """Return a word [NAME=]PATH[:WEIGHT] with the path below `folder` if it exists there."""
    match = re.fullmatch(r"((?:[\w-]+=)?)([^/].*?)((?::[\d.]+)?)", word)
    if match and (folder / match[2]).exists():
        return f"{match[1]}{folder / match[2]}{match[3]}"
    return word


def _refuse_untyped_code(folder: Path, first: TypedCommand, words: list[str], arguments: Sequence[str]
                        ) -> None:
    """Raise `UserError` if `words` name code that only the run's folder mentions, neither the `first` command
    nor typed `arguments`: the folder may come from a stranger."""
    typed = {_make_code_absolute(word, first.folder) for word in arguments}
    needed = [[option, _make_code_absolute(word, first.folder)]
              for option, word in itertools.pairwise(["RECIPE", *words])
              if option in TAKES_CODE and is_reference(word)]
    config = RunFolder(folder).config()
    for code in () if config is None else config.code:
        if code.kind != "recipe" and ["--plugin", code.reference] not in needed:
            needed.append(["--plugin", code.reference])
    untyped = [code for _, code in needed if code not in typed]
    if not untyped:
        return
    fix = "the whole command with --resume"
    if all(option.startswith("-") for option, _ in needed):
        options = " ".join(map(shlex.join, needed))
        fix = f"`megatron-sov resume {shlex.quote(str(folder))} {options}`"
    raise UserError(f"{folder}: the run uses your code ({untyped[0]}), which the command line must name; "
                    f"type {fix}")


def _make_code_absolute(word: str, folder: Path) -> str:
    """Make FILE.py:NAME absolute; return other words unchanged."""
    file, colon, name = word.rpartition(":")
    return f"{folder / file}:{name}" if colon and file.endswith(".py") else word


def _build_parser(first: TypedCommand) -> tuple[str, Parser]:
    """Return name and parser of the command that started a run."""
    names = [name for name in (" ".join(first.words[:2]), *first.words[:1]) if name in COMMANDS]
    if not names:
        raise UserError(f"command {' '.join(first.words[:2])!r}: started the run and is not a command of "
                        "megatron-sov; repeat the whole command with --resume")
    parser = Parser(prog=f"megatron-sov {names[0]}")
    COMMANDS[names[0]].load().add_arguments(parser)
    if not issubclass(parser.get_default("options_class") or object, StageOptions):
        raise UserError(f"command {names[0]!r}: started the run and is not a training command; repeat it")
    return names[0], parser


def _parse_options(parser: Parser, words: list[str]) -> Any:
    return read_options(parser.get_default("options_class"), parser.parse_args(words))


def _replace_by_folder(options: Any, folder: Path, first: TypedCommand) -> Any:
    """Return the options with the run's current folder, and settings and data from config.json. An extension
    has no config.json: its stages are planned again from the typed options."""
    nproc = options.nproc
    if has_launcher():
        nproc = None
    elif nproc is None and first.processes > 1:
        nproc = first.processes
    options = dataclasses.replace(options, run=folder, resume=True, nproc=nproc, dry_run=False, inject=(),
                                  until=None)
    if not (folder / CONFIG).is_file():
        return options
    return dataclasses.replace(options, recipe=None, configs=(folder / CONFIG,), settings=(), data=(),
                               deterministic=False)


def _list_changes(parser: Parser, before: Any, now: Any) -> list[str]:
    """Describe the options that differ from the first command, a line per option."""
    lines = []
    names = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    for field in dataclasses.fields(now):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if field.name in REPLACED:
            continue
        if field.name == "settings":
            lines += [f"--set {text}" for text in new]
        elif new != old:
            lines.append(f"{names[field.name]} was {old}, is {new}")
    return lines
