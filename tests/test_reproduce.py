"""The stored evidence and the README agree."""

import json

import pytest

from tests import overview, reproduce

STORED = sorted(reproduce.RESULTS.glob("*.json"))


def test_readme_shows_the_stored_numbers():
    readme = (reproduce.ROOT / "README.md").read_text()
    assert readme == reproduce.rewrite(readme)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_evidence_is_of_three_seeds_and_has_its_picture(path):
    stored = json.loads(path.read_text())
    assert stored["seeds"] == [1, 2, 3] and path.with_suffix(".png").exists()
    assert all(len(claim["verdicts"]) == 3 for claim in stored["claims"])


def test_every_script_stands_in_the_readme_with_numbers_from_its_evidence():
    readme = (reproduce.ROOT / "README.md").read_text()
    rows = {match[2]: match[0] for match in reproduce.CELLS.finditer(readme)}
    assert list(rows) == sorted(rows, key=lambda name: readme.index(f"| [{name}.py]({name}.py) |"))
    assert set(rows) == {path.stem for path in reproduce.scripts()}
    for path in STORED:
        stored = json.loads(path.read_text())
        (arm, metrics), claim = next(iter(stored["arms"].items())), stored["claims"][0]
        shown = reproduce.cells(path.stem, f"{{{claim['claim']}}} of {{{arm}.params}}"
                                if "params" in metrics else f"{{{claim['claim']}}}")
        parts = [claim["measured"], *([metrics["params"]] if "params" in metrics else [])]
        assert shown.startswith(" of ".join(f"**{m['mean']:.2f} ± {m['sd']:.2f}**" for m in parts))
        assert shown.count(" | ") == 2
    assert reproduce.cells("no_such_script", "C1").startswith("not measured yet")


def test_overview_shows_every_script_with_evidence(tmp_path):
    for path in STORED:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    overview.draw(tmp_path, [path.stem for path in STORED])
    assert {path.stem for path in STORED} <= set(overview.PANELS)
    assert (tmp_path / "overview.png").stat().st_size > 10_000


def test_time_left_adds_up_what_runs_took_before(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    mod, mor = (reproduce.ROOT / name for name in ("mod.py", "mor.py"))
    (tmp_path / "mod.json").write_text(json.dumps(dict(seconds=dict(mean=240))))
    assert reproduce.time_left([(mod, 1), (mod, 2), (mor, 1)]) == "3 runs left, about 12 minutes"
    assert reproduce.time_left([(mor, 1)]) == "1 runs left, about 5 minutes"


def test_fingerprint_sees_what_an_evidence_run_executes_and_nothing_else(tmp_path):
    """Not docstrings and comments, and not the picture or what only a compiled run does."""
    marks = []
    for text in ('"""A."""\nif run.compile:\n    f(1)\nx = 1\ndef plot(a):\n    b(3)\n',
                 '"""B."""\nif run.compile:\n    g(2)\nx = 1  # one\n@c\ndef plot(a):\n    b(4)\n',
                 '"""A."""\nif run.compile:\n    f(1)\nx = 2\ndef plot(a):\n    b(3)\n',
                 '"""A."""\nif run.load:\n    f(1)\nx = 1\ndef plot(a):\n    b(3)\n',
                 '"""A."""\nif run.compile:\n    f(1)\nx = 1\ndef report(a):\n    b(3)\n'):
        (tmp_path / "a.py").write_text(text)
        marks.append(reproduce.fingerprint(tmp_path / "a.py"))
    assert marks[0] == marks[1] and len(set(marks)) == 4


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_docstring_shows_the_stored_claims(path):
    doc = (reproduce.ROOT / f"{path.stem}.py").read_text()
    for claim in json.loads(path.read_text())["claims"]:
        measured, holds = claim["measured"], claim["verdicts"].count("holds")
        assert f"{measured['mean']:.3f} +- {measured['sd']:.3f}" in doc, claim["claim"]
        assert f"needed {claim['needed']}, holds on {holds} of 3" in doc, claim["claim"]


def test_claims_that_need_an_arm_of_full_are_left_out():
    def result(measured):
        claims = [dict(claim="C1", measured=measured, needed=">= 1", verdict="holds"),
                  dict(claim="C2", measured=None, needed=">= 1", verdict="not judged")]
        return dict(arms={"a": dict(loss=measured, history=[])}, claims=claims, seconds=1.0, config={},
                    environment={})

    stored = reproduce.summarise(reproduce.ROOT / "mod.py", [result(1.0), result(2.0), result(6.0)])
    assert [claim["claim"] for claim in stored["claims"]] == ["C1"]
    assert stored["claims"][0]["measured"]["mean"] == stored["arms"]["a"]["loss"]["mean"] == 3.0


def test_docstring_gets_the_numbers_of_its_claims_in_order():
    claims = [dict(needed=">= 0.9", measured=dict(mean=0.95, sd=0.01), verdicts=["holds"] * 3),
              dict(needed="<= -1", measured=dict(mean=-0.5, sd=2), verdicts=["does not hold"] * 3)]
    text = "  A one  0.123 +- 0.456  needed >= 0.9, holds on 1 of 3\n  B  needed <= -1, not measured yet\n"
    filled = ("  A one  0.950 +- 0.010  needed >= 0.9, holds on 3 of 3\n"
              "  B  -0.500 +- 2.000  needed <= -1, holds on 0 of 3\n")
    assert reproduce.fill(text, claims) == filled == reproduce.fill(filled, claims)
    with pytest.raises(ValueError, match="needs"):
        reproduce.fill(text, claims[:1])
