"""What a file of this folder says about its model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """The pipelines of one diffusers class."""

    title: str
    """The model's name, for people."""
    model: str
    """The hub id of the published pipeline."""
    pipeline_name: str
    """The pipeline's class in diffusers."""
    transformer_name: str
    """The transformer's class in diffusers."""
    encode_text: Callable[[Any, list[str], torch.device], dict[str, Tensor]]
    """(pipeline, prompts, device) to the transformer's text inputs by name, each (B, ...)."""
    text_inputs: dict[str, tuple[int | str, ...]]
    """The shapes of these inputs without B; a name stands for a number of the transformer's config."""
    configs: dict[str, dict[str, Any]]
    """The config of every network and of the scheduler, by subfolder, as its authors publish it."""
    tiny: Callable[..., Any]
    """() to a tiny random pipeline; its arguments replace networks and the widths of its text encoders."""
    widths: dict[str, Any] = field(default_factory=dict)
    """Arguments of `tiny` with which its text encoders have the published widths."""
    guidance: float = 3.5
    """The usual guidance scale."""
    guidance_is_input: bool = False
    """Whether the transformer reads the guidance scale; otherwise guidance is classifier-free."""

    @property
    def pipeline_class(self) -> Any:
        """The pipeline's class."""
        return getattr(diffusers, self.pipeline_name)

    @property
    def transformer_class(self) -> Any:
        """The transformer's class."""
        return getattr(diffusers, self.transformer_name)

    def text_shapes(self, transformer_config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes of one prompt's text inputs by name."""
        return {
            name: tuple(transformer_config[size] if isinstance(size, str) else size for size in shape)
            for name, shape in self.text_inputs.items()
        }
