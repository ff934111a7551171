"""Words of Megatron-LM, Hugging Face, TRL, axolotl, lm-eval and nanochat as ours: reads `words.yaml`, the one
table for options, settings and commands of all programs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("words.yaml")
OPTIONS_OF_FILES = ("--from", "--data", "--run", "--nproc", "--reward", "--prompts", "--nodes")


@cache
def table() -> Mapping[str, Any]:
    """Return `words.yaml`: part -> its rows."""
    import yaml

    found: Mapping[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def normalize(word: str) -> str:
    """Return the form in which the table has a word: `--Learning-Rate` -> `learning_rate`."""
    return word.lstrip("-").replace("-", "_").lower()


def last_part(word: str) -> str:
    """Return the part after the last dot, as the table has words: `--training.seq-len` -> `seq_len`."""
    return normalize(word).rpartition(".")[2]


@cache
def by_word(part: str) -> Mapping[str, tuple[str, ...]]:
    """Return word -> what a part of the table has for it, in the order of its rows."""
    found: dict[str, list[str]] = {}
    for ours, words in table()[part].items():
        for word in str(words).split():
            found.setdefault(word, []).append(ours)
    return {word: tuple(meant) for word, meant in found.items()}


def settings_called(word: str) -> tuple[str, ...]:
    """Return the settings that other programs call `word`, as `name` or, of a switch, `name=value`."""
    by_value = [meant for meant in table()["values"].get(normalize(word), {}).values() if "." in str(meant)]
    return by_word("settings").get(normalize(word), tuple(dict.fromkeys(by_value)))


def note_on(word: str) -> str:
    """Return why a setting or option of another program has no counterpart, and what to do; "": not known."""
    return next((note for part in ("notes", "instead", "no_need")
                 if (note := notes(part).get(normalize(word)))), "")


def instead_of(word: str) -> str:
    """Return the end of a sentence about a key that is no setting: why, or the option that it is here."""
    if note := note_on(word):
        return note
    found = next((one for one in by_word("options").get(normalize(word), ())
                  if one in OPTIONS_OF_FILES), "")
    return f"it is the option {found} here, and no setting" if found else ""


@cache
def notes(part: str) -> dict[str, str]:
    """Return word -> sentence, of the part `notes`, `instead` or `no_need`."""
    return {word: text for words, text in table()[part].items() for word in words.split()}
