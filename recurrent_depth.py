"""Recurrent depth: a small core, applied a random number of times, thinks as long as one likes.

Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", arXiv 2502.05171.
Run: python recurrent_depth.py (four minutes on two CPU cores).

A prelude reads the tokens once; a core works on a random state again and again and reads what the
prelude said every time; a coda answers. In training the number of iterations r is random and the
gradient flows through the last k alone; in tests r is free: more thought with the same weights.

(1)  e = prelude(sqrt(C) E[x])                              embedding E
(2)  s_0 ~ N(0, 2/5) at every position and channel          cut at three standard deviations
(3)  s_i = core(A [s_{i-1}; e]),  i = 1 .. r                adapter A
(4)  logits = E norm(coda(norm(s_r)))                       E as in (1)
(5)  u = norm(x + Attn(norm(x))),  norm(u + MLP(norm(u)))   a sandwich layer
(6)  std sqrt(2 / 5C), of output projections sqrt(1 / 5Cl)  l: blocks passed with rbar + 1
(7)  tau ~ N(log rbar - 1/8, 1/4),  r ~ Poisson(e^tau) + 1  for all sequences; at most 4 rbar
(8)  loss = mean of -log softmax(logits_j)[x_1 x_2 .. x_j]  its gradient ends at s_{r-k}
(9)  accuracy <= (R + (n - R) / G) / n, R seen              R = min(n, 1 + window * blocks passed)
(10) exit when no position has KL(p before || p now) >= threshold; before: check_every steps ago
(11) token by token (decode_r4: r = 4, n = 48), iteration i writes and reads KV slot i mod kv_slots
(12) forward FLOPs per token = blocks passed (24 C^2 + 4 T C) + r 4 C^2 + 2 C V (head)
x `idx` | blocks passed in r iterations `depth(r)` | n = T - 1 elements of G, V = G + 1 | C `n_embd`

What it shows. Parity of the bits so far. 25600 draws meet nearly all 4096 strings with n = 12: only
n = 24 and 48 show generalisation. (9) alone forces accuracy at r=1, at r=8 and of untied layers.
  C0 standard errors above a ceiling  0.000 +- 0.000  needed <= 3, holds on 3 of 3
  C1 n=12, r=1: accuracy              0.656 +- 0.017  needed <= 0.71, holds on 3 of 3
  C1 n=12, r=16: accuracy             1.000 +- 0.000  needed >= 0.98, holds on 3 of 3
  C1 n=12, r=1: all right             0.000 +- 0.000  needed <= 0.02, holds on 3 of 3
  C1 n=12, r=16: all right            1.000 +- 0.000  needed >= 0.9, holds on 3 of 3
  C2 n=48, r=8: accuracy              0.676 +- 0.010  needed <= 0.71, holds on 3 of 3
  C2 n=48, r=48: accuracy             1.000 +- 0.000  needed >= 0.95, holds on 3 of 3
  C2 n=48: r=48 less r=64             0.000 +- 0.000  needed <= 0.02, holds on 3 of 3
  C2 n=48: 20 untied layers           0.609 +- 0.009  needed <= 0.73, holds on 3 of 3
  C3 r for 95 %: off a line in n      0.081 +- 0.073  needed <= 0.25, holds on 3 of 3
  C4 exit: |steps per element - 0.75| 0.231 +- 0.064  needed <= 0.35, holds on 3 of 3
  C4 exit: accuracy lost              0.000 +- 0.000  needed <= 0.01, holds on 3 of 3
  C4 seconds saved / promised         0.839 +- 0.030  needed >= 0.8, holds on 3 of 3
  C5 two s_0: same answers            1.000 +- 0.000  needed >= 0.995, holds on 3 of 3
  C5 two s_0: distance                0.000 +- 0.000  needed <= 0.05, holds on 3 of 3
  C6 fixed less random r              0.000 +- 0.000  needed >= -0.02, holds on 3 of 3
  C6 what the window adds             0.321 +- 0.056  needed >= 0.1, holds on 3 of 3
C6, n=48, r=64: drawing r is not what it takes; no window 0.62-0.73, no injection 0.56-0.99.
What the paper leaves open. A norm ends its core; its code (seal-rg/recurrent-pretraining) has (4).
Its 1/2 in (7) is sigma, so 1/4 here. Ours: rbar + 1, 4 rbar, the kit. Left out: text, speculation.
Exercises: 1. --eval_only --kv_slots 4: why less in decode_r4? 2. --window 2 --out out/window: half
the iterations? 3. --task s3 --out out/s3: what changes in (9), and can 400 steps still reach it?
New here: ORDERS, GROUPS, ceiling, SandwichBlock, RecurrentDepth, recurrent_flops, draw_depth,
think, decode_tokens, LONGER, R_TEST, longer, right, scaling, exits, kept_bytes, orbits, at, bend, N
"""

import argparse
import contextlib
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
    n_layer: int = 4                # transformer blocks
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # width of the residual stream
    seq_len: int = 13               # tokens in a training sequence
    window: int = 1                 # neighbours seen on a side in every layer (0: all tokens)
    # method
    rbar: int = 8                   # mean of the Poisson rate; training runs rbar + 1 on average
    unroll: Literal["random", "fixed"] = "random"           # r is drawn, or is always rbar + 1
    k: int = 4                      # last iterations with a gradient (all of them if inject=none)
    inject: Literal["concat", "add", "none"] = "concat"     # how e enters every iteration
    task: Literal["parity", "s3"] = "parity"                # what the model has to learn
    threshold: float = 5e-4         # exit: no position's prediction moves by more (KL in nats)
    check_every: int = 4            # exit: iterations between two looks at the predictions
    kv_slots: int = 1               # decoding: KV budget, slots for each layer of the core
    # training
    steps: int = 400                # optimiser steps; scaled where arms must cost the same
    batch_size: int = 64            # sequences in a step, over all processes
    lr: float = 1e-3                # peak learning rate
    warmup: int = 50                # steps until the learning rate peaks
    weight_decay: float = 0.01      # AdamW's decoupled weight decay
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 50            # steps between rows of log.csv, each with a checkpoint
    eval_batches: int = 1           # validation batches for such a row; 8 times more at the end
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

    inference = "threshold", "check_every", "kv_slots"      # a checkpoint may differ in these

    def __post_init__(self):
        check_common(self)
        at_least(self, 0, "window threshold rbar")
        at_least(self, 1, "k check_every kv_slots seed" + " rbar" * (self.unroll == "random"))
        at_least(self, 3, "n_layer seq_len")

    def depth(self, r):
        """Blocks that a token passes: one of the prelude, r times the core, one of the coda."""
        return 2 + r * (self.n_layer - 2)

SMOKE = dict(n_head=2, n_embd=16, seq_len=5, batch_size=12, steps=4, warmup=2, rbar=3, eval_every=2)

# ---- 2. Task -------------------------------------------------------------------------------------
ORDERS = list(itertools.permutations(range(3)))
GROUPS = {"parity": [[0, 1], [1, 0]],       # row a, column b: the product a b
          "s3": [[ORDERS.index(tuple(a[i] for i in b)) for b in ORDERS] for a in ORDERS]}

def make_batch(cfg, split, step):
    """Elements behind a start token, running products, s_0: a function of the arguments alone.
    Validation: sets that differ in x_1 alone; who does not see it is right in 1 of G, exactly."""
    rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step if split == "train" else step)
    group, std = torch.tensor(GROUPS[cfg.task]), math.sqrt(2 / 5)       # (G, G)
    T, G, copies = cfg.seq_len, len(group), len(group) ** (split != "train")
    n = max(1, cfg.batch_size // copies)
    x = torch.randint(G, (n, T), generator=rng).repeat_interleave(copies, 0)        # (B, T)
    s0 = torch.empty(n, T, cfg.n_embd)                                  # (n, T, C)
    nn.init.trunc_normal_(s0, 0, std, -3 * std, 3 * std, generator=rng)             # Eq. 2
    x[:, 1] = x[:, 1] if copies == 1 else torch.arange(G).repeat(n)
    x[:, 0] = 0                                                         # the neutral element
    targets = torch.stack([*itertools.accumulate(x.unbind(1), lambda a, b: group[a, b])], 1)
    x[:, 0] = G                                                         # is read as a start token
    return {"idx": x, "targets": targets, "s0": s0.repeat_interleave(copies, 0)}

def ceiling(cfg, r):
    """Best expected accuracy: whoever does not see all elements up to his own has to guess."""
    n, G = cfg.seq_len - 1, len(GROUPS[cfg.task])
    R = min(n, 1 + cfg.window * cfg.depth(r)) if cfg.window else n
    return (R + (n - R) / G) / n                                        # Eq. 9

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

def block_flops(T, C):
    """Forward FLOPs of a Block on T tokens of width C; multiply-adds are two, attention is full."""
    return 24 * T * C**2 + 4 * T**2 * C

# ---- 4. Method -----------------------------------------------------------------------------------
class SandwichBlock(nn.Module):
    """A transformer layer that normalises its residual sums, too."""
    def __init__(self, cfg):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(cfg), MLP(cfg)

    def forward(self, x, rope, memory):
        u = norm(x + self.attn(norm(x), rope, memory))                  # (B, T, C)
        return norm(u + self.mlp(norm(u)))                              # Eq. 5

class RecurrentDepth(nn.Module):
    """Prelude, a core applied r times, coda. A plain transformer if r = 1 and A reads e alone."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C, T = cfg, cfg.n_embd, longer(cfg)[-1].seq_len
        self.embed = nn.Embedding(len(GROUPS[cfg.task]) + 1, C)
        self.prelude, self.core, self.coda = (nn.ModuleList(SandwichBlock(cfg) for _ in range(n))
                                              for n in (1, cfg.n_layer - 2, 1))
        if cfg.inject == "concat":
            self.adapter = nn.Linear(2 * C, C, bias=False)
        away = torch.arange(T)[:, None] - torch.arange(T)               # (T, T)
        self.register_buffer("near", (away >= 0) & (away <= (cfg.window or T)), persistent=False)
        self.register_buffer("rope", rope_table(T, C // cfg.n_head), persistent=False)
        for name, p in self.named_parameters():
            l = cfg.depth(cfg.rbar + 1) if ".proj." in name else 0.5        # 1 / 0.5 = 2
            std = math.sqrt(1 / (5 * C * l))
            nn.init.trunc_normal_(p, 0, std, -3 * std, 3 * std)         # Eq. 6

    def parts(self):
        """Parameters to clip apart from each other: all in one."""
        return [list(self.parameters())]

    def compile(self, **how):
        """Compiles what is the same in every step; the loop over r stays in Python."""
        for part in ("encode", "step", "free_step", "read_out"):
            setattr(self, part, torch.compile(getattr(self, part), **how))

    def layers(self, blocks, x, start, caches):
        """Blocks on x (B, T, C) behind `start` positions; caches, one each: (2, B, nh, T, hs)."""
        end = start + x.size(1)
        for i, block in enumerate(blocks):
            def memory(k, v):
                if caches:
                    caches[i][:, :, :, start:end] = torch.stack([k, v])
                    k, v = caches[i][:, :, :, :end]                     # (B, nh, end, hs)
                return k, v, self.near[start:end, :end]
            x = block(x, self.rope[start:end], memory)                  # (B, T, C)
        return x

    def encode(self, idx, start=0, caches=None):
        """Tokens (B, T) -> e (B, T, C), which every iteration reads."""
        x = math.sqrt(self.cfg.n_embd) * self.embed(idx)                # (B, T, C)
        return self.layers(self.prelude, x, start, caches)              # Eq. 1

    def step(self, s, e, start=0, caches=None):
        """One iteration: state and e -> state. (B, T, C)"""
        x = s + e if self.cfg.inject == "add" else s                    # (B, T, C)
        if self.cfg.inject == "concat":
            x = self.adapter(torch.cat([s, e], dim=-1)).to(s.dtype)     # (B, T, C)
        return self.layers(self.core, x, start, caches)                 # Eq. 3

    free_step = torch.no_grad()(step)   # keeps nothing for the backward pass

    def read_out(self, s, start=0, caches=None):
        """State (B, T, C) -> logits (B, T, V)."""
        x = norm(self.layers(self.coda, norm(s), start, caches))        # (B, T, C)
        return F.linear(x, self.embed.weight).float()                   # Eq. 4

    def states(self, idx, s, r):
        """Yields s_1 to s_r. The gradient flows through the last k iterations, or from e on."""
        e, k = self.encode(idx), self.cfg.k                             # (B, T, C)
        s, k = (e, r) if self.cfg.inject == "none" else (s.detach(), k)     # none: e is s_0
        for i in range(r):      # requires_grad_: one graph serves the first of the last k, too
            s = self.free_step(s, e) if i < r - k else self.step(s.requires_grad_(), e)     # Eq. 8
            yield s

    def forward(self, idx, s, r):
        """idx (B, T), s_0 (B, T, C) -> logits (B, T, V) after r iterations."""
        for s in self.states(idx, s, r):
            pass
        return self.read_out(s)

def recurrent_flops(cfg, r):
    """Forward FLOPs per token; attention is counted as if nothing were masked."""
    T, C, V = cfg.seq_len, cfg.n_embd, len(GROUPS[cfg.task]) + 1
    adapter = 4 * C**2 * (cfg.inject == "concat")
    return cfg.depth(r) * block_flops(T, C) / T + r * adapter + 2 * C * V       # Eq. 12

# ---- 5. Objective and decoding -------------------------------------------------------------------
def draw_depth(cfg):
    """The r of a training step; `train` seeds by the step, so that all processes draw the same."""
    if cfg.unroll == "fixed":
        return cfg.rbar + 1
    tau = torch.normal(math.log(cfg.rbar) - 1 / 8, 1 / 2, (1,))         # (1,)  mean e^tau = rbar
    return min(int(torch.poisson(tau.exp())) + 1, 4 * cfg.rbar)         # Eq. 7

def loss_fn(model, batch, cfg):
    """Cross-entropy in nats per running product after r iterations: loss, stats."""
    logits = model(batch["idx"], batch["s0"], draw_depth(cfg))          # (B, T, V)
    loss = F.cross_entropy(logits[:, 1:].flatten(0, 1), batch["targets"][:, 1:].flatten())  # Eq. 8
    return loss, {"loss": loss.detach()}

@torch.no_grad()
def think(model, idx, s, cfg):
    """Iterates until no prediction moves any more: log-probabilities (B, T, V), iterations."""
    before = s.new_zeros(*idx.shape, model.embed.num_embeddings).log_softmax(-1)    # (B, T, V)
    for i, s in enumerate(model.states(idx, s, R_TEST), 1):
        if i % cfg.check_every == 0 or i == R_TEST:
            now = model.read_out(s).log_softmax(-1)                     # (B, T, V)
            kl = (before.exp() * (before - now)).sum(-1)                # (B, T)  Eq. 10
            if kl.max().clamp(min=0) < cfg.threshold:   # max: p rests until news arrives, too
                break
            before = now
    return now, i

@torch.no_grad()
def decode_tokens(model, idx, s0, r, slots):
    """Logits (B, T, V), token by token, nothing compiled. Iteration i has cache i mod slots."""
    cfg, logits = model.cfg, []
    size = 2, len(idx), cfg.n_head, idx.size(1), cfg.n_embd // cfg.n_head
    first, last, *core = [[s0.new_zeros(size) for _ in blocks] for blocks in
                          (model.prelude, model.coda, *[model.core] * slots)]
    for t in range(idx.size(1)):
        e = RecurrentDepth.encode(model, idx[:, t : t + 1], t, first)   # (B, 1, C)
        s = e if cfg.inject == "none" else s0[:, t : t + 1]             # (B, 1, C)
        for i in range(r):
            s = RecurrentDepth.step(model, s, e, t, core[i % slots])    # (B, 1, C)  Eq. 11
        logits.append(RecurrentDepth.read_out(model, s, t, last))
    return torch.cat(logits, dim=1)

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
LONGER, R_TEST = (1, 2, 4), 64      # test lengths by the training length; most iterations in tests

def longer(cfg):
    """A Config for each test length."""
    return [replace(cfg, seq_len=times * (cfg.seq_len - 1) + 1) for times in LONGER]

def right(logits, targets):
    """1 for every running product that is right, else 0. (B, n)"""
    return (logits.argmax(-1) == targets)[:, 1:].cpu().double()

@torch.no_grad()
def evaluate(model, cfg, run):
    """Validation loss in nats per running product after rbar + 1 iterations."""
    batches = [run.to_device(make_batch(cfg, "val", i)) for i in range(cfg.eval_batches)]
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        losses = [loss_fn(model, batch, replace(cfg, unroll="fixed"))[0] for batch in batches]
    return {"loss": torch.stack(losses).mean().item()}

@torch.no_grad()
def scaling(model, cfg, run):
    """Curves over r for each length, a set being one sample; the last two compare two s_0."""
    names, curves = "accuracy exact ceiling excess agreement distance".split(), []
    for c in longer(cfg):
        batch, other = (run.to_device(make_batch(c, "val", i)) for i in (0, 1))
        rows, most = [], R_TEST if cfg.rbar else 1
        states = [model.states(batch["idx"], s0, most) for s0 in (batch["s0"], other["s0"])]
        for r, (a, b) in enumerate(zip(*states), 1):
            logits, best = model.read_out(a), ceiling(c, r)             # (B, T, V)
            hits = right(logits, batch["targets"])                      # (B, n)
            sample = hits.mean(1).view(-1, len(GROUPS[c.task])).mean(1)             # (B / G,)
            mean, error = sample.mean().item(), sample.std(correction=0).item() / len(sample) ** 0.5
            same = right(model.read_out(b), logits.argmax(-1)).mean().item()
            apart = ((a - b).norm(dim=-1) / a.norm(dim=-1)).mean().item()
            exact, over = hits.prod(1).mean().item(), (mean - best) / max(error, 1e-6)
            rows.append([mean, exact, best, over, same, apart])
        curve = {name: list(column) for name, column in zip(names, zip(*rows))}
        curves.append(curve | {"n": c.seq_len - 1})
    return curves

@torch.no_grad()
def exits(model, cfg, run):
    """Adaptive exit on up to four single sequences of each length, against R_TEST iterations."""
    rows, V = [], model.embed.num_embeddings    # V rows on: another set, another x_1
    for c in longer(cfg):
        batch = run.to_device(make_batch(c, "val", 0))
        for idx, targets, s0 in zip(*(value[::V][:4].split(1) for value in batch.values())):
            ways = lambda: think(model, idx, s0, cfg), lambda: (model(idx, s0, R_TEST), R_TEST)
            (logp, steps), (logits, _) = (way() for way in ways)
            lost = (right(logits, targets) - right(logp, targets)).mean().item()
            turns = [[timeit.timeit(lambda: way()[0].max().item(), number=1) for way in ways]
                     for _ in range(5)]     # in turn; item() waits for the device
            rows.append([steps, lost, *(1e3 * min(seconds) for seconds in zip(*turns))])
    steps, lost, early, full = torch.tensor(rows).view(len(LONGER), -1, 4).mean(1).T    # (lengths,)
    parts = zip((1 - early / full).tolist(), (1 - steps / R_TEST).tolist())
    slope = (steps[-1] - steps[0]).item() / (c.seq_len - cfg.seq_len)
    return dict(exit_steps=steps.tolist(), exit_slope=slope, exit_lost=lost.max().item(),
                exit_ms=early.tolist(), full_ms=full.tolist(),
                seconds_saved=[done / promised if promised else None for done, promised in parts])

def kept_bytes(model, batch, r):
    """Bytes that a training step with r iterations keeps for its backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(batch["idx"], batch["s0"], r)
    return sum({x.data_ptr(): x.nbytes() for x in (y.untyped_storage() for y in kept)}.values())

@torch.no_grad()
def orbits(model, batch, other):
    """Three positions of a sequence from two initial states, on their main axes. (2, r, 3, 2)"""
    idx, s0 = batch["idx"][:1].expand(2, -1), torch.stack([batch["s0"][0], other["s0"][0]])
    s = torch.stack(list(model.states(idx, s0, R_TEST)), dim=1)         # (2, r, T, C)
    s = s[:, :, [1, s.size(2) // 2, -1]]                                # (2, r, 3, C)
    axes = torch.linalg.svd(s.flatten(0, 2), full_matrices=False).Vh[:2]        # (2, C)
    return (s @ axes.T).tolist()

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
    """Trains every arm for the same number of steps. Returns {arm: metrics}."""
    fixed, once = dict(unroll="fixed"), dict(unroll="fixed", rbar=0)    # once: A has to ignore s_0
    arms = {"recurrent": {}, "twin": once, "untied": once | dict(n_layer=cfg.depth(cfg.rbar + 1)),
            "fixed r": fixed, "no injection": dict(inject="none"), "no window": dict(window=0)}
    arms |= {"added e": dict(inject="add"), "k = 1": dict(k=1)} if cfg.full else {}
    results, arms = {}, {arm: scale(replace(cfg, **change), 1) for arm, change in arms.items()}
    for arm, c in select(arms, cfg, run).items():
        torch.manual_seed(cfg.seed)
        model, r = RecurrentDepth(c).to(run.device), c.rbar + 1
        history, curves = train(arm, model, c, run), scaling(model, c, run)
        m = dict(params=sum(p.numel() for p in model.parameters()), steps=c.steps,
                 mflops_per_token=recurrent_flops(c, r) / 1e6, seconds=history[-1]["seconds"],
                 **evaluate(model, replace(c, eval_batches=8 * c.eval_batches), run),
                 excess=max(max(curve["excess"]) for curve in curves), curves=curves)
        if arm == "recurrent":
            batch, other = (run.to_device(make_batch(longer(c)[-1], "val", i)) for i in (0, 1))
            logits = decode_tokens(model, batch["idx"], batch["s0"], 4, c.kv_slots)
            m |= exits(model, c, run) | dict(orbits=orbits(model, batch, other))
            m |= {f"kept_r{r}": kept_bytes(model, batch, r) for r in (8, 64)}
            m["decode_r4"] = right(logits, batch["targets"]).mean().item()
        results[arm] = m | dict(longest_r64=curves[2]["accuracy"][-1], history=history)
    return results

def at(arms, n, r, what="accuracy", arm="recurrent"):
    """A point of an arm's curve for n elements, after r iterations. LookupError: no such curve."""
    return {curve["n"]: curve for curve in arms[arm]["curves"]}[n][what][r - 1]

def bend(arms):
    """How far the iterations that 95 % need are off a line in n; 1 if they are never enough."""
    curves = [curve["accuracy"] for curve in arms["recurrent"]["curves"]]
    a, b, c = (next((r for r, y in enumerate(curve, 1) if y >= 0.95), 65) for curve in curves)
    return abs((c - b) / (2 * (b - a)) - 1) if a < b < c <= R_TEST else 1.0

N = 12, 24, 48      # elements in the strings of the three lengths
COLUMNS = """params mflops_per_token seconds loss excess longest_r64 decode_r4 kept_r8
             kept_r64""".split()
CLAIMS = [  # name, measured from the arms, relation, needed
    ("C0 standard errors above a ceiling", lambda a: max(m["excess"] for m in a.values()), "<=", 3),
    ("C1 n=12, r=1: accuracy", lambda a: at(a, 12, 1), "<=", 0.71),
    ("C1 n=12, r=16: accuracy", lambda a: at(a, 12, 16), ">=", 0.98),
    ("C1 n=12, r=1: all right", lambda a: at(a, 12, 1, "exact"), "<=", 0.02),
    ("C1 n=12, r=16: all right", lambda a: at(a, 12, 16, "exact"), ">=", 0.9),
    ("C2 n=48, r=8: accuracy", lambda a: at(a, 48, 8), "<=", 0.71),
    ("C2 n=48, r=48: accuracy", lambda a: at(a, 48, 48), ">=", 0.95),
    ("C2 n=48: r=48 less r=64", lambda a: at(a, 48, 48) - at(a, 48, 64), "<=", 0.02),
    ("C2 n=48: untied layers", lambda a: at(a, 48, 1, arm="untied"), "<=", 0.73),
    ("C3 r for 95 %: off a line in n", bend, "<=", 0.25),
    ("C4 exit: |steps per element - 0.75|",
     lambda a: abs(a["recurrent"]["exit_slope"] - 0.75), "<=", 0.35),
    ("C4 exit: accuracy lost", lambda a: a["recurrent"]["exit_lost"], "<=", 0.01),
    ("C4 seconds saved / promised", lambda a: min(a["recurrent"]["seconds_saved"]), ">=", 0.8),
    ("C5 two s_0: same answers", lambda a: min(at(a, n, n, "agreement") for n in N), ">=", 0.995),
    ("C5 two s_0: distance", lambda a: max(at(a, n, n, "distance") for n in N), "<=", 0.05),
    ("C6 fixed r less recurrent",
     lambda a: at(a, 48, 64, arm="fixed r") - at(a, 48, 64), ">=", -0.02),
    ("C6 what the window adds", lambda a: at(a, 48, 64) - at(a, 48, 64, arm="no window"), ">=", 0.1)
]
STYLES = "#0072b2 #000000 #e69f00 #009e73 #56b4e9 #cc79a7 #d55e00 #999999 #f0c000 #800000".split()

@matplotlib.rc_context({"font.size": 15, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: what iterations buy, what makes it so, where states go."""
    arms, figure, r = results["arms"], Figure(figsize=(24, 8)), range(1, R_TEST + 1)
    (lengths, parts, orbit), n = figure.subplots(1, 3), [c.seq_len - 1 for c in longer(cfg)]
    for arm, color, marker in zip(arms, STYLES, "ov^sDP*Xd"):
        y = (arms[arm]["curves"][-1]["accuracy"] * R_TEST)[:R_TEST]     # without a loop: constant
        parts.plot(r, y, color=color, marker=marker, markevery=3, label=f"{arm} {y[-1]:.2f}")
    solved = ", ".join(arm for arm in arms if arms[arm]["longest_r64"] > 0.95) or "no arm"
    if m := arms.get("recurrent") if cfg.rbar else None:                # without a loop: no curves
        for i, (color, marker) in enumerate(zip(STYLES, "osD")):
            curve, style = m["curves"][i], dict(color=color, marker=marker, markevery=3)
            lengths.plot(r, curve["accuracy"], label=f"n = {n[i]}", **style)
            lengths.plot(r, curve["ceiling"], ":", color=color)
            lengths.axvline(m["exit_steps"][i], color=color, linestyle="--")
            for states, how in zip(m["orbits"], (dict(lw=6, alpha=0.3), dict(ls="--", marker="x"))):
                orbit.plot(*zip(*(points[i] for points in states)), **style | how)
            orbit.plot(*states[-1][i], "*", color=color, ms=28, label=f"x_{n[2] * i // 2 or 1}")
        parts.plot(r, curve["ceiling"], ":", color="#000000", label="ceiling of recurrent")
        lengths.set(title="Accuracy and its ceiling (dotted); dashed: where it exits")
        orbit.set(title=f"Two starts end {curve['distance'][-1]:.2f} |s| apart (stars)")
    parts.set(title=f"n = {n[2]} is solved by {solved}")
    for panel in (lengths, parts, orbit) if m else (parts,):
        panel.set(xlabel="iterations r", ylabel="accuracy of the running products")
        panel.legend(loc=(0.62, 0.47) if panel is parts else "best")    # clear of all curves
    orbit.set(xlabel="axis 1 (thick: one start, dashed: the other)", ylabel="axis 2")
    figure.supxlabel(f"{NAME}.py, seed {cfg.seed}, {results['environment']['device']}", fontsize=11)
    run.write(f"{NAME}.png", lambda file: figure.savefig(file, dpi=100))

# ---- 9. main -------------------------------------------------------------------------------------
def main(argv=None):
    """Runs what the command line says; returns what results.json holds."""
    with session(argv) as (cfg, run):
        results = report(cfg, run, experiment(cfg, run), COLUMNS, CLAIMS)
        plot(cfg, run, results)
        return results

if __name__ == "__main__":
    main()
