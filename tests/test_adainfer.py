"""Oracles of adainfer.py: what is computed here by hand, loops or enumeration must come out."""

import copy
import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import adainfer

SMALL = dict(n_layer=5, n_head=2, n_embd=16, seq_len=14, batch_size=20, eval_batches=1,
             device="cpu")
same = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Double precision everywhere, also where the script asks for float32: logits and features."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config(**changes):
    return adainfer.Config(**SMALL | changes)


def build(seed=0, **changes):
    """A model with random weights everywhere; a fresh one is zero where it matters."""
    torch.manual_seed(seed)
    model = adainfer.AdaInfer(config(**changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def prompts(split="test", step=0, **changes):
    return adainfer.make_batch(config(**changes), split, step)


def gap(z):
    return z[..., 0]


def middle(model, idx):
    """A threshold of the gap that some rows pass early, some late and some never."""
    scores, _ = layer_by_layer(model, idx)
    return scores[:-1].amax(0).quantile(0.3).item()


def layer_by_layer(model, idx):
    """Gaps and answers (L, B) of all layers, by hand: each from a model cut off behind it."""
    gaps, answers = [], []
    for n in range(1, len(model.blocks) + 1):
        cut = copy.deepcopy(model)
        cut.blocks = cut.blocks[:n]
        p = torch.exp(cut(idx)[:, -1])
        best = (p / p.sum(1, keepdim=True)).sort(1, descending=True)
        gaps.append(best.values[:, 0] - best.values[:, 1])
        answers.append(best.indices[:, 0])
    return torch.stack(gaps).detach(), torch.stack(answers)


def data_of(model, batch):
    """What `read_split` returns, for one batch."""
    gaps, guess = layer_by_layer(model, batch["idx"])
    return batch | {"guess": guess, "right": guess == batch["targets"][:, -1]}


# ---- Prompts


def meaning(row):
    """Task and answers of a prompt {position: token}, read token by token."""
    tag, *body = row
    task, word = (tag - 72) // 4, lambda w: 110 + (5 * (w - 110) + 7) % 18
    if task == 0:
        return task, {13: word(body[-1])}
    if task == 1:
        feelings = [w % 2 for w in body if 104 <= w < 110]
        return task, {13: 102 + (sum(feelings) > len(feelings) / 2)}
    if task in (2, 3):
        after = dict(divmod(edge, 8) for edge in body[:8])
        found = {9 + i: after[node - 64] for i, node in enumerate(body[8:])}
        return task, {at: 64 + (b if task == 2 else (5 * b + 3) % 8) for at, b in found.items()}
    digits = list(itertools.takewhile(lambda d: d >= 0, [w - 92 if 92 <= w < 102 else -1
                                                         for w in reversed(body)]))
    assert 1 <= len(digits) <= 3
    return task, {13 - i: 92 + sum(digits[i:]) % 10 for i in range(len(digits))}


@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_follow_from_the_tokens(split):
    for step in range(10):
        batch = prompts(split, step, batch_size=128)
        for row, targets, task in zip(*(batch[k].tolist() for k in ("idx", "targets", "task"))):
            assert 0 <= min(row) and max(row) < 128
            assert (task, {i: t for i, t in enumerate(targets) if t >= 0}) == meaning(row)


def test_lists_are_one_ring_and_feelings_have_a_margin_of_one_to_eight():
    margins = set()
    for step in range(20):
        for row in prompts(step=step, batch_size=128)["idx"].tolist():
            task = (row[0] - 72) // 4
            if task in (2, 3):
                after, node, ring = dict(divmod(e, 8) for e in row[1:9]), 0, set()
                while node not in ring:
                    ring.add(node)
                    node = after[node]
                assert len(ring) == 8
            if task == 1:
                signs = [1 if w % 2 else -1 for w in row if 104 <= w < 110]
                margins.add(abs(sum(signs)))
    assert margins == set(range(1, 9))


def test_partners_are_a_permutation_of_words_and_of_nodes():
    assert len({(5 * w + 7) % 18 for w in range(18)}) == 18
    assert len({(5 * b + 3) % 8 for b in range(8)}) == 8


def test_no_prompt_is_in_two_splits_and_only_training_depends_on_the_seed():
    found = {}
    for split in adainfer.SPLITS:
        batches = [prompts(split, step, batch_size=128) for step in range(20)]
        assert {int(r.sum()) % 4 for b in batches for r in b["idx"]} == {
            adainfer.SPLITS.index(split)}
        found[split] = {tuple(row) for b in batches for row in b["idx"][:, 1:].tolist()}
        again, other = (prompts(split, 3, batch_size=128, seed=seed)["idx"] for seed in (1, 2))
        assert torch.equal(again, batches[3]["idx"])
        assert torch.equal(other, again) == (split != "train")
    for a, b in itertools.combinations(found, 2):
        assert not found[a] & found[b]


def test_shares_of_the_tasks():
    assert prompts("train", batch_size=128)["task"].bincount().tolist() == [8, 12, 25, 31, 52]
    assert prompts("val", batch_size=100)["task"].bincount().tolist() == [20] * 5
    assert (prompts("train", batch_size=10)["task"].bincount(minlength=5) > 0).all()
    with pytest.raises(ValueError, match="batch_size=9 must be from 10"):
        config(batch_size=9)    # without prompts of mood in training


# ---- Features


def test_features_by_hand(monkeypatch):
    monkeypatch.setattr(adainfer, "norm", lambda x: x)
    model = build()
    model.head = nn.Identity()
    now = torch.tensor([[7.0, 2.0, 1.0], [5.0, 5.0, 5.0], [1.0, 1.0, 8.0]]).log()[:, None]
    before = torch.stack([3 * now[0], -now[1], now[2] + 1])
    guess, z = model.look(now.repeat(1, 2, 1), before.repeat(1, 2, 1))
    a, b = now[2, 0], before[2, 0]
    cos = (a @ b / (a @ a).sqrt() / (b @ b).sqrt()).item()
    same(z, torch.tensor([[0.5, 0.7, 1.0], [0.0, 1 / 3, -1.0], [0.7, 0.8, cos]]))
    assert guess[[0, 2]].tolist() == [0, 2]


def test_features_look_through_the_final_norm_at_the_last_position():
    model, x, before = build(), 3 * torch.randn(4, 14, 16), torch.randn(4, 14, 16)
    guess, z = model.look(x, before)
    h, old = x[:, -1], before[:, -1]
    same(z[:, 2], (h * old).sum(1) / (h.square().sum(1) * old.square().sum(1)).sqrt())
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    p = torch.exp(h @ model.head.weight.T)
    p = (p / p.sum(1, keepdim=True)).sort(1, descending=True)
    same(z[:, :2], torch.stack([p.values[:, 0] - p.values[:, 1], p.values[:, 0]], dim=1))
    assert torch.equal(guess, p.indices[:, 0])
    assert ((0 <= z[:, 0]) & (z[:, 0] <= z[:, 1]) & (z[:, 1] <= 1)).all()


def test_last_layer_reads_what_the_model_says(tmp_path):
    model, cfg = build(), config(out=str(tmp_path))
    data = adainfer.read_split(model, model.blocks, cfg, adainfer.Run(cfg), "val", 2)
    gaps, guess = layer_by_layer(model, data["idx"])
    same(data["z"][..., 0], gaps)
    assert torch.equal(data["guess"], guess)
    assert torch.equal(guess[-1], model(data["idx"])[:, -1].argmax(-1))
    oracle = adainfer.first_stop(guess[:-1] == guess[-1])
    row = adainfer.measure(oracle, data, guess[-1], cfg)
    assert row["agreement"] == 100 and 1 < row["layers"] < 5


@pytest.mark.parametrize("kind, expected", [
    ("agree", [[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1]]),
    ("gold", [[0, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]),
    ("saturated", [[0, 0, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1]])])
def test_labels_by_hand(kind, expected):
    guess = torch.tensor([[5, 1, 3, 8], [7, 2, 3, 8], [5, 2, 6, 8], [5, 2, 6, 8]])
    y = adainfer.LABELS[kind](guess, torch.tensor([7, 9, 3, 4]))[:-1]
    assert y.int().tolist() == expected


# ---- Stopping


def test_tied_head_is_the_embedding():
    assert not torch.equal(build().head.weight, build().embed.weight)
    model, x = build(tied=True), torch.randn(3, 14, 16)
    same(model.look(x, x)[1][:, 1], (adainfer.norm(x[:, -1]) @ model.embed.weight.T).softmax(
        -1).amax(-1))


def test_without_a_rule_or_without_a_stop_it_is_the_whole_model():
    model, idx = build(), prompts()["idx"]
    whole = model(idx)[:, -1].argmax(-1)
    for rule, tau in [(None, 0.0), (gap, math.inf)]:
        answers, exits = model.infer(idx, rule, tau)
        assert torch.equal(answers, whole) and (exits == 5).all()


@pytest.mark.parametrize("at", [1, 2, 4])
def test_always_stopping_after_a_layer_is_the_model_cut_off_there(at):
    model, idx = build(), prompts()["idx"]
    answers, exits = model.infer(idx, lambda z: torch.full(z.shape[:2], float(len(z) == at)), 0.5)
    assert (exits == at).all()
    assert torch.equal(answers, layer_by_layer(model, idx)[1][at - 1])


def test_each_row_stops_where_it_would_alone_and_in_any_order():
    model, idx = build(), prompts()["idx"]
    tau = middle(model, idx)
    answers, exits = model.infer(idx, gap, tau)
    gaps, guess = layer_by_layer(model, idx)
    assert len(exits.unique()) > 2 and 5 in exits
    for b in range(len(idx)):
        stop = next((i for i in range(4) if gaps[i, b] > tau), 4)
        assert (exits[b], answers[b]) == (stop + 1, guess[stop, b])
        alone = model.infer(idx[b : b + 1], gap, tau)
        assert [a.item() for a in alone] == [answers[b].item(), exits[b].item()]
    order = torch.randperm(len(idx))
    for mixed, straight in zip(model.infer(idx[order], gap, tau), (answers, exits)):
        assert torch.equal(mixed, straight[order])


def test_a_rule_sees_the_layers_so_far_of_the_rows_that_are_left():
    model, idx, seen = build(), prompts()["idx"], []
    tau = middle(model, idx)
    gaps, _ = layer_by_layer(model, idx)

    def rule(z):
        seen.append(z[..., 0])
        return gap(z)

    _, exits = model.infer(idx, rule, tau)
    for i, z in enumerate(seen):
        same(z, gaps[: i + 1, exits > i])


def test_blocks_run_on_the_rows_that_are_left_and_not_at_all_when_none_is():
    model, idx, rows = build(), prompts()["idx"], [0] * 5
    tau = middle(model, idx)
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda _, inputs, __, i=i: rows.__setitem__(i, rows[i] + len(inputs[0])))
    _, exits = model.infer(idx, gap, tau)
    assert rows == [(exits > i).sum().item() for i in range(5)]
    rows[:] = [0] * 5
    model.blocks[2].register_forward_hook(lambda *_: pytest.fail("block 3 was called"))
    model.infer(idx, lambda z: torch.full(z.shape[:2], float(len(z) == 2)), 0.5)
    assert rows == [20, 20, 0, 0, 0]


def test_higher_thresholds_never_stop_earlier():
    scores = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    before = torch.ones(200, dtype=torch.long)
    for tau in [-math.inf, *torch.linspace(-3, 3, 30).tolist(), math.inf]:
        exits = adainfer.first_stop(scores > tau)
        expected = [next((i for i in range(4) if s[i] > tau), 4) + 1 for s in scores.T]
        assert exits.tolist() == expected and (exits >= before).all()
        before = exits
    assert (before == 5).all() and (adainfer.first_stop(scores > -math.inf) == 1).all()


# ---- Later tokens


def random_rule(seed, chance=0.35):
    rng = torch.Generator().manual_seed(seed)
    return lambda z: (torch.rand(z.shape[:2], generator=rng) < chance).double()


def all_states(model, idx):
    """h behind every block (L, T, C) of one text."""
    x, states = adainfer.norm(model.embed(idx)), []
    for block in model.blocks:
        x = block(x, model.rope)
        states.append(x[0])
    return torch.stack(states)


@pytest.mark.parametrize("start", [1, 9])
def test_catching_up_is_exact(start):
    model, idx, depths = build(), prompts()["idx"], set()
    for b in range(10):
        outputs, hooks = [[] for _ in model.blocks], []
        for i, block in enumerate(model.blocks):
            hooks.append(block.register_forward_hook(
                lambda _, __, x, i=i: outputs[i].append(x[0])))
        answers, exits = adainfer.decode_early(model, idx[b : b + 1], start, random_rule(b), 0.5)
        for hook in hooks:
            hook.remove()
        states = all_states(model, idx[b : b + 1])
        for i, found in enumerate(outputs):     # each token once, in order, up to the last deep one
            reached = [start + j for j, e in enumerate(exits.tolist()) if e > i]
            assert len(found) == len(reached)   # one call for each token that goes that deep itself
            if reached:
                same(torch.cat(found), states[i, : reached[-1]])
        at = torch.arange(start - 1, 14)
        expected = model.head(adainfer.norm(states[exits - 1, at])).argmax(-1)
        assert torch.equal(answers, expected)
        depths |= set(exits.tolist())
    assert depths == {1, 2, 3, 4, 5}


def test_states_that_are_only_passed_up_are_not_exact():
    """The positive control: the comparison above would see keys and values of a skipped block."""
    model, idx = build(), prompts()["idx"][:1]
    exits, x = torch.arange(14) % 5 + 1, adainfer.norm(model.embed(idx))
    states, worst = all_states(model, idx), 0.0
    for i, block in enumerate(model.blocks):
        x = torch.where((exits > i)[:, None], block(x, model.rope), x)
        worst = max(worst, (x[0] - states[i])[exits > i].abs().max().item())
    assert worst > 0.01


def test_decoding_without_a_rule_is_the_full_forward():
    model, idx = build(), prompts()["idx"][:3]
    for row in idx:
        answers, exits = adainfer.decode_early(model, row[None], 5)
        assert torch.equal(answers, model(row[None])[0, 4:].argmax(-1)) and (exits == 5).all()


# ---- Classifiers


def score_of(u, y, A):
    """The CRF's score of the labels y of one prompt, u of its layers."""
    return sum(u[i] * y[i] for i in range(len(y))) + sum(A[a, b] for a, b in zip(y, y[1:]))


def test_chain_equals_enumeration_and_looks_at_no_later_layer():
    rng = torch.Generator().manual_seed(0)
    u, A = torch.randn(6, 3, generator=rng), torch.randn(2, 2, generator=rng)
    logs = adainfer.chain(u, A)
    for b, n in itertools.product(range(3), range(1, 7)):
        total = [0.0, 0.0]
        for y in itertools.product((0, 1), repeat=n):
            total[y[-1]] += math.exp(score_of(u[:n, b], y, A))
        same(logs[n - 1, b], torch.tensor(total).log())
    later = u.clone()
    later[3:] += 5
    assert torch.equal(adainfer.chain(later, A)[:3], logs[:3])
    y = torch.rand(6, 3, generator=rng) < 0.5
    nll = [logs[-1, b].logsumexp(0) - score_of(u[:, b], y[:, b].int().tolist(), A)
           for b in range(3)]
    same(adainfer.crf_loss(u, y, A), sum(nll) / 3)


def test_without_transitions_a_crf_is_a_logistic_regression_and_scores_are_plain():
    rng = torch.Generator().manual_seed(0)
    u, y = torch.randn(6, 4, generator=rng), torch.rand(6, 4, generator=rng) < 0.5
    same(adainfer.chain(u, torch.zeros(2, 2)).diff()[..., 0], u)
    p = torch.where(y, 1 / (1 + torch.exp(-u)), 1 / (1 + torch.exp(u)))
    same(adainfer.crf_loss(u, y, torch.zeros(2, 2)), -p.log().sum(0).mean())


def weights(rule, n=3):
    """w and b of an SVM, from its scores at zero and at the unit vectors."""
    points = torch.cat([torch.zeros(1, 3), torch.eye(3)])[None]
    b, *rest = rule(points)[0].tolist()
    return torch.tensor(rest)[:n] - b, b


def test_svm_of_two_points_has_the_widest_margin():
    z, y = torch.tensor([[[-1.0, 0, 0], [1.0, 0, 0]]]), torch.tensor([[False, True]])
    w, b = weights(adainfer.fit_classifier(adainfer.svm_loss, z, y, "gap"), 1)
    assert w.item() == pytest.approx(2 / 2.001, abs=1e-6) and abs(b) < 1e-6


@pytest.mark.parametrize("features, columns", [("gap", [0]), ("gap+top", [0, 1]), ("cos", [2]),
                                               ("all", [0, 1, 2])])
def test_svm_is_the_minimum_of_its_loss_with_equal_classes(features, columns):
    rng = torch.Generator().manual_seed(0)
    z = torch.rand(3, 60, 3, generator=rng)
    y = z.sum(-1) + 0.4 * torch.randn(3, 60, generator=rng) > 2.0
    assert 0.05 < y.double().mean() < 0.25
    w, b = weights(adainfer.fit_classifier(adainfer.svm_loss, z, y, features))
    assert not w[[i for i in range(3) if i not in columns]].abs().gt(1e-9).any()
    w, b = w.requires_grad_(), torch.tensor(b, requires_grad=True)
    loss = 0.0005 * w.square().sum()
    for label, t in ((True, 1), (False, -1)):
        points = z[y == label]
        errors = [(1 - t * (w @ p + b)).clamp(min=0) ** 2 for p in points]
        loss = loss + 0.5 * sum(errors) / len(errors)
    loss.backward()
    assert w.grad[columns].abs().max() < 1e-5 and b.grad.abs() < 1e-5
    other, c = weights(adainfer.fit_classifier(adainfer.svm_loss, z, ~y, features))
    torch.testing.assert_close(other, -w.detach(), rtol=0, atol=1e-4)
    assert c == pytest.approx(-b.item(), abs=1e-4)


def test_crf_learns_from_neighbours_and_decides_from_the_layers_so_far():
    rng = torch.Generator().manual_seed(0)
    y = (torch.rand(6, 400, generator=rng) < 0.3).cumsum(0) > 0     # once true, it stays so
    z = (y + torch.randn(6, 400, generator=rng))[..., None].repeat(1, 1, 3)
    crf, svm = (adainfer.fit_classifier(loss, z, y, "gap")
                for loss in (adainfer.crf_loss, adainfer.svm_loss))
    hits = [((rule(z) > 0) == y)[2:].double().mean() for rule in (crf, svm)]
    assert hits[0] > hits[1] + 0.03
    later = z.clone()
    later[4:] += 3
    assert torch.equal(crf(later)[:4], crf(z)[:4]) and not torch.equal(crf(later)[4], crf(z)[4])
    same(svm(later)[5], svm(later[5:])[0])


def test_an_empty_class_does_no_harm():
    z, y = torch.rand(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    for labels, loss in itertools.product((y, ~y), (adainfer.svm_loss, adainfer.crf_loss)):
        assert adainfer.fit_classifier(loss, z, labels, "all")(z).isfinite().all()


def test_shuffled_labels_teach_nothing():
    """Gains over random exits of the same histogram, at tau = 0; true labels are the control."""
    rng, gains = torch.Generator().manual_seed(0), []
    easy = 1 + torch.randint(5, (400,), generator=rng)      # the first layer that is right
    right = torch.arange(1, 6)[:, None] >= easy             # (L, N)
    z = (right + 0.7 * torch.randn(5, 400, generator=rng))[..., None].repeat(1, 1, 3)
    for trial in range(41):
        y = right[:-1] if trial == 0 else right[:-1].flatten()[
            torch.randperm(1600, generator=rng)].view(4, 400)
        rule = adainfer.fit_classifier(adainfer.svm_loss, z[:-1], y, "gap")
        exits = adainfer.first_stop(rule(z[:-1]) > 0)
        luck = exits[torch.randperm(400, generator=rng)]
        hits = [right.gather(0, e[None] - 1).double().mean() for e in (exits, luck)]
        gains.append((hits[0] - hits[1]).item())
    assert gains[0] > 0.1 and sum(gains[1:]) / 40 < 0.3 * gains[0]


# ---- Thresholds


def test_sweep_by_brute_force():
    rng = torch.Generator().manual_seed(0)
    scores, right = torch.rand(4, 50, generator=rng), torch.rand(5, 50, generator=rng) < 0.7
    taus, depth, accuracy = adainfer.sweep(scores, right)
    assert taus[0] == scores.min() and taus[-1] == scores.max() and depth[-1] == 5
    for tau, d, a in list(zip(taus, depth, accuracy))[::40]:
        stops = [next((i for i in range(4) if s[i] > tau), 4) for s in scores.T]
        same(d, torch.tensor(stops).double().mean() + 1)
        same(a, torch.tensor(100 * sum(right[i, b].item() for b, i in enumerate(stops)) / 50))
    same(accuracy[-1], 100 * right[-1].double().mean())


def test_rules_learn_from_one_part_and_thresholds_come_from_the_other():
    model, cfg = build(), config(tolerance=5.2, batch_size=200)
    parts = []
    for split in ("fit", "val"):
        batch = prompts(split, batch_size=200)
        gold = torch.where(torch.arange(200) % 3 > 0, model(batch["idx"])[:, -1].argmax(-1), 127)
        batch["targets"][:, -1] = gold
        parts.append(data_of(model, batch))
        looks, x = [], adainfer.norm(model.embed(batch["idx"]))
        for block in model.blocks:
            before, x = x, block(x, model.rope)
            looks.append(model.look(x, before)[1].detach())
        parts[-1]["z"] = torch.stack(looks)
    fit, val = parts
    rules = adainfer.fit_rules(fit, val, cfg)
    assert rules["svm, tau = 0"] == (rules["svm"][0], 0.0)
    assert rules["gap, tau = 0.8"] == (rules["gap"][0], 0.8)
    for name in ("svm", "crf", "gap"):
        rule, tau = rules[name]
        scores = rule(val["z"][:-1])
        for level in scores.flatten().quantile(torch.linspace(0, 1, 401)).tolist():
            exits = adainfer.first_stop(scores > level)
            lost = val["right"][-1].double().mean() - val["right"].gather(
                0, exits[None] - 1).double().mean()
            if 100 * lost <= 5.2:
                break
        assert tau == pytest.approx(level, abs=1e-12), name
        other = adainfer.fit_rules(fit, fit, cfg)[name][0]
        same(other(val["z"][:-1]), scores)
    same(rules["gap"][0](val["z"]), val["z"][..., 0])


# ---- Numbers


@pytest.mark.parametrize("changes, parts", [
    ({}, (14 * 24 * 256 + 4 * 196 * 16, 2 * 16 * 128)),
    (dict(n_embd=32, seq_len=12), (12 * 24 * 1024 + 4 * 144 * 32, 2 * 32 * 128))])
def test_flops_equal_a_count(changes, parts):
    model, cfg, block, head = build(**changes), config(**changes), *parts
    batch, counted = prompts(**changes), []
    for rule, tau in [(None, 0.0), (gap, middle(model, batch["idx"]))]:
        counter = FlopCounterMode(display=False)    # it does not know the fused kernel of a CPU
        with sdpa_kernel(SDPBackend.MATH), counter:
            _, exits = model.infer(batch["idx"], rule, tau)
        counted.append(counter.get_total_flops())
    assert counted[0] == 20 * (5 * block + head)
    assert counted[1] == exits.sum() * (block + head)
    data = data_of(model, batch)
    row = adainfer.measure(exits, data, data["guess"][-1], cfg, checked=True)
    assert row["flops"] == pytest.approx(counted[1] / counted[0], abs=1e-12)
    T, depth = cfg.seq_len, exits.double().mean().item()
    assert row["llama_flops"] == pytest.approx(depth * (T + 0.648) / (5 * T + 0.648), abs=1e-12)
    fixed = adainfer.measure(torch.full_like(exits, 2), data, data["guess"][-1], cfg)
    assert fixed["flops"] == pytest.approx((2 * block + head) / (5 * block + head), abs=1e-12)


def test_measures_by_brute_force():
    model, batch, cfg = build(), prompts(), config()
    batch["targets"][::2, -1] = model(batch["idx"])[::2, -1].argmax(-1)
    data = data_of(model, batch)
    exits = torch.arange(20) % 5 + 1
    row = adainfer.measure(exits, data, data["guess"][-1], cfg)
    answers = [data["guess"][e - 1, b].item() for b, e in enumerate(exits.tolist())]
    hits = [a == t for a, t in zip(answers, batch["targets"][:, -1].tolist())]
    agree = [a == d for a, d in zip(answers, data["guess"][-1].tolist())]
    expected = {"accuracy": 5 * sum(hits), "agreement": 5 * sum(agree), "layers": 3.0,
                "saved": 40.0, "sd": math.sqrt(20 * 2 / 19)}
    worst = []
    for t, name in enumerate(adainfer.TASKS):
        own = [b for b in range(20) if batch["task"][b] == t]
        expected[name] = sum(exits[b].item() for b in own) / len(own)
        worst.append(100 * sum(hits[b] for b in own) / len(own))
    expected["worst"] = min(worst)
    assert {name: row[name] for name in expected} == {
        name: pytest.approx(value, abs=1e-10) for name, value in expected.items()}


def test_comparison_leaves_the_model_as_it_is_and_its_rows_are_consistent(tmp_path):
    model, cfg = build(), config(out=str(tmp_path))
    before = copy.deepcopy(model.state_dict())
    m = adainfer.compare(model, cfg, adainfer.Run(cfg))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    rows = m["rows"]
    assert next(iter(rows)) == "oracle, sees the answer" and rows["dense"]["saved"] == 0
    assert rows["oracle, sees the answer"]["agreement"] == 100
    assert rows["random exits"]["layers"] == pytest.approx(rows["svm"]["layers"], abs=1e-9)
    assert rows["random exits"]["sd"] == pytest.approx(rows["svm"]["sd"], abs=1e-9)
    assert abs(rows["fixed, as deep"]["layers"] - rows["svm"]["layers"]) < 0.1
    assert [rows[f"fixed {i}"]["layers"] for i in range(1, 5)] == [1, 2, 3, 4]
    for name, row in rows.items():
        assert m[f"over {name}"] == rows["svm"]["accuracy"] - row["accuracy"]
    val = adainfer.read_split(model, model.blocks, cfg, adainfer.Run(cfg), "val", 8)
    for t, name in enumerate(adainfer.TASKS):   # the least depth at which this task loses nothing
        hits = [100 * r[val["task"] == t].double().mean().item() for r in val["right"]]
        enough = next(i for i, hit in enumerate(hits, 1) if hit >= hits[-1] - cfg.tolerance)
        assert rows["fixed, sees the task"][name] == enough


def test_clock_is_the_median_of_turns_and_waits_until_every_answer_is_there(monkeypatch):
    """On a GPU, an answer that nobody reads costs no time; a slow moment must not count."""
    asked = read = 0

    class Answers(torch.Tensor):
        def tolist(self):
            nonlocal read
            read += 1
            return super().tolist()

    def answer(*_):
        nonlocal asked
        asked += 1
        return torch.zeros(2, dtype=torch.long).as_subclass(Answers), None

    monkeypatch.setattr(adainfer, "decode_early", answer)
    seconds = itertools.cycle([8, 4, 10, 5, 400, 200, 4, 6, 2, 3])      # dense, stop, dense, ..
    monkeypatch.setattr(adainfer.timeit, "timeit", lambda job, number: (job(), next(seconds))[1])
    ms = adainfer.clock(SimpleNamespace(infer=answer), torch.zeros(8, 11), None, 0.0)
    assert asked == read == 40 * (2 + 2 * 8)
    assert ms == {f"{way}_{what}": value for way in ("ms", "ms_decode")
                  for what, value in [("dense", 8000), ("stop", 5000), ("ratio", 0.5)]}


def test_no_claim_about_savings_holds_where_nothing_is_saved():
    measure = {claim[0]: claim[1] for claim in adainfer.CLAIMS}["A4 saved time / saved FLOPs"]
    assert all(measure({"adainfer": dict(ms_ratio=ms, flops=flops)}) <= 0
               for ms, flops in [(1.5, 1.2), (0.99, 1.01), (1.1, 0.9)])
    assert measure({"adainfer": dict(ms_ratio=0.7, flops=0.6)}) == pytest.approx(0.75)


@pytest.mark.parametrize("n_layer, smaller", [(2, 2), (3, 2), (4, 3), (6, 4), (8, 6)])
def test_smaller_model_has_three_quarters_of_the_layers(n_layer, smaller, tmp_path, monkeypatch):
    arms = {}
    monkeypatch.setattr(adainfer, "select", lambda found, cfg, run: arms.update(found) or {})
    cfg = config(n_layer=n_layer, out=str(tmp_path))
    adainfer.experiment(cfg, adainfer.Run(cfg))
    assert {arm: c.n_layer for arm, c in arms.items()} == {"adainfer": n_layer, "smaller": smaller}


@pytest.mark.parametrize("smoothing, share", [(True, 0.1), (False, 0.0)])
def test_objective_by_hand(smoothing, share):
    """With smoothing, a tenth of a target is spread over all ids, itself among them."""
    model, batch = build(), prompts()
    loss, stats = adainfer.loss_fn(model, batch, config(smoothing=smoothing))
    logp, means = model(batch["idx"]).log_softmax(-1), []
    for b, targets in enumerate(batch["targets"].tolist()):
        found = [-(1 - share) * logp[b, t, target] - share * logp[b, t].mean()
                 for t, target in enumerate(targets) if target >= 0]
        few = (1, 2, 3) if batch["task"][b] == 4 else (1,)
        assert len(found) in ((5,) if batch["task"][b] in (2, 3) else few)
        means.append(sum(found) / len(found))
    same(loss, sum(means) / 20)
    same(stats["loss"], loss.detach())


def test_clock_times_a_mixture_of_the_tasks(tmp_path, monkeypatch):
    """Rows of a batch stand in the order of their tasks; the first eight alone would be of one."""
    timed = []
    monkeypatch.setattr(adainfer, "clock", lambda model, idx, rule, tau: timed.append(idx) or {})
    cfg = config(out=str(tmp_path), batch_size=100)
    adainfer.compare(build(), cfg, adainfer.Run(cfg))
    tasks = (timed[0][:, 0] - adainfer.TAG) // 4
    assert len(timed[0]) == 1024 and len(tasks[:8].unique()) > 2
    assert (tasks.bincount(minlength=5) > 150).all()
