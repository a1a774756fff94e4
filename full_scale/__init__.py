"""Everything around a run with a diffusers model.  `python -m full_scale` lists the tools.

task.py             what the image models share, as a task of the trainer; a class a model is in flux_adapter.py
models/             the table of models, one file each: classes, text encoding, published configs, a tiny pipeline
components.py       check and load one component of a pipeline
contents.py         digests of weights, prompts, images and rewards
pipeline.py         open a pipeline: its folder, its family, its components
transformer.py      build, shard, load and export the transformer, all of it or LoRA adapters
prompts.py          read prompts, embed them, find embeddings
export.py           the weights in a checkpoint as diffusers loads them
sheet.py            images with their prompts on a sheet
sample.py           images from a base or trained model
score.py            a reward of every image
check_reward.py     whether a reward keeps the contract
geneval_prompts.py  training prompts in GenEval's templates
shapes/             a small FLUX.1 that draws coloured shapes, its reward and an exact judge
tiny.py             tiny random pipelines and rewards, whose images are noise
plan.py             memory and time of a run, from its own code on tensors without values
simulation.py       what executes that code
benchmark.py        seconds and memory of a training step of a model's size on a GPU
rewards/            differentiable rewards behind one contract
"""
