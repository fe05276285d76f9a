# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numba==0.68.1", "numpy==2.4.6", "matplotlib==3.11.2"]
# ///
"""EMA for diffusion models: train one, and see what the average of its weights does.

    python ddpm_ema.py --decay 0.999                      train, sample, compare raw with EMA
    python ddpm_ema.py --decay 0.9,0.99,0.999,0.9999      any number of decays from one run
    python ddpm_ema.py --decay 0.9995                     the same run, one more decay: no training
    python ddpm_ema.py --decay sweep,auto --stages 0.1,0.25,0.5,1      which decay is best, and when
    python ddpm_ema.py --report RUN RUN                   finished runs: spread over seeds, ranking

An exponential moving average follows the weights theta_t of step t with a decay beta:

    e_t = beta e_{t-1} + (1 - beta) theta_t,    e_0 = theta_0.

It averages over a horizon of 1 / (1 - beta) steps and still gives theta_0 the init share beta^t.
Measured after 3,600 steps, 8 minutes on two CPU cores, one seed: the Fréchet distance to the data
is 20.4 with the raw weights and 6.8 with decay 0.999.
The network learns to undo x_t = alpha_t x0 + sigma_t eps (Ho et al. 2020, arXiv:2006.11239); the
same noise is then turned into images by the raw and by the averaged weights.

The sections EMA, Noise schedules and UNet each run when pasted alone into an empty file.
"""

# ==================================================================================================
# EMA
# ==================================================================================================
# Of the weights θ_t after optimizer step t, with a decay β_t that may depend on the step:
#
#     e_t = β_t e_{t-1} + (1 - β_t) θ_t,    e_0 = θ_0 (the initial weights).
#
# Everything is said in reaches: r_n = 1 - Π_{i>t-n} β_i is the weight that e_t gives to the last
# n steps. With x_t = θ_t - θ_0 and δ_t = θ_t - θ_{t-1} the displacement d_t = e_t - θ_0 is
# Σ_n r_n δ_{t+1-n}; the init share, what θ_0 still weighs, is 1 - r_t; debiased, the average is
# θ_0 + d_t / r_t. A block of n steps from θ_b on, m the average of x in it, turns d into
#
#     (1 - r_n) d + r_n m  =  (1 - r_n) d + r_n (θ_b - θ_0) + Σ_{j<=n} r_j δ_{t+1-j}.
#
# EMA takes the left side, EMABank the right. Both round d once a block, relative to how far the
# weights have moved, where e += (1 - β) (θ - e) in float32 rounds at every step and stalls.

import contextlib
import math

import torch


def parse_decay(decay):
    """A decay's canonical text, "0.999" or "ramp:0.9999"; ValueError, one line, if it is none."""
    text = str(decay).strip()
    kind = text[: text.rfind(":") + 1]
    with contextlib.suppress(ValueError):
        value = 0.0 if text == "step" else float(text[len(kind) :])
        allowed = {"": 0 <= value < 1, "ramp:": 0 <= value < 1,
                   "halflife:": 0 < value <= 1e12, "power:": 1e-6 <= value <= 12**-0.5}
        if allowed.get(kind):
            return text if text == "step" else kind + repr(value).removesuffix(".0")
    raise ValueError(f"decay {text!r} is not understood; allowed: a number 0 <= decay < 1 (0.999), "
                     "step, ramp:0.9999, halflife:2000 (steps), power:0.10 (sigma_rel, to 0.288)")


def log_decays(decay, t):
    """ln β_t (float64) of a canonical decay at steps t = 1, 2, …, exact also for β_t near 1.

    step: β_t = 1 - 1/(t+1), the plain mean. ramp: min(β, (1+t)/(10+t)). halflife: 2^(-1/steps).
    power: (1 - 1/t)^(γ+1), of relative width sigma_rel (Karras et al. 2024, arXiv:2312.02696).
    """
    kind, _, number = decay.rpartition(":")
    if decay == "step":
        return -torch.log1p(1 / t)
    if kind == "ramp":
        return torch.log1p(-(9 / (10 + t)).clamp(min=1 - float(number)))
    if kind == "halflife":
        return torch.full_like(t, -math.log(2) / float(number))
    if kind == "power":  # γ solves sigma_rel² (γ+2)² (γ+3) = γ+1; its largest root, by Viète
        s = float(number) ** -2
        angle = math.acos(-(2 * s + 1 / 9) / (s + 1 / 3) * (3 / (s + 1 / 3)) ** 0.5)
        gamma = 2 * ((s + 1 / 3) / 3) ** 0.5 * math.cos(angle / 3) - 7 / 3
        return (gamma + 1) * torch.log1p(-1 / t)
    return torch.full_like(t, float(number)).log()


def reach(decay, step, n):
    """r_0 … r_n [n + 1] (float64): what e_step weighs its last 0 … n steps, in all."""
    t = torch.arange(step, step - n, -1, dtype=torch.float64, device="cpu")
    return -torch.nn.functional.pad(log_decays(decay, t).cumsum(0), (1, 0)).expm1()


def bare_state(model):
    """{name: value} of the model inside of torch.compile, DistributedDataParallel, DataParallel."""
    wrappers = torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    state = model.state_dict(keep_vars=True)  # under FSDP2 this shards the parameters again
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


def local(tensor):
    """This process's shard of a DTensor (FSDP2); any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class EMA:
    """Moving averages of a model's weights, for one decay or a few.

    Build it when pretrained weights are loaded and the model is wrapped; call `update` after every
    optimizer step, never per micro-batch. With a GradScaler make it a hook of the optimizer
    (register_step_post_hook): steps that the scaler skips do not count. No call communicates: under
    DistributedDataParallel rank 0 has the averages, under FSDP2 every rank those of its shards.

    model   any module; averaged, in float32, is what requires a gradient when this is built. A
            later change of that, or of the parameters, is a ValueError that names one
    decays  one or more of 0 <= decay < 1, "step", "ramp:0.9999", "halflife:2000", "power:0.10", see
            `log_decays`; the first is what the methods take for None
    device  where the averages are kept; None: where the parameters are

    Memory: 2 K + 1 float32 copies of what is averaged, K decays.
    """

    block, ladder, _pending = 256, [], None  # a shorter block rounds d more often, a longer one m

    @torch.no_grad()
    def __init__(self, model, decays=0.999, device=None):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"EMA takes the model, a torch.nn.Module, not a {type(model).__name__}")
        single = isinstance(decays, str) or not hasattr(decays, "__iter__")
        self.decays = list(dict.fromkeys(map(parse_decay, [decays] if single else decays)))
        self.model, self.step, self._inside = model, 0, False
        state = bare_state(model)
        first = {id(p): name for name, p in reversed(state.items())}  # tied ones are averaged once
        self._parameters = {name: p for name, p in state.items()
                            if getattr(p, "requires_grad", False) and first[id(p)] == name}
        if any(p.requires_grad and id(p) not in first for p in model.parameters()):
            raise ValueError("the model's state_dict() does not hold all of its parameters")
        self._tracked = list(dict.fromkeys([*self.decays, *self.ladder]))
        if not self._tracked or not self._parameters:
            raise ValueError("nothing to average: no decay, or nothing that requires a gradient")
        # The table: θ_0; what is pending, in an EMA m of every decay; d of every decay.
        shards = [local(p) for p in self._parameters.values()]
        size, pending = sum(map(torch.numel, shards)), self._pending or len(self._tracked)
        rows, at = 1 + pending + len(self._tracked), 0
        self._table = shards[0].new_zeros(rows, size, dtype=torch.float32, device=device)
        self._d, self._tables = self._table[1 + pending :], {}
        for name, shard in zip(self._parameters, shards):
            strides = torch.empty_like(shard, device="meta").stride()  # channels_last stays so
            table = self._table.as_strided((rows, *shard.shape), (size, *strides), at)
            table[0].copy_(shard)
            self._tables[name], at = table, at + shard.numel()
        self._views = [table.unbind() for table in self._tables.values()]  # cut once: it takes time
        shapes = {name: list(table.shape) for name, table in self._tables.items()}
        self._layout = {"decays": self.decays, "ladder": self.ladder, "block": self.block, **shapes}

    def _live(self):
        """The bare model's state by name, if what trains still is what is averaged."""
        state, known = bare_state(self.model), set(map(id, self._parameters.values()))
        changed = [name for name, p in self._parameters.items() if state.get(name) is not p]
        changed += [name for name, value in state.items()
                    if getattr(value, "requires_grad", False) and id(value) not in known]
        if changed:
            raise ValueError(f"parameter {changed[0]} was replaced, removed or set to require a "
                             "gradient since the EMA was built: build it after that")
        return state

    @torch.no_grad()
    def update(self):
        """Takes in the model's weights after one more optimizer step."""
        if self._inside:
            raise RuntimeError("update() inside applied(): the model holds averaged weights")
        if self.step % 16 == 0:  # it walks through all modules, which is half an update's time
            self._live()
        self.step += 1
        self._take((self.step - 1) % self.block + 1)

    def _take(self, n):
        """Step n of a block: m += (r_1 / r_n) (x - m); at its end d += r_n (m - d)."""
        reaches = [reach(decay, self.step, n) for decay in self._tracked]
        shares = [(r[1] / r[n]).item() for r in reaches]
        for parameter, (initial, *means) in zip(self._parameters.values(), self._views):
            x = local(parameter).to(initial) - initial
            for mean, share in zip(means, shares):
                mean.lerp_(x, share)
        if n == self.block:
            for d, mean, r in zip(self._d, self._table[1:], reaches):
                d.lerp_(mean, r[n].item())

    def _coefficients(self, decay):
        """d_t as a row over the table (float64), also within a block: d + r_n (m - d)."""
        if decay not in self._tracked:
            raise ValueError(f"decay {decay} is not there; there are {', '.join(self.decays)}")
        k, share = self._tracked.index(decay), reach(decay, self.step, self.step % self.block)[-1]
        row = share.new_zeros(len(self._table))
        row[1 + k], row[k - len(self._d)] = share, 1 - share
        return row

    @torch.no_grad()
    def _averages(self, decay, debias):
        """Yields (parameter, its average): float32, of this process's shard, on its device."""
        decay = self._tracked[0] if decay is None else parse_decay(decay)
        row = self._coefficients(decay)
        if debias and self.step:
            row /= reach(decay, self.step, self.step)[-1]
        row[0] += 1
        for parameter, views in zip(self._parameters.values(), self._views):
            total = torch.zeros_like(views[0], dtype=torch.float64)
            for view, weight in zip(views, row.tolist()):
                if weight:
                    total.add_(view, alpha=weight)
            yield parameter, total.to(local(parameter).device, torch.float32)

    def weights(self, decay=None, debias=False):
        """The averages (float32) and all else of the model, named as in the bare state_dict().

        debias takes the initial weights out. Names have no "module." of DistributedDataParallel and
        no "_orig_mod." of torch.compile; under FSDP2 averages are DTensors, as the model's are.
        """
        state, averages = self._live(), {}
        for p, average in self._averages(decay, debias):
            if local(p) is not p:
                like = {"shape": p.shape, "stride": p.stride()}
                average = p.from_local(average, p.device_mesh, p.placements, **like)
            averages[id(p)] = average
        for name, value in state.items():
            if torch.is_tensor(value):
                average = averages.get(id(value))
                state[name] = value.detach().clone() if average is None else average
        return state

    @torch.no_grad()
    def _write(self, values):
        """Copies (parameter or buffer, its new value) into the model."""
        bare_state(self.model)  # a forward under FSDP2 leaves gathered weights: back to shards
        for value, new in values:
            local(value).copy_(new)
        torch.clear_autocast_cache()  # else an autocast around this goes on with its copies

    @contextlib.contextmanager
    def applied(self, decay=None, debias=False):
        """Inside, the model has the averages; after, also after an exception, its own weights.

        Buffers are restored as well; train() and eval() mode stay as they are.
        """
        if self._inside:
            raise RuntimeError("applied() inside applied(): the model already holds averages")
        self._live()
        values = [*self._parameters.values(), *self.model.buffers()]
        own = [(value, local(value).detach().clone()) for value in values]
        self._inside = True
        try:
            self._write(self._averages(decay, debias))
            yield self.model
        finally:
            self._write(own)
            self._inside = False

    def init_share(self, decay=None):
        """The weight that an average gives to the initial weights at the present step."""
        decay = self._tracked[0] if decay is None else parse_decay(decay)
        return 1 - reach(decay, self.step, self.step)[-1].item()

    def state_dict(self):
        """All that an uninterrupted run knows: numbers, texts and CPU tensors, of own shards."""
        tables = {name: table.to("cpu", copy=True) for name, table in self._tables.items()}
        return {"step": self.step, "layout": self._layout, "tables": tables}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Goes on from a saved state; ValueError, and nothing changed, where it does not fit."""
        ours, saved = self._layout, state.get("layout", {})
        for key in {**ours, **saved}:
            if ours.get(key) != saved.get(key):
                raise ValueError(f"{key}: {saved.get(key)} in the state, {ours.get(key)} here")
        for name, table in self._tables.items():
            table.copy_(state["tables"][name])
        self.step = state["step"]


LADDER = tuple(1 - 0.1 * 5e-4 ** (rung / 15) for rung in range(16))  # 1 - decay: 0.1 to 5e-5


@contextlib.contextmanager
def full_precision(device):
    """Products inside are of float32, also under autocast and where a script allows TF32."""
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    found = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, found):
            follows = precision == torch.backends.fp32_precision  # the switch for all products
            switch.fp32_precision = "none" if follows else precision


class EMABank(EMA):
    """Averages for many decays at the price of one, and for any decay afterwards.

    As `EMA`, but the steps of a block are kept, and one product folds them into all averages.

    ladder  constant decays that are averaged as well, so that every decay and schedule between
            them can be read out, wrong by at most `error_bound`; None for none
    block   steps that are folded at once: a longer one rounds less often and is faster

    Memory: K + block + 2 float32 copies, K counting the ladder. Needs torch 2.9 or later.
    """

    def __init__(self, model, decays=0.999, ladder=LADDER, block=16, device=None):
        if block < 1 or any(not 0 < rung < 1 for rung in ladder or ()):
            raise ValueError("block is at least 1, and a ladder's decays lie between 0 and 1")
        self.block, self.ladder = block, [parse_decay(rung) for rung in ladder or ()]
        self._pending = 1 + block  # θ_b, then θ_t in row 2 + (t - 1) % block
        super().__init__(model, decays, device)
        self._table[1] = self._table[0]
        cached = 32768 if self._table.device.type == "cpu" else 262144
        self._chunks = self._table.split(cached, dim=1)  # what is folded at once fits the cache
        self._scratch = torch.empty_like(self._table[1:, :cached])
        self._path = self._table.new_zeros((), dtype=torch.float64)  # Σ ‖δ_t‖²

    def _take(self, n):
        """Keeps step n; at the end of a block d = (1 - r_n) d + r_n (θ_b - θ_0) + Σ_j r_j δ."""
        rows = [views[1 + n] for views in self._views]
        torch._foreach_copy_(rows, [local(p) for p in self._parameters.values()])
        if n < self.block:
            return
        reaches = torch.stack([reach(decay, self.step, n) for decay in self._tracked])  # [K, n + 1]
        share = reaches[:, n:]  # [K, 1] r_n
        mix = torch.cat([share, reaches[:, 1:].flip(1)], dim=1)  # [K, n + 1], oldest step first
        # Under a steady drift d rounds the same way at every fold, and over a long horizon the bias
        # adds up. A wobble of r_n, of mean zero, makes it pass: 9.9e-6 becomes 1.5e-6.
        wobble = 2**-21 * (self.step / n * 0.6180339887 % 1 - 0.5) * (1 - share)
        share = share - wobble.clamp(-share / 2, share / 2)
        mix, share = (mix / share).to(self._table), share.to(self._table)
        with full_precision(self._table.device):
            for chunk in self._chunks:
                moves, mean = self._scratch[:, : chunk.shape[1]].split([n + 1, len(mix)])
                torch.sub(chunk[1 : n + 2], chunk[: n + 1], out=moves)  # θ_b - θ_0, δ_1 … δ_n
                steps = moves[1:].reshape(-1)
                self._path += torch.dot(steps, steps)
                torch.mm(mix, moves, out=mean)
                chunk[n + 2 :].lerp_(mean, share)
        self._table[1] = self._table[n + 1]

    def _fit(self, decay):
        """A decay as a mixture: of the tracked ones [K], of the last steps [block]; and ‖R‖.

        The mixture Σ a_k d_k misses d by Σ R_n δ_{t+1-n} with R = r - Σ a_k r_k, so the a_k
        minimise ‖R‖, and ‖error‖ <= ‖R‖ (Σ ‖δ_t‖²)^½.
        """
        mixture = torch.zeros(len(self._tracked), dtype=torch.float64, device="cpu")
        latest, t = mixture.new_zeros(self.block), self.step
        if decay in self._tracked:
            mixture[self._tracked.index(decay)] = 1
            return mixture, latest, 0.0
        rungs = sorted(map(float, self.ladder))
        now = log_decays(decay, mixture.new_tensor([max(t, 1)])).exp().item()
        if not rungs or not rungs[0] <= now <= rungs[-1]:
            between = [f"{rungs[0]:.6g} to {rungs[-1]:.6g}"] if rungs else []
            raise ValueError(f"decay {decay} ({now:.6g} at step {t}) is not there; there are "
                             + ", ".join([*self.decays, *between]))
        # The last weights are at hand and take up R within `window` steps: the fit sees what is
        # before. θ_0 is one more row, r = 0. The ridge keeps the rows' rounding small.
        window = min(self.block, t)
        used = [k for k, row in enumerate(self._tracked) if row in self.ladder]
        rows = [1 - reach(self._tracked[k], t, t) for k in used]
        rows = torch.stack([*rows, torch.ones_like(rows[0])])  # [rungs + 1, t + 1]
        target, past = 1 - reach(decay, t, t), rows[:, window:]
        ridge = 1e-12 * rows.square().sum(1).diag()
        fit = torch.linalg.solve(past @ past.T + ridge, past @ target[window:])
        error = target - fit @ rows  # [t + 1]
        mixture[used] = fit[:-1]
        latest[:window] = -torch.nn.functional.pad(error[:window], (0, 1)).diff()
        return mixture, latest, error[window:].norm().item()

    def _coefficients(self, decay):
        mixture, latest, _ = self._fit(decay)
        n = self.step % self.block
        reaches = torch.stack([reach(tracked, self.step, n) for tracked in self._tracked])
        latest[:n] += mixture @ reaches.diff()  # θ of j steps back: r_{j+1} - r_j
        row = mixture.new_zeros(len(self._table))
        row[[2 + (self.step - 1 - j) % self.block for j in range(self.block)]] = latest
        row[0], row[self.block + 2 :] = -latest.sum(), mixture * (1 - reaches[:, n])
        return row

    @torch.no_grad()
    def error_bound(self, decay):
        """Bound on the Euclidean error that reading an untracked decay adds; 0.0 if it is tracked.

        ‖R‖ (Σ ‖δ_t‖²)^½, and 2^-20 of a row for the rounding that the mixture passes on, of
        this process's shards. For a debiased average divide by r_t = 1 - init_share.
        """
        mixture, _, misfit = self._fit(parse_decay(decay))
        if not misfit:
            return 0.0
        pending = self._table[1 : 2 + self.step % self.block].diff(dim=0)
        path = (self._path + pending.double().square().sum()).sqrt().item()
        norms = torch.linalg.vector_norm(self._d, dim=1, dtype=torch.float64).cpu()
        return misfit * path * (1 + 1e-3) + 2**-20 * (mixture.abs() @ norms).item()

    def state_dict(self):
        return {**super().state_dict(), "path": self._path.item()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._path.fill_(state["path"])


# ==================================================================================================
# Noise schedules, objectives and samplers
# ==================================================================================================

import math  # noqa: F811  (every part carries its own imports)

import torch


class Diffusion:
    """The path x_t = alpha_t x0 + sigma_t eps, what is learnt on it, and how to walk it back.

    schedule    "linear": Ho et al. 2020 (arXiv:2006.11239), section 4; alphas_cumprod is alpha²
                "cosine": Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17
                "flow":   the straight path x_t = (1 - s) x0 + s eps of flow matching (as in SiT,
                          arXiv:2401.08740), on the midpoints s = (t + 1/2) / num_steps
    objective   what the network predicts: "eps" the noise; "x0" the data; "v" the velocity
                v = alpha' x0 + sigma' eps. The derivative is along the angle of (alpha, sigma) for
                linear and cosine, v = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv:2202.00512),
                and along s for flow, v = eps - x0.
    num_steps   T. In code t runs from 0, the least noise, to T - 1; the papers' t is one more.

    `network(x_t, t)` is any callable: x_t [B, ...], t [B] int64 -> [B, ...].
    """

    SCHEDULES, OBJECTIVES = ("linear", "cosine", "flow"), ("eps", "x0", "v")

    def __init__(self, schedule="cosine", objective="v", num_steps=1000):
        if schedule not in self.SCHEDULES or objective not in self.OBJECTIVES or num_steps < 1:
            raise ValueError(f"schedule is one of {self.SCHEDULES}, objective one of "
                             f"{self.OBJECTIVES}, num_steps 1 or more")
        self.objective, self.num_steps = objective, num_steps
        grid = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps  # [T + 1]
        if schedule == "flow":
            sigma = (grid[:-1] + grid[1:]) / 2
            alpha = 1 - sigma
            velocity = -torch.ones_like(alpha), torch.ones_like(sigma)
        else:
            if schedule == "linear":
                beta = torch.linspace(0.1, 20, num_steps, dtype=torch.float64) / num_steps
            else:
                f = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
                beta = 1 - f[1:] / f[:-1]
            alphas_cumprod = torch.cumprod(1 - beta.clamp(max=0.999), dim=0)
            alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
            velocity = -sigma, alpha
        # The determinant alpha sigma' - sigma alpha' is 1 on every path here: `predict` needs that.
        self.path = torch.stack([alpha, sigma, *velocity])  # [4, T] float64: alpha, sigma, and '
        self._copies = {}  # of the path, by device and dtype

    def at(self, t, x):
        """alpha, sigma, alpha', sigma' at times t [B], each [B, 1, ...] to multiply x [B, ...]."""
        key = x.device, x.dtype
        if key not in self._copies:
            self._copies[key] = self.path.to(x)
        rows = self._copies[key][:, t]  # [4, B]
        return rows.view(4, -1, *[1] * (x.dim() - 1))

    def add_noise(self, x0, t, eps):
        """x_t of q(x_t | x0): eq. 4 of DDPM."""
        alpha, sigma, _, _ = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0, t, eps):
        """What the network is to predict at x_t."""
        _, _, d_alpha, d_sigma = self.at(t, x0)
        return {"x0": x0, "eps": eps, "v": d_alpha * x0 + d_sigma * eps}[self.objective]

    def predict(self, output, x_t, t):
        """(x0_hat, eps_hat, v_hat) from the network's output: the three say the same."""
        alpha, sigma, d_alpha, d_sigma = self.at(t, x_t)
        if self.objective == "x0":
            x0_hat, eps_hat = output, (x_t - alpha * output) / sigma
        elif self.objective == "eps":
            x0_hat, eps_hat = (x_t - sigma * output) / alpha, output
        else:
            return d_sigma * x_t - sigma * output, alpha * output - d_alpha * x_t, output
        return x0_hat, eps_hat, d_alpha * x0_hat + d_sigma * eps_hat

    def loss(self, network, x0, t, eps):
        """Squared error of the prediction, mean over each image's values: [B], float32.

        The error of x0 is measured as the error of v that it causes, 1 / sigma² times as large
        (JiT, Li & He 2025, arXiv:2511.13720), with sigma at least 0.05 as there.
        """
        output = network(self.add_noise(x0, t, eps), t)
        error = (output.float() - self.target(x0, t, eps)).square().flatten(1).mean(1)  # [B]
        if self.objective == "x0":
            error = error / self.at(t, error)[1].clamp(min=0.05).square()
        return error

    @torch.no_grad()
    def sample(self, network, x, num_steps, eta=0.0, order=1, clip=None, generator=None):
        """Walk from noise x [B, ...] at t = T - 1 to data; yield (t, x_t, x0_hat), data at t = -1.

        eta=0, order=1   DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12); on the flow path it is
                         Euler's method
        eta=1, order=1   DDPM's ancestral sampler (eq. 6 and 7), also with fewer steps than T
        eta=0, order=2   DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2)
        clip             bound on |x0_hat|: 1 for images in [-1, 1], None for no bound
        generator        of the noise that eta > 0 adds

        From t to s < t all three take x_s = c x_t + (alpha_s - c alpha_t) D + nu z: nu is the noise
        added, c the share of the old noise that is kept, D is x0_hat, extrapolated in the log
        signal-to-noise ratio at order 2. Few steps are spaced quadratically, as in DDIM, appendix
        D.2: evenly spaced, their last ones would be too long.
        """
        if not 1 <= num_steps <= self.num_steps or order not in (1, 2) or (order == 2 and eta):
            raise ValueError(f"num_steps is 1 to {self.num_steps}, order 1 or 2, eta 0 at order 2")
        u = torch.linspace(1, 0, num_steps, dtype=torch.float64)
        times = ((self.num_steps - 1) * u.square()).round().long()
        times = times.maximum(torch.arange(num_steps).flip(0)).tolist()  # each t at most once
        levels = [self.path[:2, t].tolist() for t in times] + [[1.0, 0.0]]  # (alpha, sigma)
        last = None  # x0_hat and the step in log(alpha / sigma) of the step before
        for t, (alpha, sigma), (alpha_s, sigma_s) in zip(times, levels, levels[1:]):
            at = torch.full((len(x),), t, device=x.device)
            x0_hat = self.predict(network(x, at).to(x.dtype), x, at)[0]
            x0_hat = x0_hat if clip is None else x0_hat.clamp(-clip, clip)
            yield t, x, x0_hat
            direction = x0_hat
            if order == 2 and sigma_s:
                h = math.log(alpha_s / sigma_s) - math.log(alpha / sigma)
                if last is not None:
                    direction = x0_hat + (x0_hat - last[0]) * (h / (2 * last[1]))
                last = x0_hat, h
            variance = sigma**2 - (alpha / alpha_s * sigma_s) ** 2  # of q(x_t | x_s)
            nu = eta * sigma_s / sigma * math.sqrt(variance)
            c = math.sqrt(sigma_s**2 - nu**2) / sigma
            x = c * x + (alpha_s - c * alpha) * direction
            if nu:
                x = x + nu * torch.randn(x.shape, generator=generator, device=x.device)
        yield -1, x, x


# ==================================================================================================
# UNet
# ==================================================================================================

import torch
from torch import nn
from torch.nn import functional as F


def norm(channels):
    """Group normalisation in groups of at least four channels, at most 32 groups."""
    num_groups = next(g for g in range(min(32, max(channels // 4, 1)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


def zero(layer):
    """Start a layer at zero, so that its residual branch starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """h + conv(silu(norm(conv(silu(norm(h)))))), told the time between the two convolutions."""

    def __init__(self, in_channels, out_channels, time_channels, scale_shift, dropout):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.scale_shift = scale_shift

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))  # [B, out, H, W]
        time = self.time(time)[:, :, None, None]  # [B, out or 2 out, 1, 1]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + time)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Single-head self-attention over the H W positions, with a residual connection."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [B, H W, 3 C]
        h = F.scaled_dot_product_attention(*qkv[:, None].chunk(3, dim=3))[:, 0]  # [B, H W, C]
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    """Nearest-neighbour doubling of height and width, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """The network of DDPM (Ho et al. 2020, arXiv:2006.11239, appendix B).

    channels      image channels, in and out
    width         channels at full resolution; level i has width * multipliers[i]
    multipliers   one per level; each further level halves height and width
    num_blocks    residual blocks a level on the way down (one more on the way up)
    attention     the levels whose blocks are followed by self-attention
    scale_shift   time scales and shifts the normalised features (Nichol & Dhariwal 2021);
                  False: it is added before the normalisation, as in DDPM
    dropout       probability, inside residual blocks

    forward(x [B, C, H, W], t [B]) -> [B, C, H, W]; H and W divisible by 2^(levels - 1); t is on
    the scale 0..1000. ValueError where shapes do not fit.
    """

    def __init__(self, channels=1, width=16, multipliers=(1, 2, 4), num_blocks=1, attention=(2,),
                 scale_shift=True, dropout=0.0):
        super().__init__()
        if width % 2:
            raise ValueError(f"width is {width}: it must be even")
        self.channels, self.width, self.stride = channels, width, 2 ** (len(multipliers) - 1)
        time = 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))

        def block(c_in, c_out, attend):
            res = ResBlock(c_in, c_out, time, scale_shift, dropout)
            return nn.ModuleList([res, Attention(c_out)] if attend else [res])

        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [width], width
        for level, multiplier in enumerate(multipliers):
            if level:
                self.down.append(nn.ModuleList([nn.Conv2d(c, c, 3, stride=2, padding=1)]))
                skips.append(c)
            for _ in range(num_blocks):
                self.down.append(block(c, width * multiplier, level in attention))
                c = width * multiplier
                skips.append(c)
        self.middle = nn.ModuleList([*block(c, c, True), *block(c, c, False)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(num_blocks + 1):
                self.up.append(block(c + skips.pop(), width * multiplier, level in attention))
                c = width * multiplier
            if level:
                self.up[-1].append(Upsample(c))
        self.head = nn.Sequential(norm(c), nn.SiLU(), zero(nn.Conv2d(c, channels, 3, padding=1)))

    def forward(self, x, t):
        B, C, H, W = x.shape
        if C != self.channels or H % self.stride or W % self.stride or t.shape != (B,):
            raise ValueError(f"UNet takes x [B, {self.channels}, H, W] with H and W divisible by "
                             f"{self.stride} and t [B]; got {list(x.shape)} and {list(t.shape)}")
        half = self.width // 2
        frequency = 10_000 ** -(torch.arange(half, device=x.device) / half)  # [width / 2]
        angle = t.float()[:, None] * frequency  # [B, width / 2]
        time = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], dim=1)))  # [B, 4 width]

        def run(layers, h):
            for layer in layers:
                h = layer(h, time) if isinstance(layer, ResBlock) else layer(h)
            return h

        h = self.stem(x)  # [B, width, H, W]
        skips = [h]
        for layers in self.down:
            h = run(layers, h)
            skips.append(h)
        h = run(self.middle, h)
        for layers in self.up:
            h = run(layers, torch.cat([h, skips.pop()], dim=1))
        return self.head(h)  # [B, C, H, W]


# ==================================================================================================
# Data
# ==================================================================================================

import argparse
import copy
import csv
import functools
import gzip
import hashlib
import http.client
import json
import os
import signal
import string
import struct
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # from the most to the least frequent

DOWNLOADS = {  # name: (address, {file: md5})
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432"}),
    "fashion": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
}


class Dataset:
    """Images with, where known, the mode of each.

    images   [N, C, H, W], uint8 of any picture or float32 of any latent or representation
    labels   [N] int64, or None
    names    what each label stands for
    x0(i)    images i scaled for the network: uint8 to [-1, 1]; floats to mean 0 and standard
             deviation 1 in each channel
    bound    the largest |x0|, for samplers to clip at
    """

    def __init__(self, images, labels=None, names=None):
        images = torch.from_numpy(np.ascontiguousarray(images))
        if images.dim() != 4 or 0 in images.shape:
            raise ValueError(f"images have shape {list(images.shape)}; needed is [N, C, H, W] or "
                             "[N, H, W, C], none of them 0")
        if len(images) < 20:
            raise ValueError(f"{len(images)} images are too few to train on; 20 is the least")
        if images.dtype == torch.uint8:
            self.shift = self.scale = torch.full((images.shape[1], 1, 1), 127.5)
            self.bound = 1.0
        else:
            images = images.float()
            if not images.isfinite().all():
                raise ValueError("the data hold NaN or infinite values; all must be finite")
            mean = images.mean(dim=(0, 2, 3), dtype=torch.float64)  # exact for a constant channel
            self.shift = mean.float()[:, None, None]  # [C, 1, 1]
            self.scale = images.std(dim=(0, 2, 3)).clamp(min=1e-6)[:, None, None]
            self.bound = ((images - self.shift) / self.scale).abs().max().item()
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
                raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}; needed is one "
                                 f"integer for each of the {len(images)} images")
            values, labels = np.unique(labels, return_inverse=True)
            labels = torch.from_numpy(labels)
            names = [str(v) if names is None else names[v] for v in values]
        self.images, self.labels, self.names = images, labels, names

    def __len__(self):
        return len(self.images)

    @property
    def device(self):
        return self.images.device

    @property
    def is_pictures(self):
        return self.images.dtype == torch.uint8

    @property
    def turns(self):
        """Quarter turns that leave the shape as it is: the classes of data without labels."""
        return [0, 1, 2, 3] if self.images.shape[2] == self.images.shape[3] else [0, 2]

    @property
    def num_classes(self):
        return len(self.turns) if self.labels is None else len(self.names)

    def x0(self, index):
        x0 = (self.images[index].float() - self.shift) / self.scale  # [B, C, H, W]
        return x0.contiguous(memory_format=torch.channels_last)

    def round(self, x0):
        """What x0 becomes when it is stored as an image: floats stay as they are."""
        return ((x0 + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1 if self.is_pictures else x0

    def split(self):
        """(training, held-out): a fifth of the images, at most 4,096, the same in every run."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        parts = []
        for index in (order[min(len(self) // 5, 4096):], order[:min(len(self) // 5, 4096)]):
            part = copy.copy(self)  # shift and scale stay those of all images
            part.images = self.images[index]
            part.labels = None if self.labels is None else self.labels[index]
            parts.append(part)
        return parts

    def to(self, device):
        for name in ("images", "labels", "shift", "scale"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))
        return self


def draw_glyphs(num_images, seed=0):
    """Characters in random DejaVu faces, turned, scaled and shifted; the r-th has share ~ 1/r.

    Returns images [N, 1, 16, 16] uint8, white on black, and labels [N]: positions in GLYPHS.
    """
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, len(GLYPHS) + 1)  # Zipf's law
    labels = rng.choice(len(GLYPHS), num_images, p=share / share.sum())
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    faces = [FT2Font(str(folder / f"DejaVu{face}.ttf")) for face in ("Sans-Bold", "Serif-Bold")]
    canvas = np.zeros((num_images, 32, 32), np.float32)  # twice the final resolution
    for i, label in enumerate(labels):
        face = faces[rng.integers(len(faces))]
        face.set_size(28 * rng.uniform(0.95, 1.05), 72)
        face.set_text(GLYPHS[label], rng.normal(0, 2))
        face.draw_glyphs_to_bitmap()
        glyph = face.get_image()[:32, :32]  # [h, w] uint8
        h, w = glyph.shape
        top = np.clip(round((32 - h) / 2 + rng.uniform(-1, 1)), 0, 32 - h)
        left = np.clip(round((32 - w) / 2 + rng.uniform(-1, 1)), 0, 32 - w)
        canvas[i, top:top + h, left:left + w] = glyph
    images = canvas.reshape(num_images, 1, 16, 2, 16, 2).mean((3, 5))
    return images.round().astype(np.uint8), labels


def show(text, keep=True):
    """One live line on a terminal, which stays if `keep`; elsewhere only the lines that stay."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\n" if keep else "", flush=True)
    elif keep:
        print(text, flush=True)


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path, which takes the place of `path` when all went well."""
    temporary = path.with_name(f"tmp-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def download(address, path, md5):
    """Fetch a file to `path`, going on where an earlier attempt stopped; OSError on any failure."""
    if path.exists():
        if hashlib.md5(path.read_bytes()).hexdigest() == md5:
            return
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            have = have if reply.status == 206 else 0  # a server that ignores Range starts anew
            total = have + int(reply.headers.get("Content-Length", 0))
            with open(part, "ab" if have else "wb") as file:
                while chunk := reply.read(1 << 20):
                    have += file.write(chunk)
                    show(f"downloading {path.name}: {have / 1e6:.1f} of {total / 1e6:.1f} MB",
                         keep=have == total)
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416:  # more is here than there
            part.unlink()
        raise OSError(f"download of {address} failed ({error}); the same command continues it, "
                      f"or put the file at {path}") from error
    if have < total:
        raise OSError(f"{address} broke off at {have} of {total} bytes; the same command "
                      "continues it")
    if hashlib.md5(part.read_bytes()).hexdigest() != md5:
        part.unlink()
        raise OSError(f"{address} does not have the expected MD5 {md5}; deleted, try again")
    part.replace(path)


def read_idx(path):
    """An array from a file of the MNIST format, gzipped or not."""
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        shape = struct.unpack_from(f">{data[3]}I", data, 4)
        array = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (OSError, EOFError, zlib.error, IndexError, struct.error, ValueError):
        array = None
    if array is None or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not a whole idx file of unsigned bytes")
    return array


def read_idx_folder(files):
    """The training pair of the folder, where it has one, else all pairs."""
    files = [f for f in files if f.name.startswith("train")] or files
    images, labels = [], []
    for path in files:
        images.append(read_idx(path))
        twin = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
        twins = [path.with_name(twin), path.with_name(f"{twin}.gz")]
        labels += [read_idx(file) for file in twins if file.exists()][:1]
    if len({a.shape[1:] for a in images}) > 1 or images[0].ndim != 3:
        raise ValueError(f"{files[0].parent}: image files of unequal or unknown size: "
                         f"{sorted({a.shape for a in images})}")
    return np.concatenate(images)[:, None], np.concatenate(labels) if labels else None, None


def read_image_folder(folder, files):
    """Images of one size; the classes are the sub-folders, where there are any."""
    images = []
    for path in files:
        try:
            image = matplotlib.image.imread(path)  # [H, W] or [H, W, C]; floats from PNG
        except Exception as error:  # the readers fail in many ways
            raise ValueError(f"{path} is not a readable image: {error}") from error
        if image.dtype.kind == "f":
            image = (image * 255).round()
        elif image.dtype == np.uint16:
            image = image // 257
        image = image.astype(np.uint8).reshape(*image.shape[:2], -1)
        images.append(image[:, :, :1 if image.shape[2] == 2 else 3])  # no transparency
        if image.shape[:2] != images[0].shape[:2]:
            raise ValueError(f"{path} is {image.shape[1]}x{image.shape[0]}, {files[0]} is "
                             f"{images[0].shape[1]}x{images[0].shape[0]}; all must have one size")
    channels = max(i.shape[2] for i in images)  # a grey image among colour images becomes colour
    images = np.stack([np.broadcast_to(i, (*i.shape[:2], channels)) for i in images])
    classes = [str(f.parent.relative_to(folder)) for f in files]
    names = sorted(set(classes))
    labels = np.array([names.index(c) for c in classes]) if len(names) > 1 else None
    return images.transpose(0, 3, 1, 2), labels, names


def read_npz(path):
    """`images` [N, C, H, W] or [N, H, W, C], told apart by the two equal sizes or the least one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in ("images", "labels") if k in file}
        images = arrays["images"]
    except (OSError, EOFError, KeyError, TypeError, ValueError, zlib.error,
            zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz file with an array `images`") from error
    if images.dtype.kind in "iu" and (not images.size or images.min() >= 0 and images.max() <= 255):
        images = images.astype(np.uint8)
    elif images.dtype.kind == "f":
        images = images.astype(np.float32)
    else:
        raise ValueError(f"{path}: images are {images.dtype}; allowed are integers from 0 to 255 "
                         "and floats")
    if images.ndim == 4:
        _, a, b, c = images.shape  # of [a, b, c] the equal two are height and width
        if a == b != c or (b != c and c < a):
            images = images.transpose(0, 3, 1, 2)
    return images, arrays.get("labels"), None


def load_data(source):
    """The Dataset behind --data; ValueError or OSError with one clear line where there is none."""
    path = Path(source or "nothing")
    if source == "glyphs":
        return Dataset(*draw_glyphs(24_096), names=list(GLYPHS))
    if source in DOWNLOADS:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ddpm_ema", source)
        address, files = DOWNLOADS[source]
        for name, md5 in files.items():
            download(address + name, cache / name, md5)
        if source == "cifar10":
            with tarfile.open(cache / "cifar-10-binary.tar.gz") as tar:
                batches = [tar.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read()
                           for i in range(1, 6)]
            records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, 3073)
            return Dataset(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0])
        path = cache
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file())
        pictures = dict.fromkeys(f for f in files if f.suffix.lower() in (
            ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"))
        idx = {str(f).removesuffix(".gz"): f for f in files if "idx3" in f.name and
               f.suffix != ".part" and f not in pictures}.values()  # of a gzipped twin only one
        if not idx and not pictures:
            raise ValueError(f"{path} holds neither idx files nor images")
        if idx:
            return Dataset(*read_idx_folder(list(idx)))
        return Dataset(*read_image_folder(path, list(pictures)))
    if path.is_file() and path.suffix == ".npz":
        return Dataset(*read_npz(path))
    raise ValueError(f"{source} is no data; allowed are glyphs, {', '.join(DOWNLOADS)}, a folder "
                     "of idx files or of images, and an .npz file")


# ==================================================================================================
# Metrics
# ==================================================================================================

class Classifier(nn.Module):
    """A small network trained on the data set's own labels; its 64 features are the metric space.

    forward(x [B, C, H, W]) -> features [B, 64], class probabilities [B, K]
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        layers, c = [], channels
        for width, stride in ((32, 1), (64, 2), (128, 2)):
            layers += [nn.Conv2d(c, width, 3, stride, 1), norm(width), nn.ReLU()]
            c = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                      nn.Linear(4 * c, 64), nn.ReLU())
        self.logits = nn.Linear(64, num_classes)

    def forward(self, x):
        features = self.features(x)
        return features, self.logits(features).softmax(1)


@torch.enable_grad()
def train_classifier(net, data, held_out, num_steps=500, batch_size=128):
    """Train it on data; return its accuracy on held_out. The same for every seed and method.

    Classes are drawn equally often, so that rare ones are read as well as frequent ones. Where
    there are no labels it learns by how many quarter turns an image was rotated.
    """
    def batch(data, index):
        x0 = data.x0(index)
        if data.labels is not None:
            return x0, data.labels[index]
        label = torch.arange(len(index), device=data.device) % len(data.turns)
        return torch.stack([x.rot90(data.turns[k], (1, 2)) for x, k in zip(x0, label)]), label

    torch.manual_seed(0)
    for layer in net.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    weight = torch.ones(len(data))
    if data.labels is not None:
        weight = 1 / data.labels.cpu().bincount()[data.labels.cpu()]
    order = torch.multinomial(weight.double(), num_steps * batch_size, replacement=True)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps)
    for index in order.to(data.device).split(batch_size):
        x0, label = batch(data, index)
        optimizer.zero_grad()
        F.cross_entropy(net.logits(net.features(x0)), label).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        correct = [net(x0)[1].argmax(1) == label for x0, label in (
            batch(held_out, i) for i in torch.arange(len(held_out), device=data.device).split(512))]
    return torch.cat(correct).double().mean().item()


def frechet_distance(mean1, cov1, mean2, cov2):
    """|mean1 - mean2|² + tr(cov1 + cov2 - 2 (cov1 cov2)^½) of two Gaussians, float64 [D], [D, D].

    Heusel et al. 2017 (arXiv:1706.08500, eq. 6). The root's trace is that of the symmetric
    (cov1^½ cov2 cov1^½)^½, whose eigenvalues are real, also where a covariance is singular.
    NaN where a moment is not finite.
    """
    if not (cov1.isfinite().all() and cov2.isfinite().all()):
        return math.nan
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item()


def moments(features):
    """Mean [D] and covariance [D, D] of features [N, D], float64, a few thousand rows at a time."""
    mean = sum(f.double().sum(0) for f in features.split(4096)) / len(features)
    square = sum((f := chunk.double() - mean).T @ f for chunk in features.split(4096))
    return mean, square / max(len(features) - 1, 1)


def manifold_share(features, reference, k=3):
    """Which rows of features [N, D] lie within the k-nearest-neighbour balls of reference [M, D].

    Kynkäänniemi et al. 2019 (arXiv:1904.06991, eq. 1): the mean of the answer is precision for
    (samples, real) and recall for (real, samples). Works in tiles: memory is O(N + M).
    """
    tiles = reference.split(1024)
    radii = []
    for tile in tiles:  # k + 1: a point is its own nearest neighbour
        nearest = [torch.cdist(tile, other).topk(min(k + 1, len(other)), largest=False).values
                   for other in tiles]
        radii.append(torch.cat(nearest, 1).sort(1).values[:, k])
    inside = [torch.stack([(torch.cdist(rows, tile) <= r).any(1) for tile, r in zip(tiles, radii)])
              for rows in features.split(1024)]
    return torch.cat([i.any(0) for i in inside])  # [N] bool


def measure(features, probs, real, num_bootstrap=20):
    """Every metric of samples with features [N, D] and class probabilities [N, K], and its spread.

    `real` holds what they are compared with: `moments`, `features` [M, D] and, where the modes
    are known, their true `shares` [K]. Spreads are standard deviations over bootstrap resamples.

    fd             Fréchet distance            is    Inception Score, exp E KL(p(y|x) | p(y))
    precision      share of samples within the manifold of the real features; recall: the reverse
    With known modes also
    tail_share     mass on the rarer half of the modes over its true mass
    covered_modes  modes with more than a quarter of their true share
    tv             total variation between the shares of the modes, sampled and true
    legible        share of images whose mode is read with probability above 0.9
    """
    modes, confident = probs.argmax(1), (probs.amax(1) > 0.9).double()
    precise = manifold_share(features, real["features"]).double()
    recalled = manifold_share(real["features"], features).double()

    def metrics(i, j):
        p = probs[i].double()
        entropy = (p * (p.clamp(min=1e-12).log() - p.mean(0).clamp(min=1e-12).log())).sum(1)
        out = {"fd": frechet_distance(*moments(features[i]), *real["moments"]),
               "is": entropy.mean().exp().item(),
               "precision": precise[i].mean().item(), "recall": recalled[j].mean().item()}
        if (true := real["shares"]) is not None:
            share = modes[i].bincount(minlength=len(true)).double() / len(i)
            rare = true.argsort(descending=True)[len(true) // 2:]
            out |= {"tail_share": (share[rare].sum() / true[rare].sum()).item(),
                    "covered_modes": (share > true / 4).sum().item(),
                    "tv": ((share - true).abs().sum() / 2).item(),
                    "legible": confident[i].mean().item()}
        return out

    n, m, device = len(features), len(recalled), features.device
    row = metrics(torch.arange(n, device=device), torch.arange(m, device=device))
    generator = torch.Generator(device).manual_seed(0)
    draws = [metrics(*(torch.randint(size, (size,), device=device, generator=generator)
                       for size in (n, m))) for _ in range(num_bootstrap)]
    return row | {f"{k}_sd": np.std([d[k] for d in draws], ddof=1).item() for k in row}


# ==================================================================================================
# Training
# ==================================================================================================

class Weights(NamedTuple):
    """One row of every table: `kind` is raw, ema or real; decay is "" but for ema."""

    kind: str
    decay: str = ""
    debias: bool = False

    def __str__(self):
        return (self.decay or self.kind) + (" debiased" if self.debias else "")

    def on(self, ema):
        """The model has these weights inside the with block."""
        if self.kind == "ema":
            return ema.applied(self.decay, self.debias)
        return contextlib.nullcontext()


def raw_and_ema(decays):
    averages = [Weights("ema", decay, debias) for decay in decays for debias in (False, True)]
    return [Weights("raw"), *averages]


def seed_of(purpose, seed, index=0):
    """A 32-bit seed for "init", "train" (index: the step) or "sample" (index: the first image)."""
    stream = ("init", "train", "sample").index(purpose)
    return int(np.random.SeedSequence((stream, seed, index)).generate_state(1)[0])


def load_checkpoint(path, mmap=False):
    with contextlib.suppress(Exception):  # the unpickler may fail on garbage in any way
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if {"args", "step", "model", "optimizer", "ema", "running"} == set(checkpoint):
            return checkpoint
    raise ValueError(f"{path} is not a checkpoint of this program; delete it or choose another "
                     "--out")


def stage_path(out, step, last_step):
    return out / ("checkpoint.pt" if step == last_step else f"checkpoint-{step}.pt")


def read_log(out):
    """The lines of metrics.jsonl; one that an interruption tore is left out."""
    lines, path = [], out / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "held_out_loss" in line]


@torch.no_grad()
def held_out_loss(network, diffusion, data, num_images=128):
    """Mean loss on fixed images, noise and times spread evenly over 0..T-1, equal in all rows."""
    x0 = data.x0(torch.arange(min(num_images, len(data)), device=data.device))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    t = torch.linspace(0, diffusion.num_steps - 1, len(x0), device=x0.device).round().long()
    parts = zip(*(part.split(128) for part in (x0, t, eps)))
    return torch.cat([diffusion.loss(network, *part) for part in parts]).mean().item()


def flatten(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])  # [P]


def trajectory(displacements, size=64):
    """Where raw and averaged weights are: of name -> θ - θ_0 [P], distances and a sketch.

    distance[a]["init"] and, for every name b before a, distance[a][b] are Euclidean norms.
    sketch[a] [size] is a fixed random linear map of the displacement (a count sketch, Charikar et
    al. 2002) that keeps distances to about 1 / (2 size)^½, 9%; trajectories are projected from it.
    """
    names, points = list(displacements), torch.stack([*displacements.values()])  # [n, P]
    signs = 2 * torch.randint(2, points.shape[1:], generator=torch.Generator().manual_seed(0)) - 1
    folded = F.pad(points * signs.to(points), (0, -points.shape[1] % size))
    sketch = folded.view(len(names), -1, size).sum(1)  # [n, size]
    distance = {}
    for i, name in enumerate(names):
        norms = [points[i].norm(), *((points[i] - other).norm() for other in points[:i])]
        distance[name] = {n: significant(v.item()) for n, v in zip(["init", *names], norms)}
    return {"distance": distance,
            "sketch": {n: [*map(significant, row)] for n, row in zip(names, sketch.tolist())}}


def significant(value):
    """Six digits: what float32 holds, and short lines."""
    return float(f"{value:.6g}")


def convergence(lines):
    """Of the log so far: the held-out losses' spread, and when each reached what raw has now.

    held_out_sd: standard deviation over the last quarter of the steps, about a straight line, so
    that a loss that still falls does not count as one that wobbles; None of fewer than 3 lines.
    reached: the first step of the log whose loss is not above raw's mean over that quarter.
    """
    quarter = [x for x in lines if x["step"] >= 0.75 * lines[-1]["step"]]
    level = np.mean([x["held_out_loss"]["raw"] for x in quarter])
    steps, wobble, reached = np.array([float(x["step"]) for x in quarter]), {}, {}
    for name in lines[-1]["held_out_loss"]:
        losses, wobble[name] = np.array([x["held_out_loss"][name] for x in quarter]), None
        if len(quarter) > 2:
            wobble[name] = np.std(losses - np.polyval(np.polyfit(steps, losses, 1), steps)).item()
        reached[name] = next((x["step"] for x in lines if x["held_out_loss"][name] <= level), None)
    return {"held_out_sd": wobble, "reached": reached}


@contextlib.contextmanager
def catching_signals():
    """Gives a list that Ctrl-C and SIGTERM fill, for the loop to stop between two steps."""
    caught = []
    handlers = {number: signal.signal(number, lambda number, _: caught.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(args, start, running, signals, model, origin, network, diffusion, ema, optimizer, data,
          held_out):
    """The loop: first log and save, then train, so that the last step is no special case.

    Everything random is a function of (seed, step), so a run that was interrupted ends with the
    same bits as one that was not. `signals` is empty until one of them asks to save and stop.
    `running` [3]: loss, gradient norm and their count since the last line of the log; they are
    read off the device only there. `origin` [P] are the initial weights.
    """
    # At step 0 they may be those of another run, whose checkpoint somebody deleted.
    log = [line for line in read_log(args.out) if start and line["step"] <= start]
    with replacing(args.out / "metrics.jsonl") as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in log))
    logged = {line["step"] for line in log}
    tick, tick_step = time.perf_counter(), start

    for step in range(start, args.steps + 1):
        if step not in logged and (step % args.log_every == 0 or step == args.steps):
            loss, norm, count = running.tolist()
            if not math.isfinite(loss + norm):
                sys.exit(f"training diverged before step {step}; a lower --lr may help")
            if step % args.log_every == 0:  # a run that is trained on later has the same means
                running.zero_()
            seconds = time.perf_counter() - tick
            speed = (step - tick_step) * args.batch_size / seconds if step > start else None
            model.eval()
            losses, displacements = {}, {}
            for weights in raw_and_ema(args.tracked):
                with weights.on(ema):
                    losses[str(weights)] = held_out_loss(network, diffusion, held_out)
                    if not weights.debias:
                        displacements[str(weights)] = flatten(model) - origin
            model.train()
            line = {"step": step, "loss": loss / count if count else None,
                    "images_per_second": speed, "grad_norm": norm / count if count else None,
                    "held_out_loss": losses}
            regular = [x for x in log if x["step"] % args.log_every == 0]
            line |= convergence([*regular, line]) | trajectory(displacements)
            log.append(line)
            with open(args.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if speed:
                minutes = (args.steps - step) * args.batch_size / speed / 60
                show(f"step {step}/{args.steps}  loss {loss / count:.4f}  {speed:.0f} images/s  "
                     f"{minutes:.1f} min left", keep=not sys.stdout.isatty() or step == args.steps)
            tick, tick_step = time.perf_counter(), step
        if step in (args.steps, *args.stage_steps) or step % args.save_every == 0 or signals:
            state = {"args": args.saved, "step": step, "model": model.state_dict(),
                     "optimizer": optimizer.state_dict(), "ema": ema.state_dict(),
                     "running": running}
            paths = [args.out / "checkpoint.pt"]  # what an interrupted run goes on from
            if step in args.stage_steps and step < args.steps and not signals:
                paths.append(stage_path(args.out, step, args.steps))
            for path in paths:
                with replacing(path) as temporary:
                    torch.save(state, temporary)
        if signals or step == args.steps:
            break

        torch.manual_seed(seed_of("train", args.seed, step))
        index = torch.randint(len(data), (args.batch_size,), device=data.device)  # [B]
        t = torch.randint(diffusion.num_steps, (args.batch_size,), device=data.device)  # [B]
        x0 = data.x0(index)  # [B, C, H, W]
        if args.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=x0.device) < 0.5, x0, x0.flip(3))
        eps = torch.randn_like(x0)
        for micro in zip(*(part.chunk(args.accumulate) for part in (x0, t, eps))):
            loss = diffusion.loss(network, *micro).sum() / args.batch_size
            loss.backward()
            running[0] += loss.detach()
        running[1] += torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        running[2] += 1
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / args.warmup)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    if signals:
        show(f"stopped at step {step} of {args.steps}; the same command goes on from here")
        sys.exit(130)


# ==================================================================================================
# Evaluation
# ==================================================================================================

METRICS = {  # 1: lower is better, -1: higher, 0: nearer to 1
    "fd": 1, "fid": 1, "is": -1, "precision": -1, "recall": -1, "tail_share": 0,
    "covered_modes": -1, "tv": 1, "legible": -1, "held_out_loss": 1}
CANDIDATES = (  # what --decay auto chooses from: the ladder's range, in round numbers
    "0.9", "0.93", "0.95", "0.97", "0.98", "0.99", "0.993", "0.995", "0.997", "0.998", "0.999",
    "0.9993", "0.9995", "0.9997", "0.9998", "0.9999", "0.99993", "0.99995")
SAMPLERS = {"ddpm": {"eta": 1.0}, "ddim": {}, "dpm++": {"order": 2}}


@torch.no_grad()
def draw_samples(args, network, diffusion, data, num_images):
    """Yields x0 [<=256, C, H, W] until there are num_images; all weights get the same noise."""
    for first in range(0, num_images, 256):
        generator = torch.Generator(data.device).manual_seed(seed_of("sample", args.seed, first))
        shape = min(256, num_images - first), *data.images.shape[1:]
        noise = torch.randn(shape, generator=generator, device=data.device)
        noise = noise.contiguous(memory_format=torch.channels_last)
        for _, _, x0 in diffusion.sample(network, noise, args.sample_steps, generator=generator,
                                         clip=data.bound, **SAMPLERS[args.sampler]):
            pass
        yield data.round(x0)


def load_classifier(args, data, held_out):
    """The run's classifier. It stays in the folder, so that all rows have the same features."""
    classifier = Classifier(data.images.shape[1], data.num_classes)
    path = args.out / "classifier.pt"
    if not path.exists():  # trained on the CPU: there two runs come to the same one
        show("training the classifier whose features the metrics use", keep=False)
        accuracy = train_classifier(classifier, *(copy.copy(d).to("cpu") for d in (data, held_out)))
        show(f"classifier: {accuracy:.1%} of held-out images read correctly")
        with replacing(path) as temporary:
            torch.save(classifier.state_dict(), temporary)
    with contextlib.suppress(Exception):  # as in load_checkpoint
        classifier.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return classifier.to(data.device).eval()
    raise ValueError(f"{path} is not the classifier of this run; delete it or choose another --out")


def load_features(args, data):
    """The network in --features: a function x0 [B, C, H, W] -> features [B, D].

    It is TorchScript and takes uint8 [B, 3, H, W]. ValueError, in one line, if it does not fit.
    """
    if not (data.is_pictures and data.images.shape[1] in (1, 3)):
        raise ValueError("--features takes pictures with 1 or 3 channels, no other data")
    try:
        network = torch.jit.load(args.features, map_location=data.device).eval()
        wants = "return_features" in {a.name for a in network.forward.schema.arguments}
    except (RuntimeError, ValueError, AttributeError):
        raise ValueError(f"--features {args.features} is not a TorchScript file with a "
                         "forward()") from None

    @torch.no_grad()
    def features_of(x0):
        images = ((x0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        return (network(images, return_features=True) if wants else network(images)).float()

    made = "an error"
    with contextlib.suppress(Exception):  # whatever FILE holds
        features = features_of(data.x0(torch.arange(2, device=data.device)))
        made = list(features.shape) if features.isfinite().all() else "NaN"
    if len(made) != 2 or made[0] != 2:
        raise ValueError(f"--features {args.features} makes {made} of two images, "
                         "uint8 [2, 3, H, W]; needed is [2, D]")
    return features_of


ROW_KEY = ("step", "weights", "decay", "debias")
RESULT_KEY = (*ROW_KEY, "sampler", "sample_steps", "num_samples", "features")


def weights_of(row):
    return Weights(row["weights"], row["decay"], row["debias"] == "1")


def read_rows(path, key=RESULT_KEY):
    """The rows of a table, all values text; ValueError if it is not ours."""
    if not path.exists():
        return []
    with open(path, newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            names, rows = reader.fieldnames or (), list(reader)
        except csv.Error:
            names = ()
    if not set(key) <= set(names):
        raise ValueError(f"{path} is not a table of this program; choose another --out")
    return rows


def write_rows(path, rows):
    names = [m for m in METRICS if any(row.get(m) not in (None, "") for row in rows)]
    columns = [*ROW_KEY, "init_share", *names, *(f"{n}_sd" for n in names), *RESULT_KEY[4:]]
    columns += dict.fromkeys(name for row in rows for name in row if name.startswith("mode_"))
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        known = [name for name in columns if any(name in row for row in rows)]
        writer = csv.DictWriter(file, known, restval="")
        writer.writeheader()
        writer.writerows(rows)


def load_stage(args, step, model, ema):
    model.eval()
    if ema.step != step:
        checkpoint = load_checkpoint(stage_path(args.out, step, args.steps))
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])


@torch.no_grad()
def rate_decays(args, model, network, diffusion, ema, held_out):
    """The rows of held_out.csv: at every stage the losses of raw, CANDIDATES and --decay.

    Averages of decays that were not tracked come out of the ladder; only the losses cost time.
    """
    path = args.out / "held_out.csv"
    rows = read_rows(path, ROW_KEY)
    done = {(row["step"], weights_of(row)) for row in rows}
    for step in args.stage_steps:
        missing = [weights for weights in raw_and_ema(dict.fromkeys([*CANDIDATES, *args.decay]))
                   if (str(step), weights) not in done]
        if missing:
            load_stage(args, step, model, ema)
        for number, weights in enumerate(missing, 1):
            show(f"held-out loss at step {step}: {number} of {len(missing)}", keep=False)
            with weights.on(ema):
                loss = held_out_loss(network, diffusion, held_out, num_images=512)
            share = ema.init_share(weights.decay) if weights.decay else ""
            key = dict(zip(ROW_KEY, (str(step), *weights[:2], str(int(weights.debias)))))
            rows.append(key | {"init_share": str(share), "held_out_loss": str(loss)})
        if missing:
            write_rows(path, rows)
            show(f"held-out loss at step {step}: {len(missing)} rows", not sys.stdout.isatty())
    return rows


def choose(held_out, step):
    """The candidates at a step, rows of `rate_decays`, from the lowest held-out loss up."""
    rows = [row for row in held_out if row["step"] == str(step) and row["decay"] in CANDIDATES]
    return sorted(rows, key=functools.partial(cost, metric="held_out_loss"))


def stage_weights(args, step, held_out):
    """What is evaluated at a stage, besides real."""
    chosen = [weights_of(choose(held_out, step)[0])] if args.auto else []
    return list(dict.fromkeys([*raw_and_ema(args.decay), *chosen]))


def missing_rows(args, held_out):
    """(step, Weights, key) of the rows that results.csv does not hold yet, stage after stage."""
    done = {tuple(row[k] for k in RESULT_KEY) for row in read_rows(args.out / "results.csv")}
    rows = [(step, weights, tuple(map(str, (
                step, weights.kind, weights.decay, int(weights.debias), args.sampler,
                args.sample_steps, args.num_samples, args.features))))
            for step in args.stage_steps
            for weights in (Weights("real"), *stage_weights(args, step, held_out))]
    return [row for row in rows if row[2] not in done]


@torch.no_grad()
def evaluate(args, missing, model, network, diffusion, ema, data, held_out):
    """Measure the missing rows; each is in results.csv as soon as it is known."""
    rows = read_rows(args.out / "results.csv")
    classifier = load_classifier(args, data, held_out)
    other_features = load_features(args, data) if args.features else None

    def features_of(batches, what):
        features, probs, count = [], [], 0
        for x0 in batches:
            own, prob = classifier(x0)
            features.append(other_features(x0) if other_features else own)
            probs.append(prob)
            count += len(x0)
            show(f"{what}: {count} images", keep=False)
        return torch.cat(features), torch.cat(probs)

    def stored(images, count):
        for index in torch.arange(min(count, len(images)), device=data.device).split(256):
            yield images.x0(index)

    features, _ = features_of(stored(data, max(args.num_samples, 10_000)), "training images")
    shares = None
    if data.labels is not None:
        shares = data.labels.bincount(minlength=data.num_classes).double() / len(data)
    real = {"moments": moments(features), "features": features[:args.num_samples], "shares": shares}
    for number, (step, weights, key) in enumerate(missing, 1):
        load_stage(args, step, model, ema)
        what = f"evaluating {number} of {len(missing)}: step {step}, {weights}"
        if weights.kind == "real" and len(held_out) < args.num_samples:
            what += f", of which there are only {len(held_out)}"
        share = ema.init_share(weights.decay) if weights.kind == "ema" else ""
        row = dict(zip(RESULT_KEY, key)) | {"init_share": str(share)}
        twin = [r for r in rows if all(r[k] == row[k] or k == "debias" for k in RESULT_KEY)]
        if weights.debias and share < 2**-25 and twin:  # float32 holds no difference
            row = twin[0] | row
        else:
            with weights.on(ema):
                batches = (stored(held_out, args.num_samples) if weights.kind == "real" else
                           draw_samples(args, network, diffusion, data, args.num_samples))
                features, probs = features_of(batches, what)
            metrics = measure(features, probs, real)
            if args.features:
                metrics = {k.replace("fd", "fid"): v for k, v in metrics.items()}
            if shares is not None:  # how often each mode comes, over how often it should
                often = probs.argmax(1).bincount(minlength=len(shares)) / len(probs) / shares
                binomial = (often * (1 / shares - often) / len(probs)).clamp(min=0).sqrt()
                for name, *values in zip(data.names, often.tolist(), binomial.tolist()):
                    metrics |= dict(zip((f"mode_{name}", f"mode_{name}_sd"), values))
            row |= {k: str(v) for k, v in metrics.items()}
        rows.append(row)
        write_rows(args.out / "results.csv", rows)
        show(what, keep=not sys.stdout.isatty())


def measured_rows(args):
    """The rows of results.csv with these samplers, samples and features, step after step."""
    settings = {k: str(getattr(args, k)) for k in RESULT_KEY[4:]}
    rows = [row for row in read_rows(args.out / "results.csv") if settings.items() <= row.items()]
    return begun(sorted(rows, key=lambda row: int(row["step"])))


def begun(rows):
    """Without the stages at which an interruption left no more than the real row."""
    steps = {row["step"] for row in rows if row["weights"] == "raw"}
    return [row for row in rows if row["step"] in steps]


def metrics_in(rows):
    return [metric for metric in METRICS if any(row.get(metric) for row in rows)]


def cost(row, metric):
    """A metric turned so that lower is better; what is not a number comes last."""
    value = float(row[metric])
    value = METRICS[metric] * value if METRICS[metric] else abs(value - 1)
    return math.inf if math.isnan(value) else value


def spread(row, metric):
    return float(row.get(f"{metric}_sd") or 0)


def horizon(row):
    """1 / (1 - decay) in steps, at the row's step; raw is decay 0."""
    t = torch.tensor([float(row["step"])], dtype=torch.float64)
    return 1 / -log_decays(row["decay"] or "0", t).expm1().item()


def print_table(rows):
    """Every value with its spread; * is the best of the step."""
    names = metrics_in(rows)
    print(f"\n{'step':>7}  {'weights':18} {'horizon':>9} {'init share':>10}"
          + "".join(f"{n.replace('_', ' '):>17}" for n in names))
    for row in rows:
        peers = [r for r in rows if r["step"] == row["step"] and r["weights"] != "real"]
        best = {n: row in peers and cost(row, n) == min(cost(r, n) for r in peers) for n in names}
        horizon_text = share = "-"
        if row["weights"] == "ema":
            horizon_text, share = f"{horizon(row):,.0f}", f"{float(row['init_share']):.2g}"
        values = "".join(f"{float(row[n]):8.3g}{' *'[best[n]]}±{spread(row, n):<7.1g}"
                         for n in names)
        print(f"{row['step']:>7}  {weights_of(row)!s:18} {horizon_text:>9} {share:>10}{values}")


def print_choices(args, held_out):
    """The decay of the lowest held-out loss at each stage, and its neighbours'."""
    for step in args.stage_steps:
        losses = {weights_of(row): float(row["held_out_loss"])
                  for row in held_out if row["step"] == str(step)}
        best = weights_of(choose(held_out, step)[0])
        at = CANDIDATES.index(best.decay)
        beside = [best._replace(decay=CANDIDATES[i]) for i in (at - 1, at + 1)
                  if 0 <= i < len(CANDIDATES)]
        print(f"held-out loss at step {step}: raw {losses[Weights('raw')]:.5g}; lowest "
              f"{losses[best]:.5g} at {best}, beside it "
              + ", ".join(f"{losses[w]:.5g} at {w}" for w in beside))


def print_convergence(last):
    """What the log's last line says of each average: its loss, how it wobbles, how soon it fell."""
    print(f"\n{'weights':18} {'held-out loss':>14} {'sd, last quarter':>17} "
          f"{'reaches raw at step':>20} {'from initial':>13} {'from raw':>9}")
    for name, loss in last["held_out_loss"].items():
        reached, apart = last["reached"][name], last["distance"].get(name, {})
        wobble = last["held_out_sd"][name]
        print(f"{name:18} {loss:14.5g} {'-' if wobble is None else f'{wobble:.2g}':>17} "
              f"{'-' if reached is None else reached:>20} {apart.get('init', ''):>13.5} "
              f"{apart.get('raw', ''):>9.5}")


# ==================================================================================================
# Plots
# ==================================================================================================

RAW = "#d9772b"


def as_pictures(data, x0):
    """[N, H, W, 3 or 1] in 0..1; of other channel counts the first, on its own scale."""
    x0 = x0.cpu().permute(0, 2, 3, 1)  # [N, H, W, C]
    if data.is_pictures and x0.shape[3] in (1, 3):
        return ((x0 + 1) / 2).clamp(0, 1)
    x0 = x0[..., :1]
    return (x0 - x0.amin()) / (x0.amax() - x0.amin()).clamp(min=1e-6)


def save(figure, path, **settings):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, **settings)


def tidy(axis, title, **labels):
    axis.set(title=title, **labels)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def plot_samples(args, weights, network, diffusion, ema, data):
    """samples.png: rows of real images, then raw above EMA from the same noise, several times."""
    repeats, columns = max(1, 6 // len(weights)), 16
    rows = [("real", data.x0(torch.arange(columns, device=data.device)))]
    drawn = {}
    for w in weights:
        with w.on(ema):
            drawn[w] = torch.cat([*draw_samples(args, network, diffusion, data, repeats * columns)])
    for i in range(repeats):
        rows += [(str(w) if w.kind == "raw" else f"EMA {w}",
                  drawn[w][i * columns:(i + 1) * columns]) for w in weights]
    figure = Figure(figsize=(9, 0.56 * len(rows) + 0.4))
    axes = figure.subplots(len(rows))
    for i, (axis, (text, x0)) in enumerate(zip(axes, rows)):
        picture = F.pad(as_pictures(data, x0), (0, 0, 0, 1), value=1.0)  # white between images
        axis.imshow(picture.transpose(0, 1).flatten(1, 2).numpy(), cmap="gray", vmin=0, vmax=1,
                    interpolation="nearest")
        axis.set_axis_off()
        axis.text(-0.01, 0.5, text, transform=axis.transAxes, ha="right", va="center",
                  color=RAW if text == "raw" else "black")
    axes[0].set_title(f"{Path(args.data).stem}, step {ema.step}: real images; below, samples from "
                      "the same noise", fontsize=11)
    save(figure, args.out / "samples.png", bbox_inches="tight")


def plot_curves(args, log):
    """curves.png: training loss; held-out loss of raw and every average."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = [line for line in log if line["loss"] is not None]
    left.plot([x["step"] for x in trained], [x["loss"] for x in trained], color="black")
    tidy(left, "training loss", xlabel="step", ylabel="mean squared error")
    names = [n for n in log[-1]["held_out_loss"] if n != "raw"]
    colors = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.9, max(len(names) // 2, 1)))
    for i, name in enumerate(names):
        right.plot([x["step"] for x in log], [x["held_out_loss"].get(name) for x in log],
                   color=colors[i // 2], ls="--" if name.endswith("debiased") else "-",
                   label=f"EMA {name}")
    right.plot([x["step"] for x in log], [x["held_out_loss"]["raw"] for x in log], color=RAW,
               label="raw")
    tidy(right, "held-out loss, fixed images, times and noise", xlabel="step")
    for axis in (left, right):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    right.legend(frameon=False)
    save(figure, args.out / "curves.png")


def plot_training(args, log):
    """training.png: held-out losses, their wobble and convergence, gradients, trajectories."""
    steps, last = [line["step"] for line in log], log[-1]
    names = list(last["distance"])  # raw, then the plain averages
    colors = dict(zip(names[1:], matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(names)))))
    colors["raw"] = RAW
    figure = Figure(figsize=(18, 8.5), layout="constrained")
    (loss, sd, reached, norm), (initial, raw, apart, plane) = figure.subplots(2, 4)

    for name in names:
        settings = {"color": colors[name], "label": name, "lw": 1.2}
        loss.plot(steps, [line["held_out_loss"][name] for line in log], **settings)
        initial.plot(steps, [line["distance"][name]["init"] for line in log], **settings)
        if name != "raw":
            raw.plot(steps, [line["distance"][name]["raw"] for line in log], **settings)
    tidy(loss, "held-out loss", xlabel="step", yscale="log")
    norm.legend(*loss.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=2)
    tidy(initial, "distance from the initial weights", xlabel="step")
    tidy(raw, "distance from the raw weights", xlabel="step")

    for debias, style in ((False, "-"), (True, "--")):
        line = constant([dict(zip(ROW_KEY, (last["step"], *w[:2], str(int(w.debias)))))
                         for w in raw_and_ema(args.tracked)], debias)
        for axis, key in ((sd, "held_out_sd"), (reached, "reached")):
            values = [last[key][str(weights_of(row))] for row in line]
            axis.plot([*map(horizon, line)], [math.nan if v is None else v for v in values],
                      style, marker=".", color="black", label="debiased" if debias else "plain")
    tidy(sd, "wobble of the held-out loss, last quarter", ylabel="standard deviation",
         yscale="log" if any(last["held_out_sd"].values()) else "linear")
    tidy(reached, "first step at raw's loss of the last quarter", ylabel="step")
    for axis in (sd, reached):
        decay_axis(axis.xaxis)
        axis.legend(frameon=False, fontsize=8)

    trained = [line for line in log if line["grad_norm"] is not None]
    norm.plot([x["step"] for x in trained], [x["grad_norm"] for x in trained], color="black")
    tidy(norm, "gradient norm, mean since the last line", xlabel="step", yscale="log")

    table = np.zeros((len(names) + 1,) * 2)
    for i, name in enumerate(names, 1):
        table[i, :i] = table[:i, i] = [last["distance"][name][n] for n in ["init", *names[:i - 1]]]
    image = apart.imshow(table, cmap="viridis")
    apart.set(title=f"distances at step {last['step']}", xticks=range(len(table)),
              yticks=range(len(table)), yticklabels=["initial", *names])
    apart.set_xticklabels(["initial", *names], rotation=90)
    figure.colorbar(image, ax=apart, shrink=0.8)

    paths = np.array([[line["sketch"][name] for name in names] for line in log])  # [lines, n, 64]
    axes = np.linalg.svd(paths.reshape(-1, paths.shape[2]), full_matrices=False)[2][:2]  # [2, 64]
    for name, path in zip(names, (paths @ axes.T).transpose(1, 0, 2)):
        plane.plot(*path.T, color=colors[name], lw=0.8 if name == "raw" else 1.4)
        plane.plot(*path[-1], "o", color=colors[name], ms=4)
    plane.plot(0, 0, "k*", ms=10)
    tidy(plane, "trajectories from the initial weights (star)", xlabel="first principal direction",
         ylabel="second")
    save(figure, args.out / "training.png")


def decay_axis(axis):
    """A logarithmic axis of horizons, marked with their decays."""
    powers = range(7)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}label": "decay"})
    axis.set_ticks([10**k for k in powers],
                   ["raw"] + [f"{1 - 10**-k:.{k}f}" for k in powers if k], fontsize=7)
    axis.set_ticks([], minor=True)


def constant(rows, debias):
    """raw and the constant decays among rows, shortest first: a schedule has no fixed place."""
    rows = [row for row in rows if row["weights"] == "raw" or (
        row["debias"] == str(int(debias)) and
        (row["decay"][:1].isdigit() or row["decay"].startswith("halflife")))]
    return sorted(rows, key=horizon)


def draw_decays(axis, rows, metric, color, label=None):
    """A metric against the decay, with its spread; debiased averages are dashed."""
    for debias, style in ((False, "-"), (True, "--")):
        line = [row for row in constant(rows, debias) if row.get(metric)]
        axis.errorbar([*map(horizon, line)], [float(row[metric]) for row in line],
                      [spread(row, metric) for row in line], color=color, ls=style, marker=".",
                      ms=4, lw=1.2, elinewidth=0.7, label=None if debias else label)
    tidy(axis, metric.replace("_", " "))
    decay_axis(axis.xaxis)
    if metric in ("fd", "fid", "held_out_loss"):
        axis.set_yscale("log")


def plot_sweep(rows, held_out, title, path):
    """sweep.png: precision and recall, every metric and the best decays, stage by stage."""
    real, steps = rows[0], list(dict.fromkeys(row["step"] for row in rows))
    at = {step: [row for row in [*rows, *held_out] if row["step"] == step] for step in steps}
    names = metrics_in([*rows, *held_out])
    colors = dict(zip(steps, matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(steps)))))
    lines = -(-(len(names) + 3) // 4)
    figure = Figure(figsize=(18, 4.2 * lines), layout="constrained")
    panels = figure.subplots(lines, 4).flat
    figure.suptitle(f"{title}; plain averages solid, debiased dashed, spread as bars")

    axis = next(panels)
    for step in steps:
        for debias, style in ((False, "-"), (True, "--")):
            line = [row for row in constant(at[step], debias) if row.get("recall")]
            points = [(float(row["recall"]), float(row["precision"])) for row in line]
            axis.plot(*zip(*points), style, marker=".", color=colors[step], lw=1,
                      label=None if debias else f"step {step}")
            for row, point in zip(line, points) if step == steps[-1] and not debias else ():
                axis.annotate(row["decay"] or "raw", point, xytext=(3, 3), fontsize=7,
                              textcoords="offset points")
    where = float(real["recall"]), float(real["precision"])
    axis.plot(*where, "k*", ms=9, label="real, at {:.2f}, {:.2f}".format(*where))
    tidy(axis, "precision and recall along the decays", xlabel="recall", ylabel="precision")
    axis.legend(frameon=False, fontsize=8)
    # The frame is that of the debiased averages: what collapses leaves it.
    frame = [row for row in rows if row["debias"] == "1"] or rows
    recalls = [float(row["recall"]) for row in frame]
    axis.set(xlim=(min(recalls) - 0.05, 1.02),
             ylim=(0, 1.2 * max(float(row["precision"]) for row in frame) + 0.01))

    for name in names:
        axis = next(panels)
        for step in steps:
            draw_decays(axis, at[step], name, colors[step])
        if real.get(name):
            axis.axhline(float(real[name]), color="black", lw=0.7, ls=":")

    for debias in (False, True):
        axis = next(panels)
        for i, name in enumerate(names):
            best = []
            for step in steps:
                line = [row for row in constant(at[step], debias) if row.get(name)]
                if line:
                    top = min(line, key=functools.partial(cost, metric=name))
                    close = [horizon(row) for row in line if cost(row, name) <= cost(top, name)
                             + math.hypot(spread(row, name), spread(top, name))]
                    best.append((int(step) * 1.03**(i - len(names) / 2), horizon(top), min(close),
                                 max(close)))
            x, y, low, high = np.array(best).reshape(-1, 4).T
            axis.errorbar(x, y, [y - low, high - y], marker="o", ms=4, lw=1, elinewidth=0.7,
                          color=f"C{i}", label=name.replace("_", " "))
        tidy(axis, f"best {'debiased' if debias else 'plain'} decay; bars: within the spread",
             xlabel="step", xscale="log")
        axis.set_xticks([*map(int, steps)], steps)
        axis.set_xticks([], minor=True)
        decay_axis(axis.yaxis)
    axis.legend(frameon=False, fontsize=7, ncols=2)
    for axis in panels:
        axis.set_axis_off()
    save(figure, path)


def plot_modes(rows, title, path):
    """modes.png: how often each mode comes, over how often it should; the rare ones' mass.

    Shown are raw, the plain decay of the best Fréchet distance, and the longest of CANDIDATES that
    was measured, debiased: plain, little but the initial weights would be seen of it.
    """
    modes = [name for name in rows[0] if name.startswith("mode_") and not name.endswith("_sd")]
    steps = list(dict.fromkeys(row["step"] for row in rows))
    if not modes:
        return
    line = constant([row for row in rows if row["step"] == steps[-1]], False)
    middle = min(line[1:] or line, key=functools.partial(cost, metric=metrics_in(rows)[0]))
    debiased = constant([row for row in rows if row["step"] == steps[-1]], True)
    long = [row for row in debiased if row["decay"] in CANDIDATES or row["weights"] == "raw"][-1]
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    figure.suptitle(title)
    shown = {str(weights_of(row)): row for row in (line[0], middle, long)}
    for i, (label, row) in enumerate(shown.items()):
        often = [max(float(row[name] or 0), 0.03) for name in modes]
        left.errorbar([k + 0.2 * (i - 1) for k in range(len(modes))], often,
                      [spread(row, name) for name in modes], fmt="o", ms=4, elinewidth=0.7,
                      color=(RAW, "#3b8f6b", "#3b4cc0")[i], label=label)
    left.axhline(1, color="black", lw=0.8)
    left.set_xticks(range(len(modes)), [name.removeprefix("mode_") for name in modes])
    tidy(left, f"samples of each mode over its true share, step {steps[-1]}; 0 is drawn at 0.03",
         yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.legend(frameon=False)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(steps)))
    for step, color in zip(steps, colors):
        draw_decays(right, [row for row in rows if row["step"] == step], "tail_share", color,
                    f"step {step}")
    right.axhline(1, color="black", lw=0.8)
    right.legend(frameon=False, fontsize=8)
    save(figure, path)


def plot_ranking(pooled, names, orders, path):
    """report.png: every metric at every stage, one line a method; flips are marked."""
    tables = [*pooled.values()]
    metrics, steps = metrics_in(tables[0]), list(dict.fromkeys(row["step"] for row in tables[0]))
    figure = Figure(figsize=(4.2 * len(steps), 2.8 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), len(steps), squeeze=False)
    figure.suptitle("plain averages solid, debiased dashed\nflips of the plain ranking against "
                    "that at best decays: ! outside, ? inside the spread", fontsize=10)
    for axis_row, metric in zip(axes, metrics):
        for axis, step in zip(axis_row, steps):
            for i, (rows, name) in enumerate(zip(tables, names.values())):
                draw_decays(axis, [r for r in rows if r["step"] == step], metric, f"C{i}", name)
            axis.set_title(f"{metric.replace('_', ' ')}, step {step}")
            for row in constant([row for row in tables[0] if row["step"] == step], False):
                order = orders.get((step, weights_of(row), metric), "")
                axis.text(horizon(row), 0.92, order[-1:] if order[-1:] in "!?" else "",
                          transform=axis.get_xaxis_transform(), ha="center", color="#c00000")
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


# ==================================================================================================
# Reports
# ==================================================================================================

def pool(tables):
    """One table of several that differ in their seed: the means, and the spread over seeds.

    Rows that are not in all of them are left out; a single table keeps its own spreads.
    """
    by_key = {}
    for row in [row for rows in tables for row in rows]:
        by_key.setdefault(tuple(row[k] for k in ROW_KEY), []).append(row)
    pooled = []
    for rows in by_key.values():
        if len(rows) == len(tables):
            row = dict(rows[0])
            for name in [*row] if len(rows) > 1 else ():
                known = name in METRICS or name.startswith("mode_") and not name.endswith("_sd")
                if known and row[name]:
                    values = [float(r[name]) for r in rows]
                    row |= {name: str(np.mean(values)), f"{name}_sd": str(np.std(values, ddof=1))}
            pooled.append(row)
    return begun(sorted(pooled, key=lambda row: int(row["step"])))


def print_agreement(seed, rows, held_out):
    """Whether the decay of the lowest held-out loss has the lowest Fréchet distance; [agrees].

    It agrees if the two distances differ by no more than the root of the summed squares of their
    bootstrap spreads: what a reader of one run could tell apart.
    """
    metric, agrees = metrics_in(rows)[0], []  # fd or fid
    for step in dict.fromkeys(row["step"] for row in rows):
        measured = {weights_of(r): r for r in rows if r["step"] == step and r["weights"] != "real"}
        ranked = choose(held_out, step)
        chosen = measured.get(weights_of(ranked[0])) if ranked else None
        if chosen is None:
            print(f"step {step}, seed {seed}: what held-out loss chooses was not measured; "
                  "--decay auto does")
            continue
        best = min(measured.values(), key=lambda row: cost(row, metric))
        excess = cost(chosen, metric) - cost(best, metric)
        agrees.append(excess <= math.hypot(spread(chosen, metric), spread(best, metric)))
        print(f"step {step}, seed {seed}: held-out loss chooses {weights_of(chosen)}, {metric} "
              f"{float(chosen[metric]):.3g}; best is {weights_of(best)}, {float(best[metric]):.3g} "
              f"(sd {spread(best, metric):.2g}): {'agrees' if agrees[-1] else 'differs'}")
    return agrees


def rank(methods):
    """{(step, Weights, metric): order} of methods {letter: pooled rows}, such as "AB" or "BA!".

    The reference, under Weights("best"), gives every method its best of the common decays. A
    ! marks a pair whose order is flipped against it outside the spread, a ? one flipped inside:
    outside means that both differences exceed the root of the summed squares of the two spreads.
    """
    tables = [{(r["step"], weights_of(r)): r for r in rows if r["weights"] != "real"}
              for rows in methods.values()]
    common = [key for key in tables[0] if all(key in table for table in tables)]
    orders = {}

    def values(metric, rows):
        """{letter: (cost, spread)}"""
        return {x: (cost(row, metric), spread(row, metric)) for x, row in zip(methods, rows)}

    for metric in metrics_in(tables[0].values()):
        for step in dict.fromkeys(step for step, _ in common):
            averages = [weights for s, weights in common if s == step]
            best = values(metric, [min((table[step, weights] for weights in averages),
                                       key=functools.partial(cost, metric=metric))
                                   for table in tables])
            reference = sorted(methods, key=best.get)
            orders[step, Weights("best"), metric] = "".join(reference)
            for weights in averages:
                here = values(metric, [table[step, weights] for table in tables])
                flips = [all(b[0] - a[0] > math.hypot(a[1], b[1])
                             for a, b in ((best[x], best[y]), (here[y], here[x])))
                         for i, x in enumerate(reference) for y in reference[i + 1:]
                         if here[x][0] > here[y][0]]
                mark = "!" if any(flips) else "?" if flips else ""
                orders[step, weights, metric] = "".join(sorted(methods, key=here.get)) + mark
    return orders


def load_methods(paths):
    """{settings: {seed: (rows, held_out)}} of finished runs; ValueError where one is none."""
    methods = {}
    for path in paths:
        rows = read_rows(path / "results.csv")
        state = load_checkpoint(path / "checkpoint.pt") if rows else {"step": 0}
        if not state["step"] or state["step"] < state["args"]["steps"]:
            raise ValueError(f"{path} holds no finished run; give folders that --out named")
        args = state["args"] | {"data": Path(state["args"]["data"]).name}
        held_out, found = read_rows(path / "held_out.csv", ROW_KEY), {}
        for row in rows:
            settings = {k: args[k] for k in (*FIXED, "steps") if k != "seed"}
            settings |= {k: row[k] for k in RESULT_KEY[4:]}
            found.setdefault(tuple(settings.items()), []).append(row)
        for settings, rows in found.items():
            seeds = methods.setdefault(settings, {})
            if args["seed"] in seeds:
                raise ValueError(f"{path} is a run of the same settings and seed as another one")
            seeds[args["seed"]] = rows, held_out
    if len({(dict(settings)["data"], dict(settings)["features"]) for settings in methods}) > 1:
        raise ValueError("runs on different data, or measured in different features, have no "
                         "common ranking; give them to --report apart")
    if len(methods) > len(string.ascii_uppercase):
        raise ValueError(f"{len(methods)} methods are too many to letter; 26 is the most")
    return methods


def report(methods, out):
    """Runs that differ in their seed are one method; methods of other settings compete."""
    pooled, names = {}, {}
    for old in [*out.glob("sweep-?.png"), *out.glob("modes-?.png"), *out.glob("report.png")]:
        old.unlink()  # the letters may mean other methods now
    for letter, (settings, seeds) in zip(string.ascii_uppercase, methods.items()):
        differ = [f"{k} {v}" for k, v in settings if any((k, v) not in other for other in methods)]
        names[letter] = ", ".join(differ) or "all runs"
        tables, losses = zip(*seeds.values())
        pooled[letter] = pool(tables)
        spread_of = f"{len(seeds)} seeds" if len(seeds) > 1 else "the bootstrap of one seed"
        left_out = sum(map(len, tables)) - len(seeds) * len(pooled[letter])
        print(f"\n{letter}: {names[letter]}; mean and spread of {spread_of}"
              + f"; {left_out} rows that not all seeds have are left out" * (left_out > 0))
        if not pooled[letter]:
            continue
        print_table(pooled[letter])
        agrees = [x for seed, both in seeds.items() for x in print_agreement(seed, *both)]
        if agrees:
            print(f"the choice by held-out loss is within the spread of the best in {sum(agrees)} "
                  f"of {len(agrees)}")
        title = f"{names[letter]}, {spread_of}"
        plot_sweep(pooled[letter], pool(losses), title, out / f"sweep-{letter}.png")
        plot_modes(pooled[letter], title, out / f"modes-{letter}.png")
    orders = rank(pooled)
    if len(methods) > 1 and not orders:
        print("\nthe methods have no step in common to be ranked at")
    elif len(methods) > 1:
        columns = metrics_in(pooled["A"])
        print("\nranking, best first; at the best decay of each, then at each decay; flipped "
              "against the former: ! outside, ? inside the spread")
        heads = "".join(f"{c.replace('_', ' '):>14}" for c in columns)
        print(f"{'step':>7}  {'weights':18}{heads}")
        for step, weights in dict.fromkeys(key[:2] for key in orders):
            print(f"{step:>7}  {weights!s:18}"
                  + "".join(f"{orders.get((step, weights, c), ''):>14}" for c in columns))
        plot_ranking(pooled, names, orders, out / "report.png")


# ==================================================================================================
# Command line
# ==================================================================================================

SMALL = {  # minutes on two CPU cores
    "preset": "small", "data": "glyphs", "decay": ["0.999"], "steps": 3600, "stages": [1.0],
    "batch_size": 32, "accumulate": 1, "lr": 2e-3, "warmup": 100, "flip": False, "seed": 0,
    "objective": "v", "schedule": "cosine", "network": {}, "save_every": 500, "log_every": 100,
    "sampler": "dpm++", "sample_steps": 16, "num_samples": 2048, "features": "", "device": "auto"}
PRESETS = {
    "small": SMALL,
    "cifar10": SMALL | {  # Ho et al. 2020, appendix B
        "preset": "cifar10", "data": "cifar10", "decay": ["0.9999"], "steps": 800_000,
        "batch_size": 128, "lr": 2e-4, "warmup": 5000, "flip": True, "objective": "eps",
        "schedule": "linear", "save_every": 5000, "log_every": 1000, "sampler": "ddpm",
        "sample_steps": 1000, "num_samples": 50_000,
        "network": {"width": 128, "multipliers": (1, 2, 2, 2), "num_blocks": 2, "attention": (1,),
                    "scale_shift": False, "dropout": 0.1}},
}
SWEEP = ("0.5", "0.9", "0.99", "0.999", "0.9993", "0.9995", "0.9997", "0.9999", "0.99999",
         "0.999999")
# What a run cannot change half-way.
FIXED = ("preset", "data", "batch_size", "accumulate", "lr", "seed", "objective", "schedule")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line instead of argparse's usage text."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=math.inf):
    """An argparse type: a number of this kind from low to high."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high and kind(text) != math.inf:
                return kind(text)
        allowed = f"{'a whole number' if kind is int else 'a number'} from {low}"
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; give {allowed}" + f" to {high}" * (high < math.inf))
    return parse


def several(parse):
    """An argparse type: comma-separated items, each kept once."""
    def parse_all(text):
        try:
            return list(dict.fromkeys(parse(item) for item in text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return parse_all


def decays(text):
    """An argparse type: the items of --decay; sweep stands for the ten of SWEEP."""
    def parse(item):
        try:
            return item if item == "auto" else parse_decay(item)
        except ValueError as error:
            raise ValueError(f"{error}, sweep, auto") from None
    items = [",".join(SWEEP) if item == "sweep" else item for item in text.split(",")]
    return several(parse)(",".join(items))


def make_parser():
    parser = Parser(description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    formatter_class=argparse.RawTextHelpFormatter)

    def add(flag, text, **settings):
        default = SMALL.get(flag[2:].replace("-", "_"), "")
        default = ",".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(flag, help=text + (f"\n[{default}]" if default != "" else ""),
                            **{"metavar": flag[2:].upper()} | settings)

    count = number(int, 1, 10**8)
    add("--decay", "EMA decays to compare, separated by commas: a number in [0, 1); step (the\n"
        "plain average); ramp:0.9999; halflife:2000 (steps); power:0.10 (relative width);\n"
        "sweep: ten from 0.5 to 0.999999; auto: at each stage the one between 0.9 and\n"
        "0.99995 that has the lowest held-out loss", type=decays)
    add("--data", "glyphs, mnist, fashion, cifar10; a folder of idx files; a folder of images,\n"
        "their classes in sub-folders; or an .npz file with `images`, [N, C, H, W] or\n"
        "[N, H, W, C] (if H and W differ, C is the smaller end), and perhaps `labels`")
    add("--out", "folder for checkpoints, tables and pictures [runs/ and the name of the data]",
        type=Path)
    add("--steps", "optimizer steps; more than a finished run has trains it on", type=count)
    add("--stages", "fractions of the run at which everything is evaluated",
        type=several(number(float, 1e-9, 1)))
    add("--batch-size", "images per optimizer step", type=count)
    add("--accumulate", "micro-batches that a batch is split into, to save memory", type=count)
    add("--lr", "learning rate of Adam, after a linear warm-up", type=number(float, 0))
    add("--seed", "of the initial weights, data order, noise and samples", type=number(int, 0))
    add("--objective", "what the network predicts: the noise, the data or the velocity",
        choices=Diffusion.OBJECTIVES, metavar=None)
    add("--schedule", "the noise schedule; flow is the straight path of flow matching",
        choices=Diffusion.SCHEDULES, metavar=None)
    add("--sampler", "ddpm: ancestral; ddim: deterministic; dpm++: DPM-Solver++(2M)",
        choices=SAMPLERS, metavar=None)
    add("--sample-steps", "network evaluations per sample, at most 1000", type=number(int, 1, 1000))
    add("--num-samples", "samples per row of the table", type=number(int, 16, 10**8))
    add("--save-every", "steps between checkpoints", type=count)
    add("--log-every", "steps between lines of metrics.jsonl", type=count)
    add("--features", "TorchScript file that maps uint8 [N, 3, H, W] to features, such as\n"
        "Inception; the Frechet distance is then called fid [a classifier trained here]")
    add("--preset", "cifar10: the network and training of the DDPM paper; needs a GPU",
        choices=PRESETS, metavar=None)
    add("--report", "finished runs (folders) to compare instead of training one: runs that differ\n"
        "in their seed become one method, others compete; pictures go to --out [runs/report]",
        type=Path, nargs="+", metavar="RUN")
    add("--device", "auto is a GPU where there is one", type=str)
    return parser


def resolve(given):
    """(settings, checkpoint or None) from the flags given, the preset and the run in --out.

    Raises ValueError or OSError, in one line, where they do not fit together.
    """
    args = PRESETS[given.get("preset", "small")] | given
    name = Path(args["data"]).resolve().stem if args["preset"] == "small" else args["preset"]
    out = Path(args.setdefault("out", Path("runs", name)))
    if any(p.exists() and not p.is_dir() for p in (out, *out.parents)):
        raise ValueError(f"--out {out} is, or lies below, a file; give a folder")
    checkpoint = None
    if (out / "checkpoint.pt").exists():
        checkpoint = load_checkpoint(out / "checkpoint.pt")
        run = checkpoint["args"]
        paths = {run["data"], given.get("data", run["data"])} - {"glyphs", *DOWNLOADS}
        if len({*map(os.path.realpath, paths)}) == 1 < len(paths):  # two spellings of one
            given = given | {"data": run["data"]}
        args |= run | given
        changed = [f"--{k.replace('_', '-')} {given[k]} (the run has {run[k]})"
                   for k in FIXED if k in given and given[k] != run[k]]
        if changed:
            raise ValueError(f"{out} holds a run with other settings: {', '.join(changed)}; "
                             "leave them out, or choose another --out")
    tables = read_rows(out / "results.csv"), read_rows(out / "held_out.csv", ROW_KEY)  # ours?
    if not checkpoint and (any(tables) or any(out.glob("checkpoint-*.pt"))):
        raise ValueError(f"{out} holds what a run left without its checkpoint.pt; give another "
                         "--out")
    args.setdefault("tracked", [decay for decay in args["decay"] if decay != "auto"])
    args["saved"] = {k: v for k, v in args.items() if k not in ("out", "device", "saved")}
    args = argparse.Namespace(**args)
    args.auto = "auto" in args.decay
    args.decay = [decay for decay in args.decay if decay != "auto"]
    if args.batch_size % args.accumulate:
        raise ValueError(f"--accumulate {args.accumulate} does not divide --batch-size "
                         f"{args.batch_size}")
    args.stage_steps = sorted({max(1, round(f * args.steps)) for f in args.stages})
    reached = checkpoint["step"] if checkpoint else 0
    if args.steps < reached:
        raise ValueError(f"--steps {args.steps} is less than the {reached} of the run in {out}")
    lost = [step for step in args.stage_steps
            if step < reached and not stage_path(out, step, args.steps).exists()]
    if "stages" not in given:  # those of the run, now fractions of another number of steps
        args.stage_steps = [step for step in args.stage_steps if step not in lost]
    if lost and ("stages" in given or not args.stage_steps):
        raise ValueError(f"{out} kept no checkpoint at step {lost[0]}: ask for --stages before "
                         "training")
    for step in args.stage_steps:
        if step < reached:
            load_checkpoint(stage_path(out, step, args.steps), mmap=True)  # is it one?
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        known = torch.device(args.device).type in ("cpu", "cuda")
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError, ImportError):
        known = False
    if not known:
        raise ValueError(f"--device {args.device} is not to be had here; give cpu, cuda or cuda:1")
    return args, checkpoint


def print_configuration(args, data, held_out, model, network, diffusion, start):
    """What will run, and for how long: from one training step and one batch of samples, timed."""
    num_parameters = sum(p.numel() for p in model.parameters())
    modes = "no labels" if data.labels is None else f"{len(data.names)} modes"
    steps = torch.arange(1, args.steps + 1, dtype=torch.float64)
    print(f"data       {args.data}: {len(data):,} training and {len(held_out):,} held-out images "
          f"{list(data.images.shape[1:])}, {modes}\n"
          f"network    UNet, {num_parameters / 1e6:.2f} M parameters, on {data.device}\n"
          f"training   {args.steps:,} steps of {args.batch_size} images, {args.objective} on the "
          f"{args.schedule} schedule, Adam {args.lr:g}, seed {args.seed}")
    for decay in args.decay:
        rates = -log_decays(decay, steps).expm1()
        print(f"EMA        {decay}: horizon {1 / rates[-1].item():,.0f} steps, init share at the "
              f"end {torch.log1p(-rates).sum().exp().item():.2g}")
    if args.auto:
        print("EMA        auto: at each stage the decay of the lowest held-out loss")
    print(f"evaluation {args.num_samples:,} samples a row by {args.sampler} in {args.sample_steps} "
          f"steps, at steps {', '.join(map(str, args.stage_steps))}\n"
          f"output     {args.out}")
    if start == args.steps:
        return
    batch_size = args.batch_size // args.accumulate
    x0 = data.x0(torch.arange(batch_size, device=data.device) % len(data))
    t = torch.zeros(len(x0), dtype=torch.long, device=data.device)
    seconds = {True: math.inf, False: math.inf}  # the least time with and without gradients
    for grad in (True, False) * 4:
        tick = time.perf_counter()
        with torch.set_grad_enabled(grad):
            loss = diffusion.loss(network, x0, t, x0).mean()
            if grad:
                loss.backward()
        loss.item()  # waits for the device
        seconds[grad] = min(seconds[grad], time.perf_counter() - tick)
    model.zero_grad()
    rows = 1 + 2 * len(args.decay) + args.auto
    forward = len(args.stage_steps) * rows * args.num_samples * args.sample_steps  # images
    forward += len(args.stage_steps) * len(raw_and_ema(CANDIDATES)) * min(512, len(held_out))
    forward += (args.steps - start) / args.log_every * rows * min(128, len(held_out))
    total = (args.steps - start) * args.accumulate * seconds[True] + (
        forward / batch_size * seconds[False])
    print(f"estimated  {total / 60:.0f} minutes", flush=True)


def main(argv=None):
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    if "report" in given:
        if others := given.keys() - {"report", "out"}:
            other = min(others).replace("_", "-")
            parser.error(f"--report goes with --out alone, not with --{other}")
        out = given.get("out", Path("runs", "report"))
        try:
            methods = load_methods(given["report"])
            out.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            parser.error(error)
        return report(methods, out)
    try:
        args, checkpoint = resolve(given)
        data, held_out = load_data(args.data).to(args.device).split()
        torch.manual_seed(seed_of("init", args.seed))
        model = UNet(data.images.shape[1], **args.network)
        model = model.to(args.device, memory_format=torch.channels_last)  # CPU: a fifth faster
        origin = flatten(model)

        def network(x, t):  # bfloat16 on a GPU
            with torch.autocast(data.device.type, torch.bfloat16, data.device.type == "cuda"):
                return model(x, t)

        diffusion = Diffusion(args.schedule, args.objective)
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
        ema = EMABank(model, args.tracked)
        held_out_loss(network, diffusion, held_out, num_images=1)  # do the shapes fit?
        if args.features:
            load_features(args, data)  # does it fit?
        if (args.out / "classifier.pt").exists():
            load_classifier(args, data, held_out)  # is it one?
        args.saved["data_shape"] = [len(data), *data.images.shape[1:], data.num_classes]
        if checkpoint and checkpoint["args"]["data_shape"] != args.saved["data_shape"]:
            raise ValueError(f"{args.data} has changed since the run in {args.out} began")
        step, running = 0, torch.zeros(3, device=data.device)
        if checkpoint:
            step, running = checkpoint["step"], checkpoint["running"].to(data.device)
            for part, name in ((model, "model"), (optimizer, "optimizer"), (ema, "ema")):
                part.load_state_dict(checkpoint[name])
        probe = EMABank(nn.Linear(1, 1), args.tracked)
        for probe.step in args.stage_steps:
            for decay in args.decay:
                try:
                    probe.error_bound(decay)  # is it tracked, or can it be read out?
                except ValueError as error:
                    raise ValueError(f"{error}; a run with another --out can track it") from None
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(error)
    print_configuration(args, data, held_out, model, network, diffusion, step)
    if step < args.steps or checkpoint["args"]["steps"] != args.steps:  # or it ends earlier
        with catching_signals() as signals:
            train(args, step, running, signals, model, origin, network, diffusion, ema, optimizer,
                  data, held_out)
    held_out_rows = rate_decays(args, model, network, diffusion, ema, held_out)
    last_stage, log = args.stage_steps[-1], read_log(args.out)
    missing = missing_rows(args, held_out_rows)
    load_stage(args, last_stage, model, ema)
    if missing or not (args.out / "samples.png").exists():
        shown = [w for w in stage_weights(args, last_stage, held_out_rows)
                 if not w.debias or w.decay not in args.decay]
        plot_samples(args, shown, network, diffusion, ema, data)
    if log and (missing or not (args.out / "training.png").exists()):
        plot_curves(args, log)
        plot_training(args, log)
    if missing:
        (args.out / "sweep.png").unlink(missing_ok=True)
        (args.out / "modes.png").unlink(missing_ok=True)
        evaluate(args, missing, model, network, diffusion, ema, data, held_out)
        load_stage(args, last_stage, model, ema)
    rows = measured_rows(args)
    title = (f"{args.data}, {args.num_samples} samples by {args.sampler} in "
             f"{args.sample_steps} steps")
    if len({row["decay"] for row in rows}) > 2 and not (args.out / "sweep.png").exists():
        plot_sweep(rows, held_out_rows, title, args.out / "sweep.png")
    if not (args.out / "modes.png").exists():
        plot_modes(rows, title, args.out / "modes.png")
    if log:  # somebody may have deleted it
        print_convergence(log[-1])
    print_choices(args, held_out_rows)
    print_table(rows)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # while training, the loop catches it
        print("\nstopped; the same command goes on from here")
        sys.exit(130)
