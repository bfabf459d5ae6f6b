"""Same name => same code: a top-level name in several scripts has byte-identical source.

    python -m tests.same_name                         what differs; exit code 1 if anything does
    python -m tests.same_name --from mod.py NAME ...  writes mod.py's version into all that have it

Names are classes, functions (with their decorators), upper-case constants. Comments count.
"""

import argparse
import ast
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "mod mor tah adainfer coconut looped recurrent_depth hrpo llada remdm softmask".split()

# The interface, a closed list: every script has its own bodies, and the same arguments.
INTERFACE = {"make_batch": "cfg, split, step", "loss_fn": "model, batch, cfg",
             "evaluate": "model, cfg, run", "experiment": "cfg, run", "plot": "cfg, run, results",
             "main": "argv=None"}
EXEMPT = {"Config", "SMOKE", "CLAIMS", "COLUMNS", "STYLES", *INTERFACE}    # what the kit reads


def scripts(root=ROOT):
    """Paths of the scripts that exist."""
    return [root / f"{name}.py" for name in SCRIPTS if (root / f"{name}.py").exists()]


def read(path):
    """The lines of a script, and {name: (slice of these lines, node)} of its definitions."""
    text, found = path.read_bytes().decode(), {}
    for node in ast.parse(text).body:
        names = [getattr(node, "name", "")]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names = [part.id for part in parts if isinstance(part, ast.Name) and part.id.isupper()]
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        found |= {name: (slice(first - 1, node.end_lineno), node) for name in names if name}
    return text.split("\n"), found


def differences(paths):
    """What breaks the rule, one text for each version or signature that is not the common one."""
    versions, found = {}, []
    for path in paths:
        lines, definitions = read(path)
        for name, (where, node) in definitions.items():
            source = "\n".join(lines[where])
            versions.setdefault(name, {}).setdefault(source, []).append(path.name)
            takes = ast.unparse(node.args) if hasattr(node, "args") else "no function"
            if takes != INTERFACE.get(name, takes):
                found.append(f"{name} in {path.name}: ({takes}) must be ({INTERFACE[name]})")
    for name in sorted(versions.keys() - EXEMPT):
        (a, files), *others = sorted(versions[name].items(), key=lambda version: -len(version[1]))
        for b, more in others:
            pairs = zip(a.split("\n") + ["(its end)"], b.split("\n") + ["(its end)"])
            line, x, y = next((i, x, y) for i, (x, y) in enumerate(pairs, 1) if x != y)
            found.append(f"{name} differs, first in its line {line}:\n"
                         f"  {' '.join(files)}: {x}\n  {' '.join(more)}: {y}")
    return found


def copy(origin, name, paths):
    """Writes `name` as `origin` defines it into all others that have it. Returns what changed."""
    lines, definitions = read(origin)
    if name in EXEMPT or name not in definitions:
        why = "every script has its own" if name in EXEMPT else f"it is not in {origin.name}"
        raise ValueError(f"{name} cannot be copied: {why}")
    new, changed = lines[definitions[name][0]], []
    for path in paths:
        lines, others = read(path)
        if name in others and lines[others[name][0]] != new:
            lines[others[name][0]] = new
            path.with_suffix(".part").write_bytes("\n".join(lines).encode())
            os.replace(path.with_suffix(".part"), path)
            changed.append(path.name)
    return changed


def main(argv=None, root=ROOT):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m tests.same_name")
    parser.add_argument("--from", dest="origin", metavar="SCRIPT", help="has the right version")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to copy from it")
    args = parser.parse_args(argv)
    if bool(args.origin) != bool(args.names):
        parser.error("--from takes a script and at least one name")
    try:
        for name in args.names:
            print(name, "->", *copy(root / args.origin, name, scripts(root)) or ["(no change)"])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    found = differences(scripts(root))
    print(*found or ["no differences"], sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
