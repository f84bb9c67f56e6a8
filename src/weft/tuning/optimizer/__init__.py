"""Optimizers: how to get there.

An optimizer is a function `(tensors, cfg) -> torch.optim.Optimizer` over the named parameters to train, registered as a
method of kind "optimizer". Its state may hold tensors, numbers, text, lists and maps of these: all that can be saved
without a pickle. The learning rates it sets are peaks; the schedule multiplies them. A config whose `lr` is none gets the
space's (`Space.lr`) before the optimizer is made, and the recipe has the number.
"""
