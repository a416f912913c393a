"""The policy, the reference and the tokenizer, as they will compute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..engine.adapters import keep_dora_norms
from ..errors import UserError
from ..libraries import import_bitsandbytes
from ..progress import phase
from ..run.processes import launched_with
from ..runtime import Precision
from ..settings.training import LoraSettings, ModelSettings, Settings
from .adapter_starts import changes_base, check_start, rewrites_weights
from .hub_files import find_file
from .quantization import check_trainable
from .rounding import begin_on_steps
from .sources import ModelSource, find_model
from .translating import translating

DEFAULT_MAX_LENGTH = 1024
TRAINED_ADAPTER = "default"  # PEFT's name for the one that is trained


def load_tokenizer(source: ModelSource, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; where it has no padding token the end-of-text token serves (it is masked)."""
    read_config(source, settings)  # which the tokenizer's class reads, too: its faults are not the tokenizer's
    tokenizer = translating(
        f"--model_name_or_path {source.tokenizer}: its tokenizer cannot be loaded",
        lambda: _tried(
            AutoTokenizer.from_pretrained(
                source.tokenizer, revision=source.tokenizer_revision, trust_remote_code=settings.trust_remote_code
            )
        ),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tried(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, when it turns a text into ids and back: what its files hold is looked at only then."""
    ids = tokenizer("A word, 1 number.", add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("it gives no tokens for a text; its vocabulary is empty, copy the tokenizer's files again")
    tokenizer.decode(ids)
    return tokenizer


def context_length(source: ModelSource, settings: ModelSettings) -> int | None:
    """The most tokens the model can read, from its config; None when the config does not limit it."""
    return longest_context(read_config(source, settings).get_text_config())


def read_config(source: ModelSource, settings: ModelSettings) -> PretrainedConfig:
    """The config of a base.

    Raises:
        UserError: transformers makes nothing of it.
    """
    return translating(
        f"--model_name_or_path {source.base}: its config.json cannot be used",
        lambda: AutoConfig.from_pretrained(
            source.base, revision=source.revision, trust_remote_code=settings.trust_remote_code
        ),
    )


def longest_context(config: PretrainedConfig) -> int | None:
    """The most tokens that a text config says its model can read; None where it sets no limit."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    lengths = (getattr(config, name, None) for name in names)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def choose_max_length(wish: int | None, limit: int | None) -> int:
    """The tokens of prompt and response together: as wished, else DEFAULT_MAX_LENGTH, within the model's limit.

    Raises:
        UserError: more is wished than the model reads.
    """
    if wish is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and wish > limit:
        raise UserError(f"--max_length is {wish}, but this model reads at most {limit} tokens; lower it")
    return wish


def load_policy(source: ModelSource, settings: Settings, precision: Precision) -> PreTrainedModel | PeftModel:
    """The model to train.

    Weights that will be trained are float32; frozen ones (the base of an adapter) have the computing precision, or
    4 bits under --use_4bit.
    """
    adapts = settings.lora.use_lora or source.adapter is not None
    check_trainable("--model_name_or_path", source.base, source.stored(), adapts, settings.model.use_4bit)
    dtype = precision.dtype if adapts else torch.float32
    model = _load_base(
        "--model_name_or_path", source, settings.model, precision, dtype, settings.model.use_4bit and adapts
    )
    if source.adapter is None:
        if not adapts:
            freeze_beyond_text(model)
        return model
    return put_adapter(model, source, trainable=True)


def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: ModelSettings) -> None:
    """Refuses a separate reference that reads other token ids than the policy does.

    Raises:
        UserError: the two vocabularies differ.
    """
    named = settings.named_reference
    if named is not None:
        check_token_ids(tokenizer, find_model(*named), settings)


def check_token_ids(tokenizer: PreTrainedTokenizerBase, source: ModelSource, settings: ModelSettings) -> None:
    """Refuses the model `source` as a reference when it reads other token ids than the policy's tokenizer gives.

    Raises:
        UserError: the two vocabularies differ.
    """
    other = load_tokenizer(source, settings)
    if other.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--ref_model_name_or_path {source.name}: its tokenizer ({len(other)} tokens) differs from the policy's "
            f"({len(tokenizer)}); the reference must use the same token ids"
        )


def new_adapter_config(settings: LoraSettings, source: ModelSource, model: PreTrainedModel) -> LoraConfig:
    """The LoRA configuration for a fresh adapter on `model`.

    Raises:
        UserError: a module named with --lora_target_modules does not occur in the model.
    """
    targets, parameters = find_targets(settings, model)
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        target_parameters=parameters,
        exclude_modules=beyond_text(model),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        revision=source.revision,
        task_type="CAUSAL_LM",
    )


def find_targets(settings: LoraSettings, model: torch.nn.Module) -> tuple[Any, list[str] | None]:
    """The modules and the parameters (fused experts) that an adapter is put on.

    Raises:
        UserError: a name does not occur in the model.
    """
    targets = list(settings.lora_target_modules)
    if targets == ["all-linear"]:
        return "all-linear", None
    check_target_modules(targets, model)
    fused = _fused_experts(model)
    parameters = [name for name in targets if name in fused]
    return [name for name in targets if name not in fused], parameters or None


def _fused_experts(model: torch.nn.Module) -> set[str]:
    """Names of parameters that hold the weights of all experts of a layer."""
    modules = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    return {name.rsplit(".", 1)[-1] for name, part in model.named_parameters() if part.dim() == 3} - modules


def _former_names(model: torch.nn.Module) -> set[str]:
    """Names that modules of single experts had before they were fused, which PEFT still takes."""
    from peft.utils import transformers_weight_conversion as conversion

    kind = getattr(model.config, "model_type", None)
    kind = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind)
    return set(getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(kind) or ())


def text_part(model: PreTrainedModel | PeftModel) -> str | None:
    """The name of the part of an image-text model that reads texts; None where that is the whole model."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return None
    decoder = model.get_decoder()
    name = next((name for name, part in model.named_modules() if part is decoder), "")
    head = model.get_output_embeddings()
    beyond = [n for n, part in model.named_parameters() if not n.startswith(f"{name}.")]
    own = {id(part) for part in head.parameters()} if head is not None else set()
    parameters = dict(model.named_parameters())
    return name if name and any(id(parameters[n]) not in own for n in beyond) else None


def beyond_text(model: PreTrainedModel | PeftModel) -> str | None:
    """A pattern of the modules that texts never reach, for PEFT; None where they reach all."""
    name = text_part(model)
    return rf"(?!{re.escape(name)}\.).*" if name is not None else None


def freeze_beyond_text(model: PreTrainedModel | PeftModel) -> None:
    """Freezes what texts never reach: it would be called trained and never move."""
    name, head = text_part(model), model.get_output_embeddings()
    if name is None:
        return
    kept = {id(part) for part in model.get_submodule(name).parameters()}
    kept |= {id(part) for part in head.parameters()} if head is not None else set()
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def check_embeddings(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, source: ModelSource
) -> None:
    """Refuses a tokenizer with more tokens than the model has embeddings for."""
    embeddings = model.get_input_embeddings()  # which an adapter may have wrapped
    size = getattr(embeddings, "num_embeddings", None) or len(embeddings.weight)
    if len(tokenizer) > size:
        raise UserError(
            f"--model_name_or_path {source.name}: its tokenizer has {len(tokenizer)} tokens, the model {size}; "
            "they do not match (or the model's embeddings were not resized when tokens were added)"
        )


def turn_off_dropout(model: torch.nn.Module) -> None:
    """Turns off every dropout of the model: the noise would make policy and reference differ.

    Some architectures (OPT) keep probabilities as plain numbers on their layers, which TRL does not look for.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def load_frozen(
    flag: str,
    source: ModelSource,
    settings: ModelSettings,
    precision: Precision,
    in_4bit: bool,
    adapter_name: str | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel | PeftModel:
    """A model to use rather than to train, on the device: in `dtype` (the computing precision's) or in 4 bits."""
    model = read_frozen(flag, source, settings, precision, dtype or precision.dtype, in_4bit, adapter_name)
    # Weights in few bits are where they were quantized.
    return model if in_4bit or source.stored() is not None else model.to(precision.device)


def check_target_modules(targets: list[str], model: PreTrainedModel) -> None:
    """Refuses names of modules that an adapter cannot be put on.

    Raises:
        UserError: a module does not occur in the model, or is its head.
    """
    if "all-linear" in targets:
        raise UserError("--lora_target_modules: all-linear cannot be combined with other names; leave them out")
    head = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Linear4bit", "Conv1D") and module is not head
    }
    fused = _fused_experts(model)
    named = fused | _former_names(model)
    faults = []
    for target in targets:
        if any(
            name == target or name.endswith(f".{target}") for name, module in model.named_modules() if module is head
        ):
            faults.append(f"--lora_target_modules: {target} is the output head, which LoRA does not adapt here")
        elif target in named:
            continue
        elif not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
            names = ", ".join(sorted(linear | fused))
            faults.append(f"--lora_target_modules: no module is named {target}; this model has {names}")
    if faults:
        raise UserError(*faults)


def read_frozen(
    flag: str,
    source: ModelSource,
    settings: ModelSettings,
    precision: Precision,
    dtype: torch.dtype,
    quantize: bool,
    adapter_name: str | None = None,
) -> PreTrainedModel | PeftModel:
    """The same, where it was read to."""
    model = _load_base(flag, source, settings, precision, dtype, quantize)
    if source.adapter is not None:
        model = put_adapter(model, source, adapter_name or TRAINED_ADAPTER)
    return model.requires_grad_(False).eval()


def _load_base(
    flag: str, source: ModelSource, settings: ModelSettings, precision: Precision, dtype: torch.dtype, quantize: bool
) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "revision": source.revision, "use_safetensors": True}
    options["trust_remote_code"] = settings.trust_remote_code
    options["ignore_mismatched_sizes"] = True  # they are reported, and refused below with their names
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    stored = source.stored()
    if stored is not None:
        options["device_map"] = {"": precision.device}
    elif quantize:
        options["quantization_config"] = _quantization(settings, precision)
        options["device_map"] = {"": precision.device}
    with phase(f"loading {source.base}"):
        model, report = translating(
            f"{flag} {source.base}: cannot be loaded",
            lambda: AutoModelForCausalLM.from_pretrained(source.base, output_loading_info=True, **options),
        )
    # transformers would fill these with random numbers, another time with others.
    odd = sorted(report["mismatched_keys"])
    if odd:
        name, found, wanted = odd[0]
        more = f" (and {len(odd) - 1} more of another shape)" if len(odd) > 1 else ""
        raise UserError(
            f"{flag} {source.base}: {name} is {list(found)} in its files and {list(wanted)} by its config.json{more}; "
            "the two do not match; copy the folder again"
        )
    absent = sorted(report["missing_keys"])
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            f"{flag} {source.base}: its weights are missing {', '.join(absent[:3])}{more} of a {type(model).__name__}; "
            "name a folder with the whole causal language model"
        )
    model.left_out = sorted(report["unexpected_keys"])  # for whoever describes it
    keep_quantized_weights(model)
    if dtype == torch.float32 and begin_on_steps(model, precision.dtype):
        model.rounded_to = precision.name  # for whoever describes it
    answer_in_full(model.config)
    return model


def answer_in_full(config: PretrainedConfig) -> None:
    """Sets what a config says of a model's answers to what training and scoring read: named, and nothing beside."""
    wanted = {"return_dict": True, "output_attentions": False, "output_hidden_states": False, "torchscript": False}
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for name, value in wanted.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)


def keep_quantized_weights(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights with coarser scales at the first evaluation.

    It does so on processors with bfloat16: the reference would change under the policy. It also fails there on
    matrices whose rows are no whole blocks.
    """
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def _quantization(settings: ModelSettings, precision: Precision) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision.dtype,
        # FSDP shards numbers with a point only: there the bits of the weights are held as such.
        bnb_4bit_quant_storage=precision.dtype if launched_with("FSDP") else None,
    )


def put_adapter(
    model: PreTrainedModel | PeftModel, source: ModelSource, name: str = TRAINED_ADAPTER, trainable: bool = False
) -> PeftModel:
    """The model with the adapter of `source` on it, under that name, beside those that it has.

    Raises:
        UserError: PEFT cannot put it there, or would not make the model that the adapter was trained in.
        TypeError: the model is not to be shared: this adapter or one that it has changes the base.
    """
    config = source.adapter_config()
    check_start("the adapter", str(source.adapter), config)
    if rewrites_weights(config) and getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            f"the adapter {source.adapter} subtracts a part from its base's weights (see its adapter_config.json), "
            "which differ in 4 or 8 bits; leave --use_4bit out, or merge it first (the verb merge) and use that"
        )
    others = [other.to_dict() for other in model.peft_config.values()] if isinstance(model, PeftModel) else []
    if others and any(map(changes_base, [config, *others])):
        raise TypeError(f"{source.adapter} and the adapters beside it cannot share a base")
    options: dict[str, Any] = {"is_trainable": trainable, "use_safetensors": True}

    _check_token_rows(model, source)

    def put() -> PeftModel:
        adapted, revision = model, source.adapter_revision
        if not isinstance(model, PeftModel):
            import_bitsandbytes()
            adapted = PeftModel.from_pretrained(model, source.adapter, name, revision=revision, **options)
        # Reads the weights a second time after from_pretrained, which does not return what was missing.
        _check_adapter_complete(adapted.load_adapter(source.adapter, name, revision=revision, **options), source)
        return adapted

    adapted = translating(f"the adapter {source.adapter} does not fit {model.config._name_or_path}", put)
    keep_dora_norms(adapted)
    return adapted


def _check_adapter_complete(report: Any, source: ModelSource) -> None:
    """Refuses an adapter whose file and adapter_config.json do not belong together, or not to this base.

    Raises:
        UserError: PEFT left weights as a new adapter has them, or had no place for weights of the file.
    """
    shared = ("vblora_vector_bank", "prompt_encoder")  # held once for all layers, or not saved
    lacking = [key for key in report.missing_keys if not any(name in key for name in shared)]
    unplaced = [key for key in report.unexpected_keys if "lora_" in key]
    faults = [
        f"the adapter {source.adapter} {what} {', '.join(key.removeprefix('base_model.model.') for key in keys[:3])}"
        f"{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}: {why}; copy its folder again, and see that its base "
        f"is the model it was trained on (here {source.base})"
        for keys, what, why in (
            (lacking, "lacks", "its adapter_config.json puts weights there"),
            (unplaced, "holds", "neither its base nor its adapter_config.json has a place for them"),
        )
        if keys
    ]
    if faults:
        raise UserError(*faults)


def _check_token_rows(model: PreTrainedModel | PeftModel, source: ModelSource) -> None:
    """Refuses an adapter that brings embeddings or a head for other numbers of tokens than its base has.

    Raises:
        UserError: told from the shapes in the adapter's file, before anything of it is loaded.
    """
    file = find_file(source.adapter, "adapter_model.safetensors", source.adapter_revision)
    if file is None:
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    names = {name for name, part in base.named_modules() if id(part) in parts}
    with _open_adapter(file, source) as tensors:
        for key in tensors.keys():  # noqa: SIM118 - no mapping
            name = key.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".base_layer")
            if name not in names or not key.endswith(".weight"):
                continue
            rows, own = tensors.get_slice(key).get_shape()[0], base.get_submodule(name).weight.shape[0]
            if rows != own:
                raise UserError(
                    f"the adapter {source.adapter} was trained with {rows} tokens, its base {source.base} has {own}: "
                    "resize the base (resize_token_embeddings), save it, and name that one as "
                    "base_model_name_or_path in the adapter's adapter_config.json"
                )


def _open_adapter(file: Path, source: ModelSource) -> Any:
    """A safetensors file, open for its shapes."""
    return translating(
        f"the adapter {source.adapter} cannot be read", lambda: safe_open(str(file), framework="pt", device="cpu")
    )
