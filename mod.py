"""Mixture-of-Depths: only the few tokens that a router picks enter a block, the others pass it by.

Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in transformer-based language
models", arXiv 2404.02258. Run: python mod.py (four minutes on two CPU cores).

A transformer spends the same on every token. Here every other block has a router, a vector that
scores each token, and takes only the k best of each sequence: attention and MLP run on k gathered
tokens, all others keep their residual stream. Shapes are static, so the cost is known (0.56 of the
full model's with k = T/8); where it goes is learned. Ranking a token against later ones leaks the
future, so a small predictor learns to say from the token alone whether it would be picked.

(1)  r_i = w . norm(x_i)                                  score of token i, for every routed block
(2)  A = the k tokens with the largest r, by position     training; per sequence, k = capacity * T
(3)  x_i <- x_i + g(r_i) f_i(X_A) if i in A, else x_i     g = 2 sigmoid | identity | 1
(4)  f(X) = a + m,  a = Attn(norm(X)),  m = MLP(norm(X + a))    over A alone, at its positions
(5)  L = mean of -log softmax(logits_i)[next token]
(6)  L + BCE(sigmoid(p_i), i in A),  p_i = MLP2(stopgrad(norm(x_i)))    causal="predictor"
(7)  L + 0.01 BCE(sigmoid(p_i), i in A),  p_i = r_i     causal="aux": it shapes the model, too
(8)  at inference i enters the block if sigmoid(p_i) > 1/2, that is p_i > 0
(9)  forward FLOPs per token = full (24 C^2 + 4 T C) + routed (24 C^2 + 4 k C) k/T + routers + head

x_i `x` | r `r` | p `p` | A `A` | f `Block.update` | g `gate` | w `routers` | MLP2 `predictors`
T `seq_len` | C `n_embd` | B batch, R some rows of it | V characters | nh heads, hs head size
full, routed: numbers of blocks; N stands for `routed` in shapes

What it shows. Four arms get the same training FLOPs, each with its own cosine: dense (all blocks
full; mod without routers), shallow (no routed blocks), mod, random (Gaussian scores, no gate).
  M1  loss of dense minus mod                 0.089 +- 0.006  needed >= 0.03, holds on 3 of 3
  M2  loss of random minus mod                0.012 +- 0.018  needed >= 0.01, holds on 2 of 3
  M3  what the causal rule costs over top-k   0.007 +- 0.008  needed <= 0.02, holds on 3 of 3
  M3  predictor's balanced accuracy           0.870 +- 0.003  needed >= 0.85, holds on 3 of 3
  M4  loss of routed tokens minus others      0.342 +- 0.443  needed >= 0.1, holds on 2 of 3
  M4  step time, mod / dense                  0.673 +- 0.010  needed <= 0.7, holds on 3 of 3
  M5  loss of shallow minus mod, not promised -0.011 +- 0.010  needed >= 0.0, holds on 0 of 3
Seeds 1-3, nats. M2 is no more than seeds differ. Shallow leads mod on all three: M1 is the gain of
fewer full blocks, not of routing. Steps are timed untrained, in turn with dense. Decoding takes
0.8-0.9 of dense's time, 1.1 with 32 rows.

What the paper leaves open. Its r is w . x_i and itself the gate; norm, 2 sigmoid (1 for r = 0),
MLP2, odd blocks and 0.01 are ours. Others go wrong by a softmax over tokens, which is not causal
(kyegomez/Mixture-of-Depths, main.py), by x counted twice (epfml/llm-baselines, branch
mixture_of_depth), by top-k in decoding (astramind-ai/Mixture-of-depths). Left out: experts (MoDE).

Exercises
  1. --capacity 0.5: at equal FLOPs fewer steps. Does the loss get worse, the leak of M3 smaller?
  2. --routed_every 1: some tokens meet no block at all (bars at 0). How high is their loss?
  3. --gate none, seeds 1-3: nothing trains the router. Does M2 differ from the default's 0.01?

New here: MoD, flops_per_token, generate, step_ratio, decode, read_text
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
from statistics import median
from typing import Literal, get_args

import matplotlib
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.tokenizer import Tokenizer, load_corpus

NAME = Path(__file__).stem

# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config:
    # model
    n_layer: int = 8                # transformer blocks
    n_head: int = 2                 # attention heads
    n_embd: int = 32                # width of the residual stream
    seq_len: int = 128              # tokens in a training sequence
    # method
    routed_every: int = 2           # every n-th block is routed (1: all, 0: none, i.e. plain)
    capacity: float = 0.125         # share of the tokens that a routed block processes
    routing: Literal["learned", "random"] = "learned"       # who picks (gate, causal: learned only)
    gate: Literal["sigmoid", "raw", "none"] = "sigmoid"     # factor g(r) on a routed update
    causal: Literal["predictor", "aux"] = "predictor"       # how the choice at inference is learned
    corpus: str = ""                # UTF-8 text to train on (empty: the script's own)
    temp: float = 0.8               # sampling temperature (0: greedy)
    # training
    steps: int = 500                # optimiser steps; scaled where arms must cost the same
    batch_size: int = 32            # sequences in a step, over all processes
    lr: float = 6e-3                # peak learning rate
    warmup: int = 50                # steps until the learning rate peaks
    weight_decay: float = 0.1       # AdamW's decoupled weight decay
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 50            # steps between rows of log.csv, each with a checkpoint
    eval_batches: int = 3           # validation batches for such a row; 8 times more at the end
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

    inference = ("temp",)           # no effect on training: a checkpoint may differ in these

    def __post_init__(self):
        check_common(self)
        # seed 0 would draw both splits by the same numbers; `decode` writes a quarter of seq_len
        for low, names in [(0, "routed_every capacity temp"), (1, "seed"), (4, "seq_len")]:
            at_least(self, low, names)
        if not 1 <= self.k(self.seq_len) <= self.seq_len:
            raise ValueError(f"capacity={self.capacity} of {self.seq_len} tokens; try 0.125")
        if len(read_text(self.corpus)[1]["val"]) <= self.seq_len:
            raise ValueError(f"corpus={self.corpus} is too short for seq_len={self.seq_len}")

    @property
    def routed(self):
        """Indices of the routed blocks; with routed_every=2 the odd ones, and block 0 is full."""
        n = self.routed_every
        return list(range(n - 1, self.n_layer, n)) if n else []

    def k(self, T):
        """How many of T tokens a routed block processes."""
        return int(self.capacity * T + 1e-6)    # 0.29 * 100 is a little less than 29

SMOKE = dict(n_layer=4, n_head=2, n_embd=16, seq_len=32, batch_size=4, steps=4, warmup=2,
             lr=1e-3, eval_every=2, eval_batches=1)

# ---- 2. Task -------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=2)
def read_text(path):
    """Character tokenizer and {"train", "val"} id tensors of a text; its last tenth validates."""
    text = load_corpus(path)
    tok = Tokenizer.from_text(text)
    ids = torch.tensor(tok.encode(text))
    return tok, {"train": ids[: len(ids) * 9 // 10], "val": ids[len(ids) * 9 // 10 :]}

def make_batch(cfg, split, step):
    """Batch number `step` of a split: random windows, and the same windows one character on.
    A function of its arguments alone; the validation windows are the same for all seeds."""
    ids = read_text(cfg.corpus)[1][split]
    rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step if split == "train" else step)
    start = torch.randint(len(ids) - cfg.seq_len, (cfg.batch_size, 1), generator=rng)
    window = ids[start + torch.arange(cfg.seq_len + 1)]             # (B, T + 1)
    return {"idx": window[:, :-1], "targets": window[:, 1:]}

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
class MoD(nn.Module):
    """A causal transformer, some blocks of which process only the tokens that their router picks.

    Training mode takes the top k, evaluation mode decides token by token; routed_every=0: plain.
    """

    def __init__(self, cfg, vocab_size):
        super().__init__()
        self.cfg, C, h = cfg, cfg.n_embd, cfg.n_embd // 2
        self.embed = nn.Embedding(vocab_size, C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = nn.Linear(C, vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("rope", rope_table(cfg.seq_len, C // cfg.n_head), persistent=False)
        learned = [str(i) for i in cfg.routed if cfg.routing == "learned"]
        self.routers = nn.ModuleDict({i: nn.Linear(C, 1, bias=False) for i in learned})
        self.predictors = nn.ModuleDict()
        for i in learned if cfg.causal == "predictor" else []:
            self.predictors[i] = nn.Sequential(nn.Linear(C, h), nn.SiLU(), nn.Linear(h, 1))

    def parts(self):
        """Parameters to clip apart from each other: the predictors must not disturb the model."""
        side = list(self.predictors.parameters())
        rest = [p for name, p in self.named_parameters() if not name.startswith("predictors.")]
        return [rest, side] if side else [rest]

    def scores(self, i, x):
        """Scores r, which rank the tokens in training, and p, which decide at inference. (B, T)"""
        if self.cfg.routing == "random":        # p > 0 with chance `capacity`
            r = torch.randn(x.shape[:2], device=x.device)               # (B, T)
            return r, r - torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - self.cfg.capacity))
        with torch.autocast(x.device.type, enabled=False):      # float32: in bfloat16 scores tie
            x = norm(x.float())
            r = self.routers[str(i)](x).squeeze(-1)                     # (B, T)  Eq. 1
            if self.cfg.causal == "aux":
                return r, r                                             # Eq. 7
            return r, self.predictors[str(i)](x.detach()).squeeze(-1)   # Eq. 6

    def gate(self, r):
        """The factor g(r) on an update: through it the router gets a gradient. (B, T) -> (B, T)"""
        kind = "none" if self.cfg.routing == "random" else self.cfg.gate
        return {"sigmoid": 2 * r.sigmoid(), "raw": r, "none": 1 + 0 * r}[kind]  # 0 r: DDP needs it

    def picked(self, r):
        """The k tokens of each row with the largest scores r. (B, T) -> keep (B, T)"""
        best = r.topk(self.cfg.k(r.size(1)), dim=1, sorted=False).indices       # (B, k)
        return torch.zeros_like(r, dtype=torch.bool).scatter(1, best, True)     # (B, T)  Eq. 2

    def enter(self, i, x, r, keep, start=0, cache=None):
        """Block i on k tokens of each row of x (B, T, C): those to keep first, in order, so that
        causal attention hides the others from them; what becomes of the others is dropped."""
        (B, T, C), rows = x.shape, torch.arange(len(x), device=x.device)        # (B,)
        new = k = self.cfg.k(T) if self.training else T
        if cache:                                   # no more than are kept, in rows that keep any
            rows = keep.any(1).nonzero().squeeze(1)                     # (R,)
            if len(rows) == 0:
                return x
            new = keep[rows].sum(1)                                     # (R,)
            k = new.max()
        A = (~keep[rows]).sort(dim=1, stable=True).indices[:, :k]       # (R, k)
        place = (rows[:, None] * T + A).flatten()                       # (R * k,)
        memory = cache and functools.partial(cache.extend, rows=rows, new=new)
        f = x.flatten(0, 1).index_select(0, place).view(*A.shape, C)    # (R, k, C)
        f = self.blocks[i].update(f, self.rope[start + A][:, None], memory)     # (R, k, C)  Eq. 4
        f = (keep * self.gate(r)).flatten()[place].view(*A.shape, 1) * f        # (R, k, C)
        return x.flatten(0, 1).index_add(0, place, f.flatten(0, 1).to(x.dtype)).view_as(x)  # Eq. 3

    def forward(self, idx, start=0, caches=None):
        """idx (B, T) -> logits (B, T, V), and p and keep of the N routed blocks, both (N, B, T).

        With `caches`, a KVCache for every block, idx continues a text of `start` tokens.
        """
        B, T = idx.shape
        x, ps, keeps = norm(self.embed(idx)), [], []                    # (B, T, C)
        everyone = torch.arange(B, device=idx.device)                   # (B,)
        for i, block in enumerate(self.blocks):
            if i not in self.cfg.routed:
                memory = caches and functools.partial(caches[i].extend, rows=everyone, new=T)
                x = block(x, self.rope[start : start + T], memory)      # (B, T, C)
                continue
            r, p = self.scores(i, x)
            keep = self.picked(r) if self.training else p > 0           # (B, T)  Eq. 8
            x = self.enter(i, x, r, keep, start, caches and caches[i])  # (B, T, C)
            ps.append(p)
            keeps.append(keep)
        logits = self.head(norm(x)).float()                             # (B, T, V)
        return logits, *(torch.stack(q) if q else x.new_zeros(0, B, T) for q in (ps, keeps))

def flops_per_token(cfg, vocab_size):
    """Forward FLOPs per token: full blocks see T tokens, routed ones k, routers and head all."""
    T, C, routed, k = cfg.seq_len, cfg.n_embd, len(cfg.routed), cfg.k(cfg.seq_len)
    choose = routed * (2 * C + (C * C + C) * (cfg.causal == "predictor"))   # MLP2: C, C/2, 1
    blocks = (cfg.n_layer - routed) * block_flops(T, C) + routed * block_flops(k, C)
    return blocks / T + choose * (cfg.routing == "learned") + 2 * C * vocab_size    # Eq. 9

# ---- 5. Objective and decoding -------------------------------------------------------------------
def loss_fn(model, batch, cfg):
    """Next-token cross-entropy in nats, plus what trains the choice at inference: loss, stats."""
    logits, p, keep = model(batch["idx"])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())        # Eq. 5
    stats = {"loss": loss.detach()}
    if len(p) and cfg.routing == "learned":
        bce = F.binary_cross_entropy_with_logits(p, keep.float())                   # Eq. 6
        loss = loss + (bce if cfg.causal == "predictor" else 0.01 * bce)            # Eq. 7
    return loss, stats

@torch.no_grad()
def generate(model, idx, n_new, temp, seed=0):
    """Samples n_new tokens after idx (B, n): ids (B, n + n_new) and who was kept (N, B, *)."""
    assert idx.size(1) + n_new <= model.cfg.seq_len, "prompt and new tokens exceed seq_len"
    rng, keeps, start = torch.Generator(idx.device).manual_seed(seed), [], 0
    caches = [KVCache(len(idx), model.cfg, idx.device) for _ in model.blocks]
    model.eval()
    for _ in range(n_new):
        logits, _, keep = model.forward(idx[:, start:], start, caches)  # eager: shapes by data
        probs = F.softmax(logits[:, -1] / max(temp, 1e-6), dim=-1)      # (B, V)
        start = idx.size(1)
        idx = torch.cat([idx, torch.multinomial(probs, 1, generator=rng)], dim=1)
        keeps.append(keep)
    return idx, torch.cat(keeps, dim=2)

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
    """Validation loss in nats per character under both rules, and what the routers do."""
    parts = []
    for i in range(cfg.eval_batches):
        torch.manual_seed(i)
        batch = run.to_device(make_batch(cfg, "val", i))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            topk, p, label = model.train()(batch["idx"])    # no dropout: the mode is the rule
            causal, _, keep = model.eval()(batch["idx"])
        nll_topk, nll = (F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")
                         for logits in (topk, causal))
        parts.append([nll_topk, nll, p > 0, label, keep])
    nll_topk, nll, guess, label, keep = (torch.cat(part, dim=-2).cpu() for part in zip(*parts))
    metrics = {"loss": nll.mean().item(), "loss_topk": nll_topk.mean().item()}
    if len(keep):
        rates = torch.stack([guess[label].float().mean(), (~guess[~label]).float().mean()])
        n = keep.sum(0)                                                 # (B, T)
        by_passes = [nll[n == j] for j in range(len(keep) + 1)]
        metrics |= {"keep_rate": keep.float().mean().item(),
                    "loss_gap": (nll[n > 0].mean() - nll[n == 0].mean()).nan_to_num().item(),
                    "loss_by_passes": [v.mean().item() if len(v) > 99 else None for v in by_passes]}
        metrics |= {"balanced_accuracy": rates.nanmean().item()} if cfg.routing == "learned" else {}
    return metrics

def step_ratio(cfg, vocab_size, run):
    """Time of a training step (not compiled) over that of a plain model, both fresh: the median of
    25 turns. In turn, since a machine that changes its pace spoils the ratio of two trainings."""
    batch = run.to_device(make_batch(cfg, "train", 0))
    models = [MoD(c, vocab_size).to(run.device) for c in (cfg, replace(cfg, routed_every=0))]
    pairs = [(model, torch.optim.AdamW(model.parameters(), fused=True)) for model in models]

    def step(model, opt):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            logits, p, _ = model(batch["idx"])
        (F.cross_entropy(logits.mT, batch["targets"]) + p.sum()).backward()
        opt.step()
        return logits.sum().item()                  # waits for a GPU

    turns = [[timeit.timeit(lambda: step(*pair), number=1) for pair in pairs] for _ in range(25)]
    return median(routed / plain for routed, plain in turns)

def decode(model, cfg, run):
    """Milliseconds per new token, prompt included, for 32 rows and one; a sample, its routing."""
    (tok, _), result, n_new = read_text(cfg.corpus), {}, cfg.seq_len // 4
    for batch_size in (32, 1):
        prompt = make_batch(replace(cfg, batch_size=batch_size), "val", 0)["idx"][:, :-n_new]
        sample = functools.partial(generate, model, prompt.to(run.device), n_new, cfg.temp)
        seconds = min(timeit.repeat(sample, number=1, repeat=3))
        result[f"decode_ms_b{batch_size}"] = 1e3 * seconds / n_new
    idx, keep = sample()
    return result | {"sample": tok.decode(idx[0]), "sample_routing": keep[:, 0].int().tolist()}

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
    """Trains and evaluates every arm with the same training FLOPs. Returns {arm: metrics}."""
    shallow = max(1, cfg.n_layer - len(cfg.routed))     # the routed blocks deleted
    arms = {"dense": dict(routed_every=0), "shallow": dict(routed_every=0, n_layer=shallow),
            "mod": {}, "random": dict(routing="random")}
    if cfg.full:
        arms |= {f"capacity {c}": dict(capacity=c) for c in (1/16, .25, .5) if c * cfg.seq_len >= 1}
        arms |= {"every block": dict(routed_every=1), "raw gate": dict(gate="raw"),
                 "no gate": dict(gate="none"), "aux loss": dict(causal="aux")}
    vocab_size, results = len(read_text(cfg.corpus)[0]), {}
    arms = {arm: replace(cfg, **changes) for arm, changes in arms.items()}
    flops = {arm: flops_per_token(arm_cfg, vocab_size) for arm, arm_cfg in arms.items()}
    arms = {arm: scale(arm_cfg, flops["dense"] / flops[arm]) for arm, arm_cfg in arms.items()}
    for arm, arm_cfg in select(arms, cfg, run).items():
        torch.manual_seed(cfg.seed)
        model = MoD(arm_cfg, vocab_size).to(run.device)
        history = train(arm, model, arm_cfg, run)
        long = replace(arm_cfg, eval_batches=8 * cfg.eval_batches)
        ratio = {"ms_ratio": step_ratio(arm_cfg, vocab_size, run)} if arm_cfg.routed else {}
        results[arm] = dict(params=sum(p.numel() for p in model.parameters()), steps=arm_cfg.steps,
                            mflops_per_token=flops[arm] / 1e6, seconds=history[-1]["seconds"],
                            **ratio, **evaluate(model, long, run), **decode(model, arm_cfg, run),
                            history=history)
    return results

COLUMNS = """params mflops_per_token steps seconds ms_ratio loss loss_topk keep_rate
             decode_ms_b1 decode_ms_b32""".split()
CLAIMS = [  # name, measured from the arms, relation, needed
    ("M1 loss: dense - mod", lambda a: a["dense"]["loss"] - a["mod"]["loss"], ">=", 0.03),
    ("M2 loss: random - mod", lambda a: a["random"]["loss"] - a["mod"]["loss"], ">=", 0.01),
    ("M3 loss: causal - top-k", lambda a: a["mod"]["loss"] - a["mod"]["loss_topk"], "<=", 0.02),
    ("M3 predictor, balanced accuracy", lambda a: a["mod"]["balanced_accuracy"], ">=", 0.85),
    ("M4 loss of tokens: routed - others", lambda a: a["mod"]["loss_gap"], ">=", 0.1),
    ("M4 step time: mod / dense", lambda a: a["mod"]["ms_ratio"], "<=", 0.70),
    ("M5 loss: shallow - mod", lambda a: a["shallow"]["loss"] - a["mod"]["loss"], ">=", 0.0),
]
STYLES = {  # the same colour for the same role in every script, and a second cue
    "mod": dict(color="#0072b2", linestyle="-", linewidth=4),
    "dense": dict(color="#000000", linestyle="--", linewidth=2.5),
    "shallow": dict(color="#e69f00", linestyle="-.", linewidth=2.5),
    "random": dict(color="#d55e00", linestyle=":", linewidth=3),
}

@matplotlib.rc_context({"font.size": 14, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: what the FLOPs buy, who is routed in a sample, how hard those tokens are."""
    arms = {arm: m for arm, m in results["arms"].items() if arm in STYLES}
    figure = Figure(figsize=(18, 6))
    curves, sample, bars = figure.subplots(1, 3, width_ratios=[1, 1.2, 0.7])
    for arm, m in arms.items():
        flops = 3 * 1e6 * m["mflops_per_token"] * cfg.batch_size * cfg.seq_len  # backward: 2
        curves.plot([row["step"] * flops / 1e12 for row in m["history"]],
                    [row["val_loss"] for row in m["history"]], **STYLES[arm],
                    label=f"{arm} {m['loss']:.3f}, {m['steps']} steps in {m['seconds']:.0f} s")
    best = min(arms, key=lambda arm: arms[arm]["loss"], default="none")
    curves.set(xlabel="training compute (TFLOP)", ylabel="validation loss (nats per character)",
               title=f"At equal training FLOPs {best} ends lowest")
    curves.legend()
    if "mod" in arms and cfg.routed:
        text, n = arms["mod"]["sample"][:-1], min(48, cfg.seq_len - 1)  # the last is no input
        grid = torch.full((cfg.n_layer, n), 0.3)
        grid[cfg.routed] = torch.tensor(arms["mod"]["sample_routing"])[:, -n:].float()
        sample.imshow(grid.numpy(), cmap="Blues", aspect="auto", vmin=0, vmax=1.1)
        sample.set_xticks(range(n), [repr(c)[1:-1] for c in text[-n:]], fontsize=10)
        sample.set(xlabel="characters of a decoded sample", ylabel="block (plain rows take all)",
                   title=f"Routed blocks take {arms['mod']['keep_rate']:.0%} of characters (dark)")
    for j, arm in enumerate(arm for arm in ("mod", "random") if "loss_gap" in arms.get(arm, {})):
        loss = [math.nan if v is None else v for v in arms[arm]["loss_by_passes"]]
        bars.bar([i + 0.4 * j for i in range(len(loss))], loss, 0.4, color=STYLES[arm]["color"],
                 hatch=["", "//"][j], label=f"{arm}, any - none: {arms[arm]['loss_gap']:+.2f}")
        bars.legend(loc="upper left")
    bars.set(xlabel="routed blocks entered by a character", ylabel="its loss (nats)", ymargin=0.3,
             title=f"Those who enter: {arms.get('mod', {}).get('loss_gap', math.nan):+.2f} nats")
    figure.supxlabel(f"{NAME}.py, seed {cfg.seed}, {results['environment']['device']}", fontsize=11)
    run.write(f"{NAME}.png", lambda file: figure.savefig(file, dpi=100))

# ---- 9. main -------------------------------------------------------------------------------------
def main(argv=None):
    """Runs what the command line says; returns what results.json holds."""
    with session(argv) as (cfg, run):
        text = load_corpus(cfg.corpus)
        corpus = dict(characters=len(text), sha256=hashlib.sha256(text.encode()).hexdigest())
        results = report(cfg, run, experiment(cfg, run), COLUMNS, CLAIMS, corpus=corpus)
        plot(cfg, run, results)
        return results

if __name__ == "__main__":
    main()
