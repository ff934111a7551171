"""A model that is shown pictures and sounds, and that draws and speaks: from parts to files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov.generate.asking import check_length
from megatron_sov.generate.block_rules import BlockRules
from megatron_sov.generate.made_media import Made, MediaDecoders
from megatron_sov.generate.media_prompts import Parts, blocks_of, prompts_of, refuse_unknown_kinds
from megatron_sov.generate.request import Batching, Sampling, Stop
from megatron_sov.generate.shown_media import ShownMedia
from megatron_sov.generate.spoken import MarkIds
from megatron_sov.media.vocabulary import AUDIO, IMAGE

if TYPE_CHECKING:
    from megatron_sov.generate.load import Loaded
    from megatron_sov.generate.target import Target


@dataclass(frozen=True)
class Asking:
    """How a model is asked, and where what it makes is written."""

    shown: ShownMedia
    """What sees and hears."""
    decoders: MediaDecoders
    """What draws and speaks."""
    out: dict[str, Path]
    """`IMAGE` or `AUDIO` -> folder for files; a kind without one is not made."""
    sampling: Sampling
    """How tokens are chosen."""
    chat: bool = True
    """Whether prompts are framed by the chat template."""
    max_audio_tokens: int = 0
    """Longest speech; 0: as long as the reply may be."""
    batching: Batching = Batching()
    """What bounds memory."""
    with_features: bool = True
    """Whether encoders see what is shown, where the model has learned from their features."""


@dataclass(frozen=True)
class Replied:
    """What a model made of one prompt."""

    text: str
    """What it wrote."""
    made: Made
    """What it drew and said."""


def replies(target: Target, prompts: Sequence[Parts], asking: Asking, *, settings: Sequence[str] = (),
            nproc: int | None = None) -> list[Replied] | None:
    """Ask a model, and write what it draws and says.

    Args:
        target: the model.
        prompts: of each, what a user shows and says.
        asking: how, and where files go: they are called by the prompt's number.
        settings: `key=value` changes of layout and precision.
        nproc: local processes.

    Returns:
        The replies; None on other processes than the first of a torchrun or Slurm job.

    Raises:
        UserError: the model has no tokens of such media, a codec is another one than that of its data, or a
            medium cannot be read.
    """
    blocks = blocks_of(target)
    refuse_unknown_kinds(target, asking.out)
    asked = prompts_of(target, prompts, asking.shown, chat=asking.chat, with_features=asking.with_features)
    asking.decoders.check(blocks)
    asker, ids = asked.asker, asked.ids
    rules = BlockRules.of(target.vocab_size, blocks, asker.id_of, says=AUDIO in asking.out,
                          grid=asking.decoders.grid if IMAGE in asking.out else 0,
                          max_audio_tokens=asking.max_audio_tokens)
    sampling = replace(asking.sampling, rules=rules)
    longest = max(map(len, ids)) + sampling.max_new_tokens
    check_length(target, longest, "prompt and --max-new-tokens", "shorten one of them")
    stop = Stop(asker.end_ids)

    def work(loaded: Loaded) -> list[list[int]]:
        from megatron_sov.generate.generator import MegatronEngine

        engine = MegatronEngine(loaded.policy, asking.batching)
        return engine.generate(ids, sampling, stop=stop, media=asked.media).continuations

    from megatron_sov.generate.load import run_forward_model

    found: list[list[int]] | None = run_forward_model(target, list(settings), nproc, work)
    if found is None:
        return None
    marks = MarkIds.of(asker.id_of)
    told = []
    for number, reply in enumerate(found):
        made = asking.decoders.write(reply, list(blocks.values()), marks, f"{number:05d}", asking.out)
        told.append(Replied(asker.decode(made.text).strip(), made))
    return told
