"""Oracles of tah.py: what is computed here by hand, by loops or by enumeration must come out."""

import argparse
import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tah
from tests.quick import unpainted

SMALL = dict(n_layer=2, n_head=2, n_embd=16, seq_len=44, batch_size=4, steps=2, device="cpu")
T, Q, V = 44, 9, tah.IDS
SLOTS = list(range(18, 44, 3))
same = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
VISIBLE = pytest.mark.parametrize("visible", ["duo", "iter1", "current"])


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Double precision everywhere, also where the script asks for float32: logits and features."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(seed=0, std=0.3, **changes):
    """A model with random weights everywhere; a fresh one is zero where it matters."""
    torch.manual_seed(seed)
    model = tah.TaH(tah.Config(**SMALL | changes))
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model


def tokens(B=3, n=T, seed=0):
    return torch.randint(V, (B, n), generator=torch.Generator().manual_seed(seed))


def some(B=3, share=0.4, seed=0):
    """A random choice of questions (B, Q), some in every row."""
    go = torch.rand(B, Q, generator=torch.Generator().manual_seed(seed)) < share
    go[:, seed % Q] = True
    return go


def run_on(cfg):
    return argparse.Namespace(device=torch.device("cpu"), bf16=False, rank=0,
                              to_device=lambda batch, shard=False: batch)


# ---- The method by hand: token by token, pass by pass, with explicit sums


def rotated(x, at, model):
    return tah.rotate(tah.norm(x), model.rope[at])


def by_hand(model, idx, go, visible="duo"):
    """Logits of both passes of one sequence (T,); pass 2 of tokens go (T,). Loops over keys."""
    cfg, nh = model.cfg, model.cfg.n_head
    store = [{} for _ in model.blocks]      # (token, pass) -> keys and values (nh, hs)

    def layer(i, x, t, d):
        block, W = model.blocks[i], dict(model.blocks[i].named_parameters())
        if d == 2 and len(model.A):
            for j, name in enumerate(W):
                W[name] = W[name] + 2 * model.B[4 * i + j] @ model.A[4 * i + j]
        qkv = W["attn.qkv.weight"] @ tah.norm(x)
        q, k, v = qkv.view(3, nh, -1)
        q, k = rotated(q, t, model), rotated(k, t, model)
        store[i][t, d] = k, v
        seen = [(s, e) for s, e in store[i] if s <= t and e <= d and (
            d == 1 or e in {"duo": (1, 2), "iter1": (1,), "current": (2,)}[visible])]
        out = []
        for head in range(nh):
            score = torch.stack([q[head] @ store[i][key][0][head] for key in seen])
            weight = (score / math.sqrt(q.size(1))).softmax(0)
            out.append(sum(w * store[i][key][1][head] for w, key in zip(weight, seen)))
        a = W["attn.proj.weight"] @ torch.cat(out)
        hidden = F.relu(W["mlp.fc.weight"] @ tah.norm(x + a)).square()
        return x + a + W["mlp.proj.weight"] @ hidden

    def one_pass(inputs, d):
        xs = dict(inputs)
        for i in range(cfg.n_layer):
            for t in sorted(xs):
                xs[t] = layer(i, xs[t], t, d)
        return {t: model.head.weight @ tah.norm(x) for t, x in xs.items()}

    first = one_pass({t: model.embed.weight[token] for t, token in enumerate(idx)}, 1)
    inputs = {}
    for t in [t for t in first if go[t]]:
        best = sorted(range(V), key=lambda v: -first[t][v])[: cfg.n_soft]
        p = torch.tensor([math.exp((first[t][v] - first[t][best[0]]).item()) for v in best])
        inputs[t] = sum(w * model.embed.weight[v] for w, v in zip(p / p.sum(), best))
    second = one_pass(inputs, 2)
    total = [first[t] + second[t] if t in second else first[t] for t in first]
    return torch.stack(total), torch.stack([first[t] for t in first])


@VISIBLE
@pytest.mark.parametrize("n_soft", [1, 3, 40])
def test_two_passes_by_hand(visible, n_soft):
    model, idx, go = build(visible=visible, n_soft=n_soft), tokens(2), some(2)
    z, first, went = model.passes(idx, lambda x: go, Q)
    for b in range(2):
        assert went[b].nonzero().squeeze(1).tolist() == [SLOTS[q] for q in range(Q) if go[b, q]]
        want = by_hand(model, idx[b], went[b], visible)
        same(z[b], want[0])
        same(first[b], want[1])


def test_always_thinking_by_hand():
    for visible in ("duo", "current"):
        model, idx = build(think="all", visible=visible), tokens(1)
        z, _, went = model.passes(idx, True, T)
        assert went.all()
        same(z[0], by_hand(model, idx[0], went[0], visible)[0])
        same(model(idx, torch.zeros(1)), z)


def mask_of(d, at, ok, visible, T=4):
    """The mask that pass 2 gets, with T tokens in pass 1 before it."""
    cache, everyone = [], torch.arange(T)[None]
    tah.enter(cache, 1, everyone, everyone >= 0, visible)(*torch.zeros(2, 1, 1, T, 2))
    memory = tah.enter(cache, d, torch.tensor([at]), torch.tensor([ok]), visible)
    k, _, mask = memory(*torch.zeros(2, 1, 1, len(at), 2))
    assert k.size(2) == mask.size(-1)
    return ["".join(str(int(bit)) for bit in row) for row in mask[0, 0]]


def test_mask_of_the_example():
    assert mask_of(2, [1, 3], [True, True], "duo") == ["110010", "111111"]
    assert mask_of(2, [1, 3], [True, True], "iter1") == ["1100", "1111"]
    assert mask_of(2, [1, 3], [True, True], "current") == ["10", "11"]
    # padding is seen by nobody but itself
    assert mask_of(2, [0, 1, 3], [False, True, True], "duo") == ["1000100", "1100010", "1111011"]
    assert mask_of(2, [0, 1, 3], [False, True, True], "current") == ["100", "010", "011"]


@VISIBLE
def test_mask_by_enumeration(visible):
    for go in itertools.product([False, True], repeat=5):
        at = [i for i in range(5) if go[i]]
        if at:
            keys = [(j, 1) for j in range(5)] + [(j, 2) for j in at]
            keys = [key for key in keys if key[1] in
                    {"duo": (1, 2), "iter1": (1,), "current": (2,)}[visible]]
            want = ["".join(str(int(j <= i)) for j, _ in keys) for i in at]
            assert mask_of(2, at, [True] * len(at), visible, 5) == want


# ---- What must not change


def test_the_first_pass_is_the_plain_model_whoever_goes_on():
    model, plain, idx = build(), build(think="none"), tokens()
    for name, p in plain.named_parameters():
        p.data = model.get_parameter(name).data
    want = plain.passes(idx)[0]
    for seed in range(3):
        z, first, _ = model.passes(idx, lambda x: some(seed=seed), 4)
        assert torch.equal(first, want) and not torch.equal(z, want)
        nn.init.normal_(model.B[0])
    z, _, went = model.passes(idx, lambda x: some() & False, 4)
    assert torch.equal(z, want) and not went.any()
    assert torch.equal(plain(idx, torch.zeros(3)), want)


def test_lora_changes_only_who_goes_on():
    model, idx, go = build(), tokens(), some()
    before, _, went = model.passes(idx, lambda x: go, Q)
    nn.init.normal_(model.B[1])
    after = model.passes(idx, lambda x: go, Q)[0]
    assert torch.equal(before[~went], after[~went])
    assert (before[went] != after[went]).any(1).all()


@VISIBLE
def test_a_repeated_pass_says_the_same_again(visible, monkeypatch):
    """B = 0 and the same input: every key is there twice, or once, and the softmax is the same."""
    model, idx = build(visible=visible, think="all"), tokens()
    for B in model.B:
        nn.init.zeros_(B)
    monkeypatch.setattr(model, "soften", lambda z: model.embed(idx))
    z, first, _ = model.passes(idx, True, T)
    same(z, 2 * first)


@pytest.mark.parametrize("visible, equal", [("iter1", True), ("duo", False)])
def test_a_repeated_pass_of_some_tokens(visible, equal, monkeypatch):
    model, idx, go = build(visible=visible, std=0.6), tokens(), torch.ones(3, Q, dtype=torch.bool)
    for B in model.B:
        nn.init.zeros_(B)
    monkeypatch.setattr(model, "soften", lambda z: model.embed(idx[:, SLOTS]))
    z, first, went = model.passes(idx, lambda x: go, Q)
    gap = (z - 2 * first)[went].abs().max()
    assert gap < 1e-9 if equal else gap > 1e-3


@pytest.mark.parametrize("room", [3, 5, Q, 20])
def test_gathered_second_pass_is_the_dense_one_and_overflow_stops(room):
    model, idx, go = build(), tokens(), some(share=0.6)
    z, _, went = model.passes(idx, lambda x: go, room)
    kept = go & (go.cumsum(1) <= room)
    assert torch.equal(went[:, SLOTS], kept) and went.sum() == kept.sum()
    same(z, model.passes(idx, lambda x: kept, T)[0])


def arms_at_start(monkeypatch, tmp_path, base, names, **changes):
    """{arm: model at the start of training} and labels; training just turns all signs of logits."""
    found = {}

    def train(arm, model, cfg, run):
        found[arm] = copy.deepcopy(model)
        model.head.weight.data.neg_()
        return [dict(seconds=1)]

    monkeypatch.setattr(tah, "pretrain", lambda cfg, run: base)
    monkeypatch.setattr(tah, "train", train)
    monkeypatch.setattr(tah, "decide_all", lambda model, labels, cfg, run: found.update(
        labels=labels) or {})
    cfg = tah.Config(**SMALL | dict(only=names, out=str(tmp_path), steps=20) | changes)
    results = tah.experiment(cfg, argparse.Namespace(load=False, out=tmp_path, **vars(run_on(cfg))))
    assert list(results) == names.split(",")
    return found


def test_all_arms_start_from_the_base(monkeypatch, tmp_path):
    base, idx = build(seed=7, think="none"), tokens()
    names = "standard_long,standard_wide,always,always_duo,tah,iter1,current"
    found = arms_at_start(monkeypatch, tmp_path, base, names)
    for arm in ("standard", *names.split(",")):     # the long one starts where standard ends
        sign = -1 if arm == "standard_long" else 1
        same(found[arm].passes(idx)[0], sign * base.passes(idx)[0])
    cfgs = {arm: found[arm].cfg for arm in ("standard", *names.split(","))}
    assert {c.steps for c in cfgs.values() if c.think != "none"} == {10}
    assert [arm for arm, c in cfgs.items() if c.visible == "current"] == ["always", "current"]
    assert [arm for arm, c in cfgs.items() if c.think == "all"] == ["always", "always_duo"]
    wide = found["standard_wide"]
    assert wide.blocks[0].mlp.fc.weight.shape == (64 + 78, 16)
    wide.passes(idx)[0].square().sum().backward()
    assert wide.blocks[1].mlp.proj.weight.grad[:, 64:].any()
    assert not any(B.any() for B in found["tah"].B) and all(A.any() for A in found["tah"].A)


def test_arms_of_any_width_start_from_a_base_of_the_usual_one(monkeypatch, tmp_path):
    """Also standard_wide, which has 78 hidden units more whatever --wider says."""
    cfg, idx = tah.Config(**SMALL | dict(wider=79, eval_every=1, smoke=True)), tokens()
    base = tah.pretrain(cfg, run_on(cfg))
    assert base.blocks[0].mlp.fc.weight.shape == (64, 16)
    found = arms_at_start(monkeypatch, tmp_path, base, "standard_wide,tah", wider=79)
    for arm, more in [("standard", 79), ("standard_wide", 78), ("tah", 79)]:
        assert found[arm].blocks[0].mlp.fc.weight.shape == (64 + more, 16)
        same(found[arm].passes(idx)[0], base.passes(idx)[0])


def test_flags_change_tah_and_not_its_controls(monkeypatch, tmp_path):
    names = "always,always_duo,tah,iter1,current"
    found = arms_at_start(monkeypatch, tmp_path, build(think="none"), names, visible="iter1")
    assert [found[arm].cfg.visible for arm in names.split(",")] == [
        "current", "duo", "iter1", "iter1", "current"]


# ---- Causality and gradients


def test_no_gradient_from_later_tokens_or_from_deeper_to_shallower(monkeypatch):
    model, idx, go = build(), tokens(1), some(1, 0.5)
    x = model.embed(idx).detach().requires_grad_()
    soft, embed = [], model.embed
    soften = tah.TaH.soften

    def softened(self, z):
        soft.append(soften(self, z).detach().requires_grad_())
        return soft[-1]

    monkeypatch.setattr(tah.TaH, "soften", softened)
    monkeypatch.setattr(embed, "forward", lambda i: x if i.shape == idx.shape else F.embedding(
        i, embed.weight))
    z, first, went = model.passes(idx, lambda _: go, Q)
    at = went[0].nonzero().squeeze(1).tolist()
    padded = sorted(at + [t for t in range(T) if t not in at][: Q - len(at)])
    for i in (SLOTS[2], SLOTS[5], T - 1):
        grad = torch.autograd.grad(z[0, i].sum(), x, retain_graph=True)[0][0]
        assert not grad[i + 1 :].any() and grad[i].any()
        shallow = torch.autograd.grad(first[0, i].sum(), soft[0], retain_graph=True,
                                      allow_unused=True)[0]
        assert shallow is None
    for i in at:
        grad = torch.autograd.grad(z[0, i].sum(), soft[0], retain_graph=True)[0][0]
        reached = [t for t, g in zip(padded, grad) if g.any()]
        assert reached == [t for t in at if t <= i]


def test_a_later_token_changes_no_earlier_decision_or_logit():
    model, idx = build(), tokens()
    weight = torch.randn(3 * 16 + model.cfg.n_soft)
    policy = lambda x: x @ weight > 0
    z, _, went = model.passes(idx, policy, Q)
    for j in (SLOTS[3], SLOTS[6]):
        other = idx.clone()
        other[:, j] = (other[:, j] + 1) % V
        z2, _, went2 = model.passes(other, policy, Q)
        assert torch.equal(went[:, :j], went2[:, :j])
        same(z[:, :j], z2[:, :j])
        assert not torch.equal(z[:, j:], z2[:, j:])


def test_labels_stand_where_the_first_guess_of_the_reference_is_wrong(monkeypatch, tmp_path):
    found = arms_at_start(monkeypatch, tmp_path, build(seed=7, think="none"), "tah")
    reference, cfg = found["standard"], tah.Config(**SMALL)
    batch = tah.make_batch(cfg, "val", 0)
    guess = reference.passes(batch["idx"])[0].argmin(-1)     # after training, of itself only
    assert found["labels"](batch).tolist() == [
        [bool(guess[b, t] != batch["idx"][b, t + 1]) for t in SLOTS] for b in range(4)]
    other = batch["targets"].clone()
    other[:, 3] = guess[:, SLOTS[3]]        # labels look at the answer
    assert not found["labels"](batch | {"targets": other})[:, 3].any()
    kept, rows = found["tah"].labels, []
    for step in range(found["tah"].cfg.steps):
        batch = tah.make_batch(found["tah"].cfg, "train", step)
        assert torch.equal(kept[batch["row"]], found["labels"](batch))
        rows += batch["row"].tolist()
    assert rows == list(range(len(kept))) and kept.any()


def test_training_iterates_where_the_labels_say():
    model, cfg = build(), tah.Config(**SMALL)
    batch = tah.make_batch(cfg, "train", 1)
    model.labels[batch["row"]] = some(4)
    want = model.passes(batch["idx"], lambda x: some(4), 6)[0]
    same(model(batch["idx"], batch["row"]), want)
    loss, stats = tah.loss_fn(model, batch, cfg)
    nll = [-want[b, SLOTS[q]].log_softmax(0)[batch["targets"][b, q]]
           for b in range(4) for q in range(Q)]
    same(loss, sum(nll) / len(nll))
    assert stats["loss"] == loss


def test_lora_gets_gradients_from_hard_tokens_only():
    model, idx = build(), tokens()
    for B in model.B:
        nn.init.zeros_(B)
    for go, reached in [(some() & False, False), (some(), True)]:
        model.zero_grad()
        z = model.passes(idx, lambda x: go, Q)[0]
        z[:, SLOTS].log_softmax(-1)[..., 3].sum().backward()
        assert not any(A.grad.any() for A in model.A)
        assert all(B.grad.any() == reached for B in model.B)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("keys", [True, False])
def test_three_ways_back_into_the_first_pass(residual, soft, keys, monkeypatch):
    """Sum of logits, soft embedding, keys: the loss of a hard token reaches pass 1 through each."""
    model, idx, go = build(), tokens(1), torch.zeros(1, Q, dtype=torch.bool)
    go[0, 4] = True
    network, soften, enter = tah.TaH.network, tah.TaH.soften, tah.enter
    firsts = []

    def watched(self, x, rope, memory, d):
        if d == 1:
            x = x.detach().requires_grad_()
            states, z = network(self, x, rope, memory, d)
            z.retain_grad()
            firsts.extend([x, z])
            return states, z
        return network(self, x, rope, memory, d)

    def cut(z):
        return z if soft else z.detach()

    def entering(cache, d, at, ok, visible):
        memory = enter(cache, d, at, ok, visible)
        if d == 2 and not keys:
            cache[0][3][:] = [(k.detach(), v.detach()) for k, v in cache[0][3]]
        return memory

    monkeypatch.setattr(tah.TaH, "network", watched)
    monkeypatch.setattr(tah.TaH, "soften", lambda self, z: soften(self, cut(z)))
    monkeypatch.setattr(tah, "enter", entering)
    z = model.passes(idx, lambda x: go, 1)[0]
    x, first = firsts
    logits = z[0, SLOTS[4]] if residual else z[0, SLOTS[4]] - first[0, SLOTS[4]]
    logits.log_softmax(0)[5].backward()
    reaches_z = first.grad is not None and bool(first.grad.abs().max() > 1e-12)
    reaches_x = x.grad is not None and bool(x.grad.abs().max() > 1e-12)
    assert reaches_z == (residual or soft)
    assert reaches_x == (residual or soft or keys)


def test_gradient_of_the_soft_embedding_by_differences():
    model = build(n_soft=5)
    z = torch.randn(1, 2, V, requires_grad=True)
    assert torch.autograd.gradcheck(model.soften, z)


def test_soft_embedding_by_hand():
    model = build(n_soft=2)
    E = model.embed.weight
    z = torch.full((1, 1, V), -5.0)
    z[0, 0, 7], z[0, 0, 9], z[0, 0, 11] = 2.0, 1.0, 0.0
    torch.testing.assert_close(model.soften(z)[0, 0], 0.7311 * E[7] + 0.2689 * E[9], rtol=1e-3,
                               atol=1e-4)
    same(build(n_soft=V).soften(z)[0, 0], z[0, 0].softmax(0) @ E)
    same(model.soften(100 * z)[0, 0], E[7])


# ---- Decoding


@VISIBLE
def test_reading_along_with_a_cache_is_the_parallel_forward(visible):
    model, idx = build(visible=visible), tokens()
    weight, seen = torch.randn(3 * 16 + model.cfg.n_soft), []
    policy = lambda x: seen.append(x @ weight > 0) or seen[-1]
    z = tah.read_along(model, idx, policy)
    by_token, seen[:] = torch.cat(seen, dim=1), []
    same(z, model.passes(idx, policy, Q)[0])
    assert torch.equal(by_token, seen[0]) and 0 < by_token.sum() < by_token.numel()


@VISIBLE
def test_cached_logits_for_a_fixed_choice(visible):
    model, idx, go = build(visible=visible), tokens(), some()
    want = model.passes(idx, lambda x: go, Q)[0]
    for cuts in ([0, 18, T], [0, 20, 21, 30, T], [0, *range(1, T + 1)]):
        cache, found = [], []
        for start, end in itertools.pairwise(cuts):
            asked = [q for q in range(Q) if start <= SLOTS[q] < end]
            z = model.passes(idx[:, start:end], lambda x: go[:, asked], Q, cache)[0]
            found.append(z)
        same(torch.cat(found, dim=1), want)


def test_always_thinking_decodes_too():
    for visible in ("duo", "current"):
        model, idx = build(think="all", visible=visible), tokens()
        same(tah.read_along(model, idx, True), model.passes(idx, True, T)[0])


# ---- The decider


def test_rows_of_other_decisions(monkeypatch):
    """Who goes on is counted from the scores: above c_thr means a score over log(c / (1 - c))."""
    model, cfg = build(n_soft=4), tah.Config(**SMALL | dict(n_soft=4, room=3, eval_batches=5))
    weight, run, scores = torch.randn(52), run_on(cfg), []
    decider = lambda x: 0.3 * (x @ weight)
    labels = lambda batch: (batch["targets"] % 3 == 0) | (batch["kind"] == 2)
    monkeypatch.setattr(tah, "fit_decider", lambda *_: decider)
    monkeypatch.setattr(tah.timeit, "timeit", lambda job, number: 0.0)
    m = tah.decide_all(model, labels, cfg, run)
    batches = [tah.make_batch(cfg, "val", i) for i in range(5)]
    for batch in batches:
        model.passes(batch["idx"], lambda x: scores.append(decider(x)) or some(4), 1)
    scores, marked = torch.cat(scores), torch.cat([labels(batch) for batch in batches])
    above = lambda c: scores > (math.log(c / (1 - c)) if 0 < c < 1 else math.inf * (c - 0.5))
    share = lambda go, room=Q: 100 * go.sum(1).clamp(max=room).double().mean().item() / Q
    want = {f", c_thr = {c}": share(above(c)) for c in (1, 0.95, 0.5, 0)}
    want |= {"": share(above(cfg.c_thr), 3), ", labels (uses the answer)": share(marked)}
    assert {way: row["went_all"] for way, row in m["rows"].items()} == pytest.approx(want)
    assert m["went_all"] == pytest.approx(want[""]) and len(set(want.values())) == 6
    once = tah.examine(model, cfg, run)
    same(m["rows"][", c_thr = 1"]["loss"], once["loss"])
    assert m["loss"] != m["rows"][", c_thr = 0.5"]["loss"]


@pytest.mark.parametrize("visible", ["iter1", "current", "duo"])
def test_time_is_compared_with_the_model_whose_flops_are(visible, monkeypatch):
    """With two passes for all that see both, as the arm always_duo."""
    built, TaH, model = [], tah.TaH, build(visible=visible, think="all")
    monkeypatch.setattr(tah, "TaH", lambda cfg: built.append(cfg) or TaH(cfg))
    monkeypatch.setattr(tah.timeit, "timeit", lambda job, number: 0.0)
    cfg = tah.replace(model.cfg, eval_batches=1)
    tah.decide_all(model, None, cfg, run_on(cfg))
    assert [(c.think, c.visible) for c in built] == [("all", "duo")]


def test_rows_without_a_decider_and_the_passes_of_training(monkeypatch):
    """Two guesses are the best of all passes; hard questions alone go on, whatever labels say."""
    monkeypatch.setattr(tah.timeit, "timeit", lambda job, number: 0.0)
    for think, went in [("none", [0, 0]), ("labels", [0, 100]), ("all", [100, 100])]:
        model = build(std=0.5, think=think)
        cfg = tah.replace(model.cfg, eval_batches=5)
        m = tah.evaluate(model, cfg, run_on(cfg))
        assert [m["went_easy"], m["went_hard"]] == went
        if think != "labels":
            rows = tah.decide_all(model, None, cfg, run_on(cfg))["rows"]
            assert [*rows] == ["", ", two guesses (uses the answer)"]
            hits = torch.cat([(model.passes(batch["idx"], think == "all", T)[0][:, SLOTS].topk(
                2).indices == batch["targets"][..., None]).any(2) for batch in (
                    tah.make_batch(cfg, "val", i) for i in range(5))])
            guesses = rows[", two guesses (uses the answer)"]["all"]
            assert guesses == pytest.approx(100 * hits.double().mean().item())
            assert guesses > rows[""]["all"]


def deciding(hard, x):
    """A decider that learns these labels (n, Q) from features x (n, Q, F), shown 20 times."""
    cfg = tah.Config(**SMALL | dict(n_fit=20 * len(hard), batch_size=len(hard)))
    fake = argparse.Namespace(passes=lambda idx, policy, room: policy(x))
    return tah.fit_decider(fake, lambda batch: hard, cfg, run_on(cfg))


def test_decider_without_information_gives_the_weighted_rate():
    q = torch.arange(90).view(10, 9) < 27
    c = deciding(q, torch.ones(10, Q, 64))(torch.ones(1, 64)).sigmoid()
    p, w = 0.3, 63 / 27
    assert c.item() == pytest.approx(w * p / (w * p + 1 - p), abs=0.03)
    assert 5.4 * p / (5.4 * p + 1 - p) == pytest.approx(0.698, abs=1e-3)
    for c_thr, w, p in [(0.9, 5.4, 0.625), (0.9, 4.8, 0.652)]:     # c > c_thr is p > ...
        assert c_thr / (c_thr + w * (1 - c_thr)) == pytest.approx(p, abs=1e-3)


def test_decider_learns_what_its_features_say():
    x = torch.randn(40, Q, 64)
    score = deciding(x[..., 3] > 1, x)
    assert ((score(x) > 0) == (x[..., 3] > 1)).double().mean() > 0.97


def test_fitting_the_decider_leaves_the_model_alone():
    model, reference, cfg = build(), build(seed=1, think="none"), tah.Config(**SMALL | dict(n_fit=8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score = tah.fit_decider(model, lambda batch: reference.passes(batch["idx"])[0][
        :, SLOTS, 0] > 0, cfg, run_on(cfg))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in [*model.parameters(), *reference.parameters()])
    idx, found = tokens(), []
    for go in (some(), some(seed=1)):      # features do not depend on who went on
        model.passes(idx, lambda x: found.append(x) or go, Q)
    assert torch.equal(*found) and found[0].shape == (3, Q, 64)
    assert torch.equal(score(found[0]), score(found[1]))


def test_the_decider_learns_from_questions_of_its_own(monkeypatch):
    """As many as the flag says, and none of them is trained on or evaluated."""
    cfg, seen, make = tah.Config(**SMALL | dict(n_fit=10)), [], tah.make_batch
    monkeypatch.setattr(tah, "make_batch", lambda c, split, step: seen.append(
        (split, step)) or make(c, split, step))
    tah.fit_decider(build(), lambda batch: batch["kind"] == 2, cfg, run_on(cfg))
    assert seen == [("fit", 0), ("fit", 1), ("fit", 2)]


def test_features_are_three_states_and_the_largest_logits():
    model, idx, found = build(n_soft=4, n_layer=4), tokens(), []
    z = model.passes(idx, lambda x: found.append(x) or some(), 1)[1]
    x, rope = model.embed(idx), model.rope
    half = model.blocks[1](model.blocks[0](x, rope), rope)
    h = tah.norm(model.blocks[3](model.blocks[2](half, rope), rope))
    best = z.sort(dim=-1, descending=True).values[..., :4]
    same(found[0], torch.cat([x, half, h, best], dim=-1)[:, SLOTS])


# ---- Evaluation


def test_metrics_by_hand():
    cases = list(itertools.product([0, 1], repeat=2))       # pass 1 right?, both passes right?
    targets, literal = torch.tensor([[5] * 4]), torch.tensor([[6] * 4])
    z, first = ([[0.0] * 5 + three for three in threes] for threes in (
        [[3.0, 1, 0] if b else [0.0, 1, 3] for _, b in cases],
        [[2.0, 1, 0] if a else [1.0, 2, 0] for a, _ in cases]))
    e = argparse.Namespace(z=torch.tensor([z]), first=torch.tensor([first]), targets=targets,
                           literal=literal, go=torch.ones(1, 4))
    found = {name: of(e)[0].tolist() for name, of in tah.MEANS.items()}
    total = 6 + math.e + math.e**2
    assert found.pop("p_") == pytest.approx([math.e**2 / total] * 2 + [math.e / total] * 2)
    assert found == {
        "": [False, True, False, True], "breaks_": [False, False, True, False],
        "once_": [False, False, True, True], "name_": [True, True, False, False],
        "two_": [False, True, False, True], "went_": [1, 1, 1, 1]}


def test_an_oracle_gains_what_the_second_pass_breaks():
    """Of one run with two passes for all: right with the better pass = right + broken."""
    model, cfg = build(seed=2, std=0.5), tah.Config(**SMALL | dict(eval_batches=20))
    run, both = run_on(cfg), lambda batch, x: batch["kind"] >= 0
    m = tah.examine(model, cfg, run, both, T)
    right = []
    for i in range(20):
        batch = tah.make_batch(cfg, "val", i)
        z, first, _ = model.passes(batch["idx"], functools.partial(both, batch), T)
        right.append((z[:, SLOTS].argmax(-1) == batch["targets"])
                     | (first[:, SLOTS].argmax(-1) == batch["targets"]))
    assert m["all"] + m["breaks_all"] == pytest.approx(100 * torch.cat(right).double().mean().item())
    assert m["once_all"] == pytest.approx(tah.examine(model, cfg, run)["all"])
    assert m["went_all"] == 100 and tah.examine(model, cfg, run)["went_all"] == 0


def test_kinds_are_told_apart_and_counted():
    model, cfg = build(seed=2, std=0.5), tah.Config(**SMALL | dict(eval_batches=20))
    hard = lambda batch, x: batch["kind"] == 2
    m = tah.examine(model, cfg, run_on(cfg), hard, Q)
    assert [m["went_" + kind] for kind in ("direct", "trap", "hard")] == [0, 0, 100]
    assert m["went_all"] == pytest.approx(100 / 9)
    assert m["two_hard"] >= m["hard"]
    assert m["all"] == pytest.approx((7 * m["direct"] + m["trap"] + m["hard"]) / 9)
    assert m["easy"] == pytest.approx((7 * m["direct"] + m["trap"]) / 8)


def test_the_leak_of_a_label():
    """Who knows if the first guess is right saves H_b(p_max) nats, without any computing."""
    p = torch.randn(30, generator=torch.Generator().manual_seed(0)).softmax(0)
    best = p.argmax()
    told = torch.where(torch.arange(30) == best, 1.0, p / (1 - p[best]))    # given right or wrong
    entropy = -(p * p.log()).sum()
    bit = -(p[best] * p[best].log() + (1 - p[best]) * (1 - p[best]).log())
    same(-(p * told.log()).sum(), entropy - bit)


def test_time_saved_is_not_judged_where_no_flops_are_saved(tmp_path):
    """As with --think all, which makes tah cost what always_duo does."""
    cfg, verdicts = tah.Config(**SMALL | dict(out=str(tmp_path))), []
    for mflops in (50, 100):
        arms = {"tah": dict(mflops=mflops, ms_batch=6, ms_always=10, history=[dict(step=1)]),
                "always_duo": dict(mflops=100, history=[dict(step=1)])}
        claim = tah.report(cfg, tah.Run(cfg), arms, [], tah.CLAIMS)["claims"][-1]
        verdicts.append((claim["measured"], claim["verdict"]))
    assert verdicts == [(0.8, "holds"), (None, "not judged")]


def test_guess_in_the_picture_is_one_of_the_values(tmp_path, monkeypatch):
    for seq_len, values in [(44, 3), (86, 7), (110, 10)]:
        cfg = tah.Config(**SMALL | dict(seq_len=seq_len, out=str(tmp_path)))
        batch, figures = tah.make_batch(cfg, "val", 0), []
        n = (seq_len - 14) // 6
        content = batch["idx"][0, 2 : 2 + 3 * n : 3]        # names and values
        assert (content >= tah.NAMES).sum() == values
        monkeypatch.setattr(tah, "Figure", lambda make=Figure, **how: figures.append(
            make(**how)) or figures[0])
        row = dict(direct=99, trap=99, hard=90, went_all=20)
        with unpainted():
            tah.plot(cfg, tah.Run(cfg), dict(arms={"tah": row | dict(rows={"": row})},
                                             environment=dict(device="cpu")))
        assert figures[0].axes[0].lines[-1].get_xdata()[0] == pytest.approx(100 / values)


# ---- Counts


@pytest.mark.parametrize("changes", [
    dict(think="none"), dict(think="none", wider=7), dict(wider=7), dict(),
    dict(think="all", wider=7), dict(visible="iter1", room=3),
    dict(visible="current"), dict(think="all"), dict(think="all", visible="current", rank=0)])
def test_flops_are_what_the_counter_counts(changes):
    model, idx = build(**changes), tokens(2)
    decider = deciding(some(2), torch.randn(2, Q, 64))
    policy = None if model.cfg.think == "none" else lambda x: decider(x) > 0
    K = tah.ROOM[model.cfg.think](model.cfg)
    counter = FlopCounterMode(display=False)        # it does not know the fused kernel of a CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.passes(idx, policy, K)
    size = 24 * 16**2 + 4 * 16 * model.cfg.wider            # of a layer, in FLOPs of a token
    lora = model.cfg.rank * size * 2 * (K > 0)              # merged once a batch, not once a row
    soft = 2 * K * model.cfg.n_soft * 16                    # a sum, which it does not count
    assert counter.get_total_flops() == 2 * (tah.tah_flops(model.cfg) - lora - soft) + lora


def test_the_wider_model_has_as_many_parameters_and_the_longer_one_costs_as_much():
    cfg = tah.Config()
    model, decider = tah.TaH(cfg), deciding(some(2), torch.randn(2, Q, 304))
    lora = sum(p.numel() for p in [*model.A, *model.B])
    mlp = sum(p.numel() for p in decider.parameters())
    wide, plain = tah.TaH(tah.Config(**tah.CHANGES["standard_wide"])), tah.TaH(tah.Config(think="none"))
    size = lambda model: sum(p.numel() for p in model.parameters())
    assert lora == 4 * 16 * 96 * 2 == size(model) - size(plain)
    assert 1 <= size(wide) / (size(model) + mlp) < 1.003
    once, twice = tah.tah_flops(plain.cfg), tah.tah_flops(cfg)
    rows = cfg.steps * cfg.batch_size
    costs = rows / 2 * (3 * twice + once) + 2 * cfg.n_fit * once + 3 * 2 * mlp * 25 * 16 * cfg.n_fit
    assert 1 <= tah.STEPS["standard_long"] * 3 * rows * once / costs < 1.03


def test_lora_of_the_paper():
    """Its table gives 10 and 17 million for rank 16: r (in + out) of all matrices but the head."""
    def lora(C, layers, q, kv, mlp):
        matrices = [(C, q), (C, kv), (C, kv), (q, C), (C, mlp), (C, mlp), (mlp, C)]
        return 16 * layers * sum(a + b for a, b in matrices)

    assert lora(1024, 28, 2048, 1024, 3072) == pytest.approx(10.09e6, rel=1e-3)
    assert lora(2048, 28, 2048, 1024, 6144) == pytest.approx(17.43e6, rel=1e-3)


# ---- The task and the base


@pytest.mark.parametrize("seq_len", [44, 62, 86, 110])
def test_task_by_brute_force(seq_len):
    cfg = tah.Config(seq_len=seq_len, batch_size=40)
    batch, n = tah.make_batch(cfg, "train", 3), (seq_len - 14) // 6
    A, names = 5 * n // 12, set()
    for b in range(40):
        idx = batch["idx"][b].tolist()
        assert len(idx) == seq_len and idx[0] == tah.BEGIN and idx[3 * n + 1] == tah.QUERY
        facts = [idx[1 + 3 * i : 4 + 3 * i] for i in range(n)]
        assert all(end == tah.SEMICOLON for *_, end in facts)
        content = {name: what for name, what, _ in facts}
        alias = [name for name in content if content[name] < 16]
        values = [what for what in content.values() if what >= 16]
        assert len(content) == n and len(alias) == A and len(set(values)) == n - A
        assert max(content) < 16 and all(16 <= v < 32 for v in values)
        order = [name for name, *_ in facts]
        assert all(abs(order.index(a) - order.index(content[a])) > 1 for a in alias)
        assert not any(content[a] in alias for a in alias)
        asked = []
        for q in range(n + 4):
            mark, name, answer = idx[3 * n + 2 + 3 * q :][:3]
            assert range(seq_len)[cfg.slots][q] == 3 * n + 3 + 3 * q
            full = content[content[name]] if name in alias else content[name]
            kind = 0 if name not in alias else 2 if mark == tah.FULLY else 1
            assert mark in (tah.FULLY, tah.LITERALLY) and batch["kind"][b, q] == kind
            assert answer == batch["targets"][b, q] == (full if mark == tah.FULLY else content[name])
            assert batch["literal"][b, q] == content[name]
            asked += [name] if kind else []
        assert sorted(asked) == sorted(alias)
        assert (batch["kind"][b] == 2).sum() == (A + 1) // 2
        names |= set(content)
    assert names == set(range(16)) and batch["row"].tolist() == list(range(120, 160))


def test_answers_of_the_base():
    cfg = tah.Config(batch_size=500)
    for split, share in [("literal", 0), ("mixed", 0.6), ("train", 1), ("fit", 1), ("val", 1)]:
        batch = tah.make_batch(cfg, split, 0)
        deep = batch["targets"] != batch["literal"]
        assert not deep[batch["kind"] < 2].any()
        assert deep[batch["kind"] == 2].double().mean() == pytest.approx(share, abs=0.05)
        assert torch.equal(batch["idx"][:, cfg.slots.start + 1 :: 3], batch["targets"])


def test_splits_and_seeds_have_rows_of_their_own():
    cfg, other = tah.Config(batch_size=8), tah.Config(batch_size=8, seed=2)
    rows = [tuple(row.tolist()) for c in (cfg, other) for split in ("train", "fit", "literal", "mixed")
            for step in range(5) for row in tah.make_batch(c, split, step)["idx"]]
    val = [tuple(row.tolist()) for step in range(5) for row in tah.make_batch(cfg, "val", step)["idx"]]
    assert len(set(rows)) == 320 and len(set(rows + val)) == 360
    assert torch.equal(tah.make_batch(other, "val", 1)["idx"], tah.make_batch(cfg, "val", 1)["idx"])


def test_each_phase_of_the_base_ends_when_it_has_learned(monkeypatch):
    cfg, seen = tah.Config(**SMALL | dict(steps=5, eval_every=2)), []
    good = dict(name_all=96, name_easy=99, p_trap=91, p_hard=49)
    bad = [dict(good, name_all=94)], [dict(good, name_easy=97), dict(good, p_trap=89),
                                      dict(good, p_hard=51)]
    answers = iter([*bad[0], good, *bad[1], good])
    monkeypatch.setattr(tah, "examine", lambda *_: next(answers))
    make = tah.make_batch
    monkeypatch.setattr(tah, "make_batch", lambda c, split, step: seen.append(
        (split, c.seq_len, c.batch_size)) or make(c, split, step))
    tah.pretrain(cfg, run_on(cfg))
    assert seen == [("literal", 44, 8)] * 4 + [("mixed", 44, 4)] * 8
    assert not list(answers)


@pytest.mark.parametrize("eval_every, judged", [(3, [3, 4]), (4, [4]), (25, [4])])
def test_the_base_is_always_judged_after_its_last_step(eval_every, judged, monkeypatch):
    cfg, steps, found = tah.Config(**SMALL | dict(steps=1, eval_every=eval_every)), [], []
    make = tah.make_batch
    monkeypatch.setattr(tah, "make_batch", lambda c, split, step: steps.append(
        step) or make(c, split, step))

    def examine(*_):
        found.append(steps[-1] + 1)
        good = found[-1] == 4
        return dict(name_all=96 * good, name_easy=99 * good, p_trap=91, p_hard=49)

    monkeypatch.setattr(tah, "examine", examine)
    tah.pretrain(cfg, run_on(cfg))
    assert found == judged * 2


def test_a_bad_base_stops_the_run(monkeypatch, capsys):
    cfg = tah.Config(**SMALL | dict(steps=1, eval_every=2))
    bad = dict(name_all=94)
    monkeypatch.setattr(tah, "examine", lambda *_: bad)
    with pytest.raises(SystemExit) as stop:
        tah.pretrain(cfg, run_on(cfg))
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "literal task not learned in 4 steps; raise --steps" in message
