"""A PostgreSQL server for the tests that need one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import optuna
import pytest


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def _programs() -> Path | None:
    """Where initdb and postgres are; Debian keeps them off the path."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    found = shutil.which("initdb")
    return None if found is None else Path(found).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def postgresql():
    """The URL of an empty database on a server of our own, on loopback."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    # PostgreSQL refuses to run as root; its packages bring a user for it.
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if user:
        shutil.chown(folder, "postgres")
    settings = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **user}
    data, port = folder / "data", free_port()
    initdb = [programs / "initdb", "-D", data, "-U", "tester", "-A", "trust", "-N"]
    subprocess.run([*map(str, initdb), "-E", "UTF8", "--locale=C"], check=True, **settings)
    command = ["postgres", "-D", data, "-h", "127.0.0.1", "-p", port, "-k", folder, "-F"]
    command[0] = programs / "postgres"
    server = subprocess.Popen([*map(str, command)], **{**settings, "stdout": subprocess.DEVNULL})
    try:
        _await(psycopg, f"postgresql://tester@127.0.0.1:{port}/postgres", server)
        yield f"postgresql://tester@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
        shutil.rmtree(folder)


def _await(psycopg, url, server):
    until = time.monotonic() + 60
    while True:
        assert server.poll() is None
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url):
            return
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture
def _experimental():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
