"""What a candidate gains that has its worker in its own hands: nothing that is called faster.

The no-ops here take the worker's place while they are imported. They read and write the pipes themselves, never clean
up, encode in a way of their own, and say of arguments and outputs what they ought to be.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.__main__ import main
from assay.arms.handle import Worker, started
from assay.arms.inside.wire import decode, encode
from assay.arms.inside.worker import copier
from assay.arms.trees import Trees
from assay.contract.workload import Plan, Workload
from assay.experiment.blocks import Blocks
from assay.experiment.exchange import Exchange
from assay.experiment.series import measured
from taken_over import ARRAYS, LISTS, QUICK_ARRAYS, QUICK_LISTS, SLEEPLESS

CHAIN = ["--chain", "work:following", "--links", "300"]
NO_OPS = {
    "lists": (LISTS, QUICK_LISTS, []),
    "lists, sleepless": (LISTS, SLEEPLESS, []),
    "arrays in a chain": (ARRAYS, QUICK_ARRAYS, CHAIN),
}
FULL = pytest.mark.full


def run(folder: Path, name: str, raw: str) -> dict[str, Any]:
    """The last row of RAW for base and a no-op."""
    base, candidate, options = NO_OPS[name]
    for arm, text in (("a", base), ("b", candidate)):
        (folder / arm).mkdir(exist_ok=True)
        (folder / arm / "work.py").write_text(text)
    given = ["ab", str(folder / "a"), str(folder / "b"), "--call", "work:work", "--inputs", "work:make"]
    given += ["--most-foreign", "1e9", "--rounds", "8", "--calls", "24", "--out", str(folder / raw), *options]
    main(given)
    last: dict[str, Any] = json.loads((folder / raw).read_text().splitlines()[-1])
    return last


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        pytest.param("arrays in a chain", 1, marks=FULL),
        *(pytest.param(name, 14, marks=FULL) for name in NO_OPS),
    ],
)
def test_a_no_op_in_the_workers_place_is_never_faster(name: str, runs: int, tmp_path: Path) -> None:
    """14 runs of each of three, 42 together."""
    words = [run(tmp_path, name, f"raw{i}")["verdict"] for i in range(runs)]
    print(words)
    assert not {"faster", "incorrect", "tampered"}.intersection(words)


@pytest.mark.full
@pytest.mark.parametrize("name", ["lists", "arrays in a chain"])
def test_without_the_bound_it_would_be(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blocks, "bounded", lambda blocks: blocks.seconds["candidate"])
    assert "faster" in [run(tmp_path, name, f"raw{i}")["verdict"] for i in range(3)]


@pytest.mark.parametrize("trusted", [False, True])
def test_a_trusted_worker_is_bounded_by_sending_alone(trusted: bool, tmp_path: Path) -> None:
    """One block, and what its row says."""
    arms = {arm: tmp_path / arm for arm in ("base", "candidate", "control")}
    for folder in arms.values():
        folder.mkdir()
        (folder / "work.py").write_text(ARRAYS)
    chained = Workload("call", target="work:work", inputs="work:make", chain="work:following", links=300, rounds=2)
    plan, raw = Plan(chained, most_foreign=9.0, trusted=trusted).checked(), io.StringIO()
    assert measured(plan, Trees.at(arms, tmp_path), raw, seconds=1e-9) is None
    header, block = map(json.loads, raw.getvalue().splitlines())
    assert header["plan"]["trusted"] is trusted and (block["spared_s"] > 0) is not trusted and block["transport_s"] > 0
    assert trusted or block["spared_s"] > block["primary"]["base"]  # all but one of the chain's calls


def test_copies_share_nothing_that_can_be_written_to() -> None:
    value = {"a": [1, [2.0, "x"], np.arange(3)], "b": ({"c": [None]}, b"y"), "d": np.float32(3)}
    copy = copier(value)()
    assert str(copy) == str({**value, "b": list(value["b"])})  # a tuple is copied as a list: it could hold one
    places = [lambda v: v, lambda v: v["a"], lambda v: v["a"][1], lambda v: v["a"][2], lambda v: v["b"][0]["c"]]
    assert all(place(copy) is not place(value) for place in places)
    assert copier(7)() == 7 and copier("x")() == "x"


@contextmanager
def worker(folder: Path, text: str, **more: Any) -> Iterator[Worker]:
    (folder / "work.py").write_text(text)
    (folder / "places").mkdir(exist_ok=True)
    trees = Trees.at({"base": folder}, folder / "places")
    found = started("base", Workload("call", target="work:work", **more), trees, 0, 20)
    try:
        yield found
    finally:
        found.end()


def body(value: Any) -> bytes:
    return b"".join(bytes(part) for part in encode(value))


def test_what_could_be_spared_is_measured_in_the_worker(tmp_path: Path) -> None:
    text = "def work(x): return x * 2\n"
    array = np.ones(1 << 20)
    with worker(tmp_path, text) as found:
        exchange = Exchange(found)
        exchange.call(body((array,)))
        exchange.echo(body((array,)))
        assert 1e-4 < exchange.spared() < 0.1
    with worker(tmp_path, text) as found:
        exchange = Exchange(found)
        exchange.call(body((3,)))
        exchange.echo(body((3,)))
        assert exchange.spared() < 1e-4


@pytest.mark.parametrize("links", [1, 2, 3])
def test_arguments_of_the_last_link_are_sent_back(links: int, tmp_path: Path) -> None:
    text = "def work(x):\n    x.append(0)\n    return [sum(x)]\ndef following(given, y): return (given[0] + y,)\n"
    with worker(tmp_path, text, chain="work:following", links=links) as found:
        exchange = Exchange(found)
        assert decode(exchange.call(body(([1],))).body) == [2 ** (links - 1)]
        (left,) = decode(exchange.after().arguments)
        assert left == [[1, 0], [1, 0, 1, 0], [1, 0, 1, 0, 2, 0]][links - 1]


def test_a_chain_that_overwrites_its_arguments_is_incorrect(tmp_path: Path) -> None:
    """A candidate that does not patch the worker is found out in chains, too, by the last link's arguments."""
    candidate = ARRAYS.replace("y = x.copy()\n    y *= 0.5", "y = x * 0.5\n    x[1] = 0")
    for arm, text in (("a", ARRAYS), ("b", candidate)):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "work.py").write_text(text)
    given = ["ab", str(tmp_path / "a"), str(tmp_path / "b"), "--call", "work:work", "--inputs", "work:make", *CHAIN]
    assert main([*given, "--most-foreign", "1e9", "--out", str(tmp_path / "raw"), "--calls", "16"]) == 1
    assert json.loads((tmp_path / "raw").read_text().splitlines()[-1])["verdict"] == "incorrect"
