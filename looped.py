"""Looped transformers: one block of layers, passed again and again, reasons like a deep model.

Saunshi et al., "Reasoning with latent thoughts: On the power of looped transformers", arXiv
2502.17416. Run: python looped.py (four minutes on two CPU cores).

To follow a pointer eight times takes depth, but every layer may be the same. So k layers passed L
times, (k x L), should reason almost as well as k L different ones, (kL x 1), which need the same
FLOPs and L times the parameters, and much better than (k x 1). Facts are another matter: they are
stored in parameters, and to pass those again stores little more (0.39, looped 0.50, deep 1.00).

(1)  h_0 = e = norm(Embed(x)),  h_t = f(h_{t-1}) for t = 1..L,  logits = Unembed(norm(h_L))
(2)  looped (k x L) | shallow (k x 1), equal parameters | deep (kL x 1), equal FLOPs
(3)  %Gap = 100 (Acc(looped) - Acc(shallow)) / (Acc(deep) - Acc(shallow)),  Acc: see (9)
(4)  R = mean of cos(theta_i, theta_{i+1}) over layers i and matrices (Q, K, ...); paper: i, i + k
(5)  loss = CE - lambda R                           makes the layers of a deep model alike
(6)  h_t = f(h_{t-1} + e)  or  f(A [h_{t-1}; e])    input injection
(7)  p_t = sigmoid(w . h_t + b);  N = the first t with p_1 + ... + p_t > 0.99, at most L;
     r = 1 - p_1 - ... - p_{N-1};  h = p_1 h_1 + ... + p_{N-1} h_{N-1} + r h_N instead of h_L
(8)  loss = CE + tau mean(N + r)                    adaptive computation time, ACT
(9)  Acc = alpha ln D + beta,  D = k L: the effective depth;  Acc: accuracy on the hardest third

x `idx` | h, e `h` `e` | f `LoopedGPT.loop` | k `n_layer` | L `n_loop` | lambda `reg` | A `adapter`
w, b `halt` | r `left` | N + r `spent` | tau `ponder` | T `seq_len` | C `n_embd` | M facts | H hops
S symbols at a position, V of them | B batch, nh heads, hs head size

What it shows. Task chain: statements name = value of 4 interleaved chains; a value is the name of
the statement before or, at hop 0, a digit; asked is the root's digit. A guess is right 1 in 4.
Memory: 3 letters -> one of 64 values. Seeds 1-3; more of C4 with --full. All arms get equal steps;
1, 2, 3 and 6 loops reach hops 1, 3, 5 and 5, which is the last (C3). Deep, at the best of four
learning rates, is still learning: its %Gap is over 100 and is cut to 100 in C2.
  C1 looped, hardest third            1.000 +- 0.000  needed >= 0.9, holds on 3 of 3
  C1 deep - looped                    -0.500 +- 0.170  needed <= 0.05, holds on 3 of 3
  C1 looped - shallow                 0.749 +- 0.003  needed >= 0.3, holds on 3 of 3
  C1 shallow, hardest third           0.251 +- 0.003  needed <= 0.4, holds on 3 of 3
  C1 shallow, hops 0 and 1            1.000 +- 0.000  needed >= 0.95, holds on 3 of 3
  C2 %Gap of chain - of memory        80.890 +- 0.454  needed >= 30, holds on 3 of 3
  C3 least gain in hops by more loops 0.000 +- 0.000  needed >= 0, holds on 3 of 3
  C4 cosine, deep                     0.000 +- 0.004  needed <= 0.2, holds on 3 of 3

What the paper leaves open. It prints + in Eq. 5, which drives the cosine to -1; its text wants
layers alike. Injection is from aks2203/deep-thinking, models/dt_net_1d.py, halting from the
Universal Transformer (arXiv 1807.03819), without its signals of position and time; a halted
position is still computed, which saves no time. Left out: middle looping, language models, i-GSM.

Exercises
  1. Read after 3 loops looped is worse than a guess, but 1x3 solves all. Does --inject add help?
  2. --only shallow,looped,deep --task add --seq_len 20, or phop and 40: which task needs loops?
  3. --full: lambda = 10 makes six layers alike. Is the deep model better or worse for it?

New here: CHAINS, LETTERS, KEY, VALUES, chain_task, phop_task, add_task, memory_task, LoopedGPT,
likeness, loop_flops, answer, percent_gap
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
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Literal, get_args

import matplotlib
import numpy as np
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
    n_loop: int = 6                 # passes through the same blocks
    n_head: int = 2                 # attention heads
    n_embd: int = 64                # width of the residual stream
    seq_len: int = 24               # tokens in a training sequence
    # method
    task: Literal["chain", "phop", "add", "memory"] = "chain"   # what the model has to learn
    inject: Literal["concat", "add", "none"] = "none"       # how e enters every iteration
    halting: Literal["none", "act"] = "none"                # act: a position decides when to stop
    ponder: float = 0.01            # act: price of a loop, in nats
    reg: float = 0.0                # lambda, makes layers alike (needs more than one: arm deep)
    n_facts: int = 8192             # facts of the memory task
    # training
    steps: int = 1000               # optimiser steps; scaled where arms must cost the same
    batch_size: int = 64            # sequences in a step, over all processes
    lr: float = 4e-3                # peak learning rate
    warmup: int = 100               # steps until the learning rate peaks
    weight_decay: float = 0.01      # AdamW's decoupled weight decay
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 100           # steps between rows of log.csv, each with a checkpoint
    eval_batches: int = 4           # validation batches for such a row; 8 times more at the end
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

    def __post_init__(self):
        check_common(self)
        at_least(self, 1, "n_loop n_facts")
        at_least(self, 0, "ponder reg")
        fits = self.seq_len >= KEY if self.task == "memory" else self.seq_len in range(12, 41, 4)
        if not fits or self.n_facts > LETTERS**KEY:
            raise ValueError(f"seq_len={self.seq_len} must be 12, 16, ... or 40 (memory: from 3), "
                             f"and n_facts={self.n_facts} at most {LETTERS**KEY}")

SMOKE = dict(n_loop=4, n_head=2, n_embd=16, seq_len=16, n_facts=64, batch_size=4, steps=4, warmup=2,
             lr=1e-3, eval_every=2, eval_batches=1)

# ---- 2. Task -------------------------------------------------------------------------------------
CHAINS, LETTERS, KEY, VALUES = 4, 32, 3, 64     # memory: KEY of LETTERS -> one of VALUES

def chain_task(cfg, rng, step):
    """Interleaved chains of statements (name, value); the label is the digit at a chain's root."""
    B, T = cfg.batch_size, cfg.seq_len
    names, digits, chain = (torch.rand(B, n, generator=rng).argsort(1) for n in (T, 10, T))
    name = names.view(B, CHAINS, -1)                                    # (B, CHAINS, H)
    root = (T + digits[:, :CHAINS, None]).expand_as(name)               # (B, CHAINS, H)
    value = torch.cat([root[..., :1], name[..., :-1]], dim=2)           # (B, CHAINS, H)
    hop = torch.arange(T // CHAINS).expand_as(name)                     # (B, CHAINS, H)
    place = (chain % CHAINS).argsort(dim=1, stable=True).argsort(1)     # (B, T): chains interleave
    name, value, root, hop = (s.flatten(1).gather(1, place) for s in (name, value, root, hop))
    return torch.stack([name, value], dim=2), root, hop

def phop_task(cfg, rng, step):
    """First the number of hops p, then letters; a hop goes behind the letter's last occurrence."""
    B, T = cfg.batch_size, cfg.seq_len
    level = torch.randint(4, (B, 1), generator=rng)                     # (B, 1)
    letters = torch.randint(1, 4, (B, T - 1), generator=rng).cumsum(1) % 4  # neighbours differ
    idx = torch.cat([4 + level, letters], dim=1)                        # (B, T)
    same = (idx[:, :, None] == idx.roll(1, dims=1)[:, None]).tril()     # (B, T, T)
    find = (same * torch.arange(T)).amax(2)                             # (B, T), 0: there is none
    at = torch.arange(T).expand(B, T)                                   # (B, T)
    for h in range(8):
        at = torch.where(h < 2**level, find.gather(1, at), at)          # (B, T)
    # where a hop leads nowhere, the model learns to say the first symbol, which no level counts
    return idx[..., None], idx.gather(1, at), torch.where(at > 0, level, -1)

def add_task(cfg, rng, step):
    """From 2 to T / 4 - 1 numbers of three digits, "315+120+045=", and the digits of their sum."""
    B, most = cfg.batch_size, cfg.seq_len // 4 - 1
    n = torch.randint(2, most + 1, (B, 1), generator=rng)               # (B, 1)
    used = torch.arange(most) >= most - n                               # (B, most)
    number = torch.randint(1000, (B, most), generator=rng) * used       # (B, most)
    number = torch.cat([number, number.sum(1, keepdim=True)], dim=1)    # (B, most + 1)
    digits = number[..., None] // torch.tensor([1000, 100, 10, 1]) % 10     # (B, most + 1, 4)
    idx = torch.where(F.pad(used, (0, 1), value=True)[..., None], digits.roll(-1, dims=2), 12)
    idx[:, :-1, 3] = 10         # behind every number a +, 12 is no number
    idx[:, -2, 3] = 11          # behind the last a =
    idx[:, -1] = digits[:, -1]
    targets = F.pad(digits[:, -1], (4 * most - 1, 1), value=-1)         # (B, T)
    return idx.flatten(1)[..., None], targets, torch.where(targets >= 0, n - 2, -1)

def memory_task(cfg, rng, step):
    """Facts, all in every turn: three letters, and a value to be known at the last of them."""
    turn, first = divmod(step * cfg.batch_size, cfg.n_facts)
    order = torch.randperm(cfg.n_facts, generator=rng.manual_seed(cfg.seed * 1_000_003 + turn))
    row = order[(first + torch.arange(cfg.batch_size)) % cfg.n_facts]   # (B,)
    key = torch.randperm(LETTERS**KEY, generator=rng.manual_seed(0))[: cfg.n_facts]     # (M,)
    value = torch.randint(VALUES, (cfg.n_facts,), generator=rng)        # (M,)
    idx = key[row, None] // LETTERS ** torch.arange(KEY) % LETTERS      # (B, T)
    targets = F.pad(value[row, None], (KEY - 1, 0), value=-1)           # (B, T)
    return idx[..., None], targets, targets.clamp(max=0)

def make_batch(cfg, split, step):
    """Symbols (B, T, S), labels and difficulties (B, T) or -1: a function of the arguments alone.
    All seeds have the same validation; of facts it asks for those that were trained."""
    seed = cfg.seed * 1_000_003 + step if split == "train" else -1 - step
    tasks = {"chain": chain_task, "phop": phop_task, "add": add_task, "memory": memory_task}
    batch = tasks[cfg.task](cfg, torch.Generator().manual_seed(seed), step)
    return dict(zip(("idx", "targets", "level"), batch))

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

class KVCache:
    """Keys and values of one layer in the order in which they came; every row has its own count."""
    def __init__(self, batch_size, cfg, device):
        size = batch_size, cfg.seq_len, cfg.n_head, cfg.n_embd // cfg.n_head
        self.k, self.v = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self.count = torch.zeros(batch_size, dtype=torch.long, device=device)

    def extend(self, k, v, rows, new):
        """Appends k, v (R, nh, n, hs) to `rows` (R,); of n positions the first `new` (R,) are real.
        Returns all keys, values of these rows and a mask (R, 1, n, length): itself and earlier."""
        slot = self.count[rows, None] + torch.arange(k.size(2), device=k.device)
        self.k[rows[:, None], slot] = k.transpose(1, 2).to(self.k.dtype)
        self.v[rows[:, None], slot] = v.transpose(1, 2).to(self.v.dtype)
        self.count[rows] += new
        length = int(slot.max()) + 1
        mask = torch.arange(length, device=k.device) <= slot[:, None, :, None]
        return self.k[rows, :length].transpose(1, 2), self.v[rows, :length].transpose(1, 2), mask

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
class LoopedGPT(nn.Module):
    """A causal transformer (k x L): n_layer blocks, passed n_loop times. One loop: plain."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C, S = cfg, cfg.n_embd, 2 if cfg.task == "chain" else 1
        V = {"chain": cfg.seq_len + 10, "phop": 8, "add": 13, "memory": VALUES}[cfg.task]
        self.embed = nn.Embedding(V, C // S)
        nn.init.orthogonal_(self.embed.weight)      # names that overlap are harder to follow
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=C**-0.5)
            nn.init.normal_(block.mlp.fc.weight, std=C**-0.5)
        self.head = nn.Linear(C, V, bias=False)
        nn.init.zeros_(self.head.weight)
        rope = rope_table(cfg.seq_len, C // cfg.n_head)                 # (T, 2 hs)
        if cfg.task == "chain":     # statements are found by name: all stand at position 0
            rope = rope[:1].repeat(cfg.seq_len, 1)                      # (T, 2 hs)
        self.register_buffer("rope", rope, persistent=False)
        if cfg.inject == "concat":
            self.adapter = nn.Linear(2 * C, C, bias=False)
        if cfg.halting == "act":
            self.halt = nn.Linear(C, 1)
            nn.init.zeros_(self.halt.weight)
            nn.init.ones_(self.halt.bias)

    def parts(self):
        """Parameters to clip apart from each other: all in one."""
        return [list(self.parameters())]

    def loop(self, h, e, start=0, caches=None):
        """One pass f through all blocks, h_{t-1} and e -> h_t, all (B, T, C). A cache per block."""
        B, T, C = h.shape
        if self.cfg.inject == "add":
            h = h + e                                                   # (B, T, C)  Eq. 6
        if self.cfg.inject == "concat":
            h = self.adapter(torch.cat([h, e], dim=-1)).to(h.dtype)     # (B, T, C)  Eq. 6
        for i, block in enumerate(self.blocks):
            rows = torch.arange(B, device=h.device)                     # (B,)
            memory = caches and functools.partial(caches[i].extend, rows=rows, new=T)
            h = block(h, self.rope[start : start + T], memory)          # (B, T, C)
        return h

    def forward(self, idx, n_loop, start=0, caches=None):
        """Symbols idx (B, T, S) -> logits (B, T, V), and what ACT spent at every position (B, T).
        With `caches`, a KVCache for every loop and block, idx continues `start` positions."""
        h = e = norm(self.embed(idx).flatten(2))                        # (B, T, C)
        left, k = torch.ones(h.shape[:2], device=h.device), len(self.blocks)    # (B, T)
        mean, spent = torch.zeros_like(h), torch.zeros_like(left)
        for t in range(n_loop):
            own = caches and caches[t * k : t * k + k]
            new = self.loop(h, e, start, own)                           # (B, T, C)  Eq. 1
            if self.cfg.halting == "none":
                h = new                                                 # (B, T, C)
                continue
            h = torch.where(left[..., None] > 0, new, h)                # (B, T, C)
            with torch.autocast(h.device.type, enabled=False):
                p = self.halt(h.float()).squeeze(-1).sigmoid()          # (B, T)
            stop = (left - p < 0.01) | (t == n_loop - 1)                # (B, T): here t is N
            mean = mean + torch.where(stop, left, p)[..., None] * h     # (B, T, C)  Eq. 7
            spent = spent + (left > 0) + stop * left                    # (B, T): N + r in the end
            left = torch.where(stop, 0, left - p)                       # (B, T)
        h = h if self.cfg.halting == "none" else mean                   # (B, T, C)
        return self.head(norm(h)).float(), spent

def likeness(model):
    """Mean cosine between the same matrices of neighbouring layers, from -1 to 1."""
    layers = [[*block.attn.qkv.weight.chunk(3), block.attn.proj.weight, block.mlp.fc.weight,
               block.mlp.proj.weight] for block in model.blocks]
    cosines = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
               for one, two in pairwise(layers) for a, b in zip(one, two)]
    return torch.stack(cosines).mean()                                  # Eq. 4

def loop_flops(model):
    """Forward FLOPs per position, without what halting (little) and A (4 C^2 a loop) take."""
    cfg, T = model.cfg, KEY if model.cfg.task == "memory" else model.cfg.seq_len
    return cfg.n_layer * cfg.n_loop * block_flops(T, cfg.n_embd) / T + 2 * model.head.weight.numel()

# ---- 5. Objective and decoding -------------------------------------------------------------------
def loss_fn(model, batch, cfg):
    """Cross-entropy in nats after the last loop, and what the flags add to it: loss, stats."""
    logits, spent = model(batch["idx"], cfg.n_loop)
    loss = ce = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-1)
    if cfg.halting == "act":
        loss = loss + cfg.ponder * spent.mean()                         # Eq. 8
    if cfg.reg and cfg.n_layer > 1:
        loss = loss - cfg.reg * likeness(getattr(model, "module", model))   # Eq. 5; not of DDP
    return loss, {"loss": ce.detach()}

@torch.no_grad()
def answer(model, idx, n_new, n_loop):
    """The n_new symbols after the prompt idx (B, T, 1), always the most likely one. (B, n_new)"""
    caches = [KVCache(len(idx), model.cfg, idx.device) for _ in range(n_loop * len(model.blocks))]
    found, start = [], 0
    for _ in range(n_new):
        logits = model.forward(idx, n_loop, start, caches)[0]
        start += idx.size(1)
        idx = logits[:, -1:].argmax(-1, keepdim=True)                   # (B, 1, 1)
        found.append(idx.flatten(1))
    return torch.cat(found, dim=1)

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
    """Loss in nats, accuracy by level of difficulty and, named like the task, of the hardest third;
    reach is the highest level with accuracy 0.9. A sum is right if all decoded digits are."""
    parts = []
    for i in range(cfg.eval_batches):
        batch = run.to_device(make_batch(cfg, "val", i))
        idx, targets = batch["idx"], batch["targets"]
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            logits, spent = model.forward(idx, cfg.n_loop)      # not compiled: n_loop varies
        nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-1)
        hit = logits.argmax(-1) == targets                              # (B, T)
        if cfg.task == "add":
            digits = answer(model, idx[:, :-4], 4, cfg.n_loop)          # (B, 4)
            hit = (digits == targets[:, -5:-1]).all(1, keepdim=True).expand_as(hit)     # (B, T)
        parts.append([nll[targets >= 0], hit, batch["level"], spent])
    nll, hit, level, spent = (torch.cat(part).cpu().double() for part in zip(*parts))
    by_level = [hit[level == i].mean().nan_to_num().item() for i in range(int(level.max()) + 1)]
    return {"loss": nll.mean().item(), "accuracy": hit[level >= 0].mean().item(),
            "spent": spent.mean().item(), f"{cfg.task} levels": by_level,
            cfg.task: fmean(by_level[len(by_level) * 2 // 3 :]),
            f"{cfg.task} reach": max([i for i, a in enumerate(by_level) if a >= 0.9], default=-1)}

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
    k, L, results, once = cfg.n_layer, cfg.n_loop, {}, dict(n_loop=1)
    facts = dict(task="memory", seq_len=KEY, batch_size=4 * cfg.batch_size, lr=cfg.lr)
    # rates for deep: 1, 1/2, 1/4 and 0.15 of the others' were tried on seed 11, and 1/4 did best
    deep = once | dict(n_layer=k * L, lr=cfg.lr / 4)
    trio = {"shallow": once, "looped": {}, "deep": deep}                # Eq. 2
    arms = trio | {f"{k}x{n}": dict(n_loop=n) for n in (2, 3) if n < L}
    arms |= {f"memory {arm}": changes | facts for arm, changes in trio.items()}
    if cfg.full:
        arms |= {f"{a}x{b}": dict(n_layer=a, n_loop=b) for a, b in [(2, 1), (2, 3), (3, 1), (3, 2)]}
        arms |= {"alike": trio["deep"] | dict(reg=10.0), "act": dict(halting="act")}
    if cfg.smoke:   # every code path
        arms |= {"phop": dict(task="phop"), "add": dict(task="add", halting="act", inject="concat")}
    arms = {arm: scale(replace(cfg, **changes), 1) for arm, changes in arms.items()}
    for arm, c in select(arms, cfg, run).items():
        torch.manual_seed(cfg.seed)
        model = LoopedGPT(c).to(run.device)
        history = train(arm, model, c, run)
        results[arm] = m = dict(size=f"{c.n_layer}x{c.n_loop}", seconds=history[-1]["seconds"],
                                params=sum(p.numel() for p in model.parameters()), steps=c.steps,
                                mflops_per_token=loop_flops(model) / 1e6, history=history)
        m |= evaluate(model, replace(c, eval_batches=8 * c.eval_batches), run)
        m |= {"cosine": likeness(model).item()} if c.n_layer > 1 else {}
        reads = range(1, 2 * c.n_loop + 1)      # read out after fewer and more loops than trained
        m["by_loop"] = [evaluate(model, replace(c, n_loop=n), run)[c.task] for n in reads]
    return results

def percent_gap(arms, task, prefix=""):
    """How much of what depth gains looping gains, in percent."""
    shallow, looped, deep = (arms[prefix + arm][task] for arm in ("shallow", "looped", "deep"))
    return 100 * (looped - shallow) / (deep - shallow or 1e-9)          # Eq. 3

COLUMNS = "size params mflops_per_token spent seconds loss accuracy chain memory cosine".split()
CLAIMS = [  # name, measured from the arms, relation, needed; chain and memory name accuracies
    ("C1 looped, hardest third", lambda a: a["looped"]["chain"], ">=", 0.9),
    ("C1 deep - looped", lambda a: a["deep"]["chain"] - a["looped"]["chain"], "<=", 0.05),
    ("C1 looped - shallow", lambda a: a["looped"]["chain"] - a["shallow"]["chain"], ">=", 0.3),
    ("C1 shallow, hardest third", lambda a: a["shallow"]["chain"], "<=", 0.4),
    ("C1 shallow, hops 0 and 1", lambda a: fmean(a["shallow"]["chain levels"][:2]), ">=", 0.95),
    ("C2 %Gap of chain - of memory",
     lambda a: min(100, percent_gap(a, "chain")) - percent_gap(a, "memory", "memory "), ">=", 30),
    ("C3 least gain in hops by more loops", lambda a: min(b - a for a, b in pairwise(
        a[arm]["chain reach"] for arm in ("shallow", "1x2", "1x3", "looped"))), ">=", 0),
    ("C4 cosine, deep", lambda a: a["deep"]["cosine"], "<=", 0.2),
    ("C4 cosine, lambda = 10", lambda a: a["alike"]["cosine"], ">=", 0.95),
    ("C4 accuracy that lambda = 10 costs",
     lambda a: a["deep"]["accuracy"] - a["alike"]["accuracy"], "<=", 0.03),
]
STYLES = {  # the same colour for the same role in every script, and a second cue
    "shallow": dict(color="#e69f00", linestyle="-.", marker="^", linewidth=3),
    "1x2": dict(color="#56b4e9", linestyle=":", marker="v", linewidth=2),
    "1x3": dict(color="#009e73", linestyle=":", marker="D", linewidth=2),
    "looped": dict(color="#0072b2", linestyle="-", marker="o", linewidth=4),
    "deep": dict(color="#000000", linestyle="--", marker="s", linewidth=3),
}

@matplotlib.rc_context({"font.size": 15, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: accuracy by difficulty, by loops trained and used, and on both tasks."""
    arms, task, figure = results["arms"], cfg.task, Figure(figsize=(24, 8))
    (by_level, by_depth, bars), gaps = figure.subplots(1, 3), []
    for arm in [arm for arm in STYLES if arm in arms]:
        by_level.plot(arms[arm][f"{task} levels"], **STYLES[arm], label=arm)
    best = ", ".join(f"{a} {arms[a][f'{task} reach']}" for a in ("looped", "deep") if a in arms)
    by_level.set(xlabel="level (chain: hops)", ylabel="accuracy", title=f"Solved to level: {best}")
    for arm, others in [("looped", ["1x2", "1x3"]), ("deep", ["2x1", "3x1"])]:
        some = [arms[name] for name in ["shallow", *others, arm] if name in arms]
        D, A = [math.prod(map(int, m["size"].split("x"))) for m in some], [m[task] for m in some]
        by_depth.plot(D, A, **STYLES[arm], label=f"{arm}, trained with D")
        if arm == "looped" and arm in arms and len(set(D)) > 1:
            alpha, beta = np.polyfit(np.log(D), A, 1)                   # Eq. 9
            by_depth.plot(D, alpha * np.log(D) + beta, label=f"{alpha:.2f} ln D {beta:+.2f}")
            more, reads = cfg.n_layer * np.arange(1, 2 * cfg.n_loop + 1), arms[arm]["by_loop"]
            by_depth.plot(more, reads, "x-", color="#cc79a7", label="looped, read after D")
            by_depth.set_title(f"Looped to depth {D[-1]}: {A[-1]:.2f}, to depth {D[0]}: {A[0]:.2f}")
    by_depth.set(xlabel="effective depth D (layers passed)", ylabel="accuracy, hardest third")
    for panel in (by_level, by_depth):
        if task == "chain":
            panel.axhline(1 / CHAINS, color="#999999", linestyle="--", label="one of 4 guessed")
        panel.legend()
    for name, prefix in {task: "", "memory": "" if task == "memory" else "memory "}.items():
        trio = [arm for arm in ("shallow", "looped", "deep") if prefix + arm in arms]
        for arm in trio:
            bar = bars.bar(f"{arm}\n{name}", arms[prefix + arm][name], color=STYLES[arm]["color"])
            bars.bar_label(bar, fmt="%.2f")
        gaps += [f"{arms[prefix + arm][name]:.2f} in {name}" for arm in trio if arm == "looped"]
    bars.set(ylabel="accuracy (chain: hardest third)", title="Looped: " + ", ".join(gaps))
    figure.supxlabel(f"{NAME}.py, seed {cfg.seed}, {results['environment']['device']}", fontsize=12)
    run.write(f"{NAME}.png", lambda file: figure.savefig(file, dpi=80))

# ---- 9. main -------------------------------------------------------------------------------------
def main(argv=None):
    """Runs what the command line says; returns what results.json holds."""
    with session(argv) as (cfg, run):
        results = report(cfg, run, experiment(cfg, run), COLUMNS, CLAIMS)
        plot(cfg, run, results)
        return results

if __name__ == "__main__":
    main()
