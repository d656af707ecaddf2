"""Vision MLPs of odd widths, padded: the same numbers but for rounding, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from specvlm.models.padding import pad_tower, pays


class Gated(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(12, width, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(width, 12, bias=bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def model_of(*mlps: nn.Module, text: nn.Module) -> nn.Module:
    """A model with the parts that `pad_tower` looks at."""
    hf, hf_model = nn.Module(), nn.Module()
    hf_model.visual, hf_model.language_model = nn.ModuleList(mlps), text
    hf.model, hf.get_decoder = hf_model, lambda: text
    return hf


@pytest.mark.parametrize("width", [3420 // 12, 13, 65, 100, 127])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_padded_mlp_gives_the_same_numbers(width, bias):
    mlp, text = Gated(width, bias).double(), Gated(width, bias).double()
    hf, x = model_of(mlp, text=text), torch.randn(7, 12, dtype=torch.float64)
    want = mlp(x)
    assert pad_tower(hf) == 1
    assert mlp.down_proj.in_features == mlp.gate_proj.out_features == mlp.up_proj.out_features == -(-width // 64) * 64
    assert mlp.down_proj.weight.shape == (12, mlp.down_proj.in_features)
    torch.testing.assert_close(mlp(x), want, rtol=1e-12, atol=1e-12)
    assert text.down_proj.in_features == width  # the text model's kernels know its own widths
    assert pad_tower(hf) == 0


@pytest.mark.parametrize("width", [64, 72, 3456])
def test_widths_that_can_be_read_whole_stay(width):
    mlp = Gated(width, True)
    weights = copy.deepcopy(mlp.state_dict())
    assert pad_tower(model_of(mlp, text=nn.Module())) == 0
    assert all(torch.equal(weights[name], tensor) for name, tensor in mlp.state_dict().items())


def test_it_pays_on_a_gpu_in_16_bits_alone():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert pays(torch.bfloat16, cuda) and pays(torch.float16, cuda)
    assert not pays(torch.float32, cuda) and not pays(torch.bfloat16, cpu)


@torch.inference_mode()
def test_the_features_of_a_tower_are_the_same():
    model = tiny.wrap(copy.deepcopy(tiny.model("qwen2_5_vl").hf))
    prompt = tiny.prompt("qwen2_5_vl", seed=1)
    for module in model.hf.model.visual.modules():  # an odd width
        if hasattr(module, "down_proj"):
            for part in (module.gate_proj, module.up_proj):
                part.weight, part.bias = (nn.Parameter(t[:-3].clone(), requires_grad=False) for t in (part.weight, part.bias))
            module.down_proj.weight = nn.Parameter(module.down_proj.weight[:, :-3].clone(), requires_grad=False)
            module.down_proj.in_features -= 3
    want = model.features(prompt)
    assert pad_tower(model.hf) > 0
    torch.testing.assert_close(model.features(prompt), want, rtol=1e-9, atol=1e-9)
