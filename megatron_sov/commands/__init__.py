"""Registry of `megatron-sov` commands: module, help, documentation page and examples."""

from pathlib import Path

from megatron_sov.base.command_line import read_commands

COMMANDS = read_commands(Path(__file__).with_name("commands.json"))
