"""The chat form of a folder with a tokenizer: a Hugging Face folder, a checkpoint's `tokenizer/`,
or a tokenizer artifact."""

from __future__ import annotations

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
"""Where older folders keep bos and eos."""


def open_tokenizer(folder: Path) -> Tokenizer:
    """Return what encodes and decodes by a folder's tokenizer.json.

    Raises:
        UserError: it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{folder / TOKENIZER_JSON}: cannot be read as a tokenizer ({e}); restore it from "
                        "its source") from None


def read_chat_encoder(folder: Path, inline: InlineTokens | None = None) -> ChatEncoder | None:
    """Return the encoder of a folder's chats; None where it has no chat template or no tokenizer.json.

    Args:
        folder: of a tokenizer or a model.
        inline: special tokens that contents may spell and then mean; None: none.

    Raises:
        UserError: a file cannot be read, or the template is no Jinja.
    """
    from tokenizers import Tokenizer

    from megatron_sov.chat.template import ChatTemplate

    tokenizer_file = folder / TOKENIZER_JSON
    if not tokenizer_file.is_file():
        return None
    config = _read_config(folder)
    try:
        template = _read_template(folder, config)
        if not template:
            return None
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{folder}: its tokenizer cannot be read ({e}); restore it from its source") from None
    # a missing token is an empty text: templates add it to strings
    bos, eos = (_token_text(config.get(name)) for name in ("bos_token", "eos_token"))
    return ChatEncoder(ChatTemplate(template, bos, eos, str(folder), datetime.now()), tokenizer,
                       inline=inline)


def read_chat_fields(folder: Path) -> dict[str, Any]:
    """Return what the files beside a tokenizer.json say of its chats, each under its file and field; "": it
    is not said.

    Raises:
        UserError: a file cannot be read.
    """
    config = _read_config(folder)
    return {**{f"{CONFIG_JSON}: {name}": _token_text(config.get(name)) for name in ("bos_token", "eos_token")},
            f"{TEMPLATE_FILE} (or chat_template in {CONFIG_JSON})": read_chat_template(folder)}


def read_special_token(folder: Path, name: str) -> str:
    """Return the text of a special token ("eos_token") by the files beside a tokenizer.json; "": none."""
    text = _token_text(_read_config(folder).get(name))
    return text if isinstance(text, str) else ""


def read_chat_template(folder: Path) -> str:
    """Return the default chat template of a folder; "": it has none.

    Raises:
        UserError: a file cannot be read.
    """
    return _read_template(folder, _read_config(folder)) or ""


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    try:
        for file in (folder / SPECIAL_JSON, folder / CONFIG_JSON):  # what the second one says counts
            config |= json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{folder}: its tokenizer cannot be read ({e}); restore it from its source") from None
    return config


def _read_template(folder: Path, config: dict[str, Any]) -> Any:
    return ((folder / TEMPLATE_FILE).read_text(encoding="utf-8") if (folder / TEMPLATE_FILE).is_file()
            else _select_default_template(config.get("chat_template")))


def _select_default_template(template: Any) -> Any:
    """Return the template called default where there are several, as a list of names and templates."""
    if isinstance(template, list):
        # transformers keeps several templates as a list of names and templates
        return next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template


def _token_text(token: Any) -> str:
    """Return a special token's text, which may be spelled as an object."""
    return (token.get("content") if isinstance(token, dict) else token) or ""
