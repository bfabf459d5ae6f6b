"""The evidence: default runs on seeds 1, 2 and 3 -> data/results/NAME.json, NAME.png, README table,
and the claims in the script's docstring.

    python -m tests.reproduce              every script
    python -m tests.reproduce mod looped   these scripts
    python -m tests.reproduce --table      only rewrite the README's table from the JSON files

Finished seeds of an unchanged script are kept in out/evidence and not run again.
"""

import ast
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from tests.same_name import ROOT, scripts

SEEDS = 1, 2, 3
RESULTS = ROOT / "data" / "results"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def fingerprint(path):
    """SHA-256 of a script's syntax tree without docstrings (and without comments)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        owner = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if owner and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def run(path, seed):
    """results.json of the default run on one seed."""
    out, mark = ROOT / "out" / "evidence" / path.stem / str(seed), fingerprint(path)
    if not (out / mark).exists():
        shutil.rmtree(out, ignore_errors=True)
        line = [sys.executable, path.name, "--seed", str(seed), "--out", str(out)]
        subprocess.run(line, cwd=ROOT, check=True)
        (out / mark).touch()
    return json.loads((out / "results.json").read_text())


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
                cells = [path.name + stale, claim["claim"], claim["needed"], f"{m['mean']:.3f}",
                         f"{m['sd']:.3f}", f"{holds} of 3", minutes]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rewrite(readme):
    """README text with the table between its two markers."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main(argv):
    names = [name for name in argv if name != "--table"]
    for path in scripts():
        if argv != ["--table"] and (not names or path.stem in names):
            summary = summarise(path, [run(path, seed) for seed in SEEDS])
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{path.stem}.json").write_text(json.dumps(summary, indent=1) + "\n")
            path.write_text(fill(path.read_text(), summary["claims"]))
            evidence = ROOT / "out" / "evidence" / path.stem / "1" / f"{path.stem}.png"
            shutil.copyfile(evidence, RESULTS / f"{path.stem}.png")
    readme = ROOT / "README.md"
    readme.write_text(rewrite(readme.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
