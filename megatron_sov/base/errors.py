"""Exceptions, exit codes, warnings, and helpers that word error messages."""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count, islice
from pathlib import Path
from typing import Any

MIN_SIMILARITY = 0.65
"""Lowest `SequenceMatcher.ratio` for a suggestion; below, words are unrelated (days and data)."""
MIN_MISSPELT = 3
"""Letters of a name that may be a misspelt one."""
MAX_ROW_PROBLEMS = 10
"""Different problems of rows that a message lists."""
MAX_PLACES = 3
"""Rows that are named for each of them."""
_FILE_NAME = re.compile(r".*\.(?:jsonl?|parquet|txt|[ct]sv|gz|zst|arrow|md|ya?ml|toml|py|html|gguf|bin|idx"
                        r"|pth?|safetensors|model)", re.IGNORECASE)
"""Names of files: such a path is no name on the Hugging Face hub."""
_PRINTED_CONTROLS = {"\n", "\t"}
_ESCAPES = {code: repr(chr(code))[1:-1] for code in (
    *range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
            if chr(code) not in _PRINTED_CONTROLS}
"""Code point -> escape, e.g. \\x1b. C0 and C1 controls start terminal sequences that move the cursor or
rename windows, bidirectional controls reorder the displayed text, and lone surrogates cannot be encoded as
UTF-8."""


def escape_controls(text: str) -> str:
    """Escape control characters (except line feed and tab) and bidirectional controls in `text`."""
    return text.translate(_ESCAPES)


EventRecorder = Callable[..., None]
"""Signature of `EventLog.write`: `record(name, **fields)` writes an event."""


def warn(text: str, record: EventRecorder | None = None, event: str = "warning", **fields: Any) -> None:
    """Print `warning: TEXT` to stderr, and record an event with the same field `text` and further fields."""
    # a single write: lines from other processes must not come in between
    print(f"warning: {text}\n", end="", file=sys.stderr, flush=True)
    if record is not None:
        record(event, **fields, text=text)


class ExitCode(IntEnum):
    """Exit codes for commands and ranks; scripts rely on the numbers."""

    OK = 0
    """Complete."""
    CRASH = 1
    """A defect, or a rank terminated after another rank failed."""
    USER_ERROR = 2
    """`UserError`: the user must change input, settings or files."""
    GATE_FAILED = 3
    """A gate or another check failed."""
    STOPPED = 75
    """Stopped on request with all state saved; Slurm may requeue the job (EX_TEMPFAIL in sysexits.h)."""
    HANG = 76
    """The watchdog found a step over the time limit."""
    CORRUPTION = 77
    """`SilentCorruption`: a rank computed or stored wrong bits."""
    INTERRUPTED = 130
    """Ctrl-C before any state existed to save (128 + SIGINT, the shells' convention)."""


def to_exit_code(code: object) -> int:
    """Convert a command's result, or `SystemExit.code`, to an exit code that the system reports unchanged.

    The system keeps only the lowest byte: an exit code of 256 would report success.
    """
    # `SystemExit(None)` and a command without a result mean success
    if code is None:
        return ExitCode.OK
    return code if isinstance(code, int) and 0 <= code <= 255 else ExitCode.CRASH


@dataclass(frozen=True)
class Fix:
    """A correction for the typed command line; the message in the `UserError` says why."""

    line: str = ""
    """The whole corrected line with the program; the other fields stay empty."""
    command: str = ""
    """Replaces the typed command: `"prefer"`, `"convert to-hf"`."""
    prefix: str = ""
    """Word to insert before the command: `"submit"`."""
    arguments: tuple[str, ...] = ()
    """Positional arguments to add after the command."""
    options: tuple[str, ...] = ()
    """Options and values to add or replace: `("--set", "train.epochs=3")`."""
    left_out: tuple[str, ...] = ()
    """Typed words to remove, and options with their values: `"--set a.b=1"`."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Typed word, or path inside a word -> replacement."""
    before: tuple[str, ...] = ()
    """Commands to run first."""
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    """Faulty word without a known replacement -> sound word with which checks find further faults."""


class UserError(Exception):
    """A mistake in the user's input, settings or files.

    The message names the file or field, its value, the broken rule and the fix, in one or two short
    sentences. Commands print it without a traceback and exit with `ExitCode.USER_ERROR`.

    >>> import megatron_sov
    >>> try:
    ...     megatron_sov.recipes.get("tiny-qwen")
    ... except megatron_sov.UserError as e:
    ...     print(str(e)[:18])
    recipe 'tiny-qwen'
    """

    def __init__(self, sentence: str = "", fix: Fix | None = None, left: str = "") -> None:
        """Create the message: sentence, line of `fix` if it is a whole line, fault left in that line."""
        self.sentence, self.fix = sentence, fix
        line = f"; write\n  {fix.line}" if fix and fix.line else ""
        super().__init__(f"{sentence}{line}" + (f"\nthis line still has a fault: {left}" if left else ""))


class DryRun(Exception):
    """A dry run finished; commands print the text and exit with `ExitCode.OK`."""


IS_CHECKING = ContextVar("is_checking", default=False)
"""Whether a proposed command line is being checked: work of several seconds is skipped."""


@contextmanager
def check_only() -> Iterator[None]:
    """Run the block's checks: `stop_check` ends the block."""
    token = IS_CHECKING.set(True)
    try:
        with suppress(DryRun):
            yield
    finally:
        IS_CHECKING.reset(token)


def stop_check() -> None:
    """End the checks of a command line before the first write, started process, submitted job or paid
    request. Raises `DryRun`: in a block of `check_only`; the line has passed all checks until here."""
    if IS_CHECKING.get():
        raise DryRun


class StopRequested(Exception):
    """A run stopped after a signal or a time limit, with all state saved; the exit code is `STOPPED`."""


class GateFailed(Exception):
    """A gate failed, with all state saved; commands print the failed metrics and exit with `GATE_FAILED`."""


class SilentCorruption(Exception):
    """A rank computed or stored wrong bits; ranks exit with `ExitCode.CORRUPTION`."""


def format_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_error_line(error)}"


def first_error_line(error: BaseException) -> str:
    """Return the first line of the error's text; some errors have no text or start with an empty line."""
    return (str(error).strip() or "no further details").splitlines()[0]


def format_problems(subject: str, problems: Sequence[str], remedy: str = "") -> str:
    """Format a list of problems: ``"SUBJECT: 2 problems; FIX"``, then an indented line per problem."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{subject}: {count}{remedy and f'; {remedy}'}",
                      *(f"  {problem}" for problem in problems)])


class RowProblems(dict[str, list[str]]):
    """Problem of rows -> the rows, e.g. "line 3"; rows with the same problem become one line."""

    def add(self, place: str, problem: str) -> None:
        self.setdefault(problem, []).append(place)

    def format(self, subject: str, remedy: str) -> str:
        """Format all problems as `format_problems` does."""
        count = sum(map(len, self.values()))
        lines = [f"{subject}: {count:,} bad row{'s' if count > 1 else ''}; {remedy}"]
        for problem, places in islice(self.items(), MAX_ROW_PROBLEMS):
            more = f" and {len(places) - MAX_PLACES:,} more" if len(places) > MAX_PLACES else ""
            listed = ", ".join(places[:MAX_PLACES])
            if len(places) > 1:  # "line 1, line 2" is "lines 1, 2"
                listed = re.sub(r"\Aline ", "lines ", listed).replace(", line ", ", ")
            lines.append(f"  {listed}{more}: {problem}")
        num_others = len(self) - MAX_ROW_PROBLEMS
        return "\n".join([*lines, *([f"  and {num_others:,} other problems"] if num_others > 0 else [])])


def suggest_name(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for `find_nearest_name`, with `prefix` before the name, or ""."""
    nearest = find_nearest_name(name, known)
    return f"; did you mean '{prefix}{nearest}'?" if nearest else ""


def find_nearest_name(name: str, known: Iterable[str]) -> str:
    """Return the name in `known` closest to `name`, or an empty string."""
    by_letters = {candidate.lstrip("-"): candidate for candidate in reversed(list(known))
                  if _has_same_number(name, candidate)}
    letters = name.lstrip("-")
    # tiny-qwen3 for qwen3-tiny
    parts = sorted(re.split(r"[-_ ]", letters))
    if len(parts) > 1 and (swapped := [other for other in by_letters if other != letters
                                       and sorted(re.split(r"[-_ ]", other)) == parts]):
        return by_letters[swapped[0]]
    close = difflib.get_close_matches(letters, by_letters, n=1, cutoff=MIN_SIMILARITY)
    # two swapped letters are a typing error even in a short word
    if not close:
        close = [other for other in by_letters if other != letters and sorted(other) == sorted(letters)]
    return by_letters[close[0]] if close else ""


def _has_same_number(name: str, other: str) -> bool:
    """Compare the digits in two names; digits missing at the end count as equal.

    Therefore fp16 never becomes a suggestion for fp64, nor a 70B model for an 8B model.
    """
    shorter, longer = sorted((re.sub(r"\D", "", text) for text in (name, other)), key=len)
    return longer.startswith(shorter)


def suggest_spelling(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for `find_spelling`, or an empty string."""
    spelling = find_spelling(name, known)
    return f"; did you mean '{spelling}'?" if spelling else ""


def find_spelling(name: str, known: Iterable[str]) -> str:
    """Return the first name in `known` that `name` misspells, or an empty string.

    The two names have the same digits and differ in case, separators and at most one letter. Names that are
    only similar (`find_nearest_name`) do not count.
    """
    for other in known:
        first, second = (re.sub(r"[\W_]", "", text.lower()) for text in (name, other))
        blocks = difflib.SequenceMatcher(None, first, second).get_matching_blocks()
        num_different = max(len(first), len(second)) - sum(block.size for block in blocks)
        if num_different <= 1 and re.sub(r"\D", "", first) == re.sub(r"\D", "", second):
            return other
    return ""


def suggest_download(path: str | os.PathLike[str], is_bare: bool = False, is_data: bool = False) -> str:
    """Return the end of a message about a missing path, with the download command; "" if `path` cannot be the
    name of a model or dataset (`is_data`) on the Hugging Face hub. With `is_bare`, a name without an owner
    counts, e.g. gpt2."""
    # a bare name without digit or hyphen is rather a folder's
    bare = r"|(?=.*[\d-])" if is_bare else ""
    match = re.fullmatch(rf"(?:\w[\w.-]*/{bare})(\w[\w.-]*)", os.fspath(path))
    # OWNER/NAME may be a path too: if the folder OWNER exists, the user meant a path
    is_path = bool(os.path.dirname(path)) and os.path.exists(os.path.dirname(path))
    if match is None or _FILE_NAME.fullmatch(match[1]) or is_path:
        return ""
    name = shlex.quote(match[1])
    if is_data:
        return (f"; if it is a dataset's name on the Hugging Face hub, download it first: hf download "
                f"{os.fspath(path)} --repo-type dataset --local-dir {name}")
    return (f"; nothing is fetched from the Hugging Face hub: run `hf download {os.fspath(path)} --local-dir "
            f"{name}` where there is a network, and pass {name}")


def choose_free_path(name: str) -> str:
    """Return the first of NAME, NAME-2, NAME-3, ... that does not exist; of a file, NAME-2.json."""
    stem, suffix = re.fullmatch(r"(?s)(.*?)(\.(?:jsonl?|yaml|html|py))?", name).groups("")  # type: ignore[union-attr]
    paths = (f"{stem}-{n}{suffix}" if n > 1 else name for n in count(1))
    return next(path for path in paths if not Path(path).exists())


def fix_missing(path: str | os.PathLike[str], *, is_bare: bool = False, is_data: bool = False) -> Fix | None:
    """Return the fix for a missing path: a neighbour with a similar name, a download from the Hugging Face
    hub (see `suggest_download`), or None."""
    text = os.fspath(path)
    folder, name = os.path.split(text)
    is_long = len(name) >= MIN_MISSPELT
    names = os.listdir(folder or ".") if is_long and os.path.isdir(folder or ".") else []
    neighbours = [other for other in names if other != name and not other.startswith(".")]
    # chats -> chats.jsonl
    same_stem = [other for other in neighbours if is_data and other.partition(".")[0] == name]
    if spelling := (same_stem[0] if len(same_stem) == 1 else find_spelling(name, neighbours)):
        return Fix(words={text: os.path.join(folder, spelling)})
    if not suggest_download(text, is_bare and not is_data, is_data):
        return None
    kind = " --repo-type dataset" if is_data else ""
    return Fix(words={text: name}, before=(f"hf download {text}{kind} --local-dir {shlex.quote(name)}",))


def format_install_command(extra: str, options: str = "") -> str:
    """Return the pip command that installs an extra of the package.

    A checkout is reinstalled with the extra and `constraints.txt`. Next to an installed wheel, pip installs
    the extra's packages themselves, never "megatron-sov": the name is not registered on the package index,
    and whoever registers it could run code on the user's machine.
    """
    from importlib import metadata  # not at the top: it is slow to import, and only missing packages need it

    root = Path(__file__).parents[2]
    # sys.executable: the user's active Python may be another environment
    begin = f"{shlex.quote(sys.executable)} -m pip install {options}".strip()
    if (root / "setup.py").is_file():
        return f"{begin} -e {shlex.quote(f'{root}[{extra}]')} -c {shlex.quote(str(root / 'constraints.txt'))}"
    try:
        # the wheel's metadata lists the extra's packages with the versions of this release
        lines = metadata.requires("megatron-sov") or []
    except metadata.PackageNotFoundError:  # a copy of the source folders
        lines = []
    packages = [line.partition(";")[0].strip() for line in lines
                if re.search(rf""";.*\bextra == ['"]{extra}['"]""", line)]
    if not packages:
        return f"install the packages of the extra {extra} in setup.py"
    return f"{begin} {' '.join(map(shlex.quote, packages))}"
