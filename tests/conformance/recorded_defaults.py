"""What each release of vLLM chose by its own code (``tools/record_vllm_defaults.py``), and what its offloading did."""

import functools
import json
from pathlib import Path
from typing import Any

VERSIONS = ("0.15.1", "0.18.0", "0.19.0", "0.20.0", "0.21.0", "0.23.0", "0.24.0", "0.29.0", "0.33.0")
"""Releases that were recorded, more than those whose scheduler was."""
ABSENT = "absent"
"""Written in place of a default that a release has no name for."""


@functools.cache
def recorded_defaults(version: str) -> dict[str, Any]:
    """The recording of a release."""
    return json.loads((Path(__file__).parent / "defaults" / f"{version}.json").read_text(encoding="utf-8"))


def limits_of_api_servers(version: str) -> list[dict[str, Any]]:
    """Limits of an API server on each recorded GPU."""
    return [row for row in recorded_defaults(version)["limits"] if row["usage"] == "api_server"]


@functools.cache
def recorded_offloading(version: str) -> dict[str, Any]:
    """What a release did with KV offloading, with (``async``) and without (``sync``) asynchronous scheduling."""
    return json.loads((Path(__file__).parent / "offloading" / f"{version}.json").read_text(encoding="utf-8"))
