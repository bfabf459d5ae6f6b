"""The evidence: default runs on seeds 1, 2 and 3 -> data/results/NAME.json, NAME.png, README tables,
and the claims in the script's docstring.

    python -m tests.reproduce              every script
    python -m tests.reproduce mod looped   these scripts
    python -m tests.reproduce --table      only rewrite the README's tables from the JSON files

Finished seeds of an unchanged script are kept in out/evidence and not run again.
"""

import ast
import hashlib
import importlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from tests import overview
from tests.same_name import ROOT, SCRIPTS, scripts

SEEDS = 1, 2, 3
RESULTS = ROOT / "data" / "results"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
CELLS = re.compile(r"(<!-- (\w+): (.+?) -->).*?(<!-- end -->)")       # of one script, in the README


def fingerprint(path):
    """SHA-256 of a script's syntax tree without docstrings, comments and what can change no number:
    `plot`, which draws the results when they are written, and what only a compiled run executes:
    the evidence is of runs on a CPU, which are not compiled."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        owner = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if owner and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.FunctionDef) and node.name == "plot":
            node.body, node.decorator_list = [], []
        if isinstance(node, ast.If) and ast.unparse(node.test) == "run.compile":
            node.body = []
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def folder(path, seed):
    """Where a run belongs, and the file there that says it is whole and of this script's version."""
    out = ROOT / "out" / "evidence" / path.stem / str(seed)
    return out, out / fingerprint(path)


def time_left(jobs):
    """What the runs (path, seed) that are still to be made will take, from what they took before."""
    stored = {path: RESULTS / f"{path.stem}.json" for path, _ in jobs}
    known = {path: json.loads(file.read_text())["seconds"]["mean"] / 60
             for path, file in stored.items() if file.exists()}
    usual = statistics.fmean(known.values()) if known else 5
    return f"{len(jobs)} runs left, about {sum(known.get(path, usual) for path, _ in jobs):.0f} minutes"


def run(path, seed):
    """results.json of the default run on one seed."""
    out, mark = folder(path, seed)
    if not mark.exists():
        shutil.rmtree(out, ignore_errors=True)
        line = [sys.executable, path.name, "--seed", str(seed), "--out", str(out)]
        subprocess.run(line, cwd=ROOT, check=True)
        mark.touch()
    return json.loads((out / "results.json").read_text())


def draw(path, seed):
    """Draws NAME.png of a finished run by the present `plot`, and stores it."""
    out, script = folder(path, seed)[0], importlib.import_module(path.stem)
    results = run(path, seed)
    cfg = script.Config(**results["config"] | {"out": str(out)})
    script.plot(cfg, script.Run(cfg), results)
    shutil.copyfile(out / f"{path.stem}.png", RESULTS / f"{path.stem}.png")


def spread(values):
    """Mean, standard deviation and the values themselves, by seed."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values), "seeds": list(values)}


def summarise(path, runs):
    """What is stored of the runs of one script: every number of every arm, every claim, by seed."""
    arms = {}
    for arm, metrics in runs[0]["arms"].items():
        numbers = [k for k, v in metrics.items() if isinstance(v, int | float)]
        arms[arm] = {k: spread([run["arms"][arm][k] for run in runs]) for k in numbers}
    claims = [dict(claim=parts[0]["claim"], needed=parts[0]["needed"],
                   measured=spread([part["measured"] for part in parts]),
                   verdicts=[part["verdict"] for part in parts])
              for parts in zip(*(run["claims"] for run in runs))
              if parts[0]["measured"] is not None]      # else it needs an arm of --full
    return {"script": path.stem, "fingerprint": fingerprint(path), "seeds": SEEDS, "arms": arms,
            "claims": claims, "seconds": spread([run["seconds"] for run in runs]),
            "config": runs[0]["config"], "environment": runs[0]["environment"]}


def fill(text, claims):
    """A script's text with what its claims measured in the lines `... needed >= 0.9, ...`, in order."""
    line = r"(?:-?\d+\.\d+ \+- \d+\.\d+ +)?needed ([<>]= \S+), (?:holds on \d of 3|not measured yet)"
    needed = [claim["needed"] for claim in claims]
    if re.findall(line, text) != needed:
        raise ValueError(f"the docstring needs {re.findall(line, text)}, the claims {needed}")
    shown = []
    for claim in claims:
        number = f"{claim['measured']['mean']:.3f} +- {claim['measured']['sd']:.3f}"
        holds = claim["verdicts"].count("holds")
        shown.append(f"{number:<14}  needed {claim['needed']}, holds on {holds} of 3")
    return re.sub(line, lambda match: shown.pop(0), text)


def table():
    """The README's table of all stored claims."""
    lines = ["| script | claim | needed | mean over 3 seeds | sd | holds on | minutes |"]
    lines.append("|" + "---|" * 7)
    for path in scripts():
        if (RESULTS / f"{path.stem}.json").exists():
            stored = json.loads((RESULTS / f"{path.stem}.json").read_text())
            stale = "" if stored["fingerprint"] == fingerprint(path) else " (an earlier version)"
            minutes = f"{stored['seconds']['mean'] / 60:.1f}"
            for claim in stored["claims"]:
                holds, m = claim["verdicts"].count("holds"), claim["measured"]
                row = [path.name + stale, claim["claim"], claim["needed"], f"{m['mean']:.3f}",
                       f"{m['sd']:.3f}", f"{holds} of 3", minutes]
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join(lines)


def cells(name, text):
    """Three cells of the README's first table: what was measured, minutes, picture.

    In the text, {claim} or {arm.metric} is replaced by a mean and its standard deviation.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "not measured yet | - | -"
    stored = json.loads(path.read_text())
    found = {claim["claim"]: claim["measured"] for claim in stored["claims"]}
    found |= {f"{arm}.{k}": v for arm, m in stored["arms"].items() for k, v in m.items()}
    shown = re.sub("{(.+?)}", lambda m: "**{mean:.2f} ± {sd:.2f}**".format(**found[m[1]]), text)
    always = sum(set(claim["verdicts"]) == {"holds"} for claim in stored["claims"])
    minutes, picture = f"{stored['seconds']['mean'] / 60:.1f}", f"[see](data/results/{name}.png)"
    return f"{shown}; {always} of {len(stored['claims'])} claims hold | {minutes} | {picture}"


def rewrite(readme):
    """README text with the cells of every script and the table of all claims between their markers."""
    readme = CELLS.sub(lambda m: f"{m[1]}{cells(m[2], m[3])}{m[4]}", readme)
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main(argv):
    names = [name for name in argv if name != "--table"]
    paths = [path for path in scripts() if path.stem in names or not names and argv != ["--table"]]
    for path in paths:
        for seed in SEEDS:
            left = [(p, s) for p in paths for s in SEEDS if not folder(p, s)[1].exists()]
            if (path, seed) in left:
                print(f"{path.name}, seed {seed}: {time_left(left)}")
            run(path, seed)
        summary = summarise(path, [run(path, seed) for seed in SEEDS])
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{path.stem}.json").write_text(json.dumps(summary, indent=1) + "\n")
        path.write_text(fill(path.read_text(), summary["claims"]))
        draw(path, seed=1)
    overview.draw(RESULTS, SCRIPTS)
    readme = ROOT / "README.md"
    readme.write_text(rewrite(readme.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
