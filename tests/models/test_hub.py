"""Checkpoints by hub id, from a server on loopback that speaks as much of the hub's language as a download takes.

The client reads its settings when it is imported, so every machine of a test is a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from vtp import VisualTokenizer
from vtp.artefact import ArtefactError
from vtp.models.hub import checkpoint_folder

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
OLD, NEW = "a" * 40, "b" * 40  # commits
# The hub tells nobody which private repositories there are.
FAILING = {"org/gated": (403, "GatedRepo"), "org/broken": (500, ""), "work/tokeniser": (401, "RepoNotFound")}
ASK = """
import json, sys
from vtp import VisualTokenizer, load_tokenizer
answers = {}
for name in sys.argv[1:]:
    try:
        tokenizer = VisualTokenizer.from_pretrained(name)
        assert load_tokenizer(name).encoder_digest() == tokenizer.encoder_digest()
        answers[name] = tokenizer.encoder_digest()
    except ValueError as error:
        answers[name] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""


def digest_of(name):
    return VisualTokenizer.from_pretrained(GOLDEN / name).encoder_digest()


def files_of(name):
    published = {path.name: path.read_bytes() for path in (GOLDEN / name).iterdir() if path.name != "io.safetensors"}
    others = {"README.md": b"# VTP", "pytorch_model.bin": b"a pickle", "nested/config.json": b"{}", "a.npz": b"n"}
    return published | others


class Hub(BaseHTTPRequestHandler):
    """Repositories by id and commit; `main` is the new one."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        hub_id, action, revision, file = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        status, code = FAILING.get(hub_id, (200, ""))
        commit = {"main": NEW, "v1": OLD}.get(revision, revision)
        if status != 200:
            self._answer(b"{}", {"X-Error-Code": code}, status)
        elif commit not in (commits := self.server.repositories[hub_id]):
            self._answer(b"{}", {"X-Error-Code": "RevisionNotFound"}, 404)
        elif action == "resolve":
            body = commits[commit][file]
            self._answer(body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit})
        else:
            self._answer(json.dumps(self._listing(action, hub_id, commit)).encode())

    def _listing(self, action, hub_id, commit):
        files = self.server.repositories[hub_id][commit]
        if action == "revision":
            return {"id": hub_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        assert action == "tree"
        return [
            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for name, body in files.items()
        ]

    def _answer(self, body, headers=None, status=200):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(repositories):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.requests = repositories, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask(names, *, port, home, folder):
    """What a machine with the cache `home` says to each name, in the working folder `folder`."""
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    own |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "127.0.0.1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | own
    command = [sys.executable, "-c", ASK, *names]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A cache, a working folder, and what was answered and requested while the hub was there."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("folder")
    (folder / "work/tokenizer").mkdir(parents=True)
    (folder / "org").mkdir()
    (folder / "org/local").symlink_to(GOLDEN / "vtp-tiny-ae")
    vtp = {OLD: files_of("vtp-tiny-layernorm-mlp"), NEW: files_of("vtp-tiny")}
    incomplete = {NEW: {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}}
    names = ["org/vtp", "org/vtp@v1", f"org/vtp@{OLD}", "org/local", "org/vtp@v9", "org/gated", "org/incomplete"]
    names += ["work/tokeniser", "org/broken"]
    with serving({"org/vtp": vtp, "org/incomplete": incomplete}) as server:
        answers = ask(names, port=server.server_port, home=home, folder=folder)
        requests = list(server.requests)
    return home, folder, answers, requests


def test_a_hub_id_is_fetched_once_and_no_more_than_two_files_of_it(machine):
    home, _, answers, requests = machine
    assert answers["org/vtp"] == digest_of("vtp-tiny")
    assert answers["org/vtp@v1"] == answers[f"org/vtp@{OLD}"] == digest_of("vtp-tiny-layernorm-mlp")
    got = sorted(request.split("/resolve/")[1] for request in requests if request.startswith("GET /org/vtp/resolve"))
    assert got == sorted(f"{commit}/{file}" for commit in (OLD, NEW) for file in ("config.json", "model.safetensors"))
    names = {path.name for path in (home / "hub/models--org--vtp/snapshots").rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors"}


def test_a_folder_that_exists_wins(machine):
    _, _, answers, requests = machine
    assert answers["org/local"] == digest_of("vtp-tiny-ae")
    assert not [request for request in requests if "local" in request]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/vtp@v9", ["has no revision 'v9' of it"]),
        ("org/gated", ["asks for a consent first", "hf auth login"]),
        ("org/broken", ["org holds local", "answered 500", "try later"]),
        ("org/incomplete", ["model.safetensors is not in this repository"]),
        ("work/tokeniser", ["work holds tokenizer", "has no such repository", "correct the path if you mean a folder"]),
    ],
)
def test_says_what_the_hub_does_not_have(machine, name, said):
    _, _, answers, *_ = machine
    assert answers[name].startswith("ArtefactError: ")
    assert all(part in answers[name] for part in said), answers[name]


def test_without_a_network(machine, tmp_path):
    """What was fetched stays usable; anything else is told with both readings of the name."""
    home, folder, before, *_ = machine
    names = ["org/vtp", "org/vtp@v1", "org/other", "work/tokeniser"]
    dead = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    port = dead.server_port
    dead.server_close()  # nobody listens there
    answers = ask(names, port=port, home=home, folder=folder)
    assert {name: answers[name] for name in names[:2]} == {name: before[name] for name in names[:2]}
    for name, here in (("org/other", "org holds local"), ("work/tokeniser", "work holds tokenizer")):
        assert f"{name} is not a folder ({here}" in answers[name]
        assert f"http://127.0.0.1:{port} cannot be reached (" in answers[name]
        assert "refused" in answers[name]
        assert len(answers[name].splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./org/vtp", "../org", "org/vtp/", "a/b/c", "tokenizer", Path("org/vtp")]
)
def test_what_cannot_be_a_hub_id_is_a_folder(name):
    """Paths never start a look-up."""
    assert checkpoint_folder(name) == Path(name)
    with pytest.raises(ArtefactError, match="no such file; "):
        VisualTokenizer.from_pretrained(name)
