"""Runs `megatron-sov generate` on text prompts."""

import json
import sys

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import escape_controls
from megatron_sov.commands.models.generate import GenerateOptions, GenerateRequest
from megatron_sov.commands.shared_options import get_target_step
from megatron_sov.infer.engine import Engine, check_engine, choose_engine, run_with_engine
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.prompts import (
    EncodedPrompts, ModelPrompt, check_length, encode_prompts, format_responses)
from megatron_sov.infer.request import GenerationResult, StopRule


def generate_texts(request: GenerateRequest) -> None:
    options, prompts = request.options, request.prompts
    target = find_target(options.target)
    encoded = encode_prompts(target, [prompt.text for prompt in prompts], options.chat)
    stop = StopRule(encoded.end_ids, options.stop, encoded.decode)
    result = _generate(options, target, encoded, stop)
    if result is None:
        return  # the first rank prints
    texts = [encoded.response(i, stop.truncate_text(encoded.decode(tokens)))
             for i, tokens in enumerate(result.continuations)]
    if options.output is not None:
        write_output(options.output, format_responses(prompts, texts, result))
    else:
        _print_texts(options, prompts, texts, result)
    step = get_target_step(target, request.events)
    for prompt, text in zip(prompts, texts, strict=True):
        request.events.add("sample", step=step, prompt=prompt.text, text=text, target=prompt.target)


def _generate(options: GenerateOptions, target: Target, encoded: EncodedPrompts,
              stop: StopRule) -> GenerationResult | None:
    """Generate with the chosen engine; None except on rank 0."""
    sampling = options.sampling
    longest = encoded.longest + sampling.max_new_tokens
    engine_name = options.engine or choose_engine(target)
    check_length(target, longest, "prompt and --max-new-tokens", "shorten one of them")
    check_engine(engine_name, target, options.settings, options.nproc)

    def work(engine: Engine) -> dict[str, object]:
        return vars(engine.generate(encoded.ids, sampling, stop=stop))

    fields = run_with_engine(engine_name, target, work, longest=longest, batching=options.batching,
                             settings=options.settings, nproc=options.nproc)
    return None if fields is None else GenerationResult(**fields)


def _print_texts(options: GenerateOptions, prompts: list[ModelPrompt], texts: list[str],
                 result: GenerationResult) -> None:
    """Print the continuations as JSON rows, or as text: the prompt goes on, or a chat with roles."""
    if options.json:
        rows: list[dict[str, object]] = [
            {"prompt": prompt.text, "text": text, "tokens": tokens}
            for prompt, text, tokens in zip(prompts, texts, result.continuations, strict=True)]
        if options.logprobs:
            for row, logprobs, reason in zip(rows, result.logprobs, result.finish_reasons, strict=True):
                row |= {"logprobs": logprobs, "temperature": result.temperature, "finish_reason": reason}
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for prompt, text in zip(prompts, texts, strict=True):
        # a chat response does not continue the prompt's sentence: print the roles
        line = f"user: {prompt.text}\nassistant: {text}" if options.chat else f"{prompt.text}{text}"
        # a terminal executes control characters; files and pipes receive the text unchanged
        if sys.stdout.isatty():
            line = escape_controls(line)
        print(f"{line}\n" if len(prompts) > 1 else line)
