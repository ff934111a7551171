"""A run of `sov-data synth` from its options to the finished source.

Finished items lie in `.OUTPUT.work` and stay there when the source is finished, so that more input or other
checks go on with them; answers lie in OUTPUT.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from data_prep.libraries import find_library_problems
from data_prep.synth.candidates import (
    ANSWERS, RUN, FinishedItem, SynthRunRecord, digest_of, read_finished, read_run)
from data_prep.synth.generator import (
    Ask, Door, Drawn, GeneratedSample, Generator, GeneratorItem, Role, writable)
from data_prep.synth.known import FILES, REMOVED, generator_class
from data_prep.synth.models import Budget, Model, opened
from data_prep.synth.options import SynthOptions
from data_prep.synth.replies import NoReply, NoUsableReply
from megatron_sov.base.artifacts import format_json, translate_disk_errors, write_atomically
from megatron_sov.base.digests import hash_file
from megatron_sov.base.errors import (
    ExitCode, StopRequested, UserError, escape_controls, format_error, format_problems)
from megatron_sov.base.hints.removed import suggest_successor
from megatron_sov.base.outputs import check_creatable
from megatron_sov.base.settings import (
    ProblemCode, SettingsError, SettingsProblem, count_cores, parse_nested, parse_settings, to_problem)
from megatron_sov.work.endpoints.answers import EndpointUnavailable
from megatron_sov.work.endpoints.cache import EndpointCache
from megatron_sov.work.endpoints.transport import find_missing_libraries
from megatron_sov.work.processes.pool import StopSignal, map_in_threads
from megatron_sov.work.progress.journal import (
    Journal, delete_work, describe_differences, lock_work_folder, work_folder)
from megatron_sov.work.progress.locks import lock_folder

MADE_BY = "sov-data synth"
MIN_TOLD_S, MAX_TOLD_S = 10.0, 900.0
"""Between two lines with the progress of a run."""
_ID = re.compile(r"[A-Za-z0-9:._/-]{1,200}")


@dataclass(frozen=True)
class SynthRun:
    """A command that can be carried out."""

    options: SynthOptions
    output: Path
    writer: Model
    judge: Model
    generator: Generator
    record: SynthRunRecord

    def items(self, pass_over: Callable[[GeneratorItem], object] = lambda item: None
              ) -> Iterator[tuple[int, GeneratorItem]]:
        """Yield the items with their numbers; `pass_over` is called with those whose id came before.

        Raises:
            UserError: the input is not what the generator starts from, or an id cannot be one.
        """
        seen: set[str] = set()
        for item in self.generator.items(self.options.input):
            # `seen` holds different ids: an id that is repeated does not use up the limit
            if self.options.limit is not None and len(seen) >= self.options.limit:
                return
            if not _ID.fullmatch(item.id):
                raise UserError(f"item {item.id[:80]!r}: an id must have 1 to 200 letters, digits and "
                                ":._/-; mend the input")
            if item.id in seen:
                pass_over(item)
            else:
                yield len(seen), item
                seen.add(item.id)


def run_synth(options: SynthOptions) -> ExitCode:
    """Make the items that are not made, and finish the source.

    Raises:
        UserError: the user's settings, input, disk or endpoint are in the way; finished items stay.
        StopRequested: a limit, a signal, or an endpoint that is away; everything is saved.
    """
    run = open_run(options)
    output, work = run.output, work_folder(run.output)
    if options.redo and work.is_dir():
        # under the lock, since another command may still work on these records
        with lock_folder(work, output):
            delete_work(output)
    # `begun` refuses a folder that was begun with other settings, before anything is asked or written
    with lock_work_folder(output, MADE_BY, run.record.deciding()):
        # the input is read to its end first: a damaged one leaves run.json as it was
        tally = open_items(run)
        with translate_disk_errors(output):
            output.mkdir(parents=True, exist_ok=True)
            write_atomically(output / RUN, format_json({**asdict(run.record),
                                                        "num_items": tally.num_items + len(tally.todo)}))
        if tally.todo:
            make_items(run, tally)
        return finish_run(run, tally)


def open_run(options: SynthOptions) -> SynthRun:
    """Return a run that can begin; nothing is written.

    Raises:
        UserError: an option is missing, or settings, prompts, models or the folder are in the way; as many
            as can be known.
    """
    from data_prep.synth.checks.settings import check_problems

    if not options.generator:
        raise UserError(f"sov-data synth: name a generator ({', '.join(FILES)}), or the YAML file of one; "
                        "--list describes them")
    output = options.output
    missing = [f"--{name}" for name in ("engine", "output") if not getattr(options, name)]
    if missing or output is None:
        raise UserError(f"sov-data synth {options.generator}: {' and '.join(missing)} "
                        f"{'is' if len(missing) == 1 else 'are'} needed (--help lists what it takes)")
    writer, judge = models_of(options)
    if problems := [*map(to_problem, find_missing_libraries()),
                    *(SettingsProblem(ProblemCode.FILE, "--input", "does not exist", path, "check the path")
                      for path in options.input if not path.exists()),
                    *check_problems(options.checks),
                    *(problem for model in dict.fromkeys((writer, judge)) for problem in model.problems())]:
        raise SettingsError("sov-data synth", problems)
    generator = make_generator(options.generator, parse_nested(options.changes))
    if generator.needs_input and not options.input:
        raise UserError(f"--input: generator {options.generator} needs one")
    generator.prompts()
    # all that samples depend on: a later command whose record differs in it is refused
    record = SynthRunRecord(
        generator=generator.name, version=generator.version, kind=generator.kind,
        settings=json.loads(format_json(asdict(generator.settings))), inputs=tuple(map(str, options.input)),
        model=writer.name, engine=writer.location, identity=writer.identity(),
        judge=judge.name, judge_engine=judge.location, judge_identity=judge.identity(),
        judge_max_tokens=options.judge_max_tokens, digests=generator.digests(),
        files={str(file): hash_file(file) for file in generator.files()})
    _check_folder(output, record, options.redo)
    return SynthRun(options, output, writer, judge, generator, record)


def models_of(options: SynthOptions) -> tuple[Model, Model]:
    """Return the model that writes and the one that judges.  A key is sent to another address only if its
    variable is named for it.

    Raises:
        UserError: a variable has no key, or an option is a judge's and there is none of its own.
    """
    for option, variable in (("--api-key-env", options.api_key_env),
                             ("--judge-api-key-env", options.judge_api_key_env)):
        if variable and not os.environ.get(variable):
            raise UserError(f"{option} {variable}: the environment has no key there; set it, or leave the "
                            "option out where none is needed")
    key_env = "OPENAI_API_KEY" if options.api_key_env is None else options.api_key_env
    writer = Model(options.engine, options.model, key_env, options.max_tokens_field)
    if not options.judge_engine and not options.judge_model:
        if options.judge_api_key_env is not None:
            raise UserError("--judge-api-key-env: there is no judge of its own; add --judge-engine or "
                            "--judge-model, or leave it out")
        return writer, writer
    # the key of the writer goes to no other address, which may be that of a stranger
    own = "" if options.judge_engine and options.judge_engine != options.engine else key_env
    return writer, Model(options.judge_engine or options.engine, options.judge_model,
                         own if options.judge_api_key_env is None else options.judge_api_key_env,
                         options.max_tokens_field, ("--judge-engine", "--judge-model"))


def make_generator(name: str, settings: Mapping[str, Any]) -> Generator:
    """Return a generator with its settings.

    Raises:
        UserError: there is none of that name, a library of its is missing, or settings break a rule; all of
            them are named.
    """
    cls = generator_class(name)
    if missing := find_library_problems(f"generator {name}", *cls.libraries):
        raise UserError(missing[0])
    hints = get_type_hints(cls.Settings)
    # a list may be written as a,b
    lists = {key for key, hint in hints.items() if get_origin(hint) is tuple}
    given = {key: value.split(",") if isinstance(value, str) and key in lists else value
             for key, value in settings.items()}
    return cls(parse_settings(cls.Settings, given, f"generator {name}", instead=lambda key: suggest_successor(
        f"{name}.{key}", REMOVED).removeprefix("; ")))


def _check_folder(output: Path, record: SynthRunRecord, redo: bool) -> None:
    """Raise `UserError` where a run cannot have its folder."""
    check_creatable(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / RUN).is_file():
        raise UserError(f"--output {output}: exists and is no folder of `sov-data synth`; choose another one")
    # where the records were cleared, or the folder was moved without them
    if not redo and not work_folder(output).is_dir() and (
            changed := describe_differences(read_run(output).deciding(), record.deciding())):
        raise UserError(format_problems(
            f"--output {output}: was made with other settings", changed,
            "name another folder, or pass --redo: its items are made again, and answers that still fit cost "
            "nothing"))


@dataclass
class RunningTally:
    """Progress of a run."""

    todo: set[str] = field(default_factory=set)
    """Ids of items that are not done when the command begins."""
    num_items: int = 0
    """Done, those of earlier commands too."""
    num_passed: int = 0
    """Samples that pass their own checks."""
    num_failed: int = 0
    """Samples that do not."""
    num_unusable: int = 0
    """Items whose answers were of no use."""
    num_unanswered: int = 0
    """Items that got no answer and are tried again by the next command."""
    why: str = ""
    """Of the last of them."""
    defects: list[str] = field(default_factory=list)
    """Items that ended in an error of the program, with it."""

    def add(self, num_passed: int, num_failed: int, is_unusable: bool) -> None:
        self.num_items += 1
        self.num_passed += num_passed
        self.num_failed += num_failed
        self.num_unusable += is_unusable

    def note_failure(self, item: GeneratorItem, error: Exception) -> None:
        if isinstance(error, NoReply):
            self.num_unanswered += 1
            self.why = f"{item.id}: {error}"
            return
        # one odd item does not end the run; the command names it, and ends with 1
        if not self.defects:
            traceback.print_exception(error)
        self.defects.append(f"{item.id}: {format_error(error)}")


def open_items(run: SynthRun) -> RunningTally:
    """Count finished and unfinished items, after all of the input was read: a damaged one costs nothing."""
    options, tally = run.options, RunningTally()
    # sums alone: the samples of all items would not fit into memory
    finished = {one.item["id"]: (one.item["digest"], one.counts) for one in read_finished(run.output)}
    changed, twice, num_items = [], list[GeneratorItem](), 0
    for _, item in run.items(twice.append):
        num_items += 1
        if item.id not in finished:
            tally.todo.add(item.id)
        elif finished[item.id][0] != digest_of(item):
            # same id, other content: the source would hold samples of both
            changed.append(item.id)
        else:
            tally.add(*finished[item.id][1])
    if not num_items:
        raise UserError(f"--input {' '.join(map(str, options.input))}: holds nothing for generator "
                        f"{options.generator} to start from; name another one")
    if changed:
        raise UserError(f"--input: {len(changed)} items are not what they were when they were made, such as "
                        f"{changed[0]}; name another output folder, or pass --redo: answers that still "
                        "fit cost nothing")
    if twice:
        print(f"{len(twice):,} items have the id of an earlier one and are passed over, such as "
              f"{escape_controls(twice[0].id)} of {escape_controls(twice[0].source)}", flush=True)
    print(f"{options.generator}: {num_items:,} items, {tally.num_items:,} done before; model "
          f"{run.writer.name}", flush=True)
    return tally


def make_items(run: SynthRun, tally: RunningTally) -> None:
    """Make the items of a tally that are not done; each is on disk as soon as it is done."""
    options, stop = run.options, StopSignal()
    cache, journal = EndpointCache(run.output / ANSWERS), Journal(work_folder(run.output))
    total, began_s = tally.num_items + len(tally.todo), time.monotonic()

    def tell() -> None:
        usage = cache.usage()
        useless = (f"; the answers about {tally.num_unusable:,} items were of no use" if tally.num_unusable
                   else "")
        print(f"{options.generator}: {tally.num_items:,} of {total:,} items; {tally.num_passed:,} samples "
              f"pass their own checks, {tally.num_failed:,} do not; "
              f"{usage.input_tokens + usage.output_tokens:,} tokens{useless}", flush=True)

    told_s = began_s
    try:
        # Draws have a pool of their own: items wait for them, and could fill all threads of one pool.
        with (stop.stop_on_signals(), ThreadPoolExecutor(options.threads) as drawers,
              opened(run.writer, run.judge, options, cache,
                     Budget(options.max_tokens_total, cache.usage(), stop), stop) as doors):
            maker = ItemMaker(run, doors, drawers, stop)
            # numbers are counted over the whole input, so that a number means the same item in every command
            items = ((number, item) for number, item in run.items() if item.id in tally.todo)
            with contextlib.closing(map_in_threads(maker.make, items, options.threads, stop)) as outcomes:
                for number, item, outcome in outcomes:
                    if isinstance(outcome, Exception):
                        tally.note_failure(item, outcome)
                        continue
                    # written before it is counted: a line on the screen survives a kill
                    journal.add([(number, outcome.record())])
                    tally.add(*outcome.counts)
                    now_s = time.monotonic()
                    # a line for each twentieth of the time so far, within bounds
                    if now_s - told_s >= min(max(MIN_TOLD_S, (now_s - began_s) / 20), MAX_TOLD_S):
                        told_s = now_s
                        tell()
    finally:
        tell()
        journal.close()
        cache.close()


class ItemMaker:
    """Makes items, in any thread."""

    def __init__(self, run: SynthRun, doors: Mapping[Role, Door], drawers: ThreadPoolExecutor,
                 stop: StopSignal) -> None:
        self._run, self._doors, self._drawers, self._stop = run, doors, drawers, stop
        self._prompts = run.generator.prompts()

    def make(self, numbered: tuple[int, GeneratorItem]
             ) -> tuple[int, GeneratorItem, FinishedItem | Exception]:
        """Return number, item, and the finished item or the error that concerns this one alone.

        Raises:
            UserError: no request can succeed.
            StopRequested: the run was asked to stop, its budget is used up, or the endpoint is away.
        """
        self._stop.check()
        number, item = numbered
        try:
            return number, item, self._make_item(item)
        # these end the run, since the next item would meet the same
        except (UserError, StopRequested):
            raise
        except EndpointUnavailable as e:
            raise StopRequested(f"{e}; nothing is lost, and the same command goes on") from None
        except Exception as e:
            return number, item, e

    def _make_item(self, item: GeneratorItem) -> FinishedItem:
        ask = Ask(item.id, self._prompts, self._doors, self._draw_all, self._run.options.judge_max_tokens)
        samples: tuple[GeneratedSample, ...] = ()
        unusable = ""
        try:
            # run to its end here: a generator left half-way would ask outside of this `try`
            samples = tuple(map(writable, self._run.generator.make(item, ask)))
        except NoUsableReply as e:
            unusable = str(e)
        if ask.failure is not None:  # which the generator went on without
            raise ask.failure
        return FinishedItem.of(item, samples, tuple(ask.asked), tuple(ask.writers), unusable)

    def _draw_all(self, draw: Callable[[int], Drawn], draws: Iterable[int]) -> Iterator[Drawn]:
        numbers = list(draws)
        if len(numbers) == 1:
            return map(draw, numbers)
        futures = [self._drawers.submit(draw, number) for number in numbers]
        wait(futures)  # where one fails too, so that nothing asks unheard
        return iter([future.result() for future in futures])


def finish_run(run: SynthRun, tally: RunningTally) -> ExitCode:
    """Finish the source of all items that are done, and name those that are missing.

    Raises:
        StopRequested: items got no answer.
    """
    from data_prep.synth import finishing  # imported late: it needs the whole pipeline

    # written with items missing too, so that finished ones can be looked at; then without a manifest
    finishing.finish(run.output, run.options.checks, run.options.workers or count_cores(),
                     is_complete=not tally.num_unanswered and not tally.defects)
    if tally.defects:
        print(f"{len(tally.defects)} items ended in an error of the program, which is shown above, and are "
              f"not there: {'; '.join(tally.defects[:3])}", flush=True)
        return ExitCode.CRASH
    if tally.num_unanswered:
        raise StopRequested(f"{tally.num_unanswered:,} items got no answer, the last: {tally.why}; the same "
                            "command tries them again")
    return ExitCode.OK
