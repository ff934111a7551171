"""`megatron-sov serve TARGET`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_sov.errors import UserError, how_to_install
from megatron_sov.outputs import check_output
from megatron_sov.recipes.requested import add_plugin_argument, load_plugins
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.serving.settings import ServeSettings
from megatron_sov.settings import SettingsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("target", metavar="TARGET", type=Path,
                        help="checkpoint, run (its newest one) or Hugging Face folder")
    parser.add_argument("--host", default=ServeSettings.host, metavar="ADDRESS",
                        help="address that is listened on (default %(default)s); others than this machine's "
                             "own need a key")
    parser.add_argument("--port", type=int, default=ServeSettings.port, metavar="N",
                        help="port (default %(default)s; 0: any that is free)")
    parser.add_argument("--name", metavar="MODEL",
                        help="the model's name in requests (default: that of the folder)")
    parser.add_argument("--api-key-env", metavar="VARIABLE",
                        help="variable of the environment with the key that requests must bring")
    parser.add_argument("--max-batch", type=int, default=ServeSettings.max_batch, metavar="N",
                        help="answers that are written at a time (default %(default)s)")
    parser.add_argument("--prefill-tokens", type=int, default=ServeSettings.prefill_tokens, metavar="N",
                        help="tokens of prompts that are read at a time (default %(default)s)")
    parser.add_argument("--max-length", type=int, metavar="N",
                        help="tokens of the longest prompt with its answer (default: as the model takes, up "
                             "to 8,192)")
    parser.add_argument("--max-waiting", type=int, default=ServeSettings.max_waiting, metavar="N",
                        help="answers that may wait, before requests are turned away (default %(default)s)")
    parser.add_argument("--nproc", type=int, default=None, metavar="N", help="local processes")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="key=value",
                        help="layout and precision, e.g. --set parallel.tp=2 --set train.precision=bf16")
    parser.add_argument("--address-file", type=Path, metavar="FILE",
                        help="write address, name and process there as JSON, once the model answers")
    parser.add_argument("--parent-pid", type=int, metavar="PID", help="end with this process")
    add_plugin_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until it is asked to stop."""
    load_plugins(args.plugins)
    settings = ServeSettings(
        args.target.resolve().name if args.name is None else args.name, args.host, args.port,
        _key(args.api_key_env), args.max_batch, args.prefill_tokens, args.max_waiting, args.max_length,
        args.address_file, args.parent_pid)
    if problems := settings.problems():
        raise SettingsError("serve", problems)
    num_ranks(args.nproc)
    refuse_missing(args.target)
    check_output("--address-file", args.address_file)

    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise UserError("aiohttp, which speaks HTTP, is not installed for this Python; "
                        f"{how_to_install('serve')}") from None
    from megatron_sov.generate.target import find_target
    from megatron_sov.serving.run import serve

    serve(find_target(args.target), settings, args.settings, args.nproc)
    return 0


def _key(variable: str | None) -> str:
    """Return the key that a variable of the environment holds; "" where none is named."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key.strip() or not key.isascii() or not key.isprintable():
        raise UserError(f"--api-key-env {variable}: the environment has no key there; set it to ASCII "
                        "characters without line breaks, which no command line shows")
    return key
