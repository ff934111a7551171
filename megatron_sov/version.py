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
    "curate": ("data_prep.curate",),
    "synth": ("data_prep.synth",),
    "post": ("megatron_sov.judge", "megatron_sov.rollouts", "megatron_sov.post.distillation",
             "megatron_sov.post.policy", "megatron_sov.post.preference", "megatron_sov.post.reference",
             "megatron_sov.post.rl", "megatron_sov.post.ssp", "megatron_sov.proof.given",
             "megatron_sov.infer.turns", "megatron_sov.eval.pass_at_k",
             "megatron_sov.commands.evaluate.eval_judged", "megatron_sov.commands.rl",
             "megatron_sov.commands.score", "megatron_sov.commands.train.distill",
             "megatron_sov.commands.train.prefer"),
    "bench": ("megatron_sov.bench", "megatron_sov.commands.evaluate.benchmarks",
              "megatron_sov.commands.evaluate.eval_results",
              "megatron_sov.commands.train.forgetting_gate"),
    "plan": ("megatron_sov.proof", "megatron_sov.plan.calibration.calibrate",
             "megatron_sov.plan.on_cluster",
             "megatron_sov.plan.operation", "megatron_sov.plan.pages",
             "megatron_sov.plan.pricing", "megatron_sov.plan.search.default",
             "megatron_sov.plan.search.space", "megatron_sov.plan.search.sweep", "megatron_sov.plan.speed",
             "megatron_sov.commands.operate.plan"),
    "operate": ("megatron_sov.operate", "megatron_sov.commands.operate.submit",
                "megatron_sov.commands.operate.job_summary", "megatron_sov.commands.operate.doctor"),
    "publish": ("megatron_sov.publish", "megatron_sov.commands.operate.report"),
    "omni": ("megatron_sov.omni", "megatron_sov.commands.models.codec",
             "megatron_sov.commands.evaluate.eval_media", "data_prep.media"),
    "serve": ("megatron_sov.serve", "megatron_sov.commands.models.serve",
              "megatron_sov.commands.models.chat"),
}
"""Part that an installation can do without -> its packages and modules; all others are the core."""

PARTS_NEEDED = {"curate": ("data",), "synth": ("data", "curate", "post"), "bench": ("post",),
                "omni": ("data",), "operate": ("plan",)}
"""Part -> the other parts that it imports."""


def part_of(module: str) -> str:
    """Return the part that `module` or `module:NAME` is in; "" for the core.  The longest name counts, since
    parts lie inside of others."""
    module = module.partition(":")[0]
    found = [(len(name), part) for part, names in PARTS.items() for name in names
             if f"{module}.".startswith(f"{name}.")]
    return max(found)[1] if found else ""
