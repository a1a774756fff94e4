"""The laboratory: experiments that check the paper's claims on the toys, and measure what only a toy can show.

`python -m toy.laboratory NAME` runs an experiment (`__main__.py`).  Each experiment is a file with a function run(lab):
compare, ablations, fidelity, pairs, leash, beyond, memory.  They share the Laboratory, which trains through the cache
of results.  The findings are in README.md, the committed tables and figures in results/.
"""
