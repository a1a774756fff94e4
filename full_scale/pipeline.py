"""Open a diffusers pipeline: its folder, its family, its components."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_type_hints

import torch
from tqdm import tqdm

from full_scale.components import REMEDY, load_component, loading
from full_scale.models import FAMILIES, Family
from full_scale.rewards.weights import download
from leap_align import require
from runtime.files import read_json
from runtime.processes import rank

Precision = Literal["bfloat16", "float32"]
TEXT_SUBFOLDERS = ("text_encoder", "text_encoder_[23]", "tokenizer", "tokenizer_[23]")
"""A pipeline's subfolders that turn prompts into embeddings, as patterns of names."""
PIPELINES = {family.pipeline_name: (task, family) for task, family in FAMILIES.items()}
"""The task and the family of each pipeline's class."""


def family_of(folder: Path) -> Family:
    """The family of the pipeline in a folder."""
    name = pipeline_class_name(folder)
    require(name in PIPELINES, f"{folder} holds a {name}: choose a pipeline of class {', '.join(PIPELINES)}")
    return PIPELINES[name][1]


def pipeline_class_name(folder: Path) -> str:
    """The class that model_index.json names."""
    index = folder / "model_index.json"
    name = read_json(index).get("_class_name")
    require(name is not None, f"{index} names no pipeline's class (_class_name): restore it")
    return str(name)


def pipeline_folder(model: str, subfolders: tuple[str, ...] = (*TEXT_SUBFOLDERS, "transformer", "vae")) -> Path:
    """The local folder of a pipeline; a hub id is downloaded.

    model: a local path or OWNER/NAME.  subfolders: what to download, as patterns of names.
    """
    if (folder := Path(model)).exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        is_pipeline = (folder / "model_index.json").is_file()
        require(is_pipeline, f"model={model} is neither a hub id OWNER/NAME nor a folder with a model_index.json")
        return folder
    configs = "model_index.json", "scheduler/*", "transformer/config.json"
    everything = [*configs, *(f"{name}/*" for name in (*TEXT_SUBFOLDERS, "transformer", "vae"))]
    files = [*configs, *(f"{name}/*" for name in subfolders)]
    return download(model, *files, flag="--model", by_hand=everything)


def open_pipeline(family: Family, folder: Path, dtype: torch.dtype, text: bool = True, **components: Any) -> Any:
    """A pipeline from a local folder; it never asks the network.

    text=False leaves the text encoders and tokenizers out.  components: replace those on disk; None leaves one out.
    """
    silence_other_ranks()
    for name in (family.pipeline_class.__module__, "transformers.tokenization_utils_base"):
        logging.getLogger(name).addFilter(_is_no_cut_prompt)
    index = read_json(folder / "model_index.json")
    lacks_t5 = index.get("text_encoder_3") == [None, None]  # as SD3.5 may
    if lacks_t5:
        components |= {"text_encoder_3": None, "tokenizer_3": None}  # which diffusers wants to be told
    if not text:
        components |= {name: None for name in index if name.startswith(("text_encoder", "tokenizer"))}
    expected = get_type_hints(family.pipeline_class.__init__)
    kinds = {
        n: component_class(folder, n, index[n], expected[n]) for n in index if n not in components and n in expected
    }
    components |= {name: load_component(folder / name, kind, dtype) for name, kind in kinds.items() if kind}
    with loading(f"{folder} is not a complete pipeline"):
        opened = family.pipeline_class.from_pretrained(folder, dtype=dtype, local_files_only=True, **components)
    if lacks_t5 and opened.transformer is None:
        opened.transformer = config_alone(read_json(folder / "transformer" / "config.json"))
    return opened


def config_alone(config: dict[str, Any]) -> Any:
    """What stands for a transformer that is left out: diffusers asks it for the width of the text of a missing T5."""
    return SimpleNamespace(config=SimpleNamespace(**config))


def count_cut_prompts(pipeline: Any, prompts: Sequence[str], tokens: int | None = None) -> None:
    """Rank 0 says how many prompts are longer than a pipeline's tokenizers read; else nothing.

    tokens: of a text encoder that is no CLIP; the pipeline's own if not given.
    """
    tokens = tokens or PIPELINES[type(pipeline).__name__][1].max_sequence_length
    names = sorted(name for name, part in pipeline.components.items() if name.startswith("tokenizer") and part)
    for name in names if rank() == 0 else ():
        tokenizer, texts = getattr(pipeline, name), list(prompts)
        most = 77 if tokenizer.model_max_length == 77 else tokens  # CLIP's; SD3.5 may come without T5
        if tokenizer.chat_template and len(names) == 1:
            chats = [[{"role": "user", "content": text}] for text in texts]
            texts = tokenizer.apply_chat_template(
                chats, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        cut = sum(len(ids) > most for ids in tokenizer(texts, truncation=False, verbose=False).input_ids)
        if cut:
            tqdm.write(f"{cut} of {len(texts)} prompts are cut: {name} reads {most} tokens")


def _is_no_cut_prompt(record: logging.LogRecord) -> bool:
    """False for what libraries log of each prompt that is cut, in full and at every step."""
    return "truncated because" not in record.msg and "Token indices sequence length" not in record.msg


def component_class(folder: Path, name: str, entry: Any, expected: type) -> type | None:
    """The class that model_index.json gives a component as [library, class]; None for [null, null] and settings.

    Refuses other classes than the pipeline's own: with AutoModel, for instance, the folder's own code would run.
    """
    if isinstance(entry, bool) or entry == [None, None]:
        return None
    import diffusers
    import transformers

    library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    found = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(kind), None)
    is_own = isinstance(found, type) and issubclass(found, expected)
    require(is_own, f"{folder}/model_index.json gives {name} as {entry}, not as {expected.__name__}: {REMEDY}")
    return found


def log_shift(scheduler: Any, latent_size: tuple[int, int, int], default_max: float) -> float:
    """mu, the logarithm of the time grid's shift that the scheduler's config asks for at this size.

    latent_size: channels, height and width.  A token is a 2x2 patch of the latents.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    _, height, width = latent_size
    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": default_max}
    settings = [scheduler.config.get(name, value) for name, value in defaults.items()]
    return calculate_shift(height // 2 * (width // 2), *settings)


def check_image_size(height: int, width: int) -> None:
    """Refuses sizes that are not multiples of 16: the VAE divides by eight, the transformer's patches by two."""
    for name, pixels in {"height": height, "width": width}.items():
        is_valid = pixels >= 16 and pixels % 16 == 0
        require(is_valid, f"{name}={pixels} must be a multiple of 16 pixels: 512, 720, 1024, ...")


def check_positions(transformer: Any, height: int, width: int) -> None:
    """Refuses an image with more rows or columns of patches than a transformer knows: SD3 has a table of them."""
    most = 16 * (getattr(transformer.pos_embed, "pos_embed_max_size", None) or math.inf)
    for name, pixels in {"height": height, "width": width}.items():
        require(pixels <= most, f"{name}={pixels} must be at most {most}, the largest size that this model knows")


def check_sequence_length(tokens: int) -> None:
    """Refuses a number of text tokens that the pipelines do not take."""
    require(1 <= tokens <= 512, f"max_sequence_length={tokens} must lie between 1 and 512")


def has_guidance(folder: Path) -> bool:
    """Whether a guidance scale changes what the pipeline in a folder draws: not for a FLUX distilled to few steps."""
    config = folder / "transformer" / "config.json"
    if family_of(folder).guidance_is_input and config.is_file():
        return read_json(config).get("guidance_embeds", False)
    return not read_json(folder / "model_index.json").get("is_distilled", False)


def check_trainable(family: Family, folder: Path) -> None:
    """Refuses a pipeline of another family, and a model that was distilled to few steps, which has no guidance."""
    name, expected = pipeline_class_name(folder), family.pipeline_class.__name__  # a missing diffusers is named early
    tasks = ", ".join(f"{known} is --task {task}" for known, (task, _) in PIPELINES.items())
    require(name == expected, f"{folder} holds a {name}, not a {expected}: {tasks}")
    remedy = f"train its base model, such as {family.model}"
    require(has_guidance(folder), f"{folder} holds a model that is distilled to few steps: {remedy}")


def check_guidance(family: Family, guidance: float) -> None:
    """Refuses a scale that would turn every image into noise or NaN, or that diffusers' pipeline would ignore."""
    least = 0 if family.guidance_is_input else 1  # at 1, classifier-free guidance has no effect
    in_range = least <= guidance < math.inf
    require(in_range, f"guidance={guidance} must be at least {least} for {family.title}, and finite")


def choose_guidance(model: str, guidance: float | None) -> float:
    """The guidance scale that was given, else the usual one of the model's family; 1 for a model without guidance."""
    folder = pipeline_folder(model)
    family, is_guided = family_of(folder), has_guidance(folder)
    if guidance is None:
        return family.guidance if is_guided else 1.0
    reason = f"{model} is distilled to few steps and has none"
    require(is_guided, f"guidance={guidance}, but {reason}: leave --guidance out")
    check_guidance(family, guidance)
    return guidance


def gpu_or_cpu() -> torch.device:
    """This rank's GPU, which becomes the current one; the CPU without a GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def silence_other_ranks() -> None:
    """Leaves the libraries' warnings and progress bars to rank 0."""
    if rank() > 0:
        import diffusers
        import transformers

        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
