"""Sizes of published models, against which tests check the figures of their pages."""

from functools import cache
from pathlib import Path

import yaml

from megatron_sov.plan.speed.workload import ModelShape


@cache
def published_shapes() -> dict[str, ModelShape]:
    """Return model name -> sizes, read from `published_models.yaml`."""
    rows = yaml.safe_load(Path(__file__).with_name("published_models.yaml").read_text(encoding="utf-8"))
    return {name: ModelShape(**sizes) for name, sizes in rows.items()}
