"""The laws of the house: who imports whom, what importing costs, what is public, how long a file may be."""

import ast
import dataclasses
import doctest
import inspect
import io
import json
import pydoc
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import moeyard
from moeyard import helptexts
from moeyard.dispatch import refusals
from moeyard.testing import python

TESTS = Path(__file__).parent
SOURCE = Path(moeyard.__file__).parent
OPS = (
    "router", "layout", "permute", "grouped_gemm", "activation", "combine", "training", "experts", "straight_through",
    "layer", "losses",
)  # fmt: skip
ROOM = {"values"} | {
    f"dispatch.{name}" for name in ("again", "call", "checks", "curves", "ids", "invariance", "op", "sizes", "table")
}
"""What an operator's room may import, besides rooms that it is built on."""
IMPLEMENTATION = {"values", "quant"} | {f"dispatch.{name}" for name in ("call", "curves", "ids", "processes", "sizes")}
ARROWS = {  # module -> what of moeyard it may import
    "quant": set(),
    "values": {"quant"},
    "dispatch.again": set(),
    "dispatch.memory": set(),
    "dispatch.curves": {"values"},
    "dispatch.ids": {"values"},
    "dispatch.invariance": {"quant"},
    "dispatch.sizes": {"values"},
    "dispatch.processes": set(),
    "dispatch.schemes": {"quant"},
    "dispatch.checks": {"values", "quant"},
    "dispatch.call": {"values", "quant"},
    "dispatch.refusals": {"dispatch.call"},
    "dispatch.table": {"values", "dispatch.call", "dispatch.invariance", "dispatch.refusals", "dispatch.schemes"},
    "dispatch.op": {"values", "dispatch.again", "dispatch.memory", "dispatch.table"},
    "layout_memory": {"values", "dispatch.checks"},
    "layout": ROOM | {"layout_memory"},
    "permute": ROOM,
    "combine": ROOM,
    "activation": ROOM,
    "grouped_gemm": ROOM | {"combine"},
    "training": ROOM | {"activation", "combine", "grouped_gemm", "layout"},
    "losses": ROOM,
    "helptexts": set(),
    "router": ROOM | {"layout", "layout_memory"},
    "experts": ROOM | {"quant", "activation", "training"},
    "straight_through": ROOM
    | {"quant", "quantize", "vectorised", "activation", "combine", "grouped_gemm", "training", "experts"},
    "layer": ROOM | {"experts", "grouped_gemm", "router"},
    "checkpoints": {"values", "quant", "dispatch.checks", "checkpoints"},
    "quantize": {"values", "quant", "dispatch.checks", "vectorised"},
    "pack": {"values", "quant", "dispatch.checks"},
    "warmup": ROOM | {"dispatch.schemes", "cuda", "triton", *OPS},
    "reference": {"values", "quant", "reference"},
    "vectorised": IMPLEMENTATION | {"vectorised"},
    "cpu": IMPLEMENTATION | {"cpu"},
    "cuda": IMPLEMENTATION | {"dispatch.invariance", "dispatch.schemes", "cuda"},
    "triton": IMPLEMENTATION | {"triton"},
    "testing": {"", "values", "quant", "cuda", "triton", "reference", "parallel", "testing"}
    | {f"dispatch.{name}" for name in ("again", "refusals", "table")},
    "integrations": ROOM | {"", "quant", "combine", "integrations", "parallel"},
    "parallel": ROOM | {"", "quant", "cuda", "parallel", "integrations", "layout", "permute", "combine", "experts"},
}
CUDA_ARROWS = {  # folder of cuda -> what of cuda it may import, besides itself
    "runtime": set(),
    "align": {"runtime"},
    "rows": {"runtime"},
    "route": {"runtime", "align"},
    "experts": {"runtime", "align", "rows"},
    "push": {"runtime"},
}
ON_DEVICE = (*OPS, "dispatch", "vectorised", "cuda", "triton", "integrations", "parallel")
READS = {"parallel/wire.py": "tolist"}
"""The one place of a room that may wait for a device: an all-to-all needs its counts on the host."""
PUBLIC = (
    "GPT_OSS_ACTIVATION Activation ExpertScales ExpertWeights Layout Permuted QuantScheme Routing activate "
    "batched_moe_align_block_size combine dequantize_experts empty_layout experts_from_interleaved explain "
    "fused_experts grouped_gemm load_balancing_loss load_experts moe_align_block_size moe_layer "
    "pack_experts "
    "moe_lora_align_block_size moe_sum permute "
    "permute_to_fp8 quantize_experts route route_and_align router_z_loss save_experts shuffle_rows "
    "straight_through_experts unpack_experts update_selection_bias warmup"
).split()


def imports_of(path: Path, package: str = "moeyard") -> set[str]:
    """The rooms of a package that a file imports, modules of `dispatch` one by one; "" for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
            if node.module in (package, f"{package}.dispatch"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if f"{name}.".startswith(f"{package}."):
                room, module = [*name.removeprefix(package).split("."), "", ""][1:3]
                found.add(f"{room}.{module}" if room == "dispatch" and module else room)
    return found


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_imports_go_one_way(room: str) -> None:
    folder = SOURCE / room.replace(".", "/")
    for path in list(folder.rglob("*.py")) or [folder.with_suffix(".py")]:
        assert imports_of(path) <= ARROWS[room], path


@pytest.mark.parametrize("folder", sorted(CUDA_ARROWS))
def test_folders_of_cuda_import_one_way(folder: str) -> None:
    paths = list((SOURCE / "cuda" / folder).rglob("*.py"))
    assert len(paths) > 1
    for path in paths:
        assert imports_of(path, "moeyard.cuda") <= CUDA_ARROWS[folder] | {folder}, path


def test_sources_of_cuda_include_one_way() -> None:
    """Headers of `device` serve all; a folder includes those, its own, and those of folders that it may import."""
    homes = {path.name: path.parent.name for path in (SOURCE / "cuda").rglob("*.cu*")}
    for path in (SOURCE / "cuda").rglob("*.cu*"):
        folder = path.parent.name
        allowed = {"device", folder} | CUDA_ARROWS.get(folder, set())
        for name in re.findall(r'#include "(.+)"', path.read_text()):
            assert homes[name] in allowed, f"{path}: {name}"


def test_every_room_has_its_arrows() -> None:
    rooms = {path.stem if path.suffix else path.name for path in SOURCE.iterdir() if path.name != "py.typed"}
    inner = {f"dispatch.{path.stem}" for path in (SOURCE / "dispatch").glob("*.py") if path.stem != "__init__"}
    assert (rooms | inner) - {"__init__", "__main__", "__pycache__", "bench", "dispatch"} == set(ARROWS)
    folders = {path.name for path in (SOURCE / "cuda").iterdir() if path.is_dir()}
    assert folders - {"__pycache__", "device"} == set(CUDA_ARROWS)


def test_tests_import_no_test_modules() -> None:
    """What several test files need is in moeyard.testing; pytest itself hands over fixtures of conftest.py."""
    modules = {path.stem: path for path in TESTS.rglob("*.py")}
    for path in modules.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {*modules, "tests"}, path


def test_tests_of_assay_import_no_tests() -> None:
    """Theirs share modules beside them. A module of tests would bring its fixtures, marks and imports along."""
    for path in (TESTS.parent / "assay" / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("test_")], path


OPTIONAL = {"numpy", "numba", "typer", "rich", "matplotlib", "triton", "cuda", "transformers", "vllm"}
OPTIONAL |= {"safetensors", "compressed_tensors"}
MAY_IMPORT = {"cpu": {"numba", "numpy"}, "triton": {"triton"}, "cuda": {"cuda"}}
MAY_IMPORT |= {"bench": {"typer", "rich", "numba", "numpy"}, "testing": {"numpy", "triton"}}
MAY_IMPORT |= {"integrations": {"transformers"}}


def test_extras_are_imported_where_they_belong() -> None:
    """At the head of files: what an extra brings is imported by the rooms that the extra is for."""
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for node in ast.parse(path.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            taken = {name.split(".")[0] for name in names} & OPTIONAL
            assert taken <= MAY_IMPORT.get(room, set()), path


def test_no_host_reads_of_device_values() -> None:
    """`.item()`, `.tolist()`, `.nonzero()` and `.cpu()` wait for the device: only the reference may."""
    for room in ON_DEVICE:
        for path in list((SOURCE / room).rglob("*.py")) or [SOURCE / f"{room}.py"]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr != READS.get(str(path.relative_to(SOURCE))):
                    assert node.attr not in ("item", "tolist", "nonzero", "cpu"), f"{path}:{node.lineno}"


def test_public_names() -> None:
    assert sorted(moeyard.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert inspect.getdoc(getattr(moeyard, name)), f"{name} has no docstring"


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - {"GPT_OSS_ACTIVATION"}))
def test_help_shows_fields_and_an_example_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(helptexts.EXAMPLES) < set(PUBLIC)
    found = getattr(moeyard, name)
    shown = pydoc.render_doc(found, renderer=pydoc.plaintext)
    for field in dataclasses.fields(found) if dataclasses.is_dataclass(found) else ():
        assert not field.init or f"{field.name}: " in shown.partition("Example:")[0], f"{name}.{field.name}"
    names = {"moeyard": moeyard, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(found, name, globs=names)
    assert example.examples and "Example:" in shown, name
    words = io.StringIO()
    assert doctest.DocTestRunner().run(example, out=words.write).failed == 0, words.getvalue()


def in_fresh_process(code: str) -> str:
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = "import sys, json; before = set(sys.modules)\n{}\nprint(json.dumps(sorted(set(sys.modules) - before)))"


def test_importing_moeyard_imports_torch_and_nothing_else() -> None:
    code = "import torch\n" + LOADED.format("import moeyard")
    new = {name.split(".")[0] for name in json.loads(in_fresh_process(code))}
    assert {name for name in new if name not in sys.stdlib_module_names} == {"moeyard"}


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_only_the_cpu_implementation_imports_numba(impl: str) -> None:
    call = (
        "import torch, moeyard\n"
        "layout = moeyard.moe_align_block_size(torch.zeros(3, 2, dtype=torch.int32), num_experts=2, block_size=2, "
        f"impl='{impl}')\n"
        f"rows = moeyard.permute(torch.ones(3, 8), layout, impl='{impl}').rows\n"
        f"moeyard.combine(rows, layout, impl='{impl}')\n"
        "import sys; print(sorted(m for m in ('numba', 'typer', 'rich', 'matplotlib') if m in sys.modules))"
    )
    assert in_fresh_process(call).strip() == "[]"


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Missing())
"""
EXTRAS = ("numpy", "numba", "typer", "rich", "matplotlib")
OPERATORS = """
import torch, moeyard
ids = torch.tensor([[0, 2], [1, 2], [2, 0]], dtype=torch.int32)
weights = moeyard.ExpertWeights(torch.randn(3, 32, 16), torch.randn(3, 16, 16))
rows, factors = torch.randn(3, 16), torch.rand(3, 2)
for impl in ("auto", "torch", "reference"):
    layout = moeyard.moe_align_block_size(ids, num_experts=3, block_size=2, impl=impl)
    counts = torch.tensor([1, 0, 2], dtype=torch.int32)
    moeyard.batched_moe_align_block_size(counts, max_num_tokens=2, block_size=2, impl=impl)
    moeyard.moe_lora_align_block_size(ids, counts[:3], num_experts=3, block_size=2, max_loras=3, impl=impl)
    moved = moeyard.permute(rows, layout, impl=impl).rows
    moeyard.permute_to_fp8(rows, layout, impl=impl)
    moeyard.shuffle_rows(rows, counts, impl=impl)
    moeyard.moe_sum(moved[:2].view(1, 2, 16), impl=impl)
    moeyard.combine(moved, layout, factors, impl=impl)
    routing, _ = moeyard.route_and_align(rows, top_k=2, block_size=2, impl=impl)
    moeyard.grouped_gemm(rows, weights.w13, layout=layout, impl=impl)
    moeyard.activate(rows, impl=impl)
    moeyard.fused_experts(rows, moeyard.Routing(factors, ids), weights, impl=impl)
    moeyard.moe_layer(rows, torch.randn(3, 16), weights, top_k=2, impl=impl)
moeyard.warmup("cpu")
import moeyard.testing, moeyard.bench.workloads
assert moeyard.testing.layout_error(ids, 3, 2, dict(zip(layout.TENSORS, layout.tensors)), stable=True) is None
print(moeyard.explain("permute").chosen, sorted(set(sys.modules) & {packages}))
"""


def test_extras_are_declared() -> None:
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {name: {re.split(r"[<>=\[]", line)[0] for line in lines} for name, lines in extras.items()}
    assert [re.split("[<>=]", line)[0] for line in project["dependencies"]] == ["torch"]
    assert declared["cpu"] == {"numba", "numpy"} and declared["cli"] == {"typer", "rich"}
    assert declared["checkpoints"] == {"compressed-tensors"}
    assert declared["plot"] == {"matplotlib"} and extras["bench"] == ["moeyard[cpu,cli,plot]"]


def test_torch_alone_is_enough_for_all_operators() -> None:
    code = (WITHOUT + OPERATORS).replace("{packages}", str(set(EXTRAS)))
    assert in_fresh_process(code).splitlines()[-1] == "torch []"


@pytest.mark.parametrize("missing", ["typer", "rich"])
@pytest.mark.parametrize("arguments", [[], ["--help"], ["bench", "--list"]], ids=str)
def test_the_command_says_what_to_install(missing: str, arguments: list[str]) -> None:
    code = WITHOUT + f"sys.argv = ['moeyard', *{arguments}]\nimport moeyard.__main__ as command\ncommand.main()"
    done = python("-c", code.replace("{packages}", str({missing})))
    wanted = f"error: the moeyard command needs {missing}; install it with: pip install 'moeyard[cli]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)


def test_the_command_works_without_what_other_extras_bring() -> None:
    for arguments in (["--help"], ["doctor"], ["bench", "--list"], ["bench", "-w", "seed", "--rounds", "3"]):
        code = WITHOUT + f"sys.argv = ['moeyard', *{arguments}]\nimport moeyard.__main__ as command\ncommand.main()"
        done = python("-c", code.replace("{packages}", "{'numpy', 'numba', 'matplotlib', 'transformers'}"))
        assert done.returncode == 0, done.stderr


def test_works_without_numba() -> None:
    code = (
        "import importlib.util as u, torch; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'numba' else find(name, *a)\n"
        "import moeyard; print(moeyard.explain('permute'))\n"
        "print(moeyard.moe_align_block_size(torch.zeros(1, 1, dtype=torch.int32), num_experts=1, block_size=1))\n"
        "try: moeyard.moe_align_block_size(torch.zeros(1, 1).int(), num_experts=1, block_size=1, impl='cpu')\n"
        "except ValueError as error: print(error)"
    )
    printed = in_fresh_process(code)
    assert "permute on cpu (bfloat16): torch" in printed
    assert "cpu: numba is not installed (pip install 'moeyard[cpu]')" in printed
    assert "impl: 'cpu' refuses moe_align_block_size: numba is not installed (pip install 'moeyard[cpu]')" in printed


@pytest.mark.parametrize(
    ("value", "expected"),
    [("torch", "torch torch"), ("permute=torch", "cpu torch"), ("reference", "reference reference")],
)
def test_environment_overrides_the_choice(value: str, expected: str) -> None:
    if not refusals.installed("numba"):
        pytest.skip("numba is not installed")
    code = (
        f"import os; os.environ['MOEYARD_IMPL'] = '{value}'\n"
        "import moeyard; print(moeyard.explain('moe_align_block_size').chosen, moeyard.explain('permute').chosen)"
    )
    assert in_fresh_process(code).strip() == expected


@pytest.mark.parametrize("value", ["warp", "nothing=torch", "permute=warp"])
def test_a_bad_override_is_an_error(value: str) -> None:
    code = f"import os; os.environ['MOEYARD_IMPL'] = '{value}'\ntry:\n import moeyard\nexcept ValueError as e: print(e)"
    assert in_fresh_process(code).startswith("MOEYARD_IMPL: expected ")


def test_sizes_that_stay_readable() -> None:
    law = re.search(r"Rooms stay within (\d+) lines, files within (\d+)", (TESTS.parent / "DESIGN.md").read_text())
    assert law is not None
    of_rooms, of_files = map(int, law.groups())
    rooms = {SOURCE / f"{name}.py" for name in OPS}
    sources = [path for kind in ("*.py", "*.cu", "*.cuh") for path in SOURCE.rglob(kind)]
    assert rooms <= set(sources)
    for path in sources:
        limit = of_rooms if path in rooms else of_files
        assert len(path.read_text().splitlines()) <= limit, path


def test_nothing_inherits_beyond_what_is_allowed() -> None:
    allowed = {"NamedTuple", "Enum", "Protocol", "Module", "ModuleType", "TorchDispatchMode", "ValueError"}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {
                    base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "?") for base in node.bases
                }
                assert bases <= allowed, f"{path}: {node.name}"


def test_explain_names_every_implementation() -> None:
    seen = moeyard.explain("combine", "cuda")
    chosen = "cuda" if all(refusals.installed(name) for name in ("cuda.core", "cuda.bindings")) else "torch"
    assert seen.chosen == chosen
    assert seen.reasons["cpu"] == "takes CPU tensors, got cuda"
    assert str(seen).splitlines()[0] == f"combine on cuda (bfloat16): {chosen}"
    with pytest.raises(ValueError, match="op: expected one of"):
        moeyard.explain("softmax")
