"""doctor: what this machine and this installation have, for a bug report."""

from __future__ import annotations

import platform
from typing import Any

from holdfast.files import cache_dir


def command() -> None:
    """`holdfast doctor`: one line a fact. It speaks where torch does not work, too."""
    from holdfast.versions import versions

    facts: dict[str, Any] = dict(versions())
    facts["system"] = platform.platform()
    try:
        import torch

        facts["threads"] = torch.get_num_threads()
        facts["cpu"] = torch.backends.cpu.get_cpu_capability()
        facts["cuda"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
        from holdfast.engine.attention import said

        facts["attention"] = said(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as e:  # a broken installation is what a bug report is about
        facts["torch"] = f"{facts.get('torch', 'missing')}, does not work: {type(e).__name__}: {e}"
    facts["cache"] = str(cache_dir())
    for key, value in facts.items():
        print(f"{key:14} {value}")
