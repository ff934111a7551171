"""Commands that do not exist, and words that stand where a command does: the command that is meant."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_sov.base.errors import Fix, UserError, find_nearest_name
from megatron_sov.base.hints.foreign import read_foreign
from megatron_sov.base.hints.kinds import kind_of_folder
from megatron_sov.base.hints.lines import is_placeholder
from megatron_sov.base.hints.table import by_word, normalize, table

_DIRECTION_OPTIONS = ("--to", "--format", "--output-format", "--target", "--type")


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
    if _names_model(typed):
        by_word |= {one: by_word[f"{one}+model"] for one in [*by_word] if f"{one}+model" in by_word}
    if (stage := _find_stage(typed)) in by_word and word.lower() in by_word:
        by_word[word.lower()] = by_word[stage]
    if (text := by_word.get(word.lower())) and kind_of_folder(Path(word)) == "other":
        return _fill_template(begin, text, typed)
    meant = find_action(program, (word, *typed))
    if word.startswith("-") and meant:
        return UserError(f"{program}: a command comes before its options",
                         Fix(f"{program} {meant} {shlex.join([word, *typed])}"))
    if typed and typed[0] in choices and word not in by_word:  # sov-tokenizer DIR report
        return UserError(f"{program}: {typed[0]} comes before {word}",
                         Fix(f"{program} {shlex.join([typed[0], word, *typed[1:]])}"))
    path = Path(word)
    paths = table()["paths"].get(program)
    if paths and (os.sep in word or path.exists()):
        kind = kind_of_folder(path)
        ways = [way.format(path=shlex.quote(word)) for way in paths.get(kind, paths["other"])]
        directions = [value for name, value in pairwise(typed) if name in _DIRECTION_OPTIONS]
        wanted = {meant, *(f"to-{value}" for value in directions)}
        ways = [way for way in ways if way.split()[0] in wanted] or ways
        ways = [_without_typed(way, typed) for way in ways] if len(ways) == 1 else ways
        if len(ways) == 1 and typed:
            ways = [_with_output(ways[0], typed)]
        return UserError(f"{program}: {word} is a path, and an action must come before it",
                         Fix("\n  ".join(f"{program} {way}" for way in ways)))
    nearest = find_nearest_name(word, choices)
    close = f"; did you mean '{nearest}'?" if nearest else ""
    fix = Fix(f"{program} {shlex.join([nearest, *typed])}") if nearest and typed else None
    return UserError(f"{begin}{close} (`{program} --help` lists what there is)", fix)


def find_action(program: str, typed: Sequence[str]) -> str:
    """Return the action of a command that takes one of the typed options; "": none is known."""
    options = table()["by_option"].get(program, {})
    given = {normalize(one.partition("=")[0]) for one in typed if one.startswith("--")}
    return next((action for option, action in options.items() if normalize(option) in given), "")


def unwrap_launcher(typed: Sequence[str]) -> list[str] | None:
    """Return the command line that another program's command line starts, e.g. `axolotl train FILE` or
    `torchrun --nproc_per_node 8 -m megatron_sov sft ...`; None: the first word is no launcher."""
    word, rest = typed[0], list(typed[1:])
    launchers = table()["launchers"]
    if word in launchers["harnesses"].split():
        return ["eval", "lm", *(rest[1:] if rest[:1] == ["run"] else rest)]
    if word in launchers["programs"].split():
        if rest and not rest[0].startswith("-"):
            return rest
        has_own_answer = any(word in row.split() for row in table()["commands"]["megatron-sov"])
        return None if has_own_answer else ["train", *rest]
    if word not in launchers["starters"].split():
        return None
    at = next((n for n, one in enumerate(rest) if one.endswith(".py") or one in ("-m", "--module")),
              len(rest))
    ours = by_word("options")
    words = [part for one in rest[:at] for part in one.split("=", 1)]
    processes = next((value for name, value in pairwise(words) if value.isdigit() and (
        "--nproc" in ours.get(normalize(name), ()) or name in ("-n", "-np"))), "")
    script, *rest = rest[at + (rest[at:at + 1] in (["-m"], ["--module"])):] or ["train.py"]
    name = script.removesuffix(".py").replace("/", ".").rpartition(".")[2].removeprefix("run_")
    rest = rest if name == "megatron_sov" else [name, *rest]
    rest = unwrap_launcher(rest) or rest if rest else ["--help"]
    return [*rest, "--nproc", processes] if processes and "--nproc" not in rest else rest


def _fill_template(begin: str, text: str, typed: Sequence[str]) -> UserError:
    """Return the error for a word that the table has, whose text has a template, `program command --option
    VALUE`: with the words that were typed in place of its placeholders."""
    found = re.search(r"`((?:megatron-sov|sov-data|sov-tokenizer) [^`]+)`", text)
    if found is None or not typed:
        return UserError(f"{begin}; {text}")
    words = shlex.split(found[1])
    at = next((n for n, word in enumerate(words) if word.startswith("-") or is_placeholder(word)), len(words))
    values = [word for option, value in pairwise(words[at:]) if option.startswith("--")
              and not value.startswith("--") and not is_placeholder(value)
              and (option not in typed or option == "--set") for word in (option, value)]
    if at == 1:  # an option of the program, e.g. --version
        return UserError(f"{begin}; {text}")
    sentence = text.replace(found[1], " ".join(words[:at]))
    return UserError(f"{begin}; {sentence}", Fix(shlex.join([*words[:at], *values, *typed])))


def _without_typed(way: str, typed: Sequence[str]) -> str:
    """Return a line without the options, with their values, that were typed."""
    words = way.split(" --")
    names = {one.partition("=")[0] for one in typed}
    return " --".join([words[0], *(word for word in words[1:] if f"--{word.split()[0]}" not in names)])


def _with_output(line: str, typed: Sequence[str]) -> str:
    """Return a line with the words that were typed after the path: the value of --output takes the place of
    OUT, and options that name a direction (--to hf) are what the action says already."""
    kept: list[str] = []
    output, words = "", list(typed)
    while words:
        name, equals, value = words.pop(0).partition("=")
        is_output = name.startswith("-") and _names_output(name)
        if not is_output and name not in _DIRECTION_OPTIONS:
            kept.append(f"{name}{equals}{value}")
            continue
        if not equals and words:
            value = words.pop(0)
        if is_output:
            output = value
    if not output and kept and not kept[0].startswith("-"):
        output = kept.pop(0)
    if output and re.search(r" OUT\b", line):
        line = re.sub(r" OUT\b", lambda found: f" {shlex.quote(output)}", line)
    elif output:
        kept += ["--output", output]
    return f"{line} {shlex.join(kept)}".strip()


def _names_model(typed: Sequence[str]) -> bool:
    """Return whether words, or another program's configuration file among them, name a model."""
    words = [normalize(one.partition("=")[0]) for one in typed if one.startswith("-")]
    words += [key.lower() for key in _read_configurations(typed)]
    return any(word == "from" or "--from" in by_word("options").get(word, ()) for word in words)


def _find_stage(typed: Sequence[str]) -> str:
    """Return what another program's configuration file among words trains by, e.g. "dpo"; "": unknown."""
    stages = [values[0].lower() for key, values in _read_configurations(typed).items()
              if key.lower() in ("stage", "rl", "rlhf", "algorithm") and values]
    return {"pt": "train", "rm": "reward-model"}.get(stages[0], stages[0]) if stages else ""


def _read_configurations(typed: Sequence[str]) -> dict[str, list[str]]:
    """Return key -> values of other programs' configuration files among words."""
    return {key: values for path in map(Path, typed)
            if path.suffix in (".yaml", ".yml", ".json") and path.is_file()
            for key, values in read_foreign(path, lambda key: "." in key).items()}


def _names_output(option: str) -> bool:
    """Return whether an option is --output, in our words or others'."""
    word = normalize(option)
    return word == "output" or "--output" in by_word("options").get(word, ())


def command_comes_first(program: str, typed: Sequence[str], commands: Iterable[str]) -> UserError:
    """Return the error for options before the command, with the command first."""
    known = {name.split()[0] for name in commands}
    at = next((place for place, word in enumerate(typed) if word in known), 0)
    line = [*typed[at:], *typed[:at]] if at else ["COMMAND", *typed]
    return UserError(f"{typed[0]}: a command comes before its options", Fix(f"{program} {shlex.join(line)}"))
