"""What a result folder says of itself: bits and cost of every linear."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lwquant.export.folder import verify
from lwquant.export.record import LinearRecord, RunRecord, read_run


@dataclass(frozen=True)
class Inspection:
    record: RunRecord

    @property
    def linears(self) -> dict[str, LinearRecord]:
        return dict(self.record.linears)

    def to_json(self) -> dict[str, Any]:
        """The keys that `lwquant inspect --json` prints."""
        return {
            "bpw": self.record.bpw,
            "size_bytes": self.record.size_bytes,
            "decode_bytes": self.record.decode_bytes,
            "decode_us": self.record.decode_us,
            "base_model": self.record.base_model,
            "metric": dict(self.record.metric),
            "notes": list(self.record.notes),
            "linears": {
                name: {
                    **asdict(linear.scheme),
                    "metric_cost": linear.cost,
                    "activation_bits": linear.activation_bits,
                    "int8_weights": linear.int8_weights,
                }
                for name, linear in self.record.linears.items()
            },
        }


def inspect_folder(folder: str | Path) -> Inspection:
    """Read and verify a result folder; OutputError when it is incomplete or changed."""
    verify(folder)
    return Inspection(read_run(Path(folder)))
