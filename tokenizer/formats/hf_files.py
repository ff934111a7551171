"""The files by which Hugging Face `transformers` loads a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_sov.base.errors import UserError
from tokenizer.bpe.split_pattern import untrained
from tokenizer.bpe.vocabulary import Vocabulary, spelled
from tokenizer.presets import Preset

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"


def special_token(id_: int, token: str) -> dict[str, Any]:
    """Return a special token as tokenizer.json lists it: found in text as it stands."""
    return {"id": id_, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def finished(preset: Preset, vocabulary: Vocabulary) -> Tokenizer:
    """Return the tokenizer: special tokens, bytes, merges, in this order of ids.

    Raises:
        UserError: a merge spells a special token (ordinary text would then become its id),
            or a special token is one byte.
    """
    from tokenizers import AddedToken, models

    special = preset.special_by_id()
    tokens = [spelled(token) for token in vocabulary.tokens]
    if taken := sorted(set(tokens) & set(special)):
        raise UserError(f"preset {preset.name}: text can become the special token {taken[0]!r}, "
                        "since its bytes are an ordinary token as well; choose a split_pattern that "
                        "separates its punctuation from its letters, or another name")
    vocab = {token: id_ for id_, token in enumerate([*special, *tokens])}
    merges = [(tokens[left], tokens[right]) for left, right in vocabulary.merges]
    tokenizer = untrained(preset)
    tokenizer.model = models.BPE(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def tokenizer_config(preset: Preset) -> dict[str, Any]:
    """Return the content of tokenizer_config.json for a preset."""
    return config_json(preset.bos_token, preset.eos_token, preset.pad_token, preset.chat_template)


def config_json(bos: str | None, eos: str, pad: str, chat_template: str | None) -> dict[str, Any]:
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
