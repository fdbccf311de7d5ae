"""The rules of the house, read from the syntax trees: who may import whom, how long a function may be."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "chimera_cli"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower numbers may be imported by higher ones, never the other way round.
RANKS = {
    "errors": 0, "events": 0, "figures": 0, "statistics": 0,
    "runs": 1, "runtime": 1,
    "data": 2, "models": 2, "slo": 2, "telemetry": 2,
    "training": 3, "evaluation": 3, "tracking": 3, "ui": 3, "reporting": 3,
    "services": 4, "config": 4,
    "cli": 5, "__main__": 6,
}  # fmt: skip

# Who alone may import what.
GATES = {
    "typer": {"cli"},
    "rich": {"cli", "ui", "__main__"},
    "mlflow": {"tracking"},
    "pynvml": {"telemetry"},
}


def part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_point_down() -> None:
    wrong = []
    for path in FILES:
        own = part(path)
        others = {name.split(".")[1] for name in imports(path) if name.startswith("chimera_cli.") and name.count(".")}
        for other in others & set(RANKS) - {own}:
            # Services read configs and configs know nothing of services: one rank, one direction.
            if own in RANKS and RANKS[other] >= RANKS[own] and (own, other) != ("services", "config"):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert wrong == []


def test_each_library_has_its_gate() -> None:
    wrong = []
    for path in FILES:
        for library in {name.split(".")[0] for name in imports(path)}:
            # Typer vendors Click: importing it would mean another copy with other classes.
            if library == "click" or part(path) not in GATES.get(library, {part(path)}):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {library}")
    assert wrong == []


def test_functions_are_short() -> None:
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - (body[0].lineno if body else node.lineno) + 1
            if lines > limit(path, node):
                long.append(
                    f"{path.relative_to(PACKAGE)}: {node.name} has {lines} lines, {limit(path, node)} are allowed"
                )
    assert long == []


def limit(path: Path, node: ast.FunctionDef) -> int:
    if path.name == "loop.py" and node.name == "train":
        return 120
    is_command = part(path) == "cli" and any("command" in ast.unparse(item) for item in node.decorator_list)
    return 25 if is_command or node.name.endswith("_command") else 40


def test_public_things_say_what_they_are() -> None:
    silent = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            silent.append(str(path.relative_to(PACKAGE)))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert silent == []
