"""Conversations: sessions of turns, each of which repeats all that was said and waits for the answer before it."""

import numpy as np
from numpy.typing import ArrayLike

from stepcal.errors import InputError
from stepcal.simulator.load.workload import RequestList


def make_conversations(
    start_s: ArrayLike,
    n_turns: int,
    *,
    system_prompt_len: int,
    question_len: int,
    output_len: int,
    think_s: float = 0.0,
    n_system_prompts: int = 1,
) -> RequestList:
    """Sessions whose prompts grow: system prompt, question, answer, question, answer and so on.

    A turn is sent `think_s` after the answer to the turn before it has reached the client. The KV blocks of the
    conversation so far can be found in the prefix cache, those of the answers included.

    Parameters
    ----------
    start_s : array_like of float, shape (n_sessions,)
        When the first turn of each session is sent; sorted.
    n_turns : int
    system_prompt_len, question_len, output_len : int
        Tokens of each.
    think_s : float
    n_system_prompts : int
        Sessions take turns with this many system prompts.

    Returns
    -------
    RequestList
        Turn ``t`` of session ``s`` is request ``t * n_sessions + s``; `stage` is 0 throughout.

    Raises
    ------
    InputError
        If a number or length is not positive, or the think time is negative.
    """
    for name, value in (
        ("n_turns", n_turns),
        ("system_prompt_len", system_prompt_len),
        ("question_len", question_len),
        ("output_len", output_len),
        ("n_system_prompts", n_system_prompts),
    ):
        if value < 1:
            raise InputError(f"`{name}` is {value}; it must be at least 1.")
    if not 0.0 <= think_s < np.inf:
        raise InputError(f"`think_s` is {think_s}; it must be finite and not negative.")
    start = np.asarray(start_s, dtype=np.float64)
    n = start.size
    session = np.arange(n)
    # Contents: system prompts first, then a question and an answer for each turn of each session.
    question = n_system_prompts + (2 * np.arange(n_turns)[:, None] * n) + session
    answer = question + n
    segments, tokens = [], []
    for turn in range(n_turns):
        said = [session % n_system_prompts]
        lengths = [system_prompt_len]
        for earlier in range(turn):
            said += [question[earlier], answer[earlier]]
            lengths += [question_len, output_len]
        said.append(question[turn])
        lengths.append(question_len)
        segments.append(np.column_stack(said).reshape(-1))
        tokens.append(np.tile(lengths, n))
    per_prompt = np.repeat(2 * np.arange(n_turns) + 2, n)
    follows = np.arange(n * n_turns) - n
    return RequestList(
        arrival_s=np.concatenate([start, np.full(n * (n_turns - 1), think_s)]),
        prompt=np.arange(n * n_turns, dtype=np.int32),
        prompt_start=np.concatenate(([0], np.cumsum(per_prompt))),
        segment_content=np.concatenate(segments).astype(np.int64),
        segment_tokens=np.concatenate(tokens).astype(np.int64),
        output_tokens=np.full(n * n_turns, output_len, np.int32),
        output_content=answer.reshape(-1).astype(np.int64),
        follows=np.maximum(follows, -1).astype(np.int32),
    )
