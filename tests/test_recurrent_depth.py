"""Oracles of recurrent_depth.py: what is computed here by hand or by brute force must come out."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import recurrent_depth as rd
from tests.quick import unpainted

SMALL = dict(n_layer=4, n_head=2, n_embd=16, seq_len=13, batch_size=12, device="cpu")
same = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Double precision everywhere, also where the script asks for float32: the logits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float32(float64, monkeypatch):
    monkeypatch.undo()
    torch.set_default_dtype(torch.float32)


def build(seed=0, std=None, **changes):
    """A model as it starts, or with larger random weights everywhere."""
    torch.manual_seed(seed)
    model = rd.RecurrentDepth(rd.Config(**SMALL | changes))
    for p in model.parameters() if std else ():
        nn.init.normal_(p, std=std)
    return model


def data(model, split="train", step=0):
    batch = rd.make_batch(model.cfg, split, step)
    return batch["idx"], batch["s0"], batch["targets"]


def run_states(model, idx, s, r):
    return list(model.states(idx, s, r))


# ---- The core


def test_three_iterations_and_three_more_are_six():
    model = build(std=0.3)
    idx, s0, _ = data(model)
    six = run_states(model, idx, s0, 6)
    more = run_states(model, idx, run_states(model, idx, s0, 3)[-1], 3)
    assert torch.equal(six[-1], more[-1]) and not torch.equal(six[-1], six[2])
    assert torch.equal(model(idx, s0, 6), model.read_out(six[-1]))


def test_the_model_by_hand():
    """Unrolled: prelude, adapter and core r times, coda; nothing knows the number of the step."""
    model = build(std=0.3)
    idx, s, _ = data(model)
    near = torch.ones(13, 13).tril().triu(-1) > 0
    block = lambda b, x: b(x, rd.rope_table(13, 8), lambda k, v: (k, v, near))
    e = block(model.prelude[0], 4 * model.embed.weight[idx])
    for _ in range(3):
        s = torch.cat([s, e], dim=-1) @ model.adapter.weight.T
        s = block(model.core[1], block(model.core[0], s))
    s = rd.norm(block(model.coda[0], rd.norm(s)))
    same(model(idx, data(model)[1], 3), s @ model.embed.weight.T)


def test_block_by_hand():
    torch.manual_seed(0)
    block = rd.SandwichBlock(rd.Config(**SMALL))
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    x, rope = torch.randn(2, 5, 16), rd.rope_table(5, 8)

    def memory(k, v):
        return k, v, torch.ones(5, 5).tril() > 0

    u = rd.norm(x + block.attn(rd.norm(x), rope))
    same(block(x, rope, memory), rd.norm(u + block.mlp(rd.norm(u))))


def test_states_of_a_sandwich_keep_their_size():
    model = build(std=0.5, inject="add")
    idx, s0, _ = data(model)
    size = [s.square().mean(-1).sqrt() for s in run_states(model, idx, s0, 12)]
    assert all((s - 1).abs().max() < 1e-3 for s in size)


@pytest.mark.parametrize("inject", ["concat", "add", "none"])
def test_flops_equal_those_of_a_counter(inject):
    model = build(std=0.5, inject=inject)
    idx, s0, _ = data(model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx[:1], s0[:1], 3)
    T = model.cfg.seq_len
    assert counter.get_total_flops() == T * rd.recurrent_flops(model.cfg, 3)


def test_two_identities_as_adapter_are_addition():
    model, added = build(std=0.3), build(std=0.3, inject="add")
    added.load_state_dict(model.state_dict(), strict=False)
    model.adapter.weight.data = torch.cat([torch.eye(16), torch.eye(16)], dim=1)
    idx, s0, _ = data(model)
    same(model(idx, s0, 5), added(idx, s0, 5))


def test_one_iteration_that_reads_e_alone_is_a_plain_transformer():
    model = build(std=0.3)
    model.adapter.weight.data = torch.cat([torch.zeros(16, 16), torch.eye(16)], dim=1)
    idx, s0, _ = data(model)
    x = 4 * model.embed(idx)
    for block in [*model.prelude, *model.core, *model.coda]:
        x = block(x, model.rope[:13], lambda k, v: (k, v, model.near[:13, :13]))
    torch.testing.assert_close(model(idx, s0, 1), rd.norm(x) @ model.embed.weight.T,
                               rtol=0, atol=1e-3)
    assert torch.equal(model(idx, s0, 1), model(idx, 0 * s0, 1))


def test_out_projections_start_smaller_by_the_expected_depth():
    model = build(n_embd=128, rbar=8)
    weights = {"out": [], "rest": []}
    for name, p in model.named_parameters():
        weights["out" if name.endswith("proj.weight") else "rest"].append(p.flatten())
    out, rest = (torch.cat(w) for w in weights.values())
    assert (out.std() / rest.std()).item() == pytest.approx(1 / math.sqrt(2 * 20), rel=0.02)
    assert rest.std().item() == pytest.approx(math.sqrt(0.973 * 2 / (5 * 128)), rel=0.02)
    assert rest.abs().max() <= 3 * math.sqrt(2 / (5 * 128))


# ---- Truncated backpropagation


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_only_the_last_k_iterations_carry_a_gradient_and_it_is_that_of_a_detached_start():
    model = build(std=0.3, k=2)
    idx, s0, _ = data(model)
    carried = [s.grad_fn is not None for s in model.states(idx, s0, 6)]
    assert carried == [False] * 4 + [True] * 2 and not s0.requires_grad
    assert [s.grad_fn is not None for s in model.states(idx, s0, 1)] == [True]
    found = gradients(model, model(idx, s0, 6).square().sum())
    e = model.encode(idx)
    with torch.no_grad():
        s = s0
        for _ in range(4):
            s = model.step(s, e)
    for _ in range(2):
        s = model.step(s, e)
    expected = gradients(model, model.read_out(s).square().sum())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_with_k_of_r_or_more_the_gradient_is_the_full_one():
    model = build(std=0.3, k=6)
    idx, s0, _ = data(model)
    found = gradients(model, model(idx, s0, 6).square().sum())
    e, s = model.encode(idx), s0
    for _ in range(6):
        s = model.step(s, e)
    expected = gradients(model, model.read_out(s).square().sum())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.cfg.k = 2
    cut = gradients(model, model(idx, s0, 6).square().sum())
    assert not any(torch.equal(found[name], cut[name]) for name in found if "coda" not in name)


def test_everything_learns_with_k_1_and_without_injection_through_all_iterations():
    model = build(std=0.3, k=1)
    idx, s0, _ = data(model)
    found = gradients(model, model(idx, s0, 5).square().sum())
    assert all(g is not None and g.abs().max() > 0 for g in found.values())
    assert found["adapter.weight"][:, :16].any() and found["adapter.weight"][:, 16:].any()
    model = build(std=0.3, k=1, inject="none")
    found = gradients(model, model(idx, s0, 5).square().sum())
    s = model.encode(idx)       # there is no other path to the prelude
    for _ in range(5):
        s = model.step(s, None)
    expected = gradients(model, model.read_out(s).square().sum())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(g.abs().max() > 0 for g in found.values())


def test_memory_of_a_training_step_depends_on_k_and_not_on_r():
    model = build()
    idx, s0, _ = data(model)
    batch = {"idx": idx, "s0": s0}
    sizes = [rd.kept_bytes(model, batch, r) for r in (3, 4, 8, 32)]
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]
    model.cfg.k = 8
    assert rd.kept_bytes(model, batch, 32) > 1.5 * sizes[3]


def test_bfloat16_gradients_with_free_iterations_agree_with_float32(float32):
    model = build(k=2)
    idx, s0, _ = data(model)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(idx, s0, 6).flatten(0, 1), data(model)[2].flatten())
        found.append(gradients(model, loss))
    for name, exact in found[0].items():
        assert found[1][name] is not None, name
        cosine = F.cosine_similarity(exact.flatten(), found[1][name].flatten(), dim=0)
        assert cosine > 0.99, (name, cosine)


# ---- The number of iterations and the initial state


@pytest.mark.parametrize("rbar, mean, sd, median, within", [
    (8, 9.0, 5.1, 8, 0.08), (32, 33.0, 18.0, 29, 0.3)])
def test_law_of_r(rbar, mean, sd, median, within):
    cfg = rd.Config(rbar=rbar)      # the cap of 4 rbar takes a little of the tail
    torch.manual_seed(0)
    r = torch.tensor([rd.draw_depth(cfg) for _ in range(40_000)]).double()
    assert r.mean().item() == pytest.approx(mean, abs=within)
    assert r.std().item() == pytest.approx(sd, abs=2 * within)
    assert r.median() == median and r.min() >= 1


def test_r_follows_from_the_seed_is_capped_and_can_be_fixed():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append([rd.draw_depth(rd.Config(rbar=3)) for _ in range(500)])
    assert draws[0] == draws[1] != draws[2]
    assert max(draws[0]) == 12 and len(set(draws[0])) > 5
    assert {rd.draw_depth(rd.Config(rbar=4, unroll="fixed")) for _ in range(9)} == {5}


def test_one_r_serves_the_batch(monkeypatch):
    model, calls = build(), []
    monkeypatch.setattr(rd, "draw_depth", lambda cfg: calls.append(cfg) or 3)
    batch = rd.make_batch(model.cfg, "train", 0)
    loss, _ = rd.loss_fn(model, batch, model.cfg)
    logits = model(batch["idx"], batch["s0"], 3)
    right = logits.log_softmax(-1).gather(-1, batch["targets"][..., None])[:, 1:]
    assert len(calls) == 1
    same(loss, -right.mean())


def test_law_of_the_initial_state():
    for width in (16, 64):
        cfg = rd.Config(**SMALL | dict(n_embd=width, batch_size=4000))
        s0 = rd.make_batch(cfg, "train", 0)["s0"]
        assert s0.var().item() == pytest.approx(0.389, abs=0.005)
        assert s0.abs().max() <= 3 * math.sqrt(0.4)
        for a, b in [(s0[:, 1:], s0[:, :-1]), (s0[1:], s0[:-1]), (s0[..., 1:], s0[..., :-1]),
                     (s0, rd.make_batch(cfg, "train", 1)["s0"])]:
            assert abs((a * b).mean().item()) < 0.003


# ---- Data and the ceiling


@pytest.mark.parametrize("task, order", [("parity", 2), ("s3", 6)])
def test_groups_are_groups_and_only_s3_depends_on_the_order(task, order):
    group = rd.GROUPS[task]
    everything = range(order)
    assert len(group) == order and [group[0][a] for a in everything] == list(everything)
    assert all(sorted(row) == list(everything) for row in [*group, *zip(*group)])
    for a, b, c in itertools.product(everything, repeat=3):
        assert group[group[a][b]][c] == group[a][group[b][c]]
    assert (group == [list(row) for row in zip(*group)]) == (task == "parity")


@pytest.mark.parametrize("task", ["parity", "s3"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_targets_by_brute_force(task, split):
    cfg = rd.Config(**SMALL, task=task)
    batch, group = rd.make_batch(cfg, split, 3), rd.GROUPS[task]
    assert (batch["idx"][:, 0] == len(group)).all() and len(batch["idx"]) == 12
    for idx, targets in zip(batch["idx"].tolist(), batch["targets"].tolist()):
        product = 0
        for element, target in zip(idx[1:], targets[1:]):
            product = group[product][element]
            assert target == product
    if task == "parity":
        assert torch.equal(batch["targets"][:, 1:], batch["idx"][:, 1:].cumsum(1) % 2)


def test_validation_sets_have_every_first_element_and_nothing_else_differs():
    batch = rd.make_batch(rd.Config(**SMALL, task="s3"), "val", 0)
    for idx, s0 in zip(batch["idx"].split(6), batch["s0"].split(6)):
        assert idx[:, 1].tolist() == [0, 1, 2, 3, 4, 5]
        assert (idx[:, 2:] == idx[:1, 2:]).all() and (s0 == s0[:1]).all()


def test_a_batch_is_a_function_of_seed_split_and_step():
    batches = {}
    for seed, split, step, noise in itertools.product((1, 2), ("train", "val"), (0, 1), (0, 1)):
        torch.manual_seed(noise)
        batch = rd.make_batch(rd.Config(**SMALL, seed=seed), split, step)
        batches[seed, split, step, noise] = batch
    for (seed, split, step, noise), batch in batches.items():
        for name in ("idx", "s0"):
            assert torch.equal(batch[name], batches[seed, split, step, 1 - noise][name])
            assert not torch.equal(batch[name], batches[seed, split, 1 - step, noise][name])
            other = batches[3 - seed, split, step, noise][name]
            assert torch.equal(batch[name], other) == (split == "val")


@pytest.mark.parametrize("n, r, expected", [
    (12, 1, 0.708), (12, 2, 0.792), (12, 4, 0.958), (12, 5, 1.0), (48, 8, 0.698), (48, 16, 0.865),
    (48, 23, 1.0), (48, 22, 0.990)])
def test_ceiling_of_parity(n, r, expected):
    assert rd.ceiling(rd.Config(seq_len=n + 1), r) == pytest.approx(expected, abs=5e-4)


def test_ceiling_of_other_settings():
    assert rd.ceiling(rd.Config(seq_len=13, window=0), 1) == 1
    assert rd.ceiling(rd.Config(seq_len=13, task="s3"), 1) == pytest.approx((5 + 7 / 6) / 12)
    assert rd.ceiling(rd.Config(seq_len=13, window=2), 1) == pytest.approx((9 + 3 / 2) / 12)
    assert rd.ceiling(rd.Config(seq_len=49, n_layer=20), 1) == pytest.approx((21 + 27 / 2) / 48)


@pytest.mark.parametrize("window, r", [(1, 1), (1, 2), (2, 1), (0, 1)])
def test_no_position_sees_later_ones_or_further_than_its_reach(window, r):
    model = build(std=0.5, window=window, seq_len=33)
    idx, s0, _ = data(model)
    j, reach = 7, 1 + window * (2 + 2 * r) if window else 33
    other = idx.clone()
    other[:, j] = 1 - idx[:, j]
    moved = (model(idx, s0, r) != model(other, s0, r)).any(-1).any(0)
    assert not moved[:j].any() and not moved[j + reach :].any()
    assert moved[j : j + reach].all()


@pytest.mark.parametrize("task", ["parity", "s3"])
def test_no_random_model_is_above_the_ceiling_and_what_it_cannot_see_is_a_coin_flip(task, tmp_path):
    cfg = rd.Config(**SMALL, task=task, out=str(tmp_path))
    curves = rd.scaling(build(std=0.5, task=task), cfg, rd.Run(cfg))
    assert [len(curve["accuracy"]) for curve in curves] == [64, 64, 64]
    assert max(max(curve["excess"]) for curve in curves) <= 0
    long = curves[2]
    assert long["ceiling"][0] < 0.6 and long["ceiling"][40] == 1
    longer = rd.longer(cfg)[2]
    batch = rd.make_batch(longer, "val", 0)
    logits = build(std=0.5, task=task)(batch["idx"], batch["s0"], 1)[..., : len(rd.GROUPS[task])]
    same(rd.right(logits, batch["targets"])[:, 5:].mean().item(), 1 / len(rd.GROUPS[task]))


def test_a_leak_is_found(tmp_path, monkeypatch):
    """The positive control: a model that looks at the answer is above the ceiling."""
    cfg = rd.Config(**SMALL, out=str(tmp_path))
    model = build(std=0.5)
    answers = {c.seq_len: rd.make_batch(c, "val", 0)["targets"] for c in rd.longer(cfg)}
    monkeypatch.setattr(model, "read_out", lambda s: F.one_hot(answers[s.size(1)], 3).double())
    assert max(rd.scaling(model, cfg, rd.Run(cfg))[2]["excess"]) > 3


# ---- Decoding with caches


def test_token_by_token_with_a_slot_for_every_iteration_equals_the_parallel_forward():
    model = build(std=0.3, k=1)
    idx, s0, _ = data(model)
    logits = model(idx, s0, 4)
    same(rd.decode_tokens(model, idx, s0, 4, 4), logits)
    assert torch.equal(rd.decode_tokens(model, idx, s0, 4, 9), rd.decode_tokens(model, idx, s0, 4, 4))
    for slots in (1, 2, 3):     # shared: an earlier token is read at a later iteration than its own
        off = (rd.decode_tokens(model, idx, s0, 4, slots) - logits)
        assert off[:, 0].abs().max() < 1e-10 and off[:, 1:].abs().max() > 1e-3


def test_with_one_slot_a_token_reads_the_last_iteration_of_those_before_it():
    model = build(std=0.3)
    idx, s0, _ = data(model)
    (B, T), size = idx.shape, (2, 12, 2, 13, 8)
    last = [torch.zeros(size) for _ in model.core]      # what finished tokens left behind
    first, end = ([torch.zeros(size)] for _ in range(2))
    logits = []
    for t in range(T):
        e, s = model.encode(idx[:, t : t + 1], t, first), s0[:, t : t + 1]
        for i in range(3):
            mine = [cache.clone() for cache in last]    # a token's own writes are never read back
            s = model.step(s, e, t, mine)
        last = mine
        logits.append(model.read_out(s, t, end))
    same(rd.decode_tokens(model, idx, s0, 3, 1), torch.cat(logits, dim=1))


# ---- Adaptive exit


def stub_predictions(model, monkeypatch, rows):
    """read_out gives one prediction (V,) after another, at every position."""
    rows = iter(rows)
    monkeypatch.setattr(model, "read_out", lambda s: torch.tensor(next(rows)).log().expand(1, 13, 3))


def test_exit_measures_kl_of_the_earlier_to_the_later_prediction(monkeypatch):
    model = build()
    idx, s0, _ = data(model)
    p, q = [0.7, 0.2, 0.1], [0.4, 0.4, 0.2]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q))
    reverse = sum(b * math.log(b / a) for a, b in zip(p, q))
    first = sum(math.log(1 / (3 * a)) / 3 for a in p)       # from uniform
    assert reverse > kl and first > reverse
    for threshold, steps in [((kl + reverse) / 2, 4), (kl - 1e-6, 6), (first + 1e-6, 2)]:
        stub_predictions(model, monkeypatch, [p, q, q, q])
        cfg = rd.Config(**SMALL, threshold=threshold, check_every=2)
        assert rd.think(model, idx[:1], s0[:1], cfg)[1] == steps


def test_exit_waits_for_the_last_position(monkeypatch):
    model, calls = build(), []
    idx, s0, _ = data(model)

    def settled_but_one(s):
        calls.append(s)
        logits = torch.zeros(1, 13, 3)
        logits[0, 9, 0] = len(calls) if len(calls) < 5 else 4
        return logits

    monkeypatch.setattr(model, "read_out", settled_but_one)
    cfg = rd.Config(**SMALL, threshold=0.01, check_every=1)
    assert rd.think(model, idx[:1], s0[:1], cfg)[1] == 5


def test_no_threshold_never_exits_and_an_infinite_one_at_the_first_look():
    model = build()
    idx, s0, _ = data(model)
    for threshold, every, steps in [(0.0, 3, 64), (2.0**40, 3, 3), (2.0**40, 1, 1)]:
        cfg = rd.Config(**SMALL, threshold=threshold, check_every=every)
        logp, i = rd.think(model, idx[:1], s0[:1], cfg)
        assert i == steps
        same(logp, model(idx[:1], s0[:1], steps).log_softmax(-1))


# ---- Evaluation


def test_scaling_by_brute_force(tmp_path):
    cfg = rd.Config(**SMALL, out=str(tmp_path))
    model = build(std=0.5)
    curves = rd.scaling(model, cfg, rd.Run(cfg))
    assert [curve["n"] for curve in curves] == [12, 24, 48]
    curve = curves[1]
    batch = rd.make_batch(rd.Config(**SMALL | dict(seq_len=25)), "val", 0)
    other = rd.make_batch(rd.Config(**SMALL | dict(seq_len=25)), "val", 1)["s0"]
    for r in (1, 7):
        answers, others = (model(batch["idx"], s0, r).argmax(-1) for s0 in (batch["s0"], other))
        right = (answers == batch["targets"])[:, 1:]
        assert curve["accuracy"][r - 1] == pytest.approx(right.double().mean().item(), abs=1e-12)
        assert curve["exact"][r - 1] == right.all(1).double().mean().item()
        agree = (answers == others)[:, 1:].double().mean().item()
        assert curve["agreement"][r - 1] == pytest.approx(agree, abs=1e-12)
    a, b = (run_states(model, batch["idx"], s0, 7)[-1] for s0 in (batch["s0"], other))
    apart = [(x - y).norm() / x.norm() for x, y in zip(a.flatten(0, 1), b.flatten(0, 1))]
    assert curve["distance"][6] == pytest.approx(sum(apart).item() / len(apart), abs=1e-12)


@pytest.mark.parametrize("changes, r", [({}, 1), ({}, 5), (dict(n_layer=9), 1)])
def test_a_token_passes_as_many_blocks_as_depth_says(changes, r):
    model, calls = build(**changes), []
    for block in [*model.prelude, *model.core, *model.coda]:
        block.register_forward_hook(lambda *_: calls.append(block))
    idx, s0, _ = data(model)
    model(idx, s0, r)
    assert len(calls) == model.cfg.depth(r) == 2 + r * (model.cfg.n_layer - 2)


@pytest.mark.parametrize("task, batch_size, rows", [
    ("parity", 12, 4), ("parity", 4, 2), ("parity", 3, 1), ("parity", 2, 1), ("parity", 1, 1),
    ("s3", 24, 4), ("s3", 12, 2), ("s3", 1, 1)])
def test_exits_measure_single_sequences_of_different_sets(
        tmp_path, monkeypatch, task, batch_size, rows):
    changes = SMALL | dict(task=task, batch_size=batch_size)
    cfg = rd.Config(**changes, out=str(tmp_path))
    model, seen = build(**changes, std=0.3), []

    def think(model, idx, s, cfg):
        seen.append(idx)
        return model.read_out(s), 2 * idx.size(1)

    monkeypatch.setattr(rd, "think", think)
    monkeypatch.setattr(rd, "R_TEST", 128)
    monkeypatch.setattr(model, "forward", lambda idx, s, r: model.read_out(s))
    result = rd.exits(model, cfg, rd.Run(cfg))
    assert {len(idx) for idx in seen} == {1} and len(seen) == 3 * rows * 6
    for T in (13, 25, 49):
        strings = {tuple(idx[0].tolist()) for idx in seen if idx.size(1) == T}
        assert len({x[2:] for x in strings}) == len(strings) == rows
        assert len({x[1] for x in strings}) == min(rows, len(rd.GROUPS[task]))
    assert result["exit_steps"] == [26, 50, 98] and result["exit_slope"] == pytest.approx(2)
    assert result["exit_lost"] == 0


@pytest.mark.parametrize("steps, saved", [(4, None), (3, (1 - 2 / 5) / (1 - 3 / 4))])
def test_exit_is_timed_in_turn_with_all_iterations_and_ends_in_a_number(
        tmp_path, monkeypatch, steps, saved):
    """A number on the host: what a GPU was only told to do has no value yet. None: no promise."""
    cfg, calls, ends = rd.Config(**SMALL, out=str(tmp_path)), [], []

    def think(model, idx, s, cfg):
        calls.append("early")
        return model.read_out(s), steps

    def timed(job, number):     # early takes 2 or 3 s, full 5 or 6 s
        before = len(calls)
        ends.append(job())
        return (2.0 if len(calls) > before else 5.0) + len(ends) // 2 % 2

    monkeypatch.setattr(rd.timeit, "timeit", timed)
    monkeypatch.setattr(rd, "R_TEST", 4)
    monkeypatch.setattr(rd, "think", think)
    result = rd.exits(build(std=0.3), cfg, rd.Run(cfg))
    assert len(ends) == 3 * 4 * 5 * 2 and {type(end) for end in ends} == {float}
    assert len(calls) == 3 * 4 * (1 + 5)
    assert result["exit_ms"] == [2000] * 3 and result["full_ms"] == [5000] * 3
    assert result["seconds_saved"] == (pytest.approx([saved] * 3) if saved else [None] * 3)
    measure = {claim[0]: claim[1] for claim in rd.CLAIMS}["C4 seconds saved / promised"]
    with pytest.raises(TypeError):          # then the report says "not judged"
        measure({"recurrent": result | dict(seconds_saved=[None, None, 0.9])})


# ---- Bad input and the picture


@pytest.mark.parametrize("flags", [dict(seed=0), dict(k=0), dict(rbar=0), dict(n_layer=2)], ids=str)
def test_wrong_values_are_refused(flags):
    """Seed 0 would train on the batches of the validation."""
    with pytest.raises(ValueError, match=next(iter(flags))):
        rd.Config(**flags)


def panels(arms, monkeypatch, tmp_path):
    """What plot draws of these arms."""
    figures, Figure = [], rd.Figure
    monkeypatch.setattr(rd, "Figure", lambda **how: figures.append(Figure(**how)) or figures[-1])
    cfg = rd.Config(out=str(tmp_path), device="cpu")
    with unpainted():
        rd.plot(cfg, rd.Run(cfg), {"arms": arms, "environment": {"device": "cpu"}})
    return figures[0].axes


def test_points_of_curves_are_of_the_length_that_a_claim_names():
    arms = {"recurrent": dict(curves=[dict(n=n, accuracy=[n + r for r in range(64)])
                                      for n in (6, 12, 24)])}
    assert rd.at(arms, 12, 1) == 12 and rd.at(arms, 24, 64) == 24 + 63
    with pytest.raises(LookupError):
        rd.at(arms, 48, 64)


@pytest.mark.parametrize("needed, off", [((7, 13, 25), 0), ((7, 13, 28), 0.25), ((7, 13, 13), 1),
                                         ((13, 13, 25), 1), ((7, 26, None), 1), ((7, None, None), 1),
                                         ((None, None, None), 1)])
def test_bend_is_how_far_the_growth_is_off_a_line_and_one_if_the_end_is_not_seen(needed, off):
    """Elements are 12, 24, 48, so that the second rise must be twice the first."""
    rises = [[0.5] * ((first or 65) - 1) + [0.96] * (65 - (first or 65)) for first in needed]
    arms = {"recurrent": dict(curves=[dict(accuracy=rise) for rise in rises])}
    assert rd.bend(arms) == pytest.approx(off)


def curves(r):
    return [dict(accuracy=[0.5] * r, ceiling=[1.0] * r, distance=[0.5] * (r - 1) + [0.25])] * 3


def test_panels_without_curves_state_no_finding(monkeypatch, tmp_path):
    axes = panels({"twin": dict(curves=curves(1), longest_r64=0.5)}, monkeypatch, tmp_path)
    assert [panel.get_title() for panel in axes] == ["", "n = 48 is solved by no arm", ""]


def test_both_paths_are_told_apart_and_their_distance_is_that_of_all_channels(
        monkeypatch, tmp_path):
    path = [[[0.0, float(r)]] * 3 for r in range(64)]
    arm = dict(curves=curves(64), longest_r64=1.0, exit_steps=[9, 18, 30], orbits=[path, path])
    _, parts, orbit = panels({"recurrent": arm}, monkeypatch, tmp_path)
    assert "ceiling of recurrent" in parts.get_legend_handles_labels()[1]
    assert orbit.get_title() == "Two starts end 0.25 |s| apart (stars)"
    looks = [(line.get_linestyle(), line.get_marker()) for line in orbit.lines]
    assert looks == [(line, mark) for one in "osD" for line, mark in
                     [("-", one), ("--", "x"), ("None", "*")]]
    assert orbit.lines[0].get_linewidth() > 2 * orbit.lines[1].get_linewidth()
