"""Models and loops of everyday scripts: K1, K6, K7, K11 and K14."""

from __future__ import annotations

import types
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

battery = Battery()
case = battery.case


def fit(watch, model, loss, steps=8, optimizer=None) -> Iterator[Tensor]:
    """Train `model` on `loss(model, step)`."""
    optimizer = optimizer or sgd(model)
    watch(model, optimizer)
    for step in range(steps):
        yield update(loss(model, step), optimizer)


def square(model, step):
    return model(vectors(step)).square().mean()


# What trains.


@case("control")
def control_branch_into_a_frozen_trunk(watch: Watch) -> Iterator[Tensor]:
    class Controlled(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.control = blocks(6).requires_grad_(False), blocks(4)
            self.zero = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
            for each in self.zero:
                nn.init.zeros_(each.weight)

        def forward(self, x):
            added, h = [], x
            for block, zero in zip(self.control, self.zero, strict=True):
                h = block(h)
                added.append(zero(h))
            for index, block in enumerate(self.trunk):
                x = block(x)
                if index < 4:
                    x = x + added[index]
            return x

    yield from fit(watch, Controlled(), square)


@case("blocks")
def vectors_that_scale_frozen_weights(watch: Watch) -> Iterator[Tensor]:
    class Scaled(Block):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(2 * D))

        def update(self, x):
            return self.down(nn.functional.gelu(self.up(self.norm(x) + x.mean(-2, keepdim=True)) * self.scale))

    yield from train(watch, Net(kind=Scaled))


@case("blocks")
def norms_of_all_blocks_alone(watch: Watch) -> Iterator[Tensor]:
    model = Net().requires_grad_(False)
    for block in model.blocks:
        block.norm.requires_grad_(True)
    yield from train(watch, model)


@case("student")
def teacher_with_gradients_through_frozen_weights(watch: Watch) -> Iterator[Tensor]:
    """The loop forgot `no_grad` around a longer teacher, whose hidden states are read by hooks."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student, self.kept = blocks(8).requires_grad_(False), blocks(4), []
            for block in (*self.teacher[::2], *self.student):
                block.register_forward_hook(lambda _, __, out: self.kept.append(out))

        def forward(self, x):
            self.kept.clear()
            student, teacher = through(self.student, x), through(self.teacher, x)
            pairs = zip(self.kept[:4], self.kept[4:], strict=True)
            return (student - teacher).square().mean() + sum((a - b).square().mean() for a, b in pairs)

    yield from fit(watch, Pair(), lambda model, step: model(vectors(step)))


@case("layers")
def experts_outnumber_the_layers(watch: Watch) -> Iterator[Tensor]:
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.gate = nn.LayerNorm(D), nn.Linear(D, 8)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 8), nn.SiLU(), nn.Linear(8, D)) for _ in range(8))

        def forward(self, x):
            h = self.norm(x + x.mean(1, keepdim=True))
            weights, chosen = self.gate(h).softmax(-1).topk(2)
            out = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                rows = (chosen == index).any(-1)
                if rows.any():
                    weight = weights[rows][chosen[rows] == index][:, None]
                    out = out.index_put((rows,), weight * expert(h[rows]), accumulate=True)
            return x + out

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = blocks(4, Experts)

        def forward(self, x):
            return through(self.layers, x)

    yield from fit(watch, Model(), square)


@case("encoder")
def predictor_on_two_views_with_a_stopped_gradient(watch: Watch) -> Iterator[Tensor]:
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(*blocks(4))
            self.predictor = nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, D))

        def forward(self, one, other):
            a, b = self.encoder(one), self.encoder(other)
            p, q = self.predictor(a), self.predictor(b)
            cos = nn.functional.cosine_similarity
            return -(cos(p, b.detach(), -1).mean() + cos(q, a.detach(), -1).mean()) / 2

    yield from fit(watch, Siamese(), lambda model, step: model(vectors(step), vectors(step + 99)))


@case("blocks", told="trains 2 of 4")
def lower_half_under_no_grad_inside_the_forward(watch: Watch) -> Iterator[Tensor]:
    def run(stack, x):
        with torch.no_grad():
            x = through(stack[:2], x)
        return through(stack[2:], x)

    model = Net(run)
    optimizer = sgd(*model.blocks[2:], model.head)
    yield from fit(watch, model, loss_of, optimizer=optimizer)


@case("blocks")
def blocks_with_losses_of_their_own(watch: Watch) -> Iterator[Tensor]:
    """Greedy training: a block gets the detached state of the one before."""

    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.blocks = nn.Embedding(V, D), blocks(4)
            self.heads = nn.ModuleList(nn.Linear(D, V) for _ in range(4))

        def forward(self, batch):
            x, loss = self.embedding(batch), 0.0
            for block, head in zip(self.blocks, self.heads, strict=True):
                x = block(x.detach())
                loss = loss + nn.functional.cross_entropy(head(x).flatten(0, 1), batch.flatten())
            return loss

    yield from fit(watch, Local(), lambda model, step: model(tokens(step)))


# How the blocks are called.


@case("encoder")
def long_inputs_in_chunks(watch: Watch) -> Iterator[Tensor]:
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(*blocks(4))

        def forward(self, x):
            return torch.cat([self.encoder(each) for each in x.chunk(3, 1)], 1)

    yield from fit(watch, Chunked(), square)


@case("blocks")
def memory_tokens_over_segments(watch: Watch) -> Iterator[Tensor]:
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.blocks = nn.Parameter(torch.randn(1, 2, D)), blocks(4)

        def forward(self, x):
            memory, out = self.memory.expand(len(x), -1, -1), []
            for segment in x.chunk(2, 1):
                h = through(self.blocks, torch.cat([memory, segment], 1))
                memory, rest = h[:, :2], h[:, 2:]
                out.append(rest)
            return torch.cat(out, 1)

    yield from fit(watch, Recurrent(), square)


@case()
def samples_are_drawn_in_training_mode_before_each_step(watch: Watch) -> Iterator[Tensor]:
    """As policy gradients on sampled answers."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        batch = tokens(step)[:, :3]
        with torch.no_grad():
            for _ in range(3):
                drawn = torch.distributions.Categorical(logits=model(batch)[:, -1]).sample()
                batch = torch.cat([batch, drawn[:, None]], 1)
        chances = model(batch[:, :-1]).log_softmax(-1).gather(-1, batch[:, 1:, None])
        yield update(-(chances * (batch[:, 1:, None] % 3 - 1)).mean(), optimizer)


@case()
def micro_batches_that_are_left_out(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(10):
        losses = []
        for part in range(3):
            if (step + part) % 4 == 0:
                continue
            losses.append(loss_of(model, 3 * step + part) / 3)
            losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        yield sum(float(each.detach()) for each in losses)


@case("right")
def two_lists_in_step_with_each_other(watch: Watch) -> Iterator[Tensor]:
    class Zipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = blocks(4), blocks(4)

        def forward(self, x):
            x, y = x, x.flip(1)
            for one, other in zip(self.left, self.right, strict=True):
                x, y = one(x), other(y)
                x, y = x + 0.1 * y, y + 0.1 * x
            return x + y

    yield from fit(watch, Zipped(), square)


class Change(Block):
    """Returns the change alone."""

    def forward(self, x):
        return self.update(x)


@case(layers=3)
def gates_of_a_highway_between_the_blocks(watch: Watch) -> Iterator[Tensor]:
    class Highway(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks(4, Change)
            self.gates = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

        def forward(self, x):
            for block, gate in zip(self.blocks, self.gates, strict=True):
                g = torch.sigmoid(gate(x))
                x = g * block(x) + (1 - g) * x
            return x

    yield from fit(watch, Highway(), square)


@case(layers=3)
def weights_of_the_changes_begin_at_zero(watch: Watch) -> Iterator[Tensor]:
    class ReZero(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.alpha = blocks(4, Change), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            for alpha, block in zip(self.alpha, self.blocks, strict=True):
                x = x + alpha * block(x)
            return x

    yield from fit(watch, ReZero(), square, steps=12)


@case(layers=3)
def norms_behind_a_weighted_sum(watch: Watch) -> Iterator[Tensor]:
    class DeepNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks(4, Change)
            self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))

        def forward(self, x):
            for block, norm in zip(self.blocks, self.norms, strict=True):
                x = norm(1.7 * x + block(x))
            return x

    yield from fit(watch, DeepNorm(), square)


@case("blocks", layers=6)
def blocks_of_three_classes_in_turn(watch: Watch) -> Iterator[Tensor]:
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(D), nn.MultiheadAttention(D, 2, batch_first=True)

        def forward(self, x):
            h = self.norm(x)
            return x + self.attention(h, h, h, need_weights=False)[0]

    class Convolve(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.LayerNorm(D), nn.Conv1d(D, D, 3, padding=1, groups=D)

        def forward(self, x):
            return x + self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)

    model = Net()
    model.blocks = nn.ModuleList(kind() for _ in range(2) for kind in (Attend, Block, Convolve))
    yield from train(watch, model)


@case()
def outputs_in_a_list_behind_a_scalar(watch: Watch) -> Iterator[Tensor]:
    class Listed(Block):
        def forward(self, x):
            change = self.update(x)
            return [change.square().mean(), x + change]

    def run(stack, x):
        total = 0.0
        for block in stack:
            aux, x = block(x)
            total = total + aux
        return x + 0.01 * total

    yield from train(watch, Net(run, kind=Listed))


@case()
def slices_of_a_sequence(watch: Watch) -> Iterator[Tensor]:
    model = Net(lambda stack, x: stack[2:](stack[:2](x) * 1.0))
    model.blocks = nn.Sequential(*model.blocks)
    yield from train(watch, model)


@case()
def noise_by_hooks_of_the_user_with_keywords(watch: Watch) -> Iterator[Tensor]:
    model = Net(lambda stack, x: through([lambda h, each=each: each(x=h) for each in stack], x))

    def add_noise(_, args, kwargs):
        return args, {"x": kwargs["x"] + 0.01 * torch.sin(1e3 * kwargs["x"].detach())}

    for block in model.blocks:
        block.register_forward_pre_hook(add_noise, with_kwargs=True)
    yield from train(watch, model)


@case()
def a_call_of_the_users_own(watch: Watch) -> Iterator[Tensor]:
    class Called(Block):
        def __call__(self, x, scale=1.0):
            return super().__call__(x * scale) / scale

    yield from train(watch, Net(lambda stack, x: through(stack, x), kind=Called))


@case()
def checkpoints_without_the_random_state(watch: Watch) -> Iterator[Tensor]:
    def run(stack, x):
        for block in stack:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        return x

    yield from train(watch, Net(run))


class Marked(Tensor):
    """A tensor of the user's own class, as those that carry their metadata along."""


@case()
def tensors_of_the_users_own_class(watch: Watch) -> Iterator[Tensor]:
    model = Net(lambda stack, x: through(stack, x.as_subclass(Marked)).as_subclass(Tensor))
    yield from train(watch, model)


@case()
def forward_instead_of_call(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    yield from fit(
        watch,
        model,
        lambda model, step: nn.functional.cross_entropy(
            model.forward(tokens(step)).flatten(0, 1), tokens(step).flatten()
        ),
    )


@case()
def a_training_step_of_the_model(watch: Watch) -> Iterator[Tensor]:
    class Module(Net):
        def training_step(self, batch, _):
            return {"loss": nn.functional.cross_entropy(self(batch).flatten(0, 1), batch.flatten())}

    yield from fit(watch, Module(), lambda model, step: model.training_step(tokens(step), step)["loss"])


@case()
def a_stack_that_is_left_out_in_some_steps(watch: Watch) -> Iterator[Tensor]:
    count = [0]

    def run(stack, x):
        count[0] += 1
        return x if count[0] % 3 == 0 else through(stack, x)

    count[0] = 0
    yield from train(watch, Net(run), steps=14)


@case("blocks")
def volumes_of_a_video(watch: Watch) -> Iterator[Tensor]:
    class Cube(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv3d(8, 8, 3, padding=1)

        def forward(self, x):
            return x + self.conv(nn.functional.silu(self.norm(x)))

    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks(4, Cube)

        def forward(self, x):
            return through(self.blocks, x)

    yield from fit(watch, Video(), lambda model, step: model(vectors(step, 2, 8, 3, 4, 4)).square().mean())


@case("blocks")
def windows_in_each_block(watch: Watch) -> Iterator[Tensor]:
    class Window(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift, self.norm = shift, nn.LayerNorm(D)
            self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

        def forward(self, x):  # (B, H, W, D)
            h = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
            b, height, width, d = h.shape
            h = h.view(b, height // 2, 2, width // 2, 2, d).transpose(2, 3).reshape(-1, 4, d)
            h = self.attention(h, h, h, need_weights=False)[0]
            h = h.view(b, height // 2, width // 2, 2, 2, d).transpose(2, 3).reshape(b, height, width, d)
            return x + torch.roll(h, (self.shift, self.shift), (1, 2))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Window(index % 2) for index in range(4))

        def forward(self, x):
            return through(self.blocks, x)

    yield from fit(watch, Model(), lambda model, step: model(vectors(step, 2, 4, 4, D)).square().mean())


# Loops.


@case()
def loss_in_the_output_of_the_forward(watch: Watch) -> Iterator[Tensor]:
    class WithLoss(Net):
        def forward(self, input_ids, labels=None):
            logits = super().forward(input_ids)
            loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return types.SimpleNamespace(loss=loss, logits=logits)

    yield from fit(watch, WithLoss(), lambda model, step: model(tokens(step), labels=tokens(step)).loss)


@case()
def batches_of_other_sizes_and_lengths(watch: Watch) -> Iterator[Tensor]:
    def loss(model, step):
        batch = torch.randint(V, (1 + step % 4, 3 + step % 5), generator=torch.Generator().manual_seed(step))
        return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

    yield from fit(watch, Net(), loss, steps=10)


@case()
def validation_in_training_mode_with_gradients_between_steps(watch: Watch) -> Iterator[Tensor]:
    """The loop forgot both `eval` and `no_grad`, and takes the loss only."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        if step % 2:
            yield loss_of(model, 100 + step)


@case()
def gradients_of_inputs_for_noise_against_the_model(watch: Watch) -> Iterator[Tensor]:
    """Free adversarial training: one backward pass for weights and inputs, several on the same batch."""
    model = Net(lambda stack, x: through(stack, x))
    optimizer = sgd(model)
    watch(model, optimizer)
    noise = torch.zeros(B, T, D)
    for step in range(3):
        for _ in range(3):
            noise.requires_grad_(True)
            x = model.embedding(tokens(step)) + noise
            logits = model.head(model.run(model.blocks, x))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens(step).flatten())
            yield update(loss, optimizer)
            noise = (noise.detach() + 0.01 * noise.grad.sign()).clamp(-0.1, 0.1)


@case()
def steps_are_undone_by_a_line_search(watch: Watch) -> Iterator[Tensor]:
    """Backtracking: the loop saves the weights, steps, looks at the loss, and goes back."""
    model = Net()
    optimizer = sgd(model, lr=0.5)
    watch(model, optimizer)
    for step in range(8):
        before = {name: each.clone() for name, each in model.state_dict().items()}
        loss = update(loss_of(model, step), optimizer)
        with torch.no_grad():
            worse = loss_of(model, step) > loss
        if worse:
            model.load_state_dict(before)
            optimizer.param_groups[0]["lr"] *= 0.5
        yield loss


@case()
def model_moves_between_precisions_in_each_step(watch: Watch) -> Iterator[Tensor]:
    """Weights are stored in half precision between the steps, as to save memory."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        model.float()
        yield update(loss_of(model, step), optimizer)
        optimizer.zero_grad()
        model.bfloat16()


@case()
def gradients_over_two_graphs_with_one_retained(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        logits = model(tokens(step))
        first = nn.functional.cross_entropy(logits.flatten(0, 1), tokens(step).flatten())
        optimizer.zero_grad()
        first.backward(retain_graph=True)
        (logits.square().mean() * 0.1).backward()
        optimizer.step()
        yield first
