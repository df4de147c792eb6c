"""Agreement: processes that must run a model together compute where one of them has to.

Under FSDP, say, with another picture on each rank, a rank that skips while another computes would
leave that one waiting. Plans alone agree; what is read of latents may not.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def computed_by_one(group: dist.ProcessGroup, computes: bool, device: torch.device) -> bool:
    """Whether a rank of the group computes its evaluation: one exchange, which is waited for.

    Args:
        group: all of whose ranks ask.
        computes: what this one has decided.
        device: of the tensor that is exchanged.
    """
    asked = torch.tensor(float(computes), device="cpu").to(device)
    dist.all_reduce(asked, dist.ReduceOp.MAX, group)
    return bool(asked.item())
