"""`megatron-sov convert from-hf | to-hf | from-megatron | settings | from-peft | to-peft | average | upcycle
| deepen | verify | inspect`.

The command stands here and not in `convert`, since `verify` runs both models, which rooms above that one do.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    add_actions(parser, ACTIONS)


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit code."""
    return run_action(ACTIONS, args)


def _begin(options: PluginOptions, *models: Path) -> None:
    """Refuse models that are missing, and run the code that --plugin names."""
    for model in models:
        refuse_missing(model)
    load_plugins(options.plugins)


def _from_hf(options: FromHfOptions) -> int:
    _begin(options, options.hf_dir)
    from megatron_sov import convert

    convert.from_hf(options.hf_dir, options.out, options.dtype, workers=options.workers,
                    overwrite=options.overwrite)
    print(f"wrote checkpoint {options.out}")
    return ExitCode.OK


def _to_hf(options: ToHfOptions) -> int:
    _begin(options, options.checkpoint)
    from megatron_sov import convert

    convert.to_hf(options.checkpoint, options.out, options.dtype, max_shard_bytes=options.max_shard_bytes,
                  workers=options.workers, overwrite=options.overwrite)
    print(f"wrote Hugging Face folder {options.out}")
    return ExitCode.OK


def _to_peft(options: ToPeftOptions) -> int:
    _begin(options, options.checkpoint)
    from megatron_sov.convert.peft import to_peft

    to_peft(options.checkpoint, options.out, base_name=options.base_name, overwrite=options.overwrite)
    print(f"wrote PEFT adapter {options.out}")
    return ExitCode.OK


def _from_peft(options: FromPeftOptions) -> int:
    _begin(options, options.peft_dir, options.base)
    from megatron_sov.convert.peft import from_peft

    from_peft(options.peft_dir, options.out, options.base, overwrite=options.overwrite)
    print(f"wrote checkpoint {options.out}")
    return ExitCode.OK


def _average(options: AverageOptions) -> int:
    _begin(options)
    from megatron_sov import convert
    from megatron_sov.convert.average_weights import chosen

    found = chosen(options.run, options.last, (options.from_step, options.to_step), options.weights,
                   options.decay)
    convert.average(found, options.out, workers=options.workers, overwrite=options.overwrite)
    print(f"wrote checkpoint {options.out}, the mean of {len(found)}")
    return ExitCode.OK


def _upcycle(options: UpcycleOptions) -> int:
    _begin(options, options.checkpoint)
    from megatron_sov.convert.upcycling import Upcycling, upcycle

    upcycle(options.checkpoint, options.out,
            Upcycling(options.experts, options.top_k, options.granularity, options.noise, options.seed,
                      options.family),
            workers=options.workers, overwrite=options.overwrite)
    print(f"wrote checkpoint {options.out}")
    return ExitCode.OK


def _deepen(options: DeepenOptions) -> int:
    _begin(options, options.checkpoint)
    from megatron_sov.convert.deepening import Deepening, deepen

    deepen(options.checkpoint, options.out, Deepening(options.layers, options.how, options.identity),
           workers=options.workers, overwrite=options.overwrite)
    print(f"wrote checkpoint {options.out}")
    return ExitCode.OK


def _from_megatron(options: FromMegatronOptions) -> int:
    load_plugins(options.plugins)
    return run_from_megatron(options)


def _settings(options: TranslateOptions) -> int:
    load_plugins(options.plugins)
    return run_settings(options)


def _verify(options: VerifyOptions) -> int:
    check_output("--card", options.card)
    _begin(options, options.a, options.b)
    from megatron_sov import convert
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()  # before anything imports megatron
    from megatron_sov.eval.conversion import LogitsProof, card, prove_logits, write_card

    events = RunEvents(options.run)
    # first, since ranks are forked from this process and threads that later work starts would
    # be missing in them
    logits = LogitsProof([], {"not compared": "--no-load"}) if options.no_load else prove_logits(
        options.a, options.b, options.lengths, options.settings, options.nproc)
    if not is_first():
        return ExitCode.OK
    weights = convert.verify(options.a, options.b, load=not options.no_load, workers=options.workers)
    checks = [*weights.checks, *logits.checks]
    passed = all(check.passed for check in checks)
    if options.card:
        write_card(options.card, card(options.a, options.b, weights, logits))
    events.add("conversion", target=f"{options.a} and {options.b}",
               checks=[dataclasses.asdict(check) for check in checks])
    if options.json:
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


def _inspect(options: InspectOptions) -> int:
    _begin(options, options.a)
    facts = _facts(options.a)
    if options.json:
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
