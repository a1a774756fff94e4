"""How the small FLUX.1 and its reward learn: the VAE, then text encoders and transformer together, then the reward.

Every draw of a step comes from generators seeded with the step's number, so an interrupted training continues to the
bit.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from tqdm import trange

from full_scale.rewards.images import letterbox, normalise
from full_scale.shapes.judge import Judge, shows
from full_scale.shapes.scenes import BY_TEXT, COLORS, SHAPES, SIZE, TOKENS, Caption, Scene, captions, draw, place, spoil
from leap_align import BadInput
from runtime.ema import EMA
from runtime.files import atomic_file
from runtime.processes import one_line

SAVE_EVERY = 250  # steps
SCENES, WRONG = 20_000, 0.3  # of pre-training, and the share of them that are not what their captions say
CHOICES = 600  # captions of which the pipeline draws images for the reward's training
GUIDANCE = 3.5  # the scale that the transformer reads, always the same
CAPTIONS = list(captions().values())


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is its nearest orthogonal one, by five Newton-Schulz steps (Jordan, 2024).

    torch.optim.Muon computes these in bfloat16, which takes fourteen times as long on a CPU without it.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix; those of one shape at once."""
        (group,), by_shape = self.param_groups, {}
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, 0.95)))
        for (rows, columns), pairs in by_shape.items():
            x = torch.stack([update if rows <= columns else update.T for _, update in pairs])
            x /= x.norm(dim=(1, 2), keepdim=True) + 1e-7
            for _ in range(5):
                square = x @ x.mT
                x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
            for (p, _), update in zip(pairs, x if rows <= columns else x.mT):
                p.add_(update, alpha=-0.2 * max(rows, columns) ** 0.5 * group["lr"])


def fit(model: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float, state: Path, title: str) -> None:
    """Leaves in the model the average of its weights over training on loss(step); continues from the file `state`.

    Matrices inside of blocks learn by Muon at twice the rate, all other weights by AdamW.
    """
    parameters = dict(model.named_parameters())
    matrices = [
        p for name, p in parameters.items() if p.ndim == 2 and re.search(r"blocks?\.\d+\.(?!norm)|layers", name)
    ]
    others = [p for p in parameters.values() if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.99), fused=True)]
    optimizers += [Muon(matrices, lr)] if matrices else []
    ema = EMA(list(parameters.values()), max(0.5, 1 - 20 / max(1, steps)))  # over a twentieth of the steps
    done = load_state(state, model, optimizers, ema) if state.exists() else 0
    for step in trange(done, steps, initial=done, total=steps, desc=title, mininterval=1):
        warm_up, decay = (step + 1) / (0.05 * steps), (steps - step) / (0.7 * steps)
        for optimizer, factor in zip(optimizers, (1, 2)):
            optimizer.param_groups[0]["lr"] = factor * lr * min(1, warm_up, decay)
        loss(step).backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(step)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_state(state, model, optimizers, ema, step + 1)
    with torch.no_grad():
        for parameter, average in zip(ema.parameters, ema.average):
            parameter.copy_(average)


def members(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def save_state(path: Path, model: nn.Module, optimizers: list[Any], ema: EMA, done: int) -> None:
    """Writes weights, moments and average after `done` steps."""
    tensors = {f"model.{name}": value for name, value in members(model).items()} | {"done": torch.tensor(done)}
    moments = {p: values for optimizer in optimizers for p, values in optimizer.state.items()}
    for i, (p, average) in enumerate(zip(ema.parameters, ema.average)):
        own = {f"moment.{i}.{name}": value for name, value in moments.get(p, {}).items()}  # none for an unused weight
        tensors |= {f"average.{i}": average, **own}
    with atomic_file(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)


@torch.no_grad()
def load_state(path: Path, model: nn.Module, optimizers: list[Any], ema: EMA) -> int:
    """Reads what save_state wrote; returns the number of steps that were done."""
    try:
        tensors = load_file(path)
        for name, value in members(model).items():
            value.copy_(tensors[f"model.{name}"])
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise BadInput(f"{path} is damaged, or of another version ({one_line(error)}): remove it") from error
    optimizer_of = {p: optimizer for optimizer in optimizers for p in optimizer.param_groups[0]["params"]}
    for i, (p, average) in enumerate(zip(ema.parameters, ema.average)):
        average.copy_(tensors[f"average.{i}"])
        prefix = f"moment.{i}."
        moments = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        optimizer_of[p].state[p] = moments
    return int(tensors["done"])


def random_caption(random: Random) -> Caption:
    """A caption of a random kind."""
    return random.choice(random.choice(CAPTIONS))


def spoiled(caption: Caption, random: Random) -> Scene:
    """A scene that does not show the caption."""
    scene = place(spoil(caption, random), random)
    return spoiled(caption, random) if shows(scene, caption) else scene


def scene_and_spoiled(caption: Caption, random: Random) -> tuple[Scene, Scene]:
    """A scene that shows the caption, and one that does not, with most shapes in the same places."""
    layout, wrong = random.random(), spoil(caption, random)
    right, other = place(caption, Random(layout)), place(wrong, Random(layout))
    return scene_and_spoiled(caption, random) if shows(other, caption) else (right, other)


# ------------------------------------------------------- The VAE -----------------------------------------------------
def fit_vae(vae: nn.Module, steps: int, state: Path) -> None:
    """Reconstruction, a little KL, and a linear reading of each quarter from noisy latents.

    Without the reading, latents of red and orange, or of a circle and a square, lie so close that they differ only in
    the last steps of a sampling run.  At last, latents are brought to mean 0 and standard deviation 1.
    """
    names = [*SHAPES, *COLORS]
    model = nn.ModuleDict({"vae": vae, "reading": nn.Linear(4 * 4 * vae.config.latent_channels, len(names) + 1)})

    def loss(step: int) -> Tensor:
        random, generator = Random(step), Generator().manual_seed(step)
        scenes = [place(random_caption(random), random) for _ in range(32)]
        images = 2 * draw(scenes) - 1
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample(generator)
        error = vae.decode(latents).sample - images
        noisy = latents + 2 * latents.std().item() * torch.randn(latents.shape, generator=generator)
        quarters = noisy.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        read = F.binary_cross_entropy_with_logits(model["reading"](quarters), contents_of_quarters(scenes, names))
        return error.square().mean() + 0.3 * error.abs().mean() + 1e-5 * posterior.kl().mean() + 0.3 * read

    fit(model, loss, steps, 3e-3, state, "VAE")
    random = Random("statistics")
    with torch.no_grad():
        latents = vae.encode(2 * draw([place(random_caption(random), random) for _ in range(500)]) - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def contents_of_quarters(scenes: list[Scene], names: list[str]) -> Tensor:
    """(N, 4, names + 1): which of these shapes and colors a quarter of the image holds, and whether it is empty."""
    contents = torch.zeros(len(scenes), 4, len(names) + 1)
    contents[..., -1] = 1
    for n, placed in ((n, placed) for n, scene in enumerate(scenes) for placed in scene):
        quarter = contents[n, 2 * (placed.y > SIZE / 2) + (placed.x > SIZE / 2)]
        quarter[[names.index(placed.shape), names.index(placed.color)]] = 1
        quarter[-1] = 0
    return contents


# ---------------------------------------------- Text encoders and transformer ---------------------------------------
@torch.no_grad()
def training_scenes(pipeline: Any, n: int) -> tuple[Tensor, list[str]]:
    """Packed latents of scenes, and their captions, of which the share WRONG is wrong in one respect."""
    random, vae, packed, texts = Random("scenes"), pipeline.vae, [], []
    for _ in trange(n // 100, desc="scenes", mininterval=1):
        chosen = [random_caption(random) for _ in range(100)]
        images = draw([(spoiled if random.random() < WRONG else place)(caption, random) for caption in chosen])
        latents = (vae.encode(2 * images - 1).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
        packed.append(pipeline._pack_latents(latents, *latents.shape))
        texts += map(str, chosen)
    return torch.cat(packed), texts


def fit_pipeline(pipeline: Any, steps: int, state: Path) -> None:
    """Flow matching: |v(x_t, t, caption) - (noise - x_0)|².  Captions matter above t = 0.7, so most times are there."""
    networks = {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    latents, texts = training_scenes(pipeline, min(SCENES, 100 * steps))
    rows = int(latents.shape[1] ** 0.5)
    ids = {"txt_ids": torch.zeros(TOKENS, 3)}
    ids["img_ids"] = pipeline._prepare_latent_image_ids(1, rows, rows, torch.device("cpu"), torch.float32)

    def loss(step: int) -> Tensor:
        generator, n = Generator().manual_seed(step), 64
        chosen = torch.randint(len(latents), (n,), generator=generator)
        x_0, noise = latents[chosen], torch.randn(n, *latents.shape[1:], generator=generator)
        t = torch.sigmoid(1.5 + 1.3 * torch.randn(n, generator=generator))
        tokens, pooled, _ = pipeline.encode_prompt([texts[i] for i in chosen], max_sequence_length=TOKENS)
        text = {"encoder_hidden_states": tokens, "pooled_projections": pooled, "guidance": torch.full((n,), GUIDANCE)}
        x_t = x_0.lerp(noise, t[:, None, None])
        v = networks["transformer"](x_t, timestep=t, **text, **ids, return_dict=False)[0]
        return (v - (noise - x_0)).square().mean()

    fit(nn.ModuleDict(networks), loss, steps, 2e-3, state, "pipeline")


# ------------------------------------------------------ The reward --------------------------------------------------
@cache
def near(caption: Caption) -> list[str]:
    """The captions that differ from this one in one respect."""
    random, known = Random(str(caption)), set(BY_TEXT.values())
    return sorted({str(other) for other in (spoil(caption, random) for _ in range(300)) if other in known})


@torch.no_grad()
def drawn_choices(pipeline: Any, n: int) -> list[tuple[Caption, Tensor, Tensor]]:
    """Captions with the right and the wrong images among eight that the pipeline draws; only those that have both."""
    random, judge, found = Random("choices"), Judge(), []
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": SIZE, "width": SIZE, "max_sequence_length": TOKENS, "guidance_scale": GUIDANCE}
    for i in trange(n // 8, desc="choices", mininterval=1):
        captions = [random_caption(random) for _ in range(8)]
        prompts, generator = [str(c) for c in captions for _ in range(8)], Generator().manual_seed(i)
        images = pipeline(prompts, num_inference_steps=8, generator=generator, output_type="pt", **options).images
        is_right = judge(images, prompts).bool().view(8, 8)
        both = zip(captions, images.view(8, 8, *images.shape[1:]), is_right)
        found += [(c, own[right], own[~right]) for c, own, right in both if right.any() and not right.all()]
    return found


def choice_batch(
    choices: list[tuple[Caption, Tensor, Tensor]], generator: Generator, random: Random, n: int
) -> tuple[list[Caption], Tensor, Tensor]:
    """n captions; 2n images, of which the first n are to be chosen; which of these show their captions, (n,).

    Half of the images are the pipeline's own, unless it draws none right.  Of the rendered pairs, half are mixtures of
    a right and a wrong image, of which the one with more of the right is chosen: otherwise wrong images would lie on a
    plateau, where the reward has no gradient.
    """
    rendered = n // 2 if choices else n
    captions = [random_caption(random) for _ in range(rendered)]
    drawn = random.choices(choices, k=n - rendered) if choices else []
    right, wrong = map(draw, zip(*(scene_and_spoiled(caption, random) for caption in captions)))
    share = torch.rand(2, rendered, 1, 1, 1, generator=generator)
    share[0, ::2] = 1
    right, wrong = wrong.lerp(right, share[0]), wrong.lerp(right, share[0] * share[1])
    right = [*right, *(random.choice(images) for _, images, _ in drawn)]
    wrong = [*wrong, *(random.choice(images) for _, _, images in drawn)]
    is_whole = torch.cat([share[0].flatten() == 1, torch.ones(len(drawn), dtype=torch.bool)])
    return captions + [caption for caption, _, _ in drawn], torch.stack(right + wrong), is_whole


def fit_reward(
    model: nn.Module, tokenize: Callable[[list[str]], Tensor], pipeline: Any, steps: int, state: Path
) -> None:
    """Simulated choices: of two images the one that shows the caption, of captions the one that an image shows.

    -log σ(20 (cos(chosen image, text) - cos(other image, text))), and cross-entropy over 20 cos(right image, texts),
    where the other texts differ from the caption in one respect.
    """
    choices = drawn_choices(pipeline, min(CHOICES, 8 * steps))

    def loss(step: int) -> Tensor:
        random, generator = Random(step), Generator().manual_seed(step)
        captions, images, is_right = choice_batch(choices, generator, random, 48)
        noise = torch.randn(images.shape, generator=generator) * torch.rand(len(images), 1, 1, 1, generator=generator)
        pixels = normalise(letterbox((images + 0.03 * noise).clamp(0, 1), model.visual.image_size))
        features = model.encode_image(pixels, normalize=True)
        offered = [[str(c), *random.sample(near(c), min(16, len(near(c))))] for c in captions]
        texts = sorted({text for row in offered for text in row})
        cosines = features @ model.encode_text(tokenize(texts), normalize=True).T
        own = torch.tensor([texts.index(row[0]) for row in offered])
        chosen, other = cosines.gather(1, own.repeat(2)[:, None]).chunk(2)
        is_offered = torch.tensor([[text in row for text in texts] for row in offered])
        logits = (20 * cosines[: len(captions)]).masked_fill(~is_offered, -torch.inf)
        return F.softplus(20 * (other - chosen)).mean() + F.cross_entropy(logits[is_right], own[is_right])

    fit(model, loss, steps, 2e-3, state, "reward")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # their statistics are those of the weights before they were averaged
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for step in range(min(steps, 50)):
            loss(step)
    model.eval()
