"""Agents are read strictly: errors name file and line; what is filled in; the ready templates."""

from pathlib import Path

import jsonschema
import pytest

from agent_parts import agent
from assay.__main__ import main
from assay.agents import template
from assay.agents.budget import used
from assay.agents.template import Reported, Usage
from assay.contract.errors import UsageError


def line_of(file: Path, words: str) -> int:
    return next(i for i, line in enumerate(file.read_text().splitlines(), 1) if words in line)


@pytest.mark.parametrize(
    ("old", "new", "at", "words"),
    [
        ("schema = 1", "schema = 2", "schema", "schema: Input should be 1"),
        ('name = "small"', 'name = "a b"', "name =", "name: String should match"),
        ("seconds = 60.0", "seconds = -1", "seconds", "budget.seconds: Input should be greater than 0"),
        ("seconds = 60.0", "secnds = 60.0", "secnds", "budget.secnds: expected a name that agents have"),
        ("seconds = 60.0", "tokens = 0", "tokens = 0", "budget.tokens: Input should be greater than 0"),
        ('hosts = ["{host}"]', 'hosts = ["everywhere"]', "hosts", "network.hosts.0: expected host:port"),
        ('hosts = ["{host}"]', 'hosts = ["a.example:99999"]', "hosts", "network.hosts.0: expected host:port"),
        ('prompt = "stdin"', 'prompt = "argument"', "prompt =", "expected {prompt} in argv if and only if"),
        ('prompt = "stdin"', 'prompt = "file"', "prompt =", "expected {prompt_file} in argv if and only if"),
        (
            "tokens = {pattern = 'Tokens: (\\d+)'}",
            "tokens = {pattern = '('}",
            "tokens",
            "expected a regular expression",
        ),
        ("tokens = {pattern = 'Tokens: (\\d+)'}", "tokens = {pattern = 'x'}", "tokens", "expected a group that is"),
        ('keys = ["THE_KEY"]', 'keys = ["BASE"]', "keys", "expected a key to stand there alone, got BASE twice"),
        ('keys = ["THE_KEY"]', 'keys = ["A-B"]', "keys", "environment.keys.0: String should match"),
        ('"notes/given.txt"', '"../given.txt"', "home", "expected a path below HOME"),
        ('keeps = ["notes/said.txt"]', 'keeps = ["/etc/passwd"]', "keeps", "expected a path below HOME"),
        ('base = ""', 'base = ""\ntree = "x"', "tree", "expected another name: assay fills this one in"),
    ],
)
def test_errors_name_file_and_line(old: str, new: str, at: str, words: str, tmp_path: Path) -> None:
    file = agent(tmp_path)
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UsageError) as error:
        template.read(str(file), {"host": "a.example:1"})
    assert f"{file}:{line_of(file, at)}: " in str(error.value) and words in str(error.value), error.value


def test_a_budget_needs_a_report(tmp_path: Path) -> None:
    file = agent(tmp_path)
    line = "money = {pattern = 'Cost: \\$([\\d.]+)'}\n"
    assert line in file.read_text()
    file.write_text(file.read_text().replace(line, "").replace("seconds = 60.0", "money = 1.0"))
    with pytest.raises(UsageError, match=r"budget.money: expected usage.money with it"):
        template.read(str(file), {"host": "a.example:1"})


def test_variables_are_part_of_the_identity(tmp_path: Path) -> None:
    file = str(agent(tmp_path))
    one, other = (template.read(file, {"host": host}) for host in ("a.example:1", "b.example:1"))
    assert one.digest != other.digest and one.agent.network.hosts == ("a.example:1",)
    assert template.read(file, {"host": "a.example:1"}) == one
    with pytest.raises(UsageError, match="--set: expected one of base, host, got nothing"):
        template.read(file, {"nothing": "x"})
    with pytest.raises(UsageError, match="--agent: expected a file or one of aider"):
        template.read("nothing")


@pytest.mark.parametrize("name", ["aider", "claude-code", "codex", "gemini-cli", "mini-swe-agent", "openhands"])
def test_ready_templates(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = template.read(name).agent
    assert name in template.ready() and found.name == name and found.environment.keys and found.network.hosts
    assert found.provider.errors and found.about and not any("{install}" in one for one in found.sandbox.readable)
    assert main(["agent", "check", name]) == 0 and f"{name} " in capsys.readouterr().out
    assert main(["agent", "list"]) == 0 and f"{name}: " in capsys.readouterr().out


def test_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema.Draft202012Validator.check_schema(template.json_schema())
    assert main(["schema", "agent"]) == 0 and '"assay-agent-1"' in capsys.readouterr().out


def test_what_an_agent_reports(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"total": 5}, {"total": 7, "cost": 0.25}')
    (tmp_path / "out").symlink_to("/etc")
    said = b"Tokens: 2.1k sent, 300 received.\nTokens: 1,000 sent, 2M received.\n"
    tokens = Reported(r"Tokens: ([\d.,]+[kM]?) sent, ([\d.,]+[kM]?) received")
    assert used(Usage(tokens), said, tmp_path).tokens == 2100 + 300 + 1000 + 2e6
    assert used(Usage(tokens), b"", tmp_path).tokens is None and used(Usage(), said, tmp_path).tokens is None
    assert used(Usage(Reported(r'"total": (\d+)', "t.json")), said, tmp_path).tokens == 12
    assert used(Usage(money=Reported(r'"cost": ([\d.]+)', "t.json", "last")), said, tmp_path).money == 0.25
    assert used(Usage(Reported(r"x:(\d+)", "out/passwd")), said, tmp_path).tokens is None
