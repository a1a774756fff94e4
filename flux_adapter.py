"""FLUX.1-dev, SD3.5-M and FLUX.2-klein as tasks of the trainer: diffusers' pipelines behind the Task protocol.

    python train_leap_align.py --task flux --prompts prompts.txt     trains; --help lists every flag
    python -m full_scale --help                                      the tools around a run

What they share is full_scale/task.py; a model says what its pipeline does between text encoders and VAE.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from full_scale import pipeline
from full_scale.models import FAMILIES
from full_scale.task import DiffusersTask, Options
from leap_align import Velocity


class Flux(DiffusersTask):
    """FLUX.1-dev: packed latents, guidance as an input."""

    family = FAMILIES["flux"]

    def log_shift(self, T: int) -> float:
        """FluxPipeline's mu."""
        return pipeline.log_shift(self.pipeline.scheduler, self.latent_size(), 1.15)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, tokens, 64): a token is a 2x2 patch of the latents."""
        channels, height, width = self.latent_size()
        latents = torch.randn(n, channels, height, width, generator=generator)
        return self.pipeline._pack_latents(latents, n, channels, height, width)

    def unpack(self, x_0: Tensor) -> Tensor:
        """What the VAE decodes (B, channels, height, width)."""
        size = self.options.height, self.options.width
        return self.unscale(self.pipeline._unpack_latents(x_0, *size, self.pipeline.vae_scale_factor))

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

    def velocity_of(self, network: Callable[..., Any], inputs: dict[str, Any]) -> Velocity:
        """The velocity that a transformer gives."""

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return network(x.to(self.dtype), timestep=self.rounded_time(x, t), **inputs)[0].to(x.dtype)

        return velocity


@dataclass(frozen=True)
class SD3Options(Options):
    """Flags of SD3.5-M."""

    model: str = FAMILIES["sd3"].model
    """Pipeline: a local folder in diffusers' layout, or a hub id."""
    height: int = 512
    """Pixels, a multiple of 16."""
    width: int = 512
    """Pixels, a multiple of 16."""


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

    def unpack(self, x_0: Tensor) -> Tensor:
        """What the VAE decodes: the states, but for scale and shift."""
        return self.unscale(x_0)

    def inputs(self, condition: list[str]) -> dict[str, Any]:
        """The transformer's text inputs, without and with these prompts."""
        prompted = self.encode(condition)
        empty = self.encode_empty(prompted)
        text = {name: torch.cat([empty[name], value]) for name, value in prompted.items()}
        return {"return_dict": False, **text}

    def velocity_of(self, network: Callable[..., Any], inputs: dict[str, Any]) -> Velocity:
        """Guided, from what a transformer gives without and with the prompts."""

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            timestep = (1000 * t).expand(len(x)).repeat(2)
            v = network(x.to(self.dtype).repeat(2, 1, 1, 1), timestep=timestep, **inputs)[0]
            return self.guided(*v.to(x.dtype).chunk(2))

        return velocity


@dataclass(frozen=True)
class KleinOptions(Options):
    """Flags of FLUX.2-klein."""

    model: str = FAMILIES["klein"].model
    """Pipeline of a base model: a local folder in diffusers' layout, or a hub id."""
    guidance: float = FAMILIES["klein"].guidance
    """Scale of classifier-free guidance; up to 1 there is none, which halves the cost."""
    lora_targets: tuple[str, ...] = (*Options.lora_targets, "to_qkv_mlp_proj")
    """Linear layers that get an adapter, by the end of their names."""


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

    def log_shift(self, T: int) -> float:
        """Flux2KleinPipeline's mu, which depends on the number of steps."""
        _, rows, columns = self.patches()
        return compute_empirical_mu(rows * columns, T)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, 4 channels, height / 2, width / 2)."""
        return torch.randn(n, *self.patches(), generator=generator)

    def unpack(self, x_0: Tensor) -> Tensor:
        """What the VAE decodes (B, channels, height, width)."""
        vae = self.pipeline.vae
        mean, variance = (value.view(1, -1, 1, 1).to(x_0.dtype) for value in (vae.bn.running_mean, vae.bn.running_var))
        return self.pipeline._unpatchify_latents(x_0 * (variance + vae.config.batch_norm_eps).sqrt() + mean)

    def inputs(self, condition: list[str]) -> dict[str, Any]:
        """The transformer's text inputs with and, for guidance, without these prompts; positions (1, tokens, 4)."""
        prompted = self.encode(condition)
        texts = [prompted, self.encode_empty(prompted)] if self.options.guidance > 1 else [prompted]
        ids = {
            "img_ids": self.pipeline._prepare_latent_ids(torch.empty(1, *self.patches())).to(self.device),
            "txt_ids": self.pipeline._prepare_text_ids(prompted["encoder_hidden_states"][:1]).to(self.device),
        }
        return {"texts": texts, "return_dict": False, **ids}

    def velocity_of(self, network: Callable[..., Any], inputs: dict[str, Any]) -> Velocity:
        """Guided, from what a transformer gives with and without the prompts; unguided up to a scale of 1."""
        texts = inputs["texts"]
        others = {name: value for name, value in inputs.items() if name != "texts"}

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            tokens, timestep = self.pipeline._pack_latents(x.to(self.dtype)), self.rounded_time(x, t)
            v = [network(tokens, timestep=timestep, **text, **others)[0].to(x.dtype) for text in texts]
            v = self.guided(v[1], v[0]) if len(v) == 2 else v[0]
            return v.transpose(1, 2).reshape_as(x)

        return velocity
