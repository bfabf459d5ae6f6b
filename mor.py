"""Mixture-of-Recursions: one block, passed again by those tokens only that a router sends on.

Bae et al., arXiv 2507.10524. Run: python mor.py (five minutes on two CPU cores).

A block is passed R times. Before each pass a router picks the k best of those that took the pass
before, and attention sees only them, so that FLOPs and cache shrink along with the parameters.

(1)  layer l is block u(l): cycle l mod b | sequence l div R; middle_*: with own first and last
(2)  z_t = w_r . h_t / sqrt(C)                      score of token t in front of pass r
(3)  A_r = the k_r of A_{r-1} with the largest z, in order;  k_r = T (R-r+1) / R;  warm-up: all
(4)  y = Block(h[A_r]), at the tokens' positions; kv="share": keys and values of pass 1, of all
(5)  h_t <- h_t + g (y_t - h_t) for t in A_r;  paper: h_t + 0.1 g y_t;  g = sigmoid(z_t) (none: 1)
(6)  CE + sum_r mean over A_{r-1} of lambda BCE(z_t, t in A_r) + lambda_z z_t^2;  lambda: 0.05 (in
     the warm-up 0);  aux="router": 1, with q_t = v_r . stopgrad(h_t) / sqrt(C) for z_t
(7)  at inference t takes pass r if it took r - 1 and z_t > 0 (or q_t > 0); all take pass 1
(8)  FLOPs of T tokens = sum_r b (24 k_r C^2 + 4 k_r^2 C) + own layers + T (routers + head)
(9)  token choice: p = softmax(W h_t) before pass 1, depth i = argmax p, h_t + p_i Block^i(h_t);
     CE + 0.1 R sum_i (share of tokens of depth i) mean p_i;  as their code; their text: p each pass
r pass of R `n_loop` (KVCache: R rows) | t token | b shared blocks | h `x`, in (9) `h` | p `z`
w, v `router` `decider` | A_r `A` `keep`, A_0 all | lambda `aux_weight` | lambda_z `z_weight`
T `seq_len` | C `n_embd` | nh heads of size hs | g gate, g_j operand | B, N rows | V symbols

What it shows (rule 7, seeds 1-3). Filler holds folds g1 .. g5 in the group S3: 15 symbols, as many
as pass 3. Asked at g_j: the product so far; hard: j = 5 (accuracy or nats). recursive: all take R
passes; single: 1; uniform: 2, for 1.2 of the steps (mor's FLOPs); random: noise picks. These two
have mor's gate: C2, C3 test the choice alone. C1: a routed step, untrained, 32 rows, 8 C wide (with
8 rows at C no time is saved; decoding saves it at 16 C). C4: operands in pass 3 (by chance 0.33).
  C0 hard: recursive - single         0.639 +- 0.109  needed >= 0.15, holds on 3 of 3
  C1 step time: mor / recursive, wide 0.675 +- 0.007  needed <= 0.92, holds on 3 of 3
  C1 saved time / saved FLOPs, wide   0.969 +- 0.021  needed >= 0.8, holds on 3 of 3
  C2 hard, nats: random - mor         1.314 +- 0.116  needed >= 0.1, holds on 3 of 3
  C3 hard, nats: uniform - mor        0.421 +- 0.077  needed >= 0.05, holds on 3 of 3
  C3 share of C0 that mor reaches     1.122 +- 0.236  needed >= 0.7, holds on 3 of 3
  C4 operands in the last pass        0.851 +- 0.072  needed >= 0.7, holds on 3 of 3
  C4 causal and top-k agree           0.992 +- 0.006  needed >= 0.95, holds on 3 of 3
  C4 |causal - top-k|                 0.010 +- 0.012  needed <= 0.02, holds on 2 of 3

What the paper leaves open. Its code (raymin0223/mixture_of_recursions) evaluates by top-k and so
sees the future; (7) is our reading. Ours: 1 / sqrt(C), 0.05 for 0.001, the warm-up, clipping apart,
delta (the paper's (5) adds what is new ten times weaker). Left out: loss-free balance, tasks chase
and text; token choice runs all tokens (FLOPs: as if balanced). The paper's rival: vanilla (--full).
Exercises: 1. --capacity_warmup 0 --only mor --out out/cold: whom does a router send on that never
saw what a pass is for? 2. --full --resume: paper gate, shared kv, middle: what does each change?
New here: ALPHABET, MOST, S3, PRODUCT, fold_rows, MoR, decode_all, METRICS, timings, ARMS, ABLATIONS
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import itertools
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
    n_loop: int = 3                 # passes through the same blocks
    n_head: int = 1                 # attention heads
    n_embd: int = 64                # width of the residual stream
    seq_len: int = 45               # tokens in a training sequence
    sharing: Literal["cycle", "sequence", "middle_cycle", "middle_sequence"] = "cycle"  # see Eq. 1
    # method
    router: Literal["expert", "token", "random", "gate", "none"] = "expert"  # who goes; gate: all
    update: Literal["delta", "paper"] = "delta"     # what the gate scales, Eq. 5; not for token
    kv: Literal["cache", "share"] = "cache"     # share: all passes use the first's keys and values
    aux: Literal["loss", "router", "none"] = "loss"     # how expert learns its choice at inference
    aux_weight: float = 0.05        # weight of the auxiliary loss (aux router: always 1)
    z_weight: float = 0.0           # weight of the z-loss, router expert only
    capacity_warmup: float = 0.4    # share of steps in which all take all passes; not for token
    n_fold: int = 3                 # folds (five operands in a row) in a sequence
    # training
    steps: int = 5400               # optimiser steps; scaled where arms must cost the same
    batch_size: int = 8             # sequences in a step, over all processes
    lr: float = 3e-3                # peak learning rate
    warmup: int = 400               # steps until the learning rate peaks
    weight_decay: float = 0.1       # AdamW's decoupled weight decay
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 400           # steps between rows of log.csv, each with a checkpoint
    eval_batches: int = 16          # validation batches for such a row; 8 times more at the end
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
    warm = property(lambda self: self.capacity_warmup * (self.router != "token"))   # what is used

    def __post_init__(self):
        check_common(self)
        at_least(self, 1, "n_loop n_fold")
        at_least(self, 3 if self.sharing.startswith("middle") else 1, "n_layer")
        at_least(self, 0, "aux_weight z_weight capacity_warmup")
        if self.capacity_warmup >= 1:
            raise ValueError(f"capacity_warmup={self.capacity_warmup} must be below 1")
        if self.seq_len % self.n_fold or self.seq_len // self.n_fold <= MOST:
            raise ValueError(f"seq_len={self.seq_len} must be n_fold={self.n_fold} times 6, 7, ...")

SMOKE = dict(n_layer=3, n_head=2, n_embd=16, seq_len=30, batch_size=4, steps=6, warmup=2,
             lr=1e-3, eval_every=3, eval_batches=1)

# ---- 2. Task -------------------------------------------------------------------------------------
ALPHABET, MOST = "abcdef012345678", 5       # elements of S3, then filler; operands of a fold
S3 = list(itertools.permutations(range(3)))
PRODUCT = torch.tensor([[S3.index(tuple(g[i] for i in h)) for h in S3] for g in S3])    # g h

def fold_rows(cfg, rng):
    """Filler that counts (99 %), folds g1 .. g5: symbols, product so far, j or 0 outside. (B, T)"""
    B, n, w = cfg.batch_size, cfg.n_fold, cfg.seq_len // cfg.n_fold     # a fold in every w symbols
    g, count = (torch.randint(m, (B, n, w), generator=rng) for m in (len(S3), 900))     # (B, n, w)
    start = 1 + torch.randint(w - MOST, (B, n, 1), generator=rng)       # (B, n, 1)
    j, product = torch.arange(w) - start + 1, g                         # (B, n, w) g_j is here
    for i in range(2, MOST + 1):
        product = torch.where(j == i, PRODUCT[product.roll(1, 2), g], product)
    inside = (1 <= j) & (j <= MOST)                                     # (B, n, w)
    steps = torch.where(count < 9, count, 1) * ~inside                  # (B, n, w)
    x = len(S3) + steps.flatten(1).cumsum(1).view(B, n, w) % 9          # (B, n, w)
    return [v.flatten(1) for v in (torch.where(inside, g, x), product, j * inside)]

def make_batch(cfg, split, step):
    """Batch number `step` of a split, a function of its arguments alone; validation is the same for
    all seeds. The warm-up's have no `noise` (which ranks for random): then all take all passes."""
    train = split == "train"
    rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step if train else -1 - step)
    idx, product, level = fold_rows(cfg, rng)                           # (B, T)
    after = F.pad(idx.masked_fill(level > 0, -100)[:, 1:], (0, 1), value=-100)  # (B, T) no operand
    noise = torch.randn(cfg.n_loop, *idx.shape, generator=rng).transpose(0, 1)  # (B, R, T)
    batch = {"idx": idx, "targets": torch.where(level > 0, product, after), "level": level}
    return batch if train and step < cfg.capacity_warmup * cfg.steps else batch | {"noise": noise}

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
class MoR(nn.Module):
    """R passes for fewer and fewer tokens: in training the top k, else each decides for itself."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C, R, cycle = cfg, cfg.n_embd, cfg.n_loop, cfg.sharing.endswith("cycle")
        ends = int(cfg.sharing.startswith("middle"))    # the outermost layers are not shared
        b = cfg.n_layer - 2 * ends
        u = [ends + (l % b if cycle else l // R) for l in range(b * R)]         # Eq. 1
        self.stages = [[0] * ends, *(u[r * b : (r + 1) * b] for r in range(R)),
                       [cfg.n_layer - 1] * ends]        # the blocks in front, in every pass, behind
        all_go = cfg.router in ("gate", "none")
        self.share = [1, *(1 if all_go else (R - r) / R for r in range(R)), 1]  # Eq. 3
        self.embed = nn.Embedding(len(ALPHABET), C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = nn.Linear(C, len(ALPHABET), bias=False)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("rope", rope_table(cfg.seq_len, C // cfg.n_head), persistent=False)
        if cfg.router != "none":
            self.router = nn.Linear(C, R, bias=False)       # row r - 1 is the router of pass r
        if cfg.router == "expert" and cfg.aux == "router":
            self.decider = nn.Linear(C, R, bias=False)

    def parts(self):
        return [[p] for p in self.parameters()]     # each alone: no router disturbs the rest

    def scores(self, r, x, h):
        """Scores z of pass r, which rank the tokens, and q: a token may go on if q > 0. (B, T)"""
        if self.cfg.router == "none":
            return x.new_zeros(2, *x.shape[:2])
        with torch.autocast(x.device.type, enabled=False):
            if self.cfg.router == "token":
                p = (h.float() @ self.router.weight.T).softmax(-1)      # (B, T, R)  Eq. 9
                return p[..., r - 1], p.argmax(-1) + 1.5 - r            # (B, T)
            x = x.float() / math.sqrt(x.size(-1))                       # (B, T, C)  in Eq. 2 and 6
            z = x @ self.router.weight[r - 1]                           # (B, T)  Eq. 2
            return z, x.detach() @ self.decider.weight[r - 1] if hasattr(self, "decider") else z

    def visit(self, s, x, start, caches, first, keep=None, k=None):
        """Stage s on x (B, T, C): all tokens, or k of a row, those to keep and then others, whose
        result has no meaning. `first` has the keys and values of the first pass."""
        (B, T, C), t = x.shape, torch.arange(start + x.size(1), device=x.device)
        rows, new = torch.arange(B, device=x.device), T                 # (B,)
        h, at, rope = x, t[None, start:], self.rope[start : start + T]  # (B, T, C), (1, T)
        shared = self.cfg.kv == "share" and 1 < s <= self.cfg.n_loop
        if caches and keep is not None:             # others are left out, and rows without any
            rows = keep.any(1).nonzero().squeeze(1)                     # (N,)
            if len(rows) == 0:
                return x
            new = keep[rows].sum(1)                                     # (N,)
            k, keep = new.max(), None if keep.all() else keep           # all: nothing to gather
        if keep is not None:        # in front, in order: causal attention hides what comes behind
            A = (~keep[rows]).sort(dim=1, stable=True).indices[:, :k]   # (N, k)
            place, at = (rows[:, None] * T + A).flatten(), start + A    # (N * k,), (N, k)
            h = x.flatten(0, 1).index_select(0, place).view(*A.shape, C)  # (N, k, C)
            rope = self.rope[at][:, None]                               # (N, 1, k, 2 * hs)

        def memory(k, v, j):
            if shared:
                return *(past[rows] for past in first[j]), at[:, None, :, None] >= t
            k, v, mask = caches[s][j].extend(k, v, rows, new) if caches else (k, v, None)
            first[j] = k, v
            return k, v, mask

        for j, i in enumerate(self.stages[s]):
            h = self.blocks[i](h, rope, functools.partial(memory, j=j))     # (N, k, C)  Eq. 4
        if keep is None:
            return h
        return x.flatten(0, 1).index_copy(0, place, h.flatten(0, 1)).view_as(x)     # (B, T, C)

    def forward(self, idx, noise=None, start=0, caches=None):
        """idx (B, T) -> logits (B, T, V), and z, q and keep of all passes, each (R, B, T). With
        `caches`, a KVCache for every layer of every stage, idx continues `start` tokens."""
        (B, T), trace, run = idx.shape, [], (start, caches, {})
        keep = torch.ones(B, T, dtype=torch.bool, device=idx.device)    # (B, T)
        x = h = self.visit(0, norm(self.embed(idx)), *run)              # (B, T, C)
        ranked = self.training and self.cfg.router == "expert" or self.cfg.router == "random"
        for r in range(1, self.cfg.n_loop + 1):
            z, q = self.scores(r, x, h)
            share, k = 1 if ranked and noise is None else self.share[r], T  # no noise: warm-up
            if share < 1 and ranked:
                k = max(1, int(share * T + 1e-6))
                rank = noise[:, r - 1] if self.cfg.router == "random" else z        # (B, T)
                best = rank.masked_fill(~keep, -math.inf).topk(k).indices           # (B, k)
                keep = torch.zeros_like(keep).scatter(1, best, True)    # (B, T)  Eq. 3
            elif share < 1:
                keep = keep & (q > 0)                                   # (B, T)  Eq. 7
            y = self.visit(r, x, *run, keep if share < 1 else None, k)  # (B, T, C)
            if self.cfg.router in ("expert", "random", "gate"):
                paper, g = self.cfg.update == "paper", z.sigmoid()[..., None]       # (B, T, 1)
                y = x + (0.1 * g * y if paper else g * (y - x))         # (B, T, C)  Eq. 5
            elif self.cfg.router == "token":        # in its last pass, a token's q is 0.5
                y = torch.where(q[..., None] < 1, h + z[..., None] * y, y)  # (B, T, C)  Eq. 9
            x = torch.where(keep[..., None], y, x) if share < 1 else y  # (B, T, C)
            trace.append((z, q, keep))
        x = self.visit(self.cfg.n_loop + 1, x, *run)                    # (B, T, C)
        return self.head(norm(x)).float(), *map(torch.stack, zip(*trace))

    def flops(self, routed=True):
        """Forward FLOPs per token; not routed: all take all passes; share: queries meet T keys."""
        T, C, shared, total = self.cfg.seq_len, self.cfg.n_embd, self.cfg.kv == "share", 0
        for layers, share in zip(self.stages, self.share):
            k = int(share * T + 1e-6) if routed else T      # 1e-6: share is rounded, k is not
            total += len(layers) * (block_flops(k, C) + 4 * k * (T - k) * C * shared)
        rows = [m.out_features for m in self.children() if isinstance(m, nn.Linear)]    # V, R, R
        return total / T + 2 * C * sum(rows)                            # Eq. 8

# ---- 5. Objective and decoding -------------------------------------------------------------------
def loss_fn(model, batch, cfg):
    """Cross-entropy in nats per target, plus what trains the routers: loss, stats."""
    logits, z, q, keep = model(batch["idx"], noise := batch.get("noise"))
    nll = F.cross_entropy(logits.mT, batch["targets"], reduction="none")            # (B, T)
    loss = (nll.sum(1) / (batch["targets"] >= 0).sum(1)).mean()
    stats = {"loss": loss.detach()}
    if cfg.router == "expert":
        candidates = torch.cat([torch.ones_like(keep[:1]), keep[:-1]])  # (R, B, T)
        bce = F.binary_cross_entropy_with_logits(q, keep.float(), reduction="none")     # (R, B, T)
        bce, square = ((v * candidates).sum((1, 2)) / candidates.sum((1, 2)) for v in (bce, z * z))
        weight = {"loss": cfg.aux_weight * (noise is not None), "router": 1.0, "none": 0.0}
        loss = loss + weight[cfg.aux] * bce.sum() + cfg.z_weight * square.sum()  # Eq. 6
    elif cfg.router == "token":
        load = cfg.n_loop * F.one_hot(z.argmax(0), cfg.n_loop).float().mean((0, 1))     # (R,)
        loss = loss + 0.1 * (load * z.mean((1, 2))).sum()               # Eq. 9
    return loss, stats

@torch.no_grad()
def decode_all(model, idx):
    """Logits (B, T, V) of idx (B, T), symbol by symbol; who stays behind costs no more passes."""
    caches = [[KVCache(len(idx), model.cfg, idx.device) for _ in s] for s in model.stages]
    step = functools.partial(model.eval().forward, caches=caches)       # not compiled: shapes vary
    return torch.cat([step(idx[:, t : t + 1], start=t)[0] for t in range(idx.size(1))], dim=1)

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
METRICS = {     # causal rule (_topk: training's); loss (in log.csv val_loss) is of operands alone
    "loss": lambda e: e.nll[e.level > 0], "loss_topk": lambda e: e.nll_topk[e.level > 0],
    "hard": lambda e: e.nll[e.level == MOST], "hard_topk": lambda e: e.nll_topk[e.level == MOST],
    "depth": lambda e: e.keep.sum(0), "needed": lambda e: e.level[e.keep[-1]] > 0,
    "agreement": lambda e: (e.keep == e.label)[1:][e.label[:-1] & (e.targets >= 0)],   # candidates
} | {f"k{k}": lambda e, k=k: e.hit[e.level == k] for k in range(1, MOST + 1)}

@torch.no_grad()
def evaluate(model, cfg, run):
    """METRICS, a sample. The warm-up does not train the causal rule: val_loss is high there."""
    parts = []
    for i in range(cfg.eval_batches):
        batch = run.to_device(make_batch(cfg, "val", i))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            topk, *_, label = model.train()(batch["idx"], batch["noise"])     # no dropout: the
            logits, *_, keep = model.eval()(batch["idx"], batch["noise"])       # mode is the rule
        nll = functools.partial(F.cross_entropy, target=batch["targets"], reduction="none")
        parts.append(batch | dict(nll=nll(logits.mT), nll_topk=nll(topk.mT), label=label, keep=keep,
                                  hit=logits.argmax(-1) == batch["targets"]))
    e = argparse.Namespace(**{name: torch.cat([part[name] for part in parts], dim=-2).cpu()
                              for name in parts[0]})
    means = {k: v.double().mean().item() for k, f in METRICS.items() if len(v := f(e))}
    return means | {"sample": e.idx[0].tolist(), "passes": e.keep.sum(0)[0].tolist()}

def timings(model, cfg, run, routed):
    """ms per decoding step of 32 rows and of 1; if `routed`, what fresh models take over unrouted
    ones, time and FLOPs: in a training step at 8 C (wide, at most 512), to decode a row at 16 C."""
    found, cfg = {}, replace(cfg, batch_size=32)
    batch = run.to_device(make_batch(cfg, "train", cfg.steps))

    def step(model):        # both end in a number, which waits for a GPU
        F.cross_entropy(model(batch["idx"], batch["noise"])[0].mT, batch["targets"]).backward()
        return model.head.weight.grad.sum().item()

    def decode(model, rows=1):
        return decode_all(model, batch["idx"][:rows]).sum().item()

    for rows in (32, 1) if cfg.router != "random" else ():
        seconds = timeit.repeat(lambda: decode(model, rows), number=1, repeat=3)
        found[f"decode_ms_b{rows}"] = 1e3 * min(seconds) / cfg.seq_len
    for name, factor, job in [("_wide", 8, step), ("_decode", 16, decode)] if routed else ():
        torch.manual_seed(cfg.seed)
        wide = cfg.n_embd * max(1, min(factor, 64 * factor // cfg.n_embd))
        a, b = models = [MoR(replace(cfg, n_embd=wide, router=r)).to(run.device)
                         for r in (cfg.router, "none")]
        turns = [[timeit.timeit(lambda: job(m), number=1) for m in models] for _ in range(9)]
        routed_s, unrouted_s = map(min, zip(*turns))
        passes = a.eval()(batch["idx"][:1])[3].float().mean().item()    # share of R T
        found["ms_ratio" + name] = routed_s / unrouted_s
        found["flop_ratio" + name] = passes if job == decode else a.flops() / b.flops()
    return found

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

ARMS = {"recursive": lambda c: dict(router="none"),       # the method switched off
        "uniform": lambda c: dict(router="gate", n_loop=(n := (c.n_loop + 1) // 2), steps=round(
            c.steps / n * (c.warm * c.n_loop + (1 - c.warm) * sum(MoR(c).share[1:-1])))),   # mor's
        "single": lambda c: dict(router="none", n_loop=1),
        "mor": lambda c: {}, "random": lambda c: dict(router="random")}
ABLATIONS = {"vanilla": lambda c: dict(router="none", n_loop=1,
                                       n_layer=sum(map(len, MoR(c).stages))),
             "middle": lambda c: dict(sharing="middle_cycle", n_layer=c.n_layer + 2),
             "paper gate": lambda c: dict(update="paper"), "no aux": lambda c: dict(aux="none"),
             "token choice": lambda c: dict(router="token"), "gated": lambda c: dict(router="gate"),
             "shared kv": lambda c: dict(kv="share"), "aux router": lambda c: dict(aux="router")}

def experiment(cfg, run):
    """Trains and evaluates every arm. Returns {arm: metrics}."""
    arms, results = ARMS | (ABLATIONS if cfg.full else {}), {}
    arms = {arm: scale(replace(cfg, **changes(cfg)), 1) for arm, changes in arms.items()}
    for arm, c in select(arms, cfg, run).items():
        torch.manual_seed(cfg.seed)
        model = MoR(c).to(run.device)
        history = train(arm, model, c, run)
        flops = c.warm * model.flops(routed=False) + (1 - c.warm) * model.flops()
        results[arm] = dict(params=sum(p.numel() for p in model.parameters()), steps=c.steps,
                            mflops_per_token=model.flops() / 1e6, seconds=history[-1]["seconds"],
                            train_tflop=3e-12 * flops * c.steps * c.batch_size * c.seq_len,
                            **evaluate(model, replace(c, eval_batches=8 * c.eval_batches), run),
                            **timings(model, c, run, arm == "mor"), history=history)
    return results

COLUMNS = """params mflops_per_token train_tflop seconds loss loss_topk hard hard_topk k5 depth
             needed agreement decode_ms_b1 decode_ms_b32 ms_ratio_wide flop_ratio_wide
             ms_ratio_decode flop_ratio_decode""".split()
CLAIMS = [  # name, measured from the arms, relation, needed; hard and k5: at j = MOST
    ("C0 hard: recursive - single", lambda a: a["recursive"]["k5"] - a["single"]["k5"], ">=", 0.15),
    ("C1 step time: mor / recursive, wide", lambda a: a["mor"]["ms_ratio_wide"], "<=", 0.92),
    ("C1 saved time / saved FLOPs, wide", lambda a: (1 - a["mor"]["ms_ratio_wide"])
     / d if (d := 1 - a["mor"]["flop_ratio_wide"]) > 0 else None, ">=", 0.8),   # None: not judged
    ("C2 hard, nats: random - mor", lambda a: a["random"]["hard"] - a["mor"]["hard"], ">=", 0.1),
    ("C3 hard, nats: uniform - mor", lambda a: a["uniform"]["hard"] - a["mor"]["hard"], ">=", 0.05),
    ("C3 share of C0 that mor reaches", lambda a: (a["mor"]["k5"] - a["single"]["k5"])
     / d if (d := a["recursive"]["k5"] - a["single"]["k5"]) > 0 else None, ">=", 0.7),
    ("C4 operands in the last pass", lambda a: a["mor"]["needed"], ">=", 0.7),
    ("C4 causal and top-k agree", lambda a: a["mor"]["agreement"], ">=", 0.95),
    ("C4 |causal - top-k|", lambda a: abs(a["mor"]["loss"] - a["mor"]["loss_topk"]), "<=", 0.02),
]
STYLES = {  # the same colour for the same role in every script, and a second cue
    "mor": dict(color="#0072b2", linestyle="-", marker="o", linewidth=4),
    "recursive": dict(color="#000000", linestyle="--", marker="s", linewidth=2.5),
    "uniform": dict(color="#009e73", linestyle="-", marker="D", linewidth=2),
    "single": dict(color="#e69f00", linestyle="-.", marker="^", linewidth=2.5),
    "random": dict(color="#d55e00", linestyle=":", marker="v", linewidth=3),
}

@matplotlib.rc_context({"font.size": 15, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: who folds how many operands, and which symbols go deep."""
    figure, js, shown = Figure(figsize=(20, 8)), range(1, MOST + 1), results["arms"]
    folds, depth = figure.subplots(1, 2, width_ratios=[1, 1.4])
    for arm, m in [(arm, shown[arm]) for arm in STYLES if arm in shown]:
        name = f"{arm}: {m['train_tflop']:.1f} TFLOP"
        folds.plot(js, [m[f"k{j}"] for j in js], label=name, **STYLES[arm])
    folds.axhline(1 / len(S3), color="#999999", linestyle="--", label="guessing")
    folds.legend(title="training")
    folds.set(xlabel="place in the fold", ylabel="accuracy of the product so far", xticks=js,
              title=", ".join(f"{arm} {shown[arm]['k5']:.0%}" for arm in ("mor", "uniform")
                              if arm in shown) + " right after five operands")
    if "mor" in shown:
        m, r = shown["mor"], torch.arange(cfg.n_loop)                   # (R,)
        grid = torch.tensor(m["passes"])[:48] > r[:, None]              # (R, n)
        depth.imshow(0.2 + 0.8 * grid.numpy(), cmap="Blues", aspect="auto", vmin=0, vmax=1.1)
        depth.set_xticks(range(grid.size(1)), [ALPHABET[i] for i in m["sample"][:48]])
        depth.set(xlabel="letters are operands; dark: takes the pass", ylabel="pass", yticks=r,
                  yticklabels=(r + 1).tolist(),
                  title=f"Last pass: {m.get('needed', 0):.0%} operands")
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
