"""What loads a published folder, in lwquant's own format or in another."""

from __future__ import annotations

from lwquant.errors import OutputError
from lwquant.export.dialects import DIALECTS, Loader
from lwquant.export.format import QUANT_METHOD

OWN = Loader(
    quant_method=QUANT_METHOD,
    library="transformers",
    install="lwquant",
    usage="""import lwquant  # lets transformers read the packed weights
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
)


def loader_of(format: str) -> Loader:
    """By the format that a run record names; OutputError for one that is not known."""
    if format == QUANT_METHOD:
        return OWN
    if format not in DIALECTS:
        raise OutputError(f"the run record says format {format!r}, which is not known")
    return DIALECTS[format].loader
