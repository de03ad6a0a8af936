"""Architectures and loops that projects have published, in small: K1, K5, K6, K7, K11 and K14."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.agent.instances.battery import (
    B,
    Battery,
    Block,
    D,
    Net,
    T,
    V,
    Watch,
    blocks,
    loss_of,
    sgd,
    through,
    tokens,
    train,
    update,
    vectors,
)
from tests.agent.instances.states import Stream
from tests.agent.instances.states import train as train_stream
from tests.agent.instances.surgery import CHANGED, around
from tests.agent.instances.users_objects import amid, number

battery = Battery()
case = battery.case


class Attn(nn.Module):
    def __init__(self, d=D, heads=2):
        super().__init__()
        self.qkv, self.out, self.h = nn.Linear(d, 3 * d), nn.Linear(d, d), heads

    def forward(self, x, memory=None, bias=None, rope=None):
        b, t, d = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        if memory is not None:
            k, v = self.qkv(memory).chunk(3, -1)[1:]
        q, k, v = (y.view(b, -1, self.h, d // self.h).transpose(1, 2) for y in (q, k, v))
        if rope is not None:
            q, k = q * rope, k * rope
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


def mlp(d=D, out=None):
    return nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, out or d))


class Layer(nn.Module):
    def __init__(self, d=D):
        super().__init__()
        self.n1, self.attn, self.n2, self.mlp = nn.LayerNorm(d), Attn(d), nn.LayerNorm(d), mlp(d)

    def forward(self, x, **kw):
        x = x + self.attn(self.n1(x), **kw)
        return x + self.mlp(self.n2(x))


def rms(x):
    return nn.functional.rms_norm(x, (x.size(-1),))


@case("transformer.h")
def nanochat_value_embeddings(watch: Watch) -> Iterator[Tensor | float]:
    class Blk(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = Attn(), mlp()

        def forward(self, x, ve, cos_sin, window, cache=None):
            x = x + self.attn(rms(x) + (0 if ve is None else ve), rope=cos_sin[0])
            return x + self.mlp(rms(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, D), "h": nn.ModuleList(Blk() for _ in range(4))})
            self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(V, D) for i in (1, 3)})
            self.resid, self.x0l = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4) + 0.1)
            self.lm_head = nn.Linear(D, V, bias=False)

        def forward(self, idx):
            x = rms(self.transformer.wte(idx))
            x0 = x
            cs = (torch.ones(1, 1, T, 6), torch.zeros(1, 1, T, 6))
            for i, block in enumerate(self.transformer.h):
                x = self.resid[i] * x + self.x0l[i] * x0
                ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
                x = block(x, ve, cs, (T, 0))
            return 15 * torch.tanh(self.lm_head(rms(x)) / 15)

    m = GPT()
    mats = [p for p in m.transformer.h.parameters() if p.dim() == 2]
    ids = set(map(id, mats))
    rest = [p for p in m.parameters() if id(p) not in ids]
    o1, o2 = torch.optim.Muon(mats, lr=0.02), torch.optim.AdamW(rest, lr=1e-3, fused=True)
    watch(m, o1, o2)
    for s in range(8):
        yield update(loss_of(m, s), o1, o2)


@case(layers=6)
def modded_nanogpt_unet(watch: Watch) -> Iterator[Tensor | float]:
    class Blk(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.attn = Attn() if i != 3 else None
            self.mlp = mlp()
            self.lambdas = nn.Parameter(torch.tensor([1.0, 0.1]))

        def forward(self, x, ve, x0):
            x = self.lambdas[0] * x + self.lambdas[1] * x0
            if self.attn is not None:
                x = x + self.attn(rms(x) if ve is None else rms(x) + ve)
            return x + self.mlp(rms(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = nn.Embedding(V, D), nn.ModuleList(Blk(i) for i in range(6))
            self.ves = nn.ModuleList(nn.Embedding(V, D) for _ in range(2))
            self.skip = nn.Parameter(torch.ones(3))
            self.head = nn.Linear(D, V)

        def forward(self, idx):
            x = x0 = rms(self.embed(idx))
            ve = [e(idx) for e in self.ves]
            ve = [ve[0], ve[1], None, None, ve[0], ve[1]]
            skips = []
            for i, b in enumerate(self.blocks):
                if i >= 3:
                    x = x + self.skip[i - 3] * skips.pop()
                x = b(x, ve[i], x0)
                if i < 3:
                    skips.append(x)
            return self.head(rms(x))

    yield from train(watch, GPT())


class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, 4)
        self.experts = nn.ModuleList(mlp() for _ in range(4))
        self.shared = mlp()

    def forward(self, x):
        f = x.reshape(-1, D)
        w, i = self.gate(f).softmax(-1).topk(2, -1)
        y = torch.zeros_like(f)
        for e, ex in enumerate(self.experts):
            t, k = torch.where(i == e)
            if len(t):
                y = y.index_add(0, t, ex(f[t]) * w[t, k, None])
        return y.view_as(x) + self.shared(x)


@case("model.layers", 4)
def deepseek_with_mtp(watch: Watch) -> Iterator[Tensor | float]:
    class DLayer(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.n1, self.attn, self.n2 = nn.RMSNorm(D), Attn(), nn.RMSNorm(D)
            self.mlp = Moe() if i else mlp()

        def forward(self, x, start_pos=0, freqs=None, mask=None):
            x = x + self.attn(self.n1(x))
            return x + self.mlp(self.n2(x))

    class Mtp(nn.Module):
        def __init__(self):
            super().__init__()
            self.eh, self.layer = nn.Linear(2 * D, D), DLayer(1)

        def forward(self, h, e):
            return self.layer(self.eh(torch.cat([h, e], -1)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Module()
            self.model.embed = nn.Embedding(V, D)
            self.model.layers = nn.ModuleList(DLayer(i) for i in range(4))
            self.mtp = nn.ModuleList(Mtp() for _ in range(2))
            self.head = nn.Linear(D, V)

        def forward(self, idx):
            h = self.model.embed(idx)
            for layer in self.model.layers:
                h = layer(h, 0, freqs=None, mask=None)
            out = self.head(h)
            for k, m in enumerate(self.mtp):
                h = m(h, self.model.embed(idx.roll(-k - 1, 1)))
                out = out + 0.1 * self.head(h)
            return out

    yield from train(watch, Model())


@case("perceiver.layers", 3)
def perceiver(watch: Watch) -> Iterator[Tensor | float]:
    class P(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.randn(5, D))
            self.cross, self.nc = Attn(), nn.LayerNorm(D)
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            self.out = Attn()

        def forward(self, x):
            z = self.latents.expand(len(x), -1, -1)
            for _ in range(2):
                z = z + self.cross(self.nc(z), memory=x)
                for layer in self.layers:
                    z = layer(z)
            return x + self.out(x, memory=z)

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.perceiver, self.head = nn.Embedding(V, D), P(), nn.Linear(D, V)

        def forward(self, x):
            return self.head(self.perceiver(self.emb(x)))

    yield from train(watch, M())


@case("student.blocks")
def dino_multi_crop(watch: Watch) -> Iterator[Tensor | float]:
    class Dino(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = Net(), Net().requires_grad_(False)
            self.teacher.load_state_dict(self.student.state_dict())
            self.register_buffer("center", torch.zeros(V))

        @torch.no_grad()
        def ema(self):
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 0.1)

        def forward(self, crops):
            with torch.inference_mode():
                t = ((self.teacher(torch.cat(crops[:2])).mean(1) - self.center) / 0.04).softmax(-1)
            t = t.clone()
            s = (
                torch.cat([self.student(torch.cat(crops[:2])).mean(1), self.student(torch.cat(crops[2:])).mean(1)])
                / 0.1
            )
            return -(t.mean(0) * s.log_softmax(-1)).sum(-1).mean()

    m = Dino()
    m.teacher.eval()
    o = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3)
    watch(m, o)
    for s in range(8):
        x = tokens(s)
        yield update(m([x, x.flip(1), x[:, :3], x[:, 2:5], x[:, 3:]]), o)
        m.ema()


@case("generator", 4, least=2)
def wasserstein_with_many_critic_steps(watch: Watch) -> Iterator[Tensor | float]:
    class G(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator, self.critic, self.score = blocks(4), blocks(4), nn.Linear(D, 1)

    m = G()
    og, oc = (
        torch.optim.Adam(m.generator.parameters(), 1e-3, betas=(0.0, 0.9)),
        torch.optim.Adam([*m.critic.parameters(), *m.score.parameters()], 1e-3, betas=(0.0, 0.9)),
    )
    watch(m, og, oc)

    def d(x):
        return m.score(through(m.critic, x)).mean()

    for s in range(36):
        if s % 6 < 5:
            with torch.no_grad():
                fake = through(m.generator, vectors(s))
            mix = (fake + vectors(s + 50)).mul(0.5).requires_grad_()
            (g,) = torch.autograd.grad(d(mix), mix, create_graph=True)
            yield update(d(fake) - d(vectors(s + 50)) + 10 * (g.norm(2, -1) - 1).square().mean(), oc)
        else:
            yield update(-d(through(m.generator, vectors(s))), og)


@case("dit.blocks")
def dit_adaln_zero(watch: Watch) -> Iterator[Tensor | float]:
    class Blk(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.attn, self.norm2, self.mlp = (
                nn.LayerNorm(D, elementwise_affine=False),
                Attn(),
                nn.LayerNorm(D, elementwise_affine=False),
                mlp(),
            )
            self.ada = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
            nn.init.zeros_(self.ada[1].weight)
            nn.init.zeros_(self.ada[1].bias)

        def forward(self, x, c):
            a, b, g, a2, b2, g2 = self.ada(c)[:, None].chunk(6, -1)
            x = x + g * self.attn(self.norm1(x) * (1 + a) + b)
            return x + g2 * self.mlp(self.norm2(x) * (1 + a2) + b2)

    class Dit(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.time, self.blocks, self.leave = (
                nn.Linear(D, D),
                nn.Sequential(nn.Linear(1, D), nn.SiLU(), nn.Linear(D, D)),
                blocks(4, Blk),
                nn.Linear(D, D),
            )
            nn.init.zeros_(self.leave.weight)
            nn.init.zeros_(self.leave.bias)

        def forward(self, x, t):
            c, x = self.time(t), self.enter(x)
            for b in self.blocks:
                x = b(x, c)
            return self.leave(x)

    class W(nn.Module):
        def __init__(self):
            super().__init__()
            self.dit = Dit()

        def forward(self, x, n, t):
            return (self.dit((1 - t)[:, :, None] * x + t[:, :, None] * n, t) - (n - x)).square().mean()

    m = W()
    o = torch.optim.AdamW(m.parameters(), 1e-3)
    watch(m, o)
    ema = copy.deepcopy(m)
    for s in range(30):
        yield update(m(vectors(s), vectors(s + 99), torch.rand(B, 1, generator=torch.Generator().manual_seed(s))), o)
        with torch.no_grad():
            for a, b in zip(ema.parameters(), m.parameters(), strict=True):
                a.lerp_(b, 0.1)


@case("double_blocks", 3)
def flux_double_and_single(watch: Watch) -> Iterator[Tensor | float]:
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.img, self.txt, self.mod = Layer(), Layer(), nn.Linear(D, D)

        def forward(self, img, txt, vec, pe):
            j = torch.cat([txt, img], 1).mean(1, keepdim=True)
            s = self.mod(vec)[:, None]
            return self.img(img + 0.1 * j * s), self.txt(txt + 0.1 * j)

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = Layer()
            self.mod = nn.Linear(D, D)

        def forward(self, x, vec, pe):
            return self.l(x + 0.1 * self.mod(vec)[:, None])

    class Flux(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.txt_in, self.double_blocks, self.single_blocks, self.leave = (
                nn.Linear(D, D),
                nn.Linear(D, D),
                nn.ModuleList(Double() for _ in range(3)),
                nn.ModuleList(Single() for _ in range(3)),
                nn.Linear(D, D),
            )

        def forward(self, x):
            img, txt, vec = self.enter(x), self.txt_in(x[:, :2]), x.mean(1)
            for b in self.double_blocks:
                img, txt = b(img=img, txt=txt, vec=vec, pe=None)
            h = torch.cat((txt, img), 1)
            for b in self.single_blocks:
                h = b(h, vec=vec, pe=None)
            return self.leave(h[:, 2:])

    yield from train_stream(watch, Flux())


@case()
def rwkv_first_value_as_a_tensor(watch: Watch) -> Iterator[Tensor | float]:
    class Blk(Block):
        def __init__(self):
            super().__init__()
            self.v = nn.Linear(D, D)

        def forward(self, v_first, x):
            v = self.v(self.norm(x))
            v_first = torch.where(v_first == 0, v, v_first)
            return v_first, x + self.update(x) + 0.1 * (v + v_first)

    def run(m, x):
        v = torch.zeros_like(x)
        for b in m.blocks:
            v, x = b(v, x)
        return x

    yield from train_stream(watch, Stream(Blk, run))


@case()
def altup_streams(watch: Watch) -> Iterator[Tensor | float]:
    """(4, B, T, D): predict, run the block on the active stream, correct; per-layer inputs."""

    class Blk(Block):
        def __init__(self):
            super().__init__()
            self.predict, self.correct = nn.Parameter(torch.eye(4) + 0.05), nn.Parameter(torch.ones(4))
            self.pl = nn.Linear(D, D)

        def forward(self, hidden_states, position_embeddings, per_layer_input):
            p = torch.einsum("sbtd,su->ubtd", hidden_states, self.predict)
            a = p[0] + self.update(p[0]) + 0.1 * self.pl(per_layer_input)
            return p + (a - p[0]) * self.correct[:, None, None, None]

    def run(m, x):
        h = torch.stack([x, x * 0.9, x.roll(1, 1), -x])
        per = x.detach()
        for b in m.blocks:
            h = b(h, (torch.ones(B, T, D), torch.zeros(B, T, D)), per)
        return h.mean(0)

    yield from train_stream(watch, Stream(Blk, run))


@case("core", 4)
def recurrent_depth(watch: Watch) -> Iterator[Tensor | float]:
    """Huginn: prelude, a core that runs a random number of times, most of them without gradients, coda."""
    r = random.Random(1)

    class H(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.prelude, self.adapter, self.core, self.coda, self.head = (
                nn.Embedding(V, D),
                blocks(2),
                nn.Linear(2 * D, D),
                blocks(4),
                blocks(2),
                nn.Linear(D, V),
            )

        def forward(self, x):
            e = through(self.prelude, self.emb(x))
            s = torch.randn_like(e)
            n = r.randint(0, 3)
            with torch.no_grad():
                for _ in range(n):
                    s = through(self.core, self.adapter(torch.cat([s, e], -1)))
            for _ in range(2):
                s = through(self.core, self.adapter(torch.cat([s, e], -1)))
            return self.head(through(self.coda, s))

    yield from train(watch, H())


@case("actor.blocks", 3)
def soft_actor_critic(watch: Watch) -> Iterator[Tensor | float]:
    class Q(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.v = blocks(3), nn.Linear(D, 1)

        def forward(self, x, a):
            return self.v(through(self.blocks, x + a))

    class A(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.a = blocks(3), nn.Linear(D, D)

        def forward(self, x):
            return torch.tanh(self.a(through(self.blocks, x)))

    class Sac(nn.Module):
        def __init__(self):
            super().__init__()
            self.actor, self.q1, self.q2, self.t1, self.t2, self.log_alpha = (
                A(),
                Q(),
                Q(),
                Q().requires_grad_(False),
                Q().requires_grad_(False),
                nn.Parameter(torch.zeros(())),
            )

    m = Sac()
    oa, oq, ol = (
        torch.optim.Adam(m.actor.parameters(), 1e-3),
        torch.optim.Adam([*m.q1.parameters(), *m.q2.parameters()], 1e-3),
        torch.optim.Adam([m.log_alpha], 1e-3),
    )
    watch(m, oa, oq, ol)
    for s in range(8):
        x, y = vectors(s), vectors(s + 1)
        with torch.no_grad():
            a = m.actor(y)
            t = torch.min(m.t1(y, a), m.t2(y, a))
        yield update((m.q1(x, a) - t).square().mean() + (m.q2(x, a) - t).square().mean(), oq)
        m.q1.requires_grad_(False), m.q2.requires_grad_(False)
        a = m.actor(x)
        yield update((m.log_alpha.exp().detach() * a.square() - torch.min(m.q1(x, a), m.q2(x, a))).mean(), oa)
        m.q1.requires_grad_(True), m.q2.requires_grad_(True)
        yield update(-(m.log_alpha * a.detach().mean()), ol)
        with torch.no_grad():
            for p, q in zip(
                [*m.t1.parameters(), *m.t2.parameters()], [*m.q1.parameters(), *m.q2.parameters()], strict=True
            ):
                p.lerp_(q, 0.05)


@case("trunk", 4)
def tasks_in_turn_with_heads_of_blocks(watch: Watch) -> Iterator[Tensor | float]:
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.trunk, self.heads, self.out = (
                nn.Embedding(V, D),
                blocks(4),
                nn.ModuleDict({k: blocks(2) for k in "abc"}),
                nn.Linear(D, V),
            )

        def forward(self, x, task):
            return self.out(through(self.heads[task], through(self.trunk, self.emb(x))))

    m = M()
    o = torch.optim.AdamW(m.parameters(), 1e-3)
    watch(m, o)
    for s in range(12):
        x = tokens(s)
        yield update(nn.functional.cross_entropy(m(x, "abc"[s % 3]).flatten(0, 1), x.flatten()), o)


@case("policy.blocks", 4)
def preference_with_adapters_off_as_reference(watch: Watch) -> Iterator[Tensor | float]:
    """The reference is the same model with its adapters off, called first, without gradients, inside one root."""

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.a, self.b, self.on = (
                base.requires_grad_(False),
                nn.Linear(D, 2, bias=False),
                nn.Linear(2, 2 * D, bias=False),
                True,
            )
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.base_layer(x) + (self.b(self.a(x)) if self.on else 0)

    class Dpo(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = Net().requires_grad_(False)
            for b in self.policy.blocks:
                b.up = Lora(b.up)

        def lp(self, x):
            return self.policy(x).log_softmax(-1).gather(-1, x[..., None]).sum((1, 2))

        def forward(self, a, b):
            both = torch.cat([a, b])
            for blk in self.policy.blocks:
                blk.up.on = False
            with torch.no_grad():
                ref = self.lp(both)
            for blk in self.policy.blocks:
                blk.up.on = True
            d = self.lp(both) - ref
            return -nn.functional.logsigmoid(0.1 * (d[:B] - d[B:])).mean()

    m = Dpo()
    o = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)
    watch(m, o)
    for s in range(8):
        yield update(m(tokens(s), tokens(s + 50)), o)


@case()
def meta_learning_by_functional_calls(watch: Watch) -> Iterator[Tensor | float]:
    """MAML: inner gradients with create_graph and functional_call on plain tensors, an outer update."""
    m = Net()
    o = torch.optim.Adam(m.parameters(), 1e-3)
    watch(m, o)
    for s in range(8):
        o.zero_grad()
        total = 0
        for task in range(2):
            p = dict(m.named_parameters())
            x = tokens(s * 2 + task)
            inner = nn.functional.cross_entropy(torch.func.functional_call(m, p, (x,)).flatten(0, 1), x.flatten())
            g = torch.autograd.grad(inner, list(p.values()), create_graph=True)
            p = {k: v - 0.1 * d for (k, v), d in zip(p.items(), g, strict=True)}
            total = total + nn.functional.cross_entropy(
                torch.func.functional_call(m, p, (x.flip(1),)).flatten(0, 1), x.flip(1).flatten()
            )
        total.backward()
        o.step()
        yield total.detach()


@case(layers=4)
def one_block_four_times_in_the_list(watch: Watch) -> Iterator[Tensor | float]:
    m = Net()
    b = Block()
    m.blocks = nn.ModuleList([b] * 4)
    yield from train(watch, m)


@case()
def fourier_operator(watch: Watch) -> Iterator[Tensor | float]:
    class Fno(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.conv = nn.Parameter(torch.randn(D, D, 3, dtype=torch.cfloat) / D), nn.Conv1d(D, D, 1)

        def forward(self, x):
            f = torch.fft.rfft(x)
            y = torch.zeros_like(f)
            y[..., :3] = torch.einsum("bix,iox->box", f[..., :3], self.w)
            return x + nn.functional.gelu(torch.fft.irfft(y, n=x.size(-1)) + self.conv(x))

    def run(m, x):
        x = x.transpose(1, 2)
        for b in m.blocks:
            x = b(x)
        return x

    yield from train_stream(watch, Stream(Fno, run), shape=(B, 24, D))


@case()
def forced_weight_normalisation_in_long_accumulation(watch: Watch) -> Iterator[Tensor | float]:
    """EDM2: each training forward writes the normalised weights. 20 micro-batches per update."""

    class Lin(nn.Linear):
        def forward(self, x):
            if self.training:
                with torch.no_grad():
                    self.weight.copy_(nn.functional.normalize(self.weight, dim=-1))
            return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=-1), self.bias)

    class Blk(Block):
        def __init__(self):
            super().__init__()
            self.up, self.down = Lin(D, 2 * D), Lin(2 * D, D)

    m = Net(kind=Blk)
    o = torch.optim.Adam(m.parameters(), 1e-3)
    watch(m, o)
    for s in range(6):
        o.zero_grad()
        for k in range(20):
            loss = loss_of(m, 20 * s + k) / 20
            loss.backward()
        o.step()
        yield loss.detach()


@case()
def grad_enabled_inside_a_trainer_without(watch: Watch) -> Iterator[Tensor | float]:
    """The root is called without gradients, and its forward enables them."""

    class M(Net):
        def forward(self, x):
            with torch.enable_grad():
                return super().forward(x)

    m = M()
    o = sgd(m)
    watch(m, o)
    for s in range(20):
        with torch.no_grad():
            out = m(tokens(s))
        with torch.enable_grad():
            yield update(nn.functional.cross_entropy(out.flatten(0, 1), tokens(s).flatten()), o)


@case()
def adversarial_inner_steps_in_eval(watch: Watch) -> Iterator[Tensor | float]:
    """TRADES: the attack needs gradients in eval mode, between training forwards."""

    class M(Net):
        def forward(self, h):
            return self.head(through(self.blocks, h))

    m = M()
    o = sgd(m)
    watch(m, o)
    for s in range(8):
        m.eval()
        h = m.embedding(tokens(s)).detach()
        a = h + 0.01
        for _ in range(3):
            a = a.detach().requires_grad_()
            (g,) = torch.autograd.grad(nn.functional.kl_div(m(a).log_softmax(-1), m(h).softmax(-1)), a)
            a = a + 0.01 * g.sign()
        m.train()
        yield update(
            nn.functional.cross_entropy(m(m.embedding(tokens(s))).flatten(0, 1), tokens(s).flatten())
            + nn.functional.kl_div(m(a.detach()).log_softmax(-1), m(h).softmax(-1)),
            o,
        )


@case()
def gradient_cache(watch: Watch) -> Iterator[Tensor | float]:
    """Contrastive with a large batch: embeddings without gradients first, then one micro-batch at a time."""
    m = Net()
    o = sgd(m)
    watch(m, o)
    for s in range(8):
        with torch.no_grad():
            e = torch.cat([m(tokens(4 * s + k)).mean(1) for k in range(4)])
        e.requires_grad_()
        loss = nn.functional.cross_entropy(e @ e.T, torch.arange(16))
        loss.backward()
        o.zero_grad()
        for k, g in enumerate(e.grad.split(4)):
            (m(tokens(4 * s + k)).mean(1) * g).sum().backward()
        o.step()
        yield loss.detach()


@case()
def forward_mode_duals(watch: Watch) -> Iterator[Tensor | float]:
    import torch.autograd.forward_ad as fwad

    def act(m, o):
        with fwad.dual_level():
            y = m.head(through(m.blocks, fwad.make_dual(m.embedding(tokens(1)), vectors(3))))
            return fwad.unpack_dual(y).tangent.sum()

    yield from amid(watch, act)


@case()
def full_backward_hooks_of_the_user(watch: Watch) -> Iterator[Tensor | float]:
    m, seen = Net(), []
    for b in m.blocks:
        b.register_full_backward_hook(lambda mod, gi, go: seen.append(float(go[0].norm())))
        b.register_full_backward_pre_hook(lambda mod, go: (go[0] * 0.9,))
    for loss in train(watch, m):
        yield loss
        yield sum(seen)


@case()
def captum_like_layer_gradients(watch: Watch) -> Iterator[Tensor | float]:
    def act(m, o):
        saved = {}
        hs = [
            b.register_forward_hook(lambda mod, a, out, i=i: saved.__setitem__(i, out)) for i, b in enumerate(m.blocks)
        ] + [m.blocks[0].register_forward_pre_hook(lambda mod, a: (a[0].detach().requires_grad_(),))]
        m.eval()
        y = m(tokens(5))[:, -1, 0].sum()
        g = torch.autograd.grad(y, list(saved.values()))
        for h in hs:
            h.remove()
        m.train()
        return number(g)

    yield from amid(watch, act)


@case(None, told="inside compiled functions")
def whole_step_is_compiled(watch: Watch) -> Iterator[Tensor | float]:
    m = Net()
    o = sgd(m)
    watch(m, o)

    @torch.compile(backend="eager")
    def step(x):
        o.zero_grad()
        loss = nn.functional.cross_entropy(m(x).flatten(0, 1), x.flatten())
        loss.backward()
        o.step()
        return loss.detach()

    for s in range(14):
        yield step(tokens(s))


@case()
def checkpoint_func_of_hugging_face(watch: Watch) -> Iterator[Tensor | float]:
    """`gradient_checkpointing_func(decoder_layer.__call__, ...)`, reentrant, with inputs made to require gradients."""
    m = Net(lambda st, x: functools.reduce(lambda h, b: checkpoint(b.__call__, h, use_reentrant=True), st, x))
    m.embedding.register_forward_hook(lambda mod, a, out: out.requires_grad_(True))
    yield from train(watch, m)


@case()
def sharpness_aware_two_forwards(watch: Watch) -> Iterator[Tensor | float]:
    m = Net()
    o = torch.optim.SGD(m.parameters(), 0.02, momentum=0.9)
    watch(m, o)
    for s in range(8):
        o.zero_grad()
        loss = loss_of(m, s)
        loss.backward()
        with torch.no_grad():
            n = torch.stack([p.grad.norm() for p in m.parameters()]).norm()
            e = [p.grad * 0.05 / n for p in m.parameters()]
            for p, d in zip(m.parameters(), e, strict=True):
                p.add_(d)
        o.zero_grad()
        loss_of(m, s).backward()
        with torch.no_grad():
            for p, d in zip(m.parameters(), e, strict=True):
                p.sub_(d)
        o.step()
        yield loss.detach()


@case()
def validation_runs_while_a_training_forward_is_open(watch: Watch) -> Iterator[Tensor | float]:
    """Another thread calls the model between two blocks of a training forward."""
    hold = []

    def run(st, x):
        for i, b in enumerate(st):
            x = b(x)
            if i == 1 and torch.is_grad_enabled() and hold:
                t = threading.Thread(target=hold[0])
                t.start()
                t.join()
        return x

    m = Net(run)
    o = sgd(m)
    watch(m, o)
    out = []

    def val():
        with torch.no_grad():
            out.append(float(m(tokens(100)).double().sum()))

    hold.append(val)
    for s in range(10):
        yield update(loss_of(m, s), o)
        yield out[-1]


@case()
def exception_in_a_forward_and_on(watch: Watch) -> Iterator[Tensor | float]:
    bad = [0]

    def run(st, x):
        bad[0] += 1
        for i, b in enumerate(st):
            if bad[0] % 3 == 0 and i == 2:
                raise RuntimeError("out of memory")
            x = b(x)
        return x

    m = Net(run)
    o = sgd(m)
    watch(m, o)
    for s in range(15):
        try:
            yield update(loss_of(m, s), o)
        except RuntimeError:
            yield -1.0


@contextlib.contextmanager
def group():
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@case("layers")
def torchtitan_like(watch: Watch) -> Iterator[Tensor | float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class TT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok_embeddings = nn.Embedding(V, D)
            self.layers = nn.ModuleDict({str(i): Block() for i in range(4)})
            self.norm, self.output = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

        def forward(self, x):
            h = self.tok_embeddings(x)
            for layer in self.layers.values():
                h = layer(h)
            return self.output(self.norm(h))

    with group():
        mesh = init_device_mesh("cpu", (1,))
        with torch.device("meta"):
            m = TT()
        for layer in m.layers.values():
            layer.compile(backend="eager", fullgraph=True)
        for layer in m.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(m, mesh=mesh)
        m.to_empty(device="cpu")
        with torch.no_grad():
            g = torch.Generator().manual_seed(0)
            for p in m.parameters():
                local = p.to_local()
                local.copy_(torch.randn(local.shape, generator=g) * 0.2)
        o = torch.optim.AdamW(m.parameters(), 1e-3, fused=False, foreach=True)
        sch = torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1, (s + 1) / 3))
        watch(m, o)
        for s in range(10):
            o.zero_grad()
            for k in range(2):
                loss = loss_of(m, 2 * s + k) / 2
                loss.backward()
            nn.utils.clip_grad_norm_(m.parameters(), 1.0, foreach=True)
            o.step()
            sch.step()
            yield loss.detach()
            if s % 4 == 3:
                m.eval()
                with torch.no_grad():
                    yield loss_of(m, 99)
                m.train()


@case()
def slots_object_as_state(watch: Watch) -> Iterator[Tensor | float]:
    class St:
        __slots__ = ("n", "x")

        def __init__(self, x):
            self.x, self.n = x, 0

    class Blk(Block):
        def forward(self, s):
            o = St(super().forward(s.x))
            o.n = s.n + 1
            return o

    def run(m, x):
        s = St(x)
        for b in m.blocks:
            s = b(s)
        return s.x

    yield from train_stream(watch, Stream(Blk, run))


@case()
def positional_query_embeddings(watch: Watch) -> Iterator[Tensor | float]:
    """DETR's decoder: block(tgt, memory, pos=..., query_pos=...), all of one shape."""

    class Blk(Block):
        def forward(self, tgt, memory, pos=None, query_pos=None):
            return super().forward(tgt + 0.1 * query_pos) + 0.1 * (memory + pos)

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.blocks, self.q, self.out = (
                nn.Linear(D, D),
                blocks(4, Blk),
                nn.Parameter(torch.randn(T, D)),
                nn.Linear(D, 4),
            )

        def forward(self, x):
            mem = self.enter(x)
            t, q, outs = torch.zeros_like(mem), self.q.expand(B, -1, -1), []
            for b in self.blocks:
                t = b(t, mem, pos=torch.ones_like(mem), query_pos=q)
                outs.append(self.out(t))
            return torch.stack(outs)

    yield from train_stream(watch, M())


@case(layers=4, told=CHANGED)
def widened(watch: Watch) -> Iterator[Tensor | float]:
    """Net2Wider: every module is replaced by a wider one."""
    m = Net()
    o = sgd(m)
    watch(m, o)
    for s in range(4):
        yield update(loss_of(m, s), o)
    m.embedding, m.blocks, m.head = nn.Embedding(V, 16), blocks(4, lambda: Block(16)), nn.Linear(16, V)
    o = sgd(m)
    for s in range(20):
        yield update(loss_of(m, s), o)


@case()
def quantisation_aware_midway(watch: Watch) -> Iterator[Tensor | float]:
    def change(m, o):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            m.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
            m.embedding.qconfig = None
            torch.ao.quantization.prepare_qat(m, inplace=True)
        return sgd(m)

    m = Net()
    m.embedding.qconfig = None
    yield from around(watch, m, change)


@case(told="were removed")
def hooks_cleared_by_apply_each_epoch(watch: Watch) -> Iterator[Tensor | float]:
    m = Net()
    o = sgd(m)
    watch(m, o)
    for s in range(20):
        if s and s % 5 == 0:
            for module in m.modules():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
        yield update(loss_of(m, s), o)
