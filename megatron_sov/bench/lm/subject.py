"""The model that is evaluated: a checkpoint or a Hugging Face folder; and lm-eval's model
interface over its answers: what lm-eval asks becomes requests, and their answers what it expects.

Tokens follow lm-eval's own `HFLM` to the letter (0.4.13): the pair of context and continuation is encoded
whole and cut at the context's length, spaces move to the continuation, what is too long loses its beginning,
and text that is judged as a whole does so in windows of the longest context.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_sov.base.artifacts import MANIFEST, FileRecord, damaged_files, manifest_sha256, read_manifest
from megatron_sov.base.digests import file_digest
from megatron_sov.base.errors import UserError, first_line, list_problems, told_in_a_line, visible
from megatron_sov.bench.lm.answers import Answer, AnswerScore, Request, Write
from megatron_sov.bench.lm.local import LocalEvaluation
from megatron_sov.bench.lm.results import EvaluatedModel
from megatron_sov.bench.lm.settings import Settings
from megatron_sov.chat.folder import TOKENIZER_JSON
from megatron_sov.chat.marks import text_decoder
from megatron_sov.engine.parallel.device import inference_precision
from megatron_sov.infer.asking import check_engine, stop_ids
from megatron_sov.infer.engine import MEGATRON, TRANSFORMERS
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.request import Batching
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.work.endpoints.transport import is_address

UNKNOWN_LENGTH = 2048
"""Longest sequence where a folder says none, as in lm-eval."""


@dataclass(frozen=True)
class Subject:
    model: EvaluatedModel
    """What the results say of it."""
    identity: dict[str, Any]
    """On what its answers depend beside the requests."""
    reading: SubjectReading
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
    if is_address(target):
        raise UserError(f"{target}: `eval lm` runs checkpoints and Hugging Face folders; ask an endpoint "
                        "with lm-eval's own command: lm_eval --model local-chat-completions --model_args "
                        "base_url=URL,model=NAME")
    refuse_missing(Path(target))
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
    reading = SubjectReading(tokenizer, max_length, settings.chat_template, settings.max_gen_tokens,
                             settings.seed)

    decode = text_decoder(found.tokenizer_folder / TOKENIZER_JSON, ends,
                          lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)))
    running = LocalEvaluation(found, engine, tuple(settings.settings), settings.nproc,
                              Batching(settings.batch_size), ends, special, decode)
    return Subject(model, {"model": digest, "engine": engine, "settings": how, "ends": list(ends),
                           "precision": inference_precision()}, reading, running)


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
    return tokenizer, stop_ids(target, tokenizer.eos_token_id, encoder), special


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
        if damaged := damaged_files(folder, looked_at):
            raise UserError(list_problems(str(folder), damaged, "restore it from a copy"))
        return manifest_sha256(folder)
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
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
"""Longest continuation of a task that says none, as in lm-eval."""


class NotAnswered(Exception):
    """A request has no usable answer; the message says why."""


@dataclass(frozen=True)
class SubjectReading:
    tokenizer: Any
    """transformers' tokenizer."""
    max_length_tokens: int
    chat: bool = False
    max_gen_tokens: int | None = None
    """Longest continuation, where it is to be shorter than a task's own."""
    seed: int = 0


class Bridge(TemplateLM):
    def __init__(self, reading: SubjectReading, answers: Mapping[str, Answer]) -> None:
        super().__init__()
        self._reading, self._answers = reading, answers
        self.tokenizer = reading.tokenizer
        self._made: dict[tuple[int, int], list[Request]] = {}  # of instances that live as long as this
        self.template_kwargs: Mapping[str, Any] = {}
        """Given to the chat template beside the messages: the mode of a reasoning model."""

    @property
    def max_length(self) -> int:
        return self._reading.max_length_tokens

    @property
    def max_gen_tokens(self) -> int | None:
        """Longest continuation, where it is to be shorter than a task's own."""
        return self._reading.max_gen_tokens

    @property
    def eot_token_id(self) -> int:
        return self._token("eos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self._token("bos_token_id" if self.tokenizer.bos_token_id is not None else "eos_token_id")

    def _token(self, name: str) -> int:
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
        """Return a text's tokens; a beginning that is there already is not put there again."""
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and self._begins(string):
            chosen = {"add_special_tokens": False}
        return [int(token) for token in self.tokenizer.encode(string, **chosen)]

    def _begins(self, text: str) -> bool:
        tokenizer = self.tokenizer
        known = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
        return known and has_bos_prefix(text, tokenizer.decode(self.prefix_token_id))

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
        except Exception as e:  # whatever a foreign template does
            # One more try without them; what fails then is refused.
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) < len(chat_history):  # many templates know no system message, as lm-eval has it
                return self.apply_chat_template(without, add_generation_prompt)
            raise UserError(f"{self.tokenizer.name_or_path}: its chat template refuses a prompt "
                            f"({first_line(e)}); leave "
                            "--apply-chat-template out, or mend the template") from None

    def requests_of(self, instance: Instance, sample: int = 0) -> list[Request]:
        """Return what the model has to be asked for an instance.

        Args:
            instance: lm-eval's.
            sample: which of several continuations.

        Raises:
            UserError: it cannot be asked like this.
        """
        made = self._made.get((id(instance), sample))
        if made is None:
            made = self._made[id(instance), sample] = self._requests(instance, sample)
        return made

    def _requests(self, instance: Instance, sample: int) -> list[Request]:
        if instance.request_type == "loglikelihood":
            context, continuation = instance.args
            return [self._score(*self._pair(str(context), str(continuation)))]
        if instance.request_type == "loglikelihood_rolling":
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(str(instance.args[0])), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1)
            return [self._score(*make_disjoint_window(window)) for window in windows]
        return [self._write(str(instance.args[0]), dict(instance.args[1]), sample, instance)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens and tokens[0] == self.prefix_token_id:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> AnswerScore:
        if not continuation:
            raise UserError("a continuation whose likelihood is asked for has no token of its own; look at "
                            "the task's doc_to_choice or doc_to_target, which give an empty text")
        if len(continuation) > self.max_length:
            raise UserError(f"a continuation whose likelihood is asked for has {len(continuation)} tokens, "
                            f"and the model ends at {self.max_length}; leave the task out")
        # The last token is judged and never read, hence the + 1.
        kept = max(1, self.max_length + 1 - len(continuation))
        # cut at its beginning, as lm-eval does: what is next to the continuation decides most
        return AnswerScore(tuple(context[-kept:]), tuple(continuation))

    def _write(self, prompt: str, given: dict[str, Any], sample: int, instance: Instance) -> Write:
        try:
            asked = self._read_generation(given, sample)
        except (TypeError, ValueError, OverflowError) as e:
            told = visible(str(given))
            raise UserError(f"task {instance.task_name}: generation_kwargs {told:.200}: cannot be used "
                            f"({told_in_a_line(e):.200}); write numbers there, or leave them out") from None
        max_tokens = asked.max_tokens
        room = self.max_length - max_tokens
        if room <= 0:
            raise UserError(f"task {instance.task_name}: asks for answers of {max_tokens} tokens, and the "
                            f"model ends at {self.max_length}; pass --max-new-tokens N to cut them shorter")
        tokens = self._prompt_tokens(prompt)
        return replace(asked, prompt=tuple((tokens or [self.prefix_token_id])[-room:]))

    def _read_generation(self, given: dict[str, Any], sample: int) -> Write:
        """Return a continuation as lm-eval's `generation_kwargs` ask for it, without its prompt.

        Raises:
            TypeError, ValueError, OverflowError: one of them is no number.
        """
        until = given.get("until") or []
        given = {**given, "until": [until] if isinstance(until, str) else [str(text) for text in until]}
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_MAX_TOKENS))
        max_tokens = min(int(kwargs["max_gen_toks"]), self._reading.max_gen_tokens or int(1e9))
        temperature = float(kwargs.get("temperature") or 0.0) if kwargs["do_sample"] else 0.0
        if max_tokens < 1 or not 0 <= temperature < math.inf:
            raise ValueError("it asks for no token, or a temperature that is none")
        asked = Write((), tuple(dict.fromkeys(text for text in given["until"] if text)), max_tokens)
        # at temperature 0 all samples are one request: seed and number stay out of its key
        if temperature:
            asked = replace(asked, temperature=temperature, top_k=max(0, int(kwargs.get("top_k") or 0)),
                            top_p=float(kwargs.get("top_p") or 1.0), sample=sample,
                            seed=int(given.get("seed", self._reading.seed)))
        return asked

    def _prompt_tokens(self, prompt: str) -> list[int]:
        """Return a prompt's tokens as `HFLM.tok_batch_encode` does, which looks for the bos token alone."""
        bos = self.tokenizer.bos_token
        chosen = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
        return [int(token) for token in self.tokenizer.encode(prompt, **chosen)]

    # what lm-eval calls, once everything is answered

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False
                      ) -> list[tuple[float, bool]]:
        """Return the likelihoods of instances.

        Raises:
            NotAnswered: one has no answer.
        """
        found = [self.answer(self.requests_of(request)[0]) for request in requests]
        return [(float(answer["logprob"] or 0.0), bool(answer["greedy"])) for answer in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the likelihoods of whole texts.

        Raises:
            NotAnswered: one has no answer.
        """
        return [sum(float(self.answer(window)["logprob"] or 0.0) for window in self.requests_of(request))
                for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuations of instances; of those that are asked several times one after the other,
        different samples.

        Raises:
            NotAnswered: one has no answer.
        """
        seen: dict[int, int] = {}
        texts = []
        for request in requests:
            sample = seen[id(request)] = seen.get(id(request), -1) + 1
            texts.append(str(self.answer(self.requests_of(request, sample)[0])["text"]))
        return texts

    def answer(self, request: Request) -> Answer:
        """Return the answer to a request.

        Raises:
            NotAnswered: there is none.
        """
        found = self._answers[request.key]
        if isinstance(request, AnswerScore) and math.isnan(float(found["logprob"] or 0.0)):
            # of several choices the first would count as the best one, and a broken model as one that guesses
            raise NotAnswered("its likelihood is NaN: the model's weights or activations are no numbers")
        return found

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        found = [self.answer(self._score(context, continuation)) for _, context, continuation in requests]
        return [(float(answer["logprob"] or 0.0), bool(answer["greedy"])) for answer in found]
