"""Oracles of remdm.py: laws by enumeration, samplers by exact probabilities, numbers by hand."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import remdm
from tests.quick import unpainted

SMALL = dict(n_layer=2, n_head=2, n_embd=16, seq_len=16, device="cpu")
CPU = torch.device("cpu")
KEEPING = [s for s in remdm.SAMPLERS if s != "conf"]    # those that keep the share of masks
same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-10, check_dtype=False)


@pytest.fixture
def float64(monkeypatch):
    """Double precision also where the script asks for float32: the logits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def build(seed=0, **changes):
    """A model with random weights everywhere; a fresh one is zero where it matters."""
    torch.manual_seed(seed)
    model = remdm.MDLM(remdm.Config(**SMALL | changes)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def partly_masked(n, L, V, seed=0):
    """Random tokens, each row with another share of masks: from none to all."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(V, (n, L), generator=rng)
    hide = torch.rand(n, L, generator=rng) < torch.linspace(0, 1.01, n)[:, None]
    return torch.where(hide, V, x)


def all_masks(L):
    """Every non-empty set of masked positions. (2^L - 1, L)"""
    return torch.tensor(list(itertools.product([False, True], repeat=L)))[1:]


def expected_nelbo(denoise, V, strings, chance):
    """Mean NELBO per token of a denoiser, by enumeration of strings and masks: Eq. 3, integrated.

    The integral of t^(n-1) (1-t)^(L-n) is the Beta function B(n, L-n+1).
    """
    (N, L), total = strings.shape, 0.0
    for masked in all_masks(L):
        n = int(masked.sum())
        beta = math.gamma(n) * math.gamma(L - n + 1) / math.gamma(L + 1)
        z = torch.where(masked, V, strings)
        p = denoise(z).gather(-1, strings[..., None]).squeeze(-1)
        total += beta * (chance * -(p.log() * masked).sum(1)).sum() / L
    return total.item()


# ---- The relay chain by enumeration


@pytest.fixture
def few_symbols(monkeypatch):
    """A relay of three symbols, of which all sequences can be listed."""
    monkeypatch.setattr(remdm, "SYMBOLS", 3)
    monkeypatch.setattr(remdm, "JUMP", 0.3)


def relay_law(L):
    """All sequences (N, L) of the relay and their probabilities (N,), factor by factor."""
    V, e = remdm.SYMBOLS, remdm.JUMP
    strings = list(itertools.product(range(V), repeat=L))
    chance = [math.prod((1 - e) * (b == (a + 1) % V) + e / V for a, b in itertools.pairwise(s)) / V
              for s in strings]
    return torch.tensor(strings), torch.tensor(chance, dtype=torch.float64)


def posterior_by_enumeration(z, reach, strings, chance, V):
    """p(x_l | visible tokens not farther than reach) for every l. (B, T) -> (B, T, V)"""
    p = torch.zeros(*z.shape, V, dtype=torch.float64)
    for b, l in itertools.product(range(z.size(0)), range(z.size(1))):
        near = (torch.arange(z.size(1)) - l).abs() <= reach
        fits = ((strings == z[b]) | (z[b] == V) | ~near).all(1)
        p[b, l] = torch.zeros(V, dtype=torch.float64).index_add(0, strings[fits, l], chance[fits])
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("reach", [0, 1, 2, 5])
def test_relay_posterior_equals_enumeration(few_symbols, reach):
    z = partly_masked(30, 5, 3)
    p = remdm.relay_posterior(z, reach)
    same(p, posterior_by_enumeration(z, reach, *relay_law(5), 3))
    same(p[z < 3], torch.eye(3)[z[z < 3]])      # a visible token is certain


@pytest.mark.parametrize("reach", [1, 2, 3, 5, 9])
def test_relay_floor_equals_the_nelbo_by_enumeration(few_symbols, reach):
    strings, chance = relay_law(5)
    denoise = functools.partial(remdm.relay_posterior, reach=reach)
    nelbo = expected_nelbo(denoise, 3, strings, chance)
    assert remdm.relay_floor.__wrapped__(5, reach) == pytest.approx(nelbo, abs=1e-12)
    if reach >= 5:      # the chain rule in random order: the entropy itself
        entropy = -(chance * chance.log()).sum().item()
        assert 5 * nelbo == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize("reach, floor", [(1, 1.0750), (2, 0.8024), (4, 0.6422), (6, 0.5940),
                                          (8, 0.5747), (64, 0.55679)])
def test_relay_floors_of_the_default_length(reach, floor):
    assert remdm.relay_floor(64, reach) == pytest.approx(floor, abs=6e-5)


def test_relay_entropy_of_the_default_length():
    stay, other = 0.9 + 0.1 / 12, 0.1 / 12
    step = -(stay * math.log(stay) + 11 * other * math.log(other))
    assert 64 * remdm.relay_floor(64, 64) == pytest.approx(math.log(12) + 63 * step, abs=1e-10)
    assert math.log(12) + 63 * step == pytest.approx(35.634, abs=1e-3)


def test_relay_samples_follow_the_law(few_symbols):
    n, (strings, chance) = 40_000, relay_law(4)
    x = remdm.relay_sample(n, 4, torch.Generator().manual_seed(0))
    assert x.shape == (n, 4)
    code = (strings @ torch.tensor([27, 9, 3, 1])).argsort()
    found = (x @ torch.tensor([27, 9, 3, 1])).bincount(minlength=81)
    chi2 = ((found - n * chance[code]) ** 2 / (n * chance[code])).sum()
    assert chi2 < 132       # 80 degrees of freedom, p = 2e-4


def test_relay_errors_are_jumps_and_their_mean_is_the_truth():
    x = torch.tensor([[10, 11, 0, 1], [0, 0, 1, 5], [3, 2, 1, 0]])
    assert remdm.relay_errors(x).tolist() == [0, 2, 3]
    x = remdm.relay_sample(20_000, 64, torch.Generator().manual_seed(0))
    assert remdm.relay_errors(x).double().mean() == pytest.approx(5.775, abs=4 * 2.3 / 141)


# ---- Typed brackets by enumeration


@functools.cache
def bracket_law(L):
    """All balanced strings of length L and their probabilities, by walking every string."""
    k, strings, chance = remdm.TYPES, [], []
    for s in itertools.product(range(2 * k), repeat=L):
        stack, p = [], 1.0
        for token in s:
            up = 1.0 if not stack else 0.55 if len(stack) < remdm.DEPTH else 0.0
            if token < k:
                stack, p = stack + [token], p * up / k
            else:
                p *= (1 - up) * (bool(stack) and stack[-1] == token - k)
                stack = stack[:-1]
            if not p:
                break
        if p and not stack:
            strings.append(s)
            chance.append(p)
    chance = torch.tensor(chance, dtype=torch.float64)
    return torch.tensor(strings), chance / chance.sum()


def test_bracket_law_of_length_four():
    strings, chance = bracket_law(4)
    assert len(strings) == 18
    flat = strings[:, 1] >= remdm.TYPES     # ()() against (())
    assert chance[flat].sum() == pytest.approx(0.45) and chance[~flat].sum() == pytest.approx(0.55)
    assert -(chance * chance.log()).sum() == pytest.approx(2.885363, abs=1e-6)


def test_bracket_moves_have_the_known_entropy_at_length_48():
    moves, L = remdm.bracket_moves(), 48
    assert moves.shape == (6, 13, 13)
    same(moves.sum((0, 2)), torch.ones(13))
    ahead = back = [torch.eye(13, dtype=torch.float64)[0]]
    for _ in range(L):
        ahead, back = ahead + [ahead[-1] @ moves.sum(0)], [moves.sum(0) @ back[0]] + back
    Z = back[0][0]
    used = torch.einsum("ls,vst,lt->vst", torch.stack(ahead[:-1]), moves, torch.stack(back[1:])) / Z
    entropy = Z.log() - torch.where(moves > 0, used * moves.clamp(min=1e-300).log(), 0).sum()
    assert Z == pytest.approx(0.45, abs=5e-3)
    assert entropy == pytest.approx(42.1939, abs=1e-4)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.2])
def test_bracket_posterior_equals_enumeration(noise, monkeypatch):
    monkeypatch.setattr(remdm, "NOISE", noise)
    strings, chance = bracket_law(6)
    rng = torch.Generator().manual_seed(0)
    x = strings[torch.randint(len(strings), (20,), generator=rng)]
    z = torch.where(torch.rand(20, 6, generator=rng) < 0.6, 6, x)
    z = torch.cat([z, partly_masked(20, 6, 6)]) if noise else z     # contradictions, too
    p = remdm.bracket_posterior(z, 0.0)
    for row, found in zip(z, p):
        hit = (strings == row).double() * (1 - noise) + noise / 6
        weight = chance * torch.where(row == 6, 1.0, hit).prod(1)
        for l in (row == 6).nonzero().squeeze(1):
            want = torch.zeros(6, dtype=torch.float64).index_add(0, strings[:, l], weight)
            same(found[l], want / want.sum())


def test_nelbo_of_the_exact_bracket_denoiser_is_the_entropy(monkeypatch):
    monkeypatch.setattr(remdm, "NOISE", 0.0)
    denoise = functools.partial(remdm.bracket_posterior, rho=0.0)
    nelbo = expected_nelbo(denoise, 6, *bracket_law(4))
    assert 4 * nelbo == pytest.approx(2.885363, abs=1e-5)


def test_blind_denoiser_overlooks_tokens_in_proportion_to_the_masks(monkeypatch):
    z = partly_masked(9, 8, 6)
    exact, nothing = remdm.bracket_posterior(z, 0.0), torch.full_like(z, 6)
    seen = []
    for coin in (0.999999, 0.0):
        monkeypatch.setattr(torch, "rand", lambda shape: torch.full(shape, coin))
        seen.append(remdm.bracket_posterior(z, 0.6))
    same(seen[0], exact)
    some = (z == 6).any(1)      # without a mask nothing is overlooked
    same(seen[1][some], remdm.bracket_posterior(nothing, 0.0)[some])
    same(seen[1][~some], exact[~some])
    threshold = 0.6 * 0.5
    half = torch.tensor([[0, 3, 0, 3, 6, 6, 6, 6]])
    for coin, hidden in [(threshold + 1e-6, False), (threshold - 1e-6, True)]:
        monkeypatch.setattr(torch, "rand", lambda shape: torch.full(shape, coin))
        want = nothing[:1] if hidden else half
        p = remdm.bracket_posterior(half, 0.6)
        monkeypatch.setattr(torch, "rand", lambda shape: torch.ones(shape))
        same(p, remdm.bracket_posterior(want, 0.0))


def test_bracket_errors_by_a_parser():
    def violations(tokens):
        stack, wrong = [], 0
        for token in tokens:
            if token < 3 and len(stack) < 2:
                stack.append(token)
            elif token >= 3 and stack:
                wrong += stack.pop() != token - 3
            else:
                wrong += 1
        return wrong + len(stack)

    x = torch.randint(6, (200, 12), generator=torch.Generator().manual_seed(0))
    assert remdm.bracket_errors(x).tolist() == [violations(row) for row in x.tolist()]
    strings, _ = bracket_law(6)
    assert not remdm.bracket_errors(strings).any()
    valid = set(map(tuple, strings.tolist()))
    changed = [s[:i] + (v,) + s[i + 1 :] for s in valid for i in range(6) for v in range(6)]
    wrong = torch.tensor([s for s in changed if s not in valid])
    assert (remdm.bracket_errors(wrong) > 0).all()


# ---- The remasking posterior


def schedule(sampler, T, **changes):
    cfg = remdm.Config(**SMALL | dict(n_denoise=T) | changes)
    return remdm.remask_schedule(sampler, cfg)


def alphas(sampler, T, t_on=0.55, t_off=0.05, alpha_on=0.9):
    """Share of visible tokens on the grid, from the paper's piecewise formula."""
    t = torch.linspace(1, 0, T + 1, dtype=torch.float64)
    if sampler != "loop":
        return 1 - t
    rising, ending = (1 - t) * alpha_on / (1 - t_on), 1 - t * (1 - alpha_on) / t_off
    return torch.where(t > t_on, rising, torch.where(t > t_off, alpha_on, ending))


@pytest.mark.parametrize("eta", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("T", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("sampler", remdm.SAMPLERS)
def test_all_chances_are_within_bounds_and_keep_the_share_of_masks(sampler, T, eta):
    decode, sigma = schedule(sampler, T, eta=eta)
    alpha = alphas(sampler, T)
    a, b = alpha[:-1], alpha[1:]
    assert decode.shape == sigma.shape == (T,)
    assert (decode >= 0).all() and (decode <= 1).all() and (sigma >= 0).all()
    assert (a * sigma <= 1 - b + 1e-12).all() and (sigma <= 1).all()    # Eq. 6
    assert decode[-1] == 1 and sigma[-1] == 0 or sampler == "conf"
    if sampler != "conf":       # with clipped chances it would not come out
        same((1 - sigma) * a + decode * (1 - a), b)


@pytest.mark.parametrize("sampler", KEEPING)
def test_a_step_is_a_predictor_and_a_corrector(sampler):
    """Theorem 4.1: the step of MDLM from t to s, then remasking and decoding at s."""
    decode, sigma = schedule(sampler, 64, eta=0.2)
    a, b = alphas(sampler, 64)[:-2], alphas(sampler, 64)[1:-1]
    predicted, sigma = (b - a) / (1 - a), sigma[:-1]
    same(decode[:-1], predicted * (1 - sigma) + (1 - predicted) * sigma * b / (1 - b))


def test_chances_by_hand():
    decode, sigma = schedule("cap", 20, eta=0.2)    # step 6: alpha from 0.3 to 0.35
    assert sigma[6] == 0.2 and decode[6] == pytest.approx((0.35 - 0.8 * 0.3) / 0.7)
    decode, sigma = schedule("mdlm", 20, eta=0.2)
    assert sigma[6] == 0 and decode[6] == pytest.approx(0.05 / 0.7)
    decode, sigma = schedule("rescale", 20, eta=0.2)
    assert sigma[6] == pytest.approx(0.2) and sigma[16] == pytest.approx(0.2 * 0.15 / 0.8)
    decode, sigma = schedule("fb", 20)
    assert sigma[6] == pytest.approx(0.05 / 0.3) and decode[6] == pytest.approx(0.1 / 0.7)
    decode, sigma = schedule("switch", 20, t_on=0.5)
    assert not sigma[:10].any() and (sigma[10:19] == 0.05).all()
    decode, sigma = schedule("loop", 20, t_on=0.5, t_off=0.1)
    assert not sigma[:10].any() and (sigma[11:17] == 0.05).all() and not sigma[18:].any()
    same(decode[11:17], torch.full((6,), 0.05 * 0.9 / 0.1, dtype=torch.float64))


def walk(sampler, T, x, L, eta=0.2, n=2000):
    """Share of visible tokens after every step, if the denoiser knows the truth x."""
    torch.manual_seed(0)
    V = 4
    p = torch.eye(V, dtype=torch.float64)[x].expand(n, L, V)
    z, psi = torch.full((n, L), V), torch.full((n, L), math.inf, dtype=torch.float64)
    shares = []
    for decode, sigma in zip(*schedule(sampler, T, eta=eta)):
        u = torch.rand(n, L, V + 2, dtype=torch.float64)
        z, psi = remdm.reverse_step(z, psi, p, decode, sigma, u, sampler)
        assert ((z == x) | (z == V)).all()
        shares.append((z < V).double().mean().item())
    return torch.tensor(shares, dtype=torch.float64)


@pytest.mark.parametrize("sampler", remdm.SAMPLERS)
def test_share_of_masks_at_every_time(sampler):
    """Theorem 3.1. Literal conf is not a sampler of that theorem, and this test sees it."""
    T, L, n = 40, 16, 2000
    alpha = alphas(sampler, T)[1:]
    shares = walk(sampler, T, torch.arange(L) % 4, L, n=n)
    error = (shares - alpha).abs() / (alpha * (1 - alpha) / (n * L)).sqrt().clamp(min=1e-6)
    if sampler == "conf":
        assert error[:-1].max() > 20
    elif sampler == "mean-conf":        # positions depend on each other: a wider margin
        assert error.max() < 8
    else:
        assert error.max() < 4.5


@pytest.mark.parametrize("masked", [True, False])
def test_coin_and_token_have_the_law_of_the_joint_categorical(masked):
    n, decode, sigma = 200_000, torch.tensor(0.3), torch.tensor(0.2)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    z = torch.full((n, 1), 3 if masked else 1)
    u = torch.rand(n, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    new, _ = remdm.reverse_step(z, torch.ones(n, 1), p.expand(n, 1, 3), decode, sigma, u, "cap")
    law = torch.tensor([0.15, 0.09, 0.06, 0.7] if masked else [0, 0.8, 0, 0.2])
    found = new.flatten().bincount(minlength=4)
    assert not found[law == 0].any()
    chi2 = ((found - n * law) ** 2 / (n * law))[law > 0].sum()
    assert chi2 < 16.3


def test_loop_leaves_the_masked_data_law_invariant_to_first_order():
    """One step on the plateau, for two positions, three symbols and exact conditionals."""
    V, states = 3, list(itertools.product(range(4), repeat=2))
    law = torch.rand(V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    law, a = law / law.sum(), 0.9
    hide = torch.zeros(V + 1, V, dtype=torch.float64)
    hide[:V], hide[V] = a * torch.eye(V), 1 - a
    pi = (hide @ law @ hide.T).flatten()
    drift = []
    for eta in (0.08, 0.04, 0.02):
        decode, sigma = (chance[20].item() for chance in schedule("loop", 40, eta=eta))
        assert sigma == eta
        K = torch.zeros(16, 16, dtype=torch.float64)
        for i, (x, y) in enumerate(states):
            given = [law[:, y] if y < V else law.sum(1), law[x] if x < V else law.sum(0)]
            rows = []
            for token, p in zip((x, y), given):
                row = torch.zeros(4, dtype=torch.float64)
                if token == V:
                    row[:V], row[V] = decode * p / p.sum(), 1 - decode
                else:
                    row[token], row[V] = 1 - sigma, sigma
                rows.append(row)
            K[i] = torch.outer(*rows).flatten()
        drift.append((pi @ K - pi).abs().sum())
    assert drift[0] > 1e-4
    assert drift[0] / drift[1] == pytest.approx(4, abs=0.1)
    assert drift[1] / drift[2] == pytest.approx(4, abs=0.1)


def test_expected_number_of_remasks_in_the_loop():
    _, sigma = schedule("loop", 384)
    assert (sigma * alphas("loop", 384)[:-1]).sum() == pytest.approx(0.5 * 384 * 0.05 * 0.9, rel=0.03)


# ---- Confidence


def confident_step(sampler, sigma, n=60_000):
    psi = torch.tensor([0.9, math.inf, 0.2, 0.6], dtype=torch.float64).expand(n, 4)
    z = torch.tensor([1, 3, 0, 2]).expand(n, 4)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).expand(n, 4, 3)
    u = torch.rand(n, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero = torch.tensor(0.0)
    return remdm.reverse_step(z, psi, p, zero, torch.tensor(sigma), u, sampler)


@pytest.mark.parametrize("sampler, factor, sigma", [("conf", 1, 0.3), ("mean-conf", 3, 0.3),
                                                    ("mean-conf", 3, 0.9)])
def test_weights_of_confidence(sampler, factor, sigma):
    z, psi = confident_step(sampler, sigma)
    weight = [math.exp(-c) for c in (0.9, 0.2, 0.6)]
    want = [min(1, factor * sigma * w / sum(weight)) for w in weight]
    rate = (z == 3).double().mean(0)
    assert rate[1] == 1         # a mask stays one
    for found, chance in zip(rate[[0, 2, 3]], want):
        assert abs(found - chance) <= 4 * math.sqrt(chance * (1 - chance) / len(z)) + 1e-12
    assert rate[2] > rate[3] > rate[0]      # the least confident goes first
    assert psi[z == 3].isinf().all() and not psi[z < 3].isinf().any()


@pytest.mark.parametrize("sampler", ["conf", "mean-conf"])
def test_confidence_when_all_is_masked(sampler):
    z, psi = torch.full((5, 4), 3), torch.full((5, 4), math.inf, dtype=torch.float64)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).expand(5, 4, 3)
    u = torch.rand(5, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, psi = remdm.reverse_step(z, psi, p, torch.tensor(0.5), torch.tensor(0.9), u, sampler)
    assert not psi.isnan().any() and torch.equal(psi.isinf(), z == 3)
    same(psi[z < 3], p[0, 0][z[z < 3]])     # the probability of the token that was drawn


# ---- Drawing


def test_float64_noise_reaches_odds_that_float32_noise_cannot():
    p = torch.tensor([1 - 1e-10, 1e-10], dtype=torch.float64).view(1, 1, 2)
    z, psi, one = torch.full((1, 1), 2), torch.zeros(1, 1), torch.tensor(1.0)
    for bits, winner in [(24, 0), (53, 1)]:
        low, high = 2.0**-bits, 1 - 2.0**-bits      # the extremes that such noise can take
        u = torch.tensor([0, 0, low, high], dtype=torch.float64).view(1, 1, 4)
        token, _ = remdm.reverse_step(z, psi, p, one, 0 * one, u, "mdlm")
        assert token.item() == winner


def test_the_sampler_draws_in_float64(monkeypatch):
    kinds, step = [], remdm.reverse_step

    def spy(z, psi, p, decode, sigma, u, sampler):
        kinds.append((psi.dtype, p.dtype, u.dtype, decode.dtype, sigma.dtype))
        return step(z, psi, p, decode, sigma, u, sampler)

    monkeypatch.setattr(remdm, "reverse_step", spy)
    draw("cap", lambda z: torch.full((*z.shape, 12), 1 / 12))
    assert {kind for row in kinds for kind in row} == {torch.float64}


def test_nucleus_by_hand():
    p = torch.tensor([0.3, 0.5, 0.05, 0.15], dtype=torch.float64)
    same(remdm.nucleus(p, 0.9), torch.tensor([0.375, 0.625, 0, 0]))     # 0.95 would be too much
    same(remdm.nucleus(p, 0.1), torch.tensor([0.0, 1, 0, 0]))
    sure = torch.eye(4)[None]
    assert torch.equal(remdm.nucleus(sure, 0.9), sure)
    rows = torch.rand(5, 7, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for row, kept in zip(rows.flatten(0, 1), remdm.nucleus(rows, 0.6).flatten(0, 1)):
        order = sorted(range(4), key=lambda v: -row[v])
        n = max(1, sum(float(row[order[: i + 1]].sum()) <= 0.6 for i in range(4)))
        want = torch.tensor([row[v] if v in order[:n] else 0.0 for v in range(4)])
        torch.testing.assert_close(kept, want / want.sum())


# ---- The sampler


def draw(sampler, denoise, V=12, **changes):
    cfg = remdm.Config(**SMALL | dict(n_denoise=24, n_sample=50) | changes)
    return remdm.reverse_process(denoise, V, sampler, cfg, CPU)


exact = functools.partial(remdm.relay_posterior, reach=16)


@pytest.mark.parametrize("sampler", ["cap", "rescale", "switch", "conf", "mean-conf"])
def test_without_remasking_all_samplers_are_mdlm(sampler):
    x, nfe = draw("mdlm", exact)
    y, calls = draw(sampler, exact, eta=0.0)
    assert torch.equal(x, y) and nfe == calls
    assert not torch.equal(x, draw(sampler, exact, eta=0.3)[0])


@pytest.mark.parametrize("sampler", remdm.SAMPLERS)
def test_calls_are_saved_and_nothing_else_changes(sampler, monkeypatch):
    """Against a loop that calls the denoiser for all sequences in all steps, with equal noise."""
    rows, V = [], 12

    def denoise(z):
        rows.append(len(z))
        assert (z == V).any(1).all()
        return exact(z)

    x, nfe = draw(sampler, denoise, eta=0.2)
    cfg = remdm.Config(**SMALL | dict(n_denoise=24, n_sample=50, eta=0.2))
    torch.manual_seed(cfg.seed)
    z, psi = torch.full((50, 16), V), torch.full((50, 16), math.inf, dtype=torch.float64)
    changes = 0
    for decode, sigma in zip(*remdm.remask_schedule(sampler, cfg)):
        u = torch.rand(50, 16, V + 2, dtype=torch.float64)
        new, psi = remdm.reverse_step(z, psi, exact(z), decode, sigma, u, sampler)
        changes += ((z == V) & (new < V)).any(1).sum().item()
        z = new
    assert torch.equal(x, z) and (x < V).all()
    assert sum(rows) == changes and nfe == changes / 50 and nfe <= 24


def test_calls_of_mdlm():
    T, L, n = 20, 16, 2000
    _, nfe = draw("mdlm", exact, n_denoise=T, n_sample=n)
    assert nfe == pytest.approx(T * (1 - (1 - 1 / T) ** L), abs=0.12)


def test_mdlm_with_an_exact_denoiser_samples_the_law(few_symbols):
    n, (strings, chance) = 4000, relay_law(3)
    denoise = functools.partial(remdm.relay_posterior, reach=3)
    for sampler in ("mdlm", "cap"):
        x, _ = draw(sampler, denoise, V=3, seq_len=3, n_denoise=300, n_sample=n, eta=0.01)
        found = (x @ torch.tensor([9, 3, 1])).bincount(minlength=27)
        want = n * chance[(strings @ torch.tensor([9, 3, 1])).argsort()]
        assert ((found - want) ** 2 / want).sum() < 60      # 26 degrees of freedom, p = 2e-4


def test_nucleus_in_the_sampler():
    x, _ = draw("mdlm", exact, top_p=0.5, n_denoise=300)
    y, _ = draw("mdlm", exact, n_denoise=300)
    likely, all_of_them = (remdm.relay_errors(samples).double().mean() for samples in (x, y))
    assert likely < 0.2 * all_of_them


def test_seed_alone_decides_what_is_sampled():
    samples = []
    for noise, seed in [(1, 1), (2, 1), (2, 2)]:
        torch.manual_seed(noise)
        samples.append(draw("cap", exact, seed=seed)[0])
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


def test_all_steps_share_one_compiled_graph():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(remdm.reverse_step, fullgraph=True, dynamic=False, backend=counting)
    z, psi = torch.full((3, 16), 12), torch.full((3, 16), math.inf, dtype=torch.float64)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for decode, sigma in zip(*schedule("mean-conf", 6, eta=0.2)):
            u = torch.rand(3, 16, 14, dtype=torch.float64)
            arguments = z, psi, exact(z), decode, sigma, u, "mean-conf"
            for a, b in zip(step(*arguments), remdm.reverse_step(*arguments), strict=True):
                assert torch.equal(a, b)
            z, psi = step(*arguments)
    assert len(graphs) == 1


# ---- The network


def test_visible_tokens_are_carried_over_and_masks_never_predicted(float64):
    model, z = build(), partly_masked(20, 16, 12)
    logp = model(z)
    assert logp.shape == (20, 16, 12)
    same(logp.exp().sum(-1), torch.ones(20, 16))
    assert torch.equal(logp.exp()[z < 12], torch.eye(12, dtype=torch.float64)[z[z < 12]])
    assert (logp[z == 12] > -math.inf).all()


def test_no_gradient_at_visible_tokens():
    model, x, z = build(), partly_masked(1, 16, 12).expand(20, 16), partly_masked(20, 16, 12)
    grads = []
    model.head.register_full_backward_hook(lambda m, i, o: grads.append(o[0]))
    weight = torch.ones(20, dtype=torch.float64)
    remdm.loss_fn(model, {"idx": z, "targets": x, "weight": weight}, None)[0].backward()
    assert not grads[0][z < 12].any() and (grads[0][z == 12] != 0).all()


@pytest.mark.parametrize("window, n_layer", [(1, 2), (2, 2), (1, 3), (0, 2)])
def test_a_prediction_looks_as_far_as_the_reach_and_no_farther(window, n_layer):
    model, z, at = build(window=window, n_layer=n_layer), torch.full((1, 16), 12), 7
    z[:, [3, 5, 9, 12]] = torch.tensor([1, 2, 3, 4])
    base = model(z)[0, at]
    reach = window * n_layer if window else 16
    for other in range(16):
        if other != at:
            changed = z.clone()
            changed[0, other] = (z[0, other] + 5) % 13
            equal = torch.equal(model(changed)[0, at], base)
            assert equal == (abs(other - at) > reach), other


def test_attention_is_not_causal_and_positions_count():
    model = build(window=0)
    z = torch.full((1, 16), 12)
    z[0, 2], z[0, 9] = 3, 5
    flipped = model(z.flip(1)).flip(1)
    assert (model(z)[0, 0] - model(z)[0, 1]).abs().max() > 1e-3
    assert (flipped - model(z))[z == 12].abs().max() > 1e-3


def test_every_parameter_is_clipped_once():
    model = build()
    clipped = sorted(id(p) for part in model.parts() for p in part)
    assert clipped == sorted(id(p) for p in model.parameters())


# ---- Objective and batches


def test_objective_by_hand(float64):
    model, batch = build(), remdm.make_batch(remdm.Config(**SMALL, batch_size=32), "train", 0)
    batch["weight"] = batch["weight"].double()
    loss, stats = remdm.loss_fn(model, batch, None)
    logp, total = model(batch["idx"]), 0
    for b in range(32):
        hidden = (batch["idx"][b] == 12).nonzero().squeeze(1).tolist()
        nll = -sum(logp[b, l, batch["targets"][b, l]] for l in hidden)
        total += 16 / len(hidden) * nll / 16 / 32
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    assert torch.equal(stats["loss"], loss.detach())


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.1])
def test_weight_of_the_log_linear_schedule(eps):
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    Sigma = -torch.log(1 - (1 - eps) * t.clamp(max=1 - 1e-9))
    slope, = torch.autograd.grad(Sigma[:-1].sum(), t)
    same((slope / torch.expm1(Sigma))[:-1].detach() * t[:-1].detach(), torch.ones(49))


@pytest.mark.parametrize("L", [4, 7])
def test_counting_masks_is_the_integral_over_time(L):
    """Eq. 4 = Eq. 3: chance times weight of every set of n masks is the integral over t."""
    point, weight = np.polynomial.legendre.leggauss(L + 1)
    t, weight = (point + 1) / 2, weight / 2
    for n in range(1, L + 1):
        integral = (weight * t ** (n - 1) * (1 - t) ** (L - n)).sum()
        assert 1 / L / math.comb(L, n) * L / n == pytest.approx(integral, rel=1e-12)


def test_masks_have_uniform_counts_and_positions():
    batch = remdm.make_batch(remdm.Config(**SMALL, batch_size=16 * 500), "train", 3)
    masked = batch["idx"] == 12
    count = masked.sum(1)
    assert torch.equal(batch["idx"][~masked], batch["targets"][~masked])
    torch.testing.assert_close(batch["weight"] * count, torch.full((8000,), 16.0))
    assert count.bincount(minlength=17).tolist() == [0] + [500] * 16    # stratified: exactly
    rate = masked.double().mean(0)
    assert ((rate - 17 / 32).abs() < 4 * 0.5 / math.sqrt(8000)).all()
    pairs = (masked[:, :-1] & masked[:, 1:])[count == 4].double().mean()
    assert pairs == pytest.approx(4 * 3 / 16 / 15, abs=0.02)


def test_a_batch_is_a_function_of_seed_split_and_step():
    cfg, other = (remdm.Config(**SMALL, seed=seed) for seed in (1, 2))
    batches = []
    for noise, config in enumerate([cfg, cfg, other]):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        batches.append({(split, step): remdm.make_batch(config, split, step)["idx"]
                        for split in ("train", "val") for step in (0, 1)})
        assert torch.equal(torch.get_rng_state(), state)
    first, again, another_seed = batches
    assert all(torch.equal(first[key], again[key]) for key in first)
    for split in ("train", "val"):
        assert not torch.equal(first[split, 0], first[split, 1])
        assert torch.equal(first[split, 0], another_seed[split, 0]) == (split == "val")


def test_the_estimate_of_an_exact_denoiser_is_unbiased():
    cfg = remdm.Config(**SMALL, batch_size=8192)
    batch = remdm.make_batch(cfg, "train", 0)
    for reach in (1, 2, 16):
        nelbo = remdm.sequence_nelbo(remdm.relay_posterior(batch["idx"], reach).log(), batch)
        error = nelbo.mean() - remdm.relay_floor(16, reach)
        assert abs(error) < 4 * nelbo.std() / math.sqrt(8192)


# ---- Evaluation


def test_control_variate_takes_out_what_the_controls_explain():
    rng = torch.Generator().manual_seed(0)
    controls = torch.randn(400, 2, dtype=torch.float64, generator=rng)
    noise = torch.randn(400, dtype=torch.float64, generator=rng)
    mean, se = remdm.control_variate(3 + controls @ torch.tensor([2.0, -1], dtype=torch.float64),
                                     controls)
    assert mean == pytest.approx(3, abs=1e-12) and se == pytest.approx(0, abs=1e-12)
    mean, se = remdm.control_variate(3 + noise, 0 * controls)
    assert mean == pytest.approx(3 + noise.mean().item(), abs=1e-12)
    assert se == pytest.approx(noise.std().item() / 20, rel=0.01)


def test_standard_error_of_the_control_variate_is_right():
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(300):
        controls = torch.randn(50, 3, dtype=torch.float64, generator=rng)
        noise = torch.randn(50, dtype=torch.float64, generator=rng)
        found.append(remdm.control_variate(controls.sum(1) + noise, controls))
    mean, se = torch.tensor(found).T
    assert mean.std() == pytest.approx(se.mean().item(), rel=0.15)
    assert abs(mean.mean()) < 4 * mean.std() / math.sqrt(300)


def test_evaluation_of_an_exact_denoiser_is_its_floor(tmp_path):
    cfg = remdm.Config(**SMALL, batch_size=64, eval_batches=2, out=str(tmp_path))
    run = remdm.Run(cfg)
    for reach in (2, 8):
        metrics = remdm.evaluate(lambda z: remdm.relay_posterior(z, reach).log(), cfg, run)
        assert metrics["loss"] == pytest.approx(remdm.relay_floor(16, reach), abs=1e-9)
        assert metrics["loss_se"] < 1e-9
    metrics = remdm.evaluate(lambda z: remdm.relay_posterior(z, 3).log(), cfg, run)
    error = metrics["loss"] - remdm.relay_floor(16, 3)
    assert abs(error) < 4 * metrics["loss_se"] and metrics["loss_se"] < 0.02


def test_samples_are_measured_as_described(tmp_path):
    cfg = remdm.Config(**SMALL, n_denoise=16, n_sample=8, out=str(tmp_path))
    rows = remdm.sample_all({"exact": exact}, ["mdlm", "cap"], cfg, remdm.Run(cfg))
    assert list(rows) == [f"exact {s} {T}" for s in ("mdlm", "cap") for T in (2, 4, 8, 16)]
    x, nfe = draw("cap", exact, n_denoise=8, n_sample=8)
    errors = [sum((b - a) % 12 != 1 for a, b in itertools.pairwise(row)) for row in x.tolist()]
    mean = sum(errors) / 8
    windows = [tuple(row[i : i + 8]) for row in x.tolist() for i in range(9)]
    want = dict(nfe=nfe, errors=mean, truth=15 * 0.1 * 11 / 12, faultless=errors.count(0) / 8,
                se=math.sqrt(sum((e - mean) ** 2 for e in errors) / 8 / 8),
                distinct=len(set(windows)) / len(windows))
    for name, value in want.items():
        assert rows["exact cap 8"][name] == pytest.approx(value, abs=1e-12), name


# ---- Bad input


@pytest.mark.parametrize("flags", [dict(t_on=0.05), dict(t_off=0.6), dict(eta=1.1), dict(top_p=1.5),
                                   dict(rho=2.0), dict(alpha_on=0.0), dict(n_sample=0),
                                   dict(t_off=0.0), dict(seq_len=1), dict(seed=0)], ids=str)
def test_wrong_values_are_refused(flags):
    """With t_off 0 the loop ends with masks; seed 0 would train on the validation's batches."""
    with pytest.raises(ValueError, match=next(iter(flags))):
        remdm.Config(**flags)


def test_a_loop_that_ends_before_it_begins_is_called_by_name():
    with pytest.raises(ValueError, match="^t_off=0.6 "):
        remdm.Config(t_off=0.6)


@pytest.mark.parametrize("mode", ["--lab", "--no-lab"])
def test_shortest_sequences_and_one_step(mode, tmp_path):
    """With one length T nothing can be compared, and no claim is made of jumps."""
    flags = ["--smoke", mode, "--seq_len", "2", "--n_denoise", "1", "--out", str(tmp_path)]
    with unpainted():
        claims = remdm.main(flags)["claims"]
    measured = [claim["measured"] for claim in claims if claim["claim"][:2] != "C0"]
    assert measured == [None] * 6


# ---- Claims and the lab


def test_claims_by_hand():
    """The verdicts follow from four mean numbers of jumps per sampler."""
    jumps = {"network mdlm": [16, 15, 15, 14], "network fb": [15, 14, 13, 12],
             "network cap": [12, 10, 11, 7], "exact mdlm": [7, 6, 6, 5], "exact cap": [7, 6, 5, 4.5],
             "exact loop": [9, 7, 7, 7], "exact mean-conf": [6, 5, 5, 4]}
    arm = {f"{name} {T}": value for name, values in jumps.items()
           for T, value in zip((64, 128, 256, 512), values)}
    arms = {"mdlm": arm | dict(loss=0.81, floor=0.80, loss_se=0.002, excess=0.0125)}
    measured = [measure(arms) for _, measure, _, _ in remdm.CLAIMS]
    assert measured == pytest.approx([5, 0.0125, 14 / 16, 0.5, 1, 0.8, 0.5, 4])


def test_no_claim_is_made_of_samples_without_jumps():
    arm = {f"{kind} {sampler} {T}": 0.0 for kind in ("network", "exact")
           for sampler in remdm.SAMPLERS for T in (64, 128, 256, 512)}
    for _, measure, _, _ in remdm.CLAIMS[2:]:
        with pytest.raises(LookupError):
            measure({"mdlm": arm})


def test_claims_that_name_a_number_of_steps_are_of_no_other():
    lengths = (128, 256, 512, 1024)
    arm = {f"{kind} {sampler} {T}": 1.0 for kind in ("network", "exact")
           for sampler in remdm.SAMPLERS for T in lengths}
    for _, measure, _, _ in remdm.CLAIMS[2:]:
        with pytest.raises(LookupError):
            measure({"mdlm": arm})


@pytest.mark.parametrize("lab, what", [(False, "jumps"), (True, "violations")])
def test_axes_say_what_is_counted(lab, what, monkeypatch, tmp_path):
    drawn, Figure = [], remdm.Figure
    monkeypatch.setattr(remdm, "Figure", lambda **how: drawn.append(Figure(**how)) or drawn[-1])
    cfg = remdm.Config(lab=lab, out=str(tmp_path), device="cpu")
    row = dict(nfe=9, errors=2.0, se=0.1, truth=1.0, seconds=1.0)
    rows = {f"exact {sampler} 512": row for sampler in ("mdlm", "cap")}
    results = {"arms": {"mdlm": {"samples": rows}}, "environment": {"device": "cpu"}}
    with unpainted():
        remdm.plot(cfg, remdm.Run(cfg), results)
    panel = drawn[0].axes[0]
    assert panel.get_ylabel() == f"{what} per sequence"
    assert f"changes {what} by +0.0" in panel.get_title()
    assert panel.get_legend().get_title().get_text().startswith(f"{what} and seconds")
    assert "truth: the goal" in panel.get_legend_handles_labels()[1]


def test_a_window_beyond_the_sequence_costs_no_memory(tmp_path):
    """The floor has a table of the square of the reach, which without a window is the length."""
    floors = []
    for window in ("16", "1000000", "0"):
        with unpainted():
            flags = ["--smoke", "--window", window, "--out", str(tmp_path / window)]
            floors.append(remdm.main(flags)["arms"]["mdlm"]["floor"])
    assert floors[1:] == pytest.approx(floors[:1] * 2, rel=1e-9)
    assert floors[0] < 0.99 * remdm.relay_floor(16, 1)


def test_an_undertrained_network_is_called_void(tmp_path, monkeypatch, capsys):
    with unpainted():
        results = remdm.main(["--smoke", "--out", str(tmp_path)])
    monkeypatch.setattr(remdm, "experiment", lambda cfg, run: results["arms"])
    for results["arms"]["mdlm"]["excess"], void in (0.0099, False), (0.0101, True):
        capsys.readouterr()
        with unpainted():
            remdm.main(["--smoke", "--out", str(tmp_path)])
        assert ("void: the network is undertrained" in capsys.readouterr().out) == void


def test_the_lab_trains_nothing_and_samples_brackets(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remdm, "train", None)
    flags = ["--smoke", "--lab", "--full", "--seq_len", "17", "--n_denoise", "8"]
    results = remdm.main([*flags, "--out", str(tmp_path)])
    assert list(results["arms"]) == ["mdlm"]    # it would be the same for every window
    rows = results["arms"]["mdlm"]["samples"]
    assert {name.split()[0] for name in rows} == {"blind", "sharp"}
    assert {name.split()[1] for name in rows} == set(remdm.SAMPLERS)
    assert all(row["truth"] == 0 for row in rows.values())
    assert {claim["measured"] for claim in results["claims"]} == {None}
