"""Which KV blocks of which prompts hold the same tokens.

A full block can be shared by two requests if everything up to its end is equal. A prompt is a sequence of contents,
so "equal up to here" is a node of a tree whose edges are (content, tokens); every block gets the number of the node
where it ends. Blocks that only one request can ever use need no number: nothing but a count is kept of them.
"""

from typing import NamedTuple

import numpy as np

from stepcal.simulator.layout import Int32Array
from stepcal.units import IntArray


class PrefixTable(NamedTuple):
    """For each chain (prompt, and its answer where that has a name): its shareable blocks as ranges of node numbers.

    Segment ``s`` of ``segment_offset[chain_start[c] : chain_start[c + 1]]`` covers the blocks of the chain up to
    ``segment_end[s]``; block ``j`` of them has node ``segment_offset[s] + j``.
    """

    chain: Int32Array  # (n_requests,)
    chain_start: IntArray
    segment_offset: IntArray
    segment_end: IntArray
    n_nodes: int
    max_blocks: int  # most shareable blocks of one chain


def no_prefixes(n_requests: int) -> PrefixTable:
    """The table without prefix caching: nothing is shareable."""
    empty = np.zeros(0, np.int64)
    return PrefixTable(np.zeros(n_requests, np.int32), np.zeros(2, np.int64), empty, empty, 0, 0)


def find_shared_prefixes(
    prompt: Int32Array,
    prompt_start: IntArray,
    segment_content: IntArray,
    segment_tokens: IntArray,
    output_content: IntArray | None,
    output_tokens: Int32Array,
    block_size: int,
) -> PrefixTable:
    """Number the blocks that more than one request can use.

    Parameters
    ----------
    prompt : ndarray of int, shape (n_requests,)
        Which prompt each request has.
    prompt_start : ndarray of int, shape (n_prompts + 1,)
        Where the segments of each prompt begin.
    segment_content, segment_tokens : ndarray of int, shape (n_segments,)
    output_content : ndarray of int, shape (n_requests,), or None
        Content that each request generates, -1 where nobody else ever asks for it.
    output_tokens : ndarray of int, shape (n_requests,)
    block_size : int

    Returns
    -------
    PrefixTable
    """
    chain, start, content, tokens = _chains(
        prompt, prompt_start, segment_content, segment_tokens, output_content, output_tokens
    )
    n_chains = start.size - 1
    requests_of_chain = np.bincount(chain, minlength=n_chains)
    # Whose first content nobody else has can share nothing; of many private prompts, that leaves little to do.
    candidates = np.flatnonzero(_has_company(content[start[:-1]], requests_of_chain))
    length = np.diff(start)[candidates]
    segments = np.repeat(start[candidates] - (np.cumsum(length) - length), length) + np.arange(length.sum())
    content, tokens = content[segments], tokens[segments]
    start = np.concatenate(([0], np.cumsum(length)))
    requests_of_chain = requests_of_chain[candidates]

    ends = np.cumsum(tokens)
    before_chain = np.concatenate(([0], ends))[start[:-1]]
    ends -= np.repeat(before_chain, length)
    starts = ends - tokens

    path = np.full(candidates.size, -1, np.int64)
    path_length = np.zeros(candidates.size, np.int64)
    offset = np.zeros(content.size, np.int64)
    is_shared = np.zeros(content.size, bool)
    n_nodes = n_paths = 0
    for level in range(int(length.max(initial=0))):
        rows = np.flatnonzero(length > level)
        segment = start[rows] + level
        # A path is where it comes from, how far that was followed, and the content that continues it.
        keys = _combine(_combine(path[rows], path_length[rows]), content[segment])
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        n_users = np.bincount(inverse, weights=requests_of_chain[rows])
        last_block = np.zeros(first.size, np.int64)
        np.maximum.at(last_block, inverse, ends[segment] // block_size)
        first_block = starts[segment[first]] // block_size
        n_blocks = np.where(n_users > 1, last_block - first_block, 0)
        first_node = n_nodes + np.cumsum(n_blocks) - n_blocks
        offset[segment] = (first_node - first_block)[inverse]
        is_shared[segment] = (n_users > 1)[inverse]
        path[rows] = n_paths + inverse
        path_length[rows] = tokens[segment]
        n_nodes += int(n_blocks.sum())
        n_paths += first.size
    # A shared path has only shared ones before it, so what remains of each chain is its front.
    kept = np.bincount(np.repeat(candidates, length)[is_shared], minlength=n_chains)
    segment_end = ends[is_shared] // block_size
    chain_start = np.concatenate(([0], np.cumsum(kept))).astype(np.int64)
    return PrefixTable(chain, chain_start, offset[is_shared], segment_end, n_nodes, int(segment_end.max(initial=0)))


def _has_company(content: IntArray, weight: IntArray) -> np.ndarray:
    """Whether the same content occurs in more than one request, shape of `content`."""
    _, inverse = np.unique(content, return_inverse=True)
    return (np.bincount(inverse, weights=weight) > 1)[inverse]


def _combine(a: IntArray | Int32Array, b: IntArray) -> IntArray:
    """One number for each different pair of numbers."""
    _, a_rank = np.unique(a, return_inverse=True)
    b_values, b_rank = np.unique(b, return_inverse=True)
    return a_rank * b_values.size + b_rank


def _chains(
    prompt: Int32Array,
    prompt_start: IntArray,
    segment_content: IntArray,
    segment_tokens: IntArray,
    output_content: IntArray | None,
    output_tokens: Int32Array,
) -> tuple[Int32Array, IntArray, IntArray, IntArray]:
    """Prompts, extended by the answer where that has a name: chain of each request, and segments of each chain."""
    if output_content is None or (output_content < 0).all():
        return prompt, prompt_start, segment_content, segment_tokens
    keys = _combine(_combine(prompt, output_content), np.where(output_content < 0, 0, output_tokens))
    _, first_request, chain = np.unique(keys, return_index=True, return_inverse=True)
    chain_prompt, chain_answer = prompt[first_request], output_content[first_request]
    n_prompt_segments = np.diff(prompt_start)[chain_prompt]
    has_answer = chain_answer >= 0
    start = np.concatenate(([0], np.cumsum(n_prompt_segments + has_answer)))
    content = np.empty(start[-1], np.int64)
    tokens = np.empty(start[-1], np.int64)
    from_prompt = np.ones(start[-1], bool)
    answer = start[1:][has_answer] - 1
    from_prompt[answer] = False
    content[answer], tokens[answer] = chain_answer[has_answer], output_tokens[first_request][has_answer]
    first = np.repeat(prompt_start[chain_prompt], n_prompt_segments)
    within = np.arange(first.size) - np.repeat(np.cumsum(n_prompt_segments) - n_prompt_segments, n_prompt_segments)
    content[from_prompt], tokens[from_prompt] = segment_content[first + within], segment_tokens[first + within]
    return chain.astype(np.int32), start, content, tokens
