"""The package: the folder utils/ under a name of its own, with its rooms and examples/, which are found, not listed."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "advanced_dpo"

setup(
    packages=[PACKAGE, *(f"{PACKAGE}.{room}" for room in find_packages("utils")), f"{PACKAGE}.examples"],
    package_dir={PACKAGE: "utils", f"{PACKAGE}.examples": "examples"},
    package_data={
        "": ["*.yaml"],
        f"{PACKAGE}.examples": [
            str(path.relative_to("examples"))
            for path in Path("examples").glob("*/**/*")
            if path.is_file() and path.suffix != ".pyc"
        ],
    },
)
