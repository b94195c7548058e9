"""vLLM's flags by their names and spellings: what acts, what is refused, what is noted; nothing is ignored."""

import re
from pathlib import Path

import pytest
from run_folders import QWEN, SERVER, write_run

from stepcal.errors import InputError, NotModelledError
from stepcal.experiments.folders import read_experiment_folder
from stepcal.experiments.vllm_flags import ACTING, NOTED, REFUSED, SILENT, flags_of, human_number

PATH = Path("run-a/exp-config.yaml")


def read_one(folder: Path):
    return read_experiment_folder(folder)[0][0]


def without(*names: str, **more: object) -> dict:
    return {**{k: v for k, v in SERVER.items() if k not in names}, **more}


@pytest.mark.parametrize(
    "setting",
    [
        {"no_enable_prefix_caching": True},
        {"no-enable-prefix-caching": True},
        {"--no-enable-prefix-caching": True},
        {"enable_prefix_caching": False},
        {"disable_prefix_caching": True},
        {"args": ["--no-enable-prefix-caching"]},
        {"args": "--no-enable-prefix-caching --port 8000"},
        {"vllm": {"no_enable_prefix_caching": True}},
        {"server": {"extra_args": ["--no-enable-prefix-caching", "--port=8000"]}},
        {"command": "vllm serve meta-llama/Llama-2-7b-hf --no-enable-prefix-caching -tp 1"},
    ],
)
def test_a_flag_acts_under_all_its_spellings(setting: dict, tmp_path) -> None:
    if "server" in setting:
        setting = setting["server"]
    write_run(tmp_path, server={**SERVER, **setting})
    assert not read_one(tmp_path).server.enable_prefix_caching


@pytest.mark.parametrize(
    ("line", "flag", "value"),
    [
        (["--max-num-seqs", "64"], "max_num_seqs", 64),
        (["--max-num-seqs=64"], "max_num_seqs", 64),
        (["--max-num-seqs 64"], "max_num_seqs", 64),
        (["--max-model-len", "16k"], "max_model_len", 16_000),
        (["--max-model-len", "16K"], "max_model_len", 16_384),
        (["-tp", "2"], "tensor_parallel_size", 2),
        (["-tp=2"], "tensor_parallel_size", 2),
        (["--gpu-memory-utilization", "0.8"], "gpu_memory_utilization", 0.8),
        (["--no-async-scheduling"], "async_scheduling", False),
        (["--async-scheduling"], "async_scheduling", True),
        (["--kv-cache-memory-bytes", "10G"], "kv_cache_memory_bytes", 10 * 2**30),
        (["--dtype", "half"], "dtype", "half"),
        (["--port", "-1", "--block-size", "32"], "block_size", 32),
    ],
)
def test_a_command_line_is_read_as_vllm_reads_it(line: list[str], flag: str, value: object) -> None:
    values, _ = flags_of({"args": line}, PATH)
    assert values[flag] == value
    assert type(values[flag]) is type(value)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("max_num_seq", "max_num_seqs"), ("max_num_batched_token", "max_num_batched_tokens"),
        ("quantisation", "quantization"),
        ("enforce_eagr", "enforce_eager"), ("kv_cache_memory_byte", "kv_cache_memory_bytes"), ("blocksize", "block_size"),
        ("enable_prefix_cachng", "enable_prefix_caching"), ("tensor_parallel_sizes", "tensor_parallel_size"),
    ],
)  # fmt: skip
def test_a_misspelt_flag_is_refused_with_what_was_meant(misspelt: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"`{misspelt}` is no setting of vLLM's server. Did you mean `{meant}`"):
        flags_of({misspelt: 1}, PATH)


def test_what_nobody_knows_is_noted_in_a_file_and_refused_on_a_command_line() -> None:
    _, notes = flags_of({"favourite_colour": "blue", "weather": {"sun": 1}}, PATH)
    assert notes == ["`favourite_colour`, `weather` of exp-config.yaml: no setting that stepcal knows; not used."]
    with pytest.raises(InputError, match="`--favourite-colour` is no flag of vLLM's server"):
        flags_of({"args": ["--favourite-colour", "blue"]}, PATH)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_modelled_is_refused_and_accepted_when_off(name: str) -> None:
    neutral, what = REFUSED[name]
    with pytest.raises(NotModelledError, match=f"`{name}: .*does not model: {re.escape(what)}"):
        flags_of({name: "something else"}, PATH)
    for value in (*neutral, None):
        assert flags_of({name: value}, PATH)[1] == []


@pytest.mark.parametrize("name", sorted(NOTED))
def test_what_may_change_the_times_is_noted(name: str) -> None:
    neutral, what = NOTED[name]
    assert flags_of({name: "something else"}, PATH)[1] == [f"`{name}: 'something else'` does not act: {what}."]
    for value in (*neutral, None):
        assert flags_of({name: value}, PATH)[1] == []


def test_no_flag_is_of_two_kinds() -> None:
    kinds = (ACTING, frozenset(REFUSED), frozenset(NOTED), SILENT)
    assert sum(map(len, kinds)) == len(frozenset().union(*kinds))


def test_two_values_for_one_flag_are_refused() -> None:
    with pytest.raises(InputError, match="`max_num_seqs: 128` and `max_num_seqs: 64`, which are one setting"):
        flags_of({"max_num_seqs": 128, "args": ["--max-num-seqs", "64"]}, PATH)
    assert flags_of({"max_num_seqs": 64, "args": ["--max-num-seqs", "64"]}, PATH)[0]["max_num_seqs"] == 64


@pytest.mark.parametrize(
    ("text", "number"), [("4k", 4000), ("4K", 4096), ("1.5M", 1572864), ("x", "x"), (7, 7), ("12", 12)]
)
def test_numbers_as_people_write_them(text: object, number: object) -> None:
    assert human_number(text) == number


@pytest.mark.parametrize("dtype", ["auto", "half", "bfloat16", "float16"])
def test_sixteen_bits_are_modelled(dtype: str, tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, "dtype": dtype})
    assert read_one(tmp_path).server.kv_blocks == SERVER["kv_blocks_total_gpu"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float32"}, "`dtype: float32` asks for what is not modelled"),
        ({"quantization": "awq"}, "`quantization: awq` needs a checkpoint that says so"),
        ({"block_size": 24}, "`block_size` is 24; vLLM takes 1, 8, 16, 32, 64, 128, 256"),
        ({"max_model_len": 8192}, r"`max_model_len` is 8,192, above the 4,096 positions of `llama-2-7b`"),
        ({"max_num_seqs": 4096, "max_num_batched_tokens": 2048}, "is below `max_num_seqs`"),
        ({"tensor_parallelism": 3}, "does not divide the 32 attention heads"),
        ({"no_enable_prefix_caching": "yes"}, "`no_enable_prefix_caching` is 'yes'; it must be true or false"),
        ({"max_num_seqs": "many"}, "`max_num_seqs` is 'many'; it must be a whole number"),
        ({"args": "--port 'unclosed"}, "cannot be split into words"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str, tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, **settings})
    with pytest.raises(InputError, match=message):
        read_one(tmp_path)


def test_fp8_from_loading_on_leaves_room_for_more_blocks(tmp_path) -> None:
    for name, more in (("a", {}), ("b", {"quantization": "fp8"})):
        write_run(tmp_path / name, server=without("kv_blocks_total_gpu", **more))
    plain, narrow = read_one(tmp_path / "a"), read_one(tmp_path / "b")
    assert narrow.architecture.widths.mlp == 1.0
    saved = plain.architecture.weights_bytes() - narrow.architecture.weights_bytes()
    assert narrow.server.kv_blocks - plain.server.kv_blocks == pytest.approx(saved / (16 * 524_288), abs=2)
    assert any("taken to be fp8" in note for note in narrow.notes)


def test_a_method_that_is_not_the_checkpoints_is_refused(tmp_path) -> None:
    quantised = {**QWEN, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    write_run(tmp_path / "a", server={**SERVER, "quantization": "awq_marlin"}, files={"config.json": quantised})
    assert read_one(tmp_path / "a").architecture.weight_dtype == "int4"
    write_run(tmp_path / "b", server={**SERVER, "quantization": "fp8"}, files={"config.json": quantised})
    with pytest.raises(InputError, match="`quantization: fp8` does not fit the checkpoint"):
        read_one(tmp_path / "b")


def test_the_memory_of_the_kv_cache_gives_its_blocks(tmp_path) -> None:
    write_run(tmp_path, server=without("kv_blocks_total_gpu", kv_cache_memory_bytes="8G"))
    experiment = read_one(tmp_path)
    assert experiment.server.kv_blocks == 8 * 2**30 // (16 * 524_288)
    assert any("1,024 KV blocks fit into `kv_cache_memory_bytes: 8,589,934,592`" in note for note in experiment.notes)


@pytest.mark.parametrize(("degree", "model"), [(5, {"num_attention_heads": 40, "hidden_size": 5120})])
def test_kv_heads_that_the_degree_does_not_divide_are_refused(degree: int, model: dict, tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, "tensor_parallelism": degree}, files={"config.json": {**QWEN, **model}})
    with pytest.raises(InputError, match="KV heads"):
        read_one(tmp_path)


def test_eager_servers_are_noted(tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, "enforce_eager": True})
    assert any("without CUDA graphs" in note for note in read_one(tmp_path).notes)
