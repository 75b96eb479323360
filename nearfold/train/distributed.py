"""The processes that train one model together: one alone, or those that torchrun started."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Team:
    """This process's place among those that train together.

    Attributes:
        rank: Number of this process, from 0; only number 0 writes and prints.
        world: Number of processes.
        device: This process's device.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module to call in training: gradients are averaged over the processes.

        Every parameter that asks for a gradient must take part in every step.
        """
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=False)

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers, such as the statistics of batch normalisation."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()


def join(device: str) -> Team:
    """Find this process's place, and join the others where torchrun started several.

    The environment variables that torchrun sets are read (WORLD_SIZE, RANK, LOCAL_RANK, ...). The
    process group, gloo on the CPU and nccl on CUDA, stays up until the process ends.

    Args:
        device: As in ``Recipe.device``.

    Raises:
        ValueError: The device is not there.
    """
    several = dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")) if several else None)
    if not several:
        return Team(0, 1, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Team(dist.get_rank(), dist.get_world_size(), chosen)


def _device(wanted: str, local_rank: int | None) -> torch.device:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if local_rank is not None:
            if device.index is not None:
                raise ValueError(
                    f"Recipe.device={wanted!r} names one device for several processes: use 'cuda' or 'auto'"
                )
            device = torch.device("cuda", local_rank)
        elif device.index is None:
            device = torch.device("cuda", torch.cuda.current_device() if count else 0)
        if (device.index or 0) >= count:
            raise ValueError(
                f"Recipe.device={wanted!r} needs {device}, but torch sees {count} CUDA devices: use 'cpu', "
                "'auto', or fewer processes"
            )
    try:
        torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"Recipe.device={wanted!r} cannot be used here ({str(error).splitlines()[0]}): use 'auto' or 'cpu'"
        ) from error
    return device
