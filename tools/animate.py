"""Record the film of a generated text as an animated GIF, for the top of the README.

    python -m nanomoe.sample out/onboard --film=True --start '742 in words is' --max_new_tokens 24 \\
        --temperature 0.6 --seed 2
    cp out/onboard/film.json assets/film.json     # which the site plays
    python tools/animate.py assets assets/film.gif

Needs chromium on the PATH.
"""

import io
import shutil
import sys
from pathlib import Path

import PIL.Image
from playwright.sync_api import sync_playwright

from nanomoe.film import read_film
from nanomoe.report import film_of_run, page
from nanomoe.viz import in_palette

MILLISECONDS = 450  # of a picture


def pictures(film: dict, html: str) -> list[PIL.Image.Image]:
    "The first two new tokens layer by layer, then a picture for each token."
    with sync_playwright() as p:
        arguments = ['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu']
        browser = p.chromium.launch(executable_path=shutil.which('chromium'), args=arguments)
        tab = browser.new_page(viewport={'width': 1080, 'height': 700})
        tab.set_content(html)
        tab.add_style_tag(
            content='.film-controls, .film-words { display: none !important } body { margin: 8px }'
        )
        taken, first, end = [], film['n_prompt'] - 1, len(film['layers']) + 1
        for token in range(first, len(film['frames'])):
            for lit in range(0 if token < first + 2 else end, end + 1):
                tab.evaluate(f'document.querySelector(".film").go({token}, {lit})')
                taken.append(PIL.Image.open(io.BytesIO(tab.locator('.film').screenshot())).convert('RGB'))
        browser.close()
    return taken


def main():
    folder, target = map(Path, sys.argv[1:])
    html = page('', film_of_run(folder))
    first, *rest = map(in_palette, pictures(read_film(folder / 'film.json'), html))
    first.save(target, save_all=True, append_images=rest, duration=MILLISECONDS, loop=0, optimize=True)
    print(f'{target}: {1 + len(rest)} pictures, {target.stat().st_size / 1e6:.2f} MB')


if __name__ == '__main__':
    main()
