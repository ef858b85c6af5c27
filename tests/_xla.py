"""Flags for programs compiled and run once: no optimization by LLVM, the quick emitters."""

import importlib.metadata

_VERSION = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])
# Tests compile much and compute little. The emitters that newer releases have alone take twice as
# long; the tests on Python 3.12, with the newest JAX, compile by those.
_OLD_EMITTERS = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
COMPILE_QUICKLY = " ".join(
    (
        "--xla_backend_optimization_level=0",
        *(_OLD_EMITTERS if _VERSION <= (0, 10) else ()),
    )
)
