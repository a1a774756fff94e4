"""The laboratory: small tasks with everything a large one has, on a laptop's processor in seconds.

modes.py    task `toy`: eight modes on a ring in the plane, a prompt names a mode
digits.py   task `digits`: scikit-learn's 8x8 images of digits, a prompt names a digit
task.py     what the two share: the task interface of train_leap_align.py, met with small networks
nets.py     the velocity and the reward network
learn.py    pre-training: flow matching, a reward from pairwise choices, and their cache
pictures.py every figure that a toy run draws
summary.py  several runs that differ in their seed, as one table

What a step costs, `python -m toy.benchmark`:

benchmark.py   operations, bytes and time, beside what they must be
full_size.py   the same step with FLUX.1-dev's architecture, where a GPU is found
cost_chart.py  its figure

The experiments, `python -m toy.experiments`:

experiments.py  what is compared with what, and what is published of it
laboratory.py   what they share: how much is computed, learning rates, tables
cells.py        results that are computed once and kept, on several processes
trial.py        a training run as a cell
probe.py        what a method draws, costs and weighs, read off the method itself
fidelity.py     each method's gradient beside the true one
variants.py     LeapAlign but for one thing: the ablations
report.py       means with errors, the paper's directions, tables
charts.py       their figures
"""
