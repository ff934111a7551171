"""Rewrites a command line with words of other programs (Megatron-LM, Hugging Face, TRL, lm-eval) as a line to
paste; the table of words is asked before any guess by similar letters."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import Fix, UserError, find_nearest_name, fix_missing, suggest_name, warn
from megatron_sov.base.hints.foreign import blend_of, is_translated, read_foreign, recipe_of
from megatron_sov.base.hints.kinds import OPTIONS_OF_KIND, kind_of_word, option_of_path
from megatron_sov.base.hints.missing import placeholder, split_words
from megatron_sov.base.hints.search import describe_found, find_by_meaning
from megatron_sov.base.hints.table import by_word, last_part, normalize, note_on, table
from megatron_sov.base.hints.values import (
    GPUS_OF_A_NODE, SWITCHED, FindSetting, name_cluster, setting_with_value, value_after, value_of_option)

_OPTION = re.compile(r"--?[A-Za-z][\w.-]*\Z")
_NEXT_SETTING = re.compile(r",\s*(?=[a-z]\w*(?:\.\w+)+=)")
_CONFIG_WORDS = ("config", "config_file", "config_path")
MIN_SIMILARITY = 0.8
"""Least share of letters in common of an unknown option and one that it is taken for."""
NEED_A_RECIPE = ("pretrain", "extend", "plan")


# Options and settings of a command line.

@dataclass
class _Rewrite:
    """A command line whose unknown words are replaced."""

    options: Sequence[str]
    positionals: Sequence[str]
    find: FindSetting | None
    typed: Sequence[str]
    read_texts: Callable[[], Mapping[str, str]] = dict
    """Returns option or setting of the command -> its help; reads sources, so for unknown words alone."""
    command: str = ""
    """The program, if it is not megatron-sov, and its command."""
    exists: FindSetting | None = None
    """Setting -> whether there is it; None: not known."""
    line: str = ""
    """The whole command, where another one than that which was typed is meant."""
    resumes: str = ""
    """Folder of the run that goes on: what is saved to and loaded from."""
    weights: Sequence[str] = ()
    """Of the folders, where they were typed as a list."""
    weak: set[str] = field(default_factory=set)
    """Settings that give way to the same ones with values that were typed."""
    first: list[str] = field(default_factory=list)
    """Values of positional arguments, which go before all options."""
    named: dict[str, list[str]] = field(default_factory=dict)
    """Positional argument -> its values in `first`."""
    words: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    is_changed: bool = False
    unknown: dict[str, str] = field(default_factory=dict)
    """Setting that does not exist, with its value -> what to say if another word is replaced, too."""

    def add(self, says: str, *words: str) -> None:
        self.said.append(says)
        self.words += words
        self.is_changed = True

    @property
    def has_cluster(self) -> bool:
        """Whether the command line names a profile, in our words or others'."""
        rows = [row["words"] for row in table()["in_command"] if "--cluster" in row.get("write", "")]
        known = {word for words in (table()["options"]["--cluster"], *rows) for word in words.split()}
        return any(normalize(word.partition("=")[0]) in known for word in self.typed if word.startswith("-"))

    def search(self, word: str) -> str:
        """Return the end of a sentence: the options and settings nearest in meaning to an unknown word."""
        texts = self.read_texts()
        return describe_found(find_by_meaning(word, texts), texts)

    def is_our_setting(self, key: str) -> bool:
        return self.exists is None or bool(self.exists(key))

    def set(self, word: str, setting: str) -> None:
        name = setting.partition("=")[0]
        if setting in by_word("settings").get(normalize(word), ()):
            self.weak.add(setting)
        share = " (its share of the run's steps)" if setting.endswith("=STEPS") else ""
        self.add(f"{word} is {name} here{share}" if word != name else f"{name} is a list", "--set", setting)

    def use_row(self, option: str, values: list[str], is_known: bool = False) -> bool:
        """Add what a row of `in_command` has for an option; an option that the command has takes rows that
        name values alone. Returns whether there was one."""
        value = values[0] if values else ""
        row = next((row for row in table()["in_command"]
                    if _is_row(row, self.command, option, value, is_known)
                    and not any(fnmatch(word, row.get("unless", "-")) for word in self.typed)
                    and set(str(row.get("needs", "")).split()) <= set(self.options)), None)
        if row is None:
            return False
        in_tokens = re.fullmatch(r"(\d+)[kK]", value)
        value = str(1024 * int(in_tokens[1])) if in_tokens and self.command == "extend" else value
        holes = {"value": value, "stem": Path(value).stem, "cluster": name_cluster(value),
                 "run": re.sub(r"/checkpoints(/[^/]*)?/?$", "", value)}
        if not value or value.lower() in SWITCHED:
            holes["run"] = value_after(self.typed, "--run", "--output_dir", "--output-dir") or "RUN"
        holes["output"] = value_after(self.typed, "--output") or "DIR"
        taken = {word for option, word in pairwise(self.typed) if option.startswith("-")}
        folder = next((word for word in self.typed if word not in taken and not word.startswith("-")), "DIR")
        fix = None if Path(folder).exists() else fix_missing(folder)
        holes["folder"] = folder
        if fix is not None and folder in fix.words:
            holes["folder"] = fix.words[folder]
            self.said.append(f"{folder}: does not exist; did you mean {holes['folder']}?")
        written = [word.format(**holes) for word in shlex.split(row.get("write", ""))]
        if value and value == value_after(self.typed, row.get("unless_value_of", "")):
            written = []  # prefer --ref_model MODEL --from MODEL
        self.weak |= set(written) if row.get("weak") else set()
        if "line" in row:
            self.line = row["line"].format(**{name: shlex.quote(text) for name, text in holes.items()})
        self.add(f"{option}: {row['say']}", *written)
        return True

    def replace(self, option: str, values: list[str]) -> None:
        """Add what is meant by an option that the command does not have."""
        word = normalize(option)
        if self.use_row(option, values):
            return
        if "." in word and not note_on(word) and word not in by_word("settings"):
            word = last_part(word)  # torchtitan: --training.steps
        ours = f"--{word.replace('_', '-')}"
        if word == "load" and values and values[0] == value_after(self.typed, "--save", "--run"):
            self.add(f"{option}: the run of a folder goes on by --resume", "--run", values[0], "--resume")
            self.resumes = values[0]
            return
        if word in ("weights", "ratios", "proportions") and "DIR[:WEIGHT]" in self.positionals:
            self.weights = values
            self.add(f"{option}: a weight follows its folder behind a colon")
            return
        if ours in self.options:  # --num_fewshot
            self.add(f"{option} is {ours} here", ours, *values)
            return
        if self.find is not None and word in by_word("settings") and (
                setting := setting_with_value(word, values, self.find, self.typed)):
            self.set(option, setting)
            return
        meant = next((one for one in by_word("options").get(word, ())
                      if one in self.options or one in self.positionals), "")
        is_name = bool(values) and re.fullmatch(r"[\w.-]+", values[0]) and not Path(values[0]).exists()
        if meant == "--from" and self.command == "plan" and is_name:
            meant = "RECIPE"
        if meant == "--nodes" and "gpu" in word and "--nproc" in self.options and not self.has_cluster:
            meant = "--nproc"  # without a profile nobody knows how many GPUs a node has
        if word in ("input", "data", "inputs") and "DIR[:WEIGHT]" in self.positionals:
            meant = "DIR"
        if meant and not meant.startswith("-"):
            given = [value_of_option(word, meant, value) for value in values]
            self.first += given
            self.named[meant] = given
            self.add(f"{option} is {meant} here, without an option")
        elif meant:
            alone = table()["values"].get(word, {}).get("")
            given = [value_of_option(word, meant, value) for value in values] or [alone] * bool(alone)
            if meant == "--nodes" and given and values[0].isdigit() and int(values[0]) % GPUS_OF_A_NODE:
                self.said.append(f"{values[0]} GPUs are no whole nodes of {GPUS_OF_A_NODE}: "
                                 f"--nodes {given[0]} is {int(given[0]) * GPUS_OF_A_NODE}")
            if meant == "--data" and (blend := blend_of(values)):
                self.add(f"{option} is --data here, with weights behind a colon", *blend)
                return
            self.add(f"{option} is {meant} here", meant, *given)
        elif self.find is not None and (setting := setting_with_value(word, values, self.find, self.typed)):
            self.set(option, setting)
        elif note := note_on(option):
            self.add(f"{option}: {note}")
        elif nearest := find_nearest_option(option, self.options):
            self.add(f"{option}: nothing takes this; did you mean '{nearest}'?", nearest, *values)
        elif len(found := find_by_meaning(option, texts := self.read_texts())) == 1 and values and (
                found[0] in self.options):
            self.add(f"{option}: nothing takes this{describe_found(found, texts)}", found[0], *values)
        else:
            self.add(f"{option}: nothing takes this{self.search(option)}; leave it out")


def check_words(parser: argparse.ArgumentParser, typed: Sequence[str]) -> list[str]:
    """Return the words of a command line with options of the release before under their new names.

    Args:
        parser: of a command without commands below it.
        typed: what follows the command's name.

    Raises:
        UserError: options or settings that do not exist; the message has the whole command as it is to be
            typed, if the table knows one of them.
    """
    options = list(parser._option_string_actions)
    if any(action.nargs == argparse.REMAINDER for action in parser._actions):
        _move_run(parser, typed)
        return list(typed)
    typed = [_renamed(word, parser.prog, options) for word in typed]
    # where --run may be left out it is no place for output: `eval` adds its figures to the run's events
    if any(normalize(word.partition("=")[0]) == "model_args" for word in typed) and "--model" in typed:
        at = typed.index("--model")  # lm-eval's kind of model
        typed = [*typed[:at], *typed[at + 2:]]
    optional = {name for action in parser._actions if not action.required for name in action.option_strings}
    find: FindSetting | None = getattr(parser.get_default("options_class"), "find_setting", None)
    positionals = [str(action.metavar or action.dest) for action in parser._actions
                   if not action.option_strings]
    _propose_resume(parser, typed)
    made = _Rewrite([name for name in options if name != "--run" or name not in optional], positionals,
                    find if "--set" in options else None, typed, partial(texts_of, parser),
                    parser.prog.removeprefix("megatron-sov "),
                    getattr(parser.get_default("options_class"), "is_setting", None))
    _read_words(parser, made)
    _move_model(parser, made)
    _place_free_words(parser, made)
    if made.said:
        raise _answer(parser, made)
    return list(typed)


def _propose_resume(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Raise `UserError` for `--resume RUN`: the option takes no value, and a command continues a run."""
    if "--resume" not in parser._option_string_actions or "--run" in typed:
        return
    run = next((value for option, value in pairwise(typed) if option == "--resume"
                and not value.startswith("-")), "")
    if run:
        sets = [part for pair in pairwise(typed) if pair[0] == "--set" for part in pair]
        raise UserError(f"{parser.prog}: --resume takes no value; `megatron-sov resume RUN` continues a run",
                        Fix(f"megatron-sov resume {shlex.join([run, *sets])}"))


def _move_run(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Raise `UserError` where the first argument of a command that passes words on comes after an option."""
    first = next((str(action.metavar) for action in parser._actions if not action.option_strings), "")
    if not typed or not typed[0].startswith("-") or typed[0] in parser._option_string_actions:
        return
    name, equals, value = typed[0].partition("=")
    rest = typed[1:] if equals else typed[2:]
    value = value if equals else "".join(typed[1:2])
    if value and (normalize(name) == first.lower() or first in by_word("options").get(normalize(name), ())):
        raise UserError(f"{parser.prog}: {name} is {first} here, without an option",
                        Fix(f"{parser.prog} {shlex.join([value, *rest])}"))


def texts_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return option of a command, and setting as --set takes it -> its help."""
    texts = {action.option_strings[0]: (action.help or "").replace("%%", "%")
             for action in parser._actions if action.option_strings}
    settings: Mapping[str, str] = getattr(parser.get_default("options_class"), "setting_texts", dict)()
    return texts | {f"--set {name}=VALUE": text for name, text in settings.items()}


def _read_words(parser: argparse.ArgumentParser, made: _Rewrite) -> None:
    """Read the words one after the other, and write those that are meant."""
    typed, options = made.typed, list(parser._option_string_actions)
    if "DIR[:WEIGHT]" in made.positionals and (blend := blend_of(typed)):
        made.add("a weight follows its folder behind a colon", *(word for word in blend if word != "--data"))
        typed = typed[_count_values(typed):]
    alone = {name for action in parser._actions if action.nargs == 0 for name in action.option_strings}
    i = 0
    while i < len(typed):
        word, equals, value = typed[i].partition("=")
        i += 1
        if made.find and _is_override(made, word, equals, typed[:i - 1], alone):
            _add_settings(made, [typed[i - 1].lstrip("+")], is_bare=True)
        elif "RECIPE" in made.positionals and (option := option_of_path(Path(typed[i - 1]))) in options and (
                split_words(parser, [*made.words, typed[i - 1]])[0] == [typed[i - 1]]):
            if option == "--config" and made.exists and (leaves := read_foreign(Path(word), made.exists)):
                _add_foreign(made, "RECIPE", word, leaves)
            else:
                made.add(f"{typed[i - 1]} is no recipe: it is {option} here", option, typed[i - 1])
        elif word == "--" or not _OPTION.match(word):
            made.words += typed[i - 1:] if word == "--" else [typed[i - 1]]
            i = len(typed) if word == "--" else i
        elif word == "--set" and made.find is not None:
            given, i = ([value] if equals else list(typed[i:i + 1])), i + (not equals)
            after = "".join(typed[i:i + 2])
            if given and "[" not in given[0] and (given[0].endswith("=") or after.startswith("=")):
                parts = 1 + (typed[i:i + 1] == ["="])  # blanks around =
                given, i = ["".join([given[0], *typed[i:i + parts]])], i + parts
                made.add("a setting and its value are joined by =, without blanks")
            if given and "=" not in given[0] and i < len(typed) and not typed[i].startswith("-"):
                given, i = [f"{given[0]}={typed[i]}"], i + 1
                made.add("a setting and its value are joined by =")
            _add_settings(made, given)
        elif last_part(word) in _CONFIG_WORDS and made.find and made.exists and (
                leaves := read_foreign(Path(value or "".join(typed[i:i + 1])), made.exists)):
            _add_foreign(made, word, value or typed[i], leaves)
            i += not equals
        elif word in options or not _is_unknown(word, made):
            first = [] if word in alone else list(typed[i:i + 1])
            given = [value] if equals else first
            if made.use_row(word, given, is_known=True):
                i += bool(given) and not equals
            elif len(files := _several(word, given)) > 1:
                made.add(f"{word} is given once for each", *(one for path in files for one in (word, path)))
                i += not equals
            elif word == "--data" and (blend := blend_of(typed[i:])):
                made.add("--data is given once for each, with its weight behind a colon", *blend)
                i += _count_values(typed[i:])
            else:
                made.words.append(typed[i - 1])
        else:
            values = [value] if equals else []
            while not equals and i < len(typed) and not _OPTION.match(typed[i].partition("=")[0]):
                values.append(typed[i])
                i += 1
            made.replace(word, values)


def _add_foreign(made: _Rewrite, option: str, file: str, leaves: Mapping[str, list[str]]) -> None:
    """Add the settings of another program's configuration file that there are here."""
    said, lost = list(made.said), []
    has_data = "--data" in made.typed  # else the file's own
    # values that follow from several, e.g. accumulated micro-batches, are computed from the file too
    made.typed = [*made.typed, *(word for key, values in leaves.items()
                                 for word in (f"--{last_part(key)}", *values[:1]))]
    renamed = []  # of a file with sections of ours alone: the user's own, with keys in wrong places
    is_own = made.exists is not None and all(made.exists(key.partition(".")[0]) for key in leaves)
    for key, values in leaves.items():
        num_words = len(made.words) + len(made.first)
        if values and "." in key and made.is_our_setting(key):
            made.words += ["--set", f"{key}={values[0] if len(values) == 1 else json.dumps(values)}"]
        elif values and is_translated(key):
            made.replace(f"--{last_part(key)}", values)
            added = made.words[num_words - len(made.first):]
            if has_data and added[:1] == ["--data"]:
                del made.words[num_words - len(made.first):]
            renamed.append(f"{key} is {' '.join(added).removeprefix('--set ')}")
        if len(made.words) + len(made.first) == num_words:
            lost.append(key)
    made.said, made.is_changed = said, True
    without = f", without {', '.join(lost[:12])}{' ...' if len(lost) > 12 else ''}" if lost else ""
    what = (f"has keys in wrong places: {', '.join(renamed)} here; correct the file, or pass its settings"
            if is_own else "is another program's configuration; its settings follow")
    made.said.append(f"{option} {file}: {what}{without}")


def _is_row(row: Mapping[str, Any], command: str, option: str, value: str, is_known: bool) -> bool:
    """Return whether a row of `in_command` is about a command, an option and its value."""
    commands = [one.strip() for one in row.get("at", "").split(",")]
    values = row.get("value", "").split("|") if "value" in row else []
    return (normalize(option) in row["words"].split() and (commands == [""] or command in commands)
            and (not values or any(fnmatch(value.lower(), one) for one in values))
            and not (is_known and not values))


def _is_override(made: _Rewrite, key: str, equals: str, before: Sequence[str], alone: set[str]) -> bool:
    """Return whether a word is a setting as Hydra and NeMo take them, without an option: a.b=c."""
    our = made.exists is not None and "." in key and made.is_our_setting(key.lstrip("+"))
    if key.startswith("+") and equals and our:
        return True
    if not equals or not re.fullmatch(r"\+{0,2}[a-z]\w*(\.\w+)*", key) or made.find is None:
        return False
    is_free = not before or not before[-1].startswith("-") or "=" in before[-1] or before[-1] in alone
    last, key = key.rpartition(".")[2], key.lstrip("+")
    is_theirs = "." in key and not made.is_our_setting(key) and (note_on(last) or _option_of(made, last))
    return is_free and bool(our or made.find(key) or is_theirs)


def _count_values(words: Sequence[str]) -> int:
    """Return the number of words before the next option."""
    return next((n for n, word in enumerate(words) if word.startswith("-")), len(words))


def _option_of(made: _Rewrite, word: str) -> str:
    """Return the option of the command that other programs call so; "": none."""
    return next((one for one in by_word("options").get(normalize(word), ()) if one in made.options), "")


def _several(option: str, given: Sequence[str]) -> list[str]:
    """Return the files in a comma-separated list, if every file exists."""
    parts = given[0].split(",") if given and option in ("--data", "--input", "--prompts") else []
    are_there = bool(parts) and not Path(given[0]).exists() and all(
        Path(re.sub(r":[\d.]+$", "", part)).exists() for part in parts)
    return parts if are_there else []


def _move_model(parser: argparse.ArgumentParser, made: _Rewrite) -> None:
    """Let the model be the positional argument of a command whose --model is something else."""
    if "TARGET" not in made.positionals or "--model" not in made.words or split_words(parser, made.words)[0]:
        return
    at = made.words.index("--model")
    if not made.first and at + 1 < len(made.words):
        made.first = [made.words[at + 1]]
        made.words = [*made.words[:at], *made.words[at + 2:]]
        made.add("--model is TARGET here, without an option")


def _place_free_words(parser: argparse.ArgumentParser, made: _Rewrite) -> None:
    """Give words without an option, which no positional argument takes, to the option of their kind: model
    folder, data file, tokenizer, or a path that does not exist for the output."""
    positionals = [action for action in parser._actions if not action.option_strings]
    if any(action.nargs in ("+", "*", argparse.REMAINDER) for action in positionals):
        return
    free, others = split_words(parser, made.words)
    room = max(0, len(positionals) - len(made.first))
    written = {word.partition("=")[0] for word in others}
    lacks = any(action.required and not set(action.option_strings) & written
                for action in parser._actions if action.option_strings)
    is_recipe = bool(made.positionals) and made.positionals[0] == "RECIPE"
    misplaced = is_recipe and {"model", "data", "tokens", "hub"} & {kind_of_word(word) for word in free}
    if len(free) <= room and not misplaced and not (lacks and len(free) > sum(
            bool(action.required) for action in positionals)):
        return
    stays: list[str] = []
    for number, word in enumerate(free):
        kind = kind_of_word(word)
        # TARGET, RUN and others come first, whatever they are
        is_taken = number < room and not (is_recipe and kind not in ("recipe", "code"))
        options = [one for one in OPTIONS_OF_KIND[kind] if one in made.options
                   and (one not in written or one == "--data")]
        if is_taken or not options:
            stays.append(word)
            continue
        written.add(options[0])
        others += [options[0], word]
        made.add(f"{word} is {options[0]} here")
    if len(stays) < len(free):
        made.words = [*stays, *others]


def _is_unknown(word: str, made: _Rewrite) -> bool:
    """Return whether a word is an option of another program; an unambiguous begin of one of ours is not."""
    name = normalize(word)
    if not word.startswith("--"):
        return name in by_word("options")
    is_theirs = made.find is not None and name in by_word("settings")
    return is_theirs or not any(option.startswith(word) for option in made.options)


def _renamed(word: str, program: str, options: Sequence[str]) -> str:
    """Return a word with today's name of an option that the release before called otherwise."""
    name, equals, value = word.partition("=")
    rows = table()["renamed"] if name.startswith("--") and name not in options else {}
    now = {**rows.get("*", {}), **rows.get(program, {})}.get(name, "")
    if now not in options:
        return word
    warn(f"{name} is called {now} now; the old name goes with the next release")
    return f"{now}{equals}{value}"


def _add_settings(made: _Rewrite, given: Sequence[str], is_bare: bool = False) -> None:
    if is_bare:
        made.add("a setting follows --set")
    for text in given:
        parts = [text] if text.partition("=")[2][:1] in ("[", "{", '"', "'") else _NEXT_SETTING.split(text)
        if len(parts) > 1:
            made.add("every setting needs a --set of its own")
        for part in parts:
            key, equals, value = part.partition("=")
            find = made.find
            assert find is not None
            setting = setting_with_value(key, [value], find, made.typed) if equals and find(key) else ""
            if key == "lora.targets" and value[:1] not in ("[", ""):
                setting = f"{key}={json.dumps([one.strip() for one in value.split(',')])}"
            if equals and "." in key and (note := note_on(key)):
                made.add(f"{key}: {note}")
            elif setting:
                made.set(key, setting)
            elif equals and "." not in key and find(key) == "" and (note := note_on(key)):
                made.add(f"{key}: {note}")
            elif not equals or made.is_our_setting(key) or find(key):
                made.words += ["--set", part]
            else:
                _add_unknown(made, key, value)


def _add_unknown(made: _Rewrite, key: str, value: str) -> None:
    """Add what is meant by a setting that does not exist: an option, or nothing."""
    last = key.rpartition(".")[2]
    if option := _option_of(made, last):
        made.add(f"{key} is {option} here", option, value_of_option(normalize(last), option, value))
    elif note := note_on(last):
        made.add(f"{key}: {note}")
    elif not _is_misspelt(key, made.read_texts()) and (found := made.search(key)):
        made.said.append(f"{key}: there is no such setting{found}")
    else:
        made.unknown[f"{key}={value}"] = f"{key}: there is no such setting"
        made.words += ["--set", f"{key}={value}"]


def _add_companions(made: _Rewrite) -> None:
    """Add the settings and processes that the rewritten settings need: a project of W&B needs obs.wandb=true,
    and parallel.tp=2 two processes."""
    pairs = [setting for option, setting in pairwise(made.words) if option == "--set"]
    values = dict(setting.partition("=")[::2] for setting in pairs)
    if "--config" in made.words or not values:
        return
    for name, needed in table()["acts_with"].items():
        if name in values and needed.partition("=")[0] not in values:
            made.add(f"{name} acts with {needed}", "--set", needed)
    if "--nproc" not in made.options or made.command.startswith("submit"):
        return
    sizes = {axis: int(size) for axis in ("tp", "pp", "cp", "ep", "etp")
             if (size := values.get(f"parallel.{axis}", "1")).isdigit()}
    processes = sizes.get("pp", 1) * max(sizes.get("tp", 1) * sizes.get("cp", 1),
                                         sizes.get("ep", 1) * sizes.get("etp", 1))
    if processes > 1 and "--nproc" not in made.words and len(sizes) == 5:
        made.add(f"this layout needs {processes} processes", "--nproc", str(processes))


def find_nearest_option(option: str, options: Sequence[str]) -> str:
    """Return the nearest option; "" if over a fifth of the letters differ, which means another thing."""
    nearest = find_nearest_name(option, options)
    return nearest if difflib.SequenceMatcher(None, option, nearest).ratio() >= MIN_SIMILARITY else ""


def _is_misspelt(key: str, texts: Mapping[str, str]) -> bool:
    """Return whether a setting of the same group has a similar name."""
    group, _, last = key.rpartition(".")
    names = [name.removeprefix("--set ").removesuffix("=VALUE") for name in texts]
    return bool(suggest_name(last,
                             [name.rpartition(".")[2] for name in names if name.startswith(f"{group}.")]))


def _answer(parser: argparse.ArgumentParser, made: _Rewrite) -> UserError:
    if made.line:
        return UserError(f"{parser.prog}: {'; '.join(dict.fromkeys(made.said))}", Fix(made.line))
    if not made.is_changed:
        return UserError(f"{parser.prog}: {'; '.join(dict.fromkeys(made.said))} (--help lists what it takes)")
    _add_companions(made)
    words = _without_repeated(parser, made)
    written = [word.partition("=")[0] for word in words]
    missing = [f"{action.option_strings[0]} {placeholder(action)}" for action in parser._actions
               if action.required and action.option_strings and not set(action.option_strings) & set(written)]
    if missing:
        lacking = " and ".join(text.partition(" ")[0] for text in missing)
        made.said.append(f"{lacking} {'is' if len(missing) == 1 else 'are'} missing")
    first = list(made.first)
    free, others = split_words(parser, words)
    if made.named and free and len(made.named) + len(free) == len(made.positionals):
        left = iter(free)
        first = [value for name in made.positionals for value in made.named.get(name) or [next(left)]]
        words = others
    folders = first or free
    if made.weights and len(made.weights) == len(folders):
        words = words if first else others
        first = [f"{folder}:{weight}" for folder, weight in zip(folders, made.weights, strict=True)]
    if not first and not split_words(parser, words)[0]:
        is_priced = made.command == "plan" and "--from" in written
        needed = [str(action.metavar or action.dest) for action in parser._actions
                  if not action.option_strings and (action.required or (
                      action.dest == "recipe" and made.command in NEED_A_RECIPE
                      and "--config" not in written and not is_priced))]
        recipe = recipe_of(Path(value_after(words, "--from")))
        # of a model without a run the command proposes a recipe
        first = [recipe if name == "RECIPE" and recipe else name for name in needed
                 if name != "RECIPE" or recipe or "--from" not in written]
        if needed and "RECIPE" in first + needed[1:]:
            made.said.append(f"{' and '.join(needed)} {'is' if len(needed) == 1 else 'are'} missing"
                             + "; `megatron-sov recipes` lists the recipes" * ("RECIPE" in needed))
    command = f"{parser.prog} {shlex.join([*first, *words])}".strip()
    names: dict[str, list[str]] = {}  # what is said -> the words of which it is said
    for text in dict.fromkeys([*made.said, *made.unknown.values()]):
        word, colon, why = text.partition(": ")
        names.setdefault(colon + why if word.startswith("-") else f"{colon}{why}\0{word}", []).append(word)
    said = "; ".join(f"{', '.join(words)}{why.partition(chr(0))[0]}" for why, words in names.items())
    if parser.prog.startswith("submit "):  # it has parsed its own options before
        said = f"{said}"
    return UserError(f"{parser.prog}: {said}", Fix(" ".join([command, *missing])))


def _without_repeated(parser: argparse.ArgumentParser, made: _Rewrite) -> list[str]:
    """Return the words without settings that do not exist, and of options and settings that count once the
    last; what was typed goes before what stands for another word."""
    once = {name for action in parser._actions
            if type(action).__name__ in ("_StoreAction", "_StoreTrueAction") and action.nargs in (None, 0)
            for name in action.option_strings}
    groups: list[list[str]] = []
    words = list(made.words)
    while words:
        word = words.pop(0)
        takes_one = word == "--set" or (word in once and parser._option_string_actions[word].nargs != 0)
        is_pair = takes_one and words
        groups.append([word, words.pop(0)] if is_pair else [word])
    kept: dict[str, list[str]] = {}
    for number, group in enumerate(groups):
        name = group[0].partition("=")[0]
        if group[0] == "--set" and len(group) > 1:
            key = f"--set {group[1].partition('=')[0]}"
            if group[1] in made.unknown or (group[1] in made.weak and key in kept):
                continue
        elif name in once:
            key = name
            typed = value_after(made.typed, name)
            typed = made.resumes if name == "--run" and made.resumes else typed
            if (key in kept or made.resumes) and typed and len(group) > 1 and group[1] != typed:
                continue
        else:
            key = str(number)
        kept[key] = group
    return [word for group in kept.values() for word in group]
