"""Plots of benchmarks are drawn from what `freshrank bench --json` wrote, every cell of it."""

import pytest
from matplotlib.image import imread

from deploy import bench_curve, bench_growth


@pytest.mark.parametrize(
    ("plot", "names", "cells"),
    [
        (bench_growth.plot_growth, bench_growth.FIGURES, bench_growth.USERS | bench_growth.PARTITIONS),
        (bench_curve.plot_curve, bench_curve.FIGURES, bench_curve.SIZES | bench_curve.CANDIDATE_COUNTS),
    ],
)
def test_each_figure_of_each_cell_is_drawn(plot, names, cells, tmp_path):
    figures = {f"{name}_{cell}": {"median": 2.0, "min": 1.5, "max": 4.0, "unit": "1"} for name in names for cell in cells}
    plot({"figures": figures}, tmp_path / "new" / "plot.png")
    drawn = imread(tmp_path / "new" / "plot.png")
    assert drawn[..., :3].min() < 0.5 < drawn[..., :3].max(), "there is something on it"
    for missing in figures:
        with pytest.raises(KeyError, match=missing):
            plot({"figures": {name: figure for name, figure in figures.items() if name != missing}}, tmp_path / "plot.png")
