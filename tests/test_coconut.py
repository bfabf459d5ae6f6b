"""Oracles of coconut.py: other ways to compute the same, gradients, leaks, numbers by hand."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import coconut
from tests.quick import unpainted

SMALL = dict(n_head=2, n_embd=16, n_hop=3, batch_size=8, device="cpu")
same = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10, check_dtype=False)
ARMS = {"coconut": {}, "pause": dict(slot="pause"), "no_thought": dict(slot="nothing"),
        "cot": dict(slot="nothing", remove="none")}


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Double precision also where the script asks for float32: the logits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def config(**changes):
    return coconut.Config(**SMALL | changes)


def build(cfg, seed=0):
    """A model with random weights everywhere; a fresh one is zero where it matters."""
    torch.manual_seed(seed)
    model = coconut.Coconut(cfg).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def batch_at(cfg, stage, step=0):
    """A training batch all of whose rows are at this stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coconut.Config, "stage", lambda self, done: stage)
        return coconut.make_batch(replace(cfg, mix=0.0), "train", step)


def joined(batches):
    """Row i of batch number i, then i + 8 of it, ...: all stages in one batch."""
    pick = torch.arange(len(batches[0]["idx"])) % len(batches)
    rows = torch.arange(len(pick))
    return {name: torch.stack([b[name] for b in batches])[pick, rows] for name in batches[0]}


def mixed(cfg):
    return joined([batch_at(cfg, k) for k in range(cfg.n_hop + 1)])


def inputs(model, batch):
    """The vectors of all positions if every slot is read as a token. (B, T, C)"""
    edges = model.words(batch["edges"])
    edges = edges[:, :, 0] * model.ends[0] + edges[:, :, 1] * model.ends[1]
    return torch.cat([edges, model.words(batch["prompt"]), model.words(batch["idx"])], dim=1)


def plain(model, x):
    """One pass of a transformer over inputs x, without a cache. (B, T, C) -> (B, T, C)"""
    for block in [*model.blocks] * model.cfg.n_loop:
        x = block(x, model.rope[: x.size(1)])
    return coconut.norm(x)


def rerun(model, batch, passes=None, parallel=False):
    """Logits from r on: the whole sequence again for every thought, one input replaced each time.

    parallel=True replaces all thoughts at once by those of the sweep before.
    """
    x, P, D = inputs(model, batch), batch["edges"].size(1) + 5, model.cfg.n_hop
    for i in range(D if passes is None else passes):
        h, x = plain(model, x), x.clone()
        for slot in range(D) if parallel else [i]:
            thinks = batch["n_slot"][:, 0] > slot
            x[thinks, P + slot] = h[thinks, P + slot - 1]
    return model.logits(plain(model, x)[:, P - 1 :])


# ---- The method


@pytest.mark.parametrize("changes", [{}, dict(n_layer=2), dict(n_loop=3), dict(step_tokens=2)], ids=str)
def test_stage_0_is_a_plain_causal_transformer(changes):
    cfg = config(**changes)
    model, batch = build(cfg), batch_at(cfg, 0)
    assert not batch["n_slot"].any()
    want = model.logits(plain(model, inputs(model, batch)))[:, cfg.n_edge + 4 :]
    same(model(batch), want)


@pytest.mark.parametrize("changes", [{}, dict(n_layer=2), dict(n_loop=3), dict(step_tokens=2),
                                     dict(n_branch=3, n_hop=4)], ids=str)
def test_thoughts_through_a_cache_equal_a_rerun_for_every_thought(changes):
    cfg = config(**changes)
    model, batch, grads = build(cfg), mixed(cfg), []
    for logits in (model(batch), rerun(model, batch)):
        model.zero_grad()
        loss, _ = coconut.loss_fn(lambda _: logits, batch, cfg)
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()] + [logits.detach()])
    for found, want in zip(*grads):
        same(found, want)
    assert (rerun(model, batch, passes=cfg.n_hop - 1) - model(batch)).abs().max() > 1e-3


def test_parallel_sweeps_make_one_more_thought_exact_each():
    cfg = config()
    model, batch = build(cfg), batch_at(cfg, 3)
    want = model(batch)
    for sweeps in range(4):
        found = rerun(model, batch, passes=sweeps, parallel=True)
        same(found[:, : sweeps + 1], want[:, : sweeps + 1])     # of r, of z_1, ..., of z_sweeps
        assert ((found - want)[:, -1].abs().max() > 1e-6) == (sweeps < 3)


@pytest.mark.parametrize("stage", range(4))
def test_a_fixed_vector_in_the_slots_needs_no_passes_of_its_own(stage):
    cfg = config(slot="pause")
    model, batch = build(cfg), batch_at(cfg, stage)
    passes, states = [], model.states
    model.states = lambda x, caches: passes.append(x.size(1)) or states(x, caches)
    logits = model(batch)
    assert len(passes) == 2
    same(logits, model.logits(plain(model, inputs(model, batch)))[:, cfg.n_edge + 4 :])
    thinker = build(replace(cfg, slot="thought"))
    pause = model.words(torch.full((8, stage), coconut.PAUSE))
    same(coconut.reply(thinker, batch, stage, pause)[0], coconut.reply(model, batch, stage)[0])
    if stage == 3:
        same(coconut.reply(model, batch, 3)[0], logits[:, -1])


def test_a_thought_is_the_state_that_would_have_chosen_a_word():
    cfg = config()
    model, batch = build(cfg), batch_at(cfg, 3)
    _, z, _ = coconut.reply(model, batch, 3)
    assert z.shape == (8, 3, 16)
    same(model.logits(z), model(batch)[:, :3])
    same(z.mean(-1), torch.zeros(8, 3))             # behind the final norm
    torch.testing.assert_close(z.square().mean(-1), torch.ones(8, 3).double(), rtol=0, atol=1e-3)
    same(model.words(batch["idx"]).square().mean(-1), torch.ones(8, 4), atol=1e-3)  # a word, too


@pytest.mark.parametrize("slot", ["thought", "pause"])
def test_what_stands_in_a_thought_slot_is_never_read(slot):
    cfg = config(slot=slot)
    model, batch = build(cfg), batch_at(cfg, 2)
    other = dict(batch, idx=batch["idx"].clone())
    other["idx"][:, :2] = 4
    assert torch.equal(model(batch), model(other)) == (slot == "thought")
    names = [name for name in batch if name not in ("idx", "edges", "prompt", "n_slot")]
    assert names == ["targets", "node", "ends"]
    for name in names:          # what the model must not know
        other = dict(batch, **{name: batch[name] * 0})
        assert torch.equal(model(batch), model(other))


@pytest.mark.parametrize("changes", [{}, dict(n_layer=2), dict(step_tokens=2)], ids=str)
def test_no_position_knows_a_later_word(changes):
    cfg = config(**changes)
    model = build(cfg)
    for stage in range(4):
        batch = batch_at(cfg, stage)
        base = model(batch)
        for j in range(stage, batch["idx"].size(1)):
            other = dict(batch, idx=batch["idx"].clone())
            other["idx"][:, j] = torch.where(batch["idx"][:, j] == 4, 5, 4)
            moved = (model(other) - base).abs().amax((0, 2)) > 0
            assert moved[j + 1 :].all() and not moved[: j + 1].any(), (stage, j)


def thought_gradients(model, batch, cfg):
    """Gradient at the last state of every pass, for the answer's loss alone."""
    kept, states = [], model.states

    def keeping(x, caches):
        h = states(x, caches)
        h.retain_grad()
        kept.append(h)
        return h

    model.states = keeping
    coconut.loss_fn(model, batch, cfg)[0].backward()
    model.states = states
    return [h.grad[:, -1].abs().max().item() for h in kept]


def test_gradient_of_the_answer_reaches_every_thought(monkeypatch):
    cfg = config()
    model, batch = build(cfg), batch_at(cfg, 3)
    of_r, *of_slots, of_stop = thought_gradients(model, batch, cfg)
    assert len(of_slots) == 3
    assert min(of_r, *of_slots[:-1], of_stop) > 1e-6
    assert of_slots[-1] == 0        # the last slot's state is neither fed back nor scored
    where = torch.where
    monkeypatch.setattr(torch, "where", lambda m, h, x: where(m, h.detach(), x))
    of_r, *of_slots, of_stop = thought_gradients(model, batch, cfg)
    assert of_r == 0 and not any(of_slots) and of_stop > 1e-6


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "embed.weight", "ends"])
def test_gradient_equals_a_finite_difference(name):
    """Also of the words' vectors, through both of their uses, and of the ends of edges."""
    cfg = config()
    model, batch = build(cfg), batch_at(cfg, 3)
    weight = model.get_parameter(name)
    coconut.loss_fn(model, batch, cfg)[0].backward()
    found, eps, losses = weight.grad[-1, 5].item(), 1e-5, []
    with torch.no_grad():
        for step in (eps, -2 * eps):
            weight[-1, 5] += step
            losses.append(coconut.loss_fn(model, batch, cfg)[0].item())
    assert found == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-5)
    assert abs(found) > 1e-5


@pytest.mark.parametrize("changes", [{}, dict(n_layer=2, n_loop=2)], ids=str)
def test_cache_gives_the_keys_in_order_and_a_causal_mask(changes):
    cfg = config(**changes)
    model, x = build(cfg), torch.randn(2, 7, 16, dtype=torch.float64)
    caches = [[] for _ in range(cfg.n_layer * cfg.n_loop)]
    parts = [model.states(part, caches) for part in x.split([3, 1, 2, 1], dim=1)]
    same(torch.cat(parts, dim=1), plain(model, x))
    cache = [(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))]
    k, v, mask = coconut.grow(cache, torch.ones(1, 1, 2, 4), 2 * torch.ones(1, 1, 2, 4))
    assert k[0, 0, :, 0].tolist() == [0, 0, 1, 1] and v[0, 0, :, 0].tolist() == [0, 0, 2, 2]
    assert mask.tolist() == [[True, True, True, False], [True] * 4]


def test_relabelled_nodes_give_relabelled_logits():
    cfg = config()
    model, batch = build(cfg), batch_at(cfg, 2)
    order = torch.cat([torch.arange(4), 4 + torch.randperm(cfg.n_edge + 2)])
    other = dict(batch, **{name: order[batch[name]] for name in ("edges", "prompt", "idx")})
    want = model(batch)
    with torch.no_grad():
        model.embed.weight[order] = model.embed.weight.clone()
    same(model(other)[..., order], want)
    assert (model(batch) - want).abs().max() > 1e-3


def test_an_edge_has_a_direction():
    cfg = config()
    model, batch = build(cfg), batch_at(cfg, 0)
    assert (model(dict(batch, edges=batch["edges"].flip(2))) - model(batch)).abs().max() > 1e-3
    assert model(batch).size(1) == cfg.n_hop + 2        # r, D nodes, <eot>
    assert cfg.seq_len == cfg.n_edge + 5 + cfg.n_hop + 1


def test_every_parameter_is_clipped_once():
    model = build(config())
    clipped = sorted(id(p) for part in model.parts() for p in part)
    assert clipped == sorted(id(p) for p in model.parameters())


# ---- Objective, decoding


@pytest.mark.parametrize("changes", ARMS.values(), ids=ARMS)
def test_objective_by_hand(changes):
    cfg = config(**changes)
    model, batch = build(cfg), mixed(cfg)
    loss, stats = coconut.loss_fn(model, batch, cfg)
    logp, rows, places = model(batch).log_softmax(-1), [], {}
    for b in range(8):
        nlls = []
        for q in range(logp.size(1)):
            if batch["targets"][b, q] >= 0:
                nlls.append(-logp[b, q, batch["targets"][b, q]].item())
                places.setdefault(q, []).append(nlls[-1])
        rows.append(sum(nlls) / len(nlls))
    assert loss.item() == pytest.approx(sum(rows) / 8, abs=1e-10)
    assert stats["loss"] == loss
    for q, value in enumerate(stats["places"].tolist()):
        want = places.get(q)
        assert math.isnan(value) if not want else value == pytest.approx(sum(want) / len(want))


def test_rows_at_all_stages_equal_a_batch_for_each_stage():
    cfg = config()
    model, batches = build(cfg), [batch_at(cfg, k) for k in range(4)]
    logits = model(joined(batches))
    for k in range(4):
        same(logits[k::4], model(batches[k])[k::4])


@pytest.mark.parametrize("changes", [{}, dict(slot="nothing"), dict(slot="pause"), dict(n_layer=2),
                                     dict(step_tokens=2)], ids=str)
@pytest.mark.parametrize("stage", range(4))
def test_decoding_equals_a_forward_pass_over_what_was_decoded(stage, changes):
    cfg = config(**changes)
    model, batch = build(cfg), batch_at(cfg, stage)
    logits, thoughts, words = coconut.reply(model, batch, stage)
    n_slot, n_word = cfg.lengths(stage)
    assert thoughts.shape == (8, n_slot, 16) and words.shape == (8, n_word)
    idx = batch["idx"].clone()
    idx[:, n_slot : n_slot + n_word] = words
    full = model(dict(batch, idx=idx))
    same(logits, full[:, n_slot + n_word + 1])
    assert torch.equal(full[:, n_slot : n_slot + n_word].argmax(-1), words)
    assert (batch["targets"] == batch["ends"][:, :1])[:, n_slot + n_word + 1].all()


def test_words_fed_instead_of_states_are_a_chain_of_thought():
    cfg = config()
    model, batch = build(cfg), batch_at(cfg, 3)
    logits, _, words = coconut.reply(model, batch, 0)
    again, states, none = coconut.reply(model, batch, 3, model.words(words))
    assert torch.equal(model.logits(states).argmax(-1), words) and none.shape == (8, 0)
    same(again, logits)
    assert (coconut.reply(model, batch, 3)[0] - logits).abs().max() > 1e-3


def test_given_thoughts_enter_instead_of_the_own_ones():
    cfg = config()
    model, batch = build(cfg), batch_at(cfg, 3)
    logits, z, _ = coconut.reply(model, batch, 3)
    same(coconut.reply(model, batch, 3, z)[0], logits)
    assert (coconut.reply(model, batch, 3, z.roll(4, 0))[0] - logits).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, dict(n_layer=3), dict(n_loop=2), dict(slot="nothing"),
                                     dict(remove="none"), dict(step_tokens=2, remove="none"),
                                     dict(n_branch=3, n_embd=32)], ids=str)
def test_flops_of_an_answer(changes):
    cfg = config(**changes)
    model = coconut.Coconut(cfg)
    batch = {name: v[:1] for name, v in coconut.make_batch(cfg, "val", 0).items()}
    counter = FlopCounterMode(display=False)        # it does not know the fused kernel of a CPU
    with sdpa_kernel(SDPBackend.MATH), counter:
        coconut.reply(model, batch, cfg.stage(1))
    assert coconut.answer_flops(cfg) == counter.get_total_flops()


# ---- Batches


def walk(edges, start, hops):
    """The sets of nodes that are 0, 1, ..., hops edges from the start."""
    levels = [{start}]
    for _ in range(hops):
        levels.append({v for u, v in edges if u in levels[-1]})
    return levels


@pytest.mark.parametrize("b, D", [(2, 4), (3, 2), (2, 2)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_graphs_are_twin_stars(split, b, D):
    cfg = config(n_branch=b, n_hop=D, batch_size=64)
    batch, n = coconut.make_batch(cfg, split, 3), 2 * (1 + b * D)
    half = n // 2
    for edges, prompt, node, ends in zip(*(batch[name].tolist() for name in (
            "edges", "prompt", "node", "ends"))):
        assert len(edges) == 2 * b * D == len(set(map(tuple, edges)))
        assert sorted(node) == list(range(4, 4 + n))
        assert prompt[0] == coconut.QUESTION and prompt[3] == coconut.THINK
        assert sorted(prompt[1:3]) == sorted(ends) and prompt[4] == node[0]
        own, twin = walk(edges, node[0], D), walk(edges, node[half], D)
        assert [len(level) for level in own] == [len(level) for level in twin] == [1] + D * [b]
        assert ends[0] in own[D] and ends[1] in twin[D]
        assert not set().union(*own) & set().union(*twin)
        for m in range(D):      # columns: level m of either star; first the way to t
            columns = slice(1 + m * b, 1 + (m + 1) * b)
            assert set(node[columns]) == own[m + 1] and set(node[half:][columns]) == twin[m + 1]
        way = [node[0], *node[1 : half : b]]
        assert all([u, v] in edges for u, v in itertools.pairwise(way)) and way[-1] == ends[0]
        count = [sum(v == target for _, v in edges) for target in node]
        assert count == ([0] + [1] * (half - 1)) * 2
    assert not (batch["edges"][:, 0] == batch["edges"][:1, 0]).all()


def test_validation_asks_for_both_roots_in_both_orders():
    """Who sees neither r nor the way to t, but all else, is right on exactly half of the rows."""
    batch = coconut.make_batch(config(batch_size=64), "val", 0)
    torch.manual_seed(0)
    score = torch.rand(4 + 14)
    seen = torch.cat([batch["edges"].flatten(1), batch["prompt"][:, 1:3]], dim=1)
    hits = 0
    for group in range(16):
        rows = range(4 * group, 4 * group + 4)
        for a, b in [(0, 3), (1, 2)]:
            a, b = rows[a], rows[b]
            assert torch.equal(seen[a], seen[b])
            assert batch["prompt"][a, -1] != batch["prompt"][b, -1]
            assert batch["ends"][a].tolist() == batch["ends"][b].tolist()[::-1]
        assert torch.equal(seen[rows[0]][:-2], seen[rows[1]][:-2])
        assert seen[rows[0]][-2:].tolist() == seen[rows[1]][-2:].tolist()[::-1]
        hits += sum((score[seen[row]] @ torch.arange(26.0) * (score[batch["prompt"][row, 1]] -
                     score[batch["prompt"][row, 2]]) > 0) == (batch["prompt"][row, 1] ==
                     batch["ends"][row, 0]) for row in rows)
    assert hits == 32


def test_names_places_and_orders_are_uniform():
    cfg, counts = config(batch_size=2000), []
    batch = coconut.make_batch(cfg, "train", 0)
    first = (batch["edges"][:, :, 0] == batch["node"][:, :1]).float()   # edges out of the root
    counts += [batch["prompt"][:, -1].bincount(minlength=18)[4:], batch["ends"][:, 0].bincount(minlength=18)[4:]]
    counts += [first.sum(0), (batch["prompt"][:, 1] == batch["ends"][:, 0]).long().bincount()]
    for count in counts:
        want = count.sum() / len(count)
        assert ((count - want) ** 2 / want).sum() < len(count) + 5 * math.sqrt(2 * len(count))


@pytest.mark.parametrize("changes", [{}, dict(step_tokens=2), dict(slot="nothing"),
                                     dict(slot="nothing", step_tokens=2), dict(n_hop=2)], ids=str)
def test_sequences_by_hand(changes):
    cfg = config(**changes)
    D, s = cfg.n_hop, cfg.step_tokens
    for k in range(D + 1):
        batch = batch_at(cfg, k)
        path = batch["node"][:, 1 : cfg.n_edge // 2 + 1 : 2].tolist()
        for idx, targets, n_slot, ends, nodes in zip(*(batch[name].tolist() for name in (
                "idx", "targets", "n_slot", "ends")), path):
            words = [node for node in nodes for _ in range(s)][: s * (D - 1) + 1][s * k :]
            slots = [coconut.PAUSE] * (k if cfg.slot != "nothing" else 0)
            assert n_slot == [len(slots)] and cfg.lengths(k) == (len(slots), len(words))
            text = slots + words + [coconut.STOP]
            assert idx == text + [coconut.STOP] * (len(idx) - len(text))
            labels = [-1] * len(slots) + words + [-1, ends[0]]
            assert targets == labels + [-1] * (len(targets) - len(labels))
            if s == 1:
                assert sum(label >= 0 for label in targets) == D - k + 1


def test_stages_follow_the_share_of_the_training_that_is_over():
    cfg = config(n_hop=4, start=0.2, steps=1000)
    stages = [cfg.stage((step + 0.5) / 1000) for step in range(1000)]
    assert stages == [0] * 200 + [1] * 200 + [2] * 200 + [3] * 200 + [4] * 200
    assert cfg.stage(1) == 4
    for remove, stage in [("all", 4), ("none", 0)]:
        assert {replace(cfg, remove=remove).stage(done) for done in (0, 0.5, 1)} == {stage}
    short = coconut.scale(replace(cfg, budget=0.1), 1)
    assert [short.stage((step + 0.5) / short.steps) for step in range(100)] == stages[::10]
    assert short.warmup == cfg.warmup / 10 == 10


def test_learning_rate_by_hand():
    """One warm-up and one cosine over the whole run: neither starts again with a stage."""
    cfg = config(steps=1100, warmup=100, lr=2.0)
    rates = [coconut.learning_rate(step, cfg) for step in (0, 49, 99, 100, 600, 1100)]
    assert rates == pytest.approx([0.02, 1, 2, 2, 1.1, 0.2])


def test_stage_and_mixing_of_a_batch():
    cfg = config(batch_size=8000, steps=100, mix=0.3, start=0.0)
    count = coconut.make_batch(cfg, "train", 80)["n_slot"].flatten().bincount(minlength=4)
    share = count / 8000
    assert share[3] == pytest.approx(0.7 + 0.3 / 4, abs=0.02)
    assert (share[:3] - 0.3 / 4).abs().max() < 0.015
    count = coconut.make_batch(cfg, "train", 40)["n_slot"].flatten().bincount(minlength=4)
    assert count[3] == 0 and count[2] / 8000 == pytest.approx(0.7 + 0.1, abs=0.02)
    icot = replace(cfg, mix=0.0, extra=0.2, slot="nothing")     # each further step goes by chance
    said = (coconut.make_batch(icot, "train", 40)["targets"] >= 0).sum(1).bincount(minlength=5)
    assert said[3:].sum() == 0 and said[2] / 8000 == pytest.approx(0.8, abs=0.02)   # a word, a
    val = coconut.make_batch(cfg, "val", 0)
    assert (val["n_slot"] == 3).all()
    for remove, slots in [("all", 3), ("none", 0)]:
        batch = coconut.make_batch(replace(cfg, remove=remove), "train", 0)
        assert (batch["n_slot"] == slots).all()


def test_a_batch_is_a_function_of_seed_split_and_step():
    cfg, other = config(seed=0), config(seed=1)
    batches = []
    for noise, c in enumerate([cfg, cfg, other]):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        batches.append({(split, step): coconut.make_batch(c, split, step)["edges"]
                        for split in ("train", "val") for step in (0, 1)})
        assert torch.equal(torch.get_rng_state(), state)
    first, again, another_seed = batches
    assert all(torch.equal(first[key], again[key]) for key in first)
    for split in ("train", "val"):
        assert not torch.equal(first[split, 0], first[split, 1])
        assert torch.equal(first[split, 0], another_seed[split, 0]) == (split == "val")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_graph_is_in_training_and_in_validation(seed):
    def graphs(split, steps):
        batches = [coconut.make_batch(config(seed=seed, batch_size=256), split, i) for i in range(steps)]
        return {tuple(node) for batch in batches for node in batch["node"].tolist()}

    train, val = graphs("train", 200), graphs("val", 16)
    assert len(train) == 200 * 256 and len(val) == 16 * 128 and not train & val


# ---- The ladder


@pytest.mark.parametrize("b", [2, 3, 4])
def test_a_walker_who_guesses_the_branch_prefers_t_in_the_expected_share(b):
    """It follows real edges from r; at a wrong end it has nothing to tell t from t'."""
    batch = coconut.make_batch(config(n_branch=b, batch_size=4000), "val", 0)
    torch.manual_seed(0)
    right = 0.0
    for edges, node, ends in zip(*(batch[name].tolist() for name in ("edges", "node", "ends"))):
        at = node[0]
        for _ in range(3):
            after = [v for u, v in edges if u == at]
            at = after[torch.randint(len(after), ()).item()]
        right += 1.0 if at == ends[0] else 0.5
    assert right / 4000 == pytest.approx((1 + 1 / b) / 2, abs=3 * 0.25 / math.sqrt(4000))


# ---- Evaluation


def test_decoded_answers_are_measured_as_described(tmp_path, monkeypatch):
    cfg = config(remove="none", slot="nothing", eval_batches=2, out=str(tmp_path))
    run, model = coconut.Run(cfg), build(cfg)

    def fake(model, batch, stage, given=None):
        """Rows 0 and 4 right, 1 and 5 another branch, 2 and 6 an edge that is none, 3 and 7 t'."""
        node, kind = batch["node"], torch.arange(8) % 4
        columns = torch.tensor([[1, 3, 5], [2, 4, 6], [1, 3, 6], [1, 3, 5]])[kind]
        end = node.gather(1, torch.tensor([5, 6, 6, 7 + 5])[kind][:, None])[:, 0]
        return nn.functional.one_hot(end, cfg.n_edge + 6).double(), None, node.gather(1, columns)

    monkeypatch.setattr(coconut, "reply", fake)
    metrics = coconut.evaluate(model, cfg, run)
    assert metrics["exact"] == 0.25 and metrics["real_paths"] == 0.75
    assert metrics["two_way"] == 0.5        # half of the ties: rows 1, 2, 5 and 6 name neither
    losses = [coconut.loss_fn(model, coconut.make_batch(cfg, "val", i), cfg)[1] for i in range(2)]
    assert metrics["loss"] == pytest.approx(sum(stats["loss"].item() for stats in losses) / 2)
    places = sum(stats["places"] for stats in losses) / 2
    want = [value for value in places.tolist() if not math.isnan(value)]
    assert metrics["labels"] == pytest.approx(want) and len(want) == 4
    assert metrics["excess"] == pytest.approx(max(want[0] - math.log(2), *want[1:]))


def test_two_way_compares_t_and_its_twin_alone():
    logits = torch.tensor([[9.0, 1, 2], [9, 2, 1], [9, 1, 0], [0, 1, 1]])
    batch = {"ends": torch.tensor([[1, 2], [1, 2], [2, 1], [1, 2]])}
    assert coconut.two_way(logits, batch).item() == 0.375       # a tie is half right


@pytest.mark.parametrize("step_tokens", [1, 2])
def test_a_model_that_copies_the_labels_has_no_excess(step_tokens, tmp_path, monkeypatch):
    """At the fork it knows no more than that it is one of b nodes."""
    cfg = config(remove="none", slot="nothing", eval_batches=1, step_tokens=step_tokens, out=str(tmp_path))
    model = build(cfg)

    def oracle(batch):
        logits = 40 * nn.functional.one_hot(batch["targets"].clamp(min=0), cfg.n_edge + 6).double()
        logits[:, 0] = 0
        logits[:, 0].scatter_(1, batch["node"][:, 1:3], 40.0)
        return logits

    monkeypatch.setattr(model, "forward", oracle)
    metrics = coconut.evaluate(model, cfg, coconut.Run(cfg))
    assert metrics["labels"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["excess"] == pytest.approx(0, abs=1e-6)


def test_thoughts_that_hold_the_frontier_are_seen_as_such(tmp_path, monkeypatch):
    """z_m is the sum of orthonormal vectors of the nodes m edges from r."""
    cfg = config(n_branch=3, n_hop=4, n_embd=32, eval_batches=2, out=str(tmp_path))
    model = build(cfg)
    with torch.no_grad():
        model.embed.weight.copy_(40 * torch.eye(30, 32))
    calls = []

    def fake(model, batch, stage, given=None):
        front = batch["node"][:, 1:13].view(8, 4, 3)
        z = (model.embed.weight / 40)[front].sum(2)
        calls.append((stage, given, z, batch))
        return model.logits(z[:, 0]), z, None

    monkeypatch.setattr(coconut, "reply", fake)
    found = coconut.probe(model, cfg, coconut.Run(cfg))
    assert found["frontier"] == pytest.approx([1] * 4, abs=1e-6) and found["auc"] == [1] * 4
    assert found["largest"] == pytest.approx([1 / 3] * 4, abs=1e-6)
    assert found["mass"]["gold"] == pytest.approx([1 / 3] * 4, abs=1e-6)
    assert found["mass"]["others"] == pytest.approx([2 / 3] * 4, abs=1e-6)
    for name in ("earlier", "twin", "rest"):
        assert found["mass"][name] == pytest.approx([0] * 4, abs=1e-6)
        assert found["spread"][name] == [[0, 0, 0]] * 4
    assert found["spread"]["gold"] == [[40, 40, 40]] * 4
    # first the own thoughts, then the four replacements, then every stage
    (_, none, z, batch), *rest = calls[:10]
    other, zeros, noise, twin = (given for _, given, _, _ in rest[:4])
    assert none is None and [stage for stage, *_ in calls[:10]] == [4] * 5 + [0, 1, 2, 3, 4]
    assert all(given is None for _, given, _, _ in rest[4:])
    assert not zeros.any() and torch.equal(other, torch.cat([z[4:], z[:4]]))
    same(noise.square().mean(-1), torch.ones(8, 4), atol=1e-3)
    root, half = batch["node"][:, 0], 13
    for row, given in enumerate(twin):      # the frontier of the other root, for this prompt
        want = batch["node"][row, half + 1 : half + 13].view(4, 3)
        assert torch.equal(given, (model.embed.weight / 40)[want].sum(1))
    assert (root != batch["node"][:, half]).all()


@pytest.mark.parametrize("group, column", [("gold", 4), ("others", 5), ("earlier", 0), ("earlier", 2),
                                           ("twin", 13 + 6), ("rest", 7), ("rest", 13), ("rest", 13 + 9)])
def test_every_node_is_in_its_group(group, column, tmp_path, monkeypatch):
    """A second thought that is a single node, in a star of three branches."""
    cfg = config(n_branch=3, n_hop=4, n_embd=32, eval_batches=1, out=str(tmp_path))
    model = build(cfg)
    with torch.no_grad():
        model.embed.weight.copy_(40 * torch.eye(30, 32))

    def fake(model, batch, stage, given=None):
        z = (model.embed.weight / 40)[batch["node"][:, column]][:, None].expand(8, 4, 32)
        return model.logits(z[:, 0]), z, None

    monkeypatch.setattr(coconut, "reply", fake)
    found = coconut.probe(model, cfg, coconut.Run(cfg))
    assert found["largest"][1] == pytest.approx(1, abs=1e-6)
    for name, mass in found["mass"].items():
        assert mass[1] == pytest.approx(float(name == group), abs=1e-6), name
    assert found["frontier"][1] == pytest.approx(float(group in ("gold", "others")), abs=1e-6)
    if group not in ("gold", "others"):
        assert found["auc"][1] == 0     # ties do not count


def test_probe_of_random_weights_by_hand(tmp_path):
    """Not a lens over nodes alone, an AUC within a star, thoughts of another order of t and t'."""
    cfg = config(batch_size=64, eval_batches=1, out=str(tmp_path))
    model, batch = build(cfg, seed=2), coconut.make_batch(cfg, "val", 0)
    found = coconut.probe(model, cfg, coconut.Run(cfg))
    prompt = torch.cat([batch["prompt"][:, :4], batch["node"][:, 7:8]], dim=1)  # only r is another
    twin = coconut.reply(model, dict(batch, prompt=prompt), 3)[1]
    z = coconut.reply(model, batch, 3)[1]

    def rate(stage, given=None):
        return coconut.two_way(coconut.reply(model, batch, stage, given)[0], batch).item()

    want = [rate(3, z.roll(4, 0)), rate(3, 0 * z), 1 - rate(3, twin), *map(rate, range(4))]
    assert len(set(want)) == 7      # none is taken for another
    swapped = found["swapped"]
    assert [swapped["other z"], swapped["zero z"], found["flips"], *found["by_stage"]] == want
    logits = model.logits(z)
    for m, columns in enumerate([[1, 2], [3, 4], [5, 6]]):
        front = batch["node"][:, columns]
        rest = batch["node"][:, [i for i in range(14) if i not in columns]]
        mass = logits[:, m].softmax(-1).gather(1, front).sum(1).mean().item()
        assert found["frontier"][m] == pytest.approx(mass)
        over = logits[:, m].gather(1, front)[:, :, None] > logits[:, m].gather(1, rest)[:, None]
        assert found["auc"][m] == pytest.approx(over.double().mean().item())
    metrics = coconut.evaluate(model, cfg, coconut.Run(cfg))    # the answer can be known
    assert [metrics["excess"]] == metrics["labels"] and metrics["excess"] == metrics["loss"]


def test_latency_counts_passes_and_writes_more_words_only_without_thoughts(tmp_path):
    cost = {}
    for name, changes in ARMS.items():
        cfg = config(**changes, out=str(tmp_path))
        cost[name] = coconut.latency(cfg, coconut.Run(cfg))
        for s in (1, 2):
            assert cost[name][f"mflops_{s}"] == coconut.answer_flops(replace(cfg, step_tokens=s)) / 1e6
            assert cost[name][f"ms_{s}"] > 0
    passes = {name: (row["passes_1"], row["passes_2"]) for name, row in cost.items()}
    assert passes == {"coconut": (5, 5), "pause": (5, 5), "no_thought": (2, 2), "cot": (5, 7)}


# ---- Arms, claims, bad input


def test_the_optimiser_survives_every_new_stage(tmp_path):
    """A new one at a switch, as in the paper's runs, would count its steps from 0 again."""
    cfg = config(n_hop=2, steps=6, start=0.3, eval_every=2, eval_batches=1, out=str(tmp_path))
    assert [cfg.stage(step / 6) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    with unpainted():
        coconut.train("coconut", coconut.Coconut(cfg), cfg, coconut.Run(cfg))
    state = torch.load(tmp_path / "coconut.pt", weights_only=True)["opt"]["state"]
    assert {int(s["step"]) for s in state.values()} == {6} and len(state) == 6


def test_arms_with_stages_and_cot_are_one_model_until_the_first_step_goes(tmp_path, monkeypatch):
    flags = ["--smoke", "--steps", "12", "--start", "0.5", "--eval_every", "3", "--full"]
    for part in "plot", "probe":
        monkeypatch.setattr(coconut, part, lambda model, cfg, run: {"probed": True})
    with unpainted():
        arms = coconut.main([*flags, "--out", str(tmp_path)])["arms"]
    losses = {arm: [row["loss"] for row in m["history"]] for arm, m in arms.items()}
    assert len({len(loss) for loss in losses.values()}) == 1
    for arm in ("pause", "no_thought", "cot"):
        assert losses[arm][:2] == pytest.approx(losses["coconut"][:2], abs=1e-6)
        assert losses[arm][2:] != pytest.approx(losses["coconut"][2:], abs=1e-4)
    for arm in ("no_curriculum", "pause_token", "no_cot"):      # all steps are gone from the start
        assert losses[arm][0] != pytest.approx(losses["coconut"][0], abs=1e-4)
    for arm, m in arms.items():
        assert (m["passes_1"] == 2) == (arm in "no_cot no_thought icot deep looped".split())
        assert ("probed" in m) == (arm in "pause coconut no_curriculum pause_token".split())
    icot = torch.load(tmp_path / "icot.pt", weights_only=True)["config"]
    assert icot["extra"] == pytest.approx(math.exp(-4)) and icot["mix"] == 0    # P(o) ~ exp(-4 o)
    assert arms["deep"]["params"] > arms["looped"]["params"] == arms["coconut"]["params"]
    assert arms["deep"]["mflops_1"] == arms["looped"]["mflops_1"] > arms["no_thought"]["mflops_1"]
    assert arms["coconut"]["mflops_1"] == arms["pause"]["mflops_1"]


@pytest.mark.filterwarnings("ignore:No artists")      # without coconut there is no mass to label
def test_floor_in_the_picture_by_hand(tmp_path, monkeypatch):
    """Known are the answer, the words behind the first, and t, which the prompt names."""
    cfg, figures, make = config(n_hop=4, start=0.2, out=str(tmp_path)), [], coconut.Figure
    monkeypatch.setattr(coconut, "Figure", lambda **kw: figures.append(make(**kw)) or figures[0])
    cot = dict(two_way=0.75, excess=0.0, steps=1000, history=[dict(step=1000, loss=0.2)])
    with unpainted():
        coconut.plot(cfg, coconut.Run(cfg), dict(arms={"cot": cot}, environment=dict(device="cpu")))
    x, floor = figures[0].axes[2].lines[-1].get_data()
    assert (x[0], x[-1]) == (0, 1000)
    assert "floor of stages" in figures[0].axes[2].get_ylabel()    # not of every arm
    middle = floor[[10, 30, 50, 70, 90]]        # of every stage; the first word is one of two
    assert middle == pytest.approx([math.log(2) / n for n in (5, 4, 3)] + [0, 0])


def test_claims_by_hand():
    """The verdicts follow from these numbers of the arms."""
    one = dict(two_way=0.98, frontier=[0.95, 0.9, 0.7, 0.8], largest=[0.6, 0.9, 0.9, 0.9],
               auc=[0.99, 0.1, 0.1, 0.1], mass={"twin": [0.01, 0.02, 0.05, 0.03]},
               swapped=dict(other=0.51, zeros=0.48, noise=0.53))
    arms = {"coconut": one, "pause": dict(two_way=0.47), "no_cot": dict(two_way=0.5),
            "cot": dict(two_way=0.74, guess=0.75, excess=0.02), "no_curriculum": dict(two_way=0.52)}
    measured = [measure(arms) for _, measure, _, _ in coconut.CLAIMS]
    assert measured == pytest.approx([0.98, 0.5, 0.51, 0.01, 0.02, 0.24, 0.95, 0.6, 0.99, 0.7, 0.05,
                                      0.53, 0.52])
    arms["cot"]["two_way"] = 0.8        # better than a guess is not as expected, either
    assert coconut.CLAIMS[3][1](arms) == pytest.approx(0.05)


@pytest.mark.parametrize("flags", [dict(n_branch=1), dict(n_hop=1), dict(step_tokens=3), dict(start=1.0),
                                   dict(mix=1.5), dict(extra=1.0), dict(batch_size=6), dict(n_loop=0),
                                   dict(batch_size=4)], ids=str)
def test_wrong_values_are_refused(flags):
    with pytest.raises(ValueError, match=next(iter(flags))):
        coconut.Config(**flags)
