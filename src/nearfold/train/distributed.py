"""The processes that train one model together: one alone, or those that torchrun started."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nearfold.options import brief


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

        A model that :meth:`shard` has divided does so itself. Of any other, every parameter that asks for a gradient
        must take part in every step.
        """
        if self.world == 1 or sharded(model):
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=False)

    def shard(self, model: nn.Module) -> nn.Module:
        """Divide every parameter of a model among the processes (FSDP2), in place, and return the model.

        A block's parameters are put together while it computes, so that its operators see plain tensors. The blocks
        are the members of the outermost ``nn.Sequential`` and ``nn.ModuleList`` of the model; what is in none of them
        is one block more. A member of an ``nn.ModuleList`` must be called as a module.

        Raises:
            ValueError: A parameter is a scalar, which cannot be divided.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for name, weight in model.named_parameters():
            if weight.ndim == 0:
                raise ValueError(
                    f"parallel='fsdp' cannot divide the scalar parameter {name!r}: make it a tensor of one number, "
                    "or use parallel='ddp'"
                )
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in (*_blocks(model), model):
            block.register_forward_hook(_no_view)
            fully_shard(block, mesh=mesh)
        return model

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's tensors, which are not divided, in place."""
        if self.world > 1:
            for tensor in tensors:
                moved = tensor.detach().to(self.device)  # NCCL sends from the device only
                dist.broadcast(moved, src=0)
                tensor.detach().copy_(moved)

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value`, in the order of the ranks; anything that can be pickled."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def any(self, value: bool) -> bool:
        """Return whether `value` holds on any process."""
        return bool(self.sum(torch.tensor(int(value), device=self.device)).item())

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()


def sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are divided among the processes."""
    return any(hasattr(weight, "full_tensor") for weight in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole, wherever its parts are; where it is divided, every process must call this."""
    parts: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return parts() if parts else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor: all of it, where it is not divided."""
    part: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return part() if part else tensor


def averaging(net: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Return the context of a forward and backward pass after which gradients are averaged, or only added up.

    Args:
        net: What :meth:`Team.wrap` returned.
        now: Average over the processes; False: wait for a later pass of the same step.
    """
    if isinstance(net, DistributedDataParallel):
        return nullcontext() if now else net.no_sync()
    if sharded(net):
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(net, FSDPModule)
        net.set_requires_gradient_sync(now)
    return nullcontext()


def _no_view(block: nn.Module, inputs: Any, output: Any) -> Any:
    """Copy a block's output where it is a view: FSDP2's hook on a view is lost when it is changed in place."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model whose parameters are put together at one time."""
    for child in model.children():
        if isinstance(model, (nn.Sequential, nn.ModuleList)) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from _blocks(child)


@functools.cache
def _end_with_launcher() -> None:
    """End this process when torchrun has died, killed perhaps: who starts the run anew must find its folder free.

    A thread looks, since the process may be waiting, for an hour if need be, for others that have ended.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        print("torchrun has ended, and this process with it; the run can be started anew", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def join(device: str) -> Team:
    """Find this process's place, and join the others where torchrun started several.

    The environment variables that torchrun sets are read (WORLD_SIZE, RANK, LOCAL_RANK, ...). The
    process group, gloo for the CPU and nccl for CUDA, stays up until the process ends.

    Args:
        device: As in ``Recipe.device``.

    Raises:
        ValueError: The device is not there.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    several = dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")) if several else None)
    if not several:
        return Team(0, 1, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        from torch.distributed.rendezvous import rendezvous

        # torchrun's store is up before its processes: where it is not found soon, torchrun has died meanwhile
        is_up = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        wait = timedelta(seconds=60 if is_up else _JOIN_SECONDS)
        store, rank, world = next(rendezvous("env://", timeout=wait))
        store.set_timeout(timedelta(seconds=_JOIN_SECONDS))
        own = dist.PrefixStore(_agree_on_start(store, rank, world), store)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=world)
        atexit.register(_leave)
    return Team(dist.get_rank(), dist.get_world_size(), chosen)


_JOIN_SECONDS = 600.0


def _leave() -> None:
    """End the process group, and let its threads put down what they hold.

    FSDP2 and modules that torch imports late keep a reference to the group, so that its threads are not joined here.
    A thread that has finished the last collective still drops Python objects; where it gets the interpreter's lock only
    after the interpreter has begun to end, it aborts the process. A pause hands it the lock before.
    """
    dist.destroy_process_group()
    time.sleep(0.2)


def _agree_on_start(store: dist.Store, rank: int, world: int) -> str:
    """Return a name on which exactly the processes of this start of torchrun agree.

    torchrun keeps its store when it starts processes anew, and in it the addresses of the dead ones, to which the new
    ones would try to connect; its count of restarts does not tell the starts apart, as every machine counts its own.
    So every process leaves a mark of its own, the first one proposes the marks that it finds, and proposes again while
    one changes; a process agrees to nothing but a proposal that has its own mark.
    """
    mark = uuid.uuid4().hex
    store.set(f"nearfold/mark/{rank}", mark)
    give_up = time.monotonic() + _JOIN_SECONDS
    while time.monotonic() < give_up:
        if rank == 0:
            marks = [store.get(f"nearfold/mark/{other}").decode() for other in range(world)]
            store.set("nearfold/proposal", ",".join(marks))
        elif store.check(["nearfold/proposal"]):
            marks = store.get("nearfold/proposal").decode().split(",")
        else:
            marks = []
        name = hashlib.blake2b(",".join(marks).encode(), digest_size=8).hexdigest()
        if rank == 0 and all(store.check([f"nearfold/{name}/{other}"]) for other in range(1, world)):
            store.set(f"nearfold/{name}/0", "")
            return name
        if rank > 0 and marks[rank : rank + 1] == [mark]:
            store.set(f"nearfold/{name}/{rank}", "")
            if store.check([f"nearfold/{name}/0"]):
                return name
        time.sleep(0.02)
    raise RuntimeError(f"the {world} processes of this run have not found each other in {_JOIN_SECONDS:.0f} s")


def _device(wanted: str, local_rank: int | None) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"Recipe.device must be 'auto' or a torch device such as 'cpu' or 'cuda', got {brief(wanted)}"
        ) from None
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
