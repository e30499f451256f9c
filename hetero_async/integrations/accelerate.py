"""Accelerate: after `accelerator.prepare`, one line, and the loop stays as it is.

    session, batches = join(accelerator, model, optimizer, loader)

A step that `accumulate` or the gradient scaler leaves out is no step. Learning rates: `session.scheduler(optimizer,
share)`, in the place of a scheduler that counts the steps of one process.
"""

import functools
from typing import Any

import torch
from torch.utils.data import DataLoader

from hetero_async import session as sessions
from hetero_async.errors import UserError
from hetero_async.extras import extra
from hetero_async.integrations.leased import LeasedLoader
from hetero_async.session import Session

with extra("accelerate", "accelerate"):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, send_to_device


def join(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]
) -> tuple[Session, LeasedLoader]:
    """Join the run that this process was started for, with what `prepare` returned; the loader may be prepared or not.

    Batches come on the accelerator's device. Raises UserError for several processes or sharded parameters, beside what
    `hetero_async.join` raises.
    """
    if accelerator.num_processes > 1:
        raise UserError(
            f"this is one of {accelerator.num_processes} processes: each worker is one, started by `work`, without "
            "`accelerate launch`"
        )
    if accelerator.distributed_type != DistributedType.NO:
        raise UserError(f"{accelerator.distributed_type} keeps parameters in pieces: hetero_async needs them whole")
    session = sessions.join(accelerator.unwrap_model(model), optimizer)
    return session, LeasedLoader(loader, session, move=functools.partial(send_to_device, device=accelerator.device))
