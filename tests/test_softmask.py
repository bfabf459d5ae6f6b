"""Oracles of softmask.py: soft masks by hand, gradients, reach, timing of beliefs, bounds."""

import functools
import io
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import remdm
import softmask
from tests.quick import unpainted
from tests.test_remdm import expected_nelbo, partly_masked, relay_law

SMALL = dict(n_layer=2, n_head=2, n_embd=16, seq_len=16, device="cpu")
V = softmask.SYMBOLS
same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-10, check_dtype=False)


@pytest.fixture
def float64(monkeypatch):
    """Double precision also where the script asks for float32: the logits, no belief."""
    none = softmask.no_belief
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(softmask, "no_belief", lambda z: none(z).double())


def build(seed=0, double=True, **changes):
    """A model with random weights everywhere and an open gate; a fresh one is zero where it
    matters."""
    torch.manual_seed(seed)
    model = softmask.SoftMaskLM(softmask.Config(**SMALL | changes))
    for name, p in model.named_parameters():
        if not name.startswith("gate."):
            nn.init.normal_(p, std=0.5)
    if model.gate:
        set_gate(model.gate, 0.8, 1.0, -2.0)
    return model.double() if double else model


def set_gate(gate, s, a, b):
    """Gives the gate these omegas, by the inverse of Eq. 3 written out once more."""
    raw = [math.log(s / (1 - s)), math.log(math.expm1(a - 1e-6)), math.log(math.expm1(-b - 1e-6))]
    gate.raw.data = torch.tensor(raw).to(gate.raw) / gate.speed


def beliefs(n, L, seed=0, sharp=3.0):
    """Random distributions. (n, L, V)"""
    rng = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(n, L, V, generator=rng, dtype=torch.float64)).softmax(-1)


def batch_of(twice=True, **changes):
    cfg = softmask.Config(**SMALL | dict(batch_size=8, p_sm=float(twice)) | changes)
    batch = softmask.make_batch(cfg, "train", 0)
    assert ("twice" in batch) == twice
    return {name: value.double() if value.is_floating_point() else value
            for name, value in batch.items()}


# ---- The soft mask


def weights_of(model, z, belief, lam=None):
    """The weights (B, T, V + 1) of all embeddings in a soft mask: softens with the identity."""
    model.embed.weight.data = torch.eye(V + 1, 16, dtype=torch.float64)
    return model.soften(z, belief, lam)[..., : V + 1]


@pytest.mark.parametrize("k", [1, 2, 3, 12])
def test_a_soft_mask_is_a_convex_mixture_of_the_mask_and_the_top_k(k):
    model, z, p = build(top_k=k), partly_masked(20, 16, V), beliefs(20, 16)
    w = weights_of(model, z, p)
    same(w.sum(-1), torch.ones(20, 16))
    assert (w >= 0).all()
    assert torch.equal(w[z < V], torch.eye(V + 1, dtype=torch.float64)[z[z < V]])
    soft, q, lam = w[z == V], p[z == V], model.gate(p)[z == V]
    assert ((soft[:, :V] > 0).sum(-1) == k).all()
    same(soft[:, V], 1 - lam)
    for row, belief, trust in zip(soft.detach(), q, lam.detach()):
        best = sorted(range(V), key=lambda v: -belief[v])[:k]
        total = sum(belief[v] for v in best)
        want = torch.tensor([trust * belief[v] / total if v in best else 0 for v in range(V)])
        torch.testing.assert_close(row[:V], want.double(), rtol=1e-5, atol=1e-7)


def test_top_k_by_hand():
    for k, p, pi in [(2, [0.5, 0.3, 0.2], [0.625, 0.375, 0]), (3, [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
                     (2, [0.4, 0.2, 0.2, 0.2], [0.4, 0.2, 0.2, 0.2]),   # ties have no order: all
                     (3, [0.0], [0.0])]:                                # no belief
        belief = F.pad(torch.tensor(p).double(), (0, V - len(p))).view(1, 1, V)
        z, lam = torch.full((1, 1), V), torch.tensor(1.0).double()
        w = weights_of(build(top_k=k, seq_len=1), z, belief, lam)[0, 0]
        want = F.pad(torch.tensor(pi).double(), (0, V + 1 - len(pi)))
        want[V] = 1 - want.sum()
        torch.testing.assert_close(w, want, rtol=1e-6, atol=1e-6)


def test_gate_by_hand():
    gate = softmask.Gate(softmask.Config()).double()
    set_gate(gate, 0.8, 6.66, -0.75)
    rows = torch.zeros(3, V, dtype=torch.float64)
    rows[0, 4] = 1
    rows[1, :3] = 1 / 3
    rows[2, :3] = torch.tensor([0.5, 0.3, 0.2])
    entropy = 0.5 * math.log(2) - 0.3 * math.log(0.3) - 0.2 * math.log(0.2)
    assert entropy == pytest.approx(1.0297, abs=1e-4)
    want = [0.79462, 0.07147, 0.8 / (1 + math.exp(6.66 * (entropy - 0.75)))]
    assert gate(rows).tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("init, omega", [
    ("small", (0.1, 10 / math.log(12), -math.log(12) / 2)), ("paper", (1e-6, 10 / 1.5, -0.75))])
@pytest.mark.parametrize("speed", [1.0, 25.0])
def test_initial_values_come_back_from_the_raw_ones(init, omega, speed):
    gate = softmask.Gate(softmask.Config(gate_init=init, gate_speed=speed))
    assert [w.item() for w in gate.omega()] == pytest.approx(omega, rel=1e-4)
    if init == "paper":
        assert gate.raw[0].item() * speed == pytest.approx(-13.8155, abs=1e-3)
    for seed in range(20):
        nn.init.normal_(gate.raw, std=5 / speed, generator=torch.Generator().manual_seed(seed))
        s, a, b = gate.omega()
        assert 0 < s < 1 and a > 0 and b < 0


def test_speed_of_the_gate_is_a_learning_rate_of_its_own():
    """Adam on r / 25 moves r as Adam with 25 times the rate does on r."""
    found = []
    for speed in (1.0, 25.0):
        gate = softmask.Gate(softmask.Config(gate_speed=speed)).double()
        set_gate(gate, 0.1, 4.0, -1.2)
        opt = torch.optim.AdamW(gate.parameters(), lr=0.05 / speed, weight_decay=0.0, eps=0.0)
        for step in range(5):
            opt.zero_grad()
            (gate(beliefs(4, 8, seed=step)) - 0.5).square().sum().backward()
            opt.step()
        found.append(torch.stack(gate.omega()).detach())
    same(found[1], found[0])
    assert found[0][0] > 0.12


def test_permuting_the_symbols_permutes_the_predictions(float64):
    model, other = build(), build()
    z, p = partly_masked(10, 16, V), beliefs(10, 16)
    p[:, ::2] = p[:, ::2].round(decimals=1)     # with ties and zeros
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    place = torch.cat([order, torch.tensor([V])])
    other.embed.weight.data[place] = model.embed.weight.data
    other.head.weight.data[order] = model.head.weight.data
    q = torch.zeros_like(p)
    q[..., order] = p
    same(other(place[z], q)[..., order].exp(), model(z, p).exp())


# ---- Off is MDLM


def test_without_gate_it_is_the_mdlm_of_remdm():
    torch.manual_seed(5)
    off = softmask.SoftMaskLM(softmask.Config(**SMALL, p_sm=0.0))
    torch.manual_seed(5)
    mdlm = remdm.MDLM(remdm.Config(**SMALL))
    torch.manual_seed(5)
    on = softmask.SoftMaskLM(softmask.Config(**SMALL))
    rest = {name: p for name, p in on.state_dict().items() if name != "gate.raw"}
    for state in (mdlm.state_dict(), rest):
        assert state.keys() == off.state_dict().keys()
        assert all(torch.equal(p, state[name]) for name, p in off.state_dict().items())
    off, mdlm = build(double=False, p_sm=0.0), mdlm
    mdlm.load_state_dict(off.state_dict())
    z = partly_masked(20, 16, V)
    assert torch.equal(off(z, beliefs(20, 16).float()), mdlm(z))


@pytest.mark.parametrize("how", ["no belief", "lam", "omega_s"])
def test_lam_of_zero_is_mdlm_bit_by_bit(how):
    model, off = build(double=False), build(double=False, p_sm=0.0)
    off.load_state_dict(model.state_dict(), strict=False)
    z, p = partly_masked(20, 16, V), beliefs(20, 16).float()
    assert not torch.equal(model(z, p), off(z, p))
    if how == "no belief":
        assert torch.equal(model(z, softmask.no_belief(z)), off(z, p))
        return
    model.gate.raw.data[0] = -math.inf if how == "omega_s" else 0
    mute = model if how == "omega_s" else functools.partial(model, lam=torch.tensor(0.0))
    assert torch.equal(mute(z, p), off(z, p))
    batch, cfg = softmask.make_batch(model.cfg, "train", 0), model.cfg
    batch["twice"] = torch.ones(len(batch["idx"]))
    assert torch.equal(softmask.loss_fn(mute, batch, cfg)[0], softmask.loss_fn(off, batch, cfg)[0])
    z = torch.full((8, 16), V)
    x, y = (softmask.denoise_all(net, z, 8, cfg) for net in (mute, off))
    assert torch.equal(x, y)


def test_visible_tokens_are_carried_over_and_masks_never_predicted(float64):
    model, z = build(), partly_masked(20, 16, V)
    logp = model(z, beliefs(20, 16))
    same(logp.exp().sum(-1), torch.ones(20, 16))
    assert torch.equal(logp.exp()[z < V], torch.eye(V, dtype=torch.float64)[z[z < V]])
    assert (logp[z == V] > -math.inf).all()


def test_a_token_masked_again_is_believed_to_be_what_it_was(float64):
    model, z = build(), partly_masked(5, 16, V)
    belief = model(z, beliefs(5, 16)).exp()
    w = weights_of(model, torch.full_like(z, V), belief)[z < V]
    s, a, b = model.gate.omega()
    lam = s * (-a * b).sigmoid()
    torch.testing.assert_close(w.gather(1, z[z < V][:, None])[:, 0], lam.expand(len(w)))
    torch.testing.assert_close(w[:, V], (1 - lam).expand(len(w)))


# ---- Two passes


def two_pass_loss(model, batch, first):
    """The objective with the first pass made by the model `first`, re-derived."""
    z = batch["idx"]
    with torch.no_grad():
        belief = first(z, softmask.no_belief(z)).exp()
    logp, total = model(z, belief), 0
    for b, row in enumerate(z):
        for l in (row == V).nonzero().squeeze(1).tolist():
            total -= logp[b, l, batch["targets"][b, l]] * batch["weight"][b]
    return total / z.numel()


def gradient(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_objective_and_its_gradient_with_the_first_pass_held_constant(float64):
    model, batch = build(), batch_of()
    loss, stats = softmask.loss_fn(model, batch, model.cfg)
    want = two_pass_loss(model, batch, model)
    torch.testing.assert_close(loss, want)
    assert torch.equal(stats["loss"], loss.detach())
    for a, b in zip(gradient(loss, model), gradient(want, model), strict=True):
        torch.testing.assert_close(a, b)
    # the first pass does matter for the value: only its gradient is cut
    assert abs(two_pass_loss(model, batch, build(seed=9)) - want) > 1e-3


def test_gradient_equals_finite_differences_with_a_frozen_first_pass(float64):
    model, batch, frozen = build(), batch_of(), build()
    loss = softmask.loss_fn(model, batch, model.cfg)[0]
    grads = dict(zip(dict(model.named_parameters()), gradient(loss, model)))
    spots = [("gate.raw", (i,)) for i in range(3)]
    spots += [("embed.weight", (3, 2)), ("embed.weight", (V, 1)), ("head.weight", (2, 5)),
              ("blocks.0.mlp.fc.weight", (4, 4))]
    for name, spot in spots:
        p, eps, values = dict(model.named_parameters())[name], 1e-5, []
        for sign in (1, -2):
            p.data[spot] += sign * eps
            values.append(two_pass_loss(model, batch, frozen).item())
        p.data[spot] += eps
        slope = (values[0] - values[1]) / (2 * eps)
        assert grads[name][spot].item() == pytest.approx(slope, rel=1e-3, abs=1e-8), name
        assert grads[name][spot] != 0, name


def test_gate_has_no_gradient_in_one_pass_and_takes_part_all_the_same(float64):
    model, batch = build(), batch_of(twice=False)
    grads = dict(zip(dict(model.named_parameters()),
                     gradient(softmask.loss_fn(model, batch, model.cfg)[0], model)))
    assert torch.equal(grads.pop("gate.raw"), torch.zeros(3, dtype=torch.float64))
    assert all(g.abs().sum() > 0 for g in grads.values())
    batch = batch_of()      # two passes, but nothing is masked
    batch["idx"] = batch["targets"]
    loss = softmask.loss_fn(model, batch, model.cfg)[0]
    assert torch.equal(gradient(loss, model)[-1], torch.zeros(3, dtype=torch.float64))


def test_predicted_tokens_get_a_gradient_through_the_mixture(float64):
    model, batch = build(), batch_of()
    batch["idx"] = torch.where(batch["idx"] == 7, V, batch["idx"])      # 7 is nowhere visible
    grads = []
    for lam in (None, torch.tensor(0.0)):
        net = functools.partial(model, lam=lam)
        loss = softmask.loss_fn(net, batch, model.cfg)[0]
        grads.append(torch.autograd.grad(loss, model.embed.weight)[0][7])
    assert grads[0].abs().sum() > 1e-4 and not grads[1].any()


def predict(model, z, passes):
    belief = softmask.no_belief(z)
    for _ in range(passes):
        belief = model(z, belief).exp()
    return belief


@pytest.mark.parametrize("changes, passes, reach", [
    ({}, 1, 2), ({}, 2, 4), ({}, 3, 6), (dict(n_loop=2), 1, 4), (dict(p_sm=0.0), 3, 2),
    (dict(window=2, n_layer=1), 2, 4), (dict(window=0), 1, 16)])
def test_every_pass_extends_the_reach(float64, changes, passes, reach):
    model, z, at = build(**changes), torch.full((1, 16), V), 8
    z[:, [0, 15]] = torch.tensor([1, 2])    # a visible token between would hide what is beyond
    base, seen = predict(model, z, passes)[0, at], set()
    for other in set(range(16)) - {at}:
        changed = z.clone()
        changed[0, other] = (z[0, other] + 5) % 13
        if not torch.equal(predict(model, changed, passes)[0, at], base):
            seen.add(abs(other - at))
    assert max(seen) == min(reach, 8) and seen == set(range(1, min(reach, 8) + 1))


@pytest.mark.parametrize("seed", range(4))
def test_two_passes_are_a_denoiser_whose_nelbo_bounds_the_entropy(seed, float64, monkeypatch):
    """By enumeration of all sequences and masks, for any weights; so is the floor of its reach."""
    for script in (softmask, remdm):
        monkeypatch.setattr(script, "SYMBOLS", 3)
        monkeypatch.setattr(script, "JUMP", 0.3)
    model, (strings, chance) = build(seed, seq_len=4, top_k=2, n_layer=1), relay_law(4)
    assert model.head.out_features == 3
    with torch.no_grad():
        nelbo = expected_nelbo(lambda z: predict(model, z, 2), 3, strings, chance)
    entropy = -(chance * chance.log()).sum().item()
    assert 4 * nelbo >= 4 * softmask.relay_floor.__wrapped__(4, 2) >= entropy
    exact = expected_nelbo(lambda z: softmask.relay_posterior(z, 2), 3, strings, chance)
    assert exact == pytest.approx(softmask.relay_floor.__wrapped__(4, 2), abs=1e-10)


# ---- Batches and cost


def test_the_coin_is_tossed_for_a_batch_and_changes_nothing_else():
    cfg, off = (softmask.Config(**SMALL, batch_size=4, p_sm=p) for p in (0.8, 0.0))
    coins = []
    for step in range(300):
        batch, plain = (softmask.make_batch(c, "train", step) for c in (cfg, off))
        coins.append("twice" in batch)
        assert "twice" not in plain
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
        assert "twice" not in softmask.make_batch(cfg, "val", step)
    assert sum(coins) / 300 == pytest.approx(0.8, abs=4 * 0.4 / math.sqrt(300))


def test_batches_are_those_of_remdm():
    cfg, other = softmask.Config(**SMALL, batch_size=32), remdm.Config(**SMALL, batch_size=32)
    for split in ("train", "val"):
        batch, want = softmask.make_batch(cfg, split, 3), remdm.make_batch(other, split, 3)
        assert all(torch.equal(batch[name], want[name]) for name in want)


@pytest.mark.parametrize("changes", [dict(p_sm=0.0), dict(p_sm=0.0, n_loop=2), dict(p_sm=1.0)],
                         ids=str)
def test_flops_of_a_training_step_equal_a_count(changes):
    cfg = softmask.Config(**SMALL, batch_size=4, **changes)
    batch, counter = softmask.make_batch(cfg, "train", 0), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:     # it does not know the fused kernel of a CPU
        softmask.loss_fn(softmask.SoftMaskLM(cfg), batch, cfg)[0].backward()
    assert counter.get_total_flops() / 64 == softmask.update_flops(cfg)


def test_a_coin_that_is_on_costs_a_third_more():
    off, on, mean = (softmask.update_flops(softmask.Config(p_sm=p)) for p in (1e-9, 1.0, 0.8))
    assert on / off == pytest.approx(8 / 6, rel=2e-3)
    assert mean / off == pytest.approx(1 + 0.8 / 3, rel=2e-3)


# ---- Sampling


def spy(model, calls):
    def denoise(z, belief):
        logp = model(z, belief)
        calls.append((z, belief, logp.exp()))
        return logp
    return denoise


def test_beliefs_are_those_of_the_step_before():
    model, calls, T = build(double=False), [], 10
    x = softmask.denoise_all(spy(model, calls), torch.full((6, 16), V), T, model.cfg)
    assert len(calls) == T and (x < V).all() and (calls[0][0] == V).all()
    assert not calls[0][1].any()
    for (z, _, before), (after, belief, _) in zip(calls, calls[1:]):
        assert torch.equal(belief, before)
        assert torch.equal(after[z < V], z[z < V])


def test_the_share_of_masks_falls_evenly_to_none():
    calls, z = [], torch.full((4000, 16), V)
    uniform = lambda z, belief: torch.full((*z.shape, V), -math.log(V))
    softmask.denoise_all(spy(uniform, calls), z, 8, softmask.Config(**SMALL))
    shares = [(z == V).double().mean().item() for z, _, _ in calls]
    assert shares == pytest.approx([1 - i / 8 for i in range(8)], abs=4 * 0.5 / math.sqrt(64000))


def test_tokens_are_drawn_from_the_prediction():
    n, law = 100_000, torch.tensor([0.5, 0.3, 0.2] + [0.0] * (V - 3))
    denoise = lambda z, belief: law.log().expand(*z.shape, V)
    z = torch.cat([torch.full((n, 1), V), torch.full((n, 1), 4)], dim=1)
    u = torch.rand(n, 2, V + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, _ = softmask.soft_step(denoise, z, softmask.no_belief(z), 0.25, u)
    assert (x[:, 1] == 4).all()
    found = x[:, 0].bincount(minlength=V + 1)
    want = torch.cat([0.25 * law, torch.tensor([0.75])]) * n
    assert not found[want == 0].any()
    assert ((found - want) ** 2 / want)[want > 0].sum() < 16.3


def test_given_tokens_stay_and_seed_alone_decides():
    model, z, samples = build(double=False), partly_masked(8, 16, V), []
    for noise in (1, 2):
        torch.manual_seed(noise)
        samples.append(softmask.denoise_all(model, z, 5, model.cfg))
    assert torch.equal(*samples) and torch.equal(samples[0][z < V], z[z < V])
    other = softmask.Config(**SMALL, seed=2)
    assert not torch.equal(softmask.denoise_all(model, z, 5, other), samples[0])


def counted(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    return backend


def test_all_steps_of_sampling_share_one_graph():
    graphs, model = [], build(double=False)
    torch._dynamo.reset()
    step = torch.compile(softmask.soft_step, fullgraph=True, dynamic=False,
                         backend=counted(graphs))
    z, belief = torch.full((3, 16), V), softmask.no_belief(torch.zeros(3, 16))
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for show in 1 / torch.arange(6, 0, -1, dtype=torch.float64):
            u = torch.rand(3, 16, V + 1, dtype=torch.float64)
            arguments = model, z, belief, show, u
            for a, b in zip(step(*arguments), softmask.soft_step(*arguments), strict=True):
                assert torch.equal(a, b)
            z, belief = step(*arguments)
    assert len(graphs) == 1 and (z < V).all()


def test_training_and_sampling_share_two_graphs():
    """With and without gradient: first passes, evaluation and sampling are calls of one graph."""
    graphs, model = [], build(double=False, batch_size=8, p_sm=0.5)
    torch._dynamo.reset()
    model.compile(fullgraph=True, dynamic=False, backend=counted(graphs))
    kinds = set()
    for step in range(8):
        batch = softmask.make_batch(model.cfg, "train", step)
        kinds.add("twice" in batch)
        softmask.loss_fn(model, batch, model.cfg)[0].backward()
    softmask.denoise_all(model, torch.full((8, 16), V), 4, model.cfg)
    assert kinds == {True, False} and len(graphs) == 2


# ---- Evaluation


@pytest.mark.parametrize("reach, floor", [(2, 0.8024), (4, 0.6422), (8, 0.5747), (64, 0.55679)])
def test_relay_floors_of_the_default_length(reach, floor):
    assert softmask.relay_floor(64, reach) == pytest.approx(floor, abs=6e-5)


def test_a_floor_beyond_the_length_is_that_of_the_length():
    assert softmask.relay_floor(8, 20) == pytest.approx(softmask.relay_floor(8, 8), abs=1e-12)
    assert softmask.relay_floor(8, 5) > softmask.relay_floor(8, 8)


@pytest.mark.parametrize("flags, arm, reaches, which", [
    ({}, "mdlm", [2, 4, 6], 0), ({}, "looped", [4, 8, 12], 0), ({}, "softmask", [2, 4, 6], 1),
    (dict(n_pass=1), "softmask", [2], 0),
    (dict(p_sm=0.0), "softmask", [2, 4, 6], 0),     # without a gate there is no second pass
    (dict(window=4), "looped", [16, 16, 16], 0), (dict(window=10**9), "mdlm", [16, 16, 16], 0),
    (dict(window=0), "softmask", [16, 16, 16], 1)], ids=str)
def test_floors_are_of_what_a_pass_can_see(flags, arm, reaches, which, tmp_path, monkeypatch):
    """And that of the loss is of its pass. Reaches beyond all tokens would not fit into memory."""
    cfg = softmask.Config(**SMALL | dict(n_pass=3, only=arm, out=str(tmp_path)) | flags)
    found = dict(loss=1.0, loss_se=0.0, by_pass=[])
    monkeypatch.setattr(softmask, "train", lambda *_: [dict(seconds=0.0)])
    monkeypatch.setattr(softmask, "evaluate", lambda *_: found)
    monkeypatch.setattr(softmask, "infill", lambda *_: {})
    monkeypatch.setattr(softmask, "draw_samples", lambda *_: [dict(nfe=4, jumps=3.5)])
    monkeypatch.setattr(softmask, "relay_floor", lambda L, reach: reach if L == 16 else None)
    m = softmask.experiment(cfg, softmask.Run(cfg))[arm]
    assert m["floors"] == reaches and m["floor"] == reaches[which]
    assert m["jumps"] == {"4": 3.5}


def test_evaluation_after_every_pass(tmp_path):
    """The exact denoisers of reach 2, 3, 4, ... in turn, each with the belief of the one before."""
    cfg = softmask.Config(**SMALL, batch_size=64, eval_batches=2, n_pass=4, out=str(tmp_path))
    before = []

    def denoise(z, belief):
        assert torch.equal(belief, before[-1]) if len(before) % cfg.n_pass else not belief.any()
        logp = softmask.relay_posterior(z, 2 + len(before) % cfg.n_pass).log()
        before.append(logp.exp())
        return logp

    m = softmask.evaluate(denoise, cfg, softmask.Run(cfg))
    assert len(before) == 8
    for reach, value in enumerate(m["by_pass"], 2):     # the controls know reach 2 and 4
        floor = softmask.relay_floor(16, reach)
        assert value == pytest.approx(floor, abs=1e-9 if reach % 2 == 0 else 0.02)
    assert m["loss"] == m["by_pass"][1]
    cfg.n_pass = 1
    m = softmask.evaluate(denoise, cfg, softmask.Run(cfg))
    assert m["loss"] == m["by_pass"][0] == pytest.approx(softmask.relay_floor(16, 2), abs=1e-9)
    assert m["loss_se"] < 1e-9


@pytest.mark.parametrize("denoise", [
    build(double=False), lambda z, belief: softmask.relay_posterior(z, 16).log()],
    ids=["network", "exact"])
def test_samples_are_described_by_what_they_are(denoise, tmp_path):
    cfg = softmask.Config(**SMALL, n_denoise=32, n_sample=50, out=str(tmp_path))
    rows = softmask.draw_samples(denoise, cfg, softmask.Run(cfg))
    assert [row["nfe"] for row in rows] == [1, 2, 4, 8, 16, 32]
    for row in rows:
        x = softmask.denoise_all(denoise, torch.full((50, 16), V), row["nfe"], cfg)
        jumps = [sum((b - a) % 12 != 1 for a, b in itertools.pairwise(s)) for s in x.tolist()]
        windows = [tuple(s[i : i + 8]) for s in x.tolist() for i in range(9)]
        mean = sum(jumps) / 50
        spread = math.sqrt(sum((jump - mean) ** 2 for jump in jumps) / 50 / 50)
        assert row["jumps"] == pytest.approx(mean) and row["se"] == pytest.approx(spread)
        assert row["distinct"] == pytest.approx(len(set(windows)) / len(windows))


def test_infilling_with_an_exact_denoiser_reaches_its_closed_form(tmp_path):
    cfg = softmask.Config(**SMALL, n_sample=500, n_denoise=128, out=str(tmp_path))
    exact = lambda z, belief: softmask.relay_posterior(z, 16).log()
    m = softmask.infill(exact, cfg, softmask.Run(cfg))
    # many steps: at sixteen positions sixteen draws are nearly one after the other
    assert m["infill"] == pytest.approx(m["infill_exact"], abs=0.02)
    assert m["infill"] == m["infill T=16"]
    blind = lambda z, belief: torch.full((*z.shape, V), -math.log(V))
    m = softmask.infill(blind, softmask.replace(cfg, n_denoise=64), softmask.Run(cfg))
    assert m["infill"] == m["infill T=8"] == pytest.approx(1 / 12, abs=0.01)
    assert "infill T=16" not in m
    m = softmask.infill(blind, softmask.replace(cfg, n_denoise=4), softmask.Run(cfg))
    assert m["infill"] == m["infill T=1"] == pytest.approx(1 / 12, abs=0.01)    # never no step at all


def test_a_saved_and_loaded_gate_gives_the_same_lam():
    model, file = build(double=False), io.BytesIO()
    set_gate(model.gate, 0.43, 4.9, -1.5)
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = softmask.SoftMaskLM(model.cfg)
    p = beliefs(4, 16).float()
    assert not torch.equal(other.gate(p), model.gate(p))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.gate(p), model.gate(p))


def test_every_parameter_is_clipped_once():
    for changes in ({}, dict(p_sm=0.0)):
        model = build(**changes)
        clipped = sorted(id(p) for part in model.parts() for p in part)
        assert clipped == sorted(id(p) for p in model.parameters())
    assert [len(part) for part in build().parts()][1:] == [1]


# ---- Bad input and claims


@pytest.mark.parametrize("flags", [dict(p_sm=1.1), dict(top_k=13), dict(top_k=0),
                                   dict(n_pass=0), dict(gate_speed=0.0), dict(n_loop=0),
                                   dict(seed=0)], ids=str)
def test_wrong_values_are_refused(flags):
    with pytest.raises(ValueError, match=next(iter(flags))):
        softmask.Config(**flags)


def arms_by_hand():
    mdlm = {"slack": 0.02, "loss": 0.81, "infill": 0.3, "infill T=16": 0.33, "untrained": 0.77,
            "jumps": {"32": 17, "64": 15, "128": 12}}
    soft = {"slack": 0.03, "loss": 0.5, "infill": 0.5, "infill T=16": 0.43,
            "by_pass": [0.891, 0.66, 0.5], "jumps": {"32": 13, "64": 9, "128": 8, "256": 7}}
    return {"mdlm": mdlm, "softmask": soft}


def test_claims_by_hand():
    measured = [measure(arms_by_hand()) for _, measure, _, _ in softmask.CLAIMS]
    assert measured == pytest.approx([0.02, 0.03, 0.81, 0.66, 15, 0.6, 0.2, 0.1, 0.1, 0.11])


@pytest.mark.parametrize("arm, change, unknown", [
    ("softmask", dict(by_pass=[0.891]), [3, 9]),                        # --n_pass 1
    ("mdlm", dict(jumps={"32": 17, "64": 15}), [6]),                    # --n_denoise 64
    ("softmask", dict(jumps={"128": 8, "256": 7}), [5]),
    ("mdlm", {"infill T=16": None}, [7]),
    ("mdlm", dict(jumps={"64": 0, "128": 0}), [5, 6])])                 # --seq_len 1
def test_claims_about_what_was_not_measured_are_not_judged(arm, change, unknown, tmp_path, capsys):
    arms, cfg = arms_by_hand(), softmask.Config(**SMALL, out=str(tmp_path))
    arms["mdlm"]["history"], arms["softmask"]["history"] = [dict(arm="mdlm")], []
    arms[arm] |= change
    claims = softmask.report(cfg, softmask.Run(cfg), arms, [], softmask.CLAIMS)["claims"]
    assert [i for i, claim in enumerate(claims) if claim["verdict"] == "not judged"] == unknown


@pytest.mark.filterwarnings("error")
def test_all_arms_look_different(tmp_path):
    looks = [(s["color"], s["marker"]) for s in softmask.STYLES.values()]
    assert len(set(looks)) == len(looks) == 6
    row, styles = dict(step=1, val_loss=1.0), []
    m = dict(mflops_update=1.0, history=[row], loss=1.0, steps=1, seconds=1.0, floor=1.0,
             floors=[1.0], samples=[dict(nfe=4, jumps=3.5, se=0.1, seconds=1.0)])
    cfg = softmask.Config(**SMALL, full=True, out=str(tmp_path))
    results = dict(arms=dict.fromkeys(softmask.STYLES, m), environment=dict(device="cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmask.Figure, "savefig", lambda figure, *_, **__: styles.extend(
            (line.get_color(), line.get_marker()) for line in figure.axes[0].lines
            if line.get_marker() != "None"))
        softmask.plot(cfg, softmask.Run(cfg), results)
    assert styles == looks


def test_an_undertrained_network_is_called_void(tmp_path, monkeypatch, capsys):
    with unpainted():
        results = softmask.main(["--smoke", "--out", str(tmp_path)])
    m = results["arms"]["mdlm"]
    over = m["loss"] - softmask.relay_floor(16, 2)
    assert m["slack"] == pytest.approx(over + 3 * m["loss_se"])
    assert results["arms"]["softmask"]["floor"] == softmask.relay_floor(16, 4)
    monkeypatch.setattr(softmask, "experiment", lambda cfg, run: results["arms"])
    for m["loss"], void in (0.8599, False), (0.8601, True):
        capsys.readouterr()
        with unpainted():
            softmask.main(["--smoke", "--out", str(tmp_path)])
        assert ("void: undertrained" in capsys.readouterr().out) == void
