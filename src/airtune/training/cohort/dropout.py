"""Dropout in front of A with one random stream per client: the draws are those of the readable twin.

The twin draws for a client's whole batch, [rows, tokens, in], layer by layer. So does this; where a batch is cut into
chunks, every chunk draws for the whole batch from the state at the beginning of the step and keeps its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from airtune.streams import torch_seed
from airtune.training.cohort.batches import Chunk, MicroBatch
from airtune.training.cohort.linear import Mask
from airtune.training.cohort.members import Member
from airtune.training.examples import Examples


@dataclass
class ClientDropout:
    """The generators of a block's clients; without dropout there are none.

    generators : of each client. states : of the generators at the beginning of the step. like : precision and device.
    """

    tokens: Examples
    like: Tensor
    generators: Sequence[torch.Generator]
    states: list[Tensor] = field(default_factory=list[Tensor])

    @staticmethod
    def of(members: Sequence[Member], tokens: Examples, seed: int, like: Tensor) -> ClientDropout:
        """Return the generators, seeded as the twin's."""
        if members[0].training.lora_dropout == 0.0:
            return ClientDropout(tokens, like, ())
        made = [torch.Generator(device=like.device) for _ in members]
        for generator, member in zip(made, members, strict=True):
            generator.manual_seed(torch_seed(seed, "lora-dropout", *member.where))
        return ClientDropout(tokens, like, made)

    def begin_step(self) -> None:
        """Remember where the generators stand."""
        self.states = [generator.get_state() for generator in self.generators]

    def mask_of(self, micro: MicroBatch, members: Sequence[Member], step: int) -> Mask | None:
        """Return the dropout of a micro-batch, None without."""
        if not self.generators:
            return None
        for chunk in micro.chunks:
            self.generators[chunk.member].set_state(self.states[chunk.member])

        def drop(slot: str, x: Tensor) -> Tensor:
            factors = torch.ones(x.shape, dtype=self.like.dtype, device=x.device)
            row = 0
            for chunk in micro.chunks:
                if slot in members[chunk.member].trained.factors:
                    kept = self._draw(chunk, members[chunk.member], step, x.shape[-1])
                    factors[row : row + len(chunk.rows), : kept.shape[1]] = kept[:, : x.shape[1]]
                row += len(chunk.rows)
            return x * factors.to(x.dtype)

        return drop

    def _draw(self, chunk: Chunk, member: Member, step: int, width: int) -> Tensor:
        """Return the chunk's part of the twin's draw, divided by the probability of keeping, [rows, tokens, width]."""
        batch = member.batches[step]
        longest = int(self.tokens.lengths[batch].max())
        keep = 1.0 - member.training.lora_dropout
        draw = torch.empty((len(batch), longest, width), dtype=self.like.dtype, device=self.like.device)
        draw.bernoulli_(keep, generator=self.generators[chunk.member])
        return draw[chunk.first : chunk.first + len(chunk.rows)] / keep
