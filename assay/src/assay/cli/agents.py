"""The command agent: list and check agents, run one on a task, and serve a scripted provider for dry runs."""

import argparse
import json
from pathlib import Path

from assay.cli.command import Command
from assay.contract.errors import Status, UsageError
from assay.report import terminal
from assay.report.terminal import Progress

_DESCRIPTION = (
    "An agent is a TOML file: how its program is started, which hosts it may reach, its keys and its budget. "
    "It runs in a scrubbed copy of the task's base, in a sandbox whose only way out is the judge's proxy. The patch is "
    "the judge's own comparison of files, made when nothing of the agent runs any more."
)
_RUN = "run an agent on a task; judge its patch with: assay judge TASK --patch OUT/patch.diff"
_EPILOG = (
    "Exit status of run: 0 the agent's work can be judged, whatever its end; 2 wrong usage; 3 the provider, the "
    "network or the sandbox failed, which never counts against an agent."
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("list", help="templates that come with assay")
    check = what.add_parser("check", help="read an agent strictly and say what it would run")
    check.add_argument("agent", metavar="AGENT", help="a TOML file, or the name of a ready template")
    _set(check)
    run = what.add_parser("run", help=_RUN, description=f"{_RUN[0].upper()}{_RUN[1:]}", epilog=_EPILOG)
    run.add_argument("task", type=Path, metavar="TASK", help="a task's TOML file")
    run.add_argument("--agent", required=True, metavar="AGENT", help="a TOML file, or the name of a ready template")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run; a finished one is kept")
    run.add_argument("--template", default="default", metavar="NAME", help="of the prompt (%(default)s)")
    run.add_argument("--seconds", type=float, help="less time than the agent's own budget")
    run.add_argument("--number", type=int, default=1, help="of this attempt, for the record (%(default)s)")
    run.add_argument("--json", action="store_true", help="print run.json")
    _set(run)
    serve = what.add_parser("serve", help="serve a scripted OpenAI-compatible provider on loopback")
    serve.add_argument("script", type=Path, metavar="SCRIPT", help="TOML: [[reply]] with say, bash, status, stall_s")
    serve.add_argument("--port", type=int, default=0, help="0: any free one, which is printed (%(default)s)")


def _set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the template")


def _variables(given: argparse.Namespace) -> dict[str, str]:
    pairs = [one.partition("=") for one in given.set]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise UsageError(f"--set: expected NAME=VALUE, got {wrong[0]}")
    return {name: value for name, _, value in pairs}


def _agent(given: argparse.Namespace, progress: Progress) -> int:
    from assay.agents import template

    if given.what == "serve":
        return _serve(given)
    if given.what == "list":
        for name in template.ready():
            about = template.read(name).agent.about.strip().splitlines()
            terminal.line(f"{name}: {about[0]}")
        return 0
    if given.what == "run":
        return _run(given, progress)
    found = template.read(given.agent, _variables(given))
    agent = found.agent
    hosts = ", ".join(agent.network.hosts) or "nothing"
    terminal.line(f"{agent.name} {found.digest}: {' '.join(agent.command.argv)}")
    terminal.line(
        f"prompt: {agent.command.prompt}; reaches: {hosts}; keys: {', '.join(agent.environment.keys) or 'none'}"
    )
    return 0


def _run(given: argparse.Namespace, progress: Progress) -> int:
    import os

    from assay.agents import measure, record, running, template
    from assay.agents.outcome import Outcome
    from assay.arms.sandbox import PLACE
    from assay.contract import task
    from assay.prompts.render import render

    read = task.read(given.task)
    agent = running.limited(template.read(given.agent, _variables(given)), given.seconds)
    seconds = agent.agent.budget.seconds
    prompt = render(read, given.template, tree=str(PLACE), seconds=seconds, measure=measure.offered(read))
    order = running.Order(read, agent, prompt, running.secrets_of(agent.agent, os.environ), given.number)
    found = running.run(order, given.out, progress.told)
    progress.end()
    if given.json:
        terminal.document(found)
    else:
        used, patch = found["used"], found["patch"]
        terminal.line(f"{found['outcome']}: {found['words']}")
        terminal.line(
            f"{used['seconds']:.0f} s, tokens: {_known(used['tokens'])}, money: {_known(used['money'])}; "
            f"{len(patch['files'])} files changed, {patch['bytes']} bytes: {given.out / record.PATCH}"
        )
        for host in dict.fromkeys(found["network"]["refused"]):
            terminal.line(f"refused: {host}, which the template does not name")
    return Status.INFRASTRUCTURE if Outcome(found["outcome"]).infra else Status.SHOWN


def _known(value: float | None) -> str:
    return "not reported" if value is None else f"{value:g}"


def _serve(given: argparse.Namespace) -> int:
    import asyncio

    from assay.agents import server

    replies = server.script(given.script)

    async def serve() -> None:
        listening = await asyncio.start_server(server.Server(replies).accept, "127.0.0.1", given.port, limit=1 << 20)
        port = listening.sockets[0].getsockname()[1]
        terminal.line(json.dumps({"base": f"http://127.0.0.1:{port}/v1", "host": f"127.0.0.1:{port}"}))
        async with listening:
            await listening.serve_forever()

    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        return Status.SHOWN
    return Status.SHOWN


AGENT = Command(
    "agent",
    "list, check and run agents",
    _arguments,
    _agent,
    description=_DESCRIPTION,
    epilog=_EPILOG,
    installs=("pydantic", "griffe", "jinja2"),
    extra="agents",
)
