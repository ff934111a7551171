"""Questions as the token ids that a model is asked with, and ids as text again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_sov.chat.folder import open_tokenizer, read_chat_encoder
from megatron_sov.chat.marks import as_written
from megatron_sov.documents import Conversation
from megatron_sov.errors import UserError
from megatron_sov.generate.asking import Asker
from megatron_sov.generate.target import Target
from megatron_sov.serving.bodies import Question
from megatron_sov.serving.refusals import Refused

Decode = Callable[[list[int]], str]
MAX_TOLD = 1 << 20
"""Log-probabilities of prompts' tokens that one request gets."""


@dataclass(frozen=True)
class Read:
    """A question in ids."""

    prompts: list[list[int]]
    """Ids of each prompt."""
    end_ids: tuple[int, ...]
    """Tokens that end an answer."""
    limits: list[int]
    """Longest answer to each prompt."""
    in_thoughts: bool
    """Whether the template has opened the thoughts that the answer begins with."""


class Reader:
    """A model's tokenizer and template.  Prompts are read on the main thread: only there a template's time
    and memory are bounded."""

    def __init__(self, target: Target, longest: int) -> None:
        """Read both.

        Args:
            target: the model.
            longest: tokens of a prompt and its answer.

        Raises:
            UserError: the model has no tokenizer, or it cannot be read.
        """
        folder = target.tokenizer_folder
        self._where, self._vocab_size, self._longest = folder, target.vocab_size, longest
        self._plain = Asker(target, chat=False)
        self._chat = Asker(target, chat=True) if read_chat_encoder(folder) is not None else None
        self._tokenizer = open_tokenizer(folder)
        self._special = {token.content: id_ for id_, token
                         in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def read(self, question: Question) -> Read:
        """Return a question in ids.

        Raises:
            Refused: the template refuses it, it is too long, or has ids that the model does not know.
        """
        asker, field = self._plain, "prompt"
        if question.is_chat:
            if self._chat is None:
                raise Refused(400, "this model has no chat template; ask /v1/completions")
            asker, field = self._chat, "messages"
        try:
            prompts = [_ids(asker, prompt) for prompt in question.prompts]
        except UserError as e:
            # a message may name folders of this machine, which are nothing to clients
            raise Refused(400, str(e).replace(str(self._where), "the tokenizer"), field) from None
        for ids in prompts:
            if not ids or not all(0 <= id_ < self._vocab_size for id_ in ids):
                raise Refused(400, f"a prompt must have at least one token, and ids below {self._vocab_size}",
                              field)
        _refuse_too_much(question, prompts)
        ends = [self._special[text] for text in question.stops if text in self._special]
        return Read(prompts, tuple(sorted({*asker.end_ids, *ends})),
                    [self._limit(question, len(ids), field) for ids in prompts],
                    asker.encoder is not None and asker.encoder.opens_thoughts(prompts[0]))

    def stops(self, question: Question) -> tuple[str, ...]:
        """Return the strings that end an answer and can show in it: no special tokens."""
        return tuple(text for text in question.stops if text not in self._special)

    def decoder(self, question: Question) -> Decode:
        """Return what gives the text of an answer (`chat.marks.text_decoder`)."""
        if question.is_chat and self._chat is not None:
            return self._chat.decode
        return lambda ids: as_written(self._plain.decode(ids))

    def piece(self, token: int) -> str:
        """Return the text of one token, whatever it is."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def _limit(self, question: Question, prompt_tokens: int, field: str) -> int:
        left = self._longest - prompt_tokens
        wanted = question.max_tokens or left
        if left < 1 or wanted > left:
            asked = f" and {question.max_tokens} of the answer" if question.max_tokens else ""
            raise Refused(400, f"the prompt has {prompt_tokens} tokens{asked}, and this server takes "
                               f"{self._longest} in all; shorten one of them", field,
                          "context_length_exceeded")
        return wanted


def _refuse_too_much(question: Question, prompts: Sequence[Sequence[int]]) -> None:
    """Raise `Refused` where more would be told of prompts than is good for the memory of both sides."""
    told = question.num_choices * sum(map(len, prompts)) * (1 + question.num_top)
    if question.tells.prompt and told > MAX_TOLD:
        raise Refused(400, f"{told:,} log-probabilities of prompts are asked for, at most {MAX_TOLD:,}; send "
                           "fewer prompts at a time, or a smaller logprobs", "echo")


def _ids(asker: Asker, prompt: Conversation | str | tuple[int, ...]) -> list[int]:
    """Return a prompt in ids: with earlier answers as training has shown them, or, where the template leaves
    something of them out (earlier thoughts, say) and training would refuse them, as the template shows them.

    Raises:
        UserError: the template refuses it, or it is no text.
    """
    if isinstance(prompt, tuple):
        return list(prompt)
    try:
        return asker.ask([prompt])[0]
    except UserError:
        if isinstance(prompt, str) or all(message.role != "assistant" for message in prompt.messages):
            raise
    shown = tuple(replace(message, is_learned=False) for message in prompt.messages)
    return asker.ask([replace(prompt, messages=shown)])[0]
