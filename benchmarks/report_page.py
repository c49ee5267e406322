"""The picture of the report page: five recipes with two seeds on scikit-learn's digits, their page, and its top as PNG.

``python benchmarks/report_page.py`` takes about two minutes on 2 cores and writes docs/images/report.png; it needs
Chromium, playwright and pillow. Runs that are there from before are taken as they are.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path

from lowbit.report.page import write_report
from lowbit.train import TrainConfig
from lowbit.train.trainer import train

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "report.png"
RECIPES = ("fp32", "int8", "sbm8", "cpt", "dfq")
SIZE = {"width": 1180, "height": 1335}


def run_of(folder: Path, recipe: str, seed: int) -> Path:
    """A run in this folder, trained unless it is there."""
    out = folder / f"{recipe}-{seed}"
    if not (out / "result.json").exists():
        settings = {"model": "resnet20", "data": "digits", "epochs": 6, "batch_size": 64, "lr": 0.05, "threads": 1}
        train(TrainConfig(**settings, recipe=recipe, seed=seed, out=out))  # type: ignore[arg-type]
    return out


def photograph(page_file: Path, picture: Path) -> None:
    """The top of the page in light colours."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector("body[data-ready]")
        shot = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    picture.parent.mkdir(parents=True, exist_ok=True)
    shot.convert("RGB").save(picture, optimize=True)


def main() -> int:
    """Train what is missing, write the page and photograph it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/report-page"), help="where the runs are kept")
    folder = parser.parse_args().runs
    runs = [run_of(folder, recipe, seed) for recipe in RECIPES for seed in (0, 1)]
    write_report(runs, folder / "report.html")
    photograph(folder / "report.html", PICTURE)
    print(f"{folder / 'report.html'}\n{PICTURE}: {PICTURE.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
