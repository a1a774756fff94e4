"""The tools around a run with FLUX.1-dev or SD3.5-M, in the order of their use.

    python -m full_scale tiny tiny                                   a tiny random model, to rehearse on a laptop
    python -m full_scale embed --model M --prompts P --out E         for cards that cannot hold the text encoders
    python train_leap_align.py --task flux --model M --prompts P     the training itself
    python -m full_scale sample --model M --transformer RUN/transformer --prompts P --out IMAGES
    python -m full_scale score --images IMAGES --out SCORES
    torchrun --nproc_per_node=8 -m full_scale sample ...             the same on 8 GPUs, and the same files

After an interruption the same command continues where it stopped.
"""

import pkgutil
import sys

import torch
import tyro

from leap_align import BadInput
from runtime.processes import exit_process, init_process_group, one_line

TOOLS = {
    "tiny": "full_scale.tiny:tiny",
    "embed": "full_scale.prompts:embed",
    "sample": "full_scale.sample:sample",
    "score": "full_scale.score:score",
    "geneval-prompts": "full_scale.geneval_prompts:geneval_prompts",
    "benchmark": "full_scale.benchmark:benchmark",
}
"""Where each tool's function is; only the chosen one is imported."""


def run(arguments: list[str]) -> None:
    """Runs the tool that the first argument names; --help imports all tools and lists them."""
    names = arguments[:1] if arguments and arguments[0] in TOOLS else list(TOOLS)
    tools = {name: pkgutil.resolve_name(TOOLS[name]) for name in names}
    init_process_group("gloo")
    tyro.extras.subcommand_cli_from_dict(tools, args=arguments, prog="python -m full_scale", description=__doc__)


def main(arguments: list[str] | None = None) -> None:
    """Runs one tool, under torchrun on every process; a failure ends with one line."""
    error, remedy = None, "the same command continues from here"
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except (BadInput, torch.OutOfMemoryError) as caught:
        error = caught
    except OSError as caught:
        error = BadInput(f"{caught.filename or 'a file'}: {one_line(caught)}; {remedy}")
    except KeyboardInterrupt:
        error = BadInput(f"interrupted: {remedy}")
    exit_process(error)


if __name__ == "__main__":
    main()
