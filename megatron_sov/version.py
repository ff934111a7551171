"""What is distributed: the version, for the wheel and for provenance, and the packages.

setup.py runs this file alone, so it imports nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"

OUR_PACKAGES = ("megatron_sov", "tokenizer", "data_prep", "slurm")
"""Packages at the top of the tree, in the wheel and in the copy of the code that jobs run;
`slurm` holds data alone."""

PARTS = {
    "tokenizer": ("tokenizer",),
    "data": ("data_prep",),
    "synth": ("data_prep.synth",),
    "publish": ("megatron_sov.publish", "megatron_sov.commands.operate.report",
                "megatron_sov.commands.operate.ladder", "megatron_sov.commands.operate.watch",
                "megatron_sov.commands.models.card"),
    "omni": ("megatron_sov.omni", "megatron_sov.commands.models.codec",
             "megatron_sov.commands.evaluate.eval_media", "data_prep.media"),
    "serve": ("megatron_sov.serve", "megatron_sov.commands.models.serve",
              "megatron_sov.commands.models.chat"),
}
"""Part that an installation can do without -> its packages and modules; all others are the core."""


def part_of(module: str) -> str:
    """Return the part that `module` or `module:NAME` is in; "" for the core.  The longest name counts, since
    parts lie inside of others."""
    module = module.partition(":")[0]
    found = [(len(name), part) for part, names in PARTS.items() for name in names
             if f"{module}.".startswith(f"{name}.")]
    return max(found)[1] if found else ""
