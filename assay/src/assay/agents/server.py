"""A server that speaks as an OpenAI-compatible provider and says what a script tells it to. For tests and dry runs.

A script is TOML: `[[reply]]` tables, one per request, in turn; the last one goes on answering. A reply is `say` (text),
`bash` (a call of the tool `bash`), `status` (an HTTP error), or `stall_s` (seconds of silence before the answer).
"""

import asyncio
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.contract.errors import UsageError

_KEYS = {"say": str, "bash": str, "status": int, "stall_s": (int, float)}
_MOST = 32 << 20


@dataclass(frozen=True)
class Reply:
    """What one request is answered with."""

    say: str = ""
    bash: str = ""
    status: int = 200
    stall_s: float = 0.0


def script(file: Path) -> list[Reply]:
    """The replies in a file. UsageError names what is wrong with it."""
    try:
        data = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise UsageError(f"{file}: expected a script, got {problem}") from None
    found = data.get("reply")
    if data.keys() != {"schema", "reply"} or data["schema"] != 1 or not isinstance(found, list) or not found:
        raise UsageError(f"{file}: expected schema = 1 and [[reply]] tables, got {', '.join(data) or 'nothing'}")
    for number, one in enumerate(found, 1):
        for name, value in one.items():
            if name not in _KEYS or not isinstance(value, _KEYS[name]):  # type: ignore[arg-type]
                raise UsageError(f"{file}: reply {number}: expected one of {', '.join(_KEYS)}, got {name} = {value!r}")
    return [Reply(**one) for one in found]


@dataclass
class Server:
    """Answers on loopback; remembers how many requests came."""

    replies: list[Reply]
    requests: list[str] = field(default_factory=list)
    """Bodies, in turn, without their headers, in which keys stand."""

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request per connection."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            line, _, rest = head.partition(b"\r\n")
            fields = {one.partition(b":")[0].lower(): one.partition(b":")[2] for one in rest.split(b"\r\n")}
            body = await reader.readexactly(min(_MOST, int(fields.get(b"content-length", 0))))
            method, path = line.decode("latin-1").split(" ")[:2]
            writer.write(await self.answer(method, path, body))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, ValueError):
            pass
        finally:
            writer.close()

    async def answer(self, method: str, path: str, body: bytes) -> bytes:
        """A whole HTTP response."""
        if method == "GET" and path.endswith("/models"):
            models = {"object": "list", "data": [{"id": "scripted", "object": "model", "owned_by": "assay"}]}
            return _http(200, json.dumps(models))
        if method != "POST" or not path.endswith("/chat/completions"):
            return _http(404, json.dumps({"error": {"message": f"expected /chat/completions, got {path}"}}))
        asked = json.loads(body)
        reply = self.replies[min(len(self.requests), len(self.replies) - 1)]
        self.requests.append(body.decode(errors="replace"))
        await asyncio.sleep(reply.stall_s)
        if reply.status != 200:
            error = {"message": "scripted error", "type": "rate_limit_error", "code": str(reply.status)}
            return _http(reply.status, json.dumps({"error": error}))
        if asked.get("stream"):
            return _http(200, _streamed(asked, reply, len(self.requests)), "text/event-stream")
        return _http(200, json.dumps(_completion(asked, reply, len(self.requests))))


def _message(reply: Reply, number: int) -> dict[str, Any]:
    found: dict[str, Any] = {"role": "assistant", "content": reply.say or None}
    if reply.bash:
        called = {"name": "bash", "arguments": json.dumps({"command": reply.bash})}
        found["tool_calls"] = [{"id": f"call_{number}", "type": "function", "function": called}]
    elif not reply.say:
        found["content"] = ""
    return found


def _usage(asked: Mapping[str, Any], reply: Reply) -> dict[str, int]:
    """Words for tokens."""
    prompt, said = len(json.dumps(asked.get("messages", "")).split()), len(f"{reply.say} {reply.bash}".split())
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def _completion(asked: Mapping[str, Any], reply: Reply, number: int) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": _message(reply, number),
        "finish_reason": "tool_calls" if reply.bash else "stop",
    }
    head = {"id": f"reply-{number}", "object": "chat.completion", "created": 0, "model": asked.get("model", "")}
    return {**head, "choices": [choice], "usage": _usage(asked, reply)}


def _streamed(asked: Mapping[str, Any], reply: Reply, number: int) -> str:
    """The answer as two events and an end."""
    whole = _completion(asked, reply, number)
    delta = whole["choices"][0]["message"]
    for i, call in enumerate(delta.get("tool_calls", [])):
        call["index"] = i
    head = {name: whole[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    last = {"index": 0, "delta": {}, "finish_reason": whole["choices"][0]["finish_reason"]}
    events = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {**head, "choices": [last], "usage": whole["usage"]},
    ]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def _http(status: int, body: str, kind: str = "application/json") -> bytes:
    data = body.encode()
    head = f"HTTP/1.1 {status} Scripted\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + data
