"""The book about one's own server: the pages of ``book/own_server``, framed like the others, over a folder of logs."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from stepcal.experiments.engine_args import CONFIG_NAMES
from stepcal.ingest import MANIFEST
from stepcal.locations import shipped_folder

PAGES = "book/own_server"
_NOT_OF_THIS_BOOK = ("bibtex_bibfiles",)


def is_own_server(folder: Path) -> bool:
    """Tell whether a folder holds somebody's own runs: what `stepcal ingest` wrote, or runs with their settings.

    The public traces (``requests/requests.parquet``) are neither.
    """
    has_runs = (folder / MANIFEST).is_file() or any(any(folder.glob(f"*/{name}")) for name in CONFIG_NAMES)
    return has_runs and not (folder / "requests" / "requests.parquet").is_file()


def own_root(place: Path) -> Path:
    """Put the sources of the own-server book together in a folder, as the build expects those of a checkout.

    Parameters
    ----------
    place : Path
        Made anew.

    Returns
    -------
    Path
    """
    shipped = shipped_folder()
    shutil.rmtree(place, ignore_errors=True)
    (place / "book").mkdir(parents=True)
    config = yaml.safe_load((shipped / "_config.yml").read_text(encoding="utf-8"))
    config = {k: v for k, v in config.items() if k not in _NOT_OF_THIS_BOOK}
    config["title"] = "stepcal: your server"
    settings = config["sphinx"]["config"]
    settings["html_title"] = "stepcal: your server"
    settings["extensions"] = [e for e in settings["extensions"] if e != "sphinxcontrib.bibtex"]
    config["sphinx"]["config"] = {k: v for k, v in settings.items() if not k.startswith("bibtex")}
    (place / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    shutil.copy(shipped / PAGES / "toc.yml", place / "_toc.yml")
    shutil.copytree(shipped / "book" / "_static", place / "book" / "_static")
    for page in sorted((shipped / PAGES).glob("*.ipynb")):
        shutil.copy(page, place / "book" / page.name)
    return place
