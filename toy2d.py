# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numba==0.68.1", "numpy==2.4.6", "matplotlib==3.11.2"]
# ///
"""How a long EMA starves the branches of a tree: raw weights against averages, in two dimensions.

The data is the tree of Karras et al. 2024 (arXiv:2406.02507): 127 branches in 7 generations, each
a row of 8 Gaussians. Its density, score and samples are exact, so that coverage is counted, not
guessed. With noise of standard deviation σ every component's covariance Σ becomes Σ + σ² I and

    score(x; σ) = ∇ log p(x; σ),    D(x; σ) = E[x0 | x] = x + σ² score(x; σ).

An MLP F is trained as a denoiser in the preconditioning of Karras et al. 2022 (arXiv:2206.00364),

    D = c_skip x + c_out F(c_in x, ln σ / 4),  c_skip = σd² / (σ² + σd²),  σd = 0.5,
    c_in = (σ² + σd²)^-½,  c_out = σ σd c_in,  loss |D - x0|² / c_out²,
    ln σ ~ N(-2.3, 1.5²),

and its raw and averaged weights (EMA, ddpm_ema.py) are sampled with Heun's method from the same
starting points. Several seeds train together in one batched model.

    python toy2d.py                                  # 3 seeds, 3 pictures and a table
    python toy2d.py --seeds 6 --decay 0.99,0.998,power:0.1
    python toy2d.py --target exact                   # regress on D itself instead of on samples

Measured at step 2048, mean of 5 seeds: the twigs of generations 5 and 6 hold 0.61 of their true
mass with raw weights, 0.57 with decay 0.998, 0.47 with 0.999 and 0.54 with 0.999 debiased.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numba import njit, prange, types
from numba.extending import overload

from ddpm_ema import EMA

GENERATIONS = 7
BRANCHES = 2**GENERATIONS - 1
PER_BRANCH = 8  # Gaussians on a branch
SIGMA_DATA = 0.5
ON_MANIFOLD = 4  # standard deviations from the nearest Gaussian, at most
NUM_SAMPLES = 4096  # per seed and set of weights
SIGMAS = [(5 ** (1 / 7) + i / 31 * (0.002 ** (1 / 7) - 5 ** (1 / 7))) ** 7 for i in range(32)] + [0]
MEASURES = ["on_manifold", "overlap", "kl", *(f"mass_{g}" for g in range(GENERATIONS))]

# ==================================================================================================
# The tree: a Gaussian mixture, exactly (Numba)
# ==================================================================================================

FAST = {"contract", "nnan", "nsz", "reassoc"}  # what vectorising needs; infinities stay legal
POINTS = 64  # points that a thread takes at a time
LANES = 64  # components that are skipped or summed together
STEP = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64 (Steele et al. 2014)
MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@functools.cache
def make_tree(dtype=np.float64):
    """The tree of arXiv:2406.02507, as RandomState(2) draws it: depth first, 1,016 Gaussians.

    Returns them in rows of LANES, `dtype` [7, rows, LANES]: mean_x, mean_y, axis_x, axis_y, var_u,
    var_v and weight, with the columns (axis_x, axis_y) and (-axis_y, axis_x) of R in
    Σ = R diag(var_u, var_v) R^T (what fills the last row has weight 0); the margin of energy
    beyond which `evaluate` leaves a Gaussian out; and each branch's generation [BRANCHES].
    """
    rng = np.random.RandomState(2)
    scale = np.array([1.3136, 1.3844])
    weights, means, covariances, generation = [], [], [], []

    def grow(depth, start, angle):
        if depth == GENERATIONS:
            return
        length = 0.292 * 0.8**depth * (1 + 0.2 * rng.randn())
        direction = np.array([math.cos(angle), math.sin(angle)])
        along = np.outer(direction, direction)
        thickness = 0.2 * 0.8**depth / length
        covariance = (along + (np.eye(2) - along) * thickness**2) * (0.06 * length) ** 2
        where = np.linspace(0.07, 0.93, PER_BRANCH)[:, None] * length
        weights.append(length * 0.5**depth)
        means.append((start + where * direction) * scale)
        covariances.append(covariance * np.outer(scale, scale))
        generation.append(depth)
        for sign in (1, -1):
            turn = sign * 0.7**depth * (1 + 0.2 * rng.randn())
            grow(depth + 1, start + length * direction, angle + turn)

    grow(0, np.array([0.0030, 0.0325]), math.pi / 4)
    var, vectors = np.linalg.eigh(np.repeat(covariances, PER_BRANCH, axis=0))
    weight = np.repeat(weights, PER_BRANCH) / (PER_BRANCH * sum(weights))

    # A Gaussian with `margin` more energy than the least has at most exp(-margin) · spread of its
    # mass, whatever σ: noise pulls the ratio of two determinants towards 1. All those left out
    # are below 1e-6 (float32) or 1e-15 of the sum.
    area = np.sqrt(var.prod(1))
    spread = weight.max() / weight.min() * area.max() / area.min()
    margin = math.log(len(weight) * spread / (1e-6 if dtype == np.float32 else 1e-15))

    means = np.float32(np.concatenate(means)).T  # exact in both dtypes
    rows = [*means, *vectors[:, :, 0].T, *var.T]
    fill = -len(weight) % LANES
    rows = [np.pad(row, (0, fill), "edge") for row in rows] + [np.pad(weight, (0, fill))]
    tree = np.array(rows, dtype).reshape(len(rows), -1, LANES)
    return tree, dtype(margin), np.array(generation)


def _exp(x):
    """e^x for x <= 0. In float32 a polynomial, which vectorises where a library call does not."""


@overload(_exp)
def _exp_overload(x):
    if x != types.float32:
        return lambda x: math.exp(x)
    log2e, ln2, half = np.float32(1 / math.log(2)), np.float32(math.log(2)), np.float32(0.5)
    one, c2, c3, c4, c5, c6 = (np.float32(1 / math.factorial(n)) for n in range(1, 7))
    bias, mantissa = np.int32(127), np.int32(23)

    def exp32(x):
        n = np.floor(x * log2e + half)
        r = x - n * ln2  # |r| <= ln 2 / 2
        p = one + r * (one + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * c6)))))
        return p * np.int32(np.int32(np.int32(n) + bias) << mantissa).view(np.float32)  # p 2^n

    return exp32


@njit(fastmath=FAST, error_model="numpy")
def _evaluate_point(tree, margin, px, py, noise, energy, least):
    """`evaluate` at one point; noise is σ². Scratch: energy [rows, LANES] and least [LANES]."""
    mean_x, mean_y, axis_x, axis_y = tree[0], tree[1], tree[2], tree[3]
    var_u, var_v, weight = tree[4], tree[5], tree[6]
    half = energy.dtype.type(0.5)
    lowest = energy.dtype.type(-80)  # e^-80 still is a normal float32
    rows = len(energy)
    for row in range(rows):
        for k in range(LANES):  # half the squared Mahalanobis distance
            du, dv = var_u[row, k] + noise, var_v[row, k] + noise
            dx, dy = px - mean_x[row, k], py - mean_y[row, k]
            u = axis_x[row, k] * dx + axis_y[row, k] * dy
            v = axis_x[row, k] * dy - axis_y[row, k] * dx
            energy[row, k] = half * (u * u * dv + v * v * du) / (du * dv)
    least[:] = energy[0]
    for row in range(1, rows):
        for k in range(LANES):
            least[k] = min(least[k], energy[row, k])
    lane = least.argmin()
    best, nearest = least[lane], energy[:, lane].argmin() * LANES + lane
    total = sum_x = sum_y = energy.dtype.type(0)
    for row in range(rows):
        near = 0
        for k in range(LANES):
            near += energy[row, k] <= best + margin
        if near == 0:
            continue
        for k in range(LANES):
            du, dv = var_u[row, k] + noise, var_v[row, k] + noise
            dx, dy = px - mean_x[row, k], py - mean_y[row, k]
            u = (axis_x[row, k] * dx + axis_y[row, k] * dy) / du
            v = (axis_x[row, k] * dy - axis_y[row, k] * dx) / dv
            part = _exp(max(best - energy[row, k], lowest)) * weight[row, k] / math.sqrt(du * dv)
            total += part
            sum_x -= part * (axis_x[row, k] * u - axis_y[row, k] * v)
            sum_y -= part * (axis_y[row, k] * u + axis_x[row, k] * v)
    log_density = math.log(total) - math.log(2 * math.pi) - best
    return log_density, sum_x / total, sum_y / total, nearest, math.sqrt(2 * best)


@njit(parallel=True, cache=True, fastmath=FAST, error_model="numpy")
def evaluate(tree, margin, x, sigma):
    """Log-density [N], score [N, 2], nearest branch [N] and distance [N] at x [N, 2], noise [N].

    distance: in standard deviations of the nearest component (Mahalanobis). One dtype throughout,
    float64 or, for speed, float32. Sums are log-sum-exp, finite for any finite x. One thread
    works on a point in one order, so that the bits do not depend on the number of threads.
    """
    num = len(x)
    log_density, score = np.empty(num, x.dtype), np.empty((num, 2), x.dtype)
    branch, distance = np.empty(num, np.int64), np.empty(num, x.dtype)
    for block in prange((num + POINTS - 1) // POINTS):
        energy, least = np.empty(tree.shape[1:], x.dtype), np.empty(LANES, x.dtype)
        for i in range(block * POINTS, min(num, (block + 1) * POINTS)):
            noise = sigma[i] * sigma[i]
            result = _evaluate_point(tree, margin, x[i, 0], x[i, 1], noise, energy, least)
            log_density[i], score[i, 0], score[i, 1], nearest, distance[i] = result
            branch[i] = nearest // PER_BRANCH
    return log_density, score, branch, distance


@njit
def _uniform(key, counter):
    """SplitMix64 as a function of (key, counter): a uniform number in (0, 1)."""
    z = key + (np.uint64(counter) + np.uint64(1)) * STEP
    z = (z ^ (z >> np.uint64(30))) * MIX[0]
    z = (z ^ (z >> np.uint64(27))) * MIX[1]
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(12)) * 2.0**-52 + 2.0**-53


@njit
def _normals(key, counter):
    """Two standard normal numbers (Box and Muller 1958)."""
    radius = math.sqrt(-2 * math.log(_uniform(key, counter)))
    angle = 2 * math.pi * _uniform(key, counter + 1)
    return radius * math.cos(angle), radius * math.sin(angle)


@njit(parallel=True, cache=True)
def draw(tree, cumulative, seeds, step, num):
    """Exact samples x0 float32 [S, num, 2] and standard normal noise float32 [S, num, 3].

    Point i of seed s at a step has its own random stream, a function of (s, step, i) alone.
    """
    mean_x, mean_y, axis_x, axis_y = tree[0], tree[1], tree[2], tree[3]
    var_u, var_v = tree[4], tree[5]
    x0 = np.empty((len(seeds), num, 2), np.float32)
    noise = np.empty((len(seeds), num, 3), np.float32)
    for job in prange(len(seeds) * num):
        s, i = job // num, job % num
        key = np.uint64(_uniform(np.uint64(seeds[s]), step) * 2.0**53) << np.uint64(11)
        index = np.searchsorted(cumulative, _uniform(key, 8 * i), side="right")
        row, k = index // LANES, index % LANES
        u, v = _normals(key, 8 * i + 1)
        u, v = u * math.sqrt(var_u[row, k]), v * math.sqrt(var_v[row, k])
        x0[s, i, 0] = mean_x[row, k] + axis_x[row, k] * u - axis_y[row, k] * v
        x0[s, i, 1] = mean_y[row, k] + axis_y[row, k] * u + axis_x[row, k] * v
        noise[s, i, 0], noise[s, i, 1] = _normals(key, 8 * i + 3)
        noise[s, i, 2], _ = _normals(key, 8 * i + 5)
    return x0, noise


def sample_tree(seeds, step, num):
    """Exact samples x0 [S, num, 2] and standard normal noise [S, num, 3] as tensors, see `draw`."""
    tree = make_tree()[0]
    cumulative = np.cumsum(tree[6])
    streams = np.array(seeds, np.uint64), np.uint64(step)
    drawn = draw(tree, cumulative / cumulative[-1], *streams, num)
    return [torch.from_numpy(values) for values in drawn]


def evaluate_tensor(x, sigma):
    """`evaluate` in float32 for a tensor x [..., 2] and σ [..., 1] or a number; flat arrays."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(*x.shape[:-1], 1)
    x, sigma = x.cpu().reshape(-1, 2).numpy(), sigma.cpu().reshape(-1).numpy()
    return evaluate(*make_tree(np.float32)[:2], x, sigma)


def exact_denoiser(x, sigma):
    """D(x; σ) = x + σ² score for x [..., 2] and σ [..., 1] or a number."""
    score = torch.from_numpy(evaluate_tensor(x, sigma)[1]).to(x.device)
    return x + sigma**2 * score.view_as(x)


def assign(x):
    """The branch of each sample in x [..., 2]: int64 [...]; BRANCHES where off the manifold."""
    _, _, branch, distance = evaluate_tensor(x, 0.0)
    return np.where(distance <= ON_MANIFOLD, branch, BRANCHES).reshape(x.shape[:-1])


def branch_mass(x):
    """The share of samples x [N, 2] on each branch, float64 [BRANCHES]; the rest is off them."""
    return np.bincount(assign(x), minlength=BRANCHES + 1)[:BRANCHES] / len(x)


@functools.cache
def true_mass():
    """`branch_mass` of the truth, from half a million exact samples that the same rule assigns."""
    return branch_mass(sample_tree([2**32], 0, 2**19)[0][0])


def coverage(x):
    """MEASURES of one seed's samples x [N, 2], float64 [10].

    on_manifold: share within ON_MANIFOLD standard deviations of some Gaussian.
    overlap: Σ_b min(p_b, q_b) over branches, p the truth's mass and q the samples'.
    kl: Σ_b p_b log(p_b / q_b), both normalised on the manifold, half a sample added to each q_b.
    mass_g: mass on generation g over its true mass.
    """
    p, q, generation = true_mass(), branch_mass(x), make_tree()[2]
    smooth = (q + 0.5 / len(x)) / (q + 0.5 / len(x)).sum()
    kl = (p * np.log(p / p.sum() / smooth)).sum() / p.sum()
    mass = np.bincount(generation, q) / np.bincount(generation, p)
    return np.array([q.sum(), np.minimum(p, q).sum(), kl, *mass])


def tail_mass(values):
    """Mass on generations 5 and 6 over its true mass, from the last two of MEASURES [..., 10]."""
    true = np.bincount(make_tree()[2], true_mass())[-2:]
    return values[..., -2:] @ true / true.sum()


# ==================================================================================================
# The denoiser (torch), every seed at once
# ==================================================================================================


class Denoiser(torch.nn.Module):
    """An MLP on (c_in x, ln σ / 4) for S seeds at once: x [S, N, 2], σ [S, N, 1] or a number."""

    def __init__(self, seeds, depth, hidden):
        super().__init__()
        sizes = [3, *[hidden] * depth, 2]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.weights, self.biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            weight = [torch.randn(fan_in, fan_out, generator=g) for g in generators]
            self.weights.append(torch.stack(weight) / fan_in**0.5)  # [S, fan_in, fan_out]
            self.biases.append(torch.zeros(len(seeds), 1, fan_out))

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 1)
        c_in = (sigma**2 + SIGMA_DATA**2).rsqrt()
        h = torch.cat([c_in * x, sigma.log() / 4], dim=-1)  # [S, N, 3]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, h if layer == 0 else torch.nn.functional.silu(h), weight)
        return SIGMA_DATA**2 * c_in**2 * x + sigma * SIGMA_DATA * c_in * h


def train_step(model, optimizer, seeds, step, batch_size, denoise=None):
    """One step of Adam for every seed, on x0 or on denoise(x, σ); returns their mean loss."""
    device = model.weights[0].device
    x0, noise = (values.to(device) for values in sample_tree(seeds, step, batch_size))
    sigma = torch.exp(1.5 * noise[..., 2:] - 2.3)  # [S, N, 1]
    x = x0 + sigma * noise[..., :2]
    target = denoise(x, sigma) if denoise else x0
    c_out = sigma * SIGMA_DATA * (sigma**2 + SIGMA_DATA**2).rsqrt()
    losses = ((model(x, sigma) - target) / c_out).square().mean(dim=(1, 2))  # [S]
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / math.sqrt(max(step / 512, 1))
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    return losses.detach().mean()


@torch.no_grad()
def heun(denoise, x):
    """Solves dx/dσ = (x - D(x; σ)) / σ from σ = 5 to 0 (Karras et al. 2022, algorithm 1).

    Returns x at every level of SIGMAS, [33, *x.shape]; the last are the samples.
    """
    path = [x]
    for sigma, following in itertools.pairwise(SIGMAS):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
        x = x + (following - sigma) * slope
        path.append(x)
    return torch.stack(path)


# ==================================================================================================
# Pictures
# ==================================================================================================

INK, QUIET, TAIL, ALARM = "#1b2a41", "#9aa5b1", "#0072b2", "#d55e00"  # TAIL, ALARM: Okabe and Ito
LINES = ("#e69f00", "#009e73", "#0072b2", "#cc79a7", "#56b4e9", "#d55e00")
MIST = LinearSegmentedColormap.from_list("mist", ["#ffffff", "#7fa8cf"])
STYLE = {"font.size": 11, "axes.titlesize": 13, "legend.frameon": False, "savefig.dpi": 90}


def replace_file(path, write):
    """Calls write(draft) and renames the draft: an interrupted run leaves no half-written file."""
    draft = path.with_name(path.name + ".tmp")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def tree_axes(ax, *box):
    """Draws log p over a box (left, right, bottom, top) in pale blue, and fixes the limits."""
    x, y = torch.linspace(*box[:2], 480), torch.linspace(*box[2:], 480)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [480, 480, 2]
    picture = evaluate_tensor(points, 0.004)[0].reshape(480, 480)  # σ: at least a pixel wide
    ax.imshow(picture, MIST, extent=box, origin="lower", vmin=-3, vmax=4)
    ax.set(xlim=box[:2], ylim=box[2:], xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set(visible=True, color=QUIET, linewidth=0.6)


def scatter(ax, x, size):
    """Samples x [N, 2]: dark on the manifold, orange off it."""
    off = assign(x) == BRANCHES
    ax.scatter(*x[~off].T, s=size, c=INK, linewidths=0, alpha=0.5)
    ax.scatter(*x[off].T, s=1.6 * size, c=ALARM, linewidths=0, alpha=0.8)


def plot_samples(panels, tail):
    """panels: (title, samples [N, 2], paths [levels, M, 2], masses [7]); tail: which paths, [M]."""
    figure = Figure(figsize=(3.1 * len(panels), 7.0))
    axes = figure.subplots(2, len(panels), gridspec_kw={"hspace": 0.34, "wspace": 0.05})
    # Divided by this, x keeps one scale at every noise level, and whole paths fit the frame.
    scale = np.sqrt(1 + (np.array(SIGMAS) / SIGMA_DATA) ** 2)[:, None, None]
    for (title, x, paths, masses), top, bottom in zip(panels, *axes):
        tree_axes(top, -0.7, 1.5, -0.7, 1.5)
        scatter(top, x[: NUM_SAMPLES // 2], 1.5)
        top.set_title(title)
        strip = top.inset_axes([0, -0.15, 1, 0.085])
        strip.imshow([masses], cmap="Oranges_r", vmin=-0.6, vmax=1, aspect="auto")
        for generation, mass in enumerate(masses):
            strip.text(generation, 0, f"{mass:.2f}", ha="center", va="center", fontsize=9)
        strip.set(yticks=[], xticks=range(GENERATIONS))
        strip.tick_params(length=0, labelsize=8, pad=2)
        strip.spines[:].set_visible(False)
        strip.set_xlabel("generation: mass / true mass", fontsize=9, labelpad=3)
        tree_axes(bottom, -0.7, 1.5, -0.7, 1.5)
        paths = paths.numpy() / scale
        bottom.plot(*paths[:, ~tail].transpose(2, 0, 1), color=QUIET, lw=0.5, alpha=0.7)
        bottom.plot(*paths[:, tail].transpose(2, 0, 1), color=TAIL, lw=0.9)
        bottom.plot(*paths[-1, tail].T, ".", color=TAIL, ms=3)
    return figure


def plot_zoom(panels):
    """panels: (title, samples [N, 2]); branches with less than half their mass are marked."""
    centre = make_tree()[0][:2].reshape(2, -1, PER_BRANCH)[:, :BRANCHES]
    figure = Figure(figsize=(11, 5.8))
    for ax, (title, x, *_) in zip(figure.subplots(1, 2, gridspec_kw={"wspace": 0.04}), panels):
        tree_axes(ax, -0.05, 0.95, -0.2, 0.8)
        scatter(ax, x, 4)
        starved = branch_mass(x) < true_mass() / 2
        ax.plot(*centre[:, starved].transpose(0, 2, 1), color=ALARM, lw=6, alpha=0.3)
        ax.set_title(f"{title}: {starved.sum()} of {BRANCHES} branches below half mass", size=12)
    return figure


def plot_stages(results):
    """Tail mass and share on the manifold against training steps, mean and spread over seeds."""
    steps = sorted({step for step, *_ in results})
    decays = list(dict.fromkeys(decay for _, _, decay, _ in results if decay))
    figure = Figure(figsize=(11, 4.4))
    axes = figure.subplots(1, 2, gridspec_kw={"wspace": 0.22})
    names = ("mass of generations 5 and 6 / true mass", "share of samples on the manifold")
    for ax, name, measure in zip(axes, names, (tail_mass, lambda values: values[..., 0])):
        for weights, decay, debias in dict.fromkeys(key[1:] for key in results):
            values = [measure(results[step, weights, decay, debias]) for step in steps]
            mean, spread = np.mean(values, 1), np.std(values, 1, ddof=len(values[0]) > 1)
            color = {"true": QUIET, "raw": "black"}.get(weights)
            color = color or LINES[decays.index(decay) % len(LINES)]
            label = "_" if debias else f"EMA {decay}" if decay else weights
            ax.plot(steps, mean, "--" if debias else "-", color=color, label=label)
            ax.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.12, lw=0)
        ax.set(xscale="log", xlabel="training step", title=name)
        ax.set_xticks(steps, steps)
        ax.minorticks_off()
    axes[1].plot([], [], "k--", label="debiased")
    axes[1].legend(loc="lower right")
    return figure


# ==================================================================================================
# Command line
# ==================================================================================================


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line
    add = parser.add_argument
    add("--decay", default="0.99,0.997,0.998,0.999", help="EMA decays, separated by commas")
    add("--steps", type=int, default=4096, help="training steps, at least 8")
    add("--seed", type=int, default=0, help="the first seed")
    add("--seeds", type=int, default=3, help="number of seeds, trained together")
    add("--batch-size", type=int, default=4096, help="samples a step and seed")
    add("--depth", type=int, default=4, help="hidden layers")
    add("--hidden", type=int, default=64, help="units of a hidden layer")
    add("--target", choices=["noisy", "exact"], default="noisy", help="regress on x0 or D(x; σ)")
    add("--out", type=Path, default=Path("runs/toy2d"), help="folder for the table and pictures")
    add("--device", default="cpu", help="device of the denoiser")
    options = parser.parse_args(arguments)
    allowed = {"steps": (8, 10**7), "seed": (0, 2**31), "seeds": (1, 1000),
               "batch_size": (1, 10**6), "depth": (1, 100), "hidden": (1, 10**4)}
    for name, (low, high) in allowed.items():
        if not low <= getattr(options, name) <= high:
            name = name.replace("_", "-")
            parser.error(f"--{name}: not a whole number from {low} to {high}")
    try:
        understood = EMA(torch.nn.Linear(1, 1), options.decay.split(",")).decays
        options.decay = list(dict.fromkeys(understood))
        if torch.device(options.device).type not in ("cpu", "cuda"):
            raise ValueError(f"--device {options.device}: give cpu, cuda or cuda:1")
        torch.empty(0, device=options.device)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])
    return options


def report(text, live=False):
    """Prints a line; a live one is overwritten by the next, and kept off what is no terminal."""
    terminal = sys.stdout.isatty()
    if terminal or not live:
        print(("\r\033[K" if terminal else "") + text, end="" if live else "\n", flush=True)


def print_table(results, shares):
    """Mean ± standard deviation over seeds; init share and the column "tail" beside them."""
    header = " ".join(f"{name:>11}" for name in (*MEASURES[:3], "tail", *MEASURES[3:]))
    report("\nMean ± standard deviation over seeds; tail: generations 5 and 6.")
    report(f"{'weights':>25} {'init share':>10} {header}")
    for (step, weights, decay, debias), values in results.items():
        values = np.concatenate([values[:, :3], tail_mass(values)[:, None], values[:, 3:]], axis=1)
        spreads = values.std(0, ddof=len(values) > 1)
        cells = [f"{m:.3f} ±{s:.3f}" for m, s in zip(values.mean(0), spreads)]
        label = f"{step} {weights} {decay}{' debiased' if debias else ''}"
        share = f"{shares[step, decay]:.2g}" if decay else ""
        report(f"{label:>25} {share:>10} " + " ".join(f"{cell:>11}" for cell in cells))


def main(arguments=None):
    options, start = parse_arguments(arguments), time.perf_counter()
    decays, seeds = options.decay, range(options.seed, options.seed + options.seeds)
    stages = [options.steps // 8, options.steps // 4, options.steps // 2, options.steps]
    rehearsal = EMA(torch.nn.Linear(1, 1), decays)
    rehearsal.step = options.steps
    shares = (f"{decay}: {rehearsal.init_share(decay):.2g}" for decay in decays)
    report("  ".join(f"{key.replace('_', '-')} {value}" for key, value in vars(options).items()))
    report(f"share of the initial weights at step {options.steps}: {', '.join(shares)}")

    model = Denoiser(seeds, options.depth, options.hidden).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), fused=True)
    ema = EMA(model, decays)
    truth, noise = sample_tree(seeds, 2**40, NUM_SAMPLES)  # no training step's streams
    starts = SIGMAS[0] * noise[..., :2].to(options.device)
    ticks = SIGMAS[0] * torch.linspace(-2, 2, 12)
    grid = torch.cartesian_prod(ticks, ticks)  # [12 * 12, 2]
    ends = assign(heun(exact_denoiser, grid)[-1])
    tail = np.append(make_tree()[2], 0)[ends] >= GENERATIONS - 2
    grid = grid.expand(len(seeds), -1, -1).to(options.device)
    kinds = [("true", "", 0), ("raw", "", 0)]
    kinds += [("ema", decay, debias) for decay in decays for debias in (0, 1)]
    denoise = exact_denoiser if options.target == "exact" else None
    rows = [["seed", "step", "weights", "decay", "debias", "init_share", *MEASURES]]
    results, shares, panels = {}, {}, []

    for step in range(1, options.steps + 1):
        loss = train_step(model, optimizer, seeds, step, options.batch_size, denoise)
        ema.update()
        if step % 64 == 0:
            seconds = time.perf_counter() - start
            left = seconds / step * (options.steps - step)
            timing = f"{seconds:.0f} s, {left:.0f} s to go"
            report(f"step {step}/{options.steps}  loss {loss:.4f}  {timing}", live=step % 512 > 0)
        for weights, decay, debias in kinds if step in stages else ():
            share = shares[step, decay] = ema.init_share(decay) if decay else 0.0
            with ema.applied(decay, bool(debias)) if decay else contextlib.nullcontext():
                x = truth if weights == "true" else heun(model, starts)[-1].cpu()  # [S, N, 2]
                values = np.stack([coverage(samples) for samples in x])  # [S, 10]
                if step == stages[2] and weights != "true" and not debias:
                    title = f"EMA {decay}" if decay else "raw"
                    paths = heun(model, grid)[:, 0].cpu()  # [33, 12 * 12, 2]
                    panels.append((title, x[0], paths, values[0, 3:]))
            results[step, weights, decay, debias] = values
            for seed, row in zip(seeds, values.tolist()):
                rows.append([seed, step, weights, decay, debias, share, *row])

    table = "\n".join(",".join(map(str, row)) for row in rows) + "\n"
    replace_file(options.out / "results.csv", lambda draft: draft.write_text(table))
    print_table(results, shares)
    named = {panel[0]: panel for panel in panels}
    with matplotlib.rc_context(STYLE):
        figures = {
            "toy2d.png": plot_samples(panels, tail),
            "zoom.png": plot_zoom([panels[0], named.get("EMA 0.998", panels[-1])]),
            "stages.png": plot_stages(results),
        }
        for name, figure in figures.items():
            write = functools.partial(figure.savefig, format="png", bbox_inches="tight")
            replace_file(options.out / name, write)
    report(f"{options.out} written after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        report("stopped; nothing was written")
        sys.exit(130)
