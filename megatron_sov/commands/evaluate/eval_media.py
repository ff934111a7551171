"""`megatron-sov eval media`: how well a model gets from one modality to another: what it draws, says and
recognises, judged by what is recognised in it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.plugins.loading import call_plugin, load_plugin
from megatron_sov.base.settings import Flag, build_command, read_options
from megatron_sov.commands.models.generate import (
    CodecsOptions, ReplySampling, check_media, media_decoders, shown_media)
from megatron_sov.commands.shared_options import ModelPath, RecordOptions, get_target_step
from megatron_sov.eval.statistics import compute_mean_interval, compute_wilson_interval
from megatron_sov.infer.request import Batching, BatchSize, RankOptions
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.runs.folder import RunEvents

if TYPE_CHECKING:
    from megatron_sov.omni.generation.replies import Replied


TEXT, IMAGE, AUDIO = "text", "image", "audio"
PAIRS = {f"{a}-{b}": (a, b) for a in (IMAGE, TEXT, AUDIO) for b in (TEXT, IMAGE, AUDIO)
         if (a, b) not in ((TEXT, TEXT), (IMAGE, IMAGE))}
"""Name -> what is shown, and what is asked for."""


@dataclass(frozen=True)
class MediaRow:
    """A prompt with what is to be recognised in the reply."""

    content: list[dict[str, Any]]
    """Parts, as `generation.prompts.Parts`."""
    answer: str
    """What a text is to be, or what a judge is to recognise."""
    labels: tuple[str, ...] = ()
    """What a judge chooses from; (): anything."""


def read_media_rows(file: Path) -> list[MediaRow]:
    """Return the rows of a JSONL file: `content`, `answer`, and `labels` where a judge chooses.

    Raises:
        UserError: it cannot be read, has no row, or one is malformed (named by number).
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--data {file}: cannot be read ({e}); pass a JSONL file in UTF-8") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            content, answer, labels = row["content"], row["answer"], row.get("labels", [])
            if not (isinstance(content, list) and content and all(isinstance(p, dict) for p in content)
                    and isinstance(answer, str) and answer and isinstance(labels, list)
                    and all(isinstance(label, str) for label in labels)):
                raise TypeError("content is a list of parts, answer a text that is not empty, labels texts")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{file}:{number}: is no row ({type(e).__name__}: {e}); write "
                            '{"content": [parts], "answer": "..."}') from None
        found.append(MediaRow(content, answer, tuple(labels)))
    if not found:
        raise UserError(f"--data {file}: has no row")
    return found


def normalised(text: str) -> str:
    """Return a text as words are counted: lower case, composed (NFC), punctuation as space, one space between
    words."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    return " ".join("".join(map(_kept, folded)).split())


def _kept(character: str) -> str:
    kind = unicodedata.category(character)
    # vowels of Devanagari, Thai or Arabic are marks, and so is an accent that no letter is composed with
    if character.isalnum() or kind.startswith("M"):
        return character
    # a zero width space stands between words; other characters without width join or part shapes of letters
    return "" if kind == "Cf" and character != "\N{ZERO WIDTH SPACE}" else " "


def compute_media_figures(rows: Sequence[MediaRow], heard: Sequence[str]) -> dict[str, Any]:
    """Return what was recognised against what was asked for.

    `accuracy` is the share of exact matches of normalised texts with Wilson's interval; `wer` and `cer` are
    errors of words and characters (jiwer) over all rows, `cer_interval` of the rows' own shares, each at most
    1; `chance` is the mean of 1 / labels where every row has some.
    """
    import jiwer

    wanted, got = [normalised(row.answer) for row in rows], [normalised(text) for text in heard]
    right = [a == b for a, b in zip(wanted, got, strict=True)]
    told: dict[str, Any] = {
        "num_rows": len(rows), "accuracy": sum(right) / len(right),
        "accuracy_interval": list(compute_wilson_interval(sum(right), len(right)))}
    if all(wanted):
        # An answer that is much too long has an error above 1, and an interval of shares ends there.
        shares = [min(1.0, float(jiwer.cer(a, b))) for a, b in zip(wanted, got, strict=True)]
        told |= {"wer": float(jiwer.wer(wanted, got)), "cer": float(jiwer.cer(wanted, got)),
                 "cer_interval": list(compute_mean_interval(shares))}
    if all(row.labels for row in rows):
        told["chance"] = sum(1 / len(row.labels) for row in rows) / len(rows)
    return told


Judge = Callable[[Sequence[Path], Sequence[Sequence[str]]], Sequence[str]]
"""Files and the labels of each to choose from -> what is recognised in each, "" where nothing is."""

def load_judge(said: str) -> Judge:
    """Return the judge of FILE.py:NAME, a function (files, labels) -> texts.

    Raises:
        UserError: there is no such code.
    """
    file, _, name = said.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise UserError(f"judge {said!r}: is no code FILE.py:NAME; name one")
    loaded = load_plugin(said)
    if not callable(loaded.value):
        raise UserError(f"judge {said}: is {loaded.value!r}; a judge is a function of files and labels")
    return lambda files, labels: _check_texts(
        said, call_plugin(said, lambda: loaded.value(files, labels)), len(files))


def _check_texts(said: str, found: object, count: int) -> list[str]:
    if not isinstance(found, (list, tuple)) or len(found) != count \
            or not all(isinstance(text, str) for text in found):
        raise UserError(f"judge {said}: gave {str(found)[:200]} for {count} files; one text is needed for "
                        "each")
    return list(found)


@dataclass(frozen=True, kw_only=True)
class EvalMediaOptions(CodecsOptions, RecordOptions, RankOptions):
    """From text, pictures and speech to one another, judged by what is recognised."""

    target: ModelPath
    data: Annotated[tuple[str, ...], Flag(value="PAIR=FILE.jsonl")]
    """Rows of a pair (image-text, image-audio, text-image, text-audio, audio-text, audio-image,
    audio-audio): {"content": [parts], "answer": "..."}, and "labels" where a judge chooses; may be
    repeated."""
    media_root: Annotated[Path, Flag(value="DIR")]
    """Folder that paths of media begin from; nothing outside of it is read."""
    image_judge: Annotated[str | None, Flag(value="FILE.py:NAME")] = None
    """Recognises what the model draws: a function (files, labels) -> texts."""
    audio_judge: Annotated[str | None, Flag(value="FILE.py:NAME")] = None
    """Recognises what the model says, likewise."""
    files: Annotated[Path | None, Flag(value="DIR", writes=True)] = None
    """Folder for what the model draws and says, where a pair asks for that."""
    sampling: ReplySampling = field(default_factory=ReplySampling)
    no_chat: bool = False
    """Do not frame prompts by the chat template."""
    batch_size: BatchSize = Batching.batch_size
    output: Annotated[Path | None, Flag(value="FILE.json")] = None
    """Write figures and every sample as JSON."""


def run_media(args: EvalMediaOptions) -> int:
    """Ask, judge and tell; returns the exit code.

    Raises:
        UserError: bad rows, a pair without a codec or judge, or media that cannot be read.
    """
    events = RunEvents(args.run)
    check_model_path(args.target)
    asked = [_rows_of(item) for item in args.data]
    check_output("--output", args.output)
    judges = _judges(args, {PAIRS[name][1] for name, _ in asked})
    kinds = [kind for _, kind in (PAIRS[name] for name, _ in asked) if kind != TEXT]
    if kinds and args.files is None:
        raise UserError(f"--data: asks for media of kind {kinds[0]}, which need --files DIR to lie in")
    out = {} if args.files is None else dict.fromkeys(kinds, args.files)
    check_media(args, out)
    from megatron_sov.infer.engines.target import find_target

    target = find_target(args.target)
    found = dict[str, Any]()
    for name, rows in asked:
        told = _pair(args, target, name, rows, judges)
        if told is not None:
            found[name] = told
    if not found:
        return ExitCode.OK  # the job's first process tells
    if args.output is not None:
        write_output(args.output, format_json(found))
    step = get_target_step(target, events)
    for name, told in found.items():
        events.add("media", step=step, pair=name, **{k: v for k, v in told.items() if k != "samples"})
    lines = [_line(name, told) for name, told in found.items()]
    print(format_json({n: {k: v for k, v in t.items() if k != "samples"}
                       for n, t in found.items()}).rstrip() if args.json else "\n".join(lines))
    return ExitCode.OK


def _rows_of(item: str) -> tuple[str, list[MediaRow]]:
    """Return the name and the rows of PAIR=FILE.jsonl."""
    name, _, file = item.partition("=")
    if name not in PAIRS or not file:
        raise UserError(f"--data {item}: must have the form PAIR=FILE.jsonl, with one of {', '.join(PAIRS)}")
    return name, read_media_rows(Path(file))


def _judges(args: EvalMediaOptions, kinds: set[str]) -> dict[str, Judge]:
    found = {}
    for kind in (IMAGE, AUDIO):
        said = getattr(args, f"{kind}_judge")
        if kind in kinds and said is None:
            raise UserError(f"--data: asks for media of kind {kind}, which needs --{kind}-judge: who "
                            "recognises what the model makes")
        if said is not None:
            found[kind] = load_judge(said)
    return found


def _pair(args: EvalMediaOptions, target: Any, name: str, rows: list[MediaRow],
          judges: dict[str, Judge]) -> dict[str, Any] | None:
    """Return figures and samples of a pair; None on other processes than the first."""
    from megatron_sov.omni.generation.replies import Asking, replies

    kind = PAIRS[name][1]
    out = {} if kind == TEXT or args.files is None else {kind: args.files / name}
    asking = Asking(shown_media(args, args.media_root), media_decoders(args), out,
                    args.sampling, chat=not args.no_chat, max_audio_tokens=args.max_audio_tokens,
                    batching=Batching(args.batch_size), with_features=not args.no_features)
    replied = replies(target, [row.content for row in rows], asking, settings=args.settings, nproc=args.nproc)
    if replied is None:
        return None
    heard = _recognised(rows, replied, kind, judges)
    samples = [_sample(row, reply, text, args.media_root)
               for row, reply, text in zip(rows, replied, heard, strict=True)]
    return {**compute_media_figures(rows, heard), "samples": samples}


def _files(reply: Replied, kind: str) -> list[Path]:
    return reply.made.pictures if kind == IMAGE else reply.made.sounds


def _recognised(rows: Sequence[MediaRow], replied: Sequence[Replied], kind: str,
                judges: dict[str, Judge]) -> list[str]:
    """Return what each reply says, or what a judge recognises in its first file; "" where it made none."""
    if kind == TEXT:
        return [reply.text for reply in replied]
    made = [(n, _files(reply, kind)[0]) for n, reply in enumerate(replied) if _files(reply, kind)]
    told = judges[kind]([file for _, file in made], [rows[n].labels for n, _ in made]) if made else []
    found = [""] * len(rows)
    for (n, _), text in zip(made, told, strict=True):
        found[n] = text
    return found


def _sample(row: MediaRow, reply: Replied, heard: str, root: Path) -> dict[str, Any]:
    """Return a sample as files and events have it: paths are absolute."""
    content = [{**part, "path": str((root / part["path"]).resolve())} if "path" in part else part
               for part in row.content]
    return {"content": content, "answer": row.answer, "recognised": heard, "text": reply.text,
            "pictures": [str(file.resolve()) for file in reply.made.pictures],
            "sounds": [str(file.resolve()) for file in reply.made.sounds],
            "broken_pictures": reply.made.num_broken, "tokens": reply.made.tokens}


def _line(name: str, told: dict[str, Any]) -> str:
    low, high = told["accuracy_interval"]
    chance = f", chance {told['chance']:.1%}" if "chance" in told else ""
    errors = f", WER {told['wer']:.3f}, CER {told['cer']:.3f}" if "wer" in told else ""
    return (f"{name:<12} {told['num_rows']:>5} rows: right {told['accuracy']:.1%} "
            f"({low:.1%} to {high:.1%}){chance}{errors}")


MEDIA = build_command(EvalMediaOptions, lambda typed: run_media(read_options(EvalMediaOptions, typed)))
