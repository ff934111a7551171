"""An evaluation from names of tasks to a table: build all requests, ask for what is not answered yet, score.

The first process talks to lm-eval; others, where a model runs on several, only run the model.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sov.base.errors import StopRequested, UserError, escape_controls, format_error
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import SettingsError, find_all_problems
from megatron_sov.bench.lm.answers import Answers, Request, folder_of
from megatron_sov.bench.lm.harness import offline, quiet, require_harness
from megatron_sov.bench.lm.results import DEFAULT, ResultItem, Results, write_results
from megatron_sov.bench.lm.settings import Settings
from megatron_sov.bench.lm.tasks import LoadedTasks, load_tasks
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.launch_environment import has_launcher, is_first_rank
from megatron_sov.runs.obs.events import (
    EVAL_LM_EVENT, EVENTS, build_score_events, is_score_recorded, read_events)
from megatron_sov.work.processes.stop_signals import StopFlag, catch_stop_signals
from megatron_sov.work.progress.locks import try_lock_folder

if TYPE_CHECKING:
    from megatron_sov.bench.lm.scoring import BuiltTask
    from megatron_sov.bench.lm.subject import EvaluatedLM, Subject

FEWSHOT_SEED, PYTHON_SEED = 1234, 0
"""As in lm-eval, whose examples they choose."""
JOIN_ATTEMPTS = 60
"""Seconds that a job waits for another one to write the same results."""


def evaluate(target: str, tasks: Sequence[str], settings: Settings) -> Results | None:
    """Measure a model on tasks, and write the results.

    Args:
        target: a checkpoint, a run (its newest one) or a Hugging Face folder.
        tasks: names of tasks and groups.
        settings: everything else.

    Returns:
        The results; None on other processes than the first one.

    Raises:
        UserError: the model, a task or a setting cannot be used; nothing that was answered is lost.
        StopRequested: a signal asked for it; the same call goes on behind what was answered.
    """
    if not tasks:
        raise UserError("--tasks: names none")
    if problems := find_all_problems(settings):
        raise SettingsError("eval lm", problems)
    require_harness()
    check_output("--output", settings.output)
    events = RunEvents(settings.run)
    private = offline(settings.sources.allow_download, settings.cache_folder)
    with catch_stop_signals() as flag:
        if not is_first_rank():
            _run_only(target, settings, flag)
            return None
        try:
            results, items, notes = _measure(target, tasks, settings, flag)
        except UserError:
            with contextlib.suppress(OSError):  # an empty folder is of no use
                private.rmdir()
                settings.cache_folder.rmdir()
            raise
    for note in notes:
        print(escape_controls(note), file=sys.stderr)
    with _joining(settings):
        results = write_results(settings.output, results, items)
        _tell(events, settings, results)
    return results


def _run_only(target: str, settings: Settings, flag: StopFlag) -> None:
    from megatron_sov.bench.lm.local import answer_locally
    from megatron_sov.bench.lm.subject import subject_of

    # no hash: the first process tells it, and to read all weights once more takes minutes
    answer_locally(subject_of(target, settings, whole=False).running, [], None, flag)


def _measure(target: str, names: Sequence[str], settings: Settings, flag: StopFlag
             ) -> tuple[Results, list[ResultItem], list[str]]:
    with quiet():
        from megatron_sov.bench.lm.subject import EvaluatedLM, subject_of
    from megatron_sov.bench.lm.scoring import score

    subject = subject_of(target, settings)
    loaded = load_tasks(names, settings.sources, settings)
    kept = folder_of(settings.cache_folder, subject.identity)
    answers = Answers(kept)
    lm = EvaluatedLM(subject.tokenizer, subject.max_length, answers, settings.max_gen_tokens, settings.seed)
    tasks = [_build(name, loaded, lm, settings) for name in loaded.tasks]
    given = [*([] if settings.samples is None else [f"--samples {settings.samples}"]),
             *(f"--judge {setting}" for setting in settings.judge)]
    if given and all(task.judge is None for task in tasks):
        raise UserError(f"{', '.join(given)}: none of the tasks samples answers for a reward to judge; leave "
                        "it out")
    requests = {request.key: request for task in tasks for request in task.requests}
    _ask(subject, list(requests.values()), answers, flag)
    scores, items, notes = score(tasks, loaded.groups, lm, settings)
    import lm_eval

    return Results(subject.model, scores, {"lm_eval": lm_eval.__version__}), items, notes


def _build(name: str, loaded: LoadedTasks, lm: EvaluatedLM, settings: Settings) -> BuiltTask:
    """Return a task with its prompts, as lm-eval makes them, and its requests."""
    from megatron_sov.bench.lm.scoring import BuiltTask, hash_of_prompts, refuse_unscored

    task, judge = loaded.tasks[name], loaded.judges.get(name)
    refuse_unscored(name, task, settings.sources.allow_code)
    field = judge.judging.messages_field if judge else ""
    if field and not settings.chat_template:
        raise UserError(f"task {name}: asks whole conversations; pass --apply-chat-template")
    num_fewshot = _set_examples(task, settings.num_fewshot)
    mode = settings.mode or (judge.judging.mode if judge else DEFAULT)
    lm.template_kwargs = {} if mode == DEFAULT else {"enable_thinking": mode == "thinking"}
    try:
        with quiet():
            task.build_all_requests(
                limit=settings.num_items, apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
                chat_template=lm.apply_chat_template if settings.chat_template else None,
                tokenizer_name=lm.tokenizer_name if settings.chat_template else "")
            for instance in task.instances if field else ():
                messages = json.loads(instance.doc[field])
                instance.arguments = (lm.apply_chat_template(messages), instance.args[1])
            requests = lm.collect(task.instances)
    except UserError:
        raise
    except Exception as e:  # of a definition and its data in lm-eval
        raise UserError(f"task {name}: its prompts cannot be made ({format_error(e):.300}); look at its "
                        "definition and its data") from e
    if not requests:
        raise UserError(f"task {name}: has no items; look at its data")
    return BuiltTask(name, task, judge, loaded.files[name], num_fewshot, requests,
                     hash_of_prompts(task.instances))


def _set_examples(task: Any, wanted: int | None) -> int:
    """Set the number of examples in front of each item as lm-eval's command does; return it."""
    own = task.get_config("num_fewshot")
    # 0 in the task's file means that it never has any.
    num_fewshot = wanted if wanted is not None and own != 0 else own or 0
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)
    examples = getattr(task, "fewshot_cfg", None)  # None where a task is code
    if num_fewshot and examples is not None and (examples.split, examples.samples) == (None, None) and not (
            task.has_training_docs() or task.has_validation_docs()):
        examples.split = task.config.test_split  # lm-eval then leaves the item itself out
    # Before each task, so that its examples do not depend on the tasks before it.
    random.seed(PYTHON_SEED)
    np.random.seed(FEWSHOT_SEED)
    return num_fewshot


def _ask(subject: Subject, requests: Sequence[Request], answers: Answers, flag: StopFlag) -> None:
    """Have the model answer what is not answered yet.

    Raises:
        StopRequested: it was asked to stop before the end.
    """
    from megatron_sov.bench.lm.local import answer_locally

    left = [request for request in requests if request.key not in answers]
    if left and len(left) < len(requests):
        print(f"{len(requests) - len(left):,} of {len(requests):,} requests were answered before, and are "
              "kept", file=sys.stderr)
    stopped = flag.reason is not None
    if has_launcher() or (left and not stopped):  # other processes wait to be told
        stopped = answer_locally(subject.running, requests, answers.folder, flag)
        # `answer_locally` wrote them into the folder, and so did other jobs; this mapping knows none of them
        answers.reread()
    if lacking := sum(request.key not in answers for request in requests):
        if not stopped:
            raise RuntimeError(f"{lacking} of {len(requests)} requests have no answer")
        raise StopRequested(f"{len(requests) - lacking:,} of {len(requests):,} requests are answered and "
                            "kept; run the same command again to go on")


def _tell(events: RunEvents, settings: Settings, results: Results) -> None:
    if settings.run is None:
        return
    step = results.model.step if results.model.step is not None else events.last_step()
    known = [event for event in read_events(settings.run / EVENTS) if event["event"] == EVAL_LM_EVENT]
    for event in build_score_events(asdict(results), step, settings.output):
        # jobs of an array all come here, and a command may be given again
        if not is_score_recorded(event, known):
            events.add(EVAL_LM_EVENT, **event)


@contextlib.contextmanager
def _joining(settings: Settings) -> Iterator[None]:
    """Hold the output while it is written: jobs of an array all come here, in no order, with the same."""
    folder = settings.output.with_name(f".{settings.output.name}.joining")
    for _ in range(JOIN_ATTEMPTS):
        with try_lock_folder(folder) as is_ours:
            if is_ours:
                yield
                return
        time.sleep(1)
    raise UserError(f"--output {settings.output}: another process writes it ({folder} is "
                    "held); wait for it, or name another output")
