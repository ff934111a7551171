"""What a command asks of a model: prompts from options and files as its token ids, what ends an answer,
whether an engine can do it, and the file of responses.  No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.documents.files import refuse_tables
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, Flag, SettingsError
from megatron_sov.chat.encode import TYPE_RESPONSE, ChatEncoder
from megatron_sov.chat.folder import TOKENIZER_JSON, read_chat_encoder
from megatron_sov.chat.marks import build_text_decoder, prepend_mark
from megatron_sov.infer.engine import ENGINE_SET, MEGATRON, PRECISION_KEY, SERVED, TRANSFORMERS, ChosenEngine
from megatron_sov.infer.request import Generated
from megatron_sov.work.endpoints.transport import find_address_problems

if TYPE_CHECKING:
    from megatron_sov.infer.engines.server_engine import ServerPlaces
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.model.modality import FeatureTokens, MediaEncoding

@dataclass(frozen=True)
class ModelPrompt:
    """What a model is asked."""

    text: str
    """What it continues, or with a chat template answers."""
    target: str | None = None
    """The answer that a reader will compare with, if there is one."""
    record: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The fields of its line, which go with the responses: what a reward needs."""


def read_prompts(given: Sequence[str], file: Path | None) -> list[ModelPrompt]:
    """Return the prompts given as texts, then those of a JSONL file with fields "prompt" and,
    if wanted, "target".

    Raises:
        UserError: there is none, one is empty, or a line of the file is malformed (named by number).
    """
    prompts = [ModelPrompt(text) for text in given] + (_read_file(file) if file is not None else [])
    if not prompts and file is not None:
        raise UserError(f"--prompts {file}: is empty; pass a JSONL file with a prompt on each line")
    if not prompts:
        raise UserError("there is nothing to continue: pass --prompt TEXT or --prompts FILE.jsonl")
    texts = [p.text for p in prompts]
    if "" in texts:
        raise UserError(f"prompt {texts.index('') + 1} is empty: pass at least one character of text")
    return prompts


def response_lines(prompts: Sequence[ModelPrompt], texts: Sequence[str], found: Generated) -> str:
    """Return JSON lines as `megatron-sov score` reads them: a prompt's own fields, `response`, `num_tokens`
    and `finish_reason`."""
    return "".join(json.dumps({
        **prompt.record, "prompt": prompt.text, "response": text, "num_tokens": len(tokens),
        "finish_reason": reason}, ensure_ascii=False) + "\n"
        for prompt, text, tokens, reason in zip(prompts, texts, found.continuations, found.finish_reasons,
                                                strict=True))


def _read_file(file: Path) -> list[ModelPrompt]:
    refuse_tables(file, "--prompts")
    try:
        # at "\n" alone: `splitlines` also cuts at characters that may stand inside a JSON string
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else f"no UTF-8 at byte {e.start}"
        raise UserError(f"--prompts {file}: cannot be read ({reason}); pass a JSONL file in UTF-8") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            # NaN or half of a surrogate pair could not be written with its answer
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as e:
            raise UserError(f"{file}:{number}: is not valid JSON ({e}); "
                            "every line must be one JSON object") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) \
                or not isinstance(record.get("target", ""), str):
            raise UserError(f'{file}:{number}: must be an object with "prompt" and, if wanted, '
                            '"target", both strings')
        prompts.append(ModelPrompt(record["prompt"], record.get("target"), record))
    return prompts


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What runs a model, of commands whose --set is of something else."""

    engine: ChosenEngine = None
    engine_set: Annotated[tuple[str, ...], Flag(ENGINE_SET, "key=value")] = ()
    """Layout and precision, e.g. parallel.ep=2 (engine megatron); or servers, e.g. tp=8 (vllm)."""
    nproc: AtLeastOne | None = None
    """Local processes (engine megatron)."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where servers come from, of `--engine vllm`."""

    engine_python: Annotated[Path | None, Flag(value="FILE")] = None
    """The interpreter that has the engine (default: SOV_ENGINE_PYTHON of the environment, or this one)."""
    engine_url: Annotated[tuple[str, ...], Flag(value="URL")] = ()
    """A server that somebody else has started; repeat it for several."""

    def places(self, run: Path) -> ServerPlaces:
        """Return where the servers of a run are.

        Raises:
            UserError: an address is none.
        """
        from megatron_sov.infer.engines.server_engine import ServerPlaces

        for url in self.engine_url:
            if problems := find_address_problems("--engine-url", url, "the environment"):
                raise SettingsError("", problems)
        return ServerPlaces(run / "engines", self.engine_url, self.engine_python)


@dataclass(frozen=True)
class SamplingRequest:
    """Prompts as a model reads them."""

    ids: list[list[int]]
    """Token ids of each prompt."""
    end_ids: tuple[int, ...]
    """Tokens that end an answer."""
    decode: Callable[[list[int]], str]
    """From token ids to text (`chat.marks.text_decoder`)."""
    opened: list[str]
    """The mark of thoughts that the template has opened at the end of each prompt; empty: none."""

    def response(self, number: int, text: str) -> str:
        """Return what a model wrote to a prompt as a text that stands by itself."""
        return prepend_mark(text, self.opened[number])

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))


class Asker:
    """A model's own tokenizer, and its chat template if wanted."""

    def __init__(self, target: Target, chat: bool, encoding: MediaEncoding | None = None) -> None:
        """Read both.

        Args:
            target: the model.
            chat: whether prompts are framed by the chat template.
            encoding: how tokens of pictures and sounds that prompts spell are numbered; None: they are text.

        Raises:
            UserError: the model has no tokenizer or no chat template.
        """
        from megatron_sov.infer.engines.load import load_tokenizer

        tokenizer = load_tokenizer(target.tokenizer_folder)
        eos = tokenizer.eos_token_id
        # A plain text ends with eos alone.
        self._eos = () if eos is None else (int(eos),)
        self.feature_tokens = (None if encoding is None
                               else _read_feature_tokens(target.tokenizer_folder, encoding))
        """Tokens of pictures and sounds that prompts may spell; None: they are text."""
        encoder = read_chat_encoder(target.tokenizer_folder, self.feature_tokens) if chat else None
        if chat and encoder is None:
            raise UserError(f"--chat: {target.tokenizer_folder} has no chat template; "
                            "leave --chat out, or fine-tune on chats first")
        self._target, self._tokenizer = target, tokenizer
        self.encoder = encoder
        """Of conversations; None: prompts are texts."""
        self.end_ids = stop_ids(target, eos, encoder)
        """Tokens that end an answer."""
        self._decode = build_text_decoder(target.tokenizer_folder / TOKENIZER_JSON, self.end_ids,
                                    lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))

    def ask(self, prompts: Sequence[str | Conversation]) -> list[list[int]]:
        """Return prompts in the model's ids, see `asked_of`.

        Raises:
            UserError: the model knows fewer ids than its tokenizer, or a prompt is no text.
        """
        _refuse_half_characters(prompts)
        if self.encoder is not None:
            ids = [_encode_chat(self.encoder, prompt) for prompt in prompts]
        else:  # begun as documents in token shards begin: with nothing before the text
            ids = [self._text_ids(_plain(prompt)) for prompt in prompts]
        _refuse_unknown(ids, self._target)
        return ids

    def _text_ids(self, text: str) -> list[int]:
        try:
            pieces = self.feature_tokens.split(text) if self.feature_tokens else [(text, None)]
        except BadRecord as e:
            raise UserError(f"the prompt {text[:40]!r} {e}") from None
        return [i for piece, id_ in pieces for i in (
            self._tokenizer.encode(piece, add_special_tokens=False) if id_ is None else [id_])]

    def encode(self, text: str) -> list[int]:
        """Return the ids of text that an answer begins with.

        Raises:
            UserError: the model knows fewer ids than its tokenizer, or it is no text.
        """
        _refuse_half_characters([text])
        ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        _refuse_unknown([ids], self._target)
        return ids

    def answer(self, text: str) -> list[int]:
        """Return the ids of a whole answer, with what ends it: those that training on chats has seen, or with
        the tokenizer's eos.

        Raises:
            UserError: the model knows fewer ids than its tokenizer, or it is no text.
        """
        if self.encoder is None:
            return [*self.encode(text), *self._eos]
        _refuse_half_characters([text])
        try:
            # A whole turn, of which the learned tokens are the answer with what ends it.
            told = self.encoder.encode(Conversation.of(("user", "?"), ("assistant", text)))
        except BadRecord as e:
            raise UserError(f"the answer {text[:40]!r} {e}") from None
        ids = [i for i, type_ in zip(told.ids, told.types, strict=True) if type_ == TYPE_RESPONSE]
        _refuse_unknown([ids], self._target)
        return ids

    def id_of(self, token: str) -> int | None:
        """Return a token's id; None where the tokenizer has no such token."""
        found = self._tokenizer.convert_tokens_to_ids(token)
        return None if found is None or found == self._tokenizer.unk_token_id else int(found)

    def decode(self, tokens: list[int]) -> str:
        return self._decode(tokens)

    def opened_thoughts(self, asked: Sequence[int]) -> str:
        """Return the mark of thoughts that the template has opened at the end of a prompt; empty: none."""
        return "" if self.encoder is None else self.encoder.opened_thoughts(asked)


def stop_ids(target: Target, eos: int | None, encoder: ChatEncoder | None) -> tuple[int, ...]:
    """Return the tokens that end a response, in order: the same for a checkpoint and for the Hugging Face
    folder that `convert to-hf` makes of it.  `eos` is the tokenizer's; `encoder` is for prompts that the chat
    template frames."""
    from megatron_sov.convert.hf_import import generation_ids, ids_as_list

    configured = ids_as_list(generation_ids(target.tokenizer_folder).eos)
    turn_ends = () if encoder is None else encoder.end_ids()
    return tuple(sorted({*configured, *turn_ends, *(() if eos is None else (int(eos),))}))


def _read_feature_tokens(folder: Path, encoding: MediaEncoding) -> FeatureTokens:
    from tokenizers import Tokenizer

    from megatron_sov.model.modality import modality

    omni = modality()
    try:
        return omni.feature_tokens(Tokenizer.from_file(str(folder / TOKENIZER_JSON)), encoding)
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{folder}: its tokenizer cannot be read ({e}); restore it from its source") from None


def asked_of(target: Target, prompts: Sequence[str | Conversation], chat: bool) -> SamplingRequest:
    """Return prompts in the ids of a model's own tokenizer.

    Args:
        target: the model.
        prompts: texts to continue; with `chat` each is a user's message, or a whole conversation.
        chat: frame them by the chat template: the very ids that training on chats has seen.

    Raises:
        UserError: the model has no tokenizer or no chat template, or knows fewer ids than its tokenizer; or a
            prompt is no text.
    """
    _refuse_half_characters(prompts)  # before the tokenizer is looked for
    asker = Asker(target, chat)
    ids = asker.ask(prompts)
    return SamplingRequest(ids, asker.end_ids, asker.decode, list(map(asker.opened_thoughts, ids)))


def _refuse_half_characters(prompts: Sequence[str | Conversation]) -> None:
    """Raise `UserError` for half of a surrogate pair, which JSON and arguments can hold and no tokenizer
    reads."""
    for prompt in prompts:
        texts = [prompt] if isinstance(prompt, str) else [t for m in prompt.messages for t in m.texts()]
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise UserError(f"the prompt {text[:40]!r} has {text[e.start]!r} at character {e.start + 1}, "
                                "half of a surrogate pair; write it in UTF-8") from None


def _plain(prompt: str | Conversation) -> str:
    if isinstance(prompt, str):
        return prompt
    raise UserError(f"the prompt {prompt.messages[-1].content[:40]!r} is a conversation; add --chat")


def _encode_chat(encoder: ChatEncoder, prompt: str | Conversation) -> list[int]:
    chat = Conversation.of(("user", prompt)) if isinstance(prompt, str) else prompt
    try:
        return encoder.encode(chat, awaits_response=True).ids
    except BadRecord as e:
        raise UserError(f"the prompt {chat.messages[-1].content[:40]!r} {e}") from None


def _refuse_unknown(prompts: list[list[int]], target: Target) -> None:
    """Raise `UserError` where a tokenizer knows more ids than its model: one that is split over processes
    would take them for no token at all, without a word."""
    try:
        vocab_size = target.vocab_size
    except UserError:  # a Hugging Face folder of another family, of which transformers knows more
        return
    highest = max((max(ids, default=0) for ids in prompts), default=0)
    if highest >= vocab_size:
        raise UserError(f"{target.tokenizer_folder}: makes token id {highest} of a prompt, and the model has "
                        f"{vocab_size} ids; put the tokenizer there that the model was trained with")


def check_length(target: Target, longest: int, what: str, mend: str) -> None:
    """Raise `UserError` where a model ends before what is asked of it does.

    Args:
        target: the model.
        longest: tokens of the longest sequence, prompt and answer.
        what: makes it so long, in the plural.
        mend: what to do.
    """
    if longest > target.max_tokens:
        raise UserError(f"{what} make {longest} tokens, and the model ends at {target.max_tokens}; {mend}")


def check_engine(engine: str, target: Target, settings: Sequence[str], nproc: int | None,
                 option: str = "--set", num_drafts: int = 0) -> None:
    """Raise `UserError` where an engine cannot do what is asked of a model.

    Args:
        engine: one of `ENGINES`.
        target: the model.
        settings: `key=value` changes of layout and precision, or of servers.
        nproc: local processes.
        option: which gives the settings.
        num_drafts: tokens that the multi-token prediction layer drafts.
    """
    if engine != MEGATRON and not target.is_hf:
        raise UserError(f"--engine {engine}: {target.path} is a checkpoint; "
                        "convert it first with `megatron-sov convert to-hf`")
    own = settings if engine not in SERVED else ()  # its servers have settings too
    if engine == TRANSFORMERS:
        own = [setting for setting in own if setting.partition("=")[0] != PRECISION_KEY]
    given = [*(f"{option} {setting}" for setting in own),
             *([] if nproc is None else [f"--nproc {nproc}"]),
             *([f"--speculative {num_drafts}"] if num_drafts else [])]
    if engine != MEGATRON and given:
        raise UserError(f"{', '.join(given)}: {'is' if len(given) == 1 else 'are'} for --engine {MEGATRON}; "
                        "add it or leave this out")
    if num_drafts and not target.model.num_mtp_layers:
        raise UserError(f"--speculative {num_drafts}: {target.path} has no multi-token prediction "
                        "layer to draft with; leave it out")
