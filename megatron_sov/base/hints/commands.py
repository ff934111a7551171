"""Errors that name our command for an unknown or foreign one; commands after `torchrun` and the like."""

import argparse
import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

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


def import_commands(parser: Any) -> list[argparse.ArgumentParser]:
    """Import all commands below a parser; return the parser and the parsers of all its commands."""
    getattr(parser, "import_command", lambda: None)()
    below = [child for action in parser._actions if isinstance(action, argparse._SubParsersAction)
             for child in action.choices.values()]
    return [parser, *(other for child in below for other in import_commands(child))]


def build_full_parser(program: str) -> Any:
    """Return a program's parser with the arguments of every command."""
    return import_commands(importlib.import_module(PROGRAMS[program]).build_parser())[0]


@cache
def list_parsers() -> Mapping[str, argparse.ArgumentParser]:
    """Import the commands of all programs; return program and command -> parser with its arguments."""
    parsers = [parser for module in map(importlib.import_module, PROGRAMS.values())
               for parser in import_commands(module.build_parser())]
    return {parser.prog: parser for parser in parsers if " " in parser.prog and "[" not in parser.prog
            and not any(action.nargs == argparse.REMAINDER or (action.required and action.nargs == "A...")
                        for action in parser._actions)}


def build_command_error(program: str, word: str, choices: Sequence[str], typed: Sequence[str] = ()
                        ) -> UserError:
    """Build the error for the unknown command `word` after `program`, e.g. "megatron-sov convert", with the
    command of the same meaning."""
    if program == "sov-data" and (error := propose_pipeline(word, typed)):
        return error
    notes = _index_command_notes(program, word, typed)
    # in `convert hf RUN OUT`, hf is a direction even if a folder named hf exists
    is_word = classify_folder(Path(word)) == "other" or bool(typed and os.path.exists(typed[0]))
    if (note := notes.get(word.lower())) and is_word:
        note = _choose_action_note(note, typed)
        return build_note_error(f"{program} {word}: does not exist", note, typed)
    for name, module in PROGRAMS.items() if program in PROGRAMS else ():
        if word in {command.partition(" ")[0] for command in importlib.import_module(module).COMMANDS}:
            return UserError(f"{program} {word}: is a command of {name}",
                             Fix(f"{name} {shlex.join([word, *typed])}"))
    action = find_action(program, (word, *typed))
    if word.startswith("-") and action:
        return UserError(f"{program}: a command comes before its options",
                         Fix(f"{program} {action} {shlex.join([word, *typed])}"))
    is_argument = word not in notes or os.path.exists(word)
    # the action may follow its arguments: `convert RUN to-hf`
    action_index = next((i for i, (previous, other) in enumerate(pairwise([word, *typed]))
                         if other in choices and not previous.startswith("-")), 0)
    if typed and typed[action_index] in choices and is_argument and (
            not action_index or os.path.exists(word)):
        arguments = [word, *typed[:action_index], *typed[action_index + 1:]]
        return UserError(f"{program}: {typed[action_index]} comes before {word}",
                         Fix(f"{program} {shlex.join([typed[action_index], *arguments])}"))
    actions_by_kind = load_table()["paths"].get(program.replace("submit ", "megatron-sov ", 1))
    if actions_by_kind and (os.sep in word or os.path.exists(word)):
        templates = actions_by_kind.get(classify_folder(Path(word)), actions_by_kind["other"])
        return UserError(f"{program}: {word} is a path, and an action must come before it",
                         Fix("\n  ".join(_fill_path_lines(program, templates, word, typed, action))))
    nearest = find_nearest_name(word, choices)
    suggestion = f"; did you mean '{nearest}'?" if nearest else ""
    fix = Fix(f"{program} {shlex.join([nearest, *typed])}") if nearest and typed else None
    return UserError(
        f"{program} {word}: does not exist{suggestion} (`{program} --help` lists what there is)", fix)


def _choose_action_note(note: str, typed: Sequence[str]) -> str:
    """Return the note on the action that takes a typed option: `eval ppl` for --data, not `eval lm`."""
    group = " ".join(note.partition("`")[2].split()[:2])
    action = find_action(group, typed)
    notes = load_table()["commands"].get(group, {}).values()
    return next((text for text in notes if action and text.startswith(f"`{group} {action} ")), note)


def propose_pipeline(command: str, typed: Sequence[str]) -> UserError | None:
    """Build the error for `sov-data STEP` or `sov-data run` with step options; the fix writes a pipeline.

    Returns None without a known step or an input.
    """
    words = [part for text in typed for part in text.split("=", 1)]
    values = {normalize_word(option): value for option, value in pairwise(words) if option.startswith("-")}
    inputs = [word for word in filter(os.path.exists, typed[:1]) if classify_word(word) in ("data", "folder")]
    source = next((values[name] for name in _PIPELINE_OPTIONS if name in values), "".join(inputs))
    step_words = [command] if command != "run" else [part for word in words for part in word.split(",")]
    index, steps, others = index_words("steps"), dict[str, str](), list[str]()
    for word in step_words:
        same_step = [word] if word in load_table()["steps"] else []
        candidates = same_step or [name for name in index.get(normalize_word(word), ()) if "." not in name]
        if not candidates:
            continue
        settings = {name: _format_step_settings(name, values) for name in candidates}
        # the last candidate with a typed setting, otherwise the first candidate
        step = next((name for name in reversed(candidates) if settings[name]), candidates[0])
        if required_step := load_table()["needed_steps"].get(step):
            steps.setdefault(required_step, _format_step_settings(required_step, values))
        if step in ("sources", "output"):  # parts of every pipeline, which also needs a step
            steps.setdefault("exact_dedup", "")
        else:
            steps[step] = settings[step] or load_table()["step_defaults"].get(step, "")
            others += [name for name in candidates if name != step]
    if not steps or not source:
        return None
    name = next((step for step in steps if step != "language"), "language")
    file = choose_free_path(f"{name}.yaml")
    output = values.get("output", values.get("o", choose_free_path("corpus")))
    unread = [name for name in values if name not in (*_PIPELINE_OPTIONS, "output", "o", "steps")
              and not any(f"{step}.{name}" in index or step in (name, *index.get(name, ()))
                          for step in steps)]
    without = f", without {', '.join(unread)}" if unread else ""
    beside = f" (another step of this kind: {', '.join(dict.fromkeys(others))})" if others else ""
    rules = ("; the step rules reads the language, and applies all rules of its preset: `NAME: null` "
             "under thresholds turns a rule off (docs/filter_rules.md)") if "rules" in steps else ""
    rules += "; `sov-data scorer train` makes its model" if {"quality", "education"} & {*steps} else ""
    return UserError(f"sov-data {command}: a pipeline file names the steps {', '.join(steps)} and their "
                     f"settings{beside} (docs/data_pipeline.md); `sov-data run` runs it{without}{rules}",
                     Fix(f"sov-data run {file} --output {shlex.quote(output)}",
                         before=(write_pipeline(file, source, steps),)))


def _format_step_settings(step: str, values: Mapping[str, str]) -> str:
    """Return the settings of a pipeline step for foreign options: "threshold: 0.8, num_hashes: 64"."""
    index = index_words("steps")
    settings = []
    for option, value in values.items():
        settings += [key.partition(".")[2].format(value) for key in index.get(f"{step}.{option}", ())]
    return ", ".join(settings).replace("}, thresholds: {", ", ")


def _index_command_notes(program: str, word: str, typed: Sequence[str]) -> Mapping[str, str]:
    """Return foreign command -> note with our command. A typed model, a typed text after a folder, or the
    stage in a typed configuration file, selects a note of its own."""
    rows = load_table()["commands"].get(program, {})
    notes = {name: note.replace("{word}", name) for words, note in rows.items() for name in words.split()}
    config = _read_configurations(typed)
    arguments = [word for word in typed if not word.startswith("-")]
    has_text = len(arguments) > 1 and not any(map(os.path.exists, arguments[1:]))
    has_text = has_text and not any(word.startswith("-") and means_output(word) for word in typed)
    form = "+model" if _names_model(typed, config) else "+"
    form = "+text" if has_text else form
    notes |= {name: notes[name + form] for name in [*notes] if name + form in notes}
    if (stage := _find_stage(config)) in notes and word.lower() in notes:
        notes[word.lower()] = notes[stage]
    return notes


def _fill_path_lines(program: str, templates: Sequence[str], path: str, typed: Sequence[str], action: str
                     ) -> list[str]:
    """Return the command lines that take `path`.

    `templates` hold an action, {path} and a suggested output. If `action` or a typed direction (--to hf)
    selects one template, its line also has the typed words.
    """
    lines = []
    for template in templates:
        line = template.format(path=shlex.quote(path))
        lines.append(re.sub(r"(?<=--output )[a-z]\S+", lambda match: choose_free_path(match[0]), line))
    directions = [value for name, value in pairwise(typed) if name in _DIRECTION_OPTIONS]
    typed_actions = {action, *(f"to-{value}" for value in directions)}
    lines = [line for line in lines if line.split()[0] in typed_actions] or lines
    if len(lines) == 1 and typed:
        lines = [_append_typed(_drop_typed_options(lines[0], typed), typed)]
    return [f"{program} {line}" for line in lines]


def find_action(program: str, typed: Sequence[str]) -> str:
    """Return the action that takes one of the typed options; "": none."""
    options = load_table()["by_option"].get(program.replace("submit ", "megatron-sov ", 1), {})
    typed_options = {normalize_word(word.partition("=")[0]) for word in typed if word.startswith("--")}
    return next((action for option, action in options.items() if normalize_word(option) in typed_options), "")


def unwrap_launcher(typed: Sequence[str]) -> list[str] | None:
    """Return the command line for `axolotl train FILE`, `torchrun ... -m megatron_sov sft ...` and the like;
    None: the first word is no launcher."""
    program, arguments = typed[0], list(typed[1:])
    launchers = load_table()["launchers"]
    if program in launchers["harnesses"].split():
        return ["eval", "lm", *(arguments[1:] if arguments[:1] == ["run"] else arguments)]
    if program in launchers["programs"].split():
        if arguments[:1] == ["run"] and arguments[1:]:  # torchtune: tune run RECIPE
            arguments.pop(0)
        if arguments and not arguments[0].startswith("-"):
            return arguments
        has_row = any(program in words.split() for words in load_table()["commands"]["megatron-sov"])
        return None if has_row else ["train", *arguments]
    return _unwrap_process_starter(arguments) if program in launchers["starters"].split() else None


def _unwrap_process_starter(arguments: list[str]) -> list[str]:
    """Return our command line for the arguments of `torchrun`, `accelerate launch` or `python`: [OPTION ...]
    SCRIPT.py [ARGUMENT ...], or -m MODULE in place of the script. The starter's options go to the end, with
    --nproc for its number of processes."""
    is_module_option = [word in ("-m", "--module") for word in arguments]
    script_index = next((i for i, word in enumerate(arguments)
                         if word.endswith(".py") or is_module_option[i]), len(arguments))
    options = list(pair_words([*arguments[:script_index], ""]))
    translations = index_words("options")
    num_processes = next((value for name, value in options if value.isdecimal() and (
        "--nproc" in translations.get(normalize_word(name), ()) or name in ("-n", "-np"))), "")
    starter_words: list[str] = []
    for name, value in options:
        if name.startswith("--") and value != num_processes:
            starter_words += [name, value] if value and not value.startswith("-") else [name]
    if any(is_module_option[script_index:script_index + 1]):
        script_index += 1
    script, *words = arguments[script_index:] or ["train.py"]
    name = script.removesuffix(".py").replace("/", ".").rpartition(".")[2].removeprefix("run_")
    if name != "megatron_sov":
        words.insert(0, name)
    if words:
        words = unwrap_launcher(words) or words
    else:
        words = ["--help"]
    if num_processes and "--nproc" not in words:
        starter_words += ["--nproc", num_processes]
    return [*words, *starter_words]


def build_note_error(begin: str, note: str, typed: Sequence[str]) -> UserError:
    """Build the error for a foreign or removed command.

    Args:
        begin: beginning of the message, which names the command.
        note: sentence with a command of ours between backquotes, as in `words.yaml` and `removed.json`.
        typed: words after the foreign command; they replace the placeholders of our command in the fix.
    """
    if "{first}" in note:
        sentence, commands, _ = note.split("`")
        return UserError(f"{begin}; {sentence.rstrip(': ')}", _fill_command_chain(commands, typed))
    match = re.search(r"`((?:megatron-sov|sov-data|sov-tokenizer) [^`]+)`", note)
    words = shlex.split(match[1]) if match else []
    num_words = next((n for n, word in enumerate(words) if word.startswith("-") or is_placeholder(word)),
                     len(words))
    # with one word the command is an option of the program, --version, which takes no further words
    if match is None or "..." in match[1] or (typed and num_words == 1):
        return UserError(f"{begin}; {note}")
    if not typed:
        command = " ".join(words[:max(num_words, 2)])
        return UserError(f"{begin}; {note.replace(match[1], command)}", Fix(match[1]))
    # add the switches of our command, and its options with a value, unless they were typed
    values, switches = list[str](), list[str]()
    for option, value in pairwise([*words[num_words:], "--"]):
        is_typed = option != "--set" and any(
            option in (word, *index_words("options").get(normalize_word(word), ())) for word in typed)
        if not option.startswith("--") or is_placeholder(value) or is_typed:
            continue
        if value.startswith("--"):
            switches.append(option)
        else:
            values += [option, value]
    if "--list" in switches:
        return UserError(f"{begin}; {note}", Fix(match[1]))
    command_words = words[:num_words]
    sentence = note.replace(match[1], " ".join(command_words))
    return UserError(f"{begin}; {sentence}", Fix(shlex.join([*command_words, *values, *typed, *switches])))


def _fill_command_chain(commands: str, typed: Sequence[str]) -> Fix:
    """Fill the {holes} in commands joined by &&: conversions to GGUF, uploads to a hub, added tokens."""
    number_type = find_value(typed, "--outtype", "--quantize", "--type")
    arguments = [word for word in typed if not word.startswith("-") and word != number_type]
    model = "OWNER/NAME" if "hf download" in commands else "RUN"
    if arguments:
        model = next(filter(os.path.isdir, arguments), arguments[0])
        arguments.insert(0, arguments.pop(arguments.index(model)))
    name = Path(model).name
    output = arguments[1] if len(arguments) > 1 else f"{name}-{number_type or 'f16'}.gguf"
    tokens = find_value(typed, "--tokens", "--special-tokens") or ",".join(arguments[1:])
    holes = {"first": model, "name": name, "second": output, "type": number_type.upper(),
             "repo": arguments[1] if len(arguments) > 1 else "OWNER/NAME",
             "gguf": f"{name}.gguf" if number_type else output,
             "python": sys.executable, "output": find_value(typed, "--output") or f"{name}-added",
             "text": " ".join(arguments[1:]) or "TEXT",
             "tokens": tokens or "TOKEN,TOKEN",
             "tokenizer": find_value(typed, "--tokenizer") or find_only_folder("tokenizer") or "DIR"}
    conversion = "megatron-sov convert to-hf {first} {name}-hf && "
    if conversion in commands and classify_folder(Path(model)) == "hf":
        commands = commands.replace(conversion, "").replace("{name}-hf", "{first}")
    if not number_type:  # no quantization after the conversion
        commands = re.sub(r" && [^&]*{type}", "", commands)
    commands = commands.format(**{hole: shlex.quote(value) for hole, value in holes.items()})
    *first_commands, line = commands.split(" && ")
    return Fix(line, before=tuple(first_commands))


def _drop_typed_options(line: str, typed: Sequence[str]) -> str:
    """Remove the options that were typed, with their values, from a proposed line."""
    command, *options = line.split(" --")
    typed_names = {word.partition("=")[0] for word in typed}
    return " --".join([command, *(text for text in options if f"--{text.split()[0]}" not in typed_names)])


def _append_typed(line: str, typed: Sequence[str]) -> str:
    """Append the words typed after a path to a line, without direction options (--to hf); the value of
    `--output` replaces OUT."""
    appended: list[str] = []
    output, words = "", list(typed)
    while words:
        name, equals, value = words.pop(0).partition("=")
        is_output = name.startswith("-") and means_output(name)
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


def _names_model(typed: Sequence[str], config: Iterable[str]) -> bool:
    """Return whether an option in `typed`, or a key of a foreign configuration file, names a model."""
    words = [normalize_word(name) for name, value in pair_words([*typed, ""])
             if name.startswith("-") and not (classify_word(value) == "recipe" and not os.path.exists(value))]
    words += [key.lower() for key in config]
    return any(word == "from" or "--from" in index_words("options").get(word, ()) for word in words)


def _find_stage(config: Mapping[str, list[str]]) -> str:
    """Return the training stage in a foreign configuration file, e.g. "dpo"; "": none."""
    stages = [values[0].lower() for key, values in config.items() if key.lower() in _STAGE_KEYS and values]
    return _STAGE_COMMANDS.get(stages[0], stages[0]) if stages else ""


def _read_configurations(typed: Sequence[str]) -> dict[str, list[str]]:
    """Return key -> values from foreign configuration files among the typed words."""
    return {key: values for path in map(Path, typed)
            if path.suffix in (".yaml", ".yml", ".json") and os.path.isfile(path)
            for key, values in read_foreign_config(path, lambda key: "." in key).items()}


def means_output(option: str) -> bool:
    """Return whether an option is `--output` or a foreign word for `--output`."""
    word = normalize_word(option)
    return word == "output" or bool({"--output", "OUT"} & {*index_words("options").get(word, ())})


def build_order_error(program: str, typed: Sequence[str], commands: Iterable[str]) -> UserError:
    """Build the error for options before the command, with the command moved to the front."""
    names = {name.split()[0] for name in commands}
    command_index = next((i for i, word in enumerate(typed) if word in names), 0)
    line = ["COMMAND", *typed]
    if command_index:
        line = [*typed[command_index:], *typed[:command_index]]
    return UserError(f"{typed[0]}: a command comes before its options", Fix(f"{program} {shlex.join(line)}"))
