"""From documents to token ids, and what each of them is learned as."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_sov.base.artifacts import MANIFEST, find_damaged_files, read_manifest
from megatron_sov.base.documents import BadRecord, Conversation, Document
from megatron_sov.base.documents.byte_bpe import (
    NotByteBpe, build_ranks, iter_adversarial_texts, parse_split_pattern)
from megatron_sov.base.documents.shard_files import NO_FEATURE
from megatron_sov.base.errors import Fix, UserError, fix_missing, suggest_download
from megatron_sov.chat.encode import ChatEncoder
from megatron_sov.chat.marks import KIND_ANSWER, KIND_NONE
from megatron_sov.chat.segments import find_odd_opening
from megatron_sov.chat.template import ChatTemplate
from megatron_sov.model.modality import FeatureTokens, MediaEncoding, load_modality

LONGEST_WHITESPACE_CHARS = 10_000
"""tiktoken's regular expression overflows its stack on a far longer run;
such text is left to `tokenizers`."""
_LONG_WHITESPACE = re.compile(rf"\s{{{LONGEST_WHITESPACE_CHARS}}}")
TOKENIZER_JSON, CONFIG_JSON = "tokenizer.json", "tokenizer_config.json"
SUFFIXES = (".json", ".tiktoken", ".model")
FOREIGN = (TOKENIZER_JSON, "*.tiktoken", "*.model")
"""What tokenizers of others consist of, which `sov-tokenizer import` reads."""


# Byte-level BPE by tiktoken, several times faster than `tokenizers`, and the proof that it gives the same
# ids. tiktoken merges by the rank of the result, `tokenizers` by the list of merges; their regular
# expressions and Unicode tables are different ones too. So nothing is taken on trust: the fast encoder is
# used only where the tokenizer has the form that it can express and a self-check on the very input, on
# every token of the vocabulary and on adversarial text finds no difference.


class FastBpe:
    """A tokenizer.json in tiktoken's form."""

    def __init__(self, file: Path, tokenizer: Tokenizer) -> None:
        """Build it; `tokenizer` is the same file, opened with special tokens as ordinary text.

        Raises:
            NotByteBpe: the tokenizer uses something that tiktoken has no form for.
        """
        raw = json.loads(file.read_text(encoding="utf-8"))
        self._tokenizer = tokenizer
        self._normalizer = _normalizer(raw, tokenizer)
        # tiktoken would split such a token as text.
        if plain := [t["content"] for t in raw["added_tokens"] if not t["special"]]:
            raise NotByteBpe(f"its added token {plain[0]!r} is matched in ordinary text")
        self._encoding = tiktoken.Encoding(str(file), pat_str=parse_split_pattern(raw),
                                           mergeable_ranks=build_ranks(raw), special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text, as `tokenizers` gives them."""
        if _LONG_WHITESPACE.search(text):
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        # ASCII is its own normal form, and most text is ASCII or already composed.
        if self._normalizer is not None and not text.isascii():
            text = self._normalizer.normalize_str(text)
        return self._encoding.encode_ordinary(text)

    def difference(self, texts: list[str]) -> str | None:
        """Return the first text, shortened, whose ids are not those of `tokenizers`; None where all are."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return next((repr(text[:80]) for text, e in zip(texts, encodings, strict=True)
                     if self.encode(text) != e.ids), None)


def _normalizer(raw: dict[str, Any], tokenizer: Tokenizer) -> Any:
    """Return the tokenizer's own normalizer, which must leave ASCII as it is."""
    kind = (raw.get("normalizer") or {}).get("type")
    if kind not in (None, "NFC", "NFKC", "NFD", "NFKD"):
        raise NotByteBpe(f"its normalizer is {kind}")
    return tokenizer.normalizer


def load_fast_encoder(file: Path, tokenizer: Tokenizer, samples: list[str]) -> tuple[FastBpe | None, str]:
    """Return the fast encoder where it is proven equal on `samples` and adversarial text,
    and a sentence about it."""
    try:
        fast = FastBpe(file, tokenizer)
    except NotByteBpe as e:
        return None, f"encoding with tokenizers, because {e}"
    except ValueError as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e}); make it again or restore "
                        "it from a copy") from None
    # Real text finds differences that occur, adversarial text those that are rare.
    texts = [*samples, *iter_adversarial_texts(json.loads(file.read_text(encoding="utf-8")))]
    if difference := fast.difference([*texts, *(unicodedata.normalize("NFD", t) for t in samples)]):
        return None, f"encoding with tokenizers, because tiktoken differs on {difference}"
    num_bytes = sum(len(t.encode()) for t in texts)
    return (fast, f"encoding with tiktoken: the same ids as tokenizers on {num_bytes / 1e6:.1f} MB, "
                  "a sample of the input among it")


@dataclass(frozen=True)
class EncodingSettings:
    """What ids depend on besides the tokenizer."""

    bos: str = "none"
    """"start": every document begins with the tokenizer's bos; "none"."""
    eod: str = "append"
    """"append": every document ends with the tokenizer's eos; "none".  Prompts never do:
    their response follows."""
    fast: bool = False
    """Whether tiktoken encodes, proven equal beforehand."""
    media: MediaEncoding | None = None
    """Of documents with tokens of media; None: they have none."""


@dataclass(frozen=True)
class EncodedBatch:
    """Sequences of tokens as flat columns; a preference is two of them, chosen and rejected."""

    lengths_tokens: NDArray[np.int32]
    """Tokens of each sequence, [sequences]."""
    ids: NDArray[np.int32]
    """[sum of lengths]."""
    kinds: NDArray[np.uint8]
    """What each is learned as (`chat.marks`), [sum of lengths]; empty for plain text."""
    media: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """What the sidecar of banks says of each, [sum of lengths]; empty where there are no media."""


class Encoder:
    """A tokenizer artifact ready to encode; special tokens that are spelled out in documents
    stay ordinary text."""

    def __init__(self, folder: Path, settings: EncodingSettings | None = None) -> None:
        """Load the tokenizer of an artifact of kind "tokenizer".

        Raises:
            UserError: there is none, its files are damaged, or it has no token that the settings ask for.
        """
        if problem := explain_foreign(folder):
            raise UserError(f"--tokenizer {folder}: {problem}", fix_foreign(folder))
        manifest = read_manifest(folder, "tokenizer")
        # Every id depends on these files: they are hashed before the first use.
        if problems := find_damaged_files(folder):
            raise UserError(f"{problems[0]}; train the tokenizer again or restore it from a copy")
        self.settings = settings or EncodingSettings()
        self.vocab_size: int = manifest.content["vocab_size"]
        self.eos_id: int = manifest.content["eos_id"]
        self.file = folder / TOKENIZER_JSON
        try:
            # Two of them: templates write special tokens as such, documents may only spell them.
            self._with_special = Tokenizer.from_file(str(self.file))
            self.plain = Tokenizer.from_file(str(self.file))
            config = json.loads((folder / CONFIG_JSON).read_text(encoding="utf-8"))
        except Exception as e:  # the binding raises a bare Exception
            raise UserError(f"{folder}: its tokenizer cannot be read ({e}); "
                            "make it again or restore it from a copy") from None
        self.plain.encode_special_tokens = True
        template, bos, eos = (config.get(key) or "" for key in ("chat_template", "bos_token", "eos_token"))
        chat_template = ChatTemplate(template, bos, eos, str(folder))
        self.bos_id: int | None = (self._with_special.token_to_id(bos)
                                   if self.settings.bos == "start" else None)
        if self.settings.bos == "start" and self.bos_id is None:
            raise UserError(f"--bos start: the tokenizer {folder} has no bos_token; use --bos none")
        self._fast = FastBpe(self.file, self.plain) if self.settings.fast else None
        self.odd_opening = partial(find_odd_opening, chat_template)
        encoding = self.settings.media
        self.feature_tokens = (load_modality().feature_tokens(self._with_special, encoding)
                               if encoding is not None else None)
        """Of pictures and sounds, which documents may spell; None: they are text."""
        self._chat = ChatEncoder(chat_template, self._with_special, self._fast.encode if self._fast else None,
                                 self.feature_tokens)

    def prove_fast(self, samples: list[str]) -> tuple[bool, str]:
        """Return whether tiktoken gives the ids of this tokenizer on `samples` and adversarial text, and a
        sentence about it."""
        fast, sentence = load_fast_encoder(self.file, self.plain, samples)
        return fast is not None, sentence

    def encode_batch(self, documents: list[Document]) -> EncodedBatch:
        """Return documents of one kind, encoded, in order.

        Raises:
            BadRecord: the chat template refuses a document (encode them one by one to know which).
        """
        if documents[0].kind == "text":
            if self.feature_tokens is not None:
                return self._spelling_texts(documents, self.feature_tokens)
            sequences = self._texts([d.text for d in documents])
            lengths = np.array([len(s) for s in sequences], dtype=np.int32)
            return EncodedBatch(lengths, _flat(sequences, int(lengths.sum())), np.zeros(0, np.uint8))
        pairs = [pair for d in documents for pair in self._conversations(d)]
        lengths = np.array([len(ids) for ids, _ in pairs], dtype=np.int32)
        num_tokens = int(lengths.sum())
        kinds = np.frombuffer(b"".join(kinds for _, kinds in pairs), np.uint8)
        flat = _flat([ids for ids, _ in pairs], num_tokens)
        if self.feature_tokens is None:
            return EncodedBatch(lengths, flat, kinds)
        media = _features(self.feature_tokens, [ids for ids, _ in pairs], documents)
        # what stands for a feature is never said
        kinds = np.where(media == NO_FEATURE, kinds, KIND_NONE).astype(np.uint8)
        return EncodedBatch(lengths, flat, kinds, media)

    def _spelling_texts(self, documents: list[Document], tokens: FeatureTokens) -> EncodedBatch:
        """Return texts among whose tokens are those that they spell."""
        sequences = []
        for document in documents:
            ids = [] if self.bos_id is None else [self.bos_id]
            for text, id_ in tokens.split(document.text):
                if id_ is not None:
                    ids.append(id_)
                elif self._fast:
                    ids += self._fast.encode(text)
                else:
                    ids += self.plain.encode(text, add_special_tokens=False).ids
            sequences.append(ids + ([self.eos_id] if self.settings.eod == "append" else []))
        lengths = np.array([len(s) for s in sequences], np.int32)
        return EncodedBatch(lengths, _flat(sequences, int(lengths.sum())), np.zeros(0, np.uint8),
                            _features(tokens, sequences, documents))

    def _texts(self, texts: list[str]) -> list[list[int]]:
        if self._fast is not None:
            sequences = [self._fast.encode(text) for text in texts]
        else:
            sequences = [e.ids for e in self.plain.encode_batch_fast(texts, add_special_tokens=False)]
        for ids in sequences:
            if self.bos_id is not None:
                ids.insert(0, self.bos_id)
            if self.settings.eod == "append":
                ids.append(self.eos_id)
        return sequences

    def _conversations(self, document: Document) -> list[tuple[list[int], bytes]]:
        if document.kind == "prompt":
            return [self._conversation(document.conversation(), len(document.messages), awaits_response=True)]
        if document.kind == "preference":
            return [self._conversation(document.conversation(*side), len(document.messages))
                    for side in (document.chosen, document.rejected)]
        if not any(m.role == "assistant" and m.is_learned for m in document.messages):
            raise BadRecord("nothing_learned", "is a chat of which nothing is learned: it has no turn of the "
                                               "assistant, or all are marked \"train\": false")
        return [self._conversation(document.conversation(), 0)]

    def _conversation(self, conversation: Conversation, num_prompt: int,
                      awaits_response: bool = False) -> tuple[list[int], bytes]:
        """Return ids and kinds; the first `num_prompt` messages are the prompt, whoever speaks.

        EOS ends the chat, and is learned where nothing else ends its last response; where the
        template's last token is EOS already, none is added.
        """
        chat = self._chat.encode(conversation, num_prompt, awaits_response)
        ids, kinds = chat.ids, chat.kinds
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
            kinds.insert(0, KIND_NONE)
        if not awaits_response and self.settings.eod == "append" and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
            # An open response ends with EOS and learns to; after a closed one EOS says nothing.
            kinds.append((kinds[-1] or KIND_ANSWER) if chat.is_open else KIND_NONE)
        return ids, bytes(kinds)

    def decode(self, ids: list[int]) -> str:
        return self._with_special.decode(ids, skip_special_tokens=False)

    def decode_batch(self, sequences: list[list[int]]) -> list[str]:
        found: list[str] = self._with_special.decode_batch(sequences, skip_special_tokens=False)
        return found


def fix_foreign(path: Path) -> Fix | None:
    """Return the fix for a tokenizer that is not imported yet, or not downloaded."""
    fix = None if path.exists() else fix_missing(path, is_bare=True)
    if (fix is None and not path.exists()) or (fix is not None and not fix.before):
        return fix
    name = path.stem if path.is_file() else path.resolve().name
    output = f"{name}-tokenizer"
    source = path if path.exists() else path.name
    words = ["sov-tokenizer", "import", str(source), "--output", output]
    return Fix(words={str(path): output}, before=(*(fix.before if fix else ()), shlex.join(words)))


def explain_foreign(path: Path) -> str:
    """Return why a tokenizer that is no artifact cannot be used yet, with the command to type; "": it is one,
    or the path holds no tokenizer at all.

    `sov-tokenizer import` proves once that the tokenizer gives the same ids here.
    """
    if (path / MANIFEST).is_file() and read_manifest(path).kind == "tokenizer":
        return ""
    if suggest_download(path, is_bare=True) and not path.exists():
        name = shlex.quote(path.name)
        return (f"does not exist; check the path. If it is a model's name on the Hugging Face hub: "
                f"`hf download {path} --local-dir {name}`, then `sov-tokenizer import {name} --output "
                f"{name}-tokenizer`, and pass --tokenizer {name}-tokenizer")
    holds = (place for place in (path, path / "tokenizer") if any(
        True for pattern in FOREIGN for _ in place.glob(pattern)))
    foreign = path if path.is_file() and path.suffix in SUFFIXES else next(holds, None)
    if foreign is None:
        return ""
    output = shlex.quote(f"{path.stem if path.is_file() else path.resolve().name}-tokenizer")
    return ("holds a tokenizer that is not imported yet; run `sov-tokenizer "
            f"import {shlex.quote(str(foreign))} --output {output}`, and pass --tokenizer {output}")


def _features(tokens: FeatureTokens, sequences: list[list[int]],
              documents: list[Document]) -> NDArray[np.int64]:
    """Return what the sidecar says of each token."""
    for ids, document in zip(sequences, documents, strict=True):
        tokens.refuse_lost(ids, document.texts())
    return np.concatenate([tokens.numbers(ids, document.media or {})
                           for ids, document in zip(sequences, documents, strict=True)])


def _flat(sequences: list[list[int]], num_tokens: int) -> NDArray[np.int32]:
    flat = np.empty(num_tokens, np.int32)
    start = 0
    for ids in sequences:
        flat[start : start + len(ids)] = ids
        start += len(ids)
    return flat
