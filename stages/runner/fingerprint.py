"""What identifies a run: digests of its inputs, and of what its code means.

The meaning of code is the digest of a stage's import closure without comments, docstrings, annotations and formatting: a
comment changes no digest; a changed formula changes those of the stages that can reach it.
"""

import ast
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vtp.artefact import ArtefactError, digest, read_json, remembered, write_json
from vtp.data.shards import Manifest

ROOT = Path(__file__).parents[2]  # the packages lie beside each other, in an experiment's copy too
PACKAGES = ("vtp", "stages")
DIGESTS = Path(".scratch", "digests.json")  # of large files, of all stages
# Packages and files that cannot change a result: how a run is started, resumed, planned and timed.
LEFT_OUT = (
    "stages.runner",
    "stages.plans",
    "vtp.host",
    "vtp.training.checkpoint",
    "vtp.training.throughput",
)


def fingerprint_of(identity: Mapping[str, Any], code: str) -> str:
    """The name of a run: of its stage, parameters and digests of inputs (`identity`), and the digest of its code."""
    return hashlib.sha256(json.dumps([identity, code], sort_keys=True).encode()).hexdigest()[:16]


def input_digest(path: Path) -> str:
    """The digest of an input. Of shards manifest and tables are read; the digests of tars stand in the manifest.

    It is that of the whole folder, as long as nothing in it is damaged: readers hold every tar to its digest.
    """
    return digest(path, _digests_of_shards(path))


def _digests_of_shards(folder: Path) -> dict[str, str]:
    if not (folder / "manifest.json").is_file():
        return {}
    try:
        splits = Manifest.load(folder).splits.values()
    except ArtefactError:  # the manifest of something else, or a damaged one, of which its reader tells
        return {}
    return {shard.name: shard.sha256 for split in splits for shard in split.shards}


def code_digest(module: str) -> str:
    """SHA-256 over the meaning of every file that `module` can import within our packages."""
    state = hashlib.sha256()
    for name, path in sorted(closure(module).items()):
        state.update(f"{name}\n{_read(path).meaning}\n".encode())
    return state.hexdigest()


def closure(module: str) -> dict[str, Path]:
    """Modules of our packages that `module` imports, anywhere in their code, itself included; name -> file."""
    modules: dict[str, Path] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        if name in modules or _is_left_out(name) or (path := _file(name)) is None:
            continue
        modules[name] = path
        queue += _read(path).imports
    return modules


def _is_left_out(name: str) -> bool:
    return any(name == left or name.startswith(f"{left}.") for left in LEFT_OUT)


def meaning(source: str) -> str:
    """The syntax tree as text, without what cannot change a result."""
    return _understand(source).meaning


class _Source(NamedTuple):
    """What a file is to a digest."""

    imports: list[str]
    meaning: str


def _read(path: Path) -> _Source:
    return _understand(path.read_text(encoding="utf-8"))


@cache  # by the text: stages share most files, and a run asks once more at its end
def _understand(source: str) -> _Source:
    tree = ast.parse(source)
    imports = list(_imports(tree))
    return _Source(imports, _dump(_Meaning().visit(tree)))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in _at_runtime(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from a import b` may name a module or a value.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PACKAGES:
                parts = name.split(".")
                yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _at_runtime(block: ast.AST) -> Iterator[ast.AST]:
    """All statements below, but for what only type checkers see."""
    for part in ("body", "handlers", "orelse", "finalbody", "cases"):
        for node in getattr(block, part, ()):
            if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                yield node
                yield from _at_runtime(node)


def _file(name: str) -> Path | None:
    """The file of a module, or None when the name is a value in one."""
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.exists()), None)


class _Meaning(ast.NodeTransformer):
    """Drops docstrings, annotations of functions and variables, and descriptions of parameters.

    Annotations of class attributes stay: they are what a parameter record accepts.
    """

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        node.body = _without_docstring(node.body)
        node.body = [self._plain(statement) for statement in node.body]
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = _without_docstring(node.body)
        return self.generic_visit(node)

    def visit_Module(self, node: ast.Module) -> ast.AST:
        node.body = _without_docstring(node.body)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "description"]
        return self.generic_visit(node)

    def _plain(self, statement: ast.stmt) -> ast.stmt:
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            return ast.Assign([statement.target], statement.value, lineno=statement.lineno)
        return statement


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return body[1:] or [ast.Pass()]
    return body


def _dump(node: object) -> str:
    """Like ast.dump, but empty fields are skipped, so that Python versions with new fields agree."""
    if isinstance(node, ast.AST):
        fields = [f"{name}={_dump(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
        return f"{type(node).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(_dump, node))}]" if isinstance(node, list) else repr(node)


def recall_digests(store: Path) -> None:
    """Let this process know the digests of large files that others took; a damaged `store` knows none."""
    remembered.update(_stored(store))


def store_digests(store: Path) -> None:
    """Keep what this process knows for others; several may do so at a time."""
    if remembered.items() <= _stored(store).items():
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _stored(store) | remembered
        write_json(store, {name: known[name] for name in known if Path(name.rsplit(" ", 3)[0]).exists()})


def _stored(store: Path) -> dict[str, str]:
    try:
        known = read_json(store)
    except ArtefactError:
        return {}
    return {name: value for name, value in known.items() if isinstance(value, str)}
