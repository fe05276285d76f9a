# SPDX-License-Identifier: MIT
"""Tests of ddpm_ema.py and toy2d.py: `python -m pytest`. As a script it prints the benchmarks."""

import contextlib
import copy
import csv
import datetime
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
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
from ddpm_ema import EMA, LADDER, PRESETS, Dataset, Diffusion, EMABank, UNet, main

# ==== EMA =========================================================================================
both = pytest.mark.parametrize("Average", [EMA, EMABank])
same = partial(torch.testing.assert_close, rtol=0, atol=0)  # of dicts: keys, dtypes, every bit
MIXED = (0.5, 0.9, 0.999, 0.999999, "step", "ramp:0.9999", "halflife:50", "power:0.10")


def betas(decay, steps):
    """β_1 … β_steps, written down independently of ddpm_ema."""
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    if decay == "step":
        return t / (t + 1)
    kind, _, number = str(decay).rpartition(":")
    value = float(number)
    if kind == "power":  # σ² (γ+2)² (γ+3) = γ+1 is a cubic: its largest root
        s = value**-2
        return (1 - 1 / t) ** (np.roots([1, 7, 16 - s, 12 - s]).real.max() + 1)
    constant = torch.full_like(t, 0.5 ** (1 / value) if kind == "halflife" else value)
    return constant.minimum((1 + t) / (10 + t)) if kind == "ramp" else constant


def flatten(values):
    whole = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]
    return torch.cat([value.detach().cpu().double().reshape(-1) for value in whole])


class Oracle:
    """The plain recursion in float64, for a model's parameters; profiles: for 1 at one step."""

    def __init__(self, model, decays=MIXED):
        self.parameters = dict(model.named_parameters(remove_duplicate=False))  # tied: both names
        self.first, self.t = flatten(self.parameters.values()), 0
        self.decays, self.rates = decays, 1 - torch.stack([betas(decay, 600) for decay in decays])
        self.moved = self.first.new_zeros(len(decays), len(self.first))
        self.profiles = torch.zeros_like(self.rates)

    def update(self):
        rate, now = self.rates[:, self.t, None], flatten(self.parameters.values()) - self.first
        self.moved.lerp_(now.expand_as(self.moved), rate)
        self.profiles -= rate * self.profiles
        self.profiles[:, self.t], self.t = rate[:, 0], self.t + 1

    def error(self, ema, decay, debias=False):
        """Of what is read: beyond its cast to float32, and that relative to how far it moved."""
        k = self.decays.index(decay)
        weighed = self.profiles[k].sum().item()
        assert ema.init_share(decay) == pytest.approx(1 - weighed, rel=1e-9, abs=1e-12)
        moved = self.moved[k] / (weighed if debias and self.t else 1)
        weights, exact = ema.weights(decay, debias), self.first + moved
        error = (flatten(weights[name] for name in self.parameters) - exact).norm()
        error = max((error - 2**-24 * exact.norm()).item(), 0)
        return error, error / max(moved.norm().item(), 1e-30)

    def check(self, ema):
        for decay in self.decays:
            assert all(self.error(ema, decay, debias)[1] < 5e-6 for debias in (False, True)), decay


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2))


def training(model, steps, seed=0, shape=(2,)):
    """A diffusion run on smooth random data; yields after every optimizer step."""
    torch.manual_seed(seed)
    data, optimizer = torch.randn(64, *shape).cumsum(-1), torch.optim.Adam(model.parameters())
    diffusion, network = Diffusion(), model if shape[1:] else lambda x, t: model(x)
    for _ in range(steps):
        x0, t = data[torch.randint(64, (16,))], torch.randint(1000, (16,))
        diffusion.loss(network, x0, t, torch.randn(x0.shape)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


@torch.no_grad()
def wander(model, kind, steps, seed=0):
    """A random trajectory of all that requires a gradient; yields after every step."""
    draw = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        for p in (p for p in model.parameters() if p.requires_grad):
            noise = torch.empty(p.shape).normal_(generator=draw).to(p)
            drift = p + noise.abs() / (step + 10)  # it dies down, as early in training
            p.copy_({"noise": noise, "walk": p + 0.01 * noise, "drift": drift}[kind])
        yield


class Net(nn.Module):
    """A bit of everything: tied, scalar and frozen parameters, buffers, four dimensions."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 4), nn.BatchNorm1d(4)
        self.conv, self.scale = nn.Conv2d(2, 3, 3), nn.Parameter(torch.ones(()))
        self.base = nn.Parameter(torch.arange(40, dtype=torch.uint8), requires_grad=False)
        self.out = nn.Linear(4, 11, bias=False)
        self.out.weight = self.embed.weight if tied else self.out.weight
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.scale * self.out(self.norm(self.embed(x)))


def test_float64_oracle_over_100000_steps(steps=100_000):
    decays = ["step", 0.999999, 0.5, 0.999, "power:0.10", "ramp:0.9999", "halflife:2000"]
    path = torch.randn(steps + 1, 2, 24, generator=torch.Generator().manual_seed(0))
    path[0, 1] = 0  # noise about 0, and a drift
    path[:, 0] = path[0, 0] + path[1, 0] * torch.arange(steps + 1)[:, None] / steps
    model = nn.ParameterList([path[0].clone()])
    emas = EMA(model, decays[0]), EMABank(model, decays, ladder=None)  # at its worst; and all
    rates = 1 - torch.stack([betas(decay, steps) for decay in decays], dim=1)[..., None, None]
    exact, weights = torch.zeros(len(decays), 2, 24, dtype=torch.float64), model[0].data
    for now, moved, rate in zip(path[1:], path[1:].double() - path[0], rates):
        weights.copy_(now)
        [ema.update() for ema in emas]
        exact.lerp_(moved.expand_as(exact), rate)
    for ema in emas:
        for decay, moved in zip(ema.decays, exact):
            error = (ema.weights(decay)["0"] - path[0] - moved).norm(dim=1) / moved.norm(dim=1)
            assert error.max() < 5e-6, (ema, decay, error)


@pytest.mark.parametrize("case", range(30))
def test_thirty_random_cases(case):
    """Whatever comes together, also on a GPU: the recursion. By the section when pasted alone."""
    section = re.split("# ==== .*=\n", Path(ddpm_ema.__file__).read_text())[1]
    small = section.replace("2**16", "2**5").replace("2**17", "2**6")  # many chunks and groups
    exec(small, pasted := {"__name__": "alone"})  # noqa: S102
    torch.manual_seed(case)
    choice = random.Random(case).choice
    device = choice(["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    model = Net(tied=choice([0, 1])).to(device, choice([torch.float, torch.double, torch.bfloat16]))
    for p in (model.norm.weight, model.conv.weight, model.embed.weight):
        p.requires_grad_(choice([True, True, False]))
    decays, settings = [choice(MIXED) for _ in range(3)], {"device": choice([None, "cpu"])}
    oracle, Average = Oracle(model, decays), pasted[choice(["EMA", "EMABank"])]
    compiled, wrapped = partial(torch.compile, backend="eager"), model
    model.conv = compiled(model.conv) if choice([0, 1]) else model.conv
    for wrap in choice([(), (compiled,), (nn.DataParallel, compiled), (compiled, nn.DataParallel)]):
        wrapped = wrap(wrapped)
    if Average is pasted["EMABank"]:
        settings |= {"block": choice([1, 2, 5, 16, 40]), "ladder": choice([None, LADDER])}
    ema = Average(wrapped, decays, **settings)
    oracle.check(ema)
    for _ in wander(model, choice(["noise", "walk", "drift"]), choice([3, 90, 600]), seed=case):
        ema.update()
        oracle.update()
        if choice(range(40)) == 0:
            oracle.check(ema)
            state, ema = ema.state_dict(), Average(wrapped, decays, **settings)
            ema.load_state_dict(state)
            model.to(memory_format=choice([torch.channels_last, torch.contiguous_format]))
        if choice(range(40)) == 0:
            decay, debias, before = choice(decays), choice([False, True]), copy.deepcopy(model)
            weights = ema.weights(decay, debias)
            with contextlib.suppress(ZeroDivisionError), ema.applied(decay, debias):
                assert all(torch.equal(weights[n].to(p), p) for n, p in oracle.parameters.items())
                1 / choice([0, 1])
            same(model.state_dict(), before.state_dict())
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
            torch.save(other.state_dict(), file := io.BytesIO())
            other = Average(model, MIXED)
            other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        elif how == "read" and step % 9 < 2:
            for decay in decays:
                other.weights(decay)["0.bias"].add_(1)  # they belong to the reader
                getattr(other, "error_bound", other.init_share)(decay)
            with other.applied("step", debias=True):
                other.state_dict()["table"].add_(1)
    for decay, debias in itertools.product(decays, (False, True)):
        weights = plain.weights(decay, debias)
        with around:
            same(other.weights(decay, debias), weights)
        assert torch.equal(weights["2.weight"], fixed), "what never changes stays as it is"
    assert len({getattr(ema, "error_bound", ema.init_share)(0.9993) for ema in (plain, other)}) == 1


@pytest.mark.parametrize("kind", ["noise", "walk", "drift", "mlp", "unet"])
def test_untracked_decays_are_within_their_bound_and_nearer_than_edm2(kind, stored=16):
    """EDM2 (arXiv:2312.02696, 3.2), with 32 copies too: snapshots of two power functions, mixed."""
    wanted = 0.903, 0.92, 0.97, 0.9944, 0.9993, 0.9999, "ramp:0.9999"
    trained, coarse = kind in ("mlp", "unet"), (0.1, 0.5, 0.9, 0.9, 0.99, 0.99995)
    steps, shape = (100, (1, 8, 8)) if kind == "unet" else (600, (2,))
    models = {"mlp": mlp(), "unet": UNet(widths=(8, 16), attention=(1,))}
    model = models.get(kind, nn.ParameterList([torch.zeros(40)]))
    run = training(model, steps, shape=shape) if trained else wander(model, kind, steps)
    oracle, taken = Oracle(model, (*wanted, "power:0.05", "power:0.10")), [None]
    banks = [EMABank(model, (), *shape) for shape in ((LADDER, 16), (LADDER, 3), (coarse, 64))]
    for step, _ in enumerate(run, 1):
        oracle.update()
        taken.append((oracle.profiles[-2:].clone(), oracle.moved[-2:].clone()))
        for bank in banks:
            bank.update()
            for decay in oracle.decays if step in (1, 2, 16, 17, 40, 64, 100, 161, steps) else ():
                if 0.9 <= 1 - oracle.rates[oracle.decays.index(decay), step - 1] <= 0.99995:
                    error, relative = oracle.error(bank, decay)
                    assert error <= bank.error_bound(decay), (step, decay, bank.block)
                    assert relative < 1e-4 or not trained or bank is banks[2], (step, decay)
        if trained and step in (100, 600):
            snapshots = [taken[step * (i + 1) // stored] for i in range(stored)]
            profiles, moved = map(torch.cat, zip(*snapshots))
            mix = torch.linalg.lstsq(profiles.T, oracle.profiles.T, driver="gelsd").solution.T
            for decay, theirs in zip(wanted, mix @ moved - oracle.moved):
                assert oracle.error(banks[0], decay)[0] < theirs.norm(), (step, decay)
    assert banks[0].error_bound(LADDER[3]) == 0 < banks[0].error_bound(0.9993) < 0.1
    assert banks[0].error_bound(0.97) == pytest.approx(banks[1].error_bound(0.97), rel=0.1)


def test_memory_is_what_the_docstrings_say():
    def copies(Average, *arguments, **settings):
        def size(held):  # in a file every storage is there once
            torch.save(held, file := io.BytesIO())
            return file.tell() / 4 / 600_000

        ema = Average(model, *arguments, **settings)
        [ema.update() for _ in range(17)]
        return round(size(ema) - size(model), 1)  # float32 numbers for each averaged one

    model = nn.ParameterList([p := nn.Parameter(torch.ones(300_000)), torch.ones(300_000), p])
    model.base = nn.Parameter(torch.zeros(900_000, dtype=torch.uint8), requires_grad=False)
    assert copies(EMA) == copies(EMA, np.float32(0)) == 3 and copies(EMA, ["step", 0.9, 0]) == 7
    assert copies(EMABank) == 33 and copies(EMABank, ladder=None, block=4) == 7  # K + block + 2
    assert copies(EMA, device="meta") == copies(EMABank, block=99, device="meta") == 0


def test_decays_are_understood_in_one_place():
    assert {ddpm_ema.parse_decay(text) for text in (0.9990, " .999 ", "0.999")} == {"0.999"}
    EMA(nn.Linear(1, 1), ["power:1e-6", "halflife:1e12", "ramp:0", 0]).update()
    for decay in (1, 1.5, -0.1, math.nan, "x", "", None, True, [0.9], ":0.9", "ramp:1", "ramp",
                  "halflife:0", "halflife:inf", "halflife:1e308", "power:0.3", "power:0",
                  "power:1e-300", "cosine:3", "step:1"):
        with pytest.raises(ValueError, match=r"\Adecay .*step.*ramp:.*halflife:.*power:.*\Z"):
            EMA(nn.Linear(1, 1), [decay])
    for bad in ({"decays": (), "ladder": None}, {"block": 0}, {"ladder": ["step"]}):
        with pytest.raises(ValueError):
            EMABank(nn.Linear(1, 1), **bad)
    for ema, ladder in ((EMA(mlp(), [0.99, "step"]), ""), (EMABank(mlp()), ", 0.9 to 0.99995")):
        with pytest.raises(ValueError, match=f"0.89.* not there; .* 0.99(, step|9){ladder}$"):
            ema.applied(0.89).__enter__()


@both
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(Average):
    for change, name in (
        (lambda: model.load_state_dict(mlp().state_dict(), assign=True), "0.weight"),
        (lambda: setattr(model[2], "bias", nn.Parameter(torch.zeros(8))), "2.bias"),
        (lambda: setattr(model[2], "bias", None), "2.bias"),
        (lambda: model.__setitem__(2, nn.Sequential(model[2])), "2.weight"),
        (lambda: model[0].bias.requires_grad_(), "0.bias")):
        (model := mlp())[0].bias.requires_grad_(False)
        ema = Average(model)
        [ema.update() for _ in range(16)]
        change()
        for call in (ema.weights, ema.update):
            with pytest.raises(ValueError, match=f"parameter {name} "):
                call()
    for it in (mlp().parameters(), [torch.ones(1)], nn.ReLU(), mlp().requires_grad_(False)):
        with pytest.raises((TypeError, ValueError)[isinstance(it, nn.Module)], match="EMA|nothing"):
            Average(it)
    ema, wide = Average(mlp(), 0.9), nn.Sequential(*mlp()[:4], nn.Linear(8, 3))
    [ema.update() for _ in wander(ema.model, "walk", 20)]
    before, other = (ema.step, ema.weights()), EMABank if Average is EMA else EMA
    for named, each in (("decays", Average(mlp(), "step")), ("4.weight", Average(wide, 0.9)),
                        ("ladder", other(mlp(), 0.9)), ("nothing", mlp()),
                        ("block", EMABank(mlp(), 0.9, ema.ladder, block=8)),
                        ("2.weight", Average(nn.ModuleDict({i: mlp()[int(i)] for i in "20"}), 0.9)),
                        ("5.weight", Average(mlp().append(nn.Linear(2, 2)), 0.9))):
        with pytest.raises(ValueError, match=f"^{named}"):
            ema.load_state_dict(each.state_dict())
        same((ema.step, ema.weights()), before)


@both
def test_applied_restores_and_guards_the_model(Average):
    ema, ids = Average(model := Net(), 0.9), torch.arange(11)
    model.embed.weight.data += 1
    ema.update()
    before, weights = copy.deepcopy(model.state_dict()), ema.weights()
    ema.weights()["norm.running_mean"].add_(1)  # it belongs to the reader; a frozen base is shared
    assert ema.weights()["base"].data_ptr() == model.base.data_ptr()
    for action in (ema.update, lambda: 1 / 0):
        model.train().norm.eval()
        with pytest.raises((RuntimeError, ZeroDivisionError)), ema.applied() as swapped:
            assert swapped is model and model.training and not model.norm.training
            with ema.applied(debias=True):
                assert not torch.equal(model.embed.weight, weights["embed.weight"])
            same(weights, dict(model.state_dict()))
            model.train()(ids).sum().backward()  # moves the running statistics
            action()
        same(model.state_dict(), before)
        assert model.calls == 0 and ema.step == 1
    ema.update()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # it keeps copies of weights it has seen
        own = model.eval()(ids)
        with ema.applied():
            averaged, expected = model(ids), copy.deepcopy(model)(ids)
        assert torch.equal(model(ids), own) and torch.equal(averaged, expected)


def test_switches_for_precision_do_not_reach_the_fold_and_stay_as_found(monkeypatch):
    switches, mm, seen = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), torch.mm, set()
    bank, twin = (EMABank(model, block=1) for model in [mlp()] * 2)
    monkeypatch.setattr(torch, "mm", lambda *arguments, **settings: seen.update(
        s.fp32_precision for s in switches) or mm(*arguments, **settings))
    cases = ("none", "tf32"), ("tf32", "none"), ("ieee", "none"), ("none", "none")
    for (every, own), _ in zip(cases, wander(bank.model, "walk", 4)):
        torch.backends.fp32_precision = every  # it reaches all that are "none"
        for switch in switches:
            switch.fp32_precision = own
        with torch.autocast("cpu"):
            bank.update()
        assert [s.fp32_precision for s in switches] == [own if every == "none" else every] * 2
        torch.backends.fp32_precision = "ieee"
        assert [s.fp32_precision for s in switches] == ["ieee" if own == "none" else own] * 2
        twin.update()
    assert seen == {"ieee"}
    same(bank.weights(), twin.weights())


@both
def test_as_a_hook_it_goes_on_with_torchs_average_and_counts_no_skipped_step(Average):
    (model, emas), scaler = (nn.Linear(2, 2), []), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=Average is EMA)
    optimizer.register_step_post_hook(lambda *step: [ema.update(*step) for ema in emas])
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(50):
        if step == 8:
            raw = copy.deepcopy(model.state_dict())
            model.load_state_dict(theirs.module.state_dict())
            emas.append(Average(model, 0.9))
            model.load_state_dict(raw)
        x = torch.ones(2) / (step != 20)  # once infinite
        scaler.scale((model(x) - 9).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 20:
            theirs.update_parameters(model)
    assert emas[0].init_share() == pytest.approx(0.9**41)
    torch.testing.assert_close(emas[0].weights(), dict(theirs.module.state_dict()))


def two_processes(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                   world_size=2, timeout=datetime.timedelta(seconds=60))
    x, decays, ends, ddp = torch.ones(4, 2), [0.9, "step"], [], nn.parallel.DistributedDataParallel
    wraps = ddp, partial(fully_shard, mesh=distributed.init_device_mesh("cpu", (2,)))
    for Average, wrap, reads in itertools.product((EMA, EMABank), wraps, (True, False)):
        torch.manual_seed(rank if wrap is ddp else 0)  # it gives rank 1 the weights of rank 0
        net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(1, 2))
        early = [Average(net, decays)] if wrap is ddp and rank == 0 else []
        model = wrap(net)  # sharded, two ranks have 2 + 1 and 1 + 0 rows
        oracle, ema = Oracle(net, decays), Average(model, decays)
        for step, _ in enumerate(training(model, 40, seed=rank)):
            for each in (ema, *early, oracle):
                each.update()
            if rank == 0 and reads:  # reading communicates with nobody, and changes nothing
                with ema.applied():
                    ema.state_dict()
            if step == 20 and wrap is not ddp:
                state, ema = ema.state_dict(), Average(model, decays)
                ema.load_state_dict(state)
                with torch.no_grad():
                    own = model(x)  # without a backward, the gathered weights stay
                    with ema.applied("step"):
                        averaged = model(x)
                    assert torch.equal(model(x), own) and not torch.allclose(averaged, own)
                model.load_state_dict(ema.weights("step"))
        for each in (ema, *early):
            oracle.check(each)
        ends.append(flatten(net.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(ends[::2], ends[1::2]))
    distributed.barrier()
    os._exit(0)  # gloo may crash on leaving


def test_reads_on_one_rank_under_ddp_and_shards_under_fsdp2(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path),), nprocs=2)


# ==== Noise schedules, objectives, samplers, UNet, data and metrics ===============================
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


@pytest.mark.parametrize("objective", Diffusion.OBJECTIVES)
@pytest.mark.parametrize("schedule", Diffusion.SCHEDULES)
def test_what_is_learnt_its_loss_and_what_it_says(schedule, objective):
    diffusion, t = Diffusion(schedule, objective), torch.arange(0, 1000, 50)
    x0, eps = torch.randn(2, 20, 3).double()
    alpha, sigma = diffusion.path[:2, t, None]
    x, v = alpha * x0 + sigma * eps, eps - x0 if schedule == "flow" else alpha * eps - sigma * x0
    goal = {"x0": x0, "eps": eps, "v": v}[objective]
    torch.testing.assert_close(diffusion.predict(goal, x, t), (x0, eps, v), rtol=1e-9, atol=1e-9)
    error = 0.25 / sigma[:, 0].clamp(min=0.05) ** (2 * (objective == "x0"))  # that of v
    loss = diffusion.loss(lambda given, at: goal + 0.5 + given - x, x0, t, eps).float()
    torch.testing.assert_close(loss, error.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("schedule, num_steps, sampler, eta, order", [
    ("linear", 1000, "ddpm", 1.0, 1), ("cosine", 100, "ddpm", 1.0, 1), ("flow", 30, "ddim", 0.0, 1),
    ("cosine", 24, "dpm++", 0.0, 2), ("flow", 20, "dpm++", 0.0, 2)])
def test_clipped_steps_are_those_of_the_papers(schedule, num_steps, sampler, eta, order):
    """DDIM, equations 12 and 16; with eta = 1 that is DDPM, with order 2 it is DPM-Solver++(2M)."""
    diffusion, noise = Diffusion(schedule, "eps"), torch.Generator().manual_seed(0)
    start, last = torch.randn(4000, 1, generator=noise).double(), None
    walk = diffusion.sample(lambda x, t: x.sin(), start, num_steps, sampler, 1.0, noise)
    for (t, x, x0_hat), (s, after, _) in itertools.pairwise(walk):
        alpha, sigma = diffusion.path[:2, t]
        alpha_s, sigma_s = diffusion.path[:2, s] if s >= 0 else torch.tensor([1.0, 0.0]).double()
        x0 = ((x - sigma * x.sin()) / alpha).clamp(-1, 1)
        torch.testing.assert_close(x0_hat, x0)
        h = (alpha_s / sigma_s / alpha * sigma).log()
        if order == 2 and last and s >= 0:
            x0 = x0 + (x0 - last[0]) * h / (2 * last[1])
        last = x0_hat, h
        nu = eta * sigma_s / sigma * (sigma**2 - (alpha * sigma_s / alpha_s) ** 2).sqrt()
        added = after - alpha_s * x0 - (sigma_s**2 - nu**2).sqrt() * (x - alpha * x0) / sigma
        assert added.square().mean().item() == pytest.approx(nu.item() ** 2, rel=0.12, abs=1e-12)
    assert s == -1


@pytest.mark.parametrize("channels, height, width, scale_shift", [
    (1, 16, 16, True), (3, 4, 12, False), (64, 8, 8, True)])
def test_unet_shapes_and_that_it_sees_time_and_every_pixel(channels, height, width, scale_shift):
    torch.manual_seed(0)
    net, t = UNet(channels, (8, 16, 32), scale_shift=scale_shift), torch.tensor([10, 500])
    x = torch.randn(1, channels, height, width).repeat(2, 1, 1, 1).requires_grad_()
    assert net(x, t).shape == x.shape and not net(x, t).any()  # the last layer starts at zero
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    out = net(x, t)
    assert not torch.allclose(*out, atol=1e-3)
    seen, *gradients = torch.autograd.grad(out[0, 0, 0, 0], [x, *net.parameters()])
    assert seen[0].all()  # attention: a global view
    assert all(gradient.any() for gradient in gradients)  # each block is told the time
    with pytest.raises(ValueError, match="divisible by 4"):
        net(x[:, :, :3], t)
    paper = UNet(3, **PRESETS["cifar10"]["network"])  # the published one holds exactly this many
    assert sum(p.numel() for p in paper.parameters()) == 35_746_307


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 12), np.uint8)
COLOUR, CLASSES = np.stack([PIXELS] * 3, axis=3), np.arange(40, dtype=np.uint8) % 3


def test_glyphs_have_known_modes():
    """Labels name what is drawn, and all of 36 come, the r-th with a share ~ 1/r."""
    data, canvas = Dataset(*ddpm_ema.read_data("glyphs")), np.zeros((36, 32, 32))
    assert (*data.images.shape[1:], data.num_modes, len(data.held_out)) == (1, 16, 16, 36, 4096)
    share = data.labels.bincount() / len(data.labels)
    np.testing.assert_allclose(share, (z := 1 / np.arange(1, 37)) / z.sum(), rtol=0.2)
    font = FT2Font(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf")
    font.set_size(28, 72)
    for template, name in zip(canvas, ddpm_ema.GLYPHS):
        font.set_text(name)
        font.draw_glyphs_to_bitmap()
        h, w = (glyph := font.get_image()[:32, :32]).shape
        template[(32 - h) // 2:][:h, (32 - w) // 2:][:, :w] = glyph
    templates = canvas.reshape(36, 16, 2, 16, 2).mean((2, 4)).reshape(36, -1)
    means = np.stack([data.images[data.labels == k].float().mean(0) for k in range(36)])
    likeness = np.corrcoef(means.reshape(36, -1), templates)[:36, 36:]
    assert (likeness.argmax(1) == np.arange(36)).sum() >= 32  # other faces, and the I is like a 1


def idx_files(folder, pack, suffix="", part="t10k"):
    for name, array in (("images-idx3", PIXELS), ("labels-idx1", CLASSES)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / f"{part}-{name}-ubyte{suffix}").write_bytes(pack(header + array.tobytes()))


def image_files(folder, images):
    for i, (image, label) in enumerate(zip(images, CLASSES)):
        (folder / "abc"[label]).mkdir(exist_ok=True)
        picture = pytest.importorskip("PIL.Image").fromarray(image)
        picture.save(folder / "abc"[label] / f"{i:02}_idx3.{'png' if i % 2 else 'tif'}")


@pytest.mark.parametrize("make, channels", [
    (lambda f: idx_files(f, bytes), 1), (lambda f: idx_files(f, gzip.compress), 1),
    (lambda f: idx_files(f, bytes) or idx_files(f, gzip.compress, ".gz"), 1),
    (lambda f: idx_files(f, bytes, part="train") or idx_files(f, lambda _: b""), 1),  # not t10k
    (lambda f: image_files(f, [PIXELS[0], np.dstack([COLOUR[1], PIXELS[0]]), *COLOUR[2:]]), 3),
    (lambda f: image_files(f, PIXELS.astype(np.uint16) * 256 + 128), 1),
    (lambda f: np.savez(f / "x", images=PIXELS[:, None], labels=CLASSES), 1),
    (lambda f: np.savez(f / "x", images=PIXELS[..., None], labels=CLASSES), 1),
    (lambda f: np.savez(f / "x", images=COLOUR.astype(int), labels=CLASSES.astype(int) - 9), 3)])
def test_every_format_gives_the_same_images_and_labels(make, channels, tmp_path):
    make(tmp_path)
    data = Dataset(*ddpm_ema.read_data(str(next(tmp_path.glob("*.npz"), tmp_path))))
    order = np.argsort(CLASSES, kind="stable") if (tmp_path / "a").exists() else np.arange(40)
    assert np.array_equal(data.images, PIXELS[order][:, None].repeat(channels, 1))
    assert np.array_equal(data.labels, CLASSES[order]) and data.num_modes == 3
    assert torch.equal(((data.x0(torch.arange(5)) + 1) * 127.5).round(), data.images[:5])


def test_downloads_are_checked_and_kept(tmp_path, monkeypatch, capfd):
    """The three built-in sets, in their original formats, from a folder that then is gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (served := tmp_path / "served").mkdir()
    records = np.full((40, 3073), 200, np.uint8)
    records[:, 0] = CLASSES
    records[:, 1025:] = 0  # the first plane is red
    with tarfile.open(served / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for i in range(1, 6):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            info.size = records.size
            tar.addfile(info, io.BytesIO(records.tobytes()))
    idx_files(served, gzip.compress, ".gz", "train")
    fetch = torch.hub.download_url_to_file
    monkeypatch.setattr(torch.hub, "download_url_to_file", partial(fetch, progress=False))
    for name, addresses in ddpm_ema.DOWNLOADS.items():
        files = [served / Path(address).name for address in addresses]
        right = {f.as_uri(): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}
        monkeypatch.setitem(ddpm_ema.DOWNLOADS, name, dict.fromkeys(right, "00"))
        assert "hash" in fails(capfd, "--preset=cifar10" if name == "cifar10" else f"--data={name}")
        with mock.patch.dict(os.environ, DDPM_EMA_DEBUG="1"), pytest.raises(RuntimeError):
            command("--data", name)  # with its traceback
        monkeypatch.setitem(ddpm_ema.DOWNLOADS, name, right)
        Dataset(*ddpm_ema.read_data(name))
    shutil.rmtree(served)
    mnist, fashion, cifar = (Dataset(*ddpm_ema.read_data(name)) for name in ddpm_ema.DOWNLOADS)
    assert cifar.images.shape == (200, 3, 32, 32) and cifar.labels[:4].tolist() == [0, 1, 2, 0]
    assert cifar.images[0].float().mean((1, 2)).tolist() == [200, 0, 0]
    assert np.array_equal(mnist.images[:, 0], PIXELS) and np.array_equal(fashion.labels, CLASSES)


def test_what_metrics_are_made_of():
    features, counts = torch.randn(9000, 5) + 100, torch.randint(4, (9000,))
    mean, cov = ddpm_ema.moments(features, counts.double())
    repeated = features.double().numpy().repeat(counts, axis=0)
    np.testing.assert_allclose(mean, repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(repeated.T), rtol=1e-9, atol=1e-12)
    m1, m2, low = *torch.randn(2, 6).double(), torch.randn(6, 3).double()
    a, b = low @ low.T, torch.diag(torch.rand(6).double())  # one is singular; they do not commute
    roots = np.sqrt(np.linalg.eigvals((a @ b).numpy()).real.clip(0)).sum()
    closed = ((m1 - m2).square().sum() + a.trace() + b.trace()).item() - 2 * roots
    assert ddpm_ema.frechet_distance(m1, a, m2, b) == pytest.approx(closed, rel=1e-6)
    for name, value in (("fd", 0.5), ("precision", 1.1), ("recall", 1.1), ("tail_share", 1.1)):
        rows = [{}, {name: 2}, {name: 1.1}, {name: 0.5}]
        assert min(rows, key=partial(ddpm_ema.cost, metric=name)) == {name: value}
    real, fake = torch.randn(2500, 4), torch.randn(1300, 4) * 1.5
    radius = torch.cdist(real, real).sort(1).values[:, 3]  # to the third neighbour
    naive = (torch.cdist(fake, real) <= radius).any(1)
    assert (ddpm_ema.manifold_share(fake, real) != naive).sum() <= 1  # a tie may round either way
    unlabelled = Dataset(30 * np.mgrid[:40, :8, :8][1][:, None])
    ddpm_ema.train_classifier(net := ddpm_ema.make_classifier(1, 2), unlabelled, 20)
    features = net.features(torch.cat([x0 := unlabelled.x0([0]), x0.flip(2)]))
    assert net.logits(features).softmax(1).diagonal().min() > 0.9  # the way up
    noise, log = np.random.default_rng(0).normal(0, 0.1, 4001), []  # the average falls steadily
    for step, each in enumerate(noise):
        for name, loss in (("raw", 5 - step / 4000 + each), ("0.9", 9 - step / 500)):
            log.append({"step": step, "name": name, "held_out_loss": loss})
    raw, average = ddpm_ema.settled(log)
    assert raw["wobble"] == pytest.approx(0.1, rel=0.1) and average["wobble"] < 1e-9
    assert average["reached"] == pytest.approx(500 * (9 - (5 - 3500 / 4000)), abs=10)


def test_metrics_their_spreads_and_the_digits_that_these_are_worth():
    """100 samples of 4 modes with true shares .4 .3 .2 .1, of which the last is missing."""
    real = torch.cat([torch.randn(100, 3), torch.randn(300, 3) + 50])  # samples lack three quarters
    reference = {"moments": ddpm_ema.moments(real, torch.ones(400).double()), "features": real,
                 "shares": torch.tensor([0.4, 0.3, 0.2, 0.1]).double()}
    mode = torch.tensor([0] * 50 + [1] * 40 + [2] * 10)
    row = ddpm_ema.measure(real[:100], mode, reference, 1000)
    assert row["precision"] == 1 and row["recall"] == 0.25 and row["precision_sd"] == 0
    assert row["tail_share"] == pytest.approx(0.1 / 0.3)
    assert row["modes"] == pytest.approx([1.25, 4 / 3, 0.5, 0])
    spreads = [(0.1 * 0.9 / 100) ** 0.5 / 0.3, (0.25 * 0.75 / 400) ** 0.5]
    assert [row["tail_share_sd"], row["recall_sd"]] == pytest.approx(spreads, rel=0.1)
    assert ddpm_ema.measure(real, mode[[0] * 400], reference)["fd"] == pytest.approx(0, abs=1e-6)
    far = ddpm_ema.measure(real + 1e4, mode[[0] * 400], reference, 1000)  # |mean - mean|²
    assert far["fd_sd"] == pytest.approx(2e4 * (real.sum(1).std() / 20).item(), rel=0.1)
    row = {"fd": 20.43, "fd_sd": 1.6, "is": 3.0, "is_sd": 4e-16, "recall": 0.51, "recall_sd": 0.021,
           "n": 999.9999}
    cells = [ddpm_ema.cell(row, field) for field in ("fd", "is", "recall", "precision", "n")]
    assert cells == ["20.4 ± 1.6", "3", "0.51 ± 0.02", "-", "1,000"]


# ==== The command and the toy =====================================================================
NETWORK = {"widths": (4, 8), "attention": (1,)}
TINY = ["--batch-size", "8", "--num-samples", "32", "--sample-steps", "2", "--log-every", "2",
        "--save-every", "3", "--lr", "0.05"]
FLAGS = "--steps", "8", "--decay", "0,0.9", "--stages", "0.5,1"  # of the run `whole`
SAMPLES = "32 by dpm++ in 2 steps"
FIGURES = {}  # the last of each name
CANDIDATES = ("0.91", "0.95", "0.97")


def command(*flags, program=main, pictures=False):
    """In this process; the network is tiny, its classifier trains briefly, pictures are empty."""
    def savefig(figure, path, true=Figure.savefig, **options):
        FIGURES[Path(path).name.removeprefix("tmp-")] = figure
        return true(figure, path, **options) if pictures else Path(path).touch()

    brief = partial(ddpm_ema.train_classifier, num_steps=20)
    with (mock.patch.dict(PRESETS["small"], {"network": NETWORK, "warmup": 3}),
          mock.patch.multiple(ddpm_ema, train_classifier=brief, CANDIDATES=CANDIDATES),
          mock.patch.object(Figure, "savefig", savefig)):
        program([*map(str, flags)])


def run(data, out, *flags, **options):
    command("--data", data, "--out", out, *TINY, *flags, **options)


def fails(capfd, *flags, **options):
    """The one line with which a command refuses these flags."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*flags, **options)
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
                           rows=ddpm_ema.read_rows(folder / "whole"), held_out=held_out,
                           training=training)


def test_rows_and_pictures_are_of_the_weights_that_they_name(bars):
    names = ["real", "raw", "0", "0.9", "0.9 debiased"]
    assert [key[:2] for key in bars.rows if key[2] == SAMPLES] == [
        (step, name) for step in (4, 8) for name in names]
    assert {step for step, _, samples in bars.rows if samples == ""} == {0, 2, 4, 6, 8}
    for (step, name, samples), row in bars.rows.items():
        share = None if name in ("raw", "real") else float(name.split()[0]) ** step
        assert row.get("init_share") == pytest.approx(share)
    for step in (4, 8):  # decay 0 is raw, 0.9 is not
        raw, zero, plain, debiased = (bars.rows[step, name, SAMPLES] for name in names[1:])
        for name in ("fd", "precision", "recall", "tail_share", "held_out_loss"):
            assert zero[name] == pytest.approx(raw[name], rel=1e-3, abs=1e-6), name
        for name in ("fd", "held_out_loss"):
            assert len({round(row[name], 5) for row in (raw, plain, debiased)}) == 3
        raw, zero, plain = (bars.rows[step, name, ""] for name in names[1:4])
        assert zero["distance_raw"] < 1e-4 and plain["distance_raw"] > 0.1 < raw["distance_initial"]
        assert math.isclose(plain["half_life_images"] / plain["horizon"], 0.8 * math.log(0.5, 0.9))
    for name in ("samples", "curves", "sweep"):
        assert matplotlib.image.imread(bars.whole / f"{name}.png").std() > 0.01
    axes = bars.figures["samples.png"].axes
    fds = [[bars.rows[step, w, SAMPLES]["fd"] for w in ("raw", "0", "0.9")] for step in (4, 8)]
    labels = [axis.get_ylabel().splitlines() for axis in axes]
    assert [label[0] for label in labels] == names and labels[3][2] == "init share 0.43"
    assert len({label[1] for label in labels}) > 2  # each with its own distance
    real, raw, zero, plain, debiased = (np.array(axis.images[0].get_array()) for axis in axes)
    assert np.allclose(raw, zero, atol=0.05)
    assert np.allclose(255 * plain, (255 * plain).round(), atol=1e-3)  # as stored
    for a, b in itertools.combinations((real, raw, plain, debiased), 2):
        assert np.abs(a - b).max() > 0.05
    loss, plane = bars.figures["curves.png"].axes
    points = [(line.get_ls(), len(line.get_xdata())) for line in loss.lines]
    assert sorted(points) == [("-", 5)] * 3 + [("--", 5)] * 2
    curves = {each.get_label(): each.lines[0].get_ydata()[-1] for each in loss.containers}
    assert all(curves[name] == bars.rows[8, name, ""]["held_out_loss"] for name in names[1:4])
    drawn = {point for line in plane.lines for point in zip(*line.get_data())}
    assert drawn == {(row["distance_initial"], row["distance_raw"]) for (_, name, samples), row
                     in bars.rows.items() if not samples and name in (*names, "0 debiased")}
    solid = [[[*line.get_ydata()] for line in axis.lines if line.get_ls() in "-:"]  # : is real
             for axis in bars.figures["sweep.png"].axes]
    assert solid[0][:2] == fds and (len(solid[4]), len(solid[2][0])) == (3, 2)  # 0.9 is left out


def test_four_steps_replayed_plainly(bars, tmp_path, capfd):
    """Times, warm-up, flips, clipping, cooldown, Adam, averages and their held-out loss."""
    def times(u):  # logit-normal
        return (1000 / (1 + (-torch.distributions.Normal(0, 1).icdf(u)).exp())).long()
    with mock.patch.dict(PRESETS["small"], flip=True), mock.patch.dict(NETWORK, dropout=0.1):
        run(bars.data, tmp_path, "--steps", "4", "--decay", "0.9", "--cooldown", "0.5",
            "--seed", "1", "--sampler", "ddpm", "--sample-steps", "3")
    words = (0, 1, 0), (2, 1, 0), *((1, 1, step) for step in range(4))
    init, start, *seeds = (int(np.random.SeedSequence(each).generate_state(1)[0]) for each in words)
    torch.manual_seed(init)
    model, diffusion, norms = UNet(1, **NETWORK, dropout=0.1), Diffusion("cosine", "v"), []
    model.to(memory_format=torch.channels_last)  # the order in which dropout draws
    adam, ema = torch.optim.Adam(model.parameters()), EMA(model, "0.9")
    for step, seed in enumerate(seeds):
        torch.manual_seed(seed)
        index, t = torch.randint(160, (8,)), times(torch.rand(8))
        flip, x0 = torch.rand(8) >= 0.5, bars.training[index] / 127.5 - 1
        x0[flip] = x0[flip].flip(3)
        adam.zero_grad()
        diffusion.loss(model, x0, t, torch.randn(8, 1, 8, 8)).mean().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        adam.param_groups[0]["lr"] = 0.05 * min(1, (step + 1) / 3) * min(1, (4 - step) / 2)
        adam.step()
        ema.update()
    assert max(norms) > 2 * min(norms) > 2  # they are clipped, by different factors
    rows, noise = ddpm_ema.read_rows(tmp_path), torch.Generator().manual_seed(0)
    eps, t = torch.randn(40, 1, 8, 8, generator=noise), times((torch.arange(40) + 0.5) / 40)
    for name in ("raw", "0.9", "0.9 debiased"):
        with contextlib.nullcontext() if name == "raw" else ema.applied(debias=name != "0.9"):
            loss = diffusion.loss(model.eval(), bars.held_out / 127.5 - 1, t, eps).mean().item()
        assert rows[4, name, ""]["held_out_loss"] == pytest.approx(loss, rel=2e-4)
    eps = torch.randn(8, 1, 8, 8, generator=noise.manual_seed(start))
    *_, (_, x0, _) = diffusion.sample(model, eps, 3, "ddpm", 1.0, noise)
    drawn = FIGURES["samples.png"].axes[1].images[0].get_array()[:, :, 0].reshape(8, 8, 9)[..., :8]
    np.testing.assert_allclose(2 * drawn - 1, x0[:, 0].swapaxes(0, 1), atol=0.02)
    assert rows[4, "real", "32 by ddpm in 3 steps"]["fd"] == bars.rows[4, "real", SAMPLES]["fd"]
    assert "steps 4, not 5" in fails(capfd, "--out", tmp_path, "--steps", "5")


def death(owner, name, calls, error=KeyboardInterrupt):
    """Inside, that call of owner.name fails."""
    true, count = getattr(owner, name), itertools.count(1)

    def call(*values, **options):
        if next(count) == calls:
            if owner is torch:
                Path(values[1]).write_bytes(b"half")
            raise error
        return true(*values, **options)

    return mock.patch.object(owner, name, call)


@pytest.mark.parametrize("owner, name, calls, error", [
    (torch, "save", 1, KeyboardInterrupt), (EMABank, "update", 6, KeyboardInterrupt),
    (ddpm_ema, "measure", 8, KeyboardInterrupt), (torch, "save", 3, OSError(28, "disk is full"))])
def test_a_run_that_died_ends_as_if_it_had_not(bars, tmp_path, capfd, owner, name, calls, error):
    with death(owner, name, calls, error), pytest.raises((KeyboardInterrupt, SystemExit)):
        run(bars.data, tmp_path, *FLAGS)
    assert error is KeyboardInterrupt or "disk is full\n" in capfd.readouterr().err
    run(bars.data, tmp_path, *FLAGS)
    assert bars.rows.items() <= ddpm_ema.read_rows(tmp_path).items()  # to the last bit
    assert not [*tmp_path.glob("tmp-*")]


def test_killed_processes_go_on_and_diverged_ones_keep_what_was_good(bars, tmp_path, capfd):
    """The real command, after fewer steps: Ctrl-C, then SIGKILL in an evaluation."""
    run(bars.data, tmp_path, "--steps", "3", "--decay", "0,0.9")
    script = [sys.executable, ddpm_ema.__file__, "--out", tmp_path, "--steps=8", "--stages=0.5,1"]
    for line, number, code in (("step 4/", signal.SIGINT, 130), ("step 4, ", signal.SIGKILL, -9)):
        process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)
        next(printed for printed in process.stdout if printed.startswith(line))
        process.send_signal(number)
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == code and "Traceback" not in rest
        assert code < 0 or "the same command goes on" in rest.splitlines()[-1]
    run(bars.data, tmp_path, *FLAGS)
    assert bars.rows.items() <= ddpm_ema.read_rows(tmp_path).items()  # to the last bit
    for steps in "91":
        flags = "--data", bars.data, *TINY, "--lr=1e30", "--log-every=4", "--steps", steps
        assert "diverged" in fails(capfd, *flags, "--out", tmp_path / steps)  # also at a save alone
        assert torch.load(tmp_path / steps / "last.pt", weights_only=True)["step"] == 0


def test_the_same_command_another_decay_auto_sweep_and_more_steps(bars, tmp_path, capfd):
    out = shutil.copytree(bars.whole, tmp_path / "run")
    with mock.patch.object(EMABank, "update", side_effect=ValueError):  # no training
        with mock.patch.object(ddpm_ema, "measure", side_effect=ValueError):
            run(bars.data, out, *FLAGS)
        lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
        assert max(map(len, lines)) <= 120 and all(line.endswith("|") for line in lines)
        for start, count in (("| 4    | 0.9 debiased | 0.656 ", 1), ("| 8    | 0.9 debiased |", 2)):
            assert sum(line.startswith(start) for line in lines) == count  # with the init share
        run(bars.data, out, "--decay", "0.97")
        added = ddpm_ema.read_rows(out).keys() - bars.rows.keys()
        new = {key[:2] for key in added if key[2] == SAMPLES}
        assert new == {(step, f"0.97{d}") for step in (4, 8) for d in ("", " debiased")}
    run(bars.data, out, "--steps", "10")
    assert {(10, "0.9", SAMPLES), (8, "raw", "")} <= ddpm_ema.read_rows(out).keys()
    run(bars.data, out, "--steps", "8")
    assert "| 10 " not in capfd.readouterr().out.split("held out loss")[-1].split("init share")[0]
    with mock.patch("torch.nn.functional.cross_entropy", wraps=nn.functional.cross_entropy) as spy:
        run(bars.data, out := tmp_path / "new", "--steps", "1", "--decay", "sweep,auto")
    counts = torch.cat([call.args[1] for call in spy.call_args_list]).bincount()
    assert len(counts) == 4 and counts.min() > 0.8 * counts.max()  # rare classes as often
    run(bars.data, out, "--steps", "2")  # sweep and auto are still what was asked for
    rows = {key[1:]: row for key, row in ddpm_ema.read_rows(out).items() if key[0] == 2}
    found = {name for name, samples in rows if samples == SAMPLES}
    sweep = {f"0.{n}" for n in (5, 9, 99, 999, 9993, 9995, 9997, 9999, 99999, 999999)}
    tried = [name for name, samples in rows if samples == "" and name[:4] in CANDIDATES]
    lowest = min(tried, key=lambda name: rows[name, ""]["held_out_loss"])
    auto = lowest.split()[0]
    assert sweep < found and found & {*tried} == {auto, f"{auto} debiased"}
    run(bars.data, out, "--decay=0.9", "--sampler=ddim")
    command("--report", out, bars.whole, "--out", tmp_path / "report")
    printed = capfd.readouterr().out.split("over bootstrap")[-3:]
    assert printed[0].count("| 2    | raw ") == 1


def test_two_processes_give_the_losses_of_one(bars, tmp_path):
    with death(EMABank, "update", 1), pytest.raises(KeyboardInterrupt):
        run(bars.data, tmp_path, *FLAGS)
    line = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "torch.distributed.run",
            "--standalone", "--nproc-per-node=2", ddpm_ema.__file__, "--out", tmp_path, "--steps=4"]
    printed = subprocess.check_output(line, timeout=120)
    assert printed.count(b"step 4, raw:") == 1  # one process measures it, and one speaks
    assert len((tmp_path / "metrics.jsonl").open().readlines()) == len(ddpm_ema.read_rows(tmp_path))
    run(bars.data, tmp_path, *FLAGS)  # goes on with one
    ours = ddpm_ema.read_rows(tmp_path)
    for key, row in bars.rows.items():
        for name in {"held_out_loss", "distance_initial"} & set(row):
            assert ours[key][name] == pytest.approx(row[name], rel=1e-3)


class Colours(nn.Module):
    """Stands for Inception: uint8 in, with the flag that some of them have."""
    def forward(self, x, return_features: bool = False):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return x.float().mean((2, 3)) if return_features else x.float()[:, :, 0, 0]


def test_features_of_a_file(bars, tmp_path):
    features = str(tmp_path / "colours.pt")
    torch.jit.script(Colours()).save(features)
    with mock.patch.object(ddpm_ema, "measure", wraps=ddpm_ema.measure) as spy:
        run(bars.data, tmp_path / "run", "--steps=1", "--num-samples=16", "--features", features)
        run(bars.data, tmp_path / "run", "--num-samples=300")
    sampled, _, real = spy.call_args.args
    same(spy.call_args_list[0].args[2]["moments"], real["moments"])  # of all images
    data = Dataset(*ddpm_ema.read_data(str(bars.data)))
    assert (sampled[:44] != sampled[256:]).any()  # each batch has its own noise
    assert (real["shares"] * 160).round().tolist() == data.labels[data.train].bincount().tolist()
    row = [row for row in ddpm_ema.read_rows(tmp_path / "run").values() if row["name"] == "real"][1]
    ours, real = (images.double().mean((1, 2, 3)) for images in (bars.held_out, bars.training))
    fid = 3 * ((ours.mean() - real.mean()) ** 2 + (ours.std() - real.std()) ** 2)  # all grey
    assert row["fd"] == pytest.approx(fid.item(), rel=1e-3)
    assert features in row["samples"]


LONELY = np.insert(np.arange(39) % 2, torch.randperm(
    40, generator=torch.Generator().manual_seed(0))[0].item(), 2)  # the only one is held out


@pytest.mark.parametrize("images, labels", [
    (PIXELS[:, None], {}), (np.repeat(PIXELS[:, None], 5, 1), {}),
    (PIXELS[:, None], {"labels": LONELY}), (PIXELS[:, None], {"labels": LONELY // 2})])
def test_data_and_names_of_any_kind(images, labels, tmp_path, monkeypatch, capfd):
    """Names with dollars, line breaks, bytes that are no UTF-8 are read, drawn, resumed."""
    monkeypatch.chdir(tmp_path)
    np.savez(name := "a$b_$c\nd\udcff.npz", images=images, **labels)
    for step in (1, 2):
        run(name, f"run-{name}", "--steps", step, "--schedule=flow", "--sampler=ddpm",
            "--decay=auto", pictures=step == 1 and not labels)
    np.savez(name, images=images[:30])
    assert "has data_shape [40, " in fails(capfd, "--data", name, "--out", f"run-{name}")
    rows = [row for row in ddpm_ema.read_rows(Path(f"run-{name}")).values() if "fd" in row]
    assert len(rows) == 8
    assert all(("modes" in row) == bool(labels) for row in rows)  # else there are no known ones
    assert np.isfinite([x for row in rows for x in (row["fd"], *row.get("modes", []))]).all()
    assert np.ptp(FIGURES["samples.png"].axes[1].images[0].get_array()) > 0.1


def test_averages_beat_raw_weights(bars, tmp_path):
    run(bars.data, tmp_path, "--steps=300", "--decay=0.97", "--log-every=300", "--save-every=300",
        "--lr=0.01", "--num-samples=16", "--stages=0.5")  # it goes on after the last stage
    rows = ddpm_ema.read_rows(tmp_path)
    start, raw, average = (rows[key]["held_out_loss"] for key in (
        (0, "raw", ""), (300, "raw", ""), (300, "0.97", "")))
    assert average < 0.97 * raw and average < 0.7 * start


def test_report_pools_seeds_and_ranks_methods(bars, tmp_path, capfd):
    state = torch.load(bars.whole / "last.pt", weights_only=True)
    horizons = {"real": [], "raw": [1.0], "0.9": [10.0], "0.97": [33.0], "0.99": [1e2], "1": [1e3]}
    for objective, seed, *fds in (  # at 0.97, the best of both, v is ahead by 4
            ("v", 0, 1, 20, 11, 5, 9), ("eps", 0, 1, 15, 10.6, 9, 8.8),
            ("v", 1, 1, 22, 9, 5, 12, 1), ("eps", 1, 1, 17, 12.6, 9, 9.8)):
        (folder := tmp_path / f"{objective}{seed}").mkdir()
        state["settings"] |= {"objective": objective, "seed": seed}
        torch.save(state, folder / "last.pt")
        rows = [{"step": 8, "name": name, "samples": SAMPLES, "decay": name, "fd": fd, "fd_sd": 0.5,
                 "debiased": False} | dict(zip(["horizon"], horizon))
                for (name, horizon), fd in zip(horizons.items(), fds)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command("--report", *sorted(tmp_path.iterdir())[::-1] * 2, "--out", tmp_path / "report")
    printed = capfd.readouterr().out
    assert "over 2 seeds" in printed and "10.0 ± 1.4" in printed
    assert not re.search(r"\| real .*\*\*", printed)
    ranking = printed.split("The methods at each decay")[1].splitlines()
    bold = [line.split("**")[0].replace("|", "").split() for line in ranking if "**" in line]
    assert {" ".join(words) for words in bold} == {
        "8 best decay objective v", "8 raw objective eps", "8 0.9 objective v",
        "8 0.9 objective eps", "8 0.97 objective v", "8 0.99 objective v", "8 0.99 objective eps"}
    lines = [list(line.get_ydata()) for line in FIGURES["report.png"].axes[0].lines]
    bench("title", {"call": dict}, 1)  # the benchmarks' own table
    assert [line for line in lines if len(line) == 4] == [[21, 10, 5, 10.5], [16, 11.6, 9, 9.3]]
    torch.save(state | {"settings": {**state["settings"], "data": "x"}}, tmp_path / "v0/last.pt")
    assert "different data" in fails(capfd, "--report", *tmp_path.glob("v?"))


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
    content, whole = (folder / "3d.npz").read_bytes(), (bars.whole / "last.pt").read_bytes()
    files = {"cut.npz": content[:-600], "garbage.npz": b"PK not a zip", "unequal/x": b"",
             "torn/last.pt": whole[:-100], "rowless/last.pt": whole, "broken/a.png": b"",
             "alien/last.pt": b"", "other/metrics.jsonl": b'{"step": 1, "loss": 2}\n',
             "unsaved/metrics.jsonl": (bars.whole / "metrics.jsonl").read_bytes()}
    for name, offset, value in (("encrypted", 6, 1), ("compression", 8, 99)):
        files[f"{name}.npz"] = changed = bytearray(content)
        changed[offset] = changed[content.find(b"PK\1\2") + offset + 2] = value
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    torch.save({"step": 8}, folder / "alien" / "last.pt")
    np.lib.format.write_array_header_1_0(header := io.BytesIO(), {
        "descr": "|u1", "fortran_order": False, "shape": (10**12, 1, 8, 8)})
    for name, content in (("giant", header.getvalue()), ("raw", b"hello")):
        with zipfile.ZipFile(folder / f"{name}.npz", "w") as file:
            file.writestr("images.npy", content)
    for name, height in (("a", 8), ("b", 4)):
        matplotlib.image.imsave(folder / "unequal" / f"{name}.png", PIXELS[0, :height])
    for name, network in (("0", nn.Flatten(0)), ("1", nn.Linear(5, 5))):
        torch.jit.script(network).save(folder / f"{name}.pt")
    (folder / "empty").mkdir()
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
    *((f"--features={{f}}/{name}", "--features") for name in ("raw.npz", "0.pt", "1.pt")),
    ("--data={f}/odd.npz", "divisible"), ("--batch-size=100000000", "memory"),
    *((f"--out={{w}} --{flag}", f", not {flag.split('=')[1]}") for flag in ("preset=cifar10",
        "lr=0.5", "batch-size=4", "seed=1", "cooldown=0.5", "schedule=flow", "objective=eps")),
    ("--data={f}/broken", "a.png: "), ("--out={f}/raw.npz", "raw.npz"), ("--out={f}/loop", "loop"),
    ("--out={f}/raw.npz/x", "raw.npz"), ("--out={f}/loop/x", "loop"), ("--report", "at least one"),
    ("--out={f}/torn", "no checkpoint"), ("--out={f}/alien", "no checkpoint"),
    ("--out={f}/other", "another --out"), ("--out={f}/unsaved", "checkpoints"),
    ("--out={w} --steps=7", "at step 8"), ("--out={w} --stages=0.25", "kept no checkpoint"),
    ("--report {w} --decay=0.9", "not decay"), ("--report {f}/rowless", "in common"),
    ("--report nowhere", "not nowhere"), ("--report {f}/torn", "no checkpoint"),
    ("--out={w} --decay=step", "0.99995"), ("--out={w} --data=glyphs", "data"),
    ("toy --decay=1.5", "1.5"), ("toy --decay=", "decay"), ("toy --steps=4", "from 8"),
    ("toy --seeds=x", "whole"), ("toy --batch-size=0", "from 1"), ("toy --target=clean", "samples"),
    ("toy --device=cpu", "--device"), ("toy --out={f}/raw.npz", "raw.npz")])
def test_bad_input_is_one_line(bars, bad, tmp_path, capfd, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    before, program = sorted(bad.rglob("*")), toy2d.main if flags.startswith("toy") else main
    given = flags.removeprefix("toy ").format(f=bad, w=bars.whole).split(" ")
    if program is main and not re.search("--data|{w}|--report", flags):
        given += ["--data", bars.data]
    assert message in fails(capfd, *given, program=program)
    assert sorted(bad.rglob("*")) == before and not any(tmp_path.iterdir())  # nothing was begun


def test_readme_code_and_parts_pasted_alone_run_and_requirements_agree():
    names = {"torch": torch, "EMA": EMA, "EMABank": EMABank, "Diffusion": Diffusion, "UNet": UNet}
    folder = Path(ddpm_ema.__file__).parent
    readme = (folder / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    for block in blocks:  # one after another
        exec(block, names)  # noqa: S102
    assert len(blocks) == 2 and names["ema"].step == 1000 and names["x_t"].shape == (4, 3, 32, 32)
    sections = re.split("# ==== (.*?) =+\n", Path(ddpm_ema.__file__).read_text())
    for name, code in (
            ("Noise schedules, objectives and samplers",
             "assert len([*Diffusion().sample(lambda x, t: x, torch.ones(2, 1, 8, 8), 5)]) == 6"),
            ("UNet", "assert not UNet()(torch.zeros(1, 1, 8, 8), torch.zeros(1)).any()")):
        section = sections[sections.index(name) + 1]
        exec(section + code, {"__name__": "alone"})  # noqa: S102
        imports = set(re.findall(r"^(?:import|from) (\w+)", section, re.MULTILINE))
        assert imports <= {"contextlib", "math", "torch"}
    required = (folder / "requirements.txt").read_text().split("# tests")[0].split()
    for script in (ddpm_ema, toy2d):
        text = Path(script.__file__).read_text()
        pins = re.search(r"^# dependencies = (.*)$", text, re.MULTILINE)[1]
        assert re.findall(r'"(.*?)"', pins) == required
    assert "-m pytest -q" in readme and "-m pytest -q" in (folder / ".ci" / "run").read_text()


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-11), (np.float32, 1e-5)])
def test_kernel_equals_torchs_gaussians(dtype, tolerance):
    """Also without noise, far away, and with any number of threads."""
    x0, noise = toy2d.sample_tree(1, 1, 300)
    sigma = torch.exp(1.5 * noise[:, 2] - 2.3) * (torch.arange(300) % 3 > 0)
    x = x0 + sigma[:, None] * noise[:, :2]
    x[0] = torch.tensor([2e3, -3e3])
    given, threads = (x.numpy().astype(dtype), sigma.numpy().astype(dtype)), numba.get_num_threads()
    ours = toy2d.evaluate(toy2d.make_tree(dtype)[0], *given)
    numba.set_num_threads(1)
    assert np.array_equal(ours, toy2d.evaluate(toy2d.make_tree(dtype)[0], *given))
    numba.set_num_threads(threads)
    *mean, xx, xy, yy, weight = torch.tensor(toy2d.make_tree()[0].reshape(6, -1)[:, :1016])
    x, noise = x.double().requires_grad_(), sigma.double()[:, None, None, None] ** 2 * torch.eye(2)
    covariance = torch.stack([xx, xy, xy, yy], 1).view(-1, 2, 2) + noise  # [300, 1016, 2, 2]
    gaussians = torch.distributions.MultivariateNormal(torch.stack(mean, 1), covariance)
    logs = gaussians.log_prob(x[:, None])
    log_density = (logs + weight.log()).logsumexp(1)
    score, = torch.autograd.grad(log_density.sum(), x, retain_graph=True)
    square, nearest = (2 * (gaussians.log_prob(gaussians.mean) - logs)).min(1)
    twin = torch.stack([log_density, *score.T, nearest // 8, square.sqrt()], 1).detach().numpy()
    assert (ours[:, 3] == twin[:, 3]).all()
    scale = 1 + np.abs(twin)
    thinnest = covariance.diagonal(dim1=2, dim2=3).amin((1, 2)) ** -0.5  # the size of a score
    scale[:, 1:3] = (score.norm(dim=1) + thinnest).numpy()[:, None]
    assert (np.abs(ours - twin) / scale).max() < tolerance


def test_tree_samples_training_noise_and_preconditioning_are_the_published_ones():
    tree, generation = toy2d.make_tree()
    weight = tree[5].ravel()
    assert tree[:2].reshape(2, -1) @ weight == pytest.approx([0.3718510, 0.3646066], abs=1e-7)
    mass = np.bincount(generation, weight[:1016].reshape(127, 8).sum(1))
    known = [0.2571963, 0.1510545, 0.1526550, 0.1615938, 0.1175527, 0.0865092, 0.0734385]
    assert mass == pytest.approx(known, abs=1e-7)
    assert tree[2:5, 0, 0] == pytest.approx([3.4676e-4, 1.03578e-4, 3.8516e-4], rel=1e-4)
    x0, noise = toy2d.sample_tree(0, 1, 2**16)
    assert noise.mean().abs() < 0.01 and (torch.cov(noise.T) - torch.eye(3)).abs().max() < 0.02
    found = toy2d.coverage(x0)
    assert found["on_tree"] > 0.9995 and found["twigs"] == pytest.approx(1, abs=0.03)
    one, again, step, seed = (
        toy2d.sample_tree(*key, 64)[1] for key in ((0, 1), (0, 1), (0, 2), (1, 1)))
    assert torch.equal(one, again) and (one != step).all() and (one != seed).all()
    model, x, sigma = toy2d.Denoiser(2), torch.randn(2, 3, 2), torch.tensor([[0.01], [0.5], [5.0]])
    nn.init.zeros_(model.weights[-1])
    nn.init.ones_(model.biases[-1])
    total = sigma**2 + 0.25  # with F = 1 the denoiser is c_skip x + c_out
    assert torch.allclose(model(x, sigma), 0.25 / total * x + 0.5 * sigma / total**0.5, atol=1e-6)
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    assert list(toy2d.train(model, toy2d.EMA(model), 8, [4], 1024, "samples")) == [4]
    logs = torch.cat(seen).log()
    assert [logs.mean(), logs.std()] == pytest.approx([-2.3, 1.5], abs=0.05)


def run_toy(out, *flags):
    """The exit code of the command, and the table's mean share on the tree {(step, weights): x}."""
    with mock.patch.object(toy2d, "NUM_SAMPLES", 256), pytest.raises(SystemExit) as end:
        toy2d.main(["--seeds", "2", "--batch-size", "128", "--out", str(out), *flags])
    found = {}
    for row in csv.DictReader((out / "results.csv").open()):
        key = int(row["step"]), row["weights"].removeprefix("EMA ")
        found[key] = found.get(key, 0) + float(row["on_tree"]) / 2
    return end.value.code, found


def test_the_toy_command_and_ctrl_c(tmp_path, capsys):
    code, rows = run_toy(tmp_path / "a", "--steps", "64", "--decay", "0,halflife:1000000")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    run_toy(tmp_path / "b", "--steps", "64", "--decay", "0,halflife:1000000")
    files = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert code == 0 and [path.name for path in files[0]] == [
        "results.csv", "stages.png", "toy2d.png", "trajectories.png"]
    for one, other in zip(*files):  # bit for bit
        assert one.read_bytes() == other.read_bytes()
    raw, still = rows[64, "raw"], rows[64, "halflife:1000000"]
    assert rows[64, "exact denoiser"] > 0.99 and raw > rows[8, "raw"] + 0.1  # it learns
    assert rows[64, "0"] == pytest.approx(raw, abs=0.01)  # decay 0 is raw, this one stays behind:
    assert still == pytest.approx(rows[8, "halflife:1000000"], abs=0.01) and still < raw - 0.1
    assert rows[64, "halflife:1000000 debiased"] > still + 0.05
    assert len(printed) == len(rows) + 2 and "| 1          |" in printed[-1]
    assert [*rows.values()][-1] == pytest.approx(float(printed[-1].split("|")[5][:5]), abs=0.01)
    for name, least in (("toy2d.png", 1000), ("trajectories.png", 3000), ("stages.png", 2000)):
        picture = matplotlib.image.imread(tmp_path / "a" / name)[60:-60, :, :3]  # no legend
        assert (np.ptp(picture, axis=2) > 0.15).sum() > least, name
    with death(toy2d, "sample_stage", 2, KeyboardInterrupt):
        code, rows = run_toy(tmp_path / "c", "--steps", "8")  # stops, and keeps the stages reached
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("stopped") and "| raw " in printed and code == 130
    assert {step for step, _ in rows} == {1} and len([*(tmp_path / "c").iterdir()]) == 1


# ==== Benchmarks: python test_ddpm_ema.py =========================================================
def bench(title, calls, repeats=32):  # in milliseconds, the least of 12 rounds through all
    rounds = [[timeit.timeit(call, number=repeats) for call in calls.values()] for _ in range(12)]
    times = [1e3 / repeats * min(each) for each in zip(*rounds)]
    rows = [{title: name, "ms": ms, "ratio": ms / times[0]} for name, ms in zip(calls, times)]
    ddpm_ema.print_rows(rows, ("ms", "ratio"), (title,))


def bench_ema(total, tensors):
    model = nn.ParameterList(torch.randn(total // tensors) for _ in range(tensors))
    decays = [1 - 0.1 * 0.5**i for i in range(10)]
    averaged = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) for decay in decays]
    bench(f"{total:,} in {tensors} tensors", {
        "one AveragedModel": lambda: averaged[0].update_parameters(model),
        "EMA": EMA(model, decays[0]).update})
    ten = {"ten AveragedModels": lambda: [each.update_parameters(model) for each in averaged],
           "EMABank": EMABank(model, decays).update,
           "EMABank, ladder=None": EMABank(model, decays, ladder=None).update}
    bench(f"{total:,} in {tensors} tensors", ten)


def bench_toy():  # 4,096 exact scores of the toy's tree, by einsum and by its kernel
    def einsum():
        u = torch.einsum("kij,nki->nkj", turn, x[:, None] - torch.stack(mean, 1))  # [N, K, 2]
        logs = (weight / var.prod(2).sqrt()).log() - torch.einsum("nkj,nkj->nk", u, u / var) / 2
        return -torch.einsum("nk,kij,nkj->ni", logs.softmax(1), turn, u / var)

    x, tree = toy2d.sample_tree(0, 1, 4096)[0], toy2d.make_tree(np.float32)[0].reshape(6, -1)
    *mean, xx, xy, yy, weight = torch.tensor(tree[:, :1016])
    var, turn = torch.linalg.eigh(torch.stack([xx, xy, xy, yy], 1).view(-1, 2, 2))
    var = (var + 0.1**2).expand(4096, -1, -1)
    bench("float32", {"einsum": einsum, "Numba": lambda: toy2d.mixture(x, 0.1)}, 1)


if __name__ == "__main__":
    bench_ema(1_500_000, 240)
    bench_ema(9_400_000, 32)
    bench_toy()
