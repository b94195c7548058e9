"""Where tables come from: measured rows, a recording, simulated rows, or nowhere yet; every page and verdict says which."""

from __future__ import annotations

from dataclasses import dataclass

from stepcal import __version__

MEASURED, RECORDED, SIMULATED = "measured", "recorded", "simulated"
NO_EVIDENCE = "none"
"""Kind of a hypothesis whose runs are still to come."""


@dataclass(frozen=True)
class Provenance:
    """Where a study's tables come from.

    Attributes
    ----------
    kind : str
        ``measured`` (computed now), ``recorded`` (computed earlier, read from the recording), ``simulated`` or ``none``.
    data_sha256 : str
        Content hash of the rows they were computed from.
    n_rows, n_experiments : int
        Rows (steps, requests, predictions) that went in.
    recorded : str
        Day of the recording, empty unless recorded.
    version : str
        Version of stepcal that computed them.
    """

    kind: str
    data_sha256: str
    n_rows: int
    n_experiments: int
    recorded: str = ""
    version: str = __version__

    def brief(self) -> str:
        """Return kind and hash, for small print."""
        return "none yet" if self.kind == NO_EVIDENCE else f"{self.kind}, content hash {self.data_sha256[:12]}"

    def size(self) -> str:
        """Return what went in, in a few words."""
        if self.kind == NO_EVIDENCE:
            return "no run yet."
        when = f"on {self.recorded}, " if self.recorded else ""
        return f"{when}{self.n_rows:,} rows of {self.n_experiments} experiments."

    def sentence(self) -> str:
        """Return one sentence for a reader."""
        if self.kind == NO_EVIDENCE:
            return "No run that could be judged is at hand."
        size = f"{self.n_rows:,} rows of {self.n_experiments} experiments (content hash {self.data_sha256[:12]})"
        if self.kind == SIMULATED:
            return f"Simulated rows, drawn from a seed: {size}. They exercise the pipeline and enter no verdict."
        if self.kind == RECORDED:
            return (
                f"Recorded on {self.recorded} with stepcal {self.version} from {size}; nothing was recomputed "
                "for this page."
            )
        return f"Computed from measured traces: {size}."
