"""Settings classes with a field of every type that the settings reader supports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Le, MinLen

from megatron_sov.base.settings import (
    UNIQUE_ITEMS, AtLeastOne, NotBlank, NotNegative, ProblemCode, SettingsProblem, Share, choice_from)


@dataclass(frozen=True)
class Block:
    size: Annotated[AtLeastOne, Le(1_000_000)] = 1
    share: Share = 0.5


@dataclass(frozen=True)
class Recipe:
    name: str
    block: Block = Block()
    blocks: tuple[Block, ...] = (Block(),)
    maybe: Block | None = None
    kind: Literal["adamw", "muon"] = "adamw"
    weights: dict[str, NotNegative] = field(default_factory=dict)
    either: int | str | None = None
    file: Path = Path("a")
    pairs: tuple[tuple[int, int], ...] = ()
    words: Annotated[tuple[NotBlank, ...], MinLen(1), UNIQUE_ITEMS] = ("a",)
    language: Annotated[str, choice_from(lambda: ("", "ko", "en"))] = ""
    on: bool = False

    def problems(self) -> list[SettingsProblem]:
        """Refuse a size that the kind does not have."""
        if self.kind == "muon" and self.block.size == 1:
            return [SettingsProblem(ProblemCode.RULE, "block.size", "must be above 1 with kind = muon", 1,
                                    "set it")]
        return []
