"""Workloads: arrival processes, lengths, inference-perf files, replay of a trace, and bad input with its message."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from stepcal.simulator import (
    CompiledStepTime,
    LoadStage,
    ServerConfig,
    Workload,
    empirical_lengths,
    fixed_lengths,
    generate_arrivals,
    make_conversations,
    make_requests,
    read_workload,
    replay_requests,
    simulate,
)

STAGES = [LoadStage(5.0, 600.0), LoadStage(10.0, 600.0)]
SERVER = ServerConfig(kv_blocks=100)
STEP_TIME = CompiledStepTime(constant_us=1000.0)

PROFILE = {
    "api": {"streaming": True, "type": "completion"},
    "data": {
        "type": "shared_prefix",
        "shared_prefix": {
            "enable_multi_turn_chat": True,
            "num_unique_system_prompts": 11,
            "num_users_per_system_prompt": 4,
            "output_len": 247,
            "question_len": 466,
            "system_prompt_len": 100,
        },
    },
    "load": {"stages": [{"duration": 600, "rate": 5}, {"duration": 600, "rate": 10}], "type": "constant"},
    "report": {"request_lifecycle": {"summary": True}},
    "server": {"ignore_eos": True, "model_name": "m", "type": "vllm"},
}

CONFIG = {
    "api": {"type": "completion", "streaming": True, "headers": None},
    "data": {
        "type": "shared_prefix",
        "path": None,
        "input_distribution": None,
        "output_distribution": None,
        "shared_prefix": {
            "num_groups": 10,
            "num_prompts_per_group": 10,
            "system_prompt_len": 100,
            "question_len": 466,
            "output_len": 247,
        },
    },
    "load": {
        "type": "constant",
        "interval": 1.0,
        "stages": [{"rate": 5.0, "duration": 600}],
        "sweep": None,
        "num_workers": 224,
        "request_timeout": 300,
    },
    "metrics": None,
    "server": {"type": "vllm", "ignore_eos": True, "api_key": None},
    "circuit_breakers": None,
}


@pytest.mark.parametrize(
    ("process", "cv", "expected_cv"), [("poisson", None, 1.0), ("constant", None, 0.0), ("gamma", 3.0, 3.0)]
)
def test_arrivals_have_the_rate_and_variation_asked_for(process: str, cv: float | None, expected_cv: float) -> None:
    arrival_s, stage = generate_arrivals([LoadStage(50.0, 1000.0)], process, cv=cv, seed=1)
    gaps = np.diff(arrival_s)
    assert arrival_s.size == 50_000
    assert gaps.min() >= 0.0
    assert gaps.mean() == pytest.approx(1 / 50.0, rel=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(expected_cv, rel=0.05, abs=1e-9)
    assert (stage == 0).all()


def test_stages_follow_each_other() -> None:
    arrival_s, stage = generate_arrivals(STAGES, seed=2)
    assert np.bincount(stage).tolist() == [3000, 6000]
    assert (np.diff(arrival_s) >= 0.0).all()
    assert arrival_s[stage == 0].max() <= 600.0 <= arrival_s[stage == 1].min()
    assert arrival_s.max() <= 1200.0


def test_poisson_counts_are_poisson() -> None:
    """Counts in equal windows have a variance equal to their mean."""
    arrival_s, _ = generate_arrivals([LoadStage(20.0, 5000.0)], seed=3)
    counts = np.histogram(arrival_s, bins=5000, range=(0.0, 5000.0))[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.08)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert (generate_arrivals(STAGES, seed=4)[0] == generate_arrivals(STAGES, seed=4)[0]).all()
    assert (generate_arrivals(STAGES, seed=4)[0] != generate_arrivals(STAGES, seed=5)[0]).any()


@pytest.mark.parametrize(
    ("process", "cv", "message"),
    [
        ("weibull", None, "`process` is 'weibull'"),
        ("poisson", 2.0, "`cv`"),
        ("gamma", None, "`cv`"),
        ("gamma", -1.0, "`cv`"),
    ],
)
def test_bad_processes_are_refused(process: str, cv: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_arrivals(STAGES, process, cv=cv)


@pytest.mark.parametrize(
    ("rate", "duration", "message"), [(0.0, 1.0, "`rate`"), (-2.0, 1.0, "`rate`"), (1.0, 0.0, "`duration_s`")]
)
def test_bad_rates_are_refused(rate: float, duration: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoadStage(rate, duration)


def test_lengths() -> None:
    assert fixed_lengths(3, 7).tolist() == [7, 7, 7]
    drawn = empirical_lengths(20_000, [10, 20, 40], weights=[1, 2, 1], seed=6)
    assert np.bincount(drawn)[[10, 20, 40]] / drawn.size == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    for bad in (lambda: fixed_lengths(3, 0), lambda: empirical_lengths(3, [5, -1]), lambda: empirical_lengths(3, [])):
        with pytest.raises(ValueError, match="`tokens`"):
            bad()
    with pytest.raises(ValueError, match="`weights`"):
        empirical_lengths(3, [5, 6], weights=[0, 0])


def test_a_profile_is_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(PROFILE))
    workload = read_workload(path)
    assert workload == Workload(
        n_groups=11,
        n_prompts_per_group=4,
        system_prompt_len=100,
        question_len=466,
        output_len=247,
        stages=tuple(STAGES),
        multi_turn_chat=True,
        stage_interval_s=1.0,
    )
    requests = replace(workload, multi_turn_chat=False).requests(seed=0)
    assert len(requests) == 9000
    assert set(requests.prompt_tokens) == {566}
    assert requests.prompt[:45].tolist() == [*range(44), 0]


def test_a_config_of_a_run_is_read() -> None:
    workload = read_workload(CONFIG)
    assert (workload.n_prompts, workload.prompt_len, workload.timeout_s) == (100, 566, 300.0)
    assert workload.stages == (LoadStage(5.0, 600.0),)


def changed(document: dict, *path: str, to: object) -> dict:
    """A copy with one field changed."""
    if not path:
        return to  # type: ignore[return-value]
    return {**document, path[0]: changed(document.get(path[0], {}), *path[1:], to=to)}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data", "shared_prefix", "num_tools"), 3, "Unknown workload field `data.shared_prefix.num_tools`"),
        (("load", "burstiness"), 2, "Unknown workload field `load.burstiness`"),
        (("traces",), {"a": 1}, "Unknown workload field `traces`"),
        (("data", "type"), "sharegpt", "`data.type: sharegpt` is not modelled"),
        (("data", "path"), "x.json", "`data.path: x.json` is not modelled"),
        (("load", "sweep"), {"type": "linear"}, "`load.sweep"),
        (("server", "ignore_eos"), False, "`server.ignore_eos: False` is not modelled"),
        (("load", "stages"), [{"rate": 0, "duration": 5}], "`rate` of a load stage is 0"),
        (("load", "stages"), [{"rate": 1}], "lacks `duration`"),
        (("load", "stages"), [], "`load.stages` is empty"),
        (("data", "shared_prefix", "output_len"), 0, "`output_len`"),
        (
            ("data", "shared_prefix"),
            {"num_groups": 1},
            "lacks `num_prompts_per_group` or `num_users_per_system_prompt`",
        ),
        (("data", "shared_prefix"), None, "no `data.shared_prefix`"),
    ],
)
def test_what_a_workload_file_cannot_say_is_refused_by_name(path: tuple[str, ...], value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_workload(changed(CONFIG, *path, to=value))


def trace(n: int = 250) -> pd.DataFrame:
    workload = read_workload(CONFIG)
    index = np.arange(n)
    table = pd.DataFrame(
        {
            "experiment_id": "e",
            "index": index,
            "arrival_time_us": index * 200_000,
            "prompt_tokens": workload.prompt_len + index % workload.n_prompts % 7,
            "output_tokens": 240,
            "has_error": False,
        }
    )
    table.loc[[3, 103, 203, 120], ["prompt_tokens", "output_tokens", "has_error"]] = [0, 0, True]
    return table


def test_a_replayed_trace_takes_lengths_from_the_workload() -> None:
    requests = replay_requests(trace(), read_workload(CONFIG))
    assert set(requests.output_tokens) == {247}
    lengths = requests.prompt_tokens
    assert lengths[4] == 566 + 4
    assert lengths[120] == lengths[20] == 566 + 20 % 7  # failed, but its prompt was measured elsewhere
    assert lengths[3] == lengths[103] == 566  # every request with this prompt failed
    result = simulate(requests, ServerConfig(kv_blocks=7463), STEP_TIME)
    cached = result.rows["cached_tokens"]
    assert (cached[100:200] == (lengths[100:200] - 1) // 16 * 16).all()  # the second pass finds whole prompts
    assert (cached[1:10] == 96).all()  # the first pass finds full blocks of the system prompt


def test_a_trace_without_a_workload_has_its_own_lengths() -> None:
    table = trace().query("not has_error")
    requests = replay_requests(table)
    assert (requests.prompt_tokens == table["prompt_tokens"]).all()
    assert (requests.output_tokens == 240).all()
    assert requests.index.tolist() == table["index"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="prompt_tokens"), "lacks `prompt_tokens`"),
        (lambda t: t.iloc[::-1], "not sorted: request 248"),
        (lambda t: t.assign(index=t["index"] // 2), "Request index 0 occurs 2 times"),
        (lambda t: t.assign(prompt_tokens=0), "`prompt_tokens` of request 0 is 0, though it did not fail"),
        (lambda t: t.assign(experiment_id=t["index"].astype(str)), "several experiments"),
    ],
)
def test_bad_traces_are_refused(change: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay_requests(change(trace()), read_workload(CONFIG))


def test_a_failed_request_without_a_workload_is_refused() -> None:
    with pytest.raises(ValueError, match="Request 3 failed"):
        replay_requests(trace())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_tokens": 0}, "`output_tokens` of request 0 is 0"),
        ({"prompts": [[(0, -4)]]}, "`segment_tokens` of prompt segment 0 is -4"),
        ({"prompts": [[]]}, "Prompt 0 has no tokens"),
        ({"arrival_s": [1.0, 0.5]}, "not sorted: request 1"),
        ({"arrival_s": [0.0, np.nan]}, "`arrival_s` of request 1 is nan"),
        ({"index": [4, 4]}, "Request index 4 occurs 2 times"),
        ({"prompt": [0, 9]}, "`prompt` names prompt 9"),
        ({"stage": [0, -1]}, "`stage`"),
        ({"follows": [1, -1]}, "`follows` must name an earlier request"),
        ({"abort_s": [1.0]}, "`abort_s` has shape"),
    ],
)
def test_bad_request_lists_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_requests(**{"arrival_s": [0.0, 1.0], "prompts": [[(0, 5)]], "output_tokens": 3, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n_turns": 0}, "`n_turns`"), ({"question_len": -1}, "`question_len`"), ({"think_s": -1.0}, "`think_s`")],
)
def test_bad_conversations_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_conversations(
            [0.0], **{"n_turns": 2, "system_prompt_len": 4, "question_len": 4, "output_len": 4, **arguments}
        )


@pytest.mark.parametrize(
    ("prompt_tokens", "output_tokens", "message"),
    [
        (4000, 100, "Request 0 has 4000 prompt and 100 output tokens.*`max_model_len` is 4096"),
        (1500, 86, "Request 0 needs 100 KV blocks.*can never fit: the server has 99.*at least 101"),
    ],
)
def test_requests_that_can_never_fit_are_refused(prompt_tokens: int, output_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(make_requests([0.0], [[(0, prompt_tokens)]], output_tokens), SERVER, STEP_TIME)


def test_a_request_that_just_fits_is_served() -> None:
    result = simulate(make_requests([0.0], [[(0, 1500)]], 85), SERVER, STEP_TIME)
    assert result.is_finished.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_blocks": 1}, "`kv_blocks` is 1"),
        ({"kv_blocks": 0}, "`kv_blocks` is 0"),
        ({"max_num_seqs": 0}, "`max_num_seqs` is 0"),
        ({"block_size": -16}, "`block_size` is -16"),
        (
            {"max_num_seqs": 256, "max_num_batched_tokens": 128},
            r"`max_num_batched_tokens` \(128\) is below `max_num_seqs`",
        ),
    ],
)
def test_bad_servers_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerConfig(**{"kv_blocks": 100, **arguments})


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("pipeline_parallel_size", 2, "pipeline parallelism"),
        ("data_parallel_size", 4, "data parallelism"),
        ("enable_expert_parallel", True, "expert parallelism"),
        ("speculative_config", {"method": "ngram"}, "speculative decoding"),
        ("enable_lora", True, "LoRA"),
        ("sliding_window", 4096, "sliding-window"),
        ("kv_transfer_config", {"kv_connector": "x"}, "KV connectors"),
        ("vllm_version", "0.11.0", "older than the oldest release"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(name: str, value: object, what: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}: .*{what}"):
        ServerConfig.from_vllm_arguments({"kv_blocks": 100, name: value})


def test_vllm_arguments_are_read() -> None:
    server = ServerConfig.from_vllm_arguments(
        {"num_gpu_blocks_override": 100, "max_num_seqs": 8, "tensor_parallel_size": 2, "enable_lora": False}
    )
    assert server == ServerConfig(kv_blocks=100, max_num_seqs=8)
    with pytest.raises(ValueError, match="Unknown server argument `max_sequences`"):
        ServerConfig.from_vllm_arguments({"kv_blocks": 100, "max_sequences": 8})


def test_requests_are_rate_times_duration_cut_off() -> None:
    assert LoadStage(183.38, 60.0).n_requests == 11_002
    assert LoadStage(0.5, 1.0).n_requests == 0


def test_more_requests_than_memory_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="1e\\+24 requests; at most 20,000,000"):
        LoadStage(1e15, 1e9)
    with pytest.raises(ValueError, match="30,000,000 requests together; at most 20,000,000"):
        read_workload(changed(CONFIG, "load", "stages", to=[{"rate": 1e5, "duration": 150}] * 2))


@pytest.mark.parametrize("section", [(), ("api",), ("data",), ("load",), ("data", "shared_prefix"), ("server",)])
@pytest.mark.parametrize("value", [None, False, [], {}])
def test_an_unknown_field_that_asks_for_nothing_is_accepted(section: tuple[str, ...], value: object) -> None:
    assert read_workload(changed(CONFIG, *section, "field_of_another_release", to=value)) == read_workload(CONFIG)


def test_a_null_field_of_a_stage_is_accepted() -> None:
    stages = [{"rate": 5, "duration": 600, "num_requests": None, "concurrency_level": None, "more": None}]
    assert read_workload(changed(CONFIG, "load", "stages", to=stages)).stages == (LoadStage(5.0, 600.0),)


@pytest.mark.parametrize(
    ("load", "cap"),
    [
        ({"num_workers": 2, "worker_max_concurrency": 100}, 200),
        ({"num_workers": 3}, 300),  # worker_max_concurrency has a default
        ({"worker_max_concurrency": 100}, None),  # num_workers is the number of the client's CPUs, which nobody knows
        ({"num_workers": None}, None),
    ],
)
def test_the_cap_of_the_client_is_workers_times_concurrency(load: dict, cap: int | None) -> None:
    stages = [{"rate": 1, "duration": 5}]
    document = {**CONFIG, "load": {"type": "constant", "stages": stages, **load}}
    assert read_workload(document).max_in_flight == cap


def test_the_pause_between_stages_is_a_second_unless_the_file_says() -> None:
    assert read_workload(changed(CONFIG, "load", "interval", to=None)).stage_interval_s == 1.0
    assert read_workload(changed(CONFIG, "load", "interval", to=15)).stage_interval_s == 15.0


def test_a_closed_loop_is_a_stage_of_fixed_concurrency() -> None:
    stages = [{"num_requests": 50, "concurrency_level": 8, "rate": None, "duration": None}]
    document = changed(changed(CONFIG, "load", "stages", to=stages), "load", "type", to="concurrent")
    workload = read_workload(document)
    assert (workload.max_in_flight, [s.n_requests for s in workload.stages]) == (8, [50])
    for bad, message in (
        ([*stages, {**stages[0], "concurrency_level": 4}], "different `concurrency_level` \\(4, 8\\)"),
        ([{"rate": 1, "duration": 5}], "without `concurrency_level`"),
        ([{"concurrency_level": 8}], "lacks `num_requests`"),
    ):
        with pytest.raises(ValueError, match=message):
            read_workload(changed(document, "load", "stages", to=bad))
    with pytest.raises(ValueError, match=r"with `concurrency_level`, and `load\.type` is 'constant'"):
        read_workload(changed(document, "load", "type", to="constant"))


def test_the_questions_of_a_chat_carry_the_conversation_so_far() -> None:
    workload = Workload(
        n_groups=2, n_prompts_per_group=2, system_prompt_len=16, question_len=32, output_len=48,
        stages=(LoadStage(1.0, 12.0),), multi_turn_chat=True,
    )  # fmt: skip
    requests = workload.requests("constant")
    assert requests.prompt_tokens.tolist() == [48] * 4 + [128] * 4 + [208] * 4
    # The third turn of user 1 repeats its second, answer included: 208 - 32 tokens are cached, all full blocks.
    server = ServerConfig(kv_blocks=1000)
    cached = simulate(requests, server, STEP_TIME).request_table()["cached_tokens"]
    assert cached[5] == (48 + 48 - 1) // 16 * 16
    assert cached[9] == (128 + 48 - 1) // 16 * 16


@pytest.mark.parametrize("release", ["0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.6.1", "main"])
def test_what_every_release_writes_is_read(release: str) -> None:
    workload = read_workload(Path(__file__).parent / "as_run" / f"config-{release}.yaml")
    assert (workload.n_groups, workload.n_prompts_per_group, workload.prompt_len, workload.output_len) == (3, 4, 96, 24)
    assert [(s.rate, s.duration_s) for s in workload.stages] == [(2.0, 20.0), (4.0, 10.0)]
    assert (workload.max_in_flight, workload.stage_interval_s, workload.multi_turn_chat) == (1024, 5.0, False)
