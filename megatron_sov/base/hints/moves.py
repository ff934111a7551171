"""Options of a second command: command lines with the typed options, paths, models and token shards."""

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from megatron_sov.base.errors import choose_free_path
from megatron_sov.base.hints.commands import build_note_error, list_parsers, means_output, propose_pipeline
from megatron_sov.base.hints.kinds import classify_kind, classify_word
from megatron_sov.base.hints.lines import fill_placeholder
from megatron_sov.base.hints.missing import choose_placeholder, find_missing_row, split_positionals
from megatron_sov.base.hints.paths import pack_for
from megatron_sov.base.hints.rewriting import Rewrite, explain_unknown
from megatron_sov.base.hints.table import index_words, load_table, normalize_word
from megatron_sov.base.hints.values import find_value


def place_options(parser: argparse.ArgumentParser, rewrite: Rewrite) -> None:
    """Propose commands for the options in `rewrite.unplaced`, unknown to the typed command."""
    while rewrite.unplaced:
        option = next(iter(rewrite.unplaced))
        if _redirect_output(parser, rewrite, option) or _filter_input(rewrite, option):
            continue
        move = _choose_move(parser, rewrite, option)
        is_exact = move is not None and normalize_word(option) == normalize_word(move.taken[option])
        if not is_exact and _name_command(parser, rewrite, option):
            continue
        if move is None or not move.is_plausible(parser, rewrite):
            owner = "" if move is None or move.is_generic else move.parser.prog
            rewrite.add_words(explain_unknown(option, rewrite.unplaced.pop(option), owner))
            continue
        message = f"{', '.join(move.taken)}: `{move.parser.prog}` takes this"
        words = [word for typed, name in move.taken.items() for word in (name, *rewrite.unplaced.pop(typed))]
        source = load_table()["made_by"].get(move.parser.prog, "")
        if source in rewrite.options:
            _make_input(rewrite, message, source, words)
        else:
            without = f", without {shlex.join(move.dropped)}" if move.dropped else ""
            _add_lines(parser, rewrite, message + without, move.lines, move.follows(rewrite))


@dataclass
class _Move:
    """Command lines for options unknown to the typed command."""

    parser: argparse.ArgumentParser
    taken: Mapping[str, str]
    """Typed option -> option name in `parser`."""
    words: list[str] = field(default_factory=list)
    """Options and values."""
    arguments: dict[str, list[str]] = field(default_factory=dict)
    """Positional argument -> values; several values are several lines."""
    dropped: list[str] = field(default_factory=list)
    """Typed words left out."""
    num_lost: int = 0
    """Number of paths and texts in `dropped`."""
    num_missing: int = 0
    """Number of placeholders."""

    def __post_init__(self) -> None:
        self.positionals = {str(action.metavar or action.dest): action for action in self.parser._actions
                            if not (action.option_strings or isinstance(action, argparse._SubParsersAction))}

    def follows(self, rewrite: Rewrite) -> bool:
        """Return whether the command reads the run folder after the typed training command."""
        run = self.parser._option_string_actions.get("--run")
        return "--run" in rewrite.required and not (run and run.required)

    def is_plausible(self, parser: argparse.ArgumentParser, rewrite: Rewrite) -> bool:
        """Return whether the command lines hold all typed paths and texts, with few placeholders."""
        is_close = "--run" in rewrite.required or _is_sibling(self.parser, parser)
        is_source = load_table()["made_by"].get(self.parser.prog) in rewrite.options
        is_complete = self.num_lost == 0 and self.num_missing <= (1 if is_close else 0)
        return not self.is_generic and (is_source or is_complete)

    @property
    def is_generic(self) -> bool:
        """Whether many commands have the options."""
        return bool({*self.taken.values()} & {*load_table()["generic_options"].split()})

    def place_word(self, word: str, kind: str) -> None:
        """Write a typed path or text as the argument or option for paths of `kind`."""
        table = load_table()
        names = table["argument_kinds"].get(kind, "").split()
        name = next((name for name in self.positionals if name in names), "")
        options = [option for option in table["kind_options"].get(kind, table["kind_options"]["model"])
                   if option in self.parser._option_string_actions and option not in self.words]
        if name and (kind in ("run", "hf", "checkpoint") or name not in self.arguments):
            self.arguments.setdefault(name, []).append(word)
        elif options:
            self.words += [options[0], word]
        else:
            self.dropped.append(word)
            self.num_lost += 1

    def complete(self) -> None:
        """Write values or placeholders for missing arguments."""
        for name, action in self.positionals.items():
            if action.required and name not in self.arguments:
                self.num_missing += 1
                self.arguments[name] = [find_missing_row(self.parser.prog, name).get("write", name)]
        one_of = load_table()["one_of"].get(self.parser.prog, "").split()
        missing = [one_of] if one_of and not {one_of[0], f"{one_of[0]}s"} & {*self.words} else []
        missing += [[action.option_strings[0], choose_placeholder(action, self.parser.prog)]
                    for action in self.parser._actions if action.required and action.option_strings
                    and action.option_strings[0] not in self.words]
        for name, value in missing:
            self.words += [name, fill_placeholder(name, value)]
            if name not in ("--output", "--run", "--store", "--reward"):  # these have a default
                self.num_missing += 1

    @property
    def lines(self) -> list[str]:
        lines = [[self.parser.prog]]
        for name, action in self.positionals.items():
            values = self.arguments.get(name, [])
            groups = [values] if action.nargs in ("+", "*") else [[value] for value in values]
            lines = [[*line, *map(shlex.quote, group)] for line in lines for group in (groups or [[]])]
        return [" ".join([*line, shlex.join(self.words)]) for line in lines]


def _choose_move(parser: argparse.ArgumentParser, rewrite: Rewrite, option: str) -> _Move | None:
    """Return the command lines for `option`: most typed options and paths, fewest placeholders."""
    moves = dict[tuple[float, ...], _Move]()
    sources = load_table()["made_by"]
    for candidate in list_parsers().values():
        taken = {typed: name for typed, values in rewrite.unplaced.items()
                 if (name := _find_name(candidate, typed, values))}
        if candidate.prog == parser.prog or option not in taken:
            continue
        move = _write_move(parser, rewrite, _Move(candidate, taken))
        num_exact = sum(normalize_word(typed) == normalize_word(name) for typed, name in taken.items())
        trains = "--run" in rewrite.required and not move.follows(rewrite) and move.num_lost == 0
        num_placed = sum(map(len, move.arguments.values()))
        is_source = sources.get(candidate.prog) in rewrite.options
        score = (num_exact, len(taken), is_source, trains, -len(move.dropped), -move.num_missing,
                 _is_sibling(candidate, parser), num_placed)
        moves.setdefault(score, move)
    return moves[max(moves)] if moves else None


def _is_sibling(first: argparse.ArgumentParser, second: argparse.ArgumentParser) -> bool:
    """Return whether two commands are in one group: `eval ppl` and `eval lm`."""
    group = first.prog.split()[:-1]
    return len(group) > 1 and group == second.prog.split()[:-1]


def _write_move(parser: argparse.ArgumentParser, rewrite: Rewrite, move: _Move) -> _Move:
    """Write typed options and paths as words of `move`; after a training command only the run folder."""
    free_words, option_words = split_positionals(parser, rewrite.words)
    loose, names = [*rewrite.first, *free_words], move.parser._option_string_actions
    for typed, name in move.taken.items():
        values = rewrite.unplaced[typed]
        move.words += [name] if names[name].nargs == 0 else [name, *values]
        loose += values if names[name].nargs == 0 else []
    if move.follows(rewrite):
        move.place_word(find_value(option_words, "--run") or "RUN", "run")
        option_words = loose = []
    by_kind = load_table()["kind_options"]
    starts = [n for n, word in enumerate(option_words) if word.startswith("--")]
    for start, end in pairwise([*starts, len(option_words)]):
        name, equals, value = option_words[start].partition("=")
        values = [*([value] if equals else ()), *option_words[start + 1:end]]
        options = by_kind.get(classify_kind(values[0]), []) if values and os.path.exists(values[0]) else []
        fits = name == next((option for option in options if option in names), name)
        is_path = any(name in options for options in by_kind.values())
        if name in names and name not in move.words and (fits or not is_path):
            move.words += [name, *values]
        elif is_path:
            loose += values
        else:
            move.dropped += [name, *values]
    for word in loose:
        move.place_word(word, classify_kind(word))
    move.complete()
    return move


def _add_lines(parser: argparse.ArgumentParser, rewrite: Rewrite, message: str, lines: Sequence[str],
               follows: bool) -> None:
    """Write command lines after the typed training command, or replace the typed command."""
    rewrite.add_words(f"{message}, after the training" if follows else message)
    if not follows:
        rewrite.line = "\n  ".join(lines)
    elif not parser.prog.startswith("submit"):  # the job runs later
        rewrite.after += lines


def _make_input(rewrite: Rewrite, message: str, source: str, options: Sequence[str]) -> None:
    """Pack the file in --data, or train the missing --tokenizer, with `options` of `sov-data pack`."""
    path, text = find_value(rewrite.words, source), find_value(rewrite.words, "--input")
    if source == "--data" and classify_word(path or ".") in ("data", "folder") and path:
        packing = pack_for(rewrite.command, rewrite.words, path, options)
        rewrite.add_words(f"{message}, before")
        rewrite.before += packing.before
        rewrite.replace_word(path, packing.words[path])
    elif source == "--tokenizer" and not path and text:
        output = choose_free_path(f"{Path(text).name.partition('.')[0]}-tokenizer")
        preset = [] if "--preset" in options else ["--preset", "solar-open"]
        training = ["sov-tokenizer", "train", *preset, *options, "--input", text, "--output", output]
        rewrite.before.append(shlex.join(training))
        rewrite.add_words(f"{message}, before", "--tokenizer", output)
    else:
        rewrite.add_words(f"{message}, which made {path or source}; leave it out")


def _redirect_output(parser: argparse.ArgumentParser, rewrite: Rewrite, option: str) -> bool:
    """Redirect the printed text to the file in `option`; return whether the command only prints."""
    file = "".join(rewrite.unplaced[option][:1])
    names = {*parser._option_string_actions, *rewrite.positionals}
    if not file or not means_output(option) or {"--output", "--run", "OUT"} & names:
        return False
    del rewrite.unplaced[option]
    needs_json = file.endswith(".json") and "--json" in names and "--json" not in rewrite.words
    rewrite.add_words(f"{option}: `{parser.prog}` prints; the shell writes to a file",
                      *(["--json"] if needs_json else ()))
    rewrite.output = file
    return True


def _filter_input(rewrite: Rewrite, option: str) -> bool:
    """Run a pipeline before `sov-data pack` if `option` names a pipeline step; return whether it does."""
    source = find_value(rewrite.words, "--input")
    if rewrite.command != "sov-data pack" or not _list_steps(option) or not source:
        return False
    step_options = {name: _list_steps(name) for name in rewrite.unplaced if _list_steps(name)}
    words = [word for name in step_options for word in (name, *rewrite.unplaced.pop(name))]
    names = ",".join(step for steps in step_options.values() for step in steps[:1])
    error = propose_pipeline("run", ["--input", source, "--steps", names, *words])
    assert error and error.fix
    rewrite.add_words(f"{', '.join(step_options)}: {error.sentence.partition(': ')[2]}")
    rewrite.before += [*error.fix.before, error.fix.line]
    rewrite.replace_word(source, f"web={shlex.split(error.fix.line)[-1]}/text/web")
    return True


def _list_steps(option: str) -> list[str]:
    """Return the pipeline steps, or the steps with a setting, for an option of another program."""
    word, index = normalize_word(option), index_words("steps")
    is_step = word in load_table()["steps"] or any("." not in step for step in index.get(word, ()))
    return [word] if is_step else [key.partition(".")[0] for key in index if key.partition(".")[2] == word]


def _name_command(parser: argparse.ArgumentParser, rewrite: Rewrite, option: str) -> bool:
    """Propose the command for an option with a command's name, `sft --merge`; return whether a row exists."""
    table, follows = load_table(), "--run" in rewrite.required
    rows = {**table["commands"].get(parser.prog.split()[0], table["commands"]["megatron-sov"]),
            **table["option_commands"]["*"], **table["option_commands"].get(parser.prog, {})}
    notes = {normalize_word(word): note for words, note in rows.items() for word in words.split()}
    note = notes.get(normalize_word(option), "")
    if named := list_parsers().get(f"megatron-sov {normalize_word(option)}"):
        move = _write_move(parser, rewrite, _Move(named, {}))
        if named.prog != parser.prog and follows and move.num_missing <= 1:
            del rewrite.unplaced[option]
            _add_lines(parser, rewrite, f"{option}: is the command `{named.prog}`", move.lines, follows)
            return True
    template = note.split("`")[1] if "`" in note else ""
    if template.startswith(f"{parser.prog} "):
        del rewrite.unplaced[option]
        meaning = note.split("`")[2].strip()
        rewrite.add_words(f"{option}: the command {meaning} without an option; leave it out")
        return True
    holes = ["MODEL", "FOLDER", *table["argument_kinds"]["run"].split()]
    if not ({*template.split()} & {*holes} or "{first}" in template):
        return False
    options = [name for name in rewrite.unplaced if notes.get(normalize_word(name)) == note]
    values = [value for name in options for value in rewrite.unplaced.pop(name)]
    model = find_value(rewrite.words, "--run") or next(
        filter(os.path.exists, [*rewrite.first, *rewrite.words]), "RUN")
    if "{first}" in note:
        fix = build_note_error("", note, [model, *values]).fix
        lines, command = [*fix.before, fix.line] if fix else [], ""
    else:
        output = values[0] if values else choose_free_path(f"{Path(model).name}-hf")
        values_by_hole = {**dict.fromkeys(holes, model), "OUT": output}
        words = [values_by_hole.get(word, word) for word in shlex.split(template)]
        command = f" `{' '.join(words[:3])}`"
        lines = [shlex.join(fill_placeholder(name, word) for name, word in pairwise(["", *words]))]
    text = re.sub(r":?\s*`[^`]*`", lambda match: command, note, count=1).strip()
    _add_lines(parser, rewrite, f"{', '.join(options)}: {text}", lines, follows)
    return True


def _find_name(parser: argparse.ArgumentParser, option: str, values: Sequence[str]) -> str:
    """Return the parser's option with the name of `option`, or with its meaning in `words.yaml`."""
    word, actions = normalize_word(option), parser._option_string_actions
    names = (f"--{word.replace('_', '-')}", *index_words("options").get(word, ()))
    return next((name for name in names if name in actions and (values or actions[name].nargs == 0)), "")
