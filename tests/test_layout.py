"""The layout of the package: imports point down the levels, without circles; what only one module may import."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dist_contrastive
from dist_contrastive.losses.infonce import nt_xent
from tests.harness import run_ranks

ROOT = Path(dist_contrastive.__file__).parent

# A package stands for all that is in it. A new module gets its level here, deliberately.
LEVELS = {
    "": 0, "config": 0, "batch": 0, "rng": 0, "distributed": 0, "schedules": 0, "atomic": 0, "cli": 0, "processes": 0,
    "out_of_memory": 0, "liveness": 0, "rendezvous": 0, "signals": 0, "slurm": 0, "cadence": 0, "folder_lock": 0,
    "losses": 1, "models": 1, "data": 1, "optim": 1,
    "methods": 2, "evaluation": 2,
    "checkpoint": 3, "metrics": 3, "step": 3, "report": 3, "run_folder": 3, "launch": 3, "progress": 3,
    "trainer": 3, "preflight": 3, "simulate": 3, "trial": 3, "weights": 3,
    "recipes": 4, "run": 4, "dry_run": 4, "score": 4, "embedder": 4, "exporting": 4, "searching": 4,
    "service": 4, "vectors": 4,
    "train": 5, "pack": 5, "probe": 5, "stage": 5, "status": 5, "export": 5, "serve": 5, "study": 5, "index": 5, "embed": 5,
}  # fmt: skip
ENTRY_POINTS = 5

# Modules that may be imported where they are used: kernels for a GPU, as not every torch comes with Triton, what a run needs
# once it is done, as matplotlib and scikit-learn take seconds, and what the package itself offers to those who import it.
LATE = {
    "dist_contrastive.data.augment.cuda", "dist_contrastive.report", "dist_contrastive.embedder",
    "dist_contrastive.run_folder.trained",
}  # fmt: skip
# Packages that an installation may lack; these may be imported where they are used.
OPTIONAL = {
    "deepspeed", "fastapi", "starlette", "uvicorn", "prometheus_client", "onnx", "onnxruntime", "faiss", "pyarrow", "pymilvus",
}  # fmt: skip


def module_name(path: Path) -> str:
    """`losses.infonce` for losses/infonce.py, `losses` for losses/__init__.py, empty for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names of what the node imports: of `from a import b` both a and a.b, as b may be a module."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide the level"
            assert child.module
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def own_imports(name: str) -> set[str]:
    """The modules of this package that module `name` imports."""
    prefix = "dist_contrastive."
    found = (
        found.removeprefix(prefix)
        for found in imports(ast.parse(MODULES[name].read_text()))
        if found.startswith(prefix)
    )
    return {other for other in found if other in MODULES}


def level(name: str) -> int:
    top = name.partition(".")[0]
    assert top in LEVELS, f"give dist_contrastive/{top} a level in {Path(__file__).name}"
    return LEVELS[top]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_or_stay_on_their_level(name: str) -> None:
    if not name:  # it offers what lies above, and imports that late
        return
    too_high = {other for other in own_imports(name) if level(other) > level(name)}
    assert not too_high, f"{name} (level {level(name)}) imports {too_high}"


def test_no_circles() -> None:
    # What imports nothing that is left can go; a circle stays. A package's __init__ runs before each of its modules,
    # but it is the way it names them that counts.
    left = {name: own_imports(name) - {name} for name in MODULES}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in a circle: {sorted(left)}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("methods.")])
def test_a_method_imports_no_data_optimizer_launcher_or_other_method(name: str) -> None:
    allowed = {"losses", "models", "config", "batch", "rng", "distributed", "schedules"}
    others = {other for other in own_imports(name) if other.partition(".")[0] not in allowed}
    bases = {"base", "self_distillation", "masked_distillation", "image_text"}
    assert others <= {f"methods.{name}" for name in bases}


def test_only_one_module_reads_beton_files() -> None:
    importers = {
        name
        for name, path in MODULES.items()
        if any(found.partition(".")[0] == "ffcv" for found in imports(ast.parse(path.read_text())))
    }
    assert importers == {"data.beton"}


@pytest.mark.parametrize("name", MODULES)
def test_only_optional_packages_and_an_entry_points_work_are_imported_inside_functions(name: str) -> None:
    # What an entry point does takes seconds to import: its `main` parses and refuses first.
    late = {"dist_contrastive"} if level(name) == ENTRY_POINTS else set()
    for function in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            found = {name for name in imports(function) if not name.startswith(tuple(LATE))}
            lazy = {name.partition(".")[0] for name in found}
            assert lazy <= OPTIONAL | (late if function.name == "main" else set())


def wrong_shape_is_refused(rank: int) -> bool:
    rows = torch.zeros(4, 8)
    try:
        nt_xent(rows[0], rows, offset=0, num_views=2, temperature=0.1)
    except TypeError as error:
        return "jaxtyping" in type(error).__module__ or "beartype" in type(error).__module__ or "Float" in str(error)
    return False


def test_shapes_are_checked_in_tests_and_in_their_ranks() -> None:
    assert wrong_shape_is_refused(0)
    assert run_ranks(wrong_shape_is_refused, 2) == [True, True]
