"""What all operators of the cuda implementation stand on, without a GPU: sources, the cubin cache, cards, launches."""

import ctypes
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from moeyard.cuda.align import launchers as align
from moeyard.cuda.runtime import barriers, cards, launch
from moeyard.cuda.runtime import compile as building
from moeyard.cuda.runtime.launch import Recipe
from moeyard.cuda.runtime.ready import Ready
from moeyard.cuda.runtime.sources import HEADERS, SOURCES, headers_of, texts_in
from moeyard.testing import python

CUDA = Path(building.__file__).parents[1]
DEFINES = (("BLOCK", "256"), ("EXPERTS_A_THREAD", "1"))
OTHERS = (("BLOCK", "128"), ("EXPERTS_A_THREAD", "1"))


def test_every_source_is_held_under_a_name_of_its_own() -> None:
    paths = [*CUDA.rglob("*.cu"), *CUDA.rglob("*.cuh")]
    assert len({path.name for path in paths}) == len(paths) == len(SOURCES) + len(HEADERS)
    assert all((SOURCES | HEADERS)[path.name] == path.read_text() for path in paths)
    for name, text in (SOURCES | HEADERS).items():
        assert set(re.findall(r'#include "(.+)"', text)) <= HEADERS.keys(), name


def test_cubins_of_a_wheel_are_no_sources(tmp_path: Path) -> None:
    for folder, name in (("align", "align.cu"), ("align", "align.cuh"), ("cubins", "align-sm_90-0.cubin")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(b"\x95\xff" if name.endswith("cubin") else b"text")
    assert texts_in(tmp_path) == {"align.cu": "text", "align.cuh": "text"}


def test_headers_are_those_that_a_source_includes() -> None:
    assert list(headers_of(SOURCES["batched.cu"])) == ["device.cuh"]
    assert set(headers_of(SOURCES["route_align.cu"])) >= {"align.cuh", "route.cuh", "device.cuh", "rows.cuh"}
    assert "wgmma.cuh" not in headers_of(SOURCES["few_tokens.cu"])
    assert set().union(*(headers_of(text) for text in SOURCES.values())) == set(HEADERS), "no header is left over"


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were compiled, which are their own machine code; an empty cache, nothing warned of."""
    pytest.importorskip("cuda.bindings")
    seen: list[str] = []
    monkeypatch.setattr(building, "compile_source", lambda text, defines, arch: seen.append(text) or text.encode())
    monkeypatch.setattr(building, "_WARNED", [])
    monkeypatch.setenv("MOEYARD_CACHE", str(tmp_path / "cache"))
    return seen


def test_the_key_is_of_what_is_compiled(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        building.cubin("batched.cu", DEFINES, "sm_90")
        building.cubin("sum.cu", DEFINES, "sm_90")
    assert len(compiled) == 2
    monkeypatch.setitem(HEADERS, "rows.cuh", HEADERS["rows.cuh"] + "// another")
    building.cubin("batched.cu", DEFINES, "sm_90")
    assert len(compiled) == 2, "it does not include rows.cuh"
    building.cubin("sum.cu", DEFINES, "sm_90")
    assert len(compiled) == 3
    monkeypatch.setitem(SOURCES, "batched.cu", SOURCES["batched.cu"] + "// another")
    for defines, arch in ((DEFINES, "sm_90"), (OTHERS, "sm_90"), (DEFINES, "sm_80")):
        building.cubin("batched.cu", defines, arch)
    assert len(compiled) == 6
    monkeypatch.setattr(building, "compiler_version", lambda: (99, 0))
    building.cubin("batched.cu", DEFINES, "sm_90")
    assert len(compiled) == 7


def test_files_that_change_under_a_process_change_nothing(tmp_path: Path) -> None:
    """An upgrade of the package: the texts are those of the first import, headers included."""
    pytest.importorskip("cuda.bindings")
    code = (
        "import shutil, sys; from pathlib import Path\n"
        f"shutil.copytree({str(CUDA.parent)!r}, {str(tmp_path / 'moeyard')!r})\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from moeyard.cuda.runtime import compile as c, sources\n"
        f"assert c.__file__.startswith({str(tmp_path)!r})\n"
        f"for path in Path({str(tmp_path)!r}).rglob('*.cu*'): path.write_text('#error')\n"
        f"print(c.compile_source(sources.SOURCES['batched.cu'], {DEFINES!r}, 'sm_90')[:4])"
    )
    done = python("-c", code)
    assert done.stdout.strip() == r"b'\x7fELF'", done.stderr


def test_the_cache_is_used_and_survives_damage(compiled: list[str], tmp_path: Path) -> None:
    code = building.cubin("batched.cu", DEFINES, "sm_90")
    (path,) = (tmp_path / "cache").glob("*.cubin")
    assert building.cubin("batched.cu", DEFINES, "sm_90") == code and len(compiled) == 1
    for number, damage in enumerate((b"", b"short", path.read_bytes()[:-1], b"\0" + path.read_bytes()[1:])):
        path.write_bytes(damage)
        assert building.cubin("batched.cu", DEFINES, "sm_90") == code and len(compiled) == 2 + number
        assert path.read_bytes()[32:] == code
    building.cubin("batched.cu", OTHERS, "sm_90")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_cached_files_are_for_whom_the_umask_lets_read(
    umask: int, mode: int, compiled: list[str], tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        building.cubin("batched.cu", DEFINES, "sm_90")
    finally:
        os.umask(before)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.stat().st_mode & 0o777 == mode


def test_what_cannot_be_read_is_compiled(compiled: list[str], tmp_path: Path) -> None:
    building.cubin("batched.cu", DEFINES, "sm_90")
    (path,) = (tmp_path / "cache").iterdir()
    path.unlink()
    path.mkdir()  # reading and replacing it fail, for root as well
    with pytest.warns(RuntimeWarning, match="cannot be kept: "):
        building.cubin("batched.cu", DEFINES, "sm_90")
    assert len(compiled) == 2
    assert list((tmp_path / "cache").iterdir()) == [path], "no half is left behind"


def test_a_cache_that_cannot_be_written_costs_time_and_says_so_once(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MOEYARD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="MOEYARD_CACHE") as said:
        for _ in range(2):
            building.cubin("batched.cu", DEFINES, "sm_90")
    assert len(said) == 1 and len(compiled) == 2


def test_a_user_without_a_home_has_no_cache_folder(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "MOEYARD_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert building.cache_folder() is None
    with pytest.warns(RuntimeWarning, match="the user has no home folder"):
        building.cubin("batched.cu", DEFINES, "sm_90")
    monkeypatch.setenv("HOME", "")
    assert building.cache_folder() is None, "an empty HOME is none"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert building.cache_folder() == tmp_path / ".cache" / "moeyard"


def test_processes_may_compile_the_same_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings")
    monkeypatch.setenv("MOEYARD_CACHE", str(tmp_path))
    code = f"from moeyard.cuda.runtime.compile import cubin; print(len(cubin('batched.cu', {DEFINES!r}, 'sm_90')))"
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: python("-c", code), range(4)))
    assert all(one.returncode == 0 for one in done), done[0].stderr
    assert len({one.stdout for one in done}) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]


def test_a_source_that_does_not_compile_says_why() -> None:
    pytest.importorskip("cuda.bindings")
    with pytest.raises(RuntimeError, match="undefined_name"):
        building.compile_source('extern "C" __global__ void k() { undefined_name(); }', (), "sm_90")


@pytest.mark.full
def test_machine_code_is_what_was_measured() -> None:
    """The digests of benchmarks/machine_code.json, where the compiler is the one that they name."""
    pytest.importorskip("cuda.bindings")
    root = Path(__file__).parents[1] / "benchmarks"
    held = root / "machine_code.json"
    if json.loads(held.read_text())["compiler"] != "NVRTC " + ".".join(map(str, building.compiler_version())):
        pytest.skip("another NVRTC makes other code")
    done = python(str(root / "machine_code.py"), str(held))
    assert done.returncode == 0, done.stdout + done.stderr


# Prepared launches


def test_a_full_cache_forgets_the_oldest_alone() -> None:
    ready = Ready(most=3)
    for key in range(5):
        assert ready.get(key) is None and ready.add(key, str(key)) == str(key)
        assert len(ready) == min(key + 1, 3)
    assert [ready.get(key) for key in range(5)] == [None, None, "2", "3", "4"]
    assert ready.add(3, "another") == "3", "what was there first is kept"
    assert [ready.get(key) for key in (2, 3, 4)] == ["2", "3", "4"], "and takes nobody's place"


def test_a_cache_holds_together_in_threads() -> None:
    ready, threads = Ready(most=7), 8
    start, switched = Barrier(threads), sys.getswitchinterval()

    def work(seed: int) -> bool:
        start.wait()
        fine = True
        for i in range(2000):
            key = (i * (seed + 1)) % 19
            got = ready.get(key) or ready.add(key, ("of", key))
            fine = fine and got == ("of", key)
        return fine

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            assert all(pool.map(work, range(threads)))
    finally:
        sys.setswitchinterval(switched)
    assert len(ready) == 7


# Barriers that graphs hold


def test_barriers_of_graphs_come_back_when_the_driver_says_so() -> None:
    lent, libc = barriers.Lent(), ctypes.CDLL(None)
    places = [lent.lend(0, 256 * i) for i in range(5)] + [lent.lend(1, 9999)]
    assert len(set(places)) == len(lent) == 6 and lent.returned(0) == []
    for i in (1, 3, 5):
        libc.sem_post(ctypes.c_void_p(places[i]))  # what the driver calls when a graph is gone
    assert sorted(lent.returned(0)) == [256, 768] and lent.returned(0) == []
    assert lent.returned(1) == [9999] and len(lent) == 3
    assert {lent.lend(0, i) for i in range(3)} == {places[1], places[3], places[5]}, "semaphores are used again"
    assert lent.returned(0) == [], "and begin anew"


# Cards


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What cards.py asks of the compiler and the driver can be set; answers are not kept."""
    monkeypatch.setattr(cards, "compiler_version", lambda: (13, 5))
    monkeypatch.setattr(cards, "compiler_capabilities", lambda: ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)))
    monkeypatch.setattr(cards, "driver_version", lambda: (13, 5))
    monkeypatch.setattr(cards, "_load_something", lambda device, arch: None)
    cards.refusal.cache_clear()
    cards.arch_of.cache_clear()
    yield monkeypatch
    cards.refusal.cache_clear()
    cards.arch_of.cache_clear()


@pytest.mark.parametrize(
    ("capability", "suffix", "arch"),
    [
        ((8, 0), "", "sm_80"),
        ((8, 9), "", "sm_86"),
        ((9, 0), "a", "sm_90a"),
        ((10, 3), "", "sm_100"),
        ((10, 3), "a", None),
        ((11, 0), "", None),
    ],
)
def test_code_is_made_for_a_card_or_one_that_it_can_stand_in_for(
    capability: tuple[int, int], suffix: str, arch: str | None, asked: pytest.MonkeyPatch
) -> None:
    asked.setattr(cards, "capability_of", lambda device: capability)
    if arch is not None:
        assert cards.arch_of(0, suffix) == arch
        return
    with pytest.raises(RuntimeError, match=r"NVRTC 13\.5 makes no code for compute capability 1\d\.\d"):
        cards.arch_of(0, suffix)


def test_a_card_or_an_installation_that_cannot_is_refused_in_words(asked: pytest.MonkeyPatch) -> None:
    def refusal() -> str | None:
        cards.refusal.cache_clear()
        return cards.refusal(0)

    asked.setattr(cards, "capability_of", lambda device: (9, 0))
    assert refusal() is None
    asked.setattr(cards, "driver_version", lambda: (12, 4))
    assert refusal() is None, "the driver may load it all the same: that is tried"

    def fails(device: int, arch: str) -> None:
        raise RuntimeError("CUDA_ERROR_INVALID_IMAGE\nand more")

    asked.setattr(cards, "_load_something", fails)
    assert refusal() == (
        "the driver, of CUDA 12.4, does not load what NVRTC 13.5 makes (update the driver, or install an older NVRTC): "
        "CUDA_ERROR_INVALID_IMAGE"
    )
    asked.setattr(cards, "driver_version", lambda: (13, 5))
    assert refusal() is None, "an NVRTC that is no newer than the driver is not tried"
    asked.setattr(cards, "capability_of", lambda device: (7, 5))
    assert refusal() == "needs compute capability 8.0, got 7.5"
    asked.setattr(cards, "capability_of", lambda device: (13, 0))
    assert refusal() == "NVRTC 13.5 makes no code for compute capability 13.0"

    def missing() -> tuple[int, int]:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    asked.setattr(cards, "compiler_version", missing)
    assert refusal() == (
        "NVRTC cannot be loaded (pip install 'moeyard[gpu]'): libnvrtc.so.13: cannot open shared object file"
    )


def test_importing_cards_initialises_nothing() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import moeyard.cuda.runtime.cards\n"
        "print(torch.cuda.is_initialized(), any(name.startswith('cuda.') for name in set(sys.modules) - before))"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "False False", done.stderr


def test_launches_are_kept_by_kernel_and_not_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of batch sizes leave plain integers behind: what Python's collector walks does not grow with them."""
    made: list[Recipe] = []
    monkeypatch.setattr(launch, "_launch_of", lambda recipe, device: made.append(recipe) or recipe)
    monkeypatch.setattr(align, "card_of", lambda device: cards.Card(132, 232448, True))
    for routes in range(33, 4000):
        kept, shape, _ = align.prepare_align(
            routes, 64, 64, routes, 1, torch.int32, True, True, False, 0, None, False
        )  # fmt: skip
        assert shape.sizes[0] == routes and isinstance(kept, Recipe)
    assert len(made) > 3900 and len({*made}) <= 4
