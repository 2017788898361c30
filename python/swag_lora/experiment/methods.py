"""What the experiment compares, by the names that folders and results use."""

from __future__ import annotations

TITLES = {
    "map-last": "MAP, last",
    "map-best": "MAP, best validation",
    "temperature": "MAP, last, temperature",
    "swa": "SWA",
    "swag-diagonal": "SWAG, diagonal",
    "swag": "SWAG",
    "mc-dropout": "MC dropout",
    "ensemble": "Deep ensemble",
    "ensemble-best": "Deep ensemble, best validation",
    "multiswa": "MultiSWA",
    "multiswag": "MultiSWAG",
}
"""Method to its title, in the order of tables. The last four average over the seeds' fits, the others are each seed's."""

POOLED = frozenset({"ensemble", "ensemble-best", "multiswa", "multiswag"})
NEED_VALIDATION = frozenset({"map-best", "temperature", "ensemble-best"})
