"""Matching of units: assignments, blocks and ties, zips, against searches over every answer."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neulig_fast.alignment.assignment import assign, assign_many
from neulig_fast.alignment.match import match_nodes
from neulig_fast.alignment.spec import Node, Spec, block_order, check_match
from neulig_fast.alignment.zip import Zip, zip_in, zip_nodes, zip_out, zip_units

F64 = {"dtype": torch.float64}
EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **F64)


def shuffled(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def permutations(n: int) -> torch.Tensor:
    """(n!, n): every order of n things."""
    return torch.tensor(list(itertools.permutations(range(n))))


def matched(similarity: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """The mean matched similarity of one order, or of every row of several."""
    return similarity[torch.arange(similarity.shape[0]), orders].mean(-1)


def same(a: float, b: float) -> bool:
    return abs(a - b) <= 20 * EPS * max(1.0, abs(b))


# --- assignment -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", range(4))
def test_no_order_beats_the_assignment(n, seed):
    similarity = normal(n, n, seed=seed)
    order, value = assign(similarity)
    every = matched(similarity, permutations(n))
    assert torch.equal(order, permutations(n)[every.argmax()])
    assert same(value, float(every.max()))
    assert order.dtype == torch.int64


def test_the_largest_entry_is_left_where_that_pays():
    order, value = assign(torch.tensor([[1.0, 0.75], [0.75, 0.0]], **F64))
    assert order.tolist() == [1, 0] and value == 0.75


def test_the_order_puts_units_beside_those_of_network_one():
    one = normal(40, 9)
    other = one[shuffled(40)]
    order, value = assign(torch.corrcoef(torch.cat([one, other]))[:40, 40:])
    assert torch.equal(other[order], one)
    assert same(value, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_is_computed_in_double(dtype):
    similarity = normal(6, 6).to(dtype)
    order, value = assign(similarity)
    every = matched(similarity.double(), permutations(6))
    assert torch.equal(order, permutations(6)[every.argmax()])
    assert same(value, float(every.max()))


def test_layout_gradient_and_argument_are_left_alone():
    wide = normal(12, 12).requires_grad_()
    before = wide.detach().clone()
    order, value = assign(wide[::2, 1::2].T)
    assert (order.tolist(), value) == (lambda o, v: (o.tolist(), v))(*assign(before[::2, 1::2].T))
    assert torch.equal(wide.detach(), before)


@pytest.mark.parametrize("m", [0, 1, 2, 7])
def test_a_batch_is_its_matrices_on_any_number_of_threads(m):
    batch = normal(m, 5, 5).round()  # with ties
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            orders, values = assign_many(batch)
            assert orders.shape == (m, 5) and values.shape == (m,)
            for one, order, value in zip(batch, orders, values, strict=True):
                alone, its = assign(one)
                assert torch.equal(order, alone) and float(value) == its
    finally:
        torch.set_num_threads(threads)


def test_ties_are_decided_alike_every_time():
    tied = torch.ones(30, 30)
    first, value = assign(tied)
    assert value == 1.0 and torch.equal(first.sort().values, torch.arange(30))
    for _ in range(5):
        assert torch.equal(assign(tied.clone())[0], first)


BROKEN = [
    (torch.ones(2, 3), r"similarity must be \(n, n\) with n >= 1, got \(2, 3\)"),
    (torch.ones(4), r"similarity must be \(n, n\) .*got \(4,\)"),
    (torch.ones(0, 0), r"similarity must be \(n, n\) with n >= 1, got \(0, 0\)"),
    (torch.ones(2, 2, 2), r"similarity must be \(n, n\) .*got \(2, 2, 2\)"),
    (torch.ones(2, 2, dtype=torch.int64), "similarity must be fp32, .* got torch.int64"),
    (torch.tensor([[0.0, float("nan")], [0.0, 0.0]]), r"similarity has 1 NaN .* at \(0, 1\)"),
    (torch.tensor([[0.0, 0.0], [-float("inf")] * 2]), r"similarity has 2 NaN .* at \(1, 0\)"),
]


@pytest.mark.parametrize("similarity, message", BROKEN)
def test_what_is_no_similarity_is_refused_by_name(similarity, message):
    with pytest.raises(ValueError, match=f"^assign: {message}"):
        assign(similarity)
    with pytest.raises(ValueError, match=f"^zip_units: (.*\n.*)*{message}"):
        zip_units(similarity, 1)


def test_every_fault_of_one_argument_is_listed():
    with pytest.raises(ValueError, match=r"2 problems\n.*\(m, n, n\).*got \(2, 3\)\n.*int64"):
        assign_many(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="assign: similarity must be a tensor, got list"):
        assign([[1.0]])


# --- blocks and ties --------------------------------------------------------------------------


def block_orders(g: int, m: int, shared: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every (order of the blocks, order of the units) a node of g blocks of m units may take."""
    found = []
    for blocks in permutations(g):
        for inner in itertools.product(permutations(m), repeat=1 if shared else g):
            rows = torch.stack(inner).expand(g, m)
            found.append((blocks, (blocks[:, None] * m + rows).flatten()))
    return found


def best_of_all(nodes, similarities):
    """The largest sum of mean similarities over all orders of the tied nodes."""
    best: dict[tuple, float] = {}
    for node, similarity in zip(nodes, similarities, strict=True):
        its: dict[tuple, float] = {}
        for blocks, order in block_orders(node.blocks, node.block_size, node.shared_inner):
            key, value = tuple(blocks.tolist()), float(matched(similarity, order))
            its[key] = max(value, its.get(key, -9.0))
        best = {key: best.get(key, 0.0) + value for key, value in its.items()}
    return max(best.values())


def tied(*shapes: tuple[int, int], shared: tuple[bool, ...] = ()) -> list[Node]:
    """Nodes of one tie from their (blocks, units per block)."""
    shared = shared or (False,) * len(shapes)
    return [
        Node(f"node{k}", g * m, g, "heads", one)
        for k, ((g, m), one) in enumerate(zip(shapes, shared, strict=True))
    ]


KINDS = {
    "one block": tied((1, 5)),
    "2 blocks of 3": tied((2, 3)),
    "3 blocks of 2": tied((3, 2)),
    "blocks of one unit": tied((4, 1)),
    "tied pair": tied((2, 3), (2, 3)),
    "tied, of different size": tied((3, 1), (3, 2)),
    "shared inside": tied((2, 3), shared=(True,)),
    "shared inside, one block": tied((1, 4), shared=(True,)),
    "shared, tied to free": tied((2, 3), (2, 2), shared=(True, False)),
    "both shared": tied((2, 2), (2, 3), shared=(True, True)),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_no_allowed_order_beats_the_match(kind, seed):
    nodes = KINDS[kind]
    similarities = [normal(n.size, n.size, seed=17 * seed + k) for k, n in enumerate(nodes)]
    orders, values = match_nodes(nodes, similarities)
    match = {node.name: order for node, order in zip(nodes, orders, strict=True)}
    check_match(Spec(nodes, ()), match, kind)
    for similarity, order, value in zip(similarities, orders, values, strict=True):
        assert same(value, float(matched(similarity, order)))
        assert value <= assign(similarity)[1] + 20 * EPS
    assert same(sum(values), best_of_all(nodes, similarities))


@pytest.mark.parametrize("seed", [0, 8])  # 8: one round of choices is not enough
def test_no_single_choice_improves_blocks_that_share_their_inside(seed):
    g, m = 6, 8
    (node,) = tied((g, m), shared=(True,))
    similarity = normal(g * m, g * m, seed=seed)
    (order,), (value,) = match_nodes([node], [similarity])
    blocks, inner = block_order(node, order), order[:m] % m
    tiles = similarity.view(g, m, g, m)
    other_blocks = assign(torch.stack([tiles[:, k, :, inner[k]] for k in range(m)]).mean(0))[1]
    other_inner = assign(torch.stack([tiles[a, :, blocks[a]] for a in range(g)]).mean(0))[1]
    assert same(value, other_blocks) and same(value, other_inner)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reordered_copy_is_found(kind):
    nodes = KINDS[kind]
    blocks = shuffled(nodes[0].blocks, seed=3)
    similarities, expected = [], []
    for k, node in enumerate(nodes):
        one = normal(node.size, 20, seed=k)
        rows = 1 if node.shared_inner else node.blocks
        inner = torch.stack([shuffled(node.block_size, seed=10 * k + b) for b in range(rows)])
        order = (blocks[:, None] * node.block_size + inner).flatten()
        other = torch.empty_like(one)
        other[order] = one + 0.05 * normal(node.size, 20, seed=100 + k)
        similarities.append(torch.corrcoef(torch.cat([one, other]))[: node.size, node.size :])
        expected.append(order)
    orders, _ = match_nodes(nodes, similarities)
    assert all(torch.equal(a, b) for a, b in zip(orders, expected, strict=True))


def test_tied_nodes_decide_together_by_their_means():
    nodes = tied((2, 1), (2, 3))
    wants_swap = torch.tensor([[0.0, 0.5], [0.5, 0.0]], **F64)
    wants_none = 0.4 * torch.eye(6, **F64)
    orders, values = match_nodes(nodes, [wants_swap, wants_none])
    assert [order.tolist() for order in orders] == [[1, 0], [3, 4, 5, 0, 1, 2]]
    assert same(values[0], 0.5) and values[1] == 0
    orders, values = match_nodes(nodes, [wants_swap, 2 * wants_none])
    assert [order.tolist() for order in orders] == [[0, 1], [0, 1, 2, 3, 4, 5]]
    assert values[0] == 0 and same(values[1], 0.8)


def test_renaming_the_units_of_both_networks_renames_the_match():
    node, similarity = Node("n", 12, 3), normal(12, 12)
    order = match_nodes([node], [similarity])[0][0]
    rename = torch.cat([4 * block + shuffled(4, int(block)) for block in shuffled(3)])
    renamed = match_nodes([node], [similarity[rename][:, rename]])[0][0]
    assert torch.equal(rename[renamed], order[rename])


def test_nodes_that_cannot_be_matched_are_refused():
    pair, square = tied((2, 3), (2, 3)), torch.ones(6, 6)
    with pytest.raises(ValueError, match=r"match_nodes: .* got 2 nodes and 1 similarities"):
        match_nodes(pair, [square])
    with pytest.raises(ValueError, match="one similarity per node, got 0 nodes"):
        match_nodes([], [])
    with pytest.raises(ValueError, match=r"of one tie, got a \(tie 'x'\), b \(tie None\)"):
        match_nodes([Node("a", 6, tie="x"), Node("b", 6)], [square, square])
    with pytest.raises(ValueError, match="of one tie"):
        match_nodes([Node("a", 6), Node("b", 6)], [square, square])
    with pytest.raises(ValueError, match="of one tie"):
        match_nodes([Node("a", 6, tie="x"), Node("b", 6, tie="y")], [square, square])
    with pytest.raises(ValueError, match="7 units cannot make 2 equal blocks"):
        match_nodes([Node("a", 7, 2)], [torch.ones(7, 7)])
    with pytest.raises(ValueError, match=r"(?s)2 problems.*node0 must be \(6, 6\), got.*node1 has"):
        match_nodes(pair, [torch.ones(6, 5), square.log().log()])
    with pytest.raises(TypeError, match="similarity of node node1 must be a tensor, got int"):
        match_nodes(pair, [square, 1])


# --- zip --------------------------------------------------------------------------------------


def greedy_by_the_book(similarity, networks, size, repeat=0.5, within=1.0):
    """Every rule as it is stated: look at all pairs, join the best, delete a column."""
    total = len(similarity)
    c = [[float(similarity[min(x, y), max(x, y)]) for y in range(total)] for x in range(total)]
    columns = [[x] for x in range(total)]
    owners = [x // (total // networks) for x in range(total)]
    budget = [int((total - size) / networks * within)] * networks
    accepted = []
    while len(columns) > size:
        pairs = [
            (-c[i][j], i, j)
            for i, j in itertools.combinations(range(len(columns)), 2)
            if owners[i] != owners[j] or budget[owners[i]] > 0
        ]
        negative, i, j = min(pairs)
        accepted.append(-negative)
        if owners[i] == owners[j]:
            budget[owners[i]] -= 1
        for x in range(len(columns)):
            c[i][x] = c[x][i] = min(c[i][x], c[j][x]) * repeat
        columns[i] += columns[j]
        for row in (*c, columns, owners, c):
            del row[j]
    merged = [0] * total
    for k, members in enumerate(columns):
        for unit in members:
            merged[unit] = k
    return merged, accepted


def symmetric(total: int, seed: int, levels: int = 0) -> torch.Tensor:
    """A similarity of random sign; with ``levels``, of so few values that most are tied."""
    c = normal(total, total, seed=seed)
    c = torch.tanh(c + c.T)
    return (c * levels).round() / levels if levels else c


@settings(max_examples=200, deadline=None)
@given(
    networks=st.integers(1, 4),
    n=st.integers(1, 6),
    seed=st.integers(0, 999),
    levels=st.sampled_from([0, 1, 2, 3]),
    shift=st.sampled_from([0.0, 1.0]),
    repeat=st.sampled_from([0.5, 1.0]),
    within=st.sampled_from([1.0, 0.5, 0.0]),
    shrink=st.floats(0, 1),
)
def test_kept_row_maxima_join_what_the_rules_join(
    networks, n, seed, levels, shift, repeat, within, shrink
):
    similarity = symmetric(networks * n, seed, levels) - shift  # by 1: all are negative
    least = n if within < 1 else 1
    size = least + round(shrink * (networks * n - least))
    options = {"size": size, "repeat": repeat, "within": within}
    zipped = zip_units(similarity, networks, **options)
    merged, accepted = greedy_by_the_book(similarity, networks, **options)
    assert zipped.merged.flatten().tolist() == merged
    assert zipped.accepted.tolist() == accepted
    assert zipped.size == size and zipped.merged.shape == (networks, n)


@pytest.mark.parametrize("levels", [0, 2])
def test_a_larger_zip_of_correlations_too(levels):
    units = normal(2 * 30, 12)
    similarity = torch.corrcoef(units)
    similarity = (similarity * levels).round() / levels if levels else similarity
    zipped = zip_units(similarity, 2)
    merged, accepted = greedy_by_the_book(similarity, 2, 30)
    assert zipped.merged.flatten().tolist() == merged and zipped.accepted.tolist() == accepted
    assert same(zipped.value, float(np.mean(accepted)))


def pairs(total: int, **entries: float) -> torch.Tensor:
    """A similarity of zeros but for ``_ij=entry``."""
    c = torch.zeros(total, total, **F64)
    for name, entry in entries.items():
        i, j = int(name[1]), int(name[2])
        c[i, j] = c[j, i] = entry
    return c


def test_a_join_takes_half_of_the_smaller_similarity():
    # 0 and 3 are joined by .9; to 4 the pair has min(.8, .6) / 2 = .3, less than 1 and 4 have.
    zipped = zip_units(pairs(6, _03=0.9, _04=0.8, _34=0.6, _14=0.4, _25=0.35), 2)
    assert zipped.merged.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert zipped.accepted.tolist() == [0.9, 0.4, 0.35]
    # Without the halving that pair comes second.
    zipped = zip_units(pairs(6, _03=0.9, _04=0.8, _34=0.6, _14=0.4, _25=0.35), 2, repeat=1.0)
    assert zipped.merged.tolist() == [[0, 1, 2], [0, 0, 2]]


def test_a_negative_similarity_grows_when_halved():
    c = pairs(4, _01=-0.5, _02=0.9, _03=-0.6, _12=-0.5, _13=-0.4, _23=-0.6)
    zipped = zip_units(c, 2)
    # To 1 the pair 0, 2 has -.25 now, above the -.4 of 1 and 3.
    assert zipped.merged.tolist() == [[0, 0], [0, 1]]
    assert zipped.accepted.tolist() == [0.9, -0.25]


def test_a_network_joins_its_own_units_within_its_budget():
    alike = pairs(8, _01=0.9, _02=0.9, _03=0.9, _12=0.9, _13=0.9, _23=0.9)
    # 4 joins in all, so 2 for each network.
    zipped = zip_units(alike, 2, repeat=1.0)
    assert zipped.accepted.tolist() == [0.9, 0.9, 0.0, 0.0]
    assert zipped.merged[0].tolist() == [0, 0, 0, 1]
    none = zip_units(alike, 2, repeat=1.0, within=0.0)
    assert none.merged[0].tolist() == [0, 1, 2, 3]


def test_a_joined_column_belongs_to_the_network_of_its_first_member():
    # 0 with 2 is network 1's: its join with 1 then spends network 1's budget, which is 0.
    c = pairs(4, _02=0.9, _12=0.8, _01=0.8, _13=0.1)
    assert zip_units(c, 2, within=0.0, repeat=1.0).merged.tolist() == [[0, 1], [0, 1]]
    assert zip_units(c, 2, within=1.0, repeat=1.0).merged.tolist() == [[0, 0], [0, 1]]


def test_merged_units_are_numbered_by_their_first_member():
    for seed in range(5):
        merged = zip_units(symmetric(18, seed), 3).merged.flatten().tolist()
        assert list(dict.fromkeys(merged)) == list(range(6))


def test_one_network_and_one_unit_are_zipped():
    alone = zip_units(symmetric(5, 0), 1)
    assert alone.merged.tolist() == [[0, 1, 2, 3, 4]]
    assert (alone.value, alone.counts.tolist()) == (0.0, [1] * 5)
    both = zip_units(pairs(2, _01=-0.3), 2)
    assert (both.merged.tolist(), both.value) == ([[0], [0]], -0.3)


def test_settings_that_cannot_be_are_refused():
    c = symmetric(6, 0)
    with pytest.raises(ValueError, match=r"networks must divide the 6 units .*, got 4"):
        zip_units(c, 4)
    with pytest.raises(ValueError, match=r"networks must divide .* got 0"):
        zip_units(c, 0)
    with pytest.raises(ValueError, match=r"(?s)3 problems.*repeat.*got 0.*size.*got 7.*within.*2"):
        zip_units(c, 2, size=7, repeat=0.0, within=2.0)
    with pytest.raises(ValueError, match=r"size must be 1 \.\. 6, got 0"):
        zip_units(c, 2, size=0)
    with pytest.raises(ValueError, match="size must be at least 3, which the budgets leave, got 2"):
        zip_units(c, 2, size=2, within=0.0)
    with pytest.raises(ValueError, match=r"zip_units: similarity must be symmetric, but .* by 2"):
        zip_units(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), 2)
    with pytest.raises(ValueError, match="node a must be symmetric"):
        zip_nodes([Node("a", 3)], [c + torch.ones(6, 6, **F64).triu(1)], 2)
    with pytest.raises(ValueError, match=r"similarity of node a must be \(9, 9\), got \(6, 6\)"):
        zip_nodes([Node("a", 3)], [c], 3)
    with pytest.raises(ValueError, match="networks must be 1 or more, got 0"):
        zip_nodes([Node("a", 3)], [c], 0)


def test_last_digits_of_a_product_are_no_asymmetry():
    c = torch.corrcoef(normal(12, 30)).float().double()
    rounded = c * (1 + 1e-6 * normal(12, 12).tril(-1))
    for similarity in (rounded, rounded.float()):
        expected = (similarity.triu() + similarity.triu(1).T).double()
        zipped = zip_units(similarity, 2)
        assert torch.equal(zipped.accepted, zip_units(expected, 2).accepted)
        zip_nodes([Node("a", 6, 2)], [similarity], 2)


# --- zip of blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("networks", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_stand_together_are_zipped_on_their_own(kind, networks):
    nodes = KINDS[kind]
    unions = [symmetric(networks * n.size, k) for k, n in enumerate(nodes)]
    found = zip_nodes(nodes, unions, networks)
    for node, union, zipped in zip(nodes, unions, found, strict=True):
        m, groups = node.block_size, []
        for group in range(node.blocks):
            units = []
            for i in range(networks):
                span = slice(i * node.size, (i + 1) * node.size)
                orders, _ = match_nodes(
                    nodes,
                    [
                        u[: n.size, i * n.size : (i + 1) * n.size]
                        for n, u in zip(nodes, unions, strict=True)
                    ],
                )
                block = int(block_order(nodes[0], orders[0])[group]) if i else group
                units += list(range(span.stop))[span][block * m : (block + 1) * m]
            groups.append(units)
        tiles = [union[units][:, units] for units in groups]
        if node.shared_inner:
            tiles = [torch.stack(tiles).mean(0)] * node.blocks
        expected = torch.empty(networks * node.size, dtype=torch.int64)
        accepted = []
        for group, (units, tile) in enumerate(zip(groups, tiles, strict=True)):
            merged, its = greedy_by_the_book(tile, networks, m)
            expected[units] = torch.tensor(merged) + group * m
            accepted += its
        assert torch.equal(zipped.merged.flatten(), expected)
        assert zipped.accepted.tolist() == accepted and zipped.size == node.size


def test_the_zip_of_one_block_is_the_plain_zip():
    c = symmetric(14, 1)
    (found,), plain = zip_nodes([Node("a", 7)], [c], 2), zip_units(c, 2)
    assert torch.equal(found.merged, plain.merged) and torch.equal(found.accepted, plain.accepted)


# --- tensors along a zip ----------------------------------------------------------------------


def dense(zipped: Zip) -> tuple[torch.Tensor, torch.Tensor]:
    """U and M, (N, n, size), from their definitions."""
    u = (zipped.merged[..., None] == torch.arange(zipped.size)).double()
    return u, u / u.sum((0, 1)) * len(u)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("networks, size", [(2, None), (3, None), (2, 9), (2, 2), (1, None)])
def test_sums_over_members_are_the_products_with_u_and_m(axis, networks, size):
    zipped = zip_units(symmetric(5 * networks, 4), networks, size=min(size or 5, 5 * networks))
    u, m = dense(zipped)
    shape = [3, 4, 2]
    shape[axis] = 5
    for network in range(networks):
        tensor = normal(*shape, seed=network)
        for function, matrix in ((zip_out, m), (zip_in, u)):
            got = function(tensor, zipped, network, axis)
            expected = torch.tensordot(tensor, matrix[network], ([axis], [0])).movedim(-1, axis)
            assert got.shape == expected.shape
            assert float((got - expected).abs().max()) <= 20 * EPS


@pytest.mark.parametrize("networks", [2, 3])
def test_a_zip_of_reordered_copies_is_the_network_itself(networks):
    hidden, up, down = 7, normal(7, 4), normal(3, 7, seed=1)
    bias = normal(7, seed=2)
    orders = [torch.arange(hidden), shuffled(hidden, 5), shuffled(hidden, 6)][:networks]
    labels = torch.cat(orders)
    zipped = zip_units((labels[:, None] == labels).double(), networks)

    def merge(axis, function, tensors):
        return sum(function(t, zipped, i, axis) for i, t in enumerate(tensors)) / networks

    merged_up = merge(0, zip_out, [up[order] for order in orders])
    merged_bias = merge(0, zip_out, [bias[order] for order in orders])
    merged_down = merge(1, zip_in, [down[:, order] for order in orders])
    for got, expected in ((merged_up, up), (merged_bias, bias), (merged_down, down)):
        assert float((got - expected).abs().max()) <= 4 * EPS
    if networks == 2:  # sums of two equal numbers, halved: nothing is rounded
        assert torch.equal(merged_up, up) and torch.equal(merged_down, down)


def test_half_precision_is_summed_in_single():
    zipped = Zip(torch.zeros(1, 3, dtype=torch.int64), 1, torch.zeros(0, **F64))
    large = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)
    got = zip_in(large, zipped, 0, 0)
    assert got.dtype == torch.bfloat16 and got.tolist() == [258.0]  # 256 + 1 is 256 in bf16


def test_tensors_that_do_not_fit_a_zip_are_refused():
    zipped = zip_units(symmetric(6, 0), 2)
    with pytest.raises(
        ValueError, match=r"(?s)zip_out: 2 problems.*network must be 0 \.\. 1.*axis 1"
    ):
        zip_out(torch.ones(3, 4), zipped, 2, 1)
    with pytest.raises(ValueError, match=r"zip_in: .* the 3 units, got axis 2 of shape \(3, 4\)"):
        zip_in(torch.ones(3, 4), zipped, 0, 2)
    with pytest.raises(ValueError, match=r"tensor must be fp32, .*int64"):
        zip_in(torch.ones(3, dtype=torch.int64), zipped, 0, 0)
    with pytest.raises(TypeError, match="zip_out: tensor must be a tensor, got list"):
        zip_out([1.0], zipped, 0, 0)
