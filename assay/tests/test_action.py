"""The action: a pull request of a local repository is judged by base's task, and a real server is sent the comment."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from assay.arms import sandbox
from assay.ci import pull_request
from assay.contract.errors import UsageError
from small_project import BASE, FASTER, INPUTS, STRATEGIES, TASK, TESTS, files, git

ACTION = Path(__file__).parents[1] / "action"
TOKEN = "t0ken-that-nobody-else-knows"
LEAKS = "import os, sys\nif any({0!r} in value for value in os.environ.values()):\n    raise RuntimeError({0!r})\n"


class Host:
    """A host's API for comments, as far as the action uses it."""

    def __init__(self) -> None:
        self.comments: list[dict[str, Any]] = []
        self.seen: list[tuple[str, str, str]] = []
        host = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                host.seen.append((self.command, self.path, self.headers["Authorization"]))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"null")
                found: Any = None
                if self.command == "GET":
                    page = int(re.search(r"[?&]page=(\d+)", self.path)[1])  # type: ignore[index]
                    found = host.comments[100 * (page - 1) : 100 * page]
                elif self.command == "POST":
                    found = {"id": len(host.comments) + 1, "body": body["body"], "user": {"type": "Bot"}}
                    host.comments.append(found)
                else:
                    host.comments[int(self.path.rpartition("/")[2]) - 1]["body"] = body["body"]
                text = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = answer  # noqa: N815 - the standard library's names
            do_POST = answer  # noqa: N815
            do_PATCH = answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def host() -> Iterator[Host]:
    found = Host()
    yield found
    found.end()


def pull(folder: Path, contents: dict[str, str]) -> Path:
    """A repository with a task, a pull request's branch and a base that went on; the event's file."""
    repo = folder / "repo"
    files(repo, {"pkg/__init__.py": BASE, "tests/test_work.py": TESTS})
    task = TASK.replace('path = "repo"', 'path = ".."')
    files(repo, {"perf/task.toml": task, "perf/inputs.py": INPUTS, "perf/strategies.py": STRATEGIES})
    git(repo, "init", "--quiet", "--initial-branch=main")
    git(repo, "add", "--all")
    git(repo, "commit", "-m", "base")
    git(repo, "checkout", "--quiet", "-b", "change")
    files(repo, contents)
    git(repo, "add", "--all")
    git(repo, "commit", "-m", "change")
    head = git(repo, "rev-parse", "HEAD")
    git(repo, "checkout", "--quiet", "main")
    files(repo, {"pkg/other.py": "x = 1\n"})
    git(repo, "add", "--all")
    git(repo, "commit", "-m", "base went on")
    content = {"number": 7, "base": {"sha": git(repo, "rev-parse", "HEAD")}, "head": {"sha": head}}
    content["title"] = "<script>faster</script>"
    event = {"pull_request": content, "repository": {"full_name": "some/where"}}
    (folder / "event.json").write_text(json.dumps(event))
    return folder / "event.json"


def step(name: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    given = {
        **{one: os.environ[one] for one in ("PATH", "HOME") if one in os.environ},
        "PYTHONPATH": os.pathsep.join(sys.path),
        "GITHUB_EVENT_PATH": str(folder / "event.json"),
        "GITHUB_WORKSPACE": str(folder / "repo"),
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_STEP_SUMMARY": str(folder / "summary"),
        "ASSAY_TASK": "perf/task.toml",
        "ASSAY_OUT": str(folder / "out"),
        "ASSAY_SANDBOX": "false" if sandbox.refusal() else "true",
    }
    command = [sys.executable, str(ACTION / "entry.py"), name]
    return subprocess.run(command, env={**given, **more}, capture_output=True, text=True, check=False)


def test_a_pull_request_is_judged_and_commented(tmp_path: Path, host: Host) -> None:
    """Against the common ancestor, by base's task; a second run changes the comment."""
    easier = TASK.replace('path = "repo"', 'path = ".."').replace("delta = 0.02", "delta = 0.9")
    pull(tmp_path, {"pkg/__init__.py": FASTER, "perf/task.toml": easier})
    done = step("judge", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads((tmp_path / "out/verdict.json").read_text())
    assert verdict["task"]["delta"] == 0.02  # not the pull request's own
    assert verdict["words"] == ["perf/task.toml: outside the task's scope"]
    assert "pkg/other.py" not in verdict["patch"]["changed"]  # by which base went on
    assert (tmp_path / "output").read_text() == "status=1\noutcome=out_of_scope\n"
    body = (tmp_path / "out/comment.md").read_text()
    assert body.startswith("<!-- assay: perf/task.toml -->\n## sums: out_of_scope\n")
    assert body == (tmp_path / "summary").read_text() and "script" not in body
    asked = {"GITHUB_TOKEN": TOKEN, "GITHUB_API_URL": host.address}
    assert step("comment", tmp_path, **asked).returncode == 1 and [one["body"] for one in host.comments] == [body]
    host.comments.insert(0, {"id": 1, "body": body, "user": {"type": "User"}})  # anybody can write the mark
    host.comments[1] |= {"id": 2, "body": f"{body.splitlines()[0]}\nof an earlier run"}
    assert step("comment", tmp_path, **asked, ASSAY_FAIL="never").returncode == 0
    assert [one["body"] for one in host.comments] == [body, body]
    assert {one[2] for one in host.seen} == {f"Bearer {TOKEN}"}
    assert [one[0] for one in host.seen] == ["GET", "POST", "GET", "PATCH"]
    assert host.seen[0][1] == "/repos/some/where/issues/7/comments?per_page=100&page=1"
    assert "no token was given" in step("comment", tmp_path, ASSAY_FAIL="never").stdout and len(host.seen) == 4


@pytest.mark.full
def test_a_pull_request_that_is_faster(tmp_path: Path, host: Host) -> None:
    """Its code ends with an error if the token reaches it, whatever the variable is called."""
    pull(tmp_path, {"pkg/__init__.py": LEAKS.format(TOKEN) + FASTER})
    done = step("judge", tmp_path, GITHUB_TOKEN=TOKEN, SOME_CREDENTIAL=TOKEN)
    assert done.returncode == 0 and (tmp_path / "output").read_text() == "status=0\noutcome=faster\n", done.stderr
    done = step("comment", tmp_path, GITHUB_TOKEN=TOKEN, GITHUB_API_URL=host.address)
    (one,) = host.comments
    assert done.returncode == 0 and "sums: faster" in one["body"] and "what the task requires was shown" in one["body"]


def test_a_comment_that_cannot_be_made(tmp_path: Path) -> None:
    """Words of commands and events are escaped, and say what was expected."""
    pull(tmp_path, {"pkg/__init__.py": FASTER})
    done = step("judge", tmp_path, ASSAY_TASK="../outside.toml")
    assert done.returncode == 1 and "assay: task: expected a file of the base commit" in done.stderr
    event = json.loads((tmp_path / "event.json").read_text())
    for change, words in (
        ({"number": "7; rm"}, "expected a number and two commits"),
        ({"head": {"sha": "--all"}}, "expected a number and two commits"),
        ({"base": {}}, "expected that of a pull request"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**event, "pull_request": {**event["pull_request"], **change}}))
        with pytest.raises(UsageError, match=words):
            pull_request.event(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(json.dumps({**event, "repository": {"full_name": "a/b/../c"}}))
    with pytest.raises(UsageError, match="expected owner/name"):
        pull_request.event(tmp_path / "bad.json")
    found = pull_request.event(tmp_path / "event.json")
    with pytest.raises(UsageError, match=r"expected the commits of the pull request .*fetch-depth: 0"):
        pull_request.judge(replace(found, head="1" * 40), "perf/task.toml", tmp_path / "repo", tmp_path / "out")
    text = pull_request.comment(found, "t<b>--> x.toml", "0" * 40, None, tmp_path, "\x1b[1m# <script>\n| a |", 3)
    assert not [letter for letter in text if not letter.isprintable() and letter != "\n"]
    assert "<script" not in text.replace(r"\<", "") and not any(
        line.startswith(("|", "# ")) for line in text.splitlines()
    )
    assert text.splitlines()[0].count("-->") == 1 and text.splitlines()[0].endswith("-->")


def test_the_action_gives_the_token_to_one_step_alone() -> None:
    """Read as text: the step that judges has neither the token nor the whole context."""
    text = (ACTION / "action.yml").read_text()
    steps = text.split("    - name: ")[1:]
    assert [one.partition("\n")[0] for one in steps] == ["install", "judge", "comment"]
    assert ["inputs.token" in one or "github.token" in one for one in steps] == [False, False, True]
    assert 'entry.py" judge' in steps[1] and 'entry.py" comment' in steps[2] and "secrets." not in text
    for one in steps:  # what a workflow gives reaches the shell as variables, never as text of a script
        assert "${{" not in one.partition("run:")[2]
    declared = set(re.findall(r"^  ([\w-]+):\n    description", text, flags=re.MULTILINE))
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == declared - {"outcome", "status"}


def test_what_the_judge_is_told() -> None:
    given = {"PATH": "/bin", "GITHUB_TOKEN": "x", "AWS_ACCESS_KEY_ID": "x", "MY_PASSWORD": "x", "LANG": "C"}
    assert pull_request.without_secrets(given) == {"PATH": "/bin", "LANG": "C"}
