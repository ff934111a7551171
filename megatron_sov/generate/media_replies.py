"""A model that is shown pictures and sounds, and that draws and speaks: from parts to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.errors import UserError
from megatron_sov.generate.asking import Asker, check_engine, check_length
from megatron_sov.generate.block_rules import BlockRules
from megatron_sov.generate.engine import MEGATRON, Engine, run_engine
from megatron_sov.generate.made_media import Made, MediaDecoders
from megatron_sov.generate.request import Batching, Sampling, Stop
from megatron_sov.generate.shown_media import ShownMedia
from megatron_sov.generate.spoken import MarkIds
from megatron_sov.media.banks import PICTURES, SOUNDS
from megatron_sov.media.data_codecs import banks_of, codecs_of, refuse_other_codecs
from megatron_sov.media.reading.reader import MediaReader
from megatron_sov.media.vocabulary import AUDIO, IMAGE, Block
from megatron_sov.obs.warning import warn

if TYPE_CHECKING:
    from megatron_sov.generate.target import Target

Parts = Sequence[Mapping[str, Any]]
"""What a user shows and says: {"type": "text", "text": ...} or {"type": "image" | "audio", "path": ...}."""


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


@dataclass(frozen=True)
class Replied:
    """What a model made of one prompt."""

    text: str
    """What it wrote."""
    made: Made
    """What it drew and said."""


def blocks_of(target: Target) -> dict[str, Block]:
    """Return kind -> ids of a model's codebooks; {} where it has none."""
    model = target.model
    found = {AUDIO: model.audio_tokens, IMAGE: model.image_tokens}
    return {kind: Block(kind, block.first, block.size) for kind, block in found.items() if block is not None}


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
    wanted = {*asking.out, *asking.shown.tokenizers}
    if lacking := sorted(wanted - set(blocks)):
        raise UserError(f"{target.path}: has no discrete tokens of kind {lacking[0]} "
                        f"(model.{lacking[0]}_tokens is not set); ask one that was trained on "
                        "media, or leave these options out")
    _refuse_features(target, prompts)
    known = codecs_of(target.config.data.paths) if target.config is not None else {}
    refuse_other_codecs(asking.shown.tokenizers, known, "--{kind}-tokenizer")
    asking.decoders.check(blocks)
    asker = Asker(target, asking.chat, with_media=True)
    with MediaReader(asking.shown.root) as reader:
        texts = [asking.shown.text(parts, reader, f"prompt {n}") for n, parts in enumerate(prompts, 1)]
    ids = asker.ask(texts)
    rules = BlockRules.of(target.vocab_size, blocks, asker.id_of, says=AUDIO in asking.out,
                          grid=asking.decoders.grid if IMAGE in asking.out else 0,
                          max_audio_tokens=asking.max_audio_tokens)
    sampling = replace(asking.sampling, rules=rules)
    longest = max(map(len, ids)) + sampling.max_new_tokens
    check_length(target, longest, "prompt and --max-new-tokens", "shorten one of them")
    check_engine(MEGATRON, target, settings, nproc)
    stop = Stop(asker.end_ids)

    def work(engine: Engine) -> list[list[int]]:
        return engine.generate(ids, sampling, stop=stop).continuations

    found: list[list[int]] | None = run_engine(MEGATRON, target, work, longest=longest, settings=settings,
                                               batching=asking.batching, nproc=nproc)
    if found is None:
        return None
    marks = MarkIds.of(asker.id_of)
    told = []
    for number, reply in enumerate(found):
        made = asking.decoders.write(reply, list(blocks.values()), marks, f"{number:05d}", asking.out)
        told.append(Replied(asker.decode(made.text).strip(), made))
    return told


def _refuse_features(target: Target, prompts: Sequence[Parts]) -> None:
    """Raise `UserError` where a model has learned from features of what is shown: it would see less of it
    here than in training."""
    model, shown = target.model, {part.get("type") for parts in prompts for part in parts}
    banks = banks_of(target.config.data.paths) if target.config is not None else None
    for kind, bank, encoder in ((IMAGE, PICTURES, model.vision), (AUDIO, SOUNDS, model.audio)):
        if encoder is None or kind not in shown:
            continue
        if banks is None:
            warn(f"{target.path}: has an encoder of {bank}, which prompts do not reach: they show discrete "
                 "tokens alone")
        elif bank in banks:
            raise UserError(f"{target.path}: has learned from features of {bank} (model."
                            f"{'vision' if kind == IMAGE else kind}), and prompts show discrete tokens "
                            f"alone; ask a model that was trained without them, or ask without {kind}s")
