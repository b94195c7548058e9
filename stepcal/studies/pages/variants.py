"""What the page on variants of the repaired model cites, and its tables. Errors are in percent."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from stepcal.datasets import kernel_efficiency
from stepcal.step_time.physical import ATTENTION_MFU, GEMM_MFU
from stepcal.step_time.physical_parameters import STEP_PARAMETERS
from stepcal.studies.ablation_scores import MIN_GAIN_POINTS
from stepcal.studies.ablations import AGREES_SIGMAS, LEVELS
from stepcal.studies.model_forms import SUPPORT_OBJECTIVE
from stepcal.studies.study import Study

AGAIN = "workload, started at request"
SHIPPED = "shipped summaries"
LARGE_GEMM_ROWS, LONGEST_PREFILL = 1024, 4096
"""Rows of a matrix product from which its share of the peak is quoted; tokens of the longest prefill benchmark."""
SHOWN_SIZES = {
    "gemm": [8, 128, 1_024, 8_192, 131_072],
    "decode_attention": [0, 1_024, 4_096],
    "prefill_attention": [1_024, 4_096],
}
SHOWN_REQUESTS = [0, 1, 16, 128]
WHOLE_NUMBER_FROM = 1_000
"""Values from here on are shown without digits after the point."""


def variants_numbers(study: Study) -> dict[str, object]:
    """Return what the page cites of the study ``ablations`` and of the kernel benchmarks behind the priors."""
    return {**_level_numbers(study), **_choice_numbers(study), **_form_numbers(study), **_kernel_numbers(study)}


def _level_numbers(study: Study) -> dict[str, object]:
    numbers, objective = study["numbers"], study["fits"].set_index("fit")["objective"]
    apart = numbers[~numbers["agrees"]].groupby("fit").size().reindex(LEVELS, fill_value=0)
    valid = scores_of(study, "valid", LEVELS).set_index("fit")
    e2e, ttft = valid["e2e_percent"], valid["ttft_percent"]
    return {
        "sigmas": AGREES_SIGMAS,
        "apart_step": int(apart["step"]),
        "apart_request": int(apart["request"]),
        "apart_workload": int(apart["workload"]),
        "apart_again": int(apart[AGAIN]),
        "objective_prior": float(objective["workload"]),
        "objective_again": float(objective[AGAIN]),
        "valid_step": float(e2e["step"]),
        "valid_request": float(e2e["request"]),
        "valid_workload": float(e2e["workload"]),
        "valid_joint": float(e2e["joint"]),
        "valid_shipped": float(e2e[SHIPPED]),
        "valid_worst": float(valid["worst_e2e_percent"]["joint"]),
        "ttft_request": float(ttft["request"]),
        "ttft_joint": float(ttft["joint"]),
    }


def _choice_numbers(study: Study) -> dict[str, object]:
    choice = study["choice"].set_index("fit")
    n_numbers, gain = choice["n_numbers"], choice["gain_points"]
    model, phase = "per model, joint", "per phase, request"
    return {
        "min_gain": MIN_GAIN_POINTS,
        "n_model": int(n_numbers[model]),
        "n_phase": int(n_numbers[phase]),
        "gain_model": float(gain[model]),
        "gain_phase": float(gain[phase]),
        "kept": "keeps" if (choice["preferred"] == "global").all() else "does not keep",
    }


def _form_numbers(study: Study) -> dict[str, object]:
    forms, sums = study["forms"], study["sums"]
    mape = forms.set_index("form")["valid_percent"]
    is_cached = sums["prompts"].str.startswith("prompts")
    return {
        "support": SUPPORT_OBJECTIVE,
        "n_supported": int((forms["verdict"] == "supported").sum()),
        "shipped_mape": float(mape["shipped"]),
        "sum_mape": float(mape["sum_weights_gemm"]),
        "host_mape": float(mape["sum_gpu_host"]),
        "open_forms": ", ".join(forms.loc[forms["verdict"] == "cannot tell", "what"]),
        "sums_cached": float(sums.loc[is_cached, "mixed_percent"].mean()),
        "sums_new": float(sums.loc[~is_cached, "mixed_percent"].mean()),
        "sums_worst": float(sums["worst_percent"].max()),
        "sums_total": float(sums["total_percent"].abs().max()),
        "rounding": float(sums["rounding_percent"].max()),
        "n_servers": int(sums["experiment_id"].nunique()),
    }


def _kernel_numbers(study: Study) -> dict[str, object]:
    kernels, numbers = kernel_efficiency(), study["numbers"]
    gemm = kernels.query("kernel == 'gemm' and quantity == 'share_of_flops'")
    large = gemm[gemm["tokens"] >= LARGE_GEMM_ROWS]["median"]
    weights = kernels.query("kernel == 'gemm' and quantity == 'share_of_bandwidth'").iloc[0]
    streams = _long_streams(kernels)
    prefill = kernels.query("kernel == 'prefill_attention'").set_index("tokens")["median"]
    joint = numbers[numbers["fit"] == "joint"].set_index("name")["value"]
    return {
        "gemm_mfu": GEMM_MFU,
        "attention_mfu": ATTENTION_MFU,
        "gemm_low": float(large.min()),
        "gemm_high": float(large.max()),
        # The table's shares are of the FP8 peak and of weights of one byte; BF16 has half the peak and twice the bytes.
        "bf16_share": float(2 * gemm["high"].max()),
        "weights_bf16": float(2 * weights["high"]),
        "attention_4096": float(prefill[LONGEST_PREFILL]),
        "factor_low": float(1 / streams["high"]),
        "factor_high": float(1 / streams["low"]),
        "factor": float(joint["hbm_read_factor"]),
        "block": float(joint["kv_block_ns"]),
        "n_long": int(streams["n_benchmarks"]),
    }


def _long_streams(kernels: pd.DataFrame) -> pd.Series:
    """Return the row of decode-attention kernels that are long enough to be bound by memory alone."""
    return kernels.query("kernel == 'decode_attention' and batch_size == 0").iloc[0]


def scores_of(study: Study, split: str, fits: Sequence[str]) -> pd.DataFrame:
    """Return the scores of some fits on a part of the runs, in the order given."""
    scores = study["scores"]
    return scores[scores["split"] == split].set_index("fit").loc[list(fits)].reset_index()


def values_by_fit(table: pd.DataFrame, fits: Sequence[str]) -> pd.DataFrame:
    """Return parameter values as text, a row a parameter and a column a fit; ``(prior)`` where the data say nothing.

    Parameters
    ----------
    table : DataFrame
        `fit`, `name`, `value`, `told`.
    fits : sequence of str
    """
    value = table["value"]
    text = value.map("{:,.3g}".format).where(value < WHOLE_NUMBER_FROM, value.map("{:,.0f}".format))
    shown = table.assign(text=text.where(table["told"], "(prior) " + text))
    wide = shown.pivot(index="name", columns="fit", values="text")
    return wide.loc[list(dict.fromkeys(table["name"])), list(fits)].reset_index()


def sigmas_by_fit(numbers: pd.DataFrame) -> pd.DataFrame:
    """Return how far each parameter lies from the joint fit's, in standard deviations of both, a column a fit."""
    wide = numbers.pivot(index="name", columns="fit", values="sigmas")
    names = list(dict.fromkeys(numbers["name"]))
    return wide.loc[names, [fit for fit in LEVELS if fit != "joint"]].reset_index()


def parts_by_fit(study: Study) -> pd.DataFrame:
    """Return the error of mean E2E by part for the variants with more parameters and what they are held against.

    Returns
    -------
    DataFrame
        `fit`, `n_numbers`, `train`, `valid`, `test`, and the validation part's other means.
    """
    choice, scores = study["choice"], study["scores"]
    more = scores[scores["fit"].isin([*choice["fit"], *choice["against"]])]
    table = more.pivot(index="fit", columns="split", values="e2e_percent")[["train", "valid", "test"]]
    others = more[more["split"] == "valid"].set_index("fit")
    table = table.join(others[["tpot_percent", "ttft_percent", "interval_mape_percent"]])
    table.insert(0, "n_numbers", study["fits"].set_index("fit")["n_numbers"])
    return table.reset_index()


def model_values(study: Study) -> pd.DataFrame:
    """Return the parameters fitted to each model alone beside the joint ones, as text."""
    own = study["model_numbers"]
    return values_by_fit(own, ["joint", *(fit for fit in dict.fromkeys(own["fit"]) if fit != "joint")])


def kernel_selection() -> pd.DataFrame:
    """Return some rows of the kernel benchmarks' summary, with the peak that each is a share of."""
    kernels = kernel_efficiency()
    is_shown = [size in SHOWN_SIZES[k] for k, size in zip(kernels["kernel"], kernels["tokens"], strict=True)]
    chosen = kernels[is_shown]
    chosen = chosen[chosen["batch_size"].isin(SHOWN_REQUESTS)]
    return chosen.assign(
        kernel=chosen["kernel"].str.replace("_", " "),
        quantity=chosen["quantity"].str.replace("_", " "),
        peak=chosen["peak"].map("{:,.4g} ".format) + chosen["peak_unit"],
    )


def kernels_beside_fit(study: Study) -> pd.DataFrame:
    """Return the two parameters that benchmarks speak of: `name`, `unit`, `kernels`, `prior` (median), `value` (fitted)."""
    kernels, numbers = kernel_efficiency(), study["numbers"]
    streams, blocks = _long_streams(kernels), kernels.query("quantity == 'block_excess_ns'")["median"]
    ranges = {
        "hbm_read_factor": f"{1 / streams['high']:.2f} to {1 / streams['low']:.2f} (quartiles, kernels over 300 µs)",
        "kv_block_ns": f"{max(blocks.min(), 0.0):.1f} to {blocks.max():.1f} (medians, 128 requests)",
    }
    start = {p.name: p.start for p in STEP_PARAMETERS}
    joint = numbers[(numbers["fit"] == "joint") & numbers["name"].isin(ranges)]
    return joint.assign(prior=joint["name"].map(start), kernels=joint["name"].map(ranges))
