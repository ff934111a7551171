"""`megatron-sov convert from-hf | to-hf | from-megatron | settings | from-peft | to-peft | average | upcycle
| deepen | verify | inspect`.

The command stands here and not in `convert`, since `verify` runs both models, which rooms above that one do.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import to_json
from megatron_sov.commands.convert_megatron import run_from_megatron
from megatron_sov.commands.convert_options import (
    AverageOptions,
    DeepenOptions,
    FromHfOptions,
    FromMegatronOptions,
    FromPeftOptions,
    InspectOptions,
    ToHfOptions,
    ToPeftOptions,
    TranslateOptions,
    UpcycleOptions,
    VerifyOptions,
)
from megatron_sov.commands.convert_settings import run_settings
from megatron_sov.errors import ExitCode
from megatron_sov.models.count import num_params
from megatron_sov.outputs import check_output
from megatron_sov.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.append import RunEvents
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.launch_environment import is_first
from megatron_sov.settings import Actions, add_actions, run_action


def _begin(args: PluginOptions, *models: Path) -> None:
    """Refuse models that are missing, and run the code that --plugin names."""
    for model in models:
        refuse_missing(model)
    load_plugins(args.plugins)


def _from_hf(args: FromHfOptions) -> int:
    _begin(args, args.hf_dir)
    from megatron_sov import convert

    convert.from_hf(args.hf_dir, args.out, args.dtype, workers=args.workers,
                    overwrite=args.overwrite)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK


def _to_hf(args: ToHfOptions) -> int:
    _begin(args, args.checkpoint)
    from megatron_sov import convert

    convert.to_hf(args.checkpoint, args.out, args.dtype, max_shard_bytes=args.max_shard_bytes,
                  workers=args.workers, overwrite=args.overwrite)
    print(f"wrote Hugging Face folder {args.out}")
    return ExitCode.OK


def _to_peft(args: ToPeftOptions) -> int:
    _begin(args, args.checkpoint)
    from megatron_sov.convert.peft import to_peft

    to_peft(args.checkpoint, args.out, base_name=args.base_name, overwrite=args.overwrite)
    print(f"wrote PEFT adapter {args.out}")
    return ExitCode.OK


def _from_peft(args: FromPeftOptions) -> int:
    _begin(args, args.peft_dir, args.base)
    from megatron_sov.convert.peft import from_peft

    from_peft(args.peft_dir, args.out, args.base, overwrite=args.overwrite)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK


def _average(args: AverageOptions) -> int:
    _begin(args)
    from megatron_sov import convert
    from megatron_sov.convert.average_weights import chosen

    found = chosen(args.run, args.last, (args.from_step, args.to_step), args.weights,
                   args.decay)
    convert.average(found, args.out, workers=args.workers, overwrite=args.overwrite)
    print(f"wrote checkpoint {args.out}, the mean of {len(found)}")
    return ExitCode.OK


def _upcycle(args: UpcycleOptions) -> int:
    _begin(args, args.checkpoint)
    from megatron_sov.convert.upcycling import Upcycling, upcycle

    upcycle(args.checkpoint, args.out,
            Upcycling(args.experts, args.top_k, args.granularity, args.noise, args.seed,
                      args.family),
            workers=args.workers, overwrite=args.overwrite)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK


def _deepen(args: DeepenOptions) -> int:
    _begin(args, args.checkpoint)
    from megatron_sov.convert.deepening import Deepening, deepen

    deepen(args.checkpoint, args.out, Deepening(args.layers, args.how, args.identity),
           workers=args.workers, overwrite=args.overwrite)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK


def _from_megatron(args: FromMegatronOptions) -> int:
    load_plugins(args.plugins)
    return run_from_megatron(args)


def _settings(args: TranslateOptions) -> int:
    load_plugins(args.plugins)
    return run_settings(args)


def _verify(args: VerifyOptions) -> int:
    check_output("--card", args.card)
    _begin(args, args.a, args.b)
    from megatron_sov import convert
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()  # before anything imports megatron
    from megatron_sov.eval.conversion import LogitsProof, card, prove_logits, write_card

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


def _inspect(args: InspectOptions) -> int:
    _begin(args, args.a)
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


ACTIONS: Actions = {
    "from-hf": (FromHfOptions, _from_hf), "to-hf": (ToHfOptions, _to_hf),
    "from-megatron": (FromMegatronOptions, _from_megatron), "settings": (TranslateOptions, _settings),
    "to-peft": (ToPeftOptions, _to_peft), "from-peft": (FromPeftOptions, _from_peft),
    "average": (AverageOptions, _average), "upcycle": (UpcycleOptions, _upcycle),
    "deepen": (DeepenOptions, _deepen), "verify": (VerifyOptions, _verify),
    "inspect": (InspectOptions, _inspect)}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
