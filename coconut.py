"""Coconut: a model that thinks in hidden states instead of words can follow several paths at once.

Hao et al., "Training large language models to reason in a continuous latent space",
arXiv 2412.06769. Run: python coconut.py (five minutes on two CPU cores).

A chain of thought (CoT) must settle on one word at every step. Coconut takes the last hidden state
itself as the next input: nothing is chosen, so one vector may hold several branches of a search. A
curriculum teaches it. First the model reasons in words; then one step after another makes way for a
thought, and the words that are left train the thoughts, through which their gradient flows back.

(1)  h_t = F(x_1 .. x_t), the final norm included;  logits_t = W h_t;  x_t = e(w_t) for a word w_t
(2)  x_t = h_{t-1}: a thought z. No word, no projection, no detach; t: position, in (3), (7) a node
(3)  stage k:  edges <q> t t' <bot> r  z_1 .. z_k  s_{k+1} .. s_D  <eot> a    (or t' t)
(4)  L = mean of -log softmax(W h_{t-1})[w_t] over a sequence's words s_{k+1} .. s_D and answer a
(5)  k = 0 for a share `start` of the training, then 1 .. D for equal times; `mix`, `extra`: others
(6)  an edge u -> v takes one position: x_t = g_1 e(u) + g_2 e(v), at first on separate channels
(7)  a CoT prefers t to t' in (1 + 1/b) / 2 of the cases: it guesses a branch; if lost, a star
(8)  p_m(v) = softmax(W z_m)[v]: the logit lens, a thought read as if it were a word
(9)  FLOPs of an answer = layers * (24 P C^2 + 4 P^2 C + sum over t > P of (24 C^2 + 4 t C)) + head

h `h` | z `thoughts` | F `states` | W `embed` | e its rows, normed: `Coconut.words` | g `self.ends`
s_m `words` | D `n_hop` | b `n_branch` | k `stage` | S words at k = 0 | P prompt, E edges, n nodes
or new positions | C `n_embd`, V words, B batch, N items, nh heads, hs head size, T positions

What it shows. Two equal stars, each a root with b branches of D nodes; names and edge order are
random. To which of two ends does the root r lead, t or its twin t' in the other star? Who ignores r
tosses a coin; at the fork one layer cannot see which branch is right: it follows one edge. Without
thoughts <eot> attends to single inputs and follows none (no proof: its MLP sees a bag of edges).
  C1 coconut                       0.998 +- 0.003  needed >= 0.9, holds on 3 of 3
  C1 better of pause and no_cot    0.499 +- 0.002  needed <= 0.6, holds on 3 of 3
  C1 coconut - pause               0.501 +- 0.003  needed >= 0.25, holds on 3 of 3
  C2 cot, distance from (7)        0.010 +- 0.003  needed <= 0.04, holds on 3 of 3
  C2 cot, largest loss over floor  0.027 +- 0.009  needed <= 0.05, holds on 3 of 3
  C2 coconut - cot                 0.245 +- 0.015  needed >= 0.15, holds on 3 of 3
  C3 z_1, mass on r's children     0.988 +- 0.005  needed >= 0.8, holds on 3 of 3
  C3 z_1, largest share            0.585 +- 0.016  needed <= 0.75, holds on 3 of 3
  C3 z_1, AUC of r's children      1.000 +- 0.000  needed >= 0.95, holds on 3 of 3
  C3 z_2 .. z_D, least frontier    0.973 +- 0.023  needed >= 0.6, holds on 3 of 3
  C3 all z, largest twin mass      0.004 +- 0.003  needed <= 0.1, holds on 3 of 3
  C4 z of another, zeros or noise  0.506 +- 0.004  needed <= 0.6, holds on 3 of 3
Accuracy: t against t'; a lost CoT names an end of its own star. Frontier: m hops from r; twin: from
the other root. C5 (--full): no_curriculum <= 0.6. Pretrained, 12 layers do ProsQA with pauses, too.
no_cot of seed 1 is unfinished: its loss ends at 0.88, on seeds 2 and 3 at 0.71 (ln 2: 0.69).

What the paper leaves open. Words are normed, too: else a thought is far longer (facebookresearch/
coconut#29, on GPT-2). The stage belongs to a sequence: one program serves all. r ends the prompt,
<eot> only announces the answer, the optimiser survives a new stage: Ber666/reasoning-by-
superposition, where node numbers betray the root. Left out: ProsQA, trees, two tokens per edge.

Exercises: 1. --n_branch 3: which line does CoT meet now, and how is the mass of z_1 shared?
  2. --full: which of deep, looped, icot, no_thought, no_curriculum comes near coconut, and why?

New here: QUESTION, THINK, STOP, PAUSE, KINDS, grow, Coconut, answer_flops, reply, two_way, probe,
latency
"""

import argparse
import contextlib
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
import timeit
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
    n_layer: int = 1                # transformer blocks
    n_loop: int = 1                 # passes through the same blocks
    n_head: int = 2                 # attention heads
    n_embd: int = 64                # width of the residual stream
    # method
    n_branch: int = 2               # branches of each of the two stars
    n_hop: int = 4                  # nodes of a branch: hops to its end, and steps of language
    step_tokens: int = 1            # words in a step: 1: the next node; 2: the next node twice
    slot: Literal["thought", "pause", "nothing"] = "thought"    # arm coconut: what replaces a step
    remove: Literal["stages", "all", "none"] = "stages"     # steps removed: one by one, all at once
    start: float = 0.27             # stages: share of the training before any step is removed
    mix: float = 0.1                # stages: share of the sequences at a random stage up to now
    extra: float = 0.0              # stages: chance that one more step goes, and then one more
    # training
    steps: int = 2200               # optimiser steps; scaled where arms must cost the same
    batch_size: int = 128           # sequences in a step, over all processes
    lr: float = 4e-3                # peak learning rate
    warmup: int = 100               # steps until the learning rate peaks
    weight_decay: float = 0.01      # AdamW's decoupled weight decay
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 100           # steps between rows of log.csv, each with a checkpoint
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
    n_edge = property(lambda self: 2 * self.n_branch * self.n_hop)
    seq_len = property(lambda self: self.n_edge + 5 + self.lengths(0)[1] + 1)

    def __post_init__(self):
        at_least(self, 0, "start mix extra")
        at_least(self, 1, "step_tokens n_loop")
        at_least(self, 2, "n_branch n_hop")
        check_common(self)
        most = max(self.start, self.mix, self.extra)
        if self.batch_size % 8 or self.step_tokens > 2 or most >= 1:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of 8, step_tokens="
                             f"{self.step_tokens} 1 or 2, start, mix, extra (up to {most}) below 1")

    def lengths(self, stage):
        """Slots and words between r and <eot>; of the last step's dst src only dst is written."""
        s, D = self.step_tokens, self.n_hop
        return stage * (self.slot != "nothing"), max(0, s * (D - 1) + 1 - s * stage)

    def stage(self, done):
        """How many steps are removed when a share `done` of the training is over."""
        gone = math.floor((done - self.start) / (1 - self.start) * self.n_hop) + 1      # Eq. 5
        return {"stages": min(max(0, gone), self.n_hop), "all": self.n_hop, "none": 0}[self.remove]

SMOKE = dict(n_head=2, n_embd=16, n_hop=2, batch_size=8, steps=4, warmup=2, lr=1e-3, eval_every=2,
             eval_batches=1)

# ---- 2. Task -------------------------------------------------------------------------------------
QUESTION, THINK, STOP, PAUSE = range(4)      # <q> <bot> <eot> <pause>; node i is token 4 + i

def make_batch(cfg, split, step):
    """Questions, what follows r at stage k (but for `mix`, `extra`): a function of the arguments.

    `node` lists r and its star by levels, first the way to t, then the other star. For validation
    four rows share a graph: both roots, t and t' in both orders. Who ignores r is right on two.
    """
    rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step if split == "train" else ~step)
    draw, row = functools.partial(torch.rand, generator=rng), torch.arange(cfg.batch_size)
    B, b, D, E, s = len(row), cfg.n_branch, cfg.n_hop, cfg.n_edge, cfg.step_tokens
    graph, half = row // (1 if split == "train" else 4), E // 2 + 1     # (B,)
    node = 4 + draw(B, E + 2).argsort(1)[graph]                         # (B, E + 2)
    dst = torch.arange(1, half)                                         # (E / 2,)
    star = torch.stack([(dst - b).clamp(min=0), dst], dim=1)            # (E / 2, 2)
    order = draw(B, E).argsort(1)[graph]                                # (B, E)
    edges = node[:, torch.cat([star, star + half])][row[:, None], order]    # (B, E, 2)
    node = torch.where(row[:, None] % 2 > 0, node.roll(half, 1), node)  # (B, E + 2)
    ends = node[:, [half - b, 2 * half - b]]                            # (B, 2): t and t'
    shown = torch.where(row[:, None] // 2 % 2 > 0, ends.flip(1), ends)  # (B, 2)
    ask, think = F.pad(shown, (1, 0), value=QUESTION), F.pad(node[:, :1], (1, 0), value=THINK)
    prompt = torch.cat([ask, think], dim=1)                             # (B, 5)
    k = torch.full((B, 1), cfg.stage(step / cfg.steps if split == "train" else 1))  # (B, 1)
    if split == "train" and cfg.remove == "stages":
        k = torch.where(draw(B, 1) < cfg.mix, (draw(B, 1) * (k + 1)).long(), k)     # Eq. 5
        k = (k + (draw(B, D) < cfg.extra).cumprod(1).sum(1, True)).clamp(max=D)
    n_slot, n_word = torch.tensor([cfg.lengths(i) for i in range(D + 1)])[k].unbind(2)  # (B, 1)
    j = torch.arange(cfg.lengths(0)[1] + 1)                             # (S + 1,)
    words = node[:, 1:half:b].repeat_interleave(s, dim=1)               # (B, s * D)
    words = words.gather(1, (j - n_slot + s * k).clamp(max=s * D - 1))  # (B, S + 1)
    said = (j >= n_slot) & (j < n_slot + n_word)                        # (B, S + 1)
    idx = torch.where(said, words, torch.where(j < n_slot, PAUSE, STOP))    # (B, S + 1)  Eq. 3
    targets = F.pad(torch.where(said, idx, -1), (0, 1), value=-1)       # (B, S + 2), from r on
    targets = targets.scatter(1, n_slot + n_word + 1, ends[:, :1])      # (B, S + 2)
    return dict(edges=edges, prompt=prompt, idx=idx, n_slot=n_slot, targets=targets, node=node,
                ends=ends)

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

def block_flops(T, C):
    """Forward FLOPs of a Block on T tokens of width C; multiply-adds are two, attention is full."""
    return 24 * T * C**2 + 4 * T**2 * C

# ---- 4. Method -----------------------------------------------------------------------------------
def grow(cache, k, v):
    """Appends k, v (B, nh, n, hs) to a cache, which keeps gradients; returns all, a causal mask."""
    cache.append((k, v))
    n, (k, v) = k.size(2), (torch.cat(part, dim=2) for part in zip(*cache))     # (B, nh, T, hs)
    mask = torch.ones(n, k.size(2), dtype=torch.bool, device=k.device)  # (n, T)
    return k, v, mask.tril(k.size(2) - n)

class Coconut(nn.Module):
    """A causal transformer; it is a plain one unless slot="thought" and steps are removed."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.n_embd
        self.embed = nn.Embedding(4 + cfg.n_edge + 2, C)
        nn.init.normal_(self.embed.weight, std=C**-0.5)
        self.ends = nn.Parameter(2**0.5 * torch.eye(2).repeat(1, C // 2))   # channels of their own
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.register_buffer("rope", rope_table(cfg.seq_len, C // cfg.n_head), persistent=False)

    def parts(self):
        """Parameters to clip apart from each other: all in one."""
        return [list(self.parameters())]

    def words(self, idx):
        return norm(self.embed(idx))                                    # (..., C), length sqrt(C)

    def states(self, x, caches):
        """Final states of inputs x that continue what the caches hold. (B, n, C) -> (B, n, C)"""
        at = sum(k.size(2) for k, _ in caches[0])
        rope = self.rope[at : at + x.size(1)]                           # (n, 2 * hs)
        for block, cache in zip([*self.blocks] * self.cfg.n_loop, caches):
            x = block(x, rope, functools.partial(grow, cache))          # (B, n, C)
        return norm(x)                                                  # Eq. 1

    def read(self, batch):
        """Reads edges <q> t t' <bot> r. Returns the state at r, and a cache per layer passed."""
        edges = (self.words(batch["edges"]) * self.ends).sum(2)         # (B, E, C)  Eq. 6
        x = torch.cat([edges, self.words(batch["prompt"])], dim=1)      # (B, P, C)
        caches = [[] for _ in range(self.cfg.n_loop * self.cfg.n_layer)]
        return self.states(x, caches)[:, -1:], caches

    def logits(self, h):
        return F.linear(h, self.embed.weight).float()                   # (..., V)  Eq. 1

    def forward(self, batch):
        """Logits of r and of all that follows, (B, S + 2, V): one program for all stages."""
        h, caches = self.read(batch)                                    # (B, 1, C)
        x, hs = self.words(batch["idx"]), [h]                           # (B, S + 1, C)
        for i in range(self.cfg.n_hop if self.cfg.slot == "thought" else 0):
            thinks = (i < batch["n_slot"])[..., None]                   # (B, 1, 1)
            z = torch.where(thinks, hs[-1], x[:, i : i + 1])            # (B, 1, C)  Eq. 2
            hs.append(self.states(z, caches))
        return self.logits(torch.cat([*hs, self.states(x[:, len(hs) - 1 :], caches)], dim=1))

def answer_flops(cfg):
    """Forward FLOPs of an answer at the last stage."""
    P, C, (n_slot, n_word) = cfg.n_edge + 5, cfg.n_embd, cfg.lengths(cfg.stage(1))
    layer = block_flops(P, C)
    layer += sum(24 * C**2 + 4 * t * C for t in range(P + 1, P + n_slot + n_word + 2))
    return cfg.n_layer * cfg.n_loop * layer + 2 * C * (4 + cfg.n_edge + 2) * (n_word + 1)   # Eq. 9

# ---- 5. Objective and decoding -------------------------------------------------------------------
def loss_fn(model, batch, cfg):
    """Cross-entropy in nats, a mean over a sequence's labels, then over sequences: loss, stats."""
    logits, targets = model(batch), batch["targets"]                    # (B, S + 2)
    nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")
    loss = (nll.sum(1) / (targets >= 0).sum(1)).mean()                  # Eq. 4
    return loss, {"loss": loss.detach(), "places": nll.detach().sum(0) / (targets >= 0).sum(0)}

@torch.no_grad()
def reply(model, batch, stage, given=None):
    """Fills the slots of a stage, writes the other steps greedily, answers. Returns the answer's
    logits (B, V), the states before the slots, which enter them if none are `given`, the words."""
    n_slot, n_word = model.cfg.lengths(stage)
    (h, caches), token = model.read(batch), batch["prompt"][:, :1]      # (B, 1)
    thoughts, words = [h[:, :0]], [token[:, :0]]
    if model.cfg.slot == "pause":       # whatever is given: probe swaps nothing here
        given = model.words(torch.full_like(token, PAUSE).expand(-1, n_slot))       # (B, slots, C)
    for i in range(n_slot):
        thoughts.append(h)
        h = model.states(h if given is None else given[:, i : i + 1], caches)       # Eq. 2
    for _ in range(n_word):
        words.append(model.logits(h).argmax(-1))
        h = model.states(model.words(words[-1]), caches)                # (B, 1, C)
    h = model.states(model.words(torch.full_like(token, STOP)), caches)     # (B, 1, C)
    return model.logits(h)[:, 0], torch.cat(thoughts, dim=1), torch.cat(words, dim=1)

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
def two_way(logits, batch):
    """Share of the answers (B, V) that prefer t to t'; a tie, common in bfloat16, counts half."""
    right, wrong = logits.gather(1, batch["ends"]).unbind(1)            # (B,)
    return ((right > wrong).float() + (right >= wrong).float()).mean() / 2

@torch.no_grad()
def evaluate(model, cfg, run):
    """At the last stage: loss in nats, also by label; decoded answers (no words: real_paths 1)."""
    rows = []
    for i in range(cfg.eval_batches):
        batch = run.to_device(make_batch(cfg, "val", i))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            _, stats = loss_fn(model.forward, batch, cfg)       # not compiled: it has no gradient
            logits, _, words = reply(model, batch, cfg.stage(1))
        ways = batch["node"][:, 1 : cfg.n_edge // 2 + 1].unflatten(1, (cfg.n_hop, -1))  # (B, D, b)
        real = words[:, :: cfg.step_tokens, None] == ways[:, cfg.stage(1) :]
        exact = logits.argmax(-1) == batch["ends"][:, 0]                # (B,)
        rows.append(stats | dict(two_way=two_way(logits, batch), exact=exact.float().mean(),
                                 real_paths=real.all(1).any(1).float().mean()))
    mean = {name: torch.stack([row[name] for row in rows]).mean(0).tolist() for name in rows[0]}
    labels = [nll for nll in mean.pop("places") if not math.isnan(nll)]
    fork = math.log(cfg.n_branch) * (cfg.remove == "none")      # the floor of the first word
    excess = max((nll - fork * (i == 0) for i, nll in enumerate(labels)), default=math.nan)
    return mean | dict(labels=labels, excess=excess, guess=(1 + 1 / cfg.n_branch) / 2)  # Eq. 7

@torch.no_grad()
def probe(model, cfg, run):
    """What thoughts hold, and what becomes of answers if they are replaced (pauses never are)."""
    D, half, rows = cfg.n_hop, cfg.n_edge // 2 + 1, []
    for i in range(cfg.eval_batches):
        batch = run.to_device(make_batch(cfg, "val", i))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            z = reply(model, batch, D)[1]                               # (B, D, C)
            torch.manual_seed(i)
            noise = norm(torch.randn_like(z))           # of a thought's length
            twin = z[torch.arange(len(z)) ^ 3]          # the same prompt but for the root
            found = [reply(model, batch, D, y)[0] for y in (z.roll(4, 0), 0 * z, noise, twin)]
            found += [reply(model, batch, k)[0] for k in range(D + 1)]
            lens = model.logits(z)                                      # (B, D, V)
        node = batch["node"][:, None].expand(-1, D, -1)                 # (B, D, n)
        rows.append([torch.stack([two_way(logits, batch) for logits in found])[None],
                     lens.gather(2, node), lens.softmax(-1).gather(2, node)])       # Eq. 8
    rates, score, p = (torch.cat(part).cpu() for part in zip(*rows))    # (N, D, n)
    other, zero, noise, twin, *by_stage = rates.mean(0).tolist()
    m, column = torch.arange(1, D + 1)[:, None], torch.arange(2 * half)
    own, level = column < half, (column % half + cfg.n_branch - 1) // cfg.n_branch  # (n,)
    front, gold = own & (level == m), column == 1 + (m - 1) * cfg.n_branch          # (D, n)
    groups = dict(gold=gold, others=front & ~gold, earlier=own & (level < m),
                  twin=~own & (level == m), rest=own & (level > m) | ~own & (level != m))
    pairs, q = list(zip(score.unbind(1), front)), score.new_tensor([0.05, 0.5, 0.95])
    return dict(
        swapped={"other z": other, "zero z": zero, "random z": noise}, flips=1 - twin,
        by_stage=by_stage,
        frontier=(p * front).sum(2).mean(0).tolist(), largest=p.amax(2).mean(0).tolist(),
        auc=[(u[:, f, None] > u[:, None, ~f]).float().mean().item() for u, f in pairs],
        mass={name: (p * group).sum(2).mean(0).tolist() for name, group in groups.items()},
        spread={name: [u[:, g].quantile(q).tolist() for u, g in zip(score.unbind(1), group)]
                for name, group in groups.items()})

def latency(cfg, run):
    """Passes, FLOPs, ms of an answer if a step has 1 or 2 words; pauses could do with 2 passes."""
    cost = {}
    for c in (replace(cfg, step_tokens=1), replace(cfg, step_tokens=2)):
        batch = run.to_device({name: v[:1] for name, v in make_batch(c, "val", 0).items()})
        call = functools.partial(reply, Coconut(c).to(run.device), batch, c.stage(1))
        ms = 250 * min(timeit.repeat(lambda: call()[0].argmax().item(), number=4, repeat=8))
        row = dict(passes=2 + sum(c.lengths(c.stage(1))), mflops=answer_flops(c) / 1e6, ms=ms)
        cost |= {f"{name}_{c.step_tokens}": value for name, value in row.items()}
    return cost

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

def experiment(cfg, run):
    """Trains and evaluates every arm for the same number of steps. Returns {arm: metrics}."""
    D, results = cfg.n_hop, {}
    arms = {"no_cot": dict(slot="nothing", remove="all"), "pause": dict(slot="pause"),
            "cot": dict(slot="nothing", remove="none"), "coconut": {}}
    if cfg.full:
        arms |= {"no_curriculum": dict(remove="all"), "no_thought": dict(slot="nothing"),
                 "icot": dict(slot="nothing", mix=0.0, extra=math.exp(-4)),     # its lambda is 4
                 "pause_token": dict(slot="pause", remove="all"),
                 "deep": dict(slot="nothing", n_layer=cfg.n_layer * (D + 1)),
                 "looped": dict(slot="nothing", n_loop=cfg.n_loop * (D + 1))}
    arms = {arm: scale(replace(cfg, **changes), 1) for arm, changes in arms.items()}
    for arm, c in select(arms, cfg, run).items():
        torch.manual_seed(cfg.seed)
        model = Coconut(c).to(run.device)
        history, long = train(arm, model, c, run), replace(c, eval_batches=8 * c.eval_batches)
        results[arm] = dict(params=sum(p.numel() for p in model.parameters()), steps=c.steps,
                            seconds=history[-1]["seconds"], **evaluate(model, long, run),
                            **latency(c, run), history=history)
        if c.slot != "nothing" and c.remove != "none":
            results[arm] |= probe(model, long, run)
    return results

COLUMNS = "params seconds loss two_way exact passes_1 mflops_1 ms_1 passes_2 mflops_2 ms_2".split()
CLAIMS = [  # name, measured from the arms, relation, needed; accuracy is 2-way
    ("C1 coconut", lambda a: a["coconut"]["two_way"], ">=", 0.9),
    ("C1 best control", lambda a: max(a["pause"]["two_way"], a["no_cot"]["two_way"]), "<=", 0.6),
    ("C1 coconut - pause", lambda a: a["coconut"]["two_way"] - a["pause"]["two_way"], ">=", 0.25),
    ("C2 cot, off guessing", lambda a: abs(a["cot"]["two_way"] - a["cot"]["guess"]), "<=", 0.04),
    ("C2 cot, largest loss above its floor", lambda a: a["cot"]["excess"], "<=", 0.05),
    ("C2 coconut - cot", lambda a: a["coconut"]["two_way"] - a["cot"]["two_way"], ">=", 0.15),
    ("C3 z_1, mass on r's children", lambda a: a["coconut"]["frontier"][0], ">=", 0.8),
    ("C3 z_1, largest share", lambda a: a["coconut"]["largest"][0], "<=", 0.75),
    ("C3 z_1, AUC of r's children", lambda a: a["coconut"]["auc"][0], ">=", 0.95),
    ("C3 z_2 .. z_D, least frontier", lambda a: min(a["coconut"]["frontier"][1:]), ">=", 0.6),
    ("C3 all z, largest twin mass", lambda a: max(a["coconut"]["mass"]["twin"]), "<=", 0.1),
    ("C4 other, zero or random z", lambda a: max(a["coconut"]["swapped"].values()), "<=", 0.6),
    ("C5 no_curriculum", lambda a: a["no_curriculum"]["two_way"], "<=", 0.6),
]
STYLES = {  # the same colour for the same role in every script, and a second cue
    "coconut": dict(color="#0072b2", linestyle="-", marker="o", linewidth=4),
    "cot": dict(color="#000000", linestyle="--", marker="s", linewidth=2.5),
    "pause": dict(color="#e69f00", linestyle="-.", marker="^", linewidth=2.5),
    "no_cot": dict(color="#d55e00", linestyle=":", marker="v", linewidth=2.5),
}
KINDS = {"gold": ("#0072b2", "o", "on the way to t"), "others": ("#56b4e9", "*", "as far from r"),
         "earlier": ("#009e73", "+", "nearer to r"), "twin": ("#d55e00", "x", "as far, other star"),
         "rest": ("#999999", ".", "all other nodes")}

@matplotlib.rc_context({"font.size": 17, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: accuracies, losses with their floors, and what the thoughts hold."""
    arms, D, b, figure = results["arms"], cfg.n_hop, cfg.n_branch, Figure(figsize=(24, 14))
    bars, stages, curves, masses, spread = figure.subplot_mosaic("AAABBCCC;DDDDEEEE").values()
    m, done, x, base = arms.get("coconut", {}), [i / 99 for i in range(100)], torch.arange(D) + 1, 0
    rates = {arm: arms[arm]["two_way"] for arm in arms} | m.get("swapped", {})
    colors = [STYLES[arm]["color"] if arm in STYLES else "#999999" for arm in rates]
    bars.bar_label(bars.bar(list(rates), list(rates.values()), color=colors), fmt="%.2f")
    bars.tick_params(axis="x", rotation=30)
    bars.set_title(f"Right most often: {max(rates, key=rates.get)}")
    for arm in [arm for arm in STYLES if arm in arms]:
        rows, note = arms[arm]["history"], f"{arm}, in the end {arms[arm]['excess']:.2f} above"
        curves.plot([r["step"] for r in rows], [r["loss"] for r in rows], **STYLES[arm], label=note)
        stages.plot(arms[arm].get("by_stage", []), **STYLES[arm])
    floor = [math.log(b) / (cfg.lengths(k)[1] + 1) * (k < D - 1) for k in map(cfg.stage, done)]
    curves.plot([x * arms[list(arms)[0]]["steps"] for x in done], floor, "#cc79a7", label="floor")
    curves.set(xlabel="training step", ylabel="loss (nats); floor of stages", ylim=(0, 1.6))
    stages.set(xlabel="thoughts; the other steps are words", xticks=range(D + 1))
    for panel in (bars, stages):
        panel.axhline(0.5, color="#999999", linestyle="--", label="coin flip")
        panel.axhline((1 + 1 / b) / 2, color="#cc79a7", linestyle=":", label="a branch is guessed")
        panel.set(ylabel="share of answers that prefer t to t'", ylim=(0, 1.2))
    for i, (kind, (color, mark, label)) in enumerate(KINDS.items() if "mass" in m else ()):
        masses.bar(x, m["mass"][kind], 0.8, base, color=color, hatch=mark, label=label)
        base = base + torch.tensor(m["mass"][kind])
        low, mid, high = torch.tensor(m["spread"][kind]).T
        spread.errorbar(x + i / 10, mid, [mid - low, high - mid], fmt=mark, color=color, ms=12)
    if "mass" in m:
        stages.set_title(f"{m['by_stage'][0]:.2f} in words, {m['by_stage'][-1]:.2f} in thoughts")
        masses.set_title(f"z_1 holds r's children: {m['frontier'][0]:.2f} of its mass")
        spread.set_title(f"Frontier against all others: least AUC {min(m['auc']):.3f}")
        curves.set_title(f"coconut ends {m['excess']:.2f} nats above its floor")
    masses.set(xlabel="thought", ylabel="probability, read as words", xticks=x, xlim=(0.5, D + 2))
    spread.set(xlabel="thought", ylabel="logits of nodes: median, 5 % to 95 %", xticks=x)
    for panel in (bars, curves, masses)[: 2 + ("mass" in m)]:
        panel.legend(loc="upper left" if panel is bars else "upper right")
    figure.supxlabel(f"{NAME}.py, seed {cfg.seed}, {results['environment']['device']}", fontsize=11)
    run.write(f"{NAME}.png", lambda file: figure.savefig(file, dpi=70))

# ---- 9. main -------------------------------------------------------------------------------------
def main(argv=None):
    """Runs what the command line says; returns what results.json holds."""
    with session(argv) as (cfg, run):
        results = report(cfg, run, experiment(cfg, run), COLUMNS, CLAIMS)
        plot(cfg, run, results)
        return results

if __name__ == "__main__":
    main()
