"""The files under deploy/ are accepted by the programs that they are for."""

from __future__ import annotations

import subprocess
from pathlib import Path

from matrix_bus.broker import find_server

CONFIG = Path(__file__).parents[2] / "deploy" / "nats.conf"


def test_the_server_accepts_its_config(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(CONFIG.read_text().replace("/var/lib/matrix-bus", str(tmp_path / "store")))
    done = subprocess.run([find_server(), "-t", "-c", config], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
