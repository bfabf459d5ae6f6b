"""Thinking in mixtures of words, learned from rewards alone: hybrid latent reasoning.

Yue et al., HRPO, arXiv 2505.18454. Run: python hrpo.py (four minutes on two CPU cores).

A model that thinks aloud samples a word and reads it at the next step; what else it believed is
lost. Here it reads a blend of that word with the mean of all words, weighted by probability. Words
are still sampled, so policy gradients work; no example shows a blend. A gate per channel decides.

(1)  p_j = softmax(logits),  y_j ~ p_j: the word,  e_j = W_e[y_j]
(2)  h_j = W_e^T p_j / |p_j|_2: the mixture, a constant: no gradient reaches p_j
(3)  r = sigmoid(W_r e_j + b_r),  i = sigmoid(W_i e_j + b_i)
(4)  a = exp(-8 softplus(-Lambda) r) = u^r,  u = sigmoid(Lambda)^8;  at first u ~ U(r_min, 0.999)
(5)  before the first # the next input is a e_j + sqrt(1 - a^2 + 1e-8) (i h_j), later e_j
     hybrid: so | self: h_j = e_j | mean: h_j alone | token: e_j alone, GRPO | other: h_j of others
(6)  A = (R - mean R) / (std R + 1e-4) in a group of g | drgrpo: no std | rloo: drgrpo g / (g - 1)
(7)  k3 = exp(d) - d - 1,  d = log pi_ref(y_j | words) - log pi(y_j | words and mixtures)
(8)  loss = mean of 1/|y| sum_j [beta k3 - A pi(y_j) / stopgrad(pi(y_j))] | drgrpo, rloo: 1/n
(9)  hidden ratio = sqrt(1 - (mean_channels a)^2); decay only: Lambda_0 prod (1 - 0.4 gate_speed lr)
(10) FLOPs of a word in training = (P/g + n - 1)/n L (24 C^2 + 4 T C) + 2 C V; (2) 2 C V, (3) 4 C^2

y, p `y` `p` | W_e `embed` | W, b `ThoughtGate.W` `.b` | g `group` (sft: 1) | pi_ref `reference`
V VOCAB words | B questions, R rollouts ((6): rewards), P words of a prompt, n `n_new` of an answer
T cache slots | C `n_embd` | L `n_layer` | section 2: k voters think pi of M classes, Q, N questions

What it shows. Examples teach to write a vote for each of six voters, drawn from what the voter
thinks of a topic (pi), then # and the plurality. Rewarded is another answer: the class with the
largest expected count. No sampled poll can know it, the mixtures carry all of pi. The task is BUILT
so that distributions matter: it isolates the mechanism, it replicates no gain on benchmarks.
  C1 step 0, sampled, hrpo - grpo    0.067 +- 0.023  needed >= -0.03, holds on 3 of 3
  C1 p of the answer, least rise     0.139 +- 0.013  needed >= -0.03, holds on 3 of 3
  C2 least of four gains             0.194 +- 0.030  needed >= 0.03, holds on 3 of 3
  C2 lowest end of their intervals   0.181 +- 0.029  needed >= 0, holds on 3 of 3
  C3 greedy, lost if h = e           0.299 +- 0.039  needed >= 0.03, holds on 3 of 3
  C3 lost more if h is another's     0.292 +- 0.027  needed >= 0, holds on 3 of 3
  C4 hidden ratio, gain of hrpo      0.282 +- 0.018  needed >= 0.03, holds on 3 of 3
  C4 minus gain of selftok           0.448 +- 0.011  needed >= 0, holds on 3 of 3
  C5 sure voters, |gain| - interval  0.000 +- 0.000  needed <= 0, holds on 2 of 3
Gains over grpo and selftok, 95 % intervals over 4096 draws of some 640 questions. interp: as good
greedy, better sampled. C5: a sure voter has one vote for a topic; sft is always right: no headroom.

What the paper leaves open. It prints softplus(Lambda); with the start in its code (Yueeeeeeee/HRPO,
ThinkingResidualLambda) that would open the gate at once. The code's weight decay opens it by itself
(dotted in the picture). Here is none; --weight_decay pulls Lambda 4 gate_speed times less. Mixtures
are stored and replayed in one pass: a biased gradient; k3 has that of KL(ref || pi). Ours: a frozen
W_e, beta 0.15 (paper 0.005), rates of network, gate, Lambda 1 : 20 : 80 (1 : 20 : 200). Left out:
the forked maze (no gain was seen), LoRA, hidden states as inputs, top-k mixtures, temperature 0.5.

Exercises: 1. --r_min 0.95, one of the paper's: what are mixtures worth if the gate hardly opens?
  2. --beta 0.03: does p stay near pi (belief), and what is left of the gain over grpo?
New here: CLASSES, TOPICS, VOTERS, GO, HASH, DONE, VOCAB, RL_ARMS, MORE, PANELS,
poll_world, ladder, put, ThoughtGate, HRPO, word_flops, judge, advantage, gains
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import matplotlib
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

NAME = Path(__file__).stem

# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config:
    # model
    n_layer: int = 2                # transformer blocks
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # width of the residual stream
    # method
    task: Literal["poll", "sure"] = "poll"      # what the model has to learn
    n_vote: int = 6                 # voters that a question names
    feed: Literal["hybrid", "self", "mean", "token", "other"] = "hybrid"    # of arm hrpo, Eq. 5
    adv: Literal["grpo", "drgrpo", "rloo"] = "grpo"     # what becomes of rewards, see Eq. 6
    group: int = 8                  # rollouts of a question, 2 or more (0 is for supervised arms)
    beta: float = 0.15              # weight of the divergence from the supervised model
    r_min: float = 0.3              # least u at the start: the smaller, the wider open the gate
    gate_speed: float = 20.0        # learning rate of the gate over that of the network
    sft_steps: int = 1000           # steps of supervised training first, on half batches, rate 4e-3
    # training
    steps: int = 160                # optimiser steps; scaled where arms must cost the same
    batch_size: int = 256           # sequences in a step, over all processes
    lr: float = 5e-4                # peak learning rate
    warmup: int = 10                # steps until the learning rate peaks
    weight_decay: float = 0.0       # AdamW's decoupled weight decay
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 20            # steps between rows of log.csv, each with a checkpoint
    eval_batches: int = 2           # validation batches for such a row; 8 times more at the end
    # run
    seed: int = 1                   # seed of weights, data order and noise
    budget: float = 1.0             # multiplies every training length; below 1 no claim is judged
    smoke: bool = False             # every code path in seconds, tiny everything
    only: str = ""                  # run only these arms (comma-separated)
    full: bool = False              # run the ablation arms, too
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if present, else CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, else float32
    compile: Literal["auto", "on", "off"] = "auto"          # torch.compile; auto: on CUDA only
    out: str = f"out/{NAME}"        # folder for results, plot, log and checkpoints
    resume: bool = False            # continue an interrupted run
    eval_only: bool = False         # load the trained weights, redo evaluation and plot

    inference = ()                  # no effect on training: a checkpoint may differ in these
    n_new = property(lambda self: self.n_vote + 3)              # votes # answer END
    seq_len = property(lambda self: self.n_vote + 2 + self.n_new - 1)   # nothing follows END

    def __post_init__(self):
        check_common(self)
        at_least(self, 0, "group beta")
        at_least(self, 1e-9, "n_vote r_min gate_speed sft_steps")
        uneven = self.group == 1 or self.batch_size % max(1, self.group)
        if uneven or self.n_vote not in range(2, 8) or self.r_min >= 0.999:
            raise ValueError(f"group={self.group} must divide batch_size={self.batch_size}, n_vote="
                             f"{self.n_vote} be 2 to 7, r_min={self.r_min} below 0.999")

SMOKE = dict(n_head=2, n_embd=16, n_vote=3, group=4, sft_steps=20, batch_size=16, steps=4, warmup=2,
             lr=1e-3, eval_every=2, eval_batches=1)

# ---- 2. Task -------------------------------------------------------------------------------------
CLASSES, TOPICS, VOTERS = 4, 4, 12      # the first words; class m is word m
GO, HASH, DONE, VOCAB = range(CLASSES + TOPICS + VOTERS, CLASSES + TOPICS + VOTERS + 4)

@functools.cache
def poll_world(seed, task, k):
    """{split: (voters (Q, k), topic (Q, 1), label (Q,), what the voters think (Q, k, M))}."""
    draw = functools.partial(torch.rand, generator=torch.Generator().manual_seed(seed))
    top, rest = 0.3 + 0.65 * draw(VOTERS, TOPICS, 1), draw(VOTERS, TOPICS, CLASSES - 1).square()
    rest = (1 - top) * rest / rest.sum(-1, keepdim=True)
    pi = torch.cat([top, rest.minimum(0.8 * top)], dim=-1)              # (VOTERS, TOPICS, M)
    best = draw(VOTERS, TOPICS, 1).argsort(0) % CLASSES     # all classes are as often favourites
    pi = F.normalize(pi, p=1, dim=-1).gather(-1, (torch.arange(CLASSES) - best) % CLASSES)
    pi = pi if task == "poll" else F.one_hot(best[..., 0], CLASSES).float()
    voters = torch.combinations(torch.arange(VOTERS), k).repeat_interleave(TOPICS, dim=0)   # (Q, k)
    topic = torch.arange(TOPICS).repeat(len(voters) // TOPICS)[:, None]     # (Q, 1)
    total = pi[voters, topic].sum(1)                                    # (Q, M)
    lot = torch.where(total.topk(2).values.diff()[:, 0] < -0.1, draw(len(total)), 1)    # 1: a tie
    all_columns = voters, topic, total.argmax(1), pi[voters, topic]     # (Q, k, M)
    return {split: [column[(lot >= low) & (lot < high)] for column in all_columns]
            for split, low, high in (("val", 0, 0.2), ("train", 0.2, 1))}

def make_batch(cfg, split, step):
    """Questions, supervised answers, noise for rollouts: a function of its arguments alone."""
    rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step if split == "train" else ~step)
    draw, g = functools.partial(torch.rand, generator=rng), max(1, cfg.group * (split == "train"))
    columns = poll_world(cfg.seed, cfg.task, cfg.n_vote)[split]
    q = torch.randint(len(columns[0]), (cfg.batch_size // g, 1), generator=rng)     # (B, 1)
    order, (topic, label) = draw(len(q), cfg.n_vote).argsort(1), (c[q[:, 0]] for c in columns[1:3])
    voters, pi = columns[0][q, order], columns[3][q, order]             # (B, k, M)
    said = torch.cat([CLASSES + TOPICS + voters, CLASSES + topic], dim=1)   # (B, k + 1)
    votes = torch.multinomial(pi.flatten(0, 1), 1, generator=rng).view_as(voters)   # (B, k)
    count = F.one_hot(votes, CLASSES).sum(1) + draw(len(q), CLASSES) / 2    # (B, M), lots drawn
    parts = F.pad(votes, (0, 1), value=HASH), F.pad(count.argmax(1)[:, None], (0, 1), value=DONE)
    noise = -(-draw(len(q), g, cfg.n_new, VOCAB).log()).log()           # (B, g, n, V), Gumbel's law
    return dict(prompt=F.pad(said, (0, 1), value=GO), targets=torch.cat(parts, dim=1), noise=noise,
                label=label, pi=pi)

def ladder(cfg):
    """How often simple ways to answer are right, exactly, over all questions of validation."""
    *_, label, pi = poll_world(cfg.seed, cfg.task, cfg.n_vote)["val"]   # (Q, k, M)
    polls = torch.cartesian_prod(*[torch.arange(CLASSES)] * cfg.n_vote)     # (S, k)
    prob = functools.reduce(lambda x, y: (x[:, :, None] * y[:, None]).flatten(1), pi.unbind(1))
    votes, h = F.one_hot(pi.argmax(-1), CLASSES).sum(1), F.normalize(pi, dim=-1).sum(1)     # (Q, M)
    lots = lambda n: F.normalize((n == n.amax(-1, keepdim=True)).float(), p=1, dim=-1)  # from a tie
    ways = {"always the same": lots(F.one_hot(label, CLASSES).sum(0).expand_as(h)),
            "a sampled poll": prob @ lots(F.one_hot(polls, CLASSES).sum(1)),
            "favourites": lots(votes), "ties by h": lots(votes + 1e-3 * h), "sum of h": lots(h)}
    return {way: p.gather(1, label[:, None]).mean().item() for way, p in ways.items()}

# ---- 3. Kit (the same in every script: skip on first reading) ------------------------------------
def fail(message, code=2):
    """Ends the script with one line on stderr; exit code 2 is a user's mistake."""
    print(f"{NAME}: {message}", file=sys.stderr)
    raise SystemExit(code)

def parse_args(argv):
    """Command line -> Config. Every field is a flag, and the comment behind it is its help text."""
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(NAME, allow_abbrev=False)
    parser.error = fail
    for f in fields(Config):
        kind = {"choices": get_args(f.type)} if get_args(f.type) else {"type": f.type}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        note = f"{notes[f.name]} [{f.default}]"
        parser.add_argument("--" + f.name, default=f.default, help=note, **kind)
    if parser.parse_args(argv).smoke:
        parser.set_defaults(**SMOKE)
    return Config(**vars(parser.parse_args(argv)))

def at_least(cfg, low, names):
    """Raises ValueError if one of these fields is below `low`, huge or not a number."""
    for name in names.split():
        if not low <= getattr(cfg, name) <= 2**40:
            raise ValueError(f"{name}={getattr(cfg, name)} must be from {low} to 2**40")

def check_common(cfg):
    """Raises ValueError if a field that all scripts have is out of range."""
    at_least(cfg, 1, "n_layer n_head n_embd seq_len batch_size steps eval_every eval_batches")
    at_least(cfg, 1e-9, "lr grad_clip budget")
    at_least(cfg, 0, "weight_decay warmup seed")
    pair = 2 * cfg.n_head   # rotary positions turn pairs of channels in every head
    if cfg.n_embd % pair:
        fit = pair * max(1, round(cfg.n_embd / pair))
        raise ValueError(f"n_embd={cfg.n_embd} is no multiple of 2 * n_head={pair}; try {fit}")
    if cfg.steps * cfg.budget < 1:
        raise ValueError(f"budget={cfg.budget} leaves none of {cfg.steps} steps; try 1")

class Run:
    """Where a run happens: device, number format, processes, output folder. Raises ValueError."""
    def __init__(self, cfg):
        self.rank, self.world, local = (int(os.environ.get(name, default)) for name, default in
                                        [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)])
        if cfg.batch_size % self.world:
            raise ValueError(f"batch_size={cfg.batch_size} does not split {self.world} ways")
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        kind = auto if cfg.device == "auto" else cfg.device
        if kind != "cpu" and not getattr(torch, kind).is_available():
            raise ValueError(f"device={kind} is not there; try --device cpu")
        self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        self.bf16 = cfg.dtype == "bfloat16" or (cfg.dtype, kind) == ("auto", "cuda")
        self.compile = cfg.compile == "on" or (cfg.compile, kind) == ("auto", "cuda")
        self.load = cfg.resume or cfg.eval_only
        self.out, self.start = Path(cfg.out), time.perf_counter()
        if self.load and not any(self.out.glob("*.pt")):
            raise ValueError(f"out={self.out} has no checkpoint; train first")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.out).close()
        except OSError as error:
            raise ValueError(f"out={self.out} cannot be written ({error.strerror})") from None
        if self.world > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")

    def to_device(self, batch, shard=False):
        """A batch on this process's device: all rows, or this process's share of them."""
        rows = slice(self.rank, None, self.world) if shard else slice(None)
        return {name: value[rows].to(self.device) for name, value in batch.items()}

    def write(self, name, save):
        """Lets `save` fill a file of the output folder: afterwards it is whole, or the old one."""
        if self.rank == 0:
            with open(self.out / f"{name}.part", "wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self.out / name)

@contextlib.contextmanager
def session(argv):
    """Yields (cfg, run). Afterwards the global settings of torch are what they were."""
    try:
        cfg = parse_args(argv)
        run = Run(cfg)
    except ValueError as error:
        fail(error)
    denormal = torch.full((), 1e-40).mul(1).item() == 0
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_flush_denormal(True)      # saturated softmax gradients are slow otherwise
        torch.set_float32_matmul_precision("high")
        with torch.random.fork_rng():
            yield cfg, run
    finally:
        torch.set_flush_denormal(denormal)
        torch.set_float32_matmul_precision(precision)
        if run.world > 1:
            dist.destroy_process_group()

def norm(x):
    """Layer norm without gain and bias. (..., C) -> (..., C)"""
    return F.layer_norm(x, (x.size(-1),))

def rope_table(seq_len, head_size, base=10000.0):
    """Factors (cos, cos, -sin, sin) for `rotate`, of the angles of every position. (T, 2 hs)"""
    freq = base ** -(torch.arange(0, head_size, 2) / head_size)     # (hs / 2,)
    angle = torch.arange(seq_len)[:, None] * freq                   # (T, hs / 2)
    return torch.cat([angle.cos(), angle.cos(), -angle.sin(), angle.sin()], dim=-1)

def rotate(x, rope):
    """Rotary position embedding (arXiv 2104.09864) of channel pairs (i, i + hs/2). (..., T, hs)"""
    cos, sin = rope.to(x.dtype).chunk(2, dim=-1)
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)

class CausalSelfAttention(nn.Module):
    """Multi-head attention with rotary positions and normalised queries and keys."""
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x, rope, memory=None):
        """(B, T, C) -> (B, T, C). `memory` maps new k, v to all k, v to attend to, and a mask."""
        (B, T, C), n = x.shape, self.n_head
        qk, v = self.qkv(x).view(B, T, 3 * n, C // n).transpose(1, 2).split([2 * n, n], dim=1)
        q, k = rotate(norm(qk), rope).chunk(2, dim=1)                   # (B, nh, T, hs)
        k, v, mask = memory(k, v) if memory else (k, v, None)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

class MLP(nn.Module):
    """Two layers with a squared ReLU between them."""
    def __init__(self, cfg):
        super().__init__()
        self.fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())

class Block(nn.Module):
    """A pre-norm transformer layer; `update` is what it adds to the residual stream."""
    def __init__(self, cfg):
        super().__init__()
        self.attn = CausalSelfAttention(cfg)
        self.mlp = MLP(cfg)

    def update(self, x, rope, memory=None):
        a = self.attn(norm(x), rope, memory)
        return a + self.mlp(norm(x + a))

    def forward(self, x, rope, memory=None):
        return x + self.update(x, rope, memory)

# ---- 4. Method -----------------------------------------------------------------------------------
def put(cache, at, k, v):
    """Writes k, v (B, nh, n, hs) to slots `at` (n,); returns the cache, and a mask up to them."""
    cache[:] = [old.index_copy(2, at, new.to(old.dtype)) for old, new in zip(cache, (k, v))]
    return *cache, torch.arange(cache[0].size(2), device=at.device) <= at[:, None]

class ThoughtGate(nn.Module):
    """Blends the word that was sampled with the mixture of all words, channel by channel."""
    def __init__(self, cfg):
        super().__init__()
        self.speed = cfg.gate_speed     # Adam's step has no scale: times s here, s times as fast
        u = torch.empty(cfg.n_embd).uniform_(cfg.r_min, 0.999)          # (C,)
        self.raw = nn.Parameter((u ** (1 / 8)).logit() / (4 * self.speed))  # Eq. 4
        self.W = nn.Parameter(0.02 * torch.randn(2 * len(u), len(u)) / self.speed)
        self.b = nn.Parameter(torch.zeros(2 * len(u)))

    Lambda = property(lambda self: self.raw * 4 * self.speed)

    def decay_only(self, cfg):
        """The hidden ratio after every step if weight decay 0.1 alone moved Lambda, at r = 1/2."""
        lr = torch.tensor([learning_rate(t, cfg) for t in range(cfg.steps)], device=self.raw.device)
        left = (1 - 0.1 * 4 * self.speed * lr).cumprod(0)[:, None] * self.Lambda     # (steps, C)
        a = torch.exp(-4 * F.softplus(-left)).mean(-1)                  # (steps,)
        return (1 - a.square()).sqrt().tolist()                         # Eq. 9

    def forward(self, e, h):
        """Words e (..., C) and mixtures h (..., C) -> inputs (..., C), and a (..., C)."""
        r, i = (self.speed * F.linear(e, self.W, self.b)).sigmoid().chunk(2, dim=-1)    # Eq. 3
        a = torch.exp(-8 * F.softplus(-self.Lambda) * r)                # (..., C)  Eq. 4
        return a * e + (1 - a.square() + 1e-8).sqrt() * (i * h), a      # Eq. 5

class HRPO(nn.Module):
    """A causal transformer; with the supervised model `base`, one that reinforcement trains."""
    def __init__(self, cfg, base=None):
        super().__init__()
        self.cfg, self.feed, C = cfg, cfg.feed, cfg.n_embd
        self.embed = nn.Embedding(VOCAB, C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.register_buffer("rope", rope_table(cfg.seq_len, C // cfg.n_head), persistent=False)
        self.gate, self.reference = None, None
        if base:
            self.load_state_dict(base.state_dict())
            self.embed.requires_grad_(False)
            self.reference = copy.deepcopy(base).requires_grad_(False)
            self.gate = ThoughtGate(cfg) if cfg.feed in ("hybrid", "self", "other") else None

    def parts(self):
        return [list(part.parameters()) for part in (self.blocks, self.embed, self.gate) if part]

    def logits(self, x):
        return F.linear(norm(x), self.embed.weight).float() / self.cfg.n_embd**0.5      # (..., V)

    def blend(self, y, p, thinks):
        """Inputs (R, n, C) behind words y (R, n), drawn from p (R, n, V), if p is given."""
        e = self.embed(y)                                               # (R, n, C)
        if p is None or self.feed == "token":
            return e
        p = p.roll(max(1, self.cfg.group), 0) if self.feed == "other" else p
        with torch.autocast(y.device.type, enabled=False):      # float32: 1 - a is small
            h = e if self.feed == "self" else F.normalize(p, dim=-1) @ self.embed.weight    # Eq. 2
            x = h if self.feed == "mean" else self.gate(e, h)[0]        # (R, n, C)
        return torch.where(thinks[..., None], x, e)                     # (R, n, C)  Eq. 5

    @torch.no_grad()
    def rollout(self, prompt, noise):
        """Answers prompts (B, P) with noise (B, g, n, V), word by word: y (R, n), p (R, n, V)."""
        at, (B, g, n, _) = torch.arange(prompt.size(1), device=prompt.device), noise.shape
        slots = self.rope.new_zeros(B, self.cfg.n_head, self.cfg.seq_len, self.rope.size(1) // 2)
        caches, ys, ps, x = [[slots, slots] for _ in self.blocks], [], [], self.embed(prompt)
        for j in range(n):
            for block, cache in zip(self.blocks, caches):
                x = block(x, self.rope[at], functools.partial(put, cache, at))
            z = self.logits(x[:, -1])                                   # (rows, V): B, then R
            if j == 0:      # the prompt was read once for all rollouts
                z = z.repeat_interleave(g, 0)                           # (R, V)
                caches = [[old.repeat_interleave(g, 0) for old in cache] for cache in caches]
            y = (z + noise[:, :, j].flatten(0, 1)).argmax(-1)           # (R,)  Eq. 1
            ys.append(torch.where(ys[-1] == DONE, DONE, y) if ys else y)
            ps.append(z.softmax(-1))
            thinks = (torch.stack(ys, dim=1) != HASH).all(1, keepdim=True)      # (R, 1)
            x = self.blend(ys[-1][:, None], ps[-1][:, None], thinks)    # (R, 1, C)
            at = at[-1:] + 1
        return torch.stack(ys, dim=1), torch.stack(ps, dim=1)

    def replay(self, prompt, y, p):
        """Logits (R, n, V) of all words of rollouts, in one pass; the mixtures are constants."""
        start = self.embed(prompt).repeat_interleave(len(y) // len(prompt), 0)      # (R, P, C)
        x = torch.cat([start, self.blend(y, p, (y == HASH).cumsum(1) == 0)[:, :-1]], dim=1)
        for block in self.blocks:
            x = block(x, self.rope)                                     # (R, T, C)
        return self.logits(x[:, prompt.size(1) - 1 :])

    def forward(self, batch):
        """Logits of the targets, or words, their p, and the logits of policy and reference."""
        if not self.cfg.group:
            return self.replay(batch["prompt"], batch["targets"], None)
        y, p = self.rollout(batch["prompt"], batch["noise"])
        ref = self.reference.replay(batch["prompt"], y, None)           # (R, n, V)
        return y, p, self.replay(batch["prompt"], y, p), ref

def word_flops(cfg):
    """Forward FLOPs of a sampled word in training, its share of the prompt included."""
    C, V, P, n = cfg.n_embd, VOCAB, cfg.n_vote + 2, cfg.n_new
    step = cfg.n_layer * (24 * C**2 + 4 * cfg.seq_len * C)
    mix = dict(token=0, self=4 * C**2, mean=2 * C * V).get(cfg.feed, 2 * C * V + 4 * C**2)
    return step * (P / max(1, cfg.group) + n - 1) / n + mix + 2 * C * V     # Eq. 10

# ---- 5. Objective and decoding -------------------------------------------------------------------
def judge(y, p, label):
    """Rewards (R,): 1 if y has one #, then the label, the end. And the p of the label behind #."""
    hashes, rows = y == HASH, torch.arange(len(y), device=y.device)     # (R, n)
    at = hashes[:, :-2].float().argmax(1)                               # (R,)
    right = (hashes.sum(1) == 1) & (y[rows, at + 1] == label) & (y[rows, at + 2] == DONE)   # (R,)
    return (hashes[rows, at] & right).float(), hashes[rows, at] * p[rows, at + 1, label]

def advantage(R, adv):
    """Rewards R (B, g) of groups -> advantages (B, g)."""
    std, g = R.std(1, keepdim=True), R.size(1)                          # (B, 1)
    factor = {"grpo": 1 / (std + 1e-4), "drgrpo": 1, "rloo": g / (g - 1)}[adv]
    return (R - R.mean(1, keepdim=True)) * factor                       # Eq. 6

def loss_fn(model, batch, cfg):
    """Cross-entropy in nats, or Eq. 8; its stats tell how improbable the right answers were."""
    if not cfg.group:
        loss = F.cross_entropy(model(batch).transpose(1, 2), batch["targets"])
        return loss, {"loss": loss.detach()}
    y, p, *logits = model(batch)                                        # (R, n)
    own, ref = (z.log_softmax(-1).gather(2, y[..., None]).squeeze(2) for z in logits)
    rewards, chance = judge(y, p, batch["label"].repeat_interleave(cfg.group))      # (R,)
    A = advantage(rewards.view(-1, cfg.group), cfg.adv).view(-1, 1)     # (R, 1)
    k3 = (ref - own).expm1() - (ref - own)                              # (R, n)  Eq. 7
    real = (y == DONE).cumsum(1) <= (y == DONE)     # all words up to the first DONE
    each = (cfg.beta * k3 - A * (own - own.detach()).exp()) * real      # (R, n)
    length = real.sum(1) if cfg.adv == "grpo" else cfg.n_new
    return (each.sum(1) / length).mean(), {"loss": 1 - chance.mean()}   # Eq. 8

# ---- 6. Training ---------------------------------------------------------------------------------
def learning_rate(step, cfg):
    """Linear warm-up, then a cosine to a tenth of the peak over the rest of the run."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    rest = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * (0.55 + 0.45 * math.cos(math.pi * rest))

def identity(cfg):
    """What a checkpoint must share with the run that loads it, besides being whole."""
    data = str([make_batch(cfg, split, 0) for split in ("train", "val")])
    return {"script": NAME, **asdict(cfg), "data": hashlib.sha256(data.encode()).hexdigest()}

def load_checkpoint(run, arm, cfg):
    """State of an arm. Fails if it is unreadable, another script's or of another Config."""
    path = run.out / f"{arm}.pt"
    try:
        state = torch.load(path, map_location=run.device, weights_only=True)
        saved = state["config"]
    except Exception as error:
        fail(f"{path} is no whole checkpoint ({type(error).__name__}); delete it, train again")
    free = "smoke only full device dtype compile out resume eval_only".split()
    for name, value in identity(cfg).items():
        if name not in [*free, *Config.inference] and saved.get(name) != value:
            fail(f"{path} has {name}={saved.get(name)}, not {value}; choose another --out")
    return state

def train(arm, model, cfg, run):
    """Trains one arm, or goes on from its checkpoint; returns its rows of log.csv. All randomness
    follows from seed and step, so that a resumed run repeats the numbers exactly."""
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=cfg.weight_decay,
                            fused=True)
    step, history = 0, []
    if run.load and (run.out / f"{arm}.pt").exists():
        state = load_checkpoint(run, arm, cfg)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        step, history = state["step"], state["history"]
    if run.compile:
        model.compile(fullgraph=True, dynamic=False, recompile_limit=64, isolate_recompiles=True)
    net = DistributedDataParallel(model) if run.world > 1 else model
    bar = tqdm(desc=arm, total=cfg.steps, initial=step, unit="step",
               disable=run.rank > 0 or step == cfg.steps)
    losses, start = [], time.perf_counter()
    while step < cfg.steps:
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        batch = run.to_device(make_batch(cfg, "train", step), shard=True)
        model.train()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            loss, stats = loss_fn(net, batch, cfg)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        for part in model.parts():
            nn.utils.clip_grad_norm_(part, cfg.grad_clip)
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, cfg)
        opt.step()
        losses.append(stats["loss"])
        step += 1
        bar.update()
        if step % cfg.eval_every and step < cfg.steps:
            continue
        mean = torch.stack(losses).mean() / run.world
        if run.world > 1:
            dist.all_reduce(mean)
        mean = mean.item()
        seconds = time.perf_counter() - start + (history[-1]["seconds"] if history else 0.0)
        val_loss = evaluate(model, cfg, run)["loss"]
        if not math.isfinite(mean + val_loss):
            bar.close()
            fail(f"loss of {arm} is {mean} at step {step}; the last checkpoint is kept", code=1)
        speed = step * cfg.batch_size * cfg.seq_len / seconds
        bar.set_postfix(loss=f"{mean:.3f}", tokens_per_s=f"{speed:.0f}")
        history.append(dict(arm=arm, step=step, loss=mean, val_loss=val_loss, seconds=seconds))
        state = dict(config=identity(cfg), step=step, history=history, model=model.state_dict(),
                     opt=opt.state_dict())
        run.write(f"{arm}.pt", lambda file: torch.save(state, file))
        losses, start = [], time.perf_counter()
    bar.close()
    return history

# ---- 7. Evaluation -------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, cfg, run):
    """Rates of right answers to unseen questions; `belief`: argmax of p summed over votes."""
    rows, seconds = [], []
    for i in range(cfg.eval_batches):
        prompt, _, noise, label, _ = run.to_device(make_batch(cfg, "val", i)).values()
        start = time.perf_counter()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            y, p = model.rollout(prompt, noise)                         # (B, n, V)
            best = model.rollout(prompt, torch.zeros_like(noise))       # (B, n)
        greedy, (sampled, chance) = judge(*best, label)[0].cpu(), judge(y, p, label)    # (B,)
        seconds.append(time.perf_counter() - start)
        belief = (p[:, : cfg.n_vote, :CLASSES].sum(1).argmax(-1) == label).float()      # (B,)
        rows.append(dict(loss=1 - chance, greedy=greedy, sampled=sampled, belief=belief))
        if model.gate:
            e, thinks = model.embed(y), (y == HASH).cumsum(1) == 0      # (B, n)
            ratio = (1 - model.gate(e, e)[1].mean(-1).square()).sqrt()  # (B, n)  Eq. 9
            rows[-1]["hidden"] = (ratio * thinks).sum(1) / thinks.sum(1).clamp(min=1)    # (B,)
    parts = {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}    # (N,)
    right = {name: "".join(f"{x:.0f}" for x in parts[name]) for name in ("greedy", "sampled")}
    return {name: x.mean().item() for name, x in parts.items()} | dict(
        right=right, ms_per_word=500 * min(seconds) / y.numel())

def gains(arms, arm="hrpo", rivals=("grpo", "selftok")):
    """[(gain, half its 95 % interval over draws with replacement)]: greedy, sampled per rival."""
    pairs = [zip(*(arms[name]["right"][what] for name in (arm, rival)))
             for rival in rivals for what in ("greedy", "sampled")]
    diffs = [torch.tensor([int(x) - int(y) for x, y in pair]).double() for pair in pairs]   # (N,)
    return [(gain.mean().item(), 1.96 * gain.std().item() / len(gain) ** 0.5) for gain in diffs]

# ---- 8. Experiment -------------------------------------------------------------------------------
def select(arms, cfg, run):
    """The {arm: Config} that --only leaves. Fails before anything runs if a checkpoint is unfit."""
    chosen = cfg.only.split(",") if cfg.only else list(arms)
    if unknown := set(chosen) - set(arms):
        fail(f"only={cfg.only}: {unknown.pop()!r} is no arm; choose from {','.join(arms)}")
    for arm in chosen:
        there = run.load and (run.out / f"{arm}.pt").exists()
        step = load_checkpoint(run, arm, arms[arm])["step"] if there else 0
        if cfg.eval_only and step < arms[arm].steps:
            fail(f"{run.out / arm}.pt is not trained to the end; run with --resume first")
    return {arm: arm_cfg for arm, arm_cfg in arms.items() if arm in chosen}

def scale(cfg, ratio):
    """The Config with --budget worked in and `ratio` times the steps."""
    steps, warmup = round(cfg.steps * cfg.budget * ratio), round(cfg.warmup * cfg.budget)
    return replace(cfg, steps=max(1, steps), warmup=warmup, budget=1.0)

def table(rows):
    """A list of dicts with the same keys -> aligned text."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    width = [max(map(len, column)) for column in zip(list(rows[0]), *cells)]
    return "\n".join("  ".join(map(str.rjust, line, width)) for line in [list(rows[0]), *cells])

def report(cfg, run, arms, columns, claims, **more):
    """Prints arms and claims as tables, writes log.csv and results.json, returns the latter.
    A claim (name, measure, relation, needed) holds if measure(arms) <= or >= needed. It is not
    judged below the full budget, or where an arm that it needs was left out."""
    verdicts = []
    for name, measure, relation, needed in claims:
        try:
            value = measure(arms)
            holds = value <= needed if relation == "<=" else value >= needed
        except (LookupError, TypeError):
            value, holds = None, None
        judged = value is not None and cfg.budget >= 1 and not cfg.smoke
        verdict = "not judged" if not judged else "holds" if holds else "does not hold"
        verdicts.append({"claim": name, "measured": value, "needed": f"{relation} {needed}",
                         "verdict": verdict})
    if run.rank == 0:
        print(table([{"arm": a, **{c: m.get(c, "-") for c in columns}} for a, m in arms.items()]))
        print("\n" + table(verdicts))
    gpu = torch.cuda.get_device_name() if run.device.type == "cuda" else None
    machine = dict(python=sys.version.split()[0], torch=torch.__version__, processes=run.world,
                   device=gpu or f"{run.device.type}, {torch.get_num_threads()} threads")
    results = dict(script=NAME, config=asdict(cfg), environment=machine, **more, arms=arms,
                   claims=verdicts, seconds=time.perf_counter() - run.start)
    rows = [row for m in arms.values() for row in m["history"]]
    lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
    run.write("log.csv", lambda file: file.write("\n".join([*lines, ""]).encode()))
    run.write("results.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
    return results

RL_ARMS = {"grpo": dict(feed="token"), "selftok": dict(feed="self"), "interp": dict(feed="mean"),
           "hrpo": {}, "grpo sure": dict(task="sure", feed="token"), "hrpo sure": dict(task="sure")}
MORE = {"hrpo drgrpo": dict(adv="drgrpo"), "hrpo rloo": dict(adv="rloo")}

def experiment(cfg, run):
    """Trains and evaluates all arms. Those of a task start from the same supervised model."""
    if not cfg.group or cfg.batch_size % (2 * cfg.group * run.world):   # `other` is of another
        fail(f"2 * group={cfg.group} * processes must divide batch_size={cfg.batch_size}, try 8")
    sft = dict(group=0, feed="token", steps=max(cfg.sft_steps, math.ceil(1 / cfg.budget)), lr=4e-3,
               warmup=cfg.sft_steps // 5, weight_decay=0.1, batch_size=cfg.batch_size // 2)
    arms = {"sft": sft, "sft sure": sft | dict(task="sure")} | RL_ARMS | (MORE if cfg.full else {})
    arms = {arm: scale(replace(cfg, **changes), 1) for arm, changes in arms.items()}
    chosen, bases, results = select(arms, cfg, run), {}, {}
    needed = [arm for arm, c in arms.items() if arm in chosen or not c.group
              and c.task in [other.task for other in chosen.values()]]
    for arm, c in select(arms, replace(cfg, only=",".join(needed)), run).items():
        torch.manual_seed(cfg.seed)
        model = HRPO(c, bases[c.task] if c.group else None).to(run.device)
        test = functools.partial(evaluate, model, replace(c, eval_batches=8 * c.eval_batches), run)
        start, decay = test(), model.gate.decay_only(c) if model.gate else []
        loss_0 = evaluate(model, c, run)["loss"]     # of as many questions as the rows of history
        history = train(arm, model, c, run)
        bases.setdefault(c.task, model)     # the first of a task is the supervised one
        m = results[arm] = dict(
            params=sum(p.numel() for p in model.parameters() if p.requires_grad), steps=c.steps,
            seconds=history[-1]["seconds"], kflops_per_word=word_flops(c) / 1e3, **test(), lost={},
            sampled_0=start["sampled"], loss_0=loss_0, start=start, decay=decay, history=history)
        m["opened"] = m["hidden"] - start["hidden"] if model.gate else None
        for model.feed in ("self", "other", "token", "hybrid") if c.feed == "hybrid" else ():
            m["lost"][model.feed] = m["greedy"] - test()["greedy"]
    return {arm: results[arm] for arm in chosen}

COLUMNS = "seconds kflops_per_word ms_per_word greedy sampled belief hidden".split()
CLAIMS = [  # name, measured from the arms, relation, needed
    ("C1 gain at step 0", lambda a: a["hrpo"]["sampled_0"] - a["grpo"]["sampled_0"], ">=", -0.03),
    ("C1 p of the answer, least rise", lambda a: min(
        a["hrpo"]["loss_0"] - row["val_loss"] for row in a["hrpo"]["history"]), ">=", -0.03),
    ("C2 least of four gains", lambda a: min(gain for gain, _ in gains(a)), ">=", 0.03),
    ("C2 lowest end of intervals", lambda a: min(gain - half for gain, half in gains(a)), ">=", 0),
    ("C3 greedy, lost if h = e", lambda a: a["hrpo"]["lost"]["self"], ">=", 0.03),
    ("C3 lost more if h is another's",
     lambda a: a["hrpo"]["lost"]["other"] - a["hrpo"]["lost"]["self"], ">=", 0),
    ("C4 hidden ratio, gain of hrpo", lambda a: a["hrpo"]["opened"], ">=", 0.03),
    ("C4 minus gain of selftok", lambda a: a["hrpo"]["opened"] - a["selftok"]["opened"], ">=", 0),
    ("C5 sure voters: |gain| - interval", lambda a: max(
        abs(gain) - half for gain, half in gains(a, "hrpo sure", ["grpo sure"])), "<=", 0)]
STYLES = {  # the same colour for the same role in every script, and a second cue
    "hrpo": dict(color="#0072b2", linestyle="-", marker="o", linewidth=4, markersize=9),
    "grpo": dict(color="#000000", linestyle="--", marker="s", linewidth=2.5, markersize=8),
    "selftok": dict(color="#e69f00", linestyle="-.", marker="^", linewidth=2.5, markersize=9),
    "interp": dict(color="#009e73", linestyle=":", marker="v", linewidth=2.5, markersize=9)}
PANELS = [("training step", "probability of the right answer",
           "hrpo, sampled: from {sampled_0:.2f} to {sampled:.2f}"),
          ("", "right answers", "hrpo {greedy:.2f}, sampled (narrow bars) {sampled:.2f}"),
          ("training step", "hidden ratio", "The gate: {opened:+.2f} (dotted: weight decay alone)"),
          ("fed to hrpo", "right, greedy (lines: arms)", "Without h hrpo loses {lost[self]:.2f}")]

@matplotlib.rc_context({"font.size": 16, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: reward over training, answers, hidden ratio, knock-outs."""
    arms = {arm: m for arm, m in results["arms"].items() if arm in STYLES}
    figure, levels = Figure(figsize=(20, 14)), results["ladder"]
    curves, bars, hidden, knocked = panels = figure.subplots(2, 2).flatten()
    for arm, m in arms.items():
        style, color, start = STYLES[arm], STYLES[arm]["color"], m["start"]
        x, y = zip((0, m["loss_0"]), *((row["step"], row["val_loss"]) for row in m["history"]))
        curves.plot(x, 1 - torch.tensor(y), **style, label=f"{arm}, {m['seconds']:.0f} s")
        for what, width, pad in (("greedy", 0.8, -18), ("sampled", 0.5, -36)):
            bar = bars.bar(arm, m[what], width, color=color, edgecolor="white")
            bars.bar_label(bar, fmt="%.2f", color="white", padding=pad)
        if m["decay"]:
            hidden.plot([0, m["steps"]], [start["hidden"], m["hidden"]], **style)
            hidden.plot(m["decay"], color="#cc79a7", linestyle=":", linewidth=3)
        knocked.axhline(m["greedy"], color=color, linestyle=style["linestyle"])
        for name, lost in m["lost"].items():
            knocked.bar_label(knocked.bar(name, m["greedy"] - lost, color=color), fmt="%.2f")
    for panel, (x, y, title) in zip(panels, PANELS):
        m = arms.get("hrpo", {"lost": {}})
        panel.set(xlabel=x, ylabel=y, title=title.format(**m) if m["lost"] else "", ylim=(0, 1.05))
    figure.legend(*curves.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    bars.set_yticks([*levels.values()], [f"{way} {level:.2f}" for way, level in levels.items()])
    bars.grid(axis="y", color="#cc79a7", linestyle="--")
    figure.supxlabel(f"{NAME}.py, seed {cfg.seed}, {results['environment']['device']}", fontsize=11)
    run.write(f"{NAME}.png", lambda file: figure.savefig(file, dpi=70))

# ---- 9. main -------------------------------------------------------------------------------------
def main(argv=None):
    """Runs what the command line says; returns what results.json holds."""
    with session(argv) as (cfg, run):
        results = report(cfg, run, experiment(cfg, run), COLUMNS, CLAIMS, ladder=ladder(cfg))
        plot(cfg, run, results)
        return results

if __name__ == "__main__":
    main()
