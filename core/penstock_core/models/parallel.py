"""How a model is cut: each layer among tensor-parallel ranks (Shoeybi et al., Megatron-LM, 2019), layers among stages.

`TensorParallelGroup` itself is the group of one, where nothing has to travel; `penstock_core.distributed` derives real
ones. Column-parallel linears keep a slice of their outputs, row-parallel ones a slice of their inputs followed by one
sum; attention heads, experts and the vocabulary are split; KV heads are replicated when there are fewer than ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock_core.models.config import ModelConfig
from penstock_core.models.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Stage:
    """One of the pieces that a model's layers are cut into, one after the other; the first embeds, the last decides."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether token ids go in here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether logits come out here."""
        return self.index == self.count - 1

    def layers(self, total: int) -> range:
        """The layers of this stage; where they do not divide, earlier stages have one more: the last has the head."""
        each, more = divmod(total, self.count)
        start = self.index * each + min(self.index, more)
        return range(start, start + each + (self.index < more))

    def check(self, config: ModelConfig) -> None:
        """Refuse more stages than layers.

        Raises:
            UnsupportedModel: naming the most stages that would do.
        """
        if self.count > config.num_layers:
            raise UnsupportedModel(
                f"pipeline parallel size {self.count} is above the {config.num_layers} layers of "
                f"{config.architecture}; use at most {config.num_layers} stages"
            )


WHOLE_MODEL = Stage()


class TensorParallelGroup:
    """One rank's view of its group. Collectives are called by every rank in the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not in a group of {size}")
        self.rank = rank
        self.size = size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; may reuse `tensor`."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Rank 0: the ranks' equal shapes [R, n] side by side, in rank order. The others get their own back."""
        return tensor

    def share(self, total: int) -> slice:
        """This rank's equal part of `total`; the last ranks' parts end early where it does not divide."""
        step = -(-total // self.size)
        return slice(min(total, self.rank * step), min(total, (self.rank + 1) * step))

    def experts(self, total: int) -> slice:
        """This rank's experts; where they do not divide, the first ranks have one more."""
        each, more = divmod(total, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def kv_heads(self, num_kv_heads: int) -> slice:
        """The KV heads this rank holds: an equal part, or one that it shares with neighbouring ranks."""
        if num_kv_heads >= self.size:
            return self.share(num_kv_heads)
        head = self.rank * num_kv_heads // self.size
        return slice(head, head + 1)

    def check(self, config: ModelConfig) -> None:
        """Refuse a group size that does not divide the model.

        Raises:
            UnsupportedModel: naming the dimension and the sizes that would fit.
        """
        dimensions = {"num_attention_heads": config.num_heads}
        most = 64
        for layer in config.layers:
            if layer.experts is None:
                dimensions["intermediate_size"] = config.intermediate_size
            else:
                most = min(most, layer.experts.num_experts)  # whole experts, at least one for each rank
        fits = [n for n in range(1, most + 1) if all(total % n == 0 for total in dimensions.values())]
        fits = [n for n in fits if config.num_kv_heads % n == 0 or n % config.num_kv_heads == 0]
        if self.size not in fits:
            shape = ", ".join(f"{name} {total}" for name, total in dimensions.items())
            raise UnsupportedModel(
                f"tensor parallel size {self.size} does not divide {config.architecture} ({shape}, "
                f"{config.num_kv_heads} KV heads); sizes that do: {', '.join(map(str, fits))}"
            )
