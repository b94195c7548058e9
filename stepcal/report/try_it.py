"""The page that computes a step's time in the browser: what it needs of each deployment, as JSON.

A decode step of `b` requests with `c` tokens of context each takes, part by part,
``by_requests[b] + constant + by_request b + by_token b c``; the step is the longer of the parts' sum and the host's time.
The tables come from the shipped coefficients and the kernels of each GPU, so the browser repeats `StepTimeModel.predict_us`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from IPython.display import HTML

from stepcal.errors import InputError
from stepcal.locations import data_folder
from stepcal.simulator import ServerConfig
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.sampling import NEUTRAL, Sampling
from stepcal.specs.step_work import weight_bytes
from stepcal.step_time.coefficients import StepTimeModel, load_coefficients
from stepcal.step_time.kernel_model import _attention_scale, kernel_notes, kernel_parts
from stepcal.step_time.physical import HOST_REQUEST_US
from stepcal.units import US_PER_S

MODELS = (
    "llama-2-7b-hf",
    "llama-3.1-8b-instruct",
    "qwen3-14b",
    "codellama-34b-instruct-hf",
    "mixtral-8x7b-v0.1",
    "llama-2-70b",
    "llama-3.1-70b-instruct",
)
GPUS = ("h100-sxm", "h200-sxm", "a100-80gb", "l40s")
DEGREES = (1, 2, 4)
TOP_P = Sampling(top_p=0.9)
SAMPLINGS = {"top_p": TOP_P, "none": NEUTRAL}
MAX_BATCH = 128
"""Requests: vLLM's `max_num_seqs` on the measured servers."""
CALIBRATED_ON = "h100-sxm"
MAX_CONTEXT = 131_072
"""Tokens: the longest context of the page's models."""
LIMITS = ServerConfig(
    kv_blocks=1_000_000, max_num_seqs=MAX_BATCH, max_num_batched_tokens=MAX_BATCH, max_model_len=MAX_CONTEXT
)
ROOM_FOR_WEIGHTS = 0.9
"""Share of the GPU's memory that vLLM uses by default; weights have to fit in it."""


def architecture(name: str) -> ModelArchitecture:
    """Return the architecture of a model of the page."""
    return ModelArchitecture.from_config(data_folder() / "transfer" / "architectures" / f"{name}.json", name=name)


def deployments(models: Sequence[str] = MODELS, gpus: Sequence[str] = GPUS) -> Iterator[Deployment]:
    """Return each deployment of the page whose weights fit."""
    for model in models:
        for gpu in gpus:
            for degree in DEGREES:
                try:
                    one = Deployment(architecture(model), load_accelerator(gpu), degree, LIMITS)
                except InputError:
                    continue  # the degree does not divide the model
                if weight_bytes(MAX_BATCH, one).max() < ROOM_FOR_WEIGHTS * one.accelerator.hbm_capacity_bytes:
                    yield one


def exported(one: Deployment, model: StepTimeModel) -> dict[str, Any]:
    """Return what the browser needs of one deployment.

    Parameters
    ----------
    one : Deployment
        With its server's limits.
    model : StepTimeModel
        Of the variant ``kernels``.

    Returns
    -------
    dict
        ``parts`` (each with its name and terms, in µs), ``sampler`` by kind of sampling, ``host`` (µs a request), ``floor``
        (the bytes over the datasheet's bandwidth, as a part), ``notes``.
    """
    values, n = model.values, np.arange(MAX_BATCH + 1)
    own = kernel_parts(one)
    scale, products = _attention_scale(values, one), values["products_scale"]
    work = (n > 0).astype(float)
    a_byte = US_PER_S / one.accelerator.hbm_bandwidth
    kv_byte = one.kv_bytes_per_token * a_byte
    parts: list[dict[str, Any]] = [
        {"name": "weights: products of all layers", "by_requests": products * own.products_us[n], "scale": "products"},
        {"name": "output matrix", "by_requests": products * own.head_us[n], "scale": "products"},
        {
            "name": "attention over the KV cache",
            "constant": scale * own.attention_floor_us,
            "by_request": scale * own.attention_request_us,
            "by_token": scale * own.attention_token_us + own.block_token_us,
            "scale": "attention",
        },
        {
            "name": "small kernels of all layers",
            "by_requests": own.layers * values["layer_us"] * work,
            "scale": "layer",
        },
        {"name": "all-reduces and elementwise", "by_requests": own.fixed_us[n]},
    ]
    sampler = {kind: kernel_parts(replace(one, sampling=s)).sampler_us[n] for kind, s in SAMPLINGS.items()}
    return {
        "parts": [{k: _plain(v) for k, v in part.items()} for part in parts],
        "sampler": {kind: _plain(table) for kind, table in sampler.items()},
        "host": HOST_REQUEST_US,
        "floor": {"by_requests": _plain(weight_bytes(n, one) * a_byte * work), "by_token": kv_byte},
        "notes": _notes(one),
    }


def data_of_page(models: Sequence[str] = MODELS, gpus: Sequence[str] = GPUS) -> dict[str, Any]:
    """Return everything that the page computes with.

    Returns
    -------
    dict
        ``deployments`` by ``model|gpu|degree``, and ``relative``: of each learned scale the ends of its 95% interval over
        its value.
    """
    model = load_coefficients("default")
    content = json.loads((data_folder() / "coefficients" / "default.json").read_text(encoding="utf-8"))
    intervals = {p["name"]: (p["low"] / p["value"], p["high"] / p["value"]) for p in content["parameters"]}
    relative = {name: intervals[f"{name}_scale"] for name in ("products", "attention")}
    return {
        "relative": {**relative, "layer": intervals["layer_us"]},
        "max_batch": MAX_BATCH,
        "deployments": {
            f"{d.architecture.name}|{d.accelerator.name}|{d.tensor_parallel}": exported(d, model)
            for d in deployments(models, gpus)
        },
    }


def try_it(models: Sequence[str] = MODELS, gpus: Sequence[str] = GPUS) -> HTML:
    """Return the page's form with its data; ``_static/try_it.js`` brings it to life."""
    content = json.dumps(data_of_page(models, gpus), separators=(",", ":"), allow_nan=False)
    selects = "".join(
        f'<label for="try-{name}">{label}</label><select id="try-{name}"></select>'
        for name, label in (("model", "Model"), ("gpu", "GPU"), ("tp", "Tensor parallelism"))
    )
    return HTML(
        f'<form id="try-it" class="try-it">{selects}'
        '<label for="try-sampling">Sampling</label><select id="try-sampling">'
        '<option value="top_p">top-p or top-k (sorts the logits)</option><option value="none">neither</option></select>'
        f'<label for="try-batch">Requests in the batch</label><input id="try-batch" type="number" min="1" max="{MAX_BATCH}" '
        'value="32"><label for="try-context">Context of each (tokens)</label><input id="try-context" type="number" min="1" '
        f'max="{MAX_CONTEXT}" value="1000"></form>'
        '<div id="try-result" class="try-result" aria-live="polite"><noscript>This page computes in the browser and needs '
        f'JavaScript.</noscript></div><script type="application/json" id="try-data">{content}</script>'
    )


def _notes(one: Deployment) -> list[str]:
    notes = kernel_notes(one)
    if one.accelerator.name != CALIBRATED_ON:
        notes = [
            "No server with this GPU had a part in the calibration: its kernels were measured, the scales carried over.",
            *notes,
        ]
    return notes


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
