"""One step that is asked for by itself: what no server makes is refused, and its parts bear the right names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepcal import Deployment, ModelArchitecture, StepTimeModel
from stepcal.errors import InputError
from stepcal.servers.predict import predict_step, step_batch

PUBLIC = Path(__file__).parents[1] / "specs" / "public_models.jsonl"
MODEL = StepTimeModel.load("default")


def served(**limits: object) -> Deployment:
    return Deployment.of("llama-2-7b", "h100-sxm", **{"kv_blocks": 2_000, **limits})


@pytest.mark.parametrize(
    ("step", "limit"),
    [
        ({"decode_kv_lens": [1_000] * 129}, "max_num_seqs"),
        ({"prefill_chunk_tokens": [2_049]}, "max_num_batched_tokens"),
        ({"decode_kv_lens": [4_097]}, "max_model_len"),
        ({"prefill_chunk_tokens": [10], "prefill_kv_lens": [4_097]}, "max_model_len"),
    ],
)
def test_a_step_beyond_the_server_is_refused_and_without_a_server_predicted(step: dict, limit: str) -> None:
    with pytest.raises(InputError, match=rf"`{limit}` is .* never makes it"):
        MODEL.predict_us(served(), **step)
    assert MODEL.predict_us(Deployment.of("llama-2-7b", "h100-sxm"), **step) > 0


@pytest.mark.parametrize("lens", [["a"], [float("nan")], [1.5], [2**40], 7, [[1, 2]]])
def test_lengths_that_are_none_are_named(lens: object) -> None:
    with pytest.raises(InputError, match=r"`decode_kv_lens` is .* whole numbers"):
        MODEL.predict_us(served(), decode_kv_lens=lens)


def test_one_gpu_has_no_all_reduces_and_its_small_kernels_grow_with_tokens() -> None:
    alone = served(max_num_seqs=1_024)
    few, many = (predict_step(MODEL, alone, step_batch(0, 100, n)) for n in (8, 1_024))
    assert "all-reduces" not in many.components_us
    assert many.components_us["small kernels"] > few.components_us["small kernels"]
    shared = Deployment.of("llama-2-7b", "h100-sxm", tensor_parallel=2, kv_blocks=2_000)
    assert predict_step(MODEL, shared, step_batch(0, 100, 8)).components_us["all-reduces"] > 0
    for step in (few, many):
        assert sum(step.components_us.values()) == pytest.approx(step.total_us)
        assert step.components_us["host beyond GPU"] == 0.0


def test_every_model_says_what_it_does_not_know(tmp_path: Path) -> None:
    (config,) = (
        row["config"]
        for row in map(json.loads, PUBLIC.read_text().splitlines())
        if row["model"] == "openai/gpt-oss-20b"
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    windows = Deployment.of(str(path), "h100-sxm", kv_blocks=2_000)
    for name in ("default", "default-2026-11-24", "global9", "phase16"):
        notes = StepTimeModel.load(name).notes(windows)
        assert any("not validated end to end" in note for note in notes), name
        is_of_the_label = any("CPU time of the scheduler" in note for note in notes)
        assert is_of_the_label == (name in ("global9", "phase16"))
    assert StepTimeModel("affine", {"constant_us": 1_000.0}, "mine").notes(windows) == []


def test_a_server_that_cannot_start_is_named() -> None:
    for blocks, fits in ((20_000, True), (60_000, False)):
        notes = MODEL.notes(Deployment.of("llama-2-70b", "h100-sxm", tensor_parallel=4, kv_blocks=blocks))
        assert any("No such server starts" in note for note in notes) != fits
    assert Deployment.of("llama-2-70b", "h100-sxm").memory_note is None
    assert ModelArchitecture.load("llama-2-70b").check_max_model_len(4_096) == 4_096
