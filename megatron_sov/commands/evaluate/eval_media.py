"""Options and checks for `megatron-sov eval media`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import call_plugin, load_plugin
from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.commands.models.generate import CodecsOptions, ReplySampling, check_decoders
from megatron_sov.commands.shared_options import FigureOptions, ModelPath
from megatron_sov.infer.request import Batching, BatchSize, RankOptions
from megatron_sov.runs.checkpoints import check_model
from megatron_sov.runs.folder import RunEvents

TEXT, IMAGE, AUDIO = "text", "image", "audio"
PAIRS = {f"{prompt}-{reply}": (prompt, reply) for prompt in (IMAGE, TEXT, AUDIO)
         for reply in (TEXT, IMAGE, AUDIO) if (prompt, reply) not in ((TEXT, TEXT), (IMAGE, IMAGE))}
"""Name -> modalities of prompt and reply."""
MediaJudge = Callable[[Sequence[Path], Sequence[Sequence[str]]], Sequence[str]]
"""(files, labels per file) -> recognised text per file, "" for none."""


@dataclass(frozen=True, kw_only=True)
class EvalMediaOptions(CodecsOptions, FigureOptions, RankOptions):
    """Measure replies between text, pictures and speech. A judge recognises pictures and sounds."""

    target: ModelPath
    data: Annotated[tuple[str, ...], Flag(value="PAIR=FILE.jsonl")]
    """Rows for a pair (image-text, image-audio, text-image, text-audio, audio-text, audio-image,
    audio-audio): {"content": [parts], "answer": "..."}, and "labels" if a judge chooses from labels; may be
    repeated."""
    media_root: Annotated[Path, Flag(value="DIR")]
    """Root folder for relative media paths; files outside the folder are refused."""
    image_judge: Annotated[str | None, Flag(value="FILE.py:NAME")] = None
    """Recogniser for generated pictures: a function (files, labels) -> texts."""
    audio_judge: Annotated[str | None, Flag(value="FILE.py:NAME")] = None
    """Recogniser for generated sounds: a function (files, labels) -> texts."""
    files: Annotated[Path | None, Flag(value="DIR", writes=True)] = None
    """Output folder for generated pictures and sounds; required if a pair generates media."""
    sampling: ReplySampling = field(default_factory=ReplySampling)
    no_chat: bool = False
    """Do not frame prompts by the chat template."""
    batch_size: BatchSize = Batching.batch_size
    output: Annotated[Path | None, Flag(value="FILE.json")] = None
    """Write figures and samples to a JSON file."""


@dataclass(frozen=True)
class MediaRow:
    """A prompt with the expected answer."""

    content: list[dict[str, Any]]
    """Parts of the prompt, see `omni.generation.prompts.PromptParts`."""
    answer: str
    """Expected text, or expected judge output."""
    labels: tuple[str, ...] = ()
    """Choices for the judge; (): free text."""


@dataclass(frozen=True)
class MediaEvaluation:
    """Checked input for `eval_media_run.evaluate_media`."""

    options: EvalMediaOptions
    events: RunEvents
    rows: list[tuple[str, list[MediaRow]]]
    """(name in `PAIRS`, rows)."""
    judges: dict[str, MediaJudge]
    """`IMAGE` or `AUDIO` -> judge."""


def check_media(options: EvalMediaOptions) -> MediaEvaluation:
    events = RunEvents(options.run)
    check_model(options.target, options.settings, options.nproc)
    rows = [_read_pair(argument) for argument in options.data]
    judges = _load_judges(options, {PAIRS[name][1] for name, _ in rows})
    kinds = [PAIRS[name][1] for name, _ in rows if PAIRS[name][1] != TEXT]
    if kinds and options.files is None:
        raise UserError(f"--data: {kinds[0]} output needs --files DIR")
    check_decoders(options, {} if options.files is None else dict.fromkeys(kinds, options.files))
    return MediaEvaluation(options, events, rows, judges)


MEDIA = DeclaredCommand(EvalMediaOptions, check_media,
                        "megatron_sov.commands.evaluate.eval_media_run:evaluate_media")


def _read_pair(argument: str) -> tuple[str, list[MediaRow]]:
    """Read the rows of PAIR=FILE.jsonl."""
    name, _, file = argument.partition("=")
    if name not in PAIRS or not file:
        raise UserError(f"--data {argument}: must have the form PAIR=FILE.jsonl, with one of "
                        f"{', '.join(PAIRS)}")
    return name, read_media_rows(Path(file))


def read_media_rows(file: Path) -> list[MediaRow]:
    """Read a JSONL file with `content`, `answer` and optionally `labels` per line. Raises `UserError`: an
    unreadable or empty file, or a malformed line."""
    rows = []
    for place, record in read_records(file):
        try:
            rows.append(_parse_row(record))
        except (KeyError, TypeError) as e:
            raise UserError(f'{place}: is not a valid row ({type(e).__name__}: {e}); write '
                            f'{{"content": [parts], "answer": "..."}}') from None
    if not rows:
        raise UserError(f"--data {file}: has no rows")
    return rows


def _parse_row(row: Any) -> MediaRow:
    content, answer, labels = row["content"], row["answer"], row.get("labels", [])
    has_content = isinstance(content, list) and content and all(isinstance(part, dict) for part in content)
    has_labels = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not (has_content and isinstance(answer, str) and answer and has_labels):
        raise TypeError("content is a list of parts, answer a text that is not empty, labels texts")
    return MediaRow(content, answer, tuple(labels))


def _load_judges(options: EvalMediaOptions, reply_kinds: set[str]) -> dict[str, MediaJudge]:
    judges = {}
    for kind, reference in ((IMAGE, options.image_judge), (AUDIO, options.audio_judge)):
        if kind in reply_kinds and reference is None:
            raise UserError(f"--data: {kind} output needs --{kind}-judge, which recognises it")
        if reference is not None:
            judges[kind] = load_judge(reference)
    return judges


def load_judge(reference: str) -> MediaJudge:
    """Load FILE.py:NAME, a function (files, labels) -> texts. Raises `UserError`: an invalid reference, or an
    object that is no function."""
    file, _, name = reference.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise UserError(f"judge {reference!r}: must have the form FILE.py:NAME")
    loaded = load_plugin(reference)
    if not callable(loaded.value):
        raise UserError(f"judge {reference}: is {loaded.value!r}; a judge is a function of files and labels")
    return lambda files, labels: _check_texts(
        reference, call_plugin(reference, lambda: loaded.value(files, labels)), len(files))


def _check_texts(reference: str, texts: object, count: int) -> list[str]:
    if not isinstance(texts, (list, tuple)) or len(texts) != count \
            or not all(isinstance(text, str) for text in texts):
        raise UserError(f"judge {reference}: returned {str(texts)[:200]} for {count} files; must return a "
                        "text per file")
    return list(texts)
