"""Scripts in processes of their own, without the seconds that importing their packages takes.

The processes are forked from a server that has imported these once, and has done nothing else.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "matplotlib.figure",
                               "matplotlib.backends.backend_agg", "numpy", "tqdm", "pytest"])


def run_script(name, cwd, flags, variables):
    """What such a process does: `python NAME.py --out out ...` in the folder `cwd`.

    Of its picture only the file is made, as in tests.quick.
    """
    import torch    # not where this module is imported, but in the server

    from tests.quick import unpainted

    os.environ.update(variables)
    os.chdir(cwd)
    for number, stream in (1, "stdout"), (2, "stderr"):
        file = os.open(f"{cwd}.{stream}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)
    path = str(ROOT / f"{name}.py")
    sys.argv = [path, "--out", "out", *flags]
    with unpainted():
        runpy.run_path(path, run_name="__main__")


def start(name, cwd, *flags, **variables):
    """The script as a process; it writes to the folder `out` below `cwd`."""
    process = SERVER.Process(target=run_script, args=(name, str(cwd), flags, variables))
    process.start()
    return process


def finish(processes, cwds):
    """What they print, as (stdout, stderr). None of them outlives the test."""
    try:
        for process in processes:
            process.join(timeout=120)
    finally:
        for process in processes:
            process.kill()
    return [tuple(Path(f"{cwd}.{stream}").read_text() for stream in ("stdout", "stderr"))
            for cwd in cwds]
