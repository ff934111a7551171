"""Runs `megatron-sov convert verify`."""

import dataclasses

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.errors import ExitCode
from megatron_sov.commands.models.convert import VerifyOptions
from megatron_sov.convert.hf_export import verify
from megatron_sov.eval.parity import LogitsProof, build_card, prove_logits
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.launch_environment import is_first_rank


def verify_models(options: VerifyOptions) -> int:
    """Compare two models and return exit code 3 if they differ."""
    events = RunEvents(options.run)
    # logits first: ranks fork from this process, before it starts threads
    if options.no_load:
        logits = LogitsProof([], {"not compared": "--no-load"})
    else:
        logits = prove_logits(options.a, options.b, options.lengths, options.settings, options.nproc)
    # only the first rank compares files
    if not is_first_rank():
        return ExitCode.OK
    weights = verify(options.a, options.b, load=not options.no_load, workers=options.workers)
    checks = [*weights.checks, *logits.checks]
    passed = all(check.passed for check in checks)
    if options.card:
        write_output(options.card, format_json(build_card(options.a, options.b, weights, logits)))
    events.add("conversion", target=f"{options.a} and {options.b}",
               checks=[dataclasses.asdict(check) for check in checks])
    if options.json:
        print(format_json({"passed": passed, "checks": checks}), end="")
    else:
        for check in checks:
            mark = "ok  " if check.passed else "FAIL"
            detail = f"; {check.detail}" if check.detail else ""
            print(f"{mark}  {check.name}: {check.value:g} (limit {check.limit:g}){detail}")
        reason = logits.method.get("not compared")
        if reason is not None:
            print(f"      logits were not compared: {reason}")
        print("verified: the same model" if passed else "NOT verified: see the lines marked FAIL")
    return ExitCode.OK if passed else ExitCode.GATE_FAILED
