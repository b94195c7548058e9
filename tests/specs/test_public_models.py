"""Parameters of public models, counted from their config.json, beside what their pages say.

``public_models.jsonl`` has one model a line: the keys of its config.json, written from the public file, the number of
parameters of the released checkpoint, and its page. 66 of the 71 were also instantiated with transformers 5.24 on the meta
device: all have the number that stands here. The other five ship their own code.
"""

import json
from pathlib import Path

import pytest

from stepcal.specs.architecture import ModelArchitecture

MODELS = [json.loads(line) for line in (Path(__file__).parent / "public_models.jsonl").read_text().splitlines()]
WITHIN_ANY_WINDOW = 512
"""Context limit below every sliding window, so that models with one are read, too."""


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["model"])
def test_the_parameters_of_a_public_model_are_counted(model):
    read = ModelArchitecture.from_config(model["config"], max_model_len=WITHIN_ANY_WINDOW)
    # Router corrections and xIELU constants are not counted everywhere; they are below one in a million.
    assert read.num_parameters() == pytest.approx(model["parameters"], rel=1e-6)


def test_there_are_models_of_many_types():
    assert len(MODELS) >= 30
    assert len({model["config"]["model_type"] for model in MODELS}) >= 30
    assert all(model["source"].startswith("https://huggingface.co/") for model in MODELS)
