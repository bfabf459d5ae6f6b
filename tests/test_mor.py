"""Oracles of mor.py: what is computed here by hand, by loops or by enumeration must come out."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mor

SMALL = dict(n_layer=2, n_loop=3, n_head=2, n_embd=16, seq_len=24, n_fold=2, device="cpu")
VOCAB = len(mor.ALPHABET)
same = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Double precision everywhere, also where the script asks for float32: scores and logits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float32(float64, monkeypatch):
    monkeypatch.undo()
    torch.set_default_dtype(torch.float32)


def build(seed=4, **changes):
    """A model with random weights everywhere; a fresh one is zero where it matters."""
    torch.manual_seed(seed)
    model = mor.MoR(mor.Config(**SMALL | changes))
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=1.0 if name[:7] in ("router.", "decider") else 0.2)
    return model


def tokens(batch_size, length=SMALL["seq_len"], seed=0):
    return torch.randint(VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def noises(batch_size, scale=1.0, n_loop=3, seed=0):
    rng = torch.Generator().manual_seed(100 + seed)
    return scale * torch.randn(batch_size, n_loop, SMALL["seq_len"], generator=rng)


# ---- The method by hand: one sequence at a time, explicit softmax, rotation by complex numbers


def centred(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def turn(x, at):
    """Rotates (n, nh, hs) by the angles of the positions `at` (n,)."""
    a, b = x.chunk(2, dim=-1)
    freq = 10000.0 ** (-torch.arange(a.size(-1)) / a.size(-1))
    z = torch.complex(a, b) * torch.exp(1j * at[:, None, None] * freq)
    return torch.cat([z.real, z.imag], dim=-1)


def layer_by_hand(block, x, at, past=None):
    """A layer on the tokens x (n, C) at positions `at`; past: other keys, values and positions."""
    q, k, v = (centred(x) @ block.attn.qkv.weight.T).view(len(x), 3, block.attn.n_head, -1).unbind(1)
    q, k = turn(centred(q), at), turn(centred(k), at)
    own = k, v, at
    k, v, where = past or own
    weight = torch.einsum("ihc,jhc->hij", q, k) / math.sqrt(q.size(-1))
    weight = weight.masked_fill(at[:, None] < where, -math.inf).softmax(-1)
    a = torch.einsum("hij,jhc->ihc", weight, v).reshape(x.shape) @ block.attn.proj.weight.T
    hidden = (centred(x + a) @ block.mlp.fc.weight.T).clamp(min=0) ** 2
    return x + a + hidden @ block.mlp.proj.weight.T, own


# Which block is every layer: unrolled by hand for two shared blocks and three passes.
MAPS = {"cycle": (2, [], [[0, 1]] * 3, []), "sequence": (2, [], [[0, 0], [0, 1], [1, 1]], []),
        "middle_cycle": (4, [0], [[1, 2]] * 3, [3]),
        "middle_sequence": (4, [0], [[1, 1], [1, 2], [2, 2]], [3])}


def model_by_hand(model, idx, training, noise):
    """Logits, z and keep of one sequence idx (T,); noise (R, T)."""
    cfg, T = model.cfg, len(idx)
    _, front, passes, behind = MAPS[cfg.sharing]
    x, every = centred(model.embed.weight[idx]), torch.arange(T)
    for i in front:
        x, _ = layer_by_hand(model.blocks[i], x, every)
    candidates, first, zs, keeps = list(range(T)), {}, [], []
    for r, layers in enumerate(passes, 1):
        z = x @ model.router.weight[r - 1] / math.sqrt(cfg.n_embd)
        if cfg.router == "gate":
            best = candidates
        elif training or cfg.router == "random":
            k, rank = (3 - r + 1) * T // 3, noise[r - 1] if cfg.router == "random" else z
            best = sorted(candidates, key=lambda t: -rank[t].item())[:k]
        else:
            best = [t for t in candidates if r == 1 or z[t] > 0]
        candidates = sorted(best)
        at = torch.tensor(candidates, dtype=torch.long)
        y, g = x[at], torch.sigmoid(z[at])[:, None]
        for j, i in enumerate(layers):
            past = first.get(j) if cfg.kv == "share" else None
            y, own = layer_by_hand(model.blocks[i], y, at, past)
            first.setdefault(j, own)
        new = (1 - g) * x[at] + g * y if cfg.update == "delta" else x[at] + 0.1 * g * y
        x = x.index_copy(0, at, new)
        zs.append(z)
        keeps.append(torch.zeros(T).index_fill(0, at, 1) > 0)
    for i in behind:
        x, _ = layer_by_hand(model.blocks[i], x, every)
    return centred(x) @ model.head.weight.T, torch.stack(zs), torch.stack(keeps)


VARIANTS = [dict(), dict(update="paper"), dict(kv="share"), dict(kv="share", update="paper"),
            *(dict(sharing=name, n_layer=MAPS[name][0]) for name in MAPS if name != "cycle"),
            dict(sharing="middle_cycle", n_layer=4, kv="share"), dict(router="random"),
            dict(router="random", update="paper"), dict(router="gate"),
            dict(router="gate", aux="router"), dict(router="random", aux="router")]
variants = pytest.mark.parametrize("changes", VARIANTS, ids=str)


@variants
@pytest.mark.parametrize("training", [True, False])
def test_model_equals_the_one_by_hand(changes, training):
    model, idx, noise = build(**changes).train(training), tokens(3), noises(3)
    logits, z, q, keep = model(idx, noise)
    assert q is not None and torch.equal(z, q)
    for b in range(3):
        by_hand = model_by_hand(model, idx[b], training, noise[b])
        for found, right in zip((logits[b], z[:, b], keep[:, b].double()), by_hand):
            same(found, right.double())
    if not training:
        assert 0 < keep[-1].double().mean() <= keep[1].double().mean() <= 1
        assert keep.all() == (model.cfg.router == "gate")


def test_passed_tokens_keep_their_original_positions():
    model = build()
    x, A = torch.randn(1, 24, 16), torch.tensor([[3, 7, 9]])
    keep = torch.zeros(1, 24, dtype=torch.bool).scatter(1, A, True)
    y = model.visit(2, x, 0, None, {}, keep, 3)
    for positions, equal in [((3, 7, 9), True), ((0, 1, 2), False)]:
        h = x[0, A[0]]
        for i in (0, 1):
            h, _ = layer_by_hand(model.blocks[i], h, torch.tensor(positions))
        assert torch.allclose(y[0, A[0]], h, atol=1e-10) == equal


def test_gathered_tokens_equal_all_tokens_under_a_mask_with_their_gradients():
    model, x = build(), torch.randn(2, 24, 16)
    A = torch.stack([torch.randperm(24)[:9].sort().values for _ in range(2)])
    keep = torch.zeros(2, 24, dtype=torch.bool).scatter(1, A, True)
    mask, found = (keep[:, None] | torch.eye(24, dtype=torch.bool)).tril()[:, None], []

    def masked(x):
        for block in model.blocks:
            x = block(x, model.rope[:24], lambda k, v: (k, v, mask))
        return x

    for path in (masked, *(lambda x, k=k: model.visit(2, x, 0, None, {}, keep, k) for k in (9, 24))):
        leaf = x.clone().requires_grad_()
        y = path(leaf)[keep]
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *model.blocks.parameters()])])
    for right, few, every in zip(*found):
        same(few, right)
        same(every, right)


@pytest.mark.parametrize("kv", ["cache", "share"])
def test_what_other_tokens_become_does_not_reach_those_in_a_pass(kv):
    model, x = build(kv=kv), torch.randn(1, 24, 16)
    A, first = torch.tensor([[2, 5, 11, 20]]), {}
    model.visit(1, x, 0, None, first)
    keep = torch.zeros(1, 24, dtype=torch.bool).scatter(1, A, True)
    changed = torch.where(keep[..., None], x, torch.randn(1, 24, 16))
    for k in (4, 24):
        same(*(model.visit(2, h, 0, None, dict(first), keep, k)[keep] for h in (x, changed)))


@pytest.mark.parametrize("kv", ["cache", "share"])
@pytest.mark.parametrize("training", [True, False])
def test_token_choice_equals_the_one_by_hand(kv, training):
    model, ids = build(router="token", kv=kv).train(training), tokens(3)
    logits, z, q, keep = model(ids, noises(3))
    seen = set()
    for b in range(3):
        h = x = centred(model.embed.weight[ids[b]])
        p = torch.softmax(h @ model.router.weight.T, dim=-1)
        depth, first = [int(row.argmax()) + 1 for row in p], {}
        for r in (1, 2, 3):
            at = torch.tensor([t for t in range(24) if depth[t] >= r], dtype=torch.long)
            y = x[at]
            for j in (0, 1):
                y, own = layer_by_hand(model.blocks[j], y, at, first.get(j) if kv == "share" else None)
                first.setdefault(j, own)
            last = [i for i, t in enumerate(at.tolist()) if depth[t] == r]
            y = y.index_copy(0, torch.tensor(last, dtype=torch.long),
                             (h[at] + p[at, r - 1, None] * y)[last])
            x = x.index_copy(0, at, y)
            assert keep[r - 1, b].nonzero().flatten().tolist() == at.tolist()
            same(z[r - 1, b], p[:, r - 1])
        same(logits[b], centred(x) @ model.head.weight.T)
        seen |= set(depth)
    assert seen == {1, 2, 3}


def test_balancing_loss_at_simple_probabilities():
    """1 if all depths are equally likely and equally frequent, R if all tokens take one for sure."""
    cfg = mor.Config(**SMALL | dict(router="token"))
    batch = mor.make_batch(cfg, "train", 0)
    keep, plain = torch.ones(3, 32, 24, dtype=torch.bool), math.log(VOCAB)
    tie = 1e-12 * F.one_hot(torch.arange(24) % 3, 3).T[:, None]
    for p, balance in [(1 / 3 + tie.expand(3, 32, 24), 1.0),
                       (torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 32, 24), 3.0)]:
        p = p.clone().requires_grad_()
        model = lambda idx, noise: (torch.zeros(8, 24, VOCAB), p, p, keep)
        loss, _ = mor.loss_fn(model, batch, cfg)
        same(loss, torch.tensor(plain + 0.1 * balance))
        frequent = 3.0 * (p == p.max(0).values).double().mean((1, 2))
        same(torch.autograd.grad(loss, p)[0], 0.1 * frequent[:, None, None].expand_as(p) / (32 * 24))


# ---- Budgets and sharing


@pytest.mark.parametrize("n_loop, T", [(1, 24), (2, 24), (3, 24), (3, 64), (4, 50), (5, 128)])
@pytest.mark.parametrize("router", ["expert", "random"])
def test_a_pass_takes_its_share_of_those_in_the_pass_before(n_loop, T, router):
    model = build(n_loop=n_loop, seq_len=T, router=router, n_layer=1).train()
    _, _, _, keep = model(tokens(2, T), torch.randn(2, n_loop, T))
    for r in range(1, n_loop + 1):
        assert (keep[r - 1].sum(1) == (n_loop - r + 1) * T // n_loop).all()
    assert keep[0].all() and not (keep[1:] & ~keep[:-1]).any()


@pytest.mark.parametrize("sharing", MAPS)
def test_shared_weights_are_one_and_their_gradient_is_the_sum_over_copies(sharing):
    n, front, passes, behind = MAPS[sharing]
    order = [*front, *itertools.chain(*passes), *behind]
    tied = build(sharing=sharing, n_layer=n, router="none")
    free = build(n_layer=len(order), n_loop=1, router="none")
    free.embed, free.head = tied.embed, tied.head
    for block, i in zip(free.blocks, order):
        block.load_state_dict(tied.blocks[i].state_dict())
    losses = [model(tokens(2))[0].square().mean() for model in (tied, free)]
    same(*losses)
    grads = [torch.autograd.grad(loss, list(model.blocks.parameters()))
             for loss, model in zip(losses, (tied, free))]
    per_block = len(grads[0]) // n
    for p in range(len(grads[0])):
        copies = [grads[1][l * per_block + p % per_block] for l, i in enumerate(order)
                  if i == p // per_block]
        same(grads[0][p], sum(copies))


def test_passes_add_no_parameters_but_their_routers():
    count = lambda **changes: sum(p.numel() for p in build(**changes).parameters())
    plain = 2 * 12 * 16**2 + 2 * VOCAB * 16
    assert count(router="none") == count(router="none", n_loop=7) == plain
    assert count() == count(router="random") == count(router="gate") == plain + 3 * 16
    assert count(aux="router") == plain + 2 * 3 * 16


def test_switched_off_it_is_a_plain_transformer_that_draws_the_same_weights():
    cfg = mor.Config(**SMALL | dict(n_loop=1, router="none"))
    torch.manual_seed(0)
    embed, blocks = nn.Embedding(VOCAB, 16), [mor.Block(cfg) for _ in range(2)]
    head, state, idx = nn.Linear(16, VOCAB, bias=False), torch.get_rng_state(), tokens(2)
    torch.manual_seed(0)
    model = mor.MoR(cfg)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    routed = mor.MoR(mor.Config(**SMALL))
    assert torch.equal(model.embed.weight, embed.weight)
    for p, q, r in zip(nn.ModuleList(blocks).parameters(), model.blocks.parameters(),
                       routed.blocks.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    embed.load_state_dict(model.embed.state_dict())
    head.load_state_dict(model.head.state_dict())
    x = mor.norm(embed(idx))
    for block, trained in zip(blocks, model.blocks):
        block.load_state_dict(trained.state_dict())
        x = block(x, mor.rope_table(24, 8))
    for training in (True, False):
        assert torch.equal(model.train(training)(idx)[0], head(mor.norm(x)))


def test_an_open_gate_that_all_tokens_pass_is_plain_recursion(monkeypatch):
    model, plain, idx = build().eval(), build(router="none").eval(), tokens(3)
    plain.load_state_dict(model.state_dict(), strict=False)
    fixed = torch.full((2, 3, 24), 50.0)        # a sigmoid of 1, and above 0
    monkeypatch.setattr(model, "scores", lambda r, x, h: fixed)
    same(model(idx)[0], plain(idx)[0])
    assert model(idx)[3].all()


def test_a_closed_gate_leaves_the_stream_as_it_was(monkeypatch):
    model, idx = build().train(), tokens(3)
    monkeypatch.setattr(model, "scores", lambda *_: torch.full((2, 3, 24), -2000.0))
    assert torch.equal(model(idx, noises(3))[0], model.head(mor.norm(mor.norm(model.embed(idx)))))


# ---- Scores, gradients of the routers


@pytest.mark.parametrize("aux", ["loss", "router"])
def test_scores_by_hand(aux):
    model, x = build(aux=aux), torch.randn(2, 24, 16)
    for r in (1, 2, 3):
        z, q = model.scores(r, x, None)
        same(z, (x * model.router.weight[r - 1]).sum(-1) / 4)
        side = model.router if aux == "loss" else model.decider
        same(q, (x * side.weight[r - 1]).sum(-1) / 4)


def test_scores_stay_float32_under_bfloat16(float32):
    model, x = build(), torch.randn(2, 24, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].mlp(x).dtype == torch.bfloat16
        low, _ = model.scores(1, x, None)
    assert low.dtype == torch.float32 and torch.equal(low, model.scores(1, x, None)[0])


@pytest.mark.parametrize("training", [True, False])
def test_noise_ranks_for_the_router_random_alone(training):
    idx, two = tokens(3), (noises(3), noises(3, seed=1))
    for router, same_tokens in [("expert", True), ("random", False)]:
        model = build(router=router).train(training)
        assert torch.equal(*(model(idx, noise)[3] for noise in two)) == same_tokens


@pytest.mark.parametrize("training", [True, False])
def test_router_random_follows_the_noise_of_each_pass(training):
    noise = noises(3)
    keep = build(router="random").train(training)(tokens(3), noise)[3]
    for b in range(3):
        candidates = range(24)
        for r, k in enumerate((24, 16, 8)):
            candidates = sorted(candidates, key=lambda t: -noise[b, r, t].item())[:k]
            assert keep[r, b].nonzero().squeeze(1).tolist() == sorted(candidates)


@pytest.mark.parametrize("update", ["delta", "paper"])
def test_gradient_of_a_score_has_the_closed_form(update, monkeypatch):
    model, idx, noise = build(update=update).train(), tokens(2), noises(2)
    zs = [z.detach().requires_grad_() for z in model(idx, noise)[1]]
    visit, streams, ys = model.visit, [], []

    def recording(s, x, *rest):
        x.retain_grad()
        streams.append(x)
        ys.append(visit(s, x, *rest))
        return ys[-1]

    monkeypatch.setattr(model, "scores", lambda r, x, h: (zs[r - 1], zs[r - 1]))
    monkeypatch.setattr(model, "visit", recording)
    logits, _, _, keep = model(idx, noise)
    F.cross_entropy(logits.flatten(0, 1), tokens(2, seed=1).flatten()).backward()
    for r in (1, 2, 3):
        s = torch.sigmoid(zs[r - 1].detach())
        moved = ys[r] - streams[r] if update == "delta" else 0.1 * ys[r]
        slope = s * (1 - s) * (streams[r + 1].grad * moved).sum(-1)
        same(zs[r - 1].grad, torch.where(keep[r - 1], slope.detach(), 0))
        assert zs[r - 1].grad[keep[r - 1]].abs().min() > 0


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found)}


def some_batch(cfg, **changes):
    """A batch from behind the warm-up."""
    return mor.make_batch(cfg, "train", round(0.5 * cfg.steps)) | changes


def test_auxiliary_router_learns_alone():
    model = build(aux="router").train()
    batch = some_batch(model.cfg)
    loss, _ = mor.loss_fn(model, batch, model.cfg)
    logits = model(batch["idx"], batch["noise"])[0]
    rows = [F.cross_entropy(a, b) for a, b in zip(logits, batch["targets"])]
    with_side, without = gradients(model, loss), gradients(model, sum(rows) / len(rows))
    assert without.pop("decider.weight") is None
    assert with_side.pop("decider.weight").abs().sum(1).min() > 0
    for name in without:
        same(with_side[name], without[name])


@pytest.mark.parametrize("routed", [True, False])
def test_auxiliary_loss_reaches_the_stream_and_only_behind_the_warm_up(routed):
    model = build(aux="loss").train()
    batch = mor.make_batch(model.cfg, "train", routed * (model.cfg.steps - 1))
    assert ("noise" in batch) == routed
    grads = [gradients(model, mor.loss_fn(model, batch, mor.replace(model.cfg, aux_weight=weight))[0])
             for weight in (0.0, 1.0)]
    for name in ("router.weight", "embed.weight", "blocks.0.attn.qkv.weight"):
        assert ((grads[0][name] - grads[1][name]).abs().max() > 1e-6) == routed


def test_training_the_auxiliary_router_leaves_all_other_weights_bit_identical(monkeypatch, tmp_path):
    """Also while gradients are clipped: a norm over all parameters would couple them."""
    loss_fn, weights = mor.loss_fn, []

    def cross_entropy_only(model, batch, cfg):
        loss, stats = loss_fn(model, batch, mor.replace(cfg, aux="none"))
        return loss + 0 * model.decider.weight.sum(), stats

    fast = dict(steps=4, warmup=1, eval_every=4, eval_batches=1, batch_size=2, grad_clip=1e-3)
    for name, function in [("on", loss_fn), ("off", cross_entropy_only)]:
        monkeypatch.setattr(mor, "loss_fn", function)
        cfg = mor.Config(**SMALL | fast, aux="router", out=str(tmp_path / name))
        torch.manual_seed(0)
        model = mor.MoR(cfg)
        before = model.decider.weight.clone()
        mor.train("mor", model, cfg, mor.Run(cfg))
        weights.append(model.state_dict())
        assert not torch.equal(before, model.decider.weight) or name == "off"
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]) == (name != "decider.weight")


# ---- Objective


@pytest.mark.parametrize("aux, routed, weight", [("loss", True, 0.3), ("loss", False, 0.0),
                                                 ("router", False, 1.0), ("router", True, 1.0),
                                                 ("none", True, 0.0)])
def test_objective_by_hand(aux, routed, weight):
    cfg = mor.Config(**SMALL | dict(aux=aux, aux_weight=0.3, z_weight=0.2))
    batch = mor.make_batch(mor.replace(cfg, batch_size=3), "train", 0)
    assert "noise" not in batch
    batch |= {"noise": noises(3)} if routed else {}
    logits, z, q = torch.randn(3, 24, VOCAB), torch.randn(3, 3, 24), torch.randn(3, 3, 24)
    keep = build().train()(tokens(3), noises(3))[3]
    loss, stats = mor.loss_fn(lambda idx, noise: (logits, z, q, keep), batch, cfg)
    expected = 0
    for b in range(3):
        scored = [t for t in range(24) if batch["targets"][b, t] >= 0]
        nll = [-logits[b, t].log_softmax(-1)[batch["targets"][b, t]] for t in scored]
        expected += sum(nll) / len(nll) / 3
    same(stats["loss"], expected)
    for r in range(3):
        candidates = [(b, t) for b in range(3) for t in range(24) if r == 0 or keep[r - 1, b, t]]
        assert len(candidates) == 3 * [24, 24, 16][r]
        p = {at: torch.sigmoid(q[r][at]) for at in candidates}
        bce = [-torch.log(p[at] if keep[r][at] else 1 - p[at]) for at in candidates]
        expected += weight * sum(bce) / len(bce)
        expected += 0.2 * sum(z[r][at] ** 2 for at in candidates) / len(candidates)
    same(loss, expected)


def test_objective_at_simple_scores():
    """All scores zero: ln 2 for every pass. All 3: a z-loss of 9 for every pass."""
    cfg = mor.Config(**SMALL | dict(aux_weight=1.0, z_weight=1.0))
    batch = mor.make_batch(cfg, "train", cfg.steps)
    keep = build().train()(batch["idx"], batch["noise"])[3]
    assert [kept.double().mean().item() for kept in keep] == [1, 16 / 24, 8 / 24]
    for z, q, more in [(0.0, 0.0, 3 * math.log(2)), (3.0, 0.0, 3 * math.log(2) + 27)]:
        scores = [torch.full(keep.shape, value) for value in (z, q)]
        model = lambda idx, noise: (torch.zeros(8, 24, VOCAB), *scores, keep)
        same(mor.loss_fn(model, batch, cfg)[0], torch.tensor(math.log(VOCAB) + more))


# ---- Causality


def change_the_end(idx):
    step = torch.randint(1, VOCAB, (len(idx), 4), generator=torch.Generator().manual_seed(1))
    return torch.cat([idx[:, :-4], (idx[:, -4:] + step) % VOCAB], dim=1)


def test_top_k_leaks_the_future():
    """The positive control of the next test: it sees a leak where there is one."""
    model, idx = build().train(), tokens(100)
    a, b = (model(ids, 0 * noises(100))[0] for ids in (idx, change_the_end(idx)))
    assert (a[:, :-4] != b[:, :-4]).flatten(1).any(1).double().mean() > 0.3


@pytest.mark.parametrize("training, changes", [
    (False, {}), (False, dict(aux="router")), (False, dict(update="paper")),
    (False, dict(kv="share")), (False, dict(sharing="middle_cycle", n_layer=3)),
    (False, dict(router="random")), (False, dict(router="token")), (True, dict(router="token")),
    (True, dict(router="random")), (True, dict(router="gate")), (True, dict(router="none"))])
def test_all_other_rules_do_not_leak_the_future(training, changes):
    model, idx, noise = build(**changes).train(training), tokens(100), noises(100)
    a, b = (model(ids, noise)[0] for ids in (idx, change_the_end(idx)))
    torch.testing.assert_close(a[:, :-4], b[:, :-4], rtol=0, atol=1e-12)
    assert (a[:, -4:] != b[:, -4:]).any(-1).all()


@pytest.mark.parametrize("training", [True, False])
def test_a_row_does_not_depend_on_the_others(training):
    model, idx, noise = build().train(training), tokens(5), noises(5)
    together = model(idx, noise)
    for b in range(5):
        alone = model(idx[b : b + 1], noise[b : b + 1])
        same(alone[0][0], together[0][b])
        assert torch.equal(alone[3][:, 0], together[3][:, b])


# ---- Decoding


PIECES = pytest.mark.parametrize("sizes", [[24], [1] * 24, [5, 1, 7, 1, 1, 9]], ids=str)
DECODED = [{}, dict(kv="share"), dict(aux="router"), dict(router="none"), dict(router="token"),
           dict(router="gate"),
           dict(sharing="middle_sequence", n_layer=4), dict(kv="share", sharing="middle_cycle",
                                                           n_layer=3, update="paper")]


@PIECES
@pytest.mark.parametrize("changes", DECODED, ids=str)
def test_cached_decoding_equals_the_full_forward(changes, sizes):
    model, idx = build(**changes).eval(), tokens(4)
    whole = model(idx)
    keep = whole[3]
    if model.cfg.router == "expert":
        assert 0.1 < keep[1:].double().mean() < 0.9 and keep.sum(2).unique().numel() > 4
    caches = [[mor.KVCache(4, model.cfg, "cpu") for _ in s] for s in model.stages]
    start, results = 0, []
    for n in sizes:
        results.append(model(idx[:, start : start + n], None, start, caches))
        start += n
    same(torch.cat([part[0] for part in results], dim=1), whole[0])
    for found, right in zip(zip(*(part[1:] for part in results)), whole[1:]):
        same(torch.cat(found, dim=2).double(), right.double())
    for s, stage in enumerate(caches):      # a token that skips a pass leaves nothing there
        expected = keep[s - 1].sum(1) if 0 < s <= 3 else torch.full((4,), 24)
        expected = 0 * expected if model.cfg.kv == "share" and 1 < s <= 3 else expected
        assert all(torch.equal(cache.count, expected) for cache in stage)


@pytest.mark.parametrize("changes", DECODED, ids=str)
def test_symbol_by_symbol_no_token_meets_a_block_that_it_does_not_pass(changes):
    model, idx, met = build(**changes).eval(), tokens(3), []
    full, _, _, keep = model(idx)
    model.train()       # as training leaves it
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, y: met.append(y.size(0) * y.size(1)))
    same(mor.decode_all(model, idx), full)
    front, *passes, behind = map(len, model.stages)
    active = sum(n * kept.sum().item() for n, kept in zip(passes, keep))
    assert sum(met) == active + (front + behind) * idx.numel()


# ---- Random routing


def test_random_routing_takes_all_tokens_equally_often_and_does_not_look_at_them():
    model, n = build(router="random", n_layer=1), 2000
    noise, bound = torch.randn(n, 3, 24), 4 * math.sqrt(0.25 / n)
    keeps = [model.train(training)(tokens(n, seed=seed), noise)[3]
             for seed, training in [(0, True), (1, True), (1, False)]]
    assert torch.equal(keeps[0], keeps[1]) and torch.equal(keeps[0], keeps[2])
    for kept, share in zip(keeps[0], (1, 2 / 3, 1 / 3)):
        assert ((kept.double().mean(0) - share).abs() <= bound).all()


# ---- FLOPs


@pytest.mark.parametrize("changes, per_token", [
    # a layer on k of 48 tokens: 24 k C^2 + 4 k^2 C over 48; head 2 C V; routers 2 C R
    (dict(router="none"), 3 * (24 * 32**2 + 4 * 48 * 32) + 2 * 32 * 15),
    (dict(router="none", n_loop=1), (24 * 32**2 + 4 * 48 * 32) + 2 * 32 * 15),
    (dict(router="gate"), 3 * (24 * 32**2 + 4 * 48 * 32) + 2 * 32 * (15 + 3)),
    (dict(aux="router"), (48 + 32 + 16) * 24 * 32**2 / 48 + (48**2 + 32**2 + 16**2) * 4 * 32 / 48
     + 2 * 32 * (15 + 3 + 3)),
    ({}, (48 + 32 + 16) * 24 * 32**2 / 48 + (48**2 + 32**2 + 16**2) * 4 * 32 / 48
     + 2 * 32 * (15 + 3)),
    (dict(kv="share"), (48 + 32 + 16) * (24 * 32**2 + 4 * 48 * 32) / 48 + 2 * 32 * (15 + 3)),
    (dict(sharing="middle_cycle", n_layer=3), 2 * (24 * 32**2 + 4 * 48 * 32)
     + (48 + 32 + 16) * 24 * 32**2 / 48 + (48**2 + 32**2 + 16**2) * 4 * 32 / 48
     + 2 * 32 * (15 + 3))])
def test_flops_equal_the_closed_form_and_a_count(changes, per_token):
    cfg = mor.Config(**SMALL | dict(n_layer=1, n_embd=32, seq_len=48) | changes)
    model = mor.MoR(cfg).train()
    assert model.flops() == pytest.approx(per_token, rel=1e-12)
    counter = FlopCounterMode(display=False)        # it does not know the fused kernel of a CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(2, 48, dtype=torch.long), torch.randn(2, 3, 48))
    vectors = (cfg.router != "none") + (cfg.aux == "router")    # nor a matrix by a vector
    routers = 2 * 32 * 3 * vectors
    assert counter.get_total_flops() / 96 == pytest.approx(per_token - routers, rel=1e-12)


# ---- Data


def compose(g, h):
    """The permutation that applies h, then g."""
    return tuple(g[i] for i in h)


@pytest.mark.parametrize("T, n_fold", [(45, 3), (24, 2), (64, 8), (6, 1)])
def test_rows_parse_and_their_products_are_right(T, n_fold):
    cfg = mor.Config(**SMALL | dict(seq_len=T, n_fold=n_fold, batch_size=400))
    batch = mor.make_batch(cfg, "train", 3)
    counts, steps = {}, []
    for row, target, level in zip(*(batch[n].tolist() for n in ("idx", "targets", "level"))):
        last, j, folds, ends = None, 0, 0, row[1:] + [None]
        for t, (i, after) in enumerate(zip(row, ends)):
            if i >= len(mor.S3):
                steps += [(i - last) % 9] if last is not None else []
                last, j = i, 0
                assert target[t] == (-100 if after is None or after < len(mor.S3) else after)
            else:
                j, last, folds = j + 1, None, folds + (j == 0)
                product = functools.reduce(compose, [mor.S3[g] for g in row[t + 1 - j : t + 1]])
                assert mor.S3[target[t]] == product
                if after is None or after >= len(mor.S3):
                    counts[j] = counts.get(j, 0) + 1
            assert level[t] == j
        assert folds == n_fold
    assert counts == {mor.MOST: 400 * n_fold}
    if len(steps) > 9000:
        assert abs(steps.count(1) / len(steps) - (0.99 + 0.01 / 9)) < 0.004


def test_group_is_not_abelian_and_its_table_is_right():
    assert len(set(mor.S3)) == 6 and not torch.equal(mor.PRODUCT, mor.PRODUCT.T)
    for a, b in itertools.product(range(6), repeat=2):
        assert mor.S3[mor.PRODUCT[a, b]] == compose(mor.S3[a], mor.S3[b])


def test_tokens_that_a_product_needs_fit_the_last_pass_by_default():
    cfg = mor.Config()
    batch = mor.make_batch(cfg, "val", 0)
    need = (batch["level"] > 0).sum(1)
    assert (need == need[0]).all() and 0.7 < need[0] / (cfg.seq_len // cfg.n_loop) <= 1


def test_a_batch_is_a_function_of_seed_split_and_step():
    cfg, seen = mor.Config(**SMALL), {}
    for noise, seed in [(1, 1), (2, 1), (3, 2)]:
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        for split, step in itertools.product(("train", "val"), (0, 1)):
            idx = mor.make_batch(mor.replace(cfg, seed=seed), split, step)["idx"]
            assert torch.equal(idx, seen.setdefault((split, step, seed * (split == "train")), idx))
        assert torch.equal(torch.get_rng_state(), state)
    rows = torch.cat(list(seen.values()))
    assert len(rows.unique(dim=0)) == len(rows)         # training and validation are disjoint


def test_noise_is_there_behind_the_warm_up_and_in_validation():
    cfg = mor.Config(**SMALL | dict(steps=100, capacity_warmup=0.2, batch_size=500))
    steps = [("train", 0), ("train", 19), ("train", 20), ("train", 99), ("val", 0)]
    batches = [mor.make_batch(cfg, *step) for step in steps]
    assert ["noise" in batch for batch in batches] == [False, False, True, True, True]
    noise = torch.stack([batch["noise"] for batch in batches[2:]])      # (3, B, R, T)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    flat = noise.transpose(1, 2).reshape(9, -1)     # of a pass and a step: they are independent
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.05


@pytest.mark.parametrize("router", ["expert", "random"])
def test_all_tokens_take_all_passes_during_the_warm_up(router):
    model, idx = build(router=router).train(), tokens(3)
    logits, _, _, keep = model(idx)
    assert keep.all() and not model(idx, noises(3))[3].all()
    gated = build(router="gate")
    gated.load_state_dict(model.state_dict())
    for mode in (True, False):
        same(logits, gated.train(mode)(idx, noises(3))[0])
    (grad,) = torch.autograd.grad(logits[:, -1].square().sum(), model.router.weight)
    assert grad.abs().sum(1).min() > 0      # every token scales what it gets, in every pass
    assert model.flops(routed=False) > model.flops()


# ---- Evaluation and experiment


def test_evaluation_by_brute_force(tmp_path):
    cfg = mor.Config(**SMALL | dict(batch_size=8, eval_batches=2, aux="router"), out=str(tmp_path))
    model = build(aux="router")
    metrics = mor.evaluate(model, cfg, mor.Run(cfg))
    lists = {name: [] for name in [*mor.METRICS]}
    for step in range(2):
        batch = mor.make_batch(cfg, "val", step)
        topk, _, _, label = model.train()(batch["idx"], batch["noise"])
        logits, _, _, keep = model.eval()(batch["idx"])
        for b, t in itertools.product(range(8), range(24)):
            k, answer = batch["level"][b, t].item(), batch["targets"][b, t].item()
            lists["depth"].append(keep[:, b, t].sum().item())
            if keep[2, b, t]:
                lists["needed"].append(k > 0)
            for r in (1, 2):
                if label[r - 1, b, t] and answer >= 0:
                    lists["agreement"].append((label[r, b, t] == keep[r, b, t]).item())
            if k:
                nll, other = (-out[b, t].log_softmax(-1)[answer].item() for out in (logits, topk))
                lists["loss"].append(nll)
                lists["loss_topk"].append(other)
                lists[f"k{k}"].append(logits[b, t].argmax().item() == answer)
                if k == mor.MOST:
                    lists["hard"].append(nll)
                    lists["hard_topk"].append(other)
    for name, values in lists.items():
        assert metrics[name] == pytest.approx(sum(values) / len(values), abs=1e-10), name
    first = mor.make_batch(cfg, "val", 0)["idx"]
    assert metrics["sample"] == first[0].tolist()
    assert metrics["passes"] == model.eval()(first)[3][:, 0].sum(0).tolist()


@pytest.mark.parametrize("n_loop, warm", [(1, 0.4), (2, 0.4), (3, 0.0), (3, 0.4), (4, 0.25), (5, 0.8)])
@pytest.mark.parametrize("router", ["expert", "token", "gate"])
def test_uniform_makes_as_many_passes_in_all_as_mor(n_loop, warm, router):
    cfg = mor.Config(n_loop=n_loop, capacity_warmup=warm, steps=1000, router=router)
    warm *= router == "expert"      # by token choice all choose from the first step
    mean = sum((n_loop - r) / n_loop for r in range(n_loop))        # of a token that is routed, Eq. 3
    mean = n_loop if router == "gate" else mean
    uniform = mor.replace(cfg, **mor.ARMS["uniform"](cfg))
    assert uniform.n_loop <= mean + 1e-9
    passes = 1000 * (warm * n_loop + (1 - warm) * mean)
    assert uniform.steps * uniform.n_loop == pytest.approx(passes, abs=uniform.n_loop)


@pytest.mark.parametrize("router, warm", [("expert", 0.4), ("token", 0.0)])
def test_flops_of_training_count_the_warm_up_only_where_there_is_one(router, warm, tmp_path):
    flags = ["--smoke", "--only", "mor", "--router", router, "--out", str(tmp_path)]
    m, cfg = mor.main(flags)["arms"]["mor"], mor.parse_args(flags)
    model = mor.MoR(cfg)
    flops = warm * model.flops(routed=False) + (1 - warm) * model.flops()
    tokens = m["steps"] * cfg.batch_size * cfg.seq_len
    assert m["train_tflop"] == pytest.approx(3e-12 * flops * tokens, rel=1e-9)


def test_steps_of_32_rows_are_timed_at_eight_times_the_width_and_decoding_of_one_at_sixteen_times(
        tmp_path, monkeypatch):
    built, decoded, seconds, model = [], [], [], build()
    MoR, decode_all = mor.MoR, mor.decode_all

    def building(cfg):
        built.append(MoR(cfg))
        for p in built[-1].parameters():
            nn.init.normal_(p, std=0.3)
        return built[-1]

    def decoding(model, idx):
        decoded.append((model, idx))
        return decode_all(model, idx)

    def timed(job, number):     # in turn: routed takes 2 to 10 s, unrouted 4
        assert type(job()) is float and number == 1
        seconds.append(4.0 if len(seconds) % 2 else 2.0 + len(seconds) % 9)
        return seconds[-1]

    monkeypatch.setattr(mor, "MoR", building)
    monkeypatch.setattr(mor, "decode_all", decoding)
    monkeypatch.setattr(mor.timeit, "timeit", timed)
    cfg = mor.Config(**SMALL | dict(batch_size=4), out=str(tmp_path))
    found = mor.timings(model, cfg, mor.Run(cfg), routed=True)
    sizes = [(m.cfg.router, m.cfg.n_embd) for m in built]
    assert sizes == [(r, n * 16) for n in (8, 16) for r in ("expert", "none")]
    assert [len(idx) for m, idx in decoded if m is model] == 3 * [32] + 3 * [1]
    assert [m for m, _ in decoded if m is not model] == 9 * [built[2], built[3]]
    assert {idx.shape for m, idx in decoded if m is not model} == {(1, 24)} and len(seconds) == 36
    for i, name in enumerate(["_wide", "_decode"]):
        turns = seconds[18 * i : 18 * i + 18]
        assert found["ms_ratio" + name] == min(turns[::2]) / 4
    assert found["flop_ratio_wide"] == built[0].flops() / built[1].flops()
    passes = built[2].eval()(decoded[-1][1])[3].sum().item()
    assert found["flop_ratio_decode"] == pytest.approx(passes / (3 * 24)) and 24 < passes < 72


@pytest.mark.parametrize("n_embd, widths", [(16, [128, 256]), (64, [512, 1024]), (96, [480, 960]),
                                            (512, [512, 1024]), (2048, [2048, 2048])])
def test_what_is_timed_is_no_wider_than_what_is_timed_by_default(
        n_embd, widths, tmp_path, monkeypatch):
    built, cfg = [], mor.Config(**SMALL | dict(n_embd=n_embd, out=str(tmp_path)))

    class Stub:
        """Stands for a model of any width."""
        def __init__(self, cfg):
            built.append(cfg.n_embd)

        to = eval = lambda self, *_: self
        flops = lambda self: 1.0
        __call__ = lambda self, idx: (None, None, None, torch.ones(1))

    monkeypatch.setattr(mor, "MoR", Stub)
    monkeypatch.setattr(mor.timeit, "timeit", lambda job, number: 1.0)
    monkeypatch.setattr(mor.timeit, "repeat", lambda job, number, repeat: [1.0])
    mor.timings(None, cfg, mor.Run(cfg), routed=True)
    assert built == [width for width in widths for _ in range(2)]


def test_claims_of_ratios_are_open_where_nothing_is_saved_or_reached():
    measure = {name: f for name, f, *_ in mor.CLAIMS}
    saved, share = (measure[name] for name in ("C1 saved time / saved FLOPs, wide",
                                               "C3 share of C0 that mor reaches"))
    for flops, value in [(0.75, 0.8), (1.0, None), (1.0001, None)]:
        assert saved({"mor": dict(ms_ratio_wide=0.8, flop_ratio_wide=flops)}) == (
            value and pytest.approx(value))
    for best, value in [(0.9, 0.5), (0.5, None), (0.4, None)]:
        arms = {arm: dict(k5=k5) for arm, k5 in dict(mor=0.7, single=0.5, recursive=best).items()}
        assert share(arms) == (value and pytest.approx(value))


def test_unrouted_arms_are_decoded_alone(tmp_path):
    cfg = mor.Config(**SMALL, out=str(tmp_path))
    for router, names in [("none", {"decode_ms_b32", "decode_ms_b1"}), ("random", set())]:
        c = mor.replace(cfg, router=router)
        assert set(mor.timings(build(router=router), c, mor.Run(c), routed=False)) == names


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_warm_up_that_leaves_no_time_to_route_is_refused(share):
    with pytest.raises(ValueError, match="must be below 1"):
        mor.Config(capacity_warmup=share)


def test_arms_are_the_method_switched_off_and_have_the_flops_they_claim():
    cfg = mor.Config()
    arms = {arm: mor.MoR(mor.replace(cfg, **changes(cfg))) for arm, changes in mor.ARMS.items()}
    flops = {arm: model.flops() for arm, model in arms.items()}
    assert flops["mor"] / flops["recursive"] == pytest.approx(2 / 3, rel=0.05)
    assert flops["uniform"] / flops["mor"] == pytest.approx(1, rel=0.05)
    warm, steps = cfg.capacity_warmup, mor.ARMS["uniform"](cfg)["steps"]    # the warm-up is paid
    trained = warm * arms["mor"].flops(routed=False) + (1 - warm) * flops["mor"]
    assert arms["mor"].flops(routed=False) == pytest.approx(flops["recursive"], rel=0.02)
    assert steps * flops["uniform"] / cfg.steps / trained == pytest.approx(1, rel=0.05)
    sizes = {arm: sum(p.numel() for p in model.parameters()) for arm, model in arms.items()}
    routers = {arm: (sizes[arm] - sizes["single"]) / cfg.n_embd for arm in arms}    # with a gate
    assert routers == dict(recursive=0, uniform=2, single=0, mor=3, random=3)


@pytest.mark.parametrize("changes, vanilla, middle", [
    ({}, 3, 3), (dict(n_layer=2), 6, 4), (dict(n_layer=2, n_loop=4), 8, 4),
    (dict(n_layer=4, sharing="middle_sequence"), 8, 6)], ids=str)
def test_vanilla_is_as_deep_as_recursive_and_middle_adds_two_blocks(changes, vanilla, middle):
    cfg = mor.Config(**changes)
    arms = {arm: mor.replace(cfg, **mor.ABLATIONS[arm](cfg)) for arm in ("vanilla", "middle")}
    assert arms["vanilla"].n_layer == vanilla and arms["middle"].n_layer == middle
    plain = mor.MoR(mor.replace(cfg, router="none"))
    deep = mor.MoR(arms["vanilla"])
    assert deep.flops() == pytest.approx(plain.flops(), rel=1e-12)
    assert sorted(sum(deep.stages, [])) == list(range(vanilla))     # every layer has own weights


def test_what_no_token_was_asked_for_is_no_metric(tmp_path, monkeypatch):
    """Not even 0: nobody takes the last pass, so that nothing is known of those who do."""
    cfg = mor.Config(**SMALL | dict(batch_size=4, eval_batches=1), out=str(tmp_path))
    model, one = build(), torch.ones(2, 4, 24)
    scores = lambda r, x, h: one * (1.0 if r < 3 else -1.0)
    monkeypatch.setattr(model, "scores", scores)
    metrics = mor.evaluate(model, cfg, mor.Run(cfg))
    assert "needed" not in metrics and metrics["depth"] == 2
    with pytest.raises(LookupError):
        {claim[0]: claim[1] for claim in mor.CLAIMS}["C4 operands in the last pass"]({"mor": metrics})
