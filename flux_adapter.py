"""FLUX.1-dev, SD3.5-M and FLUX.2-klein as tasks of the trainer: diffusers' pipelines as Tasks (runtime/task.py).

    python train_leap_align.py --task flux --prompts prompts.txt     trains; --help lists every flag
    python -m full_scale --help                                      the tools around a run

What they share is full_scale/task.py; a class owns what its pipeline does between text encoders and image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from full_scale import pipeline
from full_scale.models import FAMILIES
from full_scale.task import DiffusersTask, Options
from leap_align import Velocity


class Flux(DiffusersTask):
    """FLUX.1-dev: packed latents, guidance as an input."""

    family = FAMILIES["flux"]

    def grid(self, T: int) -> Tensor:
        """FluxPipeline's own noise levels, ascending (T+1,): an even grid, shifted by exp(mu)."""
        mu = pipeline.log_shift(self.pipeline.scheduler, self.latent_size(), 1.15)
        return shifted_grid(self.pipeline.scheduler, T, mu)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, tokens, 64): a token is a 2x2 patch of the latents."""
        size = self.latent_size()
        return self.pipeline._pack_latents(torch.randn(n, *size, generator=generator), n, *size)

    def inputs(self, condition: list[str]) -> dict[str, Any]:
        """What the transformer reads beside latents and time: text, positions, guidance."""
        text = self.encode(condition)
        _, height, width = self.latent_size()
        options = {"device": self.device, "dtype": self.dtype}
        ids = {
            "img_ids": self.pipeline._prepare_latent_image_ids(1, height // 2, width // 2, **options),
            "txt_ids": torch.zeros(text["encoder_hidden_states"].shape[1], 3, **options),
        }
        guidance = torch.full((len(condition),), self.options.guidance, device=self.device)
        return {"guidance": guidance, "return_dict": False, **text, **ids}

    def velocity_of(self, model: Callable[..., Any], inputs: dict[str, Any]) -> Velocity:
        """The velocity that a transformer gives."""

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            timestep = rounded_time(t, len(x), self.dtype)
            return model(x.to(self.dtype), timestep=timestep, **inputs)[0].to(x.dtype)

        return velocity

    def decode(self, x_0: Tensor) -> Tensor:
        """Images (B, 3, H, W), with gradient to the latents."""
        size = self.options.height, self.options.width, self.pipeline.vae_scale_factor
        vae = self.pipeline.vae.config
        return self.images(self.pipeline._unpack_latents(x_0, *size) / vae.scaling_factor + vae.shift_factor)


@dataclass(frozen=True)
class SD3Options(Options):
    """Flags of SD3.5-M."""

    model: str = FAMILIES["sd3"].model  # Pipeline: a local folder in diffusers' layout, or a hub id.
    height: int = 512  # Pixels, a multiple of 16.
    width: int = 512  # Pixels, a multiple of 16.
    # Tokens of T5, padding included: fewer are faster if all prompts are short.
    max_sequence_length: int = FAMILIES["sd3"].max_sequence_length


class SD3(DiffusersTask):
    """SD3.5-M: classifier-free guidance, both evaluations in one batch."""

    family = FAMILIES["sd3"]
    Options = SD3Options

    @classmethod
    def defaults(cls, reward: str | None) -> dict[str, Any]:
        """FLUX's settings, with 200 iterations (supplement A2)."""
        return super().defaults(reward) | {"iterations": 200}

    def grid(self, T: int) -> Tensor:
        """StableDiffusion3Pipeline's own noise levels, ascending (T+1,); no shift of an even grid gives them."""
        scheduler = self.pipeline.scheduler
        mu = pipeline.log_shift(scheduler, self.latent_size(), 1.16)  # used if the scheduler's shift is dynamic
        scheduler.set_timesteps(T, mu=mu)
        return scheduler.sigmas.flip(0)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, channels, height, width)."""
        return torch.randn(n, *self.latent_size(), generator=generator)

    def inputs(self, condition: list[str]) -> dict[str, Any]:
        """The transformer's text inputs, without and with these prompts."""
        prompted = self.encode(condition)
        empty = self.encode_empty(prompted)
        text = {name: torch.cat([empty[name], value]) for name, value in prompted.items()}
        return {"return_dict": False, **text}

    def velocity_of(self, model: Callable[..., Any], inputs: dict[str, Any]) -> Velocity:
        """Guided, from what a transformer gives without and with the prompts."""

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            timestep = (1000 * t).expand(len(x)).repeat(2)
            v = model(x.to(self.dtype).repeat(2, 1, 1, 1), timestep=timestep, **inputs)[0]
            return self.guided(*v.to(x.dtype).chunk(2))

        return velocity

    def decode(self, x_0: Tensor) -> Tensor:
        """Images (B, 3, H, W), with gradient to the latents."""
        vae = self.pipeline.vae.config
        return self.images(x_0 / vae.scaling_factor + vae.shift_factor)


@dataclass(frozen=True)
class KleinOptions(Options):
    """Flags of FLUX.2-klein."""

    model: str = FAMILIES["klein"].model  # Pipeline of a base model: a local folder in diffusers' layout, or a hub id.
    # Scale of classifier-free guidance; up to 1 there is none, which halves the cost.
    guidance: float = FAMILIES["klein"].guidance
    # Linear layers that get an adapter, by the end of their names.
    lora_targets: tuple[str, ...] = (*Options.lora_targets, "to_qkv_mlp_proj")


class Klein(DiffusersTask):
    """FLUX.2-klein: classifier-free guidance in two evaluations, as in its pipeline.

    States (B, 4 channels, height / 2, width / 2) are 2x2 patches of the VAE's latents, brought to unit variance by
    the statistics of the VAE's batch norm.
    """

    family = FAMILIES["klein"]
    Options = KleinOptions

    def patches(self) -> tuple[int, int, int]:
        """Numbers in a patch, and its rows and columns: the shape of a state."""
        channels, height, width = self.latent_size()
        return 4 * channels, height // 2, width // 2

    def grid(self, T: int) -> Tensor:
        """Flux2KleinPipeline's own noise levels, ascending (T+1,); its mu depends on the number of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        _, rows, columns = self.patches()
        return shifted_grid(self.pipeline.scheduler, T, compute_empirical_mu(rows * columns, T))

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, 4 channels, height / 2, width / 2)."""
        return torch.randn(n, *self.patches(), generator=generator)

    def inputs(self, condition: list[str]) -> dict[str, Any]:
        """The transformer's text inputs with and, for guidance, without these prompts; positions (1, tokens, 4)."""
        prompted = self.encode(condition)
        texts = [prompted, self.encode_empty(prompted)] if self.options.guidance > 1 else [prompted]
        ids = {
            "img_ids": self.pipeline._prepare_latent_ids(torch.empty(1, *self.patches())).to(self.device),
            "txt_ids": self.pipeline._prepare_text_ids(prompted["encoder_hidden_states"][:1]).to(self.device),
        }
        return {"texts": texts, "return_dict": False, **ids}

    def velocity_of(self, model: Callable[..., Any], inputs: dict[str, Any]) -> Velocity:
        """Guided, from what a transformer gives with and without the prompts; unguided up to a scale of 1."""
        texts = inputs["texts"]
        others = {name: value for name, value in inputs.items() if name != "texts"}

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            tokens = self.pipeline._pack_latents(x.to(self.dtype))
            timestep = rounded_time(t, len(x), self.dtype)
            v = [model(tokens, timestep=timestep, **text, **others)[0].to(x.dtype) for text in texts]
            v = self.guided(v[1], v[0]) if len(v) == 2 else v[0]
            return v.transpose(1, 2).reshape_as(x)

        return velocity

    def decode(self, x_0: Tensor) -> Tensor:
        """Images (B, 3, H, W), with gradient to the patches."""
        vae = self.pipeline.vae
        mean, variance = (value.view(1, -1, 1, 1).to(x_0.dtype) for value in (vae.bn.running_mean, vae.bn.running_var))
        std = (variance + vae.config.batch_norm_eps).sqrt()
        return self.images(self.pipeline._unpatchify_latents(x_0 * std + mean))


def shifted_grid(scheduler: Any, T: int, mu: float) -> Tensor:
    """A FLUX scheduler's noise levels, ascending (T+1,): an even grid, shifted by exp(mu)."""
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / T, T), mu=mu)
    return scheduler.sigmas.flip(0)


def rounded_time(t: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """The time (n,) that a FLUX sees: times 1000, rounded to dtype and back, as in training and in its pipelines."""
    return (1000 * t).expand(n).to(dtype) / 1000
