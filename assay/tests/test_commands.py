"""How a command that failed is told."""

from assay.arms.commands import words
from assay.arms.sandbox import Finished


def told(text: str) -> str:
    return words(Finished(1, text.encode(), 0.1, 0, ""))


def test_the_first_errors_of_a_compiler_are_told_behind_the_last_words() -> None:
    """Builders of several files go on after a failure."""
    more = "\n".join(f"[{i}/90] nvcc -c source{i}.cu" for i in range(2, 90))
    errors = "sum.cu(12): error: no conversion to half\nsum.cu(13): error #20: bad"
    said = told(f"FAILED: sum.o\n{errors}\n{more}\nninja: stopped")
    assert said.rpartition("ninja: stopped\n")[2] == errors
    assert said.startswith("ended with status 1: ")


def test_errors_are_few_short_and_not_told_twice() -> None:
    assert told("a.c:1: error: x") == "ended with status 1: a.c:1: error: x"
    lines = told("\n".join(f"a.c:{i}: error: {'x' * 500}" for i in range(50)) + "\n" + "y" * 2000).splitlines()
    assert [line[:9] for line in lines[-3:]] == ["a.c:0: er", "a.c:1: er", "a.c:2: er"]
    assert len(lines) == 4 and all(len(line) <= 300 for line in lines[1:])
    assert told("no errors, 3 terrors: fine\n" + "y" * 2000).count("\n") == 0
