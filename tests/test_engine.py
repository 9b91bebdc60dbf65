"""The engine: penalties, fit, ensemble, save and load, and every refusal at the door."""

import errno
import json
import os

import pytest
import safetensors.torch
import torch
from torch import nn

from neulig_fast import ExpertPool, testing
from neulig_fast.neulig import Head, NeuLig, fitting
from neulig_fast.neulig.penalty import ALIGNMENTS, SCALINGS, alignment_penalty

TASKS = ("digits", "letters")
D = 6


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, D)

    def forward(self, images):
        return self.last(torch.tanh(self.norm(self.first(images.flatten(1)))))


def experts(count=3, dtype=torch.float32):
    torch.manual_seed(11)
    return [Encoder().to(dtype) for _ in range(count)]


def heads(dtype=torch.float32):
    g = torch.Generator().manual_seed(12)
    return {
        "digits": Head(torch.randn(3, D, generator=g, dtype=torch.float64).to(dtype)),
        "letters": Head(
            torch.randn(4, D, generator=g, dtype=torch.float64).to(dtype),
            torch.randn(4, generator=g, dtype=torch.float64).to(dtype),
            normalize=False,
        ),
    }


def images(count, seed, dtype=torch.float32):
    return torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loaders(size=16, seed=0, dtype=torch.float32, counts=(50, 41)):
    made = {}
    for t, (task, head) in enumerate(heads().items()):
        x = images(counts[t], 100 * seed + t, dtype)
        y = torch.arange(counts[t]) % head.num_classes
        made[task] = list(zip(x.split(size), y.split(size), strict=True))
    return made


def engine(**options):
    return NeuLig(experts(), heads(), **options)


def fitted(**options):
    return engine(**options).fit(loaders(), epochs=3, batch_size=16, lr=1e-2, progress=False)


# -- the alignment term ----------------------------------------------------------------------------


def half_squared_distances(pool):
    theta = pool.params[:, : pool.num_parameter_columns].double()
    d = torch.stack([(theta - row).square().sum(1) for row in theta])
    return 0.5 * d / (d.sum() / (len(d) * (len(d) - 1)))


@pytest.mark.parametrize("form", ALIGNMENTS)
def test_alignment_matrices_are_those_of_the_paper(form):
    made = engine(alignment=form)
    xi = made.pool.params[:, : made.pool.num_parameter_columns].double()
    xi = xi - xi.mean(0)
    s = xi.sum(1)
    s = (s - s.mean()) / s.std()
    gram = xi @ xi.T
    expected = {
        "offset_sum": torch.outer(s, s),
        "gram": gram * 2 / gram.trace(),
        "dispersion": gram * 2 / gram.trace(),
        "variance": half_squared_distances(made.pool),
        "none": torch.zeros(3, 3, dtype=torch.float64),
    }[form]
    # The op's offsets are in fp32; these here in fp64.
    assert torch.allclose(made.alignment_matrix, expected, rtol=1e-4, atol=1e-5)
    assert made.centered == (form == "dispersion")
    assert made.scaling == SCALINGS[form]


def test_gram_rows_sum_to_zero():
    """G·1 = 0, and so uniform weights cost nothing."""
    pool = ExpertPool(experts(dtype=torch.float64))
    matrix = alignment_penalty("gram", pool.offsets()).matrix
    testing.assert_within_rule(
        matrix.sum(1) + 1, torch.ones(3).double(), torch.ones(3).double(), pool.params.shape[1]
    )


def test_permuting_the_experts_permutes_s_and_the_matrices():
    order = [2, 0, 1]
    one, other = (ExpertPool(e) for e in (experts(), [experts()[i] for i in order]))
    s, t = one.offsets().zscores, other.offsets().zscores
    assert torch.allclose(t, s[order], atol=1e-5)
    for form in ALIGNMENTS:
        a, b = (alignment_penalty(form, pool.offsets()).matrix for pool in (one, other))
        assert torch.allclose(b, a[order][:, order], atol=1e-5)


@pytest.mark.parametrize("form", ALIGNMENTS)
@pytest.mark.parametrize("count", [1, 3], ids=["one expert", "identical experts"])
def test_experts_that_do_not_differ_have_no_penalty(form, count):
    pool = ExpertPool([experts()[0]] * count)
    made = NeuLig(pool, heads(), alignment=form)
    assert torch.equal(made.alignment_matrix, torch.zeros(count, count, dtype=torch.float64))
    made.fit(loaders(), epochs=1, progress=False)
    assert float(made.history.alignment.abs().max()) == 0.0


def test_two_experts_have_the_z_scores_of_any_two():
    made = NeuLig(experts(2), heads(), alignment="offset_sum")
    half = torch.full((2, 2), 0.5, dtype=torch.float64) * torch.tensor([[1, -1], [-1, 1]])
    assert torch.allclose(made.alignment_matrix, half, atol=1e-12)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="alignment must be one of offset_sum"):
        alignment_penalty("sum", ExpertPool(experts()).offsets())


# -- using it --------------------------------------------------------------------------------------


def test_coopvec_and_ensemble_are_their_formulas():
    made = fitted()
    x = images(9, 7)
    z = made.features(x)
    w = torch.softmax(z.flatten(1) @ made.portland.weight.T + made.portland.bias, 1)
    assert torch.allclose(made.coopvec(x), w, atol=1e-6)
    e = (w[:, :, None] * z).sum(1)
    digits, letters = made.heads.values()
    expected = e / e.norm(dim=1, keepdim=True) @ digits.weight.T
    assert torch.allclose(made.ensemble(x, "digits"), expected, atol=1e-5)
    assert torch.allclose(made.ensemble(x, letters), e @ letters.weight.T + letters.bias, atol=1e-5)
    assert not made.ensemble(x, "digits").requires_grad


def test_identical_experts_ensemble_to_the_expert():
    pool = ExpertPool([experts()[0]] * 3)
    made = NeuLig(pool, heads()).fit(loaders(), epochs=1, progress=False)
    x = images(9, 7)
    with torch.no_grad():
        alone = made.heads["digits"](pool.template.eval()(x))
    assert torch.allclose(made.ensemble(x, "digits"), alone, atol=1e-5)


def test_calibration_is_the_mean_coopvec_of_the_training_images():
    made = fitted()
    for task, batches in loaders().items():
        w = made.coopvec(torch.cat([x for x, _ in batches])).double()
        assert torch.allclose(made.calibration[task], w.mean(0), atol=1e-7)
        assert made.calibration[task].dtype == torch.float64


def test_fit_starts_over_and_each_image_runs_once():
    made = fitted()
    assert made.cache.computed == 91
    weight = made.portland.weight.clone()
    made.fit(loaders(), epochs=3, batch_size=16, lr=1e-2, progress=False)
    assert torch.equal(made.portland.weight, weight) and made.cache.computed == 91


def test_the_order_of_loaders_images_and_batches_does_not_matter_for_the_same_features():
    """Rows are sorted by content. The cache is shared: in another batch an encoder may round
    otherwise."""
    first = fitted()
    shuffled = {
        task: [(x.flip(0), y.flip(0)) for x, y in reversed(batches)]
        for task, batches in reversed(loaders(size=16).items())
    }
    second = engine()
    second.cache = first.cache
    second.fit(shuffled, epochs=3, batch_size=16, lr=1e-2, progress=False)
    assert torch.equal(first.portland.weight, second.portland.weight)
    assert first.history.tasks == second.history.tasks == TASKS


def test_fp64_experts_are_trained_in_fp64_and_bf16_ones_in_fp32():
    for dtype, expected in [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]:
        made = NeuLig(experts(dtype=dtype), heads())
        made.fit(loaders(dtype=dtype), epochs=1, progress=False)
        assert made.features(images(2, 5, dtype)).dtype == dtype
        assert made.portland.weight.dtype == expected
        assert made.ensemble(images(2, 5, dtype), "digits").dtype == expected


def test_entropy_needs_no_labels():
    bare = {task: [x for x, _ in batches] for task, batches in loaders().items()}
    made = engine(boosting="entropy", alignment="none")
    made.fit(bare, epochs=3, progress=False)
    labelled = engine(boosting="entropy", alignment="none").fit(loaders(), epochs=3, progress=False)
    assert torch.equal(made.portland.weight, labelled.portland.weight)
    with pytest.raises(ValueError, match=r"'digits': batch 0 must be \(images, labels\)"):
        engine().fit(bare, progress=False)


def test_a_validation_fraction_is_set_aside_and_loaders_are_used_as_they_are():
    made = engine().fit(loaders(), epochs=4, validation=0.25, batch_size=16, progress=False)
    assert made.history.validation.shape == (4, 2)
    assert made.history.rounds_per_epoch == 2  # 41 - 10 letters in batches of 16
    ones = engine().fit(
        loaders(), epochs=4, validation=loaders(seed=1), starts=2, patience=1, progress=False
    )
    assert len(ones.history.starts) == 2 and ones.history.rounds_per_epoch == 1
    x, y = (torch.cat(part) for part in zip(*loaders(seed=1)["digits"], strict=True))
    accuracy = 100 * (ones.ensemble(x, "digits").argmax(1) == y).double().mean()
    epoch = ones.history.epoch - 1
    assert float(ones.history.validation[epoch, 0]) == pytest.approx(float(accuracy))


def test_copies_of_an_image_are_on_one_side_of_a_validation_fraction(monkeypatch):
    sides = {}

    class Stopped(fitting.Trainer):
        def __init__(self, training, penalty, settings, validation, checkpoint):
            sides.update(training=training[0], validation=validation[0])
            raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "Trainer", Stopped)
    x = images(10, 3).repeat(4, 1, 1)
    made = NeuLig(experts(), {"digits": heads()["digits"]})
    with pytest.raises(KeyboardInterrupt):
        made.fit({"digits": [(x, torch.arange(40) % 3)]}, validation=0.25, progress=False)
    rows = {side: {tuple(f.flatten().tolist()) for f in t.features} for side, t in sides.items()}
    assert {side: len(t.features) for side, t in sides.items()} == {"training": 32, "validation": 8}
    assert len(rows["training"]) == 8 and len(rows["validation"]) == 2
    assert not rows["training"] & rows["validation"]


def test_inference_does_not_fill_the_cache():
    made = fitted()
    rows = len(made.cache)
    x = torch.cat([images(5, 77), loaders()["digits"][0][0], images(5, 77)])
    w = made.coopvec(x)
    made.ensemble(x, "digits")
    made.merged_forward(x, "digits", "batch_mean")
    assert len(made.cache) == rows
    assert torch.allclose(made.portland.coopvec(made.features(x)), w, atol=1e-6)
    assert len(made.cache) == rows + 5


def test_the_heads_take_the_portlands_dtype():
    given = heads(torch.float64)
    made = NeuLig(experts(), given)
    assert made.heads["digits"].weight.dtype == torch.float32


def test_a_checkpoint_goes_on_and_knows_its_data(tmp_path):
    path = tmp_path / "fit.safetensors"
    options = {"epochs": 6, "batch_size": 16, "progress": False}
    whole = engine().fit(loaders(), **options)

    def interrupt(report):
        if report.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine().fit(loaders(), **options, checkpoint=path, callback=interrupt)
    resumed = engine().fit(loaders(), **options, checkpoint=path)
    assert torch.equal(whole.portland.weight, resumed.portland.weight)
    assert torch.equal(whole.history.boosting, resumed.history.boosting)
    with pytest.raises(ValueError, match=r"seed was 0, is 1"):
        engine(seed=1).fit(loaders(), **options, checkpoint=path)
    with pytest.raises(ValueError, match=r"training data of digits was"):
        engine().fit(loaders(seed=3), **options, checkpoint=path)
    with pytest.raises(ValueError, match=r"3 problems(.|\n)*epochs was 6, is 7(.|\n)*lr was"):
        engine(scaling=3).fit(loaders(), 7, 0.1, 16, progress=False, checkpoint=path)
    turned = NeuLig(experts(), dict(reversed(heads().items())))
    with pytest.raises(ValueError, match=r"order of tasks was \['digits', 'letters'\], is"):
        turned.fit(loaders(), **options, checkpoint=path)
    other = {**heads(), "digits": Head(heads()["digits"].weight, normalize=False)}
    with pytest.raises(ValueError, match=r"normalize of digits was True, is False"):
        NeuLig(experts(), other).fit(loaders(), **options, checkpoint=path)


def test_a_checkpoint_that_cannot_be_written_is_found_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    made = engine()
    with pytest.raises(OSError, match="cannot write to"):
        made.fit(loaders(), progress=False, checkpoint=tmp_path / "file" / "fit.safetensors")
    assert made.cache.computed == 0


def test_the_cache_folder_serves_the_next_engine(tmp_path):
    fitted(cache_folder=tmp_path)
    second = fitted(cache_folder=tmp_path)
    assert second.cache.computed == 0 and len(second.cache) == 91


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": {}}, "heads must map at least one task"),
        ({"heads": [1]}, r"heads must map .*, as in \{'cars': Head\(...\)\}, got list$"),
        ({"heads": Head(torch.ones(2, 4))}, "heads must map .*, got Head$"),
        ({"heads": {"a": torch.ones(2, 2)}}, r"heads\['a'\] must be a Head .*, got Tensor"),
        ({"alignment": "variances"}, "alignment must be one of .*; did you mean 'variance'"),
        ({"boosting": "semi"}, "boosting must be one of supervised, entropy, got 'semi'"),
        ({"scaling": 0}, "scaling must be positive and finite"),
        ({"scaling": float("inf")}, "scaling must be positive and finite, got inf"),
        ({"seed": -1}, "seed must be an int >= 0"),
        ({"seed": 2**63}, r"seed must be an int >= 0 and < 2\*\*63"),
        ({"alignment": "x", "boosting": "y", "scaling": -1}, "3 problems"),
        (
            {"heads": {"a": Head(torch.ones(2, 4)), "b": Head(torch.ones(2, 5))}},
            "head of task 'b' is for D = 5, the head of 'a' has D = 4",
        ),
    ],
)
def test_what_makes_no_engine_is_named(options, message):
    with pytest.raises(ValueError, match=f"NeuLig: (.|\n)*{message}"):
        NeuLig(experts(), **{"heads": heads(), **options})


def test_a_stated_width_is_checked_at_the_door_and_an_unstated_one_at_the_first_image():
    wrong = {"digits": Head(torch.ones(2, D)), "letters": Head(torch.ones(2, D + 1))}
    stated = experts()
    for expert in stated:
        expert.output_dim = D
    with pytest.raises(ValueError, match="'letters' is for D = 7, the experts give D = 6"):
        NeuLig(stated, wrong)
    one = NeuLig(experts(), {"letters": Head(torch.ones(2, D + 1))})
    with pytest.raises(ValueError, match="'letters' is for D = 7, the experts give D = 6"):
        one.features(images(2, 0))


def test_no_experts_at_all():
    with pytest.raises(ValueError, match="at least one expert"):
        NeuLig([], heads())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 0}, "epochs must be an int >= 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an int >= 1"),
        ({"epochs": True}, "epochs must be an int >= 1, got True"),
        ({"lr": 0}, "lr must be positive and finite"),
        ({"lr": float("inf")}, "lr must be positive and finite, got inf"),
        ({"lr": "1e-3"}, "lr must be positive and finite, got '1e-3'"),
        ({"validation": 1}, "validation must be between 0 and 1 as a fraction, got 1"),
        ({"validation": 0.2, "patience": 1.5}, "patience must be an int >= 1, got 1.5"),
        ({"validation": 0.2, "patience": "3"}, "patience must be an int >= 1, got '3'"),
        ({"validation": 1.5}, "validation must be between 0 and 1"),
        ({"validation": 0.2, "views": 2}, "views of one image on both sides"),
        ({"patience": 3}, "pass validation="),
        ({"starts": 2}, "pass validation="),
        ({"validation": 0.2, "patience": 0}, "patience must be an int >= 1"),
        ({"validation": {"digits": []}}, "validation: no loader for task 'letters'"),
        ({"epochs": 0, "lr": -1, "views": 0}, "3 problems"),
        ({"validation": 0.999}, "too few to set 0.999 of them aside"),
    ],
)
def test_settings_of_fit_that_are_refused(options, message):
    made = engine()
    with pytest.raises(ValueError, match=f"fit: (.|\n)*{message}"):
        made.fit(loaders(counts=(50, 20)), progress=False, **options)


def test_tasks_without_heads_and_heads_without_tasks_are_listed():
    wrong = {"digit": [], "letters": []}
    made = engine()
    with pytest.raises(ValueError, match=r"no head for task 'digit'; did you mean 'digits'(.|\n)*"
                       r"no loader for task 'digits'"):  # fmt: skip
        made.fit(wrong, progress=False)
    example = r"as in \{'digits': loader\}, got list$"
    with pytest.raises(ValueError, match=f"loaders must map tasks to .*, {example}"):
        made.fit([(torch.ones(50, 1), torch.ones(50))], progress=False)
    with pytest.raises(ValueError, match=f"validation must map tasks to .*, {example}"):
        made.fit(loaders(), validation=[1, 2], progress=False)
    with pytest.raises(ValueError, match="loader of task 'letters' must be iterable, got int"):
        made.fit({**loaders(), "letters": 3}, progress=False)
    assert made.cache.computed == 0


def test_a_loader_that_serves_twice_is_read_whole_both_times():
    class Rewinding:
        """Its own iterator: a second ``iter`` ends the first one's reading."""

        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            self.left = iter(self.batches)
            return self

        def __next__(self):
            return next(self.left)

    plain = engine().fit(loaders(), epochs=2, validation=loaders(), progress=False)
    rewinding = {task: Rewinding(batches) for task, batches in loaders().items()}
    twice = engine().fit(rewinding, epochs=2, validation=rewinding, progress=False)
    assert torch.equal(twice.history.validation, plain.history.validation)
    assert torch.equal(twice.portland.weight, plain.portland.weight)


def test_the_first_batches_of_all_loaders_are_looked_at_before_any_work():
    made, none = engine(), torch.zeros(0, dtype=torch.long)
    validation = {"digits": [{"images": 1}], "letters": [(torch.zeros(0, 2, 4), none)]}
    with pytest.raises(ValueError, match="3 problems") as error:
        made.fit({**loaders(), "letters": []}, validation=validation, progress=False)
    for fault in (
        "task 'letters': the loader is empty",
        "validation of task 'digits': batch 0 must be (images, labels), got dict of 1",
        "validation of task 'letters': batch 0: images must be a non-empty batch (B, ...), "
        "got (0, 2, 4)",
    ):
        assert fault in str(error.value)
    assert made.cache.computed == 0


def test_zero_features_under_a_head_that_normalises_name_the_expert():
    dead = experts()
    torch.nn.init.zeros_(dead[1].last.weight)
    torch.nn.init.zeros_(dead[1].last.bias)
    with pytest.raises(ValueError, match=r"fit: task 'digits': expert 'expert1' gives all-zero "
                       r"features for 50 of 50 images"):  # fmt: skip
        NeuLig(dead, heads()).fit(loaders(), progress=False)
    plain = {"letters": heads()["letters"]}  # does not normalise
    NeuLig(dead, plain).fit({"letters": loaders()["letters"]}, epochs=1, progress=False)


def test_labels_out_of_range_name_the_task():
    bad = loaders()
    x, y = bad["letters"][1]
    bad["letters"][1] = (x, y + 1)
    with pytest.raises(
        ValueError, match=r"'letters': batch 1: labels must be in \[0, 4\), got \[4\]"
    ):
        engine().fit(bad, progress=False)


# -- save and load ---------------------------------------------------------------------------------


def test_save_and_load_give_the_engine_back(tmp_path):
    made = engine(alignment="dispersion", scaling=7.0, seed=5)
    made.fit(loaders(), epochs=3, validation=loaders(seed=1), progress=False)
    made.save(tmp_path / "run")
    again = NeuLig.load(tmp_path / "run", template=Encoder())
    x = images(5, 8)
    assert torch.equal(again.coopvec(x), made.coopvec(x))
    for task in TASKS:
        assert torch.equal(again.ensemble(x, task), made.ensemble(x, task))
        assert torch.equal(again.calibration[task], made.calibration[task])
    for key in ("alignment", "boosting", "scaling", "seed", "centered"):
        assert getattr(again, key) == getattr(made, key)
    assert torch.equal(again.alignment_matrix, made.alignment_matrix)
    for key, value in vars(made.history).items():
        other = getattr(again.history, key)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert again.pool.fingerprint == made.pool.fingerprint
    assert not [
        f for f in os.listdir(tmp_path / "run") if not f.endswith((".safetensors", ".json"))
    ]


def test_without_a_template_all_but_the_encoder_works(tmp_path):
    made = fitted()
    made.save(tmp_path)
    again = NeuLig.load(tmp_path)
    z = made.features(images(4, 9))
    assert torch.equal(again.portland.coopvec(z), made.portland.coopvec(z))
    merged = again.merge("dataset", task="letters")
    expected = made.merge("dataset", task="letters")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in merged)
    kinds = {s.name: s.kind for s in again.pool.segments}
    assert kinds["norm.running_var"] == "buffer" and kinds["norm.weight"] == "parameter"
    with pytest.raises(ValueError, match="no template module to run"):
        again.coopvec(images(1, 0))


@pytest.mark.parametrize("arena", [torch.bfloat16, torch.float64], ids=str)
def test_an_arena_of_another_dtype_than_the_experts(arena, tmp_path):
    made = NeuLig(ExpertPool(experts(), dtype=arena), heads())
    made.save(tmp_path)
    again = NeuLig.load(tmp_path, Encoder().to(arena))
    assert again.pool.params.dtype == arena
    assert torch.equal(again.pool.params, made.pool.params)
    assert again.history is None and again.calibration == {}


def test_the_experts_files_are_state_dicts_on_their_own(tmp_path):
    made = fitted()
    made.save(tmp_path)
    names = json.loads((tmp_path / "neulig.json").read_text())["experts"]["files"]
    for i, name in enumerate(names):
        module = Encoder()
        module.load_state_dict(safetensors.torch.load_file(tmp_path / name))
        for key, value in made.pool.state_dict(i).items():
            assert torch.equal(module.state_dict()[key], value)


def test_saving_again_replaces_and_clears_up(tmp_path):
    made = engine()
    made.save(tmp_path)
    before = set(os.listdir(tmp_path))
    made.fit(loaders(), epochs=1, progress=False)
    made.save(tmp_path)
    after = set(os.listdir(tmp_path))
    assert len(before) == len(after) == 5 and len(before - after) == 1  # the state
    assert NeuLig.load(tmp_path).calibration.keys() == made.calibration.keys()


def test_a_damaged_save_does_not_hinder_the_next(tmp_path):
    made = fitted()
    made.save(tmp_path)
    expert = sorted(tmp_path.glob("expert1-*"))[0]
    expert.write_bytes(expert.read_bytes()[:-1])
    for index in ("{", '{"format": "neulig_fast.engine.1"}'):
        (tmp_path / "neulig.json").write_text(index)
        made.save(tmp_path)
        assert torch.equal(NeuLig.load(tmp_path).portland.weight, made.portland.weight)


def test_a_save_removes_nothing_that_is_not_its_own(tmp_path):
    made = engine()
    made.save(tmp_path / "run")
    path = tmp_path / "run" / "neulig.json"
    others = [tmp_path / "run" / "expert.safetensors", tmp_path / "victim"]
    for other in others:
        other.touch()
    index = json.loads(path.read_text())
    index["experts"]["files"] += [str(others[1]), "../victim"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'../victim' is no name of a file of an engine"):
        NeuLig.load(tmp_path / "run")
    made.fit(loaders(), epochs=1, progress=False)
    made.save(tmp_path / "run")
    assert all(other.exists() for other in others)


def test_calibration_set_by_hand_is_saved(tmp_path):
    made = engine()
    made.calibration = {"letters": torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)}
    made.save(tmp_path)
    again = NeuLig.load(tmp_path)
    assert again.calibration.keys() == {"letters"} and again.history is None
    assert torch.equal(again.calibration["letters"], made.calibration["letters"])


def without_state(index):
    del index["state"]
    return "the file lacks 'state'"


def with_a_surplus(index):
    index["settings"]["mode"] = 3
    return "settings has an unknown 'mode'"


def with_another_type(index):
    index["tasks"][0]["name"] = 7
    return "name must be of the type str, got 7"


def with_another_list(index):
    index["experts"]["keys"] = [0]
    return r"keys\[0\] must be of the type str, got 0"


def with_another_dtype(index):
    index["experts"]["dtype"] = "int8"
    return "dtype must be one of float32"


def with_a_third_task(index):
    index["tasks"].append(index["tasks"][0])
    return "lacks head.2.weight"


def with_half_a_history(index):
    del index["history"]["starts"]
    return "history lacks 'starts'"


@pytest.mark.parametrize(
    "damage",
    [
        without_state,
        with_a_surplus,
        with_another_type,
        with_another_list,
        with_another_dtype,
        with_a_third_task,
        with_half_a_history,
    ],
)
def test_an_index_that_does_not_fit_is_named(tmp_path, damage):
    fitted().save(tmp_path)
    path = tmp_path / "neulig.json"
    index = json.loads(path.read_text())
    message = damage(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        NeuLig.load(tmp_path)


def test_a_full_disk_leaves_the_old_save_whole(tmp_path, monkeypatch):
    made = fitted()
    made.save(tmp_path)
    weight = made.portland.weight.clone()
    made.fit(loaders(), epochs=9, progress=False)
    replace = os.replace

    def full(source, target):
        if str(target).endswith("neulig.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        made.save(tmp_path)
    assert torch.equal(NeuLig.load(tmp_path).portland.weight, weight)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved engine"):
        NeuLig.load(tmp_path / "nothing")
    fitted().save(tmp_path)
    (state,) = tmp_path.glob("state-*")
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"state-.* is damaged"):
        NeuLig.load(tmp_path)
    state.write_bytes(content)
    expert = sorted(tmp_path.glob("expert1-*"))[0]
    content = expert.read_bytes()
    expert.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="not those that were saved"):
        NeuLig.load(tmp_path)
    expert.write_bytes(content)
    with pytest.raises(ValueError, match="template"):
        NeuLig.load(tmp_path, nn.Linear(3, 3))
    (tmp_path / "neulig.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="not of the format"):
        NeuLig.load(tmp_path)
    (tmp_path / "neulig.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        NeuLig.load(tmp_path)
