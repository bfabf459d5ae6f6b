"""Oracles of llada.py: bounds by enumeration, sampler laws with exact predictors, numbers by hand."""

import functools
import hashlib
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import llada
from llada import BOS, EOS

SMALL = dict(n_layer=2, n_head=2, n_embd=16, seq_len=17, prompt=4, device="cpu", batch_size=16)
same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-9, check_dtype=False)


@pytest.fixture
def float64(monkeypatch):
    """Double precision also where the script asks for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(seed=0, V=None, **changes):
    """A model with random weights everywhere; a fresh one is zero where it matters."""
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        if V:
            patch.setattr(llada, "vocabulary", lambda cfg: V)
        model = llada.LLaDA(llada.Config(**SMALL | changes)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


class Stub:
    """A network that is a function from sequences to logits."""

    def __init__(self, V, logits):
        self.head, self.forward = SimpleNamespace(out_features=V), logits

    __call__ = property(lambda self: self.forward)


def config(**changes):
    return llada.Config(**SMALL | dict(temp=1.0) | changes)


def strings(V, L):
    """All strings of length L behind BOS. (V^L, 1 + L)"""
    return F.pad(torch.tensor(list(itertools.product(range(V), repeat=L))), (1, 0), value=BOS)


# ---- A two-state chain and its exact predictor

STAY = 0.9


def chain_law(x):
    """p(x) of a chain that starts anywhere and keeps its state with probability STAY. (N,)"""
    moved = x[:, 2:] != x[:, 1:-1]
    return 0.5 * torch.where(moved, 1 - STAY, STAY).double().prod(1)


def posterior(strings, chance, mask):
    """The exact predictor of a law that is given as a list of strings."""
    def logits(z):
        fits = ((z[:, None] == strings) | (z[:, None] == mask)).all(2) * chance     # (N, S)
        p = torch.einsum("ns,stv->ntv", fits, F.one_hot(strings, mask).double())
        return (p / p.sum(2, keepdim=True)).round(decimals=12).log()    # ties are ties
    return logits


def chain(L=4):
    x = strings(2, L)
    return x, chain_law(x), Stub(2, posterior(x, chain_law(x), 2))


def drawn(stub, L, n=20_000, **changes):
    """The law of n samples of the chain's length, as a list of frequencies, and the samples."""
    torch.manual_seed(0)
    idx = torch.zeros(n, 1, dtype=torch.long)
    x, when, calls = llada.diffuse(stub, idx, L, config(**changes))
    code = (x[:, 1:] * 2 ** torch.arange(L).flip(0)).sum(1)
    return code.bincount(minlength=2**L) / n, x, when, calls


def enumerated(stub, L, counts):
    """The law of low-confidence sampling: all draws at all masks, ties to the left."""
    law = {(BOS, *[2] * L): 1.0}
    for n in counts:
        after = {}
        for state, chance in law.items():
            p = stub.forward(torch.tensor([state])).exp()[0]
            free = [i for i, v in enumerate(state) if v == 2]
            for y in itertools.product(range(2), repeat=len(free)):
                sure = [p[i, v].item() for i, v in zip(free, y)]
                new = list(state)
                for k in sorted(range(len(free)), key=lambda k: -sure[k])[:n]:
                    new[free[k]] = y[k]
                after[tuple(new)] = after.get(tuple(new), 0) + chance * math.prod(sure)
        law = after
    return torch.tensor([law.get((BOS, *s), 0.0) for s in itertools.product(range(2), repeat=L)])


@pytest.mark.parametrize("remasking, counts, distance", [
    ("random", [1, 1, 1, 1], 0.0), ("random", [2, 2], 0.3109), ("random", [4], 0.6040),
    ("low-confidence", [4], 0.6040), ("low-confidence", [1, 1, 1, 1], 0.1775),
    ("low-confidence", [2, 2], 0.4320)])
def test_law_of_the_sampler_with_an_exact_predictor(remasking, counts, distance):
    """Revealing one token at a time in random order samples p; several at once, or those it is
    surest of, do not. The distances are total variations, by enumeration."""
    _, law, stub = chain()
    found, *_ = drawn(stub, 4, remasking=remasking, n_denoise=len(counts))
    assert (found - law).abs().sum() / 2 == pytest.approx(distance, abs=0.015)
    if remasking == "low-confidence":
        want = enumerated(stub, 4, counts)
        assert (want - law).abs().sum() / 2 == pytest.approx(distance, abs=1e-3)
        assert (found - want).abs().sum() / 2 < 0.015


def test_guidance_moves_away_from_what_is_said_without_the_prompt():
    """Logits (2, 0) with the prompt and (3, 0) without: weight 3 turns the choice around."""
    seen = []

    def logits(z):
        seen.append(z.clone())
        blind = (z[:, 1] == 2).double()[:, None, None]
        return (torch.tensor([2.0, 0.0]) + blind * torch.tensor([1.0, 0.0])).expand(*z.shape, 2)

    for guidance, token, calls in [(0.0, 0, 1), (1.0, 0, 2), (3.0, 1, 2)]:
        seen.clear()
        idx = torch.tensor([[0, 1]])
        x, _, nfe = llada.diffuse(Stub(2, logits), idx, 1, config(temp=0.0, guidance=guidance))
        assert x[0].tolist() == [0, 1, token] and nfe == calls == len(seen)
    assert [z[0].tolist() for z in seen] == [[0, 1, 2], [0, 2, 2]]      # the start token stays


def test_confidence_of_what_was_drawn_biases_the_choice():
    logits = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.6, 0.4]]], dtype=torch.float64).log()
    found, *_ = drawn(Stub(2, lambda z: logits.expand(len(z), -1, -1)), 2, n_denoise=2)
    assert found[0] + found[1] == pytest.approx(0.99, abs=0.004)


@pytest.mark.parametrize("steps, valid", [(1, 0.125), (4, 1.0)])
def test_tokens_that_are_drawn_at_once_do_not_know_of_each_other(steps, valid):
    two = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    stub = Stub(2, posterior(two, torch.ones(2, dtype=torch.float64), 2))
    found, *_ = drawn(stub, 4, n_denoise=steps, remasking="random")
    assert found[0] + found[-1] == pytest.approx(valid, abs=0.01)


# ---- The bound


def permuted(monkeypatch, x, cfg, V):
    """For every order of the tokens: masked sequences and weights that tell them one by one."""
    L, answer = x.size(1) - 1, (torch.arange(x.size(1)) > 0).expand_as(x)
    for order in itertools.permutations(range(L)):
        noise = torch.tensor([0, *order]).double().expand(x.shape) / L
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: noise.clone())
            draws = [masking(x, answer, V, "order", torch.full((len(x),), (k + 0.5) / L), None)
                     for k in range(L)]
        yield [(z, weight / L) for z, weight in draws]


def masking(x, answer, V, law, u, rng):
    """mask_tokens for a vocabulary of V."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llada, "vocabulary", lambda cfg: V)
        return llada.mask_tokens(x, answer, config(), law, u, rng)


def nats(logits, x, draws):
    """The sum over draws of weighted losses, per sequence."""
    with torch.no_grad():
        return sum((F.cross_entropy(logits(z).mT, x, reduction="none") * w).sum(1) for z, w in draws)


def subsets(x, V, logits):
    """Eq. 2 integrated over t: the sum over all sets of masks, with weights 1 / (l C(L, l))."""
    L, total = x.size(1) - 1, 0.0
    for hide in itertools.product([False, True], repeat=L):
        if any(hide):
            hide = torch.tensor([False, *hide])
            nll = F.cross_entropy(logits(torch.where(hide, V, x)).detach().mT, x, reduction="none")
            l = int(hide.sum())
            total = total + (nll * hide).sum(1) / l / math.comb(L, l)
    return total


def test_weights_of_the_sets_are_those_of_the_integral():
    found = [1 / (l * math.comb(4, l)) for l in (1, 2, 3, 4)]
    assert found == pytest.approx([1 / 4, 1 / 12, 1 / 12, 1 / 4])


def test_orders_counts_and_rates_estimate_the_same_bound(monkeypatch, float64):
    V, L = 3, 4
    model, x, cfg = build(V=V, seq_len=5, prompt=1), strings(V, L)[::7], config(seq_len=5, prompt=1)
    want = subsets(x, V, model) / L
    orders = [nats(model, x, draws) for draws in permuted(monkeypatch, x, cfg, V)]
    same(sum(orders) / len(orders), want)
    answer, counted = (torch.arange(5) > 0).expand_as(x), []
    for order in itertools.permutations(range(L)):
        noise = torch.tensor([0, *order]).double().expand(x.shape) / L
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: noise.clone())
            for l in range(L):
                u = torch.full((len(x),), (l + 0.5) / L)
                counted.append(nats(model, x, [masking(x, answer, V, "count", u, None)]))
    same(sum(counted) / len(counted), want)
    rng, n = torch.Generator().manual_seed(0), 20_000
    many, rate = x[3:4].expand(n, -1), None
    u = (torch.arange(n) + torch.rand(n, generator=rng)) / n
    draw = masking(many, answer[:1].expand(n, -1), V, "rate", u, rng)
    rate = nats(model, many, [draw])
    assert rate.mean() == pytest.approx(want[3].item(), abs=5 * rate.std().item() / math.sqrt(n))


def test_probabilities_of_all_strings_add_up_to_one_and_the_bound_is_one(monkeypatch, float64):
    """p of the sampler in random order; a network that leaks what it is to tell breaks this."""
    V, x = 3, strings(3, 3)
    model, cfg, p, bound = build(V=V, seq_len=4, prompt=1), config(seq_len=4, prompt=1), 0, 0
    for draws in permuted(monkeypatch, x, cfg, V):
        nll = nats(model, x, draws) * 3
        p, bound = p + (-nll).exp() / 6, bound + nll / 6
    assert p.sum() == pytest.approx(1, abs=1e-9)
    assert (bound >= -p.log() - 1e-12).all() and (bound - -p.log()).max() > 1e-3


def test_bound_of_an_exact_predictor_is_tight_for_every_text_in_every_order(monkeypatch, float64):
    x, law, stub = chain()
    for draws in permuted(monkeypatch, x, config(seq_len=5, prompt=1), 2):
        same(nats(stub.forward, x, draws) * 4, -law.log())


def test_a_network_that_knows_nothing_has_no_variance_by_counts_and_much_by_rates():
    x, V, n = torch.zeros(4000, 9, dtype=torch.long), 5, 4000
    answer, u = (torch.arange(9) > 0).expand_as(x), torch.arange(n) / n
    flat = lambda z: torch.zeros(*z.shape, V, dtype=torch.float64)
    for law in ("count", "rate"):
        rng = torch.Generator().manual_seed(0)
        found = nats(flat, x, [masking(x, answer, V, law, u, rng)])
        if law == "count":
            torch.testing.assert_close(found, torch.full((n,), math.log(V), dtype=torch.float64))
        else:
            assert found.std() > 0.5
            assert found.mean() == pytest.approx(math.log(V), abs=5 * found.std().item() / math.sqrt(n))


# ---- The masking process


def test_counts_at_random_rates_are_uniform_and_only_answers_are_masked():
    n, L, rng = 33_000, 32, torch.Generator().manual_seed(0)
    x, answer = torch.ones(n, L + 3, dtype=torch.long), (torch.arange(L + 3) > 2).expand(n, -1)
    z, weight = masking(x, answer, 7, "rate", torch.rand(n, generator=rng), rng)
    masked = z == 7
    assert torch.equal(masked, weight > 0) and not masked[:, :3].any() and (z[~masked] == 1).all()
    found = masked.sum(1).bincount(minlength=L + 1)
    assert ((found - n / 33) ** 2 / (n / 33)).sum() < 68     # 32 degrees of freedom, p = 2e-4


@pytest.mark.parametrize("L, B", [(8, 16), (4, 8), (12, 8), (6, 4), (32, 5)])
def test_every_row_gets_every_count_equally_often(L, B, monkeypatch):
    """The official rounding of evenly spread counts takes even ones three times as often."""
    x, answer = torch.zeros(B, L + 1, dtype=torch.long), (torch.arange(L + 1) > 0).expand(B, -1)
    counts = torch.zeros(B, L + 1)
    shifts = (torch.arange(24 * L) + 0.5) / (24 * L)
    for shift in shifts:
        u = (torch.arange(B) / B + shift) % 1
        z, _ = masking(x, answer, 1, "count", u, torch.Generator())
        counts[torch.arange(B), z.sum(1)] += 1
    assert (counts[:, 1:] == 24).all()
    official = torch.zeros(9)
    for k in range(1, 9):
        spread = torch.linspace(k, k + 15 * 8 / 16, 16).round().long()
        official += ((spread - 1) % 8 + 1).bincount(minlength=9)
    assert official[2::2].sum() == 3 * official[1::2].sum()


def test_loss_by_hand_for_questions_and_statements(float64):
    """The prompt is never masked; each row counts the same; the EOS behind an answer are answers."""
    cfg = config(source="facts", seq_len=8, batch_size=64)
    model, batch = build(source="facts", seq_len=8), llada.make_batch(cfg, "train", 3)
    grads, eos = [], 0
    model.head.register_full_backward_hook(lambda m, i, o: grads.append(o[0]))
    loss, stats = llada.loss_fn(model, batch, cfg)
    loss.backward()
    logp, total = model(batch["idx"]).log_softmax(-1), 0
    rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + 3)
    x, answer = llada.documents(cfg, "train", rng)
    shift = torch.rand((), generator=rng)
    for b in range(64):
        asks = x[b, 1] == llada.ASK
        start = 5 if asks else 1
        assert answer[b].tolist() == [i >= start for i in range(8)]
        t = 1e-3 + (1 - 1e-3) * ((shift + b / 64) % 1)
        for i in range(8):
            hidden = batch["idx"][b, i] == llada.vocabulary(cfg)
            assert hidden <= answer[b, i] and (hidden or batch["idx"][b, i] == x[b, i])
            if hidden:
                total -= logp[b, i, x[b, i]] / t / (8 - start) / 64
                eos += asks and x[b, i] == EOS
            assert grads[0][b, i].any() == hidden
    torch.testing.assert_close(loss, total.detach(), rtol=1e-5, atol=0, check_dtype=False)
    assert eos > 5 and torch.equal(stats["loss"], loss.detach())


# ---- The network


def partly_masked(n=6, T=17, V=9):
    rng = torch.Generator().manual_seed(1)
    x = torch.randint(V, (n, T), generator=rng)
    return torch.where(torch.rand(n, T, generator=rng) < 0.5, V, x)


def test_sizes_and_no_mask_rate_and_no_logit_for_the_mask():
    model = build(V=9)
    assert model.embed.num_embeddings == 10 and model.head.out_features == 9
    assert model(partly_masked()).shape == (6, 17, 9)


@pytest.mark.parametrize("order", ["any", "left"])
def test_what_a_prediction_depends_on(order):
    model, z = build(V=9, order=order), partly_masked(1)
    base = model(z)
    for at in range(17):
        changed = z.clone()
        changed[0, at] = (z[0, at] + 1) % 10
        moved = (model(changed) != base).any(2)[0]
        assert moved.tolist() == [order == "any" or (i > at) for i in range(17)]


def test_baseline_has_the_same_parameters_from_the_same_seed():
    a, b = (llada.LLaDA(config(order=order)).state_dict() for order in ("any", "left"))
    assert a.keys() == b.keys()
    torch.manual_seed(3)
    a = llada.LLaDA(config()).state_dict()
    torch.manual_seed(3)
    b = llada.LLaDA(config(order="left")).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_order_left_is_next_token_prediction(float64, monkeypatch):
    model, cfg = build(order="left"), config(order="left")
    batch = llada.make_batch(cfg, "train", 0)
    assert torch.equal(batch["idx"], batch["targets"])
    logp, x = model(batch["idx"]).log_softmax(-1), batch["targets"]
    nll = -logp.gather(2, x[..., None])[:, 1:, 0].mean()
    torch.testing.assert_close(llada.loss_fn(model, batch, cfg)[0], nll, check_dtype=False)
    raw = build(order="left", seed=0)
    raw.cfg = llada.replace(raw.cfg, order="any")     # no shift: the logits of the next token
    same(raw(x)[:, :-1], model(x)[:, 1:])


def test_decoding_with_the_cache_equals_full_forward_passes():
    model, x = build(V=9, order="left"), partly_masked(5)[:, :6].clamp(max=8)
    for temp in (0.0, 1.0):
        cfg = config(order="left", temp=temp)
        torch.manual_seed(0)
        y, when, calls = llada.autoregress(model, x, 8, cfg)
        assert y.shape == (5, 14) and torch.equal(y[:, :6], x) and calls == 8
        assert when[0].tolist() == [0] * 6 + list(range(1, 9))
        if temp == 0:
            assert torch.equal(model(y)[:, 6:].argmax(2), y[:, 6:])
    fed = []
    plain = model.forward
    model.forward = lambda idx, cache: fed.append(idx.size(1)) or plain(idx, cache)
    llada.autoregress(model, x, 8, config(order="left"))
    assert fed == [6] + [1] * 7
    model.forward = plain
    none = torch.empty(5, 2, 0, 8, dtype=torch.float64)
    cache, parts = [(none, none)] * 2, []
    for piece in partly_masked(5).clamp(max=8).split([6, 1, 3, 6, 1], dim=1):
        parts.append(model(piece, cache))
    same(torch.cat(parts, 1)[:, :-1], model(partly_masked(5).clamp(max=8))[:, 1:])


@pytest.mark.parametrize("order", ["any", "left"])
def test_flops_equal_a_count(order):
    cfg = config(order=order)
    batch, counter = llada.make_batch(cfg, "train", 0), FlopCounterMode(display=False)
    model = llada.LLaDA(cfg)
    with sdpa_kernel(SDPBackend.MATH), counter:     # it does not know the fused kernel of a CPU
        model(batch["idx"])
    assert counter.get_total_flops() / batch["idx"].numel() == model.flops


def test_every_parameter_is_clipped_once():
    model = build()
    clipped = sorted(id(p) for part in model.parts() for p in part)
    assert clipped == sorted(id(p) for p in model.parameters())


# ---- One step and the sampler


@pytest.mark.parametrize("temp", [0.5, 1.0, 2.0])
def test_gumbel_noise_draws_from_the_tempered_softmax(temp):
    torch.manual_seed(0)
    logits, n = torch.tensor([1.0, 0.0, -1.0, 0.5]), 100_000
    found = llada.pick(logits.expand(n, 4), temp).bincount(minlength=4)
    want = n * (logits / temp).softmax(0)
    assert ((found - want) ** 2 / want).sum() < 19.7    # 3 degrees of freedom, p = 2e-4
    assert (llada.pick(logits.expand(n, 4), 0.0) == 0).all()


def test_noise_of_zero_changes_no_greedy_choice(monkeypatch):
    """In float32 it is drawn once in 16 million, and log 0 times a temperature of 0 is no number."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    assert llada.pick(logits, 0.0).tolist() == llada.pick(logits, 1.0).tolist() == [1, 0]


def test_noise_is_double_precision(monkeypatch):
    kinds, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: kinds.append(k.get("dtype")) or rand(*a, **k))
    llada.pick(torch.zeros(2, 3), 1.0)
    assert kinds == [torch.float64]


def reveals(stub, n_new=10, n_prompt=3, n=50, **changes):
    torch.manual_seed(1)
    idx = torch.randint(stub.head.out_features, (n, n_prompt))
    x, when, calls = llada.diffuse(stub, idx, n_new, config(**changes))
    assert torch.equal(x[:, :n_prompt], idx) and not when[:, :n_prompt].any()
    assert (x < stub.head.out_features).all() and (when[:, n_prompt:] > 0).all()
    return when[:, n_prompt:], calls


def noisy(V=5):
    """Logits that look at nothing but differ everywhere."""
    return Stub(V, lambda z: torch.randn(*z.shape, V, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("remasking", ["low-confidence", "random"])
def test_numbers_of_tokens_per_step(remasking):
    when, calls = reveals(noisy(), remasking=remasking, n_denoise=4)
    for row in when:
        assert row.bincount().tolist() == [0, 3, 3, 2, 2]
    assert calls == 4
    when, calls = reveals(noisy(), remasking=remasking, n_denoise=99)
    assert calls == 10 and all(sorted(row.tolist()) == list(range(1, 11)) for row in when)


def test_blocks_are_filled_from_left_to_right():
    when, calls = reveals(noisy(), block=4, n_denoise=10)
    assert calls == 10
    for row in when:
        blocks = [row[:4], row[4:8], row[8:]]
        assert all(a.max() < b.min() for a, b in itertools.pairwise(blocks))
    when, _ = reveals(noisy(), block=1)
    assert (when == torch.arange(1, 11)).all()
    when, calls = reveals(noisy(), block=4, n_denoise=5)
    assert calls == 5 and all(row.bincount().tolist() == [0, 2, 2, 2, 2, 2] for row in when)


def test_a_threshold_reveals_what_is_sure_and_always_something():
    when, calls = reveals(noisy(), sure=1.1)
    assert calls == 10 and all(sorted(row.tolist()) == list(range(1, 11)) for row in when)
    when, calls = reveals(noisy(), sure=1e-9)
    assert calls == 1 and (when == 1).all()
    sure = torch.tensor([0.95, 0.5, 0.9, 0.99, 0.7])
    stub = Stub(2, lambda z: torch.stack([1 - sure, sure], 1).log().expand(len(z), -1, -1))
    torch.manual_seed(0)
    x, when, calls = llada.diffuse(stub, torch.zeros(2, 1).long(), 4, config(sure=0.8, temp=0.0))
    assert when.tolist() == [[0, 3, 1, 1, 2]] * 2 and calls == 3    # of .5 and .7 first the surer
    cfg = config(sure=0.8, temp=0.0, remasking="random")    # how many says who: the sure ones
    _, again, _ = llada.diffuse(stub, torch.zeros(40, 1).long(), 4, cfg)
    assert again.tolist() == when[:1].tolist() * 40


def test_finished_rows_are_not_computed():
    sizes = []

    def logits(z):
        sizes.append(len(z))
        return torch.tensor([0.0, 9.0]) * (z == 0).any(1, keepdim=True)[..., None] + torch.zeros(*z.shape, 2)

    idx = torch.tensor([[0], [1]])
    _, _, calls = llada.diffuse(Stub(2, logits), idx, 3, config(sure=0.9, temp=0.0))
    assert sizes[0] == 2 and sizes[1:] == [1, 0] and calls == sum(sizes) / 2


def test_all_steps_share_one_compiled_graph():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(llada.reveal, fullgraph=True, dynamic=False, backend=counting)
    cfg = config(temp=0.0, sure=0.0)
    x, logits = torch.full((3, 6), 4), torch.randn(3, 6, 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (1, 3, 2):
            arguments = x, logits, x == 4, torch.tensor(n), cfg
            for a, b in zip(step(*arguments), llada.reveal(*arguments), strict=True):
                assert torch.equal(a, b)
            x, _ = step(*arguments)
    assert len(graphs) == 1 and (x < 4).all()


# ---- The language


def test_texts_of_the_language_have_a_law(monkeypatch):
    monkeypatch.setattr(llada, "WORDS", ["ab", "a", "b"])
    for n in (1, 2, 5):
        texts = ["".join(t) for t in itertools.product("ab ", repeat=n)]
        total = 0.0
        for text in texts:
            if all(word in ("ab", "a", "b") for word in text.split(" ")[:-1]) and any(
                    word.startswith(text.split(" ")[-1]) for word in ("ab", "a", "b")):
                total += math.exp(llada.log_prob(text))
        assert total == pytest.approx(1, abs=1e-12)
    assert llada.log_prob("a ab ") == pytest.approx(2 * math.log(1 / 3))
    assert llada.log_prob("b a") == pytest.approx(math.log(1 / 3 * 2 / 3))


def test_words_are_legal_and_equally_likely():
    tok, splits, words = llada.read_words("")
    assert words == set(llada.WORDS) and len(words) == len(llada.WORDS) == 24
    text = tok.decode(torch.cat([splits["train"], splits["val"]]))
    assert set(text.split(" ")) - {""} == words
    count = Counter(text.split(" "))
    found = torch.tensor([count[w] for w in words]).double()
    want = found.sum() / len(words)
    assert ((found - want) ** 2 / want).sum() < 55      # 23 degrees of freedom, p = 2e-4


def test_texts_begin_with_a_word_and_have_the_entropy_of_the_language():
    cfg = config(batch_size=3000, seq_len=17)
    x, answer = llada.documents(cfg, "train", torch.Generator().manual_seed(0))
    tok, _, words = llada.read_words("")
    assert (x[:, 0] == BOS).all() and answer.tolist() == [[False] + [True] * 16] * 3000
    texts = [tok.decode(row[1:]) for row in x]
    logp = torch.tensor([llada.log_prob(text) for text in texts])
    assert logp.isfinite().all()
    assert len({text.split(" ")[0] for text in texts}) == len(llada.WORDS)


def test_training_and_validation_text_are_apart():
    _, splits, _ = llada.read_words("")
    n = len(splits["train"]) + len(splits["val"])
    assert len(splits["val"]) == pytest.approx(n / 10, abs=8)   # it is cut between words
    tok, cfg = llada.read_words("")[0], config(batch_size=500)
    for split in ("train", "val"):
        text = tok.decode(splits[split])
        assert text[0] != " " and text[-1] == " "
        x, _ = llada.documents(cfg, split, torch.Generator().manual_seed(0))
        assert all(" " + tok.decode(row[1:]) in " " + text + text for row in x)


def test_sequences_begin_at_every_word_and_behind_the_end_is_the_beginning(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab cde f " * 9 + "ghij klm no pqr st uvw")
    cfg = config(corpus=str(path), seq_len=9, prompt=1, batch_size=400)
    tok, splits, _ = llada.read_words(str(path))
    text = tok.decode(splits["val"])
    words = text.split()
    x, _ = llada.documents(cfg, "val", torch.Generator().manual_seed(0))
    starts = {" ".join(words[i:] + words)[:8] for i in range(len(words))}
    assert {tok.decode(row[1:]) for row in x} == starts and len(starts) == len(words) > 1


def test_a_batch_is_a_function_of_seed_split_and_step():
    for task in ("text", "facts"):
        one, two = (config(seed=seed, source=task) for seed in (1, 2))
        a, b, c = (llada.make_batch(cfg, "train", 5)["idx"] for cfg in (one, one, two))
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert not torch.equal(a, llada.make_batch(one, "train", 6)["idx"])
        a, b = (llada.make_batch(cfg, "val", 5)["idx"] for cfg in (one, two))
        assert torch.equal(a, b)


# ---- Facts


def test_nothing_in_training_asks_about_held_out_facts_and_all_are_stated():
    cfg, asked, stated = config(source="facts", n_fact=20, n_taught=12, batch_size=500), set(), set()
    for step in range(4):
        x, _ = llada.documents(cfg, "train", torch.Generator().manual_seed(step))
        for row in x.tolist():
            name, what = (v - llada.A for v in (row[1], row[3]))
            if row[1] == llada.ASK:
                first, second = row[2] - llada.A, row[5] - llada.A
                name, what = (first, second) if row[3] == llada.NEXT else (second, first)
                assert row[3] in (llada.NEXT, llada.BACK) and row[4] == llada.SAY
                asked.add((name, row[3]))
            else:
                assert row[2] == llada.IS
                stated.add(name)
            assert what == name + 20 and 0 <= name < 20
    assert asked == {(i, way) for i in range(12) for way in (llada.NEXT, llada.BACK)}
    assert stated == set(range(20))


@pytest.mark.parametrize("order", ["any", "left"])
def test_recall_of_a_network_that_knows_half_of_the_facts(order, tmp_path):
    """Also by Bayes' rule: from left to right the stub knows p(description | name) only."""
    cfg = config(source="facts", order=order, n_fact=8, n_taught=4, seq_len=8, out=str(tmp_path))
    V = llada.vocabulary(cfg)

    def logits(z):
        out = torch.zeros(len(z), 8, V)
        name, what = z[:, 1], z[:, 3]
        rows = torch.arange(len(z))
        knows = z[:, 1] - llada.A < 6 if order == "left" else torch.ones(len(z), dtype=torch.bool)
        states = z[:, 2] == llada.IS
        out[rows[states & knows & (name < V)], 3, (name + 8).clamp(max=V - 1)[states & knows & (name < V)]] = 9
        if order == "any":
            known = states & (name == V) & (what - llada.A - 8 < 6)
            out[rows[known], 1, (what - 8)[known]] = 9
            forward = (z[:, 1] == llada.ASK) & (z[:, 3] == llada.NEXT)
            out[rows[forward], 5, z[forward, 2] + 8] = 9
        return out

    found = llada.evaluate(Stub(V, logits), cfg, llada.Run(cfg))
    want = {"any": dict(forward=1.0, reverse=0.0, gap_forward=1.0, gap_reverse=0.5),
            "left": dict(forward=0.0, reverse=0.0, gap_forward=0.5, gap_reverse=0.75)}
    assert found.pop("loss") > 0 and found == want[order]


# ---- What samples are like, corpus, picture


def test_score_by_hand():
    """First and last words may be cut: they do not count."""
    found = llada.score(["b ab cd xx ab c", "d ab ab  cd ", "b ab cd xx ab c"], {"ab", "cd"})
    assert found == dict(words=pytest.approx(9 / 12), distinct=2, entropy=pytest.approx(
        -(6 / 9 * math.log(6 / 9) + 3 / 9 * math.log(3 / 9))))
    assert llada.score(["xx yy z"], {"ab"}) == dict(words=0.0, distinct=1, entropy=0.0)


def test_a_corpus_is_learnt_and_a_sample_and_its_order_are_shown(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    results = llada.main(["--smoke", "--corpus", str(path), "--only", "llada", "--show",
                          "--out", str(tmp_path)])
    m = results["arms"]["llada"]
    out, names = capsys.readouterr().out, {*path.read_text().replace("\n", " "), "<bos>", "<eos>"}
    assert "".join(m["sample"]) in out and set(m["sample"]) <= names
    assert len(m["when"]) == len(m["sample"]) == 16 and "truth" not in m
    assert "\033[32m" in out
    text = path.read_text().replace("\n", " ") + " "       # what it was trained on: lines joined
    assert results["corpus"] == dict(characters=len(text),
                                     sha256=hashlib.sha256(text.encode()).hexdigest())
    assert not [c for c in results["claims"] if c["claim"][:2] in ("C2", "C3", "C4")]
    with Image.open(tmp_path / "llada.gif") as film:
        assert film.n_frames == max(m["when"]) + 1


def test_steps_are_printed_and_filmed(tmp_path, capsys):
    """Green in the terminal and in the picture: what this step revealed. Hidden: underscores."""
    llada.show_steps(["a", "b", "c", "$"], [0, 2, 1, 2], tmp_path / "film.gif")
    green = "\033[32m{}\033[0m".format
    assert capsys.readouterr().out.split("\n") == [
        green("a") + "___", "a_" + green("c") + "_", "a" + green("b") + "c" + green("$"), ""]
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3
        for frame, places in enumerate([[0], [2], [1, 3]]):
            film.seek(frame)
            r, g, b = torch.tensor(np.array(film.convert("RGB")), dtype=torch.int).unbind(2)
            columns = ((g - r > 60) & (g - b > 10)).any(0).nonzero()[:, 0] * 4 // film.width
            assert sorted(set(columns.tolist())) == places


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("flags", [["--only", "ar facts"], ["--only", "llada"]])
def test_a_picture_of_some_arms_has_no_empty_legend(flags, tmp_path):
    llada.main(["--smoke", *flags, "--out", str(tmp_path)])
    assert (tmp_path / "llada.png").exists()


def arms_of(monkeypatch, out, **changes):
    """{arm: Config} of all arms."""
    found, cfg = {}, llada.Config(**SMALL | changes, full=True, out=str(out))
    monkeypatch.setattr(llada, "select", lambda arms, *_: found.update(arms) or {})
    llada.experiment(cfg, llada.Run(cfg))
    return found


@pytest.mark.parametrize("flags", [{}, dict(order="left"), dict(source="facts"),
                                   dict(order="left", source="facts", n_fact=3, n_taught=2),
                                   dict(prompt=7)], ids=str)    # a fact has no room for it
def test_arms_say_themselves_what_is_learnt_in_which_order(flags, tmp_path, monkeypatch):
    arms = arms_of(monkeypatch, tmp_path, steps=50, **flags)
    assert {arm: (c.order, c.source, c.steps, c.seq_len) for arm, c in arms.items()} == {
        "ar": ("left", "text", 50, 17), "llada": ("any", "text", 50, 17),
        "ar facts": ("left", "facts", 150, 8), "llada facts": ("any", "facts", 150, 8),
        "few taught": ("any", "facts", 150, 8)}
    assert arms["few taught"].n_taught == max(1, arms["llada"].n_fact // 4)


def test_rows_that_name_numbers_of_steps_or_orders_take_no_threshold_and_no_blocks(
        tmp_path, monkeypatch):
    """`sample` takes them as they are given; `confident` and `blocks` have their own."""
    seen, diffuse = [], llada.diffuse
    monkeypatch.setattr(llada, "diffuse",
                        lambda *a: seen.append((a[3].sure, a[3].block)) or diffuse(*a))
    cfg = config(n_sample=2, n_denoise=8, sure=1e-9, temp=0.0, block=50, out=str(tmp_path))
    model = llada.LLaDA(cfg)
    rows = llada.sample_rows(model, cfg, llada.Run(cfg))["samples"]
    thresholds = dict(zip(list(rows)[1:], seen, strict=True))
    assert [thresholds.pop(name) for name in ("blocks", "confident", "sample")] == [
        (1e-9, 8), (0.9, 50), (1e-9, 50)]
    assert set(thresholds.values()) == {(0, 0)} and len(thresholds) == 20
    assert [rows[f"low temp=0 N={n}"]["nfe"] for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert rows["sample"]["nfe"] == 1


def test_a_source_without_entropy_leaves_its_claim_open(tmp_path):
    m = {"history": [dict(arm="llada")], "real entropy": 0.0, "free random temp=1 entropy": 1.0}
    claims, cfg = [c for c in llada.CLAIMS if "real" in c[0]], config(out=str(tmp_path))
    for m["real entropy"], verdict in (0.0, "not judged"), (1.05, "holds"), (2.0, "does not hold"):
        found = llada.report(cfg, llada.Run(cfg), {"llada": m}, [], claims)["claims"]
        assert [claim["verdict"] for claim in found] == [verdict]


@pytest.mark.parametrize("law", ["count", "rate", "order"])
def test_claims_compare_the_estimators(law):
    """Apart: the largest distance from the estimate by orders, in its standard errors."""
    m = dict(order=0.5, count=0.5, rate=0.5, order_se=0.01, rate_se=0.02, count_se=0.005)
    measure = {name: f for name, f, *_ in llada.CLAIMS}
    assert measure["C2 estimators, apart / s.e."]({"llada": m}) == 0
    assert measure["C2 s.e., rate - count"]({"llada": m}) == pytest.approx(0.015)
    apart = measure["C2 estimators, apart / s.e."]({"llada": m | {law: 0.46}})
    assert apart == pytest.approx(4)


@pytest.mark.parametrize("flags", [dict(n_taught=200), dict(prompt=16, seq_len=17), dict(temp=-1.0),
                                   dict(source="facts", seq_len=9), dict(n_sample=0)], ids=str)
def test_wrong_values_are_refused(flags):
    with pytest.raises(ValueError):
        llada.Config(**flags)
