"""An evaluation from names of tasks to a table: build all requests, ask for what is not answered yet, score.

The first process talks to lm-eval; others, where a model runs on several, only run the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sov.base.errors import StopRequested, UserError, told_in_a_line, visible
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import SettingsError, problems_of
from megatron_sov.bench.lm.answers import Answer, Answers, Request, distinct, folder_of
from megatron_sov.bench.lm.examples import exclude_item_from_examples
from megatron_sov.bench.lm.results import (
    DEFAULT, ResultItem, Results, TaskSampling, TaskScores, write_results)
from megatron_sov.bench.lm.settings import Settings
from megatron_sov.bench.lm.tasks import LoadedTasks, hash_of, load_tasks, offline, quiet, require_harness
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.launch_environment import is_first, under_launcher
from megatron_sov.runs.obs.events import EVENT, EVENTS, is_recorded, read_events, score_events
from megatron_sov.train.stopping import StopFlag, stoppable
from megatron_sov.work.progress.locks import holding, taking

if TYPE_CHECKING:
    from megatron_sov.bench.lm.answers import AsksEndpoint
    from megatron_sov.bench.lm.scoring import Dialogues

FEWSHOT_SEED, PYTHON_SEED = 1234, 0
"""As in lm-eval, whose examples they choose."""
JOIN_ATTEMPTS = 60
"""Seconds that a job waits for another one to write the same results."""
SAMPLED = {"samples", "reward", "environment"}
"""Keys of `metadata.sov` that make a task one of sampled answers."""


@dataclass
class _EvaluatedTask:
    name: str
    task: Any
    protocol: Any
    """Of `bench.suites`; None: the task is lm-eval's alone."""
    files: dict[str, str]
    num_fewshot: int
    """Examples in front of each item."""
    requests: list[Request] = field(default_factory=list)
    prompt_hash: str = ""
    dialogues: Dialogues | None = None
    """Of a task with several questions in one conversation."""
    warnings: list[str] = field(default_factory=list)
    """Warnings of lm-eval about the task."""


def evaluate(target: str, tasks: Sequence[str], settings: Settings) -> Results | None:
    """Measure a model on tasks, and write the results.

    Args:
        target: a checkpoint, a run (its newest one), a Hugging Face folder or an endpoint's address.
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
    if problems := problems_of(settings):
        raise SettingsError("eval lm", problems)
    require_harness()
    check_output("--output", settings.output)
    events = RunEvents(settings.run)
    private = offline(settings.sources.allow_download, settings.cache_folder)
    with stoppable() as flag:
        if not is_first():
            _run_only(target, settings, flag)
            return None
        with holding(settings.asking_folder, f"--output {settings.output}"):
            try:
                results, items, notes = _measure(target, tasks, settings, flag)
            except UserError:
                with contextlib.suppress(OSError):  # what is refused leaves no folder in which nothing is
                    private.rmdir()
                    settings.cache_folder.rmdir()
                raise
            finally:
                shutil.rmtree(settings.asking_folder, ignore_errors=True)
    for note in notes:
        print(visible(note), file=sys.stderr)
    with _joining(settings):
        results = write_results(settings.output, results, items)
        _tell(events, settings, results)
    return results


def _run_only(target: str, settings: Settings, flag: StopFlag) -> None:
    from megatron_sov.bench.lm.local import answer_locally
    from megatron_sov.bench.lm.subject import subject_of

    # no hash: the first process tells it, and to read all weights once more takes minutes
    running = subject_of(target, settings, whole=False).running
    if running is not None:
        answer_locally(running, [], None, flag)


def _measure(target: str, names: Sequence[str], settings: Settings, flag: StopFlag
             ) -> tuple[Results, list[ResultItem], list[str]]:
    with quiet():
        from megatron_sov.bench.lm.subject import Bridge
    from megatron_sov.bench.lm.subject import subject_of

    subject = subject_of(target, settings)
    loaded = load_tasks(names, settings.sources)
    kept = folder_of(settings.cache_folder, subject.identity)
    answers: dict[str, Answer] = {} if subject.running is None else Answers(kept)
    bridge = Bridge(subject.reading, answers)
    tasks = [_build(name, task, loaded, bridge, settings) for name, task in loaded.tasks.items()]
    _refuse_unused(tasks, settings)
    asker: AsksEndpoint | None = None
    if subject.running is None:
        from megatron_sov.bench.lm.answers import AsksEndpoint

        asker = AsksEndpoint(target, settings.endpoint, kept, answers)
    _ask(subject, asker, distinct(request for task in tasks for request in task.requests), answers, flag)
    dialogues = [task.dialogues for task in tasks if task.dialogues is not None]
    # A turn at a time over all conversations, so that the engine has a full batch.
    while more := distinct(request for dialogue in dialogues for request in dialogue.go_on()):
        _ask(subject, asker, more, answers, flag)
    notes: list[str] = []
    scores: dict[str, TaskScores] = {}
    items: list[ResultItem] = []
    for task in tasks:
        scores[task.name], of_task = _score_task(task, bridge, settings, notes)
        items += of_task
    scores |= _groups(loaded, scores)
    import lm_eval

    return Results(subject.model, scores, {"lm_eval": lm_eval.__version__}), items, notes


def _build(name: str, task: Any, loaded: LoadedTasks, bridge: Any, settings: Settings) -> _EvaluatedTask:
    if shown := next((f for f in ("doc_to_image", "doc_to_audio") if task.get_config(f)), None):
        raise UserError(f"task {name}: shows images or sound ({shown}), which is not evaluated; leave it out")
    protocol = _protocol(name, task, settings)
    if protocol is not None and protocol.environment:
        raise UserError(f"task {name}: is played with tools; run `megatron-sov eval play`")
    if protocol is not None and (protocol.messages_field or protocol.turns_field):
        _refuse_conversation(name, protocol, settings)
    own = task.get_config("num_fewshot")
    num_fewshot = own or 0
    if settings.num_fewshot is not None and own != 0:  # 0 in its file means that it is never to have any
        num_fewshot = settings.num_fewshot
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)
    if num_fewshot:
        exclude_item_from_examples(name, task)
    # Before each task, so that its shots do not depend on the tasks before it.
    random.seed(PYTHON_SEED)
    np.random.seed(FEWSHOT_SEED)  # what lm-eval's samplers and metrics draw from
    mode = settings.mode or (protocol.mode if protocol else DEFAULT)
    bridge.template_kwargs = {} if mode == DEFAULT else {"enable_thinking": mode == "thinking"}
    try:
        with quiet() as warnings:
            task.build_all_requests(
                limit=settings.num_items, apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
                chat_template=bridge.apply_chat_template if settings.chat_template else None,
                tokenizer_name=bridge.tokenizer_name if settings.chat_template else "")
    except UserError:
        raise
    except Exception as e:  # whatever a definition and its data make lm-eval do
        raise UserError(f"task {name}: its prompts cannot be made ({told_in_a_line(e):.300}); look at its "
                        "definition and its data") from e
    if protocol is not None and protocol.messages_field:
        for instance in task.instances:
            messages = json.loads(instance.doc[protocol.messages_field])
            instance.arguments = (bridge.apply_chat_template(messages), instance.args[1])
    from megatron_sov.bench.lm.scoring import hash_of_prompts

    built = _EvaluatedTask(name, task, protocol, loaded.files[name], num_fewshot,
                           prompt_hash=hash_of_prompts(task.instances),
                           warnings=[*loaded.warnings[name], *warnings])
    if protocol is not None:
        from megatron_sov.bench.lm.scoring import generation_of, requests_of

        if protocol.turns_field:
            from megatron_sov.bench.lm.scoring import Dialogues

            generation = generation_of(protocol, task, bridge)
            built.dialogues = Dialogues(protocol, task, bridge, generation)
            built.requests = built.dialogues.requests()
        else:
            built.requests = requests_of(protocol, task, bridge)
    else:
        built.requests = [request for instance in task.instances
                          for sample in range(int(instance.repeats or 1))
                          for request in bridge.requests_of(instance, sample)]
    return built


def _refuse_conversation(name: str, protocol: Any, settings: Settings) -> None:
    if not settings.chat_template:
        raise UserError(f"task {name}: asks whole conversations; pass --apply-chat-template")
    if protocol.turns_field and under_launcher():
        raise UserError(f"task {name}: asks in turns, which one process has to lead; leave torchrun or srun "
                        "out, and pass --nproc N")


def _sov(task: Any) -> dict[str, Any]:
    metadata = task.get_config("metadata")
    given = metadata.get("sov") if isinstance(metadata, dict) else None
    return given if isinstance(given, dict) else {}


def _protocol(name: str, task: Any, settings: Settings) -> Any:
    """Return how a task samples and judges; None: it is lm-eval's alone."""
    if not SAMPLED & set(_sov(task)):
        return None
    from megatron_sov.bench.suites.protocol import changed_as_asked, protocol_of

    protocol = protocol_of(task.get_config("metadata"), task=name, allow_code=settings.sources.allow_code)
    return protocol and changed_as_asked(protocol, settings)


def _refuse_unused(tasks: Sequence[_EvaluatedTask], settings: Settings) -> None:
    given = [*([] if settings.samples is None else [f"--samples {settings.samples}"]),
             *(f"--judge {setting}" for setting in settings.judge)]
    if given and all(task.protocol is None for task in tasks):
        raise UserError(f"{', '.join(given)}: none of the tasks samples answers for a reward to judge; leave "
                        "it out")


def _ask(subject: Any, asker: AsksEndpoint | None, requests: Sequence[Request], answers: dict[str, Answer],
         flag: StopFlag) -> None:
    """Have the model answer what is not answered yet.

    Raises:
        StopRequested: it was asked to stop before the end.
    """
    from megatron_sov.bench.lm.local import answer_locally

    if asker is not None:
        asker.recall(requests)
    left = [request for request in requests if request.key not in answers]
    if left and len(left) < len(requests):
        print(f"{len(requests) - len(left):,} of {len(requests):,} requests were answered before, and are "
              "kept", file=sys.stderr)
    stopped = flag.reason is not None
    if asker is not None:
        if left and not stopped:
            stopped = asker.answer(requests, flag)
    elif under_launcher() or (left and not stopped):  # other processes wait to be told
        assert isinstance(answers, Answers)
        stopped = answer_locally(subject.running, requests, answers.folder, flag)
        # `answer_locally` wrote them into the folder, and so did other jobs; this mapping knows none of them
        answers.reread()
    if lacking := sum(request.key not in answers for request in requests):
        if not stopped:
            raise RuntimeError(f"{lacking} of {len(requests)} requests have no answer")
        raise StopRequested(f"{len(requests) - lacking:,} of {len(requests):,} requests are answered and "
                            "kept; run the same command again to go on")


def _score_task(task: _EvaluatedTask, bridge: Any, settings: Settings, notes: list[str]) -> tuple[TaskScores,
                                                                                                  list[ResultItem]]:
    """Return a task's figures and items; what could not be computed joins `notes`."""
    from megatron_sov.bench.lm.scoring import sampling_of, score_dialogues, score_sampled, score_task

    judge: str | None = None
    told: dict[str, Any] = {}
    if task.protocol is not None:
        if task.dialogues is not None:
            scored, judge = score_dialogues(task.protocol, task.task, task.dialogues,
                                            settings.workers)
        else:
            scored, judge = score_sampled(task.protocol, task.task, bridge, settings.workers)
        told = task.protocol.as_json()
        sampling = sampling_of(task.protocol, task.task, bridge)
    else:
        sampling = _sampling(task.requests)
        with quiet() as warnings:
            scored = score_task(task.task, bridge, _sov(task.task).get("cluster_field"))
        task.warnings += warnings
    remarks = list(dict.fromkeys([*scored.notes, *(f"lm-eval warns: {text}" for text in task.warnings)]))
    notes += [f"{task.name}: {remark}" for remark in remarks]
    failed = [item.failed for item in scored.items if item.failed]
    if failed:
        notes.append(f"{task.name}: {len(failed)} of {len(scored.items)} items have no score; of the first: "
                     f"{failed[0]}")
    published = _sov(task.task).get("published_as") or None
    return TaskScores(
        task_hash=hash_of(task.task, task.files), output_type=task.task.OUTPUT_TYPE, items=len(scored.items),
        metrics=scored.metrics, dataset={"files": task.files}, num_fewshot=task.num_fewshot,
        prompt_hash=task.prompt_hash, chat_template=settings.chat_template,
        mode=settings.mode or told.get("mode", DEFAULT), sampling=sampling, judge=judge,
        agent_limits=told.get("agent_limits"), limit=settings.num_items, failed=len(failed),
        at_limit=scored.at_limit, published_as=None if published is None else str(published),
        notes=tuple(remarks)), scored.items


def _sampling(requests: Sequence[Request]) -> TaskSampling:
    from megatron_sov.bench.lm.answers import Write

    first = next((request for request in requests if isinstance(request, Write)), None)
    if first is None:
        return TaskSampling(max_tokens=0)
    samples = 1 + max(request.sample for request in requests if isinstance(request, Write))
    return TaskSampling(first.temperature, first.top_p, first.top_k, first.max_tokens, first.seed, samples)


def _groups(loaded: LoadedTasks, scores: dict[str, TaskScores]) -> dict[str, TaskScores]:
    from megatron_sov.bench.lm.scoring import group_metrics

    found: dict[str, TaskScores] = {}
    for name, group in loaded.groups.items():
        members = {t.task_name: scores[t.task_name] for t in group.get_all_tasks() if t.task_name in scores}
        if not group.has_aggregation or not members:
            continue
        metrics = group_metrics(group, {task: s.metrics for task, s in members.items()},
                                # the items with a score: of these the tasks' figures are means
                                {task: s.items - s.failed for task, s in members.items()})
        first = next(iter(members.values()))
        whole = hashlib.sha256("".join(s.task_hash for s in members.values()).encode()).hexdigest()
        found[name] = replace(
            first, task_hash=whole, metrics=metrics, items=sum(s.items for s in members.values()),
            failed=sum(s.failed for s in members.values()),
            at_limit=sum(s.at_limit for s in members.values()),
            dataset={"files": {f: h for s in members.values() for f, h in s.dataset["files"].items()}},
            prompt_hash=hashlib.sha256("".join(s.prompt_hash for s in members.values()).encode()).hexdigest())
    return found


def _tell(events: RunEvents, settings: Settings, results: Results) -> None:
    if settings.run is None:
        return
    step = results.model.step if results.model.step is not None else events.last_step()
    known = [event for event in read_events(settings.run / EVENTS) if event["event"] == EVENT]
    for event in score_events(asdict(results), step, settings.output):
        # jobs of an array all come here, and a command may be given again
        if not is_recorded(event, known):
            events.add(EVENT, **event)


@contextlib.contextmanager
def _joining(settings: Settings) -> Iterator[None]:
    """Hold the output while it is written: jobs of an array all come here, in no order, with the same."""
    for _ in range(JOIN_ATTEMPTS):
        with taking(settings.joining_folder) as is_ours:
            if is_ours:
                yield
                return
        time.sleep(1)
    raise UserError(f"--output {settings.output}: another process writes it ({settings.joining_folder} is "
                    "held); wait for it, or name another output")
