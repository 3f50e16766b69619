"""Mixed-precision, layer-wise post-training quantization of language models.

Importing lwquant also teaches transformers' from_pretrained to load what it saved.
"""

__version__ = "0.1.0"

from lwquant.export.load import register as _register

_register()

from lwquant.budget_sweep import sweep  # noqa: E402
from lwquant.errors import LwquantError  # noqa: E402
from lwquant.evaluation import evaluate, evaluate_tasks  # noqa: E402
from lwquant.export.convert import convert  # noqa: E402
from lwquant.export.hub import push_to_hub  # noqa: E402
from lwquant.nn.packed import compile_kernels, set_activation_bits  # noqa: E402
from lwquant.pipeline import Result, quantize  # noqa: E402
from lwquant.ratio_curves import ratio_curves  # noqa: E402
from lwquant.recipe import Recipe, load_recipe  # noqa: E402
from lwquant.scheme import QuantScheme  # noqa: E402
from lwquant.stages import measure_model, plan  # noqa: E402
from lwquant.types import BitPlan  # noqa: E402

__all__ = [
    "BitPlan",
    "LwquantError",
    "QuantScheme",
    "Recipe",
    "Result",
    "compile_kernels",
    "convert",
    "evaluate",
    "evaluate_tasks",
    "load_recipe",
    "measure_model",
    "plan",
    "push_to_hub",
    "quantize",
    "ratio_curves",
    "set_activation_bits",
    "sweep",
]
