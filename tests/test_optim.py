"""Parameter groups, the three optimizers and the learning rate, against their definitions."""

import itertools
import math
from typing import Literal

import pytest
import timm.optim
import torch
from torch import nn

from dist_contrastive.config import EncoderConfig, HeadConfig, OptimConfig
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.models.heads import build_head
from dist_contrastive.optim import build_optimizer, parameter_groups, peak_learning_rate, step_unless
from dist_contrastive.schedules import learning_rate

DECAY, RATE, TRUST = 0.5, 0.1, 0.001  # LARS's trust coefficient, You et al. 2017


def model() -> nn.Sequential:
    encoder = build_encoder(EncoderConfig(name="resnet10_w16"), 32)
    return nn.Sequential(encoder, build_head(HeadConfig(layers=3), encoder.feature_size, "batch"))


def test_weight_decay_leaves_biases_and_normalization_alone() -> None:
    module = model()
    frozen = next(module[1].parameters())
    frozen.requires_grad_(False)
    decayed, free = parameter_groups(module, OptimConfig(weight_decay=0.1))
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    weights = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {id(p) for p in decayed["params"]} == weights - {id(frozen)}
    grouped = [id(p) for group in (decayed, free) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def step_once(
    name: Literal["adamw", "sgd", "lars"], decay: float = DECAY, momentum: float = 0.9
) -> dict[str, torch.Tensor]:
    """A linear layer before (`w`, `b`), its gradients (`gw`, `gb`), and after one step (`w1`, `b1`)."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=decay, momentum=momentum), layer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]  # the loop's part
    for group in optimizer.param_groups:
        group["lr"] = RATE
    layer.weight.grad, layer.bias.grad = torch.randn(4, 3), torch.randn(4)
    before = {"w": layer.weight.detach().clone(), "b": layer.bias.detach().clone()}
    before |= {"gw": layer.weight.grad.clone(), "gb": layer.bias.grad.clone()}
    optimizer.step()
    return {**before, "w1": layer.weight.detach(), "b1": layer.bias.detach()}


def test_sgd_is_torchs_with_weight_decay_on_matrices_alone() -> None:
    t = step_once("sgd")
    torch.testing.assert_close(t["w1"], t["w"] - RATE * (t["gw"] + DECAY * t["w"]))
    torch.testing.assert_close(t["b1"], t["b"] - RATE * t["gb"])


def test_adamw_decays_apart_from_the_gradient() -> None:
    t = step_once("adamw")
    # At the first step both moments are the gradient's, corrected: the update is the gradient's sign.
    torch.testing.assert_close(t["w1"], t["w"] * (1 - RATE * DECAY) - RATE * t["gw"].sign(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(t["b1"], t["b"] - RATE * t["gb"].sign(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_lars_adapts_matrices_and_leaves_biases_to_plain_momentum(decay: float) -> None:
    t = step_once("lars", decay)
    trust = TRUST * t["w"].norm() / (t["gw"].norm() + decay * t["w"].norm())
    torch.testing.assert_close(t["w1"], t["w"] - RATE * trust * (t["gw"] + decay * t["w"]))
    torch.testing.assert_close(t["b1"], t["b"] - RATE * t["gb"])


OPTIMIZERS: list[Literal["adamw", "sgd", "lars"]] = ["adamw", "sgd", "lars"]


def conv_net() -> nn.Sequential:
    """Of channels-last kernels, whose biggest is split among threads, and parameters of one axis and of one number."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 5), nn.Linear(1, 1))
    return module.to(memory_format=torch.channels_last)


def give_gradients(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gradients and a rate that are functions of the step."""
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
    for group in optimizer.param_groups:
        group["lr"] = RATE * (step + 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad_step", [0, 1, 3])
def test_an_update_that_is_left_out_changes_nothing_also_if_it_is_the_first(
    name: Literal["adamw", "sgd", "lars"], bad_step: int
) -> None:
    modules = [conv_net() for _ in range(2)]
    config = OptimConfig(name=name, weight_decay=DECAY)
    optimizers = [build_optimizer(config, module) for module in modules]
    for step in range(4):
        for module, optimizer in zip(modules, optimizers, strict=True):
            give_gradients(module, optimizer, step)
            if step != bad_step:
                step_unless(optimizer, torch.tensor(False))
        if step == bad_step:
            for parameter in modules[0].parameters():
                parameter.grad = torch.full_like(parameter, torch.nan if parameter.ndim > 1 else torch.inf)
            step_unless(optimizers[0], torch.tensor(True))
    for mine, its in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(mine, its)
        state, its_state = optimizers[0].state[mine], optimizers[1].state[its]
        assert len(state) == len(its_state) > 0
        assert all(torch.equal(state[key], its_state[key]) for key in state)


@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_lars_is_timms_over_several_updates(decay: float) -> None:
    modules = [conv_net() for _ in range(2)]
    for module in modules:
        nn.init.zeros_(module[3].weight)  # type: ignore[arg-type]
    config = OptimConfig(name="lars", weight_decay=decay)
    groups = parameter_groups(modules[1], config)
    for group in groups:
        group["always_adapt"] = group["decays"]  # it would adapt wherever there is weight decay
    mine = build_optimizer(config, modules[0])
    timms = timm.optim.Lars(groups, lr=0.0, momentum=config.momentum)
    for step in range(4):
        give_gradients(modules[0], mine, step)
        give_gradients(modules[1], timms, step)
        step_unless(mine, torch.tensor(False))
        timms.step()
    for one, other in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_momentum_is_what_the_config_says() -> None:
    layer = nn.Linear(2, 2)
    groups = {
        name: build_optimizer(OptimConfig(name=name, momentum=0.7), layer).param_groups for name in ("sgd", "lars")
    }
    assert all(group["momentum"] == 0.7 for both in groups.values() for group in both)
    optimizer = build_optimizer(OptimConfig(momentum=0.7, beta2=0.98), layer)
    assert all(g["betas"] == (0.7, 0.98) for g in optimizer.param_groups)


@pytest.mark.parametrize(("batch", "peak"), [(256, 0.3), (4096, 4.8), (64, 0.075)])
def test_the_peak_scales_with_the_batch(batch: int, peak: float) -> None:
    assert peak_learning_rate(OptimConfig(learning_rate=0.3), batch) == pytest.approx(peak)


def test_the_schedule_warms_up_linearly_and_ends_at_zero_as_a_half_cosine() -> None:
    rates = [learning_rate(step, total_steps=110, warmup_steps=10, peak=2.0) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(2.0 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_the_schedule_without_warm_up_and_past_its_end() -> None:
    assert learning_rate(0, total_steps=10, warmup_steps=0, peak=2.0) == 2.0
    assert learning_rate(12, total_steps=10, warmup_steps=0, peak=2.0) == pytest.approx(0.0, abs=1e-12)
    # A warm-up as long as the run never comes down.
    assert [learning_rate(s, total_steps=2, warmup_steps=2, peak=2.0) for s in range(2)] == [1.0, 2.0]
