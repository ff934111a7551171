"""What a team says of its data that no manifest knows: a YAML file, each mistake in which is told at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_sov.errors import UserError, list_problems, nearest
from megatron_sov.settings import read_file
from megatron_sov.settings.reading import Text

Category = Literal["public", "licensed", "third_party", "crawled", "user", "synthetic", "other", ""]
CATEGORIES: dict[str, str] = {
    "public": "publicly available datasets", "licensed": "commercially licensed datasets",
    "third_party": "private datasets of third parties", "crawled": "crawled and scraped from online sources",
    "user": "user data", "synthetic": "synthetic data", "other": "other sources", "": "not recorded"}
"""Where a source stands in section 2 of the European Commission's template."""


@dataclass(frozen=True)
class AboutSource:
    """What is known of one source beside the pipeline."""

    category: Category = ""
    """One of public, licensed, third_party, crawled, user, synthetic, other."""
    description: Text = ""
    """What it is, in a sentence."""
    link: Text = ""
    """Where it can be found."""
    collected_from: Text = ""
    """First month in which it was collected, e.g. 2024-01."""
    collected_to: Text = ""
    """Last month."""
    crawlers: tuple[Text, ...] = ()
    """Names of the crawlers, as they told them to servers."""
    crawler_purposes: Text = ""
    """What the crawlers collect for."""
    crawler_behaviour: Text = ""
    """How crawlers treat robots.txt, captchas, paywalls."""
    is_publicly_known: bool | None = None
    """Of a private dataset of a third party: whether the public knows that it exists, so that it is named."""
    generated_by: tuple[Text, ...] = ()
    """General-purpose models on the market that wrote synthetic text."""
    generated_by_others: Text = ""
    """Other models that wrote it, the provider's own among them, and what they were trained on."""
    services: Text = ""
    """Services of the provider whose users' data it is."""
    is_from_model: bool | None = None
    """Of user data: whether users gave it to the model itself (prompts), and not to another service."""


@dataclass(frozen=True)
class About:
    """What a team says; an empty field is one that nobody has filled in."""

    name: Text = ""
    """Name of the data for readers."""
    version: Text = ""
    """Version of the public summary, e.g. 1.2."""
    updated: Text = ""
    """Date of its last update."""
    description: Text = ""
    """What the data is for, in a few sentences."""
    licence: Text = ""
    """Licence of the collection as a whole; that of each source is in its manifest."""
    link: Text = ""
    """Where the data or the model is published."""
    provider: Text = ""
    """Provider's name and contact details."""
    representative: Text = ""
    """Authorised representative in the Union, where the provider is established elsewhere."""
    models: tuple[Text, ...] = ()
    """Versioned names of the models that the data trains."""
    dependencies: Text = ""
    """Models that these were made from."""
    market_date: Text = ""
    """Date of placement on the Union market."""
    types_of_content: Text = ""
    """Such as fiction, scientific text, press, source code."""
    collected_until: Text = ""
    """Latest date of acquisition or collection, e.g. 2026-10."""
    is_continuous: bool | None = None
    """Whether the model goes on being trained on new data after that date."""
    languages: Text = ""
    """On the languages, beside the figures."""
    characteristics: Text = ""
    """Other relevant characteristics, such as regional or demographic ones."""
    is_small: bool | None = None
    """Whether the provider is a small or medium-sized enterprise, which names fewer domains."""
    is_signatory: bool | None = None
    """Whether the provider signed the Code of Practice for general-purpose AI models."""
    opt_outs: Text = ""
    """How reservations of rights from text and data mining are respected."""
    illegal_content: Text = ""
    """How illegal content is removed, beside the steps of the pipeline."""
    comments: Text = ""
    """Anything else."""
    sources: Mapping[str, AboutSource] = field(default_factory=dict)
    """Name of a source in the pipeline's file -> what is known of it."""


def read_about(file: Path, sources: Collection[str]) -> About:
    """Return what an --about file says.

    Args:
        file: the YAML file.
        sources: names of the sources that it may describe.

    Raises:
        UserError: it cannot be read, or breaks rules; all of them are told.
    """
    about = read_file(About, file, f"--about {file}")
    if strange := [name for name in about.sources if name not in sources]:
        raise UserError(list_problems(f"--about {file}", [
            f"sources.{name}: the data has no such source{nearest(name, sources)}" for name in strange],
            f"sources are {', '.join(sources) or 'none'}"))
    return about
