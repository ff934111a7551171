"""Byte-level BPE (arXiv 1508.07909 over bytes) by Hugging Face `tokenizers`: a preset's rules around learned merges."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatron_sov.errors import UserError
from tokenizer.presets import NUM_BYTES, NUM_SPECIAL_IDS, SMALLEST_VOCAB, Preset

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_FREQUENCY = 2
"""A pair that occurs less often is not merged."""


def untrained(preset: Preset) -> Tokenizer:
    """Return a tokenizer with the preset's rules and no vocabulary.

    Raises:
        UserError: the split pattern is not a regular expression.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    if preset.normalization == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    try:
        split = pre_tokenizers.Split(Regex(preset.split_pattern), behavior="isolated")
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"preset {preset.name}: split_pattern {preset.split_pattern!r} is no regular expression ({e})") from None
    # use_regex=False: the split above is the only one; add_prefix_space would change the text
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(preset: Preset, vocab_size: int, texts: Iterable[str], *, show_progress: bool = False) -> Tokenizer:
    """Learn merges from texts until the vocabulary has exactly `vocab_size` tokens.

    The result depends on the multiset of pre-tokens only, not on the order of texts or the number of threads.

    Raises:
        UserError: `vocab_size` is below special tokens plus bytes, or the texts do not hold enough to reach it.
    """
    from tokenizers import AddedToken, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCAB:
        raise UserError(f"--vocab-size {vocab_size}: must be at least {SMALLEST_VOCAB} "
                        f"({NUM_SPECIAL_IDS} special ids + {NUM_BYTES} bytes)")
    tokenizer = untrained(preset)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=MIN_FREQUENCY, show_progress=show_progress,
        max_token_length=preset.max_token_bytes + 1,  # the library compares with <
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in preset.special_by_id()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)  # special tokens spelled out in texts are ordinary text here
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise UserError(f"--vocab-size {vocab_size}: the text is too small for it, only {reached} tokens were reached "
                        f"(pairs must occur at least {MIN_FREQUENCY} times); add text or ask for at most {reached}")
    _check_ids(tokenizer, preset)
    return tokenizer


def _check_ids(tokenizer: Tokenizer, preset: Preset) -> None:
    """Raise where a merge spells a special token (ordinary text would then become its id) or ids are out of place."""
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    special = set(preset.special_by_id())
    if taken := sorted({"".join(merge) for merge in merges} & special):
        raise UserError(f"preset {preset.name}: merges spell the special token {taken[0]!r}, so text could become its id; "
                        "choose a split_pattern that separates its punctuation from its letters, or another name")
    for id_, token in enumerate(preset.special_by_id()):
        if (found := tokenizer.token_to_id(token)) != id_:
            raise UserError(f"preset {preset.name}: special token {token!r} got id {found}, must be {id_}; "
                            "choose a name that is not a single byte")


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Return UTF-8 bytes of texts divided by the tokens that they become."""
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(t.encode()) for t in texts) / max(1, sum(len(e.ids) for e in encodings))
