"""A plan: what the run that was asked for needs, which other ways of training fit, and which of them is best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ..errors import UserError
from ..models.quantization import Stored
from ..runtime import choose_precision, find_device
from ..settings.training import Settings
from ..settings.verbs import PlanSettings
from ..training.batches import fill_batches
from ..training.reference import KEPT_BYTES
from .estimate import Division, Estimate, estimate, pad_pairs
from .hardware import GIB, Device, describe_this_machine, find_device_by_name
from .launching import words_before_script
from .measuring import Measured
from .padded import PartLengths
from .paper_model import Way
from .work import Subject, Work, pairs_per_step, place_of_reference

FEWEST_TOKENS = 2048  # of a micro-batch that keeps a GPU busy: below, larger batches with checkpointing are better
FORWARD_FLOPS = 2  # per parameter and token


@dataclass(frozen=True)
class Choice:
    """A way of training with the settings that it differs in, and what it needs. `seconds` None: unknown work."""

    asked: bool
    batch: int  # --per_device_train_batch_size; a limit of tokens makes smaller micro-batches of it
    needs: Estimate
    sharding: str
    seconds: float | None

    @property
    def name(self) -> str:
        """For people."""
        way = self.needs.way
        kind = "full" if not way.use_lora else "LoRA on 4 bits" if way.in_4bit else "LoRA"
        return kind + (", checkpointing" if way.checkpointing else "")


@dataclass(frozen=True)
class Plan:
    """Everything that was found out."""

    model: str
    device: Device
    work: Work
    steps: int | None
    dtype: torch.dtype
    efficiency: float  # share of the device's rate, assumed or measured
    measured: bool
    asked: Choice
    others: list[Choice]
    best: Choice | None
    run: Settings  # as asked
    settings: Settings | None  # of a run in the best way
    launcher: list[str]  # the words before the script's name


def make_plan(
    settings: Settings, device: Device, dtype: torch.dtype, subject: Subject, measured: Measured | None = None
) -> Plan:
    """The plan of the run that `settings`, of the verb train or sft, would start.

    Args:
        dtype: that matrix products are computed in.
        measured: what its steps on the longest pairs took here; corrects memory and time of all ways.

    Raises:
        UserError: a step of the model cannot be planned on paper.
    """
    source, work = subject.source, subject.work
    way = _asked_way(settings, subject, dtype, device)
    base = device.reserved + (0 if device.is_gpu else psutil.Process().memory_info().rss)
    planner = _Planner(settings, device, work, base, source.stored())
    if measured is not None:
        planner.correct(way, measured)
    asked = planner.choose(way, settings.training.per_device_train_batch_size, asked=True)
    others = list(planner.others(asked))
    fitting = [choice for choice in (asked, *others) if choice.needs.fits(device)]
    if way.use_lora:  # whoever asks for an adapter is not told to train all weights
        fitting = [choice for choice in fitting if choice.needs.way.use_lora]
    best = min(fitting, key=lambda choice: _order(choice, asked), default=None)
    return Plan(
        model=source.name,
        device=device,
        work=work,
        steps=planner.steps,
        dtype=dtype,
        efficiency=planner.efficiency,
        measured=measured is not None,
        asked=asked,
        others=others,
        best=best,
        run=settings,
        settings=_settings_of(settings, best, asked) if best else None,
        launcher=words_before_script(settings.of(PlanSettings), best.sharding, best.needs.way.in_4bit) if best else [],
    )


def choose_device(settings: Settings) -> tuple[Device, torch.dtype]:
    """The device that is planned for, and the format that matrix products are computed in there.

    Raises:
        UserError: it is not known, or does not compute in the format that was asked for.
    """
    plan = settings.of(PlanSettings)
    if plan.gpu is None and plan.gpu_memory is None:
        dtype = choose_precision(settings.model.dtype, find_device()).dtype
        device = describe_this_machine(dtype)
        offloading = {
            "offload": plan.offload,
            "activation_offloading": settings.trainer_fields.get("activation_offloading"),
        }
        given = [f"--{name}" for name, value in offloading.items() if value]
        if given and not device.is_gpu:
            why = "moves from a GPU to CPU memory; there is no GPU here, plan for one with --gpu"
            raise UserError(*(f"{name}: {why}" for name in given))
        return device, dtype
    if plan.gpu is not None:
        device = find_device_by_name(plan.gpu)
    else:
        device = Device("the given device", round(plan.gpu_memory * GIB), plan.gpu_tflops * 1e12)
    usual = "bfloat16" if device.has_bfloat16 else "float16"
    return device, getattr(torch, usual if settings.model.dtype == "auto" else settings.model.dtype)


def _asked_way(settings: Settings, subject: Subject, dtype: torch.dtype, device: Device) -> Way:
    source, stored = subject.source, subject.source.stored()
    adapts = settings.lora.use_lora or source.adapter is not None
    lora = settings.lora
    if source.adapter is not None:
        own = source.adapter_config()
        targets = own.get("target_modules") or ["all-linear"]
        targets = tuple(sorted(targets)) if isinstance(targets, list) else (targets,)
        lora = dataclasses.replace(lora, use_lora=True, lora_r=own.get("r", lora.lora_r), lora_target_modules=targets)
    wish = settings.training.gradient_checkpointing
    return Way(
        config=subject.config,
        dtype=dtype,
        use_lora=adapts,
        in_4bit=settings.model.use_4bit or (stored is not None and stored.in_4bit),
        lora=lora,
        checkpointing=device.is_gpu if wish is None else wish,
        reference=place_of_reference(settings, adapts, subject.work),
        reference_config=subject.reference_config,
        optim=str(settings.trainer_fields.get("optim") or "adamw_torch_fused"),
        on_gpu=device.is_gpu,
        offloads_activations=device.is_gpu and bool(settings.trainer_fields.get("activation_offloading")),
        whole_last_layer=settings.training.engine == "padded",
    )


class _Planner:
    """Estimates ways of training for one run on one kind of device."""

    def __init__(self, settings: Settings, device: Device, work: Work, base: int, stored: Stored | None = None) -> None:
        self.stored = stored
        self.settings, self.device, self.work, self.base = settings, device, work, base
        training = settings.training
        self.efficiency = settings.of(PlanSettings).efficiency
        self.pairs_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
        passes = -(-len(work.lengths) * training.num_train_epochs // pairs_per_step(settings))
        steps = training.max_steps if training.max_steps > 0 else int(passes)
        self.steps = steps if work.known else None

    def correct(self, way: Way, measured: Measured) -> None:
        """Puts what was measured of this way in the place of what was assumed of the device."""
        pairs, micro_batches = self._micro_batch(self.settings.training.per_device_train_batch_size)
        needs = estimate(way, pairs, micro_batches, self.base, kept=self._kept(way))
        beside = self.device.reserved if self.device.is_gpu else 0  # a GPU's context is not among its tensors
        self.base = max(0, measured.peak + beside - (needs.peak - needs.base))
        step = dataclasses.replace(self.work, lengths=self.work.longest(self.pairs_per_step))
        flops = needs.flops / needs.tokens * step.mean_computed(needs.batch) * self.pairs_per_step
        self.efficiency = flops / measured.step_seconds / self.device.rate

    def _kept(self, way: Way) -> int:
        """Bytes of a reference that was scored ahead: its output head, and its hidden states of held-out pairs. They
        are offloaded to CPU memory; of a policy that is its own reference, the head is there anyway."""
        if way.reference != "ahead" or self.device.is_gpu or not self.work.held_out_tokens:
            return 0
        text, width = (way.reference_config or way.config).get_text_config(), torch.finfo(way.dtype).bits // 8
        states = min(KEPT_BYTES, self.work.held_out_tokens * text.hidden_size * width)
        return states + (0 if way.use_lora and not way.reference_config else text.vocab_size * text.hidden_size * width)

    def choose(self, way: Way, batch: int, asked: bool = False) -> Choice:
        """The way with micro-batches of so many pairs, divided among the devices as asked, or as little as fits."""
        plan = self.settings.of(PlanSettings)
        wish, devices = plan.sharding, plan.num_devices
        pairs, micro_batches = self._micro_batch(batch)
        offload = plan.offload
        if offload is not None:
            shardings = ["zero2"] if offload == "optimizer" else ["fsdp2" if devices > 1 else "zero3"]
        else:
            shardings = ["none", "fsdp2"] if devices > 1 else ["none"]
        for sharding in [wish] if wish else shardings:
            division = Division(sharding, devices, offload)
            needs = estimate(way, pairs, micro_batches, self.base, division, self._kept(way))
            if needs.fits(self.device):
                break
        return Choice(asked, batch, needs, sharding, self._seconds(needs))

    def _micro_batch(self, batch: int) -> tuple[list[PartLengths], int]:
        """The largest micro-batch when so many of the longest pairs meet, and how many a step has of its kind.

        Raises:
            UserError: a pair alone is over --max_tokens_per_batch.
        """
        limit, padded = self.settings.training.max_tokens_per_batch, self.settings.training.engine == "padded"
        pairs = pad_pairs(self.work.longest(batch)) if padded else self.work.longest(batch)
        count = self.pairs_per_step // batch
        if limit is None:
            return pairs, count
        sizes = [sum(pair) for pair in pairs]
        if sizes[0] > limit:
            raise UserError(
                f"--max_tokens_per_batch is {limit}, but the longest pair alone takes {sizes[0]} tokens "
                f"({'two padded rows' if padded else 'prompt, chosen and rejected'}): raise it to {sizes[0]}, or "
                "lower --max_length"
            )
        groups = fill_batches(sizes, limit, padded=padded)
        largest = max(groups, key=lambda group: sum(sizes[index] for index in group))
        return [pairs[index] for index in largest], count * len(groups)

    def others(self, first: Choice) -> Iterator[Choice]:
        """Other kinds of training, with and without checkpointing, each with the largest micro-batch that fits."""
        asked, batch = first.needs.way, first.batch
        kinds: tuple[tuple[bool, bool], ...] = ((False, False), (True, False), (True, True))
        if self.stored is not None:  # neither trained as a whole nor held in other bits than those of the files
            kinds = ((True, self.stored.in_4bit),)
        for use_lora, in_4bit in kinds:
            in_4bit |= asked.in_4bit and not (use_lora or asked.use_lora)  # 4 bits are then the reference's
            reference = place_of_reference(self.settings, use_lora, self.work)
            for checkpointing in (False, True):
                way = dataclasses.replace(
                    asked, use_lora=use_lora, in_4bit=in_4bit, checkpointing=checkpointing, reference=reference
                )
                if way != asked:
                    yield self._largest(way, batch)
                elif not first.needs.fits(self.device) and batch > 1:
                    yield self._largest(way, self._smaller(batch))

    def _largest(self, way: Way, batch: int) -> Choice:
        """With the largest micro-batch that fits, of the given one and its halves; else with one pair."""
        choice = self.choose(way, batch)
        if choice.needs.fits(self.device) or batch == 1:
            return choice
        smaller = self._smaller(batch)
        while smaller > 1 and self._at_batch(choice, smaller) > self.device.memory:
            smaller = self._smaller(smaller)
        return self._largest(way, smaller)

    def _smaller(self, batch: int) -> int:
        """At most half as many pairs, of which whole micro-batches make the same optimizer step."""
        return next(size for size in range(batch // 2, 0, -1) if self.pairs_per_step % size == 0)

    def _at_batch(self, choice: Choice, batch: int) -> float:
        """About the peak with micro-batches of fewer pairs."""
        return choice.needs.at_tokens(self.work.computed(self._micro_batch(batch)[0]))

    def _seconds(self, needs: Estimate) -> float | None:
        """Of the whole run: steps, the reference ahead, and evaluations, at the stated share of the devices' rate."""
        if self.steps is None:
            return None
        training, devices = self.settings.training, self.settings.of(PlanSettings).num_devices
        pairs = self.steps * self.pairs_per_step * devices
        tokens = self.work.mean_computed(needs.batch) * pairs
        flops = needs.flops / needs.tokens * tokens
        forward = FORWARD_FLOPS * needs.parameters
        if needs.way.reference == "ahead":
            flops += forward * (self.work.tokens + self.work.held_out_tokens)
        models = 2 if needs.way.reference in ("model", "policy") else 1
        every = training.eval_steps or self.steps
        every = every * self.steps if every < 1 else every
        flops += forward * models * self.work.held_out_tokens * (1 + max(1, self.steps // every))
        return flops / (self.device.rate * self.efficiency * devices)


def _order(choice: Choice, asked: Choice) -> tuple[bool, bool, float, int]:
    """The kind of training that was asked for comes first, then what keeps the device busy, then what is fast."""
    way, wish = choice.needs.way, asked.needs.way
    other_kind = (way.use_lora, way.in_4bit) != (wish.use_lora, wish.in_4bit)
    small = way.on_gpu and choice.batch < asked.batch and choice.needs.tokens < FEWEST_TOKENS
    return other_kind, small, choice.needs.flops / choice.needs.tokens, -choice.batch


def _settings_of(settings: Settings, best: Choice, asked: Choice) -> Settings:
    """The settings of a run in that way, of which only what differs from what was asked for is said anew."""
    way, batch, training = best.needs.way, best.batch, settings.training
    total = training.per_device_train_batch_size * training.gradient_accumulation_steps
    checkpoints = best.needs.way.on_gpu if training.gradient_checkpointing is None else training.gradient_checkpointing
    new: dict[str, dict[str, Any]] = {"training": {}, "model": {}, "lora": {}}
    if batch != training.per_device_train_batch_size:
        new["training"] = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": total // batch,
        }
    if way.checkpointing != checkpoints:
        new["training"]["gradient_checkpointing"] = way.checkpointing
    if way.in_4bit != asked.needs.way.in_4bit:
        new["model"]["use_4bit"] = way.in_4bit
    if way.use_lora and not asked.needs.way.use_lora:  # an adapter that training continues is none of --use_lora
        new["lora"]["use_lora"] = True
    changed = {stage: dataclasses.replace(getattr(settings, stage), **values) for stage, values in new.items()}
    names = {name for values in new.values() for name in values}
    beside = {field.name for field in dataclasses.fields(PlanSettings)} | {"json_file"}
    return dataclasses.replace(settings, given=(settings.given | names) - beside, **changed)
