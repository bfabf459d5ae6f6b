"""Oracles of mod.py: what is computed here by hand, by loops or by enumeration must come out."""

import functools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mod

SMALL = dict(n_layer=4, n_head=2, n_embd=16, seq_len=24, capacity=0.25, device="cpu")
VOCAB = 11
same = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


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


def build(seed=0, **changes):
    """A model with random weights everywhere; a fresh one is zero where it matters."""
    torch.manual_seed(seed)
    model = mod.MoD(mod.Config(**SMALL | changes), VOCAB)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def tokens(batch_size, length=SMALL["seq_len"], seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch_size, length), generator=rng)


def stream(batch_size, length=SMALL["seq_len"], seed=0):
    """A residual stream, scores of its tokens, and decisions: from none in a row to all of them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, length, SMALL["n_embd"], generator=rng)
    r = torch.randn(batch_size, length, generator=rng)
    share = torch.linspace(0, 1, batch_size)[:, None]
    return x, r, torch.rand(batch_size, length, generator=rng) < share


def stub_update(model, monkeypatch, value=10.0):
    for block in model.blocks:
        monkeypatch.setattr(block, "update", lambda x, *_: torch.full_like(x, value))


# ---- The method by hand: one sequence at a time, explicit softmax, rotation by complex numbers


def layer_norm(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def turn(x, at):
    """Rotates (n, nh, hs) by the angles of the positions `at` (n,)."""
    a, b = x.chunk(2, dim=-1)
    freq = 10000.0 ** (-torch.arange(a.size(-1)) / a.size(-1))
    z = torch.complex(a, b) * torch.exp(1j * at[:, None, None] * freq)
    return torch.cat([z.real, z.imag], dim=-1)


def update_by_hand(block, x, at):
    """What a block adds to the tokens x (n, C), which stand at the positions `at` (n,)."""
    q, k, v = (layer_norm(x) @ block.attn.qkv.weight.T).view(len(x), 3, block.attn.n_head, -1).unbind(1)
    q, k = turn(layer_norm(q), at), turn(layer_norm(k), at)
    weight = torch.einsum("ihc,jhc->hij", q, k) / math.sqrt(q.size(-1))
    weight = weight.masked_fill(at[:, None] < at, -math.inf).softmax(-1)
    y = torch.einsum("hij,jhc->ihc", weight, v).reshape(x.shape)
    a = y @ block.attn.proj.weight.T
    hidden = (layer_norm(x + a) @ block.mlp.fc.weight.T).clamp(min=0) ** 2
    return a + hidden @ block.mlp.proj.weight.T


def block_by_hand(model, i, x, r, keep):
    """A routed block: kept tokens meet among themselves, the others pass by."""
    gate = {"none": torch.ones_like(r), "raw": r, "sigmoid": 2 / (1 + torch.exp(-r))}
    rows = []
    for row, g, kept in zip(x, gate[model.cfg.gate], keep):
        at, row = kept.nonzero().squeeze(1), row.clone()
        if len(at):
            row[at] += g[at, None] * update_by_hand(model.blocks[i], row[at], at)
        rows.append(row)
    return torch.stack(rows)


def picked(model, i, x, r):
    """Block i in training: what comes out, and the k tokens that it takes."""
    keep = model.picked(r)
    return model.train().enter(i, x, r, keep), keep


def all_in(model, i, x, r, keep):
    """Block i for any choice, as in evaluation."""
    return model.eval().enter(i, x, r, keep)


def run_cached(model, i, x, r, keep, sizes):
    """Block i over the pieces of a sequence, as in decoding."""
    cache, start, pieces = mod.KVCache(len(x), model.cfg, "cpu"), 0, []
    for n in sizes:
        part = slice(start, start + n)
        pieces.append(model.enter(i, x[:, part], r[:, part], keep[:, part], start, cache))
        start += n
    return torch.cat(pieces, dim=1)


def run_in_pieces(model, idx, sizes):
    """Logits, p and keep of a whole sequence from a cached forward over its pieces; the caches."""
    caches = [mod.KVCache(len(idx), model.cfg, "cpu") for _ in model.blocks]
    start, results = 0, []
    for n in sizes:
        results.append(model(idx[:, start : start + n], start, caches))
        start += n
    logits, p, keep = zip(*results)
    return (torch.cat(logits, dim=1), torch.cat(p, dim=2), torch.cat(keep, dim=2)), caches


PIECES = pytest.mark.parametrize("sizes", [[24], [1] * 24, [5, 1, 7, 1, 1, 9]], ids=str)


# ---- The block


@pytest.mark.parametrize("gate", ["sigmoid", "raw", "none"])
def test_training_path_equals_the_block_by_hand(gate):
    model = build(gate=gate)
    x, r, _ = stream(5)
    y, keep = picked(model, 1, x, r)
    best = r.argsort(dim=1, descending=True)[:, :6]
    assert [set(row.nonzero()[:, 0].tolist()) for row in keep] == [set(b.tolist()) for b in best]
    same(y, block_by_hand(model, 1, x, r, keep))


@pytest.mark.parametrize("gate", ["sigmoid", "raw", "none"])
def test_path_of_evaluation_equals_the_block_by_hand(gate):
    model = build(gate=gate)
    x, r, keep = stream(5)
    same(all_in(model, 1, x, r, keep), block_by_hand(model, 1, x, r, keep))


@PIECES
@pytest.mark.parametrize("gate", ["sigmoid", "raw", "none"])
def test_cached_path_equals_the_block_by_hand(gate, sizes):
    model = build(gate=gate)
    x, r, keep = stream(5)
    gap = torch.ones(24, dtype=torch.bool)
    gap[6:13] = False           # a whole piece that nobody enters
    for kept in (keep, keep & gap):
        same(run_cached(model, 1, x, r, kept, sizes), block_by_hand(model, 1, x, r, kept))


def test_few_gathered_tokens_equal_all_tokens_under_a_mask_with_their_gradients():
    model = build()
    x, r, _ = stream(5)
    keep, found = model.picked(r), []
    mask = (keep[:, None] | torch.eye(24, dtype=torch.bool)).tril()[:, None]

    def masked(x):
        f = model.blocks[1].update(x, model.rope[:24], lambda k, v: (k, v, mask))
        return x + (keep * model.gate(r))[..., None] * f

    for path in (masked, lambda x: picked(model, 1, x, r)[0], lambda x: all_in(model, 1, x, r, keep)):
        leaf = x.clone().requires_grad_()
        y = path(leaf)
        weights = [leaf, *model.blocks[1].parameters()]
        found.append([y, *torch.autograd.grad(y.square().sum(), weights)])
    for right, gathered, whole in zip(*found):
        same(gathered, right, rtol=1e-9, atol=1e-9)
        same(whole, right, rtol=1e-9, atol=1e-9)


def test_unselected_tokens_are_bit_identical_and_selected_ones_are_not():
    model = build()
    x, r, keep = stream(5)
    for out, kept in [picked(model, 1, x, r), (all_in(model, 1, x, r, keep), keep),
                      (run_cached(model, 1, x, r, keep, [24]), keep)]:
        assert torch.equal(out[~kept], x[~kept])
        assert (out[kept] != x[kept]).any(-1).all()


def test_hand_example(monkeypatch):
    model = build(gate="raw", capacity=0.5)
    stub_update(model, monkeypatch)
    x = torch.tensor([1.0, -2.0, 3.0, 0.5]).view(1, 4, 1)
    r, result = x.squeeze(-1), torch.tensor([11.0, -2.0, 33.0, 0.5]).view(1, 4, 1)
    y, keep = picked(model, 1, x, r)
    assert keep.tolist() == [[True, False, True, False]]
    assert torch.equal(y, result)
    assert torch.equal(all_in(model, 1, x, r, keep), result)
    assert torch.equal(run_cached(model, 1, x, r, keep, [4]), result)


@pytest.mark.parametrize("r", [(0.1, 0.5, 0.5, 0.2, 0.9, 0.5, 0.0, 0.3), (0.5,) * 8, (-1.0,) * 8])
def test_exactly_k_are_picked_even_with_ties(r, monkeypatch):
    model = build(gate="none", capacity=0.375)
    stub_update(model, monkeypatch)
    x, _, _ = stream(2, 8)
    scores = torch.tensor([r, r[::-1]])
    y, keep = picked(model, 1, x, scores)
    same(y, x + 10.0 * keep[..., None])
    for row, kept in zip(scores, keep):
        assert sorted(row[kept].tolist()) == sorted(r)[-3:]


@pytest.mark.parametrize("capacity, k", [(0.25, 6), (0.3, 7), (1 / 24, 1), (0.99, 23), (1.0, 24)])
def test_k_is_the_capacity_rounded_down(capacity, k):
    _, _, keep = build(capacity=capacity)(tokens(3))
    assert (keep.sum(2) == k).all()


def test_block_indices():
    routed = {n: mod.Config(**SMALL | dict(n_layer=7, routed_every=n)).routed for n in range(4)}
    assert routed == {0: [], 1: [0, 1, 2, 3, 4, 5, 6], 2: [1, 3, 5], 3: [2, 5]}


# ---- Positions


def test_picked_tokens_keep_their_original_positions():
    model = build(gate="none")
    x, r, _ = stream(1)
    y, keep = picked(model, 1, x, r)
    at = keep[0].nonzero().squeeze(1)
    assert len(at) < at[-1] - at[0] + 1     # they are not contiguous
    packed = x[0, at] + update_by_hand(model.blocks[1], x[0, at], torch.arange(len(at)))
    same(y, block_by_hand(model, 1, x, r, keep))
    assert (y[0, at] - packed).abs().max() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_shifting_all_positions_changes_nothing(training):
    model = build().train(training)
    logits, _, keep = model(tokens(3))
    model.rope = mod.rope_table(31, 8)[7:]
    shifted, _, kept = model(tokens(3))
    assert torch.equal(keep, kept)
    torch.testing.assert_close(shifted, logits, rtol=0, atol=1e-9)


# ---- Scores and gate


@pytest.mark.parametrize("causal", ["predictor", "aux"])
def test_scores_by_hand(causal):
    model = build(causal=causal)
    x, _, _ = stream(3)
    for i in (1, 3):
        r, p = model.scores(i, 3 * x)
        same(r, layer_norm(3 * x) @ model.routers[str(i)].weight[0])
        if causal == "aux":
            assert p is r
        else:
            a, _, b = model.predictors[str(i)]
            hidden = layer_norm(3 * x) @ a.weight.T + a.bias
            same(p, (hidden / (1 + torch.exp(-hidden))) @ b.weight[0] + b.bias)


@pytest.mark.parametrize("training", [True, False])
def test_a_block_scores_what_enters_it_and_the_mode_is_the_rule(training):
    model, idx = build().train(training), tokens(3)
    _, p, keep = model(idx)
    x = mod.norm(model.embed(idx))
    for n, i in enumerate([1, 3]):
        x = model.blocks[i - 1](x, model.rope)
        r, guess = model.scores(i, x)
        best = torch.zeros(3, 24).scatter(1, r.topk(6).indices, 1.0) > 0
        same(p[n], guess)
        assert torch.equal(keep[n], best if training else guess > 0)
        assert not torch.equal(r > 0, guess > 0)    # the router would decide otherwise
        x = block_by_hand(model, i, x, r, keep[n])


def test_scores_stay_float32_under_bfloat16(float32):
    model = build()
    x, _, _ = stream(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].mlp(x).dtype == torch.bfloat16
        low = model.scores(1, x)
    for a, b in zip(low, model.scores(1, x)):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_gate_is_neutral_at_zero_and_does_not_look_at_other_tokens():
    r = torch.tensor([[0.0, 1.0, -3.0]])
    values = {"sigmoid": [1.0, 2 / (1 + math.exp(-1)), 2 / (1 + math.exp(3))],
              "raw": [0.0, 1.0, -3.0], "none": [1.0, 1.0, 1.0]}
    for gate, expected in values.items():
        same(build(gate=gate).gate(r), torch.tensor([expected]))


# ---- Gradients


@pytest.mark.parametrize("gate", ["sigmoid", "raw", "none"])
def test_router_gradient_has_the_closed_form(gate):
    model = build(gate=gate)
    x, _, _ = stream(3)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    r, _ = model.scores(1, x)
    y, keep = picked(model, 1, x, r)
    (weight * y).sum().backward()
    if gate == "none":
        assert not model.routers["1"].weight.grad.any()
        return
    s = 1 / (1 + torch.exp(-r))
    slope, expected = (torch.ones_like(r) if gate == "raw" else 2 * s * (1 - s)), 0
    for b, kept in enumerate(keep):
        at = kept.nonzero().squeeze(1)
        f = update_by_hand(model.blocks[1], x[b, at], at)
        share = slope[b, at] * (weight[b, at] * f).sum(-1)
        expected += share @ layer_norm(x[b, at])
    torch.testing.assert_close(model.routers["1"].weight.grad[0], expected, rtol=0, atol=1e-10)


def test_no_gradient_is_cut_on_the_path_of_the_language_model():
    model = build(n_embd=4, capacity=0.5)
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: picked(model, 1, x, model.scores(1, x)[0])[0], (x, model.routers["1"].weight))


@pytest.mark.parametrize("causal", ["predictor", "aux"])
def test_gradient_of_the_decision_loss_stays_in_the_predictor_or_reaches_the_trunk(causal):
    model = build(causal=causal)
    _, p, keep = model(tokens(3))
    F.binary_cross_entropy_with_logits(p, keep.double()).backward()
    reached = {name for name, q in model.named_parameters() if q.grad is not None and q.grad.any()}
    if causal == "predictor":
        assert reached == {name for name, _ in model.named_parameters() if "predictors" in name}
    else:
        assert reached >= {"routers.1.weight", "routers.3.weight", "embed.weight"}


def test_training_the_predictor_leaves_all_other_weights_bit_identical(monkeypatch, tmp_path):
    """Also while gradients are clipped: a norm over all parameters would couple them."""
    def cross_entropy_only(model, batch, cfg):
        logits, _, _ = model(batch["idx"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        return loss, {"loss": loss.detach()}

    fast = dict(steps=4, warmup=1, eval_every=4, eval_batches=1, batch_size=2, grad_clip=1e-3)
    vocab_size, weights = len(mod.read_text("")[0]), []
    for name, loss_fn in [("on", mod.loss_fn), ("off", cross_entropy_only)]:
        monkeypatch.setattr(mod, "loss_fn", loss_fn)
        cfg = mod.Config(**SMALL | fast, out=str(tmp_path / name))
        torch.manual_seed(0)
        model = mod.MoD(cfg, vocab_size)
        nn.init.normal_(model.head.weight)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        mod.train("mod", model, cfg, mod.Run(cfg))
        weights.append(model.state_dict())
    for name in before:
        assert torch.equal(*(w[name] for w in weights)) == (not name.startswith("predictors."))
        assert not torch.equal(before[name], weights[0][name])


def test_every_parameter_is_clipped_once():
    for changes in ({}, dict(causal="aux"), dict(routing="random"), dict(routed_every=0)):
        model = build(**changes)
        clipped = sorted(id(p) for part in model.parts() for p in part)
        assert clipped == sorted(id(p) for p in model.parameters())


# ---- The model


def test_without_routed_blocks_it_is_a_plain_transformer():
    cfg, idx = mod.Config(**SMALL, routed_every=0), tokens(3)
    torch.manual_seed(0)
    embed = nn.Embedding(VOCAB, 16)
    blocks = [mod.Block(cfg) for _ in range(4)]
    head = nn.Linear(16, VOCAB, bias=False)
    nn.init.zeros_(head.weight)
    state, plain = torch.get_rng_state(), nn.ModuleList([embed, *blocks, head])
    torch.manual_seed(0)
    model = mod.MoD(cfg, VOCAB)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
        nn.init.normal_(a, std=0.5)
        b.data.copy_(a)
    x = by_hand = mod.norm(embed(idx))
    for block in blocks:
        x = block(x, mod.rope_table(24, 8))
        rows = [update_by_hand(block, row, torch.arange(24)) for row in by_hand]
        by_hand = by_hand + torch.stack(rows)
    for training in (True, False):
        logits, p, keep = model.train(training)(idx)
        assert torch.equal(logits, head(mod.norm(x))) and len(p) == len(keep) == 0
        same(logits, layer_norm(by_hand) @ head.weight.T)


@pytest.mark.parametrize("changes, extra", [
    ({}, {"routers", "predictors"}), (dict(causal="aux"), {"routers"}),
    (dict(routing="random"), set())])
def test_routing_adds_its_parameters_behind_the_shared_ones(changes, extra):
    models = []
    for more in (dict(routed_every=0), changes):
        torch.manual_seed(5)
        models.append(mod.MoD(mod.Config(**SMALL | more), VOCAB).state_dict())
    dense, routed = models
    assert all(torch.equal(p, routed[name]) for name, p in dense.items())
    assert {name.split(".")[0] for name in routed.keys() - dense.keys()} == extra


@pytest.mark.parametrize("training", [True, False])
def test_full_capacity_without_a_gate_is_the_dense_model(training, monkeypatch):
    model = build(capacity=1.0, gate="none", routed_every=1).train(training)
    dense = build(routed_every=0)
    missing, _ = dense.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    r = torch.randn(3, 24)
    monkeypatch.setattr(model, "scores", lambda i, x: (r, r.abs()))
    same(model(tokens(3))[0], dense(tokens(3))[0])


def test_full_capacity_with_the_raw_gate_adds_r_times_the_update():
    model = build(capacity=1.0, gate="raw")
    x, r, _ = stream(3)
    y, keep = picked(model, 1, x, r)
    f = torch.stack([update_by_hand(model.blocks[1], row, torch.arange(24)) for row in x])
    assert keep.all()
    same(y, x + r[..., None] * f)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", ["predictor", "aux"])
def test_a_row_does_not_depend_on_the_others(training, causal):
    model, idx = build(causal=causal).train(training), tokens(5)
    together = model(idx)
    for b in range(5):
        alone = model(idx[b : b + 1])
        same(alone[0][0], together[0][b])
        same(alone[1][:, 0], together[1][:, b])
        assert torch.equal(alone[2][:, 0], together[2][:, b])


# ---- Causality


def change_the_end(idx):
    step = torch.randint(1, VOCAB, (len(idx), 4), generator=torch.Generator().manual_seed(1))
    return torch.cat([idx[:, :-4], (idx[:, -4:] + step) % VOCAB], dim=1)


def before_and_after(model, idx):
    results = []
    for ids in (idx, change_the_end(idx)):
        torch.manual_seed(0)
        results.append(model(ids)[0])
    return results


def test_top_k_leaks_the_future():
    """The positive control of the next test: it sees a leak where there is one."""
    a, b = before_and_after(build().train(), tokens(100))
    leaks = (a[:, :-4] != b[:, :-4]).flatten(1).any(1).double().mean().item()
    assert leaks > 0.3


@pytest.mark.parametrize("training, changes", [
    (False, {}), (False, dict(causal="aux")), (False, dict(gate="raw")),
    (False, dict(routed_every=1)), (False, dict(routing="random")), (True, dict(routing="random")),
    (True, dict(routed_every=0))])
def test_all_other_rules_do_not_leak_the_future(training, changes):
    a, b = before_and_after(build(**changes).train(training), tokens(100))
    assert torch.equal(a[:, :-4], b[:, :-4])
    assert (a[:, -4:] != b[:, -4:]).any(-1).all()


# ---- Decoding


@PIECES
@pytest.mark.parametrize("changes", [{}, dict(causal="aux", gate="raw"), dict(routed_every=1),
                                     dict(routed_every=0)], ids=str)
def test_cached_decoding_equals_the_full_forward(changes, sizes):
    model, idx = build(**changes).eval(), tokens(4)
    logits, p, keep = model(idx)
    if len(keep):
        assert 0.2 < keep.double().mean() < 0.8 and keep.sum(2).unique().numel() > 2
    results, caches = run_in_pieces(model, idx, sizes)
    for pieces, whole in zip(results, (logits, p, keep)):
        same(pieces, whole)
    for i, kept in zip(model.cfg.routed, keep):     # a skipped token leaves nothing behind
        assert torch.equal(caches[i].count, kept.sum(1))


@PIECES
def test_rows_packed_together_equal_rows_decoded_alone(sizes):
    model, idx = build().eval(), tokens(4)
    (logits, _, keep), _ = run_in_pieces(model, idx, sizes)
    assert (keep.sum(2).amax(1) > keep.sum(2).amin(1)).all()
    for b in range(4):
        (alone, _, kept), _ = run_in_pieces(model, idx[b : b + 1], sizes)
        same(alone[0], logits[b])
        assert torch.equal(kept[:, 0], keep[:, b])


@pytest.mark.parametrize("n, n_new", [(5, 12), (1, 23), (23, 1)])
def test_greedy_text_is_the_argmax_of_full_forwards(n, n_new):
    model, idx = build().eval(), tokens(3, n)
    out, keep = mod.generate(model, idx, n_new, 0)
    for _ in range(n_new):
        idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, idx)
    assert torch.equal(keep, model(idx[:, :-1])[2])


@pytest.mark.parametrize("temp", [0.7, 2.0])
def test_sampled_tokens_have_the_frequencies_of_the_softmax(temp):
    model, n = build().eval(), 4000
    prompt = tokens(1, 3).expand(n, 3)
    model.head.weight.data *= 0.3
    drawn = mod.generate(model, prompt, 1, temp)[0][:, -1]
    weight = torch.exp(model(prompt[:1])[0][0, -1] / temp)
    prob = weight / weight.sum()
    frequency = drawn.bincount(minlength=VOCAB) / n
    assert ((frequency - prob).abs() <= 4 * (prob * (1 - prob) / n).sqrt()).all()


def test_seed_alone_decides_what_is_sampled():
    model, idx = build().eval(), tokens(3, 4)
    texts = []
    for noise, seed in [(1, 0), (2, 0), (2, 1)]:
        torch.manual_seed(noise)
        texts.append(mod.generate(model, idx, 15, 1.0, seed)[0])
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


# ---- Random routing


def test_random_routing_picks_all_positions_equally_often(monkeypatch):
    model, n = build(routing="random"), 4000
    stub_update(model, monkeypatch)
    x, bound = torch.zeros(n, 24, 16), 4 * math.sqrt(0.25 * 0.75 / n)
    torch.manual_seed(0)
    r, p = model.scores(1, x)
    y, keep = picked(model, 1, x, r)
    for kept in (keep, p > 0):
        assert ((kept.double().mean(0) - 0.25).abs() <= bound).all()
    assert torch.equal(y, 10.0 * keep[..., None].expand_as(x))              # and adds no factor
    chance = ((p > 0)[:, 1:] & (p > 0)[:, :-1]).double().mean().item()
    assert abs(chance - 0.0625) < 0.004                                     # token by token


def test_random_routing_does_not_look_at_the_tokens():
    model, scores = build(routing="random"), []
    for x in (stream(3)[0], 100 * stream(3, seed=1)[0]):
        torch.manual_seed(0)
        scores.append([torch.stack(model.scores(i, x)) for i in (1, 3)])
    assert torch.equal(scores[0][0], scores[1][0])
    assert not torch.equal(scores[0][0], scores[0][1])


# ---- Objective


@pytest.mark.parametrize("changes, weight", [
    ({}, 1.0), (dict(causal="aux"), 0.01),
    (dict(routing="random"), 0.0), (dict(routed_every=0), 0.0)])
def test_objective_by_hand(changes, weight):
    model, batch = build(**changes), {"idx": tokens(3), "targets": tokens(3, seed=1)}
    torch.manual_seed(0)
    loss, stats = mod.loss_fn(model, batch, model.cfg)
    torch.manual_seed(0)
    logits, p, keep = model(batch["idx"])
    log_prob = logits - torch.log(torch.exp(logits).sum(-1, keepdim=True))
    right = [log_prob[b, t, batch["targets"][b, t]] for b in range(3) for t in range(24)]
    expected = -sum(right) / 72
    same(stats["loss"], expected.detach())
    if weight:
        chosen = torch.where(keep, torch.sigmoid(p), 1 - torch.sigmoid(p))
        expected = expected - weight * torch.log(chosen).sum() / (2 * 3 * 24)
    same(loss, expected)


# ---- Sizes and arms


@pytest.mark.parametrize("flags", ["--seed 0", "--seq_len 3 --capacity 1", "--capacity 0.007"])
def test_what_cannot_be_trained_or_decoded_is_refused(flags):
    """Seed 0 would give training and validation the same windows."""
    with pytest.raises(ValueError, match=flags.split()[0].strip("-")):
        mod.parse_args(flags.split())


def test_rows_that_are_decoded_have_prompts_of_their_own(tmp_path, monkeypatch):
    """Rows of one text skip the same blocks together, which rows of several do not."""
    prompts, generate = [], mod.generate
    monkeypatch.setattr(mod, "generate",
                        lambda model, idx, *rest: prompts.append(idx) or generate(model, idx, *rest))
    cfg = mod.Config(**SMALL, out=str(tmp_path))
    mod.decode(mod.MoD(cfg, len(mod.read_text("")[0])), cfg, mod.Run(cfg))
    assert {prompt.shape for prompt in prompts} == {(32, 18), (1, 18)}
    assert all(len(prompt.unique(dim=0)) > 0.9 * len(prompt) for prompt in prompts)


def test_shortest_sequence_is_decoded(tmp_path):
    cfg = mod.Config(**SMALL | dict(seq_len=4, out=str(tmp_path)))
    found = mod.decode(mod.MoD(cfg, len(mod.read_text("")[0])), cfg, mod.Run(cfg))
    assert len(found["sample"]) == 4 and len(found["sample_routing"][0]) == 3


@pytest.mark.parametrize("seq_len, capacities", [(8, [0.25, 0.5]), (16, [0.0625, 0.25, 0.5])])
def test_full_has_the_capacities_that_pick_a_token(seq_len, capacities, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(mod, "select", lambda arms, cfg, run: found.update(arms) or {})
    cfg = mod.Config(seq_len=seq_len, full=True, out=str(tmp_path))
    mod.experiment(cfg, mod.Run(cfg))
    some = {name: arm.capacity for name, arm in found.items() if name.startswith("capacity")}
    assert some == {f"capacity {c}": c for c in capacities}


def test_steps_are_timed_in_turn_with_a_plain_model(tmp_path, monkeypatch):
    built, seconds, MoD = [], [], mod.MoD

    def building(cfg, vocab_size):
        built.append(MoD(cfg, vocab_size))
        return built[-1]

    def timed(job, number):     # routed takes 1 to 25 s, plain 10, at double the pace in the end
        weights = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in built]
        assert type(job()) is float and number == 1
        after = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in built]
        moved = [not torch.equal(a, b) for a, b in zip(weights, after)]
        assert moved == [len(seconds) % 2 == 0, len(seconds) % 2 == 1]
        turn = len(seconds) // 2
        seconds.append((10.0 if len(seconds) % 2 else turn + 1.0) * (0.5 if turn > 9 else 1))
        return seconds[-1]

    monkeypatch.setattr(mod, "MoD", building)
    monkeypatch.setattr(mod.timeit, "timeit", timed)
    cfg = mod.Config(**SMALL, batch_size=4, out=str(tmp_path))
    assert mod.step_ratio(cfg, len(mod.read_text("")[0]), mod.Run(cfg)) == pytest.approx(1.3)
    assert [m.cfg.routed for m in built] == [[1, 3], []] and len(seconds) == 50
    assert all(p.grad is not None for m in built for p in m.parameters())


# ---- FLOPs


@pytest.mark.parametrize("changes, per_token", [
    (dict(routed_every=0), 1_056_896),              # 8 blocks of 131,072, head 8,320
    (dict(routed_every=0, n_layer=4), 532_608),
    ({}, 600_960),                                  # 4 full, 4 of 12,800 + 128 + 4,160, head
    (dict(routing="random"), 583_808),
    (dict(causal="aux"), 584_320),
    (dict(routed_every=1, capacity=0.5), 501_376)])     # 8 of 57,344 + 128 + 4,160, head
def test_flops_equal_the_closed_form_and_a_count(changes, per_token):
    cfg = mod.Config(n_embd=64, n_head=4, seq_len=128, **changes)
    assert mod.flops_per_token(cfg, 65) == per_token
    model = mod.MoD(cfg, 65)
    counter = FlopCounterMode(display=False)        # it does not know the fused kernel of a CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.train()(torch.zeros(2, 128, dtype=torch.long))
    assert counter.get_total_flops() / 256 == per_token


# ---- Data


@pytest.fixture
def ruler(tmp_path):
    """A Config with a text of 300 characters in which the id of a character is its place."""
    path = tmp_path / "ruler.txt"
    path.write_bytes("".join(map(chr, range(0x4E00, 0x4E00 + 300))).encode())
    return mod.Config(**SMALL, corpus=str(path), batch_size=32)


@pytest.mark.parametrize("split, first, last", [("train", 0, 269), ("val", 270, 299)])
def test_windows_cover_their_own_part_of_the_text_and_targets_are_one_on(ruler, split, first, last):
    batches = [mod.make_batch(ruler, split, step) for step in range(60)]
    idx, targets = (torch.cat([batch[name] for batch in batches]) for name in ("idx", "targets"))
    assert torch.equal(idx, idx[:, :1] + torch.arange(24)) and torch.equal(targets, idx + 1)
    assert idx.min() == first and targets.max() == last
    assert len(idx[:, 0].unique()) > 0.9 * (last - first + 1 - 24)


def test_a_batch_is_a_function_of_seed_split_and_step(ruler):
    other = mod.Config(**SMALL, corpus=ruler.corpus, batch_size=32, seed=2)
    batches = []
    for noise, cfg in enumerate([ruler, ruler, other]):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        batches.append({(split, step): mod.make_batch(cfg, split, step)["idx"]
                        for split in ("train", "val") for step in (0, 1)})
        assert torch.equal(torch.get_rng_state(), state)
    first, again, another_seed = batches
    assert all(torch.equal(first[key], again[key]) for key in first)
    for split in ("train", "val"):
        assert not torch.equal(first[split, 0], first[split, 1])
        assert torch.equal(first[split, 0], another_seed[split, 0]) == (split == "val")


# ---- Evaluation


def test_evaluation_by_brute_force(tmp_path):
    cfg = mod.Config(**SMALL, batch_size=8, eval_batches=2, out=str(tmp_path))
    torch.manual_seed(0)
    model = mod.MoD(cfg, len(mod.read_text("")[0]))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    metrics = mod.evaluate(model, cfg, mod.Run(cfg))
    causal, topk, by_passes = [], [], {0: [], 1: [], 2: []}
    kept, hits, rejects, picked = 0, 0, 0, 0
    for step in range(2):
        batch = mod.make_batch(cfg, "val", step)
        logits_topk, p, label = model.train()(batch["idx"])
        logits, _, keep = model.eval()(batch["idx"])
        for b in range(8):
            for t in range(24):
                answer = batch["targets"][b, t]
                topk.append(-logits_topk[b, t].log_softmax(-1)[answer].item())
                causal.append(-logits[b, t].log_softmax(-1)[answer].item())
                by_passes[keep[:, b, t].sum().item()].append(causal[-1])
                for i in range(2):
                    kept += keep[i, b, t].item()
                    picked += label[i, b, t].item()
                    hits += (label[i, b, t] & (p[i, b, t] > 0)).item()
                    rejects += (~label[i, b, t] & (p[i, b, t] <= 0)).item()
    expected = dict(loss=sum(causal) / 384, loss_topk=sum(topk) / 384, keep_rate=kept / 768,
                    balanced_accuracy=(hits / picked + rejects / (768 - picked)) / 2,
                    loss_by_passes=[sum(nll) / len(nll) if len(nll) > 99 else None
                                    for nll in by_passes.values()])
    assert 0 < expected["loss_by_passes"].count(None) < 3
    assert {name: metrics[name] for name in expected} == {
        name: pytest.approx(value, abs=1e-10) for name, value in expected.items()}


def test_without_a_predictor_no_accuracy_of_one_is_measured(tmp_path):
    cfg = mod.Config(**SMALL, routing="random", batch_size=8, eval_batches=1, out=str(tmp_path))
    metrics = mod.evaluate(mod.MoD(cfg, len(mod.read_text("")[0])), cfg, mod.Run(cfg))
    assert 0.1 < metrics["keep_rate"] < 0.4 and "balanced_accuracy" not in metrics
    measure = {claim[0]: claim[1] for claim in mod.CLAIMS}["M3 predictor, balanced accuracy"]
    with pytest.raises(LookupError):    # then the report says "not judged"
        measure({"mod": metrics})
