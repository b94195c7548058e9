"""The study ``silicon``: public benchmark rows at fixed concurrency, predicted end to end, with nothing fitted to them.

Rows and the rule for suspect ones were fixed before errors were looked at (`stepcal.kernels.silicon`). How their servers
were started and their clients sent is not published. vLLM's defaults are assumed, prompts that share nothing, ten requests
a client, all of them in the mean. Two assumptions were made after a first look at errors, and the page says so: lengths are
drawn from 80% of the nominal ones up, as the public benchmark's client does by default, and rows of vLLM 0.12 are sampled
with their model's own defaults.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stepcal.datasets.facts import shipped_table
from stepcal.errors import InputError
from stepcal.experiments.engine_args import Settings, server_of
from stepcal.locations import data_folder
from stepcal.simulator import Clients, RequestList, simulate
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.sampling import NEUTRAL, publishers_sampling
from stepcal.specs.weight_formats import WeightWidths
from stepcal.step_time.coefficients import DEFAULT, StepTimeModel, load_coefficients
from stepcal.studies.study import Tables
from stepcal.units import PERCENT, US_PER_MS, IntArray

SHORTEST_SHARE = 0.8
"""Lengths are uniform between this share of the nominal one and all of it; clients that keep step with each other would all
prefill at once."""
CLIENT_OF_OLD = "0.12.0"
"""Rows of this version come from another client, which sends no sampling parameters; the others ask for greedy sampling."""
ASYNC_FROM_MINOR = 14
"""vLLM schedules asynchronously by default since 0.14."""
REQUESTS_A_CLIENT = 10
"""Requests that a benchmark of this kind sends for each client."""
SPARE_TOKENS = 256
"""Context limit beyond prompt and answer."""
SEED = 0
FP8 = 1.0
"""Bytes of a weight of the layers in FP8; embedding and head stay at 16 bits."""


def run_silicon(rows: pd.DataFrame) -> tuple[Tables, dict[str, str]]:
    """Predict every row that is not suspect.

    Parameters
    ----------
    rows : DataFrame
        ``hardware/silicon.csv``.

    Returns
    -------
    tables : dict
        ``rows``: each row with `predicted_ttft_ms`, `predicted_tpot_ms`, their signed errors in percent, and a `reason`
        where it could not be predicted.
    texts : dict
        Empty.
    """
    coefficients = load_coefficients(DEFAULT)
    predicted = [_predicted(row, coefficients) for row in rows.to_dict("records")]
    table = pd.concat([rows.reset_index(drop=True), pd.DataFrame(predicted)], axis=1)
    for name in ("ttft", "tpot"):
        table[f"{name}_error_percent"] = PERCENT * (table[f"predicted_{name}_ms"] / table[f"{name}_ms"] - 1.0)
    return {"rows": table}, {}


def silicon_deployment(row: Mapping[Hashable, Any]) -> Deployment:
    """Return the deployment of a row, with vLLM's defaults for what is not published."""
    path = data_folder() / "hardware" / "silicon_models" / f"{row['model']}.json"
    longest = int(row["prompt_tokens"]) + int(row["output_tokens"]) + SPARE_TOKENS
    architecture = ModelArchitecture.from_config(path, name=str(row["model"]), max_model_len=longest)
    if row["precision"] == "fp8" and architecture.weight_dtype != "fp8":
        widths = WeightWidths(attention=FP8, mlp=FP8, experts=FP8)
        architecture = replace(architecture, weight_dtype="fp8", weight_widths=widths)
    gpu, degree = load_accelerator(str(row["gpu"])), int(row["tensor_parallel"])
    version = str(row["vllm_version"])
    minor = int(version.split(".")[1]) if version[:2] == "0." else ASYNC_FROM_MINOR
    values = {"max_model_len": longest, "async_scheduling": minor >= ASYNC_FROM_MINOR}
    settings = Settings(Path("data/hardware/silicon.csv"), values)
    server, _ = server_of(settings, architecture, gpu, tensor_parallel=degree)
    sampling = publishers_sampling(architecture.name) if version == CLIENT_OF_OLD else NEUTRAL
    return Deployment(architecture, gpu, degree, server, sampling)


def closed_loop(row: Mapping[Hashable, Any]) -> tuple[RequestList, Clients]:
    """Return the requests of a row, all there at once, and the clients that send them as answers come back."""
    concurrency = int(row["concurrency"])
    n = REQUESTS_A_CLIENT * concurrency
    order, rng = np.arange(n), np.random.Generator(np.random.PCG64(SEED))

    def lengths(nominal: int) -> IntArray:
        return np.maximum(rng.integers(int(SHORTEST_SHARE * nominal), nominal + 1, size=n), 2)

    requests = RequestList(
        arrival_s=np.zeros(n),
        prompt=order.astype(np.int32),
        prompt_start=np.arange(n + 1),
        segment_content=order,
        segment_tokens=lengths(int(row["prompt_tokens"])),
        output_tokens=lengths(int(row["output_tokens"])).astype(np.int32),
    )
    return requests, Clients(max_in_flight=concurrency)


def _predicted(row: Mapping[Hashable, Any], coefficients: StepTimeModel) -> dict[str, Any]:
    nothing = {"predicted_ttft_ms": np.nan, "predicted_tpot_ms": np.nan}
    if row["suspect"]:
        return {**nothing, "reason": str(row["suspect"])}
    try:
        deployment = silicon_deployment(row)
        requests, clients = closed_loop(row)
        step_time = coefficients.compile(deployment)
        before_us = coefficients.values["api_before_us"]
        result = simulate(requests, deployment.limits, step_time, clients=clients, api_before_us=before_us)
    except InputError as error:
        return {**nothing, "reason": str(error)}
    e2e, ttft = result.e2e_us() / US_PER_MS, result.ttft_us() / US_PER_MS
    tpot = (e2e - ttft) / (np.asarray(requests.output_tokens) - 1)
    return {"predicted_ttft_ms": float(np.nanmean(ttft)), "predicted_tpot_ms": float(np.nanmean(tpot)), "reason": ""}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return errors by model, GPU and precision for a page.

    Returns
    -------
    DataFrame
        `model`, `gpu`, `precision`, `rows`, `tpot`, `tpot_bias`, `tpot_median`, `ttft`, `ttft_median` (percent).
    """
    own = rows[rows["reason"] == ""]
    table = own.groupby(["model", "gpu", "precision"]).agg(
        rows=("row", "size"),
        tpot=("tpot_error_percent", lambda e: e.abs().mean()),
        tpot_bias=("tpot_error_percent", "mean"),
        tpot_median=("tpot_error_percent", lambda e: e.abs().median()),
        ttft=("ttft_error_percent", lambda e: e.abs().mean()),
        ttft_median=("ttft_error_percent", lambda e: e.abs().median()),
    )
    return table.reset_index()


def beside_peer(rows: pd.DataFrame) -> pd.DataFrame:
    """Return our errors beside AIConfigurator's (``tools/compare_silicon.py``) on the rows that both predict.

    Returns
    -------
    DataFrame
        `model`, `gpu`, `precision`, `rows`, `both` (rows that both predict), then mean absolute errors in percent: `tpot`,
        `peer_tpot`, `ttft`, `peer_ttft`.
    """
    peer = shipped_table("hardware/silicon_peer.csv")[["row", "ttft_ms", "tpot_ms"]]
    table = rows.merge(peer, on="row", how="left", suffixes=("", "_of_peer"))
    shared = (table["reason"] == "") & table["tpot_ms_of_peer"].notna()
    columns = {"tpot": table["tpot_error_percent"].abs(), "ttft": table["ttft_error_percent"].abs()}
    for name in ("ttft", "tpot"):
        error = PERCENT * (table[f"{name}_ms_of_peer"] / table[f"{name}_ms"] - 1.0)
        columns[f"peer_{name}"] = error.abs()
    table = table.assign(both=shared, **{name: values.where(shared) for name, values in columns.items()})
    grouped = table.groupby(["model", "gpu", "precision"])
    means = grouped[["tpot", "peer_tpot", "ttft", "peer_ttft"]].mean()
    return pd.concat([grouped["both"].agg(rows="size", both="sum"), means], axis=1).reset_index()


def silicon_rows_that_ship() -> pd.DataFrame:
    """Return ``hardware/silicon.csv``, with no reason where a row is not suspect."""
    table = shipped_table("hardware/silicon.csv")
    words = {name: table[name].fillna("") for name in ("suspect", "vllm_version")}
    return table.assign(**words, experiment_id=table["row"])
