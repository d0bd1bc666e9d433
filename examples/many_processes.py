"""Several processes share the tangents of a step: run it by `torchrun --nproc-per-node 2`."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from multitangent import ForwardGradient, Normal


def joined() -> DeviceMesh | None:
    """The mesh of all processes; ``None`` where torchrun has not started this one."""
    if not dist.is_torchelastic_launched():
        return None
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tangent",))


def main() -> None:
    mesh = joined()
    torch.manual_seed(0)  # the same weights and samples on every rank
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(16), mesh=mesh)
    for step in range(81):
        x = torch.randn(64, 20)
        optimizer.zero_grad()
        loss = gradient(x, x[:, :5].argmax(1))  # every rank gets the same .grad
        optimizer.step()
        if step % 20 == 0 and (mesh is None or mesh.get_rank() == 0):
            print(f"step {step:2d}  loss {loss:.6f}")
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
