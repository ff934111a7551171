"""Errors that name our command for an unknown or foreign one; commands behind `torchrun` and the like."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_sov.base.errors import Fix, UserError, choose_free_path, find_nearest_name
from megatron_sov.base.hints.foreign import read_foreign_config
from megatron_sov.base.hints.kinds import classify_folder, classify_word, find_only_folder
from megatron_sov.base.hints.lines import is_placeholder
from megatron_sov.base.hints.paths import write_pipeline
from megatron_sov.base.hints.table import index_words, load_table, normalize_word
from megatron_sov.base.hints.values import find_value, pair_words

PROGRAMS = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
"""Program -> module with `COMMANDS`, `build_parser` and `main`."""
_DIRECTION_OPTIONS = ("--to", "--format", "--output-format", "--target", "--type")
_PIPELINE_OPTIONS = ("input", "i", "data", "input_dir", "input_folder")
"""Foreign options that name the input of a pipeline."""
_STAGE_KEYS = ("stage", "rl", "rlhf", "algorithm")
"""Keys in foreign configuration files that name the training stage."""
_STAGE_COMMANDS = {"pt": "train", "rm": "reward-model"}


def build_command_error(program: str, word: str, choices: Sequence[str], typed: Sequence[str] = ()
                        ) -> UserError:
    """Build the error for the unknown command `word` after `program`, e.g. "megatron-sov convert", with the
    command of the same meaning."""
    if program == "sov-data" and (error := propose_pipeline(word, typed)):
        return error
    texts = _index_command_texts(program, word, typed)
    # in `convert hf RUN OUT`, hf is a direction even if a folder named hf exists
    is_word = classify_folder(Path(word)) == "other" or bool(typed and os.path.exists(typed[0]))
    if (text := texts.get(word.lower())) and is_word:
        return fill_template(f"{program} {word}: does not exist", text, typed)
    for name, module in PROGRAMS.items() if program in PROGRAMS else ():
        if word in {command.partition(" ")[0] for command in importlib.import_module(module).COMMANDS}:
            return UserError(f"{program} {word}: is a command of {name}",
                             Fix(f"{name} {shlex.join([word, *typed])}"))
    action = find_action(program, (word, *typed))
    if word.startswith("-") and action:
        return UserError(f"{program}: a command comes before its options",
                         Fix(f"{program} {action} {shlex.join([word, *typed])}"))
    is_argument = word not in texts or os.path.exists(word)
    # the action may follow its arguments (`convert RUN to-hf`); `at`: its index in `typed`
    at = next((i for i, (before, other) in enumerate(pairwise([word, *typed]))
               if other in choices and not before.startswith("-")), 0)
    if typed and typed[at] in choices and is_argument and (not at or os.path.exists(word)):
        return UserError(f"{program}: {typed[at]} comes before {word}",
                         Fix(f"{program} {shlex.join([typed[at], word, *typed[:at], *typed[at + 1:]])}"))
    paths = load_table()["paths"].get(program.replace("submit ", "megatron-sov ", 1))
    if paths and (os.sep in word or os.path.exists(word)):
        ways = paths.get(classify_folder(Path(word)), paths["other"])
        return UserError(f"{program}: {word} is a path, and an action must come before it",
                         Fix("\n  ".join(_fill_path_lines(program, ways, word, typed, action))))
    nearest = find_nearest_name(word, choices)
    suggestion = f"; did you mean '{nearest}'?" if nearest else ""
    fix = Fix(f"{program} {shlex.join([nearest, *typed])}") if nearest and typed else None
    return UserError(
        f"{program} {word}: does not exist{suggestion} (`{program} --help` lists what there is)", fix)


def propose_pipeline(command: str, typed: Sequence[str]) -> UserError | None:
    """Build the error for `sov-data STEP` or `sov-data run` with step options; the fix writes a pipeline.

    Returns None without a known step or an input.
    """
    index, words = index_words("steps"), [part for text in typed for part in text.split("=", 1)]
    values = {normalize_word(option): value for option, value in pairwise(words) if option.startswith("-")}
    source = next((values[name] for name in _PIPELINE_OPTIONS if name in values), "")
    named = [command] if command != "run" else [part for word in words for part in word.split(",")]
    steps = dict[str, str]()
    for word in named:
        candidates = [name for name in index.get(normalize_word(word), ()) if "." not in name]
        settings = {name: ", ".join(f"{key.rpartition('.')[2]}: {value}" for option, value in values.items()
                                    for key in index.get(f"{name}.{option}", ())) for name in candidates}
        # the last candidate with a typed setting, otherwise the first candidate
        chosen = next((name for name in reversed(candidates) if settings[name]), "".join(candidates[:1]))
        if needed := load_table()["needed_steps"].get(chosen):
            steps.setdefault(needed, "")
        steps |= {chosen: settings[chosen]} if chosen else {}
    if not steps or not source:
        return None
    name = next((step for step in steps if step != "language"), "language")
    file = choose_free_path(f"{name}.yaml")
    output = values.get("output", values.get("o", choose_free_path("corpus")))
    unread = [name for name in values if name not in (*_PIPELINE_OPTIONS, "output", "o")
              and not any(f"{step}.{name}" in index for step in steps)]
    without = f", without {', '.join(unread)}" if unread else ""
    return UserError(f"sov-data {command}: a pipeline file names the steps {', '.join(steps)} and their "
                     f"settings (docs/data_pipeline.md); `sov-data run` runs it{without}",
                     Fix(f"sov-data run {file} --output {shlex.quote(output)}",
                         before=(write_pipeline(file, source, steps),)))


def _index_command_texts(program: str, word: str, typed: Sequence[str]) -> Mapping[str, str]:
    """Return foreign command -> text with our command; typed models and configuration files change texts."""
    rows = load_table()["commands"].get(program, {})
    texts = {name: text for words, text in rows.items() for name in words.split()}
    if _names_model(typed):
        texts |= {name: texts[f"{name}+model"] for name in [*texts] if f"{name}+model" in texts}
    if (stage := _find_stage(typed)) in texts and word.lower() in texts:
        texts[word.lower()] = texts[stage]
    return texts


def _fill_path_lines(program: str, ways: Sequence[str], path: str, typed: Sequence[str], action: str
                     ) -> list[str]:
    """Return command lines for a path typed without an action: one per way, or only the typed direction's."""
    ways = [re.sub(r"(?<=--output )[a-z]\S+", lambda match: choose_free_path(match[0]),
                   way.format(path=shlex.quote(path))) for way in ways]
    directions = [value for name, value in pairwise(typed) if name in _DIRECTION_OPTIONS]
    wanted_actions = {action, *(f"to-{value}" for value in directions)}
    ways = [way for way in ways if way.split()[0] in wanted_actions] or ways
    if len(ways) == 1:
        ways = [_drop_typed_options(ways[0], typed)]
        ways = [_append_typed(ways[0], typed)] if typed else ways
    return [f"{program} {way}" for way in ways]


def find_action(program: str, typed: Sequence[str]) -> str:
    """Return the action that takes one of the typed options; "": none."""
    options = load_table()["by_option"].get(program.replace("submit ", "megatron-sov ", 1), {})
    typed_options = {normalize_word(word.partition("=")[0]) for word in typed if word.startswith("--")}
    return next((action for option, action in options.items() if normalize_word(option) in typed_options), "")


def unwrap_launcher(typed: Sequence[str]) -> list[str] | None:
    """Return the command line for `axolotl train FILE`, `torchrun ... -m megatron_sov sft ...` and the like;
    None: the first word is no launcher."""
    word, rest = typed[0], list(typed[1:])
    launchers = load_table()["launchers"]
    if word in launchers["harnesses"].split():
        return ["eval", "lm", *(rest[1:] if rest[:1] == ["run"] else rest)]
    if word in launchers["programs"].split():
        rest = rest[1:] if rest[:1] == ["run"] and rest[1:] else rest  # torchtune: tune run RECIPE
        if rest and not rest[0].startswith("-"):
            return rest
        has_row = any(word in words.split() for words in load_table()["commands"]["megatron-sov"])
        return None if has_row else ["train", *rest]
    return _unwrap_starter(rest) if word in launchers["starters"].split() else None


def _unwrap_starter(rest: list[str]) -> list[str]:
    """Return our command line for the words after `torchrun`, `accelerate` or `python`; their process count
    becomes `--nproc`."""
    # index of the script or of -m, which follows the starter's own options
    at = next((i for i, word in enumerate(rest) if word.endswith(".py") or word in ("-m", "--module")),
              len(rest))
    options, typed = index_words("options"), list(pair_words([*rest[:at], ""]))
    processes = next((value for name, value in typed if value.isdigit() and (
        "--nproc" in options.get(normalize_word(name), ()) or name in ("-n", "-np"))), "")
    switches = [word for name, value in typed if name.startswith("--") and value != processes
              for word in (name, value) if word and (word == name or not word.startswith("-"))]
    script, *rest = rest[at + (rest[at:at + 1] in (["-m"], ["--module"])):] or ["train.py"]
    name = script.removesuffix(".py").replace("/", ".").rpartition(".")[2].removeprefix("run_")
    rest = rest if name == "megatron_sov" else [name, *rest]
    rest = unwrap_launcher(rest) or rest if rest else ["--help"]
    return [*rest, *switches, *(["--nproc", processes] if processes and "--nproc" not in rest else [])]


def fill_template(begin: str, text: str, typed: Sequence[str]) -> UserError:
    """Build the error for a foreign command.

    Args:
        begin: first part of the message.
        text: advice with our command in backticks, a template.
        typed: words after the foreign command; they replace placeholders in the template.
    """
    if code := re.search("`(python -c .*)`", text):
        folders = [word for word in typed if os.path.isdir(word)] or ["DIR"]
        rest = [word for word in typed if word not in folders and not word.startswith("-")] or ["TEXT"]
        program = code[1].replace("python", shlex.quote(sys.executable), 1)
        line = program.replace("DIR", folders[0]).replace("TEXT", " ".join(rest).replace("'", "\\'"))
        return UserError(f"{begin}; {text.partition(': `')[0]}", Fix(line))
    # a template with named holes: shell commands joined by &&, the last of which is the fix
    if "{first}" in text:
        sentence, commands, _ = text.split("`")
        number_type = find_value(typed, "--outtype", "--quantize", "--type")
        free = [word for word in typed if not word.startswith("-") and word != number_type]
        first = free[0] if free else "OWNER/NAME" if "hf download" in commands else "RUN"
        name = Path(first).name
        second = free[1] if len(free) > 1 else f"{name}-{number_type or 'f16'}.gguf"
        holes = {"first": first, "name": name, "second": second, "type": number_type.upper(),
                 "repo": free[1] if len(free) > 1 else "OWNER/NAME",
                 "gguf": f"{name}.gguf" if number_type else second,
                 "tokenizer": find_value(typed, "--tokenizer") or find_only_folder("tokenizer") or "DIR"}
        if not number_type:
            commands = re.sub(r" && [^&]*{type}", "", commands)
        commands = commands.format(**{hole: shlex.quote(value) for hole, value in holes.items()})
        *before, line = commands.split(" && ")
        return UserError(f"{begin}; {sentence.rstrip(': ')}", Fix(line, before=tuple(before)))
    # other texts quote one of our commands; typed words replace its placeholders and equal options
    match = re.search(r"`((?:megatron-sov|sov-data|sov-tokenizer) [^`]+)`", text)
    words = shlex.split(match[1]) if match else []
    # index of the first option or placeholder of our command
    at = next((n for n, word in enumerate(words) if word.startswith("-") or is_placeholder(word)), len(words))
    if match is None or "..." in match[1] or (typed and at == 1):  # 1: an option of the program: --version
        return UserError(f"{begin}; {text}")
    if not typed:
        command = " ".join(words[:max(at, 2)])
        return UserError(f"{begin}; {text.replace(match[1], command)}", Fix(match[1]))
    values, switches = list[str](), list[str]()
    # add the template's switches, and its options with a value, unless they were typed
    for option, value in pairwise([*words[at:], "--"]):
        is_typed = option in typed and option != "--set"
        if option.startswith("--") and not is_placeholder(value) and not is_typed:
            (switches if value.startswith("--") else values).append(option)
            values += [value] * (not value.startswith("--"))
    if "--list" in switches:
        return UserError(f"{begin}; {text}", Fix(match[1]))
    sentence = text.replace(match[1], " ".join(words[:at]))
    return UserError(f"{begin}; {sentence}", Fix(shlex.join([*words[:at], *values, *typed, *switches])))


def _drop_typed_options(way: str, typed: Sequence[str]) -> str:
    """Remove from a command line the options that were typed, with their values."""
    words = way.split(" --")
    names = {word.partition("=")[0] for word in typed}
    return " --".join([words[0], *(word for word in words[1:] if f"--{word.split()[0]}" not in names)])


def _append_typed(line: str, typed: Sequence[str]) -> str:
    """Append the words typed after a path to a line, without direction options (--to hf); the value of
    `--output` replaces OUT."""
    appended: list[str] = []
    output, words = "", list(typed)
    while words:
        name, equals, value = words.pop(0).partition("=")
        is_output = name.startswith("-") and _is_output(name)
        if not is_output and name not in _DIRECTION_OPTIONS:
            appended.append(f"{name}{equals}{value}")
            continue
        if not equals and words:
            value = words.pop(0)
        if is_output:
            output = value
    if not output and appended and not appended[0].startswith("-"):
        output = appended.pop(0)
    if output and re.search(r" OUT\b", line):
        line = re.sub(r" OUT\b", lambda match: f" {shlex.quote(output)}", line)
    elif output:
        appended += ["--output", output]
    return f"{line} {shlex.join(appended)}".strip()


def _names_model(typed: Sequence[str]) -> bool:
    """Return whether an option, or a key of a foreign configuration file in `typed`, names a model."""
    words = [normalize_word(name) for name, value in pair_words([*typed, ""])
             if name.startswith("-") and not (classify_word(value) == "recipe" and not os.path.exists(value))]
    words += [key.lower() for key in _read_configurations(typed)]
    return any(word == "from" or "--from" in index_words("options").get(word, ()) for word in words)


def _find_stage(typed: Sequence[str]) -> str:
    """Return the training stage in a foreign configuration file, e.g. "dpo"; "": none."""
    stages = [values[0].lower() for key, values in _read_configurations(typed).items()
              if key.lower() in _STAGE_KEYS and values]
    return _STAGE_COMMANDS.get(stages[0], stages[0]) if stages else ""


def _read_configurations(typed: Sequence[str]) -> dict[str, list[str]]:
    """Return key -> values from foreign configuration files among the typed words."""
    return {key: values for path in map(Path, typed)
            if path.suffix in (".yaml", ".yml", ".json") and os.path.isfile(path)
            for key, values in read_foreign_config(path, lambda key: "." in key).items()}


def _is_output(option: str) -> bool:
    """Return whether an option is `--output` or a foreign word for `--output`."""
    word = normalize_word(option)
    return word == "output" or bool({"--output", "OUT"} & {*index_words("options").get(word, ())})


def build_order_error(program: str, typed: Sequence[str], commands: Iterable[str]) -> UserError:
    """Build the error for options before the command, with the command moved to the front."""
    names = {name.split()[0] for name in commands}
    at = next((i for i, word in enumerate(typed) if word in names), 0)
    line = [*typed[at:], *typed[:at]] if at else ["COMMAND", *typed]
    return UserError(f"{typed[0]}: a command comes before its options", Fix(f"{program} {shlex.join(line)}"))
