"""llmprune's commands and Python files, each run in a fork of one process that has imported torch and
lm-eval and read `pydoc`, which takes 10 s a time.

python forks.py serve FD           # FD is a listening socket
python forks.py ask SOCKET llmprune --model ...
python forks.py ask SOCKET python FILE
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEXT = "my-text.txt"  # a file of the reader's own; here, what runs calibrate and are evaluated on
FEW = "1K"  # tokens to train on
# What is asked for where an example says nothing, so that examples can be what a reader would type and still take a second:
# fewer and shorter windows for calibration and evaluation, fewer sizes to time.
QUICK = {
    "prune": {"--samples": "8", "--seqlen": "64", "--calibration": TEXT, "--eval-text": TEXT},
    "recover": {"--tokens": FEW, "--batch-size": "4", "--seqlen": "64", "--text": TEXT, "--eval-text": "none"},
    "scan": {"--samples": "8", "--seqlen": "64", "--calibration": TEXT},
    "compare": {"--samples": "8", "--seqlen": "64", "--windows": "4", "--text": TEXT},
    "eval": {"--windows": "4", "--seqlen": "128"},
    "bench": {"--tokens": "1", "--batches": "1", "--length": "8"},
}


def quick(arguments: list[str]) -> list[str]:
    """A command line with what it leaves open chosen for speed."""
    prunes = "--model" in arguments or "--config" in arguments
    if arguments[0] == "recover" and "--tokens" in arguments:  # as many as an example asks for take minutes
        arguments[arguments.index("--tokens") + 1] = FEW
    chosen = QUICK.get("prune" if prunes else arguments[0], {}) | ({"--limit": "4"} if "--tasks" in arguments else {})
    return arguments + [word for flag, value in chosen.items() if flag not in arguments for word in (flag, value)]


def quick_prune(prune: Any) -> Any:
    """`llmprune.prune` with the same choices, where it reads its calibration text itself."""

    def quicker(model: Any, **options: Any) -> Any:
        chosen = {} if "calibration" in options else {"samples": 8, "seqlen": 64, "calibration": TEXT, "eval_text": TEXT}
        return prune(model, **(chosen | options))

    return quicker


def quick_recover(recover: Any) -> Any:
    """`llmprune.recover` with fewer tokens of a shorter text."""
    few = {"tokens": FEW, "batch_size": 4, "seqlen": 64, "text": TEXT, "eval_text": "none"}
    return lambda *names, **options: recover(*names, **(options | few))


def run(program: str, arguments: list[str]) -> int:
    """In the fork: the exit code."""
    import llmprune

    try:
        if program == "python":
            llmprune.prune = quick_prune(llmprune.prune)
            llmprune.recover = quick_recover(llmprune.recover)
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            sys.argv = ["llmprune", *quick(arguments)]
            runpy.run_module("llmprune", run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 (whatever it is, the fork must end here)
        traceback.print_exc()
        return 1


def serve(listening: socket.socket) -> None:
    import lm_eval.models.huggingface  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import llmprune
    from llmprune.data.pydoc import documents

    for name in llmprune.__all__:
        getattr(llmprune, name)  # imports where it lives
    for split in ("calibration", "evaluation"):
        documents(split)  # reads them for all
    while True:
        connection, _ = listening.accept()
        asked, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        child = os.fork()
        if not child:
            folder, program, *arguments = json.loads(asked)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.chdir(folder)
            code = run(program, arguments)
            sys.stdout.flush()
            os._exit(code)
        for stream in streams:
            os.close(stream)
        connection.send(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256]))
        connection.close()


def ask(address: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [json.dumps([str(Path.cwd()), *words]).encode()], [0, 1, 2])
        return int.from_bytes(connection.recv(1) or b"\x01", "big")


@contextmanager
def server() -> Iterator[list[str]]:
    """A server; gives the words that a command for it begins with."""
    with tempfile.TemporaryDirectory() as folder:  # a short path, as those of sockets must be
        address = str(Path(folder) / "socket")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(address)
            listening.listen()
            number = listening.fileno()
            process = subprocess.Popen([sys.executable, __file__, "serve", str(number)], pass_fds=[number])
        try:
            yield [sys.executable, "-I", "-S", __file__, "ask", address]
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    sys.exit(ask(sys.argv[2], sys.argv[3:]))
