"""Options that belong to another command: the line of that command, with the paths that the user typed."""

import argparse
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from megatron_sov.base.errors import choose_free_path
from megatron_sov.base.hints.commands import (
    build_note_error, list_parsers, means_output, propose_pipeline)
from megatron_sov.base.hints.kinds import classify_folder, classify_word
from megatron_sov.base.hints.lines import fill_placeholder
from megatron_sov.base.hints.missing import choose_placeholder, find_missing_row, split_positionals
from megatron_sov.base.hints.paths import pack_for
from megatron_sov.base.hints.rewriting import Rewrite, explain_unknown
from megatron_sov.base.hints.table import index_words, load_table, normalize_word
from megatron_sov.base.hints.values import find_value


def place_options(parser: argparse.ArgumentParser, rewrite: Rewrite) -> None:
    """Propose the commands that take `rewrite.unplaced`, options that the typed command does not have."""
    while rewrite.unplaced:
        option = next(iter(rewrite.unplaced))
        if _redirect_output(parser, rewrite, option) or _filter_input(rewrite, option):
            continue
        move = _choose_move(parser, rewrite, option)
        is_exact = move is not None and _is_same(option, move.taken[option])
        if not is_exact and _name_command(parser, rewrite, option):
            continue
        if move is None or move.taken[option] == "--tokenizer":  # the data and the model have theirs
            rewrite.add_words(explain_unknown(option, rewrite.unplaced.pop(option)))
            continue
        options = [word for typed, name in move.taken.items() for word in (name, *rewrite.unplaced.pop(typed))]
        message = f"{', '.join(move.taken)}: `{move.parser.prog}` takes this"
        source = load_table()["made_by"].get(move.parser.prog, "")
        if source in rewrite.options:
            _make_input(rewrite, message, source, options)
        else:
            _add_lines(rewrite, message, move)


@dataclass
class _Move:
    """Lines of another command that takes options which the typed command does not have."""

    parser: argparse.ArgumentParser
    taken: Mapping[str, str]
    """Typed option -> its name in the other command."""
    words: list[str] = field(default_factory=list)
    """Options of the lines, with their values."""
    arguments: dict[str, list[str]] = field(default_factory=dict)
    """Positional argument -> values; several values are several lines."""
    dropped: list[str] = field(default_factory=list)
    """Typed words without a place in the lines."""
    num_missing: int = 0
    """Placeholders in the lines."""

    def place_word(self, word: str, kind: str) -> None:
        """Write a typed path or text as the argument or option that takes its kind."""
        rows = load_table()
        for action in _list_arguments(self.parser):
            name = _get_name(action)
            values = self.arguments.setdefault(name, [])
            if name in rows["argument_kinds"].get(kind, "").split() and (not values or kind in ("run", "hf", "checkpoint")):
                values.append(word)
                return
        options = [name for name in rows["kind_options"].get(kind, rows["kind_options"]["model"])
                   if name in self.parser._option_string_actions and name not in self.words]
        if options:
            self.words += [options[0], word]
        else:
            self.dropped.append(word)

    def complete(self) -> None:
        """Write placeholders for missing arguments."""
        for action in self.parser._actions:
            name = _get_name(action)
            if action.option_strings and action.required and name not in self.words:
                value = choose_placeholder(action, self.parser.prog)
                self.words += [name, fill_placeholder(name, value)]
                self.num_missing += not name == "--output"
            elif not action.option_strings and action.required and not self.arguments.get(name):
                self.arguments[name] = [find_missing_row(self.parser.prog, name).get("write", name)]
                self.num_missing += 1
        option, _, value = load_table()["one_of"].get(self.parser.prog, "").partition(" ")
        if option and not {option, f"{option}s"} & {*self.words}:
            self.words += [option, value]
            self.num_missing += 1

    @property
    def lines(self) -> list[str]:
        lines = [[self.parser.prog]]
        for action in _list_arguments(self.parser):
            values = self.arguments.get(_get_name(action), [])
            if action.nargs in ("+", "*"):
                lines = [[*line, *map(shlex.quote, values)] for line in lines]
            elif values:
                lines = [[*line, shlex.quote(value)] for line in lines for value in values]
        return [" ".join([*line, shlex.join(self.words)]) for line in lines]


def _choose_move(parser: argparse.ArgumentParser, rewrite: Rewrite, option: str) -> _Move | None:
    """Return the lines of the command that takes `option`, and the most of the other typed words."""
    moves = dict[tuple[float, ...], _Move]()
    for other in list_parsers().values():
        taken = {typed: name for typed, values in rewrite.unplaced.items()
                 if (name := _find_name(other, typed, values))}
        if other.prog == parser.prog or option not in taken:
            continue
        move = _write_move(parser, rewrite, _Move(other, taken))
        num_exact = sum(_is_same(typed, name) for typed, name in taken.items())
        is_sibling = other.prog.rpartition(" ")[0] == parser.prog.rpartition(" ")[0]
        is_source = other.prog in load_table()["made_by"] and load_table()["made_by"][other.prog] in rewrite.options
        score = (num_exact, len(taken), is_source, -len(move.dropped), -move.num_missing, is_sibling)
        moves.setdefault(score, move)
    return moves[max(moves)] if moves else None


def _write_move(parser: argparse.ArgumentParser, rewrite: Rewrite, move: _Move) -> _Move:
    """Write the typed words in the lines of another command; after a training only the run is written."""
    free_words, option_words = split_positionals(parser, rewrite.words)
    loose = [*rewrite.first, *free_words]
    names = move.parser._option_string_actions
    for typed, name in move.taken.items():
        values = rewrite.unplaced[typed]
        takes_none = names[name].nargs == 0
        move.words += [name] if takes_none else [name, *values]
        loose += values if takes_none else []
    if "--run" in rewrite.required and not _requires(move.parser, "--run"):
        move.place_word(find_value(option_words, "--run") or "RUN", "run")
        option_words = loose = []
    for name, values in _group_options(option_words):
        kind = _classify(values[0]) if values else ""
        is_path = name in {other for others in load_table()["kind_options"].values() for other in others}
        fits = not is_path or name in load_table()["kind_options"].get(kind, [name])[:2]
        if name in names and fits and name not in move.words:
            move.words += [name, *values]
        elif is_path:
            loose += values
        else:
            move.dropped += [name, *values]
    for word in loose:
        move.place_word(word, _classify(word))
    move.complete()
    return move


def _add_lines(rewrite: Rewrite, message: str, move: _Move) -> None:
    """Write the lines of the other command after a training, or in place of the typed line."""
    if "--run" in rewrite.required and not _requires(move.parser, "--run"):
        rewrite.add_words(f"{message}, after the training")
        rewrite.after += move.lines
        return
    without = f", without {shlex.join(move.dropped)}" if move.dropped else ""
    rewrite.add_words(f"{message}{without}")
    rewrite.line = "\n  ".join(move.lines)


def _make_input(rewrite: Rewrite, message: str, source: str, options: Sequence[str]) -> None:
    """Pack the file in --data, or train the missing --tokenizer, with options of that command."""
    path = find_value(rewrite.words, source)
    if source == "--data" and path and classify_word(path) in ("data", "folder") and (
            packing := pack_for(rewrite.command, rewrite.words, path, options)):
        rewrite.add_words(f"{message}, before")
        rewrite.before += packing.before
        rewrite.replace_word(path, packing.words[path])
    elif source == "--tokenizer" and not path and (text := find_value(rewrite.words, "--input")):
        output = choose_free_path(f"{Path(text).name.partition('.')[0]}-tokenizer")
        preset = [] if "--preset" in options else ["--preset", "solar-open"]
        rewrite.before.append(shlex.join(
            ["sov-tokenizer", "train", *preset, *options, "--input", text, "--output", output]))
        rewrite.add_words(f"{message}, before", "--tokenizer", output)
    else:
        rewrite.add_words(f"{message}, which made {path or source}; leave it out")


def _redirect_output(parser: argparse.ArgumentParser, rewrite: Rewrite, option: str) -> bool:
    """Write the output of a command that only prints to the file in `option`; return whether it does."""
    values = rewrite.unplaced[option]
    if not values or not means_output(option) or {"--output", "--run"} & {*parser._option_string_actions} or (
            "OUT" in rewrite.positionals):
        return False
    del rewrite.unplaced[option]
    is_json = values[0].endswith(".json") and "--json" in rewrite.options and "--json" not in rewrite.words
    rewrite.add_words(f"{option}: `{parser.prog}` prints; the shell writes to a file", *["--json"] * is_json)
    rewrite.output = values[0]
    return True


def _filter_input(rewrite: Rewrite, option: str) -> bool:
    """Run a pipeline on the input of `sov-data pack` for an option that names a step; return whether it does."""
    word, source = normalize_word(option), find_value(rewrite.words, "--input")
    steps = [word] if word in load_table()["steps"] or word in index_words("steps") else [
        key.partition(".")[0] for key in index_words("steps") if key.partition(".")[2] == word]
    if rewrite.command != "sov-data pack" or not steps or not source:
        return False
    error = propose_pipeline(steps[0], ["--input", source, option, *rewrite.unplaced.pop(option)])
    assert error and error.fix
    rewrite.add_words(f"{option}: {error.sentence.partition(': ')[2]}")
    rewrite.before += [*error.fix.before, error.fix.line]
    rewrite.replace_word(source, shlex.split(error.fix.line)[-1])
    return True


def _name_command(parser: argparse.ArgumentParser, rewrite: Rewrite, option: str) -> bool:
    """Propose the command for an option that is a word for a command, `sft --merge`; return whether it is."""
    notes = dict[str, str]()
    for program in (parser.prog.split()[0], parser.prog):
        for words, text in load_table()["commands"].get(program, {}).items():
            notes |= {normalize_word(word): text for word in words.split()}
    note = notes.get(normalize_word(option), "")
    if "`" not in note:
        return False
    values = rewrite.unplaced.pop(option)
    model = find_value(rewrite.words, "--run") or next(
        filter(os.path.exists, [*rewrite.first, *rewrite.words]), "RUN")
    if "{first}" in note:
        fix = build_note_error("", note, [model, *values]).fix
        lines = [*fix.before, fix.line] if fix else []
    else:
        words = shlex.split(note.split("`")[1])
        output = values[0] if values else choose_free_path(f"{Path(model).name}-hf")
        holes = dict.fromkeys(load_table()["argument_kinds"]["run"].split(), model) | {
            "MODEL": model, "FOLDER": model, "OUT": output, "TOKENS": find_value(rewrite.words, "--data") or "TOKENS"}
        words = [holes.get(word, word) for word in words]
        lines = [shlex.join(fill_placeholder(name, word) for name, word in pairwise(["", *words]))]
    command = "" if "{first}" in note else f"`{' '.join(lines[0].split()[:3])}`"
    text = re.sub(r":?\s*`[^`]*`", f" {command}", note, count=1).strip()
    if "--run" in rewrite.required:
        rewrite.add_words(f"{option}: {text}, after the training")
        rewrite.after += lines
    else:
        rewrite.add_words(f"{option}: {text}")
        rewrite.line = "\n  ".join(lines)
    return True


def _find_name(parser: argparse.ArgumentParser, option: str, values: Sequence[str]) -> str:
    """Return the option of a command with the name, or the meaning in other programs, of `option`."""
    word = normalize_word(option)
    names = (f"--{word.replace('_', '-')}", *index_words("options").get(word, ()))
    return next((name for name in names if name.startswith("-") and name in parser._option_string_actions
                 and (values or parser._option_string_actions[name].nargs in (0, "*"))), "")


def _is_same(option: str, name: str) -> bool:
    return normalize_word(option) == normalize_word(name)


def _classify(word: str) -> str:
    """Return run, hf or checkpoint for a folder with a model, else the kind of the word."""
    kind = classify_folder(Path(word))
    return kind if kind in ("run", "hf", "checkpoint") else classify_word(word)


def _group_options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (option, values) of the options in a command line."""
    starts = [n for n, word in enumerate(words) if word.startswith("--")]
    for start, end in pairwise([*starts, len(words)]):
        name, equals, value = words[start].partition("=")
        yield name, [value, *words[start + 1:end]] if equals else list(words[start + 1:end])


def _list_arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions
            if not action.option_strings and not isinstance(action, argparse._SubParsersAction)]


def _get_name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _requires(parser: argparse.ArgumentParser, option: str) -> bool:
    return option in parser._option_string_actions and parser._option_string_actions[option].required
