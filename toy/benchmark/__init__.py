"""The cost of a training step compared with its lower bound: operations, memory, time; and the time of the main job.

operations.py  floating-point operations of each method over the floor
memory.py      bytes saved for backward against T
step_time.py   the trainer's step against a bare step, and the shares of its phases
main_job.py    the phases of `python train_leap_align.py`
bare_step.py   the bare step: a step's model calls in a loop, and nothing else
tasks.py       the tasks that are measured, each with a trainer as the command line starts it
stopwatch.py   seconds of named phases
plot.py        the figure
results/       the committed tables and figure, explained in README.md

The floor.  A LeapAlign step needs T evaluations of the velocity network and two backward passes: the one at k to the
weights alone, because x_k is a constant, the one at j to the weights and to the input x_j.  With F operations of a
forward, B and B+x of the two backward passes, the floor is T F + B + B+x.  That is about (T + 4) F, because a backward
is two forwards minus the gradient to the first layer's input.  It is counted on single calls of the network, without
a method and without gradient checkpointing.
"""
