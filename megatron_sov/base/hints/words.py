"""Rewrites a command line with words of other programs (Megatron-LM, Hugging Face, TRL, lm-eval) as a line to
paste; `words.yaml` is asked before any guess by similar letters."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_sov.base.errors import Fix, UserError, warn
from megatron_sov.base.hints.commands import PROGRAMS, propose_pipeline, unwrap_launcher
from megatron_sov.base.hints.foreign import (
    has_translation, parse_blend, read_foreign_config, read_recipe_name)
from megatron_sov.base.hints.kinds import classify_word, find_recipe_option
from megatron_sov.base.hints.missing import choose_placeholder, split_positionals
from megatron_sov.base.hints.rewriting import FOLDER, Rewrite
from megatron_sov.base.hints.table import find_note, get_last_part, index_words, load_table, normalize_word
from megatron_sov.base.hints.values import find_value

RECIPE_COMMANDS = ("pretrain", "extend", "plan")
"""Commands that require a recipe although argparse does not."""
_OPTION = re.compile(r"--?[A-Za-z][\w.-]*\Z")
_SHORT_OPTION = re.compile("-[A-Za-z]+$")
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
    typed = [_rename_option(word, parser.prog, options) for word in typed]
    # lm-eval: --model names a kind, --model_args the model
    kind = ""
    if any(normalize_word(word.partition("=")[0]) == "model_args" for word in typed) and "--model" in typed:
        if any("base_url=" in word for word in typed):
            raise UserError(f"{parser.prog}: weights are read here; lm-eval's own command asks an address",
                            Fix(f"lm_eval {shlex.join(typed)}"))
        at = typed.index("--model")
        kind, typed = " ".join(typed[at:at + 2]), [*typed[:at], *typed[at + 2:]]
    optional = {name for action in parser._actions if not action.required for name in action.option_strings}
    cls = parser.get_default("options_class")
    positionals = [str(action.metavar or action.dest) for action in parser._actions
                   if not action.option_strings]
    _check_resume(parser, typed)
    # an optional --run is not an output folder: `eval` adds its figures to the run's events
    kinds = {name: action for action in parser._actions for name in action.option_strings}
    rewrite = Rewrite(
        [name for name in options if name != "--run" or name not in optional], positionals,
        getattr(cls, "find_setting", None) if "--set" in options else None, typed,
        list_settings=getattr(cls, "list_settings", list) if "--set" in options else list,
        is_recipe=getattr(cls if "RECIPE" in positionals else None, "is_recipe", lambda word: False),
        repeated=[name for name, action in kinds.items() if type(action).__name__ == "_AppendAction"],
        many=[name for name, action in kinds.items() if action.nargs in ("+", "*")],
        command=parser.prog.removeprefix("megatron-sov "), exists=getattr(cls, "is_setting", None))
    if kind:
        rewrite.add_words(f"{kind}: lm-eval's kind of model; leave it out")
    short = _find_short_options(rewrite.command, typed)
    for word, name in short.items():
        if name in options:
            rewrite.add_words(f"{word} is {name} here")
    rewrite.typed = [short.get(word, word) for word in typed]
    _read_words(parser, rewrite)
    _move_model(parser, rewrite)
    _place_free_words(parser, rewrite)
    if rewrite.messages:
        raise _build_error(parser, rewrite)
    return list(typed)


def _check_pasted_words(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Refuse the dashes of a text processor, and an option with its value in one pair of quotes."""
    words: list[str] = []
    for word in typed:
        option, blank, value = re.sub(r"\A-?[\u2013\u2014]-?", "--", word).partition(" ")
        is_option = option in parser._option_string_actions and option != word
        words += [option, *([value] if blank else [])] if is_option else [word]
    if words != list(typed):
        raise UserError(f"{parser.prog}: an option must begin with two plain hyphens, and its value is a "
                        "word of its own", Fix(f"{parser.prog} {shlex.join(words)}"))


def _check_resume(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Refuse `--resume RUN`: `resume` continues a run, and --from takes the weights of a complete run."""
    at = next((n for n, (word, value) in enumerate(pairwise(typed)) if word == "--resume"
               and not value.startswith("-")), -1)
    run = re.sub(r"/checkpoints(/.*)?$", "", typed[at + 1]) if at >= 0 else ""
    if not run or "--resume" not in parser._option_string_actions:
        return
    if "--run" in typed and "--from" not in typed and os.path.exists(os.path.join(run, "complete.json")):
        raise UserError(f"{parser.prog}: {run}: is complete; --from takes its weights, from step 1",
                        Fix(f"{parser.prog} {shlex.join([*typed[:at], '--from', *typed[at + 1:]])}"))
    if "--run" not in typed or os.path.isdir(run):
        changes = [part for pair in pairwise(typed) if pair[0] == "--set" for part in pair]
        raise UserError(f"{parser.prog}: --resume takes no value; `megatron-sov resume RUN` continues a run",
                        Fix(f"megatron-sov resume {shlex.join([run, *changes])}"))


def _check_first_argument(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Refuse an option in place of the first argument, for a command that passes its words on."""
    first = next((str(action.metavar) for action in parser._actions if not action.option_strings), "")
    if not typed or not typed[0].startswith("-") or typed[0] in parser._option_string_actions:
        return
    name, equals, value = typed[0].partition("=")
    value, rest = (value, typed[1:]) if equals else ("".join(typed[1:2]), typed[2:])
    word = normalize_word(name)
    if value and (word == first.lower() or first in index_words("options").get(word, ())):
        raise UserError(f"{parser.prog}: {name} is {first} here, without an option",
                        Fix(f"{parser.prog} {shlex.join([value, *rest])}"))


def _check_passed_words(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Refuse sbatch's short options, and options of a stage before its name, for `submit`."""
    short = _find_short_options(parser.prog.rpartition(" ")[2], typed)
    words = [short.get(word, word) for word in typed]
    messages = [f"{word} is {name}" for word, name in short.items()]
    start = next((n for n, word in enumerate(words) if word in ("--", *PROGRAMS)), len(words))
    launched = words[start + (words[start:][:1] == ["--"]):]
    if launched and parser.get_default("stages"):
        launched[0] = launched[0].removeprefix("sov-")  # the stages data and tokenizer
        words = [*words[:start], *(unwrap_launcher(launched) or launched)]
        messages.append("the stage's name takes the place of -- and of its program")
    at = next((n for n, word in enumerate(words) if word in (parser.get_default("stages") or ())), 0)
    unknown = [word for word in words[:at]
               if word.startswith("-") and word.partition("=")[0] not in parser._option_string_actions]
    if unknown:
        words = [words[at], *words[:at], *words[at + 1:]]
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
    """Read the typed words in order and write their counterparts."""
    typed, options = rewrite.typed, list(parser._option_string_actions)
    if FOLDER in rewrite.positionals and (blend := parse_blend(typed)):
        rewrite.add_words("a weight follows its folder behind a colon",
                          *(word for word in blend if word != "--data"))
        typed = typed[_count_values(typed):]
    switches = {name for action in parser._actions if action.nargs == 0 for name in action.option_strings}
    takes_several = any(action.nargs in ("+", "*") for action in parser._actions if not action.option_strings)
    i = 0
    while i < len(typed):
        text = typed[i]
        word, equals, value = text.partition("=")
        i += 1
        if rewrite.find and _is_override(rewrite, word, equals, typed[:i - 1], switches):
            rewrite.add_words("a setting follows --set")
            rewrite.add_changes([text.lstrip("+")])
        elif "RECIPE" in rewrite.positionals and (option := find_recipe_option(Path(text))) in options and (
                split_positionals(parser, [*rewrite.words, text])[0] == [text]):
            if "--from" in rewrite.words and "--teacher" in options:
                option = "--teacher"
            if option == "--config" and (values := _read_foreign(rewrite, text)):
                _add_foreign_config(rewrite, "RECIPE", text, values)
            else:
                rewrite.add_words(f"{text} is no recipe: it is {option} here", option, text)
        elif text == "--":
            rewrite.words += typed[i - 1:]
            return
        elif not _OPTION.match(word):
            parts = _split_files("", [text])
            if len(parts) > 1 and not takes_several:
                rest = [*typed[:i - 1], *typed[i:]]
                output = find_value(rest, "--output")
                lines = [shlex.join([part, *(f"{Path(part).name}-{word}" if word == output else word
                                             for word in rest)]) for part in parts]
                raise UserError(f"{parser.prog}: {text}: takes one path at a time",
                                Fix("\n  ".join(f"{parser.prog} {line}" for line in lines)))
            if len(parts) > 1:
                rewrite.add_words(f"{text}: several paths are words of their own", *parts)
            else:
                rewrite.words.append(text)
        elif word == "--set" and rewrite.find is not None:
            i = _read_change(rewrite, typed, i)
        elif get_last_part(word) in _CONFIG_WORDS and rewrite.find and (
                values := _read_foreign(rewrite, file := value or "".join(typed[i:i + 1]))):
            _add_foreign_config(rewrite, word, file, values)
            i += not equals
        elif word in options or not _is_unknown(word, rewrite):
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


def _read_own_option(rewrite: Rewrite, text: str, values: list[str], rest: Sequence[str]) -> int:
    """Write an option of the command, or the counterpart of a foreign value; return the words read."""
    option = text.partition("=")[0]
    if option == "--config" and values and not os.path.exists(values[0]) and rewrite.is_recipe(values[0]):
        rewrite.add_words(f"{option} {values[0]}: is a recipe, which takes no option")
        rewrite.first = list(values)
        return 1
    if rewrite.apply_row(option, values, is_existing=True):
        return len(values[:1])
    translated = load_table()["values"].get(option, {}).get("".join(values[:1]).lower())
    if translated:
        rewrite.add_words(f"{option} {values[0]} is {translated} here", option, str(translated))
        return 1
    if len(files := _split_files(option, values)) > 1:
        rewrite.add_words(f"{option} is given once for each",
                          *(word for path in files for word in (option, path)))
        return 1
    if option == "--data" and (blend := parse_blend(rest)):
        rewrite.add_words("--data is given once for each, with its weight behind a colon", *blend)
        return _count_values(rest)
    full = option if option in rewrite.options or not option.startswith("--") else next(
        (name for name in rewrite.options if name.startswith(option)), option)
    rewrite.words.append(full + text[len(option):])
    return 0


def _read_change(rewrite: Rewrite, typed: Sequence[str], i: int) -> int:
    """Read the words after `--set` from index `i`; return the index of the next word."""
    _, equals, value = typed[i - 1].partition("=")
    changes, i = ([value] if equals else list(typed[i:i + 1])), i + (not equals)
    following = "".join(typed[i:i + 2])
    if changes and "[" not in changes[0] and (changes[0].endswith("=") or following.startswith("=")):
        num_parts = 1 + (typed[i:i + 1] == ["="])  # blanks around =
        changes, i = ["".join([changes[0], *typed[i:i + num_parts]])], i + num_parts
        rewrite.add_words("a setting and its value are joined by =, without blanks")
    if changes and "=" not in changes[0] and i < len(typed) and not typed[i].startswith("-"):
        changes, i = [f"{changes[0]}={typed[i]}"], i + 1
        rewrite.add_words("a setting and its value are joined by =")
    if changes and "=" not in changes[0] and os.path.isfile(changes[0]):
        rewrite.add_words(f"{changes[0]}: a file of settings is --config here", "--config", changes[0])
    else:
        rewrite.add_changes(changes)
    return i


def _read_foreign(rewrite: Rewrite, file: str) -> dict[str, list[str]]:
    """Return the settings of another program's configuration file; empty for other files."""
    return read_foreign_config(Path(file), rewrite.exists) if rewrite.exists and file else {}


def _add_foreign_config(rewrite: Rewrite, option: str, file: str, config: Mapping[str, list[str]]) -> None:
    """Write the counterparts of another program's configuration file."""
    messages, lost = list(rewrite.messages), []
    has_data = "--data" in rewrite.typed
    # computed values, e.g. of accumulated micro-batches, need the numbers in the file
    rewrite.typed = [*rewrite.typed, *(word for key, values in config.items()
                                       for word in (f"--{get_last_part(key)}", *values[:1]))]
    renamed = []
    counts = Counter(name.partition(".")[2] for name in rewrite.list_settings())
    own_names = [name for name, count in counts.items() if count == 1]
    # a file with our sections only is the user's own, with keys in wrong sections
    is_own = rewrite.exists is not None and all(rewrite.exists(key.partition(".")[0]) for key in config)
    for key, values in config.items():
        num_words = len(rewrite.words) + len(rewrite.first)
        is_switch = any("=" in name for name in index_words("settings").get(get_last_part(key), ()))
        values = [value for value in values if is_switch or value.lower() not in load_table()["defaults"]]
        if values and "." in key and rewrite.is_setting(key):
            rewrite.words += ["--set", f"{key}={values[0] if len(values) == 1 else json.dumps(values)}"]
        elif values and (has_translation(key) or get_last_part(key) in own_names):
            name = ".".join(key.split(".")[-2:])  # torchtune: checkpointer.checkpoint_dir
            name = name if name in index_words("options") else get_last_part(key)
            rewrite.replace_option(f"--{name}", values)
            added = rewrite.words[num_words - len(rewrite.first):]
            if has_data and added[:1] == ["--data"]:
                del rewrite.words[num_words - len(rewrite.first):]
            renamed.append(f"{key} is {' '.join(added).removeprefix('--set ')}")
        if len(rewrite.words) + len(rewrite.first) == num_words:
            lost.append(key)
    rewrite.messages, rewrite.is_changed = messages, True
    without = f", without {', '.join(lost[:12])}{' ...' if len(lost) > 12 else ''}" if lost else ""
    text = "is another program's configuration; its settings follow"
    if is_own:
        text = f"has keys in wrong places: {', '.join(renamed)} here; correct the file, or pass its settings"
    rewrite.messages.append(f"{option} {file}: {text}{without}")


def _is_override(rewrite: Rewrite, key: str, equals: str, before: Sequence[str], switches: set[str]) -> bool:
    """Return whether a word is a setting without an option, `a.b=c`, as Hydra and NeMo take it."""
    name = key.lstrip("+")
    is_own = rewrite.exists is not None and "." in name and rewrite.is_setting(name)
    if key.startswith("+") and equals and is_own:
        return True
    if not equals or not re.fullmatch(r"\+{0,2}[a-z]\w*(\.\w+)*", key) or rewrite.find is None:
        return False
    is_free = not before or not before[-1].startswith("-") or "=" in before[-1] or before[-1] in switches
    last = name.rpartition(".")[2]
    is_foreign = "." in name and not rewrite.is_setting(name) and bool(
        find_note(last) or rewrite.find_option(last) or rewrite.find_option(name))
    is_in_group = "." in name and rewrite.is_setting(name.partition(".")[0])
    return is_free and bool(is_own or is_in_group or rewrite.find(name) or is_foreign)


def _count_values(words: Sequence[str]) -> int:
    """Return the number of words before the next option."""
    return next((n for n, word in enumerate(words) if _OPTION.match(word.partition("=")[0])), len(words))


def _split_files(option: str, values: Sequence[str]) -> list[str]:
    """Return the files in a comma-separated list, if every file exists."""
    parts = values[0].split(",") if values and option in ("", "--data", "--input", "--prompts") else []
    all_exist = bool(parts) and not os.path.exists(values[0]) and all(
        part and os.path.exists(re.sub(r":[\d.]+$", "", part)) for part in parts)
    return parts if all_exist else []


def _move_model(parser: argparse.ArgumentParser, rewrite: Rewrite) -> None:
    """Move the value of `--model`, if the option has another meaning, or of an adapter's option to TARGET."""
    if rewrite.target:
        free, others = split_positionals(parser, rewrite.words)
        at = others.index("--model") if "--model" in others else len(others)
        rewrite.first, rewrite.words = [rewrite.target], [*free[1:], *others[:at], *others[at + 2:]]
        rewrite.first_by_name[rewrite.positionals[0]] = rewrite.first
        return
    if "TARGET" not in rewrite.positionals or "--model" not in rewrite.words or (
            split_positionals(parser, rewrite.words)[0]):
        return
    at = rewrite.words.index("--model")
    if not rewrite.first and at + 1 < len(rewrite.words):
        rewrite.first = [rewrite.words[at + 1]]
        rewrite.words = [*rewrite.words[:at], *rewrite.words[at + 2:]]
        rewrite.add_words("--model is TARGET here, without an option")


def _place_free_words(parser: argparse.ArgumentParser, rewrite: Rewrite) -> None:
    """Write free words that no positional argument takes after the option for their kind: model folder, data
    file, tokenizer, or a new path for the output."""
    positionals = [action for action in parser._actions if not action.option_strings]
    if any(action.nargs in ("+", "*", argparse.REMAINDER) for action in positionals):
        return
    free, others = split_positionals(parser, rewrite.words)
    output = rewrite.first_by_name.get("OUT", free[2:] and free[-1:])
    if output and len(free) > 1 and (command := load_table()["several"].get(rewrite.command)):
        sources = free if rewrite.first_by_name.pop("OUT", None) else free[:-1]
        rewrite.first = []
        rewrite.words, rewrite.other_command = [*sources, *others, "--output", *output], command
        rewrite.add_words(f"several checkpoints are taken by `megatron-sov {command}`")
        return
    room = max(0, len(positionals) - len(rewrite.first))
    written = {word.partition("=")[0] for word in others}
    takes_recipe = bool(rewrite.positionals) and rewrite.positionals[0] == "RECIPE"
    if len(free) <= room:
        is_misplaced = takes_recipe and {"model", "data", "tokens", "hub"} & set(map(classify_word, free))
        is_lacking = any(action.required and not set(action.option_strings) & written
                         for action in parser._actions if action.option_strings)
        num_required = sum(bool(action.required) for action in positionals)
        if not is_misplaced and not (is_lacking and len(free) > num_required):
            return
    unplaced: list[str] = []
    for number, word in enumerate(free):
        kind = classify_word(word)
        if kind == "recipe" and not takes_recipe and "=" not in word:
            kind = "absent"
        elif kind == "absent" and re.fullmatch("[a-z]+", word) and "--reward" not in written:
            kind = "name"
        # TARGET, RUN and the like come first and take any kind
        is_taken = number < room and not (takes_recipe and kind not in ("recipe", "code"))
        options = [option for option in load_table()["kind_options"][kind] if option in rewrite.options
                   and (option not in written or option == "--data")]
        if is_taken or not options:
            unplaced.append(word)
            continue
        written.add(options[0])
        others += [options[0], word]
        rewrite.add_words(f"{word} is {options[0]} here")
    if len(unplaced) < len(free):
        rewrite.words = [*unplaced, *others]


def _is_unknown(word: str, rewrite: Rewrite) -> bool:
    """Return whether a word is a foreign option; an unambiguous prefix of our option is not."""
    name = normalize_word(word)
    if not word.startswith("--"):
        return True
    completions = [option for option in rewrite.options if option.startswith(word)]
    ours = rewrite.find_option(name)
    is_foreign = (rewrite.find is not None and name in index_words("settings")) or bool(
        ours and ours not in completions)
    return is_foreign or len(completions) != 1


def _rename_option(word: str, program: str, options: Sequence[str]) -> str:
    """Return an option under its present name, with a warning, if the release before used another."""
    name, equals, value = word.partition("=")
    rows = load_table()["renamed"] if name.startswith("--") and name not in options else {}
    present = {**rows.get("*", {}), **rows.get(program, {})}.get(name, "")
    if present not in options:
        return word
    warn(f"{name} is called {present} now; the old name goes with the next release")
    return f"{present}{equals}{value}"


def _add_companions(rewrite: Rewrite) -> None:
    """Write settings and processes that written settings require: two processes for parallel.tp=2."""
    changes = [change for option, change in pairwise(rewrite.words) if option == "--set"]
    values = dict(change.partition("=")[::2] for change in changes)
    if "--config" in rewrite.words or not values:
        return
    for name, required in load_table()["acts_with"].items():
        if name in values and required.partition("=")[0] not in values:
            rewrite.add_words(f"{name} acts with {required}", "--set", required)
    if "--nproc" not in rewrite.options or rewrite.command.startswith(("submit", "plan")):
        return
    sizes = {axis: int(size) for axis in ("tp", "pp", "cp", "ep", "etp")
             if (size := values.get(f"parallel.{axis}", "1")).isdigit()}
    num_processes = sizes.get("pp", 1) * max(sizes.get("tp", 1) * sizes.get("cp", 1),
                                             sizes.get("ep", 1) * sizes.get("etp", 1))
    if num_processes > 1 and "--nproc" not in rewrite.words and len(sizes) == 5:
        rewrite.add_words(f"this layout needs {num_processes} processes", "--nproc", str(num_processes))


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
    line = " ".join([command, *options])
    return UserError(f"{parser.prog}: {_join_messages(rewrite)}", Fix(line, before=tuple(rewrite.before)))


def _order_positionals(parser: argparse.ArgumentParser, rewrite: Rewrite, words: list[str]
                       ) -> tuple[list[str], list[str]]:
    """Return the positional arguments to write first, and the remaining words."""
    first = list(rewrite.first)
    free, others = split_positionals(parser, words)
    if rewrite.first_by_name:
        rest, words = list(free), others
        required = {str(action.metavar or action.dest) for action in parser._actions if action.required}
        first = []
        for name in rewrite.positionals:
            placeholders = [name] if name in required else []
            first += rewrite.first_by_name.get(name) or ([rest.pop(0)] if rest else placeholders)
        first += rest
    folders = first or free
    if rewrite.weights and len(rewrite.weights) == len(folders):
        words = words if first else others
        first = [f"{folder}:{weight}" for folder, weight in zip(folders, rewrite.weights, strict=True)]
    return first, words


def _find_missing_positionals(parser: argparse.ArgumentParser, rewrite: Rewrite, words: Sequence[str]
                              ) -> list[str]:
    """Return placeholders for missing positional arguments, or the recipe of the run in `--from`."""
    options = {word.partition("=")[0] for word in words}
    needs_recipe = rewrite.command in RECIPE_COMMANDS and "--config" not in options and not (
        rewrite.command == "plan" and "--from" in options)
    missing = [str(action.metavar or action.dest) for action in parser._actions
               if not action.option_strings and (action.required or (
                   action.dest == "recipe" and needs_recipe))]
    recipe = read_recipe_name(Path(find_value(words, "--from")))
    # for a model that is not a run the command proposes a recipe
    first = [recipe if name == "RECIPE" and recipe else name for name in missing
             if name != "RECIPE" or recipe or "--from" not in options]
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
        key = (colon + reason, "" if word.startswith("-") else word)
        options.setdefault(key, []).append(word)
    return "; ".join(f"{', '.join(words)}{reason}" for (reason, _), words in options.items())


def _drop_repeated(parser: argparse.ArgumentParser, rewrite: Rewrite) -> list[str]:
    """Return the words without unknown settings; each setting and single option has its typed value."""
    single = {name for action in parser._actions
              if type(action).__name__ in ("_StoreAction", "_StoreTrueAction") and action.nargs in (None, 0)
              for name in action.option_strings}
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
            typed = find_value(rewrite.typed, name)
            typed = rewrite.resumed_run if name == "--run" and rewrite.resumed_run else typed
            is_repeated = key in chosen or bool(rewrite.resumed_run)
            if is_repeated and typed and len(group) > 1 and group[1] != typed:
                continue
        chosen[key] = group
    return [word for group in chosen.values() for word in group]
