"""`check`: predictions beside measurements, and mistakes that are put into a log are named, while a sound log gets none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_folders import SERVER, write_run
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.errors import InputError
from stepcal.ingest import ingest
from stepcal.servers.checks import CheckOptions, check_log
from stepcal.servers.coefficient_file import SHIPPED_VALIDITY, load_known
from stepcal.servers.demo import demo_truth, write_demo
from stepcal.servers.log import ServedLog, read_logs, summarise
from stepcal.servers.suspicions import label_suspicion
from stepcal.servers.validity import deployment_outside
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.layer_windows import LayerWindows

RUNNER = CliRunner()
MakeLog = Callable[..., ServedLog]


def kinds(log: ServedLog) -> set[str]:
    return {s.kind for s in check_log(log, CheckOptions(demo_truth(), SHIPPED_VALIDITY)).suspicions}


def relabelled(log: ServedLog, e2e: np.ndarray, ttft: np.ndarray) -> ServedLog:
    return replace(log, e2e_s=e2e, ttft_s=ttft, summaries=summarise(e2e, ttft, log.requests.output_tokens, log.stage))


def test_an_option_that_contradicts_a_runs_settings_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "mine", server=SERVER)
    same = {"max_num_seqs": SERVER["max_num_seqs"], "tensor_parallel_size": None}
    assert len(read_logs(tmp_path, same)) == 1
    for other in ({"max_num_seqs": 7}, {"vllm_version": "0.33.0"}, {"kv_cache_dtype": "fp8"}):
        with pytest.raises(InputError, match=rf"`{next(iter(other))}` is .*leave the option out"):
            read_logs(tmp_path, other)


def test_the_truth_is_predicted_exactly_at_every_stage_and_percentile(exact_log: MakeLog) -> None:
    check = check_log(exact_log(), CheckOptions(demo_truth(), SHIPPED_VALIDITY))
    assert set(check.table["split"]) == {"whole", "stage 0", "stage 1"}
    assert set(check.table["statistic"]) == {"mean", "p50", "p90", "p99"}
    np.testing.assert_allclose(check.table["error_percent"], 0.0, atol=1e-9)
    assert check.suspicions == ()
    assert check.outside == ()


def test_a_shipped_model_that_is_somewhat_off_is_no_mistake(exact_log: MakeLog) -> None:
    check = check_log(exact_log(), CheckOptions(load_known("default").coefficients, SHIPPED_VALIDITY))
    assert 2.0 < abs(float(check.error_percent("e2e") or 0.0)) < 15.0  # the demo's attention is faster
    assert check.suspicions == ()


def test_milliseconds_for_seconds(exact_log: MakeLog) -> None:
    log = exact_log()
    assert "units" in kinds(relabelled(log, 1e3 * log.e2e_s, 1e3 * log.ttft_s))


def test_swapped_latencies(exact_log: MakeLog) -> None:
    log = exact_log()
    assert "swapped-latencies" in kinds(relabelled(log, log.e2e_s, log.e2e_s))


def test_swapped_columns_of_tokens(exact_log: MakeLog) -> None:
    log = exact_log()
    prompt, output = np.asarray(log.requests.prompt_tokens), np.asarray(log.requests.output_tokens)
    longer = np.maximum(prompt, 8 * output).astype(np.int32)
    swapped = replace(log.requests, segment_tokens=output.astype(np.int64), output_tokens=longer)
    assert "swapped-tokens" in kinds(replace(log, requests=swapped))


def test_another_degree_or_gpu_than_said(exact_log: MakeLog) -> None:
    log = exact_log((6.0,))
    wrong = replace(log, deployment=replace(log.deployment, tensor_parallel=4))
    assert kinds(wrong) & {"tensor-parallel", "accelerator"}
    wrong = replace(log, deployment=replace(log.deployment, accelerator=load_accelerator("l40s")))
    assert kinds(wrong) & {"tensor-parallel", "accelerator"}


def test_prefix_caching_that_was_off(exact_log: MakeLog) -> None:
    log = exact_log((10.0,), enable_prefix_caching=False)
    same_text = replace(log.requests, segment_content=np.zeros(len(log.requests), dtype=np.int64))
    served = simulated_again(replace(log, requests=same_text))
    said = replace(served, deployment=served.deployment.with_server(enable_prefix_caching=True))
    assert "prefix-cache" in kinds(said)


def simulated_again(log: ServedLog) -> ServedLog:
    from stepcal.servers.replay import replayed_latencies_s

    return relabelled(log, *replayed_latencies_s(log, demo_truth()))


def test_a_limit_of_running_requests_lower_than_said(exact_log: MakeLog) -> None:
    log = exact_log((8.0,), max_num_seqs=16)
    said = replace(log, deployment=log.deployment.with_server(max_num_seqs=32))
    found = kinds(said)
    assert "max-num-seqs" in found


def test_stream_events_are_not_tokens(exact_log: MakeLog) -> None:
    log = exact_log()
    tokens = np.asarray(log.requests.output_tokens, dtype=float)
    assert "events-not-tokens" in kinds(replace(log, stream_events=2 * tokens))
    assert "events-not-tokens" not in kinds(replace(log, stream_events=tokens))


def test_a_cap_of_the_client_that_was_reached(exact_log: MakeLog) -> None:
    log = exact_log((6.0,))
    order = np.arange(len(log.requests))
    # Eight clients in a closed loop: a request is sent as soon as one of the eight is answered.
    closed = replace(log.requests, arrival_s=order * 0.25)
    steady = np.full(len(order), 2.0)
    assert "client-cap" in kinds(relabelled(replace(log, requests=closed), steady, 0.02 * steady))


def test_a_label_that_is_the_schedulers_time() -> None:
    assert label_suspicion(np.full(10, 400.0), np.full(10, 15_000.0)) is not None
    assert label_suspicion(np.full(10, 14_000.0), np.full(10, 15_000.0)) is None


def test_another_gpu_or_width_is_outside_of_what_was_calibrated(exact_log: MakeLog) -> None:
    log = exact_log((3.0,))
    other = replace(log, deployment=replace(log.deployment, accelerator=load_accelerator("a100-80gb")))
    check = check_log(other, CheckOptions(demo_truth(), SHIPPED_VALIDITY, look_for_mistakes=False))
    assert any("a100-80gb" in text for text in check.outside)


def test_check_and_calibrate_print_their_notes_once_and_look_at_the_kv_cache(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    ingest(write_demo(tmp_path / "raw", rates_per_s=(2.0, 4.0), stage_s=30.0), mine)
    (mine / "exp-config.yaml").write_text((tmp_path / "raw" / "exp-config.yaml").read_text())
    fp8 = ["--vllm-version", "0.33.0", "--kv-cache-dtype", "fp8"]
    for command in (["check", str(mine)], ["calibrate", str(mine), "--out", str(tmp_path / "c.json")]):
        result = RUNNER.invoke(app, [*command, *fp8, "--json", "-"])
        assert result.exit_code == 0, result.output
        notes = json.loads(result.stdout)["notes"]
        assert len(notes) == len(set(notes))
        for text in ("An FP8 KV cache is known from timings of kernels", "text of its own: nothing is cached"):
            assert sum(note.startswith(text) or text in note for note in notes) == 1
            assert result.stderr.count(text) == 1
    assert json.loads((tmp_path / "c.json").read_text())["validity"]["kv_precision"] == ["fp8"]
    runs = json.loads(RUNNER.invoke(app, ["check", str(mine), *fp8, "--json", "-"]).stdout)["runs"]
    assert all(run["outside_validity"] == ["a KV cache in fp8 (calibrated on bf16)"] for run in runs)
    inside = RUNNER.invoke(app, ["check", str(mine)])
    assert "the release of vLLM is not looked at" in inside.output


def test_windows_and_latent_attention_are_outside_of_what_was_calibrated() -> None:
    windows = LayerWindows("sliding", 128, 16, 16)
    full = Deployment.of("llama-2-7b", "h100-sxm", kv_blocks=1000)
    windowed = Deployment(replace(full.architecture, windows=windows), full.accelerator, 1, None)
    assert deployment_outside(full, SHIPPED_VALIDITY) == []
    assert deployment_outside(windowed, SHIPPED_VALIDITY) == ["attention of the kind windows (calibrated on full)"]


def test_the_command_says_what_is_wrong_and_exits_with_1(tmp_path: Path) -> None:
    files = write_demo(tmp_path / "raw", rates_per_s=(4.0,), stage_s=40.0)
    document = json.loads(files[0].read_text())
    for name in ("ttfts", "latencies"):
        document[name] = [1e3 * v for v in document[name]]
    document["itls"] = [[1e3 * g for g in gaps] for gaps in document["itls"]]
    files[0].write_text(json.dumps(document))
    ingest(files, tmp_path / "mine")
    (tmp_path / "mine" / "exp-config.yaml").write_text((tmp_path / "raw" / "exp-config.yaml").read_text())
    result = RUNNER.invoke(app, ["check", str(tmp_path / "mine"), "--json", str(tmp_path / "c.json")])
    assert result.exit_code == 1
    assert "another unit" in result.output
    assert json.loads((tmp_path / "c.json").read_text())["runs"][0]["suspicions"][0]["kind"] == "units"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["check", "nowhere"], "is no folder"),
        (["check", "MINE"], "Give `--architecture`"),
        (["check", "MINE", "--architecture", "llama-2-7b", "--tp", "3"], "3"),
        (["check", "MINE", "--architecture", "llama-2-7b", "--coefficients", "other"], "neither a file nor"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(arguments: list[str], problem: str, tmp_path: Path) -> None:
    files = write_demo(tmp_path / "raw", rates_per_s=(4.0,), stage_s=20.0)
    ingest(files, tmp_path / "mine")
    result = RUNNER.invoke(app, [a.replace("MINE", str(tmp_path / "mine")) for a in arguments])
    assert result.exit_code == 2
    assert problem in result.output


def test_logs_are_what_was_ingested(tmp_path: Path) -> None:
    files = write_demo(tmp_path / "raw", rates_per_s=(2.0, 4.0), stage_s=20.0)
    ingest(files, tmp_path / "mine")
    logs = read_logs(tmp_path / "mine", {"architecture": "llama-2-7b", "accelerator": "h100-sxm"}, prompt_texts=10)
    assert [len(log.requests) for log in logs] == [len(json.loads(f.read_text())["ttfts"]) for f in files]
    assert len(np.unique(logs[1].requests.segment_content)) == 10
