"""Step times and KV capacity by arithmetic: a model's shape on hardware one may not have.

A layer's time is the larger of its matrix products' operations and the bytes of its weights, plus its
activations' bytes, attention (operations of prompts, bytes of KV of decoding sequences), two all-reduces
over the tensor parallel group and a fixed part; every peak of the data sheet counts at the share of
Efficiency. The terms are those of Williams et al., "Roofline" (2009), for a decoder as in Pope et al.,
"Efficiently Scaling Transformer Inference" (2023). Of GPUs alone: host_time.py adds what an engine does
between steps. Knows no measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...proto.errors import ConfigError
from ...router.step_time import Line, StepShape
from .hardware import Hardware
from .model_shape import ModelShape

Precision = Literal["bf16", "fp8"]
BYTES: dict[Precision, int] = {"bf16": 2, "fp8": 1}
ACTIVATION_BYTES = 2

USABLE_MEMORY = 0.92
"""Share of the memory that weights and KV may take: chosen so that what is left for
KV agrees with DistServe's capacities of OPT on A100 (distserve_profile/max_num_tokens.csv)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What is reached of a data sheet's peaks, and what has no peak.

    The defaults minimise the mean relative error against the step latency of Llama-3.1-8B and 70B on H200
    with vLLM: `benchmarks/latency_models.py --calibrate` finds them, by coordinate descent from round
    numbers. No other model, hardware or engine had a part in them.
    """

    matrix: float = 0.71
    """Of FLOP/s, in matrix products."""
    attention: float = 0.64
    """Of FLOP/s, in attention of prompts."""
    weights: float = 0.81
    """Of memory bandwidth, reading weights."""
    kv: float = 0.89
    """Of memory bandwidth, reading KV."""
    link: float = 0.72
    """Of link bandwidth, in all-reduce."""
    all_reduce_s: float = 8e-6
    """Of an all-reduce, whatever its size."""
    layer_s: float = 28e-6
    """Of a layer, whatever its work."""
    step_s: float = 2.7e-4
    """Of a step, whatever its work."""
    activation_passes: float = 7.1
    """How often a token's hidden state is read or written in a layer."""


class RooflineStepTime:
    """One worker of `pp` stages, each of `tp` GPUs; stages have whole layers, the first ones more."""

    def __init__(
        self,
        model: ModelShape,
        hardware: Hardware,
        *,
        tp: int = 1,
        pp: int = 1,
        precision: Precision = "bf16",
        kv_precision: Precision = "bf16",
        efficiency: Efficiency | None = None,
    ) -> None:
        """
        Args:
            precision: of weights and matrix products.
            kv_precision: of KV in memory; attention computes in 16 bits.

        Raises:
            ConfigError: the parallelism does not divide the model, or the hardware lacks the precision.
        """
        self._layers = stage_layers(model, tp, pp)
        self._model, self._tp = model, tp
        eff = efficiency or Efficiency()
        flops = hardware.bf16_tflops if precision == "bf16" else hardware.fp8_tflops
        if flops is None:
            raise ConfigError(f"{hardware.name} has no fp8_tflops; use the precision bf16")
        hbm = hardware.hbm_gb_per_s * 1e9

        def link_bytes_per_s(gpus: int) -> float:
            within = gpus <= hardware.gpus_per_node
            return (hardware.intra_node_gb_per_s if within else hardware.inter_node_gb_per_s) * 1e9 * eff.link

        self._fixed_s = eff.step_s
        self._layer_s = eff.layer_s + (2 * eff.all_reduce_s if tp > 1 else 0.0)
        per_flop = 1.0 / (flops * 1e12 * eff.matrix)
        per_byte = 1.0 / (hbm * eff.weights)
        hidden_bytes = model.hidden_size * ACTIVATION_BYTES
        self._layer_token_flops_s = 2.0 * model.layer_parameters / tp * per_flop
        self._layer_weights_s = model.layer_parameters * BYTES[precision] / tp * per_byte
        # A ring moves 2 (tp - 1) / tp of the bytes over each link, for attention and for the MLP.
        ring = 2 * 2.0 * (tp - 1) / tp * hidden_bytes / link_bytes_per_s(tp)
        self._layer_token_other_s = eff.activation_passes * hidden_bytes * per_byte + ring
        bf16_flops = hardware.bf16_tflops * 1e12
        self._layer_prefill_context_s = (
            4.0 * model.num_q_heads * model.head_dim / tp / (bf16_flops * eff.attention)
        )
        kv_heads = max(1.0, model.num_kv_heads / tp)  # of fewer heads than GPUs, several GPUs have the same
        self._layer_decode_context_s = 2.0 * kv_heads * model.head_dim * BYTES[kv_precision] / (hbm * eff.kv)
        self._vocab_flops_s = 2.0 * model.vocab_parameters / tp * per_flop
        self._vocab_weights_s = model.vocab_parameters * ACTIVATION_BYTES / tp * per_byte
        self._hop_token_s = hidden_bytes / link_bytes_per_s(tp * pp)
        self._hop_s = eff.all_reduce_s

    @property
    def stages(self) -> int:
        """See step_time.StepTime."""
        return len(self._layers)

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        """See step_time.StepTime."""
        tokens, prefill_context, batch, decode_context = shape
        rows = tokens + batch
        layer = (
            max(rows * self._layer_token_flops_s, self._layer_weights_s)
            + rows * self._layer_token_other_s
            + prefill_context * self._layer_prefill_context_s
            + decode_context * self._layer_decode_context_s
            + self._layer_s
        )
        hop = self._hop_s + rows * self._hop_token_s
        seconds = [layers * layer + hop for layers in self._layers]
        # The last sends nothing on, but finds a token for each decoding sequence and a prompt.
        sampled = batch + (1 if tokens else 0)
        vocab = max(sampled * self._vocab_flops_s, self._vocab_weights_s)
        seconds[-1] = self._layers[-1] * layer + vocab
        seconds[0] += self._fixed_s
        return tuple(seconds)

    def step_s(self, shape: StepShape) -> float:
        """See step_time.StepTime."""
        return sum(self.stage_s(shape))

    def decode_line(self, batch: int, context: float) -> Line:
        """See step_time.StepTime; one line for all contexts."""
        intercept = self.step_s(StepShape(decode_batch=batch))
        return Line(intercept, self._layer_decode_context_s * sum(self._layers), float("inf"))


def stage_layers(model: ModelShape, tp: int, pp: int) -> tuple[int, ...]:
    """Layers of each pipeline stage.

    Raises:
        ConfigError: `tp` does not divide the heads, or there are more stages than layers.
    """
    if tp < 1 or model.num_q_heads % tp or (model.num_kv_heads % tp and tp % model.num_kv_heads):
        raise ConfigError(
            f"tp = {tp} does not divide {model.num_q_heads} query heads and "
            f"{model.num_kv_heads} key-value heads"
        )
    if not 1 <= pp <= model.num_layers:
        raise ConfigError(f"pp = {pp}; it must be from 1 to the model's {model.num_layers} layers")
    whole, more = divmod(model.num_layers, pp)
    return tuple(whole + (stage < more) for stage in range(pp))


def kv_capacity_tokens(
    model: ModelShape,
    hardware: Hardware,
    *,
    tp: int = 1,
    pp: int = 1,
    precision: Precision = "bf16",
    kv_precision: Precision = "bf16",
    usable_memory: float = USABLE_MEMORY,
) -> int:
    """Tokens of KV that a worker holds beside its weights: what its fullest GPU does.

    Raises:
        ConfigError: the parallelism does not divide the model, or the weights do not fit.
    """
    layers = stage_layers(model, tp, pp)
    usable = hardware.memory_gib * 2**30 * usable_memory
    kv_heads = max(1.0, model.num_kv_heads / tp)
    fits: list[float] = []
    for stage, count in enumerate(layers):
        vocab = (stage == 0) + (stage == pp - 1 and not (model.tied and pp == 1))
        weights = (
            count * model.layer_parameters * BYTES[precision]
            + vocab * model.vocab_parameters * ACTIVATION_BYTES
        ) / tp
        if weights >= usable:
            raise ConfigError(
                f"with tp = {tp} and pp = {pp} a GPU of {hardware.name} would hold {weights / 2**30:.1f} GiB "
                f"of weights and has {usable / 2**30:.1f} GiB for them; use more GPUs or a smaller model"
            )
        fits.append((usable - weights) / (2.0 * count * kv_heads * model.head_dim * BYTES[kv_precision]))
    return int(min(fits))
