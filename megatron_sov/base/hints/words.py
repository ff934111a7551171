"""Words of Megatron-LM, Hugging Face, TRL, axolotl, lm-eval and nanochat as ours: `words.yaml` is the one
table for options, settings and commands of all programs, and is asked before any guess by similar letters."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, nearest, warn

FILE = Path(__file__).with_name("words.yaml")
_OPTION = re.compile(r"--?[A-Za-z][\w.-]*\Z")
_NEXT_SETTING = re.compile(r",\s*(?=[a-z]\w*(?:\.\w+)+=)")
_SWITCHED = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False,
             "off": False}
GPUS_OF_A_NODE = 8
FindSetting = Callable[[str], str]
"""Word or setting, without a value -> the setting that it means; "": it exists, or nothing is known."""


@cache
def table() -> Mapping[str, Any]:
    """Return `words.yaml`: part -> its rows."""
    import yaml

    found: Mapping[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def normalize(word: str) -> str:
    """Return the form in which the table has a word: `--Learning-Rate` -> `learning_rate`."""
    return word.lstrip("-").replace("-", "_").lower()


@cache
def _by_word(part: str) -> Mapping[str, tuple[str, ...]]:
    """Return word -> what a part of the table has for it, in the order of its rows."""
    found: dict[str, list[str]] = {}
    for ours, words in table()[part].items():
        for word in str(words).split():
            found.setdefault(word, []).append(ours)
    return {word: tuple(meant) for word, meant in found.items()}


def settings_called(word: str) -> tuple[str, ...]:
    """Return the settings that other programs call `word`, as `name` or, of a switch, `name=value`."""
    by_value = [meant for meant in table()["values"].get(normalize(word), {}).values() if "." in str(meant)]
    return _by_word("settings").get(normalize(word), tuple(dict.fromkeys(by_value)))


def note_on(word: str) -> str:
    """Return why a setting or option of another program has no counterpart, and what to do; "": not known."""
    return next((note for part in ("notes", "instead", "no_need")
                 if (note := notes(part).get(normalize(word)))), "")


@cache
def notes(part: str) -> dict[str, str]:
    """Return word -> sentence, of the part `notes`, `instead` or `no_need`."""
    return {word: text for words, text in table()[part].items() for word in words.split()}


# Options and settings of a command line.

@dataclass
class _Rewrite:
    """A command line whose unknown words are replaced."""

    options: Sequence[str]
    positionals: Sequence[str]
    find: FindSetting | None
    typed: Sequence[str]
    first: list[str] = field(default_factory=list)
    """Values of positional arguments, which go before all options."""
    words: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    is_changed: bool = False

    def add(self, says: str, *words: str) -> None:
        self.said.append(says)
        self.words += words
        self.is_changed = True

    def set(self, word: str, setting: str) -> None:
        name = setting.partition("=")[0]
        self.add(f"{word} is {name} here", "--set", setting)

    def replace(self, option: str, values: list[str]) -> None:
        """Add what is meant by an option that the command does not have."""
        word = normalize(option)
        ours = f"--{word.replace('_', '-')}"
        if ours in self.options:  # --num_fewshot
            self.add(f"{option} is {ours} here", ours, *values)
            return
        if self.find is not None and word in _by_word("settings") and (
                setting := _setting(word, values, self.find, self.typed)):
            self.set(option, setting)
            return
        meant = next((one for one in _by_word("options").get(word, ())
                      if one in self.options or one in self.positionals), "")
        if meant and not meant.startswith("-"):
            self.first += [_value_of(word, meant, value) for value in values]
            self.add(f"{option} is {meant} here, without an option")
        elif meant:
            alone = table()["values"].get(word, {}).get("")
            given = [_value_of(word, meant, value) for value in values] or [alone] * bool(alone)
            self.add(f"{option} is {meant} here", meant, *given)
        elif self.find is not None and (setting := _setting(word, values, self.find, self.typed)):
            self.set(option, setting)
        elif note := note_on(option):
            self.add(f"{option}: {note}")
        elif close := nearest(option, self.options):
            self.add(f"{option}: nothing takes this{close}", close.split("'")[1], *values)
        else:
            self.said.append(f"{option}: nothing takes this")


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
    made = _Rewrite([name for name in options if name != "--run" or name not in optional], positionals,
                    find if "--set" in options else None, typed)
    i = 0
    while i < len(typed):
        word, equals, value = typed[i].partition("=")
        i += 1
        if word == "--" or not _OPTION.match(word):
            made.words += typed[i - 1:] if word == "--" else [typed[i - 1]]
            i = len(typed) if word == "--" else i
        elif word == "--set" and made.find is not None:
            given, i = ([value] if equals else list(typed[i:i + 1])), i + (not equals)
            if given and "=" not in given[0] and i < len(typed) and not typed[i].startswith("-"):
                given, i = [f"{given[0]}={typed[i]}"], i + 1
                made.add("a setting and its value are joined by =")
            _add_settings(made, given)
        elif word in options or not _is_unknown(word, made):
            made.words.append(typed[i - 1])
        else:
            values = [value] if equals else []
            while not equals and i < len(typed) and not _OPTION.match(typed[i].partition("=")[0]):
                values.append(typed[i])
                i += 1
            made.replace(word, values)
    if made.said:
        raise UserError(_answer(parser, made))
    return list(typed)


def _is_unknown(word: str, made: _Rewrite) -> bool:
    """Return whether a word is an option of another program; an unambiguous begin of one of ours is not."""
    name = normalize(word)
    if not word.startswith("--"):
        return name in _by_word("options")
    is_theirs = made.find is not None and name in _by_word("settings")
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


def _add_settings(made: _Rewrite, given: Sequence[str]) -> None:
    for text in given:
        parts = [text] if text.partition("=")[2][:1] in ("[", "{", '"', "'") else _NEXT_SETTING.split(text)
        if len(parts) > 1:
            made.add("every setting needs a --set of its own")
        for part in parts:
            key, equals, value = part.partition("=")
            find = made.find
            assert find is not None
            setting = _setting(key, [value], find, made.typed) if equals and find(key) else ""
            if setting:
                made.set(key, setting)
            elif equals and "." not in key and find(key) == "" and (note := note_on(key)):
                made.add(f"{key}: {note}")
            else:
                made.words += ["--set", part]


def _setting(word: str, values: list[str], find: FindSetting, typed: Sequence[str]) -> str:
    """Return `name=value` for a word of another program and its values; "": no setting is known."""
    last = normalize(word).rpartition(".")[2]
    given = values[0] if values else ""
    by_value = table()["values"].get(last, {})
    known = by_value.get(given.lower()) if given else None
    if known and "=" in str(known):
        return str(known)
    name = find(word)
    if not name:
        return ""
    fixed = next((one for one in settings_called(last) if one.startswith(f"{name}=")), "")
    if fixed and given.lower() in {"", *_SWITCHED} and _SWITCHED.get(given.lower(), True):
        return fixed
    if last in table()["computed"]:
        return f"{name}={_computed(last, given, typed)}"
    if len(values) > 1:
        return f"{name}={json.dumps(values)}"
    known = known or table()["values"].get(name, {}).get(given.lower(), given or "VALUE")
    return f"{name}={known}"


def _computed(word: str, given: str, typed: Sequence[str]) -> str:
    """Return the value of a setting that follows from several of theirs; a letter if a number is missing."""
    def number(*names: str) -> float | None:
        words = [word for text in typed for word in text.split("=") if word and word != "--set"]
        for name, value in pairwise(words):
            if normalize(name).rpartition(".")[2] in names and re.fullmatch(r"[\d.]+(e\d+)?", value):
                return float(value)
        return None

    if word == "warmup_ratio" or word == "lr_warmup_fraction":
        steps = number("max_steps", "train_iters", "steps", "num_steps", "num_iterations")
        return str(round(float(given) * steps)) if steps and re.fullmatch(r"[\d.]+", given) else "STEPS"
    micro = number("per_device_train_batch_size", "micro_batch_size") or 1
    processes = number("nproc", "nproc_per_node", "num_processes") or 1
    return str(round(int(given) * micro * processes)) if given.isdigit() else "SAMPLES"


def _value_of(word: str, option: str, value: str) -> str:
    """Return the value that an option of ours takes for one of theirs."""
    if word == "model_args":  # lm-eval: pretrained=FOLDER,dtype=bfloat16
        return next((part.partition("=")[2] for part in value.split(",") if part.startswith("pretrained=")),
                    value)
    if option == "--nodes" and ("gpu" in word or word == "world_size") and value.isdigit():
        return str(-(-int(value) // GPUS_OF_A_NODE))
    return str(table()["values"].get(word, {}).get(value.lower(), value))


def _answer(parser: argparse.ArgumentParser, made: _Rewrite) -> str:
    said = "; ".join(dict.fromkeys(made.said))
    if not made.is_changed:
        return f"{parser.prog}: {said} (--help lists what it takes)"
    written = [word.partition("=")[0] for word in made.words]
    missing = [f"{action.option_strings[0]} {action.metavar or action.dest.upper()}"
               for action in parser._actions if action.required and action.option_strings
               and not set(action.option_strings) & set(written)]
    command = f"{parser.prog} {shlex.join([*made.first, *made.words])}".strip()
    return f"{parser.prog}: {said}; write\n  {' '.join([command, *missing])}"


# Commands.

def unknown_command(program: str, word: str, choices: Sequence[str], typed: Sequence[str] = ()) -> UserError:
    """Return the error for a command that does not exist, with the one that is meant.

    Args:
        program: what was typed before it, e.g. "megatron-sov convert".
        word: the command that was typed.
        choices: the commands that there are.
        typed: the words after it.
    """
    rows = table()["commands"].get(program, {})
    by_word = {one: text for words, text in rows.items() for one in words.split()}
    begin = f"{program} {word}: does not exist"
    if text := by_word.get(word.lower()):
        return UserError(f"{begin}; {text}")
    path = Path(word)
    paths = table()["paths"].get(program)
    if paths and (os.sep in word or path.exists()):
        kind = kind_of_folder(path)
        after = f" {shlex.join(typed)}" if typed else ""
        ways = [way.format(path=shlex.quote(word)) for way in paths.get(kind, paths["other"])]
        # what was typed after the path goes with the one command, unless it names the output itself
        ways = [re.sub(r" OUT\b", "", way) + after if after and len(ways) == 1 else way for way in ways]
        return UserError(f"{program}: {word} is a path, and an action comes first; write\n" + "\n".join(
            f"  {program} {way}" for way in ways))
    return UserError(f"{begin}{nearest(word, choices)} (`{program} --help` lists what there is)")


def kind_of_folder(path: Path) -> str:
    """Return what a folder holds, by the names of its files: run, checkpoint, hf, peft, tokens, tokenizer,
    megatron or other."""
    names = set(os.listdir(path)) if path.is_dir() else set()
    if "events.jsonl" in names:
        return "run"
    if "adapter_config.json" in names:
        return "peft"
    if "latest_checkpointed_iteration.txt" in names or any(name.startswith("iter_") for name in names):
        return "megatron"
    if "manifest.json" in names:
        try:
            kind = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["kind"]
        except (OSError, ValueError, TypeError, KeyError):
            kind = "other"
        return str(kind)
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return "hf"
    return "tokenizer" if "tokenizer.json" in names else "other"
