"""`megatron-sov convert from-hf | to-hf | from-megatron | settings | from-peft | to-peft | average | upcycle
| deepen | verify | inspect`.

The command stands here and not in `convert`, since `verify` runs both models, which rooms above that one do.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import to_json
from megatron_sov.commands.convert_growing import add_growing, run_growing
from megatron_sov.commands.convert_megatron import add_from_megatron, run_from_megatron
from megatron_sov.commands.convert_settings import add_settings, run_settings
from megatron_sov.commands.eval_options import PARITY_LENGTHS, with_ranks
from megatron_sov.config.train import AVERAGES
from megatron_sov.convert import DEFAULT_WORKERS, MAX_SHARD_BYTES
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.models.count import num_params
from megatron_sov.outputs import check_output
from megatron_sov.recipes.requested import add_plugin_argument, load_plugins
from megatron_sov.runs.append import RunEvents
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.launch_environment import is_first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text)
        add_plugin_argument(sub)
        return sub

    def conversion(sub: argparse.ArgumentParser, keeps: str) -> None:
        sub.add_argument("--dtype", default="keep", metavar="D",
                         help=f"float32, bfloat16, float16, float64, or keep (default): {keeps}")
        sub.add_argument("--overwrite", action="store_true",
                         help="replace an artifact of the same kind that is already at OUT")
        _add_workers(sub)

    from_hf = action("from-hf", "write a Hugging Face folder as a checkpoint that any layout can load")
    from_hf.add_argument("hf_dir", metavar="HF_DIR", type=Path,
                         help="folder with config.json and safetensors files")
    from_hf.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to write")
    conversion(from_hf, "the folder's own")

    to_hf = action("to-hf", "write a checkpoint as a Hugging Face folder")
    to_hf.add_argument("checkpoint", metavar="CHECKPOINT", type=Path,
                       help="checkpoint, or run (its newest one)")
    to_hf.add_argument("out", metavar="OUT", type=Path, help="Hugging Face folder to write")
    to_hf.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES, metavar="N",
                       help="largest safetensors file (default: %(default)s)")
    conversion(to_hf, "the checkpoint's own, float32 for float64")

    conversion(add_from_megatron(action), "the checkpoint's own")
    add_settings(action)
    _add_peft(action)
    _add_average(action)
    add_growing(action)

    verify = action("verify", "compare two models, checkpoint or Hugging Face folder each; "
                              "exit code 3 where they differ")
    verify.add_argument("a", metavar="A", type=Path)
    verify.add_argument("b", metavar="B", type=Path)
    verify.add_argument("--no-load", action="store_true",
                        help="compare files alone: load and run no model (saves memory)")
    verify.add_argument("--lengths", type=int, nargs="+", default=PARITY_LENGTHS, metavar="N",
                        help="tokens of the random prompts that both sides are run on (default: %(default)s)")
    verify.add_argument("--json", action="store_true", help="print the checks as JSON")
    verify.add_argument("--card", type=Path, metavar="FILE",
                        help="also write a verification card, e.g. OUT.verification.json")
    verify.add_argument("--run", type=Path, metavar="DIR",
                        help="also add the checks to this run's events, for its report")
    with_ranks(verify)
    _add_workers(verify)

    inspect = action("inspect",
                     "show a checkpoint's or Hugging Face folder's architecture, parameters and dtypes")
    inspect.add_argument("a", metavar="A", type=Path)
    inspect.add_argument("--json", action="store_true", help="print as JSON")


def _add_peft(action: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Declare the actions for adapters."""
    to_peft = action("to-peft", "write an adapter's checkpoint as a folder that PEFT loads")
    to_peft.add_argument("checkpoint", metavar="CHECKPOINT", type=Path,
                         help="checkpoint of an adapter, or run (its newest one)")
    to_peft.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    to_peft.add_argument("--base-name", metavar="NAME",
                         help="name or folder of the Hugging Face model that the adapter belongs to, which "
                              "PEFT's settings then say (default: the name of the folder it was converted "
                              "from)")
    from_peft = action("from-peft", "write a PEFT adapter as a checkpoint, to train on or to merge")
    from_peft.add_argument("peft_dir", metavar="PEFT_DIR", type=Path,
                           help="folder with adapter_config.json and adapter_model.safetensors")
    from_peft.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to write")
    from_peft.add_argument("--base", metavar="CHECKPOINT", type=Path, required=True,
                           help="checkpoint of the model that it belongs to (`convert from-hf` makes one)")
    for sub in (to_peft, from_peft):
        sub.add_argument("--overwrite", action="store_true",
                         help="replace an artifact of the same kind that is already at OUT")


def _add_average(action: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Declare the action for the mean of checkpoints."""
    average = action("average", "write the mean of a run's newest checkpoints as a checkpoint")
    average.add_argument("run", metavar="RUN", type=Path, help="run folder")
    average.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to write")
    average.add_argument("--last", type=int, metavar="N",
                         help="how many of its complete checkpoints (default: all)")
    average.add_argument("--from-step", type=int, metavar="N", help="only checkpoints from this step on")
    average.add_argument("--to-step", type=int, metavar="N", help="only checkpoints up to this step")
    average.add_argument("--weights", choices=AVERAGES, default="uniform",
                         help="what each weighs: the same; 1, 2, 3, ... in their order; or --decay times "
                              "what the one behind it weighs (default: %(default)s)")
    average.add_argument("--decay", type=float, default=0.5, metavar="D",
                         help="of --weights ema (default: %(default)s)")
    average.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is at OUT")
    average.add_argument("--workers", type=int, default=1, metavar="N",
                         help="files at a time, each with two tensors in memory (default: %(default)s)")


def _add_workers(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--workers", type=int, default=DEFAULT_WORKERS, metavar="N",
                     help="files at a time, each with two tensors in memory (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit code."""
    if getattr(args, "workers", 1) < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    for name in ("hf_dir", "checkpoint", "peft_dir", "base", "a", "b"):
        if (model := getattr(args, name, None)) is not None:
            refuse_missing(model)
    check_output("--card", getattr(args, "card", None))
    load_plugins(args.plugins)
    return {"from-hf": _from_hf, "to-hf": _to_hf, "from-peft": _from_peft, "to-peft": _to_peft,
            "from-megatron": run_from_megatron, "settings": run_settings, "average": _average,
            "upcycle": run_growing, "deepen": run_growing, "verify": _verify,
            "inspect": _inspect}[args.action](args)


def _from_hf(args: argparse.Namespace) -> int:
    from megatron_sov import convert

    convert.from_hf(args.hf_dir, args.out, args.dtype, workers=args.workers, overwrite=args.overwrite)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK


def _to_hf(args: argparse.Namespace) -> int:
    from megatron_sov import convert

    convert.to_hf(args.checkpoint, args.out, args.dtype, max_shard_bytes=args.max_shard_bytes,
                  workers=args.workers, overwrite=args.overwrite)
    print(f"wrote Hugging Face folder {args.out}")
    return ExitCode.OK


def _to_peft(args: argparse.Namespace) -> int:
    from megatron_sov.convert.peft import to_peft

    to_peft(args.checkpoint, args.out, base_name=args.base_name, overwrite=args.overwrite)
    print(f"wrote PEFT adapter {args.out}")
    return ExitCode.OK


def _from_peft(args: argparse.Namespace) -> int:
    from megatron_sov.convert.peft import from_peft

    from_peft(args.peft_dir, args.out, args.base, overwrite=args.overwrite)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK


def _average(args: argparse.Namespace) -> int:
    from megatron_sov import convert
    from megatron_sov.convert.average_weights import chosen

    found = chosen(args.run, args.last, (args.from_step, args.to_step), args.weights, args.decay)
    convert.average(found, args.out, workers=args.workers, overwrite=args.overwrite)
    print(f"wrote checkpoint {args.out}, the mean of {len(found)}")
    return ExitCode.OK


def _verify(args: argparse.Namespace) -> int:
    from megatron_sov import convert
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()  # before anything imports megatron
    from megatron_sov.eval.conversion import LogitsProof, card, prove_logits, write_card

    if min(args.lengths) < 1:
        raise UserError(f"--lengths {min(args.lengths)}: must be at least 1")
    events = RunEvents(args.run)
    # first, since ranks are forked from this process and threads that later work starts would
    # be missing in them
    logits = LogitsProof([], {"not compared": "--no-load"}) if args.no_load else prove_logits(
        args.a, args.b, args.lengths, args.settings, args.nproc)
    if not is_first():
        return ExitCode.OK
    weights = convert.verify(args.a, args.b, load=not args.no_load, workers=args.workers)
    checks = [*weights.checks, *logits.checks]
    passed = all(check.passed for check in checks)
    if args.card:
        write_card(args.card, card(args.a, args.b, weights, logits))
    events.add("conversion", target=f"{args.a} and {args.b}",
               checks=[dataclasses.asdict(check) for check in checks])
    if args.json:
        print(to_json({"passed": passed, "checks": checks}), end="")
    else:
        for check in checks:
            mark = "ok  " if check.passed else "FAIL"
            print(f"{mark}  {check.name}: {check.value:g} (limit "
                  f"{check.limit:g}){'; ' + check.detail if check.detail else ''}")
        if "not compared" in logits.method:
            print(f"      logits were not compared: {logits.method['not compared']}")
        print("verified: the same model" if passed else "NOT verified: see the lines marked FAIL")
    return ExitCode.OK if passed else ExitCode.GATE_FAILED


def _inspect(args: argparse.Namespace) -> int:
    facts = _facts(args.a)
    if args.json:
        print(to_json(facts), end="")
    else:
        for section in ("weights", "parameters", "model"):
            print(section)
            for name, value in facts[section].items():
                print(f"  {name:<24} {value:,}" if type(value) is int else f"  {name:<24} {value}")
    return ExitCode.OK


def _facts(path: Path) -> dict[str, Any]:
    """Return what `inspect` shows, from headers alone."""
    from megatron_sov import convert
    from megatron_sov.convert.adapted_weights import adapter_facts

    weights = convert.open_weights(path)
    dtypes: dict[str, int] = {}
    size_bytes = 0
    for link in weights.links:
        for name, shape in link.hf_shapes().items():
            dtype = weights.dtype(name)
            label = str(dtype).removeprefix("torch.")
            dtypes[label] = dtypes.get(label, 0) + 1
            size_bytes += math.prod(shape) * dtype.itemsize
    return {
        "weights": {"path": str(path), "num_tensors": len(weights.names()), "size_bytes": size_bytes,
                    "dtypes": ", ".join(f"{label} x {n:,}" for label, n in sorted(dtypes.items())),
                    **adapter_facts(weights)},
        "parameters": dataclasses.asdict(num_params(weights.model)),
        "model": dataclasses.asdict(weights.model),
    }
