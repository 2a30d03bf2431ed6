"""The structure that docs and habits promise."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "vtp").rglob("*.py"), *(ROOT / "stages").rglob("*.py")])
# Each may import from earlier lines; parts of one line do not import each other.
LAYERS = [
    {"config", "artefact", "draws", "distributed", "step"},
    {"layers"},
    {"models", "losses", "flow", "data"},
    {"objectives", "training", "evaluation"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
HEAVY = ("timm", "open_clip", "torchvision", "lpips", "matplotlib", "torch_fidelity", "pyarrow", "diffusers")
HEAVY += ("huggingface_hub",)


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "vtp").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in SOURCES if "vtp" in p.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    own = part_of(path)
    if own == "__init__":
        return
    for name in imports(path):
        package, *rest = name.split(".")
        assert package != "stages", f"{path} imports {name}"
        if package == "vtp" and rest and rest[0] != own:
            allowed = RANK[rest[0]] < RANK[own] or RANK[own] == RANK[rest[0]] == 0
            assert allowed, f"{path} imports {name}: not below it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_card(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "split it"
    assert path.name not in {"utils.py", "common.py", "misc.py", "helpers.py"}
    if path.name != "distributed.py":
        assert not [name for name in imports(path) if name.startswith("torch.distributed")]
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), "say what the file is for"
    if "vtp" in path.parts:
        assert "print(" not in text


def test_sources_import_names_from_their_home():
    """`from vtp import X` is for users: its lazy loading hides from the code digests what is used."""
    assert not [path for path in SOURCES if "from vtp import" in path.read_text()]


def test_configs_load_without_heavy_libraries():
    """They would cost every stage seconds."""
    modules = [f"stages.{path.stem}" for path in (ROOT / "stages").glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_public_names():
    import vtp

    for name in vtp.__all__:
        assert getattr(vtp, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = vtp.nothing
