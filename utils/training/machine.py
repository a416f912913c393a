"""What a run computes with, as it is at the moment: its models, how they are wrapped, its processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState
from trl.models.utils import disable_gradient_checkpointing

from ..data.places import Place, row_places
from ..distributed import agree, gather
from ..engine.proving import Trial, gives_all_gradients, let_head_score_in_chunks
from ..engine.switches import Switches, trained_already
from ..run.record import RunRecord
from .bad_batches import BadBatches
from .progress import Stopwatch


class Machine:
    """The parts of a trainer that its collaborators compute with, and what of the run they report to.

    A trainer wraps, shards and replaces its models while it begins to train, so they are asked for each time. Of the
    run there is a stand-in until it has its own: `record`, `stopwatch`, `place` (where a row that is trained on was
    read, by its `row`) and `bad_batches`.
    """

    bad_batches: BadBatches

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.record = RunRecord({})  # the run's own takes its place, and what it says so far
        self.stopwatch = Stopwatch()
        self.place: Place = row_places("row")
        self._switches: tuple[torch.nn.Module, Switches] | None = None  # and the model that they were found in
        self._has_trained = False  # a step, for which all of the model was put in training mode

    @property
    def args(self) -> Any:
        """The trainer's config."""
        return self._trainer.args

    @property
    def accelerator(self) -> Any:
        return self._trainer.accelerator

    @property
    def state(self) -> TrainerState:
        """How far training is."""
        return self._trainer.state

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._trainer.processing_class

    @property
    def policy(self) -> torch.nn.Module:
        return self._trainer.model

    @property
    def reference(self) -> torch.nn.Module | None:
        """A reference that is a model of its own."""
        return getattr(self._trainer, "ref_model", None)

    @property
    def called(self) -> torch.nn.Module:
        """The policy, as it is called where nothing is trained: where its weights are divided, inside what joins
        them."""
        return self._trainer.model_wrapped if self.is_sharded else self.policy

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are divided among the processes, which then compute in step."""
        return self.uses_fsdp or self.uses_deepspeed

    @property
    def uses_fsdp(self) -> bool:
        return self._trainer.is_fsdp_enabled

    @property
    def uses_deepspeed(self) -> bool:
        return self._trainer.is_deepspeed_enabled

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._trainer.optimizer

    @property
    def scheduler(self) -> Any:
        """That of the learning rate."""
        return self._trainer.lr_scheduler

    @property
    def switches(self) -> Switches:
        """Those of the model that is trained, inside whatever wraps it."""
        if self._switches is None or self._switches[0] is not self.policy:
            # What unwraps also walks through all modules.
            self._switches = self.policy, Switches(self.unwrapped())
        return self._switches[1]

    def unwrapped(self, model: torch.nn.Module | None = None) -> PreTrainedModel | PeftModel:
        """A model, by default the policy, inside whatever wraps it."""
        return self.accelerator.unwrap_model(self.policy if model is None else model)

    def models(self) -> list[torch.nn.Module]:
        """The policy, and a reference that is a model of its own."""
        models = [model for model in (self.policy, self.reference) if model is not None]
        return list(map(self.unwrapped, models)) if self.uses_deepspeed else models

    def let_go_of_reference(self) -> None:
        """Forgets a reference that is a model of its own."""
        models = self.accelerator._models
        models[:] = [model for model in models if model is not self.reference]
        self._trainer.ref_model = None

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch, where it is computed."""
        return self._trainer._prepare_inputs(batch)

    def trial(self) -> Trial:
        """How models are tried before they train."""
        step = 2.0**-8 if self.args.bf16 else 2.0**-11 if self.args.fp16 else None
        return Trial(self.accelerator.autocast, step)

    def agree(self, fault: str | None) -> str | None:
        """What the processes found, so that all go on in the same way."""
        if self.uses_fsdp:
            return gather(fault)[0]  # the others may hold no weights yet
        return agree(fault)

    def warn(self, text: str) -> None:
        """Says something once, and keeps it in the run's record; another process than the main one says it alone."""
        if self.args.process_index:
            print(f"warning: {text}", flush=True)
        else:
            self.record.warn(text, aloud=True)

    def choose_head(self, batch: Mapping[str, Any]) -> None:
        """Lets each model score completions in chunks, where a trial on this batch shows that nothing changes; and
        lets DDP not look in every step for weights without a gradient, where a trial finds none."""
        handler, args = self.accelerator.ddp_handler, self.args
        exchanges = args.world_size > 1 and not self.is_sharded
        if exchanges and args.ddp_find_unused_parameters is None and handler.find_unused_parameters:
            handler.find_unused_parameters = not gives_all_gradients(self.policy, batch, self.trial())
        for model in self.models():
            let_head_score_in_chunks(model, batch, self.trial())

    @contextlib.contextmanager
    def training(self, model: torch.nn.Module) -> Iterator[None]:
        """Around a micro-batch: from the second on the model is in training mode already, without a walk through all
        modules."""
        with trained_already(model, self.switches.model) if self._has_trained else contextlib.nullcontext():
            yield
        self._has_trained = True

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the context the model computes as it does after training; that time is none of training."""
        model = self.called
        was_training = model.training
        model.eval()
        try:
            with (
                self.stopwatch.paused("evaluation"),
                torch.no_grad(),
                self.accelerator.autocast(),
                disable_gradient_checkpointing(self.policy, self.args.gradient_checkpointing_kwargs),
            ):
                yield
        finally:
            model.train(was_training)
