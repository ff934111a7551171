"""A command line whose words of other programs are replaced by the options and settings of `words.yaml`."""

import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import find_nearest_name, fix_missing
from megatron_sov.base.hints.commands import list_parsers
from megatron_sov.base.hints.foreign import multiply_context, parse_blend, parse_object
from megatron_sov.base.hints.kinds import classify_kind, classify_word
from megatron_sov.base.hints.table import (
    find_by_parts, find_note, find_our_value, get_last_part, index_words, load_table, normalize_word,
    translate_to_settings)
from megatron_sov.base.hints.values import (
    GPUS_PER_NODE, SWITCHES, FindSetting, compute_odds, compute_share, find_value, parse_cluster,
    translate_setting, translate_value)

MIN_SIMILARITY = 0.8
"""Lowest `SequenceMatcher.ratio` between an unknown option and a suggested option."""
FOLDER = "DIR[:WEIGHT]"
"""Name of the positional argument that takes folders of token shards with weights."""
_WEIGHT_WORDS = ("weights", "weight", "ratios", "ratio", "proportions")
_NEXT_SETTING = re.compile(r",\s*(?=[a-z]\w*(?:\.\w+)+=)")


@dataclass
class Rewrite:
    """A command line whose unknown words are replaced."""

    options: Sequence[str]
    positionals: Sequence[str]
    find: FindSetting | None
    typed: Sequence[str]
    list_settings: Callable[[], Sequence[str]] = list
    """Returns the names of all settings."""
    is_recipe: Callable[[str], bool] = lambda word: False
    repeated: Collection[str] = ()
    """Options that may be given several times, with a value each."""
    required: Collection[str] = ()
    """Options that the command requires."""
    many: Collection[str] = ()
    """Options that take several values."""
    command: str = ""
    """The command, after the program unless the program is megatron-sov."""
    exists: FindSetting | None = None
    """Whether a setting exists; None: unknown."""
    line: str = ""
    """The whole line, if another command is meant."""
    before: list[str] = field(default_factory=list)
    """Commands to run before the line."""
    other_command: str = ""
    """Another command of ours, with options, that takes the typed words."""
    overruled: dict[str, str] = field(default_factory=dict)
    """Option -> value that replaces the typed value."""
    target: str = ""
    """Adapter that replaces the typed model."""
    weights: Sequence[str] = ()
    """Weights of the folders, typed as a list."""
    weak_settings: set[str] = field(default_factory=set)
    """Settings that give way to typed values of the same settings."""
    first: list[str] = field(default_factory=list)
    """Values of positional arguments, written before all options."""
    first_by_name: dict[str, list[str]] = field(default_factory=dict)
    """Positional argument -> its values in `first`."""
    words: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    is_changed: bool = False
    unplaced: dict[str, list[str]] = field(default_factory=dict)
    """Unknown option -> values."""
    after: list[str] = field(default_factory=list)
    """Commands to run after the line."""
    output: str = ""
    """File for printed text."""
    prefix: str = ""
    """Words before the program: `timeout 2h`."""
    unknown_settings: dict[str, str] = field(default_factory=dict)
    """Unknown `name=value` -> message, printed only if another word is replaced."""

    def add_words(self, message: str, *words: str) -> None:
        self.messages.append(message)
        self.words += words
        self.is_changed = True

    @property
    def has_cluster(self) -> bool:
        """Whether the command line names a cluster profile, by our option or a foreign one."""
        rows = [row["words"] for row in load_table()["in_command"] if "--cluster" in row.get("write", "")]
        names = {word for words in (load_table()["options"]["--cluster"], *rows) for word in words.split()}
        return any(normalize_word(word.partition("=")[0]) in names
                   for word in self.typed if word.startswith("-"))

    def is_setting(self, key: str) -> bool:
        return self.exists is None or bool(self.exists(key))

    def is_override(self, key: str, equals: str, earlier: Sequence[str], switches: Collection[str]) -> bool:
        """Return whether the word `key` + `equals` + value is a setting without an option, `a.b=c`, as Hydra
        and NeMo take it; after an option in `earlier` words, except `switches`, it is the option's value."""
        name = key.lstrip("+")
        is_own = self.exists is not None and "." in name and self.is_setting(name)
        if key.startswith("+") and equals and is_own:
            return True
        if not equals or not re.fullmatch(r"\+{0,2}[a-z]\w*(\.\w+)*", key) or self.find is None:
            return False
        previous = earlier[-1] if earlier else ""
        if previous.startswith("-") and "=" not in previous and previous not in switches:
            return False
        if is_own or self.find(name):
            return True
        if "." not in name:
            return False
        group, last_part = name.partition(".")[0], name.rpartition(".")[2]
        has_counterpart = find_note(last_part) or self.find_option(last_part) or self.find_option(name)
        return self.is_setting(group) or (not self.is_setting(name) and bool(has_counterpart))

    def find_option(self, word: str) -> str:
        """Return the command's option for a foreign word; "": none."""
        return next((option for option in index_words("options").get(normalize_word(word), ())
                     if option in self.options), "")

    def add_setting(self, word: str, setting: str) -> None:
        """Write `--set name=value` for a foreign word."""
        name = setting.partition("=")[0]
        if setting in index_words("settings").get(normalize_word(word), ()):
            self.weak_settings.add(setting)
        message = f"{word} is {name} here" if word != name else f"{name} is a list"
        if get_last_part(word) in load_table()["computed"] and name == "train.global_batch_size":
            message = f"{word}: {name} is micro-batch x accumulation x processes"
        self.add_words(message, "--set", setting)

    def apply_row(self, option: str, values: list[str], *, is_existing: bool = False) -> bool:
        """Write the words of the `in_command` row for an option; return whether a row applies.

        An existing option of the command takes only rows with `value`.
        """
        value = ",".join(values) if normalize_word(option).endswith("betas") else "".join(values[:1])
        row = next((row for row in load_table()["in_command"]
                    if _matches_row(row, self.command, option, value, is_existing)
                    and self._meets_conditions(row, value)), None)
        if row is None:
            return False
        holes = self._list_holes(value)
        written = [word.format(**holes) for word in shlex.split(row.get("write", ""))]
        self.target = value.rpartition("=")[2] if "target" in row else self.target
        if "step" in row:
            self.target = f"{holes['folder']}/checkpoints/step-{value}"
        if "each" in row:
            written += self._write_for_each_reward(row, value)
        if value and value == find_value(self.typed, row.get("unless_value_of", "")):
            written = []  # prefer --ref_model MODEL --from MODEL
        if row.get("weak"):
            self.weak_settings |= set(written)
        if row.get("overrules"):
            self.overruled |= dict(pairwise(written))
        quoted = {name: shlex.quote(text) for name, text in holes.items()}
        if "before" in row:
            self.before.append(row["before"].format(**quoted))
        if "line" in row:
            self.line = row["line"].format(**quoted)
        self.prefix = row.get("prefix", self.prefix).format(**quoted)
        self.other_command = row.get("command", self.other_command)
        self.add_words(f"{option}: {row['say']}", *written)
        return True

    def _meets_conditions(self, row: Mapping[str, Any], value: str) -> bool:
        """Return whether the other typed words, and files, meet an `in_command` row's conditions."""
        if any(fnmatch(word, row.get("unless", "-")) for word in self.typed):
            return False
        if "if" in row and row["if"] not in self.typed:
            return False
        if "target" in row and not os.path.isdir(value.rpartition("=")[2] or "-"):
            return False
        if "absent" in row and os.path.exists(value.rpartition("=")[2]):
            return False
        # the value must be a path outside of the folder that the option `outside` names
        folder = find_value(self.typed, row.get("outside", ""))
        if "outside" in row and (not folder or Path(value).is_relative_to(folder)):
            return False
        return set(str(row.get("needs", "")).split()) <= set(self.options)

    def _write_for_each_reward(self, row: Mapping[str, Any], value: str) -> list[str]:
        """Return the words of a row for each typed reward and its item in `value`: a,b or a+b."""
        words: list[str] = []
        names = re.split(r"[,+]", find_value(self.typed, "--reward", "--reward_funcs"))
        for foreign_name, item in zip(names, re.split(r"[,+]", value), strict=False):
            name = find_our_value(foreign_name, "--reward") or foreign_name
            words += [word.format(name=name, item=item) for word in row["each"].split()]
            words += row.get("more", {}).get(name, "").split()
        return words

    def _list_holes(self, value: str) -> dict[str, str]:
        """Return the values of the placeholders in a row: {value}, {stem}, {cluster}, {nodes}, {run},
        {output}, {folder}, {tokens}, {share}, {odds}, {first}, {second} (of two numbers)."""
        thousands = re.fullmatch(r"(\d+)[kK]", value)
        value = str(1024 * int(thousands[1])) if thousands and self.command == "extend" else value
        run = re.sub(r"/checkpoints(/[^/]*)?/?$", "", value)
        if not value or value.lower() in SWITCHES:
            run = find_value(self.typed, "--run", "--output_dir", "--output-dir") or "RUN"
        option_values = {word for option, word in pairwise(self.typed) if option.startswith("-")}
        folder = next((word for word in self.typed
                       if word not in option_values and not word.startswith("-")), "DIR")
        fix = None if os.path.exists(folder) else fix_missing(folder)
        if fix is not None and folder in fix.words:
            self.messages.append(f"{folder}: does not exist; did you mean {fix.words[folder]}?")
            folder = fix.words[folder]
        gpus = re.search(r"(?:\A|:)(\d+)(?:x|\Z)", value)  # 16, 8xH100, h100:8
        nodes = str(-(-int(gpus[1]) // GPUS_PER_NODE)) if gpus else "N"
        numbers = re.findall(r"[\d.]+(?:e-?\d+)?", value)
        source = find_value(self.typed, "--input", "--dataset", "--data", "--files", "--train_file") or "FILE"
        return {"source": source, "name": Path(source).stem, "value": value, "nodes": nodes,
                "first": "".join(numbers[:1]),
                "second": "".join(numbers[1:2]), "stem": Path(value).stem, "run": run,
                "cluster": parse_cluster(value), "folder": folder,
                "tokens": multiply_context(find_value(self.typed, "--from", "--model"), value),
                "output": find_value(self.typed, "--output") or "DIR", "python": shlex.quote(sys.executable),
                "preset": find_value(self.typed, "--preset") or "solar-open", "share": compute_share(value),
                "odds": compute_odds(value)}

    def replace_option(self, option: str, values: list[str]) -> None:
        """Write the counterpart of an option that the command does not have."""
        word = normalize_word(option)
        if self.apply_row(option, values):
            return
        if "." in word and not find_note(word) and not any(
                word in index_words(section) for section in ("settings", "options")):
            word = get_last_part(word)  # torchtitan: --training.steps
        same_name = f"--{word.replace('_', '-')}"
        if word == "load" and values and values[0] == find_value(self.typed, "--save", "--run"):
            self.add_words(f"{option}: --resume continues a folder's run", "--run", values[0], "--resume")
            self.overruled["--run"] = values[0]
        elif word in _WEIGHT_WORDS and any("[:weight]" in name.lower() for name in self.positionals):
            self.weights = values[0].split(",") if len(values) == 1 else values
            self.add_words(f"{option}: a weight follows its folder behind a colon")
        elif same_name in self.options:  # --num_fewshot
            self.add_words(f"{option} is {same_name} here", same_name, *values)
        elif word in index_words("settings") and (setting := self._translate(word, values)):
            self.add_setting(option, setting)
        elif name := self._choose_option(word, values):
            self._write_option(option, word, name, values)
        elif setting := self._translate(word, values):
            self.add_setting(option, setting)
        elif note := find_note(option):
            self.add_words(f"{option}: {note}")
        else:
            self._guess_option(option, values)

    def count_values(self, option: str, words: Sequence[str], has_room: bool) -> int:
        """Return how many of the words between a foreign option and the next option are its values.
        `has_room`: whether a positional argument lacks a value, for which the last word may be meant."""
        word, num = normalize_word(option), len(words)
        if not num:
            return 0
        if any("target" in row and word in row["words"].split() and self.command in row["at"].split(", ")
               for row in load_table()["in_command"]):
            return 1
        ours = self._choose_option(word, list(words))
        if ours in self.options and ours not in (*self.many, *self.repeated):
            return 1
        names = index_words("settings").get(word, ())
        is_switch = any("=" in name for name in names)
        # options of the same name in other commands
        same_name = f"--{word.replace('_', '-')}"
        actions = [parser._option_string_actions[same_name] for parser in list_parsers().values()
                   if same_name in parser._option_string_actions]
        has_row = any(word in row["words"].split() for row in load_table()["in_command"])
        has_meaning = bool(ours or names or has_row or find_note(option))
        is_known = has_meaning or any(action.nargs != 0 for action in actions)
        takes_last = is_known and (num == 1 or not any(action.nargs is None for action in actions))
        is_path = os.path.exists(words[-1]) and words[-1].lower() not in ("lora", "qlora", *SWITCHES)
        is_positional = self.is_recipe(words[-1]) or (is_path and (is_switch or not takes_last))
        return num - 1 if has_room and not ours and is_positional else num

    def _translate(self, word: str, values: list[str]) -> str:
        setting = translate_setting(word, values, self.find, self.typed) if self.find is not None else ""
        is_other = setting.partition(".")[0] in load_table()["not_in"].get(
            self.command.removeprefix("submit "), "").split()
        return "" if is_other else setting

    def _choose_option(self, word: str, values: list[str]) -> str:
        """Return the command's option or positional argument for a foreign word; "": none."""
        name = next((name for name in index_words("options").get(word, ())
                     if name in self.options or name in self.positionals), "")
        is_name = bool(values) and re.fullmatch(r"[\w.-]+", values[0]) and not os.path.exists(values[0])
        is_recipe = is_name and (self.command == "plan" or classify_word(values[0]) == "recipe")
        if name == "--from" and "RECIPE" in self.positionals and is_recipe:
            return "RECIPE"
        if name == "--prompts" and "--prompt" in self.options and values and not os.path.exists(values[0]):
            return "--prompt"
        same_name = [name for name in self.positionals
                     if re.split(r"\W", name)[0].lower() in (word, word.removesuffix("s"))]
        if not name and same_name:
            return same_name[0]
        if name == "--nodes" and "gpu" in word and "--nproc" in self.options and not (
                self.has_cluster or self.command.startswith("submit")):
            return "--nproc"  # the number of GPUs per node follows from a profile
        takes_folders = FOLDER in self.positionals and word in ("input", "data", "inputs", "data_path")
        return FOLDER if takes_folders else name

    def _write_option(self, option: str, word: str, name: str, values: list[str]) -> None:
        """Write an option or positional argument `name` for a foreign option."""
        translated = [translate_value(word, name, value) for value in values]
        if word == "model_args" and values:
            rest = [part for part in values[0].split(",") if not part.startswith("pretrained=")]
            if rest:
                self.messages.append(f"{', '.join(rest)}: not needed, or an option of its own")
        if not name.startswith("-"):
            translated = parse_blend(values) or translated
            self.first += translated
            self.first_by_name[name] = [*self.first_by_name.get(name, ()), *translated]
            plain = re.sub(r"\[.*?\]", "", name)  # DIR[:WEIGHT], [NAME=]PREFIX
            self.add_words(f"{option} is {plain} here, without an option")
            return
        if name in self.typed and name not in (*self.repeated, *self.many):
            self.add_words(f"{option}: {name} is there already; leave it out")
            return
        default = find_our_value("", word)
        translated = translated or ([default] if default else [])
        if name == "--nodes" and values and values[0].isdecimal() and int(values[0]) % GPUS_PER_NODE:
            self.messages.append(f"{values[0]} GPUs are no whole nodes of {GPUS_PER_NODE}: "
                                 f"--nodes {translated[0]} is {int(translated[0]) * GPUS_PER_NODE}")
        if name == "--data" and (blend := parse_blend(values)):
            self.add_words(f"{option} is --data here, with weights behind a colon",
                           *(word for item in blend for word in (name, item)))
        else:
            words = [name, *translated]
            if translated and name in self.repeated and name not in self.many:
                words = [word for value in translated for word in (name, value)]
            self.add_words(f"{option} is {name} here", *words)

    def _guess_option(self, option: str, values: list[str]) -> None:
        """Write the option with a similar name, or the option or setting with the same parts in its name."""
        same_name = f"--{normalize_word(option).replace('_', '-')}"
        is_elsewhere = any(same_name in parser._option_string_actions for parser in list_parsers().values())
        is_path = bool(values) and (os.path.exists(values[0]) or ".py:" in values[0])
        kind = classify_kind(values[0]) if is_path else ""
        arguments = [name for name in self.positionals if name not in self.first_by_name
                     and name in load_table()["argument_kinds"].get(kind, "").split()]
        if arguments:
            self._write_option(option, normalize_word(option), arguments[0], values)
        elif not is_elsewhere and (nearest := find_nearest_option(option, self.options)):
            self.add_words(f"{option}: nothing takes this; did you mean '{nearest}'?", nearest, *values)
        elif (name := find_by_parts(option, self.options)) and name not in self.typed:
            self._write_option(option, normalize_word(option), name, values)
        elif not is_elsewhere and values and (name := find_by_parts(option, self.list_settings())):
            self.add_setting(option, f"{name}={values[0]}")
        elif name := self._find_data_option(values):
            self.add_words(f"{option} is {name} here", name, *values)
        else:
            self.unplaced[option] = values

    def replace_word(self, word: str, new: str) -> None:
        self.words = [new if text == word else text for text in self.words]

    def _find_data_option(self, values: list[str]) -> str:
        """Return the required option that takes a file of records and was not typed; "": none."""
        if not values or classify_word(values[0]) != "data" or not os.path.exists(values[0]):
            return ""
        return next((name for name in load_table()["kind_options"]["data"]
                     if name in self.required and name not in self.typed), "")

    def add_changes(self, texts: Sequence[str]) -> None:
        """Write settings changes, `name=value`, under our names."""
        for text in texts:
            if text.startswith("{") and (settings := parse_object(text)):
                self.add_words("a setting is NAME=VALUE", *(
                    word for name, value in settings.items() for word in ("--set", f"{name}={value}")))
                continue
            is_json = text.partition("=")[2][:1] in ("[", "{", '"', "'")
            parts = [text] if is_json else _NEXT_SETTING.split(text)
            if len(parts) > 1:
                self.add_words("every setting needs a --set of its own")
            for part in parts:
                self._add_change(part)

    def _add_change(self, text: str) -> None:
        """Write a settings change, or the option with its meaning, or the note why there is none."""
        if match := re.fullmatch(r"([a-z]\w*(?:\.\w+)+):([^=]+)", text):
            self.add_words("a setting and its value are joined by =")
            text = f"{match[1]}={match[2].strip()}"
        key, equals, value = text.partition("=")
        if re.fullmatch(r"\[[A-Za-z][\w-]*(\s*,\s*[A-Za-z][\w-]*)*\]", value):  # the shell took the quotes
            value = json.dumps(re.findall(r"[\w-]+", value))
            text = f"{key}={value}"
        find = self.find
        assert find is not None
        setting = self._translate(key, [value]) if equals and find(key) else ""
        if self.apply_row(key, [value]) or (
                not self.is_setting(key) and self.apply_row(get_last_part(key), [value])):
            return
        if key == "lora.targets" and value[:1] not in ("[", ""):
            setting = f"{key}={json.dumps([name.strip() for name in value.split(',')])}"
        if equals and ("." in key or not setting) and (note := find_note(key)):
            self.add_words(f"{key}: {note}")
        elif setting:
            self.add_setting(key, setting)
        elif not equals or self.is_setting(key) or find(key):
            self.words += ["--set", text]
        else:
            self._add_unknown_setting(key, value)

    def _add_unknown_setting(self, key: str, value: str) -> None:
        """Write the option with the meaning of an unknown setting, or record the setting as unknown."""
        last = key.rpartition(".")[2]
        same_name = f"--{key}" if f"--{key}" in self.options else ""  # --set run=DIR
        if option := self.find_option(key) or self.find_option(last) or same_name:
            self.add_words(f"{key} is {option} here", option,
                           translate_value(normalize_word(last), option, value))
        elif note := find_note(last):
            self.add_words(f"{key}: {note}")
        elif nearest := (_find_misspelt(key, self.list_settings())
                         or find_by_parts(key, self.list_settings())):
            self.add_words(f"{key}: no such setting; did you mean '{nearest}'?", "--set",
                           f"{nearest}={value}")
        else:
            self.unknown_settings[f"{key}={value}"] = f"{key}: no such setting"
            self.words += ["--set", f"{key}={value}"]


def _matches_row(row: Mapping[str, Any], command: str, option: str, value: str, is_existing: bool) -> bool:
    commands = [name.strip() for name in row.get("at", "").split(",")]
    patterns = row["value"].split("|") if "value" in row else []
    if normalize_word(option) not in row["words"].split() or not (commands == [""] or command in commands):
        return False
    return any(fnmatch(value.lower(), pattern) for pattern in patterns) if patterns else not is_existing


def find_nearest_option(option: str, options: Sequence[str]) -> str:
    """Return the option with the most similar name; "" below `MIN_SIMILARITY`."""
    nearest = find_nearest_name(option, options)
    return nearest if difflib.SequenceMatcher(None, option, nearest).ratio() >= MIN_SIMILARITY else ""


def explain_unknown(option: str, values: Sequence[str], owner: str) -> str:
    """Return the message for an unknown option: settings of training commands, or the advice to drop it."""
    value, word = "".join(values[:1]), get_last_part(option)
    setting = find_our_value(value, word)
    names = [setting] if "=" in setting else [
        name if "=" in name or not value else f"{name}={value}" for name in translate_to_settings(word)]
    table, all_commands = load_table()["acts_in"], "the commands that train (pretrain, sft, ...)"
    texts = [f"--set {name} of {table.get(name.partition('.')[0], all_commands)}"
             for name in names if "=" in name]
    unknown = f"is an option of `{owner}`, not of this command" if owner else "nothing takes this"
    meaning = f"is {', '.join(texts)}" if texts else unknown
    return f"{option}: {meaning}; leave it out"


def _find_misspelt(key: str, names: Sequence[str]) -> str:
    """Return the setting in the same group with a similar name; "": none."""
    group, _, last = key.rpartition(".")
    settings = [name.rpartition(".") for name in names]
    name = find_nearest_name(last, [setting[2] for setting in settings if setting[0] == group])
    return f"{group}.{name}" if name else ""
