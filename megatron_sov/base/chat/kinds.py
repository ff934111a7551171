"""Which characters of an assistant's turn are its thoughts, its calls of tools, and its answer.

A message says what its thoughts, its content and its calls are; a turn shows them with marks of the template
around them.  Opening marks count with what they open, and what ends a part counts with it: the tag behind the
thoughts (`</think>`, `<|end|>`), and the end of the turn behind its last part.  A message that is a
content alone may spell thoughts and calls in it, in the marks that `tool_calls.parse_turn` reads.
"""

from __future__ import annotations

import re

from megatron_sov.base.chat.marks import BEGIN_CALL, BEGIN_THOUGHTS, END_CALL, END_THOUGHTS
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sov.base.documents import Message

KIND = "kind"
"""Column of chats: what each token is learned as."""
KIND_NONE, KIND_THOUGHT, KIND_CALL, KIND_ANSWER = 0, 1, 2, 3
"""What a token can be learned as: nothing, since no learned turn holds it, or a part of one."""
KINDS = {"thought": KIND_THOUGHT, "call": KIND_CALL, "answer": KIND_ANSWER}
"""Name in events and the report -> kind."""
_END_TAG = re.compile(r"\s*(?:<[^<>\s]{1,60}>|\[/?[A-Z_]{1,60}\])")
# a template may have opened the thoughts that a turn begins with
_THOUGHT = (f"(?P<thought>\\A(?:(?!{BEGIN_THOUGHTS}).)*?{END_THOUGHTS}|"
            f"{BEGIN_THOUGHTS}.*?(?:{END_THOUGHTS}|\\Z))")
_CALL = f"(?P<call>{BEGIN_CALL}.*?(?:{END_CALL}|\\Z))"


def kinds_of_turn(text: str, message: Message) -> bytes:
    """Return the kind of each character of a learned turn.

    Args:
        text: the turn as the template shows it, or the content of a message that is nothing else.
        message: what it shows.
    """
    answer = _end_of_thoughts(text, message.reasoning.strip())
    content = message.content.strip()
    place = text.find(content, answer)
    calls = _begin_of_calls(text, message, place + len(content) if place >= 0 else answer)
    said = text[answer:calls]
    return (bytes([KIND_THOUGHT]) * answer + _spelled(said, message)
            + bytes([KIND_CALL]) * (len(text) - answer - len(said)))


def _end_of_thoughts(text: str, thoughts: str) -> int:
    """Return where a turn goes on behind its thoughts and the tag that ends them; 0 where it shows none."""
    begin = text.find(thoughts) if thoughts else -1
    if begin < 0:
        return 0
    end = begin + len(thoughts)
    tag = _END_TAG.match(text, end)
    return tag.end() if tag else end


def _begin_of_calls(text: str, message: Message, behind: int) -> int:
    """Return where the calls of a turn begin: behind what it says; its end where it has none, or they are
    not shown there."""
    names = [call["function"]["name"] for call in message.tool_calls]
    return behind if names and text.find(names[0], behind) >= 0 else len(text)


def _spelled(said: str, message: Message) -> bytes:
    """Return the kinds of what is said, in which a message without thoughts or calls of its own may spell
    them; a call inside of thoughts is a thought, and the other way round."""
    found = bytearray([KIND_ANSWER]) * len(said)
    sought = [*([] if message.reasoning.strip() else [_THOUGHT]), *([] if message.tool_calls else [_CALL])]
    for part in re.finditer("|".join(sought), said, re.DOTALL) if sought else ():
        begin, end = part.span()
        found[begin:end] = bytes([KINDS[str(part.lastgroup)]]) * (end - begin)
    return bytes(found)
