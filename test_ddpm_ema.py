# SPDX-License-Identifier: MIT
"""Tests of ddpm_ema.py and toy2d.py: `python -m pytest`. As a script it prints the benchmarks."""

import contextlib
import copy
import csv
import datetime
import functools
import gc
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import timeit
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib.image
import numba
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddpm_ema
import toy2d
from ddpm_ema import (
    DOWNLOADS,
    EMA,
    LADDER,
    PRESETS,
    Diffusion,
    EMABank,
    UNet,
    cell,
    frechet_distance,
    load_data,
    main,
    manifold_share,
    measure,
    moments,
    parse_decay,
    print_table,
    read_rows,
)

# ==================================================================================================
# EMA
# ==================================================================================================

both = pytest.mark.parametrize("Average", [EMA, EMABank])
MIXED = (0.5, 0.9, 0.999, 0.999999, "step", "ramp:0.9999", "halflife:50", "power:0.10")


def betas(decay, steps):
    """β_1 … β_steps, written down independently of ddpm_ema."""
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    if decay == "step":
        return t / (t + 1)
    kind, _, number = str(decay).rpartition(":")
    value = float(number)
    if kind == "ramp":
        return ((1 + t) / (10 + t)).clamp(max=value)
    if kind == "power":  # σ² (γ+2)² (γ+3) = γ+1 is a cubic: its largest root
        s = value**-2
        return (1 - 1 / t) ** (max(np.roots([1, 7, 16 - s, 12 - s]).real) + 1)
    return torch.full_like(t, 0.5 ** (1 / value) if kind == "halflife" else value)


def flatten(values):
    return torch.cat([value.detach().cpu().double().reshape(-1) for value in values])


class Oracle:
    """The plain recursion in float64, of all parameters; built before the model is wrapped."""

    def __init__(self, model, decays=MIXED, steps=1600):
        self.parameters = dict(model.named_parameters(remove_duplicate=False))  # tied: both names
        self.first, self.t = flatten(self.parameters.values()), 0
        self.betas = {decay: betas(decay, steps) for decay in decays}
        self.moved = {decay: torch.zeros_like(self.first) for decay in decays}

    def update(self):
        now, self.t = flatten(self.parameters.values()) - self.first, self.t + 1
        for decay, moved in self.moved.items():
            moved += (1 - self.betas[decay][self.t - 1].item()) * (now - moved)

    def error(self, ema, decay, debias=False):
        """Of what is read: beyond its cast to float32, and that relative to how far it moved."""
        share = self.betas[decay][: self.t].prod().item()
        assert ema.init_share(decay) == pytest.approx(share, rel=1e-9)
        moved = self.moved[decay] / (1 - share if debias and self.t else 1)
        weights, exact = ema.weights(decay, debias), self.first + moved
        error = (flatten(weights[name] for name in self.parameters) - exact).norm()
        error = (error - 2**-24 * exact.norm()).clamp(min=0).item()
        return error, error / max(moved.norm().item(), 1e-30)

    def check(self, ema):
        for decay in self.moved:
            assert max(self.error(ema, decay, debias)[1] for debias in (False, True)) < 5e-6, decay


def mlp(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2)
    return nn.Sequential(*layers)


def training(model, steps, seed=0, shape=(2,)):
    """A diffusion run on smooth random data; yields after every optimizer step."""
    draw, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(model.parameters())
    data, diffusion = torch.randn(64, *shape, generator=draw).cumsum(-1), Diffusion()
    for _ in range(steps):
        x0 = data[torch.randint(64, (16,), generator=draw)]
        t, noise = torch.randint(1000, (16,), generator=draw), torch.randn(x0.shape, generator=draw)
        network = model if isinstance(model, UNet) else lambda x, t: model(x)
        diffusion.loss(network, x0, t, noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


@torch.no_grad()
def wander(model, kind, steps, seed=0):
    """A random trajectory of all that requires a gradient; yields after every step."""
    draw = torch.Generator().manual_seed(seed)
    first = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    speed = {p: torch.zeros_like(p) for p in first}
    for step in range(1, steps + 1):
        for p, start in first.items():
            noise = torch.empty_like(p, device="cpu").normal_(generator=draw).to(p.device)
            if kind == "noise":
                p.copy_(start + noise)
            elif kind == "drift":  # it dies down, as early in training
                p += noise.abs() / (step + 10)
            else:
                p += speed[p].mul_(0.9 * (kind == "momentum")).add_(noise, alpha=0.01)
        yield


def saved(state):
    """A state as it comes back from a file."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


class Net(nn.Module):
    """A bit of everything: tied, scalar and frozen parameters, buffers, four dimensions."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 4), nn.BatchNorm1d(4)
        self.conv = nn.Conv2d(2, 3, 3)
        self.base = nn.Parameter(torch.arange(40, dtype=torch.uint8), requires_grad=False)
        self.out, self.scale = nn.Linear(4, 11, bias=False), nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.out.weight = self.embed.weight if tied else self.out.weight

    def forward(self, x):
        self.calls += 1
        return self.scale * self.out(self.norm(self.embed(x)))


def test_float64_oracle_over_100000_steps(steps=100_000):
    few = [0.999999, "power:0.10"]  # an EMA takes its time
    decays = [*few, 0.5, 0.9, 0.999, 0.9999, "step", "ramp:0.9999", "halflife:2000"]
    draw = torch.Generator().manual_seed(0)
    start, slope = torch.randn(2, 24, generator=draw)
    model = nn.ParameterList([torch.stack([start, 0 * start])])  # a drift, and noise about 0
    emas = {EMA(model, few): few, EMABank(model, decays, ladder=None): decays}
    rates = 1 - torch.stack([betas(decay, steps) for decay in decays], dim=1)[..., None, None]
    first = model[0].detach().double().repeat(len(decays), 1, 1)
    exact, now = first.clone(), torch.empty_like(first[0])
    for step in range(steps):
        torch.add(start, slope, alpha=(step + 1) / steps, out=model[0].data[0])
        model[0].data[1].normal_(generator=draw)
        for ema in emas:
            ema.update()
        exact.lerp_(now.copy_(model[0].data).expand_as(exact), rates[step])
    for ema, tracked in emas.items():
        for decay in tracked:
            e, moved = (values[decays.index(decay)] for values in (exact, exact - first))
            error = (ema.weights(decay)["0"] - e).norm(dim=1) / moved.norm(dim=1)
            assert error.max() < 5e-6, (ema, decay, error)


@pytest.mark.parametrize("case", range(30))
def test_thirty_random_cases(case):
    """Whatever comes together, also on a GPU if there is one: the plain recursion, to rounding."""
    torch.manual_seed(case)
    choice = random.Random(case).choice
    device = choice(["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    model = Net(tied=choice([0, 1])).to(device, choice([torch.float32, torch.bfloat16]))
    for p in (model.norm.weight, model.conv.weight, model.embed.weight):
        p.requires_grad_(choice([True, True, False]))
    decays = [choice(MIXED), choice(MIXED), choice(MIXED)]
    oracle, settings = Oracle(model, decays), {"device": choice([None, "cpu"])}
    if choice([0, 1]):
        model.conv = torch.compile(model.conv, backend="eager")
    wrapped = torch.compile(model, backend="eager") if choice([0, 1]) else model
    wrapped = nn.DataParallel(wrapped) if choice([0, 1]) else wrapped
    Average = choice([EMA, EMABank])
    if Average is EMABank:
        settings |= {"block": choice([1, 2, 5, 16, 40]), "ladder": choice([None, LADDER])}
    ema = Average(wrapped, decays, **settings)
    oracle.check(ema)
    kind, steps = choice(["noise", "walk", "momentum", "drift"]), choice([3, 90, 600])
    for _ in wander(model, kind, steps, seed=case):
        ema.update()
        oracle.update()
        if choice(range(40)) == 0:
            oracle.check(ema)
            state, ema = saved(ema.state_dict()), Average(wrapped, decays, **settings)
            ema.load_state_dict(state)
            model.to(memory_format=choice([torch.channels_last, torch.contiguous_format]))
        if choice(range(40)) == 0:
            decay, debias, before = choice(decays), choice([False, True]), copy.deepcopy(model)
            weights = ema.weights(decay, debias)
            with contextlib.suppress(ZeroDivisionError), ema.applied(decay, debias) as swapped:
                assert swapped is wrapped
                assert all(torch.equal(weights[name].to(p), p)
                           for name, p in oracle.parameters.items())
                1 / choice([0, 1])
            assert_same(model.state_dict(), before.state_dict())
    oracle.check(ema)
    weights = ema.weights(decays[-1])
    assert all(weights[name].dtype == (torch.float32 if p.requires_grad else p.dtype)
               and weights[name].device == p.device for name, p in oracle.parameters.items())
    Net().load_state_dict(weights)


@both
@pytest.mark.parametrize("how", ["read", "resumed", "default dtype", "default device"])
def test_a_run_equals_an_undisturbed_one_bit_for_bit(Average, how):
    model, decays = mlp(), (*MIXED, *[0.9993] * (Average is EMABank))
    plain, other, fixed = Average(model, MIXED), Average(model, MIXED), model[2].weight.clone()
    around = torch.device("meta") if how == "default device" else contextlib.nullcontext()
    for step, _ in enumerate(wander(model, "walk", 280), 1):
        model[2].weight.data.copy_(fixed)
        plain.update()
        with around:
            torch.set_default_dtype(torch.float64 if how == "default dtype" else torch.float32)
            other.update()
            torch.set_default_dtype(torch.float32)
        if how == "resumed" and step in (7, 16, 23, 150, 256, 263):
            state, other = saved(other.state_dict()), Average(model, MIXED)
            other.load_state_dict(state)
        elif how == "read" and step % 9 < 2:
            for decay in decays:
                other.weights(decay)["0.bias"].add_(1)  # they belong to the reader
            with other.applied("step", debias=True):
                other.state_dict()["table"].add_(1)
            if Average is EMABank:
                other.error_bound(0.9993)
    for decay, debias in [(decay, debias) for decay in decays for debias in (False, True)]:
        weights = plain.weights(decay, debias)
        with around:
            assert_same(other.weights(decay, debias), weights)
        assert torch.equal(weights["2.weight"], fixed), "what never changes stays as it is"
    if Average is EMABank:
        assert other.error_bound(0.9993) == plain.error_bound(0.9993)


@pytest.mark.parametrize("kind", ["noise", "walk", "momentum", "drift", "mlp", "unet"])
def test_untracked_decays_and_their_error_bound(kind):
    """From several ladders and blocks, early and late."""
    decays, marks = (0.903, 0.92, 0.97, 0.9944, 0.9993, 0.9999, "power:0.05", "ramp:0.9999"), (
        1, 2, 16, 17, 40, 64, 100, 161, 600)
    model = nn.ParameterList([torch.zeros(40)])
    run = wander(model, kind, 600)
    if kind == "mlp":
        run = training(model := mlp(), 600)
    elif kind == "unet":
        model, marks = UNet(width=8, multipliers=(1, 2), attention=(1,)), (40, 100)
        run = training(model, 100, shape=(1, 8, 8))
    oracle, coarse = Oracle(model, decays), (0.1, 0.5, 0.9, 0.99, 0.99995)
    banks = EMABank(model, ()), EMABank(model, (), block=3), EMABank(model, (), coarse, 64)
    for step, _ in enumerate(run, 1):
        oracle.update()
        for bank in banks:
            bank.update()
            for decay in decays if step in marks else ():
                if 0.9 <= oracle.betas[decay][step - 1] <= 0.99995:
                    error, relative = oracle.error(bank, decay)
                    assert error <= bank.error_bound(decay), (step, decay, bank.block)
                    if kind in ("mlp", "unet") and bank is not banks[2]:
                        assert relative < 1e-4, (step, decay)
    assert banks[0].error_bound(LADDER[3]) == 0 < banks[0].error_bound(0.9993) < 0.1


def test_ladder_is_nearer_than_edm2_post_hoc(steps=1600, stored=17):
    """At decays that are no rung, early and late (arXiv:2312.02696, 3.2), both with 34 copies.

    EDM2: power functions of sigma_rel 0.05 and 0.10, snapshots evenly spaced up to the step of
    reading, mixed by least squares of their profiles; here all in float64.
    """
    def profile(decays):  # the weights of θ_1 … θ_steps in the average
        kept = torch.cat([decays.flip(0).cumprod(0).flip(0)[1:], decays.new_ones(1)])
        return nn.functional.pad((1 - decays) * kept, (0, steps - len(decays)))

    widths, wanted, model = ("power:0.05", "power:0.10"), (0.95, 0.99, 0.999, 0.9993, 0.9999), mlp()
    oracle, bank, taken = Oracle(model, (*wanted, *widths)), EMABank(model, ()), {}
    for step, _ in enumerate(training(model, steps), 1):
        bank.update()
        oracle.update()
        taken |= {(step, width): oracle.moved[width].clone() for width in widths}
        if step in (steps // 8, steps):
            keys = [(step * (i + 1) // stored, width) for i in range(stored) for width in widths]
            profiles = torch.stack([profile(betas(width, at)) for at, width in keys], dim=1)
            for decay in wanted:
                target, exact = profile(betas(decay, step))[:, None], oracle.moved[decay]
                mix = torch.linalg.lstsq(profiles, target, driver="gelsd").solution
                theirs = mix[:, 0] @ torch.stack([taken[key] for key in keys]) - exact
                assert oracle.error(bank, decay)[1] < theirs.norm() / exact.norm(), (step, decay)


def test_decays_are_understood_in_one_place():
    assert parse_decay(0.9990) == parse_decay(" .999 ") == "0.999" and parse_decay(0) == "0"
    for decay in ("power:1e-6", "halflife:1e12", "ramp:0", 0):
        EMA(nn.Linear(1, 1), decay).update()
    for decay in (1, 1.5, -0.1, math.nan, "x", "", None, True, [0.9], ":0.9", "ramp:1", "ramp",
                  "halflife:0", "halflife:inf", "halflife:1e308", "power:0.3", "power:0",
                  "power:1e-300", "cosine:3", "step:1"):
        with pytest.raises(ValueError, match="0.999.*step.*ramp:0.9999.*halflife:2000.*power:0.10"):
            EMA(nn.Linear(1, 1), [decay])
    for bad in ({"decays": (), "ladder": None}, {"block": 0}, {"ladder": ["step"]}):
        with pytest.raises(ValueError):
            EMABank(nn.Linear(1, 1), **bad)
    for ema, ladder in ((EMA(mlp(), [0.99, "step"]), ""), (EMABank(mlp()), ", 0.9 to 0.99995")):
        for read in (ema.weights, lambda decay, ema=ema: ema.applied(decay).__enter__()):
            with pytest.raises(ValueError, match=f"0.89.* not there; .* 0.99(, step|9){ladder}$"):
                read(0.89)


def test_memory_is_what_the_docstrings_say():
    def copies(build):
        """Float32 numbers that live because of it after some updates, for each averaged one."""
        def storages():
            gc.collect()
            tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
            held = [t.untyped_storage() for t in tensors if t.dtype == torch.float32]
            return {storage.data_ptr(): storage.nbytes() / 4 / 600_000 for storage in held}

        before, ema = storages(), build()
        for _ in range(17):
            ema.update()
        return sum(size for at, size in storages().items() if at not in before)

    model = nn.ParameterList([torch.randn(300_000) for _ in range(2)])
    model.base = nn.Parameter(torch.zeros(9, 900_000, dtype=torch.uint8), requires_grad=False)
    assert copies(lambda: EMA(model)) == 3 and copies(lambda: EMA(model, ["step", 0.9, 0])) == 7
    assert 35 <= copies(lambda: EMABank(model)) < 37, "K + block + 2, and a chunk"
    assert 7 <= copies(lambda: EMABank(model, ladder=None, block=4)) < 7.4


@both
def test_what_cannot_be_averaged_is_named(Average):
    for change, name in (
        (lambda: model.load_state_dict(mlp().state_dict(), assign=True), "0.weight"),
        (lambda: setattr(model[2], "bias", nn.Parameter(torch.zeros(32))), "2.bias"),
        (lambda: setattr(model[2], "bias", None), "2.bias"),
        (lambda: model[0].bias.requires_grad_(), "0.bias"),
    ):
        (model := mlp())[0].bias.requires_grad_(False)
        ema = Average(model)
        ema.update()
        change()
        updates = (ema.update() for _ in range(16))
        for read in (ema.weights, ema.applied().__enter__, lambda it=updates: list(it)):
            with pytest.raises(ValueError, match=f"parameter {name} "):
                read()
    for parameters in (mlp().parameters(), [torch.ones(1), torch.ones(2)]):
        with pytest.raises(TypeError, match="EMA takes the model"):
            Average(parameters)
    (partial := mlp()).state_dict = lambda **_: {"0.weight": partial[0].weight}
    for model in (nn.ReLU(), mlp().requires_grad_(False), partial):
        with pytest.raises(ValueError, match="nothing to average|hold all of its parameters"):
            Average(model)


@both
def test_applied_restores_and_guards_the_model(Average):
    ema, ids = Average(model := Net(), 0.9), torch.arange(11)
    model.embed.weight.data += 1
    ema.update()
    before, weights = copy.deepcopy(model.state_dict()), ema.weights()
    assert weights.keys() == before.keys()
    for action in (ema.update, ema.applied().__enter__, lambda: 1 / 0):
        model.train().norm.eval()
        with pytest.raises((RuntimeError, ZeroDivisionError)), ema.applied() as swapped:
            assert swapped is model and model.training and not model.norm.training
            assert_same(weights, model.state_dict())
            model.train()(ids).sum().backward()  # moves the running statistics
            action()
        assert_same(model.state_dict(), before)
        assert model.calls == 0 and ema.step == 1
    with pytest.raises(ValueError), ema.applied(0.123):
        pass
    ema.update()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # it keeps copies of weights it has seen
        own = model.eval()(ids)
        with ema.applied():
            averaged = model(ids)
        assert torch.equal(model(ids), own) and not torch.equal(averaged, own)


def test_switches_for_precision_do_not_reach_the_fold_and_stay_as_found():
    switches, mm, seen = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), torch.mm, []

    def found():
        return [switch.fp32_precision for switch in switches]

    def watched(*arguments, **settings):
        seen.extend([*found(), torch.is_autocast_enabled("cpu")])
        return mm(*arguments, **settings)

    def after_a_fold():
        with mock.patch("torch.mm", watched), torch.autocast("cpu"):
            for _ in range(16):
                bank.update()
        return found()

    bank = EMABank(mlp())
    try:
        torch.set_float32_matmul_precision("medium")
        assert after_a_fold() == ["tf32", "bf16"]
        assert torch.get_float32_matmul_precision() == "medium"
        for switch in switches:
            switch.fp32_precision = "none"
        for precision in ("tf32", "ieee"):  # a switch for all still reaches the products
            torch.backends.fp32_precision = precision
            assert after_a_fold() == [precision] * 2
        assert set(seen) == {"ieee", False}
    finally:
        torch.set_float32_matmul_precision("highest")
        for switch in (torch.backends, *switches):
            switch.fp32_precision = "none"


@both
def test_optimizer_hook_under_a_grad_scaler_counts_no_skipped_step(Average):
    model, scaler = nn.Linear(2, 2), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, oracle = Average(model, 0.9), Oracle(model, [0.9])
    optimizer.register_step_post_hook(lambda *_: ema.update())
    for step in range(10):
        for batch in range(4):
            x = torch.ones(2) / ((step, batch) != (3, 1))  # once infinite
            scaler.scale(model(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 3:
            oracle.update()
    assert ema.step == 9
    oracle.check(ema)


@both
def test_an_average_of_another_loop_goes_on(Average):
    theirs = copy.deepcopy(dict((model := mlp()).named_parameters()))
    for step, _ in enumerate(training(model, 400), 1):
        for name, p in model.named_parameters():
            theirs[name].data.mul_(0.99).add_(p.data, alpha=0.01)
        if step == 60:
            raw = copy.deepcopy(model.state_dict())
            model.load_state_dict(theirs)
            ema = Average(model, 0.99)
            model.load_state_dict(raw)
        elif step > 60:
            ema.update()
    for name, value in ema.weights().items():
        torch.testing.assert_close(value, theirs[name].data, rtol=0, atol=2e-6)


@both
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(Average):
    ema, wide = Average(mlp(), 0.9), nn.Sequential(*mlp()[:4], nn.Linear(32, 3))
    for _ in wander(ema.model, "walk", 20):
        ema.update()
    before, other = ema.weights(), EMABank if Average is EMA else EMA
    for named, each in (("decays", Average(mlp(), "step")), ("4.weight", Average(wide, 0.9)),
                        ("ladder", other(mlp(), 0.9)), ("decays: None", mlp()),
                        ("block", EMABank(mlp(), 0.9, ema.ladder, block=8)),
                        ("5.weight", Average(mlp().append(nn.Linear(2, 2)), 0.9))):
        with pytest.raises(ValueError, match=f"^{named}"):
            ema.load_state_dict(each.state_dict())
        assert ema.step == 20
        assert_same(ema.weights(), before)


def test_the_section_runs_when_pasted_alone():
    bar = "# " + "=" * 98 + "\n"
    section = Path(ddpm_ema.__file__).read_text().split(f"{bar}# EMA\n{bar}")[1].split(bar)[0]
    subprocess.run([sys.executable, "-c", section + """
for Average in (EMA, EMABank):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = Average(model, decays=0.9)
    for _ in range(300):
        (model(torch.randn(8, 2)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    with ema.applied():
        assert (model(torch.zeros(1, 2)) - 1).abs().max() < 0.1
"""], check=True, cwd="/")


def ddp_run(rank, Average, reads):
    oracle, early = Oracle(model := mlp(seed=rank), [0.9]), Average(model, 0.9)
    wrapped = nn.parallel.DistributedDataParallel(model)  # gives rank 1 the weights of rank 0
    emas = early, Average(wrapped, 0.9)
    for _ in training(wrapped, 30, seed=rank):
        oracle.update()
        for ema in emas:
            ema.update()
            if rank == 0 and reads:
                ema.weights()
                with ema.applied():
                    ema.state_dict()
    for ema in emas if rank == 0 else ():
        oracle.check(ema)
    return flatten(model.parameters())


def fsdp_run(Average):
    def network():
        torch.manual_seed(0)  # on two ranks 2 + 1 and 1 + 0 rows
        return nn.Sequential(nn.Linear(2, 3), nn.SiLU(), nn.Linear(3, 1), nn.Linear(1, 2))

    def assert_close(sharded, whole):
        for p, q in zip(sharded.values(), whole.values()):
            torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)

    model, twin = network(), network()
    fully_shard(model, mesh=distributed.init_device_mesh("cpu", (2,)))
    ema, whole = (Average(net, [0.9, "step"]) for net in (model, twin))
    for step, _ in enumerate(zip(training(model, 40), training(twin, 40))):
        ema.update()
        whole.update()
        if step == 20:
            state, ema = saved(ema.state_dict()), Average(model, [0.9, "step"])
            ema.load_state_dict(state)
            with torch.no_grad():
                model(twin[0].weight)  # without a backward, the gathered weights stay
                with ema.applied("step"), whole.applied("step"):
                    torch.testing.assert_close(model(twin[0].weight), twin(twin[0].weight))
                torch.testing.assert_close(model(twin[0].weight), twin(twin[0].weight))
            assert_close(model.state_dict(), twin.state_dict())
    for decay in (0.9, "step", *[0.9993] * (Average is EMABank)):
        assert_close(ema.weights(decay), whole.weights(decay))
    model.load_state_dict(ema.weights("step", debias=True))
    assert_close(model.state_dict(), whole.weights("step", debias=True))


def two_processes(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                   world_size=2, timeout=datetime.timedelta(seconds=60))
    for Average in (EMA, EMABank):
        read, unread = (ddp_run(rank, Average, reads) for reads in (True, False))
        assert torch.equal(read, unread), "reads on rank 0 changed the training"
        fsdp_run(Average)
    Path(folder, f"done{rank}").touch()
    distributed.barrier()
    os._exit(0)  # gloo may crash on leaving


def test_reads_on_one_rank_under_ddp_and_shards_under_fsdp2(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


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
    alpha, sigma = Diffusion("linear").path[:2].numpy()
    np.testing.assert_allclose(alpha**2, np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), rtol=1e-12)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha, _ = Diffusion("cosine").path[:2].numpy()
    np.testing.assert_allclose(alpha[:-1] ** 2, f[1:-1] / f[0], rtol=1e-9)  # the last is clipped
    alpha, sigma = Diffusion("flow").path[:2].numpy()
    np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-12)
    assert np.allclose(np.diff(sigma), 1e-3) and sigma[0] > 0 and alpha[-1] > 0


@pytest.mark.parametrize("schedule, objective", PATHS)
def test_predictions_convert_and_the_least_loss_is_that_of_a_gaussian(schedule, objective):
    diffusion, n = Diffusion(schedule, objective), 100_000
    x0, eps, t = torch.randn(7, 3, 2).double(), torch.randn(7, 3, 2).double(), torch.arange(7) * 140
    output = diffusion.target(x0, t, eps)
    said = diffusion.predict(output, diffusion.add_noise(x0, t, eps), t)
    truth = x0, eps, Diffusion(schedule, "v").target(x0, t, eps)
    torch.testing.assert_close(said, truth, rtol=1e-8, atol=1e-8)
    for step in (100, 500, 900):  # the least loss is the posterior variance of the target
        x0, eps = MEAN + STD * torch.randn(n, 2).double(), torch.randn(n, 2).double()
        at = torch.full((n,), step)
        loss = diffusion.loss(gaussian_network(diffusion), x0, at, eps).mean().item()
        alpha, sigma = diffusion.path[:2, step]
        posterior = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # of x0
        scale = {"eps": (alpha / sigma) ** 2, "v": sigma**-2, "x0": max(sigma, 0.05) ** -2}
        assert loss == pytest.approx((posterior * scale[objective]).mean().item(), rel=0.03)


@pytest.mark.parametrize("schedule", Diffusion.SCHEDULES)
@pytest.mark.parametrize("num_steps, settings", [
    (1000, {"eta": 1.0}), (500, {"eta": 0.5}), (250, {}), (250, {"order": 2})])
def test_samplers_reach_the_gaussian(schedule, num_steps, settings):
    """With the best network, mean and covariance of the samples are those of the data."""
    generator, diffusion = torch.Generator().manual_seed(0), Diffusion(schedule, "v")
    noise = torch.randn(8000, 2, generator=generator).double()
    *_, (t, x, x0_hat) = diffusion.sample(gaussian_network(diffusion), noise, num_steps,
                                          generator=generator, **settings)
    assert t == -1 and x is x0_hat
    torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(x.T), torch.diag(STD**2), rtol=0.08, atol=0.003)


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_convergence(order):
    """Against the exact solution of the probability-flow ODE, which is affine for a Gaussian."""
    diffusion = Diffusion("cosine", "x0", num_steps=200_000)
    x = torch.randn(100, 2).double()
    diffusion.path, diffusion.num_steps = diffusion.path[:, 2_000:150_000], 148_000
    (alpha, sigma), (a0, s0) = diffusion.path[:2, -1], diffusion.path[:2, 0]
    ratio = ((a0 * STD) ** 2 + s0**2) / ((alpha * STD) ** 2 + sigma**2)
    exact, errors = a0 * MEAN + (x - alpha * MEAN) * ratio.sqrt(), []
    for steps in (64, 128):
        *_, last, _ = diffusion.sample(gaussian_network(diffusion), x, steps, order=order)
        errors.append((last[1] - exact).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


def test_ancestral_noise_has_the_posterior_variance():
    """Equation 7 of DDPM; at full length its beta is that of the schedule."""
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    noise = torch.Generator().manual_seed(0)
    walk = Diffusion("linear", "eps").sample(lambda x, t: 0 * x, torch.zeros(200_000, 1), 1000,
                                             eta=1.0, generator=noise)
    _, (t, x, _) = next(walk), next(walk)
    expected = beta[999] * (1 - bar[998]) / (1 - bar[999])
    assert t == 998 and x.var().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_match_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = (diffusers.DDPMScheduler if eta else diffusers.DDIMScheduler)(1000, clip_sample=True)
    theirs.set_timesteps(1000)
    net = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours = Diffusion("linear", "eps").sample(lambda x, t: net(x), torch.randn(4, 1, 8, 8), 1000,
                                             eta=eta, clip=1.0, generator=generators[0])
    settings = {} if eta else {"use_clipped_model_output": True}
    for (t, x, x0_hat), (_, after, _) in itertools.pairwise(ours):
        step = theirs.step(net(x), t, x, generator=generators[1], **settings)
        # Dividing by alpha, 0.006 at the start, makes 1e-5 of float32's rounding.
        torch.testing.assert_close(x0_hat, step.pred_original_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after, step.prev_sample, rtol=1e-4, atol=1e-4)
    assert t == 0


# ==================================================================================================
# UNet
# ==================================================================================================

@pytest.mark.parametrize("channels, height, width", [(1, 16, 16), (3, 4, 12), (64, 8, 8)])
def test_unet_shapes(channels, height, width):
    net, t = UNet(channels, width=8), torch.tensor([0, 999])
    x = torch.randn(2, channels, height, width)
    out = net(x, t)
    assert out.shape == x.shape and not out.any()  # the last layer starts at zero
    (out - x).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    for wrong in (x[:, :, :3], x[:, :1].expand(-1, 2, -1, -1)):
        with pytest.raises(ValueError, match="divisible by 4"):
            net(wrong, t)


@pytest.mark.parametrize("scale_shift", [True, False])
def test_unet_sees_time_and_every_pixel(scale_shift):
    torch.manual_seed(0)
    net = UNet(1, width=8, scale_shift=scale_shift)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    x, t = torch.randn(1, 1, 8, 8, requires_grad=True), torch.tensor([10])
    assert not torch.allclose(net(x, t), net(x, t + 490), atol=1e-3)
    told = [p for name, p in net.named_parameters() if name.endswith("time.weight")]
    seen = torch.autograd.grad(net(x, t)[0, 0, 0, 0], [x, *told])
    assert seen[0].all() and len(told) > 5  # attention: a global view
    assert all(gradient.any() for gradient in seen)  # every block is told the time


def test_unet_of_the_ddpm_paper():
    """35.7 M in the paper; the published checkpoint holds exactly this many."""
    net = UNet(3, **PRESETS["cifar10"]["network"])
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


@pytest.mark.parametrize("name, code", [
    ("Noise schedules, objectives and samplers", """
diffusion = Diffusion("cosine", "v")
*_, (t, x, x0) = diffusion.sample(lambda x, t: 0 * x, torch.randn(2, 1, 4, 4), 5)
assert t == -1 and x.isfinite().all()"""),
    ("UNet", "assert UNet()(torch.zeros(1, 1, 8, 8), torch.zeros(1)).shape == (1, 1, 8, 8)")])
def test_sections_run_when_pasted_alone(name, code):
    bar = "# " + "=" * 98 + "\n"
    section = Path(ddpm_ema.__file__).read_text().split(f"{bar}# {name}\n{bar}")[1].split(bar)[0]
    imports = set(re.findall(r"^(?:import|from) (\w+)", section, re.MULTILINE))
    assert imports <= {"contextlib", "math", "torch"}
    exec(section + code, {"__name__": "alone"})  # noqa: S102


# ==================================================================================================
# Data
# ==================================================================================================

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 12), np.uint8)
CLASSES = np.arange(40, dtype=np.uint8) % 3


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_glyphs_have_known_modes():
    """Labels name what is drawn, and all of 36 come, the r-th with a share ~ 1/r."""
    data, templates = load_data("glyphs"), []
    assert data.images.shape[1:] == (1, 16, 16) and len(data.names) == 36
    share = data.labels.bincount() / len(data)
    np.testing.assert_allclose(share, (z := 1 / np.arange(1, 37)) / z.sum(), rtol=0.2)
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for name in data.names:
        canvas = np.zeros((32, 32))
        for face in ("DejaVuSans-Bold", "DejaVuSerif-Bold"):
            font = FT2Font(str(folder / f"{face}.ttf"))
            font.set_size(28, 72)
            font.set_text(name)
            font.draw_glyphs_to_bitmap()
            h, w = (glyph := font.get_image()[:32, :32]).shape
            canvas[(32 - h) // 2:][:h, (32 - w) // 2:][:, :w] += glyph
        templates.append(canvas.reshape(16, 2, 16, 2).mean((1, 3)).ravel())
    means = [data.images[data.labels == k].float().mean(0).numpy().ravel() for k in range(36)]
    likeness = np.corrcoef(means, templates)[:36, 36:]  # [label, template]
    assert (likeness.argmax(1) == np.arange(36)).sum() >= 35  # the I is much like a 1


def npz_file(folder, images, labels=CLASSES):
    np.savez(folder / "x.npz", images=images, labels=labels)
    return folder / "x.npz"


def idx_files(folder, pack, suffix=""):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(PIXELS)))
    (folder / f"t10k-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(PIXELS)))
    (folder / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(CLASSES)))
    return folder


def image_files(folder, depth, every):
    """In sub-folders; a grey image has `depth`, every so many is in colour."""
    for i, (image, label) in enumerate(zip(PIXELS, CLASSES)):
        (folder / "abc"[label]).mkdir(exist_ok=True)
        image = image.astype(np.uint16) * 257 if depth == 16 else image
        image = np.stack([image] * 3, axis=2) if i % every == every - 1 else image
        pytest.importorskip("PIL.Image").fromarray(image).save(folder / "abc"[label] / f"{i:02}_idx3.png")
    return folder


@pytest.mark.parametrize("make, channels", [
    (lambda f: idx_files(f, bytes), 1), (lambda f: idx_files(f, gzip.compress), 1),
    (lambda f: idx_files(f, gzip.compress, ".gz"), 1), (lambda f: image_files(f, 8, 1), 3),
    (lambda f: image_files(f, 8, 2), 3), (lambda f: image_files(f, 16, 99), 1),
    (lambda f: npz_file(f, PIXELS[:, None]), 1), (lambda f: npz_file(f, PIXELS[..., None]), 1),
    (lambda f: npz_file(f, np.stack([PIXELS] * 3, 1).astype(int), CLASSES.astype(int) * 7 - 9), 3)])
def test_every_format_gives_the_same_images_and_labels(make, channels, tmp_path):
    data = load_data(str(make(tmp_path)))
    order = np.argsort(CLASSES, kind="stable") if (tmp_path / "a").exists() else np.arange(40)
    assert data.images.shape == (40, channels, 8, 12) and data.is_pictures
    assert all(np.array_equal(data.images[:, c], PIXELS[order]) for c in range(channels))
    assert np.array_equal(data.labels, CLASSES[order]) and len(data.names) == 3
    x0 = data.x0(torch.arange(5))
    assert torch.equal(((x0 + 1) * 127.5).round(), data.images[:5])


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_floats_are_standardised_by_channel(tmp_path, axes):
    latents = np.random.default_rng(0).normal(3, 5, (50, 4, 8, 8)) * [[[[1]], [[2]], [[3]], [[4]]]]
    latents[:, 3] = 300.7  # stays constant: no multiple of a power of two
    data = load_data(str(npz_file(tmp_path, latents.transpose(axes), np.arange(50) % 5 + 7)))
    x0 = data.x0(torch.arange(50))
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(x0[:, :3].std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    assert not x0[:, 3].any() and data.bound < 7
    assert data.names == ["7", "8", "9", "10", "11"] and not data.is_pictures


class Files(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.served[self.path[1:]])

    def log_message(self, *_):
        pass


def test_downloads_are_checked_and_kept(tmp_path, monkeypatch, capfd):
    """The three built-in sets, served from here in their original formats."""
    records = np.concatenate([CLASSES[:, None], np.zeros((40, 3072), np.uint8)], axis=1)
    records[:, 1:1025] = 200  # the first plane is red
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for i in range(1, 6):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            info.size = records.size
            tar.addfile(info, io.BytesIO(records.tobytes()))
    Files.served = {"cifar-10-binary.tar.gz": buffer.getvalue(),
                    "train-images-idx3-ubyte.gz": gzip.compress(idx_bytes(PIXELS), mtime=0),
                    "train-labels-idx1-ubyte.gz": gzip.compress(idx_bytes(CLASSES), mtime=0)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    quiet = functools.partial(torch.hub.download_url_to_file, progress=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", quiet)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        for name, (_, files) in DOWNLOADS.items():
            wrong = dict.fromkeys(files, "0" * 16)
            monkeypatch.setitem(DOWNLOADS, name, (address, wrong))
            assert "hash" in fails(capfd, "--data", name, "--out", str(tmp_path / "run"))
            right = {file: hashlib.sha256(Files.served[file]).hexdigest()[:16] for file in files}
            monkeypatch.setitem(DOWNLOADS, name, (address, right))
            load_data(name)
        server.shutdown()
    cifar = load_data("cifar10")  # from the cache: the server is gone
    assert cifar.images.shape == (200, 3, 32, 32) and cifar.labels[:4].tolist() == [0, 1, 2, 0]
    assert cifar.images[0].float().mean((1, 2)).tolist() == [200, 0, 0]
    assert np.array_equal(load_data("mnist").images[:, 0], PIXELS)
    assert np.array_equal(load_data("fashion").labels, CLASSES)


# ==================================================================================================
# Metrics
# ==================================================================================================

def ones(features):
    return torch.ones(len(features), dtype=torch.float64)


def test_frechet_distance_in_closed_form():
    m1, m2, v1, v2 = torch.rand(4, 6, dtype=torch.float64, generator=torch.manual_seed(0)) + 0.1
    turn = torch.linalg.qr(torch.randn(6, 6).double()).Q
    closed = (m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum()  # they commute
    ours = frechet_distance(turn @ m1, turn * v1 @ turn.T, turn @ m2, turn * v2 @ turn.T)
    assert ours == pytest.approx(closed.item(), rel=1e-10)
    line = torch.outer(m1, m1)  # singular: (2 - 1)² times the one eigenvalue
    assert frechet_distance(m1, line, m1, 4 * line) == pytest.approx(m1.square().sum().item())
    a, b = (x @ x.T for x in torch.randn(2, 6, 6).double())
    roots = np.sqrt(np.linalg.eigvals((a @ b).numpy()).real).sum()  # they do not commute
    closed = (a.trace() + b.trace()).item() - 2 * roots
    assert frechet_distance(m1, a, m1, b) == pytest.approx(closed, rel=1e-8)
    assert math.isnan(frechet_distance(m1, a, m1, b * math.inf))


def test_moments_with_counts_are_those_of_repeated_rows():
    features = torch.randn(9000, 5) + 100
    counts = torch.randint(4, (9000,)).double()
    repeated = features.double().numpy().repeat(counts.int().numpy(), axis=0)
    mean, cov = moments(features, counts)
    np.testing.assert_allclose(mean, repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(repeated.T), rtol=1e-9, atol=1e-12)


def test_manifold_share_by_hand_and_in_tiles():
    """On a line: the ball of a point reaches its third neighbour."""
    real = torch.tensor([[0.0], [1.0], [2.0], [4.0], [20.0], [21.0], [22.0], [23.0]])
    # radii 4, 3, 2, 4 and 3, 2, 2, 3: covered are [-4, 8] and [17, 26]
    fake = torch.tensor([[-4.1], [-3.9], [7.9], [8.1], [12.0], [16.9], [17.1], [26.1]])
    assert manifold_share(fake, real).int().tolist() == [0, 1, 1, 0, 0, 0, 1, 0]
    real, fake = torch.randn(2500, 4), torch.randn(1300, 4) * 1.5
    radius = torch.cdist(real, real).sort(1).values[:, 3]
    naive = (torch.cdist(fake, real) <= radius).any(1)
    assert (manifold_share(fake, real) != naive).sum() <= 1  # a tie may round either way


def test_modes_by_hand():
    """100 samples of 4 modes with true shares .4 .3 .2 .1, of which the last is missing."""
    real = torch.cat([torch.randn(100, 3), torch.randn(300, 3) + 50])  # samples lack three quarters
    reference = {"moments": moments(real, ones(real)), "features": real,
                 "shares": torch.tensor([0.4, 0.3, 0.2, 0.1]).double()}
    probs = torch.eye(4)[[0] * 50 + [1] * 40 + [2] * 10]
    row = measure(real[:100], probs, reference)
    assert row["precision"] == 1 and row["recall"] == 0.25 and row["precision_sd"] == 0
    assert row["covered_modes"] == 3 and row["legible"] == 1
    assert row["tail_share"] == pytest.approx(0.1 / 0.3)
    assert row["modes"] == pytest.approx([1.25, 4 / 3, 0.5, 0])
    assert row["is"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in (0.5, 0.4, 0.1))))
    assert measure(real, torch.eye(4)[[0] * 400], reference)["fd"] == pytest.approx(0, abs=1e-6)


def test_bootstrap_spread_is_that_of_repeated_sampling():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(2000, 4, generator=generator)
    reference = {"moments": moments(real, ones(real)), "features": real,
                 "shares": torch.ones(4).double() / 4}

    def draw(num_bootstrap):
        features = torch.randn(600, 4, generator=generator) * 1.2
        probs = torch.rand(600, 4, generator=generator).softmax(1)
        return measure(features, probs, reference, num_bootstrap)

    rows, row = [draw(2) for _ in range(30)], draw(100)
    for name in ("fd", "is", "precision", "recall", "tail_share"):
        spread = np.std([r[name] for r in rows])
        assert row[f"{name}_sd"] == pytest.approx(spread, rel=0.5)


# ==================================================================================================
# The command
# ==================================================================================================

NETWORK = {"width": 4, "multipliers": (1, 2), "attention": (1,)}
TINY = ["--batch-size", "8", "--num-samples", "32", "--sample-steps", "2", "--log-every", "2",
        "--save-every", "3", "--lr", "0.05"]
FLAGS = "--steps", "8", "--decay", "0,0.9", "--stages", "0.5,1"  # of the run `whole`
SAMPLES, HELD_OUT = "32 by dpm++ in 2 steps", "512 held-out images"
FIGURES = {}  # the last of each name


@contextlib.contextmanager
def small(pictures=False):
    """Inside, the network is tiny and its classifier trains briefly; pictures are empty files."""
    def savefig(figure, path, true=Figure.savefig, **options):
        FIGURES[Path(path).name.removeprefix("tmp-")] = figure
        return true(figure, path, **options) if pictures else Path(path).touch()

    brief = functools.partial(ddpm_ema.train_classifier, num_steps=20)
    with (mock.patch.dict(PRESETS["small"], {"network": NETWORK, "warmup": 3}),
          mock.patch.multiple(ddpm_ema, train_classifier=brief, CANDIDATES=("0.9", "0.95", "0.97")),
          mock.patch.object(Figure, "savefig", savefig)):
        yield


def run(data, out, *flags, pictures=False):
    """The command itself, in this process."""
    with small(pictures):
        main(["--data", str(data), "--out", str(out), *TINY, *flags])


def fails(capfd, *flags):
    """The one line with which the command refuses these flags."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop, small():
        main(list(flags))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and ": error: " in error, error
    return error


@pytest.fixture(scope="session")
def bars(tmp_path_factory):
    """8x8 bars in four directions on noise, no two alike, and a run on them: `whole`."""
    folder, rng = tmp_path_factory.mktemp("bars"), np.random.default_rng(0)
    labels = rng.choice(4, 200, p=[0.4, 0.3, 0.2, 0.1])
    images = rng.integers(0, 30, (200, 8, 8), np.uint8)
    for image, label, place in zip(images, labels, rng.integers(1, 7, 200)):
        image[(place, slice(None)) if label < 2 else (slice(None), place)] = 127 + 128 * (label % 2)
    np.savez(folder / "bars.npz", images=images[:, None], labels=labels)
    run(folder / "bars.npz", folder / "whole", *FLAGS, pictures=True)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    held_out, training = torch.tensor(images[:, None])[order].split([40, 160])
    return SimpleNamespace(data=folder / "bars.npz", whole=folder / "whole", figures=FIGURES.copy(),
                           rows=read_rows(folder / "whole"), held_out=held_out, training=training)


def equal(a, b):
    """Nested containers of tensors and plain values, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_end(bars, out):
    """A run ended as `whole` did: weights, averages, optimizer and rows."""
    ours, whole = (torch.load(folder / "checkpoint-8.pt", weights_only=True)
                   for folder in (out, bars.whole))
    for name in whole.keys() - {"settings", "kept"}:
        assert equal(ours[name], whole[name]), name
    ours = read_rows(out)
    assert [key for key, row in bars.rows.items() if ours.get(key) != row] == []


def test_every_row_says_whose_weights_it_shows_and_is_measured_with_them(bars):
    sampled = {key[:2]: row for key, row in bars.rows.items() if key[2] == SAMPLES}
    names = ["real", "raw", "0", "0.9", "0.9 debiased"]
    assert [*sampled] == [(step, name) for step in (4, 8) for name in names]
    for step, name, samples in bars.rows:
        share = bars.rows[step, name, samples].get("init_share")
        expected = None if name in ("raw", "real") else float(name.split()[0]) ** step
        assert share == pytest.approx(expected) and samples in ("", SAMPLES, HELD_OUT)
    assert {step for step, _, samples in bars.rows if samples == ""} == {0, 2, 4, 6, 8}
    for step in (4, 8):  # decay 0 is raw, 0.9 is not
        raw, zero, plain, debiased = (sampled[step, name] for name in names[1:])
        for name in ("fd", "is", "precision", "recall", "tail_share", "legible", "held_out_loss"):
            assert zero[name] == pytest.approx(raw[name], rel=1e-3, abs=1e-6), name
        for name in ("fd", "is", "held_out_loss"):
            assert len({round(row[name], 5) for row in (raw, plain, debiased)}) == 3
        assert bars.rows[step, "0", ""]["distance_raw"] < 1e-4
        assert bars.rows[step, "0.9", ""]["distance_raw"] > 0.1
    with open(bars.whole / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:3] == ["step", "name", "init_share"] and len(table) == len(bars.rows)


def test_pictures_show_data_and_the_weights_they_name(bars):
    for name in ("samples", "curves", "sweep"):
        assert matplotlib.image.imread(bars.whole / f"{name}.png").std() > 0.01
    axes = bars.figures["samples.png"].axes
    assert [a.texts[0].get_text() for a in axes] == ["real", "raw", "0", "0.9", "0.9 debiased"]
    real, raw, zero, plain, debiased = (np.array(axis.images[0].get_array()) for axis in axes)
    assert np.allclose(raw, zero, atol=0.05)
    for a, b in itertools.combinations((real, raw, plain, debiased), 2):
        assert np.abs(a - b).max() > 0.05
    loss, plane = bars.figures["curves.png"].axes[:2]
    points = [(line.get_ls(), len(line.get_xdata())) for line in loss.lines]
    assert sorted(points) == [("-", 5)] * 3 + [("--", 1), ("--", 5)]  # 0 is debiased at step 0 only
    assert len(plane.lines) == 3 and all(np.ptp(line.get_ydata()) > 0 for line in plane.lines)
    lines = [line for line in bars.figures["sweep.png"].axes[0].lines if line.get_ls() == "-"]
    assert [line.get_ydata().tolist() for line in lines] == [
        [bars.rows[step, name, SAMPLES]["fd"] for name in ("raw", "0", "0.9")] for step in (4, 8)]


def test_four_steps_replayed_plainly(bars, tmp_path, capfd):
    """Warm-up, flips, clipping, cooldown, Adam and averages, written down once more."""
    with (mock.patch.dict(PRESETS["small"], flip=True), mock.patch.object(
            nn.functional, "cross_entropy", wraps=nn.functional.cross_entropy) as classified):
        run(bars.data, tmp_path, "--steps", "4", "--decay", "0.9", "--cooldown", "0.5")
    counts = torch.cat([call.args[1] for call in classified.call_args_list]).bincount()
    assert len(counts) == 4 and counts.min() > 0.8 * counts.max()  # rare classes as often
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    bar = torch.tensor(f[1:] / f[0]).float()[:, None, None, None]

    def loss_of(x0, t, eps):
        alpha, sigma = bar[t].sqrt(), (1 - bar[t]).sqrt()
        error = model(alpha * x0 + sigma * eps, t) - (alpha * eps - sigma * x0)
        return error.square().mean()

    def seed(*words):
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))

    seed(0, 0, 0)
    model, norms, losses = UNet(1, **NETWORK), [], []
    initial, average = ([p.detach().clone() for p in model.parameters()] for _ in range(2))
    adam = torch.optim.Adam(model.parameters())
    for step in range(4):
        seed(1, 0, step)
        index, t = torch.randint(160, (8,)), torch.randint(1000, (8,))
        flip, x0 = torch.rand(8) >= 0.5, bars.training[index] / 127.5 - 1
        x0[flip] = x0[flip].flip(3)
        adam.param_groups[0]["lr"] = 0.05 * min(1, (step + 1) / 3) * min(1, (4 - step) / 2)
        adam.zero_grad()
        losses.append(loss_of(x0, t, torch.randn(8, 1, 8, 8)))
        losses[-1].backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        adam.step()
        for e, p in zip(average, model.parameters()):
            e.lerp_(p.detach(), 0.1)
    assert max(norms) > 2 * min(norms) > 2  # they are clipped, by different factors
    rows, state = read_rows(tmp_path), torch.load(tmp_path / "checkpoint-4.pt", weights_only=True)
    assert rows[4, "raw", ""]["loss"] == pytest.approx(sum(losses[2:]).item() / 2, rel=1e-4)
    ema = EMABank(UNet(1, **NETWORK), ["0.9"])
    ema.load_state_dict(state["ema"])
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=3e-4)
    close([state["model"][name] for name, _ in model.named_parameters()], [*model.parameters()])
    close([ema.weights("0.9")[name] for name, _ in model.named_parameters()], average)
    debiased = [(e - 0.9**4 * p) / (1 - 0.9**4) for e, p in zip(average, initial)]
    eps = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, weights in {"0.9": average, "0.9 debiased": debiased}.items():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(weights), model.parameters())
        held_out = bars.held_out / 127.5 - 1, torch.linspace(0, 999, 40).round().long(), eps
        loss = rows[4, name, ""]["held_out_loss"]
        assert loss == pytest.approx(loss_of(*held_out).item(), rel=1e-3)
    assert "cooldown" in fails(capfd, "--out", str(tmp_path), "--steps", "5")


class Killed(BaseException):
    """No one catches it."""


@contextlib.contextmanager
def death(owner, name, calls):
    """Inside, that call of owner.name is the last thing to happen, and it does not happen."""
    true, count = getattr(owner, name), itertools.count(1)

    def call(*values, **options):
        if next(count) == calls:
            raise Killed
        return true(*values, **options)

    with mock.patch.object(owner, name, call), pytest.raises(Killed):
        yield


@pytest.mark.parametrize("owner, name, calls", [
    (torch, "save", 1), (torch, "save", 3), (Path, "replace", 2), (json, "dumps", 7),
    (EMABank, "update", 6), (ddpm_ema, "measure", 8)])
def test_a_run_that_died_ends_as_if_it_had_not(bars, tmp_path, owner, name, calls):
    with death(owner, name, calls):
        run(bars.data, tmp_path, *FLAGS)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])  # a torn last line
    run(bars.data, tmp_path, *FLAGS)
    assert_same_end(bars, tmp_path)
    assert not list(tmp_path.glob("tmp-*"))


def test_killed_processes_go_on(bars, tmp_path):
    """The real command: Ctrl-C in training, SIGKILL in an evaluation."""
    with death(EMABank, "update", 2):
        run(bars.data, tmp_path, *FLAGS)
    command = [sys.executable, "-u", ddpm_ema.__file__, "--out", tmp_path]
    for line, number, code in (("step 2/", signal.SIGINT, 130), ("step 4, 5", signal.SIGKILL, -9)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)
        next(printed for printed in process.stdout if printed.startswith(line))
        process.send_signal(number)
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == code and "Traceback" not in rest
        assert code < 0 or "the same command goes on" in rest.splitlines()[-1]
    run(bars.data, tmp_path, *FLAGS)
    assert_same_end(bars, tmp_path)


def test_a_full_disk_and_fewer_steps_first(bars, tmp_path, capfd):
    run(bars.data, tmp_path, "--steps", "3", "--decay", "0,0.9")

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with mock.patch.object(torch, "save", full):
        assert "No space left" in fails(capfd, "--out", str(tmp_path), "--steps", "8")
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint-3.pt"]
    run(bars.data, tmp_path, *FLAGS)
    assert_same_end(bars, tmp_path)


@pytest.mark.parametrize("steps", ["9", "1"])
def test_a_diverged_run_keeps_its_last_good_checkpoint(bars, tmp_path, capfd, steps):
    assert "diverged" in fails(capfd, "--data", str(bars.data), "--out", str(tmp_path), *TINY,
                               "--lr", "1e30", "--steps", steps)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint-0.pt"]


def test_the_same_command_another_decay_more_steps_and_auto(bars, tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(bars.whole, out)
    with mock.patch.object(EMABank, "update", side_effect=Killed):  # no training
        with mock.patch.object(ddpm_ema, "measure", side_effect=Killed):
            run(bars.data, out, *FLAGS)
        lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
        assert max(map(len, lines)) <= 120 and all(line.endswith("|") for line in lines)
        assert sum(line.startswith("| 8    | 0.9 debiased |") for line in lines) >= 3
        run(bars.data, out, "--decay", "0.97")
        new = {key[:2] for key in read_rows(out).keys() - bars.rows.keys() if key[2] == SAMPLES}
        assert new == {(step, f"0.97{d}") for step in (4, 8) for d in ("", " debiased")}
        with (out / "metrics.jsonl").open("a") as file:  # so that 0.95 debiased is the lowest
            for key, row in read_rows(out).items():
                if key[2] == HELD_OUT:
                    row["held_out_loss"] = 0.1 if key[1] == "0.95 debiased" else 0.0 if (
                        key[1] == "raw") else 0.5
                    file.write("\n" + json.dumps(row) + "\n")
        run(bars.data, out, "--decay", "auto")
    auto = {key[:2] for key in read_rows(out) if key[2] == SAMPLES and "0.95" in key[1]}
    assert auto == {(4, "0.95 debiased"), (8, "0.95 debiased")}
    run(bars.data, out, "--steps", "10")
    assert (10, "0.9", SAMPLES) in read_rows(out) and (8, "raw", "") in read_rows(out)
    run(bars.data, tmp_path / "auto", "--steps", "1", "--decay", "auto")
    run(bars.data, tmp_path / "auto", "--steps", "2")  # is still what was asked for
    auto = [key for key in read_rows(tmp_path / "auto") if key[::2] == (2, SAMPLES)]
    assert len(auto) == 3  # real, raw and the chosen one


def test_sweep_stands_for_ten_decays(bars, tmp_path):
    run(bars.data, tmp_path, "--steps", "1", "--decay", "sweep", "--num-samples", "16")
    names = {name for _, name, samples in read_rows(tmp_path) if samples.startswith("16 ")}
    assert sorted(name for name in names if name[0] == "0" and " " not in name) == [
        "0.5", "0.9", "0.99", "0.999", "0.9993", "0.9995", "0.9997", "0.9999", "0.99999",
        "0.999999"]


def test_averages_beat_raw_weights(bars, tmp_path):
    run(bars.data, tmp_path, "--steps", "300", "--decay", "0.97", "--log-every", "300",
        "--save-every", "300", "--lr", "0.01", "--num-samples", "16")
    rows = read_rows(tmp_path)
    start, raw, average = (rows[key]["held_out_loss"] for key in (
        (0, "raw", ""), (300, "raw", HELD_OUT), (300, "0.97", HELD_OUT)))
    assert average < 0.97 * raw and average < 0.7 * start


def test_two_processes_give_the_losses_of_one(bars, tmp_path):
    with death(EMABank, "update", 1):
        run(bars.data, tmp_path, *FLAGS)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node=2", ddpm_ema.__file__, "--out", tmp_path, "--steps", "4"],
                   check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    lines = (tmp_path / "metrics.jsonl").read_text().split()
    assert sum('"step":' in line for line in lines) == len(read_rows(tmp_path))
    run(bars.data, tmp_path, *FLAGS)  # goes on with one
    ours = read_rows(tmp_path)
    for key, row in bars.rows.items():
        for name in ("loss", "grad_norm", "held_out_loss"):
            assert name not in row or ours[key][name] == pytest.approx(row[name], rel=1e-3)


class Colours(nn.Module):
    """Stands for Inception: uint8 in, with the flag that some of them have."""

    def forward(self, x, return_features: bool = False):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return x.float().mean((2, 3)) if return_features else x.float()[:, :, 0, 0]


def test_features_of_a_file_give_fid(bars, tmp_path, capfd):
    features, out = str(tmp_path / "colours.pt"), tmp_path / "run"
    torch.jit.script(Colours()).save(features)
    run(bars.data, out, "--steps", "1", "--features", features, "--num-samples", "40")
    row = next(row for row in read_rows(out).values() if "fid" in row)
    means = [images.double().mean((1, 2, 3))[:, None].expand(-1, 3)
             for images in (bars.held_out, bars.training)]
    expected = frechet_distance(*(x for part in means for x in moments(part, ones(part))))
    assert row["name"] == "real" and row["fid"] == pytest.approx(expected, rel=1e-3)
    assert "fd" not in row and features in row["samples"]
    for network in (nn.Flatten(0), nn.Linear(5, 5), nn.Identity()):
        torch.jit.script(network).save(features)
        assert "--features" in fails(capfd, "--data", str(bars.data), "--out", str(tmp_path / "x"),
                                     "--features", features)
    assert not (tmp_path / "x").exists()


LONELY = np.insert(np.arange(39) % 2 * 2, torch.randperm(
    40, generator=torch.Generator().manual_seed(0))[0].item(), 1)  # the only one is held out


@pytest.mark.parametrize("images, labels", [
    (PIXELS[:, None], {}), (np.random.default_rng(0).normal(size=(40, 5, 8, 8)), {}),
    (PIXELS[:, None], {"labels": LONELY}), (PIXELS[:, None], {"labels": LONELY % 2})],
    ids=["no-labels", "latents", "lonely-middle", "lonely-last"])
def test_data_of_other_kinds(images, labels, tmp_path):
    np.savez(tmp_path / "x.npz", images=images, **labels)
    run(tmp_path / "x.npz", tmp_path / "run", "--steps", "1", "--schedule", "flow", "--sampler",
        "ddpm")
    rows = [row for row in read_rows(tmp_path / "run").values() if "fd" in row]
    assert len(rows) == 4 and all(math.isfinite(row["fd"]) for row in rows)
    assert all(("modes" in row) == bool(labels) for row in rows)  # else there are no known ones
    assert all(math.isfinite(share) for row in rows for share in row.get("modes", []))
    assert np.ptp(FIGURES["samples.png"].axes[1].images[0].get_array()) > 0.1


def finished_run(bars, folder, objective, seed, fds):
    """A folder that looks like a finished run, with these Fréchet distances."""
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for name, fd in zip(("real", "raw", "0.9", "0.97", "0.99"), fds):
            row = {"step": 8, "name": name, "samples": SAMPLES, "decay": name, "debiased": False,
                   "fd": fd, "fd_sd": 0.5}
            if name != "real":
                row["horizon"] = 1.0 if name == "raw" else 1 / (1 - float(name))
            file.write(json.dumps(row) + "\n")
    state = torch.load(bars.whole / "checkpoint-8.pt", weights_only=True)
    state["settings"] |= {"objective": objective, "seed": seed}
    torch.save(state, folder / "checkpoint-8.pt")
    return str(folder)


def test_report_pools_seeds_and_ranks_methods(bars, tmp_path, capfd):
    table = {  # at 0.97, the best of both, v is ahead by 4
        ("v", 0): (1, 20, 11, 5, 9), ("eps", 0): (1, 15, 12, 9, 8.8),
        ("v", 1): (1, 22, 9, 5, 12), ("eps", 1): (1, 17, 14, 9, 9.8)}
    folders = [finished_run(bars, tmp_path / f"{objective}{seed}", objective, seed, fds)
               for (objective, seed), fds in table.items()]
    with small():
        main(["--report", *folders, "--out", str(tmp_path / "report")])
    printed = capfd.readouterr().out
    assert "objective v" in printed and "over 2 seeds" in printed
    ranking = printed.split("The methods at each decay")[1].splitlines()
    bold = {name: [line.split("|")[3].strip() for line in ranking
                   if f"| {name} " in line and "**" in line]
            for name in ("best decay", "raw", "0.9", "0.97", "0.99")}
    v, eps = "objective v", "objective eps"
    assert bold == {"best decay": [v], "raw": [eps], "0.9": [v], "0.97": [v], "0.99": [v, eps]}
    assert any("10.0 ± 1.4" in line for line in ranking)
    lines = [list(line.get_ydata()) for line in FIGURES["report.png"].axes[0].lines]
    assert [line for line in lines if len(line) == 4] == [[21, 10, 5, 10.5], [16, 13, 9, 9.3]]
    empty = finished_run(bars, tmp_path / "empty", "v", 0, ())
    for flags, message in ((["nowhere"], "no finished run"), ([folders[0]] * 2, "same settings"),
                           ([folders[0], "--decay", "0.9"], "--out alone"), ([empty], "empty")):
        assert message in fails(capfd, "--report", *flags)


def test_tables_have_the_digits_that_the_spread_is_worth(capfd):
    row = {"fd": 20.43, "fd_sd": 1.6, "is": 3.0, "recall": 0.51, "recall_sd": 0.021, "n": 999.9999}
    assert [cell(row, field) for field in ("fd", "is", "recall", "precision", "n")] == [
        "20.4 ± 1.6", "3", "0.51 ± 0.02", "-", "1,000"]
    print_table(["step", "weights", *"abcdefgh"], [["1", "raw", *["x" * 30] * 8]])
    assert 100 < max(map(len, capfd.readouterr().out.split("\n"))) <= 120


BAD = {"3d": {"images": PIXELS}, "few": {"images": PIXELS[:12, None]}, "key": {"x": PIXELS},
       "none": {"images": PIXELS[:0, None]}, "nan": {"images": np.full((40, 1, 8, 8), np.nan)},
       "label": {"images": PIXELS[:, None], "labels": np.zeros(40)},
       "odd": {"images": np.zeros((40, 9, 9, 1), np.uint8)}}


@pytest.fixture(scope="session")
def bad(bars, tmp_path_factory):
    """A folder of files and folders that are no data and no runs."""
    folder = tmp_path_factory.mktemp("bad")
    for name, arrays in BAD.items():
        np.savez(folder / f"{name}.npz", **arrays)
    content = (folder / "3d.npz").read_bytes()
    (folder / "cut.npz").write_bytes(content[:-600])
    (folder / "garbage.npz").write_bytes(b"PK not a zip")
    for name, offset, value in (("encrypted", 6, 1), ("compression", 8, 99)):
        changed = bytearray(content)
        changed[offset] = changed[content.find(b"PK\1\2") + offset + 2] = value
        (folder / f"{name}.npz").write_bytes(changed)
    np.lib.format.write_array_header_1_0(header := io.BytesIO(), {
        "descr": "|u1", "fortran_order": False, "shape": (10**12, 1, 8, 8)})
    for name, content in (("giant", header.getvalue()), ("raw", b"hello")):
        with zipfile.ZipFile(folder / f"{name}.npz", "w") as file:
            file.writestr("images.npy", content)
    for name in ("empty", "unequal", "torn", "alien", "other", "unsaved"):
        (folder / name).mkdir()
    matplotlib.image.imsave(folder / "unequal" / "a.png", PIXELS[0])
    matplotlib.image.imsave(folder / "unequal" / "b.png", PIXELS[0, :4])
    whole = (bars.whole / "checkpoint-8.pt").read_bytes()
    (folder / "torn" / "checkpoint-8.pt").write_bytes(whole[:-100])
    torch.save({"step": 8}, folder / "alien" / "checkpoint-8.pt")
    (folder / "other" / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    shutil.copy(bars.whole / "metrics.jsonl", folder / "unsaved")
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.mark.parametrize("flags, message", [
    *((f"--{name.replace('_', '-')}=--", "--") for name in ddpm_ema.SETTINGS),
    *((f"--decay={decay}", "allowed") for decay in (
        "1", "-0.1", "nan", "often", "0.9,", "", "power:1e-300", "halflife:1e308", "0.9\n0.8")),
    *((flag, flag.split("=")[0]) for flag in (
        "--steps=0", "--steps=1" + "0" * 5000, "--batch-size=-3", "--lr=nan", "--lr=inf",
        "--seed=1\n\n2", "--stages=0.5,2", "--cooldown=1.1", "--colour=red", "--objective=y\nz",
        "--schedule=y", "--sampler=y", "--preset=y", "--num-samples=1", "--sample-steps=1001")),
    *((f"--data={name}", "--data") for name in (
        "nowhere", "", "no\nwhere", "{f}/empty", "{f}/unequal", "{f}/loop", "{f}/\udcff", *(
            f"{{f}}/{name}.npz" for name in (*BAD, "loop/x", "cut", "garbage", "encrypted",
                                             "compression", "giant", "raw") if name != "odd"))),
    ("--data={f}/odd.npz", "divisible"), ("--features={f}/raw.npz", "--features"),
    ("--batch-size=100000000", "memory"), ("--out={f}/raw.npz", "raw.npz"),
    ("--out={f}/raw.npz/x", "raw.npz"), ("--out={f}/loop", "loop"), ("--out={f}/loop/x", "loop"),
    ("--out={f}/torn", "no checkpoint"), ("--out={f}/alien", "no checkpoint"),
    ("--out={f}/other", "another --out"), ("--out={f}/unsaved", "checkpoints"),
    ("--out={w} --lr=0.5", "lr 0.05, not 0.5"), ("--out={w} --steps=2", "come to 8"),
    ("--out={w} --stages=0.25", "kept no checkpoint"), ("--report", "at least one"),
    ("--out={w} --decay=step", "0.99995"), ("--out={w} --data=glyphs", "data")])
def test_bad_input_is_one_line(bars, bad, tmp_path, capfd, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(bad.rglob("*"))
    given = [text.format(f=bad, w=bars.whole) for text in flags.split(" ")]
    if "--data" not in flags and "{w}" not in flags and "--report" not in flags:
        given += ["--data", str(bars.data)]
    assert message in fails(capfd, *given)
    assert sorted(bad.rglob("*")) == before and not any(tmp_path.iterdir())  # nothing was begun


def test_names_of_any_kind(bars, tmp_path, monkeypatch):
    """Dollars, line breaks, bytes that are no UTF-8: read, drawn and resumed like others."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(bars.data, name := "a$b_$c\nd\udcff.npz")
    for steps in "12":
        run(name, f"run-{name}", "--steps", steps, pictures=steps == "1")


def test_debugging_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_EMA_DEBUG", "1")
    with pytest.raises(ValueError, match="no data there"):
        main(["--data", "nowhere", "--out", str(tmp_path / "run")])


# ==================================================================================================
# The toy
# ==================================================================================================

def points(num):
    """Noisy samples x [num, 2] and σ [num], a third of them without noise: float64."""
    x0, noise = (values.numpy().astype(np.float64) for values in toy2d.sample_tree(1, 1, num))
    sigma = np.exp(1.5 * noise[:, 2] - 2.3) * (np.arange(num) % 3 > 0)
    return (np.float64(np.float32(v)) for v in (x0 + sigma[:, None] * noise[:, :2], sigma))


def plain(x, sigma):
    """What `evaluate` says, [5], at one point, by full matrices: NumPy."""
    mean_x, mean_y, xx, xy, yy, weight = toy2d.make_tree()[0].reshape(6, -1)[:, :1016]
    covariance = np.stack([xx, xy, xy, yy], 1).reshape(-1, 2, 2) + sigma**2 * np.eye(2)
    offset = x - np.stack([mean_x, mean_y], 1)  # [K, 2]
    pull = np.linalg.solve(covariance, offset[:, :, None])[:, :, 0]
    square = (offset * pull).sum(1)
    logs = np.log(weight) - square / 2 - np.log(2 * math.pi * np.sqrt(np.linalg.det(covariance)))
    share = np.exp(logs - logs.max())
    log_density, score = logs.max() + math.log(share.sum()), -share @ pull / share.sum()
    return np.array([log_density, *score, square.argmin() // 8, math.sqrt(square.min())])


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-11), (np.float32, 1e-5)])
def test_kernel_equals_numpy(dtype, tolerance):
    x, sigma = points(300)
    x[0] = 2e3, -3e3  # far away everything is finite as well
    given, threads = (x.astype(dtype), sigma.astype(dtype)), numba.get_num_threads()
    ours = toy2d.evaluate(toy2d.make_tree(dtype)[0], *given)
    numba.set_num_threads(1)
    assert np.array_equal(ours, toy2d.evaluate(toy2d.make_tree(dtype)[0], *given))
    numba.set_num_threads(threads)
    twin = np.array([plain(*point) for point in zip(x, sigma)])
    assert (ours[:, 3] == twin[:, 3]).all()
    scale = 1 + np.abs(twin)
    thinnest = 1 / np.sqrt(toy2d.make_tree()[0][2:5:2].min() + sigma**2)  # the size of a score
    scale[:, 1:3] = (np.linalg.norm(twin[:, 1:3], axis=1) + thinnest)[:, None]
    assert (np.abs(ours - twin) / scale).max() < tolerance


def test_tree_is_the_published_one():
    tree, generation = toy2d.make_tree()
    weight = tree[5].ravel()
    assert np.bincount(generation).tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert (weight > 0).sum() == 1016 and weight.sum() == pytest.approx(1, abs=1e-12)
    assert tree[:2].reshape(2, -1) @ weight == pytest.approx([0.3718510, 0.3646066], abs=1e-7)
    mass = np.bincount(generation, weight[:1016].reshape(127, 8).sum(1))
    known = [0.2571963, 0.1510545, 0.1526550, 0.1615938, 0.1175527, 0.0865092, 0.0734385]
    assert mass == pytest.approx(known, abs=1e-7)
    assert tree[2:5, 0, 0] == pytest.approx([3.4676e-4, 1.03578e-4, 3.8516e-4], rel=1e-4)


def test_samples_follow_the_tree():
    x0, noise = toy2d.sample_tree(0, 1, 2**16)
    assert noise.mean().abs() < 0.01 and (torch.cov(noise.T) - torch.eye(3)).abs().max() < 0.02
    found = toy2d.coverage(x0)
    assert found["on_tree"] > 0.9995 and found["twigs"] == pytest.approx(1, abs=0.03)
    x = x0 + 0.1 * noise[:, :2]  # what noise adds the exact denoiser takes away, on average
    excess = toy2d.exact_denoiser(x, 0.1) - x0
    assert excess.mean().abs() < 2e-3 and (excess * x).mean().abs() < 2e-3
    keys = (0, 1), (0, 1), (0, 2), (1, 1)
    one, again, step, seed = (toy2d.sample_tree(*key, 64)[1] for key in keys)
    assert torch.equal(one, again) and (one != step).all() and (one != seed).all()


@pytest.mark.parametrize("sigma", [0.01, 0.5, 5.0])
def test_preconditioning(sigma):
    """With F = 1 the denoiser is c_skip x + c_out."""
    model, x, total = toy2d.Denoiser(2), torch.randn(2, 5, 2), sigma**2 + 0.25
    torch.nn.init.zeros_(model.weights[-1])
    torch.nn.init.ones_(model.biases[-1])
    assert torch.allclose(model(x, sigma), 0.25 / total * x + 0.5 * sigma / total**0.5, atol=1e-6)


def test_training_noise(monkeypatch):
    seen, forward = [], toy2d.Denoiser.forward
    spy = lambda *given: seen.append(given[2]) or forward(*given)
    monkeypatch.setattr(toy2d.Denoiser, "forward", spy)
    model = toy2d.Denoiser(1)
    assert list(toy2d.train(model, toy2d.EMA(model), 8, [4], 2048, "samples")) == [4]
    logs = torch.cat(seen).log()
    assert [logs.mean(), logs.std()] == pytest.approx([-2.3, 1.5], abs=0.05)


def command(monkeypatch, *flags):
    monkeypatch.setattr(toy2d, "NUM_SAMPLES", 256)
    with pytest.raises(SystemExit) as end:
        toy2d.main(["--seeds", "2", "--batch-size", "128", *flags])
    return end.value.code


def table(folder):
    found = {}  # (step, weights): [seeds, 3]
    for row in csv.DictReader((folder / "results.csv").open()):
        found.setdefault((int(row["step"]), row["weights"]), []).append(
            [float(row[name]) for name in toy2d.MEASURES])
    return {key: np.array(values) for key, values in found.items()}


def test_the_command(tmp_path, monkeypatch, capsys):
    flags = ["--steps", "64", "--decay", "0,halflife:1000000", "--out"]
    assert command(monkeypatch, *flags, str(tmp_path / "a")) == 0
    printed = capsys.readouterr().out
    assert command(monkeypatch, *flags, str(tmp_path / "b")) == 0
    names = ["results.csv", "stages.png", "toy2d.png", "trajectories.png"]
    files = [sorted((tmp_path / run).iterdir()) for run in "ab"]
    assert [path.name for path in files[0]] == names
    for one, other in zip(*files):  # bit for bit
        assert one.read_bytes() == other.read_bytes()
    rows = table(tmp_path / "a")
    raw, still = rows[64, "raw"], rows[64, "EMA halflife:1000000"]
    assert rows[64, "exact denoiser"][:, 1].min() > 0.99
    assert raw[:, 1].mean() > rows[8, "raw"][:, 1].mean() + 0.1  # it learns
    assert np.allclose(rows[64, "EMA 0"], raw, atol=0.01)  # decay 0 is raw, this one stays behind:
    assert np.allclose(still, rows[8, "EMA halflife:1000000"], atol=0.01)
    assert still[:, 1].mean() < raw[:, 1].mean() - 0.1
    assert rows[64, "EMA halflife:1000000 debiased"][:, 1].mean() > still[:, 1].mean() + 0.05
    cells = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
    assert len(cells) == len(rows) + 2 and {len(line) for line in cells} == {6}
    last = [*rows.values()][-1][:, 1].mean()
    assert float(cells[-1][4].split("±")[0]) == pytest.approx(last, abs=1e-3)
    for name, least in (("toy2d.png", 1000), ("trajectories.png", 3000), ("stages.png", 2000)):
        picture = matplotlib.image.imread(tmp_path / "a" / name)[60:-60, :, :3]  # no legend
        assert (np.ptp(picture, axis=2) > 0.15).sum() > least, name


def test_ctrl_c_keeps_the_stages_reached(tmp_path, monkeypatch, capsys):
    def interrupted(step, *given, sample=toy2d.sample_stage):
        if step == 2:
            raise KeyboardInterrupt
        return sample(step, *given)

    monkeypatch.setattr(toy2d, "sample_stage", interrupted)
    assert command(monkeypatch, "--steps", "8", "--out", str(tmp_path)) == 130
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("stopped") and "| raw " in printed
    assert {step for step, _ in table(tmp_path)} == {1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("flag, value, message", [
    ("--decay", "1.5", "1.5"), ("--decay", "", "decay"), ("--steps", "4", "from 8"),
    ("--seeds", "x", "whole"), ("--batch-size", "0", "from 1"), ("--target", "clean", "samples"),
    ("--device", "cpu", "--device"), ("--out", "file", "file")])
def test_bad_input_of_the_toy_is_one_line(flag, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    assert command(monkeypatch, flag, value) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    if value == "file":
        monkeypatch.setenv("DDPM_EMA_DEBUG", "1")
        with pytest.raises(FileExistsError):
            toy2d.main([flag, value])


# ==================================================================================================
# README
# ==================================================================================================

README = Path(ddpm_ema.__file__).with_name("README.md").read_text()


def test_readme_code_runs():
    """Every Python block of README, one after another."""
    names = {"torch": torch, "EMA": EMA, "EMABank": EMABank, "Diffusion": Diffusion, "UNet": UNet}
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(block, names)  # noqa: S102
    assert len(blocks) == 2 and names["ema"].step == 1000 and names["x_t"].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("script", [ddpm_ema, toy2d])
def test_pins_are_those_of_requirements(script):
    path = Path(script.__file__)
    pins = re.search(r"^# dependencies = (.*)$", path.read_text(), re.MULTILINE)[1]
    required = path.with_name("requirements.txt").read_text().split("# tests")[0].split()
    assert re.findall(r'"(.*?)"', pins) == required
    assert "python -m pytest -q" in README and "pytest -q" in path.with_name(".ci").joinpath(
        "run").read_text()


# ==================================================================================================
# Benchmarks: python test_ddpm_ema.py
# ==================================================================================================


def averaged(model, decays):
    models = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) for decay in decays]
    return lambda: [each.update_parameters(model) for each in models]


def ways_to_average(model, decays):
    """Name -> call that takes in one step; the first of each table is what others are put to."""
    ten = {"ten AveragedModels": averaged(model, decays),
           "EMABank, ladder=None": EMABank(model, decays, ladder=None).update,
           "EMABank": EMABank(model, decays).update, "EMA": EMA(model, decays).update}
    with contextlib.suppress(ImportError):
        from ema_pytorch import EMA as Theirs

        peers = [Theirs(model, beta=beta, update_every=1, update_after_step=0) for beta in decays]
        ten["ten of ema-pytorch"] = lambda: [peer.update() for peer in peers]
    with contextlib.suppress(ImportError):
        from diffusers.training_utils import EMAModel

        models = [EMAModel(model.parameters(), decay=decay) for decay in decays]
        ten["ten of diffusers"] = lambda: [each.step(model.parameters()) for each in models]
    one = {"one AveragedModel": averaged(model, decays[:1]), "EMA": EMA(model, decays[0]).update}
    return {"one decay": one, "ten decays": ten}


def bench_ema(rounds=8, repeats=32):
    """Prints what a step costs: the least mean of several rounds, taken in turns."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    print(f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads")
    for total, tensors in ((1_500_000, 240), (9_400_000, 32)):
        model = nn.ParameterList(torch.randn(total // tensors) for _ in range(tensors))
        for title, calls in ways_to_average(model, [1 - 0.1 * 0.5**i for i in range(10)]).items():
            best = dict.fromkeys(calls, math.inf)
            for name in rounds * list(calls):
                start = time.perf_counter()
                for _ in range(repeats):
                    calls[name]()
                best[name] = min(best[name], (time.perf_counter() - start) / repeats)
            first, reference = next(iter(best.items()))
            print(f"\n| {title}, {total / 1e6} M in {tensors} tensors | ms a step | of {first} |")
            print("| --- | --- | --- |")
            for name, spent in best.items():
                print(f"| {name} | {spent * 1e3:.2f} | {spent / reference:.2f} |")


def bench_toy():  # 4,096 exact scores of the toy's tree, by einsum and by its kernel
    def einsum(x, mean, var, turn, weight):
        u = torch.einsum("kij,nki->nkj", turn, x[:, None] - mean)  # [N, K, 2]
        logs = (weight / var.prod(2).sqrt()).log() - torch.einsum("nkj,nkj->nk", u, u / var) / 2
        return -torch.einsum("nk,kij,nkj->ni", logs.softmax(1), turn, u / var)
    (x0, noise), lines, sigma = toy2d.sample_tree(0, 1, 4096), [], np.full(4096, 0.1)
    for dtype in (np.float32, np.float64):
        tree, x = toy2d.make_tree(dtype)[0], (x0 + 0.1 * noise[:, :2]).numpy().astype(dtype)
        *mean, xx, xy, yy, weight = torch.tensor(tree.reshape(6, -1)[:, :1016])
        var, turn = torch.linalg.eigh(torch.stack([xx, xy, xy, yy], 1).view(-1, 2, 2))
        held = torch.stack(mean, 1), (var + 0.1**2).expand(4096, -1, -1), turn, weight
        calls = (einsum, torch.tensor(x), *held), (toy2d.evaluate, tree, x, sigma.astype(dtype))
        times = [1e3 * min(timeit.repeat(partial(*call), number=1, repeat=20)) for call in calls]
        lines.append([dtype.__name__, *(f"{ms:.1f}" for ms in times), f"{times[0] / times[1]:.0f}"])
    toy2d.print_table(["dtype", "einsum, ms", "Numba, ms", "ratio"], lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    bench_ema()
    bench_toy()
