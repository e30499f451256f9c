"""hetero-async work --run RUN.toml --site SITE -- torchrun --standalone --nproc-per-node 2 examples/torchrun_gpt.py

Trains byte_gpt.py's model with a worker that is a torchrun group: under DistributedDataParallel, or with --shard by
fully_shard (FSDP2). Beside byte_gpt.py's, every rank does the same: it joins, takes its part of each batch, and
evaluates at the same step as the others, because a sharded model computes on all ranks or on none.
"""

import argparse
import os

import torch
from byte_gpt import LEARNING_RATE, Text, loss_of, seeded_model, share_of_learning_rate, validation_loss
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hetero_async as ha


def wrapped(device: torch.device, is_sharded: bool) -> nn.Module:
    model = seeded_model().to(device)
    if not is_sharded:
        return DistributedDataParallel(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def train(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.get_device_module(device.type).set_device(device.index)
    model = wrapped(device, options.shard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    session = ha.join(model, optimizer)
    session.scheduler(optimizer, share_of_learning_rate)
    for step, batch in enumerate(session.batches(Text(validation=False), options.batch_size), 1):
        loss_of(model, batch.to(device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if options.evaluate_every and step % options.evaluate_every == 0:
            session.record("validation_loss", validation_loss(model))  # rank 0's word counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true", help="the parameters over the ranks, instead of a copy on each")
    parser.add_argument("--device", default="cpu", help="any kind of torch device (default: cpu)")
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank (default: 16)")
    parser.add_argument("--evaluate-every", type=int, default=0, metavar="STEPS", help="record validation_loss")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.distributed.init_process_group()  # gloo for CPUs, NCCL for GPUs
    train(options)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
