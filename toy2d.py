# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numba==0.68.1", "numpy==2.4.6", "matplotlib==3.11.2"]
# ///
"""How a long average starves the twigs of a tree: raw weights against their EMA, in the plane.

    python toy2d.py                  five seeds, a table, three pictures; --help for the rest

The data is the tree of Karras et al. 2024 (arXiv:2406.02507): 127 branches in 7 generations, each
a row of 8 Gaussians. Its density, score and samples are exact, so that what each branch receives is
counted, not guessed. With noise of standard deviation σ a covariance Σ becomes Σ + σ² I, and

    score(x; σ) = ∇ log p(x; σ),    D(x; σ) = E[x0 | x] = x + σ² score(x; σ).

An MLP F learns D, as the tree's authors do it, in the preconditioning of Karras et al. 2022
(arXiv:2206.00364, table 1, σd = 0.5); its raw and averaged weights are sampled from one noise:

    D = c_skip x + c_out F(c_in x, ln σ / 4),    c_skip = σd² / (σ² + σd²),
    c_in = (σ² + σd²)^-½,    c_out = σ σd c_in,    loss |D - target|² / c_out².
"""

import contextlib
import functools
import itertools
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numba import njit, prange, types
from numba.extending import overload

from ddpm_ema import EMA, explained, parse_decay, print_rows, read_flags, replacing

# ==================================================================================================
# The tree: a mixture of 1,016 Gaussians, exactly (Numba)
# ==================================================================================================

BRANCHES, PER_BRANCH, ON_TREE = 127, 8, 4  # Gaussians on a branch; standard deviations from one
SIGMA_DATA, NUM_SAMPLES = 0.5, 4096  # samples for each seed and set of weights
LANES = 64  # components in a row: neighbouring twigs, as the tree grows depth first
FAST = {"fastmath": {"contract", "nnan", "nsz", "reassoc"}, "error_model": "numpy"}  # keeps inf


@functools.cache
def make_tree(dtype=np.float64):
    """The tree of arXiv:2406.02507, as RandomState(2) draws it, depth first, in rows of LANES.

    [6, rows, LANES]: mean_x, mean_y, covariance xx, xy and yy, weight (what fills the last row has
    weight 0); and each branch's generation [BRANCHES].
    """
    rng, scale = np.random.RandomState(2), np.array([1.3136, 1.3844])
    gaussians, generation = [], []

    def grow(depth, start, angle):
        if depth == 7:
            return
        length = 0.292 * 0.8**depth * (1 + 0.2 * rng.randn())
        direction = np.array([math.cos(angle), math.sin(angle)])
        along = np.outer(direction, direction)
        thickness = 0.2 * 0.8**depth / length
        covariance = (along + (np.eye(2) - along) * thickness**2) * (0.06 * length) ** 2
        covariance *= np.outer(scale, scale)
        for where in np.linspace(0.07, 0.93, PER_BRANCH) * length:
            mean = np.float32((start + where * direction) * scale)  # exact in both dtypes
            gaussians.append([*mean, *covariance[np.triu_indices(2)], length * 0.5**depth])
        generation.append(depth)
        for sign in (1, -1):
            turn = sign * 0.7**depth * (1 + 0.2 * rng.randn())
            grow(depth + 1, start + length * direction, angle + turn)

    grow(0, np.array([0.0030, 0.0325]), math.pi / 4)
    total = PER_BRANCH * sum(row[-1] for row in gaussians[::PER_BRANCH])
    gaussians += [[*gaussians[-1][:-1], 0]] * (-len(gaussians) % LANES)
    tree = np.transpose(gaussians) / np.array([[1, 1, 1, 1, 1, total]]).T
    return np.array(tree, dtype, order="C").reshape(6, -1, LANES), np.array(generation)


def _exp(x):
    """e^x for -80 <= x <= 0, in float32 by a polynomial, which vectorises: the kernel is 49 times
    as fast as an einsum, with math.exp 23 times."""


@overload(_exp)
def _exp_overload(x):
    if x != types.float32:
        return lambda x: math.exp(x)
    log2e, ln2, half = np.float32(1 / math.log(2)), np.float32(math.log(2)), np.float32(0.5)
    one, c2, c3, c4, c5, c6 = (np.float32(1 / math.factorial(n)) for n in range(1, 7))

    def exp32(x):
        n = np.floor(x * log2e + half)
        r = x - n * ln2  # |r| <= ln 2 / 2
        p = one + r * (one + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * c6)))))
        return p * np.int32(np.int32(np.int32(n) + np.int32(127)) << 23).view(np.float32)  # p 2^n

    return exp32


@njit(**FAST)
def _component(tree, row, k, x, y, noise):
    """With C = Σ + σ² I and d = x - mean: d^T C^-1 d, the two values of C^-1 d, and det C."""
    dx, dy = x - tree[0, row, k], y - tree[1, row, k]
    xx, xy, yy = tree[2, row, k] + noise, tree[3, row, k], tree[4, row, k] + noise
    det = xx * yy - xy * xy
    pull_x, pull_y = (yy * dx - xy * dy) / det, (xx * dy - xy * dx) / det
    return dx * pull_x + dy * pull_y, pull_x, pull_y, det


@njit(parallel=True, cache=True, **FAST)
def evaluate(tree, x, sigma):
    """Log-density, score (two), nearest branch and its distance at x [N, 2], noise σ [N]: [N, 5].

    distance: in standard deviations of the nearest Gaussian. One dtype throughout, float64 or, for
    speed, float32. One thread works on a point, so that bits do not depend on how many there are.
    Without whole rows skipped, and every exponent relative to the nearest, it is this plain loop:

        total, sum_x, sum_y = 0, 0, 0
        for row, k in np.ndindex(tree.shape[1:]):
            square, pull_x, pull_y, det = _component(tree, row, k, x, y, noise)
            part = tree[5, row, k] * math.exp(-square / 2) / math.sqrt(det)
            total += part
            sum_x -= part * pull_x
            sum_y -= part * pull_y
        log_density, score = math.log(total / (2 * math.pi)), (sum_x / total, sum_y / total)
    """
    rows, out = tree.shape[1], np.empty((len(x), 5), x.dtype)
    half, lowest = x.dtype.type(0.5), x.dtype.type(-80)  # e^-80 is a normal float32
    for i in prange(len(x)):
        px, py, noise = x[i, 0], x[i, 1], sigma[i] * sigma[i]
        square, least = np.empty((rows, LANES), x.dtype), np.empty(rows, x.dtype)
        for row in range(rows):  # pass 1, distances: squared, in standard deviations
            for k in range(LANES):
                square[row, k] = _component(tree, row, k, px, py, noise)[0]
            least[row] = square[row].min()
        row = least.argmin()  # pass 2, the nearest component
        best, nearest = least[row], row * LANES + square[row].argmin()
        # Beyond `far` is less than ε of the sum: 32 is 2 ln (1016 · ratio of weights · areas).
        far = best + 32 - 2 * math.log(np.finfo(x.dtype).eps)
        total = sum_x = sum_y = x.dtype.type(0)
        for row in range(rows):  # pass 3, sums
            if least[row] > far:  # neighbouring twigs are far together
                continue
            for k in range(LANES):
                _, pull_x, pull_y, det = _component(tree, row, k, px, py, noise)
                exponent = max(half * (best - square[row, k]), lowest)
                part = _exp(exponent) * tree[5, row, k] / math.sqrt(det)
                total += part
                sum_x -= part * pull_x
                sum_y -= part * pull_y
        out[i, 0] = math.log(total / (2 * math.pi)) - best / 2
        out[i, 1], out[i, 2] = sum_x / total, sum_y / total
        out[i, 3], out[i, 4] = nearest // PER_BRANCH, math.sqrt(best)
    return out


def mixture(x, sigma):
    """`evaluate` in float32 for a tensor x [..., 2] and σ [..., 1] or a number: [..., 5]."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(*x.shape[:-1], 1)
    found = evaluate(make_tree(np.float32)[0], x.reshape(-1, 2).numpy(), sigma.flatten().numpy())
    return torch.from_numpy(found).view(*x.shape[:-1], 5)


def exact_denoiser(x, sigma):
    """D(x; σ) = x + σ² score for x [..., 2] and σ [..., 1] or a number."""
    return x + sigma**2 * mixture(x, sigma)[..., 1:3]


def sample_tree(seed, step, num):
    """Exact samples x0 [num, 2] and standard normal noise [num, 3], a function of (seed, step)."""
    mean_x, mean_y, xx, xy, yy, weight = make_tree()[0].reshape(6, -1)
    rng = np.random.default_rng((seed, step))
    k = rng.choice(len(weight), num, p=weight)
    u, v = rng.standard_normal((2, num)) / np.sqrt(xx[k])
    x = mean_x[k] + xx[k] * u  # with y, the Cholesky factor of the covariance
    y = mean_y[k] + xy[k] * u + np.sqrt(xx[k] * yy[k] - xy[k] ** 2) * v
    noise = rng.standard_normal((num, 3))
    return [torch.tensor(values, dtype=torch.float32) for values in (np.stack([x, y], 1), noise)]


def assign(x):
    """The branch of each sample in x [N, 2]: int64 [N]; BRANCHES where it is off the tree."""
    branch, distance = mixture(x, 0.0).numpy()[:, 3:].T
    return np.where(distance <= ON_TREE, branch, BRANCHES).astype(np.int64)


@functools.cache
def true_mass():
    """The truth's mass on each branch [BRANCHES], of half a million samples that no seed shares."""
    return np.bincount(assign(sample_tree(10**6, 0, 2**19)[0]))[:BRANCHES] / 2**19


def coverage(x):
    """What samples x [N, 2] cover: {measure: value}.

    twigs     mass on generations 5 and 6 over its true mass
    on_tree   share within ON_TREE standard deviations of some Gaussian
    starved   branches with less than half of their true mass; the exact denoiser is the floor
    """
    q = np.bincount(assign(x), minlength=BRANCHES + 1)[:BRANCHES] / len(x)
    p, twig = true_mass(), make_tree()[1] >= 5
    return {"twigs": q[twig].sum() / p[twig].sum(), "on_tree": q.sum(), "starved": sum(q < p / 2)}


# ==================================================================================================
# The denoiser (torch), every seed at once
# ==================================================================================================


class Denoiser(torch.nn.Module):
    """D of S seeds at once, with 4 hidden layers: x [S, N, 2], σ [S, N, 1] or a number."""

    def __init__(self, seeds, hidden=128):
        super().__init__()
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        self.weights, self.biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for fan_in, fan_out in [(3, hidden), *[(hidden, hidden)] * 3, (hidden, 2)]:
            weight = [torch.randn(fan_in, fan_out, generator=g) for g in generators]
            self.weights.append(torch.stack(weight) / fan_in**0.5)  # [S, fan_in, fan_out]
            self.biases.append(torch.zeros(seeds, 1, fan_out))

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(*x.shape[:-1], 1)
        c_in = (sigma**2 + SIGMA_DATA**2).rsqrt()
        h = torch.cat([c_in * x, sigma.log() / 4], dim=-1)  # [S, N, 3]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, torch.nn.functional.silu(h) if layer else h, weight)
        c_skip, c_out = (SIGMA_DATA * c_in) ** 2, sigma * SIGMA_DATA * c_in
        return c_skip * x + c_out * h


def train(model, ema, steps, stages, batch_size, target):
    """Trains with Adam and takes each step into the averages; yields the steps of `stages`."""
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    for step in range(1, steps + 1):
        draws = [sample_tree(seed, step, batch_size) for seed in range(len(model.biases[0]))]
        x0, noise = map(torch.stack, zip(*draws))  # [S, N, 2], [S, N, 3]
        sigma = torch.exp(1.5 * noise[..., 2:] - 2.3)  # ln σ ~ N(-2.3, 1.5²)
        x = x0 + sigma * noise[..., :2]
        goal = exact_denoiser(x, sigma) if target == "exact" else x0
        weight = 1 / sigma**2 + 1 / SIGMA_DATA**2  # 1 / c_out²
        loss = (weight * (model(x, sigma) - goal).square()).mean((1, 2)).sum()  # over seeds
        optimizer.param_groups[0]["lr"] = 1e-2 / math.sqrt(max(step / 512, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update()
        if step % 128 == 0:
            print(f"step {step} of {steps}, loss {loss / len(draws):.4f}")
        if step in stages:
            yield step


@torch.no_grad()
def heun(denoise, x, highest):
    """Solves dx/dσ = (x - D) / σ from σ = highest to 0 (arXiv:2206.00364, alg. 1)."""
    high, low = highest ** (1 / 7), 0.002 ** (1 / 7)  # eq. 5
    levels = [(high + i / 31 * (low - high)) ** 7 for i in range(32)] + [0.0]
    path = [x]
    for sigma, following in itertools.pairwise(levels):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
        x = x + (following - sigma) * slope
        path.append(x)
    return torch.stack(path)


# ==================================================================================================
# The run, its table and its pictures
# ==================================================================================================

FLAGS = {  # see ddpm_ema.SETTINGS
    "decay": (["0.99", "0.997", "0.998", "0.999"], "from short to long", parse_decay),
    "steps": (4096, "training steps", (8, 10**7)),
    "seeds": (5, "seeds, trained together", (1, 1000)),
    "batch_size": (1024, "samples for each step and seed", (1, 10**6)),
    "target": ("exact", "learn from exact: D itself; or from samples", ("exact", "samples")),
    "out": (Path("runs/toy2d"), "folder for the table and the pictures", Path),
}
INK, ALARM, QUIET = "#16325c", "#e3170a", "0.55"
WHOLE, FORK = (-0.65, 1.5, -0.65, 1.5), (0.7, 1.2, 0.2, 0.7)  # left, right, bottom, top
MEASURES = {"twigs": "How full the twigs are", "on_tree": "Share of samples on the tree",
            "starved": "Branches with less than half of their mass"}


def sample_stage(step, model, ema, noise):
    """Rows, {weights: samples [1, S N, 2]}, {weights: paths [33, 169, 2]}, all from one noise."""
    rows, samples, paths, kinds = [], {}, {}, [("exact denoiser", "", 0), ("raw", "", 0)]
    for decay in ema.decays:
        kinds.append((f"EMA {decay}", decay, 0))
        if ema.init_share(decay) > 1e-3:  # else debiasing changes nothing
            kinds.append((f"EMA {decay} debiased", decay, 1))
    fork = torch.cartesian_prod(torch.linspace(*FORK[:2], 13), torch.linspace(*FORK[2:], 13))
    for name, decay, debiased in kinds:
        denoise = model if name != "exact denoiser" else exact_denoiser
        with ema.applied(decay, debiased) if decay else contextlib.nullcontext():
            x = heun(denoise, 5 * noise, 5.0)[-1]
            if not debiased:
                samples[name] = x.reshape(1, -1, 2)
                paths[name] = heun(denoise, fork.expand(len(x), -1, -1), 0.12)[:, 0]
        row = {"step": step, "weights": name, "decay": decay, "debiased": debiased,
               "init_share": ema.init_share(decay) if decay else 0.0}
        rows += [{**row, "seed": seed, **coverage(points)} for seed, points in enumerate(x)]
    return rows, samples, paths


def summarise(rows, measure):
    """{(step, weights): (mean, standard deviation over seeds)}."""
    values = {}
    for row in rows:
        values.setdefault((row["step"], row["weights"]), []).append(row[measure])
    return {key: (np.mean(v), np.std(v, ddof=len(v) > 1)) for key, v in values.items()}


def print_means(rows):
    table, measures = {}, ["init_share", *MEASURES]
    for measure in measures:
        for (step, name), (mean, spread) in summarise(rows, measure).items():
            row = table.setdefault((step, name), {"step": step, "weights": name})
            row |= {measure: mean, f"{measure}_sd": spread}
    print_rows([*table.values()], measures, ("step", "weights"))


def save(path, figure, heading, ax):  # with one legend, that of ax
    figure.suptitle(heading, size=20)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncol=8, fontsize=12)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=80, bbox_inches="tight")


def plot_on_tree(path, heading, view, panels):
    """Panels {name: x [levels, N, 2]}, the exact denoiser first: samples of one level, or paths."""
    figure = Figure((4.2 * math.ceil(len(panels) / 2), 9.6), layout="constrained")
    axes = figure.subplots(2, math.ceil(len(panels) / 2), squeeze=False).ravel()
    across, up = torch.linspace(*view[:2], 500), torch.linspace(*view[2:], 500)
    pixels = mixture(torch.cartesian_prod(across, up), (view[1] - view[0]) / 500)  # σ: one pixel
    log_density = pixels[:, 0].reshape(500, 500).T.numpy()
    twig = np.append(make_tree()[1], 0)[assign(panels["exact denoiser"][-1])] >= 5
    for ax, (name, x) in zip(axes, panels.items()):
        ax.imshow(log_density, "Greys", extent=view, origin="lower", vmin=-2, vmax=9)
        off, size = assign(x[-1]) == BRANCHES, 1.5 if len(x) == 1 else 16
        if len(x) == 1:
            name += ": twigs {twigs:.0%} full,\n{on_tree:.0%} on the tree".format(**coverage(x[0]))
        else:  # dark: what ought to end on a twig
            ax.plot(*x[:, ~twig].permute(2, 0, 1).numpy(), color=QUIET, lw=0.6)
            ax.plot(*x[:, twig].permute(2, 0, 1).numpy(), color=INK, lw=1.2)
        ax.scatter(*x[-1, ~off].T.numpy(), size, INK, lw=0, alpha=0.5)
        ax.scatter(*x[-1, off].T.numpy(), 1.5 * size, ALARM, lw=0, alpha=0.5)
        ax.set_title(name, size=14)
    for ax in axes:
        ax.set(xlim=view[:2], ylim=view[2:], xticks=[], yticks=[], visible=ax.has_data())
    axes[0].plot([], [], ".", color=INK, label="sample on the tree")
    axes[0].plot([], [], ".", color=ALARM, label="off it, 4 standard deviations from all")
    save(path, figure, heading, axes[0])


def plot_stages(path, rows):
    """Each measure against the training step, with its spread over seeds."""
    decays = dict.fromkeys(row["decay"] for row in rows if row["decay"])
    ramp = matplotlib.colormaps["YlGnBu"](np.linspace(0.35, 1, len(decays)))
    color = dict(zip(["", *decays], ["black", *ramp]))
    lines = {row["weights"]: (color[row["decay"]], ("-", "--")[row["debiased"]]) for row in rows}
    figure = Figure((15, 5.6), layout="constrained")
    for ax, (measure, title) in zip(figure.subplots(1, 3), MEASURES.items()):
        found = summarise(rows, measure)
        for name, (shade, style) in (lines | {"exact denoiser": (QUIET, ":")}).items():
            steps = [step for step, weights in found if weights == name]
            mean, spread = np.transpose([found[step, name] for step in steps])
            ax.plot(steps, mean, style, c=shade, lw=2, label="_" if style == "--" else name)
            ax.fill_between(steps, mean - spread, mean + spread, color=shade, alpha=0.12, lw=0)
        ax.plot([], [], "--", color=QUIET, label="the same, debiased")
        ax.set(title=title, xlabel="training step")
        ax.set_xscale("log", base=2)
        ax.set_xticks(steps := sorted({row["step"] for row in rows}), steps)
    save(path, figure, "What raw and averaged weights leave on the tree", ax)


def run(rows, decay, steps, seeds, batch_size, target, out):
    """Trains, adds the rows of every stage when it is complete, and draws the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    model, stages = Denoiser(seeds), [steps // part for part in (8, 4, 2, 1)]
    ema = EMA(model, decay)
    noise = [sample_tree(seed, 0, NUM_SAMPLES)[1][:, :2] for seed in range(seeds)]
    for step in train(model, ema, steps, stages, batch_size, target):
        found, samples, paths = sample_stage(step, model, ema, torch.stack(noise))
        rows += found
        lines = [rows[0], *(row.values() for row in rows)]
        with replacing(out / "results.csv") as draft:
            draft.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        if step == stages[1]:
            plot_on_tree(out / "toy2d.png", f"What averaging does, at step {step}", WHOLE, samples)
            paths = {name: paths[name] for name in [*paths][:2] + [*paths][2:][-2:]}
            plot_on_tree(out / "trajectories.png", f"Paths to the dots, step {step}", FORK, paths)
    plot_stages(out / "stages.png", rows)


def main(argv):
    settings = {name: default for name, (default, *_) in FLAGS.items()}
    settings |= read_flags(FLAGS, __doc__, argv)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    rows, end, code = [], "table and pictures", 0
    try:
        with explained(f"run in {settings['out']}: "):
            run(rows, **settings)
    except KeyboardInterrupt:
        end, code = "stopped; the stages that were reached", 130
    if rows:
        print_means(rows)
    print(f"{end}: {settings['out']}")
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
