"""A back-off under optimizers and loops as papers and repositories write them out.

As in test_backoff_in_loops.py, each trains alone and with a scale of 1/8, and user code reads the same rates in both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from tests.agent.control.test_backoff_in_loops import END, FIRST, LAST, Loop, tried

__all__ = ["tried"]

LOOPS: dict[str, Callable[[Loop], Any]] = {}
REFUSED: dict[str, tuple[str, Callable[[Loop], Any]]] = {}


def loop(case: Callable[[Loop], Any]) -> Callable[[Loop], Any]:
    LOOPS[case.__name__] = case
    return case


def refused(reason: str) -> Callable[[Callable[[Loop], Any]], Callable[[Loop], Any]]:
    def add(case: Callable[[Loop], Any]) -> Callable[[Loop], Any]:
        REFUSED[case.__name__] = reason, case
        return case

    return add


def each_of(optimizer):
    for group in optimizer.param_groups:
        for each in group["params"]:
            if each.grad is not None:
                yield group, each, optimizer.state[each]


class Lion(Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, each, state in each_of(self):
            each.data.mul_(1 - group["lr"] * group["weight_decay"])
            if not state:
                state["exp_avg"] = torch.zeros_like(each)
            average, (beta1, beta2) = state["exp_avg"], group["betas"]
            each.add_(torch.sign(average * beta1 + each.grad * (1 - beta1)), alpha=-group["lr"])
            average.mul_(beta2).add_(each.grad, alpha=1 - beta2)
        return loss


@loop
def signs_of_an_average(loop: Loop) -> Any:
    return Lion(loop.weights, lr=3e-4, weight_decay=0.1)


@loop
def three_averages_and_the_gradient_before(loop: Loop) -> Any:
    class Adan(Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for each in group["params"]:
                    state, grad = self.state[each], each.grad
                    if not state:
                        state |= {key: torch.zeros_like(each) for key in "mvn"} | {"before": grad.clone()}
                    change = grad - state["before"]
                    state["m"].lerp_(grad, 0.02)
                    state["v"].lerp_(change, 0.08)
                    state["n"].lerp_((grad + 0.92 * change).square(), 0.01)
                    fix = 1 - 0.99 ** group["step"]
                    denominator = (state["n"] / fix).sqrt().add_(1e-8)
                    each.mul_(1 - group["lr"] * 0.02)
                    each.addcdiv_(state["m"], denominator, value=-group["lr"] / (1 - 0.98 ** group["step"]))
                    each.addcdiv_(state["v"], denominator, value=-group["lr"] * 0.92 / (1 - 0.92 ** group["step"]))
                    state["before"].copy_(grad)

    return Adan(loop.weights, {"lr": 1e-3})


@loop
def curvature_that_is_refreshed_apart(loop: Loop) -> Any:
    class Sophia(Optimizer):
        @torch.no_grad()
        def update_hessian(self):
            for _, each, state in each_of(self):
                state.setdefault("hessian", torch.zeros_like(each)).mul_(0.99).addcmul_(
                    each.grad, each.grad, value=0.01
                )

        @torch.no_grad()
        def step(self, closure=None, bs=5120):
            for group, each, state in each_of(self):
                average = state.setdefault("exp_avg", torch.zeros_like(each))
                state.setdefault("hessian", torch.zeros_like(each))
                average.lerp_(each.grad, 0.04)
                ratio = (average.abs() / (group["rho"] * bs * state["hessian"] + 1e-15)).clamp(None, 1)
                each.addcmul_(average.sign(), ratio, value=-group["lr"])

    optimizer = Sophia(loop.weights, {"lr": 5e-4, "rho": 0.04})

    def update() -> None:
        loop.loss()
        optimizer.step(bs=64)
        if loop.step % 5 == 4:
            loop.loss()
            optimizer.update_hessian()

    return optimizer, update


class Sam(Optimizer):
    """As published: a closure computes the second gradient, and the groups are those of the base optimizer."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, dict(rho=rho, **options))
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        norm = torch.stack([each.grad.norm() for _, each, _ in each_of(self)]).norm()
        for group, each, state in each_of(self):
            state["old_p"] = each.data.clone()
            each.add_(each.grad * group["rho"] / (norm + 1e-12))
        self.zero_grad()
        closure()
        for _, each, state in each_of(self):
            each.data = state["old_p"]
        self.base_optimizer.step()
        self.zero_grad()


@loop
def sharpness_with_a_closure(loop: Loop) -> Any:
    optimizer = Sam(loop.weights, SGD, lr=0.02, momentum=0.9)

    def update() -> None:
        loop.loss()
        optimizer.step(loop.loss)

    return optimizer, update


class Lookahead(Optimizer):
    def __init__(self, base, k=5, alpha=0.5):
        self.__dict__ |= {"optimizer": base, "k": k, "alpha": alpha, "count": 0}
        self.param_groups, self.defaults = base.param_groups, base.defaults
        self.state = defaultdict(dict)
        self.slow = [[each.detach().clone() for each in group["params"]] for group in self.param_groups]

    def state_dict(self):
        return {"fast": self.optimizer.state_dict(), "slow": self.slow}

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            with torch.no_grad():
                for group, slows in zip(self.param_groups, self.slow, strict=True):
                    for each, slow in zip(group["params"], slows, strict=True):
                        slow.lerp_(each, self.alpha)
                        each.copy_(slow)
        return loss


@loop
def slow_weights_without_a_constructor(loop: Loop) -> Any:
    # With k 1 each step moves by alpha of the fast one.
    return Lookahead(Adam(loop.weights, lr=1e-3), k=1)


@loop
def a_rate_by_layer_in_the_gradient(loop: Loop) -> Any:
    class Larc:
        """No optimizer: it scales the gradients by the norms, and lends the inner one a weight decay of zero."""

        def __init__(self, optimizer):
            self.optim = optimizer

        def __getattr__(self, name):
            return getattr(self.optim, name)

        @torch.no_grad()
        def step(self):
            decays = []
            for group in self.optim.param_groups:
                decays.append(group["weight_decay"])
                group["weight_decay"] = 0.0
                for each in group["params"]:
                    norm, of_grad = each.norm(), each.grad.norm()
                    if norm > 0 and of_grad > 0:
                        rate = 0.02 * norm / (of_grad + norm * decays[-1])
                        each.grad = (each.grad + decays[-1] * each) * min(float(rate) / group["lr"], 1)
            self.optim.step()
            for group, decay in zip(self.optim.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    inner = SGD(loop.weights, lr=0.02, weight_decay=0.01)
    outer = Larc(inner)

    def update() -> None:
        loop.loss()
        outer.step()

    return inner, update


@loop
def a_chain_of_optimizers_with_groups_by_property(loop: Loop) -> Any:
    class Chained(Optimizer):
        def __init__(self, optimizers):
            self.chained_optimizers = optimizers

        @property
        def param_groups(self):
            return [group for each in self.chained_optimizers for group in each.param_groups]

        @property
        def state(self):
            return {key: value for each in self.chained_optimizers for key, value in each.state.items()}

        def zero_grad(self, set_to_none=True):
            for each in self.chained_optimizers:
                each.zero_grad(set_to_none)

        def step(self, closure=None):
            for each in self.chained_optimizers:
                each.step()

    return Chained([AdamW(loop.weights[:6], lr=1e-3), SGD(loop.weights[6:], lr=0.01)])


@loop
def two_optimizers_with_one_tensor_as_rate(loop: Loop) -> Any:
    rate = torch.tensor(1e-3)
    both = [Adam(loop.weights[:6], lr=rate, foreach=False), AdamW(loop.weights[6:], lr=rate, foreach=False)]

    def update() -> None:
        loop.loss()
        for each in both:
            each.step()
        for group in both[0].param_groups:
            group["lr"].mul_(0.98)

    return both, update


def newton_schulz(g):
    x = g / (g.norm() + 1e-7)
    x = x.T if g.size(0) > g.size(1) else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if g.size(0) > g.size(1) else x


@loop
def matrices_orthogonalised_and_the_rest_by_adam(loop: Loop) -> Any:
    class Muon(Optimizer):
        """The rule of each parameter is in its state, as in Moonlight."""

        def __init__(self, lr, matrices, others):
            super().__init__([*matrices, *others], {"lr": lr, "wd": 0.1, "momentum": 0.95})
            for each in matrices:
                self.state[each]["use_muon"] = True
            for each in others:
                self.state[each]["use_muon"] = False

        @torch.no_grad()
        def step(self, closure=None):
            for group, each, state in each_of(self):
                each.mul_(1 - group["lr"] * group["wd"])
                if state["use_muon"]:
                    buffer = state.setdefault("momentum_buffer", torch.zeros_like(each))
                    buffer.mul_(group["momentum"]).add_(each.grad)
                    size = 0.2 * math.sqrt(max(each.shape))
                    each.add_(newton_schulz(each.grad.add(buffer, alpha=group["momentum"])), alpha=-group["lr"] * size)
                else:
                    state["step"] = state.get("step", 0) + 1
                    m1 = state.setdefault("moment1", torch.zeros_like(each)).lerp_(each.grad, 0.1)
                    m2 = state.setdefault("moment2", torch.zeros_like(each)).lerp_(each.grad.square(), 0.05)
                    scale = (1 - 0.9 ** state["step"]) / (1 - 0.95 ** state["step"]) ** 0.5
                    each.add_(m1 / (1e-8 + m2.sqrt()), alpha=-group["lr"] / scale)

    matrices = [each for each in loop.weights if each.dim() == 2]
    return Muon(1e-3, matrices, [each for each in loop.weights if each.dim() < 2])


@loop
def preconditioners_with_another_rule_at_first(loop: Loop) -> Any:
    class Shampoo(Optimizer):
        """The preconditioners are refreshed in every third step, in double precision."""

        @torch.no_grad()
        def step(self, closure=None):
            for group, each, state in each_of(self):
                grad = each.grad
                if each.dim() != 2:
                    total = state.setdefault("sum", torch.full_like(each, 1e-6)).addcmul_(grad, grad)
                    each.addcdiv_(grad, total.sqrt(), value=-group["lr"])
                    continue
                state["step"] = state.get("step", 0) + 1
                for side, size in enumerate(each.shape):
                    gram = grad @ grad.T if side == 0 else grad.T @ grad
                    state.setdefault(f"gram_{side}", torch.eye(size) * 1e-4).add_(gram)
                    if state["step"] % 3 == 1:
                        values, vectors = torch.linalg.eigh(state[f"gram_{side}"].double())
                        root = (vectors * values.clamp_min(1e-12).pow(-0.25)) @ vectors.T
                        state[f"inverse_{side}"] = root.float()
                each.add_(state["inverse_0"] @ grad @ state["inverse_1"], alpha=-group["lr"])

    return Shampoo(loop.weights, {"lr": 5e-3})


@loop
def variance_reduction_with_the_gradient_before(loop: Loop) -> Any:
    class Mars(Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for group, each, state in each_of(self):
                if not state:
                    state |= {
                        "step": 0,
                        "m": torch.zeros_like(each),
                        "v": torch.zeros_like(each),
                        "last": each.grad.clone(),
                    }
                state["step"] += 1
                c = each.grad + 0.025 * 19.0 * (each.grad - state["last"])
                c = c / max(1.0, float(c.norm()))
                state["m"].lerp_(c, 0.05)
                state["v"].lerp_(c.square(), 0.01)
                fix = math.sqrt(1 - 0.99 ** state["step"]) / (1 - 0.95 ** state["step"])
                each.addcdiv_(state["m"], state["v"].sqrt() + 1e-8, value=-group["lr"] * fix)
                state["last"] = each.grad.clone()

    return Mars(loop.weights, {"lr": 1e-3})


@loop
def distance_to_the_start_as_factor_of_the_rate(loop: Loop) -> Any:
    class Distance(Optimizer):
        """DoG with a rate of 1: the largest distance from the start over the root of the squared gradients."""

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                if "start" not in group:
                    group |= {"start": [each.clone() for each in group["params"]], "far": 1e-3, "squares": 0.0}
                pairs = zip(group["params"], group["start"], strict=True)
                group["far"] = max(group["far"], sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5)
                group["squares"] += sum(float(each.grad.square().sum()) for each in group["params"])
                for each in group["params"]:
                    each.sub_(each.grad, alpha=group["lr"] * group["far"] / (group["squares"] ** 0.5 + 1e-8))

    return Distance(loop.weights, {"lr": 1})


@loop
def adaptive_clipping_by_unit_before_the_step(loop: Loop) -> Any:
    class Agc(Optimizer):
        def __init__(self, params, optim, clipping=1e-1):
            self.optim, self.clipping = optim, clipping
            super().__init__(params, {"clipping": clipping})
            self.param_groups = optim.param_groups
            self.state = optim.state

        @torch.no_grad()
        def step(self, closure=None):
            for _, each, _ in each_of(self):
                norm = each.detach().norm().clamp_(min=1e-3) * self.clipping
                if each.grad.norm() > norm:
                    each.grad.mul_(norm / each.grad.norm())
            return self.optim.step(closure)

    return Agc(loop.weights, SGD(loop.weights, lr=0.05))


@loop
def values_clipped_by_hooks_of_the_weights(loop: Loop) -> Any:
    for each in loop.weights:
        each.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    return SGD(loop.weights, lr=0.1)


@loop
def a_rate_of_cosine_with_restarts_times_a_factor_of_the_group(loop: Loop) -> Any:
    groups = [{"params": loop.weights[:6], "factor": 0.1}, {"params": loop.weights[6:], "factor": 1.0}]
    optimizer = SGD(groups, lr=0.02)

    def update() -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * group["factor"] * 0.5 * (1.2 + math.cos(math.pi * (loop.step % 7) / 7))
        loop.loss()
        nn.utils.clip_grad_value_(loop.weights, 0.05)
        optimizer.step()

    return optimizer, update


@loop
def the_class_gets_another_step(loop: Loop) -> Any:
    """A library replaces the step of a class: a rounding of its own, for optimizers that exist already."""

    class Patched(SGD):
        pass

    optimizer = Patched(loop.weights, lr=0.02)
    before = Patched.step

    def step(self, closure=None):
        for each in loop.weights if self.param_groups[0]["params"][0] is loop.weights[0] else ():
            each.grad.add_(1e-4 * each.detach())
        return before(self, closure)

    def update() -> None:
        if loop.step == 3:
            Patched.step = step
        loop.loss()
        optimizer.step()

    return optimizer, update


@loop
def a_plateau_that_looks_at_the_norm_of_updates(loop: Loop) -> Any:
    """Stops a step after the fact: a loop that restores the weights if the loss has jumped."""
    optimizer = AdamW(loop.weights, lr=1e-3)
    schedule = lr_scheduler.LambdaLR(optimizer, [lambda step: min(1.0, (step + 1) / 5) * 0.99**step])

    def update() -> None:
        loop.loss()
        optimizer.step()
        schedule.step()
        if loop.step % 6 == 5:
            optimizer.state.clear()

    return optimizer, update


@refused("in a way that cannot be restored")
def a_rate_that_learns_from_products_of_gradients(loop: Loop) -> Any:
    """Hypergradient descent: the rate in the group grows by beta times the product of two gradients."""

    class Hyper(SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for each in group["params"]:
                    last = self.state[each].get("last")
                    if last is not None:
                        group["lr"] += 1e-3 * float((each.grad * last).sum() / (each.grad.norm() * last.norm() + 1e-9))
                for each in group["params"]:
                    each.sub_(each.grad, alpha=group["lr"])
                    self.state[each]["last"] = each.grad.clone()

    return Hyper(loop.weights, lr=0.01)


@refused("does not follow")
def noise_in_the_size_of_the_root_of_the_rate(loop: Loop) -> Any:
    class Langevin(SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group, each, _ in each_of(self):
                each.add_(each.grad, alpha=-group["lr"])
                each.add_(torch.randn_like(each), alpha=math.sqrt(2 * group["lr"] * 1e-3))

    optimizer = Langevin(loop.weights, lr=0.01)

    def update() -> None:
        loop.loss()
        torch.manual_seed(loop.step)
        optimizer.step()

    return optimizer, update


@refused("needs a closure")
def a_search_along_the_line_with_a_closure(loop: Loop) -> Any:
    class Armijo(SGD):
        def step(self, closure):
            weights = self.param_groups[0]["params"]
            kept, loss = [each.detach().clone() for each in weights], closure().detach()
            grads = [each.grad.clone() for each in weights]
            squares, rate = sum(float(each.square().sum()) for each in grads), self.param_groups[0]["lr"]
            for _ in range(4):
                with torch.no_grad():
                    for each, old, grad in zip(weights, kept, grads, strict=True):
                        each.copy_(old - rate * grad)
                if float(closure().detach()) <= float(loss) - 0.1 * rate * squares:
                    break
                rate *= 0.7
            return loss

    optimizer = Armijo(loop.weights, lr=0.01)
    return optimizer, lambda: optimizer.step(loop.loss)


@refused("loss")
def the_loss_over_the_squared_gradient_as_rate(loop: Loop) -> Any:
    class Polyak(SGD):
        @torch.no_grad()
        def step(self, loss):
            squares = sum(float(each.grad.square().sum()) for _, each, _ in each_of(self))
            for group, each, _ in each_of(self):
                each.sub_(each.grad, alpha=min(float(loss) / squares, group["lr"]))

    optimizer = Polyak(loop.weights, lr=0.01)
    return optimizer, lambda: optimizer.step(loss=loop.loss().detach())


@refused("does not follow")
def velocities_that_contain_earlier_rates(loop: Loop) -> Any:
    class Caffe(SGD):
        """v = 0.9 v + lr g."""

        @torch.no_grad()
        def step(self, closure=None):
            for group, each, state in each_of(self):
                v = state.setdefault("v", torch.zeros_like(each)).mul_(0.9).add_(each.grad, alpha=group["lr"])
                each.sub_(v)

    return Caffe(loop.weights, lr=0.01)


@refused("does not follow")
def a_decay_apart_from_the_rate(loop: Loop) -> Any:
    class Apart(SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group, each, _ in each_of(self):
                each.mul_(0.99).sub_(each.grad, alpha=group["lr"])

    return Apart(loop.weights, lr=0.01)


class Around(Optimizer):
    """Holds the optimizer `inner` and shares its groups, without the constructor of torch's optimizers."""

    def __init__(self, inner, **options):
        self.inner, self.options, self.state = inner, options, defaultdict(dict)

    @property
    def param_groups(self):
        return self.inner.param_groups


class Averaged(Around):
    """Weights between the iterate of the inner optimizer and the mean of all iterates."""

    @torch.no_grad()
    def step(self, closure=None):
        self.state["count"]["steps"] = count = self.state["count"].get("steps", 0) + 1
        for _, each, _ in each_of(self):
            state = self.state[each]
            state.setdefault("z", each.clone())
            state.setdefault("mean", each.clone())
            each.copy_(state["z"])
        self.inner.step(closure)
        for _, each, _ in each_of(self):
            state = self.state[each]
            state["z"].copy_(each)
            state["mean"].lerp_(each, 1 / count)
            each.lerp_(state["mean"], 0.9)


class Sharp(Around):
    """Adds the difference of two gradients to the weights, beside the step of the inner optimizer."""

    @torch.no_grad()
    def step(self, closure):
        first = [each.grad.clone() for _, each, _ in each_of(self)]
        for _, each, _ in each_of(self):
            each.add_(each.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        changes = [each.grad - grad for (_, each, _), grad in zip(each_of(self), first, strict=True)]
        for (_, each, _), grad in zip(each_of(self), first, strict=True):
            each.sub_(grad, alpha=0.05)
            each.grad.copy_(grad)
        self.inner.step()
        for (group, each, _), change in zip(each_of(self), changes, strict=True):
            each.sub_(change, alpha=9 * group["lr"])


class Tuned(Around):
    """The distance from the first weights times a factor that begins in the order of rounding."""

    @torch.no_grad()
    def step(self, closure=None):
        for _, each, _ in each_of(self):
            self.state[each].setdefault("first", each.clone())
        before = [each.clone() for _, each, _ in each_of(self)]
        self.inner.step(closure)
        for (_, each, _), old in zip(each_of(self), before, strict=True):
            each.copy_(old + 1e-7 * (each - old) + 1e-7 * (old - self.state[each]["first"]).sign())


class InTurn(Around):
    """Normalises the gradients, and repeats nothing: a wrapper that the scale reaches."""

    @torch.no_grad()
    def step(self, closure=None):
        for _, each, _ in each_of(self):
            each.grad.div_(each.grad.norm() + 1e-6)
        return self.inner.step(closure)


def around(kind: Any, *, hidden: bool, closure: bool = False) -> Callable[[Loop], Any]:
    """A loop with a wrapper. Only the inner optimizer is attached if the wrapper is `hidden`."""

    def case(loop: Loop) -> Any:
        inner = SGD(loop.weights, lr=0.02)
        wrapper = kind(inner)

        def update() -> None:
            loop.loss()
            wrapper.step(*([loop.loss] if closure else []))

        return inner if hidden else wrapper, update

    return case


REFUSED |= {
    "a_mean_of_all_iterates": ("Averaged does not follow", around(Averaged, hidden=False)),
    "a_hidden_mean_of_all_iterates": ("Averaged does not follow", around(Averaged, hidden=True)),
    "a_difference_of_gradients": ("Sharp does not follow", around(Sharp, hidden=False, closure=True)),
    "a_hidden_difference_of_gradients": ("Sharp does not follow", around(Sharp, hidden=True, closure=True)),
    "a_factor_in_the_order_of_rounding": ("not proven that the updates of Tuned", around(Tuned, hidden=False)),
}
LOOPS |= {
    "normalised_gradients_for_an_inner_optimizer": around(InTurn, hidden=False),
    "hidden_normalised_gradients_for_an_inner_optimizer": around(InTurn, hidden=True),
}


def of_library(kind: str, *, closure: bool = False, **options: Any) -> Callable[[Loop], Any]:
    def case(loop: Loop) -> Any:
        library = pytest.importorskip("pytorch_optimizer")
        make = getattr(library, kind)
        if closure:
            optimizer = make(loop.model, loop.weights, SGD, lr=0.01, **options)
        else:
            optimizer = make(SGD(loop.weights, lr=0.02), **options)
        if kind == "ScheduleFreeWrapper":
            optimizer.train()

        def update() -> None:
            loop.loss()
            optimizer.step(*([loop.loss] if closure else []))

        return optimizer, update

    return case


LOOPS |= {"a_published_look_ahead": of_library("Lookahead", k=1), "published_projections": of_library("OrthoGrad")}
REFUSED |= {
    "a_published_mean": ("ScheduleFreeWrapper does not follow", of_library("ScheduleFreeWrapper")),
    "a_published_sharpness": ("WSAM does not follow", of_library("WSAM", closure=True)),
    "a_published_tuner": ("updates of TRAC", of_library("TRAC")),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_updates_shrink_and_nobody_sees_the_scale(name: str, tried: Any) -> None:
    refusal, ratios = tried(LOOPS[name])
    assert not refusal
    assert max(ratios[FIRST + 2 : LAST - 2]) < 0.35, ratios
    assert 0.3 < ratios[-1] < 3.0, ratios


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_shrink_is_refused_with_the_reason(name: str, tried: Any) -> None:
    reason, case = REFUSED[name]
    refusal, ratios = tried(case)
    assert reason in refusal, (refusal, ratios)
    assert ratios == [1.0] * END
