"""The files by which Hugging Face `transformers` loads a tokenizer."""

from __future__ import annotations

from typing import Any

from tokenizer.presets import Preset

TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"


def special_token(id_: int, token: str) -> dict[str, Any]:
    """Return a special token as tokenizer.json lists it: found in text as it stands."""
    return {"id": id_, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True}


def tokenizer_config(preset: Preset) -> dict[str, Any]:
    """Return the content of tokenizer_config.json for a preset."""
    return config_json(preset.bos_token, preset.eos_token, preset.pad_token, preset.chat_template)


def config_json(bos: str | None, eos: str, pad: str, chat_template: str | None) -> dict[str, Any]:
    """Return the content of tokenizer_config.json: special tokens, chat template, nothing added or cleaned by itself."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # transformers' own number for "no limit"; the model's config holds the real one
        "chat_template": chat_template,
    }
