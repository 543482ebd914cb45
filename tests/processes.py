"""Which tests start processes of their own: ranks, launches, commands. `make quick` leaves them out."""

import ast
from functools import cache
from pathlib import Path

STARTERS = {"run_ranks", "subprocess", "multiprocessing", "get_context", "ProcessPoolExecutor", "simulate"}
"""What a test that starts processes names, or what it calls does."""
FOLDER = Path(__file__).parent


@cache
def _definitions(module: Path) -> dict[str, ast.AST]:
    """What a module defines at its top, and what it imports from other modules of tests."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            found.update({alias.asname or alias.name: node for alias in node.names})
        elif isinstance(node, ast.Assign):
            found.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    return found


@cache
def _uses(module: Path, name: str) -> frozenset[tuple[Path, str]]:
    """What `module` names in what it calls `name`, and where that is looked up."""
    node = _definitions(module).get(name)
    if node is None:
        return frozenset()
    if isinstance(node, ast.ImportFrom):
        other = FOLDER.parent / f"{str(node.module).replace('.', '/')}.py"
        return frozenset({(other, name)} if other.exists() else ())
    used = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    used |= {argument.arg for child in ast.walk(node) if isinstance(child, ast.arguments) for argument in child.args}
    return frozenset((module, other) for other in used)


@cache
def starts_processes(module: Path, name: str) -> bool:
    """Whether what `module` calls `name`, or anything that it uses, starts a process."""
    seen, waiting = set(), [(module, name)]
    while waiting:
        found = waiting.pop()
        if found[1] in STARTERS:
            return True
        if found not in seen:  # functions may use one another
            seen.add(found)
            waiting.extend(_uses(*found))
    return False
