"""BLIS's alpha and beta coefficients: read to drive our simulator, written for BLIS to use (unverified format).

Three betas are its ``blackbox``, ``b0 + b1 prefill tokens + b2 decoding requests``; ten are ``trained-physics``, multipliers
of roofline terms. Three alphas are the API's time: constant, per prompt token, per output token. Order and meaning were
taken from memory of BLIS's documentation; no file of it was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import nnls

from stepcal.errors import InputError
from stepcal.exchange.stepml import StepmlFile
from stepcal.simulator import StepBatch
from stepcal.simulator.steptime import add_components
from stepcal.specs.deployment import Deployment
from stepcal.specs.step_work import all_reduce_bytes, gemm_flops, weight_bytes
from stepcal.step_time.attention_kinds import with_window
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.units import US_PER_S, FloatArray

N_ALPHA = 3
BLACKBOX_BETAS, PHYSICS_BETAS = 3, 10
PHYSICS_TERMS = (
    "prefill compute",
    "prefill KV",
    "decode compute",
    "decode KV",
    "weights",
    "tensor-parallel communication",
    "layers",
    "requests",
    "step",
    "mixture layers",
)
"""What each of the ten betas multiplies: roofline times in microseconds, or a count."""
FITTED_BATCHES, FITTED_CONTEXTS = (1, 4, 16, 64, 128), (256, 1_024, 4_096)
FITTED_PREFILLS = (0, 64, 512, 1_024)


@dataclass(frozen=True)
class BlisBlock:
    """One entry of BLIS's ``defaults.yaml``.

    Attributes
    ----------
    alpha, beta : tuple of float
    about : dict
        All other keys, kept as they are.
    """

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.alpha) != N_ALPHA or len(self.beta) not in (BLACKBOX_BETAS, PHYSICS_BETAS):
            raise InputError(
                f"A BLIS block has {N_ALPHA} `alpha_coeffs` and {BLACKBOX_BETAS} (blackbox) or {PHYSICS_BETAS} "
                f"(trained-physics) `beta_coeffs`; found {len(self.alpha)} and {len(self.beta)}."
            )
        if not np.isfinite([*self.alpha, *self.beta]).all():
            raise InputError("`alpha_coeffs` and `beta_coeffs` of a BLIS block must be finite numbers.")


def read_blis(path: Path) -> BlisBlock:
    """Read a YAML file with one block: `alpha_coeffs`, `beta_coeffs`, and what stands beside them.

    Raises
    ------
    InputError
        If the file holds no such block, or several.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from None
    blocks = _blocks(document)
    if len(blocks) != 1:
        raise InputError(
            f"{path} holds {len(blocks)} blocks with `alpha_coeffs` and `beta_coeffs`; give a file with one."
        )
    try:
        alpha, beta = (tuple(float(v) for v in blocks[0][k]) for k in ("alpha_coeffs", "beta_coeffs"))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: `alpha_coeffs` and `beta_coeffs` are lists of numbers ({error}).") from None
    return BlisBlock(alpha, beta, {k: v for k, v in blocks[0].items() if k not in ("alpha_coeffs", "beta_coeffs")})


def _blocks(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        if "alpha_coeffs" in node and "beta_coeffs" in node:
            return [node]
        return [b for value in node.values() for b in _blocks(value)]
    return [b for value in node for b in _blocks(value)] if isinstance(node, list) else []


def blis_text(block: BlisBlock) -> str:
    """Return a block as a ``defaults.yaml`` with one model."""
    entry = {**block.about, "alpha_coeffs": list(block.alpha), "beta_coeffs": list(block.beta)}
    return yaml.safe_dump({"models": [entry]}, sort_keys=False)


def affine_of(block: BlisBlock, deployment: Deployment) -> tuple[StepmlFile, dict[str, float], list[str]]:
    """Turn a block into an affine step time of one deployment, which our simulator runs.

    Returns
    -------
    file : StepmlFile
        Of the variant ``affine``.
    overheads_us : dict
        `api_before_us` and `api_after_us`, as `stepcal.simulator.simulate` takes them.
    notes : list of str
        What was left out.
    """
    notes = ["BLIS blocks are an unverified format: order and meaning of the coefficients are from memory."]
    if block.alpha[1] or block.alpha[2]:
        notes.append("`alpha_coeffs` by prompt and output token are left out: our API time is one constant.")
    b = block.beta
    if len(b) == BLACKBOX_BETAS:
        terms = {"constant_us": b[0], "prefill_tokens_us": b[1], "decode_requests_us": b[2]}
    else:
        unit = physics_terms(deployment, np.ones(1), np.ones(1), np.ones(1), np.ones(1), np.ones(1))[0]
        empty = physics_terms(deployment, *(np.zeros(1) for _ in range(5)))[0]
        per = unit - empty
        terms = {
            "constant_us": float(empty @ b),
            "prefill_tokens_us": float(b[0] * per[0]),
            "prefill_kv_us": float(b[1] * per[1]),
            "decode_requests_us": float(b[2] * per[2]),
            "kv_us": float(b[3] * per[3]),
            "tokens_us": float(b[5] * per[5] / 2),  # per two tokens: one of each phase
            "requests_us": float(b[7]),
        }
    parameters = tuple({"name": k, "value": float(v), "unit": "us"} for k, v in terms.items() if v)
    return StepmlFile("affine", parameters), {"api_before_us": block.alpha[0], "api_after_us": 0.0}, notes


def physics_terms(
    deployment: Deployment,
    prefill: FloatArray,
    prefill_kv: FloatArray,
    decode: FloatArray,
    decode_kv: FloatArray,
    n_prefill: FloatArray,
) -> FloatArray:
    """Return what the ten betas multiply, shape (n_steps, 10).

    Weights are read in full whatever the batch, as in a dense model.
    """
    model, gpu, tp = deployment.architecture, deployment.accelerator, deployment.tensor_parallel
    flop_us, byte_us = US_PER_S / gpu.bf16_dense_flops, US_PER_S / gpu.hbm_bandwidth
    kv_us = deployment.kv_bytes_per_token * byte_us
    all_weights = float(np.max(weight_bytes(np.array([1e6]), deployment)))
    per_token = float(gemm_flops(np.ones(1), deployment)[0])
    one_way = US_PER_S / (gpu.interconnect_bandwidth / 2)
    sent = all_reduce_bytes(prefill + decode, deployment)[1] * one_way if tp > 1 else 0.0 * prefill
    ones = np.ones_like(prefill)
    return np.column_stack(
        [
            prefill * per_token * flop_us,
            prefill_kv * kv_us,
            decode * per_token * flop_us,
            decode_kv * kv_us,
            ones * all_weights * byte_us,
            np.broadcast_to(sent, prefill.shape),
            ones * model.num_layers,
            decode + n_prefill,
            ones,
            ones * model.num_moe_layers,
        ]
    )


def fitted_block(coefficients: StepTimeModel, deployment: Deployment) -> tuple[BlisBlock, dict[str, float]]:
    """Fit the ten betas to another model's step times on one deployment, over a grid of batches.

    Returns
    -------
    block : BlisBlock
    errors : dict
        `mean_abs_percent` and `worst_percent` of the block against the model over the grid.
    """
    grid = [(p, c, b) for p in FITTED_PREFILLS for c in FITTED_CONTEXTS for b in FITTED_BATCHES]
    prefill, context, decode = (np.array(column, dtype=float) for column in zip(*grid, strict=True))
    n_prefill = np.minimum(prefill, 1.0)
    compiled = coefficients.compile(deployment)
    known = np.array([add_components(compiled(with_window(step_batch(p, c, b), deployment))) for p, c, b in grid])
    terms = physics_terms(deployment, prefill, prefill, decode, decode * context, n_prefill)
    beta, _ = nnls(terms / known[:, None], np.ones(len(known)))
    errors = 100.0 * (terms @ beta / known - 1.0)
    overheads = coefficients.api_overheads_us()
    about = {
        "id": deployment.architecture.name,
        "GPU": deployment.accelerator.name,
        "tensor_parallelism": deployment.tensor_parallel,
        "total_kv_blocks": deployment.limits.kv_blocks,
    }
    alpha = (float(overheads.get("api_before_us", 0.0)) + float(overheads.get("api_after_us", 0.0)), 0.0, 0.0)
    found = {"mean_abs_percent": float(np.abs(errors).mean()), "worst_percent": float(np.abs(errors).max())}
    return BlisBlock(alpha, tuple(float(v) for v in beta), about), found


def step_batch(prefill_tokens: int, context_tokens: int, decode_requests: int) -> StepBatch:
    """Build one step: a new prompt of some tokens (0 for none), and requests that decode at one context."""
    chunk = np.array([prefill_tokens] if prefill_tokens else [], dtype=np.int32)
    return StepBatch(chunk, chunk, np.full(decode_requests, context_tokens, dtype=np.int32), 0)
