"""Experiments that check the paper's claims on the toys, and measure what only a toy can show: see README.md."""
