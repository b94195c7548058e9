"""A small server of the OpenAI streaming protocol on loopback, with known pacing, to make real files of load generators.

``python tools/mock_openai_server.py --port 8011 --seconds 120`` answers completions and chat completions with `max_tokens`
words, the first after `--ttft-ms`, the others `--itl-ms` apart, and stops by itself. It serves 127.0.0.1 alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

MODEL = "mock-model"
MOST_TOKENS = 4096
LONGEST_RUN_S = 900.0


class Server:
    """Pacing and counts of one run of the server."""

    def __init__(self, ttft_s: float, itl_s: float, tokens_per_event: int, fail_every: int) -> None:
        self.ttft_s, self.itl_s = ttft_s, itl_s
        self.tokens_per_event, self.fail_every = tokens_per_event, fail_every
        self.served = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until the client closes it."""
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        line = await reader.readline()
        if not line.strip():
            return False
        method, path, _ = line.decode().split(" ", 2)
        headers = {}
        while (line := await reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            headers[name.strip().lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = path.partition("?")[0]
        if method == "GET":
            await self._get(path, writer)
        else:
            await self._generate(path, json.loads(body or b"{}"), writer)
        return True

    async def _get(self, path: str, writer: asyncio.StreamWriter) -> None:
        answers: dict[str, Any] = {
            "/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": MOST_TOKENS}]},
            "/health": {},
            "/version": {"version": "mock"},
        }
        await _answer(writer, answers.get(path, {"error": "not found"}), 200 if path in answers else 404)

    async def _generate(self, path: str, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.served += 1
        if self.fail_every and self.served % self.fail_every == 0:
            await _answer(writer, {"error": {"message": "mock failure", "type": "server_error"}}, 500)
            return
        is_chat = path.endswith("/chat/completions")
        n_tokens = int(request.get("max_tokens") or request.get("max_completion_tokens") or 16)
        n_tokens = min(n_tokens, MOST_TOKENS)
        usage = {"prompt_tokens": _prompt_tokens(request), "completion_tokens": n_tokens}
        usage["total_tokens"] = sum(usage.values())
        about = {"id": f"mock-{self.served}", "created": int(time.time()), "model": request.get("model", MODEL)}
        about["object"] = "chat.completion.chunk" if is_chat else "text_completion"
        if not request.get("stream"):
            await asyncio.sleep(self.ttft_s + self.itl_s * (n_tokens - 1))
            choice = {"index": 0, "finish_reason": "length", **_text(is_chat, " word" * n_tokens, "message")}
            await _answer(writer, {**about, "choices": [choice], "usage": usage})
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(self.ttft_s)
        for first in range(0, n_tokens, self.tokens_per_event):
            if first:
                await asyncio.sleep(self.itl_s * self.tokens_per_event)
            n_here = min(self.tokens_per_event, n_tokens - first)
            is_last = first + n_here == n_tokens
            choice = {"index": 0, "finish_reason": "length" if is_last else None}
            choice |= _text(is_chat, " word" * n_here, "delta")
            _event(writer, {**about, "choices": [choice]})
            await writer.drain()
        if (request.get("stream_options") or {}).get("include_usage"):
            _event(writer, {**about, "choices": [], "usage": usage})
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _text(is_chat: bool, text: str, part: str) -> dict[str, Any]:
    return {part: {"role": "assistant", "content": text}} if is_chat else {"text": text}


def _prompt_tokens(request: dict[str, Any]) -> int:
    """Words of the prompt, or the tokens that it is given as."""
    prompt = request.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    if prompt is None:
        prompt = json.dumps(request.get("messages", []))
    return len(str(prompt).split())


def _chunk(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


def _event(writer: asyncio.StreamWriter, content: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(content).encode() + b"\n\n")


async def _answer(writer: asyncio.StreamWriter, content: dict[str, Any], status: int = 200) -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until the time is over."""
    server = Server(arguments.ttft_ms / 1e3, arguments.itl_ms / 1e3, arguments.tokens_per_event, arguments.fail_every)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", arguments.port)
    async with listener:
        await asyncio.sleep(min(arguments.seconds, LONGEST_RUN_S))
    print(f"served {server.served} requests")


def main() -> None:
    """Run the server from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8011)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--ttft-ms", type=float, default=40.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    parser.add_argument("--tokens-per-event", type=int, default=1, help="2 or more: stream events are not tokens")
    parser.add_argument("--fail-every", type=int, default=0, help="answer each n-th request with status 500")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
