"""What the pages on the label and on what was rebuilt cite: label_audit, reconstruction, label_or_physics, controlled."""

from __future__ import annotations

import pandas as pd

from stepcal.studies.diagnosis import attribution
from stepcal.studies.diagnosis.kv_offloading import NONE, OUTPUTS, STOCK
from stepcal.studies.results.records import Recording
from stepcal.studies.study import Study
from stepcal.units import PERCENT, US_PER_MS

MIDDLE_BIN = "31-40"
"""Requests in the batch at which the public label and our timing are compared."""
ALONE, ENDS = 35, (10, 128)
"""Running requests of our timing: beside that bin, and the two whose difference is the price of a request."""
FORGETTING = "llama-2-7b"
"""The one model of which the GPU's cache does not keep all prompts."""
CONTENDED = 96
"""Running requests timed beside a second thread."""


def label_audit_numbers(study: Study, recording: Recording) -> dict[str, object]:
    """Return what the page on the label cites.

    Parameters
    ----------
    study : Study
        ``label_audit``.
    recording : Recording
        ``schedule_timing``: ``schedule()`` of the real vLLM on a CPU.
    """
    compared, tokens, modes = study["label_vs_interval"], study["steps_per_token"], study["modes"]
    return {
        "ratio_low": float(compared["ratio_median"].min()),
        "ratio_high": float(compared["ratio_median"].max()),
        "share_low": float(compared["wall_share_percent"].min()),
        "share_high": float(compared["wall_share_percent"].max()),
        "spearman_low": float(compared["spearman"].min()),
        "spearman_high": float(compared["spearman"].max()),
        "raw_low": float(compared["pearson_raw"].min()),
        "raw_high": float(compared["pearson_raw"].max()),
        "usable_low": float(compared["pearson_usable"].min()),
        "usable_high": float(compared["pearson_usable"].max()),
        "n_excluded_most": int((compared["n_idle"] + compared["n_stage_change"]).max()),
        "tokens_error": float(tokens["mean_abs_error_percent"].max()),
        "tokens_requests": int(tokens["n_requests"].sum()),
        "tokens_median_low": float(tokens["median"].min()),
        "tokens_median_high": float(tokens["median"].max()),
        "fast_per_low": float(modes["fast_per_request_us"].min()),
        "fast_per_high": float(modes["fast_per_request_us"].max()),
        "slow_low_ms": float(modes["slow_median_us"].min() / US_PER_MS),
        "slow_high_ms": float(modes["slow_median_us"].max() / US_PER_MS),
        **_timing_numbers(study, recording),
        **_shares_of_runs(study["by_run"]),
    }


def _timing_numbers(study: Study, recording: Recording) -> dict[str, object]:
    """Return our timing of ``schedule()`` beside the public label at the same batch."""
    timing = recording.tables["timing"]
    schedule = timing.query("function == 'schedule'")
    alone = schedule.query("waiting == 0 and busy_threads == 0").set_index("running")["p50_us"]
    contended = schedule.query("busy_threads == 1").set_index("running")["p90_us"]
    queued = schedule.query("waiting > 0").sort_values("waiting").iloc[-1]
    label = study["by_running"].query("quantity == 'label' and experiment_id != 'pooled'")
    middle = label[label["bin"] == MIDDLE_BIN]
    few, many = ENDS
    return {
        **{name: recording.provenance[name] for name in ("cpu", "python", "recorded")},
        "ours_35": float(alone[ALONE]),
        "ours_per_request": float((alone[many] - alone[few]) / (many - few)),
        "label_low": float(middle["median_us"].min()),
        "label_high": float(middle["median_us"].max()),
        "public_per_low": float(middle["per_request_us"].min()),
        "public_per_high": float(middle["per_request_us"].max()),
        "ours_128": float(alone[many]),
        "waiting": int(queued["waiting"]),
        "ours_waiting": float(queued["p50_us"]),
        "contended_p90_ms": float(contended[CONTENDED] / US_PER_MS),
    }


def pool_numbers(study: Study, recording: Recording) -> dict[str, object]:
    """Return what the section on loads from the offload pool cites.

    Parameters
    ----------
    study : Study
        ``offloading``.
    recording : Recording
        ``pool_loads``: what the real scheduler loads from a pool of 8 GiB.
    """
    hits = study["pool_hits"]
    could = hits[hits["pool_hit_tokens"] + hits["resumed_tokens"] > 0]
    rows = recording.tables["loads"]
    rows = rows.assign(loaded=PERCENT * rows["loaded_tokens"] / rows["prompt_tokens"])
    is_forgetting = rows["model"] == FORGETTING
    loads = rows[is_forgetting].set_index("offload")
    latency_s = loads["mean_e2e_s"]
    gain = PERCENT * (1 - latency_s / float(latency_s[NONE]))
    return {
        "n_none": len(hits) - len(could),
        "n_hits": len(hits),
        "pool_share": float(PERCENT * could["pool_hit_tokens"].sum() / could["prompt_tokens"].sum()),
        "saved_most": float(hits["saved_percent"].max()),
        "loads_seconds": recording.provenance["seconds"],
        **{f"loaded_{mode}": float(loads["loaded"][mode]) for mode in (STOCK, OUTPUTS)},
        "loaded_others": float(rows[~is_forgetting]["loaded"].max()),
        **{f"faster_{mode}": float(gain[mode]) for mode in (STOCK, OUTPUTS)},
    }


def _shares_of_runs(by_run: pd.DataFrame) -> dict[str, object]:
    """Return the label's share of the decode interval, in runs that keep up and in each overloaded one."""
    runs = by_run.set_index("experiment_id")
    calm, over = runs[~runs["overloaded"]]["label_share_percent"], runs[runs["overloaded"]]
    models = {"codellama": "codellama", "mixtral": "mixtral", "llama70": "llama-2-70b", "llama7": "llama-2-7b"}
    rows = {name: over.filter(like=model, axis=0).iloc[0] for name, model in models.items()}
    return {
        "not_over_share_low": float(calm.min()),
        "not_over_share_high": float(calm.max()),
        **{f"{name}_share": float(row["label_share_percent"]) for name, row in rows.items()},
    }


def reconstruction_numbers(study: Study) -> dict[str, object]:
    """Return what the page on rebuilt batches cites, from the study ``reconstruction``; `full_runs` are experiments."""
    by_quantity = study["validation"].groupby("quantity")
    fits = lines_in_batches(study)
    full = fits[fits["kv_peak_percent"] > PERCENT]
    calm = fits[fits["kv_peak_percent"] <= PERCENT]["mape_percent"]
    tested = fits["mape_test_percent"].dropna()
    return {
        "batch_error": float(by_quantity["mean_abs_error"].max()["batch_requests"]),
        "batch_percent": float(by_quantity["mean_abs_error_percent"].max()["batch_requests"]),
        "blocks_percent": float(by_quantity["mean_abs_error_percent"].max()["kv_blocks"]),
        "blocks_bias_low": float(by_quantity["bias_percent"].min()["kv_blocks"]),
        "blocks_bias_high": float(by_quantity["bias_percent"].max()["kv_blocks"]),
        "waiting_error": float(by_quantity["mean_abs_error"].max()["waiting_depth"]),
        "n_compared": int(by_quantity["n_steps"].sum()["batch_requests"]),
        "line_low": float(calm.min()),
        "line_high": float(calm.max()),
        "n_calm": len(calm),
        "full_runs": list(full["experiment_id"]),
        "full_peak": float(full["kv_peak_percent"].max()),
        "full_line": float(full["mape_percent"].max()),
        "n_tested": len(tested),
        "test_median": float(tested.median()),
    }


def lines_in_batches(study: Study) -> pd.DataFrame:
    """Return each run's means over completed requests, and how well a line in its batches gives the decode interval."""
    return study["line_fits"].merge(study["runs"], on="experiment_id")


def label_or_physics_numbers(summary: pd.DataFrame) -> dict[str, object]:
    """Return what the page on label and physics cites: MAPE in percent, mean over runs, ``model_distance``.

    Parameters
    ----------
    summary : DataFrame
        Table ``summary`` of the study ``attribution``.
    """
    index = ["level", "label", "fold", "variant"]
    overloaded = summary["overloaded"].astype(bool)
    cells, hard = summary[~overloaded].set_index(index), summary[overloaded].set_index(index)["mape_percent"]
    value, runs, rows = cells["mape_percent"], cells["n_experiments"], cells["n"]
    step, request = attribution.STEP, attribution.REQUEST
    right, wrong = attribution.CORRECTED, attribution.PUBLISHED
    near, rate, workload, model = attribution.FOLDS
    black, four, terms, physical = "blackbox", "components", "physical_terms", "physical"
    far: dict[str, object] = {}
    for distance, fold in (("rate", rate), ("workload", workload), ("model", model)):
        far |= {
            f"black_{distance}": value[request, right, fold, black],
            f"four_{distance}": value[request, right, fold, four],
            f"terms_{distance}": value[request, right, fold, terms],
            f"physical_{distance}": value[request, right, fold, physical],
        }
    return far | {
        "n_step": int(rows[step, right, near, black]),
        "runs_step": int(runs[step, right, near, black]),
        "n_request": int(rows[request, right, near, black]),
        "runs_request": int(runs[request, right, near, black]),
        "runs_rate": int(runs[request, right, rate, black]),
        "black_wrong": value[step, wrong, near, black],
        "black_right": value[step, right, near, black],
        "four_wrong": value[step, wrong, near, four],
        "four_right": value[step, right, near, four],
        "terms_wrong": value[step, wrong, near, terms],
        "physical_near_step": value[step, right, near, physical],
        "physical_wrong": value[step, wrong, near, physical],
        "black_near": value[request, right, near, black],
        "physical_near": value[request, right, near, physical],
        "constant_model": value[request, right, model, "constant"],
        "physical_model_step": value[step, right, model, physical],
        "black_model_step": value[step, right, model, black],
        "terms_model_step": value[step, right, model, terms],
        "hard_physical": hard[request, right, model, physical],
        "hard_terms": hard[request, right, model, terms],
        "hard_black": hard[request, right, model, black],
        "physical_model_worst": cells["worst_percent"][request, right, model, physical],
        "black_right_worst": cells["worst_percent"][step, right, near, black],
        "black_wrong_worst": cells["worst_percent"][step, wrong, near, black],
    }


def controlled_numbers(faults: pd.DataFrame, parameters: pd.DataFrame, n_seeds: int) -> dict[str, object]:
    """Return what the page on the controlled experiment cites; errors in percent, of simulated servers.

    Parameters
    ----------
    faults, parameters : DataFrame
        Of `stepcal.studies.diagnosis.controlled.run_controlled`.
    n_seeds : int
        Seeds that they were computed with.
    """
    by_fault = faults.set_index("fault")
    e2e, step = by_fault["e2e_error_percent"], by_fault["step_mape_percent"]
    error, coverage = by_fault["parameter_error_percent"], by_fault["coverage_percent"]
    own = parameters[parameters["fault"] == "none"]
    return {
        "seeds": n_seeds,
        "coverage": coverage["none"],
        "numbers": error["none"],
        "numbers_worst": own["error_percent"].max(),
        "n_intervals": int(own["n_seeds"].sum()),
        "e2e": e2e["none"],
        "e2e_label": e2e["wrong_label"],
        "step_attention": step["no_decode_attention"],
        "e2e_attention": e2e["no_decode_attention"],
        "e2e_attention_worst": by_fault["worst_e2e_percent"]["no_decode_attention"],
        "e2e_sums": e2e["kv_sums_only"],
        "e2e_hidden": e2e["kv_hidden"],
        "coverage_sums": coverage["kv_sums_only"],
        "e2e_sampling": e2e["sampling"],
        "numbers_sampling": error["sampling"],
        "coverage_sampling": coverage["sampling"],
        "e2e_noise": e2e["noise"],
        "numbers_noise": error["noise"],
        "coverage_noise": coverage["noise"],
        "n_judged": int(by_fault["n_judged"]["none"]),
    }
