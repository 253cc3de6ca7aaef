"""Runs a server for as long as whoever holds the other end of stdin: `python keeper.py COMMAND...`.

A server such as vLLM has processes of its own that hold the GPUs, and they outlive it when it is killed. So
whatever ends first, the server or the launcher, the keeper kills its whole process group, which must be its own.
A byte on stdin is SIGTERM to the server alone; the end of stdin means that the launcher is gone. The exit code goes
to stdout, as `subprocess` tells it; the server's own output goes to stderr.

Run by its path: it imports nothing of ours, and is up at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def _obey(server: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1):
        server.terminate()
    os.kill(0, signal.SIGKILL)


def main() -> None:
    """Never returns where its process group is its own."""
    try:
        server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=2)
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr, flush=True)
        code = 127  # as a shell has it
    else:
        threading.Thread(target=_obey, args=(server,), daemon=True).start()
        code = server.wait()
    os.write(1, str(code).encode())
    os.kill(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
