"""What every script promises, whatever its method: flags, bad input, resuming, compiling, seeds.

A script is covered as soon as it lies at the repository root. One smoke run serves most tests.
"""

import contextlib
import copy
import csv
import importlib
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode

from tests.processes import finish, start
from tests.quick import known_measurements, unpainted

ROOT = Path(__file__).resolve().parents[1]
ALL = "mod mor tah adainfer coconut looped recurrent_depth hrpo llada remdm softmask".split()
NAMES = [name for name in ALL if (ROOT / f"{name}.py").exists()]


# ---- helpers -------------------------------------------------------------------------------------


def smoke_run(script, out, *flags):
    return script.main(["--smoke", "--out", str(out), *flags])


def quick_run(script, out, *flags, known=True):
    """A smoke run without its picture. What is known of its weights it need not measure again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(script, "plot", lambda *_: None)
        if known:
            stack.enter_context(known_measurements(script))
            stack.enter_context(unpainted())
        return smoke_run(script, out, *flags)


def configs_of(script, out, *flags):
    """{arm: Config} of all arms that a smoke run with these flags would have."""
    found = {}

    def stop(arms, cfg, run):
        found.update(arms)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(script, "select", stop)
        smoke_run(script, out, *flags)
    return found


def timeless(value):
    """A result without what a clock measured."""
    clock = re.compile(r"seconds|ms_|.*_ms_|.*_ms$|tokens_per_s")
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not clock.match(k)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def read_log(out):
    """The rows of log.csv as they stand there, without the clock's column."""
    with open(Path(out) / "log.csv", newline="") as file:
        return [timeless(row) for row in csv.DictReader(file)]


def read_strict(path):
    """A JSON file. NaN and Infinity, which JSON does not have, raise."""
    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}, which is no JSON")
    return json.loads(Path(path).read_text(), parse_constant=refuse)


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def other_value(field, value):
    """A legal value of a Config field that is not `value`."""
    if get_args(field.type):
        return next(choice for choice in get_args(field.type) if choice != value)
    return {int: 1 if value != 1 else 2, float: value / 2 if value else 0.5}[field.type]


def refused(script, capsys, folder, *flags, out=None):
    """Asserts exit code 2, one line on stderr and the same files as before; returns the line."""
    before = files(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        smoke_run(script, out or folder, *map(str, flags))
    stdout, line = capsys.readouterr()
    assert stop.value.code == 2
    assert re.fullmatch(rf"{script.NAME}: [^\r\n]+\n", line), line
    assert stdout == ""
    assert files(folder) == before
    return line


def global_state():
    """What a run might leave behind in the process."""
    return dict(
        dtype=torch.get_default_dtype(), device=torch.get_default_device(),
        threads=torch.get_num_threads(), grad=torch.is_grad_enabled(),
        autocast=torch.is_autocast_enabled("cpu"), rng=torch.get_rng_state().tolist(),
        numpy=np.random.get_state()[1].tolist(), python=random.getstate(),
        denormal=torch.full((3,), 1e-40).mul(1).tolist(), cudnn=torch.backends.cudnn.benchmark,
        precision=torch.get_float32_matmul_precision(), cwd=os.getcwd(), environ=dict(os.environ),
        deterministic=torch.are_deterministic_algorithms_enabled(), path=list(sys.path),
        group=torch.distributed.is_initialized(), stdout=sys.stdout, stderr=sys.stderr)


@contextlib.contextmanager
def counted_steps(script):
    """Yields a list that grows with every call of loss_fn in training."""
    steps, loss_fn = [], script.loss_fn

    def counting(model, batch, cfg):
        steps.extend([cfg] * torch.is_grad_enabled())
        return loss_fn(model, batch, cfg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "loss_fn", counting)
        yield steps


@contextlib.contextmanager
def recorded(script):
    """Yields the calls of loss_fn in training: for every model and Config, weights and batches."""
    calls, loss_fn = {}, script.loss_fn

    def recording(model, batch, cfg):
        if torch.is_grad_enabled():
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            new = SimpleNamespace(model=model, cfg=cfg, weights=weights, batches=[])
            calls.setdefault((id(model), repr(cfg)), new).batches.append(batch)
        return loss_fn(model, batch, cfg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "loss_fn", recording)
        yield calls.values()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models gain nothing from more, and lose much where other work runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=NAMES)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def smoke(script, tmp_path_factory):
    """One smoke run in another working directory: what it returns, prints, writes, trains on."""
    folder, stdout, stderr = tmp_path_factory.mktemp("smoke"), io.StringIO(), io.StringIO()
    state, begin = global_state(), time.process_time()     # other work may go on
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        with recorded(script) as calls, pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            with known_measurements(script):    # each is made here for the first time
                results = script.main(["--smoke"])
    seconds, arms = time.process_time() - begin, list(results["arms"])
    changed = [name for name, value in global_state().items() if value != state[name]]
    return SimpleNamespace(results=results, seconds=seconds, calls=list(calls), changed=changed,
                           arms=arms, arm=script.NAME if script.NAME in arms else arms[-1],
                           out=folder / "out" / script.NAME, stdout=stdout.getvalue(),
                           stderr=stderr.getvalue())


@pytest.fixture(scope="module")
def full(script, smoke, tmp_path_factory):
    """A smoke run of the ablation arms, and of one of the others."""
    out = tmp_path_factory.mktemp("full")
    arms = configs_of(script, out, "--full")
    chosen = [arm for arm in arms if arm not in smoke.arms or arm == smoke.arm]
    with recorded(script) as calls, unpainted():
        results = smoke_run(script, out, "--full", "--only", ",".join(chosen))
    return SimpleNamespace(results=results, out=out, configs=arms, calls=list(calls))


@pytest.fixture(scope="module")
def whole(script, smoke, tmp_path_factory):
    """A run with more checkpoints that nothing interrupts."""
    out, begin = tmp_path_factory.mktemp("whole"), time.perf_counter()
    arms = ",".join(dict.fromkeys([smoke.arms[0], smoke.arm, smoke.arms[-1]]))
    flags = ["--steps", "9", "--eval_every", "3", "--only", arms]
    with counted_steps(script) as steps:
        results = quick_run(script, out, *flags)
    seconds = time.perf_counter() - begin
    return SimpleNamespace(results=results, out=out, flags=flags, steps=len(steps), seconds=seconds)


@pytest.fixture
def trained(smoke, tmp_path):
    """A copy of the folder of the smoke run."""
    return shutil.copytree(smoke.out, tmp_path / "trained")


# ---- command line --------------------------------------------------------------------------------


def test_help_lists_every_field_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    source = (ROOT / f"{script.NAME}.py").read_text()
    assert stop.value.code == 0
    for field in fields(script.Config):
        comment = re.search(rf"^    {field.name}: .*?  # (.+)$", source, re.M)[1]
        value = rf"({field.name.upper()}|\{{[^}}]*\}}|,--no-{field.name})"
        comment = re.escape("".join(comment.split()))
        assert re.search(f"--{field.name}{value}{comment}", text), field.name


def test_every_field_is_a_flag_and_a_flag_beats_the_smoke_sizes(script):
    assert script.parse_args([]) == script.Config()
    cfg = script.parse_args(["--smoke", "--steps", "7"])
    assert cfg.steps == 7 and {**vars(cfg), **script.SMOKE, "steps": 7} == vars(cfg)
    for field in fields(script.Config):
        if field.type is bool:
            on, off = f"--{field.name}", f"--no-{field.name}"
            assert getattr(script.parse_args([off, on]), field.name) is True
            assert getattr(script.parse_args([on, off]), field.name) is False


def test_main_returns_what_results_json_holds(smoke):
    assert smoke.results == read_strict(smoke.out / "results.json")


def test_smoke_run_is_quick_and_leaves_the_promised_files(script, smoke):
    arms = smoke.results["arms"]
    named = {f"{arm}.pt" for arm in arms} | {"results.json", "log.csv", f"{script.NAME}.png"}
    assert {path.name for path in smoke.out.iterdir()} == named
    assert smoke.seconds < 20
    with open(smoke.out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= {"arm", "step", "loss", "val_loss", "seconds"}
    assert {row["arm"] for row in rows} == set(arms)
    for row in rows:
        assert int(row["step"]) > 0
        assert all(math.isfinite(float(row[name])) for name in ("loss", "val_loss", "seconds"))


def test_picture_is_a_png_of_a_readable_size(script, smoke):
    data = (smoke.out / f"{script.NAME}.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    assert int.from_bytes(data[16:20], "big") >= 600


def test_picture_follows_from_results_json_alone(script, smoke, tmp_path):
    """So it may be drawn again from stored numbers, as tests/reproduce.py does."""
    results = json.loads((smoke.out / "results.json").read_text())
    before = copy.deepcopy(results)
    cfg = script.Config(**results["config"] | {"out": str(tmp_path)})
    script.plot(cfg, script.Run(cfg), results)
    assert results == before
    drawn, stored = (folder / f"{script.NAME}.png" for folder in (tmp_path, smoke.out))
    assert drawn.read_bytes() == stored.read_bytes()


def test_results_have_the_promised_keys_and_a_smoke_run_judges_nothing(script, smoke):
    results = smoke.results
    assert set(results) >= {"script", "config", "environment", "arms", "claims", "seconds"}
    assert results["script"] == script.NAME
    assert results["config"] == vars(script.parse_args(["--smoke"]))
    for metrics in results["arms"].values():
        assert metrics["params"] > 0 and metrics["steps"] > 0 and metrics["seconds"] > 0
    assert results["claims"]
    for claim in results["claims"]:
        assert set(claim) == {"claim", "measured", "needed", "verdict"}
        assert claim["verdict"] == "not judged"


def test_run_prints_arms_and_claims_and_a_bar_for_every_arm(smoke):
    for arm in smoke.results["arms"]:
        assert re.search(rf"^\s*{re.escape(arm)}\s", smoke.stdout, re.M)
        assert re.search(rf"{re.escape(arm)}: 100%.*loss=.*tokens_per_s=", smoke.stderr)
    for claim in smoke.results["claims"]:
        assert re.search(re.escape(claim["claim"]) + ".*not judged", smoke.stdout)


def test_claims_are_judged_from_the_full_budget_on(script, smoke, full, tmp_path, monkeypatch):
    arms = smoke.results["arms"] | full.results["arms"]
    monkeypatch.setattr(script, "experiment", lambda cfg, run: arms)
    sizes = [f"--{name}={value}" for name, value in script.SMOKE.items()]
    for budget in ("1", "2", "0.5"):
        with unpainted():
            claims = smoke_run(script, tmp_path, "--no-smoke", *sizes, "--budget", budget)["claims"]
        allowed = {"not judged"} if budget == "0.5" else {"holds", "does not hold"}
        found = [claim["verdict"] for claim in claims if claim["measured"] is not None]
        assert found and set(found) <= allowed, budget      # None: a claim that names another size


# ---- every choice runs ---------------------------------------------------------------------------


def test_every_choice_runs_and_gives_finite_numbers(script, smoke, trained, tmp_path):
    common = "device dtype compile smoke full resume eval_only".split()
    for field in fields(script.Config):
        choices = get_args(field.type) or (("--", "--no-") if field.type is bool else ())
        for choice in choices if field.name not in common else ():
            flags = [f"{choice}{field.name}"] if field.type is bool else [f"--{field.name}", choice]
            out, more = tmp_path / "out", ["--only", smoke.arm]
            if field.name in script.Config.inference:   # it needs no training of its own
                out, more = trained, [*more, "--eval_only"]
            if choice not in (field.default, "--no-" if not field.default else "--"):
                with known_measurements(script), unpainted():
                    smoke_run(script, out, *more, *flags)
                assert list(read_strict(out / "results.json")["arms"]) == [smoke.arm], flags


def test_full_adds_arms_to_those_of_the_default_run(script, smoke, full):
    assert read_strict(full.out / "results.json") == full.results
    default = configs_of(script, full.out)
    assert list(default) == smoke.arms and set(default) < set(full.configs)
    assert set(full.results["arms"]) == {*full.configs} - {*default} | {smoke.arm}
    for arm, cfg in default.items():
        assert replace(full.configs[arm], full=False) == cfg
    arms = timeless(full.results["arms"])
    assert arms[smoke.arm] == timeless(smoke.results["arms"][smoke.arm])


def test_bfloat16_runs_on_a_cpu_and_changes_the_numbers_a_little(script, smoke, tmp_path):
    quick_run(script, tmp_path, "--only", smoke.arm, "--dtype", "bfloat16", "--device", "cpu")
    read_strict(tmp_path / "results.json")
    exact = [row for row in read_log(smoke.out) if row["arm"] == smoke.arm]
    for row, want in zip(read_log(tmp_path), exact, strict=True):
        assert row["val_loss"] != want["val_loss"]
        assert float(row["val_loss"]) == pytest.approx(float(want["val_loss"]), rel=0.05)


# ---- bad input -----------------------------------------------------------------------------------

BAD = ["--bogus 1", "--step 3", "--smoke=1", "stray", "--steps x", "--steps 1.5", "--lr x",
       "--device tpu", "--steps 0", "--lr -1", "--lr 0", "--lr inf", "--budget 0", "--budget 1e-9",
       "--seed -1", "--seed 100000000000000000000", "--n_embd 7 --n_head 4", "--only no_such_arm"]


@pytest.mark.parametrize("line", BAD)
def test_bad_flag_gets_one_line_and_nothing_is_written(script, capsys, tmp_path, line):
    (tmp_path / "results.json").write_text("old")
    name, flags = line.split()[0].strip("-").split("=")[0], line.split()
    for out in (tmp_path, tmp_path / "new"):
        assert name in refused(script, capsys, tmp_path, *flags, out=out)


@pytest.mark.parametrize("mode", ["--resume", "--eval_only"])
def test_nothing_to_load_is_refused(script, capsys, tmp_path, mode):
    for out in (tmp_path, tmp_path / "new"):
        assert "no checkpoint" in refused(script, capsys, tmp_path, mode, out=out)


def test_no_number_may_be_nan_and_no_count_negative(script, capsys, tmp_path):
    for field in fields(script.Config):
        if field.type in (int, float):
            wrong = "nan" if field.type is float else "-1"
            assert field.name in refused(script, capsys, tmp_path, f"--{field.name}={wrong}")


@pytest.mark.parametrize("content", [None, b"", b" \n", b"too short", b"\xff\xfe text" * 1000])
def test_bad_corpus_is_refused(script, capsys, tmp_path, content):
    if "corpus" not in vars(script.Config()):
        pytest.skip("makes its own data")
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    assert path.name in refused(script, capsys, tmp_path, "--corpus", path, out=tmp_path / "out")


def test_folder_that_cannot_be_one_is_refused(script, capsys, tmp_path):
    (tmp_path / "file").write_text("keep me")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(out) in refused(script, capsys, tmp_path, out=out)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_device_that_is_not_there_is_refused(script, capsys, tmp_path, device):
    if getattr(torch, device).is_available():
        pytest.skip(f"{device} is there")
    assert device in refused(script, capsys, tmp_path, "--device", device)


def test_bad_input_on_the_command_line(script, tmp_path):
    """In a forked process; the first script also as a user starts it, which takes seconds."""
    (folder := tmp_path / "here").mkdir()
    process = start(script.NAME, folder, "--steps", "0")
    printed, = finish([process], [folder])
    results = [(process.exitcode, *printed)]
    if script.NAME == NAMES[0]:
        line = [sys.executable, ROOT / f"{script.NAME}.py", "--steps", "0"]
        process = subprocess.run(line, capture_output=True, text=True, cwd=folder, timeout=120)
        results.append((process.returncode, process.stdout, process.stderr))
    for code, out, err in results:
        assert code == 2 and out == "" and re.fullmatch(rf"{script.NAME}: [^\n]+\n", err), err
    assert not files(folder)


# ---- interrupted runs ----------------------------------------------------------------------------


def resume(script, whole, out):
    """Asserts that the run in `out` ends like the whole one and trains only what was missing."""
    trained = sum(torch.load(path, weights_only=True)["step"] for path in out.glob("*.pt"))
    with counted_steps(script) as steps:
        results = quick_run(script, out, *whole.flags, "--resume")
    assert timeless(results["arms"]) == timeless(whole.results["arms"])
    assert read_log(out) == read_log(whole.out)
    assert trained > 0 and len(steps) < whole.steps


def test_killed_run_resumes_to_the_same_numbers(script, whole, tmp_path):
    early, late = tmp_path / "early" / "out", tmp_path / "late" / "out"
    delays = {early: 0.0, late: random.uniform(0.1, 0.9) * whole.seconds}
    processes = {}
    for out in delays:
        out.mkdir(parents=True)
        processes[out] = start(script.NAME, out.parent, "--smoke", *whole.flags)
    for out, process in processes.items():
        while not any(out.glob("*.pt")) and process.is_alive():
            time.sleep(0.001)
        time.sleep(delays[out])
        process.kill()      # SIGKILL
        process.join()
    assert not (early / "results.json").exists(), "the run was over before it was killed"
    for name in ("log.csv", "results.json", *(path.name for path in early.glob("*.pt"))):
        (early / f"{name}.part").write_bytes(b"half a fi")
    for out in delays:
        resume(script, whole, out)


@pytest.mark.parametrize("at", ["second", "last"])
def test_run_that_dies_while_it_writes_a_checkpoint_keeps_the_one_before(
        script, whole, tmp_path, monkeypatch, at):
    calls, save, count = [], torch.save, 2 if at == "second" else len(read_log(whole.out))

    def dying(state, file, *args, **keywords):
        calls.append(file)
        if len(calls) < count:
            return save(state, file, *args, **keywords)
        path = isinstance(file, (str, os.PathLike))
        with open(file, "wb") if path else contextlib.nullcontext(file) as stream:
            stream.write(b"PK half a checkpoint")
            stream.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", dying)
        quick_run(script, tmp_path, *whole.flags)
    resume(script, whole, tmp_path)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["--resume", "--eval_only"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "code", "no state"])
def test_damaged_checkpoint_is_refused_and_kept(
        script, smoke, trained, capsys, tmp_path, mode, damage):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = trained / f"{smoke.arms[-1]}.pt"
    data = path.read_bytes()
    if damage in ("code", "no state"):
        torch.save(Code() if damage == "code" else {"a": torch.ones(1)}, path)
    else:
        content = {"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello\n"}
        path.write_bytes(content[damage])
    flags = ["--only", path.stem] if damage != "truncated" else []
    assert path.name in refused(script, capsys, trained, mode, *flags)
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_another_script_is_refused(script, trained, capsys, monkeypatch):
    name = script.NAME
    monkeypatch.setattr(script, "NAME", "another")
    assert name in refused(script, capsys, trained, "--resume")


@pytest.mark.parametrize("mode", ["--resume", "--eval_only"])
def test_checkpoint_of_another_config_is_refused(script, trained, capsys, mode):
    for name, value in {"lr": 0.001234, "seed": 7, "weight_decay": 0.2, "n_layer": 8}.items():
        assert f"{name}=" in refused(script, capsys, trained, mode, f"--{name}", value)


def test_checkpoint_of_another_text_is_refused(script, smoke, capsys, tmp_path):
    if "corpus" not in vars(script.Config()):
        pytest.skip("makes its own data")
    path, out = tmp_path / "corpus.txt", tmp_path / "out"
    text = "the quick brown fox jumps over the lazy dog. " * 100
    path.write_text(text)
    flags = ["--corpus", str(path), "--only", smoke.arm]
    quick_run(script, out, *flags)
    for animal in ("FOX", "god"):       # another alphabet, the same alphabet
        path.write_text(text.replace("fox", animal))
        for function in vars(script).values():
            getattr(function, "cache_clear", lambda: None)()
        refused(script, capsys, out, *flags, "--eval_only")


def test_eval_only_reproduces_the_evaluation_and_trains_nothing(script, smoke, trained):
    """It may know the evaluation of the other arms, but not of these."""
    chosen = {smoke.arms[0], smoke.arm, smoke.arms[-1]}
    with counted_steps(script) as steps:
        results = quick_run(script, trained, "--eval_only")
        assert read_log(trained) == read_log(smoke.out)
        flags = ["--eval_only", "--only", ",".join(chosen)]
        some = quick_run(script, trained, *flags, known=False)
    assert timeless(results["arms"]) == timeless(smoke.results["arms"])
    want = {arm: smoke.results["arms"][arm] for arm in chosen}
    assert timeless(some["arms"]) == timeless(want) and not steps
    for path in trained.glob("*.pt"):
        assert path.read_bytes() == (smoke.out / path.name).read_bytes()


def test_eval_only_accepts_every_inference_field(script, smoke, trained):
    cfg, flags, values = script.parse_args(["--smoke"]), [], {}
    for field in fields(script.Config):
        if field.name in script.Config.inference:
            values[field.name] = value = not getattr(cfg, field.name)
            more = [f"--{field.name}" if value else f"--no-{field.name}"]
            if field.type is not bool:
                values[field.name] = value = other_value(field, getattr(cfg, field.name))
                more = [f"--{field.name}", str(value)]
            flags += more
    results = quick_run(script, trained, "--eval_only", "--only", smoke.arm, *flags)
    assert {name: results["config"][name] for name in values} == values


def test_eval_only_refuses_a_run_that_was_not_finished(script, smoke, trained, capsys):
    path = trained / f"{smoke.arms[-1]}.pt"
    path.unlink()
    missing = path.stem if len(smoke.arms) > 1 else "no checkpoint"
    assert missing in refused(script, capsys, trained, "--eval_only")


# ---- several processes ---------------------------------------------------------------------------


# Arms whose model draws its own noise: two processes draw the same for different rows.
NOISY_ARMS = {("mod", "random")}


def test_two_processes_equal_one_and_only_the_first_writes_and_prints(script, smoke, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes, folders = [], [tmp_path / "0", tmp_path / "1"]   # they show who writes
    for rank, folder in enumerate(folders):     # as torchrun does
        folder.mkdir()
        variables = dict(world, RANK=str(rank), LOCAL_RANK=str(rank))
        processes.append(start(script.NAME, folder, "--smoke", **variables))
    (_, err), (silent, quiet) = finish(processes, folders)
    assert [process.exitcode for process in processes] == [0, 0], err[-3000:]
    assert silent == "" and "step/s" not in quiet and not files(tmp_path / "1")
    out = tmp_path / "0" / "out"
    results = read_strict(out / "results.json")
    assert results["environment"]["processes"] == 2
    for row, want in zip(read_log(out), read_log(smoke.out), strict=True):
        assert (row["arm"], row["step"]) == (want["arm"], want["step"])
        if (script.NAME, row["arm"]) in NOISY_ARMS:
            continue
        for column in ("loss", "val_loss"):
            assert float(row[column]) == pytest.approx(float(want[column]), abs=1e-5), row
    for arm, metrics in results["arms"].items():
        for name, value in timeless(metrics).items():
            if isinstance(value, float) and (script.NAME, arm) not in NOISY_ARMS:
                want = smoke.results["arms"][arm][name]
                assert value == pytest.approx(want, abs=1e-5), (arm, name)


# ---- compiling and devices -----------------------------------------------------------------------


def alike(call):
    """Up to three batches of one shape that the smoke run gave to loss_fn."""
    shapes = [{name: value.shape for name, value in batch.items()} for batch in call.batches]
    return [batch for batch, shape in zip(call.batches, shapes) if shape == shapes[-1]][-3:]


def compare_with_eager(script, call, backend):
    """Asserts that a step compiles to one graph for all batches, with eager's gradients.

    A model that says by `compile` which of its parts are compiled has one graph for each of these,
    whatever a step draws.
    """
    graphs, model, compiler = [], call.model.train(), lookup_backend(backend)

    def counting(graph, inputs, **keywords):
        graphs.append(graph)
        return compiler(graph, inputs, **keywords)

    torch._dynamo.reset()
    how = dict(fullgraph=True, dynamic=False, backend=counting)
    if in_parts := compiled_in_parts(model):
        other, compiled = copy.deepcopy(model), script.loss_fn
        other.compile(**how)
    else:
        other, compiled = model, torch.compile(script.loss_fn, **how)
    batches = alike(call)
    assert len(batches) > 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, batch in enumerate(batches * (1 + 2 * in_parts)):
            found = []
            for net, loss_fn in ((model, script.loss_fn), (other, compiled)):
                net.zero_grad()
                torch.manual_seed(seed)
                loss, _ = loss_fn(net, batch, call.cfg)
                loss.backward()
                grads = [p.grad for p in net.parameters() if p.grad is not None]
                found.append([loss.detach(), *grads])
            torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1 or in_parts and len(graphs) > 1


class Operations(TorchDispatchMode):
    """Lists the names of what is computed, without sizes and numbers."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), keywords=None):
        self.names.append(str(operation))
        return operation(*args, **keywords or {})


def compiled_in_parts(model):
    return type(model).compile is not torch.nn.Module.compile


def operations(script, call):
    """What the steps of an arm compute, and with how many tensors: one graph for equal ones.

    Where parts are compiled, how often they are called makes no difference.
    """
    with Operations() as found:
        for seed, batch in enumerate(alike(call)):
            torch.manual_seed(seed)
            script.loss_fn(call.model.train(), batch, call.cfg)
    names = sorted(set(found.names)) if compiled_in_parts(call.model) else found.names
    return *names, len(call.model.state_dict())


def test_every_arm_compiles_to_one_graph_with_eager_results(script, smoke):
    """Of arms that differ in sizes and numbers only, one is tried."""
    different = {operations(script, call): call for call in smoke.calls}
    for call in different.values():
        last = call.cfg == smoke.calls[-1].cfg
        compare_with_eager(script, call, "aot_eager" if last else "eager")


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_inductor_agrees_with_eager(tmp_path):
    mod = pytest.importorskip("mod")
    with recorded(mod) as calls:
        smoke_run(mod, tmp_path, "--only", "mod", "--n_layer", "1", "--routed_every", "1")
    with torch._inductor.config.patch(fallback_random=True):
        compare_with_eager(mod, list(calls)[0], "inductor")


def test_run_with_compile_on_gives_the_numbers_of_the_eager_run(
        script, smoke, tmp_path, monkeypatch):
    """One arm is compiled; the others only ask for it.

    Unless told otherwise, Dynamo counts the compiled variants of a function over all models and
    refuses the ninth: arms, lengths and loop counts together come to more.
    """
    torch._dynamo.reset()
    graphs, asked, now = [], [], []
    train, compiling = script.train, torch.compile

    def training(arm, model, cfg, run):
        now[:] = [arm]
        model.compiled = str(arm == smoke.arm)      # what is known of others is not of this model
        return train(arm, model, cfg, run)

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def one_arm_compiling(function, **how):
        asked.append((*now, how["isolate_recompiles"], how["recompile_limit"] >= 64))
        return compiling(function, backend=counting, **how) if now == [smoke.arm] else function

    monkeypatch.setattr(script, "train", training)
    monkeypatch.setattr(torch, "compile", one_arm_compiling)
    quick_run(script, tmp_path, "--compile", "on")
    assert graphs and set(asked) == {(arm, True, True) for arm in smoke.arms}
    for row, exact in zip(read_log(tmp_path), read_log(smoke.out), strict=True):
        for column in ("loss", "val_loss"):
            assert float(row[column]) == pytest.approx(float(exact[column]), abs=1e-5), row


def test_every_arm_runs_on_the_meta_device_and_trains_every_parameter(
        script, smoke, full, monkeypatch):
    no_autocast = contextlib.nullcontext()      # the meta device has none
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: no_autocast)
    for call in [*smoke.calls, *full.calls]:
        model = copy.deepcopy(call.model).to("meta").train()
        model.zero_grad()
        batch = {name: value.to("meta") for name, value in call.batches[-1].items()}
        loss, _ = script.loss_fn(model, batch, call.cfg)
        loss.backward()
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        idle = [name for name, p in trained if p.grad is None]
        assert loss.is_meta and not idle, call.cfg      # DistributedDataParallel refuses idle ones


# ---- the same numbers, and numbers at all --------------------------------------------------------


def test_seed_alone_decides_the_numbers_of_an_arm(script, smoke, tmp_path):
    """Not the clock, and not the arms that ran before."""
    again = quick_run(script, tmp_path / "again", "--only", smoke.arm, known=False)
    want = [row for row in read_log(smoke.out) if row["arm"] == smoke.arm]
    assert timeless(again["arms"][smoke.arm]) == timeless(smoke.results["arms"][smoke.arm])
    assert read_log(tmp_path / "again") == want
    with recorded(script) as calls:
        quick_run(script, tmp_path / "other", "--seed", "2", "--only", smoke.arm)
    first = list(calls)[0].weights
    assert not any(torch.equal(first, call.weights) for call in smoke.calls)
    assert not {row["loss"] for row in want} & {row["loss"] for row in read_log(tmp_path / "other")}


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
        script, smoke, capsys, tmp_path, monkeypatch, fault):
    first = smoke.arms[0]
    good, loss_fn, calls = script.SMOKE["eval_every"], script.loss_fn, []

    def failing(model, batch, cfg):
        loss, stats = loss_fn(model, batch, cfg)
        calls.append(torch.is_grad_enabled())
        if sum(calls) > good and fault == "loss":
            return loss * math.nan, {name: value * math.nan for name, value in stats.items()}
        if sum(calls) == 2 * good and calls[-1]:    # fine in this step, not in the next
            loss = loss + (0 * next(model.parameters())).sum().sqrt()
        return loss, stats

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(script, "loss_fn", failing)
        quick_run(script, tmp_path, "--only", first)
    message = capsys.readouterr().err.split("\n")[-2]
    assert stop.value.code == 1
    assert message.startswith(f"{script.NAME}: ")
    assert first in message and re.search(r"step \d", message)
    assert torch.load(tmp_path / f"{first}.pt", weights_only=True)["step"] == good
    assert not (tmp_path / "results.json").exists()
    again = quick_run(script, tmp_path, "--only", first, "--resume")["arms"]
    assert timeless(again[first]) == timeless(smoke.results["arms"][first])


# ---- use from a notebook -------------------------------------------------------------------------


def test_first_run_leaves_global_settings_as_they_were(smoke):
    assert not smoke.changed


@pytest.mark.parametrize("flush, precision", [(False, "highest"), (True, "medium")])
@pytest.mark.parametrize("end", ["normal", "error", "interrupt", "bad input"])
def test_main_leaves_global_settings_as_they_were(
        script, smoke, tmp_path, monkeypatch, flush, precision, end):
    def broken(model, batch, cfg):
        raise {"error": RuntimeError, "interrupt": KeyboardInterrupt}[end]

    if end in ("error", "interrupt"):
        monkeypatch.setattr(script, "loss_fn", broken)
    flags = ["--only", "no_such_arm" if end == "bad input" else smoke.arm]
    precision_before = torch.get_float32_matmul_precision()
    torch.set_flush_denormal(flush)
    torch.set_float32_matmul_precision(precision)
    try:
        before = global_state()
        with contextlib.suppress(RuntimeError, KeyboardInterrupt, SystemExit):
            quick_run(script, tmp_path, *flags)
        after = global_state()
    finally:
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision(precision_before)
    assert (tmp_path / "results.json").exists() == (end == "normal")
    assert not [name for name, value in before.items() if after[name] != value]


def test_importing_prints_nothing_and_touches_nothing(script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.rand(1)       # a state that no seed gives
    before = global_state()
    spec = importlib.util.spec_from_file_location(script.NAME, ROOT / f"{script.NAME}.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert global_state() == before
    assert capsys.readouterr() == ("", "") and not files(tmp_path)
