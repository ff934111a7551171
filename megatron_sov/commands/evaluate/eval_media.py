"""`megatron-sov eval media`: what a model draws, says and recognises, and how it ranks texts and media."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.base.artifacts import to_json, write_output
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.pages.markdown import address_of
from megatron_sov.commands.models.generate import EvalMediaOptions, check_media, media_decoders, shown_media
from megatron_sov.commands.shared_options import step_of
from megatron_sov.infer.request import Batching
from megatron_sov.omni.evaluation import (
    AUDIO, IMAGE, PAIRS, RETRIEVAL, TEXT, Judge, MediaRow, figures, grouped, judge_of, likelihoods,
    rank_figures, ranks, read_rows)
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.folder import RunEvents

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.omni.generation.replies import Replied

SHOWN_SAMPLES = 8
"""Of each pair, in the run's events; the file has all."""


def run_media(args: EvalMediaOptions) -> int:
    """Ask, judge and tell; returns the exit code.

    Raises:
        UserError: bad rows, a pair without a codec or judge, or media that cannot be read.
    """
    events = RunEvents(args.run)
    refuse_missing(args.target)
    asked, ranked = [_rows_of("--data", item, PAIRS) for item in args.data], retrieval_rows(args)
    if not asked and not ranked:
        raise UserError("there is nothing to ask: pass --data PAIR=FILE.jsonl or --retrieval PAIR=FILE.jsonl")
    check_output("--output", args.output)
    judges = _judges(args, {PAIRS[name][1] for name, _ in asked})
    kinds = [kind for _, kind in (PAIRS[name] for name, _ in asked) if kind != TEXT]
    if kinds and args.files is None:
        raise UserError(f"--data: asks for media of kind {kinds[0]}, which need --files DIR to lie in")
    out = {} if args.files is None else dict.fromkeys(kinds, args.files)
    check_media(args, out)
    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.infer.engines.target import find_target

    target = find_target(args.target)
    found, compared = dict[str, Any](), dict[str, Any]()
    for name, rows in asked:
        told = _pair(args, target, name, rows, judges)
        if told is not None:
            found[name] = told
    for name, rows in ranked:
        compared |= retrieved(args, target, name, rows, events)
    if not found and not compared:
        return ExitCode.OK  # the job's first process tells
    if args.output is not None:
        write_output(args.output, to_json({**found, **compared}))
    step = step_of(target, events)
    for name, told in found.items():
        events.add("media", step=step, pair=name,
                   **{**told, "samples": [_embedded(s) for s in told["samples"][:SHOWN_SAMPLES]]})
    lines = [*(_line(name, told) for name, told in found.items()),
             *(retrieval_line(name, told) for name, told in compared.items())]
    print(to_json({n: {k: v for k, v in t.items() if k not in ("samples", "ranks")}
                   for n, t in {**found, **compared}.items()}).rstrip() if args.json else "\n".join(lines))
    return ExitCode.OK


def _rows_of(option: str, item: str, pairs: Collection[str]) -> tuple[str, list[MediaRow]]:
    """Return the name and the rows of PAIR=FILE.jsonl."""
    name, _, file = item.partition("=")
    if name not in pairs or not file:
        raise UserError(f"{option} {item}: must have the form PAIR=FILE.jsonl, with one of "
                        f"{', '.join(pairs)}")
    return name, read_rows(Path(file))


def _judges(args: EvalMediaOptions, kinds: set[str]) -> dict[str, Judge]:
    found = {}
    for kind in (IMAGE, AUDIO):
        said = getattr(args, f"{kind}_judge")
        if kind in kinds and said is None:
            raise UserError(f"--data: asks for media of kind {kind}, which needs --{kind}-judge: who "
                            "recognises what the model makes")
        if said is not None:
            found[kind] = judge_of(said)
    return found


def _pair(args: EvalMediaOptions, target: Any, name: str, rows: list[MediaRow],
          judges: dict[str, Judge]) -> dict[str, Any] | None:
    """Return figures and samples of a pair; None on other processes than the first."""
    from megatron_sov.omni.generation.replies import Asking, replies

    kind = PAIRS[name][1]
    out = {} if kind == TEXT or args.files is None else {kind: args.files / name}
    asking = Asking(shown_media(args, args.media_root), media_decoders(args, args.sampling.seed), out,
                    args.sampling, chat=not args.no_chat, max_audio_tokens=args.max_audio_tokens,
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


EVENT = "media_retrieval"


def retrieval_rows(args: EvalMediaOptions) -> list[tuple[str, list[MediaRow]]]:
    """Return the pairs that are asked for, with their rows.

    Raises:
        UserError: there is no such pair, or rows are malformed.
    """
    found = []
    for item in args.retrieval:
        name, rows = _rows_of("--retrieval", item, RETRIEVAL)
        kind = RETRIEVAL[name][0].partition("-")[0]
        if bare := [n for n, row in enumerate(rows, 1) if all(part.get("type") != kind for part in
                                                             row.content)]:
            raise UserError(f"--retrieval {item}: row {bare[0]} shows no {kind}; each shows one to be found")
        if len({row.answer for row in rows}) < 2:
            raise UserError(f"--retrieval {item}: all rows have one answer, so there is nothing to choose "
                            "from; pass rows of several")
        found.append((name, rows))
    return found


def retrieved(args: EvalMediaOptions, target: Target, name: str, rows: list[MediaRow],
              events: RunEvents) -> dict[str, Any]:
    """Return direction -> figures of a pair; {} on other processes than the first."""
    groups = grouped(rows, args.candidates, args.sampling.seed)
    scores = likelihoods(target, rows, groups, shown_media(args, args.media_root), chat=not args.no_chat,
                         with_features=not args.no_features, batching=Batching(args.batch_size),
                         settings=args.settings, nproc=args.nproc)
    if scores is None:
        return {}
    found = {way: rank_figures(of) for way, of in zip(RETRIEVAL[name], ranks(rows, groups, scores),
                                                      strict=True)}
    step = step_of(target, events)
    for way, told in found.items():
        events.add(EVENT, step=step, pair=way, **{k: v for k, v in told.items() if k != "ranks"})
    return {f"retrieval/{way}": told for way, told in found.items()}


def retrieval_line(name: str, told: dict[str, Any]) -> str:
    shares = []
    for k in (1, 5):
        low, high = told[f"recall_at_{k}_interval"]
        shares.append(f"recall@{k} {told[f'recall_at_{k}']:.1%} ({low:.1%} to {high:.1%}; chance "
                      f"{told[f'chance_at_{k}']:.1%})")
    return (f"{name:<22} {told['num_questions']:>5} questions, {told['num_candidates']:.0f} candidates: "
            f"{', '.join(shares)}, mean rank {told['mean_rank']:.2f} (chance {told['chance_mean_rank']:.2f})")
