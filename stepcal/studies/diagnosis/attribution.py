"""What is due to the label and what to physics: each step-time model on both labels, near and far from training.

A factorial table: {published, corrected label} x {constant, blackbox, four components, physical without and with priors} x
{later in the same run, another rate, another workload, another model}. Every cell of an experiment is judged on the same
rows, ``mean |predicted - label| / label``. Batches are rebuilt from measured latencies: diagnosis, never a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls

from stepcal.calibration.closed_loop import calibrate
from stepcal.calibration.training_rows import EFFECTIVE_REQUESTS, RequestLevel, request_level, step_features
from stepcal.datasets import experiments as load_runs
from stepcal.datasets import load_stages
from stepcal.experiments.experiment import Experiment
from stepcal.metrics import mape_percent, mspe_percent
from stepcal.reconstruction.checks import estimate_offset_us
from stepcal.reconstruction.labelled_steps import LABELS, labelled_steps
from stepcal.reconstruction.labels import stage_starts_ns
from stepcal.reconstruction.timeline import build_timeline, decode_intervals, request_lives
from stepcal.step_time.decomposition import study_components_us
from stepcal.step_time.physical import PhysicalFeatures, PhysicalModel
from stepcal.studies.published_runs import load_experiments
from stepcal.units import BoolArray, FloatArray

CORRECTED, PUBLISHED = "corrected", "published"
STEP, REQUEST = "step", "request"
WITHIN, RATE, WORKLOAD, MODEL = "within", "rate", "workload", "model"
FOLDS = (WITHIN, RATE, WORKLOAD, MODEL)
"""Later in the same run; from its low to its high rate; another workload; another model. From near to far."""
CONSTANT, BLACKBOX, COMPONENTS, TERMS, PHYSICAL = "constant", "blackbox", "components", "physical_terms", "physical"
VARIANTS = (CONSTANT, BLACKBOX, COMPONENTS, TERMS, PHYSICAL)
"""`components`: the study's four with an overhead, nonnegative weights (what `Global9` can express). `physical_terms`: the
physical model's terms with nonnegative weights and nothing else; `physical`: with its priors and bounds."""
SMALLEST_STEP_US = 1.0
LOW, HIGH = 0, 1


@dataclass(frozen=True)
class LabelledRows:
    """Steps or requests with a label and all that a model may see of them.

    Attributes
    ----------
    rows : DataFrame
        `experiment_id`, `model` (family), `workload`, `stage`, `split`, `overloaded`, `prefill_tokens`, `decode_tokens`, and
        a column of microseconds for each label.
    components_us : ndarray, shape (n_rows, 4)
        The study's components.
    features : PhysicalFeatures
    """

    rows: pd.DataFrame
    components_us: FloatArray
    features: PhysicalFeatures


@dataclass(frozen=True)
class Fold:
    """What is fitted and what is judged: masks over `LabelledRows`."""

    kind: str
    experiment_id: str
    train: BoolArray
    judged: BoolArray
    whole_run: bool


def run_attribution(steps: pd.DataFrame, requests: pd.DataFrame) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Fit and judge every model on every label and fold.

    Parameters
    ----------
    steps, requests : DataFrame
        Validated step and request rows.

    Returns
    -------
    tables : dict
        ``scores`` (a row a level, label, fold, variant and experiment: `mape_percent`, `mspe_percent`, `n`, `n_train`,
        `whole_run`), ``summary`` (`mape_percent`: mean over experiments, `worst_percent`, `n`, `n_experiments`) and
        ``excluded`` (runs that no fit sees).
    texts : dict
        Empty.
    """
    experiments = load_experiments(requests)
    levels = {STEP: step_rows(steps, requests, experiments), REQUEST: request_rows(requests, experiments)}
    left_out = [e.experiment_id for e in experiments if is_cache_bound(e)]
    scores = pd.concat(
        [
            score_level(rows, label, column, left_out).assign(level=level)
            for level, rows in levels.items()
            for label, column in LABELS.items()
            if column in rows.rows
        ],
        ignore_index=True,
    )
    excluded = pd.DataFrame(
        {"experiment_id": left_out, "rule": "overloaded, and its cache cannot hold as many requests as it has slots"}
    )
    return {"scores": scores, "summary": summarise(scores), "excluded": excluded}, {}


def is_cache_bound(experiment: Experiment) -> bool:
    """Whether a run preempts for want of cache: overloaded, and full slots need more tokens than the cache holds.

    Then the batch is bounded by the cache and rebuilt batches are wrong: preempted requests hold no cache but count.
    """
    workload, server = experiment.workload, experiment.server
    peak = workload.system_prompt_len + workload.question_len + workload.output_len
    return experiment.overloaded and server.max_num_seqs * peak > server.kv_blocks * server.block_size


def step_rows(steps: pd.DataFrame, requests: pd.DataFrame, experiments: Sequence[Experiment]) -> LabelledRows:
    """Prepare the sampled steps that have a usable interval, with both labels."""
    runs, offsets = load_runs(), {}
    for name, own in steps.groupby("experiment_id", observed=True):
        lives = request_lives(requests[requests["experiment_id"] == name], runs)
        offsets[str(name)] = estimate_offset_us(own, build_timeline(lives))
    starts = stage_starts_ns(requests, load_stages(), offsets)
    table = labelled_steps(steps, requests, runs, stage_starts_ns=starts)
    began = table["experiment_id"].astype(str).map(starts)
    stage = [int(np.sum(np.asarray(b) <= t)) for b, t in zip(began, table["ts_start_ns"], strict=True)]
    return _labelled(table.assign(stage=stage), step_features(table, experiments), experiments)


def request_rows(requests: pd.DataFrame, experiments: Sequence[Experiment]) -> LabelledRows:
    """Prepare the completed requests of all experiments, with their decode interval as the corrected label."""
    present = [e for e in experiments if e.requests is not None]
    level = request_level(decode_intervals(requests, load_runs()), present)
    return _labelled(level.rows.assign(decode_tokens=level.rows["batch"]), level.features, present)


def _labelled(table: pd.DataFrame, features: PhysicalFeatures, experiments: Sequence[Experiment]) -> LabelledRows:
    """Add what a fold groups by, and the study's components."""
    by_name = {e.experiment_id: e for e in experiments}
    names = table["experiment_id"].astype(str)
    components = np.zeros((len(table), 4))
    for name, positions in table.groupby("experiment_id", observed=True).indices.items():
        e = by_name[str(name)]
        components[positions] = study_components_us(
            table["prefill_tokens"].to_numpy(dtype=float)[positions],
            table["decode_tokens"].to_numpy(dtype=float)[positions],
            e.deployment,
        )
    rows = table.assign(
        experiment_id=names,
        model=names.map({n: e.architecture.name for n, e in by_name.items()}),
        workload=names.str.rsplit("-", n=1).str[-1],
        overloaded=names.map({n: e.overloaded for n, e in by_name.items()}),
    )
    return LabelledRows(rows.reset_index(drop=True), components, features)


def folds(rows: pd.DataFrame, left_out: Sequence[str] = ()) -> Iterator[Fold]:
    """Yield the folds of every experiment.

    An experiment is judged on its test split, at the high rate where that is what was left out; these are the same rows, as
    nothing of the last fifth came at the low rate. A run without test rows (overloaded: nothing completes at its end) is
    judged whole, in the folds that saw nothing of it. A workload's fold judges a run only if its model was fitted.

    Parameters
    ----------
    rows : DataFrame
        Of `LabelledRows`.
    left_out : sequence of str
        Experiments that no fit sees, and that no fold within the run judges.
    """
    train = (rows["split"] == "train").to_numpy() & ~rows["experiment_id"].isin(list(left_out)).to_numpy()
    for name, own in rows.groupby("experiment_id", sort=True):
        mine = (rows["experiment_id"] == name).to_numpy()
        test = mine & (rows["split"] == "test").to_numpy()
        whole_run = not test.any()
        judged = mine if whole_run else test
        stage = rows["stage"].to_numpy()
        if not whole_run and (mine & train).any():
            yield Fold(WITHIN, str(name), mine & train, judged, False)
            if HIGH in stage[mine]:
                yield Fold(RATE, str(name), mine & train & (stage == LOW), judged & (stage == HIGH), False)
        for kind in (WORKLOAD, MODEL):
            others = train & (rows[kind] != own[kind].iloc[0]).to_numpy()
            knows_model = bool((rows.loc[others, "model"] == own["model"].iloc[0]).any())
            if others.any() and (kind == MODEL or knows_model):
                yield Fold(kind, str(name), others, judged, whole_run)


def score_level(data: LabelledRows, label: str, column: str, left_out: Sequence[str] = ()) -> pd.DataFrame:
    """Fit every variant on every fold of one level and label, and judge it.

    Parameters
    ----------
    data : LabelledRows
    label : str
        Its name in the table.
    column : str
        Its column in `data.rows`, microseconds.
    left_out : sequence of str
        Experiments that no fit sees.

    Returns
    -------
    DataFrame
        As ``scores`` of `run_attribution`, without `level`.
    """
    actual = data.rows[column].to_numpy(dtype=float)
    fitted: dict[bytes, dict[str, FloatArray]] = {}
    result = []
    for fold in folds(data.rows, left_out):
        chosen = _thinned(data.rows["experiment_id"].to_numpy(), fold.train)
        key = chosen.tobytes()  # experiments of one model share their fold's fit
        if key not in fitted:
            fitted[key] = predict_all(data, actual, chosen)
        for variant, predicted in fitted[key].items():
            result.append(
                {
                    "label": label,
                    "fold": fold.kind,
                    "variant": variant,
                    "experiment_id": fold.experiment_id,
                    "overloaded": bool(data.rows.loc[fold.judged, "overloaded"].iloc[0]),
                    "whole_run": fold.whole_run,
                    "mape_percent": mape_percent(predicted[fold.judged], actual[fold.judged]),
                    "mspe_percent": mspe_percent(predicted[fold.judged], actual[fold.judged]),
                    "n": int(fold.judged.sum()),
                    "n_train": int(chosen.sum()),
                }
            )
    return pd.DataFrame(result)


def predict_all(data: LabelledRows, actual_us: FloatArray, chosen: BoolArray) -> dict[str, FloatArray]:
    """Fit every variant to the chosen rows; predict all rows.

    All but the constant (a median) and the physical model (its own robust logarithmic loss) minimise relative errors.

    Returns
    -------
    dict of str to ndarray, shape (n_rows,)
        Microseconds by variant.
    """
    one = np.ones((len(actual_us), 1))
    line = np.hstack([one, data.rows[["prefill_tokens", "decode_tokens"]].to_numpy(dtype=float)])
    weights = 1.0 / actual_us[chosen]
    black = np.linalg.lstsq(line[chosen] * weights[:, None], np.ones(weights.size), rcond=None)[0]
    predicted = {
        CONSTANT: np.full(len(actual_us), np.median(actual_us[chosen])),
        BLACKBOX: line @ black,
        COMPONENTS: _nonnegative(np.hstack([one, data.components_us]), actual_us, chosen),
        TERMS: _nonnegative(data.features.terms, actual_us, chosen),
    }
    level = RequestLevel(
        data.rows[chosen].assign(interval_us=actual_us[chosen]).reset_index(drop=True), data.features.rows(chosen)
    )
    predicted[PHYSICAL] = PhysicalModel().predict_us(calibrate(level=level).values, data.features)
    return {variant: np.maximum(values, SMALLEST_STEP_US) for variant, values in predicted.items()}


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Return mean and worst MAPE over experiments; overloaded runs apart."""
    keys = ["level", "label", "overloaded", "fold", "variant"]
    table = (
        scores.groupby(keys, sort=False)
        .agg(
            mape_percent=("mape_percent", "mean"),
            worst_percent=("mape_percent", "max"),
            n=("n", "sum"),
            n_experiments=("experiment_id", "nunique"),
        )
        .reset_index()
    )
    order = {name: i for i, name in enumerate((*FOLDS, *VARIANTS))}
    return table.sort_values(keys, key=lambda c: c.map(order).fillna(c) if c.name in ("fold", "variant") else c)


def _nonnegative(design: FloatArray, actual_us: FloatArray, chosen: BoolArray) -> FloatArray:
    """Least squares of relative errors with nonnegative weights; predicts all rows."""
    relative = design[chosen] / actual_us[chosen, None]
    scale = np.sqrt(np.mean(relative**2, axis=0))
    scale[scale == 0] = 1.0  # a term that training never saw keeps weight zero
    weights, _ = nnls(relative / scale, np.ones(len(relative)))
    return np.asarray(design @ (weights / scale), dtype=float)


def _thinned(experiment: NDArray[np.object_], train: BoolArray) -> BoolArray:
    """Take `EFFECTIVE_REQUESTS` rows an experiment, evenly in time: no run outweighs another, neighbours are alike."""
    keep = np.zeros(train.size, dtype=bool)
    for name in np.unique(experiment[train]):
        rows = np.flatnonzero(train & (experiment == name))
        keep[rows[:: max(1, rows.size // EFFECTIVE_REQUESTS)]] = True
    return keep
