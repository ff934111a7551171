"""`eval lm`: build the tasks' requests, answer those without a cached answer, score, and write the results.

The first rank talks to lm-eval. Other ranks only run the model.
"""

import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import lm_eval
import numpy as np

from megatron_sov.base.errors import ExitCode, StopRequested, UserError, escape_controls, format_error
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import SettingsError, find_all_problems
from megatron_sov.bench.lm.answers import AnswerCache, Request, get_answer_folder
from megatron_sov.bench.lm.engine_runs import Subject, answer_requests, resolve_subject
from megatron_sov.bench.lm.evaluated_lm import EvaluatedLM
from megatron_sov.bench.lm.harness import forbid_downloads, suppress_output
from megatron_sov.bench.lm.results import DEFAULT_MODE, ResultItem, Results, write_results
from megatron_sov.bench.lm.scoring import BuiltTask, check_scorable, hash_prompts, score_tasks
from megatron_sov.bench.lm.settings import LmEvalSettings
from megatron_sov.bench.lm.tasks import LoadedTasks, load_tasks
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.launch_environment import has_launcher, is_first_rank
from megatron_sov.runs.obs.events import (
    EVAL_LM_EVENT, EVENTS, build_score_events, is_score_recorded, read_events)
from megatron_sov.work.processes.stop_signals import StopFlag, catch_stop_signals
from megatron_sov.work.progress.locks import critical_section

FEWSHOT_SEED, PYTHON_SEED = 1234, 0
"""Seeds for few-shot examples, as in lm-eval."""


def evaluate(target: str, tasks: Sequence[str], settings: LmEvalSettings) -> Results | None:
    """Evaluate a model on tasks and write the results.

    Args:
        target: checkpoint, run (newest checkpoint) or Hugging Face folder.
        tasks: names of tasks and groups.
        settings: options of `eval lm`.

    Returns:
        The results; None on ranks other than the first.

    Raises:
        UserError: an unusable model, task or setting; answers stay in the cache.
        StopRequested: a signal arrived; the same call resumes from the cache.
    """
    if not tasks:
        raise UserError("--tasks: names none")
    if problems := find_all_problems(settings):
        raise SettingsError("eval lm", problems)
    check_output("--output", settings.output)
    events = RunEvents(settings.run)
    if not settings.sources.allow_download:
        forbid_downloads()
    with catch_stop_signals() as flag:
        if not is_first_rank():
            # no hash: the first rank reads from every file for it
            answer_requests(resolve_subject(target, settings, with_hash=False).engine, [], None, flag)
            return None
        results, items, notes = _evaluate_tasks(target, tasks, settings, flag)
    for note in notes:
        print(escape_controls(note), file=sys.stderr)
    # the jobs of an array write equal files
    results = write_results(settings.output, results, items)
    _record_events(events, settings, results)
    return results


def _evaluate_tasks(target: str, names: Sequence[str], settings: LmEvalSettings, flag: StopFlag
                    ) -> tuple[Results, list[ResultItem], list[str]]:
    subject = resolve_subject(target, settings)
    loaded = _load_tasks(names, settings, flag)
    answers = AnswerCache(get_answer_folder(settings.cache_folder, subject.identity))
    lm = EvaluatedLM(subject.tokenizer, subject.max_length, answers, settings.max_gen_tokens, settings.seed)
    tasks = [_build_task(name, loaded, lm, settings) for name in loaded.tasks]
    judge_options = [f"--judge {setting}" for setting in settings.judge]
    if settings.samples is not None:
        judge_options.insert(0, f"--samples {settings.samples}")
    if judge_options and all(task.judge is None for task in tasks):
        raise UserError(f"{', '.join(judge_options)}: none of the tasks samples answers for a reward to "
                        "judge; leave it out")
    requests = {request.key: request for task in tasks for request in task.requests}
    _answer_missing(subject, list(requests.values()), answers, flag)
    scores, items, notes = score_tasks(tasks, loaded.groups, lm, settings)
    return Results(subject.model, scores, {"lm_eval": lm_eval.__version__}), items, notes


def _load_tasks(names: Sequence[str], settings: LmEvalSettings, flag: StopFlag) -> LoadedTasks:
    """Load tasks; a stop signal during downloads, which can wait for minutes, ends the process at once."""
    if not settings.sources.allow_download:
        return load_tasks(names, settings.sources, settings)
    print(f"loading {', '.join(names)}; missing data is downloaded from the Hugging Face hub; without a "
          "network this takes minutes; Ctrl-C ends it", file=sys.stderr, flush=True)
    with flag.answer_first_signal(lambda name: os._exit(ExitCode.STOPPED)):
        return load_tasks(names, settings.sources, settings)


def _build_task(name: str, loaded: LoadedTasks, lm: EvaluatedLM, settings: LmEvalSettings) -> BuiltTask:
    """Build a task's prompts with lm-eval, and its requests."""
    task, judge = loaded.tasks[name], loaded.judges.get(name)
    check_scorable(name, task, settings.sources.allow_code)
    messages_field = judge.judging.messages_field if judge else ""
    if messages_field and not settings.chat_template:
        raise UserError(f"task {name}: sends whole conversations; pass --apply-chat-template")
    num_fewshot = _set_num_fewshot(task, settings.num_fewshot)
    mode = settings.mode or (judge.judging.mode if judge else DEFAULT_MODE)
    lm.template_kwargs = {} if mode == DEFAULT_MODE else {"enable_thinking": mode == "thinking"}
    try:
        with suppress_output():
            task.build_all_requests(
                limit=settings.num_items, apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
                chat_template=lm.apply_chat_template if settings.chat_template else None,
                tokenizer_name=lm.tokenizer_name if settings.chat_template else "")
            for instance in task.instances if messages_field else ():
                messages = json.loads(instance.doc[messages_field])
                instance.arguments = (lm.apply_chat_template(messages), instance.args[1])
            requests = lm.collect_requests(task.instances)
    except UserError:
        raise
    except Exception as e:  # various errors from task definition and data
        raise UserError(f"task {name}: its prompts cannot be built ({format_error(e):.300}); check its "
                        "definition and its data") from e
    if not requests:
        raise UserError(f"task {name}: has no items; check its data")
    return BuiltTask(name, task, judge=judge, files=loaded.files[name], num_fewshot=num_fewshot,
                     requests=requests, prompt_hash=hash_prompts(task.instances))


def _set_num_fewshot(task: Any, option: int | None) -> int:
    """Set and return the number of examples before each item, as lm-eval's command does."""
    num_fewshot = task.get_config("num_fewshot") or 0
    # 0 in the task's file forbids examples
    if option is not None and task.get_config("num_fewshot") != 0:
        num_fewshot = option
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)
    examples = getattr(task, "fewshot_cfg", None)  # None for tasks with a `class`
    has_example_split = task.has_training_docs() or task.has_validation_docs()
    if num_fewshot and examples is not None and not has_example_split and (
            (examples.split, examples.samples) == (None, None)):
        examples.split = task.config.test_split  # makes lm-eval leave the item itself out
    # seed before each task: the examples must not depend on earlier tasks
    random.seed(PYTHON_SEED)
    np.random.seed(FEWSHOT_SEED)
    return num_fewshot


def _answer_missing(subject: Subject, requests: Sequence[Request], answers: AnswerCache, flag: StopFlag
                    ) -> None:
    """Answer the requests that the cache lacks. Raises `StopRequested`: a signal arrived before the end."""
    num_missing = sum(request.key not in answers for request in requests)
    if 0 < num_missing < len(requests):
        print(f"{len(requests) - num_missing:,} of {len(requests):,} requests were answered before, and are "
              "kept", file=sys.stderr)
    stopped = flag.reason is not None
    if has_launcher() or (num_missing and not stopped):  # the other ranks wait in a collective
        stopped = answer_requests(subject.engine, requests, answers.folder, flag)
        answers.load_new_answers()
    if num_missing := sum(request.key not in answers for request in requests):
        if not stopped:
            raise RuntimeError(f"{num_missing} of {len(requests)} requests have no answer")
        raise StopRequested(f"{len(requests) - num_missing:,} of {len(requests):,} requests are answered and "
                            "kept; run the same command again to continue")


def _record_events(events: RunEvents, settings: LmEvalSettings, results: Results) -> None:
    if settings.run is None:
        return
    step = results.model.step if results.model.step is not None else events.last_step()
    with critical_section(settings.run):  # between reading and adding, another job would add the same scores
        recorded = [event for event in read_events(settings.run / EVENTS) if event["event"] == EVAL_LM_EVENT]
        for event in build_score_events(asdict(results), step, settings.output):
            # array jobs and repeated commands arrive with equal scores
            if not is_score_recorded(event, recorded):
                events.add(EVAL_LM_EVENT, **event)
