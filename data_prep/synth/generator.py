"""What a generator is: items in, samples out, and everything that it asks goes through one door.

A generator is ordinary code that runs from top to bottom for one item.  It keeps no state of its own: when
a run is killed the item is made again from its beginning, and what was asked before is answered from what is
kept.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from annotated_types import Ge, Le

from megatron_sov.settings import AtLeastOne, NotNegative, one_of

# Bounds that the settings of several generators have, as types.

Temperature = Annotated[float, Ge(0), Le(2)]
"""Of a model that writes."""
Grade = Annotated[float, Ge(0), Le(10)]
"""Least grade of a judge; 0: none is asked."""
Threads = Annotated[AtLeastOne, Le(4096)]
"""Each is a thread of this process."""
Timeout = Annotated[NotNegative, Ge(0.1)]
"""Seconds of an attempt."""
MaxTokensField = Literal["max_tokens", "max_completion_tokens", "none"]
"""max_completion_tokens: what OpenAI's reasoning models take; none: for what refuses both."""


def _identified() -> frozenset[str]:
    from data_prep.quality.identify import KNOWN

    return KNOWN


Identified = Annotated[str, one_of(_identified)]
"""Language that texts are told to be in, as an ISO 639-1 code."""
Kappa = Annotated[float, Ge(-1), Le(1)]
"""Agreement beyond chance."""
PairWeight = Annotated[float, Ge(0), Le(100)]

# What is made: a record of an ordinary source, and what was checked of it.

Kind = Literal["text", "chat", "prompt", "task"]
"""text: a document with `text`, for pretraining; chat: a conversation with `messages` and, where it has
tools, `tools`, for `sft`; prompt: `prompt` and what its reward needs, for `rl generate`; task: a task of a
tool environment."""


@dataclass(frozen=True)
class Verdict:
    """What one check says of one sample."""

    check: str
    """Name of the check; the same for all samples that it refuses."""
    passed: bool
    """Whether the sample may be kept as far as this check is concerned."""
    detail: str = ""
    """What it has seen, for a reader; not needed to understand `check`."""


@dataclass(frozen=True)
class Sample:
    """One sample with its checks; it is kept when all of them pass."""

    record: Mapping[str, Any]
    """In the form of the generator's `kind`, without provenance, which the run adds."""
    verdicts: tuple[Verdict, ...] = ()
    """Of the generator's own checks, in the order in which they ran; the first that fails is the reason."""
    group: str = ""
    """What it shares with others of its item, such as a problem with several solutions; empty: nothing."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Figures for the report and for difficulty, not for training: plain JSON values."""
    kind: Kind | None = None
    """Form of this record where it is another one than the generator's; None: the generator's."""

    @property
    def reason(self) -> str:
        """Return the name of the first check that it does not pass; empty where it is kept."""
        return next((verdict.check for verdict in self.verdicts if not verdict.passed), "")


def writable(sample: Sample) -> Sample:
    """Return a sample as it is where a line of JSON in UTF-8 can hold it; otherwise one without a record
    that says why not: a model may write half of a character as an escape, or a number without end."""
    try:
        json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        why = "holds half of a surrogate pair, which is no character"
    except (ValueError, RecursionError):  # JSON's own
        why = "holds a number that is none, or is nested too deep"
    else:
        return sample
    return Sample({}, (Verdict("form", False, why),), kind=sample.kind)


# Who makes it, of what.

MAX_ATTEMPTS = 3
"""For an answer of use; each with another seed, and kept like any answer."""
Role = Literal["writer", "judge"]
"""writer: the model of --engine; judge: that of --judge-engine, which is the writer where none is named."""


@dataclass(frozen=True)
class Item:
    """What a generator starts from: a document, a seed problem, a task, or only a number."""

    id: str
    """The same in every run over the same input; letters, digits and :._- alone."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What the generator needs of it: plain JSON values."""
    source: str = ""
    """Name of the source or file that it comes from, for provenance."""
    licence: str = ""
    """Of what it was made from; empty: not stated."""


@dataclass(frozen=True)
class Reply:
    """One answer of a model."""

    text: str
    """Without thoughts."""
    thinking: str = ""
    """What it thought first, where the endpoint tells it or it stands between think tags."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """`name` and `arguments` (decoded) of each call; one that is malformed has `error` as well, a sentence
    for the model, and no arguments."""
    is_cut: bool = False
    """Whether it ended at the limit of tokens."""
    key: str = ""
    """Hash of what was asked, for provenance."""


class NoReply(Exception):
    """A model did not answer in spite of all attempts: the item is left for a later run."""


class NoUsableReply(NoReply):
    """A model answered, and all of it was empty, a loop or no grade: a later run would get the same, so
    the item is done and has no samples."""


class Ask(Protocol):
    """The door to models, for one item; any method may raise `NoReply`."""

    def __call__(self, template: str, /, *, count: int = 1, first: int = 0, role: Role = "writer",
                 temperature: float = 0.7, top_p: float = 1.0, max_tokens: int = 1024,
                 thinking: bool | None = None, attempts: int = MAX_ATTEMPTS, **fields: Any) -> list[Reply]:
        """Return answers to a template of the generator's, each drawn with a seed of its own.

        A draw without an answer of use is left out; where all are, that raises `NoUsableReply`.

        Args:
            template: name of a file of `prompts/` without its ending, such as "autoif/constraints".
            count: draws.
            first: number of the first draw, where the draws of one question are asked for in several calls.
            role: which model.
            temperature: of sampling; 0: the likeliest.
            top_p: share of probability that is sampled from.
            max_tokens: that an answer may have.
            thinking: whether a reasoning model thinks first; None: as it does by itself.
            attempts: answers to a draw, each with another seed, before none is of use; 1 where an answer of
                no use is an answer too, as in a measurement.
            fields: what the template names; exactly these.
        """
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (),
             role: Role = "writer", draw: int = 0, temperature: float = 0.7, top_p: float = 1.0,
             max_tokens: int = 1024, thinking: bool | None = None) -> Reply:
        """Return the next message of a conversation; `draw` tells equal requests apart."""
        ...

    def judge(self, rubric: str, material: Mapping[str, str], *, low: float = 0.0,
              high: float = 10.0) -> float:
        """Return the judge's score between `low` and `high` of texts that it is told not to obey."""
        ...


class Generator(ABC):
    """One kind of data, with its settings."""

    name: ClassVar[str]
    """As `sov-data synth NAME` calls it."""
    version: ClassVar[int] = 1
    """Raised when the same answers would give other samples."""
    kind: Kind
    """Form of its records; of the class, or set by the settings of one."""
    help: ClassVar[str]
    """One line for `sov-data synth --list`."""
    templates: ClassVar[Mapping[str, Sequence[str]]]
    """Template -> the fields that it is given; a template that names another one is refused at the start."""
    libraries: ClassVar[Sequence[str]] = ()
    """Modules that it needs and that not every installation has."""
    needs_input: ClassVar[bool] = True
    """Whether it makes nothing without an input."""
    Settings: ClassVar[type[Any]]
    """Frozen dataclass whose types carry the bounds, with `problems() -> list[Problem]` for rules between,
    where there are any."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def files(self) -> Sequence[Path]:
        """Return files beside the input that samples depend on, such as a taxonomy."""
        return ()

    @abstractmethod
    def items(self, inputs: Sequence[Path]) -> Iterator[Item]:
        """Yield what there is to do, in order.

        Raises:
            UserError: an input is not what this generator starts from; the sentence names file and line.
        """

    @abstractmethod
    def make(self, item: Item, ask: Ask) -> Iterator[Sample]:
        """Yield the samples of one item, those that fail a check as well.

        Must be a function of the item, the settings and the answers alone.
        """
