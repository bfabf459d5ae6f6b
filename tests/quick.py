"""Runs that leave out what a test does not look at, and give the same numbers.

No pictures are painted, what is timed runs once, and what was measured of the same weights in the
same way before is not measured again.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import re
import time
import timeit
import weakref
from dataclasses import is_dataclass

import pytest
import torch
from matplotlib.figure import Figure

KNOWN = {}      # (script, function, mark of its arguments) -> its result, modes of the model
HOW = "only device compile out resume eval_only".split()      # fields that no measurement reads


def mark(value):
    """A text that two arguments share only if a measurement cannot tell them apart."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, torch.nn.Module):
        plain = {k: v for k, v in vars(value).items() if isinstance(v, (bool, int, float, str))}
        return mark([plain, value.state_dict()])
    if isinstance(value, functools.partial):
        return mark([value.func, *value.args, value.keywords])
    if is_dataclass(value):
        return mark({k: v for k, v in vars(value).items() if k not in HOW})
    if hasattr(value, "world"):     # a Run
        return mark([value.world, value.bf16, value.device])
    if isinstance(value, dict):
        return mark([part for pair in value.items() for part in pair])
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(mark, value)) + "]"
    if inspect.isfunction(value):   # with the models that it knows, as those of its arguments
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__qualname__ + mark([v for v in cells if isinstance(v, torch.nn.Module)])
    return repr(value)


def measurements(script):
    """Names of the functions of the section Evaluation that are given a Run."""
    section = re.search(r"^# ---- 7\. .*?^# ---- 8\. ", inspect.getsource(script), re.M | re.S)[0]
    return re.findall(r"^def (\w+)\(.*\brun\b", section, re.M)


@contextlib.contextmanager
def known_measurements(script):
    """Within it, equal weights are measured once: by the script itself, the first time."""
    inside = []

    def remembering(function):
        @functools.wraps(function)
        def measure(*args, **keywords):
            if inside:
                return function(*args, **keywords)
            key = script.NAME, function.__name__, mark([*args, keywords])
            parts = [part for arg in args[:1] if isinstance(arg, torch.nn.Module)
                     for part in arg.modules()]
            if key not in KNOWN:
                inside.append(key)
                try:
                    result = function(*args, **keywords)
                finally:
                    inside.pop()
                KNOWN[key] = copy.deepcopy(result), [part.training for part in parts]
            result, modes = KNOWN[key]
            for part, mode in zip(parts, modes):
                part.training = mode
            return copy.deepcopy(result)
        return measure

    with pytest.MonkeyPatch.context() as patch:
        for name in measurements(script):
            patch.setattr(script, name, remembering(getattr(script, name)))
        yield


def hold(value):
    """A weak reference where there can be one: it does not keep a model."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def once(job, *_, seen={}, **__):
    """The seconds that a job took when it, or another of its code and variables, was first seen."""
    parts = [job.func, *job.args] if isinstance(job, functools.partial) else [
        job.__code__, *(cell.cell_contents for cell in job.__closure__ or ())]
    key = tuple(map(id, parts))
    if key not in seen or any(held() is not part for held, part in zip(seen[key][1], parts)):
        start = time.perf_counter()
        job()
        seen[key] = time.perf_counter() - start, list(map(hold, parts))     # ids may come again
    return seen[key][0]


def save(figure, file, paint=Figure.savefig, **how):
    """Paints only the frames of an animation, which have a format."""
    return paint(figure, file, **how) if "format" in how else file.write(b"a picture")


@contextlib.contextmanager
def unpainted():
    """Within it, a figure is made up but no picture of it, and a timed job runs once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        patch.setattr(timeit, "timeit", once)
        patch.setattr(timeit, "repeat", lambda *args, **keywords: [once(*args, **keywords)])
        yield
