"""The pages say what the tables say, and name arguments and settings that there are.

That links lead somewhere, examples run and commands exist is in `tests/test_repository.py`.
"""

import ast
import functools
import inspect
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

import ddlr
import nettrim
from experiments.configuration import CONFIG_PATH, REPOSITORY
from experiments.report import at_equal_drop
from experiments.report.at_equal_drop import ratios_table, sizes_table
from experiments.report.sizes_at_drop import Asked, our_sizes, sizes
from experiments.report.sizes_at_drop import smallest as smallest_of
from experiments.report.tables import (
    METHOD_TITLES,
    NETWORK_TITLES,
    read_table,
    read_tables,
    with_all_seeds,
)
from experiments.report.variants import TODAYS_RIVALS, is_baseline

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
RESULTS = REPOSITORY / "docs/results.md"
NETWORKS = ["lenet_300_100", "fc_nettrim", "lenet5", "convnet_nettrim", "vgg_small"]
NAMES = {
    "lenet_300_100": "LeNet-300-100",
    "fc_nettrim": "784-300-1000-100-10",
    "lenet5": "LeNet-5",
    "convnet_nettrim": "the conv net",
    "vgg_small": "the VGG-style net",
}
CLOSED_FORMS = ["svd", "activation_svd", "magnitude", "magnitude_global"]
# Methods of a row; the two kinds of magnitude pruning share one.
ROWS = {
    "fewest weights": ["fewest_weights"],
    "lowest rank": ["lowest_rank"],
    "activation-aware SVD": ["activation_svd"],
    "SVD of the weights": ["svd"],
    "magnitude": ["magnitude", "magnitude_global"],
    "Net-Trim": ["nettrim"],
    "DDLR, one tolerance": ["ddlr"],
    "smallest form": ["smallest"],
    "fewest nonzeros": ["fewest_nonzeros"],
    "ALPS": ["alps"],
    "sparse plus low rank": ["sparse_low_rank"],
    "double sparse factors": ["double_sparse"],
    "OSSCAR and low rank": ["osscar"],
    "SparseGPT": ["sparsegpt"],
}
# What a size made by earlier code is, by method: an upper bound, or somewhat too small.
EARLIER = {"fewest_weights": "at most ", "nettrim": "at most ", "ddlr": "about "}
SETTING = re.compile(r"\+?[a-z_]+(\.[a-z_]+)*=")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    return " ".join(text_of(page).split())


def table_after(text: str, words: str) -> dict[str, list[str]]:
    """The first table after these words: its rows' other cells by their first one."""
    rest = text[text.index(words) :]
    lines = re.search(r"(?:^\|.*\n)+", rest, flags=re.MULTILINE)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in rows if set(first) - set("- ")}


@functools.cache
def results(name: str) -> pd.DataFrame:
    return read_table(REPOSITORY / f"results/{name}.csv")


def smallest(
    model: str, methods: list[str], drop: float, *, one_tolerance=False
) -> pd.Series | None:
    """The row of `sizes.csv` with the fewest weights, of those without training the network."""
    sizes = results("sizes")
    of_them = sizes[
        (sizes["model"] == model)
        & sizes["method"].isin(methods)
        & (sizes["largest_drop"] == drop)
        & (sizes["counted"] == "weights")
        & (sizes["refit"] != "network")
    ]
    if one_tolerance:
        of_them = of_them[of_them["goal"] == "relative_tolerance"]
    return None if of_them.empty else of_them.loc[of_them["fraction"].idxmin()]


def is_earlier(size: pd.Series) -> bool:
    """Whether earlier code made the runs behind a row of `sizes.csv`."""
    runs = results("sweeps")
    of_it = pd.Series(True, index=runs.index)
    for key in ("model", "method", "constraint", "refit", "order", "cascade_bound", "ridge"):
        of_it &= runs[key] == size[key]
    of_it &= runs["calibration_samples"] == size["calibration_samples"]
    value = "relative_tolerance" if size["goal"] == "relative_tolerance" else "wanted"
    of_it &= (runs["goal"] == size["goal"]) & (runs[value] == size["wanted"])
    assert of_it.any()
    return bool(runs.loc[of_it, "earlier"].fillna(False).astype(bool).any())


def size_in_words(size: pd.Series) -> str:
    mark = EARLIER.get(size["method"], "") if is_earlier(size) else ""
    return f"{mark}{100 * size['fraction']:.1f} %"


def wrong_closed_forms(text: str) -> set[str]:
    table, wrong = table_after(text, "Weights kept, each method at its best refit"), set()
    rows = {"best closed form": CLOSED_FORMS, "Net-Trim": ["nettrim"], "DDLR": ["ddlr"]}
    for name, methods in rows.items():
        for cell, model in zip(table[name], NETWORKS, strict=True):
            if cell != size_in_words(smallest(model, methods, 0.5, one_tolerance=True)):
                wrong.add(f"{name}, {model}: {cell}")
    for cell, model in zip(table["which one"], NETWORKS, strict=True):
        best = smallest(model, CLOSED_FORMS, 0.5, one_tolerance=True)["method"]
        if best not in ROWS[cell]:
            wrong.add(f"which one, {model}: {cell}")
    return wrong


def unchecked_links(text: str) -> list[str]:
    """Links that the test of links does not read: with a title, in HTML, by reference."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"\]\([^)\s]+ \"|<(?:a|img) |^\[[^]]+\]: ", outside, flags=re.MULTILINE)


def unknown_keywords(code: str) -> set[str]:
    """Keyword arguments that `ddlr.f` or `nettrim.f` does not take."""
    unknown = set()
    for node in ast.walk(ast.parse(code)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        module = {"ddlr": ddlr, "nettrim": nettrim}.get(getattr(node.func.value, "id", None))
        if module is not None:
            known = set(inspect.signature(getattr(module, node.func.attr)).parameters)
            if "goal" in known:
                known = known - {"goal"} | set(inspect.signature(ddlr.Goal).parameters)
            unknown |= {each.arg for each in node.keywords} - known
    return unknown


def calls(text: str) -> list[str]:
    """Python of a page: its blocks, and calls of the libraries in lines."""
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    lines = re.findall(r"`[^`\n]*?((?:ddlr|nettrim)\.\w+\([^`\n]*\))`", text)
    return [*blocks, *(line.replace("...", "") for line in lines)]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a page that have settings, each with these, but for values left open."""
    found = []
    joined = text.replace("\\\n", " ")
    for module, rest in re.findall(r"python -m experiments\.(\w+) ([^`\n&#|]+)", joined):
        words = [each for each in shlex.split(rest) if SETTING.match(each)]
        if words:
            found.append((module, words))
    return found


def refused(module: str, settings: list[str]) -> str | None:
    """Why Hydra does not compose a command, or None. Of a sweep, its first values."""
    config = "compress" if module == "status" else module
    first = []
    for each in OverridesParser.create().parse_overrides(settings):
        value = next(each.sweep_string_iterator()) if each.is_sweep_override() else None
        if each.key_or_group == "launcher":  # may not be installed; its file is there
            path = Path(CONFIG_PATH) / f"launcher/{each.value()}.yaml"
            if not path.is_file():
                return f"{path.name} is not there"
        elif not each.key_or_group.startswith("launcher."):
            first.append(each.input_line if value is None else f"{each.key_or_group}={value}")
    try:
        with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
            compose(config, first)
    except Exception as error:
        return str(error)
    return None


def short(verdict: str) -> str:
    """A verdict of claims.md in the words of the README."""
    if verdict.startswith("does not hold"):
        return re.sub(
            r"does not hold(?: \((.*)\))?",
            lambda found: "; ".join(["no", *([found[1]] if found[1] else [])]),
            verdict,
        )
    return verdict


def test_the_readme_gives_the_verdicts_of_the_claims():
    claims = list(table_after(text_of(REPOSITORY / "results/claims.md"), "| claim |").values())
    readme = list(table_after(text_of(PAGES[0]), "| claim of the abstract |").values())
    assert readme[1:] == [[short(each) for each in row] for row in claims[1:]]
    assert short("does not hold (a tie with refit)") == "no; a tie with refit"
    assert short("holds with refit") == "holds with refit"


def test_results_gives_the_verdicts_of_the_claims():
    claims = table_after(text_of(REPOSITORY / "results/claims.md"), "| claim |")
    assert table_after(text_of(RESULTS), "| claim |") == claims


def test_tables_at_an_equal_drop_are_those_of_the_runs():
    sweeps, text = results("sweeps"), text_of(RESULTS)
    assert ratios_table(sweeps) in text
    assert sizes_table(sweeps, "weights", 1.0) in text
    made = at_equal_drop.report(read_tables(REPOSITORY / "results"))
    assert made == text_of(REPOSITORY / "results/at_equal_drop.md")


def test_closed_forms_and_convex_programs_are_those_of_the_table():
    text = text_of(RESULTS)
    assert wrong_closed_forms(text) == set()
    assert wrong_closed_forms(text.replace("| 14.0 %", "| 14.1 %")) == {"Net-Trim, lenet5: 14.1 %"}
    assert wrong_closed_forms(
        text.replace("| which one | activation-aware SVD", "| which one | magnitude")
    ) == {"which one, lenet_300_100: magnitude"}


def test_closed_forms_keep_less_where_the_readme_says_so():
    networks = []
    for model in NETWORKS:
        closed = smallest(model, CLOSED_FORMS, 0.5, one_tolerance=True)
        convex = [smallest(model, [each], 0.5, one_tolerance=True) for each in ("ddlr", "nettrim")]
        certain = all(
            EARLIER[each["method"]] != "at most " or not is_earlier(each) for each in convex
        )
        if certain and all(closed["fraction"] < each["fraction"] for each in convex):
            networks.append(model)
    assert networks == [each for each in NETWORKS if each != "fc_nettrim"]
    assert "on four networks; on 784-300-1000-100-10 that is open" in prose(PAGES[0])


def test_the_readme_says_how_ours_stand_to_the_best_baseline_on_each_axis():
    readme = prose(PAGES[0])
    ours = {model: smallest_of(our_sizes(results("sweeps"), Asked(model))) for model in NETWORKS}
    shares = [100 * each.mean for each in ours.values()]
    assert f"ours keep {min(shares):.1f} to {max(shares):.1f} % of the weights" in readme
    said = {
        counted: ["{:.2f} to {:.2f}".format(*extremes(ratios(counted, drop))) for drop in (1, 0.5)]
        for counted in ("weights", "bytes")
    }
    at_one, at_half = said["weights"]
    assert f"{at_one} times what the best baseline keeps, and {at_half} times at half a" in readme
    at_one, at_half = said["bytes"]
    assert f"In bytes it is {at_one} and {at_half} times" in readme
    rows = results("sizes")
    run = set(rows[rows["method"].isin(TODAYS_RIVALS)]["model"])
    assert run == {"lenet_300_100", "fc_nettrim", "lenet5"}
    assert "On CIFAR-10 (one seed) today's rivals were not run" in readme
    assert set(results("targets").query("target == 'is ours'")["measured"]) == {"not measured"}
    assert "Times at an equal loss were not compared" in readme


def ratios(counted: str, drop: float) -> list[float]:
    """Ours over the best baseline, of each network."""
    rows = outcomes(f"our {counted} at a drop of at most {drop:g} points")
    return [float(text.partition(":")[0]) for text in rows["measured"]]


def extremes(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def outcomes(of: str) -> pd.DataFrame:
    """The rows of the targets with these words, by network in the order of `NETWORKS`."""
    targets = results("targets")
    found = [
        targets[targets["what"].str.startswith(f"{NETWORK_TITLES[model]}: {of}")]
        for model in NETWORKS
    ]
    assert [len(each) for each in found] == [1] * len(NETWORKS)
    return pd.concat(found).set_axis(NETWORKS)


def test_the_page_says_where_a_baseline_is_above_ours():
    text = prose(RESULTS)
    lose = text[text.index("### Where ours lose") :].partition("### ")[2].partition("### ")[0]
    for counted in ("weights", "bytes"):
        judged = outcomes(f"baselines above ours at any number of {counted}")
        places = []
        for model, row in judged[judged["met"] == "no"].iterrows():
            low, high = re.search(r"within ([\d.]+) to ([\d.]+) %", row["measured"]).groups()
            points = re.search(r"excess \+([\d.]+)", row["measured"])[1]
            where = f"{low} %" if low == high else f"{low} to {high} %"
            places.append(f"{NAMES[model]} (at {where}, by at most {points} points)")
        assert f"At equal {counted} a baseline is above ours on {' and '.join(places)}." in lose


def test_the_page_says_where_a_baseline_trained_together_keeps_less():
    runs, text = with_all_seeds(results("sweeps")), prose(RESULTS)
    runs = runs[runs["refit"] == "network"]
    for drop, words in ((1, "at one point"), (0.5, "at half a point")):
        places = []
        for model in NETWORKS:
            asked = Asked(model, drop, ("network",))
            of_model = runs[runs["model"] == model]
            ours = smallest_of(our_sizes(of_model, asked))
            best = smallest_of(sizes(of_model[is_baseline(of_model)], asked))
            if ours is not None and best is not None and best.mean < ours.mean:
                title = METHOD_TITLES[best.method]
                pair = f"{100 * best.mean:.2f} against {100 * ours.mean:.2f} %"
                places.append(f"{title} on {NAMES[model]} ({pair})")
        said = f"keep less {words}: {', '.join(places)}"
        assert (said in text) if places else (f"keep less {words}:" not in text), places


def test_sizes_with_all_layers_trained_together_are_those_of_the_runs():
    said = table_after(text_of(RESULTS), "| LeNet-300-100, network refit |")
    for name, cells in list(said.items())[1:]:
        for cell, size in zip(cells, trained_together("lenet_300_100", ROWS[name]), strict=True):
            assert cell == size, name
    assert len(said) == 6
    on_few, on_more = trained_together("lenet5", ["fewest_nonzeros"])
    few = f"On LeNet-5 the fewest nonzeros ran so, too: {on_more}, with 5000 samples {on_few}."
    assert few in prose(RESULTS)
    alone = smallest_of(our_sizes(results("sweeps"), Asked("lenet5")))
    worse = trained_together("lenet5", ["smallest"])[0]
    words = f"worse: {worse}, without it {100 * alone.mean:.2f} % ({alone.test_drop:.2f})."
    assert alone.method == "smallest" and words in prose(RESULTS)


def trained_together(model: str, methods: list[str]) -> list[str]:
    """The size and test drop of methods with a network refit, on the usual samples and on more."""
    runs = with_all_seeds(results("sweeps"))
    runs = runs[(runs["model"] == model) & (runs["refit"] == "network")]
    runs = runs[runs["method"].isin(methods)]
    on_more = runs["network_refit"].str.startswith("20000 samples")
    found = []
    for rows in (runs[~on_more], runs[on_more]):
        if not len(rows):
            found.append("not run")
            continue
        size = smallest_of(sizes(rows, Asked(model, refits=("network",))))
        digits = 2 if size.mean < 0.01 else 1
        bound = "at most " if size.at_most else ""
        found.append(f"{bound}{100 * size.mean:.{digits}f} % ({size.test_drop:.2f})")
    return found


def test_what_the_better_allocation_brought_is_as_in_the_runs():
    runs, text = with_all_seeds(results("sweeps")), prose(RESULTS)
    runs = runs[runs["refit"] == "layer"]
    found = []
    for method in ("alps", "fewest_nonzeros"):
        for model in ("lenet_300_100", "lenet5"):
            of_method = runs[(runs["model"] == model) & (runs["method"] == method)]
            found += [
                100 * smallest_of(sizes(of_method[of_method["goal"] == goal], Asked(model))).mean
                for goal in ("kept_fraction", "kept_fraction_by_roots")
            ]
    sentence = text[text.index("it brought ALPS from") :].partition(", the fewest nonzeros")
    first, second = (re.findall(r"[\d.]+\d", part[:90]) for part in (sentence[0], sentence[2]))
    said = [each for each in first + second if "." in each]
    assert said == [f"{each:.2f}" for each in found]


def test_pages_say_how_many_rows_are_of_earlier_code():
    rows = results("sweeps")
    earlier = rows["earlier"].fillna(False).astype(bool)
    assert f"Earlier code made {100 * earlier.mean():.0f} % of the rows" in text_of(PAGES[0])
    by_roots = rows["model"].isin(["lenet_300_100", "lenet5"]) & rows["goal"].str.endswith(
        "_by_roots"
    )
    former = (rows["method"] == "fewest_nonzeros") & ~by_roots.fillna(False).astype(bool)
    assert f"a former search {100 * former.mean():.0f} %" in text_of(PAGES[0])
    assert f"made by a former search ({100 * former.mean():.0f} % of the rows)" in prose(RESULTS)
    assert f"{earlier.sum()} of the {len(earlier)} rows" in prose(RESULTS)
    chosen = results("sweeps")["chosen_by_factors"].sum()
    assert f"{chosen} rows (`chosen_by_factors`)" in prose(RESULTS)


def test_the_times_of_the_fully_connected_layers_are_those_of_the_table():
    said = table_after(text_of(REPOSITORY / "docs/performance.md"), "| network, method |")
    runs = results("inference").query("threads == 1 and engine != 'compiled'")
    titles = ["LeNet-300-100", "784-300-1000-100-10", "LeNet-5", "Net-Trim's conv net"]
    models = dict(zip([*titles, "VGG-style net"], NETWORKS, strict=True))
    methods = {**ROWS, "DDLR": ["ddlr"]}
    for name, cells in said.items():
        if name == "network, method":
            continue
        network, _, method = name.partition(", ")
        rows = runs[(runs["model"] == models[network]) & runs["method"].isin(methods[method])]
        speedup = rows.set_index(["form", "batch", "engine"])["speedup"]
        kept, promised = rows["kept_fraction"].iloc[0], rows["promised"].iloc[0]
        stored, fused = speedup["stored", 256], speedup["fused", 256]
        assert cells == [
            f"{100 * kept:.1f}",
            f"{promised:.1f}",
            f"{stored['torch']:.1f} / {stored['onnxruntime']:.1f}",
            f"{fused['torch']:.1f} / {fused['onnxruntime']:.1f}",
            f"{fused.max() / promised:.2f}",
            f"{speedup['fused', 1].max():.1f}",
        ], name
    assert len(said) - 1 == len(runs[["model", "method"]].drop_duplicates())


def test_the_times_of_networks_that_others_trained_are_those_of_the_table():
    text = text_of(REPOSITORY / "docs/real-networks.md")
    said = table_after(text, "| network, method | torch, 1 |")
    stored = results("real_latency").query("form == 'stored' and threads == 1")
    models = {"sentence encoder": "sentence_encoder", "RNet": "mtcnn_rnet", "ONet": "mtcnn_onet"}
    for name, cells in list(said.items())[1:]:
        network, _, method = name.partition(", ")
        rows = stored[(stored["network"] == models[network]) & stored["method"].isin(ROWS[method])]
        speedup = rows.set_index(["engine", "batch"])["speedup"]
        sizes = [rows[column].iloc[0] / 1e6 for column in ("file_bytes", "file_bytes_dense")]
        wanted = [
            speedup[engine, batch] for engine in ("torch", "onnxruntime") for batch in (1, 32)
        ]
        assert cells == [f"{value:.2f}" for value in wanted + sizes], name
    assert len(said) - 1 == len(stored[["network", "method"]].drop_duplicates())


def test_the_qualities_of_the_face_detector_are_those_of_the_table():
    text = (REPOSITORY / "docs/real-networks.md").read_text()
    table, runs = table_after(text, "**Face detector.** Quality, and"), results("real")
    parallel = runs[runs["order"] == "parallel"]
    places = [(model, kept) for model in ("mtcnn_rnet", "mtcnn_onet") for kept in (0.1, 0.25)]
    for name, cells in table.items():
        for cell, (model, wanted) in zip(cells, places, strict=True):
            [row] = parallel[
                (parallel["method"] == ROWS[name][0])
                & (parallel["network"] == model)
                & (parallel["wanted"] == wanted)
            ].to_dict("records")
            assert cell == f"{row['quality']:.3f} ({100 * row['kept_fraction']:.1f})", name


def test_the_qualities_of_the_sentence_encoder_are_those_of_the_table():
    text = (REPOSITORY / "docs/real-networks.md").read_text()
    after = text[text.index("**Sentence encoder, half") :]
    lines = [line.strip("|").split("|") for line in after.splitlines() if line.startswith("|")]
    said = [tuple(cell.strip() for cell in line) for line in lines[2:] if len(line) == 4]
    runs = results("real")
    for name, samples, quality, kept in said:
        [row] = runs[
            (runs["network"] == "sentence_encoder")
            & (runs["calibration_samples"] == int(samples))
            & (runs["method"] == ROWS[name.partition(",")[0]][0])
        ].to_dict("records")
        assert (row["cascade_bound"] == "reached") == ("cascade" in name)
        assert quality == f"{row['quality']:.3f}"
        assert kept == f"{100 * row['kept_fraction']:.2f}"
    assert len(said) == (runs["network"] == "sentence_encoder").sum() >= 3


def test_what_cascade_raises_is_as_in_the_claims():
    claims = text_of(REPOSITORY / "results/claims.md")
    lines = [line for line in claims.splitlines() if "| cascade |" in line]
    said = table_after(text_of(RESULTS), "| in cascade |")
    for name, row in said.items():
        if name != "in cascade":
            (line,) = [each for each in lines if each.startswith((f"| {name} (", f"| {name} |"))]
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert row == [f"{cells[5]} %", cells[6], f"{cells[7]} %"]
    assert len(said) == 8


def test_what_the_gain_comes_from_is_as_in_the_ablation():
    steps = results("ablation")
    steps = steps[steps["largest_drop"] == 1]

    def sizes(model: str) -> list[str]:
        closed, selected = (
            steps[(steps["model"] == model) & (steps["inputs"] == inputs)]
            for inputs in ("all", "selected")
        )
        order = ["closed form", "rank search", "refit", "cascade"]
        fractions = [
            closed.set_index("step")["fraction"]["closed form"],
            *selected.set_index("step")["fraction"][order],
        ]
        return [f"{100 * each:.1f}" for each in fractions]

    mlp, conv = sizes("lenet_300_100"), sizes("lenet5")
    said = prose(RESULTS)
    assert f"keeps {mlp[0]} % of LeNet-300-100 on all inputs and {mlp[1]} % on selected" in said
    assert f"(LeNet-5: {conv[0]} and {conv[1]} %)" in said
    changed = "{}, {} and {} % (LeNet-5: {}, {} and {} %)".format(*mlp[2:], *conv[2:])
    assert f"then change it to {changed}" in said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_are_of_the_kind_that_is_checked(page):
    assert not unchecked_links(text_of(page))


def test_a_link_of_another_kind_is_found():
    text = '[a](b.md "title") <img src="c.png">\n[d]: e.md\n[f](g.md)'
    assert unchecked_links(text) == ['](b.md "', "<img ", "[d]: "]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keyword_arguments_are_there(page):
    for code in calls(text_of(page)):
        assert unknown_keywords(code) == set(), code


def test_a_keyword_argument_that_is_not_there_is_found():
    text = "`ddlr.compress(model, epsilon=1)` and `settings=ddlr.Settings(ridge=1)`"
    assert [unknown_keywords(code) for code in calls(text)] == [{"epsilon"}, set()]
    assert unknown_keywords("ddlr.compress(m, c, kept_fraction=0.1, goal=1)") == {"goal"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_of_commands_are_there(page):
    for module, settings in commands(text_of(page)):
        assert refused(module, settings) is None, (module, settings)


def test_a_setting_that_is_not_there_is_found():
    text = "`python -m experiments.compress -m method=ddlr,nettrim suit=convex launcher=local`"
    ((module, settings),) = commands(text)
    assert "suit" in refused(module, settings)
    assert refused("compress", ["launcher=cloud"]) == "cloud.yaml is not there"
    assert refused("compress", ["method=ddlr,nettrim", "launcher=slurm"]) is None
