"""MoLE (Wu et al., ICLR 2024, arXiv 2404.13628): several LoRAs act in every layer, weighted by gates that are learned.

With experts ``E_i(x) = s_i B_i A_i x`` an adapted linear layer computes ``W x + sum_i g_i E_i(x)``. The gates g are one
softmax per text and transformer layer, shared by the layer's linear layers. As in the paper they are computed from what
the experts put out, normalised, concatenated and multiplied by a matrix e, over a temperature that is learned, too:

    o = concat_i E_i(mean of x over the text's tokens)          at the layer's first adapted linear layer
    g = softmax(e (o / sqrt(mean(o^2) + 1e-6)) / n / exp(t))    e [experts, n], n = experts * out, t the log temperature

Departures [our choice]. The paper runs each layer once per expert and flattens all of its tokens, so that e has a fixed
text length in it and a hundred times the size; here the linear layers' outputs are gated, and tokens are averaged,
padding left out. Both e and t start at zero: equal gates. The normalisation is by the root mean square, and a score is
a mean over the n values, not a sum: Adam moves each value of e by the learning rate, which moves a score by no more
than that, whatever the width. With the sum it would be n times as much, and gates are at 0 or 1 after some steps.

Experts that a client does not hold are left out, of n as well, and the others' gates sum to one, as the paper does at
inference. An expert alone has the gate 1: it is plain LoRA, and that is how it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from airtune.lora import Adapter, AdapterShape, LoraFactors
from airtune.training.gates import experts_of, gate_names, gated_modules
from airtune.training.shapes import placement_of

FLOOR = 1e-6  # under the root of the normalisation, as that of layer norms: experts that put out nothing have no say


@dataclass
class Text:
    """Which tokens of the batch that is computed now are text, [batch, tokens]; None: all."""

    mask: Tensor | None = None


@dataclass
class Router:
    """The gates of one transformer layer during one client's activity.

    Attributes
    ----------
    weight : e, [experts, experts * out]. log_temperature : t, [1]. Both leaves.
    experts : expert -> the factors that make up its output at the layer's first adapted module.
    present : the experts that act anywhere in the layer, increasing.
    text : the mask of the present batch.
    now : [batch, experts], the gates of the present batch, zero for absent experts; None before they are computed.
    """

    weight: Tensor
    log_temperature: Tensor
    experts: Mapping[int, Sequence[LoraFactors]]
    present: Sequence[int]
    text: Text
    now: Tensor | None = field(default=None)

    def look(self, x: Tensor) -> None:
        """Compute the gates of a batch from the module's input, [batch, tokens, in], in the adapter's precision."""
        with torch.autocast(x.device.type, enabled=False):
            pooled = self._mean(x.to(self.weight.dtype))
            outputs = pooled.new_zeros((len(pooled), len(self.weight), self.weight.shape[1] // len(self.weight)))
            for expert, parts in self.experts.items():
                outputs[:, expert] = sum((part.times(pooled.T).T for part in parts), start=outputs[:, expert])
            count = len(self.present) * outputs.shape[2]
            scale = (outputs.square().sum(dim=(1, 2), keepdim=True) / count + FLOOR).sqrt()
            scores = (outputs / scale).flatten(1) @ self.weight.T / count * torch.exp(-self.log_temperature)
            held = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            held[list(self.present)] = True
            self.now = torch.softmax(scores.masked_fill(~held, -torch.inf), dim=1)

    def gate(self, expert: int, output: Tensor) -> Tensor:
        """Return an expert's output, [batch, tokens, out], times its gate."""
        if self.now is None:
            raise RuntimeError("a gated module came before the one at which its layer's gates are computed")
        return output * self.now[:, expert].to(output.dtype).view(-1, *[1] * (output.ndim - 1))

    def _mean(self, x: Tensor) -> Tensor:
        """Return the mean of x over the tokens of each text, [batch, in]."""
        if self.text.mask is None:
            return x.mean(dim=1)
        mask = self.text.mask.to(x)[:, :, None]
        return (x * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


class Gated(nn.Module):
    """``g_i B x`` where PEFT expects B."""

    def __init__(self, columns: nn.Module, router: Router, expert: int) -> None:
        """Put the layer of B and its gate into the module."""
        super().__init__()
        self.columns = columns
        self.router = router
        self.expert = expert

    @property
    def weight(self) -> Any:
        """Return B: PEFT reads its type."""
        return self.columns.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated rows of B x."""
        return self.router.gate(self.expert, self.columns(x))


@dataclass(frozen=True)
class Gating:
    """Where gates act: names that follow from the adapter's shape.

    modules : layer -> the module at whose input its gates are computed. layer : module -> its transformer layer.
    expert : slot -> its expert.
    """

    modules: Mapping[int, str]
    layer: Mapping[str, int]
    expert: Mapping[str, int]

    def install(
        self,
        network: nn.Module,
        layers: Mapping[str, LoraLinear],
        adapters: Sequence[Adapter],
        extras: Mapping[str, Any],
    ) -> tuple[tuple[Router, ...], list[RemovableHandle]]:
        """Gate the parts that have just been put into the PEFT layers, until the handles are removed.

        adapters : what is there, in the order of the parts of every layer. extras : of the client, gates included.
        """
        text = Text()
        routers = {layer: self._router(layer, adapters, extras, text) for layer in self.modules}
        for module, lora in layers.items():
            slots = [slot for adapter in adapters for slot in adapter.placement.get(module, ())]
            columns: Any = lora.lora_B
            for index, slot in enumerate(slots):
                name = f"part{index}"
                columns[name] = Gated(columns[name], routers[self.layer[module]], self.expert[slot])
        active = {layer: router for layer, router in routers.items() if router.present}
        handles = [network.register_forward_pre_hook(_reader(text, tuple(active.values())), with_kwargs=True)]
        handles += [_watch(layers[self.modules[layer]], router) for layer, router in active.items()]
        return tuple(active.values()), handles

    def _router(self, layer: int, adapters: Sequence[Adapter], extras: Mapping[str, Any], text: Text) -> Router:
        first, present = dict[int, list[LoraFactors]](), set[int]()
        for adapter in adapters:
            for module, slots in adapter.placement.items():
                for slot in slots if self.layer[module] == layer else ():
                    present.add(self.expert[slot])
                    if module == self.modules[layer]:
                        first.setdefault(self.expert[slot], []).append(adapter.factors[slot])
        weight, temperature = gate_names(layer)
        return Router(extras[weight], extras[temperature], first, sorted(present), text)


def gating_of(shape: AdapterShape) -> Gating:
    """Return where the gates of a whole adapter of this shape act."""
    layer = {module: slot.layer for slot in shape.slots.values() for module in slot.modules}
    return Gating(gated_modules(shape.slots), layer, experts_of(placement_of(shape)))


def balance(routers: Sequence[Router]) -> Tensor:
    """Return the paper's ``-sum_i log q_i`` of the last batch, q_i the mean gate of expert i over texts and layers.

    Experts that are not there are left out; so is a layer in which nothing acts. Least where all q_i are equal.
    """
    gates = [router.now.mean(dim=0) for router in routers if router.now is not None]
    held = sorted({expert for router in routers for expert in router.present})
    return -torch.stack(gates).mean(dim=0)[held].log().sum()


def _watch(layer: LoraLinear, router: Router) -> RemovableHandle:
    return layer.register_forward_pre_hook(lambda _, inputs: router.look(inputs[0]))


def _reader(text: Text, routers: Sequence[Router]) -> Any:
    """Return a hook that reads the mask of the batch that comes in, and forgets the gates of the last one."""

    def read(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        text.mask = named.get("attention_mask")
        for router in routers:
            router.now = None

    return read
