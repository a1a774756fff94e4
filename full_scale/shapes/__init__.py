"""A small FLUX.1 that draws coloured shapes: scenes and captions, an exact judge, how pipeline and reward are made."""
