import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest

from rlzoo import registry
from rlzoo.algorithm import load
from rlzoo.cli import main
from rlzoo.config import build
from rlzoo.credit.base import Credit, path_rows
from rlzoo.report.counterfactual import Judges
from rlzoo.report.html import SCRIPTS, choose, write_report
from rlzoo.report.tables import Cost
from rlzoo.report.treedata import Pieces, credit_pieces, tree_data
from rlzoo.store.runs import RunFolder
from rlzoo.store.trees import StoredTree, TreeRecord
from rlzoo.tree import Segment, Tree
from tests.summaries import make_run, small_tree, suite_table

ALGORITHMS = registry.names("algorithm")
SVG = "http://www.w3.org/2000/svg"  # a name, not an address
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>&amp;\u2028\u202e<!--"


def page_data(page):
    """The data that the page's scripts read, found as a browser finds it: by an HTML parser."""

    class Finder(HTMLParser):
        def __init__(self):
            super().__init__()
            self.inside, self.text, self.scripts, self.images = False, "", 0, 0

        def handle_starttag(self, tag, attrs):
            self.scripts += tag == "script"
            self.images += tag == "img"
            self.inside = tag == "script" and dict(attrs).get("id") == "data"

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, data):
            self.text += data if self.inside else ""

    finder = Finder()
    finder.feed(page.read_text(encoding="utf-8"))
    return json.loads(finder.text), finder


# --- the page


def test_one_file_with_everything(tmp_path, capsys):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    out = tmp_path / "report.html"
    assert main(["report", str(first), str(second), "--out", str(out), "--trees", "4"]) == 0
    assert re.fullmatch(rf"{re.escape(str(out))}: 0\.\d\d MB, runs: 2, trees: 8\n", capsys.readouterr().out)
    text = out.read_text()
    assert not re.search(r"""(?:src|href)=["']?(?!#|data:)[a-z/]""", text), "nothing may be fetched"
    assert SVG in text and "http" not in text.replace(SVG, "").replace("http-equiv", "")
    data, _ = page_data(out)
    assert data["arms"] == {ALGORITHMS[0]: ["a", "b"]}
    assert [(t["run"], t["step"]) for t in data["viewer"]["trees"]] == [(r, s) for r in "ab" for s in (1, 2, 3, 3)]
    tree = data["viewer"]["trees"][0]
    assert [c["name"] for c in tree["credits"]] == ["training", *ALGORITHMS]
    assert not (tmp_path / ".partial-report.html").exists()


def test_the_page_is_a_function_of_the_runs(tmp_path):
    run = make_run(tmp_path / "a")
    for name in ("1.html", "2.html"):
        write_report([run], tmp_path / name)
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_what_a_model_wrote_is_data(tmp_path):
    record = TreeRecord(HOSTILE, HOSTILE, HOSTILE, (HOSTILE, "wrong", "right"), (HOSTILE, "", ""))
    run = make_run(tmp_path / "a<b>", record=record, steps=(1,))
    write_report([run], tmp_path / "r.html")
    data, page = page_data(tmp_path / "r.html")
    assert (page.scripts, page.images) == (2, 0) and not set("<>&\u2028") & set(page.text)
    tree = data["viewer"]["trees"][0]
    assert tree["problem"] == tree["gold"] == tree["kind"][0] == HOSTILE
    assert "document.title='broken'" not in re.sub(r'<script type="application/json".*?</script>', "", (tmp_path / "r.html").read_text())
    assert "<b>" not in (tmp_path / "r.html").read_text()
    for name in SCRIPTS:
        source = (files("rlzoo.report") / "assets" / name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|</script", source), name


def test_trees_that_have_no_room_are_counted(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / name, steps=(1,)) for name in "ab"]
    one = write_report(runs, tmp_path / "all.html", trees=2)
    assert (one.trees, one.left_out) == (4, 0)
    data, _ = page_data(tmp_path / "all.html")
    monkeypatch.setattr("rlzoo.report.html.MAX_TREE_BYTES", 2.2 * len(json.dumps(data["viewer"]["trees"][0], separators=(",", ":"))))
    made = write_report(runs, tmp_path / "some.html", trees=2)
    assert (made.trees, made.left_out) == (2, 2)
    data, _ = page_data(tmp_path / "some.html")
    assert [t["run"] for t in data["viewer"]["trees"]] == ["a", "b"], "each run's best tree comes before any run's second"
    assert data["viewer"]["leftOut"] == 2


def test_results_are_ranked_with_intervals_and_costs(tmp_path):
    worse = make_run(tmp_path / "worse", table=suite_table(0.25, 0.5, Cost(1_230_000, 0.125)))
    better = make_run(tmp_path / "better", seed=1, table=suite_table(0.25, 0.75, Cost(2_340_000, 0.5)))
    other = make_run(tmp_path / "other", seed=2)
    write_report([worse, better, other], tmp_path / "r.html", trees=1)
    text = (tmp_path / "r.html").read_text()
    ranking = text[text.index("Base and trained model on the suite") : text.index("<details>")]
    rows = [re.findall(r"<td class=.>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", ranking) if "<td" in row]
    first = ["better", ALGORITHMS[0], "1", "1", "25.0 [20.0, 30.0]", "75.0 [70.0, 80.0]", "+50.0 [+45.0, +55.0]", "1.50", "2.34M", "0.500"]
    assert rows[0] == first and [row[0] for row in rows] == ["better", "worse"]
    assert text.count("<details>") == 2 and "a &lt;note&gt;" in text
    outcomes = page_data(tmp_path / "r.html")[0]["outcomes"]
    assert [(o["run"], o["mean"], o["low"], o["cost"]["device-hours"]) for o in outcomes] == [
        ("worse", 0.5, 0.45, 0.125),
        ("better", 0.75, 0.7, 0.5),
    ]


def test_a_run_that_has_just_begun(tmp_path):
    folder = RunFolder.create(tmp_path / "young", build([("test", {"algo": ALGORITHMS[0]})]).to_dict())
    write_report([folder.path], tmp_path / "r.html", trees=0)
    assert "not finished" in (tmp_path / "r.html").read_text()
    assert page_data(tmp_path / "r.html")[0]["viewer"]["trees"] == []


# --- bad input


def refused(capsys, *arguments):
    assert main(["report", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rlzoo: ") and said.count("\n") == 1, said
    return said


def test_bad_input_is_one_sentence(tmp_path, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "r.html"
    assert "no run given" in refused(capsys, "--out", out)
    assert "no run folder at" in refused(capsys, tmp_path / "none", "--out", out)
    assert "it has no config.toml" in refused(capsys, tmp_path, "--out", out)
    assert "given more than once" in refused(capsys, run, run, "--out", out)
    assert "there is no folder" in refused(capsys, run, "--out", tmp_path / "missing" / "r.html")
    assert "it is a folder" in refused(capsys, run, "--out", tmp_path)
    assert "--trees -1; allowed: 0" in refused(capsys, run, "--out", out, "--trees", "-1")
    empty = RunFolder.create(tmp_path / "empty", RunFolder.open(run).config())
    assert "holds no stored trees; --trees 0 makes" in refused(capsys, run, empty.path, "--out", out)
    assert not out.exists()
    out.write_text("mine")
    assert "exists; --force replaces it" in refused(capsys, run, "--out", out)
    assert out.read_text() == "mine"
    assert main(["report", str(run), "--out", str(out), "--force"]) == 0
    assert out.read_text().startswith("<!doctype html>")


def test_half_written_files_are_named(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    whole = (run / "trees" / "step-3.parquet").read_bytes()
    (run / "trees" / "step-3.parquet").write_bytes(whole[: len(whole) // 2])
    assert "step-3.parquet is not a Parquet file of trees" in refused(capsys, run, "--out", tmp_path / "r.html")
    (run / "trees" / "step-3.parquet").write_bytes(whole)
    (run / "summary.json").write_text('{"steps": 3, "led')
    assert "summary.json is not JSON" in refused(capsys, run, "--out", tmp_path / "r.html")
    (run / "summary.json").write_text("{}")
    assert "not a run's result row" in refused(capsys, run, "--out", tmp_path / "r.html")
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    said = refused(capsys, run, "--out", tmp_path / "r.html")
    assert "line 2 of " in said and "metrics.jsonl is not JSON" in said
    assert not (tmp_path / "r.html").exists()


# --- trees


def test_tree_as_data():
    tree = small_tree()
    record = TreeRecord("id", "1+1?", "2", ("right", "wrong", "right"))
    texts = {}
    data = tree_data(StoredTree(tree, path_rows(tree, [0, 1], [1.0, -3.0]), record), [], Pieces(lambda ids: "".join(map(chr, ids))), texts)
    assert data["parent"] == [-1, 0, 1, 1, 0, 1] and data["length"] == [2, 2, 1, 3, 1, 1]
    assert data["start"] == [-2, 0, 2, 2, 0, 2] and data["leaves"] == [2, 3, 4] and data["probe"] == [5]
    assert data["value"] == [0.75, 0.5, 1, 0, 1, None] and data["leafMean"][0] == 0.6667
    assert data["stop"] == ["OPEN", "OPEN", "EOS", "LENGTH", "ANSWER", "EOS"]
    assert data["logprobs"][1:4] == [[-50, None], [-25], [-100, -200, 0]]
    assert ["".join(list(texts)[i] for i in ids) for ids in data["tokens"]] == ["PQ", "AB", "C", "DEF", "G", "H"]
    (trained,) = data["credits"]
    assert trained["pieces"] == [[], [[0, 2, -1, -3, 1, 2]], [[0, 1, 1, 1, 1, 1]], [[0, 3, -3, -3, -3, 1]], [], []]
    assert "refused" in tree_data(StoredTree(tree, Credit.empty(tree)), [], Pieces(None), {})["credits"][0]
    assert "refused" in tree_data(StoredTree(tree), [], Pieces(None), {})["credits"][0]
    json.dumps(data, allow_nan=False)


def naive_pieces(tree, credit, node):
    """Per token: (weighted mean, least, largest, number) of its terms, None without one."""
    found = []
    for at in range(int(tree.lengths[node])):
        hit = [k for k in range(len(credit.row)) if credit.node[k] == node and credit.start[k] <= at < credit.stop[k]]
        if credit.token_mask is not None and not credit.token_mask[int(tree.offsets[node]) + at]:
            hit = []
        weights = [float(credit.row_weight[credit.row[k]]) for k in hit]
        values = [float(credit.advantage[k]) for k in hit]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights) if hit else None
        found.append((mean, min(values), max(values), len(hit)) if hit else None)
    return found


def test_pieces_are_the_terms_of_every_token():
    rng = np.random.default_rng(0)
    for _ in range(60):
        tree = Tree.from_segments([1], [Segment(int(rng.integers(0, n)), [2] * int(rng.integers(1, 9))) for n in range(1, 5)])
        terms, rows = int(rng.integers(1, 8)), 3
        node = rng.integers(1, tree.nodes, terms).astype(np.int32)
        start = np.array([rng.integers(0, tree.lengths[n]) for n in node], np.int32)
        stop = np.array([rng.integers(s + 1, tree.lengths[n] + 1) for s, n in zip(start, node, strict=True)], np.int32)
        mask = rng.random(len(tree.tokens)) < 0.7 if rng.random() < 0.5 else None
        row = rng.integers(0, rows, terms).astype(np.int32)
        advantage, weight, shape = rng.normal(size=terms), rng.random(rows) + 0.1, (len(tree.leaves), tree.nodes)
        credit = Credit(row, node, start, stop, advantage, np.zeros(rows, np.int32), weight, shape, mask)
        for n, pieces in enumerate(credit_pieces(tree, credit)):
            tokens = [None] * int(tree.lengths[n])
            for first, last, *figures in pieces:
                assert all(t is None for t in tokens[first:last]), "pieces must not overlap"
                tokens[first:last] = [figures] * (last - first)
            for got, expected in zip(tokens, naive_pieces(tree, credit, n), strict=True):
                assert (got is None) == (expected is None)
                if expected is not None:
                    assert got == pytest.approx(expected, rel=1e-3)


def test_token_texts_join_to_the_whole_text(tiny_tokenizer):
    def decode(ids):
        return str(tiny_tokenizer.decode(ids))

    text = "x = ½, 中文 🙂\n done"
    ids = tiny_tokenizer.encode(text)
    assert len(ids) > len(text), "several tokens to a character"
    texts = Pieces(decode)(ids)
    assert len(texts) == len(ids) and "".join(texts) == text and "\ufffd" not in "".join(texts)
    cut = Pieces(decode)(ids[: ids.index(tiny_tokenizer.encode("🙂")[0]) + 2])  # in the middle of a character
    assert len(cut) == ids.index(tiny_tokenizer.encode("🙂")[0]) + 2
    assert Pieces(None)([3, 5]) == ["⟨3⟩", "⟨5⟩"]


def test_spaces_that_depend_on_the_token_before():
    words = {1: "▁So", 2: "▁it", 3: "s"}

    def decode(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")  # as SentencePiece decoders do

    assert Pieces(decode)([1, 2, 3, 2]) == ["So", " it", "s", " it"]


def test_choice_of_trees():
    def graded(*correct):
        return StoredTree(small_tree(correct))

    last = [graded(1, 1, 1), graded(0, 1, 1), graded(1, 0, float("nan"))]
    stored = {3: last, 1: [graded(0, 0, 0)], 2: [graded(1, 0, 0), graded(1, 1, 0)]}
    assert choose(stored, 4) == [(3, 2), (1, 0), (2, 0), (3, 1)]
    assert choose(stored, 99)[-1] == (3, 0) and len(choose(stored, 99)) == 6
    assert choose({}, 3) == choose(stored, 0) == []


# --- counterfactual credit


@pytest.mark.parametrize("name", ALGORITHMS)
def test_counterfactual_credit_is_that_algorithms_own(name):
    algorithm = load(name)
    config = build([("test", {"algo": ALGORITHMS[0]})]).to_dict()
    own = load(ALGORITHMS[0])
    tree = own.shaping(small_tree(), [1.0, 0.0, 1.0], own.sampler.max_response_tokens)
    judged = {c.algorithm: c for c in Judges(config, "config.toml")(tree)}
    assert list(judged) == ALGORITHMS
    credit = judged[name].credit
    assert credit is not None, judged[name].note
    overrides = {"credit.whitening": "none"} if hasattr(algorithm.credit, "whitening") else {}
    plain = load(name, **overrides)
    expected = plain.credit([plain.shaping(small_tree(), [1.0, 0.0, 1.0], own.sampler.max_response_tokens)])[0]
    assert np.array_equal(credit.dense(), expected.dense(), equal_nan=True) and len(credit.row)


def test_the_runs_own_options_are_kept():
    name = next(n for n in ALGORITHMS if load(n).credit.name == "group")
    plain = build([("test", {"algo": name, "credit": {"std": "none"}})]).to_dict()
    judged = {c.algorithm: c for c in Judges(plain, "config.toml")(small_tree())}[name]
    assert judged.credit is not None
    assert sorted(set(judged.credit.advantage.tolist())) == pytest.approx([-2 / 3, 1 / 3])


def test_refusals_say_why():
    config = build([("test", {"algo": next(n for n in ALGORITHMS if load(n).shaping.wrong == 0)})]).to_dict()
    odd = small_tree((7.0, -2.0, 0.5))  # numbers of a plug-in, which no shaping gave
    judged = {c.algorithm: c for c in Judges(config, "config.toml")(odd)}
    refusing = [n for n in ALGORITHMS if "rewards in [0,1]" in load(n).credit.needs]
    assert refusing
    for name in refusing:
        assert judged[name].credit is None and "needs rewards in [0,1], found -2.0 to 7.0" in judged[name].note
    accepting = next(n for n in ALGORITHMS if load(n).credit.name == "group")
    assert judged[accepting].credit is not None
    dead = {c.algorithm: c for c in Judges(config, "config.toml")(small_tree((1.0, 1.0, 1.0)))}[accepting]
    assert dead.credit is not None and "filter would drop" in dead.note
    foreign = Judges({"algo": "of another installation"}, "config.toml")(odd)
    assert [c.algorithm for c in foreign] == ALGORITHMS
    assert all(c.credit is None and "not one of this installation" in c.note for c in foreign)
