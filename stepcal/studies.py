"""The report's analyses, each a function from step rows to tables; what notebooks show, commands print and files record.

A study runs on measured traces where they are at hand, reads its recorded tables where they are not, and runs on simulated
rows when asked to. Its provenance says which, and travels with the tables.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pandas as pd
from threadpoolctl import threadpool_limits

from stepcal.attribution import run_attribution
from stepcal.audit import run_label_audit, run_reconstruction
from stepcal.datasets import (
    content_sha256,
    experiments,
    have_traces,
    load_requests,
    load_stages,
    load_steps,
    load_xgboost_predictions,
    published_h1,
    published_h2,
    simulated_step_rows,
)
from stepcal.datasets.catalogue import traces_folder
from stepcal.decomposition import decompose
from stepcal.end_to_end_study import run_end_to_end
from stepcal.errors import InputError, MissingDataError
from stepcal.evaluation import (
    bias_table,
    component_correlations,
    label_by_batch,
    mixed_batch_residual,
    rescore_published_predictions,
    score_steps,
)
from stepcal.evidence import h1_evidence, h2_evidence, published_h1_evidence, published_h2_evidence
from stepcal.files import write_bytes_atomically
from stepcal.hardware import load_accelerator
from stepcal.hypotheses import Verdict, judge
from stepcal.metrics import BOOTSTRAP_RESAMPLES
from stepcal.offload_evidence import run_offloading
from stepcal.preregistration import load_preregistration
from stepcal.provenance import MEASURED, NO_EVIDENCE, RECORDED, SIMULATED, Provenance
from stepcal.recorded import read_recorded, record_exists
from stepcal.repair import run_repair
from stepcal.repair_evidence import folder_sha256, h1b_evidence, h2b_evidence, h3_evidence, run_repair_evidence
from stepcal.repair_variants import run_repair_variants
from stepcal.splits import STUDY_FRACTIONS, temporal_split
from stepcal.variants import VARIANTS, fit_variant

ACCELERATOR = "h100-sxm"
"""The GPU of all 16 experiments."""
SOURCES = (MEASURED, SIMULATED)
BIAS_VARIANTS = ("blackbox", "xgboost", "global9", "model36")

SHARED_RESULTS = "STEPCAL_SHARED_RESULTS"
"""Environment variable that names the folder of a build's shared results."""

T = TypeVar("T")
Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Study:
    """Tables of one analysis, short texts such as fit reports, and their provenance."""

    name: str
    tables: Tables
    provenance: Provenance
    texts: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, table: str) -> pd.DataFrame:
        return self.tables[table]


def run_h1(
    steps: pd.DataFrame, *, n_resamples: int = BOOTSTRAP_RESAMPLES, seed: int = 0
) -> tuple[Tables, dict[str, str]]:
    """Correlate the study's components with its label.

    Returns
    -------
    tables : dict
        ``correlations``, ``mixed_residual``, ``label_by_batch``.
    texts : dict
        Empty.
    """
    components = decompose(steps, load_accelerator(ACCELERATOR))
    tables = {
        "correlations": component_correlations(steps, components, n_resamples=n_resamples, seed=seed),
        "mixed_residual": mixed_batch_residual(steps, components),
        "label_by_batch": label_by_batch(steps),
    }
    return tables, {}


def run_h2(
    steps: pd.DataFrame,
    *,
    variants: Sequence[str] = VARIANTS,
    fractions: tuple[float, float] = STUDY_FRACTIONS,
    n_resamples: int | None = BOOTSTRAP_RESAMPLES,
    seed: int = 0,
) -> tuple[Tables, dict[str, str]]:
    """Fit every variant on the training split and score it on the test split.

    Parameters
    ----------
    steps : DataFrame
        Validated step rows.
    variants : sequence of str
        Of `stepcal.variants.VARIANTS`.
    fractions : (float, float)
        Shares of the training and validation split.
    n_resamples : int or None
        None leaves the intervals out.
    seed : int

    Returns
    -------
    tables : dict
        ``scores`` (variant, experiment, metric), ``parameters``, ``combinations``, ``singular_values``, ``sizes`` (split
        sizes an experiment), ``variants`` (parameter counts), ``bias``.
    texts : dict
        The fit report of each pooled variant.
    """
    split, accelerator = temporal_split(steps, fractions), load_accelerator(ACCELERATOR)
    scores, estimates, combinations, singular, counts, bias = [], [], [], [], [], []
    texts = {}
    for name in variants:
        fitted = fit_variant(name, split, accelerator)
        predicted = fitted.predict_us(split.test)
        scores.append(score_steps(predicted, split.test, n_resamples=n_resamples, seed=seed).assign(variant=name))
        estimates += [{"variant": name, **vars(e)} for e in fitted.estimates]
        combinations += [{"variant": name, **vars(e)} for e in fitted.combinations]
        counts.append({"variant": name, "n_parameters": fitted.n_parameters, "pooled": fitted.fit is not None})
        if fitted.fit is not None:
            found = fitted.fit.identifiability
            counts[-1]["n_determined"] = found.rank
            singular += [
                {"variant": name, "rank": i + 1, "singular_value": float(s)}
                for i, s in enumerate(found.singular_values)
            ]
            texts[name] = fitted.fit.report()
        if name in BIAS_VARIANTS:
            bias.append(bias_table(predicted, split.test, n_resamples=n_resamples, seed=seed).assign(variant=name))
    tables = {
        "scores": pd.concat(scores, ignore_index=True),
        "parameters": pd.DataFrame(estimates),
        "combinations": pd.DataFrame(combinations),
        "singular_values": pd.DataFrame(singular),
        "sizes": _split_sizes(split.train, split.valid, split.test),
        "variants": pd.DataFrame(counts),
    }
    if bias:
        tables["bias"] = pd.concat(bias, ignore_index=True)
    return tables, texts


def run_rescored(predictions: pd.DataFrame) -> tuple[Tables, dict[str, str]]:
    """Re-score the published XGBoost predictions: table ``rescored``."""
    return {"rescored": rescore_published_predictions(predictions)}, {}


@dataclass(frozen=True)
class StudyKind:
    """How a study gets its rows and what it does with them.

    Attributes
    ----------
    run : callable
        Takes the loaded tables in order, and options; returns tables and texts.
    loaders : tuple of callable
        Each takes the data folder and returns a table.
    simulates : bool
        Whether simulated step rows can take the place of the loaded ones.
    costly : bool
        Whether a recording of the very same data is read instead of computing anew; a test compares the two.
    """

    run: Callable[..., tuple[Tables, dict[str, str]]]
    loaders: tuple[Callable[[Path | str | None], pd.DataFrame], ...] = (load_steps,)
    simulates: bool = True
    costly: bool = False


RESCORED = "published_predictions"
END_TO_END = "end_to_end"
LABEL_AUDIT, RECONSTRUCTION = "label_audit", "reconstruction"
ATTRIBUTION, OFFLOADING = "attribution", "offloading"
REPAIR, REPAIR_EVIDENCE, REPAIR_VARIANTS = "repair", "repair_evidence", "repair_variants"
STUDIES: dict[str, StudyKind] = {
    "h1": StudyKind(run_h1),
    "h2": StudyKind(run_h2),
    RESCORED: StudyKind(run_rescored, (load_xgboost_predictions,), simulates=False),
    END_TO_END: StudyKind(run_end_to_end, (load_steps, load_requests), simulates=False),
    LABEL_AUDIT: StudyKind(
        lambda steps, requests, predictions: run_label_audit(
            steps, requests, predictions, experiments(), load_stages()
        ),
        (load_steps, load_requests, load_xgboost_predictions),
        simulates=False,
    ),
    RECONSTRUCTION: StudyKind(
        lambda steps, requests: run_reconstruction(steps, requests, experiments()),
        (load_steps, load_requests),
        simulates=False,
    ),
    OFFLOADING: StudyKind(
        lambda steps, requests, predictions: run_offloading(steps, requests, predictions, experiments()),
        (load_steps, load_requests, load_xgboost_predictions),
        simulates=False,
    ),
    ATTRIBUTION: StudyKind(run_attribution, (load_steps, load_requests), simulates=False),
    REPAIR: StudyKind(
        lambda steps, requests: run_repair(steps, requests, experiments()),
        (load_steps, load_requests),
        simulates=False,
        costly=True,
    ),
    REPAIR_EVIDENCE: StudyKind(
        lambda steps, requests: run_repair_evidence(steps, requests, experiments()),
        (load_steps, load_requests),
        simulates=False,
    ),
    REPAIR_VARIANTS: StudyKind(run_repair_variants, (load_steps, load_requests), simulates=False, costly=True),
}
"""All studies by name."""


# One thread adds in one order: a result is the same on one core and on two, and small systems are faster so.
@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
def load_study(
    name: str,
    *,
    source: str = MEASURED,
    data: Path | str | None = None,
    only_experiments: Sequence[str] = (),
    recompute: bool = False,
    **options: object,
) -> Study:
    """Run a study on measured or simulated rows, or read its recording where the traces are missing.

    Parameters
    ----------
    name : str
        One of `STUDIES`.
    source : str
        ``measured`` or ``simulated``. A study that has no use for simulated rows stays measured or recorded.
    data : path, optional
        Folder of the public layout; defaults to `STEPCAL_DATA`.
    only_experiments : sequence of str
        Restrict the study to these; all by default.
    recompute : bool
        Compute a costly study anew although a recording of the same data is at hand.
    **options
        Passed to the study (`run_h1`, `run_h2`).

    Returns
    -------
    Study

    Raises
    ------
    InputError
        If a name, a source or an experiment is unknown.
    MissingDataError
        If the traces are missing and options differ from the recorded ones.
    """
    if name not in STUDIES:
        raise InputError(f"Unknown study `{name}`. Studies: {', '.join(STUDIES)}.")
    if source not in SOURCES:
        raise InputError(f"`source={source!r}` is unknown; it is one of {', '.join(SOURCES)}.")
    kind = STUDIES[name]
    traces_folder(data)  # a folder that is named and does not exist is a slip, not a machine without traces
    if source == SIMULATED and kind.simulates:
        tables = [simulated_step_rows(seed=int(str(options.get("seed", 0))))]
    elif data is not None or have_traces(data):
        source, tables = MEASURED, [load(data) for load in kind.loaders]
    else:
        return _recorded_study(name, bool(only_experiments or options))
    tables = [select_experiments(table, only_experiments) for table in tables]
    provenance = _provenance(source, tables)
    if kind.costly and not (recompute or options or only_experiments) and record_exists(name):
        recorded = _recorded_study(name, False)
        if recorded.provenance.data_sha256 == provenance.data_sha256:
            return recorded
    key = [name, source, provenance.data_sha256, sorted((k, repr(v)) for k, v in options.items())]
    results, texts = shared_result(key, lambda: kind.run(*tables, **options))
    return Study(name, results, provenance, texts)


def shared_result(key: object, compute: Callable[[], T]) -> T:
    """Compute a result, or take it from the build that is under way.

    While a book is built several pages show the same study. The build names a new, empty folder in `SHARED_RESULTS`; what
    one page computed lies there for the next. Outside a build everything is computed where it is asked for.
    """
    folder = os.environ.get(SHARED_RESULTS)
    if not folder:
        return compute()
    path = Path(folder) / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.pickle"
    if path.is_file():
        stored: T = pickle.loads(path.read_bytes())
        return stored
    result = compute()
    write_bytes_atomically(path, pickle.dumps(result))
    return result


def select_experiments(steps: pd.DataFrame, wanted: Sequence[str]) -> pd.DataFrame:
    """Keep the steps of some experiments; all of them if none is named.

    Raises
    ------
    InputError
        If an experiment has no steps; the message lists those that have.
    """
    if not wanted:
        return steps
    have = sorted(steps["experiment_id"].unique())
    for experiment in wanted:
        if experiment not in have:
            raise InputError(f"No steps of experiment `{experiment}`. Experiments with steps: {', '.join(have)}.")
    return steps[steps["experiment_id"].isin(list(wanted))]


def verdict_of(
    hypothesis: str, *, data: Path | str | None = None, published: bool = False, accelerator: str | None = None
) -> tuple[Verdict, Provenance]:
    """Judge a hypothesis on our evidence, or on the study's published figures.

    Parameters
    ----------
    hypothesis : str
        ``h1``, ``h2``, ``h2_step``, ``h1b``, ``h2b`` or ``h3``.
    data : path, optional
        Folder of the public layout; defaults to `STEPCAL_DATA`, and to the recorded evidence without it. For ``h3`` a folder
        of new experiments (`stepcal.experiment_folders`), without which it is not evaluated.
    published : bool
        Judge the published per-experiment figures instead of our own.
    accelerator : str, optional
        GPU of the new experiments of ``h3`` that do not name theirs.

    Returns
    -------
    Verdict
    Provenance

    Raises
    ------
    InputError
        If the hypothesis is unknown, its pre-registration was changed, it has no published figures, or `accelerator` is
        given for another than ``h3``.
    """
    registered = load_preregistration(hypothesis)
    if accelerator is not None and registered.id != "h3":
        raise InputError(
            f"`--accelerator` is for the new experiments of h3; `{registered.id}` takes none. Leave it out."
        )
    if registered.id in _AFTER_REPAIR:
        if published:
            raise InputError(
                f"`{registered.id}` is ours and has no published figures; `--published` knows h1, h2, h2_step. Leave it out."
            )
        evidence, provenance = _AFTER_REPAIR[registered.id](data, accelerator)
        return judge(registered, evidence), provenance
    if registered.id == "h1":
        if published:
            table = published_h1()
            return judge(registered, published_h1_evidence(table)), _published_provenance(table)
        study = load_study("h1", data=data)
        return judge(registered, h1_evidence(study["correlations"])), study.provenance
    if published:
        table = published_h2()
        return judge(registered, published_h2_evidence(table)), _published_provenance(table)
    study, end_to_end = load_study("h2", data=data), load_study(END_TO_END, data=data)
    evidence = h2_evidence(study["scores"], experiments()["experiment_id"], end_to_end["evidence"])
    return judge(registered, evidence), end_to_end.provenance


def _h1b(data: Path | str | None, _: str | None) -> tuple[pd.DataFrame, Provenance]:
    study = load_study(REPAIR_EVIDENCE, data=data)
    return h1b_evidence(study["components"]), study.provenance


def _h2b(data: Path | str | None, _: str | None) -> tuple[pd.DataFrame, Provenance]:
    repair, more = load_study(REPAIR, data=data), load_study(REPAIR_EVIDENCE, data=data)
    return h2b_evidence(repair["errors"], repair["folds"], more["intervals"]), repair.provenance


def _h3(data: Path | str | None, accelerator: str | None) -> tuple[pd.DataFrame, Provenance]:
    """Judge new runs only: the folder of the calibration's traces (`STEPCAL_DATA`) has nothing to say here."""
    folder = None if data is None else Path(data)
    evidence = h3_evidence(folder, set(experiments()["experiment_id"]), accelerator=accelerator)
    if folder is None:
        return evidence, Provenance(NO_EVIDENCE, "", 0, 0)
    n_runs = evidence["unit"].nunique()
    return evidence, Provenance(MEASURED, folder_sha256(folder), n_runs, n_runs)


_AFTER_REPAIR: dict[str, Callable[[Path | str | None, str | None], tuple[pd.DataFrame, Provenance]]] = {
    "h1b": _h1b,
    "h2b": _h2b,
    "h3": _h3,
}
"""Evidence of the hypotheses after the repair."""


def _provenance(kind: str, tables: Sequence[pd.DataFrame]) -> Provenance:
    hashes = [content_sha256(table) for table in tables]
    combined = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    n_experiments = max(table["experiment_id"].nunique() for table in tables)
    return Provenance(kind, combined, sum(map(len, tables)), n_experiments)


def _recorded_study(name: str, changed: bool) -> Study:
    if changed or not record_exists(name):
        why = "was asked for with other options than the recorded ones" if changed else "was never recorded"
        raise MissingDataError(
            f"The study `{name}` {why}, and the step traces are not at hand. Set STEPCAL_DATA to a folder with the traces "
            "(see data/README.md), or choose source='simulated'."
        )
    content = read_recorded(name)
    try:
        provenance = Provenance(**{**content.provenance, "kind": RECORDED})
    except TypeError as error:
        raise InputError(
            f"The recording of `{name}` was written by another version: {error}. Record it again."
        ) from None
    return Study(name, content.tables, provenance, content.texts)


def _published_provenance(table: pd.DataFrame) -> Provenance:
    n_steps = int(table["n_test"].sum()) if "n_test" in table else int(table["n_steps"].max())
    return Provenance("published", content_sha256(table), n_steps, len(experiments()))


def _split_sizes(train: pd.DataFrame, valid: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    sizes = {
        f"n_{name}": part.groupby("experiment_id", observed=True).size()
        for name, part in [("train", train), ("valid", valid), ("test", test)]
    }
    return pd.DataFrame(sizes).fillna(0).astype(int).rename_axis("experiment_id").reset_index()
