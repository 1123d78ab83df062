"""Judges merged performance commits of public repositories, four variants each, and keeps what was measured.

    python tasks/public/run.py clone                 # bare clones of the repositories, into tasks/public/clones
    python tasks/public/run.py judge [TASK ...]      # all variants of some tasks, or of all, that are not judged yet
    python tasks/public/run.py admit [TASK ...]      # `assay admit` of some tasks, or of all
    python tasks/public/run.py table                 # the table of README.md, from results/

Variants are the commit itself (`reference`), the way back from it (`reverse`), the commit with a mistake (`wrong`) and
base with a comment (`comment`). Nothing of a repository is kept: results hold plans, samples and verdicts.
"""

import argparse
import ast
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLONES, RESULTS, STORE = HERE / "clones", HERE / "results", HERE / "store"
VARIANTS = ("reference", "reverse", "wrong", "comment")
BEGIN, END = "<!-- results -->", "<!-- /results -->"


def tasks() -> dict[str, Path]:
    """Every task's file, by name."""
    return {file.stem: file for file in sorted(HERE.glob("*.toml")) if file.stem != "wrong"}


def repository(task: dict) -> Path:
    return HERE / task["repository"]["path"]


def clone() -> None:
    CLONES.mkdir(exist_ok=True)
    for name in sorted({tomllib.loads(file.read_text())["repository"]["path"] for file in tasks().values()}):
        path = HERE / name
        if not path.exists():
            url = f"https://github.com/{path.stem.replace('+', '/')}"
            subprocess.run(["git", "clone", "--quiet", "--bare", url, str(path)], check=True)


def given(name: str, task: dict, variant: str, folder: Path) -> list[str] | None:
    """The arguments of `assay judge` for a variant; None if there is none."""
    base, reference = (task["repository"][key] for key in ("base", "reference"))
    if variant == "reference":
        return ["--commit", reference]
    if variant == "reverse":
        return ["--base", reference, "--commit", base]
    if variant == "wrong":
        mistake = tomllib.loads((HERE / "wrong.toml").read_text()).get(name)
        if mistake is None:
            return None
        written(repository(task), reference, folder)
        mistaken(folder / mistake["path"], mistake["function"], mistake["statement"])
    else:
        written(repository(task), base, folder)
        file = folder / task["scope"]["files"][0]
        sign = "#" if file.suffix == ".py" else "//"
        file.write_text(f"{file.read_text()}\n{sign} nothing else\n")
    return ["--tree", str(folder)]


def written(clone: Path, commit: str, folder: Path) -> None:
    archive = subprocess.run(["git", "-C", str(clone), "archive", commit], check=True, capture_output=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], check=True, input=archive)


def mistaken(file: Path, function: str, statement: str) -> None:
    """Puts a statement at the beginning of a function, of Python or of C."""
    lines = file.read_text().split("\n")
    if file.suffix == ".py":
        names = function.split(".")
        body = ast.parse(file.read_text()).body
        for name in names:
            (node,) = (one for one in body if getattr(one, "name", "") == name)
            body = node.body
        first = body[1] if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else body[0]
        at, indent = first.lineno - 1, " " * first.col_offset
    else:
        start = next(i for i, line in enumerate(lines) if re.match(rf"(?:\w[\w\s*]*\s)?{function}\(", line))
        at, indent = next(i for i in range(start, len(lines)) if "{" in lines[i]) + 1, "\t"
    lines.insert(at, f"{indent}{statement}")
    file.write_text("\n".join(lines))


def judge(name: str, variants: Sequence[str]) -> None:
    task = tomllib.loads(tasks()[name].read_text())
    for variant in variants:
        to = RESULTS / name / variant
        if (to / "verdict.json").exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            arguments = given(name, task, variant, Path(folder) / "tree")
            if arguments is None:
                continue
            command = [sys.executable, "-m", "assay", "judge", str(tasks()[name]), *arguments]
            done = subprocess.run([*command, "--store", str(STORE), "--json"], stdout=subprocess.PIPE, check=False)
        found = json.loads(done.stdout)
        print(f"{name} {variant}: {found['outcome']}: {'; '.join(found['words'])[:150]}", flush=True)
        if not found["outcome"].startswith("infra."):
            kept(STORE / "attempts" / found["attempt"]["id"], found, to)


def kept(attempt: Path, found: dict, to: Path) -> None:
    """Copies plan, gates, samples and verdict, without the places of this machine."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for file in sorted((attempt / "raw").glob("*")) if (attempt / "raw").is_dir() else []:
        text = file.read_text()
        (to / file.name).write_text(text.replace(str(STORE), "STORE") if file.suffix == ".jsonl" else text)
    found["environment"].pop("packages", None)
    found["words"] = [words.split("\n")[0] for words in found["words"]]
    (to / "verdict.json").write_text(json.dumps(found, indent=1) + "\n")


def admit(name: str) -> None:
    command = [sys.executable, "-m", "assay", "admit", str(tasks()[name]), "--store", str(STORE), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    found = json.loads(done.stdout)
    print(f"{name}: {found['outcome']}", flush=True)
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    (RESULTS / name / "admission.json").write_text(json.dumps(found, indent=1) + "\n")


def cell(verdict: dict) -> str:
    """An outcome with its effect."""
    one = next(iter(verdict["workloads"]), None)
    if one is None or one["estimate"] is None:
        return verdict["outcome"]
    middle, low, high = (f"{math.expm1(end) * 100:+.1f}" for end in (one["estimate"], *one["interval"]))
    return f"{verdict['outcome']}, {middle} % [{low}, {high}]"


def rows() -> list[str]:
    """The table, from verdicts and admissions alone."""
    found = ["| task | claim | reference | reverse | wrong | comment | admission |", "|---|---|---|---|---|---|---|"]
    for name, file in tasks().items():
        verdicts = {one: RESULTS / name / one / "verdict.json" for one in VARIANTS}
        if not any(path.exists() for path in verdicts.values()):
            continue
        claim = re.search(r"claims (.+?)\.?$", file.read_text().split("\n")[0])
        cells = [cell(json.loads(path.read_text())) if path.exists() else "" for path in verdicts.values()]
        admission = RESULTS / name / "admission.json"
        cells.append(json.loads(admission.read_text())["outcome"] if admission.exists() else "")
        found.append(f"| {name} | {claim[1] if claim else ''} | {' | '.join(cells)} |")
    return found


def table() -> None:
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    lines = "\n".join([BEGIN, *rows(), END])
    readme.write_text(before + lines + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clone", "judge", "admit", "table"))
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS, help="(all of them)")
    parser.add_argument("task", nargs="*", help=f"some of {', '.join(tasks())}; all unless given")
    asked = parser.parse_args()
    if unknown := set(asked.task) - set(tasks()):
        parser.error(f"TASK: expected some of {', '.join(tasks())}, got {', '.join(sorted(unknown))}")
    if asked.what in ("clone", "table"):
        {"clone": clone, "table": table}[asked.what]()
    for name in (asked.task or tasks()) if asked.what in ("judge", "admit") else ():
        if asked.what == "judge":
            judge(name, asked.variant)
        else:
            admit(name)


if __name__ == "__main__":
    main()
