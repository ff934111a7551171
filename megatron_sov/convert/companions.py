"""What travels with the weights: tokenizer files, chat template, generation defaults and the
token ids in them.

In a checkpoint these files stand in `tokenizer/`, in a Hugging Face folder beside the weights.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import atomic_write, to_json
from megatron_sov.chat.folder import read_chat_encoder
from megatron_sov.errors import UserError
from megatron_sov.models.family import TokenIds
from megatron_sov.obs.warning import warn
from megatron_sov.outputs import refuse_link_outside

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
                   GENERATION_CONFIG)
"""Files that are carried along; anything else (code above all) stays behind."""


def carry(source: Path, target: Path, tokens: TokenIds) -> None:
    """Copy the companion files of `source` to `target`; generation defaults are made from `tokens`
    where there are none."""
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            refuse_link_outside(source, source / name)
            shutil.copyfile(source / name, target / name)
    if not (target / GENERATION_CONFIG).exists() and tokens != TokenIds():
        ids = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
        atomic_write(target / GENERATION_CONFIG,
                     to_json({name: value for name, value in ids.items() if value is not None}))


def with_turn_ends(folder: Path, tokens: TokenIds) -> TokenIds:
    """Return token ids whose eos is all at which generation ends: eos itself, and what ends an assistant's
    turn in the chat template of `folder`; engines stop there."""
    try:
        chat = read_chat_encoder(folder)
    except UserError as e:
        warn(f"{e}; generation stops at eos alone")
        chat = None
    eos = tokens.eos
    found = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    found += [id_ for id_ in (chat.end_ids() if chat else ()) if id_ not in found]
    return replace(tokens, eos=found if len(found) > 1 else found[0] if found else None)


def ids_in(config: dict[str, Any]) -> TokenIds:
    """Return the token ids of a config.json or generation_config.json."""
    return TokenIds(config.get("bos_token_id"), config.get("eos_token_id"), config.get("pad_token_id"))


def ids_beside(folder: Path) -> TokenIds:
    """Return the token ids that the files in `folder` tell: generation defaults first,
    else the tokenizer's special tokens.

    Raises:
        UserError: a file is damaged, or names a special token that the tokenizer does not have.
    """
    if (folder / GENERATION_CONFIG).is_file():
        return ids_in(_read(folder / GENERATION_CONFIG))
    config_file, tokenizer_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not (config_file.is_file() and tokenizer_file.is_file()):
        return TokenIds()
    config, tokenizer = _read(config_file), _read(tokenizer_file)
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    ids |= {text: number for text, number in tokenizer["model"]["vocab"].items() if text not in ids}

    def id_of(field: str) -> int | None:
        token = config.get(field)
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and text not in ids:
            raise UserError(f"{config_file}: {field} = {text!r} is not a token of {tokenizer_file.name}; "
                            "correct it there")
        return None if text is None else int(ids[text])

    return TokenIds(id_of("bos_token"), id_of("eos_token"), id_of("pad_token"))


def split_conflict(folder: Path, split: str | None) -> str | None:
    """Return what to tell a user whose tokenizer.json splits text otherwise than its reader, who uses
    `split`; else None."""
    tokenizer_file = folder / "tokenizer.json"
    if split is None or not tokenizer_file.is_file():
        return None
    if json.dumps(split) in json.dumps(_read(tokenizer_file).get("pre_tokenizer")):
        return None
    return (f"{tokenizer_file} splits text by another regular expression than transformers' AutoTokenizer, "
            "which does not read it for this model family and may give other token ids; "
            "load it with PreTrainedTokenizerFast.from_pretrained")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as a JSON object ({e}); "
                        "restore it from its source") from None
