"""The decoder: embed, then attention and experts layer by layer, then logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backend.brownout.settings import TOKEN_CLASSES
from backend.elastic.worker_pool import WorkerPool
from backend.experts.resident import ResidentPool
from backend.kernels import kernels_for
from backend.kernels.transfer import to_device
from backend.models.attention import Attention, KVCache
from backend.models.config import ModelConfig
from backend.models.forward_batch import ForwardBatch
from backend.models.layers import Backing, GatedMLP, NamedWeight, RMSNorm, RotaryAngles
from backend.models.moe import MoeBlock, Replacement


class DecoderLayer:
    """Attention and an expert block (or, in layers without experts, an MLP), each behind a norm and a residual."""

    def __init__(
        self,
        backing: Backing,
        config: ModelConfig,
        layer: int,
        thresholds: Tensor,
        replacement: Replacement,
        groups: Mapping[int, Tensor],
        num_resident: int,
    ) -> None:
        self.input_norm = RMSNorm(backing, config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(backing, config, layer)
        self.post_attention_norm = RMSNorm(backing, config.hidden_size, config.rms_norm_eps)
        self.moe: MoeBlock | None = None
        self.mlp: GatedMLP | None = None
        if config.moe_layers[layer]:
            self.moe = MoeBlock(backing, config, thresholds, replacement, groups, num_resident)
        else:
            self.mlp = GatedMLP(backing, config.hidden_size, config.dense_size)

    def weights(self, prefix: str) -> Iterator[NamedWeight]:
        yield from self.input_norm.weights(f"{prefix}.input_layernorm")
        yield from self.attention.weights(f"{prefix}.self_attn")
        yield from self.post_attention_norm.weights(f"{prefix}.post_attention_layernorm")
        if self.moe is not None:
            yield from self.moe.weights(prefix)
        if self.mlp is not None:
            yield from self.mlp.weights(f"{prefix}.mlp")

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        kv: tuple[Tensor, Tensor],
        replaced: Tensor,
        next_norm: RMSNorm,
    ) -> Tensor:
        """x [T, M], the normed `residual` [T, M] -> `next_norm` of the residual, to which this layer is added in place."""
        x = self.post_attention_norm.after_add(self.attention(x, angles, batch, kv), residual)
        if self.moe is not None:
            return self.moe.add_to(residual, x, batch.token_class, replaced, batch.num_tokens, next_norm)
        return next_norm.after_add(self.feed_forward(x, batch.token_class), residual)

    def feed_forward(self, x: Tensor, token_class: Tensor, replaced: Tensor | None = None) -> Tensor:
        """What follows attention and its norm: x [T, M] -> [T, M]."""
        if self.moe is not None:
            return self.moe(x, token_class, replaced)
        assert self.mlp is not None
        return self.mlp(x)


class MoeModel:
    """A mixture-of-experts language model with its weights on one device."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        groups: Mapping[int, Mapping[int, Tensor]] | None = None,
        attention: str = "auto",
        num_resident: int | None = None,
    ) -> None:
        """Tensors are allocated but not filled: `load_model` does that. `attention` as in `kernels_for`.

        `groups` [E], by way and layer, tell which experts are united; each way has slots of its own. `num_resident` experts of
        each layer have slots (None: all); with fewer than all the model needs a `pool`.
        """
        groups = groups or {}
        self.config, self.dtype, self.device = config, dtype, device
        #: Type of hidden states. On a CPU float32 whatever the weights' type: torch's arithmetic on 16-bit types is several
        #: times slower there.
        self.activation_dtype = torch.float32 if device.type == "cpu" else dtype
        self.kernels = kernels_for(device, attention)
        backing = Backing(dtype, self.activation_dtype, device, self.kernels)
        #: [layers, classes] float32 brownout thresholds, read by every MoE block of a step.
        self.thresholds = torch.ones(config.num_layers, len(TOKEN_CLASSES), device=device)
        self.embedding = backing.matrix(config.vocab_size, config.hidden_size)
        self.angles = RotaryAngles(backing, config)
        self.replacement = Replacement(torch.zeros((), device=device))
        self.layers = [
            DecoderLayer(
                backing,
                config,
                i,
                self.thresholds[i],
                self.replacement,
                {way: layers[i] for way, layers in groups.items() if i in layers},
                config.num_experts if num_resident is None else num_resident,
            )
            for i in range(config.num_layers)
        ]
        self.ways = tuple(sorted(groups))
        #: Decides which experts have slots; None: all have.
        self.pool: ResidentPool | WorkerPool | None = None
        #: [T] int32, of each token of the last step the assignments of all layers that its own experts did not serve.
        self.last_replaced: Tensor | None = None
        self.final_norm = RMSNorm(backing, config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = self.embedding if tied else backing.matrix(config.vocab_size, config.hidden_size)

    def weights(self) -> Iterator[NamedWeight]:
        """Every tensor of the checkpoint by its name there, as a view to fill."""
        yield "model.embed_tokens.weight", self.embedding
        for i, layer in enumerate(self.layers):
            yield from layer.weights(f"model.layers.{i}")
        yield from self.final_norm.weights("model.norm")
        if self.lm_head is not self.embedding:
            yield "lm_head.weight", self.lm_head

    def weight_bytes(self) -> int:
        """Bytes of all weights that have a place on the device, but the united experts'."""
        others = [tensor for name, tensor in self.weights() if ".experts." not in name]
        slots = sum(block.experts.num_bytes for block in self.moe_blocks)
        return sum(tensor.nbytes for tensor in others) + slots - self.united_bytes()

    def resident_bytes(self) -> int:
        """Bytes of the slots for experts' own weights."""
        return sum(block.experts.slot_bytes * block.expert_map.num_resident for block in self.moe_blocks)

    def united_bytes(self) -> int:
        """Bytes of the united experts' weights, of all ways together."""
        views = (view for block in self.moe_blocks for way in self.ways for view in block.united_weights(way))
        return sum(view.nbytes for view in views)

    @property
    def moe_blocks(self) -> list[MoeBlock]:
        return [layer.moe for layer in self.layers if layer.moe is not None]

    def moe_block(self, layer: int) -> MoeBlock:
        """The block of a layer that has experts."""
        moe = self.layers[layer].moe
        assert moe is not None
        return moe

    def use_pool(self, pool: ResidentPool | WorkerPool, absent: Mapping[str, Tensor]) -> None:
        """Have `pool` fill the experts' slots from the tensors, by checkpoint name, that have no place in them."""
        self.pool = pool
        for i, layer in enumerate(self.layers):
            if (block := layer.moe) is not None:
                names = [block.expert_names(f"model.layers.{i}", e) for e in range(self.config.num_experts)]
                sources = [(absent[gate], absent[up], absent[down]) for gate, up, down in names]
                block.pool = pool.add_layer(block.experts, block.expert_map, sources)

    def widen_experts(self, times: int) -> None:
        """Make each routed and united expert `times` as wide and expensive without changing what it computes."""
        for block in self.moe_blocks:
            block.experts.widen(times)
        if isinstance(self.pool, WorkerPool):
            self.pool.widen(times)

    def fold_shared_experts(self) -> None:
        """See `MoeBlock.fold_shared`."""
        for block in self.moe_blocks:
            block.fold_shared()
            self._give_back()

    def quantize_experts(self) -> None:
        """Store the weights of all slots as float8 with a factor for each output row."""
        for block in self.moe_blocks:
            block.experts.quantize()
            self._give_back()

    def _give_back(self) -> None:
        """What a layer's replaced weights have left over, before the next layer's get a part of it and keep all of it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def set_thresholds(self, table: Sequence[Sequence[float]]) -> None:
        """Replace the thresholds [layers, classes] in place; they act from the next forward on."""
        values = np.array(table, np.float32)
        self.thresholds.copy_(to_device([values], self.device)[0])

    def set_replacement(self, mechanism: str, ranking: str, way: int, similarity_min: float) -> None:
        """How experts are replaced from the next forward on; `way` is one of `ways`, or 0 for no united experts."""
        self.replacement.mechanism, self.replacement.ranking = mechanism, ranking
        self.replacement.similarity_min.fill_(similarity_min)
        for block in self.moe_blocks:
            block.expert_map.use_way(way)

    def slot_usage(self) -> tuple[list[int], float]:
        """Of the last step: active slots of each MoE layer, and assignments per token and layer that were computed.

        Zeros before the first step. Reads the device, once, so it is for occasional telemetry.
        """
        layers = [block.last_slots for block in self.moe_blocks if block.last_slots is not None]
        if not layers or self.last_replaced is None:
            return [0] * len(self.moe_blocks), 0.0
        num_tokens = len(self.last_replaced)  # a graph's slots have rows of padding after them
        slots = torch.stack([rows[:num_tokens] for rows in layers]).flatten(1)  # [layers, T * K]
        # Experts that a step waits for have numbers beyond the slots; the first place is that of skipped assignments.
        most = max(block.expert_map.num_slots for block in self.moe_blocks) + self.config.num_experts
        in_use = slots.new_zeros(len(layers), most + 1).scatter_(1, slots + 1, 1)
        *active, served = torch.cat([in_use[:, 1:].sum(1), (slots >= 0).sum().view(1)]).tolist()
        return active, served / (len(layers) * num_tokens)

    @property
    def variant(self) -> tuple[str, str]:
        """What decides which kernels a step runs, beside tensors."""
        return self.replacement.mechanism, self.replacement.ranking

    def step_record(self) -> list[Tensor]:
        """What the last forward left for telemetry: tensors with one row per token."""
        left = [*(block.last_slots for block in self.moe_blocks), self.last_replaced]
        return [tensor for tensor in left if tensor is not None]

    def set_step_record(self, record: Sequence[Tensor], num_tokens: int) -> None:
        """Take over what an earlier forward left, whose captured graph has just been replayed; later rows are padding."""
        *slots, replaced = record
        self.last_replaced = replaced[:num_tokens]
        for block, of_block in zip(self.moe_blocks, slots, strict=True):
            block.last_slots = of_block

    def forget_step(self) -> None:
        """Have no last step."""
        self.last_replaced = None
        for block in self.moe_blocks:
            block.last_slots = None

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_cache: KVCache, logits: Tensor | None = None) -> Tensor:
        """Run one step; returns logits [R, V] in float32 for `batch.logit_rows` and fills the KV cache.

        `logits` [R, V] float32 is where they are to be written, if given.
        """
        angles = self.angles(batch.positions)
        residual = F.embedding(batch.token_ids, self.embedding).to(self.activation_dtype)
        x = self.layers[0].input_norm(residual)
        replaced = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        next_norms = [*(layer.input_norm for layer in self.layers[1:]), self.final_norm]
        for layer, next_norm, *kv in zip(self.layers, next_norms, kv_cache.k, kv_cache.v, strict=True):
            x = layer(x, residual, angles, batch, (kv[0], kv[1]), replaced, next_norm)
        self.last_replaced = replaced
        return self.kernels.output_logits(x[batch.logit_rows], self.lm_head, logits)
