"""neulig_fit beyond test_house.py: against autograd in float64, every shape of a fit, its door."""

import pytest
import torch
from torch.nn import functional

import neulig_fast
from neulig_fast import testing
from neulig_fast.neulig.portland import Portland
from neulig_fast.ops.neulig_fit import OP, neulig_fit, neulig_fit_reference

BACKENDS = [b for b in ("torch", "cpu") if OP.why_not(b, "cpu") is None]
NATIVE = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
SCALING, LR = 10.0, 1e-2


class Fit:
    """Tasks with heads, and the op's arguments made of them.

    tasks: (M, C, normalize, biased) each. The last batch of every task is one row short.
    """

    def __init__(self, tasks, *, n=3, d=7, batch=4, rounds=3, supervised=True, centered=False,
                 dtype=torch.float64):  # fmt: skip
        g = torch.Generator().manual_seed(9)

        def draw(*sizes):
            return torch.randn(sizes, generator=g, dtype=torch.float64)

        self.acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.tasks, self.centered, self.batch, self.rounds = tasks, centered, batch, rounds
        self.features = [draw(m, n, d).to(dtype) for m, *_ in tasks]
        self.heads = [functional.normalize(draw(c, d), dim=1).mul(4).to(self.acc)
                      for _, c, *_ in tasks]  # fmt: skip
        self.biases = [(draw(c) if biased else torch.zeros(c)).to(self.acc)
                       for _, c, _, biased in tasks]  # fmt: skip
        self.labels = [torch.randint(c, (m,), generator=g) for m, c, *_ in tasks]
        if not supervised:
            self.labels = []
        used = rounds * batch - (batch > 1)
        self.rows = [torch.randint(m, (used,), generator=g) for m, *_ in tasks]
        a = draw(n, n)
        self.alignment = (a @ a.T).to(self.acc)
        start = Portland(n, d, seed=3, dtype=self.acc)
        parameters = torch.cat((start.weight.detach().flatten(), start.bias.detach()))
        zeros = torch.zeros_like(parameters)
        self.state = torch.stack((parameters, zeros, zeros))

    def arguments(self, state=None, rows=None, step=0):
        z = [x.to(self.acc) for x in self.features]
        grams = [x @ x.mT if normalize else x.new_empty(0)
                 for x, (_, _, normalize, _) in zip(z, self.tasks, strict=True)]  # fmt: skip
        products = [x @ head.T for x, head in zip(z, self.heads, strict=True)]
        return (
            self.state if state is None else state, self.features, products, grams, self.biases,
            self.labels, self.rows if rows is None else rows, self.alignment, step, self.batch, LR,
            SCALING, self.centered,
        )  # fmt: skip

    def run(self, backend, **changes):
        with neulig_fast.use_backend(neulig_fit=backend):
            return neulig_fit(*self.arguments(**changes))

    def naive(self):
        """torch.optim.Adam and autograd over the paper's formula, in float64."""
        n, d = self.features[0].shape[1:]
        parameters = self.state[0].double().clone().requires_grad_()
        adam = torch.optim.Adam([parameters], lr=LR)
        terms = []
        for r in range(self.rounds):
            for t in range(len(self.tasks)):
                rows = self.rows[t][r * self.batch : (r + 1) * self.batch]
                loss = self.loss(t, rows, parameters[:-n].view(n, n * d), parameters[-n:])
                adam.zero_grad()
                sum(loss).backward()
                adam.step()
                terms += [x.detach() for x in loss]
        moments = adam.state[parameters]
        state = torch.stack((parameters.detach(), moments["exp_avg"], moments["exp_avg_sq"]))
        return state, torch.stack(terms).view(self.rounds, -1, 2)

    def loss(self, t, rows, weight, bias):
        z = self.features[t][rows].double()
        w = functional.softmax(z.flatten(1) @ weight.T + bias, dim=1)
        e = torch.einsum("bn,bnd->bd", w, z)
        e = e / e.norm(dim=1, keepdim=True) if self.tasks[t][2] else e
        y = e @ self.heads[t].double().T + self.biases[t].double()
        if self.labels:
            boosting = functional.cross_entropy(y, self.labels[t][rows])
        else:
            p = functional.softmax(y, 1)
            boosting = -(p * torch.log(p + 1e-6)).sum(1).mean()
        v = w - w.mean(0) if self.centered else w
        return boosting, torch.einsum("bi,ij,bj->b", v, self.alignment.double(), v).mean() / SCALING


ONE = [(20, 5, True, True)]
TWO = [(20, 5, True, True), (30, 23, False, False)]
CASES = {
    "two tasks": (TWO, {}),
    "entropy": (TWO, {"supervised": False}),
    "centered": (TWO, {"centered": True}),
    "entropy, centered": (ONE, {"supervised": False, "centered": True}),
    "one expert": (ONE, {"n": 1}),
    "one row": (ONE, {"batch": 1}),
    "one class": ([(20, 1, True, False)], {}),
    "one column": (TWO, {"d": 1}),
    "even steps": ([(20, 16, True, False)], {"d": 16, "n": 2}),
    "many columns": ([(9, 33, True, True)], {"d": 600, "n": 2}),
    "several groups": ([(90, 20, True, True)], {"batch": 75, "rounds": 2, "centered": True}),
    **{f"{n} experts": (ONE, {"n": n}) for n in (2, 4, 5, 6, 7, 8, 9, 16, 21)},
    "64 experts": (ONE, {"n": 64, "d": 3, "centered": True}),
}
in_every_case = pytest.mark.parametrize("case", CASES)


def fit(case, **changes):
    tasks, options = CASES[case]
    return Fit(tasks, **{**options, **changes})


# -- the trajectory --------------------------------------------------------------------------------


@in_every_case
@on_every_backend
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_the_trajectory_is_autograds_and_torchs_adam(case, backend, dtype):
    """Parameters, both moments and both loss terms, each by the rule at its own scale."""
    one = fit(case, dtype=dtype)
    state, terms = one.run(backend)
    exact_state, exact_terms = one.naive()
    working_state, working_terms = neulig_fit_reference(*one.arguments())
    n, d = one.features[0].shape[1:]
    count = n * d * one.rounds * len(one.tasks)
    for got, working, exact in zip(state, working_state, exact_state, strict=True):
        testing.assert_within_rule(got, working, exact, count)
    for k in range(2):
        testing.assert_within_rule(terms[..., k], working_terms[..., k], exact_terms[..., k], count)
    if n > 1:
        assert (state[0] - one.state[0]).abs().max() > LR  # the comparison was of something


@on_every_backend
def test_fits_go_on_where_they_stopped(backend):
    """Two rounds and one, with the step's number and the state handed on: the same bits."""
    one = fit("two tasks", dtype=torch.float32)
    state, terms = one.run(backend)
    first = [rows[:8] for rows in one.rows]
    rest = [rows[8:] for rows in one.rows]
    middle, before = one.run(backend, rows=first)
    end, after = one.run(backend, state=middle, rows=rest, step=4)
    assert torch.equal(end, state) and torch.equal(torch.cat((before, after)), terms)


@on_every_backend
def test_nothing_that_was_given_is_written_to(backend):
    one = fit("two tasks")
    args = one.arguments()
    copies = testing.map_tensors(args, torch.clone)
    with neulig_fast.use_backend(neulig_fit=backend):
        state, _ = neulig_fit(*args)
    seen: list[torch.Tensor] = []
    testing.map_tensors(args, seen.append)
    kept: list[torch.Tensor] = []
    testing.map_tensors(copies, kept.append)
    assert all(torch.equal(a, b) for a, b in zip(seen, kept, strict=True))
    assert state.data_ptr() != args[0].data_ptr()


@on_every_backend
def test_no_rows_are_no_rounds(backend):
    one = fit("two tasks")
    state, terms = one.run(backend, rows=[rows[:0] for rows in one.rows])
    assert torch.equal(state, one.state) and terms.shape == (0, 2, 2)


@on_every_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_seen_in_the_loss(backend, value):
    one = fit("two tasks")
    one.features[1][one.rows[1][5], 0, 0] = value
    state, terms = one.run(backend)
    assert terms[0].isfinite().all() and not terms[1, 1].isfinite().any()
    assert not state[0].isfinite().any()


# -- the kernel's bits -----------------------------------------------------------------------------

LARGE = {"batch": 100, "rounds": 3, "d": 130, "n": 5, "dtype": torch.float32}


@NATIVE
@pytest.mark.parametrize("centered", [False, True], ids=["plain", "centered"])
def test_the_bits_do_not_depend_on_the_number_of_threads(centered):
    one = Fit([(200, 70, True, True), (150, 5, False, False)], centered=centered, **LARGE)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results += [one.run("cpu") for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for state, terms in results[1:]:
        assert torch.equal(state, results[0][0]) and torch.equal(terms, results[0][1])


DIGEST = """
import sys, hashlib, torch
sys.path.insert(0, "tests")
import test_neulig_fit as tests
digest = hashlib.sha256()
for case in tests.CASES:
    for dtype in tests.testing.DTYPES:
        for tensor in tests.fit(case, dtype=dtype).run("cpu"):
            digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""


@NATIVE
def test_the_bits_do_not_depend_on_the_instruction_set(python):
    from neulig_fast import _C

    digests = set()
    for level in [level for level in (0, 3, 4) if level <= _C.cpu_level()]:
        done = python(DIGEST, NEULIG_FAST_CPU=str(level))
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


# -- the door --------------------------------------------------------------------------------------


def changed(**changes):
    """The arguments of two tasks, some replaced; a dict replaces items of a list."""
    args = dict(zip(OP.arguments, fit("two tasks").arguments(), strict=True))
    for name, change in changes.items():
        if isinstance(change, dict):
            args[name] = [change.get(t, x) for t, x in enumerate(args[name])]
        else:
            args[name] = change
    return tuple(args.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"state": torch.zeros(3, 65)}, r"state must be \(3, 66\) torch.float64.* got \(3, 65\)"),
        ({"features": []}, "must have one tensor per task, 0, got 2"),
        ({"features": {0: torch.zeros(20, 21)}}, r"features must be \(M, N, D\)"),
        ({"features": {1: torch.zeros(30, 3, 7)}}, r"features\[1\] must be .*float64"),
        ({"products": {1: torch.zeros(29, 3, 23).double()}}, r"products\[1\] must be \(30, 3, 23"),
        ({"grams": {0: torch.zeros(20, 3).double()}}, r"grams\[0\] must be \(20, 3, 3\)"),
        ({"biases": {0: torch.zeros(4).double()}}, r"biases\[0\] must be \(5,\)"),
        ({"labels": {0: torch.zeros(20)}}, r"labels\[0\] must be \(20,\) torch.int64"),
        ({"labels": {0: torch.full((20,), 5)}}, r"labels\[0\] must be in \[0, 5\), got \[5\]"),
        ({"labels": {1: torch.full((30,), -1)}}, r"labels\[1\] must be in \[0, 23\), got \[-1\]"),
        ({"rows": {0: torch.full((11,), 20)}}, r"rows\[0\] must be in \[0, 20\), got \[20\]"),
        ({"rows": {1: torch.full((11,), -2)}}, r"rows\[1\] must be in \[0, 30\), got \[-2\]"),
        ({"rows": {1: torch.zeros(8).long()}}, "as many batches of 4 in every task, got 11, 8"),
        ({"rows": {0: torch.zeros(11, 1).long()}}, r"rows\[0\] must be \(11,\) torch.int64"),
        ({"alignment": torch.eye(2).double()}, r"alignment must be \(3, 3\)"),
        ({"batch": 0}, "batch must be positive, got 0"),
        ({"step": -1}, "step must not be negative, got -1"),
        ({"scaling": 0.0}, "scaling must be positive, got 0.0"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=f"neulig_fit: .*{message}"):
        neulig_fit(*changed(**change))


def test_all_faults_come_in_one_error():
    bad = changed(batch=-1, scaling=0.0, alignment=torch.eye(4).double())
    with pytest.raises(ValueError, match=r"3 problems(.|\n)*alignment(.|\n)*scaling(.|\n)*batch"):
        neulig_fit(*bad)


@NATIVE
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"features": {1: torch.zeros(30, 3, 14).double()[..., ::2]}}, "features must be contig"),
        ({"products": {0: torch.zeros(3, 20, 5).double().transpose(0, 1)}}, "products must be con"),
        ({"rows": {0: torch.zeros(22).long()[::2]}}, "rows must be contiguous"),
    ],
)
def test_what_the_kernel_cannot_take_is_said_in_a_sentence(change, reason):
    args = changed(**change)
    with neulig_fast.use_backend(neulig_fit="cpu"), pytest.raises(RuntimeError, match=reason):
        neulig_fit(*args)
    with neulig_fast.use_backend(neulig_fit="torch"):
        neulig_fit(*args)


@NATIVE
def test_more_experts_than_the_kernel_knows_run_on_the_reference():
    args = Fit(ONE, n=65, d=2).arguments()
    assert OP.why_not("cpu", "cpu", args) == "N=65 > 64 experts"


@NATIVE
@pytest.mark.parametrize(
    "change, message",
    [
        ({"state": torch.zeros(3, 65).double()}, "state must be contiguous Double"),
        ({"rows": {0: torch.full((11,), 20)}}, r"rows must be in \[0, 20\), got 20"),
        ({"labels": {0: torch.full((20,), 5)}}, r"labels must be in \[0, 5\), got 5"),
        ({"biases": []}, "biases must be one tensor per task, 2, got 0"),
    ],
)
def test_the_native_twin_has_a_door_of_its_own(change, message):
    with pytest.raises(RuntimeError, match=f"neulig_fit: {message}"):
        torch.ops.neulig_fast_C.neulig_fit.default(*changed(**change))
