"""Independent jobs on several processes of this machine, or on a Dask cluster; results do not depend on where."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from joblib import Parallel, delayed, parallel_config

from stepcal.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
CONNECT_S = 10.0
"""How long a cluster has to answer."""


def run_jobs(
    function: Callable[[Item], Result], items: Iterable[Item], *, jobs: int = 1, dask: str | None = None
) -> list[Result]:
    """Apply a function to all items.

    Parameters
    ----------
    function : callable
        Of a module, so that other processes can import it.
    items : iterable
    jobs : int
        Processes of this machine; 1 stays in this one.
    dask : str, optional
        Address of a Dask scheduler, ``tcp://host:port``, whose workers have the same stepcal. Takes the place of `jobs`.

    Returns
    -------
    list
        In the order of the items, equal to the last bit wherever they were computed.

    Raises
    ------
    InputError
        If the cluster does not answer, or `distributed` is not installed.
    """
    with _cluster(dask):
        n_jobs = -1 if dask is not None else jobs
        return list(Parallel(n_jobs=n_jobs)(delayed(function)(item) for item in items))


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Send joblib's jobs to a cluster."""
    if address is None:
        yield
        return
    client = _client(address)
    try:
        with parallel_config(backend="dask"):
            yield
    finally:
        client.close()


def _client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise InputError("`--dask` needs the package distributed: pip install 'stepcal[dask]'.") from None
    try:
        return Client(address, timeout=CONNECT_S)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(
            f"`--dask {address}`: no Dask scheduler answers there ({type(error).__name__}). Start one with `dask scheduler` "
            "and workers with `dask worker ADDRESS`, or leave the option out."
        ) from None
