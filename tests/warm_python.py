"""A Python interpreter for tests that starts in milliseconds: a server imports the heavy libraries once and forks.

``started(folder)`` starts the server and gives the path of a command that takes the arguments of ``python`` used here
(``[-P] SCRIPT | -m MODULE | -c CODE``, then arguments). Each call is a process of its own: a fork of a server that has
imported the libraries below and nothing of ``mmpipe``, with the caller's arguments, environment, working directory and
standard streams. Signals are passed on; a caller that is killed takes its process with it. Inside, ``sys.executable`` is
the same command, so that the jobs of a workflow start as quickly. The processes of a server share its hash seed.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import importlib
import io
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIBRARIES = (
    "pydantic", "yaml", "PIL.Image", "PIL.ImageOps", "numpy", "numpy.random", "pyarrow", "pyarrow.parquet",
    "pandas", "jinja2", "openpyxl", "matplotlib.pyplot", "typer", "torch", "torch.distributed", "torch.utils.data",
    "torch.utils.tensorboard", "safetensors.torch", "tokenizers", "datasets", "peft", "accelerate", "requests",
    "scipy.stats", "sklearn.datasets", "transformers.trainer", "transformers.data.data_collator",
    "transformers.generation", "transformers.generation.candidate_generator", "transformers.generation.streamers",
    "transformers.integrations.moe", "transformers.integrations.deepspeed", "transformers.models.auto",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.auto.image_processing_auto",
    "transformers.models.auto.video_processing_auto", "transformers.models.auto.feature_extraction_auto",
    "transformers.models.clip.modeling_clip", "transformers.models.clip.image_processing_pil_clip",
    "transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava",
    "transformers.models.llava.image_processing_pil_llava", "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2", "transformers.models.qwen2_moe.modeling_qwen2_moe",
    "transformers.models.mixtral.modeling_mixtral", "snakemake.cli", "snakemake.api", "snakemake.workflow",
    "snakemake.dag", "snakemake.script", "snakemake.executors.local", "snakemake.report.html_reporter",
)  # fmt: skip


@contextlib.contextmanager
def started(folder: Path) -> Iterator[str]:
    """The path of the command; the server ends with the block, or with this process."""
    address, command = folder / "socket", folder / "python"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {address} "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    environment.pop("PYTHONPATH", None)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen(64)
        code = "import sys; sys.path.append(sys.argv[1]); import warm_python; warm_python.serve(*sys.argv[2:])"
        server = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(Path(__file__).parent), str(listening.fileno()), str(command)],
            env=environment,
            pass_fds=[listening.fileno()],
            stdin=subprocess.PIPE,
        )
    try:
        yield str(command)
    finally:
        server.kill()
        server.wait()


def serve(descriptor: str, command: str) -> None:
    """Fork for every caller until standard input ends."""
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    assert not [name for name in sys.modules if name.split(".")[0] == "mmpipe"]
    assert threading.active_count() == 1
    sys.path.pop()
    sys.executable = command
    signal.signal(signal.SIGCHLD, _reap)
    listening = socket.socket(fileno=int(descriptor))
    while listening in (ready := select.select([sys.stdin, listening], [], [])[0]) or sys.stdin not in ready:
        caller = listening.accept()[0]
        if not os.fork():
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _supervise(caller)


def _reap(*_: object) -> None:
    """Take leave of supervisors that have ended; their processor time becomes the server's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _supervise(caller: socket.socket) -> None:
    """Start what the caller asks for, pass its signals on, and reply with the exit status."""
    length, descriptors, *_ = socket.recv_fds(caller, 4, 3)
    size = int.from_bytes(length)
    request = b""
    while len(request) < size:
        request += caller.recv(size - len(request))
    process = os.fork()
    if not process:
        caller.close()
        _become(json.loads(request), descriptors)
    for open_file in (0, 1, 2, *descriptors):
        os.close(open_file)
    ended = os.pidfd_open(process)
    while ended not in (ready := select.select([caller, ended], [], [])[0]):
        for number in caller.recv(8) or [signal.SIGKILL]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
            if number == signal.SIGKILL:
                os._exit(0)
        del ready
    with contextlib.suppress(BrokenPipeError):
        caller.sendall(os.waitpid(process, 0)[1].to_bytes(4))
    os._exit(0)


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Run what the caller asks for in this process, as a fresh interpreter would."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(n, mode), line_buffering=n > 0, write_through=n == 2)
        for n, mode in ((0, "rb"), (1, "wb"), (2, "wb"))
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    sys.modules["numpy"].random.seed()
    code = 0
    try:
        _run(request["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except BaseException:  # noqa: BLE001 - as an interpreter does
        traceback.print_exc()
        code = 1
    for finish in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(BrokenPipeError):
            finish()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)


def _run(arguments: list[str]) -> None:
    safe = arguments[0] == "-P"
    first, *rest = arguments[safe:]
    path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:0] = path
    if first in ("-c", "-m"):
        sys.path[:0] = [] if safe else [os.getcwd()]
        sys.argv = [first, *rest[1:]]
        if first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)  # noqa: S102 - that is python -c
        return
    sys.path[:0] = [] if safe else [str(Path(first).resolve().parent)]
    sys.argv = [first, *rest]
    runpy.run_path(first, run_name="__main__")


def call(address: str, arguments: list[str]) -> None:
    """Have the server at ``address`` run ``arguments`` and end as that process ends."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    content = {"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)}
    request = json.dumps(content).encode()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    server.sendmsg([len(request).to_bytes(4)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (0, 1, 2)))])
    server.sendall(request)
    status = int.from_bytes(server.recv(4))
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other action
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    call(sys.argv[1], sys.argv[2:])
