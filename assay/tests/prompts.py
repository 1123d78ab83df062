"""Rendered prompts of our own wording, with the structure of those that harnesses write, for tests that read some.

REVERTED: the statistics show code that is taken away together with its tests, and the script calls something else.
SWAPPED: the script takes a module for a function, and passes arguments in another order than the function has them.
"""

SCRIPT = """import time
from shop.prices.rounding import round_up

count = 100
places = 2
step = 5
values = [one / 7 for one in range(count)]
start = time.time()
result = round_up(values, places, step)
print(f"took {time.time() - start:.4f}")
"""
_HEAD = f"""A code base lies at /home/somebody/bench/worktrees/shop-0007.
This script shows how it is used:

<test_script>
{SCRIPT}
</test_script>

Make it faster.

Basic guidelines:
1. Change non-test files only, inside /home/somebody/bench/worktrees/shop-0007.
2. Keep the code base functionally equivalent.
3. You may have to rebuild.

"""
_ONLY = """
IMPORTANT: You MUST change a file.

## Constraints
- No public API breakage
- All TestPack checks must pass

## Target Files (ONLY modify these)
"""
_END = """
## HAND IN:
When it is done:
```bash
git add -A
git commit -m 'Faster rounding'
git diff $(git merge-base HEAD origin/HEAD || git rev-parse HEAD~1) > /home/somebody/bench/patch.diff || true
finish
```

NO MORE ANALYSIS.
"""
REVERTED = (
    _HEAD
    + """Target files to optimize:
- src/shop/tax.py
- tests/test_tax.py
"""
    + _ONLY
    + """- `src/shop/tax.py`
- `src/shop/native/tax_table.c`
- `tests/test_tax.py`

## Files Modified (statistics)
```
 src/shop/tax.py               | 40 ++++------------------------------------
 .../shop/native/tax_table.c   | 30 ------------------------------
 tests/test_tax.py             | 22 ----------------------
 3 files changed, 4 insertions(+), 88 deletions(-)
```
"""
    + _END
)
EXAMPLE = """     table = [0] * size
-    for i in range(size): table[i] = fill
+    table = [fill] * size
"""
SWAPPED = (
    _HEAD
    + f"""<example_diff>
{EXAMPLE}...
</example_diff>

Look for patterns like:
- Replace loops by multiplication of lists
- Start editing files by iteration 3

Target files to optimize:
- src/shop/prices/rounding/round_up.py
"""
    + _ONLY
    + """- `src/shop/prices/rounding/round_up.py`

### What the developer did:
```
[perf] Round prices quicker (#7)

Signed-off-by: A Person <a.person@example.org>
```

### Files Modified (statistics):
```
 .../prices/rounding/round_up.py | 5 ++---
 1 file changed, 2 insertions(+), 3 deletions(-)
```
"""
    + _END.replace("'Faster", "\u00e2\u20ac\u02dcFaster")
)
