"""Entry of the action: `judge` runs a pull request's code and knows no token, `comment` knows one and runs none.

    python entry.py judge      # ASSAY_TASK, GITHUB_EVENT_PATH, GITHUB_WORKSPACE, ASSAY_OUT
    python entry.py comment    # GITHUB_TOKEN, GITHUB_API_URL, GITHUB_EVENT_PATH, ASSAY_OUT

`judge` writes comment.md and verdict.json into ASSAY_OUT, a summary of the job, and the outputs `outcome` and `status`.
Its exit status is 0 unless the action itself cannot work, so that the comment is written. `comment` ends with 1 where
the workflow asked for it (ASSAY_FAIL: refuted, open or never).
"""

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assay.ci import pull_request
from assay.contract.errors import StoppedError, UsageError
from assay.report import terminal

_PER_PAGE = 100
_FAILS = {"refuted": {1, 4}, "open": {1, 3, 4, 5}, "never": set[int]()}


def judge() -> int:
    """Judges; tells the host what came out."""
    event = pull_request.event(Path(os.environ["GITHUB_EVENT_PATH"]))
    out = Path(os.environ["ASSAY_OUT"])
    sandboxed = os.environ.get("ASSAY_SANDBOX", "true") != "false"
    workspace = Path(os.environ["GITHUB_WORKSPACE"])
    status = pull_request.judge(event, os.environ["ASSAY_TASK"], workspace, out, sandboxed=sandboxed)
    verdict = pull_request.verdict_of(out)
    _append("GITHUB_OUTPUT", f"status={status}\noutcome={verdict['outcome'] if verdict else 'not_judged'}\n")
    _append("GITHUB_STEP_SUMMARY", (out / pull_request.COMMENT).read_text())
    (out / "status").write_text(f"{status}\n")
    return 0


def comment() -> int:
    """Writes the comment, in place of an earlier one for this task. The status that the workflow asked for."""
    event = pull_request.event(Path(os.environ["GITHUB_EVENT_PATH"]))
    out = Path(os.environ["ASSAY_OUT"])
    body = (out / pull_request.COMMENT).read_text()
    if os.environ.get("GITHUB_TOKEN"):
        issues = f"/repos/{event.repository}/issues"
        mark = body.splitlines()[0]
        earlier = _earlier(f"{issues}/{event.number}/comments", mark)
        if earlier is None:
            _call("POST", f"{issues}/{event.number}/comments", {"body": body})
        else:
            _call("PATCH", f"{issues}/comments/{int(earlier)}", {"body": body})
    else:
        terminal.line("no token was given: the comment is in the job's summary alone")
    fails = os.environ.get("ASSAY_FAIL", "refuted")
    if fails not in _FAILS:
        raise UsageError(f"fail-on: expected one of {', '.join(_FAILS)}, got {fails}")
    return int(int((out / "status").read_text()) in _FAILS[fails])


def _earlier(path: str, mark: str) -> int | None:
    """The number of our earlier comment; only what a bot wrote counts, since anybody can write the mark."""
    page = 1
    while True:
        found: list[dict[str, Any]] = _call("GET", f"{path}?per_page={_PER_PAGE}&page={page}")
        for one in found:
            if one["body"].startswith(mark) and one["user"]["type"] == "Bot":
                return int(one["id"])
        if len(found) < _PER_PAGE:
            return None
        page += 1


def _call(method: str, path: str, content: Any = None) -> Any:
    """One request to the host's API."""
    request = urllib.request.Request(  # noqa: S310 - the host's own address
        os.environ.get("GITHUB_API_URL", "https://api.github.com") + path,
        data=None if content is None else json.dumps(content).encode(),
        method=method,
        headers={
            "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}",
            "Accept": "application/vnd.github+json",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
        return json.loads(reply.read() or b"null")


def _append(name: str, text: str) -> None:
    """Adds to a file that the host reads, if there is one."""
    if place := os.environ.get(name):
        with Path(place).open("a") as file:
            file.write(text)


STEPS: dict[str, Callable[[], int]] = {"judge": judge, "comment": comment}

if __name__ == "__main__":
    try:
        sys.exit(STEPS[sys.argv[1]]())
    except StoppedError as problem:
        sys.exit(f"assay: {problem}")
