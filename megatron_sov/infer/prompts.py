"""Read prompts from options and files, encode them for a model, and check that an engine can run them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.documents.files import refuse_tables
from megatron_sov.base.documents.rows import fix_text_rows
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import ChatEncoder
from megatron_sov.chat.folder import TOKENIZER_JSON, open_tokenizer, read_chat_encoder
from megatron_sov.chat.marks import build_text_decoder, prepend_mark
from megatron_sov.convert.companion_files import read_generation_ids, to_id_list
from megatron_sov.infer.request import GenerationResult

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.model.modality import FeatureTokens, MediaEncoding


@dataclass(frozen=True)
class ModelPrompt:
    """A prompt with the reference answer and source record for a reward."""

    text: str
    """Text to continue, or the user message if a chat template is used."""
    target: str | None = None
    """Reference answer, if known."""
    record: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Source record, whose fields are copied to the responses."""


def read_prompts(texts: Sequence[str], file: Path | None) -> list[ModelPrompt]:
    """Return prompts from options, then from a JSONL file with `prompt` and, optionally, `target`. Raises
    `UserError`: there is no prompt, a prompt is empty, or a line of `file` is malformed."""
    prompts = [ModelPrompt(text) for text in texts] + (_read_file(file) if file is not None else [])
    if not prompts and file is not None:
        raise UserError(f"--prompts {file}: is empty; pass a JSONL file with a prompt on each line")
    if not prompts:
        raise UserError("no prompts: pass --prompt TEXT or --prompts FILE.jsonl")
    prompt_texts = [p.text for p in prompts]
    if "" in prompt_texts:
        raise UserError(f"prompt {prompt_texts.index('') + 1} is empty: pass at least one character of text")
    return prompts


def format_responses(prompts: Sequence[ModelPrompt], texts: Sequence[str],
                     generated: GenerationResult) -> str:
    """Format JSON lines for `megatron-sov score`: the record, `response`, `num_tokens` and
    `finish_reason`."""
    return "".join(json.dumps({
        **prompt.record, "prompt": prompt.text, "response": text, "num_tokens": len(tokens),
        "finish_reason": reason}, ensure_ascii=False) + "\n"
        for prompt, text, tokens, reason in zip(prompts, texts, generated.continuations,
                                                generated.finish_reasons, strict=True))


def _read_file(file: Path) -> list[ModelPrompt]:
    refuse_tables(file, "--prompts")
    try:
        # Split at "\n" only: `splitlines` also splits at characters inside JSON strings.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else f"invalid UTF-8 at byte {e.start}"
        raise UserError(f"--prompts {file}: cannot be read ({reason}); pass a JSONL file in UTF-8") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            # NaN and unpaired surrogates could not be written with the response.
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as e:
            raise UserError(f"{file}:{number}: is not valid JSON ({e}); "
                            "every line must be one JSON object", fix_text_rows(file, "prompt")) from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) \
                or not isinstance(record.get("target", ""), str):
            raise UserError(f'{file}:{number}: must be an object with "prompt" and, optionally, '
                            '"target", both strings')
        prompts.append(ModelPrompt(record["prompt"], record.get("target"), record))
    return prompts


@dataclass(frozen=True)
class EncodedPrompts:
    ids: list[list[int]]
    """Token ids per prompt."""
    end_ids: tuple[int, ...]
    """Stop tokens."""
    decode: Callable[[list[int]], str]
    """Token ids -> text (`chat.marks.build_text_decoder`)."""
    opened: list[str]
    """Per prompt, the thinking mark that the chat template opened at the end; "" without a mark."""

    def response(self, number: int, text: str) -> str:
        """Prepend the prompt's opening thinking mark to the response `text`."""
        return prepend_mark(text, self.opened[number])

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))


class PromptEncoder:
    """Encodes prompts with a model's tokenizer and, optionally, chat template.

    Args:
        target: the model.
        chat: format prompts with the chat template.
        encoding: ids of image and audio tokens in prompts; None treats their text as ordinary text.

    Raises:
        UserError: the model has no tokenizer or no chat template.
    """

    def __init__(self, target: Target, chat: bool, encoding: MediaEncoding | None = None) -> None:
        from megatron_sov.infer.engines.load import load_tokenizer  # not at the top: it imports torch

        tokenizer = load_tokenizer(target.tokenizer_folder)
        eos = tokenizer.eos_token_id
        self.feature_tokens = (None if encoding is None
                               else _read_feature_tokens(target.tokenizer_folder, encoding))
        """Image and audio tokens in prompts; None encodes their marks as ordinary text."""
        encoder = read_chat_encoder(target.tokenizer_folder, self.feature_tokens) if chat else None
        if chat and encoder is None:
            raise UserError(f"--chat: {target.tokenizer_folder} has no chat template; "
                            "leave --chat out, or fine-tune on chats first")
        self._target, self._tokenizer = target, tokenizer
        self.encoder = encoder
        """Encoder of the chat template; None for plain prompts."""
        self.end_ids = read_stop_ids(target, eos, encoder)
        """Stop tokens."""
        self._decode = build_text_decoder(target.tokenizer_folder / TOKENIZER_JSON, self.end_ids,
                                          lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))

    def encode_prompts(self, prompts: Sequence[str | Conversation]) -> list[list[int]]:
        """Return the token ids per prompt. Raises `UserError`: a prompt is invalid, or the tokenizer has
        ids that the model lacks."""
        _check_surrogates(prompts)
        if self.encoder is not None:
            ids = [_encode_chat(self.encoder, prompt) for prompt in prompts]
        else:  # without a prefix, like documents in token shards
            ids = [self._text_ids(_get_text(prompt)) for prompt in prompts]
        _check_ids(ids, self._target)
        return ids

    def _text_ids(self, text: str) -> list[int]:
        try:
            pieces = self.feature_tokens.split(text) if self.feature_tokens else [(text, None)]
        except BadRecord as e:
            raise UserError(f"the prompt {text[:40]!r} {e}") from None
        ids: list[int] = []
        for piece, id_ in pieces:
            # `id_` is the id of an image or audio token; None: `piece` is text
            ids += self._tokenizer.encode(piece, add_special_tokens=False) if id_ is None else [id_]
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Encode the beginning of an answer, without chat template. Raises `UserError`: the text is invalid,
        or the tokenizer has ids that the model lacks."""
        _check_surrogates([text])
        ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        _check_ids([ids], self._target)
        return ids

    def find_token_id(self, token: str) -> int | None:
        """Return a token's id; None if the tokenizer lacks the token."""
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        return None if token_id is None or token_id == self._tokenizer.unk_token_id else int(token_id)

    def decode(self, tokens: list[int]) -> str:
        return self._decode(tokens)

    def opened_thoughts(self, asked: Sequence[int]) -> str:
        """Return the thinking mark that the chat template opened at the end of a prompt, or ""."""
        return "" if self.encoder is None else self.encoder.opened_thoughts(asked)


def read_stop_ids(target: Target, eos: int | None, encoder: ChatEncoder | None) -> tuple[int, ...]:
    """Return the sorted stop tokens; a checkpoint and its Hugging Face export have equal stop tokens.

    Args:
        target: the model.
        eos: eos id of the tokenizer.
        encoder: chat encoder, for prompts with a chat template.
    """
    configured = to_id_list(read_generation_ids(target.tokenizer_folder).eos)
    turn_ends = () if encoder is None else encoder.end_ids()
    return tuple(sorted({*configured, *turn_ends, *(() if eos is None else (int(eos),))}))


def _read_feature_tokens(folder: Path, encoding: MediaEncoding) -> FeatureTokens:
    from megatron_sov.model.modality import load_modality  # not at the top: `--help` loads no numpy

    tokenizer = open_tokenizer(folder)
    try:
        return load_modality().feature_tokens(tokenizer, encoding)
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{folder}: its tokenizer cannot be read ({e}); restore it from its source") from None


def encode_prompts(target: Target, prompts: Sequence[str | Conversation], chat: bool) -> EncodedPrompts:
    """Encode prompts with a model's own tokenizer.

    Args:
        target: the model.
        prompts: texts to continue; with `chat` user messages or conversations.
        chat: format prompts with the chat template, as in training.

    Raises:
        UserError: the model has no tokenizer or no chat template, the tokenizer has ids that the model lacks,
            or a prompt is invalid.
    """
    _check_surrogates(prompts)  # before loading the tokenizer
    encoder = PromptEncoder(target, chat)
    ids = encoder.encode_prompts(prompts)
    return EncodedPrompts(ids, encoder.end_ids, encoder.decode, list(map(encoder.opened_thoughts, ids)))


def _check_surrogates(prompts: Sequence[str | Conversation]) -> None:
    """Raise `UserError` for unpaired surrogates, which occur in JSON and arguments but cannot be encoded."""
    for prompt in prompts:
        texts = [prompt] if isinstance(prompt, str) else [t for m in prompt.messages for t in m.texts()]
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise UserError(f"the prompt {text[:40]!r} has {text[e.start]!r} at character {e.start + 1}, "
                                "an unpaired surrogate; write it in UTF-8") from None


def _get_text(prompt: str | Conversation) -> str:
    if isinstance(prompt, str):
        return prompt
    raise UserError(f"the prompt {prompt.messages[-1].content[:40]!r} is a conversation; add --chat")


def _encode_chat(encoder: ChatEncoder, prompt: str | Conversation) -> list[int]:
    chat = Conversation.of(("user", prompt)) if isinstance(prompt, str) else prompt
    try:
        return encoder.encode(chat, awaits_response=True).ids
    except BadRecord as e:
        raise UserError(f"the prompt {chat.messages[-1].content[:40]!r} {e}") from None


def _check_ids(prompts: list[list[int]], target: Target) -> None:
    """Raise `UserError` for ids beyond the model's vocabulary, which a sharded embedding would ignore."""
    try:
        vocab_size = target.vocab_size
    except UserError:  # a Hugging Face folder whose family only transformers supports
        return
    highest = max((max(ids, default=0) for ids in prompts), default=0)
    if highest >= vocab_size:
        raise UserError(f"{target.tokenizer_folder}: encodes a prompt with token id {highest}, but the model "
                        f"has {vocab_size} ids; replace it by the tokenizer of the model")


def check_length(target: Target, longest: int, cause: str, fix: str) -> None:
    """Raise `UserError` if a sequence exceeds the model's context.

    Args:
        target: the model.
        longest: tokens of the longest sequence, prompt and answer.
        cause: what makes the sequence long, as the plural subject of the message.
        fix: advice at the end of the message.
    """
    if longest > target.max_tokens:
        raise UserError(f"{cause} make {longest} tokens, but the model has a context of {target.max_tokens}; "
                        f"{fix}")
