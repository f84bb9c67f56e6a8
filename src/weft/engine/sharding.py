"""A frozen model in parts over several processes: each holds its share of every weight, and layers are put together when they run (FSDP2).

What is trained stays whole on every process, so that spaces, optimizers, hooks and states need to know nothing of it: it is small, the
frozen weights are what memory is needed for. Every process first loads the model, and gives back what is not its share.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from ..errors import UsageError


def shard(model: nn.Module, trained: Collection[nn.Parameter], device: torch.device) -> None:
    """Shard all floating-point parameters but those that are trained over the processes there are, layer by layer. It cannot be undone.

    UsageError where everything is trained, so that nothing would be left to share out.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    whole = set(trained)
    if all(parameter in whole for parameter in model.parameters()):
        raise UsageError("every weight is trained, so there is nothing to share out", hint="-p shard=false")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in [*(each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)), model]:
        fully_shard(module, mesh=mesh, ignored_params=whole)
