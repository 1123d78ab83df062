"""Loads what other harnesses call a benchmark, inside an arm: of asv, pyperf and pytest-benchmark.

Standard library only. Loaded by worker.py where a workload is one. Nothing of a harness's own timing is used.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def asv(find: Callable[[str], Any], name: str, case: int) -> tuple[Callable[[], Any], list[str]]:
    """An asv benchmark, set up for one case of its parameters, and all cases as texts."""
    owner_name, _, method = name.rpartition(".") if "." in name.partition(":")[2] else (name, "", "")
    owner = find(owner_name)
    host = owner() if method else owner
    function = getattr(host, method) if method else owner
    from itertools import product

    values = list(getattr(function, "params", getattr(host, "params", [])) or [])
    if values and not isinstance(values[0], (list, tuple)):
        values = [values]
    cases = list(product(*values))
    if case >= len(cases):
        raise IndexError(f"case: expected below {len(cases)}, the number of parameter combinations, got {case}")
    chosen = cases[case]
    if hasattr(host, "setup_cache"):
        chosen = (host.setup_cache(), *chosen)
    setup = getattr(host, "setup", None) or getattr(function, "setup", None)
    if setup is not None:
        setup(*chosen)
    names = list(getattr(function, "param_names", getattr(host, "param_names", [])) or [])
    names += [f"param{i + 1}" for i in range(len(names), len(values))]
    texts = [", ".join(f"{name}={value!r}" for name, value in zip(names, one, strict=False)) for one in cases]
    return lambda: function(*chosen), texts


def pyperf(name: str) -> Callable[[], Any]:
    """A benchmark that a pyperf script registers under a name. The script's other benchmarks are not run."""
    from runpy import run_path

    import pyperf as module

    script, _, wanted = name.partition(":")
    found: dict[str, Callable[[], Any]] = {}

    def bench_func(_: Any, name: str, function: Any, *args: Any, inner_loops: Any = None, **more: Any) -> None:
        found[name] = lambda: function(*args)

    def bench_time_func(_: Any, name: str, function: Any, *args: Any, inner_loops: Any = None, **more: Any) -> None:
        found[name] = lambda: function(1, *args)

    def bench_async_func(_: Any, name: str, function: Any, *args: Any, **more: Any) -> None:
        import asyncio

        found[name] = lambda: asyncio.run(function(*args))

    def timeit(_: Any, name: str, stmt: Any = None, setup: Any = "pass", globals: Any = None, **more: Any) -> None:
        scope: dict[str, Any] = dict(globals or {})
        join = "\n".join
        exec(setup if isinstance(setup, str) else join(setup), scope)
        code = compile((stmt or name) if isinstance(stmt or name, str) else join(stmt), name, "exec")
        found[name] = lambda: exec(code, scope)

    for patch in (bench_func, bench_time_func, bench_async_func, timeit):
        setattr(module.Runner, patch.__name__, patch)
    module.Runner.bench_command = lambda *_, **__: None
    sys.argv = [script]
    run_path(script, run_name="__main__")
    if wanted not in found:
        raise LookupError(f"{name}: expected one of the script's benchmarks, {sorted(found)}, got {wanted!r}")
    return found[wanted]


def under_pytest(name: str, loaded: Callable[[Callable[[], Any]], None]) -> None:
    """Runs one test with pytest-benchmark. What it hands to its fixture `benchmark` is given to `loaded`, not run.

    `loaded` returns when nobody asks any more; until then the test stands, with all its fixtures.
    """
    import pytest
    import pytest_benchmark.fixture as module

    found: list[str] = []
    refused: list[Exception] = []

    def hand(function: Callable[[], Any]) -> Any:
        if found:
            raise LookupError(f"{name}: expected one call of benchmark, got another one")
        found.append(name)
        loaded(function)
        raise SystemExit(0)  # the rest of the test may ask for results that nobody has

    def called(_: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        return hand(lambda: function(*args, **kwargs))

    def pedantic(_: Any, target: Any, args: Any = (), kwargs: Any = None, setup: Any = None, **more: Any) -> Any:
        if setup is not None:
            refused.append(ValueError(f"{name}: expected benchmark.pedantic without setup, which would be timed"))
            raise refused[0]
        return hand(lambda: target(*args, **(kwargs or {})))

    module.BenchmarkFixture.__call__ = called
    module.BenchmarkFixture.pedantic = pedantic
    status = pytest.main(["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:assay", "-q", name])
    if refused:
        raise refused[0]
    if not found:
        raise LookupError(f"{name}: expected a test that calls benchmark, pytest ended with status {int(status)}")
