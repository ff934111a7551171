"""A run of `sov-data synth` from what was asked for to the finished source."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from data_prep.libraries import require
from data_prep.synth.budget import Budget, Most
from data_prep.synth.checks.settings import CheckSettings
from data_prep.synth.engine import Engine, Tally
from data_prep.synth.generator import Generator, Item
from data_prep.synth.journal import Done, Journal, digest_of, read_done
from data_prep.synth.known import generator_class
from data_prep.synth.models import Asked, Model, opened
from data_prep.synth.shares import Share, merge_answers
from data_prep.synth.stopping import Stop
from data_prep.synth.templates import PROMPTS, Prompt, load_prompts
from data_prep.synth.work_folder import ANSWERS, Identity, check_folder, settle
from megatron_sov.documents.visible import visible
from megatron_sov.endpoints.cache import EndpointCache
from megatron_sov.endpoints.transport import missing_libraries
from megatron_sov.errors import ExitCode, StopRequested, UserError
from megatron_sov.settings import AtLeastOne, Code, Problem, SettingsError, as_problem, problems_of, read
from megatron_sov.work.arrays import refuse_living
from megatron_sov.work.children import FORWARDED
from megatron_sov.work.locks import holding

_ID = re.compile(r"[A-Za-z0-9:._/-]{1,200}")

FIXED = {"back_temperature": 0.7, "copied_words": 8, "function_temperature": 0.2, "idea_temperature": 0.7,
         "max_untranslated_share": 0.1, "min_changing_tools": 2, "min_language_score": 0.5, "min_lead": 0.5,
         "min_rows": 6, "min_tools": 4, "request_temperature": 1.0, "sandbox_workers": 2,
         "system_translated_share": 0.5, "translation_temperature": 0.3}
"""Settings of earlier versions that nobody has set."""


@dataclass(frozen=True)
class Order:
    """What a command was asked for."""

    generator: str
    """Its name."""
    output: Path
    """The run's folder."""
    writer: Model
    """What writes."""
    judge: Model
    """What judges."""
    inputs: tuple[Path, ...] = ()
    """Files and folders that items are made from."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the generator, as they were given."""
    prompts: Path | None = None
    """Folder whose templates go before those of the package."""
    asked: Asked = field(default_factory=lambda: Asked(16, 600.0, 5, 600.0))
    """How endpoints are asked."""
    most: Most = field(default_factory=Most)
    """Limits."""
    limit: AtLeastOne | None = None
    """First items alone; None: all."""
    checks: CheckSettings = field(default_factory=CheckSettings)
    """What samples go through when all are made."""
    workers: int = 1
    """Processes of those."""
    redo: bool = False
    """Whether a folder that was made with other settings is made again."""

    def problems(self) -> list[Problem]:
        """Return every rule that is broken, by option."""
        p = [*map(as_problem, missing_libraries())]
        p += [Problem(Code.FILE, "--input", "does not exist", path, "check the path")
              for path in self.inputs if not path.exists()]
        prices = (self.writer.input_price, self.writer.output_price, self.judge.input_price,
                  self.judge.output_price)
        if self.most.cost and not any(prices):
            p.append(Problem(Code.RULE, "--max-cost", "no cost is known without --input-price and "
                             "--output-price", self.most.cost))
        if self.prompts is not None and not self.prompts.is_dir():
            p.append(Problem(Code.FILE, "--prompts", "is no folder", self.prompts))
        return p


def made_generator(name: str, settings: Mapping[str, Any]) -> Generator:
    """Return a generator with its settings.

    Raises:
        UserError: there is none of that name, a library of its is missing, or settings break a rule; all of
            them are named.
    """
    cls = generator_class(name)
    if missing := require(f"generator {name}", *cls.libraries):
        raise UserError(missing[0])
    hints = get_type_hints(cls.Settings)
    # a list may be written as a,b
    lists = {key for key, hint in hints.items() if get_origin(hint) is tuple}
    given = {key: value.split(",") if isinstance(value, str) and key in lists else value
             for key, value in settings.items()}
    return cls(read(cls.Settings, given, f"generator {name}",
                    instead=lambda key: f"it is always {FIXED[key]}; leave it out" if key in FIXED else ""))


def items_of(generator: Generator, inputs: Sequence[Path], limit: int | None,
             passed_over: Callable[[Item], object] = lambda item: None) -> Iterator[tuple[int, Item]]:
    """Yield the items of a run with their numbers.

    Args:
        generator: that reads them.
        inputs: what it reads.
        limit: first items alone; None: all.
        passed_over: told of an item whose id came before: it is none.

    Raises:
        UserError: the input is not what the generator starts from, or an id cannot be one.
    """
    seen: set[str] = set()
    for item in generator.items(inputs):
        if limit is not None and len(seen) >= limit:
            return
        if not _ID.fullmatch(item.id):
            raise UserError(f"item {item.id[:80]!r}: an id must have 1 to 200 letters, digits and :._/-; "
                            "mend the input")
        if item.id in seen:
            passed_over(item)
        else:
            yield len(seen), item
            seen.add(item.id)


@dataclass(frozen=True)
class Ready:
    """An order that can be carried out."""

    generator: Generator
    """With its settings."""
    prompts: Mapping[str, Prompt]
    """Its templates."""
    identity: Identity
    """What the run is made with."""


def ready(order: Order) -> Ready:
    """Return what an order needs; nothing is written.

    Raises:
        UserError: settings, templates, models or the folder are in the way; as many as can be known.
    """
    if problems := problems_of(order):
        raise SettingsError("sov-data synth", problems)
    generator = made_generator(order.generator, order.settings)
    if generator.needs_input and not order.inputs:
        raise UserError(f"--input: generator {order.generator} needs one")
    prompts = load_prompts(generator.templates, [*([order.prompts] if order.prompts else []), PROMPTS])
    identity = Identity.of(generator, prompts, order.writer, order.judge, order.inputs,
                           order.asked.judge_max_tokens)
    check_folder(order.output)
    return Ready(generator, prompts, identity)


def run_order(order: Order) -> ExitCode:
    """Make what is not made, and finish the source.

    Raises:
        UserError: the user's settings, input, disk or endpoint are in the way; what is done stays.
        StopRequested: a limit, a signal, or an endpoint that is away; everything is saved.
    """
    made = ready(order)
    with holding(order.output, order.output):
        refuse_living(order.output)
        settle(order.output, made.identity, order.redo)
        merge_answers(order.output)
        tally = Tally()
        if todo := open_items(made.generator, order, tally):
            make(made, order, todo, tally)
        return finished(order, tally)


def open_items(generator: Generator, order: Order, tally: Tally) -> set[str]:
    """Return the ids of items that are not done, having read all of the input: it is sound, or nothing is
    paid."""
    done = read_done(order.output)
    todo, changed, twice, num_items = set(), [], list[Item](), 0
    for _, item in items_of(generator, order.inputs, order.limit, twice.append):
        num_items += 1
        known = done.get(item.id)
        if known is None:
            todo.add(item.id)
        elif known.digest != digest_of(item):
            changed.append(item.id)
        else:
            _count(tally, known)
    if not num_items:
        raise UserError(f"--input {' '.join(map(str, order.inputs))}: holds nothing for generator "
                        f"{order.generator} to start from; name another one")
    if changed:
        raise UserError(f"--input: {len(changed)} items are not what they were when they were made, such as "
                        f"{changed[0]}; name another output folder, or pass --redo: answers that still "
                        "fit cost nothing")
    if twice:
        print(f"{len(twice):,} items have the id of an earlier one and are passed over, such as "
              f"{visible(twice[0].id)} of {visible(twice[0].source)}", flush=True)
    print(f"{order.generator}: {num_items:,} items, {tally.num_items:,} done before; model "
          f"{order.writer.name}", flush=True)
    return todo


def _count(tally: Tally, known: Done) -> None:
    tally.num_items += 1
    tally.num_passed += known.num_passed
    tally.num_failed += known.num_failed
    tally.num_unusable += known.is_unusable


def make(made: Ready, order: Order, todo: set[str], tally: Tally, share: Share | None = None) -> None:
    """Make items that are not done.

    Args:
        made: the order's.
        order: what was asked for.
        todo: ids of the items.
        tally: is counted up.
        share: of one of several workers; None: this process is the only one.
    """
    stop = Stop()
    stop.on_signals(share.signals if share else FORWARDED)
    cache = EndpointCache(order.output / (share.answers if share else ANSWERS),
                          [order.output / ANSWERS] if share else [])
    budget = Budget(order.most, cache.usage(), stop)
    total = tally.num_items + len(todo)

    def told() -> None:
        usage = cache.usage()
        spent = f", cost {usage.cost:.4f}" if usage.cost else ""
        useless = (f"; the answers about {tally.num_unusable:,} items were of no use" if tally.num_unusable
                   else "")
        print(f"{order.generator}: {tally.num_items:,} of {total:,} items; {tally.num_passed:,} samples pass "
              f"their own checks, {tally.num_failed:,} do not; {usage.input_tokens + usage.output_tokens:,} "
              f"tokens{spent}{useless}", flush=True)

    try:
        with opened(order.writer, order.judge, order.asked, cache, budget, stop) as doors:
            engine = Engine(made.generator, made.prompts, doors, order.asked.threads, stop,
                            order.asked.judge_max_tokens)
            items = ((number, item) for number, item in items_of(made.generator, order.inputs, order.limit)
                     if item.id in todo)
            engine.run(items, Journal(order.output, share.prefix if share else ""), tally, told)
    finally:
        told()
        cache.close()
        stop.off_signals()


def finished(order: Order, tally: Tally) -> ExitCode:
    """Make the source of what is there; says what is missing.

    Raises:
        StopRequested: items got no answer.
    """
    from data_prep.synth.finishing import finish

    code = finish(order.output, order.checks, order.workers,
                  is_complete=not tally.num_unanswered and not tally.defects)
    if tally.defects:
        print(f"{len(tally.defects)} items ended in an error of the program, which is shown above, and are "
              f"not there: {'; '.join(tally.defects[:3])}", flush=True)
        return ExitCode.CRASH
    refuse_unanswered(tally)
    return code


def refuse_unanswered(tally: Tally) -> None:
    """Raise `StopRequested` where items got no answer."""
    if tally.num_unanswered:
        raise StopRequested(f"{tally.num_unanswered:,} items got no answer, the last: {tally.why}; the same "
                            "command tries them again")
