"""Rewrites a command line with words of other programs (Megatron-LM, Hugging Face, TRL, lm-eval) as a line to
paste; `words.yaml` is asked before any guess by similar letters."""

import argparse
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path

from megatron_sov.base.errors import Fix, UserError, warn
from megatron_sov.base.hints.commands import PROGRAMS, propose_pipeline, unwrap_launcher
from megatron_sov.base.hints.foreign import find_word, parse_blend, read_foreign_config, read_recipe_name
from megatron_sov.base.hints.kinds import classify_folder, classify_word, find_recipe_option
from megatron_sov.base.hints.missing import choose_placeholder, find_missing_row, split_positionals
from megatron_sov.base.hints.moves import place_options
from megatron_sov.base.hints.paths import fix_address, fix_columns
from megatron_sov.base.hints.rewriting import FOLDER, Rewrite
from megatron_sov.base.hints.table import (
    find_our_value, get_last_part, index_words, load_table, normalize_word)
from megatron_sov.base.hints.values import find_value

RECIPE_COMMANDS = ("pretrain", "extend", "plan")
"""Commands that require a recipe although argparse does not."""
_OPTION = re.compile(r"--?[A-Za-z][\w.-]*\Z")
_SHORT_OPTION = re.compile("-[A-Za-z]+$")
_NUMBER = re.compile(r"[\d.]+")
_CONFIG_WORDS = ("config", "config_file", "config_path", "deepspeed", "deepspeed_config")


def translate_options(parser: argparse.ArgumentParser, typed: Sequence[str]) -> list[str]:
    """Return a command line with renamed options under their new names. Raises `UserError`: lists all unknown
    options and settings, with the corrected line."""
    options = list(parser._option_string_actions)
    if any(action.nargs == argparse.REMAINDER for action in parser._actions):
        _check_first_argument(parser, typed)
        _check_passed_words(parser, typed)
        return list(typed)
    _check_verb(parser, typed)
    _check_pasted_words(parser, typed)
    if parser.prog == "sov-data run" and typed and typed[0].startswith("-") and (
            error := propose_pipeline("run", typed)):
        raise error
    if {"--data", "--columns"} & {*options} and (fix := fix_columns(parser.prog.rpartition(" ")[2], typed)):
        raise UserError(f"{parser.prog}: fields are named when the file is packed", fix)
    addresses = [fix for word in typed if (fix := fix_address(word.partition("=")[2] or word, parser.prog))]
    if addresses:
        raise UserError(f"{parser.prog}: addresses are not read; download their files first", Fix(
            words={word: path for fix in addresses for word, path in fix.words.items()},
            before=tuple(command for fix in addresses for command in fix.before)))
    typed = [_rename_option(word, parser.prog, options) for word in typed]
    model_kind, typed = _split_model_kind(parser, typed)
    _check_resume(parser, typed)
    rewrite = _create_rewrite(parser, typed)
    if model_kind:
        rewrite.add_words(f"{model_kind}: lm-eval's kind of model; leave it out")
    long_names = _find_short_options(rewrite.command, typed)
    for word, name in long_names.items():
        if name in options:
            rewrite.add_words(f"{word} is {name} here")
    rewrite.typed = [long_names.get(word, word) for word in typed]
    _read_words(parser, rewrite)
    _move_model(parser, rewrite)
    _place_free_words(parser, rewrite)
    place_options(parser, rewrite)
    if rewrite.messages:
        raise _build_error(parser, rewrite)
    return list(typed)


def _split_model_kind(parser: argparse.ArgumentParser, typed: list[str]) -> tuple[str, list[str]]:
    """Return (lm-eval's kind of model: "--model hf", or ""; the other words). On a line with --model_args,
    which names the model, --model is the kind."""
    has_arguments = any(normalize_word(word.partition("=")[0]) == "model_args" for word in typed)
    if not has_arguments or "--model" not in typed:
        return "", typed
    if any("base_url=" in word for word in typed):
        raise UserError(f"{parser.prog}: weights are read here; lm-eval's own command asks an address",
                        Fix(f"lm_eval {shlex.join(typed)}"))
    index = typed.index("--model")
    return " ".join(typed[index:index + 2]), [*typed[:index], *typed[index + 2:]]


def _create_rewrite(parser: argparse.ArgumentParser, typed: Sequence[str]) -> Rewrite:
    """Create the rewrite of a line with the options, positional arguments and settings of its command."""
    actions = {name: action for action in parser._actions for name in action.option_strings}
    positionals = [str(action.metavar or action.dest) for action in parser._actions
                   if not action.option_strings]
    cls = parser.get_default("options_class")
    takes_settings = "--set" in actions
    return Rewrite(
        # an optional --run is not an output folder: `eval` adds its figures to the run's events
        [name for name, action in actions.items() if name != "--run" or action.required], positionals,
        getattr(cls, "find_setting", None) if takes_settings else None, typed,
        list_settings=getattr(cls, "list_settings", list) if takes_settings else list,
        is_recipe=getattr(cls if "RECIPE" in positionals else None, "is_recipe", lambda word: False),
        repeated=[name for name, action in actions.items() if type(action).__name__ == "_AppendAction"],
        required=[name for name, action in actions.items() if action.required],
        many=[name for name, action in actions.items() if action.nargs in ("+", "*")],
        command=parser.prog.removeprefix("megatron-sov "), exists=getattr(cls, "is_setting", None))


def _check_pasted_words(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Refuse the dashes of a text processor, and an option with its value in one pair of quotes."""
    words: list[str] = []
    for word in typed:
        option, blank, value = re.sub(r"\A-?[\u2013\u2014]-?", "--", word).partition(" ")
        is_option = option in parser._option_string_actions and option != word
        if not is_option:
            words.append(word)
        else:
            words += [option, value] if blank else [option]
    if words != list(typed):
        raise UserError(f"{parser.prog}: an option must begin with two plain hyphens, and its value is a "
                        "word of its own", Fix(f"{parser.prog} {shlex.join(words)}"))


def _check_resume(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Refuse `--resume RUN`: `resume` continues a run, and --from takes the weights of a complete run."""
    index = next((n for n, (word, value) in enumerate(pairwise(typed)) if word == "--resume"
                  and not value.startswith("-")), -1)
    if index < 0 or "--resume" not in parser._option_string_actions:
        return
    run = re.sub(r"/checkpoints(/.*)?$", "", typed[index + 1])
    if not run:
        return
    if "--run" in typed and "--from" not in typed and os.path.exists(os.path.join(run, "complete.json")):
        words = [*typed[:index], "--from", *typed[index + 1:]]
        raise UserError(f"{parser.prog}: {run}: is complete; --from takes its weights, from step 1",
                        Fix(f"{parser.prog} {shlex.join(words)}"))
    if "--run" not in typed or os.path.isdir(run):
        changes = [part for pair in pairwise(typed) if pair[0] == "--set" for part in pair]
        raise UserError(f"{parser.prog}: --resume takes no value; `megatron-sov resume RUN` continues a run",
                        Fix(f"megatron-sov resume {shlex.join([run, *changes])}"))


def _check_first_argument(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Refuse an option in place of the first argument, for a command that passes its words on."""
    argument = next((str(action.metavar) for action in parser._actions if not action.option_strings), "")
    if not typed or not typed[0].startswith("-") or typed[0] in parser._option_string_actions:
        return
    name, equals, value = typed[0].partition("=")
    words = [value, *typed[1:]] if equals else list(typed[1:])
    option = normalize_word(name)
    is_argument = option == argument.lower() or argument in index_words("options").get(option, ())
    if words and words[0] and is_argument:
        raise UserError(f"{parser.prog}: {name} is {argument} here, without an option",
                        Fix(f"{parser.prog} {shlex.join(words)}"))


def _check_passed_words(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Refuse sbatch's short options, and options of a stage before its name, for `submit`."""
    long_names = _find_short_options(parser.prog.rpartition(" ")[2], typed)
    words = [long_names.get(word, word) for word in typed]
    messages = [f"{word} is {name}" for word, name in long_names.items()]
    stages = parser.get_default("stages") or ()
    command_index = next((n for n, word in enumerate(words) if word in ("--", *PROGRAMS)
                          or word in load_table()["launchers"]["starters"].split()), len(words))
    command = words[command_index:]
    if command[:1] == ["--"]:
        command.pop(0)
    if command and stages:
        command[0] = command[0].removeprefix("sov-")  # the stages data and tokenizer
        words = [*words[:command_index], *(unwrap_launcher(command) or command)]
        messages.append("the stage's name takes the place of -- and of its program")
    stage_index = next((n for n, word in enumerate(words) if word in stages), 0)
    unknown = [word for word in words[:stage_index]
               if word.startswith("-") and word.partition("=")[0] not in parser._option_string_actions]
    if unknown:
        words.insert(0, words.pop(stage_index))
        messages.append(f"{words[0]} comes before {unknown[0]}")
    if messages:
        raise UserError(f"{parser.prog}: {'; '.join(messages)}", Fix(f"{parser.prog} {shlex.join(words)}"))


def _find_short_options(command: str, typed: Sequence[str]) -> dict[str, str]:
    """Return short option of sbatch or llama.cpp -> its long name; a line without any reads no table."""
    if not any(_SHORT_OPTION.match(word) for word in typed):
        return {}
    rows = load_table()["short"].get(command, {})
    return {word: rows[word] for word in typed if word in rows}


def _check_verb(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Refuse a verb before the first argument: `recipes show NAME`, `chat start MODEL`.

    A path may have a verb's name (`convert to-hf run OUT`), so the verb must be one word too many.
    """
    arguments = [action for action in parser._actions if not action.option_strings]
    is_full = bool(arguments) and not any(action.nargs in ("*", "+") for action in arguments) and (
        len(split_positionals(parser, typed)[0]) > len(arguments))
    if is_full and {*typed[:1]} & {*load_table()["verbs"].split()} and not os.path.exists(typed[0]):
        raise UserError(f"{parser.prog} {typed[0]}: does not exist; leave {typed[0]} out",
                        Fix(f"{parser.prog} {shlex.join(typed[1:])}".rstrip()))


def _read_words(parser: argparse.ArgumentParser, rewrite: Rewrite) -> None:
    """Read `rewrite.typed` in order and write the counterpart of each word to `rewrite.words`."""
    typed, options = rewrite.typed, list(parser._option_string_actions)
    if FOLDER in rewrite.positionals and (blend := parse_blend(typed)):
        rewrite.add_words("a weight follows its folder behind a colon", *blend)
        typed = typed[_count_values(typed):]
    switches = {name for action in parser._actions if action.nargs == 0 for name in action.option_strings}
    takes_several = any(action.nargs in ("+", "*") for action in parser._actions if not action.option_strings)
    i = 0
    while i < len(typed):
        text = typed[i]
        word, equals, value = text.partition("=")
        i += 1
        if rewrite.find and rewrite.is_override(word, equals, typed[:i - 1], switches):  # Hydra: a.b=c
            rewrite.add_words("a setting follows --set")
            rewrite.add_changes([text.lstrip("+")])
        elif "RECIPE" in rewrite.positionals and (option := find_recipe_option(Path(text))) in options and (
                split_positionals(parser, [*rewrite.words, text])[0] == [text]):
            if "--from" in rewrite.words and "--teacher" in options:
                option = "--teacher"
            if classify_folder(Path(text).parent) == "hf" and Path(text).name == "config.json":
                option, text = "--from", str(Path(text).parent)
            if option == "--config" and (values := _read_foreign(rewrite, text)):
                _add_foreign_config(rewrite, "RECIPE", text, values)
            else:
                rewrite.add_words(f"{text} is no recipe: it is {option} here", option, text)
        elif text == "--":
            rewrite.words += typed[i - 1:]
            return
        elif not _OPTION.match(word):
            paths = _split_files("", [text])
            if len(paths) > 1 and not takes_several:
                raise _build_repetition_error(parser.prog, text, paths, [*typed[:i - 1], *typed[i:]])
            if len(paths) > 1:
                rewrite.add_words(f"{text}: several paths are words of their own", *paths)
            else:
                rewrite.words.append(text)
        elif word == "--set" and rewrite.find is not None:
            i = _read_change(rewrite, typed, i)
        elif get_last_part(word) in _CONFIG_WORDS and rewrite.find and (
                values := _read_foreign(rewrite, file := value or "".join(typed[i:i + 1]))):
            _add_foreign_config(rewrite, word, file, values)
            i += 0 if equals else 1  # the next word was the file
        elif word in options:
            following = [] if word in switches else list(typed[i:i + 1])
            num_used = _read_own_option(rewrite, text, [value] if equals else following, typed[i:])
            i += 0 if equals else num_used
        else:
            free = split_positionals(parser, rewrite.words)[0]
            has_room = len(free) + len(rewrite.first) < len(rewrite.positionals)
            following = list(typed[i:i + _count_values(typed[i:])])
            num_values = 0 if equals else rewrite.count_values(word, following, has_room)
            rewrite.replace_option(word, [value] if equals else list(typed[i:i + num_values]))
            i += num_values


def _build_repetition_error(program: str, text: str, paths: Sequence[str], words: Sequence[str]) -> UserError:
    """Build the error for comma-separated `paths` in one argument `text`, with a line for each path: its
    `--output` is prefixed by the path's name. `words`: the other words of the line."""
    output = find_value(words, "--output")
    lines = []
    for path in paths:
        others = [f"{Path(path).name}-{word}" if word == output else word for word in words]
        lines.append(f"{program} {shlex.join([path, *others])}")
    return UserError(f"{program}: {text}: takes one path at a time", Fix("\n  ".join(lines)))


def _read_own_option(rewrite: Rewrite, text: str, values: list[str], following: Sequence[str]) -> int:
    """Write an option of the command, or the counterpart of a foreign value; return how many of the words
    `following` the option as typed (`text`) were read."""
    option = text.partition("=")[0]
    if option == "--config" and values and not os.path.exists(values[0]) and rewrite.is_recipe(values[0]):
        rewrite.add_words(f"{option} {values[0]}: is a recipe, which takes no option")
        rewrite.first = list(values)
        return 1
    if rewrite.apply_row(option, values, is_existing=True):
        return min(len(values), 1)
    if values and (translated := find_our_value(values[0], option)):
        rewrite.add_words(f"{option} {values[0]} is {translated} here", option, translated)
        return 1
    files = _split_files(option, values)
    if files and files != [values[0]]:
        rewrite.add_words(f"{option} is given once for each, as FOLDER:WEIGHT",
                          *(word for path in files for word in (option, path)))
        return 1
    if option == "--data" and (blend := parse_blend(following)):
        rewrite.add_words("--data is given once for each, with its weight behind a colon",
                          *(word for item in blend for word in (option, item)))
        return _count_values(following)
    if option == "--weights" and len(numbers := list(takewhile(_NUMBER.fullmatch, following))) > 1:
        rewrite.words += [option, ",".join(numbers)]
        return len(numbers)
    rewrite.words.append(text)
    return 0


def _read_change(rewrite: Rewrite, typed: Sequence[str], i: int) -> int:
    """Read the words after `--set` from index `i`; return the index of the next word."""
    _, equals, change = typed[i - 1].partition("=")
    if not equals:
        if i == len(typed):
            return i + 1
        change, i = typed[i], i + 1
    following = "".join(typed[i:i + 2])
    if "[" not in change and (change.endswith("=") or following.startswith("=")):
        num_parts = 1 + (typed[i:i + 1] == ["="])  # blanks around =
        change, i = "".join([change, *typed[i:i + num_parts]]), i + num_parts
        rewrite.add_words("a setting and its value are joined by =, without blanks")
    if "=" not in change and i < len(typed) and not typed[i].startswith("-"):
        change, i = f"{change}={typed[i]}", i + 1
        rewrite.add_words("a setting and its value are joined by =")
    if "=" not in change and os.path.isfile(change):
        rewrite.add_words(f"{change}: a file of settings is --config here", "--config", change)
    else:
        rewrite.add_changes([change])
    return i


def _read_foreign(rewrite: Rewrite, file: str) -> dict[str, list[str]]:
    """Return the settings of another program's configuration file; empty for other files."""
    return read_foreign_config(Path(file), rewrite.exists) if rewrite.exists and file else {}


def _add_foreign_config(rewrite: Rewrite, option: str, file: str, config: Mapping[str, list[str]]) -> None:
    """Write the counterparts of another program's configuration file, and one message for all its keys."""
    messages = list(rewrite.messages)
    has_data = "--data" in rewrite.typed
    # computed values, e.g. of accumulated micro-batches, need the numbers in the file
    rewrite.typed = list(rewrite.typed)
    for key, values in config.items():
        rewrite.typed += [f"--{get_last_part(key)}", *values[:1]]
    renamed, untranslated = list[str](), list[str]()
    counts = Counter(name.partition(".")[2] for name in rewrite.list_settings())
    own_names = [name for name, count in counts.items() if count == 1]
    # a file with our sections only is the user's own, with keys in wrong sections
    is_own = rewrite.exists is not None and all(rewrite.exists(key.partition(".")[0]) for key in config)
    for key, values in config.items():
        num_words, num_first = len(rewrite.words), len(rewrite.first)  # to see below whether any is added
        is_switch = any("=" in name for name in index_words("settings").get(get_last_part(key), ()))
        values = [value for value in values if is_switch or value.lower() not in load_table()["defaults"]]
        if values and "." in key and rewrite.is_setting(key):
            rewrite.words += ["--set", f"{key}={values[0] if len(values) == 1 else json.dumps(values)}"]
        elif values and (name := find_word(key) or get_last_part(key)) in (find_word(key), *own_names):
            rewrite.replace_option(f"--{name}", values)
            added = rewrite.words[num_words:]
            if has_data and added[:1] == ["--data"]:  # the typed shards win
                del rewrite.words[num_words:]
            renamed.append(f"{key} is {' '.join(added).removeprefix('--set ')}")
        elif values and any(rewrite.apply_row(part, values)
                            for part in (".".join(key.split(".")[-2:]), get_last_part(key))):
            messages.append(rewrite.messages[-1])
        if len(rewrite.words) == num_words and len(rewrite.first) == num_first:
            untranslated.append(key)
    rewrite.messages, rewrite.is_changed = messages, True
    text = "is another program's configuration; its settings follow"
    if is_own:
        text = f"has keys in wrong places: {', '.join(renamed)} here; correct the file, or pass its settings"
    if untranslated:
        more = " ..." if len(untranslated) > 12 else ""
        text += f", without {', '.join(untranslated[:12])}{more}"
    rewrite.messages.append(f"{option} {file}: {text}")


def _count_values(words: Sequence[str]) -> int:
    """Return the number of words before the next option."""
    return next((n for n, word in enumerate(words) if _OPTION.match(word.partition("=")[0])), len(words))


def _split_files(option: str, values: Sequence[str]) -> list[str]:
    """Return FILE[:WEIGHT] for each item of FILE[:WEIGHT],WEIGHT:FILE,...; empty unless every file exists."""
    if not values or option not in ("", "--data", "--input", "--prompts") or os.path.exists(values[0]):
        return []
    items = [re.sub(r"\A([\d.]+):(?!\d)(.+)", r"\2:\1", item) for item in values[0].split(",")]
    files = [re.sub(r":[\d.]+$", "", item) for item in items]
    return items if all(map(os.path.exists, files)) else []


def _move_model(parser: argparse.ArgumentParser, rewrite: Rewrite) -> None:
    """Move the value of `--model`, if the option has another meaning, or of an adapter's option to TARGET."""
    positionals, options = split_positionals(parser, rewrite.words)
    if rewrite.target:
        index = options.index("--model") if "--model" in options else len(options)
        rewrite.first = [rewrite.target]
        rewrite.words = [*positionals[1:], *options[:index], *options[index + 2:]]
        rewrite.first_by_name[rewrite.positionals[0]] = rewrite.first
        return
    if "TARGET" not in rewrite.positionals or "--model" not in rewrite.words or positionals:
        return
    index = rewrite.words.index("--model")
    if not rewrite.first and index + 1 < len(rewrite.words):
        rewrite.first = [rewrite.words[index + 1]]
        rewrite.words = [*rewrite.words[:index], *rewrite.words[index + 2:]]
        rewrite.add_words("--model is TARGET here, without an option")


def _place_free_words(parser: argparse.ArgumentParser, rewrite: Rewrite) -> None:
    """Write free words that no positional argument takes after the option for their kind: model folder, data
    file, tokenizer, or a new path for the output."""
    arguments = [action for action in parser._actions if not action.option_strings]
    if any(action.nargs in ("+", "*", argparse.REMAINDER) for action in arguments):
        return
    free_words, option_words = split_positionals(parser, rewrite.words)
    output = rewrite.first_by_name.get("OUT", free_words[-1:] if len(free_words) > 2 else [])
    if output and len(free_words) > 1 and (command := load_table()["several"].get(rewrite.command)):
        sources = free_words if rewrite.first_by_name.pop("OUT", None) else free_words[:-1]
        rewrite.first = []
        rewrite.words, rewrite.other_command = [*sources, *option_words, "--output", *output], command
        rewrite.add_words(f"several checkpoints are taken by `megatron-sov {command}`")
        return
    num_arguments = max(0, len(arguments) - len(rewrite.first))
    if len(free_words) == num_arguments + 1 and not os.path.exists(free_words[0]) and (
            re.fullmatch("[a-z]+", free_words[0]) and all(map(os.path.exists, free_words[1:]))):
        rewrite.add_words(f"{free_words.pop(0)}: is no file or folder; leave it out")
        rewrite.words = [*free_words, *option_words]
    written = {word.partition("=")[0] for word in option_words}
    takes_recipe = bool(rewrite.positionals) and rewrite.positionals[0] == "RECIPE"
    # words that fit the positional arguments stay, unless a recipe is another kind of word, or a required
    # option is missing and a word may be its value
    if len(free_words) <= num_arguments:
        kinds = set(map(classify_word, free_words))
        is_misplaced = takes_recipe and kinds & {"model", "data", "tokens", "hub"}
        lacks_option = any(action.required and not set(action.option_strings) & written
                           for action in parser._actions if action.option_strings)
        num_required = sum(bool(action.required) for action in arguments)
        if not is_misplaced and not (lacks_option and len(free_words) > num_required):
            return
    unplaced: list[str] = []
    takes_weights = "--from" in rewrite.required or "--data" not in rewrite.options
    find_recipe = getattr(parser.get_default("options_class"), "find_recipe", lambda word: "")
    for index, word in enumerate(free_words):
        kind = classify_word(word)
        if kind == "hub" and takes_recipe and not takes_weights and (recipe := find_recipe(word)):
            unplaced.append(recipe)
            rewrite.add_words(f"{word} is the recipe {recipe} here, and nothing is downloaded")
            continue
        if kind == "recipe" and not takes_recipe and "=" not in word:
            kind = "absent"
        elif kind == "absent" and re.fullmatch("[a-z]+", word) and "--reward" not in written:
            kind = "name"
        # TARGET, RUN and the like come first and take any kind
        is_argument = index < num_arguments and not (takes_recipe and kind not in ("recipe", "code"))
        options = [option for option in load_table()["kind_options"][kind] if option in rewrite.options
                   and (option not in written or (option == "--data" and kind != "hub"))]
        if is_argument or not options:
            unplaced.append(word)
            continue
        written.add(options[0])
        option_words += [options[0], word]
        rewrite.add_words(f"{word} is {options[0]} here")
    if unplaced != free_words:
        rewrite.words = [*unplaced, *option_words]


def _rename_option(word: str, program: str, options: Sequence[str]) -> str:
    """Return an option under its present name, with a warning, if the release before used another."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or name in options:
        return word
    rows = load_table()["renamed"]
    new_name = {**rows.get("*", {}), **rows.get(program, {})}.get(name, "")
    if new_name not in options:
        return word
    warn(f"{name} is called {new_name} now; the old name goes with the next release")
    return f"{new_name}{equals}{value}"


def _add_companions(rewrite: Rewrite) -> None:
    """Write settings and processes that written settings require: two processes for parallel.tp=2."""
    changes = [change for option, change in pairwise(rewrite.words) if option == "--set"]
    values = dict(change.partition("=")[::2] for change in changes)
    if "--config" in rewrite.words:
        return
    for name, required in load_table()["acts_with"].items():
        if name in values and required.partition("=")[0] not in values:
            rewrite.add_words(f"{name} acts with {required}", "--set", required)
    if "--nproc" not in rewrite.options or rewrite.command.startswith(("submit", "plan")):
        return
    sizes = [values.get(f"parallel.{axis}", "1") for axis in ("tp", "pp", "cp", "ep", "etp")]
    if "--nproc" in rewrite.words or not all(size.isdecimal() for size in sizes):
        return
    tp, pp, cp, ep, etp = map(int, sizes)
    num_local = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun's processes on this machine
    num_started = int(num_local) if num_local == os.environ.get("WORLD_SIZE") else 1
    num_processes = max(num_started, pp * max(tp * cp, ep * etp))
    if num_processes > 1:
        rewrite.add_words(f"{num_processes} processes are started by --nproc", "--nproc", str(num_processes))


def _build_error(parser: argparse.ArgumentParser, rewrite: Rewrite) -> UserError:
    """Build the error for all unknown words, with the corrected line if a word has a counterpart."""
    if rewrite.line:
        return UserError(f"{parser.prog}: {'; '.join(dict.fromkeys(rewrite.messages))}", Fix(rewrite.line))
    if not rewrite.is_changed:
        messages = "; ".join(dict.fromkeys(rewrite.messages))
        return UserError(f"{parser.prog}: {messages} (--help lists what it takes)")
    _add_companions(rewrite)
    words = _drop_repeated(parser, rewrite)
    written = {word.partition("=")[0] for word in words}
    missing = {action.option_strings[0]: choose_placeholder(action, parser.prog) for action in parser._actions
               if action.required and action.option_strings and not set(action.option_strings) & written}
    missing = {} if rewrite.other_command else missing
    if missing:
        rewrite.messages.append(_list_missing(missing))
    first, words = _order_positionals(parser, rewrite, words)
    if not first and not split_positionals(parser, words)[0]:
        first = _find_missing_positionals(parser, rewrite, words)
    program = f"megatron-sov {rewrite.other_command}" if rewrite.other_command else parser.prog
    command = f"{program} {shlex.join([*first, *words])}".strip()
    options = [f"{option} {value}" for option, value in missing.items()]
    output = [f"> {shlex.quote(rewrite.output)}"] if rewrite.output else []
    line = " ".join(filter(None, [rewrite.prefix, command, *options, *output]))
    lines = [*rewrite.before, line, *rewrite.after]
    return UserError(f"{parser.prog}: {_join_messages(rewrite)}", Fix(lines[-1], before=tuple(lines[:-1])))


def _order_positionals(parser: argparse.ArgumentParser, rewrite: Rewrite, words: list[str]
                       ) -> tuple[list[str], list[str]]:
    """Return the positional arguments to write first, and the remaining words."""
    first = list(rewrite.first)
    free_words, option_words = split_positionals(parser, words)
    if rewrite.first_by_name:
        remaining, words = list(free_words), option_words
        required = {str(action.metavar or action.dest) for action in parser._actions if action.required}
        first = []
        for name in rewrite.positionals:
            if values := rewrite.first_by_name.get(name):
                first += values
            elif remaining:
                first.append(remaining.pop(0))
            elif name in required:
                first.append(name)
        first += remaining
    folders = first or free_words
    if rewrite.weights and len(rewrite.weights) == len(folders):
        words = words if first else option_words
        first = [f"{folder}:{weight}" for folder, weight in zip(folders, rewrite.weights, strict=True)]
    return first, words


def _find_missing_positionals(parser: argparse.ArgumentParser, rewrite: Rewrite, words: Sequence[str]
                              ) -> list[str]:
    """Return placeholders for missing positional arguments, or the recipe of the run in `--from`."""
    options = {word.partition("=")[0] for word in words}
    needs_recipe = rewrite.command in RECIPE_COMMANDS and "--config" not in options
    if rewrite.command == "plan" and "--from" in options:
        needs_recipe = False
    missing = [str(action.metavar or action.dest) for action in parser._actions if not action.option_strings
               and (action.required or (action.dest == "recipe" and needs_recipe))]
    recipe = read_recipe_name(Path(find_value(words, "--from")))
    first = []
    for name in missing:
        if name != "RECIPE":
            first.append(find_missing_row(parser.prog, name).get("write", name))
        elif recipe or "--from" not in options:  # for a model that is not a run the command proposes a recipe
            first.append(recipe or name)
    if missing and "RECIPE" in [*first, *missing[1:]]:
        rewrite.messages.append(f"{_list_missing(missing)}; `megatron-sov recipes` lists the recipes")
    return first


def _list_missing(names: Collection[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"


def _join_messages(rewrite: Rewrite) -> str:
    """Join all messages; options with the same message are listed together."""
    options: dict[tuple[str, str], list[str]] = {}
    for message in dict.fromkeys([*rewrite.messages, *rewrite.unknown_settings.values()]):
        word, colon, reason = message.partition(": ")
        key = (colon + reason, "" if colon or word.startswith("-") else word)
        options.setdefault(key, []).append(word)
    return "; ".join(f"{', '.join(words)}{reason}" for (reason, _), words in options.items())


def _drop_repeated(parser: argparse.ArgumentParser, rewrite: Rewrite) -> list[str]:
    """Return the words without unknown settings; each setting and single option has its typed value."""
    single = {name for action in parser._actions
              if type(action).__name__ in ("_StoreAction", "_StoreTrueAction") and action.nargs in (None, 0)
              for name in action.option_strings} | {*rewrite.overruled}
    groups: list[list[str]] = []
    words = list(rewrite.words)
    while words:
        word = words.pop(0)
        takes_value = word == "--set" or (word in single and parser._option_string_actions[word].nargs != 0)
        groups.append([word, words.pop(0)] if takes_value and words else [word])
    chosen: dict[str, list[str]] = {}
    for number, group in enumerate(groups):
        name = group[0].partition("=")[0]
        key = str(number)
        if group[0] == "--set" and len(group) > 1:
            key = f"--set {group[1].partition('=')[0]}"
            if group[1] in rewrite.unknown_settings or (group[1] in rewrite.weak_settings and key in chosen):
                continue
        elif name in single:
            key = name
            typed = rewrite.overruled.get(name) or find_value(rewrite.typed, name)
            is_repeated = key in chosen or name in rewrite.overruled
            if is_repeated and typed and len(group) > 1 and group[1] != typed:
                continue
        chosen[key] = group
    return [word for group in chosen.values() for word in group]
