"""Two small tasks that have everything a full-size task has and run on a laptop's CPU in seconds.

task.py      what the two tasks share: the Task protocol with small networks
modes.py     task `toy`: eight modes on a ring in the plane; a prompt names a mode
digits.py    task `digits`: scikit-learn's 8x8 images of digits; a prompt names a digit
nets.py      the velocity network and the reward network
pretrain.py  flow matching, a reward from pairwise choices, and their cache
pictures.py  the figures of a run
tour.ipynb   the paper's ideas in pictures, in fifteen minutes
tour.py      what the tour measures and draws
animation.py a run as an animation
summary.py   several runs that differ in their seed as one table
laboratory/  the paper's comparison and ablations, and each method's gradient compared with the true one
benchmark/   the cost of a training step compared with its lower bound
"""
