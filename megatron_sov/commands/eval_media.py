"""`megatron-sov eval media`: from one modality to another, judged by what others recognise, or by
which of many candidates is the most probable."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.artifacts import to_json, write_output
from megatron_sov.commands.eval_retrieval import (
    add_retrieval_arguments,
    retrieval_line,
    retrieval_rows,
    retrieved,
)
from megatron_sov.commands.media_options import add_codec_arguments, check_media, media_decoders, shown_media
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.eval.media.judges import Judge, judge_of
from megatron_sov.eval.media.pairs import AUDIO, IMAGE, PAIRS, TEXT, Row, figures, read_rows
from megatron_sov.generate.request import Batching, Sampling
from megatron_sov.outputs import check_output
from megatron_sov.pages.embedded import address_of
from megatron_sov.runs.append import RunEvents
from megatron_sov.settings import SettingsError

if TYPE_CHECKING:
    from megatron_sov.generate.media_replies import Replied

SHOWN_SAMPLES = 8
"""Of each pair, in the run's events; the file has all."""


def add_media_arguments(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Declare what `eval media` takes beside the layout; returns its parser."""
    sub.add_argument("target", metavar="TARGET", type=Path,
                     help="checkpoint, run (its newest one) or Hugging Face folder")
    sub.add_argument("--data", action="append", default=[], metavar="PAIR=FILE.jsonl",
                     help=f"rows of a pair ({', '.join(PAIRS)}): "
                          '{"content": [parts], "answer": "..."}, and "labels" where a judge chooses; may be '
                          "repeated")
    add_retrieval_arguments(sub)
    sub.add_argument("--media-root", type=Path, required=True, metavar="DIR",
                     help="folder that paths of media begin from; nothing outside of it is read")
    add_codec_arguments(sub)
    sub.add_argument("--image-judge", metavar="FILE.py:NAME|COMMAND",
                     help="recognises what the model draws: a function (files, labels) -> texts, or a "
                          "program")
    sub.add_argument("--audio-judge", metavar="FILE.py:NAME|COMMAND",
                     help="recognises what the model says, likewise")
    sub.add_argument("--files", type=Path, metavar="DIR",
                     help="folder for what the model draws and says, where a pair asks for that")
    sub.add_argument("--max-new-tokens", type=int, default=1024, metavar="N",
                     help="longest reply (default %(default)s)")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T",
                     help="0 takes the most probable token (default)")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default %(default)s")
    sub.add_argument("--seed", type=int, default=0, metavar="S", help="of the samples (default %(default)s)")
    sub.add_argument("--no-chat", action="store_true", help="do not frame prompts by the chat template")
    sub.add_argument("--batch-size", type=int, default=Batching.max_sequences, metavar="N",
                     help="replies that are written at a time (default %(default)s)")
    sub.add_argument("--output", type=Path, metavar="FILE.json",
                     help="write figures and every sample as JSON")
    return sub


def run_media(args: argparse.Namespace, events: RunEvents) -> int:
    """Ask, judge and tell; returns the exit code.

    Raises:
        UserError: bad rows, a pair without a codec or judge, or media that cannot be read.
    """
    asked, ranked = [_asked(item) for item in args.data], retrieval_rows(args)
    if not asked and not ranked:
        raise UserError("there is nothing to ask: pass --data PAIR=FILE.jsonl or --retrieval PAIR=FILE.jsonl")
    sampling = Sampling(args.max_new_tokens, args.temperature, 0, args.top_p, args.seed)
    if problems := sampling.problems() + Batching(args.batch_size).problems():
        raise SettingsError("eval media", problems)
    check_output("--output", args.output)
    judges = _judges(args, {PAIRS[name][1] for name, _ in asked})
    out = {kind: args.files for _, (_, kind) in ((n, PAIRS[n]) for n, _ in asked) if kind != TEXT}
    if out and args.files is None:
        raise UserError(f"--data: asks for media of kind {next(iter(out))}, which need --files DIR to lie in")
    check_media(args, out)
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.generate.target import find_target

    target = find_target(args.target)
    found, compared = dict[str, Any](), dict[str, Any]()
    for name, rows in asked:
        told = _pair(args, target, name, rows, sampling, judges)
        if told is not None:
            found[name] = told
    for name, rows in ranked:
        compared |= retrieved(args, target, name, rows, events)
    if not found and not compared:
        return ExitCode.OK  # the job's first process tells
    if args.output is not None:
        write_output(args.output, to_json({**found, **compared}))
    step = events.last_step() if target.step is None else target.step
    for name, told in found.items():
        events.add("media", step=step, pair=name,
                   **{**told, "samples": [_embedded(s) for s in told["samples"][:SHOWN_SAMPLES]]})
    lines = [*(_line(name, told) for name, told in found.items()),
             *(retrieval_line(name, told) for name, told in compared.items())]
    print(to_json({n: {k: v for k, v in t.items() if k not in ("samples", "ranks")}
                   for n, t in {**found, **compared}.items()}).rstrip() if args.json else "\n".join(lines))
    return ExitCode.OK


def _asked(item: str) -> tuple[str, list[Row]]:
    name, _, file = item.partition("=")
    if name not in PAIRS or not file:
        raise UserError(f"--data {item}: must have the form PAIR=FILE.jsonl, with one of {', '.join(PAIRS)}")
    return name, read_rows(Path(file))


def _judges(args: argparse.Namespace, kinds: set[str]) -> dict[str, Judge]:
    found = {}
    for kind in (IMAGE, AUDIO):
        said = getattr(args, f"{kind}_judge")
        if kind in kinds and said is None:
            raise UserError(f"--data: asks for media of kind {kind}, which needs --{kind}-judge: who "
                            "recognises what the model makes")
        if said is not None:
            found[kind] = judge_of(said)
    return found


def _pair(args: argparse.Namespace, target: Any, name: str, rows: list[Row], sampling: Sampling,
          judges: dict[str, Judge]) -> dict[str, Any] | None:
    """Return figures and samples of a pair; None on other processes than the first."""
    from megatron_sov.generate.media_replies import Asking, replies

    kind = PAIRS[name][1]
    out = {} if kind == TEXT else {kind: args.files / name}
    asking = Asking(shown_media(args, args.media_root), media_decoders(args), out, sampling,
                    chat=not args.no_chat, max_audio_tokens=args.max_audio_tokens,
                    batching=Batching(args.batch_size), with_features=not args.no_features)
    replied = replies(target, [row.content for row in rows], asking, settings=args.settings, nproc=args.nproc)
    if replied is None:
        return None
    heard = _recognised(rows, replied, kind, judges)
    samples = [_sample(row, reply, text, args.media_root)
               for row, reply, text in zip(rows, replied, heard, strict=True)]
    return {**figures(rows, heard), "samples": samples}


def _files(reply: Replied, kind: str) -> list[Path]:
    return reply.made.pictures if kind == IMAGE else reply.made.sounds


def _recognised(rows: Sequence[Row], replied: Sequence[Replied], kind: str,
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


def _sample(row: Row, reply: Replied, heard: str, root: Path) -> dict[str, Any]:
    """Return a sample as files and events have it: paths are absolute."""
    content = [{**part, "path": str((root / part["path"]).resolve())} if "path" in part else part
               for part in row.content]
    return {"content": content, "answer": row.answer, "recognised": heard, "text": reply.text,
            "pictures": [str(file.resolve()) for file in reply.made.pictures],
            "sounds": [str(file.resolve()) for file in reply.made.sounds],
            "broken_pictures": reply.made.num_broken, "tokens": reply.made.tokens}


def _embedded(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample with its media inside, as far as they are small, in the place of paths and tokens."""
    content = [{"type": part["type"], "address": address_of(Path(part["path"]))} if "path" in part else part
               for part in sample["content"]]
    made = [address_of(Path(file)) for file in (*sample["pictures"], *sample["sounds"])]
    return {"content": content, "answer": sample["answer"], "recognised": sample["recognised"],
            "text": sample["text"], "addresses": [address for address in made if address]}


def _line(name: str, told: dict[str, Any]) -> str:
    low, high = told["accuracy_interval"]
    chance = f", chance {told['chance']:.1%}" if "chance" in told else ""
    errors = f", WER {told['wer']:.3f}, CER {told['cer']:.3f}" if "wer" in told else ""
    return (f"{name:<12} {told['num_rows']:>5} rows: right {told['accuracy']:.1%} "
            f"({low:.1%} to {high:.1%}){chance}{errors}")
