"""Oracles of hrpo.py: the gate, rollouts and their replay, the objective by enumeration, polls."""

import argparse
import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hrpo

SMALL = dict(n_head=2, n_embd=16, n_vote=3, group=4, batch_size=16, device="cpu")
V, HASH, DONE = hrpo.VOCAB, hrpo.HASH, hrpo.DONE
same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-10, check_dtype=False)
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-4)


def config(**changes):
    return hrpo.Config(**SMALL | changes)


def scramble(model, std=0.3):
    """Random weights everywhere: a fresh model is zero where it matters."""
    for p in [*model.blocks.parameters(), model.embed.weight]:
        nn.init.normal_(p, std=std)
    return model


def build(seed=0, double=False, **changes):
    """A model that reinforcement trains, away from its reference. Its gate is wide open."""
    torch.manual_seed(seed)
    cfg = config(**changes)
    base = scramble(hrpo.HRPO(config(**changes | dict(group=0, feed="token"))))
    model = hrpo.HRPO(cfg, base)
    torch.manual_seed(seed + 1)     # the same for all arms
    for p in model.blocks.parameters():
        p.data += 0.1 * torch.randn_like(p)
    if model.gate:
        nn.init.normal_(model.gate.W, std=0.5 / model.gate.speed)
        set_lambda(model.gate, torch.linspace(-1, 2, cfg.n_embd))
    return model.double() if double else model


def set_lambda(gate, value):
    gate.raw.data = torch.as_tensor(value).expand_as(gate.raw).to(gate.raw) / (4 * gate.speed)


def batch_of(cfg, step=0, split="train"):
    return hrpo.make_batch(cfg, split, step)


def answers(prompt, g, cfg, seed=0):
    """Words of g answers per prompt that think for a while, # at another place in every row."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(HASH, (g * len(prompt), cfg.n_new), generator=rng)
    y[torch.arange(len(y)), torch.arange(len(y)) % cfg.n_new] = HASH
    return y


def mixtures(y, seed=0):
    """Random distributions over words. (R, n) -> (R, n, V)"""
    rng = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*y.shape, V, generator=rng)).softmax(-1)


# ---- The gate


def test_a_is_u_to_the_power_of_r():
    for r_min in (0.3, 0.9, 0.99):
        torch.manual_seed(0)
        gate = hrpo.ThoughtGate(config(n_embd=256, r_min=r_min))
        u = gate.Lambda.sigmoid() ** 8
        assert u.min() > r_min - 1e-4 and u.max() < 0.999 + 1e-4 and u.std() > 0.2 * (1 - r_min)
        gate.W.data.zero_()
        e, a = torch.randn(2, 3, 256), {}
        for shift in (0.0, 1e4):
            gate.b.data[:256] = shift
            a[shift] = gate(e, e)[1].expand(2, 3, 256)
        torch.testing.assert_close(a[0.0], u.sqrt().expand(2, 3, 256), rtol=0, atol=1e-5)
        torch.testing.assert_close(a[1e4], u.expand(2, 3, 256), rtol=0, atol=1e-5)


def test_gate_by_hand():
    gate = hrpo.ThoughtGate(config()).double()
    e, h = torch.randn(2, 5, 16).double()
    nn.init.normal_(gate.W, std=0.05)
    nn.init.normal_(gate.b, std=0.05)
    x, a = gate(e, h)
    W, b, Lambda = (x.detach() for x in (gate.W * gate.speed, gate.b * gate.speed, gate.Lambda))
    for t, c in itertools.product(range(5), range(16)):
        r = 1 / (1 + math.exp(-(W[c] @ e[t] + b[c])))
        i = 1 / (1 + math.exp(-(W[16 + c] @ e[t] + b[16 + c])))
        want = math.exp(-8 * math.log1p(math.exp(-Lambda[c])) * r)
        assert a[t, c].item() == pytest.approx(want, abs=1e-9)
        full = want * e[t, c] + math.sqrt(1 - want**2 + 1e-8) * i * h[t, c]
        assert x[t, c].item() == pytest.approx(full.item(), abs=1e-9)


def test_gate_moves_faster_than_the_network_by_its_speed():
    for speed in (1.0, 20.0):
        gate = hrpo.ThoughtGate(config(gate_speed=speed))
        before = gate.Lambda.detach().clone(), gate.b.detach() * speed
        opt = torch.optim.AdamW(gate.parameters(), lr=1e-3, weight_decay=0.0)
        (gate.Lambda.sum() + (speed * gate.b).sum() + gate.W.sum()).backward()
        opt.step()
        same(before[0] - gate.Lambda, torch.full((16,), 4e-3 * speed), atol=1e-4)
        same(before[1] - gate.b * speed, torch.full((32,), 1e-3 * speed), atol=1e-6)


def test_mixture_of_one_word_is_that_word_and_has_length_one_over_orthonormal_words():
    model = build(feed="mean", n_embd=32, n_head=2)
    y = torch.randint(HASH, (5, 6))
    e, thinks = model.embed(y), torch.ones(5, 6, dtype=torch.bool)
    close(model.blend(y, F.one_hot(y, V).float(), thinks), e, atol=1e-6)
    model.embed.weight.data = torch.linalg.qr(torch.randn(32, 32))[0][:V]
    h = model.blend(y, mixtures(y), thinks)
    close(h.norm(dim=-1), torch.ones(5, 6), atol=1e-5)
    want = mixtures(y) @ model.embed.weight / mixtures(y).square().sum(-1, keepdim=True).sqrt()
    close(h, want, atol=1e-6)
    hybrid, own = build(feed="hybrid"), build(feed="self")
    close(hybrid.blend(y, F.one_hot(y, V).float(), thinks), own.blend(y, mixtures(y), thinks),
          atol=1e-6)
    y, thinks, other = y.repeat(2, 1), thinks.repeat(2, 1), build(feed="other")     # of another group
    close(other.blend(y, mixtures(y), thinks), hybrid.blend(y, mixtures(y).roll(4, 0), thinks))
    apart = hybrid.blend(y, mixtures(y), thinks) - own.blend(y, mixtures(y), thinks)
    assert apart.abs().max() > 0.1


def test_gate_and_mixtures_are_float32_under_autocast():
    torch.manual_seed(0)
    gate = hrpo.ThoughtGate(config(n_embd=128, r_min=0.99))
    model = build()
    y = torch.randint(HASH, (4, 6))
    thinks = torch.ones(4, 6, dtype=torch.bool)
    exact = model.blend(y, mixtures(y), thinks)
    with torch.autocast("cpu", torch.bfloat16):
        blended = model.blend(y, mixtures(y), thinks)
        p = model.rollout(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 2, 6, V))[1]
    assert blended.dtype == p.dtype == torch.float32 and torch.equal(blended, exact)
    assert len(gate(torch.zeros(128), torch.zeros(128))[1].unique()) > 50


def test_decay_alone_is_what_adamw_does_with_zero_gradients():
    cfg = config(steps=30, warmup=5, lr=1e-3)
    torch.manual_seed(0)
    gate = hrpo.ThoughtGate(cfg)
    Lambda = nn.Parameter(gate.Lambda.detach().clone())
    opt, ratios = torch.optim.AdamW([Lambda], weight_decay=0.1), []
    for step in range(cfg.steps):
        Lambda.grad = torch.zeros_like(Lambda)
        opt.param_groups[0]["lr"] = 4 * cfg.gate_speed * hrpo.learning_rate(step, cfg)
        opt.step()
        a = (Lambda.sigmoid() ** 8).sqrt().mean()
        ratios.append(math.sqrt(1 - a.item() ** 2))
    assert gate.decay_only(cfg) == pytest.approx(ratios, abs=1e-5)
    assert ratios[-1] > ratios[0] + 0.02


# ---- Rollouts and their replay


def test_off_is_grpo_to_the_last_bit():
    """No thinking, or no gate: logits, loss and gradients of a model without the method."""
    cfg, found = config(), []
    batch = batch_of(cfg)
    for feed in ("token", "hybrid"):
        model = build(feed=feed)
        model.embed.weight.data[0] = model.embed.weight.data[HASH] * 2      # some begin with #
        prompt = batch["prompt"]
        y = answers(prompt, 4, cfg)
        y[:, 0] = HASH                      # nobody thinks
        logits = model.replay(prompt, y, mixtures(y))
        logits.square().mean().backward()
        found.append([logits, *(p.grad for p in model.blocks.parameters())])
    assert all(torch.equal(x, y) for x, y in zip(*found))
    assert not model.gate.W.grad.any() and not model.gate.raw.grad.any()
    y = answers(prompt, 4, cfg)
    set_lambda(model.gate, 60.0)
    shut = model.replay(prompt, y, mixtures(y))
    close(shut, model.replay(prompt, y, None), atol=2e-3)
    set_lambda(model.gate, -2.0)
    assert (model.replay(prompt, y, mixtures(y)) - shut).abs().max() > 0.1


@pytest.mark.parametrize("feed", ["hybrid", "self", "mean", "token", "other"])
def test_replay_equals_rollout(feed):
    cfg = config(feed=feed)
    model, batch = build(feed=feed), batch_of(cfg)
    y, p = model.rollout(batch["prompt"], batch["noise"])
    assert y.shape == (16, cfg.n_new) and p.shape == (16, cfg.n_new, V)
    logp = model.replay(batch["prompt"], y, p).log_softmax(-1)
    ended = (y == DONE).cumsum(1) > (y == DONE)
    close(logp[~ended], p.log()[~ended])
    if feed in ("hybrid", "mean"):      # what catches a replay without mixtures, or a step late
        for wrong in (None, p.roll(1, dims=1), p.roll(1, dims=0)):
            other = model.replay(batch["prompt"], y, wrong).log_softmax(-1)
            assert (other - p.log()).abs().max() > 0.01


def test_rollouts_of_a_question_share_its_prompt_and_differ_by_their_noise():
    model, cfg = build(), config()
    batch = batch_of(cfg)
    y, p = model.rollout(batch["prompt"], batch["noise"])
    alone = [model.rollout(batch["prompt"][b : b + 1], batch["noise"][b : b + 1, i : i + 1])
             for b in range(4) for i in range(4)]
    assert torch.equal(y, torch.cat([rollout[0] for rollout in alone]))
    close(p, torch.cat([rollout[1] for rollout in alone]), atol=1e-5)
    assert all(torch.equal(p[4 * b : 4 * b + 4, 0], p[4 * b, 0].expand(4, V)) for b in range(4))
    assert len(y.unique(dim=0)) > 8


def test_words_after_the_end_are_the_end():
    model, cfg = build(), config()
    model.embed.weight.data[DONE] *= 3      # ends are frequent
    y, _ = model.rollout(batch_of(cfg)["prompt"], batch_of(cfg)["noise"])
    ended = (y == DONE).cumsum(1) > 0
    assert ended.any() and (y[ended] == DONE).all() and (y[:, 0] != DONE).any()


@pytest.mark.parametrize("feed", ["hybrid", "mean"])
def test_only_mixtures_of_thoughts_matter_and_only_to_what_follows(feed):
    model, cfg = build(feed=feed), config()
    prompt = batch_of(cfg)["prompt"]
    y = answers(prompt, 1, cfg)
    p, logits = mixtures(y), model.replay(prompt, y, mixtures(y))
    for row, j in itertools.product(range(len(y)), range(cfg.n_new)):
        other = p.clone()
        other[row, j] = mixtures(y, seed=1)[row, j]
        changed = model.replay(prompt, y, other) != logits
        thinks = HASH not in y[row, : j + 1].tolist()
        assert not changed[:, : j + 1].any() and not changed[torch.arange(len(y)) != row].any()
        assert changed[row, j + 1 :].any() == (thinks and j + 1 < cfg.n_new)


def test_where_the_gradient_flows():
    cfg, model = config(), build()
    model.embed.weight.data[HASH] = 0.0
    batch = batch_of(cfg)
    batch["label"] = model.rollout(batch["prompt"], batch["noise"])[0][::4, 1]
    loss, _ = hrpo.loss_fn(model, batch, cfg)
    loss.backward()
    trained = [*model.blocks.parameters(), *model.gate.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in trained)
    assert model.embed.weight.grad is None
    assert all(p.grad is None for p in model.reference.parameters())
    y, p = model.rollout(batch["prompt"], batch["noise"])
    assert not p.requires_grad
    ids = [id(p) for part in model.parts() for p in part]
    assert len(set(ids)) == len(ids)
    assert set(ids) == {id(p) for name, p in model.named_parameters() if "reference" not in name}


def test_gradient_of_lambda_has_the_sign_of_a_finite_difference():
    model, cfg = build(double=True), config()
    prompt = batch_of(cfg)["prompt"]
    y = answers(prompt, 1, cfg)
    p = mixtures(y).double()

    def loss():
        return F.cross_entropy(model.replay(prompt, y, p).double().transpose(1, 2), y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        loss().backward()
        for c in (0, 7, 15):
            ends = []
            for step in (1e-4, -2e-4):
                model.gate.raw.data[c] += step
                ends.append(loss().item())
            model.gate.raw.data[c] += 1e-4
            difference = (ends[0] - ends[1]) / 2e-4
            assert model.gate.raw.grad[c].item() == pytest.approx(difference, rel=1e-3, abs=1e-7)


def thinking(y):
    return (y == HASH).cumsum(1) == 0


def test_without_words_all_rollouts_think_alike():
    """interp: until #, the sampled words do not matter; hrpo: they do."""
    cfg, spread = config(batch_size=32), {}
    batch = batch_of(cfg)
    for feed in ("mean", "hybrid"):
        model = build(feed=feed)
        y, p = model.rollout(batch["prompt"], batch["noise"])
        y, p = y.view(8, 4, -1), p.view(8, 4, -1, V)
        both = thinking(y[:, 0]) & thinking(y[:, 1]) & (y[:, 0] != y[:, 1])
        apart = (p[:, 0] - p[:, 1]).abs().amax(-1)[:, 1:]
        spread[feed] = apart[both[:, :-1]].max().item()
    assert spread["mean"] < 1e-5 and spread["hybrid"] > 1e-2


def test_words_are_drawn_from_their_distribution():
    model, cfg, n = build(), config(), 20000
    noise = hrpo.make_batch(config(group=0, batch_size=n), "val", 0)["noise"].view(1, n, -1, V)
    y, p = model.rollout(batch_of(cfg)["prompt"][:1], noise)
    count, want = torch.bincount(y[:, 0], minlength=V).double(), n * p[0, 0].double()
    often = want > 5
    chi = ((count - want)[often].square() / want[often]).sum()
    assert chi < often.sum() + 5 * math.sqrt(2 * often.sum())
    greedy, p = model.rollout(batch_of(cfg)["prompt"], torch.zeros(4, 1, cfg.n_new, V))
    assert torch.equal(greedy[:, 0], p[:, 0].argmax(-1))


@pytest.mark.parametrize("feed", ["hybrid", "self", "mean", "token"])
def test_flops_of_a_word(feed):
    cfg = config(feed=feed, n_layer=3)
    torch.manual_seed(0)
    model = hrpo.HRPO(cfg, hrpo.HRPO(config(group=0, feed="token", n_layer=3)))
    batch, counter = batch_of(cfg), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        y, _ = model.rollout(batch["prompt"], batch["noise"])
    # the head reads every prompt once, not g times
    saved = (len(y) - len(batch["prompt"])) * 2 * cfg.n_embd * V
    assert hrpo.word_flops(cfg) * y.numel() == pytest.approx(counter.get_total_flops() + saved)


# ---- The objective


def test_advantages_by_hand():
    def of(rewards, adv="grpo"):
        return hrpo.advantage(torch.tensor([rewards]).float(), adv)[0].tolist()

    assert of([1, 0, 0, 0]) == pytest.approx([1.4997, -.4999, -.4999, -.4999], abs=1e-4)
    assert of([1] + 7 * [0]) == pytest.approx([2.4742] + 7 * [-.3535], abs=1e-4)
    assert of([1, 1, 1]) == of([0, 0, 0]) == of([1, 1, 1], "rloo") == [0, 0, 0]
    assert of([1, 0, 0, 0], "drgrpo") == [.75, -.25, -.25, -.25]
    assert of([1, 0, 0, 0], "rloo") == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    two = hrpo.advantage(torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 1]]), "grpo")
    same(two[0], -two[1], atol=1e-6)


@pytest.mark.parametrize("g", [2, 4])
def test_expected_gradients_of_all_groups(g):
    """Three arms, every group of g draws: the mean as a baseline shrinks the gradient, rloo does
    not, and a division by the deviation rescales it by what the rewards happen to be."""
    logits, R = torch.tensor([0.3, -0.2, 0.5]).double().requires_grad_(), torch.tensor([1.0, 0, 0])
    true = torch.autograd.grad(logits.softmax(0) @ R.double(), logits)[0]
    groups = torch.cartesian_prod(*[torch.arange(3)] * g)
    logp = logits.log_softmax(0)[groups]
    weight = logp.sum(1).exp().detach()
    factor = {}
    for adv in ("drgrpo", "rloo", "grpo"):
        A = hrpo.advantage(R[groups].double(), adv)
        gain = (weight[:, None] * A * logp).sum() / g
        factor[adv] = torch.autograd.grad(gain, logits, retain_graph=True)[0] / true
    same(factor["drgrpo"], torch.full((3,), (g - 1) / g), atol=1e-6)
    same(factor["rloo"], torch.ones(3), atol=1e-6)
    assert (factor["grpo"] - 1).abs().min() > 0.1


def test_loss_by_hand():
    """Eq. 8 in double loops, from the logits of both models."""
    for adv in ("grpo", "drgrpo", "rloo"):
        cfg = config(adv=adv, beta=0.3)
        model, batch = build(adv=adv, beta=0.3), batch_of(cfg)
        y, p, own, ref = model(batch)
        y = y.clone()
        y[0, 1:4] = torch.tensor([HASH, batch["label"][0], DONE])
        y[0, 4:], y[5, 2], y[5, 3:], y[5, :2] = DONE, DONE, DONE, 7
        loss, stats = hrpo.loss_fn(lambda _: (y, p, own, ref), batch, cfg)
        rewards = hrpo.judge(y, p, batch["label"].repeat_interleave(4))[0].tolist()
        A = hrpo.advantage(torch.tensor(rewards).view(4, 4), adv).flatten()
        total, hand = 0.0, 0.0
        for i in range(16):
            words = y[i].tolist()
            length = words.index(DONE) + 1 if DONE in words else cfg.n_new
            share, each = 1 / (length if adv == "grpo" else cfg.n_new) / 16, 0.0
            for j in range(length):
                lp, lref = own[i, j].log_softmax(-1)[words[j]], ref[i, j].log_softmax(-1)[words[j]]
                k3 = (lref - lp).exp() - (lref - lp) - 1
                each = each + cfg.beta * k3 - A[i] * lp     # has the gradient, not the value
                hand += (cfg.beta * k3 - A[i]).item() * share
            total = total + each * share
        assert sum(rewards) >= 1 and loss.item() == pytest.approx(hand, abs=1e-5)
        weights = list(model.blocks.parameters()) + list(model.gate.parameters())
        grads = (torch.autograd.grad(x, weights, retain_graph=True) for x in (loss, total))
        for found, want in zip(*grads):
            close(found, want, atol=1e-5)
        assert stats["loss"].item() == pytest.approx(
            1 - hrpo.judge(y, p, batch["label"].repeat_interleave(4))[1].mean().item())


def test_equal_rewards_leave_only_the_divergence():
    cfg = config(beta=0.0)
    model, batch = build(beta=0.0), batch_of(cfg)
    batch["label"] = torch.full_like(batch["label"], HASH)      # nobody can be right
    loss, _ = hrpo.loss_fn(model, batch, cfg)
    loss.backward()
    assert not any(p.grad.any() for part in model.parts() for p in part if p.grad is not None)


def test_k3_is_a_divergence_whose_gradient_is_that_of_the_other_one():
    """Over all words of one step: E k3 = KL(pi || ref), but its gradient with the samples fixed is
    that of KL(ref || pi)."""
    cfg = config(beta=1.0, group=2, batch_size=2)
    torch.manual_seed(0)
    z, far = torch.randn(2, V).double()
    z.requires_grad_()
    label = torch.tensor([HASH])        # every reward is 0
    value, grad = 0.0, 0.0
    for word in range(V):
        y = torch.full((2, cfg.n_new), DONE)
        y[:, 0] = word
        rest = (80 * F.one_hot(y[:, 1:], V) - 40).double()      # then both end for sure
        logits = [torch.cat([x.expand(2, 1, V), rest], dim=1) for x in (z, far)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hrpo, "judge", lambda y, p, label: (torch.zeros(2), torch.zeros(2)))
            loss, _ = hrpo.loss_fn(lambda _: (y, None, *logits), dict(label=label), cfg)
        k3 = loss * (1 if word == DONE else 2)      # 1/|y|
        p = z.softmax(-1)[word].detach()
        value, grad = value + p * k3.detach(), grad + p * torch.autograd.grad(k3, z)[0]
    logp, logq = z.log_softmax(-1), far.log_softmax(-1)
    same(value, (logp.exp() * (logp - logq)).sum().detach())
    same(grad, torch.autograd.grad((logq.exp() * (logq - logp)).sum(), z, retain_graph=True)[0])
    right = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), z)[0]
    assert (grad - right).abs().max() > 1e-2


def test_stored_mixtures_bias_the_gradient():
    """A toy of four words and three steps, all 64 answers: REINFORCE with mixtures that carry a
    gradient is the gradient of the expected reward; with constant ones it is not."""
    torch.manual_seed(0)
    gate = hrpo.ThoughtGate(config(n_embd=4)).double()
    set_lambda(gate, 0.0)
    W, M = torch.randn(2, 4, 4).double()
    M.requires_grad_()
    R = torch.rand(64).double()

    def expected(detach, mixed):
        answers, gain, total, mass = list(itertools.product(range(4), repeat=3)), 0, 0, 0
        for reward, answer in zip(R, answers):
            x, lp = torch.zeros(4).double(), 0
            for word in answer:
                p = (torch.tanh(x @ M) @ W.T).softmax(-1)
                lp = lp + p[word].log()
                p = p.detach() if detach else p
                h = F.normalize(p, dim=-1) @ W
                e = W[word]
                x = gate(e, h if mixed else e)[0] + x
            total, gain, mass = total + lp.exp() * reward, gain + lp.exp().detach() * reward * lp, \
                mass + lp.exp().detach()
        assert mass.item() == pytest.approx(1)
        return torch.autograd.grad(total if not detach else gain, M)[0]

    exact, biased = expected(False, True), expected(True, True)
    assert 0.001 < ((biased - exact).norm() / exact.norm()).item() < 0.7
    same(expected(True, False), expected(False, False))


# ---- Polls


def test_rewards_by_hand():
    label, rows = torch.tensor([2]), {
        (1, 0, 3, HASH, 2, DONE): 1,
        (HASH, 2, DONE, DONE, DONE, DONE): 1,
        (1, 0, HASH, 2, DONE, DONE): 1,
        (1, 0, 3, HASH, 1, DONE): 0,                    # wrong
        (1, 0, 3, HASH, 2, 2): 0,                       # no end
        (1, 0, 3, 3, HASH, 2): 0,                       # cut off
        (1, 2, DONE, DONE, DONE, DONE): 0,              # no #
        (HASH, HASH, 2, DONE, DONE, DONE): 0,           # two
        (1, HASH, 2, DONE, HASH, 2): 0,                 # two, as no rollout writes
        (2, HASH, 1, DONE, DONE, DONE): 0,              # right, too early
        (1, HASH, 1, 2, DONE, DONE): 0,                 # right, too late
        (1, 0, 3, 2, 1, HASH): 0}
    for row, want in rows.items():
        y, p = torch.tensor([row]), mixtures(torch.tensor([row]))
        found, chance = hrpo.judge(y, p, label)
        assert found.item() == want, row
        at = row.index(HASH) + 1 if HASH in row[:4] else None
        assert chance.item() == pytest.approx(p[0, at, 2].item() if at else 0)
    y = torch.tensor(list(rows))
    assert hrpo.judge(y, mixtures(y), label.expand(len(y)))[0].tolist() == list(rows.values())


@pytest.mark.parametrize("task", ["poll", "sure"])
def test_what_voters_think(task):
    parts = hrpo.poll_world(3, task, 6)
    voters, topic, label, pi = (torch.cat(pair) for pair in zip(parts["val"], parts["train"]))
    same(pi.sum(-1), torch.ones(len(pi), 6), atol=1e-5)
    total = pi.sum(1)
    assert torch.equal(total.argmax(1), label)
    assert (total.topk(2).values.diff() < -0.1).all()
    table = torch.full((12, 4, 4), -1.0)
    table[voters, topic] = pi
    assert torch.equal(table[voters, topic], pi) and (table >= 0).all()
    assert (voters.diff() > 0).all()
    assert len(torch.cat([voters, topic], dim=1).unique(dim=0)) == len(voters)
    best = table.argmax(-1)
    assert all(torch.bincount(best[:, t], minlength=4).tolist() == [3, 3, 3, 3] for t in range(4))
    first, second = table.topk(2).values.unbind(-1)
    if task == "sure":
        assert set(table.unique().tolist()) == {0.0, 1.0}
    else:
        assert (second <= 0.8 * first + 1e-6).all() and first.min() > 0.28 and first.max() < 0.97


def test_test_questions_are_not_among_the_trained_ones():
    seen = {}
    for split in ("train", "val"):
        parts = hrpo.poll_world(0, "poll", 3)[split]
        seen[split] = {(*row, t) for row, t in zip(parts[0].tolist(), parts[1][:, 0].tolist())}
    assert not seen["train"] & seen["val"] and len(seen["train"]) > 3 * len(seen["val"]) > 100
    for split in ("train", "val"):
        batch = batch_of(config(batch_size=400), 1, split)
        words = batch["prompt"]
        asked = {(*sorted(v - 8 for v in row[:3]), row[3] - 4) for row in words.tolist()}
        parts = hrpo.poll_world(1, "poll", 3)[split]
        known = {(*row, t) for row, t in zip(parts[0].tolist(), parts[1][:, 0].tolist())}
        assert asked <= known and len(asked) > 50 and (words[:, -1] == hrpo.GO).all()


def test_batches():
    cfg = config(group=0, batch_size=4000)
    batch, parts = batch_of(cfg), hrpo.poll_world(cfg.seed, "poll", 3)["train"]
    table = torch.zeros(12, 4, 4)
    table[parts[0], parts[1]] = parts[3]
    voters, topic = batch["prompt"][:, :3] - 8, batch["prompt"][:, 3:4] - 4
    assert torch.equal(batch["pi"], table[voters, topic])
    assert torch.equal(batch["pi"].sum(1).argmax(1), batch["label"])
    votes, hashes, answer, done = batch["targets"].split([3, 1, 1, 1], dim=1)
    assert (hashes == HASH).all() and (done == DONE).all()
    count = F.one_hot(votes, 4).sum(1)
    assert (count.gather(1, answer)[:, 0] == count.max(1).values).all()
    tie = (count == 1).sum(1) == 3      # one of three, at random
    rank = (votes < answer).sum(1)[tie]
    assert (torch.bincount(rank) / len(rank) - 1 / 3).abs().max() < 0.04
    for m in range(4):      # votes are drawn from pi
        assert ((votes == m).float() - batch["pi"][:, :, m]).mean().abs() < 0.01
    first, top = batch["pi"].argmax(-1) == votes, batch["pi"].amax(-1)
    assert first.float().mean().item() == pytest.approx(top.mean().item(), abs=0.02)
    train, val = batch_of(config()), batch_of(config(), split="val")
    assert train["noise"].shape == (4, 4, 6, V) and val["noise"].shape == (16, 1, 6, V)
    assert set(train) == set(val)
    for split in ("train", "val"):
        again, other = batch_of(config(), 5, split), batch_of(config(), 6, split)
        assert all(torch.equal(again[k], v) for k, v in batch_of(config(), 5, split).items())
        assert not torch.equal(again["noise"], other["noise"])


def test_ladder_by_brute_force():
    cfg = config(n_vote=3, seed=4)
    *_, label, pi = hrpo.poll_world(4, "poll", 3)["val"]
    found, want, n = hrpo.ladder(cfg), dict.fromkeys(hrpo.ladder(cfg), 0.0), len(label)

    def share(scores, right):
        best = [m for m in range(4) if scores[m] == max(scores)]
        return (right in best) / len(best)

    for right, rows in zip(label.tolist(), pi.tolist()):
        for votes in itertools.product(range(4), repeat=3):
            chance = math.prod(row[v] for row, v in zip(rows, votes))
            want["a sampled poll"] += chance * share([votes.count(m) for m in range(4)], right) / n
        favourites = [row.index(max(row)) for row in rows]
        count = [favourites.count(m) for m in range(4)]
        h = [sum(row[m] / math.hypot(*row) for row in rows) for m in range(4)]
        want["favourites"] += share(count, right) / n
        want["ties by h"] += (max(range(4), key=lambda m: (count[m], h[m])) == right) / n
        want["sum of h"] += (h.index(max(h)) == right) / n
    want["always the same"] = max(label.tolist().count(m) for m in range(4)) / n
    assert found == pytest.approx(want, abs=1e-5)


def test_the_ladder_of_the_default_poll_leaves_room_for_mixtures():
    for seed in (11, 12):
        steps = list(hrpo.ladder(hrpo.Config(seed=seed)).values())
        assert steps == sorted(steps) and steps[0] < 0.4 and steps[1] < 0.5 and steps[-1] > 0.9
    sure = hrpo.ladder(hrpo.Config(seed=11, task="sure"))
    assert min(list(sure.values())[1:]) == 1


# ---- Arms


def test_gains_by_hand():
    arms = {"hrpo": dict(right=dict(greedy="1110", sampled="1100")),
            "grpo": dict(right=dict(greedy="1000", sampled="0110"))}
    gain, half = hrpo.gains(arms, rivals=["grpo"])[0]
    assert gain == 0.5 and half == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    assert hrpo.gains(arms, rivals=["grpo"])[1][0] == 0
    with pytest.raises(KeyError):
        hrpo.gains(arms)


def test_arms_start_from_the_supervised_model_and_share_gates_questions_and_noise():
    models = {}
    torch.manual_seed(0)
    base = scramble(hrpo.HRPO(config(group=0, feed="token")))
    for feed in ("token", "self", "hybrid"):
        torch.manual_seed(5)
        models[feed] = hrpo.HRPO(config(feed=feed), base)
        for name, p in base.named_parameters():
            assert torch.equal(p, models[feed].get_parameter(name))
            assert torch.equal(p, models[feed].reference.get_parameter(name))
    assert models["token"].gate is None
    assert torch.equal(models["self"].gate.raw, models["hybrid"].gate.raw)
    trained = {feed: sum(p.numel() for p in model.parameters() if p.requires_grad)
               for feed, model in models.items()}
    assert trained["self"] == trained["hybrid"] > trained["token"]
    with torch.no_grad():       # what is trained is not the reference
        models["hybrid"].blocks[0].mlp.fc.weight.zero_()
    assert models["hybrid"].reference.blocks[0].mlp.fc.weight.any()


def test_evaluation_counts_answers_and_what_mixtures_hold(tmp_path, monkeypatch):
    odd = lambda y, p, label: ((y[:, 0] % 2).float(), p[:, 0, 1])   # it is never right by itself
    monkeypatch.setattr(hrpo, "judge", odd)
    cfg = config(eval_batches=2, out=str(tmp_path))
    run, model = hrpo.Run(cfg), build()
    m = hrpo.evaluate(model, cfg, run)
    y, p, label, greedy, ratios = [], [], [], [], []
    for i in range(2):
        batch = batch_of(cfg, i, "val")
        for found, noise in ((y, batch["noise"]), (greedy, 0 * batch["noise"].clamp(-9, 9))):
            rollout = model.rollout(batch["prompt"], noise)
            found.append(rollout[0])
            if found is y:
                p.append(rollout[1])
        label.append(batch["label"])
    y, p, label, greedy = map(torch.cat, (y, p, label, greedy))
    assert m["loss"] == pytest.approx(1 - hrpo.judge(y, p, label)[1].mean().item(), abs=1e-6)
    assert m["greedy"] == hrpo.judge(greedy, p, label)[0].mean().item()
    assert m["right"]["greedy"] != m["right"]["sampled"]
    assert len(m["right"]["greedy"]) == 32 and m["sampled"] == m["right"]["sampled"].count("1") / 32
    belief = p[:, :3, :4].sum(1).argmax(-1) == label
    assert m["belief"] == pytest.approx(belief.float().mean().item())
    a = model.gate(model.embed(y), model.embed(y))[1]
    for row in range(32):
        words = y[row].tolist()
        n = words.index(HASH) if HASH in words else len(words)
        ratios.append((1 - a[row, :n].mean(-1) ** 2).sqrt().mean().item() if n else 0.0)
    assert m["hidden"] == pytest.approx(sum(ratios) / 32, abs=1e-5)
    assert "hidden" not in hrpo.evaluate(build(feed="token"), cfg, run)


def test_supervised_loss_is_the_cross_entropy_of_words_alone():
    cfg = config(group=0, feed="token")
    torch.manual_seed(0)
    model, batch = scramble(hrpo.HRPO(cfg)), batch_of(config(group=0))
    loss, stats = hrpo.loss_fn(model, batch, cfg)
    x = model.embed(torch.cat([batch["prompt"], batch["targets"]], dim=1)[:, :-1])
    for block in model.blocks:
        x = block(x, model.rope)
    logits = hrpo.norm(x)[:, 4:] @ model.embed.weight.T / 4
    want = -logits.log_softmax(-1).gather(2, batch["targets"][..., None]).mean()
    close(loss, want, atol=1e-5)
    assert stats["loss"] == loss


def verdicts(arms, tmp_path):
    cfg = config(out=str(tmp_path))
    claims = hrpo.report(cfg, hrpo.Run(cfg), arms, [], hrpo.CLAIMS)["claims"]
    return {claim["claim"]: (claim["measured"], claim["verdict"]) for claim in claims}


def test_the_answer_gets_likelier_on_the_same_questions(tmp_path, monkeypatch):
    """Before training it is evaluated on as many as later for every row of the history."""
    def evaluate(model, cfg, run):
        return dict(loss=cfg.eval_batches / 10, greedy=0.5, sampled=0.5, hidden=0.5)

    cfg = config(eval_batches=3, only="grpo,hrpo", out=str(tmp_path))
    history = [dict(step=step, val_loss=loss, seconds=1) for step, loss in [(1, 0.1), (2, 0.2)]]
    monkeypatch.setattr(hrpo, "evaluate", evaluate)
    monkeypatch.setattr(hrpo, "train", lambda *_: history)
    arms = hrpo.experiment(cfg, hrpo.Run(cfg))
    assert arms["hrpo"]["start"]["loss"] == 2.4 and arms["hrpo"]["loss_0"] == 0.3
    measured, verdict = verdicts(arms, tmp_path)["C1 p of the answer, least rise"]
    assert measured == pytest.approx(0.1) and verdict == "holds"


def test_claims_on_a_gate_are_not_judged_without_one(tmp_path, monkeypatch):
    """As with --feed mean, where hrpo has none."""
    monkeypatch.setattr(hrpo, "evaluate", lambda model, cfg, run: dict(
        loss=0.5, greedy=0.5, sampled=0.5, hidden=0.5) if model.gate else dict(
            loss=0.5, greedy=0.5, sampled=0.5))
    monkeypatch.setattr(hrpo, "train", lambda *_: [dict(step=1, val_loss=0.5, seconds=1)])
    for feed, want in [("hybrid", "holds"), ("mean", "not judged"), ("token", "not judged")]:
        cfg = config(feed=feed, only="selftok,hrpo", out=str(tmp_path))
        found = verdicts(hrpo.experiment(cfg, hrpo.Run(cfg)), tmp_path)
        assert found["C4 minus gain of selftok"][1] == want
        assert (found["C4 hidden ratio, gain of hrpo"][0] is None) == (want == "not judged")


def arms_of(monkeypatch, world=1, **changes):
    """{arm: Config} of a run on so many processes."""
    found = {}

    def stop(arms, cfg, run):
        found.update(arms)
        raise KeyboardInterrupt

    monkeypatch.setattr(hrpo, "select", stop)
    with pytest.raises(KeyboardInterrupt):
        hrpo.experiment(config(**changes), argparse.Namespace(world=world))
    return found


def test_a_small_budget_leaves_a_step_of_supervised_training(monkeypatch):
    for budget, sft_steps, want in [(1, 50, 50), (0.5, 50, 25), (0.01, 50, 1), (0.0625, 1, 1)]:
        arms = arms_of(monkeypatch, budget=budget, sft_steps=sft_steps)
        assert [arms[arm].steps for arm in ("sft", "sft sure")] == [want, want]


@pytest.mark.parametrize("world, batch_size, group, fits", [
    (1, 8, 4, True), (2, 16, 4, True), (4, 16, 8, False), (2, 24, 8, False), (1, 8, 8, False),
    (2, 6, 3, False), (2, 12, 3, True), (3, 12, 4, False), (1, 12, 4, False), (3, 24, 4, True)])
def test_processes_must_get_pairs_of_questions(
        world, batch_size, group, fits, monkeypatch, capsys):
    if fits:
        assert arms_of(monkeypatch, world, batch_size=batch_size, group=group)
        return
    with pytest.raises(SystemExit) as stop:
        arms_of(monkeypatch, world, batch_size=batch_size, group=group)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and f"group={group} " in message
    assert f"must divide batch_size={batch_size}, " in message


@pytest.mark.parametrize("flags", [dict(group=1), dict(group=3), dict(n_vote=8), dict(n_vote=1),
                                   dict(r_min=0.999), dict(r_min=0.0), dict(beta=-1.0)])
def test_fields_that_do_not_fit_are_refused(flags):
    with pytest.raises(ValueError, match=next(iter(flags))):
        config(**flags)
    assert copy.copy(config(group=0)).n_new == 6


def test_a_run_without_rewards_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        hrpo.main(["--smoke", "--group", "0", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "group=0" in capsys.readouterr().err and not any(tmp_path.iterdir())
