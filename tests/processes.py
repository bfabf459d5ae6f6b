"""Scripts in processes of their own, without the seconds that importing their packages takes.

The processes are forked from a server that has imported these once, and has done nothing else.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
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


def note_effects(root, names, folder, found):
    """What a process does that imports scripts: {script: what that changed} as a JSON file."""
    import matplotlib.figure    # noqa: F401  what scripts may import is there before they are
    import numpy
    import torch
    import tqdm     # noqa: F401

    def state():
        return {
            "random numbers": (random.getstate(), torch.get_rng_state().tolist(),
                               numpy.random.get_state()[1].tolist()),
            "default dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "grad mode": torch.is_grad_enabled(),
            "matmul precision": torch.get_float32_matmul_precision(),
            "denormals": torch.full((), 1e-40, dtype=torch.float32).mul(1).item(),
            "pyplot": "matplotlib.pyplot" in sys.modules,
            "environment": dict(os.environ),
            "files": os.listdir(),
        }

    os.chdir(folder)
    sys.dont_write_bytecode = True
    sys.path.insert(0, root)
    effects = {}
    for name in names:
        before, text = state(), io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            importlib.import_module(name)
        after = state() | {"output": text.getvalue()}
        effects[name + ".py"] = [what for what in after if after[what] != before.get(what, "")]
    Path(found).write_text(json.dumps(effects))
