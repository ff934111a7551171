"""`sov-data demo-corpus`: write JSONL sources from text on any fresh machine, or from the user's files."""

import ast
import hashlib
import io
import json
import os
import re
import subprocess
import sysconfig
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pydoc_data.topics import topics
from typing import Annotated, Any

from data_prep.tags import CORPUS
from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.documents import cut_text, list_files, read_documents
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import DeclaredCommand, Flag

ENGLISH_BYTES, CODE_BYTES, KOREAN_BYTES = 6_000_000, 8_000_000, 6_000_000
NUM_CHATS, NUM_JUDGED, NUM_LANGUAGE_PROMPTS = 4000, 400, 100
MIN_CHARS = 100
"""Minimum length for gathered texts; user texts may be shorter."""
USER_DOCUMENT_BYTES = 20_000
"""Size limit for documents cut from user files at blank lines, so that a share can be held out."""

KOREAN_PACKAGES = ("libreoffice-help-ko", "gnome-user-docs", "debian-faq-ko")
"""Debian packages (12 MB to download); packages missing from the distribution are skipped."""
TIMEOUT_S = 150
"""Time limit for package lists, downloads and unpacking together."""
MIN_HANGUL_SHARE = 0.3
"""Minimum Hangul share among a Korean line's letters; menu and key names stay English."""
MIN_REPEATED_CHARS = 30
"""Minimum length for deduplicated lines, such as notes repeated on every page."""

PYTHON_PACKAGES = ("numpy", "networkx", "sympy", "jinja2", "pydantic", "torch/nn", "torch/optim",
                   "torch/utils", "torch/distributions")
"""Packages (or subfolders) to read docstrings from, if installed."""
SKIPPED_FOLDERS = frozenset([
    "test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings",
    "lib2to3", "_vendor", "licenses", "turtledemo"])
"""Tests, third-party packages, and folders with tables."""
_ROLE = re.compile(r":[a-zA-Z:+-]+:`[~!]?([^`<]+?)(?:\s*<[^>`]*>)?`")
_NOISE_LINE = re.compile(r"^\s*(\.\. [\w:-]+::.*|\.\. _.*|([=\-~^\"*#+`_.])\2{2,}|<[^>]*>.*"
                         r"|.*!\[.*|\[!?\[.*)$", re.MULTILINE)
_MIN_ANSWER_CHARS, _MAX_ANSWER_CHARS = 40, 600
QUESTIONS = (
    "What does `{}` do?", "What is `{}` for?", "Explain `{}` in Python.", "Can you tell me what `{}` does?",
    "I found `{}` in some code. What is it?", "Describe `{}` briefly.")


@dataclass(frozen=True, kw_only=True)
class DemoCorpusOptions:
    """Gather english.jsonl, code.jsonl, korean.jsonl, chat.jsonl, judged.jsonl and benchmarks from this
    machine's Python, its packages and Debian documentation packages; or, with --input, user.jsonl,
    chat.jsonl, judged.jsonl and benchmarks."""

    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the corpus."""
    user: Annotated[Path | None, Flag("--input")] = None
    """Your text: a file, a .jsonl file or a folder. Replaces the gathered text; chats still come from
    docstrings."""
    overwrite: bool = False
    """Replace an existing corpus."""


@dataclass(frozen=True)
class Docstring:
    """A docstring with its place."""

    module: str
    """Dotted module."""
    name: str
    """Qualified name inside the module; "" for the module's own docstring."""
    text: str
    """Text without indentation."""


def write_corpus(options: DemoCorpusOptions) -> None:
    """Write an artifact of kind "corpus" with a JSONL file per source. Raises `UserError`: the user's text is
    unreadable or empty, or the output may not be replaced."""
    output = options.output
    check_output_folder(output, CORPUS, options.overwrite)
    library = list_stdlib_files()
    sources = {name: read_source(file) for name, file in [*library, *list_package_files()]}
    docstrings = [d for name, source in sources.items() for d in parse_docstrings(name, source)]
    if options.user is not None:
        texts = {"user": read_user_documents(options.user)}
    else:
        # Python's language reference, as in `help()`
        reference = {f"topic {name}": strip_markup(text) for name, text in sorted(topics.items())}
        english = {**reference, **join_docstrings(docstrings), **read_package_pages()}
        texts = {"english": select_documents(english, ENGLISH_BYTES),
                 "code": select_documents({n: sources[n] for n, _ in library}, CODE_BYTES)}
        try:
            texts["korean"] = select_documents(download_korean_pages(), KOREAN_BYTES)
        except CorpusUnavailable as e:
            print(f"korean: left out, because {e}")
    records: dict[str, list[dict[str, object]]] = {}
    for name, documents in texts.items():
        records[name] = [{"id": id_, "text": text} for id_, text in documents.items()]
    records["chat"] = build_chats(docstrings)
    records["judged"] = build_judged_responses(records["chat"])
    records["benchmarks/code-switching/test"] = build_language_prompts(records["chat"])
    with create_artifact(output, CORPUS, overwrite=options.overwrite) as artifact:
        for name, rows in records.items():
            file = artifact.path / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            size_bytes = _write_jsonl(file, rows)
            artifact.content[name] = {"num_documents": len(rows), "num_bytes": size_bytes}
            print(f"{name}: {len(rows):,} documents, {size_bytes / 1e6:.2f} MB")
        artifact.settings = {"user": options.user}
    print(f"wrote {output}")


DEMO_CORPUS = DeclaredCommand(DemoCorpusOptions, write_corpus)


def read_user_documents(path: Path) -> dict[str, str]:
    """Return id ("PLACE#NUMBER") -> text for documents at `path`, without exact duplicates. Raises
    `UserError`: `path` is unreadable or has no text."""
    texts = [(document.where, piece) for document in read_documents(list_files(path, print))
             for piece in cut_text("\n\n".join(document.texts()), USER_DOCUMENT_BYTES) if piece.strip()]
    if not texts:
        raise UserError(f"{path}: holds no text; pass files with text in them")
    ids: dict[str, str] = {}
    for number, (where, text) in enumerate(texts):
        ids.setdefault(text, f"{where}#{number}")
    return {id_: text for text, id_ in ids.items()}


def select_documents(texts: dict[str, str], limit_bytes: int) -> dict[str, str]:
    """Select documents up to `limit_bytes`, sorted by id; drop short texts and exact duplicates."""
    selected: dict[str, str] = {}
    seen: set[str] = set()
    total_bytes = 0
    # a fixed shuffle: the same machine gives the same corpus, and packages are mixed
    for id_ in sorted(texts, key=compute_order_key):
        size_bytes = len(texts[id_].encode())
        if len(texts[id_]) < MIN_CHARS or texts[id_] in seen or total_bytes + size_bytes > limit_bytes:
            continue
        seen.add(texts[id_])
        selected[id_] = texts[id_]
        total_bytes += size_bytes
    return dict(sorted(selected.items()))


def build_chats(docstrings: list[Docstring]) -> list[dict[str, object]]:
    """Build up to `NUM_CHATS` question-answer chats with distinct answers, sorted by question."""
    questions = {answer: question for question, answer in filter(None, map(build_question_pair, docstrings))}
    selected = sorted(questions.items(), key=lambda pair: compute_order_key(pair[1]))[:NUM_CHATS]
    return [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for answer, question in sorted(selected, key=lambda pair: pair[1])]


def build_question_pair(docstring: Docstring) -> tuple[str, str] | None:
    """Return a question about a public name, and the docstring's first paragraph; None if unsuitable."""
    name = f"{docstring.module}.{docstring.name}" if docstring.name else docstring.module
    if any(part.startswith("_") for part in name.split(".")):
        return None
    answer = " ".join(strip_markup(docstring.text).partition("\n\n")[0].split())
    if (not _MIN_ANSWER_CHARS <= len(answer) <= _MAX_ANSWER_CHARS or not answer.endswith(".")
            or not answer[0].isupper()):
        return None
    return QUESTIONS[compute_order_key(name)[0] % len(QUESTIONS)].format(name), answer


def build_judged_responses(chats: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    """Build groups with two responses per question: the right answer (reward 1), and a wrong question's
    answer (reward 0)."""
    pairs = [[message["content"] for message in chat["messages"]] for chat in chats[:NUM_JUDGED]]
    return [{"prompt": question, "responses": [{"content": answer, "reward": 1.0},
                                               {"content": pairs[i - 1][1], "reward": 0.0}]}
            for i, (question, answer) in enumerate(pairs) if len(pairs) > 1]


def build_language_prompts(chats: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    """Build prompts for `eval lm --tasks code-switching`, which judges the answers' language."""
    return [{"prompt": chat["messages"][0]["content"], "language": "en"}
            for chat in chats[-NUM_LANGUAGE_PROMPTS:]]


def _write_jsonl(file: Path, records: Iterable[dict[str, object]]) -> int:
    with open(file, "w", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    return file.stat().st_size


def compute_order_key(identity: str) -> bytes:
    """Return a sort key that shuffles identities alike on every machine."""
    return hashlib.blake2b(identity.encode(), digest_size=8).digest()


def list_stdlib_files() -> list[tuple[str, Path]]:
    """Return (path inside the library, file) for the running Python's sources, sorted, without tests."""
    return _list_python_files(Path(sysconfig.get_path("stdlib")), "")


def list_package_files() -> list[tuple[str, Path]]:
    """Return (path, file) for sources in installed `PYTHON_PACKAGES`."""
    site = Path(sysconfig.get_path("purelib"))
    return [entry for package in PYTHON_PACKAGES
            for entry in _list_python_files(site / package, package + "/")]


def _list_python_files(folder: Path, prefix: str) -> list[tuple[str, Path]]:
    return [(prefix + p.relative_to(folder).as_posix(), p) for p in _walk_files(folder) if p.suffix == ".py"]


def _walk_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for place, folders, names in os.walk(folder):
        # in place: `os.walk` enters the folders left in the list
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        files += [Path(place, name) for name in names]
    return sorted(files)


def read_source(file: Path) -> str:
    """Read a UTF-8 text file; return "" if unreadable."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def parse_docstrings(name: str, source: str) -> list[Docstring]:
    """Return the docstrings in a source file, [] for invalid Python."""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that a later Python rejects
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return [Docstring(module, inner, text) for inner, text in _iter_docstrings(tree, "")]


def _iter_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if (isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and (text := ast.get_docstring(node))):
        yield name, text
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _iter_docstrings(child, f"{name}.{child.name}" if name else child.name)


def strip_markup(text: str) -> str:
    """Strip roles, directives, underlines, badges and interactive sessions from documentation."""
    text = _ROLE.sub(r"\1", text).replace("``", "`")
    text = _NOISE_LINE.sub("", text).replace("::\n", ":\n")
    paragraphs = [p.rstrip() for p in re.split(r"\n(?:[ \t]*\n)+", text.expandtabs())]
    return "\n\n".join(p for p in paragraphs if p.strip() and not p.lstrip().startswith(">>>"))


def join_docstrings(docstrings: list[Docstring]) -> dict[str, str]:
    """Return module -> its docstrings as a document, each below its qualified name."""
    parts: dict[str, list[str]] = {}
    for d in docstrings:
        if text := strip_markup(d.text):
            heading = f"{d.module}.{d.name}" if d.name else d.module
            parts.setdefault(d.module, []).append(f"{heading}\n\n{text}")
    return {module: "\n\n".join(texts) for module, texts in parts.items()}


def read_package_pages() -> dict[str, str]:
    """Return documentation files (.rst, .md, METADATA descriptions) from installed packages."""
    site = Path(sysconfig.get_path("purelib"))
    texts = {}
    for file in _walk_files(site):
        is_metadata = file.name == "METADATA" and file.parent.suffix == ".dist-info"
        if file.suffix not in (".rst", ".md") and not is_metadata:
            continue
        name, text = file.relative_to(site).as_posix(), read_source(file)
        # METADATA begins with headers, which a blank line ends
        texts[name] = strip_markup(text.partition("\n\n")[2] if name.endswith("METADATA") else text)
    return texts


class CorpusUnavailable(Exception):
    """Korean text cannot be downloaded; the message is a short reason."""


def download_korean_pages() -> dict[str, str]:
    """Download and unpack Debian packages.

    Returns:
        Path inside the package -> Korean text, sorted by path.

    Raises:
        CorpusUnavailable: apt-get, dpkg-deb, the network or all packages are missing.
    """
    with tempfile.TemporaryDirectory(prefix="korean-") as name:
        folder = Path(name)
        runner = _CommandRunner(folder, time.monotonic() + TIMEOUT_S)
        try:
            _download_packages(runner)
        except CorpusUnavailable:
            if os.geteuid() != 0:
                raise
            runner.run_command(["apt-get", "-q", "update"])  # a fresh container has no package lists
            _download_packages(runner)
        pages: dict[str, str] = {}
        for package in sorted(folder.glob("*.deb")):
            pages |= _read_pages(runner.run_command(["dpkg-deb", "--fsys-tarfile", str(package)]))
    return keep_korean_lines(dict(sorted(pages.items())))


class _CommandRunner:
    """Runs commands in a folder before a common deadline."""

    def __init__(self, folder: Path, deadline_s: float) -> None:
        self.folder, self.deadline_s = folder, deadline_s

    def run_command(self, command: list[str]) -> bytes:
        """Run a command and return its output; raises `CorpusUnavailable` with its last line if it fails."""
        remaining_s = max(0.1, self.deadline_s - time.monotonic())
        try:
            result = subprocess.run(command, cwd=self.folder, timeout=remaining_s, capture_output=True,
                                    check=False)
        except FileNotFoundError:
            raise CorpusUnavailable(f"{command[0]} is not on this machine") from None
        except subprocess.TimeoutExpired:
            raise CorpusUnavailable(f"{command[0]} did not finish within {TIMEOUT_S} s") from None
        if result.returncode:
            last = (result.stderr.strip() or result.stdout.strip() or b"no message").splitlines()[-1]
            raise CorpusUnavailable(f"{command[0]} failed: {last.decode(errors='replace')}")
        return result.stdout


def _download_packages(runner: _CommandRunner) -> None:
    options = ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::http::Timeout=15"]
    errors = []
    for package in KOREAN_PACKAGES:
        try:
            runner.run_command(["apt-get", *options, "download", package])
        except CorpusUnavailable as e:
            errors.append(e)
    if len(errors) == len(KOREAN_PACKAGES):
        raise errors[0]


def _read_pages(archive: bytes) -> dict[str, str]:
    """Return path -> text for HTML pages below a folder `ko`, read in memory without extracting to disk."""
    try:
        from data_prep.curate.sources.html import extract_page_text  # needs the extra `data`
    except ImportError as e:
        raise CorpusUnavailable(f"the package {e.name} is not installed") from None
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for member in members:
            path = PurePosixPath(member.name)
            is_page = member.isfile() and path.suffix in (".html", ".page") and "ko" in path.parts
            if is_page and (file := members.extractfile(member)):
                texts[path.as_posix()] = extract_page_text(file.read().decode("utf-8", "replace"))[0]
    return texts


def is_korean(line: str) -> bool:
    num_letters = sum(c.isalpha() for c in line)
    num_hangul = sum("\uac00" <= c <= "\ud7a3" for c in line)
    return num_hangul > 0 and num_hangul >= MIN_HANGUL_SHARE * num_letters


def keep_korean_lines(pages: dict[str, str]) -> dict[str, str]:
    """Keep Korean lines; drop repeated long lines and pages without Korean."""
    seen: set[str] = set()
    korean = {}
    for name, text in pages.items():
        lines = []
        for line in map(str.strip, text.split("\n")):
            if is_korean(line) and line not in seen:
                lines.append(line)
                if len(line) >= MIN_REPEATED_CHARS:
                    seen.add(line)
        if lines:
            korean[name] = "\n".join(lines)
    return korean
