"""Models in which some layers read a window, through every command that predicts a step or simulates a load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from stepcal.cli.main import app
from tests.run_folders import PROFILE, SERVER, write_run

GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}
GEMMA_3 = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}
RUNNER = CliRunner()


def run(*arguments: str) -> dict:
    done = RUNNER.invoke(app, [*arguments, "--json", "-"])
    assert done.exit_code in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_simulate_says_the_release_and_refuses_positions_that_the_model_has_not(tmp_path: Path) -> None:
    config, table = tmp_path / "config.json", tmp_path / "r.csv"
    config.write_text(json.dumps(GEMMA_3), encoding="utf-8")
    table.write_text("arrival_s,prompt_tokens,output_tokens\n0,1200,10\n", encoding="utf-8")
    common = ("simulate", "--architecture", str(config), "--requests", str(table), "--coefficients", "default")
    notes = run(*common, "--kv-blocks", "2000", "--vllm-version", "0.25.0")["notes"]
    assert any("0.25.0 was not recorded; it is simulated as 0.24.0" in note for note in notes)
    common = (*common, "--kv-blocks", "400")
    refused = RUNNER.invoke(app, [*common, "--max-model-len", "40000"])
    assert refused.exit_code == 2
    assert "above the 32,768 positions" in refused.stderr
    endless = RUNNER.invoke(app, [*common, "--max-model-len", "2000", "--vllm-version", "0.19.0"])
    assert endless.exit_code == 2
    assert "this release counts whole sequences" in " ".join(endless.stderr.split())


def test_without_the_hybrid_cache_a_window_saves_no_blocks(tmp_path: Path) -> None:
    config, table = tmp_path / "config.json", tmp_path / "r.csv"
    config.write_text(json.dumps(GEMMA_3), encoding="utf-8")
    rows = "".join(f"{i * 0.01},3000,200\n" for i in range(20))
    table.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows, encoding="utf-8")
    common = (
        "simulate",
        "--architecture",
        str(config),
        "--kv-blocks",
        "3000",
        "--requests",
        str(table),
        "--coefficients",
        "default",
    )
    hybrid, plain = run(*common), run(*common, "--disable-hybrid-kv-cache-manager")
    assert hybrid["overall"]["completed"] == plain["overall"]["completed"] == 20
    assert hybrid["overall"]["e2e_ms"]["mean"] != plain["overall"]["e2e_ms"]["mean"]


@pytest.fixture(params=[GPT_OSS_20B, GEMMA_3], ids=["gpt-oss-20b", "gemma-3-1b"])
def folder(request, tmp_path: Path) -> Path:
    server = {k: v for k, v in SERVER.items() if k not in ("kv_blocks_total_gpu", "vllm_version", "model")}
    write_run(tmp_path / "runs", server=server, files={"config.json": request.param})
    (tmp_path / "config.json").write_text(json.dumps(request.param), encoding="utf-8")
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
    return tmp_path


def test_every_command_takes_a_model_with_windows(folder: Path) -> None:
    model = str(folder / "config.json")
    workload = ("--workload", str(folder / "profile.yaml"))
    simulated = run("simulate", "--architecture", model, "--kv-blocks", "9000", "--coefficients", "default", *workload)
    assert simulated["overall"]["completed"] == 120
    at = {
        context: run("predict", "--architecture", model, "--batch", "64", "--context", str(context))
        for context in (500, 4000)
    }
    assert at[500]["total_us"] < at[4000]["total_us"]
    load = ("--input-len", "600", "--output-len", "50", "--requests", "100")
    planned = run(
        "plan", "--architecture", model, "--target", "tpot.mean<=100ms", "--gpu", "h100-sxm", "--tp", "1", *load
    )
    assert planned["choices"]
    evaluated = run("evaluate", "--experiments", str(folder / "runs"))
    assert evaluated["per_experiment"][0]["predicted"]["completed"] == 120
    checked = run("check", str(folder / "runs"), "--architecture", model)
    assert checked["runs"][0]["errors"]


def test_a_cache_in_fp8_holds_more_and_is_said_not_to_be_validated() -> None:
    step = (
        "predict",
        "--architecture",
        "llama-2-7b",
        "--accelerator",
        "h100-sxm",
        "--batch",
        "64",
        "--context",
        "2000",
    )
    wide, narrow = run(*step), run(*step, "--kv-cache-dtype", "fp8")
    assert narrow["total_us"] < wide["total_us"]
    assert narrow["floor_us"] < wide["floor_us"]
    assert any("FP8 KV cache" in note for note in narrow["notes"])
    assert not any("FP8 KV cache" in note for note in wide["notes"])
    load = ("--input-len", "600", "--output-len", "50", "--requests", "100", "--gpu", "h100-sxm", "--tp", "1")
    planned = run(
        "plan", "--architecture", "llama-2-7b", "--target", "tpot.mean<=30ms", *load, "--kv-cache-dtype", "fp8"
    )
    assert "--kv-cache-dtype fp8" in planned["choices"][0]["flags"]
    done = RUNNER.invoke(app, [*step, "--kv-cache-dtype", "int3"])
    assert done.exit_code == 2
    assert "kv_cache_dtype" in done.output
