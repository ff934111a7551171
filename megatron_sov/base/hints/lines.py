"""Corrects a refused command line by the fixes of its errors until all checks pass."""

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from megatron_sov.base.errors import Fix, UserError, check_only, choose_free_path, fix_missing
from megatron_sov.base.hints.kinds import classify_folder, find_only_folder, list_models
from megatron_sov.base.hints.paths import find_path_faults, use_typed_tokenizer
from megatron_sov.base.hints.table import load_table
from megatron_sov.base.hints.values import find_value

MAX_FAULTS = 8
"""Maximum faults collected from a command line."""
_PROGRAM = re.compile(r"(?:megatron-sov|sov-data|sov-tokenizer|submit)[a-z -]*: (?!does not exist)")
"""Beginning of a parser's message."""
_GROUPS = ("convert", "eval", "rl", "submit", "tools", "codec", "scorer")
"""First words of two-word commands."""
_PLACEHOLDER = re.compile(r"(?!ACCOUNT\Z)(?:[AB]|[A-Z][A-Z_]+)(?:[|:,/][A-Z_]+)*(?:\.[a-z]+|\[:[A-Z]+\])?\Z"
                          r"|\[NAME=\].*|(?:\w+=FIELD,?)+\Z|\w+=FILE\Z|\w+(?:\.\w+)*=[A-Z]{2,}\Z")
"""Word in a proposed line that the user must replace: DIR, FILE|DIR, DIR:WEIGHT, A.json, [NAME=]PATH,
en=FILE, prompt=FIELD. Checks accept any ACCOUNT."""
_ADVICE = re.compile(r"(?:pass|add|take|use|write|set|name yours with) `?(?:--set )?"
                     r"((--[a-z][\w-]*) (?!(?:to|or|and|for|of|in|on|is|with|as|if|by|the|a|at)\b)"
                     r"([^\s`;,)(]+)|[a-z_]+(?:\.\w+)+=[^\s`;,)(]+)(?! to `)")

_SEVERAL = re.compile(r"\n| [|>] ")
"""In several commands."""

Check = Callable[[list[str]], object]
FindCheck = Callable[[str], Check | None]
"""Program -> check of its lines; None: another program."""


@dataclass
class _Proposal:
    """A command line under correction."""

    program: str
    typed: Sequence[str]
    check: Check
    line: list[str]
    fixed: list[str] = field(default_factory=list)
    """Messages of corrected faults."""
    unfixed: list[str] = field(default_factory=list)
    """Messages of faults without a fix."""
    before: list[str] = field(default_factory=list)
    """Commands to run first."""
    new_paths: list[str] = field(default_factory=list)
    """Paths that `before` creates."""
    stand_ins: dict[str, str] = field(default_factory=dict)
    """Faulty word that stays in the line -> valid word for the checks."""
    hidden: list[str] = field(default_factory=list)
    """Faulty options without a fix, each with its value, that the checks skip."""
    typed_program: str = ""
    results: dict[tuple[str, ...], UserError | None] = field(default_factory=dict)
    """Program and words -> fault; a check can take seconds."""

    @property
    def messages(self) -> str:
        return " ".join([*self.fixed, *self.unfixed])

    def find_fault(self) -> UserError | None:
        """Return the next fault; None: the check passes or stops at a placeholder."""
        error = self.run_check()
        for _ in range(MAX_FAULTS):
            if error is None:
                break
            if not self.is_expected(error):
                return error
            error = self.find_independent_fault(error)
        return self.find_path_fault(self.messages, is_named=False)

    def is_expected(self, error: UserError) -> bool:
        """Return whether a fault is about a placeholder, or a path that `before` creates."""
        placeholders = [word for word in self.line if is_placeholder(word) and word not in self.typed]
        inside = [part for word in self.line for part in word.split("=")  # of a new folder
                  if any(part.startswith(f"{path}/") for path in self.new_paths)]
        names = [*placeholders, *(part for word in placeholders for part in word.split("=")), *inside,
                 *self.new_paths, *map(os.path.abspath, self.new_paths)]
        return any(_names_word(error.sentence, word) for word in names)

    def find_path_fault(self, message: str, *, is_named: bool) -> UserError | None:
        """Return the first fault of a path that `message` names, or does not name; run no check."""
        fault = next((fault for path, fault in find_path_faults(self.program, self.line, self.typed)
                      if _names_word(message, path) == is_named and path not in self.new_paths), None)
        fault = fault or (self._find_artifact_fault(message) if is_named else None)
        if fault is not None or not is_named or "does not exist" not in message:
            return fault
        # a misspelt path without an option
        fixes = [fix_missing(word, is_data=True) for word in self.line[1:]
                 if _names_word(message, word) and not os.path.exists(word)]
        return next((UserError(message, fix) for fix in fixes if fix and not fix.before), None)

    def _find_artifact_fault(self, message: str) -> UserError | None:
        """Return the fault of a named path in an artifact, if the check accepts the artifact in its place."""
        words = [word for word in self.line[1:] if _names_word(message, word) and not os.path.isdir(word)
                 # a run is not taken for its missing checkpoint; commands read tokenizer.json like its folder
                 and not re.search(r"/step-\d+\Z|tokenizer\.json\Z", word)]
        for word, folder in [(path, folder) for path in words for folder in Path(path).parents[:-1]]:
            kind, fix = load_table()["kinds"].get(classify_folder(folder)), Fix(words={word: str(folder)})
            line = apply_fix(self.program, self.line, fix) if kind else None
            if not line:
                continue
            new_fault = replace(self, line=line).run_check()
            if new_fault is None or not _names_word(new_fault.sentence, str(folder)):
                return UserError(f"{word}: is in {folder}, {kind}; pass the folder", fix)
        return None

    def find_independent_fault(self, fault: UserError) -> UserError | None:
        """Return a further fault, found by checking the line without the option that `fault` names."""
        if path_fault := self.find_path_fault(self.messages, is_named=False):
            return path_fault
        named = [pair for pair in _pair_options(self.line)
                 if pair not in self.hidden and _names_option(fault.sentence, pair)]
        named += [word for before, word in pairwise(self.line) for path in self.new_paths  # FOLDER:WEIGHT
                  if word.startswith(path) and not before.startswith("-") and word not in self.hidden
                  and _names_word(fault.sentence, path)]
        if not named:
            return None
        self.hidden += named
        other = self.run_check()
        return other if other and not is_repeated(other.sentence, [*self.fixed, *self.unfixed]) else None

    def run_check(self) -> UserError | None:
        """Return the fault that the check raises for the line, apart from hidden options; None: no fault."""
        words = [self.stand_ins.get(word, word) for word in _leave_out(self.line, self.hidden)]
        key = (self.program, *words)
        if key not in self.results:
            self.results[key] = _run_check(self.check, words)
        error = self.results[key]
        if error is None:
            return None
        # the check may miss the hidden options, or a stand-in may not fit the other words
        names_hidden = any(_names_word(error.sentence, _get_key(pair)) for pair in self.hidden)
        misses_hidden = self.hidden and re.search("required|missing", error.sentence)
        names_stand_in = any(_names_word(error.sentence, word) for word in self.stand_ins.values())
        return None if names_hidden or misses_hidden or names_stand_in else error

    def build_error(self) -> UserError:
        """Build one error for all faults, with the line if it differs from the typed line."""
        line = self.line
        if "--dry-run" not in self.typed:  # added by the check
            line = [word for word in line if word != "--dry-run"]
        unfixed = [message for message in self.unfixed if not is_repeated(message, self.fixed)]
        # a line with the fault that a fix should have corrected is useless, as is a command of another kind
        is_unfit = line[0] != self.typed[0] and any(" artifact where " in message for message in unfixed)
        is_same = line == list(self.typed) and not self.before and self.program == self.typed_program
        if len(unfixed) < len(self.unfixed) or is_same or is_unfit:
            return UserError(join_sentences([*self.fixed, *unfixed]))
        lines = [*self.before, f"{self.program} {shlex.join(line)}"]
        return UserError(join_sentences(self.fixed), Fix("\n  ".join(lines)),
                         join_sentences(unfixed) if unfixed else "")

    def correct_commands(self, find_check: FindCheck) -> None:
        """Correct the commands of `before`; a new model has the vocabulary size of its new tokenizer."""
        commands = list[str]()
        for command in self.before:
            commands += self._correct_command(command, commands, find_check)
        self.before = commands
        is_new = self.line[0] == "pretrain" and "--from" not in self.line
        size = next(filter(None, map(_find_vocab_size, commands)), "") if is_new else ""
        if size:
            fix = Fix(options=("--set", f"model.vocab_size={size}"))
            self.line = apply_fix(self.program, self.line, fix) or self.line

    def _correct_command(self, command: str, earlier: Sequence[str], find_check: FindCheck) -> list[str]:
        program, *words = shlex.split(command)
        new_paths = {word for word in words if word in self.new_paths}
        reads_earlier = any(new_paths & {*shlex.split(line)} for line in earlier)
        check = None if reads_earlier or _SEVERAL.search(command) else find_check(program)
        fault = check and _Proposal(program, (), check, words, new_paths=self.new_paths).find_fault()
        if check is None or fault is None:
            return [command]
        error = propose_line(program, words, fault, check, find_check)
        line = error.fix.line if error.fix else ""
        if not line:
            self.unfixed.append(error.sentence)
        # later commands read the new paths, so a corrected command must still write them
        return line.split("\n  ") if line and new_paths <= {*shlex.split(line)} else [command]


def propose_line(program: str, typed: Sequence[str], error: UserError, check: Check,
                 find_check: FindCheck = lambda program: None) -> UserError:
    """Build one error for all faults of a command line, with the corrected line. `error` is the first fault,
    `check` runs all checks of a line of `program`."""
    proposal = _Proposal(program, typed, check, list(typed), typed_program=program)
    tried = {(program, *typed)}
    fault: UserError | None = error
    while fault is not None and len(proposal.fixed) + len(proposal.unfixed) < MAX_FAULTS:
        if fault.fix is None:
            fault = proposal.find_path_fault(fault.sentence, is_named=True) or fault
        fix = fault.fix or _find_advice(proposal, fault)
        if fix is None:
            proposal.unfixed.append(fault.sentence)
            fault = proposal.find_independent_fault(fault)
            fault = proposal.find_fault() if fault and proposal.is_expected(fault) else fault
            continue
        fix = use_typed_tokenizer(typed, _select_part(proposal.line, fix))
        recipe, model = proposal.line[1:2], find_value(proposal.line, "--from")
        if {*recipe} & {*fix.stand_ins} and model and os.path.isdir(model):
            fix = Fix(left_out=tuple(recipe))  # the command proposes a recipe for the model's family
        line = apply_fix(proposal.program, proposal.line, fix)
        if line is None:  # several lines, or a line for another program
            other_program, *line = shlex.split(fix.line)
            other_check = None if _SEVERAL.search(fix.line) else find_check(other_program)
            if other_check is None:
                lines = [*proposal.before, *fix.before, fix.line]
                return UserError(join_sentences([*proposal.fixed, fault.sentence, *proposal.unfixed]),
                                 Fix("\n  ".join(lines)))
            proposal.program, proposal.check = other_program, other_check
        line = [word if word in typed or (_names_word(fault.sentence, word) and word != "OUT")
                else fill_placeholder(option, word) for option, word in pairwise(["", *line])]
        if (proposal.program, *line) in tried and not (fix.stand_ins or fix.before):
            proposal.unfixed.append(fault.sentence)
            break
        tried.add((proposal.program, *line))
        proposal.line = line
        if fix.stand_ins and not fix.words:
            proposal.stand_ins |= fix.stand_ins
            proposal.unfixed.append(fault.sentence)
        else:
            proposal.fixed.append(fault.sentence)
        if fix.before:
            proposal.before += [command for command in fix.before if command not in proposal.before]
            outputs = [path for words in map(shlex.split, fix.before)
                       for path in (words[-1], find_value(words, "--run"), find_value(words, "--output"))]
            proposal.new_paths += filter(None, [*fix.words.values(), *fix.options[1::2], *outputs])
        fault = proposal.find_fault()
    if not proposal.fixed and len(proposal.unfixed) == 1:
        return error
    proposal.correct_commands(find_check)
    return proposal.build_error()


def _select_part(line: Sequence[str], fix: Fix) -> Fix:
    """Reduce a fix with both a command and commands to run first: the command is for `convert FOLDER ...`."""
    if not (fix.command.startswith("convert") and fix.before):
        return fix
    is_converted = line[0] == "convert" and line[2:3] == [*fix.words][:1]
    return Fix(command=fix.command) if is_converted else replace(fix, command="")


def _find_advice(proposal: _Proposal, fault: UserError) -> Fix | None:
    """Return the option that a fault's message recommends, if the line with it passes the check."""
    for match in _ADVICE.finditer(fault.sentence):
        words = (match[2], match[3]) if match[2] else ("--set", match[1])
        fix = Fix(options=words)
        line = apply_fix(proposal.program, proposal.line, fix)
        if is_placeholder(words[1]) or "..." in words[1] or line is None:
            continue
        new_fault = replace(proposal, line=line).run_check()
        if new_fault is None or not (new_fault.sentence == fault.sentence or words[0] in new_fault.sentence
                                     or re.split("[=:]", words[1])[0] in new_fault.sentence):
            return fix
    return None


def apply_fix(program: str, line: Sequence[str], fix: Fix) -> list[str] | None:
    """Return the arguments changed by a fix; None: the fix is several lines or for another program."""
    if fix.line:
        words = shlex.split(fix.line)
        return words[1:] if words[0] == program and not _SEVERAL.search(fix.line) else None
    num_words = 2 if line[0] in _GROUPS else 1
    command = [*line[:1], fix.command] if line[0] == "submit" and fix.command else fix.command.split()
    changed = [*fix.prefix.split(), *(command or line[:num_words]), *fix.arguments,
               *(_replace_path(word, fix) for word in _leave_out(line[num_words:], fix.left_out))]
    options = list(fix.options)
    while options:
        name = options.pop(0)
        values = []
        while options and not options[0].startswith("--"):
            values.append(options.pop(0))
        changed = [*_remove_option(changed, name, values), name, *values]
    return changed


def _find_vocab_size(command: str) -> str:
    """Return the vocabulary size of the tokenizer that a command makes or packs with; "": unknown."""
    words = shlex.split(command)
    if words[:2] == ["sov-tokenizer", "train"]:
        return find_value(words, "--vocab-size")
    folder = words[2] if words[:2] == ["sov-tokenizer", "import"] else find_value(words, "--tokenizer")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        raw = json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))
        added = [token["id"] for token in raw["added_tokens"]]
        return str(max(*raw["model"]["vocab"].values(), *added) + 1)
    return ""


def fill_placeholder(option: str, word: str) -> str:
    """Return a new path for OUT, and the only model, tokenizer or token shards here for their placeholder."""
    if word == "OUT" or (word == "DIR" and option in ("--run", "--store", "--output")):
        return choose_free_path("new-output" if word == "OUT" else f"new-{option[2:]}")
    if not word.isupper() or not is_placeholder(word):
        return word
    if kind := {"--tokenizer": "tokenizer", "--data": "tokens"}.get(option):
        return find_only_folder(kind) or word
    models = list_models() if {*word.split("|")} <= {"MODEL", "CHECKPOINT", "RUN", "HF_DIR"} else []
    return models[0] if len(models) == 1 else word


def join_sentences(sentences: Sequence[str]) -> str:
    """Join messages; the program's name stays at the beginning only, and repeated problems are dropped."""
    parts: list[str] = []
    for sentence in dict.fromkeys(sentences):
        text = _PROGRAM.sub("", sentence, count=1) if parts else sentence
        if not is_repeated(text, parts):
            parts.append(text)
    return "; ".join(parts)


def is_placeholder(word: str) -> bool:
    """Return whether a word in a proposed line stands for a value, e.g. DIR or [NAME=]PATH."""
    return bool(_PLACEHOLDER.match(word))


def is_repeated(sentence: str, earlier: Sequence[str]) -> bool:
    """Return whether earlier messages contain all problems in a message: its lines, without their subject."""
    text = "\n".join(earlier)
    head, *problems = sentence.split("\n")
    if not problems:
        problems = [re.sub(r"\A(?:recipe [\w.-]+|--set|-[\w -]+?): ", "", head)]
    return bool(text) and all(problem.strip() in text for problem in problems)


def _names_word(sentence: str, word: str) -> bool:
    return bool(re.search(rf"(?<![\w/.-]){re.escape(word)}(?![\w/-])", sentence))


def _names_option(sentence: str, pair: str) -> bool:
    """Return whether a message names an option with its value, or a setting: "--time 24h", "--set a.b=1"."""
    option, _, value = pair.partition(" ")
    return _names_word(sentence, _get_key(pair)) and (option == "--set" or not value or value in sentence)


def _get_key(pair: str) -> str:
    """Return the option or setting: "--time 24h" -> "--time", "--set a.b=1" -> "a.b"."""
    option, _, value = pair.partition(" ")
    return value.partition("=")[0] if option == "--set" else option.partition("=")[0]


def _pair_options(line: Sequence[str]) -> list[str]:
    """Return the options of a line, each with its first value: "--time 24h"."""
    return [word if "=" in word or following.startswith("-") else f"{word} {following}"
            for word, following in pairwise([*line, "-"]) if word.startswith("--")]


def _leave_out(words: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """Remove words from `words`; "--set a.b=1" in `left_out` stands for an option with its value, as
    two words or joined by "="."""
    remaining: list[str] = []
    for previous, word, following in zip(["", *words], words, [*words[1:], ""], strict=False):
        option = word.replace("=", " ", 1) if word.startswith("--") else word
        if not {word, option, f"{word} {following}", f"{previous} {word}"} & {*left_out}:
            remaining.append(word)
    return remaining


def _replace_path(word: str, fix: Fix) -> str:
    """Replace a path in a word of the form PATH, A,B or [NAME=]PATH[:WEIGHT]."""
    for old, new in fix.words.items():
        if old in (parts := word.split(",")):  # a list of tasks
            return ",".join(new if part == old else part for part in parts)
        match = re.fullmatch(rf"((?:[\w-]+=|--[\w-]+=)?){re.escape(old)}/?((?::[\d.]+)?)", word)
        if match:
            return f"{match[1]}{new}{match[2]}"
    return word


def _remove_option(words: Sequence[str], name: str, values: Sequence[str]) -> list[str]:
    """Remove an option with its values; for `--set`, only changes of the same setting."""
    remaining: list[str] = []
    words = list(words)
    key = values[0].partition("=")[0] if name == "--set" and values else ""
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if option != name:
            remaining.append(word)
            continue
        option_words = [word]
        if not equals and values and words:
            option_words.append(words.pop(0))
            value = option_words[1]
        if key and value.partition("=")[0] != key:
            remaining += option_words
    return remaining


def _run_check(check: Check, words: list[str]) -> UserError | None:
    """Return the fault that a check raises; None: no fault."""
    try:
        # SystemExit: from a command that the check started and that printed the reason
        with check_only(), _discard_output(), contextlib.suppress(SystemExit):
            check(words)
    except UserError as e:
        return e
    return None


@contextlib.contextmanager
def _discard_output() -> Iterator[None]:
    """Discard the output of this process and its child processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull, "w", encoding="utf-8") as null, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(null))
        stack.enter_context(contextlib.redirect_stderr(null))
        saved = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in saved:
                os.dup2(null.fileno(), number)
            yield
        finally:
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)
