"""How fast a device's link is, as its messages see it: three small questions, one of them large downwards, one upwards.

Flower moves the bytes before and after the app runs, so no app can time them. The server does: the time from message to
answer with `BYTES` in one direction, minus that of an empty question, is the time of these bytes. Flower polls every
three seconds, so a difference below that says only that the link is at least so fast, and that bound is reported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from airtune.deploy.flower.codec import PayloadError, from_record, to_record
from airtune.deploy.flower.facts import Facts

PROBE = "query.probe"
BYTES = 4_000_000  # [our choice]: 3 s at 11 Mbit/s
RESOLUTION = 3.0  # s, of Flower's polling
LARGEST = 64_000_000
_STEPS = ((0, 0), (BYTES, 0), (0, BYTES))  # bytes down, bytes up


@dataclass
class Probe:
    """The measurement of one device.

    Attributes
    ----------
    facts : what it said of itself. sent_at : s, of the open question. seconds : of the answered ones.
    """

    facts: Facts
    sent_at: float = 0.0
    seconds: list[float] = field(default_factory=list[float])

    @property
    def wanted(self) -> bool:
        """Return whether a rate is not known yet."""
        return self.facts.uplink_rate <= 0 or self.facts.downlink_rate <= 0

    @property
    def done(self) -> bool:
        """Return whether all questions are answered."""
        return len(self.seconds) == len(_STEPS)

    def question(self, now: float) -> RecordDict:
        """Return the next question, sent at `now`, s."""
        self.sent_at = now
        return question(*_STEPS[len(self.seconds)])

    def answered(self, now: float) -> None:
        """Note that the answer was there at `now`, s."""
        self.seconds.append(now - self.sent_at)

    def result(self) -> Facts:
        """Return the facts with the rates, bit/s; what the device gave itself stays."""
        empty, down, up = self.seconds
        rates = [8 * BYTES / max(seconds - empty, RESOLUTION) for seconds in (up, down)]
        return replace(
            self.facts,
            uplink_rate=self.facts.uplink_rate or rates[0],
            downlink_rate=self.facts.downlink_rate or rates[1],
        )


def question(down: int, up: int) -> RecordDict:
    """Return a question that carries `down` bytes and asks for `up`; the bytes are new, so that no copy is reused."""
    return RecordDict({"probe": ConfigRecord({"up": up}), "bytes": to_record({"bytes": _fresh(down)})})


def answer(content: RecordDict) -> RecordDict:
    """Return the answer of a device.

    Raises
    ------
    PayloadError : it is no such question, or asks for too much.
    """
    up = content.config_records.get("probe", ConfigRecord()).get("up")
    if type(up) is not int or not 0 <= up <= LARGEST:
        raise PayloadError("probe: up is not a possible number of bytes")
    from_record(content.array_records.get("bytes", {}))
    return RecordDict({"bytes": to_record({"bytes": _fresh(up)})})


def _fresh(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(os.urandom(count), dtype=np.uint8)
