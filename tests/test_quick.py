"""What is left out of a quick run: only what is known, and nothing that makes a difference."""

import importlib.util
import timeit
from dataclasses import dataclass

import pytest
import torch
from matplotlib.figure import Figure

from tests.quick import known_measurements, unpainted

TINY = '''
NAME, CALLS = "tiny", []

def train(model, cfg, run):
    return measure(model, cfg, run)

# ---- 7. Evaluation ----
def measure(model, cfg, run):
    CALLS.append("measure")
    model.eval()
    return [helper(model, cfg, run)]

def helper(model, cfg, run):
    CALLS.append("helper")
    return model.weight.sum().item()

def later(ask, cfg, run):
    return measure(ask(), cfg, run)

# ---- 8. Experiment ----
'''


@dataclass
class Config:
    rate: float = 1.0
    out: str = "here"


class Run:
    world, bf16, device = 1, False, "cpu"


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    spec = importlib.util.spec_from_file_location("tiny", tmp_path / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("change", ["nothing", "out", "weights", "attribute", "mode", "config",
                                    "world", "bf16"])
def test_equal_weights_are_measured_once_in_the_same_way(tiny, change):
    model, cfg, run = torch.nn.Linear(2, 2).eval(), Config(), Run()
    with known_measurements(tiny):
        first = tiny.train(model, cfg, run)
        wrong, calls = [*first], [*tiny.CALLS]
        first.append("a guest")
        if change == "weights":
            torch.nn.init.zeros_(model.weight)
        elif change == "attribute":
            model.feed = "other"
        elif change == "mode":
            model.train()
        elif change in ("out", "config"):
            cfg = Config(out="there") if change == "out" else Config(rate=2.0)
        elif change != "nothing":
            setattr(run, change, 2)
        again = tiny.train(model, cfg, run)
    assert calls == ["measure", "helper"]
    assert tiny.CALLS == (calls if change in ("nothing", "out") else calls * 2)
    assert again == ([0.0] if change == "weights" else wrong) and not model.training


def test_models_that_a_function_knows_count_like_arguments(tiny):
    models = [torch.nn.Linear(2, 2).eval() for _ in range(2)]
    with known_measurements(tiny):
        for model in models * 2:
            assert tiny.later(lambda: model, Config(), Run()) == [model.weight.sum().item()]
    assert tiny.CALLS == ["measure", "helper"] * 2


def test_pictures_are_not_painted_and_timed_jobs_run_once(tmp_path):
    runs, again = [], []
    with unpainted(), open(tmp_path / "a.png", "wb") as file:
        Figure().savefig(file, dpi=100)
        job = lambda: runs.append(1)    # noqa: E731
        assert min(timeit.repeat(job, number=4, repeat=8)) > 0
        assert timeit.timeit(job, number=1) > 0 and runs == [1]
    timeit.timeit(lambda: again.append(1), number=3)
    assert again == [1, 1, 1] and (tmp_path / "a.png").read_bytes() == b"a picture"
