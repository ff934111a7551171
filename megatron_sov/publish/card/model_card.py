"""The card as README.md of a model on the Hugging Face hub: YAML metadata, then sections; all is escaped."""

from __future__ import annotations

import importlib.resources
import math
from typing import Any

import yaml

from megatron_sov.base.errors import visible
from megatron_sov.base.figures import format_count
from megatron_sov.base.pages.markdown import CARD_MARK, hub_languages, hub_licence, md, slug, table
from megatron_sov.publish.card.content import MODALITY, NOT_KNOWN, params, quantity, score, with_basis
from megatron_sov.publish.card.data_summary import DATA
from megatron_sov.publish.card.run_record import Figure
from megatron_sov.runs.obs.figures import number

# Technical documentation by Annex XI of the EU AI Act, answered from a card; gaps are said so.

MAX_CHARS = 20_000
"""Of one answer."""


def items() -> list[dict[str, Any]]:
    """Return the annex's sections in order, with their items."""
    file = importlib.resources.files("megatron_sov.publish.card").joinpath("annex_xi.yaml")
    found: list[dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def answers_of(card: dict[str, Any]) -> dict[str, str]:
    """Return key of an item -> its answer from the card; "" where there is none."""
    stated = {name: str(figure.value) for name, figure in card["stated"].items()}

    def said(*names: str) -> str:
        found = [stated[name] for name in names if stated.get(name)]
        return "; ".join(found) + " (stated)" if found else ""

    model, compute = card["model"], card["compute"]
    found = {
        "tasks": said("intended_use", "out_of_scope"), "acceptable_use": said("acceptable_use"),
        "release": said("release_date", "distribution"), "architecture": _architecture(model),
        "modality": f"{MODALITY} in, {MODALITY} out; samples of training: "
                    f"{quantity(model['trained_length'])}; positions: "
                    f"{quantity(model.get('max_position_tokens'))}",
        "licence": said("licence", "licence_link"), "integration": said("integration") or _export(model),
        "design": "; ".join(filter(None, [_training(card), said("rationale")])),
        "data": "; ".join(filter(None, [_annex_data(card), said("data_obtained")])),
        "compute": "; ".join(with_basis(name, compute[key]) for name, key in (
            ("model FLOPs", "flops"), ("FLOPs of repeated steps", "flops_again"), ("GPU hours", "gpu_hours"),
            ("process hours", "process_hours")) if compute[key].known),
        "energy": with_basis("energy", compute["energy_kwh"]) if compute["energy_kwh"].known else "",
        "evaluation": "; ".join(filter(None, [_annex_scores(card), said("evaluation_strategy")])),
        "adversarial_testing": said("adversarial_testing"),
        "system_architecture": said("system_architecture")}
    return {item["key"]: found[item["key"]] for section in items() for item in section["items"]}


def annex_xi(card: dict[str, Any]) -> str:
    """Return the documentation as Markdown."""
    said = answers_of(card)
    lines = [f"# Technical documentation of {md(card['name'])}", "",
             "By the items of Annex XI of Regulation (EU) 2024/1689, Article 53(1)(a). Figures are those of "
             "card.json, which names the file and the key of each; what a person said is marked as stated. "
             "The public summary of training content (Article 53(1)(d)) is data/training_content.md. This is "
             "a draft that a person has to read.", ""]
    for section in items():
        lines += [f"## Section {section['section']}. {section['title']}", ""]
        for item in section["items"]:
            answer = said[item["key"]]
            told = md(answer, MAX_CHARS) if answer else NOT_KNOWN
            lines += [f"**{item['number']} {item['ask']}.** {told}", ""]
    return "\n".join(lines)


def _architecture(model: dict[str, Any]) -> str:
    shape = ", ".join(f"{name.replace('_', ' ')} {quantity(figure)}" for name, figure in model.items()
                      if isinstance(figure, Figure) and figure.known and figure.origins
                      and figure.origins[0].key.startswith("model."))
    params = "; ".join(f"{format_count(model[name].value)} {what}" for name, what in (
        ("num_params", "parameters"), ("num_active_params", "active for a token")) if model[name].known)
    return "; ".join(filter(None, [shape, params]))


def _export(model: dict[str, Any]) -> str:
    return ("Hugging Face folder (safetensors), for the libraries that load its architecture"
            if model["exports"] else "")


def _training(card: dict[str, Any]) -> str:
    return "; ".join(f"{stage['name']}: objective {stage['objective'].value}, "
                     + ", ".join(f"{name} {quantity(figure)}" for name, figure in stage["settings"].items())
                     + f", {quantity(stage['steps'])} steps, {quantity(stage['tokens'])} tokens"
                     for stage in card["stages"])


def _annex_data(card: dict[str, Any]) -> str:
    if card["data"] is None:
        return ""
    parts = [f"{name.replace('_', ' ')}: {quantity(figure)}"
             for name, figure in card["data"]["totals"].items()]
    parts += [f"source {source['name']}: licence {quantity(source['licence'])}, "
              f"{quantity(source['documents'])} documents" for source in card["data"]["sources"]]
    parts += [f"step {step['name']}: {quantity(step['documents_kept'])} of {quantity(step['documents_in'])} "
              "documents kept" for step in card["data"]["steps"]]
    return "; ".join([*parts, "in full in data/README.md"])


def _annex_scores(card: dict[str, Any]) -> str:
    return "; ".join(f"{row['task']} {row['metric']} {score(row)}" for row in card["scores"])


TASK = "text-generation"
PROVENANCE, PICTURE, ANNEX = "provenance.json", "provenance.svg", "annex_xi.md"
STATED = (("Intended use", "intended_use"), ("Out of scope", "out_of_scope"),
          ("Acceptable use", "acceptable_use"), ("Limitations", "limitations"), ("Contact", "contact"),
          ("Release", "release_date"), ("Integration", "integration"))


def model_card(card: dict[str, Any], is_alone: bool = False) -> str:
    """Return a card as README.md.

    Args:
        card: the card.
        is_alone: whether it will lie in an export, without the other files.
    """
    metadata = yaml.safe_dump(hub_metadata(card), allow_unicode=True, sort_keys=False, width=100)
    parts = [f"---\n{metadata}---", f"# {md(card['name'])}", *_opening(card), *_stated(card), *_limits(card),
             *_model(card), *_stages(card), *_cost(card), *_data(card), *_scores(card),
             *_training_scores(card), *_hashes(card), *_not_known(card), *_files(is_alone),
             f"Written by {md(card['written_by'])} from manifests and events."]
    return "\n\n".join(parts) + "\n"


def hub_metadata(card: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata that the Hugging Face hub reads from a model card."""
    stated = {name: figure.value for name, figure in card["stated"].items()}
    data = card["data"] or {"languages": []}
    languages = stated.get("languages") or [figure.value for figure in data["languages"]]
    languages = list(dict.fromkeys(hub_languages(map(str, languages))))
    datasets = [visible(name) for name in stated.get("datasets", [])]
    base = [visible(name) for name in stated.get("base_model", [])]
    tags = [slug(str(tag)) for tag in [CARD_MARK, card["model"]["family"].value, *stated.get("tags", [])]]
    return {
        **({"language": languages} if languages else {}),
        **hub_licence([card["licence"].value] if card["licence"].known else []),
        **({"license_link": visible(stated["licence_link"])} if "licence_link" in stated else {}),
        **({"base_model": base[0] if len(base) == 1 else base} if base else {}),
        **({"datasets": datasets} if datasets else {}), "tags": list(dict.fromkeys(tags)),
        "library_name": "transformers", "pipeline_tag": TASK,
        **_emissions(card, stated), **_index(card)}


def _emissions(card: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    carbon = card["compute"]["carbon_g"]
    if not carbon.known:
        return {}
    stages = card["stages"]
    devices = list(dict.fromkeys(str(stage["device"].value) for stage in stages if stage["device"].known))
    learns_text = all(stage["objective"].value == "lm" for stage in stages)
    return {"co2_eq_emissions": {
        "emissions": float(carbon.value), "source": visible(carbon.how),
        "training_type": "pre-training" if learns_text else "fine-tuning",
        **({"geographical_location": visible(stated["region"])} if "region" in stated else {}),
        **({"hardware_used": visible(", ".join(devices))} if devices else {})}}


def _index(card: dict[str, Any]) -> dict[str, Any]:
    """Return the scores as the hub's model-index; those that could not be computed are left out."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in card["scores"]:
        value = number(row["value"].value)
        if math.isfinite(value):
            by_task.setdefault(row["task"], []).append({
                "type": visible(row["metric"]), "name": visible(_metric(row)), "value": value})
    results = [{"task": {"type": TASK, "name": visible(task)},
                "dataset": {"type": slug(task), "name": visible(task)}, "metrics": metrics}
               for task, metrics in by_task.items()]
    return {"model-index": [{"name": visible(card["name"]), "results": results}]} if results else {}


def _opening(card: dict[str, Any]) -> list[str]:
    description = card["stated"].get("description")
    model = card["model"]
    facts = (f"{params(model['num_params'])} parameters, {params(model['num_active_params'])} of them active "
             f"for a token; {MODALITY} in and out; made in {len(card['stages'])} stage(s).")
    return [*([md(description.value)] if description is not None else []), md(facts)]


def _stated(card: dict[str, Any]) -> list[str]:
    rows = [f"**{title}** (stated). {md(card['stated'][name].value)}" for title, name in STATED
            if name in card["stated"]]
    return ["## Use", *rows] if rows else []


def _limits(card: dict[str, Any]) -> list[str]:
    return (["## Limits on record", "\n".join(f"- {md(limit)}" for limit in card["limits"])]
            if card["limits"] else [])


def _model(card: dict[str, Any]) -> list[str]:
    rows = [[name.replace("_", " "), quantity(figure), figure.basis]
            for name, figure in card["model"].items() if isinstance(figure, Figure)]
    return ["## Model", table(["what", "value", "basis"], [
        *rows, ["licence", quantity(card["licence"]), card["licence"].basis]])]


def _stages(card: dict[str, Any]) -> list[str]:
    rows = [[stage["name"], quantity(stage["objective"]), stage["outcome"], quantity(stage["steps"]),
             quantity(stage["tokens"]), quantity(stage["num_ranks"]), quantity(stage["device"]),
             quantity(stage["wall_s"]), quantity(stage["starts"])] for stage in card["stages"]]
    incidents = [[stage["name"], figure.how, quantity(figure)] for stage in card["stages"]
                 for figure in stage["incidents"].values()]
    head = ["stage", "objective", "outcome", "steps", "tokens", "processes", "machine", "wall time", "starts"]
    return ["## How it was made", table(head, rows, 200),
            *(["### Incidents", table(["stage", "what", "times"], incidents, 200)] if incidents else [])]


def _cost(card: dict[str, Any]) -> list[str]:
    names = (("model FLOPs", "flops"), ("FLOPs of repeated steps", "flops_again"), ("GPU hours", "gpu_hours"),
             ("process hours", "process_hours"), ("energy", "energy_kwh"), ("carbon", "carbon_g"))
    rows = [[name, quantity(card["compute"][key]), card["compute"][key].basis, card["compute"][key].how]
            for name, key in names]
    return ["## Compute and energy", table(["what", "value", "basis", "how"], rows)]


def _data(card: dict[str, Any]) -> list[str]:
    data = card["data"]
    if data is None:
        return ["## Data", f"{NOT_KNOWN.capitalize()}."]
    totals = [[name.replace("_", " "), quantity(figure)] for name, figure in data["totals"].items()]
    sources = [[s["name"], quantity(s["licence"]), s["licence"].basis, s["category"] or NOT_KNOWN,
                quantity(s["synthetic"]), quantity(s["documents"]), quantity(s["bytes"])]
               for s in data["sources"]]
    tokens = [[row["name"], quantity(row["tokens"]), quantity(row["documents"])] for row in data["tokens"]]
    written = [[s["name"], s["generator"], quantity(s["model"]), quantity(s["licence"]), s["licence"].basis,
                quantity(s["samples"])] for s in data["synthesis"]]
    totals += [[f"synthetic {name.replace('_', ' ')}", quantity(figure)]
               for name, figure in data["synthetic_tokens"].items() if written]
    return ["## Data", table(["what", "value"], totals),
            *([table(["samples of a model", "generator", "model", "licence of their source", "basis",
                      "samples"], written, 200)] if written else []),
            *([table(["source", "licence", "basis", "category", "synthetic", "documents", "text"], sources,
                     200)] if sources else []),
            *([table(["packed source", "tokens", "documents"], tokens, 200)] if tokens else [])]


def _scores(card: dict[str, Any]) -> list[str]:
    if not card["scores"]:
        return []
    rows = [[row["task"], _metric(row), score(row), row["value"].basis, quantity(row["items"]),
             quantity(row["failed"]), quantity(row["at_limit"]), row["mode"], _sampling(row),
             _contamination(row)] for row in card["scores"]]
    head = ["task", "metric", "value [95 % interval]", "basis", "items", "failed", "cut at the limit", "mode",
            "sampling", "in the training text"]
    return ["## Evaluation", table(head, rows, 500)]


def _metric(row: dict[str, Any]) -> str:
    """Return a metric's name, with the filter that answers went through."""
    return str(row["metric"]) + (f", {row['filter']}" if row["filter"] != "none" else "")


def _sampling(row: dict[str, Any]) -> str:
    told = [f"{name} {quantity(figure)}" for name, figure in row["sampling"].items()]
    shots = [f"{quantity(row['num_fewshot'])} shots"] if row["num_fewshot"] is not None else []
    return ", ".join([*shots, *told]) or NOT_KNOWN


def _contamination(row: dict[str, Any]) -> str:
    found = row["contamination"]
    return "not checked" if found is None else (
        f"{quantity(found['items_hit'])} items of {found['checked_against']}; without them "
        f"{quantity(found['value_without'])}")


def _training_scores(card: dict[str, Any]) -> list[str]:
    rows = []
    for stage, found in card["while_training"].items():
        rows += [[stage, f"held-out {source}", quantity(figure)]
                 for source, figure in found["heldout"].items()]
        rows += [[stage, f"{name}, {found[name].how}" if found[name].how else name, quantity(found[name])]
                 for name in ("needle", "gate") if found[name] is not None]
    return ["## Measured while training", table(["stage", "what", "value"], rows, 200)] if rows else []


def _hashes(card: dict[str, Any]) -> list[str]:
    model = card["model"]
    rows = [["checkpoint", model["checkpoint"]]] if model["checkpoint"] else []
    rows += [[f"export {one['name']}", one["sha256"]] for one in model["exports"]]
    files = [[f"{one['name']}/{name}", digest] for one in model["exports"]
             for name, digest in one["files"].items()]
    return [*(["## Hashes", table(["what", "SHA-256 of its manifest"], rows)] if rows else []),
            *([table(["file", "hash"], files)] if files else [])]


def _not_known(card: dict[str, Any]) -> list[str]:
    return (["## Not known", "\n".join(f"- {md(sentence)}" for sentence in card["not_known"])]
            if card["not_known"] else [])


def _files(is_alone: bool) -> list[str]:
    if is_alone:
        return []
    return ["## Files beside this one", "\n".join((
        "- `card.json`: all of this as data; each figure names the file and the key that it comes from",
        f"- `{PROVENANCE}`, `{PICTURE}`: what the model was made from, raw files to tensors, with hashes",
        f"- `{ANNEX}`: technical documentation by the items of Annex XI of the EU AI Act",
        f"- `{DATA}/`: the card of the data, and the public summary of training content")),
        f"![provenance]({PICTURE})"]
