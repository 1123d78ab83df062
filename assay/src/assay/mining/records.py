"""Records of other benchmarks, by their public field names: what each field becomes in a task, or why it is dropped.

Fields are those of the data sets' own cards: GSO and SWE-fficiency in full; ISO-Bench's card and the fields of its
curated set; SWE-Perf by what its own scripts select. A field that is not in the table is dropped and named.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REPOSITORY = re.compile(r"(?:github\.com/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:/pull/\d+)?/?$")
_DATE, _IMAGE = "when the record was made; commits say what is judged", "a container's name; every arm is built here"
_PROMPT = "a prompt's words; templates of their own make prompts"
_HINT = "hints at the reference"
_TIMES = "times of another machine: a claim, which is measured anew"
_PATCH = "its paths; the patch itself lies in reference.patch"


@dataclass(frozen=True)
class Format:
    """One benchmark's records."""

    name: str
    marks: tuple[str, ...]
    """Fields that all of its records have and no other benchmark's."""
    fields: dict[str, tuple[str, str]]
    """Field -> the place in a task that it becomes, "" if it is dropped, and words."""


_SWE = {
    "instance_id": ("name", ""),
    "repo": ("repository.path", ""),
    "base_commit": ("repository.base", ""),
    "patch": ("scope.files", _PATCH),
    "test_patch": ("", "changes of tests: tests are those of base"),
    "created_at": ("", _DATE),
    "version": ("", "a name of an image's release"),
}
FORMATS = (
    Format(
        "GSO",
        ("opt_commit", "prob_script"),
        {
            **{name: _SWE[name] for name in ("instance_id", "repo", "base_commit", "created_at")},
            "opt_commit": ("repository.reference", ""),
            "api": ("about", "which function it is about"),
            "prob_script": ("workload", ""),
            "tests": ("workload", "one for each script"),
            "hints_text": ("", _HINT),
            "setup_commands": ("commands.setup", "run in the sandbox, which has no network"),
            "install_commands": ("commands.build", "run in the sandbox, which has no network"),
            "gt_commit_message": ("", "the reference's message; kept for the audit of what a prompt gives away"),
            "gt_diff": ("scope.files", _PATCH),
            "arch": ("", "of the image"),
            "instance_image_tag": ("", _IMAGE),
        },
    ),
    Format(
        "SWE-fficiency",
        ("workload", "covering_tests"),
        {
            **_SWE,
            "workload": ("workload", ""),
            "covering_tests": ("tests.command", ""),
            "test_cmd": ("tests.command", ""),
            "rebuild_cmd": ("commands.build", ""),
            "speedup": ("about", _TIMES),
            "PASS_TO_PASS": ("", "names of tests that passed there: base's own report says which pass here"),
            "FAIL_TO_PASS": ("", "tests of a mistake; there is none"),
            "problem_statement": ("", _PROMPT),
            "hints_text": ("", _HINT),
            "environment_setup_commit": ("", "of the image"),
            "image_name": ("", _IMAGE),
            "single_thread_tests": ("", "how their harness starts tests"),
        },
    ),
    Format(
        "SWE-Perf",
        ("efficiency_test", "human_performance"),
        {
            **_SWE,
            "head_commit": ("repository.reference", ""),
            "efficiency_test": ("tests.command", "they are timed as a workload, too, as there"),
            "patch_functions": ("about", "which functions the reference changes"),
            "test_functions": ("", "functions that the tests run; coverage says so here"),
            "problem_statement_oracle": ("", _PROMPT),
            "problem_statement_realistic": ("", _PROMPT),
            "duration_changes": ("", _TIMES),
            "human_performance": ("about", _TIMES),
        },
    ),
    Format(
        "ISO-Bench",
        ("commit_hash", "diff_text"),
        {
            "commit_hash": ("repository.reference", "base is its first parent"),
            "repo": ("repository.path", ""),
            "pr_url": ("repository.path", "it names the repository"),
            "commit_subject": ("about", ""),
            "subject": ("about", ""),
            "commit_message": ("", "the reference's message; kept for the audit of what a prompt gives away"),
            "message": ("", "the reference's message; kept for the audit of what a prompt gives away"),
            "diff_text": ("scope.files", _PATCH),
            "files_changed": ("scope.files", "tests, benchmarks and build files among them are dropped"),
            "test_script": ("workload", ""),
            "perf_command": ("workload", "taken where there is no test script"),
            "apis": ("about", "which functions it is about"),
            "functions_changed": ("about", "which functions the reference changes"),
            "stats": ("", "sizes of the diff"),
            "models": ("", "models that must be downloaded; a sandbox has no network"),
            **dict.fromkeys(("has_serving", "has_latency", "has_throughput"), ("", "how their harness measured it")),
            **dict.fromkeys(("has_performance", "uses_lm_eval", "has_general_test"), ("", "how it was curated")),
            **dict.fromkeys(("date", "commit_date", "pr_date"), ("", _DATE)),
            **dict.fromkeys(("timeline_extracted_at", "analysis_extracted_at"), ("", _DATE)),
        },
    ),
)


@dataclass(frozen=True)
class Record:
    """One record, and the line on which it begins."""

    format: Format
    line: int
    values: dict[str, Any]
    lines: dict[str, int]
    """Line of every field."""

    def text(self, *names: str) -> str:
        """The first of the fields that holds text."""
        return next((value for name in names if isinstance(value := self.values.get(name), str) and value.strip()), "")

    def many(self, name: str) -> list[str]:
        """A field that holds texts: a list, the JSON of one, or one text."""
        value = self.values.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.lstrip().startswith("[") else [value]
            except ValueError:
                value = [value]
        return [one for one in value if isinstance(one, str) and one.strip()] if isinstance(value, list) else []

    @property
    def repository(self) -> str:
        """`owner/name`; "" if the record does not say."""
        found = _REPOSITORY.search(self.text("repo", "pr_url"))
        return found[1] if found else ""


def read(file: Path) -> list[Record]:
    """Every record of a file: JSON lines, a JSON array, or one object. ValueError names file and line."""
    text = file.read_text(encoding="utf-8")
    found = [_record(file, text, start, end, value) for start, end, value in _values(file, text)]
    if not found:
        raise ValueError(f"{file}:1: expected records, got none")
    return found


def _values(file: Path, text: str) -> Iterator[tuple[int, int, Any]]:
    """Beginning, end and value of every object."""
    decoder, at = json.JSONDecoder(), 0
    array = text.lstrip().startswith("[")
    at = text.index("[") + 1 if array else 0
    while True:
        while at < len(text) and (text[at].isspace() or (array and text[at] == ",")):
            at += 1
        if at >= len(text) or (array and text[at] == "]"):
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError as problem:
            raise ValueError(f"{file}:{_line(text, at)}: expected JSON, got {problem}") from None
        yield at, end, value
        at = end


def _record(file: Path, text: str, start: int, end: int, value: Any) -> Record:
    line = _line(text, start)
    if not isinstance(value, dict):
        raise ValueError(f"{file}:{line}: expected an object, got {json.dumps(value)[:60]}")
    form = next((one for one in FORMATS if all(mark in value for mark in one.marks)), None)
    if form is None:
        known = "; ".join(f"{one.name}: {', '.join(one.marks)}" for one in FORMATS)
        raise ValueError(f"{file}:{line}: expected fields of a known record ({known}), got {', '.join(value)[:200]}")
    lines = {}
    for name in value:
        at = text.find(json.dumps(name), start, end)
        lines[name] = _line(text, at) if at >= 0 else line
    return Record(form, line, value, lines)


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
