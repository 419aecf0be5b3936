"""Steps on a GPU against the CPU (pytest -m cuda), and on torch's meta device, where none of the CPU fits.

Nothing of the project has run on CUDA yet: the tolerances here are what fp32 without TF32 should keep.
"""
import copy
from contextlib import nullcontext

import pytest
import torch
from synthetic import SmallHead, rows_of
from tiny_flags import SET

import data
import dirl
import eval as eval_py
import mil
import train
from common import optimization
from common.files import load_tensors

cuda = pytest.mark.cuda
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
FLAGS = [*SET, "--batch", "2", "--epochs", "2", "--warmup-epochs", "1", "--out-dim", "64",
         "--disentangled-dim", "32", "--local-crops", "2", "--drop-path", "0", "--precision", "fp32"]

VIEWS = data.Augmentation(2, global_size=96, local_size=48)


def made_views(device="cpu"):
    crops = torch.randint(0, 256, (4, 3, 96, 96), generator=torch.Generator().manual_seed(0)).byte()
    cells = torch.rand(4, 20, 2, generator=torch.Generator().manual_seed(1)) * 96
    views, priors = data.make_views(crops, cells, torch.Generator().manual_seed(2), VIEWS)
    return [x.to(device) for x in views], [p.to(device) for p in priors]


def model_of(method):
    torch.manual_seed(0)
    return dirl.DiRL(dirl.vit_t(4), method, 64, 32)


def one_step(student, device):
    """Losses, gradients, centres and the teacher after a step, on the CPU."""
    student = student.to(device)
    teacher, loss_fn = dirl.make_teacher(student), dirl.DiRLLoss(student).to(device)
    views, priors = made_views(device)
    optimizer = optimization.build_optimizer(student)
    with torch.no_grad():
        target = teacher(views[:1], priors[:1])
    loss, each = loss_fn(student(views, priors), target)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters()}
    optimization.clip_gradients(list(student.parameters()), 3.0)
    optimizer.step()
    dirl.update_teacher(student, teacher, 0.9)
    loss_fn.update_centers()
    out = {"loss": loss.detach(), **each, **grads, **loss_fn.state_dict(),
           **{f"teacher {name}": p for name, p in teacher.named_parameters()}}
    return {name: tensor.cpu() if device != "meta" else tensor for name, tensor in out.items()}


@pytest.mark.parametrize("method", list(dirl.METHODS))
def test_a_step_makes_no_tensor_on_another_device(monkeypatch, method):
    """On meta nothing is computed, and a tensor of the CPU that meets one of meta is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kw: nullcontext())  # torch's has no meta device
    monkeypatch.setattr(dirl, "DINOHead", SmallHead)
    student = model_of(method).to("meta")
    teacher, loss_fn = dirl.make_teacher(student), dirl.DiRLLoss(student).to("meta")
    views, priors = made_views("meta")
    loss, each = loss_fn(student(views, priors), teacher(views[:1], priors[:1]))
    loss.backward()
    finite = optimization.clip_gradients(list(student.parameters()), 3.0)
    dirl.update_teacher(student, teacher, 0.9)
    loss_fn.update_centers()
    assert {t.device.type for t in (loss, finite, *each.values())} == {"meta"}
    assert all(p.grad.device.type == "meta" for p in student.parameters())
    scores, bag, attention = mil.DSMIL(8, 2).to("meta")(torch.empty(5, 8, device="meta"))
    assert mil.dsmil_loss(scores, bag, 1).device.type == attention.device.type == "meta"


@cuda
@needs_gpu
@pytest.mark.parametrize("method", list(dirl.METHODS))
def test_a_step_on_cuda_is_that_on_the_cpu(method):
    student = model_of(method)
    want, got = one_step(copy.deepcopy(student), "cpu"), one_step(student, "cuda")
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=2e-4, rtol=2e-3, msg=name)


@cuda
@needs_gpu
def test_logits_on_cuda_keep_their_digits_in_tf32():
    """At the teacher's temperature a logit is off by 0.01 at most, as train.py multiplies on a GPU."""
    head, f = dirl.DINOHead(24, 4096).cuda(), torch.randn(256, 24).cuda()
    before = torch.backends.cuda.matmul.allow_tf32  # pytest's monkeypatch cannot put it back
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            z, logits = head.mlp(f), head(f)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    weight = torch.nn.functional.normalize(head.last_layer.weight.double(), dim=-1)
    want = torch.nn.functional.normalize(z.double(), dim=-1) @ weight.T
    assert logits.dtype == torch.float32 and ((logits - want) / 0.04).abs().max() < 0.01


@cuda
@needs_gpu
def test_views_on_cuda_are_those_of_the_same_numbers(monkeypatch):
    """The generators of CPU and GPU differ, so the CPU's numbers are used for both."""
    def of_cpu(draws, shape, low, high, numbers):
        return torch.empty(shape).uniform_(low, high, generator=numbers).to(draws.device)
    crops, cells = torch.randint(0, 256, (4, 3, 96, 96)).byte(), torch.rand(4, 20, 2) * 96
    out = []
    for device in ("cpu", "cuda"):
        numbers = torch.Generator().manual_seed(3)
        monkeypatch.setattr(data.Draws, "uniform", lambda *args, numbers=numbers: of_cpu(*args, numbers))
        out.append(data.make_views(crops, cells, torch.Generator(device), VIEWS))
    for (x, p), (y, q) in zip(zip(*out[0]), zip(*out[1])):
        torch.testing.assert_close(y.cpu(), x, atol=2e-3, rtol=0)
        assert torch.equal(q.cpu(), p)


@cuda
@needs_gpu
@pytest.mark.parametrize("method", list(dirl.METHODS))
def test_an_epoch_resumes_on_cuda_and_its_encoder_is_evaluated(place, folder, method, capsys):
    argv = [*FLAGS, "--method", method, "--device", "cuda"]
    torch.cuda.reset_peak_memory_stats()
    assert train.main([*argv, "--run", "runs/whole"]) == 0
    assert torch.cuda.max_memory_allocated() < 2 ** 31
    assert train.main([*argv, "--run", "runs/parts", "--max-steps", "2"]) == 0
    assert train.main([*argv, "--run", "runs/parts"]) == 0
    whole, parts = (rows_of(place / "runs" / name / "log.csv") for name in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-2)
    a, b = (load_tensors(place / "runs" / name / "checkpoint.pt")["step"] for name in ("whole", "parts"))
    assert a == b == 6
    features = {}
    for device in ("cpu", "cuda"):
        assert eval_py.main([*SET, "--checkpoint", "runs/whole", "--device", device, "--repeats", "1",
                             "--epochs", "3"]) == 0
        features[device] = {row["measure"]: float(row["mean"])
                            for row in rows_of(place / "runs" / "whole" / "results.csv")}
    middle = "tokens with attention 0.5 to 2"
    assert features["cuda"][middle] == pytest.approx(features["cpu"][middle], abs=1e-2)


@cuda
@needs_gpu
def test_dsmil_on_cuda_is_that_on_the_cpu():
    bags = [(torch.randn(300, 16) + label, label) for label in (0, 1) * 4]
    out = []
    for device in ("cpu", "cuda"):
        moved = [(x.to(device), label) for x, label in bags]
        model = mil.train_dsmil(moved[:6], moved[6:], 2, epochs=5)
        out.append(torch.stack([mil.dsmil_predict(model, x).cpu() for x, _ in moved]))
    torch.testing.assert_close(out[1], out[0], atol=1e-3, rtol=0)


@cuda
@needs_gpu
def test_a_step_on_cuda_does_not_wait_for_the_gpu():
    """torch says where a call waits: none may between the views and the teacher's update."""
    student = model_of("dirl").cuda()
    teacher, loss_fn = dirl.make_teacher(student), dirl.DiRLLoss(student).cuda()
    crops = torch.randint(0, 256, (4, 3, 96, 96)).byte().cuda()
    cells, optimizer = torch.rand(4, 20, 2).cuda() * 96, optimization.build_optimizer(student)
    for warm in (True, False):
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            views, priors = data.make_views(crops, cells, torch.Generator("cuda").manual_seed(0), VIEWS)
            with torch.no_grad():
                target = teacher(views[:1], priors[:1])
            loss, _ = loss_fn(student(views, priors), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimization.clip_gradients(list(student.parameters()), 3.0)
            optimizer.step()
            dirl.update_teacher(student, teacher, 0.9)
            loss_fn.update_centers()
        finally:
            torch.cuda.set_sync_debug_mode("default")
