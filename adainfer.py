"""AdaInfer: a frozen model reads its own answer after every block and stops when it looks final.

Fan et al., "Not All Layers of LLMs Are Necessary During Inference", arXiv 2403.02181.
Run: python adainfer.py (four minutes on two CPU cores).

Easy inputs have their answer after a few blocks, hard ones need all. AdaInfer leaves the weights
alone: after every block it reads the last position of the prompt through the model's own final
norm and head, and a linear classifier decides from a few numbers whether to stop there.

(1)  P_l = softmax(W norm(h_l))     after block l, at the last position
(2)  top_l = the largest entry of P_l,  gap_l = top_l minus the second largest
(3)  cos_l = cos(h_l, h_l-1)
(4)  y_l = 1 if argmax P_l = argmax P_L (agree; saturated: from l on) or the answer (gold), else 0
(5)  svm: min over w, b of 0.001/2 |w|^2 + mean of c max(0, 1 - t (w . z_l + b))^2,  t = 2 y_l - 1
(6)  stop after the first l with w . z_l + b > tau, else after L
(7)  crf: p(y | z) = exp s(y) / sum_y' exp s(y'),  s(y) = sum_l y_l (w . z_l + b) + A[y_l-1, y_l]
(8)  in place of w . z_l + b: log [p(y_l = 1 | z_1..l) / p(y_l = 0 | z_1..l)], from no later layer
(9)  tau: the lowest of 401 quantiles of the scores that costs validation <= `tolerance` points
(10) cost of a prompt: T l + rho looks, in layers at one position;  rho = 2 C V / (24 C^2 + 4 T C)

l layer of L `n_layer` | z features `z` | w . z_l + b `u` | h `x`, h_0 normed embedding | W `head`
c: both classes weigh the same | looks: heads computed | V `SIZE` | T `seq_len` | C `n_embd`
A scores pairs of labels (l > 1) | B batch, R rows that go on, N prompts, K thresholds, Q questions

What it shows (the oracle's row sees argmax P_L; without A0 all is void). Tasks: rule, a word's
partner | mood, a majority | recall, the next in a ring | recall+rule, its partner | sum, mod 10.
  A0 dense, worst task, percent        99.667 +- 0.236  needed >= 80, holds on 3 of 3
  A1 points: svm - dense               -0.449 +- 0.085  needed >= -1.0, holds on 3 of 3
  A1 layers saved, percent             21.036 +- 4.575  needed >= 15, holds on 3 of 3
  A2 mean exit: sum - mood, layers     4.491 +- 0.146  needed >= 1.5, holds on 3 of 3
  A2 mean exit: sum - rule, layers     1.596 +- 0.831  needed >= 1.5, holds on 2 of 3
  A3 points: svm - fixed exits         11.771 +- 3.525  needed >= 3, holds on 3 of 3
  A3 points: svm - random exits        11.130 +- 2.720  needed >= 5, holds on 3 of 3
  A4 time / dense - layers run         0.023 +- 0.014  needed <= 0.1, holds on 3 of 3
  A4 saved time / saved FLOPs          0.937 +- 0.068  needed >= 0.8, holds on 3 of 3
  A5 points: svm - smaller model       -0.436 +- 0.025  needed <= 0.0, holds on 3 of 3
A5 is a limit: `smaller`, with 3/4 of the layers, is trained alike. `gap`, tuned alike, needs no
classifier. Layer 1 answers rule, but the next ones hide it. Token by token, looks cost more than
they spare. Open in the paper: label, kernel, tau; KV of skipped blocks, here caught up later, as in
LayerSkip. Ours: smoothing and weight decay 1, without which few stop; c; the square; z as it is.
Exercises: 1. --no-smoothing --out out/sharp: gaps (left) and fixed exits (right)? What is saved?
2. --eval_only --tolerance 2: what does a point of accuracy buy? And --rule crf, --features cos?
New here: TASKS, SPLITS, EDGE, NODE, TAG, DIGIT, MOOD, FEEL, WORD, SIZE, FEATURES, LABELS,
AdaInfer, svm_loss, crf_loss, chain, fit_classifier, first_stop, sweep, decode_early, read_split,
fit_rules, measure, clock, compare, MARKS
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
    n_layer: int = 8                # transformer blocks
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # width of the residual stream
    seq_len: int = 14               # tokens in a training sequence
    tied: bool = False              # the head shares the weights of the embedding
    # method
    rule: Literal["svm", "crf", "gap"] = "svm"              # what stops in claims and timed runs
    features: Literal["gap", "gap+top", "cos", "all"] = "gap+top"       # seen by svm and crf
    label: Literal["agree", "gold", "saturated"] = "agree"  # what they learn, Eq. 4
    tolerance: float = 0.5          # points of accuracy that stopping may cost in validation
    smoothing: bool = True          # in training all tokens share a tenth of a target's mass
    # training
    steps: int = 1400               # optimiser steps; scaled where arms must cost the same
    batch_size: int = 128           # sequences in a step, over all processes
    lr: float = 3e-3                # peak learning rate
    warmup: int = 100               # steps until the learning rate peaks
    weight_decay: float = 1.0       # AdamW's decoupled weight decay
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

    inference = "rule", "features", "label", "tolerance"    # a checkpoint may differ in these

    def __post_init__(self):
        check_common(self)
        for low, name in (0, "tolerance"), (2, "n_layer"), (10, "batch_size"), (10, "seq_len"):
            at_least(self, low, name)

SMOKE = dict(n_layer=4, n_head=2, n_embd=16, seq_len=11, batch_size=16, steps=4, warmup=2, lr=1e-3,
             eval_every=2, eval_batches=1)

# ---- 2. Task -------------------------------------------------------------------------------------
TASKS, SPLITS = "rule mood recall recall+rule sum".split(), "train fit val test".split()
EDGE, NODE, TAG, DIGIT, MOOD, FEEL, WORD, SIZE = 0, 64, 72, 92, 102, 104, 110, 128      # first ids

def make_batch(cfg, split, step):
    """Prompts, targets (-100: none), tasks, from the arguments alone. A tag has four spellings, so
    that the ids of a prompt sum to the number of its split, mod 4: no prompt is in two of them."""
    B, n, part = cfg.batch_size, cfg.seq_len - 1, SPLITS.index(split)
    rng = torch.Generator().manual_seed((-part or cfg.seed) * 1_000_003 + step)
    row = torch.arange(B)                                               # (B,)
    below = lambda most, size: torch.randint(most, (B, size), generator=rng)    # uniform
    shuffled = lambda size: torch.rand(B, size, generator=rng).argsort(1)
    shares = torch.tensor([1] * 5 if part else [8, 12, 25, 31, 52]).cumsum(0)
    task = torch.bucketize((row + 0.5) / B, shares / shares[-1])    # (B,)

    rule = WORD + below(18, n)                                          # (B, n) the last asks
    mind, margin, rank = below(2, 1), 1 + below(8, 1), shuffled(n)
    fewer = below(n, 1) % ((n - margin) // 2 + 1)                       # (B, 1), of the other mind
    feel = FEEL + 2 * below(3, n) + torch.where(rank < fewer, 1 - mind, mind)
    mood = torch.where(rank < 2 * fewer + margin, feel, rule)           # (B, n) who prevails?
    ring, ask = shuffled(8), below(8, n - 8)    # Q = n - 8 questions about a ring of 8 nodes
    after = torch.zeros_like(ring).scatter(1, ring, ring.roll(-1, 1))   # (B, 8)
    edges = (8 * torch.arange(8) + after).gather(1, shuffled(8))        # (B, 8)
    recall = torch.cat([EDGE + edges, NODE + ask], dim=1)               # (B, n) all nodes ask
    last, digit = torch.arange(n) >= n - 1 - below(3, 1), below(10, n)  # (B, n)
    adds, digit = torch.where(last, DIGIT + digit, rule), digit * last  # (B, n) all digits ask
    body = torch.stack([rule, mood, recall, recall, adds])[task, row]   # (B, n)
    tag = TAG + 4 * task + (part - body.sum(1)) % 4                     # (B,)
    found = after.gather(1, ask)                                        # (B, Q)
    due = [WORD + (5 * (rule[:, -1:] - WORD) + 7) % 18, MOOD + mind, NODE + found,
           NODE + (5 * found + 3) % 8, torch.where(last, DIGIT + digit.cumsum(1) % 10, -100)]
    targets = torch.stack([F.pad(a, (n + 1 - a.size(1), 0), value=-100) for a in due])[task, row]
    return {"idx": torch.cat([tag[:, None], body], dim=1), "targets": targets, "task": task}

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
FEATURES = {"gap": [0], "gap+top": [0, 1], "cos": [2], "all": [0, 1, 2]}
LABELS = {"agree": lambda guess, gold: guess == guess[-1], "gold": torch.eq,
          "saturated": lambda guess, gold: (guess == guess[-1]).flip(0).cumprod(0).flip(0) > 0}

class AdaInfer(nn.Module):
    """A causal transformer that can answer after every block, though it never learned to."""
    def __init__(self, cfg):
        super().__init__()
        self.embed = nn.Embedding(SIZE, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = nn.Linear(cfg.n_embd, SIZE, bias=False)
        nn.init.zeros_(self.head.weight)
        if cfg.tied:
            self.head.weight = self.embed.weight
        rope = rope_table(cfg.seq_len, cfg.n_embd // cfg.n_head)        # (T, 2 * hs)
        self.register_buffer("rope", rope, persistent=False)

    def parts(self):
        """Parameters to clip apart from each other: all in one."""
        return [list(self.parameters())]

    def forward(self, idx):
        """The whole model, as it is trained: idx (B, T) -> logits (B, T, V)."""
        x = norm(self.embed(idx))                                       # (B, T, C)
        for block in self.blocks:
            x = block(x, self.rope)                                     # (B, T, C)
        return self.head(norm(x)).float()

    def look(self, x, before):
        """The answer (B,) and features (B, 3) after a block that made x (B, T, C) of `before`."""
        p = self.head(norm(x[:, -1])).float().softmax(-1)               # (B, V)  Eq. 1
        (top, second), (guess, _) = (pair.unbind(-1) for pair in p.topk(2))     # (B,)
        gap = top - second                                              # (B,)  Eq. 2
        cos = F.cosine_similarity(x[:, -1], before[:, -1], dim=-1).float()  # (B,)  Eq. 3
        return guess, torch.stack([gap, top, cos], dim=-1)

    @torch.no_grad()
    def infer(self, idx, rule=None, tau=math.inf, run=None):
        """Prompts (B, T) -> answers and exit layers (B,). A row that stops leaves the batch. A rule
        maps features z (l, R, 3) so far to scores (l, R); run(i, x) may replace block i."""
        x, L = norm(self.embed(idx)), len(self.blocks)                  # (B, T, C)
        rows, z = torch.arange(len(x), device=x.device), x.new_zeros(0, len(x), 3)
        answers, exits = rows.clone(), torch.full_like(rows, L)         # (B,)
        for i, block in enumerate(self.blocks):
            before, x = x, run(i, x) if run else block(x, self.rope)    # R rows are left
            if rule and i + 1 < L:
                guess, new = self.look(x, before)                       # (R,), (R, 3)
                z = torch.cat([z, new[None]])                           # (l, R, 3)
                stop = (rule(z)[-1] > tau).to(x.device)                 # (R,)  Eq. 6
                if stop.any():
                    answers[rows[stop]], exits[rows[stop]] = guess[stop], i + 1
                    rows, x, z = rows[~stop], x[~stop], z[:, ~stop]
                    if len(rows) == 0:
                        return answers, exits
        answers[rows] = self.head(norm(x[:, -1])).argmax(-1)
        return answers, exits

def svm_loss(u, y, A):
    """Squared hinge loss of u = w . z + b (l, N) for labels y; both classes have equal weight."""
    wrong = F.relu(1 - u[y]), F.relu(1 + u[~y])     # y = 1, where u should be large, and y = 0
    return sum(part.square().mean().nan_to_num() for part in wrong) / 2     # Eq. 5

def crf_loss(u, y, A):
    """Negative log-likelihood of the labels of a prompt."""
    score = (y * u).sum(0) + A[y[:-1].long(), y[1:].long()].sum(0)      # (N,)
    return (chain(u, A)[-1].logsumexp(-1) - score).mean()               # Eq. 7

def chain(u, A):
    """log of the sum of exp score over the labels of layers 1..l, by the last one. (l, N, 2)"""
    logs = itertools.accumulate(F.pad(u[..., None], (1, 0)), lambda past, new:
                                new + (past[..., None] + A).logsumexp(-2))
    return torch.stack([*logs])

def fit_classifier(loss, z, y, features):
    """A rule learned from features z (l, N, 3) and labels y (l, N), by L-BFGS in float64."""
    at, sizes = FEATURES[features], ((len(FEATURES[features]),), (), (2, 2))
    w, b, A = params = [torch.zeros(size, dtype=torch.double, requires_grad=True) for size in sizes]
    fit = torch.optim.LBFGS(params, max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")
    score = lambda z: z[..., at].cpu().double() @ w + b
    filtered = lambda z: chain(score(z), A).diff()[..., 0]              # Eq. 8

    def closure():
        fit.zero_grad()
        value = loss(score(z), y, A) + 0.0005 * w.square().sum()    # the |w|^2 of Eq. 5; crf, too
        value.backward()
        return value

    fit.step(closure)
    return torch.no_grad()(filtered if loss is crf_loss else score)

def first_stop(stop):
    """Exit layers (N,) that `infer` would find, from decisions (L - 1, N): the first yes, or L."""
    return F.pad(stop, (0, 0, 0, 1), value=True).int().argmax(0) + 1

def sweep(scores, right):
    """Thresholds from all to nothing stops, the depths and percents right they give. (3, K)"""
    taus = scores.double().flatten().quantile(torch.linspace(0, 1, 401).double())       # (K,)
    exits = torch.stack([first_stop(scores > tau) for tau in taus])     # (K, N)
    hits = right.gather(0, exits - 1)                                   # (K, N)
    return torch.stack([taus, exits.double().mean(1), 100 * hits.double().mean(1)])

# ---- 5. Objective and decoding -------------------------------------------------------------------
def loss_fn(model, batch, cfg):
    """Smoothed cross-entropy in nats, averaged over the supervised positions: loss, stats."""
    logits, targets = model(batch["idx"]), batch["targets"]             # (B, T, V), (B, T)
    nll = F.cross_entropy(logits.mT, targets, reduction="none", label_smoothing=0.1 * cfg.smoothing)
    loss = (nll.sum(1) / (targets >= 0).sum(1)).mean()
    return loss, {"loss": loss.detach()}

def decode_early(model, idx, start, rule=None, tau=math.inf):
    """Answers and exit layers of one prompt (1, T) that comes as `start` tokens, then one by one.
    Tokens wait where they stopped; the first that goes on takes them along: the cache is exact."""
    waiting, past = [[] for _ in range(len(model.blocks) + 1)], [[] for _ in model.blocks]

    def run(i, x):
        def memory(k, v):
            past[i].append((k, v))
            keys, values = (torch.cat(part, dim=2) for part in zip(*past[i]))   # (1, nh, t, hs)
            mask = torch.ones(k.size(2), keys.size(2), device=k.device)         # (n, t)
            return keys, values, mask.tril(keys.size(2) - k.size(2)) > 0

        x, at = torch.cat(waiting[i] or [x], dim=1), sum(k.size(2) for k, _ in past[i])
        x = model.blocks[i](x, model.rope[at : at + x.size(1)], memory)         # (1, n, C)
        waiting[i], waiting[i + 1] = [], [*waiting[i + 1], x]
        return x

    parts = idx.split([start, *[1] * (idx.size(1) - start)], dim=1)
    return [torch.cat(pair) for pair in zip(*(model.infer(part, rule, tau, run) for part in parts))]

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
    """Loss in nats on validation prompts."""
    losses = [loss_fn(model, run.to_device(make_batch(cfg, "val", i)), cfg)[0]
              for i in range(cfg.eval_batches)]
    return {"loss": torch.stack(losses).mean().item()}

@torch.no_grad()
def read_split(model, blocks, cfg, run, split, n_batches):
    """Prompts, the answers (L, N) to them after each of these blocks, and features (L, N, 3)."""
    batches, looks = [make_batch(cfg, split, i) for i in range(n_batches)], []
    data = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    x = norm(model.embed(data["idx"].to(run.device)))                   # (N, T, C)
    for block in blocks:
        before, x = x, block(x, model.rope)                             # (N, T, C)
        looks.append(model.look(x, before))
    guess, z = (torch.stack(part).cpu() for part in zip(*looks))        # (L, N), (L, N, 3)
    return data | {"guess": guess, "z": z, "right": guess == data["targets"][:, -1]}

def fit_rules(fit, val, cfg):
    """{name: (rule, tau)}: learned from some prompts, with thresholds from others."""
    y = LABELS[cfg.label](fit["guess"], fit["targets"][:, -1])          # (L, N)  Eq. 4
    learn = lambda loss: fit_classifier(loss, fit["z"][:-1], y[:-1], cfg.features)
    rules = {"svm": learn(svm_loss), "crf": learn(crf_loss), "gap": lambda z: z[..., 0]}
    plain = {"svm, tau = 0": (rules["svm"], 0.0), "gap, tau = 0.8": (rules["gap"], 0.8)}
    for name, rule in rules.items():
        taus, _, accuracy = sweep(rule(val["z"][:-1]), val["right"])    # (K,)
        best = (accuracy >= accuracy[-1] - cfg.tolerance).int().argmax()
        rules[name] = rule, taus[best].item()                           # Eq. 9
    return rules | plain

def measure(exits, data, dense, cfg, checked=False):
    """Exit layers (N,) in numbers; dense (N,): the whole model's answers; Llama-2-7B: rho 0.648."""
    T, C, at, depth = cfg.seq_len, cfg.n_embd, exits[None] - 1, exits.double()      # (1, N), (N,)
    right, agree = (100 * hit.gather(0, at)[0].double()
                    for hit in (data["right"], data["guess"] == dense))     # (N,)
    row = dict(accuracy=right.mean().item(), agreement=agree.mean().item(), sd=depth.std().item(),
               layers=depth.mean().item(), saved=100 - 100 * depth.mean().item() / cfg.n_layer)
    for name, rho in ("flops", 2 * C * SIZE * T / block_flops(T, C)), ("llama_flops", 0.648):
        cost = T * row["layers"] + rho * (row["layers"] if checked else 1)      # Eq. 10
        row[name] = cost / (T * cfg.n_layer + rho)
    row["worst"] = min(right[data["task"] == t].mean().item() for t in range(len(TASKS)))
    return row | {name: depth[data["task"] == t].mean().item() for t, name in enumerate(TASKS)}

def clock(model, idx, rule, tau):
    """Median ms without and with stops, and ratio: in one batch; token by token for 8 prompts."""
    found, read = {}, lambda pairs: [answers.tolist() for answers, _ in pairs]  # waits for a GPU
    ways = {"ms": lambda *by: read([model.infer(idx, *by)]), "ms_decode":
            lambda *by: read(decode_early(model, x, 10, *by) for x in idx[:8, None])}   # (1, T)
    for name, way in ways.items():      # in turn, so that a slow moment meets both
        ms = torch.tensor([[1e3 * timeit.timeit(lambda: way(*by), number=1)
                            for by in ((), (rule, tau))] for _ in range(40)])       # (40, 2)
        ms = torch.cat([ms, ms[:, 1:] / ms[:, :1]], dim=1).median(0).values         # (3,)
        found |= dict(zip((f"{name}_dense", f"{name}_stop", f"{name}_ratio"), ms.tolist()))
    return found

def compare(model, cfg, run):
    """All ways to stop on the test prompts. What they need to know comes from other prompts."""
    sizes = [(split, n * cfg.eval_batches) for split, n in [("fit", 2), ("val", 8), ("test", 20)]]
    fit, val, test = (read_split(model, model.blocks, cfg, run, *size) for size in sizes)
    rules, rng, L = fit_rules(fit, val, cfg), torch.Generator().manual_seed(0), cfg.n_layer
    (rule, tau), task, dense = rules[cfg.rule], test["task"], test["guess"][-1]     # (N,)
    scores = {name: rule(test["z"][:-1]) for name, (rule, _) in rules.items()}
    stops = {name: first_stop(scores[name] > tau) for name, (_, tau) in rules.items()}
    exits, full, n = stops[cfg.rule], torch.full_like(task, L), len(task)       # (N,)
    at, u = torch.randperm(n, generator=rng), torch.rand(n, generator=rng)      # (N,)
    right = [val["right"][:, val["task"] == t].double().mean(1) for t in range(len(TASKS))]
    short = 100 * torch.stack([r[-1] - r for r in right])   # (5, L) of the last layer, in points
    ways = {"oracle, sees the answer": first_stop(test["guess"][:-1] == dense), "dense": full,
            **stops, **{f"fixed {i}": full - L + i for i in range(1, L)}, "random exits": exits[at],
            "fixed, as deep": (exits.double().mean() + u).long(),   # floored: the mean stays
            "fixed, sees the task": (short <= cfg.tolerance).int().argmax(1)[task] + 1}
    rows = {name: measure(way, test, dense, cfg, name in rules) for name, way in ways.items()}
    kept = fit["z"][..., 2].mean(1).argsort()[:-1].sort().values    # ShortGPT: the largest cos goes
    cut = read_split(model, [model.blocks[i] for i in kept], cfg, run, *sizes[2])
    rows["one block cut"] = measure(full - 1, cut, dense, cfg)
    lead = {f"over {k}": rows[cfg.rule]["accuracy"] - m["accuracy"] for k, m in rows.items()}
    ms = clock(model, test["idx"][at[:1024]].to(run.device), rule, tau)
    return {**rows[cfg.rule], **lead, **ms, "rows": rows,
            "curves": {w: sweep(scores[w], test["right"])[1:].tolist() for w in ("svm", "gap")},
            "gaps": [test["z"][:, task == t, 0].mean(1).tolist() for t in range(len(TASKS))]}

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
    """Trains the model and a smaller one, and stops both early. Returns {arm: metrics}."""
    results, arms = {}, {"adainfer": {}, "smaller": dict(n_layer=max(2, 3 * cfg.n_layer // 4))}
    arms |= {"tied": dict(tied=True)} if cfg.full else {}
    arms = {arm: scale(replace(cfg, **changes), 1) for arm, changes in arms.items()}
    for arm, c in select(arms, cfg, run).items():
        torch.manual_seed(cfg.seed)
        model = AdaInfer(c).to(run.device)
        rows = train(arm, model, c, run)
        results[arm] = dict(params=sum(p.numel() for p in model.parameters()), steps=c.steps,
                            seconds=rows[-1]["seconds"], **compare(model, c, run), history=rows)
    return results

COLUMNS = "seconds accuracy layers flops ms_dense ms_stop ms_decode_dense ms_decode_stop".split()
CLAIMS = [  # name, measured from the arms, relation, needed; svm: what --rule names
    ("A0 dense, worst task, percent", lambda a: a["adainfer"]["rows"]["dense"]["worst"], ">=", 80),
    ("A1 points: svm - dense", lambda a: a["adainfer"]["over dense"], ">=", -1.0),
    ("A1 layers saved, percent", lambda a: a["adainfer"]["saved"], ">=", 15),
    ("A2 mean exit: sum - mood", lambda a: a["adainfer"]["sum"] - a["adainfer"]["mood"], ">=", 1.5),
    ("A2 mean exit: sum - rule", lambda a: a["adainfer"]["sum"] - a["adainfer"]["rule"], ">=", 1.5),
    ("A3 points: svm - fixed exits", lambda a: a["adainfer"]["over fixed, as deep"], ">=", 3),
    ("A3 points: svm - random exits", lambda a: a["adainfer"]["over random exits"], ">=", 5),
    ("A4 time / dense - share of layers run",
     lambda a: a["adainfer"]["ms_ratio"] - 1 + a["adainfer"]["saved"] / 100, "<=", 0.1),
    ("A4 saved time / saved FLOPs", lambda a: (1 - a["adainfer"]["ms_ratio"])
     / (1 - a["adainfer"]["flops"]) * (a["adainfer"]["flops"] < 1), ">=", 0.8),
    ("A5 points: svm - smaller model, not promised",
     lambda a: a["adainfer"]["accuracy"] - a["smaller"]["rows"]["dense"]["accuracy"], "<=", 0.0),
]
STYLES = {  # the same colour for the same role in every script, and a second cue
    "svm": dict(color="#0072b2", linestyle="-", linewidth=4),
    "gap": dict(color="#56b4e9", linestyle="--", linewidth=2.5),
    "fixed exits": dict(color="#e69f00", linestyle="-.", linewidth=2.5, marker="s"),
} | {task: dict(color=color, marker=mark, linewidth=3) for task, color, mark in zip(
    TASKS, "#0072b2 #e69f00 #009e73 #d55e00 #cc79a7".split(), "os^Dv")}
MARKS = {"dense": "*", "svm": "o", "crf": "p", "gap, tau = 0.8": "P", "random exits": "v",
         "one block cut": "X", "smaller model": "D", "oracle, sees the answer": "^"}

@matplotlib.rc_context({"font.size": 14, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: how sure a layer is of its answer, and what stopping early costs."""
    arms, figure = results["arms"], Figure(figsize=(18, 8))
    m, (sure, trade) = arms.get(NAME) or next(iter(arms.values())), figure.subplots(1, 2)
    layers = range(1, len(m["gaps"][0]) + 1)
    for task, gaps in zip(TASKS, m["gaps"]):
        sure.plot(layers, gaps, label=f"{task}: stops after {m[task]:.1f}", **STYLES[task])
    sure.set(xlabel="layer", ylabel="gap of the two likeliest answers (mean)", ylim=(0, 1.02),
             title=f"{cfg.rule} stops mood after {m['mood']:.1f}, sum after {m['sum']:.1f} layers")
    levels = [m["rows"].get(f"fixed {i}", m["rows"]["dense"])["accuracy"] for i in layers]
    for way, points in {**m["curves"], "fixed exits": (layers, levels)}.items():
        trade.plot(*points, label=way, **STYLES[way])
    points = m["rows"] | {f"{arm} model": a["rows"]["dense"] for arm, a in arms.items()}
    for name in [name for name in MARKS if name in points]:
        x, y = points[name]["layers"], points[name]["accuracy"]
        trade.plot(x, y, MARKS[name], color="#000000", ms=12, label=f"{name}: {y:.1f} % at {x:.1f}")
    trade.axhline(20 * (1 / 18 + 1 / 2 + 2 / 7 + 1 / 10), color="#999999", ls=":", label="guessing")
    trade.set(xlabel="mean layers run per prompt", ylabel="test accuracy (%)",
              title=f"{cfg.rule}: {m['over fixed, as deep']:+.1f} points over fixed exits")
    sure.legend()
    trade.legend(fontsize=12)
    figure.supxlabel(f"{NAME}.py, seed {cfg.seed}, {results['environment']['device']}", fontsize=11)
    run.write(f"{NAME}.png", lambda file: figure.savefig(file, dpi=100))

# ---- 9. main -------------------------------------------------------------------------------------
def main(argv=None):
    """Runs what the command line says; returns what results.json holds."""
    with session(argv) as (cfg, run):
        arms = experiment(cfg, run)
        for arm, m in arms.items() if run.rank == 0 else ():
            print(table([{arm: name, **row} for name, row in m["rows"].items()]) + "\n")
        results = report(cfg, run, arms, COLUMNS, CLAIMS)
        plot(cfg, run, results)
        return results

if __name__ == "__main__":
    main()
