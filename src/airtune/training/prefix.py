"""Activations of the frozen lowest layers, kept from round to round.

Where nothing but the frozen base acts in the first k layers, what a sample looks like at the input of layer k never
changes: it is computed once and serves every round, client, run and evaluation on this base. A sample's states are
computed from the sample alone, without padding. So they depend neither on the batch in which it is first seen nor on
what the cache holds, and a resumed run, whose cache begins empty, gets the same bits as the uninterrupted one. Against
the ordinary forward pass, whose matrix products see whole batches, the difference is rounding.

This saves time of the machine that simulates. The virtual clock charges devices the whole forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from airtune.errors import InputError
from airtune.lora import Adapter, LoraFactors
from airtune.training.inputs import Arguments, NetworkInputs
from airtune.training.shapes import linear_layers, stack_name

Forward = Callable[[Arguments], Any]
_LOG = logging.getLogger(__name__)


class FrozenPrefix:
    """The states at the input of a layer, by sample, and how the network runs from there on.

    Attributes
    ----------
    limit : bytes of the states and of what names them (token numbers, or a hash of the pixels).
    depth : number of layers, from the input, in which only the frozen base acts; with none, or with all, nothing is
        skipped (before the first round no adapter acts anywhere, and states at that depth are not asked for again).
    bytes : held now. hits, computed, dropped : samples whose states were there, were computed, and did not fit.
    """

    def __init__(self, network: nn.Module, config_json: Mapping[str, Any], limit: float) -> None:
        """Prepare an empty cache for a network of this config.json.

        Raises
        ------
        InputError : the network has no such list, or no byte may be held.
        """
        if not limit > 0:
            raise InputError(f"training.prefix_cache: {limit:g} B holds nothing; valid: a positive size, or none")
        self.limit = limit
        self.depth = 0
        self.bytes = self.hits = self.computed = self.dropped = 0
        self._network = network
        self._layers = _layers(network, stack_name(config_json))
        self._places = {layer.name: layer.layer for layer in linear_layers(config_json)}
        self._states: dict[tuple[int, bytes], Tensor] = {}
        self._tuples = False  # whether layers return tuples
        self._told = False  # whether a changed prefix has been logged

    def look(self, touched: Collection[str], frozen: Adapter, merged: Mapping[str, LoraFactors]) -> None:
        """Find `depth` for an adapter that has just been put onto the base.

        touched : modules with something that is trained. frozen, merged : what else is there; a zero does not act.
        """
        trained = {self._places[module] for module in touched}
        acting = set(trained)
        for module, slots in frozen.placement.items():
            acting |= {self._places[module]} if _act([frozen.factors[slot] for slot in slots]) else set()
        acting |= {self._places[module] for module, factors in merged.items() if _act([factors])}
        self.depth = min(acting, default=len(self._layers))
        if trained and self.depth < min(trained) and not self._told:
            self._told = True
            _LOG.warning(
                "training.prefix_cache: layers below the lowest trained one (%d) have changed from layer %d on; only "
                "states of the %d layers below that are stored (legend: outside = absent keeps them all)",
                min(trained),
                self.depth,
                self.depth,
            )

    @contextmanager
    def skipping(self, forward: Forward, inputs: NetworkInputs, arguments: Arguments) -> Generator[None]:
        """Let the first `depth` layers give the stored states of these samples instead of computing.

        Parameters
        ----------
        forward : runs the network.
        inputs : tells the rows of a batch apart. arguments : of the network for the batch, padded on the right.

        Raises
        ------
        InputError : the base's own dropout is on, so that a sample's states are drawn anew each time.
        """
        if self._network.training:
            raise InputError(
                "training.prefix_cache: training.base_dropout changes the prefix in every step; "
                "valid: base_dropout = false, or prefix_cache = none"
            )
        if not 0 < self.depth < len(self._layers):
            yield
            return
        hidden = self._of_batch(forward, inputs, arguments)
        passing = self._layers[: self.depth]
        try:
            for layer in passing[:-1]:
                layer.forward = self._passed_on
            passing[-1].forward = lambda *_, **__: self._returned(hidden)
            yield
        finally:
            for layer in passing:
                layer.__dict__.pop("forward", None)

    def _passed_on(self, *args: Any, **named: Any) -> Any:
        """Stand in for a layer: return its input."""
        return self._returned(args[0] if args else named["hidden_states"])

    def _returned(self, hidden: Tensor) -> Any:
        return (hidden,) if self._tuples else hidden

    def _of_batch(self, forward: Forward, inputs: NetworkInputs, arguments: Arguments) -> Tensor:
        """Return the states [batch, tokens, width] of a batch, zero at the padding, which nothing attends to."""
        states = [self._of(forward, name, row) for name, row in inputs.rows(arguments)]
        hidden = nn.utils.rnn.pad_sequence(states, batch_first=True)
        missing = (inputs.places(arguments) or hidden.shape[1]) - hidden.shape[1]
        return nn.functional.pad(hidden, (0, 0, 0, missing))

    def _of(self, forward: Forward, name: bytes, row: Arguments) -> Tensor:
        """Return the states [tokens, width] of one sample."""
        key = (self.depth, name)
        if key in self._states:
            self.hits += 1
            return self._states[key]
        states = self._compute(forward, row)
        self.computed += 1
        size = states.numel() * states.element_size() + len(key[1])
        if self.bytes + size <= self.limit:
            self._states[key] = states
            self.bytes += size
        else:
            self._drop()
        return states

    def _drop(self) -> None:
        if not self.dropped:
            _LOG.warning(
                "training.prefix_cache: full with %d samples in %.0f of %.0f MB; the states of further samples are "
                "dropped and computed again each time",
                len(self._states),
                self.bytes / 1e6,
                self.limit / 1e6,
            )
        self.dropped += 1

    def _compute(self, forward: Forward, row: Arguments) -> Tensor:
        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _LayerReachedError(output)

        handle = self._layers[self.depth - 1].register_forward_hook(stop)
        try:
            with torch.inference_mode(False), torch.no_grad():
                forward({name: value.clone() for name, value in row.items()})
        except _LayerReachedError as reached:
            self._tuples = isinstance(reached.output, tuple)
            return (reached.output[0] if self._tuples else reached.output)[0].clone()
        finally:
            handle.remove()
        raise RuntimeError(f"the network does not run its layer {self.depth - 1}")


class _LayerReachedError(Exception):
    """Ends a forward pass at a layer's output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _act(parts: Sequence[LoraFactors]) -> bool:
    """Return whether the product of any of the parts may be other than zero."""
    return any(all(bool(t.any()) for t in (f.A, f.B, f.core) if t is not None) for f in parts)


def _layers(network: nn.Module, stack: str) -> list[nn.Module]:
    try:
        found = network.get_submodule(stack)
    except AttributeError:
        found = None
    if not isinstance(found, nn.ModuleList):
        kind = type(network).__name__
        raise InputError(
            f"training.prefix_cache: {kind} has no plain list of layers {stack!r}; valid: prefix_cache = none"
        )
    return list(found)
