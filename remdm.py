"""ReMDM: a masked diffusion model may mask a token again and repair it, without being retrained.

Wang, Schiff, Sahoo, Kuleshov, "Remasking Discrete Diffusion Models with Inference-Time Scaling",
arXiv 2503.00307. Run: python remdm.py (three minutes on two CPU cores).

Masked diffusion (MDLM) starts from masks only and unmasks tokens in random order, each drawn from
what the network says at that moment. A mistake made early, when little was visible, stays. ReMDM
masks a visible token again with probability sigma and unmasks others more often, such that the
share of masks at every time stays what it was. The network needs no training for it.

(1)  q(z_t | x) = alpha_t [x] + (1 - alpha_t) [m] at every position; log-linear: alpha_t = 1 - t
(2)  x_theta(z) = [z] where z != m, else softmax(logits), never m (SUBS)
(3)  NELBO = E_t (1/t) mean over L of -log x_theta(z_t)[x] at masks;  1/t = -alpha' / (1 - alpha)
(4)        = E_n (L/n) mean of the same;  n uniform in 1..L, n random positions masked: no 1/t
(5)  from t to s < t: a visible token is masked with probability sigma, a mask is decoded with
     probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)
(6)  sigma <= min(1, (1 - alpha_s) / alpha_t)
(7)  sigma: mdlm 0 | cap eta | rescale eta times the bound (6) | fb (alpha_s - alpha_t) / alpha_t
(8)  switch: cap once t <= t_on | loop: cap if t_off < t <= t_on; alpha: alpha_on there, else linear
(9)  conf: sigma^l = w^l sigma (cap), w = softmax(-psi) over the visible tokens, psi = x_theta(z)[x]
     when x was decoded | mean-conf, not in the paper: this times the visible tokens, at most 1
(10) floor: the least NELBO of a network that sees R tokens far = E_t H(x_l | visible within R)

x `targets` | z_t `idx`, `z` | m = V, the number of symbols | psi `psi` | L (T in shapes) `seq_len`
C `n_embd` | B batch | R = n_layer * window | NFE: calls per sequence | T=512: `n_denoise` steps

What it shows (seeds 1-3). The source is known: x_{l+1} = x_l + 1, or with chance 0.1 any. Errors:
jumps, steps other than +1; 5.775 per sequence are right. A window stands in for limited capacity:
with reach 2 the network guesses while most tokens are masked and is nearly exact when few are.
  C0 (loss - floor) / standard error   10.953 +- 0.953  needed >= -3, holds on 3 of 3
  C0 loss / floor - 1                   0.007 +- 0.001  needed <= 0.01, holds on 3 of 3
  C1 mdlm, jumps at T=512 / T=64        0.985 +- 0.021  needed >= 0.93, holds on 3 of 3
  C2 jumps at T=512, cap / mdlm         0.731 +- 0.010  needed <= 0.8, holds on 3 of 3
  C2 cap, rise when T doubles          -0.953 +- 0.008  needed <= 0.6, holds on 3 of 3
  C3 fb, jumps at T=512 / T=64          0.984 +- 0.030  needed >= 0.9, holds on 3 of 3
  C4 exact denoiser: jumps saved        0.078 +- 0.046  needed <= 0.5, holds on 3 of 3
  C4 exact, mean-conf at T=512          4.214 +- 0.095  needed <= 5.3, holds on 3 of 3
C2 is not free: at T=512 cap makes 372 calls, mdlm 60 (15.0 jumps); with 57 (T=64) cap has 14.1.

What the paper leaves open. Where fb and loop leave (6) they are clipped. Only sequences that decode
something call the network, and NFE counts that (the code, kuleshov-group/remdm, diffusion.py, skips
steps that changed nothing). Literal conf loses (1): masks know nothing of sigma. A race in float64
draws tokens: in float32 rare ones never win (arXiv 2409.02908). Left out: DFM, guidance, images.

Exercises: 1. --eval_only --top_p 0.9: the exact denoiser jumps less than the truth. And distinct?
2. --lab: exact denoisers of brackets, one blind early on; only here rescale, switch and conf run.
Where does repair help? 3. --window 0 --out out/wide: all tokens are seen. What is left to repair?

New here: TYPES, DEPTH, OPEN, NOISE, STACKS, bracket_moves, bracket_posterior, bracket_errors, MDLM,
SAMPLERS, remask_schedule, nucleus, reverse_step, reverse_process, sample_all, jumps
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
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
    n_layer: int = 2                # transformer blocks
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # width of the residual stream
    seq_len: int = 64               # tokens in a training sequence
    window: int = 1                 # neighbours seen on a side in every layer (0: all tokens)
    # method
    n_denoise: int = 512            # denoising steps; also a half, a quarter and less of them
    n_sample: int = 128             # sequences that a sampler draws
    eta: float = 0.05               # chance that a step masks a visible token (rescale: times (6))
    t_on: float = 0.55              # loop and switch begin to remask (time runs from 1 to 0)
    t_off: float = 0.05             # loop ends
    alpha_on: float = 0.9           # share of visible tokens during the loop
    top_p: float = 1.0              # nucleus: draw from the most likely tokens only (1: from all)
    lab: bool = False               # no training: exact and weak denoisers, n_sample // 4 + 1 each
    rho: float = 0.6                # lab: how much the weak denoiser of brackets overlooks
    # training
    steps: int = 600                # optimiser steps; scaled where arms must cost the same
    batch_size: int = 128           # sequences in a step, over all processes
    lr: float = 6e-3                # peak learning rate
    warmup: int = 100               # steps until the learning rate peaks
    weight_decay: float = 0.0       # AdamW's decoupled weight decay
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

    inference = tuple("n_denoise n_sample eta t_on t_off alpha_on top_p rho".split())

    def __post_init__(self):
        check_common(self)
        at_least(self, 0, "window eta rho")
        at_least(self, 1e-9, "n_denoise n_sample seed t_off t_on alpha_on top_p")
        at_least(self, 2, "seq_len")
        for name in "t_off t_on eta alpha_on top_p rho".split():
            if getattr(self, name) > 1 or self.t_off >= self.t_on:
                raise ValueError(f"{name}={getattr(self, name)} must be at most 1, and t_off="
                                 f"{self.t_off} below t_on={self.t_on}")

SMOKE = dict(n_layer=2, n_head=2, n_embd=16, seq_len=16, batch_size=16, steps=4, warmup=2,
             lr=1e-3, eval_every=2, eval_batches=1, n_denoise=16, n_sample=8)

# ---- 2. Task -------------------------------------------------------------------------------------
SYMBOLS, JUMP = 12, 0.1     # relay: x_{l+1} = x_l + 1, or with chance JUMP any, also x_l + 1

def relay_sample(n, L, rng):
    """n sequences of length L. (n, L)"""
    jump = torch.rand(n, L, generator=rng, dtype=torch.float64) < JUMP
    jump[:, 0] = True
    return torch.where(jump, torch.randint(SYMBOLS, (n, L), generator=rng), 1).cumsum(1) % SYMBOLS

def relay_kernel(at, keep):
    """Probabilities of a symbol that is `at` with probability keep, else anything. (..., V)"""
    hit = at[..., None] == torch.arange(SYMBOLS, device=at.device)
    return keep[..., None] * hit + (1 - keep[..., None]) / SYMBOLS

def relay_posterior(z, reach):
    """p(x | nearest visible tokens of z within reach), exactly. (B, T) -> (B, T, V)"""
    at, seen, p = torch.arange(z.size(1), device=z.device), z < SYMBOLS, 1.0
    left = torch.where(seen, at, -(10**6)).cummax(1).values             # (B, T)
    right = torch.where(seen, at, 10**6).flip(1).cummin(1).values.flip(1)       # (B, T)
    for nearest in (left, right):
        away = at - nearest                                             # (B, T)
        keep = (1 - JUMP) ** away.abs().double() * (away.abs() <= reach)        # (B, T)
        guess = z.gather(1, nearest.clamp(0, z.size(1) - 1)) + away     # (B, T)
        p = p * relay_kernel(guess % SYMBOLS, keep)                     # (B, T, V)
    return p / p.sum(-1, keepdim=True)

@functools.cache
def relay_floor(L, reach):
    """The expected NELBO per token of that posterior: E_t H(x_l | visible tokens within reach)."""
    t, weight = map(torch.tensor, np.polynomial.legendre.leggauss(L + 1))       # (Q,) points of t
    t, room = (t[:, None, None] + 1) / 2, torch.arange(L)[:, None].clamp(max=reach)     # (L, 1)
    a = torch.arange(1, reach + 2)                                      # (R + 1,)
    left = torch.where(a <= room, (1 - t) * t ** (a - 1), 0)            # (Q, L, R + 1)
    left[..., -1:] = t**room        # nothing visible in reach: the last of the distances
    seen = relay_kernel(a % SYMBOLS, (1 - JUMP) ** a.double() * (a <= reach))   # (R + 1, V)
    step = torch.arange(SYMBOLS)[:, None] - torch.arange(SYMBOLS)       # (V, V)
    both = seen[:, None, None] * seen[:, step % SYMBOLS]                # (R + 1, R + 1, V, V)
    H = both.sum(-1).xlogy(both.sum(-1)).sum(-1) - both.xlogy(both).sum((-1, -2))
    return (weight @ (left @ H * left.flip(1)).sum((1, 2))).item() / (2 * L)

def relay_errors(x):
    """Jumps of every sequence: steps other than +1. (B,)"""
    return ((x[:, 1:] - x[:, :-1]) % SYMBOLS != 1).sum(1)

TYPES, DEPTH, OPEN, NOISE = 3, 2, 0.55, 1e-3    # brackets: inside, one opens with chance OPEN
STACKS = [s for d in range(DEPTH + 1) for s in itertools.product(range(TYPES), repeat=d)]

@functools.cache
def bracket_moves():
    """P(token v, new stack r | stack s), the end unknown. (V, S, S), S stacks; v < TYPES opens."""
    moves = torch.zeros(2 * TYPES, len(STACKS), len(STACKS), dtype=torch.float64)
    for (i, s), (j, r) in itertools.product(enumerate(STACKS), repeat=2):
        if r and r[:-1] == s:
            moves[r[-1], i, j] = (OPEN if s else 1) / TYPES
        if s and s[:-1] == r:
            moves[TYPES + s[-1], i, j] = 1 - OPEN if len(s) < DEPTH else 1
    return moves

def bracket_posterior(z, rho):
    """p(token | visible tokens, balanced end), by messages from both ends. (B, T) -> (B, T, V)
    Tokens are overlooked with chance rho times the share of masks, and wrong with chance NOISE."""
    (V, S, _), moves = bracket_moves().shape, bracket_moves()
    seen = torch.rand(z.shape) >= rho * (z == V).double().mean(1, keepdim=True)
    hit = (z[..., None] == torch.arange(V)).double() * (1 - NOISE) + NOISE / V
    evidence = torch.where((seen & (z < V))[..., None], hit, 1.0)
    step = torch.einsum("btv,vsr->tbsr", evidence, moves)
    ahead = [torch.eye(S, dtype=torch.float64)[:1].expand(len(z), 1, S)]
    back = [ahead[0].mT]
    for i in range(z.size(1) - 1):
        ahead.append(F.normalize(ahead[-1] @ step[i], p=1, dim=2))
        back.append(F.normalize(step[-1 - i] @ back[-1], p=1, dim=1))
    p = torch.einsum("bts,vsr,brt->btv", torch.cat(ahead, 1), moves, torch.cat(back[::-1], 2))
    return F.normalize(p, p=1, dim=2)

def bracket_errors(x):
    """Violations: tokens that the stack forbids (closing ones still close), what is left open."""
    moves, stack, wrong = bracket_moves(), *torch.zeros_like(x[:, :2]).unbind(1)
    for token in x.unbind(1):
        chance, after = moves[token, stack].max(1)
        other = torch.where(token < TYPES, stack, moves[TYPES:, stack].sum(0).argmax(1))
        stack, wrong = torch.where(chance > 0, after, other), wrong + (chance == 0)
    return wrong + torch.tensor([len(s) for s in STACKS])[stack]

def make_batch(cfg, split, step):
    """Masked sequences, the sequences, their weights L/n: a function of the arguments alone."""
    (B, L), draw = (cfg.batch_size, cfg.seq_len), functools.partial(torch.rand, dtype=torch.float64)
    rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step if split == "train" else step)
    x = relay_sample(B, L, rng)                                         # (B, L)
    u = (torch.arange(B) + draw(B, generator=rng)) / B                  # (B,), stratified
    n = 1 + (L * u).long().clamp(max=L - 1)                             # (B,)
    rank = draw(B, L, generator=rng).argsort(1).argsort(1)              # (B, L)
    z = torch.where(rank < n[:, None], SYMBOLS, x)                      # (B, L)  Eq. 4
    return {"idx": z, "targets": x, "weight": L / n}                    # Eq. 4

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
class MDLM(nn.Module):
    """A transformer that says what each masked token is. It sees both sides, but not the time."""
    def __init__(self, cfg):
        super().__init__()
        T, C = cfg.seq_len, cfg.n_embd
        self.embed = nn.Embedding(SYMBOLS + 1, C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = nn.Linear(C, SYMBOLS, bias=False)       # no logit for the mask
        nn.init.zeros_(self.head.weight)
        near = (torch.arange(T)[:, None] - torch.arange(T)).abs() <= (cfg.window or T)  # (T, T)
        self.register_buffer("near", near, persistent=False)
        self.register_buffer("rope", rope_table(T, C // cfg.n_head), persistent=False)

    def parts(self):
        """Parameters to clip apart from each other: all in one."""
        return [list(self.parameters())]

    def forward(self, z):
        """Partly masked tokens z (B, T) -> log x_theta (B, T, V)."""
        x = norm(self.embed(z))                                         # (B, T, C)
        for block in self.blocks:
            x = block(x, self.rope, lambda k, v: (k, v, self.near))     # (B, T, C)
        logp = self.head(norm(x)).float().log_softmax(-1)               # (B, T, V)
        same = z[..., None] == torch.arange(SYMBOLS, device=z.device)   # (B, T, V)
        return torch.where(z[..., None] == SYMBOLS, logp, torch.where(same, 0, -math.inf))  # Eq. 2

SAMPLERS = "mdlm fb cap loop mean-conf rescale switch conf".split()

def remask_schedule(sampler, cfg):
    """For every step: the chance of a mask to be decoded, and of a visible token to be masked."""
    grid = torch.linspace(1, 0, cfg.n_denoise + 1, dtype=torch.float64)
    t, alpha = grid[:-1], 1 - grid                                      # Eq. 1
    window = {"switch": t <= cfg.t_on, "loop": (cfg.t_off < t) & (t <= cfg.t_on)}       # Eq. 8
    if sampler == "loop":
        rest = [0, cfg.t_off, cfg.t_on, 1], [1, cfg.alpha_on, cfg.alpha_on, 0]
        alpha = torch.from_numpy(np.interp(grid.numpy(), *rest))        # (n + 1,)  Eq. 8
    alpha_t, alpha_s = alpha[:-1].clamp(min=1e-15), alpha[1:]           # (n,)
    bound, fb = ((1 - alpha_s) / alpha_t).clamp(max=1), (alpha_s - alpha_t) / alpha_t   # Eq. 6
    own = {"mdlm": 0 * t, "rescale": cfg.eta * bound, "fb": fb}
    sigma = own.get(sampler, cfg.eta + 0 * t).minimum(bound) * window.get(sampler, 1)   # Eq. 7
    known = 0 if sampler == "conf" else sigma       # what masks know of sigma
    return ((alpha_s - (1 - known) * alpha_t) / (1 - alpha_t)).clamp(0, 1), sigma   # Eq. 5

def nucleus(p, top_p):
    """Keeps the most likely tokens as long as their total is at most top_p, and always one."""
    best, token = p.sort(dim=-1, descending=True)
    keep = (best.cumsum(-1) <= top_p) | (torch.arange(p.size(-1), device=p.device) == 0)
    p = torch.where(keep, best, 0).gather(-1, token.argsort(-1))
    return p / p.sum(-1, keepdim=True)

def reverse_step(z, psi, p, decode, sigma, u, sampler):
    """One step: new z and psi (B, T), from p = x_theta(z) and noise u. One graph fits all steps."""
    masked = z == p.size(-1)                                            # (B, T)
    if sampler in ("conf", "mean-conf"):
        w = (-psi).softmax(1).nan_to_num()      # psi is infinite at masks; all are masked: 0
        n = 1 if sampler == "conf" else (~masked).sum(1, keepdim=True)
        sigma = (w * sigma * n).clamp(max=1)                            # (B, T)  Eq. 9
    token = (p / -u[..., 2:].log()).argmax(-1)      # (B, T): a race of exponential times
    shown, hidden = masked & (u[..., 0] < decode), ~masked & (u[..., 1] < sigma)    # Eq. 5
    psi = psi.where(~shown, p.gather(-1, token[..., None])[..., 0]).masked_fill(hidden, math.inf)
    return torch.where(shown, token, z).masked_fill(hidden, p.size(-1)), psi

# ---- 5. Objective and decoding -------------------------------------------------------------------
def sequence_nelbo(logp, batch):
    """NELBO per token of every sequence, from log-probabilities logp (B, T, V). (B,)"""
    nll = -logp.gather(-1, batch["targets"][..., None]).squeeze(-1)     # (B, T)
    return batch["weight"] * torch.where(batch["idx"] == logp.size(-1), nll, 0.0).mean(1)

def loss_fn(model, batch, cfg):
    """NELBO in nats per token: loss, stats."""
    loss = sequence_nelbo(model(batch["idx"]), batch).mean()            # Eq. 3, by Eq. 4
    return loss, {"loss": loss.detach()}

@torch.no_grad()
def reverse_process(denoise, V, sampler, cfg, device):
    """Samples, and how many calls of `denoise` one needs on average: only where it decodes."""
    torch.manual_seed(cfg.seed)
    wide = torch.float32 if device.type == "mps" else torch.float64     # Apple's GPUs lack it
    z = torch.full((cfg.n_sample, cfg.seq_len), V, device=device)       # (B, T)
    psi = torch.full_like(z, math.inf, dtype=wide)                      # (B, T)
    p, calls = torch.ones(*z.shape, V, dtype=wide, device=device), 0    # (B, T, V)
    for decode, sigma in zip(*(s.to(device, wide) for s in remask_schedule(sampler, cfg))):
        u = torch.rand(*z.shape, V + 2, dtype=wide, device=device)      # (B, T, V + 2)
        rows = ((z == V) & (u[..., 0] < decode)).any(1).nonzero().squeeze(1)    # (rows,)
        if len(rows):
            p[rows] = denoise(z[rows]).to(wide)                         # (rows, T, V)
            if cfg.top_p < 1:
                p[rows] = nucleus(p[rows], cfg.top_p)                   # (rows, T, V)
        z, psi = reverse_step(z, psi, p, decode, sigma, u, sampler)     # (B, T)
        calls += len(rows)
    return z.cpu(), calls / len(z)

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
def control_variate(values, controls):
    """Mean of values and its standard error; controls (N, K) of known mean 0 take chance out."""
    X = torch.cat([torch.ones_like(controls[:, :1]), controls], dim=1)  # (N, K + 1)
    solve = torch.linalg.pinv(X)                                        # (K + 1, N)
    rest = values - X @ (solve @ values)                                # (N,)
    variance = rest.square().sum() / max(1, len(values) - X.size(1))
    return (solve[0] @ values).item(), (variance * solve[0].square().sum()).sqrt().item()

@torch.no_grad()
def evaluate(model, cfg, run):
    """NELBO in nats per token and its standard error; exact denoisers of known reach control it."""
    losses, reaches = [], (1, 2, 4, 8, cfg.seq_len)
    for i in range(cfg.eval_batches):
        batch = make_batch(cfg, "val", i)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            logp = model(batch["idx"].to(run.device)).cpu().double()    # (B, T, V)
        known = [relay_posterior(batch["idx"], reach).log() for reach in reaches]
        losses.append(torch.stack([sequence_nelbo(p, batch) for p in (logp, *known)]))  # (K + 1, B)
    loss, *known = torch.cat(losses, dim=1)                             # (N,)
    chance = [nelbo - relay_floor(cfg.seq_len, reach) for nelbo, reach in zip(known, reaches)]
    return dict(zip(("loss", "loss_se"), control_variate(loss, torch.stack(chance, dim=1))))

def sample_all(denoisers, samplers, cfg, run):
    """{"denoiser sampler T": what its samples are like}, for all of them and four lengths T."""
    relay = SYMBOLS, relay_errors, (cfg.seq_len - 1) * JUMP * (1 - 1 / SYMBOLS)
    V, count, truth = (2 * TYPES, bracket_errors, 0.0) if cfg.lab else relay
    rows, lengths = {}, sorted({max(1, cfg.n_denoise // part) for part in (8, 4, 2, 1)})
    for name, sampler, T in itertools.product(denoisers, samplers, lengths):
        where, start = run.device if name == "network" else torch.device("cpu"), time.time()
        x, nfe = reverse_process(denoisers[name], V, sampler, replace(cfg, n_denoise=T), where)
        seconds, errors = time.time() - start, count(x).double()
        windows = x.unfold(1, min(8, x.size(1)), 1).flatten(0, 1)
        rows[f"{name} {sampler} {T}"] = {
            "nfe": nfe, "seconds": seconds, "errors": errors.mean().item(), "truth": truth,
            "se": errors.std(correction=0).item() / math.sqrt(len(x)),
            "faultless": (errors == 0).double().mean().item(),      # relay: 0.002 is right, not 1
            "distinct": len(windows.unique(dim=0)) / len(windows)}  # of all windows of 8 tokens
    return rows

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
    """Trains an MDLM and samples from it in all ways; with --full others that see further."""
    results, arms = {}, {"mdlm": {}} | {f"window {w}": dict(window=w) for w in (2, 0) if cfg.full}
    arms = {arm: scale(replace(cfg, **changes), 1) for arm, changes in arms.items()}
    for arm, c in select(arms, cfg, run).items():
        if cfg.lab:
            c = replace(c, seq_len=c.seq_len // 2 * 2, n_sample=c.n_sample // 4 + 1)    # in pairs
            blind, sharp = (functools.partial(bracket_posterior, rho=rho) for rho in (c.rho, 0.0))
            rows = sample_all({"blind": blind, "sharp": sharp}, SAMPLERS, c, run)
            results[arm] = dict(samples=rows, history=[{"samples": k, **rows[k]} for k in rows])
            break       # it knows nothing of arms
        torch.manual_seed(cfg.seed)
        model = MDLM(c).to(run.device)
        history = train(arm, model, c, run)
        m = evaluate(model, replace(c, eval_batches=8 * c.eval_batches), run)
        reach = min(c.seq_len, c.n_layer * c.window) or c.seq_len
        floor = relay_floor(c.seq_len, reach)                           # Eq. 10
        # not model(...): how many sequences need a call depends on data, so it is not compiled
        denoisers = {"network": lambda z: model.forward(z).exp(),
                     "exact": functools.partial(relay_posterior, reach=c.seq_len)}
        rows = sample_all(denoisers, SAMPLERS[:5], c, run)
        results[arm] = dict(params=sum(p.numel() for p in model.parameters()), steps=c.steps,
                            seconds=history[-1]["seconds"], **m, floor=floor, samples=rows,
                            excess=m["loss"] / floor - 1, history=history)
        results[arm] |= {name: row["errors"] for name, row in rows.items()}
    return results

def jumps(arms, name):
    """Mean jumps of a denoiser and sampler for the four T. LookupError: not measured, or none."""
    found = [arms["mdlm"][f"{name} {T}"] for T in (64, 128, 256, 512)]
    return found if all(found) else arms[name]      # there is no such arm

COLUMNS = "params steps seconds loss loss_se floor excess".split()
CLAIMS = [  # name, measured from the arms, relation, needed
    ("C0 no leak: (loss - floor) / standard error",
     lambda a: (a["mdlm"]["loss"] - a["mdlm"]["floor"]) / a["mdlm"]["loss_se"], ">=", -3),
    ("C0 loss / floor - 1, else C1 to C3 are void", lambda a: a["mdlm"]["excess"], "<=", 0.01),
    ("C1 mdlm, jumps: T=512 / T=64",
     lambda a: jumps(a, "network mdlm")[-1] / jumps(a, "network mdlm")[0], ">=", 0.93),
    ("C2 T=512, jumps: cap / mdlm",
     lambda a: jumps(a, "network cap")[-1] / jumps(a, "network mdlm")[-1], "<=", 0.8),
    ("C2 cap: largest rise of jumps when T doubles (0.6: two standard errors)", lambda a: max(
        np.diff(jumps(a, "network cap"))), "<=", 0.6),
    ("C3 fb, jumps: T=512 / T=64",
     lambda a: jumps(a, "network fb")[-1] / jumps(a, "network fb")[0], ">=", 0.9),
    ("C4 exact denoiser, T >= 128: jumps that cap or loop save", lambda a: max(
        sum(jumps(a, "exact mdlm")[1:]) - sum(jumps(a, f"exact {sampler}")[1:])
        for sampler in ("cap", "loop")) / 3, "<=", 0.5),
    ("C4 exact, T=512: jumps of mean-conf", lambda a: jumps(a, "exact mean-conf")[-1], "<=", 5.3),
]
STYLES = "#000000 #e69f00 #0072b2 #56b4e9 #d55e00 #cc79a7 #009e73 #999999 #f0c000".split()

@matplotlib.rc_context({"font.size": 14, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: errors of the samples over calls, for both denoisers."""
    rows, figure = next(iter(results["arms"].values()))["samples"], Figure(figsize=(16, 7))
    names, used = (dict.fromkeys(name.split()[i] for name in rows) for i in (0, 1))
    what = "violations" if cfg.lab else "jumps"
    for panel, name in zip(figure.subplots(1, 2), names):
        for sampler, color, marker in zip(used, STYLES, "s^oDv<>PX"):
            some = [row for key, row in rows.items() if key.startswith(f"{name} {sampler} ")]
            nfe, errors, se = ([row[key] for row in some] for key in ("nfe", "errors", "se"))
            panel.errorbar(nfe, errors, [2 * s for s in se], color=color, marker=marker, lw=3,
                           label=f"{sampler} {errors[-1]:.1f}, {some[-1]['seconds']:.0f} s")
        panel.axhline(some[0]["truth"], color="#000000", linestyle=":", label="truth: the goal")
        mdlm, cap = (rows[f"{name} {s} {cfg.n_denoise}"]["errors"] for s in ("mdlm", "cap"))
        panel.set(xlabel="calls per sequence (NFE)", ylabel=f"{what} per sequence", ymargin=0.4,
                  title=f"{name} denoiser: remasking (cap) changes {what} by {cap - mdlm:+.1f}")
        panel.legend(title=f"{what} and seconds with T = {cfg.n_denoise}; bars: 2 s.e.")
    figure.supxlabel(f"{NAME}.py, seed {cfg.seed}, {results['environment']['device']}", fontsize=11)
    run.write(f"{NAME}.png", lambda file: figure.savefig(file, dpi=100))

# ---- 9. main -------------------------------------------------------------------------------------
def main(argv=None):
    """Runs what the command line says; returns what results.json holds."""
    with session(argv) as (cfg, run):
        arms = experiment(cfg, run)
        for arm, m in arms.items() if run.rank == 0 else ():
            print(table([{arm: name, **row} for name, row in m["samples"].items()]) + "\n")
            print("(void: the network is undertrained)\n" if m.get("excess", 0) > 0.01 else "")
        results = report(cfg, run, arms, COLUMNS, CLAIMS)
        plot(cfg, run, results)
        return results

if __name__ == "__main__":
    main()
