"""The page, the figure and the table: what they say, and what no completion can do to them."""

import html
import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from credit_cases import HOSTILE, PIXEL, record, rollout
from rich.console import Console

from srpo import ConfigError, DtypeError, IncompatibleVersionError
from srpo.viz import CreditPage, credit_figure, credit_html, credit_table
from srpo.viz.page import scale_limit, shade, visible


class Page(HTMLParser):
    """What a parser makes of a page: the tokens of each rollout, tags, addresses, scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.addresses, self.tokens, self.classes, self.scripts = [], [], [], [], []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "srcset", "action", "srcdoc", "data")]
        if "tokens" in (named.get("class") or "").split():
            self.tokens.append([])
            self.classes.append([])
        elif tag == "span" and self._open[-1:] == ["div.tokens"]:
            self.tokens[-1].append("")
            self.classes[-1].append((named.get("class") or "").split())
        if tag == "script":
            self.scripts.append("")
        if tag not in ("meta", "link", "img", "input", "br"):
            self._open.append("div.tokens" if "tokens" in (named.get("class") or "").split() else tag)

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if self._open[-1:] == ["script"]:
            self.scripts[-1] += data
        if self._open[-2:] == ["div.tokens", "span"]:
            self.tokens[-1][-1] += data


def facts(page: Page) -> list[dict]:
    return json.loads(page.scripts[0], parse_constant=pytest.fail)


class TestPage:
    def test_rollouts_stand_by_group_and_reward(self):
        rewards = [(1, 0.0), (0, 0.5), (1, 1.0), (0, None), (1, 0.25)]
        records = [record((f"{g} {r}",), group=g, reward=r) for g, r in rewards]
        page = Page(credit_html(records))
        assert [x[0] for x in page.tokens] == ["1 1.0", "1 0.25", "1 0.0", "0 0.5", "0 None"]

    def test_shades_and_lines_are_those_of_the_numbers(self):
        made = record(
            tuple("abcde"), weights=(0.8, 1.0, 1.25, 1.0, 0.0), roles=(1, 2, 2, 0, 0), sampled=(1, 1, 1, 1, 0)
        )
        (classes,) = Page(credit_html(made)).classes
        assert classes == [["p", "l10"], ["r"], ["r", "m10"], [], ["x"]]

    def test_the_scale_is_symmetric_and_ends_where_the_weights_end(self):
        assert scale_limit([record(("a",), weights=(0.0,))]) == 1.25
        assert scale_limit([record(("a", "b"), weights=(0.7, 1.1))]) == pytest.approx(1 / 0.7)
        assert scale_limit([record(("a",), weights=(9.0,))]) == 2.0
        for weight in (1.01, 1.1, 1.3, 5.0):
            assert shade(weight, 1.5) == -shade(1 / weight, 1.5)
        assert [shade(w, 1.5) for w in (0.0, None, float("inf"))] == [-10, 0, 10]

    def test_the_facts_are_those_of_the_record(self):
        made = rollout(30, advantage=-0.75)
        (found,) = facts(Page(credit_html(made)))
        for name in ("weights", "logps", "corrupted_logps", "ablated_logps", "contrast"):
            pairs = zip(found[name], getattr(made, name), strict=True)
            assert all(a == (b if b is None else pytest.approx(b, rel=1e-4)) for a, b in pairs), name
        assert found["advantage"] == -0.75

    @pytest.mark.parametrize("where", ["tokens", "prompt", "answer", "title", "method"])
    def test_no_text_leaves_its_place(self, where):
        plain = Page(credit_html([record(("a",) * len(HOSTILE), prompt="p", answer="q")], title="t", method="m"))
        text = "".join(HOSTILE)
        given = {"prompt": "p", "answer": "q"} | ({where: text} if where in ("prompt", "answer") else {})
        tokens = HOSTILE if where == "tokens" else ("a",) * len(HOSTILE)
        named = {"title": "t", "method": "m"} | ({where: text} if where in ("title", "method") else {})
        page = credit_html([record(tokens, **given)], **named)
        found = Page(page)
        assert found.tags == plain.tags
        assert found.addresses == plain.addresses
        assert found.scripts[1:] == plain.scripts[1:]
        page.encode("utf-8")  # halves of surrogates are no text
        if where == "tokens":
            assert found.tokens == [[visible(x) for x in HOSTILE]]
        shown = html.unescape(page)
        assert not [c for c in "\u202e\u2066\u200b\x00\r\ud800" if c in shown]

    def test_what_scripts_and_emoji_are_made_of_is_kept(self):
        for text in ("👩‍👩‍👧", "می‌خواهم", "العربية", "日本\n\t"):
            assert visible(text) == text

    def test_it_asks_the_network_for_nothing(self):
        page = credit_html(record(("see http://example.org/x.png",), images=(PIXEL,), corrupted_images=(PIXEL,)))
        found = Page(page)
        assert found.addresses == ["data:,", PIXEL, PIXEL]
        assert "default-src 'none'" in page
        style = re.search("<style>(.*?)</style>", page, re.DOTALL)[1]
        assert "url(" not in style
        assert "@import" not in style

    def test_a_long_completion_costs_little_a_token(self):
        page = credit_html([rollout(2048, seed) for seed in range(4)])
        assert len(page) < 1_200_000
        assert len(Page(page).tokens[3]) == 2048
        assert page.count("addEventListener") == len(set(re.findall(r"addEventListener\(\"(\w+)", page)))

    def test_a_completion_of_200_000_characters(self):
        page = credit_html(record(("x" * 200_000, *("y",) * 50_000)))
        assert len(Page(page).tokens[0]) == 50_001

    def test_notebooks_and_files(self, tmp_path):
        page = credit_html(record(("</iframe>\"'",)))
        frame = Page(page._repr_html_())
        assert frame.tags == ["iframe"]
        assert frame.addresses == [str(page)]
        assert page.save(tmp_path / "x.html").read_text(encoding="utf-8") == page
        assert isinstance(page, CreditPage)


class TestFigure:
    def test_png_and_svg(self, tmp_path):
        figure = credit_figure([rollout(40), rollout(12, 1)])
        for name, head in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
            figure.savefig(tmp_path / name)
            assert (tmp_path / name).read_bytes().startswith(head)

    @pytest.mark.parametrize("width", [2.0, 3.25, 6.75])
    def test_every_token_is_drawn_twice_and_inside(self, width):
        made = record(("a", " b\n", "c" * 90, "$x_1$"), weights=(0.8, 1.0, 1.2, 1.0), roles=(1, 1, 2, 0))
        figure = credit_figure(made, width=width)
        axes = figure.axes[0]
        text = "".join(x.get_text() for x in axes.texts if x.get_fontfamily() == ["DejaVu Sans Mono"])
        assert text == 2 * ("a b↵" + "c" * 90 + "$x_1$")
        assert max(x.get_x() + x.get_width() for x in axes.patches) <= width
        assert max(x.get_y() + x.get_height() for x in axes.patches) < figure.get_size_inches()[1]
        colors = [tuple(round(c, 3) for c in x.get_facecolor()) for x in axes.patches]
        n = len(colors) // 2
        assert len(set(colors[:n])) == 1
        assert len(set(colors[n:])) == 3

    def test_more_tokens_than_are_drawn(self):
        axes = credit_figure(rollout(50), max_tokens=10).axes[0]
        assert len(axes.patches) == 2 * 11


class TestTable:
    @pytest.mark.parametrize("width", [24, 40, 63, 64, 80, 120])
    def test_it_fits_and_says_every_number(self, width):
        made = rollout(30, words=(" the", "\n", "</perception>", "العربية"), advantage=-0.5)
        text = str(credit_table(made, width=width))
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text or width < 36
        if width >= 40:
            for weight, advantage in zip(made.weights, made.advantages, strict=True):
                assert re.search(rf"-0\.500 +{weight:.2f} +{re.escape(f'{weight * advantage:+.3f}')}", text)

    def test_the_rest_is_counted(self):
        text = str(credit_table([rollout(70), rollout(3, reward=0.25)], width=80))
        assert "... 6 more" in text
        assert "reward 0.25  advantage +0.500  3 tokens" in text

    def test_terminals_cannot_be_steered(self):
        text = str(credit_table(record(("\x1b[31m", "[bold]", "\u202e")), width=80))
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "[bold]" in text

    def test_rich_and_notebooks_show_it(self):
        console = Console(file=io.StringIO(), width=70)
        console.print(credit_table(rollout(4)))
        assert "GRPO" in console.file.getvalue()
        assert "iframe" in credit_table(rollout(4))._repr_html_()


@pytest.mark.parametrize("function", [credit_html, credit_figure, credit_table])
@pytest.mark.parametrize(
    ("rollouts", "error"), [([], ConfigError), ("abc", DtypeError), ([1], DtypeError), (None, DtypeError)]
)
def test_what_is_no_rollout_is_refused(function, rollouts, error):
    with pytest.raises(error, match=rf"^{function.__name__}\(\): rollouts got "):
        function(rollouts)


@pytest.mark.parametrize(
    ("function", "named"),
    [(credit_html, {"title": 3}), (credit_html, {"method": None}), (credit_figure, {"width": 1}),
     (credit_figure, {"max_tokens": 0}), (credit_table, {"width": 10}), (credit_table, {"max_tokens": "all"}),
     (credit_figure, {"max_tokens": True})],
)  # fmt: skip
def test_settings_that_are_refused(function, named):
    (name,) = named
    with pytest.raises(ConfigError, match=rf"^{function.__name__}\(\): {name} got .*; pass {name}="):
        function(rollout(3), **named)


@pytest.mark.parametrize(("function", "module"), [(credit_figure, "matplotlib.figure"), (credit_table, "rich")])
def test_a_missing_package_is_named(function, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(IncompatibleVersionError, match=r"pip install 'srpo\[viz\]'"):
        function(rollout(3))
