"""The demonstration of alignment: its experts, its accuracies and its figures, at toy size."""

import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from neulig_fast import Head, alignment
from neulig_fast.demo import aligned, aligned_figures, origins
from neulig_fast.demo.aligned import Part, Trial
from neulig_fast.demo.origins import Member, OriginSettings
from neulig_fast.demo.pipeline import Stages

TOY = OriginSettings.toy()
GROUP = "ViT, two tasks"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alignment")
    file = Path(__file__).resolve().parents[1] / "examples" / "alignment.py"
    spec = importlib.util.spec_from_file_location("alignment_example", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    console = Console(file=io.StringIO(), width=120)
    example.run(folder, TOY, {GROUP: origins.GROUPS[GROUP]}, console)
    return folder, json.loads((folder / "alignment.json").read_text()), console.file.getvalue()


def test_every_row_is_in_the_report_and_on_the_screen(finished):
    _, report, printed = finished
    rows = report["groups"][GROUP]["rows"]
    assert {"each task's own expert", "uniform average", "both aligned (MuDSC), REPAIR"} < set(rows)
    assert sum(name.startswith("NeuLig, ") for name in rows) == 10
    for name, score in rows.items():
        assert name in printed
        assert 0 <= score["joint"] <= score["own"] <= 100


def test_curves_share_their_ends_because_an_order_changes_no_function(finished):
    loss = finished[1]["groups"][GROUP]["curves"]["loss"]
    unaligned = loss["unaligned"]
    for curve in loss.values():
        assert curve[0] == unaligned[0]
        assert curve[-1] == pytest.approx(unaligned[-1], rel=1e-5)
    assert any(curve[1] != pytest.approx(unaligned[1], rel=1e-5) for curve in loss.values())


def test_figures_are_drawn(finished):
    for name in ("barriers", "vit-two-tasks"):
        png = (finished[0] / f"alignment-{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) < 150_000


def test_experts_are_the_same_bits_on_one_thread_and_on_two_and_origins_differ():
    output = origins.Output(
        {"letters": torch.randn(26, 8), "textures": torch.randn(12, 8)},
        dataclasses.replace(
            origins.draw(Member(0, "letters"), TOY, "train"), class_names=("",) * 38
        ),
    )
    members = [Member(0, "letters"), Member(1, "letters"), Member(1, "textures")]
    groups = [origins.Group("vit", tuple(members))]

    def trained(threads):
        demo = dataclasses.replace(TOY.demo, threads=threads)
        settings = dataclasses.replace(TOY, demo=demo)
        return origins.train(groups, output, settings, Stages(Console(file=io.StringIO())))

    one, two = trained(1), trained(2)
    assert list(one) == [("vit", member) for member in members]
    for key, state in one.items():
        assert all(torch.equal(tensor, two[key][name]) for name, tensor in state.items())
    first, second = (one["vit", member] for member in members[:2])
    assert not torch.allclose(first["proj"], second["proj"])


def test_halves_of_a_task_share_it_out():
    whole = origins.draw(Member(0, "letters"), TOY, "test")
    halves = [origins.draw(m, TOY, "test") for m in origins.GROUPS["ResNet, halves of one task"][1]]
    assert [half.name for half in halves] == ["letters 1-13", "letters 14-26"]
    assert halves[0].class_names + halves[1].class_names == whole.class_names
    assert len(whole.images) == sum(len(half.images) for half in halves)
    labels = torch.cat([half.labels + 13 * k for k, half in enumerate(halves)])
    assert torch.equal(labels.sort().values, whole.labels.sort().values)
    weights = {"letters": torch.arange(26.0)[:, None]}
    assert Member(0, "letters", range(13, 26)).head(weights)[:, 0].tolist() == list(range(13, 26))


def trial(layers):
    """A network and a permuted copy, tested on what the network says itself."""
    torch.manual_seed(0)
    network = nn.Sequential(*layers()).eval()
    spec = alignment.spec_for(network)
    permuted, _ = alignment.random_permutation(network, spec, seed=1)
    head = Head(torch.randn(6, 5))
    images = torch.randn(64, 3, 8, 8)
    labels = head(network(images)).argmax(-1)
    parts = [
        Part(images[labels < 3], labels[labels < 3]),
        Part(images[labels > 2], labels[labels > 2]),
    ]
    experts = [network.state_dict(), permuted.state_dict()]
    return Trial(
        names=("low", "high"), template=network, experts=experts, head=head, starts=[0, 3, 6],
        calibration=parts, test=parts, mixed=list(images.split(32)),
    )  # fmt: skip


def plain():
    return (
        nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


def normed():
    return (nn.Conv2d(3, 12, 3, 2, bias=False), nn.BatchNorm2d(12), nn.ReLU(), *plain_end())


def plain_end():
    return nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)


@pytest.fixture(scope="module")
def permuted():
    made = trial(plain)
    return made, aligned.make_alignments(made, TOY)


def test_alignment_of_a_permuted_copy_gives_the_network_and_the_average_does_not(permuted):
    made, found = permuted
    rows = dict(aligned.merged_rows(made, found))
    perfect = aligned.Score(100, 100)
    for name in (
        "each task's own expert", "weights aligned (Git Re-Basin)", "activations aligned",
        "both aligned (MuDSC)", "both aligned (MuDSC), REPAIR",
    ):  # fmt: skip
        assert rows[name] == perfect, name
    assert rows["uniform average"].joint < 95
    assert found.dual.trace_after < 1e-6 * found.dual.trace_before


def test_neulig_merges_aligned_copies_as_their_ensemble_and_unaligned_ones_worse(permuted):
    made, found = permuted
    rows = {name: (score, top) for name, score, top in aligned.neulig_rows(made, found.dual, TOY)}
    assert rows["NeuLig, published: ensemble"][0].joint == 100
    for mode in aligned.MODES:
        assert rows[f"NeuLig, published: {mode}, aligned"][0].joint == 100
        assert rows[f"NeuLig, published: {mode}, unaligned"][0].joint < 100
    assert all(0.5 < top < 1 for _, top in rows.values())


def test_merges_with_batchnorm_are_scored_with_statistics_of_their_own():
    made = trial(normed)
    broken = {k: t * 9 if "running_var" in k else t for k, t in made.experts[0].items()}
    assert made.of(broken) == made.of(made.experts[0])
    assert made.loss(broken) == made.loss(made.experts[0])
    rows = dict(aligned.merged_rows(made, aligned.make_alignments(made, TOY)))
    assert "own expert, BatchNorm re-estimated" in rows
    assert not any("REPAIR" in name for name in rows)


def test_scores_tell_the_task_from_all_classes(permuted):
    made, _ = permuted

    def predict(images, i):  # always class 4, then the right class of the first task
        logits = torch.zeros(len(images), 6)
        logits[:, 4] = 2
        labels = made.test[i].labels
        logits[torch.arange(len(images)), labels] += 1
        return logits

    score = made.score(predict, made.test)
    fours = (made.test[1].labels == 4).float().mean().item()
    assert score.own == pytest.approx(100 * (1 + fours) / 2)
    assert score.joint == pytest.approx(100 * (0 + fours) / 2)


def test_the_ensemble_is_every_experts_distribution_over_its_own_classes(permuted):
    made, _ = permuted
    images = made.test[0].images
    probabilities = aligned.ensemble(made, images).exp()
    for columns in (probabilities[:, :3], probabilities[:, 3:]):
        torch.testing.assert_close(columns.sum(-1), torch.ones(len(images)))
    expected = made.head(made.template(images))[:, 3:].softmax(-1)
    torch.testing.assert_close(probabilities[:, 3:], expected)


def test_a_straight_way_between_two_networks():
    start = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)}
    end = {"w": torch.tensor([4.0, 0.0]), "n": torch.tensor(7)}
    quarter = aligned_figures.straight(start, end, 0.25)
    assert quarter["w"].tolist() == [1.0, 1.5] and quarter["n"] == 3
    assert aligned_figures.points(5) == [0, 0.25, 0.5, 0.75, 1]


def test_the_table_in_the_docs_is_the_committed_run():
    root = Path(__file__).resolve().parents[1]
    file = root / "benchmarks/results/amd-epyc-2-cores/alignment.json"
    groups = json.loads(file.read_text())["groups"]
    page = (root / "docs" / "align.md").read_text()
    assert f"| | {' | '.join(groups)} |" in page
    for name in dict.fromkeys(row for group in groups.values() for row in group["rows"]):
        scores = [group["rows"].get(name) for group in groups.values()]
        cells = [f"{s['own']:.1f} / {s['joint']:.1f}" if s else "–" for s in scores]
        assert f"| {name} | {' | '.join(cells)} |" in page
