"""transformers' own test of experts implementations, with moeyard among them.

    python benchmarks/transformers_tests.py CHECKOUT [OPTIONS] [-- OPTIONS OF PYTEST]

CHECKOUT is a folder with transformers' sources, of the version that is installed; its `tests` alone are read. The test
compares logits of small models under every implementation with eager ones, in float32, float16 and bfloat16.

    python benchmarks/transformers_tests.py ~/transformers
    python benchmarks/transformers_tests.py ~/transformers --models qwen3_moe gpt_oss -- -x
    python benchmarks/transformers_tests.py ~/transformers --baseline    # transformers' implementations alone

"moeyard" is added to the test's two tables, its list of implementations and its dictionary of mocks, while the file is
imported. Nothing in CHECKOUT is changed. The exit status is pytest's.
"""

import argparse
import ast
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

TEST = "_test_eager_matches_batched_and_grouped_inference"
MODULE = "tests.test_modeling_common"
_FORWARD = "__import__('moeyard.integrations.transformers', fromlist=['experts_forward']).experts_forward"


def with_moeyard(source: str) -> ast.Module:
    """The test's module with moeyard in its tables; ValueError where these are not as they are known to be."""
    tree = ast.parse(source)
    changed = set()
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef) or function.name != TEST:
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            name, value = node.targets[0].id, node.value
            if name == "implementations" and isinstance(value, ast.List):
                value.elts.append(ast.Constant("moeyard"))
                changed.add(name)
            elif name == "mocks" and isinstance(value, ast.Dict):
                value.keys.append(ast.Constant("moeyard"))
                value.values.append(ast.parse(f"Mock(wraps={_FORWARD})", mode="eval").body)
                changed.add(name)
    if changed != {"implementations", "mocks"}:
        raise ValueError(
            f"CHECKOUT: expected {TEST} with a list `implementations` and a dictionary `mocks`, got {sorted(changed)}"
        )
    return ast.fix_missing_locations(tree)


class Changed:
    """Finds and loads the test's module, changed; all others are left to Python."""

    def __init__(self, checkout: Path) -> None:
        self.path = checkout / "tests" / "test_modeling_common.py"

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        """The module's place; None for others."""
        return importlib.util.spec_from_loader(name, self, origin=str(self.path)) if name == MODULE else None

    def create_module(self, _: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """None: Python makes it."""
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        """Runs the changed source in the module."""
        module.__file__ = str(self.path)
        exec(compile(with_moeyard(self.path.read_text()), str(self.path), "exec"), module.__dict__)  # noqa: S102

    def pytest_sessionstart(self) -> None:
        """Before any test module is imported, and before pytest's own finder."""
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]


def files_of(checkout: Path, models: Sequence[str]) -> list[str]:
    """The tests of models that have experts: of the named ones, or of all whose sources use the experts interface."""
    folders = [checkout / "tests" / "models" / name for name in models]
    if not folders:
        sources = sorted((checkout / "src" / "transformers" / "models").glob("*/modeling_*.py"))
        named = dict.fromkeys(p.parent.name for p in sources if "@use_experts_implementation" in p.read_text())
        folders = [checkout / "tests" / "models" / name for name in named]
    found = [str(path) for folder in folders for path in sorted(folder.glob("test_modeling_*.py"))]
    if not found:
        raise ValueError(f"CHECKOUT: expected tests/models/*/test_modeling_*.py of models with experts in {checkout}")
    return found


def main(given: Sequence[str]) -> int:
    """Runs the tests; returns pytest's status, or 2 where CHECKOUT is none."""
    split = list(given).index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument(
        "--models", nargs="+", default=[], help="folders of tests/models; unless given all with experts"
    )
    parser.add_argument("--baseline", action="store_true", help="leave moeyard out")
    arguments = parser.parse_args(list(given)[:split])
    checkout = arguments.checkout.resolve()
    try:
        files = files_of(checkout, arguments.models)
        finder = Changed(checkout)
        if not arguments.baseline:
            with_moeyard(finder.path.read_text())
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(checkout))
    options = ["-q", "-k", TEST.removeprefix("_"), "-p", "no:cacheprovider", f"--rootdir={checkout}"]
    plugins = [] if arguments.baseline else [finder]
    return int(pytest.main([*files, *options, *list(given)[split + 1 :]], plugins=plugins))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
