"""From records and prompts of other benchmarks to tasks, with a word about everything that was dropped."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from assay.contract.mined import Part
from assay.mining import functions, history, new
from assay.mining import prompt as prompts
from assay.mining.draft import Draft, named
from assay.mining.records import Record
from assay.repository.lines import parsed

PATCH = "reference.patch"
_LONGEST = 90
_RUN = '''"""{words}

{how}
"""

{body}'''


def task_of(record: Record, file: Path, repositories: Path, folder: Path) -> tuple[Draft, Path, list[Part]]:
    """Writes a record's task into a folder of its own; the draft, its file and what became of all fields.

    Clones are looked for in `repositories`, as owner+name.git, owner+name, name.git, name or owner/name.
    ValueError for a record without what a task must have.
    """
    name = named(
        record.text("instance_id") or f"{record.repository.replace('/', '__')}-{record.text('commit_hash')[:9]}"
    )
    reference = record.text("opt_commit", "head_commit", "commit_hash")
    base = record.text("base_commit") or (f"{reference}~1" if reference else "")
    if not record.repository or not base:
        lack = "repo or pr_url" if not record.repository else "base_commit or commit_hash"
        raise ValueError(f"{file}:{record.line}: expected a record with {lack}, got none")
    place = folder / name
    clone = _clone(repositories, record.repository)
    draft = Draft(name, os.path.relpath(clone, place.resolve()), base, reference)
    if not clone.is_dir():
        draft.unknown.append(f"repository.path: no clone of {record.repository}; put it there, with its history")
    _scope(draft, record)
    _commands(draft, record)
    _workloads(draft, record)
    draft.about = [f"{record.format.name}, from {file.name}:{record.line}.", *_about(record)]
    parts = list(_parts(record))
    return draft, draft.write(place, record.format.name, f"{file.name}:{record.line}", parts), parts


def _clone(repositories: Path, name: str) -> Path:
    owner, _, short = name.partition("/")
    ways = [f"{owner}+{short}.git", f"{owner}+{short}", f"{short}.git", short, name]
    found = [repositories.resolve() / way for way in ways]
    return next((path for path in found if path.is_dir()), found[0])


def _scope(draft: Draft, record: Record) -> None:
    patch = record.text("gt_diff", "patch", "diff_text")
    paths = [*record.many("files_changed"), *parsed(patch)]
    draft.scope = sorted({path for path in paths if history.is_source(path)})
    if patch.strip():
        draft.files[PATCH] = patch if patch.endswith("\n") else f"{patch}\n"
    if not draft.scope:
        draft.unknown.append("scope.files: the record names no source that may change; anything may")
    modules = sorted({functions.module_of(path).partition(".")[0] for path in draft.scope if path.endswith(".py")})
    draft.unknown.append(f"api.packages: {', '.join(modules) or 'none'} by the patch's paths; not compared until named")
    if not draft.reference:
        draft.unknown.append(f"repository.reference: no commit is named; `assay admit --patch {PATCH}` takes it")


def _commands(draft: Draft, record: Record) -> None:
    draft.setup = [["sh", "-c", line] for line in record.many("setup_commands")]
    builds = record.many("install_commands") or record.many("rebuild_cmd")
    draft.build = [["sh", "-c", line] for line in builds]
    tests = record.many("covering_tests") or record.many("efficiency_test")
    command = shlex.split(record.text("test_cmd")) or ["python", "-m", "pytest", "-q"]
    if tests:
        draft.tests = [*command, *tests]
    else:
        draft.unknown.append("tests.command: the record names no tests")


def _workloads(draft: Draft, record: Record) -> None:
    scripts = {"script": record.text("prob_script", "workload", "test_script")}
    scripts |= {f"test-{i}": text for i, text in enumerate(record.many("tests") if record.format.name == "GSO" else [])}
    for name, text in scripts.items():
        if text:
            script(draft, name, text)
    if record.many("efficiency_test"):
        command = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *record.many("efficiency_test")]
        draft.workloads.append({"name": "tests", "run": {"kind": "command", "command": command}})
        draft.unknown.append("workload tests: unit tests are timed, as there; they may be no workload")
    if not draft.workloads and record.text("perf_command"):
        run = {"kind": "command", "command": ["sh", "-c", record.text("perf_command")]}
        draft.workloads.append({"name": "command", "run": run})
    if not draft.workloads:
        draft.files["driver.py"] = "def run(*given):\n    raise NotImplementedError('fill in what is timed')\n"
        draft.workloads.append({"name": "to-fill-in", "run": {"kind": "call", "target": "driver.py:run"}})
        draft.unknown.append("workload: the record has no script and no command")


def script(draft: Draft, name: str, text: str) -> None:
    """A workload that runs a script of somebody's, in a file of the task.

    A script with `setup` and `experiment` is called by those, and what the experiment returns is compared. Any other is
    run as it is, for every call, and returns nothing.
    """
    file = f"{name.replace('-', '_')}.py"
    run: dict[str, object] = {"kind": "call", "target": f"{file}:assay_run", "constant": True}
    if re.search(r"^def setup\(", text, re.M) and re.search(r"^def experiment\(", text, re.M):
        body = f"{text.rstrip()}\n\n\nASSAY_GIVEN = setup()\n\n\ndef assay_run():\n    return experiment(ASSAY_GIVEN)\n"
        draft.files[file] = body
        draft.unknown.append(f"workload {name}: whether what `experiment` returns can be compared")
    else:
        how = "Run as it is; it returns nothing, so outputs are compared by properties alone, which are to be written."
        quoted = f"SCRIPT = {text!r}\n\n\ndef assay_run():\n    "
        quoted += 'exec(compile(SCRIPT, "script", "exec"), {"__name__": "__main__"})\n'
        draft.files[file] = _RUN.format(words="A script of the record.", how=how, body=quoted)
        run["compare"] = False
        draft.unknown.append(f"workload {name}: what is right: the script returns nothing that could be compared")
    draft.workloads.append({"name": name, "run": run})


def _about(record: Record) -> Iterator[str]:
    for name, value in record.values.items():
        if record.format.fields.get(name, ("", ""))[0] == "about" and value not in (None, "", []):
            yield f"{name}: {_short(value)}"


def _parts(record: Record) -> Iterator[Part]:
    for name, value in record.values.items():
        became, words = record.format.fields.get(name, ("", "no field of these records that is known here"))
        if value in (None, "", [], {}):
            became, words = "", "empty"
        elif name == "perf_command" and record.text("test_script"):
            became, words = "", "the test script is the workload"
        line = record.lines[name]
        yield Part(name, line, line, became, words or _short(value))


def _short(value: object) -> str:
    words = " ".join(str(value).split())
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 3]}..."


def of_prompt(file: Path, repository: Path, revision: str, folder: Path) -> tuple[Draft, Path, list[Part]]:
    """Writes the task of a rendered prompt whose repository and reference commit are known; as `task_of`."""
    given = prompts.read(file)
    one = history.commit(repository, revision)
    sources = [path for path in given.targets if history.is_source(path)]
    if not sources:
        raise ValueError(f"{file}:1: expected targets that are sources, got {', '.join(given.targets) or 'none'}")
    draft = new.drafted(repository, one, sorted(sources), folder, named(file.stem))
    draft.about.insert(0, f"From the prompt {file.name}.")
    for number, piece in enumerate(given.of("script")):
        script(draft, f"script-{number}" if number else "script", piece.text)
    draft.unknown += [f"{file.name}:{piece.first}: the prompt {piece.text}" for piece in given.wrong]
    parts = prompts.parts(given)
    return draft, draft.write(folder, "prompt", file.name, parts), parts
