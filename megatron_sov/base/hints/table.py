"""Load the YAML tables of these packages, and look up words of Megatron-LM, Hugging Face, TRL, axolotl,
lm-eval and nanochat in `words.yaml`, which maps them to options, settings and commands."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

FILE = Path(__file__).with_name("words.yaml")
FILE_OPTIONS = ("--from", "--data", "--run", "--nproc", "--reward", "--prompts", "--nodes")
"""Options that `explain_key` may name for an unknown key of a configuration file."""
MIN_PREFIX = 4
"""Shortest stem that may abbreviate a longer stem: "norm" for "normalization"."""
_ENDINGS = re.compile(r"(izations?|ations?|ings?|ers?|ed|es|e|s)\Z")


def load_package_table(file: "Path | Traversable") -> Any:
    """Load a YAML file of these packages by libyaml if PyYAML has it: modules load tables at import, and
    PyYAML's own parser takes ten times as long."""
    import yaml  # not at the top: `--help` of a program reads no YAML

    return yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@cache
def load_table() -> Mapping[str, Any]:
    """Load `words.yaml`: section name -> rows."""
    rows: Mapping[str, Any] = load_package_table(FILE)
    return rows


def normalize_word(word: str) -> str:
    """Convert a word to the spelling of `words.yaml`: `--Learning-Rate` -> `learning_rate`."""
    return word.lstrip("-").replace("-", "_").lower()


def get_last_part(word: str) -> str:
    """Normalize the part after the last dot: `--training.seq-len` -> `seq_len`."""
    return normalize_word(word).rpartition(".")[2]


@cache
def index_words(section: str) -> Mapping[str, tuple[str, ...]]:
    """Invert a section of `words.yaml`: foreign word -> options or settings, in the order of the rows."""
    names: dict[str, list[str]] = {}
    for name, words in load_table()[section].items():
        for word in str(words).split():
            names.setdefault(word, []).append(name)
    return {word: tuple(options) for word, options in names.items()}


def translate_to_settings(word: str) -> tuple[str, ...]:
    """Return the settings for a foreign word, as `name`, or as `name=value` if the word is a switch."""
    by_value = [text for text in load_table()["values"].get(normalize_word(word), {}).values()
                if "." in str(text)]
    return index_words("settings").get(normalize_word(word), tuple(dict.fromkeys(by_value)))


def find_note(word: str) -> str:
    """Return why a foreign setting or option has no counterpart, with the remedy; "": unknown word."""
    sections = map(_index_notes, ("notes", "instead", "no_need"))
    return next((notes[normalize_word(word)] for notes in sections if normalize_word(word) in notes), "")


def explain_key(word: str) -> str:
    """Return the note on an unknown setting, or the option of the same meaning; "": unknown word."""
    if note := find_note(word):
        return note
    options = index_words("options").get(normalize_word(word), ())
    option = next((name for name in options if name in FILE_OPTIONS), "")
    return f"it is the option {option} here, and no setting" if option else ""


def find_our_value(value: str, *names: str) -> str:
    """Return our value for another program's value of an option or setting, by the first of its `names` that
    has one in the table `values`; "": none."""
    table = load_table()["values"]
    translations = (table.get(name, {}).get(value.lower()) for name in names)
    return str(next(filter(None, translations), ""))


@cache
def _index_notes(section: str) -> dict[str, str]:
    """Return word -> sentence for the section `notes`, `instead` or `no_need`."""
    return {word: text for words, text in load_table()[section].items() for word in words.split()}


def find_by_parts(word: str, names: Iterable[str]) -> str:
    """Return the only option or setting whose own name, or whose name in another program, has every part of
    an unknown word of at least two parts; "": none or several."""
    query = set(split_stems(get_last_part(word)))
    if len(query) < 2:
        return ""
    foreign_stems: dict[str, list[set[str]]] = {}
    for section in ("settings", "options"):
        for theirs, ours in index_words(section).items():
            for name in ours:
                foreign_stems.setdefault(name.partition("=")[0], []).append(set(split_stems(theirs)))
    matching = []
    for name in names:
        spellings = [set(split_stems(name)), *foreign_stems.get(name, ())]
        if any(all(_has_stem(stems, part) for part in query) for stems in spellings):
            matching.append(name)
    return matching[0] if len(matching) == 1 else ""


def split_stems(text: str) -> list[str]:
    """Split a name into lower-case words without endings; abbreviations are expanded, stop words dropped."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text)]
    abbreviations, stop_words = load_table()["abbreviations"], load_table()["stop_words"]
    expanded = [part for word in words for part in abbreviations.get(word, word).split()]
    return [_ENDINGS.sub("", word) if len(word) > 4 else word for word in expanded if word not in stop_words]


def _has_stem(stems: set[str], query: str) -> bool:
    """Return whether `query` is in `stems`, or one begins with the other (both from `MIN_PREFIX` letters)."""
    if query in stems:
        return True
    return len(query) >= MIN_PREFIX and any(
        len(stem) >= MIN_PREFIX and (stem.startswith(query) or query.startswith(stem)) for stem in stems)
