"""What a team says of its model that no manifest knows: a YAML file; the card marks it as stated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.settings import read_file
from megatron_sov.settings.reading import Text

ANSWERS = "answers"
"""What the card calls the file, wherever it lies."""
MOST = 1e6


@dataclass(frozen=True)
class Answers:
    """What a team says; an empty field is one that nobody has filled in."""

    name: Text = ""
    """Name of the model for readers."""
    description: Text = ""
    """What the model is, in a few sentences."""
    licence: Text = ""
    """Licence of the weights, as the Hugging Face hub names it where it does."""
    licence_link: Text = ""
    """Where its text stands."""
    contact: Text = ""
    """Who answers for the model."""
    base_model: tuple[Text, ...] = ()
    """Names on the Hugging Face hub of the models that it was made from."""
    datasets: tuple[Text, ...] = ()
    """Names on the Hugging Face hub of data sets that it was trained on."""
    languages: tuple[Text, ...] = ()
    """Codes of the languages that it is meant for, such as ko."""
    tags: tuple[Text, ...] = ()
    """Further tags."""
    intended_use: Text = ""
    """Tasks that it is meant for, and the systems that it can be built into."""
    out_of_scope: Text = ""
    """What it is not meant for."""
    acceptable_use: Text = ""
    """The acceptable use policy, or where it stands."""
    limitations: Text = ""
    """Known limits, risks and biases."""
    release_date: Text = ""
    """Date of release."""
    distribution: Text = ""
    """How it is handed out."""
    integration: Text = ""
    """What is needed to build it into a system: instructions, infrastructure, tools."""
    rationale: Text = ""
    """Key choices of the design, with reasons and assumptions."""
    data_obtained: Text = ""
    """How data was obtained and selected; how unsuitable sources and biases were looked for."""
    evaluation_strategy: Text = ""
    """How the model is evaluated: criteria, metrics, how limits are found."""
    adversarial_testing: Text = ""
    """Red teaming and adaptations for safety."""
    system_architecture: Text = ""
    """How software components build on each other."""
    region: Text = ""
    """Where it was trained."""
    intensity_g_per_kwh: Annotated[float, Ge(0), Le(MOST)] | None = None
    """Grams of CO2 equivalents that a kilowatt hour emits there."""
    pue: Annotated[float, Ge(1), Le(MOST)] | None = None
    """Energy of the whole site over that of its computers."""
    power_w: Annotated[float, Ge(0), Le(MOST)] | None = None
    """Watts of one process with its share of the machine, where nothing measured them."""
    licences: Mapping[str, Text] = field(default_factory=dict)
    """Source of the data -> its licence, where its manifest has none."""


def read_answers(file: Path) -> Answers:
    """Return what an --answers file says.

    Raises:
        UserError: it cannot be read, or breaks rules; all of them are told.
    """
    return read_file(Answers, file, f"--answers {file}")
