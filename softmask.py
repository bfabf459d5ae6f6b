"""Soft masks: a position that stays masked remembers what the network believed about it.

Hersche, Moor-Smith, Hofmann, Rahimi, "Soft-Masked Diffusion Language Models", arXiv 2510.17206.
Run: python softmask.py (about four minutes on two CPU cores).

Masked diffusion forgets from step to step what it said about the positions that stay masked: they
enter again as the same [MASK]. A soft mask mixes [MASK] with the tokens believed in a step ago; the
surer the belief, the less [MASK] is left. So knowledge travels from step to step, for three more
parameters. Training takes two passes: one without gradient for the beliefs, one for the loss.

(1)  e = (1 - lam) E[m] + lam sum_i pi_i E[i] at a mask, E[x] elsewhere;  pi = top-k of p, sum 1
(2)  lam = omega_s sigmoid(omega_a (-H(p) - omega_b));  H: entropy of all of p, not of its top k
(3)  omega_s = sigmoid(r_s) | omega_a = softplus(r_a) + 1e-6 | omega_b = -softplus(r_b) - 1e-6
(4)  p = stopgrad(x_theta(z)), from plain masks; in a share p_sm of the training steps, else none
(5)  loss = NELBO of x_theta(z, p) = E_n (L/n) mean over L of -log x_theta(z, p)[x] at n masks
(6)  sampling: p is what x_theta said one step before, itself with soft masks
(7)  floor: the least NELBO of a network that sees R tokens far = E_t H(x_l | visible within R)
(8)  FLOPs of a training step, per token = (3 + p_sm) network + (2 + p_sm) mixtures, if p_sm > 0
x `targets` | x_theta `SoftMaskLM` | z `idx`, `z` | p `belief` | e `soften` | m = V = 12
lam `Gate` | r `raw * speed` | pi `pi` | L, T `seq_len`, but T=64: 64 steps | C `n_embd` | B batch

What it shows. In the source x_{l+1} = x_l + 1, or with probability 0.1 anything; 5.8 jumps, steps
other than +1, are right. A window limits a pass to R = 2; one pass cannot come below 0.802: what is
below came through beliefs, or through the second pass of `looped` in a call. Training FLOPs: equal.
  S1 mdlm, loss + 3 s.e. - floor           0.007 +- 0.001  needed >= 0.0, holds on 3 of 3
  S1 softmask, the same (R = 4)            0.018 +- 0.002  needed >= 0.0, holds on 3 of 3
  S1 loss of mdlm, else void               0.808 +- 0.001  needed <= 0.86, holds on 3 of 3
  S1 loss of softmask                      0.658 +- 0.002  needed <= 0.7, holds on 3 of 3
  S2 jumps of mdlm, 64 steps               15.406 +- 0.116  needed >= 13.5, holds on 3 of 3
  S2 jumps of softmask / mdlm              0.466 +- 0.017  needed <= 0.75, holds on 3 of 3
  S2 jumps of mdlm, 128 steps for 64       0.017 +- 0.009  needed <= 0.08, holds on 3 of 3
  S3 infilling, softmask minus mdlm        0.116 +- 0.005  needed >= 0.06, holds on 3 of 3
  S4 softmask without beliefs over mdlm    0.011 +- 0.007  needed <= 0.06, holds on 3 of 3
  S4 training-free minus trained beliefs   0.121 +- 0.016  needed >= 0.03, holds on 3 of 3
Seeds 1-3. A fixed lam takes mdlm below 0.802, too. Beyond four passes loss rises (`by_pass` in
results.json). A NELBO of two passes costs two of mdlm. 77 of mdlm's 128 calls see nothing new.

What is decided here. The code (IBM/soft-masked-diffusion-language-models) starts omega_s at 1e-6,
moves r by 0.01 a step at most: 450 steps leave it below 1e-4 (--full). Here it starts at 0.1, and
omega_a, omega_b fit 12 symbols. The last step draws what is left. Left out: remasking, nucleus.
Exercises
  1. --top_k 1: the best guess alone is fed back. --top_k 12: all of it. What do the jumps say?
  2. --window 0: one pass sees all tokens. What is left to carry from step to step?
  3. --full: half of the training, or the paper's gate. What is `omega` (results.json) in the end?
New here: Gate, SoftMaskLM, no_belief, update_flops, soft_step, denoise_all, draw_samples, infill
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
    n_loop: int = 1                 # passes through the same blocks
    # method
    p_sm: float = 0.8               # share of steps that train on soft masks (0: plain MDLM)
    top_k: int = 3                  # most likely tokens in a soft mask
    gate_init: Literal["small", "paper"] = "small"          # initial values of the gate, Eq. 3
    gate_speed: float = 8.0         # learning rate of the gate over that of the network
    n_pass: int = 8                 # passes over fixed masks in the last evaluation
    n_denoise: int = 128            # denoising steps; also a half, a quarter and less of them
    n_sample: int = 128             # sequences that a sampler draws
    # training
    steps: int = 450                # optimiser steps; scaled where arms must cost the same
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

    inference = tuple("n_pass n_denoise n_sample".split())

    def __post_init__(self):
        check_common(self)
        at_least(self, 0, "window p_sm")
        at_least(self, 1, "seed n_loop top_k n_pass n_denoise n_sample")    # seed 0 validates
        at_least(self, 1e-9, "gate_speed")
        for name, most in dict(p_sm=1, top_k=SYMBOLS).items():
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {most}")

SMOKE = dict(n_layer=2, n_head=2, n_embd=16, seq_len=16, batch_size=16, steps=4, warmup=2,
             lr=1e-3, eval_every=2, eval_batches=1, n_pass=3, n_sample=8, p_sm=0.4)

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

def make_batch(cfg, split, step):
    """Masked sequences, the sequences, their weights L/n; with them `twice` if the coin says so. A
    function of its arguments alone: a resumed run and all processes see the same data and coin."""
    (B, L), draw = (cfg.batch_size, cfg.seq_len), functools.partial(torch.rand, dtype=torch.float64)
    rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step if split == "train" else step)
    x = relay_sample(B, L, rng)                                         # (B, L)
    u = (torch.arange(B) + draw(B, generator=rng)) / B                  # (B,), stratified
    n = 1 + (L * u).long().clamp(max=L - 1)                             # (B,)
    rank = draw(B, L, generator=rng).argsort(1).argsort(1)              # (B, L)
    z = torch.where(rank < n[:, None], SYMBOLS, x)                      # (B, L)
    batch = {"idx": z, "targets": x, "weight": L / n}
    if split == "train" and draw(1, generator=rng) < cfg.p_sm:
        batch["twice"] = torch.ones(B)      # its being there chooses the graph, not its value
    return batch

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
class Gate(nn.Module):
    """How far a belief is trusted: lam, from the entropy of the belief and three parameters."""
    def __init__(self, cfg):
        super().__init__()
        self.speed, most = cfg.gate_speed, math.log(SYMBOLS)    # the largest entropy
        start = dict(small=(0.1, 10 / most, -most / 2), paper=(1e-6, 10 / 1.5, -0.75))
        s, a, b = start[cfg.gate_init]
        raw = math.log(s / (1 - s)), math.log(math.expm1(a - 1e-6)), math.log(math.expm1(-b - 1e-6))
        self.raw = nn.Parameter(torch.tensor(raw) / self.speed)     # so Adam moves r by speed * lr

    def omega(self):
        """The parameters omega_s in (0, 1), omega_a > 0, omega_b < 0."""
        s, a, b = (self.raw * self.speed).unbind()
        return s.sigmoid(), F.softplus(a) + 1e-6, -F.softplus(b) - 1e-6     # Eq. 3

    def forward(self, p):
        """Beliefs (B, T, V) -> lam (B, T)."""
        s, a, b = self.omega()
        H = -(p * (p + 1e-10).log()).sum(-1)    # of the whole belief, not of its top k
        return s * (a * (-H - b)).sigmoid()                             # Eq. 2

class SoftMaskLM(nn.Module):
    """A masked diffusion model whose masks may carry a belief; without gate and belief an MDLM."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, T, C = cfg, cfg.seq_len, cfg.n_embd
        self.embed = nn.Embedding(SYMBOLS + 1, C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = nn.Linear(C, SYMBOLS, bias=False)       # no logit for the mask
        nn.init.zeros_(self.head.weight)
        self.gate = Gate(cfg) if cfg.p_sm else None
        near = (torch.arange(T)[:, None] - torch.arange(T)).abs() <= (cfg.window or T)  # (T, T)
        self.register_buffer("near", near, persistent=False)
        self.register_buffer("rope", rope_table(T, C // cfg.n_head), persistent=False)

    def parts(self):
        """Parameters to clip apart from each other: the network, the gate."""
        network = [p for name, p in self.named_parameters() if name != "gate.raw"]
        return [network, [self.gate.raw]] if self.gate else [network]

    def soften(self, z, belief, lam):
        """Embeddings of z (B, T), where masks lean towards what is believed of them. (B, T, C)"""
        E, masked = self.embed.weight, z == SYMBOLS
        lam = torch.where(masked, self.gate(belief) if lam is None else lam, 0)         # (B, T)
        pi = belief * (belief >= belief.topk(self.cfg.top_k).values[..., -1:])      # ties join
        pi = pi / pi.sum(-1, keepdim=True).clamp(min=1e-10)     # (B, T, V), 0 without a belief
        return self.embed(z) + lam[..., None] * (pi @ (E[:SYMBOLS] - E[SYMBOLS]))       # Eq. 1

    def forward(self, z, belief, lam=None):
        """Tokens z (B, T), beliefs (B, T, V) -> log x_theta (B, T, V). lam: instead of the gate."""
        plain = self.gate is None and lam is None
        x = norm(self.embed(z) if plain else self.soften(z, belief, lam))       # (B, T, C)
        for block in [*self.blocks] * self.cfg.n_loop:
            x = block(x, self.rope, lambda k, v: (k, v, self.near))     # (B, T, C)
        logp = self.head(norm(x)).float().log_softmax(-1)               # (B, T, V)
        same = z[..., None] == torch.arange(SYMBOLS, device=z.device)   # (B, T, V)
        return torch.where(z[..., None] == SYMBOLS, logp, torch.where(same, 0, -math.inf))

def no_belief(z):
    """Beliefs of masks about which nothing was said yet. (B, T) -> (B, T, V)"""
    return torch.zeros(*z.shape, SYMBOLS, device=z.device)

def update_flops(cfg):
    """FLOPs per token of a training step, on average: the first of two passes has no backward."""
    T, C, p = cfg.seq_len, cfg.n_embd, cfg.p_sm
    network = cfg.n_loop * cfg.n_layer * block_flops(T, C) / T + 2 * C * SYMBOLS
    return (3 + p) * network + (2 + p) * 2 * C * SYMBOLS * (p > 0)      # Eq. 8

# ---- 5. Objective and decoding -------------------------------------------------------------------
def sequence_nelbo(logp, batch):
    """NELBO per token of every sequence, from log-probabilities logp (B, T, V). (B,)"""
    nll = -logp.gather(-1, batch["targets"][..., None]).squeeze(-1)     # (B, T)
    return batch["weight"] * torch.where(batch["idx"] == logp.size(-1), nll, 0.0).mean(1)

def loss_fn(model, batch, cfg):
    """NELBO in nats per token, of one pass or of the second of two: loss, stats."""
    z, belief = batch["idx"], no_belief(batch["idx"])
    if "twice" in batch:                                                # <- method
        with torch.no_grad():
            belief = model(z, belief).exp()                             # (B, T, V)  Eq. 4
    loss = sequence_nelbo(model(z, belief), batch).mean()               # Eq. 5
    return loss, {"loss": loss.detach()}

def soft_step(denoise, z, belief, show, u):
    """One denoising step: new tokens (B, T), new beliefs (B, T, V). All shapes are static."""
    belief = denoise(z, belief).exp()                                   # (B, T, V)  Eq. 6
    token = (belief / -u[..., 1:].log()).argmax(-1)     # (B, T): a race of exponential times
    return torch.where((z == SYMBOLS) & (u[..., 0] < show), token, z), belief

@torch.no_grad()
def denoise_all(denoise, z, n, cfg):
    """Fills the masks of z (B, T) in n steps."""
    torch.manual_seed(cfg.seed)
    wide = torch.float32 if z.device.type == "mps" else torch.float64   # Apple's GPUs lack it
    belief = no_belief(z)                                               # (B, T, V)
    for show in 1 / torch.arange(n, 0, -1, dtype=wide, device=z.device):    # the last shows all
        u = torch.rand(*z.shape, SYMBOLS + 1, dtype=wide, device=z.device)  # (B, T, V + 1)
        z, belief = soft_step(denoise, z, belief, show, u)
    return z.cpu()

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
    """NELBO in nats per token after every pass, exact denoisers as controls; `loss`: the second."""
    losses, reaches = [], (1, 2, 4, 8, cfg.seq_len)
    for i in range(cfg.eval_batches):
        batch = make_batch(cfg, "val", i)
        z, found = batch["idx"].to(run.device), []
        belief = no_belief(z)                                           # (B, T, V)
        for _ in range(cfg.n_pass):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
                logp = model(z, belief)                                 # (B, T, V)
            found, belief = [*found, logp.cpu().double()], logp.exp()
        found += [relay_posterior(batch["idx"], R).log() for R in reaches]
        losses.append(torch.stack([sequence_nelbo(logp, batch) for logp in found]))     # (P + K, B)
    losses, known = torch.cat(losses, dim=1).split([cfg.n_pass, len(reaches)])
    chance = [loss - relay_floor(cfg.seq_len, R) for loss, R in zip(known, reaches)]
    values, errors = zip(*(control_variate(loss, torch.stack(chance, dim=1)) for loss in losses))
    return dict(loss=values[:2][-1], loss_se=errors[:2][-1], by_pass=[*values])

def draw_samples(denoise, cfg, run):
    """What samples are like, for six numbers of steps."""
    rows = []
    for n in sorted({max(1, cfg.n_denoise // part) for part in (32, 16, 8, 4, 2, 1)}):
        z = torch.full((cfg.n_sample, cfg.seq_len), SYMBOLS, device=run.device)     # (B, T)
        start = time.time()
        x = denoise_all(denoise, z, n, cfg)                             # (B, T)
        seconds, jumps = time.time() - start, relay_errors(x).double()
        windows = x.unfold(1, min(8, x.size(1)), 1).flatten(0, 1)
        rows.append(dict(nfe=n, seconds=seconds, jumps=jumps.mean().item(),
                         se=jumps.std(correction=0).item() / math.sqrt(len(x)),
                         distinct=len(windows.unique(dim=0)) / len(windows)))
    return rows

def infill(model, cfg, run):
    """Share of masks filled with the truth where a tenth is given; exact: of draws from p(x|z)."""
    rng, size = torch.Generator().manual_seed(2**40), (4 * cfg.n_sample, cfg.seq_len)
    x, n = relay_sample(*size, rng), max(1, cfg.n_denoise // 8)         # (N, T)
    z = torch.where(torch.rand(size, generator=rng) < 0.1, x, SYMBOLS)        # (N, T)
    y = denoise_all(model, z.to(run.device), n, cfg)                    # (N, T)
    share = (x == y)[z == SYMBOLS].double().mean().item()
    exact = relay_posterior(z, cfg.seq_len).square().sum(-1)[z == SYMBOLS].mean().item()
    return {"infill": share, f"infill T={n}": share, "infill_exact": exact}

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
    """Trains and evaluates every arm, by default with the same training FLOPs: {arm: metrics}."""
    plain, results = dict(p_sm=0.0, n_pass=1), {}       # the idea switched off
    arms = {"mdlm": plain, "looped": plain | dict(n_loop=2), "softmask": {}}
    if cfg.full:
        arms |= {"mdlm short": plain, "softmask half": {},
                 "softmask paper": dict(gate_init="paper", gate_speed=0.01 / cfg.lr)}
    arms = {arm: replace(cfg, **dict(n_pass=2) | changes) for arm, changes in arms.items()}
    ratio = {arm: update_flops(cfg) / update_flops(c) for arm, c in arms.items()}
    ratio |= {"mdlm short": 1.0, "softmask half": 0.5}
    arms = {arm: scale(c, ratio[arm]) for arm, c in arms.items()}
    for arm, c in select(arms, cfg, run).items():
        torch.manual_seed(cfg.seed)
        model = SoftMaskLM(c).to(run.device)
        history = train(arm, model, c, run)
        long = replace(c, eval_batches=8 * c.eval_batches, n_pass=cfg.n_pass if c.p_sm else 1)
        m = dict(params=sum(p.numel() for p in model.parameters()), steps=c.steps,
                 mflops_update=update_flops(c) / 1e6, seconds=history[-1]["seconds"],
                 **evaluate(model, long, run), **infill(model, c, run), history=history)
        L, R = c.seq_len, c.n_layer * c.window * c.n_loop or c.seq_len
        m["floors"] = [relay_floor(L, min(L, n * R)) for n in range(1, 1 + cfg.n_pass)]     # Eq. 7
        m["floor"] = m["floors"][:2][: long.n_pass][-1]     # of the pass that `loss` is of
        m["slack"] = m["loss"] + 3 * m["loss_se"] - m["floor"]      # below 0: a leak
        m["omega"] = [w.item() for w in model.gate.omega()] if model.gate else []
        m["samples"] = draw_samples(model, c, run)
        m["jumps"] = {str(row["nfe"]): row["jumps"] for row in m["samples"]}
        if arm == "mdlm":
            lams, two = torch.tensor([0.125, 0.25, 0.5, 0.75]), replace(long, n_pass=2)
            fixed = [functools.partial(model, lam=lam.to(run.device)) for lam in lams]
            m["untrained"] = min(evaluate(net, two, run)["loss"] for net in fixed)
        results[arm] = m
    return results

COLUMNS = "params mflops_update steps seconds loss loss_se floor infill infill_exact".split()
CLAIMS = [  # name, measured from the arms, relation, needed
    ("S1 mdlm, no leak: loss + 3 s.e. - floor", lambda a: a["mdlm"]["slack"], ">=", 0.0),
    ("S1 softmask, no leak: the same", lambda a: a["softmask"]["slack"], ">=", 0.0),
    ("S1 mdlm: loss, else all is void", lambda a: a["mdlm"]["loss"], "<=", 0.86),
    ("S1 softmask: loss of the second pass", lambda a: a["softmask"]["by_pass"][1], "<=", 0.7),
    ("S2 T=64, jumps: mdlm", lambda a: a["mdlm"]["jumps"]["64"], ">=", 13.5),
    ("S2 T=64, jumps: softmask / mdlm",     # without jumps, or with other T: not judged
     lambda a: a["softmask"]["jumps"]["64"] / (a["mdlm"]["jumps"]["64"] or None), "<=", 0.75),
    ("S2 mdlm, jumps: |T=128 / T=64 - 1|",
     lambda a: abs(a["mdlm"]["jumps"]["128"] / (a["mdlm"]["jumps"]["64"] or None) - 1), "<=", 0.08),
    ("S3 T=16, infilling: softmask - mdlm",
     lambda a: a["softmask"]["infill T=16"] - a["mdlm"]["infill T=16"], ">=", 0.06),
    ("S4 loss: softmask's first pass / mdlm - 1",
     lambda a: a["softmask"]["by_pass"][0] / a["mdlm"]["loss"] - 1, "<=", 0.06),
    ("S4 loss: fixed lam - softmask",
     lambda a: a["mdlm"]["untrained"] - a["softmask"]["by_pass"][1], ">=", 0.03),
]
STYLES = {  # the same colour for the same role in every script, and a second cue
    "softmask": dict(color="#0072b2", linestyle="-", linewidth=4, marker="o", markersize=9),
    "looped": dict(color="#e69f00", linestyle="-.", linewidth=2.5, marker="^", markersize=9),
    "mdlm": dict(color="#000000", linestyle="--", linewidth=2.5, marker="s", markersize=8),
    "mdlm short": dict(color="#009e73", linestyle="--", linewidth=2, marker="D", markersize=7),
    "softmask half": dict(color="#56b4e9", linestyle="-", linewidth=2, marker="v", markersize=9),
    "softmask paper": dict(color="#cc79a7", linestyle="-", linewidth=2, marker="X", markersize=9),
}

@matplotlib.rc_context({"font.size": 14, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: the loss over training, with the floors, and jumps of samples over calls."""
    figure, arms = Figure(figsize=(17, 7.5)), results["arms"]
    curves, calls = figure.subplots(1, 2)
    for arm, m in arms.items():
        style, flops = STYLES[arm], 1e6 * m["mflops_update"] * cfg.batch_size
        curves.plot([row["step"] * flops * cfg.seq_len / 1e12 for row in m["history"]],
                    [row["val_loss"] for row in m["history"]], **style,
                    label=f"{arm} {m['loss']:.3f}, {m['steps']} steps, {m['seconds']:.0f} s")
        curves.axhline(m["floor"], color=style["color"], linestyle=":")
        if "untrained" in m:
            curves.axhline(m["untrained"], color="#d55e00", linestyle=(0, (8, 3)),
                           label=f"mdlm, untrained soft masks {m['untrained']:.3f}")
        nfe, jumps, se = ([row[key] for row in m["samples"]] for key in ("nfe", "jumps", "se"))
        calls.errorbar(nfe, jumps, [2 * s for s in se], **style,
                       label=f"{arm} {jumps[-1]:.1f}, {m['samples'][-1]['seconds']:.1f} s")
    best, m = min(arms.items(), key=lambda item: item[1]["loss"])
    curves.set(xlabel="training compute (TFLOP)", ylabel="NELBO (nats per token)",
               title=f"{best} reaches {m['loss']:.3f}, one call of it at best {m['floors'][0]:.3f}")
    curves.legend(title="dotted: floors of one pass and of two")
    truth, end = (cfg.seq_len - 1) * JUMP * (1 - 1 / SYMBOLS), m["samples"][-1]["jumps"]
    calls.axhline(truth, color="#999999", label="truth")
    calls.set(xlabel="calls per sequence (NFE)", ylabel="jumps per sequence", xscale="log",
              xticks=nfe, xticklabels=nfe, title=f"{best}: {end:.1f} jumps, {truth:.1f} are right")
    calls.legend(title=f"jumps and seconds with {nfe[-1]} calls; bars: 2 s.e.")
    figure.supxlabel(f"{NAME}.py, seed {cfg.seed}, {results['environment']['device']}", fontsize=11)
    run.write(f"{NAME}.png", lambda file: figure.savefig(file, dpi=100))

# ---- 9. main -------------------------------------------------------------------------------------
def main(argv=None):
    """Runs what the command line says; returns what results.json holds."""
    with session(argv) as (cfg, run):
        arms = experiment(cfg, run)
        for arm, m in arms.items() if run.rank == 0 else ():
            print(table([{arm: "", **row} for row in m["samples"]]))
            print("(void: undertrained)\n" if arm == "mdlm" and m["loss"] > 0.86 else "")
        results = report(cfg, run, arms, COLUMNS, CLAIMS)
        plot(cfg, run, results)
        return results

if __name__ == "__main__":
    main()
