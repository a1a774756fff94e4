"""FLUX.1-dev and SD3.5-M behind the trainer's task interface, and the tools around a full run.

    python train_leap_align.py --task flux --prompts prompts.txt ...   the training itself; --help lists every flag
    python flux_adapter.py sample --help                               and the same for the other tools:
        tiny              a tiny random pipeline and reward, to rehearse everything below on a laptop
        embed             prompts to stored embeddings, for cards that cannot hold the text encoders
        sample            images from a base or trained model, also in GenEval's folder layout
        score             a reward of every image, and the mean
        geneval-prompts   training prompts in GenEval's templates, none of them a test prompt

The tools run alone or under torchrun, one process a GPU, to the same files, and go on where they were stopped.
"""

import hashlib
import json
import os
import random
import shutil
import warnings
from base64 import b64decode
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import diffusers
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision
import transformers
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import rewards
from leap_align import BadInput, Velocity, rollout, shifted_times
from rewards import first_line
from train_leap_align import agree, leave, together, write

Precision = Literal["bfloat16", "float32"]
EVALUATION_SEED = 1_000_003
IMAGES_A_PROMPT = 2
"""Images of each prompt in an evaluation; what differs between them is the diversity."""


@dataclass(frozen=True)
class Options:
    """Flags of FLUX.1-dev and SD3.5-M."""

    model: str = "black-forest-labs/FLUX.1-dev"
    """Pipeline: a local folder in diffusers' layout, or a hub id."""
    prompts: Path | None = None
    """Training prompts: a text file with one a line, or a folder that `flux_adapter.py embed` filled."""
    reward: str = "hpsv2.1"
    """What is maximised: a reward's name, NAME:weight,NAME:weight for a sum, or your own package.module:factory."""
    reward_weights: tuple[str, ...] = ()
    """Local path of each named reward's weights, in their order; the hub's if not given."""
    height: int = 720
    """Pixels, a multiple of 16."""
    width: int = 720
    """Pixels, a multiple of 16."""
    guidance: float = 3.5
    """Guidance scale: an input of FLUX.1-dev, classifier-free guidance in SD3.5-M."""
    shift: float | None = None
    """Shift s of the time grid; the pipeline's own scheduler decides if not given."""
    precision: Precision = "bfloat16"
    """What the networks compute in; states, trained weights, their average and the reward are float32 anyway."""
    lora_rank: int = 0
    """Rank of the LoRA adapters; 0 trains every weight of the transformer."""
    lora_alpha: float | None = None
    """LoRA's scale times its rank; the rank itself if not given."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear layers that get an adapter, by the end of their names."""
    gradient_checkpointing: bool = True
    """Recompute the transformer's blocks in the backward pass: 7 % more compute for 1/24 of the activations."""
    compile: bool = False
    """Compile the transformer's repeated blocks; the first step takes minutes."""
    evaluation_prompts: Path | None = None
    """Prompts to evaluate on, in the same forms; the first training prompts if not given."""
    evaluation_images: int = 16
    """Images that an evaluation draws, two a prompt, always from the same noise."""


@dataclass(frozen=True)
class SD3Options(Options):
    """Flags of SD3.5-M."""

    model: str = "stabilityai/stable-diffusion-3.5-medium"
    """Pipeline: a local folder in diffusers' layout, or a hub id."""


# ---------------------------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------------------------


class Adapter:
    """What FLUX.1-dev and SD3.5-M share: the trainer's task interface over a diffusers pipeline.

    States are the pipeline's latents (FLUX packs them), float32 whatever the networks compute in.
    """

    pipeline_name: ClassVar[str]
    transformer_name: ClassVar[str]
    Options: ClassVar[type] = Options
    held_out: ClassVar[dict[str, float]] = {"diversity": 0.02}
    how: ClassVar[frozenset[str]] = frozenset({"gradient_checkpointing", "compile"})

    @classmethod
    def defaults(cls, reward: str | None) -> dict[str, Any]:
        """The paper's settings, with those that it gives for this reward; for another reward there is no hinge."""
        settings = {"batch_size": 64, "iterations": 300, "T": 25, "weight_decay": 1e-4, "ema": 0.995}
        settings |= {"alpha": 0.3, "lam": None, "lr": 1e-5}
        return settings | rewards.PRESETS.get(reward or Options.reward, {})

    def __init__(self, options: Options, T: int) -> None:
        check_size(options.height, options.width)
        if options.lora_rank < 0 or options.evaluation_images < 2 or options.evaluation_images % IMAGES_A_PROMPT:
            raise BadInput(
                f"lora_rank={options.lora_rank} must be at least 0, evaluation_images={options.evaluation_images} even "
                "and at least 2"
            )
        self.options, self.dtype = options, getattr(torch, options.precision)
        self.prompts = read_prompts(options.prompts)
        sources = [options.prompts, options.evaluation_prompts or options.prompts]
        self.evaluated = read_prompts(sources[1])[: options.evaluation_images // IMAGES_A_PROMPT]
        self.folder = pipeline_folder(options.model)
        self.stores = [source for source in sources if source.is_dir()]
        stored = len(self.stores) == len(sources)
        for store in self.stores:
            check_store(store, options.model, self.prompts if stored else [])
        self.pipeline = open_pipeline(self.pipeline_name, self.folder, self.dtype, text=not stored, transformer=None)
        self.device = device()
        self.reward_model = rewards.load(options.reward, options.reward_weights, self.device)
        self.pipeline.vae.enable_gradient_checkpointing()
        for module in self.frozen():
            module.requires_grad_(False)
        self.model = self.transformer()
        self.times = self.grid(T) if options.shift is None else shifted_times(T, options.shift)
        self.times = self.times.to(self.device)
        self.measured = {"saturated": 0.0}

    def frozen(self) -> list[nn.Module]:
        """What is used and not trained: VAE, reward, and the text encoders unless every embedding is stored."""
        return [self.pipeline.vae, self.reward_model, *text_encoders(self.pipeline)]

    # The transformer

    def empty_transformer(self) -> nn.Module:
        """The pipeline's transformer without memory, on the meta device."""
        kind = getattr(diffusers, self.transformer_name)
        with torch.device("meta"):
            return kind.from_config(kind.load_config(self.folder / "transformer", local_files_only=True)).eval()

    def transformer(self) -> nn.Module:
        """The same, ready for training: what is trained float32, the rest as it computes."""
        options = self.options
        model = self.empty_transformer()
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if options.lora_rank:
            from peft import LoraConfig

            model.requires_grad_(False).to(self.dtype)
            scale = options.lora_rank if options.lora_alpha is None else options.lora_alpha
            targets = list(options.lora_targets)
            try:
                model.add_adapter(LoraConfig(r=options.lora_rank, lora_alpha=scale, target_modules=targets))
            except ValueError as error:
                raise BadInput(f"lora_targets={options.lora_targets} name no layer of {options.model}") from error
            for parameter in trained(model):
                parameter.data = parameter.data.float()
        return model

    def place(self, mesh: DeviceMesh | None) -> None:
        """Everything to its device; the transformer sharded over the mesh (FSDP2), then its weights read.

        A single process is a mesh of one, so that a laptop, one GPU and 16 take the same path.
        """
        if mesh is None:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
            mesh = init_device_mesh(self.device.type, (1,))
        # Alone there is nothing to share: what is frozen stays where it lies instead of being copied at every use.
        frozen = {p for p in self.model.parameters() if not p.requires_grad} if mesh.size() == 1 else set()
        together(lambda: self.check_memory(mesh.size(-1), frozen))
        for module in self.frozen():
            module.to(self.device)
        if self.options.compile:
            self.model.compile_repeated_blocks()
        # Blocks return views of one joint sequence; torch warns lest someone writes into them in place.  Nobody does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        # Inputs are cast by hand where that is right: casting all of them would round SD3's times and the RoPE tables.
        policy = MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        # Alone, cast weights are kept from one forward to the next: a backward or a new `velocity` casts them anew.
        sharing = {"reshard_after_forward": mesh.size() > 1, "ignored_params": frozen}
        for module in [*repeated_blocks(self.model), self.model]:
            fully_shard(module, mesh=mesh, mp_policy=policy, **sharing)
        self.model.to_empty(device=self.device)
        self.read_transformer(self.folder / "transformer")
        self.reset_lora()

    def check_memory(self, shards: int, frozen: set[nn.Parameter]) -> None:
        """Refuses where not even weights and optimizer fit: float32 weight, gradient, two moments and average."""
        if self.device.type != "cuda":
            return
        frozen_weights = [p for module in self.frozen() for p in module.parameters()]
        need = sum(p.nbytes for p in frozen_weights if p.device.type != self.device.type)
        for p in self.model.parameters():
            need += p.nbytes * (5 if p.requires_grad else 1) / (1 if p in frozen else shards)
        if need > (free := torch.cuda.mem_get_info(self.device)[0]):
            raise BadInput(
                f"weights and optimizer need {need / 2**30:.0f} GiB a GPU, {free / 2**30:.0f} are free: use more GPUs, "
                "--lora-rank 64, or prompts from `flux_adapter.py embed`, which spare the text encoders"
            )

    def read_transformer(self, folder: Path) -> None:
        """The transformer's weights from safetensors, each process its own shards."""
        state = {k.replace(".base_layer", ""): v for k, v in self.model.state_dict().items() if ".lora_" not in k}
        try:
            dcp.load(state, storage_reader=HuggingFaceStorageReader(folder))
        except dcp.CheckpointException as error:
            raise BadInput(f"{folder} does not hold the weights of its config.json: {first_line(error)}") from error

    def reset_lora(self) -> None:
        """Fresh adapters, the same on every process: A as peft draws it, B zero, so that nothing changes yet."""
        if not self.options.lora_rank:
            return
        generator, state = torch.Generator().manual_seed(0), {}
        for name, parameter in self.model.named_parameters():
            if ".lora_A." in name:
                state[name] = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=5**0.5, generator=generator)
            elif ".lora_B." in name:
                state[name] = torch.zeros(parameter.shape)
        self.fill(state)

    def fill(self, state: dict[str, Tensor]) -> None:
        """Puts whole tensors into the trained parameters, which they have to name all."""
        names = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if self.options.lora_rank and state.keys() != names:
            raise BadInput(f"adapters for {len(state)} layers do not fit the model's {len(names)}")
        self.renew()
        set_model_state_dict(self.model, state, options=StateDictOptions(full_state_dict=True, strict=False))

    # Noise, prompts, velocity

    def renew(self) -> None:
        """Drops the cast weights that a forward without backward has kept: they may be old."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def latent_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the VAE's latents."""
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.vae.config.latent_channels, self.options.height // factor, self.options.width // factor

    def shift_of_size(self, default: float) -> float:
        """mu, the logarithm of the shift that the scheduler's config asks for at this size."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        get, (_, height, width) = self.pipeline.scheduler.config.get, self.latent_size()
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": default}
        return calculate_shift(height // 2 * (width // 2), *(get(name, value) for name, value in names.items()))

    def conditions(self, n: int, generator: torch.Generator) -> list[str]:
        """n training prompts, each as likely."""
        return [self.prompts[i] for i in torch.randint(len(self.prompts), (n,), generator=generator).tolist()]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """The transformer's two text inputs for these prompts, stored or computed."""
        paths = [find_embedding(prompt, self.stores) for prompt in prompts]
        if all(paths):
            rows = [load_file(path, device=str(self.device)) for path in paths]
            return {name: torch.stack([row[name] for row in rows]).to(self.dtype) for name in rows[0]}
        return self.encode_text(self.pipeline, prompts, self.device)

    # The image and its reward

    def decode(self, x_0: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], with gradient but where a pixel saturates, whose fraction is noted."""
        vae = self.pipeline.vae
        z = self.unpack(x_0) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(z.to(vae.dtype), return_dict=False)[0].to(x_0.dtype) / 2 + 0.5
        self.measured["saturated"] = ((image < 0) | (image > 1)).float().mean().item()
        return image.clamp(0, 1)

    def reward(self, sample: Tensor, condition: list[str]) -> Tensor:
        """(B,), with gradient to the images."""
        return self.reward_model(sample, condition)

    @torch.no_grad()
    def evaluate(self, folder: Path | None, iteration: int) -> dict[str, float]:
        """Mean reward, diversity and saturation over fixed prompts and noise; with a folder, a sheet of the images.

        diversity: mean |a - b| between the two images of a prompt, at 64 pixels.
        """
        prompts = [p for p in self.evaluated for _ in range(IMAGES_A_PROMPT)]
        x_T = self.noise(len(prompts), torch.Generator().manual_seed(EVALUATION_SEED))
        rank, world = rank_and_world()
        # All processes run the model equally often, as sharding asks for; what one of them repeats is dropped.
        mine = range(rank, -(-len(prompts) // world) * world, world)
        results = {}
        for i in (i % len(prompts) for i in tqdm(mine, "evaluate", leave=False, disable=rank > 0)):
            velocity = self.velocity(prompts[i : i + 1])
            image = self.decode(rollout(velocity, x_T[i : i + 1].to(self.device), self.times)[0])
            score = self.reward(image, prompts[i : i + 1]).item()
            small = nn.functional.interpolate(image, (64, 64), mode="area").cpu()
            results[i] = (score, self.measured["saturated"], small, image.mul(255).round().byte().cpu())
        self.renew()
        gathered = [None] * world
        dist.all_gather_object(gathered, results)
        rows = [row for _, row in sorted({i: row for part in gathered for i, row in part.items()}.items())]
        score, saturated, small, images = zip(*rows)
        if folder is not None:
            sheet = torchvision.utils.make_grid(torch.cat(images), nrow=IMAGES_A_PROMPT * 4, padding=4)
            image = torchvision.io.encode_png(sheet).numpy().tobytes()
            write(folder / "samples" / f"{iteration:06d}.png", lambda part: part.write_bytes(image))
        pairs = torch.stack(small).unflatten(0, (-1, IMAGES_A_PROMPT))
        diversity = (pairs[:, 0] - pairs[:, 1]).abs().mean().item()
        return {"reward": float(np.mean(score)), "diversity": diversity, "saturated": float(np.mean(saturated))}

    def draw(self, folder: Path) -> None:
        """Nothing more: each evaluation has drawn its sheet, to be looked at while the run goes on."""

    # Weights

    def save(self, folder: Path) -> None:
        """Writes `transformer` or `lora` in the folder, as diffusers reads them; every process calls it."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(self.model, options=whole)
        if rank_and_world()[0]:
            return
        if self.options.lora_rank:
            from peft import get_peft_model_state_dict

            layers = get_peft_model_state_dict(self.model, state_dict=state)
            about = {"transformer_lora_adapter_metadata": self.model.peft_config["default"].to_dict()}
            kind = getattr(diffusers, self.pipeline_name)
            write_folder(folder / "lora", lambda part: kind.save_lora_weights(part, layers, **about))
            return
        model = self.empty_transformer()
        # Frozen buffers (SD3's position table) are not among the parameters.
        state |= {name: buffer.cpu() for name, buffer in self.model.named_buffers() if name in model.state_dict()}
        # In the precision that it computes in: rounding now or at every use gives the same images.
        for name in state:
            state[name] = state[name].to(self.dtype)  # one after the other: both copies would be 71 GB
        model.load_state_dict(state, assign=True)
        write_folder(folder / "transformer", model.save_pretrained)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        if not self.options.lora_rank:
            return self.read_transformer(folder / "transformer")
        layers = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
        renamed = {name.removeprefix("transformer."): weight for name, weight in layers.items()}
        self.fill({name.replace(".weight", ".default.weight"): weight for name, weight in renamed.items()})


class Flux(Adapter):
    """FLUX.1-dev: packed latents, guidance as an input."""

    pipeline_name = "FluxPipeline"
    transformer_name = "FluxTransformer2DModel"

    def grid(self, T: int) -> Tensor:
        """FluxPipeline's own noise levels, ascending (T+1,)."""
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / T, T), mu=self.shift_of_size(1.15))
        return scheduler.sigmas.flip(0)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, tokens, 64): a token is a 2x2 patch of the latents."""
        channels, height, width = self.latent_size()
        latents = torch.randn(n, channels, height, width, generator=generator)
        return self.pipeline._pack_latents(latents, n, channels, height, width)

    def unpack(self, x_0: Tensor) -> Tensor:
        """The VAE's latents (B, channels, height, width)."""
        return self.pipeline._unpack_latents(
            x_0, self.options.height, self.options.width, self.pipeline.vae_scale_factor
        )

    @staticmethod
    def encode_text(pipeline: Any, prompts: list[str], place: torch.device) -> dict[str, Tensor]:
        """T5's tokens, padding included as in training, and CLIP's pooled text."""
        tokens, pooled, _ = pipeline.encode_prompt(prompts, device=place)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def velocity(self, condition: list[str]) -> Velocity:
        """v_theta under these prompts, with the weights as they are now."""
        self.renew()
        text = self.encode(condition)
        _, height, width = self.latent_size()
        place = {"device": self.device, "dtype": self.dtype}
        ids = {
            "img_ids": self.pipeline._prepare_latent_image_ids(1, height // 2, width // 2, **place),
            "txt_ids": torch.zeros(text["encoder_hidden_states"].shape[1], 3, **place),
        }
        guidance = torch.full((len(condition),), self.options.guidance, device=self.device)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            # Through thousandths and back: FluxPipeline's rounding, which the model was trained with.
            timestep = (1000 * t).expand(len(x)).to(self.dtype) / 1000
            arguments = {"timestep": timestep, "guidance": guidance, "return_dict": False, **text, **ids}
            return self.model(x.to(self.dtype), **arguments)[0].to(x.dtype)

        return velocity


class SD3(Adapter):
    """SD3.5-M: classifier-free guidance, both evaluations in one batch."""

    pipeline_name = "StableDiffusion3Pipeline"
    transformer_name = "SD3Transformer2DModel"
    Options = SD3Options

    def grid(self, T: int) -> Tensor:
        """StableDiffusion3Pipeline's own noise levels, ascending (T+1,); they are no shift of an even grid."""
        scheduler = self.pipeline.scheduler
        dynamic = {"mu": self.shift_of_size(1.16)} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(T, **dynamic)
        return scheduler.sigmas.flip(0)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, channels, height, width)."""
        return torch.randn(n, *self.latent_size(), generator=generator)

    def unpack(self, x_0: Tensor) -> Tensor:
        """The VAE's latents, which the states are."""
        return x_0

    @staticmethod
    def encode_text(pipeline: Any, prompts: list[str], place: torch.device) -> dict[str, Tensor]:
        """The three encoders' tokens and the two CLIPs' pooled text."""
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompts, prompts, prompts, device=place, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    @cached_property
    def no_prompt(self) -> dict[str, Tensor]:
        """The text inputs of the empty prompt, which never change."""
        return self.encode([""])

    def velocity(self, condition: list[str]) -> Velocity:
        """v = v_u + g (v_c - v_u): v_theta without and with these prompts, with the weights as they are now."""
        self.renew()
        text = {k: torch.cat([self.no_prompt[k].expand_as(v), v]) for k, v in self.encode(condition).items()}

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            timestep = (1000 * t).expand(len(x)).repeat(2)
            v = self.model(x.to(self.dtype).repeat(2, 1, 1, 1), timestep=timestep, return_dict=False, **text)[0]
            v_u, v_c = v.to(x.dtype).chunk(2)
            return v_u + self.options.guidance * (v_c - v_u)

        return velocity


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines, prompts, processes
# ---------------------------------------------------------------------------------------------------------------------


def device() -> torch.device:
    """This process's GPU, or the processor where there is none; of several processes one talks."""
    if rank_and_world()[0]:
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def check_size(height: int, width: int) -> None:
    """The VAE divides a size by eight, the transformer's patches by two."""
    for name, pixels in {"height": height, "width": width}.items():
        if pixels < 16 or pixels % 16:
            raise BadInput(f"{name}={pixels} must be a multiple of 16 pixels: 512, 720, 1024, ...")


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that take gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer's blocks, which diffusers itself lists as the parts worth compiling, FSDP2-wrapped or not."""
    names = set(model._repeated_blocks)
    return [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]


def text_encoders(pipeline: Any) -> list[nn.Module]:
    """The pipeline's text encoders, as far as they were loaded."""
    return [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None]


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a text file, one a line, or of a folder of stored embeddings."""
    if path is None:
        raise BadInput("prompts is missing: give --prompts FILE, a text file with one prompt a line")
    file = path / "prompts.txt" if path.is_dir() else path
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read prompts from {file} ({first_line(error)}): a text file, one a line") from error
    if not prompts:
        raise BadInput(f"{file} holds no prompt: write one a line")
    return prompts


TEXT = ("text_encoder", "text_encoder_[23]", "tokenizer", "tokenizer_[23]")


def pipeline_folder(model: str, parts: tuple[str, ...] = (*TEXT, "transformer", "vae")) -> Path:
    """The local folder of a pipeline, fetched from the hub if `model` is not a local path; parts of it by name."""
    if (folder := Path(model)).exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        if not (folder / "model_index.json").is_file():
            raise BadInput(f"model={model} is neither a hub id OWNER/NAME nor a folder with a model_index.json")
        return folder
    return rewards.download(model, "model_index.json", "scheduler/*", *(f"{part}/*" for part in parts), flag="--model")


def adapter_of(folder: Path) -> type[Adapter]:
    """The adapter for the pipeline in a folder."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    for adapter in (Flux, SD3):
        if adapter.pipeline_name == name:
            return adapter
    raise BadInput(f"{folder} holds a {name}: only FluxPipeline and StableDiffusion3Pipeline are known here")


def open_pipeline(kind: str, folder: Path, dtype: torch.dtype, text: bool = True, **parts: Any) -> Any:
    """A pipeline from a local folder alone; `parts` are put in place of those on disk, None leaves one out."""
    index = json.loads((folder / "model_index.json").read_text())
    if index["_class_name"] != kind:
        raise BadInput(f"{folder} holds a {index['_class_name']}, not a {kind}: FLUX is --task flux, SD3.5 --task sd3")
    if not text:
        parts |= {name: None for name in index if name.startswith(("text_encoder", "tokenizer"))}
    try:
        return getattr(diffusers, kind).from_pretrained(folder, dtype=dtype, local_files_only=True, **parts)
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is not a whole pipeline: {first_line(error)}") from error


def embedding_name(prompt: str) -> str:
    """The file of a prompt's stored embedding."""
    return hashlib.sha1(prompt.encode()).hexdigest() + ".safetensors"


def find_embedding(prompt: str, stores: list[Path]) -> Path | None:
    """Where the embedding of a prompt is stored, if it is."""
    return next((path for store in stores if (path := store / embedding_name(prompt)).exists()), None)


def check_store(store: Path, model: str, prompts: list[str]) -> None:
    """Refuses embeddings of another model, or of fewer prompts than these."""
    try:
        known = json.loads((store / "settings.json").read_text())["model"]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{store} is no folder that `flux_adapter.py embed` filled ({first_line(error)})") from error
    if known != model:
        raise BadInput(f"{store} holds embeddings of {known}, not of {model}: embed the prompts with this --model")
    if missing := [prompt for prompt in prompts if not (store / embedding_name(prompt)).exists()]:
        raise BadInput(
            f"{store} lacks {len(missing)} embeddings, as of {missing[0]!r:.60}: finish `flux_adapter.py embed`"
        )


def write_folder(folder: Path, fill: Callable[[Path], Any]) -> None:
    """fill(a folder beside it), then renames that to `folder`."""
    part = folder.with_name(folder.name + ".part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part)
    os.replace(part, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------------------------------


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Notes the settings under which a folder is filled; refuses to go on under others."""
    path = out / "settings.json"
    settings = json.loads(json.dumps(settings, default=str))
    try:
        old = json.loads(path.read_text()) if path.exists() else settings
        changed = [f"{k} was {old.get(k)}, is {v}" for k, v in settings.items() if old.get(k) != v]
        if changed:
            raise BadInput(f"{out} was filled under other settings: {'; '.join(changed)}; choose another --out")
        write(path, lambda part: part.write_text(json.dumps(settings, indent=2) + "\n"))
    except OSError as error:
        raise BadInput(f"cannot write to {out} ({error.strerror}): choose another folder with --out") from error


def digest(texts: list[str]) -> str:
    """A short name for a list of prompts."""
    return hashlib.sha1("\n".join(texts).encode()).hexdigest()[:12]


def share(items: Iterable[Any], what: str, done: Callable[[Any], bool]) -> Iterable[Any]:
    """This process's items that are not done yet, behind a progress bar."""
    rank, world = rank_and_world()
    mine = list(items)[rank::world]
    return (item for item in tqdm(mine, what, disable=rank > 0) if not done(item))


@torch.no_grad()
def embed(model: str, prompts: Path, out: Path, precision: Precision = "bfloat16") -> None:
    """Store the text embedding of every prompt, 4.2 MB each for FLUX.1-dev; then train with --prompts OUT.

    Args:
        model: Pipeline: a local folder in diffusers' layout, or a hub id.
        prompts: Text file, one prompt a line.
        out: Folder to fill; what it holds already is not done again.
        precision: What the text encoders compute in.
    """
    texts = read_prompts(prompts)
    folder = pipeline_folder(model, TEXT)
    adapter, dtype, place = adapter_of(folder), getattr(torch, precision), device()
    agree(lambda: claim(out, {"model": model, "precision": precision}))
    pipeline = open_pipeline(adapter.pipeline_name, folder, dtype, transformer=None, vae=None).to(place)
    # SD3.5's guidance needs the empty prompt as well.
    for text in share(dict.fromkeys(["", *texts]), "embed", lambda text: (out / embedding_name(text)).exists()):
        encoded = adapter.encode_text(pipeline, [text], place)
        row = {name: value[0].contiguous().cpu() for name, value in encoded.items()}
        write(out / embedding_name(text), partial(save_file, row))
    # Last, so that a training that finds the list finds every embedding.
    wait()
    agree(lambda: write(out / "prompts.txt", lambda part: part.write_text("\n".join(texts) + "\n", encoding="utf-8")))


@torch.no_grad()
def sample(
    model: str,
    out: Path,
    prompts: Path | None = None,
    geneval: Path | None = None,
    transformer: Path | None = None,
    lora: Path | None = None,
    steps: int = 50,
    images_per_prompt: int = 4,
    height: int = 720,
    width: int = 720,
    guidance: float = 3.5,
    batch_size: int = 4,
    precision: Precision = "bfloat16",
) -> None:
    """Draw images with diffusers' own pipeline: a PNG an image, and prompts.json.

    An image's noise follows from its number alone, never from the number of processes.

    Args:
        model: Pipeline: a local folder in diffusers' layout, or a hub id.
        out: Folder to fill; what it holds already is not drawn again.
        prompts: Text file, one prompt a line.
        geneval: Instead of prompts, GenEval's evaluation_metadata.jsonl; OUT gets its evaluator's folder layout.
        transformer: A run's folder transformer/, in place of the pipeline's own.
        lora: A run's folder lora/, on top of the pipeline's transformer.
        steps: Sampling steps.
        images_per_prompt: Images a prompt.
        height: Pixels, a multiple of 16.
        width: Pixels, a multiple of 16.
        guidance: Guidance scale.
        batch_size: Images of one prompt that are drawn at once.
        precision: What the networks compute in.
    """
    check_size(height, width)
    for name, value in {"steps": steps, "images_per_prompt": images_per_prompt, "batch_size": batch_size}.items():
        if value < 1:
            raise BadInput(f"{name}={value} must be at least 1")
    if (prompts is None) == (geneval is None):
        raise BadInput("give either --prompts FILE or --geneval evaluation_metadata.jsonl")
    texts, files = (plain_layout if geneval is None else geneval_layout)(prompts or geneval, images_per_prompt)
    settings = {"model": model, "transformer": transformer, "lora": lora, "prompts": digest(texts), "steps": steps}
    settings |= {"images_per_prompt": images_per_prompt, "height": height, "width": width, "guidance": guidance}
    settings |= {"batch_size": batch_size, "precision": precision}
    pipeline = together(lambda: sampler(model, transformer, lora, getattr(torch, precision)))
    agree(lambda: claim(out, settings))
    agree(lambda: lay_out(out, texts, files, geneval))
    pipeline.to(device())
    for i in share(range(len(texts)), "sample", lambda i: all((out / file).exists() for file in files[i])):
        for first in range(0, images_per_prompt, batch_size):
            numbers = range(first, min(first + batch_size, images_per_prompt))
            noise = [torch.Generator().manual_seed(i << 16 | number) for number in numbers]
            images = pipeline(
                texts[i],
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                num_images_per_prompt=len(numbers),
                generator=noise,
            ).images
            for number, image in zip(numbers, images):
                write(out / files[i][number], partial(image.save, format="png"))
    wait()


def plain_layout(path: Path, images: int) -> tuple[list[str], list[list[str]]]:
    """The prompts of a text file, and for each the files of its images."""
    texts = read_prompts(path)
    return texts, [[f"{i:05d}_{number}.png" for number in range(images)] for i in range(len(texts))]


def geneval_layout(path: Path, images: int) -> tuple[list[str], list[list[str]]]:
    """The prompts of GenEval's metadata, and for each the files where its evaluator looks for the images."""
    lines = read_prompts(path)
    try:
        texts = [json.loads(line)["prompt"] for line in lines]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadInput(f"{path} must hold one JSON object with a prompt a line ({first_line(error)})") from error
    return texts, [[f"{i:05d}/samples/{number:04d}.png" for number in range(images)] for i in range(len(texts))]


def lay_out(out: Path, texts: list[str], files: list[list[str]], geneval: Path | None) -> None:
    """Writes prompts.json, and the metadata that GenEval's evaluator reads beside the images."""
    prompts = {file: text for text, names in zip(texts, files) for file in names}
    write(out / "prompts.json", lambda part: part.write_text(json.dumps(prompts, indent=1) + "\n"))
    for names, line in zip(files, read_prompts(geneval) if geneval else ()):
        metadata = (out / names[0]).parent.with_name("metadata.jsonl")
        write(metadata, partial(Path.write_text, data=line + "\n"))


def sampler(model: str, transformer: Path | None, lora: Path | None, dtype: torch.dtype) -> Any:
    """A whole pipeline, not on its device yet, with the trained transformer or adapters in place."""
    if transformer and lora:
        raise BadInput("give --transformer or --lora, not both: a run trains one of them")
    for name, path in {"transformer": transformer, "lora": lora}.items():
        if path and not path.exists():
            raise BadInput(f"{name}={path} does not exist: a finished run leaves it in its folder")
    folder = pipeline_folder(model)
    adapter, parts = adapter_of(folder), {}
    try:
        if transformer:
            own = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
            parts["transformer"] = getattr(diffusers, adapter.transformer_name).from_pretrained(transformer, **own)
        pipeline = open_pipeline(adapter.pipeline_name, folder, dtype, **parts)
        if lora:
            check_adapters(lora, pipeline.transformer)
            pipeline.load_lora_weights(lora, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadInput(f"{lora or transformer or model} does not fit {model}: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_adapters(lora: Path, transformer: nn.Module) -> None:
    """Refuses adapters for layers that the transformer does not have, which diffusers would pass over."""
    layers = dict(transformer.named_modules())
    for name, weight in load_file(lora / "pytorch_lora_weights.safetensors" if lora.is_dir() else lora).items():
        layer, _, side = name.removeprefix("transformer.").partition(".lora_")
        rank_first = side.startswith("A")
        if layer not in layers or weight.shape[rank_first] != layers[layer].weight.shape[rank_first]:
            raise ValueError(f"{layer} is none of its layers, or of another size")


@torch.no_grad()
def score(images: Path, out: Path, reward: str = "hpsv2.1", reward_weights: tuple[str, ...] = ()) -> None:
    """Score every image that `sample` drew: prints the mean, writes OUT/IMAGES_rewards_log.json.

    Args:
        images: Folder with prompts.json and the images that it names.
        out: Folder for the log.
        reward: A reward's name, NAME:weight,NAME:weight for a sum, or your own package.module:factory.
        reward_weights: Local path of each named reward's weights, in their order; the hub's if not given.
    """
    prompts = read_image_prompts(images)
    log = out / f"{images.resolve().name}_rewards_log.json"
    parts = log.with_suffix(".parts")
    if log.exists():
        done = json.loads(log.read_text())
        if done["reward"] != reward or [row["image"] for row in done["images"]] != list(prompts):
            raise BadInput(f"{log} holds scores of {done['reward']}, or of other images: choose another --out")
        agree(lambda: print(f"mean {reward} of {len(prompts)} images: {done['mean']:.4f}; as {log} says"))
        return
    agree(lambda: claim(parts, {"images": images.resolve(), "reward": reward, "reward_weights": reward_weights}))
    model = together(lambda: rewards.load(reward, reward_weights, device=device()))
    rows = scored(parts)
    wait()  # or a fast process would write rows that a slow one still reads
    with (parts / f"{rank_and_world()[0]}.jsonl").open("a") as file:
        file.write("\n")  # a row that was cut off ends here
        for name in share(prompts, "score", rows.__contains__):
            image = torchvision.io.decode_image(str(images / name), torchvision.io.ImageReadMode.RGB)
            value = model(image[None].to(device()) / 255, [prompts[name]]).item()
            file.write(json.dumps({"image": name, "prompt": prompts[name], "reward": value}) + "\n")
            file.flush()
    wait()
    agree(lambda: conclude(log, parts, prompts, reward))


def read_image_prompts(images: Path) -> dict[str, str]:
    """prompts.json of a folder of images, all of which have to be there."""
    try:
        prompts = json.loads((images / "prompts.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise BadInput(f"images={images} needs a prompts.json, {{file: prompt}}, as `sample` writes it") from error
    missing = [name for name in prompts if not (images / name).exists()]
    if missing or not prompts:
        raise BadInput(f"{images} lacks {len(missing)} of {len(prompts)} images: finish `flux_adapter.py sample`")
    return prompts


def scored(parts: Path) -> dict[str, dict[str, Any]]:
    """The rows that stopped or finished processes wrote; one that was cut off in the middle does not count."""
    rows = {}
    for file in parts.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
                rows[row["image"]] = row
            except json.JSONDecodeError:
                continue
    return rows


def conclude(log: Path, parts: Path, prompts: dict[str, str], reward: str) -> None:
    """Gathers all rows, in the order of the images, into the log."""
    rows = scored(parts)
    result = {"mean": float(np.mean([rows[name]["reward"] for name in prompts])), "reward": reward}
    result["images"] = [rows[name] for name in prompts]
    write(log, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    shutil.rmtree(parts)
    print(f"mean {reward} of {len(prompts)} images: {result['mean']:.4f}; written to {log}")


def wait() -> None:
    """Until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# GenEval's training prompts
# ---------------------------------------------------------------------------------------------------------------------

GENEVAL_SHARES = {"position": 20588, "counting": 14706, "attribute": 8824, "colors": 2941, "two objects": 2941}
"""50,000 in the paper's ratio 7 : 5 : 3 : 1 : 1."""
COLORS = "red orange yellow green blue purple pink brown black white".split()
OBJECTS = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""
"""The 80 classes of COCO."""
TEST_PROMPTS = """
ABC/AGHlARMRAhw6AwA4BGrXBG88BQDIBYLtBZ/KBbPLBe3JBhAQBhaOBmUrBs+7ByLjB4HSB74hB8VZB+XZCAkYCIcwCLzzCnUGCvHiCwvBCzkGC0yWC2
gkC7qfDCYsDDvyDQQ2DTsFDW+MDYvJDZvsDb9qDeJFDhILDpySD7xuD8XeENOtEfNFEvsnE407E/0HFDAJFJ03FMqCFNr5FOp+FOybFRdgFSeWFVraFXvU
FknHFpZkF3joF3prF95OGE4YGNR3GPLKGPp9GpKJG9cDHAOOHDNdHK1iHVTiHc3pHddXHzIHH4iHH8aKIEUcIEgbINQTIWzpIYhrIcLfIcnvIzqjI8hjI/
czJBsLJFutJHzUJT53Ja2PJgLKJhWbKGo2KY/vKaRXKuX4LNKlLOJ0LdOiLxipMHSmMRd5Mk0yMp+xMqATMsevM0OmM28iNBEKNfgRNi1RNr0oNsPyN9nR
OPM7ORKWOYAbOYN/ObeuObt7OhNiOjPIOnU2OzXgOz5SO5afO59eO8hFO80lO/ztPL+rPMSVPUS4PWO4PctsPe+bPfwbPompPq8lQFCRQJCQQLtfQOMVQU
dGQfUoQuUIQwaPQynlQy7rRNSJRTU/RUSsRuzjR2YLR7/5SAq5SEHhSvAkTITHTOY/ThQATkoVTnnCTouuTqdITrQcTtJ4T0vpT5g8T5tcT9nXUBeWUiSx
U7hPVCyZVhOGVh2qVkquVn8wVtLsV39gV+4KWAGRWC8TWkANWs+9WtpEWv5XWxOdW89uXFAUXFHHXMEAXZAJXdQ1Xga8XiplXopCX2OEX+V8X+5RYTv/YU
X1YWkkYeIdYj1GYzJNY2qeY4aOZIQeZgI7Zg+WZi1dZxlrZ15laF0mab7Iad0Nal1oan8+bBcjbLHlbUGNbbSnblhZbrLAbwiOb74kb/+acHsvcPHfcSZk
chH2cnCIcn6DcqOMcswactMWdK00dObjdUHedZPOdiEtdrlIdupvdvKXd1iPePyleXpceZQKew+Nez6xe2N1e6/xfIWpfZBRffMYfhknfmt6fnJDfpfcfq
oqftysfuGSfuckfzrtf2Fgf9JtgDEDgHvtgJCegVa+gbU7gg+6glF2gq76gw3pg9Lxg+E5g+q9hK3+hM1thaAfhjzuht04h5X7iG3MiMK1iUYJiUweiYPy
ijjVimNVioaxixpFjClYjGZ8jPv4jY23jgswji0jjjHVjkOnjm7njqHxjqj9jyypj/d1kDlHkQPPkzCVkzx4lB0zlgS2l6q6l+cEmZaAmom7m+9cnIcvnI
pUnUOrnVQdnuPgn/B1oGIaoK5OoMXpoYnAoan+odF7oeznopiOo1nKpAqYpOlLpP+FpRWzpY6rpdvfpi4Rpj4epu9hp7zhqGKiqaBYqdiKqkKBqoF7q1mD
q7GWq815q+AEq/4arQfTriZ7r35Vr8tRsARrsFDksIDcsI8YsOM+sRwDsUFBseuGsgyrsioJswr/s1pds+/itCJJtIj9tZeits7etxAXtx/Lt1Ift/ZbuD
jNuHMeuXt5uZ3zufC1uhf5ulj2ul6IvBv4vD6UvGFCvHrovafWvanjvdnDvklvv9fEwLBmwO+8wlgHwlk2wmhOwv51xMIKxN/+xPJSxZkNxcnKxif3xqCv
xrn0xtYVxutwx03Yx//JyEQlyRccyTkoyq7Byy5gyzkiy0fIy2/Wy37Fy7p5y9PIy94uzE6HzGVIzG3szQmLzhx1zuFC0NeD0bQF0f1Q0lNy0lg80oLp0u
Se0vSb010E04N9068J0+zi1A+31Bfc1Dgo1Dve1HmU1MI41WsR1kbv1soj11N+2CJu2EYw2Q7z2Upg2YfF2Z+S2b262fcv2ito2tgT20Qt24gt3FCM3IIS
3NEJ3ORD3T1n3UvM3eAY3qYG3vvu33rP33+b37bj4IZb4JmG4Ljj4MPz4R6f4WNq4W1e4ZiG4em34nVG4pZx5Fab5K5I5PdY5S3K5WNt5Wws5XFo5cQh5c
uB5doC5ekQ5i875lKg5zKJ53JH6BEP6SAq6gsF6oNe6sG16xQj6+D36/2i7D0G7EeD7Pt17VwP7bNI7e1g76nr78AO8I0V8UtC8WiA8Wyp8eS08kMr85k7
89kv9KER9fa99kB19kEJ9k0d9k1R9tpM952B981E+NAz+NWF+TwQ+rZN+8A//E92/Q+m/oY//yKw/ykW/65Z/+IS
"""
"""The first three bytes of the SHA-1 of each of GenEval's 553 test prompts, which no training may meet (base64)."""


def geneval_prompts(out: Path) -> None:
    """Write 50,000 training prompts in GenEval's templates and the paper's ratio, none of them a test prompt.

    There are few different prompts for counting (160) and colors (696): these return many times.

    Args:
        out: Text file to write, one prompt a line.
    """
    digests, draw = b64decode(TEST_PROMPTS), random.Random(0)
    test = {digests[i : i + 3] for i in range(0, len(digests), 3)}
    prompts = []
    for kind, texts in tqdm(geneval_templates().items(), "geneval-prompts"):
        pool = [text for text in texts if hashlib.sha1(text.encode()).digest()[:3] not in test]
        whole, rest = divmod(GENEVAL_SHARES[kind], len(pool))
        prompts += pool * whole + draw.sample(pool, rest)
    draw.shuffle(prompts)
    write(out, lambda part: part.write_text("\n".join(prompts) + "\n"))
    print(f"{len(prompts)} prompts, {len(set(prompts))} of them different, written to {out}")


def geneval_templates() -> dict[str, list[str]]:
    """Every prompt of each kind that is trained on."""
    objects = " ".join(OBJECTS.split()).split(", ")
    colored = [name for name in objects if name != "person"]
    positions = ["left of", "right of", "above", "below"]
    a = {name: f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in objects + COLORS}
    plural = {name: name + ("es" if name.endswith("s") else "s") for name in objects}
    pairs, colors = list(permutations(objects, 2)), list(permutations(COLORS, 2))
    return {
        "position": [f"a photo of {a[x]} {where} {a[y]}" for x, y in pairs for where in positions],
        "counting": [f"a photo of {number} {plural[x]}" for x in objects for number in ("two", "three", "four")],
        "attribute": [f"a photo of {a[c]} {x} and {a[d]} {y}" for x, y in permutations(colored, 2) for c, d in colors],
        "colors": [f"a photo of {a[c]} {x}" for x in colored for c in COLORS],
        "two objects": [f"a photo of {a[x]} and {a[y]}" for x, y in pairs],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tiny pipelines for rehearsals
# ---------------------------------------------------------------------------------------------------------------------


def tiny(folder: Annotated[Path, tyro.conf.Positional], sd3: bool = False) -> None:
    """Write a tiny random pipeline and tiny rewards, to rehearse a whole run on a laptop.

    FOLDER/reward is HPSv2.1; the others lie in folders of their names.

    The classes are the real ones, their sizes a toy's: the images are noise and stay noise.

    Args:
        folder: Folder to write.
        sd3: SD3.5's architecture instead of FLUX's.
    """
    torch.manual_seed(0)
    (tiny_sd3 if sd3 else tiny_flux)().save_pretrained(folder)
    for name in tqdm(rewards.REWARDS, "tiny rewards"):
        rewards.tiny(name, folder / ("reward" if name == Options.reward else name))
    print(
        f"try: python train_leap_align.py --task {'sd3' if sd3 else 'flux'} --model {folder} --prompts PROMPTS.txt "
        f"--reward-weights {folder}/reward --height 64 --width 64 --batch-size 4 --iterations 3"
    )


def tiny_text(t5_width: int) -> dict[str, Any]:
    """A CLIP that reads bytes and a T5 that reads characters, with their tokenizers."""
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    clip = transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    letters = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>", "▁")] + [(chr(i), -1.0) for i in range(33, 127)]
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=32, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    t5 = transformers.T5Config(
        vocab_size=len(letters) + 100, d_model=t5_width, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    return {
        "clip": config,
        "clip_tokenizer": clip,
        "t5": transformers.T5EncoderModel(t5),
        "t5_tokenizer": transformers.T5Tokenizer(letters, extra_ids=100, model_max_length=512),
    }


def tiny_vae(scaling: float, shift: float) -> nn.Module:
    """A VAE with the latents of the real one: 16 channels, an eighth of the size."""
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, layers_per_block=1, norm_num_groups=4, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=scaling, shift_factor=shift,
    )  # fmt: skip


def tiny_flux() -> Any:
    """FLUX.1-dev's pipeline with one double and two single blocks."""
    text = tiny_text(32)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(0.3611, 0.1159),
        text_encoder=transformers.CLIPTextModel(text["clip"]),
        tokenizer=text["clip_tokenizer"],
        text_encoder_2=text["t5"],
        tokenizer_2=text["t5_tokenizer"],
        transformer=transformer,
    )


def tiny_sd3() -> Any:
    """SD3.5-M's pipeline with two blocks, the first with dual attention."""
    text = tiny_text(64)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16,
        pos_embed_max_size=96, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(1.5305, 0.0609),
        text_encoder=transformers.CLIPTextModelWithProjection(text["clip"]),
        tokenizer=text["clip_tokenizer"],
        text_encoder_2=transformers.CLIPTextModelWithProjection(text["clip"]),
        tokenizer_2=text["clip_tokenizer"],
        text_encoder_3=text["t5"],
        tokenizer_3=text["t5_tokenizer"],
        transformer=transformer,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The main program
# ---------------------------------------------------------------------------------------------------------------------

TOOLS = {"tiny": tiny, "embed": embed, "sample": sample, "score": score, "geneval-prompts": geneval_prompts}


def main(arguments: list[str] | None = None) -> None:
    """Runs one tool; under torchrun on every process."""
    error = None
    try:
        if dist.is_torchelastic_launched():
            dist.init_process_group("gloo")
        tyro.extras.subcommand_cli_from_dict(TOOLS, args=arguments, description=__doc__)
    except (BadInput, OSError, torch.OutOfMemoryError) as caught:
        error = caught
    except KeyboardInterrupt:
        error = BadInput("interrupted: the same command goes on from here")
    leave(error)


if __name__ == "__main__":
    main()
