"""Copy the companion files of a model (tokenizer, chat template, generation defaults), and read token ids.

A checkpoint stores companion files in `tokenizer/`, a Hugging Face folder next to the weights.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import format_json, read_manifest, write_atomically
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.outputs import refuse_outside_link
from megatron_sov.chat.folder import (
    CONFIG_JSON, TEMPLATE_FILE, TOKENIZER_JSON, read_chat_encoder, read_special_token)
from megatron_sov.chat.vocabulary import read_tokenizer
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.pretrained import CONFIG, read_json

CARRIED_FIELDS = "config_fields"
"""Checkpoint manifest key: config.json fields that do not describe the model."""
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
                   GENERATION_CONFIG)
"""Files to copy; further files, for example code, are not copied."""


def copy_carried_fields(checkpoint: Path) -> dict[str, Any]:
    """Return manifest content with the `CARRIED_FIELDS` of `checkpoint`, for derived checkpoints."""
    fields = read_manifest(checkpoint).content.get(CARRIED_FIELDS)
    return {CARRIED_FIELDS: fields} if fields else {}


def copy_companions(source: Path, target: Path, tokens: TokenIds) -> None:
    """Copy the companion files, and add missing `tokens` to generation_config.json.

    If generation_config.json exists, `generate` of transformers reads token ids from no other file.
    """
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            refuse_outside_link(source, source / name)
            shutil.copyfile(source / name, target / name)
    defaults = read_optional_json(target / GENERATION_CONFIG)
    present = parse_token_ids(defaults)
    missing = {f"{name}_token_id": value for name, value in vars(tokens).items()
               if not set(to_id_list(value)) <= set(to_id_list(getattr(present, name)))}
    if missing:
        write_atomically(target / GENERATION_CONFIG, format_json(defaults | missing))


def move_chat_template(folder: Path) -> None:
    """Move the chat template from tokenizer_config.json to its own file, as transformers 5 does."""
    config_file, template_file = folder / CONFIG_JSON, folder / TEMPLATE_FILE
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    template = config.pop("chat_template", None)
    # a list has several named templates, which transformers reads from tokenizer_config.json
    if not isinstance(template, str):
        return
    if not template_file.exists():
        write_atomically(template_file, template.encode())
    write_atomically(config_file, format_json(config))


def add_turn_ends(folder: Path, tokens: TokenIds) -> TokenIds:
    """Add the ids that end an assistant turn in the chat template of `folder` to `tokens.eos`.

    Inference engines stop at any id of `eos`.
    """
    try:
        chat = read_chat_encoder(folder)
    except UserError as e:
        warn(f"{e}; generation stops at eos alone")
        chat = None
    stop_ids = to_id_list(tokens.eos)
    if chat is not None:
        stop_ids += [id_ for id_ in chat.end_ids() if id_ not in stop_ids]
    return replace(tokens, eos=stop_ids if len(stop_ids) > 1 else next(iter(stop_ids), None))


def read_generation_ids(folder: Path) -> TokenIds:
    """Return token ids for generation_config.json: the ids from `read_token_ids`, and the turn ends. Raises
    `UserError`: see `read_token_ids`."""
    return add_turn_ends(folder, read_token_ids(folder))


def parse_token_ids(config: dict[str, Any]) -> TokenIds:
    """Read the token ids of config.json or generation_config.json; invalid values are ignored."""
    ids_by_name: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        value = config.get(f"{name}_token_id")
        values = value if isinstance(value, list) else [value]
        ids = [id_ for id_ in values if type(id_) is int and id_ >= 0]
        ids_by_name[name] = ids if ids and isinstance(value, list) else next(iter(ids), None)
    return TokenIds(**ids_by_name)


def to_id_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def read_token_ids(folder: Path) -> TokenIds:
    """Read a folder's token ids. The first file with an id wins: generation_config.json, config.json,
    `text_config` in config.json, the tokenizer's special tokens. Raises `UserError`: a file is damaged, or
    `eos_token` is not in the tokenizer."""
    config = read_optional_json(folder / CONFIG)
    text_part = config.get("text_config")
    ids: dict[str, Any] = {}
    defaults = read_optional_json(folder / GENERATION_CONFIG)
    for source in (defaults, config, text_part if isinstance(text_part, dict) else {}):
        ids |= {name: value for name, value in vars(parse_token_ids(source)).items() if ids.get(name) is None}
    missing = [name for name, value in ids.items() if value is None]
    return TokenIds(**ids | _find_special_ids(folder, missing))


def _find_special_ids(folder: Path, names: list[str]) -> dict[str, int]:
    """Return ids for special tokens that tokenizer_config.json names by text."""
    texts = {name: text for name in names if (text := read_special_token(folder, f"{name}_token"))}
    if not texts or not (folder / TOKENIZER_JSON).is_file():
        return {}
    tokenizer = read_tokenizer(folder)
    ids = {text: id_ for id_, text in tokenizer.ordinary.items()}
    ids |= {token["content"]: id_ for id_, token in tokenizer.added.items()}
    if (end := texts.get("eos", "")) and end not in ids:  # generation would never stop
        raise UserError(f"{folder / CONFIG_JSON}: eos_token = {end!r} is not a token of {TOKENIZER_JSON}; "
                        "correct it there")
    return {name: ids[text] for name, text in texts.items() if text in ids}


def describe_split_conflict(folder: Path, split: str | None) -> str | None:
    """Return a warning if tokenizer.json splits text unlike `split`, transformers' choice for the family."""
    tokenizer_file = folder / "tokenizer.json"
    if split is None or not tokenizer_file.is_file() or (
            json.dumps(split) in json.dumps(read_json(tokenizer_file).get("pre_tokenizer"))):
        return None
    return (f"{tokenizer_file} splits text by another regular expression than transformers' AutoTokenizer "
            "uses for this model family, so token ids may differ; "
            "load it with PreTrainedTokenizerFast.from_pretrained")


def read_optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
