"""Models on paper: made from a config alone, with the shapes and formats that a run of these settings would hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..engine.adapters import speed_up_lora
from ..engine.head import MARK, LogitShape
from ..engine.last_layer import leave_out_prompts
from ..engine.scoring import output_head
from ..engine.switches import Switches
from ..libraries import import_bitsandbytes
from ..models.counting import STANDS_FOR
from ..models.loading import answer_in_full, beyond_text, find_targets, freeze_beyond_text
from ..models.reference import held_in
from ..models.translating import translating
from ..settings.training import LoraSettings

EXPERTS = "experts_on_paper"
BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit formats
# Bytes per trained parameter that an optimizer keeps, where it is not walked through itself.
STATE_BYTES = {"sgd": 0, "adafactor": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_32bit": 4,
               "lion_8bit": 1, "paged_lion_32bit": 4, "paged_lion_8bit": 1, "rmsprop": 4, "adagrad": 4}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A way of training: what of the settings decides memory and operations.

    `reference`: "policy" (its adapter switched off), "model" (one of its own), "ahead" (scored before training), or
    "none", as in sft.
    """

    config: PretrainedConfig
    dtype: torch.dtype  # that matrix products are computed in
    use_lora: bool
    in_4bit: bool  # the base under an adapter; without one, a reference that is a model of its own
    lora: LoraSettings
    checkpointing: bool
    reference: str
    optim: str = "adamw_torch_fused"
    on_gpu: bool = False
    offloads_activations: bool = False  # to CPU memory, as --activation_offloading does
    reference_config: PretrainedConfig | None = None  # of a reference that is another model; None: the policy's
    whole_last_layer: bool = False  # it computes prompts and padding, too, as in padded batches

    @property
    def imitates(self) -> bool:
        """Whether it is sft, of padded rows of a prompt and a completion."""
        return self.reference == "none"


def make_policy(way: Way) -> PreTrainedModel | PeftModel:
    """The policy, on the meta device, prepared as the trainer prepares it.

    Raises:
        UserError: no model can be made from the config, or the adapter does not fit it.
    """
    dtype = way.dtype if way.use_lora else torch.float32
    model = _make_base(way.config, dtype)
    if way.use_lora:
        model = _put_adapter(model.requires_grad_(False), way.lora)
        if way.in_4bit:
            quantize(model, way.dtype)
        speed_up_lora(model)
    else:
        freeze_beyond_text(model)
    head = output_head(model)
    if type(head) is torch.nn.Linear:
        setattr(head, MARK, LogitShape.of(way.config))
    if way.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        Switches(model).keep_last_layer()
    if not way.whole_last_layer:
        leave_out_prompts(model, where_it_pays=True)
    return model.train()


def make_reference(way: Way) -> PreTrainedModel:
    """A reference that is a model of its own, on the meta device."""
    dtype = held_in(way.dtype, way.use_lora, way.in_4bit)
    config = way.reference_config or way.config
    model = _make_base(config, dtype).requires_grad_(False)
    if way.in_4bit:
        quantize(model, way.dtype)
    head = output_head(model)
    if type(head) is torch.nn.Linear:
        setattr(head, MARK, LogitShape.of(config))
    if not way.whole_last_layer:
        leave_out_prompts(model, where_it_pays=True)
    return model.eval()


def _make_base(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config._experts_implementation = EXPERTS  # of experts that transformers can compute in several ways
    answer_in_full(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return translating(
            "--model_name_or_path: no causal language model can be made from its config",
            lambda: AutoModelForCausalLM.from_config(config, dtype=dtype),
        )


def _put_adapter(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    targets, parameters = find_targets(settings, model)
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        target_modules=targets,
        target_parameters=parameters,
        exclude_modules=beyond_text(model),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        task_type="CAUSAL_LM",
    )
    import_bitsandbytes()
    with torch.device("meta"):
        return get_peft_model(model, config)


class Linear4bit(torch.nn.Module):
    """A linear layer whose weight is held in 4 bits, with 8-bit scales for blocks, and widened for each product."""

    def __init__(self, layer: torch.nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        count = layer.weight.numel()
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, dtype
        for name, size in (
            ("weight", count // 2),
            ("scales", count // BLOCK),
            ("scales_of_scales", count // BLOCK // 64),
        ):
            values = torch.empty(size, dtype=torch.uint8, device="meta")
            parameter = torch.nn.Parameter(values, requires_grad=False)
            setattr(parameter, STANDS_FOR, count if name == "weight" else 0)
            setattr(self, name, parameter)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x.to(self.dtype), self.weight, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = shape
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ grad.new_empty(ctx.shape), None, None


def quantize(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Puts `Linear4bit` in the place of every linear layer but the head and the adapters' own."""
    head = output_head(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child is not head and "lora_" not in type(module).__name__:
                if isinstance(module, torch.nn.ModuleDict):  # lora_A and lora_B
                    continue
                setattr(module, name, Linear4bit(child, dtype))


def give_values(model: torch.nn.Module) -> None:
    """Puts tensors of the mode that is active in the place of those on the meta device; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _ExpertProduct(torch.autograd.Function):
    """Rows times the weights of their experts, each row with one: memory and operations of a grouped product."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.transposed = transposed
        return rows @ _of_one(weight, transposed).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows = grad @ _of_one(weight, ctx.transposed).to(grad.dtype).t() if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            rows.t() @ grad  # the operations, all experts together
            of_weight = torch.empty_like(weight)
        return of_rows, of_weight, None


def _of_one(weight: Tensor, transposed: bool) -> Tensor:
    """The weights of one expert as (in, out); `weight` is (experts, out, in), or transposed (experts, in, out)."""
    return weight[0] if transposed else weight[0].t()


def _experts_on_paper(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' grouped experts compute, without asking which expert a token goes to."""
    if torch.is_autocast_enabled("cpu"):  # which has no rule for products of our own
        hidden = hidden.to(torch.get_autocast_dtype("cpu"))
    rows = hidden.repeat_interleave(top_k_index.size(-1), dim=0)  # (tokens x experts of each, hidden)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _ExpertProduct.apply(rows, getattr(module, first), module.is_transposed)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = _ExpertProduct.apply(inner, module.down_proj, module.is_transposed)
    weighted = out * top_k_weights.reshape(-1, 1)
    return weighted.view(len(hidden), -1, weighted.size(-1)).sum(dim=1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts_on_paper)
