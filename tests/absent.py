"""The command line as it is where some packages are not installed: python absent.py gguf,datasets tune recipe.yaml"""

import importlib.machinery
import sys


def hide(packages: set[str]) -> None:
    """From here on nothing finds `packages` (names of imports): neither import nor find_spec."""

    class Without(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            if fullname.partition(".")[0] in packages:
                return None
            return super().find_spec(fullname, path, target)

    packages -= set(sys.modules)  # what the interpreter itself starts with
    sys.meta_path[:] = [Without if f is importlib.machinery.PathFinder else f for f in sys.meta_path]


if __name__ == "__main__":
    hide(set(sys.argv[1].split(",")))
    if sys.argv[2] == "-c":
        exec(sys.argv[3])
    else:
        from holdfast.cli import main

        sys.argv = ["holdfast", *sys.argv[2:]]
        main()
