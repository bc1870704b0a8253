"""The optimizers against their definitions: invariance, dense least squares, the full weight, other people's code."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from airtune.aggregation.declaring import exchange_of
from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.experiment.schema import read, write
from airtune.lora import ONLY_A, ONLY_B, Adapter, AdapterSlice, LoraFactors
from airtune.methods.galore_avg import GaLoreAverage
from airtune.methods.rac_lora import RACLoRA
from airtune.optimizers import OPTIMIZERS, SGD, AdamW, GaLore, LoraPlus, LoraPro, LoraRite
from airtune.training.evaluation import evaluate
from airtune.training.local import LocalTrainer
from airtune.training.model import ActiveAdapter
from airtune.training.optimizers import make_optimizer
from airtune.training.optimizers.lora_pro import pro_gradients, sylvester
from airtune.types import ClientTask, LocalTraining, ServerModel, TrainingJob
from tiny_networks import federated, random_adapter, tokens

SIZES = [(6, 9, 3), (6, 9, 3), (8, 5, 2)]  # (out, in, rank): two of one size, which are computed together, one other


def draw(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(scaling=1.7, zero_b=False):
    """Return factors with random values, their weights' targets, and a head."""
    found = {}
    for i, (m, n, r) in enumerate(SIZES):
        b = torch.zeros(m, r, dtype=torch.float64) if zero_b else draw(m, r, seed=10 * i)
        found[f"slot{i}"] = LoraFactors(A=draw(r, n, seed=10 * i + 1), B=b, scaling=scaling + i / 3)
    return found


def active_of(factors, tensors=frozenset({"A", "B"}), extras=True):
    leaves = {
        name: replace(
            f,
            A=f.A.clone().requires_grad_("A" in tensors),
            B=f.B.clone().requires_grad_("B" in tensors),
        )
        for name, f in factors.items()
    }
    head = {"head": draw(4, seed=99).requires_grad_(extras)}
    layer = {name: i for i, name in enumerate(leaves)}
    adapter = Adapter(leaves, {name: (name,) for name in leaves}, layer, len(leaves), head)
    part = replace(AdapterSlice.everything(adapter.shape, tensors), extras=extras)
    return ActiveAdapter(part, adapter, adapter)


def loss_of(active, step=0):
    """Return a loss whose gradient of the weight changes with the weight and with the step."""
    total = sum(tensor.square().sum() for tensor in active.adapter.extras.values())
    for i, f in enumerate(active.adapter.factors.values()):
        weight = f.product() + draw(*f.product().shape, seed=7 * i + step)
        total = total + (weight.square() * draw(*weight.shape, seed=3 * i).abs()).sum() + weight.sin().sum()
    return total


def trained(active, training, steps=6, scale=1.0):
    optimizer = make_optimizer(active, training)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        (scale * loss_of(active, step)).backward()
        optimizer.step()
    return {name: f.product().detach() for name, f in active.adapter.factors.items()}


# ---------------------------------------------------------------------------------------------------------- LoRA-RITE


def refactored(factors, kind):
    """Return other factors of the same products."""
    found = {}
    for i, (name, f) in enumerate(factors.items()):
        mix = {
            "scale": 10.0 * torch.eye(f.rank, dtype=torch.float64),
            "rotation": torch.linalg.qr(draw(f.rank, f.rank, seed=50 + i))[0],
            "any": draw(f.rank, f.rank, seed=60 + i) + 3 * torch.eye(f.rank, dtype=torch.float64),
        }[kind]
        found[name] = replace(f, A=torch.linalg.solve(mix, f.A), B=f.B @ mix)
    return found


@pytest.mark.parametrize("kind", ["scale", "rotation", "any"])
@pytest.mark.parametrize("chosen", [LoraRite(skip_above=math.inf), LoraRite(skip_above=math.inf, escape=True)])
def test_lora_rite_does_not_see_how_the_product_is_factored(kind, chosen):
    training = LocalTraining(learning_rate=0.05, optimizer=chosen)
    first = trained(active_of(pairs()), training)
    other = trained(active_of(refactored(pairs(), kind)), training)
    start = pairs()
    for name in first:
        moved = (first[name] - start[name].product()).norm()
        assert moved > 0.1
        assert (first[name] - other[name]).norm() < 1e-6 * moved


def test_adamw_does_see_it():
    training = LocalTraining(learning_rate=0.05)
    first, other = (trained(active_of(f), training) for f in (pairs(), refactored(pairs(), "scale")))
    assert all((first[name] - other[name]).norm() > 0.1 * first[name].norm() for name in first)


@pytest.mark.parametrize(
    ("chosen", "decay", "scale"),
    [
        (LoraRite(), 0.0, 0.02),
        (LoraRite(escape=True, beta2=0.9), 0.01, 0.02),
        (LoraRite(skip_above=math.inf, clip=math.inf), 0.0, 1.0),
        (LoraRite(skip_above=0.5, clip=math.inf), 0.0, 0.05),
    ],
)
@pytest.mark.parametrize("zero_b", [False, True])
def test_lora_rite_is_that_of_pytorch_optimizer(chosen, decay, scale, zero_b):
    theirs_of = pytest.importorskip("pytorch_optimizer").LoRARite
    training = LocalTraining(learning_rate=0.05, weight_decay=decay, optimizer=chosen)
    ours = active_of(pairs(zero_b=zero_b), extras=False)
    trained(ours, training, steps=8, scale=scale)
    other = active_of(pairs(zero_b=zero_b), extras=False)
    in_order = [tensor for f in other.adapter.factors.values() for tensor in (f.A, f.B)]
    theirs = theirs_of(
        in_order,
        lr=0.05,
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.epsilon,
        weight_decay=decay,
        update_skipping=0.0 if math.isinf(chosen.skip_above) else chosen.skip_above,
        clip_unmagnified_grad=0.0 if math.isinf(chosen.clip) else chosen.clip,
        apply_escape=chosen.escape,
    )
    for step in range(8):
        theirs.zero_grad()
        (scale * loss_of(other, step)).backward()
        theirs.step()
    for name, f in ours.adapter.factors.items():
        assert torch.allclose(f.A, other.adapter.factors[name].A, rtol=1e-8, atol=1e-10)
        assert torch.allclose(f.B, other.adapter.factors[name].B, rtol=1e-8, atol=1e-10)


def test_lora_rite_skips_and_clips():
    start = pairs()
    still = trained(active_of(pairs()), LocalTraining(optimizer=LoraRite(skip_above=1e-9)))
    assert all(torch.equal(still[name], start[name].product()) for name in start)


# ----------------------------------------------------------------------------------------------------------- LoRA-Pro


def weight_gradient(m, n, seed):
    return draw(m, n, seed=seed)


@pytest.mark.parametrize("scaling", [1.0, 0.3, 4.0])
def test_lora_pro_is_the_dense_least_squares_solution(scaling):
    """Minimise |s b A + s B a - G| over (b, a), and of all minimisers the nearest to the ordinary gradients."""
    m, n, r = 7, 9, 3
    a, b, g = draw(r, n, seed=1), draw(m, r, seed=2), draw(m, n, seed=3)
    grad_a, grad_b = scaling * b.T @ g, scaling * g @ a.T
    # the linear map (b, a) -> s b A + s B a as a dense matrix, row-major
    eye_m, eye_n = torch.eye(m, dtype=g.dtype), torch.eye(n, dtype=g.dtype)
    matrix = scaling * torch.cat([torch.kron(eye_m, a.T.contiguous()), torch.kron(b, eye_n)], dim=1)
    ordinary = torch.cat([grad_b.reshape(-1), grad_a.reshape(-1)])
    nearest = ordinary + torch.linalg.pinv(matrix) @ (g.reshape(-1) - matrix @ ordinary)
    new_a, new_b = pro_gradients(a[None], b[None], grad_a[None], grad_b[None], torch.tensor([scaling]).double(), 1e-14)
    assert torch.allclose(new_b[0].reshape(-1), nearest[: m * r], atol=1e-9)
    assert torch.allclose(new_a[0].reshape(-1), nearest[m * r :], atol=1e-9)
    reached = scaling * (new_b[0] @ a + b @ new_a[0])
    project_b, project_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    assert torch.allclose(reached, project_b @ g + (eye_m - project_b) @ g @ project_a, atol=1e-9)
    assert (grad_a * new_a[0]).sum() >= 0 and (grad_b * new_b[0]).sum() >= 0


def test_the_sylvester_equation_is_solved():
    left, right, wanted = draw(2, 4, 6, seed=1), draw(2, 4, 6, seed=2), draw(2, 4, 4, seed=3)
    left, right = left @ left.mT, right @ right.mT
    x = sylvester(left, right, wanted)
    assert torch.allclose(left @ x + x @ right, wanted, atol=1e-10)


def test_lora_pro_forms_nothing_of_the_size_of_the_weight():
    """And the change of the weight is that of the first terms alone, whatever X is."""
    m, n, r, scaling = 40, 30, 3, 0.7
    a, b, g = draw(r, n, seed=1), draw(m, r, seed=2), draw(m, n, seed=3)
    grad_a, grad_b = scaling * b.T @ g, scaling * g @ a.T
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor))
            return result

    with Watch():
        new_a, new_b = pro_gradients(
            a[None], b[None], grad_a[None], grad_b[None], torch.tensor([scaling]).double(), 1e-14
        )
    assert largest and max(largest) <= r * max(m, n)
    first_a = torch.linalg.inv(b.T @ b) @ grad_a / scaling**2
    first_b = (grad_b - b @ torch.linalg.pinv(b) @ grad_b) @ torch.linalg.inv(a @ a.T) / scaling**2
    assert torch.allclose(new_b[0] @ a + b @ new_a[0], first_b @ a + b @ first_a, atol=1e-9)
    assert not torch.allclose(new_a[0], first_a, atol=1e-3)


def test_lora_pro_starts_from_zero_columns():
    """With B zero: a is zero and b the best step, (1/s^2) gB (A A')^-1."""
    a, g = draw(3, 9, seed=1), draw(7, 9, seed=3)
    b, scaling = torch.zeros(7, 3, dtype=g.dtype), 2.0
    new_a, new_b = pro_gradients(
        a[None], b[None], (0 * a)[None], (scaling * g @ a.T)[None], torch.tensor([scaling]).double(), 1e-14
    )
    assert torch.equal(new_a[0], torch.zeros_like(a))
    assert torch.allclose(scaling * new_b[0] @ a, g @ torch.linalg.pinv(a) @ a, atol=1e-9)


@pytest.mark.parametrize("tensors", [ONLY_A, ONLY_B])
def test_lora_pro_with_a_frozen_factor_projects_the_gradient(tensors):
    """One factor frozen: s b A (or s B a) is the projection of the weight's gradient."""
    active = active_of(pairs(), tensors, extras=False)
    make = make_optimizer(active, LocalTraining(optimizer=LoraPro(damping=1e-14)))
    weights = {name: f.product().detach().requires_grad_() for name, f in active.adapter.factors.items()}
    dense = ActiveAdapter(active.slice, active.adapter, active.adapter)
    loss_of(dense).backward()
    total = 0.0
    for i, w in enumerate(weights.values()):
        weight = w + draw(*w.shape, seed=7 * i)
        total = total + (weight.square() * draw(*weight.shape, seed=3 * i).abs()).sum() + weight.sin().sum()
    total.backward()
    before = {name: (f.A.detach().clone(), f.B.detach().clone()) for name, f in active.adapter.factors.items()}
    make.step()
    for name, f in active.adapter.factors.items():
        a, b = before[name]
        g, s = weights[name].grad, f.scaling
        if tensors == ONLY_B:
            assert torch.allclose(s * f.B.grad @ a, g @ torch.linalg.pinv(a) @ a, atol=1e-8)
            assert torch.equal(f.A, a) and not torch.equal(f.B, b)
        else:
            assert torch.allclose(s * b @ f.A.grad, b @ torch.linalg.pinv(b) @ g, atol=1e-8)
            assert torch.equal(f.B, b) and not torch.equal(f.A, a)


def test_lora_pro_then_is_adamw():
    chosen, training = LoraPro(), LocalTraining(learning_rate=0.03, weight_decay=0.1, optimizer="lora-pro")
    ours, other = active_of(pairs()), active_of(pairs())
    trained(ours, training, steps=5)
    adamw = make_optimizer(other, replace(training, optimizer="adamw"))
    for step in range(5):
        adamw.zero_grad(set_to_none=True)
        loss_of(other, step).backward()
        for f in other.adapter.factors.values():  # one by one, where ours are stacked
            with torch.no_grad():
                scaling = torch.tensor([f.scaling], dtype=torch.float64)
                new = pro_gradients(f.A[None], f.B[None], f.A.grad[None], f.B.grad[None], scaling, chosen.damping)
            f.A.grad, f.B.grad = new[0][0], new[1][0]
        adamw.step()
    for name, f in ours.adapter.factors.items():
        assert torch.allclose(f.A, other.adapter.factors[name].A, atol=1e-10)
        assert torch.allclose(f.B, other.adapter.factors[name].B, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------- the others


def test_lora_plus_is_adamw_with_a_faster_b():
    rates = {"learning_rate": 0.01, "head_learning_rate": 0.02}
    plus = active_of(pairs())
    trained(plus, LocalTraining(optimizer=LoraPlus(ratio=8.0), **rates), steps=1)
    slow, fast = active_of(pairs()), active_of(pairs())
    trained(slow, LocalTraining(**rates), steps=1)
    trained(fast, LocalTraining(learning_rate=0.08), steps=1)
    for name, f in plus.adapter.factors.items():
        assert torch.equal(f.A, slow.adapter.factors[name].A) and torch.equal(f.B, fast.adapter.factors[name].B)
    assert torch.equal(plus.adapter.extras["head"], slow.adapter.extras["head"])


@pytest.mark.parametrize("tensors", [ONLY_A, ONLY_B])
@pytest.mark.parametrize("scaling", [1.0, 3.0])
def test_galore_descends_the_full_weight_whatever_the_scaling(tensors, scaling):
    """Against AdamW on projected gradients of the dense weight, lifted back with the scale."""
    factors = {}
    for name, f in pairs().items():
        rows, columns = torch.linalg.qr(f.A.T)[0].T, torch.linalg.qr(f.B)[0]
        zero = torch.zeros_like
        a, b = (zero(f.A), columns) if tensors == ONLY_A else (rows, zero(f.B))
        factors[name] = LoraFactors(A=a, B=b, scaling=scaling)
    got = trained(active_of(factors, tensors, extras=False), LocalTraining(learning_rate=0.1, optimizer="galore"))
    for i, (name, f) in enumerate(factors.items()):
        weight, moments = torch.zeros_like(got[name]), torch.zeros_like(f.A if tensors == ONLY_A else f.B)
        moments.requires_grad_()
        adam = torch.optim.Adam([moments], lr=0.1)
        for step in range(6):
            w = weight.clone().requires_grad_()
            shifted = w + draw(*w.shape, seed=7 * i + step)
            loss = (shifted.square() * draw(*w.shape, seed=3 * i).abs()).sum() + shifted.sin().sum()
            loss.backward()
            moments.grad = f.B.T @ w.grad if tensors == ONLY_A else w.grad @ f.A.T
            before = moments.detach().clone()
            adam.step()
            change = moments.detach() - before
            weight += 0.25 * (f.B @ change if tensors == ONLY_A else change @ f.A)
        assert weight.norm() > 0.05
        assert torch.allclose(got[name], weight, atol=1e-7)
        assert torch.linalg.matrix_rank(got[name]) <= f.rank


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (8, 5)])
def test_galore_at_full_rank_is_dense_galore(rows, columns):
    """Against the paper's algorithm on the dense weight: SVD of the gradient every `gap` steps, moments kept."""
    gap, rank, scaling = 3, 2, 2.0
    rotation = torch.linalg.qr(draw(rows, rows, seed=1))[0]
    factors = {"layer": LoraFactors(A=torch.zeros(rows, columns, dtype=rotation.dtype), B=rotation, scaling=scaling)}
    chosen = GaLore(rank=rank, gap=gap)
    got = trained(active_of(factors, ONLY_A, extras=False), LocalTraining(learning_rate=0.1, optimizer=chosen), steps=6)
    weight, by_rows = torch.zeros_like(got["layer"]), rows <= columns
    moments = weight.new_zeros((rank, columns) if by_rows else (rows, rank)).requires_grad_()
    adam = torch.optim.Adam([moments], lr=0.1)
    for step in range(6):
        w = weight.clone().requires_grad_()
        shifted = w + draw(*w.shape, seed=step)
        ((shifted.square() * draw(*w.shape, seed=0).abs()).sum() + shifted.sin().sum()).backward()
        if step % gap == 0:
            left, _, right = torch.linalg.svd(w.grad, full_matrices=False)
            sign = torch.stack([row[row.abs().argmax()].sign() for row in right[:rank]])
            left, right = left[:, :rank] * sign, right[:rank] * sign[:, None]
        moments.grad = left.T @ w.grad if by_rows else w.grad @ right.T
        before = moments.detach().clone()
        adam.step()
        change = moments.detach() - before
        weight += 0.25 * (left @ change if by_rows else change @ right)
    assert torch.linalg.matrix_rank(got["layer"]) > rank
    if by_rows:  # on the other side the rotation reorders Adam's elements, and only the subspace is the same
        assert torch.allclose(got["layer"], weight, atol=1e-7)
    else:
        assert float(got["layer"].norm()) == pytest.approx(float(weight.norm()), rel=0.3)


def test_galore_needs_a_projector():
    with pytest.raises(InputError, match=r"training\.optimizer: galore needs a fixed projector.*galore-avg"):
        make_optimizer(active_of(pairs()), LocalTraining(optimizer="galore"))
    with pytest.raises(InputError, match="orthonormal"):
        make_optimizer(active_of(pairs(), ONLY_A), LocalTraining(optimizer="galore"))
    with pytest.raises(InputError, match="weight_decay"):
        LocalTraining(optimizer="galore", weight_decay=0.1)


@pytest.mark.parametrize("method", [GaLoreAverage(), RACLoRA()])
def test_galore_takes_the_projector_of_the_methods_that_draw_one(method):
    trainer = LocalTrainer(federated("bert"), tokens(), [np.arange(24)], seed=7)
    start = ServerModel(trainer.model.initial_adapter(0))
    server = method.prepare(start)
    exchange = exchange_of(method.composed.aggregator, 1)
    whole = AdapterSlice.everything(server.adapter.shape)
    receive, train, send = exchange.narrow(whole, whole, whole)
    training = LocalTraining(local_steps=20, learning_rate=0.05, optimizer="galore")
    job = TrainingJob(ClientTask(0, receive, train, send, training, Dense(), 1e5, 0.1), server, 1)
    result = trainer.train([job])[0]
    assert result.values.factors.keys() == server.adapter.factors.keys()
    assert all(f.frobenius_norm() > 0.01 for f in result.values.factors.values())
    with pytest.raises(InputError, match="trains A and B"):
        trainer.train([replace(job, model=start, task=replace(job.task, train=whole))])


# ----------------------------------------------------------------------------------------- all of them, and their names


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"galore"}))
def test_every_optimizer_moves_factors_and_head_and_learns(name):
    trainer = LocalTrainer(federated("bert"), tokens(), [np.arange(24)], seed=7)
    server = ServerModel(random_adapter(trainer.model, 4))
    whole = AdapterSlice.everything(server.adapter.shape)
    rate, head = {"sgd": (0.1, 0.1), "lora-plus": (1e-3, 0.01)}.get(name, (5e-3, 0.01))
    training = LocalTraining(local_steps=30, learning_rate=rate, head_learning_rate=head, optimizer=name)
    job = TrainingJob(ClientTask(0, whole, whole, whole, training, Dense(), 1e5, 0.1), server, 1)
    first, again = (list(result.values.tensors()) for result in trainer.train([job, job]))
    assert all(not torch.equal(old[2], new[2]) for old, new in zip(server.adapter.tensors(), first, strict=True))
    assert all(torch.equal(one[2], other[2]) for one, other in zip(first, again, strict=True))
    before, after = (
        evaluate(trainer.model, replace(server, adapter=whole.put(server.adapter, values)), trainer.tokens)["loss"]
        for values in (whole.take(server.adapter), trainer.train([job])[0].values)
    )
    assert after < 0.9 * before


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"galore"}))
@pytest.mark.parametrize("tensors", [ONLY_A, ONLY_B])
def test_every_optimizer_leaves_a_frozen_factor_alone(name, tensors):
    active = active_of(pairs(), tensors)
    trained(active, LocalTraining(learning_rate=0.001, optimizer=name), steps=3, scale=0.01)
    for slot, f in active.adapter.factors.items():
        assert torch.equal(f.A, pairs()[slot].A) == ("A" not in tensors)
        assert torch.equal(f.B, pairs()[slot].B) == ("B" not in tensors)
    assert not torch.equal(active.adapter.extras["head"], draw(4, seed=99))


def test_names_and_tables_make_the_same_objects():
    hint = LocalTraining
    assert (
        LocalTraining(optimizer="lora_rite").optimizer == LoraRite() == LocalTraining(optimizer="lora-rite").optimizer
    )
    assert LocalTraining().optimizer == AdamW() and LocalTraining(optimizer="sgd").optimizer == SGD()
    table = {"optimizer": {"type": "lora-plus", "ratio": 4.0}}
    assert read(hint, table, "training").optimizer == LoraPlus(ratio=4.0)
    for name in OPTIMIZERS:
        training = read(hint, {"optimizer": name}, "training")
        assert training == LocalTraining(optimizer=name)
        assert read(hint, write(hint, training), "training") == training


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"optimizer": "adamm"}, ("training.optimizer", "'adamw'")),
        ({"optimizer": {"type": "lora-plus", "ratio": 0}}, ("training.optimizer.ratio", "positive")),
        ({"optimizer": {"type": "adamw", "beta1": 1.0}}, ("training.optimizer.beta1", "below 1")),
        ({"optimizer": {"type": "lora-rite", "clip": -1}}, ("training.optimizer.clip", "positive")),
        ({"optimizer": {"type": "sgd", "ratio": 2}}, ("training.optimizer.ratio", "unknown key")),
        ({"optimizer": "lora-rite", "max_grad_norm": 1.0}, ("training.max_grad_norm", "lora-rite")),
        ({"optimizer": "galore", "weight_decay": 0.1}, ("training.weight_decay", "galore")),
    ],
)
def test_wrong_fields_are_named(table, words):
    with pytest.raises(InputError) as error:
        read(LocalTraining, table, "training")
    assert all(word in str(error.value) for word in words), str(error.value)
