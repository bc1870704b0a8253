"""What is a client's own, kept on the client: factors that it never sends, error feedback, the last model.

It lives in Flower's state of the run (`Context.state`), and in a folder of the device if it names one: Flower's state
ends with the run, also with one that the server's death has failed.

A client cannot know whether its update was used: the reply may come too late, or the server may die before it writes
its checkpoint. So it keeps the state after its last round *and* the one after the last round that the server has used,
which every message names. A reply that was dropped, or a round that is run again, then changes nothing, as in
simulation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Array, ArrayRecord, RecordDict

from airtune.deploy.flower.codec import blob
from airtune.deploy.jobs import Turn, pack_job, pack_turn, unpack_job, unpack_turn
from airtune.files import write_atomically
from airtune.types import ClientTask, Payload, ServerModel, TrainingJob

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "airtune-own"  # name in the state of the run
_MODEL = "model"
_NAME = re.compile(r"(model|memory-\d+)")


@dataclass(frozen=True)
class OwnState:
    """A client's own state.

    Attributes
    ----------
    state : Flower's, of this run and node; changed in place.
    folder : on the device's disk, of this experiment and client; None: there is none.
    """

    state: RecordDict
    folder: Path | None = None

    def memory(self, round_index: int) -> Mapping[str, Tensor] | None:
        """Return the private tensors after a round; empty for round 0; None: they are lost."""
        if round_index == 0:
            return {}
        content = self._get(_memory(round_index))
        return None if content is None else unpack_turn(content).memory

    def keep(self, round_index: int, used: int, memory: Mapping[str, Tensor]) -> None:
        """Keep the tensors after a round, and of the earlier ones only those after round `used`."""
        self._put(_memory(round_index), pack_turn(Turn(Payload({}, 0), memory, {})))
        wanted = {_MODEL, _memory(round_index), _memory(used)}
        for name in self._names() - wanted:
            self._drop(name)

    def model(self, otherwise: ServerModel) -> ServerModel:
        """Return the model of the last message; before the first one, the given one."""
        content = self._get(_MODEL)
        return otherwise if content is None else unpack_job(content).model

    def keep_model(self, model: ServerModel, task: ClientTask) -> None:
        """Keep the model of a message."""
        self._put(_MODEL, pack_job(TrainingJob(task, model, round=0)))

    # -- two places ---------------------------------------------------------------------------------------------------

    def _record(self) -> ArrayRecord:
        return self.state.array_records.get(RECORD, ArrayRecord())

    def _names(self) -> set[str]:
        names = set(self._record())
        if self.folder is not None and self.folder.is_dir():
            names |= {path.stem for path in self.folder.glob("*.safetensors") if _NAME.fullmatch(path.stem)}
        return names

    def _get(self, name: str) -> bytes | None:
        record = self._record()
        if name in record:
            return record[name].data
        path = self._path(name)
        return path.read_bytes() if path is not None and path.is_file() else None

    def _put(self, name: str, content: bytes) -> None:
        path = self._path(name)
        if path is not None:
            write_atomically(path, content)
        kept: dict[str, Array] = {key: self._record()[key] for key in self._record()}
        self.state[RECORD] = ArrayRecord({**kept, name: blob(content)})

    def _drop(self, name: str) -> None:
        path = self._path(name)
        if path is not None:
            path.unlink(missing_ok=True)
        record = self._record()
        self.state[RECORD] = ArrayRecord({key: record[key] for key in record if key != name})

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"


def _memory(round_index: int) -> str:
    return f"memory-{round_index}"
