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

An exponential moving average (EMA) of the weights looks back over some 1 / (1 - decay) steps.
Measured after 4,000 steps, three seeds: the Fréchet distance to the data is 16 ± 6 with raw
weights, 2.8 ± 1.0 with decay 0.99 and 2.9 ± 1.0 with 0.999. The network learns to undo
x_t = alpha_t x0 + sigma_t eps (Ho et al. 2020, arXiv:2006.11239); the same noise is then turned
into images by raw and averaged weights. The sections EMA, Noise schedules and UNet run alone.
"""

# ==== EMA =========================================================================================
# e_t = β_t e_{t-1} + (1 - β_t) θ_t of the weights θ_t after optimizer step t; e_0 = θ_0.
# What is stored is d_t = e_t - θ_0 = Σ_n r_n δ_{t+1-n}, made of steps δ_t = θ_t - θ_{t-1}.
# The reach r_n = 1 - Π_{i>t-n} β_i is the weight of the last n steps. The init share, what θ_0
# still weighs, is 1 - r_t; debiased, the average is θ_0 + d_t / r_t. A block of n steps, m the
# average of x_t = θ_t - θ_0 in it, turns d into (1 - r_n) d + r_n m: d is rounded once a block,
# relative to how far weights moved; e += (1 - β) (θ - e) rounds e itself every step, and stalls.

import contextlib

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


def log_decays(decay, step, n):
    """ln β of n steps, from `step` back [n] (float64), of a canonical decay; exact near β = 1."""
    t = torch.arange(step, step - n, -1, dtype=torch.float64, device="cpu")
    kind, _, number = decay.rpartition(":")
    if decay == "step":  # β_t = 1 - 1/(t+1): the plain mean of θ_0 … θ_t
        return -torch.log1p(1 / t)
    if kind == "ramp":  # min(β, (1+t)/(10+t))
        return torch.log1p(-(9 / (10 + t)).clamp(min=1 - float(number)))
    if kind == "power":  # (1 - 1/t)^g of relative width sigma_rel (Karras et al. 2024,
        s = float(number) ** -2  # arXiv:2312.02696): g is the largest root of (g+1)² (g+2) = s g
        cubic = t.new_tensor([[-4, s - 5, -2], [1, 0, 0], [0, 1, 0]])  # their γ is g - 1
        return torch.linalg.eigvals(cubic).real.max() * torch.log1p(-1 / t)
    beta, steps = (0.5, float(number)) if kind == "halflife" else (float(number), 1)
    return torch.full_like(t, beta).log() / steps


def reaches(decays, step, n):
    """r_0 … r_n of each decay [K, n + 1] (float64): what e_step weighs its last 0 … n steps."""
    logs = torch.stack([log_decays(decay, step, n) for decay in decays]).cumsum(1)
    return -torch.nn.functional.pad(logs, (1, 0)).expm1()


def bare_state(model, built=None):
    """{name: value} of the bare model, {p: name} of what trains: ValueError if not as `built`."""
    wrappers = torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = next(model.children())
    state = model.state_dict(keep_vars=True)  # under FSDP2 this shards the parameters again
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    trains = {p: name for name, p in state.items() if getattr(p, "requires_grad", False)}
    for p, name in (trains | (built or {})).items():
        if (built and p not in built) or state.get(name) is not p:
            raise ValueError(f"parameter {name} was replaced, removed or set to require a gradient "
                             "since the EMA was built: build it after that")
    return state, trains


def local(tensor):
    """This process's shard of a DTensor (FSDP2); any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class EMA:
    """Moving averages of a model's weights, for one decay or a few.

    Build it when pretrained weights are loaded and the model is wrapped; call `update` after every
    optimizer step, never per micro-batch. With a GradScaler, whose skipped steps do not count, let
    the optimizer call it: optimizer.register_step_post_hook(ema.update). No call communicates: with
    DistributedDataParallel rank 0 has the averages, with FSDP2 every rank those of its shards.

    model   what requires a gradient now is averaged; what comes to require one is a ValueError
    decays  one or more of 0 <= decay < 1, "step", "ramp:0.9999", "halflife:2000", "power:0.10"; the
            first is what the methods take for None; their debias takes the initial weights out
    device  where the averages are kept, 2 K + 1 float32 copies; None: where the parameters are
    """

    block, ladder, _pending = 256, [], None  # a shorter block rounds d more often, a longer one m

    def __init__(self, model, decays=0.999, device=None):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"EMA takes the model, a torch.nn.Module, not a {type(model).__name__}")
        decays = [decays] if isinstance(decays, str) or not hasattr(decays, "__iter__") else decays
        self.decays = list(dict.fromkeys(map(parse_decay, decays)))
        self._tracked = list(dict.fromkeys([*self.decays, *self.ladder]))
        self.model, self.step, self._inside, self._names = model, 0, 0, bare_state(model)[1]
        if not self._tracked or not self._names:
            raise ValueError("nothing to average: no decay, or nothing that requires a gradient")
        # The table [rows, P]: θ_0; what is pending, in an EMA m of every decay; d of every decay.
        rows = 1 + (self._pending or len(self._tracked)) + len(self._tracked)
        own = [local(p).detach() for p in self._names]
        sizes = [p.numel() for p in own]
        self._table = own[0].new_zeros(rows, sum(sizes), dtype=torch.float32, device=device)
        self._saved = {"table": self._table}
        self._rows = [[x.view_as(p) for x, p in zip(row.split(sizes), own)] for row in self._table]
        torch._foreach_copy_(self._rows[0], own)
        groups = [x.storage_offset() // (2**17 if x.is_cpu else 2**22) for x in self._rows[0]]
        self._cuts = [i for i in range(len(own)) if i == 0 or groups[i] > groups[i - 1]]
        self._layout = [f"decays {self.decays}", f"ladder {self.ladder}", f"block {self.block}"]
        self._layout += [f"{name} {list(p.shape)}" for name, p in zip(self._names.values(), own)]

    @torch.no_grad()
    def update(self, optimizer=None, *_):
        """Takes in the weights after one more step; `optimizer`: what its post hook is given."""
        if self._inside:
            raise RuntimeError("update() inside applied(): the model holds averaged weights")
        if self.step % 16 == 0:  # it walks through all modules, which is half an update's time
            bare_state(self.model, self._names)
        if not getattr(optimizer, "found_inf", 0):  # else a GradScaler makes a fused one do nothing
            self.step += 1
            self._take((self.step - 1) % self.block + 1)

    def _take(self, n):
        """Step n of a block: m += (r_1 / r_n) (x - m); at its end d += r_n (m - d)."""
        r, own = reaches(self._tracked, self.step, n), [local(p) for p in self._names]
        shares, (first, *means) = (r[:, 1] / r[:, n]).tolist(), self._rows
        like = self._table.device, self._table.dtype
        for i, end in zip(self._cuts, [*self._cuts[1:], None]):  # few calls, in little memory
            now = [p if (p.device, p.dtype) == like else p.to(*like) for p in own[i:end]]
            x = torch._foreach_sub(now, first[i:end])
            for mean, share in zip(means, shares):
                torch._foreach_lerp_(mean[i:end], x, share)
            del now, x  # the next ones then take the same memory
        if n == self.block:
            self._table[-len(r) :].lerp_(self._table[1 : 1 + len(r)], r[:, n:].to(self._table))

    def _coefficients(self, decay):
        """Of e - θ_0 over the table (float64): d, within a block d + r_n (m - d)."""
        if decay not in self._tracked:
            raise ValueError(f"decay {decay} is not there; there are {', '.join(self.decays)}")
        r_n = reaches([decay], self.step, self.step % self.block)[0, -1]
        own = r_n.new_tensor([decay == one for one in self._tracked])
        return torch.cat([r_n.new_zeros(1), r_n * own, (1 - r_n) * own])

    def weights(self, decay=None, debias=False):
        """Bare state_dict(): float32 averages, copied buffers, the frozen parameters themselves."""
        state, averages = bare_state(self.model, self._names)[0], {}
        decay = self._tracked[0] if decay is None else parse_decay(decay)
        row = self._coefficients(decay)
        row /= reaches([decay], self.step, self.step)[0, -1] if debias and self.step else 1
        row[0] += 1
        for p, *rows in zip(self._names, *self._rows):
            averages[p] = torch.empty_like(p, dtype=torch.float32)  # a DTensor where p is one
            local(averages[p]).copy_(sum(a * x.double() for a, x in zip(row.tolist(), rows) if a))
        for name, value in state.items():
            if torch.is_tensor(value):
                frozen = isinstance(value, torch.nn.Parameter)
                state[name] = averages.get(value, value.detach() if frozen else value.clone())
        return state

    @contextlib.contextmanager
    def applied(self, decay=None, debias=False):
        """The model has averages inside, own weights after, always; train() and eval() stay."""
        averages = self.weights(decay, debias)
        own = {x: local(x).detach().clone() for x in (*self._names, *self.model.buffers())}
        try:
            self._write({p: local(averages.pop(name)) for p, name in self._names.items()}, 1)
            yield self.model
        finally:
            self._write(own, -1)

    def _write(self, values, depth):
        self._inside += depth
        bare_state(self.model)  # a forward under FSDP2 leaves gathered weights: back to shards
        torch._foreach_copy_([local(x).detach() for x in values], [*values.values()])
        torch.clear_autocast_cache()  # else an autocast around this goes on with its copies

    def init_share(self, decay=None):
        """The weight that an average gives to the initial weights at the present step."""
        decay = self._tracked[0] if decay is None else parse_decay(decay)
        return log_decays(decay, self.step, self.step).sum().exp().item()

    def state_dict(self):
        """What training goes on from, on the CPU, of own shards; `weights` is for sampling."""
        saved = {name: value.to("cpu", copy=True) for name, value in self._saved.items()}
        return {"step": self.step, "layout": [*self._layout], **saved}

    def load_state_dict(self, state):
        """Goes on from a saved state; ValueError, and nothing changed, where it does not fit."""
        for ours, saved in zip([*self._layout, None], [*state.get("layout", ()), None]):
            if ours != saved:
                raise ValueError(f"{saved or 'nothing'} in the state, {ours or 'nothing'} here")
        for name, value in self._saved.items():
            value.copy_(state[name])
        self.step = state["step"]


LADDER = tuple(1 - 0.1 * 5e-4 ** (rung / 13) for rung in range(14))  # 1 - decay: 0.1 to 5e-5


class EMABank(EMA):
    """Averages for many decays at the price of one, and for any decay afterwards.

    As `EMA`, but the steps of a block are kept, and one product folds them into all averages.
    Memory: K + block + 2 float32 copies, K counting the ladder. Needs torch 2.9 or later.

    ladder  constant decays that are averaged as well, so that every decay and schedule between
            them can be read out, wrong by at most `error_bound`; None for none
    block   steps that are folded at once: a longer one rounds less often and is faster
    """

    def __init__(self, model, decays=0.999, ladder=LADDER, block=16, device=None):
        if block < 1:
            raise ValueError("block is at least 1")
        rungs = () if ladder is None else map(float, ladder)
        self.block, self.ladder = block, list(dict.fromkeys(map(parse_decay, rungs)))
        self._pending = 1 + block  # θ_b, then θ_t in row 2 + (t - 1) % block
        super().__init__(model, decays, device)
        self._table[1] = self._table[0]
        cached = 2**16 if self._table.is_cpu else 2**18  # columns that fit a cache
        self._chunks = self._table.split(cached, dim=1)
        self._saved["path"] = self._table.new_zeros((), dtype=torch.float64)  # Σ ‖δ_t‖²

    def _take(self, n):
        """Keeps step n; at the end of a block d = (1 - r_n) d + r_n (θ_b - θ_0) + Σ_j r_j δ."""
        torch._foreach_copy_(self._rows[1 + n], [local(p) for p in self._names])
        if n < self.block:
            return
        r = reaches(self._tracked, self.step, n)
        mix, share = r[:, [n, *range(n, 0, -1)]], r[:, n:]  # [K, n + 1] as `moves`, [K, 1]
        # Under a steady drift d rounds the same way at every fold, and over a long horizon the bias
        # adds up. A wobble of r_n, of mean zero, makes it pass: 9.9e-6 becomes 1.5e-6.
        wobble = 2**-21 * (self.step / n * 0.6180339887 % 1 - 0.5) * (1 - share)
        share = share - wobble.clamp(-share / 2, share / 2)
        mix, share = (mix / share).to(self._table), share.to(self._table)
        with contextlib.ExitStack() as restored:  # float32, also where a script allows TF32
            for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
                found = switch.fp32_precision
                own = "none" if found == torch.backends.fp32_precision else found  # it follows that
                restored.callback(setattr, switch, "fp32_precision", own)
                switch.fp32_precision = "ieee"
            scratch = [torch.empty_like(self._chunks[0][:rows]) for rows in mix.T.shape]
            for chunk in self._chunks:
                moves, mean = (x[:, : chunk.shape[1]] for x in scratch)  # [n + 1, C], [K, C]
                torch.sub(chunk[1 : n + 2], chunk[: n + 1], out=moves)  # θ_b - θ_0, δ_1 … δ_n
                if self.ladder:  # else no read-out has an error to bound
                    steps = moves[1:].flatten()
                    self._saved["path"] += torch.dot(steps, steps)
                torch.mm(mix, moves, out=mean)  # autocast leaves out= alone
                chunk[n + 2 :].lerp_(mean, share)
        self._table[1] = self._table[n + 1]

    def _fit(self, decay):
        """The a_k [K] and the least ‖R‖, R = r - Σ a_k r_k: the error is Σ R_n δ_{t+1-n}."""
        own = [decay == one for one in self._tracked]
        mixture = torch.tensor(own, dtype=torch.float64, device="cpu")
        if any(own):
            return mixture, 0.0
        t, rungs = max(self.step, 1), [float(rung) for rung in self.ladder]
        *rows, target = reaches([*self.ladder, decay], t, t)[:, 1:]  # [t] each
        now, span = 1 - target[0], [f"{min(rungs):.6g} to {max(rungs):.6g}"] if rungs else []
        if not rungs or not min(rungs) <= now <= max(rungs):
            raise ValueError(f"decay {decay} ({now:.6g} at step {t}) is not there; there are "
                             f"{', '.join(self.decays + span)}")
        rows = torch.stack(rows)  # [rungs, t]
        gram = rows @ rows.T
        ridge = 1e-12 * gram.diag().diag()  # keeps a_k, and their rounding, small
        fit = torch.linalg.solve(gram + ridge, rows @ target)
        mixture[[self._tracked.index(rung) for rung in self.ladder]] = fit
        rounding = 2e-15 * target.square().sum()  # of the steps within a fold
        return mixture, ((target - fit @ rows).square().sum() + rounding).sqrt().item()

    def _coefficients(self, decay):
        """Of e - θ_0 over the table (float64): kept θ_b, θ_{t-n+1} … θ_t, and Σ a_k d_k."""
        mixture, r = self._fit(decay)[0], reaches(self._tracked, self.step, self.step % self.block)
        latest = (mixture @ r.diff()).flip(0)  # [n] of θ_{t-n+1} … θ_t: r_{j+1} - r_j
        kept = torch.nn.functional.pad(latest, (1, self.block - len(latest)))  # none of θ_b
        return torch.cat([-latest.sum()[None], kept, mixture * (1 - r[:, -1])])

    def error_bound(self, decay):
        """Bound on the norm of a read-out's error, ‖R‖ (Σ ‖δ_t‖²)^½; 0.0 if tracked.

        For a debiased average divide by r_t = 1 - init_share. It is that of this process's shards.
        """
        mixture, misfit = self._fit(parse_decay(decay))
        if not misfit:
            return 0.0
        kept, norm = self._table[1 : 2 + self.step % self.block], torch.linalg.vector_norm
        pending = sum(norm(b - a, dtype=torch.float64) ** 2 for a, b in zip(kept[1:], kept))
        path = (self._saved["path"] + pending).sqrt().item()
        d = self._table[-len(mixture) :]
        norms = torch.stack([norm(row, dtype=torch.float64) for row in d]).cpu()
        return 1.01 * misfit * path + 2**-20 * (mixture.abs() @ norms).item()  # d_k are rounded


# ==== Noise schedules, objectives and samplers ====================================================

import math

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
    SAMPLERS = "ddpm", "ddim", "dpm++"

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

    def at(self, t, x):
        """alpha, sigma, alpha', sigma' at times t [B], each [B, 1, ...] to multiply x [B, ...]."""
        rows = self.path.to(x)[:, t]  # [4, B]
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
    def sample(self, network, x, num_steps, sampler="ddim", clip=None, generator=None):
        """Walk from noise x [B, ...] at t = T - 1 to data; yield (t, x_t, x0_hat), data at t = -1.

        sampler     "ddim": Song et al. 2021 (arXiv:2010.02502, eq. 12), Euler's method for flow
                    "ddpm": DDPM's ancestral sampler (eq. 6 and 7), also with fewer steps than T
                    "dpm++": DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095, algorithm 2)
        clip        bound on |x0_hat|: 1 for images in [-1, 1], None for no bound
        generator   of the noise that ddpm adds

        From t to s < t all three take x_s = c x_t + (alpha_s - c alpha_t) D + nu z: nu is the noise
        added, c the share of the old noise that is kept, D is x0_hat, extrapolated in the log
        signal-to-noise ratio by dpm++. The times t are evenly spaced.
        """
        if not 1 <= num_steps <= self.num_steps or sampler not in self.SAMPLERS:
            raise ValueError(f"num_steps is 1 to {self.num_steps}, sampler one of {self.SAMPLERS}")
        times = torch.linspace(self.num_steps - 1, 0, num_steps).round().long().tolist()
        levels = [self.path[:2, t].tolist() for t in times] + [[1.0, 0.0]]  # (alpha, sigma)
        last = None  # x0_hat and the step in log(alpha / sigma) of the step before
        for t, (alpha, sigma), (alpha_s, sigma_s) in zip(times, levels, levels[1:]):
            at = torch.full((len(x),), t, device=x.device)
            x0_hat = self.predict(network(x, at).to(x.dtype), x, at)[0]
            x0_hat = x0_hat if clip is None else x0_hat.clamp(-clip, clip)
            yield t, x, x0_hat
            direction = x0_hat
            if sampler == "dpm++" and sigma_s:
                h = math.log(alpha_s / sigma_s) - math.log(alpha / sigma)
                if last is not None:
                    direction = x0_hat + (x0_hat - last[0]) * (h / (2 * last[1]))
                last = x0_hat, h
            variance = sigma**2 - (alpha / alpha_s * sigma_s) ** 2  # of q(x_t | x_s)
            nu = sigma_s / sigma * math.sqrt(variance) if sampler == "ddpm" else 0.0
            c = math.sqrt(sigma_s**2 - nu**2) / sigma
            x = c * x + (alpha_s - c * alpha) * direction
            if nu:
                x = x + nu * torch.randn(x.shape, generator=generator, device=x.device)
        yield -1, x, x


# ==== UNet ========================================================================================

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


class UNet(nn.Module):
    """The network of DDPM (Ho et al. 2020, arXiv:2006.11239, appendix B).

    channels      image channels, in and out
    widths        channels of each level; each further level halves height and width
    num_blocks    residual blocks a level on the way down (one more on the way up)
    attention     the levels whose blocks are followed by self-attention
    scale_shift   time scales and shifts the normalised features (Nichol & Dhariwal 2021);
                  False: it is added before the normalisation, as in DDPM
    dropout       probability, inside residual blocks

    forward(x [B, C, H, W], t [B]) -> [B, C, H, W]; H and W divisible by 2^(levels - 1); t is on
    the scale 0..1000. ValueError where shapes do not fit.
    """

    def __init__(self, channels=1, widths=(16, 32, 64), num_blocks=1, attention=(2,),
                 scale_shift=True, dropout=0.0):
        super().__init__()
        width = widths[0]
        if width % 2:
            raise ValueError(f"the first width is {width}: it must be even")
        self.channels, self.width, self.stride = channels, width, 2 ** (len(widths) - 1)
        time = 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))

        def block(c_in, c_out, attend):
            res = ResBlock(c_in, c_out, time, scale_shift, dropout)
            return nn.ModuleList([res, Attention(c_out)] if attend else [res])

        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [width], width
        for level, out in enumerate(widths):
            if level:
                self.down.append(nn.ModuleList([nn.Conv2d(c, c, 3, stride=2, padding=1)]))
                skips.append(c)
            for _ in range(num_blocks):
                self.down.append(block(c, out, level in attention))
                c = out
                skips.append(c)
        self.middle = nn.ModuleList([*block(c, c, True), *block(c, c, False)])
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(num_blocks + 1):
                self.up.append(block(c + skips.pop(), out, level in attention))
                c = out
            if level:
                self.up[-1].append(nn.Sequential(nn.Upsample(scale_factor=2),
                                                 nn.Conv2d(c, c, 3, padding=1)))
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


# ==== Data ========================================================================================

import argparse
import functools
import gzip
import json
import operator
import os
import sys
import tarfile
import time
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # from the most to the least frequent
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
DOWNLOADS = {  # name: {address: how the SHA-256 of its file begins}
    "mnist": {MNIST + IMAGES: "440fcabf73cc546f", MNIST + LABELS: "3552534a0a558bbe"},
    "fashion": {FASHION + IMAGES: "3aede38d61863908", FASHION + LABELS: "a04f17134ac03560"},
    "cifar10": {CIFAR10: "c4a38c50a1bc5f3a"},
}


class Dataset:
    """Images [N, C, H, W] and labels [N] of num_modes values, 0 where all are the same.

    train and held_out are positions: a fifth is held out, at most 4,096, always the same.
    """

    def __init__(self, images, labels=None):
        labels = np.zeros(len(images), int) if labels is None else labels
        if not (images.ndim == 4 and len(images) > 19 and images.dtype.kind in "iu"
                and 0 <= images.min() <= images.max() <= 255
                and labels.shape == images.shape[:1] and labels.dtype.kind in "iuU"):
            raise ValueError(f"{images.dtype} images {images.shape}, {labels.dtype} labels "
                             f"{labels.shape}; needed are 20 or more [N, C, H, W] or [N, H, W, C], "
                             "integers 0 to 255, labels [N]: integers or texts")
        _, a, b, c = images.shape  # channels are last if the others agree, or if they are fewest
        images = images.transpose(0, 3, 1, 2) if a == b != c or b != c < a else images
        self.images = torch.from_numpy(np.array(images, np.uint8, order="C"))
        values, labels = np.unique(labels, return_inverse=True)
        self.labels = torch.from_numpy(labels)
        self.num_modes = len(values) if len(values) > 1 else 0
        self.num_classes = self.num_modes or 2  # without labels: upright and upside down
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.held_out, self.train = order.tensor_split([min(len(order) // 5, 4096)])

    def x0(self, index, device="cpu"):
        """Images [B, C, H, W] float32 in [-1, 1]; channels last: a fifth faster."""
        x0 = self.images[index].to(device).float().contiguous(memory_format=torch.channels_last)
        return (x0 - 127.5) / 127.5


def draw_glyphs(num_images):
    """Characters [N, 1, 16, 16], turned, scaled, shifted, and labels [N]; share ~ 1 / position."""
    rng = np.random.default_rng(0)
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
        h, w = size = np.array(glyph.shape)
        top, left = ((32 - size) / 2 + rng.uniform(-1, 1, 2)).clip(0, 32 - size).round().astype(int)
        canvas[i, top:top + h, left:left + w] = glyph
    return canvas.reshape(num_images, 1, 16, 2, 16, 2).mean((3, 5)).round().astype(np.uint8), labels


def read_idx(folder, kind):
    """Bytes of the last file by name ("train" after "t10k") in the MNIST format, gzipped or not."""
    file = max(folder.rglob(f"*{kind}*-ubyte*"), key=lambda path: path.name, default=None)
    if file:
        data = file.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        shape = np.frombuffer(data, ">u4", data[3], 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def read_data(source):
    """Images, and labels or None, behind --data; any failure is an exception of some kind."""
    if source == "glyphs":
        return draw_glyphs(24_096)
    path = Path(source or "nothing")
    if source in DOWNLOADS:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ddpm_ema", source)
        path.mkdir(parents=True, exist_ok=True)
        for address, digest in DOWNLOADS[source].items():
            file = path / Path(address).name
            if not file.exists():
                torch.hub.download_url_to_file(address, str(file), digest)
    if source == "cifar10":
        with tarfile.open(file) as tar:
            names = sorted(name for name in tar.getnames() if "data_batch" in name)
            batches = [tar.extractfile(name).read() for name in names]
        records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, 3073)
        return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return file["images"], file.get("labels")
    pictures = sorted(file for file in path.rglob("*") if file.suffix.lower() in (
        ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"))
    images = []
    for file in pictures:
        with explained(f"--data {file}: "):
            image = np.atleast_3d(matplotlib.image.imread(file))[:, :, :3]  # grey, colour; no alpha
        peak = 1 if image.dtype.kind == "f" else np.iinfo(image.dtype).max  # floats from PNG
        images.append((image * (255 / peak)).round().astype(np.uint8))  # [H, W, C]
    if images:  # grey among colour becomes colour; classes are the folders
        return np.stack(np.broadcast_arrays(*images)), np.array([str(f.parent) for f in pictures])
    images, labels = (read_idx(path, kind) for kind in ("images", "labels"))
    if images is None:
        raise ValueError(f"no data there; allowed are {SETTINGS['data'][1]}")
    return images[:, None], labels


# ==== Metrics =====================================================================================

def make_classifier(channels, num_classes):
    """x [B, C, H, W] -> features [B, 64], the space of the metrics -> logits [B, K] of labels."""
    return nn.ModuleDict({
        "features": nn.Sequential(
            nn.Conv2d(channels, 32, 3, 1, 1), norm(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), norm(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, 2, 1), norm(128), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU()),
        "logits": nn.Linear(64, num_classes)})


def train_classifier(net, data, num_steps=500, batch_size=128):
    """Trains it with all classes equally often, so that rare ones are read as well as others."""
    labels = data.labels[data.train]
    weight = 1 / labels.bincount()[labels]
    order = torch.multinomial(weight.double(), num_steps * batch_size, replacement=True)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps)
    for index in data.train[order].split(batch_size):
        x0, label = data.x0(index), data.labels[index]  # [B, C, H, W], [B]
        if not data.num_modes:
            label = torch.arange(batch_size) % 2
            x0 = torch.where(label[:, None, None, None] == 1, x0.flip(2), x0)
        optimizer.zero_grad()
        F.cross_entropy(net.logits(net.features(x0)), label).backward()
        optimizer.step()
        schedule.step()


def frechet_distance(mean1, cov1, mean2, cov2):
    """|mean1 - mean2|² + tr(cov1 + cov2 - 2 (cov1 cov2)^½) of two Gaussians, float64 [D], [D, D].

    Heusel et al. 2017 (arXiv:1706.08500, eq. 6). The root's trace is that of the symmetric
    (cov1^½ cov2 cov1^½)^½, whose eigenvalues are real.
    """
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item()


def moments(features, counts):
    """Mean [D] and covariance [D, D], float64, of features [N, D] that count [N] times each."""
    features, total = features.double(), counts.sum()
    mean = counts @ features / total
    square = (features - mean).T @ ((features - mean) * counts[:, None])
    return mean, square / (total - 1).clamp(min=1)


def manifold_share(features, reference, k=3):
    """Which rows of features [N, D] lie within the k-nearest-neighbour balls of reference [M, D].

    Kynkäänniemi et al. 2019 (arXiv:1904.06991, eq. 1): the mean of the answer is precision for
    (samples, real) and recall for (real, samples). Works in tiles: memory is O(N + M).
    """
    radius = torch.cat([torch.cdist(rows, reference).kthvalue(k + 1).values  # the first is itself
                        for rows in reference.split(1024)])  # [M]
    inside = [(torch.cdist(rows, reference) <= radius).any(1) for rows in features.split(1024)]
    return torch.cat(inside)  # [N] bool


def measure(features, mode, real, num_bootstrap=20):
    """Every metric of samples with features [N, D] that are read as modes [N], and its spread.

    `real` holds what they are compared with: `moments`, `features` [M, D] and, where the modes are
    known, their true `shares` [K]. NAME_sd is a standard deviation over bootstrap resamples; one is
    how often it drew each row: every metric is a weighted sum.

    fd          Fréchet distance
    precision   share of samples within the manifold of the real features; recall: the reverse
    tail_share  mass on the rarer half of the modes over its true mass, where modes are known
    modes       mass of each mode over its true mass: a list
    """
    true, n, m, rows = real["shares"], len(features), len(real["features"]), []
    precise = manifold_share(features, real["features"]).double()
    recalled = manifold_share(real["features"], features).double()
    generator = torch.Generator(features.device).manual_seed(0)
    for resample in range(num_bootstrap + 1):  # in the first, each row counts once
        drawn, drawn_real = (
            torch.randint(size, (size,), device=mode.device, generator=generator).bincount(
                minlength=size).double() if resample else precise.new_ones(size) for size in (n, m))
        row = {"fd": frechet_distance(*moments(features, drawn), *real["moments"]),
               "precision": (drawn @ precise).item() / n,
               "recall": (drawn_real @ recalled).item() / m}
        if true is not None:
            rare = true.argsort(descending=True)[len(true) // 2:]
            share = mode.bincount(drawn, len(true)) / n  # [K]
            row["tail_share"] = (share[rare].sum() / true[rare].sum()).item()
            row["modes"] = (share / true).nan_to_num(posinf=0).tolist()
        rows.append(row)
    return rows[0] | {f"{name}_sd": np.std([row[name] for row in rows[1:]], 0, ddof=1).tolist()
                      for name in rows[0]}


# ==== Rows ========================================================================================
# A row is a dict of plain values: what is known of one set of weights at one step. `name` is raw,
# "0.99", "0.99 debiased" or real (held-out images); `samples` says how they were used, "2048 by
# dpm++ in 24 steps", or "" for losses alone. (step, name, samples) is its key. Rows live in
# metrics.jsonl and nowhere else; tables, pictures and reports see nothing but rows.

IDEAL = {"fd": 0, "precision": 1, "recall": 1, "tail_share": 1, "held_out_loss": 0}  # at best
COLUMNS = "init_share", "fd", "precision", "recall", "tail_share"  # of a table of samples
key_of = operator.itemgetter("step", "name", "samples")


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path, which takes the place of `path` when all went well."""
    temporary = path.with_name(f"tmp-{path.name}")
    yield temporary
    temporary.replace(path)


def read_rows(folder):
    """{key: row} of metrics.jsonl, which is replaced as a whole: it has no torn lines."""
    path = folder / "metrics.jsonl"
    with explained(f"{path} is not of this program; choose another --out: "):
        lines = path.read_text().splitlines() if path.exists() else ()
        return {key_of(row): row for row in map(json.loads, lines)}


def cost(row, metric):
    """How far a metric is from its ideal; what is not known comes last, and real images do."""
    miss = abs(row.get(metric, math.nan) - IDEAL[metric])
    return math.inf if math.isnan(miss) or row.get("name") == "real" else miss


def settled(log):
    """Yields the last rows of the log, and how the held-out loss of their weights settled.

    wobble: its standard deviation about a line over the last quarter of the steps, from successive
    differences (von Neumann 1941). reached: the first step not above raw's mean in that quarter.
    """
    last, level = log[-1]["step"], math.nan
    for row in [row for row in log if row["step"] == last]:  # raw is the first of them
        losses = {r["step"]: r["held_out_loss"] for r in log if r["name"] == row["name"]}
        late = [loss for step, loss in losses.items() if step >= 0.75 * last]
        level = np.mean(late) if row["name"] == "raw" else level
        wobble = np.std(np.diff(late)).item() / 2**0.5 if len(late) > 2 else None
        reached = min((step for step, loss in losses.items() if loss <= level), default=None)
        yield row | {"wobble": wobble, "reached": reached}


def cell(row, field):
    """What a table shows: 20.4 ± 1.6, as many digits as the spread is worth."""
    value, spread = row.get(field), row.get(f"{field}_sd", 0)
    if spread and 1e-9 * abs(value) < spread < math.inf:  # less is rounding
        digits = max(0, -math.floor(math.log10(spread / 2)))
        return f"{value:.{digits}f} ± {spread:.{digits}f}"
    if isinstance(value, float):
        return f"{value:,.{'0f' if abs(value) >= 999.5 else '3g'}}"
    return "-" if value is None else str(value)


def print_rows(rows, fields=COLUMNS, keys=("step", "name")):
    """Markdown. Bold: the best of rows that differ in the last key, and all within both spreads."""
    fields = [*keys, *(field for field in fields if any(field in row for row in rows))]
    lines = [[cell(row, field) for field in fields] for row in rows]
    for row, line in zip(rows, lines):
        peers = [peer for peer in rows if all(peer[key] == row[key] for key in keys[:-1])]
        for metric in IDEAL.keys() & {*fields}:
            first = min(peers, key=lambda row: cost(row, metric))
            spread = math.hypot(*(peer.get(f"{metric}_sd", 0) for peer in (first, row)))
            if cost(row, metric) <= cost(first, metric) + spread < math.inf:
                line[fields.index(metric)] = f"**{cell(row, metric)}**"
    lines.insert(0, [field.replace("_", " ") for field in fields])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    print()
    for line in lines:
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")


# ==== The run =====================================================================================

FIXED = (  # what a run cannot change half-way
    "preset", "data", "data_shape", "batch_size", "lr", "cooldown", "seed", "objective", "schedule")
PARTS = "model", "optimizer", "ema", "classifier"  # of a checkpoint
INIT, TRAIN, SAMPLE = range(3)  # streams of random numbers
CANDIDATES = (  # what --decay auto chooses from: the ladder's range, in round numbers
    "0.9", "0.93", "0.95", "0.97", "0.98", "0.99", "0.993", "0.995", "0.997", "0.998", "0.999",
    "0.9993", "0.9995", "0.9997", "0.9998", "0.9999", "0.99993", "0.99995")


@contextlib.contextmanager
def explained(where=""):
    """Any failure inside ends the program with one line; DDPM_EMA_DEBUG=1 shows where it was."""
    try:
        yield
    except Exception as error:
        if os.environ.get("DDPM_EMA_DEBUG") == "1":
            raise
        reason = " ".join(f"{where}{error or type(error).__name__}".split())
        argparse.ArgumentParser(usage=argparse.SUPPRESS).error(reason)  # with exit code 2


def seed_of(stream, seed, index=0):
    """32 bits for a stream of a seed; index: the training step, or the first of some samples."""
    return int(np.random.SeedSequence((stream, seed, index)).generate_state(1)[0])


def read_checkpoint(path):
    """What `Run.save` wrote there; of a run that is yet to begin where there is nothing."""
    if not path.exists():
        return {"settings": {}, "step": 0}
    with path.open("rb") as file, contextlib.suppress(Exception):  # garbage may fail in any way
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {name: state[name] for name in (*PARTS, "step", "settings")}
    raise ValueError(f"{path} is no checkpoint of this program: delete it, or choose another --out")


class Run:
    """One training run and all that belongs to it; its rows, {key: row}, are what leaves it.

    `settings` are those of SETTINGS and PRESETS. In the run's folder last.pt holds all but its
    rows, step-N.pt the same at a stage. Under torchrun every process has all weights, averages and
    rows, trains on its share of each batch and measures its share of the rows; rank 0 writes.
    """

    def __init__(self, settings):
        s = self.settings = settings
        self.out, self.step = Path(s.out), 0
        self.rank, self.world = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
        sys.stdout = None if self.rank else sys.stdout  # of several processes one speaks
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if self.world > 1:
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        with explained(f"--data {s.data}: "):
            data = self.data = Dataset(*read_data(s.data))
        s.data_shape, channels = [*data.images.shape, data.num_classes], data.images.shape[1]
        torch.manual_seed(seed_of(INIT, s.seed))
        self.model = UNet(channels, **s.network).to(self.device, memory_format=torch.channels_last)
        parallel = nn.parallel.DistributedDataParallel(self.model) if self.world > 1 else self.model
        bfloat16 = torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")
        self.network = bfloat16(parallel)  # autocast as a decorator; only a GPU takes bfloat16
        self.diffusion = Diffusion(s.schedule, s.objective)
        self.optimizer = torch.optim.Adam(self.model.parameters(), s.lr, fused=True)
        self.ema, self.initial = EMABank(self.model, s.tracked), self.vector()
        self.rows = read_rows(self.out)
        self.held_out_loss(1)  # what would fail later fails now: do the shapes fit?
        torch.empty(s.batch_size, *data.images.shape[1:])  # is there room for a batch?
        torch.manual_seed(0)  # of the classifier: it is the same for every seed and method
        self.classifier = make_classifier(channels, data.num_classes).to(self.device)
        if s.features:
            with explained(f"--features {s.features}: "):
                extractor = torch.jit.load(s.features, map_location=self.device).eval()
                wanted = {"return_features"} & {a.name for a in extractor.forward.schema.arguments}
                self.extractor = functools.partial(extractor, **dict.fromkeys(wanted, True))
                if not self.features("real", 2)[0].isfinite().all():
                    raise ValueError("not all that it makes of images is finite")
        if not (self.out / "last.pt").exists():  # on the CPU: there two runs come to the same one
            self.out.mkdir(parents=True, exist_ok=True)
            print("training the classifier whose features the metrics use")
            train_classifier(self.classifier.cpu(), data)
        self.classifier.to(self.device).eval()

    def vector(self):
        """All weights that the model has at the moment, [P]."""
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def times(self, u):
        """Times t [B] of uniform u [B]; logit-normal as in Esser et al. 2024 (arXiv:2403.03206)."""
        u = torch.special.ndtri(u).sigmoid() if self.settings.logit_normal else u
        return (u * self.diffusion.num_steps).long()

    def train_step(self):
        """One step of Adam; all that is random in it is a function of (seed, step)."""
        s, device = self.settings, self.device
        self.model.train()
        torch.manual_seed(seed_of(TRAIN, s.seed, self.step))
        index = self.data.train[torch.randint(len(self.data.train), (s.batch_size,))]  # [B]
        t = self.times(torch.rand(s.batch_size, device=device))  # [B]
        x0 = self.data.x0(index, device)  # [B, C, H, W]
        if s.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=device) < 0.5, x0, x0.flip(3))
        eps = torch.randn_like(x0)
        share = (part.tensor_split(self.world)[self.rank] for part in (x0, t, eps))
        loss = self.diffusion.loss(self.network, *share).sum() / s.batch_size
        (loss * self.world).backward()  # gradients are averaged over the processes, not summed
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1, (self.step + 1) / s.warmup)
        cool = min(1, (s.steps - self.step) / max(s.cooldown * s.steps, 1))
        self.optimizer.param_groups[0]["lr"] = s.lr * warm * cool
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.step += 1

    def train(self, until):
        """Loads what an earlier call kept of step `until`, or trains to it from the last save."""
        s, last, kept = self.settings, self.out / "last.pt", self.out / f"step-{until}.pt"
        if kept.exists():
            return self.load(kept)
        if last.exists():
            self.load(last)
        start, first = time.perf_counter(), self.step
        while True:  # log and save, then one step: so the last step is no special case
            ends = self.step == until
            logs, saves = (ends or self.step % every == 0 for every in (s.log_every, s.save_every))
            if (logs or saves) and not math.isfinite(self.held_out_loss(1)):
                raise ValueError(f"training diverged before step {self.step}; try a lower --lr")
            if logs:
                raw, *_ = self.complete(self.ema.decays)
                if self.step > first:
                    took = (time.perf_counter() - start) / (self.step - first)
                    print(f"step {self.step}/{s.steps}, held-out loss {raw['held_out_loss']:.4f}, "
                          f"{(s.steps - self.step) * took / 60:.1f} min left")
            if saves:
                self.save(last)
            if ends:
                return self.save(kept)
            self.train_step()

    def save(self, path):
        state = {name: getattr(self, name).state_dict() for name in PARTS}
        state |= {"step": self.step, "settings": vars(self.settings)}
        if self.rank == 0:
            with explained(f"{path} cannot be written: "), replacing(path) as temporary:
                torch.save(state, temporary)
        if self.world > 1:
            torch.distributed.barrier()

    def load(self, path):
        state, ours = read_checkpoint(path), vars(self.settings)
        for key in (*FIXED, *["steps"] * (ours["cooldown"] > 0)):
            if state["settings"][key] != ours[key]:
                raise ValueError(f"the run in {self.out} has {key} {state['settings'][key]}, not "
                                 f"{ours[key]}; leave that out, or choose another --out")
        for part in PARTS:
            getattr(self, part).load_state_dict(state[part])
        self.step = state["step"]

    def weights(self, name):
        """The model has these weights inside the with block."""
        if name == "raw":
            return contextlib.nullcontext()
        return self.ema.applied(name.removesuffix(" debiased"), " debiased" in name)

    def held_out_loss(self, num_images=256):
        """Mean loss on fixed images, noise and times, spread as in training."""
        x0 = self.data.x0(self.data.held_out[:num_images], self.device)
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
        t = self.times((torch.arange(len(x0), device=x0.device) + 0.5) / len(x0))
        return self.diffusion.loss(self.network, x0, t, eps).mean().item()

    def images(self, name, count):
        """Yields x0 [<=256, C, H, W]: the data's, or samples by these weights, all of one noise."""
        s, data, device = self.settings, self.data, self.device
        index = {"real": data.held_out, "training images": data.train}.get(name)
        if index is not None:
            yield from (data.x0(part, device) for part in index[:count].split(256))
            return
        with self.weights(name):
            for first in range(0, count, 256):
                generator = torch.Generator(device).manual_seed(seed_of(SAMPLE, s.seed, first))
                shape = min(256, count - first), *s.data_shape[1:4]
                noise = torch.randn(shape, generator=generator, device=device)
                *_, (_, x0, _) = self.diffusion.sample(
                    self.network, noise.contiguous(memory_format=torch.channels_last),
                    s.sample_steps, s.sampler, clip=1.0, generator=generator)
                yield ((x0 + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1  # stored as an image

    def features(self, name, count):
        """Features [N, D] of `images`, and the modes [N] that they are read as."""
        pairs = []
        for x0 in self.images(name, count):
            features = self.classifier.features(x0)
            mode = self.classifier.logits(features).argmax(1)
            if self.settings.features:  # of a network for colour pictures
                pictures = ((x0 + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
                features = self.extractor(pictures).float().flatten(1)
            pairs.append((features, mode))
        return [torch.cat(parts) for parts in zip(*pairs)]

    @functools.cached_property
    def reference(self):
        """What samples are compared with, see `measure`."""
        count, data = self.settings.num_samples, self.data
        features, _ = self.features("training images", max(count, 10_000))
        once = torch.ones(len(features), dtype=torch.float64, device=self.device)
        seen = data.labels[data.train].bincount(minlength=data.num_classes).to(once)  # some never
        shares = seen / len(data.train) if data.num_modes else None
        return {"shares": shares, "moments": moments(features, once), "features": features[:count]}

    def measured(self, name, samples):
        """The row of some weights: their losses and distances, and how good their samples are."""
        s, decay = self.settings, name.removesuffix(" debiased")
        row = {"step": self.step, "name": name, "samples": samples, "decay": decay,
               "debiased": decay != name}
        if name == "raw":
            row["horizon"] = 1.0
        elif name != "real":
            row["init_share"] = self.ema.init_share(decay)
        if decay[0].isdigit() or decay.startswith("halflife"):  # a schedule has none for long
            log = log_decays(decay, 1, 1).item()
            row |= {"horizon": -1 / math.expm1(log),  # 1 / (1 - decay) steps
                    "half_life_images": -math.log(2) / log * s.batch_size}
        if name != "real":
            raw = self.vector()
            with self.weights(name):
                loss, now = self.held_out_loss(), self.vector()
            row |= {"held_out_loss": loss, "distance_raw": (now - raw).norm().item(),
                    "distance_initial": (now - self.initial).norm().item()}
        if samples:
            row |= measure(*self.features(name, s.num_samples), self.reference)
        return row

    @torch.no_grad()
    def complete(self, decays, samples=""):
        """Rows of raw, averages, real if sampled; each process measures one that lacks in turn."""
        names, start = ["real", "raw"] if samples else ["raw"], time.perf_counter()
        for decay in decays:
            names += [decay] + [f"{decay} debiased"] * (self.ema.init_share(decay) > 1e-3)
        lacking = [name for name in names if (self.step, name, samples) not in self.rows]
        self.model.eval()
        for i in range(0, len(lacking), self.world):
            rows = [self.measured(lacking[(i + self.rank) % len(lacking)], samples)] * self.world
            if self.world > 1:
                torch.distributed.all_gather_object(rows, rows[0])
            self.rows |= {key_of(row): row for row in rows}
            if self.rank == 0:
                with replacing(self.out / "metrics.jsonl") as draft:
                    draft.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))
            left = (time.perf_counter() - start) * (len(lacking) / (i + len(rows)) - 1) / 60
            for row in rows[:len(lacking) - i] if samples else ():  # none twice
                print(f"step {self.step}, {row['name']}: Fréchet distance {cell(row, 'fd')}, "
                      f"{max(left, 0):.1f} min left")
        return [self.rows[self.step, name, samples] for name in names]

    def evaluate(self):
        """Adds the rows that the table lacks at this step, and draws the first samples."""
        s, before = self.settings, len(self.rows)
        _, *averages = self.complete(CANDIDATES)
        first = min(averages, key=lambda row: cost(row, "held_out_loss"))["decay"]
        rows = self.complete(dict.fromkeys(s.shown + [first] * ("auto" in s.decay)), s.samples)
        if self.rank == 0:
            images = [x0 for row in rows for x0 in self.images(row["name"], 8)]
            plot_samples(self.out / "samples.png", rows, images)
            if len(self.rows) > before and self.step < s.stage_steps[-1]:
                print_rows(rows)


# ==== Pictures and reports ========================================================================

NAMES = {"fd": "Fréchet distance", "horizon": "decay (0: raw weights)",
         "tail_share": "rare modes: mass / true mass", "held_out_loss": "held-out loss",
         "distance_initial": "distance from initial weights", "distance_raw": "distance from raw"}
PANELS = {"fd": "How far samples are from the data", "held_out_loss": "The loss that auto goes by",
          "precision": "Quality: the share of samples that look real",
          "recall": "Variety: the share of real images within reach",
          "tail_share": "Whether rare modes starve"}  # of sweep.png


def draw_panel(axis, title, rows, x, y, by):
    """y of the rows against x, a line for each value of `by`; rows that lack a value are left out.

    Raw is black, all else a ramp from light to dark; dashed: debiased, where that is a row.
    """
    shown = sorted((row for row in rows if x in row and y in row),
                   key=lambda row: (row["step"], row.get("horizon", 0), row["debiased"]))
    groups = dict.fromkeys(row[by] for row in shown)
    ramp = matplotlib.colormaps["YlGnBu"](np.linspace(0.95, 0.4, len(groups)))
    color = dict(zip(reversed(groups), ramp)) | {"raw": "black"}
    for group, debiased in dict.fromkeys((row[by], row["debiased"]) for row in shown):
        line = {(row["step"], row["decay"]): row for row in shown  # debiased ones replace plain
                if row[by] == group and row["debiased"] <= debiased}.values()
        across, value, spread = ([row.get(name, 0) for row in line] for name in (x, y, f"{y}_sd"))
        axis.errorbar(across, value, spread, fmt=".--" if debiased else ".-", color=color[group],
                      label=None if debiased else str(NAMES.get(group, group)).replace(", ", "\n"))
    for value in {row[y] for row in rows if row["name"] == "real" and y in row}:
        axis.axhline(value, color="grey", ls=":", label="real images")
    axis.set(title=title, xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y),
             yscale="log" if IDEAL.get(y) == 0 else "linear")  # distances and losses
    legend = NAMES.get(by, by) + "\n(dashed: debiased)" * any(row["debiased"] for row in shown)
    axis.legend(title=legend, loc="upper left", bbox_to_anchor=(1, 1))  # beside, it hides no line
    for side in [side for side, field in (("x", x), ("y", y)) if field == "horizon"]:
        getattr(axis, f"set_{side}scale")("log", subs=[10 / 3])  # decays 0, 0.7, 0.9, 0.97, 0.99
        decay = matplotlib.ticker.FuncFormatter(lambda horizon, _: f"{1 - 1 / horizon:.6g}")
        getattr(axis, f"{side}axis").set(major_formatter=decay, minor_formatter=decay)
        axis.tick_params(side, which="both", rotation=60 if side == "x" else 0)


@matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.25, "axes.formatter.min_exponent": 4})
def draw(path, title, panels):
    """A picture of panels, three in a row; those without a value are left out."""
    panels = [panel for panel in panels if any(panel[3] in row for row in panel[1])]  # has it y?
    lines = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(16.8, 3.9 * lines + 0.3), layout="constrained")
    figure.suptitle(title.encode(errors="backslashreplace").decode(), parse_math=False)
    for place, panel in enumerate(panels, 1):
        draw_panel(figure.add_subplot(lines, min(3, len(panels)), place), *panel)
    figure.savefig(path)


def plot_samples(path, rows, images):
    """samples.png: for each row, x0 [8, C, H, W] of the same noise."""
    figure = Figure(figsize=(7.4, 0.62 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(f"Step {rows[0]['step']}: {rows[0]['samples']}, of one noise", parse_math=False)
    for axis, row, x0 in zip(figure.subplots(len(rows)), rows, images):
        x0 = x0[:, :3 if x0.shape[1] == 3 else 1].expand(-1, 3, -1, -1)  # colour or grey
        strip = F.pad((x0 + 1) / 2, (0, 1), value=1.0).clamp(0, 1)  # white in between
        strip = strip.permute(2, 0, 3, 1).flatten(1, 2).cpu().numpy()  # [H, 8 (W + 1), 3]
        axis.imshow(strip, interpolation="nearest")
        axis.set(xticks=[], yticks=[], frame_on=False)
        text = f"{row['name']}\nFréchet distance {cell(row, 'fd')}"
        text += f"\ninit share {cell(row, 'init_share')}" if "init_share" in row else ""
        axis.set_ylabel(text, rotation=0, ha="right", va="center")
    figure.savefig(path, bbox_inches="tight")


def pool(rows):
    """One row of several seeds' rows of one key: means and standard deviations over them."""
    pooled = dict(rows[0])
    for name in IDEAL.keys() & pooled if len(rows) > 1 else ():
        values = [row.get(name, math.nan) for row in rows]
        pooled |= {name: np.mean(values).item(), f"{name}_sd": np.std(values, ddof=1).item()}
    return pooled


def report(runs, out):
    """Tables and pictures of runs, (settings, {key: row}); a method is pooled over its seeds."""
    seeds, peers, stages = {}, {}, {}  # of a method; rows by method, key, seed; by method, step
    differ = [name for name in (*FIXED, "steps", "samples") if name != "seed"
              and len({str(settings[name]) for settings, _ in runs}) > 1]
    for settings, rows in runs:
        method, seed = ", ".join(f"{name} {settings[name]}" for name in differ), settings["seed"]
        seeds.setdefault(method, set()).add(seed)
        for key, row in rows.items():
            if row["samples"] == settings["samples"]:
                peers.setdefault((method, *key), {})[seed] = row | {"method": method}
    table = sorted((pool([*rows.values()]) for (method, *_), rows in peers.items()
                    if rows.keys() == seeds[method]), key=operator.itemgetter("step"))
    if "data" in differ or {*seeds} != {row["method"] for row in table}:
        raise ValueError("no ranking of different data, or of seeds without a row in common")
    # Averages that are mostly the initial weights would stretch a linear axis and show noise.
    moved = [row for row in table if row["debiased"] or row.get("init_share", 0) < 0.1]
    for row in [row for row in moved if row["name"] != "real"]:
        stages.setdefault((row["method"], row["step"]), []).append(row)
    leaders = [(first := min(rows, key=lambda row: cost(row, metric))) | {
        "metric": metric, "debiased": False, "name": "best decay",
        "horizon": first.get("horizon", math.nan) * 1.04**shift}  # side by side
        for rows in stages.values() for shift, metric in enumerate(IDEAL) if metric in rows[-1]]
    out.mkdir(parents=True, exist_ok=True)
    for number, method in enumerate(seeds, 1):
        rows, apart, firsts = ([row for row in group if row["method"] == method]
                               for group in (table, moved, leaders))
        spread = f"{len(seeds[method])} seeds" if len(seeds[method]) > 1 else "bootstrap resamples"
        title = "; ".join(filter(None, (method, rows[0]["samples"], f"± over {spread}")))
        print(f"\n{title}")
        print_rows(rows)
        draw(out / f"sweep{f'-{number}' if differ else ''}.png", title, [
            *((sentence, apart if IDEAL[metric] else rows, "horizon", metric, "step")
              for metric, sentence in PANELS.items()),
            ("The best decay at each stage", firsts, "step", "horizon", "metric")])
    if differ:
        title = f"The methods at each decay, {' and '.join({row['samples']: 0 for row in table})}"
        print(f"\n{title}; the best decay of each is that of the least distance")
        ranked = table + [row for row in leaders if row["metric"] == "fd"]
        places = [(row["step"], row["name"]) for row in ranked]
        ranked = [row for row, place in zip(ranked, places) if places.count(place) > 1]
        ranked.sort(key=operator.itemgetter("step", "name"))
        print_rows(ranked, COLUMNS[1:], ("step", "name", "method"))
        draw(out / "report.png", title, [
            (f"Step {step}", [row for row in ranked if row["step"] == step and "metric" not in row],
             "horizon", field, "method") for step in sorted({row["step"] for row in ranked})
            for field in ("fd", "precision", "tail_share")])


# ==== Command line ================================================================================

SETTINGS = {  # flag: (default, what it is, (from, to) or the names that it may be or its reader)
    "decay": (["0.999"], ("0 to 1, with commas; step: the plain mean; ramp:0.9999; halflife:2000; "
               "power:0.10 (sigma_rel); sweep: ten to 0.999999; auto: of the lowest held-out loss"),
              lambda item: item if item in ("auto", "sweep") else parse_decay(item)),
    "data": ("glyphs", "glyphs, mnist, fashion, cifar10; folder of idx files or images; .npz", str),
    "out": ("", "folder for all that a run leaves; if empty, runs/ and the data's name", str),
    "steps": (4000, "optimizer steps; more than a finished run has trains it on", (1, 10**8)),
    "stages": ([1.0], "fractions of the run to evaluate at", (1e-9, 1)),
    "batch_size": (32, "images per optimizer step, over all processes", (1, 10**8)),
    "lr": (1e-3, "learning rate of Adam, after a linear warm-up", (0, 1e38)),
    "cooldown": (0.0, "last fraction of the steps: the rate falls to 0", (0, 1)),
    "seed": (0, "of initial weights, data order, noise and samples", (0, 10**18)),
    "objective": ("v", "what the network predicts: noise, data, velocity", Diffusion.OBJECTIVES),
    "schedule": ("cosine", "of the noise; flow: the path of flow matching", Diffusion.SCHEDULES),
    "sampler": ("dpm++", "ancestral, deterministic, or DPM-Solver++(2M)", Diffusion.SAMPLERS),
    "sample_steps": (24, "network evaluations per sample", (1, 1000)),
    "num_samples": (2048, "samples per row of the table", (16, 10**8)),
    "save_every": (500, "steps between checkpoints", (1, 10**8)),
    "log_every": (100, "steps between rows of the log", (1, 10**8)),
    "features": ("", "TorchScript file, uint8 [N, 3, H, W] to the features of the metrics", str),
    "preset": ("small", "cifar10: the DDPM paper's network and training", ("small", "cifar10")),
    "report": ((), "folders of runs to compare; goes with --out alone", Path),
}
PRESETS = {
    "small": {"warmup": 100, "flip": False, "logit_normal": True, "network": {}},  # for a CPU
    "cifar10": {  # Ho et al. 2020, appendix B
        "data": "cifar10", "decay": ["0.9999"], "steps": 800_000, "batch_size": 128, "lr": 2e-4,
        "warmup": 5000, "flip": True, "logit_normal": False, "objective": "eps",
        "schedule": "linear", "sampler": "ddpm", "sample_steps": 1000, "num_samples": 50_000,
        "save_every": 5000, "log_every": 1000,
        "network": {"widths": (128, 256, 256, 256), "num_blocks": 2, "attention": (1,),
                    "scale_shift": False, "dropout": 0.1}},
}
SWEEP = "0.5,0.9,0.99,0.999,0.9993,0.9995,0.9997,0.9999,0.99999,0.999999"


def read(text, default, allowed):
    """A flag's value, of the kind of its default: where that is a list, several with commas."""
    if isinstance(default, list):
        return list(dict.fromkeys(read(item, default[0], allowed) for item in text.split(",")))
    if callable(allowed):
        return allowed(text)
    (low, high), kind = allowed, type(default)
    with contextlib.suppress(ValueError):
        if low <= kind(text) <= high:
            return kind(text)
    raise ValueError(f"{text!r} is no {'whole ' * (kind is int)}number from {low} to {high}")


@explained()
def read_flags(flags, doc, argv):
    """{name: value} of what is given; `flags` are like SETTINGS, a default () takes several."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=doc, argument_default=argparse.SUPPRESS,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text, allowed) in flags.items():
        flag = f"--{name.replace('_', '-')}"
        named = isinstance(default, str) and isinstance(allowed, tuple)
        reads = explained(f"{flag}: ")(functools.partial(read, default=default, allowed=allowed))
        default = ",".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(flag, help=f"{text} [{default}]", nargs="+" if default == () else None,
                            **{"choices": allowed} if named else {"type": reads})
    given, unknown = parser.parse_known_args(argv)
    if refused := unknown + [text for text in argv if text.endswith("=--")]:
        raise ValueError(f"{refused[0]} is not understood; commas part values, --help lists flags")
    return vars(given)


def resolve(given):
    """The settings of a run: what is given, over those of the run in --out, over the preset's."""
    settings = {name: default for name, (default, *_) in SETTINGS.items()}
    settings |= PRESETS["small"] | PRESETS[given.get("preset", "small")] | given
    out = Path(settings["out"] or Path("runs", Path(os.path.realpath(settings["data"])).stem))
    run, reached = operator.itemgetter("settings", "step")(read_checkpoint(out / "last.pt"))
    if not run and any(step for step, *_ in read_rows(out)):  # step 0: it was killed at its start
        raise ValueError(f"{out} holds rows of a run without its checkpoints; choose another --out")
    s = argparse.Namespace(**settings | run | given | {"out": str(out)})
    s.decay = list(dict.fromkeys(",".join(s.decay).replace("sweep", SWEEP).split(",")))
    s.shown = [decay for decay in s.decay if decay != "auto"]
    s.tracked = run.get("tracked", s.shown)
    s.samples = f"{s.num_samples} by {s.sampler} in {s.sample_steps} steps"
    s.samples += f", features {s.features}" if s.features else ""
    steps = sorted({max(1, round(fraction * s.steps)) for fraction in s.stages})
    there = {n for n in (*steps, s.steps) if n >= reached or (out / f"step-{n}.pt").exists()}
    s.stage_steps = [n for n in steps if n in there]
    if not s.stage_steps or s.steps not in there or ("stages" in given and s.stage_steps != steps):
        raise ValueError(f"{out} is at step {reached} and kept no checkpoint of {steps}")
    return s


@explained()
def main(argv):
    given = read_flags(SETTINGS, __doc__, argv)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # any name, at once
    if folders := given.pop("report", None):
        strange = [*given.keys() - {"out"}, *(f for f in folders if not (f / "last.pt").exists())]
        if strange:
            raise ValueError(f"--report takes folders of runs, and --out: not {strange[0]}")
        runs = [(read_checkpoint(f / "last.pt")["settings"], read_rows(f)) for f in folders]
        return report(runs, Path(given.get("out") or "runs/report"))
    run = Run(resolve(given))
    s = run.settings
    print(f"{s.data}: {len(run.data.train):,} training images {s.data_shape[1:4]}, "
          f"{run.data.num_modes or 'no'} modes; {len(run.initial):,} weights on {run.world} x "
          f"{run.device}\n{s.steps:,} steps of {s.batch_size} images, {s.objective} on the "
          f"{s.schedule} path, seed {s.seed}; {s.samples}; all in {s.out}")
    for step in s.stage_steps:
        run.train(step)
        run.evaluate()
    run.train(s.steps)
    if run.rank == 0:
        log = [row for row in run.rows.values() if not row["samples"] and row["step"] <= run.step
               and row["decay"] in ("raw", *s.tracked)]
        draw(run.out / "curves.png", s.data, [
            ("Which weights predict held-out images best", log, "step", "held_out_loss", "decay"),
            ("Where the weights went", log, "distance_initial", "distance_raw", "decay")])
        print_rows([*settled(log)], ["init_share", "held_out_loss", "wobble", "reached",
                                     "distance_initial", "distance_raw"])
        report([(vars(s), run.rows)], run.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint")
        sys.exit(130)
