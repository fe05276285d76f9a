# SPDX-License-Identifier: MIT
"""Tests of ddpm_ema.py and toy2d.py: `python -m pytest`. Run as a script it prints benchmarks."""

import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from unittest import mock

import matplotlib.image
import numba
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import ddpm_ema
import toy2d
from ddpm_ema import (
    DOWNLOADS,
    EMA,
    LADDER,
    PRESETS,
    Diffusion,
    UNet,
    download,
    draw_glyphs,
    frechet_distance,
    load_data,
    main,
    manifold_share,
    measure,
    moments,
    parse_decay,
)

# ==================================================================================================
# EMA
# ==================================================================================================

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
MIXED = (0.5, 0.9, 0.999, 0.999999, "step", "ramp:0.9999", "halflife:50", "power:0.10")


def betas(decay, steps):
    """β_1 … β_steps, written down independently of ddpm_ema."""
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    kind, _, number = str(decay).rpartition(":")
    if decay == "step":
        return t / (t + 1)
    value = float(number)
    if kind == "ramp":
        return ((1 + t) / (10 + t)).clamp(max=value)
    if kind == "power":  # σ² (γ+2)² (γ+3) = γ+1 is a cubic: its largest root
        s = value**-2
        cubic = torch.tensor([[-7, s - 16, s - 12], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
        return (1 - 1 / t) ** (torch.linalg.eigvals(cubic).real.max().item() + 1)
    return torch.full_like(t, 0.5 ** (1 / value) if kind == "halflife" else value)


def flatten(values):
    return torch.cat([value.detach().double().reshape(-1) for value in values])


def average(ema, decay, debias=False):
    weights = ema.weights(decay, debias)
    return flatten(weights[name] for name, _ in ema.model.named_parameters())


class Oracle:
    """The plain recursion in float64, for a few thousand steps."""

    def __init__(self, model, decays):
        self.model, self.first, self.t = model, flatten(model.parameters()), 0
        self.mean = {decay: self.first.clone() for decay in decays}
        self.betas = {decay: betas(decay, 9000).tolist() for decay in decays}

    def update(self):
        now = flatten(self.model.parameters())
        for decay, mean in self.mean.items():
            mean += (1 - self.betas[decay][self.t]) * (now - mean)
        self.t += 1

    def error(self, ema, decay):
        """Of the displacement: absolute and relative."""
        exact = self.mean[decay]
        error = (average(ema, decay) - exact).norm().item()
        return error, error / (exact - self.first).norm().item()


def mlp(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2)
    return nn.Sequential(*layers)


def training(model, steps, seed=1):
    """A regression with Adam; yields after every optimizer step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(128, 2, generator=draw)
        optimizer.zero_grad()
        (model(x) - torch.sin(2 * x)).square().mean().backward()
        optimizer.step()
        yield


def wandering(model, kind, steps, seed=0):
    """A random trajectory of all parameters; yields after every step."""
    draw = torch.Generator().manual_seed(seed)
    first = {p: p.detach().clone() for p in model.parameters()}
    speed = {p: torch.zeros_like(p) for p in first}
    for step in range(1, steps + 1):
        for p, start in first.items():
            noise = torch.randn(p.shape, generator=draw)
            if kind == "noise":
                p.data = start + noise
            elif kind == "walk":
                p.data = p.data + 0.01 * noise
            elif kind == "momentum":
                p.data = p.data + speed[p].mul_(0.9).add_(noise, alpha=0.001)
            else:  # a drift that dies down, as early in training
                p.data = p.data + noise.abs() / (step + 10)
        yield


def saved(state):
    """A state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# Exact --------------------------------------------------------------------------------------------


def test_float64_oracle_over_100000_steps():
    decays = [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999]
    decays += ["step", "ramp:0.9999", "halflife:2000", "power:0.10", "power:0.03"]
    steps, n = 100_000, 24
    draw = torch.Generator().manual_seed(0)
    drift = nn.Parameter(torch.randn(n, generator=draw))
    noise = nn.Parameter(torch.zeros(n))  # about θ_0 = 0: the read-out's own cast does not show
    model = nn.ParameterList([drift, noise])
    ema = EMA(model, decays, ladder=None)
    start, slope = drift.detach().clone(), torch.randn(n, generator=draw)
    rates = 1 - torch.stack([betas(decay, steps) for decay in decays], dim=1)
    exact = flatten(model).repeat(len(decays), 1)
    first = exact.clone()
    with torch.no_grad():
        for step in range(steps):
            drift.copy_(start + slope * (step / steps))
            noise.normal_(generator=draw)
            ema.update()
            exact.lerp_(torch.cat([drift, noise]).double().expand_as(exact), rates[step][:, None])
    for decay, e, moved in zip(decays, exact, exact - first):
        error = average(ema, decay) - e
        assert error[:n].norm() < 5e-6 * moved[:n].norm(), decay
        assert error[n:].norm() < 5e-6 * moved[n:].norm(), decay


@pytest.mark.parametrize("block", [1, 5, 16])
def test_every_step_counts_also_when_read_in_mid_block(block):
    model = mlp()
    oracle, ema = Oracle(model, MIXED), EMA(model, MIXED, ladder=None, block=block)
    for _ in wandering(model, "walk", 50):
        ema.update()
        oracle.update()
        for decay in MIXED:
            assert oracle.error(ema, decay)[0] < 3e-7 * oracle.first.norm(), decay


def test_reading_changes_nothing():
    read, unread = EMA(mlp()), EMA(mlp())
    for _ in zip(wandering(read.model, "walk", 50), wandering(unread.model, "walk", 50)):
        read.update(), unread.update()
        read.weights(0.999), read.weights(0.9993, debias=True), read.error_bound(0.9993)
        read.state_dict(), read.card(0.99)
    assert_same(
        {k: v for k, v in read.state_dict().items() if torch.is_tensor(v)},
        {k: v for k, v in unread.state_dict().items() if torch.is_tensor(v)},
    )


def test_weights_that_do_not_change_stay_bit_identical():
    model = mlp()
    model[0].weight.requires_grad_(False)
    ema = EMA(model, MIXED)
    frozen = model[0].weight.clone()
    for _ in training(model, 40):
        ema.update()
    for decay in (*MIXED, 0.9995):
        for debias in (False, True):
            assert torch.equal(ema.weights(decay, debias)["0.weight"], frozen)


@pytest.mark.parametrize("decay", [*MIXED[1:], 0.9995])
def test_plain_and_debiased_after_a_jump(decay):
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    ema = EMA(model, MIXED)
    nn.init.ones_(model.weight)
    for t in range(1, 60):
        ema.update()
        share = betas(decay, t).prod().item()
        assert ema.init_share(decay) == pytest.approx(share, rel=1e-9, abs=1e-15)
        plain, debiased = (ema.weights(decay, debias)["weight"] for debias in (False, True))
        torch.testing.assert_close(plain, torch.full((1, 3), 1 - share), rtol=1e-5, atol=0)
        torch.testing.assert_close(debiased, torch.ones(1, 3), rtol=1e-5, atol=0)


def test_before_the_first_update():
    model = mlp()
    ema = EMA(model)
    for decay in (0.999, 0.9993):
        assert_same(ema.weights(decay, debias=True), model.state_dict())
        assert ema.init_share(decay) == 1 and ema.card(decay)["effective_steps"] == 0


def test_decays_are_understood_in_one_place():
    assert parse_decay(0.9990) == parse_decay(" .999 ") == "0.999" and parse_decay(0) == "0"
    assert parse_decay("power:0.10") == "power:0.1"
    assert EMA(mlp(), np.float32(0.9)).decays == EMA(mlp(), [0.9]).decays == ["0.9"]
    assert parse_decay("halflife:2e3") == "halflife:2000"
    numbers = [1, 1.5, -0.1, math.nan, "nan", "x", "", None, True, [0.9]]
    schedules = [":0.9", "ramp:1", "ramp", "halflife:0", "halflife:inf", "power:0.3", "power:0"]
    for decay in [*numbers, *schedules, "cosine:3", "step:1"]:
        with pytest.raises(ValueError, match="0.999.*step.*ramp:0.9999.*halflife:2000.*power:0.10"):
            EMA(nn.Linear(1, 1), [decay])
    for bad in ({"decays": (), "ladder": None}, {"block": 0}, {"ladder": ["step"]}):
        with pytest.raises(ValueError):
            EMA(nn.Linear(1, 1), **bad)


# Any decay afterwards -----------------------------------------------------------------------------


def test_untracked_decays_on_a_training_run_and_from_snapshots():
    """From states that were saved early and late; at step 60 the cast to float32 shows."""
    decays = [0.92, 0.95, 0.98, 0.993, 0.9971, 0.9985, 0.9993, 0.9998, 0.9999, "halflife:300"]
    model, stages = mlp(), {}
    oracle, ema = Oracle(model, decays), EMA(model, decays=())
    for step, _ in enumerate(training(model, 3000), 1):
        ema.update()
        oracle.update()
        if step in (60, 500, 1503, 3000):
            stages[step] = saved(ema.state_dict()), copy.deepcopy(oracle)
    for state, oracle in stages.values():
        ema = EMA(mlp(seed=7), decays=())
        ema.load_state_dict(state)
        for decay in decays:
            error, relative = oracle.error(ema, decay)
            assert relative < (4e-6 if oracle.t >= 500 else 1e-4), (oracle.t, decay, relative)
            assert error < ema.error_bound(decay) + 1e-7 * oracle.first.norm()
    for row in LADDER[::5]:
        assert ema.error_bound(row) == 0


def unet_training(steps):
    """A diffusion run on glyphs; yields the model, then after every optimizer step."""
    torch.manual_seed(0)
    model, diffusion = UNet(width=8, multipliers=(1, 2), attention=(1,)), Diffusion()
    images = torch.from_numpy(draw_glyphs(500)[0]) / 127.5 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    yield model
    for _ in range(steps):
        x0, t = images[torch.randint(500, (16,))], torch.randint(1000, (16,))
        diffusion.loss(model, x0, t, torch.randn_like(x0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield model


def toy_training(steps):
    """The toy's run; yields the model, then after every optimizer step."""
    model = toy2d.Denoiser([0], depth=4, hidden=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), fused=True)
    yield model
    for step in range(1, steps + 1):
        toy2d.train_step(model, optimizer, [0], step, 512)
        yield model


@pytest.mark.parametrize("run", [unet_training, toy_training])
def test_untracked_decays_on_diffusion_runs(run):
    """Read out early and late, within 1e-4 of the float64 recursion and within the bound."""
    decays = [0.92, 0.97, 0.993, 0.9985, 0.9993, 0.9999]
    steps = run(120)
    model = next(steps)
    oracle, ema = Oracle(model, decays), EMA(model, decays=())
    for step, _ in enumerate(steps, 1):
        ema.update()
        oracle.update()
        for decay in decays if step in (40, 120) else ():
            error, relative = oracle.error(ema, decay)
            assert relative < 1e-4, (step, decay, relative)
            assert error < ema.error_bound(decay) + 1e-7 * oracle.first.norm()


@pytest.mark.parametrize("kind", ["noise", "walk", "momentum", "drift"])
def test_error_bound_is_never_exceeded(kind):
    decays = [0.903, 0.92, 0.97, 0.9944, 0.9993, 0.99994, "power:0.05", "power:0.2", "ramp:0.9999"]
    coarse = (0.1, 0.5, 0.9, 0.99, 0.99995)
    for seed, (block, ladder) in enumerate([(16, LADDER), (3, LADDER), (64, coarse)]):
        model = nn.Linear(7, 5)
        for p in model.parameters():
            p.data.zero_()
        oracle, ema = Oracle(model, decays), EMA(model, ladder=ladder, block=block)
        for step, _ in enumerate(wandering(model, kind, 1000, seed), 1):
            ema.update()
            oracle.update()
            if step in (1, 2, 7, 16, 17, 40, 64, 161, 1000):
                for decay in decays:
                    if 0.9 <= betas(decay, step)[-1] <= 0.99995:
                        cast = 2**-24 * oracle.mean[decay].norm().item()
                        bound = ema.error_bound(decay)
                        assert oracle.error(ema, decay)[0] <= bound + cast, (seed, step, decay)
                        if ladder is LADDER:
                            assert bound < 0.2 * (oracle.mean[decay].norm() + step**0.5)


def test_power_functions_can_be_read_out():
    decays = ["power:0.10", "power:0.05", "power:0.2", "step"]
    model = mlp()
    oracle, ema = Oracle(model, decays), EMA(model)
    for _ in training(model, 1000):
        ema.update()
        oracle.update()
    for decay in decays:
        assert oracle.error(ema, decay)[1] < 1e-4, decay


def test_decays_that_cannot_be_read_out_are_refused():
    ema = EMA(nn.Linear(2, 2))
    ema.update()
    for decay in (0.89, 0.99996, "power:0.1"):
        with pytest.raises(ValueError, match="range, 0.9 to 0.99995"):
            ema.weights(decay)
    with pytest.raises(ValueError, match="0.9993 is not tracked; tracked: 0.999$"):
        EMA(nn.Linear(2, 2), ladder=None).weights(0.9993)


def test_card():
    model = mlp()
    ema = EMA(model, [0.99, "power:0.10", 0.99999999])
    for _ in training(model, 500):
        ema.update()
    card = ema.card(0.99, batch_size=128)
    assert card["horizon"] == pytest.approx(100) and card["decay"] == 0.99
    assert card["half_life_steps"] == pytest.approx(math.log(2) / -math.log(0.99))
    assert card["half_life_images"] == 128 * card["half_life_steps"]
    assert card["init_share"] == pytest.approx(0.99**500)
    w = torch.tensor([0.99**n for n in range(500)], dtype=torch.float64)
    w, age = w / w.sum(), torch.arange(500, dtype=torch.float64)
    assert card["effective_steps"] == pytest.approx(1 / (w @ w).item())
    spread = ((w @ age**2) - (w @ age) ** 2).sqrt().item()
    assert card["sigma_rel"] == pytest.approx(spread / 500)
    assert ema.card("power:0.10")["sigma_rel"] == pytest.approx(0.10, rel=1e-3)
    assert not card["stalls_in_place"] and ema.card(0.99999999)["stalls_in_place"]
    assert all(type(value) in (float, bool) for value in card.values())


# Models and checkpoints ---------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.norm(self.embed(x)))


def test_tied_parameters_and_buffers():
    model = Tied()
    ema = EMA(model, [0.9])
    assert sum(map(math.prod, ema.state_dict()["shapes"].values())) == 44 + 8
    for step in range(3):
        model(torch.arange(11)).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        ema.update()
    weights = ema.weights(0.9)
    assert weights.keys() == model.state_dict().keys()
    assert torch.equal(weights["embed.weight"], weights["out.weight"])
    assert not torch.equal(weights["embed.weight"], model.embed.weight)
    assert weights["norm.num_batches_tracked"].dtype == torch.int64
    other = Tied()
    other.load_state_dict(weights)
    assert other.norm.num_batches_tracked == 3
    assert torch.equal(other.norm.running_var, model.norm.running_var)


def test_compiled_and_wrapped_models_have_bare_names_and_move():
    bare = mlp()
    bare[2] = torch.compile(bare[2])
    for model in (bare, torch.compile(bare), nn.DataParallel(torch.compile(bare))):
        ema, oracle = EMA(model, [0.9]), Oracle(bare, [0.9])
        for _ in wandering(bare, "walk", 20):
            ema.update()
            oracle.update()
        weights = ema.weights(0.9)
        fresh = mlp()
        fresh.load_state_dict(weights)
        assert (flatten(fresh.parameters()) - oracle.mean[0.9]).norm() < 1e-6 * oracle.first.norm()
        with ema.applied(0.9):
            assert torch.equal(bare[4].weight, weights["4.weight"])


class Unusual(nn.Module):
    """Its state dict holds copies and a text, and forward binds a buffer anew."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.calls += 1
        return self.linear(x - self.mean)

    def get_extra_state(self):
        return "a text"

    def set_extra_state(self, state):
        assert state == "a text"

    def state_dict(self, *arguments, **settings):
        state = super().state_dict(*arguments, **settings)
        return {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()}


def test_a_model_may_have_a_state_dict_of_its_own_and_rebind_buffers():
    model = Unusual()
    ema, first = EMA(model, 0.9), model.linear.weight.detach().clone()
    model.linear.weight.data += 1
    ema.update()
    with ema.applied(0.9):
        assert torch.allclose(model.linear.weight, first + 0.1)
        model(torch.ones(3, 2))
        assert model.calls == 1 and model.mean[0] > 0
    assert torch.equal(model.linear.weight, first + 1)
    assert model.calls == 0 and not model.mean.any()
    other = Unusual()
    other.load_state_dict(ema.weights(0.9))
    assert torch.allclose(other.linear.weight, first + 0.1)
    model.linear.state_dict = lambda *_, destination, prefix, **__: destination.update(
        {f"{prefix}W": model.linear.weight.detach().clone()})
    with pytest.raises(ValueError, match="state_dict.. has linear.W, which is neither"):
        ema.weights(0.9)


def test_the_default_dtype_does_not_matter():
    model, twin = mlp(), mlp()
    ema = EMA(model, MIXED)
    torch.set_default_dtype(torch.float64)
    try:
        other = EMA(twin, MIXED)
        for _ in range(20):
            for p, q in zip(model.parameters(), twin.parameters()):
                q.data.copy_(p.data.add_(0.01))
            ema.update()
            other.update()
        read = other.weights(0.9993)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(read, ema.weights(0.9993))


def test_an_interrupted_fold_loses_its_block_at_most():
    model, chunks = nn.Linear(300, 300), iter([torch.mm, mock.Mock(side_effect=KeyboardInterrupt)])
    ema, oracle = EMA(model, [0.99]), Oracle(model, [0.99])
    for step, _ in enumerate(wandering(model, "walk", 70), 1):
        oracle.update()
        if step == 32:  # in the second of the three chunks
            mm = mock.patch("torch.mm", lambda *a, **k: next(chunks)(*a, **k))
            with mm, pytest.raises(KeyboardInterrupt):
                ema.update()
        else:
            ema.update()
    error = (average(ema, 0.99) - oracle.mean[0.99]).abs()
    assert error[:32768].max() < 1e-6 and error.max() < 0.04


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_go_on_as_the_original(copied, inside):
    model = mlp()
    ema, twin = EMA(model, MIXED), None
    if inside:  # the model holds its own averages
        model.ema = ema
    for step, _ in enumerate(wandering(model, "walk", 60), 1):
        ema.update()
        if twin:
            twin.model.load_state_dict(model.state_dict())
            twin.update()
        if step == 21:
            twin = copied(model).ema if inside else copied(ema)
    for decay in (*MIXED, 0.9993):
        assert_same(twin.weights(decay), ema.weights(decay))


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="no parameters"):
        EMA(nn.ReLU())
    with pytest.raises(ValueError, match="above 0"):
        EMA(mlp(), ladder=(0, 0.9))


def test_a_part_may_be_called_module():
    """Only what wraps the whole model is taken off its names."""
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    model = Wrapper()
    ema = EMA(nn.DataParallel(model), [0.9])
    assert set(ema.weights(0.9)) == {"module.weight", "module.bias"}
    model.load_state_dict(ema.weights(0.9))


def test_low_precision_parameters_have_float32_averages_that_move():
    model = mlp().bfloat16()
    ema, oracle = EMA(model, [0.9999]), Oracle(model, [0.9999])
    for _ in wandering(model, "drift", 300):
        ema.update()
        oracle.update()
    assert all(value.dtype == torch.float32 for value in ema.weights(0.9999).values())
    assert oracle.error(ema, 0.9999)[1] < 1e-4
    model.load_state_dict(ema.weights(0.9999))


def test_allowed_low_precision_products_do_not_reach_the_averages():
    backends, mm, seen = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), torch.mm, []

    def precisions():
        return [backend.fp32_precision for backend in backends]

    def watched(*arguments, **settings):
        seen.append(precisions())
        return mm(*arguments, **settings)

    def run():
        model = mlp()
        ema = EMA(model, MIXED)
        with mock.patch("torch.mm", watched):
            for _ in wandering(model, "walk", 48):
                ema.update()
        return ema.weights(0.999)

    try:
        exact = run()
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu"):
            assert_same(exact, run())
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32  # the old switches can still be read
        assert precisions() == ["tf32", "bf16"]
        assert seen and all(at_work == ["ieee", "ieee"] for at_work in seen)
        for backend in backends:
            backend.fp32_precision = "none"
        for precision in ("tf32", "ieee"):  # a switch for all still reaches the products afterwards
            torch.backends.fp32_precision = precision
            run()
            assert precisions() == [precision] * 2
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend in (torch.backends, *backends):
            backend.fp32_precision = "none"


def test_replaced_and_deep_copied_models_are_followed_by_name():
    model = mlp()
    ema = EMA(model, [0.5])
    twin = copy.deepcopy(model)
    ema.load_average(0.5, twin.state_dict(), 0)
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)  # a new object of the same name
    ema.load_average(0.5, twin.state_dict(), 0)
    ema.update()
    moved = ema.weights(0.5)["0.weight"] - twin[0].weight
    torch.testing.assert_close(moved, torch.full((32, 2), 0.5))
    model.double()  # keeps the objects, replaces their storage
    model[0].weight.data += 1
    ema.update()
    torch.testing.assert_close(ema.weights(0.5)["0.weight"] - twin[0].weight, moved + 0.75)


def test_changed_parameters_are_named():
    def grow(model):
        model[0].extra = nn.Parameter(torch.zeros(1))

    def add(model):
        model.append(nn.Linear(2, 1))

    def drop(model):
        model[2].bias = None

    def reshape(model):
        model[4].weight.data = torch.zeros(1, 32)

    changes = {grow: "0.extra", add: "5.weight", drop: "2.bias", reshape: "4.weight"}
    for change, name in changes.items():
        model = mlp()
        ema = EMA(model)
        state = ema.state_dict()
        change(model)
        with pytest.raises(ValueError, match=f"parameter {name} "):
            ema.update()
        for each in (ema, EMA(model)):
            with pytest.raises(ValueError, match=f"parameter {name} "):
                each.load_state_dict(state)
    with pytest.raises(ValueError, match="parameter 0.weight has no shape yet"):
        EMA(nn.Sequential(nn.LazyLinear(2)))
    with pytest.raises(ValueError, match="parameter weight is torch.int64"):
        EMA(nn.ParameterDict({"weight": nn.Parameter(torch.ones(2).long(), requires_grad=False)}))


def test_applied_restores_the_model_and_guards_it():
    model = Tied()
    ema = EMA(model, [0.9])
    model.embed.weight.data += 1
    ema.update()
    before = copy.deepcopy(model.state_dict())
    state = ema.state_dict()
    guarded = [ema.update, ema.state_dict, lambda: ema.load_state_dict(state),
               lambda: copy.deepcopy(ema), lambda: pickled(ema)]
    for action in (*guarded, lambda: ema.applied(0.9).__enter__(), lambda: 1 / 0):
        with pytest.raises((RuntimeError, ZeroDivisionError)), ema.applied(0.9) as swapped:
            assert swapped is model
            assert torch.equal(model.out.weight, ema.weights(0.9)["out.weight"])
            assert not torch.equal(model.out.weight, before["out.weight"])
            model(torch.arange(11))  # moves the running statistics
            assert model.out.weight.requires_grad and torch.is_grad_enabled()
            action()
        assert_same(model.state_dict(), before)
    assert ema.step == 1
    ema.update()


class Growing(nn.Module):
    """Its forward binds a buffer to a larger one; another cannot be written; it holds its EMA."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.mask = nn.Parameter(torch.tensor([-0.0, -math.inf]), requires_grad=False)
        self.register_buffer("cache", torch.zeros(4), persistent=False)
        self.register_buffer("expanded", torch.ones(()).expand(4), persistent=False)
        self.register_buffer("sparse", torch.eye(2).to_sparse(), persistent=False)
        self.norm = nn.BatchNorm1d(2)
        self.ema = EMA(self, [0, 0.5])

    def forward(self, x):
        self.cache = torch.ones(8)
        return self.weight * x


def test_applied_restores_buffers_that_grew():
    model = Growing()
    cache = model.cache
    model.weight.data += 2
    model.ema.update()
    for error in (None, ValueError):
        with contextlib.suppress(ValueError), model.ema.applied(0.5):
            assert model(1) == 1 and len(model.cache) == 8
            model.norm(torch.ones(2, 2))
            model.half()
            if error:
                raise error
        assert model(0).dtype == torch.float32 and model(1) == 2 and model.mask.signbit().all()
        assert model.norm.num_batches_tracked == 0 and model.norm.running_mean.sum() == 0
        model.cache = cache
    model.ema.update()


def test_gradients_of_the_averages_are_not_taken_after_applied():
    """What autograd has kept of the averages is gone then: an error, no wrong numbers."""
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(2, requires_grad=True)
    ema = EMA(model, [0.9])
    model[1].weight.data += 1
    ema.update()
    with ema.applied(0.9):
        model(x).sum().backward()
        late = model(x).sum()
    with pytest.raises(RuntimeError, match="inplace operation"):
        late.backward()


def test_applied_under_autocast():
    """Autocast keeps low-precision copies of the parameters that it has seen."""
    model = nn.Linear(1, 1, bias=False)
    ema, x = EMA(model, [0, 0.5]), torch.ones(1, 1)
    first = model.weight.item()
    model.weight.data += 2
    ema.update()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert model(x).item() == pytest.approx(first + 2, abs=0.02)
            for decay, moved in ((0, 2), (0.5, 1)):
                with ema.applied(decay):
                    assert model(x).item() == pytest.approx(first + moved, abs=0.02)


def test_infinite_weights_are_kept():
    model = Growing()
    ema, state = model.ema, {**model.state_dict(), "mask": torch.tensor([1.0, -math.inf])}
    ema.load_average(0.5, state, 10)
    for _ in range(20):
        model.mask.data[0] += 1
        model.weight.data += 1
        ema.update()
    model.mask.data[1] = 0  # the state knows what was infinite
    for each in (ema, pickled(model).ema):
        each.load_state_dict(saved(ema.state_dict()))
        assert each.weights(0)["mask"].tolist() == [20, -math.inf]
        assert each.weights(0.99)["mask"].tolist()[1] == -math.inf
        assert each.weights(0.99)["mask"].tolist()[0] == pytest.approx(
            sum(0.99 ** (20 - t) * 0.01 * t for t in range(1, 21)), rel=1e-4)
        assert 0 < each.error_bound(0.97) < 1


@pytest.mark.parametrize("stop", [7, 16, 23, 40])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(stop):
    whole = EMA(mlp(), MIXED)
    for step, _ in enumerate(training(whole.model, 60), 1):
        whole.update()
        if step == stop:
            halfway = saved(whole.state_dict()), saved(whole.model.state_dict())
    resumed = EMA(mlp(seed=3), ["step"], block=4)
    resumed.load_state_dict(halfway[0])
    replay = mlp()
    for step, _ in enumerate(training(replay, 60), 1):
        if step > stop:
            resumed.model.load_state_dict(replay.state_dict())
            resumed.update()
    assert resumed.step == 60 and resumed.decays == whole.decays
    for decay in (*MIXED, 0.9993):
        assert_same(resumed.weights(decay), whole.weights(decay))
        assert resumed.init_share(decay) == whole.init_share(decay)
        assert resumed.error_bound(decay) == whole.error_bound(decay)


def test_states_are_matched_by_name():
    def model(order):  # of equal shapes, so that nothing but the name tells them apart
        model = nn.Module()
        for name in order:
            model.register_parameter(name, nn.Parameter(torch.randn(7)))
        return model

    ema = EMA(model("abc"), [0.9])
    for _ in wandering(ema.model, "walk", 20):
        ema.update()
    other = EMA(model("cab"), [0.9])
    other.load_state_dict(ema.state_dict())
    assert_same(dict(sorted(other.weights(0.9).items())), ema.weights(0.9))
    with pytest.raises(ValueError, match="no decay 0.8; it has 0.9,"):
        EMA(model("abc"), [0.8]).load_state_dict(ema.state_dict())


@pytest.mark.parametrize("broken, named", [
    ({"bank": torch.zeros(16, 7)}, "(16, 7)"), ({"recent": torch.zeros(16, 9)}, "(16, 9)"),
    ({"shapes": {"weight": [1, 6], "bias": [1]}}, "parameter weight"), (None, "lacks step, decays"),
])
def test_a_state_that_does_not_fit_changes_nothing(broken, named):
    ema = EMA(nn.Linear(7, 1), [0.5])
    for _ in wandering(ema.model, "walk", 20):
        ema.update()
    before = ema.weights(0.97)
    state = ema.model.state_dict() if broken is None else {**ema.state_dict(), **broken}
    with pytest.raises(ValueError, match=re.escape(named)):
        ema.load_state_dict(state)
    assert_same(ema.weights(0.97), before)
    ema.update()


def test_schedules_leave_their_decay_as_it_was_given():
    ema = EMA(nn.Linear(1, 1), ["ramp:0.99", "halflife:10"])
    for _ in range(2000):
        ema.update()
    assert ema.decays == ["ramp:0.99", "halflife:10"]
    assert ema.card("ramp:0.99")["decay"] == 0.99  # reached after (1+t)/(10+t) > 0.99
    assert ema.init_share("ramp:0.99") == pytest.approx(betas("ramp:0.99", 2000).prod().item())


@pytest.mark.parametrize("at", [0, 5, 16])
def test_averages_of_another_checkpoint_go_on(at):
    """A plain state dict of averages starts a row, also in the middle of a block."""
    model, decay = mlp(), "ramp:0.9999"
    oracle, ema = Oracle(model, [decay]), EMA(model, [decay])
    for step, _ in enumerate(wandering(model, "walk", 60), 1):
        oracle.update()
        if step == 20:  # the average of another run; this one takes it over after `at` steps
            theirs = {f"module.{name}": p.float() for name, p in model.state_dict().items()}
            oracle.mean[decay] = flatten(theirs.values())
            if at == 0:
                ema = EMA(model, [decay])
            ema.load_average(decay, theirs, step=20)
            torch.testing.assert_close(average(ema, decay), oracle.mean[decay], rtol=0, atol=1e-6)
        elif step > 20 - at:
            ema.update()
    assert oracle.error(ema, decay)[0] < 1e-6 * oracle.first.norm()
    assert ema.init_share(decay) == pytest.approx(betas(decay, 60).prod().item())
    share = profile_of(betas(decay, 60))[1:]
    effective = (share.sum() ** 2 / share.square().sum()).item()
    assert ema.card(decay)["effective_steps"] == pytest.approx(effective)
    again = EMA(model, [decay])
    again.load_state_dict(saved(ema.state_dict()))
    assert_same(again.weights(decay), ema.weights(decay))
    with pytest.raises(ValueError, match="no debiasing"):
        ema.weights(decay, debias=True)
    with pytest.raises(ValueError, match="parameter 0.bias "):
        ema.load_average(decay, {k: v for k, v in model.state_dict().items() if k != "0.bias"}, 1)
    with pytest.raises(ValueError, match="parameter other "):
        ema.load_average(decay, {**model.state_dict(), "other": torch.ones(2)}, 1)
    with pytest.raises(ValueError, match="parameter 0.weight has shape None"):
        ema.load_average(decay, {"ema": model.state_dict()}, 1)
    for step in (-1, 2.5):
        with pytest.raises(ValueError, match=f"step is {step}"):
            ema.load_average(decay, model.state_dict(), step)
    with pytest.raises(ValueError, match="0.123 is not tracked"):
        ema.load_average(0.123, model.state_dict(), 1)


# Uses ---------------------------------------------------------------------------------------------


def test_plain_loop():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, oracle = EMA(model, decays=[0.9, 0.999]), Oracle(model, [0.9, 0.999])
    for _ in range(20):
        loss = (model(torch.randn(8, 2)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update()
        oracle.update()
    with torch.no_grad(), ema.applied(0.9):
        assert model(torch.zeros(1, 2)).shape == (1, 2)
    assert oracle.error(ema, 0.9)[1] < 1e-5 and oracle.error(ema, 0.999)[1] < 1e-5


@pytest.mark.parametrize("hook", [False, True])
def test_accumulated_gradients_and_optimizer_hook_count_optimizer_steps(hook):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, oracle = EMA(model, [0.9]), Oracle(model, [0.9])
    if hook:
        optimizer.register_step_post_hook(lambda *_: ema.update())
    for batch in range(1, 41):
        (model(torch.randn(8, 2)) - 1).square().mean().div(4).backward()
        if batch % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
            if not hook:
                ema.update()
            oracle.update()
    assert ema.step == 10 and oracle.error(ema, 0.9)[1] < 1e-6


# On a GPU -----------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("home", ["cuda", "cpu"])
def test_the_bank_of_a_model_on_a_gpu_equals_that_on_the_cpu(home):
    model, twin = mlp(), mlp().cuda()
    ema, other, oracle = EMA(model, MIXED), EMA(twin, MIXED, device=home), Oracle(model, MIXED)
    torch.set_float32_matmul_precision("high")  # allows TF32
    try:
        for _ in wandering(model, "walk", 41):
            for here, there in zip(model.parameters(), twin.parameters()):
                there.data.copy_(here)
            ema.update()
            other.update()
            oracle.update()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert other._bank.device.type == home
    for decay in (*MIXED, 0.9993):
        exact, weights = ema.weights(decay), other.weights(decay)
        assert all(value.is_cuda for value in weights.values())
        error = flatten(weights.values()).cpu() - flatten(exact.values())
        assert error.norm() < 5e-6 * (flatten(exact.values()) - oracle.first).norm()
        assert other.error_bound(decay) == pytest.approx(ema.error_bound(decay), rel=1e-3)
        assert other.card(decay) == pytest.approx(ema.card(decay))
    own = flatten(twin.parameters())
    with other.applied(0.9993):
        assert torch.equal(flatten(twin.parameters()), flatten(weights.values()))
    assert torch.equal(flatten(twin.parameters()), own)
    moved = EMA(model, MIXED)  # a state goes from one device to the other
    with torch.device("cuda"):  # as where a script builds its model on the GPU
        moved.load_state_dict(saved(other.state_dict()))
        assert moved.error_bound(0.9993) > 0
    assert_same(moved.weights("step"), {n: v.cpu() for n, v in other.weights("step").items()})


# Several processes --------------------------------------------------------------------------------


def big_run(wrap=lambda model: model):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 250))
    ema = EMA(wrap(model), [0.99, "power:0.1"])
    for _ in wandering(model, "walk", 41):
        ema.update()
    return ema


def two_processes(rank, port, path):
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    before = pickle.dumps(whole := EMA(mlp()))
    torch.distributed.init_process_group("gloo", init_method=where, world_size=2, rank=rank)
    ema = big_run(nn.parallel.DistributedDataParallel)
    held = torch.tensor(float(ema._bank.numel()))
    torch.distributed.all_reduce(held)
    result = {"held": held, "bound": ema.error_bound(0.9993), "state": ema.state_dict()}
    result |= {str(decay): ema.weights(decay) for decay in (0.99, "power:0.1", 0.9993)}
    again = EMA(ema.model, ())
    again.load_state_dict(result["state"])
    result["again"] = again.weights(0.9993)
    assert ema._bank.numel() < held
    if rank == 0:
        torch.save(result, path)
    assert_same(pickled(ema).weights(0.99), result["0.99"])
    assert_same(pickle.loads(before).weights(0.99), whole.weights(0.99))
    dump = pickle.dumps(EMA(mlp()))  # it holds this rank's slice
    torch.distributed.destroy_process_group()
    with pytest.raises(RuntimeError, match=f"pickled by rank {rank} of 2"):
        pickle.loads(dump)


def test_two_processes_equal_one_bit_for_bit(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "result.pt"
    torch.multiprocessing.spawn(two_processes, (port, path), nprocs=2)
    result, ema = torch.load(path, weights_only=True), big_run()
    for decay in (0.99, "power:0.1", 0.9993):
        assert_same(result[str(decay)], ema.weights(decay))
    assert_same(result["again"], ema.weights(0.9993))
    assert result["held"] == ema._bank.numel()  # no column twice
    assert result["bound"] == pytest.approx(ema.error_bound(0.9993))
    single = EMA(nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 250)), decays=())
    single.load_state_dict(result["state"])
    assert_same(single.weights(0.99), ema.weights(0.99))


# ==================================================================================================
# Noise schedules, objectives and samplers
# ==================================================================================================

PATHS = list(itertools.product(Diffusion.SCHEDULES, Diffusion.OBJECTIVES))
MEAN, STD = torch.tensor([0.5, -0.3]).double(), torch.tensor([0.4, 0.1]).double()


def gaussian_network(diffusion):
    """The best possible prediction for data N(MEAN, STD²), from the posterior mean of x0."""
    def network(x, t):
        alpha, sigma, d_alpha, d_sigma = diffusion.at(t, x)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        eps = (x - alpha * x0) / sigma
        return {"x0": x0, "eps": eps, "v": d_alpha * x0 + d_sigma * eps}[diffusion.objective]
    return network


def test_schedules_are_those_of_the_papers():
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha, sigma = Diffusion("linear").path[:2].numpy()
    np.testing.assert_allclose(alpha**2, np.cumprod(1 - beta), rtol=1e-12)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha, sigma = Diffusion("cosine").path[:2].numpy()
    np.testing.assert_allclose(alpha[:-1] ** 2, f[1:-1] / f[0], rtol=1e-9)  # the last is clipped
    alpha, sigma = Diffusion("flow").path[:2].numpy()
    np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-12)
    assert np.allclose(np.diff(sigma), 1e-3) and sigma[0] > 0 and alpha[-1] > 0


@pytest.mark.parametrize("schedule, objective", PATHS)
def test_predictions_convert_into_one_another(schedule, objective):
    diffusion = Diffusion(schedule, objective)
    x0, eps, t = torch.randn(7, 3, 2).double(), torch.randn(7, 3, 2).double(), torch.arange(7) * 140
    x_t = diffusion.add_noise(x0, t, eps)
    x0_hat, eps_hat, v_hat = diffusion.predict(diffusion.target(x0, t, eps), x_t, t)
    torch.testing.assert_close(x0_hat, x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(eps_hat, eps, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(v_hat, Diffusion(schedule, "v").target(x0, t, eps))


@pytest.mark.parametrize("schedule, objective", PATHS)
def test_least_loss_on_a_gaussian(schedule, objective):
    """The least loss is the posterior variance of the target, known for a Gaussian."""
    torch.manual_seed(0)
    diffusion, n = Diffusion(schedule, objective), 200_000
    for step in (100, 500, 900):
        t = torch.full((n,), step)
        x0, eps = MEAN + STD * torch.randn(n, 2).double(), torch.randn(n, 2).double()
        loss = diffusion.loss(gaussian_network(diffusion), x0, t, eps).mean().item()
        alpha, sigma = diffusion.path[:2, step]
        posterior = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # of x0
        scale = {"eps": (alpha / sigma) ** 2, "v": sigma**-2, "x0": max(sigma, 0.05) ** -2}
        assert loss == pytest.approx((posterior * scale[objective]).mean().item(), rel=0.02)


@pytest.mark.parametrize("schedule", Diffusion.SCHEDULES)
@pytest.mark.parametrize("num_steps, settings", [
    (1000, {"eta": 1.0}), (500, {"eta": 0.5}), (250, {}), (50, {"order": 2})])
def test_samplers_reach_the_gaussian(schedule, num_steps, settings):
    """With the best network, mean and covariance of the samples are those of the data."""
    generator = torch.Generator().manual_seed(0)
    diffusion = Diffusion(schedule, "v")
    noise = torch.randn(20_000, 2, generator=generator).double()
    *_, (t, x, x0_hat) = diffusion.sample(gaussian_network(diffusion), noise, num_steps,
                                          generator=generator, **settings)
    assert t == -1 and x is x0_hat
    torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=0.015)
    torch.testing.assert_close(torch.cov(x.T), torch.diag(STD**2), rtol=0.05, atol=0.002)


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_convergence(order):
    """Against the exact solution of the probability-flow ODE, which is affine for a Gaussian."""
    diffusion = Diffusion("cosine", "x0", num_steps=200_000)
    x = torch.randn(100, 2).double()
    diffusion.path, diffusion.num_steps = diffusion.path[:, 2_000:150_000], 148_000
    alpha, sigma = diffusion.path[:2, -1]
    a0, s0 = diffusion.path[:2, 0]
    exact = a0 * MEAN + (x - alpha * MEAN) * ((a0 * STD) ** 2 + s0**2).sqrt() / (
        (alpha * STD) ** 2 + sigma**2).sqrt()
    errors = []
    for steps in (64, 128):
        *_, last, _ = diffusion.sample(gaussian_network(diffusion), x, steps, order=order)
        errors.append((last[1] - exact).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_match_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    if eta:
        theirs, settings = diffusers.DDPMScheduler(1000, clip_sample=True), {}
    else:
        theirs, settings = diffusers.DDIMScheduler(1000), {"use_clipped_model_output": True}
    theirs.set_timesteps(1000)
    net = torch.nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)
    ours = Diffusion("linear", "eps").sample(
        lambda x, t: net(x), torch.randn(4, 1, 8, 8), 1000, eta=eta, clip=1.0,
        generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for (t, x, x0_hat), (_, after, _) in itertools.pairwise(ours):
        step = theirs.step(net(x), t, x, generator=generator, **settings)
        # Dividing by alpha, 0.006 at the start, makes 1e-5 of float32's rounding.
        torch.testing.assert_close(x0_hat, step.pred_original_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after, step.prev_sample, rtol=1e-4, atol=1e-4)
    assert t == 0


# ==================================================================================================
# UNet
# ==================================================================================================

@pytest.mark.parametrize("channels, height, width", [(1, 16, 16), (3, 4, 12), (64, 8, 8)])
def test_unet_shapes(channels, height, width):
    net = UNet(channels, width=8)
    x, t = torch.randn(2, channels, height, width), torch.tensor([0, 999])
    out = net(x, t)
    assert out.shape == x.shape and not out.any()  # the last layer starts at zero
    (net(x, t) - x).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_unet_sees_time_and_every_pixel():
    torch.manual_seed(0)
    net = UNet(1, width=8)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    out = net(x, torch.tensor([10]))
    assert not torch.allclose(out, net(x, torch.tensor([500])))
    assert torch.autograd.grad(out[0, 0, 0, 0], x)[0].ne(0).all()  # attention: a global view


def test_unet_of_the_ddpm_paper():
    """35.7 M in the paper; the published checkpoint holds exactly this many."""
    net = UNet(3, **PRESETS["cifar10"]["network"])
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


@pytest.mark.parametrize("shape", [(2, 1, 10, 8), (2, 3, 8, 8)])
def test_unet_refuses_what_does_not_fit(shape):
    with pytest.raises(ValueError, match="divisible by 4"):
        UNet(1, width=8)(torch.zeros(shape), torch.zeros(2))


@pytest.mark.parametrize("name, code", [
    ("EMA", """
model = torch.nn.Linear(2, 2)
ema = EMA(model, decays=[0.5])
start = model.weight.detach().clone()
model.weight.data += 1
ema.update()
assert torch.allclose(ema.weights(0.5)["weight"], start + 0.5)"""),
    ("Noise schedules, objectives and samplers", """
diffusion = Diffusion("cosine", "v")
*_, (t, x, x0) = diffusion.sample(lambda x, t: 0 * x, torch.randn(2, 1, 4, 4), 5)
assert t == -1 and x.isfinite().all()"""),
    ("UNet", "assert UNet()(torch.zeros(1, 1, 8, 8), torch.zeros(1)).shape == (1, 1, 8, 8)"),
])
def test_sections_run_when_pasted_alone(name, code):
    bar = "# " + "=" * 98 + "\n"
    source = Path(ddpm_ema.__file__).read_text()
    section = source.split(f"{bar}# {name}\n{bar}")[1].split(bar)[0]
    imports = set(re.findall(r"^(?:import|from) (\w+)", section, re.MULTILINE))
    assert imports <= {"contextlib", "math", "torch"}
    subprocess.run([sys.executable, "-c", section + code], check=True, cwd="/")


# ==================================================================================================
# Data
# ==================================================================================================

def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 12), np.uint8)
CLASSES = np.arange(40, dtype=np.uint8) % 3


def test_glyphs_have_known_modes():
    images, labels = draw_glyphs(4000, seed=1)
    again, _ = draw_glyphs(4000, seed=1)
    assert np.array_equal(images, again) and not np.array_equal(images, draw_glyphs(4000, 2)[0])
    assert images.shape == (4000, 1, 16, 16) and images.dtype == np.uint8
    share = np.bincount(labels, minlength=36) / 4000
    np.testing.assert_allclose(share, (z := 1 / np.arange(1, 37)) / z.sum(), atol=0.02)
    assert images[:, :, [0, -1]].mean() < 12  # inside the frame
    assert images.mean() > 30


def test_npz_of_integers(tmp_path):
    np.savez(tmp_path / "x.npz", images=PIXELS[:, :, :, None].astype(np.int64))
    data = load_data(str(tmp_path / "x.npz"))
    assert data.is_pictures and np.array_equal(data.images[:, 0], PIXELS) and data.labels is None
    assert data.num_classes == 2  # upright and upside down


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_folder(tmp_path, pack):
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(PIXELS)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(pack(idx_bytes(PIXELS)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(pack(idx_bytes(CLASSES)))
    data = load_data(str(tmp_path))
    assert np.array_equal(data.images[:, 0], PIXELS) and np.array_equal(data.labels, CLASSES)
    x0 = data.x0(torch.arange(5))
    assert x0.shape == (5, 1, 8, 12) and torch.equal(((x0 + 1) * 127.5).round(), data.images[:5])
    train, held_out = data.split()
    assert (len(train), len(held_out)) == (32, 8)


def test_image_folder_with_classes(tmp_path):
    for i in range(24):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        colour = np.stack([PIXELS[i]] * 3, axis=2)
        matplotlib.image.imsave(folder / f"{i:02}_idx3.png", colour)
    data = load_data(str(tmp_path))
    assert data.images.shape == (24, 3, 8, 12) and data.names == ["a", "b"]
    assert np.array_equal(data.images[:12, 1], PIXELS[:24:2])
    assert data.labels.tolist() == [0] * 12 + [1] * 12


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_npz_of_floats(tmp_path, axes):
    latents = np.random.default_rng(0).normal(3, 5, (50, 4, 8, 8)) * [[[[1]], [[2]], [[3]], [[4]]]]
    np.savez(tmp_path / "z.npz", images=latents.transpose(axes), labels=np.arange(50) % 5 + 7)
    data = load_data(str(tmp_path / "z.npz"))
    x0 = data.x0(torch.arange(50))
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(x0.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    assert data.names == ["7", "8", "9", "10", "11"] and not data.is_pictures


def test_a_constant_channel_stays_constant():
    images = np.random.default_rng(0).normal(size=(5000, 2, 16, 16)).astype(np.float32)
    images[:, 1] = 300.7  # no multiple of a power of two: a float32 mean would be off
    data = ddpm_ema.Dataset(images)
    assert data.bound < 7 and (data.x0(torch.arange(3))[:, 1] == 0).all()


class RangeServer(http.server.BaseHTTPRequestHandler):
    content, ranges = bytes(range(256)) * 9000, []

    def do_GET(self):
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.ranges.append(first)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(self.content) - first))
        self.end_headers()
        end = len(self.content) if first or self.path == "/whole" else 1_500_000  # breaks off
        self.wfile.write(self.content[first:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        RangeServer.ranges.clear()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_download_resumes_and_checks(server, tmp_path):
    md5, path = hashlib.md5(RangeServer.content).hexdigest(), tmp_path / "cache" / "file"
    with pytest.raises(OSError, match="continues it"):
        download(f"{server}/broken", path, md5)
    part = path.with_name("file.part").stat().st_size
    assert 0 < part <= 1_500_000 and not path.exists()
    download(f"{server}/broken", path, md5)
    assert path.read_bytes() == RangeServer.content and RangeServer.ranges == [0, part]
    download(f"{server}/broken", path, md5)  # cached: not asked again
    assert len(RangeServer.ranges) == 2
    with pytest.raises(OSError, match="MD5"):
        download(f"{server}/whole", tmp_path / "other", "0" * 32)
    assert not list(tmp_path.glob("other*"))


def test_downloaded_sets(server, tmp_path, monkeypatch):
    """The three built-in sets, served from here in their original formats."""
    records = np.concatenate([CLASSES[:, None], np.zeros((40, 3072), np.uint8)], axis=1)
    records[:, 1:1025] = 200  # the first plane is red
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for i in range(1, 6):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            info.size = records.size
            tar.addfile(info, io.BytesIO(records.tobytes()))
    served = {"cifar-10-binary.tar.gz": buffer.getvalue(),
              "train-images-idx3-ubyte.gz": gzip.compress(idx_bytes(PIXELS)),
              "train-labels-idx1-ubyte.gz": gzip.compress(idx_bytes(CLASSES))}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, (_, files) in DOWNLOADS.items():
        md5 = {file: hashlib.md5(served[file]).hexdigest() for file in files}
        monkeypatch.setitem(DOWNLOADS, name, (f"{server}/whole?", md5))
        for file in files:
            monkeypatch.setattr(RangeServer, "content", served[file])
            download(f"{server}/whole", tmp_path / "ddpm_ema" / name / file, md5[file])
    cifar = load_data("cifar10")
    assert cifar.images.shape == (200, 3, 32, 32) and cifar.labels[:4].tolist() == [0, 1, 2, 0]
    assert cifar.images[0].float().mean((1, 2)).tolist() == [200, 0, 0]
    assert np.array_equal(load_data("mnist").images[:, 0], PIXELS)
    assert np.array_equal(load_data("fashion").labels, CLASSES)


# ==================================================================================================
# Metrics
# ==================================================================================================

def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    m1, m2 = torch.tensor(rng.normal(size=(2, 6)))
    v1, v2 = torch.tensor(rng.uniform(0.1, 3, size=(2, 6)))
    turn = torch.linalg.qr(torch.tensor(rng.normal(size=(6, 6)))).Q
    closed = (m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum()  # they commute
    ours = frechet_distance(turn @ m1, turn * v1 @ turn.T, turn @ m2, turn * v2 @ turn.T)
    assert ours == pytest.approx(closed.item(), rel=1e-10)
    rank_one = torch.outer(m1, m1)
    closed = m1.square().sum().item()  # (2 - 1)² times the one eigenvalue
    assert frechet_distance(m1, rank_one, m1, 4 * rank_one) == pytest.approx(closed)
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    a, b = (x @ x.T for x in torch.tensor(rng.normal(size=(2, 6, 6))))
    closed = (a + b - 2 * torch.tensor(sqrtm((a @ b).numpy()).real)).trace().item()
    assert frechet_distance(m1, a, m1, b) == pytest.approx(closed, rel=1e-8)


def test_moments_are_those_of_float64():
    features = torch.randn(9000, 5) + 100
    mean, cov = moments(features)
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy().T), rtol=1e-9, atol=1e-12)


def test_manifold_share_by_hand():
    """On a line: the ball of a point reaches its third neighbour."""
    real = torch.tensor([[0.0], [1.0], [2.0], [4.0], [20.0], [21.0], [22.0], [23.0]])
    # radii 4, 3, 2, 4 and 3, 2, 2, 3: covered are [-4, 8] and [17, 26]
    fake = torch.tensor([[-4.1], [-3.9], [7.9], [8.1], [12.0], [16.9], [17.1], [26.1]])
    assert manifold_share(fake, real).int().tolist() == [0, 1, 1, 0, 0, 0, 1, 0]


def test_manifold_share_in_tiles():
    real, fake = torch.randn(2500, 4), torch.randn(1300, 4) * 1.5
    radius = torch.cdist(real, real).sort(1).values[:, 3]
    naive = (torch.cdist(fake, real) <= radius).any(1)
    assert (manifold_share(fake, real) != naive).sum() <= 1  # a tie may round either way


def test_modes_by_hand():
    """100 samples of 4 modes with true shares .4 .3 .2 .1, of which the last is missing."""
    true = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    probs = torch.eye(4)[[0] * 50 + [1] * 40 + [2] * 10]
    features = torch.randn(100, 3)
    row = measure(features, probs, {"moments": moments(features), "features": features,
                                    "shares": true})
    assert row["fd"] == pytest.approx(0, abs=1e-8) and row["precision"] == row["recall"] == 1
    assert row["covered_modes"] == 3 and row["legible"] == 1
    assert row["tail_share"] == pytest.approx(0.1 / 0.3)
    assert row["tv"] == pytest.approx(0.2)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.4, 0.1))
    assert row["is"] == pytest.approx(math.exp(entropy))


def test_bootstrap_spread_is_that_of_repeated_sampling():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(2000, 4, generator=generator)
    reference = {"moments": moments(real), "features": real, "shares": torch.ones(4).double() / 4}

    def draw():
        features = torch.randn(1000, 4, generator=generator) * 1.2
        probs = torch.rand(1000, 4, generator=generator).softmax(1)
        return features, probs

    rows = [measure(*draw(), reference, num_bootstrap=2) for _ in range(30)]
    row = measure(*draw(), reference, num_bootstrap=100)
    for name in ("fd", "is", "precision", "recall", "tv", "tail_share"):
        spread = np.std([r[name] for r in rows])
        assert row[f"{name}_sd"] == pytest.approx(spread, rel=0.5)


# ==================================================================================================
# The command
# ==================================================================================================

ddpm_ema.CANDIDATES = ("0.9", "0.97", "0.99")  # fewer, since each costs a network evaluation
ddpm_ema.SMALL["network"] = {"width": 8}  # checkpoints of 28 MB, not of 109
PICTURES = ("plot_samples", "plot_curves", "plot_training", "plot_sweep", "plot_modes")
TINY = ["--batch-size", "8", "--num-samples", "32", "--sample-steps", "2", "--log-every", "2"]


@pytest.fixture(scope="session")
def bars(tmp_path_factory):
    """A data set of 8x8 bars in four directions, and a folder with its classifier."""
    folder = tmp_path_factory.mktemp("bars")
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 200, p=[0.4, 0.3, 0.2, 0.1])
    images = np.zeros((200, 8, 8), np.uint8)
    for image, label, place in zip(images, labels, rng.integers(1, 7, 200)):
        image[(place, slice(None)) if label < 2 else (slice(None), place)] = 127 + 128 * (label % 2)
    np.savez(folder / "bars.npz", images=images[:, None], labels=labels)
    run(folder, folder / "first", "--steps", "4", "--decay", "0.5,0.9", "--stages", "0.5,1")
    return folder


def small(left_out=PICTURES):
    """Inside, the classifier trains briefly, and these pictures, which are slow, are not drawn."""
    brief = functools.partial(ddpm_ema.train_classifier, num_steps=100)
    pictures = dict.fromkeys(left_out, mock.DEFAULT)
    return mock.patch.multiple(ddpm_ema, train_classifier=brief, **pictures)


def run(folder, out, *flags):
    """The command itself, in this process; its pictures are drawn for the first run only."""
    first = out == folder / "first"
    if not first and not out.exists():
        out.mkdir()
        shutil.copy(folder / "first" / "classifier.pt", out)
    with small(() if first else PICTURES):
        main(["--data", str(folder / "bars.npz"), "--out", str(out), *TINY, *flags])


def rows_of(out):
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_leaves_what_it_promises(bars):
    out = bars / "first"
    rows = rows_of(out)
    assert list(rows[0])[:12] == ["step", "weights", "decay", "debias", "init_share", "fd", "is",
                                  "precision", "recall", "tail_share", "covered_modes", "tv"]
    assert [(r["step"], r["weights"], r["decay"], r["debias"]) for r in rows] == [
        (step, *row) for step in "24" for row in [
            ("real", "", "0"), ("raw", "", "0"), ("ema", "0.5", "0"), ("ema", "0.5", "1"),
            ("ema", "0.9", "0"), ("ema", "0.9", "1")]]
    for row in rows:
        share = [float(row["decay"]) ** int(row["step"])] if row["decay"] else []
        assert [float(x) for x in row["init_share"].split()] == pytest.approx(share)
        assert all(math.isfinite(float(row[m])) and float(row[m + "_sd"]) >= 0
                   for m in list(row)[5:12])
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 2, 4]
    assert log[0]["loss"] is None and all(line["loss"] > 0 for line in log[1:])
    assert set(log[-1]["held_out_loss"]) == {"raw", "0.5", "0.5 debiased", "0.9", "0.9 debiased"}
    for name in ("samples", "curves", "training", "sweep", "modes"):
        assert matplotlib.image.imread(out / f"{name}.png").std() > 0.01
    assert not list(out.glob("tmp-*"))


def test_the_same_command_again_prints_the_table(bars, capsys):
    out = bars / "first"
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    main(["--out", str(out)])  # a run knows its own settings
    printed = capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert printed.count("debiased") >= 4 and "real" in printed and "horizon" in printed


def test_modes_of_the_table_agree_with_its_metrics(bars):
    """mode_X is a frequency over its true one: tail share and total variation follow from them."""
    data, _ = load_data(str(bars / "bars.npz")).split()
    true = data.labels.bincount().double().numpy() / len(data)
    rare = true.argsort()[:2]
    for row in rows_of(bars / "first"):
        often = np.array([float(row[f"mode_{k}"]) for k in range(4)])
        assert often @ true == pytest.approx(1, abs=1e-5)
        assert float(row["tv"]) == pytest.approx(abs(often - 1) @ true / 2, abs=1e-5)
        tail = (often * true)[rare].sum() / true[rare].sum()
        assert float(row["tail_share"]) == pytest.approx(tail, abs=1e-5)


def test_held_out_losses_of_the_candidates(bars):
    """Every candidate at every stage; the numbers are those of the weights in the checkpoints."""
    rows = ddpm_ema.read_rows(bars / "first" / "held_out.csv", ddpm_ema.ROW_KEY)
    names = ["raw", "0.9", "0.9 debiased", "0.97", "0.97 debiased", "0.99", "0.99 debiased", "0.5",
             "0.5 debiased"]
    assert [(r["step"], str(ddpm_ema.weights_of(r))) for r in rows] == [
        (step, name) for step in "24" for name in names]
    _, held_out = load_data(str(bars / "bars.npz")).split()
    state = torch.load(bars / "first" / "checkpoint-2.pt", weights_only=True)
    model, diffusion = UNet(1, width=8).eval(), Diffusion("cosine", "v")
    model.load_state_dict(state["model"])
    raw = ddpm_ema.held_out_loss(model, diffusion, held_out)
    assert float(rows[0]["held_out_loss"]) == pytest.approx(raw, rel=1e-5)
    ema = EMA(model, ["0.5", "0.9"])
    ema.load_state_dict(state["ema"])
    model.load_state_dict(ema.weights(0.97, debias=True))
    loss = ddpm_ema.held_out_loss(model, diffusion, held_out)
    assert float(rows[4]["held_out_loss"]) == pytest.approx(loss, rel=1e-5)


def test_auto_evaluates_the_decay_of_the_lowest_held_out_loss(bars, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(bars / "first", out)
    rows = ddpm_ema.read_rows(out / "held_out.csv", ddpm_ema.ROW_KEY)
    for row, loss in zip(rows, [0, 5, 4, 3, 1, 4, 5, 0, 0, 0, 5, 4, 3, 4, 2, 5, 0, 0]):
        row["held_out_loss"] = str(loss)  # step 2: 0.97 debiased; step 4: 0.99
    ddpm_ema.write_rows(out / "held_out.csv", rows)
    capsys.readouterr()
    run(bars, out, "--decay", "auto")
    new = [(r["step"], r["decay"], r["debias"]) for r in rows_of(out)[12:]]
    assert new == [("2", "0.97", "1"), ("4", "0.99", "0")]
    printed = capsys.readouterr().out
    assert "step 2: raw 0; lowest 1 at 0.97 debiased, beside it 4 at 0.9 debiased, 5 at" in printed


def test_an_interrupted_evaluation_goes_on_at_its_row(bars, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(bars / "first", out)
    whole, measured = rows_of(out), []
    (out / "results.csv").unlink()

    def interrupted(*values):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(values)
        return measure(*values)

    monkeypatch.setattr(ddpm_ema, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(bars, out)
    assert rows_of(out) == whole[:3]
    monkeypatch.setattr(ddpm_ema, "measure", measure)
    run(bars, out)
    assert rows_of(out) == whole


def test_sweep_stands_for_its_ten_decays():
    assert ddpm_ema.decays("0.7,sweep,auto") == ["0.7", *ddpm_ema.SWEEP, "auto"]
    assert len(ddpm_ema.SWEEP) == 10


def test_trajectories_have_exact_distances_and_a_faithful_sketch():
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(3, 20_011, generator=generator).cumsum(0)
    moves[2] = 2 * moves[0] - moves[1]
    out = ddpm_ema.trajectory(dict(zip("abc", moves)))
    a, b, c = moves.double()
    assert out["distance"]["a"] == {"init": pytest.approx(a.norm().item(), rel=1e-5)}
    assert out["distance"]["c"] == {
        "init": pytest.approx(c.norm().item(), rel=1e-5),
        "a": pytest.approx((c - a).norm().item(), rel=1e-5),
        "b": pytest.approx((c - b).norm().item(), rel=1e-5)}
    a, b, c = (np.array(out["sketch"][name]) for name in "abc")
    np.testing.assert_allclose(c, 2 * a - b, rtol=1e-3, atol=1e-2)  # it is linear
    assert np.linalg.norm(a - b) == pytest.approx(out["distance"]["b"]["a"], rel=0.3)


def test_convergence_by_hand():
    """The last quarter of eight lines are three: raw 4, 1, 4 and an average that falls steadily."""
    raw, average = [9, 5, 2, 6, 4, 3, 4, 1, 4], [9, 8, 7, 6, 5, 4, 3, 2, 1]
    lines = [{"step": 10 * i, "held_out_loss": {"raw": float(a), "0.9": float(b)}}
             for i, (a, b) in enumerate(zip(raw, average))]
    out = ddpm_ema.convergence(lines)
    assert out["held_out_sd"] == {"raw": pytest.approx(2**0.5), "0.9": pytest.approx(0, abs=1e-9)}
    assert out["reached"] == {"raw": 20, "0.9": 60}
    assert ddpm_ema.convergence(lines[:2])["held_out_sd"]["raw"] is None


# ==================================================================================================
# Reports
# ==================================================================================================

def finished_run(folder, objective, seed, fds):
    """A folder that looks like a finished run: {decay: Fréchet distance}."""
    folder.mkdir()
    rows = [{"step": "8", "weights": "ema" if decay else "raw", "decay": decay, "debias": "0",
             "init_share": "0.1" * bool(decay), "fd": str(fd), "fd_sd": "0.5", "precision": "0.5",
             "recall": "0.5", "sampler": "ddim", "sample_steps": "4", "num_samples": "32",
             "features": ""} for decay, fd in fds.items()]
    rows.insert(0, rows[0] | {"weights": "real", "fd": "0.5"})
    ddpm_ema.write_rows(folder / "results.csv", rows)
    losses = [{k: row[k] for k in ddpm_ema.ROW_KEY} | {"held_out_loss": row["decay"] or "2"}
              for row in rows[1:]]  # the lowest is that of 0.9
    ddpm_ema.write_rows(folder / "held_out.csv", losses)
    args = dict.fromkeys(ddpm_ema.FIXED, "same") | {
        "steps": 8, "objective": objective, "seed": seed}
    parts = dict.fromkeys(("model", "optimizer", "ema", "running"))
    torch.save({"args": args, "step": 8, **parts}, folder / "checkpoint.pt")


def test_report_pools_seeds_and_marks_flips(tmp_path, capsys):
    table = {  # at 0.97, the best of both, v is ahead by 4
        ("v", 0): {"": 20, "0.9": 11, "0.97": 5, "0.99": 9}, ("eps", 0): {
            "": 15, "0.9": 12, "0.97": 9, "0.99": 8.8},
        ("v", 1): {"": 22, "0.9": 9, "0.97": 5, "0.99": 12}, ("eps", 1): {
            "": 17, "0.9": 14, "0.97": 9, "0.99": 9.8}}
    for (objective, seed), fds in table.items():
        finished_run(tmp_path / f"{objective}-{seed}", objective, seed, fds)
    folders = [str(tmp_path / f"{objective}-{seed}") for objective, seed in table]
    main(["--report", *folders, "--out", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    assert "A: objective v; mean and spread of 2 seeds" in printed and "B: objective eps" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert [line[4] for line in lines if line[:2] == ["8", "0.97"] and len(line) == 7] == [
        "5*±0", "9*±0"]
    assert next(line[4:6] for line in lines if line[:2] == ["8", "0.9"]) == ["10", "±1"]
    orders = {line[1]: line[2] for line in lines if line[:1] == ["8"] and len(line) == 5}
    assert orders == {"best": "AB", "raw": "BA!", "0.9": "AB", "0.97": "AB", "0.99": "BA?"}
    # held-out loss chooses 0.9 everywhere: within the spread of the best nowhere
    assert printed.count("best is 0.97, 5 (sd 0.5): differs") == 2
    assert printed.count("within the spread of the best in 0 of 2") == 2
    for name in ("report", "sweep-A", "sweep-B"):
        assert matplotlib.image.imread(tmp_path / "report" / f"{name}.png").std() > 0.01


@pytest.mark.parametrize("flags, message", [
    (["{a}", "nowhere"], "no finished run"), (["{a}", "{a}"], "same settings and seed"),
    (["{a}", "--decay", "0.9"], "--out alone"), ([], "at least one"),
    (["{a}", "{first}"], "different data"),
    (["{a}", "--out", "{a}/results.csv"], "exists")])
def test_report_of_what_is_none_is_one_line(bars, tmp_path, capsys, flags, message):
    finished_run(tmp_path / "a", "v", 0, {"": 3, "0.9": 2})
    with pytest.raises(SystemExit) as stop:
        main(["--report", *(f.format(a=tmp_path / "a", first=bars / "first") for f in flags)])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.err.count("\n") == 1 and message in output.err


# ==================================================================================================
# The command, continued
# ==================================================================================================

@needs_gpu
def test_the_command_takes_the_gpu_by_itself(bars, tmp_path, monkeypatch):
    seen = []

    def look(module, inputs, output):
        if isinstance(module, UNet):
            kernels = [p for p in module.parameters() if p.dim() == 4]
            last = all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
            seen.append((inputs[0].device.type, output.dtype, last))

    x0, places = ddpm_ema.Dataset.x0, set()
    monkeypatch.setattr(ddpm_ema.Dataset, "x0", lambda data, index: (
        places.add((data.images.device.type, index.device.type)), x0(data, index))[1])
    watch = nn.modules.module.register_module_forward_hook(look)
    try:
        run(bars, tmp_path / "run", "--steps", "4", "--decay", "0.5")
    finally:
        watch.remove()
    assert set(seen) == {("cuda", torch.bfloat16, True)} and places == {("cuda", "cuda")}
    table = tmp_path / "run" / "held_out.csv"
    losses = [float(row["held_out_loss"]) for row in csv.DictReader(table.open())]
    table.unlink()  # the same weights on the CPU, in float32
    run(bars, tmp_path / "run", "--device", "cpu", "--decay", "0.5")
    assert losses == pytest.approx(
        [float(row["held_out_loss"]) for row in csv.DictReader(table.open())], rel=0.02)


def test_another_decay_needs_no_training(bars, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(bars / "first", out)
    with small():
        main(["--out", str(out), "--decay", "0.97"])
    assert (out / "metrics.jsonl").read_text() == (bars / "first" / "metrics.jsonl").read_text()
    new = [r for r in rows_of(out) if r["decay"] == "0.97"]
    assert [r["step"] + r["debias"] for r in new] == ["20", "21", "40", "41"]
    assert rows_of(out)[:12] == rows_of(bars / "first")


def equal(a, b):
    """Nested containers of tensors and plain values, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("flags", [
    (), ("--accumulate", "2", "--schedule", "flow", "--sampler", "ddpm")])
def test_resumed_equals_uninterrupted(bars, tmp_path, flags):
    run(bars, tmp_path / "whole", "--steps", "7", *flags)
    run(bars, tmp_path / "parts", "--steps", "3", *flags)
    run(bars, tmp_path / "parts", "--steps", "7", *flags)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                    for name in ("whole", "parts"))
    for key in ("step", "model", "optimizer", "ema"):
        assert equal(whole[key], parts[key]), key
    logs = [[line | {"images_per_second": 0} for line in ddpm_ema.read_log(tmp_path / name)
             if line["step"] != 3] for name in ("whole", "parts")]  # 3: the end of the first part
    assert logs[0] == logs[1]
    rows = rows_of(tmp_path / "parts")
    assert rows_of(tmp_path / "whole") == [r for r in rows if r["step"] == "7"]


def test_interruption_saves_and_continues(bars, tmp_path):
    """Ctrl-C in the real process: it stops at once with a checkpoint; the next run finishes."""
    out = tmp_path / "run"
    command = [sys.executable, ddpm_ema.__file__, "--data", bars / "bars.npz", "--out", out, *TINY]
    process = subprocess.Popen([*command, "--steps", "100000"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on" in rest
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert step >= 4
    run(bars, out, "--steps", str(step + 2))
    log = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert log == sorted(set(log)) and log[-1] == step + 2


@pytest.mark.parametrize("images", [
    PIXELS[:, None], np.random.default_rng(0).normal(size=(40, 5, 8, 8))], ids=["wide", "latents"])
def test_data_without_labels(images, tmp_path):
    np.savez(tmp_path / "data.npz", images=images)
    with small(PICTURES[1:]):
        main(["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run"), *TINY,
              "--steps", "2", "--preset", "small"])
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 4 and all(math.isfinite(float(row["fd"])) for row in rows)
    assert "tail_share" not in rows[0]  # there are no known modes
    assert matplotlib.image.imread(tmp_path / "run" / "samples.png").std() > 0.01


def fails(capsys, *flags):
    """The one line with which the command refuses these flags."""
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.err.count("\n") == 1 and not output.out
    return output.err


def test_broken_files_in_a_run_are_named(bars, tmp_path, capsys):
    for name, what in (("checkpoint-2.pt", "a checkpoint"), ("classifier.pt", "the classifier")):
        out = tmp_path / name
        shutil.copytree(bars / "first", out)
        (out / name).write_bytes((out / name).read_bytes()[:-100])
        assert f"{name} is not {what}" in fails(capsys, "--out", str(out), "--decay", "0.97")


def test_broken_tables_and_logs(bars, tmp_path, capsys):
    for name in ("results.csv", "held_out.csv"):
        for content in (b"", b"\xff\xfe\x80\n", b"\0" * 200_000):
            out = tmp_path / f"{name}{len(content)}"
            shutil.copytree(bars / "first", out)
            (out / name).write_bytes(content)
            assert f"{name} is not a table" in fails(capsys, "--out", str(out))
    shutil.copytree(bars / "first", tmp_path / "log")
    log = tmp_path / "log" / "metrics.jsonl"
    whole = ddpm_ema.read_log(log.parent)
    log.write_bytes(log.read_bytes() + b"null\n{}\n\xff\x80")
    assert ddpm_ema.read_log(log.parent) == whole


def test_a_killed_run_goes_on_from_its_last_save(bars, tmp_path):
    """A kill leaves no time to save: what is on disk must do, also at a stage."""
    out, flags = tmp_path / "run", ["--steps", "4", "--save-every", "2", "--stages", "0.5"]
    for reached, lives in ((2, 3), (4, 2)):
        updates = iter([EMA.update] * lives + [mock.Mock(side_effect=SystemExit)])
        dying = mock.patch.object(EMA, "update", lambda ema, each=updates: next(each)(ema))
        with dying, pytest.raises(SystemExit) if reached < 4 else contextlib.nullcontext():
            run(bars, out, *flags)
        assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == reached
        assert torch.load(out / "checkpoint-2.pt", weights_only=True)["step"] == 2


def test_a_run_without_its_checkpoint_begins_anew(bars, tmp_path):
    out, updates = tmp_path / "run", iter([EMA.update, mock.Mock(side_effect=SystemExit)])
    dying = mock.patch.object(EMA, "update", lambda ema: next(updates)(ema))
    with dying, pytest.raises(SystemExit):
        run(bars, out, "--steps", "4", "--decay", "0.9")
    (out / "checkpoint.pt").unlink()
    run(bars, out, "--steps", "4", "--decay", "0.5")
    assert all("0.5" in line["held_out_loss"] for line in ddpm_ema.read_log(out))


def test_a_path_may_be_written_in_several_ways(bars, tmp_path, capsys):
    folder = bars / "first"
    (tmp_path / "elsewhere").symlink_to(folder)  # its parent is not tmp_path
    for spelling in (f"{bars}/./first/../bars.npz", f"{tmp_path}/elsewhere/../bars.npz"):
        run(bars, folder, "--data", spelling)
        assert "   step" in capsys.readouterr().out
    run(bars, tmp_path / "run", "--steps", "1", "--data", spelling)


class Colours(nn.Module):
    """Stands for Inception: TorchScript, uint8 in, with the flag that some of them have."""

    def forward(self, x, return_features: bool = False):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return x.float().mean((2, 3)) if return_features else x.float()[:, :, 0, 0]


def test_features_of_a_file_give_fid(bars, tmp_path):
    path = tmp_path / "colours.pt"
    torch.jit.script(Colours()).save(path)
    run(bars, tmp_path / "run", "--steps", "2", "--features", str(path))
    rows = rows_of(tmp_path / "run")
    assert "fid" in rows[0] and "fd" not in rows[0] and rows[0]["features"] == str(path)
    data, held_out = load_data(str(bars / "bars.npz")).split()
    means = [part.images[:n].float().mean((1, 2, 3)).double()[:, None].expand(-1, 3)
             for part, n in ((held_out, 32), (data, 160))]
    expected = frechet_distance(*moments(means[0]), *moments(means[1]))
    assert float(rows[0]["fid"]) == pytest.approx(expected, rel=1e-4)


class Endless(nn.Module):
    def forward(self, x):
        return x[:, :, 0, 0] / 0


class Exported(nn.Module):
    @torch.jit.export
    def features(self, x):
        return x


@pytest.mark.parametrize("network, makes", [
    (nn.Flatten(0), "[384]"), (nn.Linear(5, 5), "an error"), (nn.Identity(), "[2, 3, 8, 8]"),
    (Endless(), "NaN")])
def test_features_that_do_not_fit_are_refused_before_training(
        bars, tmp_path, capsys, network, makes):
    torch.jit.script(network).save(tmp_path / "network.pt")
    out, features = str(tmp_path / "run"), str(tmp_path / "network.pt")
    flags = ["--data", str(bars / "bars.npz"), "--features", features, "--out", out]
    assert f"makes {makes} of two images" in fails(capsys, *flags)
    assert not (tmp_path / "run").exists()


def test_features_need_a_forward(bars, tmp_path, capsys):
    torch.jit.script(Exported()).save(tmp_path / "network.pt")
    flags = ["--data", str(bars / "bars.npz"), "--features", str(tmp_path / "network.pt")]
    assert "with a forward()" in fails(capsys, *flags, "--out", str(tmp_path / "run"))


def test_a_diverged_run_says_so(bars, tmp_path):
    with pytest.raises(SystemExit, match="lower --lr"):
        run(bars, tmp_path / "run", "--steps", "20", "--lr", "1e30")


def test_the_end_is_saved_though_it_is_no_stage(bars, tmp_path):
    run(bars, tmp_path / "run", "--steps", "4", "--stages", "0.5")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4
    assert {row["step"] for row in rows_of(tmp_path / "run")} == {"2"}


def test_a_run_with_stages_trains_on(bars, tmp_path):
    """The stages are fractions: of more steps they lie where no checkpoint was kept."""
    out = tmp_path / "run"
    shutil.copytree(bars / "first", out)
    run(bars, out, "--steps", "7", "--log-every", "3")  # 0.5: step 4, at hand
    assert {row["step"] for row in rows_of(out)} == {"2", "4", "7"}
    run(bars, out, "--steps", "10", "--decay", "0.9")  # 0.5: step 5, long gone
    assert {row["step"] for row in rows_of(out)} == {"2", "4", "7", "10"}
    assert [line["step"] for line in ddpm_ema.read_log(out)] == [0, 2, 4, 6, 7, 8, 10]


@pytest.mark.parametrize("asked", ["3", "5"])
def test_a_signal_in_the_last_step_stops_before_the_evaluation(bars, tmp_path, monkeypatch, asked):
    """The last step, or one that becomes the last when fewer are asked for afterwards."""
    update = EMA.update

    def update_and_stop(ema):
        update(ema)
        if ema.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(EMA, "update", update_and_stop)
    with pytest.raises(SystemExit) as stop:
        run(bars, tmp_path / "run", "--steps", asked)
    assert stop.value.code == 130 and not (tmp_path / "run" / "results.csv").exists()
    run(bars, tmp_path / "run", "--steps", "3")
    assert {row["step"] for row in rows_of(tmp_path / "run")} == {"3"}
    assert ddpm_ema.load_methods([tmp_path / "run"])  # it is finished


def test_a_stage_of_which_only_real_is_known_is_left_out(bars, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(bars / "first", out)
    rows = rows_of(out)
    ddpm_ema.write_rows(out / "results.csv", [rows[0], *rows[6:]])  # stopped after step 2's real
    (out / "sweep.png").unlink()
    main(["--out", str(out), "--stages", "1"])
    assert (out / "sweep.png").exists()
    printed = capsys.readouterr().out.split("\n   step")[1]
    assert "\n      4  raw" in printed and "\n      2  " not in printed


def test_accumulation_gives_the_same_gradient(bars, tmp_path):
    run(bars, tmp_path / "one", "--steps", "1")
    run(bars, tmp_path / "four", "--steps", "1", "--accumulate", "4")
    one, four = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                 for name in ("one", "four"))
    for a, b in zip(one["optimizer"]["state"].values(), four["optimizer"]["state"].values()):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-3, atol=1e-7)
    assert four["ema"]["step"] == four["step"] == 1  # averaged once a step, not a micro-batch


@pytest.mark.parametrize("flags, message", [
    (["--decay", "1"], "0 <= decay < 1"), (["--decay", "-0.1"], "0 <= decay < 1"),
    (["--decay", "nan"], "0 <= decay < 1"), (["--decay", "often"], "0.288), sweep, auto"),
    (["--decay", "1.5"], "0 <= decay < 1"), (["--steps", "0"], "from 1"),
    (["--batch-size", "-3"], "from 1"), (["--lr", "nan"], "a number from 0"),
    (["--objective", "y"], "'eps', 'x0', 'v'"), (["--colour", "red"], "--colour"),
    (["--stages", "0.5,2"], "to 1"), (["--accumulate", "3"], "does not divide"),
    (["--device", "abacus"], "abacus"), (["--data", "nowhere"], "glyphs"),
    (["--data", "{empty}"], "neither"), (["--data", "{unequal}"], "one size"),
    (["--data", "{nan}"], "NaN"), (["--data", "{broken}"], "not an .npz"),
    (["--data", "{odd}"], "divisible by 4"), (["--out", "{broken}"], "is, or lies below, a file"),
    (["--out", "{wrong}"], "not a checkpoint"), (["--features", "{broken}"], "TorchScript"),
    (["--out", "{first}", "--lr", "0.5"], "--lr 0.5"),
    (["--out", "{first}", "--steps", "2"], "less than"),
    (["--out", "{first}", "--stages", "0.25"], "kept no checkpoint"),
    (["--out", "{first}", "--decay", "step"], "ladder's range"),
    (["--out", "{first}", "--data", "{other}"], "--data"), (["--data", ""], "glyphs"),
    (["--data", "{bare}"], "not an .npz"), (["--data", "{few}"], "20 is the least"),
    (["--device", "meta"], "cpu, cuda"), (["--steps", "1" + "0" * 40], "to 100000000\n"),
    (["--out", "{alien}"], "not a table"), (["--out", "{orphan}"], "without its checkpoint"),
    (["--out", "{stage}"], "without its checkpoint"),
    (["--out", "{alien2}"], "not a table"), (["--decay", "sweeping"], "'sweeping'"),
    (["--data", "{none}"], "[0, 1, 8, 8]"),
])
def test_bad_input_is_one_line(bars, tmp_path, capsys, flags, message):
    folders = ("empty", "unequal", "wrong", "alien", "alien2", "orphan", "stage")
    names = {n: tmp_path / n for n in (*folders, "run")}
    files = ("nan", "broken", "odd", "bare", "none", "few", "other")
    names |= {n: tmp_path / f"{n}.npz" for n in files}
    names["first"] = bars / "first"
    for name in folders:
        names[name].mkdir()
    (names["alien"] / "results.csv").write_text("a,b\n")
    (names["alien2"] / "held_out.csv").write_text("a,b\n")
    shutil.copy(bars / "first" / "results.csv", names["orphan"])
    shutil.copy(bars / "first" / "checkpoint-2.pt", names["stage"])
    np.save(names["few"].with_suffix(".npy"), np.zeros(3))
    names["few"].with_suffix(".npy").rename(names["bare"])
    np.savez(names["few"], images=np.zeros((12, 1, 8, 8), np.uint8))
    np.savez(names["none"], images=np.zeros((0, 1, 8, 8), np.uint8))
    np.savez(names["other"], images=np.zeros((30, 1, 8, 8), np.uint8))
    matplotlib.image.imsave(names["unequal"] / "a.png", np.zeros((4, 4)))
    matplotlib.image.imsave(names["unequal"] / "b.png", np.zeros((4, 8)))
    np.savez(names["nan"], images=np.full((20, 1, 8, 8), np.nan))
    np.savez(names["odd"], images=np.zeros((20, 9, 9, 1), np.uint8))
    names["broken"].write_bytes(b"PK not a zip")
    (names["wrong"] / "checkpoint.pt").write_bytes(b"hello")
    flags = [flag.format(**names) for flag in flags]
    if "--out" not in flags:
        flags += ["--out", str(names["run"])]
    if "--data" not in flags and str(bars / "first") not in flags:
        flags += ["--data", str(bars / "bars.npz")]
    assert message in fails(capsys, *flags)
    assert not names["run"].exists()  # nothing was begun


@pytest.mark.parametrize("script", [ddpm_ema, toy2d])
def test_inline_metadata_is_requirements_txt(script):
    path = Path(script.__file__)
    pins = re.search(r"^# dependencies = (.*)$", path.read_text(), re.MULTILINE)[1]
    required = path.with_name("requirements.txt").read_text().split("# tests")[0].split()
    assert json.loads(pins) == required


# ==================================================================================================
# The toy
# ==================================================================================================

TOY = str(Path(toy2d.__file__).resolve())
COLUMNS = "seed,step,weights,decay,debias,init_share,on_manifold,overlap,kl,mass_0,mass_1,mass_2,"
COLUMNS += "mass_3,mass_4,mass_5,mass_6"


def toy_points(num, seed=1):
    """Noisy samples [num, 2] and their σ [num], float64, with values that float32 has too."""
    x0, noise = (values[0].numpy() for values in toy2d.sample_tree([seed], 1, num))
    sigma = np.exp(1.5 * noise[:, 2] - 2.3)
    return (x0 + sigma[:, None] * noise[:, :2]).astype(np.float64), sigma.astype(np.float64)


def numpy_mixture(x, sigma):
    """Log-density, score, nearest branch and distance by full matrices, one loop over points."""
    tree, _, _ = toy2d.make_tree()
    mean_x, mean_y, axis_x, axis_y, var_u, var_v, weight = tree.reshape(7, -1)[:, :1016]
    turn = np.array([[axis_x, -axis_y], [axis_y, axis_x]]).transpose(2, 0, 1)  # [K, 2, 2]
    spread = np.stack([var_u, var_v], -1)[:, :, None] * np.eye(2)
    covariance = turn @ spread @ turn.transpose(0, 2, 1)
    results = []
    for point, noise in zip(x, sigma):
        noisy = covariance + noise**2 * np.eye(2)
        offset = point - np.stack([mean_x, mean_y], -1)
        pull = np.linalg.solve(noisy, offset[:, :, None])[:, :, 0]
        square = (offset * pull).sum(1)
        logs = np.log(weight) - square / 2 - np.log(2 * math.pi * np.sqrt(np.linalg.det(noisy)))
        share = np.exp(logs - logs.max())
        score = -(share[:, None] * pull).sum(0) / share.sum()
        log_density = logs.max() + math.log(share.sum())
        results.append((log_density, score, square.argmin() // 8, math.sqrt(square.min())))
    return [np.array(column) for column in zip(*results)]


def evaluate(x, sigma, dtype=np.float64):
    return toy2d.evaluate(*toy2d.make_tree(dtype)[:2], x.astype(dtype), sigma.astype(dtype))


def test_the_tree_is_the_published_one():
    tree, _, generation = toy2d.make_tree()
    weight = tree[6].ravel()
    assert np.bincount(generation).tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert (weight > 0).sum() == 1016 and weight.sum() == pytest.approx(1, abs=1e-12)
    # A twig is 0.8 as long and 0.5 as heavy as its parent, up to random lengths, and there are two.
    mass = np.bincount(generation, weight[:1016].reshape(127, 8).sum(1))
    assert 0.5 * 0.8**6 < mass[6] / mass[0] < 2 * 0.8**6


def test_mixture_equals_numpy_in_float64():
    x, sigma = toy_points(120)
    sigma[:40] = 0
    x[:40] = toy2d.sample_tree([5], 1, 40)[0][0]
    for ours, twin in zip(evaluate(x, sigma), numpy_mixture(x, sigma)):
        scale = 1 + np.abs(twin).max(axis=-1) if twin.ndim == 2 else 1 + np.abs(twin)
        assert (np.abs(ours - twin).T / scale).max() < 1e-10


def test_score_is_the_gradient_of_the_log_density():
    x, sigma = toy_points(200)
    sigma, step = np.maximum(sigma, 0.05), 1e-4
    score = evaluate(x, sigma)[1]
    for axis in range(2):
        near = [evaluate(x + k * step * np.eye(2)[axis], sigma)[0] for k in (-2, -1, 1, 2)]
        difference = (near[0] - 8 * near[1] + 8 * near[2] - near[3]) / (12 * step)
        assert np.abs(difference - score[:, axis]).max() < 1e-6 * (1 + np.abs(score).max())


def test_density_integrates_to_one():
    axis = np.linspace(-2.5, 3.5, 401)
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    log_density = evaluate(points, np.full(len(points), 0.2))[0]
    assert np.exp(log_density).sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-6)


def test_float32_is_good_to_1e_5():
    x, sigma = toy_points(2000)
    clean = toy2d.sample_tree([5], 1, 500)[0][0].double().numpy()
    x, sigma = np.concatenate([x, clean]), np.concatenate([sigma, np.zeros(500)])
    single, double = evaluate(x, sigma, np.float32), evaluate(x, sigma)
    assert (np.abs(single[0] - double[0]) / (1 + np.abs(double[0]))).max() < 1e-5
    # Relative to the score's size, or to 1/σ of the thinnest Gaussian where the score vanishes.
    thinnest = np.sqrt(toy2d.make_tree()[0][4:6].min() + sigma**2)
    size = np.linalg.norm(double[1], axis=1) + 1 / thinnest
    assert (np.linalg.norm(single[1] - double[1], axis=1) / size).max() < 1e-5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_finite_a_million_standard_deviations_away(dtype):
    x = np.array([[2e4, -3e4], [-3e4, 0], [1e5, 1e5]])
    log_density, score, _, distance = evaluate(x, np.zeros(3), dtype)
    assert distance.min() > 1e6 and np.isfinite(log_density).all() and np.isfinite(score).all()
    twin = numpy_mixture(x, np.zeros(3))
    assert np.allclose(log_density, twin[0], rtol=1e-5) and np.allclose(score, twin[1], rtol=1e-4)


def test_the_same_bits_for_any_thread_count():
    x, sigma = toy_points(1001)
    threads, found = numba.get_num_threads(), []
    try:
        for num in sorted({1, threads}):
            numba.set_num_threads(num)
            drawn = [values.numpy() for values in toy2d.sample_tree([3, 4], 7, 777)]
            found.append([*drawn, *evaluate(x, sigma, np.float32), *evaluate(x, sigma)])
    finally:
        numba.set_num_threads(threads)
    for one, other in zip(found[0], found[-1]):
        assert np.array_equal(one, other)


def test_samples_follow_the_mixture():
    x0, noise = toy2d.sample_tree([0], 1, 2**17)
    tree, _, _ = toy2d.make_tree()
    weight = tree[6].ravel()
    mean = tree[:2].reshape(2, -1) @ weight
    assert np.allclose(x0[0].mean(0), mean, atol=5 * 0.35 / 2**8.5)
    covariance = torch.cov(noise[0].T)
    assert noise.mean().abs() < 0.01 and torch.allclose(covariance, torch.eye(3), atol=0.02)
    # Score matching: noise added is what the exact denoiser takes away, on average: E[D - x0] = 0.
    x = x0 + 0.1 * noise[..., :2]
    excess = toy2d.exact_denoiser(x, 0.1) - x0
    assert excess.mean().abs() < 2e-3 and (excess * x).mean().abs() < 2e-3
    # A Mahalanobis square in two dimensions: P(nearest > 4) <= exp(-8) for each Gaussian.
    assert toy2d.coverage(x0[0])[0] == pytest.approx(1, abs=5e-4)


def test_streams_are_a_function_of_seed_and_step():
    together, alone = toy2d.sample_tree([1, 3], 5, 64), toy2d.sample_tree([3], 5, 64)
    assert all(torch.equal(a[1], b[0]) for a, b in zip(together, alone))
    assert torch.equal(toy2d.sample_tree([3], 5, 32)[0][0], alone[0][0, :32])
    others = toy2d.sample_tree([3], 6, 64), toy2d.sample_tree([4], 5, 64)
    assert all((other[1] != alone[1]).all() for other in others)


def test_coverage_counts_what_was_removed():
    x, generation = toy2d.sample_tree([9], 1, 2**16)[0][0], toy2d.make_tree()[2]
    full = toy2d.coverage(x)
    assert np.allclose(full[3:], 1, atol=0.05) and full[1] > 0.97 and full[2] < 0.01
    branch = toy2d.assign(x)
    x = x.clone()
    x[np.append(generation, 0)[branch] == 6] = torch.tensor([-0.6, 1.4])  # off the manifold
    starved = toy2d.coverage(x)
    assert starved[9] == 0 and np.allclose(starved[3:9], full[3:9])
    lost = np.bincount(generation, toy2d.true_mass())[6]
    assert starved[0] == pytest.approx(full[0] - lost, abs=0.01)
    assert starved[1] < full[1] - 0.9 * lost and starved[2] > 10 * full[2]


def test_heun_with_the_exact_denoiser_samples_the_tree():
    starts = 5 * toy2d.sample_tree([2], 2, 4096)[1][0, :, :2]
    values = toy2d.coverage(toy2d.heun(toy2d.exact_denoiser, starts)[-1])
    assert values[0] > 0.97 and np.allclose(values[3:], 1, atol=0.2)


def test_a_seed_trains_alone_as_with_others():
    losses = {}
    for seeds in ([3], [1, 3]):
        model = toy2d.Denoiser(seeds, 2, 16)
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
        for step in range(1, 21):
            toy2d.train_step(model, optimizer, seeds, step, 128)
        losses[len(seeds)] = [parameter[-1].detach() for parameter in model.parameters()]
    for alone, together in zip(losses[1], losses[2]):
        assert torch.allclose(alone, together, rtol=1e-3, atol=1e-4)


def run_toy(*arguments, folder):
    """The real command, at a tiny size; the result of subprocess.run."""
    small = ["--steps", "8", "--batch-size", "64", "--depth", "1", "--hidden", "8", "--seeds", "2"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, TOY, *small, *arguments]
    how = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(command, check=False, **how)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_command_writes_the_table_and_the_pictures(tmp_path, device):
    done = run_toy("--decay", "0.9,halflife:4", "--target", "exact", "--device", device,
                   folder=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "toy2d"
    names = ["results.csv", "stages.png", "toy2d.png", "zoom.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in names[1:])
    text = (out / "results.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert text.splitlines()[0] == COLUMNS
    assert len(rows) == 4 * 2 * (2 + 2 * 2)  # stages, seeds, truth and raw and decays twice
    assert {row["step"] for row in rows} == {"1", "2", "4", "8"}
    shares = {float(row["init_share"]) for row in rows if row["decay"] == "0.9"}
    assert sorted(shares) == pytest.approx([0.9**8, 0.9**4, 0.9**2, 0.9])
    truth = [row for row in rows if row["weights"] == "true"]
    assert all(float(row["on_manifold"]) > 0.995 and row["decay"] == "" for row in truth)
    assert "\r" not in done.stdout and "share of the initial weights" in done.stdout


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--decay", "1.5"], "1.5"),
        (["--steps", "4"], "--steps"),
        (["--seeds", "0"], "--seeds"),
        (["--batch-size", "many"], "--batch-size"),
        (["--target", "clean"], "--target"),
        (["--device", "abacus"], "abacus"),
        (["--out", "file"], "file"),
    ],
)
def test_bad_values_get_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as exit:
        toy2d.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and named in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    def broken(draft):
        draft.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "results.csv").write_text("whole")
    with pytest.raises(KeyboardInterrupt):
        toy2d.replace_file(tmp_path / "results.csv", broken)
    assert (tmp_path / "results.csv").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


# ==================================================================================================
# README
# ==================================================================================================

README = Path(ddpm_ema.__file__).with_name("README.md").read_text()


def test_readme_code_runs():
    """Every Python block of README, one after another, with the names that they start from."""
    names = {"torch": torch, "EMA": EMA, "Diffusion": Diffusion, "x0": torch.randn(4, 1, 16, 16),
             "network": UNet(width=8), "evaluate": lambda model: None}
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    for block in blocks:
        exec(block, names)  # noqa: S102
    assert names["x_t"].shape == (16, 1, 16, 16)
    assert names["ema"].step == 2000  # 1,000 steps of the loop, 1,000 accumulated ones


def test_readme_commands_are_those_of_ci():
    assert "-m pytest -q" in README and "python -m pytest -q" in Path(ddpm_ema.__file__).with_name(
        ".ci").joinpath("run").read_text()


# ==================================================================================================
# Benchmarks: python test_ddpm_ema.py
# ==================================================================================================

def default_training_step():
    """One training step of `python ddpm_ema.py`, without the EMA, to be called again and again."""
    model, diffusion = UNet(), Diffusion()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    x0, t = torch.randn(32, 1, 16, 16), torch.randint(1000, (32,))
    x0 = x0.contiguous(memory_format=torch.channels_last)

    def step():
        diffusion.loss(model, x0, t, torch.randn_like(x0)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def seconds_per_call(calls, rounds=8, repeats=32):
    """The least mean time of each of these calls, taken in turns so that all see the same noise."""
    best = {}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            mean = (time.perf_counter() - start) / repeats
            best[name] = min(mean, best.get(name, math.inf))
    return best


def ways_to_average(decays, total, tensors):
    """Name -> call that takes in one step of a model with `total` parameters in `tensors`."""
    model = nn.ParameterList(torch.randn(total // tensors) for _ in range(tensors))
    live, rates = torch.randn(total), 1 - torch.tensor(decays)[:, None]
    flat, copied = torch.zeros(2, len(decays), total)

    def averaged(name, average):
        models = [AveragedModel(model, **{name: average(decay)}) for decay in decays]
        return lambda: [each.update_parameters(model) for each in models]

    calls = {
        "bank of ten decays": EMA(model, decays, ladder=None).update,
        "bank of ten decays and the ladder": EMA(model, decays).update,
        "the same with block=32": EMA(model, decays, block=32).update,
        "ten AveragedModels, multi_avg_fn": averaged("multi_avg_fn", get_ema_multi_avg_fn),
        "ten AveragedModels, avg_fn": averaged("avg_fn", get_ema_avg_fn),
        "flat lerp_ of [10, P]": lambda: flat.lerp_(live, rates),
        "copying [10, P] once": lambda: copied.copy_(flat),
    }
    with contextlib.suppress(ImportError):
        from ema_pytorch import EMA as Peer

        peers = [Peer(model, beta=d, update_every=1, update_after_step=0) for d in decays]
        calls["ten ema-pytorch EMAs"] = lambda: [peer.update() for peer in peers]
    with contextlib.suppress(ImportError):
        from diffusers.training_utils import EMAModel

        models = [EMAModel(model.parameters(), decay=decay) for decay in decays]
        calls["ten diffusers EMAModels"] = lambda: [m.step(model.parameters()) for m in models]
    return calls


def bench_ema():
    """Prints what a step of ten decays costs, as ratios."""
    decays = [1 - 10 ** -(1 + i / 3) for i in range(10)]
    for total, tensors in ((1_500_000, 240), (9_400_000, 32)):
        times = seconds_per_call(ways_to_average(decays, total, tensors))
        print(f"\n{total / 1e6:.1f} M parameters in {tensors} tensors, "
              f"{torch.get_num_threads()} threads\n")
        print(f"| {'':34} | ms a step | / bank | / bank and ladder |\n| --- | --- | --- | --- |")
        ten, ladder = list(times.values())[:2]
        for name, spent in times.items():
            ratios = f"{spent / ten:6.2f} | {spent / ladder:17.2f}"
            print(f"| {name:34} | {spent * 1e3:9.2f} | {ratios} |")
    model, step = default_training_step()
    times = seconds_per_call({"step": step, "bank": EMA(model, decays).update})
    print(f"\nof a default training step, {times['step'] * 1e3:.0f} ms, the bank of ten decays and "
          f"the ladder takes {times['bank'] / times['step']:.1%}\n")


def compare_posthoc(steps=8000, seeds=3):
    """Prints errors of read-out decays beside EDM2's post-hoc averages (arXiv:2312.02696, 3.2).

    EDM2: power-function averages of sigma_rel 0.05 and 0.10, snapshots evenly spaced up to the
    step of reading, their mixture with the profile closest to that of the decay in least squares.
    Its averages are in float64 and know the initial weights' share; both store 34 copies.
    """
    wanted, times, stored = (0.9, 0.99, 0.999, 0.9993, 0.9999), (steps // 16, steps), 17
    widths = ("power:0.05", "power:0.10")
    errors = {}
    for seed in range(seeds):
        model = mlp(seed)
        ema, oracle = EMA(model, decays=()), Oracle(model, (*wanted, *widths))
        snapshots = {end: [] for end in times}
        for step, _ in enumerate(training(model, steps, seed), 1):
            ema.update()
            oracle.update()
            for end in times:
                if step in [end * (i + 1) // stored for i in range(stored)]:
                    snapshots[end] += [(step, w, oracle.mean[w].clone()) for w in widths]
            if step not in times:
                continue
            profiles = torch.zeros(2 * stored, step + 1, dtype=torch.float64)  # of θ_0 … θ_t
            for profile, (taken, width, _) in zip(profiles, snapshots[step]):
                profile[: taken + 1] = profile_of(betas(width, taken))
            means = torch.stack([mean for _, _, mean in snapshots[step]]) - oracle.first
            for decay in wanted:
                target = profile_of(betas(decay, step))
                mix = torch.linalg.lstsq(profiles[:, 1:].T, target[1:], driver="gelsd").solution
                exact = oracle.mean[decay] - oracle.first
                theirs = ((mix @ means - exact).norm() / exact.norm()).item()
                errors.setdefault((step, decay), []).append((theirs, oracle.error(ema, decay)[1]))
    print("| step | decay | EDM2 post-hoc, 34 copies | ladder, 34 copies |")
    print("| --- | --- | --- | --- |")
    for (step, decay), pairs in errors.items():
        theirs, ours = (max(values) for values in zip(*pairs))
        print(f"| {step} | {decay} | {theirs:.1e} | {ours:.1e} |")


def profile_of(decays):
    """The weights of θ_0 … θ_t in the average with these β_1 … β_t."""
    kept = torch.cat([decays, decays.new_ones(1)]).flip(0).cumprod(0).flip(0)  # [t + 1]
    return torch.cat([decays.new_ones(1), 1 - decays]) * kept


def bench_toy():
    """Prints what Numba is worth in toy2d.py, as ratios to torch in the same run."""
    def seconds(repeats, function, *arguments):
        function(*arguments)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function(*arguments)
            times.append(time.perf_counter() - start)
        return min(times)

    def constants(dtype):
        rows = toy2d.make_tree()[0].reshape(7, -1)[:, :1016]
        mean_x, mean_y, axis_x, axis_y, *_ = rows
        turn = np.array([[axis_x, -axis_y], [axis_y, axis_x]]).transpose(2, 0, 1)
        arrays = np.stack([mean_x, mean_y], -1), turn, rows[4:6].T, rows[6]
        return [torch.tensor(values, dtype=dtype) for values in arrays]

    def torch_score(x, sigma, mean, turn, var, weight):
        """The same sum by einsum, for x [N, 2] and σ [N, 1]."""
        var = var + sigma[:, :, None] ** 2  # [N, K, 2]
        offset = x[:, None] - mean  # [N, K, 2]
        local = torch.einsum("kij,nki->nkj", turn, offset)
        energy = torch.einsum("nkj,nkj->nk", local, local / var) / 2
        share = torch.softmax(weight.log() - var.log().sum(-1) / 2 - energy, dim=1)
        return -torch.einsum("nk,kij,nkj->ni", share, turn, local / var)

    limits = {}  # GFLOP/s of a large product: the floating-point limit in practice
    for dtype in (torch.float32, torch.float64):
        square = torch.randn(1536, 1536, dtype=dtype)
        limits[dtype] = 2 * 1536**3 / seconds(5, torch.mm, square, square) / 1e9

    x0, noise = (values[0] for values in toy2d.sample_tree([0], 1, 4096))
    training = torch.exp(1.5 * noise[:, 2:] - 2.3)
    for dtype, kind in ((torch.float32, np.float32), (torch.float64, np.float64)):
        held = constants(dtype)
        for label, sigma in (("σ 0.1", torch.full_like(training, 0.1)), ("training σ", training)):
            x, sigma = (x0 + sigma * noise[:, :2]).to(dtype), sigma.to(dtype)
            tree, margin, _ = toy2d.make_tree(kind)
            points, levels = x.numpy(), sigma.flatten().numpy()
            slow = seconds(3, torch_score, x, sigma, *held)
            fast = seconds(20, toy2d.evaluate, tree, margin, points, levels)
            error = torch.from_numpy(toy2d.evaluate(tree, margin, points, levels)[1])
            error = (error - torch_score(x, sigma, *held)).norm() / error.norm()
            # 20 operations make a distance; the sums over what is near come on top, uncounted.
            rate = 4096 * 1016 * 20 / fast / 1e9
            print(
                f"exact score, 4096 points x 1016 Gaussians, {label}, {str(dtype)[6:]}:"
                f" torch einsum {slow * 1e3:.0f} ms, Numba {fast * 1e3:.2f} ms:"
                f" {slow / fast:.0f} times, {4096 / fast / 1e6:.2f} M points/s,"
                f" {100 * rate / limits[dtype]:.0f}% of"
                f" {limits[dtype]:.0f} GFLOP/s (a large product); difference {error:.0e}"
            )

    held = constants(torch.float32)

    def torch_denoiser(x, sigma):
        flat = sigma.reshape(-1, 1)
        parts = [
            torch_score(points, level, *held)
            for points, level in zip(x.reshape(-1, 2).split(4096), flat.split(4096))
        ]
        return x + sigma**2 * torch.cat(parts).view_as(x)

    model = toy2d.Denoiser(range(3), 4, 64)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)

    def step(denoise):
        return seconds(3, toy2d.train_step, model, optimizer, range(3), 1, 4096, denoise)

    noisy, exact, einsum = step(None), step(toy2d.exact_denoiser), step(torch_denoiser)
    print(
        f"training step, 3 seeds x 4096: on samples {noisy * 1e3:.0f} ms; on the exact denoiser"
        f" {exact * 1e3:.0f} ms with Numba, {einsum * 1e3:.0f} ms with torch einsum:"
        f" {einsum / exact:.1f} times; 4096 such steps {4096 * exact / 60:.1f} against"
        f" {4096 * einsum / 60:.0f} minutes (each from 3 steps)"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    bench_ema()
    bench_toy()
    compare_posthoc()
