"""The model that is evaluated, a checkpoint or a Hugging Face folder, as lm-eval's `TemplateLM` over answers.

lm-eval calls the model twice: first to collect requests, then, when a process has answered them, for the
answers. Tokens are those of lm-eval's own `HFLM` (0.4.13): text that is too long loses its beginning, and
text that is scored as a whole is read in windows of the longest context.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_sov.base.artifacts import (
    MANIFEST, FileRecord, find_damaged_files, manifest_sha256, read_manifest)
from megatron_sov.base.digests import hash_file
from megatron_sov.base.errors import (
    UserError, escape_controls, first_error_line, format_error, format_problems)
from megatron_sov.bench.lm.answers import Answer, AnswerScore, Request, Write
from megatron_sov.bench.lm.local import LocalEvaluation
from megatron_sov.bench.lm.results import EvaluatedModel
from megatron_sov.bench.lm.settings import Settings
from megatron_sov.chat.folder import TOKENIZER_JSON
from megatron_sov.chat.marks import build_text_decoder
from megatron_sov.engine.parallel.device import choose_inference_precision
from megatron_sov.infer.engine import MEGATRON, TRANSFORMERS
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.prompts import check_engine, read_stop_ids
from megatron_sov.infer.request import Batching
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.work.endpoints.transport import is_url

UNKNOWN_LENGTH = 2048
"""Longest sequence where a folder says none, as in lm-eval."""


@dataclass(frozen=True)
class Subject:
    model: EvaluatedModel
    """The model as the results name it."""
    identity: dict[str, Any]
    """Values on which answers depend in addition to the requests."""
    tokenizer: Any
    """transformers' tokenizer."""
    max_length: int
    """Longest sequence, in tokens."""
    running: LocalEvaluation


def subject_of(target: str, settings: Settings, whole: bool = True) -> Subject:
    """Return the model that a target means.

    Args:
        target: a path, as it was typed.
        settings: of the evaluation.
        whole: whether its hash is wanted, which may take a while.

    Raises:
        UserError: there is no such model, or it cannot be asked like this.
    """
    if is_url(target):
        raise UserError(f"{target}: `eval lm` runs checkpoints and Hugging Face folders; ask an endpoint "
                        "with lm-eval's own command: lm_eval --model local-chat-completions --model_args "
                        "base_url=URL,model=NAME")
    check_model_path(Path(target))
    found = find_target(Path(target))
    engine = settings.engine or (TRANSFORMERS if found.is_hf and not settings.settings
                                 and settings.nproc is None else MEGATRON)
    check_engine(engine, found, settings.settings, settings.nproc)
    tokenizer, ends, special = _tokens(found, settings.chat_template)
    max_length = settings.max_length_tokens or found.max_tokens
    max_length = UNKNOWN_LENGTH if math.isinf(max_length) else int(max_length)
    if max_length > found.max_tokens:
        raise UserError(f"--max-length {max_length}: the model ends at {found.max_tokens}; choose less")
    digest = content_hash(found) if whole else ""
    model = EvaluatedModel(str(found.path), digest, "huggingface" if found.is_hf else "checkpoint",
                           found.step, str(settings.run) if settings.run else None)
    # layouts agree up to rounding, so that answers are shared among them
    how = sorted(setting for setting in settings.settings if not setting.startswith("parallel."))
    decode = build_text_decoder(found.tokenizer_folder / TOKENIZER_JSON, ends,
                                lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)))
    running = LocalEvaluation(found, engine, tuple(settings.settings), settings.nproc,
                              Batching(settings.batch_size), ends, special, decode)
    return Subject(model, {"model": digest, "engine": engine, "settings": how, "ends": list(ends),
                           "precision": choose_inference_precision()}, tokenizer, max_length, running)


def _tokens(target: Target, chat: bool) -> tuple[Any, tuple[int, ...], dict[str, int]]:
    from megatron_sov.chat.folder import read_chat_encoder
    from megatron_sov.infer.engines.load import load_tokenizer

    folder = target.tokenizer_folder
    tokenizer = load_tokenizer(folder)
    encoder = read_chat_encoder(folder) if chat else None
    if chat and (encoder is None or not tokenizer.chat_template):
        raise UserError(f"--apply-chat-template: {folder} has no chat template; leave it out, or put the "
                        "chat template there that the model was trained with")
    special = {str(token.content): int(number) for number, token in tokenizer.added_tokens_decoder.items()
               if token.special}
    return tokenizer, read_stop_ids(target, tokenizer.eos_token_id, encoder), special


def content_hash(target: Target) -> str:
    """Return the hash of a model's content: its manifest's, else of all its files.

    Raises:
        UserError: a file differs from its manifest; of large ones that were not written since, only the
            size is looked at.
    """
    folder = target.path
    if (folder / MANIFEST).is_file():
        written_ns = (folder / MANIFEST).stat().st_mtime_ns  # behind all files
        looked_at = [name for name, record in read_manifest(folder).files.items()
                     if not name.endswith(".safetensors") or _may_differ(folder / name, record, written_ns)]
        if damaged := find_damaged_files(folder, looked_at):
            raise UserError(format_problems(str(folder), damaged, "restore it from a copy"))
        return manifest_sha256(folder)
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{file.name} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def _may_differ(file: Path, record: FileRecord, written_ns: int) -> bool:
    """Return whether a file is missing, of another size, or younger than its manifest: then another model may
    have been saved over it."""
    try:
        found = file.stat()
    except OSError:
        return True
    return found.st_size != record.size_bytes or found.st_mtime_ns > written_ns


DEFAULT_MAX_TOKENS = 256
"""Longest continuation where a task sets none, as in lm-eval."""
UNANSWERED: Answer = {"logprob": 0.0, "greedy": False, "text": "", "finish_reason": ""}
"""Placeholder while requests are collected."""


class EvaluatedLM(TemplateLM):
    """lm-eval's model interface over answers.

    Args:
        tokenizer: transformers' tokenizer.
        max_length: longest sequence, in tokens.
        answers: key of a request -> its answer.
        max_gen_tokens: longest continuation, where it is to be shorter than a task's own.
        seed: of sampled continuations.
    """

    def __init__(self, tokenizer: Any, max_length: int, answers: Mapping[str, Answer],
                 max_gen_tokens: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.tokenizer, self.max_length, self.max_gen_tokens = tokenizer, max_length, max_gen_tokens
        self._answers, self._seed = answers, seed
        self._writes: dict[tuple[int, int], Write] = {}
        self._is_collecting = False
        self.requests: dict[str, Request] = {}
        """Requests by key, since the last call of `collect`."""
        self.template_kwargs: Mapping[str, Any] = {}
        """Arguments of the chat template in addition to the messages: the mode of a reasoning model."""

    def collect(self, instances: Sequence[Instance]) -> list[Request]:
        """Return the requests of a task's instances.

        Raises:
            UserError: one cannot be made.
        """
        self.requests, self._is_collecting = {}, True
        for kind in dict.fromkeys(instance.request_type for instance in instances):
            repeated = [instance for instance in instances if instance.request_type == kind
                        for _ in range(int(instance.repeats or 1))]
            getattr(self, kind)(repeated, disable_tqdm=True)
        self._is_collecting = False
        return list(self.requests.values())

    def _answer(self, request: Request) -> Answer:
        self.requests[request.key] = request
        if request.key not in self._answers and not self._is_collecting:
            raise UserError(f"a task asks a request that it did not ask before: {request.key}; its metric "
                            "makes requests of its own, which are not supported")
        answer = self._answers.get(request.key, UNANSWERED)
        if isinstance(request, AnswerScore) and math.isnan(float(answer["logprob"] or 0.0)):
            # lm-eval would take the first of several choices for the best one.
            raise UserError("a likelihood is NaN: the model's weights or activations are no numbers; look at "
                            "the model with `megatron-sov inspect`, or at its training")
        return answer

    @property
    def eot_token_id(self) -> int:
        return self._special_token("eos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """Token in front of a text that has nothing before it."""
        return self._special_token("bos_token_id" if self.tokenizer.bos_token_id is not None
                                   else "eos_token_id")

    def _special_token(self, name: str) -> int:
        found = getattr(self.tokenizer, name)
        if found is None:
            raise UserError(f"{self.tokenizer.name_or_path}: its tokenizer has no eos_token, which stands "
                            "before a text that is judged from its first token; name one in "
                            "tokenizer_config.json")
        return int(found)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return a text's tokens; a begin-of-text token that the text has is not added again."""
        tokenizer = self.tokenizer
        has_prefix = (tokenizer.bos_token_id, tokenizer.eos_token_id) != (None, None)
        if add_special_tokens is None and has_prefix and has_bos_prefix(
                string, tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [int(token) for token in tokenizer.encode(string, **chosen)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
                            ) -> str:
        """Return a chat as the model reads it.

        Raises:
            UserError: the template refuses it.
        """
        try:
            return str(self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt, **self.template_kwargs))
        except Exception as e:  # of a foreign template
            # Many templates refuse a system message: as lm-eval does, try once more without it.
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) < len(chat_history):
                return self.apply_chat_template(without, add_generation_prompt)
            raise UserError(f"{self.tokenizer.name_or_path}: its chat template refuses a prompt "
                            f"({first_error_line(e)}); leave "
                            "--apply-chat-template out, or mend the template") from None

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        answers = [self._answer(self._score(context, continuation)) for _, context, continuation in requests]
        return [(float(answer["logprob"] or 0.0), bool(answer["greedy"])) for answer in answers]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> AnswerScore:
        if not continuation:
            raise UserError("a continuation whose likelihood is asked for has no token of its own; look at "
                            "the task's doc_to_choice or doc_to_target, which give an empty text")
        if len(continuation) > self.max_length:
            raise UserError(f"a continuation whose likelihood is asked for has {len(continuation)} tokens, "
                            f"and the model ends at {self.max_length}; leave the task out")
        # The last token is scored and never read, hence the + 1.
        room = max(1, self.max_length + 1 - len(continuation))
        return AnswerScore(tuple(context[-room:]), tuple(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the likelihoods of whole texts."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(str(request.args[0])), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1)
            scored = self._loglikelihood_tokens([(None, *make_disjoint_window(w)) for w in windows])
            totals.append(sum(logprob for logprob, _ in scored))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuations of instances; an instance that comes several times gets other samples."""
        num_seen: Counter[int] = Counter()
        texts = []
        for request in requests:
            texts.append(str(self.sample(request, num_seen[id(request)])["text"]))
            num_seen[id(request)] += 1
        return texts

    def sample(self, instance: Instance, number: int) -> Answer:
        """Return the answer to a sample of an instance, which lives as long as this object."""
        key = (id(instance), number)
        if key not in self._writes:
            self._writes[key] = self._write(str(instance.args[0]), dict(instance.args[1]), number,
                                            str(instance.task_name))
        return self._answer(self._writes[key])

    def _write(self, prompt: str, given: dict[str, Any], sample: int, task: str) -> Write:
        try:
            write = self._read_generation(given, sample)
        except (TypeError, ValueError, OverflowError) as e:
            raise UserError(f"task {task}: generation_kwargs {escape_controls(str(given)):.200}: cannot be "
                            "used "
                            f"({format_error(e):.200}); write numbers there, or leave them out") from None
        room = self.max_length - write.max_tokens
        if room <= 0:
            raise UserError(f"task {task}: asks for answers of {write.max_tokens} tokens, and the model ends "
                            f"at {self.max_length}; pass --max-new-tokens N to cut them shorter")
        return replace(write, prompt=tuple((self._prompt_tokens(prompt) or [self.prefix_token_id])[-room:]))

    def _read_generation(self, given: dict[str, Any], sample: int) -> Write:
        """Return a continuation as lm-eval's `generation_kwargs` ask for it, without its prompt.

        Raises:
            TypeError, ValueError, OverflowError: a value is no number.
        """
        until = given.get("until") or []
        given = {**given, "until": [until] if isinstance(until, str) else [str(text) for text in until]}
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_MAX_TOKENS))
        max_tokens = min(int(kwargs["max_gen_toks"]), self.max_gen_tokens or int(1e9))
        temperature = float(kwargs.get("temperature") or 0.0) if kwargs["do_sample"] else 0.0
        if max_tokens < 1 or not 0 <= temperature < math.inf:
            raise ValueError("it asks for no token, or a temperature that is none")
        greedy = Write((), tuple(dict.fromkeys(text for text in given["until"] if text)), max_tokens)
        if not temperature:  # all samples are one request: seed and number stay out of its key
            return greedy
        return replace(greedy, temperature=temperature, top_k=max(0, int(kwargs.get("top_k") or 0)),
                       top_p=float(kwargs.get("top_p") or 1.0), sample=sample,
                       seed=int(given.get("seed", self._seed)))

    def _prompt_tokens(self, prompt: str) -> list[int]:
        """Return a prompt's tokens as `HFLM.tok_batch_encode` does, which looks for the bos token alone."""
        bos = self.tokenizer.bos_token
        chosen = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
        return [int(token) for token in self.tokenizer.encode(prompt, **chosen)]
