"""Every method on several gloo ranks, beside one process that reads the same micro-batches one after another.

In fp64, so that equality can be asked to 1e-10: in fp32 twenty steps of AdamW turn the order of a sum into 1e-4.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import sparsetrain
import sparsetrain.methods  # enters every method in the registry
from sparsetrain.core.config import registered_methods
from sparsetrain.surgery.method import method_of
from tests.families import FAMILIES

STEPS, HALF, ROWS, TOKENS = 20, 10, 2, 48
METHODS = [name for name, kind in registered_methods().items() if method_of(kind).edits]
Found = dict[str, Tensor]


def family_of(method: str) -> str:
    """What it is tried on: a bottleneck needs a classifier."""
    return "bert" if method == "concept_bottleneck" else "llama"


def passes(ranks: int) -> int:
    """Micro-batches of a step of a run on so many ranks, and of the one process beside it."""
    return max(4, ranks)


def rows_of(step: int, micro: int, family: str = "llama") -> dict[str, Tensor]:
    """A micro-batch. Ever fewer of its tokens are targets: a mean of means would weigh them wrongly."""
    batch = FAMILIES[family].batch(ROWS, TOKENS, seed=100 + 8 * step + micro)
    if family == "bert":
        return batch | {"labels": batch["input_ids"].sum(1) % 2}
    labels = batch["input_ids"].clone()
    labels[:, : 5 * (micro + 1)] = -100
    return batch | {"labels": labels}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, micro: int, family: str) -> None:
        self.micro, self.family = micro, family

    def __len__(self) -> int:
        return STEPS * self.micro * ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, place = divmod(index, self.micro * ROWS)
        micro, row = divmod(place, ROWS)
        return {name: tensor[row] for name, tensor in rows_of(step, micro, self.family).items()}


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def converted(method: str) -> tuple[Any, sparsetrain.Handle]:
    torch.manual_seed(0)
    case = FAMILIES[family_of(method)]
    model = case.model().double()
    given: dict[str, Any] = {"calibration": [case.batch(8, TOKENS, seed=5)], "seed": 0}
    handle = sparsetrain.sparsify(model, registered_methods()[method].example(), **given)
    if method == "concept_bottleneck":  # trains nothing of its encoder
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("concept_layers" in name)
    return model.double(), handle  # what a method adds is fp32, and FSDP2 takes one dtype


def by_trainer(method: str, ranks: int, micro: int, folder: str) -> Found:
    """transformers' Trainer, which puts DDP around the model where ranks run."""
    model, handle = converted(method)
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=micro // ranks,
        max_steps=STEPS,
        learning_rate=1e-3,
        weight_decay=0.1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    rows = Rows(micro, family_of(method))
    trainer = InOrder(model, arguments, train_dataset=rows, callbacks=[handle.callback(at_end=False)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return found_in(model, method) | {"losses in fp32": losses}


def by_hand(method: str, ranks: int, micro: int, shard: bool, folder: Path | None = None, begin: int = 0) -> Found:
    """A loop of one's own, with `fully_shard` around each block and the model.

    Args:
        micro: micro-batches of a step, which the ranks share.
        folder: of a distributed checkpoint: written in mid-run, or read at the beginning of what goes on from there.
        begin: the first step.
    """
    model, handle = converted(method)
    place, losses = (distributed.get_rank() if ranks > 1 else 0), []
    if shard:
        for block in handle.anatomy.blocks:
            fully_shard(model.get_submodule(block.name))
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    if begin:
        kept = parts(model, optimizer)
        checkpoint.load(kept, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])
    model.train()
    for step in range(begin, STEPS):
        if folder is not None and step == HALF and not begin:
            checkpoint.save(parts(model, optimizer), checkpoint_id=folder)
        handle.step(step, STEPS, ranks / micro)  # of a pass, as for what is meant over a step
        batches = [rows_of(step, part, family_of(method)) for part in range(micro)]
        whole: dict[str, Any] = {}
        if batches[0]["labels"].ndim > 1:
            targets = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches)
            whole = {"num_items_in_batch": torch.tensor(targets)}
        mine, loss = batches[place::ranks], torch.zeros((), dtype=torch.float64)
        for batch in mine:
            part = model(**batch, **whole).loss * (ranks if whole else ranks / micro)  # gradients are averaged
            part.backward()
            loss += part.detach() / ranks
        if ranks > 1:
            distributed.all_reduce(loss)
        losses.append(float(loss))
        handle.adjust_gradients()
        optimizer.step()
        handle.updated()
        optimizer.zero_grad()
    return found_in(model, method) | {"losses": torch.tensor(losses, dtype=torch.float64)}


def parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a distributed checkpoint holds: each rank's shards, or one process's whole tensors."""
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}


def found_in(model: nn.Module, method: str) -> Found:
    """The trained parameters in full, and the loss of rows that were not trained on. SaRA's values stand in weights,
    and shards of them keep their size where an adjustment shortens whole ones."""
    found = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
        if not name.endswith(".sara.weight.values")
    }
    with torch.no_grad():
        found["held-out loss"] = model.eval()(**rows_of(STEPS, 0, family_of(method))).loss
    return found


def work(rank: int, ranks: int, folder: str, methods: list[str], kind: str) -> None:
    """One of the ranks: train each method; the first one keeps what came out."""
    torch.set_num_threads(1)
    # what a launcher says, and accelerate reads
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.environ.update({"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"})
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    for method in methods:
        if kind == "ddp":
            found = by_trainer(method, ranks, passes(ranks), folder)
        else:
            found = by_hand(method, ranks, passes(ranks), True, Path(folder) / method)
        torch.save(found, Path(folder) / f"{method}.{rank}")
    distributed.barrier()
    distributed.destroy_process_group()
