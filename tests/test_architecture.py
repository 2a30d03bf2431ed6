"""The structure that docs and habits promise."""

import ast
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "vtp").rglob("*.py"), *(ROOT / "stages").rglob("*.py")])
# Each may import from earlier lines; parts of one line do not import each other, those of the first excepted.
LAYERS = [
    {
        *(
            "config",
            "params",
            "artefact",
            "texts",
            "draws",
            "finite",
            "device",
            "distributed",
            "host",
            "processes",
            "spark",
            "step",
        ),
        "version",
    },
    {"layers"},
    {"models", "losses", "flow", "data"},
    {"curation"},
    {"objectives", "training", "evaluation", "inference"},
    {"commands"},
    {"__main__"},
]
# The same of `stages/`: the body of a stage may use what stands before it, plans and `check` read bodies.
STAGES = [{"runner"}, {"figures"}, {"monitors"}, {"a stage"}, {"plans"}, {"check"}]
HEAVY = ("timm", "open_clip", "torchvision", "lpips", "matplotlib", "torch_fidelity", "pyarrow", "diffusers")
HEAVY += ("huggingface_hub", "onnxruntime", "rapidocr")


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


@cache
def graph() -> dict[str, set[str]]:
    """Modules of ours that each module imports, anywhere in its code."""
    return {
        module: {name for name in imports(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }


def rank(module: str, layers: list[set[str]]) -> int:
    part = module.split(".")[1]
    if module.startswith("stages.") and (ROOT / "stages" / f"{part}.py").exists() and part != "check":
        part = "a stage"
    return next(number for number, parts in enumerate(layers) if part in parts)


@pytest.mark.parametrize("module", [name for name in MODULES if name.count(".")])
def test_imports_flow_one_way(module):
    package = module.split(".")[0]
    layers = LAYERS if package == "vtp" else STAGES
    for name in graph()[module]:
        if name in ("vtp", "stages"):
            continue
        assert not (package == "vtp" and name.startswith("stages")), f"{module} imports {name}"
        if name.split(".")[:2] == module.split(".")[:2] or not name.startswith(package):
            continue
        below = rank(name, layers) < rank(module, layers)
        assert below or (package == "vtp" and rank(name, layers) == rank(module, layers) == 0), (
            f"{module} imports {name}: not below it"
        )


def test_no_module_imports_itself_through_others():
    edges = graph()
    for module in MODULES:
        seen, waiting = set(), list(edges[module])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += edges[name]
        assert module not in seen, f"{module} is in a circle"


def test_a_class_has_one_meaning():
    """Two classes of one name make a reader look up which one is meant."""
    homes = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name.lstrip("_")].append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_stages_holds_stages():
    """A file is a stage: a record, and `run` that takes it. What they share has a room of its own."""
    for path in (ROOT / "stages").glob("*.py"):
        if path.stem in ("__init__", "check"):
            continue
        functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert "run" in functions, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_card(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "split it"
    assert path.name not in {"utils.py", "common.py", "misc.py", "helpers.py"}
    if path.name != "distributed.py":
        assert not [name for name in imports(path) if name.startswith("torch.distributed")]
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), "say what the file is for"


def test_the_library_does_not_print():
    """But for a program of its own, which talks to a terminal."""
    programs = {"vtp/__main__.py"}
    printing = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if "vtp" in path.relative_to(ROOT).parts and "print(" in path.read_text()
    }
    assert printing == programs


def test_texts_leave_by_one_way():
    """Whatever is printed or written as CSV has no text that a terminal or a spreadsheet obeys (`vtp/texts.py`)."""
    ways = {
        "csv.writer": {"vtp/texts.py"},
        "csv.DictWriter": set(),
        "html.escape": {"vtp/texts.py"},
        "file=sys.stderr": {"stages/runner/environment.py", "vtp/__main__.py"},
        "logging.basicConfig": {"stages/runner/environment.py"},
    }
    for way, allowed in ways.items():
        assert {str(path.relative_to(ROOT)) for path in SOURCES if way in path.read_text()} == allowed, way


def test_sources_import_names_from_their_home():
    """`from vtp import X` is for users: its lazy loading hides from the code digests what is used."""
    assert not [path for path in SOURCES if "from vtp import" in path.read_text()]


def test_configs_load_without_heavy_libraries():
    """They would cost every stage seconds."""
    modules = [f"stages.{path.stem}" for path in (ROOT / "stages").glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("stage", ["prepare_data", "download", "summary", "report"])
def test_what_computes_nothing_loads_no_torch(stage):
    """It would take most of their time; the runner, which all have in common, does not ask for it either."""
    code = f"import sys, stages.{stage}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_public_names():
    import vtp

    for name in vtp.__all__:
        assert getattr(vtp, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = vtp.nothing
