"""Blocks of media are whole whatever a model would like to write: a regular expression of the published form
accepts any reply that the rules allow, and it splits into whole pictures."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from megatron_sov.errors import UserError
from megatron_sov.generate.media_replies import BlockRules
from megatron_sov.generate.spoken import Audio, Image, MarkIds, parts_of
from megatron_sov.media.marks import MARKS, entry
from megatron_sov.media.vocabulary import AUDIO, IMAGE, Block

GRID = 2
NAMES = ["a", "b", "<end>", *MARKS, *(entry(AUDIO, i) for i in range(5)),
         *(entry(IMAGE, i) for i in range(6))]
IDS = {name: i for i, name in enumerate(NAMES)}
BLOCKS = {AUDIO: Block(AUDIO, IDS[entry(AUDIO, 0)], 5), IMAGE: Block(IMAGE, IDS[entry(IMAGE, 0)], 6)}
ROW = rf"(<\|vision\d+\|>){{{GRID}}}<\|vision_eol\|>"
PICTURE = (r"<\|discrete_image_start\|><\|vision_ratio_\d+:\d+\|>"
           rf"({ROW}){{{GRID}}}<\|vision_eof\|><\|discrete_image_end\|>")
SPEECH = r"<\|discrete_audio_start\|>(<\|audio\d+\|>){1,3}<\|discrete_audio_end\|>"


def rules(grid: int = GRID, says: bool = True) -> BlockRules:
    return BlockRules.of(len(NAMES), BLOCKS, IDS.get, grid=grid, says=says, max_audio_tokens=3)


def written(made: BlockRules, seed: int) -> list[int]:
    """Return a reply of a model that finds all allowed tokens the same, and likes to begin media."""
    draw, reply = random.Random(seed), list[int]()
    likes = {IDS[f"<|discrete_{kind}_start|>"] for kind in ("image", "audio")}
    while len(reply) < 200 and reply[-1:] != [IDS["<end>"]]:
        allowed = np.flatnonzero(made.allowed(reply)).tolist()
        reply.append(draw.choice([i for i in allowed if i in likes] or allowed)
                     if draw.random() < 0.3 else draw.choice(allowed))
    return reply


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_allowed_is_well_formed(seed: int) -> None:
    reply = written(rules(), seed)
    text = "".join(NAMES[i] for i in reply)
    assert re.fullmatch(rf"([ab]|{PICTURE}|{SPEECH})*<end>", text), text
    parts = parts_of(reply, list(BLOCKS.values()), MarkIds.of(IDS.get))
    pictures = [part for part in parts if isinstance(part, Image)]
    assert all(part.complete and len(part.tokens) == GRID ** 2 for part in pictures)
    assert len(pictures) == text.count("discrete_image_start")
    assert sum(len(p.tokens) for p in parts if isinstance(p, Audio)) == len(re.findall(r"<\|audio\d", text))


def test_every_well_formed_reply_is_allowed() -> None:
    """No token of it is ruled out: the rules forbid nothing else."""
    picture = ["<|discrete_image_start|>", "<|vision_ratio_9:16|>", entry(IMAGE, 0), entry(IMAGE, 5),
               "<|vision_eol|>", entry(IMAGE, 3), entry(IMAGE, 3), "<|vision_eol|>", "<|vision_eof|>",
               "<|discrete_image_end|>"]
    speech = ["<|discrete_audio_start|>", entry(AUDIO, 4), entry(AUDIO, 0), "<|discrete_audio_end|>"]
    reply = [IDS[name] for name in ["a", *picture, *speech, "b", *speech, *picture, "<end>"]]
    for place, token in enumerate(reply):
        assert rules().allowed(reply[:place])[token], NAMES[token]


def test_what_is_not_asked_for_is_not_begun() -> None:
    text = "".join(NAMES[i] for seed in range(5) for i in written(rules(grid=0, says=False), seed))
    assert re.fullmatch(r"([ab]*<end>)*|[ab]{200}", text)
    speaks = "".join(NAMES[i] for seed in range(5) for i in written(rules(grid=0), seed))
    assert "audio" in speaks and "vision" not in speaks


def test_a_vocabulary_without_such_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no discrete tokens of kind image"):
        BlockRules.of(10, {}, IDS.get, grid=4)
    with pytest.raises(UserError, match="no discrete tokens of kind audio"):
        BlockRules.of(len(NAMES), BLOCKS, {"a": 0}.get, says=True)
