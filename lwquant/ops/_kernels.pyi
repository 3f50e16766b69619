# The compiled module (csrc/bindings.cpp): addresses of contiguous CPU tensors, and their sizes.

class TiledLinear:
    def __init__(
        self,
        tiles: int,
        size: int,
        out_features: int,
        in_features: int,
        outlier_values: int,
        outlier_columns: int,
        wide_columns: bool,
        outlier_rows: int,
        n_outliers: int,
        /,
    ) -> None: ...
    def run(
        self,
        x: int,
        n_tokens: int,
        bias: int,
        activation_bits: int,
        n_threads: int,
        y: int,
        in_bf16: bool,
        /,
    ) -> bool: ...
    def takes_bf16(self, n_tokens: int, activation_bits: int, /) -> bool: ...
    def dequantize(self, row: int, n_rows: int, n_threads: int, out: int, /) -> None: ...

def tiles_size(
    out_features: int,
    in_features: int,
    scale_bytes: bool,
    zeros: bool,
    bits: int,
    group_size: int,
    /,
) -> int: ...
def make_tiles(
    codes: int,
    out_features: int,
    n_words: int,
    in_features: int,
    scales: int,
    scale_bytes: bool,
    n_groups: int,
    zeros: int,
    zero_bytes: bool,
    zero_width: int,
    bits: int,
    group_size: int,
    int8_weights: bool,
    n_threads: int,
    tiles: int,
    size: int,
    /,
) -> None: ...
def unmake_tiles(
    tiles: int,
    size: int,
    out_features: int,
    in_features: int,
    n_threads: int,
    codes: int,
    scales: int,
    zeros: int,
    /,
) -> None: ...
def dequantize(
    codes: int,
    out_features: int,
    n_words: int,
    in_features: int,
    scales: int,
    scale_bytes: bool,
    n_groups: int,
    zeros: int,
    zero_bytes: bool,
    zero_width: int,
    bits: int,
    group_size: int,
    outlier_values: int,
    outlier_columns: int,
    wide_columns: bool,
    outlier_rows: int,
    n_outliers: int,
    row: int,
    n_rows: int,
    n_threads: int,
    out: int,
    /,
) -> None: ...
def pack(codes: int, rows: int, n_codes: int, bits: int, words: int, /) -> None: ...
def unpack(words: int, rows: int, n_words: int, bits: int, n_codes: int, codes: int, /) -> None: ...
def weights_rounded_to(
    bits: int,
    int8_weights: bool,
    n_tokens: int,
    activation_bits: int,
    bf16_inputs: bool,
    /,
) -> str: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def gpu_tokens(activation_bits: int) -> int: ...

class GpuKernels:
    def __init__(
        self,
        code: bytes,
        device_index: int,
        bits: int,
        activation_bits: int,
        span_blocks: int,
        n_multiprocessors: int,
        /,
    ) -> None: ...

class GpuLayer:
    def __init__(
        self, header: bytes, tiles: int, size: int, out_features: int, in_features: int, /
    ) -> None: ...
    @property
    def bits(self) -> int: ...
    @property
    def span_blocks(self) -> int: ...
    def workspace_bytes(self, kernels: GpuKernels, n_tokens: int, /) -> int: ...
    def multiply(
        self,
        kernels: GpuKernels,
        x: int,
        x_type: int,
        n_tokens: int,
        bias: int,
        bias_type: int,
        y: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
        /,
    ) -> None: ...
    def dequantize(self, kernels: GpuKernels, out: int, out_type: int, stream: int, /) -> None: ...

class GpuRounding:
    def __init__(self, code: bytes, /) -> None: ...
    def round_block(
        self,
        targets: int,
        n_columns: int,
        n_rows: int,
        feedback: int,
        stride: int,
        base: int,
        scales: int,
        zeros: int,
        max_code: float,
        errors: int,
        stream: int,
        /,
    ) -> None: ...
