"""Encode documents to token ids, and mark the tokens that training learns."""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_prep.shards.foreign_tokenizer import explain_foreign_tokenizer, fix_foreign_tokenizer
from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.base.documents import BadRecord, Conversation, Document
from megatron_sov.base.documents.byte_bpe import (
    NotByteBpe, build_ranks, iter_adversarial_texts, parse_split_pattern)
from megatron_sov.base.documents.records import count_text_bytes
from megatron_sov.base.documents.shard_files import NO_FEATURE
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import ChatEncoder
from megatron_sov.chat.folder import CONFIG_JSON, TOKENIZER_JSON
from megatron_sov.chat.marks import KIND_ANSWER, KIND_NONE
from megatron_sov.chat.segments import find_odd_opening
from megatron_sov.chat.template import ChatTemplate
from megatron_sov.model.modality import FeatureTokens, MediaEncoding, load_modality

LONGEST_WHITESPACE_CHARS = 10_000
"""Longer runs overflow the stack in tiktoken's regular expression, so `tokenizers` encodes such text."""
_LONG_WHITESPACE = re.compile(rf"\s{{{LONGEST_WHITESPACE_CHARS}}}")


@dataclass(frozen=True)
class EncodingSettings:
    """Settings that determine ids, in addition to the tokenizer."""

    bos: str = "none"
    """"start": documents begin with the tokenizer's bos; or "none"."""
    eod: str = "append"
    """"append": documents except prompts end with the tokenizer's eos; or "none"."""
    fast: bool = False
    """Encode with tiktoken, after `prove_fast`."""
    media: MediaEncoding | None = None
    """Slots per bank for documents with media tokens; None: text only."""


@dataclass(frozen=True)
class EncodedBatch:
    """Token sequences as flat columns; a preference has two sequences, chosen and rejected."""

    lengths_tokens: NDArray[np.int32]
    """int32 [sequences]."""
    ids: NDArray[np.int32]
    """int32 [sum of lengths]."""
    kinds: NDArray[np.uint8]
    """uint8 [sum of lengths], marks from `chat.marks`; empty for plain text."""
    media: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [sum of lengths], `FEATURES` sidecar; empty without media."""


class Encoder:
    """Encodes documents with a tokenizer artifact; special tokens spelled in documents stay ordinary text."""

    def __init__(self, folder: Path, settings: EncodingSettings | None = None) -> None:
        """Load an artifact of kind "tokenizer". Raises `UserError`: the folder is missing, foreign or
        damaged, or the tokenizer lacks a token for `settings`."""
        if problem := explain_foreign_tokenizer(folder):
            raise UserError(f"--tokenizer {folder}: {problem}", fix_foreign_tokenizer(folder))
        manifest = read_manifest(folder, "tokenizer")
        # every id depends on the tokenizer files, so check hashes first
        if problems := find_damaged_files(folder):
            raise UserError(f"{problems[0]}; train the tokenizer again or restore it from a copy")
        self.settings = settings or EncodingSettings()
        self.vocab_size: int = manifest.content["vocab_size"]
        self.eos_id: int = manifest.content["eos_id"]
        self.file = folder / TOKENIZER_JSON
        try:
            # two instances: templates write special tokens, documents only spell their text
            self._with_special = Tokenizer.from_file(str(self.file))
            self.plain = Tokenizer.from_file(str(self.file))
            config = json.loads((folder / CONFIG_JSON).read_text(encoding="utf-8"))
        except Exception as e:  # the binding raises a bare Exception
            raise UserError(f"{folder}: its tokenizer cannot be read ({e}); "
                            "make it again or restore it from a copy") from None
        self.plain.encode_special_tokens = True
        template, bos, eos = (config.get(key) or "" for key in ("chat_template", "bos_token", "eos_token"))
        chat_template = ChatTemplate(template, bos, eos, str(folder))
        self.bos_id: int | None = None
        if self.settings.bos == "start":
            self.bos_id = self._with_special.token_to_id(bos)
            if self.bos_id is None:
                raise UserError(f"--bos start: the tokenizer {folder} has no bos_token; use --bos none")
        self._fast = FastBpe(self.file, self.plain) if self.settings.fast else None
        self.odd_opening = partial(find_odd_opening, chat_template)
        encoding = self.settings.media
        self.feature_tokens = (load_modality().feature_tokens(self._with_special, encoding)
                               if encoding is not None else None)
        """Media tokens that documents may spell; None: media tokens stay text."""
        self._chat = ChatEncoder(chat_template, self._with_special, self._fast.encode if self._fast else None,
                                 self.feature_tokens)

    def prove_fast(self, samples: list[str]) -> tuple[bool, str]:
        """Return whether tiktoken gives equal ids on `samples` and adversarial text, and a log sentence."""
        fast, sentence = load_fast_encoder(self.file, self.plain, samples)
        return fast is not None, sentence

    def encode_batch(self, documents: list[Document]) -> EncodedBatch:
        """Encode documents of one kind. Raises `BadRecord`: the chat template rejects a document (encode
        documents singly to find the culprit)."""
        tokens = self.feature_tokens
        if documents[0].kind == "text":
            if tokens is not None:
                sequences = [self._encode_text_with_media(d.text, tokens) for d in documents]
            else:
                sequences = self._encode_texts([d.text for d in documents])
            kinds = np.zeros(0, np.uint8)
        else:
            pairs = [pair for d in documents for pair in self._encode_conversations(d)]
            sequences = [ids for ids, _ in pairs]
            kinds = np.frombuffer(b"".join(kinds for _, kinds in pairs), np.uint8)
        lengths = np.array([len(ids) for ids in sequences], np.int32)
        ids = _concatenate(sequences, int(lengths.sum()))
        if tokens is None:
            return EncodedBatch(lengths, ids, kinds)
        media = _number_features(tokens, sequences, documents)
        if len(kinds):
            # feature placeholders are input only
            kinds = np.where(media == NO_FEATURE, kinds, KIND_NONE).astype(np.uint8)
        return EncodedBatch(lengths, ids, kinds, media)

    def _encode_text_with_media(self, text: str, tokens: FeatureTokens) -> list[int]:
        ids: list[int] = []
        for part, id_ in tokens.split(text):
            if id_ is not None:
                ids.append(id_)
            elif self._fast is not None:
                ids += self._fast.encode(part)
            else:
                ids += self.plain.encode(part, add_special_tokens=False).ids
        return self._add_ends(ids)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if self._fast is not None:
            sequences = [self._fast.encode(text) for text in texts]
        else:
            sequences = [e.ids for e in self.plain.encode_batch_fast(texts, add_special_tokens=False)]
        return [self._add_ends(ids) for ids in sequences]

    def _add_ends(self, ids: list[int]) -> list[int]:
        if self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if self.settings.eod == "append":
            ids.append(self.eos_id)
        return ids

    def _encode_conversations(self, document: Document) -> list[tuple[list[int], bytes]]:
        num_messages = len(document.messages)
        if document.kind == "prompt":
            return [self._encode_conversation(document.conversation(), num_messages, awaits_response=True)]
        if document.kind == "preference":
            return [self._encode_conversation(document.conversation(*side), num_messages)
                    for side in (document.chosen, document.rejected)]
        if not any(m.role == "assistant" and m.is_learned for m in document.messages):
            raise BadRecord("nothing_learned", "is a chat of which nothing is learned: it has no turn of the "
                                               "assistant, or all are marked \"train\": false")
        return [self._encode_conversation(document.conversation(), 0)]

    def _encode_conversation(self, conversation: Conversation, num_prompt: int,
                             awaits_response: bool = False) -> tuple[list[int], bytes]:
        """Return ids and marks; the first `num_prompt` messages form the prompt, regardless of role.

        Append eos to a chat unless the template ends with eos. The appended eos is learned if the last
        response is still open.
        """
        chat = self._chat.encode(conversation, num_prompt, awaits_response)
        ids, kinds = chat.ids, chat.kinds
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
            kinds.insert(0, KIND_NONE)
        if not awaits_response and self.settings.eod == "append" and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
            kinds.append((kinds[-1] or KIND_ANSWER) if chat.is_open else KIND_NONE)
        return ids, bytes(kinds)

    def decode(self, ids: list[int]) -> str:
        return self._with_special.decode(ids, skip_special_tokens=False)

    def decode_batch(self, sequences: list[list[int]]) -> list[str]:
        texts: list[str] = self._with_special.decode_batch(sequences, skip_special_tokens=False)
        return texts


class FastBpe:
    """Byte-level BPE in tiktoken, several times faster than `tokenizers`.

    tiktoken merges by the result's rank, `tokenizers` by a list of merges, and their regular expressions and
    Unicode tables differ. Therefore `load_fast_encoder` compares ids before use.
    """

    def __init__(self, file: Path, tokenizer: Tokenizer) -> None:
        """Convert `file`; `tokenizer` is the same file, opened with special tokens as ordinary text. Raises
        `NotByteBpe`: tiktoken cannot express the tokenizer."""
        raw = json.loads(file.read_text(encoding="utf-8"))
        self._tokenizer = tokenizer
        normalizer = (raw.get("normalizer") or {}).get("type")
        # `encode` relies on ASCII text being unchanged by the normalizer
        if normalizer not in (None, "NFC", "NFKC", "NFD", "NFKD"):
            raise NotByteBpe(f"its normalizer is {normalizer}")
        self._normalizer = tokenizer.normalizer
        # tiktoken would split the token as text
        if plain := [t["content"] for t in raw["added_tokens"] if not t["special"]]:
            raise NotByteBpe(f"its added token {plain[0]!r} is matched in ordinary text")
        self._encoding = tiktoken.Encoding(str(file), pat_str=parse_split_pattern(raw),
                                           mergeable_ranks=build_ranks(raw), special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text to the same ids as `tokenizers`."""
        if _LONG_WHITESPACE.search(text):
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._normalizer is not None and not text.isascii():
            text = self._normalizer.normalize_str(text)
        return self._encoding.encode_ordinary(text)

    def find_difference(self, texts: list[str]) -> str | None:
        """Return the first text (shortened) with other ids than `tokenizers`, or None."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            if self.encode(text) != encoding.ids:
                return repr(text[:80])
        return None


def load_fast_encoder(file: Path, tokenizer: Tokenizer, samples: list[str]) -> tuple[FastBpe | None, str]:
    """Return `FastBpe` if its ids are equal on `samples` and adversarial text, and a sentence for the log."""
    try:
        fast = FastBpe(file, tokenizer)
    except NotByteBpe as e:
        return None, f"encoding with tokenizers, because {e}"
    except ValueError as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e}); make it again or restore "
                        "it from a copy") from None
    # samples reveal differences in real text, adversarial texts rare differences
    texts = [*samples, *iter_adversarial_texts(json.loads(file.read_text(encoding="utf-8")))]
    if difference := fast.find_difference([*texts, *(unicodedata.normalize("NFD", t) for t in samples)]):
        return None, f"encoding with tokenizers, because tiktoken differs on {difference}"
    num_bytes = sum(map(count_text_bytes, texts))
    return (fast, f"encoding with tiktoken: the same ids as tokenizers on {num_bytes / 1e6:.1f} MB, "
                  "a sample of the input among it")


def _number_features(tokens: FeatureTokens, sequences: Sequence[list[int]],
                     documents: Sequence[Document]) -> NDArray[np.int64]:
    """Return the `FEATURES` sidecar: int64 [sum of lengths]."""
    for ids, document in zip(sequences, documents, strict=True):
        tokens.refuse_lost(ids, document.texts())
    return np.concatenate([tokens.numbers(ids, document.media or {})
                           for ids, document in zip(sequences, documents, strict=True)])


def _concatenate(sequences: Sequence[list[int]], num_tokens: int) -> NDArray[np.int32]:
    flat = np.empty(num_tokens, np.int32)
    start = 0
    for ids in sequences:
        flat[start : start + len(ids)] = ids
        start += len(ids)
    return flat
