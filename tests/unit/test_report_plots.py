"""Pictures, and the grid they are drawn on."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from prunepeft.errors import CheckpointError
from prunepeft.report.grid import Module, make_grid, modules_of, split_id
from prunepeft.report.plot_kept import kept_map
from prunepeft.report.plot_maps import normalised, partition_map, saliency_map
from prunepeft.report.plot_series import removal_shares, removals_by_layer, rounds_against_budget
from prunepeft.report.plot_style import kind_colour, spread, styled, text_on, tint
from prunepeft.report.record import Evidence, History, Result
from prunepeft.report.tables import drop_table, make_tables, size_counts
from prunepeft.space import Placement, Site, Slot

CRITERIA = ("activation", "gradient", "minimum_weight", "snip", "threshold", "zeros")


def make_evidence(tmp_path, n_layers, *, stacks=("encoder",), rich=False):
    """A run over `n_layers` layers a stack: odd layers keep their modules, even ones lose them."""
    slots = []
    for stack in stacks:
        for i in range(n_layers):
            roles = "qkvo" if rich else "q"
            sites = [
                Site(f"{stack}.{i}.{r}", stack, i, n_layers, "attention", r, 8, 8) for r in roles
            ]
            down = Site(f"{stack}.{i}.down", stack, i, n_layers, "ffn", "down", 8, 8, "x")
            slots += [Slot((site,), "lora", (4,)) for site in sites]
            slots += [Slot((down,), kind, (16,)) for kind in ("serial_adapter", "parallel_adapter")]
    space = Placement({slot: slot.sizes[-1] for slot in slots})
    kept = space.without({s.id for s in slots if s.layer % 2 == 0})
    gone = [s.id for s in slots if s not in kept]
    saliency = {c: {s.id: s.layer * 10.0**-k for s in slots} for k, c in enumerate(CRITERIA)}
    modules = [
        {"id": s.id, "kind": s.kind, "size": n, "n_params": 100 * n} for s, n in kept.sizes.items()
    ]
    history = {
        "space": space.to_dict(),
        "strategy": {s.partition: ["snip"] for s in slots},
        "warmup": {
            "turns": [{"criterion": c, "removed": gone[:2]} for c in CRITERIA],
            "tendency": {c: {slots[0].partition: 2} for c in CRITERIA},
        },
        "rounds": [
            {
                "round": 1,
                "cost_before": 9e6,
                "cost_after": 4e6,
                "saliency": saliency,
                "removed": gone,
            }
        ],
    }
    result = {"placement": {"modules": modules}, "budget": {"text": "1%", "limit": 5e6}}
    return Evidence(
        run=tmp_path,
        result=Result.model_validate(result),
        history=History.model_validate(history),
        space=space,
        kept=kept,
    )


def overlaps(figure):
    """Pairs of axis labels, tick labels and cell texts that are drawn over each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = []
    for axes in figure.axes:
        texts = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            seen = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [label for tick in seen for label in (tick.label1, tick.label2)]
        for text in texts:
            if text.get_text().strip() and text.get_visible():
                box = text.get_window_extent(canvas.get_renderer())
                boxes.append((text.get_text(), box))
    return [
        (a, b)
        for i, (a, first) in enumerate(boxes)
        for b, second in boxes[i + 1 :]
        if min(first.x1, second.x1) - max(first.x0, second.x0) > 1
        and min(first.y1, second.y1) - max(first.y0, second.y0) > 1
    ]


@pytest.mark.parametrize("draw", [kept_map, saliency_map, partition_map, removal_shares])
@pytest.mark.parametrize(
    ("n_layers", "stacks", "rich"),
    [
        (2, ("encoder",), False),
        (6, ("encoder",), False),
        (32, ("decoder",), True),
        (12, ("encoder", "decoder"), True),
    ],
    ids=["2 layers", "6 layers", "32 layers", "two stacks"],
)
def test_labels_do_not_overlap(tmp_path, draw, n_layers, stacks, rich):
    with styled():
        figure = draw(make_evidence(tmp_path, n_layers, stacks=stacks, rich=rich))
        assert overlaps(figure) == []
        assert max(figure.get_size_inches()) < 25


def test_kept_map_shows_every_size_and_every_parameter(tmp_path):
    with styled():
        figure = kept_map(make_evidence(tmp_path, 6))
    cells, side = figure.axes
    sizes = sorted(t.get_text() for t in cells.texts if t.get_text().isdigit())
    assert sizes == ["16"] * 6 + ["4"] * 3
    assert len(cells.patches) == 18
    assert sum(patch.get_width() for patch in side.patches) == pytest.approx((6 * 16 + 3 * 4) / 10)
    assert "parameters (thousand)" in side.get_xlabel()


def test_kept_map_counts_modules_where_parameters_are_unknown(tmp_path):
    evidence = make_evidence(tmp_path, 4)
    bare = Evidence(run=tmp_path, result=Result(), kept=evidence.kept)
    with styled():
        side = kept_map(bare).axes[1]
    assert sum(patch.get_width() for patch in side.patches) == len(evidence.kept) == 6
    assert side.get_xlabel() == "kept modules"


def test_saliency_is_normalised_per_criterion_and_constant_ones_say_so(tmp_path):
    evidence = make_evidence(tmp_path, 4)
    evidence.history.rounds[0].saliency["zeros"].update(
        dict.fromkeys(evidence.history.rounds[0].saliency["zeros"], 1.0)
    )
    with styled():
        panels = saliency_map(evidence).axes
    titles = [axes.get_title(loc="left") for axes in panels[:6]]
    assert titles == [*CRITERIA[:5], "zeros (all equal)"]
    faces = [axes.collections[1].get_facecolors().tolist() for axes in panels[:5]]
    assert all(face == faces[0] for face in faces)


def test_removal_bars_add_up(tmp_path):
    evidence = make_evidence(tmp_path, 6)
    with styled():
        shares = removal_shares(evidence).axes
        total = removals_by_layer(evidence).axes[0]
    for axes in shares:
        assert sum(patch.get_height() for patch in axes.patches) == pytest.approx(100)
    assert sum(patch.get_height() for patch in total.patches) == 9
    assert list(total.lines[0].get_ydata()) == [3] * 6


def test_rounds_are_drawn_against_the_budget(tmp_path):
    with styled():
        axes = rounds_against_budget(make_evidence(tmp_path, 4)).axes[0]
    costs, budget = axes.lines
    assert list(costs.get_ydata()) == [9e6, 4e6]
    assert list(costs.get_xdata()) == [0, 1]
    assert set(budget.get_ydata()) == {5e6}
    assert budget.get_label() == "budget 1% = 5,000,000"


@pytest.mark.parametrize(
    "draw",
    [
        kept_map,
        saliency_map,
        partition_map,
        removal_shares,
        removals_by_layer,
        rounds_against_budget,
    ],
)
def test_without_evidence_there_is_no_figure(tmp_path, draw):
    assert draw(Evidence(run=tmp_path, result=Result())) is None


def test_kinds_keep_their_colour_and_unknown_ones_get_their_own():
    kinds = ("another", "lora", "other")
    colours = [kind_colour(kind, kinds) for kind in kinds]
    assert len(set(colours)) == 3
    assert kind_colour("lora", ("lora",)) == colours[1]


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_text_on_a_colour_is_black_or_white(colour):
    assert text_on(colour) in ("#111111", "#ffffff")
    assert text_on((1.0, 1.0, 1.0)) == "#111111"
    assert text_on(tint("#000000", 1.0)) == "#ffffff"


@given(st.dictionaries(st.tuples(st.integers(), st.integers()), st.floats(allow_nan=False)))
def test_normalised_saliency_is_in_range(values):
    values = {k: v for k, v in values.items() if math.isfinite(v)}
    levels = normalised(values)
    assert levels.keys() == values.keys()
    assert all(0 <= level <= 1 for level in levels.values())
    order = sorted(values, key=values.get)
    assert [levels[k] for k in order] == sorted(levels.values())


@given(st.lists(st.sampled_from("ab"), min_size=1))
def test_spread_leaves_a_gap_between_groups(groups):
    places = spread(groups)
    steps = [after - before for before, after in pairwise(places)]
    changes = [a != b for a, b in pairwise(groups)]
    assert [step > 1 for step in steps] == changes


def test_a_slot_named_by_its_path_has_one_column_in_all_layers():
    ids = [f"encoder.{i}.ffn.block.{i}.mixer.in_proj:lora" for i in range(3)]
    grid = make_grid([Module(i, *split_id(i), size=1) for i in ids])
    assert grid.columns == (("ffn", "mixer.in_proj", "lora"),)
    assert grid.rows == (("encoder", 0), ("encoder", 1), ("encoder", 2))


@pytest.mark.parametrize("text", ["", "a.b.c", "encoder.x.ffn.o:lora", "encoder.1.ffn.o", "..1.:"])
def test_what_is_no_slot_id_is_refused(text):
    with pytest.raises(CheckpointError, match="is not a slot id"):
        split_id(text)


def test_a_placement_of_absurd_depth_does_not_fill_the_memory():
    site = Site("a.7.q", "decoder", 7, 2**31 - 1, "attention", "q", 1, 1)
    grid = make_grid((), Placement({Slot((site,), "lora", (1,)): 1}))
    assert grid.rows == (("decoder", 7),)


def test_modules_come_in_model_order(tmp_path):
    evidence = make_evidence(tmp_path, 12, stacks=("decoder", "encoder"))
    rows = [module.row for module in modules_of(evidence)]
    assert rows[0] == ("encoder", 1)
    assert rows[-1] == ("decoder", 11)
    assert rows.index(("encoder", 9)) < rows.index(("encoder", 11)) < rows.index(("decoder", 1))


def test_drop_list_is_in_order_of_removal(tmp_path):
    evidence = make_evidence(tmp_path, 4)
    table = drop_table(evidence.history)
    assert [row[0] for row in table.rows] == list(range(1, 7))
    assert [row[2] for row in table.rows] == evidence.history.rounds[0].removed
    assert [c.name for c in table.columns][-6:] == [f"{name} saliency" for name in CRITERIA]
    assert {table.name for table in make_tables(evidence)} >= {"rounds", "dropped_modules"}


def test_size_counts_by_kind(tmp_path):
    modules = modules_of(make_evidence(tmp_path, 4))
    assert size_counts(modules) == {
        "lora": {4: 2},
        "parallel_adapter": {16: 2},
        "serial_adapter": {16: 2},
    }
