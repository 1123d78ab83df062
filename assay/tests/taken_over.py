"""Candidates that take their worker's place while they are imported, and the bases that they do no more than.

Called by anybody else than a worker they do what base does.
"""

TAKES_OVER = '''
import gc, os, struct, sys
SLEEPS = True
def take_over(decode, encode, called):
    """Answers all that a worker is asked, from within the import. `called`: a decoded input -> output, last input."""
    frame = sys._getframe()
    while frame and "mark" not in frame.f_locals: frame = frame.f_back
    if frame is None: return
    head, waiting, nothing = struct.Struct("<Qcd8s"), bytearray(), b"4\\nnull"
    def send(mark, body, number=1e-3):
        rest = memoryview(head.pack(len(body), b"r", number, mark) + body)
        while rest: rest = rest[os.write(4, rest):]
    send(frame.f_locals["mark"], nothing)
    gc.disable()
    os.set_blocking(3, SLEEPS)
    outputs, last, echoed = [], b"", b""
    while True:
        size = head.unpack_from(waiting)[0] if len(waiting) >= head.size else 1 << 62
        if len(waiting) < head.size + size:
            try: more = os.read(3, 1 << 20)
            except BlockingIOError: continue
            if not more: os._exit(0)
            waiting = bytearray(more) if not waiting else waiting + more
            continue
        _, letter, number, mark = head.unpack_from(waiting)
        body, waiting = waiting[head.size : head.size + size], waiting[head.size + size :]
        if letter == b"c":
            output, given = called(decode(body))
            reply = encode(output)
            send(mark, reply)
            outputs, last = [reply, *outputs[:1]], body if given is None else encode((given,))
        elif letter == b"a": send(mark, last)
        elif letter in b"oz": send(mark, outputs[int(number)])
        elif letter == b"e": send(mark, echoed)
        elif letter == b"k": echoed = body; send(mark, nothing)
        else: send(mark, nothing)
'''
LISTS = """
# Outputs are many small lists: the worker takes longer to write them than one that knows what they are.
def work(x):
    y = x[:]
    total = 0.0
    for _ in range(5500):
        for one in y: total += one * one
    y.sort()
    return [[int(one * 1000)] for one in y for _ in range(5)]

def make(seed):
    import random
    drawn = random.Random(seed)
    return ([drawn.random() for _ in range(20)],)
"""
QUICK_LISTS = (
    LISTS
    + LISTS.replace("y = x[:]", "y = x").replace("def work", "def spoils")
    + TAKES_OVER
    + """
import json
def quick(value):
    tree = str(value).replace(" ", "").replace("[", '{"!":"list","of":[').replace("]", "]}").encode()
    return b"%d\\n" % len(tree) + tree
take_over(lambda body: json.loads(body[body.rindex(b"[") : -3]), quick, lambda x: (spoils(x), None))
"""
)
SLEEPLESS = QUICK_LISTS.replace("SLEEPS = True", "SLEEPS = False")
"""It waits for requests without ever giving its processor away."""
ARRAYS = """
import numpy as np
def work(x):
    y = x.copy()
    y *= 0.5
    return y

def following(given, y):
    return (y.copy(),)

def make(seed):
    return (np.random.default_rng(seed).random(20000),)
"""
QUICK_ARRAYS = (
    ARRAYS
    + ARRAYS.replace("y = x.copy()", "y = x").replace("def work", "def spoils")
    + TAKES_OVER
    + """
LINKS = 300
def of(body):
    size = body[:24].partition(b"\\n")[0]
    return np.frombuffer(body, np.float64, -1, len(size) + 1 + int(size)).copy()
def quick(value):
    array = value[0] if isinstance(value, tuple) else value
    tree = b'{"!":"array","dtype":"<f8","shape":[%d],"size":%d}' % (array.size, array.nbytes)
    tree = b'{"!":"tuple","of":[%s]}' % tree if isinstance(value, tuple) else tree
    return b"%d\\n" % len(tree) + tree + array.tobytes()
def chained(x):
    for _ in range(LINKS - 1): x = spoils(x)  # where it was, and given on as it is
    last = x.copy()
    return spoils(x), last
take_over(of, quick, chained)
"""
)
