"""Gaussian diffusion of masks: noise onto them, and back, by diffusers' samplers.

x_0 (mask from -1 to 1) ─Noising→ x_t ─network→ prediction ─reverse→ x_0, by the settings of a model.

Times are counted from 0, as diffusers does: t = 0 is x_1 of the papers, t = T - 1 their x_T. Equation numbers are those
of Singh, Dholey and Vinod (bushpc/models/vit_diffusion.py).
"""

from __future__ import annotations

import dataclasses
import math
import typing as t
from collections.abc import Callable, Sequence

import torch

from bushpc.dist import keyed_seed
from bushpc.errors import ConfigError

DDPM_STEPS, FIRST_BETA, LAST_BETA = 1000, 1e-4, 0.02  # Ho et al.'s linear schedule
MOST_BETA = 0.999  # as the cosine schedule's
# √ᾱ_T must be below this: sampling starts from pure noise, and what the network was trained to find in x_T is missing.
MOST_SIGNAL = 0.1
BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # ours → diffusers'


class Diffusion(t.Protocol):
    """The settings that a model by diffusion has, see VitDiffusionConfig."""

    @property
    def timesteps(self) -> int: ...

    @property
    def beta_schedule(self) -> t.Literal["linear", "cosine"]: ...

    @property
    def scaled_betas(self) -> bool | None: ...

    @property
    def prediction(self) -> t.Literal["epsilon", "v"]: ...

    @property
    def sampler(self) -> t.Literal["ddpm", "ddim", "dpm_solver"]: ...

    @property
    def steps(self) -> int: ...

    @property
    def samples(self) -> int: ...

    @property
    def sampling_seed(self) -> int: ...


C = t.TypeVar("C", bound=Diffusion)


def follow_timesteps(config: C) -> C:
    """With scaled betas where nothing is said about them and T is not that of the schedule."""
    if config.scaled_betas is not None or config.beta_schedule != "linear" or config.timesteps == DDPM_STEPS:
        return config
    return t.cast(C, dataclasses.replace(t.cast(t.Any, config), scaled_betas=True))


def check_steps(config: Diffusion) -> None:
    """Refuse steps that the sampler cannot take, and schedules whose x_T is not noise. Raises: ConfigError."""
    signal = math.sqrt(math.prod(1 - beta for beta in linear_betas(config)))
    # Where it is null, the config is an earlier version's, and its weights were trained with that schedule.
    if config.beta_schedule == "linear" and config.scaled_betas is not None and signal > MOST_SIGNAL:
        way_on = "model.timesteps to 2 or more" if config.scaled_betas else "model.scaled_betas=true"
        raise ConfigError(
            f"model.timesteps={config.timesteps} with model.beta_schedule=linear: {signal:.2f} of the mask is left in "
            f"x_T, and sampling starts from pure noise; at most {MOST_SIGNAL} can be. Set {way_on}"
        )
    if config.steps > config.timesteps:
        raise ConfigError(f"model.steps={config.steps}: must be ≤ {config.timesteps} (T)")
    if config.sampler != "dpm_solver" and config.timesteps % config.steps:
        # diffusers steps from t to t - T // steps: with a remainder that is not the next t.
        valid = ", ".join(str(n) for n in range(1, config.timesteps + 1) if config.timesteps % n == 0)
        raise ConfigError(f"model.steps={config.steps} with model.sampler={config.sampler}: must be one of {valid}")


def linear_betas(config: Diffusion) -> list[float]:
    """Ho et al.'s betas for T steps; scaled ones times 1000 / T, so that as much noise is added in fewer steps."""
    T = config.timesteps
    evenly = [FIRST_BETA + (LAST_BETA - FIRST_BETA) * i / max(1, T - 1) for i in range(T)]
    return [min(beta * DDPM_STEPS / T, MOST_BETA) for beta in evenly] if config.scaled_betas else evenly


def draw_noise(
    config: Diffusion, keys: Sequence[str], shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """x_T of `samples` draws of each key, key by key, each of this shape, and the generators they came from.

    The noise follows from key and `sampling_seed`: the same in any batch, on any rank and after a resume.
    """
    generators = [
        torch.Generator(device).manual_seed(keyed_seed(config.sampling_seed, "sampling", key, i))
        for key in keys
        for i in range(config.samples)
    ]
    return torch.stack([torch.randn(*shape, generator=each, device=device) for each in generators]), generators


def reverse(
    config: Diffusion,
    noising: Noising,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x_T: torch.Tensor,
    generators: list[torch.Generator] | None = None,
) -> torch.Tensor:
    """The reverse process from x_T, B x K x H x W, to x_0.

    predict: the network's prediction of x_t and of one t for all. generators: B of them, for what `ddpm` draws at each
    step. x'_0 is cut to [-1, 1] each time, as Ho et al. do.
    """
    scheduler, x = make_scheduler(config), x_T
    for step in scheduler.timesteps:
        x_0 = noising.clean(predict(x, step[None]).float(), x, step[None]).clamp(-1, 1)
        more = {"generator": generators} if config.sampler == "ddpm" else {}
        x = scheduler.step(x_0, int(step), x, **more, return_dict=False)[0]
    return x


class Noising:
    """The forward process, and back to the clean mask; t_B are B times, or one for all, on the CPU.

    Deliberately no nn.Module: as a buffer, alpha_bar would be rounded with the model to bfloat16, in which it is 1 for
    small t.
    """

    def __init__(self, config: Diffusion) -> None:
        self.prediction = config.prediction
        self.alpha_bar = make_scheduler(config).alphas_cumprod  # (2)

    def noised(self, x_0: torch.Tensor, noise_BKHW: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """(3)."""
        signal, spread = self._roots(t_B, x_0.device)
        return signal * x_0 + spread * noise_BKHW

    def velocity(self, x_0: torch.Tensor, noise_BKHW: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """What is predicted with `v` (Salimans and Ho, 2022)."""
        signal, spread = self._roots(t_B, x_0.device)
        return signal * noise_BKHW - spread * x_0

    def clean(self, predicted_BKHW: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """x'_0, float32: (3) solved for x_0, with the noise head's prediction. Not bounded."""
        signal, spread = self._roots(t_B, x_t.device)
        if self.prediction == "v":
            return signal * x_t - spread * predicted_BKHW
        return (x_t - spread * predicted_BKHW) / signal

    def _roots(self, t_B: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_bar = self.alpha_bar[t_B].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt().to(device), (1 - alpha_bar).sqrt().to(device)


def make_scheduler(config: Diffusion) -> t.Any:
    """diffusers' scheduler of the configured sampler, set to its steps; what it is given is x'_0, already bounded.

    Steps begin at T - 1 ("trailing"): a start from pure noise at a lower t, diffusers' default for some, promises the
    network a signal that is not there (Lin et al., 2024).
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler  # takes seconds to import

    shared: dict[str, t.Any] = {
        "num_train_timesteps": config.timesteps,
        "beta_schedule": BETA_SCHEDULES[config.beta_schedule],
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    }
    if config.beta_schedule == "linear" and config.scaled_betas:  # diffusers' own are those that are not
        shared["trained_betas"] = linear_betas(config)
    scheduler: t.Any
    if config.sampler == "dpm_solver":
        scheduler = DPMSolverMultistepScheduler(**shared)
    elif config.sampler == "ddim":
        scheduler = DDIMScheduler(**shared, clip_sample=False)
    else:
        scheduler = DDPMScheduler(**shared, clip_sample=False)
    scheduler.set_timesteps(config.steps)
    return scheduler


def as_prob(x_0: torch.Tensor) -> torch.Tensor:
    """x_0 or x'_0 as probability. Values beyond the bounds get no gradient."""
    return ((x_0 + 1) / 2).clamp(0, 1)
