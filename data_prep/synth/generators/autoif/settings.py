"""The settings of the generator `autoif`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from data_prep.synth.generator import Grade, Temperature
from data_prep.synth.generators.autoif.constraints import SPACELESS, Named
from data_prep.synth.generators.autoif.kept_constraints import FILE
from megatron_sov.base.documents.scripts import LANGUAGES
from megatron_sov.base.settings import AtLeastOne, SettingsProblem, Share, at_most, find_broken, one_of
from megatron_sov.judge.rewards.constraint import INSTALLED, Segmenter

SCRIPTS = frozenset(script for scripts in LANGUAGES.values() for script in scripts)


@dataclass(frozen=True)
class AutoIfSettings:
    """How answers that keep constraints are made; the values are Typhoon-S's where nothing else is said."""

    constraints: str = ""
    """Folder of the generator `constraints`, or a JSONL file in its form."""
    language: Named = "ko"
    """Of queries and answers."""
    translate: bool = True
    """Translate queries in other languages; without, they are refused."""
    constraints_per_query: AtLeastOne = 1
    """Different ones, each of which makes an item of its own; AutoIF takes 16 queries for a constraint."""
    system_share: Share = 0.5
    """Of the conversations, that have the constraint in the system turn."""
    num_responses: AtLeastOne = 2
    """Answers to each query."""
    temperature: Temperature = 0.7
    """Of answers."""
    max_tokens: Annotated[int, Ge(16)] = 4096
    """Of an answer; one that is longer is refused."""
    min_query_chars: Annotated[AtLeastOne, at_most("max_query_chars")] = 4
    """Of a query, without white space around it (AutoIF: 20; ours is for languages that are short)."""
    max_query_chars: AtLeastOne = 2000
    """Likewise (AutoIF: 300)."""
    toxic: bool = False
    """Take records that say `toxic: true`, as WildChat's do."""
    segmenter: Annotated[Literal["auto", "none", "rules", "pythainlp"], INSTALLED] = "auto"
    """Whether functions see an answer with its sentences and words set apart as well: none; rules: line ends
    end sentences; pythainlp: by that library; auto: rules for languages without blanks, else none."""
    foreign_scripts: tuple[Annotated[str, one_of(lambda: SCRIPTS)], ...] = ("CJK",)
    """Of which no letter may stand in an answer, unless the query has it: CJK for teachers that slip into
    Chinese, as Qwen does.  Scripts of the language itself are left out."""
    min_score: Grade = 7.0
    """Of the judge, from 0 to 10 (the authors' README; their code asks for more than 8)."""
    also: Literal["", "prompts", "pairs"] = ""
    """prompts: a prompt with its functions as well, for the reward `constraint`; pairs: an answer that was
    kept, and that half of the functions accept, beside one that none does, for `prefer`."""
    call_time_s: Annotated[float, Ge(1), Le(60)] = 5.0
    """Of a processor, for a function and a text."""
    modules: tuple[str, ...] = ()
    """That functions may import beside those that compute on texts, where this machine has them."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not fit together, and what is missing."""
        folder, made = Path(self.constraints), "name the folder that `sov-data synth constraints` has written"
        if self.constraints and folder.is_dir():
            made = "let `sov-data synth constraints` come to its end there"
        return find_broken(
            self, "", (bool(self.constraints), "constraints", "is not set", made),
            (folder.exists(), "constraints", "does not exist", made),
            (not self.constraints or not folder.is_dir() or (folder / FILE).is_file(), "constraints",
             f"has no {FILE}", made),
            (self.also != "pairs" or self.num_responses > 1, "also", "needs num_responses of at least 2"))

    @property
    def views(self) -> Segmenter:
        """Return how functions see answers."""
        if self.segmenter == "auto":
            return "rules" if self.language in SPACELESS else "none"
        return self.segmenter

    @property
    def foreign(self) -> frozenset[str]:
        """Return the scripts of which no letter may stand in an answer."""
        return frozenset(self.foreign_scripts) - set(LANGUAGES.get(self.language, ()))
