"""An agent of a few lines for tests, its template, and the scripted provider on loopback."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from small_project import environment

KEY = "sk-planted-0Aq7Zt9xWv3LmB5d"
AGENT = r'''
"""Asks its provider what to do, does it in a shell, and asks again, until it hears `done`."""
import json, os, subprocess, sys, urllib.request
prompt = sys.stdin.read()
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}]}).encode()
while True:
    head = {"Authorization": "Bearer " + os.environ["THE_KEY"], "Content-Type": "application/json"}
    try:
        asked = urllib.request.Request(os.environ["BASE"] + "/chat/completions", body, head)
        with urllib.request.urlopen(asked) as found:
            reply = json.load(found)
    except urllib.error.HTTPError as problem:
        sys.exit(f"ProviderError: {problem.code}")
    print("Tokens:", reply["usage"]["total_tokens"], "Cost: $0.5", flush=True)
    message = reply["choices"][0]["message"]
    if not message.get("tool_calls"):
        break
    command = json.loads(message["tool_calls"][0]["function"]["arguments"])["command"]
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
'''
TEMPLATE = """schema = 1
name = "small"
left = ["*.history"]
keeps = ["notes/said.txt"]

[variables]
base = ""
host = ""

[command]
argv = [{python}, {program}]
prompt = "stdin"

[environment]
keys = ["THE_KEY"]
set = {{BASE = "{{base}}"}}

[network]
hosts = ["{{host}}"]

[budget]
seconds = 60.0

[usage]
tokens = {{pattern = 'Tokens: (\\d+)'}}
money = {{pattern = 'Cost: \\$([\\d.]+)'}}

[sandbox]
readable = [{folder}]
home = {{"notes/given.txt" = "given"}}

[provider]
errors = ["ProviderError: \\\\d+"]
"""


def agent(folder: Path, **edits: str) -> Path:
    """The template in a file, its program beside it. `edits`: lines that replace those that begin alike."""
    (folder / "agent").mkdir(exist_ok=True)
    program = folder / "agent" / "agent.py"
    program.write_text(AGENT)
    given = {"python": sys.executable, "program": program, "folder": folder / "agent"}
    text = TEMPLATE.format(**{name: json.dumps(str(value)) for name, value in given.items()})
    for name, value in edits.items():
        lines = [f"{name} = {value}" if line.startswith(f"{name} = ") else line for line in text.splitlines()]
        assert "\n".join(lines) + "\n" != text, name
        text = "\n".join(lines) + "\n"
    (folder / "agent.toml").write_text(text)
    return folder / "agent.toml"


def reply(**fields: object) -> str:
    """A reply of a script, as TOML."""
    return "[[reply]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())


@contextlib.contextmanager
def provider(folder: Path, *replies: str) -> Iterator[list[str]]:
    """A scripted provider; options of `agent run` that lead to it."""
    script = folder / f"script-{len(list(folder.glob('script-*')))}.toml"
    script.write_text("schema = 1\n" + "".join(replies))
    command = [sys.executable, "-m", "assay", "agent", "serve", str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        assert server.stdout is not None
        try:
            given = json.loads(server.stdout.readline())
            yield ["--set", f"base={given['base']}", "--set", f"host={given['host']}"]
        finally:
            server.kill()
