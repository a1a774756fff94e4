"""The laboratory: experiments that check the paper's claims on the toys, and measure what only a toy can show.

`python -m toy.laboratory NAME` runs an experiment, a function of the Laboratory (`__main__.py` lists them).  It trains
through the cache of results.  The findings are in README.md, the committed tables and figures in results/.
"""
