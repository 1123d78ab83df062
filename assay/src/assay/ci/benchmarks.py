"""Benchmarks of a working tree against those of an earlier commit, one after another."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from assay.contract import foreign, seeds
from assay.contract.errors import ArmError, MeasurementError
from assay.contract.outcome import NOTHING
from assay.contract.workload import Plan, Workload, fraction
from assay.experiment.series import run
from assay.report import page, terminal
from assay.repository import checkout

_CALLS_S = 600.0


@dataclass(frozen=True)
class Seen:
    """What became of a benchmark."""

    lines: list[str]
    """Escaped: a candidate's words may be among them."""
    fails: bool = False
    skips: bool = False
    """Nothing was shown, and nobody is to blame."""


class Benchmarks:
    """Two trees, and how their benchmarks are judged."""

    def __init__(
        self,
        *,
        base: str,
        delta: str,
        setup: str,
        out: str,
        most_foreign: float,
        here: Path,
        files: Sequence[Path],
        count: int,
    ) -> None:
        """Writes out the commit and a copy of the working tree.

        Args:
            base: the commit.
            delta: the margin as it was typed.
            setup: a shell command that is run once in each arm's tree.
            out: folder of RAW and pages; "" for a temporary one.
            most_foreign: processor seconds of others, a second of a block, above which the block is left out.
            here: a folder of the repository.
            files: the benchmarks' files, which base is given as they are now, with conftest.py of the folders above.
            count: of benchmarks, by which all levels are divided.

        Raises ValueError for a commit, margin or repository that is none.
        """
        top = checkout.top(here)
        if top is None:
            raise ValueError(f"--assay-base: expected a repository, got {here}")
        self.top, self.name, self.count = top, base, count
        self.setup = ("sh", "-ec", setup) if setup else ()
        self.delta, self.most_foreign = fraction(delta, "--assay-delta"), most_foreign
        self.folder = Path(tempfile.mkdtemp(prefix="assay-"))
        try:
            self.base = checkout.commit("--assay-base", base, self.folder, top)
            self.candidate = checkout.working(top, self.folder / "candidate")
            for file in (*files, *_above(files, top)):
                to = self.base / file.relative_to(top)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)
        except BaseException:
            self.end()
            raise
        self.out = Path(out) if out else Path(tempfile.mkdtemp(prefix="assay-pytest-"))
        self.out.mkdir(parents=True, exist_ok=True)

    def judged(self, file: Path, name: str) -> Seen:
        """One benchmark, by its file and its name in it."""
        target = f"{file.relative_to(self.top).as_posix()}::{name}"
        workload = Workload("pytest", target=target, constant=True, rounds=4)
        plan = Plan(workload, self.delta, seeds.secret(), _CALLS_S, self.most_foreign, workloads=self.count).checked()
        raw = self._free("".join(letter if letter.isalnum() else "-" for letter in target)[:120])
        names = {"base": self.name, "candidate": "the working tree", "control": self.name}
        try:
            with raw.open("x") as out:
                seen = run(self.base, self.candidate, plan, out, setup=self.setup, names=names)
        except ArmError as problem:
            fails = problem.arm == "candidate" and not problem.infra
            return Seen([foreign.told(f"{'failed' if fails else 'not judged'}: {problem}")], fails, not fails)
        except MeasurementError as problem:
            return Seen([foreign.told(f"not judged: {problem}")], skips=True)
        assert seen is not None
        rows = [json.loads(line) for line in raw.read_text().splitlines()]
        raw.with_suffix(".html").write_text(page.page(rows))
        lines = [foreign.told(line) for line in (*terminal.outcome(seen, self.delta), *terminal.got_worse(rows))]
        return Seen(lines, seen.verdict in ("slower", "incorrect", "tampered"), seen.verdict in NOTHING)

    def _free(self, name: str) -> Path:
        """A file of RAW that is not there yet."""
        found, number = self.out / f"{name}.jsonl", 1
        while found.exists():
            number += 1
            found = self.out / f"{name}-{number}.jsonl"
        return found

    def end(self) -> None:
        """Takes the trees away."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _above(files: Sequence[Path], top: Path) -> list[Path]:
    """The conftest.py files of all folders above some files, up to the repository's own."""
    folders = {folder for file in files for folder in file.parents if folder.is_relative_to(top)}
    return [folder / "conftest.py" for folder in sorted(folders) if (folder / "conftest.py").is_file()]
