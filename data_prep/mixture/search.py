"""`sov-data mix --search`: find shares of sources by training small models on many mixtures.

The way is CLIMB's (arXiv 2504.13161): mixtures are drawn, a small model is trained on each, what predicts a
loss from shares is fitted, and the next round's mixtures are drawn from those that it predicts to be best.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from data_prep.mixture import fitting
from data_prep.mixture.blend_file import (
    Blend, BlendEntry, BlendPhase, Cluster, MixtureSearchSettings, blend_text, read_search)
from data_prep.mixture.fitting import Judgement, MixtureSpace, Shares
from data_prep.shards.token_artifact import HELDOUT, TRAIN, read_tokens_manifest, refuse_overlap
from data_prep.tags import SOURCE, is_chosen, tags_of
from megatron_sov.base.artifacts import (
    atomic_write, disk_errors, manifest_sha256, new_artifact, refuse_existing, sha256_file, to_json)
from megatron_sov.base.errors import ExitCode, UserError, how_to_install, nearest
from megatron_sov.base.pages.page import Chapter, Chart, PageSection, PageTable, chart, colour, plain, render
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.work.processes.children import end_commands, start_command
from megatron_sov.work.progress.progress_bar import work_bar
from megatron_sov.work.progress.resumable import open_parts, part_folder

KIND = "mixture"
BEST_SHARE, MIN_BEST = 0.01, 16
"""Part of the candidates from which a later round draws, and of which the predicted best mixture is the mean:
the best one alone is the one that the fit errs most about."""
NUM_CENTRES = 4
"""Measured mixtures around which a later round looks closer."""


# The page of a search: what was tried, what was predicted, what was chosen.


def page(settings: MixtureSearchSettings, space: MixtureSpace, found: FoundMixture) -> str:
    by_role = {one.role: one for one in found.tried}
    figures = [("chosen", f"{found.chosen.loss:.4f}", f"bits per byte ({found.chosen.role})"),
               ("natural", f"{by_role[NATURAL].loss:.4f}", "shares by tokens"),
               ("uniform", f"{by_role[UNIFORM].loss:.4f}", "equal shares"),
               ("models", f"{len(found.tried)}", f"{settings.steps} steps of {settings.recipe}")]
    targets = ", ".join(f"{name} x {weight:g}" for name, weight in settings.targets.items())
    sections = [
        PageSection("Shares", f"Lowered: bits per byte of the held-out documents of {targets}.",
                    charts=[_shares(space, found)], tables=[_share_table(space, found)]),
        PageSection("Predicted and measured",
                    "A small model's loss as the last fit predicts it, and as it was. Mixtures kept apart "
                    "were never fitted: how near to the line they are is how far predictions can be trusted.",
                    charts=[_scatter(found)], samples=[], tables=[_judgements(found)]),
        PageSection("Every mixture", "In the order of training.", tables=[_every(found)]),
        PageSection("In words", "\n".join(summary(found))),
    ]
    return render("Mixture", settings.name, f"{len(space.names)} clusters, {len(found.tried)} small models",
                  [Chapter(settings.name, settings.recipe, figures, sections)])


def _shares(space: MixtureSpace, found: FoundMixture) -> Chart:
    names = [plain(name) for name in space.names]
    figure = go.Figure([
        go.Bar(name="natural", x=names, y=(100 * space.natural).tolist(), marker_color=colour(1)),
        go.Bar(name="chosen", x=names, y=[100 * found.chosen.shares[name] for name in space.names],
               marker_color=colour(0))])
    figure.update_layout(barmode="group", yaxis_title="% of the tokens")
    return chart(figure, "Share of each cluster: by its tokens, and as chosen.")


def _share_table(space: MixtureSpace, found: FoundMixture) -> PageTable:
    return PageTable(["cluster", "natural %", "chosen %", "at most %"],
                     [[name, f"{100 * natural:.2f}", f"{100 * found.chosen.shares[name]:.2f}",
                       f"{100 * cap:.2f}"]
                      for name, natural, cap in zip(space.names, space.natural, space.caps, strict=True)])


def _scatter(found: FoundMixture) -> Chart:
    figure = go.Figure()
    losses = [value for one in found.tried for value in (one.predicted, one.loss)]
    ends = [min(losses), max(losses)]
    figure.add_scatter(x=ends, y=ends, mode="lines", name="equal",
                       line={"color": "var(--rule)", "dash": "dot"})
    for i, role in enumerate(dict.fromkeys(one.role for one in found.tried)):
        chosen = [one for one in found.tried if one.role == role]
        figure.add_scatter(x=[one.predicted for one in chosen], y=[one.loss for one in chosen],
                           mode="markers", name="kept apart" if role == JUDGED else role,
                           marker={"color": colour(i), "size": 9 if role == JUDGED else 7,
                                   "symbol": "diamond" if role == JUDGED else "circle"})
    figure.update_layout(xaxis_title="predicted bits per byte", yaxis_title="measured bits per byte")
    return chart(figure, "Each mixture's loss, predicted by the last fit and measured.", height_px=420)


def _judgements(found: FoundMixture) -> PageTable:
    rows = [[f"{name}{' (used)' if name == found.fitted else ''}", "cross-validation", f"{j.rmse:.4f}",
             "" if j.spearman is None else f"{j.spearman:.2f}"] for name, j in found.judged.items()]
    if found.kept_apart:
        j = found.kept_apart
        rows.append([found.fitted, "mixtures kept apart", f"{j.rmse:.4f}",
                     "" if j.spearman is None else f"{j.spearman:.2f}"])
    return PageTable(["fit", "judged by", "rmse, bits per byte", "rank correlation"], rows)


def _every(found: FoundMixture) -> PageTable:
    names = list(found.chosen.shares)
    return PageTable(["mixture", "measured", "predicted", *names],
                     [[f"{one.role}{' (chosen)' if one is found.chosen else ''}", f"{one.loss:.4f}",
                       f"{one.predicted:.4f}", *(f"{100 * one.shares[name]:.1f}" for name in names)]
                      for one in found.tried])


def run_search(data: Sequence[Path], file: Path, output: Path | None, *, workers: int, dry_run: bool = False,
               overwrite: bool = False) -> None:
    """Search, and write an artifact of kind "mixture": the blend, every mixture tried, a page.

    Args:
        data: folders of token shards.
        file: the search file.
        output: the new artifact; models are kept in a hidden folder beside it until it is complete.
        workers: models that are trained at a time.
        dry_run: print the plan, and do nothing.
        overwrite: replace an artifact that is already there.

    Raises:
        UserError: settings or data that break a rule, or a model that cannot be trained.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    settings = read_search(file)
    # Asked before hours of training, and not when the first round is fitted.
    if find_spec("sklearn") is None:
        raise UserError("--search: needs scikit-learn, which is not installed; "
                        f"{how_to_install('data')}")
    manifests = [read_tokens_manifest(path) for path in data]
    sources = [s for m in manifests for s in m.content["sources"]]
    clusters = clusters_of(settings, sources)
    space = fitting.space_of([c.name for c in clusters], [c.num_tokens for c in clusters], settings.tokens,
                              settings.max_epochs)
    print("\n".join(plan(settings, clusters, space)))
    if dry_run or output is None:
        return
    refuse_existing(output, KIND, overwrite)
    # Held-out text that is trained on elsewhere would make every loss a lie.
    refuse_overlap([(path, manifest.content) for path, manifest in zip(data, manifests, strict=True)])
    # Models are kept next to the output until the whole is written: a killed search goes on.
    with open_parts(output, "sov-data mix --search") as work:
        proxies = Proxies(work, _proxy_settings(settings, data), workers)
        with work_bar("training small models", settings.num_proxies, "model") as bar:
            found = search(settings, space, lambda shares: proxies.losses(
                [blend_of(row, clusters) for row in shares], lambda: bar.update(1)))
        _write(output, settings, clusters, space, found, data, overwrite=overwrite)
    print("\n".join(summary(found)))
    print(f"wrote {output}; mix by it: sov-data mix {' '.join(map(str, data))} --blend "
          f"{output / 'blend.yaml'} --output DIR")


def _proxy_settings(settings: MixtureSearchSettings, data: Sequence[Path]) -> ProxySettings:
    # Files that losses depend on and that no setting names.
    files = [Path(settings.recipe.rpartition(":")[0] or settings.recipe)]
    if settings.from_:
        files += [Path(settings.from_) / name for name in ("manifest.json", "config.json")]
    return ProxySettings(settings.recipe, tuple((path, manifest_sha256(path)) for path in data),
                         settings.settings, settings.steps, settings.seq_len, settings.seed,
                         settings.from_, tuple(sha256_file(file) for file in files if file.is_file()))


def clusters_of(settings: MixtureSearchSettings, sources: Sequence[dict[str, Any]]) -> list[Cluster]:
    """Return what has a share of its own: each source that is mixed, or each value of a tag.

    Raises:
        UserError: targets or sources that there are not, or fewer than two clusters.
    """
    names = [s["name"] for s in sources]
    held = {s["name"]: s["splits"][HELDOUT]["num_tokens"] for s in sources}
    for target in settings.targets:
        if target not in names:
            raise UserError(f"targets.{target}: the data has no such source{nearest(target, names)} "
                            f"(sources: {', '.join(names)})")
        if not held[target]:
            raise UserError(f"targets.{target}: the source holds no documents out; pack it with --heldout "
                            "0.5")
    for pattern in settings.sources:
        if not any(is_chosen({SOURCE: (pattern,)}, s) for s in sources):
            raise UserError(f"sources: {pattern!r} fits no source{nearest(pattern, names)} (sources: "
                            f"{', '.join(names)})")
    where = {SOURCE: settings.sources or ("*",)}
    members: dict[str, dict[str, int]] = {}
    for source in sources:
        count = source["splits"][TRAIN]["num_tokens"]
        # Targets are not mixed unless `sources` names them: training on them is a choice.
        if not count or not is_chosen(where, source) or (not settings.sources
                                                         and source["name"] in settings.targets):
            continue
        members.setdefault(_cluster_name(settings, source), {})[source["name"]] = count
    if len(members) < 2:
        raise UserError(f"sources: {len(members)} of the data's are mixed ({', '.join(members) or 'none'}), "
                        "and a mixture has at least 2; pack more sources, or change the patterns")
    return [Cluster(name, {m: n / sum(counts.values()) for m, n in counts.items()}, sum(counts.values()))
            for name, counts in members.items()]


def _cluster_name(settings: MixtureSearchSettings, source: dict[str, Any]) -> str:
    if not settings.group_by:
        return str(source["name"])
    values = tags_of(source).get(settings.group_by, [])
    if len(values) != 1 or not values[0]:
        raise UserError(f"group_by = {settings.group_by!r}: source {source['name']} has "
                        f"{'several values' if len(values) > 1 else 'no value'} of this tag; pack it with "
                        f"--tag {settings.group_by}, each source with one value")
    return values[0]


def blend_of(shares: Shares, clusters: Sequence[Cluster]) -> dict[str, float]:
    """Return source -> share of a mixture of clusters, [clusters]."""
    return {name: float(share) * part for share, cluster in zip(shares, clusters, strict=True) if share > 0
            for name, part in cluster.members.items()}


def plan(settings: MixtureSearchSettings, clusters: Sequence[Cluster], space: MixtureSpace) -> list[str]:
    targets = ", ".join(f"{name} x {weight:g}" for name, weight in settings.targets.items())
    lines = [f"{settings.num_proxies} small models of {settings.recipe}, {settings.steps} steps each: rounds "
             f"of {', '.join(map(str, settings.rounds))}, {settings.judged} to judge by, the predicted best",
             f"lowered: bits per byte of the held-out documents of {targets}",
             f"mixed: {len(clusters)} clusters"]
    width = max(len(c.name) for c in clusters)
    for cluster, natural, cap in zip(clusters, space.natural, space.caps, strict=True):
        members = f", {len(cluster.members)} sources" if len(cluster.members) > 1 else ""
        limit = f", at most {100 * cap:.2f} %" if cap < 1 else ""
        lines.append(f"  {cluster.name:<{width}} {cluster.num_tokens:>16,} tokens {100 * natural:>7.2f} %"
                     f"{limit}{members}")
    return lines


class _Measured:
    """Mixtures with their losses, as they come."""

    def __init__(self, settings: MixtureSearchSettings, space: MixtureSpace) -> None:
        self._settings = settings
        self.roles: list[str] = []
        self.shares: Shares = np.zeros((0, len(space.names)))
        self.losses: list[Losses] = []

    def add(self, role: str, shares: Shares, losses: Sequence[Losses]) -> None:
        self.roles += [role] * len(shares)
        self.shares = np.concatenate([self.shares, shares])
        self.losses += losses

    @property
    def totals(self) -> NDArray[np.float64]:
        """Return [mixtures] the targets' losses, by their weights."""
        weights = self._settings.targets
        return np.array([sum(weights[t] * found[t] for t in weights) / sum(weights.values())
                         for found in self.losses])

    @property
    def fitted(self) -> NDArray[np.bool_]:
        """Return [mixtures] which of them are fitted."""
        return np.array([role != JUDGED for role in self.roles])


def search(settings: MixtureSearchSettings, space: MixtureSpace, measure: Any) -> FoundMixture:
    """Search for the mixture of lowest loss.

    Args:
        settings: how.
        space: the mixtures that are allowed.
        measure: [mixtures, clusters] shares -> the losses of a model trained on each.
    """
    generator = np.random.default_rng(settings.seed)
    anchors = space.allowed(np.stack([space.natural, space.uniform]))
    # More than are needed, since caps make many draws the same.
    drawn = fitting.distinct(fitting.draw(space, 4 * (settings.rounds[0] + settings.judged), generator),
                              anchors)
    if len(drawn) < settings.rounds[0] - 2 + settings.judged:
        raise UserError(f"rounds[0] = {settings.rounds[0]} and judged = {settings.judged}: the caps leave "
                        f"only {len(drawn)} mixtures to draw; lower tokens, or raise max_epochs")
    first, judged = np.split(drawn[: settings.rounds[0] - 2 + settings.judged], [settings.rounds[0] - 2])
    measured = _Measured(settings, space)
    # Measured in one call, so that all workers are busy to the end of the round.
    found = _checked(settings, measure(np.concatenate([anchors, first, judged])))
    for role, rows in ((NATURAL, anchors[:1]), (UNIFORM, anchors[1:]), ("round 1", first), (JUDGED, judged)):
        done = len(measured.losses)
        measured.add(role, rows, found[done : done + len(rows)])
    for number, count in enumerate(settings.rounds[1:], 2):
        best = _best(settings, space, measured, generator)
        # A random part of the best candidates: the very best alone would look at one place only.
        fresh = fitting.distinct(best[generator.permutation(len(best))], measured.shares)[:count]
        measured.add(f"round {number}", fresh, _checked(settings, measure(fresh)))
    # The mean of many good candidates errs less than the one that the fit likes most.
    best = space.allowed(_best(settings, space, measured, generator).mean(axis=0))
    measured.add(BEST, best, _checked(settings, measure(best)))
    return _found(settings, space, measured)


def _checked(settings: MixtureSearchSettings, found: Sequence[Losses]) -> list[Losses]:
    """Return losses that can be fitted.

    Raises:
        UserError: a target has none, or one that is no finite number.
    """
    for losses in found:
        for target in settings.targets:
            if not np.isfinite(losses.get(target, np.nan)):
                raise UserError(f"targets.{target}: a small model's loss on it is {losses.get(target)}; see "
                                "that the source holds documents out, and that the learning rate is not too "
                                "high")
    return list(found)


def _fit(settings: MixtureSearchSettings, measured: _Measured) -> fitting.Fitted:
    rows = measured.fitted
    return fitting.fit(measured.shares[rows], measured.totals[rows], settings.fit, settings.seed)


def _best(settings: MixtureSearchSettings, space: MixtureSpace, measured: _Measured,
          generator: np.random.Generator) -> Shares:
    # Mixtures kept apart are never a centre either: they would no longer be unseen.
    rows = np.flatnonzero(measured.fitted)
    centres = measured.shares[rows[np.argsort(measured.totals[rows], kind="stable")[:NUM_CENTRES]]]
    half = settings.candidates // 2
    # Half of them anywhere, so that a wrong early fit can be left.
    candidates = np.concatenate([fitting.draw(space, half, generator),
                                 fitting.draw_near(space, centres, settings.candidates - half, generator)])
    order = np.argsort(_fit(settings, measured).predict(candidates), kind="stable")
    best: Shares = candidates[order[: max(MIN_BEST, round(BEST_SHARE * len(candidates)))]]
    return best


def _found(settings: MixtureSearchSettings, space: MixtureSpace, measured: _Measured) -> FoundMixture:
    fitted = _fit(settings, measured)
    predicted, totals = fitted.predict(measured.shares), measured.totals
    tried = tuple(Tried(role, dict(zip(space.names, row.tolist(), strict=True)), float(guess),
                        {t: losses[t] for t in settings.targets}, float(loss))
                  for role, row, guess, losses, loss in zip(measured.roles, measured.shares, predicted,
                                                            measured.losses, totals, strict=True))
    apart = ~measured.fitted
    return FoundMixture(tried, min(tried, key=lambda one: one.loss), fitted.name, fitted.judged,
                        fitting.judge(predicted[apart], totals[apart]) if apart.any() else None)


def _write(output: Path, settings: MixtureSearchSettings, clusters: Sequence[Cluster], space: MixtureSpace,
           found: FoundMixture, data: Sequence[Path], *, overwrite: bool) -> None:
    entries = tuple(BlendEntry(cluster.where(), found.chosen.shares[cluster.name]) for cluster in clusters
                    if found.chosen.shares[cluster.name] > 0)
    blend = Blend(settings.name, (BlendPhase(settings.name, settings.tokens, entries),))
    with new_artifact(output, KIND, overwrite=overwrite) as artifact:
        for path in data:
            artifact.add_input(path)
        (artifact.path / "blend.yaml").write_text(blend_text(
            blend, f"found by sov-data mix --search among {len(found.tried)} mixtures"), encoding="utf-8")
        with open(artifact.path / "tried.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(vars(one), ensure_ascii=False) + "\n" for one in found.tried)
        (artifact.path / "report.html").write_text(page(settings, space, found), encoding="utf-8")
        artifact.content = {"name": settings.name, "chosen": found.chosen.shares, "loss": found.chosen.loss,
                            "natural": dict(zip(space.names, space.natural.tolist(), strict=True)),
                            "fit": found.fitted, "judged": {k: vars(j) for k, j in found.judged.items()},
                            "kept_apart": vars(found.kept_apart) if found.kept_apart else None,
                            "num_tried": len(found.tried)}
        artifact.settings = {**vars(settings), "targets": dict(settings.targets)}


# Small models that are trained, each on a mixture.


RESULT = "result.json"
"""What is left of a model: the losses on held-out documents."""
LOG = "log.txt"
PHASE = "proxy"
CODE_VERSION = 1
"""Raised when the same mixture and settings would give another loss."""
DEFAULTS = ("train.num_threads=1", "train.eval_every_steps=0", "train.keep_checkpoints=1",
            "train.checkpoint_every_steps=1000000", "data.max_epochs=0")
"""Settings that the search's own go before: one thread each, so that losses do not depend on the machine's
cores, and nothing written on the way."""
SHOWN_LINES = 8
_POLL_S = 0.05
_STOP_S = 20.0
"""For a model that was asked to stop to save itself."""

Losses = dict[str, float]
"""Source -> bits per byte of its held-out documents."""


@dataclass(frozen=True)
class ProxySettings:
    """What all small models of a search have in common."""

    recipe: str
    """Recipe, or FILE.py:NAME."""
    data: tuple[tuple[Path, str], ...]
    """Folders of token shards, each with the hash of its manifest."""
    settings: tuple[str, ...]
    """key=value, as --set takes them."""
    steps: int
    seq_len: int
    """Tokens of a sample."""
    seed: int
    """Seed of weights and order."""
    start_from: str = ""
    """What each starts from; "": initial weights."""
    files_sha256: tuple[str, ...] = ()
    """Hashes of the recipe's own file, and of the manifest of what each starts from."""


def key_of(settings: ProxySettings, blend: dict[str, float]) -> str:
    """Return the name of a model's folder: a hash of everything that its losses depend on; where data lies is
    no part of it."""
    facts = {**vars(settings), "data": [sha256 for _, sha256 in settings.data], "blend": blend,
             "code_version": CODE_VERSION}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def command(settings: ProxySettings, blend: dict[str, float], run: Path) -> list[str]:
    """Return the arguments of `megatron-sov` that train one model, or go on with it."""
    phase = {"name": PHASE, "seq_len": settings.seq_len,
             "blend": {name: share for name, share in blend.items() if share > 0}}
    # The later value of a key counts: settings of the user over the defaults, those of the search over all.
    chosen = (*DEFAULTS, f"train.seed={settings.seed}", *settings.settings, f"train.steps={settings.steps}",
              f"data.phases={json.dumps([phase])}")
    return ["pretrain", settings.recipe, "--run", str(run), "--resume",
            *(["--from", settings.start_from] if settings.start_from else []),
            *(part for path, _ in settings.data for part in ("--data", str(path))),
            *(part for setting in chosen for part in ("--set", setting))]


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `megatron-sov` in a process that ends with this one; what it writes goes into `log`."""
    with open(log, "ab") as out:
        return start_command([sys.executable, "-m", "megatron_sov", *arguments], stdout=out, stderr=out,
                             ends_with_this=True)


Start = Callable[[Sequence[str], Path], "subprocess.Popen[bytes]"]


class Proxies:
    """Trains models, and remembers those that are trained.

    Args:
        work: folder that keeps one folder for each model; a killed search finds them again.
        settings: what they have in common.
        workers: how many are trained at a time.
        start: starts one.
    """

    def __init__(self, work: Path, settings: ProxySettings, workers: int, start: Start = start) -> None:
        self._work, self._settings, self._workers, self._start = work, settings, workers, start

    def losses(self, blends: Sequence[dict[str, float]], done: Callable[[], object]) -> list[Losses]:
        """Return the losses of a model trained on each blend, source -> share.

        Args:
            blends: what they are trained on.
            done: called as each is there.

        Raises:
            UserError: one could not be trained; those that are complete stay.
        """
        folders = [part_folder(self._work, key_of(self._settings, blend)) for blend in blends]
        # A mixture that was measured before, in this or a killed search, is not trained again.
        waiting = {folder: blend for folder, blend in zip(folders, blends, strict=True)
                   if not (folder / RESULT).is_file()}
        for _ in range(len(folders) - len(waiting)):
            done()
        running: dict[Path, subprocess.Popen[bytes]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._workers:
                    folder, blend = next(iter(waiting.items()))
                    del waiting[folder]
                    with disk_errors(folder):
                        folder.mkdir(parents=True, exist_ok=True)
                        running[folder] = self._start(command(self._settings, blend, folder / "run"),
                                                      folder / LOG)
                for folder, process in list(running.items()):
                    if process.poll() is not None:
                        del running[folder]
                        self._finish(folder, process.returncode)
                        done()
                time.sleep(_POLL_S)
        finally:
            # Also on an error: no model goes on without somebody to take its result.
            end_commands(list(running.values()), _STOP_S)
        return [_result(folder) for folder in folders]

    def _finish(self, folder: Path, code: int) -> None:
        """Keep the losses of a model that has ended, and delete the rest of it."""
        if code != ExitCode.OK:
            raise UserError(f"a small model could not be trained (exit code {code}): "
                            f"{_last_words(folder / LOG)}; all it wrote is in {folder / LOG}")
        evaluated = [e for e in read_events(folder / "run" / EVENTS) if e["event"] == "eval"]
        losses = {name: float(found["bits_per_byte"]) for name, found in evaluated[-1]["heldout"].items()
                  } if evaluated else {}
        with disk_errors(folder):
            # The result before the rest is deleted: a kill in between costs disk and no training.
            atomic_write(folder / RESULT, to_json(losses))
            shutil.rmtree(folder / "run", ignore_errors=True)


def _result(folder: Path) -> Losses:
    try:
        raw: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return {str(name): float(loss) for name, loss in raw.items()}
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{folder / RESULT}: cannot be read ({e}); delete {folder}, and run the command "
                        "again") from None


def _last_words(log: Path) -> str:
    """Return what a command said of its end: its error, or the last line."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        return f"its log cannot be read ({e.strerror})"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    said = lines[errors[-1]:][:SHOWN_LINES] if errors else lines[-1:]
    return " ".join(said)[:1000].removeprefix("error: ")


NATURAL, UNIFORM, JUDGED, BEST = "natural", "uniform", "judged", "predicted best"
"""Roles of mixtures beside those of the rounds."""


@dataclass(frozen=True)
class Tried:
    """A mixture that a small model was trained on."""

    role: str
    """natural, uniform, round 1, ..., judged, predicted best."""
    shares: dict[str, float]
    predicted: float
    """Loss that the last fit predicts."""
    losses: Losses
    """Bits per byte of each target's held-out documents."""
    loss: float
    """Their mean, by the targets' weights."""


@dataclass(frozen=True)
class FoundMixture:
    tried: tuple[Tried, ...]
    """Every mixture, in the order of training."""
    chosen: Tried
    """The one of lowest measured loss."""
    fitted: str
    """What predicted losses."""
    judged: dict[str, Judgement]
    """Fit -> its error on mixtures that it was not fitted to (cross-validation)."""
    kept_apart: Judgement | None
    """The same of the mixtures that were drawn for judging and never fitted; None: there are none."""


def summary(found: FoundMixture) -> list[str]:
    by_role = {one.role: one for one in found.tried}
    lines = [f"{role}: {by_role[role].loss:.4f} bits per byte" for role in (NATURAL, UNIFORM, BEST)]
    width = max(map(len, found.chosen.shares))
    lines.append(f"chosen ({found.chosen.role}): {found.chosen.loss:.4f} bits per byte, predicted "
                 f"{found.chosen.predicted:.4f}")
    lines += [f"  {name:<{width}} {100 * share:>7.2f} %  (natural {100 * by_role[NATURAL].shares[name]:.2f} "
              "%)"
              for name, share in found.chosen.shares.items()]
    lines += [f"{name}{' (used)' if name == found.fitted else ''}: predicts mixtures that it was not fitted "
              f"to {judgement.describe()}" for name, judgement in found.judged.items()]
    if found.kept_apart:
        count = sum(one.role == JUDGED for one in found.tried)
        lines.append(f"{count} mixtures kept apart: predicted {found.kept_apart.describe()}")
    return lines
