"""Two small tasks with everything that a full-size task has, in seconds on a laptop's CPU.

task.py      what the two tasks share: small networks, pre-training, evaluation
modes.py     task `toy`: eight modes on a ring in the plane; a prompt names a mode
digits.py    task `digits`: scikit-learn's 8x8 images of digits; a prompt names a digit
nets.py      the velocity network and the reward network
pretrain.py  flow matching, a reward from pairwise choices, and their cache
pictures.py  the figures of a run
animation.py a run as an animation
summary.py   several runs that differ in their seed as one table
tour.ipynb   the paper's ideas in pictures; tour.py measures and draws them
laboratory/  the experiments: the paper's, later methods, each method's gradient, the cost of an iteration
"""
