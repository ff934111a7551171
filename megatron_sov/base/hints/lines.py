"""Mends a refused command line by the fixes of its errors until a check passes, and reports all faults in one
message with the line that works."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_sov.base.errors import DryRun, Fix, UserError, fix_missing
from megatron_sov.base.hints.paths import find_path_faults

MAX_FAULTS = 8
"""Faults of one command line that are collected."""
_PROGRAM = re.compile(r"(?:megatron-sov|sov-data|sov-tokenizer|submit)[a-z -]*: ")
"""Begin of a parser's sentence."""
_GROUPS = ("convert", "eval", "rl", "submit", "tools", "codec", "scorer")
"""First words of commands of two words."""
_PLACEHOLDER = re.compile(r"(?!ACCOUNT\Z)(?:[AB]|[A-Z][A-Z_]+)(?:[|:,/][A-Z_]+)*(?:\.[a-z]+|\[:[A-Z]+\])?\Z"
                          r"|\[NAME=\].*|(?:\w+=FIELD,?)+\Z|\w+=FILE\Z|(?:\w+\.)+\w+=[A-Z]+\Z")
"""Word of a proposed line that stands for a value that nobody typed: DIR, FILE|DIR, DIR:WEIGHT, A.json,
[NAME=]PATH, en=FILE, prompt=FIELD.  Checks accept any ACCOUNT."""
_ADVICE = re.compile(r"(?:pass|add|take|use|write|set|name yours with) `?(?:--set )?"
                     r"((--[a-z][\w-]*) (?!(?:to|or|and|for|of|in|on|is|with|as|if|by|the|a|at)\b)"
                     r"([^\s`;,)(]+)|[a-z_]+(?:\.\w+)+=[^\s`;,)(]+)(?! to `)")
_is_check = ContextVar("is_check", default=False)

Check = Callable[[list[str]], object]


def is_check() -> bool:
    """Return whether a proposed line is being checked: work that takes seconds is left out."""
    return _is_check.get()


@dataclass
class _Proposal:
    """A command line that is being mended."""

    program: str
    typed: Sequence[str]
    check: Check
    line: list[str]
    sentences: list[str] = field(default_factory=list)
    """Faults that are mended."""
    left: list[str] = field(default_factory=list)
    """Faults that no fix mends."""
    before: list[str] = field(default_factory=list)
    """Commands to run first."""
    new_paths: list[str] = field(default_factory=list)
    """Paths that `before` writes."""
    stand_ins: dict[str, str] = field(default_factory=dict)
    """Faulty word that stays in the line -> sound word for the checks."""

    def find_fault(self) -> UserError | None:
        """Return the next fault of the line; None: its check passes, or ends at a value that nobody typed."""
        error = self.run_check()
        placeholders = [word for word in self.line if is_placeholder(word) and word not in self.typed]
        if error is not None and not any(_names_word(error.sentence, word)
                                         for word in [*placeholders, *self.new_paths]):
            return error
        return self.find_path_fault(" ".join([*self.sentences, *self.left]), is_named=False)

    def find_path_fault(self, said: str, *, is_named: bool) -> UserError | None:
        """Return the first fault of a path that a message names, or does not name; no check is run."""
        found = next((fault for path, fault in find_path_faults(self.program, self.line)
                      if _names_word(said, path) == is_named), None)
        if found is not None or not is_named:
            return found
        # a misspelt path without an option
        fixes = [fix_missing(word, is_data=True) for word in self.line[1:]
                 if _names_word(said, word) and "does not exist" in said and not Path(word).exists()]
        return next((UserError(said, fix) for fix in fixes if fix and not fix.before), None)

    def run_check(self) -> UserError | None:
        token = _is_check.set(True)
        try:
            with _without_output(), contextlib.suppress(DryRun):
                self.check([self.stand_ins.get(word, word) for word in self.line])
        except UserError as e:
            return e
        except SystemExit:  # of a command that the check started, and that printed why
            pass
        finally:
            _is_check.reset(token)
        return None

    def build_error(self) -> UserError:
        """Return one error for all faults, with the line if it differs from the typed one."""
        line = self.line
        if "--dry-run" not in self.typed:  # the check's
            line = [word for word in line if word != "--dry-run"]
        new_faults = [fault for fault in self.left if not _is_said(fault, self.sentences)]
        # a line that has the fault that it was to mend is worth nothing
        if len(new_faults) < len(self.left) or line == list(self.typed):
            return UserError(join_sentences([*self.sentences, *new_faults]))
        lines = [*self.before, f"{self.program} {shlex.join(line)}"]
        left = join_sentences(new_faults) if new_faults else ""
        return UserError(join_sentences(self.sentences), Fix("\n  ".join(lines)), left)


def propose_line(program: str, typed: Sequence[str], error: UserError, check: Check,
                 find_check: Callable[[str], Check | None] = lambda program: None) -> UserError:
    """Return one error for all faults of a command line, with the line that works.

    Args:
        error: the first fault of `program` with the arguments `typed`.
        check: runs all checks of a line and nothing else; raises `UserError`.
        find_check: returns the check of another program of ours.
    """
    made, tried = _Proposal(program, typed, check, list(typed)), {tuple(typed)}
    fault: UserError | None = error
    while fault is not None and len(made.sentences) + len(made.left) < MAX_FAULTS:
        if fault.fix is None:
            fault = made.find_path_fault(fault.sentence, is_named=True) or fault
        fix = _find_fix(made, fault)
        if fix is None:
            made.left.append(fault.sentence)
            # checks see no further than a fault without a fix
            other = made.find_path_fault(" ".join([*made.sentences, *made.left]), is_named=False)
            if fault is error and other is None:
                return error
            fault = other
            continue
        mended = mend_line(made.program, made.line, fix)
        if mended is None:  # several lines, or one of another program
            named, *mended = shlex.split(fix.line)
            other_check = None if "\n" in fix.line else find_check(named)
            if other_check is None:
                return UserError(join_sentences([*made.sentences, fault.sentence, *made.left]), fix)
            made.program, made.check = named, other_check
        if tuple(mended) in tried and not fix.stand_ins:
            made.left.append(fault.sentence)
            break
        tried.add(tuple(mended))
        made.line = mended
        made.stand_ins |= fix.stand_ins
        (made.left if fix.stand_ins else made.sentences).append(fault.sentence)
        if fix.before:
            made.before += [command for command in fix.before if command not in made.before]
            made.new_paths += [*fix.words.values(), *fix.options[1::2]]
        fault = made.find_fault()
    return made.build_error()


def _find_fix(made: _Proposal, fault: UserError) -> Fix | None:
    """Return the fix of a fault: its own, or the one that its sentence recommends."""
    if fault.fix is not None:
        return fault.fix
    for found in _ADVICE.finditer(fault.sentence):
        words = (found[2], found[3]) if found[2] else ("--set", found[1])
        mended = mend_line(made.program, made.line, fix := Fix(options=words))
        if is_placeholder(words[1]) or "..." in words[1] or mended is None:
            continue
        after = replace(made, line=mended).run_check()
        if after is None or not (after.sentence == fault.sentence or words[0] in after.sentence
                                 or words[1].partition("=")[0] in after.sentence):
            return fix
    return None


def mend_line(program: str, line: Sequence[str], fix: Fix) -> list[str] | None:
    """Return the arguments of a program as a fix changes them; None: it proposes no single line of the
    program."""
    if fix.line:
        words = shlex.split(fix.line)
        return words[1:] if words[0] == program and "\n" not in fix.line else None
    num_words = 2 if line[0] in _GROUPS else 1
    command = [*line[:1], fix.command] if line[0] == "submit" and fix.command else fix.command.split()
    mended = [*fix.prefix.split(), *(command or line[:num_words]), *fix.arguments,
              *(_replace_path(word, fix) for word in _leave_out(line[num_words:], fix.left_out))]
    options = list(fix.options)
    while options:
        name = options.pop(0)
        values = []
        while options and not options[0].startswith("--"):
            values.append(options.pop(0))
        mended = [*_without_option(mended, name, values), name, *values]
    return mended


def join_sentences(sentences: Sequence[str]) -> str:
    """Return one message of several; the program's name stands at the begin of the first alone, and lines
    that an earlier sentence has are left out."""
    parts: list[str] = []
    for sentence in dict.fromkeys(sentences):
        text = _PROGRAM.sub("", sentence, count=1) if parts else sentence
        if not _is_said(text, parts):
            parts.append(text)
    return "; ".join(parts)


def is_placeholder(word: str) -> bool:
    """Return whether a word of a proposed line stands for a value, e.g. DIR or [NAME=]PATH."""
    return bool(_PLACEHOLDER.match(word))


def _is_said(sentence: str, earlier: Sequence[str]) -> bool:
    """Return whether earlier sentences hold all problems of a sentence: its lines, without their subject."""
    said = "\n".join(earlier)
    head, *problems = sentence.split("\n")
    if not problems:
        problems = [re.sub(r"\A(?:recipe [\w.-]+|--set|-[\w -]+?): ", "", head)]
    return bool(said) and all(problem.strip() in said for problem in problems)


def _names_word(sentence: str, word: str) -> bool:
    return bool(re.search(rf"(?<![\w/.-]){re.escape(word)}(?![\w/-])", sentence))


def _leave_out(words: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """Return words without some; "--set a.b=1" stands for an option with its value."""
    left: list[str] = []
    for number, word in enumerate(words):
        is_pair = number + 1 < len(words) and f"{word} {words[number + 1]}" in left_out
        is_value = number > 0 and f"{words[number - 1]} {word}" in left_out
        if not (is_pair or is_value or word in left_out):
            left.append(word)
    return left


def _replace_path(word: str, fix: Fix) -> str:
    """Return a word with the path that it is, or that it names as [NAME=]PATH[:WEIGHT], replaced."""
    for old, new in fix.words.items():
        if old in (parts := word.split(",")):  # a list of tasks
            return ",".join(new if part == old else part for part in parts)
        found = re.fullmatch(rf"((?:[\w-]+=|--[\w-]+=)?){re.escape(old)}((?::[\d.]+)?)", word)
        if found:
            return f"{found[1]}{new}{found[2]}"
    return word


def _without_option(words: Sequence[str], name: str, values: Sequence[str]) -> list[str]:
    """Return words without the earlier values of an option; of --set without those of the same setting."""
    kept: list[str] = []
    words = list(words)
    key = values[0].partition("=")[0] if name == "--set" and values else ""
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if option != name:
            kept.append(word)
            continue
        taken = [word]
        if not equals and values and words:
            taken.append(words.pop(0))
            value = taken[1]
        if key and value.partition("=")[0] != key:
            kept += taken
    return kept


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Discard what this process and those that it starts print."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        saved = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in saved:
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)
