"""What other engines call the tensors of a quantized linear, and how their config.json says it."""

from collections.abc import Mapping

from lwquant.export.dialects.compressed_tensors import CompressedTensors
from lwquant.export.dialects.dialect import Dialect as Dialect
from lwquant.export.dialects.dialect import Loader as Loader
from lwquant.export.dialects.dialect import StoredLinear as StoredLinear
from lwquant.export.dialects.gptq import Gptq
from lwquant.export.dialects.mlx import Mlx

DIALECTS: Mapping[str, Dialect] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": Gptq(),
    "mlx": Mlx(),
}
