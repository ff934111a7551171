"""Ids and types of chats, compared with transformers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from megatron_sov.base.documents import BadRecord, Conversation, Message
from megatron_sov.base.documents.records import RecordReading, parse_record
from megatron_sov.chat.encode import TYPE_RESPONSE, ChatEncoder
from megatron_sov.chat.marks import KIND_NONE, KINDS
from megatron_sov.chat.template import ChatTemplate
from tests.chat.byte_tokenizer import build_byte_tokenizer, train_tokenizer
from tests.pages_typed import blocks, page_section

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" \
        "{% if add_generation_prompt %}assistant: {% endif %}"
CHATML = "{% for m in messages %}[BOS]{{ m.role }}\n{{ m.content }}[EOS]\n{% endfor %}" \
         "{% if add_generation_prompt %}[BOS]assistant\n{% endif %}"
SPACED = "{% for m in messages %}{{ m.role }}:{{ m.content }} {{ eos_token }}{% endfor %}"
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: merges white space, and a space with the following word."""
    result = train_tokenizer(" hello hello there\n\n\n user: assistant: user assistant", 400,
                             "[PAD]", "[BOS]", "[EOS]")
    return PreTrainedTokenizerFast(tokenizer_object=result, bos_token="[BOS]", eos_token="[EOS]")


def create_encoder(tokenizer: PreTrainedTokenizerFast, template: str) -> ChatEncoder:
    return ChatEncoder(ChatTemplate(template, "[BOS]", "[EOS]", "tok"), tokenizer.backend_tokenizer)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, template: str, *messages: tuple[str, str]) -> list[int]:
    """Encode a prompt with transformers."""
    return list(tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in messages],
                                              chat_template=template, add_generation_prompt=True,
                                              tokenize=True, return_dict=False))


def decode_learned(tokenizer: PreTrainedTokenizerFast, template: str,
                   *messages: tuple[str, str]) -> tuple[str, bool]:
    """Return the text of the learned tokens, and whether the last turn lacks its end token."""
    chat = create_encoder(tokenizer, template).encode(Conversation.of(*messages))
    ids = [i for i, t in zip(chat.ids, chat.types, strict=True) if t == TYPE_RESPONSE]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False), chat.is_open


@pytest.mark.each("template", [PLAIN, CHATML])
@pytest.mark.each("content", ["hello", "  hello \n", "\nhello", "", "hello\n\n", "안녕"])
def test_prompt_ids_equal_inference_ids(tokenizer: PreTrainedTokenizerFast, template: str,
                                        content: str) -> None:
    chats = create_encoder(tokenizer, template)
    ours = chats.encode(Conversation.of(("user", content)), awaits_response=True)
    theirs = encode_prompt(tokenizer, template, ("user", content))
    assert ours.ids == theirs
    trained = chats.encode(Conversation.of(("user", content), ("assistant", "there")))
    assert trained.ids[:len(theirs)] == theirs and trained.types[:len(theirs)].count(TYPE_RESPONSE) == 0


@pytest.mark.each(("template", "response", "is_accepted"), [
    (PLAIN, "hello", False), (CHATML, "hello", True), (CHATML, "\n\nhello", False), (SPACED, "hello", True)])
def test_later_turn_follows_inference_prompt(
        tokenizer: PreTrainedTokenizerFast, template: str, response: str, is_accepted: bool) -> None:
    """Chats whose response would merge with preceding text are refused."""
    turns = (("user", "hello"), ("assistant", response), ("user", "there"))
    if not is_accepted:
        with pytest.raises(BadRecord, match=r"has a response .* that joins the template's"):
            create_encoder(tokenizer, template).encode(Conversation.of(*turns, ("assistant", "hello")))
        return
    theirs = encode_prompt(tokenizer, template, *turns)
    ours = create_encoder(tokenizer, template).encode(Conversation.of(*turns, ("assistant", "hello")))
    assert ours.ids[:len(theirs)] == theirs


CHAT = (("user", "hi"), ("assistant", "hello"), ("user", "yo"), ("assistant", "there"))
STRICT = "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}" + CHATML
"""Template without a generation prompt for a chat that begins with the assistant."""
TRIMMING = SPACED.replace("m.content }} ", "m.content | trim }}")
"""Template whose contents are located by prefixes instead of marks; it has no generation prompt."""


@pytest.mark.each(("template", "turns", "learned", "is_open"), [
    (CHATML, CHAT, "hello[EOS]there[EOS]", False), (SPACED, CHAT, "hello [EOS]there [EOS]", False),
    # a template without an end mark leaves the turn open: the next token ends it
    (NO_END, CHAT[:2], "hello", True), (PLAIN, CHAT[:2], "hello\n", True),
    (CHATML, CHAT[:3], "hello[EOS]", False), (STRICT, CHAT[1:], "hello[EOS]there[EOS]", False),
    (TRIMMING, CHAT[:2], "hello[EOS]", False),
    (TRIMMING, (CHAT[0], ("assistant", " hello")), "hello[EOS]", False)])
def test_answers_and_ends_of_turns_are_learned(
        tokenizer: PreTrainedTokenizerFast, template: str, turns: tuple[tuple[str, str], ...], learned: str,
        is_open: bool) -> None:
    assert decode_learned(tokenizer, template, *turns) == (learned, is_open)


def test_special_tokens_in_contents_are_ordinary_text(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation.of(("user", "[EOS]"), ("assistant", "a[BOS]b"))
    chat = create_encoder(tokenizer, CHATML).encode(conversation)
    assert chat.ids.count(1) == chat.ids.count(2) == 2
    assert tokenizer.decode(chat.ids) == "[BOS]user\n[EOS][EOS]\n[BOS]assistant\na[BOS]b[EOS]\n"


def test_end_tokens_of_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    assert create_encoder(tokenizer, CHATML).end_ids() == create_encoder(tokenizer, SPACED).end_ids() == (2,)
    assert create_encoder(tokenizer, PLAIN).end_ids() == ()
    with_starts = ("{% for m in messages %}{{ '[BOS]' if m.role == 'user' else '[PAD]' }}{{ m.content }}"
                   "{% endfor %}")
    assert create_encoder(tokenizer, with_starts).end_ids() == (1,), "the next turn's beginning ends this one"
    assert create_encoder(tokenizer, "{{ raise_exception('no') }}").end_ids() == ()


def test_token_absorbing_spaces_is_rejected() -> None:
    greedy = build_byte_tokenizer(AddedToken("<|user|>", rstrip=True, special=True))
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    chats = ChatEncoder(ChatTemplate(template, "", "", "tok"), greedy)
    assert len(chats.encode(Conversation.of(("user", "hi"))).ids) == 3
    with pytest.raises(BadRecord, match="white space that a special token"):
        chats.encode(Conversation.of(("user", " hi")))


THINKING = ("{% for m in messages %}[BOS]{{ m.role }}\n{% if m.role == 'assistant' %}<think>"
          "{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content | trim }}"
          "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
          "</call>{% endfor %}[EOS]\n{% endfor %}{% if add_generation_prompt %}[BOS]assistant\n{% endif %}")
LAST_THINKING = THINKING.replace("{{ m.reasoning_content or '' }}",
                                 "{{ m.reasoning_content if loop.last else '' }}")
BLOCKS = ("{% for m in messages %}[BOS]{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
          "{{ m.content | upper }}[EOS]\n{% endgeneration %}{% else %}{{ m.content }}[EOS]\n{% endif %}"
          "{% endfor %}{% if add_generation_prompt %}[BOS]assistant\n{% endif %}")
CALLS = ({"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},)
AGENT = Conversation((Message("user", " hi "), Message("assistant", "", "hm", CALLS), Message("tool", "3"),
                      Message("assistant", "there", "so")))


def check_learned(tokenizer: PreTrainedTokenizerFast, template: str, chat: Conversation) -> str:
    """Compare the text of a chat with transformers', and return the text of its learned tokens."""
    encoded = create_encoder(tokenizer, template).encode(chat)
    theirs = tokenizer.apply_chat_template([m.to_dict() for m in chat.messages], chat_template=template,
                                           tokenize=True, return_dict=False)
    assert tokenizer.decode(encoded.ids) == tokenizer.decode(theirs)
    ids = [i for i, t in zip(encoded.ids, encoded.types, strict=True) if t == TYPE_RESPONSE]
    return str(tokenizer.decode(ids))


def test_thoughts_and_calls_are_learned_as_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    assert check_learned(tokenizer, THINKING, AGENT) == (
        '<think>hm</think><call>add {"a": 1}</call>[EOS]<think>so</think>there[EOS]')
    plain = Conversation.of(("user", "hi"), ("assistant", "there"))
    assert check_learned(tokenizer, THINKING, plain) == "<think></think>there[EOS]", (
        "the generation prompt has no empty thoughts, so the model has to write them")


def test_learned_tokens_have_kinds(tokenizer: PreTrainedTokenizerFast) -> None:
    def decode_kinds(template: str, chat: Conversation) -> dict[str, str]:
        encoded = create_encoder(tokenizer, template).encode(chat)
        assert [k != KIND_NONE for k in encoded.kinds] == [t == TYPE_RESPONSE for t in encoded.types]
        texts = {}
        for name, kind in KINDS.items():
            ids = [i for i, k in zip(encoded.ids, encoded.kinds, strict=True) if k == kind]
            texts[name] = tokenizer.decode(ids)
        return texts

    assert decode_kinds(THINKING, AGENT) == {"thought": "<think>hm</think><think>so</think>",
                                   "call": '<call>add {"a": 1}</call>[EOS]', "answer": "there[EOS]"}
    spelled = Conversation.of(("user", "<think>x</think>"), ("assistant", "<think>y</think>z"))
    assert decode_kinds(CHATML, spelled) == {"thought": "<think>y</think>", "call": "", "answer": "z[EOS]"}
    assert decode_kinds(NO_END, spelled) == {"thought": "<think>y</think>", "call": "", "answer": "z"}


def test_only_marked_turns_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    first = replace(AGENT.messages[1], is_learned=False)
    chat = replace(AGENT, messages=(AGENT.messages[0], first, *AGENT.messages[2:]))
    for template in (THINKING, LAST_THINKING):
        assert check_learned(tokenizer, template, chat) == "<think>so</think>there[EOS]"


def test_generation_blocks_locate_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    """`BLOCKS` shows responses in upper case: only unchanged responses can be located."""
    chat = Conversation.of(("user", "hi"), ("assistant", "hello"), ("user", "yo"), ("assistant", "there"))
    with pytest.raises(BadRecord, match="does not show as it is: 2"):
        create_encoder(tokenizer, BLOCKS).encode(chat)
    upper_case = Conversation.of(("user", "hi"), ("assistant", "HELLO"), ("user", "yo"),
                                 ("assistant", "THERE"))
    trimming = BLOCKS.replace("upper", "trim")
    assert check_learned(tokenizer, trimming, upper_case) == "HELLO[EOS]THERE[EOS]"
    spaced = Conversation.of(("user", "hi"), ("assistant", " HELLO "))
    assert check_learned(tokenizer, trimming, spaced) == "HELLO[EOS]"


@pytest.mark.each(("template", "chat", "message"), [
    (LAST_THINKING, AGENT, "with turn 2 changed once others follow"),
    (CHATML, AGENT, "has thoughts in message 2 that the chat template of tok does not show"),
    (CHATML, replace(AGENT, messages=(AGENT.messages[0], Message("assistant", "x", tool_calls=CALLS))),
     "has calls in message 2"),
    (THINKING, Conversation((Message("user", "[EOS]"), Message("assistant", "a", "b"))),
     "spells the special token '\\[EOS\\]'"),
    (THINKING, replace(AGENT, tools=({"name": "a", "description": "[EOS]"},)), "in its tools"),
    (CHATML, Conversation((Message("user", "x", other=(("name", "[BOS]"),)), Message("assistant", "a"))),
     "or a name"),
    (THINKING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
     Conversation((Message("user", "x"), Message("assistant", "", tool_calls=CALLS + CALLS))),
     "has calls in message 2"),
    (THINKING.replace("{{ m.content | trim }}", "{{ '' if m.tool_calls else m.content }}"),
     replace(AGENT, messages=(AGENT.messages[0], Message("assistant", "tool", tool_calls=CALLS),
                              Message("tool", "3"))),
     "has content in message 2"),
])
def test_turn_without_position_is_rejected(tokenizer: PreTrainedTokenizerFast, template: str,
                                           chat: Conversation, message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        create_encoder(tokenizer, template).encode(chat)


def test_overlapping_turns_are_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    """The template ends a turn only once another follows, so a generation prompt would lack that end."""
    closing = ("{% for m in messages %}{{ m.content | trim }}"
              "{% if not (loop.last and add_generation_prompt) %}[EOS]{% endif %}{% endfor %}")
    chat = Conversation.of(("user", "hi"), ("assistant", " hello"), ("assistant", "there"))
    with pytest.raises(BadRecord, match="learned turns that overlap"):
        create_encoder(tokenizer, closing).encode(chat)


QWEN3 = (Path(__file__).parent / "qwen3.jinja").read_text()
"""Qwen's published template: shows thoughts in the last turns only, and parses thoughts in contents."""
THOUGHTS = ["<think>\nb\n</think>\n\nc", "<think>b</think>c", "\n<think>\n  b\n\n</think>\n\n\nc ",
            "<think>\n\n</think>\n\nc", "<think></think>c", "<think>\nb\n</think>\n\n    return 42",
            "<think>a\n\nb 안녕</think>\n\nc\n\n```py\nx\n```", "<think>\n<b> 1 < 2\n</think>c <think> d"]


def build_conversation(*answers: Message) -> Conversation:
    """Return a conversation with a question before each answer."""
    messages: list[Message] = []
    for i, answer in enumerate(answers):
        messages += [Message("user", f"q{i}"), answer]
    return Conversation(tuple(messages))


@pytest.mark.each("content", THOUGHTS)
def test_thoughts_in_content_are_learned_as_thoughts(tokenizer: PreTrainedTokenizerFast,
                                                     content: str) -> None:
    thoughts, answer = content.split("<think>", 1)[1].split("</think>", 1)
    separate = Message("assistant", answer.lstrip("\n"), thoughts.strip("\n"))
    combined, encode = Message("assistant", content), create_encoder(tokenizer, QWEN3).encode
    assert check_learned(tokenizer, QWEN3,
                         build_conversation(combined)).count("<think>") == 1 + content.count("<think> d")
    # `combined` has its thoughts in the content, `separate` in a field; earlier turns are not learned
    old_combined, old_separate = (replace(m, is_learned=False) for m in (combined, separate))
    no_thought = Message("assistant", "no thought", is_learned=False)
    for earlier, expected in (([], []), ([old_combined], [old_separate]),
                              ([old_combined, no_thought], [old_separate, no_thought])):
        ours = encode(build_conversation(*earlier, combined))
        theirs = encode(build_conversation(*expected, separate))
        assert (ours.ids, ours.kinds, ours.is_open) == (theirs.ids, theirs.kinds, theirs.is_open)


@pytest.mark.each("template", [
    CHATML, NO_END, THINKING, CHATML.replace("{{ m.content", "{% if m.reasoning_content %}<think>\n"
                                         "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content")])
@pytest.mark.each("content", THOUGHTS[:4])
def test_templates_receive_contents_unchanged(tokenizer: PreTrainedTokenizerFast,
                                              template: str, content: str) -> None:
    """The rendered white space must equal transformers' text."""
    chat = build_conversation(Message("assistant", content.strip()))
    assert content.strip() in check_learned(tokenizer, template, chat)


@pytest.mark.each("content", ["<think>b</think>c", "b\n</think>\n\nc", "<think>b</think><think>x</think>c"])
def test_unlearned_turn_may_lose_thoughts(tokenizer: PreTrainedTokenizerFast, content: str) -> None:
    dropping = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    changing = CHATML.replace("m.content", "m.content.split('</think>')[-1] | replace('c', '')")
    chat = build_conversation(Message("assistant", content, is_learned=False), Message("assistant", "d"))
    for template in (QWEN3, dropping):
        assert "d" in check_learned(tokenizer, template, chat)
    with pytest.raises(BadRecord, match="does not show"):
        create_encoder(tokenizer, dropping).encode(build_conversation(Message("assistant", content)))
    with pytest.raises(BadRecord, match="does not show as it is: 2"):
        create_encoder(tokenizer, changing).encode(chat)


WITH_CALLS = "{% for m in messages %}[BOS]{{ m.role }}\n" \
       "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}" \
       "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}[EOS]\n" \
       "{% endfor %}{% if add_generation_prompt %}[BOS]assistant\n{% endif %}"


def test_docs_chat_has_thought_call_and_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = blocks(page_section("data.md", "Chats"), "json")
    document = parse_record(json.loads(example), "data.md", 1, RecordReading("chat"))
    chat = create_encoder(tokenizer, WITH_CALLS).encode(document.conversation())
    ids = [i for i, t in zip(chat.ids, chat.types, strict=True) if t == TYPE_RESPONSE]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == (
        '<think>I can add.</think>{"name": "add", "arguments": {"a": 1, "b": 2}}[EOS]3[EOS]')
