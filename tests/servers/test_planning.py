"""`predict`, `compare` and `plan`: bisection finds what brute force finds, and more load or slower steps never help."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.errors import InputError
from stepcal.servers.capacity import Server, capacity, largest_rate, last_true, rates_per_s, scaled
from stepcal.servers.coefficient_file import load_known
from stepcal.servers.demo import DEMO_SERVER
from stepcal.servers.load import PlannedLoad
from stepcal.servers.plan import Question, launch_command, plan
from stepcal.servers.predict import compare_servers, predict_step, step_batch
from stepcal.servers.targets import Goal, Target, goal_of
from stepcal.simulator.steptime import add_components
from stepcal.simulator.versions import NEWEST
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import load_coefficients

RUNNER = CliRunner()
LOAD = PlannedLoad.of_lengths(400, 60, n_requests=300)
OPTIONS = {k: v for k, v in DEMO_SERVER.items() if k not in ("accelerator", "tensor_parallel_size", "kv_blocks")}


@pytest.fixture
def server(deployment: Deployment) -> Server:
    return Server.of(load_coefficients("default"), deployment)


def random_goals(n: int) -> list[Goal]:
    rng = np.random.default_rng(12)
    goals = []
    for _ in range(n):
        metric = rng.choice(["ttft", "tpot", "e2e"])
        statistic = rng.choice(["mean", "p50", "p90", "p99"])
        lowest = {"ttft": 22.0, "tpot": 6.0, "e2e": 400.0}[metric]
        limit = lowest * float(np.exp(rng.uniform(0.0, 2.5)))
        goodput = float(rng.uniform(0.5, 1.0)) if rng.random() < 0.3 else None
        goals.append(Goal((Target(str(metric), str(statistic), limit),), goodput))
    return goals


def test_bisection_finds_what_brute_force_finds_on_twenty_random_targets(server: Server) -> None:
    rates = rates_per_s()
    asked = [server.latencies_ms(LOAD, float(rate)) for rate in rates]
    answers = []
    for goal in random_goals(20):
        kept = [goal.is_met(latencies) for latencies in asked]
        n_kept = kept.index(False) if False in kept else len(kept)  # all rates up to there keep the targets
        expected = 0.0 if n_kept == 0 else float(rates[n_kept - 1])
        assert largest_rate(server, LOAD, goal) == expected, goal
        answers.append(expected)
    assert len(set(answers)) > 10  # the targets are not all the same question


@given(n=st.integers(0, 50), k=st.integers(-1, 50))
def test_the_last_true_is_found(n: int, k: int) -> None:
    assert last_true(lambda i: i <= k, n) == min(k, n - 1)


def test_a_rate_that_fails_between_two_that_hold_bounds_the_answer() -> None:
    assert last_true(lambda i: i <= 40 and i != 38, 100) == 37


def test_slower_steps_serve_less(server: Server) -> None:
    goal = goal_of(["tpot.p90<=20ms", "ttft.p90<=200ms"])
    found = capacity(server, LOAD, goal, log_sd=0.1)
    assert found.low_per_s < found.rate_per_s < found.high_per_s
    batch = step_batch(100, 500, 10)
    twice = scaled(server.step_time, 2.0)
    assert add_components(twice(batch)) == pytest.approx(2 * add_components(server.step_time(batch)))
    assert capacity(server, LOAD, goal, log_sd=0.0).low_per_s == found.rate_per_s


def test_a_target_that_nothing_keeps_is_no_rate(server: Server) -> None:
    assert largest_rate(server, LOAD, goal_of(["e2e<=1ms"])) == 0.0


def test_a_goodput_of_one_is_stricter_than_a_mean(server: Server) -> None:
    strict = largest_rate(server, LOAD, goal_of(["tpot<=12ms"], 1.0))
    assert 0 < strict < largest_rate(server, LOAD, goal_of(["tpot.mean<=12ms"]))


@pytest.mark.parametrize("text", ["ttft", "ttft<=5", "itl<=5ms", "ttft.p200<=5ms", "ttft<=0ms", "ttft<=-1ms"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no target"):
        Target.parse(text)


def test_components_add_up_and_lie_above_their_floor(deployment: Deployment) -> None:
    coefficients = load_coefficients("default")
    for prefill, context, batch in ((0, 500, 1), (512, 0, 0), (100, 2_000, 64)):
        step = predict_step(coefficients, deployment, step_batch(prefill, context, batch))
        assert sum(step.components_us.values()) == pytest.approx(step.total_us)
        assert 0 < step.floor_us < step.total_us
    with pytest.raises(InputError, match="The step is empty"):
        step_batch(0, 100, 0)


def test_a_server_compared_with_itself_is_the_same(server: Server) -> None:
    found = compare_servers(server, server, LOAD, 3.0)
    assert all(v == 1.0 for values in found["b_over_a"].values() for v in values.values())
    assert found["share_faster"] == 0.0
    slower = compare_servers(server, server.slower(1.5), LOAD, 3.0)
    assert slower["b_over_a"]["tpot"]["mean"] > 1.5


def test_a_plan_ranks_what_serves_by_price(tmp_path: Path) -> None:
    question = Question(
        OPTIONS, LOAD, goal_of(["tpot.mean<=25ms", "ttft.p90<=400ms"]), 30.0, {"h100-sxm": 3.0, "a100-80gb": 1.5}
    )
    choices, left_out = plan(question, load_known("default"), gpus=["h100-sxm", "a100-80gb", "l40s"], degrees=[1, 2, 3])
    assert len(left_out) == 3  # three ranks do not divide the heads
    assert all("3" in text for text in left_out)
    priced = [c for c in choices if c.price_per_h is not None]
    assert [c.price_per_h for c in priced] == sorted(c.price_per_h for c in priced)
    for c in choices:
        assert c.replicas == math.ceil(30.0 / c.capacity.rate_per_s)
        assert (c.replicas_low or 0) <= c.replicas <= (c.replicas_high or math.inf)
        assert bool(c.is_extrapolated) == (c.accelerator != "h100-sxm")
        assert f"--tensor-parallel-size {c.tensor_parallel}" in c.flags
    front = [c for c in choices if c.is_efficient]
    for c in front:
        assert not any(
            o.price_per_h < c.price_per_h and o.capacity.rate_per_s * o.replicas > c.capacity.rate_per_s * c.replicas
            for o in priced
        )
    again, _ = plan(question, load_known("default"), gpus=["h100-sxm", "a100-80gb", "l40s"], degrees=[1, 2, 3], jobs=2)
    assert again == choices


def test_six_gpu_types_are_planned_within_half_a_minute() -> None:
    load = PlannedLoad.of_lengths(547, 248)
    question = Question(OPTIONS, load, goal_of(["tpot.mean<=30ms", "ttft.p90<=500ms"]), 20.0, {})
    began = time.process_time()
    choices, _ = plan(question, load_known("default"))
    assert len({c.accelerator for c in choices}) >= 6
    assert time.process_time() - began < 30.0


def test_the_launch_command_says_what_was_simulated(deployment: Deployment) -> None:
    text = launch_command(deployment.with_server(enable_prefix_caching=False))
    assert "--max-num-seqs 128 --max-num-batched-tokens 2048 --max-model-len 4096" in text
    assert "--no-enable-prefix-caching" in text


COMMON = ["--architecture", "llama-2-7b", "--input-len", "300", "--output-len", "50", "--requests", "200"]


def test_the_commands_write_json_and_a_picture(tmp_path: Path) -> None:
    prices = tmp_path / "prices.csv"
    prices.write_text("accelerator,price_per_h\nh100-sxm,3\n")
    picture = tmp_path / "p.png"
    arguments = [
        "plan",
        *COMMON,
        "--target",
        "tpot<=20ms",
        "--gpu",
        "h100-sxm",
        "--tp",
        "1",
        "--tp",
        "2",
        "--rate",
        "9",
    ]
    result = RUNNER.invoke(
        app, [*arguments, "--prices", str(prices), "--plot", str(picture), "--json", str(tmp_path / "p.json")]
    )
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "p.json").read_text())
    assert {c["tensor_parallel"] for c in found["choices"]} == {1, 2}
    assert "vllm serve" in result.output
    result = RUNNER.invoke(
        app, ["predict", *COMMON, "--accelerator", "h100-sxm", "--rate", "3", "--json", str(tmp_path / "q.json")]
    )
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "q.json").read_text())
    assert values["low_ms"]["e2e"]["mean"] < values["latencies_ms"]["e2e"]["mean"] < values["high_ms"]["e2e"]["mean"]
    result = RUNNER.invoke(app, ["compare", "default", "global9", *COMMON, "--accelerator", "h100-sxm", "--rate", "2"])
    assert result.exit_code == 0, result.output


def asked(*arguments: str) -> dict[str, Any]:
    result = RUNNER.invoke(app, [*arguments, "--json", "-"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_release_is_predicted_and_the_newest_where_none_is_named() -> None:
    """Newer releases take more of the memory for KV, sample otherwise, and a release between recorded ones says so."""
    step = ("predict", *COMMON, "--accelerator", "h100-sxm", "--batch", "8")
    newest, old = asked(*step), asked(*step, "--vllm-version", "0.15.1")
    assert newest["total_us"] < old["total_us"]
    assert any(NEWEST in note and "assumed" in note for note in newest["notes"])
    assert not any("--vllm-version" in note for note in old["notes"])
    named = asked(*step, "--vllm-version", NEWEST)
    assert named["total_us"] == newest["total_us"]
    assert any("0.16.0 was not recorded" in note for note in asked(*step, "--vllm-version", "0.16.0")["notes"])


def test_a_load_like_a_folders_is_served_by_the_folders_server(tmp_path: Path) -> None:
    raw, mine = tmp_path / "raw", tmp_path / "mine"
    for arguments in (["demo", "--out", str(raw)], ["ingest", str(raw), "--out", str(mine)]):
        assert RUNNER.invoke(app, arguments).exit_code == 0
    (mine / "exp-config.yaml").write_text("model: llama-2-7b\nvllm_version: 0.19.0\nkv_blocks: 7000\n")
    like = ("predict", "--like", str(mine), "--accelerator", "h100-sxm", "--rate", "2")
    notes = asked(*like)["notes"]
    assert any("0.19.0" in note for note in notes)
    assert not any("KV blocks are not given" in note or "--vllm-version" in note for note in notes)
    assert any("0.33.0" in note for note in asked(*like, "--vllm-version", "0.33.0")["notes"])


def test_plans_and_comparisons_say_what_they_assume() -> None:
    choice = ("--gpu", "h100-sxm", "--gpu", "l40s", "--tp", "1", "--vllm-version", "0.15.1")
    found = asked("plan", *COMMON, "--target", "tpot<=50ms", *choice)
    assert found["notes"] == []
    assert all(any("KV blocks are not given" in note for note in c["notes"]) for c in found["choices"])
    notes = asked("compare", "h100-sxm", "l40s", *COMMON, "--rate", "2")["notes"]
    assert sum(NEWEST in note and "--vllm-version" in note for note in notes) == 1
    assert [note.partition(":")[0] for note in notes if "KV blocks are not given" in note] == ["h100-sxm", "l40s"]
    assert sum("max_model_len" in note for note in notes) == 1, "what is assumed of both is said once"


BURST = ["--architecture", "llama-2-7b", "--gpu", "h100-sxm", "--tp", "1", "--input-len", "50", "--output-len", "20"]


def test_a_rate_that_no_load_could_show_is_a_bound_and_says_how_to_ask_better() -> None:
    """A hundred requests are a burst at any rate; twenty thousand show what lasts."""
    arguments = ("plan", *BURST, "--target", "e2e.p90<=3000ms", "--rate", "20000")
    short, middle, long = (asked(*arguments, "--requests", n)["choices"][0] for n in ("100", "2000", "20000"))
    assert short["is_bound"] and short["replicas_bound"] == "unknown"
    assert short["capacity"]["bound"] == "unknown"
    assert short["capacity"]["rate_per_s"] == rates_per_s()[-1]
    assert middle["is_bound"] and middle["replicas_bound"] == "at least"
    assert middle["capacity"]["bound"] == "at most"
    assert not long["is_bound"]
    assert long["replicas_bound"] is None
    assert long["capacity"]["rate_per_s"] < 0.3 * middle["capacity"]["rate_per_s"]
    assert 2_000 < middle["capacity"]["more_requests"] <= 20_000
    text = RUNNER.invoke(app, [*arguments, "--requests", "2000"]).output
    assert f"ask with `--requests {middle['capacity']['more_requests']}`" in text
    assert "<= 3524.80" in text
    assert "calibrated, bound" in text
    assert ">= 6 [" in text


def test_the_end_of_the_search_is_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepcal.servers.capacity.GRID_SIZE", 200)  # up to 1.03 a second
    arguments = ("plan", *COMMON, "--gpu", "h100-sxm", "--tp", "1", "--target", "e2e<=60s", "--rate", "3")
    found = asked(*arguments)["choices"][0]
    assert found["capacity"]["bound"] == "at least"
    assert found["replicas_bound"] == "at most"
    assert found["capacity"]["more_requests"] is None
    text = RUNNER.invoke(app, list(arguments)).output
    assert ">= 1.03 [>= 1.03, >= 1.03]" in text
    assert "<= 3 [<= 3, <= 3]" in text
    assert "the search ends at 1.03" in text


ONE_TOKEN = ["--architecture", "llama-2-7b", "--accelerator", "h100-sxm", "--input-len", "300", "--output-len", "1"]


def test_one_output_token_has_no_time_per_output_token() -> None:
    nothing = dict.fromkeys(("mean", "p50", "p90", "p99"))
    load = ("--rate", "3", "--requests", "100")
    found = asked("predict", *ONE_TOKEN, *load)
    assert found["latencies_ms"]["tpot"] == found["low_ms"]["tpot"] == nothing
    assert found["latencies_ms"]["e2e"]["mean"] > 0
    compared = asked("compare", "h100-sxm", "l40s", *ONE_TOKEN, *load)
    assert compared["a"]["tpot"] == compared["b_over_a"]["tpot"] == nothing
    served = asked("plan", *ONE_TOKEN[:2], *ONE_TOKEN[4:], "--gpu", "h100-sxm", "--tp", "1", "--target", "ttft<=1s")
    assert served["choices"][0]["capacity"]["rate_per_s"] > 0


def test_targets_on_tpot_are_over_the_requests_that_have_one(server: Server) -> None:
    lengths = np.where(np.arange(len(LOAD)) % 2, 60, 1)
    mixed = replace(LOAD, output_tokens=lengths)
    found = server.latencies_ms(mixed, 3.0)
    assert np.isnan(found["tpot"]).sum() == (lengths[mixed.judged] == 1).sum()
    longest = float(np.nanmax(found["tpot"]))
    for goodput in (None, 1.0):
        assert goal_of([f"tpot.p99<={longest * 1.01:.4f}ms"], goodput).is_met(found)
    assert not goal_of([f"tpot.mean<={np.nanmean(found['tpot']) / 1.01:.4f}ms"]).is_met(found)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["plan", *COMMON, "--target", "fast"], "is no target"),
        (["plan", *ONE_TOKEN[:2], *ONE_TOKEN[4:], "--target", "tpot<=20ms"], "Give `--output-len` 2 or more"),
        (["plan", *COMMON[:2], "--target", "tpot<=20ms"], "give `--input-len` and"),
        (["plan", *COMMON, "--target", "tpot<=20ms", "--tp", "3"], "Nothing to plan with"),
        (["plan", *COMMON, "--target", "tpot<=20ms", "--prices", "none.csv"], "is no price table"),
        (["plan", *COMMON, "--target", "tpot<=20ms", "--goodput", "2"], "is a share"),
        (["predict", *COMMON, "--accelerator", "h100-sxm", "--rate", "-1"], "must be above 0"),
        (["predict", *COMMON, "--accelerator", "h100-sxm", "--rate", "1", "--prefix-len", "300"], "--prefix-len"),
        (["predict", *COMMON, "--accelerator", "h100-sxm", "--batch", "1", "--vllm-version", "new"], "vllm_version"),
        (["compare", "h100-sxm:x", "h100-sxm", *COMMON, "--rate", "1"], "no tensor-parallel degree"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(arguments: list[str], problem: str) -> None:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 2
    assert problem in result.output


def test_a_shared_prefix_is_cached(server: Server) -> None:
    alone = PlannedLoad.of_lengths(1_600, 20, n_requests=200)
    shared = PlannedLoad.of_lengths(1_600, 20, n_requests=200, shared_prefix_tokens=1_500)
    assert server.latencies_ms(shared, 2.0)["ttft"].mean() < 0.8 * server.latencies_ms(alone, 2.0)["ttft"].mean()
