"""The report in a real browser: it draws, it can be walked by mouse and keyboard, it fetches nothing and complains of nothing."""

import numpy as np
import pytest

from rlzoo import registry
from rlzoo.config import build
from rlzoo.credit.base import path_rows
from rlzoo.report.html import write_report
from rlzoo.report.tables import Cost
from rlzoo.store.runs import RunFolder
from rlzoo.store.trees import TreeRecord, write_trees
from rlzoo.training.models import load_tokenizer
from rlzoo.tree import Segment, Stop, Tree
from tests.browser import Browser, chromium
from tests.summaries import finished, suite_table

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium is installed (e.g. apt-get install chromium)")

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
NODES = 500
LOGPROBS = [-0.1, -0.2, -3.0]


def small_tree():
    tokenizer = load_tokenizer("tiny")
    said = tokenizer.encode(HOSTILE)
    segments = [
        Segment(0, tokenizer.encode("So 1+1"), None),
        Segment(1, tokenizer.encode("=2."), LOGPROBS, Stop.ANSWER),
        Segment(1, said, [-0.5] * len(said), Stop.LENGTH),
        Segment(0, tokenizer.encode("It is 3."), None, Stop.EOS),
    ]
    return Tree.from_segments(tokenizer.encode("1+1?"), segments, {2: 1.0, 3: 0.0, 4: 0.0})


def large_tree():
    rng = np.random.default_rng(0)
    segments, below, open_nodes = [], [0], [0]
    while len(segments) < NODES - 1:
        parent = open_nodes.pop(0)
        for _ in range(min(int(rng.integers(2, 4)), NODES - 1 - len(segments))):
            n = int(rng.integers(5, 40))
            segments.append(Segment(parent, rng.integers(40, 90, n).tolist(), (-rng.random(n)).tolist()))
            below.append(parent)
            open_nodes.append(len(segments))
    inner = set(below[1:])
    segments = [s if i in inner else Segment(s.parent, s.tokens, s.logprobs, Stop(1 + i % 6)) for i, s in enumerate(segments, 1)]
    tree = Tree.from_segments([40] * 30, segments)
    return tree.with_rewards({int(leaf): float(leaf % 3 == 0) for leaf in tree.leaves if leaf % 17})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One run per algorithm with a small tree at step 1 and step 2, the first run also with the large one."""
    here = tmp_path_factory.mktemp("report")
    tree, runs = small_tree(), []
    for number, algo in enumerate(registry.names("algorithm")):
        folder = RunFolder.create(here / f"run{number}", build([("test", {"algo": algo})]).to_dict())
        record = TreeRecord("id", HOSTILE, "2", ("right", "wrong", "wrong"))
        for step in (1, 2):
            write_trees(folder.trees_path(step), [tree], [path_rows(tree, [0, 1, 2], [1.0, -0.5, -0.5])], [record])
            row = {
                "pass_at_1": 0.3 * step,
                "length": 20.0,
                "sampled_tokens": 99,
                "update/trained": 60.0,
                "device_hours": 0.1 * step,
                "seconds/update": 9,
            }
            folder.log({"step": step, "dev/pass_at_1": 0.2 * step, "dev/half_width": 0.1, "dev/length": 30.0, **row})
        if number == 0:
            write_trees(folder.trees_path(0), [large_tree()])
        gain = (0.2, 0.1, 0.3)[number % 3]  # the second is dearer and worse than the first
        folder.write_summary(finished(2, suite_table(0.4, 0.4 + gain, Cost(1000 * (number + 1), 0.1 * (number + 1)))))
        runs.append(folder.path)
    write_report(runs, here / "report.html")
    return here / "report.html"


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture
def page(browser, report):
    """The report, freshly loaded, light. Whatever a test does with it, no message and no request may come of it."""
    browser.window(1440, 1000)
    browser.dark(False)
    browser.messages.clear()
    browser.requests.clear()
    browser.open(report)
    yield browser
    assert browser.messages == []
    assert browser.requests == [report.resolve().as_uri()]


def selected(page):
    return page.value("Number(document.querySelector('.node[aria-selected=true]').dataset.node)")


def choose(page, field, value):
    page.value(
        f"(() => {{ const s = document.querySelectorAll('#viewer select')[{field}]; s.value = {value!r};"
        " s.dispatchEvent(new Event('change')); })()"
    )


def press_button(page, text):
    page.value(f"[...document.querySelectorAll('button')].find(b => b.textContent === {text!r}).click()")


def test_everything_is_drawn(page):
    assert page.value("document.querySelectorAll('#curve-plots path.line').length") == 2 * len(registry.names("algorithm"))
    assert page.value("document.querySelectorAll('.whisker').length") == len(registry.names("algorithm"))
    assert page.value("document.querySelector('.frontier').getAttribute('d').match(/[ML]/g).join('')") == "MLL"  # base and two of three
    assert page.value("document.querySelectorAll('#curve-plots path.best').length") == len(registry.names("algorithm"))
    for axis in ("steps", "trained tokens", "device-hours", "sampled tokens"):
        press_button(page, axis)
        assert page.value("document.querySelector('#curve-plots .axis-name').textContent") == axis
    press_button(page, "training")
    assert "training" in page.value("document.querySelector('#curve-note').textContent")
    assert page.value("document.querySelectorAll('.stack').length") == len(registry.names("algorithm"))
    assert page.value("document.querySelectorAll('#length-plots path.bars').length") == 2 * len(registry.names("algorithm"))


def test_what_a_model_wrote_is_shown_and_not_run(page):
    assert page.value("document.title").startswith("rlzoo report: run0")
    assert page.value("document.querySelector('.problem').textContent") == HOSTILE
    assert page.value("document.querySelectorAll('#viewer img, #viewer script').length") == 0
    page.click('.node[data-node="3"]')
    assert HOSTILE in page.value("document.querySelector('.panel .text').textContent")
    assert page.value("document.title").startswith("rlzoo report: run0")


def test_a_foreign_script_would_not_run(page):
    page.value("document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 0'})), 0")
    assert page.value("document.title").startswith("rlzoo report: run0")
    assert "Content Security Policy" in page.messages.pop()


def test_geometry_is_lengths_and_leaves(page):
    def box(n):
        rectangle = f"document.querySelector('.node[data-node=\"{n}\"]').getBoundingClientRect()"
        return page.value(f"(() => {{ const r = {rectangle}; return [r.left, r.top, r.width, r.height]; }})()")

    tokens = {n: int(small_tree().lengths[n]) for n in (1, 2, 4)}
    left, top, width, height = zip(*(box(n) for n in tokens), strict=True)
    assert [w / width[0] for w in width] == pytest.approx([t / tokens[1] for t in tokens.values()], rel=0.02)
    assert left[0] == left[2] and left[1] == pytest.approx(left[0] + width[0], abs=0.1)
    assert top[0] == top[1] and height[0] == pytest.approx(2 * height[1] + 1, abs=0.1) and top[2] > top[0] + height[0]


def test_keyboard(page):
    page.click('.node[data-node="2"]')
    walk = [("ArrowDown", 3), ("ArrowUp", 2), ("ArrowUp", 2), ("ArrowLeft", 1), ("ArrowDown", 4), ("ArrowRight", 4), ("ArrowUp", 1)]
    for key, node in [*walk, ("ArrowRight", 2), ("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1)]:
        page.press(key)
        assert selected(page) == node, key
        assert page.value("document.activeElement.dataset.node") == str(node)
    assert page.value("document.querySelectorAll('.node[tabindex=\"0\"]').length") == 1


def test_a_node_in_figures(page):
    page.click('.node[data-node="1"]')
    panel, tokens = page.value("document.querySelector('.panel').innerText"), int(small_tree().lengths[1])
    for expected in (
        "Node 1",
        "value\n0.50",
        f"tokens\n{tokens} (0 to {tokens})",
        "segment limit",
        "+0.25",
        "−0.50 to +1.00 in 2 rows",
        "Counterfactual, unwhitened",
    ):
        assert expected in panel, expected
    names = page.value("[...document.querySelectorAll('.credits tbody th')].map(e => e.textContent)")
    assert names == [registry.names("algorithm")[0], *registry.names("algorithm")]
    page.click('.node[data-node="2"]')
    panel = page.value("document.querySelector('.panel').innerText")
    assert "verdict\nright" in panel and f"response\n{tokens + 3} tokens" in panel and "answer in a box" in panel


def test_tokens_are_shaded(page):
    shades = "[...document.querySelectorAll('.panel .own .token')].map(e => getComputedStyle(e).backgroundColor)"
    page.click('.node[data-node="2"]')
    by_advantage = page.value(shades)
    page.value("document.querySelectorAll('.choices[aria-label=\"shade tokens by\"] button')[1].click()")
    by_logprob = page.value(shades)
    page.value("document.querySelectorAll('.choices[aria-label=\"shade tokens by\"] button')[2].click()")
    assert len(by_advantage) == 3 and len(set(by_advantage)) == 1 and len(set(by_logprob)) == 3
    assert set(page.value(shades)) == {"rgba(0, 0, 0, 0)"}


def test_credit_colours_the_tree(page):
    colours = "[...document.querySelectorAll('.icicle-plot .node')].map(e => getComputedStyle(e).backgroundColor)"
    by_value = page.value(colours)
    press_button(page, "credit")
    trained = page.value(colours)
    choose(page, 3, "1")
    assert "counterfactual" in page.value("document.querySelector('#tree-legend').textContent")
    assert by_value != trained and len(page.value(colours)) == 4


def test_a_large_tree_stays_usable(page):
    choose(page, 1, "0")
    assert page.value("document.querySelectorAll('.icicle .node').length") == NODES
    spent = page.value(
        "(() => { const t = performance.now(); treeViewer.show(treeViewer.now.tree); document.body.offsetHeight;"
        " return performance.now() - t; })()"
    )
    assert spent < 5000  # about 0.15 s on a quiet core
    low = page.value("Math.min(...[...document.querySelectorAll('.icicle .node')].map(e => e.getBoundingClientRect().height))")
    assert low >= 5, "every node can be clicked"
    page.click(f'.node[data-node="{NODES - 1}"]')
    assert selected(page) == NODES - 1
    for stop in ("end of text", "answer in a box", "repeating", "length limit", "depth limit", "pruned"):
        assert stop in page.value("document.querySelector('#tree-legend').textContent")


CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgb = (c) => { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = rgb(c).map(v => linear(v / 255)); return .2126 * r + .7152 * g + .0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const boxes = [...document.querySelectorAll('.node, .stack div')].map(e => getComputedStyle(e));
  const found = boxes.map(style => ratio(style.color, style.backgroundColor));
  const card = getComputedStyle(document.querySelector('section')).backgroundColor;
  for (const q of ['h2', 'td', '.note', 'dt', '.tick', 'button', '.verdict.right', '.verdict.wrong']) {
    const style = getComputedStyle(document.querySelector(q));
    found.push(ratio(q === '.tick' ? style.fill : style.color, card));
  }
  return Math.min(...found);
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_in_light_and_dark(page, dark):
    page.dark(dark)
    assert page.value(CONTRAST) >= 4.5  # WCAG AA for text
    for wanted in ("light", "dark"):
        press_button(page, page.value("document.querySelector('#theme').textContent"))
        assert page.value("document.querySelector('#theme').textContent") == f"theme: {wanted}"
        assert page.value("getComputedStyle(document.documentElement).colorScheme") == wanted
        assert page.value(CONTRAST) >= 4.5


def test_narrow_window(page):
    page.window(420, 900)
    assert page.value("document.documentElement.scrollWidth") <= 420
