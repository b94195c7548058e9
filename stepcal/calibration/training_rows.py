"""Decode intervals of single requests beside the physical features of their mean step, for fits at the request level.

Batches are rebuilt from measured latencies, which is circular: good for fitting and diagnosis, never for a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from stepcal.experiments.experiment import Experiment
from stepcal.reconstruction.labelled_steps import COUNTS, PREFILL_COUNTS, _by_run, _gap_rows, _means
from stepcal.specs.kv_offloading import held_blocks, rejected_requests
from stepcal.step_time.physical import PhysicalFeatures, physical_features
from stepcal.units import BoolArray, FloatArray

EFFECTIVE_REQUESTS = 400
"""Rows an experiment contributes to a request-level fit: a systematic sample; neighbours share their batch anyway."""


@dataclass(frozen=True)
class RequestLevel:
    """Decode intervals of some experiments and the features of their mean steps, in order of experiment and arrival."""

    rows: pd.DataFrame
    features: PhysicalFeatures

    def subset(self, mask: BoolArray) -> RequestLevel:
        """Return some of the requests."""
        return RequestLevel(self.rows[mask].reset_index(drop=True), self.features.rows(mask))


def request_level(intervals: pd.DataFrame, experiments: Sequence[Experiment]) -> RequestLevel:
    """Build the features of each request's mean step.

    Parameters
    ----------
    intervals : DataFrame
        Of `stepcal.reconstruction.timeline.decode_intervals`.
    experiments : sequence of Experiment

    Returns
    -------
    RequestLevel
    """
    rows, parts = [], []
    for experiment in experiments:
        own = intervals[intervals["experiment_id"] == experiment.experiment_id]
        requests = experiment.arrivals("replayed")
        stage_of = pd.Series(np.asarray(requests.stage), index=np.asarray(requests.index))
        prefill = own["prefill_tokens"].to_numpy(dtype=float)
        parts.append(
            physical_features(
                experiment.deployment,
                decode_requests=own["batch"].to_numpy(dtype=float),
                kv_tokens=own["kv_tokens"].to_numpy(dtype=float),
                prefill_tokens=prefill,
                prefill_requests=own["prefill_requests"].to_numpy(dtype=float),
                prefill_kv_tokens=own["prefill_requests"].to_numpy(dtype=float)
                * own["prompt_tokens"].to_numpy(dtype=float),
                rejected=batch_rejections(
                    experiment,
                    own["batch"].to_numpy(dtype=float) + own["prefill_requests"].to_numpy(dtype=float),
                    own["kv_tokens"].to_numpy(dtype=float),
                ),
            )
        )
        rows.append(
            own.assign(
                overloaded=experiment.overloaded,
                model=experiment.architecture.name,
                stage=stage_of.reindex(own["index"]).to_numpy(),
            )
        )
    return RequestLevel(pd.concat(rows, ignore_index=True), PhysicalFeatures.joined(parts))


def batch_rejections(experiment: Experiment, running: FloatArray, kv_tokens: FloatArray) -> FloatArray:
    """Requests that the offload pool rejects, of batches of which only these sums are known; shape (n_steps,)."""
    server, workload = experiment.server, experiment.workload
    held = held_blocks(
        running,
        kv_tokens,
        workload.system_prompt_len + workload.question_len,
        n_texts=workload.n_groups * workload.n_prompts_per_group,
        block_size=server.block_size,
    )
    return rejected_requests(
        running, held, workload.output_len, pool_blocks=server.pool_blocks, block_size=server.block_size
    )


def training_rows(level: RequestLevel) -> RequestLevel:
    """Return the training requests, thinned evenly to `EFFECTIVE_REQUESTS` an experiment."""
    train = level.rows["split"].to_numpy() == "train"
    keep = np.zeros(len(train), dtype=bool)
    for _, own in level.rows[train].groupby("experiment_id", sort=False):
        keep[own.index[:: max(1, len(own) // EFFECTIVE_REQUESTS)]] = True
    return level.subset(keep)


def step_features(
    table: pd.DataFrame, experiments: Sequence[Experiment], rebuilt: pd.DataFrame | None = None
) -> PhysicalFeatures:
    """Build the physical features of labelled steps, in their order.

    Parameters
    ----------
    table : DataFrame
        Of `labelled_steps`; rows by experiment.
    experiments : sequence of Experiment
    rebuilt : DataFrame, optional
        Of `rebuilt_steps`. With it, features are the means over the steps that the interval measures (`gap_means`); they
        are averaged, not computed from mean counts, as they need not be linear in the counts.

    Returns
    -------
    PhysicalFeatures
        A row a labelled step.

    Raises
    ------
    KeyError
        If a step's experiment is not among `experiments`.
    InputError
        As `gap_means`.
    """
    by_name = {e.experiment_id: e for e in experiments}
    if rebuilt is None:
        runs = table.groupby("experiment_id", sort=True, observed=True)
        return PhysicalFeatures.joined([_features(own, by_name[str(name)]) for name, own in runs])
    parts = []
    for own, every in _by_run(table, rebuilt):
        single = _features(every, by_name[str(own["experiment_id"].iloc[0])])
        first, count = _gap_rows(own, every)
        means = {f.name: _means(getattr(single, f.name), first, count) for f in fields(PhysicalFeatures)}
        parts.append(PhysicalFeatures(**means))
    return PhysicalFeatures.joined(parts)


def _features(own: pd.DataFrame, e: Experiment) -> PhysicalFeatures:
    """Features of the steps of one experiment."""
    counts: dict[str, Any] = {c: own[c].to_numpy(dtype=float) for c in (*COUNTS, *PREFILL_COUNTS) if c in own}
    running = own["decode_tokens"].to_numpy(dtype=float) + own["num_prefill_reqs"].to_numpy(dtype=float)
    return physical_features(
        e.deployment,
        decode_requests=own["decode_tokens"].to_numpy(dtype=float),
        prefill_requests=own["num_prefill_reqs"].to_numpy(dtype=float),
        rejected=batch_rejections(e, running, counts["kv_tokens"]),
        **counts,
    )
