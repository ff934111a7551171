"""How a command can end, other than well: mistakes that a user can mend (one sentence, no traceback), stops,
gates, defects.  And what it says meanwhile: warnings, and text of strangers without control characters.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

_KEPT = {"\n", "\t"}
_SHOWN = {code: repr(chr(code))[1:-1] for code in (
    *range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
          if chr(code) not in _KEPT}
"""Character -> its escape, e.g. \\x1b; C0 and C1 begin sequences that move the cursor or rename windows, some
turn the order of what is read, and a half of a character (a name that is no UTF-8) cannot be written."""


def visible(text: str) -> str:
    """Return text in which every control character but line feed and tab is its escape, as is what turns the
    order of reading."""
    return text.translate(_SHOWN)


Record = Callable[..., None]
"""Writes an event: `record(name, **fields)`, as `EventLog.write` does."""


def warn(text: str, record: Record | None = None, event: str = "warning", **fields: Any) -> None:
    """Say something on standard error, and record it.

    Args:
        text: what is to be known, in words.
        record: writes the event; None: it is only said.
        event: name of the event, which gets `text` beside its fields.
        fields: what else it tells, such as `step`.
    """
    # one write: lines of other processes must not come in between
    print(f"warning: {text}\n", end="", file=sys.stderr, flush=True)
    if record is not None:
        record(event, **fields, text=text)


class ExitCode(IntEnum):
    """Exit codes of commands and of ranks; scripts hold on to them."""

    OK = 0
    """Complete."""
    CRASH = 1
    """A defect, or a process that another one took down."""
    USER_ERROR = 2
    """The user has to change something; one sentence says what."""
    GATE_FAILED = 3
    """A gate, or another check, did not pass."""
    STOPPED = 75
    """Asked to stop, and everything is saved: to be queued again (EX_TEMPFAIL of sysexits.h)."""
    HANG = 76
    """A step stood still too long."""
    CORRUPTION = 77
    """A process computes or remembers wrong bits."""
    INTERRUPTED = 130
    """Ctrl-C, before there was anything to save (128 + SIGINT, as shells have it)."""


def to_exit_code(code: object) -> int:
    """Return an exit code that the system keeps whole, of what a command returns or `SystemExit` holds: it
    keeps the lowest byte alone, and 256 would tell of a success."""
    # `SystemExit(None)` and a command that returns nothing are a success
    if code is None:
        return ExitCode.OK
    return code if isinstance(code, int) and 0 <= code <= 255 else ExitCode.CRASH


@dataclass(frozen=True)
class Fix:
    """How a command line is mended.  The message that it belongs to says why."""

    line: str = ""
    """The whole line, program first; the other fields are empty then."""
    command: str = ""
    """Command in place of the typed one: `"prefer"`, `"convert to-hf"`."""
    prefix: str = ""
    """Word before the command: `"submit"`."""
    arguments: tuple[str, ...] = ()
    """Positional arguments to add after the command."""
    options: tuple[str, ...] = ()
    """Options with their values, in place of typed ones or added: `("--set", "train.epochs=3")`."""
    left_out: tuple[str, ...] = ()
    """Typed words to leave out."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Typed word, or a part of it that is a path -> the word in its place."""
    before: tuple[str, ...] = ()
    """Commands to run before the line."""


class UserError(Exception):
    """A mistake in the user's input, settings or files.

    The message is one clear sentence (or a short list) that names the file or field, its value, the rule it
    breaks and what to do.  Commands print it without a traceback and end with `ExitCode.USER_ERROR`.

    >>> import megatron_sov
    >>> try:
    ...     megatron_sov.recipes.get("tiny-qwen")
    ... except megatron_sov.UserError as e:
    ...     print(str(e)[:18])
    recipe 'tiny-qwen'
    """

    def __init__(self, sentence: str = "", fix: Fix | None = None) -> None:
        """Keep the sentence, and how the command line is mended; a whole line ends the message."""
        self.sentence, self.fix = sentence, fix
        super().__init__(f"{sentence}; write\n  {fix.line}" if fix and fix.line else sentence)


class DryRun(Exception):
    """All that was asked for is known, and no more is to be done; commands print the text and end with
    `ExitCode.OK`."""


class StopRequested(Exception):
    """The run was asked to stop (signal or time limit) and everything is saved; commands end with
    `ExitCode.STOPPED`."""


class GateFailed(Exception):
    """A gate did not pass and everything is saved; commands say which figures failed and end with
    `ExitCode.GATE_FAILED`."""


class SilentCorruption(Exception):
    """A process computes or remembers other bits than it should; the ranks end with `ExitCode.CORRUPTION`."""


def told_in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; many say nothing, and some begin with an empty line."""
    return (str(error).strip() or "it says no more").splitlines()[0]


def list_problems(what: str, problems: Sequence[str], way_out: str = "") -> str:
    """Return ``"what: 2 problems; way out"`` and a line for each of them."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{what}: {count}{way_out and f'; {way_out}'}",
                      *(f"  {problem}" for problem in problems)])


MIN_SIMILARITY = 0.65
"""Of a guess (`difflib.SequenceMatcher.ratio`); below it another word is meant: "days" is no "data"."""


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to `name`, or an empty string;
    `prefix` is what the name to write begins with."""
    by_letters = {one.lstrip("-"): one for one in reversed(list(known)) if _has_same_number(name, one)}
    letters = name.lstrip("-")
    close = difflib.get_close_matches(letters, by_letters, n=1, cutoff=MIN_SIMILARITY)
    # two letters that changed places are a typing error also in a short word
    close = close or [one for one in by_letters if one != letters and sorted(one) == sorted(letters)]
    return f"; did you mean '{prefix}{by_letters[close[0]]}'?" if close else ""


def _has_same_number(name: str, other: str) -> bool:
    """Return whether the digits of two names differ at most by missing ones at the end: fp64 is not fp16, and
    a model of 8 B is not one of 70 B."""
    one, two = sorted((re.sub(r"\D", "", text) for text in (name, other)), key=len)
    return two.startswith(one)


def find_misspelt(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for a known name that is `name` but for case, separators and at most
    one letter, with the same digits; else an empty string.  A name that is only similar is another thing."""
    for other in known:
        one, two = (re.sub(r"[\W_]", "", text.lower()) for text in (name, other))
        common = sum(block.size for block in difflib.SequenceMatcher(None, one, two).get_matching_blocks())
        if max(len(one), len(two)) - common <= 1 and re.sub(r"\D", "", one) == re.sub(r"\D", "", two):
            return f"; did you mean '{other}'?"
    return ""


def download(path: str | os.PathLike[str], is_bare: bool = False) -> str:
    """Return the end of a message about a path that does not exist and may be a model's name on the Hugging
    Face hub: the command that fetches it; empty where it cannot be one. With `is_bare` a name without its
    owner counts too, e.g. gpt2."""
    owner = r"(?:\w[\w.-]*/)?" if is_bare else r"\w[\w.-]*/"
    found = re.fullmatch(rf"{owner}(\w[\w.-]*)", os.fspath(path))
    # NAME/NAME may be a path too: where its folder exists, that was meant
    if found is None or (os.path.dirname(path) and os.path.exists(os.path.dirname(path))):
        return ""
    name = shlex.quote(found[1])
    return (f"; nothing is fetched from the Hugging Face hub: run `hf download {os.fspath(path)} --local-dir "
            f"{name}` where there is a network, and pass {name}")


def fix_missing(path: str | os.PathLike[str], *, is_bare: bool = False, is_data: bool = False) -> Fix | None:
    """Return the fix for a path that does not exist: a folder or file next to it with nearly the same name,
    else the download of what the path names on the Hugging Face hub; None: neither.

    Args:
        path: as it was typed.
        is_bare: see `download`.
        is_data: whether it would be a dataset.
    """
    text = os.fspath(path)
    folder, name = os.path.split(text)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    if close := find_misspelt(name, (one for one in names if one != name and not one.startswith("."))):
        return Fix(words={text: os.path.join(folder, close.split("'")[1])})
    hint = download_dataset(text) if is_data else download(text, is_bare)
    if not hint:
        return None
    kind = " --repo-type dataset" if is_data else ""
    return Fix(words={text: name}, before=(f"hf download {text}{kind} --local-dir {shlex.quote(name)}",))


def download_dataset(path: str | os.PathLike[str]) -> str:
    """Return the end of a message about data that do not exist and may be a dataset's name on the Hugging
    Face hub: the command that downloads the dataset; empty if the path cannot be such a name."""
    found = re.fullmatch(r"[\w-][\w.-]*/([\w-][\w.-]*)", os.fspath(path))
    if found is None:
        return ""
    return (f"; if it is a dataset's name on the Hugging Face hub, download it first: hf download "
            f"{os.fspath(path)} --repo-type dataset --local-dir {found[1]}")


def how_to_install(extra: str, options: str = "") -> str:
    """Return the command that installs what one of our extras adds.

    It never names our distribution, which no package index has: whoever registered the name there would have
    his code run.  A checkout is installed again with the extra, at the versions of its lock; beside an
    installed wheel the packages themselves are.
    """
    root = Path(__file__).parents[2]
    from importlib import metadata

    # the Python that lacks it: a program of an environment runs without it being active
    begin = f"{shlex.quote(sys.executable)} -m pip install {options}".strip()
    if (root / "setup.py").is_file():
        return f"{begin} -e {shlex.quote(f'{root}[{extra}]')} -c {shlex.quote(str(root / 'constraints.txt'))}"
    try:
        # the wheel's own metadata: what the extra adds, at the versions of this release
        lines = metadata.requires("megatron-sov") or []
    except metadata.PackageNotFoundError:  # a copy of the folders alone
        lines = []
    packages = [line.partition(";")[0].strip() for line in lines
                if re.search(rf""";.*\bextra == ['"]{extra}['"]""", line)]
    if not packages:
        return f"install what the extra {extra} of setup.py names"
    return f"{begin} {' '.join(map(shlex.quote, packages))}"
