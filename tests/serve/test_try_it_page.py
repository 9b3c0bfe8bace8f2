"""A person tries a policy in a browser: uploads a picture, types a state, and sees the action chunk plotted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, browser
from PIL import Image
from replica_in_process import DIGEST, SPEC, served

from defi_platform.serve.observation import Observation


def colour_and_state(observations: Sequence[Observation]) -> list[np.ndarray]:
    """Actions: mean red, green and blue of the picture, and the first number of the state, rising by step."""
    found = []
    for each in observations:
        assert each.state is not None
        row = np.array([*each.images[0].mean(axis=(0, 1)), each.state[0]], np.float32)
        found.append(row + np.arange(SPEC.chunk, dtype=np.float32)[:, None])
    return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (on Debian: apt install chromium)")
def test_a_picture_is_uploaded_and_the_chunk_is_plotted(tmp_path: Path) -> None:
    Image.new("RGB", (120, 90), (200, 40, 7)).save(tmp_path / "red.png")
    with served(colour_and_state) as server, browser(tmp_path / "profile") as page:
        page.open(f"{server.http_url}/")
        page.wait_for("!document.getElementById('ask').disabled")
        assert DIGEST in page.run("document.getElementById('policy').textContent")
        page.choose_file("input[type=file]", tmp_path / "red.png")
        page.wait_for("document.querySelector('.camera img').src.startsWith('blob:')")
        page.run("document.querySelector('#state textarea').value = '3.5, 0, 0, 0'")
        page.run("document.getElementById('ask').click()")
        page.wait_for("!document.getElementById('answer').hidden")

        numbers = (
            "[...document.querySelectorAll('#numbers tr')].map(r => [...r.children].map(c => c.textContent))"
        )
        _, first, *rest = page.run(numbers)
        assert [float(cell) for cell in first] == [0, 200, 40, 7, 3.5]
        assert [float(cell) for cell in rest[-1]] == [9, 209, 49, 16, 12.5]
        assert page.run("document.querySelectorAll('#plot path').length") == 4
        assert page.run("document.querySelectorAll('#legend li').length") == 4
        # What is wrong is said on the page, by the server and by the page itself.
        for state, complaint in (("1, 2", "observation/state"), ("one", "is no number")):
            page.run(f"document.querySelector('#state textarea').value = '{state}'")
            page.run("document.getElementById('ask').click()")
            page.wait_for(f"document.getElementById('error').textContent.includes('{complaint}')")
        page.open(f"{server.http_url}/docs")
        page.wait_for("document.body.innerText.includes('/v1/act')")
        elsewhere = [url for url in page.requested if not url.startswith((server.http_url, "blob:", "data:"))]
        assert not elsewhere, "nothing is loaded from another host"
