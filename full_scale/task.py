"""What the image models share: a Task (runtime/task.py) over a diffusers pipeline.

States x are the pipeline's latents, float32 whatever the networks compute in.
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from full_scale import contents, pipeline, rewards, transformer
from full_scale.adapters import adapters_of_run, adapters_path
from full_scale.models import FAMILIES, Family
from full_scale.prompts import embedding_folders, few_prompts, find_embedding, read_embedding, read_prompts
from full_scale.sheet import draw_sheet
from leap_align import require, rollout, shifted_times
from runtime.files import atomic_file, read_json
from runtime.processes import all_gather, rank, run_on_all_ranks, world_size
from runtime.task import EVALUATION_SEED, Task

IMAGES_PER_PROMPT = 2  # in an evaluation; the difference between them is the diversity


@dataclass(frozen=True)
class Options:
    """Flags that all models have, with the defaults of FLUX.1-dev."""

    model: str = FAMILIES["flux"].model  # Pipeline: a local folder in diffusers' layout, or a hub id.
    # Training prompts: a text file with one per line, or a folder that `python -m full_scale embed` filled.
    prompts: Path | None = None
    # What is maximised: a reward's name, NAME:weight,NAME:weight for a sum, or your own package.module:factory.
    reward: str = "hpsv2.1"
    reward_weights: tuple[str, ...] = ()  # Local path of each named reward's weights, in their order; else the hub's.
    # Evaluators that training never sees: rewards as above, NAME,NAME; NAME:drop sets the fall that brings a warning.
    held_out: str = ""
    held_out_weights: tuple[str, ...] = ()  # Local path of each evaluator's weights, in their order; else the hub's.
    height: int = 720  # Pixels, a multiple of 16.
    width: int = 720  # Pixels, a multiple of 16.
    # Guidance scale: an input of FLUX.1-dev, classifier-free guidance in SD3.5-M and FLUX.2-klein.
    guidance: float = FAMILIES["flux"].guidance
    # Tokens of the largest text encoder, padding included: fewer are faster if all prompts are short.
    max_sequence_length: int = FAMILIES["flux"].max_sequence_length
    shift: float | None = None  # Shift s of the time grid; the pipeline's own scheduler decides if not given.
    # What the networks compute in; states, trained weights, their average and the reward are always float32.
    precision: pipeline.Precision = "bfloat16"
    lora_rank: int = 0  # Rank of the LoRA adapters; 0 trains every weight of the transformer.
    lora_alpha: float | None = None  # LoRA's scale times its rank; the rank itself if not given.
    # Linear layers that get an adapter, by the end of their names; '*' is any part of a name.
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    # With LoRA on one GPU: keep the frozen weights of the transformer's blocks in four bits (NF4, by torchao).
    load_in_4bit: bool = False
    # Which of the transformer's blocks the backward recomputes: all (on), every second one (selective), or none.
    gradient_checkpointing: transformer.Checkpointing = "on"
    # Free a block's weights after each use, instead of keeping all of them gathered for a microbatch: on several GPUs
    # less memory (22 GiB of FLUX.1-dev), but six times the traffic.
    reshard_after_forward: bool = False
    # Keep the transformer's weights, gradients and optimizer in host memory, and run the optimizer there: less GPU
    # memory, but slower. Every weight of FLUX.1-dev takes 292 GB of a node's host memory.
    cpu_offload: bool = False
    compile: bool = False  # Compile the transformer's repeated blocks; the first iteration takes minutes.
    lora: Path | None = None  # Start from these adapters: a run's folder lora/, or a LoRA that diffusers or peft read.
    transformer: Path | None = None  # Without LoRA: start from this folder transformer/ of a run.
    plan: Path | None = None  # File of `plan --json`, to print its figures, and those measured beside them.
    # Prompts to evaluate on, also a file or a folder; the first training prompts if not given.
    evaluation_prompts: Path | None = None
    evaluation_images: int = 16  # Images of an evaluation, two per prompt, always from the same noise.
    evaluation_T: int | None = None  # Euler steps of an evaluation's sampling runs; T if not given.


class DiffusersTask(Task):
    """A Task over a diffusers pipeline; a class of flux_adapter.py adds grid, noise, inputs, velocity_of and decode."""

    family: ClassVar[Family]
    Options: ClassVar[type] = Options
    next_commands: ClassVar[tuple[str, ...]] = (
        "python -m full_scale sample --help  # draws images with the weights of this run",
    )
    held_out: ClassVar[dict[str, float]] = {"diversity": 0.02}
    step_metric_names: ClassVar[tuple[str, ...]] = ("saturated",)
    paths: ClassVar[frozenset[str]] = frozenset(
        "model prompts evaluation_prompts reward_weights held_out_weights lora transformer plan".split()
    )
    start_paths: ClassVar[frozenset[str]] = frozenset({"lora", "transformer"})
    changeable_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"gradient_checkpointing", "reshard_after_forward", "cpu_offload", "compile", *paths}
    )

    @classmethod
    def defaults(cls, reward: str | None) -> dict[str, Any]:
        """The paper's settings, with those that it gives for this reward; other rewards train without a hinge."""
        settings = {"batch_size": 64, "iterations": 300, "T": 25, "weight_decay": 1e-4, "ema_decay": 0.995}
        settings |= {"alpha": 0.3, "lam": None, "lr": 1e-5}
        return settings | rewards.PRESETS.get(reward or Options.reward, {})

    @classmethod
    def evaluators(cls, options: Any) -> dict[str, float]:
        """The diversity of the images, and the rewards of --held-out."""
        terms = rewards.split_terms(options.held_out) if options.held_out else []
        return cls.held_out | {name: rewards.DROPS.get(name, 0.0) if drop is None else drop for name, drop in terms}

    def __init__(self, options: Options, T: int) -> None:
        pipeline.check_image_size(options.height, options.width)
        pipeline.check_guidance(self.family, options.guidance)
        pipeline.check_sequence_length(options.max_sequence_length)
        transformer.check_lora(options.lora_rank, options.lora_alpha)
        transformer.check_start(options.lora, options.transformer, options.lora_rank)
        if options.load_in_4bit:
            transformer.check_4bit(options.lora_rank, options.compile, options.cpu_offload)
        images, T_in_evaluation = options.evaluation_images, options.evaluation_T or T
        even = images >= 2 and images % IMAGES_PER_PROMPT == 0
        require(even, f"evaluation_images={images} must be even and at least 2")
        given = options.evaluation_T is None or options.evaluation_T >= 1
        require(given, f"evaluation_T={options.evaluation_T} must be at least 1, or not given for T")
        self.options, self.dtype, self.device = options, getattr(torch, options.precision), self.choose_device()
        self.prompts = read_prompts(options.prompts)
        evaluation_source = options.evaluation_prompts or options.prompts
        self.evaluation_prompts = read_prompts(evaluation_source)[: images // IMAGES_PER_PROMPT]
        pipeline.check_trainable(self.family, pipeline.pipeline_folder(options.model, ()))  # before any gigabyte moves
        self.folder = pipeline.pipeline_folder(options.model)
        self.model = self.build_transformer()  # before what takes minutes to load
        self.adapters = self.read_lora(options.lora) if options.lora else {}  # those to start from
        pipeline.check_positions(self.model, options.height, options.width)
        sources = [(options.prompts, self.prompts), (evaluation_source, self.evaluation_prompts)]
        self.embedding_folders = embedding_folders(sources, self.folder, options.max_sequence_length)
        needs_text = len(self.embedding_folders) < len(sources)
        self.prompts_to_encode_once = few_prompts(self.prompts, self.evaluation_prompts) if needs_text else []
        self.encoded_once: dict[str, dict[str, Tensor]] = {}
        self.reward_model, self.evaluator_models = self.load_reward(), self.load_evaluators()
        self.held_out = self.evaluators(options)
        self.step_metric_names = (*self.step_metric_names, *dict.fromkeys(self.reward_model.terms))
        self.pipeline = self.open_pipeline(needs_text)
        self.pipeline.vae.enable_gradient_checkpointing()
        for module in self.frozen_modules():
            module.requires_grad_(False)
        self.times, self.evaluation_times = self.times_of(T), self.times_of(T_in_evaluation)

    def times_of(self, T: int) -> Tensor:
        """The grid (T+1,) of a sampling run in T steps, on the device."""
        shift = self.options.shift
        return (self.grid(T) if shift is None else shifted_times(T, shift)).to(self.device)

    @abstractmethod
    def grid(self, T: int) -> Tensor:
        """The pipeline's own noise levels, ascending (T+1,)."""

    @classmethod
    def choose_device(cls) -> torch.device:
        """This process's GPU, or the CPU."""
        return pipeline.gpu_or_cpu()

    def load_reward(self) -> nn.Module:
        """The reward, with its weights."""
        options = self.options
        is_judge = "shapes" in (name for name, _ in rewards.split_terms(options.reward))
        require(not is_judge, f"reward={options.reward}: the judge `shapes` has no gradient; name it in --held-out")
        return rewards.load(options.reward, options.reward_weights, self.device, (options.height, options.width))

    def load_evaluators(self) -> nn.ModuleList:
        """The rewards of --held-out, in host memory; an evaluation moves them to the device."""
        names, weights = self.options.held_out, self.options.held_out_weights
        require(names or not weights, "held_out_weights are given without --held-out, which names their rewards")
        return nn.ModuleList(rewards.load_each(names, weights, "cpu") if names else ())

    def open_pipeline(self, text: bool) -> Any:
        """The pipeline without its transformer; without its text encoders unless text."""
        opened = pipeline.open_pipeline(self.family, self.folder, self.dtype, text=text, transformer=None)
        prompts = list(dict.fromkeys([*self.prompts, *self.evaluation_prompts]))
        pipeline.count_cut_prompts(opened, prompts if text else (), self.options.max_sequence_length)
        return opened

    def frozen_modules(self) -> list[nn.Module]:
        """What training keeps besides the transformer: reward, VAE, and text encoders if they are needed all along."""
        text_encoders = [] if self.prompts_to_encode_once else self.text_encoders().values()
        return [self.reward_model, self.pipeline.vae, *text_encoders]

    def text_encoders(self) -> dict[str, nn.Module]:
        """The pipeline's text encoders by name; none if every prompt has an embedding."""
        components = self.pipeline.components.items()
        return {name: part for name, part in components if name.startswith("text_encoder") and part is not None}

    def contents(self) -> dict[str, str]:
        """Digests of the files that this task reads; stored embeddings stand for their prompts and text encoders."""
        if self.embedding_folders:
            text_encoders = read_json(self.embedding_folders[0] / "settings.json")["model"]
        else:
            text_encoders = contents.files_content(self.folder, *pipeline.TEXT_SUBFOLDERS)
        found = {
            "model": contents.files_content(self.folder, "transformer", "vae", "scheduler"),
            "text_encoders": text_encoders,
            "prompts": contents.prompts_content(self.prompts),
            "evaluation_prompts": contents.prompts_content(self.evaluation_prompts),
            "reward_weights": contents.reward_content(self.options.reward, self.reward_model),
        }
        if self.options.held_out:
            found["held_out_weights"] = contents.reward_content(self.options.held_out, self.evaluator_models)
        start = {"lora": self.options.lora, "transformer": self.options.transformer}
        found |= {name: contents.files_content(adapters_path(path), ".") for name, path in start.items() if path}
        return found

    # The transformer

    def empty_transformer(self) -> nn.Module:
        """The architecture of the pipeline's transformer, on the meta device."""
        return transformer.empty_transformer(self.family, self.folder)

    def build_transformer(self) -> nn.Module:
        """The transformer as it will be trained, still on the meta device: trained weights float32."""
        options, model = self.options, self.empty_transformer()
        transformer.set_checkpointing(model, options.gradient_checkpointing)
        if options.lora_rank:
            transformer.add_lora(model, options.lora_rank, options.lora_alpha, options.lora_targets, self.dtype)
        return model

    def keep_reference(self) -> None:
        """With LoRA the reference is the model without its adapters, else a second transformer, frozen."""
        if transformer.has_lora(self.model):
            self.reference = transformer.without_lora(self.model)
        else:
            self.reference = transformer.freeze(self.empty_transformer(), self.dtype)

    def transformers(self) -> nn.ModuleList:
        """The model, and the reference if that is a transformer of its own."""
        return nn.ModuleList(model for model in (self.model, self.reference) if isinstance(model, nn.Module))

    def load_pretrained(self, model: nn.Module) -> None:
        """Loads the pipeline's weights into a transformer, and into the trained one those to start from, if given.

        Adapters are new otherwise, and never those of the reference.
        """
        start = self.options.transformer if model is self.model else None
        transformer.load_weights(model, start or self.folder / "transformer")
        transformer.reset_lora(model)
        if self.adapters:
            transformer.set_lora(model, self.adapters)
            self.adapters.clear()  # 0.3 GB of host memory for FLUX.1-dev

    def read_lora(self, path: Path) -> dict[str, Tensor]:
        """The adapters in a folder or a file, as parameters of this model."""
        return adapters_of_run(path, self.family, self.empty_transformer(), self.model)

    def quantize(self, model: nn.Module) -> None:
        """Gives the frozen weights four bits."""
        transformer.quantize(model, self.device)

    def check_memory(self, shards: int) -> None:
        """Refuses a device on which not even weights and optimizer fit."""
        options, gathered = self.options, 0
        if (shards > 1 or options.cpu_offload) and not options.reshard_after_forward:
            gathered = self.dtype.itemsize * sum(p.numel() for p in self.model.parameters())
        sharded, frozen = self.transformers(), self.frozen_modules()
        if options.cpu_offload:
            transformer.check_memory(sharded, [], torch.device("cpu"), shards)
            sharded = nn.ModuleList()
        transformer.check_memory(sharded, frozen, self.device, shards, options.load_in_4bit, gathered)

    def parallelize(self, mesh: DeviceMesh | None) -> None:
        """Moves everything to the device, shards the transformers over the mesh and loads their weights.

        Without a mesh this process gets a mesh of one, so that a laptop, one GPU and 16 take the same path.
        """
        if mesh is None:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
            mesh = init_device_mesh(self.device.type, (1,))
        run_on_all_ranks(lambda: self.check_memory(mesh.size(-1)))
        self.encode_few_prompts()
        torch.cuda.empty_cache()  # NCCL allocates outside of torch's cache
        for module in self.frozen_modules():
            module.to(self.device)
        for model in self.transformers():
            if self.options.compile:
                for block in transformer.repeated_blocks(model):
                    block.compile()  # before `shard`: blocks of one class share the compiled code
            reshards = self.options.reshard_after_forward or model is self.reference  # that one runs rarely
            transformer.shard(model, mesh, self.dtype, reshards, self.options.cpu_offload)
            if self.options.load_in_4bit:
                self.quantize(model)
            model.to_empty(device="cpu" if self.options.cpu_offload else self.device)
            self.load_pretrained(model)
            for buffer in model.buffers():
                buffer.data = buffer.to(self.device)  # FSDP2 gathers parameters alone

    def save(self, folder: Path) -> None:
        """Writes `transformer/` or `lora/` into the folder, as diffusers reads them."""
        transformer.export(self.model, self.family, self.empty_transformer(), self.dtype, folder)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        if transformer.has_lora(self.model):
            transformer.set_lora(self.model, self.read_lora(folder / "lora"))
        else:
            transformer.load_weights(self.model, folder / "transformer")

    # Prompts and noise

    def sample_conditions(self, n: int, generator: torch.Generator) -> list[str]:
        """n training prompts, each equally likely."""
        return [self.prompts[i] for i in torch.randint(len(self.prompts), (n,), generator=generator).tolist()]

    @torch.no_grad()
    def encode_few_prompts(self) -> None:
        """Encodes the prompts of a run that has few of them and frees the text encoders."""
        if not self.prompts_to_encode_once:
            return
        encoders = self.text_encoders()
        for encoder in encoders.values():
            encoder.to(self.device)
        self.encoded_once = {text: self.encode_now([text]) for text in self.prompts_to_encode_once}
        self.pipeline.register_modules(**dict.fromkeys(encoders))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """The transformer's text inputs for these prompts: from embedding files if all have one, or encoded before."""
        paths = [find_embedding(prompt, self.embedding_folders) for prompt in prompts]
        if all(paths):
            rows = [read_embedding(path) for path in paths]
            shapes = self.family.text_shapes(self.model.config, self.options.max_sequence_length)
            for path, row in zip(paths, rows):
                found = {name: tuple(value.shape) for name, value in row.items()}
                require(found == shapes, f"{path} holds {found}, not {shapes}: delete it, and embed again")
            return {name: torch.stack([row[name] for row in rows]).to(self.device, self.dtype) for name in shapes}
        if self.encoded_once:
            rows = [self.encoded_once[prompt] for prompt in prompts]
            return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return self.encode_now(prompts)

    def encode_now(self, prompts: list[str]) -> dict[str, Tensor]:
        """The text inputs, by the text encoders."""
        return self.family.encode_text(self.pipeline, prompts, self.device, self.options.max_sequence_length)

    def latent_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the VAE's latents."""
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.vae.config.latent_channels, self.options.height // factor, self.options.width // factor

    @cached_property
    def empty_prompt(self) -> dict[str, Tensor]:
        """The text inputs of the empty prompt, which classifier-free guidance needs."""
        return self.encode([""])

    def encode_empty(self, prompted: dict[str, Tensor]) -> dict[str, Tensor]:
        """The text inputs of as many empty prompts as there are prompts."""
        return {name: self.empty_prompt[name].expand_as(value) for name, value in prompted.items()}

    def guided(self, v_u: Tensor, v_c: Tensor) -> Tensor:
        """v = v_u + g (v_c - v_u): classifier-free guidance from the velocities without and with the prompts."""
        return v_u + self.options.guidance * (v_c - v_u)

    def images(self, latents: Tensor) -> Tensor:
        """The VAE's images (B, 3, H, W), in the dtype of the latents: black at 0, white at 1; some pixels beyond."""
        vae, dtype = self.pipeline.vae, latents.dtype
        latents = latents.to(vae.dtype)  # frees the float32 ones
        return vae.decode(latents, return_dict=False)[0].to(dtype) / 2 + 0.5

    def step_metrics(self, sample: Tensor) -> dict[str, float]:
        """saturated: the fraction of pixel values outside of [0, 1], which get no gradient."""
        return {"saturated": ((sample < 0) | (sample > 1)).float().mean().item()}

    def reward(self, sample: Tensor, condition: list[str]) -> Tensor:
        """(B,), with gradient to the images, apart from pixel values outside of [0, 1]."""
        return self.reward_and_terms(sample, condition)[0]

    def reward_and_terms(self, sample: Tensor, condition: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """`reward`, and each term of a sum of rewards."""
        return self.reward_model.with_terms(sample.clamp(0, 1), condition)

    @torch.no_grad()
    def evaluate(self, folder: Path | None, iteration: int) -> dict[str, float]:
        """Means of every score over fixed prompts and noise, and diversity; with a folder, a sheet of the images.

        diversity: mean |a - b| between the two images of a prompt, at 64 pixels.
        """
        prompts = [prompt for prompt in self.evaluation_prompts for _ in range(IMAGES_PER_PROMPT)]
        x_T = self.noise(len(prompts), torch.Generator().manual_seed(EVALUATION_SEED))
        # A sharded model must run equally often on every rank, so some ranks repeat another one's image.
        rounds = -(-len(prompts) // world_size())
        turns = [i % len(prompts) for i in range(rank(), rounds * world_size(), world_size())]
        turns = tqdm(turns, "evaluate", leave=False, mininterval=1, disable=rank() > 0)
        self.evaluator_models.to(self.device)
        images = {i: self.evaluate_images(prompts[i], x_T[i : i + 1]) for i in turns}
        self.evaluator_models.to("cpu")
        for images_of_a_rank in all_gather(images):
            images |= images_of_a_rank
        scores, thumbnails, pixels = zip(*(images[i] for i in range(len(prompts))))
        if folder is not None:
            with atomic_file(folder / "samples" / f"{iteration:06d}.png") as temporary:
                draw_sheet(torch.cat(pixels), self.evaluation_prompts).save(temporary, format="png")
        of_prompt = torch.cat(thumbnails).unflatten(0, (-1, IMAGES_PER_PROMPT))
        diversity = (of_prompt[:, 0] - of_prompt[:, 1]).abs().mean().item()
        return {name: float(np.mean([row[name] for row in scores])) for name in scores[0]} | {"diversity": diversity}

    def evaluate_images(self, prompt: str, x_T: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
        """Mean scores, thumbnails (n, 3, 64, 64), 8-bit images (n, 3, H, W) of the samples from x_T (n, *S)."""
        condition, names = [prompt] * len(x_T), [name for name, _ in rewards.split_terms(self.options.held_out)]
        sample = self.decode(rollout(self.velocity(condition), x_T.to(self.device), self.evaluation_times)[0])
        images = sample.clamp(0, 1)
        scores = {"reward": self.reward(sample, condition).mean().item(), **self.step_metrics(sample)}
        scores |= {name: model(images, condition).mean().item() for name, model in zip(names, self.evaluator_models)}
        thumbnails = nn.functional.interpolate(images, (64, 64), mode="area")
        return scores, thumbnails.cpu(), images.mul(255).round().byte().cpu()
