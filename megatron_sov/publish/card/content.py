"""The card of a model: everything that its runs, manifests and scores tell, and what they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_count, format_duration, format_size, format_value
from megatron_sov.publish.card.data_summary import DATA, FILE, DataCard, figures_of_data
from megatron_sov.publish.card.lineage import HF_MODEL, Lineage
from megatron_sov.publish.card.run_record import (
    ANSWERS, Basis, CardAnswers, CardRunRecord, Compute, Figure, RecordedOrigin, as_json, compute_of,
    figures_in, total_compute, unknown)
from megatron_sov.runs.checkpoints import KIND
from megatron_sov.runs.folder import COMPLETION, CONFIG
from megatron_sov.runs.obs.events import EVENTS
from megatron_sov.runs.obs.figures import number
from megatron_sov.runs.obs.history import COMPLETE, KINDS
from megatron_sov.version import __version__

# Figures of a card as people read them.

NOT_KNOWN = "not known"


def quantity(found: Figure | None) -> str:
    """Return a figure with its unit."""
    if found is None or found.value is None:
        return NOT_KNOWN
    value = found.value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if not isinstance(value, (int, float)):
        return str(value)
    if found.unit == "s":
        return format_duration(float(value))
    if found.unit == "B":
        return format_size(float(value))
    if found.unit == "FLOP":
        return f"{float(value):.3g} FLOP"
    if found.unit == "g":
        return f"{float(value) / 1000:,.4g} kg CO2 eq"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return f"{text} {found.unit}".strip()


def with_basis(name: str, found: Figure) -> str:
    return f"{name}: {quantity(found)} ({found.basis}{f': {found.how}' if found.how else ''})"


def score(row: dict[str, Any]) -> str:
    value = number(row["value"].value)
    if not math.isfinite(value):
        return NOT_KNOWN
    interval = row["interval"].value if row["interval"] is not None else None
    bounds = ([number(bound) for bound in interval] if isinstance(interval, (list, tuple)) else [])
    ends = f" [{format_value(bounds[0])}, {format_value(bounds[1])}]" if len(bounds) == 2 else ""
    return f"{format_value(value)}{ends}"


def params(found: Figure) -> str:
    return format_count(float(found.value)) if found.known else NOT_KNOWN


# What a model was measured at: results of `eval lm`, and what its runs measured of it.

ENDPOINT = "endpoint"
MAX_ROWS = 5_000


@dataclass(frozen=True)
class ScoreFile:
    """One file of `eval lm`."""

    path: str
    """As the user named it, for messages."""
    name: str
    """Of the file, in the card."""
    sha256: str
    """Hash of its bytes."""
    content: dict[str, Any]
    """What it holds (`bench.lm.results`)."""


def score_rows(files: Sequence[ScoreFile], found: Lineage) -> list[dict[str, Any]]:
    """Return one row for each metric of each task: files first, then events of a kind that no file has.

    Raises:
        UserError: a file is of another model.
    """
    rows = [row for file in files for row in _of_file(file, found)]
    known = {row["key"] for row in rows}
    run = found.runs[-1]
    for index, event in run.kept.get("eval_lm", []):
        # without "", which stands for a run that has no checkpoint and is the hash of no model
        if str(event.get("model_hash")) in {found.model, *found.exports} - {""}:
            row = _of_event(run, index, event)
            if row["key"] not in known:
                # a later event of the same figure replaces an earlier one; figures of files stay
                rows = [r for r in rows if r["key"] != row["key"]] + [row]
    return rows[:MAX_ROWS]


def _of_file(file: ScoreFile, found: Lineage) -> list[dict[str, Any]]:
    content = file.content
    model = content["model"]
    basis: Basis = "recorded"
    how = ""
    if model["kind"] == ENDPOINT:
        basis, how = "stated", "measured over an endpoint; the command line says that it served this model"
    elif model["hash"] not in {found.model, *found.exports} - {""}:
        same = [node for node in found.graph.nodes.values() if node.sha256 == model["hash"]]
        what = f"{same[0].kind} {same[0].name!r}, an earlier stage" if same else "another model"
        raise UserError(f"--eval {file.path}: was measured on {what} (hash {str(model['hash'])[:12]}), and "
                        f"the card is of {found.model[:12] or 'a run without a checkpoint'}; evaluate this "
                        "run's checkpoint, or pass its export as --hf-folder")
    rows = []
    for task, scores in content["tasks"].items():
        way = f"tasks.{task}"
        for i, metric in enumerate(scores["metrics"]):
            def of(value: Any, key: str, unit: str = "") -> Figure:
                return Figure(value, basis if value is not None else "unknown",
                              (RecordedOrigin(file.name, file.name, key),), unit, how)

            interval = metric.get("interval")
            contamination = scores.get("contamination")
            rows.append({
                "key": (task, metric["name"], str(metric.get("k")), metric.get("filter", "none")),
                "task": task, "metric": str(metric["name"]), "filter": str(metric.get("filter", "none")),
                "value": _value(of(metric["value"], f"{way}.metrics[{i}].value"), task, metric["name"]),
                "k": of(metric.get("k"), f"{way}.metrics[{i}].k") if metric.get("k") is not None else None,
                "interval": of(list(interval), f"{way}.metrics[{i}].interval") if interval else None,
                "items": of(scores["items"], f"{way}.items"), "failed": of(scores["failed"], f"{way}.failed"),
                "at_limit": of(scores["at_limit"], f"{way}.at_limit"),
                "num_fewshot": of(scores["num_fewshot"], f"{way}.num_fewshot"),
                "limit": (of(scores["limit"], f"{way}.limit") if scores.get("limit") is not None else None),
                "mode": str(scores["mode"]), "output_type": str(scores["output_type"]),
                "sampling": {name: of(value, f"{way}.sampling.{name}")
                             for name, value in (scores.get("sampling") or {}).items()},
                "task_hash": str(scores["task_hash"]), "judge": scores.get("judge"),
                "contamination": None if contamination is None else {
                    "checked_against": str(contamination["checked_against"]),
                    "items_hit": of(contamination["items_hit"], f"{way}.contamination.items_hit"),
                    "value_without": of(contamination["value_without"],
                                        f"{way}.contamination.value_without")}})
    return rows


def _of_event(run: CardRunRecord, index: int, event: dict[str, Any]) -> dict[str, Any]:
    def of(name: str) -> Figure:
        value = event.get(name)
        return Figure(value, "unknown" if value is None else "recorded",
                      (RecordedOrigin(run.id, EVENTS, f"eval_lm[{index}].{name}"),))

    task, metric = str(event.get("task")), str(event.get("metric"))
    return {"key": (task, metric, str(event.get("k")), str(event.get("filter", "none"))), "task": task,
            "metric": metric, "filter": str(event.get("filter", "none")),
            "value": _value(of("value"), task, metric), "k": of("k") if event.get("k") is not None else None,
            "interval": of("interval") if event.get("interval") else None, "items": of("items"),
            "failed": of("failed"), "at_limit": of("at_limit"), "num_fewshot": None, "limit": None,
            "mode": str(event.get("mode", "")), "output_type": "", "sampling": {},
            "task_hash": str(event.get("task_hash", "")), "judge": None, "contamination": None}


def _value(figure: Figure, task: str, metric: str) -> Figure:
    """Return a score; one that could not be computed is named, and never 0."""
    if figure.value is not None and math.isfinite(number(figure.value)):
        return figure
    return Figure(None, "unknown", figure.origins, figure.unit,
                  f"{metric} of task {task}: no item that it can be computed from; evaluate again")


def measured_while_training(run: CardRunRecord) -> dict[str, Any]:
    """Return the last figures that a run measured itself: held-out bits per byte, needles, gates."""
    found: dict[str, Any] = {"heldout": {}, "needle": None, "gate": None}
    for index, event in run.last("eval")[-1:]:
        heldout = event.get("heldout")
        for source, row in heldout.items() if isinstance(heldout, dict) else ():
            value = row.get("bits_per_byte") if isinstance(row, dict) else None
            if math.isfinite(number(value)):
                found["heldout"][source] = Figure(value, "recorded", (RecordedOrigin(
                    run.id, EVENTS, f"eval[{index}].heldout.{source}.bits_per_byte"),), "bits per byte")
    for index, event in run.last("needle")[-1:]:
        if math.isfinite(number(event.get("score"))):
            found["needle"] = Figure(event["score"], "recorded",
                                     (RecordedOrigin(run.id, EVENTS, f"needle[{index}].score"),))
    for index, event in run.last("gate")[-1:]:
        found["gate"] = Figure(bool(event.get("passed")), "recorded",
                               (RecordedOrigin(run.id, EVENTS, f"gate[{index}].passed"),),
                               how=f"at step {event.get('step')}")
    return found


FORMAT, VERSION = "megatron-sov model card", 1
ARCHITECTURE = ("family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
                "num_experts", "num_experts_per_token", "num_shared_experts", "max_position_tokens")
"""Settings of `model` that the card has."""
SETTINGS = {"optim": ("name", "lr", "schedule"), "train": ("precision", "fp8", "seed"), "lora": ("rank",)}
"""Other settings of a run that it has."""
MODALITY = "text"
"""Of what the trainer learns and writes."""


def make_card(found: Lineage, data: DataCard | None, scores: Sequence[ScoreFile], answers: CardAnswers,
              answers_sha256: str = "") -> dict[str, Any]:
    """Return the card; each figure in it names where it comes from.

    Args:
        found: the model's history.
        data: the card of its data; None: none of it was found.
        scores: results of `eval lm` of this model.
        answers: what the team says.
        answers_sha256: hash of the file that says it; empty: there is none.

    Raises:
        UserError: scores are of another model.
    """
    run = found.runs[-1]
    computed = [compute_of(one, answers) for one in found.runs]
    name = answers.name or run.name
    content: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "written_by": f"megatron-sov {__version__}", "name": name,
        "model": _model(found, run),
        "stages": [_stage(one, of) for one, of in zip(found.runs, computed, strict=True)],
        "compute": _compute(total_compute(computed)),
        "data": figures_of_data(data, answers) if data is not None else None,
        "scores": score_rows(scores, found), "while_training": {
            one.name: measured_while_training(one) for one in found.runs},
        "stated": _stated(answers), "licence": _licence(answers),
        "read": _read(found, data, scores, answers_sha256)}
    # last: they follow from what the card says by now
    content["limits"] = _limits(content, found)
    content["not_known"] = _not_known(content, found, data, answers)
    return content


def card_json(card: dict[str, Any]) -> Any:
    scores = [{name: value for name, value in row.items() if name != "key"} for row in card["scores"]]
    return as_json({**card, "scores": scores})


def _model(found: Lineage, run: CardRunRecord) -> dict[str, Any]:
    last = len(run.attempts) - 1
    figures: dict[str, Any] = {name: _setting(run, "model", name) for name in ARCHITECTURE
                               if run.config.model.num_experts or "experts" not in name}
    figures |= _adapter(found, run)
    figures["recipe"] = Figure(run.config.recipe.rpartition("/")[2], "computed",
                               (RecordedOrigin(run.id, CONFIG, "recipe"),),
                               how="without the folder of a file")
    for name, what in (("num_params", "number of parameters"), ("num_active_params", "active parameters")):
        value = run.start.get(name)
        figures[name] = (Figure(value, "recorded",
                                (RecordedOrigin(run.id, EVENTS, f"run_start[{last}].{name}"),))
                         if math.isfinite(number(value)) else
                         unknown(what, "the run's events tell of no start; train a step"))
    origins = tuple(RecordedOrigin(run.id, EVENTS, key) for key in ("phase[*].seq_len", "step[*].step"))
    figures["trained_length"] = (
        Figure(run.longest_tokens, "computed", origins, "tokens", "longest samples of a step there")
        if run.longest_tokens else
        unknown("length of training samples", "the run's events tell of no step and its phase"))
    figures["checkpoint"] = found.model
    figures["exports"] = [_export(found, sha256) for sha256 in found.exports]
    return figures


def _adapter(found: Lineage, run: CardRunRecord) -> dict[str, Figure]:
    """Return what a card says of a run that trained an adapter: its kind, its rank, and the model that it
    belongs to."""
    lora = run.config.lora
    if not lora.on:
        return {}
    kind = "DoRA" if lora.dora else "LoRA"
    figures = {"adapter": Figure(kind, "computed", (RecordedOrigin(run.id, CONFIG, "lora"),),
                                 how="by lora.dora"),
               "adapter_rank": _setting(run, "lora", "rank")}
    for sha256, (item, key) in run.inputs.items():
        if item["kind"] == KIND:
            name = found.graph.nodes[sha256].name
            figures["base"] = Figure(name, "computed", (RecordedOrigin(run.id, EVENTS, key),),
                                     how="what that artifact is called")
    return figures


def _setting(run: CardRunRecord, part: str, name: str) -> Figure:
    """Return a setting of a run; what its file leaves out has this version's default."""
    written = run.settings.get(part)
    if isinstance(written, dict) and name in written:
        return Figure(written[name], "recorded", (RecordedOrigin(run.id, CONFIG, f"{part}.{name}"),))
    return Figure(getattr(getattr(run.config, part), name), "computed", (RecordedOrigin(run.id, CONFIG, ""),),
                  how=f"{part}.{name} is left out there: the default")


def _export(found: Lineage, sha256: str) -> dict[str, Any]:
    """Return what an export's manifest says of it."""
    manifest = found.manifests[sha256]
    node = found.graph.nodes[sha256]
    return {"name": node.name, "sha256": sha256,
            **{name: Figure(manifest.content[name], "recorded",
                            (RecordedOrigin(sha256, MANIFEST, f"content.{name}"),))
               for name in ("family", "dtype", "num_tensors", "num_parameters")
               if isinstance(manifest.content.get(name), (str, int))},
            "files": {name: record.digest for name, record in manifest.files.items()}}


def _stage(run: CardRunRecord, compute: Compute) -> dict[str, Any]:
    """Return what one run did."""
    done = run.completion or {}
    last = len(run.attempts) - 1
    machine = run.start.get("machine")
    device = machine.get("device") if isinstance(machine, dict) else None

    def of_end(name: str, unit: str = "") -> Figure:
        return (Figure(done[name], "recorded", (RecordedOrigin(run.id, COMPLETION, name),), unit)
                if math.isfinite(number(done.get(name))) else
                unknown(f"{name} of run {run.name}", "it has not come to its end"))

    return {
        "name": run.name, "outcome": run.outcome, "gate_failure": run.failure,
        "objective": _setting(run, "objective", "name"),
        "settings": {f"{part}.{name}": _setting(run, part, name)
                     for part, names in SETTINGS.items() for name in names},
        "steps": of_end("step"), "tokens": of_end("tokens"), "wall_s": of_end("wall_s", "s"),
        "starts": Figure(len(run.attempts), "counted", (RecordedOrigin(run.id, EVENTS, "run_start[*]"),)),
        "num_ranks": (Figure(run.start["num_ranks"], "recorded",
                             (RecordedOrigin(run.id, EVENTS, f"run_start[{last}].num_ranks"),))
                      if math.isfinite(number(run.start.get("num_ranks"))) else
                      unknown(f"processes of run {run.name}", "its events tell of no start")),
        "device": (Figure(device, "recorded", (RecordedOrigin(run.id, EVENTS,
                                                              f"run_start[{last}].machine.device"),))
                   if isinstance(device, str) else
                   unknown(f"machine of run {run.name}", "its starts do not name it")),
        "incidents": {kind: Figure(count, "counted", (RecordedOrigin(run.id, EVENTS, f"{kind}[*]"),), "",
                                   KINDS[kind])
                      for kind, count in sorted(run.incidents.items()) if count},
        **_compute(compute)}


def _compute(compute: Compute) -> dict[str, Figure]:
    return {field.name: getattr(compute, field.name) for field in fields(compute)}


def _stated(answers: CardAnswers) -> dict[str, Figure]:
    return {name: Figure(list(value) if isinstance(value, tuple) else value, "stated",
                         (RecordedOrigin(ANSWERS, ANSWERS, name),))
            for name, value in asdict(answers).items() if value not in ("", (), None) and name != "licences"}


def _licence(answers: CardAnswers) -> Figure:
    return (Figure(answers.licence, "stated", (RecordedOrigin(ANSWERS, ANSWERS,
                                                              "licence"),)) if answers.licence else
            unknown("licence of the weights", "state `licence` in --answers"))


def _read(found: Lineage, data: DataCard | None, scores: Sequence[ScoreFile],
          answers_sha256: str) -> list[dict[str, str]]:
    """Return every file that figures come from, with its hash, so that they can be looked up."""
    files = [{"of": run.id, "file": name, "sha256": sha256}
             for run in found.runs for name, sha256 in run.files().items()]
    files += [{"of": sha256, "file": MANIFEST, "sha256": sha256} for sha256 in found.manifests]
    files += [{"of": file.name, "file": file.name, "sha256": file.sha256} for file in scores]
    if data is not None:
        files.append({"of": DATA, "file": FILE, "sha256": data.sha256})
    if answers_sha256:
        files.append({"of": ANSWERS, "file": ANSWERS, "sha256": answers_sha256})
    return files


def _bases(found: Lineage) -> list[str]:
    """Return the models that it was made from and that no run of its history made."""
    made = {edge.target for edge in found.graph.edges.values()}
    return [f"{node.kind} {node.name!r}" for node in found.graph.nodes.values()
            if node.kind in (KIND, HF_MODEL) and node.id not in made]


def _limits(card: dict[str, Any], found: Lineage) -> list[str]:
    """Return limits that follow from what is on record."""
    limits = []
    length = card["model"]["trained_length"]
    if length.known:
        limits.append(f"The last stage learned from samples of at most {length.value:,} tokens; beyond that "
                      "nothing was learned there.")
    for stage in card["stages"]:
        if stage["gate_failure"]:
            limits.append(f"The gate of {stage['name']} did not pass: {stage['gate_failure']}")
        elif stage["outcome"] != COMPLETE:
            limits.append(f"Stage {stage['name']} has not come to its end: {stage['outcome']}.")
    if not card["scores"]:
        limits.append("No benchmark was measured.")
    for row in card["scores"]:
        for what, said in (("failed", "items have no score"), ("at_limit", "answers were cut")):
            if row[what].value:
                limits.append(f"{row['task']}: {quantity(row[what])} {said}.")
        if row["limit"] is not None:
            limits.append(f"{row['task']}: only the first {quantity(row['limit'])} items were asked.")
        if row["contamination"] and row["contamination"]["items_hit"].value:
            limits.append(f"{row['task']}: {quantity(row['contamination']['items_hit'])} items stand in the "
                          "training text.")
    for name in _bases(found):
        limits.append(f"It was made from {name}, whose own training and data are not in these figures.")
    return list(dict.fromkeys(limits))


def _not_known(card: dict[str, Any], found: Lineage, data: DataCard | None,
               answers: CardAnswers) -> list[str]:
    """Return one sentence for each thing that nobody has recorded."""
    parts = {name: part for name, part in card.items() if name != "compute"}  # which sums up the stages
    missing = [figure.how for figure in figures_in(parts) if figure.basis == "unknown" and figure.how]
    missing += found.unknown
    missing += [f"{node.kind} {node.name!r} (manifest {node.sha256[:12]}) is not where it was, or is no "
                "longer the same; pass --from with where it lies"
                for node in found.graph.nodes.values() if not node.is_proven]
    if data is None:
        missing.append("data that the model learned from; pass --from with where the token shards lie")
    else:
        missing += [f"data: {sentence}" for sentence in data.content["not_recorded"]]
    if _bases(found) and not answers.base_model:
        missing.append("names on the hub of the models that it was made from; state `base_model` in "
                       "--answers")
    missing += [f"teacher of run {run.name}; its events do not name it, so name it in the description"
                for run in found.runs if run.config.objective.name == "distill"]
    wanted = {"intended_use": "intended use", "limitations": "limitations beyond those on record",
              "contact": "contact"}
    missing += [f"{what}; state `{name}` in --answers" for name, what in wanted.items()
                if not getattr(answers, name)]
    if not card["scores"]:
        missing.append("scores on benchmarks; pass --eval with results of `megatron-sov eval lm`")
    return list(dict.fromkeys(missing))
