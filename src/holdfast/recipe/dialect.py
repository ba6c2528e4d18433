"""YAML as recipes have it: 3e-4 is a number."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Safe loader that also reads 3e-4 as a number, as YAML 1.2 does."""


class Dumper(yaml.SafeDumper):
    """The same rule when writing, so that the text '3e-4' is quoted; never writes anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_EXPONENT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
