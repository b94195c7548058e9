"""The second yardstick: which rows count, how they are served, and that the recording is what is computed."""

import numpy as np
import pytest
from loaded_tools import load_tool

from stepcal.datasets.facts import shipped_table
from stepcal.kernels.silicon import active_parameters, suspicion
from stepcal.specs.hardware import load_accelerator
from stepcal.studies import registry as studies
from stepcal.studies.kernels import silicon


@pytest.fixture(scope="module")
def rows():
    return silicon.silicon_rows_that_ship()


def test_rows_are_those_of_the_frozen_rule(rows):
    assert len(rows) == 329
    assert set(rows["gpu"]) == {"h100-sxm", "h200-sxm"}
    for row in rows.to_dict("records"):
        assert suspicion(row, silicon.silicon_deployment(row).architecture) == row["suspect"]


def test_labels_that_need_more_flops_than_the_gpu_has_are_suspect(rows):
    row = rows.iloc[0].to_dict()
    architecture = silicon.silicon_deployment(row).architecture
    peak = row["tensor_parallel"] * load_accelerator(row["gpu"]).peak_flops(
        "fp8" if row["precision"] == "fp8" else "bf16"
    )
    least_ms = 2 * active_parameters(architecture) * row["prompt_tokens"] / peak * 1e3
    assert "first token" in suspicion({**row, "ttft_ms": 0.9 * least_ms}, architecture)
    fast = {**row, "ttft_ms": 1.1 * least_ms, "tpot_ms": 1e-6, "concurrency": 1_000}
    assert "more FLOPs a second" in suspicion(fast, architecture)


def test_active_parameters_are_those_of_the_name(rows):
    of = {
        m: silicon.silicon_deployment(r).architecture
        for m, r in zip(rows["model"], rows.to_dict("records"), strict=True)
    }
    assert active_parameters(of["llama-3.1-70b"]) == pytest.approx(68.5e9, rel=0.01)
    assert active_parameters(of["qwen3-235b-a22b-fp8"]) == pytest.approx(21e9, rel=0.05)


def test_clients_keep_the_concurrency_and_lengths_their_range(rows):
    row = rows.iloc[5].to_dict()
    requests, clients = silicon.closed_loop(row)
    assert clients.max_in_flight == row["concurrency"]
    assert len(requests) == 10 * row["concurrency"]
    tokens = np.asarray(requests.output_tokens)
    assert tokens.min() >= int(0.8 * row["output_tokens"])
    assert tokens.max() <= row["output_tokens"]


def test_versions_before_0_14_schedule_synchronously_and_sample_as_the_model_says(rows):
    old = silicon.silicon_deployment(rows.query("vllm_version == '0.12.0' and model == 'qwen3-32b'").iloc[0].to_dict())
    new = silicon.silicon_deployment(rows.query("model == 'llama-3.1-70b'").iloc[0].to_dict())
    assert (old.limits.async_scheduling, old.sampling.restricts_tokens) == (False, True)
    assert (new.limits.async_scheduling, new.sampling.restricts_tokens) == (True, False)


def test_recorded_rows_are_what_is_computed_today(rows):
    recorded = studies.load_study(studies.SILICON)["rows"]
    some = [0, 50, 150, 250, 328]
    again = silicon.run_silicon(rows.iloc[some])[0]["rows"]
    assert np.allclose(again["predicted_tpot_ms"], recorded["predicted_tpot_ms"].iloc[some], rtol=1e-6)


def test_both_are_judged_on_the_rows_that_both_predict():
    recorded = studies.load_study(studies.SILICON)["rows"]
    beside = silicon.beside_peer(recorded).set_index(["model", "gpu"])
    peer = shipped_table("hardware/silicon_peer.csv").set_index("row")
    own = recorded.set_index("row")
    both = own[
        (own["model"] == "llama-3.1-70b") & (own["gpu"] == "h100-sxm") & peer["tpot_ms"].reindex(own.index).notna()
    ]
    error = 100 * (peer["tpot_ms"].loc[both.index] / both["tpot_ms"] - 1)
    line = beside.loc[("llama-3.1-70b", "h100-sxm")]
    assert line["both"] == len(both) < line["rows"]
    assert line["peer_tpot"] == pytest.approx(error.abs().mean())
    assert line["tpot"] == pytest.approx(both["tpot_error_percent"].abs().mean())


def test_the_peer_is_asked_what_the_row_says(rows):
    arguments = load_tool("compare_silicon").arguments_of(
        {name: str(value) for name, value in rows.query("model == 'llama-3.1-70b'").iloc[0].items()}
    )
    assert (arguments["backend_name"], arguments["gemm_quant_mode"], arguments["mode"]) == ("vllm", "fp8", "agg")
