"""Decode intervals of single requests beside the physical features of their mean step, for fits at the request level.

Batches are rebuilt from measured latencies, which is circular: good for fitting and diagnosis, never for a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stepcal.end_to_end import Experiment
from stepcal.offloading import held_blocks, rejected_requests
from stepcal.physical import PhysicalFeatures, physical_features

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

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
        Of `stepcal.reconstruction.decode_intervals`.
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
                experiment.architecture,
                experiment.accelerator,
                tensor_parallel=experiment.tensor_parallel,
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
                block_size=experiment.server.block_size,
                offload_blocks=experiment.server.offload_blocks,
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
        running, held, workload.output_len, pool_blocks=server.offload_blocks, block_size=server.block_size
    )


def training_rows(level: RequestLevel) -> RequestLevel:
    """Return the training requests, thinned evenly to `EFFECTIVE_REQUESTS` an experiment."""
    train = level.rows["split"].to_numpy() == "train"
    keep = np.zeros(len(train), dtype=bool)
    for _, own in level.rows[train].groupby("experiment_id", sort=False):
        keep[own.index[:: max(1, len(own) // EFFECTIVE_REQUESTS)]] = True
    return level.subset(keep)
