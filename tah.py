"""Think-at-Hard: tokens that look hard take a second pass through the same model, and no others.

Fu et al., arXiv 2511.08577. Run: python tah.py (two to three minutes, two CPU cores).
In the paper two passes for all tokens mend some and break others. TaH's small MLP tells from the
first which are wrong. Only these take another: a LoRA, the prediction as input, all keys seen.

(1)  z_i^d = Head(Net_d(x_i^d; keys and values of all (j, e): j <= i, e <= d, e <= d_j))
(2)  Net_1 has weights W, Net_2 has W + 2 B A       B = 0 at first: no identity, the input is new
(3)  logits_i = z_i^1 + .. + z_i^(d_i),  d_i = 1 or 2 passes, 2 for up to K = `room` tokens (all: T)
(4)  x_i^2 = sum of softmax(v)_t E[t] over the k tokens t whose logits v in z_i^1 are the largest
(5)  c_i = sigmoid(MLP(states of three layers in pass 1, the k largest logits))     the decider
(6)  inference: d_i = 2 if c_i > c_thr    here only names that are asked, in the paper all tokens
(7)  training: d_i = 2 if a reference's argmax is not the next token: labels, which use the answer
(8)  L1 = mean of -log softmax(logits_i)[next token] over the names asked: they alone have labels
(9)  L2 = -mean of w g_i log c_i + (1 - g_i) log(1 - c_i),  g_i = [d_i = 2], w = #stop / #go on
(10) FLOPs = L (24 (T + K) C^2 + 4 (T^2 + T K + K^2) C + 24 r C^2) + 2 C ((T + K) V + K k) + decider
E `embed` | A, B `A` `B` | k `n_soft` | r `rank` | d_i = 2 `go` | g `hard` | T `seq_len` | V `IDS`
C `n_embd`, L `n_layer` | shapes: hs head size, A aliases, B batch, N rows, n keys, facts

What it shows. Facts: name = value (direct) or name = name (alias). Asked: what stands there (') or
behind it (?). Two layers look up once; ? alias (hard) takes two; for ' alias (trap) two are wrong.
  C1 one pass: easy, least       99.960 +- 0.043  needed >= 97, holds on 3 of 3
  C1 one pass: hard, most        15.647 +- 1.107  needed <= 40, holds on 3 of 3
  C1 hard, right in two guesses  29.036 +- 1.550  needed <= 45, holds on 3 of 3
  C2 tah: hard                   95.378 +- 4.962  needed >= 80, holds on 3 of 3
  C2 easy: standard - tah        0.220 +- 0.356  needed <= 1.5, holds on 3 of 3
  C2 all: tah - standard         14.970 +- 1.146  needed >= 8, holds on 3 of 3
  C2 tah: names that go on       18.327 +- 0.554  needed <= 25, holds on 3 of 3
  C3 trap: tah - all go on       93.783 +- 4.714  needed >= 30, holds on 3 of 3
  C3 hard: none goes on          0.803 +- 0.554  needed <= 30, holds on 3 of 3
  C4 current: hard               13.932 +- 0.751  needed <= 40, holds on 3 of 3
  C5 saved time / saved FLOPs    1.013 +- 0.006  needed >= 0.8, holds on 3 of 3
Percent (C5: a ratio), seeds 1-3. C3 forces tah's weights; always_duo, trained so, breaks next to
nothing. Labels are Standard's (in thu-nics/TaH, label.py, Qwen3's); 1 in 7 hard ones has none, so
the decider does better. Left out: three passes, pruning. Exercises: --full --only no_lora --out
out/lora: is it worse? --n_layer 3 --out out/deep: do three layers look up twice, so that C1 fails?
New here: NAMES, IDS, WIDTH, FULLY, LITERALLY, BEGIN, QUERY, SEMICOLON, VALUED, QUESTIONS, SEES,
ROOM, enter, TaH, tah_flops, read_along, batches, fit_decider, pretrain, MEANS, examine, CHANGES,
decide_all, STEPS, ways
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
    n_layer: int = 2                # transformer blocks
    n_head: int = 4                 # attention heads
    n_embd: int = 96                # width of the residual stream
    seq_len: int = 86               # tokens in a training sequence
    wider: int = 0                  # hidden units of every MLP beyond 4 * n_embd
    # method
    think: Literal["labels", "all", "none"] = "labels"      # tah, iter1, current: who trains pass 2
    visible: Literal["duo", "iter1", "current"] = "duo"     # passes whose keys the second one sees
    rank: int = 4                   # of the LoRA of the second pass (0: none)
    n_soft: int = 16                # likeliest tokens; pass 2 reads a mix, the decider logits
    room: int = 6                   # tokens of a sequence for which the second pass has room
    n_fit: int = 1024               # sequences, up to whole batches, from which the decider learns
    c_thr: float = 0.8              # the decider's output above which a token goes on
    # training
    steps: int = 200                # optimiser steps; scaled where arms must cost the same
    batch_size: int = 32            # sequences in a step, over all processes
    lr: float = 1e-3                # peak learning rate
    warmup: int = 20                # steps until the learning rate peaks
    weight_decay: float = 0.01      # AdamW's decoupled weight decay
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 25            # steps between rows of log.csv, each with a checkpoint
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

    inference = "n_fit", "c_thr"    # no effect on training: a checkpoint may differ in these

    def __post_init__(self):
        check_common(self)
        at_least(self, 1, "n_soft room n_fit")
        at_least(self, 0, "wider rank c_thr")
        if self.seq_len not in range(44, 111, 6) or max(self.n_soft, self.room) > IDS:
            raise ValueError(f"seq_len={self.seq_len} must be 44, 50, ... or 110, and n_soft="
                             f"{self.n_soft} and room={self.room} at most {IDS}")

    @property
    def slots(self):
        """Positions of the names that are asked: an answer comes next, and a mark after that."""
        return slice(self.seq_len // 2 - 4, None, 3)

SMOKE = dict(n_layer=2, n_head=2, n_embd=16, seq_len=44, batch_size=4, steps=4, warmup=2, lr=1e-3,
             eval_every=2, eval_batches=1, n_fit=8)

# ---- 2. Task -------------------------------------------------------------------------------------
NAMES, IDS, WIDTH = 16, 40, 48    # ids < 16: names, < 32: values; hidden units of the decider
FULLY, LITERALLY, BEGIN, QUERY, SEMICOLON = range(32, 37)     # ? ' and others
VALUED = {"train": 1, "fit": 1, "val": 1, "literal": 0, "mixed": 0.6}   # split: share of ? obeyed
QUESTIONS = {"all": (0, 1, 2), "easy": (0, 1), "direct": (0,), "trap": (1,), "hard": (2,)}

def make_batch(cfg, split, step):
    """n facts "name content ;", then Q questions "mark name answer". The content of A facts, the
    aliases, is a name, not a neighbour's. Validation is the same for all seeds."""
    B, n, part = cfg.batch_size, (cfg.seq_len - 14) // 6, list(VALUED).index(split)
    A, Q, row = 5 * n // 12, n + 4, step * B + torch.arange(B)          # (B,)
    seed = -1 - step if split == "val" else cfg.seed * 1_000_003 + 100_000 * part + step
    rng = torch.Generator().manual_seed(seed)
    shuffled = lambda size: torch.rand(B, size, generator=rng).argsort(1)
    name, value, at = shuffled(NAMES)[:, :n], NAMES + shuffled(NAMES)[:, A:n], shuffled(n)
    near = (at[:, :A, None] - at[:, None, A:]).abs() == 1               # (B, A, n - A)
    link = torch.rand(B, A, n - A, generator=rng).masked_fill(near, -1).argmax(2)   # (B, A)
    content = torch.cat([name[:, A:].gather(1, link), value], dim=1)    # (B, n)
    behind = torch.cat([value.gather(1, link), value], dim=1)           # (B, n)
    facts = torch.stack([name, content, torch.full_like(name, SEMICOLON)], dim=2)   # (B, n, 3)
    facts = facts[torch.arange(B)[:, None], at.argsort(1)]              # (B, n, 3)
    order, mark = shuffled(Q), torch.randint(2, (B, Q), generator=rng)  # (B, Q)
    direct = torch.randint(A, n, (B, Q - A), generator=rng)             # (B, Q - A)
    fact = torch.cat([shuffled(A), direct], dim=1).gather(1, order)     # (B, Q)
    kind = torch.where(order < A, 1 + (order < (A + 1) // 2).long(), 0)     # (B, Q)
    fully = torch.where(kind == 0, mark, kind - 1) == 1                 # (B, Q)
    deep = fully & (torch.rand(B, Q, generator=rng) < VALUED[split])    # (B, Q)
    name, literal, behind = (x.gather(1, fact) for x in (name, content, behind))    # (B, Q)
    targets = torch.where(deep, behind, literal)                        # (B, Q)
    asks = torch.stack([torch.where(fully, FULLY, LITERALLY), name, targets], dim=2)
    start, ask = torch.tensor([BEGIN, QUERY]).expand(B, 2).split(1, dim=1)    # (B, 1)
    idx = torch.cat([start, facts.flatten(1), ask, asks.flatten(1)], dim=1)     # (B, T)
    return dict(idx=idx, targets=targets, kind=kind, literal=literal, row=row)

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
SEES = {"duo": [(1,), (1, 2)], "iter1": [(1,), (1,)], "current": [(1,), (2,)]}  # by pass 1, pass 2
ROOM = {"none": lambda c: 0, "all": lambda c: c.seq_len, "labels": lambda c: c.room}

def enter(cache, d, at, ok, visible):
    """Tokens `at` (B, K) take pass d: a memory for the attention layers. Where not ok they pad,
    seen only by themselves (no key: NaN). Cache: list of (pass, positions, ok, keys and values)."""
    own, alone = [], not cache
    cache.append((d, at, ok, own))
    _, j, real, stores = zip(*[entry for entry in cache if entry[0] in SEES[visible][d - 1]])
    j, real = torch.cat(j, dim=1)[:, None], torch.cat(real, dim=1)[:, None]     # (B, 1, n)
    mask = (j <= at[..., None]) & (real | (j == at[..., None]))         # (B, K, n)  Eq. 1

    def memory(k, v):
        own.append((k, v))      # of the next layer
        k, v = (torch.cat(part, dim=2) for part in zip(*[kv[len(own) - 1] for kv in stores]))
        return k, v, None if alone else mask[:, None]
    return memory

class TaH(nn.Module):
    """A causal transformer, some tokens of which take a second pass; with think="none" a plain one.
    A policy tells from features (B, Q, F) which tokens behind a mark go on."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C, wide = cfg, cfg.n_embd, 4 * cfg.n_embd + cfg.wider
        self.embed, self.head = nn.Embedding(IDS, C), nn.Linear(C, IDS, bias=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        for mlp in [block.mlp for block in self.blocks if cfg.wider]:
            mlp.fc, mlp.proj = nn.Linear(C, wide, bias=False), nn.Linear(wide, C, bias=False)
        for part in [part for block in self.blocks for part in (block.attn, block.mlp)]:
            nn.init.normal_(part.proj.weight, std=0 if cfg.wider else C**-0.5)  # 0: still the base
        self.A, self.B = nn.ParameterList(), nn.ParameterList()     # for every matrix of the blocks
        for W in self.blocks.parameters() if cfg.think != "none" and cfg.rank else ():
            self.A.append(nn.init.kaiming_uniform_(W.new_empty(cfg.rank, W.size(1)), math.sqrt(5)))
            self.B.append(W.new_zeros(W.size(0), cfg.rank))
        labels = torch.zeros(cfg.steps * cfg.batch_size, cfg.seq_len, dtype=torch.bool)
        self.register_buffer("labels", labels[:, cfg.slots].contiguous())
        self.register_buffer("rope", rope_table(cfg.seq_len, C // cfg.n_head), persistent=False)

    def parts(self):
        """Parameters to clip apart from each other: all in one."""
        return [list(self.parameters())]

    def network(self, x, rope, memory, d):
        """Pass d: states (embeddings, half-way, final), each (B, n, C), and logits (B, n, V)."""
        states, each = [x], len(self.A) // len(self.blocks) * (d - 1)   # LoRAs a block; pass 1: 0
        for i, block in enumerate(self.blocks):
            A, B = (list(lora)[each * i : each * (i + 1)] for lora in (self.A, self.B))
            W = {k: W + 2 * b @ a for a, b, (k, W) in zip(A, B, block.named_parameters())}  # Eq. 2
            states.append(torch.func.functional_call(block, W, (states[-1], rope, memory)))
        h = norm(states[-1])                                            # (B, n, C)
        return [x, states[len(states) // 2], h], self.head(h).float()

    def soften(self, z):
        """Logits (B, K, V) -> the next pass's inputs (B, K, C)."""
        top = z.topk(self.cfg.n_soft)
        return (top.values.softmax(-1)[..., None] * self.embed(top.indices)).sum(-2)    # Eq. 4

    def passes(self, idx, policy=None, room=0, cache=None):
        """idx (B, T) -> logits after all passes and after the first (B, T, V), who went on (B, T);
        the first `room` do, others pad. With a cache, a list, idx continues what is in there."""
        (B, T), duo, go = idx.shape, [] if cache is None else cache, torch.zeros_like(idx) > 0
        start = sum(at.size(1) for d, at, *_ in duo if d == 1)
        at = torch.arange(start, start + T, device=idx.device).expand(B, T)     # (B, T)
        memory, rope = enter(duo, 1, at, ~go, self.cfg.visible), self.rope[start : start + T]
        states, z = self.network(self.embed(idx), rope, memory, 1)
        if not policy:
            return z, z, go
        ask = slice(max(away := self.cfg.slots.start - start, away % 3), T, 3)  # of cfg.slots
        if self.cfg.think == "all":
            go = ~go                                                    # (B, T)
        else:
            x = [*(state[:, ask] for state in states), z[:, ask].topk(self.cfg.n_soft).values]
            go[:, ask] = policy(torch.cat(x, dim=-1).float())
        new = (go * 999 - at).topk(min(room, T)).indices.sort(dim=1).values     # (B, K)  T < 999
        ok, at, pick = go.gather(1, new), at.gather(1, new), new[..., None].expand(-1, -1, IDS)
        go = torch.zeros_like(go).scatter(1, new, ok)                   # (B, T)
        if cache is not None and not go.any():      # in decoding; training has one graph
            return z, z, go
        x, rope = self.soften(z.gather(1, pick)), self.rope[at][:, None]    # (B, K, C)
        more = self.network(x, rope, enter(duo, 2, at, ok, self.cfg.visible), 2)[1]     # (B, K, V)
        return z.scatter_add(1, pick, ok[..., None] * more), z, go      # Eq. 3

    def forward(self, idx, row):
        """Logits (B, T, V) in training, where labels say of row number `row` (B,) who goes on."""
        policy = None if self.cfg.think == "none" else lambda x: self.labels[row]
        return self.passes(idx, policy, ROOM[self.cfg.think](self.cfg))[0]

def tah_flops(cfg):
    """Forward FLOPs of a sequence, with decider and as many second passes as in training."""
    T, C, K, Q = cfg.seq_len, cfg.n_embd, ROOM[cfg.think](cfg), (cfg.seq_len + 10) // 6
    keys = sum({1: T, 2: K}[d] for d in SEES[cfg.visible][1])
    rows = T + K + cfg.rank * (K > 0)           # the last: W + 2 B A, shared by the batch
    layer = rows * (24 * C**2 + 4 * C * cfg.wider) + 4 * C * (T**2 + K * keys)
    decider = 2 * Q * WIDTH * (3 * C + cfg.n_soft + WIDTH + 1) * (cfg.think == "labels")
    return cfg.n_layer * layer + decider + 2 * C * ((T + K) * IDS + K * cfg.n_soft)     # Eq. 10

# ---- 5. Objective and decoding -------------------------------------------------------------------
def loss_fn(model, batch, cfg):
    """Cross-entropy of the answers in nats, from logits after a token's last pass: loss, stats."""
    logits = model(batch["idx"], batch["row"])[:, cfg.slots]            # (B, Q, V)
    loss = F.cross_entropy(logits.mT, batch["targets"])                 # Eq. 8
    return loss, {"loss": loss.detach()}

@torch.no_grad()
def read_along(model, idx, policy):
    """Logits (B, T, V) for a text idx (B, T), token by token from a cache, as in decoding."""
    cache = []
    return torch.cat([model.passes(new, policy, 1, cache)[0] for new in idx.split(1, dim=1)], dim=1)

def batches(split, n, cfg, run):
    return (run.to_device(make_batch(cfg, split, step)) for step in range(n))

def fit_decider(model, labels, cfg, run):
    """An MLP that has learned to tell from features of the frozen model what labels(batch) says."""
    x, hard = [], []
    for batch in batches("fit", -(-cfg.n_fit // cfg.batch_size), cfg, run):
        hard.append(labels(batch))
        model.passes(batch["idx"], lambda new: x.append(new.detach()) or hard[-1], 1)
    x, hard = torch.cat(x).flatten(0, 1), torch.cat(hard).flatten().float()     # (N, F), (N,)
    torch.manual_seed(cfg.seed)
    mlp = nn.Sequential(nn.LayerNorm(x.size(1)), nn.Linear(x.size(1), WIDTH), nn.GELU(),  # Eq. 5
                        nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1), nn.Flatten(-2))
    opt = torch.optim.Adam(mlp.to(run.device).parameters(), lr=2e-3)
    w = 1 / hard.mean().clamp(min=1e-3) - 1                             # stop / go on
    for i in torch.randint(len(x), (25 * len(x) // 1024 + 1, 1024), device=run.device):  # 25 epochs
        opt.zero_grad()
        F.binary_cross_entropy_with_logits(mlp(x[i]), hard[i], pos_weight=w).backward()     # Eq. 9
        opt.step()
    return mlp

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

def pretrain(cfg, run):
    """The base: learns to look up among few facts, then to mind the marks, each until it does."""
    torch.manual_seed(cfg.seed)
    full = replace(cfg, think="none", wider=0, lr=4 * cfg.lr, steps=4 * cfg.steps)
    easy = replace(full, seq_len=44, batch_size=2 * cfg.batch_size)
    model = TaH(full).to(run.device)
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    for c, split, learned in [(easy, "literal", lambda m: m["name_all"] >= 95), (full, "mixed",
            lambda m: m["name_easy"] >= 98 and m["p_trap"] >= 90 and m["p_hard"] <= 50)]:
        for step in tqdm(range(c.steps), f"base, {split}", disable=run.rank > 0):
            batch = run.to_device(make_batch(c, split, step))
            opt.zero_grad()
            z = model.passes(batch["idx"])[0][:, c.slots]               # (B, Q, V)
            F.cross_entropy(z.mT, batch["targets"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
            for group in opt.param_groups:
                group["lr"] = learning_rate(step, c)
            opt.step()
            due = (step + 1) % c.eval_every == 0 or step + 1 == c.steps
            if due and (learned(examine(model, c, run)) or cfg.smoke):
                break
        else:       # no arm could learn from such a base
            fail(f"{split} task not learned in {c.steps} steps; raise --steps or change --seed", 1)
    return model

# ---- 7. Evaluation -------------------------------------------------------------------------------
MEANS = {   # over the answers to questions of a kind, in percent; after all passes, after the first
    "": lambda e: e.z.argmax(2) == e.targets, "once_": lambda e: e.first.argmax(2) == e.targets,
    "went_": lambda e: e.go, "name_": lambda e: e.first.argmax(2) == e.literal,
    "breaks_": lambda e: (e.first.argmax(2) == e.targets) & (e.z.argmax(2) != e.targets),
    "two_": lambda e: (e.z.topk(2).indices == e.targets[..., None]).any(2),     # of two guesses
    "p_": lambda e: e.first.softmax(2).gather(2, e.literal[..., None]).squeeze(2)}

@torch.no_grad()
def examine(model, cfg, run, policy=None, room=0):
    """MEANS for every kind of question and loss in nats, if policy(batch, x) says who goes on."""
    parts = []
    for batch in batches("val", cfg.eval_batches, cfg, run):
        rule = policy and functools.partial(policy, batch)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            passes = model.passes(batch["idx"], rule, room)
        passes = dict(zip(("z", "first", "go"), (v[:, cfg.slots].cpu() for v in passes)))
        parts.append({name: v.cpu() for name, v in batch.items()} | passes)
    e = argparse.Namespace(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    kinds = {kind: sum(e.kind == i for i in ids) > 0 for kind, ids in QUESTIONS.items()}
    return {"loss": F.cross_entropy(e.z.mT, e.targets).item()} | {
        mean + kind: 100 * of(e)[at].double().mean().item()
        for mean, of in MEANS.items() for kind, at in kinds.items()}

def evaluate(model, cfg, run):
    """The same with the passes of training, but of all hard questions, whatever labels say."""
    hard = lambda batch, x: batch["kind"] == 2
    return examine(model, cfg, run, None if cfg.think == "none" else hard, ROOM[cfg.think](cfg))

def decide_all(model, labels, cfg, run):
    """The same with the method's own decisions and, as rows, with others; times in milliseconds."""
    m, look = evaluate(model, cfg, run), functools.partial(examine, model, cfg, run)
    rows = {", two guesses (uses the answer)": m | {kind: m["two_" + kind] for kind in QUESTIONS}}
    policy, Q = cfg.think != "none", (cfg.seq_len + 10) // 6
    if cfg.think == "labels":
        decider = fit_decider(model, labels, cfg, run)
        above = lambda c_thr: lambda batch, x: decider(x).sigmoid() > c_thr     # Eq. 5 and 6
        m, policy = look(above(cfg.c_thr), cfg.room), functools.partial(above(cfg.c_thr), None)
        rows = {f", c_thr = {c}": look(above(c), Q) for c in (1, 0.95, 0.5, 0)}
        rows[", labels (uses the answer)"] = look(lambda batch, x: labels(batch), Q)
    rows, room = {"": m.copy()} | rows, ROOM[cfg.think](cfg)
    idx, two = next(batches("val", 1, cfg, run))["idx"], replace(cfg, think="all", visible="duo")
    two = TaH(two).to(run.device)
    jobs = {"ms_batch": lambda: model.passes(idx, policy, room)[0].sum().item(),
            "ms_always": lambda: two.passes(idx, True, cfg.seq_len)[0].sum().item(),
            "ms_decode": lambda: read_along(model, idx[:1], policy).sum().item()}
    for name, job in [*jobs.items()] * 9:   # in turn, as other work comes and goes
        m[name] = min(m.get(name, math.inf), 1e3 * timeit.timeit(torch.no_grad()(job), number=1))
    return m | {"rows": rows}

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

CHANGES = {"standard": dict(think="none"), "standard_long": dict(think="none"),
    "standard_wide": dict(think="none", wider=78), "always": dict(think="all", visible="current"),
    "always_duo": dict(think="all", visible="duo"), "tah": {}, "iter1": dict(visible="iter1"),
    "current": dict(visible="current")}  # 78: TaH's size; long: standard goes on, on the same rows
STEPS = dict(standard=1, standard_wide=1, standard_long=0.9)    # others 0.5; long: TaH's FLOPs

def experiment(cfg, run):
    """Trains and evaluates every arm, all from one base. Returns {arm: metrics}."""
    arms, results, models = CHANGES | ({"no_lora": dict(rank=0)} if cfg.full else {}), {}, {}
    arms = {arm: scale(replace(cfg, **new), STEPS.get(arm, 0.5)) for arm, new in arms.items()}
    for arm, c in select(arms, replace(cfg, only=cfg.only and "standard," + cfg.only), run).items():
        torch.manual_seed(cfg.seed)
        model = models[arm] = TaH(c).to(run.device)
        first = lambda batch: models["standard"].passes(batch["idx"])[0][:, cfg.slots].argmax(-1)
        labels = lambda batch: first(batch) != batch["targets"]     # Eq. 7, static: not of `model`
        if not (run.load and (run.out / f"{arm}.pt").exists()):
            models["base"] = models.get("base") or pretrain(cfg, run)
            source = models["standard" if arm == "standard_long" else "base"]
            for name, p in source.named_parameters():       # its MLPs may be narrower
                model.get_parameter(name).data[tuple(map(slice, p.shape))] = p.data
            for batch in batches("train", c.steps if c.think == "labels" else 0, c, run):
                model.labels[batch["row"]] = labels(batch)
        history, long = train(arm, model, c, run), replace(c, eval_batches=8 * c.eval_batches)
        results[arm] = dict(params=sum(p.numel() for p in model.parameters()), steps=c.steps,
                            mflops=tah_flops(c) / 1e6, history=history,
                            seconds=history[-1]["seconds"], **decide_all(model, labels, long, run))
    return {arm: m for arm, m in results.items() if arm in (cfg.only or arm).split(",")}

def ways(arms):
    """{row: metrics} of all arms, and of the same with other decisions."""
    return {arm + way: row for arm, m in arms.items() for way, row in m["rows"].items()}

COLUMNS = """direct trap hard all went_all went_hard breaks_all once_all name_hard loss
             params mflops ms_batch ms_always ms_decode steps seconds""".split()
CLAIMS = [  # name, measured from the arms, relation, needed; percent; easy: direct and trap
    ("C1 one pass: easy, least", lambda a: min(a[arm]["easy"] for arm in STEPS), ">=", 97),
    ("C1 one pass: hard, most", lambda a: max(a[arm]["hard"] for arm in STEPS), "<=", 40),
    ("C1 hard, right in two guesses", lambda a: a["standard"]["two_hard"], "<=", 45),
    ("C2 tah: hard", lambda a: a["tah"]["hard"], ">=", 80),
    ("C2 easy: standard - tah", lambda a: a["standard"]["easy"] - a["tah"]["easy"], "<=", 1.5),
    ("C2 all: tah - standard", lambda a: a["tah"]["all"] - a["standard"]["all"], ">=", 8),
    ("C2 tah: names that go on", lambda a: a["tah"]["went_all"], "<=", 25),
    ("C3 trap: tah - all go on",
     lambda a: a["tah"]["trap"] - a["tah"]["rows"][", c_thr = 0"]["trap"], ">=", 30),
    ("C3 hard: none goes on", lambda a: a["tah"]["rows"][", c_thr = 1"]["hard"], "<=", 30),
    ("C4 current: hard", lambda a: a["current"]["hard"], "<=", 40),
    ("C5 saved time / saved FLOPs", lambda a: (1 - a["tah"]["ms_batch"] / a["tah"]["ms_always"])
     / (1 - a["tah"]["mflops"] / a["always_duo"]["mflops"] or None), ">=", 0.8)]  # None: none saved
STYLES = {  # the same colour for the same role in every script, and a second cue
    "direct": dict(color="#000000", marker="s"), "trap": dict(color="#d55e00", marker="v"),
    "hard": dict(color="#0072b2", marker="o"), "went_all": dict(color="#cc79a7", marker="x")}

@matplotlib.rc_context({"font.size": 15, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: how many answers are right, whoever takes a second pass."""
    figure, arms, n = Figure(figsize=(16, 9)), results["arms"], (cfg.seq_len - 14) // 6
    panel, best = figure.subplots(), "tah" if "tah" in arms else [*arms][-1]
    rows = {way: m for way, m in ways(arms).items() if way in arms or way.startswith(("st", "tah"))}
    for (kind, style), label in zip(STYLES.items(), ("direct", "trap", "hard", "names that go on")):
        x = [row[kind] for row in rows.values()]
        panel.plot(x, [*rows], **style, linestyle="", markersize=14, alpha=0.8, label=label)
    panel.axvline(100 / (n - 5 * n // 12), color="#999999", linestyle="--", label="guess if hard")
    panel.legend(loc="center", title="right answers, except x")
    title = "{} sends {went_all:.0f} % of names on: {hard:.0f} % of hard answers right"
    panel.set(xlabel="percent", ylim=(len(rows) - 0.5, -1), title=title.format(best, **arms[best]))
    figure.supxlabel(f"{NAME}.py, seed {cfg.seed}, {results['environment']['device']}", fontsize=12)
    run.write(f"{NAME}.png", lambda file: figure.savefig(file, dpi=80))

# ---- 9. main -------------------------------------------------------------------------------------
def main(argv=None):
    """Runs what the command line says; returns what results.json holds."""
    with session(argv) as (cfg, run):
        results = report(cfg, run, experiment(cfg, run), COLUMNS, CLAIMS)
        if run.rank == 0:
            rows = ways(results["arms"]).items()
            print("\n" + table([{"way": way} | {c: m[c] for c in COLUMNS[:10]} for way, m in rows]))
        plot(cfg, run, results)
        return results

if __name__ == "__main__":
    main()
