"""Steps of models whose layers read different things: windows in the mean layer, and who does not know latent attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stepcal.errors import NotModelledError
from stepcal.simulator import CompiledStepTime, StepBatch
from stepcal.specs.deployment import Deployment


@dataclass(frozen=True)
class TokensRead:
    """What a layer of a deployment reads in a step, averaged over the layers.

    Attributes
    ----------
    decode_kv, prefill_kv : float
        Tokens of context that the decoding and the prefilling requests read.
    prefill_pairs : float
        Query-context pairs of the prefilling requests.
    """

    decode_kv: float
    prefill_kv: float
    prefill_pairs: float


def tokens_read(batch: StepBatch, deployment: Deployment) -> TokensRead:
    """Return what the mean layer of a deployment reads in a step.

    Parameters
    ----------
    batch : StepBatch
        Its own window does not matter: it is the deployment's.
    deployment : Deployment

    Returns
    -------
    TokensRead
    """
    windows = deployment.windows
    full = TokensRead(batch.decode_kv_tokens, batch.prefill_kv_tokens, batch.prefill_pairs)
    if windows is None:
        return full
    own, share = with_window(batch, deployment), windows.share
    return TokensRead(
        (1.0 - share) * full.decode_kv + share * own.window_kv_tokens,
        (1.0 - share) * full.prefill_kv + share * own.prefill_window_kv_tokens,
        (1.0 - share) * full.prefill_pairs + share * own.window_pairs,
    )


def with_window(batch: StepBatch, deployment: Deployment) -> StepBatch:
    """Return a batch that knows the window of a deployment's layers."""
    return replace(batch, windows=deployment.sliding)


def within_windows(compiled: CompiledStepTime, deployment: Deployment) -> CompiledStepTime:
    """Return a step time whose layers with a window read no more than that."""
    windows = deployment.windows
    return compiled if windows is None else compiled.with_windows(windows.share)


def refuse_latent(deployment: Deployment, basis: str) -> None:
    """Refuse a model with latent attention where a step time knows keys and values of heads only.

    Raises
    ------
    NotModelledError
        If the model has latent attention.
    """
    if deployment.architecture.latent is not None:
        raise NotModelledError(
            f"`{deployment.architecture.name}` has latent attention, whose step time is not modelled from {basis}. Take the "
            "coefficients `default`, which know its measured kernels."
        )
