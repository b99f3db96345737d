"""The pages in a real browser: what mouse and keys show, at two widths, and that nothing is asked of the network."""

import json

import pytest
from browser import FOUND, Browser
from credit_cases import HOSTILE, PIXEL, record, rollout

from srpo.viz import append_records, credit_html
from srpo.viz.report import run_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason="no Chromium here: apt-get install chromium"),
]
WIDTHS = (360, 1400)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def opened(browser: Browser, page, folder, width: int) -> None:
    browser.open(page.save(folder / "page.html").as_uri(), width)


def tip(browser: Browser) -> str | None:
    return browser.value("document.getElementById('tip').hidden ? null : document.getElementById('tip').innerText")


def background(browser: Browser, selector: str) -> str:
    return browser.value(f"getComputedStyle(document.querySelector({json.dumps(selector)})).backgroundColor")


@pytest.mark.parametrize("width", WIDTHS)
def test_mouse_switch_and_keys(browser, width, tmp_path):
    made = record(
        ("one", " two", " three"), weights=(0.8, 1.0, 1.25), roles=(1, 2, 0), logps=(-0.5, -1.0, -2.0),
        corrupted_logps=(-1.75, None, None), ablated_logps=(None, -3.0, None), contrast=(1.25, 2.0, None),
        advantage=-2.0, reward=1.0, images=(PIXEL,), corrupted_images=(PIXEL,),
    )  # fmt: skip
    opened(browser, credit_html([made, record(("x",), reward=2.0)]), tmp_path, width)
    assert tip(browser) is None
    browser.point_at("[data-rollout='1'] > :nth-child(1)")
    for fact in ("one", "token 1 of 3", "perception", "+1.250", "−0.500", "−1.750", "–", "0.800", "−1.600"):
        assert fact in tip(browser), fact
    shaded = background(browser, "[data-rollout='1'] > :nth-child(1)")

    browser.point_at("label:has([value=grpo])", click=True)
    assert background(browser, "[data-rollout='1'] > :nth-child(1)") != shaded
    browser.point_at("[data-rollout='1'] > :nth-child(3)")
    assert "1.000" in tip(browser)
    assert "−2.000" in tip(browser)
    browser.point_at("label:has([value=weights])", click=True)
    assert background(browser, "[data-rollout='1'] > :nth-child(1)") == shaded

    browser.press("Tab")
    browser.press("Tab")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.value("document.activeElement.textContent") == " two"
    assert "token 2 of 3" in tip(browser)
    assert "−3.000" in tip(browser)
    browser.press("End")
    assert "token 3 of 3" in tip(browser)
    browser.press("Escape")
    assert tip(browser) is None
    assert browser.complaints() == []


@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_and_long_completions(browser, width, tmp_path):
    tokens = (*HOSTILE * 40, "x" * 200_000, *(" y" for _ in range(2000)))
    text = "".join(HOSTILE)
    page = credit_html([record(tokens, prompt=text * 9, answer=text, reward=1.0), rollout(2048)], title=text)
    opened(browser, page, tmp_path, width)
    assert browser.value("document.querySelectorAll('article').length") == 2
    assert browser.value("document.querySelectorAll('.tokens > span').length") == len(tokens) + 2048
    assert browser.value("document.documentElement.scrollWidth") <= width
    browser.point_at(f"[data-rollout='0'] > :nth-child({len(tokens)})")
    assert f"token {len(tokens)} of {len(tokens)}" in tip(browser)
    box = browser.value(
        "(r => [r.left, r.right, r.top, r.bottom])(document.getElementById('tip').getBoundingClientRect())"
    )
    assert box[0] >= 0
    assert box[1] <= width
    assert box[2] >= 0
    assert box[3] <= 900
    assert browser.complaints() == []


def test_four_completions_of_2048_tokens_stay_fast(browser, tmp_path):
    opened(browser, credit_html([rollout(2048, seed) for seed in range(4)]), tmp_path, 1400)
    nodes = browser.value("document.querySelectorAll('*').length")
    assert nodes < 4 * 2048 + 200  # none a token beside the token
    moved = "(tokens => { const start = performance.now(); for (let i = 0; i < tokens.length; i += 64) "
    moved += "tokens[i].dispatchEvent(new PointerEvent('pointerover', {bubbles: true})); "
    moved += "return (performance.now() - start) / (tokens.length / 64) })(document.querySelectorAll('.tokens > span'))"
    assert browser.value(moved) < 100  # ms a token; 5 here
    assert browser.value("document.querySelectorAll('*').length") < nodes + 40


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_shade(browser, scheme, tmp_path):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    weights = (0.8, 0.9, 1.0, 1.1, 1.25)
    opened(browser, credit_html(record(tuple("abcde"), weights=weights)), tmp_path, 1400)
    ink = browser.value("getComputedStyle(document.querySelector('.tokens > span')).color")
    card = background(browser, "article")
    for place in range(1, 6):
        ground = over(background(browser, f".tokens > :nth-child({place})"), card)
        assert contrast(channels(ink)[:3], ground) > 4.5
    browser.call("Emulation.setEmulatedMedia", features=[])


def test_the_report(browser, tmp_path):
    credit = tmp_path / "credit"
    credit.mkdir()
    append_records(credit / "rollouts.jsonl", [rollout(30), record(HOSTILE, parsed=False)])
    rows = [f'{{"step": {s}, "reward": {s / 9}, "srpo/parse_failures": 0.5}}' for s in range(9)]
    (credit / "metrics.jsonl").write_text("\n".join(rows))
    for width in WIDTHS:
        opened(browser, run_report(tmp_path).page, tmp_path, width)
        assert browser.value("document.querySelectorAll('.plot').length") == 2
        assert browser.value("document.documentElement.scrollWidth") <= width
        browser.point_at("[data-rollout='1'] > :nth-child(1)")
        assert f"of {len(HOSTILE)}" in tip(browser)
        assert browser.complaints() == []


def channels(color: str) -> list[float]:
    """The numbers of `rgb(...)` and `rgba(...)`."""
    return [float(x) for x in color[color.index("(") + 1 : -1].replace("/", ",").replace(" ", "").split(",") if x]


def over(color: str, ground: str) -> list[float]:
    *top, alpha = [*channels(color), 1.0][:4]
    return [alpha * a + (1 - alpha) * b for a, b in zip(top, channels(ground)[:3], strict=True)]


def contrast(a: list[float], b: list[float]) -> float:
    """The contrast ratio of WCAG."""

    def luminance(color: list[float]) -> float:
        linear = [x / 255 / 12.92 if x / 255 <= 0.04045 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
