"""Parsers for the commands that `megatron-sov submit` can submit."""

import argparse
from functools import partial

from megatron_sov.base.command_line import import_reference
from megatron_sov.commands import COMMANDS
from megatron_sov.operate.slurm.stages import Commands

STAGES = ("pretrain", "extend", "sft", "prefer", "distill", "convert", "eval", "rl-run", "rl-train",
          "rl-generate", "rl-reward")
EVAL_LM = "megatron_sov.commands.evaluate.eval_lm:LM"
"""An `eval` action that is also a stage, because several jobs may share its work."""


def _add_arguments(reference: str, parser: argparse.ArgumentParser) -> None:
    import_reference(reference).add_arguments(parser)


STAGE_PARSERS: Commands = {"eval-lm": partial(_add_arguments, EVAL_LM)} | {
    stage: partial(_add_arguments, COMMANDS[stage.replace("-", " ")].module) for stage in STAGES}
