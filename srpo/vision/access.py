"""What scoring asks of a Hugging Face model: its backbone, the states its head is called on, its positions."""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from srpo.hidden import selected_logps_from_hidden, vocabulary_kl_from_hidden
from srpo.loss import Divergence
from srpo.vision.cuts import is_pixels

# Layers whose state runs through a token that the attention mask hides.
_STATEFUL_LAYERS = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding", "recurrent", "mlstm", "slstm"}


def backbone_of(model: Any) -> Any:
    """Unwrap DDP, PEFT and compile wrappers, down to what transformers calls the base model."""
    model = _with_head(model)
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    return model.base_model


def head_of(model: Any) -> Any:
    """Return the module that makes logits."""
    return _with_head(model).get_output_embeddings()


def has_head(model: Any) -> bool:
    """Say whether this is a transformers model, wrapped or not, that makes logits."""
    inner = _with_head(model)
    return isinstance(model, nn.Module) and hasattr(inner, "base_model") and head_of(model) is not None


def is_encoder_decoder(model: Any) -> bool:
    """Say whether tokens are made by a decoder that reads an encoder: a completion there is no end of its input."""
    config = backbone_of(model).config
    return any(getattr(x, "is_encoder_decoder", False) for x in (config, config.get_text_config()))


def _with_head(model: Any) -> Any:
    model = getattr(model, "_orig_mod", model)
    while not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return getattr(model, "_orig_mod", model)


def keeps_state(model: Any) -> bool:
    """Say whether a layer carries a state through tokens that the attention mask hides (linear attention, SSM)."""
    backbone = backbone_of(model)
    config = backbone.config.get_text_config()
    layers = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    marked = any(getattr(type(module), "_is_stateful", False) for module in backbone.modules())
    return marked or bool(_STATEFUL_LAYERS.intersection(layers))


def counts_columns(model: Any, n_columns: int) -> bool:
    """Say whether attention windows of fewer than `n_columns` count columns, which a mask does not take away."""
    config = backbone_of(model).config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    layers = getattr(config, "layer_types", None)
    used = layers is None or bool({"sliding_attention", "chunked_attention"}.intersection(layers))
    used = used and getattr(config, "use_sliding_window", True) is not False
    return used and any(window is not None and window < n_columns for window in windows)


def names_taken(model: Any) -> set[str]:
    """Return the names of all inputs that the forward of a model, or of a part of it, declares."""
    names = {name for kind in {type(module) for module in model.modules()} for name in _parameters(kind.forward)}
    backbone = backbone_of(model)
    methods = ("get_rope_index", "get_image_features", "get_video_features")
    found = (getattr(type(backbone), method, None) for method in methods)
    return names.union(*(_parameters(method) for method in found if method is not None)) - {"self"}


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(x.name for x in parameters if x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL))


@contextmanager
def positions_given(model: Any, B: int, S: int) -> Iterator[list[Tensor]]:
    """Collect the position ids `[B, S]`, or `[k, B, S]`, that a decoder gives itself in the forwards inside."""
    found: list[Tensor] = []
    places = {}
    for module in decoder_of(model).modules():
        names = list(inspect.signature(module.forward).parameters)
        if "position_ids" in names:
            places[module] = names.index("position_ids")

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = places[module]
        x = kwargs.get("position_ids", args[place] if place < len(args) else None)
        if not found and isinstance(x, Tensor) and x.dim() in (2, 3) and x.shape[-1] == S and x.shape[-2] in (1, B):
            found.append(x.expand(*x.shape[:-2], B, S))

    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in places]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def decoder_of(model: Any) -> nn.Module:
    """Return the language half of a model."""
    inner = _with_head(model)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else backbone_of(model)


def takes_positions(model: Any) -> bool:
    """Say whether a forward takes position ids."""
    return "position_ids" in inspect.signature(backbone_of(model).forward).parameters


def cache_name(model: Any) -> str:
    """Return what a forward and its output call the cache: `cache` since transformers 5.24, else `past_key_values`."""
    return "cache" if "cache" in inspect.signature(backbone_of(model).forward).parameters else "past_key_values"


def rope_positions(model: Any, ids: Tensor, mask: Tensor, multimodal: Mapping[str, Any]) -> Tensor | None:
    """Return the mRoPE positions of a whole batch, before it is split: HunYuan numbers pictures through all of it."""
    rope_index = getattr(backbone_of(model), "get_rope_index", None)
    if rope_index is None or not takes_positions(model) or not any("grid" in name for name in multimodal):
        return None
    placeable = torch.where(mask.any(dim=1, keepdim=True), mask, torch.ones_like(mask))
    known = dict(multimodal, input_ids=ids, attention_mask=placeable)
    accepted = inspect.signature(rope_index).parameters.values()
    needed = {x.name for x in accepted if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD}
    if not needed <= known.keys():
        return None
    return rope_index(**{x.name: known[x.name] for x in accepted if x.name in known})[0]


def counted_positions(model: Any, ids: Tensor, mask: Tensor) -> Tensor | None:
    """Return the positions of a decoder that embeds them without telling: it counts columns, or the mask, or neither.

    Two short sequences, one of them padded, show which of the two changes nothing.
    """
    device = ids.device
    few, visible = torch.tensor([[0, 1, 2], [3, 4, 5]], device=device), torch.tensor([[0, 1, 1], [1, 1, 1]]).to(device)

    def logits(**positions: Tensor) -> Tensor:
        out = model(input_ids=few, attention_mask=visible, use_cache=False, **positions).logits
        return out[:, -1].float()

    columns, counted = torch.arange(3, device=device).repeat(2, 1), _count(visible)
    try:
        own = logits()
        errors = [float((logits(position_ids=x) - own).abs().max()) for x in (columns, counted)]
    except (TypeError, ValueError, RuntimeError):  # Kosmos-2 does without neither picture nor positions
        return None
    if min(errors) > 0.02 * float(own.std()):
        return None
    return torch.arange(ids.shape[1], device=device).expand_as(ids) if errors[0] <= errors[1] else _count(mask)


def _count(mask: Tensor) -> Tensor:
    return ((mask != 0).long().cumsum(dim=1) - 1).clamp(min=0)


def is_sharded(model: Any) -> bool:
    """Say whether parameters are spread over ranks and gathered by forward alone (FSDP, ZeRO-3): ranks run in step."""
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return wrapped or any(type(x).__name__ == "DTensor" or hasattr(x, "ds_status") for x in model.parameters())


class HeadStates(NamedTuple):
    """What a forward gave the head.

    Args:
        states: `[B, keep, H]`, or the logits of all columns where the head was not called once.
        is_bare: whether the head alone makes the logits of the states.
        cache: keys and values of the forward; None unless it was asked to keep them.
    """

    states: Tensor
    is_bare: bool
    cache: Any


def head_states(model: Any, inputs: dict[str, Any], keep: int, *, use_cache: bool = False) -> HeadStates:
    """Return the last `keep` states that the head is called on, and whether the head alone makes the logits of them.

    The head itself is given one row. It is alone where it is a plain linear layer, without hooks, adapters or
    parametrisations, and what it returned are the logits, bit for bit: a cap or a scale shows.
    """
    head, states, outputs = head_of(model), [], []
    plain = _is_linear(head) and not head._forward_hooks and not head._forward_pre_hooks

    def narrow(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states.append(arguments[0][:, -keep:])
        return (arguments[0][:, -1:], *arguments[1:])

    handles = [
        head.register_forward_pre_hook(narrow),
        head.register_forward_hook(
            lambda _, __, output: outputs.append(output.clone())
        ),  # Chameleon changes it in place
    ]
    try:
        out = model(**inputs, use_cache=use_cache)
    finally:
        for handle in handles:
            handle.remove()
    logits, cache = out.logits, getattr(out, cache_name(model), None) if use_cache else None
    if len(states) != 1 or len(outputs) != 1:
        return HeadStates(logits, False, cache)
    own = outputs[0]
    alone = isinstance(own, Tensor) and own.shape == logits.shape and torch.equal(own.float(), logits.float())
    return HeadStates(states[0], plain and alone, cache)


def own_logits(model: Any, inputs: dict[str, Any], keep: int) -> Tensor:
    """Return the model's own logits of the last `keep` columns; its head sees no others."""
    handle = head_of(model).register_forward_pre_hook(lambda _, args: (args[0][:, -keep:], *args[1:]))
    try:
        return model(**inputs, use_cache=False).logits[:, -keep:]
    finally:
        handle.remove()


class _Fp32Linear:
    """The forward of a linear head in fp32, which autocast does not reach."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head

    def __call__(self, states: Tensor) -> Tensor:
        weight, bias = self.head.weight.float(), self.head.bias
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), weight, None if bias is None else bias.float())


def _is_linear(head: nn.Module) -> bool:
    """Say whether a forward of the head is that of a linear layer; accelerate puts its own in the place of it."""
    return type(head) is nn.Linear and isinstance(vars(head).get("forward"), _Fp32Linear | None)


def can_be_fp32(model: Any) -> bool:
    """Say whether `head_in_fp32` can keep its word: other layers than a linear one multiply in their own dtype."""
    head = head_of(model)
    return _is_free(head) or all(x.dtype == torch.float32 for x in head.parameters())


def _is_free(head: nn.Module) -> bool:
    """Say whether a linear layer has its weights to itself: accelerate's hooks move them about."""
    return type(head) is nn.Linear and not hasattr(head, "_hf_hook")


@contextmanager
def head_in_fp32(model: Any) -> Iterator[None]:
    """Let the head multiply in fp32 whatever autocast says, as TRL does with `cast_lm_head_to_fp32`.

    The forward that TRL puts in the place of a linear head's own multiplies in fp32 outside of autocast alone.
    """
    head = head_of(model)
    own, forward = vars(head).get("forward"), head.forward

    def outside(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(states.device.type, enabled=False):
            return forward(states.float(), *args, **kwargs)

    head.forward = _Fp32Linear(head) if _is_free(head) else outside
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def head_logps(model: Any, states: Tensor, ids: Tensor, **options: Any) -> Any:
    """Return `selected_logps_from_hidden` of a bare head, in the precision in which the head multiplies."""
    return _of_head(selected_logps_from_hidden, model, [states], ids, options)


def head_divergence(model: Any, states: Tensor, contrast: Tensor, ids: Tensor, **options: Any) -> Divergence:
    """Return `vocabulary_kl_from_hidden` of a bare head, in the precision in which the head multiplies."""
    return _of_head(vocabulary_kl_from_hidden, model, [states, contrast], ids, options)


def _of_head(function: Any, model: Any, states: list[Tensor], ids: Tensor, options: dict[str, Any]) -> Any:
    head = head_of(model)
    weight, bias = head.weight, head.bias
    if not isinstance(vars(head).get("forward"), _Fp32Linear):
        return function(*states, weight, ids, bias=bias, **options)
    bias = None if bias is None else bias.float()
    with torch.autocast(ids.device.type, enabled=False):
        return function(*(x.float() for x in states), weight.float(), ids, bias=bias, **options)


def vision_features(model: Any, multimodal: Mapping[str, Any]) -> dict[str, Any] | None:
    """Run the vision tower now, for several forwards to share; None where the model or a wrapper does not let us."""
    backbone = backbone_of(model)
    is_bare = backbone is getattr(model, "base_model", None) and hasattr(model, "get_output_embeddings")
    if (
        not is_bare
        or is_sharded(backbone)
        or is_hooked(model)
        or not _takes_features(model)
        or not _takes_features(backbone)
    ):
        return None
    runs, read = {}, set()
    for kind, suffix in (("image", ""), ("video", "_videos")):
        run = getattr(backbone, f"get_{kind}_features", None)
        if run is not None and multimodal.get(f"pixel_values{suffix}") is not None:
            runs[kind] = run
            read.update(inspect.signature(run).parameters)
    if not runs or any(is_pixels(name) and name not in read for name in multimodal):
        return None
    features = {}
    for kind, run in runs.items():
        accepted = inspect.signature(run).parameters
        features[kind] = run(**{name: x for name, x in multimodal.items() if name in accepted}, return_dict=True)
    return features


def is_hooked(model: Any) -> bool:
    """Say whether something may change what a forward is called with, as ms-swift does to put pictures among tokens.

    What its author does not know is then lost without a word: features of pictures, and ids, which positions need.
    """
    return any(module._forward_pre_hooks for module in (model, backbone_of(model)))


def _takes_features(model: Any) -> bool:
    """Say whether a forward takes features in the place of pixels; BLIP-2's asks for both."""
    accepted = inspect.signature(model.forward).parameters
    pixels = accepted.get("pixel_values")
    return "mm_encoder_outputs" in accepted and (pixels is None or pixels.default is None)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off; give each submodule its own training mode back, and what mRoPE remembers of a forward."""
    training = [module for module in model.modules() if module.training]
    remembered = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, deltas in remembered:
            module.rope_deltas = deltas
