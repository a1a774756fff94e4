"""A training run's machinery.  It knows no equation and no model.

task.py        what the trainer asks of a task
processes.py   process group and ranks, signals, exit
run_dir.py     a run's folder: atomic writes, settings, CSV
checkpoint.py  save, verify, load
ema.py         the averaged weights
report.py      curves, result.json, signs of reward hacking
counters.py    floating-point operations, and bytes saved for backward
"""
