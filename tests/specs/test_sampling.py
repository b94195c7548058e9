"""Sampling parameters: what vLLM would take from a generation_config.json, and what is known of a model by its name."""

import json

import pytest

from stepcal.errors import InputError
from stepcal.experiments.sampling_defaults import sampling_of
from stepcal.specs.sampling import NEUTRAL, Sampling, known_sampling, read_sampling


@pytest.mark.parametrize(
    ("parameters", "restricts", "penalises"),
    [
        ({}, False, False),
        ({"top_p": 0.9}, True, False),
        ({"top_k": 20}, True, False),
        ({"top_p": 0.9, "temperature": 0.0}, False, False),
        ({"repetition_penalty": 1.05}, False, True),
        ({"presence_penalty": -0.5}, False, True),
    ],
)
def test_what_costs_time(parameters, restricts, penalises):
    sampling = Sampling(**parameters)
    assert (sampling.restricts_tokens, sampling.penalises) == (restricts, penalises)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0.0), ("top_p", 1.5), ("top_k", -2), ("repetition_penalty", 0.0), ("temperature", float("nan"))],
)
def test_out_of_bounds_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"`{name}` is"):
        Sampling(**{name: value})


def test_a_generation_config_is_read(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "top_p": 0.9, "top_k": -1, "temperature": 0.6, "eos_token_id": 2}))
    assert read_sampling(path) == Sampling(top_p=0.9, temperature=0.6)
    path.write_text(json.dumps({"top_p": "high"}))
    with pytest.raises(InputError, match="`top_p` is 'high'"):
        read_sampling(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="is an object"):
        read_sampling(path)


@pytest.mark.parametrize(
    ("name", "sorts"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", True),
        ("Qwen/Qwen3-14B", True),
        ("codellama/CodeLlama-34b-Instruct-hf", False),
        ("mistralai/Mixtral-8x7B-v0.1", False),
        ("16-llama-3-1-8b-tp1-general-1", True),
    ],
)
def test_models_are_known_by_parts_of_their_names(name, sorts):
    known = known_sampling(name)
    assert known is not None
    assert known[0].restricts_tokens is sorts


def test_the_file_goes_before_the_name_and_the_server_before_both(tmp_path):
    config = tmp_path / "config.json"
    names = ["Qwen/Qwen3-14B"]
    assumed, notes = sampling_of({}, config, names, vocab_size=150_000)
    assert assumed.top_k == 20
    assert "by its publisher were assumed" in notes[0]
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5}')
    assert sampling_of({}, config, names, vocab_size=150_000) == (Sampling(top_p=0.5), [])
    assert sampling_of({"generation_config": "vllm"}, config, names, vocab_size=150_000) == (NEUTRAL, [])
    override = {"override_generation_config": {"top_k": 7}}
    assert sampling_of(override, config, names, vocab_size=150_000)[0] == Sampling(top_p=0.5, top_k=7)


def test_an_unknown_model_with_a_large_vocabulary_is_noted():
    assert sampling_of({}, None, ["mine"], vocab_size=32_000) == (NEUTRAL, [])
    assert "no top-k and no top-p were assumed" in sampling_of({}, None, ["mine"], vocab_size=152_000)[1][0]
