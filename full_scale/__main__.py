"""The tools around a run with FLUX.1-dev, SD3.5-M or FLUX.2-klein, in the order of their use.

    python -m full_scale shapes runs/shapes-model                    a small FLUX.1 that draws, to align on a laptop
    python -m full_scale tiny tiny                                   a tiny random model, for tests
    python -m full_scale embed --model M --prompts P --out E         for cards that cannot hold the text encoders
    python train_leap_align.py --task flux --model M --prompts P     the training itself
    python -m full_scale export --run RUN --out WEIGHTS --raw        weights of a checkpoint, averaged or not
    python -m full_scale sample --model M --transformer RUN/transformer --prompts P --out IMAGES
    python -m full_scale score --images IMAGES --out SCORES
    python -m full_scale check-reward my_rewards:factory             your own reward, before a run depends on it
    torchrun --nproc_per_node=8 -m full_scale sample ...             the same on 8 GPUs, and the same files

After an interruption the same command continues where it stopped.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a script's background job ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import pkgutil
import sys

import tyro

from runtime.exit import REPORTED, exit_process
from runtime.processes import StoppedBySignal, init_process_group, stop_on_signals

TOOLS = {
    "shapes": "full_scale.shapes.build:shapes",
    "tiny": "full_scale.tiny:tiny",
    "embed": "full_scale.prompts:embed",
    "export": "full_scale.export:export",
    "sample": "full_scale.sample:sample",
    "score": "full_scale.score:score",
    "shapes-sheet": "full_scale.shapes.sheet:shapes_sheet",
    "check-reward": "full_scale.check_reward:check_reward",
    "geneval-prompts": "full_scale.geneval_prompts:geneval_prompts",
    "plan": "full_scale.plan:plan",
    "benchmark": "full_scale.benchmark:benchmark",
}
"""Where each tool's function is; only the chosen one is imported."""


def run(arguments: list[str]) -> None:
    """Runs the tool that the first argument names; --help imports all tools and lists them."""
    names = arguments[:1] if arguments and arguments[0] in TOOLS else list(TOOLS)
    tools = {name: pkgutil.resolve_name(TOOLS[name]) for name in names}
    if names == ["plan"]:  # its flags are the trainer's
        return tools["plan"](arguments[1:])
    init_process_group("gloo")
    with stop_on_signals():
        tyro.extras.subcommand_cli_from_dict(tools, args=arguments, prog="python -m full_scale", description=__doc__)


def main(arguments: list[str] | None = None) -> None:
    """Runs one tool, under torchrun on every process; a failure ends with one line."""
    error = None
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except StoppedBySignal as caught:
        error = StoppedBySignal(caught.signal, is_saved=True)  # every file that a tool has written is whole
    except REPORTED as caught:
        error = caught
    memory = "free some, or lower the --batch-size of sample"
    exit_process(error, "the same command continues from here", memory)


if __name__ == "__main__":
    main()
