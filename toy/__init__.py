"""Two small tasks with everything a large one has, on a laptop's processor in seconds.

task.py      what the two tasks share: the Task protocol with small networks
modes.py     task `toy`: eight modes on a ring in the plane; a prompt names a mode
digits.py    task `digits`: scikit-learn's 8x8 images of digits; a prompt names a digit
nets.py      the velocity network and the reward network
pretrain.py  flow matching, a reward from pairwise choices, and their cache
pictures.py  the figures of a run
summary.py   several runs that differ in their seed as one table
laboratory/  the paper's comparison and ablations, and each method's gradient beside the true one
benchmark/   what a step costs, beside what it must cost
"""
