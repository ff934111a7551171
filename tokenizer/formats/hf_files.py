"""Build tokenizer.json and tokenizer_config.json for `transformers`, and reject damaged files."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from megatron_sov.base.errors import UserError, first_error_line
from tokenizer.bpe.split_pattern import build_untrained_tokenizer
from tokenizer.bpe.vocabulary import Vocabulary, spell_token
from tokenizer.presets import Preset

TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"
FREE_IDS = 1 << 20
"""Maximum unused ids below the largest id: reserved ids and media tokens."""
ID_DIGITS = 9
"""Maximum digits in an id."""


def get_token_ids(raw: dict[str, Any]) -> dict[str, int]:
    """Return token -> id of a tokenizer.json, including added tokens."""
    vocab = raw["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: id_ for id_, (piece, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in raw["added_tokens"]}


def check_id_range(ids: Iterable[object], where: object) -> None:
    """Check that ids are integers and not far above the number of tokens; libraries allocate memory per id.
    Raises `UserError`: names the first bad id."""
    ids = list(ids)
    limit = len(ids) + FREE_IDS
    for id_ in ids:
        if type(id_) is not int or not 0 <= id_ < limit:
            text = repr(id_)[:20] if not isinstance(id_, int) or abs(id_) < 10**20 else "a huge number"
            raise UserError(f"{where}: {text} is no id of one of its {len(ids)} tokens (0 to "
                            f"{limit - 1}); restore the file from its source")


@contextlib.contextmanager
def translate_panics(where: object) -> Iterator[None]:
    """Convert a Rust panic, a `BaseException`, to a `UserError`."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{where}: the library that reads it gives up ({first_error_line(e)}); "
                        "restore it from its source, or take another pattern") from None


def build_special_token(id_: int, token: str) -> dict[str, Any]:
    """Return an entry of `added_tokens` in tokenizer.json; its text matches without normalization."""
    return {"id": id_, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def build_tokenizer(preset: Preset, vocabulary: Vocabulary) -> Tokenizer:
    """Build a tokenizer with ids in the order special tokens, bytes, merges. Raises `UserError`: an ordinary
    token has the spelling of a special token, so that text could become its id."""
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
    """Return tokenizer_config.json: special tokens and chat template, no added tokens, no clean-up."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        # the number of transformers for "no limit"; the model's config has the limit
        "model_max_length": int(1e30),
        "chat_template": chat_template,
    }
