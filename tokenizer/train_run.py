"""Runs `sov-tokenizer train`: learns a vocabulary, writes files for transformers and checks them."""

from __future__ import annotations

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
from tokenizer.presets import CountPlan, Preset, load_preset
from tokenizer.train import TokenizerTrainOptions, TrainRequest, apply_superword_options, make_plan

MAX_CHECKED_BYTES = 2 << 20
"""Longest text from which the check of a proposed line learns."""
_CHECKED_INPUTS: set[tuple[str, ...]] = set()


def train_tokenizer(request: TrainRequest) -> None:
    """Train a tokenizer and write it as an artifact of kind "tokenizer".

    Raises:
        UserError: unreadable input, a vocabulary that cannot be reached, or an output that may not be
            replaced; no output is written then, and what is counted is kept for the next try.
    """
    plan, output = request.plan, request.output
    started_s = time.monotonic()
    with open_parts(output, "sov-tokenizer train"):
        learned = learn_vocabulary(plan, request.groups, load_ahead)
        num_superwords = learned.vocabulary.count_superwords()
        print(f"{plan.vocab_size} tokens learned in {time.monotonic() - started_s:.1f} s" + (
            f"; {num_superwords:,} span words, {100 * num_superwords / plan.vocab_size:.2f} %"
            if num_superwords else ""))
        trained = build_tokenizer(plan.preset, learned.vocabulary)
        with create_artifact(output, "tokenizer", overwrite=request.overwrite) as artifact:
            _write_artifact(artifact, trained, plan, learned)
    print(f"wrote {output}")


def _write_artifact(artifact: ArtifactWriter, trained: Tokenizer, plan: CountPlan,
                    learned: LearnedVocabulary) -> None:
    """Write the two Hugging Face files, check them, and state the facts in the manifest."""
    preset = plan.preset
    trained.save(str(artifact.path / TOKENIZER_JSON), pretty=False)
    (artifact.path / CONFIG_JSON).write_text(format_json(build_preset_config(preset)), encoding="utf-8")
    samples = learned.samples
    checked = check_round_trip(trained, preset, learned.vocabulary, learned.stage_1_tokens, artifact.path,
                    list(samples.values()))
    print(checked.sentence)
    ratios = dict(zip(samples, checked.bytes_per_token, strict=True))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} bytes per token")
    artifact.content = {
        "preset": preset.name,
        "tokenizer_sha256": sha256_file(artifact.path / TOKENIZER_JSON),
        "bos_id": preset.special_tokens[preset.bos_token],
        "eos_id": preset.special_tokens[preset.eos_token],
        "pad_id": preset.special_tokens[preset.pad_token],
        "vocab_size": plan.vocab_size,
        "num_superwords": learned.vocabulary.count_superwords(),
        "bytes_per_token": ratios,
        "checked": checked.sentence,
    }
    artifact.settings = {"preset": preset, "vocab_size": plan.vocab_size,
                         "transition_size": plan.transition_size, "only_superwords": plan.only_superwords,
                         "superword_sample_bytes": plan.superword_sample_bytes,
                         "max_memory_bytes": plan.max_memory_bytes, "groups": learned.facts,
                         "stages": learned.stages}


def check_proposal(args: TokenizerTrainOptions) -> None:
    """Learn from a short text in a temporary folder, to check whether its vocabulary can be reached."""
    inputs = tuple(map(os.path.abspath, args.input))
    if inputs in _CHECKED_INPUTS:  # the size of the vocabulary has been corrected
        return
    _CHECKED_INPUTS.add(inputs)
    groups = gather_groups(args.input, args.mixture)
    paths = [file for group in groups for path in group.paths for file in (path, *path.rglob("*"))]
    if sum(path.stat().st_size for path in paths if path.is_file()) > MAX_CHECKED_BYTES:
        return
    plan = make_plan(apply_superword_options(load_preset(args.preset, args.config), args), args)
    with tempfile.TemporaryDirectory() as work:
        # an empty context: the work itself is no check
        contextvars.Context().run(learn_vocabulary, dataclasses.replace(plan, work=Path(work)), groups)


# What is proven about a finished tokenizer.
#
# - One step (all merges in their order) gives the same tokens as two (stage 1, then stage 2), by a naive
#   loop.
# - tiktoken gives the same ids as `transformers`, which runs `tokenizers` on the files that were written.
# - Decoding gives the text back, after the normalization of the preset.

TWO_STEP_CHARS = 50_000
"""Text of each sample that is merged by the naive loop."""
_LOADING = threading.Lock()
BLOCK_CHARS, BLOCK_STEP = 4096, 13
"""Every 13th Unicode character, in blocks: another one of each block in each kind of surrounding."""


class CheckFailed(Exception):
    """A defect of this program, not of the user's input."""


@dataclasses.dataclass(frozen=True)
class RoundTripCheck:
    """What the check found."""

    sentence: str
    """What was proven, and on how much text."""
    bytes_per_token: list[float]
    """UTF-8 bytes of each sample divided by its tokens."""


def load_ahead() -> None:
    """Load `transformers` beside other work: it takes seconds."""
    threading.Thread(target=_import_transformers).start()


def _import_transformers() -> Any:
    """Return the module; a thread that met it half loaded by another one would not find all of its names."""
    with _LOADING:
        return importlib.import_module("transformers")


def check_round_trip(tokenizer: Tokenizer, preset: Preset, vocabulary: Vocabulary, stage_1: int, folder: Path,
          samples: list[str]) -> RoundTripCheck:
    """Check a tokenizer on samples of its text and on Unicode.

    Args:
        tokenizer: as built; it decodes.
        preset: its rules.
        vocabulary: its tokens and merges.
        stage_1: tokens of stage 1.
        folder: holds its files.
        samples: one text of each group.

    Raises:
        CheckFailed: a difference; it should never happen.
    """
    splitter = Splitter(preset, preset.final_pattern)
    texts = [*samples, *_iter_unicode_texts()]
    # from the files, as a user's program loads them
    ids = _encode_with_transformers(folder, texts)
    normal = [splitter.normalize(text) for text in texts]
    _check_equal("decoding does not give back", texts, tokenizer.decode_batch(ids, skip_special_tokens=False),
            normal)
    encoding = vocabulary.as_tiktoken(preset.final_pattern)
    first = preset.num_special_ids
    # another implementation of the same merges: it shares no code with `tokenizers`
    by_tiktoken = encoding.encode_ordinary_batch(normal, num_threads=len(os.sched_getaffinity(0)))
    _check_equal("tiktoken and transformers differ on", texts,
            [[i + first for i in found] for found in by_tiktoken], ids)
    if stage_1 < len(vocabulary.tokens):
        heads = [text[:TWO_STEP_CHARS] for text in normal[: len(samples)]]
        # SuperBPE is learned in two steps and encoded in one: both must agree
        one_step = [encoding.encode_ordinary(text) for text in heads]
        _check_equal("two steps differ from one on", heads,
                list(_encode_in_two_steps(heads, vocabulary, stage_1, splitter)), one_step)
    num_bytes = sum(len(text.encode()) for text in texts)
    sentence = (f"checked on {num_bytes / 1e6:.1f} MB: decoding gives the text back, "
                "tiktoken and transformers give the same ids"
                + (", two steps the same as one" if stage_1 < len(vocabulary.tokens) else ""))
    return RoundTripCheck(sentence, [len(text.encode()) / max(1, len(found))
                                     for text, found in zip(samples, ids, strict=False)])


def _check_equal(message: str, texts: list[str], found: Sequence[object], expected: Sequence[object]) -> None:
    for text, one, other in zip(texts, found, expected, strict=True):
        if one != other:
            raise CheckFailed(f"{message} {text[:200]!r}")


def _encode_with_transformers(folder: Path, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts, by the file; special tokens in them stay text."""
    loaded = _import_transformers().PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER_JSON))
    return list(loaded(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _encode_in_two_steps(texts: list[str], vocabulary: Vocabulary, stage_1: int,
                  splitter: Splitter) -> Iterator[list[int]]:
    """Yield the tokens of texts: each unit by the merges of stage 1, then by those of stage 2."""
    ranks = {(vocabulary.tokens[a], vocabulary.tokens[b]): id_
             for id_, (a, b) in enumerate(vocabulary.merges, 256)}
    ids = {token: id_ for id_, token in enumerate(vocabulary.tokens)}

    def first(left: bytes, right: bytes) -> float | None:
        """Return the rank of a merge of stage 1."""
        return rank if (rank := ranks.get((left, right))) is not None and rank < stage_1 else None

    def second(left: bytes, right: bytes) -> float | None:
        """Return the rank of a merge of stage 2."""
        return rank if (rank := ranks.get((left, right))) is not None and rank >= stage_1 else None

    known: dict[str, list[int]] = {}
    for text in texts:
        found: list[int] = []
        for unit in splitter.split_text(text):
            if unit not in known:
                # plain BPE by ranks, slow and obvious
                parts = merge_parts([bytes([b]) for b in unit.encode()], first)
                known[unit] = [ids[token] for token in merge_parts(parts, second)]
            found += known[unit]
        yield found


def _iter_unicode_texts() -> Iterator[str]:
    """Yield characters of all of Unicode, in blocks: alone, behind a letter, behind a space."""
    # the planes between have no characters
    for start in (*range(0, 0x40000, BLOCK_CHARS), 0xE0000, 0xF0000, 0x10F000):
        codes = [c for c in range(start, start + BLOCK_CHARS) if not 0xD800 <= c < 0xE000]
        for offset, separator in enumerate(("", "a", " ")):
            if codes:
                yield separator.join(
                    map(chr, codes[(start // BLOCK_CHARS + 4 * offset) % BLOCK_STEP :: BLOCK_STEP]))
