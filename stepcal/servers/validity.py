"""Inside or outside of what coefficients were fitted on: a prediction outside is extrapolated and says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stepcal.servers.log import ServedLog
from stepcal.specs.deployment import Deployment
from stepcal.units import FloatArray

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Validity:
    """Ranges of what was fitted on; empty or None where nothing is said.

    Attributes
    ----------
    architectures, accelerators : tuple of str
    tensor_parallel : tuple of int
    bytes_per_weight : tuple of float
    kv_precision : tuple of str
        What the KV cache was kept in: ``bf16`` (any 16 bits) or ``fp8``.
    attention : tuple of str
        Its kinds: ``full``, ``windows`` in some layers, ``latent``.
    batch_requests, context_tokens, requests_per_s : (float, float) or None
        Means of runs, smallest and largest.
    """

    architectures: tuple[str, ...] = ()
    accelerators: tuple[str, ...] = ()
    tensor_parallel: tuple[int, ...] = ()
    bytes_per_weight: tuple[float, ...] = ()
    kv_precision: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    batch_requests: Range | None = None
    context_tokens: Range | None = None
    requests_per_s: Range | None = None

    @classmethod
    def of_logs(cls, logs: Sequence[ServedLog], e2e_s: Sequence[FloatArray]) -> Validity:
        """Take the ranges of measured runs, given each request's latency."""
        loads = [load_of(log, e) for log, e in zip(logs, e2e_s, strict=True)]
        return cls(
            architectures=tuple(dict.fromkeys(log.deployment.architecture.name for log in logs)),
            accelerators=tuple(dict.fromkeys(log.deployment.accelerator.name for log in logs)),
            tensor_parallel=tuple(dict.fromkeys(log.deployment.tensor_parallel for log in logs)),
            bytes_per_weight=tuple(dict.fromkeys(float(log.deployment.architecture.bytes_per_weight) for log in logs)),
            kv_precision=tuple(dict.fromkeys(log.deployment.kv_precision for log in logs)),
            attention=tuple(dict.fromkeys(attention_kind(log.deployment) for log in logs)),
            batch_requests=_range([load["batch_requests"] for load in loads]),
            context_tokens=_range([load["context_tokens"] for load in loads]),
            requests_per_s=_range([load["requests_per_s"] for load in loads]),
        )

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Validity:
        """Read from the `validity` of a coefficient file."""
        known = {k: tuple(v) for k, v in document.items() if k in cls.__dataclass_fields__ and v is not None}
        return cls(**known)

    def document(self) -> dict[str, Any]:
        """Return for a coefficient file."""
        return {k: list(v) for k, v in asdict(self).items() if v}


def load_of(log: ServedLog, e2e_s: FloatArray) -> dict[str, float]:
    """Mean requests in flight (Little's law), mean context of a request, requests a second; by stage, the largest."""
    tokens = np.asarray(log.requests.prompt_tokens) + np.asarray(log.requests.output_tokens) / 2
    done = ~np.isnan(e2e_s)
    in_flight, rates = [], []
    for stage in np.unique(log.stage):
        own = log.stage == stage
        span_s = float(np.ptp(log.requests.arrival_s[own]))
        rate = float(own.sum() / span_s) if span_s > 0 else 0.0
        rates.append(rate)
        in_flight.append(rate * float(e2e_s[own & done].mean()) if (own & done).any() else 0.0)
    return {
        "batch_requests": max(in_flight),
        "context_tokens": float(tokens.mean()),
        "requests_per_s": max(rates),
    }


def outside(log: ServedLog, validity: Validity, e2e_s: FloatArray) -> list[str]:
    """Name where a run lies outside of a validity range, given each request's predicted latency."""
    load = load_of(log, e2e_s)
    found = deployment_outside(log.deployment, validity)
    for name, what in (("batch_requests", "requests in flight"), ("context_tokens", "tokens of context")):
        bounds: Range | None = getattr(validity, name)
        if bounds is not None and not 0.9 * bounds[0] <= load[name] <= 1.1 * bounds[1]:
            found.append(f"{load[name]:,.0f} {what} (calibrated on {bounds[0]:,.0f} to {bounds[1]:,.0f})")
    return found


def attention_kind(deployment: Deployment) -> str:
    """Kind of a deployment's attention: ``latent``, ``windows`` where some layers read one that slides, else ``full``."""
    if deployment.architecture.latent is not None:
        return "latent"
    return "full" if deployment.windows is None else "windows"


def deployment_outside(deployment: Deployment, validity: Validity) -> list[str]:
    """Name what of a deployment the coefficients were not fitted on.

    The release of vLLM is not looked at: it changes the schedule, which is simulated, and kernels, which notes speak of.
    """
    own = {
        "architectures": deployment.architecture.name,
        "accelerators": deployment.accelerator.name,
        "tensor_parallel": deployment.tensor_parallel,
        "bytes_per_weight": float(deployment.architecture.bytes_per_weight),
        "kv_precision": deployment.kv_precision,
        "attention": attention_kind(deployment),
    }
    words = {
        "architectures": "the model",
        "accelerators": "the GPU",
        "tensor_parallel": "TP",
        "bytes_per_weight": "bytes a weight",
        "kv_precision": "a KV cache in",
        "attention": "attention of the kind",
    }
    found = []
    for name, value in own.items():
        known = getattr(validity, name)
        if known and value not in known:
            found.append(f"{words[name]} {value} (calibrated on {', '.join(map(str, known))})")
    return found


def _range(values: Sequence[float]) -> Range:
    return float(min(values)), float(max(values))
