"""The study ``kernel_transfer``: the kernel model on the 31 runs, post hoc; what each of its parts is worth there.

The form of the model was suggested by an exploration of such runs, these among them. So nothing here confirms anything: the
page says what was seen before a choice was made, and H4 waits for other runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from stepcal.experiments.folders import Case
from stepcal.experiments.latencies import WHOLE
from stepcal.kernels import GpuKernels, load_kernels
from stepcal.simulator import CompiledStepTime
from stepcal.specs.deployment import Deployment
from stepcal.specs.sampling import NEUTRAL
from stepcal.step_time.coefficients import DEFAULT, PHYSICAL_DEFAULT, load_coefficients
from stepcal.step_time.compile import AnyStepTime
from stepcal.step_time.kernel_model import compile_kernels
from stepcal.step_time.kernel_parameters import KERNEL_PARAMETERS
from stepcal.step_time.physical_parameters import priors
from stepcal.step_time.sampler import sampler_costs
from stepcal.studies.kernels.transfer import errors_of, transfer_cases, transfer_errors
from stepcal.studies.study import Tables

ONE_SEED = range(1)
"""Ablations take one seed: what they show is larger than the spread over seeds."""
FROZEN = "frozen"
H100_16_BIT, FP8 = "H100, 16-bit", "FP8"
H4_VARIANTS = {H100_16_BIT: "kernel_h100", FP8: "kernel_fp8"}
"""Variant of H4's evidence by group; every other GPU with tables is ``kernel_other_gpu``."""


def run_kernel_transfer(runs: pd.DataFrame, measured: pd.DataFrame) -> tuple[Tables, dict[str, str]]:
    """Score the frozen kernel model on the 31 runs, and without each of its parts.

    Parameters
    ----------
    runs, measured : DataFrame
        ``transfer/runs.csv`` and ``transfer/measured.csv``.

    Returns
    -------
    tables : dict
        ``errors`` (of `stepcal.studies.kernels.transfer.errors_of`, five seeds), ``ablations`` (signed error of mean
        E2E and TTFT by run and variant, one seed), ``groups`` (which group each run belongs to), ``evidence`` (what H4's
        criteria look at, post hoc).
    texts : dict
        Empty.
    """
    del measured  # named because the recording depends on it
    cases = transfer_cases(tuple(runs["experiment_id"]))
    errors = transfer_errors(load_coefficients(DEFAULT), cases)
    groups = pd.DataFrame(
        [(e.experiment_id, group_of(e.deployment)) for e, _ in cases], columns=["experiment_id", "group"]
    )
    predecessor = transfer_errors(load_coefficients(PHYSICAL_DEFAULT), cases, seeds=ONE_SEED)
    tables = {
        "errors": errors,
        "ablations": ablations(cases, errors),
        "groups": groups,
        "evidence": h4_rows(errors, predecessor, cases),
    }
    return tables, {}


def group_of(deployment: Deployment) -> str:
    """Return the group under which H4 judges a run: FP8 weights, H100 with 16-bit weights, or another GPU by name."""
    if deployment.architecture.weight_dtype == "fp8":
        return FP8
    name = deployment.accelerator.name
    return H100_16_BIT if name.startswith("h100") else name


def variants() -> dict[str, tuple[Callable[[Deployment], AnyStepTime], Mapping[str, float]]]:
    """Return the ablated models by name: the step time of a deployment, and the overheads around the engine."""
    frozen, predecessor = load_coefficients(DEFAULT), load_coefficients(PHYSICAL_DEFAULT)
    values, nothing_fitted = frozen.values, priors(KERNEL_PARAMETERS)
    around, before = frozen.api_overheads_us(), predecessor.api_overheads_us()
    return {
        "sampler off": (lambda d: compile_kernels(values, replace(d, sampling=NEUTRAL)), around),
        "even routing": (lambda d: compile_kernels(values, d, expert_skew=0.0), around),
        "medians of GPUs instead of the GPU's tables": (
            lambda d: compile_kernels(values, d, kernels=without_tables(d)),
            around,
        ),
        "nothing fitted": (
            lambda d: compile_kernels(nothing_fitted, d),
            {"api_before_us": nothing_fitted["api_before_us"]},
        ),
        "bytes instead of kernels": (predecessor.compile, before),
        "bytes and a sampler": (lambda d: _with_sampler(predecessor.compile(d), d), before),
    }


def ablations(cases: list[Case], errors: pd.DataFrame) -> pd.DataFrame:
    """Return the signed errors of the means of whole runs by variant; the frozen model's own beside them.

    Returns
    -------
    DataFrame
        `variant`, `experiment_id`, `metric` (e2e, ttft), `error_percent`.
    """
    tables = [_means(errors).assign(variant=FROZEN)]
    for name, (compile_step_time, around) in variants().items():
        own = errors_of(compile_step_time, cases, around, seeds=ONE_SEED)
        tables.append(_means(own).assign(variant=name))
    return pd.concat(tables, ignore_index=True)[["variant", "experiment_id", "metric", "error_percent"]]


def _means(errors: pd.DataFrame) -> pd.DataFrame:
    chosen = (errors["split"] == WHOLE) & (errors["statistic"] == "mean") & errors["metric"].isin(["e2e", "ttft"])
    return errors[chosen]


def _mean_e2e(errors: pd.DataFrame) -> dict[str, float]:
    own = _means(errors)
    own = own[own["metric"] == "e2e"]
    return dict(zip(own["experiment_id"].astype(str), own["error_percent"].astype(float), strict=True))


def without_tables(deployment: Deployment) -> GpuKernels:
    """Return what would stand in for a GPU's kernels if it had no tables: medians of all, on its datasheet."""
    own = load_kernels(deployment.accelerator)
    return replace(own, constants={})


def _with_sampler(step_time: AnyStepTime, deployment: Deployment) -> AnyStepTime:
    """Add the sampler to a step time that knows nothing of it."""
    if not isinstance(step_time, CompiledStepTime):
        return step_time
    requests = np.arange(deployment.limits.max_num_seqs + 1)
    own = np.asarray(step_time.requests_us, dtype=float)
    table = own * requests if own.ndim == 0 else own[: requests.size]
    return replace(step_time, requests_us=table + sampler_costs(requests, deployment).total_us)


def h4_rows(errors: pd.DataFrame, predecessor: pd.DataFrame, cases: list[Case]) -> pd.DataFrame:
    """Return what H4's criteria look at: the mean E2E of each whole run, and how much nearer it is than the predecessor's.

    Parameters
    ----------
    errors, predecessor : DataFrame
        Of `stepcal.studies.kernels.transfer.errors_of`, with the frozen coefficients and with those of H3.
    cases : list of (Experiment, DataFrame)

    Returns
    -------
    DataFrame
        `quantity`, `variant`, `unit`, `value`, `reason`.
    """
    own, other = _mean_e2e(errors), _mean_e2e(predecessor)
    rows = []
    for experiment, _ in cases:
        name, group = experiment.experiment_id, group_of(experiment.deployment)
        variant = H4_VARIANTS.get(group, "kernel_other_gpu")
        signed, before = own[name], other[name]
        rows.append(("e2e_error_percent", variant, name, abs(signed), ""))
        rows.append(("mspe_percent", variant, name, signed, ""))
        gain = abs(before) - abs(signed)
        rows.append(("e2e_error_gain_points", "kernel_against_predecessor", name, gain, ""))
    return pd.DataFrame(rows, columns=["quantity", "variant", "unit", "value", "reason"])


def group_summary(study: Tables) -> pd.DataFrame:
    """Return errors by group for a page: mean absolute, signed and largest E2E, TTFT, and tails.

    Returns
    -------
    DataFrame
        `group`, `runs`, `e2e`, `bias`, `worst`, `ttft`, `e2e_p90`, `e2e_p99`, `ttft_p90`, `ttft_p99` (percent).
    """
    whole = study["errors"]
    whole = whole[whole["split"] == WHOLE].merge(study["groups"], on="experiment_id")
    name = whole["metric"].where(whole["statistic"] == "mean", whole["metric"] + "_" + whole["statistic"])
    sizes = whole.assign(name=name, size=whole["error_percent"].abs())
    table = sizes.pivot_table(index="group", columns="name", values="size", aggfunc="mean")
    e2e = sizes[sizes["name"] == "e2e"].groupby("group")
    table = table[["e2e", "ttft", "e2e_p90", "e2e_p99", "ttft_p90", "ttft_p99"]]
    table.insert(0, "runs", e2e.size())
    table.insert(2, "bias", e2e["error_percent"].mean())
    table.insert(3, "worst", e2e["size"].max())
    return table.reset_index().rename_axis(columns=None)


def ablation_summary(study: Tables) -> pd.DataFrame:
    """Return the mean absolute E2E error (percent) of each variant by group, the frozen model first."""
    own = study["ablations"].query("metric == 'e2e'").merge(study["groups"], on="experiment_id")
    size = own.assign(size=own["error_percent"].abs())
    table = size.pivot_table(index="variant", columns="group", values="size", aggfunc="mean", sort=False)
    table.insert(0, "all 31", size.groupby("variant")["size"].mean())
    return table.reset_index().rename_axis(columns=None)
