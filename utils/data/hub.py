"""Data sets of the hub, and the message where it has none, or cannot be reached."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from ..errors import UserError, in_one_line
from .row_cache import find_system_fault, know_by_content, make_scratch

ANEW = "reuse_cache_if_exists"  # the library's word for: make the tables again from what was downloaded


def open_hub(name: str, config: str | None) -> Mapping[str, datasets.Dataset]:
    """All splits of a hub dataset, from the hub or from the local cache of an earlier download.

    Raises UserError where the local copy is damaged and cannot be made again.
    """
    splits = load_hub(name, config)
    if know_by_content(splits):
        splits = load_hub(name, config, download_mode=ANEW)
        if damaged := know_by_content(splits):
            raise UserError(
                f"--dataset_name {name}: its copy in the cache is damaged; remove {damaged.parent}, and start again "
                "with the network on"
            )
    return splits


def load_hub(name: str, config: str | None, **options: Any) -> Mapping[str, Any]:
    """Split name -> rows of a hub dataset, as the library gives them. Raises UserError for whatever it refuses."""
    flag = f"--dataset_name {name}"
    try:
        return datasets.load_dataset(name, config, **options)
    except pa.ArrowException as error:
        if "download_mode" in options:
            raise UserError(f"{flag}: its copy in the cache is damaged ({in_one_line(error)}); remove it") from None
        return load_hub(name, config, **options, download_mode=ANEW)
    except DatasetNotFoundError as error:
        raise UserError(_describe_missing(flag, name, is_gated="gated" in str(error))) from None
    except ConnectionError as error:
        raise UserError(_describe_unreached(flag, error)) from None
    except HfHubHTTPError as error:
        raise UserError(
            f"{flag}: the Hugging Face Hub answered: {in_one_line(error)}; try again, run hf auth login, or give a "
            "local file or folder"
        ) from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{flag}: needs its own Python loading script, which the datasets library no longer runs; download its "
            "data files and give their folder"
        ) from None
    except ValueError as error:
        raise UserError(describe_config_fault(config, flag, error)) from None
    except (DatasetsError, FileNotFoundError) as error:
        if (fault := find_system_fault(error.__cause__)) and "cache_dir" not in options:
            return load_hub(name, config, **options, cache_dir=str(make_scratch(fault)))
        raise UserError(f"{flag}: has no readable data ({in_one_line(error.__cause__ or error)})") from None
    except OSError as error:
        if error.errno is None and "download_mode" not in options:  # a table that is cut off
            return load_hub(name, config, **options, download_mode=ANEW)
        if error.errno is not None and "cache_dir" not in options:
            return load_hub(name, config, **options, cache_dir=str(make_scratch(error)))
        raise UserError(
            f"{flag}: cannot be written to the disk ({in_one_line(error)}); make room, or set HF_HOME"
        ) from None


def _describe_missing(flag: str, name: str, is_gated: bool) -> str:
    if is_gated:
        return (
            f"{flag}: gated on the Hugging Face Hub; accept its terms at https://huggingface.co/datasets/{name}, "
            "then run hf auth login"
        )
    return (
        f"{flag}: no such path here, and the Hugging Face Hub has no such dataset that you can access; check the "
        "spelling, run hf auth login for a private one, or give a local file or folder"
    )


def _describe_unreached(flag: str, error: ConnectionError) -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") or "OfflineMode" in str(error)
    state = "offline mode is on (HF_HUB_OFFLINE)" if offline else "it could not be reached; check the network"
    return (
        f"{flag}: no such path here and not in the local cache; looked for on the Hugging Face Hub, but {state}. "
        "Or give a local file or folder"
    )


def describe_config_fault(config: str | None, flag: str, error: ValueError) -> str:
    """The library's complaint about configurations in one line; the error itself when it is about something else."""
    text = str(error)
    listed = re.search(r"\[[^\]]*\]", text)
    if listed and ("BuilderConfig" in text or "Config name" in text):
        names = ", ".join(re.findall(r"['\"]([^'\"]+)['\"]", listed[0]))
        if config is None:
            return f"{flag}: has several configurations; choose one with --dataset_config: {names}"
        return f"--dataset_config {config}: {flag.partition(' ')[2]} has no such configuration; it has: {names}"
    return f"{flag}: cannot be read ({in_one_line(error)})"
