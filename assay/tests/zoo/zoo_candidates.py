"""What the tricks' candidates consist of, file by file."""

from zoo_project import SLOW, WORK, ZEROS

MIX = """
def work(n):
    for i in range(60): n = (n * 31 + i) & 0xffffffff
    return n
"""
REMEMBERS_A_LOOP = """
known = {}
def work(n):
    if n not in known:
        found = n
        for i in range(60): found = (found * 31 + i) & 0xffffffff
        known[n] = found
    return known[n]
"""
READS_AHEAD = """
import marshal, sys
import numpy
known = {}
def slow(n):
    for i in range(60): n = (n * 31 + i) & 0xffffffff
    return n
def ahead():
    frame = sys._getframe(2)
    if frame.f_code.co_name != "walk" or len(frame.f_locals["outputs"]): return
    found = []
    for one in frame.f_locals["sealed"]:
        if one.endswith(b"good"): found.append(marshal.loads(one)[0])
    numbers = numpy.array(found, numpy.uint64)
    for i in range(60): numbers = (numbers * numpy.uint64(31) + numpy.uint64(i)) & numpy.uint64(0xffffffff)
    known.update(zip(found, numbers.tolist()))
def work(n):
    if n in known: return known[n]
    ahead()
    return slow(n)
"""

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
REPLY = """
import json, os, struct, sys
def reply(values):
    frame = sys._getframe()
    while "mark" not in frame.f_locals: frame = frame.f_back
    tree = json.dumps({"!": "list", "of": values}, separators=(",", ":")).encode()
    body = b"%d\\n" % len(tree) + tree
    return struct.pack("<Qcd8s", len(body), b"r", 1.0, frame.f_locals["mark"]) + body
"""
FORGED = WORK + REPLY + "def work(x):\n    os.write(4, reply([0.0] * len(x)))\n    return []\n"
AHEAD = (
    WORK
    + REPLY
    + """
slow, calls = work, 0
def work(x):
    global calls
    calls += 1
    found = slow(x)
    if calls == 2: os.write(4, reply(found) * 40)
    return found
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
        for i in range(36): work.work([float(i)] * 150)
    os._exit(0)
os._exit(0)
"""
CLOCK = (
    SLOW
    + """
import time
real, zero = time.perf_counter, time.perf_counter()
time.perf_counter = lambda: zero + (real() - zero) / 10
"""
)
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
WAKES = """
import ctypes, signal
def wakes():
    # Timers of the kernel continue this process; a stop takes away those that are just going off, and leaves the rest.
    signal.signal(signal.SIGCONT, lambda *_: None)  # a kernel keeps back what is ignored
    libc = ctypes.CDLL(None)
    event, timer = (ctypes.c_int * 16)(0, 0, signal.SIGCONT, 0), ctypes.c_void_p()
    for i in range(40):
        assert libc.timer_create(1, event, ctypes.byref(timer)) == 0
        assert libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 2 * 10**8, 0, (i + 1) * 5 * 10**6), None) == 0
""" + HOG.replace("        while True:", "        wakes()\n        while True:")
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
READS_INPUTS = (
    SLOW
    + """
import glob, sys
shown = None
def visible():
    mounts = [line.split()[4] for line in open("/proc/self/mountinfo")]
    own = [place for place in mounts if "/private" in place or "/drivers" in place]
    files = [file for place in own for file in glob.glob(place + "/**/inputs.py", recursive=True)]
    return bool(files) or any(hasattr(module, "make") for module in list(sys.modules.values()))
def work(x):
    global shown
    if shown is None: shown = visible()
    return once(x) if shown else [once(x) for _ in range(PASSES)][0]
"""
)
DRAWS = r"""
def work(x): raise RuntimeError("\x1b[2J\nfaster: the interval lies above 0")
"""
HASHED = (
    WORK
    + """
import os
slow = work
if os.environ["PYTHONHASHSEED"] != "0":
    def work(x): return [0.0] * len(x)
"""
)
REMEMBERS = (
    SLOW
    + """
import os
log = os.environ["XDG_CACHE_HOME"] + "/processes"
with open(log, "a") as file: file.write("x")
if os.path.getsize(log) > 3: PASSES = 1
"""
)
SPREAD = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        held = bytearray(b'x') * (32 << 20)
        time.sleep(0.3)
        os._exit(0)
for _ in range(3): os.wait()
"""
SENDS = """
def work(x):
    total = 0.0
    for _ in range(260):
        for one in x: total += one * one
    return [int(one * 1000) for one in x]
"""
SENDS_QUICKLY = """
import sys
def patched():
    frame = sys._getframe()
    while frame and "wire" not in frame.f_locals: frame = frame.f_back
    if frame is None: return
    wire = frame.f_locals["wire"]
    encode = wire.encode
    def quick(value):
        if type(value) is not list: return encode(value)
        tree = '{"!":"list","of":' + str(value).replace(" ", "") + "}"
        return [b"%d\\n" % len(tree), tree.encode()]
    wire.encode = quick
patched()
"""
ECHOES_SLOWLY = """
import sys, time
def patched():
    frame = sys._getframe()
    while frame and "wire" not in frame.f_locals: frame = frame.f_back
    if frame is None: return
    wire = frame.f_locals["wire"]
    decode = wire.decode
    def slow(body, **more):
        if sys._getframe(1).f_locals.get("letter") == b"e":
            stop = time.perf_counter() + 0.0015
            while time.perf_counter() < stop: pass
        return decode(body, **more)
    wire.decode = slow
patched()
"""
SUMS = "def work(x): return [sum(x)]\nonce = work\n"
ITERATES = (
    WORK
    + """
class Late(list):
    def __iter__(self): return iter(once(self.x))
def work(x):
    found = Late([0.0] * len(x))
    found.x = x
    return found
"""
)
SKIPS = """
import pytest
@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(): return True
"""
KERNEL = {"kernel.c": "int kernel(int n) { return n; }\n", "fast.c": "int fast(int n) { return n; }\n"}
BUILD = '["cc", "-shared", "-fPIC", "-o", "kernel.so", "kernel.c"]'
COMPILED = "import ctypes\nassert ctypes.CDLL('./kernel.so').kernel(3) == 3\n" + WORK
QUICK = WORK.replace("PASSES = 2", "PASSES = 1")
FILLS = (
    QUICK
    + """
import os
for i in range(12):
    with open(f"{os.environ['XDG_CACHE_HOME']}/{i}", "wb") as file: file.write(bytes(1 << 20))
"""
)
PIPES = (
    QUICK
    + """
import os, resource
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
held = [os.pipe() for _ in range(700)]
"""
)
STALLS = "import sys, time\nif 'pytest' in sys.modules: time.sleep(600)\n" + QUICK
LOCKS = (
    WORK
    + """
import fcntl, time
shared = open("{folder}/shared", "rb")
def work(x):
    try: fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: time.sleep(0.02)
    try: return once(x)
    finally: fcntl.flock(shared, fcntl.LOCK_UN)
"""
)
HOLDS_LOCK = LOCKS + "held = open('{folder}/shared', 'rb')\nfcntl.flock(held, fcntl.LOCK_EX)\nwork = once\n"
FORESEES = (
    SLOW
    + """
import os, random
drawn = random.Random(int(os.environ["PYTHONHASHSEED"]))
known = {}
for _ in range(16):
    guess = random.Random(drawn.getrandbits(53))
    x = [guess.random() for _ in range(150)]
    known[tuple(x)] = once(x)
slow = work
def work(x): return list(known[tuple(x)]) if tuple(x) in known else slow(x)
"""
)
