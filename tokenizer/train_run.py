"""Run `sov-tokenizer train`: learn a vocabulary, write the Hugging Face files and check them.

The check proves three facts about the files: decoding returns the text (after the preset's normalization),
tiktoken and `transformers` give the same ids, and a naive loop that first merges in words (stage 1) and then
across words (stage 2: superwords) gives the same tokens as all merges in order.
"""

import contextvars
import dataclasses
import importlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_sov.base.artifacts import ArtifactWriter, create_artifact, format_json, sha256_file
from megatron_sov.work.progress.resumable import open_parts
from tokenizer.bpe.count_pipeline import LearnedVocabulary, learn_vocabulary
from tokenizer.bpe.segmenting import merge_parts
from tokenizer.bpe.splitter import Splitter
from tokenizer.bpe.vocabulary import Vocabulary
from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON, build_preset_config, build_tokenizer
from tokenizer.mixture import gather_groups
from tokenizer.presets import NUM_BYTES, CountPlan, Preset, load_preset
from tokenizer.train import TokenizerTrainOptions, TrainRequest, apply_superword_options, make_plan

MAX_CHECKED_BYTES = 2 << 20
"""Maximum input size for `check_proposal`."""
TWO_STEP_CHARS = 50_000
"""Characters per sample for `_encode_in_two_steps`."""
BLOCK_CHARS, BLOCK_STEP = 4096, 13
"""`_iter_unicode_texts` takes every 13th character in a block, with another offset per separator."""
_LOADING = threading.Lock()
_CHECKED_INPUTS: set[tuple[str, ...]] = set()


def train_tokenizer(request: TrainRequest) -> None:
    """Train a tokenizer and write it as an artifact of kind "tokenizer". Raises `UserError`: unreadable
    input, a text too small for the vocabulary, or an output folder that exists. No output is written then;
    the next run reuses the counts."""
    plan, output = request.plan, request.output
    started_s = time.monotonic()
    with open_parts(output, "sov-tokenizer train"):
        learned = learn_vocabulary(plan, request.groups, load_ahead)
        num_superwords = learned.vocabulary.count_superwords()
        sentence = f"{plan.vocab_size} tokens learned in {time.monotonic() - started_s:.1f} s"
        if num_superwords:
            sentence += f"; {num_superwords:,} span words, {100 * num_superwords / plan.vocab_size:.2f} %"
        print(sentence)
        trained = build_tokenizer(plan.preset, learned.vocabulary)
        with create_artifact(output, "tokenizer", overwrite=request.overwrite) as artifact:
            _write_artifact(artifact, trained, plan, learned)
    print(f"wrote {output}")


def _write_artifact(artifact: ArtifactWriter, trained: Tokenizer, plan: CountPlan,
                    learned: LearnedVocabulary) -> None:
    """Write and check the two Hugging Face files, and fill the manifest."""
    preset = plan.preset
    trained.save(str(artifact.path / TOKENIZER_JSON), pretty=False)
    (artifact.path / CONFIG_JSON).write_text(format_json(build_preset_config(preset)), encoding="utf-8")
    samples = learned.samples
    checked = check_round_trip(trained, preset, vocabulary=learned.vocabulary, stage_1=learned.stage_1_tokens,
                               folder=artifact.path, samples=list(samples.values()))
    print(checked.sentence)
    ratios = dict(zip(samples, checked.bytes_per_token, strict=True))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} bytes per token")
    artifact.content = {
        "preset": preset.name, "tokenizer_sha256": sha256_file(artifact.path / TOKENIZER_JSON),
        "bos_id": preset.special_tokens[preset.bos_token], "eos_id": preset.special_tokens[preset.eos_token],
        "pad_id": preset.special_tokens[preset.pad_token], "vocab_size": plan.vocab_size,
        "num_superwords": learned.vocabulary.count_superwords(), "bytes_per_token": ratios,
        "checked": checked.sentence}
    artifact.settings = {"preset": preset, "vocab_size": plan.vocab_size,
                         "transition_size": plan.transition_size, "only_superwords": plan.only_superwords,
                         "superword_sample_bytes": plan.superword_sample_bytes,
                         "max_memory_bytes": plan.max_memory_bytes, "groups": learned.facts,
                         "stages": learned.stages}


def check_proposal(args: TokenizerTrainOptions) -> None:
    """Learn from small inputs in a temporary folder to check that the vocabulary size can be reached."""
    inputs = tuple(map(os.path.abspath, args.input))
    if inputs in _CHECKED_INPUTS:  # the first check corrected the vocabulary size
        return
    _CHECKED_INPUTS.add(inputs)
    groups = gather_groups(args.input, args.mixture)
    paths = [file for group in groups for path in group.paths for file in (path, *path.rglob("*"))]
    if sum(path.stat().st_size for path in paths if path.is_file()) > MAX_CHECKED_BYTES:
        return
    plan = make_plan(apply_superword_options(load_preset(args.preset, args.config), args), args)
    with tempfile.TemporaryDirectory() as work:
        # `stop_check` ends the check of a proposed command, but not a run in an empty context
        contextvars.Context().run(learn_vocabulary, dataclasses.replace(plan, work=Path(work)), groups)


class CheckFailed(Exception):
    """A defect of this program, not of the user's input."""


@dataclasses.dataclass(frozen=True)
class RoundTripCheck:
    sentence: str
    """Proven facts."""
    bytes_per_token: list[float]
    """UTF-8 bytes per token, by sample."""


def load_ahead() -> None:
    """Import `transformers` in a thread, which takes seconds, while the merges are learned."""
    threading.Thread(target=_import_transformers).start()


def _import_transformers() -> Any:
    # the lock keeps a second thread from a half-loaded module
    with _LOADING:
        return importlib.import_module("transformers")


def check_round_trip(tokenizer: Tokenizer, preset: Preset, vocabulary: Vocabulary, stage_1: int, folder: Path,
                     samples: list[str]) -> RoundTripCheck:
    """Check a tokenizer on training samples and on all Unicode blocks.

    Args:
        tokenizer: the tokenizer, for decoding.
        preset: the tokenizer's rules.
        vocabulary: tokens and merges, without special ids.
        stage_1: number of tokens after stage 1; all tokens without superwords.
        folder: contains tokenizer.json, for encoding.
        samples: one text per group.

    Raises:
        CheckFailed: an encoding differs, or decoding does not return the text.
    """
    splitter = Splitter(preset, preset.final_pattern)
    texts = [*samples, *_iter_unicode_texts()]
    ids = _encode_with_transformers(folder, texts)
    normal = [splitter.normalize(text) for text in texts]
    _check_equal("decoding does not give back", texts, tokenizer.decode_batch(ids, skip_special_tokens=False),
                 normal)
    encoding = vocabulary.as_tiktoken(preset.final_pattern)
    first = preset.num_special_ids
    # an independent implementation of the same merges
    tiktoken_ids = encoding.encode_ordinary_batch(normal, num_threads=len(os.sched_getaffinity(0)))
    _check_equal("tiktoken and transformers differ on", texts,
                 [[i + first for i in row] for row in tiktoken_ids], ids)
    if stage_1 < len(vocabulary.tokens):
        heads = [text[:TWO_STEP_CHARS] for text in normal[: len(samples)]]
        # SuperBPE learns in two stages and encodes in one step
        one_step = [encoding.encode_ordinary(text) for text in heads]
        _check_equal("two steps differ from one on", heads,
                     list(_encode_in_two_steps(heads, vocabulary, stage_1, splitter)), one_step)
    num_bytes = sum(len(text.encode()) for text in texts)
    sentence = (f"checked on {num_bytes / 1e6:.1f} MB: decoding gives the text back, "
                "tiktoken and transformers give the same ids")
    if stage_1 < len(vocabulary.tokens):
        sentence += ", two steps the same as one"
    return RoundTripCheck(sentence, [len(text.encode()) / max(1, len(row))
                                     for text, row in zip(samples, ids, strict=False)])


def _check_equal(message: str, texts: list[str], actual: Sequence[object],
                 expected: Sequence[object]) -> None:
    for text, value, reference in zip(texts, actual, expected, strict=True):
        if value != reference:
            raise CheckFailed(f"{message} {text[:200]!r}")


def _encode_with_transformers(folder: Path, texts: list[str]) -> list[list[int]]:
    """Encode texts with the written tokenizer.json; special tokens in a text stay text."""
    tokenizer = _import_transformers().PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER_JSON))
    return list(tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _encode_in_two_steps(texts: list[str], vocabulary: Vocabulary, stage_1: int,
                         splitter: Splitter) -> Iterator[list[int]]:
    """Encode texts naively: merge each unit by stage 1, then by stage 2."""
    pairs = [(vocabulary.tokens[left], vocabulary.tokens[right]) for left, right in vocabulary.merges]
    ranks = {pair: float(id_) for id_, pair in enumerate(pairs, NUM_BYTES)}
    first = {pair: rank for pair, rank in ranks.items() if rank < stage_1}
    second = {pair: rank for pair, rank in ranks.items() if rank >= stage_1}
    ids = {token: id_ for id_, token in enumerate(vocabulary.tokens)}
    unit_ids: dict[str, list[int]] = {}
    for text in texts:
        text_ids: list[int] = []
        for unit in splitter.split_text(text):
            if unit not in unit_ids:
                parts = merge_parts([bytes([b]) for b in unit.encode()], lambda a, b: first.get((a, b)))
                parts = merge_parts(parts, lambda a, b: second.get((a, b)))
                unit_ids[unit] = [ids[token] for token in parts]
            text_ids += unit_ids[unit]
        yield text_ids


def _iter_unicode_texts() -> Iterator[str]:
    """Yield characters from each Unicode block: adjacent, after a letter, after a space."""
    # the planes in between have no characters
    for start in (*range(0, 0x40000, BLOCK_CHARS), 0xE0000, 0xF0000, 0x10F000):
        codes = [c for c in range(start, start + BLOCK_CHARS) if not 0xD800 <= c < 0xE000]
        for offset, separator in enumerate(("", "a", " ")):
            chosen = codes[(start // BLOCK_CHARS + 4 * offset) % BLOCK_STEP :: BLOCK_STEP]
            if chosen:
                yield separator.join(map(chr, chosen))
