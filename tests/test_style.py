"""What every script promises about its form.

A promise is a function that returns what breaks it. It is tested on the scripts that exist, and on
two small invented scripts: it must pass them as they are and find a mistake that is planted there.
"""

import ast
import functools
import io
import json
import math
import re
import sys
import tokenize
import types

import pytest

from tests import same_name
from tests.processes import SERVER, note_effects
from tests.quick import unpainted
from tests.same_name import EXEMPT, ROOT

SECTIONS = "Config Task Kit Method Objective Training Evaluation Experiment main".split()
COMMON = "seed budget smoke only full device dtype compile out resume eval_only".split()
PACKAGES = {"torch", "numpy", "tqdm", "matplotlib", *sys.stdlib_module_names}
BLOCKS = ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match


class Script:
    """A script that is read, not run."""

    def __init__(self, path):
        self.path, self.name = path, path.name
        self.text = path.read_bytes().decode()
        self.lines, self.definitions = same_name.read(path)
        self.tree = ast.parse(self.text)
        self.doc = ast.get_docstring(self.tree, clean=False) or ""
        self.tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline))
        self.comments = {t.start[0]: t.string for t in self.tokens if t.type == tokenize.COMMENT}

    def nodes(self, *kinds):
        """All nodes of the syntax tree that are of these kinds."""
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def fields(self):
        """{name: (type, comment)} of the fields of Config."""
        return {node.target.id: (ast.unparse(node.annotation), self.comments.get(node.lineno))
                for node in self.definitions["Config"][1].body if isinstance(node, ast.AnnAssign)}

    def meanings(self):
        """The same, but `task` without its choices: every script has tasks of its own."""
        return {name: (kind.split("[")[0] if name == "task" else kind, comment)
                for name, (kind, comment) in self.fields().items()}

    def names_of_others(self, scripts):
        """Top-level names that other scripts define, too."""
        return set().union(*(s.definitions for s in scripts if s.path != self.path)) - EXEMPT


def all_scripts(root=ROOT):
    return [Script(path) for path in same_name.scripts(root)]


# ---- Promises that reading can check: (script, all scripts) -> what breaks them


def nine_sections_in_order(script, _):
    banners = [line for line in script.lines if line.startswith("# --")]
    right = [rf"# ---- {i}\. {word}\b.* -+" for i, word in enumerate(SECTIONS, 1)]
    wrong = [b for b, r in zip(banners, right) if len(b) != 100 or not re.fullmatch(r, b)]
    return wrong or ([] if len(banners) == 9 else [f"{len(banners)} banners"])


def depth(node):
    """How many control-flow blocks are inside one another; an elif is as deep as its if."""
    here, deepest = isinstance(node, BLOCKS), 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(child, ast.If) and child.col_offset == getattr(node, "col_offset", -1)
        deepest = max(deepest, depth(child) + (here and not is_elif))
    return deepest


def short_enough_for_one_sitting(script, _):
    owners = script.nodes(ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [owner.body[0] for owner in owners if ast.get_docstring(owner) is not None]
    prose = {i for doc in docs for i in range(doc.lineno, doc.end_lineno + 1)}
    prose |= {i for i, line in enumerate(script.lines, 1) if line.strip()[:1] in ("", "#")}
    tables = [node for node in script.tree.body if isinstance(node, ast.Assign)]
    for node in [*script.nodes(ast.Import, ast.ImportFrom, ast.AnnAssign), *tables]:
        prose |= set(range(node.lineno, node.end_lineno + 1))   # lists, not logic
    sizes = [("the script", len(script.lines) - 1, "lines", 750),
             ("the script", len(script.lines) - len(prose), "code lines", 480)]
    for node in script.nodes(ast.FunctionDef):
        sizes += [(node.name, node.end_lineno - node.lineno + 1, "lines", 60),
                  (node.name, depth(node), "nested blocks", 4)]
    return [f"{name} has {n} {what}, at most {cap}" for name, n, what, cap in sizes if n > cap]


def plain_layout(script, _):
    found = [] if re.search(r"[^\n]\n\Z", script.text) else ["the end is not one newline"]
    for i, line in enumerate(script.lines, 1):
        wrong = {"over 100 columns": len(line) > 100, "tab": "\t" in line,
                 "trailing space": line != line.rstrip()}
        found += [f"line {i}: {what}" for what, is_so in wrong.items() if is_so]
    formatted = 0   # inside an f-string single quotes are needed (and tokens, from Python 3.12 on)
    for token in script.tokens:
        kind, text = tokenize.tok_name[token.type], token.string
        if kind in ("STRING", "FSTRING_START") and not formatted and '"' not in text:
            found.append(f"line {token.start[0]}: single quotes")
        formatted += (kind == "FSTRING_START") - (kind == "FSTRING_END")
    return found


def docstring_has_its_parts(script, _):
    parts = {"an arXiv id": r"arXiv \d{4}\.\d{4,5}", "how to run it": rf"\bpython {script.name}\b",
             "Exercises": r"\bExercises\b"}
    return [f"it lacks {what}" for what, text in parts.items() if not re.search(text, script.doc)]


def new_here_lists_what_is_defined_only_here(script, scripts):
    listing = re.search(r"New here:(.*?)(\n\s*\n|\Z)", script.doc, re.S)
    if not listing:
        return ["no `New here:`"]
    listed, mine = set(re.findall(r"\w+", listing[1])), script.definitions.keys()
    if len(scripts) == 1:   # without others everything would be new
        return [f"{name} is not defined" for name in sorted(listed - mine)]
    new = mine - script.names_of_others(scripts) - EXEMPT
    return [f"{name} is new or is listed, not both" for name in sorted(listed ^ new)]


def equation_numbers(text):
    """The numbers in texts like `Eq. 3` and `Eq. 3, 4 and 5`."""
    runs = re.findall(r"\bEq\. (\d+(?:(?:, | and | or )\d+)*)", text)
    return [n for run in runs for n in re.findall(r"\d+", run)]


def equations_and_lines_belong_together(script, scripts):
    numbered, computed = re.findall(r"^\s*\((\d+)\)", script.doc, re.M), set()
    found = [] if numbered else ["no numbered equation"]
    found += [f"({n}) twice" for n in sorted(set(numbered)) if numbered.count(n) > 1]
    config = script.definitions["Config"][1]
    for line, comment in script.comments.items():
        tags = equation_numbers(comment)
        found += [f"line {line}: there is no equation ({n})" for n in tags if n not in numbered]
        is_help = config.lineno <= line <= config.end_lineno    # it refers, it does not tag
        if script.lines[line - 1].strip() != comment and not is_help:
            computed.update(tags)
    found += [f"no line computes ({n})" for n in numbered if n not in computed]
    for name in sorted(script.names_of_others(scripts) & script.definitions.keys()):
        if equation_numbers("\n".join(script.lines[script.definitions[name][0]])):
            found.append(f"{name} is shared, and equation numbers are not: tag its call")
    return found


def config_fields_have_help_and_one_meaning(script, scripts):
    mine = script.fields()
    found = [f"no field {name}" for name in COMMON if name not in mine]
    found += [f"{name}: no comment behind it" for name, (_, comment) in mine.items() if not comment]
    mine = script.meanings()
    for other in scripts:
        theirs = other.meanings()
        found += [f"{name}: {mine[name]}, but in {other.name} {theirs[name]}"
                  for name in mine if name in theirs and mine[name] != theirs[name]]
    return found


def imports_only_what_it_may(script, _):
    found = []
    for node in script.nodes(ast.Import, ast.ImportFrom):
        whole = isinstance(node, ast.Import)
        for name in [alias.name for alias in node.names] if whole else [node.module or ""]:
            known = name == "data.tokenizer" or name.split(".")[0] in PACKAGES
            if not known or getattr(node, "level", 0):
                found.append(f"line {node.lineno}: imports {name or 'a neighbour'}")
    return found


PROMISES = [nine_sections_in_order, short_enough_for_one_sitting, plain_layout,
            docstring_has_its_parts, new_here_lists_what_is_defined_only_here,
            equations_and_lines_belong_together, config_fields_have_help_and_one_meaning,
            imports_only_what_it_may]


# ---- Shape notes are executed


def shape_notes(script):
    """{first line: (names, axes)} of the assignments that end in a comment such as # (B, T + 1)."""
    notes = {}
    for node in script.nodes(ast.Assign, ast.AnnAssign, ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [ast.unparse(part) for target in targets for part in ast.walk(target)
                 if isinstance(part, (ast.Name, ast.Attribute)) and isinstance(part.ctx, ast.Store)]
        comment = script.comments.get(node.end_lineno, "").removeprefix("# ")
        for end in [m.end() for m in re.finditer(r"\)", comment) if comment[0] == "("]:
            try:
                note = ast.parse(comment[:end], mode="eval").body
            except SyntaxError:
                continue
            if isinstance(note, ast.Tuple):
                notes[node.lineno] = names, [ast.unparse(axis) for axis in note.elts]
            break
    return notes


class Instrument(ast.NodeTransformer):
    """Puts a call of `_compare` behind every assignment with a note, and of `_turn` into loops."""

    def __init__(self, notes):
        self.notes = notes

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.body[:0] = ast.parse("_letters = {}").body
        return node

    def visit_For(self, node):
        self.generic_visit(node)
        node.body[:0] = ast.parse(f"_turn({node.lineno}, _letters)").body
        return node

    def visit_Assign(self, node):
        call = ast.parse(f"_compare({node.lineno}, _letters, locals())").body
        return [node, *call] if node.lineno in self.notes else node

    visit_While, visit_AnnAssign, visit_AugAssign = visit_For, visit_Assign, visit_Assign


@functools.cache
def compiled(text):
    return compile(text, "shape note", "eval")


class ShapeCheck:
    """Compares every shape note of a script with the tensors of a run. Its rules:

    - In one call a letter has one size; what was learnt in a loop is forgotten when the loop turns.
    - A letter that is also a local integer, such as T in `B, T, C = x.shape`, has its value.
    - C, nh and hs are n_embd, n_head and n_embd / n_head of a Config of this run; T is at most its
      seq_len.
    - An axis such as T + 1 gives the letter that is not known yet; with two unknown, it is skipped.
    - Of several targets, those that are no tensors or have another number of axes are skipped, but
      one must fit. A note counts as executed when it was compared with a tensor.
    - What was found right is not compared again with the same sizes.
    """

    def __init__(self, script):
        self.notes, self.configs, self.executed, self.wrong = shape_notes(script), [], set(), {}
        self.letters = {line: re.findall(r"[A-Za-z_]\w*", " ".join(axes))
                        for line, (_, axes) in self.notes.items()}
        self.right = {}     # all that a comparison depends on -> what it teaches

    def turn(self, first, letters):
        """A loop that starts in line `first` starts again. letters: {letter: (size, line)}."""
        for letter in [a for a, (_, line) in letters.items() if line >= first]:
            del letters[letter]

    def compare(self, line, letters, variables):
        """Compares the note of the assignment in `line`, which was executed just now."""
        (names, axes), shapes, problem = self.notes[line], {}, None
        for name in names:
            value = variables[name] if name in variables else eval(compiled(name), {}, variables)
            if hasattr(value, "shape"):
                shapes[name] = tuple(value.shape)
        if not shapes:
            return
        self.executed.add(line)
        integers = [(name, variables[name]) for name in self.letters[line]
                    if type(variables.get(name)) is int]
        known = [(letter, letters.get(letter)) for letter in self.letters[line]]
        case = line, *shapes.items(), len(self.configs), *integers, *known
        if case in self.right:
            letters.update(self.right[case])
            return
        own, learnt = [axis for axis in axes if axis != "..."], dict(letters)
        more = "..." in axes
        fit = [s for s in shapes.values() if len(s) == len(own) or more and len(s) > len(own)]
        for axis, size in [pair for s in fit for pair in zip(own, s[len(s) - len(own) :])]:
            problem = problem or self.disagreement(axis, size, line, learnt, variables)
        if problem or not fit:
            problem = problem or "other number of axes"
            self.wrong.setdefault(line, f"line {line}: ({', '.join(axes)}) is {shapes}: {problem}")
        else:
            letters.update(learnt)
            self.right[case] = {name: learnt[name] for name, _ in known if name in learnt}

    def disagreement(self, axis, size, line, letters, variables):
        """Why this axis cannot have this size, or None. Learns its letter if that is new."""
        fixed = {"C": {c.n_embd for c in self.configs}, "nh": {c.n_head for c in self.configs},
                 "hs": {c.n_embd // c.n_head for c in self.configs}}
        known = {letter: min(sizes) for letter, sizes in fixed.items() if len(sizes) == 1}
        known |= {letter: learnt for letter, (learnt, _) in letters.items()}
        known |= {name: value for name, value in variables.items() if type(value) is int}
        used = set(re.findall(r"[A-Za-z_]\w*", axis))
        new, code = used - known.keys(), compiled(axis)
        if len(new) > 1:
            return None
        for letter in new:      # what the axis would be for 1, 2, 3 shows if it is linear
            a, b, c = (eval(code, {}, {**known, letter: value}) for value in (1, 2, 3))
            if a == b or b - a != c - b:
                return None
            known[letter] = 1 + (size - a) / (b - a)
        if eval(code, {}, known) != size:
            return f"{axis} = {eval(code, {}, known):g}, not {size}"
        for letter in used:
            value, most = known[letter], math.inf
            if letter == "T":
                most = max((cfg.seq_len for cfg in self.configs), default=math.inf)
            if value % 1 or value > most or value not in (fixed.get(letter) or [value]):
                return f"{letter} = {value:g}"
        letters.update({letter: (known[letter], line) for letter in new})
        return None


def contradicted_shape_notes(script, out, monkeypatch):
    """What a run with --smoke shows to be wrong; or, that it meets less than 80 % of the notes."""
    check, module = ShapeCheck(script), types.ModuleType(f"checked_{script.path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(_letters={}, _turn=check.turn, _compare=check.compare)
    module.__file__ = str(script.path)
    tree = Instrument(check.notes).visit(ast.parse(script.text))
    exec(compile(tree, script.path, "exec"), vars(module))
    validate = module.Config.__post_init__
    module.Config.__post_init__ = lambda cfg: check.configs.append(cfg) or validate(cfg)
    with unpainted():
        module.main(["--smoke", "--out", str(out)])
    missed = sorted(check.notes.keys() - check.executed)
    found = [check.wrong[line] for line in sorted(check.wrong)]
    if not check.notes or len(missed) > 0.2 * len(check.notes):
        found.append(f"{len(missed)} of {len(check.notes)} not met, lines {missed}")
    return found


# ---- Importing has no effects


def effects_of_imports(scripts, folder):
    """{script: what its import changed}; all are imported by one process, in an empty folder."""
    folder.mkdir()
    names, found = [script.path.stem for script in scripts], folder.with_suffix(".json")
    process = SERVER.Process(target=note_effects,
                             args=(str(scripts[0].path.parent), names, str(folder), str(found)))
    process.start()
    process.join(timeout=120)
    process.kill()
    return json.loads(found.read_text())


# ---- The tests


INVENTED = """\"\"\"Tiny, a script in miniature (arXiv 2404.02258). Run it: python mod.py

(1)  y = x W
(2)  z = y + 1

Exercises: none.

New here: Tiny
\"\"\"

from dataclasses import dataclass

import torch

@1. Config
@dataclass
class Config:
    n_embd: int = 8     # width
    n_head: int = 2     # heads
    seq_len: int = 4    # most tokens

    def __post_init__(self):
        pass

@2. Task
def make_batch(cfg, split, step):
    window = torch.zeros(3, cfg.seq_len + 1, cfg.n_embd)    # (B, T + 1, C)
    return window[:, 1:]

@3. Kit (the same in every script: skip on first reading)
@torch.no_grad()
def shared(x):
    # all of it
    return x

@4. Method
class Tiny:
    def forward(self, x, cfg):
        y = x @ torch.eye(cfg.n_embd)                       # (B, T, C)  Eq. 1
        q, (k, _), n = y.view(
            3, -1, cfg.n_head, 4), (y.mT, None), 1          # (B, T, nh, hs)
        half = shared(q)[..., :2]                           # (..., hs / 2)
        return half

@5. Objective and decoding
def loss_fn(model, batch, cfg):
    return model.forward(batch, cfg) + 1                    # Eq. 2

@6. Training
@7. Evaluation
@8. Experiment
@9. main
def main(argv=None):
    cfg = Config()
    loss_fn(Tiny(), make_batch(cfg, "train", 0), cfg)
    first = torch.zeros(2)                                  # (B,)
    for i in range(3):
        grown = torch.zeros(2, i + 1)                       # (B, n)
        again = grown + first[:, None]                      # (B, n)
    return again
"""


def invent(folder, changes=()):
    """Writes mod.py and mor.py into the folder, the second with (old, new) changes."""
    lines = []
    for line in INVENTED.split("\n"):
        lines += [f"# ---- {line[1:]} ".ljust(100, "-")] if re.match(r"@\d", line) else [line]
        lines += [f"    {name}: int = 0     # {name}" for name in COMMON if "seq_len: int" in line]
    text = "\n".join(lines)
    (folder / "mod.py").write_text(text)
    text = text.replace("Tiny", "Other").replace("mod.py", "mor.py")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "mor.py").write_text(text)
    return all_scripts(folder)


EVERY = all_scripts()
every_script = pytest.mark.parametrize("script", EVERY, ids=lambda script: script.name)


@every_script
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_script(promise, script):
    found = promise(script, EVERY)
    assert not found, "\n".join(found)


@every_script
def test_shape_notes_hold_when_executed(script, tmp_path, monkeypatch):
    found = contradicted_shape_notes(script, tmp_path, monkeypatch)
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def effects(tmp_path_factory):
    return effects_of_imports(EVERY, tmp_path_factory.mktemp("import") / "empty")


@every_script
def test_importing_has_no_effect(script, effects):
    assert effects[script.name] == []


def test_same_name_means_same_code():
    found = same_name.differences(same_name.scripts())
    assert not found, "\n".join(found)


# ---- The checks: they pass what is right and find what is wrong


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_invented_scripts_keep_the_promise(promise, tmp_path):
    scripts = invent(tmp_path)
    assert [promise(script, scripts) for script in scripts] == [[], []]
    assert promise(scripts[0], scripts[:1]) == []


def test_new_here_of_a_single_script_lists_what_it_defines(tmp_path):
    script = invent(tmp_path, [("New here: Other", "New here: Other, nothing")])[1]
    assert new_here_lists_what_is_defined_only_here(script, [script]) == ["nothing is not defined"]


NESTED = "".join(" " * 4 * i + "if x:\n" for i in range(1, 6)) + " " * 24 + "x = 1\n    return x"
ELIFS = "    if x:\n        x = 1\n" + "    elif x:\n        x = 1\n" * 5 + "    return x"


@pytest.mark.parametrize("promise, old, new", [
    (nine_sections_in_order, "# ---- 2. Task -", "# ---- 2. Data -"),
    (nine_sections_in_order, "# ---- 2. Task -", "# ---- 3. Task -"),
    (nine_sections_in_order, "# ---- 9. main --", "# ---- 9. main -"),
    (nine_sections_in_order, "# ---- 9. main -", "#  9. main -"),
    (nine_sections_in_order, "def main", "# ---- 10. More ----\ndef main"),
    (short_enough_for_one_sitting, "\ndef main", "\n" * 700 + "def main"),
    (short_enough_for_one_sitting, "\ndef main", "\n" + "f()\n" * 600 + "def main"),
    (short_enough_for_one_sitting, "    return x", "    # more\n" * 58 + "    return x"),
    (short_enough_for_one_sitting, "    return x", NESTED),
    (plain_layout, "# all of it", "# all of it" + 86 * "!"),
    (plain_layout, "# all of it", "# all\tof it"),
    (plain_layout, "# all of it", "# all of it "),
    (plain_layout, '"train"', "'train'"),
    (plain_layout, "return again\n", "return again"),
    (plain_layout, "return again\n", "return again\n\n"),
    (docstring_has_its_parts, "arXiv 2404", "arXiv 404"),
    (docstring_has_its_parts, "python mor.py", "python mod.py"),
    (docstring_has_its_parts, "Exercises", "Questions"),
    (new_here_lists_what_is_defined_only_here, "New here: Other", "Other"),
    (new_here_lists_what_is_defined_only_here, "New here: Other", "New here: Other,\n  shared"),
    (new_here_lists_what_is_defined_only_here, "New here: Other", "New here: Other main"),
    (new_here_lists_what_is_defined_only_here, "def shared", "def own"),
    (new_here_lists_what_is_defined_only_here, "import torch\n", "import torch\nCOLORS = {}\n"),
    (equations_and_lines_belong_together, "# Eq. 2", ""),
    (equations_and_lines_belong_together, "# Eq. 2", "# Eq. 2 and 3"),
    (equations_and_lines_belong_together, "(2)  z", "(1)  z"),
    (equations_and_lines_belong_together, "(2)  z", "     z"),
    (equations_and_lines_belong_together, "return x", "return x  # Eq. 1"),
    (config_fields_have_help_and_one_meaning, "    seed: int = 0     # seed\n", ""),
    (config_fields_have_help_and_one_meaning, "# heads", ""),
    (config_fields_have_help_and_one_meaning, "# heads", "# number of heads"),
    (config_fields_have_help_and_one_meaning, "n_head: int", "n_head: float"),
    (imports_only_what_it_may, "import torch\n", "import torch, mod\n"),
    (imports_only_what_it_may, "import torch\n", "from . import torch\n"),
    (imports_only_what_it_may, "    return again", "    import pandas.io"),
    (imports_only_what_it_may, "import torch\n", "from data import other\n"),
])
def test_a_broken_promise_is_found(promise, old, new, tmp_path):
    scripts = invent(tmp_path, [(old, new)])
    assert promise(scripts[1], scripts) != []


@pytest.mark.parametrize("promise, old, new", [
    (short_enough_for_one_sitting, "    return x", ELIFS),
    (plain_layout, '"train"', "f\"{'train'}\""),
    (plain_layout, '"train"', "'\"'"),
    (equations_and_lines_belong_together, "# width", "# width (Eq. 1)"),
    (imports_only_what_it_may, "import torch\n", "import data.tokenizer\n"),
])
def test_what_is_allowed_is_not_found(promise, old, new, tmp_path):
    scripts = invent(tmp_path, [(old, new)])
    assert promise(scripts[1], scripts) == []


def test_wrong_shape_notes_are_found_and_no_others(tmp_path, monkeypatch):
    right, wrong = invent(tmp_path, changes := [
        ("(B, T + 1, C)", "(B, T, C)"),         # over seq_len
        ("(B, T, C)  Eq", "(T, C)  Eq"),        # number of axes
        ("(B, T, nh, hs)", "(B, nh, T, hs)"),   # among several targets, over several lines
        ("(..., hs / 2)", "(..., hs / 4)"),     # arithmetic
        ("(B, n)", "(n, B)"),                   # in a loop, B from before it
    ])
    assert contradicted_shape_notes(right, tmp_path / "out", monkeypatch) == []
    found = contradicted_shape_notes(wrong, tmp_path / "out", monkeypatch)
    assert len(found) == len(changes)
    for (_, note), problem in zip(changes, found):
        assert note.split("  ")[0] in problem


def test_shape_notes_that_no_run_meets_are_found(tmp_path, monkeypatch):
    _, script = invent(tmp_path, [("range(3)", "range(0)"), ("return again", "return 0")])
    found = contradicted_shape_notes(script, tmp_path / "out", monkeypatch)
    assert len(found) == 1 and "2 of 7 not met" in found[0]


def test_effects_of_an_import_are_found(tmp_path):
    planted = {"mor": ("torch.manual_seed(0)", "random numbers"), "tah": ("print(1)", "output"),
               "adainfer": ("torch.set_default_dtype(torch.float64)", "default dtype"),
               "coconut": ("torch.set_num_threads(torch.get_num_threads() + 1)", "threads"),
               "looped": ("torch.set_grad_enabled(False)", "grad mode"),
               "hrpo": ("import matplotlib.pyplot", "pyplot"),
               "llada": ("open('log', 'w').close()", "files"),
               "remdm": ("torch.set_flush_denormal(True)", "denormals"),
               "softmask": ("torch.set_float32_matmul_precision('high')", "matmul precision")}
    invent(tmp_path)
    for name, (line, _) in planted.items():
        (tmp_path / f"{name}.py").write_text((tmp_path / "mod.py").read_text() + line + "\n")
    found = effects_of_imports(all_scripts(tmp_path), tmp_path / "empty")
    assert found == {"mod.py": []} | {f"{name}.py": [what] for name, (_, what) in planted.items()}


# ---- same_name: the report and the repair


def test_same_name_accepts_equal_copies_and_own_interfaces(tmp_path, capsys):
    invent(tmp_path, [("    cfg = Config()", "    cfg = Config(seq_len=3)"), ("# width", "# own")])
    assert same_name.main([], tmp_path) == 0
    assert "no differences" in capsys.readouterr().out


@pytest.mark.parametrize("old, new", [
    ("# all of it", "# all"),
    ("@torch.no_grad()\ndef shared", "def shared"),
    ("    return x\n", "    return x\n    # more\n    return x\n"),
])
def test_same_name_finds_and_repairs_a_difference(old, new, tmp_path, capsys):
    right, wrong = invent(tmp_path, [(old, new)])
    assert same_name.main([], tmp_path) == 1
    report = capsys.readouterr().out
    assert "shared differs" in report and "mod.py" in report and "mor.py" in report
    assert same_name.main(["--from", "mod.py", "shared"], tmp_path) == 0
    assert wrong.path.read_text() == wrong.text.replace(new, old, 1)
    assert right.path.read_text() == right.text and len(list(tmp_path.iterdir())) == 2


def test_same_name_compares_constants_but_not_the_tables(tmp_path):
    invent(tmp_path)
    for name, constants in [("mod", "COLORS = 1\nSMOKE = 1\n"), ("mor", "COLORS = 2\nSMOKE = 2\n")]:
        with open(tmp_path / f"{name}.py", "a") as file:
            file.write(constants)
    assert ["COLORS" in d for d in same_name.differences(same_name.scripts(tmp_path))] == [True]


def test_same_name_finds_another_signature_in_the_interface(tmp_path):
    invent(tmp_path, [("def loss_fn(model, batch, cfg)", "def loss_fn(model, cfg, batch)")])
    found = same_name.differences(same_name.scripts(tmp_path))
    assert len(found) == 1 and "loss_fn in mor.py" in found[0]


@pytest.mark.parametrize("name", ["Config", "main", "nothing"])
def test_same_name_copies_neither_interface_nor_unknown_names(name, tmp_path):
    _, other = invent(tmp_path, [("    cfg = Config()", "    cfg = Config(seq_len=3)")])
    with pytest.raises(SystemExit) as stop:
        same_name.main(["--from", "mod.py", name], tmp_path)
    assert stop.value.code == 2 and other.path.read_text() == other.text
