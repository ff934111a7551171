"""Run `sov-data synth` from options to the finished source.

Finished items stay in `.OUTPUT.work`, so that more input or other checks can continue; answers are in OUTPUT.
"""

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import MISSING, asdict, dataclass, fields as list_fields, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from data_prep.libraries import find_library_problems
from data_prep.synth.checks.settings import find_check_problems
from data_prep.synth.declared.generator import PACKAGED, Generator, load_generator
from data_prep.synth.models import Model, open_clients
from data_prep.synth.replies import NoReply, NoUsableReply
from data_prep.synth.requests import Draw, Requester, Role
from data_prep.synth.run_records import (
    ANSWERS, FinishedItem, SynthRunRecord, describe_item, read_finished_items)
from data_prep.synth.samples import GeneratedSample, GeneratorItem, replace_unwritable_sample
from data_prep.synth.synth import SynthOptions
from megatron_sov.base.artifacts import MANIFEST, translate_disk_errors
from megatron_sov.base.digests import hash_file
from megatron_sov.base.errors import (
    ExitCode, Fix, StopRequested, UserError, choose_free_path, escape_controls)
from megatron_sov.base.hints.removed import suggest_successor
from megatron_sov.base.settings import (
    ProblemCode, SettingsError, SettingsProblem, parse_nested, parse_settings, to_problem)
from megatron_sov.work.endpoints.answers import EndpointUnavailable
from megatron_sov.work.endpoints.cache import EndpointCache
from megatron_sov.work.endpoints.endpoint import Endpoint
from megatron_sov.work.endpoints.transport import find_missing_libraries
from megatron_sov.work.processes.pool import StopSignal, map_in_threads
from megatron_sov.work.progress.journal import Journal, delete_work, lock_work_folder, work_folder
from megatron_sov.work.progress.locks import lock_folder
from megatron_sov.work.progress.progress_bar import create_bar

MADE_BY = "sov-data synth"
_ID = re.compile(r"[A-Za-z0-9:._/-]{1,200}")


@dataclass(frozen=True)
class SynthRun:
    """A checked command."""

    options: SynthOptions
    output: Path
    writer: Model
    judge: Model
    generator: Generator
    record: SynthRunRecord

    def read_items(self) -> Iterator[tuple[int | None, GeneratorItem]]:
        """Yield (number, item); the number is None if an earlier item has the id. Raises `UserError`: the
        generator does not support the input, or an id is invalid."""
        item_ids: set[str] = set()
        for item in self.generator.read_items(self.options.input):
            # repeated ids do not count towards the limit
            if self.options.limit is not None and len(item_ids) >= self.options.limit:
                return
            if not _ID.fullmatch(item.id):
                raise UserError(f"item {item.id[:80]!r}: an id must have 1 to 200 letters, digits and "
                                ":._/-; mend the input")
            if item.id in item_ids:
                yield None, item
            else:
                yield len(item_ids), item
                item_ids.add(item.id)


def run_synth(options: SynthOptions) -> ExitCode:
    """List generators, or make the unfinished items and finish the source. Raises `UserError`: settings,
    input, disk or endpoint are wrong; finished items stay. Raises `StopRequested`: a limit, a signal, or an
    unavailable endpoint; finished items stay."""
    if options.list:
        if options.generator:
            lines = list_settings(options.generator)
        else:
            lines = [f"{name:<20} {load_generator(name).declared.help}" for name in PACKAGED]
        print("\n".join(lines))
        return ExitCode.OK
    run = prepare_run(options)
    output, work = run.output, work_folder(run.output)
    if options.redo and work.is_dir():
        # under the lock, because another command may still use the records
        with lock_folder(work, output):
            delete_work(output)
    # refuses a folder with other settings before any request or write
    with lock_work_folder(output, MADE_BY, asdict(run.record)):
        unfinished = find_unfinished_items(run)
        with translate_disk_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        num_unanswered, last_error = make_items(run, unfinished) if unfinished else (0, "")
        from data_prep.synth import finishing  # half a second, which --list and refusals need not wait

        # an incomplete source can be inspected, and has no manifest
        finishing.finish(run.record, options, output, is_complete=not num_unanswered)
        if num_unanswered:
            raise StopRequested(f"{num_unanswered:,} items got no answer, the last: {last_error}; the same "
                                "command tries them again")
    return ExitCode.OK


def list_settings(name: str) -> list[str]:
    """Return a line with name, default and help for each setting."""
    definition = load_generator(name)
    lines = [f"{definition.name}: {definition.declared.help}",
             f"prompts: {', '.join(sorted(template.name for template in definition.prompts.values()))}"]
    for setting in list_fields(definition.Settings):
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        help_text = definition.setting_help.get(setting.name, "").replace("%%", "%")
        lines.append(f"  {setting.name} = {default!r}: {help_text}")
    return lines


def prepare_run(options: SynthOptions) -> SynthRun:
    """Check options, models, generator and output folder without writing; raises `UserError`."""
    output = options.output
    proposed = {"--engine": "MODEL", "--output": choose_free_path("new-output")}
    missing = [option for option in proposed if not getattr(options, option.removeprefix("--"))]
    fix = Fix(options=tuple(word for option in missing for word in (option, proposed[option])))
    if not options.generator:
        name = "rewrite" if options.input else "GENERATOR"
        raise UserError(f"sov-data synth: name a generator ({', '.join(PACKAGED)}), or the YAML file of one; "
                        "--list describes them", replace(fix, arguments=(name,)))
    if missing or output is None:
        raise UserError(f"sov-data synth {options.generator}: {' and '.join(missing)} "
                        f"{'is' if len(missing) == 1 else 'are'} needed; name a model (address or folder), "
                        "and a folder to write", fix)
    writer, judge = build_models(options)
    if problems := [*map(to_problem, find_missing_libraries()),
                    *(SettingsProblem(ProblemCode.FILE, "--input", "does not exist", path, "check the path")
                      for path in options.input if not path.exists()),
                    *find_check_problems(options.checks),
                    *(problem for model in dict.fromkeys((writer, judge))
                      for problem in model.find_problems())]:
        raise SettingsError("sov-data synth", problems)
    generator = create_generator(options.generator, parse_nested(options.changes))
    definition = generator.definition
    if definition.reader.needs_input and not options.input:
        raise UserError(f"--input: generator {options.generator} needs one")
    # all facts that samples depend on: a later command with another record is refused
    record = SynthRunRecord(
        generator=generator.name, kind=generator.kind,
        settings=asdict(generator.settings), model=writer.name, identity=writer.identity,
        judge=judge.name, judge_identity=judge.identity, judge_max_tokens=options.judge_max_tokens,
        digests={f"{generator.name}.yaml": definition.digest},
        files={str(file): hash_file(file) for file in generator.list_files()})
    _check_folder(output, options.redo)
    return SynthRun(options, output, writer=writer, judge=judge, generator=generator, record=record)


def build_models(options: SynthOptions) -> tuple[Model, Model]:
    """Return writer and judge. A judge at another address gets a key only from `--judge-api-key-env`."""
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
    judge_key_env = options.judge_api_key_env
    if judge_key_env is None:
        # the writer's key never reaches a different address
        is_elsewhere = options.judge_engine and options.judge_engine != options.engine
        judge_key_env = "" if is_elsewhere else key_env
    return writer, Model(options.judge_engine or options.engine, options.judge_model, judge_key_env,
                         options.max_tokens_field, ("--judge-engine", "--judge-model"))


def create_generator(name: str, settings: Mapping[str, Any]) -> Generator:
    """Create a generator; raises `UserError` for an unknown name, a missing library or invalid settings."""
    definition = load_generator(name)
    if missing := find_library_problems(f"generator {name}", *definition.libraries):
        raise UserError(missing[0])
    tuple_settings = {key for key, hint in get_type_hints(definition.Settings).items()
                      if get_origin(hint) is tuple}
    # a,b is a list
    values = {key: value.split(",") if isinstance(value, str) and key in tuple_settings else value
              for key, value in settings.items()}
    return Generator(definition, parse_settings(
        definition.Settings, values, f"generator {name}",
        instead=lambda key: suggest_successor(f"{name}.{key}").removeprefix("; ")))


def _check_folder(output: Path, redo: bool) -> None:
    """Raise `UserError` if the output folder belongs to another command, or has lost its items' records."""
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / ANSWERS).is_file():
        raise UserError(f"--output {output}: exists and is no folder of `sov-data synth`; choose another one")
    # otherwise `lock_work_folder` compares the settings
    if (output / MANIFEST).is_file() and not work_folder(output).is_dir() and not redo:
        raise UserError(f"--output {output}: the records of its items ({work_folder(output)}) are gone; pass "
                        "--redo, which makes the items again (answers that still fit cost nothing), or name "
                        "another folder")


def find_unfinished_items(run: SynthRun) -> set[str]:
    """Return the ids of unfinished items; raises `UserError` for a damaged, empty or changed input."""
    options, unfinished = run.options, set[str]()
    # without samples, which would not fit into memory
    finished = {item.item["id"]: item.item["digest"] for item in read_finished_items(run.output)}
    changed, num_items, num_repeated, repeated = [], 0, 0, GeneratorItem("")
    for number, item in run.read_items():
        if number is None:
            num_repeated, repeated = num_repeated + 1, item
            continue
        num_items += 1
        if item.id not in finished:
            unfinished.add(item.id)
        elif finished[item.id] != describe_item(item)["digest"]:
            # the source would mix samples of both contents
            changed.append(item.id)
    if not num_items:
        raise UserError(f"--input {' '.join(map(str, options.input))}: holds nothing for generator "
                        f"{options.generator} to start from; name another one")
    if changed:
        raise UserError(f"--input: {len(changed)} items are not what they were when they were made, such as "
                        f"{changed[0]}; name another output folder, or pass --redo: answers that still "
                        "fit cost nothing")
    if num_repeated:
        print(f"{num_repeated:,} items have the id of an earlier one and are passed over, such as "
              f"{escape_controls(repeated.id)} of {escape_controls(repeated.source)}", flush=True)
    print(f"{options.generator}: {num_items:,} items, {num_items - len(unfinished):,} done before; model "
          f"{run.writer.name}", flush=True)
    return unfinished


def make_items(run: SynthRun, unfinished: Collection[str]) -> tuple[int, str]:
    """Make the unfinished items; every finished item is on disk immediately. Return the number of items
    without an answer, and the last item's error."""
    options, stop = run.options, StopSignal()
    cache, journal = EndpointCache(run.output / ANSWERS), Journal(work_folder(run.output))
    num_unanswered, last_error = 0, ""
    try:
        # a separate pool for draws: items wait for draws, and could occupy every thread in a shared pool
        with (stop.stop_on_signals(), ThreadPoolExecutor(options.threads) as draw_threads,
              open_clients(run.writer, run.judge, options, cache, stop) as clients,
              create_bar("make", len(unfinished), "item") as bar):
            maker = ItemMaker(run, clients, draw_threads, stop)
            # numbers count the whole input: a number means the same item in every command
            items = ((number, item) for number, item in run.read_items()
                     if number is not None and item.id in unfinished)
            with contextlib.closing(map_in_threads(maker.make_item, items, options.threads, stop)) as results:
                for number, result in results:
                    bar.update()
                    if isinstance(result, NoReply):
                        num_unanswered, last_error = num_unanswered + 1, str(result)
                    else:
                        journal.add([(number, result.to_json())])
    finally:
        journal.close()
        cache.close()
    return num_unanswered, last_error


class ItemMaker:
    """Makes items, from any thread."""

    def __init__(self, run: SynthRun, clients: Mapping[Role, Endpoint], draw_threads: ThreadPoolExecutor,
                 stop: StopSignal) -> None:
        self._run, self._clients, self._draw_threads, self._stop = run, clients, draw_threads, stop

    def make_item(self, numbered: tuple[int, GeneratorItem]) -> tuple[int, FinishedItem | NoReply]:
        """Return the item's number, and the finished item or the reason for no answer. Raises `UserError`: no
        request can succeed. Raises `StopRequested`: a signal, an exhausted budget or an unavailable
        endpoint."""
        self._stop.check()
        number, item = numbered
        generator = self._run.generator
        requester = Requester(item.id, generator.definition.prompts, self._clients, self._map_draws,
                              self._run.options.judge_max_tokens)
        samples: tuple[GeneratedSample, ...] = ()
        unusable = ""
        try:
            # exhaust the iterator here: later requests would be outside this `try`
            samples = tuple(map(replace_unwritable_sample, generator.make_samples(item, requester)))
        except NoUsableReply as e:
            unusable = str(e)
        except NoReply as e:
            return number, NoReply(f"{item.id}: {e}")
        except EndpointUnavailable as e:  # the next item would meet the same error
            raise StopRequested(f"{e}; nothing is lost, and the same command goes on") from None
        return number, FinishedItem(describe_item(item), samples, tuple(requester.request_keys),
                                    tuple(requester.writers), unusable)

    def _map_draws(self, function: Callable[[int], Draw], draws: Iterable[int]) -> Iterator[Draw]:
        numbers = list(draws)
        if len(numbers) == 1:
            return map(function, numbers)
        futures = [self._draw_threads.submit(function, number) for number in numbers]
        wait(futures)  # also after an error, so that no request continues unnoticed
        return iter([future.result() for future in futures])
