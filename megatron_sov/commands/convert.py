"""`megatron-sov convert from-hf | to-hf | from-megatron | settings | from-peft | to-peft | average | upcycle
| deepen | verify | inspect`.

The command stands here and not in `convert`, since `verify` runs both models, which rooms above that one do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sov import recipes
from megatron_sov.artifacts import atomic_write, to_json, write_output
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
from megatron_sov.config import ModelConfig, from_dict
from megatron_sov.counterparts.architecture import of_arguments
from megatron_sov.counterparts.arguments import MAX_CHARS, read_arguments
from megatron_sov.counterparts.bridge_yaml import read_sections
from megatron_sov.counterparts.settings import Translated, nested, of_sections, translate
from megatron_sov.errors import ExitCode, UserError, nearest
from megatron_sov.models.count import num_params
from megatron_sov.outputs import check_output
from megatron_sov.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.append import RunEvents
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.launch_environment import is_first
from megatron_sov.settings import Actions, add_actions, parse_nested, run_action

YAML = (".yaml", ".yml")
RECIPE = "from-megatron"


# `megatron-sov convert settings`: a run's settings of Megatron-LM or Megatron-Bridge, as ours.


def run_settings(args: TranslateOptions) -> int:
    """Print them; returns the exit code."""
    check_output("--output", args.output)
    made, unresolved = _read(args.source, args.family)
    if not made.ours:
        raise UserError(f"{args.source[:80]}: holds no setting of Megatron that is known here; pass a "
                        "YAML file of Megatron-Bridge, or a script with arguments such as --num-layers 48")
    for name, value in made.ours.items():
        print(f"--set {shlex.quote(f'{name}={value if isinstance(value, str) else json.dumps(value)}')}")
    for title, found in (("not taken over:", made.lost), ("not known from the text:", unresolved),
                         ("without a counterpart, and nothing is lost:", made.no_need)):
        if found:
            print(f"\n{title}")
            for name, why in found.items():
                print(f"  {name}: {why}")
    if made.unknown:
        print(f"\nnot known here, so look at them yourself:\n  {', '.join(sorted(made.unknown))}")
    if args.output is not None:
        if not made.is_whole:
            raise UserError(f"--output {args.output}: the settings do not say a whole architecture, which "
                            "a config has; use the --set lines above with a recipe")
        atomic_write(args.output, to_json(from_dict({"recipe": RECIPE, **nested(made.ours)}).to_dict()))
        print(f"\nwrote {args.output}")
    return ExitCode.OK


def _read(source: str, family: str) -> tuple[Translated, dict[str, str]]:
    """Return what a source says, and what it leaves to variables."""
    if source.endswith(YAML):
        return translate(of_sections(read_sections(Path(source))), family), {}
    text = source
    if "--" not in source or Path(source[:4096]).is_file():
        try:
            with open(source, encoding="utf-8") as file:
                text = file.read(MAX_CHARS)
        except (OSError, ValueError) as e:
            raise UserError(f"{source[:200]}: is neither a file that can be read ({e}) nor arguments; pass "
                            "one of them") from None
    found = read_arguments(text)
    unresolved = {name: f"{value} is not set there" for name, value in found.unresolved.items()}
    return translate(of_arguments(found.values), family), unresolved


# `megatron-sov convert from-megatron`: a checkpoint of Megatron-LM or Megatron-Bridge as one of ours.


def run_from_megatron(args: FromMegatronOptions) -> int:
    """Convert; returns the exit code."""
    overrides, family = model_settings(args.settings), args.family
    if args.recipe:
        model = dataclasses.asdict(recipes.get(args.recipe).model)
        family = family or model["family"]
        overrides = {name: value for name, value in model.items() if name != "family"} | overrides
    if args.tokenizer is not None and not (args.tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {args.tokenizer}: has no tokenizer.json; name a tokenizer's folder")
    from megatron_sov.convert.megatron_import import from_megatron

    told = from_megatron(args.megatron_dir, args.out, args.dtype, family=family, overrides=overrides,
                         tokenizer=args.tokenizer, workers=args.workers, overwrite=args.overwrite,
                         redo=args.redo)
    at = "" if told.iteration is None else f", iteration {told.iteration}"
    print(f"wrote checkpoint {args.out}: a model of family {told.model.family}{at}")
    if told.num_padded_rows:
        print(f"left out {told.num_padded_rows} rows of the vocabulary's matrices that stand behind the "
              f"{told.model.vocab_size} token ids")
    if told.num_optimizer_tensors:
        print(f"left out {told.num_optimizer_tensors} tensors of the optimizer, which begins anew")
    return ExitCode.OK


def model_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Return what `--set model.NAME=VALUE` says, by field of `ModelConfig`.

    Raises:
        UserError: one is no field of the architecture.
    """
    known = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "family"]
    parsed = parse_nested(settings)
    given = parsed.pop("model", {})
    for name in [*parsed, *(f"model.{name}" for name in given if name not in known)]:
        instead = nearest(name.removeprefix("model."), known, "model.")
        raise UserError(f"--set {name}: is no field of the architecture{instead}; fields are "
                        "model.num_layers and the like")
    return dict(given)


def _begin(args: PluginOptions, *models: Path) -> None:
    """Refuse models that are missing, and run the code that --plugin names."""
    for model in models:
        refuse_missing(model)
    load_plugins(args.plugins)


def _from_hf(args: FromHfOptions) -> int:
    _begin(args, args.hf_dir)
    from megatron_sov import convert

    convert.from_hf(args.hf_dir, args.out, args.dtype, workers=args.workers,
                    overwrite=args.overwrite, redo=args.redo)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK


def _to_hf(args: ToHfOptions) -> int:
    _begin(args, args.checkpoint)
    from megatron_sov import convert

    convert.to_hf(args.checkpoint, args.out, args.dtype, max_shard_bytes=args.max_shard_bytes,
                  workers=args.workers, overwrite=args.overwrite, redo=args.redo)
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
    convert.average(found, args.out, workers=args.workers, overwrite=args.overwrite, redo=args.redo)
    print(f"wrote checkpoint {args.out}, the mean of {len(found)}")
    return ExitCode.OK


def _upcycle(args: UpcycleOptions) -> int:
    _begin(args, args.checkpoint)
    from megatron_sov.convert.upcycling import Upcycling, upcycle

    upcycle(args.checkpoint, args.out,
            Upcycling(args.experts, args.top_k, args.granularity, args.noise, args.seed,
                      args.family),
            workers=args.workers, overwrite=args.overwrite, redo=args.redo)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK


def _deepen(args: DeepenOptions) -> int:
    _begin(args, args.checkpoint)
    from megatron_sov.convert.deepening import Deepening, deepen

    deepen(args.checkpoint, args.out, Deepening(args.layers, args.how, args.identity),
           workers=args.workers, overwrite=args.overwrite, redo=args.redo)
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
    from megatron_sov.eval.parity import LogitsProof, card, prove_logits

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
        write_output(args.card, to_json(card(args.a, args.b, weights, logits)))
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
