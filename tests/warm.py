"""Interpreters that have imported the libraries already, for the stages of DVC tests: most of a tiny stage is its start.

`python` on the PATH of a clone's DVC is a script here. It hands `python -m stages.NAME ...` to a server that has imported
libraries, and nothing of the project, and forks; everything else it starts as it is. A stage has the folder, environment,
streams and exit status of its caller, gets its signals, and dies with it. Tests that kill use interpreters of their own.
"""

import atexit
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path

LIBRARIES = (
    "torch._dynamo",
    "torchvision",
    "timm",
    "open_clip",
    "scipy.special",
    "pyarrow.parquet",
    "safetensors.torch",
)
SCRIPT = """#!{python} -SE
import json, os, signal, socket, struct, sys
words = sys.argv[1:]
if len(words) < 2 or words[0] != "-m" or not words[1].startswith("stages."):
    os.execv({python!r}, [{python!r}, *words])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = json.dumps([words[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [struct.pack("q", len(call))], [0, 1, 2])
server.sendall(call)
stage, = struct.unpack("q", server.recv(8, socket.MSG_WAITALL))
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(stage, number))
ended = server.recv(8, socket.MSG_WAITALL)
sys.exit(struct.unpack("q", ended)[0] if len(ended) == 8 else 137)
"""


@cache
def folder_of_python() -> Path:
    """The folder with that script; the server lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="interpreters-"))
    address = str(folder / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    server = subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno())],
        cwd="/",
        env=os.environ | {"PYTHONPATH": "", "OMP_WAIT_POLICY": "PASSIVE"},
        pass_fds=[listener.fileno()],
        stdin=subprocess.PIPE,  # its end ends the server
        start_new_session=True,
    )
    atexit.register(server.kill)
    script = folder / "python"
    script.write_text(SCRIPT.format(python=sys.executable, address=address))
    script.chmod(0o755)
    return folder


def serve(listener: socket.socket) -> None:
    """Fork a stage for everybody who connects, until the tests are gone."""
    for name in LIBRARIES:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        caller, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            stage(caller)
        caller.close()


def stage(caller: socket.socket) -> None:
    """Be the stage that the caller asks for; does not return."""
    length, streams, _, _ = socket.recv_fds(caller, 8, 3)
    words, folder, environment = json.loads(caller.recv(*struct.unpack("q", length), socket.MSG_WAITALL))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    caller.sendall(struct.pack("q", os.getpid()))
    threading.Thread(target=_die_with, args=(caller,), daemon=True).start()
    sys.path[0] = folder
    sys.argv = words
    status = 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    caller.sendall(struct.pack("q", status))
    os._exit(status)


def _die_with(caller: socket.socket) -> None:
    if not caller.recv(1):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
