"""Parallel sections on the CPU: nobody writes after the call has ended, whatever ends it."""

import signal
import sys
import threading
import time

import pytest
import torch

from moeyard.cpu import threads
from moeyard.testing import python

SETUP = """
import os, signal, sys, threading, time, torch, moeyard
from moeyard.cpu import threads
torch.set_num_threads(4)
ids = torch.randint(0, 64, (1 << 18, 4), dtype=torch.int32)
sizes = dict(num_experts=64, block_size=16, impl="cpu")
layout = moeyard.moe_align_block_size(ids, **sizes)
x = torch.randn(1 << 18, 32)
w = moeyard.ExpertWeights(torch.randn(64, 128, 64), torch.randn(64, 64, 64))
tokens, routing = torch.randn(256, 64), moeyard.route(torch.randn(256, 64), top_k=4, impl="cpu")
calls = {
    "align": lambda: moeyard.moe_align_block_size(ids, **sizes).tensors,
    "permute": lambda: (moeyard.permute(x, layout, impl="cpu").rows,),
    "shuffle_rows": lambda: (moeyard.shuffle_rows(x, ids[:, 0], impl="cpu"),),
    "combine": lambda: (moeyard.combine(x.repeat(5, 1)[: layout.capacity], layout, impl="cpu"),),
    "moe_sum": lambda: (moeyard.moe_sum(x.view(-1, 4, 32), impl="cpu"),),
    "route": lambda: (moeyard.route(x, top_k=2, impl="cpu").topk_weights,),
    "activate": lambda: (moeyard.activate(x, impl="cpu"),),
    "grouped_gemm": lambda: (moeyard.grouped_gemm(tokens, w.w13, layout=moeyard.moe_align_block_size(
        routing.topk_ids, **sizes), impl="cpu"),),
    "fused_experts": lambda: (moeyard.fused_experts(tokens, routing, w, impl="cpu"),),
}
wanted = {name: [t.clone() for t in call()] for name, call in calls.items()}
def right():
    for name, call in calls.items():
        answers = zip(wanted[name], call())
        if name != "permute":  # rows of padding slots hold nothing
            assert all(torch.equal(a, b) for a, b in answers), name
right()
"""


def run(code: str) -> str:
    done = python("-X", "faulthandler", "-c", SETUP + code)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    return done.stdout


def test_interrupted_calls_leave_no_writer_behind() -> None:
    """Thousands of interrupts at random moments: what is freed afterwards is never written, later calls are right."""
    code = """
interrupted = 0
def ring(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, ring)
begin = time.perf_counter()
while time.perf_counter() - begin < 8:
    for name, call in calls.items():
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + torch.rand(()).item() * 4e-3, 3e-4)
            answer = call()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            while True:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    break
                except KeyboardInterrupt:
                    pass
        answer = None
        guard = torch.full((1 << 20,), 7, dtype=torch.int32)  # takes the memory that the call had
        time.sleep(5e-4)
        assert bool((guard == 7).all()), f"{name}: written after it ended"
right()
print(interrupted)
"""
    assert int(run(code)) > 100


def test_works_without_more_threads() -> None:
    code = """
threads._pool.cache_clear()
threading.stack_size(1 << 45)  # no address space for such a stack: "can't start new thread"
try:
    threading.Thread(target=print).start()
    raise SystemExit("a thread with a stack of 32 TiB started")
except RuntimeError:
    pass
for _ in range(3): right()
threading.stack_size(0)
right()
print(threading.active_count() > 1)
"""
    assert run(code).strip() == "True"


def test_works_while_the_process_ends() -> None:
    code = """
import atexit
atexit.register(lambda: (right(), print("atexit", flush=True)))
def later():
    threading.main_thread().join()
    right()
    print("after main", flush=True)
threading.Thread(target=later).start()
"""
    assert sorted(run(code).splitlines()) == ["after main", "atexit"]


def test_works_in_a_forked_child() -> None:
    code = """
pid = os.fork()
if pid == 0:  # torch's own threads are gone here, so numpy compares
    got = calls["align"]()
    os._exit(not all((a.numpy() == b.numpy()).all() for a, b in zip(got, wanted["align"])))
assert os.waitpid(pid, 0)[1] == 0
right()
print("both")
"""
    assert run(code).strip() == "both"


def test_one_pool_serves_all_counts() -> None:
    code = """
for count in (2, 3, 4, 2, 3):
    torch.set_num_threads(count)
    right()
print(sum(t.name.startswith("moeyard") for t in threading.enumerate()) <= max(os.cpu_count(), 2))
"""
    assert run(code).strip() == "True"


def test_every_part_runs_once_and_problems_are_raised() -> None:
    seen: list[tuple[int, int, int]] = []
    lock = threading.Lock()

    def part(i: int, start: int, stop: int, address: int) -> None:
        with lock:
            seen.append((i, start, stop))
        if address:
            raise ValueError(f"part {i}")

    threads.run_parts(part, 7, 100, [None])
    assert sorted(seen) == [(i, 100 * i // 7, 100 * (i + 1) // 7) for i in range(7)]
    with pytest.raises(ValueError, match="part"):
        threads.run_parts(part, 7, 100, [torch.zeros(1)])


def test_a_problem_waits_for_the_other_parts() -> None:
    running = 0
    lock = threading.Lock()

    def part(i: int, start: int, stop: int) -> None:
        nonlocal running
        with lock:
            running += 1
        time.sleep(0.05)
        with lock:
            running -= 1
        raise ValueError("first")

    for _ in range(5):
        with pytest.raises(ValueError, match="first"):
            threads.run_parts(part, 3, 3, ())
        assert running == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_interrupts_wait_for_the_other_parts() -> None:
    """Two interrupts during one wait: the call still outlives its parts."""
    running, main = 0, threading.main_thread()

    def part(i: int, start: int, stop: int) -> None:
        nonlocal running
        if threading.current_thread() is not main:
            running += 1
            for _ in range(2):
                time.sleep(0.03)
                signal.pthread_kill(main.ident or 0, signal.SIGINT)
            time.sleep(0.05)
            running -= 1
        else:
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        threads.run_parts(part, 2, 2, ())
    assert running == 0
