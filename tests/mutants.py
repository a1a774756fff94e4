"""How strong are the tests?  Puts faults into the code, one line at a time, and says which of them a test notices.

    python -m tests.mutants [NAME ...]     every mutant, about 10 minutes on one core, or some; --list shows them

A *mutant* is the project with one deliberate bug: a sign, an index, a lost stop_gradient, a skipped fsync.  It is
*killed* if a test that passes without the change fails with it; if all pass, it *survives*: a person could make the
same mistake, and nothing would say so.  Coverage does not show this, because a line may run in a hundred tests that
never look at its result.  So write a mutant for what must not break and, if it survives, a test.  A change without any
effect is no mutant.  Mutants live in a temporary copy; the checkout itself is never touched.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = """tyro torch.distributed.fsdp torch.distributed.checkpoint matplotlib.figure sklearn.svm sklearn.ensemble
scipy.stats open_clip peft diffusers.pipelines.flux.pipeline_flux diffusers.pipelines.flux2.pipeline_flux2_klein"""
MUTANTS = r"""
leap_align.py: shift-inverted ~ return shift * u / (shift * u + (1 - u)) ~ return u / (u + shift * (1 - u)) ~ forward
leap-sign ~ return x - _over ~ return x + _over ~ forward
connect-rounds ~ stop_gradient(x) + (x_hat - stop_gradient(x_hat)) ~ x_hat + stop_gradient(x - x_hat) ~ forward
connect-to-real-state ~ return stop_gradient(x) + (x_hat ~ return x + (x_hat ~ forward
discount-inverted ~ + alpha * (x - stop ~ + (1 - alpha) * (x - stop ~ forward
alpha-on-skip-path ~ = leap(x_j, velocity(d ~ = leap(discount(x_j, alpha), velocity(d ~ gradient jacobian
second-leap-detached ~ leap(x_j, v, t, 0) ~ leap(x_t, v, t, 0) ~ gradient algorithm
step-keeps-graph ~ step(x_t, stop_gradient(v), t, ~ step(x_t, v, t, ~ methods with_gradient
hinge-sign ~ torch.relu(lam - reward) ~ torch.relu(reward - lam) ~ forward
clamp-of-sum ~ d_j.clamp(min=tau) + d_0.clamp(min=tau) ~ d_j + d_0).clamp(min=2 * tau ~ forward
weight-with-gradient ~ (stop_gradient(weight) * ~ (weight * ~ forward
objective-sum ~ hinge(reward, lam)).mean() ~ hinge(reward, lam)).sum() ~ forward
pair-of-one ~ b + (b >= a) ~ b + (b > a) ~ forward
pair-never-high ~ = uniform_integers(low, high, ~ = uniform_integers(low, high - 1, ~ forward
window-ignored ~ hyper.high)  # line 7 ~ None)  # line 7 ~ methods window
drtune-through-input ~ velocity(stop_gradient(x_t), times[i]) ~ velocity(x_t, times[i]) ~ gradient algorithm
noise-of-own-rows ~ B, rows = batch_of(x, generator) ~ B, rows = len(x), slice(None) ~ methods half_batches
wrong-rows ~ "rows", slice(None) ~ "", slice(len(x)) ~ methods half_batches
beyond.py: ab2-slope ~ v + r / 2 * (v - v_before) ~ v + r * (v - v_before) ~ beyond ab2
surrogate-gain ~ scale_gradient(v, gain) ~ scale_gradient(v, 1) ~ beyond formula
compensation ~ for i in active) - 1) ~ for i in active)) ~ beyond formula
simpson ~ + 4 * basis ~ + 2 * basis ~ beyond lagrange
early-draw ~ (i_a - f for f ~ (i_b + 1 + f for f ~ beyond draw
strata-overlap ~ n * T // K + 1, (n ~ max(n * T // K, 1), (n ~ beyond strata
runtime/backward.py: before-every-pass ~ before_last and not self.evaluations ~ before_last ~ backward ends_one
cut-loses-skip-path ~ [*ends, evaluation.x], [*gradients, dx] ~ [evaluation.x], [dx] ~ backward joint_one
leash-weight ~ weighted = w * length.abs() ~ weighted = length.abs() ~ backward formula
leash-order ~ self.leash_gradients.pop() ~ self.leash_gradients.pop(0) ~ backward formula
leash-of-microbatch ~ (difference.numel() * self.microbatches) ~ difference.numel() ~ backward parts
leash-through-state ~ v.backward(dv, retain ~ v.backward(dv + self.leash_gradients[-1], retain ~ backward formula
rows-of-rank-0 ~ microbatches), rank * ~ microbatches), 0 * ~ backward rows_of
runtime/optimizer.py: never-clipped ~ if max_norm < norm < math.inf ~ if norm < 0 ~ trainer norm
train_leap_align.py: schedule-not-resumed ~ in range(self.progress ~ in range(0 * self.progress ~ learning_rate bit
accumulated-sum ~ loss / self.config.gradient_accumulation_steps ~ loss ~ trainer whole_batch and refl
never-reduced ~ self.task.model, is_last ~ self.task.model, False ~ plan exchange
live-weights-evaluated ~ with self.ema.swapped(): ~ with torch.no_grad(): ~ trainer averaged
skip-not-counted ~ consecutive_skips += 1 ~ consecutive_skips += 0 ~ trainer skipped
seed-unused ~ manual_seed(config.seed) ~ manual_seed(0) ~ trainer seed
state-not-advanced ~ self.generator.set_state(generator.get_state()) ~ pass ~ trainer same_seed
gradient-not-cleared ~ self.optimizer.zero_grad() ~ pass ~ trainer not_finite
leash-without-weight ~ (x_0, gradient, weight, before ~ (x_0, gradient, torch.ones_like(weight), before ~ trainer leash
runtime/command_line.py: batch-of-ranks ~ % (world_size * config ~ % (1 * config ~ trainer all_ranks
train_leap_align.py: unfinished-draws ~ self.generator.clone_state() ~ self.generator ~ checkpoint next_call
unfinished-gradients ~ trainer.optimizer.zero_grad() ~ pass ~ checkpoint next_call
signal-waits-for-the-iteration ~ pre_hook(stop_request.check, ~ pre_hook(lambda *_: None, ~ checkpoint next_call
runtime/checkpoint.py: digest-not-checked ~ if digest(path / name) != ~ if "" == ~ checkpoint reported
shards-not-synced ~ fsync(file) ~ pass ~ checkpoint on_the_disk
live-weights-written ~ part.to("cpu", copy=True) ~ part ~ checkpoint bit
end-does-not-wait ~ RaisedOnAllRanks | StoppedBySignal): ~ ()): ~ checkpoint asynchronous
copy-does-not-fit ~ self.is_async and _fits_in_memory(files) ~ self.is_async ~ checkpoint memory_for
state-not-synced ~ fsync(temporary) ~ pass ~ checkpoint on_the_disk
name-not-synced ~ fsync(path, path.parent) ~ fsync(path) ~ checkpoint on_the_disk
shards-not-counted ~ values == size ~ True ~ disks damaged or shard
new-optimizer-counts-a-step ~ values["step"].zero_() ~ pass ~ checkpoint next_call
generator-not-restored ~ generator.set_state( ~ torch.tensor( ~ checkpoint uninterrupted
runtime/files.py: names-not-in-digest ~ f"{path.relative_to(folder)} {digest(path)}\n" ~ f"{digest(path)}\n" ~ runtime
runtime/run_dir.py: log-keeps-all-rows ~ (row["iteration"]) <= iteration] ~ (row["iteration"]) >= 0] ~ runtime
not-locked ~ FileLock(folder / LOCK, ~ FileLock(folder / f"{LOCK}.{os.getpid()}", ~ runtime
nonce-not-read ~ = probe.is_file() and probe.read_text() == nonce ~ = True ~ disks nodes
runtime/processes.py: sum-over-ranks ~ (values / world_size()) ~ values ~ trainer two_processes
ranks-not-compared ~ theirs.get(name, value) != value ~ False ~ processes settings
cublas-forgotten ~ out of memory|ALLOC_FAILED| ~ out of memory| ~ processes one_line
ignored-signal-handled ~ if signal.getsignal(number) != signal.SIG_IGN] ~ ] ~ checkpoint hangup
runtime/ema.py: ema-not-swapped-back ~ average.copy_(own) ~ average.copy_(parameter) ~ runtime
runtime/report.py: hacking-direction ~ if now[ ~ if direction > 0 and now[ ~ runtime
flux_adapter.py: flux-guidance ~ (len(condition),), self.options.guidance ~ (len(condition),), 1.0 ~ flux rollout
sd3-timestep ~ timestep = (1000 * t) ~ timestep = (999 * t) ~ flux rollout
klein-epsilon ~ (variance + vae.config.batch_norm_eps).sqrt() ~ variance.sqrt() ~ flux statistics
unpacked-sideways ~ = self.options.height, self.options.width ~ = self.options.width, self.options.height ~ flux rollout
vae-shift ~ x_0 / vae.scaling_factor + vae ~ x_0 / vae.scaling_factor - vae ~ flux rollout
full_scale/task.py: reward-not-clamped ~ (sample.clamp(0, 1), condition) ~ (sample, condition) ~ flux saturated
evaluator-is-the-reward ~ {name: model(images ~ {name: self.reward_model(images ~ full_scale_runs held_out
all-tokens ~ self.device, self.options.max_sequence_length) ~ self.device, 512) ~ flux short_text
one-evaluation-noise ~ x_T[i : i + 1] ~ x_T[:1] ~ full_scale_runs saturated
full_scale/transformer.py: lora-starts-changed ~ torch.zeros(p.shape) ~ torch.ones(p.shape) ~ flux only_the_adapters
memory-without-average ~ (5 * p.nbytes ~ (4 * p.nbytes ~ full_scale_errors too_little
full_scale/adapters.py: alpha-ignored ~ * (scale / lora_scale(model)) ~ * 1 ~ warm_start function
full_scale/pipeline.py: shift-of-pixels ~ height // 2 * (width // 2) ~ height * width ~ flux grid
full_scale/contents.py: prompts-in-any-order ~ join(prompts) ~ join(sorted(prompts)) ~ full_scale_errors embed
shapes-not-values ~ total.update(value.cpu() ~ (value.cpu() ~ damaged_files embedding
full_scale/sample.py: noise-of-image-number ~ i << 16 | number ~ number ~ full_scale geneval_samples
full_scale/score.py: pixels-of-256 ~ [None] / 255 ~ [None] / 256 ~ full_scale numbers_from
full_scale/plan.py: time-of-the-faster ~ {p: max( ~ {p: min( ~ plan time_is
full_scale/shapes/judge.py: any-number ~ len(scene) != len( ~ len(scene) < len( ~ shapes judge
any-side ~ is_on_side(placed[0], placed[1], caption.relation) ~ True ~ shapes judge
full_scale/shapes/scenes.py: left-is-right ~ "left of": (-1, 0) ~ "left of": (1, 0) ~ shapes by_hand
full_scale/shapes/build.py: trained-on-held-out ~ [held_out : held_out + ~ [0 : held_out + ~ shapes both_trained
full_scale/shapes/train.py: moments-not-restored ~ optimizer_of[p].state[p] = moments ~ pass ~ shapes interrupted
full_scale/rewards/registry.py: terms-swapped ~ self.terms, scores) ~ self.terms, scores[::-1]) ~ full_scale_runs held
full_scale/rewards/images.py: clip-std ~ 0.26862954, 0.26130258 ~ 0.26130258, 0.26862954 ~ reward_parity pickscore
first-pass-not-clipped ~ images.shape[2], width).clamp(0, 1) ~ images.shape[2], width) ~ reward_parity imagereward
toy/modes.py: utility-sign ~ return -4 * torch.cdist ~ return 4 * torch.cdist ~ toy utility_is and Modes
toy/digits.py: svm-saw-the-data ~ SVC().fit(self.unseen, unseen_truth) ~ SVC().fit(seen, truth) ~ toy disjoint
nearest-seen-image ~ cdist(flat, self.unseen) ~ cdist(flat, self.data.flatten(1)) ~ toy disjoint
toy/task.py: captions-right ~ wrong, other_class % ~ wrong, self.truth % ~ toy half_of_its
evaluation-noise ~ torch.Generator().manual_seed(EVALUATION_SEED)) ~ self.generator) ~ toy repeatable and Modes
toy/pretrain.py: cache-key-without-code ~ inspect.getsource(source) ~ "" ~ toy cache_is_read and Modes
runtime/task.py: held-out-not-checked ~ ["reward", *task.held_out] ~ ["reward"] ~ user_code something_else
runtime/cost_counter.py: all-reduce-once ~ times = 2 if ~ times = 1 if ~ plan nodes
full_scale/rewards/contract.py: random-scores ~ yield torch.equal(first, second) ~ yield True ~ rewards violation
full_scale/prompts.py: embedding-unchecked ~ content == tensors_content(embedding) ~ True ~ damaged_files anew
toy/summary.py: error-of-population ~ ddof=1 ~ ddof=0 ~ toy summary or numbers
toy/laboratory/tables.py: one-sided ~ (1 + CONFIDENCE) / 2 ~ CONFIDENCE ~ laboratory directions_against
toy/laboratory/laboratory.py: tuned-on-table-seeds ~ scale.tuning_seeds) ~ scale.seeds) ~ laboratory learning_rates
toy/laboratory/gradients.py: cosine ~ (gradient, self.true, ~ (self.sum, self.true, ~ laboratory_measurements moments
toy/laboratory/beyond.py: jackknife ~ (n - 1) / n * sum ~ 1 / n * sum ~ laboratory_beyond cost_to
"""
"""[file:] name ~ old text, which occurs once in the file ~ new text ~ tests.  A row without a file has that of
the row before it.  `forward` is tests/test_forward.py, `trainer seed or
norm` are the tests of tests/test_trainer.py that `pytest -k "seed or norm"` chooses."""


def read_mutants() -> dict[str, tuple[str, str, str, str]]:
    """(file, old, new, tests) by name; every mutant must change exactly one place."""
    mutants, file = {}, ""
    for row in MUTANTS.strip().splitlines():
        head, old, new, tests = row.split(" ~ ")
        file, name = head.split(": ") if ": " in head else (file, head)
        if (count := (ROOT / file).read_text().count(old)) != 1 or old == new or name in mutants:
            sys.exit(f"{name}: {old!r} occurs {count} times in {file}, not once; or the row repeats something")
        mutants[name] = file, old, new, tests
    return mutants


def run_pytest(copy: Path, room: str, expression: str) -> None:
    """Runs tests in the copy, up to the first failure, and ends this process with pytest's status."""
    os.chdir(copy)
    sys.path[0] = str(copy)
    del sys.modules["tests"]
    os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    sys.exit(pytest.main([*options, f"tests/test_{room}.py", "-k", expression]))


def run(copy: Path, tests: str) -> tuple[int | None, str]:
    """The status of some tests, None if they hang, and which failed; forked, so that libraries are imported once."""
    process = get_context("fork").Process(target=run_pytest, args=(copy, *tests.partition(" ")[::2]))
    (copy / "output.txt").write_text("")
    process.start()
    process.join(timeout=900)
    process.kill()
    output = (copy / "output.txt").read_text()
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", output, re.MULTILINE)
    return process.exitcode, failed[1] if failed else ""


@cache
def check_tests(copy: Path, tests: str) -> None:
    """Refuses tests that do not exist, or fail without a mutant: they would show nothing."""
    if (outcome := run(copy, tests))[0] != 0:
        sys.exit(f"without a mutant the tests {tests!r} end with {outcome}")


def verdict(copy: Path, file: str, old: str, new: str, tests: str) -> str:
    """What the tests say about a mutant.  Only status 1 kills: others mean that no test has come to its end."""
    check_tests(copy, tests)
    text = (copy / file).read_text()
    (copy / file).write_text(text.replace(old, new))
    status, failed = run(copy, tests)
    (copy / file).write_text(text)
    if status == 1 and failed:
        return f"killed by {failed}"
    return "SURVIVED" if status == 0 else f"NO VERDICT, status {status}"


def main(names: list[str]) -> None:
    """Prints a row for each mutant as soon as it is known; the exit status is 1 if one was not killed."""
    mutants, start, others = read_mutants(), time.monotonic(), []
    if names == ["--list"]:
        print(*(f"{name:26}{' ~ '.join(mutant)}" for name, mutant in mutants.items()), sep="\n")
        return
    # With bytecode, a file that changes twice in a second would still be what it was after the first change.
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"], os.environ["OMP_NUM_THREADS"] = True, "1", "1"
    for library in LIBRARIES.split():
        with suppress(ImportError):
            import_module(library)
    with tempfile.TemporaryDirectory() as folder:
        copy, names = Path(folder) / "project", names or list(mutants)
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs"))
        for number, name in enumerate(names, 1):
            outcome = verdict(copy, *mutants[name])
            others += [] if outcome.startswith("killed") else [name]
            print(f"{number:3}/{len(names)} {name:26}{mutants[name][0]:32}{outcome}", flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{len(names) - len(others)} of {len(names)} killed in {minutes:.0f} min; not: {', '.join(others) or 'none'}")
    sys.exit(bool(others))


if __name__ == "__main__":
    main(sys.argv[1:])
