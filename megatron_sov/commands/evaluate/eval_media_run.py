"""Runs `megatron-sov eval media`: compares replies, or the judges' recognised texts, with the answers."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.commands.evaluate.eval_media import (
    IMAGE, PAIRS, TEXT, EvalMediaOptions, MediaEvaluation, MediaJudge, MediaRow)
from megatron_sov.commands.models.generate_media_run import build_media_decoders, build_prompt_media_encoder
from megatron_sov.commands.shared_options import get_target_step
from megatron_sov.eval.statistics import compute_mean_interval, compute_wilson_interval
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.request import Batching
from megatron_sov.omni.generation.replies import MediaGeneration, MediaReply, generate_replies


def evaluate_media(request: MediaEvaluation) -> None:
    """Measure each pair of modalities; on the first rank, write, record and print the figures."""
    options = request.options
    target = find_target(options.target)
    results = dict[str, Any]()
    for name, rows in request.rows:
        result = _evaluate_pair(options, target, name, rows, request.judges)
        if result is not None:  # on the first rank
            results[name] = result
    if not results:
        return
    if options.output is not None:
        write_output(options.output, format_json(results))
    step = get_target_step(target, request.events)
    figures: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        figures[name] = row = {key: value for key, value in result.items() if key != "samples"}
        request.events.add("media", step=step, pair=name, **row)
    if options.json:
        print(format_json(figures).rstrip())
    else:
        print("\n".join(_format_figures(name, row) for name, row in figures.items()))


def _evaluate_pair(options: EvalMediaOptions, target: Target, name: str, rows: list[MediaRow],
                   judges: dict[str, MediaJudge]) -> dict[str, Any] | None:
    """Return figures and samples for a pair; None except on rank 0."""
    kind = PAIRS[name][1]
    output_folders = {} if kind == TEXT or options.files is None else {kind: options.files / name}
    generation = MediaGeneration(
        build_prompt_media_encoder(options, options.media_root), build_media_decoders(options),
        output_folders, options.sampling, chat=not options.no_chat, max_audio_tokens=options.max_audio_tokens,
        batching=Batching(options.batch_size), with_features=not options.no_features)
    replied = generate_replies(target, [row.content for row in rows], generation, settings=options.settings,
                               nproc=options.nproc)
    if replied is None:
        return None
    texts = _recognize(rows, replied, kind, judges)
    samples = [_describe_sample(row, reply, text, options.media_root)
               for row, reply, text in zip(rows, replied, texts, strict=True)]
    return {**compute_media_figures(rows, texts), "samples": samples}


def _list_files(reply: MediaReply, kind: str) -> list[Path]:
    return reply.media.pictures if kind == IMAGE else reply.media.sounds


def _recognize(rows: Sequence[MediaRow], replied: Sequence[MediaReply], kind: str,
               judges: dict[str, MediaJudge]) -> list[str]:
    """Return the text of every reply, or the judge's text for the reply's first file; "" without a file."""
    if kind == TEXT:
        return [reply.text for reply in replied]
    indices = [i for i, reply in enumerate(replied) if _list_files(reply, kind)]
    texts = [""] * len(rows)
    if indices:
        files = [_list_files(replied[i], kind)[0] for i in indices]
        recognized = judges[kind](files, [rows[i].labels for i in indices])
        for i, text in zip(indices, recognized, strict=True):
            texts[i] = text
    return texts


def _describe_sample(row: MediaRow, reply: MediaReply, text: str, root: Path) -> dict[str, Any]:
    """Return a sample for --output, with absolute paths."""
    content = [{**part, "path": str((root / part["path"]).resolve())} if "path" in part else part
               for part in row.content]
    return {"content": content, "answer": row.answer, "recognised": text, "text": reply.text,
            "pictures": [str(file.resolve()) for file in reply.media.pictures],
            "sounds": [str(file.resolve()) for file in reply.media.sounds],
            "broken_pictures": reply.media.num_broken, "tokens": reply.media.tokens}


def compute_media_figures(rows: Sequence[MediaRow], texts: Sequence[str]) -> dict[str, Any]:
    """Compare recognised texts with the rows' answers, both normalized.

    Returns:
        `accuracy`: share of exact matches, with Wilson's interval; `wer` and `cer`: error rates of words and
        characters (jiwer) over all rows; `cer_interval`: of the rows' error rates, each at most 1; `chance`:
        mean of 1 / labels, if every row has labels.
    """
    # jiwer belongs to the optional dependencies of media
    import jiwer

    answers, recognized = [normalize_text(row.answer) for row in rows], [normalize_text(t) for t in texts]
    num_right = sum(answer == text for answer, text in zip(answers, recognized, strict=True))
    figures: dict[str, Any] = {
        "num_rows": len(rows), "accuracy": num_right / len(rows),
        "accuracy_interval": list(compute_wilson_interval(num_right, len(rows)))}
    if all(answers):
        # too long texts have error rates above 1, but the interval is of shares
        shares = [min(1.0, float(jiwer.cer(answer, text)))
                  for answer, text in zip(answers, recognized, strict=True)]
        figures |= {"wer": float(jiwer.wer(answers, recognized)),
                    "cer": float(jiwer.cer(answers, recognized)),
                    "cer_interval": list(compute_mean_interval(shares))}
    if all(row.labels for row in rows):
        figures["chance"] = sum(1 / len(row.labels) for row in rows) / len(rows)
    return figures


def normalize_text(text: str) -> str:
    """Lower the case, compose characters (NFC), and replace punctuation and spaces by single spaces."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    return " ".join("".join(map(_normalize_character, folded)).split())


def _normalize_character(character: str) -> str:
    kind = unicodedata.category(character)
    # marks include vowels in Devanagari, Thai and Arabic, and accents without a composed letter
    if character.isalnum() or kind.startswith("M"):
        return character
    # a zero width space separates words; further characters of zero width join or shape letters
    return "" if kind == "Cf" and character != "\N{ZERO WIDTH SPACE}" else " "


def _format_figures(name: str, figures: dict[str, Any]) -> str:
    low, high = figures["accuracy_interval"]
    chance = f", chance {figures['chance']:.1%}" if "chance" in figures else ""
    errors = f", WER {figures['wer']:.3f}, CER {figures['cer']:.3f}" if "wer" in figures else ""
    return (f"{name:<12} {figures['num_rows']:>5} rows: right {figures['accuracy']:.1%} "
            f"({low:.1%} to {high:.1%}){chance}{errors}")
