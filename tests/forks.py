"""Python as a command, each run a fork of one process that has imported torch and lm-eval and read `pydoc`, which takes 10 s a
time. Versions of libraries, and what they read from the environment as they are imported, are those of that process.

python forks.py serve FD           # FD is a listening socket
python forks.py ask SOCKET -m MODULE ...
python forks.py ask SOCKET -c CODE ...
python forks.py ask SOCKET quick llmprune --model ...   # with what it leaves open chosen for speed
python forks.py ask SOCKET quick python FILE
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEXT = "my-text.txt"  # a file of the reader's own; here, what runs calibrate and are evaluated on
FEW = "1K"  # tokens to train on
# What is asked for where an example says nothing, so that examples can be what a reader would type and still take a second:
# fewer and shorter windows for calibration and evaluation, fewer sizes to time.
QUICK = {
    "prune": {"--samples": "8", "--seqlen": "64", "--calibration": TEXT, "--eval-text": TEXT},
    "quantise": {"--samples": "8", "--seqlen": "64", "--calibration": TEXT, "--eval-text": TEXT},
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
    chosen |= {"--for-context": "16"} if "--target-speedup" in arguments else {}
    return arguments + [word for flag, value in chosen.items() if flag not in arguments for word in (flag, value)]


def quick_prune(prune: Any) -> Any:
    """`llmprune.prune` with the same choices, where it reads its calibration text itself."""

    def quicker(model: Any, **options: Any) -> Any:
        chosen = {} if "calibration" in options else {"samples": 8, "seqlen": 64, "calibration": TEXT, "eval_text": TEXT}
        return prune(model, **(chosen | options))

    return quicker


def quick_quantise(quantise: Any) -> Any:
    """`llmprune.quantise` on fewer and shorter windows."""
    return lambda *names, **options: quantise(*names, **({"samples": 8, "seqlen": 64} | options))


def quick_recover(recover: Any) -> Any:
    """`llmprune.recover` with fewer tokens of a shorter text."""
    few = {"tokens": FEW, "batch_size": 4, "seqlen": 64, "text": TEXT, "eval_text": "none"}
    return lambda *names, **options: recover(*names, **(options | few))


def small_llama(folder: Path) -> Path:
    """Two of the bundled model's four blocks."""
    from transformers import AutoModelForCausalLM

    from llmprune.models.resolve import BUNDLED

    model = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"])
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    shutil.copytree(BUNDLED["llama"], folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    model.save_pretrained(folder)
    return folder


def run(words: list[str], home: Path) -> int:
    """In the fork: the exit code."""
    match words:
        case ["quick", program, *arguments]:
            import llmprune
            from llmprune.measure import pace
            from llmprune.models import resolve

            resolve.BUNDLED["llama"] = home / "llama"
            pace._WHOLE = pace._SMALLER = 0.1  # seconds of timing
            llmprune.prune = quick_prune(llmprune.prune)
            llmprune.recover = quick_recover(llmprune.recover)
            llmprune.quantise = quick_quantise(llmprune.quantise)
            if program == "python":
                return told(lambda: runpy.run_path(arguments[0], run_name="__main__"))
            sys.argv = ["llmprune", *quick(arguments)]
            return told(lambda: runpy.run_module("llmprune", run_name="__main__", alter_sys=True))
        case ["-m", module, *arguments]:
            sys.argv = [module, *arguments]
            return told(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
        case ["-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            return told(lambda: exec(compile(code, "<code>", "exec"), {"__name__": "__main__"}))
    raise ValueError(words)


def told(act: Callable[[], Any]) -> int:
    """The exit code that Python has where `act` is its program."""
    try:
        act()
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else int(end.code or 0)
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
    home = Path(listening.getsockname()).parent
    small_llama(home / "llama")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system clears them away
    while True:
        connection, _ = listening.accept()
        if not os.fork():
            listening.close()
            answer(connection, home)
            os._exit(0)
        connection.close()


def answer(connection: socket.socket, home: Path) -> None:
    """Run what is asked in a fork of its own: tell its process number, then how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    asked = connection.recv(struct.unpack("q", size)[0], socket.MSG_WAITALL)
    child = os.fork()
    if not child:
        folder, environment, words = json.loads(asked)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # who started the server may have ignored it
        sys.path[0] = folder
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
        code = run(words, home)
        sys.stdout.flush()
        os._exit(code)
    for stream in streams:
        os.close(stream)
    connection.send(struct.pack("q", child))
    connection.send(struct.pack("q", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


def ask(address: str, words: list[str]) -> int:
    """Pass signals on to the fork, and end as it does."""
    signals = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until there is whom to pass them on to
    asked = json.dumps([str(Path.cwd()), dict(os.environ), words]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [struct.pack("q", len(asked))], [0, 1, 2])
        connection.sendall(asked)
        (child,) = struct.unpack("q", connection.recv(8, socket.MSG_WAITALL))

        def pass_on(number: int, _: object) -> None:
            with suppress(ProcessLookupError):  # it may just have ended
                os.kill(child, number)

        for number in signals:
            signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        (code,) = struct.unpack("q", connection.recv(8, socket.MSG_WAITALL))
    if code < 0:
        if -code != signal.SIGKILL:  # which no process can set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return int(code)


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
