"""Parameters of public models, counted from their config.json, beside what their pages say.

``public_models.jsonl`` has one model a line: the keys of its config.json, written from the public file, the number of
parameters of the released checkpoint, and its page. 66 of 71 of them were instantiated with transformers 5.24, too, on
the meta device: all have the number that stands here. The other five ship their own code. gpt-oss, DeepSeek and Kimi came
later: their files are the copies in the wheel of kernel tables or, where it has none, written from memory.
"""

import json
from pathlib import Path

import pytest

from stepcal.kernels.silicon import active_parameters
from stepcal.specs.architecture import ModelArchitecture

MODELS = [json.loads(line) for line in (Path(__file__).parent / "public_models.jsonl").read_text().splitlines()]
WITHIN_ANY_WINDOW = 512
"""Context limit below every window of a model that does not say which layers have it."""


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["model"])
def test_the_parameters_of_a_public_model_are_counted(model):
    read = ModelArchitecture.from_config(model["config"], max_model_len=WITHIN_ANY_WINDOW)
    # Router corrections and xIELU constants are not counted everywhere; they are below one in a million.
    assert read.num_parameters() == pytest.approx(model["parameters"], rel=1e-6)


@pytest.mark.parametrize(("name", "billions", "checkpoint_gib"), [("120b", 5.13, 60.8), ("20b", 3.61, 12.8)])
def test_active_parameters_and_size_of_gpt_oss(name, billions, checkpoint_gib):
    """The model card counts the output matrix among the active parameters and the embedding not."""
    config = next(m["config"] for m in MODELS if m["model"] == f"openai/gpt-oss-{name}")
    read = ModelArchitecture.from_config(config)
    active = active_parameters(read) + read.vocab_size * read.hidden_size
    assert active / 1e9 == pytest.approx(billions, abs=0.015)
    assert read.weights_bytes() / 2**30 == pytest.approx(checkpoint_gib, abs=0.05)


@pytest.mark.parametrize(
    ("name", "billions", "within"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite", 2.4, 0.05),
        ("deepseek-ai/DeepSeek-V2", 21.0, 0.5),
        ("deepseek-ai/DeepSeek-V3", 37.0, 0.5),
        ("moonshotai/Kimi-K2-Instruct", 32.0, 0.5),
    ],
)
def test_active_parameters_of_models_with_latent_attention(name, billions, within):
    """Their papers give whole billions; here with the output matrix and without the embedding."""
    read = ModelArchitecture.from_config(next(m["config"] for m in MODELS if m["model"] == name))
    active = active_parameters(read) + read.vocab_size * read.hidden_size
    assert active / 1e9 == pytest.approx(billions, abs=within)


def test_there_are_models_of_many_types():
    assert len(MODELS) >= 30
    assert len({model["config"]["model_type"] for model in MODELS}) >= 30
    assert all(model["source"].startswith("https://huggingface.co/") for model in MODELS)
