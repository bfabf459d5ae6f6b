"""LLaDA: a language model without a left-to-right order. It fills in masks, in any order.

Nie et al., "Large Language Diffusion Models", arXiv 2502.09992. Run: python llada.py (4 minutes).
Mask every token with the same random chance t and train a transformer that sees both sides to say
what the masks hide: weighted by 1/t, its loss bounds -log p. To sample, start from masks only and
fill in a few per call. Trained on "A is B" it can be asked for A; its twin, order="left", cannot.

(1)  x_t: each of the L tokens of an answer becomes the mask m with chance t; a prompt never does
(2)  bound = E_t (1 / (t L)) sum of -log p(x^i | x_t) over the masks; t uniform, 0.001 to 1
(3)        = E_l (1 / l) sum of the same, if t starts at 0; l uniform in 1..L, l random masks
(4)        = E over orders of (1/L) sum_k -log p(k-th token | before) >= -log p(x) / L, by Jensen
(5)  y = argmax(logits - temp log(-log u)), a sample of softmax(logits / temp)
(6)  a step fills in the n masks of largest c = softmax(logits)[y], or in random order c ~ U(0, 1)
(7)  truth: words are independent and equally likely; the last counts as all words that fit
(8)  ar, gap at the start: argmax over names A of p(A) p(B | A); its loss there is -log p(A | BOS)
(9)  guidance: logits + w (logits - blind logits, for which the prompt is masked, too)
x `targets` | x_t `idx` `z` | m = V `vocabulary` | c `sure` in `reveal`, the flag is the least c
w `guidance` | N `n_denoise`, in shapes sequences | B batch, of facts: a description, or its place
What it shows. Held-out facts: only stated. Excess: bound / truth - 1. C3: temp 0. C4: 1, no prompt.
  C1 ar, asked forward              1.000 +- 0.000  needed >= 0.9, holds on 3 of 3
  C1 ar, asked in reverse           0.000 +- 0.000  needed <= 0.05, holds on 3 of 3
  C1 llada, asked forward           0.987 +- 0.023  needed >= 0.8, holds on 3 of 3
  C1 llada, asked in reverse        0.993 +- 0.012  needed >= 0.6, holds on 3 of 3
  C1 llada, both gaps               1.000 +- 0.000  needed >= 0.95, holds on 3 of 3
  C2 (bound - truth) / s.e.         32.416 +- 2.175  needed >= -3, holds on 3 of 3
  C2 estimators, apart / s.e.       0.618 +- 0.243  needed <= 3, holds on 3 of 3
  C2 s.e., rate - count             0.002 +- 0.000  needed >= 0, holds on 3 of 3
  C2 ar, excess                     0.002 +- 0.001  needed <= 0.05, holds on 3 of 3
  C2 llada, excess                  0.325 +- 0.038  needed <= 0.4, holds on 3 of 3
  C2 llada - ar, excess             0.323 +- 0.037  needed >= 0, holds on 3 of 3
  C3 legal words, N=24              0.962 +- 0.031  needed >= 0.9, holds on 3 of 3
  C3 minus random order             0.132 +- 0.012  needed >= 0.1, holds on 3 of 3
  C3 minus N=1                      0.962 +- 0.031  needed >= 0.3, holds on 3 of 3
  C4 1 - entropy of random / real   0.049 +- 0.007  needed <= 0.1, holds on 3 of 3
  C4 entropy, random minus low      0.359 +- 0.092  needed >= 0, holds on 3 of 3
  C4 words, low minus random        0.423 +- 0.005  needed >= 0, holds on 3 of 3
At N = 6 and 12 random order is ahead on two of three seeds. ML-GSAI/LLaDA, generate.py, reads c at
the token drawn, too: a bias. Left out: random lengths, early ends. Exercises. --full: few facts are
taught, what is left? --only llada --corpus FILE --show --out out/mytext: which letters come first?
New here: BOS, EOS, IS, ASK, NEXT, BACK, SAY, A, B, FACTS, fact_documents, WORDS, log_prob,
read_words, documents, vocabulary, mask_tokens, LLaDA, pick, reveal, diffuse, autoregress, score,
sample_rows, LOW, RANDOM, show_steps
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import matplotlib.animation
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
    n_layer: int = 3                # transformer blocks
    n_head: int = 2                 # attention heads
    n_embd: int = 64                # width of the residual stream
    seq_len: int = 33               # tokens in a training sequence
    # method
    order: Literal["any", "left"] = "any"       # left: the autoregressive twin (arms set it)
    source: Literal["text", "facts"] = "text"   # what the model has to learn (arms set it)
    corpus: str = ""                # UTF-8 text to train on (empty: the script's own)
    n_fact: int = 200               # facts, all of them stated
    n_taught: int = 150             # facts that are also asked about, both ways
    prompt: int = 8                 # characters that a sampler is given
    n_sample: int = 128             # sequences that a sampler draws
    n_denoise: int = 24             # denoising steps; also a half, a quarter and less of them
    remasking: Literal["low-confidence", "random"] = "low-confidence"   # order of blocks and sample
    temp: float = 0.0               # sampling temperature (0: greedy)
    block: int = 0                  # sample: length of blocks filled left to right (0: one block)
    sure: float = 0.0               # sample: reveal all masks that are this sure (0: fixed numbers)
    guidance: float = 0.0           # weight of classifier-free guidance (0: none)
    show: bool = False              # print every step of a sample, what is new in colour
    # training
    steps: int = 1000               # optimiser steps; scaled where arms must cost the same
    batch_size: int = 64            # sequences in a step, over all processes
    lr: float = 4e-3                # peak learning rate
    warmup: int = 50                # steps until the learning rate peaks
    weight_decay: float = 0.1       # AdamW's decoupled weight decay
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 200           # steps between rows of log.csv, each with a checkpoint
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

    inference = "prompt n_sample n_denoise remasking temp block sure guidance show".split()

    def __post_init__(self):
        check_common(self)
        at_least(self, 1, "n_taught n_sample n_denoise")
        at_least(self, 0, "prompt temp block sure guidance")
        at_least(self, self.n_taught + 1, "n_fact")
        at_least(self, self.prompt + 2, "seq_len")
        if self.corpus and min(map(len, read_words(self.corpus)[1].values())) < self.seq_len:
            raise ValueError(f"corpus={self.corpus} is too short for seq_len={self.seq_len}")

SMOKE = dict(n_layer=2, n_head=2, n_embd=16, seq_len=17, batch_size=8, steps=4, warmup=2, lr=1e-3,
             eval_every=2, eval_batches=1, n_fact=8, n_taught=6, n_sample=4, prompt=4)

# ---- 2. Task -------------------------------------------------------------------------------------
BOS, EOS, IS, ASK, NEXT, BACK, SAY, A, B = range(9)     # A, B: places of a name, of a description
FACTS = torch.tensor([[BOS, A, IS, B, EOS, EOS, EOS, EOS],      # a statement; all is answer
                      [BOS, ASK, A, NEXT, SAY, B, EOS, EOS],    # a question, its answer from SAY on
                      [BOS, ASK, B, BACK, SAY, A, EOS, EOS]])   # the reverse question

def fact_documents(cfg, fact, kind):
    """FACTS[kind] of facts number `fact` (N,), and where their answers are; twice (N, 8)."""
    x = FACTS[kind]                                                     # (N, 8)
    x = torch.where(x < A, x, A + (x - A) * cfg.n_fact + fact[:, None])     # (N, 8)
    return x, torch.arange(8) >= torch.tensor([1, 5, 5])[kind][:, None]

WORDS = """adis adito al anabu asili bitor dakeb de dum edo eleb iki lam
           nuluk onul ri sona su tibub tum ule umat umule ut""".split()

def log_prob(text):
    """log p of a text of the language that starts with a word and ends anywhere, exactly."""
    *whole, rest = text.split(" ")
    fits = sum(word.startswith(rest) for word in WORDS)
    return math.log(fits) - (len(whole) + 1) * math.log(len(WORDS))     # Eq. 7

@functools.lru_cache(maxsize=2)
def read_words(path):
    """Tokenizer, {"train", "val"} id tensors and the words of a text."""
    parts = load_corpus(path).split("\n") if path else random.Random(0).choices(WORDS, k=200_000)
    tok = Tokenizer.from_text(text := " ".join([*parts, ""]), ("<bos>", "<eos>"))
    ids, cut = torch.tensor(tok.encode(text)), text.rfind(" ", 0, len(text) * 9 // 10) + 1
    return tok, {"train": ids[:cut], "val": ids[cut:]}, set(text.split())

def documents(cfg, split, rng):
    """Sequences, and where their answers are, which may be masked and are to be learnt; (B, T)."""
    draw = functools.partial(torch.randint, size=(cfg.batch_size,), generator=rng)
    if cfg.source == "facts":     # half statements, half questions
        kind, fact = torch.tensor([0, 0, 1, 2])[draw(4)], draw(cfg.n_fact)      # (B,)
        return fact_documents(cfg, torch.where(kind > 0, draw(cfg.n_taught), fact), kind)
    ids, at = read_words(cfg.corpus)[1][split], torch.arange(cfg.seq_len)
    spaces = (ids == read_words(cfg.corpus)[0][" "]).nonzero()          # (N, 1)
    x = ids[(spaces[draw(len(spaces))] + at) % len(ids)]    # (B, T), behind the end: the beginning
    return torch.where(at > 0, x, BOS), (at > 0).expand_as(x)

def make_batch(cfg, split, step):
    """Masked sequences, the sequences, the tokens' weights; a function of its arguments alone."""
    rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step if split == "train" else step)
    x, answer = documents(cfg, split, rng)                              # (B, T)
    u = (torch.rand((), generator=rng) + torch.arange(len(x)) / len(x)) % 1     # (B,), stratified
    z, weight = mask_tokens(x, answer, cfg, "rate", u, rng)             # (B, T)
    return {"idx": z, "targets": x, "weight": weight}

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
def vocabulary(cfg):
    """V, the number of tokens. The mask is one more: its id is V."""
    return A + 2 * cfg.n_fact if cfg.source == "facts" else len(read_words(cfg.corpus)[0])

def mask_tokens(x, answer, cfg, law, u, rng):
    """x with masks in the answers, and weights of their losses. How many: by u (B,) in [0, 1)."""
    noise = torch.rand(x.shape, dtype=torch.float64, generator=rng).masked_fill(~answer, 2)
    L, u = answer.sum(1, keepdim=True), u.double()[:, None]             # (B, 1)
    if cfg.order == "left":     # no masks: every token is told from those before it
        return x, answer / L
    if law == "rate":
        t = 1e-3 + (1 - 1e-3) * u       # (B, 1): not from 0, where 1 / t has no bound
        hide, weight = noise < t, 1 / (t * L)                           # Eq. 1, 2
    else:       # l masks: all of them are told at once (Eq. 3), or only the next one is (Eq. 4)
        place, l = noise.argsort(1).argsort(1), 1 + (L * u).long()      # ranks (B, T), l (B, 1)
        hide, weight = place < l, 1 / l if law == "count" else place == l - 1       # Eq. 3, 4
    return torch.where(hide, vocabulary(cfg), x), (hide * weight).float()

class LLaDA(nn.Module):
    """A transformer that says what masks hide; with order="left", from what is on the left."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C, T, V = cfg, cfg.n_embd, cfg.seq_len, vocabulary(cfg)
        self.embed = nn.Embedding(V + 1, C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = nn.Linear(C, V, bias=False)     # no logit for the mask
        nn.init.zeros_(self.head.weight)
        self.flops = cfg.n_layer * (24 * C**2 + 4 * T * C) + 2 * C * V      # forward, per token
        sees = torch.ones(T, T).tril(T if cfg.order == "any" else 0) > 0        # (T, T)
        self.register_buffer("sees", sees, persistent=False)
        self.register_buffer("rope", rope_table(T, C // cfg.n_head), persistent=False)

    def parts(self):    # clipped apart from each other: one part
        return [list(self.parameters())]

    def forward(self, idx, cache=None):
        """idx (B, T) -> logits of these tokens; with a cache, which idx continues, of the next."""
        start = cache[-1][0].size(2) if cache else 0
        here, x = slice(start, start + idx.size(1)), norm(self.embed(idx))      # (B, T, C)
        for i, block in enumerate(self.blocks):
            def memory(k, v):
                if cache:
                    k, v = cache[i] = [torch.cat(pair, dim=2) for pair in zip(cache[i], (k, v))]
                return k, v, self.sees[here, : here.stop]
            x = block(x, self.rope[here], memory)                       # (B, T, C)
        logits = self.head(norm(x)).float()                             # (B, T, V)
        return logits if cache or self.cfg.order == "any" else F.pad(logits[:, :-1], (0, 0, 1, 0))

def pick(logits, temp):
    """Draws from softmax(logits / temp) by Gumbel noise: in float32 rare tokens never win."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64      # Apple lacks it
    u = torch.rand(logits.shape, dtype=wide, device=logits.device).clamp(min=1e-30)     # 0: no log
    return (logits - temp * (-u.log()).log()).argmax(-1)                # Eq. 5

def reveal(x, logits, free, n, cfg):
    """Fills n of the masks x (B, T) that are free, and says which. One graph: n is a tensor."""
    y = pick(logits, cfg.temp)                                          # (B, T)
    sure = logits.softmax(-1).gather(-1, y[..., None])[..., 0]          # (B, T)
    n = (free & (sure >= cfg.sure)).sum(1, keepdim=True).clamp(min=1) if cfg.sure else n
    sure = torch.rand_like(sure) if cfg.remasking == "random" and not cfg.sure else sure    # (B, T)
    best = sure.masked_fill(~free, -math.inf).argsort(dim=1, descending=True, stable=True)  # (B, T)
    shown = free & (best.argsort(1) < n)                                # (B, T)  Eq. 6
    return torch.where(shown, y, x), shown

# ---- 5. Objective and decoding -------------------------------------------------------------------
def loss_fn(model, batch, cfg):
    """Nats per token of the answers, or their bound: loss, stats."""
    nll = F.cross_entropy(model(batch["idx"]).mT, batch["targets"], reduction="none")   # (B, T)
    loss = (batch["weight"] * nll).sum(1).mean()                        # Eq. 2
    return loss, {"loss": loss.detach()}

def diffuse(model, idx, n_new, cfg):
    """Continues idx (N, P): ids, the step that revealed each, calls of the network per sequence."""
    (N, P), V, steps, calls = idx.shape, model.head.out_features, 0, 0
    x, size = F.pad(idx, (0, n_new), value=V), cfg.block or n_new       # (N, T)
    when, at = torch.zeros_like(x), torch.arange(P + n_new, device=x.device)    # (N, T)
    for left in range(P, P + n_new, size):
        inside, masks = (at >= left) & (at < left + size), min(size, P + n_new - left)  # (T,)
        turns = masks if cfg.sure else max(1, cfg.n_denoise * masks // n_new)
        for turn in range(min(turns, masks)):
            rows = (inside & (x == V)).any(1).nonzero().squeeze(1)      # (R,)
            z, n, steps = x[rows], masks // turns + (turn < masks % turns), steps + 1   # (R, T)
            logits = model.forward(z)   # not model(z): shapes vary, so it is not compiled
            if cfg.guidance:
                blind = model.forward(torch.where((at > 0) & (at < P), V, z))   # (R, T, V)
                logits = logits + cfg.guidance * (logits - blind)       # (R, T, V)  Eq. 9
            x[rows], shown = reveal(z, logits, inside & (z == V), z.new_tensor(n), cfg)     # (R, T)
            when[rows] += steps * shown
            calls += len(rows) / N * (1 + (cfg.guidance > 0))
    return x.cpu(), when, calls

def autoregress(model, idx, n_new, cfg):
    """The same from left to right: each call takes only what is new, the cache has the rest."""
    none = torch.empty(len(idx), cfg.n_head, 0, cfg.n_embd // cfg.n_head, device=idx.device)
    x, new, cache = idx, idx, [(none, none)] * cfg.n_layer              # (N, n)
    for _ in range(n_new):
        new = pick(model.forward(new, cache)[:, -1:], cfg.temp)         # (N, 1)
        x = torch.cat([x, new], dim=1)
    return x.cpu(), (torch.arange(x.size(1)) - idx.size(1) + 1).clamp(min=0).expand_as(x), n_new

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
    """Facts: shares recalled, nats an answer. Text: nats a character, s.e. of distance to truth."""
    if cfg.source == "facts":
        N, result = cfg.n_fact, {"loss": 0.0}
        for name, kind, at in zip(COLUMNS[-4:], (1, 2, 0, 0), (5, 5, 3, 1)):
            x, answer = fact_documents(cfg, torch.arange(N), torch.full((N,), kind))    # (N, 8)
            hide = (answer if kind else torch.arange(8) == at) & (cfg.order == "any")
            z = torch.where(hide, vocabulary(cfg), x).to(run.device)        # (N, 8)
            logp = model.forward(z).log_softmax(-1).cpu()                   # (N, 8, V)
            guess, held = logp[:, at].argmax(1), slice(cfg.n_taught, None)  # (N,)
            if cfg.order == "left" and name == "gap_reverse":
                guess = A + (logp[0, 1, x[:, 1], None] + logp[:, 3, A + N :]).argmax(0)  # Eq. 8
            result[name] = (guess == x[:, at])[held].double().mean().item()
            result["loss"] += F.nll_loss(logp[held, at], x[held, at]).item() / 4
        return result
    rng, found, tok = torch.Generator().manual_seed(0), {}, read_words(cfg.corpus)[0]
    x, answer = documents(replace(cfg, batch_size=cfg.batch_size * cfg.eval_batches), "val", rng)
    u, laws = torch.rand(len(x), generator=rng), dict(order=cfg.seq_len - 1, count=8, rate=8)
    for law, n in laws.items() if cfg.order == "any" else [("order", 1)]:       # Eq. 2, 3, 4
        found[law] = torch.zeros(len(x), dtype=torch.float64)           # (B,)
        for k in range(n):      # n draws, spread evenly over the numbers of masks
            z, weight = mask_tokens(x, answer, cfg, law, (u + k / n) % 1, rng)      # (B, T)
            logits = model(z.to(run.device)).cpu().double()             # (B, T, V)
            found[law] += (F.cross_entropy(logits.mT, x, reduction="none") * weight).sum(1) / n
    result = {law: nats.mean().item() for law, nats in [*found.items(), ("loss", found["order"])]}
    if not cfg.corpus:
        truth = -torch.tensor([log_prob(tok.decode(row[1:])) for row in x]) / (cfg.seq_len - 1)
        result |= dict(truth=truth.mean().item(), excess=result["loss"] / truth.mean().item() - 1)
        for law, nats in found.items():
            result[f"{law}_se"] = (nats - truth).std(correction=0).item() / len(x) ** 0.5
    return result

def score(texts, legal):
    """The share of whole words that are legal, their entropy in nats, and how many texts differ."""
    words = [word for text in texts for word in text.split(" ")[1:-1]]
    count = torch.tensor([float(words.count(word)) for word in sorted(legal.intersection(words))])
    return dict(words=count.sum().item() / max(1, len(words)), distinct=len(set(texts)),
                entropy=torch.special.entr(count / count.sum()).sum().item())

@torch.no_grad()
def sample_rows(model, cfg, run):
    """{"setting": what samples are like} with prompts, and without any (free); and one sample."""
    (tok, _, legal), settings, left = read_words(cfg.corpus), {}, cfg.order == "left"
    x, _ = documents(replace(cfg, batch_size=2 * cfg.n_sample), "val", torch.Generator())   # (B, T)
    steps = sorted({1, *(max(1, cfg.n_denoise // part) for part in (1, 2, 4, 8))})
    ways = ["left"] if left else ["low-confidence", "random"]
    for c in (replace(cfg, remasking=w, temp=t, block=0, sure=0) for w in ways for t in (0, 1)):
        name = f"{c.remasking.split('-')[0]} temp={c.temp}"
        settings |= {f"{name} N={n}": replace(c, n_denoise=n) for n in steps[-1 if left else 0 :]}
        settings[f"free {name}"] = replace(c, n_denoise=cfg.seq_len, prompt=0)
    settings |= {} if left else dict(blocks=replace(cfg, block=8), confident=replace(cfg, sure=0.9))
    rows = {"real": dict(nfe=0, seconds=0.0, **score([tok.decode(row[1:]) for row in x], legal))}
    for name, c in (settings | {"sample": cfg}).items():
        idx = x[: cfg.n_sample if c.prompt else None, : 1 + c.prompt].to(run.device)    # (N, P)
        torch.manual_seed(cfg.seed)
        start = time.perf_counter()
        y, when, calls = (autoregress if left else diffuse)(model, idx, x.size(1) - idx.size(1), c)
        seconds, texts = time.perf_counter() - start, [tok.decode(row[1 + c.prompt :]) for row in y]
        rows[name] = dict(nfe=calls, seconds=seconds, **score(texts, legal))
    return {f"{n} {k}": row[k] for n, row in rows.items() for k in ("words", "entropy")} | dict(
        samples=rows, sample=[tok.names[i] for i in y[0, 1:]], when=when[0, 1:].tolist())

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
    """Trains LLaDA and its twin on texts and, three times as long, on facts: {arm: metrics}."""
    cfg = replace(cfg, order="any", source="text")      # what these are, arms decide, not flags
    facts = dict(source="facts", prompt=0, seq_len=8, batch_size=2 * cfg.batch_size, lr=cfg.lr / 2)
    arms, results = {"ar": dict(order="left"), "llada": {}}, {}
    arms |= {f"{arm} facts": facts | changes for arm, changes in arms.items()}
    arms["ar facts"]["weight_decay"] = 10 * cfg.weight_decay    # llada is best with the usual one
    arms |= {"few taught": facts | dict(n_taught=max(1, cfg.n_fact // 4))} if cfg.full else {}
    arms = {arm: scale(replace(cfg, **c), 3 if "source" in c else 1) for arm, c in arms.items()}
    for arm, c in select(arms, cfg, run).items():
        torch.manual_seed(cfg.seed)
        model = LLaDA(c).to(run.device)
        history, end = train(arm, model, c, run), replace(c, eval_batches=8 * c.eval_batches)
        results[arm] = dict(params=sum(p.numel() for p in model.parameters()), steps=c.steps,
            mflops_per_token=model.flops / 1e6, seconds=history[-1]["seconds"], history=history,
            **evaluate(model, end, run), **sample_rows(model, c, run) if c.source == "text" else {})
    return results

COLUMNS = """params mflops_per_token steps seconds loss truth excess
             forward reverse gap_forward gap_reverse""".split()
LOW, RANDOM = "low temp=0 N=24 words", "random temp=0 N=24 words"
CLAIMS = [  # name, measured from the arms, relation, needed
    ("C1 ar, asked forward", lambda a: a["ar facts"]["forward"], ">=", 0.9),
    ("C1 ar, asked in reverse", lambda a: a["ar facts"]["reverse"], "<=", 0.05),
    ("C1 llada, asked forward", lambda a: a["llada facts"]["forward"], ">=", 0.8),
    ("C1 llada, asked in reverse", lambda a: a["llada facts"]["reverse"], ">=", 0.6),
    ("C1 llada, both gaps", lambda a: min(map(a["llada facts"].get, COLUMNS[-2:])), ">=", 0.95),
    ("C2 (bound - truth) / s.e.",
     lambda a: (a["llada"]["loss"] - a["llada"]["truth"]) / a["llada"]["order_se"], ">=", -3),
    ("C2 estimators, apart / s.e.", lambda a: max(abs(a["llada"][law] - a["llada"]["order"])
     for law in ("count", "rate")) / a["llada"]["order_se"], "<=", 3),
    ("C2 s.e., rate - count", lambda a: a["llada"]["rate_se"] - a["llada"]["count_se"], ">=", 0),
    ("C2 ar, excess", lambda a: a["ar"]["excess"], "<=", 0.05),
    ("C2 llada, excess", lambda a: a["llada"]["excess"], "<=", 0.4),
    ("C2 llada - ar, excess", lambda a: a["llada"]["excess"] - a["ar"]["excess"], ">=", 0),
    ("C3 legal words, N=24", lambda a: a["llada"][LOW], ">=", 0.9),
    ("C3 minus random order", lambda a: a["llada"][LOW] - a["llada"][RANDOM], ">=", 0.1),
    ("C3 minus N=1", lambda a: a["llada"][LOW] - a["llada"][LOW.replace("24", "1")], ">=", 0.3),
    ("C4 1 - entropy of random / real", lambda a: 1 - a["llada"]["free random temp=1 entropy"]
     / (a["llada"]["real entropy"] or None), "<=", 0.1),    # None: not judged
    ("C4 entropy, random minus low", lambda a: a["llada"]["free random temp=1 entropy"]
     - a["llada"]["free low temp=1 entropy"], ">=", 0),
    ("C4 words, low minus random", lambda a: a["llada"]["free low temp=1 words"]
     - a["llada"]["free random temp=1 words"], ">=", 0),
]
STYLES = {"ar": "#000000", "llada": "#0072b2", "left temp=1": "#000000", "random temp=0": "#d55e00",
          "low temp=0": "#0072b2", "random temp=1": "#e69f00", "low temp=1": "#56b4e9"}

@matplotlib.rc_context({"font.size": 14, "figure.constrained_layout.use": True})
def plot(cfg, run, results):
    """Draws NAME.png: facts recalled, and legal words over calls."""
    figure, arms, kinds, told = Figure(figsize=(18, 7)), results["arms"], COLUMNS[-4:], []
    bars, words = figure.subplots(1, 2)
    rows = {k: row for m in arms.values() for k, row in m.get("samples", {}).items()}
    for i, (name, color) in enumerate(STYLES.items()):
        if m := arms.get(f"{name} facts"):
            bars.bar_label(bars.bar([x + 0.4 * i for x in range(4)], [100 * m[k] for k in kinds],
                                    0.4, color=color, ec="w", hatch=["//", ""][i], label=name))
            told.append(f"{name} {m['reverse']:.0%}")
        if some := [row for k, row in rows.items() if k.startswith(f"{name} N=")]:
            words.semilogx([r["nfe"] for r in some], [100 * r["words"] for r in some], base=2,
                           color=color, marker="  *vo^s"[i], lw=3, ms=10,
                           label="{}: {entropy:.2f}, {seconds:.1f} s".format(name, **some[-1]))
            words.legend(title="entropy and seconds with most calls (low: surest first)")
    bars.axhline(100 / cfg.n_fact, color="#999999", linestyle="--", label="chance")
    bars.set(xticks=[0.2, 1.2, 2.2, 3.2], xticklabels=[*kinds[:3], "gap_reverse\n(ar: Eq. 8)"],
             ylim=(0, 119), title="Asked in reverse: " + ", ".join(told), ylabel="recalled (%)")
    bars.legend(loc="upper center", ncols=3)
    words.set(xlabel="calls (NFE)", ylabel="legal words (%)")
    words.xaxis.set_major_formatter("{x:.0f}")
    if LOW in (m := arms.get("llada", {})):
        words.set_title(f"N=24: surest first {m[LOW]:.0%}, at random {m[RANDOM]:.0%} legal words")
    figure.supxlabel(f"{NAME}.py, seed {cfg.seed}, {results['environment']['device']}", fontsize=11)
    run.write(f"{NAME}.png", lambda file: figure.savefig(file, dpi=80))

def show_steps(sample, when, path):
    """Prints a sample after every step, what is new in green, and writes the same as a GIF."""
    figure, writer = Figure(figsize=(len(sample) / 4, 1)), matplotlib.animation.PillowWriter(fps=3)
    with writer.saving(figure, path, dpi=80):
        for step in range(max(when) + 1):
            line = [(c if w <= step else "_", w == step) for c, w in zip(sample, when)]
            print(*(f"\033[32m{c}\033[0m" if new else c for c, new in line), sep="")
            figure.clear()
            for i, (c, new) in enumerate(line):
                figure.text(i / len(line), 0.4, c, size=20, color="#009e73" if new else "#000000")
            writer.grab_frame()

# ---- 9. main -------------------------------------------------------------------------------------
def main(argv=None):
    """Runs what the command line says; returns what results.json holds."""
    with session(argv) as (cfg, run):
        arms = experiment(cfg, run)
        for arm, m in [row for row in arms.items() if "samples" in row[1] and run.rank == 0]:
            print(table([{"sampler": name, **row} for name, row in m["samples"].items()]))
            print("".join(m["sample"]), "\n", *map("{}{}".format, m["sample"], m["when"]), "\n")
            if cfg.show:
                show_steps(m["sample"], m["when"], run.out / f"{arm}.gif")
        text = "".join(map(read_words(cfg.corpus)[0].decode, read_words(cfg.corpus)[1].values()))
        corpus = dict(characters=len(text), sha256=hashlib.sha256(text.encode()).hexdigest())
        results = report(cfg, run, arms, COLUMNS, CLAIMS[:5 if cfg.corpus else None], corpus=corpus)
        plot(cfg, run, results)
        return results

if __name__ == "__main__":
    main()
