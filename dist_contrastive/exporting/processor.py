"""What the processor has for products of 8-bit integers."""

import platform
from pathlib import Path

INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
"""Names of Linux for instructions that add up products of 8 bits in 32, the quicker first: x86 three, ARM two."""


def int8_instructions() -> str:
    """Those that this processor has and that int8 gains most from; empty where there are none, or none are known."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "asimddp"
    flags = _fields().get("flags", _fields().get("Features", "")).split()
    return next((name for name in INSTRUCTIONS if name in flags), "")


def processor_name() -> str:
    return _fields().get("model name", "") or platform.processor() or platform.machine()


def _fields() -> dict[str, str]:
    """The first processor's, as Linux tells them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    rows = (row.partition(":") for row in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in rows}
