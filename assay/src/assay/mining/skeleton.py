"""A driver, inputs and strategies for functions whose signatures are known. What they do not say is to be filled in.

A function of the driver stands for one of the repository: it takes plain values and returns plain values, since values
cross to the judge as JSON and raw arrays.
"""

import re
from collections.abc import Callable, Sequence

from assay.mining import values
from assay.mining.draft import Draft
from assay.mining.functions import Function, Parameter

_MOST = 3
_INDENT = "    "
_DRIVER = """What is timed, in every arm.

Numbers, texts, bytes, arrays, lists, tuples and dicts can be returned and compared. Return the parts of other values.
"""
Init = Callable[[str], Function | None]


def skeleton(draft: Draft, found: Sequence[tuple[str, Function]], init: Init) -> None:
    """Adds workloads, properties and files to a draft, for at most three functions.

    `init` finds the `__init__` of `module:Class`, by which objects are made.
    """
    chosen = [one for one in found if one[1].public] or list(found)
    if not chosen:
        draft.unknown.append("which function to call: no Python function of base is touched; fill in driver.py")
    elif not chosen[0][1].public:
        draft.unknown.append(f"{chosen[0][1].name} is private: a public function that calls it may be better")
    if len(chosen) > _MOST:
        names = ", ".join(one.name for _, one in chosen[_MOST:])
        draft.unknown.append(f"whether these, which are touched as well, should be timed: {names}")
    pieces = [_Piece(draft, module, one, init) for module, one in chosen[:_MOST]]
    for piece in pieces:
        run = {"kind": "call", "target": f"driver.py:{piece.name}", "inputs": f"inputs.py:{piece.name}"}
        draft.workloads.append({"name": piece.name.replace("_", "-"), "run": run})
        draft.properties.append(
            {
                "name": piece.name.replace("_", "-"),
                "target": f"driver.py:{piece.name}",
                "strategy": f"strategies.py:{piece.name}",
            }
        )
    if not pieces:
        draft.workloads.append(
            {"name": "to-fill-in", "run": {"kind": "call", "target": "driver.py:run", "inputs": "inputs.py:run"}}
        )
    imports = sorted({f"import {module}" for module, _ in chosen[:_MOST]})
    drivers = [piece.driver() for piece in pieces] or [_fill("run(*given)", "a call of what the commit changes")]
    inputs = [piece.inputs() for piece in pieces] or [_fill("run(seed)", "arguments of the call, from a seed")]
    draft.files["driver.py"] = _module(_DRIVER, imports, drivers)
    draft.files["inputs.py"] = _module("Arguments from a seed, new ones for every call.", ["import random"], inputs)
    if pieces:
        strategies = [piece.strategy() for piece in pieces]
        lines = ["from hypothesis import strategies"]
        draft.files["strategies.py"] = _module("What outputs are compared on.", lines, strategies)


class _Piece:
    """One function, its driver, inputs and strategy."""

    def __init__(self, draft: Draft, module: str, function: Function, init: Init) -> None:
        self.draft, self.module, self.function = draft, module, function
        self.name = re.sub(r"\W+", "_", function.name.removesuffix(".__init__")).strip("_").lower()
        made = function.owner and not function.static and not function.name.endswith("__init__")
        self.maker = init(f"{module}:{function.owner}") if made else None
        self.made = bool(made)

    def driver(self) -> str:
        """The call. Objects are made in it, so that their making is timed with it, which is said."""
        given = ", ".join(one.name for one in self.wanted())
        owner = f"{self.module}.{self.function.owner}"
        if self.function.name.endswith("__init__"):
            call = f"{owner}({self._passed(self.function)})"
        elif self.made:
            call = f"{owner}({self._passed(self.maker)}).{self.function.name.rpartition('.')[2]}"
            call += f"({self._passed(self.function)})"
            self.draft.unknown.append(f"driver.py: {self.name} makes its object in every call, which is timed as well")
        else:
            call = f"{self.module}.{self.function.name}({self._passed(self.function)})"
        return f"def {self.name}({given}):\n{_INDENT}return {call}\n"

    def inputs(self) -> str:
        """Values that the annotations allow, and an error that says what to fill in for the others."""
        lines = [f"def {self.name}(seed):", f"{_INDENT}random.seed(seed)"]
        lines += [f"{_INDENT}{one.name} = {values.drawn(one)}" for one in self.wanted() if values.drawn(one)]
        names = "".join(f"{one.name}, " for one in self.wanted())
        lines += self._last(values.drawn, f"({names.rstrip()})")
        return "\n".join(lines) + "\n"

    def strategy(self) -> str:
        """The same as strategies."""
        lines = [f"def {self.name}():"]
        lines += [f"{_INDENT}{one.name} = {values.strategy(one)}" for one in self.wanted() if values.strategy(one)]
        names = ", ".join(one.name for one in self.wanted())
        lines += self._last(values.strategy, f"strategies.tuples({names})")
        return "\n".join(lines) + "\n"

    def wanted(self) -> list[Parameter]:
        """Parameters without a default, of the object's making and of the call."""
        makers = self.maker.parameters if self.maker else ()
        found = [one for one in (*makers, *self.function.parameters) if not one.default]
        found = [one for one in found if one.kind in ("positional", "keyword")]
        return list({one.name: one for one in found}.values())

    def _passed(self, function: Function | None) -> str:
        given = [one for one in (function.parameters if function else ()) if not one.default]
        positional = [one.name for one in given if one.kind == "positional"]
        return ", ".join([*positional, *(f"{one.name}={one.name}" for one in given if one.kind == "keyword")])

    def _last(self, known: Callable[[Parameter], str], whole: str) -> list[str]:
        """The last line: what is returned, or an error that says which values are missing."""
        lacking = [one for one in self.wanted() if not known(one)]
        if not lacking:
            return [f"{_INDENT}return {whole}"]
        words = ", ".join(f"{one.name}: {one.annotation or 'not annotated'}" for one in lacking)
        if known is values.drawn:
            self.draft.unknown.append(f"inputs.py, strategies.py: values of {words} ({self.name})")
        return [f"{_INDENT}raise NotImplementedError({f'fill in {words}; return {whole}'!r})"]


def _fill(signature: str, words: str) -> str:
    return f"def {signature}:\n{_INDENT}raise NotImplementedError({f'fill in {words}'!r})\n"


def _module(words: str, imports: list[str], parts: list[str]) -> str:
    return "\n".join([f'"""{words}"""', "", *imports, *([""] * 2 if imports else [""]), "\n\n".join(parts)])
