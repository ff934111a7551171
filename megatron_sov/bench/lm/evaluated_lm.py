"""lm-eval's `TemplateLM` over the answer cache.

lm-eval calls the model twice: `collect_requests` records the requests, and after an engine has answered them,
lm-eval's evaluator reads the answers. Tokens equal those of lm-eval's `HFLM` (0.4.13): long prompts lose
their beginning, and whole texts are scored in windows of the context length.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_sov.base.errors import UserError, escape_controls, first_error_line, format_error
from megatron_sov.bench.lm.answers import Answer, GenerationRequest, LikelihoodRequest, Request

DEFAULT_MAX_TOKENS = 256
"""`max_gen_toks` for a task without a value, as in lm-eval."""
UNANSWERED: Answer = {"logprob": 0.0, "greedy": False, "text": "", "finish_reason": ""}
"""Placeholder during `collect_requests`."""


class EvaluatedLM(TemplateLM):
    """Turns lm-eval's instances into requests, and looks up their answers.

    Args:
        tokenizer: tokenizer from transformers.
        max_length: context length in tokens.
        answers: `Request.key` -> answer.
        max_gen_tokens: limit on a task's `max_gen_toks`.
        seed: for samples.
    """

    def __init__(self, tokenizer: Any, max_length: int, answers: Mapping[str, Answer],
                 max_gen_tokens: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.tokenizer, self.max_length, self.max_gen_tokens = tokenizer, max_length, max_gen_tokens
        self._answers, self._seed = answers, seed
        self._generations: dict[tuple[int, int], GenerationRequest] = {}
        self._is_collecting = False
        self.requests: dict[str, Request] = {}
        """Requests by key since the last `collect_requests`."""
        self.template_kwargs: Mapping[str, Any] = {}
        """Further arguments for the chat template, e.g. `enable_thinking`."""

    def collect_requests(self, instances: Sequence[Instance]) -> list[Request]:
        """Return the distinct requests for a task's instances. Raises `UserError`: an unusable request."""
        self.requests, self._is_collecting = {}, True
        for kind in dict.fromkeys(instance.request_type for instance in instances):
            repeated = [instance for instance in instances if instance.request_type == kind
                        for _ in range(int(instance.repeats or 1))]
            # e.g. `generate_until`, which records its requests through `_get_answer`
            getattr(self, kind)(repeated, disable_tqdm=True)
        self._is_collecting = False
        return list(self.requests.values())

    def _get_answer(self, request: Request) -> Answer:
        self.requests[request.key] = request
        if request.key not in self._answers and not self._is_collecting:
            raise UserError(f"a task makes a new request while lm-eval computes its metric: {request.key}; "
                            "metrics with requests of their own are not supported")
        answer = self._answers.get(request.key, UNANSWERED)
        if isinstance(request, LikelihoodRequest) and math.isnan(float(answer["logprob"] or 0.0)):
            # lm-eval would take the first choice for the best
            raise UserError("a likelihood is NaN: the model's weights or activations are NaN; look at the "
                            "model with `megatron-sov inspect`, or at its training")
        return answer

    @property
    def eot_token_id(self) -> int:
        return self._get_special_token("eos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without context: bos, or eos if the tokenizer has no bos."""
        name = "eos_token_id" if self.tokenizer.bos_token_id is None else "bos_token_id"
        return self._get_special_token(name)

    def _get_special_token(self, name: str) -> int:
        token_id = getattr(self.tokenizer, name)
        if token_id is None:
            raise UserError(f"{self.tokenizer.name_or_path}: the tokenizer has no eos_token, which precedes "
                            "a text that is scored from its first token; name one in tokenizer_config.json")
        return int(token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text, without a second begin-of-text token."""
        tokenizer = self.tokenizer
        has_prefix_token = (tokenizer.bos_token_id, tokenizer.eos_token_id) != (None, None)
        if add_special_tokens is None and has_prefix_token and has_bos_prefix(
                string, tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        arguments = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [int(token) for token in tokenizer.encode(string, **arguments)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
                            ) -> str:
        """Render messages with the chat template; without the system message if the template refuses it, as
        lm-eval does. Raises `UserError`: the template refuses the messages."""
        try:
            return str(self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt, **self.template_kwargs))
        except Exception as e:  # various errors from a foreign template
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) < len(chat_history):
                return self.apply_chat_template(others, add_generation_prompt)
            raise UserError(f"{self.tokenizer.name_or_path}: the chat template refuses a prompt "
                            f"({first_error_line(e)}); leave --apply-chat-template out, or correct the "
                            "template") from None

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        answers = [self._get_answer(self._build_likelihood(context, continuation))
                   for _, context, continuation in requests]
        return [(float(answer["logprob"] or 0.0), bool(answer["greedy"])) for answer in answers]

    def _build_likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> LikelihoodRequest:
        if not continuation:
            raise UserError("the continuation of a likelihood request has no token; look at the task's "
                            "doc_to_choice or doc_to_target, which give an empty text")
        if len(continuation) > self.max_length:
            raise UserError(f"the continuation of a likelihood request has {len(continuation)} tokens, and "
                            f"the model ends at {self.max_length}; leave the task out")
        # + 1: the last token is scored without being an input
        room = max(1, self.max_length + 1 - len(continuation))
        return LikelihoodRequest(tuple(context[-room:]), tuple(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(str(request.args[0])), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1)
            scores = self._loglikelihood_tokens([(None, *make_disjoint_window(w)) for w in windows])
            totals.append(sum(logprob for logprob, _ in scores))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuations of instances; a repeated instance gets further samples."""
        num_samples: Counter[int] = Counter()
        texts = []
        for request in requests:
            texts.append(str(self.get_sample(request, num_samples[id(request)])["text"]))
            num_samples[id(request)] += 1
        return texts

    def get_sample(self, instance: Instance, number: int) -> Answer:
        """Return the answer for a sample of an instance, which must outlive this object (keyed by `id`)."""
        key = (id(instance), number)
        if key not in self._generations:
            self._generations[key] = self._build_generation(str(instance.args[0]), dict(instance.args[1]),
                                                            number, str(instance.task_name))
        return self._get_answer(self._generations[key])

    def _build_generation(self, prompt: str, kwargs: dict[str, Any], sample: int, task: str
                          ) -> GenerationRequest:
        try:
            request = self._parse_generation_kwargs(kwargs, sample)
        except (TypeError, ValueError, OverflowError) as e:
            raise UserError(f"task {task}: generation_kwargs {escape_controls(str(kwargs)):.200}: cannot be "
                            f"used ({format_error(e):.200}); write numbers there, or leave them "
                            "out") from None
        room = self.max_length - request.max_tokens
        if room <= 0:
            raise UserError(f"task {task}: asks for answers of {request.max_tokens} tokens, and the model "
                            f"ends at {self.max_length}; pass --max-new-tokens N for shorter answers")
        tokens = self._encode_prompt(prompt) or [self.prefix_token_id]
        return replace(request, prompt=tuple(tokens[-room:]))

    def _parse_generation_kwargs(self, kwargs: dict[str, Any], sample: int) -> GenerationRequest:
        """Parse lm-eval's `generation_kwargs` to a request without prompt.

        Raises:
            TypeError, ValueError, OverflowError: invalid numbers.
        """
        until = kwargs.get("until") or []
        until = [until] if isinstance(until, str) else [str(text) for text in until]
        values: dict[str, Any] = dict(normalize_gen_kwargs({**kwargs, "until": until}, DEFAULT_MAX_TOKENS))
        max_tokens = int(values["max_gen_toks"])
        if self.max_gen_tokens is not None:
            max_tokens = min(max_tokens, self.max_gen_tokens)
        temperature = float(values.get("temperature") or 0.0) if values["do_sample"] else 0.0
        if max_tokens < 1 or not 0 <= temperature < math.inf:
            raise ValueError("max_gen_toks must be at least 1, and temperature a finite number from 0")
        greedy = GenerationRequest((), tuple(dict.fromkeys(text for text in until if text)), max_tokens)
        if not temperature:  # samples are equal: leave seed and number out of the key
            return greedy
        return replace(greedy, temperature=temperature, top_k=max(0, int(values.get("top_k") or 0)),
                       top_p=float(values.get("top_p") or 1.0), sample=sample,
                       seed=int(kwargs.get("seed", self._seed)))

    def _encode_prompt(self, prompt: str) -> list[int]:
        """Encode a prompt as `HFLM.tok_batch_encode` does, which checks for the bos token alone."""
        bos = self.tokenizer.bos_token
        arguments = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
        return [int(token) for token in self.tokenizer.encode(prompt, **arguments)]
