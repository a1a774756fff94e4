"""The laboratory: small tasks with everything a large one has, on a laptop's processor in seconds.

modes.py    task `toy`: eight modes on a ring in the plane, a prompt names a mode
digits.py   task `digits`: scikit-learn's 8x8 images of digits, a prompt names a digit
task.py     what the two share: the task interface of train_leap_align.py, met with small networks
nets.py     the velocity and the reward network
learn.py    pre-training: flow matching, a reward from pairwise choices, and their cache
pictures.py every figure that a toy run draws
summary.py  several runs that differ in their seed, as one table
variants.py changes to LeapAlign that only the laboratory needs
"""
