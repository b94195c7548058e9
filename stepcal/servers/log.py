"""What one server's clients saw: its requests, to be sent again in a simulation, and their latencies as measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stepcal.errors import InputError
from stepcal.experiments.experiment import Experiment
from stepcal.experiments.folders import read_experiment_folder
from stepcal.experiments.options import deployment_from
from stepcal.ingest import MANIFEST
from stepcal.simulator import Clients, RequestList
from stepcal.specs.deployment import Deployment
from stepcal.units import MS_PER_S, US_PER_S, FloatArray, IntArray

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
METRICS = ("e2e", "ttft", "tpot")
WHOLE = "whole"
REDRAWS = 4
"""Draws of arrivals that tell how much a mean depends on them, for runs whose own are not known."""
ENGINE_SIDE = ("otlp", "llmservingsim")
"""Tools whose latencies are the engine's own: the API server's time is not in them."""


@dataclass(frozen=True)
class ServedLog:
    """One run of one server.

    Attributes
    ----------
    run : str
    deployment : Deployment
        With its server.
    requests : RequestList
        As they were sent.
    e2e_s, ttft_s : ndarray or None
        Measured, NaN for a request that failed; None where only summaries are at hand.
    summaries : DataFrame
        `split`, `metric`, `statistic`, `value` (ms): whole run and stages.
    timeout_s : float
        How long the client waited.
    clients : Clients, optional
        Cap on requests in flight and the like, where known.
    is_engine_side : bool
        Whether latencies leave out the API server.
    stream_events : ndarray or None
        Events with output of each request, NaN where not counted.
    notes : tuple of str
    redraws : tuple of RequestList
        The same load with other arrivals, where those of the run are not known and `requests` are one draw of them.
    """

    run: str
    deployment: Deployment
    requests: RequestList
    e2e_s: FloatArray | None
    ttft_s: FloatArray | None
    summaries: pd.DataFrame
    timeout_s: float = float("inf")
    clients: Clients | None = None
    is_engine_side: bool = False
    stream_events: FloatArray | None = None
    notes: tuple[str, ...] = ()
    redraws: tuple[RequestList, ...] = ()

    @property
    def stage(self) -> IntArray:
        """Stage of load of each request, shape (n_requests,)."""
        n = len(self.requests)
        return np.zeros(n, dtype=int) if self.requests.stage is None else np.asarray(self.requests.stage, dtype=int)

    def head(self, share: float) -> ServedLog:
        """Return the first share of the requests, which is what a calibration may see."""
        return self.rows(np.arange(len(self.requests)) < round(share * len(self.requests)))

    def rows(self, kept: Any) -> ServedLog:
        """Return the log of some requests, as if the others had not been sent.

        Raises
        ------
        InputError
            If single requests are not at hand.
        """
        if self.e2e_s is None or self.ttft_s is None:
            raise InputError(f"`{self.run}` has summaries only, and a part of it needs its single requests.")
        chosen = np.flatnonzero(kept)
        r = self.requests

        def part(values: Any) -> Any:
            return None if values is None else values[chosen]

        requests = replace(
            r,
            arrival_s=r.arrival_s[chosen],
            prompt=r.prompt[chosen],
            output_tokens=r.output_tokens[chosen],
            output_content=part(r.output_content),
            stage=part(r.stage),
            abort_s=part(r.abort_s),
            index=part(r.index),
            follows=None,
        )
        e2e, ttft = self.e2e_s[chosen], self.ttft_s[chosen]
        stage = np.zeros(len(chosen), dtype=int) if r.stage is None else np.asarray(r.stage)[chosen]
        return replace(
            self,
            requests=requests,
            e2e_s=e2e,
            ttft_s=ttft,
            stream_events=part(self.stream_events),
            summaries=summarise(e2e, ttft, requests.output_tokens, stage),
        )


def summarise(e2e_s: FloatArray, ttft_s: FloatArray, output_tokens: Any, stage: Any) -> pd.DataFrame:
    """Summarise latencies of requests of any lengths, whole and by stage of load.

    Parameters
    ----------
    e2e_s, ttft_s : ndarray, shape (n_requests,)
        NaN for a request that did not complete; TTFT NaN without streaming.
    output_tokens, stage : ndarray of int, shape (n_requests,)

    Returns
    -------
    DataFrame
        `split`, `metric` (``e2e``, ``ttft``, ``tpot`` in ms, ``completed``), `statistic`, `value`. The time per output token
        is a mean over requests with two tokens or more.
    """
    stages = np.unique(stage)
    splits = {WHOLE: np.ones(len(e2e_s), dtype=bool)}
    splits |= {f"stage {s}": stage == s for s in stages} if len(stages) > 1 else {}
    gaps = np.where(np.asarray(output_tokens) > 1, np.asarray(output_tokens, dtype=float) - 1, np.nan)
    columns = dict(zip(METRICS, (e2e_s, ttft_s, (e2e_s - ttft_s) / gaps), strict=True))
    rows: list[tuple[str, str, str, float]] = []
    for split, chosen in splits.items():
        rows.append((split, "completed", "count", float((chosen & ~np.isnan(e2e_s)).sum())))
        for metric, values in columns.items():
            here = values[chosen]
            here = here[~np.isnan(here)] * MS_PER_S
            if here.size:
                rows.append((split, metric, "mean", float(here.mean())))
                rows += [(split, metric, q, float(np.quantile(here, p))) for q, p in QUANTILES.items()]
    return pd.DataFrame(rows, columns=["split", "metric", "statistic", "value"])


def read_logs(folder: Path, options: Mapping[str, Any], *, prompt_texts: int | None = None) -> list[ServedLog]:
    """Read the runs of a folder that `stepcal ingest` wrote, or of one in the layout of inference-perf runs.

    Parameters
    ----------
    folder : Path
    options : mapping
        What the user says of the server (`stepcal.experiments.options.deployment_from`).
    prompt_texts : int, optional
        Prompts are this many texts in turn, as load generators cycle through a data set; by default each is its own.

    Returns
    -------
    list of ServedLog

    Raises
    ------
    InputError
        If the folder holds no runs, the server is not said, or options contradict runs that have settings of their own.
    """
    if (folder / MANIFEST).is_file():
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return [_ingested(folder, run, options, prompt_texts) for run in manifest["runs"]]
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder. `stepcal ingest SOURCE --out {folder}` makes one.")
    gpu = options.get("accelerator")
    cases = read_experiment_folder(folder, accelerator=None if gpu is None else str(gpu))
    for experiment, _ in cases:
        _refuse_contradiction(experiment, options)
    return [log_of(experiment, known) for experiment, known in cases]


def _refuse_contradiction(experiment: Experiment, options: Mapping[str, Any]) -> None:
    """Runs in the layout of inference-perf have settings of their own, which an option does not change."""
    deployment = experiment.deployment
    own: dict[str, Any] = {
        "tensor_parallel_size": deployment.tensor_parallel,
        "kv_cache_dtype": deployment.kv_cache_dtype,
        **vars(deployment.limits),
    }
    for name, value in options.items():
        if value is not None and name in own and value != own[name]:
            raise InputError(
                f"`{name}` is {value}, and {experiment.experiment_id} has {own[name]} by its settings. Put it into "
                "the run's `exp-config.yaml`, or leave the option out."
            )


def log_of(experiment: Experiment, known: pd.DataFrame, *, seed: int = 0) -> ServedLog:
    """Turn a measured experiment into a log; without single requests its arrivals are generated."""
    requests = experiment.arrivals(experiment.default_process, seed=seed)
    e2e = ttft = None
    redraws: tuple[RequestList, ...] = ()
    if experiment.requests is None:
        seeds = range(seed + 1, seed + 1 + REDRAWS)
        redraws = tuple(experiment.arrivals(experiment.default_process, seed=s) for s in seeds)
    if experiment.requests is not None:
        failed = experiment.requests["has_error"].to_numpy(dtype=bool)
        e2e = np.where(failed, np.nan, experiment.requests["e2e_s"].to_numpy(dtype=float))
        ttft = np.where(failed, np.nan, experiment.requests["ttft_s"].to_numpy(dtype=float))
    summaries = known[known["metric"].isin((*METRICS, "completed")) & ~known["split"].eq("test")]
    return ServedLog(
        run=experiment.experiment_id,
        deployment=experiment.deployment,
        requests=requests,
        e2e_s=e2e,
        ttft_s=ttft,
        summaries=summaries.reset_index(drop=True),
        timeout_s=experiment.workload.timeout_s,
        notes=experiment.notes,
        redraws=redraws,
    )


def _ingested(folder: Path, run: Mapping[str, Any], options: Mapping[str, Any], prompt_texts: int | None) -> ServedLog:
    own = folder / str(run["run"])
    served = deployment_from(options, next((p for p in (own, folder) if (p / "exp-config.yaml").is_file()), None))
    table = _table(own / "requests.parquet", str(run["run"]))
    requests, notes = requests_of(table, prompt_texts=prompt_texts)
    failed = table["has_error"].to_numpy(dtype=bool)
    e2e = np.where(failed, np.nan, table["e2e_s"].to_numpy(dtype=float))
    ttft = np.where(failed, np.nan, table["ttft_s"].to_numpy(dtype=float))
    stage = table["stage"].to_numpy(dtype=int)
    is_engine_side = run["tool"] in ENGINE_SIDE
    if is_engine_side:
        notes.append(f"{run['tool']} measures in the engine: the API server's time is left out on both sides.")
    return ServedLog(
        run=str(run["run"]),
        deployment=served.deployment,
        requests=requests,
        e2e_s=e2e,
        ttft_s=ttft,
        summaries=summarise(e2e, ttft, requests.output_tokens, stage),
        is_engine_side=is_engine_side,
        stream_events=table["stream_events"].to_numpy(dtype=float, na_value=np.nan),
        notes=(*served.notes, *notes),
    )


def _table(path: Path, run: str) -> pd.DataFrame:
    try:
        table = pq.read_table(path).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}. Run `stepcal ingest` again.") from None
    if table["arrival_time_us"].isna().any():
        raise InputError(
            f"`{run}` has no times of arrival (its tool writes none), so its load cannot be sent again in a simulation. "
            "Use a load generator that writes them: vLLM bench with --save-detailed, GuideLLM, AIPerf, inference-perf."
        )
    return table


def requests_of(table: pd.DataFrame, *, prompt_texts: int | None = None) -> tuple[RequestList, list[str]]:
    """Build the requests to send again from an ingested table, and notes on what was assumed of their texts.

    A failed request whose lengths are not known takes the medians of the others: it loaded the server, too.
    """
    done = ~table["has_error"].to_numpy(dtype=bool)
    if not done.any():
        raise InputError("No request of the run completed: there is nothing to compare with.")
    lengths = {}
    for name in ("prompt_tokens", "output_tokens"):
        values = table[name].to_numpy(dtype=np.int64)
        lengths[name] = np.where(values > 0, values, int(np.median(values[done])))
    cached = table["cached_prompt_tokens"].to_numpy(dtype=float, na_value=np.nan)
    n = len(table)
    prompt, start, content, tokens, notes = _prompts(lengths["prompt_tokens"], cached, prompt_texts)
    return (
        RequestList(
            arrival_s=table["arrival_time_us"].to_numpy(dtype=float) / US_PER_S,
            prompt=prompt,
            prompt_start=start,
            segment_content=content,
            segment_tokens=tokens,
            output_tokens=lengths["output_tokens"].astype(np.int32),
            stage=table["stage"].to_numpy(dtype=np.int32),
            index=np.arange(n, dtype=np.int64),
        ),
        notes,
    )


def _prompts(lengths: IntArray, cached: FloatArray, prompt_texts: int | None) -> tuple[Any, Any, Any, Any, list[str]]:
    """Prompts as segments: texts in turn, what the server found in its cache, or a text for each request."""
    n = len(lengths)
    order = np.arange(n, dtype=np.int64)
    if prompt_texts is not None:
        note = f"Prompts are taken to be {prompt_texts} texts in turn, as `--prompt-texts` says."
        return order.astype(np.int32), np.arange(n + 1), order % prompt_texts, lengths, [note]
    if np.isnan(cached).all():
        note = "Each prompt is taken to be a text of its own: nothing is cached. `--prompt-texts N` says else."
        return order.astype(np.int32), np.arange(n + 1), order, lengths, [note]
    shared = np.minimum(np.nan_to_num(cached).astype(np.int64), lengths - 1)
    has_shared = shared > 0
    parts = np.where(has_shared, 2, 1)
    start = np.concatenate(([0], np.cumsum(parts)))
    content, tokens = np.empty(start[-1], np.int64), np.empty(start[-1], np.int64)
    content[start[1:] - 1], tokens[start[1:] - 1] = order + 1, lengths - shared
    content[start[:-1][has_shared]], tokens[start[:-1][has_shared]] = 0, shared[has_shared]
    return order.astype(np.int32), start, content, tokens, ["Cached prompt tokens are those that the server reported."]


def log_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each run's table, from the manifest; empty for a folder that was not ingested."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return {str(run["run"]): str(run["parquet_sha256"]) for run in manifest["runs"]}
