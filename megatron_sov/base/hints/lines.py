"""Mends a refused command line by the fixes of its errors until a check passes, and reports all faults in one
message with the line that works."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence

from megatron_sov.base.errors import DryRun, Fix, UserError

MAX_FAULTS = 8
"""Faults of one command line that are collected."""
_PROGRAM = re.compile(r"(?:megatron-sov|sov-data|sov-tokenizer|submit)[a-z -]*: ")
"""Begin of a parser's sentence."""
_GROUPS = ("convert", "eval", "rl", "submit", "tools", "codec")
"""First words of commands of two words."""
_PLACEHOLDER = re.compile(r"(?!ACCOUNT\Z)(?:[AB]|[A-Z][A-Z_]+)(?:[|:,/][A-Z_]+)*(?:\.[a-z]+|\[:[A-Z]+\])?\Z"
                          r"|\[NAME=\].*")
"""Word of a proposed line that stands for a value that nobody typed: DIR, FILE|DIR, DIR:WEIGHT, A.json,
[NAME=]PATH.  Checks accept any ACCOUNT."""


def propose_line(program: str, typed: Sequence[str], error: UserError,
                 check: Callable[[list[str]], object],
                 find_check: Callable[[str], Callable[[list[str]], object] | None] = lambda program: None,
                 ) -> UserError:
    """Return one error for all faults of a command line, with the line that works.

    Args:
        program: e.g. "sov-data".
        typed: its arguments.
        error: the first fault.
        check: runs all checks of a line and nothing else; raises `UserError`.
        find_check: returns the check of another program; None: it is none of ours.
    """
    line, sentences, before = list(typed), [error.sentence], list[str]()
    while (fix := error.fix) is not None:
        mended = mend_line(program, line, fix)
        is_new = mended != line
        if mended is None:  # several lines, or one of another program
            other, *mended = shlex.split(fix.line)
            other_check = None if "\n" in fix.line else find_check(other)
            if other_check is None:
                return error if len(sentences) == 1 else UserError(join_sentences(sentences), fix)
            program, check = other, other_check
        line = mended
        before += [command for command in fix.before if command not in before]
        is_complete = not any(is_placeholder(word) and word not in typed for word in line)
        if not is_new or before or len(sentences) == MAX_FAULTS or not is_complete:
            break
        try:
            with _without_output(), contextlib.suppress(DryRun):
                check(line)
        except UserError as e:
            error = e
            sentences.append(e.sentence)
        else:
            break
    if "--dry-run" not in typed:  # the check's
        line = [word for word in line if word != "--dry-run"]
    lines = [*before, f"{program} {shlex.join(line)}"]
    return UserError(join_sentences(sentences), Fix("\n  ".join(lines)))


def mend_line(program: str, line: Sequence[str], fix: Fix) -> list[str] | None:
    """Return the arguments of a program as a fix changes them; None: it proposes no single line of the
    program."""
    if fix.line:
        words = shlex.split(fix.line)
        return words[1:] if words[0] == program and "\n" not in fix.line else None
    num_words = 2 if line[0] in _GROUPS else 1
    command = [*line[:1], fix.command] if line[0] == "submit" and fix.command else fix.command.split()
    mended = [*fix.prefix.split(), *(command or line[:num_words]), *fix.arguments,
              *(_replace_path(word, fix) for word in line[num_words:] if word not in fix.left_out)]
    options = list(fix.options)
    while options:
        name = options.pop(0)
        values = []
        while options and not options[0].startswith("--"):
            values.append(options.pop(0))
        mended = [*_without_option(mended, name, values), name, *values]
    return mended


def join_sentences(sentences: Sequence[str]) -> str:
    """Return one message of several; the program's name stands at the begin of the first alone."""
    parts = [sentences[0], *(_PROGRAM.sub("", sentence) for sentence in sentences[1:])]
    begin = (_PROGRAM.match(parts[0]) or [""])[0]
    return begin + "; ".join(dict.fromkeys([parts[0].removeprefix(begin), *parts[1:]]))


def is_placeholder(word: str) -> bool:
    """Return whether a word of a proposed line stands for a value, e.g. DIR or [NAME=]PATH."""
    return bool(_PLACEHOLDER.match(word))


def _replace_path(word: str, fix: Fix) -> str:
    """Return a word with the path that it is, or that it names as [NAME=]PATH[:WEIGHT], replaced."""
    for old, new in fix.words.items():
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
