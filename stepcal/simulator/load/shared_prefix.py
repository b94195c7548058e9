"""The shared-prefix workload of inference-perf: groups of prompts with a common system prompt, sent in turns.

The generator cycles through its prompts. With multi-turn chat each of them is a user, whose next question carries the
conversation so far.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepcal.errors import InputError, NotModelledError
from stepcal.simulator.layout import Int32Array
from stepcal.simulator.load.arrivals import MOST_REQUESTS, LoadStage, generate_arrivals
from stepcal.simulator.load.clients import Clients, stage_starts
from stepcal.simulator.load.workload import RequestList, whole_priorities
from stepcal.units import IntArray

_MOST_TOKENS = 10**9  # lengths are 32-bit integers
_MOST_SEGMENTS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Groups of prompts that begin with a common system prompt, sent in turns at given rates.

    Parameters
    ----------
    n_groups, n_prompts_per_group : int
        System prompts, and questions asked about each.
    system_prompt_len, question_len, output_len : int
        Tokens.
    stages : tuple of LoadStage
    timeout_s : float
        How long the client waits, infinite if the file does not say.
    multi_turn_chat : bool
        Whether each question carries the conversation so far, as since inference-perf 0.3: then prompts grow.
    max_in_flight : int, optional
        Most requests in flight at a time (`num_workers` times `worker_max_concurrency`); the others wait in the client.
    stage_interval_s : float, optional
        Pause after a stage, which ends when all its requests have. None: stages follow by the clock.
    group_priorities : tuple of int
        Priority of the requests of each group, for servers with the policy ``priority`` (the smallest is served first);
        empty: all are 0.

    Examples
    --------
    >>> import stepcal
    >>> load = stepcal.Workload.read("profile.yaml")
    >>> load.n_prompts, load.prompt_len, [stage.rate for stage in load.stages]
    (6, 150, [4.0, 8.0])
    """

    n_groups: int
    n_prompts_per_group: int
    system_prompt_len: int
    question_len: int
    output_len: int
    stages: tuple[LoadStage, ...]
    timeout_s: float = np.inf
    multi_turn_chat: bool = False
    max_in_flight: int | None = None
    stage_interval_s: float | None = None
    group_priorities: tuple[int, ...] = ()

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any]) -> "Workload":
        """Read a file of inference-perf (``profile.yaml``), as `stepcal.simulator.read_workload` does."""
        from stepcal.simulator.load.inference_perf import read_workload

        return read_workload(source)

    def __post_init__(self) -> None:
        for name in ("n_groups", "n_prompts_per_group", "system_prompt_len", "question_len", "output_len"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"`{name}` of a shared-prefix workload is {getattr(self, name)}; it must be at least 1."
                )
            if getattr(self, name) > _MOST_TOKENS:
                raise InputError(
                    f"`{name}` of a shared-prefix workload is {getattr(self, name)}; it must be at most {_MOST_TOKENS}."
                )
        if self.group_priorities:
            whole_priorities(self.group_priorities, "group_priorities")
        if self.group_priorities and len(self.group_priorities) != self.n_groups:
            raise InputError(
                f"`group_priorities` has {len(self.group_priorities)} elements; there are {self.n_groups} groups, and each "
                "needs one."
            )
        if not self.stages:
            raise InputError("`load.stages` is empty; a workload needs at least one stage with a rate and a duration.")
        if self.n_prompts > _MOST_SEGMENTS:
            raise InputError(
                f"The workload has {self.n_prompts:,} prompts (groups times prompts of each); at most {_MOST_SEGMENTS:,}."
            )
        total = sum(stage.n_requests for stage in self.stages)
        if total > MOST_REQUESTS:
            raise InputError(
                f"The stages of the workload have {total:,} requests together; at most {MOST_REQUESTS:,} can be simulated."
            )

    @property
    def n_prompts(self) -> int:
        """Different prompts, through which the generator cycles; with multi-turn chat, users."""
        return self.n_groups * self.n_prompts_per_group

    @property
    def prompt_len(self) -> int:
        """Tokens of a prompt, in multi-turn chat of the first."""
        return self.system_prompt_len + self.question_len

    def priority_of(self, number: IntArray) -> Int32Array | None:
        """Priorities of requests by the texts of their prompts, shape (n,); None where all are 0."""
        if not self.group_priorities:
            return None
        return np.array(self.group_priorities, np.int32)[number // self.n_prompts_per_group]

    def clients(self) -> Clients:
        """Return how the load generator sends: its cap on requests in flight, and stages that drain."""
        drains = self.stage_interval_s is not None and len(self.stages) > 1
        return Clients(
            max_in_flight=self.max_in_flight,
            stage_starts_s=stage_starts(self.stages) if drains else None,
            stage_interval_s=float(self.stage_interval_s or 0.0) if drains else 0.0,
        )

    def with_prompt_len(self, tokens: float) -> "Workload":
        """The workload with prompts as long as they were measured; the tokeniser makes more of them than was asked for.

        Parameters
        ----------
        tokens : float
            Typical length of a prompt. Shorter than asked for, or not finite, it changes nothing.
        """
        longer = round(tokens) - self.prompt_len if np.isfinite(tokens) else 0
        return replace(self, question_len=self.question_len + longer) if longer > 0 else self

    def segments(self, number: IntArray, prompt_len: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Prompts as segments: a system prompt and a question.

        Parameters
        ----------
        number : ndarray of int, shape (n,)
            Which of the `n_prompts` texts each prompt is.
        prompt_len : ndarray of int, shape (n,)
            Its tokens; the question takes what the system prompt leaves.

        Returns
        -------
        prompt_start, segment_content, segment_tokens : ndarray of int
            See `RequestList`. System prompts have the contents 0 to ``n_groups - 1``, questions those after.
        """
        content = np.column_stack((number // self.n_prompts_per_group, self.n_groups + number))
        system = np.minimum(self.system_prompt_len, prompt_len - 1)
        tokens = np.column_stack((system, prompt_len - system))
        # A prompt of one token has a question only.
        is_kept = tokens.reshape(-1) > 0
        start = np.concatenate(([0], np.cumsum(is_kept.reshape(-1, 2).sum(axis=1))))
        return start, content.reshape(-1)[is_kept].astype(np.int64), tokens.reshape(-1)[is_kept].astype(np.int64)

    def requests(self, process: str = "poisson", *, cv: float | None = None, seed: int = 0) -> RequestList:
        """Requests of this workload at generated times.

        Parameters
        ----------
        process, cv, seed
            See `arrivals.generate_arrivals`.

        Returns
        -------
        RequestList
        """
        arrival_s, stage = generate_arrivals(self.stages, process, cv=cv, seed=seed)
        if self.multi_turn_chat:
            return self._conversations(arrival_s, stage)
        n = arrival_s.size
        start, content, tokens = self.segments(np.arange(self.n_prompts), np.full(self.n_prompts, self.prompt_len))
        return RequestList(
            arrival_s=arrival_s,
            prompt=(np.arange(n) % self.n_prompts).astype(np.int32),
            prompt_start=start,
            segment_content=content,
            segment_tokens=tokens,
            output_tokens=np.full(n, self.output_len, np.int32),
            stage=stage,
            priority=self.priority_of(np.arange(n) % self.n_prompts),
        )

    def _conversations(self, arrival_s: np.ndarray, stage: Int32Array) -> RequestList:
        """Requests whose prompts carry all earlier questions and answers of their user.

        Turns are sent at the generator's times. Request ``i`` is turn ``i // n_prompts`` of user ``i % n_prompts``.
        """
        n, users = arrival_s.size, self.n_prompts
        turn, user = np.arange(n) // users, np.arange(n) % users
        per_prompt = 2 + 2 * turn  # the system prompt, a question and an answer for each earlier turn, the question
        if int(per_prompt.sum()) > _MOST_SEGMENTS:
            raise NotModelledError(
                f"`data.shared_prefix.enable_multi_turn_chat: true` makes conversations of {int(turn.max(initial=0)) + 1:,} "
                "turns, longer than can be simulated. Give fewer requests or more users."
            )
        # Contents: a system prompt for each group, a question for each user, an answer for each request.
        answer = self.n_groups + users + np.arange(n)
        start = np.concatenate(([0], np.cumsum(per_prompt))).astype(np.int64)
        owner = np.repeat(np.arange(n), per_prompt)
        place = np.arange(owner.size) - start[owner]
        content = np.where(place % 2 == 1, self.n_groups + user[owner], user[owner] + (place // 2 - 1) * users)
        content = np.where((place % 2 == 0) & (place > 0), answer[content % max(n, 1)], content)
        content = np.where(place == 0, user[owner] // self.n_prompts_per_group, content)
        tokens = np.where(place % 2 == 1, self.question_len, self.output_len)
        return RequestList(
            arrival_s=arrival_s,
            prompt=np.arange(n, dtype=np.int32),
            prompt_start=start,
            segment_content=content.astype(np.int64),
            segment_tokens=np.where(place == 0, self.system_prompt_len, tokens).astype(np.int64),
            output_tokens=np.full(n, self.output_len, np.int32),
            output_content=answer.astype(np.int64),
            stage=stage,
            priority=self.priority_of(user),
        )
