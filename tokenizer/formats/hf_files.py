"""The files by which Hugging Face `transformers` loads a tokenizer, and what a file of strangers may not ask
for: ids far above its tokens, for each of which a library makes room, and what makes a library panic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from megatron_sov.base.errors import UserError, first_error_line
from tokenizer.bpe.split_pattern import build_untrained_tokenizer
from tokenizer.bpe.vocabulary import Vocabulary, spell_token
from tokenizer.presets import Preset

FREE_IDS = 1 << 20
"""So many ids above its tokens may be unused: reserved ones, and those of other kinds of input."""
ID_DIGITS = 9
"""Longer numbers are no ids."""


def check_id_range(ids: Iterable[object], where: object) -> None:
    """Refuse ids that are no numbers, or far above what as many tokens need.

    Raises:
        UserError: naming the first one.
    """
    found = list(ids)
    limit = len(found) + FREE_IDS
    for id_ in found:
        if type(id_) is not int or not 0 <= id_ < limit:
            shown = repr(id_)[:20] if not isinstance(id_, int) or abs(id_) < 10**20 else "a huge number"
            raise UserError(f"{where}: {shown} is no id of one of its {len(found)} tokens (0 to "
                            f"{limit - 1}); restore the file from its source")


@contextlib.contextmanager
def translate_panics(where: object) -> Iterator[None]:
    """Turn a panic of a library in Rust, which is no `Exception`, into a `UserError`."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{where}: the library that reads it gives up ({first_error_line(e)}); "
                        "restore it from its source, or take another pattern") from None


TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"


def build_special_token(id_: int, token: str) -> dict[str, Any]:
    """Return a special token as tokenizer.json lists it: found in text as it stands."""
    return {"id": id_, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def build_tokenizer(preset: Preset, vocabulary: Vocabulary) -> Tokenizer:
    """Return the tokenizer: special tokens, bytes, merges, in this order of ids.

    Raises:
        UserError: a merge spells a special token (ordinary text would then become its id),
            or a special token is one byte.
    """
    special = preset.special_by_id()
    tokens = [spell_token(token) for token in vocabulary.tokens]
    if taken := sorted(set(tokens) & set(special)):
        raise UserError(f"preset {preset.name}: text can become the special token {taken[0]!r}, "
                        "since its bytes are an ordinary token as well; choose a split_pattern that "
                        "separates its punctuation from its letters, or another name")
    vocab = {token: id_ for id_, token in enumerate([*special, *tokens])}
    merges = [(tokens[left], tokens[right]) for left, right in vocabulary.merges]
    tokenizer = build_untrained_tokenizer(preset)
    tokenizer.model = models.BPE(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def build_preset_config(preset: Preset) -> dict[str, Any]:
    return build_tokenizer_config(preset.bos_token, preset.eos_token, preset.pad_token, preset.chat_template)


def build_tokenizer_config(bos: str | None, eos: str, pad: str, chat_template: str | None) -> dict[str, Any]:
    """Return the content of tokenizer_config.json: special tokens, chat template,
    nothing added or cleaned by itself."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        # transformers' own number for "no limit"; the model's config holds the real one
        "model_max_length": int(1e30),
        "chat_template": chat_template,
    }
