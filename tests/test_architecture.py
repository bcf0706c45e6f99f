"""Who may import whom, and what may not be written anywhere."""

import ast
import io
import re
import tokenize
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Lowest first. A file imports from its own folder, from folders on lines above its own, and from files in hlm/ itself.
FLOORS = [
    {"data", "encoders", "hub"},
    {"planning"},  # reads encoders alone; embedding asks it for the width of a teacher before any weights load
    {"vectors", "serving"},
    {"indexes"},
    {"embedding"},
    {"evaluation", "demo"},
    {"training"},
    {"benchmark"},  # it times training too
    {"publishing"},
]
DOORS = {"hlm", "hlm.cli"}  # they reach every folder, and no folder reaches them; hlm/__init__.py is lazy
FILES = sorted((ROOT / "hlm").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
MEASURING = sorted((ROOT / "results/measure").glob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in FILES}


@cache
def imported(path: Path, everywhere: bool = True) -> frozenset[str]:
    """Modules by their whole names: `from hlm.data import words` names `hlm.data.words`. With `everywhere`, inside
    functions too; else what an import of the file runs at once."""
    found, nodes = set(), list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not read here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            if everywhere or not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
                nodes += ast.iter_child_nodes(node)
    return frozenset(found)


def ours(path: Path, everywhere: bool = True) -> set[str]:
    return {name for name in imported(path, everywhere) if name.split(".")[0] == "hlm"}


def package(name: str) -> str:
    """The folder of a module inside hlm/; "" of a file in hlm/ itself."""
    return name.split(".")[1] if name.count(".") == 2 or (MODULES[name].name == "__init__.py" and name != "hlm") else ""


def floor(folder: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if folder in names)


def test_every_folder_has_its_floor():
    assert {package(name) for name in MODULES} - {""} == set().union(*FLOORS)


@pytest.mark.parametrize("name", MODULES)
def test_the_library_imports_downwards_only(name):
    path, here = MODULES[name], package(name)
    assert not {other.split(".")[0] for other in imported(path)} & {"recipes", "results", "spaces", "tests"}
    for other in ours(path) - {"hlm"} if name not in DOORS else ():
        there = package(other)
        assert other in MODULES and other not in DOORS, f"{name} imports {other}"
        assert not there or (here and (here == there or floor(there) < floor(here))), f"{name} imports {other}"


def test_no_circle_of_imports():
    """Not even one that imports inside functions break."""
    left = {name: ours(path) - {name, "hlm"} for name, path in MODULES.items() if name != "hlm"}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"these import one another: {sorted(left)}"


@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name].name == "__init__.py"])
def test_importing_a_folder_imports_nothing(name):
    assert not ours(MODULES[name], everywhere=False)


def test_the_wheel_has_every_folder():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    elsewhere = {"hlm.model_cards", "hlm.recipes"}
    assert set(settings["packages"]) == {n for n in MODULES if MODULES[n].name == "__init__.py"} | elsewhere
    assert all((ROOT / settings["package-dir"][name]).is_dir() for name in elsewhere)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_do_not_import_one_another(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"recipes", "results"}
    assert not any(name.startswith("hlm.recipes") for name in imported(path))
    # Recipes run with their own folder first on the path: `import evaluate` there is our recipe, not the library.
    assert not imported(path) & {"evaluate", "hlm.evaluation.hf_metric"}


@pytest.mark.parametrize("path", FILES + RECIPES + MEASURING, ids=dotted)
def test_nothing_is_unpickled_and_no_remote_code_runs(path):
    text = path.read_text()
    assert not imported(path) & {"pickle", "dill", "joblib", "shelve"}
    assert not re.search(r"torch\.(load|save)\(|allow_pickle=True|trust_remote_code=True|use_auth_token", text)


def test_training_arguments_never_carry_a_token_into_a_manifest():
    from hlm.training.trainer import TrainingArguments, recorded

    assert "secret" not in str(recorded(TrainingArguments(output_dir="x", hub_token="hf_secret")))


MOST_LINES, MOST_CODE = 400, 60  # of a file; of a function, its docstring, comments and empty lines not counted


def code_lines(text: str) -> dict[str, int]:
    """Lines of code of each function in a file, nested ones and methods too, by its line and name."""
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            code |= set(range(token.start[0], token.end[0] + 1))
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            docstring = range(first.lineno, first.end_lineno + 1) if ast.get_docstring(node, clean=False) else range(0)
            found[f"{node.lineno} {node.name}"] = len(code & {*range(node.lineno, node.end_lineno + 1)} - {*docstring})
    return found


def test_lines_of_code_are_counted():
    text = '''
def f(a,
      b):
    """Two
    lines."""
    # a comment

    def g():
        return """a text
of two"""
    return g
'''
    assert code_lines(text) == {"2 f": 6, "8 g": 3}


def test_no_file_and_no_function_is_too_long():
    folders = [ROOT / name for name in ("hlm", "recipes", "results", "spaces", "tests")]
    long = []
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        text, name = path.read_text(), path.relative_to(ROOT)
        if (lines := len(text.splitlines())) > MOST_LINES:
            long.append(f"{name}: {lines} lines")
        long += [f"{name}:{at}: {count} lines of code" for at, count in code_lines(text).items() if count > MOST_CODE]
    assert not long, "split by meaning:\n" + "\n".join(long)
