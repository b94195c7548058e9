"""Settings of a server under the names that people use, and what is assumed, with a note, where they are absent."""

from pathlib import Path

import pytest
import yaml
from recorded_defaults import VERSIONS, limits_of_api_servers, recorded_defaults
from run_folders import PROFILE, QWEN, SERVER, write_run

from stepcal.datasets import experiments
from stepcal.errors import InputError, NotModelledError
from stepcal.experiments.folders import read_experiment_folder, read_supported_runs
from stepcal.studies.published_runs import load_experiments


def read_one(folder: Path, **options):
    return read_experiment_folder(folder, **options)[0][0]


def without(*names: str, **more: object) -> dict:
    return {**{k: v for k, v in SERVER.items() if k not in names}, **more}


@pytest.mark.parametrize(
    "name", ["tensor_parallelism", "tensor_parallel", "tensor_parallel_size", "tensor-parallel-size", "tp"]
)
def test_names_of_the_tensor_parallel_degree(name: str, tmp_path) -> None:
    write_run(tmp_path, server=without("tensor_parallelism", **{name: 2}))
    experiment = read_one(tmp_path)
    assert experiment.deployment.tensor_parallel == 2
    assert not any("tensor" in note for note in experiment.notes)


def test_a_degree_that_is_absent_may_stand_in_the_name(tmp_path) -> None:
    write_run(tmp_path, "2026-llama-tp4-chat", server=without("tensor_parallelism"))
    experiment = read_one(tmp_path)
    assert experiment.deployment.tensor_parallel == 4
    assert "`tensor_parallelism` is absent; 4 by the run's name." in experiment.notes
    write_run(tmp_path / "other", "http2", server=without("tensor_parallelism"))
    experiment = read_one(tmp_path / "other")
    assert experiment.deployment.tensor_parallel == 1
    assert "`tensor_parallelism` is absent; 1 by vLLM's default." in experiment.notes


def test_names_that_disagree_are_refused(tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, "tensor_parallel_size": 2})
    with pytest.raises(InputError, match=r"has `tensor_parallelism: 1` and `tensor_parallel_size: 2`.*one setting"):
        read_experiment_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "name"),
    [("NVIDIA H100 80GB HBM3", "h100-sxm"), ("H100", "h100-sxm"), ("NVIDIA H100 NVL", "h100-nvl"),
     ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA L40S", "l40s"), ("b200", "b200")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["gpu", "accelerator"])
def test_names_of_the_gpu(text: str, name: str, key: str, tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, key: text})
    experiment = read_one(tmp_path, accelerator="h200-sxm")
    assert experiment.deployment.accelerator.name == name
    assert experiment.notes == ()


@pytest.mark.parametrize("text", ["A100-SXM4-40GB", "NVIDIA H100 PCIe", "L40"])
def test_boards_that_do_not_ship_are_refused(text: str, tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, "gpu": text})
    with pytest.raises(InputError, match=r"Unknown accelerator .* Known: h100-sxm"):
        read_experiment_folder(tmp_path)


def test_a_gpu_that_is_not_named_is_noted(tmp_path) -> None:
    write_run(tmp_path, "run-l40s-tp1")
    experiment = read_one(tmp_path)
    assert experiment.deployment.accelerator.name == "l40s"
    assert any("`l40s` by the run's name. Name it as `gpu`" in note for note in experiment.notes)
    write_run(tmp_path / "plain")
    experiment = read_one(tmp_path / "plain")
    assert experiment.deployment.accelerator.name == "h100-sxm"
    assert any(
        "`h100-sxm` was assumed. Name it as `gpu` in exp-config.yaml, or give --accelerator" in n
        for n in experiment.notes
    )
    assert read_one(tmp_path / "plain", accelerator="A100").notes == ()


def test_settings_of_a_section_count(tmp_path) -> None:
    limits = {"max-num-seqs": 64, "max_num_batched_tokens": 512}
    write_run(tmp_path, server=without("max_num_seqs", "max_num_batched_tokens", vllm=limits))
    server = read_one(tmp_path).server
    assert (server.max_num_seqs, server.max_num_batched_tokens) == (64, 512)


@pytest.mark.parametrize(
    ("gpu", "tokens", "seqs"), [("h100-sxm", 8192, 1024), ("a100-80gb", 2048, 256), ("l40s", 2048, 256)]
)
def test_limits_that_are_absent_are_vllms_own(gpu: str, tokens: int, seqs: int, tmp_path) -> None:
    """As ``EngineArgs.get_batch_defaults`` of vLLM 0.15.1 has them for its API server."""
    server = without("max_num_seqs", "max_num_batched_tokens", "max_model_len", gpu=gpu)
    write_run(tmp_path, server=server, files={"config.json": {**QWEN, "max_position_embeddings": 2000}})
    experiment = read_one(tmp_path)
    found = experiment.server
    assert (found.max_num_batched_tokens, found.max_num_seqs, found.max_model_len) == (tokens, seqs, 2000)
    assert any(
        f"`max_num_batched_tokens` is absent; {tokens:,}, vLLM's default on {gpu}" in n for n in experiment.notes
    )
    assert any(f"`max_num_seqs` is absent; {seqs:,}" in n for n in experiment.notes)
    assert any("`max_model_len` is absent; 2,000" in n for n in experiment.notes)


@pytest.mark.parametrize("version", VERSIONS)
def test_limits_that_are_absent_are_those_that_the_release_chose(version: str, tmp_path) -> None:
    """Recorded from each release's own code, on each GPU that ships, and where a model is short or one limit is given."""
    cases = [(row["stepcal"], {}, row) for row in limits_of_api_servers(version) if row["stepcal"] is not None]
    cases += [("h100-sxm", row["given"], row) for row in recorded_defaults(version)["short_limits"]]
    assert len(cases) == 17
    for i, (gpu, given, _) in enumerate(cases):
        limits = {"max_model_len": 2000, **given, "gpu": gpu, "vllm_version": version}
        write_run(tmp_path, f"run{i:02}", server=without("max_num_seqs", "max_num_batched_tokens", **limits))
    servers = [experiment.server for experiment, _ in read_experiment_folder(tmp_path)]
    for server, (_, _, row) in zip(servers, cases, strict=True):
        assert server.max_num_batched_tokens == row["max_num_batched_tokens"], row
        assert server.max_num_seqs == row["max_num_seqs"], row


def test_a_budget_that_is_absent_does_not_exceed_what_fits(tmp_path) -> None:
    write_run(tmp_path, server=without("max_num_batched_tokens", max_num_seqs=2, max_model_len=500, gpu="h100-sxm"))
    assert read_one(tmp_path).server.max_num_batched_tokens == 1000
    write_run(tmp_path / "b", server=without("max_num_seqs", max_num_batched_tokens=100, gpu="h100-sxm"))
    assert read_one(tmp_path / "b").server.max_num_seqs == 100


def test_estimated_kv_blocks_are_those_that_vllm_logged(tmp_path) -> None:
    """The four servers whose logged number is known, to 1%."""
    logged = experiments().set_index("experiment_id")["kv_blocks_total"]
    for known in load_experiments():
        server = without(
            "kv_blocks_total_gpu", model=known.architecture.name, tensor_parallelism=known.deployment.tensor_parallel
        )
        write_run(tmp_path, known.experiment_id, server=server)
    for found, _ in read_experiment_folder(tmp_path, accelerator="h100-sxm"):
        assert found.server.kv_blocks == pytest.approx(logged[found.experiment_id], rel=0.01)
        _, note = found.notes  # the first says that the offload pool was assumed
        assert f"{found.server.kv_blocks:,} were estimated from the GPU's memory. vLLM logs the number" in note


def test_the_share_of_memory_counts_and_is_checked(tmp_path) -> None:
    blocks = []
    for name, share in (("a", 0.9), ("b", 0.5)):
        write_run(tmp_path / name, server=without("kv_blocks_total_gpu", gpu_memory_utilization=share))
        blocks.append(read_one(tmp_path / name).server.kv_blocks)
    assert blocks[0] - blocks[1] == pytest.approx(0.4 * 81_559 / 8, abs=1), "8 MiB a block"
    write_run(tmp_path / "c", server=without("kv_blocks_total_gpu", gpu_memory_utilization=90))
    with pytest.raises(InputError, match=r"`gpu_memory_utilization` is 90; it must be above 0 and at most 1"):
        read_one(tmp_path / "c")


def test_a_model_that_leaves_no_room_is_refused(tmp_path) -> None:
    write_run(tmp_path, server=without("kv_blocks_total_gpu", model="llama-2-70b"))
    with pytest.raises(InputError, match=r"run-a/exp-config\.yaml: how many KV blocks.*leave no room.*vLLM logs"):
        read_experiment_folder(tmp_path)


def test_a_kv_cache_of_another_width_is_not_modelled(tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, "kv_cache_dtype": "nvfp4"})
    with pytest.raises(NotModelledError, match=r"`kv_cache_dtype: .*nvfp4"):
        read_experiment_folder(tmp_path)
    write_run(tmp_path / "b", server={**SERVER, "kv_cache_dtype": "auto"})
    assert read_one(tmp_path / "b").server.kv_blocks == SERVER["kv_blocks_total_gpu"]


def test_a_window_longer_than_the_servers_limit_never_slides(tmp_path) -> None:
    """As in a Mistral served with 4,096 tokens at most."""
    model = {**QWEN, "sliding_window": 4096, "max_position_embeddings": 32768}
    write_run(tmp_path, files={"config.json": model})
    assert read_one(tmp_path).architecture.hidden_size == QWEN["hidden_size"]
    write_run(tmp_path / "b", server={**SERVER, "max_model_len": 8192}, files={"config.json": model})
    with pytest.raises(NotModelledError, match="4096 tokens at a time"):
        read_one(tmp_path / "b")


def test_another_kind_of_load_is_listed_not_a_slip(tmp_path) -> None:
    other = {**PROFILE, "data": {"type": "shareGPT"}}
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", server={**SERVER, "accelerator": "l40s"}, files={"profile.yaml": other})
    cases, (refused,) = read_supported_runs(tmp_path)
    assert [e.experiment_id for e, _ in cases] == ["a"]
    assert (refused.experiment_id, refused.accelerator) == ("b", "l40s")
    assert "profile.yaml: `data.type: shareGPT` is not modelled" in refused.reason


def test_the_other_spelling_of_the_file(tmp_path) -> None:
    run = write_run(tmp_path, files={"exp-config.yaml": None})
    (run / "exp-config.yml").write_text(yaml.safe_dump(SERVER))
    assert read_one(tmp_path).server.kv_blocks == SERVER["kv_blocks_total_gpu"]


@pytest.mark.parametrize(("version", "says_outputs"), [("0.15.1", True), ("0.19.0", False), ("0.33.0", False)])
def test_what_offloading_does_and_the_simulator_does_not_is_said(version: str, says_outputs: bool, tmp_path) -> None:
    write_run(tmp_path, server=without(kv_offloading_size=2, vllm_version=version))
    notes = read_one(tmp_path).notes
    assert any("loads from the pool are not simulated" in note for note in notes)
    assert any("as released offloads prompts alone" in note for note in notes) == says_outputs
    write_run(tmp_path / "none", server=without(vllm_version=version))
    assert not any("pool" in note for note in read_one(tmp_path / "none").notes)


def test_the_offload_pool_is_read_or_assumed(tmp_path) -> None:
    write_run(tmp_path / "said", server=without(kv_offloading_size=2))
    write_run(tmp_path / "silent", server=without())
    assert read_one(tmp_path / "silent").server.offload_blocks == 0
    said = read_one(tmp_path / "said").server
    ((assumed, _),) = read_experiment_folder(tmp_path / "silent", kv_offloading_gib=4)
    assert assumed.server.offload_blocks == 2 * said.offload_blocks > 0
    assert any("4 GiB was assumed" in note for note in assumed.notes)
    write_run(tmp_path / "harness", server=without(app="inference-perf"))
    assert read_one(tmp_path / "harness").server.offload_blocks == 0, "a load generator says nothing of the server"
    write_run(tmp_path / "study", "20260217-155451-llama-2-7b-tp1-codegen", server=without())
    assert read_one(tmp_path / "study").server.offload_blocks == 4 * said.offload_blocks, (
        "as data/experiments.csv has it"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_offloading_size": "all"}, "`kv_offloading_size` is 'all'; it must be a number of GiB"),
        ({"kv_offloading_size": -1}, "must be finite and at least 0"),
        ({"kv_offloading_size": 4, "kv_offloading_backend": "lmcache"}, "KV offloading other than vLLM's own"),
    ],
)
def test_offloading_that_cannot_be_is_refused(tmp_path, settings, message) -> None:
    write_run(tmp_path, server=without(**settings))
    with pytest.raises(InputError, match=message):
        read_one(tmp_path)


@pytest.mark.parametrize(("version", "tokens"), [("0.15.1", 8_192), ("0.24.0", 8_192), ("0.33.0", 16_384)])
def test_defaults_are_those_of_the_release(version: str, tokens: int, tmp_path) -> None:
    """Newer releases have a larger token budget on GPUs of 160 GiB and more."""
    server = without("max_num_seqs", "max_num_batched_tokens", gpu="b200", vllm_version=version)
    write_run(tmp_path, server=server)
    found = read_one(tmp_path).server
    assert (found.max_num_batched_tokens, found.max_num_seqs) == (tokens, 1_024)
    assert found.vllm_version == version


def test_newer_releases_take_more_of_the_memory(tmp_path) -> None:
    blocks = []
    for version in ("0.15.1", "0.33.0"):
        write_run(tmp_path / version, server=without("kv_blocks_total_gpu", vllm_version=version))
        blocks.append(read_one(tmp_path / version).server.kv_blocks)
    assert blocks[0] < blocks[1] < 1.05 * blocks[0]


def test_a_release_that_is_not_given_or_not_recorded_is_noted(tmp_path) -> None:
    write_run(tmp_path / "absent", server=without("vllm_version"))
    assert any("`vllm_version` is absent; 0.15.1" in note for note in read_one(tmp_path / "absent").notes)
    write_run(tmp_path / "between", server=without(vllm_version="0.20.2"))
    notes = read_one(tmp_path / "between").notes
    assert any("0.20.2 was not recorded; it is simulated as 0.19.0" in note for note in notes)
