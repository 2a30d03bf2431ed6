"""Proxies of a download: several on one port, watched, and gone when the stage is."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

from servers import LIMIT, body, serving
from tiny import ROOT, wait_for

from vtp.curation.download.policy import Policy
from vtp.curation.download.session import proxies

POLICY = Policy(timeout=60.0, deadline=60.0, max_bytes=LIMIT, allowed_networks=["127.0.0.1/32"], allowed_ports=None)
STAGE = """
import sys, time
from pathlib import Path
from vtp.curation.download.session import proxies
from vtp.curation.download.policy import Policy
with proxies(Policy.parse(eval(sys.argv[2]), where=""), given=None, count=2, folder=Path(sys.argv[1])) as running:
    print(*(process.pid for process in running.processes), flush=True)
    time.sleep(100)
"""


def test_several_proxys_share_a_port(tmp_path):
    with serving() as server, proxies(POLICY, given=None, count=3, folder=tmp_path) as running:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": running.address}))
        answers = {opener.open(server.url("jpeg", n), timeout=90).read() for n in range(40)}
        assert answers == {body("jpeg", n) for n in range(16)}
        assert not running.gone
        running.processes[1].kill()
        running.processes[1].wait()
        assert running.gone
    assert all(process.poll() is not None for process in running.processes)


def test_given_proxys_are_used_and_left_alone(tmp_path):
    with proxies(POLICY, given="127.0.0.1:3128", count=3, folder=tmp_path) as running:
        assert running.address == "127.0.0.1:3128"
        assert not running.processes
        assert not running.gone


def test_proxys_end_with_a_stage_that_is_killed(tmp_path):
    command = [sys.executable, "-c", STAGE, str(tmp_path), repr(POLICY.model_dump())]
    stage = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    numbers = [int(number) for number in stage.stdout.readline().split()]
    assert len(numbers) == 2
    wait_for(lambda: all(kept(number) for number in numbers), stage)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    deadline = time.monotonic() + 60
    while any(kept(number) for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kept(number):
    try:
        os.kill(number, 0)
        with open(f"/proc/{number}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
