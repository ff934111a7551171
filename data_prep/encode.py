"""From documents to token ids, with loss weights and types for chats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_prep.chat import ChatForm
from data_prep.splits import HeldoutRule, document_hash
from megatron_sov.artifacts import damaged_files, read_manifest
from megatron_sov.documents import Document
from megatron_sov.errors import UserError

TYPE_TEXT, TYPE_PROMPT, TYPE_RESPONSE = 0, 1, 2
"""What a token is: plain text, part of a prompt (template, system, user, tools), or of a response to learn."""


@dataclass(frozen=True)
class EncodedBatch:
    """Documents of one split as flat columns."""

    lengths_tokens: NDArray[np.int32]
    """Tokens of each document, [documents]."""
    columns: dict[str, NDArray[np.generic]]
    """Suffix of the file -> values, [sum of lengths]: "bin", and for chats "loss" and "type"."""
    num_bytes: int
    """UTF-8 bytes of the documents' text."""


class Encoder:
    """A tokenizer artifact ready to encode; special tokens that are spelled out in documents stay ordinary text."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer of an artifact of kind "tokenizer".

        Raises:
            UserError: there is none, or its files are damaged.
        """
        manifest = read_manifest(folder, "tokenizer")
        if problems := damaged_files(folder):
            raise UserError(f"{problems[0]}; train the tokenizer again or restore it from a copy")
        self.vocab_size: int = manifest.content["vocab_size"]
        self.eos_id: int = manifest.content["eos_id"]
        try:
            self._with_special = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as e:  # the binding raises a bare Exception
            raise UserError(f"{folder}: its tokenizer cannot be read ({e}); make it again or restore it from a copy") from None
        self._plain.encode_special_tokens = True
        self._special = {id_ for id_, token in self._with_special.get_added_tokens_decoder().items() if token.special}
        template, bos, eos = (config.get(key) or "" for key in ("chat_template", "bos_token", "eos_token"))
        self._chat_form = ChatForm(template, bos, eos, str(folder))

    def encode_text(self, documents: list[Document]) -> list[NDArray[np.int32]]:
        """Return each document's ids, EOS appended."""
        encodings = self._plain.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
        return [np.array([*e.ids, self.eos_id], dtype=np.int32) for e in encodings]

    def encode_chat(self, document: Document) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Return a chat's ids and types; responses are an assistant's content and the special token that ends it.

        EOS ends the chat; where the template's last token is EOS already, none is added.
        """
        ids: list[int] = []
        types: list[int] = []
        responded = False
        for piece in self._chat_form.pieces(document.messages, document.where):
            tokenizer = self._with_special if piece.message is None else self._plain
            new = tokenizer.encode(piece.text, add_special_tokens=False).ids
            response = piece.message is not None and document.messages[piece.message][0] == "assistant"
            new_types = [TYPE_RESPONSE if response else TYPE_PROMPT] * len(new)
            if responded and piece.message is None and new[0] in self._special:
                new_types[0] = TYPE_RESPONSE
            ids += new
            types += new_types
            responded = response
        if not ids or ids[-1] != self.eos_id:
            ids.append(self.eos_id)
            types.append(TYPE_PROMPT)
        return np.array(ids, dtype=np.int32), np.array(types, dtype=np.uint8)

    def encode_batch(self, documents: list[Document], rule: HeldoutRule) -> dict[str, EncodedBatch]:
        """Return documents of one format, encoded and divided by split; splits without any are left out."""
        chat = bool(documents[0].messages)
        if chat:
            ids, types = zip(*(self.encode_chat(d) for d in documents), strict=True)
        else:
            ids, types = tuple(self.encode_text(documents)), ()
        members: dict[str, list[int]] = {}
        for i, document in enumerate(documents):
            members.setdefault(rule.split_of(document_hash(document)), []).append(i)
        result = {}
        for split, chosen in members.items():
            columns: dict[str, NDArray[np.generic]] = {"bin": np.concatenate([ids[i] for i in chosen])}
            if chat:
                columns["type"] = np.concatenate([types[i] for i in chosen])
                columns["loss"] = (columns["type"] == TYPE_RESPONSE).astype(np.float32)
            lengths = np.array([len(ids[i]) for i in chosen], dtype=np.int32)
            num_bytes = sum(len(text.encode()) for i in chosen for text in documents[i].texts())
            result[split] = EncodedBatch(lengths, columns, num_bytes)
        return result
