"""Experts on a GPU beside their peers within a time limit: `moeyard bench experts --out DIR`.

Every model has a process of its own that keeps its weights. Cases come in the order of the parts, and the result file
is written after each. A provider that raises is a wrong one; one that hangs or ends its process is left out for that
model from then on, and both are rows of the file.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeyard.bench import experts_cells, results, timing
from moeyard.bench.experts_worker import case_to
from moeyard.bench.operators import Case

_SILENT_S = 20.0  # a provider that says nothing for so long hangs
_COMPILE_SILENT_S = 25.0  # compilers take their time
_SLOW = "deep_gemm"  # it runs nvcc, so it gets three times as long
_START_S = 90.0  # many processes import at once
_CASE_S = 60.0
_COMPILE_SHARE = 0.25  # of all seconds: the most that compiling ahead may take
_COMPILE_TOKENS = 8192  # more tokens have the plans of as many, and their rows would fill the memory
_LEAST_S = 3.0  # with less time left no case begins
_TRIES = 4


class Worker:
    """One process of `experts_worker`."""

    def __init__(self, device: str, log: Path) -> None:
        """Starts it; imports run while others work. What it prints goes to the end of `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moeyard.bench.experts_worker", "--device", device],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, bufsize=0,
            )  # fmt: skip
        self._rest, self._started = b"", False
        self.at = ""
        """The provider in hand when the last request ended without an answer."""

    def ask(self, request: dict[str, Any], seconds: float, silent: float) -> tuple[Any, str]:
        """(answer, "") or (None, why there is none); after that the process is to be ended.

        It has to say something every `silent` seconds. When all `seconds` are over nobody is to blame.
        """
        end, self.at = time.monotonic() + seconds, ""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:
            return None, "its process ended"
        while True:
            since, patience = time.monotonic(), silent * (3 if self.at.startswith(_SLOW) else 1)
            if not self._started:
                patience = _START_S
            line = self._line(min(end, since + patience))
            if line is None and time.monotonic() >= end:
                self.at = ""
                return None, "time is over"
            if line is None:
                hung = time.monotonic() >= since + patience
                return None, f"hung for {patience:.0f} s" if hung else "its process ended"
            message, self._started = json.loads(line), True
            if "done" in message:
                return message["done"], ""
            if "lost" in message:
                return None, str(message["lost"])
            self.at = message["at"]

    def _line(self, end: float) -> bytes | None:
        """The next line; None when the time is over or the process has ended."""
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                return None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@dataclass
class Bench:
    """A run: its processes, what they found, and when it has to end."""

    device: str
    out: Path
    name: str
    end: float
    options: dict[str, Any]
    """What goes into every request."""
    workers: dict[str, Worker] = field(default_factory=dict)
    helpers: dict[tuple[str, int], Worker] = field(default_factory=dict)
    """More processes of a model, which compile ahead."""
    lost: dict[str, dict[str, str]] = field(default_factory=dict)
    """Model -> provider -> why it is left out."""
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def start(self, models: Sequence[str], shares: int) -> None:
        """Starts all processes: their imports run at once."""
        for model in models:
            self.worker(model)
            for i in range(1, shares):
                self.helpers[model, i] = self._start(f"{model}-{i}")

    def worker(self, model: str) -> Worker:
        """The process of a model, started if there is none."""
        if model not in self.workers:
            self.workers[model] = self._start(model)
        return self.workers[model]

    def _start(self, name: str) -> Worker:
        return Worker(self.device, self.out / "logs" / f"{name}.log")

    def _drop(self, model: str, worker: Worker, reason: str) -> None:
        """Ends a process of a model, and leaves out the provider that it had in hand."""
        worker.end()
        if worker.at:
            self.lost.setdefault(model, {})[worker.at] = reason
        _print(f"{model}: {worker.at or 'nobody'}: {reason}")

    def measure_machine(self, model: str) -> None:
        """Asks one process for the machine's facts; RuntimeError if it cannot say."""
        answer, reason = self.worker(model).ask({"do": "facts"}, self.left, 60.0)
        if answer is None:
            raise RuntimeError(f"the machine's bandwidth was not measured: {reason}; see {self.out / 'logs'}")
        self.facts = answer

    def compile(self, todo: Sequence[tuple[Case, dict[str, Any]]], shares: int) -> None:
        """Lets every kernel be compiled, by `shares` processes per model at once; helpers end with that.

        A case is what `measure` takes, with what goes into its request.
        """
        parts: list[tuple[str, int, list[tuple[Case, dict[str, Any]]]]] = []
        short = [(case, extra) for case, extra in todo if case["num_tokens"] <= _COMPILE_TOKENS]
        for model in dict.fromkeys(model_of(case) for case, _ in short):
            some = [one for one in short if model_of(one[0]) == model]
            parts += [(model, i, some[i::shares]) for i in range(shares) if some[i::shares]]
        end = time.monotonic() + self.left * _COMPILE_SHARE

        def work(part: tuple[str, int, list[tuple[Case, dict[str, Any]]]]) -> None:
            model, i, mine = part
            for case, extra in mine:
                if time.monotonic() >= end:
                    return
                worker = self.helpers[model, i] if i else self.worker(model)
                request = {"do": "compile", "case": case_to(case), "without": dict(self.lost.get(model, {})), **extra}
                answer, reason = worker.ask({**self.options, **request}, self.left, _COMPILE_SILENT_S)
                if answer is not None:
                    continue
                self._drop(model, worker, reason)
                if i:
                    self.helpers[model, i] = self._start(f"{model}-{i}")
                else:
                    del self.workers[model]

        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            list(pool.map(work, parts))
        for worker in self.helpers.values():
            worker.end()
        self.helpers.clear()

    def measure(self, case: Case, extra: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of a case; none if time was over or its inputs could not be made."""
        model = model_of(case)
        for _ in range(_TRIES):
            if self.left < _LEAST_S:
                return []
            request = {
                "do": "time",
                "case": case_to(case),
                "without": dict(self.lost.get(model, {})),
                "rates": self.facts["rates"],
                **extra,
            }
            worker = self.worker(model)
            answer, reason = worker.ask({**self.options, **request}, min(_CASE_S, self.left), _SILENT_S)
            if answer is not None:
                found: list[dict[str, Any]] = answer
                return found
            self._drop(model, self.workers.pop(model), reason)
            if not worker.at:
                return []
        return []

    def write(self) -> None:
        """The result file as far as it is known."""
        content = results.document(self.rows, self.facts["machine"], self.facts["peers"])
        results.write(self.out / f"{self.name}.json", content)

    def finish(self) -> None:
        """Ends all processes."""
        for worker in (*self.workers.values(), *self.helpers.values()):
            worker.end()


def model_of(case: Case) -> str:
    """Whose process has a case: shards and variants of a model share it."""
    return case.workload.partition(",")[0].partition(" /")[0]


def line_of(case: Case, rows: Sequence[dict[str, Any]], seconds: float) -> str:
    """A case in one line: `yardstick_us`, everyone's microseconds, vLLM's (or another peer's) time over ours."""
    if not rows:
        return f"{case.workload} {case.op} {case['num_tokens']} {case.routing}: nothing measured"
    times = []
    for row in rows:
        label = {"graph": "", "cpu": ""}.get(row["mode"], f" {row['mode']}")
        value = "WRONG " + row["wrong"][:60] if row["time_us"] is None else f"{row['time_us']:.1f}"
        ratios = [
            f"{peer}/ours {1 / middle:.3f} [{1 / high:.3f}, {1 / low:.3f}]"
            for peer, (middle, low, high) in row.get("ratio_to", {}).items()
            if peer != "torch" or len(row["ratio_to"]) == 1
        ]
        of_peer = row["impl"] if row["provider"] == "moeyard" else row["provider"]
        times.append(" ".join([f"{of_peer}{label} {value}", *ratios]))
    yardstick = f"copy or product {results.yardstick_us(rows[0]):.1f}"
    head = f"{case.workload} {case.op} {case['num_tokens']} {case.routing}: {yardstick}"
    return " | ".join([head, *times, f"{seconds:.1f} s"])


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Options:
    """What is measured, and for how long."""

    out: Path
    """Folder of the result file and of logs/."""
    seconds: float = 170.0
    """Everything ends by then."""
    name: str = "experts_bf16"
    """The result file's name without .json."""
    models: tuple[str, ...] = experts_cells.MODELS
    tokens: tuple[int, ...] | None = None
    """What each part is made for unless given."""
    parts: tuple[str, ...] = experts_cells.USUAL
    """In the order wanted."""
    providers: tuple[str, ...] | None = None
    """Only these: vllm, moeyard, moeyard:cuda, ..."""
    all: bool = False
    """All of moeyard's implementations but torch's."""
    variants: str = ""
    """MODULE:FUNCTION; a case gives (label, run) pairs to be timed."""
    others: str = ""
    """MODULE:FUNCTION; a case gives (name, version, run) of more peers."""
    cell_seconds: float = 0.8
    """About how long a case's rounds last."""
    rounds: int = timing.MOST_ROUNDS
    """At most so many rounds per case."""
    shares: int = 2
    """Processes per model that compile ahead; 0 for none."""
    seed: int = 0
    scale: int = 1
    """Hidden and intermediate sizes are divided by this."""
    device: str = "cuda"


def measure(wanted: Options) -> int:
    """Measures what is wanted and writes the result file; the number of cases that have rows."""
    begin = time.monotonic()
    todo = [
        (case, {"grid": part == "grid"})
        for part in wanted.parts
        for case in experts_cells.cells(part, wanted.models, wanted.tokens, wanted.scale)
    ]
    if not todo:
        raise ValueError(f"models: expected some of {experts_cells.MODELS}, got {wanted.models}")
    options = {
        "seconds": wanted.cell_seconds, "seed": wanted.seed, "variants": wanted.variants, "others": wanted.others,
        "providers": wanted.providers, "all": wanted.all, "rounds": wanted.rounds,
    }  # fmt: skip
    bench = Bench(wanted.device, wanted.out, wanted.name, begin + wanted.seconds, options)
    try:
        bench.start(list(dict.fromkeys(model_of(case) for case, _ in todo)), wanted.shares)
        bench.measure_machine(model_of(todo[0][0]))
        _print(str(bench.facts["machine"]))
        if wanted.shares:
            bench.compile(todo, wanted.shares)
            _print(f"compiled after {time.monotonic() - begin:.1f} s")
        done = 0
        for case, extra in todo:
            if bench.left < _LEAST_S:
                break
            start = time.monotonic()
            rows = bench.measure(case, extra)
            bench.rows += rows
            done += bool(rows)
            _print(line_of(case, rows, time.monotonic() - start))
            bench.write()
        _print(f"{done} of {len(todo)} cases in {time.monotonic() - begin:.1f} s; left out: {bench.lost}")
        return done
    finally:
        bench.finish()
