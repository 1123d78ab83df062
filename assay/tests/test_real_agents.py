"""Two published agents against a scripted provider, in the sandbox; four more as far as their --help goes.

They are looked for in the folder that ASSAY_AGENTS names; `make agents` installs them there. Each test skips, and says
why, where its agent is not installed.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent_parts import KEY, provider, reply
from assay.agents import record, template
from assay.agents.redaction import Redactor
from small_project import assay, project

pytestmark = pytest.mark.full
FOLDER = Path(os.environ.get(template.INSTALL, "~/.cache/assay/agents")).expanduser()
EDIT = "    if base == 2:\n        return (n - 1) * n * (2 * n - 1) // 6\n    return sum(i**base for i in range(n))\n"
LOOP = "    total = 0\n    for i in range(n):\n        total = total + i**base\n    return total\n"
WRITE = f"cat > pkg/__init__.py <<'END'\ndef work(n, base=2):\n{EDIT}END\necho mine > model_patch.diff"
SEARCH = f"pkg/__init__.py\n```python\n<<<<<<< SEARCH\n{LOOP}=======\n{EDIT}>>>>>>> REPLACE\n```\n"
END = reply(bash="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
SCRIPTS = {
    "mini-swe-agent": (reply(bash="ls"), reply(bash=WRITE), reply(bash="/assay/measure/squares"), END),
    "aider": (reply(say="I have to see pkg/__init__.py first."), reply(say=SEARCH), reply(say="I am done.")),
}
OPTIONS = {  # the option that help must name, of each argument that a template gives
    "claude-code": ("claude", ("--help",)),
    "codex": ("codex", ("exec", "--help")),
    "gemini-cli": ("gemini", ("--help",)),
    "openhands": ("openhands", ("--help",)),
}


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def program(name: str) -> str:
    found = template.read(name).agent.command.argv[0]
    if not Path(found).exists():
        pytest.skip(f"{name} is not installed in {FOLDER}: make agents")
    return found


def ran(folder: Path, name: str, replies: tuple[str, ...], status: int = 0, seconds: int = 120) -> dict[str, Any]:
    program(name)
    with provider(folder, *replies) as options:
        command = ["agent", "run", project(folder), "--agent", name, "--out", folder / "run", "--json"]
        done = assay(*command, "--seconds", str(seconds), "--set", "model=openai/scripted", *options)
    assert done.returncode == status, done.stderr + done.stdout
    for path in record.paths(folder / "run"):
        assert Redactor([KEY]).clean(path.read_bytes())[1] == 0, path
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.sandbox
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_it_edits_measures_and_ends(name: str, tmp_path: Path) -> None:
    found = ran(tmp_path, name, SCRIPTS[name])
    assert found["outcome"] == "finished" and found["patch"]["files"] == ["pkg/__init__.py"], found
    assert found["used"]["tokens"] > 0 and found["network"]["connections"] >= 2
    output = (tmp_path / "run" / record.OUTPUT).read_text()
    assert "faster: the interval lies above 0" in output or "void:" in output, output[-3000:]
    assert "seed " in output and "return sum(i**base" in (tmp_path / "run" / record.PATCH).read_text()


@pytest.mark.sandbox
@pytest.mark.parametrize("name", sorted(SCRIPTS))
@pytest.mark.parametrize("failure", [{"status": 429}, {"stall_s": 600.0}], ids=["429", "stall"])
def test_a_provider_that_fails(name: str, failure: dict[str, float], tmp_path: Path) -> None:
    found = ran(tmp_path, name, (reply(**failure),), status=3, seconds=25)
    assert found["outcome"] == "infra.provider" and not found["patch"]["files"], found["words"]


@pytest.mark.sandbox
def test_another_host(tmp_path: Path) -> None:
    ask = "python -c \"import urllib.request as u; u.urlopen('https://example.org/')\"; "
    ask += "curl -m 3 https://example.net; true"
    found = ran(tmp_path, "mini-swe-agent", (reply(bash=ask), END))
    assert found["outcome"] == "finished" and "example.org:443" in found["network"]["refused"]
    assert "example.net:443" in found["network"]["refused"]


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options_are_those_of_help(name: str, tmp_path: Path) -> None:
    path, arguments = program(name), OPTIONS[name][1]
    environment = {**os.environ, "HOME": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    known = set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    for one in template.read(name).agent.command.argv[1:]:
        option = one.partition("=")[0]
        assert not option.startswith("--") or option in known, f"{option}: {sorted(known)}"


@pytest.mark.sandbox
@pytest.mark.parametrize("name", ["claude-code", "codex", "gemini-cli", "openhands"])
def test_it_starts_in_the_sandbox(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a provider that cannot be reached the run is nobody's fault, and no other host is let through."""
    program(name)
    for key in template.read(name).agent.environment.keys:
        monkeypatch.setenv(key, KEY)
    command = ["agent", "run", project(tmp_path), "--agent", name, "--out", tmp_path / "run", "--json"]
    done = assay(*command, "--seconds", "25", "--set", "host=127.0.0.1:9")
    found = json.loads(done.stdout)
    output = (tmp_path / "run" / record.OUTPUT).read_text()
    assert found["outcome"] != "infra.command" and found["network"]["refused"], (found, output)
    assert not found["patch"]["files"] and Redactor([KEY]).clean(output.encode())[1] == 0
