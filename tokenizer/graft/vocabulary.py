"""Surgery on a tokenizer.json: tokens are added as merges or as whole words, or take the place of others;
old ids never move.  Rows of the model for it.

Merges go behind all others, so every text is first cut as before, and only then do new tokens join what lies
between: text in which no new token occurs keeps its ids.  A token of another tokenizer is added where the
tokens of which the old merges make its text are two, which become one by a new merge; tokens learned in
order, short ones first, mostly are by the time it is their turn.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.base.digests import Digest
from megatron_sov.base.documents.byte_bpe import byte_characters, merges
from megatron_sov.base.errors import UserError, nearest
from tokenizer.bpe.segmenting import merged
from tokenizer.formats.hf_files import special_token
from tokenizer.formats.reader import ids_of, opened
from tokenizer.formats.sentencepiece_format import NEVER, SPACE, byte_piece

if TYPE_CHECKING:
    import torch

TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "lm_head.weight",
          "lm_head.bias", "embed_out.weight", "shared_head.head.weight")
"""Ends of the names of tensors with one row per id."""
FLOATS = ("F64", "F32", "BF16", "F16")
BLOCK_BYTES = 16 << 20
BLOCK_ROWS = 4096


@dataclass(frozen=True)
class RowPlan:
    """What becomes of the rows of embedding and output head.

    A new row is the mean of the rows of which its text was made before (sub-token mean); where there are
    none, the mean of all rows, which keeps the model's distribution over old tokens nearly as it was (Hewitt,
    "Initializing New Word Embeddings for Pretrained Language Models", 2021).  Rows of codebook entries, whose
    spelling says nothing, are that mean with noise, or all would be one.  Means are taken in float64 and
    rounded once.  Old rows are copied as bytes; memory holds one tensor of a file that has such rows, and a
    block of any other.
    """

    old_rows: int
    new_rows: int
    known_ids: int
    """Rows up to here belong to tokens and count for the mean of all; the rest is padding."""
    made_of: dict[int, list[int]]
    """New id -> old ids whose mean it is; [] and ids above `old_rows` that are not named: the mean of all."""
    noise: float = 0.0
    """What is added to the rows of `noisy`: normal, in standard deviations of each column."""
    noisy: range = range(0)
    """Ids whose rows get it."""
    seed: int = 0
    """Of the noise."""


def find_tables(files: list[Path], old_rows: int) -> dict[str, Path]:
    """Return the tensors with one row per id -> the file that holds each.

    Raises:
        UserError: a file is damaged, there is no such tensor, one is no floating-point table, or an unknown
            one has as many rows.
    """
    found: dict[str, Path] = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (a method of the reader, not a dict)
                part = opened.get_slice(name)
                if part.get_shape()[:1] != [old_rows]:
                    continue
                if not name.endswith(TABLES):
                    raise UserError(f"{file}: {name} has {old_rows} rows, as many as the vocabulary, "
                                    "but is neither a known embedding nor head, "
                                    "so it is not clear what becomes of it")
                if part.get_dtype() not in FLOATS:
                    raise UserError(f"{file}: {name} has dtype {part.get_dtype()}; rows can be averaged in "
                                    f"{', '.join(FLOATS)}")
                found[name] = file
    if not found:
        raise UserError(f"{files[0].parent}: no tensor has {old_rows} rows, the vocab_size of its "
                        "config.json; restore the folder from its source")
    return found


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: cannot be read as safetensors ({e}); copy or download it again") from None


def copy_file(file: Path, target: Path) -> FileRecord:
    """Copy a file in blocks; returns hash and size."""
    def blocks() -> Iterator[bytes | memoryview]:
        with open(file, "rb") as f:
            while block := f.read(BLOCK_BYTES):
                yield block

    return _write(target, blocks())


def graft_file(file: Path, target: Path, tables: set[str], plan: RowPlan) -> FileRecord:
    """Copy a safetensors file with other rows in `tables`; returns hash and size."""
    with _open(file) as source:
        names = source.offset_keys()
        slices = {name: source.get_slice(name) for name in names}
        header: dict[str, Any] = {"__metadata__": source.metadata()} if source.metadata() else {}
        end = 0
        for name in names:
            shape, size_bytes = slices[name].get_shape(), _size_bytes(slices[name])
            if name in tables:
                # rows are whole: the size is a multiple of the old number of rows
                size_bytes = size_bytes // plan.old_rows * plan.new_rows
                shape = [plan.new_rows, *shape[1:]]
            header[name] = {"dtype": slices[name].get_dtype(), "shape": shape,
                            "data_offsets": [end, end + size_bytes]}
            end += size_bytes

        def blocks() -> Iterator[bytes | memoryview]:
            head = json.dumps(header, separators=(",", ":")).encode()
            # safetensors aligns tensors to 8 bytes by spaces behind the header
            head += b" " * (-len(head) % 8)
            # the format: 8 bytes of length, the header, then the tensors in the order of their offsets
            yield len(head).to_bytes(8, "little") + head
            for name in names:
                if name in tables:
                    yield from (_bytes(rows) for rows in _rows(slices[name], plan, name))
                else:
                    yield _bytes(source.get_tensor(name))

        return _write(target, blocks())


def _size_bytes(part: Any) -> int:
    """Return the bytes of a tensor, from its shape and the digits in the name of its
    dtype (BOOL is a byte)."""
    size = 1
    for n in part.get_shape():
        size *= n
    digits = "".join(c for c in part.get_dtype().split("_")[0] if c.isdigit())
    return size * (int(digits) if digits else 8) // 8


def row_bytes(tables: dict[str, Path]) -> int:
    """Return the bytes of one row in all tables together."""
    total = 0
    for name, file in tables.items():
        with _open(file) as source:
            part = source.get_slice(name)
            total += _size_bytes(part) // int(part.get_shape()[0])
    return total


def _rows(table: Any, plan: RowPlan, name: str) -> Iterator[torch.Tensor]:
    """Yield the rows of a table in blocks: the old ones, some of them replaced, and the new ones."""
    import torch

    # padding rows are left out: they were never trained
    mean, deviation = _mean_and_deviation(table, plan.known_ids)

    def row(id_: int) -> torch.Tensor:
        old = plan.made_of.get(id_)
        if not old and plan.noise and id_ in plan.noisy:
            # a function of seed, tensor and id: what else is grafted does not change it
            drawn = torch.Generator().manual_seed(crc32(f"{plan.seed} {name} {id_}".encode()))
            noise = torch.randn(mean.shape, dtype=torch.float64, generator=drawn)
            return (mean + plan.noise * deviation * noise).to(table[0:1].dtype)
        if not old:
            return mean.to(table[0:1].dtype)
        # single slices: only these rows are read from the file
        rows = torch.cat([table[i:i + 1] for i in old])
        return rows.double().mean(0).to(rows.dtype)

    for start in range(0, plan.new_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, plan.new_rows)
        # a copy, since some rows are written into
        block = table[start:min(stop, plan.old_rows)].clone() if start < plan.old_rows else None
        if block is not None:
            for id_ in range(start, min(stop, plan.old_rows)):
                if id_ in plan.made_of:
                    block[id_ - start] = row(id_)
            yield block
        # rows behind the old ones, which also fill up to the asked size
        fresh = [row(id_) for id_ in range(max(start, plan.old_rows), stop)]
        if fresh:
            yield torch.stack(fresh)


def _mean_and_deviation(table: Any, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each column of the first rows, in float64."""
    blocks = [(start, min(start + BLOCK_ROWS, num_rows)) for start in range(0, num_rows, BLOCK_ROWS)]
    mean: torch.Tensor = sum(table[start:stop].double().sum(0) for start, stop in blocks) / num_rows
    # in a second pass: sums of squares minus squares of means lose digits
    squares: torch.Tensor = sum((table[start:stop].double() - mean).square().sum(0) for start, stop in blocks)
    return mean, (squares / num_rows).sqrt()


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    raw: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return raw


def _write(target: Path, blocks: Iterator[bytes | memoryview]) -> FileRecord:
    digest, size_bytes = Digest(), 0
    with open(target, "wb") as f:
        for block in blocks:
            digest.update(block)
            f.write(block)
            size_bytes += len(block)
    return FileRecord(digest.text(), size_bytes)


BYTE_LEVEL, CHARACTERS = "byte-level BPE", "character BPE"


@dataclass(frozen=True)
class NewToken:
    """An id whose row is made anew."""

    id: int
    token: str
    """As tokenizer.json spells it."""
    text: str
    """What it stands for; U+FFFD where it is a part of a character."""
    how: str
    """"merge", "character", "word", "special", or "instead of TOKEN"."""
    old_ids: list[int]
    """What its text was before; none: nothing that the old tokenizer knew."""


def kind_of(raw: dict[str, Any]) -> str:
    """Return what a tokenizer.json merges: `BYTE_LEVEL`, `CHARACTERS`, or the name of its model
    where it has no merges."""
    if raw["model"]["type"] != "BPE":
        return str(raw["model"]["type"])
    step = raw.get("pre_tokenizer") or {}
    return BYTE_LEVEL if "ByteLevel" in [step.get("type"),
                                         *(p["type"] for p in step.get("pretokenizers", []))] else CHARACTERS


class Surgery:
    """A tokenizer.json under the knife."""

    def __init__(self, raw: dict[str, Any], where: str, protected: set[str]) -> None:
        """Begin.

        Args:
            raw: the tokenizer.json; it is not changed.
            where: its name in messages.
            protected: tokens that may not be replaced, e.g. eos.
        """
        # the old one stays as it was: rows of new tokens are means over old ids
        self.raw = copy.deepcopy(raw)
        self.new: list[NewToken] = []
        self.skipped: dict[str, list[str]] = {}
        """Reason -> texts of another tokenizer's tokens that were not taken over."""
        self._old, self._where, self._protected = raw, where, protected
        self._tokenizer = opened(raw, where)
        self.kind = kind_of(raw)
        self._ids = ids_of(self.raw)
        self.num_ids = max(self._ids.values()) + 1
        """The largest id and one."""
        self._old_ids_of = ids_of(raw)
        self._ranks = {pair: i for i, pair in enumerate(merges(raw))} if raw["model"]["type"] == "BPE" else {}
        # before any graft: what a text was made of then
        self._old_ranks = dict(self._ranks)

    def knows(self, token: str) -> bool:
        """Return whether it is a token, as text or as tokenizer.json spells it."""
        return token in self._ids or self._spelled(token) in self._ids

    def replace(self, old: str, new: str) -> None:
        """Let `new` take the id of `old`, a reserved token, or an ordinary one of which no other is made.

        Raises:
            UserError: `old` is no token or still needed, or `new` is one already.
        """
        self._refuse_known(new, "--replace")
        contents = {token["content"]: token for token in self.raw["added_tokens"]}
        spelled = old if old in self._ids else self._spelled(old)
        if spelled not in self._ids:
            raise UserError(f"--replace {old}={new}: {old!r} is no token of "
                            f"{self._where}{nearest(old, self._ids)}")
        if spelled in self._protected:
            raise UserError(f"--replace {old}={new}: {old!r} is in use (as bos, eos, pad or unknown token, "
                            "in the chat template or the post-processor); replace a reserved token")
        # asked before the change: its text as the model knows it
        id_, before = self._ids[spelled], self._old_tokens(new)
        if spelled in contents:
            contents[spelled]["content"] = new
        else:
            self._forget(spelled, f"--replace {old}={new}")
            self.raw["added_tokens"].append(special_token(id_, new) | {"special": False})
            self.raw["added_tokens"].sort(key=lambda token: token["id"])
        vocab = self.raw["model"]["vocab"]
        if isinstance(vocab, list) and id_ < len(vocab):
            # the score never wins: the added token takes the text before the model sees it
            vocab[id_] = [new, NEVER]
        elif isinstance(vocab, dict) and spelled in vocab:
            self.raw["model"]["vocab"] = {new if token == spelled else token: i for token, i in vocab.items()}
        del self._ids[spelled]
        self._ids[new] = id_
        # its own id is left out of the mean: that row is being replaced
        self.new.append(NewToken(id_, new, new, f"instead of {spelled}", [i for i in before if i != id_]))

    def add_words(self, words: Iterable[str], *, special: bool) -> None:
        """Add tokens that are found in text as they stand, before it is cut.

        Raises:
            UserError: one is a token already.
        """
        for word in words:
            self._refuse_known(word, "--add")
            id_ = self._take_id(word)
            self.raw["added_tokens"].append(special_token(id_, word) | {"special": special})
            self.new.append(NewToken(id_, word, word, "special" if special else "word",
                                     self._old_tokens(word)))

    def add_tokens_of(self, other: dict[str, Any], name: str, max_ids: int | None) -> None:
        """Add the tokens of another tokenizer as merges, in the order of its ids,
        until `max_ids` ids are taken.

        Raises:
            UserError: the two are not BPE of the same kind.
        """
        its = kind_of(other)
        if self.kind != its or its not in (BYTE_LEVEL, CHARACTERS):
            raise UserError(f"--add {name}: its tokens cannot become merges, since it is {its} and "
                            f"{self._where} is {self.kind}; both must be {BYTE_LEVEL} or both {CHARACTERS}; "
                            "add words by a .txt file instead")
        ids = ids_of(other)
        left_out = ({token["content"] for token in other["added_tokens"]}
                    | {byte_piece(b) for b in range(256)} | self._ids.keys())
        # in the order of ids: what a token is made of mostly comes before it
        waiting = [token for token in sorted(ids, key=ids.__getitem__) if token not in left_out]
        self._pin()
        while waiting:
            # again as long as one more could be added: a merge may need one that came later in the list
            left = [token for token in waiting if not self._merge(token, max_ids)]
            if len(left) == len(waiting):
                break
            waiting = left
        for token in waiting:
            if max_ids is not None and self.num_ids >= max_ids and not self._obstacle(token):
                self._skip("no room", token)
            else:
                self._skip(self._obstacle(token) or "its text is made of more than two tokens", token)
        self.raw["model"]["merges"] = [list(pair) for pair in self._ranks]

    def finished(self) -> dict[str, Any]:
        """Return the tokenizer.json, which `tokenizers` reads with exactly these ids."""
        tokenizer = opened(self.raw, self._where)
        # `tokenizers` gives added tokens ids by itself unless the vocabulary has them
        if any(tokenizer.token_to_id(token) != id_ for token, id_ in self._ids.items()):
            self._pin()
            tokenizer = opened(self.raw, self._where)
        if wrong := next((token for token, id_ in self._ids.items() if tokenizer.token_to_id(token) != id_),
                         None):
            raise UserError(f"{self._where}: {wrong!r} cannot have id {self._ids[wrong]} in it, "
                            "because its ids have gaps")
        return self.raw

    def text_of(self, token: str) -> str:
        """Return what an ordinary token stands for."""
        if self.kind == BYTE_LEVEL:
            characters = byte_characters()
            return bytes(characters[c] for c in token if c in characters).decode("utf-8", errors="replace")
        return token.replace(SPACE, " ")

    def _merge(self, token: str, max_ids: int | None) -> bool:
        """Add a token where two tokens make it, or a character that has none yet;
        returns whether that is settled."""
        if (max_ids is not None and self.num_ids >= max_ids) or self._obstacle(token):
            return False
        parts = merged(list(token), lambda a, b: self._ranks.get((a, b)))
        # two old parts become one by a new merge; three would need a merge in between
        if len(parts) > 2:
            return False
        old = self._old_parts(token)
        id_ = self._take_id(token)
        self.raw["model"]["vocab"][token] = id_
        if len(parts) == 2:
            # behind all others, so text is first cut as before
            self._ranks[parts[0], parts[1]] = len(self._ranks)
        self.new.append(NewToken(id_, token, self.text_of(token),
                                 "merge" if len(parts) == 2 else "character", old))
        return True

    def _take_id(self, token: str) -> int:
        self._ids[token] = self.num_ids
        self.num_ids += 1
        return self._ids[token]

    def _obstacle(self, token: str) -> str | None:
        """Return why no text would ever become this token."""
        # merges begin with characters: without one the token is never reached
        if len(token) > 1 and any(c not in self._ids for c in token):
            return "it has a character that is no token"
        text = self.text_of(token)
        # a part of a character has no text of its own that could be tried
        if "\ufffd" in text:
            return None
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        if self.kind == BYTE_LEVEL and normalizer is not None and normalizer.normalize_str(text) != text:
            return "its text is changed by the normalizer"
        if splitter is not None and self.kind == BYTE_LEVEL and len(splitter.pre_tokenize_str(text)) > 1:
            return "its text is split before merging"
        return None

    def _skip(self, reason: str, token: str) -> None:
        self.skipped.setdefault(reason, []).append(self.text_of(token))

    def _old_parts(self, token: str) -> list[int]:
        """Return the old ids of an ordinary token's text, by merges alone."""
        parts = merged(list(token), lambda a, b: self._old_ranks.get((a, b)))
        return [id_ for part in parts for id_ in self._ids_of_part(part)]

    def _ids_of_part(self, part: str) -> list[int]:
        if part in self._old_ids_of:
            return [self._old_ids_of[part]]
        # a part that is no token is spelled in bytes, where the model has them
        pieces = [byte_piece(b) for b in part.encode()] if self._old["model"].get("byte_fallback") else []
        return [self._old_ids_of[piece] for piece in pieces if piece in self._old_ids_of]

    def _old_tokens(self, text: str) -> list[int]:
        """Return the old ids of text, those that stand for the unknown left out."""
        model = self._old["model"]
        unknown = (model.get("unk_id") if model["type"] == "Unigram"
                   else self._old_ids_of.get(model.get("unk_token") or ""))
        return [id_ for id_ in self._tokenizer.encode(text, add_special_tokens=False).ids if id_ != unknown]

    def _spelled(self, text: str) -> str:
        if self.kind == BYTE_LEVEL:
            of_byte = {byte: character for character, byte in byte_characters().items()}
            return "".join(of_byte[b] for b in text.encode())
        return text.replace(" ", SPACE)

    def _refuse_known(self, text: str, option: str) -> None:
        if not text.strip():  # an added token of spaces would cut every text anew
            raise UserError(f"{option}: {text!r} is no token; give it at least one letter or sign")
        if self.knows(text):
            raise UserError(f"{option}: {text!r} is a token of {self._where} already; leave it out")

    def _forget(self, token: str, option: str) -> None:
        """Drop the merge that makes an ordinary token.

        Raises:
            UserError: other tokens are made of it, or text needs it.
        """
        if self.raw["model"]["type"] == "Unigram":
            return
        # dropping its merge would take other tokens along
        if maker := next((pair for pair in self._ranks if token in pair), None):
            raise UserError(f"{option}: {token!r} is a part of {''.join(maker)!r} and cannot go; "
                            "replace a reserved token, or one of which no other is made")
        if len(token) == 1 or token in {byte_piece(b) for b in range(256)}:
            raise UserError(f"{option}: {token!r} is a byte or character of which text is made and "
                            "cannot go; replace a reserved token")
        self._ranks = {pair: i
                       for i, pair in enumerate(pair for pair in self._ranks if "".join(pair) != token)}
        self.raw["model"]["merges"] = [list(pair) for pair in self._ranks]

    def _pin(self) -> None:
        """Write the added tokens of a BPE model into its vocabulary, so that they keep their ids
        whatever is added."""
        if self.raw["model"]["type"] == "BPE":
            self.raw["model"]["vocab"] |= {token["content"]: token["id"]
                                           for token in self.raw["added_tokens"]}
