"""What a policy reads beside its responses: text, and chats as text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sov.chat.encode import TYPE_TEXT
from megatron_sov.config import PolicyConfig
from megatron_sov.data.token_shards import open_sources
from megatron_sov.errors import UserError
from megatron_sov.post.policy_data import check_sources, texts_of
from megatron_sov.recipes import get


def test_chats_are_text_of_which_the_assistants_turns_are_learned(packed_data: Any) -> None:
    config = get("tiny-solar-open")
    paths = {str(packed_data.chats): 1.0}
    config = replace(config, data=replace(config.data, paths=paths), policy=PolicyConfig(method="ink_grpo"))
    (text,) = texts_of(config)
    check_sources(config, [text])
    (chats,) = open_sources(paths, config.model.vocab_size)
    ours, packed = text.shard("train"), chats.shard("train")
    assert text.format == "text" and not text.num_tokens["heldout"] and len(ours.lengths) > 3
    for document, count in enumerate(map(int, ours.lengths)):
        weights = ours.loss_weights(document, 0, count)
        assert (weights == packed.loss_weights(document, 0, count)).all() and 0 < weights.sum() < count
        assert (ours.types(document, 0, count) == TYPE_TEXT).all()
        assert (ours.tokens(document, 0, count) == packed.tokens(document, 0, count)).all()
    # a method that learns no text has nothing to learn of them
    with pytest.raises(UserError, match="holds data of format 'chat'"):
        texts_of(replace(config, policy=PolicyConfig(method="dapo")))
