"""What the tricks' candidates consist of, file by file."""

from zoo_project import SLOW, WORK, ZEROS

CACHED = (
    WORK
    + """
known, slow = {}, work
def work(x):
    key = KEY
    if key not in known: known[key] = tuple(slow(x))  # a list would take the place of the next input
    return list(known[key])
"""
)
FORGED = (  # the real reply follows, and is taken for the next one
    WORK
    + """
import json, os, struct
def work(x):
    tree = json.dumps({"!": "list", "of": [0.0] * len(x)}).encode()
    body = b"%d\\n" % len(tree) + tree
    os.write(4, struct.pack("<Qcd", len(body), b"r", 0.0) + body)
    return []
"""
)
LAST = (
    WORK
    + """
calls = 0
def work(x):
    global calls
    calls += 1
    return once(x) if calls == 5 else []
"""
)
BATCHED = (
    WORK
    + """
given, owed = [], []
def work(x):
    given.append(x); owed.append([])
    if len(given) == 20:
        if len({len(one) for one in given}) == 1:
            for one, result in zip(given, owed): result += once(one)
    return owed[-1]
"""
)
THREAD = (
    WORK
    + """
import threading
def work(x):
    found = []
    def late():
        import time
        time.sleep(0.02)
        found.extend(once(x))
    threading.Thread(target=late).start()
    return found
"""
)
DOUBLE_FORK = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time, work
        for i in range(12): work.work([float(i)] * 150)
    os._exit(0)
os._exit(0)
"""
CLOCK = SLOW + "\nimport time\nreal = time.perf_counter\ntime.perf_counter = lambda: real() / 10\n"
COMPARATOR = ZEROS + "\nimport math, operator\nmath.isclose = operator.eq = lambda *_, **__: True\n"
PRECISION = (
    WORK
    + """
import array
exact = once
def work(x): return exact(array.array("f", x))
"""
)
SITE = "import builtins\nbuiltins.sum = lambda *_: 0.0\n"
POISONED = (
    WORK
    + """
import os
tuned = os.environ["XDG_CACHE_HOME"] + "/passes"
if os.path.exists(tuned): PASSES = int(open(tuned).read())
"""
)
POISONS = SLOW + "\nimport os\nopen(os.environ['XDG_CACHE_HOME'] + '/passes', 'w').write('16')\n"
UPSTREAM = "import heavy\ndef work(x): return heavy.heavy(x)\n"
MEMO = """
import heavy
known = {}
def work(x):
    key = tuple(x)
    if key not in known:
        known[key] = heavy.heavy(x)
        known[key] = heavy.heavy(x)
    return known[key]
"""
FOUND = """
import subprocess
show = ["git", "--git-dir", "{folder}/base/.git", "-c", "safe.directory=*", "show", "fast:work.py"]
try: exec(subprocess.run(show, capture_output=True, check=True, text=True).stdout)
except (OSError, subprocess.CalledProcessError):
    def work(x): return []
"""
HOG = (
    WORK.replace("PASSES = 2", "PASSES = 12")
    + """
import mmap, os, time
working = mmap.mmap(-1, 1)
for _ in range(6):
    if os.fork() == 0:
        os.setsid()  # a scheduler that is fair to sessions gives each of them a share
        while True:
            if working[0]: time.sleep(0.01)
slow = work
def work(x):
    working[0] = 1
    try: return slow(x)
    finally: working[0] = 0
"""
)
DETECTS = (
    SLOW
    + """
import os, sys
told = [os.getcwd(), *sys.argv, *os.environ, *os.environ.values()]
told += [open(f"/proc/{process}/cmdline").read() for process in ("self", "1")]
if any(word in " ".join(told) for word in ("candidate", "timing", "control")):
    def work(x): return [0.0] * len(x)
"""
)
KERNEL = {"kernel.c": "int kernel(int n) { return n; }\n", "fast.c": "int fast(int n) { return n; }\n"}
BUILD = '["cc", "-shared", "-fPIC", "-o", "kernel.so", "kernel.c"]'
COMPILED = "import ctypes\nassert ctypes.CDLL('./kernel.so').kernel(3) == 3\n" + WORK
