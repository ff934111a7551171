"""Which stretches of a run are repeated: by lot, behind the publication, as anybody can draw them again."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sov.audit.commitment import CHECKPOINT, Commitment
from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import UserError


@dataclass(frozen=True)
class Segment:
    """The steps between two checkpoints that stand next to each other in the log."""

    begin: int
    """Step of the checkpoint before it; 0: the run's start, which is the seed, or the model of --from."""
    end: int

    @property
    def name(self) -> str:
        return f"{self.begin}-{self.end}"


@dataclass(frozen=True)
class Draw:
    """What is repeated, and what that tells."""

    root: str
    """Of the log from which it was drawn."""
    randomness: str
    """What nobody could know before the log was published."""
    drawn: tuple[Segment, ...]
    """The first of the run, which every audit repeats, and others in the order of their lots."""
    num_segments: int
    """From which those others were drawn."""

    @property
    def segments(self) -> list[Segment]:
        """Return all that is repeated, in the order of the run."""
        return sorted(self.drawn, key=lambda segment: segment.end)

    def chance_to_find(self, share: float) -> float:
        """Return how probably at least one is drawn where so large a share of the segments is false."""
        return chance_to_find(share, len(self.drawn) - 1, self.num_segments)


def segments_of(commitment: Commitment) -> list[Segment]:
    """Return the segments of a run, in their order.

    Raises:
        UserError: the log has no checkpoint.
    """
    steps = sorted(int(leaf.name) for leaf in commitment.find(CHECKPOINT))
    if not steps:
        raise UserError(f"{commitment.file}: no checkpoint is published yet; wait for one")
    return [Segment(begin, end) for begin, end in zip([0, *steps], steps, strict=False)]


def chance_to_find(share: float, num_drawn: int, num_segments: int) -> float:
    """Return 1 - C(M - k, n) / C(M, n): of M segments k = ceil(share M) are false, and n are drawn."""
    false = math.ceil(share * num_segments)
    if false == 0 or num_segments == 0:
        return 0.0
    return 1 - math.comb(num_segments - false, num_drawn) / math.comb(num_segments, num_drawn)


def needed(share: float, confidence: float, num_segments: int) -> int:
    """Return how many segments find a fraud of a share with that probability."""
    return next((n for n in range(num_segments + 1) if chance_to_find(share, n, num_segments) >= confidence),
                num_segments)


def draw(commitment: Commitment, randomness: str, num_drawn: int) -> Draw:
    """Return the first segment, and so many of the others: those whose lot is the smallest, which is the hash
    of root, randomness and name.

    Raises:
        UserError: there are not so many.
    """
    if not randomness.isprintable():
        raise UserError(f"randomness {randomness!r}: must be printable text, such as hexadecimal digits")
    first, *others = segments_of(commitment)
    if num_drawn > len(others):
        raise UserError(f"--segments {num_drawn}: {commitment.file} has {len(others)} behind the first, "
                        "which is repeated anyway; ask for fewer")
    by_lot = sorted(others, key=lambda s: hashlib.sha256(
        f"{commitment.root} {randomness} {s.name}".encode()).digest())
    return Draw(commitment.root, randomness, (first, *by_lot[:num_drawn]), len(others))


def write_draw(file: Path, drawn: Draw) -> None:
    atomic_write(file, to_json(asdict(drawn)) + "\n")


def read_draw(file: Path, commitment: Commitment) -> Draw:
    """Return a draw that was written, after it was made again from the log.

    Raises:
        UserError: the file is damaged, or is not what the log and its randomness give.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        given = Draw(str(raw["root"]), str(raw["randomness"]),
                     tuple(Segment(int(s["begin"]), int(s["end"])) for s in raw["drawn"]),
                     int(raw["num_segments"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
        raise UserError(f"{file}: is nothing that `megatron-sov audit draw` wrote ({str(e)[:200]}); draw "
                        "again") from None
    if given.root != commitment.root:
        raise UserError(f"{file}: was drawn from a log with root {given.root[:12]}, and {commitment.file} "
                        f"has {commitment.root[:12]}; use the log from which it was drawn, or draw again")
    if draw(commitment, given.randomness, len(given.drawn) - 1) != given:
        raise UserError(f"{file}: is not what root {given.root[:12]} and its randomness give; draw again")
    return given
