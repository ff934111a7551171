"""Read tokenizer and chat template from a Hugging Face folder, a checkpoint or a tokenizer artifact."""

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import ChatEncoder, InlineTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_JSON, CONFIG_JSON, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL_JSON = "special_tokens_map.json"
"""File for bos and eos tokens in older folders."""


def open_tokenizer(folder: Path) -> "Tokenizer":
    """Load a folder's `tokenizer.json`. Raises `UserError`: the file is unreadable."""
    from tokenizers import Tokenizer  # the commands that import this module seldom open a tokenizer

    try:
        return Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{folder / TOKENIZER_JSON}: cannot be read as a tokenizer ({e}); restore it from "
                        "its source") from None


def read_chat_encoder(folder: Path, inline: InlineTokens | None = None) -> ChatEncoder | None:
    """Load the chat encoder of a folder; None without chat template or `tokenizer.json`.

    Args:
        folder: tokenizer or model folder.
        inline: special tokens that message contents may contain; None: no such tokens.

    Raises:
        UserError: a file is unreadable, or the template is invalid Jinja.
    """
    from megatron_sov.chat.template import ChatTemplate  # not at the top: Jinja is slow to import

    if not (folder / TOKENIZER_JSON).is_file():
        return None
    config = _read_config(folder)
    template = _read_template(folder, config)
    if not template:
        return None
    tokenizer = open_tokenizer(folder)
    # a missing token becomes "", because templates concatenate it with strings
    bos, eos = (_token_text(config.get(name)) for name in ("bos_token", "eos_token"))
    return ChatEncoder(ChatTemplate(template, bos, eos, str(folder), datetime.now()), tokenizer,
                       inline=inline)


def read_chat_fields(folder: Path) -> dict[str, Any]:
    """Return "file: field" -> value for bos token, eos token and chat template; "" if missing.
    Raises `UserError`: a file is unreadable."""
    config = _read_config(folder)
    return {**{f"{CONFIG_JSON}: {name}": _token_text(config.get(name))
               for name in ("bos_token", "eos_token")},
            f"{TEMPLATE_FILE} (or chat_template in {CONFIG_JSON})": read_chat_template(folder)}


def read_special_token(folder: Path, name: str) -> str:
    """Return the text of special token `name` ("eos_token") from `tokenizer_config.json`, or ""."""
    text = _token_text(_read_config(folder).get(name))
    return text if isinstance(text, str) else ""


def read_chat_template(folder: Path) -> str:
    """Return a folder's default chat template, or "". Raises `UserError`: a file is unreadable."""
    return _read_template(folder, _read_config(folder)) or ""


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    try:
        for file in (folder / SPECIAL_JSON, folder / CONFIG_JSON):  # the second takes precedence
            config |= json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{folder}: its tokenizer cannot be read ({e}); restore it from its source") from None
    return config


def _read_template(folder: Path, config: dict[str, Any]) -> Any:
    try:
        if (folder / TEMPLATE_FILE).is_file():
            return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        return _select_default_template(config.get("chat_template"))
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{folder}: its tokenizer cannot be read ({e}); restore it from its source") from None


def _select_default_template(template: Any) -> Any:
    """Return the template named default from a list of named templates, or the template itself."""
    if isinstance(template, list):
        return next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template


def _token_text(token: Any) -> str:
    """Return the text of a special token, written as a string or as {"content": text}; "" for None."""
    return (token.get("content") if isinstance(token, dict) else token) or ""
