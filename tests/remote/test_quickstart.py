"""The README's remote section, typed as written: a server, its key, the status, the script.

Only the port is another, since 5001 may be taken, and the folder, which holds the script alone.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECTION = re.search(
    r"^## The same script on NDIF\n(.*?)^## ", (ROOT / "README.md").read_text(), re.S | re.M
)[1]
FIRST, SECOND = re.findall(r"```\n(.*?)```", SECTION, re.S)
SCRIPT = "experiments/remote_quickstart.py"


def free_port() -> str:
    """A port that is free, of those that nobody is given without asking."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return str(port)


def test_the_commands_run_as_written(tmp_path):
    port = free_port()
    (tmp_path / "experiments").mkdir()
    copy = shutil.copy(ROOT / SCRIPT, tmp_path / SCRIPT)
    text = Path(copy).read_text()
    assert text.count("http://127.0.0.1:5001") == 1
    Path(copy).write_text(text.replace("5001", port))
    first, second = FIRST.replace("5001", port), SECOND.replace("5001", port)
    assert (first, second) != (FIRST, SECOND)

    env = {k: v for k, v in os.environ.items() if k not in ("NDIF_API_KEY", "PYTHONPATH")}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # `exec`, so that the process is the server and can be ended as such
    server = subprocess.Popen(
        ["bash", "-c", f"exec {first.strip()}"],
        cwd=tmp_path,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        printed = ""
        while line := server.stdout.readline():  # to the end, should the server not start
            printed += line
            if line.startswith("NDIF_API_KEY="):
                break
        assert "NDIF_API_KEY=" in printed
        key = printed.splitlines()[-1]
        assert second.count("NDIF_API_KEY=...") == 1
        ran = subprocess.run(
            ["bash", "-ec", second.replace("NDIF_API_KEY=...", key)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
    finally:
        server.terminate()
        rest = server.communicate()[0]
    assert ran.returncode == 0, ran.stderr
    assert server.returncode == 0, rest
    assert "* tiny" in ran.stdout  # the status: a model with a vision tower,
    assert "key: set, accepted" in ran.stdout
    assert re.findall(r"^(blocks\.\d).* \[1, 96\] +moved", ran.stdout, re.M) == [
        f"blocks.{layer}" for layer in range(5)
    ]
    assert "next token, seeing and blind: lake meadow" in ran.stdout
    assert re.search(r"^2 requests, .* up, .* down, ", ran.stdout, re.M)


def test_the_script_is_short():
    assert len((ROOT / SCRIPT).read_text().splitlines()) < 30
